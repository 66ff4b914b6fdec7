"""Tables as files: CSV with every number, Markdown for readers.

Texts in them may come from anybody's models, prompts and configs, and a program that opens a
table must not act on them. In CSV, a text that a spreadsheet would read as a formula gets an
apostrophe before it, which `read_table` removes again; in Markdown, what would be an image, a link
or HTML is escaped.
"""

import csv
import io
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.folder import at_home, read_text, write_whole
from graftlens.stats import GRAFT_COLUMNS
from graftlens.viz import text
from graftlens.viz.lenstables import check_column
from graftlens.viz.quantities import Quantity, measured, of_summary

#: Texts that spreadsheets read as formulas, also behind white space; with apostrophes before
#: them, so that the one that is added is the one that is taken off.
_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20])")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?%?")


#: A value with its interval, as `text.written` makes it.
_INTERVAL = re.compile(r"-?[0-9.e+-]+%? \[(?:n/a|-?[0-9.e+-]+, -?[0-9.e+-]+)\]")


def write_table(
    frame: pd.DataFrame,
    stem: str | Path,
    *,
    columns: Sequence[str] | None = None,
    caption: str = "",
) -> dict[str, Path]:
    """Write `stem`.csv and `stem`.md and return their paths as `csv` and `md`.

    The CSV has all columns with all digits; before a text that begins with ``=``, ``+``, ``-``,
    ``@``, a tab or a line break and that is not a number, it has an apostrophe. The Markdown has
    `columns` (by default those of `written_columns`) with every metric as in `92.5% [80.1, 97.4]`,
    under `caption`.

    Raises:
        ValueError: a column that the table lacks.
    """
    stem = at_home(stem)
    shown = written_columns(frame, columns)
    lines = [f"**{_markdown(caption)}**", ""] if caption else []
    lines.append(_row(shown))
    lines.append(_row("---" for _ in shown).replace(" --- ", "---"))
    lines += [_row(cells) for cells in zip(*shown.values(), strict=True)]
    if measured := _measured(frame, columns):
        about = f"[low, high]: {text.level(frame)} intervals over {text.resampled(frame)}."
        if "recovery" in measured:
            about += f" Recovery: {of_summary(frame, 'recovery').title}."
        about += "".join(f" {note}" for note in [text.common_note(frame)] if note)
        lines += ["", _markdown(about)]
    return {
        "csv": write_whole(_with(stem, "csv"), _csv(_inert(frame))),
        "md": write_whole(_with(stem, "md"), "\n".join([*lines, ""])),
    }


def read_table(path: str | Path, dtype: Mapping[Hashable, Any] | None = None) -> pd.DataFrame:
    """The CSV file that `write_table` wrote, with its texts as they were.

    Args:
        path: the file.
        dtype: column -> the type to read it as.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is not such a table.
    """
    try:
        frame = pd.read_csv(
            io.StringIO(read_text(path)),
            dtype=dict(dtype or {}),
            keep_default_na=False,
            na_values=[""],
            float_precision="round_trip",
        )
    except ValueError as error:  # also pandas' own, which are of this kind
        said = str(error)
        why = said if said.startswith(str(path)) else f"{path} is not a table ({said.strip()})."
        raise ValueError(why) from None
    return _each_text(frame, lambda text: text[1:] if _marked(text) else text)


def _csv(frame: pd.DataFrame) -> str:
    said = str(frame.to_csv(index=False, lineterminator="\n"))
    if "\r" in said:  # a line break to many readers, but not to the writer, who leaves it bare
        quoted = csv.QUOTE_NONNUMERIC
        said = str(frame.to_csv(index=False, lineterminator="\n", quoting=quoted))
    return said


def _inert(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without a text that is a formula to a spreadsheet."""

    def guard(text: str) -> str:
        formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text.strip())
        return f"'{text}" if formula else text

    return _each_text(frame, guard)


def _marked(text: str) -> bool:
    return text.startswith("'") and _FORMULA.match(text) is not None


def _each_text(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """The table with `change` of every text and heading; numbers are left alone."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    made = frame.copy()
    for place in range(frame.shape[1]):
        column = frame.iloc[:, place]
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            texts = [changed(value) for value in column.astype(object)]
            made.isetitem(place, pd.Series(texts, index=frame.index, dtype=object))
    return made.set_axis([changed(name) for name in frame.columns], axis=1)


def written_columns(
    frame: pd.DataFrame, columns: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Heading -> cells of a table as a reader wants them.

    A number with its interval (of a column x, the columns x_low and x_high; of `difference`, also
    `low` and `high`) is one column. By default a summary shows what groups it, the graft, `n` and
    the metrics; another table shows all its columns.

    Raises:
        ValueError: a column that the table lacks.
    """
    if frame.empty:
        return {}
    measured = _measured(frame, columns)
    found: dict[str, list[str]] = {}
    chosen = _chosen(frame, columns)
    ends = {name: pair for name in chosen if (pair := _interval(name, chosen))}
    inside = {end for pair in ends.values() for end in pair}
    for name in chosen:
        if name in measured:
            facts = of_summary(frame, name)
            found[facts.short] = text.written_all(facts, frame)
        elif name in ends:
            numbers = (frame[end].tolist() for end in (name, *ends[name]))
            found[name.replace("_", " ")] = [
                _plain(value) + (f" [{_plain(low)}, {_plain(high)}]" if pd.notna(low) else "")
                for value, low, high in zip(*numbers, strict=True)
            ]
        elif name == "metric":
            found[name] = [Quantity.of(str(value)).short for value in frame[name].tolist()]
        elif name not in inside:
            found[name.replace("_", " ")] = [_plain(value) for value in frame[name].tolist()]
    return found


def _chosen(frame: pd.DataFrame, columns: Sequence[str] | None) -> list[str]:
    have = [str(name) for name in frame.columns]
    if columns is not None:
        for name in columns:
            check_column(frame, name)
        return list(columns)
    if not _is_summary(frame):
        return have
    lead = [name for name in have[: have.index("graft") + 1] if name not in GRAFT_COLUMNS]
    return [*lead, "n", *measured(frame)]


def _interval(name: str, columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns of the ends of a column's interval, if it has one."""
    pairs = [(f"{name}_low", f"{name}_high")]
    pairs += [("low", "high")] if name == "difference" else []
    return next((pair for pair in pairs if set(pair) <= set(columns)), None)


def _measured(frame: pd.DataFrame, columns: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that are metrics with an interval."""
    if not _is_summary(frame):
        return ()
    return tuple(m for m in measured(frame) if columns is None or m in columns)


def _is_summary(frame: pd.DataFrame) -> bool:
    return {"graft", "n", "level"} <= set(frame.columns) and not frame.empty


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value is pd.NA or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with(stem: Path, ending: str) -> Path:
    # The dot of a name such as "layers 0.5" does not begin an ending.
    return stem.with_name(f"{stem.name}.{ending}")


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(cell: object) -> str:
    """A cell's text, so that nothing in it ends the cell or is read as a mark, an image, a link, an
    entity or HTML. An interval's brackets are not text and stay."""
    said = " ".join(str(cell).split())
    if not _INTERVAL.fullmatch(said):
        said = re.sub(r"[\[\]]|(?<=\])\(", r"\\\g<0>", said.replace("\\", "\\\\"))
    for mark in "|*_`<>&~$":
        said = said.replace(mark, f"\\{mark}")
    # Addresses are links even without a mark, and so is what looks like mail.
    said = re.sub(r"(?<=\w):(?=//)", r"\:", said)
    said = re.sub(r"\b(www)\.", r"\1\.", said, flags=re.IGNORECASE)
    return re.sub(r"(?<=\S)@(?=\S)", r"\@", said)
