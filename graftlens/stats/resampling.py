"""The paired bootstrap over units: draws, and the percentiles of what was drawn."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from graftlens.components import brief

# Most numbers in one working array.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Draw:
    """How intervals are made: what is resampled, how often, from which seed, at which level."""

    unit: str
    level: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        check_level(self.level)
        check_count("resamples", self.resamples)
        check_seed(self.seed)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the table that the units need."""
        return () if self.unit == "prompt" else (self.unit,)

    def means(
        self, values: Float[np.ndarray, "prompt graft"], units: Int[np.ndarray, " prompt"]
    ) -> Float[np.ndarray, "resample graft"]:
        return bootstrap_means(values, resamples=self.resamples, seed=self.seed, units=units)

    def batches(self, columns: int, sheets: int = 1) -> Iterator[slice]:
        """Columns whose draws fit in memory together; one seed gives each batch the same draws."""
        size = max(1, 2 * CHUNK // (self.resamples * sheets))
        for start in range(0, columns, size):
            yield slice(start, min(start + size, columns))


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
    sums, sizes = per_unit(values, of, unit_count(of))
    strata = np.zeros(len(sizes), dtype=np.int64)
    return resampled_means(sums[None], sizes[None], strata, resamples, seed)[0]


def resampled_means(
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


def percentiles(
    draws: Float[np.ndarray, "resample graft"], level: float
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    # Order statistics, not interpolation: "below the low end" is then at most the nominal share of
    # resamples, which `cautious` relies on, and an accuracy's ends are accuracies.
    tail, last = (1 - level) / 2, len(draws) - 1
    low, high = math.floor(last * tail), math.ceil(last * (1 - tail))
    ordered = np.array(draws.T, order="C")
    ordered.partition((low, high), axis=1)
    return ordered[:, low], ordered[:, high]


def cautious(
    draws: Float[np.ndarray, "resample graft"], usable: Bool[np.ndarray, " resample"], level: float
) -> tuple[Float[np.ndarray, " graft"], Float[np.ndarray, " graft"]]:
    """Percentiles in which each resample that is not usable counts against both ends."""
    if usable.all():
        return percentiles(draws, level)
    low, _ = percentiles(np.where(usable[:, None], draws, -np.inf), level)
    _, high = percentiles(np.where(usable[:, None], draws, np.inf), level)
    return low, high


def per_unit(
    values: Float[np.ndarray, "prompt graft"], units: Int[np.ndarray, " prompt"], count: int
) -> tuple[Float[np.ndarray, "unit graft"], Float[np.ndarray, " unit"]]:
    """Sums of the values over each unit's prompts, and how many prompts it has."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, units, values)
    return sums, np.bincount(units, minlength=count).astype(float)


def unit_count(units: Int[np.ndarray, " prompt"]) -> int:
    return int(units.max()) + 1 if len(units) else 0


def numbered(labels: np.ndarray) -> Int[np.ndarray, " prompt"]:
    """Labels as numbers from 0, in order of first appearance."""
    return pd.factorize(labels)[0].astype(np.int64)


def mean_of(sample: Float[np.ndarray, " prompt"]) -> float:
    return float(sample.mean()) if len(sample) else math.nan


def means_of(values: Float[np.ndarray, "prompt graft"]) -> Float[np.ndarray, " graft"]:
    # Column by column: each sum is then rounded as if the column were alone.
    return np.array([mean_of(column) for column in values.T])


def check_level(level: Any) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise ValueError(
            f"level={brief(level)} is not in (0, 1); for a 95% interval give level=0.95"
        )


def check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise ValueError(f"{name}={brief(count)} is not a whole number; 10000 is usual")
    if count < 1:
        raise ValueError(f"{name}={count} is not positive; 10000 is usual")


def check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={brief(seed)}: write a whole number from 0.")
