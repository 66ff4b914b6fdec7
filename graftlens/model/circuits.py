"""What HookedTransformer computes from its weights alone: circuits, counts and named tensors.

All of it is of the weights in force: the base's, or those of the graft of a surrounding
`with model.grafted(…)`, without a source axis.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from graftlens.components import Component
from graftlens.model.arch import Architecture
from graftlens.model.forward import per_query_head
from graftlens.model.views import WeightViews

C = Component


class Circuits(WeightViews):
    """The part of `GraftedTransformer` that gives the circuits of the weights in force.

    Everything here raises a ValueError where positions or heads differ under the graft in force.
    """

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T per layer and query head: [layer, head, d_model, d_model], factored."""
        return _stacked([block.attn.QK for block in self.blocks])

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O per layer and query head: [layer, head, d_model, d_model], factored."""
        return _stacked([block.attn.OV for block in self.blocks])

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """Token embeddings with the learned position embeddings below them.

        Raises:
            AttributeError: an architecture with rotary positions.
        """
        if C.POS_EMBED not in self.arch.components:
            raise AttributeError(C.POS_EMBED)  # to which `__getattr__` gives its reason
        return torch.cat([self.embed.W_E, self.pos_embed.W_pos])

    def all_composition_scores(
        self, mode: str
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each head's OV circuit is read by later heads' queries ("Q"), keys or values.

        Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021): norm of the
        product over the product of the norms. 0 where the second head is not in a later layer.

        Raises:
            ValueError: another mode.
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f'mode={mode!r}. Allowed: "Q", "K" or "V".')
        left = self.OV
        right = left if mode == "V" else self.QK if mode == "Q" else self.QK.T
        layers = torch.arange(self.arch.n_layers, device=self.cfg.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        scores = composition_scores(left, right, broadcast_dims=True)
        return torch.where(later, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """The names of all heads: L0H0, L0H1, …"""
        heads = range(self.arch.n_heads)
        return [f"L{layer}H{head}" for layer in range(self.arch.n_layers) for head in heads]

    @property
    def n_params_total(self) -> int:
        """The number of parameters of one source as HookedTransformer counts them: biases of zeros,
        and a tied embedding twice, included."""
        with self.active.under(None):
            weights = NamedWeights(self)
            return sum(weights.stored(name).numel() for name in weights)

    @property
    def adapter(self) -> "Circuits":
        """Whose `apply_output_logits_transform` TransformerLens 4 applies after the unembedding."""
        return self

    def apply_output_logits_transform(
        self, logits: Float[Tensor, "*places d_vocab"]
    ) -> Float[Tensor, "*places d_vocab"]:
        """The soft cap of the logits, where the architecture has one."""
        cap = self.arch.logit_softcap
        if cap is None:
            return logits
        capped = torch.tanh(logits / cap) * cap
        # A token that a source lacks has no logit to be capped.
        lacks = self.unembed.vocabularies.differ
        return capped.masked_fill(logits.isneginf(), -torch.inf) if lacks else capped

    def tl_parameters(self) -> "NamedWeights":
        """HookedTransformer's names for its parameters -> the tensors in force.

        Inside `with model.grafted(…)` they stay those of that graft. Norms and embeddings are those
        that the forward multiplies by (Gemma's norms with 1 added, its embedding scaled); W_K and
        W_V have one matrix per query head.
        """
        return NamedWeights(self)


class NamedWeights(Mapping[str, Tensor]):
    """A model's tensors without a source axis under HookedTransformer's parameter names."""

    def __init__(self, model: Circuits) -> None:
        self.model = model
        self.graft = model.active.here
        self._names = tuple(_names(model.arch))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self.graft is None:
            return self._multiplied_by(name)
        with self.model.active.under(self.graft):
            return self._multiplied_by(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def stored(self, name: str) -> Tensor:
        """One tensor as the model holds it, one matrix per key-value head."""
        tensor = reduce(getattr, name.split("."), self.model)
        assert isinstance(tensor, Tensor)
        return tensor

    def _multiplied_by(self, name: str) -> Tensor:
        tensor, arch = self.stored(name), self.model.arch
        if name == "embed.W_E" and arch.embed_scale != 1:
            return tensor * torch.tensor(arch.embed_scale, dtype=tensor.dtype)
        if name.endswith(".w") and arch.norm_offset:
            return tensor + arch.norm_offset
        return per_query_head(tensor, arch) if name.endswith(("_K", "_V")) else tensor


def _names(arch: Architecture) -> Iterator[str]:
    """The parameters of a HookedTransformer of this architecture, in its order."""
    norm = {"layer": ("w", "b"), "layer_plain": (), "rms": ("w",)}[arch.norm]
    yield "embed.W_E"
    if C.POS_EMBED in arch.components:
        yield "pos_embed.W_pos"
    for layer in range(arch.n_layers):
        block = f"blocks.{layer}"
        for component in (C.LN1, C.LN1_POST, C.LN2, C.LN2_POST):
            if component in arch.components:
                yield from (f"{block}.{component}.{name}" for name in norm)
        for letter in "QOKV":
            yield from (f"{block}.attn.{kind}_{letter}" for kind in ("W", "b"))
        if arch.qk_norm != "none":
            yield from (f"{block}.attn.{letter}_norm.w" for letter in "qk")
        names = ("W_in", "b_in", "W_out", "b_out", *(("W_gate",) if arch.mlp == "gated" else ()))
        yield from (f"{block}.mlp.{name}" for name in names)
    yield from (f"ln_final.{name}" for name in norm)
    yield from ("unembed.W_U", "unembed.b_U")


def _stacked(circuits: list[FactoredMatrix]) -> FactoredMatrix:
    return FactoredMatrix(
        torch.stack([circuit.A for circuit in circuits]),
        torch.stack([circuit.B for circuit in circuits]),
    )


# -- what would change the weights ---------------------------------------------------------------


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(self: Circuits, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{name}: grafting needs every source's raw weights. Folding or centring changes each "
            "source's weights by that source's own norms and means, and a row that mixes sources "
            "would no longer run either one's numbers. Process one source alone as a "
            "HookedTransformer (TransformerLens 3.9) or TransformerBridge; for logits' terms with "
            "the norm included, use graftlens.lens.direct_logit_attribution(model, prompts)."
        )

    method.__name__ = name
    method.__qualname__ = f"Circuits.{name}"
    method.__doc__ = "Refused: a grafted model keeps the weights of its sources as they are."
    return method


for _name in (
    *("process_weights_", "process_weights", "load_and_process_state_dict"),
    *("fold_layer_norm", "fold_value_biases", "refactor_factored_attn_matrices"),
    *("center_writing_weights", "center_unembed"),
):
    setattr(Circuits, _name, _refused(_name))
