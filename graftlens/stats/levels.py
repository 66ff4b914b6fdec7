"""How much a graft's value depends on a choice that should not matter."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from graftlens.metrics import known
from graftlens.references import named_in
from graftlens.stats.intervals import effective_units, few_units, notes_of_flat, score_interval
from graftlens.stats.recovery import gap_of, ratios_of
from graftlens.stats.resampling import (
    Draw,
    cautious,
    mean_of,
    means_of,
    numbered,
    per_unit,
    resampled_means,
    unit_count,
)
from graftlens.stats.table import (
    Pivot,
    check_by,
    check_metrics,
    check_units,
    checked_table,
    choose_grafts,
    column_of,
    depth_of,
    end_places,
    endless,
    graft_facts,
    groups_of,
    with_notes,
)


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
    - `mean`, `low`, `high`: the mean over levels, with equal weight, and its interval; `sd`
      (with divisor levels − 1), `min`, `max`: the spread between levels, which includes the chance
      error of each level's own value; `levels`: how many levels have a value;
    - `tau`, `tau_min`: the mean and the least Kendall's τ-b (Kendall 1945) between the orders of
      the grafts in two levels, over the `tau_pairs` pairs of levels in which it is defined. 1: the
      same order everywhere. `base` and `full` are left out, because they would always agree.
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
    about = graft_facts(table)
    base, full = named_in(table, base, full)
    measured = recovery if metric == "recovery" else metric
    check_metrics(table, (measured,), also="recovery")
    draw = Draw("prompt" if unit == by else unit, level, resamples, seed)
    check_by(by)
    table = checked_table(table, (by, *draw.columns, column_of(measured)), within=(by,))
    if table[by].isna().any():
        raise ValueError(
            f"column {by!r} has no value in {int(table[by].isna().sum())} rows; "
            "give every row its level, or leave these rows out"
        )
    chosen = choose_grafts(table, grafts)
    ends = None
    if metric == "recovery":
        ends = end_places(chosen, base, full, "another metric than 'recovery'")
    table = table[table["graft"].isin(chosen)]
    names = [str(name) for name in pd.unique(table[by])]
    shares = np.full((len(names), len(chosen)), np.nan)
    parts, labels, notes, not_run = [], [], [], 0
    for name, share, (_, group) in zip(names, shares, groups_of(table, (by,)), strict=True):
        check_units(group, draw.unit)
        pivot = Pivot.of(group, chosen)
        used = pivot.ran_everywhere
        not_run += int((~used).sum())
        values = pivot.values(measured, np.broadcast_to(used[:, None], pivot.ran.shape))[used]
        label = pivot.units(draw.unit)[used]
        infinite = [note for note in endless(measured, values, pivot.prompts[used]) if note]
        if infinite:
            why: str | None = infinite[0]
        elif ends is not None:
            gap = gap_of(values[:, ends], numbered(label), draw)
            why = gap.note
            share[:] = ratios_of(values, ends, gap)
        else:
            why = "the metric was not measured" if np.isnan(values).any() else None
            why = "no prompt ran under every graft" if len(values) == 0 else why
            share[:] = means_of(values)
        if why is None:
            parts.append(values)
            labels.append(label)
        else:
            notes.append(f"{by}={name} is not counted: {why}")
    # A level has a value for every graft or for none.
    held = shares[~np.isnan(shares).any(axis=1)]
    units = numbered(np.concatenate(labels)) if labels else np.zeros(0, dtype=np.int64)
    if unit == by:
        about_metric = known(metric)
        bounded = about_metric is not None and about_metric.share
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
        row |= {"mean": mean_of(here), "low": low[column], "high": high[column]}
        row |= {"sd": float(here.std(ddof=1)) if len(here) > 1 else math.nan}
        row |= {"min": min(here, default=math.nan), "max": max(here, default=math.nan)}
        row |= {"levels": len(here), "tau": mean_of(taus)}
        row |= {"tau_min": min(taus, default=math.nan), "tau_pairs": len(taus)}
        row |= {"n": len(units), "not_run": not_run}
        row |= {"units": len(held) if unit == by else unit_count(units)}
        said = no_interval[column]
        row |= {"note": "; ".join(notes if said is None else [*notes, said]) or None}
        if ends is not None:
            row |= {"recovery_of": recovery, "base_run": base, "full_run": full}
        rows.append(row | {"unit": unit, "level": level, "resamples": resamples, "seed": seed})
    return with_notes(pd.DataFrame(rows), "note")


def _within_levels(
    metric: str,
    parts: Sequence[Float[np.ndarray, "_ graft"]],
    units: Int[np.ndarray, " prompt"],
    ends: tuple[int, int] | None,
    draw: Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"], list[str | None]]:
    """Bootstrap intervals of the mean over levels of the mean (of the recovery, with `ends`).

    `parts` are the levels' values; `units` numbers the units of all their prompts, level by level.
    """
    count, columns = unit_count(units), parts[0].shape[1]
    low, high = (np.full(columns, np.nan) for _ in range(2))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    sums, sizes = np.empty((len(parts), count, columns)), np.empty((len(parts), count))
    for i, part in enumerate(parts):
        sums[i], sizes[i] = per_unit(part, units[starts[i] : starts[i + 1]], count)
    # Units of one level each are drawn within their level, so that no level is ever empty.
    nested = bool(((sizes > 0).sum(axis=0) == 1).all())
    strata = (sizes > 0).argmax(axis=0) if nested else np.zeros(count, dtype=np.int64)
    few = np.zeros(columns, dtype=bool)
    if ends is None and depth_of(metric) is not None:
        few = few_units(sums.sum(axis=0), sizes.sum(axis=0))
        for column in np.flatnonzero(few):
            share = float(np.mean([mean_of(part[:, column]) for part in parts]))
            low[column], high[column] = score_interval(share, effective_units(sizes), draw.level)
    if np.bincount(strata).min() < 2:
        why = f"one {draw.unit} has no interval"
        if nested and len(parts) > 1:
            why = f"a level with one {draw.unit} has no interval"
        return low, high, [None if score else why for score in few]
    rest = np.flatnonzero(~few)

    def redraw(which: Int[np.ndarray, " graft"]) -> Float[np.ndarray, "level resample graft"]:
        return resampled_means(sums[:, :, which], sizes, strata, draw.resamples, draw.seed)

    if ends is not None:
        base, full = np.moveaxis(redraw(np.array(ends)), 2, 0)
        gaps = full - base
        signs = np.sign([part[:, ends[1]].mean() - part[:, ends[0]].mean() for part in parts])
        usable = (gaps * signs[:, None] > 0).all(axis=0)
    for batch in draw.batches(len(rest), sheets=len(parts)):
        draws = redraw(rest[batch])
        if ends is not None:
            draws -= base[:, :, None]
            draws /= np.where(usable, gaps, 1.0)[:, :, None]
            pooled = draws.mean(axis=0)
        else:
            pooled = draws.mean(axis=0)
            usable = ~np.isnan(pooled[:, 0])
        low[rest[batch]], high[rest[batch]] = cautious(pooled, usable, draw.level)
    if ends is None:
        return low, high, [None] * columns
    return low, high, notes_of_flat(low, high, np.zeros(columns))


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
    return low, high, notes_of_flat(low, high, middle, why)


def _agreements(held: Float[np.ndarray, "level graft"]) -> Float[np.ndarray, " pair"]:
    """Kendall's τ-b of each pair of levels in which not all grafts are equal."""
    # A second to import, and nothing else here needs it.
    from scipy.stats import kendalltau

    if held.shape[1] < 2:
        return np.zeros(0)
    # Ties that rounding broke are ties.
    orders = [order for order in np.round(held, 12) if np.ptp(order) > 0]
    return np.array([float(kendalltau(a, b).statistic) for a, b in combinations(orders, 2)])
