"""Line charts: a metric along a number, such as a share of layers."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from graftlens.viz import text, theme
from graftlens.viz.lenstables import check_column
from graftlens.viz.quantities import Quantity, of_summary
from graftlens.viz.spelling import escaped


def lines(
    frame: pd.DataFrame,
    x: str,
    metric: str | Quantity,
    *,
    series: str | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` along the numbers in column `x`, one line for each value of column `series`.

    `frame` has rows of summaries; ranks are on a logarithmic axis. Where one row is at a point,
    whiskers show its interval. Where a series has several rows at any x (random draws), its line is
    their mean, a band goes from the least to the greatest, and every draw is a faint dot.

    Raises:
        ValueError: an unknown metric or column, or an x that is not a number.
    """
    facts = of_summary(frame, metric)
    for column in (x, *([series] if series is not None else [])):
        check_column(frame, column)
    at = pd.to_numeric(frame[x].astype(object), errors="coerce")
    if at.isna().any():
        wrong = frame.loc[at.isna(), x].iloc[0]
        raise ValueError(f"column {x!r} has {wrong!r}, which is not a number; x must be numbers")
    figure = go.Figure()
    drawn = False
    names: list[object] = [None] if series is None else list(dict.fromkeys(frame[series]))
    # Grafts look as they do everywhere.
    grafts = theme.graft_lines(map(str, names)) if series == "graft" else {}
    for index, name in enumerate(names):
        chosen = pd.Series(True, index=frame.index) if name is None else frame[series].eq(name)
        part = frame[chosen].assign(**{_AT: at[chosen]}).sort_values(_AT, kind="stable")
        label = facts.label if name is None else str(name)
        line = grafts.get(label) or theme.series_line(index)
        if part[_AT].duplicated().any():
            drawn = True
            _add_draws(figure, part, facts, escaped(label), line, x)
        else:
            _add_points(figure, part, facts, escaped(label), line, x)
    figure.update_layout(
        **theme.layout(look),
        height=430,
        margin={"l": 60, "r": 16, "t": 48, "b": 60},
        showlegend=series is not None,
        legend=theme.ABOVE | {"title_text": escaped((series or "").replace("_", " "))},
        hovermode="closest",
    )
    draws = "lines: mean of the draws, dots: each draw, band: least to greatest"
    said = draws if drawn else text.whiskers(frame, facts)
    figure.update_xaxes(title_text=escaped(f"{x.replace('_', ' ')} ({said})"), zeroline=False)
    figure.update_yaxes(title_text=escaped(facts.axis), **facts.ticks())
    if x == "source_rank":
        ticks = sorted(set(at))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    if at.between(0, 1).all() and not pd.api.types.is_integer_dtype(frame[x].dtype):
        figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
    return figure


_AT = "__x"


def add_line(
    figure: go.Figure,
    x: Sequence[float | int],
    y: Sequence[float | int],
    line: theme.Line,
    *,
    size: int = 8,
    **more: Any,
) -> None:
    """Add a line with its markers, `size` pixels wide; `more` is what plotly's scatter takes."""
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": line.color, "dash": line.dash, "width": 2},
        marker={"symbol": line.marker, "size": size},
        **more,
    )


def add_band(
    figure: go.Figure,
    x: Sequence[float | int],
    low: Sequence[float],
    high: Sequence[float],
    color: str,
    **more: Any,
) -> None:
    """Add what lies between two curves; `more` is what plotly's scatter takes."""
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=color,
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        **more,
    )


def _add_points(
    figure: go.Figure,
    part: pd.DataFrame,
    facts: Quantity,
    label: str,
    line: theme.Line,
    x: str,
) -> None:
    value, low, high = (
        part[f"{facts.name}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")
    )
    add_line(
        figure,
        part[_AT].tolist(),
        value.tolist(),
        line,
        name=label,
        error_y=theme.whiskers(value, low, high, color=line.color),
        customdata=[[said] for said in text.written_all(facts, part)],
        hovertemplate=f"{label}<br>{escaped(x)} %{{x}}<br>%{{customdata[0]}}<extra></extra>",
    )


def _add_draws(
    figure: go.Figure,
    part: pd.DataFrame,
    facts: Quantity,
    label: str,
    line: theme.Line,
    x: str,
) -> None:
    grouped = part.groupby(_AT, sort=True)[facts.name]
    found = grouped.agg(["mean", "min", "max", "count"])
    places: Sequence[float] = found.index.tolist()
    # Draws without a value have no place in the band.
    held = found.dropna()
    add_band(
        figure,
        held.index.tolist(),
        held["min"].tolist(),
        held["max"].tolist(),
        _faint(line.color, 0.18),
        legendgroup=label,
        name=f"{label}: band",
    )
    figure.add_scatter(
        x=part[_AT].tolist(),
        y=part[facts.name].tolist(),
        mode="markers",
        marker={"color": line.color, "size": 5, "opacity": 0.45},
        customdata=[[said] for said in text.written_all(facts, part)],
        hovertemplate=f"{label}, one draw<br>{escaped(x)} %{{x}}<br>%{{customdata[0]}}"
        "<extra></extra>",
        showlegend=False,
        legendgroup=label,
        name=f"{label}: draws",
    )
    means = found["mean"].rename(facts.name).to_frame()
    for end in ("low", "high"):
        means[f"{facts.name}_{end}"] = float("nan")
    said = text.written_all(facts, means, interval=False)
    add_line(
        figure,
        places,
        found["mean"].tolist(),
        line,
        name=label,
        legendgroup=label,
        customdata=[
            [f"mean of {int(n)}: {mean}"] for n, mean in zip(found["count"], said, strict=True)
        ],
        hovertemplate=f"{label}<br>{escaped(x)} %{{x}}<br>%{{customdata[0]}}<extra></extra>",
    )


def _faint(color: str, opacity: float) -> str:
    red, green, blue = theme.channels(color)
    return f"rgba({red}, {green}, {blue}, {opacity})"
