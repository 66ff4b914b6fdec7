"""Sets of places as grafts: rules gathered over layers, what is left without them, their size."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftlens.components import COMPONENTS, Component, Cut
from graftlens.find.places import Place
from graftlens.graft import Graft, Rule
from graftlens.model.arch import Architecture
from graftlens.positions import At
from graftlens.prompts import Tokenized

#: A place without its unit: component, layer, position.
Site = tuple[Component, int | None, str | int]


def site_of(place: Place) -> Site:
    """The site, with its position, that a place is at or in."""
    return Component(place.component), place.layer, place.position


def gathered(places: Iterable[Place], source: str, arch: Architecture) -> Graft:
    """One graft of a source at all these places, in as few rules as say it.

    At each position, components with the same layers share a rule: `sft @ last : q + k : 20-23`.
    Components outside the layers have rules without layers, and heads or neurons rules of their
    own, one for the layers with the same ones; where all units of a site are there, the rule names
    none, so that what belongs to no unit (the bias of o and mlp_out) comes along.

    Raises:
        ValueError: a bias or a direction, which no graft can choose by itself.
    """
    whole: dict[Site, tuple[int, ...] | None] = {}
    ats: dict[str | int, At] = {}
    for place in places:
        site = site_of(place)
        if place.position not in ats or isinstance(place.unit, str):
            ats[place.position] = place.rule(source).at
        if place.unit is None:
            whole[site] = None
        elif (known := whole.get(site, ())) is not None:
            assert isinstance(place.unit, int)  # `rule` refuses all others
            whole[site] = (*known, place.unit)
    layers: dict[tuple[str | int, Component, tuple[int, ...] | None], list[int]] = {}
    for (component, layer, position), units in whole.items():
        if units is not None:
            units = tuple(sorted(set(units)))
            units = None if len(units) == arch.n_units_of(component) else units
        layers.setdefault((position, component, units), []).extend([] if layer is None else [layer])
    rules: list[Rule] = []
    for position, at in ats.items():
        here = {key[1:]: tuple(sorted(of)) for key, of in layers.items() if key[0] == position}
        ordered = sorted(here.items(), key=lambda item: (_place_of(item[0][0]), item[1]))
        joined: dict[tuple[int, ...], list[str]] = {}
        for (component, units), of in ordered:
            if units is None:
                joined.setdefault(of, []).append(str(component))
        rules += [Rule(source, at, tuple(c), of or ("all",)) for of, c in joined.items()]
        for (component, units), of in ordered:
            if units is not None:
                neurons = COMPONENTS[component].cut is Cut.NEURON
                heads, some = (None, units) if neurons else (units, None)
                rules.append(Rule(source, at, (str(component),), of, heads, some))
    return Graft(tuple(rules))


def _place_of(component: Component) -> int:
    return list(Component).index(component)


def without(places: Iterable[Place], full: Graft, base: str, arch: Architecture) -> Graft:
    """A full graft from which these places are taken out: there the base runs."""
    return full | gathered(places, base, arch)


@dataclass(frozen=True)
class Size:
    """How large a set of places is.

    Attributes:
        sites: sites at positions that it has a part in.
        units: heads or neurons, where it has parts of sites; 0 where it has whole sites only.
        parameters: numbers of weights and biases times the positions at which they run, a mean
            over prompts.
    """

    sites: int
    units: int
    parameters: float

    @classmethod
    def of(
        cls,
        places: Sequence[Place],
        arch: Architecture,
        biases: Iterable[str],
        positions: Mapping[str | int, float | int],
    ) -> "Size":
        """The size of these places.

        Args:
            places: the set.
            arch: the architecture.
            biases: the components that have a bias.
            positions: position -> how many tokens it is, a mean over prompts.
        """
        known = frozenset(biases)
        total = 0.0
        for place in places:
            component = Component(place.component)
            row, share = COMPONENTS[component], 1.0
            if place.unit is not None:
                share = 1 / arch.n_units_of(component)
            count = float(np.prod(arch.shape_of(component))) * share
            if component in known and (place.unit is None or row.axis == 0):
                count += float(np.prod(arch.shape_of(component, "bias"))) * share
            total += count * positions[place.position]
        units = sum(place.unit is not None for place in places)
        return cls(len({site_of(place) for place in places}), units, total)


def lengths_of(
    places: Iterable[Place], prompts: Sequence[Tokenized], totals: Sequence[int]
) -> dict[str | int, float | int]:
    """Position -> how many tokens it is, a mean over these prompts, each of which has so many
    tokens in all, with those that follow it."""
    ats = {place.position: place.rule("any").at for place in places}
    runs = [(p.spans_with(n), len(p), n) for p, n in zip(prompts, totals, strict=True)]
    return {
        position: float(np.mean([at.select(*run).sum() for run in runs]))
        for position, at in ats.items()
    }
