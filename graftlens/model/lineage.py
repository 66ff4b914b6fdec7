"""Which nodes of a token tree come before which, and which rows each of its layers has."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from graftlens.model.tree import Readers, TreeLayer


def renumbered(
    a: Int[np.ndarray, "node _"], b: Int[np.ndarray, "node graft"]
) -> Int[np.ndarray, "node graft"]:
    """Number the pairs (a, b) from 0 so that equal pairs, and only those, have equal numbers.

    The order is that of a, then of b, so that rows which share much stay neighbours.
    """
    pairs = a * (int(b.max()) + 1) + b
    _, numbers = np.unique(pairs, return_inverse=True)
    return numbers.reshape(pairs.shape)


class Lineage:
    """Which nodes come before which."""

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = parents
        self.depths = np.zeros(len(parents), dtype=np.int64)
        self.before = np.eye(len(parents), dtype=bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.depths[node] = self.depths[parent] + 1
                self.before[node] |= self.before[parent]

    def effective(self, window: int | None) -> int | None:
        """A window that reaches the first position from everywhere is none."""
        return None if window is None or window > self.depths.max() else window

    def within(self, window: int | None) -> Bool[np.ndarray, "node node"]:
        """Which nodes each node reads: those before it and itself, as far back as the window."""
        if window is None or self.effective(window) is None:
            return self.before
        return self.before & (self.depths[:, None] - self.depths[None, :] < window)

    def accumulated(
        self, own: Int[np.ndarray, "node graft"], window: int | None
    ) -> Int[np.ndarray, "node graft"]:
        """Number what each node reads: its own key row with those before it."""
        if window is None:
            out = np.empty_like(own)
            high = 0
            for node, parent in enumerate(self.parents):
                before = 0 if parent < 0 else out[parent]
                pairs = (before * (int(own[node].max()) + 1) + own[node])[None]
                out[node] = np.unique(pairs, return_inverse=True)[1].reshape(-1) + high
                high = int(out[node].max()) + 1
            return out
        # Stretches of 1, 2, 4, … nodes are numbered from two of half the length; two that overlap
        # make the window.
        stretch, length = own, 1
        while 2 * length <= window:
            stretch, length = self._joined(stretch, length), 2 * length
        return stretch if length == window else self._joined(stretch, window - length)

    def _joined(
        self, stretch: Int[np.ndarray, "node graft"], back: int
    ) -> Int[np.ndarray, "node graft"]:
        """Number each node's stretch together with that of the node `back` steps before it."""
        origin = np.arange(len(self.parents))
        parents = np.array(self.parents)
        for _ in range(back):
            origin = np.where(origin < 0, -1, parents[origin])
        earlier = np.where(origin[:, None] < 0, 0, stretch[origin] + 1)
        return renumbered(stretch, earlier)


def wanted_nodes(
    lineage: Lineage,
    windows: Sequence[int | None],
    scored: Int[np.ndarray, " scored"],
    n_nodes: int,
) -> list[Bool[np.ndarray, " node"]]:
    """Per layer, the nodes whose residual rows must enter it; last, those that must come out."""
    out = np.zeros(n_nodes, dtype=bool)
    out[scored] = True
    wanted = [out]
    for window in reversed(windows):
        wanted.append(np.asarray(lineage.within(window)[wanted[-1]].any(axis=0)))
    return wanted[::-1]


def layer_rows(
    entering: Int[np.ndarray, "node graft"],
    own: Int[np.ndarray, "node graft"],
    leaving: Int[np.ndarray, "node graft"],
    key_choices: Int[np.ndarray, "node graft"],
    query_choices: Int[np.ndarray, "node graft"],
    read: Bool[np.ndarray, " node"],
    written: Bool[np.ndarray, " node"],
    within: Bool[np.ndarray, "node node"],
    goes_on: bool,
) -> TreeLayer:
    """The rows of one layer from the numbers of what enters it, is read in it and leaves it."""
    there = np.unique(entering[read])
    key_at, query_at = np.flatnonzero(read), np.flatnonzero(written)

    def distinct(numbers: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct numbers at some nodes, with the node and the first graft of each."""
        ids, first = np.unique(numbers[at], return_index=True)
        place, graft = np.unravel_index(first, (len(at), numbers.shape[1]))
        return ids, at[place], graft

    key_ids, key_nodes, key_grafts = distinct(own, key_at)
    _, query_nodes, query_grafts = distinct(leaving, query_at)

    # The rows that one graft was the first to need read that graft's own list of key rows.
    readers, order = np.unique(query_grafts, return_inverse=True)
    by_reader = np.argsort(order, kind="stable")
    counts = np.bincount(order)
    starts = np.cumsum(counts) - counts
    slot = np.empty_like(order)
    slot[by_reader] = np.arange(len(order)) - np.repeat(starts, counts)
    lists = np.searchsorted(key_ids, own[key_at][:, readers].T)
    sizes = 2 ** np.ceil(np.log2(counts)).astype(np.int64)
    groups = []
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        place = np.full(len(readers), -1)
        place[members] = np.arange(len(members))
        rows = np.flatnonzero(place[order] >= 0)
        queries = np.full((len(members), int(size)), -1)
        queries[place[order[rows]], slot[rows]] = rows
        seen = np.zeros((len(members), int(size), len(key_at)), dtype=bool)
        seen[place[order[rows]], slot[rows]] = within[query_nodes[rows]][:, key_at]
        groups.append(Readers(lists[members], queries, seen))
    of_graft = None
    if goes_on:
        of_graft = np.zeros(own.T.shape, dtype=np.int64)
        of_graft[:, key_at] = np.searchsorted(key_ids, own[key_at]).T
    return TreeLayer(
        entering=len(there),
        queries=np.searchsorted(there, entering[query_nodes, query_grafts]),
        query_nodes=query_nodes,
        query_choices=query_choices[query_nodes, query_grafts],
        keys=np.searchsorted(there, entering[key_nodes, key_grafts]),
        key_nodes=key_nodes,
        key_choices=key_choices[key_nodes, key_grafts],
        readers=tuple(groups),
        of_graft=of_graft,
    )
