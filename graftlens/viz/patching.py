"""The plot of `graftlens.lens.patching`: does a fact originate at a site, or pass through it?"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from graftlens.viz import text, theme
from graftlens.viz.lenstables import as_floats, listed, refuse_doubled
from graftlens.viz.spelling import escaped

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

    Points without a value are named under the axis.

    Raises:
        ValueError: an unknown metric, a summary of several groups of prompts, or one without a
            graft and its patch.
    """
    facts = text.measure(summary, metric)
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
    low, high = min(0.0, *reach), max(1.0 if metric == "recovery" else 0.0, *reach)
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
    sides = _label_sides({name: (x[0], y[0]) for name, (x, y) in points.items()}, span)
    for name, line in theme.graft_lines(points).items():
        x, y = points[name]
        said = [text.written(facts, rows.loc[which]) for which in (name, name + _PATCHED)]
        bars = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4}
        bars["color"] = line.color
        figure.add_scatter(
            x=[x[0]],
            y=[y[0]],
            error_x={**bars, "array": [x[2] - x[0]], "arrayminus": [x[0] - x[1]]},
            error_y={**bars, "array": [y[2] - y[0]], "arrayminus": [y[0] - y[1]]},
            mode="markers+text",
            # A point has no dash: an open one is of a graft whose lines are dashed.
            marker={
                "color": line.color,
                "symbol": line.marker + ("" if line.dash == "solid" else "-open"),
                "size": 10,
            },
            text=[escaped(name)],
            textposition=sides[name],
            textfont_size=12,
            name=escaped(name),
            customdata=[f"{escaped(name)}<br>grafting {said[0]}<br>patching {said[1]}"],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    figure.update_layout(
        **theme.layout(look),
        height=640,
        margin={"l": 70, "r": 30, "t": 24, "b": 110},
        showlegend=False,
        hovermode="closest",
    )
    missing = [name for name in names if name not in points]
    below = [
        f"{facts.axis} by grafting: it originates here",
        f"whiskers: {text.level(summary)} interval; dotted: equal",
        *([f"no value: {', '.join(missing)}"] if missing else []),
    ]
    figure.update_xaxes(title_text="<br>".join(map(escaped, below)))
    figure.update_yaxes(title_text=escaped(f"{facts.axis} by patching: it passes through here"))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(range=span, zeroline=True, tickformat=".0%" if facts.share else "")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


def _label_sides(
    points: Mapping[str, tuple[float, float]], span: Sequence[float]
) -> dict[str, str]:
    """On which side of its point each name is written, so that few cover one another."""
    width = span[1] - span[0]
    unit = width / 480  # about a pixel
    taken = [(x - 6 * unit, x + 6 * unit, y - 6 * unit, y + 6 * unit) for x, y in points.values()]
    sides: dict[str, str] = {}
    for name, (x, y) in points.items():
        reach = (7 * len(name) + 8) * unit
        boxes = {
            "top right": (x, x + reach, y + 6 * unit, y + 22 * unit),
            "bottom right": (x, x + reach, y - 22 * unit, y - 6 * unit),
            "top left": (x - reach, x, y + 6 * unit, y + 22 * unit),
            "bottom left": (x - reach, x, y - 22 * unit, y - 6 * unit),
        }

        def covered(side: str, boxes: Mapping[str, tuple[float, ...]] = boxes) -> int:
            left, right, low, high = boxes[side]
            inside = span[0] <= left and right <= span[1]
            met = [a < right and left < b and c < high and low < d for a, b, c, d in taken]
            return sum(met) + 2 * (not inside)

        sides[name] = min(boxes, key=covered)
        taken.append(boxes[sides[name]])
    return sides
