"""The scaffolding of every page, and the page of an experiment.

A page is one file that opens without a network and loads nothing: styles, scripts and plotly's
JavaScript (once) are inside, and its content policy forbids the rest.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from graftlens.folder import at_home, write_whole
from graftlens.viz import tables, theme

#: By this a file is a page that graftlens wrote, and may be written again.
GENERATOR = '<meta name="generator" content="graftlens">'

#: How the pages of version 0.1.0 begin, which did not say so.
_BEFORE = (
    '<meta name="color-scheme" content="light dark">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;; script-src '
)

#: Longer tables are cut on a page; their CSV has all rows.
MAX_ROWS = 60


@dataclass(frozen=True)
class Figure:
    """A figure with its caption and, for readers who cannot see it, a description."""

    caption: str
    alt: str
    figure: go.Figure
    files: Mapping[str, Path] = field(default_factory=dict)
    """Kind (html, png, …) -> the same figure as a file."""


@dataclass(frozen=True)
class Table:
    """A table with its caption; `frame` is a summary or any other table."""

    caption: str
    frame: pd.DataFrame
    files: Mapping[str, Path] = field(default_factory=dict)
    """Kind (csv, md) -> the same table as a file."""


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


def experiment_page(path: str | Path, page: ExperimentPage) -> Path:
    """Write the page of an experiment to `path` and return it; it appears whole or not at all.

    Links to files are relative to the page's folder, so that the folder can be moved.
    """
    path = at_home(path)
    drawn = 0
    sections = []
    for number, part in enumerate(page.parts):
        shown = figures(part.figures, folder=path.parent, start=drawn)
        drawn += len(part.figures)
        words = f"<p>{escape(part.text)}</p>" if part.text else ""
        held = "\n".join(table(t, folder=path.parent) for t in part.tables)
        content = "\n".join((words, bullets(part.findings), shown, held, _rules(part.rules)))
        sections.append(section(f"part-{number}", part.title, content))
    contents = ""
    if len(page.parts) > 1:
        items = "".join(
            f"<li><a href='#part-{i}'>{escape(part.title)}</a></li>"
            for i, part in enumerate(page.parts)
        )
        contents = f"<nav aria-label='Parts of this page'><ol>{items}</ol></nav>"
    body = "\n".join(
        (
            f"<header><h1>{escape(page.title)}</h1><p class='question'>{escape(page.question)}</p>"
            f"<p class='lead'>{escape(page.lead)}</p>{contents}</header>",
            *sections,
            section("run", "What was run and how", definitions(page.provenance)),
            section("files", "Further files", _file_list(page.links, path.parent))
            if page.links
            else "",
        )
    )
    return write_whole(path, document(page.title, body))


def document(
    title: str, body: str, *, style: str = "", scripts: Sequence[str] = (), charts: bool = True
) -> str:
    """A whole page around the HTML of its body.

    `style` is CSS and `scripts` is JavaScript of this page alone, after every page's own. Without
    `charts` the page has neither plotly nor the script that draws `figures`.
    """
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    looks = {"light": asdict(theme.LIGHT), "dark": asdict(theme.DARK)}
    drawing = (
        [get_plotlyjs(), f"const looks = {as_json(looks)};", asset("page.js")] if charts else []
    )
    ends = "\n".join(f"<script>{script}</script>" for script in (*drawing, *scripts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(title)}</title>
<style>{_variables(theme.LIGHT)}
@media screen and (prefers-color-scheme: dark) {{ {_variables(theme.DARK)} }}
{asset("page.css")}{style}</style>
</head>
<body>
<main>
{body}
</main>
{ends}
</body>
</html>
"""


def is_page(path: Path) -> bool:
    """Whether a file is a page that graftlens wrote."""
    try:
        with path.open("rb") as file:
            beginning = file.read(2000).decode(errors="replace")
    except OSError:
        return False
    return GENERATOR in beginning or _BEFORE in beginning


def section(name: str, title: str, content: str) -> str:
    """A section under its heading; `name` is its id on the page."""
    return (
        f"<section aria-labelledby='{escape(name)}'><h2 id='{escape(name)}'>{escape(title)}</h2>\n"
        f"{content}</section>"
    )


def bullets(sentences: Sequence[str], kind: str = "findings") -> str:
    """Sentences as a list; nothing for none."""
    if not sentences:
        return ""
    return f"<ul class='{kind}'>{''.join(f'<li>{escape(s)}</li>' for s in sentences)}</ul>"


def figures(shown: Sequence[Figure], *, folder: Path, start: int = 0) -> str:
    """Figures with captions and links to their files; `start` is the first one's number."""
    parts = []
    for index, item in enumerate(shown, start=start):
        height = int(item.figure.layout.height or 430)
        parts.append(
            f"<figure><div class='chart' id='chart-{index}' role='img' "
            f"aria-label='{escape(item.alt)}' style='height:{height}px'></div>"
            f"<script type='application/json' id='chart-{index}-figure'>"
            f"{as_json(json.loads(item.figure.to_json()))}</script>"
            f"<figcaption>{escape(item.caption)}{_links(item.files, folder)}</figcaption></figure>"
        )
    if parts:
        parts.append(
            "<noscript><p>The charts need JavaScript; the tables have their numbers.</p></noscript>"
        )
    return "\n".join(parts)


def table(item: Table, *, folder: Path) -> str:
    """A table as a reader wants it, cut to `MAX_ROWS` rows, with links to its files."""
    cut = len(item.frame) > MAX_ROWS
    shown = tables.written_columns(item.frame.head(MAX_ROWS))
    words = {
        heading
        for heading, column in shown.items()
        if not pd.api.types.is_numeric_dtype(item.frame.get(heading, pd.Series(dtype=object)))
        and not any(cell[:1].isdigit() or cell[:1] == "-" for cell in column)
    }
    head = "".join(
        f"<th scope='col'{_left(heading in words)}>{escape(heading)}</th>" for heading in shown
    )
    rows = "".join(
        f"<tr>{''.join(_cell(c, h in words) for h, c in zip(shown, row, strict=True))}</tr>"
        for row in zip(*shown.values(), strict=True)
    )
    more = ""
    if cut:
        more = f"The first {MAX_ROWS} of {len(item.frame)} rows are shown here."
        if "csv" in item.files:
            where = f"<a href='{_relative(item.files['csv'], folder)}'>CSV file</a>"
            more += f" All {len(item.frame)} are in the {where}."
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(item.caption)}'>"
        f"<table><caption>{escape(item.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        f"<p class='notes'>{more}{_links(item.files, folder)}</p>"
    )


def definitions(value: Mapping[str, object]) -> str:
    """Names and what they stand for, however deep, as a definition list."""
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{_described(inner)}</dd>" for key, inner in value.items()
    )
    return f"<dl>{items}</dl>"


def rules(known: Mapping[str, Iterable[str]]) -> str:
    """Graft -> the rules under its name, as a definition list."""
    items = "".join(
        f"<dt>{escape(graft)}</dt><dd>"
        f"{' or '.join(f'<code>{escape(rule)}</code>' for rule in given)}</dd>"
        for graft, given in known.items()
    )
    return f"<dl>{items}</dl>"


def asset(name: str) -> str:
    """A script or a style sheet of the package."""
    return resources.files("graftlens.viz").joinpath(name).read_text(encoding="utf-8")


def as_json(value: object) -> str:
    """JSON that may stand inside a script element; a number that is not finite is null."""
    # Inside a script element only "<" can end it or start a comment.
    return json.dumps(_finite(value), allow_nan=False, separators=(", ", ": ")).replace(
        "<", "\\u003c"
    )


def _rules(known: Mapping[str, str]) -> str:
    if not known:
        return ""
    shown = rules({graft: [rule or "(no rule: the base)"] for graft, rule in known.items()})
    return f"<details><summary>The grafts ({len(known)})</summary>{shown}</details>"


def _cell(said: str, words: bool) -> str:
    value, bracket, interval = said.partition(" [")
    if words or not bracket or not interval.endswith("]"):
        return f"<td{_left(words)}>{escape(said)}</td>"
    return f"<td>{escape(value)} <small>[{escape(interval)}</small></td>"


def _left(words: bool) -> str:
    return " class='words'" if words else ""


def _links(files: Mapping[str, Path], folder: Path) -> str:
    links = (
        f"<a href='{_relative(where, folder)}'>{escape(kind.upper())}</a>"
        for kind, where in files.items()
    )
    said = " · ".join(links)
    return f" <span class='files'>{said}</span>" if said else ""


def _file_list(links: Mapping[str, Path], folder: Path) -> str:
    items = (
        f"<li><a href='{_relative(where, folder)}'>{escape(what)}</a></li>"
        for what, where in links.items()
    )
    return f"<ul>{''.join(items)}</ul>"


def _relative(target: Path, folder: Path) -> str:
    return escape(quote(Path(os.path.relpath(target, folder)).as_posix()))


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return definitions(value) if value else "none"
    if isinstance(value, list | tuple):
        if not value:
            return "none"
        if any(isinstance(item, Mapping | list | tuple) for item in value):
            return f"<ol>{''.join(f'<li>{_described(item)}</li>' for item in value)}</ol>"
        return ", ".join(_described(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"<code>{escape(str(value))}</code>"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _variables(look: theme.Theme) -> str:
    return (
        f":root {{ --surface: {look.surface}; --text: {look.text}; --muted: {look.muted}; "
        f"--grid: {look.grid}; --sft: {theme.source_color('sft')}; }}"
    )
