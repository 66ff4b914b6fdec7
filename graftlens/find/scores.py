"""Attributions of places as an array, their order, and how stable that order is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from graftlens.find.places import SCORES, Place, places_of, ranking

_SITE = ["component", "layer", "position"]


def of_sites(table: pd.DataFrame) -> pd.DataFrame:
    """An attribution's table with its units added up to their sites: one row for each site and
    position of each prompt, whose `unit` is NA."""
    if table["unit"].isna().all():
        return table
    summed = [name for name in SCORES if name in table]
    kept = [c for c in table if c not in ("prompt", *_SITE, "unit", *summed)]
    groups = table.groupby(["prompt", *_SITE], sort=False, dropna=False, observed=True)
    found = groups.agg(dict.fromkeys(summed, "sum") | dict.fromkeys(kept, "first"))
    found = found.reset_index()
    found.insert(4, "unit", pd.Series(pd.NA, index=found.index, dtype=object))
    return found


def unit_order(table: pd.DataFrame, sites: Collection[Place]) -> tuple[Place, ...]:
    """The heads or neurons inside some sites in the order of their scores; a site that has none is
    among them itself.

    What belongs to no unit is left out: it is grafted with all units of its site, or not at all.
    """
    inside = pd.DataFrame(
        [(str(p.component), p.layer, p.position) for p in sites], columns=_SITE
    ).astype({"layer": "Int64"})
    inside["position"] = inside["position"].astype(table["position"].dtype)
    rows = table.astype({"component": object}).merge(inside, on=_SITE, how="inner")
    alone = rows["unit"].astype(object).map(lambda unit: not isinstance(unit, str))
    return places_of(ranking(rows[alone.to_numpy(bool)]))


@dataclass(frozen=True, eq=False)
class Scores:
    """What each site contributes in each prompt, by integrated gradients.

    Where the measure falls from the base to the full run, signs are turned, so that what brings it
    there comes first.

    Attributes:
        places: sites at positions, in the order of the table.
        prompts: the prompts' numbers.
        values: contributions in units of the measure.
    """

    places: tuple[Place, ...]
    prompts: tuple[int, ...]
    values: Float[np.ndarray, "place prompt"]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Scores":
        """The scores in a table of whole sites, as `of_sites` gives it."""
        cells = table.assign(_place=_codes(table))
        values = cells.pivot(index="_place", columns="prompt", values="ig").fillna(0.0)
        ends = table.drop_duplicates("prompt")
        falls = (ends["value_full"] - ends["value_base"]).mean() < 0
        numbers = tuple(int(n) for n in values.columns)
        array = values.to_numpy(dtype=float)
        return cls(places_of(table), numbers, -array if falls else array)

    def order(self, weights: Float[np.ndarray, " prompt"] | None = None) -> tuple[Place, ...]:
        """The places, the largest mean first; equal ones in the table's order.

        `weights` says how often each prompt counts.
        """
        weights = np.ones(len(self.prompts)) if weights is None else weights
        means = self.values @ weights / weights.sum()
        return tuple(self.places[i] for i in np.argsort(-means, kind="stable"))


def _codes(table: pd.DataFrame) -> np.ndarray:
    """The number of each row's place, from 0 in the order in which places come up."""
    return table.groupby(_SITE, sort=False, dropna=False, observed=True).ngroup().to_numpy()


@dataclass(frozen=True, eq=False)
class Stability:
    """How the order's beginning changes with the facts that it is made from.

    Attributes:
        jaccard: per resample, |both| / |either| of the found sites and of as many sites of the
            order that the resampled facts give.
        share: place -> in how many of the resamples it is among those, as a share.
    """

    jaccard: tuple[float, ...]
    share: dict[Place, float]


def stability(
    scores: Scores,
    groups: Sequence[str],
    sites: Collection[Place],
    *,
    resamples: int,
    seed: int,
) -> Stability:
    """Resample the facts with replacement and cut each order at the size of the found set.

    Scores per prompt are all that is needed, so that this runs no model.

    Args:
        scores: of the search side.
        groups: each prompt's fact, in the order of `scores.prompts`.
        sites: the sites of the found set.
        resamples: how often facts are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 1])
    kinds, of = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    there, counts = set(sites), dict.fromkeys(scores.places, 0)
    jaccard = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(0, len(kinds), len(kinds)), minlength=len(kinds))
        drawn = set(scores.order(times[of].astype(float))[: len(there)])
        jaccard.append(len(drawn & there) / len(drawn | there))
        for place in drawn:
            counts[place] += 1
    return Stability(tuple(jaccard), {p: n / max(1, resamples) for p, n in counts.items()})
