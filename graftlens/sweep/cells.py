"""The numbers of (prompt, graft) cells, by measure, and the table that they become."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from graftlens.components import suggest
from graftlens.folder import json_digest
from graftlens.graft import Graft
from graftlens.metrics import Measure, always_measured, imported, is_own, known, load, measures
from graftlens.prompts import Prompt
from graftlens.sweep.outcomesettings import TextFunction

_ABOUT = ("prompt", "graft", "rule", "template", "text", "answer", "target", "target_id")

#: Other columns that tables of results or statistics may have; no measure can have these names.
_TAKEN = re.compile(
    "|".join(
        [
            *(*_ABOUT, "reason", "says", "dataset", "model", "source", "span", "component"),
            *("layer", "head", "neuron", "unit", "strength", "base_run", "full_run", "fact", "how"),
            *("n", "not_run", "failed", "units", "level", "levels", "resamples", "permutations"),
            *("seed", "graft_a", "graft_b", "mean", "mean_a", "mean_b", "difference", "sd", "min"),
            *("max", "tau", "tau_min", "tau_pairs", "low", "high", "interval", "note", "p_value"),
            *("p_adjusted", "p_method", "compared", "metric", "recovery_of", "a", "b"),
            *(r"\w+_(low|high|note|interval)", r"top\d+"),
        ]
    )
)


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
    """The user's own measures; those that are named by where they are get imported. Functions are
    measures of texts.

    Raises:
        ValueError: what cannot be imported, or is not a measure.
    """
    return tuple(_loaded(one) if isinstance(one, str) else one for one in _listed(given))


def _loaded(where: str) -> Measure:
    found = imported(where)
    text = found.over == "text" if isinstance(found, Measure) else callable(found)
    return TextFunction.at(where, found) if text else load(where)


def asked_for(given: Sequence[Measure | str], own: Sequence[Measure] = ()) -> tuple[Measure, ...]:
    """The measures besides those of every table, in the order given.

    Args:
        given: names, and measures of the user's own.
        own: the user's own measures, which names may also refer to.

    Raises:
        ValueError: an unknown name, one that is given twice or is another column's, or a measure
            that no function computes from a distribution.
    """
    mine: dict[str, Measure] = {}
    for given_one in own:
        if isinstance(given_one, TextFunction):
            continue
        _check_own(given_one)
        if mine.setdefault(given_one.name, given_one) != given_one:
            raise ValueError(f"two measures are called {given_one.name!r}. Rename one.")
    found: dict[str, Measure] = {}
    for one in _listed(given):
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
        _check_own(m)
        if m.function is None:
            raise ValueError(
                f"{m.name!r} is not measured in a run: graftlens.summarise computes it."
            )
        if not m.always:
            found[m.name] = m
    return tuple(found.values())


def fingerprints(asked: Iterable[Measure]) -> dict[str, str]:
    """The user's own measures among these -> what tells their functions apart. Those of texts are
    called by their places."""
    return {
        m.place if isinstance(m, TextFunction) else m.name: _fingerprint(
            m.plain if isinstance(m, TextFunction) else m
        )
        for m in asked
        if is_own(m)
    }


def _fingerprint(measure: Measure) -> str:
    """SHA-256 of a measure's function and of what decides its column's numbers.

    The function's source text counts, with the plain values that it closes over or has as defaults;
    its bytecode where there is no source; its name where there is neither.
    """
    function: Any = measure.function
    plain: list[Any] = []
    while isinstance(function, functools.partial):
        plain += [*function.args, *sorted(function.keywords.items())]
        function = function.func
    code = getattr(function, "__code__", None)
    try:
        text = inspect.getsource(function if code else type(function))
    except (OSError, TypeError):
        text = _bytecode(code) if code else f"{type(function).__module__}:{type(function)}"
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    plain += [*cells, *(getattr(function, "__defaults__", None) or ())]
    kept = [repr(value) for value in plain if isinstance(value, bool | int | float | str | tuple)]
    return json_digest([text, kept, list(measure.needs), measure.holds, measure.log])


def _bytecode(code: Any) -> str:
    inner = [_bytecode(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {' '.join(code.co_names)} {' '.join(inner)}"


def _listed(given: Any) -> Sequence[Any]:
    given = [given] if isinstance(given, str | Measure) else given
    if not isinstance(given, Sequence) or not all(isinstance(m, str | Measure) for m in given):
        raise ValueError(
            f"measures={given!r}: give a list of measures' names or of Measures, such as "
            '["kl_full"].'
        )
    return given


def refuse_taken(m: Measure) -> None:
    """Refuse a user's own measure that is called as another column is."""
    if known(m.name) is not None or _TAKEN.fullmatch(m.name):
        raise ValueError(
            f"measure {m.name!r}: tables have another column of this name. Rename the measure."
        )


def _check_own(m: Measure) -> None:
    """Refuse what only rows of the table may be, and names of other columns."""
    if known(m.name) == m:
        return
    refuse_taken(m)
    what = ""
    if m.function is None:
        what = "give it a function."
    elif m.always:
        what = "always=True is for what every table has. Leave it out, and ask for the measure."
    elif m.holds not in ("number", "count") or m.over != "next" or m.column != m.name:
        what = "only measures with one number per row can be requested."
    if what:
        raise ValueError(f"measure {m.name!r}: {what}")
