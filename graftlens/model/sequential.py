"""The paper's own algorithm, as fast as possible: token by token through Hugging Face's model.

Before each token the parameters of a Hugging Face model are swapped by pointer, and its own
key-value cache carries on (arXiv 2506.20746 copies them). Nothing of graftlens' forward or masks is
used, so that sweeps can be checked against it; benchmarks also compare with it.
"""

import copy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftlens.components import (
    COMPONENTS,
    Component,
    expand_components,
    layer_group,
)
from graftlens.graft import Graft, Rule
from graftlens.model.arch import FAMILIES, Site
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.mask import select
from graftlens.model.quiet import quiet
from graftlens.model.weights import Sourced, joined
from graftlens.prompts import Tokenized

C = Component

#: The rules that reach one position, in the graft's order.
InForce = tuple[Rule, ...]
#: Per layer, the sources whose rotary tables turn the heads of q and those of k; one where all
#: agree.
_Turned = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
#: Source -> its share, as strengths multiply out in decimals; none is 0, and one alone is 1.
Mixed = dict[int, Decimal]
#: What each head or neuron of a component is made of (one for all where no rule cuts it), and what
#: a bias that belongs to none of them is.
Shares = tuple[tuple[Mixed, ...], Mixed]

_DECIMALS = Context(prec=60)


class SequentialError(ValueError):
    """Hugging Face's own classes cannot run this model; the message says why."""


@dataclass(frozen=True)
class _Target:
    """One parameter of the Hugging Face model, and what it is made of.

    Attributes:
        owner: the module's own parameters; putting one in here swaps it.
        name: `weight` or `bias`.
        layer: None outside the layers.
        parts: the components that share the parameter, in their order in it.
        transposed: kept as [d_in, d_out].
    """

    owner: dict[str, nn.Parameter | None]
    name: str
    layer: int | None
    parts: tuple[tuple[Component, Sourced], ...]
    transposed: bool


class Sequential:
    """A grafted model run by Hugging Face's classes, one token after another.

    Its parameters are the grafted model's own tensors. Only those that a graft mixes (by a
    strength, by head or neuron, or parts of a fused one) or that a source has in factors (an
    adapter's, which are multiplied out) are assembled, once for each combination, and forgotten
    when they exceed one source's size. Rebuild it after moving or changing the model.
    """

    def __init__(self, model: GraftedTransformer) -> None:
        """Point a Hugging Face model at the weights of `model`.

        Raises:
            SequentialError: a model without a Hugging Face config, or one that Hugging Face's
                classes cannot be built from.
        """
        self.arch, self.sources, self.device = model.arch, model.sources, model.cfg.device
        one = [weight.like for weight in model.stored()]
        self._limit = sum(t.numel() * t.element_size() for t in one)
        self._assembled = 0
        self._parameters: dict[tuple[int, tuple[bytes, ...]], nn.Parameter] = {}
        self._chosen: dict[InForce, tuple[nn.Parameter, ...]] = {}
        self._turned: dict[InForce, _Turned] = {}
        self._known: dict[InForce, int] = {}
        self._vocabularies = model.vocabularies
        self._hf = _skeleton(model)
        try:
            self._targets = tuple(_targets(model, self._hf))
        except AttributeError as error:
            raise SequentialError(
                f"Hugging Face's {type(self._hf).__name__} lacks modules that "
                f"{self.arch.family} is known to have ({error}). Please report its config."
            ) from error
        self._now: tuple[nn.Parameter | None, ...] = (None,) * len(self._targets)
        self._put(())
        unset = [name for name, p in self._hf.named_parameters() if p.is_meta]
        if unset:
            raise SequentialError(
                f"Hugging Face's {type(self._hf).__name__} has parameters that the grafted model "
                f"lacks: {', '.join(unset[:5])}. Please report its config."
            )
        self._hf.to(self.device)  # the buffers; the parameters are there
        self._tables: _WholePromptTables | None = None
        differ = model.rotary is not None and model.rotary.differ
        if differ or self.arch.rope_limit is not None:
            self._tables = _WholePromptTables(_rotary_modules(model, self._hf, differ))
            self._hf.base_model.rotary_emb = self._tables
        if differ:
            self._hand_out_tables()

    @torch.no_grad()
    def logits(
        self,
        tokens: Tokenized,
        graft: Graft,
        continuation: Sequence[int] = (),
        *,
        at: Iterable[int] | None = None,
        by_run: bool = False,
    ) -> Float[Tensor, "pos d_vocab"]:
        """Next-token logits of a prompt under a graft.

        Args:
            tokens: the prompt.
            graft: which weights each position uses.
            continuation: token ids that follow; their positions count as `last`.
            at: positions whose logits are needed, in ascending order; the others are not
                unembedded. None is all.
            by_run: neighbouring positions with the same weights go through in one pass, which is
                faster than the paper's loop and equal to it.

        Raises:
            PromptError: a rule that the prompt cannot satisfy.
            ValueError: a source, component, layer or head that the model lacks.
        """
        from transformers import DynamicCache

        ids = self._ids(tokens, continuation)
        total = ids.shape[1]
        selected = [(rule, select(rule, tokens, total)) for rule in graft.rules]
        in_force = [tuple(r for r, chosen in selected if chosen[p]) for p in range(total)]
        wanted = set(range(total) if at is None else at)
        positions = torch.arange(total, device=self.device)[None]
        cache = DynamicCache(config=self._hf.config)
        rows: list[Tensor] = []
        start = 0
        while start < total:
            end = start + 1
            while by_run and end < total and in_force[end] == in_force[start]:
                end += 1
            self._put(in_force[start])
            run: dict[str, Any] = {
                "input_ids": ids[:, start:end],
                "position_ids": positions[:, start:end],
                "past_key_values": cache,
                "use_cache": True,
            }
            kept = [p - start for p in range(start, end) if p in wanted]
            if not kept:
                self._hf.base_model(**run)
            elif len(kept) == end - start:
                rows.append(self._limited(self._hf(**run).logits[0], in_force[start]))
            else:
                keep = torch.tensor(kept, device=self.device)
                read = self._hf(**run, logits_to_keep=keep).logits[0]
                rows.append(self._limited(read, in_force[start]))
            start = end
        return torch.cat(rows)

    @torch.no_grad()
    def whole(
        self, tokens: Tokenized, source: str, continuation: Sequence[int] = ()
    ) -> Float[Tensor, "pos d_vocab"]:
        """One source's plain Hugging Face logits: a single forward pass, no cache.

        Raises:
            ValueError: a source that the model lacks.
        """
        ids = self._ids(tokens, continuation)
        rules = Graft.rule(source).rules
        self._put(rules)
        return self._limited(self._hf(input_ids=ids, use_cache=False).logits[0], rules)

    def _limited(
        self, logits: Float[Tensor, "pos d_vocab"], rules: InForce
    ) -> Float[Tensor, "pos d_vocab"]:
        """Logits, -inf for tokens that a source lacks which has a share in the unembedding."""
        if not self._vocabularies.differ:
            return logits
        if rules not in self._known:
            (mixed,), _ = self._shares_under(rules)[C.UNEMBED, None]
            self._known[rules] = min(self._vocabularies.sizes[source] for source in mixed)
        known = self._known[rules]
        lacked = logits.new_full((len(logits), logits.shape[1] - known), -torch.inf)
        return torch.cat([logits[:, :known], lacked], dim=1)

    def _ids(self, tokens: Tokenized, continuation: Sequence[int]) -> Int[Tensor, "1 pos"]:
        """The token ids of a run that now begins."""
        ids = torch.tensor([[*tokens.ids, *continuation]], device=self.device)
        if self._tables is not None:
            self._tables.begin(ids.shape[1])
        if self._assembled > self._limit:
            self._parameters.clear()
            self._chosen.clear()
            self._turned.clear()
            self._assembled = 0
        return ids

    # -- which parameter goes where --------------------------------------------------------------

    def _put(self, rules: InForce) -> None:
        """Swap in the parameters of a position; those that stay the same are not touched."""
        parameters = self._chosen.get(rules)
        if parameters is None:
            chosen = self._shares_under(rules)
            self._turned[rules] = self._tables_under(chosen)
            parameters = tuple(self._parameter(i, chosen) for i in range(len(self._targets)))
            self._chosen[rules] = parameters
        self._rules = rules
        if parameters is not self._now:
            for target, new, old in zip(self._targets, parameters, self._now, strict=True):
                if new is not old:
                    target.owner[target.name] = new
            self._now = parameters

    # -- rotary tables ---------------------------------------------------------------------------

    def _tables_under(self, chosen: dict[Site, Shares]) -> _Turned:
        """Per layer, the source whose table turns each head of q, and each of k."""
        if self.arch.rotary_dim == 0:
            return ()

        def sources(component: Component, layer: int) -> tuple[int, ...]:
            # Sources that are mixed here have one table: others are refused.
            return tuple(next(iter(mixed)) for mixed in chosen[component, layer][0])

        return tuple((sources(C.Q, l), sources(C.K, l)) for l in range(self.arch.n_layers))

    def _hand_out_tables(self) -> None:
        """Give each attention the tables of the sources that its queries and its keys are from."""
        tables = self._tables
        assert tables is not None
        name = FAMILIES[self.arch.family].layout.modules[C.O].rpartition(".")[0]
        function = sys.modules[type(self._hf).__module__].apply_rotary_pos_emb

        def turn(layer: int, given: dict[str, Any]) -> dict[str, Any]:
            queries, keys = (tables.of(layer, heads) for heads in self._turned[self._rules][layer])
            if len({cos.shape[-1] for cos, _ in (*queries, *keys)}) > 1:
                pair: tuple[Any, Any] = (_Turns(function, queries, keys, self.arch.d_head), _Zero())
            else:
                stacks = zip(_stacked(queries), _stacked(keys), strict=True)
                cos, sin = (_ForBoth(q, k) for q, k in stacks)
                pair = (cos, sin)
            return given | {"position_embeddings": pair}

        for layer in range(self.arch.n_layers):
            attention = self._hf.get_submodule(name.format(l=layer))
            attention.register_forward_pre_hook(
                lambda _, args, given, layer=layer: (args, turn(layer, given)), with_kwargs=True
            )

    def _shares_under(self, rules: InForce) -> dict[Site, Shares]:
        """What every component is made of where these rules are in force."""
        arch, n_layers = self.arch, self.arch.n_layers
        base: Mixed = {0: Decimal(1)}
        chosen: dict[Site, Shares] = dict.fromkeys(arch.sites, ((base,), base))
        for rule in rules:
            source = _index(rule.source, self.sources, rule, "source")
            # A rule with layers stays inside them; without, it also reaches what is outside.
            layers: set[int | None] = {None} if rule.layers == ("all",) else set()
            for item in rule.layers:
                if isinstance(item, str):
                    layers.update(layer_group(item, n_layers))
                else:
                    layers.add(_index(item, range(n_layers), rule, "layer"))
            components = expand_components(rule.components, arch.components, arch.family)
            for site in [s for s in chosen if s[0] in components and s[1] in layers]:
                units, (own, bias) = rule.of(site[0]), chosen[site]
                if units is None:
                    own = tuple(_blended(one, source, rule) for one in own)
                    chosen[site] = own, _blended(bias, source, rule)
                    continue
                n_units = arch.n_units_of(site[0])
                word = COMPONENTS[site[0]].cut.split()[-1]
                _index(units[-1], range(n_units), rule, f"{site[0]} {word}")
                if rule.strength == 0:
                    continue
                every = list(own if len(own) == n_units else own * n_units)
                blended = {id(one): _blended(one, source, rule) for one in own}
                for unit in units:
                    every[unit] = blended[id(every[unit])]
                agree = all(one == every[0] for one in every)
                chosen[site] = tuple(every), every[0] if agree else base
        return chosen

    def _parameter(self, number: int, chosen: dict[Site, Shares]) -> nn.Parameter:
        """The parameter for one target, assembled if no stored tensor is the right one."""
        target = self._targets[number]
        shares = []
        for component, weight in target.parts:
            own, bias = chosen[component, target.layer]
            if COMPONENTS[component].axis == 1 and target.name == "bias":
                own = (bias,)
            elif all(one == own[0] for one in own):
                own = own[:1]
            # Sources whose tensors are equal are one.
            rows = {id(one): _of_slots(one, weight) for one in own}
            shares.append(np.array([rows[id(one)] for one in own]))
        key = (number, tuple(own.tobytes() for own in shares))
        if key not in self._parameters:
            made = [
                self._mixed(component, weight, own)
                for (component, weight), own in zip(target.parts, shares, strict=True)
            ]
            names = [component for component, _ in target.parts]
            fused = dict(zip(names, made, strict=True))
            tensor = made[0] if len(made) == 1 else joined(fused, self.arch)
            stored = {tensor.data_ptr() for tensor in target.parts[0][1].variants}
            if tensor.data_ptr() not in stored:
                self._assembled += tensor.numel() * tensor.element_size()
            # Parameters, because nn.Module takes nothing else for one; they share the storage.
            self._parameters[key] = nn.Parameter(
                tensor.T if target.transposed else tensor, requires_grad=False
            )
        return self._parameters[key]

    def _mixed(
        self, component: Component, weight: Sourced, shares: Float[np.ndarray, "unit slot"]
    ) -> Tensor:
        """One component's tensor, [d_out, d_in] or [d_out], its units each by their own shares."""
        if len(shares) == 1 and np.count_nonzero(shares) == 1 and shares.max() == 1:
            return weight.of_slot(int(shares.argmax())).detach()
        dtype = weight.like.dtype
        total = torch.zeros_like(weight.like, dtype=torch.promote_types(dtype, torch.float32))
        for slot in np.flatnonzero(shares.any(axis=0)):
            share = torch.from_numpy(shares[:, slot].copy()).to(total)
            if len(shares) > 1:
                axis = COMPONENTS[component].axis
                assert axis is not None
                share = share.repeat_interleave(total.shape[axis] // len(share))
                share = share if axis == total.ndim - 1 else share[:, None]
            total += share * weight.of_slot(int(slot)).detach()
        return total.to(dtype)


class _WholePromptTables(nn.Module):
    """Rotary tables of a whole prompt, handed out by position.

    Dynamic and longrope scaling choose their frequencies by the length that they have seen; token
    by token they would change on the way, whereas one forward pass uses one choice throughout.
    """

    def __init__(self, rotary: Sequence[nn.Module]) -> None:
        """`rotary` are the modules of all sources, the base's first."""
        super().__init__()
        self.rotary = nn.ModuleList(rotary)
        self.total = 0
        self.made: dict[tuple[int, str | None], tuple[Tensor, Tensor]] = {}
        self.asked: tuple[Tensor, Tensor] | None = None

    def begin(self, total: int) -> None:
        """Another prompt, of `total` tokens."""
        self.total = total
        self.made.clear()

    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "batch pos"], layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        self.asked = (x, position_ids)
        return self._of_source(0, layer_type)

    def of(self, layer: int, heads: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [1, pos, dim] of a layer, for the source of each head (or of all)."""
        kinds = getattr(self.rotary[0].config, "layer_types", None)
        typed = hasattr(self.rotary[0], "layer_types")  # one table for each type of layer
        kind = kinds[layer] if kinds and typed else None
        return [self._of_source(source, kind) for source in heads]

    def _of_source(self, source: int, layer_type: str | None) -> tuple[Tensor, Tensor]:
        assert self.asked is not None
        x, position_ids = self.asked
        if (source, layer_type) not in self.made:
            # A copy each time: dynamic tables remember the longest prompt so far.
            named = {} if layer_type is None else {"layer_type": layer_type}
            every = torch.arange(self.total, device=x.device)[None]
            self.made[source, layer_type] = copy.deepcopy(self.rotary[source])(x, every, **named)
        cos, sin = self.made[source, layer_type]
        return cos[:, position_ids[0]], sin[:, position_ids[0]]


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """cos and sin [1, head, pos, dim]."""
    cos, sin = (torch.stack([pair[i] for pair in pairs], dim=1) for i in range(2))
    return cos, sin


class _ForBoth:
    """cos or sin [1, head, pos, dim], by which Hugging Face multiplies the queries and then the
    keys: each by its own."""

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self._queries, self._keys = queries, keys
        self._next = iter((queries, keys))
        self.shape = queries.shape

    def unsqueeze(self, dim: int) -> "_ForBoth":
        """Made for [batch, head, pos, dim] already."""
        return _ForBoth(self._queries, self._keys)

    def __rmul__(self, x: Tensor) -> Tensor:
        return x * next(self._next)


class _Turns:
    """In the place of cos, where tables differ in how much of a head they turn.

    Hugging Face multiplies the queries by it, and then the keys: each head comes out turned, by
    Hugging Face's own function with the tables of its own source. `_Zero` stands for sin.
    """

    def __init__(self, function: Any, queries: Any, keys: Any, d_head: int) -> None:
        self._function, self._pairs = function, (queries, keys)
        self._next = iter(self._pairs)
        self.shape = (d_head,)

    def unsqueeze(self, dim: int) -> "_Turns":
        return _Turns(self._function, *self._pairs, self.shape[0])

    def __rmul__(self, x: Tensor) -> Tensor:
        pairs = next(self._next)
        heads = x.split(1 if len(pairs) > 1 else x.shape[1], dim=1)
        turned = [self._function(h, h, *pair)[0] for h, pair in zip(heads, pairs, strict=True)]
        return torch.cat(turned, dim=1)


class _Zero:
    """In the place of sin beside `_Turns`, which leaves nothing for it to add."""

    def unsqueeze(self, dim: int) -> "_Zero":
        return self

    def __rmul__(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _rotary_modules(model: GraftedTransformer, skeleton: Any, differ: bool) -> Sequence[nn.Module]:
    """Hugging Face's rotary module of each source's own config; where tables do not differ, of the
    base's alone."""
    own = skeleton.base_model.rotary_emb
    configs = [model.hf_configs[name] or model.hf_config for name in model.sources]
    others = [type(own)(config).to(model.cfg.device) for config in configs[1:]]
    return [own, *(others if differ else [])]


def _skeleton(model: GraftedTransformer) -> Any:
    """Hugging Face's model without weights; its buffers are real, in float32."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    if model.hf_config is None:
        raise SequentialError(
            "this model has no Hugging Face config (its base came from a HookedTransformer), so "
            "Hugging Face's own classes cannot run it. Give the base as a checkpoint."
        )
    # Hugging Face's fused attention has no soft cap.
    attention = "sdpa" if model.arch.attn_softcap is None else "eager"
    try:
        with quiet(), init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(
                copy.deepcopy(model.hf_config), attn_implementation=attention, dtype=torch.float32
            )
    except Exception as error:  # whatever a config can make transformers raise
        raise SequentialError(
            f"Hugging Face cannot build a model from this {model.arch.family} config "
            f"({type(error).__name__}: {error})."
        ) from error
    return skeleton.eval()


def _targets(model: GraftedTransformer, skeleton: Any) -> Iterable[_Target]:
    """Every parameter of the Hugging Face model for which the grafted model has weights."""
    layout = FAMILIES[model.arch.family].layout
    fused: dict[tuple[str, int | None], list[Component]] = {}
    for component, layer in model.arch.sites:
        name = layout.modules[component].format(l=layer)
        fused.setdefault((name, layer), []).append(component)
    for (name, layer), components in fused.items():
        components.sort(key=lambda c: layout.fused[c].index if c in layout.fused else 0)
        module = skeleton.get_submodule(name)
        held = zip(*(model.weights_of(c, layer) for c in components), strict=True)
        for parameter, tensors in zip(("weight", "bias"), held, strict=True):
            weights = [w for w in tensors if w is not None]
            if weights:
                transposed = layout.transposes(components[0]) and weights[0].like.ndim == 2
                parts = tuple(zip(components, weights, strict=True))
                yield _Target(module._parameters, parameter, layer, parts, transposed)


def _blended(mixed: Mixed, source: int, rule: Rule) -> Mixed:
    """(1 - strength) of what runs and `strength` of a source."""
    strength = Decimal(repr(float(rule.strength)))
    rest = _DECIMALS.subtract(Decimal(1), strength)
    made = {s: _DECIMALS.multiply(rest, share) for s, share in mixed.items()}
    made[source] = _DECIMALS.add(made.get(source, Decimal(0)), strength)
    kept = {s: share for s, share in made.items() if share}
    return dict.fromkeys(kept, Decimal(1)) if len(kept) == 1 else kept


def _of_slots(mixed: Mixed, weight: Sourced) -> list[float]:
    """The share of each of a weight's distinct tensors."""
    found = [Decimal(0)] * (max(weight.slots) + 1)
    for source, share in mixed.items():
        slot = weight.slots[source]
        found[slot] = _DECIMALS.add(found[slot], share)
    return [float(share) for share in found]


def _index(value: Any, known: Sequence[Any], rule: Rule, what: str) -> int:
    if value not in known:
        listed = " ".join(map(str, known)) if len(known) <= 64 else f"{known[0]} to {known[-1]}"
        raise ValueError(f"rule {str(rule)!r}: no {what} {value}. This model has: {listed}.")
    return known.index(value)
