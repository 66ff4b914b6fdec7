"""The plot of `graftlens.lens.patching`: does a fact originate at a site, or pass through it?"""

import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from graftlens.viz import text, theme
from graftlens.viz.lenstables import as_floats, listed, refuse_doubled
from graftlens.viz.quantities import of_summary
from graftlens.viz.spelling import escaped, shortened

#: What `lens.patching` adds to a graft's name where it is a patch.
_PATCHED = " (patched)"


def patching_scatter(
    summary: pd.DataFrame, metric: str = "recovery", *, look: theme.Theme = theme.LIGHT
) -> go.Figure:
    """`metric` by grafting (x) against by patching (y), a point with both intervals for each graft.

    `summary` is `stats.summarise` of the table of `lens.patching`. Grafting brings the weights at
    the sites and leaves them the inputs of the run; patching brings what these sites computed
    inside the finetuned model. Near the diagonal the two agree: what is needed *originates* at the
    sites. Far above it, it only *passes through* them, having been computed before.

    Names that would cover another name or a point are left to the hover text; those of the points
    furthest from the diagonal and from zero are written first. What all names begin with is
    written once, under the axis, and so are the grafts without a value.

    Raises:
        ValueError: an unknown metric, a summary of several groups of prompts, or one without a
            graft and its patch.
    """
    facts = of_summary(summary, metric)
    refuse_doubled(summary, ["graft"])
    rows = summary.assign(graft=summary["graft"].astype(str)).set_index("graft")
    names = [name for name in rows.index if name + _PATCHED in rows.index]
    if not names:
        raise ValueError(
            f"the summary has {listed(rows.index)}, and no graft with its patch (FE and "
            f"'FE{_PATCHED}'): summarise the table of lens.patching"
        )
    columns = [metric, f"{metric}_low", f"{metric}_high"]
    points: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        x, y = (as_floats(rows.loc[which, columns]) for which in (name, name + _PATCHED))
        if not math.isnan(x[0] + y[0]):
            points[name] = (x, y)
    if not points:
        raise ValueError(
            f"none of {listed(names)} has a value of {metric!r} both by grafting and by patching"
        )
    reach = [v for x, y in points.values() for v in (*x, *y) if not math.isnan(v)]
    low, high = min(0.0, *reach), max(0.0, *reach)
    room = 0.08 * (high - low or 1.0)
    span = [low - room, high + room]
    figure = go.Figure()
    figure.add_scatter(
        x=span,
        y=span,
        mode="lines",
        line={"color": look.muted, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
        name="grafting = patching",
    )
    common = _common(list(points))
    said = shortened(name[len(common) :] for name in points)
    labels = {name: said[name[len(common) :]] for name in points}
    sides = _label_sides(points, labels, span)
    for name, line in theme.graft_lines(points).items():
        x, y = points[name]
        values = [text.written(facts, rows.loc[which]) for which in (name, name + _PATCHED)]
        figure.add_scatter(
            x=[x[0]],
            y=[y[0]],
            error_x=theme.whiskers(*([end] for end in x), color=line.color),
            error_y=theme.whiskers(*([end] for end in y), color=line.color),
            mode="markers+text",
            marker={"color": line.color, "symbol": line.marker, "size": 10},
            text=[escaped(labels[name]) if name in sides else ""],
            textposition=sides.get(name, "top right"),
            textfont_size=12,
            name=escaped(name),
            customdata=[f"{escaped(name)}<br>grafting {values[0]}<br>patching {values[1]}"],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    figure.update_layout(
        **theme.layout(look),
        height=640,
        margin={"l": 70, "r": 30, "t": 24, "b": 130},
        showlegend=False,
        hovermode="closest",
    )
    missing = [name for name in names if name not in points]
    unnamed = len(points) - len(sides)
    below = [
        f"{facts.axis} by grafting: it originates here",
        f"{text.whiskers(summary, facts)}; dotted: equal",
        *([f"all names begin with “{common.strip()}”"] if common else []),
        *([f"{unnamed} of {len(points)} names where there is no room: hover"] if unnamed else []),
        *([f"no value: {', '.join(missing)}"] if missing else []),
    ]
    figure.update_xaxes(title_text="<br>".join(map(escaped, below)))
    figure.update_yaxes(title_text=escaped(f"{facts.axis} by patching: it passes through here"))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(range=span, zeroline=True, tickformat=".0%" if facts.share else "")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


def _common(names: Sequence[str]) -> str:
    """What the names of grafts of one grid begin with, such as `sft @ last : `."""
    shared = ""
    for piece in re.split(r"(?<= [:@] )", names[0]) if len(names) > 2 else ():
        if not all(name.startswith(shared + piece) and name != shared + piece for name in names):
            break
        shared += piece
    return shared


_Box = tuple[float, float, float, float]  # left, right, low, high


def _label_sides(
    points: Mapping[str, tuple[list[float], list[float]]],
    labels: Mapping[str, str],
    span: Sequence[float],
) -> dict[str, str]:
    """On which side of its point each name is written; without those that have no room.

    `points` has x and y with their intervals. A label crosses no other, no point and no edge;
    whiskers and the diagonal only where every side does.
    """
    unit = (span[1] - span[0]) / 480  # about a pixel
    solid: list[_Box] = []
    thin: list[_Box] = []
    for x, y in points.values():
        solid.append((x[0] - 6 * unit, x[0] + 6 * unit, y[0] - 6 * unit, y[0] + 6 * unit))
        thin += [(x[1], x[2], y[0], y[0]), (x[0], x[0], y[1], y[2])]
    sides: dict[str, str] = {}
    for name in sorted(points, key=lambda name: _interest(*points[name]), reverse=True):
        (across, *_), (up, *_) = points[name]
        reach = (7 * len(labels[name]) + 8) * unit
        boxes: dict[str, _Box] = {
            f"{height} {way}": (*ends, *heights)
            for height, heights in (
                ("top", (up + 6 * unit, up + 22 * unit)),
                ("bottom", (up - 22 * unit, up - 6 * unit)),
            )
            for way, ends in (
                ("right", (across, across + reach)),
                ("left", (across - reach, across)),
            )
        }
        free = [
            side
            for side, box in boxes.items()
            if span[0] <= box[0] and box[1] <= span[1] and not _met(box, solid)
        ]
        if free:
            side = min(free, key=lambda side: _met(boxes[side], thin) + _on_diagonal(boxes[side]))
            sides[name] = side
            solid.append(boxes[side])
    return sides


def _interest(x: Sequence[float], y: Sequence[float]) -> float:
    return abs(x[0] - y[0]) + max(abs(x[0]), abs(y[0]))


def _met(box: _Box, others: Sequence[_Box]) -> int:
    left, right, low, high = box
    return sum(left < b and a < right and low < d and c < high for a, b, c, d in others)


def _on_diagonal(box: _Box) -> bool:
    left, right, low, high = box
    return low < right and left < high
