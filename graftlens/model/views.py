"""Weights by source, under HookedTransformer's names: `model.W_Q` is [source, layer, head, …].

TransformerLens's own functions know of no sources: where one of them reads `model.W_Q`, it is given
the weights in force without that axis, as a HookedTransformer has them.
"""

import sys
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule

from graftlens.components import COMPONENTS, Component, Cut
from graftlens.graft import Graft
from graftlens.model.active import Active, said
from graftlens.model.arch import Architecture
from graftlens.model.cache import masked_at
from graftlens.model.choice import merged
from graftlens.model.embeddings import looked_up
from graftlens.model.forward import TransformerBlock, per_query_head
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
        view = "W_pos" if name == "W_E_pos" else name
        component = next((c for c, row in COMPONENTS.items() if row.view == view), None)
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
        """Token embeddings of every source, as stored (Gemma's before scaling); NaN in the rows of
        tokens that a source lacks."""
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
        """Unembeddings of every source; NaN in the columns of tokens that a source lacks."""
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
        """Unembedding biases, zeros where there are none; NaN for tokens that a source lacks."""
        if self.unembed.linear.bias is not None:
            return self.unembed.linear.bias.stacked()
        return torch.stack([self.unembed.linear.bias_or_zeros(s) for s in range(len(self.sources))])

    def _in_force(self, view: str) -> Tensor:
        """A view as HookedTransformer has it: one source, keys and values for each query head."""
        component = next(c for c, row in COMPONENTS.items() if row.view == f"W_{view[2:]}")
        row = COMPONENTS[component]
        if not row.in_layers:
            weight: Tensor = getattr(getattr(self, component.value), view)
            return weight
        weights = [getattr(getattr(block, str(row.home)), view) for block in self.blocks]
        if row.cut is Cut.KV_HEAD:
            weights = [per_query_head(weight, self.arch) for weight in weights]
        return torch.stack(weights)

    # -- what ActivationCache and transformer_lens.patching ask of a model -----------------------

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*places d_model"]:
        """The unembedding vectors of tokens: the base's, or those of a graft in force.

        Under a mask in force (`with model.grafted(cache.mask)`) that differs by position, each
        place has its own: [batch, pos, d_model], of tokens [batch, pos], or of one token, one per
        prompt [batch] or one per position [pos].

        As in TransformerLens, `ln_final`'s weight is not folded in: multiply by `ln_final.w` for
        the true direction of the logit.

        Raises:
            ValueError: positions differ under the graft in force, and it is not resolved, or these
                are not tokens of its places.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        index = torch.as_tensor(ids, device=self.cfg.device)
        index = index.squeeze() if index.numel() == 1 else index
        mask, equal = self.active.current, self.unembed.linear.equal
        if not isinstance(mask, GraftMask):
            return self.unembed.W_U.T[index]
        chosen = mask[C.UNEMBED, None]
        if len({merged(mixture, equal) for mixture in chosen.mixtures}) == 1:
            return self.unembed.W_U.T[index]
        if index.ndim == 1 and len(index) == mask.shape[0]:
            index = index[:, None]
        try:
            index = index.expand(mask.shape)
        except RuntimeError:
            raise ValueError(
                f"tokens of shape {list(index.shape)} under graft {str(mask.graft)!r}, for which "
                f"the positions of its batch of {list(mask.shape)} use different unembeddings. "
                "Give one token, one per prompt, or one per position."
            ) from None
        return looked_up(self.unembed.linear.weight, index.flatten(), chosen).unflatten(
            0, mask.shape
        )

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
                    total = total + self.active.of(linear.bias, component, l, "bias")
        return total


# -- TransformerLens's own functions -------------------------------------------------------------


class _View(property):
    """A weight by source; in force alone for TransformerLens's own functions."""

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        reader = None if model is None else _reader()
        if reader is None:
            return super().__get__(model, owner)
        assert self.fget is not None
        view, cache = self.fget.__name__, _cache_in_hand(reader, model)
        graft = model.active.current if cache is None else cache
        with model.active.under(graft):
            try:
                return model._in_force(view)
            except ValueError as error:
                called = _outermost(reader).f_code.co_name
                raise ValueError(
                    f"{called} of TransformerLens reads one {view} for all positions, of which "
                    f"there is none under graft {said(graft)!r}. A cache's own methods "
                    "(cache.logit_lens, cache.logit_attrs) and graftlens.lens use each row's "
                    "weights."
                ) from error


def _reader() -> FrameType | None:
    """TransformerLens's function that reads an attribute here, if one does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and (
        frame.f_globals is globals() or _package(frame) in ("jaxtyping", "beartype")
    ):
        frame = frame.f_back
    return frame if frame is not None and _package(frame) == "transformer_lens" else None


def _outermost(frame: FrameType) -> FrameType:
    """The function of TransformerLens that was called, of those that call each other."""
    while frame.f_back is not None and _package(frame.f_back) == "transformer_lens":
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _cache_in_hand(frame: FrameType | None, model: Any) -> Graft | GraftMask | None:
    """What the cache was filled under that TransformerLens's functions work on, at the places that
    they read: its weights are wanted, whatever is in force."""
    while frame is not None and _package(frame) == "transformer_lens":
        local = frame.f_locals
        cache = local.get("cache")
        if isinstance(cache, ActivationCache) and cache.model is model:
            positions = local.get("pos_slice", local.get("positions"))
            return masked_at(cache, positions, local.get("batch_slice"))
        frame = frame.f_back
    return None


for _name, _view in tuple(vars(WeightViews).items()):
    if isinstance(_view, property):
        setattr(WeightViews, _name, _View(_view.fget, doc=_view.__doc__))
