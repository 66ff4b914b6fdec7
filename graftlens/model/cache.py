"""An `ActivationCache` that knows under which graft it was filled."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.model.active import Active
from graftlens.model.choice import Selection
from graftlens.model.linear import UnitsIn
from graftlens.model.mask import GraftMask
from graftlens.model.reading import tell

C = Component


class Activations(dict[str, Tensor]):
    """Activations by hook name, and the mask of the run that they are from (None before it)."""

    mask: GraftMask | None = None
    _run: GraftMask | None = None

    def filled(self, hook: str, mask: GraftMask, kept: Slice | None) -> None:
        """Remember the mask of the run that fills this in, cut to the positions that are kept."""
        # A run may read only the last rows as logits; the stream has all of them.
        if mask is self._run or (self.mask and hook.startswith(("ln_final.", "unembed."))):
            return
        self._run = self.mask = mask
        if kept is not None:
            columns = kept.apply(torch.arange(mask.shape[1]), dim=0)
            self.mask = mask.take(None, np.atleast_1d(columns.numpy()))


class GraftedCache(ActivationCache):
    """An `ActivationCache` that computes with the weights the graft chose, row by row."""

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        mask: GraftMask,
        has_batch_dim: bool = True,
    ) -> None:
        """`model` is the GraftedTransformer that ran, `mask` what it ran under."""
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.mask = mask

    def compute_head_results(self) -> None:
        """Fill in `hook_result` from `hook_z` with each row's own W_O."""
        for layer, block in enumerate(self.model.blocks):
            name = f"blocks.{layer}.attn.hook_result"
            if name not in self.cache_dict:
                z = self.cache_dict[f"blocks.{layer}.attn.hook_z"]
                rows = z.reshape(-1, *z.shape[-2:]).to(self.model.cfg.device)
                results = block.attn.o.results(rows, self.mask[C.O, layer])
                self.cache_dict[name] = results.reshape(*z.shape[:-1], -1).to(z.device)

    def _ensure_head_results(self) -> bool:
        known = f"blocks.{self.model.cfg.n_layers - 1}.attn.hook_result" in self.cache_dict
        self.compute_head_results()
        return known

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "GraftedCache":
        """The cache of some prompts of the batch only."""
        with self.model.active.under(None):  # what is plain is put under the right part of the mask
            part = super().apply_slice_to_batch_dim(batch_slice)
        rows = np.arange(self.mask.shape[0])
        wrapped = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        kept = np.atleast_1d(np.asarray(wrapped.apply(torch.from_numpy(rows), dim=0)))
        return GraftedCache(
            part.cache_dict, self.model, self.mask.take(kept, None), part.has_batch_dim
        )

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "*batch_pos_and_neuron width"]:
        """As in TransformerLens, with each row's own W_out."""
        onto = project_output_onto
        one = onto is not None and onto.ndim == 1

        def project(weight: Tensor) -> Tensor:
            if onto is None:
                return weight
            return weight @ (onto[:, None] if one else onto)

        found = self._neurons(layer, neuron_slice, pos_slice, project)
        if _slice(neuron_slice).mode == "int":
            found = found.squeeze(-2)
        return found.squeeze(-1) if one else found

    def _neurons(
        self, layer: int, neuron_slice: Any, pos_slice: Any, project: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*batch_and_pos neuron width"]:
        """What each neuron writes, by its rows' sources; `project` is applied to W_out [neuron,
        d_model] first."""
        layer = layer % self.model.cfg.n_layers
        linear: UnitsIn = self.model.blocks[layer].mlp.mlp_out
        kept = _kept(neuron_slice).apply(torch.arange(linear.n_units))
        positions = _slice(pos_slice)
        acts = positions.apply(self["post", layer, "mlp"], dim=-2)[..., kept]
        chosen = self.mask[C.MLP_OUT, layer]
        only = chosen.only(linear.equal)
        total: Tensor | None = None
        for source in sorted({linear.equal[source] for source in chosen.sources}):
            part = acts
            if only is None:
                share = chosen.shares_on(source, linear.n_units, acts, linear.equal)
                share = share.unflatten(0, self.mask.shape)
                share = share if self.has_batch_dim else share[0]
                part = acts * positions.apply(share, dim=-2)[..., kept]
            weight = linear.weight[source]
            part = part[..., None] * project(weight.T[kept.to(weight.device)]).to(acts.device)
            total = part if total is None else total + part
        assert total is not None, "every row runs some source"
        return total

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Slice,
        neuron_slice: Slice,
        project_2d: Float[Tensor, "d_model width"],
        mlp_input: bool = False,
    ) -> Float[Tensor, "neurons *batch_and_pos width"]:
        """What TransformerLens asks for where a stack is normed and projected at once."""
        if layer == 0:
            options = {"mlp_input": True} if mlp_input else {}
            return super()._stack_neuron_results_apply_ln_projected(
                layer, pos_slice, neuron_slice, project_2d, **options
            )
        scale = self._get_cached_ln_scale(layer, mlp_input, pos_slice)

        def project(weight: Tensor) -> Tensor:
            if self.model.cfg.normalization_type == "LN":
                weight = weight - weight.mean(-1, keepdim=True)
            return weight @ project_2d

        parts = [self._neurons(l, neuron_slice, pos_slice, project) for l in range(layer)]
        return (torch.cat(parts, dim=-2) / scale[..., None]).movedim(-2, 0)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*places d_model"]:
        """`model.tokens_to_residual_directions` with the unembedding that each row used."""
        with self.model.active.under(self.mask):
            found: Tensor = self.model.tokens_to_residual_directions(tokens)
        return found[0] if found.ndim == 3 and not self.has_batch_dim else found

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        **options: Any,
    ) -> Any:
        """As in TransformerLens; the bias is that of each row, so its positions are cut too.

        Where a norm follows a sublayer (Gemma 2 and 3, OLMo 2), heads are given before
        it, as in TransformerLens, so the parts do not add up to the residual stream.
        """
        kept = _kept(pos_slice)  # one position stays an axis until the end
        columns = kept.apply(torch.arange(self.mask.shape[1]), dim=0).numpy()
        with self.model.active.under(self.mask.take(None, columns)):
            stack, labels = super().get_full_resid_decomposition(
                layer, mlp_input, expand_neurons, apply_ln, kept, True, **options
            )
        if _slice(pos_slice).mode == "int":
            stack = stack.squeeze(2 if self.has_batch_dim else 1)
        return (stack, labels) if return_labels else stack

    @torch.no_grad()
    def logit_lens(
        self, *, layers: Sequence[int] | None = None, incl_mid: bool = False
    ) -> Float[Tensor, "component *batch_and_pos d_vocab"]:
        """The residual stream before each layer and at the end, read as logits.

        Each position goes through the `ln_final` and `unembed` that the graft chose there, so the
        last entry is the run's own logits.

        Args:
            layers: entries of `accumulated_resid` to read, negative ones from the end; None is all.
            incl_mid: also the stream between attention and MLP.
        """
        stack = self.accumulated_resid(layer=None, incl_mid=incl_mid)
        chosen = stack if layers is None else stack[list(layers)]
        out = []
        for resid in chosen:
            x = resid.to(self.model.cfg.device)
            logits = self.model.logits_from(x if self.has_batch_dim else x[None], self.mask)
            out.append(logits if self.has_batch_dim else logits[0])
        return torch.stack(out)

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """As `ActivationCache.logit_attrs`, with the unembedding that each position actually used.

        As there, `ln_final`'s weight and bias are left out: TransformerLens takes them to be folded
        into the unembedding, and here they are not. So the contributions do not add up to the
        logit, about which each cache warns once; those of
        `graftlens.lens.direct_logit_attribution` do.
        """
        _tell_of_norm(self)
        chosen = self.mask[C.UNEMBED, None]
        rest = (tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim)
        if chosen.only() is not None:
            with self.model.active.under(self.mask):
                return super().logit_attrs(residual_stack, *rest)
        # Positions differ: the attribution under each source, by its share of each row.
        total: Tensor | None = None
        for source in chosen.sources:
            with self.model.active.under(_uniform(self.mask, source)):
                found = super().logit_attrs(residual_stack, *rest)
            share = chosen.share_on(source, found).reshape(self.mask.shape)
            share = sliced(share, batch_slice, 0) if has_batch_dim else share[0]
            part = found * sliced(share, pos_slice, -1)
            total = part if total is None else total + part
        assert total is not None, "every row runs some source"
        return total


def sliced(x: Tensor, given: Any, dim: int) -> Tensor:
    """`x` cut along one axis by anything that TransformerLens accepts as a slice."""
    return _slice(given).apply(x, dim=dim)


def _slice(given: Any) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)


def _kept(given: Any) -> Slice:
    """The same, where one place stays an axis."""
    wanted = _slice(given)
    return Slice([int(wanted.slice)]) if wanted.mode == "int" else wanted


def masked_at(cache: ActivationCache, positions: Any, prompts: Any) -> Graft | GraftMask | None:
    """What a cache was filled under, cut to some of its positions and prompts; None where it does
    not know."""
    mask: Graft | GraftMask | None = getattr(cache, "mask", None)
    if not isinstance(mask, GraftMask):
        return getattr(cache, "graft", None)
    kept = (prompts, positions)
    counts = (torch.arange(n) for n in mask.shape)
    rows, columns = (sliced(n, k, 0) for n, k in zip(counts, kept, strict=True))
    return mask.take(np.atleast_1d(rows.numpy()), np.atleast_1d(columns.numpy()))


def _uniform(mask: GraftMask, source: int) -> GraftMask:
    """`mask` with one source everywhere at the unembedding."""
    one = Selection.uniform(source, int(np.prod(mask.shape)))
    return replace(mask, extents=(), sites={**mask.sites, (C.UNEMBED, None): one})


def _tell_of_norm(cache: ActivationCache) -> None:
    """Warn, once per cache, about what its logit attributions leave out."""
    if "_told_of_norm" not in vars(cache) and _changes(cache.model.ln_final):
        vars(cache)["_told_of_norm"] = True
        tell(
            "logit_attrs leaves out ln_final's weight, which is not folded into the "
            "unembedding here, so these contributions do not add up to the logit. "
            "graftlens.lens.direct_logit_attribution(model, prompts) gives contributions that do."
        )


def _changes(norm: Any) -> bool:
    """Whether a norm does more than to normalise: a weight that is not 1, or a bias."""
    if norm.weight is None:
        return False
    offset = norm.arch.norm_offset
    return any(bool((w + offset != 1).any()) for w in norm.weight.variants) or (
        norm.bias is not None and any(bool(b.any()) for b in norm.bias.variants)
    )


def _under_mask(name: str) -> Any:
    original = getattr(ActivationCache, name)
    signature = inspect.signature(original)

    @wraps(original)
    def method(self: GraftedCache, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if "has_batch_dim" in signature.parameters:
            bound.arguments.setdefault("has_batch_dim", self.has_batch_dim)
        given = (bound.arguments.get(key) for key in ("pos_slice", "batch_slice"))
        with self.model.active.under(masked_at(self, *given)):
            return original(*bound.args, **bound.kwargs)

    return method


# These read the model's weights: they must see the graft that filled the cache.
_WEIGHTS = [
    name
    for name in (
        "accumulated_resid",
        "apply_ln_to_stack",
        "decompose_resid",
        "stack_head_results",
        "stack_neuron_results",
    )
    if hasattr(ActivationCache, name)
]
for _name in _WEIGHTS:
    setattr(GraftedCache, _name, _under_mask(_name))


# -- plain caches --------------------------------------------------------------------------------


class UnresolvedCache(ActivationCache):
    """An `ActivationCache` made inside `with model.grafted(graft)`: it keeps using that graft.

    Where it needs a weight in which positions or heads differ, it raises a ValueError.
    """

    graft: Graft


def _under_graft(name: str) -> Any:
    original = getattr(ActivationCache, name)

    @wraps(original)
    def method(self: UnresolvedCache, *args: Any, **kwargs: Any) -> Any:
        if name == "logit_attrs":
            _tell_of_norm(self)
        with self.model.active.under(self.graft):
            return original(self, *args, **kwargs)

    return method


for _name in (
    *_WEIGHTS,
    "get_neuron_results",
    *("apply_slice_to_batch_dim", "compute_head_results", "get_full_resid_decomposition"),
    *("logit_attrs", "logit_lens"),
):
    if hasattr(ActivationCache, _name):
        setattr(UnresolvedCache, _name, _under_graft(_name))


def _knowing(original: Callable[..., None]) -> Callable[..., None]:
    """`ActivationCache.__init__`, after which a plain cache of a grafted model knows its graft.

    It cannot know it for a dictionary that other hooks filled and that is wrapped outside every
    `with model.grafted(…)`: such a cache computes with the weights that are in force.
    """

    @wraps(original)
    def init(self: Any, cache_dict: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        original(self, cache_dict, model, *args, **kwargs)
        active = getattr(model, "active", None)
        if type(self) is not ActivationCache or not isinstance(active, Active):
            return
        known = getattr(cache_dict, "mask", None) or active.here
        if isinstance(known, GraftMask):
            self.__class__, self.mask = GraftedCache, known
        elif known is not None:
            self.__class__, self.graft = UnresolvedCache, known

    return init


# TransformerLens's own code and users make plain caches, which read the model's weights long after
# the graft is out of force: only when they are made can they learn which it was.
ActivationCache.__init__ = _knowing(ActivationCache.__init__)
