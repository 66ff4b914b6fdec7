"""Games: what players bring to the coalitions that they join, as weighted sums of their values.

A coalition of n players is a number whose bit i says whether player i is in it. All values here are
linear in those of the coalitions, so that intervals over prompts are those of means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

#: Most players whose coalitions are all run: 4,096 of them.
MOST_EXACT = 12

#: Most players at all: a coalition is a number of 64 bits.
MOST = 62


def pairs_of(n: int) -> list[tuple[int, int]]:
    """All pairs of n players, in the order in which they are numbered."""
    return list(combinations(range(n), 2))


def members(masks: Sequence[int] | Int[np.ndarray, " coalition"], n: int) -> Int[np.ndarray, "_ _"]:
    """[coalition, player]: 1 where the player is in."""
    return (np.asarray(masks, dtype=np.int64)[:, None] >> np.arange(n)) & 1


def dividends(
    values: Float[np.ndarray, "prompt coalition"],
) -> Float[np.ndarray, "prompt coalition"]:
    """Harsanyi's dividends of all 2^n coalitions: m(S) = Σ over T ⊆ S of (−1)^(|S| − |T|) v(T)."""
    found = np.array(values, dtype=float, order="C")
    for player in range(found.shape[1].bit_length() - 1):
        halves = found.reshape(len(found), -1, 2, 1 << player)
        halves[:, :, 1] -= halves[:, :, 0]
    return found


@dataclass(frozen=True)
class Weights:
    """What each dividend counts in each value of a player or pair: [coalition, player or pair].

    Attributes:
        shapley: m(S) / |S| for each member (Shapley 1953).
        banzhaf: m(S) / 2^(|S| − 1) (Banzhaf 1965).
        interaction: Shapley's interaction index of a pair, m(S) / (|S| − 1).
        banzhaf_interaction: Banzhaf's, m(S) / 2^(|S| − 2).
        joint: what the pair brings as one player, m(S) / |S| with the pair counted as one.
    """

    shapley: Float[np.ndarray, "coalition player"]
    banzhaf: Float[np.ndarray, "coalition player"]
    interaction: Float[np.ndarray, "coalition pair"]
    banzhaf_interaction: Float[np.ndarray, "coalition pair"]
    joint: Float[np.ndarray, "coalition pair"]

    @classmethod
    def of(cls, n: int) -> "Weights":
        """For n players."""
        inside = members(range(1 << n), n).astype(float)
        size = inside.sum(1, keepdims=True)
        first, second = (inside[:, [pair[k] for pair in pairs_of(n)]] for k in (0, 1))
        both, either = first * second, np.maximum(first, second)
        return cls(
            shapley=inside / np.maximum(size, 1),
            banzhaf=inside * 2.0 ** (1 - size),
            interaction=both / np.maximum(size - 1, 1),
            banzhaf_interaction=both * 2.0 ** (2 - size),
            joint=either / np.maximum(size - both, 1),
        )


@dataclass(frozen=True)
class Orders:
    """Orders in which players join, drawn at random, and the coalitions that they need.

    Two neighbours of an order are a pair before which a random coalition has joined, drawn as
    Shapley's interaction index weights it.

    Attributes:
        n: how many players there are.
        orders: each a permutation of the players.
    """

    n: int
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def drawn(cls, n: int, count: int, seed: int) -> "Orders":
        """`count` orders of n players."""
        rng = np.random.default_rng(seed)
        return cls(n, tuple(tuple(rng.permutation(n).tolist()) for _ in range(count)))

    @cached_property
    def coalitions(self) -> tuple[int, ...]:
        """The coalitions whose values are needed: those of up to two players and of all but up to
        two, then those of the orders."""
        everybody = (1 << self.n) - 1
        pairs = [1 << a | 1 << b for a, b in pairs_of(self.n)]
        few = [0, *(1 << i for i in range(self.n)), *pairs]
        needed = dict.fromkeys([*few, *(everybody ^ mask for mask in few)])
        for order in self.orders:
            before = 0
            for place, player in enumerate(order):
                if place + 1 < self.n:
                    needed[before | 1 << order[place + 1]] = None
                before |= 1 << player
                needed[before] = None
        return tuple(needed)

    @cached_property
    def _column(self) -> dict[int, int]:
        return {mask: i for i, mask in enumerate(self.coalitions)}

    def marginals(
        self, values: Float[np.ndarray, "prompt coalition"], player: int
    ) -> Float[np.ndarray, "prompt order"]:
        """What a player adds when it joins, in each order; values in the order of `coalitions`."""
        column = self._column
        before, after = [], []
        for order in self.orders:
            joined = sum(1 << p for p in order[: order.index(player)])
            before.append(column[joined])
            after.append(column[joined | 1 << player])
        return values[:, after] - values[:, before]

    def meetings(
        self, values: Float[np.ndarray, "prompt coalition"], a: int, b: int
    ) -> tuple[Float[np.ndarray, "prompt meeting"], Float[np.ndarray, "prompt meeting"]]:
        """Where a and b are neighbours: how far they interact, and what both add."""
        column = self._column
        found: list[tuple[int, int, int, int]] = []
        for order in self.orders:
            place = min(order.index(a), order.index(b))
            if {*order[place : place + 2]} == {a, b}:
                joined = sum(1 << p for p in order[:place])
                ends = (joined, joined | 1 << a, joined | 1 << b, joined | 1 << a | 1 << b)
                found.append((column[ends[0]], column[ends[1]], column[ends[2]], column[ends[3]]))
        none, one, other, both = (values[:, [places[k] for places in found]] for k in range(4))
        return both - one - other + none, both - none
