"""What plots of lens tables share: values and their scales, and a heat map of labelled cells."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import plotly.graph_objects as go

from graftlens.viz import theme
from graftlens.viz.lenstables import listed
from graftlens.viz.spelling import escaped, shortened


@dataclass(frozen=True)
class Value:
    """How a column is named, written and coloured.

    `kind`: `share` is written in percent on a scale from 0 to 1; `rank` on a log scale, darkest at
    1; `fall` (log-probability) goes up to 0; `likeness` (cosine) is darkest where it is least; all
    else starts at 0.
    """

    label: str
    unit: str
    kind: Literal["plain", "share", "rank", "fall", "likeness"] = "plain"
    of_answer: bool = False

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"

    def coloured(self, value: float) -> float:
        return math.log10(value) if self.kind == "rank" else value

    def written(self, value: float) -> str:
        if math.isnan(value):
            return "no value"
        if self.kind == "share":
            return f"{100 * value:.3g}%"
        if self.kind == "rank":
            return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def value(values: Mapping[str, Value], name: str) -> Value:
    """What is known of the column `name`; an error lists the columns that could be shown."""
    if name not in values:
        raise ValueError(f"unknown value {name!r}; choose from {listed(values)}")
    return values[name]


@dataclass(frozen=True)
class Cell:
    """One cell: its place on the scale, the lines of its hover text and what is written in it."""

    z: float
    said: Sequence[str]
    label: str = ""


@dataclass(frozen=True)
class Scale:
    """Colours from `low` to `high`; `ticks` are settings of plotly's colour bar."""

    low: float
    high: float
    colors: tuple[str, ...]
    title: str
    ticks: Mapping[str, object] = field(default_factory=dict)


def scale(
    facts: Value, held: Sequence[float], shown: Sequence[float], signed: bool, whole: bool = True
) -> Scale:
    """The colours for `held` (all that share the scale), or for the differences in `shown`.

    `signed`: symmetric around 0. `whole`: a share's scale goes up to 1, whatever the data.
    """
    held = [v for v in (shown if signed else held) if math.isfinite(v)]
    low, high = min(held, default=0.0), max(held, default=0.0)
    ticks: dict[str, object] = {}
    if facts.kind == "share":
        ticks["tickformat"] = ".0%" if max(abs(low), abs(high)) > 0.05 or whole else ".1%"
    if signed:
        end = max(abs(low), abs(high)) or 1.0
        diverging, title = theme.DIVERGING, facts.title
        if facts.kind == "rank":
            # A lower rank is better, and what is better is red for every value.
            diverging, title = diverging[::-1], "ratio of the ranks (1 = equal)"
            powers = range(-math.floor(end), math.floor(end) + 1)
            ticks = {"tickvals": list(powers)}
            ticks["ticktext"] = [f"1/{10**-p:,}" if p < 0 else f"{10**p:,}" for p in powers]
        return Scale(-end, end, diverging, title, ticks)
    colors: tuple[str, ...] = theme.SEQUENTIAL
    if facts.kind == "rank":
        high = high or 1.0
        powers = range(math.floor(high) + 1)
        ticks = {"tickvals": list(powers), "ticktext": [f"{10**p:,}" for p in powers]}
        return Scale(0.0, high, colors[::-1], facts.title, ticks)
    if facts.kind == "fall":
        return Scale(low or -1.0, 0.0, colors, facts.title)
    if facts.kind == "likeness":
        return Scale(low if low < 1 else 0.0, 1.0, colors[::-1], facts.title)
    end = 1.0 if facts.kind == "share" and whole else high or 1.0
    return Scale(0.0, end, colors, facts.title, ticks)


def draw(
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
    figure = go.Figure()
    labelled = any(cell.label for cell in cells.values())
    figure.add_heatmap(
        z=[[None if c is None or not math.isfinite(c.z) else c.z for c in line] for line in found],
        text=[["" if c is None else escaped(c.label) for c in line] for line in found],
        texttemplate="%{text}" if labelled else None,
        textfont_size=10 if row >= 20 else 9,
        customdata=[
            [
                "not there" if c is None else "<br>".join(wrapped(said, 70) for said in c.said)
                for c in line
            ]
            for line in found
        ],
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=scale.low,
        zmax=scale.high,
        colorscale=theme.colorscale(scale.colors),
        colorbar={
            "title": {"side": "right", "font": {"size": 12}},
            "thickness": 14,
            "outlinewidth": 0,
            **scale.ticks,
        },
    )
    inner = max(190, row * len(down[0]))
    title = escaped(scale.title)
    figure.data[0].colorbar.title.text = (
        title.replace(" (", "<br>(") if 7.5 * len(title) > inner else title
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


def ticks(names: Sequence[str]) -> dict[str, object]:
    """Every name at its place 0, 1, …; tokens repeat, so that they are no categories."""
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
    # What does not fit into one row stands in columns as wide as the widest.
    inside = width - 86
    columns = len(entries) if sum(entries) <= inside else max(1, int(inside / max(entries)))
    rows = math.ceil(len(entries) / max(1, columns))
    above = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    return {
        "height": height + 20 * (rows - 1),
        "margin": {"l": 70, "r": 16, "t": 48, "b": 60},
        "legend": above,
        "hovermode": "closest",
        "showlegend": True,
    }
