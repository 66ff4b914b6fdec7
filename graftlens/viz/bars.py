"""Bar charts of a summary: a table in, a figure out."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from graftlens.viz import text, theme
from graftlens.viz.quantities import Quantity, of_summary
from graftlens.viz.spelling import escaped, shortened


def grouped_bars(
    summary: pd.DataFrame,
    metric: str | Quantity = "top5",
    *,
    order: Sequence[str] | None = None,
    baselines: Mapping[str, float | int] | None = None,
    legend_title: str = "",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` of every graft (x axis), one bar per group (template), with its interval.

    Several groups differ in colour and hatch; with one group each graft has its own fixed fill.
    A bar without a value is left out and named as "n/a" in the legend or under the axis. Each
    trace's `meta` has its bars' grafts.

    Args:
        order: the groups in the order wanted; those left out come after them as in the summary.
        baselines: values by name, such as those of PRE and SFT; each is a dotted line across.
        legend_title: what the groups are.

    Raises:
        ValueError: an unknown metric, or a group that the summary lacks.
    """
    facts = of_summary(summary, metric)
    metric = facts.name
    parts = _ordered(text.groups(summary), order)
    names = list(dict.fromkeys(str(graft) for part in parts.values() for graft in part["graft"]))
    labels = shortened(names)
    longest = max(map(len, labels.values()), default=0)
    # Whether labels fit side by side, at about 130 characters per full-width chart; if not, they
    # lean and need height.
    angled = (longest + 2) * len(names) > 130
    # Where each bar has its own colour, plotly does not take another for the hatch.
    hatch = {"fillmode": "replace", "solidity": 0.45}
    if len(parts) > 1:
        hatch = {"fillmode": "overlay", "fgcolor": look.surface, "fgopacity": 0.75}
    thin = (1.3, 3) if len(names) * len(parts) <= 60 else (1, 1.5)
    figure = go.Figure()
    for index, (name, part) in enumerate(parts.items()):
        grafts = [str(graft) for graft in part["graft"]]
        color, pattern = _fills(grafts, index if len(parts) > 1 else None)
        value, low, high = (part[c].to_numpy(dtype=float) for c in _columns(metric))
        figure.add_bar(
            name=escaped(name) + (" (n/a)" if part[metric].isna().all() else ""),
            x=[escaped(graft) for graft in grafts],
            y=value.tolist(),
            error_y=theme.whiskers(
                value, low, high, color=look.text, thickness=thin[0], width=thin[1]
            ),
            marker={
                "color": color,
                "opacity": look.bar_opacity,
                "line": {"color": look.text, "width": 1},
                "pattern": {"shape": pattern, "size": 7, **hatch},
            },
            customdata=[[said] for said in text.written_all(facts, part)],
            meta=grafts,
            hovertemplate=f"%{{x}}, {escaped(name)}<br>%{{customdata[0]}}<extra></extra>",
        )
    rows = _legend_rows(list(parts), legend_title) if len(parts) > 1 else 0
    figure.update_layout(
        **theme.layout(look),
        barmode="group",
        bargap=0.25,
        bargroupgap=0.06,
        height=430 + 22 * max(0, rows - 1) + (min(5 * longest, 220) if angled else 0),
        margin={"l": 60, "r": 16, "t": 48 + 22 * max(0, rows - 1), "b": 60},
        showlegend=len(parts) > 1,
        legend=theme.ABOVE | {"title_text": escaped(legend_title)},
    )
    crowded = len(names) > 60
    thinned = (
        ["not every graft is labelled: hover over the bars, or draw a heat map"] if crowded else []
    )
    below = [f"graft; {text.whiskers(summary, facts)}", *thinned, *_missing(parts, metric)]
    figure.update_xaxes(
        title={"text": escaped("; ".join(below)), "standoff": 10},
        type="category",
        showgrid=False,
        categoryorder="array",
        categoryarray=[escaped(name) for name in names],
    )
    if not crowded:  # every label is written, unless there are too many to be read
        figure.update_xaxes(
            tickvals=[escaped(name) for name in names],
            ticktext=[escaped(labels[name]) for name in names],
        )
    figure.update_xaxes(autotickangles=[0, -40, -90], tickfont_size=11 if angled else 12)
    figure.update_yaxes(title_text=escaped(facts.axis))
    if facts.share:
        figure.update_yaxes(range=[0, 1], tickformat=".0%")
    if baselines:
        add_baselines(figure, facts, summary, baselines)
    return figure


def _ordered(
    parts: dict[str, pd.DataFrame], order: Sequence[str] | None
) -> dict[str, pd.DataFrame]:
    for name in order or ():
        if name not in parts:
            raise ValueError(
                f"order names the group {name!r}; the summary has {', '.join(map(repr, parts))}"
            )
    return {name: parts[name] for name in dict.fromkeys((*(order or ()), *parts))}


def _legend_rows(names: Sequence[str], title: str) -> int:
    """How many rows a legend of these entries takes above a full-width chart, about."""
    return 1 + sum(len(name) + 7 for name in (title, *names) if name) // 130


def add_baselines(
    figure: go.Figure,
    facts: Quantity,
    summary: pd.DataFrame,
    baselines: Mapping[str, float | int],
) -> None:
    """Add a dotted line across a chart for each value, with its name beside it."""
    held = {name: value for name, value in baselines.items() if not math.isnan(value)}
    ends = [f"{facts.name}{end}" for end in ("", "_low", "_high")]
    values = [*held.values(), *summary[ends].to_numpy(dtype=float).ravel().tolist()]
    values = [value for value in values if not math.isnan(value)]
    span = 1.0 if facts.share else (max(values, default=1.0) - min(values, default=0.0)) or 1.0
    # Lines that lie close share a label, because two would cover each other.
    labels: list[tuple[float, list[str]]] = []
    for name, value in sorted(held.items(), key=lambda item: item[1]):
        figure.add_hline(
            y=value,
            line={"color": theme.graft_fill(name).color, "dash": "dot", "width": 2},
            layer="below",
        )
        if labels and value - labels[-1][0] < 0.05 * span:
            labels[-1][1].append(name)
        else:
            labels.append((value, [name]))
    for value, names in labels:
        figure.add_annotation(
            text=escaped(", ".join(names)),
            x=1,
            xref="x domain",
            xanchor="left",
            xshift=4,
            y=value,
            yref="y",
            showarrow=False,
            font_size=12,
        )
    longest = max((len(", ".join(names)) for _, names in labels), default=0)
    figure.update_layout(margin_r=16 + 8 * longest)


def _missing(parts: dict[str, pd.DataFrame], metric: str) -> list[str]:
    """Missing bars, without the groups that have no bar at all, which the legend names."""
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
    known = theme.graft_fills(grafts)
    fills = [known[graft] for graft in grafts]
    return [fill.color for fill in fills], [fill.pattern for fill in fills]


def _columns(metric: str) -> tuple[str, str, str]:
    return metric, f"{metric}_low", f"{metric}_high"
