"""Plots of `graftlens.find.interactions`: what players bring, and which pairs work together."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens.viz import drawing, theme
from graftlens.viz.lenstables import as_float, check_column, listed
from graftlens.viz.quantities import Quantity, scale
from graftlens.viz.spelling import escaped, shortened

#: Pixels: a player's row, the room above a measure's panels, the room below them.
_ROW, _HEAD, _FOOT = 34, 80, 60

#: What the words of a page about players mean.
WORDS = {
    "player": "a graft that is there or not; coalitions of players are run",
    "AND": "a pair of players that brings more together than the two bring one by one: each needs "
    "the other",
    "OR": "a pair that brings less together than the two bring one by one: either is enough",
    "Shapley value": "what a player adds when it joins, averaged over all orders of joining; over "
    "players these add up to what all bring",
    "Banzhaf value": "what a player adds, averaged over all coalitions of the others",
}

_OF = ". Give the tables of find.interactions: found.table and found.pairs"


def interaction_matrix(
    table: pd.DataFrame,
    pairs: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How far each two players interact (a matrix), and what each player brings (bars beside it).

    A row of panels for each measure, since a pair may be an AND in one and additive in another. In
    the matrix red is an interaction above 0 (AND: each needs the other), blue one below 0 (OR:
    either is enough), and the other way round of a measure that falls from nobody to all; the
    pair's call is written in its cell, `?` where it is undecided. Bars are Shapley values and,
    hatched, Banzhaf values, with their intervals.

    Args:
        table, pairs: `table` and `pairs` of `find.interactions`.
        metrics: the measures to show; by default all.

    Raises:
        ValueError: a measure or column that the tables lack.
    """
    for column in ("metric", "player", "shapley", "shapley_low", "shapley_high", "banzhaf"):
        check_column(table, column, _OF)
    for column in ("metric", "a", "b", "interaction", "call"):
        check_column(pairs, column, _OF)
    have = list(dict.fromkeys(table["metric"].astype(str)))
    shown = have if metrics is None else list(metrics)
    for name in shown:
        if name not in have:
            raise ValueError(f"the table has no metric {name!r}; it has {listed(have)}")
    players = list(dict.fromkeys(table["player"].astype(str)))
    labels = [escaped(name) for name in shortened(players, 28).values()]
    facts = [Quantity.of(name).within(pairs[pairs["metric"] == name]) for name in shown]
    inner = _ROW * len(players)
    between = _FOOT + _HEAD
    height = len(shown) * inner + (len(shown) - 1) * between
    figure = make_subplots(
        rows=len(shown),
        cols=2,
        column_widths=[0.56, 0.44],
        horizontal_spacing=0.16,
        vertical_spacing=between / height if len(shown) > 1 else 0,
        shared_yaxes=False,
        subplot_titles=[
            title
            for fact in facts
            for title in (
                f"interaction:<br>{escaped(fact.axis)}",
                f"what each player brings:<br>{escaped(fact.axis)}",
            )
        ],
    )
    for number, fact in enumerate(facts, start=1):
        own = pairs[pairs["metric"] == fact.name]
        axis = "coloraxis" if number == 1 else f"coloraxis{number}"
        trace = _matrix(fact, own, pairs, players, labels, axis)
        figure.add_trace(trace, row=number, col=1)
        rows = table[table["metric"] == fact.name].set_index("player").loc[players]
        for bar in _bars(fact, rows, labels, look, legend=number == 1):
            figure.add_trace(bar, row=number, col=2)
        held = scale(fact, own["interaction"].astype(float).tolist(), signed=True)
        low, high = figure.layout["yaxis" if number == 1 else f"yaxis{2 * number - 1}"].domain
        place = {"title": None, "x": 0.475, "y": (low + high) / 2, "len": high - low}
        drawing.add_labels(figure, _words(own, players, labels), held, size=11, row=number, col=1)
        colors: dict[str, object] = {"colorscale": theme.colorscale(held.colors)}
        colors |= {"cmin": held.low, "cmax": held.high, "colorbar": held.bar(inner) | place}
        figure.update_layout({axis: colors})
        if fact.share:
            figure.update_xaxes(tickformat=".0%", row=number, col=2)
    shared = {k: v for k, v in theme.layout(look).items() if k not in ("xaxis", "yaxis")}
    figure.update_layout(
        **shared,
        height=height + _HEAD + _FOOT + 30,
        margin={"l": 70, "r": 16, "t": _HEAD + 30, "b": _FOOT},
        barmode="group",
        bargap=0.25,
        legend=theme.ABOVE | {"y": 1 + 52 / height},
    )
    figure.update_xaxes(linecolor=look.muted, gridcolor=look.grid, automargin=True)
    figure.update_yaxes(
        linecolor=look.muted,
        showgrid=False,
        automargin=True,
        type="category",
        categoryorder="array",
        categoryarray=labels,
        range=[len(players) - 0.5, -0.5],
        ticksuffix=" ",
    )
    figure.update_yaxes(showticklabels=False, col=2)
    figure.update_xaxes(type="category", showgrid=False, tickangle=-30, col=1)
    figure.update_annotations(font_size=13)
    return figure


def _matrix(
    fact: Quantity,
    own: pd.DataFrame,
    pairs: pd.DataFrame,
    players: Sequence[str],
    labels: Sequence[str],
    axis: str,
) -> go.Heatmap:
    """One measure's interactions, the same on both sides of an empty diagonal."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in own.to_dict("records"):
        cells[row["a"], row["b"]] = cells[row["b"], row["a"]] = row
    others = pairs[pairs["metric"] != fact.name]
    elsewhere = {
        key: [f"{Quantity.of(str(m)).short}: {call}" for m, call in rows]
        for key, rows in _calls(others).items()
    }

    def hover(down: str, across: str) -> str:
        cell = cells.get((down, across))
        if cell is None:
            return escaped(down)
        low, high = (as_float(cell.get(f"interaction{end}")) for end in ("_low", "_high"))
        said = [
            f"{escaped(down)} and {escaped(across)}: {cell['call']}",
            f"interaction {_number(fact, as_float(cell['interaction']))} "
            f"[{_number(fact, low)}, {_number(fact, high)}]",
            *elsewhere.get((str(cell["a"]), str(cell["b"])), ()),
        ]
        return "<br>".join(said)

    def z(down: str, across: str) -> float | None:
        cell = cells.get((down, across))
        value = math.nan if cell is None else as_float(cell["interaction"])
        return value if math.isfinite(value) else None

    def each(what: Any) -> list[list[Any]]:
        return [[what(down, across) for across in players] for down in players]

    return go.Heatmap(
        x=list(labels),
        y=list(labels),
        z=each(z),
        **drawing.hovering(each(hover)),
        hoverongaps=False,
        coloraxis=axis,
    )


def _words(
    own: pd.DataFrame, players: Sequence[str], labels: Sequence[str]
) -> list[tuple[str, str, str, float]]:
    """What is written in the cells of a matrix: the pair's call."""
    place = dict(zip(players, labels, strict=True))
    found = []
    for row in own.to_dict("records"):
        z = as_float(row["interaction"])
        word = {"undecided": "?", "additive": "+"}.get(str(row["call"]), str(row["call"]))
        if math.isfinite(z):
            pair = (place[str(row["a"])], place[str(row["b"])])
            found += [(*pair, word, z), (*pair[::-1], word, z)]
    return found


def _calls(pairs: pd.DataFrame) -> dict[tuple[str, str], list[tuple[str, str]]]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for metric, a, b, call in pairs[["metric", "a", "b", "call"]].itertuples(index=False):
        found.setdefault((str(a), str(b)), []).append((str(metric), str(call)))
    return found


def _bars(
    fact: Quantity, rows: pd.DataFrame, labels: Sequence[str], look: theme.Theme, legend: bool
) -> list[go.Bar]:
    """Shapley and Banzhaf values of the players, with whiskers."""
    made = []
    for name, pattern in (("shapley", ""), ("banzhaf", "/")):
        value, low, high = (
            [as_float(v) for v in rows[f"{name}{end}"]] for end in ("", "_low", "_high")
        )
        made.append(
            go.Bar(
                name=name.capitalize(),
                orientation="h",
                x=[v if math.isfinite(v) else None for v in value],
                y=list(labels),
                error_x=theme.whiskers(value, low, high, color=look.text),
                marker={
                    "color": theme.BLUE,
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
                customdata=[
                    f"{label}: {name.capitalize()} {_number(fact, v)} "
                    f"[{_number(fact, a)}, {_number(fact, b)}]"
                    for label, v, a, b in zip(labels, value, low, high, strict=True)
                ],
                hovertemplate="%{customdata}<extra></extra>",
                legendgroup=name,
                showlegend=legend,
            )
        )
    return made


def _number(fact: Quantity, value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{fact.number(value)}{'%' if fact.share else ''}"


def sentences(pairs: pd.DataFrame) -> list[str]:
    """What pairs are called, a sentence for each that is an AND or an OR in some measure; of the
    first measure, the largest interactions come first.

    Raises:
        ValueError: a column that the table lacks.
    """
    for column in ("metric", "a", "b", "interaction", "call"):
        check_column(pairs, column, _OF)
    said = []
    far = pairs["interaction"].astype(float).abs()
    first = pairs["metric"].eq(pairs["metric"].iloc[0]) if len(pairs) else far.astype(bool)
    pairs = pairs.loc[
        [*far[first].sort_values(ascending=False, kind="stable").index, *far[~first].index]
    ]
    for (a, b), rows in pairs.groupby(["a", "b"], sort=False):
        if not rows["call"].isin(["AND", "OR"]).any():
            continue
        each = []
        for row in rows.to_dict("records"):
            fact = Quantity.of(str(row["metric"]))
            ends = (as_float(row[f"interaction{end}"]) for end in ("", "_low", "_high"))
            value, low, high = (_number(fact, end) for end in ends)
            each.append(f"{row['call']} in {fact.short} ({value} [{low}, {high}])")
        said.append(f"{a} and {b}: {', '.join(each)}.")
    return said
