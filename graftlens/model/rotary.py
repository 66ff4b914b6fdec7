"""Rotary tables of several sources: each query and each key is turned by its own source's.

A table is part of q and k as much as their weights are: two whole models that run token by token,
sharing a key-value cache, turn each query and each key by the table of the model that made it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.model.arch import Architecture
from graftlens.model.choice import Choice, Equal
from graftlens.model.mask import GraftMask
from graftlens.model.tree import TreeBatch

C = Component

#: cos and sin, each [batch, pos, rotary_dim]
CosSin = tuple[Tensor, Tensor]

#: Positions of which tables are compared: every power of two below this, and the last of a text.
LONGEST = 1 << 17


@dataclass(frozen=True, eq=False)
class Table:
    """One way to turn queries and keys by their position.

    Attributes:
        module: a Hugging Face rotary module, in float32.
        kind: which of its tables; None where it has one.
        limit: in texts longer than this it depends on their length; None where it never does.
        n_ctx: the context that it was made for.
    """

    module: nn.Module
    kind: str | None
    limit: int | None
    n_ctx: int

    def __call__(self, like: Tensor, positions: Int[Tensor, "batch pos"]) -> CosSin:
        """cos and sin at some positions, as in a text that ends at the last of them."""
        given = () if self.kind is None else (self.kind,)
        # Dynamic tables remember the longest text so far: each text uses a fresh module.
        module = self.module if self.limit is None else copy.deepcopy(self.module)
        cos, sin = module(like, positions, *given)
        return cos, sin


def lengths_that_tell(limit: int | None, longest: int = LONGEST) -> list[int]:
    """Lengths of texts in which tables with such a limit show all that they can."""
    if limit is None:
        return [longest]
    return [limit * times + more for times, more in ((1, 0), (1, 1), (3, 0))]


def samples(table: Table, lengths: Sequence[int]) -> list[Tensor]:
    """cos and sin in texts of these lengths, at positions that tell tables apart."""
    found: list[Tensor] = []
    for total in lengths:
        powers = (1 << i for i in range(18))
        places = [0, *(p for p in powers if p < total - 1), total - 1]
        found += table(torch.zeros(1), torch.tensor([places]))
    return found


def same_table(a: Table, b: Table) -> bool:
    """Whether two tables turn every position alike."""
    if a.module is b.module and a.kind == b.kind:
        return True
    # A HookedTransformer keeps its tables, which end with its context.
    longest = min([LONGEST, *(t.n_ctx for t in (a, b) if not hasattr(t.module, "config"))])
    lengths = sorted({n for t in (a, b) for n in lengths_that_tell(t.limit, longest)})
    ours, theirs = samples(a, lengths), samples(b, lengths)
    if any(x.shape != y.shape for x, y in zip(ours, theirs, strict=True)):
        return False
    if type(a.module) is type(b.module):
        return all(map(torch.equal, ours, theirs))
    # It also computes them in another way, with different last digits.
    return all(torch.allclose(x, y, atol=1e-2) for x, y in zip(ours, theirs, strict=True))


class Rotary:
    """The tables of all sources; those that are the same are kept once.

    Attributes:
        tables: the different ones.
        slots: per source, per layer, which of them it uses.
    """

    def __init__(self, sources: Sequence[tuple[nn.Module, Architecture]]) -> None:
        """`sources` are their rotary modules, which are copied, with their architectures."""
        self.tables: list[Table] = []
        slots: list[tuple[int, ...]] = []
        for given, arch in sources:
            # Its numbers are float32 whatever the model's dtype is.
            module = copy.deepcopy(given)
            kinds = {
                kind: self._slot(Table(module, kind, arch.rope_limit, arch.n_ctx))
                for kind in dict.fromkeys(arch.rope_kinds)
            }
            slots.append(tuple(kinds[kind] for kind in arch.rope_kinds))
        self.slots = tuple(slots)

    def _slot(self, table: Table) -> int:
        for slot, known in enumerate(self.tables):
            if same_table(known, table):
                if table.n_ctx > known.n_ctx:  # of tables that are kept, the longer ones
                    self.tables[slot] = table
                return slot
        self.tables.append(table)
        return len(self.tables) - 1

    def at(self, layer: int) -> tuple[int, ...]:
        """Per source, its table in a layer."""
        return tuple(slots[layer] for slots in self.slots)

    def equal(self, layer: int) -> Equal:
        """For each source, the first source with the same table in a layer."""
        slots = self.at(layer)
        return tuple(slots.index(slot) for slot in slots)

    @property
    def of_base(self) -> nn.Module:
        """The module of the base's last layer."""
        return self.tables[self.slots[0][-1]].module

    @property
    def differ(self) -> bool:
        """Whether sources have different tables in some layer."""
        return len(set(self.slots)) > 1

    def made(
        self, like: Tensor, positions: Int[Tensor, "batch pos"], counts: np.ndarray
    ) -> list[CosSin]:
        """cos and sin of every table.

        Args:
            like: a tensor of the dtype and on the device to run in.
            positions: each token's position in its text.
            counts: the same on the host.
        """
        found: list[CosSin] = []
        for table in self.tables:
            rows = [positions]
            if table.limit is not None and len(set(counts.max(1).tolist())) > 1:
                # They change with the longest position: each prompt gets those that it has alone.
                rows = list(positions.split(1))
            pieces = [table(like, some) for some in rows]
            cos, sin = (torch.cat([piece[i] for piece in pieces]) for i in range(2))
            found.append((cos, sin))
        return found

    def to(self, device: torch.device) -> None:
        """Move the modules' frequencies."""
        for table in self.tables:
            table.module.to(device)

    def check(self, mask: GraftMask) -> None:
        """That no query or key is a mixture of sources that are turned in different ways.

        Raises:
            ValueError: one is.
        """
        if not self.differ:
            return
        for layer in range(len(self.slots[0])):
            equal = self.equal(layer)
            for component in (C.Q, C.K):
                chosen = mask.sites.get((component, layer))
                if chosen is None:
                    continue
                together = [tuple(s for s, _ in mixture) for mixture in chosen.mixtures]
                what = f"graft {str(mask.graft)!r}"
                if chosen.blended is not None:
                    # A row may be any mixture of all.
                    together = [chosen.sources]
                    what += " with a tensor of strengths, as attribution mixes it in"
                for sources in together:
                    if why := mixed_tables(sources, equal, mask.sources, component, layer):
                        raise ValueError(f"{what}: {why}")


def mixed_tables(
    sources: Sequence[int], equal: Equal, names: Sequence[str], component: Component, layer: int
) -> str:
    """Why these sources cannot be mixed at q or k; nothing if all have one table.

    Args:
        sources: those that have a share, by number.
        equal: `Rotary.equal` of the layer.
        names: the names of all sources.
        component, layer: the site.
    """
    first = sources[0]
    other = next((s for s in sources if equal[s] != equal[first]), None)
    if other is None:
        return ""
    return (
        f"{component} in layer {layer} would mix {names[first]!r} and {names[other]!r}, whose "
        "rotary tables differ, so that no table turns the mixture. Give q and k whole (a strength "
        "of 0 or 1), and the other components any strength."
    )


def rotate(
    x: Float[Tensor, "batch pos head d_head"], cos: Tensor, sin: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary embedding of the first `cos.shape[-1]` dimensions of each head."""
    dim = cos.shape[-1]
    turned, rest = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], dim=-1)
    # Tables may be wider than the model's dtype (OLMo rotates in float32).
    out = (turned * cos + half * sin).to(x.dtype)
    return out if rest is None else torch.cat([out, rest], dim=-1)


class Turning:
    """Turns the queries and keys of one forward pass."""

    def __init__(
        self, rotary: Rotary, made: Sequence[CosSin], tree: TreeBatch | None = None
    ) -> None:
        """`made` are cos and sin of every table, each [batch, pos, rotary_dim], of all keys, the
        last of which are the queries' positions; the rows of a `tree` look theirs up in them."""
        self.rotary, self._made, self._tree = rotary, made, tree
        self._looked_up: dict[object, Sequence[CosSin]] = {}
        self._whose: dict[object, Bool[Tensor, "batch pos head_or_1 1"]] = {}

    def __call__(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        layer: int,
        side: int,
        chosen: Choice,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries (side 0) or keys (side 1) of a layer, each turned by its own source's table."""
        slots = self.rotary.at(layer)
        needed = dict.fromkeys(slots)
        if len(needed) > 1:
            needed = dict.fromkeys(slots[source] for source in chosen.sources)
        out: Tensor | None = None
        for slot in needed:
            turned = rotate(x, *self._tables(layer, slot, side, x.shape[1]))
            if out is None:
                out = turned
            else:
                out = torch.where(self._rows(x, chosen, slots, slot), turned, out)
        assert out is not None, "every row runs some source"
        return out

    def _tables(self, layer: int, slot: int, side: int, n_rows: int) -> CosSin:
        if self._tree is None:
            cos, sin = self._made[slot]
            return cos[:, -n_rows:], sin[:, -n_rows:]
        rows = self._tree[layer]  # layers of equal rows are one object
        if (rows, slot) not in self._looked_up:
            self._looked_up[rows, slot] = rows.turned(*self._made[slot])
        return self._looked_up[rows, slot][side]

    def _rows(
        self, x: Tensor, chosen: Choice, slots: tuple[int, ...], slot: int
    ) -> Bool[Tensor, "batch pos head_or_1 1"]:
        """The rows, or the heads of rows, whose source has a table."""
        key = (chosen, slots, slot)
        if key not in self._whose:
            selections = list(chosen.selections())
            whole = any(units is None for units, _ in selections)
            has = np.zeros((x.shape[0] * x.shape[1], 1 if whole else x.shape[2]), dtype=bool)
            for units, selection in selections:
                mine = np.zeros(len(has), dtype=bool)
                for source in selection.sources:
                    if slots[source] == slot:
                        mine |= selection.share(source) != 0
                has[:, slice(None) if units is None else list(units)] |= mine[:, None]
            there = torch.from_numpy(has).to(x.device, non_blocking=True)
            self._whose[key] = there.reshape(*x.shape[:2], -1, 1)
        return self._whose[key]


def turning_at(
    rotary: Rotary | None, like: Tensor, counts: Int[np.ndarray, "batch pos"]
) -> Turning | None:
    """The tables of all sources at the positions `counts`; None with learned positions."""
    if rotary is None:
        return None
    positions = torch.from_numpy(counts).to(like.device, non_blocking=True)
    return Turning(rotary, rotary.made(like, positions, counts))


def turning_of_tree(rotary: Rotary, arch: Architecture, like: Tensor, tree: TreeBatch) -> Turning:
    """The tables of every length that a tree has, one after another.

    Args:
        rotary: the tables of all sources.
        arch: the architecture of the pair.
        like: a tensor of the dtype and on the device to run in.
        tree: the rows, which look their positions up.
    """
    shape = tree.shape
    found: list[list[CosSin]] = [[] for _ in rotary.tables]
    for total in shape.tables:
        # 0 is shared by all texts, or by those within the limit if tables depend on the length.
        length = total or min(shape.longest, arch.rope_limit or shape.longest)
        counts = np.arange(length)[None]
        positions = torch.from_numpy(counts).to(like.device, non_blocking=True)
        missing = (0, 0, 0, shape.longest - length)
        for parts, made in zip(found, rotary.made(like, positions, counts), strict=True):
            cos, sin = (F.pad(table, missing) for table in made)
            parts.append((cos, sin))
    whole = [(torch.cat([c for c, _ in p], 1), torch.cat([s for _, s in p], 1)) for p in found]
    return Turning(rotary, whole, tree)
