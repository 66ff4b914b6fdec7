"""Prompts of many texts, run once each: rows that grafts and samples share are computed once.

Prompts run as token trees, as in a sweep. Then each row of a generation gets the keys and values
of its own graft, and goes on from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from graftlens.model.decoding import Decoder
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import collate
from graftlens.model.passes import KeyValueCache
from graftlens.model.tree import TreeBatch, TreeShape
from graftlens.planner import Branches, Piece, Planner, Structure
from graftlens.prompts import Tokenized


@dataclass(frozen=True, eq=False)
class Ready:
    """A prompt that can be generated from.

    Attributes:
        number: its number in the table.
        tokens: its tokens.
        structure: what its trees depend on.
        reasons: the grafts that it cannot run, by number, each with the reason.
    """

    number: int
    tokens: Tokenized
    structure: Structure
    reasons: dict[int, str]

    @classmethod
    def of(
        cls, number: int, tokens: Tokenized, planner: Planner, rope_limit: int | None
    ) -> "Ready":
        branches = Branches.of(tokens.ids, [(0,)], rope_limit)
        return cls(number, tokens, *planner.structure(tokens, branches))


#: What one row of a generation is of: a prompt, and the number of a graft.
Row = tuple[Ready, int]


@dataclass(frozen=True, eq=False)
class _Part:
    """Prompts of one structure, and the tree of the grafts that they are wanted under."""

    piece: Piece
    members: Sequence[Ready]


def prefilled(
    model: GraftedTransformer, planner: Planner, rows: Sequence[Row], room: int, most_rows: int
) -> Decoder:
    """Run the prompts of all rows.

    Args:
        model: the model.
        planner: of the grafts; made with `goes_on`.
        rows: a prompt and a graft of each row, in any order, as often as wanted.
        room: how many tokens will be added at most.
        most_rows: token rows that a forward pass holds at most, but for a single prompt's.
    """
    device = torch.device(model.cfg.device)
    prompts = [ready.tokens for ready, _ in rows]
    batch = collate(prompts, pad_id=model.pad_id(), side="left", device=device)
    model.warn_beyond_context(max(batch.totals))
    width = batch.real.shape[1]
    places: dict[tuple[int, int], list[int]] = {}
    for place, (ready, graft) in enumerate(rows):
        places.setdefault((ready.number, graft), []).append(place)
    cache, logits = KeyValueCache(room), None
    for parts in _passes(planner, rows, most_rows):
        shape = TreeShape([(p.piece.tree, len(p.members)) for p in parts], planner.sides, device)
        ids = [np.array([member.tokens.ids for member in part.members]) for part in parts]
        found = KeyValueCache()
        read = model.tree_logits(TreeBatch.of(shape, ids), lambda t, _: t, cache=found)
        here = [_Cell.all(part, places) for part in parts]
        targets = np.array([place for cells in here for cell in cells for place in cell.places])
        into = torch.from_numpy(targets).to(device)
        finals = torch.from_numpy(_finals(parts, here)).to(device)
        distribution = torch.cat(read).index_select(0, finals)
        if logits is None:
            logits = distribution.new_empty(len(rows), distribution.shape[1])
        logits.index_copy_(0, into, distribution)
        made: dict[tuple[int, ...], Tensor] = {}
        for layer, kept in found.entries.items():
            layers = tuple(id(part.piece.tree.layers[layer]) for part in parts)
            if layers not in made:
                keys = _keys(parts, here, layer, width)
                made[layers] = torch.from_numpy(keys.reshape(-1)).to(device)
            if layer not in cache.entries:
                like = kept[0].new_zeros(len(rows), width + room, *kept[0].shape[2:])
                cache.entries[layer] = like, torch.zeros_like(like)
                cache.counts[layer] = width
            for whole, some in zip(cache.entries[layer], kept, strict=True):
                taken = some[0].index_select(0, made[layers])
                whole[into, :width] = taken.unflatten(0, (len(targets), width))
    assert logits is not None, "no rows"
    step_mask = planner.following([(ready.structure, graft) for ready, graft in rows])
    return Decoder(model, batch, logits, step_mask, cache)


def _passes(planner: Planner, rows: Sequence[Row], most_rows: int) -> Iterator[list[_Part]]:
    """What runs together: whole prompts under all the grafts that they are wanted under."""
    grafts: dict[int, set[int]] = {}
    for ready, graft in rows:
        grafts.setdefault(ready.number, set()).add(graft)
    alike: dict[tuple[Structure, tuple[int, ...]], list[Ready]] = {}
    for ready in {ready.number: ready for ready, _ in rows}.values():
        key = ready.structure, tuple(sorted(grafts[ready.number]))
        alike.setdefault(key, []).append(ready)
    waiting: list[_Part] = []
    free = most_rows
    for (structure, wanted), members in alike.items():
        piece = planner.piece(structure, np.array(wanted))
        while members:
            count = min(len(members), max(free // piece.tree.peak, 0 if waiting else 1))
            if count:
                waiting.append(_Part(piece, members[:count]))
                members, free = members[count:], free - count * piece.tree.peak
            if members:
                yield waiting
                waiting, free = [], most_rows
    if waiting:
        yield waiting


@dataclass(frozen=True)
class _Cell:
    """A prompt under a graft in one part of a pass.

    Attributes:
        member: which prompt of the part.
        column: the graft's in the tree.
        places: the rows that are wanted of it.
        length: the prompt's.
    """

    member: int
    column: int
    places: Sequence[int]
    length: int

    @classmethod
    def all(cls, part: _Part, places: dict[tuple[int, int], list[int]]) -> "list[_Cell]":
        pairs = list(zip(part.piece.columns.tolist(), part.piece.grafts.tolist(), strict=True))
        return [
            cls(number, column, places[member.number, graft], len(member.tokens))
            for number, member in enumerate(part.members)
            for column, graft in pairs
        ]


def _finals(parts: Sequence[_Part], here: Sequence[Sequence[_Cell]]) -> Int[np.ndarray, " row"]:
    """The number of the row of logits of each wanted row."""
    found, start = [], 0
    for part, cells in zip(parts, here, strict=True):
        tree = part.piece.tree
        for cell in cells:
            row = start + cell.member * len(tree.final_rows) + tree.outputs[0, cell.column]
            found += [int(row)] * len(cell.places)
        start += len(part.members) * len(tree.final_rows)
    return np.array(found)


def _keys(
    parts: Sequence[_Part], here: Sequence[Sequence[_Cell]], layer: int, width: int
) -> Int[np.ndarray, "row pos"]:
    """Which key rows of a layer are those of each wanted row, padded on the left with any."""
    found, start = [], 0
    for part, cells in zip(parts, here, strict=True):
        rows = part.piece.tree.layers[layer]
        assert rows.of_graft is not None, "the planner was not made with goes_on"
        for cell in cells:
            own = start + cell.member * len(rows.keys) + rows.of_graft[cell.column]
            padded = np.pad(own, (width - cell.length, 0), constant_values=start)
            found.append(np.tile(padded, (len(cell.places), 1)))
        start += len(part.members) * len(rows.keys)
    return np.concatenate(found)
