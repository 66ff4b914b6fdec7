"""How well scores tell apart what was planted from what was not."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float

Key = TypeVar("Key", bound=Hashable)


def auroc(scores: Mapping[Key, float], planted: "frozenset[Key]") -> float:
    """The probability that a planted place scores higher than another, ties counting half.

    The area under the curve of true against false positives (Hanley & McNeil 1982, *Radiology* 143,
    29-36). 1: all planted ones first; 0.5: as good as chance; 0: all of them last. A score of NaN
    is below all numbers.

    Raises:
        ValueError: no scores of planted places, or none of others.
    """
    values, true = _sorted(scores, planted)
    mine, others = values[true], values[~true]
    above = (mine[:, None] > others).sum() + 0.5 * (mine[:, None] == others).sum()
    return float(above / (len(mine) * len(others)))


def average_precision(scores: Mapping[Key, float], planted: "frozenset[Key]") -> float:
    """The mean precision at each planted place, going down the scores; ties are taken together.

    Its expectation for random scores is about the share of planted places. A score of NaN is below
    all numbers.

    Raises:
        ValueError: no scores of planted places, or none of others.
    """
    values, true = _sorted(scores, planted)
    total = 0.0
    for level in np.unique(values[true]):
        taken = values >= level
        total += true[taken].mean() * (true & (values == level)).sum()
    return float(total / true.sum())


def _sorted(
    scores: Mapping[Key, float], planted: "frozenset[Key]"
) -> tuple[Float[np.ndarray, " place"], Bool[np.ndarray, " place"]]:
    true = np.array([key in planted for key in scores], dtype=bool)
    if missing := planted - scores.keys():
        raise ValueError(
            f"{len(missing)} planted places have no score, such as {min(map(str, missing))}."
        )
    if true.all() or not true.any():
        raise ValueError(
            f"{int(true.sum())} of {len(true)} places are planted: give scores of some that are "
            "and of some that are not."
        )
    values = np.array([float(score) for score in scores.values()])
    return np.where(np.isnan(values), -np.inf, values), true
