"""What pages are made of, and the page of an experiment.

A page is one file that opens without a network and loads nothing: styles, scripts and plotly's
JavaScript (once) are inside, and its content policy forbids the rest. Its HTML is in `templates`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from graftlens.folder import at_home, claim, writable, write_whole
from graftlens.viz import tables
from graftlens.viz.examples import Glimpse
from graftlens.viz.render import GENERATOR, render
from graftlens.viz.spelling import headed

#: How the pages of version 0.1.0 begin, which did not say so.
_BEFORE = (
    '<meta name="color-scheme" content="light dark">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;; script-src '
)

#: A number, a range or a value with its interval; `0.5*sft @ last` is a graft.
_NUMBER = re.compile(r"-?\d[\d.,%-]*(?= \[|$)")

#: Longer tables are cut on a page; their CSV has all rows.
MAX_ROWS = 60

#: The file that made the folder of a page's tables ours in version 0.1.0.
_TABLES = "graftlens-tables.txt"


@dataclass(frozen=True)
class Figure:
    """A figure with its caption and, for readers who cannot see it, a description."""

    caption: str
    alt: str
    figure: go.Figure
    files: Mapping[str, Path] = field(default_factory=dict)
    """Kind (html, png, …) -> the same figure as a file."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Kind -> why there is no such file."""


@dataclass(frozen=True)
class Table:
    """A table with its caption; `frame` is a summary or any other table."""

    caption: str
    frame: pd.DataFrame
    files: Mapping[str, Path] = field(default_factory=dict)
    """Kind (csv, md) -> the same table as a file."""

    def cells(self) -> "Cells":
        """The table as a reader wants it, cut to `MAX_ROWS` rows."""
        shown = tables.written_columns(self.frame.head(MAX_ROWS))
        head = [
            (
                heading,
                not pd.api.types.is_numeric_dtype(self.frame.get(heading, pd.Series(dtype=object)))
                and not any(map(_NUMBER.match, column)),
            )
            for heading, column in shown.items()
        ]
        rows = [
            [_split(cell, words) for cell, (_, words) in zip(row, head, strict=True)]
            for row in zip(*shown.values(), strict=True)
        ]
        key = list(shown).index("graft") if "graft" in shown else 0
        return Cells(head, rows, len(self.frame), key)


def table_beside(page: Path, name: str, caption: str, frame: pd.DataFrame) -> Table:
    """A table of a page; if the page cuts it, it is complete in the folder `<page's name>_tables`.

    Raises:
        ValueError: a folder of that name that graftlens did not create.
        OSError: files that cannot be written.
    """
    if len(frame) <= MAX_ROWS:
        return Table(caption, frame)
    folder = page.with_name(f"{page.stem}_tables")
    claim(folder, "tables", taken=() if (folder / _TABLES).is_file() else None)
    return Table(caption, frame, tables.write_table(frame, folder / name))


@dataclass(frozen=True)
class Cells:
    """What a page shows of a table."""

    head: list[tuple[str, bool]]
    """Each heading, and whether its column has words and not numbers."""
    rows: list[list[tuple[str, str]]]
    """Each cell's value, and its interval in brackets or nothing."""
    total: int
    """How many rows the table has."""
    key: int = 0
    """The column that stays where it is while the others scroll."""

    @property
    def cut(self) -> bool:
        return len(self.rows) < self.total


@dataclass(frozen=True)
class Part:
    """One part of an experiment: what it asks and shows."""

    title: str
    text: str = ""
    findings: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    """Graft -> its rules in the graft grammar."""
    glossary: Mapping[str, str] = field(default_factory=dict)
    """What names and words mean."""
    warnings: Sequence[str] = ()
    """Why its numbers may mean nothing; shown at the top of the page."""


@dataclass(frozen=True)
class ExperimentPage:
    """All that the page of an experiment shows."""

    title: str
    question: str
    lead: str
    """The answer, in a sentence or two."""
    parts: Sequence[Part]
    provenance: Mapping[str, object]
    links: Mapping[str, Path] = field(default_factory=dict)
    """What a further file is -> where it is; shown relative to the page."""
    glimpse: Glimpse | None = None
    """What the page begins with."""

    @property
    def warnings(self) -> list[str]:
        """Those of all parts, each with its part's title if there are several."""
        several = len(self.parts) > 1
        return [
            headed(part.title, warning) if several else warning
            for part in self.parts
            for warning in part.warnings
        ]

    @property
    def glossary(self) -> dict[str, str]:
        """What names and words of all parts mean."""
        return {word: said for part in self.parts for word, said in part.glossary.items()}

    @property
    def missing(self) -> list[str]:
        """Which files of figures there are not, and why, each reason once."""
        figures = [figure for part in self.parts for figure in part.figures]
        found: dict[str, list[tuple[str, ...]]] = {}
        for figure in figures:
            for why in dict.fromkeys(figure.skipped.values()):
                kinds = tuple(k.upper() for k, reason in figure.skipped.items() if reason == why)
                found.setdefault(why, []).append(kinds)
        return [
            f"{len(lacking)} of {len(figures)} figures have no "
            f"{' and no '.join(dict.fromkeys(chain(*lacking)))}: {why}."
            for why, lacking in found.items()
        ]


def experiment_page(path: str | Path, page: ExperimentPage) -> Path:
    """Write the page of an experiment to `path` and return it; it appears whole or not at all.

    Links to files are relative to the page's folder, so that the folder can be moved.
    """
    path = at_home(path)
    html = render("experiment.html", title=page.title, page=page, folder=path.parent)
    return write_whole(path, html)


def is_page(path: Path) -> bool:
    """Whether a file is a page that graftlens wrote."""
    try:
        with path.open("rb") as file:
            beginning = file.read(2000).decode(errors="replace")
    except OSError:
        return False
    return GENERATOR in beginning or _BEFORE in beginning


def page_at(path: Path, advice: str = "Name another file.") -> Path:
    """The path, where a page may be written: it is writable, and holds nothing or a page.

    Raises:
        UnwritableError: it cannot be written.
        ValueError: it holds something else, which is left untouched; `advice` ends the message.
    """
    path = writable(path)
    if os.path.lexists(path) and not is_page(path):
        raise ValueError(
            f"{path} exists and is not a page that graftlens wrote, so it is left untouched. "
            f"{advice}"
        )
    return path


def _split(said: str, words: bool) -> tuple[str, str]:
    """A cell's value and its interval."""
    value, bracket, interval = said.partition(" [")
    if words or not bracket or not interval.endswith("]"):
        return said, ""
    return value, f"[{interval}"
