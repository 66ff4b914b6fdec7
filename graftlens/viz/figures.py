"""Charts for a page: each with a caption and a description made from the same numbers."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.metrics import known
from graftlens.viz import text
from graftlens.viz.bars import grouped_bars
from graftlens.viz.heatmaps import cells, heatmap
from graftlens.viz.interactions import interaction_matrix, sentences
from graftlens.viz.linecharts import lines
from graftlens.viz.page import Figure
from graftlens.viz.quantities import Quantity, of_summary
from graftlens.viz.spelling import capital
from graftlens.viz.sweeps import dose_response

#: A description that lists more values than this tells a listener less, not more.
LISTED = 60


def bar_chart(
    summary: pd.DataFrame,
    metric: str | Quantity,
    *,
    files: Mapping[str, Path] | None = None,
    **options: Any,
) -> Figure:
    """`grouped_bars(summary, metric, **options)` with its caption and description."""
    facts = of_summary(summary, metric)
    caption = f"{_beginning(facts)}; {text.whiskers(summary, facts)}"
    if text.has_intervals(summary, facts):
        caption += f"s over {text.resampled(summary)}"
    caption += "."
    parts = text.groups(summary)
    said = []
    for name, part in parts.items():
        if len(summary) > LISTED:
            said.append(f"{name}: {_ends(facts, part, part['graft'].astype(str).tolist())}")
        else:
            pairs = zip(part["graft"], text.written_all(facts, part), strict=True)
            said.append(f"{name}: {', '.join(f'{graft} {value}' for graft, value in pairs)}")
    alt = f"Bar chart of {facts.label} by graft. {'. '.join(said)}."
    return Figure(caption, alt, grouped_bars(summary, metric, **options), dict(files or {}))


def heat_map(
    summary: pd.DataFrame,
    metric: str = "recovery",
    *,
    x: str = "layer",
    y: str = "component",
    panel: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Figure:
    """`heatmap(summary, metric, x=x, y=y, panel=panel)` with its caption and description."""
    facts = of_summary(summary, metric)
    found = cells(summary, x=x, y=y, panel=panel)
    rows = summary.reset_index(drop=True)
    each = f", one panel for each {panel}" if panel is not None else ""
    caption = f"{_beginning(facts)} by {y} and {x}{each}."
    if facts.signed:
        caption += (
            f" The scale is symmetric around 0. A dot: the {text.level(summary)} interval over "
            f"{text.resampled(summary)} of this cell alone excludes 0; with many cells some do by "
            "chance."
        )
    said = []
    for name in found.y:
        keys = [key for key in found.row if key[0] == name]
        part = rows.loc[[found.row[key] for key in keys]]
        missing = len(found.x[name]) * len(found.y[name]) - int(part[metric].notna().sum())
        ends = _ends(facts, part, [f"{down} at {x} {across}" for _, down, across in keys])
        gaps = f"; {missing} cells have no value" if missing else ""
        said.append((f"{name}: " if name else "") + ends + gaps)
    alt = f"Heat map of {facts.label}, {y} by {x}. {'. '.join(said)}."
    return Figure(caption, alt, heatmap(summary, metric, x=x, y=y, panel=panel), dict(files or {}))


def line_chart(
    frame: pd.DataFrame,
    x: str,
    metric: str | Quantity,
    *,
    series: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Figure:
    """`lines(frame, x, metric, series=series)` with its caption and description."""
    facts = of_summary(frame, metric)
    figure = lines(frame, x, metric, series=series)
    along = x.replace("_", " ")
    caption = f"{_beginning(facts)} along {along}"
    caption += f", one line for each {series.replace('_', ' ')}." if series is not None else "."
    said = []
    names = [None] if series is None else list(dict.fromkeys(frame[series]))
    for name in names:
        part = frame if name is None else frame[frame[series].eq(name)]
        means = part.groupby(x, sort=True)[facts.name].mean()
        first, last = (_value(facts, means.iloc[i]) for i in (0, -1))
        start = "" if name is None else f"{name}: "
        said.append(f"{start}from {first} at {means.index[0]} to {last} at {means.index[-1]}")
    alt = f"Line chart of {facts.label} along {along}. {'. '.join(said)}."
    return Figure(caption, alt, figure, dict(files or {}))


def dose_chart(
    summary: pd.DataFrame,
    metric: str,
    *,
    series: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Figure:
    """`dose_response(summary, metric, series=series)` with its caption and description."""
    facts = of_summary(summary, metric)
    figure = dose_response(summary, metric, series=series)
    each = "graft" if series is None else series.replace("_", " ")
    caption = f"{_beginning(facts)} against the strength of a graft, one line for each {each}."
    said = []
    for line in figure.data:
        first, last = (_value(facts, line.y[at]) for at in (0, -1))
        name = html.unescape(str(line.name))
        said.append(f"{name}: from {first} at {line.x[0]:g} to {last} at {line.x[-1]:g}")
    alt = f"Line chart of {facts.label} against strength. {'. '.join(said)}."
    return Figure(caption, alt, figure, dict(files or {}))


def interaction_chart(
    table: pd.DataFrame, pairs: pd.DataFrame, *, files: Mapping[str, Path] | None = None
) -> Figure:
    """`interaction_matrix(table, pairs)` with its caption and description."""
    names = [Quantity.of(str(name)).short for name in dict.fromkeys(table["metric"])]
    caption = (
        f"Interactions of players in {' and in '.join(names)}: AND, each needs the other; OR, "
        "either is enough; +, additive; ?, undecided. Bars: Shapley and Banzhaf values, with "
        f"{100 * float(table['level'].iloc[0]):g}% intervals over facts."
    )
    found = sentences(pairs) or ["No pair is an AND or an OR."]
    alt = f"Matrix of pairs and bars of players. {' '.join(found[:LISTED])}"
    return Figure(caption, alt, interaction_matrix(table, pairs), dict(files or {}))


def _beginning(facts: Quantity) -> str:
    """A measure's title at the start of a sentence; one of the user's own keeps its name."""
    own = known(facts.name) is None and facts.name != "recovery"
    return facts.title if own else capital(facts.title)


def _ends(facts: Quantity, rows: pd.DataFrame, names: Sequence[str]) -> str:
    """The least and the greatest of many values, in words."""
    values = rows[facts.name].to_numpy(dtype=float).tolist()
    held = [(value, name) for value, name in zip(values, names, strict=True) if value == value]
    if not held:
        return "no value"
    (low, at_low), (high, at_high) = min(held), max(held)
    return (
        f"{len(held)} values from {_value(facts, low)} ({at_low}) to {_value(facts, high)} "
        f"({at_high})"
    )


def _value(facts: Quantity, value: float) -> str:
    bounds = {f"{facts.name}{end}": [value] for end in ("", "_low", "_high")}
    return text.written_all(facts, pd.DataFrame(bounds), interval=False)[0]
