"""The exact effect of each place: by itself in the base, and missing from the full run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from graftlens.components import Component
from graftlens.find.asked import Asked, By, Outside
from graftlens.find.attribution import quadrature_nodes
from graftlens.find.places import Layout, Place
from graftlens.graft import Graft, Where
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer, Input
from graftlens.prompts import Prompt, PromptError
from graftlens.sweep.prepared import Prepared, Scored
from graftlens.sweep.scoring import Scorer

#: Grafts that are planned together.
TOGETHER = 4096


def exact_effects(
    model: GraftedTransformer,
    prompts: Input,
    source: str,
    *,
    positions: Sequence[Where] | Literal["each"],
    by: By = "site",
    metric: Measure | str = "logprob",
    within: Graft | str | None = None,
    outside: Outside = "base",
    targets: Any = None,
    continuations: Sequence[str] | str | None = None,
    steps: int | Literal["auto"] = 8,
) -> pd.DataFrame:
    """What each place does by itself, by exact grafts: one sweep, whose rows are shared.

    Arguments are those of `attribute`, so that one set of them asks both; `steps` changes nothing
    here, where nothing is integrated. `by="direction"` is refused: no graft can choose a direction.
    The measure need not be one that gradients pass through.

    Returns:
        One row per prompt and place, in the shape of `attribute`'s table: `alone`, what the place
        adds to the base when it alone is grafted (the measure minus `value_base`), and `missing`,
        what the full run loses when it alone is missing (`value_full` minus the measure), in units
        of the measure; both are 0 where the sources' tensors are equal, and NA for a bias that no
        rule can choose by itself. `value_base` and `value_full` are the measure with nothing and
        with everything that is searched grafted; `common_tokens` is as in `attribute`'s table. A
        head or neuron that is missing takes the bias of `o` or `mlp_out` with it, as rules of
        single units do. `attrs["passes"]` counts the forward passes, one for each prompt under each
        graft, before rows are shared.

    Raises:
        PromptError, ValueError: as for `attribute`, but for rotary tables that differ, which whole
            grafts carry.
    """
    if by == "direction":
        raise ValueError(
            'by="direction": no graft can choose a direction, so it has no exact effect. '
            'Use by="site", "head" or "neuron".'
        )
    quadrature_nodes(steps)
    asked = Asked.of(
        model,
        prompts,
        source,
        positions=positions,
        metric=metric,
        by=by,
        within=within,
        outside=outside,
        targets=targets,
        continuations=continuations,
        exact=True,
    )
    layout = Layout(asked.units, asked.positions, asked.there)
    places = _places(layout)
    found = {n: [np.full(len(places), np.nan) for _ in asked.prompts] for n in ("alone", "missing")}
    ends = {name: np.full(len(asked.prompts), np.nan) for name in ("value_base", "value_full")}
    alike: dict[tuple[object, bytes], list[int]] = {}
    for number in range(len(asked.prompts)):
        key = (asked.ends(number), layout.there(number).tobytes())
        alike.setdefault(key, []).append(number)
    passes = 0
    for members in alike.values():
        base, full = asked.ends(members[0])
        values = _swept(model, asked, members, {"base": base, "full": full})
        for number in members:
            ends["value_base"][number] = values["base"][number]
            ends["value_full"][number] = values["full"][number]
        grafts: dict[tuple[str, int], Graft] = {}
        for row in np.flatnonzero(layout.there(members[0])).tolist():
            place = places[row]
            if (place.component, place.layer) in asked.equal:
                for number in members:
                    found["alone"][number][row] = found["missing"][number][row] = 0.0
            elif place.unit != "bias":
                grafts["alone", row] = base | Graft((place.rule(asked.source),))
                grafts["missing", row] = full | Graft((place.rule(asked.base),))
        keys = list(grafts)
        passes += len(members) * (2 + len(keys))
        for start in range(0, len(keys), TOGETHER):
            some = {str(key): grafts[key] for key in keys[start : start + TOGETHER]}
            values = _swept(model, asked, members, some)
            for what, row in keys[start : start + TOGETHER]:
                for number in members:
                    value = values[str((what, row))][number]
                    lost = ends["value_full"][number] - value
                    gained = value - ends["value_base"][number]
                    found[what][number][row] = gained if what == "alone" else lost
    table = layout.frame(found, ends)
    table.attrs["passes"] = passes
    return model.vocabularies.marked(table) if asked.measure.over_common else table


def _places(layout: Layout) -> list[Place]:
    columns = layout.places()
    return [
        Place(
            Component(component),
            None if layer is pd.NA else layer,
            position,
            None if unit is pd.NA else unit,
        )
        for component, layer, position, unit in zip(*columns.values(), strict=True)
    ]


class _Known(Prepared):
    """The prompts as they were prepared when the question was asked."""

    def __init__(self, model: GraftedTransformer, asked: Asked) -> None:
        whole = asked.measure.over == "answer"
        super().__init__(model.tokenizer, model.arch, None, "whole" if whole else "first")
        self.given = {one.scored.number: one.scored for one in asked.prompts}

    def __call__(self, number: int, prompt: Prompt) -> Scored:
        return self.given[number]


def _swept(
    model: GraftedTransformer, asked: Asked, members: Sequence[int], grafts: Mapping[str, Graft]
) -> dict[str, dict[int, float]]:
    """The measure of some prompts under some grafts, by graft and prompt, from one sweep."""
    prepared = _Known(model, asked)
    scorer = Scorer(
        model,
        grafts,
        top_k=1,
        answers=prepared.answers,
        measures=[asked.measure] if not asked.measure.always else [],
        references={"base": Graft(), "full": Graft.rule(asked.source)},
        prepared=prepared,
    )
    table = scorer.table({n: prepared.given[n].prompt for n in members})
    failed = table[table["reason"].notna()]
    if len(failed):
        row = failed.iloc[0]
        raise PromptError(f"prompt {row['prompt']}, graft {row['rule']!r}: {row['reason']}")
    values = table[asked.measure.name].to_numpy(dtype=np.float64, na_value=np.nan)
    cells = values.reshape(len(members), len(grafts))
    return {
        name: dict(zip(members, column.tolist(), strict=True))
        for name, column in zip(grafts, cells.T, strict=True)
    }
