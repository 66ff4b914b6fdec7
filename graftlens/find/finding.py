"""From prompts to the smallest set of places that does it: order by gradients, judge by grafts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from graftlens.components import COMPONENTS, Component, format_numbers
from graftlens.find.attribution import CLOSED
from graftlens.find.evidence import Evidence, evidence
from graftlens.find.found import Found, in_set
from graftlens.find.judging import Exact, Goal, Judge, Judged
from graftlens.find.places import Place, places_of, ranking
from graftlens.find.scores import Scores, of_sites, stability, unit_order
from graftlens.find.searching import Nested, Round, curve_of, down_to_units, nested, refined
from graftlens.find.sets import Size, lengths_of, site_of
from graftlens.find.splitting import Split
from graftlens.graft import Graft
from graftlens.model.arch import Architecture
from graftlens.prompts import Tokenized
from graftlens.stats.chance import few_answers

Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Question:
    """Everything that decides a localisation, besides the models themselves.

    Attributes:
        tokens: the prompts' tokens.
        token_text: a token's id -> its text.
        arch: the architecture.
        biases: components that have a bias.
        source, base_source: the searched source, and the model's base.
        base, full: the grafts that recovery is measured between.
        metric: the measure.
        goal, target: what a set must be.
        split: which prompts are for what.
        compare: name -> graft to report beside the found set.
        rounds: most rounds of refinement.
        random: random sets to compare with.
        resamples: resamples of the facts for stability.
        seed: of everything that is drawn.
        tails: the tokens that follow each prompt and that positions may name: of a reference
            continuation where texts judge, else none.
        judged: what a report says of the judge, where texts judge.
    """

    tokens: tuple[Tokenized, ...]
    token_text: Callable[[int], str]
    arch: Architecture
    biases: frozenset[str]
    source: str
    base_source: str
    base: Graft
    full: Graft
    metric: str
    goal: Goal
    target: float
    split: Split
    compare: Mapping[str, Graft]
    rounds: int
    random: int
    resamples: int
    seed: int
    tails: tuple[tuple[int, ...], ...]
    judged: str = ""

    @property
    def totals(self) -> tuple[int, ...]:
        """How many tokens each prompt has with its tail."""
        pairs = zip(self.tokens, self.tails, strict=True)
        return tuple(len(tokens) + len(tail) for tokens, tail in pairs)


@dataclass
class Costs:
    """Runs exact grafts, and keeps how many."""

    exact: Exact
    steps: list[dict[str, object]] = field(default_factory=list)

    def __call__(
        self, step: str, numbers: Sequence[int], grafts: Mapping[str, Graft]
    ) -> pd.DataFrame:
        self.add(step, len(numbers), len(grafts), len(numbers) * len(grafts))
        return self.exact(step, numbers, grafts)

    def add(self, step: str, prompts: int, grafts: int, forwards: int, backwards: int = 0) -> None:
        """Note the runs of a step."""
        row = {"step": step, "prompts": prompts, "grafts": grafts}
        self.steps.append(row | {"forwards": forwards, "backwards": backwards})


def found_in(
    question: Question,
    attributed: pd.DataFrame,
    exact: Exact,
    *,
    effects: pd.DataFrame | None = None,
    say: Say = lambda line: None,
) -> Found:
    """The whole search and its report, given the attributions of the search side.

    It is the same, step for step, whenever it is given the same: what a folder has kept of the
    exact runs is found again by the steps' names.

    Args:
        question: what is searched.
        attributed: attributions of the search side's prompts, by their own numbers, as `attribute`
            gives them; `attrs["passes"]` says how many forward and backward passes they took.
        exact: runs grafts.
        effects: exact effects of single sites, for the table; `attrs["passes"]` says how many
            forward passes they took.
        say: called with a line about each step.

    Raises:
        ValueError: nothing to recover, or prompts that cannot be run.
    """
    split, costs = question.split, Costs(exact)
    passes = int(attributed.attrs["passes"])
    costs.add("attribution", len(split.search), 0, passes, passes)
    if effects is not None:
        costs.add("effects", len(split.search), 0, int(effects.attrs["passes"]))
    table = of_sites(attributed)
    scores = Scores.of(table)
    order = scores.order()
    judge = Judge(
        exact=costs,
        arch=question.arch,
        source=question.source,
        base_source=question.base_source,
        base=question.base,
        full=question.full,
        metric=question.metric,
        goal=question.goal,
        target=question.target,
        inner=frozenset(split.inner),
        say=say,
        of_texts=bool(question.judged),
    )
    say(f"{len(order)} sites in order; nested sets on {len(split.search)} prompts")
    first = nested(judge, order, split.search, "nested")
    chosen, rounds = refined(judge, first.chosen, order, split, question.rounds)
    units: Nested | None = None
    sites = chosen
    if not attributed["unit"].isna().all():
        chosen, units = down_to_units(judge, sites, unit_order(attributed, sites.places), split)
    found_sites = [_whole(place) for place in chosen.places]
    firm = stability(
        scores,
        [split.groups[number] for number in scores.prompts],
        found_sites,
        resamples=question.resamples,
        seed=question.seed,
    )
    shown = evidence(
        judge,
        chosen.places,
        order,
        scores.places,
        split,
        question.compare,
        random=question.random,
        seed=question.seed,
    )
    lengths = lengths_of(scores.places, question.tokens, question.totals)

    def size(places: Sequence[Place]) -> Size:
        return Size.of(places, question.arch, question.biases, lengths)

    judged = [curve_of(first.judged, len(order), "nested")]
    if units is not None:
        judged.append(curve_of(units.judged, len(units.judged[-1].places), "units"))
    return Found(
        graft=judge.put_in(chosen.places),
        rest=judge.taken_out(chosen.places),
        places=chosen.places,
        size=size(chosen.places),
        total=size(scores.places),
        table=_table(table, scores, order, chosen.places, firm.share, effects),
        search=pd.concat(judged, ignore_index=True),
        curve=shown.curve,
        summary=shown.summary,
        rows=shown.table,
        differences=shown.differences,
        random=shown.random,
        p_value=shown.p_value,
        cpr=shown.cpr,
        cmd=shown.cmd,
        jaccard=firm.jaccard,
        failures=shown.failures,
        example=_example(question, judge.put_in(chosen.places), chosen.places),
        rounds=_rounds(rounds),
        costs=pd.DataFrame(costs.steps),
        split=_parts(split),
        goal=question.goal,
        target=question.target,
        metric=question.metric,
        source=question.source,
        reached=chosen.reached,
        notes=tuple(_notes(question, attributed, first, sites, chosen, units, shown)),
        judged=question.judged,
    )


def _whole(place: Place) -> Place:
    return Place(*site_of(place))


def _table(
    table: pd.DataFrame,
    scores: Scores,
    order: Sequence[Place],
    places: Sequence[Place],
    share: Mapping[Place, float],
    effects: pd.DataFrame | None,
) -> pd.DataFrame:
    """What is known of each searched site, in the model's order."""
    records = _by_place(ranking(table), order).to_dict("records")
    means = dict(zip(order, records, strict=True))
    inside, rank = in_set(places), {place: i for i, place in enumerate(order, 1)}
    exact: dict[Place, dict[str, float]] = {}
    if effects is not None:
        single = ranking(of_sites(effects))
        for place, row in zip(places_of(single), single.to_dict("records"), strict=True):
            exact[place] = {name: row[name] for name in ("alone", "missing") if name in row}
    rows = []
    for place in sorted(scores.places):
        units = inside.get(site_of(place))
        rows.append(
            {
                "component": str(place.component),
                "layer": pd.NA if place.layer is None else place.layer,
                "position": place.position,
                "score": means[place]["score"],
                **{name: means[place][name] for name in ("at_base", "at_full")},
                "order": rank[place],
                "in_set": units is not None,
                "units": units or pd.NA,
                "stability": share[place],
                **exact.get(place, {}),
            }
        )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _by_place(ranked: pd.DataFrame, order: Sequence[Place]) -> pd.DataFrame:
    place = {p: i for i, p in enumerate(places_of(ranked))}
    return ranked.iloc[[place[p] for p in order]]


def _example(question: Question, graft: Graft, places: Sequence[Place]) -> pd.DataFrame:
    """Where the set is on the first prompt that results are reported on."""
    number = question.split.held_out[0]
    tokens, total = question.tokens[number], question.totals[number]
    ids, spans = (*tokens.ids, *question.tails[number]), tokens.spans_with(total)
    at: dict[int, dict[str, list[int]]] = {pos: {} for pos in range(total)}
    for component, layer, position in dict.fromkeys(site_of(p) for p in places):
        here = Place(component, layer, position).rule(question.source).at
        for pos in np.flatnonzero(here.select(spans, len(tokens), total)).tolist():
            layers = at[pos].setdefault(str(component), [])
            layers += [] if layer is None else [layer]
    rows: list[dict[str, object]] = []
    for pos, components in at.items():
        about = {"pos": pos, "token": question.token_text(ids[pos])}
        if not components:
            rows.append(about | {"component": pd.NA, "layers": pd.NA, "count": 0})
        for name in (c for c in Component if str(c) in components):
            layers = components[str(name)]
            said = format_numbers(layers) if layers else "all"
            count = len(layers) if COMPONENTS[name].in_layers else 1
            rows.append(about | {"component": str(name), "layers": said, "count": count})
    return pd.DataFrame(rows)


def _rounds(rounds: Sequence[Round]) -> pd.DataFrame:
    columns = ["round", "before", "proposed", "enough", "without", "kept"]
    return pd.DataFrame(
        [
            [
                number,
                len(one.before.places),
                len(one.proposed.places),
                one.proposed.enough,
                one.proposed.without,
                one.kept,
            ]
            for number, one in enumerate(rounds, 1)
        ],
        columns=columns,
    )


def _parts(split: Split) -> pd.DataFrame:
    parts = {"search": split.search, "of these, inner": split.inner, "held out": split.held_out}
    if split.nothing_held_out:
        parts = {"search": split.search, "nothing held out": split.held_out}
    return pd.DataFrame(
        [
            {"part": part, "prompts": len(numbers), "facts": split.count(numbers)}
            for part, numbers in parts.items()
        ]
    )


def _notes(
    question: Question,
    attributed: pd.DataFrame,
    first: Nested,
    sites: Judged,
    chosen: Judged,
    units: Nested | None,
    shown: Evidence,
) -> list[str]:
    """What a reader must know that no number says."""
    notes = [question.judged] if question.judged else []
    far = attributed.drop_duplicates("prompt")["completeness"] > CLOSED
    if far.any():
        notes.append(
            f"For {int(far.sum())} of {len(far)} searched prompts the scores' sum misses the whole "
            "effect by more than 1 %: the order rests on rough scores, though what is reported "
            'does not. Take more steps, or steps="auto".'
        )
    if question.split.nothing_held_out:
        notes.append(
            "Nothing is held out: one prompt was searched on and is reported on, so these numbers "
            "are not evidence about any other."
        )
    if not chosen.reached:
        notes.append(
            f"The target of {question.target:g} was not reached; this is the best of the sets that "
            "were judged."
        )
    if first.apart:
        notes.append(
            f"Sizes were halved until {len(first.judged)} had been judged: up to {first.apart} "
            "sites fewer might have reached the target as well."
        )
    if not first.chosen.parted:
        notes.append(
            f"{question.source} and the base do not differ on the prompts of the inner part, or on "
            "the others of the search: nothing could be chosen on one and judged on the other, so "
            "that the set was not refined. More facts would help."
        )
    elif units is not None and chosen is sites:
        notes.append(
            "Heads or neurons by themselves did not hold on the inner part: sites are kept."
        )
    if question.random and not len(shown.random):
        notes.append(
            "The set has every searched site of its components at its positions, so there are no "
            "random sets like it and no p-value."
        )
    if not question.judged:
        prompts = (tokens.prompt for tokens in question.tokens)
        notes += few_answers(None if prompt is None else prompt.answer for prompt in prompts)
    facts = question.split.count(question.split.held_out)
    if not question.split.nothing_held_out and facts < 20:
        notes.append(
            f"The report rests on {facts} facts; with fewer than about 20, bootstrap intervals are "
            "too narrow."
        )
    return notes
