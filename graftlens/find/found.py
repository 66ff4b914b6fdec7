"""What a localisation found: the set as a graft, its tables, and what it says in a sentence."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from graftlens.components import COMPONENTS, Component, format_numbers
from graftlens.find.evidence import FOUND, REST
from graftlens.find.judging import BASE, FULL, Goal
from graftlens.find.places import Place
from graftlens.find.sets import Size, site_of
from graftlens.graft import Graft
from graftlens.metrics import measure

#: What groups of components are called in a sentence.
_KINDS = {"attn": "attention", "mlp": "MLPs", "ln": "norms"}


@dataclass(frozen=True, eq=False)
class Found:
    """The set that a search found, with what was measured about it.

    Attributes:
        graft: the set in the base, a graft like any other; `text` and `yaml` write it.
        rest: the full source without the set.
        places: the set's places: whole sites at positions, or heads or neurons.
        size, total: its size, and that of all places that were searched.
        table: a row for each searched site and position, in the model's order: `component`,
            `layer`, `position`, `score` (the mean of integrated gradients over the search's
            prompts, in units of the measure; where texts judge, in nats), `at_base`, `at_full`
            (gradients at both ends),
            `order` (1 is the largest score), `in_set`, `units` (which heads or neurons of it are,
            where not all), `stability` (in how many resamples of the facts it is among as many
            first sites as were found, as a share), and, if exact effects were asked for, `alone`
            and `missing`.
        search: a row for each set that was judged on the search side: `part`, `size`, `share`,
            `enough` (recovery of the set), `without` (recovery of what is left without it).
        curve: recovery over size on the held-out prompts, as in `Evidence.curve`.
        summary: the found set, its complement, the references and the comparisons on the held-out
            prompts, as `graftlens.summarise` gives it, with intervals over facts.
        rows: the rows behind `summary`, one for each prompt and graft.
        differences: the found set minus its complement and each comparison, paired over facts, as
            in `Evidence`.
        random: recoveries, top-k and KL divergences of random sets matched by component and
            position, a row each, as in `Evidence`.
        p_value: of being no better than those.
        cpr, cmd: areas of the curve, as `Evidence` defines them.
        jaccard: overlap of the found sites with those of each resample of the facts.
        failures: held-out prompts whose answer the found set does not put first, and what it says.
        example: the set on one held-out prompt, a row for each token and component with a part in
            it: `pos`, `token`, `component`, `layers`, `count`; tokens without any have one row
            without a component.
        rounds: the rounds of refinement: `round`, `before`, `proposed` (sizes), `enough`,
            `without`, `kept`.
        costs: how many runs each step took: `step`, `prompts`, `grafts`, `forwards` (one for each
            prompt under each graft, before rows are shared) and `backwards`.
        split: how many prompts and facts each part had: `part`, `prompts`, `facts`.
        goal, target, metric, source: as asked.
        reached: whether the search side reached the target.
        notes: what a reader must know: a target that was not reached, nothing held out, ….
        judged: where texts judge, how, and what the scores are; empty where one token does.
    """

    graft: Graft
    rest: Graft
    places: tuple[Place, ...]
    size: Size
    total: Size
    table: pd.DataFrame = field(repr=False)
    search: pd.DataFrame = field(repr=False)
    curve: pd.DataFrame = field(repr=False)
    summary: pd.DataFrame = field(repr=False)
    rows: pd.DataFrame = field(repr=False)
    differences: pd.DataFrame = field(repr=False)
    random: pd.DataFrame = field(repr=False)
    p_value: float
    cpr: float
    cmd: float
    jaccard: tuple[float, ...]
    failures: pd.DataFrame = field(repr=False)
    example: pd.DataFrame = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)
    costs: pd.DataFrame = field(repr=False)
    split: pd.DataFrame = field(repr=False)
    goal: Goal
    target: float
    metric: str
    source: str
    reached: bool
    notes: tuple[str, ...] = ()
    judged: str = ""

    @property
    def text(self) -> str:
        """The graft in one line."""
        return str(self.graft)

    @property
    def yaml(self) -> str:
        """The graft as a YAML list of rules."""
        return self.graft.to_yaml()

    @property
    def sentence(self) -> str:
        """What was found, in plain words."""
        share, more = _recovered(self.summary, FOUND), _recovered(self.summary, REST)
        row = measure(self.metric)
        ends = self.summary.set_index("graft")[self.metric] if self.metric in self.summary else None
        falls = ends is not None and ends[FULL] < ends[BASE]
        does = "takes from" if falls else "adds to"
        measured = (row.short or row.label).removeprefix("the ")
        measured = f"rate of {measured}" if self.judged else measured
        gain = f"what {self.source} {does} the {measured}"
        held = self.split.set_index("part")
        seen = "the prompt that was searched on: nothing was held out"
        if "nothing held out" not in held.index:
            facts = int(held.at["held out", "facts"])
            seen = f"{facts} facts that the search did not see"
        which = f"{self.size.sites} of {self.total.sites} sites"
        if self.size.units:
            which = f"{len(self.places)} {self._unit_word()} in {which}"
        verb, it = ("is", "it") if len(self.places) == 1 else ("are", "them")
        where = mostly(self.places)
        set_ = f"{which}, {where}," if where else which
        if self.goal == "sufficient":
            said = f"{set_} {verb} enough for {share} of {gain}, on {seen}"
        elif self.goal == "necessary":
            said = f"without {set_} only {more} of {gain} is left, on {seen}"
        else:
            said = f"{set_} {verb} enough for {share} of {gain}, and without {it} {more} is left, "
            said += f"on {seen}"
        if not self.reached:
            target = f"the target of {100 * self.target:g}% was not reached in the search"
            said = f"{target}; the best set: {said}"
        return f"{said[:1].upper()}{said[1:]}."

    def _unit_word(self) -> str:
        words = {
            str(COMPONENTS[site_of(p)[0]].cut).split()[-1]
            for p in self.places
            if p.unit is not None
        }
        whole = ["site"] if any(place.unit is None for place in self.places) else []
        plural = "" if len(self.places) == 1 else "s"
        return " or ".join(f"{word}{plural}" for word in [*sorted(words), *whole])

    def __str__(self) -> str:
        lines = [self.sentence, *self.notes, f"  {self.text}"]
        p = "" if math.isnan(self.p_value) else f"; p = {self.p_value:.3g} against random sets"
        share = f"{self.size.parameters:,.0f} of {self.total.parameters:,.0f}"
        runs = [f"{int(self.costs[way].sum()):,} {way}" for way in ("forwards", "backwards")]
        lines.append(
            f"  {share} parameters × positions; CPR {self.cpr:.3f}, CMD {self.cmd:.3f}{p}; "
            f"{', '.join(runs)}"
        )
        return "\n".join(lines)


def _recovered(summary: pd.DataFrame, graft: str) -> str:
    row = summary.set_index("graft").loc[graft]
    value, low, high = (float(row[f"recovery{end}"]) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "an unknown share"
    ends = "" if math.isnan(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * value:.0f}%{ends}"


def mostly(places: Sequence[Place]) -> str:
    """Where most of a set's sites are, as in `most of them in the last token's MLPs of layers 20 to
    29`; empty for a single site outside the layers."""
    sites = dict.fromkeys(site_of(place) for place in places)
    kinds: Counter[tuple[str | int, str]] = Counter()
    layers: dict[tuple[str | int, str], list[int]] = {}
    for component, layer, position in sites:
        if layer is None:
            continue
        kind = (position, _KINDS[COMPONENTS[component].group or "ln"])
        kinds[kind] += 1
        layers.setdefault(kind, []).append(layer)
    if not kinds:
        return ""
    (position, name), _ = kinds.most_common(1)[0]
    low, high, inside = _window(layers[position, name])
    some = f"layer {low}" if low == high else f"layers {low} to {high}"
    where = f"{_named(position)} {name} of {some}"
    if inside == len(sites):
        return f"in {where}" if inside == 1 else f"all in {where}"
    if 2 * inside > len(sites):
        return f"most of them in {where}"
    return f"the largest part ({inside}) in {where}"


def _window(layers: Sequence[int]) -> tuple[int, int, int]:
    """The narrowest window with four fifths of these layers' sites, and how many it has."""
    ordered = sorted(layers)
    most = math.ceil(0.8 * len(ordered))
    starts = range(len(ordered) - most + 1)
    best = min(starts, key=lambda i: (ordered[i + most - 1] - ordered[i], i))
    low, high = ordered[best], ordered[best + most - 1]
    return low, high, sum(low <= layer <= high for layer in ordered)


def _named(position: str | int) -> str:
    if position in ("last", "all"):
        return "the last token's" if position == "last" else "all tokens'"
    if isinstance(position, str) and position.isidentifier():
        return f"the {position.replace('_', ' ')}'s"
    if isinstance(position, int):
        return f"token {position}'s"
    return (
        f"the other tokens' ({position})"
        if position.startswith("~")
        else f"the tokens' ({position})"
    )


def in_set(places: Sequence[Place]) -> Mapping[tuple[Component, int | None, str | int], str]:
    """Site -> which of its units are in a set, empty text for all."""
    found: dict[tuple[Component, int | None, str | int], list[int]] = {}
    for place in places:
        units = found.setdefault(site_of(place), [])
        if isinstance(place.unit, int):
            units.append(place.unit)
    return {site: format_numbers(units) if units else "" for site, units in found.items()}
