"""Random sets that look like a found one: as many sites of each component at each position."""

import math
from collections.abc import Sequence

import numpy as np

from graftlens.components import Component
from graftlens.find.places import Place
from graftlens.find.sets import site_of
from graftlens.model.arch import Architecture


def matched_sets(
    found: Sequence[Place],
    searched: Sequence[Place],
    arch: Architecture,
    *,
    count: int,
    seed: int,
) -> list[tuple[Place, ...]]:
    """Random sets with the found one's number of sites of each component at each position.

    Layers are drawn without replacement among those that were searched; a site of which the found
    set has some heads or neurons has as many, drawn at random, in a layer drawn at random. Empty
    where the found set has every searched site of each of its components and positions, whole: no
    other set is like it.

    Args:
        found: the set.
        searched: all whole sites that it was chosen from, with their positions.
        arch: the architecture.
        count: how many sets to draw.
        seed: of the draws.
    """
    inside: dict[tuple[Component, str | int], dict[int | None, int | None]] = {}
    for place in found:
        component, layer, position = site_of(place)
        units = inside.setdefault((component, position), {})
        units[layer] = None if place.unit is None else (units.get(layer) or 0) + 1
    layers: dict[tuple[Component, str | int], list[int | None]] = {}
    for place in searched:
        component, layer, position = site_of(place)
        layers.setdefault((component, position), []).append(layer)
    ways = math.prod(
        math.comb(len(layers[key]), len(units))
        * math.prod(math.comb(arch.n_units_of(key[0]), n) for n in units.values() if n is not None)
        for key, units in inside.items()
    )
    if ways == 1:
        return []
    rng = np.random.default_rng([seed, 2])
    drawn = []
    for _ in range(count):
        places: list[Place] = []
        for (component, position), units in inside.items():
            known = layers[component, position]
            chosen = rng.permutation(len(known))[: len(units)].tolist()
            for place, n in zip(chosen, units.values(), strict=True):
                some = (
                    [None]
                    if n is None
                    else rng.permutation(arch.n_units_of(component))[:n].tolist()
                )
                places += [Place(component, known[place], position, unit) for unit in some]
        drawn.append(tuple(places))
    return drawn
