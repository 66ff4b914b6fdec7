"""Places that a graft can choose, and tables with a row for each place of each prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from graftlens.components import COMPONENTS, Component, Cut, Side, brief
from graftlens.graft import Rule
from graftlens.model.arch import Architecture, Site
from graftlens.positions import At

#: A head or neuron by its number, "bias" (what belongs to none of them), a singular direction from
#: "d0", or None for a whole site.
Unit = int | str | None

#: The columns of a table that say which place of which prompt a row is about.
PLACE = ("component", "layer", "position", "unit")

#: Scores of the two tables, the first that a table has being what places are ordered by.
SCORES = ("ig", "at_base", "at_full", "alone", "missing")


@total_ordering
@dataclass(frozen=True)
class Place:
    """A component of a layer at a position, or one of its heads or neurons there.

    Places are ordered as the model runs: what makes the layers' input, layer by layer, the output.

    Attributes:
        component: the component.
        layer: its layer; None outside the layers.
        position: an expression over spans, as text, or the number of a token. That of
            `positions=[…, "rest"]` is written out: ``~(first_entity + last)``.
        unit: a head (a query head of q and o, a key-value head of k and v) or a neuron; "bias" of o
            and mlp_out, which belongs to none; a singular direction, "d0" the first. None is all.
    """

    component: Component
    layer: int | None
    position: str | int
    unit: Unit = None

    def _order(self) -> tuple[Any, ...]:
        side = COMPONENTS[self.component].side
        depth = {Side.INPUT: 0, Side.OUTPUT: 2}.get(side, 1)
        number = isinstance(self.position, int)
        at = (self.position, "") if number else (math.inf, str(self.position))
        unit = (0, -1 if self.unit is None else self.unit, "")
        if isinstance(self.unit, str):
            digits = self.unit[1:] if self.unit[1:].isdecimal() else "0"
            unit = (1 + (self.unit == "bias"), int(digits), self.unit)
        return depth, self.layer or 0, list(COMPONENTS).index(self.component), at, unit

    def __lt__(self, other: "Place") -> bool:
        return self._order() < other._order()

    def rule(self, source: str) -> Rule:
        """The rule that takes this place, and no other, from a source.

        Raises:
            ValueError: a bias or a direction, which no rule can choose by itself.
        """
        heads = units = None
        if isinstance(self.unit, str):
            raise ValueError(
                f"{self}: no graft can choose {self.unit!r} by itself. A bias goes with its "
                "component, and a singular direction is a score only."
            )
        if self.unit is not None:
            neuron = COMPONENTS[self.component].cut is Cut.NEURON
            heads, units = (None, (self.unit,)) if neuron else ((self.unit,), None)
        at = At.parse([self.position] if isinstance(self.position, int) else self.position)
        layers = ("all",) if self.layer is None else (self.layer,)
        return Rule(source, at, (self.component,), layers, heads, units)

    def __str__(self) -> str:
        where = "" if self.layer is None else f" {self.layer}"
        unit = "" if self.unit is None else f" [{self.unit}]"
        return f"{self.component}{where}{unit} @ {self.position}"


def in_order(arch: Architecture) -> tuple[Site, ...]:
    """Every site of an architecture in the order in which the model runs them."""

    def of(side: Side) -> list[Site]:
        return [(c, None) for c in arch.components if COMPONENTS[c].side is side]

    inside = [c for c in arch.components if COMPONENTS[c].in_layers]
    layers = [(c, layer) for layer in range(arch.n_layers) for c in inside]
    return (*of(Side.INPUT), *layers, *of(Side.OUTPUT))


class Layout:
    """The rows of a table: for each site its positions, for each of these its units."""

    def __init__(
        self,
        units: Mapping[Site, Sequence[Unit]],
        positions: Sequence[str | int],
        there: Mapping[Site, Bool[np.ndarray, "prompt position _"]],
    ) -> None:
        """Lay out the rows.

        Args:
            units: what each site is cut into, in the order of the sites; [None] where into nothing.
            positions: the positions, in their order.
            there: which positions and units of a site a prompt has; with one unit, all of them.
        """
        self.units, self.positions, self._there = units, positions, there

    def _repeated(self, values: Sequence[Any], of_site: Sequence[int]) -> np.ndarray:
        each = np.empty(len(values), dtype=object)
        each[:] = values
        return np.repeat(each, of_site)

    def places(self) -> dict[str, np.ndarray]:
        """The columns `PLACE` of all rows that a prompt can have."""
        sites = list(self.units)
        counts = [len(self.positions) * len(units) for units in self.units.values()]
        positions = np.empty(len(self.positions), dtype=object)
        positions[:] = self.positions
        units = []
        for own in self.units.values():
            named = np.empty(len(own), dtype=object)
            named[:] = [pd.NA if unit is None else unit for unit in own]
            units.append(np.tile(named, len(self.positions)))
        return {
            "component": self._repeated([str(component) for component, _ in sites], counts),
            "layer": self._repeated([pd.NA if l is None else l for _, l in sites], counts),
            "position": np.concatenate(
                [np.repeat(positions, len(own)) for own in self.units.values()]
            ),
            "unit": np.concatenate(units),
        }

    def there(self, prompt: int) -> Bool[np.ndarray, " row"]:
        """Which of the rows there are for a prompt."""
        shape = len(self.positions)
        return np.concatenate(
            [
                np.broadcast_to(self._there[site][prompt], (shape, len(units))).reshape(-1)
                for site, units in self.units.items()
            ]
        )

    def flat(
        self, found: Mapping[Site, Float[np.ndarray, "prompt position _"]], prompts: Sequence[int]
    ) -> Float[np.ndarray, "prompt row"]:
        """What there is for each unit of each site, as rows; 0 for what a prompt lacks and for
        sites without a value."""
        made = []
        for site, units in self.units.items():
            shape = (len(prompts), len(self.positions), len(units))
            values = found.get(site)
            if values is None:
                made.append(np.zeros((shape[0], shape[1] * shape[2])))
                continue
            there = self._there[site][list(prompts)]
            made.append(np.where(there, values, 0.0).reshape(shape[0], -1))
        return np.concatenate(made, axis=1)

    def frame(
        self,
        by_place: Mapping[str, Sequence[Float[np.ndarray, " row"]]],
        by_prompt: Mapping[str, Float[np.ndarray, " prompt"]],
    ) -> pd.DataFrame:
        """The table: `prompt`, `PLACE`, what there is for each row of a prompt, and what there is
        for the prompt."""
        places = self.places()
        count = len(next(iter(by_place.values())))
        there = [np.flatnonzero(self.there(prompt)) for prompt in range(count)]
        sizes = [len(rows) for rows in there]
        columns: dict[str, Any] = {"prompt": np.repeat(np.arange(count), sizes)}
        for name, values in places.items():
            columns[name] = np.concatenate([values[rows] for rows in there])
        columns["layer"] = pd.array(columns["layer"], dtype="Int64")
        if all(isinstance(position, int) for position in self.positions):
            columns["position"] = columns["position"].astype(np.int64)
        for name, rows_of in by_place.items():
            columns[name] = np.concatenate(
                [values[rows] for values, rows in zip(rows_of, there, strict=True)]
            )
        for name, of_prompt in by_prompt.items():
            columns[name] = np.repeat(of_prompt, sizes)
        return pd.DataFrame(columns)


def places_of(table: pd.DataFrame) -> tuple[Place, ...]:
    """The places of a table, each once, in the table's order.

    Args:
        table: what `attribute`, `exact_effects` or `ranking` returned, or rows of it.

    Raises:
        ValueError: a table without these columns.
    """
    _refuse_others(table, PLACE)
    rows = table[list(PLACE)].drop_duplicates().itertuples(index=False)
    return tuple(
        Place(Component(component), _number(layer), _number(position), _number(unit))
        for component, layer, position, unit in rows
    )


def _number(value: Any) -> Any:
    """A cell as a `Place` holds it: a plain number, a text, or None for NA."""
    if isinstance(value, str):
        return value
    return None if pd.isna(value) else int(value)


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """The places of all prompts, the one with the highest score first.

    A prompt that lacks a place counts as 0 there.

    Args:
        table: what `attribute` or `exact_effects` returned.

    Returns:
        A row per place, with `component`, `layer`, `position`, `unit`; `score`, the mean of `ig`
        over prompts (of `alone` in exact effects), with its sign turned where the measure falls
        from the base to the full run, so that what brings it to the full run comes first; and the
        means of the scores that the table has, in the measure's own sign. Equal scores stay in the
        model's order.

    Raises:
        ValueError: a table without these columns, or without any row.
    """
    _refuse_others(table, ("prompt", *PLACE, "value_base", "value_full"))
    scores = [name for name in SCORES if name in table]
    if not scores or not len(table):
        raise ValueError(
            f"a table of {len(table)} rows with the scores {scores}. Give what find.attribute or "
            "find.exact_effects returned."
        )
    by_place = table.groupby(list(PLACE), sort=False, dropna=False, observed=True)
    means = by_place[scores].sum(min_count=1) / table["prompt"].nunique()
    prompts = table.drop_duplicates("prompt")
    falls = (prompts["value_full"] - prompts["value_base"]).mean() < 0
    found = means.reset_index()
    first = "ig" if "ig" in scores else next(n for n in ("alone", "missing") if n in scores)
    found.insert(len(PLACE), "score", -found[first] if falls else found[first])
    return found.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def _refuse_others(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"table={brief(table)}: give what find.attribute or find.exact_effects returned."
        )
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(
            f"the table has no column {missing[0]!r}. Give what find.attribute or "
            "find.exact_effects returned."
        )
