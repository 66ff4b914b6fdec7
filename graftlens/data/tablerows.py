"""Rows of a table of facts: a CSV, JSONL or Parquet file, or a list in a config."""

import csv
import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import cache
from keyword import iskeyword
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq

from graftlens.components import brief
from graftlens.folder import parse_json, read_text

#: Suffixes of the files that are read, in lower or upper case.
FILES = (".csv", ".jsonl", ".parquet")

#: What separates the entries of a list in a CSV file.
SEPARATOR = "|"

#: What may be between the cells of a CSV file: that of these which its first line has most of,
#: quoted names aside; the first one if that is undecided.
_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}

#: What a table's facts say of themselves, beside their columns.
_SAID = ("ENTITIES", "UNTOLD", "BRIDGE", "ALIASES", "DISTRACTORS")

Cell = str | tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, every cell a text or a list of texts; empty cells are "".

    Attributes:
        columns: their names as fields, in the table's order; see `as_field`.
        rows: column -> cell.
        where: what each row is called in messages: "line 3".
    """

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Cell], ...]
    where: tuple[str, ...]


def check_table(path: Path) -> None:
    """Whether `read_table` would read a file of this name, which need not exist.

    Raises:
        ValueError: the file is of another kind.
    """
    if path.suffix.lower() not in FILES:
        raise ValueError(
            f"{str(path)!r} ends in {path.suffix!r}, but tables are read from {' '.join(FILES)}. "
            "Convert it."
        )


def read_table(
    given: Path | Sequence[Mapping[str, Any]], used: Collection[str] | None = None
) -> Table:
    """The rows of a file, or of a list.

    Args:
        given: the file, or the rows.
        used: the columns, as fields, that have to hold texts or lists of texts, by default all;
            what others hold is kept as JSON where it is neither.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not such a table; the message names the row.
    """
    if not isinstance(given, Path):
        return _table("table", [(f"row {i}", row) for i, row in enumerate(given, 1)], used)
    if not given.is_file():
        raise FileNotFoundError(f"table {str(given)!r} does not exist. Name a file of facts.")
    kind = given.suffix.lower()
    if kind == ".csv":
        return _table(given.name, list(_csv(given)), used)
    if kind == ".jsonl":
        # Not splitlines: it would split at separators that may occur inside a JSON string.
        lines = [(i, line) for i, line in enumerate(read_text(given).split("\n"), 1)]
        rows = [(f"line {i}", _object(given, i, line)) for i, line in lines if line.strip()]
        return _table(given.name, rows, used)
    try:
        found = pq.read_table(given).to_pylist()
    except Exception as error:  # pyarrow has many exceptions for a wrong file
        raise ValueError(
            f"{given} cannot be read as Parquet ({type(error).__name__}: {str(error).strip()}). "
            "Save it again, or as CSV."
        ) from None
    return _table(given.name, [(f"row {i}", row) for i, row in enumerate(found, 1)], used)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    text = read_text(path)
    first = re.sub(r'"[^"]*"', "", re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0])
    # Spreadsheets write semicolons where the comma is the decimal sign.
    between = max(_MARKS, key=first.count)
    if between != ",":
        name = f"{_MARKS[between]}s"
        said = f"{path} is read with {name} between its cells: its first line has more of them "
        said += "than of commas."
        warnings.warn(said, stacklevel=2)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=between)
    try:
        # What a spreadsheet leaves below or above its rows has no cell with anything in it.
        lines = (cells for cells in reader if any(map(str.strip, cells)))
        head = [name.strip() for name in next(lines, [])]
        if not head:
            raise ValueError(f"{path} is empty. Its first line names the columns.")
        for name in head:
            if not name:
                raise ValueError(f"{path}: column {head.index(name) + 1} has no name. Give it one.")
            if head.count(name) > 1:
                raise ValueError(f"{path}: two columns are called {name!r}. Rename one.")
        for cells in lines:
            if len(cells) != len(head):
                mark = _MARKS[between]
                more = f"Put cells with a {mark} in quotes."
                fewer = f"Write a {mark} also where a cell is empty."
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cell{'s' * (len(cells) > 1)}, "
                    f"but there are {len(head)} columns ({', '.join(head)}). "
                    f"{more if len(cells) > len(head) else fewer}"
                )
            yield f"line {reader.line_num}", dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: it is not CSV ({error}). Close the quotes, and "
            "double those inside a cell."
        ) from None


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    row = parse_json(line, f"{path}, line {number}")
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, line {number} holds a {type(row).__name__}. Each line is an object of "
            'columns, such as {"person": "Ann", "city": "Rome"}.'
        )
    return row


def _table(name: str, given: Sequence[tuple[str, Any]], used: Collection[str] | None) -> Table:
    if not given:
        raise ValueError(f"{name} has no rows. Give a row for each fact.")
    columns: dict[str, Any] = {}
    for column in dict.fromkeys(column for _, row in given for column in row):
        other = columns.setdefault(as_field(str(column)), column)
        if other != column:
            raise ValueError(
                f"{name}: the columns {str(other)!r} and {str(column)!r} are both the field "
                f"{{{as_field(str(column))}}}. Rename one."
            )
    rows = tuple(
        {
            own: _cell(f"{name}, {where}", own, row.get(column))
            if used is None or own in used
            else _kept(row.get(column))
            for own, column in columns.items()
        }
        for where, row in given
    )
    return Table(tuple(columns), rows, tuple(f"{name}, {where}" for where, _ in given))


def as_field(name: str) -> str:
    """What a column is called as a field and as a span: of "home town", `home_town`."""
    name = unicodedata.normalize("NFKC", name)  # as Python reads names
    own = "_".join("".join(c if f"a{c}".isidentifier() else " " for c in name).split())
    own = own.strip("_") if own.startswith("__") else own  # Python's own
    if not own.isidentifier():
        own = f"_{own}"
    return f"{own}_" if iskeyword(own) or own in _SAID else own


def _kept(value: Any) -> Cell:
    """A cell of a column that nothing reads, whatever it holds."""
    try:
        return _cell("", "", value)
    except ValueError:
        return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(where: str, column: str, value: Any) -> Cell:
    """A cell as text, or as a list of texts; without white space around it."""
    if isinstance(value, list | tuple):
        cells = [_cell(where, column, inner) for inner in value]
        if not all(isinstance(cell, str) for cell in cells):
            raise ValueError(f"{where}: {column!r} is a list of lists. Write a list of texts.")
        return tuple(str(cell) for cell in cells if cell)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        if "\n" in value.strip():
            raise ValueError(
                f"{where}: {column!r} is {brief(value)}, with a line break in it. Write it in one "
                "line."
            )
        return value.strip()
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()  # as pandas keeps dates
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(
            f"{where}: {column!r} is {brief(value)}, not a text, a number or a list of texts. "
            "Write it in quotes."
        )
    return str(int(value)) if value == int(value) else repr(value)


def listed(cell: Cell) -> tuple[str, ...]:
    """The entries of a cell that holds a list, each once: a list, or a text with `|` between."""
    if isinstance(cell, tuple):
        return tuple(dict.fromkeys(cell))
    entries = (entry.strip() for entry in cell.split(SEPARATOR))
    return tuple(dict.fromkeys(entry for entry in entries if entry))


@cache
def row_class(
    columns: tuple[str, ...],
    entities: tuple[str, str],
    untold: tuple[str, ...] = (),
    bridge: str | None = None,
    aliases: str | None = None,
    distractors: str | None = None,
) -> Any:
    """The class of a table's facts: a frozen dataclass with a field for each column.

    Args:
        columns: the fields.
        entities: the two that a fact links.
        untold: those that no text mentions, `aliases` and `distractors` among them.
        bridge: the column between the two, if there is one.
        aliases: further right answers, as a tuple.
        distractors: wrong answers, as a tuple.
    """
    kinds: list[tuple[str, Any]] = [(column, Any) for column in columns]
    known = {
        "ENTITIES": entities,
        "UNTOLD": untold,
        "BRIDGE": bridge,
        "ALIASES": aliases,
        "DISTRACTORS": distractors,
        "__doc__": "A row of a table of facts.",
    }
    fixed = [(name, ClassVar[Any], value) for name, value in known.items() if name[0] != "_"]
    made = make_dataclass("Row", [*kinds, *fixed], frozen=True)
    made.__doc__ = str(known["__doc__"])
    return made
