"""From an order of places to the smallest set that does it, by exact runs.

Nested sets of the order are judged at sizes in a geometric series, by bisection, and at sizes
between: a place by itself may do harm that others make good, so that a smaller set can be enough
where a larger one is not. Rounds of leaving out each member then drop what is not needed and add
what is, and are kept only if prompts that they were not chosen on agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from graftlens.find.judging import Judge, Judged
from graftlens.find.places import Place
from graftlens.find.splitting import Split

#: Most sizes that nested sets are judged at: first a series of at most SERIES.
EVALUATIONS, SERIES = 20, 10

#: Most places outside the set that a round tries.
CANDIDATES = 64


@dataclass(frozen=True)
class Nested:
    """The nested sets that were judged.

    Attributes:
        chosen: the smallest that reaches the goal; if none does, the one that comes nearest.
        judged: all, by size.
        apart: how many sizes below the chosen one could still reach it, as the evaluations ended.
    """

    chosen: Judged
    judged: tuple[Judged, ...]
    apart: int


def series(count: int, most: int = SERIES) -> list[int]:
    """At most `most` sizes from 1 to `count`, each at least about twice the one before."""
    steps = min(most, count.bit_length()) - 1
    if steps < 1:
        return [count]
    return sorted({round(count ** (i / steps)) for i in range(steps + 1)})


def nested(
    judge: Judge,
    order: Sequence[Place],
    numbers: Sequence[int],
    step: str,
    sizes: Sequence[int] = (),
) -> Nested:
    """The smallest of the sets that an order's beginnings make, by at most `EVALUATIONS` sizes, or
    by `sizes`.

    Args:
        judge: judges sets.
        order: the places, the most important first.
        numbers: the prompts to judge on.
        step: the name of the steps.
        sizes: those to begin with, in order; by default a series over all.
    """
    sizes = sizes or series(len(order))
    first = judge(f"{step}-series", numbers, [order[:size] for size in sizes])
    found = dict(zip(sizes, first, strict=True))
    high = next((size for size in sizes if found[size].reached), None)
    if high is None:
        best = max(sizes, key=lambda size: (found[size].margin, -size))
        return Nested(found[best], tuple(found[s] for s in sorted(found)), 0)
    low = max((size for size in sizes if size < high), default=0)
    while high - low > 1 and len(found) < EVALUATIONS:
        middle = (low + high) // 2
        (found[middle],) = judge(f"{step}-{middle}", numbers, [order[:middle]])
        low, high = (low, middle) if found[middle].reached else (middle, high)
    below = sorted({1, *(size for size in found if size <= high)})
    if more := between(below, EVALUATIONS - len(found)):
        also = judge(f"{step}-between", numbers, [order[:size] for size in more])
        found |= dict(zip(more, also, strict=True))
        high = min(size for size in found if found[size].reached)
        low = max((size for size in found if size < high), default=0)
    return Nested(found[high], tuple(found[s] for s in sorted(found)), high - low - 1)


def between(sizes: Sequence[int], count: int) -> list[int]:
    """At most `count` sizes between some, in the widest gaps by ratio."""
    made: list[int] = []
    while len(made) < count:
        gaps = [(a, b) for a, b in pairwise(sorted([*sizes, *made])) if b - a > 1]
        if not gaps:
            break
        low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
        made.append(round(math.sqrt(low * high)))
    return sorted(made)


@dataclass(frozen=True)
class Round:
    """One round of refinement: what it proposed and whether that was kept."""

    before: Judged
    proposed: Judged
    kept: bool


def refined(
    judge: Judge, start: Judged, order: Sequence[Place], split: Split, rounds: int
) -> tuple[Judged, list[Round]]:
    """Rounds of dropping and adding places by their exact contributions.

    A round leaves out each member in turn, and adds each of the places that come next in the order,
    by one sweep over the outer part of the search. The places in the order of what this changed
    make nested sets; those that reach the goal there are judged on the whole search side, and the
    smallest is kept that reaches it there too, and with which the inner part, of which the order
    knows nothing, agrees: the goal is reached there, or the set does not do worse than the one
    before. There are none where one of the two parts has nothing to recover.
    """
    done: list[Round] = []
    current = start
    if not start.parted:
        return start, done
    for number in range(1, rounds + 1):
        members = list(current.places)
        inside = set(members)
        others = [place for place in order if place not in inside]
        others = others[: min(CANDIDATES, max(8, len(members) // 4))]
        sets = [members, *([m for m in members if m != place] for place in members)]
        sets += [[*members, place] for place in others]
        # A single member cannot be left out: the empty set is the base.
        sets = [s for s in sets if s]
        step = f"round-{number}"
        judge.say(f"round {number}: each of {len(members)} members left out, {len(others)} added")
        whole, *each = judge(f"{step}-each", split.outer, sets)
        left = dict(zip(members, each, strict=False)) if len(members) > 1 else {}
        more = dict(zip(others, each[len(left) :], strict=True))
        gains = {place: whole.value - judged.value for place, judged in left.items()}
        gains |= {place: judged.value - whole.value for place, judged in more.items()}
        ordered = sorted(gains, key=lambda place: -gains[place])
        if len(members) == 1:
            ordered = [*members, *ordered]
        sizes = _near(len(members), len(ordered))
        tried = nested(judge, ordered, split.outer, f"{step}-sets", sizes)
        proposals = [p.places for p in tried.judged if p.reached] or [tried.chosen.places]
        if current.reached:
            proposals = [places for places in proposals if len(places) < len(members)]
        proposals = [places for places in proposals if set(places) != inside]
        if not proposals:
            break
        judged = judge(f"{step}-judged", split.search, proposals)
        kept = next((one for one in judged if _improves(one, current)), None)
        done.append(Round(current, kept or judged[0], kept is not None))
        if kept is None:
            break
        current = kept
    return current, done


def _improves(one: Judged, current: Judged) -> bool:
    """Whether a set does better on all prompts, and the inner part agrees."""
    smaller = len(one.places) < len(current.places)
    better = one.reached and (smaller or not current.reached)
    better |= not one.reached and not current.reached and one.margin > current.margin
    return better and one.inner >= min(0.0, current.inner)


def _near(size: int, most: int) -> list[int]:
    """Sizes around one, nearer ones closer together."""
    steps = [2**i for i in range(most.bit_length())]
    found = {size, *(size - s for s in steps), *(size + s for s in steps)}
    return sorted(s for s in found if 1 <= s <= most)


def down_to_units(
    judge: Judge, sites: Judged, order: Sequence[Place], split: Split
) -> tuple[Judged, Nested | None]:
    """The found sites cut down to their heads or neurons, in the order of the units' scores.

    Kept only if the inner part agrees, as for a round of refinement.

    Args:
        judge: judges sets.
        sites: the found set.
        order: the units of its sites, the most important first, and the sites that have none.
        split: the prompts.
    """
    if not any(place.unit is not None for place in order):
        return sites, None
    judge.say(f"down to units: {len(order)} of them in {len(sites.places)} sites")
    found = nested(judge, order, split.search, "units")
    chosen = found.chosen
    agreed = chosen.inner >= min(0.0, sites.inner)
    kept = agreed and (chosen.reached or chosen.margin >= sites.margin)
    return (chosen if kept else sites), found


def curve_of(judged: Sequence[Judged], total: int, part: str) -> pd.DataFrame:
    """A row for each judged set: `part`, `size`, `share` of all places, `enough`, `without`."""
    return pd.DataFrame(
        [
            {
                "part": part,
                "size": len(one.places),
                "share": len(one.places) / total,
                "enough": one.enough,
                "without": one.without,
            }
            for one in judged
        ]
    )
