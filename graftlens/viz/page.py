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
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from graftlens.viz import tables, theme
from graftlens.viz.files import write_whole

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
    path = Path(path)
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
    drawing = [get_plotlyjs(), f"const looks = {as_json(looks)};\n{_SCRIPT}"] if charts else []
    ends = "\n".join(f"<script>{script}</script>" for script in (*drawing, *scripts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(title)}</title>
<style>{_variables(theme.LIGHT)}
@media screen and (prefers-color-scheme: dark) {{ {_variables(theme.DARK)} }}
{_STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
{ends}
</body>
</html>
"""


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


def visible(token: str) -> str:
    """A token's text with its white space and control characters as marks; not escaped.

    A space is "·", a line break "↵", a tab "→", a no-break space "⍽", nothing at all "∅".
    """
    marks = {" ": "·", "\n": "↵", "\t": "→", "\u00a0": "⍽"}
    return (
        "".join(
            marks.get(char) or (char if char.isprintable() else f"\\u{ord(char):04x}")
            for char in token
        )
        or "∅"
    )


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


_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--surface); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
h4 { font-size: .95rem; margin: .75rem 0 .15rem; }
small { color: var(--muted); font-weight: normal; font-size: .85em; }
.lead { font-size: 1.15rem; margin: 0; padding: .75rem 1rem; border-left: 4px solid var(--sft); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
figure { margin: 0 0 1.5rem; }
figcaption, .notes, .legend { color: var(--muted); font-size: .9rem; }
.chart { width: 100%; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th small, td small { display: block; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--surface); }
th.words, td.words { text-align: left; }
td:first-child { position: sticky; left: 0; background: var(--surface); }
a { color: inherit; text-underline-offset: .15em; }
.question { font-style: italic; margin: 0 0 .75rem; color: var(--muted); }
.files { white-space: nowrap; }
nav ol { columns: 18rem; padding-left: 1.4rem; margin: 1rem 0 0; }
details { margin: 0 0 1rem; }
.text { text-align: left; white-space: normal; min-width: 12rem; }
.ranks .text + .text { min-width: 8rem; }
summary { cursor: pointer; margin-bottom: .5rem; }
.tokens { margin: 0; line-height: 2.1; overflow-wrap: anywhere; }
.token, mark { display: inline-block; max-width: 100%; line-height: 1.5; padding: .1rem .12rem;
  border-radius: 2px; color: inherit; }
.token { border-bottom: 1px dotted var(--muted); margin-right: 2px; }
mark { border-bottom: 3px solid var(--sft); font-weight: 600; margin-right: 2px;
  background: color-mix(in srgb, var(--sft) 22%, transparent); }
.ws { color: var(--muted); font-weight: normal; user-select: none; }
.guesses { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .1rem 0 0;
  padding: 0; font-size: .9rem; color: var(--muted); }
.guesses .right { color: var(--text); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.25rem;
  margin: 0; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dd > dl { padding-left: .75rem; border-left: 2px solid var(--grid); }
@media (min-width: 60rem) { caption { white-space: nowrap; } }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 3rem; }
  h1 { font-size: 1.35rem; }
  .lead { font-size: 1.05rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .modebar { display: none !important; }
  mark, .lead { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, article > div { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: .7rem; }
  th, td { padding: .15rem .3rem; }
}
"""

_SCRIPT = """
const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
const charts = [...document.querySelectorAll(".chart")];
const drawn = new Set();
const settings = {responsive: true, displaylogo: false, showSendToCloud: false,
  displayModeBar: window.innerWidth > 640 ? "hover" : false,
  plotlyServerURL: "", modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"]};
function dress(chart, printing) {
  const look = looks[wantsDark.matches && !printing ? "dark" : "light"];
  const layout = {"font.color": look.text, "modebar.color": look.muted,
    "modebar.activecolor": look.text};
  for (const axis of Object.keys(chart.layout).filter(key => /^[xy]axis/.test(key))) {
    layout[axis + ".gridcolor"] = look.grid;
    layout[axis + ".linecolor"] = layout[axis + ".zerolinecolor"] = look.muted;
  }
  const bars = chart.data.map((trace, i) => trace.type === "bar" ? i : -1).filter(i => i >= 0);
  const outlines = {"error_y.color": look.text, "marker.line.color": look.text,
    "marker.pattern.fgcolor": look.surface, "marker.opacity": look.bar_opacity};
  const empty = chart.data.map((trace, i) => trace.name === "no value" ? i : -1)
    .filter(i => i >= 0);
  if (empty.length) return Plotly.update(chart, {"marker.line.color": look.muted}, layout, empty);
  return bars.length ? Plotly.update(chart, outlines, layout, bars)
                     : Plotly.relayout(chart, layout);
}
function draw(chart) {
  if (drawn.has(chart)) return;
  drawn.add(chart);
  const figure = JSON.parse(document.getElementById(chart.id + "-figure").textContent);
  Plotly.newPlot(chart, figure.data, figure.layout, settings).then(() => dress(chart, false));
}
// One chart a turn, so that a page of many can be read and scrolled at once.
function drawNext() {
  const next = charts.find(chart => !drawn.has(chart));
  if (next) { draw(next); setTimeout(drawNext); }
}
drawNext();
wantsDark.addEventListener("change", () => drawn.forEach(chart => dress(chart, false)));
window.addEventListener("beforeprint", () => charts.forEach(chart => {
  draw(chart);
  dress(chart, true);
}));
window.addEventListener("afterprint", () => charts.forEach(chart => dress(chart, false)));
"""
