"""Which rows of a lens table a plot shows, and what it refuses."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from graftlens.viz.spelling import short, visible


def check_columns(table: pd.DataFrame, made_by: str, *columns: str) -> None:
    """Refuse a table that lacks a column of those of `lens.{made_by}`."""
    for column in columns:
        check_column(table, column, f". Give the table of lens.{made_by}")


def check_column(table: pd.DataFrame, column: str, hint: str = "", kind: str = "table") -> None:
    """Refuse a table (or a `summary`) without this column; `hint` is how the error ends."""
    have = [str(name) for name in table.columns]
    if column not in have:
        raise ValueError(f"the {kind} has no column {column!r}; it has {listed(have)}{hint}")


def listed(names: Iterable[object]) -> str:
    """Names as an error lists them."""
    return ", ".join(map(repr, names)) or "nothing"


def grafts_of(table: pd.DataFrame) -> list[str]:
    """The runs of a table, in its order."""
    return list(dict.fromkeys(table["graft"].astype(str)))


def prompts_of(table: pd.DataFrame) -> list[int]:
    """The numbers of a table's prompts, in its order."""
    return [int(number) for number in dict.fromkeys(table["prompt"])]


def of_prompt(table: pd.DataFrame, prompt: int | None) -> pd.DataFrame:
    """The rows of one prompt, which must be named where the table has several."""
    have = prompts_of(table)
    if prompt is None and len(have) != 1:
        raise ValueError(f"the table has the prompts {listed(have)}; say which with prompt=…")
    if prompt is not None and prompt not in have:
        raise ValueError(f"the table has no prompt {prompt!r}; it has {listed(have)}")
    return table[table["prompt"] == (have[0] if prompt is None else prompt)]


def of_run(table: pd.DataFrame, graft: str, key: Sequence[str]) -> pd.DataFrame:
    """The rows of one run, which are one for each value of `key`."""
    rows = table[table["graft"].astype(str) == graft]
    if rows.empty:
        raise ValueError(f"the table has no graft {graft!r}; it has {listed(grafts_of(table))}")
    refuse_doubled(rows, ["graft", *key])
    return rows


def refuse_doubled(rows: pd.DataFrame, key: Sequence[str]) -> None:
    """Refuse several rows for one value of `key`, of which a plot would show one."""
    twice = rows[rows.duplicated(list(key), keep=False)]
    if len(twice):
        first = twice.iloc[0]
        where = ", ".join(f"{name} {first[name]}" for name in key if not pd.isna(first[name]))
        raise ValueError(
            f"the table has several rows for {where}: pass each once, and the rows of one group"
        )


def at_position(rows: pd.DataFrame, at: int) -> pd.DataFrame:
    """Of one prompt's rows those at one position; below zero it counts back from the last."""
    have = sorted({int(position) for position in rows["position"]})
    if not (at in have or -len(have) <= at < 0):
        raise ValueError(
            f"at={at}: prompt {rows['prompt'].iloc[0]} has the positions {listed(have)} in the "
            f"table. Name one of them, or count back from the last (-1 to {-len(have)})"
        )
    return rows[rows["position"] == (at if at >= 0 else have[at])]


def tokens_of(rows: pd.DataFrame) -> dict[int, str]:
    """Position -> its token as it is shown, in order."""
    found = rows.drop_duplicates("position").sort_values("position")
    pairs = zip(found["position"], found["token"], strict=True)
    return {int(position): short(visible(token), 14) for position, token in pairs}


def as_float(value: Any) -> float:
    """A cell's number; NaN for a missing one of any kind."""
    return math.nan if pd.isna(value) else float(value)


def as_floats(column: Iterable[Any]) -> list[float]:
    """`as_float` of each cell."""
    return [as_float(value) for value in column]
