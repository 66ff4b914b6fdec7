"""A graft resolved against one batch: what every row of every linear map runs.

Rows are the places `[batch · pos]` of a batch, in that order. Index lists are made on the host,
once per mask, and copied to the device without waiting for it; the forward only looks them up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftlens.chat import ROLES
from graftlens.components import (
    COMPONENTS,
    Component,
    brief,
    expand_components,
    layer_group,
    suggest,
)
from graftlens.graft import Graft, Rule
from graftlens.model.arch import Architecture, Site
from graftlens.model.choice import (
    Choice,
    Mixture,
    Mixtures,
    Strengthened,
    agreed,
    atoms,
    grouped,
)
from graftlens.model.inputs import Batch
from graftlens.positions import Span
from graftlens.prompts import PromptError, Tokenized


@dataclass(frozen=True)
class GraftMask:
    """A graft resolved for one batch, reusable for every batch of the same prompts.

    Attributes:
        graft: what was resolved.
        sources: the model's source names; index 0 is the base.
        shape: (batch, pos) of the batch it was resolved for.
        extents: per prompt, its first column, its own length, and its length with what follows;
            empty for a part of a mask.
        n_units: how many heads or neurons each component has that is cut into them; empty where
            nobody asks.
    """

    graft: Graft
    sources: tuple[str, ...]
    shape: tuple[int, int]
    sites: Mapping[Site, Choice] = field(repr=False)
    extents: tuple[tuple[int, int, int], ...] = ()
    n_units: Mapping[Component, int] = field(default_factory=dict, repr=False)

    def __getitem__(self, site: Site) -> Choice:
        return self.sites[site]

    def shares(
        self, component: Component | str, layer: int | None = None, unit: int | None = None
    ) -> Float[np.ndarray, "source batch pos"]:
        """Each source's share of each place at one site, tensors of strengths (`strengthened`)
        included; for views and tests.

        Args:
            component: what is asked about.
            layer: its layer; None outside the layers.
            unit: a head or neuron. Without one, where units differ, the answer is for what belongs
                to no unit.

        Raises:
            KeyError: a site that the architecture does not have.
        """
        chosen = self.sites[(Component(component), layer)]
        found = [chosen.share(source, unit=unit) for source in range(len(self.sources))]
        return np.stack(found).reshape(-1, *self.shape)

    def source_index(
        self, component: Component | str, layer: int | None = None, unit: int | None = None
    ) -> Int[np.ndarray, "batch pos"]:
        """Which source (by index) each place uses at one site; for views and tests.

        Args: as for `shares`.

        Raises:
            KeyError: a site that the architecture does not have.
            ValueError: a mixture of sources somewhere at this site; `shares` says of what.
        """
        shares = self.shares(component, layer, unit)
        if not ((shares == 0) | (shares == 1)).all():
            raise ValueError(
                f"under {str(self.graft)!r} some places mix sources at {component}"
                f"{'' if layer is None else f' in layer {layer}'}. Ask mask.shares(…)."
            )
        return shares.argmax(axis=0)

    def strengthened(
        self,
        source: str,
        strengths: Mapping[tuple[str, int | None], Tensor],
        bias: Mapping[tuple[str, int | None], Tensor] | None = None,
    ) -> "GraftMask":
        """The mask with a source mixed in by tensors of strengths, which gradients reach.

        At each site given, y = (1 - s) * (what the mask runs there) + s * (the source's). Run the
        result as any mask: `model(prompts, graft=mask.strengthened(…))`; nothing but the strengths
        needs a gradient.

        Args:
            source: the name of what is mixed in.
            strengths: (component, layer) -> s for each row [batch · pos], the batch's rows one
                after another, or for each unit of each row [batch · pos, unit]: heads of q and o,
                key-value heads of k and v, neurons of mlp_in, mlp_gate and mlp_out.
            bias: (component, layer) -> s for each row [batch · pos] of the bias of o or mlp_out,
                which belongs to no unit; left out, it stays what it was. With strengths by row the
                bias goes with its weight.

        Raises:
            ValueError: a source or site that the mask lacks, or strengths of another shape.
        """
        if source not in self.sources:
            raise ValueError(
                f"no source {source!r}. This mask has: {' '.join(self.sources)}."
                f"{suggest(source, self.sources)}"
            )
        strengths = {(str(component), layer): s for (component, layer), s in strengths.items()}
        bias = {(str(component), layer): s for (component, layer), s in (bias or {}).items()}
        sites: dict[Site, Choice] = dict(self.sites)
        named = {(str(component), layer): (component, layer) for component, layer in sites}
        rows = self.shape[0] * self.shape[1]
        for key in {**strengths, **bias}:
            known = f"{key[0]}{'' if key[1] is None else f' in layer {key[1]}'}"
            for what, t in (("strengths", strengths.get(key)), ("bias strengths", bias.get(key))):
                if t is not None and not (isinstance(t, Tensor) and t.is_floating_point()):
                    raise ValueError(
                        f"{what} of {known} are {_kind_of(t)}. Give a tensor of floats: "
                        "torch.tensor([0.5, …])."
                    )
            site = named.get(key)
            if site is None or key not in strengths:
                what = "no such site in this mask" if site is None else "a bias alone"
                raise ValueError(
                    f"strengths of {known}: {what}. Give (component, layer) of a component that "
                    "the architecture has, the layer None outside the layers."
                )
            given, own = strengths[key], bias.get(key)
            shapes = [tuple(t.shape) for t in (given, own) if t is not None]
            if given.ndim not in (1, 2) or any(shape[:1] != (rows,) for shape in shapes):
                raise ValueError(
                    f"strengths of {known} have shape {list(shapes[0])}. Give one for each of the "
                    f"batch's {rows} rows, [batch · pos], or [batch · pos, unit]."
                )
            row = COMPONENTS[site[0]]
            n_units = self.n_units.get(site[0])
            if given.ndim == 2 and row.axis is None:
                raise ValueError(
                    f"strengths of {known} have shape {list(shapes[0])}, but {site[0]} has no "
                    f"units. Give one for each of the batch's {rows} rows, [{rows}]."
                )
            if given.ndim == 2 and n_units not in (None, given.shape[1]):
                raise ValueError(
                    f"strengths of {known} are for {given.shape[1]} units, but {site[0]} has "
                    f"{n_units} {row.cut}s. Give [{rows}, {n_units}]."
                )
            if own is not None and row.axis != 1:
                raise ValueError(
                    f"the bias of {known} goes with "
                    f"{'its weight' if row.axis is None else f'each {row.cut}'}, so it has no "
                    "strengths of its own. Leave them out; only the bias of o and of mlp_out "
                    "belongs to no unit."
                )
            if own is not None and (given.ndim == 1 or own.ndim != 1):
                raise ValueError(
                    f"the bias of {known} has strengths of its own, one per row, only where those "
                    "of its weight are by unit, [batch · pos, unit]."
                )
            sites[site] = Strengthened(sites[site], self.sources.index(source), given, own)
        return replace(self, sites=sites)

    def check_numbers(self, what: str) -> None:
        """That no tensor of strengths is mixed in, for what needs shares that are numbers.

        Raises:
            ValueError: one is, with the site's name and that of `what` needs it.
        """
        for (component, layer), chosen in self.sites.items():
            if chosen.blended is not None:
                raise ValueError(
                    f"a tensor of strengths is mixed in at {component}"
                    f"{'' if layer is None else f' in layer {layer}'}, which {what} does not know. "
                    'Write the strength as a rule: "0.5*sft @ last".'
                )

    @property
    def row_sources(self) -> list[list[str]]:
        """The sources that each prompt runs at any site, what follows it included."""
        real = np.zeros(self.shape, dtype=bool)
        for row, (start, _, total) in zip(real, self.extents, strict=True):
            row[start : start + total] = True
        used = np.zeros((self.shape[0], len(self.sources)), dtype=bool)
        for chosen in {id(chosen): chosen for chosen in self.sites.values()}.values():
            for _, selection in chosen.selections():
                for source in selection.sources:
                    has = selection.share(source).reshape(self.shape) != 0
                    used[:, source] |= (has & real).any(1)
        return [[self.sources[s] for s in np.flatnonzero(row)] for row in used]

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
        made: dict[int, Choice] = {}
        for chosen in self.sites.values():
            if id(chosen) not in made:
                made[id(chosen)] = chosen.pick(keep)
        sites = {site: made[id(chosen)] for site, chosen in self.sites.items()}
        return replace(self, shape=(rows.shape[0], rows.shape[1]), sites=sites, extents=())


#: What says which weights run: a graft, its one-line text, a resolved mask, or nothing (the base).
GraftLike = Graft | GraftMask | str | None


def resolve(
    graft: Graft, batch: Batch, arch: Architecture, sources: Sequence[str], base: int = 0
) -> GraftMask:
    """Work out what every row runs at every site.

    Raises:
        PromptError: a rule that a prompt cannot satisfy (no such span, position or occurrence, or
            nothing selected), with the prompt's number.
        ValueError: a source, component, layer, head or neuron that the model does not have.
    """
    plans = [sites_of(rule, arch, sources) for rule in graft.rules]
    places = [_rows_of(rule, batch) for rule in graft.rules]
    real = batch.real.reshape(-1)
    mixtures = Mixtures(len(sources))
    made: dict[object, Choice] = {}

    def made_at(site: Site) -> Choice:
        component, _ = site
        active = tuple(i for i, plan in enumerate(plans) if site in plan)
        cuts = [units for i in active if (units := graft.rules[i].of(component)) is not None]
        n_units = arch.n_units_of(component) if cuts else 1
        key = (active, n_units)
        if key not in made:
            atom_of = atoms(cuts, n_units)
            codes = np.full((atom_of.max() + 1, real.size), base, dtype=np.int32)
            whole = np.full(real.size, base, dtype=np.int32)
            for i in active:
                rule, at = graft.rules[i], places[i]
                if rule.strength == 0:
                    continue
                units = rule.of(component)
                chosen = slice(None) if units is None else np.unique(atom_of[list(units)])
                here = codes[chosen]
                source = sources.index(rule.source)
                try:
                    here[:, at] = mixtures.blend(here[:, at], source, rule.strength)
                    if units is None:
                        whole[at] = mixtures.blend(whole[at], source, rule.strength)
                except ValueError as error:
                    raise ValueError(f"graft {brief(str(graft))}: {error}") from None
                codes[chosen] = here
                if units is not None:
                    whole[at] = agreed(codes[:, at], base)
            made[key] = grouped(codes, whole, atom_of, real, mixtures)
        return made[key]

    sites = {site: made_at(site) for site in arch.sites}
    shape = (len(batch.prompts), batch.real.shape[1])
    n_units = {c: arch.n_units_of(c) for c in arch.components if COMPONENTS[c].axis is not None}
    return GraftMask(graft, tuple(sources), shape, sites, batch.extents, n_units)


def _kind_of(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of {str(given.dtype).removeprefix('torch.')}"
    return f"a {type(given).__name__}"


def multiplies_far(graft: Graft) -> bool:
    """Whether the strengths of some rules, if these met, could exceed what a float holds."""
    growth = (Decimal(1) + 2 * abs(Decimal(repr(float(r.strength)))) for r in graft.rules)
    return sum(float(g.log10()) for g in growth) > 300


def uniform_mixture(
    graft: Graft, site: Site, arch: Architecture, sources: Sequence[str]
) -> Mixture | None:
    """What a site runs in all places of every prompt, or None where positions may differ."""
    mixtures = Mixtures(len(sources))
    code: int | None = 0
    for rule in graft.rules:
        if rule.strength == 0 or site not in sites_of(rule, arch, sources):
            continue
        if rule.at != Span("all") or rule.of(site[0]) is not None:
            code = None
        elif code is not None or rule.strength == 1:
            now = np.array([code or 0], dtype=np.int32)
            code = int(mixtures.blend(now, sources.index(rule.source), rule.strength)[0])
    return None if code is None else mixtures[code]


def sites_of(rule: Rule, arch: Architecture, sources: Sequence[str]) -> frozenset[Site]:
    if rule.source not in sources:
        scaled = rule == Graft.rule(rule.source, strength=rule.strength).rules[0]
        raise ValueError(
            f"rule {str(rule)!r}: no source {rule.source!r}. This model has: {' '.join(sources)}."
            f"{suggest(rule.source, sources)}"
            + (
                f' If it is the rest of graft.scaled(…), name the base: base="{sources[0]}".'
                if scaled and rule.strength != 1
                else ""
            )
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
                f"rule {str(rule)!r}: {' '.join(named)} is outside the layers, so layers cannot "
                "restrict it. Give it a rule of its own, without layers."
            )
        outside = []
    inside = [c for c in components if COMPONENTS[c].in_layers]
    for component in inside:
        units = rule.of(component)
        n_units = arch.n_units_of(component)
        if units is not None and units[-1] >= n_units:
            word = str(COMPONENTS[component].cut)
            raise ValueError(
                f"rule {str(rule)!r}: no {word.split()[-1]} {units[-1]} in {component}, which has "
                f"{n_units} {word}s here: 0 to {n_units - 1}."
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

    Tokens after the prompt are one position after another: each counts as `last`. Where they are
    generated, a rule may reach them alone.

    Raises:
        PromptError: a span, occurrence or position that the prompt lacks, or nothing selected.
    """
    total = total or len(prompt)
    width = max(total, len(prompt) + prompt.generates)
    try:
        chosen = rule.at.select(prompt.spans_with(width), len(prompt), width)
    except ValueError as error:
        raise PromptError(f"rule {str(rule)!r}: {error}") from None
    if not chosen.any() and not rule.at.may_be_empty():
        none = f"none of the {width} positions"
        if silent := _silent(rule, prompt):  # without numbers, so that such prompts have one reason
            none = f"no position, as {' and '.join(silent)} says nothing in this conversation"
        raise PromptError(
            f"rule {str(rule)!r}: {rule.at} selects {none}. Change the positions, or leave the "
            "rule out."
        )
    return chosen[:total]


def _silent(rule: Rule, prompt: Tokenized) -> list[str]:
    """The roles that a rule names and that say nothing in a conversation."""
    return [
        role for role in ROLES if role in rule.at.names() and not any(prompt.spans.get(role, [()]))
    ]


def silenced(graft: Graft, prompt: Tokenized) -> bool:
    """Whether a conversation cannot run a graft for no other reason than that a role says nothing.

    Such a graft is as it should be; one that names an unknown span is not.
    """
    failing = []
    for rule in graft.rules:
        try:
            select(rule, prompt)
        except PromptError:
            failing.append(rule)
    for rule in failing:
        speaking = dict.fromkeys(_silent(rule, prompt), prompt.spans["all"])
        try:
            select(rule, replace(prompt, spans={**prompt.spans, **speaking}))
        except PromptError:
            return False
    return bool(failing)
