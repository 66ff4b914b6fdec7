"""What is asked of `attribute` and `exact_effects`: checked in one place, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from graftlens.components import COMPONENTS, Component, Cut, brief, suggest
from graftlens.find.places import Unit, in_order
from graftlens.graft import Graft, Rule, as_graft
from graftlens.metrics import Measure, known, measures
from graftlens.model.arch import Site
from graftlens.model.choice import Choice
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import Batch, collate
from graftlens.model.mask import resolve, select
from graftlens.model.reading import tell
from graftlens.positions import At, Complement, Several
from graftlens.prompts import Prompt, PromptError, dated, doubled_bos
from graftlens.sweep.cells import asked_for
from graftlens.sweep.prepared import Prepared, Scored, joined_answers

By = Literal["site", "head", "neuron", "direction"]
Outside = Literal["base", "full"]

#: In a list of positions: all tokens that no other position selects.
REST = "rest"
#: Instead of a list of positions: every token of a prompt.
EACH = "each"

#: Which components each `by` cuts into units.
_CUTS: Mapping[str, tuple[Cut, ...]] = {"head": (Cut.HEAD, Cut.KV_HEAD), "neuron": (Cut.NEURON,)}


@dataclass(frozen=True, eq=False)
class Searched:
    """A prompt that is searched.

    Attributes:
        scored: its tokens, and those of its answer; of token tensors, the target's.
        tail: the tokens that follow the prompt in a run, where whole answers are measured.
        part: the number of the position that each token belongs to, the tail's included; -1 where
            it belongs to none.
    """

    scored: Scored
    tail: tuple[int, ...]
    part: Int[np.ndarray, " pos"]


@dataclass(frozen=True, eq=False)
class Asked:
    """A question about places, with everything in it resolved. Make one with `Asked.of`.

    Attributes:
        source: whose weights the search is about.
        base: the model's base.
        measure: the row of `METRICS`, or the user's own.
        by: what sites are cut into.
        outside: what runs at all sites that are not searched.
        prompts: the prompts, by their numbers.
        positions: expressions as text, "rest" written out; numbers of tokens for `"each"`.
        every: all sites of the model, in its order.
        sites: the searched ones.
        equal: those of them whose tensors are the base's, so that grafting them changes nothing.
        units: what each site is cut into; (None,) where it is not cut. A direction is not known
            before the matrices are decomposed, so sites are whole here for `by="direction"`.
        there: for each site, which positions of a prompt are searched, unit by unit.
    """

    source: str
    base: str
    measure: Measure
    by: By
    outside: Outside
    prompts: tuple[Searched, ...]
    positions: tuple[str | int, ...]
    every: tuple[Site, ...]
    sites: tuple[Site, ...]
    equal: frozenset[Site]
    units: Mapping[Site, tuple[Unit, ...]]
    there: Mapping[Site, Bool[np.ndarray, "prompt position unit"]]

    @classmethod
    def of(
        cls,
        model: GraftedTransformer,
        prompts: Any,
        source: Any,
        *,
        positions: Any,
        metric: Any = "logprob",
        by: Any = "site",
        within: Any = None,
        outside: Any = "base",
        targets: Any = None,
        continuations: Any = None,
        exact: bool = False,
    ) -> "Asked":
        """The question that these arguments ask, as `attribute` describes them.

        `exact` asks for no gradients, so that any measure of one number will do.

        Raises:
            PromptError: prompts that cannot be run or lack what the measure needs, and positions
                that overlap or select nothing, with the prompt's number.
            ValueError: any other argument that is not one of those allowed; the message lists them.
        """
        refuse_other_models(model)
        for what, word, kind in (("by", by, By), ("outside", outside, Outside)):
            if word not in get_args(kind):
                allowed = " ".join(map(repr, get_args(kind)))
                raise ValueError(f"{what}={brief(word)}. Allowed: {allowed}.")
        base, *others = model.sources
        if source not in others:
            why = "is the base, from which nothing is grafted"
            if source != base:
                why = "is not a source of this model"
            raise ValueError(
                f"source={brief(source)} {why}. Allowed: {' '.join(others)}."
                f"{'' if source == base else suggest(str(source), others)}"
            )
        measure = _measure(metric, exact)
        whole = measure.over == "answer"
        if continuations is not None:
            prompts = _continued(prompts, continuations)
        scored = _scored(model, prompts, targets, whole, measure, continuations is not None)
        if continuations is not None:
            scored = tuple(replace(one, tokens=one.tokens.generating()) for one in scored)
        given = _expressions(positions, scored)
        searched = []
        for one in scored:
            tail = one.answer[:-1] if whole else ()
            total = len(one.tokens) + len(tail)
            part = _each(one, total) if given is None else _parts(one, source, given, total)
            searched.append(Searched(one, tuple(tail), part))
        named: tuple[str | int, ...]
        if given is None:
            named = tuple(range(max(len(one.tokens) for one in scored)))
        else:
            named = tuple(map(str, given.expressions))
        sites = in_order(model.arch)
        units = {site: _units(model, site, by) for site in sites}
        grafted = None if within is None else as_graft(within, "within")
        there = _there(model, searched, named, units, grafted)
        kept = tuple(site for site in sites if there[site].any())
        if not kept:
            raise ValueError(
                f"positions={brief(positions)} select no token of any prompt. Give positions that "
                f'the prompts have, or "{REST}" beside them.'
            )
        number = model.sources.index(source)
        return cls(
            source=source,
            base=base,
            measure=measure,
            by=by,
            outside=outside,
            prompts=tuple(searched),
            positions=named,
            every=sites,
            sites=kept,
            equal=frozenset(s for s in kept if model.equal_sources(*s)[number] == 0),
            units={site: units[site] for site in kept},
            there={site: there[site] for site in kept},
        )

    def ends(self, prompt: int) -> tuple[Graft, Graft]:
        """The grafts of a prompt at strengths 0 and 1: nothing grafted, and all that is
        searched."""
        whole = Graft.rule(self.source)
        if self.outside == "full":
            return whole | self._searched(prompt, self.base), whole
        return Graft(), self._searched(prompt, self.source)

    def has(self, prompt: int) -> tuple[int, ...]:
        """The numbers of the positions at which something of a prompt is searched."""
        found = np.zeros(len(self.positions), dtype=bool)
        for there in self.there.values():
            found |= there[prompt].any(axis=1)
        return tuple(np.flatnonzero(found).tolist())

    def _searched(self, prompt: int, source: str) -> Graft:
        """All that is searched in a prompt, from one source."""
        alike: dict[tuple[Rule, ...], list[int]] = {}
        for position in self.has(prompt):
            alike.setdefault(self._rules_at(prompt, position, source), []).append(position)
        all_in = bool((self.prompts[prompt].part >= 0).all())
        rules = []
        for shapes, members in alike.items():
            if len(alike) == 1 and all_in and len(members) == len(self._present(prompt)):
                at = At.parse("all")
            else:
                at = _union([self.positions[member] for member in members])
            rules += [replace(rule, at=at) for rule in shapes]
        return Graft(tuple(rules))

    def _present(self, prompt: int) -> Int[np.ndarray, " position"]:
        """The numbers of the positions that a prompt has."""
        part = self.prompts[prompt].part
        return np.unique(part[part >= 0])

    def _rules_at(self, prompt: int, position: int, source: str) -> tuple[Rule, ...]:
        """What is searched at one position, as rules for all of them."""
        layers: dict[tuple[Component, tuple[int, ...] | None], list[int]] = {}
        whole = 0
        for site in self.sites:
            there, units = self.there[site][prompt, position], None
            if not there.all():
                named = zip(self.units[site], there, strict=True)
                units = tuple(u for u, has in named if has and isinstance(u, int))
            if there.any() and units != ():
                whole += units is None
                layers.setdefault((site[0], units), []).append(-1 if site[1] is None else site[1])
        every = At.parse("all")
        if whole == len(self.every):
            return (Rule(source, every),)
        # Whole components of the same layers are one rule.
        together: dict[tuple[object, ...], list[Component]] = {}
        for (component, units), members in layers.items():
            key = (*members, None if units is None else component, units)
            together.setdefault(key, []).append(component)
        rules = []
        for (*members, _, units), components in together.items():  # type: ignore[assignment]
            neurons = COMPONENTS[components[0]].cut is Cut.NEURON
            rules.append(
                Rule(
                    source,
                    every,
                    tuple(map(str, components)),
                    ("all",) if members == [-1] else tuple(members),
                    None if neurons else units,
                    units if neurons else None,
                )
            )
        return tuple(rules)


def _union(positions: Sequence[str | int]) -> At:
    numbers = [position for position in positions if isinstance(position, int)]
    if numbers:
        return At.parse(numbers)
    terms = tuple(map(At.parse, positions))
    return terms[0] if len(terms) == 1 else Several("+", terms)


def refuse_other_models(model: Any) -> None:
    """That the model has sources to graft from.

    Raises:
        ValueError: it is something else, such as one source's own model.
    """
    if not isinstance(model, GraftedTransformer):
        raise ValueError(
            f"model={brief(model)} is not a GraftedTransformer. Give what graftlens.load or "
            "GraftedTransformer.from_pretrained made of two or more sources."
        )


# -- the measure -------------------------------------------------------------------------------


def _measure(metric: Any, exact: bool) -> Measure:
    """The row of a measure of one number, which gradients pass through unless `exact`."""
    row = metric if isinstance(metric, Measure) else known(str(metric))
    fits = [m.name for m in measures() if _why_not(m, exact) is None]
    if row is None:
        raise ValueError(
            f"metric={brief(metric)} is not a measure. Allowed: {' '.join(fits)}, or a Measure of "
            f"your own.{suggest(str(metric), fits)}"
        )
    if why := _why_not(row, exact):
        raise ValueError(f"metric={row.name!r}: {why} Allowed: {' '.join(fits)}.")
    asked_for([row])  # a user's own measure is what a sweep takes, too
    return row


def _why_not(measure: Measure, exact: bool) -> str | None:
    if measure.function is None:
        return "it is not computed from one run's logits."
    if not exact and not measure.differentiable:
        return "no gradient passes through it."
    if measure.holds not in ("number", "count"):
        return "it is not one number per prompt."
    return None


# -- prompts -----------------------------------------------------------------------------------


def _scored(
    model: GraftedTransformer,
    prompts: Any,
    targets: Any,
    whole: bool,
    measure: Measure,
    continued: bool,
) -> tuple[Scored, ...]:
    """The prompts with what is measured in them."""
    if isinstance(prompts, Tensor | Batch):
        found = _of_tokens(model, prompts, targets)
    else:
        found = _of_prompts(model, prompts, targets, whole, continued)
    for one in found:
        for need, given, what in (
            ("distractors", one.wrong, "distractors that begin unlike the answer"),
            ("answers", one.answers, "answers"),
        ):
            if need in measure.needs and not given:
                raise PromptError(
                    f"prompt {one.number} has no {what}, which {measure.name!r} needs. Give "
                    f"Prompt(…, {need}=[…]), or use another metric=…"
                )
    return found


def _continued(prompts: Any, continuations: Any) -> list[Prompt]:
    """The prompts with these texts for answers."""
    given = [prompts] if isinstance(prompts, Prompt) else prompts
    texts = [continuations] if isinstance(continuations, str) else continuations
    if not (
        isinstance(given, Sequence)
        and all(isinstance(prompt, Prompt) for prompt in given)
        and isinstance(texts, Sequence)
        and len(texts) == len(given)
    ):
        raise ValueError(
            f"continuations={brief(continuations)}: write a text for each prompt, which is a "
            "Prompt: what follows it instead of its answer."
        )
    return [
        replace(prompt, answer=text, answers=(), distractors=())
        for prompt, text in zip(given, texts, strict=True)
    ]


def _of_prompts(
    model: GraftedTransformer, prompts: Any, targets: Any, whole: bool, continued: bool
) -> tuple[Scored, ...]:
    if targets is not None:
        raise ValueError(
            "targets=… says what follows token tensors; these prompts have answers. Leave it out."
        )
    given = [prompts] if isinstance(prompts, Prompt | str) else prompts
    listed = list(given) if isinstance(given, Sequence) else []
    if not listed:
        raise ValueError(
            f"prompts={brief(prompts)}: give one or more Prompts with answers, or a tensor of "
            "token ids with targets=…"
        )
    for prompt in listed:
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"{brief(prompt)} is not a Prompt. Write Prompt(text, answer=…), or give a tensor "
                "of token ids with targets=…"
            )
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so prompts cannot be run. Load one with it, or give a "
            "tensor of token ids with targets=…"
        )
    bos = model.prepends_bos(None)
    notes = (
        # A generated text may go on in the middle of a word.
        None if continued else joined_answers([prompt for prompt in listed if prompt.answer]),
        doubled_bos(listed, model.tokenizer, bos),
        dated(listed, model.tokenizer),
    )
    for note in filter(None, notes):
        tell(note)
    prepared = Prepared(model.tokenizer, model.arch, bos, "whole" if whole else "first")
    found = []
    for number, prompt in enumerate(listed):
        try:
            found.append(prepared(number, prompt))
        except PromptError as error:
            raise PromptError(f"prompt {number}: {error}") from None
    model.warn_beyond_context(prepared.longest(found))
    return tuple(found)


def _of_tokens(model: GraftedTransformer, given: Any, targets: Any) -> tuple[Scored, ...]:
    batch = model.batch(given.cpu() if isinstance(given, Tensor) else given)
    ids = batch.tokens.cpu().numpy()
    count, d_vocab = len(ids), model.arch.d_vocab
    if targets is None:
        raise ValueError(
            f"tokens of {count} prompts without targets. Give targets=…, for each prompt the id of "
            "the token that should follow."
        )
    listed = targets.tolist() if isinstance(targets, Tensor | np.ndarray) else targets
    listed = list(listed) if isinstance(listed, Sequence) else [listed]
    whole = all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in listed)
    if not whole or len(listed) != count:
        raise ValueError(
            f"targets={brief(targets)} for {count} prompts. Give one token id for each, such as "
            f"targets={[0] * min(count, 3)}."
        )
    for number, target in enumerate(listed):
        if not 0 <= target < d_vocab:
            raise ValueError(
                f"targets: prompt {number} has the token id {target}, which is outside the "
                f"vocabulary (0 to {d_vocab - 1})."
            )
    found = []
    for number, (tokens, start) in enumerate(zip(batch.prompts, batch.starts, strict=True)):
        own = ids[number, start : start + len(tokens)].tolist()
        known_as = tokens.prompt or Prompt(f"tokens {number}")
        item = replace(tokens, ids=tuple(own))
        found.append(Scored(number, known_as, item, (int(listed[number]),), ()))
    model.warn_beyond_context(max(len(one.tokens) for one in found))
    return tuple(found)


# -- positions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Positions:
    """Expressions, the "rest" written out, and which of them it is."""

    expressions: tuple[At, ...]
    rest: int | None


def _expressions(positions: Any, prompts: Sequence[Scored]) -> _Positions | None:
    """The positions; None is every token by itself."""
    if isinstance(positions, str) and positions == EACH:
        return None
    if isinstance(positions, str | At) or not isinstance(positions, Sequence) or not positions:
        raise ValueError(
            f'positions={brief(positions)}. Write a list of spans, such as ["first_entity", '
            f'"last", "{REST}"], or "{EACH}" for every token by itself.'
        )
    named = [one for one in prompts if REST in one.tokens.spans]
    rests = [i for i, given in enumerate(positions) if isinstance(given, str) and given == REST]
    if rests and named:
        raise PromptError(
            f"prompt {named[0].number} has a field {REST!r}, which is also what positions=… calls "
            "all other tokens. Give the field another name."
        )
    if len(rests) > 1:
        raise ValueError(f"positions={brief(positions)}: {REST!r} appears twice. Write it once.")
    others = tuple(At.parse(given) for i, given in enumerate(positions) if i not in rests)
    if not rests:
        return _Positions(others, None)
    rest = At.parse("all")
    if others:
        rest = Complement(others[0] if len(others) == 1 else Several("+", others))
    return _Positions((*others[: rests[0]], rest, *others[rests[0] :]), rests[0])


def _each(one: Scored, total: int) -> Int[np.ndarray, " pos"]:
    """Every token of the prompt a position of its own, those that follow it none."""
    part = np.full(total, -1, dtype=np.int64)
    part[: len(one.tokens)] = np.arange(len(one.tokens))
    return part


def _parts(one: Scored, source: str, given: _Positions, total: int) -> Int[np.ndarray, " pos"]:
    """The number of the expression that selects each token."""
    part = np.full(total, -1, dtype=np.int64)
    for number, at in enumerate(given.expressions):
        if number == given.rest:
            continue
        try:
            chosen = select(Rule(source, at), one.tokens, total)
        except PromptError as error:
            raise PromptError(f"prompt {one.number}, {error}") from None
        if (both := np.flatnonzero(chosen & (part >= 0))).size:
            token = int(both[0])
            first = given.expressions[part[token]]
            raise PromptError(
                f"prompt {one.number}: positions {str(first)!r} and {str(at)!r} overlap at token "
                f'{token}. Give spans that share no token, such as "{at} & ~({first})".'
            )
        part[chosen] = number
    if given.rest is not None:
        part[part < 0] = given.rest
    return part


# -- sites -------------------------------------------------------------------------------------


def _units(model: GraftedTransformer, site: Site, by: str) -> tuple[Unit, ...]:
    """What a site is cut into; (None,) where it is not cut."""
    row = COMPONENTS[site[0]]
    if row.cut not in _CUTS.get(by, ()):
        return (None,)
    has_bias = row.axis == 1 and model.weights_of(*site)[1] is not None
    return (*range(model.arch.n_units_of(site[0])), *(("bias",) if has_bias else ()))


def _there(
    model: GraftedTransformer,
    prompts: Sequence[Searched],
    positions: Sequence[str | int],
    units: Mapping[Site, tuple[Unit, ...]],
    within: Graft | None,
) -> dict[Site, Bool[np.ndarray, "prompt position unit"]]:
    """For each site, which positions of a prompt are searched, unit by unit."""
    shape = (len(prompts), len(positions))
    present = np.zeros(shape, dtype=bool)
    for row, one in enumerate(prompts):
        present[row, one.part[one.part >= 0]] = True
    if within is None:
        by_count = {n: np.broadcast_to(present[:, :, None], (*shape, n)) for n in _counts(units)}
        return {site: by_count[len(own)] for site, own in units.items()}
    batch = collate([one.scored.tokens for one in prompts], continuations=[p.tail for p in prompts])
    mask = resolve(within, batch, model.arch, model.sources)
    inside = _Inside(prompts, positions, batch.real.shape[1], within)
    found = {site: inside.of(site, mask[site], units[site]) for site in units}
    if not any(there.any() for there in found.values()):
        raise ValueError(
            f"within={str(within)!r} has no site at the positions "
            f"{' '.join(repr(p) for p in positions[:5])}. Give positions that it grafts."
        )
    return found


def _counts(units: Mapping[Site, tuple[Unit, ...]]) -> set[int]:
    return {len(own) for own in units.values()}


class _Inside:
    """Which positions are inside a graft, site by site."""

    def __init__(
        self,
        prompts: Sequence[Searched],
        positions: Sequence[str | int],
        width: int,
        within: Graft,
    ) -> None:
        self.prompts, self.positions, self.width, self.within = prompts, positions, width, within
        self._known: dict[int, Bool[np.ndarray, "prompt position"]] = {}

    def of(
        self, site: Site, chosen: Choice, units: tuple[Unit, ...]
    ) -> Bool[np.ndarray, "prompt position unit"]:
        """The positions at which the graft runs something else than the base, unit by unit."""
        if chosen.apart is None:
            found = self._positions(chosen.whole)
            return np.broadcast_to(found[:, :, None], (*found.shape, len(units)))
        if units == (None,):
            cut = COMPONENTS[site[0]].cut
            raise ValueError(
                f"within={str(self.within)!r} chooses some {cut}s of {site[0]}. Score them by "
                f'themselves, by="{"neuron" if cut is Cut.NEURON else "head"}", or give a graft '
                "of whole components."
            )
        made = np.zeros((len(self.prompts), len(self.positions), len(units)), dtype=bool)
        for members, selection in chosen.apart.groups:
            made[:, :, list(members)] = self._positions(selection)[:, :, None]
        if units[-1] == "bias":
            made[:, :, -1] = self._positions(chosen.whole)
        return made

    def _positions(self, chosen: Choice) -> Bool[np.ndarray, "prompt position"]:
        if id(chosen) in self._known:
            return self._known[id(chosen)]
        rows = (chosen.share(0) != 1).reshape(len(self.prompts), self.width)
        found = np.zeros((len(self.prompts), len(self.positions)), dtype=bool)
        for number, one in enumerate(self.prompts):
            real = one.part >= 0
            count = len(self.positions)
            of_part = np.bincount(one.part[real], minlength=count)
            inside = np.bincount(one.part[real], rows[number, : len(real)][real], minlength=count)
            if (some := np.flatnonzero((inside > 0) & (inside < of_part))).size:
                raise PromptError(
                    f"prompt {number}: within={str(self.within)!r} grafts some tokens of the "
                    f"position {str(self.positions[int(some[0])])!r}, and others not. Give "
                    "positions that it grafts wholly or not at all."
                )
            found[number] = inside > 0
        self._known[id(chosen)] = found
        return found
