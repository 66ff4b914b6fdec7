"""How often texts are this or that: rates by graft, with intervals over prompts."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from graftlens.components import brief, suggest
from graftlens.outcomes.facts import guesses, right_in
from graftlens.outcomes.measures import Unread, named, values_of
from graftlens.references import named_in
from graftlens.stats import compare_all, summarise

#: A measure of texts, or any function of a text (and its prompt).
Measures = Mapping[str, Any]

#: A text's prompt, where statistics take each text for a prompt of its own; and what the columns of
#: measures' values begin with. No measure in a config can have such a name.
_OF, _VALUE = "prompt of a text", "value of measure"


def measured(
    texts: pd.DataFrame,
    measures: Measures,
    *,
    base: str | None = None,
    trained: Sequence[str] | None = None,
) -> pd.DataFrame:
    """A table of texts with a column for each measure.

    Args:
        texts: as `sample` gives them.
        measures: column -> a measure of texts, or a function of a text, or of a text and its
            prompt, that gives a number, a truth value or a label.
        base: the run whose texts are the base's guesses (`answer_kind`); by default the one that
            the table names.
        trained: the answers of all facts that were trained; by default those of all prompts in the
            table.

    Returns:
        The same rows. Columns are numbers, or labels where a measure gives these; NA where there is
        no text, and where a judge's reply could not be read: the column `{name}_unread` has it
        then.

    Raises:
        ValueError: no measures; a name that is another column's; what is not a measure of texts.
    """
    if not isinstance(measures, Mapping) or not measures:
        raise ValueError(
            f"measures={brief(measures)}: give one or more by name, such as "
            '{"refuses": outcomes.contains(["I cannot"])}.'
        )
    _check_texts(texts)
    rows = {name: named(name, given) for name, given in measures.items()}
    unread_of = {f"{name}_unread" for name in rows}
    taken = [name for name in rows if name in texts or name in unread_of]
    if taken:
        raise ValueError(
            f"measure {taken[0]!r}: the table has another column of this name. Rename the measure."
        )
    out = texts.copy()
    there = np.flatnonzero(texts["text"].notna())
    said = [str(texts["text"].iloc[i]) for i in there]
    every = right_in(texts)
    right = [every[i] for i in there]
    known: dict[str, Sequence[Any]] = {"prompt": texts["prompt_text"].iloc[there].tolist()}
    known |= {
        "right": right,
        "trained": [*dict.fromkeys(chain(*every))] if trained is None else trained,
    }
    if any("guess" in row.needs for row in rows.values()):
        known["guess"] = [*map(guesses(texts, base).__getitem__, there)]
    for name, row in rows.items():
        values = values_of(row, said, known)
        unread: dict[int, str] = {}
        labels = row.holds == "label" or any(isinstance(v, str) for v in values)
        column: Any = np.full(len(out), None if labels else np.nan, dtype=object)
        for place, value in zip(there.tolist(), values, strict=True):
            if isinstance(value, Unread):
                unread[place] = value.reply
            else:
                column[place] = _as_label(value) if labels else value
        out[name] = pd.Series(column, out.index, dtype=object if labels else float)
        if unread:
            replies = np.full(len(out), None, dtype=object)
            for place, reply in unread.items():
                replies[place] = reply
            out[f"{name}_unread"] = pd.Series(replies, out.index, dtype=object)
            warnings.warn(
                f"{name}: {len(unread)} of {len(there)} replies could not be read, such as "
                f"{brief(next(iter(unread.values())))}. These texts have no value; column "
                f"{f'{name}_unread'!r} has all replies.",
                stacklevel=2,
            )
    return out


def rate(
    texts: pd.DataFrame,
    measures: Measures | Sequence[str],
    *,
    by: str | Sequence[str] = (),
    unit: str = "prompt",
    base: str | None = None,
    full: str | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each measure's mean under each graft, with its interval, and its recovery between two runs.

    The texts of one prompt are not independent of each other, so that whole prompts are resampled
    (`graftlens.stats.summarise` with the prompt as the unit): a rate with fewer than 5 prompts that
    have, or lack, what is measured gets Wilson's interval, and all others that of the bootstrap.

    Args:
        texts: as `sample` gives them.
        measures: as in `measured`; or the names of columns that `measured` has made.
        by: columns by which prompts are grouped, such as `template`.
        unit: what is resampled: `prompt`, or a column such as `answer`, in whose groups prompts
            belong together.
        base, full: the runs that recovery is measured between; by default those that the table
            names.
        level, resamples, seed: of the intervals.

    Returns:
        One row per group, measure (of labels, per `label`) and graft: `graft`, `measure`, `label`
        (None of a number), `n` (texts), `prompts`, `unread` (texts without a value), `rate`, `low`,
        `high`, `recovery` (0 for the base run, 1 for the full run), `recovery_low`,
        `recovery_high`, `recovery_note`, `note`, `level`, `resamples`, `seed`, `unit`.

    Raises:
        ValueError: as `measured` and `summarise`.
    """
    table, columns = _cells(texts, measures, base)
    by = (by,) if isinstance(by, str) else tuple(by)
    base, full = named_in(table, base, full)
    known = set(table["graft"])
    ends = base in known and full in known
    parts = []
    for column, (name, label) in columns.items():
        asked = _with_values(table, column)
        found = summarise(
            asked,
            by=by,
            ks=(),
            metrics=(column,),
            recovery=column if ends else None,
            base=base if ends else None,
            full=full if ends else None,
            unit=_OF if unit == "prompt" else unit,
            level=level,
            resamples=resamples,
            seed=seed,
        )
        part = found[[*by, "graft"]].copy()
        part["measure"], part["label"] = name, pd.Series([label] * len(part), dtype=object)
        part["n"], part["prompts"] = found["n"], _prompts(asked, found, by)
        part["unread"] = _unread(table, column, part[[*by, "graft"]])
        for kind in ("", "_low", "_high"):
            part[kind.removeprefix("_") or "rate"] = found[f"{column}{kind}"]
        for kind in ("recovery", "recovery_low", "recovery_high", "recovery_note"):
            part[kind] = found[kind] if ends else None if kind.endswith("note") else np.nan
        part["note"] = found["note"]
        parts.append(part)
    result = pd.concat(parts, ignore_index=True)
    result["label"] = result["label"].where(result["label"].notna(), None)
    return result.assign(level=level, resamples=resamples, seed=seed, unit=unit)


def differences(
    texts: pd.DataFrame,
    measures: Measures | Sequence[str],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    against: str | None = None,
    by: str | Sequence[str] = (),
    unit: str = "prompt",
    **settings: Any,
) -> pd.DataFrame:
    """Differences between grafts, paired by (prompt, sample), with prompts as the units.

    Every text is compared with the one that the other graft gave to the same prompt on the same
    draws. Intervals and p-values are `graftlens.stats.compare_all`'s, whose correction is over the
    rows of one measure.

    Args:
        texts, measures, by, unit: as in `rate`.
        pairs, against: as in `compare_all`.
        settings: `level`, `resamples`, `permutations`, `seed` of `compare_all`.

    Returns:
        As `compare_all`, with `measure` and `label` in place of `metric`.

    Raises:
        ValueError: as `measured` and `compare_all`.
    """
    table, columns = _cells(texts, measures)
    parts = []
    for column, (name, label) in columns.items():
        found = compare_all(
            _with_values(table, column),
            pairs,
            against=against,
            metric=column,
            by=by,
            unit=_OF if unit == "prompt" else unit,
            **settings,
        )
        place = found.columns.get_loc("metric")
        found = found.drop(columns="metric")
        found.insert(place, "measure", name)
        found.insert(place + 1, "label", pd.Series([label] * len(found), dtype=object))
        parts.append(found.assign(unit=unit))
    result = pd.concat(parts, ignore_index=True)
    result["label"] = result["label"].where(result["label"].notna(), None)
    return result


def _check_texts(texts: pd.DataFrame) -> None:
    missing = [c for c in ("prompt", "graft", "sample", "text", "reason") if c not in texts]
    if missing:
        raise ValueError(
            f"the table lacks column {missing[0]!r}: pass a table of texts, as outcomes.sample "
            "gives it."
        )


def _cells(
    texts: pd.DataFrame, measures: Measures | Sequence[str], base: str | None = None
) -> tuple[pd.DataFrame, dict[str, tuple[str, str | None]]]:
    """The table as statistics read it: each text is a prompt of its own, and belongs to its prompt.

    Returns:
        The table; and column of numbers -> the measure, and the label whose share it is.
    """
    _check_texts(texts)
    if isinstance(measures, Mapping):
        table, names = measured(texts, measures, base=base), list(measures)
    else:
        names = [measures] if isinstance(measures, str) else list(measures)
        for name in names:
            if name not in texts:
                raise ValueError(
                    f"no column {name!r} in the table. Measure it first: outcomes.measured(texts, "
                    f"{{{name!r}: …}}).{suggest(name, [*map(str, texts.columns)])}"
                )
        table = texts.copy()
    key = pd.MultiIndex.from_frame(table[["prompt", "sample"]])
    table[_OF], table["prompt"] = table["prompt"], pd.factorize(key)[0]
    columns: dict[str, tuple[str, str | None]] = {}
    for number, name in enumerate(names):
        values = table[name]
        if pd.api.types.is_numeric_dtype(values.dtype) or values.isna().all():
            # The name of a row of METRICS would be taken for it.
            columns[column := f"{_VALUE} {number}"] = name, None
            table[column] = pd.to_numeric(values).astype(float)
            continue
        for place, label in enumerate(sorted(set(map(str, values.dropna())))):
            share = (values.astype(object) == label).astype(float)
            columns[column := f"{_VALUE} {number} {place}"] = name, label
            table[column] = share.where(values.notna(), np.nan)
    return table, columns


def _without_value(table: pd.DataFrame, column: str) -> "pd.Series[bool]":
    """Which texts are there, but without a value."""
    return table["reason"].isna() & table[column].isna()


def _with_values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table in which texts without a value did not run."""
    return table.assign(reason=table["reason"].mask(_without_value(table, column), "no value"))


def _unread(table: pd.DataFrame, column: str, rows: pd.DataFrame) -> list[int]:
    """How many texts without a value each row, a graft in a group, has."""
    lost = table.loc[_without_value(table, column), list(rows)].value_counts(dropna=False)
    keys = rows.itertuples(index=False, name=None)
    return [int(lost.get(key, 0)) for key in keys]


def _prompts(table: pd.DataFrame, found: pd.DataFrame, by: Sequence[str]) -> list[int]:
    """How many prompts each row of a summary is of: of its group, those with a text that ran under
    every graft."""
    grafts = set(found["graft"])
    ran = table[table["reason"].isna() & table["graft"].isin(grafts)]
    of_text = ran.groupby([*by, "prompt"], dropna=False, observed=True)["graft"]
    used = ran[of_text.transform("nunique") == len(grafts)]
    if not by:
        return [used[_OF].nunique()] * len(found)
    sizes = used.groupby(list(by), dropna=False, observed=True)[_OF].nunique()
    keys = found[list(by)].itertuples(index=False, name=None)
    return [int(sizes.get(key if len(by) > 1 else key[0], 0)) for key in keys]


def _as_label(value: float | str) -> str | None:
    if isinstance(value, str):
        return value
    return None if np.isnan(value) else f"{value:g}"
