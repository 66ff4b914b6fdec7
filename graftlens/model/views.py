"""Weights by source, under HookedTransformer's names: `model.W_Q` is [source, layer, head, …]."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule

from graftlens.components import COMPONENTS, Component, Cut
from graftlens.model.active import Active
from graftlens.model.arch import Architecture
from graftlens.model.forward import TransformerBlock
from graftlens.model.linear import Linear, per_head_in, per_head_out, per_row
from graftlens.model.mask import GraftMask

C = Component


class WeightViews(HookedRootModule):
    """The part of `GraftedTransformer` that gives its weights, with the source axis first."""

    arch: Architecture
    active: Active
    sources: tuple[str, ...]
    cfg: Any
    embed: Any
    unembed: Any
    blocks: Any

    def __getattr__(self, name: str) -> Any:
        # An AttributeError inside a property arrives here too, and would lose its message.
        component = next((c for c, row in COMPONENTS.items() if row.view == name), None)
        if component is None:
            return super().__getattr__(name)
        if component not in self.arch.components:
            raise AttributeError(
                f"{self.arch.family} has no {component}, so no {name}. "
                f"Its components are: {' '.join(self.arch.components)}."
            )
        return self._view(component)  # one that no property below documents

    def _layers(
        self, component: Component, parameter: str = "weight"
    ) -> Float[Tensor, "source layer ..."]:
        """One component's tensors over all sources and layers (a new tensor)."""
        if component not in self.arch.components:
            raise AttributeError(component)  # to which `__getattr__` gives its reason
        linears: list[Any] = [
            self.module_of(component, layer) for layer in self.arch.layers_of(component)
        ]
        if parameter == "weight":
            return torch.stack([linear.weight.stacked() for linear in linears], dim=1)
        count = range(len(self.sources))
        return torch.stack(
            [torch.stack([linear.bias_or_zeros(s) for s in count]) for linear in linears], dim=1
        )

    def _view(self, component: Component) -> Tensor:
        """A linear map of the layers as HookedTransformer lays it out, with the sources first."""
        weight, row = self._layers(component), COMPONENTS[component]
        if row.cut not in (Cut.HEAD, Cut.KV_HEAD):
            return weight.transpose(-1, -2)
        per_head = per_head_out if row.axis == 0 else per_head_in
        return per_head(weight, self.arch.n_units_of(component))

    def _bias(self, component: Component) -> Tensor:
        """Its bias, by head if heads are on its rows."""
        bias, row = self._layers(component, "bias"), COMPONENTS[component]
        by_head = row.cut in (Cut.HEAD, Cut.KV_HEAD) and row.axis == 0
        return bias.unflatten(-1, (self.arch.n_units_of(component), -1)) if by_head else bias

    @property
    def W_Q(self) -> Float[Tensor, "source layer head d_model d_head"]:
        """Queries of every source; stacked again on each access, as in HookedTransformer."""
        return self._view(C.Q)

    @property
    def W_K(self) -> Float[Tensor, "source layer kv_head d_model d_head"]:
        """Keys of every source, one matrix per key-value head."""
        return self._view(C.K)

    @property
    def W_V(self) -> Float[Tensor, "source layer kv_head d_model d_head"]:
        """Values of every source, one matrix per key-value head."""
        return self._view(C.V)

    @property
    def W_O(self) -> Float[Tensor, "source layer head d_head d_model"]:
        """Output maps of every source."""
        return self._view(C.O)

    @property
    def W_in(self) -> Float[Tensor, "source layer d_model d_mlp"]:
        """MLP input maps (the up projection, where gated) of every source."""
        return self._view(C.MLP_IN)

    @property
    def W_gate(self) -> Float[Tensor, "source layer d_model d_mlp"]:
        """MLP gates of every source.

        Raises:
            AttributeError: an architecture without a gate.
        """
        return self._view(C.MLP_GATE)

    @property
    def W_out(self) -> Float[Tensor, "source layer d_mlp d_model"]:
        """MLP output maps of every source."""
        return self._view(C.MLP_OUT)

    @property
    def W_E(self) -> Float[Tensor, "source d_vocab d_model"]:
        """Token embeddings of every source, as stored (Gemma's before scaling)."""
        return self.embed.weight.stacked()

    @property
    def W_pos(self) -> Float[Tensor, "source n_ctx d_model"]:
        """Learned position embeddings of every source.

        Raises:
            AttributeError: an architecture with rotary positions.
        """
        return self.pos_embed.weight.stacked()

    @property
    def W_U(self) -> Float[Tensor, "source d_model d_vocab"]:
        """Unembeddings of every source."""
        return self.unembed.linear.weight.stacked().transpose(-1, -2)

    @property
    def b_Q(self) -> Float[Tensor, "source layer head d_head"]:
        """Query biases, zeros where there are none."""
        return self._bias(C.Q)

    @property
    def b_K(self) -> Float[Tensor, "source layer kv_head d_head"]:
        """Key biases, zeros where there are none."""
        return self._bias(C.K)

    @property
    def b_V(self) -> Float[Tensor, "source layer kv_head d_head"]:
        """Value biases, zeros where there are none."""
        return self._bias(C.V)

    @property
    def b_O(self) -> Float[Tensor, "source layer d_model"]:
        """Attention output biases, zeros where there are none."""
        return self._bias(C.O)

    @property
    def b_in(self) -> Float[Tensor, "source layer d_mlp"]:
        """MLP input biases, zeros where there are none."""
        return self._bias(C.MLP_IN)

    @property
    def b_out(self) -> Float[Tensor, "source layer d_model"]:
        """MLP output biases, zeros where there are none."""
        return self._bias(C.MLP_OUT)

    @property
    def b_U(self) -> Float[Tensor, "source d_vocab"]:
        """Unembedding biases, zeros where there are none."""
        return torch.stack([self.unembed.linear.bias_or_zeros(s) for s in range(len(self.sources))])

    # -- what ActivationCache and transformer_lens.patching ask of a model -----------------------

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """The unembedding vectors of tokens: the base's, or those of a uniform graft in force.

        As in TransformerLens, `ln_final`'s weight is not folded in: multiply by `ln_final.w` for
        the true direction of the logit.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        index = torch.as_tensor(ids, device=self.cfg.device)
        return self.unembed.W_U.T[index.squeeze() if index.numel() == 1 else index]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "*batch_and_pos d_model"]:
        """The sum of b_O and b_out over the layers before `layer` (and b_O of `layer` itself when
        `mlp_input`): [d_model], or per position under a mask in force that differs there.
        """
        mask = self.active.current
        total = torch.zeros(self.arch.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for l in range(layer + int(mlp_input)):
            block = self.blocks[l]
            assert isinstance(block, TransformerBlock)
            parts: list[tuple[Component, Linear]] = [(C.O, block.attn.o)]
            if include_mlp_biases and l < layer:
                parts.append((C.MLP_OUT, block.mlp.mlp_out))
            for component, linear in parts:
                if linear.bias is None:
                    continue
                if isinstance(mask, GraftMask):
                    rows = per_row(linear.bias, mask[component, l].whole).to(total.dtype)
                    total = total + (rows if rows.ndim == 1 else rows.unflatten(0, mask.shape))
                else:
                    total = total + self.active.of(linear.bias, component, l)
        return total
