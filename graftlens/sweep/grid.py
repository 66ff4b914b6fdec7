"""Grids of grafts: positions × components × layers × heads × neurons × strengths × ranks × source,
written compactly."""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer

from graftlens.components import (
    COMPONENTS,
    HEAD_COMPONENTS,
    Component,
    brief,
    check_name,
    format_numbers,
    parse_components,
)
from graftlens.configfile import settings_from
from graftlens.data.settings import Settings
from graftlens.graft import Graft, Rule, format_number, parse_layers
from graftlens.model.arch import Architecture
from graftlens.model.made import Made
from graftlens.model.making import largest_rank
from graftlens.model.mask import sites_of
from graftlens.positions import At

_SIZES = re.compile(r"(?:([0-9]{1,9})\s*\.\.\s*)?([0-9]{1,9}|n)")

#: Tokens that have a choice of their own where dropout is drawn per token.
TOKENS = 64

#: How many grafts one grid may make. They are all written into the sweep's folder.
MAX_GRAFTS = 100_000


def _sizes(value: Any) -> int | str | tuple[int, ...]:
    """A window's sizes as written, after they were checked."""
    given = value if isinstance(value, list | tuple) else [value]
    if given and all(type(size) is int and size >= 1 for size in given):
        return tuple(given) if isinstance(value, list | tuple) else int(value)
    ends = _SIZES.fullmatch(value.strip()) if isinstance(value, str) else None
    if ends is None or any(end != "n" and int(end) < 1 for end in ends.groups("n")):
        raise ValueError(
            f"{brief(value)} is not a size: sizes count from 1. "
            'Write 3, "1..4", "1..n" or [1, 2, 4].'
        )
    if ends[1] and ends[2] != "n" and int(ends[1]) > int(ends[2]):
        raise ValueError(f"{value!r} runs backwards. Write {ends[2]}..{ends[1]}.")
    return str(value).strip()


class Windows(Settings):
    """Consecutive layers (or heads) of each size, at 0, stride, 2 stride, … while they
    fit."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    size: Annotated[int | str | tuple[int, ...], BeforeValidator(_sizes)]
    """Layers (heads, neurons) in a window: 3, "1..4", "1..n" or [1, 2, 4]; n is all there are."""

    stride: Annotated[int, Field(ge=1)] = 1
    """Layers (or heads) from the start of one window to the next."""

    def ranges(self, n: int, what: str) -> Iterator[str]:
        """Each window among `n` layers or heads (`what`) as a range, sizes in order.

        Raises:
            ValueError: a size beyond `n`.
        """
        sizes: Sequence[int]
        if isinstance(self.size, str):
            ends = _SIZES.fullmatch(self.size)
            assert ends is not None, "checked when it was made"
            high = n if ends[2] == "n" else int(ends[2])
            sizes = range(int(ends[1] or high), high + 1)
        else:
            sizes = self.size if isinstance(self.size, tuple) else (self.size,)
        # The last of a range is the largest: a mistyped range may be too long to iterate over.
        if not sizes or (sizes[-1] if isinstance(sizes, range) else max(sizes)) > n:
            raise ValueError(
                f"windows of size {self.size}: there are {n} {what} here, so sizes 1 to {n} fit."
            )
        for size in sizes:
            for start in range(0, n - size + 1, self.stride):
                yield str(start) if size == 1 else f"{start}-{start + size - 1}"


class WindowsEntry(Settings):
    """An entry of an axis that stands for many: `windows: {size: 1..n, stride: k}`."""

    windows: Windows


class CumulativeEntry(Settings):
    """An entry that stands for growing ranges: `cumulative: below` is 0, 0-1, 0-2, … up to all;
    `cumulative: above` is the last, the last two, …"""

    model_config = ConfigDict(use_attribute_docstrings=True)

    cumulative: Literal["below", "above"]
    """From which end they grow."""

    stride: Annotated[int, Field(ge=1)] = 1
    """Layers (or heads) by which a range is longer than the one before."""

    def ranges(self, n: int) -> Iterator[str]:
        """The ranges among n layers or heads, the shortest first; the last one is all."""
        sizes = [*range(self.stride, n, self.stride), n]
        for size in sizes:
            low = 0 if self.cumulative == "below" else n - size
            yield format_numbers(range(low, low + size))


class Dropout(Settings):
    """Leave out a share of what is grafted, at random: one graft for each rate and draw."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    rates: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(min_length=1)
    """Shares that are left out, 0 to 1."""

    draws: Annotated[int, Field(ge=1, le=MAX_GRAFTS)] = 1
    """Random choices for each rate (one if the rate is 0 or 1, where all choices are the same)."""

    by: Literal["count", "chance"] = "count"
    """`count` leaves out just that share, rounded; `chance` each with that probability."""

    unit: Literal["layer", "matrix"] = "layer"
    """Leave out whole layers, or components of single layers."""

    per: Literal["graft", "token"] | None = None
    """`graft`, as by default: one choice for all tokens; `token`: a choice for each token, as the
    paper's published code draws it (tokens that are a multiple of 64 positions apart share one)."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choices; draw i of a rate does not depend on the other rates and draws."""

    @property
    def count(self) -> int:
        """How many grafts it makes from one rule."""
        return sum(self.draws if 0 < rate < 1 else 1 for rate in self.rates)

    def variants(
        self, rule: Rule, arch: Architecture, sources: Sequence[str]
    ) -> Iterator[tuple[float, int, tuple[Rule, ...]]]:
        """(rate, draw, the rules that are left of `rule`), which has components in layers.

        Only the layers are grafted: components outside of them are left out at every rate.
        """
        sites = sorted(
            ((c, l) for c, l in sites_of(rule, arch, sources) if l is not None),
            key=lambda site: (list(Component).index(site[0]), site[1]),
        )
        if not sites:
            raise ValueError(f"dropout of {str(rule)!r}: it reaches no layer. Leave dropout out.")
        for rate in self.rates:
            for draw in range(self.draws if 0 < rate < 1 else 1):
                seed = f"dropout {self.seed} {rate} {draw} {self.by} {self.unit}"
                if self.per != "token" or not 0 < rate < 1:
                    yield rate, draw, tuple(self._left(rule, sites, rate, seed))
                    continue
                rules: list[Rule] = []
                for place in range(TOKENS):
                    at = At.parse(f"({rule.at}) & [{place} % {TOKENS}]")
                    one = replace(rule, at=at)
                    rules += self._left(one, sites, rate, f"{seed} {place}")
                yield rate, draw, tuple(rules)

    def _left(
        self, rule: Rule, sites: Sequence[tuple[Component, int]], rate: float | int, seed: str
    ) -> Iterator[Rule]:
        """The rules that are left of one rule after one choice."""
        units: list[Any] = sorted({l for _, l in sites}) if self.unit == "layer" else list(sites)
        rng = random.Random(seed)
        if self.by == "count":
            count = round(rate * len(units))
            out = {units[i] for i in rng.sample(range(len(units)), count)}
        else:
            out = {unit for unit in units if rng.random() < rate}
        kept: dict[tuple[int, ...], list[str]] = {}
        for component in dict.fromkeys(c for c, _ in sites):
            layers = tuple(
                l
                for c, l in sites
                if c == component and (l if self.unit == "layer" else (c, l)) not in out
            )
            if layers:
                kept.setdefault(layers, []).append(str(component))
        names = [str(c) for c in dict.fromkeys(c for c, _ in sites)]
        for layers, components in kept.items():
            # What keeps all of the rule's components is written as the rule writes them.
            own = rule.components if components == names else tuple(components)
            yield replace(rule, components=own, layers=layers)


@dataclass(frozen=True)
class GridGraft:
    """One graft of a grid, and which entry of each axis it is.

    Attributes:
        name: its name in tables.
        graft: what is run.
        tags: `position`, `component`, `layer`, `head`, `neuron`, `source` as text; `strength`, a
            number; of a grid of ranks `source_rank`, a number; `layers`, how many of them; with
            dropout `rate` (the share left out) and `draw` (a number), too.
    """

    name: str
    graft: Graft
    tags: Mapping[str, Any]


#: One entry of an axis: text in the graft grammar, `each`, windows or growing ranges.
Entry = str | WindowsEntry | CumulativeEntry


def _axis(read: Callable[[Any], Entry]) -> BeforeValidator:
    """A list of entries, or a single one."""

    def entries(value: Any) -> tuple[Entry, ...]:
        given = value if isinstance(value, list | tuple) else [value]
        if not given:
            raise ValueError("the list is empty. Name an entry, or leave the axis out for all.")
        return tuple(read(entry) for entry in given)

    return BeforeValidator(entries)


def _position(value: Any) -> str:
    return str(At.parse(value))


def _component(value: Any) -> str:
    if value == "each":
        return value
    if not isinstance(value, str | list | tuple):
        raise ValueError(
            f'{brief(value)} is not a component. Write names, such as q, "o + mlp" or [o, mlp].'
        )
    return " + ".join(parse_components(value))


def _numbered(check: Callable[[Any], object], joint: str) -> Callable[[Any], Entry]:
    """An entry over layers or heads: windows, `each`, or what `check` does not refuse."""

    def entry(value: Any) -> Entry:
        if isinstance(value, WindowsEntry | CumulativeEntry):
            return value
        if isinstance(value, dict) and "cumulative" in value:
            return settings_from(CumulativeEntry, value)
        if isinstance(value, dict):
            return settings_from(WindowsEntry, value)
        if value != "each":
            check(value)
        return joint.join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return entry


def _check_heads(value: Any) -> None:
    if value is None:
        raise ValueError("heads is empty. Name heads, or leave the axis out for all.")
    Graft.rule("x", components="q", heads=value)


def _check_units(value: Any) -> None:
    if value is None:
        raise ValueError("units is empty. Name neurons, or leave the axis out for all.")
    Graft.rule("x", components="mlp", units=value)


def _strengths(value: Any) -> tuple[float, ...]:
    given = value if isinstance(value, list | tuple) else [value]
    if not given:
        raise ValueError("the list is empty. Name a strength, or leave the axis out for 1.")
    return tuple(Graft.rule("x", strength=strength).rules[0].strength for strength in given)


def _ranks(value: Any) -> tuple[int | str, ...]:
    given = value if isinstance(value, list | tuple) else [value]
    for rank in given:
        if rank != "all" and (type(rank) is not int or rank < 1):
            raise ValueError(f"{brief(rank)} is not a rank. Write numbers from 1, or all.")
    if not given:
        raise ValueError("the list is empty. Name a rank, or leave the axis out.")
    return tuple(given)


def _source(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{brief(value)} is not a source's name. Put it in quotes if it is.")
    return value


#: A graft as one line of text or a list of rules; kept as a graft, written as one line.
GraftField = Annotated[
    InstanceOf[Graft],
    BeforeValidator(lambda v: v if isinstance(v, Graft) else Graft.from_list(v)),
    PlainSerializer(str),
]


class Grid(Settings):
    """One graft for each combination of its axes. An axis is a list of entries in the graft
    grammar, where a list inside the list is one entry; a single entry needs no list."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    positions: Annotated[tuple[str, ...], _axis(_position)] = ("all",)
    """Where: "first_entity", "first_entity + last", "~last", -1 or [0, -1] (token positions)."""

    components: Annotated[tuple[str, ...], _axis(_component)] = ("all",)
    """Components or groups: "q", "attn", "o + mlp" or [o, mlp]; `each`: every component that the
    architecture has in its layers, alone."""

    layers: Annotated[tuple[Entry, ...], _axis(_numbered(parse_layers, " + "))] = ("all",)
    """Layers: all, upper_half, 3, [3, 4], "8-15"; `each`: every layer alone; `windows: …`; or
    `cumulative: below` (or `above`)."""

    heads: Annotated[tuple[Entry, ...], _axis(_numbered(_check_heads, ","))] = ("all",)
    """Heads of q, o (query heads) or k, v (key-value heads): all, 0, [0, 1], "0-3", `each` or
    `windows: …`."""

    units: Annotated[tuple[Entry, ...], _axis(_numbered(_check_units, ","))] = ("all",)
    """Neurons of mlp_in, mlp_gate and mlp_out: all, 12, [12, 13], "12-15", `each` or
    `windows: …`."""

    strengths: Annotated[tuple[float, ...], BeforeValidator(_strengths)] = (1.0,)
    """How much of the source: 1 is its weights, 0 none of it, 2 and -1 extrapolate."""

    ranks: Annotated[tuple[int | Literal["all"], ...], BeforeValidator(_ranks)] | None = None
    """How many singular directions of each matrix's difference from the base: of a source `sft`, 8
    is the source `sft_rank8`, {of: sft, rank: 8}; `all` is the source itself."""

    source: Annotated[tuple[str, ...], _axis(_source)] | None = None
    """Where the weights come from; by default each source but the base."""

    base: GraftField = Graft()
    """A graft that is applied below every graft of the grid."""

    dropout: Dropout | None = None
    """Leave out a share of the grafted layers at random; `rates` and `draws` make the grafts."""

    name: Annotated[str, AfterValidator(check_name)] | None = None
    """A prefix of the grafts' names, which are "name: text"; by default their text is the name."""

    def made(self, sources: Sequence[str]) -> dict[str, Made]:
        """The sources that the axis of ranks adds to those given, the base first."""
        return {
            _of_rank(source, rank): Made(of=source, rank=rank)
            for source in self.source or sources[1:]
            for rank in self.ranks or ()
            if isinstance(rank, int)
        }

    def grafts(self, arch: Architecture, sources: Sequence[str]) -> Iterator[GridGraft]:
        """A graft for every combination, the source changing fastest.

        Args:
            arch: says how many layers and heads `each` and windows run over.
            sources: the names of the sources that are given, the base first.

        Raises:
            ValueError: windows that do not fit, heads or neurons of components that have none or
                differ, more than `MAX_GRAFTS` grafts (which is said before any is made).
        """
        components = list(self._components(arch))
        layers = list(_expanded(self.layers, lambda: arch.n_layers, "layers"))
        heads = {
            entry: list(_expanded(self.heads, partial(_n_heads, entry, arch), "heads"))
            for entry in dict.fromkeys(components)
        }
        units = list(_expanded(self.units, lambda: arch.d_mlp, "neurons"))
        chosen = self.source or sources[1:]
        count = len(self.positions) * sum(len(heads[entry]) for entry in components)
        ranks = self.ranks or (None,)
        count *= len(layers) * len(units) * len(self.strengths) * len(ranks) * len(chosen)
        known = (*sources, *self.made(sources))
        count *= 1 if self.dropout is None else self.dropout.count
        if count > MAX_GRAFTS:
            raise ValueError(
                f"this grid makes {count:,} grafts ({len(self.positions)} positions, "
                f"{len(components)} components, {len(layers)} layers, …); at most {MAX_GRAFTS:,} "
                "are allowed. Leave entries out, or make several sweeps."
            )
        for at, entry in product(self.positions, components):
            axes = product(layers, heads[entry], units, self.strengths, ranks, chosen)
            for layer, head, unit, strength, rank, source in axes:
                used = _of_rank(source, rank) if isinstance(rank, int) else source
                rule = Graft.rule(used, at, entry, layer, head, unit, strength)
                tags: dict[str, Any] = {"position": at, "component": entry, "layer": layer}
                tags |= {"head": head, "neuron": unit, "strength": strength, "source": source}
                if rank is not None:
                    tags["source_rank"] = largest_rank(arch) if rank == "all" else rank
                tags["layers"] = _n_layers(rule.rules[0], arch, known)
                if self.dropout is None:
                    yield self._named(self.base | rule, tags, used)
                    continue
                for rate, draw, rules in self.dropout.variants(rule.rules[0], arch, known):
                    drawn = {"rate": rate, "draw": draw}
                    yield self._named(self.base | Graft(rules), tags | drawn, used)

    def _components(self, arch: Architecture) -> Iterator[str]:
        for entry in self.components:
            if entry == "each":
                yield from (str(c) for c in arch.components if COMPONENTS[c].in_layers)
            else:
                yield entry

    def _named(self, graft: Graft, tags: Mapping[str, Any], used: str) -> GridGraft:
        name = str(graft)
        if "rate" in tags:  # the rules of a draw mean nothing to a reader
            units = tags["head"] if tags["neuron"] == "all" else f"n{tags['neuron']}"
            written = [tags["position"], tags["component"], tags["layer"], units]
            while len(written) > 1 and written[-1] == "all":
                written.pop()
            place = " : ".join(written)
            factor = "" if tags["strength"] == 1 else f"{format_number(tags['strength'])}*"
            each = " per token" if self.dropout is not None and self.dropout.per == "token" else ""
            name = f"{factor}{used} @ {place} - {tags['rate']:g}{each} ({tags['draw']})"
        return GridGraft(name if self.name is None else f"{self.name}: {name}", graft, tags)


def _of_rank(source: str, rank: int) -> str:
    """The name of a source's best part of a rank."""
    return f"{source}_rank{rank}"


def _n_layers(rule: Rule, arch: Architecture, sources: Sequence[str]) -> int | None:
    """How many layers a rule reaches; None for one that cannot be run, as its check will say."""
    try:
        return len({l for _, l in sites_of(rule, arch, sources) if l is not None})
    except ValueError:
        return None


def _expanded(entries: Sequence[Entry], count: Callable[[], int], what: str) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, WindowsEntry):
            yield from entry.windows.ranges(count(), what)
        elif isinstance(entry, CumulativeEntry):
            yield from entry.ranges(count())
        elif entry == "each":
            yield from map(str, range(count()))
        else:
            yield entry


def _n_heads(components: str, arch: Architecture) -> int:
    """How many heads `each` and windows run over for an entry of the components' axis."""
    names = parse_components(components)
    if not HEAD_COMPONENTS.issuperset(names):
        return arch.n_heads  # the rule itself says that these have no heads
    counts = {arch.n_units_of(Component(name)) for name in names}
    if len(counts) > 1:
        raise ValueError(
            f"heads of {components!r}: q and o have {arch.n_heads} heads here, k and v "
            f"{arch.n_kv_heads}. Give them separate entries."
        )
    return counts.pop()
