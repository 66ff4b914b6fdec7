"""A graft resolved against one batch: which source every row of every linear map uses.

Rows are the places `[batch · pos]` of a batch, in that order. Index lists are made on the host,
once per mask, and copied to the device without waiting for it; the forward only looks them up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from graftlens.components import (
    COMPONENTS,
    HEAD_COMPONENTS,
    Component,
    expand_components,
    layer_group,
    suggest,
)
from graftlens.graft import Graft, Rule, Span
from graftlens.model.arch import Architecture, Site
from graftlens.model.inputs import Batch
from graftlens.prompts import PromptError, Tokenized

#: Source -> the first source with the same tensors. Rows of equal sources make one block.
Equal = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The rows that one source computes."""

    source: int
    rows: Int[Tensor, " rows"]


class Selection:
    """Which source each row uses at one site; shared by all sites that agree."""

    def __init__(self, choice: Int8[np.ndarray, " rows"], real: Bool[np.ndarray, " rows"]) -> None:
        """`choice` is the source index of each row; rows that are not `real` may use any."""
        used = np.unique(choice[real]) if real.any() else np.zeros(1, dtype=np.int8)
        # Padding follows the prompts where they agree, so that a uniform mask stays uniform.
        self.choice = np.where(real, choice, used[0]) if len(used) == 1 else choice
        self.sources: tuple[int, ...] = tuple(int(s) for s in used)
        self._blocks: dict[tuple[Equal, torch.device], tuple[Block, ...]] = {}
        self._rows: dict[torch.device, Int[Tensor, " rows"]] = {}

    def only(self, equal: Equal) -> int | None:
        """The source that computes every row, or None where several do."""
        first = equal[self.sources[0]]
        return first if all(equal[s] == first for s in self.sources) else None

    def blocks(self, equal: Equal, device: torch.device) -> tuple[Block, ...]:
        """The rows of each source, sources with equal tensors taken together."""
        key = (equal, device)
        if key not in self._blocks:
            merged = np.asarray(equal, dtype=np.int64)[self.choice]
            self._blocks[key] = tuple(
                Block(
                    int(s),
                    torch.from_numpy(np.flatnonzero(merged == s)).to(device, non_blocking=True),
                )
                for s in np.unique(merged)
            )
        return self._blocks[key]

    def per_row(self, device: torch.device) -> Int[Tensor, " rows"]:
        """The source index of each row."""
        if device not in self._rows:
            self._rows[device] = torch.from_numpy(self.choice.astype(np.int64)).to(
                device, non_blocking=True
            )
        return self._rows[device]


@dataclass(frozen=True)
class HeadSelection:
    """A site whose heads differ: groups of heads, each with its own selection.

    `whole` says where a part that belongs to no head (o's bias) comes from: the source that all
    heads of a row share, else the base.
    """

    groups: tuple[tuple[tuple[int, ...], Selection], ...]
    whole: Selection
    _indices: dict[torch.device, tuple[Int[Tensor, " heads"], ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def on(self, device: torch.device) -> Iterator[tuple[Int[Tensor, " heads"], Selection]]:
        """Each group's heads as an index on `device`, with the group's selection."""
        if device not in self._indices:
            self._indices[device] = tuple(
                torch.tensor(heads).to(device, non_blocking=True) for heads, _ in self.groups
            )
        return zip(self._indices[device], (s for _, s in self.groups), strict=True)


def plain(chosen: Selection | HeadSelection) -> Selection:
    """The selection of a site that has no heads."""
    assert isinstance(chosen, Selection), "only q, k, v and o have heads"
    return chosen


@dataclass(frozen=True)
class GraftMask:
    """A graft resolved for one batch, reusable for every batch of the same prompts.

    Attributes:
        graft: what was resolved.
        sources: the model's source names; index 0 is the base.
        shape: (batch, pos) of the batch it was resolved for.
        places: per prompt, its first column, its own length, and its length with what follows;
            empty for a part of a mask.
    """

    graft: Graft
    sources: tuple[str, ...]
    shape: tuple[int, int]
    sites: Mapping[Site, Selection | HeadSelection] = field(repr=False)
    places: tuple[tuple[int, int, int], ...] = ()

    def __getitem__(self, site: Site) -> Selection | HeadSelection:
        return self.sites[site]

    def source_index(
        self, component: Component | str, layer: int | None = None, head: int | None = None
    ) -> Int8[np.ndarray, "batch pos"]:
        """Which source (by index) each place uses at one site; for views and tests.

        Raises:
            KeyError: a site that the architecture does not have.
        """
        chosen = self.sites[(Component(component), layer)]
        if isinstance(chosen, HeadSelection):
            if head is None:
                chosen = chosen.whole
            else:
                chosen = next(s for heads, s in chosen.groups if head in heads)
        return chosen.choice.reshape(self.shape).astype(np.int8)

    def take(
        self, batch: Int[np.ndarray, " batch"] | None, pos: Int[np.ndarray, " pos"] | None
    ) -> "GraftMask":
        """The mask of some prompts (rows of the batch) and some positions only; None is all."""
        rows = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape)
        rows = rows if batch is None else rows[batch]
        return self.pick(rows if pos is None else rows[:, pos])

    def pick(self, rows: Int[np.ndarray, "batch pos"]) -> "GraftMask":
        """The mask of any rows, numbered through the batch, laid out in a new shape."""
        keep = rows.reshape(-1)
        real = np.ones(keep.size, dtype=bool)
        made: dict[int, Selection | HeadSelection] = {}

        def cut(chosen: Selection) -> Selection:
            return Selection(chosen.choice[keep], real)

        for chosen in self.sites.values():
            if id(chosen) not in made:
                made[id(chosen)] = (
                    cut(chosen)
                    if isinstance(chosen, Selection)
                    else HeadSelection(
                        tuple((heads, cut(s)) for heads, s in chosen.groups), cut(chosen.whole)
                    )
                )
        sites = {site: made[id(chosen)] for site, chosen in self.sites.items()}
        return GraftMask(self.graft, self.sources, (rows.shape[0], rows.shape[1]), sites)


#: What says which weights run: a graft, its one-line text, a resolved mask, or nothing (the base).
GraftLike = Graft | GraftMask | str | None


def resolve(
    graft: Graft, batch: Batch, arch: Architecture, sources: Sequence[str], base: int = 0
) -> GraftMask:
    """Work out which source every row uses at every site.

    Raises:
        PromptError: a rule that a prompt cannot satisfy (no such span, position or run, or
            nothing selected), with the prompt's number.
        ValueError: a source, component, layer or head that the model does not have.
    """
    plans = [sites_of(rule, arch, sources) for rule in graft.rules]
    places = [_rows_of(rule, batch) for rule in graft.rules]
    real = batch.real.reshape(-1)
    made: dict[object, Selection | HeadSelection] = {}

    def at(site: Site) -> Selection | HeadSelection:
        component, _ = site
        active = tuple(i for i, plan in enumerate(plans) if site in plan)
        by_head = any(graft.rules[i].heads is not None for i in active)
        key = (active, arch.n_units_of(component) if by_head else None)
        if key not in made:
            n_heads = arch.n_units_of(component) if by_head else 1
            choice = np.full((n_heads, real.size), base, dtype=np.int8)
            for i in active:
                heads = graft.rules[i].heads
                selected = slice(None) if heads is None else list(heads)
                source = sources.index(graft.rules[i].source)
                choice[selected] = np.where(places[i], np.int8(source), choice[selected])
            made[key] = grouped(choice, real, base)
        return made[key]

    sites = {site: at(site) for site in arch.sites}
    shape = (len(batch.prompts), batch.real.shape[1])
    return GraftMask(graft, tuple(sources), shape, sites, batch.places)


def uniform_source(
    graft: Graft, site: Site, arch: Architecture, sources: Sequence[str]
) -> int | None:
    """The one source that a site uses in every prompt, or None where positions may differ."""
    source: int | None = 0
    for rule in graft.rules:
        if site in sites_of(rule, arch, sources):
            everywhere = rule.at == Span("all") and rule.heads is None
            source = sources.index(rule.source) if everywhere else None
    return source


def grouped(
    choice: Int8[np.ndarray, "heads rows"], real: Bool[np.ndarray, " rows"], base: int
) -> Selection | HeadSelection:
    distinct, group_of = np.unique(choice, axis=0, return_inverse=True)
    if len(distinct) == 1:
        return Selection(distinct[0], real)
    groups = tuple(
        (tuple(np.flatnonzero(group_of.reshape(-1) == g).tolist()), Selection(rows, real))
        for g, rows in enumerate(distinct)
    )
    agree = (choice == choice[0]).all(axis=0)
    whole = np.where(agree, choice[0], np.int8(base)).astype(np.int8)
    return HeadSelection(groups, Selection(whole, real))


def sites_of(rule: Rule, arch: Architecture, sources: Sequence[str]) -> frozenset[Site]:
    if rule.source not in sources:
        raise ValueError(
            f"rule {str(rule)!r}: no source {rule.source!r}. This model has: {' '.join(sources)}."
            f"{suggest(rule.source, sources)}"
        )
    components = expand_components(rule.components, arch.components, arch.family)
    everywhere = rule.layers == ("all",)
    layers: set[int] = set()
    for item in rule.layers:
        if isinstance(item, str):
            members = layer_group(item, arch.n_layers)
            if not members:
                raise ValueError(
                    f"rule {str(rule)!r}: layer group {item!r} is empty in a model of "
                    f"{arch.n_layers} layers. Name a larger group, or layer numbers."
                )
            layers.update(members)
        elif item < arch.n_layers:
            layers.add(item)
        else:
            raise ValueError(
                f"rule {str(rule)!r}: no layer {item}. {arch.family} here has {arch.n_layers} "
                f"layers: 0 to {arch.n_layers - 1}."
            )
    outside = [c for c in components if not COMPONENTS[c].in_layers]
    if not everywhere:
        named = [c for c in outside if c in rule.components]
        if named:
            raise ValueError(
                f"rule {str(rule)!r}: {' '.join(named)} stands outside the layers, so layers "
                "cannot restrict it. Give it a rule of its own, without layers."
            )
        outside = []
    inside = [c for c in components if COMPONENTS[c].in_layers]
    for component in inside:
        if rule.heads is not None and component in HEAD_COMPONENTS:
            n_heads = arch.n_units_of(component)
            if max(rule.heads) >= n_heads:
                kind = f"{COMPONENTS[component].cut}s"
                raise ValueError(
                    f"rule {str(rule)!r}: no head {max(rule.heads)} in {component}, which has "
                    f"{n_heads} {kind} here: 0 to {n_heads - 1}."
                )
    return frozenset([(c, None) for c in outside] + [(c, l) for c in inside for l in layers])


def _rows_of(rule: Rule, batch: Batch) -> Bool[np.ndarray, " rows"]:
    rows = np.zeros(batch.real.shape, dtype=bool)
    for i, prompt in enumerate(batch.prompts):
        start, total = batch.starts[i], batch.totals[i]
        try:
            rows[i, start : start + total] = select(rule, prompt, total)
        except PromptError as error:
            raise PromptError(f"prompt {i}, {error}") from None
    return rows.reshape(-1)


def select(rule: Rule, prompt: Tokenized, total: int | None = None) -> Bool[np.ndarray, " pos"]:
    """The positions of a prompt (and of what follows it, up to `total`) that a rule selects.

    What follows a prompt is generated from, one position after another: it counts as `last`.

    Raises:
        PromptError: a span, run or position that the prompt lacks, or nothing selected.
    """
    length = len(prompt)
    total = total or length
    runs = prompt.runs
    if total > length:
        tail = {"last": (tuple(range(length - 1, total)),), "all": (tuple(range(total)),)}
        runs = {**runs, **tail}
    try:
        chosen = rule.at.select(runs, length, total)
    except ValueError as error:
        raise PromptError(f"rule {str(rule)!r}: {error}") from None
    if not chosen.any():
        raise PromptError(
            f"rule {str(rule)!r}: {rule.at} selects none of the {total} positions. "
            "Change the positions, or leave the rule out."
        )
    return chosen
