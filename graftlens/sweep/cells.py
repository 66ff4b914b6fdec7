"""The numbers of (prompt, graft) cells, by measure, and the table that they become."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from graftlens.components import suggest
from graftlens.graft import Graft
from graftlens.metrics import METRICS, Measure, always_measured, known, load, measures
from graftlens.prompts import Prompt

_ABOUT = ("prompt", "graft", "rule", "template", "text", "answer", "target", "target_id")

#: Other columns that results tables may have; no measure can have these names.
_TAKEN = {
    *(*_ABOUT, "reason", "dataset", "model", "source", "span", "component", "layer", "head"),
    *("neuron", "unit", "strength", "base_run", "full_run", "fact", "how"),
}


def columns(asked: Iterable[Measure] = ()) -> tuple[str, ...]:
    """The columns of a table of results, with those of the requested measures."""
    return (*_ABOUT, *(m.name for m in (*always_measured(), *asked)), "reason")


class Cells:
    """The numbers of all cells, NaN or None until they are known."""

    def __init__(self, numbers: Sequence[int], n_grafts: int, measured: Sequence[Measure]) -> None:
        shape = (len(numbers), n_grafts)
        self.of = {number: i for i, number in enumerate(numbers)}
        self.measured = tuple(measured)
        self.values: dict[str, np.ndarray] = {}
        for m in measured:
            lists = m.holds in ("numbers", "tokens")
            self.values[m.name] = np.full(
                shape, None if lists else np.nan, dtype=object if lists else np.float64
            )
        self.target_id = np.full(shape[0], -1, dtype=np.int64)
        self.reason = np.full(shape, None, dtype=object)

    def frame(
        self,
        prompts: Mapping[int, Prompt],
        grafts: Mapping[str, Graft],
        text: Callable[[int], str],
    ) -> pd.DataFrame:
        """One row per cell, prompt by prompt; `text` writes a token."""
        count = len(grafts)

        def of_prompts(values: Sequence[Any]) -> np.ndarray:
            return np.repeat(np.array([*values, None], dtype=object)[:-1], count)

        missing = pd.notna(self.reason).reshape(-1)
        given = list(prompts.values())
        target = of_prompts([text(t) if t >= 0 else None for t in self.target_id.tolist()])
        target[missing] = None
        ids = np.repeat(self.target_id, count)
        about: dict[str, Any] = {
            "prompt": np.repeat(np.array(list(prompts), dtype=np.int64), count),
            "graft": np.tile(np.array(list(grafts), dtype=object), len(given)),
            "rule": np.tile(np.array(list(map(str, grafts.values())), dtype=object), len(given)),
            "template": of_prompts([p.name or p.template for p in given]),
            "text": of_prompts([p.text for p in given]),
            "answer": of_prompts([p.answer for p in given]),
            "target": target,
            "target_id": pd.arrays.IntegerArray(ids, missing),
        }
        numbers = {m.name: _column(m, self.values[m.name].reshape(-1)) for m in self.measured}
        return pd.DataFrame(about | numbers | {"reason": self.reason.reshape(-1)})


def _column(measure: Measure, values: np.ndarray) -> Any:
    if measure.holds != "count":
        return values
    missing = np.isnan(values)
    return pd.arrays.IntegerArray(np.where(missing, 0, values).astype(np.int64), missing)


#: Measures of the user's own, or where to import them from (``module:name``).
Measures = Sequence[Measure | str]


def own_measures(given: Measures) -> tuple[Measure, ...]:
    """The user's own measures; those that are named by where they are get imported.

    Raises:
        ValueError: what cannot be imported, or is not a measure.
    """
    return tuple(load(one) if isinstance(one, str) else one for one in given)


def asked_for(given: Sequence[Measure | str], own: Sequence[Measure] = ()) -> tuple[Measure, ...]:
    """The measures besides those of every table, in the order given.

    Args:
        given: names, and measures of the user's own.
        own: the user's own measures, which names may also refer to.

    Raises:
        ValueError: an unknown name, one that is given twice or is another column's, or a measure
            that no function computes from a distribution.
    """
    if isinstance(given, str | Measure):
        given = [given]
    mine = {m.name: m for m in own}
    found: dict[str, Measure] = {}
    for one in given:
        m = one if isinstance(one, Measure) else known(one) or mine.get(one)
        if m is None:
            rows = [row.name for row in measures() if row.function is not None and not row.always]
            raise ValueError(
                f"unknown measure {one!r}. Allowed: {' '.join([*rows, *mine])}."
                f"{suggest(str(one), [*rows, *mine])} Give one of your own as a Measure, or on "
                "the command line with --measure MODULE:NAME."
            )
        if m.name in found:
            raise ValueError(f"measure {m.name!r} is given twice. Give each measure once.")
        row = METRICS.get(m.name)
        if m.name in _TAKEN or (row is not None and row != m):
            raise ValueError(
                f"measure {m.name!r}: tables have another column of this name. Rename the measure."
            )
        if m.function is None:
            raise ValueError(
                f"{m.name!r} is not measured in a run: graftlens.summarise computes it."
            )
        if not m.always:
            if m.holds not in ("number", "count") or m.over != "next":
                raise ValueError(
                    f"measure {m.name!r}: only measures with one number per row can be requested."
                )
            found[m.name] = m
    return tuple(found.values())
