"""How sure the numbers are: intervals, differences and p-values over prompts.

Every function takes the results table (one row per prompt and graft) and compares grafts *on the
same prompts*: a prompt counts only if it ran under every graft that is compared, and the prompts
left out are counted, not hidden. One set of resamples serves all grafts, so that what makes a
prompt easy or hard cancels in differences and ratios (Efron & Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapters 8 and 13).

What is resampled is the `unit`. By default that is the prompt, and prompts are taken as
independent. Where several prompts ask for one fact in different words, they are not: name the
column that says which fact each prompt is about (`unit="fact"`; in prompts made from facts the
column `answer` does), and whole facts are drawn, with all their prompts (the cluster bootstrap:
Davison & Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.8; Field & Welsh 2007,
*JRSS B* 69, 369-390). With fewer than about 20 units its intervals are too narrow (Cameron, Gelbach
& Miller 2008, *Review of Economics and Statistics* 90, 414-427).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

VALUE_METRICS = ("rank", "prob", "logprob", "answer_logprob", "logit_diff")
# These may be missing for a prompt that ran (no distractors given, whole answer not scored).
OPTIONAL_METRICS = ("answer_logprob", "logit_diff")

#: Columns of a sweep's table that say what a graft is; a summary's rows carry them on.
GRAFT_COLUMNS = ("source", "span", "component", "layer", "head")

# With fewer than this many successes or failures the bootstrap of a proportion is too narrow.
FEW = 5
EXACT_LIMIT = 16
# Most numbers in one working array.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """Graft `a` against graft `b` on the prompts that ran under both."""

    a: str
    b: str
    metric: str
    n: int
    not_run: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    level: float
    interval: Literal["bootstrap", "newcombe", "none"]
    p_value: float
    p_method: Literal["exact", "monte carlo", "none"]
    seed: int
    unit: str = "prompt"


def summarise(
    table: pd.DataFrame,
    *,
    by: str | Sequence[str] = ("template",),
    ks: Sequence[int] = (1, 5, 50),
    metrics: Sequence[str] = ("logprob", "answer_logprob"),
    recovery: str | None = "logprob",
    base: str | None = None,
    full: str | None = None,
    grafts: Sequence[str] | None = None,
    unit: str = "prompt",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean accuracies, log-probabilities and recovery of every graft, each with its interval.

    One row per group of `by` and graft, in the order in which they first appear:

    - `n`: prompts used, the same for every graft of the group; `not_run`: prompts of the group left
      out because they did not run under every graft; `failed`: how many of those had no result
      under this very graft;
    - for each metric `m` (`top{k}` for k in `ks`, then `metrics`): its mean `m`, `m_low`, `m_high`;
    - `recovery` = (mean(graft) − mean(base)) / (mean(full) − mean(base)) of the metric named by the
      argument, with `recovery_low`, `recovery_high`, and `recovery_note`: None, or why a value or
      its interval is NaN;
    - of a sweep's table also `source`, `span`, `component`, `layer` and `head` of the graft;
    - `recovery_of`, `base`, `full`, `level`, `resamples`, `seed`, `unit`: how the row was computed;
      `units`: how many units the prompts used belong to.

    Intervals are percentile intervals of a paired bootstrap over units (Efron & Tibshirani 1993,
    chapter 13). Two cases where that would claim more than the data hold:

    - An accuracy with fewer than 5 successes or fewer than 5 failures gets a Wilson score interval
      (Wilson 1927; Brown, Cai & DasGupta 2001). The bootstrap of 0 of 40 is [0, 0], as if more
      prompts could never change it; Wilson's is [0, 0.088]. If the unit is not the prompt, units
      with any success or failure are counted, and the interval is that of as many prompts as there
      are units of equal size (Kish, *Survey Sampling*, 1965: Σ(size)² / Σ(size²)), as if a unit's
      prompts always agreed.
    - A mean of other metrics over one unit has no interval (NaN).

    Recovery is computed within each resample. It is NaN where full − base is 0 or its interval
    includes 0: there is nothing to recover. The few resamples in which full − base has the other
    sign count against both ends. Recovery is 0 for `base` and 1 for `full` by definition; for
    another graft an interval without width (all resamples equal) is given as NaN with a note.

    An optional metric (`answer_logprob`, `logit_diff`) that no prompt of a group has is NaN; one
    that only some have is an error, because its mean would be over other prompts.

    Args:
        base, full: the grafts between which recovery is measured; left out, those that the table
            names (`evaluate` and `read_results` do), else PRE and SFT.

    Raises:
        ValueError: unknown metrics, grafts or columns, a table with missing, doubled or infinite
            values, or prompts that belong to several groups or units.
    """
    about = _of_grafts(table)
    base, full = ends_of(table, base, full)
    by = (by,) if isinstance(by, str) else tuple(by)
    names = (*(f"top{k}" for k in ks), *metrics)
    wanted = names if recovery is None else (*names, recovery)
    _check_metrics(wanted)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"metric {name!r} is asked for twice; name each metric once")
    draw = _Draw(unit, level, resamples, seed)
    table = _plain(table, (*by, *draw.columns, *map(_column, wanted)))
    _check_groups(table, by)
    _check_units(table, unit)
    chosen = _choose_grafts(table, grafts)
    if recovery is not None:
        _check_ends(chosen, base, full, "recovery=None")
    rows: list[dict[str, object]] = []
    for key, group in _split(table[table["graft"].isin(chosen)], by):
        grid = _Grid.of(group, chosen)
        used = grid.ran_everywhere
        needed = np.broadcast_to(used[:, None], grid.ran.shape)
        values = {name: grid.values(name, needed)[used] for name in dict.fromkeys(wanted)}
        units = _numbered(grid.units(unit)[used])
        n = int(used.sum())
        found: dict[str, tuple[Sequence[object] | np.ndarray, ...]] = {}
        for name in names:
            found[name] = (_means(values[name]), *_mean_intervals(name, values[name], units, draw))
        if recovery is not None:
            ends = chosen.index(base), chosen.index(full)
            found["recovery"] = _recoveries(values[recovery], ends, units, draw)
        for column, graft in enumerate(chosen):
            row = dict(zip(by, key, strict=True))
            row |= {"graft": graft} | about.get(graft, {}) | {"n": n, "not_run": len(used) - n}
            row["failed"] = int((~grid.ran[:, column]).sum())
            for name, parts in found.items():
                kinds = zip(("", "_low", "_high", "_note"), parts, strict=False)
                row |= {f"{name}{kind}": part[column] for kind, part in kinds}
            if recovery is not None:
                row |= {"recovery_of": recovery, "base": base, "full": full}
            row |= {"level": level, "resamples": resamples, "seed": seed}
            rows.append(row | {"unit": unit, "units": _count(units)})
    return _with_notes(pd.DataFrame(rows), "recovery_note")


def compare(
    table: pd.DataFrame,
    a: str,
    b: str,
    metric: str,
    *,
    unit: str = "prompt",
    level: float = 0.95,
    resamples: int = 10_000,
    permutations: int = 100_000,
    seed: int = 0,
) -> Comparison:
    """The mean of `metric` under graft `a` minus that under graft `b`, over the same prompts.

    The interval is a percentile interval of the paired bootstrap. Where fewer than 5 units depart
    from the most common difference of a `top{k}` metric, it is Newcombe's score interval for paired
    proportions instead (Newcombe 1998, *Statistics in Medicine* 17, method 10), for the reason that
    `summarise` gives, and with the number of prompts that it gives for other units than prompts.

    The p-value is that of a two-sided sign-flip permutation test: under the null hypothesis a
    unit's values under the two grafts could be exchanged. It is exact for up to 16 units that
    differ, and for any number if they all differ by the same amount (top-k accuracies over prompts;
    this is McNemar's exact test). Otherwise it is estimated from `permutations` random sign vectors
    as (hits + 1) / (permutations + 1), which is never 0 (Phipson & Smyth 2010).

    For the optional metrics, a prompt without a value counts as not run.

    For more than one comparison use `compare_all`, which corrects the p-values for their number.

    Raises:
        ValueError: as `summarise`.
    """
    _check_metrics((metric,))
    draw = _Draw(unit, level, resamples, seed)
    _check_count("permutations", permutations)
    table = _plain(table, (*draw.columns, _column(metric)))
    _check_units(table, unit)
    pair = _choose_grafts(table, (a, b))
    grid = _Grid.of(table[table["graft"].isin(pair)], pair)
    (row,) = _compare_pairs(grid, [(0, 1)], metric, None, draw, permutations)
    kept = ("n", "not_run", "mean_a", "mean_b", "difference", "low", "high", "interval")
    return Comparison(
        a=a,
        b=b,
        metric=metric,
        level=level,
        seed=seed,
        unit=unit,
        **{name: row[name] for name in (*kept, "p_value", "p_method")},
    )


def compare_all(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    against: str | None = None,
    metric: str = "logprob",
    recovery: str = "logprob",
    by: str | Sequence[str] = (),
    base: str | None = None,
    full: str | None = None,
    unit: str = "prompt",
    level: float = 0.95,
    resamples: int = 10_000,
    permutations: int = 100_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Many comparisons, each as by `compare`, with p-values corrected for how many they are.

    Give the `pairs` (a, b), or `against` to compare every other graft of the table with one. Each
    pair is compared on the prompts that ran under both; in each group of `by` apart.

    With `metric="recovery"`, the difference is that of two recoveries of the metric that `recovery`
    names: (mean(a) − mean(b)) / (mean(full) − mean(base)), over prompts that ran under all four and
    computed within each resample as in `summarise`. Two recoveries are equal if and only if the two
    means are, so its p-value is that of the means, over these prompts.

    One row per group and pair: `a`, `b`, `metric`, `n`, `not_run`, `mean_a`, `mean_b` (recoveries
    for `metric="recovery"`), `difference`, `low`, `high`, `interval` (how it was made), `p_value`,
    `p_method`, `p_adjusted`, `compared`, `note` (None, or why a value is NaN), `units` (how many
    there are in n prompts); then how the row was computed.

    `p_adjusted` is Holm's over all rows of the result, groups included; `compared` is the number of
    rows with a p-value. All rows of a call are one family: put all comparisons that you look at
    into one call. Random signs give no p-value below 1 / (permutations + 1), so no adjusted one
    below compared / (permutations + 1): with thousands of comparisons ask for more permutations.
    They share one set of random signs, so an estimated p-value may differ from that of `compare` by
    chance.

    The intervals hold each for its own comparison, not all at once. Intervals that hold all at once
    with a chance of 95% or more are those of `level = 1 - 0.05 / number of comparisons`
    (Bonferroni); give `resamples` well above 2 / (1 - level).

    Raises:
        ValueError: as `summarise`; not exactly one of `pairs` and `against`; a pair of a graft
            with itself, or given twice.
    """
    base, full = ends_of(table, base, full)
    by = (by,) if isinstance(by, str) else tuple(by)
    measured = recovery if metric == "recovery" else metric
    _check_metrics((measured,), also="recovery")
    draw = _Draw(unit, level, resamples, seed)
    _check_count("permutations", permutations)
    table = _plain(table, (*by, *draw.columns, _column(measured)))
    _check_groups(table, by)
    _check_units(table, unit)
    known = _choose_grafts(table, None)
    named = _choose_pairs(known, pairs, against)
    chosen = list(dict.fromkeys(graft for pair in named for graft in pair))
    ends = None
    if metric == "recovery":
        _check_ends(known, base, full, "another metric than 'recovery'")
        chosen = list(dict.fromkeys((*chosen, base, full)))
        ends = chosen.index(base), chosen.index(full)
    place = {graft: column for column, graft in enumerate(chosen)}
    columns = [(place[a], place[b]) for a, b in named]
    settings: dict[str, object] = {"unit": unit}
    if ends is not None:
        settings |= {"recovery_of": recovery, "base": base, "full": full}
    settings |= {"level": level, "resamples": resamples, "permutations": permutations, "seed": seed}
    rows = []
    for key, group in _split(table[table["graft"].isin(chosen)], by):
        grid = _Grid.of(group, chosen)
        compared = _compare_pairs(grid, columns, measured, ends, draw, permutations)
        for (a, b), row in zip(named, compared, strict=True):
            group_of = dict(zip(by, key, strict=True))
            rows.append(group_of | {"a": a, "b": b, "metric": metric} | row | settings)
    result = pd.DataFrame(rows)
    after = result.columns.get_loc("p_method") + 1
    result.insert(after, "p_adjusted", holm(result["p_value"].tolist()))
    result.insert(after + 1, "compared", int(result["p_value"].notna().sum()))
    return _with_notes(result, "note")


def stability(
    table: pd.DataFrame,
    by: str = "template",
    *,
    metric: str = "recovery",
    recovery: str = "logprob",
    base: str | None = None,
    full: str | None = None,
    grafts: Sequence[str] | None = None,
    unit: str = "prompt",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much each graft's value depends on a choice that should not matter: template, seed, …

    The levels are the values of column `by`. A prompt number that occurs in several levels (the
    same prompts under models of several seeds) is one prompt. One row per graft:

    - `{by}={level}` for each level: the mean of `metric` there, or its recovery, over the prompts
      that ran under every graft in that level;
    - `mean`, `low`, `high`: the mean over levels, each counting the same, and its interval; `sd`
      (with divisor levels − 1), `min`, `max`: the spread between levels, which includes the chance
      error of each level's own value; `levels`: how many levels have a value;
    - `tau`, `tau_min`: the mean and the least Kendall's τ-b (Kendall 1945) between the orders of
      the grafts in two levels, over the `tau_pairs` pairs of levels in which it is defined. 1: the
      same order everywhere. `base` and `full` are left out, because they would agree in any case.
      The same in all rows; NaN with fewer than two grafts or levels;
    - `n`, `not_run`, `units`: prompts used, prompts left out, units; `note`: None, or what is
      missing and why; then how the row was computed.

    The interval depends on what the `unit` is:

    - `unit="prompt"`, or a column such as `"fact"`: how the mean could change with other prompts
      (facts) *for these levels*. Percentile bootstrap over units; a unit takes its prompts in all
      levels with it, and units that lie in one level each are drawn within their level. Accuracies
      near 0 and 1 and recovery are treated as in `summarise`.
    - `unit=by`: how it could change with other levels (templates, seeds) like these. Student's t
      interval over the levels' values, with levels − 1 degrees of freedom: a bootstrap over a
      handful of levels would be too narrow. Ends of accuracies and probabilities are cut to [0, 1].
      Levels that share facts, or a base model, are not independent in that; the interval then
      holds for these facts and this base model.

    Raises:
        ValueError: as `summarise`.
    """
    about = _of_grafts(table)
    base, full = ends_of(table, base, full)
    measured = recovery if metric == "recovery" else metric
    _check_metrics((measured,), also="recovery")
    draw = _Draw("prompt" if unit == by else unit, level, resamples, seed)
    _check_by(by)
    table = _plain(table, (by, *draw.columns, _column(measured)), within=(by,))
    if table[by].isna().any():
        raise ValueError(
            f"column {by!r} has no value in {int(table[by].isna().sum())} rows; "
            "give every row its level, or leave these rows out"
        )
    chosen = _choose_grafts(table, grafts)
    ends = None
    if metric == "recovery":
        _check_ends(chosen, base, full, "another metric than 'recovery'")
        ends = chosen.index(base), chosen.index(full)
    table = table[table["graft"].isin(chosen)]
    names = [str(name) for name in pd.unique(table[by])]
    shares = np.full((len(names), len(chosen)), np.nan)
    parts, labels, notes, not_run = [], [], [], 0
    for name, share, (_, group) in zip(names, shares, _split(table, (by,)), strict=True):
        _check_units(group, draw.unit)
        grid = _Grid.of(group, chosen)
        used = grid.ran_everywhere
        not_run += int((~used).sum())
        values = grid.values(measured, np.broadcast_to(used[:, None], grid.ran.shape))[used]
        label = grid.units(draw.unit)[used]
        if ends is not None:
            gap = _gap(values[:, ends], _numbered(label), draw)
            why = gap.note
            share[:] = _ratios(values, ends, gap)
        else:
            why = "the metric was not measured" if np.isnan(values).any() else None
            why = "no prompt ran under every graft" if len(values) == 0 else why
            share[:] = _means(values)
        if why is None:
            parts.append(values)
            labels.append(label)
        else:
            notes.append(f"{by}={name} is not counted: {why}")
    # A level has a value for every graft or for none.
    held = shares[~np.isnan(shares).any(axis=1)]
    units = _numbered(np.concatenate(labels)) if labels else np.zeros(0, dtype=np.int64)
    if unit == by:
        bounded = metric == "prob" or _depth(metric) is not None
        low, high, no_interval = _between_levels(held, level, bounded)
    elif parts:
        low, high, no_interval = _within_levels(measured, parts, units, ends, draw)
    else:
        low, high = (np.full(len(chosen), np.nan) for _ in range(2))
        no_interval = [None] * len(chosen)
    for column, value in zip(ends or (), (0.0, 1.0), strict=False):
        if parts:
            low[column] = high[column] = value
            no_interval[column] = None
    taus = _agreements(held[:, [i for i, g in enumerate(chosen) if g not in (base, full)]])
    rows: list[dict[str, object]] = []
    for column, graft in enumerate(chosen):
        here = held[:, column]
        row: dict[str, object] = {"graft": graft} | about.get(graft, {}) | {"metric": metric}
        row |= {f"{by}={name}": shares[i, column] for i, name in enumerate(names)}
        row |= {"mean": _mean(here), "low": low[column], "high": high[column]}
        row |= {"sd": float(here.std(ddof=1)) if len(here) > 1 else math.nan}
        row |= {"min": min(here, default=math.nan), "max": max(here, default=math.nan)}
        row |= {"levels": len(here), "tau": _mean(taus)}
        row |= {"tau_min": min(taus, default=math.nan), "tau_pairs": len(taus)}
        row |= {"n": len(units), "not_run": not_run}
        row |= {"units": len(held) if unit == by else _count(units)}
        said = no_interval[column]
        row |= {"note": "; ".join(notes if said is None else [*notes, said]) or None}
        if ends is not None:
            row |= {"recovery_of": recovery, "base": base, "full": full}
        rows.append(row | {"unit": unit, "level": level, "resamples": resamples, "seed": seed})
    return _with_notes(pd.DataFrame(rows), "note")


def ends_of(table: pd.DataFrame, base: str | None, full: str | None) -> tuple[str, str]:
    """The grafts that recovery lies between: those given, else those that the table names (as
    `evaluate` and `read_results` do), else PRE and SFT.
    """
    known = table.attrs.get("recovery", {})
    return base or known.get("base", "PRE"), full or known.get("full", "SFT")


def _of_grafts(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Graft -> what the table says of it besides the results."""
    columns = [c for c in GRAFT_COLUMNS if c in table]
    first = table.drop_duplicates("graft").set_index("graft")[columns]
    return {str(graft): dict(row) for graft, row in first.astype(object).iterrows()}


def holm(pvalues: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    Rejecting where the adjusted value is at most α keeps the chance of any false rejection in the
    family at most α, whatever the dependence. A NaN (no test) stays NaN and is not counted.
    """
    for p in pvalues:
        if not (math.isnan(p) or 0.0 <= p <= 1.0):
            raise ValueError(f"p-value {p!r} is outside [0, 1]; give probabilities (or NaN)")
    tested = sorted((p, i) for i, p in enumerate(pvalues) if not math.isnan(p))
    adjusted = [math.nan] * len(pvalues)
    running = 0.0
    for step, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - step)))
        adjusted[i] = running
    return tuple(adjusted)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927): honest at 0 and at n of n."""
    _check_level(level)
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    return _score_interval(successes / n, float(n), level)


def bootstrap_means(
    values: Float[np.ndarray, "prompt graft"],
    *,
    resamples: int,
    seed: int,
    units: Int[np.ndarray, " prompt"] | None = None,
) -> Float[np.ndarray, "resample graft"]:
    """Means of all columns over prompts drawn with replacement, the same draws for every column.

    `units` says for each prompt which unit (0, 1, …) it belongs to; whole units are drawn then. By
    default each prompt is its own.
    """
    if len(values) == 0:
        return np.full((resamples, values.shape[1]), np.nan)
    of = np.arange(len(values)) if units is None else units
    sums, sizes = _per_unit(values, of, _count(of))
    strata = np.zeros(len(sizes), dtype=np.int64)
    return _redraw(sums[None], sizes[None], strata, resamples, seed)[0]


@dataclass(frozen=True)
class _Draw:
    """How intervals are made: what is resampled, how often, from which seed, at which level."""

    unit: str
    level: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        _check_level(self.level)
        _check_count("resamples", self.resamples)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the table that the units need."""
        return () if self.unit == "prompt" else (self.unit,)

    def means(
        self, values: Float[np.ndarray, "prompt graft"], units: Int[np.ndarray, " prompt"]
    ) -> Float[np.ndarray, "resample graft"]:
        return bootstrap_means(values, resamples=self.resamples, seed=self.seed, units=units)

    def blocks(self, columns: int, sheets: int = 1) -> Iterator[slice]:
        """Runs of columns whose draws fit into memory; one seed gives each run the same draws."""
        size = max(1, 2 * CHUNK // (self.resamples * sheets))
        for start in range(0, columns, size):
            yield slice(start, min(start + size, columns))


@dataclass(frozen=True)
class _Gap:
    """full − base, against which recovery is measured, and why it cannot be where it cannot."""

    mean: float
    draws: Float[np.ndarray, " resample"]
    note: str | None


def _redraw(
    sums: Float[np.ndarray, "level unit graft"],
    sizes: Float[np.ndarray, "level unit"],
    strata: Int[np.ndarray, " unit"],
    resamples: int,
    seed: int,
) -> Float[np.ndarray, "level resample graft"]:
    """Means in each level over units drawn within their strata; NaN in a level that got none."""
    rng = np.random.default_rng(seed)
    means = np.empty((len(sums), resamples, sums.shape[2]))
    step = max(1, CHUNK // len(strata))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        counts = _draw_counts(rng, stop - start, strata)
        for out, total, size in zip(means[:, start:stop], sums, sizes, strict=True):
            np.matmul(counts, total, out=out)
            with np.errstate(invalid="ignore"):
                out /= (counts @ size)[:, None]
    return means


def _draw_counts(
    rng: np.random.Generator, size: int, strata: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "resample unit"]:
    """How often each unit occurs in each of `size` resamples, drawn within each stratum."""
    counts = np.empty((size, len(strata)))
    for stratum in range(strata.max() + 1):
        members = strata == stratum
        n = int(members.sum())
        picks = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts[:, members] = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
    return counts


def _per_unit(
    values: Float[np.ndarray, "prompt graft"], units: Int[np.ndarray, " prompt"], count: int
) -> tuple[Float[np.ndarray, "unit graft"], Float[np.ndarray, " unit"]]:
    """Sums of the values over each unit's prompts, and how many prompts it has."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, units, values)
    return sums, np.bincount(units, minlength=count).astype(float)


def _count(units: Int[np.ndarray, " prompt"]) -> int:
    return int(units.max()) + 1 if len(units) else 0


def _effective(sizes: Float[np.ndarray, "level unit"]) -> float:
    """As many independent prompts as these units are worth if a unit's prompts always agree."""
    weights = (sizes / sizes.sum(axis=1, keepdims=True)).sum(axis=0)
    # Without the rounding, 40 units of one prompt would be 40.00000000000001.
    return round(float(weights.sum() ** 2 / (weights**2).sum()), 9)


def _score_interval(share: float, n: float, level: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not leave 1e-18 where the formula gives exactly 0 or 1.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def _percentiles(
    draws: Float[np.ndarray, "resample graft"], level: float
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    # Order statistics, not interpolation: "below the low end" is then at most the nominal share of
    # resamples, which `_cautious` relies on, and an accuracy's ends are accuracies.
    tail, last = (1 - level) / 2, len(draws) - 1
    low, high = math.floor(last * tail), math.ceil(last * (1 - tail))
    ordered = np.array(draws.T, order="C")
    ordered.partition((low, high), axis=1)
    return ordered[:, low], ordered[:, high]


def _cautious(
    draws: Float[np.ndarray, "resample graft"], usable: Bool[np.ndarray, " resample"], level: float
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    """Percentiles in which each resample that is not usable counts against both ends."""
    if usable.all():
        return _percentiles(draws, level)
    low, _ = _percentiles(np.where(usable[:, None], draws, -np.inf), level)
    _, high = _percentiles(np.where(usable[:, None], draws, np.inf), level)
    return low, high


def _few(
    sums: Float[np.ndarray, "unit graft"], sizes: Float[np.ndarray, " unit"]
) -> Bool[np.ndarray, " graft"]:
    """Which proportions have so few units with a success, or a failure, that resampling misleads"""
    hits, misses = (sums > 0).sum(axis=0), (sums < sizes[:, None]).sum(axis=0)
    return np.minimum(hits, misses) < FEW


def _mean_intervals(
    metric: str,
    values: Float[np.ndarray, "prompt graft"],
    units: Int[np.ndarray, " prompt"],
    draw: _Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    low, high = (np.full(values.shape[1], np.nan) for _ in range(2))
    if len(values) == 0 or np.isnan(values).any():
        return low, high
    few = np.zeros(values.shape[1], dtype=bool)
    if _depth(metric) is not None:
        sums, sizes = _per_unit(values, units, _count(units))
        few = _few(sums, sizes)
        for column in np.flatnonzero(few):
            share = _mean(values[:, column])
            low[column], high[column] = _score_interval(share, _effective(sizes[None]), draw.level)
    if _count(units) > 1:
        rest = np.flatnonzero(~few)
        for block in draw.blocks(len(rest)):
            draws = draw.means(values[:, rest[block]], units)
            low[rest[block]], high[rest[block]] = _percentiles(draws, draw.level)
    return low, high


def _gap(
    values: Float[np.ndarray, "prompt 2"], units: Int[np.ndarray, " prompt"], draw: _Draw
) -> _Gap:
    """The gap between two columns, base and full."""
    draws = np.full(draw.resamples, np.nan)
    if len(values) == 0:
        return _Gap(math.nan, draws, "no prompt ran under every graft")
    if np.isnan(values).any():
        return _Gap(math.nan, draws, "the metric was not measured")
    # Mean of per-prompt differences, so that equal columns cancel exactly.
    gap = _mean(values[:, 1] - values[:, 0])
    ends = draw.means(values, units)
    draws = ends[:, 1] - ends[:, 0]
    if gap == 0:
        return _Gap(gap, draws, "full and base are equal: there is nothing to recover")
    low, high = _percentiles(draws[:, None], draw.level)
    if low[0] <= 0 <= high[0]:
        why = "the interval of full − base includes 0: nothing sure to recover"
        return _Gap(gap, draws, why)
    return _Gap(gap, draws, None)


def _ratios(
    values: Float[np.ndarray, "prompt graft"], ends: tuple[int, int], gap: _Gap
) -> Float[np.ndarray, " graft"]:
    """The recovery of every column, NaN where there is no sure gap; `ends` = (base, full)."""
    base, full = ends
    if gap.note is not None:
        return np.full(values.shape[1], np.nan)
    ratios = _means(values - values[:, [base]]) / gap.mean
    ratios[base], ratios[full] = 0.0, 1.0
    return ratios


def _recoveries(
    values: Float[np.ndarray, "prompt graft"],
    ends: tuple[int, int],
    units: Int[np.ndarray, " prompt"],
    draw: _Draw,
) -> tuple[
    Float[np.ndarray, " graft"],
    Float[np.ndarray, " graft"],
    Float[np.ndarray, " graft"],
    list[str | None],
]:
    """Recovery of every column with its interval and a note; `ends` = columns (base, full)."""
    gap = _gap(values[:, ends], units, draw)
    ratios = _ratios(values, ends, gap)
    low, high, notes = _ratio_intervals(values - values[:, [ends[0]]], gap, ratios, units, draw)
    for column in ends if gap.note is None else ():
        low[column] = high[column] = ratios[column]
        notes[column] = None
    return ratios, low, high, notes


def _ratio_intervals(
    parts: Float[np.ndarray, "prompt graft"],
    gap: _Gap,
    ratios: Float[np.ndarray, " graft"],
    units: Int[np.ndarray, " prompt"],
    draw: _Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"], list[str | None]]:
    """Intervals of mean(part) / gap for each column, and notes where there is none."""
    low, high = (np.full(len(ratios), np.nan) for _ in range(2))
    why = gap.note
    if why is None and _count(units) < 2:
        why = f"one {draw.unit} has no interval"
    if why is not None:
        return low, high, [why] * len(ratios)
    usable = gap.draws * np.sign(gap.mean) > 0
    below = np.where(usable, gap.draws, 1.0)[:, None]
    for block in draw.blocks(len(ratios)):
        draws = draw.means(parts[:, block], units) / below
        low[block], high[block] = _cautious(draws, usable, draw.level)
    return low, high, _notes_of_flat(low, high, ratios)


def _notes_of_flat(
    low: Float[np.ndarray, " graft"],
    high: Float[np.ndarray, " graft"],
    middle: Float[np.ndarray, " graft"],
    why: str = "all resamples agree: the prompts vary too little for an interval",
) -> list[str | None]:
    """Take away, in place, intervals without width, and say so."""
    flat = high - low <= 1e-12 * np.maximum(1.0, np.abs(middle))
    low[flat] = high[flat] = np.nan
    return [why if none else None for none in flat]


def _within_levels(
    metric: str,
    parts: Sequence[Float[np.ndarray, "_ graft"]],
    units: Int[np.ndarray, " prompt"],
    ends: tuple[int, int] | None,
    draw: _Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"], list[str | None]]:
    """Bootstrap intervals of the mean over levels of the mean (of the recovery, with `ends`).

    `parts` are the levels' values; `units` numbers the units of all their prompts, level by level.
    """
    count, columns = _count(units), parts[0].shape[1]
    low, high = (np.full(columns, np.nan) for _ in range(2))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    sums, sizes = np.empty((len(parts), count, columns)), np.empty((len(parts), count))
    for i, part in enumerate(parts):
        sums[i], sizes[i] = _per_unit(part, units[starts[i] : starts[i + 1]], count)
    # Units of one level each are drawn within their level, so that no level ever comes out empty.
    nested = bool(((sizes > 0).sum(axis=0) == 1).all())
    strata = (sizes > 0).argmax(axis=0) if nested else np.zeros(count, dtype=np.int64)
    few = np.zeros(columns, dtype=bool)
    if ends is None and _depth(metric) is not None:
        few = _few(sums.sum(axis=0), sizes.sum(axis=0))
        for column in np.flatnonzero(few):
            share = float(np.mean([_mean(part[:, column]) for part in parts]))
            low[column], high[column] = _score_interval(share, _effective(sizes), draw.level)
    if np.bincount(strata).min() < 2:
        why = f"one {draw.unit} has no interval"
        if nested and len(parts) > 1:
            why = f"a level with one {draw.unit} has no interval"
        return low, high, [None if score else why for score in few]
    rest = np.flatnonzero(~few)

    def redraw(which: Int[np.ndarray, " graft"]) -> Float[np.ndarray, "level resample graft"]:
        return _redraw(sums[:, :, which], sizes, strata, draw.resamples, draw.seed)

    if ends is not None:
        base, full = np.moveaxis(redraw(np.array(ends)), 2, 0)
        gaps = full - base
        signs = np.sign([part[:, ends[1]].mean() - part[:, ends[0]].mean() for part in parts])
        usable = (gaps * signs[:, None] > 0).all(axis=0)
    for block in draw.blocks(len(rest), sheets=len(parts)):
        draws = redraw(rest[block])
        if ends is not None:
            draws -= base[:, :, None]
            draws /= np.where(usable, gaps, 1.0)[:, :, None]
            pooled = draws.mean(axis=0)
        else:
            pooled = draws.mean(axis=0)
            usable = ~np.isnan(pooled[:, 0])
        low[rest[block]], high[rest[block]] = _cautious(pooled, usable, draw.level)
    if ends is None:
        return low, high, [None] * columns
    return low, high, _notes_of_flat(low, high, np.zeros(columns))


def _between_levels(
    held: Float[np.ndarray, "level graft"], level: float, bounded: bool
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"], list[str | None]]:
    """Student's t intervals of the mean over levels; `bounded`: of a share, within [0, 1]."""
    from scipy.special import stdtrit

    if len(held) < 2:
        low, high = (np.full(held.shape[1], np.nan) for _ in range(2))
        return low, high, ["fewer than two levels have no interval"] * held.shape[1]
    middle = held.mean(axis=0)
    half = held.std(axis=0, ddof=1) / math.sqrt(len(held))
    half = half * float(stdtrit(len(held) - 1, (1 + level) / 2))
    low, high = middle - half, middle + half
    if bounded:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    why = "all levels agree: they vary too little for an interval"
    return low, high, _notes_of_flat(low, high, middle, why)


def _agreements(held: Float[np.ndarray, "level graft"]) -> Float[np.ndarray, " pair"]:
    """Kendall's τ-b of each pair of levels in which not all grafts are equal."""
    # A second to import, and nothing else here needs it.
    from scipy.stats import kendalltau

    if held.shape[1] < 2:
        return np.zeros(0)
    # Ties that rounding broke are ties.
    orders = [order for order in np.round(held, 12) if np.ptp(order) > 0]
    return np.array([float(kendalltau(a, b).statistic) for a, b in combinations(orders, 2)])


def _compare_pairs(
    grid: "_Grid",
    pairs: Sequence[tuple[int, int]],
    metric: str,
    ends: tuple[int, int] | None,
    draw: _Draw,
    permutations: int,
) -> list[dict[str, Any]]:
    """One row for each pair of columns; of recoveries where `ends` = (base, full) is given."""
    first, second = np.array(pairs).T
    ran = grid.ran
    used = ran[:, first] & ran[:, second]
    if ends is not None:
        used &= ran[:, ends].all(axis=1, keepdims=True)
    needed = np.zeros_like(ran)
    for columns in (first, second):
        np.logical_or.at(needed.T, columns, used.T)
    if ends is not None:
        needed[:, ends] |= used.any(axis=1, keepdims=True)
    values = grid.values(metric, needed, partial=True)
    present = ~np.isnan(values)
    used &= present[:, first] & present[:, second]
    if ends is not None:
        used &= present[:, ends].all(axis=1, keepdims=True)
    labels = grid.units(draw.unit)
    rows: list[dict[str, Any]] = [{} for _ in pairs]
    everywhere = _numbered(labels)
    apart = np.where(used, values[:, first] - values[:, second], 0.0)
    flips, _ = _per_unit(apart, everywhere, _count(everywhere))
    tests = _sign_flips(flips, permutations, draw.seed)
    # Pairs over the same prompts are resampled together.
    patterns, pattern_of = np.unique(np.packbits(used, axis=0), axis=1, return_inverse=True)
    for pattern in range(patterns.shape[1]):
        members = np.flatnonzero(pattern_of.ravel() == pattern)
        kept = used[:, members[0]]
        a, b = values[kept][:, first[members]], values[kept][:, second[members]]
        units = _numbered(labels[kept])
        notes: list[str | None] = [None] * len(members)
        if ends is None:
            mean_a, mean_b, difference = _means(a), _means(b), _means(a - b)
            low, high, kinds = _difference_intervals(metric, a, b, units, draw)
            if _count(units) == 1:
                notes = [f"one {draw.unit} has no interval" if k == "none" else None for k in kinds]
        else:
            base = values[kept][:, [ends[0]]]
            gap = _gap(values[kept][:, ends], units, draw)
            sure = math.nan if gap.note is not None else gap.mean
            mean_a, mean_b, difference = (_means(x) / sure for x in (a - base, b - base, a - b))
            low, high, notes = _ratio_intervals(a - b, gap, difference, units, draw)
            kinds = ["none" if np.isnan(end) else "bootstrap" for end in low]
            for i, member in enumerate(members):
                if {first[member], second[member]} == set(ends) and gap.note is None:
                    notes[i] = "base and full recover 0 and 1 by definition"
        for i, member in enumerate(members):
            tested = len(units) > 0 and not np.isnan(difference[i])
            p_value, p_method = tests[member] if tested else (math.nan, "none")
            rows[member] = {
                "n": int(kept.sum()),
                "not_run": int((~kept).sum()),
                "mean_a": float(mean_a[i]),
                "mean_b": float(mean_b[i]),
                "difference": float(difference[i]),
                "low": float(low[i]),
                "high": float(high[i]),
                "interval": kinds[i],
                "p_value": p_value,
                "p_method": p_method,
                "note": notes[i] if len(units) else "no prompt ran under every graft",
                "units": _count(units),
            }
    return rows


def _difference_intervals(
    metric: str,
    a: Float[np.ndarray, "prompt pair"],
    b: Float[np.ndarray, "prompt pair"],
    units: Int[np.ndarray, " prompt"],
    draw: _Draw,
) -> tuple[
    Float[np.ndarray, " pair"],
    Float[np.ndarray, " pair"],
    list[Literal["bootstrap", "newcombe", "none"]],
]:
    count = _count(units)
    low, high = (np.full(a.shape[1], np.nan) for _ in range(2))
    kinds: list[Literal["bootstrap", "newcombe", "none"]] = ["none"] * a.shape[1]
    if count == 0:
        return low, high, kinds
    few = np.zeros(a.shape[1], dtype=bool)
    if _depth(metric) is not None:
        # In how many units do all prompts have one and the same difference?
        sizes = np.bincount(units)
        same = [
            (_per_unit((a - b == value).astype(float), units, count)[0] == sizes[:, None]).sum(0)
            for value in (-1, 0, 1)
        ]
        few = count - np.max(same, axis=0) < FEW
        scale = _effective(sizes[None].astype(float)) / len(units)
        for column in np.flatnonzero(few):
            pairs = np.stack((a[:, column], b[:, column]), axis=1).astype(bool)
            low[column], high[column] = _newcombe(pairs, draw.level, scale)
            kinds[column] = "newcombe"
    if count > 1:
        rest = np.flatnonzero(~few)
        for block in draw.blocks(len(rest)):
            draws = draw.means((a - b)[:, rest[block]], units)
            low[rest[block]], high[rest[block]] = _percentiles(draws, draw.level)
        for column in rest:
            kinds[column] = "bootstrap"
    return low, high, kinds


def _newcombe(
    pairs: Bool[np.ndarray, "prompt 2"], level: float, scale: float = 1.0
) -> tuple[float, float]:
    """Newcombe's interval, as if each prompt were `scale` prompts."""
    n = len(pairs)
    a, b = (int(column.sum()) for column in pairs.T)
    both = int(pairs.all(axis=1).sum())
    share_a, share_b = a / n, b / n
    (low_a, high_a), (low_b, high_b) = (
        _score_interval(share, n * scale, level) for share in (share_a, share_b)
    )
    neither = n - a - b + both
    spread = both * neither - (a - both) * (b - both)
    # Newcombe's continuity correction, for a positive association only.
    corrected = max(spread - n / (2 * scale), 0.0) if spread > 0 else float(spread)
    margins = a * (n - a) * b * (n - b)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = share_a - share_b
    low = difference - reach(share_a - low_a, high_b - share_b)
    high = difference + reach(high_a - share_a, share_b - low_b)
    return max(low, -1.0), min(high, 1.0)


def _sign_flips(
    differences: Float[np.ndarray, "unit pair"], permutations: int, seed: int
) -> list[tuple[float, Literal["exact", "monte carlo"]]]:
    """Two-sided sign-flip p-values of each column; the random signs are the same for all."""
    exact = [_exact_flip(column) for column in differences.T]
    open_ = [column for column, p in enumerate(exact) if p is None]
    sampled = {}
    if open_:
        pending = differences[:, open_]
        pending = pending[(pending != 0).any(axis=1)]  # flipping a zero changes nothing
        observed = _observed(pending)
        hits = np.zeros(len(open_), dtype=np.int64)
        rng = np.random.default_rng(seed)
        step = max(1, CHUNK // len(pending))
        for start in range(0, permutations, step):
            rows = min(step, permutations - start)
            signs = 1.0 - 2.0 * rng.integers(0, 2, size=(rows, len(pending)), dtype=np.int8)
            width = max(1, CHUNK // rows)
            for left in range(0, len(open_), width):
                block = slice(left, left + width)
                sums = np.abs(signs @ pending[:, block])
                hits[block] += (sums >= observed[block]).sum(axis=0)
        sampled = dict(zip(open_, ((hits + 1) / (permutations + 1)).tolist(), strict=True))
    return [
        (sampled[column], "monte carlo") if p is None else (p, "exact")
        for column, p in enumerate(exact)
    ]


def _exact_flip(
    difference: Float[np.ndarray, " unit"],
) -> float | None:
    """The exact p-value, or None where there are too many sign vectors to go through."""
    moved = difference[difference != 0]
    m = len(moved)
    if m == 0:
        return 1.0
    observed = float(_observed(moved[:, None])[0])
    size = np.abs(moved)
    if size.max() - size.min() <= 1e-12 * size.max():
        ways = sum(math.comb(m, k) for k in range(m + 1) if abs(2 * k - m) * size[0] >= observed)
        return ways / 2**m
    if m > EXACT_LIMIT:
        return None
    sums = np.zeros(1)
    for value in moved:
        sums = np.concatenate((sums + value, sums - value))
    return float((np.abs(sums) >= observed).mean())


def _observed(differences: Float[np.ndarray, "unit pair"]) -> Float[np.ndarray, " pair"]:
    """What a sum must reach to count as extreme; sums that are equal on paper count as equal."""
    return np.abs(differences.sum(axis=0)) - 1e-12 * np.abs(differences).sum(axis=0)


def _depth(metric: str) -> int | None:
    """k of a `top{k}` metric, None of another."""
    match = re.fullmatch(r"top([1-9]\d*)", metric)
    return int(match[1]) if match else None


def _column(metric: str) -> str:
    return "rank" if _depth(metric) is not None else metric


def _mean(sample: Float[np.ndarray, " prompt"]) -> float:
    return float(sample.mean()) if len(sample) else math.nan


def _means(values: Float[np.ndarray, "prompt graft"]) -> Float[np.ndarray, " graft"]:
    # Column by column: each sum is then rounded as if the column were alone.
    return np.array([_mean(column) for column in values.T])


def _numbered(labels: np.ndarray) -> Int[np.ndarray, " prompt"]:
    """Labels as numbers from 0, in order of first appearance."""
    return pd.factorize(labels)[0].astype(np.int64)


@dataclass(frozen=True)
class _Grid:
    """A table's rows in their places: prompts in ascending order × grafts as asked for."""

    table: pd.DataFrame
    prompts: Int[np.ndarray, " prompt"]
    row: Int[np.ndarray, " cell"]
    column: Int[np.ndarray, " cell"]
    ran: Bool[np.ndarray, "prompt graft"]

    @classmethod
    def of(cls, table: pd.DataFrame, grafts: Sequence[str]) -> "_Grid":
        prompts, row = np.unique(table["prompt"].to_numpy(dtype=np.int64), return_inverse=True)
        column = pd.Index(grafts).get_indexer(table["graft"]).astype(np.int64)
        # A row that is not there at all did not run either.
        ran = np.zeros((len(prompts), len(grafts)), dtype=bool)
        ran[row, column] = table["reason"].isna()
        return cls(table, prompts, row, column, ran)

    @property
    def ran_everywhere(self) -> Bool[np.ndarray, " prompt"]:
        return np.all(self.ran, axis=1)

    def units(self, unit: str) -> np.ndarray:
        """Each prompt's unit."""
        if unit == "prompt":
            return self.prompts
        labels = np.empty(len(self.prompts), dtype=object)
        labels[self.row] = self.table[unit].to_numpy(dtype=object)
        return labels

    def values(
        self, metric: str, needed: Bool[np.ndarray, "prompt graft"], *, partial: bool = False
    ) -> Float[np.ndarray, "prompt graft"]:
        """One metric in the cells needed, NaN in the others and where an optional one is missing.

        An optional metric must be missing in all the cells needed or in none, unless `partial`.
        """
        name = _column(metric)
        values = np.full(needed.shape, np.nan)
        cells = pd.to_numeric(self.table[name]).to_numpy(dtype=float, na_value=np.nan)
        values[self.row, self.column] = cells
        values[~needed] = np.nan
        missing = np.isnan(values) & needed
        optional = name in OPTIONAL_METRICS
        if missing.any() and not (optional and (partial or (missing == needed).all())):
            where = self.prompts[missing.any(axis=1)]
            fix = (
                "leave the metric out, or summarise the prompts that have it apart"
                if optional
                else "a row without numbers must give its reason in column 'reason'"
            )
            raise ValueError(
                f"column {name!r} has no value for {len(where)} of {int(needed.any(axis=1).sum())} "
                f"prompts that ran (prompt {_listed(where[:5].tolist())}); {fix}"
            )
        if np.isinf(values).any():
            where = self.prompts[np.isinf(values).any(axis=1)]
            raise ValueError(
                f"column {name!r} is infinite for prompt {_listed(where[:5].tolist())}; "
                "its mean would be too: leave the metric out, or mend the run"
            )
        depth = _depth(metric)
        if depth is None:
            return values
        return np.where(np.isnan(values), np.nan, (values <= depth).astype(float))


def _split(
    table: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[tuple[object, ...], pd.DataFrame]]:
    """The groups of a table in the order in which they first appear."""
    if not by:
        yield (), table
        return
    yield from table.groupby(list(by), sort=False, dropna=False)


def _with_notes(result: pd.DataFrame, name: str) -> pd.DataFrame:
    """Leave None, not NaN, where there is no note."""
    if name in result:
        notes = result[name].astype(object)
        result[name] = notes.where(notes.notna(), None)
    return result


def _choose_grafts(table: pd.DataFrame, grafts: Sequence[str] | None) -> list[str]:
    known = list(pd.unique(table["graft"]))
    if grafts is None:
        return known
    for name in grafts:
        if name not in known:
            raise ValueError(f"no graft named {name!r} in the table; it has {_listed(known)}")
    if len(set(grafts)) < len(grafts) or not grafts:
        raise ValueError(f"grafts {_listed(list(grafts))}: name at least one graft, and each once")
    return list(grafts)


def _choose_pairs(
    known: Sequence[str], pairs: Sequence[tuple[str, str]] | None, against: str | None
) -> list[tuple[str, str]]:
    if (pairs is None) == (against is None):
        given = "both" if pairs is not None else "neither"
        raise ValueError(
            f"{given} of pairs and against given; give pairs=[(a, b), …], or against= the graft "
            "with which every other one is compared"
        )
    if pairs is None:
        pairs = [(name, str(against)) for name in known if name != against]
        if not pairs and against in known:
            raise ValueError(f"the table has no graft but {against!r}: nothing to compare it with")
        names = {str(against)}
    else:
        names = {name for pair in pairs for name in pair}
        if not pairs:
            raise ValueError("pairs is empty; give at least one pair (a, b) of grafts")
    for name in sorted(names - set(known)):
        raise ValueError(f"no graft named {name!r} in the table; it has {_listed(known)}")
    seen: set[frozenset[str]] = set()
    for a, b in pairs:
        if a == b:
            raise ValueError(f"pair ({a!r}, {b!r}) compares a graft with itself; name two grafts")
        if frozenset((a, b)) in seen:
            raise ValueError(
                f"pair ({a!r}, {b!r}) is given twice (either way round); give each pair once, "
                "because the p-values are corrected for their number"
            )
        seen.add(frozenset((a, b)))
    return [(a, b) for a, b in pairs]


def _plain(table: pd.DataFrame, columns: Sequence[str], within: Sequence[str] = ()) -> pd.DataFrame:
    """The columns needed, checked, with categories as plain values.

    A prompt and graft have one row, or one in each value of the columns `within`.
    """
    needed = list(dict.fromkeys(("prompt", "graft", "reason", *columns)))
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"the table lacks column {_listed(missing)}; it has {_listed(list(table.columns))}: "
            "pass the results table with one row per prompt and graft"
        )
    if len(table) == 0:
        raise ValueError("the table is empty; pass results with at least one prompt and graft")
    table = table[needed]
    # Groups of categories would come in another order, and include those without rows.
    categories = [c for c in needed if isinstance(table[c].dtype, pd.CategoricalDtype)]
    table = table.astype(dict.fromkeys(categories, object))
    key = [*within, "prompt", "graft"]
    twice = table[table.duplicated(key)]
    if len(twice):
        first = twice.iloc[0]
        where = "".join(f" and {name} {first[name]!r}" for name in within)
        raise ValueError(
            f"prompt {first['prompt']} with graft {first['graft']!r}{where} has more than one row "
            f"({len(twice)} rows too many); keep one: table.drop_duplicates({key})"
        )
    return table


def _check_by(name: str) -> None:
    if name in ("prompt", "graft", "reason", *VALUE_METRICS):
        raise ValueError(f"by={name!r} cannot group prompts; use such as 'template', or by=()")


def _check_groups(table: pd.DataFrame, by: Sequence[str]) -> None:
    for name in by:
        _check_by(name)
        if name in GRAFT_COLUMNS:
            raise ValueError(
                f"by={name!r} groups prompts, and {name!r} is a column of grafts. Leave it out: "
                "each row of the result is of one graft and has that column."
            )
        several = _with_several(table, name)
        if several is not None:
            raise ValueError(
                f"prompt {several} has more than one value in column {name!r}; "
                "a prompt belongs to one group: give each prompt its own number"
            )


def _check_units(table: pd.DataFrame, unit: str) -> None:
    if unit == "prompt":
        return
    if unit in ("graft", "reason", *VALUE_METRICS):
        raise ValueError(
            f"unit={unit!r} does not say which prompts belong together; "
            "use 'prompt', or a column such as 'fact' or 'answer'"
        )
    if table[unit].isna().any():
        prompt = table.loc[table[unit].isna(), "prompt"].iloc[0]
        raise ValueError(
            f"column {unit!r} has no value for prompt {prompt}; give every prompt its unit"
        )
    several = _with_several(table, unit)
    if several is not None:
        raise ValueError(
            f"prompt {several} has more than one value in column {unit!r}; "
            "a prompt belongs to one unit: give each prompt its own number"
        )


def _with_several(table: pd.DataFrame, name: str) -> object | None:
    """The first prompt that has more than one value in a column, or None."""
    pairs = table[["prompt", name]].drop_duplicates()
    several = pairs.loc[pairs.duplicated("prompt"), "prompt"]
    return None if several.empty else several.min()


def _check_ends(grafts: Sequence[str], base: str, full: str, otherwise: str) -> None:
    for role, name in (("base", base), ("full", full)):
        if name not in grafts:
            raise ValueError(
                f"{role}={name!r} is not one of the grafts {_listed(grafts)}: "
                f"give {role}= the name of a graft in the table, or {otherwise}"
            )


def _check_metrics(names: Sequence[str], also: str | None = None) -> None:
    for name in names:
        if name not in VALUE_METRICS and _depth(name) is None:
            raise ValueError(
                f"unknown metric {name!r}; choose 'top1', 'top5' or another top-k (k >= 1), "
                f"or one of {_listed(VALUE_METRICS if also is None else (*VALUE_METRICS, also))}"
            )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not in (0, 1); for a 95% interval give level=0.95")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}={count} is not positive; 10000 is usual")


def _listed(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)
