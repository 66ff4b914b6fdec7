"""Recovery, a ratio of differences: 0 for the base run, 1 for the full run."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from graftlens.stats.intervals import notes_of_flat
from graftlens.stats.resampling import Draw, cautious, mean_of, means_of, percentiles, unit_count


@dataclass(frozen=True)
class _Gap:
    """full − base, against which recovery is measured, and why it cannot be if it cannot."""

    mean: float
    draws: Float[np.ndarray, " resample"]
    note: str | None


def gap_of(
    values: Float[np.ndarray, "prompt 2"], units: Int[np.ndarray, " prompt"], draw: Draw
) -> _Gap:
    """The gap between two columns, base and full."""
    draws = np.full(draw.resamples, np.nan)
    if len(values) == 0:
        return _Gap(math.nan, draws, "no prompt ran under every graft")
    if np.isnan(values).any():
        return _Gap(math.nan, draws, "the metric was not measured")
    # Mean of per-prompt differences, so that equal columns cancel exactly.
    gap = mean_of(values[:, 1] - values[:, 0])
    ends = draw.means(values, units)
    draws = ends[:, 1] - ends[:, 0]
    if gap == 0:
        return _Gap(gap, draws, "full and base are equal: there is nothing to recover")
    low, high = percentiles(draws[:, None], draw.level)
    if low[0] <= 0 <= high[0]:
        why = "the interval of full − base includes 0: nothing certain to recover"
        return _Gap(gap, draws, why)
    return _Gap(gap, draws, None)


def ratios_of(
    values: Float[np.ndarray, "prompt graft"], ends: tuple[int, int], gap: _Gap
) -> Float[np.ndarray, " graft"]:
    """The recovery of every column, NaN if there is no certain gap; `ends` = (base, full)."""
    base, full = ends
    if gap.note is not None:
        return np.full(values.shape[1], np.nan)
    ratios = means_of(values - values[:, [base]]) / gap.mean
    ratios[base], ratios[full] = 0.0, 1.0
    return ratios


def recoveries(
    values: Float[np.ndarray, "prompt graft"],
    ends: tuple[int, int],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[
    Float[np.ndarray, " graft"],
    Float[np.ndarray, " graft"],
    Float[np.ndarray, " graft"],
    list[str | None],
]:
    """Recovery of every column with its interval and a note; `ends` = columns (base, full)."""
    gap = gap_of(values[:, ends], units, draw)
    ratios = ratios_of(values, ends, gap)
    low, high, notes = ratio_intervals(values - values[:, [ends[0]]], gap, ratios, units, draw)
    for column in ends if gap.note is None else ():
        low[column] = high[column] = ratios[column]
        notes[column] = None
    return ratios, low, high, notes


def ratio_intervals(
    parts: Float[np.ndarray, "prompt graft"],
    gap: _Gap,
    ratios: Float[np.ndarray, " graft"],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"], list[str | None]]:
    """Intervals of mean(part) / gap for each column, and notes where there is none."""
    low, high = (np.full(len(ratios), np.nan) for _ in range(2))
    why = gap.note
    if why is None and unit_count(units) < 2:
        why = f"one {draw.unit} has no interval"
    if why is not None:
        return low, high, [why] * len(ratios)
    usable = gap.draws * np.sign(gap.mean) > 0
    below = np.where(usable, gap.draws, 1.0)[:, None]
    for batch in draw.batches(len(ratios)):
        draws = draw.means(parts[:, batch], units) / below
        low[batch], high[batch] = cautious(draws, usable, draw.level)
    return low, high, notes_of_flat(low, high, ratios)
