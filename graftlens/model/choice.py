"""What the rows of a site run: sources, mixtures of them, and units that differ.

What a row runs is a *code*, which names a mixture of sources (`Mixtures`); codes of single sources
come first. Who needs rows asks a choice for them, by source.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

#: Source -> the first source with the same tensors. Rows of equal sources are computed together.
Equal = tuple[int, ...]

#: Sources with their shares, in the order of the sources; no share is 0, and they add up to 1.
Mixture = tuple[tuple[int, Decimal], ...]

#: Strengths are multiplied out as they are written (1 - 0.7 is 0.3), to so many digits.
_EXACT = Context(prec=60)
_ONE = Decimal(1)

Found = TypeVar("Found")


def _mixture(shares: Iterable[tuple[int, Decimal]]) -> Mixture:
    """The canonical form: shares of one source added up, none that is 0, one alone is 1."""
    total: dict[int, Decimal] = {}
    for source, share in shares:
        total[source] = _EXACT.add(total.get(source, Decimal(0)), share)
    kept = tuple(sorted((source, share) for source, share in total.items() if share))
    return ((kept[0][0], _ONE),) if len(kept) == 1 else kept


def merged(mixture: Mixture, equal: Equal) -> Mixture:
    """A mixture in which equal sources are one."""
    if len(mixture) == 1:
        return ((equal[mixture[0][0]], _ONE),)
    return _mixture((equal[source], share) for source, share in mixture)


class Mixtures:
    """The mixtures that codes encode: first each source alone, then others as they come up."""

    def __init__(self, n_sources: int) -> None:
        self.n_sources = n_sources
        self._known: list[Mixture] = []
        self._codes: dict[Mixture, int] = {}
        self._blended: dict[tuple[int, int, float], int] = {}
        self._merged: dict[tuple[int, Equal], int] = {}
        for source in range(n_sources):
            self.code(((source, _ONE),))

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, code: int) -> Mixture:
        return self._known[code]

    def code(self, mixture: Mixture) -> int:
        """The code of a mixture in canonical form; a new one is added."""
        if mixture not in self._codes:
            self._codes[mixture] = len(self._known)
            self._known.append(mixture)
        return self._codes[mixture]

    def blend(
        self, codes: Int32[np.ndarray, "*places"], source: int, strength: float | int
    ) -> Int32[np.ndarray, "*places"]:
        """(1 - strength) of what codes encode and `strength` of a source.

        Raises:
            ValueError: strengths that multiply to more than a float holds.
        """
        if strength == 1:
            return np.full_like(codes, source)
        return self._each(codes, lambda code: self._blend(code, source, strength))

    def merge(
        self, codes: Int32[np.ndarray, "*places"], equal: Equal
    ) -> Int32[np.ndarray, "*places"]:
        """The codes of the same mixtures in which equal sources are one."""
        if len(self) == self.n_sources or codes.size == 0 or codes.max() < self.n_sources:
            return np.asarray(equal, dtype=np.int32)[codes]
        return self._each(codes, lambda code: self.merge_one(code, equal))

    def merge_one(self, code: int, equal: Equal) -> int:
        """`merge` of a single code."""
        key = code, equal
        if key not in self._merged:
            self._merged[key] = self.code(merged(self[code], equal))
        return self._merged[key]

    def shares(self, source: int) -> Float[np.ndarray, " code"]:
        """What share of a source each code has."""
        return np.array([float(dict(mixture).get(source, 0)) for mixture in self._known])

    def _blend(self, code: int, source: int, strength: float | int) -> int:
        key = code, source, strength
        if key not in self._blended:
            share = Decimal(repr(float(strength)))
            rest = _EXACT.subtract(_ONE, share)
            kept = [(s, _EXACT.multiply(rest, old)) for s, old in self[code]]
            made = _mixture([*kept, (source, share)])
            if not all(math.isfinite(float(share)) for _, share in made):
                raise ValueError(
                    f"the strengths of the rules that meet here multiply to {made[0][1]:.3g}, "
                    "which is more than a number of the model can be. Lower them."
                )
            self._blended[key] = self.code(made)
        return self._blended[key]

    @staticmethod
    def _each(
        codes: Int32[np.ndarray, "*places"], change: Callable[[int], int]
    ) -> Int32[np.ndarray, "*places"]:
        used, where = np.unique(codes, return_inverse=True)
        changed = np.array([change(int(code)) for code in used], dtype=np.int32)
        return changed[where].reshape(codes.shape)


@dataclass(frozen=True)
class SourceRows:
    """The rows that one source computes, and its share of each; None where it is all of them."""

    source: int
    rows: Int[Tensor, " rows"]
    share: Float[np.ndarray, " rows"] | None = None
    _scales: dict[torch.dtype, Float[Tensor, " rows"]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def scale(self, dtype: torch.dtype, ndim: int) -> Tensor:
        """The shares [row, 1, …], to be multiplied with `ndim` axes of results."""
        assert self.share is not None
        if dtype not in self._scales:
            made = torch.from_numpy(self.share).to(dtype)
            self._scales[dtype] = made.to(self.rows.device, non_blocking=True)
        return self._scales[dtype].reshape(-1, *(1,) * (ndim - 1))


@dataclass(frozen=True)
class AddedRows:
    """The rows whose sources add something to what they share with others.

    Attributes:
        rows: which, those that run the same one after another; a slice where that is their order.
        pieces: of rows that run the same, the first, the end, and (source, share) of all that add
            something to them.
    """

    rows: Int[Tensor, " rows"] | slice
    pieces: tuple[tuple[int, int, tuple[tuple[int, float], ...]], ...]


@dataclass(frozen=True)
class Arranged:
    """All rows in another order, in which those that run the same are neighbours.

    Attributes:
        rows: the row that is first, second, … in that order.
        back: where each row is in it.
        chosen: what they run, in that order.
    """

    rows: Int[Tensor, " rows"]
    back: Int[Tensor, " rows"]
    chosen: "Selection"


class Choice(ABC):
    """What the rows of a site run, and the units of each row. Ask it, by source or by row."""

    @property
    def alike(self) -> "Selection | None":
        """What each row runs, if all units of a row run the same and no strength is a tensor."""
        return None

    @property
    def blended(self) -> "Strengthened | None":
        """What is mixed in by a tensor of strengths, if anything is."""
        return None

    @property
    def apart(self) -> "UnitSelection | None":
        """The groups of units, if they differ."""
        return None

    @property
    @abstractmethod
    def whole(self) -> "Choice":
        """Where a bias comes from that belongs to no unit."""

    @property
    @abstractmethod
    def mixtures(self) -> tuple[Mixture, ...]:
        """What the rows, or the units of rows, run, each once."""

    @property
    @abstractmethod
    def sources(self) -> tuple[int, ...]:
        """The sources that have a share in any row."""

    def ask(
        self,
        rows: Callable[["Selection"], Found],
        units: Callable[["UnitSelection"], Found],
        strengths: Callable[["Strengthened"], Found],
    ) -> Found:
        """The answer of the one that applies: `rows` where all units of a row run the same, `units`
        where they differ, `strengths` where a tensor of strengths mixes a source in."""
        if self.blended is not None:
            return strengths(self.blended)
        if self.alike is not None:
            return rows(self.alike)
        assert self.apart is not None, "a choice is one of the three"
        return units(self.apart)

    @abstractmethod
    def selections(self) -> Iterator[tuple[tuple[int, ...] | None, "Selection"]]:
        """Each group of units with its selection; None is all units."""

    @abstractmethod
    def share(
        self, source: int, equal: Equal | None = None, unit: int | None = None
    ) -> Float[np.ndarray, " rows"]:
        """A source's share of each row, or of a unit of each row; without a unit, where units
        differ, of what belongs to none. With `equal`, its equals' shares are the first one's."""

    def share_on(self, source: int, like: Tensor) -> Float[Tensor, " rows"]:
        """`share` as a tensor, which gradients reach where the strengths are tensors."""
        return torch.from_numpy(self.share(source)).to(like)

    def shares_on(
        self, source: int, n_units: int, like: Tensor, equal: Equal | None = None
    ) -> Float[Tensor, "rows unit"]:
        """A source's share of each unit of each row, which gradients reach where the strengths are
        tensors."""

        def of_rows(rows: "Selection") -> Tensor:
            return torch.from_numpy(rows.share(source, equal)).to(like)[:, None]

        def of_units(chosen: "UnitSelection") -> Tensor:
            shares = like.new_empty(chosen.whole.n_rows, n_units)
            for units, selection in chosen.groups:
                shares[:, list(units)] = of_rows(selection)
            return shares

        def of_strengths(chosen: "Strengthened") -> Tensor:
            mine = chosen.source if equal is None else equal[chosen.source]
            strength = chosen.strength.to(like).reshape(len(chosen.strength), -1)
            own = chosen.inner.shares_on(source, n_units, like, equal)
            return (1 - strength) * own + strength * float(source == mine)

        found = self.ask(rows=of_rows, units=of_units, strengths=of_strengths)
        return found.expand(-1, n_units)

    @abstractmethod
    def rows_of(self, source: int, equal: Equal | None = None) -> Int[np.ndarray, " some_rows"]:
        """The rows in which a source has a share of some unit."""

    @abstractmethod
    def only(self, equal: Equal | None = None) -> int | None:
        """The source that is all of every row, of all its units and of what belongs to none, at
        any strength that is a tensor; None where several are, or a mixture."""

    @abstractmethod
    def pick(self, rows: Int[np.ndarray, " kept"]) -> "Choice":
        """The choice of some rows."""


class Selection(Choice):
    """What each row runs at one site; shared by all sites that agree."""

    def __init__(
        self,
        codes: Int32[np.ndarray, " rows"],
        real: Bool[np.ndarray, " rows"],
        mixtures: Mixtures,
    ) -> None:
        """`codes` of the mixtures; rows that are not `real` may run any."""
        used = np.unique(codes[real]) if real.any() else np.zeros(1, dtype=np.int32)
        # Padding runs what some prompt does, so that a uniform mask stays uniform.
        known = real.all() or np.isin(codes, used)
        self._codes = codes if np.all(known) else np.where(known, codes, used[0])
        self._used = tuple(int(code) for code in used)
        self._mixtures = mixtures
        self.n_rows = len(codes)
        self._source_rows: dict[tuple[Equal, torch.device], tuple[SourceRows, ...]] = {}
        self._added_rows: dict[object, AddedRows] = {}
        self._arranged: dict[object, Arranged | None] = {}
        self._rows: dict[torch.device, Int[Tensor, " rows"]] = {}

    @classmethod
    def uniform(cls, mixture: int | Mixture, rows: int) -> "Selection":
        """Every row runs one source (by its number), or one mixture."""
        mixture = ((mixture, _ONE),) if isinstance(mixture, int) else mixture
        mixtures = Mixtures(1 + max(source for source, _ in mixture))
        codes = np.full(rows, mixtures.code(mixture), dtype=np.int32)
        return cls(codes, np.ones(rows, dtype=bool), mixtures)

    @property
    def alike(self) -> "Selection":
        return self

    @property
    def whole(self) -> "Selection":
        return self

    def selections(self) -> Iterator[tuple[tuple[int, ...] | None, "Selection"]]:
        yield None, self

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        return tuple(self._mixtures[code] for code in self._used)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        return tuple(sorted({source for mixture in self.mixtures for source, _ in mixture}))

    def share(
        self, source: int, equal: Equal | None = None, unit: int | None = None
    ) -> Float[np.ndarray, " rows"]:
        codes = self._codes if equal is None else self._mixtures.merge(self._codes, equal)
        return self._mixtures.shares(source)[codes]

    def rows_of(self, source: int, equal: Equal | None = None) -> Int[np.ndarray, " some_rows"]:
        return np.flatnonzero(self.share(source, equal))

    def only(self, equal: Equal | None = None) -> int | None:
        used = {code if equal is None else self._merge(code, equal) for code in self._used}
        code = used.pop()
        return code if not used and code < self._mixtures.n_sources else None

    def mixed(self, equal: Equal) -> bool:
        """Whether some row runs a mixture of sources whose tensors differ."""
        return any(self._merge(code, equal) >= self._mixtures.n_sources for code in self._used)

    def _merge(self, code: int, equal: Equal) -> int:
        pure = code < self._mixtures.n_sources
        return equal[code] if pure else self._mixtures.merge_one(code, equal)

    def source_rows(self, equal: Equal, device: torch.device) -> tuple[SourceRows, ...]:
        """The rows of each source, sources with equal tensors taken together."""
        key = (equal, device)
        if key not in self._source_rows:
            codes = self._mixtures.merge(self._codes, equal)
            used = np.unique(codes)
            made = []
            for source in sorted({s for code in used for s, _ in self._mixtures[int(code)]}):
                share = self._mixtures.shares(source)[codes]
                rows = np.flatnonzero(share)
                there = torch.from_numpy(rows).to(device, non_blocking=True)
                own = share[rows]
                made.append(SourceRows(source, there, None if (own == 1).all() else own))
            self._source_rows[key] = tuple(made)
        return self._source_rows[key]

    def added_rows(self, equal: Equal, adding: frozenset[int], device: torch.device) -> AddedRows:
        """The rows of the sources that are `adding` something; sources that add the same, or
        nothing, are taken together."""
        key = (equal, adding, device)
        if key not in self._added_rows:
            used, group = np.unique(self._mixtures.merge(self._codes, equal), return_inverse=True)
            held = [
                tuple((s, float(share)) for s, share in self._mixtures[int(code)] if s in adding)
                for code in used
            ]
            group = group.reshape(-1)
            rows = np.flatnonzero(np.array([bool(added) for added in held])[group])
            rows = rows[np.argsort(group[rows], kind="stable")]
            stops = np.cumsum(np.bincount(group[rows], minlength=len(used)))
            pieces = tuple(
                (int(stop - count), int(stop), added)
                for stop, count, added in zip(stops, np.diff(stops, prepend=0), held, strict=True)
                if count
            )
            kept: Tensor | slice
            if len(rows) == 0 or np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
                first = int(rows[0]) if len(rows) else 0
                kept = slice(first, first + len(rows))
            else:
                kept = torch.from_numpy(rows).to(device, non_blocking=True)
            self._added_rows[key] = AddedRows(kept, pieces)
        return self._added_rows[key]

    def arranged(self, equal: Equal, device: torch.device) -> Arranged | None:
        """The rows in the order of what they run, equal sources taken together; None where they
        are in it."""
        key = (equal, device)
        if key not in self._arranged:
            codes = self._mixtures.merge(self._codes, equal)
            order = np.argsort(codes, kind="stable")
            found = None
            if not np.array_equal(order, np.arange(len(order))):
                rows, back = (
                    torch.from_numpy(index).to(device, non_blocking=True)
                    for index in (order, np.argsort(order))
                )
                found = Arranged(rows, back, self.pick(order))
            self._arranged[key] = found
        return self._arranged[key]

    def per_row(self, device: torch.device) -> Int[Tensor, " rows"]:
        """Which of `mixtures` each row runs."""
        if device not in self._rows:
            index = np.searchsorted(np.array(self._used), self._codes).astype(np.int64)
            self._rows[device] = torch.from_numpy(index).to(device, non_blocking=True)
        return self._rows[device]

    def agrees(self, other: "Selection") -> bool:
        """Whether every row runs the same."""
        mine = self._mixtures is other._mixtures
        return mine and np.array_equal(self._codes, other._codes)

    def pick(self, rows: Int[np.ndarray, " kept"]) -> "Selection":
        return Selection(self._codes[rows], np.ones(len(rows), dtype=bool), self._mixtures)


@dataclass(frozen=True)
class UnitSelection(Choice):
    """A site whose units (heads, neurons) differ: groups of them, each with its own selection.

    `of_no_unit` says where a bias comes from that belongs to none (o's and mlp_out's).
    """

    groups: tuple[tuple[tuple[int, ...], Selection], ...]
    of_no_unit: Selection
    _indices: dict[torch.device, tuple[Int[Tensor, " units"], ...]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _shares: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def apart(self) -> "UnitSelection":
        return self

    @property
    def whole(self) -> Selection:
        return self.of_no_unit

    def selections(self) -> Iterator[tuple[tuple[int, ...] | None, Selection]]:
        yield from self.groups

    @cached_property
    def sources(self) -> tuple[int, ...]:
        return tuple(sorted({source for _, s in self.groups for source in s.sources}))

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        return tuple(dict.fromkeys(m for _, s in self.groups for m in s.mixtures))

    def on(self, device: torch.device) -> Iterator[tuple[Int[Tensor, " units"], Selection]]:
        """Each group's units as an index on `device`, with the group's selection."""
        if device not in self._indices:
            self._indices[device] = tuple(
                torch.tensor(units).to(device, non_blocking=True) for units, _ in self.groups
            )
        return zip(self._indices[device], (s for _, s in self.groups), strict=True)

    def mixed(self, equal: Equal) -> bool:
        """Whether some unit of some row runs a mixture of sources whose tensors differ."""
        return any(selection.mixed(equal) for _, selection in self.groups)

    def share(
        self, source: int, equal: Equal | None = None, unit: int | None = None
    ) -> Float[np.ndarray, " rows"]:
        chosen = next((s for units, s in self.groups if unit in units), self.whole)
        return chosen.share(source, equal)

    def only(self, equal: Equal | None = None) -> int | None:
        found = {s.only(equal) for s in (self.whole, *(s for _, s in self.groups))}
        return found.pop() if len(found) == 1 else None

    def rows_of(self, source: int, equal: Equal | None = None) -> Int[np.ndarray, " some_rows"]:
        found = np.zeros(self.whole.n_rows, dtype=bool)
        for _, selection in self.groups:
            found[selection.rows_of(source, equal)] = True
        return np.flatnonzero(found)

    def unit_shares(
        self, source: int, equal: Equal, like: Tensor
    ) -> tuple[Int[Tensor, " some_rows"], Float[Tensor, "some_rows unit"]]:
        """The rows in which a source has a share, and its share of each of their units."""
        key = (source, equal, like.device, like.dtype)
        if key not in self._shares:
            rows = self.rows_of(source, equal)
            shares = np.stack([s.share(source, equal)[rows] for _, s in self.groups], axis=1)
            group_of = np.empty(sum(len(units) for units, _ in self.groups), dtype=np.int64)
            for number, (units, _) in enumerate(self.groups):
                group_of[list(units)] = number
            self._shares[key, "rows"] = torch.from_numpy(rows).to(like.device, non_blocking=True)
            self._shares[key, "unit"] = torch.from_numpy(group_of).to(like.device)
            self._shares[key] = torch.from_numpy(shares).to(like.dtype).to(like.device)
        return self._shares[key, "rows"], self._shares[key][:, self._shares[key, "unit"]]

    def pick(self, rows: Int[np.ndarray, " kept"]) -> "UnitSelection":
        groups = tuple((units, s.pick(rows)) for units, s in self.groups)
        return UnitSelection(groups, self.whole.pick(rows))


@dataclass(frozen=True, eq=False)
class Strengthened(Choice):
    """What a site runs, mixed with a source by strengths that gradients reach.

    Attributes:
        inner: what runs without it.
        source: the source that is mixed in.
        strength: y = (1 - strength) * (what runs without it) + strength * (the source's), for
            each row, or for each unit of each row.
        bias: the same for a bias that belongs to no unit, where `strength` is by unit.
    """

    inner: Choice
    source: int
    strength: Float[Tensor, " rows"] | Float[Tensor, "rows unit"]
    bias: Float[Tensor, " rows"] | None = None

    @property
    def blended(self) -> "Strengthened":
        return self

    @property
    def by_unit(self) -> bool:
        """Whether each unit has a strength of its own."""
        return self.strength.ndim == 2

    @property
    def whole(self) -> Choice:
        strength = self.bias if self.by_unit else self.strength
        if strength is None:
            return self.inner.whole
        return Strengthened(self.inner.whole, self.source, strength)

    def selections(self) -> Iterator[tuple[tuple[int, ...] | None, Selection]]:
        """What the rows may run: what they run without it, and the source."""
        yield from self.inner.selections()
        yield None, Selection.uniform(self.source, len(self.strength))

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """As `selections`."""
        return tuple(dict.fromkeys(m for _, s in self.selections() for m in s.mixtures))

    @property
    def sources(self) -> tuple[int, ...]:
        """As `selections`."""
        return tuple(sorted({source for _, s in self.selections() for source in s.sources}))

    def share(
        self, source: int, equal: Equal | None = None, unit: int | None = None
    ) -> Float[np.ndarray, " rows"]:
        inner = self.inner.share(source, equal, unit)
        strength = self.bias if self.by_unit and unit is None else self.strength
        if strength is None:
            return inner
        mine = _numbers(strength if strength.ndim == 1 else strength[:, unit])
        return self._moved(inner, mine, source, equal)

    def rows_of(self, source: int, equal: Equal | None = None) -> Int[np.ndarray, " some_rows"]:
        like = self.strength.new_empty(0, dtype=torch.float64)
        shares = _numbers(self.shares_on(source, _n_units(self), like, equal))
        return np.flatnonzero((shares != 0).any(1))

    def only(self, equal: Equal | None = None) -> int | None:
        only = self.inner.only(equal)
        return only if only == (self.source if equal is None else equal[self.source]) else None

    def share_on(self, source: int, like: Tensor) -> Float[Tensor, " rows"]:
        inner = self.inner.share_on(source, like)
        strength = self.bias if self.by_unit else self.strength
        if strength is None:
            return inner
        strength = strength.to(like)
        return (1 - strength) * inner + strength * float(source == self.source)

    def _moved(
        self, share: np.ndarray, strength: np.ndarray, source: int, equal: Equal | None
    ) -> np.ndarray:
        mine = self.source if equal is None else equal[self.source]
        return (1 - strength) * share + strength * float(source == mine)

    def pick(self, rows: Int[np.ndarray, " kept"]) -> "Strengthened":
        index = torch.from_numpy(rows).to(self.strength.device)
        bias = None if self.bias is None else self.bias[index]
        return Strengthened(self.inner.pick(rows), self.source, self.strength[index], bias)


def _n_units(chosen: Choice) -> int:
    """How many units a choice tells apart; 1 where all of a row run the same."""
    return chosen.ask(
        rows=lambda _: 1,
        units=lambda by_unit: sum(len(units) for units, _ in by_unit.groups),
        strengths=lambda mixed: mixed.strength.shape[1] if mixed.by_unit else _n_units(mixed.inner),
    )


def _numbers(strength: Tensor) -> np.ndarray:
    return strength.detach().cpu().double().numpy()


def atoms(cuts: Iterable[Sequence[int]], n_units: int) -> Int[np.ndarray, " unit"]:
    """The coarsest partition of units that every one of `cuts` respects: the atom of each unit."""
    atom_of = np.zeros(n_units, dtype=np.int64)
    sizes = [n_units]
    for cut in dict.fromkeys(map(tuple, cuts)):
        inside = np.array(cut)
        found, where, counts = np.unique(atom_of[inside], return_inverse=True, return_counts=True)
        for number, (atom, count) in enumerate(zip(found, counts, strict=True)):
            if count < sizes[atom]:
                atom_of[inside[where.reshape(-1) == number]] = len(sizes)
                sizes[atom] -= count
                sizes.append(count)
    return atom_of


def agreed(codes: Int32[np.ndarray, "atom case"], base: int = 0) -> Int32[np.ndarray, " case"]:
    """The code that all units have, or the base's where they differ."""
    agree = (codes == codes[0]).all(axis=0)
    return np.where(agree, codes[0], np.int32(base)).astype(np.int32)


def grouped(
    codes: Int32[np.ndarray, "atom case"],
    whole: Int32[np.ndarray, " case"],
    atom_of: Int[np.ndarray, " unit"],
    real: Bool[np.ndarray, " rows"],
    mixtures: Mixtures,
    of_row: Int[np.ndarray, " rows"] | None = None,
) -> Choice:
    """The choice of a site whose units' codes are given by atom.

    Args:
        codes: for each row, or for each of the cases that `of_row` names by number.
        whole: likewise, of what belongs to no unit.
        atom_of: the atom of each unit.
        real: rows that are not padding.
        mixtures: what the codes encode.
        of_row: the case of each row.
    """

    def rows(of_cases: np.ndarray) -> Selection:
        return Selection(of_cases if of_row is None else of_cases[of_row], real, mixtures)

    distinct, group_of = np.unique(codes, axis=0, return_inverse=True)
    if len(distinct) == 1 and np.array_equal(distinct[0], whole):
        return rows(whole)
    unit_group = group_of.reshape(-1)[atom_of]
    order = np.argsort(unit_group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(unit_group))[:-1])
    groups = tuple(
        (tuple(units.tolist()), rows(of_cases))
        for units, of_cases in zip(members, distinct, strict=True)
    )
    return UnitSelection(groups, rows(whole))
