"""How places work together: exact coalitions of grafts, and what each player and pair brings."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from graftlens.components import brief, suggest
from graftlens.evaluation import evaluate
from graftlens.find.asked import refuse_other_models
from graftlens.find.coalitions import Coalitions
from graftlens.find.games import Weights, dividends, members, pairs_of
from graftlens.find.rating import Rating, beside, of_texts
from graftlens.graft import Graft, Grafts
from graftlens.metrics import Measure, averaged, known, some_over_common
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, PromptError, Tokenized, tokenize
from graftlens.references import COMMON_TOKENS, common_tokens
from graftlens.stats.intervals import FEW, mean_intervals, wilson
from graftlens.stats.resampling import (
    Draw,
    means_of,
    numbered,
    per_unit,
    percentiles,
    unit_count,
)
from graftlens.stats.table import Pivot, check_metrics, checked_table, column_of, depth_of, endless

#: What a pair may be called.
CALLS = ("AND", "OR", "additive", "undecided")


@dataclass(frozen=True, eq=False)
class Interactions:
    """What players bring, alone and together; see `interactions` for the definitions.

    Attributes:
        players: name -> graft.
        exact: whether all coalitions were run, or those of random orders.
        table: a row per measure and player: `shapley` and `banzhaf` with their intervals
            (`_low`, `_high`), `shapley_se` (of the orders drawn; NaN where exact), `alone` and
            `missing` (added to nobody, taken from everybody), and `share` of what all add.
        pairs: a row per measure and pair `a`, `b`: `interaction` (Shapley's index) with its
            interval and `interaction_se`, `banzhaf_interaction` with its interval, `at_base` and
            `at_full` (the interaction with nobody else, and with all others, there), `joint` (what
            both add as one player), `share` = interaction / joint (1 in a pure AND, -1 in a pure
            OR), and the `call`.
        dividends: a row per measure and coalition with `size` and `dividend` with its interval;
            empty where not exact.
        values: a row per measure and coalition with `size` and `value` with its interval.
        results: the table of `evaluate`, a row per prompt and coalition.
        not_run: prompts that were left out -> why.
    """

    players: Mapping[str, Graft]
    exact: bool
    table: pd.DataFrame
    pairs: pd.DataFrame
    dividends: pd.DataFrame
    values: pd.DataFrame
    results: pd.DataFrame
    not_run: Mapping[int, str]

    @property
    def calls(self) -> pd.DataFrame:
        """The pairs, with what each is called in each measure side by side."""
        metrics = list(dict.fromkeys(self.pairs["metric"]))
        rows = self.pairs.pivot(index=["a", "b"], columns="metric", values="call")
        order = self.pairs[["a", "b"]].drop_duplicates()
        return rows.loc[list(order.itertuples(index=False, name=None)), metrics].reset_index()


def interactions(
    model: GraftedTransformer,
    prompts: Prompt | Sequence[Prompt],
    players: Grafts,
    *,
    metrics: str | Measure | Sequence[str | Measure] | Mapping[str, Any] = ("logprob", "top1"),
    sampling: Mapping[str, Any] | None = None,
    full: Graft | str | None = None,
    margin: float | int = 0.05,
    permutations: int = 100,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    prepend_bos: bool | None = None,
    row_budget: int | None = None,
    progress: bool = True,
) -> Interactions:
    """How grafts work together: a cooperative game of which they are the players.

    v(S) is a measure's mean under the rules of all players in S, the base elsewhere; v of nobody is
    the base's. With up to 12 players all 2^n coalitions run, in one sweep, and what follows is
    exact:

    - *Shapley value*: what a player adds when it joins, averaged over all orders of joining
      (Shapley 1953, *Contributions to the Theory of Games* II, 307-317). Over players they add up
      to v(all) - v(nobody).
    - *Banzhaf value*: what it adds, averaged over all coalitions of the others (Banzhaf 1965,
      *Rutgers Law Review* 19, 317-343).
    - *Harsanyi dividend* of S: m(S) = sum over T in S of (-1)^(|S| - |T|) v(T), what S adds beyond
      the dividends of its subsets; they add up to v (Harsanyi 1963, *International Economic Review*
      4, 194-220).
    - *Interaction* of i and j: v(T+i+j) - v(T+i) - v(T+j) + v(T), averaged over coalitions T of the
      others with Shapley's or with Banzhaf's weights (Owen 1972, *Management Science* 18, P64-P79;
      Grabisch & Roubens 1999, *International Journal of Game Theory* 28, 547-565). The one with
      nobody else there is the pair's dividend (`at_base`); seen only from the base, an OR that
      needs a third player does not show, and seen only from the full set (`at_full`), an AND whose
      effect another player also brings does not: the index averages over both.
    - *joint*: what i and j add as one player, with the same weights as Shapley's interaction
      (Marichal, Kojadinovic & Fujimoto 2007, *Discrete Applied Mathematics* 155, 26-43).

    With more players, Shapley values and interactions are means over random orders of joining
    (Castro, Gómez & Tejada 2009, *Computers & Operations Research* 36, 1726-1730; two neighbours in
    a random order are a pair that meets a coalition with just the index's weights), with standard
    errors; Banzhaf values and dividends are NaN.

    Each pair has a *call*, by the interval of Shapley's interaction and a margin, `margin` times
    \\|v(all) - v(nobody)\\|:

    - `AND`: the interval is above 0 and not within the margin: each needs the other;
    - `OR`: below 0 and not within it: either is enough, and both are little more;
    - `additive`: the whole interval is within the margin (an equivalence test: Schuirmann 1987,
      *Journal of Pharmacokinetics and Biopharmaceutics* 15, 657-680);
    - `undecided`: none of these, the prompts are too few to say.

    Of a measure that falls from nobody to all, such as `kl_full`, the call is by the interaction
    with its sign turned: below 0, each needs the other.

    The calls depend on the scale: effects that add up in log-probability can be an AND in top-1.

    Intervals are percentile intervals of a paired bootstrap over facts: prompts of one fact are
    drawn together. A prompt's fact is its field `fact` where all prompts have one, else its answer.
    Where orders were drawn, these are resampled as well. Of top-k accuracies, where fewer than 5
    facts differ from the commonest value, the interval assumes that as many facts as Wilson's
    upper bound of those differ, by as much as they can.

    Measures of generated texts (`graftlens.outcomes`) can judge, too: a prompt's value is their
    mean over its texts, as in `outcomes.rate`, and players may name `generated`.

    Args:
        model: the model.
        prompts: prompts with answers, which measures of texts do without.
        players: name -> graft, two or more; they must not overlap.
        metrics: top-k accuracies and measures with a mean, or a `Measure` of your own; also
            measures of texts, as `outcomes.contains` makes them, or `{name: measure or function of
            a text}`.
        sampling: how texts are drawn, with the options of `outcomes.sample` (`n`,
            `max_new_tokens`, `temperature`, …); only with measures of texts.
        full: the run that measures such as `kl_full` compare with; as in `evaluate`.
        margin: what counts as no interaction, as a share of the whole effect.
        permutations: how many orders are drawn where there are more than 12 players.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of orders and bootstrap.
        prepend_bos, row_budget, progress: as in `evaluate`.

    Raises:
        ValueError: an unknown measure; players that overlap (the same component in the same layer,
            position and unit) in a prompt, or in an answer that is measured whole; fewer than two,
            or ones that change nothing; no prompt that runs under all coalitions.
    """
    refuse_other_models(model)
    for what, value in (("prompts", prompts), ("metrics", metrics)):
        if not isinstance(value, Iterable | Prompt | Measure):
            raise ValueError(f"{what}={brief(value)}. Give one, or a list of them.")
    said = of_texts(metrics)
    asked = [metrics] if isinstance(metrics, str | Measure) else list(metrics)
    asked = list(said) if isinstance(metrics, Mapping) else asked
    names = _names(asked)
    if sampling is not None and not said:
        raise ValueError(
            f"sampling={brief(sampling)} is for measures of generated texts, and metrics={names} "
            "has none. Leave it out, or give one such as outcomes.contains([…])."
        )
    rating = Rating.of(said, sampling) if said else None
    planned = Coalitions.of(players, permutations, seed)
    given = [prompts] if isinstance(prompts, Prompt | str) else list(prompts)
    ready, not_run = _ready(model, given, planned, prepend_bos, names, generates=bool(said))
    draw = Draw("fact", level, resamples, seed)
    _check_margin(margin)
    rest = [m for m in asked if m not in said]
    rated = None
    if rating is not None:
        chosen = {number: given[number] for number in ready}
        rated = rating.table(model, chosen, planned.grafts, prepend_bos=prepend_bos)
        if not rest:
            rated = rated.assign(fact=rated["prompt"].map(facts_of(given)))
            return measured_interactions(
                planned, rated, names, draw, margin=margin, not_run=not_run
            )
    whole = any((row := known(name)) is not None and row.over == "answer" for name in names)
    extra = [m for m in rest if isinstance(m, Measure) or not _always(m)]
    results = evaluate(
        model,
        [given[number] for number in ready],
        planned.grafts,
        answers="whole" if whole else "first",
        measures=extra,
        full=full,
        prepend_bos=prepend_bos,
        row_budget=row_budget,
        progress=progress,
    )
    results["prompt"] = results["prompt"].map(dict(enumerate(ready)))
    results = results.assign(fact=results["prompt"].map(facts_of(given)))
    if rated is not None:
        results = beside(results, rated, [m.name for m in said])
    return measured_interactions(planned, results, names, draw, margin=margin, not_run=not_run)


def measured_interactions(
    planned: Coalitions,
    results: pd.DataFrame,
    metrics: Sequence[str],
    draw: Draw,
    *,
    margin: float | int = 0.05,
    not_run: Mapping[int, str] | None = None,
    ran: Mapping[str, str] | None = None,
) -> Interactions:
    """What `interactions` returns, from a table that has a row for each prompt and coalition.

    Args:
        planned: the players and their coalitions.
        results: of `evaluate` or of a sweep, with the column that `draw.unit` names.
        metrics: the measures, by name.
        draw: how intervals are made.
        margin: what counts as no interaction, as a share of the whole effect.
        not_run: prompts that the table does not have -> why.
        ran: coalition's name -> the name of its graft in the table, where that is another.

    Raises:
        ValueError: a measure that the table lacks, or that is infinite for some prompt; a coalition
            that it lacks; no prompt that ran under all coalitions.
    """
    _check_margin(margin)
    check_metrics(results, metrics)
    names = list(planned.names.values())
    columns = [(ran or {}).get(name, name) for name in names]
    if missing := {*columns} - {*results["graft"]}:
        raise ValueError(f"the table has no graft {min(missing)!r}: run every coalition.")
    table = checked_table(results, (*draw.columns, *map(column_of, metrics)))
    pivot = Pivot.of(table[table["graft"].isin(columns)], columns)
    used = pivot.ran_everywhere
    left = dict(not_run or {})
    for number in pivot.prompts[~used].tolist():
        why = table.loc[(table["prompt"] == number) & table["reason"].notna(), "reason"]
        left[number] = why.iloc[0] if len(why) else "it lacks the row of a coalition"
    if not used.any():
        raise ValueError(
            f"none of {len(used)} prompts ran under every coalition. The first reason: "
            f"{next(iter(left.values()))}"
        )
    units = numbered(pivot.units(draw.unit)[used])
    needed = np.broadcast_to(used[:, None], pivot.ran.shape)
    frames: dict[str, list[pd.DataFrame]] = {
        k: [] for k in ("table", "pairs", "dividends", "values")
    }
    for metric in metrics:
        values = pivot.values(metric, needed)[used]
        if why := next(filter(None, endless(metric, values, pivot.prompts[used])), None):
            raise ValueError(f"{why}. Leave the prompt out, or measure prob instead.")
        if np.isnan(values).any():
            raise ValueError(f"{metric!r} was not measured here. Leave it out.")
        game = _Game(planned, metric, values, units, draw, float(margin))
        about: dict[str, Any] = {"n": len(values), "units": unit_count(units), "level": draw.level}
        common = common_tokens(results) if some_over_common([metric]) else None
        about |= {} if common is None else {COMMON_TOKENS: common}
        for name, frame in game.frames():
            frame.insert(0, "metric", metric)
            frames[name].append(frame.assign(**about))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
    return Interactions(
        dict(planned.players), planned.orders is None, results=results, not_run=left, **joined
    )


@dataclass(frozen=True)
class _Game:
    """One measure's values, [prompt, coalition], and what they come to."""

    planned: Coalitions
    metric: str
    values: Float[np.ndarray, "prompt coalition"]
    units: Int[np.ndarray, " prompt"]
    draw: Draw
    margin: float

    def frames(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """`table`, `pairs`, `dividends` and `values` of `Interactions`."""
        names = self.planned.names
        inside = members(list(names), len(self.planned.players))
        coalitions = pd.DataFrame({"coalition": list(names.values()), "size": inside.sum(1)})
        low, high = mean_intervals(self.metric, self.values, self.units, self.draw)
        ends = {"value": means_of(self.values), "value_low": low, "value_high": high}
        yield "values", coalitions.assign(**ends)
        yield from self._exact(coalitions) if self.planned.orders is None else self._sampled()

    def _exact(self, coalitions: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
        found = dividends(self.values)
        weights = Weights.of(len(self.planned.players))
        reach = 2.0 ** np.maximum(coalitions["size"].to_numpy() - 1, 0)
        said = self._about("dividend", found, reach)
        yield "dividends", coalitions.assign(**said)[1:].reset_index(drop=True)
        one, two = np.array(1.0), np.array(2.0)
        table = self._about("shapley", found @ weights.shapley, one)
        table |= {"shapley_se": np.full(len(self.planned.players), np.nan)}
        table |= self._about("banzhaf", found @ weights.banzhaf, one)
        yield "table", self._players(table)
        pairs = self._about("interaction", found @ weights.interaction, two)
        pairs |= {"interaction_se": np.full(len(pairs["interaction"]), np.nan)}
        pairs |= self._about("banzhaf_interaction", found @ weights.banzhaf_interaction, two)
        yield "pairs", self._pairs(pairs, means_of(found @ weights.joint))

    def _sampled(self) -> Iterator[tuple[str, pd.DataFrame]]:
        assert self.planned.orders is not None
        orders, n = self.planned.orders, len(self.planned.players)
        columns = ["coalition", "size", "dividend", "dividend_low", "dividend_high"]
        yield "dividends", pd.DataFrame(columns=columns)
        added = [orders.marginals(self.values, player) for player in range(n)]
        nothing = np.full(n, np.nan)
        none = dict.fromkeys(("banzhaf", "banzhaf_low", "banzhaf_high"), nothing)
        yield "table", self._players(self._drawn("shapley", added, 1.0) | none)
        met = [orders.meetings(self.values, a, b) for a, b in pairs_of(n)]
        said = self._drawn("interaction", [both for both, _ in met], 2.0)
        none = {f"banzhaf_interaction{end}": np.full(len(met), np.nan) for end in _ENDS}
        joint = np.array([_mean(together) for _, together in met])
        yield "pairs", self._pairs(said | none, joint)

    # -- tables ------------------------------------------------------------------------------

    def _players(self, about: Mapping[str, Any]) -> pd.DataFrame:
        n = len(self.planned.players)
        value = self._value()
        everybody = (1 << n) - 1
        alone = [value[1 << i] - value[0] for i in range(n)]
        last = [value[everybody ^ 1 << i] for i in range(n)]
        frame = pd.DataFrame({"player": list(self.planned.players), **about})
        whole = value[everybody] - value[0]
        return frame.assign(
            alone=alone,
            missing=[value[everybody] - without for without in last],
            share=frame["shapley"] / whole if whole else np.nan,
        )

    def _pairs(self, about: Mapping[str, Any], joint: Float[np.ndarray, " pair"]) -> pd.DataFrame:
        names, n = list(self.planned.players), len(self.planned.players)
        pairs = pairs_of(n)
        value = self._value()
        whole = value[(1 << n) - 1] - value[0]
        ends: dict[str, list[float]] = {"at_base": [], "at_full": []}
        for a, b in pairs:
            for end, rest in (("at_base", 0), ("at_full", (1 << n) - 1 ^ 1 << a ^ 1 << b)):
                corners = (rest | 1 << a | 1 << b, rest | 1 << a, rest | 1 << b, rest)
                both, one, other, nobody = (value[mask] for mask in corners)
                ends[end].append(both - one - other + nobody)
        frame = pd.DataFrame(
            {"a": [names[a] for a, _ in pairs], "b": [names[b] for _, b in pairs], **about, **ends}
        )
        low, high = frame["interaction_low"], frame["interaction_high"]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(joint == 0, np.nan, frame["interaction"].to_numpy() / joint)
        near = self.margin * abs(whole)
        towards = (-high, -low) if whole < 0 else (low, high)  # the interval, towards all
        calls = [_call(*ends_of, near) for ends_of in zip(*towards, strict=True)]
        return frame.assign(joint=joint, share=share, call=calls)

    def _value(self) -> dict[int, float]:
        """Coalition -> its value."""
        return dict(zip(self.planned.masks, means_of(self.values).tolist(), strict=True))

    # -- intervals ---------------------------------------------------------------------------

    def _about(
        self, name: str, found: Float[np.ndarray, "prompt index"], reach: np.ndarray
    ) -> dict[str, Float[np.ndarray, " index"]]:
        """The mean of each column with its interval; none is further from 0 than `reach` where the
        measure is a share."""
        low, high = (np.full(found.shape[1], np.nan) for _ in range(2))
        if unit_count(self.units) > 1:
            for batch in self.draw.batches(found.shape[1]):
                draws = self.draw.means(found[:, batch], self.units)
                low[batch], high[batch] = percentiles(draws, self.draw.level)
        self._widen(found, np.broadcast_to(reach, low.shape), low, high)
        return {name: means_of(found), f"{name}_low": low, f"{name}_high": high}

    def _drawn(
        self, name: str, found: Sequence[Float[np.ndarray, "prompt _"]], reach: float
    ) -> dict[str, Float[np.ndarray, " index"]]:
        """The same for what was measured in several orders, [prompt, order], with standard errors
        of the orders; orders are resampled beside the facts."""
        made = {f"{name}{end}": np.full(len(found), np.nan) for end in (*_ENDS, "_se")}
        rng = np.random.default_rng([self.draw.seed, 1])
        for index, each in enumerate(found):
            count = each.shape[1]
            made[name][index] = _mean(each)
            if count < 2:
                continue
            made[f"{name}_se"][index] = each.mean(0).std(ddof=1) / np.sqrt(count)
            if unit_count(self.units) < 2:
                continue
            draws = self.draw.means(each, self.units)
            times = rng.multinomial(count, np.full(count, 1 / count), size=len(draws))
            both = (draws * times).sum(1, keepdims=True) / count
            low, high = percentiles(both, self.draw.level)
            self._widen(each.mean(1, keepdims=True), np.array([reach]), low, high)
            made[f"{name}_low"][index], made[f"{name}_high"][index] = low[0], high[0]
        return made

    def _widen(
        self,
        found: Float[np.ndarray, "prompt index"],
        reach: Float[np.ndarray, " index"],
        low: Float[np.ndarray, " index"],
        high: Float[np.ndarray, " index"],
    ) -> None:
        """Widen, in place, intervals of shares in which too few facts differ for a bootstrap."""
        if depth_of(self.metric) is None:
            return
        sums, sizes = per_unit(found, self.units, unit_count(self.units))
        for column, values in enumerate((sums / sizes[:, None]).T):
            kinds, counts = np.unique(np.round(values, 9), return_counts=True)
            differ = len(values) - int(counts.max())
            if differ >= FEW:
                continue
            usual = float(kinds[counts.argmax()])
            _, most = wilson(differ, len(values), self.draw.level)
            least, top = ((1 - most) * usual + most * end * reach[column] for end in (-1, 1))
            low[column] = np.fmin(low[column], least)
            high[column] = np.fmax(high[column], top)


#: What a value's columns end in.
_ENDS = ("", "_low", "_high")


def _mean(found: Float[np.ndarray, "prompt _"]) -> float:
    return float(found.mean()) if found.size else float("nan")


def _call(low: float, high: float, near: float) -> str:
    if -near <= low and high <= near:
        return "additive"
    if low > 0:
        return "AND"
    return "OR" if high < 0 else "undecided"


def _check_margin(margin: Any) -> None:
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
        raise ValueError(
            f"margin={brief(margin)}: write a share of the whole effect, such as 0.05."
        )


def facts_of(prompts: Sequence[Prompt]) -> dict[int, str]:
    """Prompt's number -> its fact: the field `fact` where all have one, else the answer."""
    told = all("fact" in prompt.fields for prompt in prompts)
    return {
        i: p.fields["fact"] if told else p.answer or f"prompt {i}" for i, p in enumerate(prompts)
    }


def _always(name: str) -> bool:
    row = known(name)
    return row is not None and (row.always or row.at_most is not None)


def _names(asked: Sequence[str | Measure]) -> list[str]:
    """The measures' names, once it is sure that each can be averaged."""
    names = [m.name if isinstance(m, Measure) else m for m in asked]
    for given, name in zip(asked, names, strict=True):
        row = given if isinstance(given, Measure) else known(str(name))
        if row is None or row.summary not in ("mean", "share"):
            allowed = ["top1", "top5", *averaged()]
            raise ValueError(
                f"metrics: {name!r} has no mean over prompts. Allowed: {' '.join(allowed)}, or a "
                f"Measure of your own.{suggest(str(name), allowed)}"
            )
    if not names or len({*names}) < len(names):
        raise ValueError(f"metrics={names}: name at least one measure, and each once.")
    return names


def _ready(
    model: GraftedTransformer,
    prompts: Sequence[Prompt],
    planned: Coalitions,
    prepend_bos: bool | None,
    metrics: Sequence[str],
    *,
    generates: bool,
) -> tuple[list[int], dict[int, str]]:
    """The numbers of the prompts that can run every player, and why the others cannot.

    Raises:
        ValueError: what is not a prompt, players that overlap, or no prompt that can run all.
    """
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so prompts cannot be run. Load one with it.")
    bos = model.prepends_bos(prepend_bos)
    ready: dict[int, Tokenized] = {}
    left: dict[int, str] = {}
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"prompts: number {number} is {brief(prompt)}, not a Prompt. Write Prompt(text, "
                "answer=…): coalitions are compared by their answers."
            )
        try:
            tokens = tokenize(prompt, model.tokenizer, bos)
            ready[number] = tokens.generating() if generates else tokens
        except PromptError as error:
            left[number] = str(error)
    left |= planned.left_out(ready)
    ready = {number: tokens for number, tokens in ready.items() if number not in left}
    planned.refuse_overlaps(ready, model.arch, model.sources, metrics)
    if not ready:
        why = f" The first reason: {next(iter(left.values()))}" if left else ""
        raise ValueError(f"none of {len(prompts)} prompts can run every player.{why}")
    if left:
        warnings.warn(
            f"{len(left)} of {len(prompts)} prompts cannot run every player and are left out; the "
            f"first, prompt {next(iter(left))}: {next(iter(left.values()))}",
            stacklevel=3,
        )
    return [*ready], left
