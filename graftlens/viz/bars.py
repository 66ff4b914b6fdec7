"""Bar charts of a summary: a table in, a figure out."""

import html

import pandas as pd
import plotly.graph_objects as go

from graftlens.viz import text, theme


def grouped_bars(
    summary: pd.DataFrame, metric: str = "top5", *, look: theme.Theme = theme.LIGHT
) -> go.Figure:
    """`metric` of every graft (x axis), one bar per group (template), with its interval.

    Several groups differ in colour and hatch; with one group each graft has its own fixed fill.
    A bar without a value is left out and named as "n/a" in the legend or under the axis.
    """
    facts = text.measure(summary, metric)
    parts = text.groups(summary)
    figure = go.Figure()
    for index, (name, part) in enumerate(parts.items()):
        grafts = [str(graft) for graft in part["graft"]]
        color, pattern = _fills(grafts, index if len(parts) > 1 else None)
        value, low, high = (part[c].to_numpy(dtype=float) for c in _columns(metric))
        figure.add_bar(
            name=html.escape(name) + (" (n/a)" if part[metric].isna().all() else ""),
            x=[html.escape(graft) for graft in grafts],
            y=value.tolist(),
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (high - value).tolist(),
                "arrayminus": (value - low).tolist(),
                "color": look.text,
                "thickness": 1.3,
                "width": 3,
            },
            marker={
                "color": color,
                "opacity": look.bar_opacity,
                "line": {"color": look.text, "width": 1},
                "pattern": {
                    "shape": pattern,
                    "fillmode": "overlay",
                    "fgcolor": look.surface,
                    "fgopacity": 0.75,
                    "size": 7,
                },
            },
            customdata=[[text.written(facts, row)] for _, row in part.iterrows()],
            hovertemplate=f"%{{x}}, {html.escape(name)}<br>%{{customdata[0]}}<extra></extra>",
        )
    level = f"{100 * float(summary['level'].iloc[0]):g}%"
    figure.update_layout(
        **theme.layout(look),
        barmode="group",
        bargap=0.25,
        bargroupgap=0.06,
        height=430,
        margin={"l": 60, "r": 16, "t": 48, "b": 60},
        showlegend=len(parts) > 1,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    below = [f"graft; whiskers: {level} interval", *_missing(parts, metric)]
    figure.update_xaxes(title_text=html.escape("; ".join(below)), type="category", showgrid=False)
    figure.update_yaxes(title_text=html.escape(facts.axis))
    if facts.share:
        figure.update_yaxes(range=[0, 1], tickformat=".0%")
    return figure


def _missing(parts: dict[str, pd.DataFrame], metric: str) -> list[str]:
    """The bars that are missing, but for groups that are missing whole and say so in the legend."""
    said = []
    for name, part in parts.items():
        grafts = part.loc[part[metric].isna(), "graft"]
        if len(grafts) and (len(grafts) < len(part) or len(parts) == 1):
            said.append(f"n/a in {name}: {', '.join(grafts)}")
    return said


def _fills(grafts: list[str], series: int | None) -> tuple[str, str] | tuple[list[str], list[str]]:
    """One fill for a whole series (its legend needs a single one), or each graft's own."""
    if series is not None:
        fill = theme.series_fill(series)
        return fill.color, fill.pattern
    fills = [theme.graft_fill(graft) for graft in grafts]
    return [fill.color for fill in fills], [fill.pattern for fill in fills]


def _columns(metric: str) -> tuple[str, str, str]:
    return metric, f"{metric}_low", f"{metric}_high"
