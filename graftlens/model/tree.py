"""Token trees: many grafts of one prompt in one forward pass, each distinct row computed once.

A `TokenTree` says, for prompts of one structure, which rows each layer computes. It is made by the
sweep's planner and holds neither tensors nor tokens. `TreeBatch` places trees of several prompts
one after another, [1, rows], as index tensors for the forward.

A layer reads the residual rows that entered it in two ways. A *query row* is a row that continues
to the next layer; one residual row may continue as several, where grafts begin to differ. A *key
row* is a row whose keys and values are read. Rows that nothing reads do not exist: in the last
layer only scored positions have query rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from graftlens.components import COMPONENTS, Component, Side, components_where
from graftlens.graft import Graft
from graftlens.model.arch import Site
from graftlens.model.choice import Choice, Mixtures, agreed, grouped
from graftlens.model.mask import GraftMask

#: Components whose source is chosen per key row; some are chosen for both kinds of row.
KEY_SIDE = components_where(lambda row: row.side in (Side.KEY, Side.BOTH))
#: Components whose source is chosen per query row.
QUERY_SIDE = components_where(lambda row: row.side in (Side.QUERY, Side.BOTH))
INPUT_SIDE = components_where(lambda row: row.side is Side.INPUT)
OUTPUT_SIDE = components_where(lambda row: row.side is Side.OUTPUT)


#: Key rows that queries' lists may hold at a time; longer attention is computed in several pieces.
GATHERED = 1 << 16


class Choices:
    """A numbered list of ways to choose weights for some components; a row names one by number.

    A choice is an array of codes, of each component as many as it has atoms: groups of units that
    every rule treats alike.

    Attributes:
        components: of which weights are chosen.
        slots: component -> its slots in a choice.
        biases: component -> the entry of its bias, where rules cut it and its bias belongs to no
            unit. It comes right after the component's other entries.
        width: entries of a choice.
    """

    def __init__(
        self,
        components: Sequence[Component],
        mixtures: Mixtures,
        atom_of: Mapping[Component, Int[np.ndarray, " unit"]],
    ) -> None:
        """`mixtures` are what codes encode; `atom_of` has the atom of each unit of a component,
        where rules cut it."""
        self.components, self._mixtures = tuple(components), mixtures
        one = np.zeros(1, dtype=np.int64)
        self._atom_of = {c: atom_of.get(c, one) for c in components}
        self.slots: dict[Component, slice] = {}
        self.biases: dict[Component, int] = {}
        self.width = 0
        for component, atoms in self._atom_of.items():
            stop = self.width + int(atoms.max()) + 1
            self.slots[component] = slice(self.width, stop)
            if component in atom_of and COMPONENTS[component].axis == 1:
                self.biases[component] = stop
                stop += 1
            self.width = stop
        self._numbers: dict[bytes, int] = {}
        self._known: list[Int32[np.ndarray, " slot"]] = []

    def number(self, choice: Int32[np.ndarray, " slot"]) -> int:
        """The number of a choice; a new one is added."""
        key = choice.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._known)
            self._known.append(choice.copy())
        return self._numbers[key]

    def choice(self, number: int) -> Int32[np.ndarray, " slot"]:
        """The choice that a number names."""
        return self._known[number]

    def selections(self, numbers: Int[np.ndarray, " row"]) -> dict[Component, Choice]:
        """Per component, what each row runs; components that agree share a selection."""
        used, of_row = np.unique(numbers, return_inverse=True)
        table = np.stack([self._known[n] for n in used], axis=1)
        real = np.ones(len(numbers), dtype=bool)
        made: dict[bytes, Choice] = {}
        chosen: dict[Component, Choice] = {}
        for component, slots in self.slots.items():
            here, atom_of = table[slots], self._atom_of[component]
            bias = self.biases.get(component)
            whole = agreed(here) if bias is None else table[bias]
            key = here.tobytes() + whole.tobytes() + atom_of.tobytes()
            if key not in made:
                made[key] = grouped(here, whole, atom_of, real, self._mixtures, of_row)
            chosen[component] = made[key]
        return chosen


@dataclass(frozen=True, eq=False)
class Readers:
    """Query rows that read the same list of key rows, each reading those before it.

    Attributes:
        keys: key rows of each group, one column per node of the tree; any row where `seen` is
            False.
        queries: query rows of each group, -1 where a group has fewer.
        seen: which of its group's keys each query row reads.
    """

    keys: Int[np.ndarray, "group node"]
    queries: Int[np.ndarray, "group slot"]
    seen: Bool[np.ndarray, "group slot node"]


@dataclass(frozen=True, eq=False)
class TreeLayer:
    """The rows of one layer. `queries` and `keys` are numbers of residual rows that enter it.

    `of_graft` says, where the planner was asked for it, which key row each graft has at each node;
    any row where a later position would read none.
    """

    entering: int
    queries: Int[np.ndarray, " query"]
    query_nodes: Int[np.ndarray, " query"]
    query_choices: Int[np.ndarray, " query"]
    keys: Int[np.ndarray, " key"]
    key_nodes: Int[np.ndarray, " key"]
    key_choices: Int[np.ndarray, " key"]
    readers: tuple[Readers, ...]
    of_graft: Int[np.ndarray, "graft node"] | None = None


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Which rows each layer computes for some grafts of one prompt; holds no tokens.

    Attributes:
        parents: per node, the node before it, -1 at the first; a node is one token in one place.
        depths: per node, its position in the text.
        totals: per node, the length of the text whose rotary tables it uses; 0 if there is only one
            table.
        embed_nodes, embed_choices: per residual row that enters layer 0.
        layers: the rows of each layer; equal neighbours are one object.
        final_rows, final_choices, final_nodes: per row of logits, the residual row it is read from.
        scored: the nodes at which logits are needed.
        outputs: [scored node, graft] -> row of logits.
    """

    parents: tuple[int, ...]
    depths: Int[np.ndarray, " node"]
    totals: Int[np.ndarray, " node"]
    embed_nodes: Int[np.ndarray, " row"]
    embed_choices: Int[np.ndarray, " row"]
    layers: tuple[TreeLayer, ...]
    final_rows: Int[np.ndarray, " final"]
    final_choices: Int[np.ndarray, " final"]
    final_nodes: Int[np.ndarray, " final"]
    scored: tuple[int, ...]
    outputs: Int[np.ndarray, "scored graft"]

    @cached_property
    def layer_rows(self) -> int:
        """Query rows of all layers together: one row of a plain forward is one in every layer."""
        return sum(len(layer.queries) for layer in self.layers)

    @cached_property
    def gathered(self) -> int:
        """The most entries that the lists of key rows of one layer hold."""
        return max(sum(r.keys.size for r in layer.readers) for layer in self.layers)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the rows' descriptions; layers that are one object count once."""
        distinct = [*{id(layer): layer for layer in self.layers}.values()]
        rows = sum(5 * l.queries.nbytes + l.keys.nbytes for l in distinct)
        rows += sum(l.of_graft.nbytes for l in distinct if l.of_graft is not None)
        lists = (r for layer in distinct for r in layer.readers)
        return rows + sum(r.keys.nbytes + r.queries.nbytes + r.seen.nbytes for r in lists)

    @cached_property
    def peak(self) -> int:
        """The most rows that one layer holds."""
        return max(max(len(l.queries), len(l.keys), l.entering) for l in self.layers)


@dataclass(frozen=True)
class Sides:
    """The choices that the numbers in trees encode, and the sources they choose from."""

    sources: tuple[str, ...]
    input: Choices
    key: Choices
    query: Choices
    output: Choices


def pieces(readers: Sequence[Readers]) -> Iterator[list[Readers]]:
    """The same readers in pieces whose lists hold at most `GATHERED` key rows, or one list."""
    width = max(r.keys.shape[1] for r in readers)
    most = max(1, GATHERED // width)
    piece: list[Readers] = []
    room = most
    for r in readers:
        start = 0
        while start < len(r.keys):
            stop = min(start + room, len(r.keys))
            piece.append(Readers(r.keys[start:stop], r.queries[start:stop], r.seen[start:stop]))
            room -= stop - start
            start = stop
            if room == 0:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


class TreeGroup:
    """Readers of one size on the device; takes the place of a plain batch's `AttentionOrder`."""

    def __init__(self, parts: Sequence[Readers], device: torch.device) -> None:
        width = max(part.keys.shape[1] for part in parts)

        def wide(x: np.ndarray, fill: Any) -> np.ndarray:
            missing = width - x.shape[-1]
            pad = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
            return np.pad(x, pad, constant_values=fill) if missing else x

        queries = np.concatenate([part.queries for part in parts])
        seen = np.concatenate([wide(part.seen, False) for part in parts])
        filled = queries.reshape(-1) >= 0
        self.full = bool(filled.all())

        def there(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

        # An unused slot reads any key, so that no row of the softmax is empty.
        seen[:, :, 0] |= ~filled.reshape(queries.shape)
        self.keys = there(np.concatenate([wide(part.keys, 0) for part in parts]))
        self.queries = there(np.maximum(queries, 0))
        self.rows = there(queries.reshape(-1)[filled])
        self.filled = None if self.full else there(np.flatnonzero(filled))
        self.seen = there(seen[:, None])

    def __getitem__(self, window: int | None) -> Bool[Tensor, "group 1 slot node"]:
        """True where a query reads a key; the planner has taken the window into account."""
        return self.seen

    def kernel(self, window: int | None) -> tuple[Tensor, bool]:
        """(attn_mask, is_causal) for `scaled_dot_product_attention`."""
        return self.seen, False


def shared(
    of_queries: Mapping[Component, Choice], of_keys: Mapping[Component, Choice]
) -> dict[Component, Choice]:
    """The choices of rows that are query rows and key rows: those that agree become one object, so
    that the rows of a source are gathered once."""
    known = [rows for s in of_queries.values() if (rows := s.alike) is not None]

    def one(chosen: Choice) -> Choice:
        rows = chosen.alike
        if rows is None:
            return chosen
        return next((other for other in known if other.agrees(rows)), chosen)

    return {component: one(chosen) for component, chosen in of_keys.items()} | {**of_queries}


Attend = Callable[[Tensor, Tensor, Tensor, TreeGroup], Tensor]


class LayerRows:
    """One layer of a `TreeBatch`: its index tensors, and how the forward uses them."""

    def __init__(
        self,
        parts: Sequence[tuple[TreeLayer, int]],
        sides: Sides,
        places: Sequence[Int[np.ndarray, " _node"]],
        device: torch.device,
    ) -> None:
        """`parts` are layers of trees, each with how many prompts have it; `places` says which row
        of the rotary tables each of a tree's nodes uses.
        """

        def there(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(device, non_blocking=True)

        def laid_out(rows: str) -> Int[np.ndarray, " row"]:
            out, start = [], 0
            for layer, count in parts:
                own = np.asarray(getattr(layer, rows), dtype=np.int64)
                out.append((start + layer.entering * np.arange(count)[:, None] + own).reshape(-1))
                start += layer.entering * count
            return np.concatenate(out)

        def repeated(rows: str) -> np.ndarray:
            return np.concatenate([np.tile(getattr(layer, rows), count) for layer, count in parts])

        def positions(rows: str) -> Tensor:
            found = [
                np.tile(place[getattr(layer, rows)], count)
                for (layer, count), place in zip(parts, places, strict=True)
            ]
            return there(np.concatenate(found).astype(np.int64))

        queries, keys = laid_out("queries"), laid_out("keys")
        entering = sum(layer.entering * count for layer, count in parts)

        def unless_all(rows: np.ndarray) -> Tensor | None:
            return None if np.array_equal(rows, np.arange(entering)) else there(rows)

        self.n_queries, self.n_keys = len(queries), len(keys)
        # A residual row that continues in two ways may be read in two ways in a different order.
        self.same = np.array_equal(queries, keys) and len(np.unique(queries)) == len(queries)
        self.queries = unless_all(queries)
        self.keys = self.queries if self.same else unless_all(keys)
        self.query_places = positions("query_nodes")
        self.key_places = self.query_places if self.same else positions("key_nodes")
        self.chosen = sides.query.selections(repeated("query_choices"))
        of_keys = sides.key.selections(repeated("key_choices"))
        # What works on rows of both kinds has a choice for each.
        self.on_keys = {c: of_keys.pop(c) for c in tuple(of_keys) if c in self.chosen}
        self.chosen = shared(self.chosen, of_keys) if self.same else self.chosen | of_keys
        self.groups = [
            TreeGroup(piece, device)
            for readers in self._by_size(parts)
            for piece in pieces(readers)
        ]

    @staticmethod
    def _by_size(parts: Sequence[tuple[TreeLayer, int]]) -> Iterator[list[Readers]]:
        sizes: dict[int, list[Readers]] = {}
        queries = keys = 0
        for layer, count in parts:
            of_prompt = np.arange(count)[:, None, None]
            for readers in layer.readers:
                own = np.where(
                    readers.queries < 0,
                    -1,
                    readers.queries + queries + len(layer.queries) * of_prompt,
                )
                sizes.setdefault(readers.queries.shape[1], []).append(
                    Readers(
                        (readers.keys + keys + len(layer.keys) * of_prompt).reshape(
                            -1, readers.keys.shape[1]
                        ),
                        own.reshape(-1, readers.queries.shape[1]),
                        np.tile(readers.seen, (count, 1, 1)),
                    )
                )
            queries += len(layer.queries) * count
            keys += len(layer.keys) * count
        yield from sizes.values()

    def split(self, resid: Float[Tensor, "1 row d_model"]) -> tuple[Tensor, Tensor]:
        """The query rows and the key rows; one tensor if they are the same."""

        def taken(rows: Tensor | None) -> Tensor:
            return resid if rows is None else resid.index_select(1, rows)

        queries = taken(self.queries)
        return queries, queries if self.same else taken(self.keys)

    def turned(
        self, cos: Tensor, sin: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(cos, sin) of the query rows and of the key rows, looked up in [1, place, dim]."""
        queries = (cos[:, self.query_places], sin[:, self.query_places])
        if self.same:
            return queries, queries
        return queries, (cos[:, self.key_places], sin[:, self.key_places])

    def attend(
        self,
        q: Float[Tensor, "1 query head d_head"],
        k: Float[Tensor, "1 key kv_head d_head"],
        v: Float[Tensor, "1 key kv_head d_head"],
        attend: Attend,
    ) -> Float[Tensor, "1 query head d_head"]:
        """Attention of each group of query rows over the key rows that it reads."""
        z = torch.empty_like(q)
        for group in self.groups:
            part = attend(q[0][group.queries], k[0][group.keys], v[0][group.keys], group)
            rows = part.flatten(0, 1)
            rows = rows if group.filled is None else rows.index_select(0, group.filled)
            z[0].index_copy_(0, group.rows, rows)
        return z


class TreeShape:
    """Trees of several prompts, one after another: all that does not depend on tokens.

    Attributes:
        positions: [1, row] positions of the rows that enter layer 0.
        tables: the rotary tables that are needed: lengths of texts, 0 if there is only one table.
        longest: the number of positions that each table has.
        layers: the rows of each layer.
        mask: which source each row of each site uses.
        final_rows: rows after the last layer that are read as logits.
        output_mask: which source each of these uses at `ln_final` and `unembed`.
    """

    def __init__(
        self, trees: Sequence[tuple[TokenTree, int]], sides: Sides, device: torch.device
    ) -> None:
        """`trees` are trees, each with how many prompts have this structure."""
        self.trees, self.device = tuple(trees), device

        def there(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x.astype(np.int64)).to(device, non_blocking=True)

        self.tables = sorted({int(t) for tree, _ in trees for t in np.unique(tree.totals)})
        self.longest = max(int(tree.depths.max()) + 1 for tree, _ in trees)
        places = [
            np.searchsorted(self.tables, tree.totals) * self.longest + tree.depths
            for tree, _ in trees
        ]
        self.positions = there(
            np.concatenate([np.tile(tree.depths[tree.embed_nodes], n) for tree, n in trees])[None]
        )
        made: dict[tuple[int, ...], LayerRows] = {}
        self.layers: list[LayerRows] = []
        sites: dict[Site, Choice] = {}
        for index in range(len(trees[0][0].layers)):
            parts = [(tree.layers[index], count) for tree, count in trees]
            key = tuple(id(layer) for layer, _ in parts)
            if key not in made:
                made[key] = LayerRows(parts, sides, places, device)
            self.layers.append(made[key])
            sites |= {(c, index): chosen for c, chosen in made[key].chosen.items()}

        def of_rows(choices: Choices, rows: str) -> dict[Site, Choice]:
            numbers = np.concatenate([np.tile(getattr(tree, rows), n) for tree, n in trees])
            return {(c, None): chosen for c, chosen in choices.selections(numbers).items()}

        sites |= of_rows(sides.input, "embed_choices")
        self.mask = GraftMask(Graft(), sides.sources, (1, self.positions.shape[1]), sites)
        finals, start = [], 0
        for tree, count in trees:
            width = len(tree.layers[-1].queries)
            finals.append((start + width * np.arange(count)[:, None] + tree.final_rows).reshape(-1))
            start += width * count
        self.final_rows = there(np.concatenate(finals))
        output = of_rows(sides.output, "final_choices")
        self.output_mask = GraftMask(Graft(), sides.sources, (1, len(self.final_rows)), output)


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """Trees with their tokens, ready for the forward.

    Attributes:
        shape: the rows of every layer.
        tokens: token ids of the rows that enter layer 0.
    """

    shape: "TreeShape"
    tokens: Int[Tensor, "1 row"]

    @classmethod
    def of(
        cls, shape: "TreeShape", tokens: Sequence[Int[np.ndarray, "_prompt _node"]]
    ) -> "TreeBatch":
        """`tokens` are those of each tree's nodes, for the prompts that have this structure."""
        rows = [
            ids[:, tree.embed_nodes].reshape(-1)
            for (tree, _), ids in zip(shape.trees, tokens, strict=True)
        ]
        ids = torch.from_numpy(np.concatenate(rows).astype(np.int64)[None])
        return cls(shape, ids.to(shape.device, non_blocking=True))

    def __getitem__(self, layer: int) -> LayerRows:
        return self.shape.layers[layer]
