"""Intervals of means, of shares and of differences between two grafts."""

import math
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from graftlens.metrics import known
from graftlens.stats.resampling import Draw, check_level, mean_of, per_unit, percentiles, unit_count
from graftlens.stats.table import depth_of

# With fewer than this many successes or failures the bootstrap of a proportion is too narrow.
FEW = 5


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927): honest at 0 and at n of n."""
    check_level(level)
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    return score_interval(successes / n, float(n), level)


def score_interval(share: float, n: float, level: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not leave 1e-18 where the formula gives exactly 0 or 1.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def mean_intervals(
    metric: str,
    values: Float[np.ndarray, "prompt graft"],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    low, high = (np.full(values.shape[1], np.nan) for _ in range(2))
    if len(values) == 0 or np.isnan(values).any():
        return low, high
    few = np.zeros(values.shape[1], dtype=bool)
    if is_share(metric, values):
        sums, sizes = per_unit(values, units, unit_count(units))
        few = few_units(sums, sizes)
        for column in np.flatnonzero(few):
            share = mean_of(values[:, column])
            low[column], high[column] = score_interval(
                share, effective_units(sizes[None]), draw.level
            )
    if unit_count(units) > 1:
        rest = np.flatnonzero(~few)
        for batch in draw.batches(len(rest)):
            draws = draw.means(values[:, rest[batch]], units)
            low[rest[batch]], high[rest[batch]] = percentiles(draws, draw.level)
    return low, high


def difference_intervals(
    metric: str,
    a: Float[np.ndarray, "prompt pair"],
    b: Float[np.ndarray, "prompt pair"],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[
    Float[np.ndarray, " pair"],
    Float[np.ndarray, " pair"],
    list[Literal["bootstrap", "newcombe", "none"]],
]:
    count = unit_count(units)
    low, high = (np.full(a.shape[1], np.nan) for _ in range(2))
    kinds: list[Literal["bootstrap", "newcombe", "none"]] = ["none"] * a.shape[1]
    if count == 0:
        return low, high, kinds
    few = np.zeros(a.shape[1], dtype=bool)
    if is_share(metric, a, b):
        # In how many units do all prompts have one and the same difference?
        sizes = np.bincount(units)
        same = [
            (per_unit((a - b == value).astype(float), units, count)[0] == sizes[:, None]).sum(0)
            for value in (-1, 0, 1)
        ]
        few = count - np.max(same, axis=0) < FEW
        scale = effective_units(sizes[None].astype(float)) / len(units)
        for column in np.flatnonzero(few):
            pairs = np.stack((a[:, column], b[:, column]), axis=1).astype(bool)
            low[column], high[column] = _newcombe(pairs, draw.level, scale)
            kinds[column] = "newcombe"
    if count > 1:
        rest = np.flatnonzero(~few)
        for batch in draw.batches(len(rest)):
            draws = draw.means((a - b)[:, rest[batch]], units)
            low[rest[batch]], high[rest[batch]] = percentiles(draws, draw.level)
        for column in rest:
            kinds[column] = "bootstrap"
    return low, high, kinds


def is_share(metric: str, *values: Float[np.ndarray, "prompt column"]) -> bool:
    """Whether a mean is the share of prompts for which something is so: a `top{k}`, or a measure of
    the user's own that is 0 or 1 everywhere."""
    if known(metric) is not None:
        return depth_of(metric) is not None
    return all(np.isin(some, (0.0, 1.0)).all() for some in values)


def few_units(
    sums: Float[np.ndarray, "unit graft"], sizes: Float[np.ndarray, " unit"]
) -> Bool[np.ndarray, " graft"]:
    """Which proportions have so few units with a success, or a failure, that resampling misleads"""
    hits, misses = (sums > 0).sum(axis=0), (sums < sizes[:, None]).sum(axis=0)
    return np.minimum(hits, misses) < FEW


def effective_units(sizes: Float[np.ndarray, "level unit"]) -> float:
    """As many independent prompts as these units are worth if a unit's prompts always agree."""
    weights = (sizes / sizes.sum(axis=1, keepdims=True)).sum(axis=0)
    # Without the rounding, 40 units of one prompt would be 40.00000000000001.
    return round(float(weights.sum() ** 2 / (weights**2).sum()), 9)


def _newcombe(
    pairs: Bool[np.ndarray, "prompt 2"], level: float, scale: float = 1.0
) -> tuple[float, float]:
    """Newcombe's interval, as if each prompt were `scale` prompts."""
    n = len(pairs)
    a, b = (int(column.sum()) for column in pairs.T)
    both = int(pairs.all(axis=1).sum())
    share_a, share_b = a / n, b / n
    (low_a, high_a), (low_b, high_b) = (
        score_interval(share, n * scale, level) for share in (share_a, share_b)
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


def notes_of_flat(
    low: Float[np.ndarray, " graft"],
    high: Float[np.ndarray, " graft"],
    middle: Float[np.ndarray, " graft"],
    why: str = "all resamples agree: the prompts vary too little for an interval",
) -> list[str | None]:
    """Replace, in place, intervals without width by NaN, and say why."""
    flat = high - low <= 1e-12 * np.maximum(1.0, np.abs(middle))
    low[flat] = high[flat] = np.nan
    return [why if none else None for none in flat]
