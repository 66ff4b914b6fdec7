"""What plots of tables share: a heat map of labelled cells, and room for long names."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from graftlens.viz import theme
from graftlens.viz.quantities import Scale
from graftlens.viz.spelling import escaped, shortened

#: What the traces of a heat map's labels are called.
LABELS = "labels"


@dataclass(frozen=True)
class Cell:
    """One cell: its place on the scale, the lines of its hover text and what is written in it."""

    z: float
    said: Sequence[str]
    label: str = ""


def heatmap(
    cells: Mapping[tuple[Any, Any], Cell],
    *,
    across: tuple[Sequence[Any], Sequence[str]],
    down: tuple[Sequence[Any], Sequence[str]],
    scale: Scale,
    heading: str,
    titles: tuple[str, str],
    look: theme.Theme,
    row: int = 22,
) -> go.Figure:
    """A heat map of `cells` by (row, column); one without a number stays empty.

    `across` and `down` are keys and what the axes call them; the first row is at the bottom. `row`
    is a row's height in pixels.
    """
    found = [[cells.get((y, x)) for x in across[0]] for y in down[0]]
    inner = max(190, row * len(down[0]))
    said = [
        [
            "missing" if c is None else "<br>".join(wrapped(words, 70) for words in c.said)
            for c in line
        ]
        for line in found
    ]
    figure = go.Figure()
    figure.add_heatmap(
        z=[[None if c is None or not math.isfinite(c.z) else c.z for c in line] for line in found],
        **hovering(said),
        zmin=scale.low,
        zmax=scale.high,
        colorscale=theme.colorscale(scale.colors),
        colorbar=scale.bar(inner),
    )
    add_labels(
        figure,
        [
            (x, y, cell.label, cell.z)
            for y, line in enumerate(found)
            for x, cell in enumerate(line)
            if cell is not None and cell.label and math.isfinite(cell.z)
        ],
        scale,
        size=10 if row >= 20 else 9,
    )
    headed = wrapped(heading, 80)
    more = 18 * headed.count("<br>")
    margin = {"l": 70, "r": 16, "t": 40 + more, "b": 76}
    figure.update_layout(**theme.layout(look), height=inner + 116 + more, margin=margin)
    axis = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(
        **axis, **ticks(across[1]), range=[-0.5, len(across[0]) - 0.5], title_text=titles[0]
    )
    figure.update_yaxes(
        **axis,
        tickvals=list(range(len(down[0]))),
        ticktext=[escaped(name) for name in down[1]],
        tickfont_size=11 if row >= 20 else 9,
        ticksuffix=" ",
        range=[-0.5, len(down[0]) - 0.5],
        title_text=titles[1],
    )
    figure.add_annotation(
        text=headed,
        align="left",
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yref="paper",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
        font_size=13,
    )
    return figure


def hovering(said: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What plotly's heat maps are given here: each cell's hover text, and lines between cells."""
    return {
        "customdata": said,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }


def add_labels(
    figure: go.Figure,
    labels: Sequence[tuple[Any, Any, str, float]],
    scale: Scale,
    *,
    size: int,
    **where: Any,
) -> None:
    """Write labels, (x, y, text, value on the scale), into cells of a heat map.

    Plotly's own would be grey or white on whatever colour a cell has; these have a contrast of 4.5
    or more. `where` is the subplot's row and column.
    """
    span = scale.high - scale.low or 1.0
    inks: dict[str, list[tuple[Any, Any, str]]] = {}
    for x, y, label, z in labels:
        color = theme.ink(theme.mixed(scale.colors, (z - scale.low) / span))
        inks.setdefault(color, []).append((x, y, escaped(label)))
    for color, written in inks.items():
        across, down, said = zip(*written, strict=True)
        figure.add_scatter(
            x=across,
            y=down,
            text=said,
            mode="text",
            textfont={"color": color, "size": size},
            hoverinfo="skip",
            showlegend=False,
            name=LABELS,
            **where,
        )


def ticks(names: Sequence[str]) -> dict[str, object]:
    """Every name at its place 0, 1, …; tokens repeat, so that they are not categories."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [escaped(name) for name in names],
        "tickfont_size": 11 if len(names) <= 40 else 8,
        "autotickangles": [0, -45, -90],
    }


def wrapped(words: str, most: int) -> str:
    """Text for plotly in lines of at most `most` characters, escaped."""
    return "<br>".join(map(escaped, textwrap.wrap(words, most, break_on_hyphens=False) or [""]))


def legend_above(names: Sequence[str], height: int, width: int = 700) -> dict[str, Any]:
    """Plotly layout of a chart with a legend of `shortened` names above it.

    `height` is the chart's if the legend takes one row; with more rows it is higher, so that a
    chart `width` pixels wide keeps its plot. Plotly makes the room: it moves the top margin.
    """
    entries = [45 + 7 * len(said) for said in shortened(names).values()]
    # What does not fit into one row is set in columns as wide as the widest.
    inside = width - 86
    columns = len(entries) if sum(entries) <= inside else max(1, int(inside / max(entries)))
    rows = math.ceil(len(entries) / max(1, columns))
    return {
        "height": height + 20 * (rows - 1),
        "margin": {"l": 70, "r": 16, "t": 48, "b": 60},
        "legend": theme.ABOVE | {"traceorder": "normal"},
        "hovermode": "closest",
        "showlegend": True,
    }
