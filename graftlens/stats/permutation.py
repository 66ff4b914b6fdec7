"""p-values: sign flips, exact where they can be counted, and Holm's correction."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from graftlens.stats.resampling import CHUNK

EXACT_LIMIT = 16


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


def sign_flips(
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
                batch = slice(left, left + width)
                sums = np.abs(signs @ pending[:, batch])
                hits[batch] += (sums >= observed[batch]).sum(axis=0)
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
