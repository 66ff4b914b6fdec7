"""Differences between two grafts over the same prompts, and p-values for many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from graftlens.references import MEMBERS, named_in
from graftlens.stats.intervals import difference_intervals
from graftlens.stats.permutation import holm, sign_flips
from graftlens.stats.recovery import gap_of, ratio_intervals
from graftlens.stats.resampling import Draw, check_count, means_of, numbered, per_unit, unit_count
from graftlens.stats.table import (
    Pivot,
    check_groups,
    check_metrics,
    check_units,
    checked_table,
    choose_grafts,
    column_of,
    end_places,
    endless,
    groups_of,
    listed,
    with_notes,
)


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

    For the optional metrics, a prompt without a value counts as not run. Where a value is infinite
    (the log-probability of a token that a source lacks) there is no mean: all numbers are NaN.

    For more than one comparison use `compare_all`, which corrects the p-values for their number.

    Raises:
        ValueError: as `summarise`.
    """
    check_metrics(table, (metric,))
    draw = Draw(unit, level, resamples, seed)
    check_count("permutations", permutations)
    table = checked_table(table, (*draw.columns, column_of(metric)))
    check_units(table, unit)
    pair = choose_grafts(table, (a, b))
    pivot = Pivot.of(table[table["graft"].isin(pair)], pair)
    (row,) = _compare_pairs(pivot, [(0, 1)], metric, None, draw, permutations)
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
    """Many comparisons, each as by `compare`, with p-values corrected for their number.

    Give the `pairs` (a, b), or `against` to compare every other graft of the table with one. Each
    pair is compared on the prompts that ran under both, separately in each group of `by`.

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

    Each interval holds for its own comparison, not all of them at once. Intervals that hold all at
    once with a chance of 95% or more are those of `level = 1 - 0.05 / number of comparisons`
    (Bonferroni); give `resamples` well above 2 / (1 - level).

    Args:
        table: results with a row per prompt and graft.
        pairs: grafts to compare, by their names in the column `graft`.
        against: the name of the graft that every other one is compared with. Those of the base
            and of the full run are in the columns `base_run` and `full_run`: a reference that was
            not among the grafts is called `PRE` or `SFT` by `evaluate`, and in a sweep `none` or
            after its graft (`sft @ all`).
        metric: what is compared: `top{k}`, a measure, or `recovery`.
        recovery: the measure whose recoveries are compared.
        by: columns; the prompts of each of their values are compared separately.
        base, full: the runs that recovery is measured between; by default those that the table
            names.
        unit, level, resamples, seed: as in `summarise`.
        permutations: most sign patterns for one p-value.

    Raises:
        ValueError: as `summarise`; not exactly one of `pairs` and `against`; a pair of a graft
            with itself, or given twice.
    """
    if metric == "recovery":
        base, full = named_in(table, base, full)
    by = (by,) if isinstance(by, str) else tuple(by)
    measured = recovery if metric == "recovery" else metric
    check_metrics(table, (measured,), also="recovery")
    draw = Draw(unit, level, resamples, seed)
    check_count("permutations", permutations)
    within = [name for name in by if name in MEMBERS]
    table = checked_table(table, (*by, *draw.columns, column_of(measured)), within)
    check_groups(table, by)
    check_units(table, unit)
    known = choose_grafts(table, None)
    named = _choose_pairs(known, pairs, against)
    chosen = list(dict.fromkeys(graft for pair in named for graft in pair))
    ends = None
    if base is not None and metric == "recovery":
        both = end_places(known, base, full, "another metric than 'recovery'")
        chosen = list(dict.fromkeys((*chosen, *(known[place] for place in both))))
        ends = end_places(chosen, base, full, "")
    place = {graft: column for column, graft in enumerate(chosen)}
    columns = [(place[a], place[b]) for a, b in named]
    settings: dict[str, object] = {"unit": unit}
    if ends is not None:
        settings |= {"recovery_of": recovery, "base_run": base, "full_run": full}
    settings |= {"level": level, "resamples": resamples, "permutations": permutations, "seed": seed}
    rows = []
    for key, group in groups_of(table[table["graft"].isin(chosen)], by):
        pivot = Pivot.of(group, chosen)
        compared = _compare_pairs(pivot, columns, measured, ends, draw, permutations)
        for (a, b), row in zip(named, compared, strict=True):
            group_of = dict(zip(by, key, strict=True))
            rows.append(group_of | {"a": a, "b": b, "metric": metric} | row | settings)
    result = pd.DataFrame(rows)
    after = result.columns.get_loc("p_method") + 1
    result.insert(after, "p_adjusted", holm(result["p_value"].tolist()))
    result.insert(after + 1, "compared", int(result["p_value"].notna().sum()))
    return with_notes(result, "note")


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
            raise ValueError(
                f"the table has no graft but {against!r}: there is nothing to compare it with"
            )
        names = {str(against)}
    else:
        names = {name for pair in pairs for name in pair}
        if not pairs:
            raise ValueError("pairs is empty; give at least one pair (a, b) of grafts")
    for name in sorted(names - set(known)):
        raise ValueError(f"no graft named {name!r} in the table; it has {listed(known)}")
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


def _compare_pairs(
    pivot: "Pivot",
    pairs: Sequence[tuple[int, int]],
    metric: str,
    ends: tuple[int, int] | None,
    draw: Draw,
    permutations: int,
) -> list[dict[str, Any]]:
    """One row for each pair of columns; for recoveries if `ends` = (base, full) is given."""
    first, second = np.array(pairs).T
    ran = pivot.ran
    used = ran[:, first] & ran[:, second]
    if ends is not None:
        used &= ran[:, ends].all(axis=1, keepdims=True)
    needed = np.zeros_like(ran)
    for columns in (first, second):
        np.logical_or.at(needed.T, columns, used.T)
    if ends is not None:
        needed[:, ends] |= used.any(axis=1, keepdims=True)
    values = pivot.values(metric, needed, partial=True)
    present = ~np.isnan(values)
    used &= present[:, first] & present[:, second]
    if ends is not None:
        used &= present[:, ends].all(axis=1, keepdims=True)
    infinite = _infinite(metric, pivot, values, used, pairs, ends)
    values = np.where(np.isinf(values), 0.0, values)  # these pairs have no numbers
    labels = pivot.units(draw.unit)
    rows: list[dict[str, Any]] = [{} for _ in pairs]
    everywhere = numbered(labels)
    apart = np.where(used, values[:, first] - values[:, second], 0.0)
    flips, _ = per_unit(apart, everywhere, unit_count(everywhere))
    tests = sign_flips(flips, permutations, draw.seed)
    # Pairs over the same prompts are resampled together.
    patterns, pattern_of = np.unique(np.packbits(used, axis=0), axis=1, return_inverse=True)
    for pattern in range(patterns.shape[1]):
        members = np.flatnonzero(pattern_of.ravel() == pattern)
        kept = used[:, members[0]]
        a, b = values[kept][:, first[members]], values[kept][:, second[members]]
        units = numbered(labels[kept])
        notes: list[str | None] = [None] * len(members)
        if ends is None:
            mean_a, mean_b, difference = means_of(a), means_of(b), means_of(a - b)
            low, high, kinds = difference_intervals(metric, a, b, units, draw)
            if unit_count(units) == 1:
                notes = [f"one {draw.unit} has no interval" if k == "none" else None for k in kinds]
        else:
            base = values[kept][:, [ends[0]]]
            gap = gap_of(values[kept][:, ends], units, draw)
            sure = math.nan if gap.note is not None else gap.mean
            mean_a, mean_b, difference = (means_of(x) / sure for x in (a - base, b - base, a - b))
            low, high, notes = ratio_intervals(a - b, gap, difference, units, draw)
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
                "units": unit_count(units),
            }
    for row, why in zip(rows, infinite, strict=True):
        if why is not None:
            numbers = ("mean_a", "mean_b", "difference", "low", "high", "p_value")
            row |= dict.fromkeys(numbers, math.nan)
            row |= {"interval": "none", "p_method": "none", "note": why}
    return rows


def _infinite(
    metric: str,
    pivot: "Pivot",
    values: Float[np.ndarray, "prompt graft"],
    used: Bool[np.ndarray, "prompt pair"],
    pairs: Sequence[tuple[int, int]],
    ends: tuple[int, int] | None,
) -> list[str | None]:
    """For each pair, why it has no means: a value that is infinite."""
    if not np.isinf(values).any():
        return [None] * len(pairs)
    found = []
    for pair, kept in zip(pairs, used.T, strict=True):
        columns = [*pair, *(ends or ())]
        notes = endless(metric, values[kept][:, columns], pivot.prompts[kept])
        found.append(next(filter(None, notes), None))
    return found
