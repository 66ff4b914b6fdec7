"""Heat maps of a summary: one cell per graft, in rows and columns that say what was grafted."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens.references import are_references
from graftlens.stats import GRAFT_COLUMNS
from graftlens.viz import drawing, text, theme
from graftlens.viz.lenstables import check_column
from graftlens.viz.quantities import Quantity, of_summary, scale
from graftlens.viz.spelling import escaped

#: Pixels: a row's height, the room above, the room below, and what a colour bar needs at least.
_ROW, _HEAD, _FOOT, _BAR = 26, 44, 62, 190


@dataclass(frozen=True)
class Cells:
    """The cells of a heat map: columns `x`, rows `y`, panels, and a summary's row for each.

    `row` has a summary's row number for (panel, y, x); a missing cell was not run.
    """

    x: dict[str, tuple[str, ...]]
    y: dict[str, tuple[str, ...]]
    row: dict[tuple[str, str, str], int]


def heatmap(
    summary: pd.DataFrame,
    metric: str = "recovery",
    *,
    x: str = "layer",
    y: str = "component",
    panel: str | None = None,
    cross_not_run: bool = True,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` of every graft as a cell at its values in the columns `x` and `y`.

    `panel` names a column each of whose values gets a panel of its own, below the others; all
    share one scale. Numbers and ranges along `x` are sorted, all else keeps the summary's order.
    Recovery and logit differences have a scale that is symmetric around 0 and as wide as the
    largest value; accuracies one from 0 to 1; other metrics one over their own range. A dot marks
    a signed metric whose interval excludes 0, a cross a cell without a value
    (without `cross_not_run`, cells that were not run are blank). Each map's `meta` has the graft of
    each cell.

    Grafts without a value in one of the columns are left out; so are the two grafts between which
    recovery is measured, where x or y says what was grafted.

    Raises:
        ValueError: an unknown metric or column, no graft to show, or two grafts for one cell.
    """
    facts = of_summary(summary, metric)
    found = cells(summary, x=x, y=y, panel=panel)
    panels = list(found.y)
    count = sum(map(len, found.y.values()))
    row_height = max(_ROW, min(90, _BAR // count))
    heights = [row_height * len(found.y[name]) for name in panels]
    # A panel's own column names and the next panel's title lie between two panels.
    between = 62
    inner = sum(heights) + between * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=[height / sum(heights) for height in heights],
        vertical_spacing=between / inner if len(panels) > 1 else 0,
        subplot_titles=[escaped(name) for name in panels] if panel is not None else None,
    )
    kept = summary.reset_index(drop=True)
    said = text.written_all(facts, kept)
    # The notes are recovery's; joined tables have NaN where there is none.
    noted = metric == "recovery" and "recovery_note" in kept
    notes = kept["recovery_note"].tolist() if noted else []
    named = kept["graft"].astype(str).tolist()
    values, low, high = (
        kept[f"{metric}{end}"].to_numpy(dtype=float).tolist() for end in ("", "_low", "_high")
    )
    for number, name in enumerate(panels, start=1):
        columns, rows = found.x[name], found.y[name]
        z: list[list[float | None]] = []
        hover: list[list[str]] = []
        grafts: list[list[str]] = []
        sure: list[tuple[str, str]] = []
        gaps: list[tuple[str, str, str]] = []
        for down in rows:
            z.append([])
            hover.append([])
            grafts.append([])
            for across in columns:
                at = found.row.get((name, down, across))
                grafts[-1].append("" if at is None else named[at])
                where = f"{x} {escaped(across)}, {y} {escaped(down)}"
                if at is None or math.isnan(values[at]):
                    why = "not run" if at is None else _no_value(notes[at] if notes else None)
                    if at is not None or cross_not_run:
                        gaps.append((across, down, f"{where}<br>{escaped(why)}"))
                    z[-1].append(None)
                    hover[-1].append("")
                    continue
                if facts.signed and (low[at] > 0 or high[at] < 0):
                    sure.append((across, down))
                z[-1].append(values[at])
                hover[-1].append(
                    f"{where}<br>{said[at]}<br>{int(kept['n'].iloc[at])} prompts"
                    f"<br>{escaped(named[at])}"
                )
        figure.add_trace(
            go.Heatmap(
                x=[escaped(value) for value in columns],
                y=[escaped(value) for value in rows],
                z=z,
                meta=grafts,
                **drawing.hovering(hover),
                hoverongaps=False,
                coloraxis="coloraxis",
            ),
            row=number,
            col=1,
        )
        dots: dict[str, object] = {"symbol": "circle", "size": 5, "color": "#15181d"}
        dots["line"] = {"color": "#ffffff", "width": 1}
        cross: dict[str, object] = {"symbol": "x-thin", "size": 6}
        cross["line"] = {"color": look.muted, "width": 1}
        for marked, marker in (([(a, d, "") for a, d in sure], dots), (gaps, cross)):
            if marked:
                figure.add_trace(_marks(marked, marker), row=number, col=1)
        # Ranges are given, because marks at the edge would widen those that plotly finds.
        figure.update_xaxes(range=[-0.5, len(columns) - 0.5], row=number)
        figure.update_yaxes(range=[len(rows) - 0.5, -0.5], row=number)
        for update, order in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
            labels = [escaped(label) for label in order]
            update(categoryorder="array", categoryarray=labels, row=number)
    marks = ["dot: the interval excludes 0"] if facts.signed else []
    marks += ["×: no value"] if any(_is_empty(trace) for trace in figure.data) else []
    figure.update_layout(
        **_shared(look),
        height=_HEAD + inner + _FOOT + 14,
        margin={"l": 70, "r": 16, "t": _HEAD, "b": _FOOT},
        showlegend=False,
        coloraxis=_coloraxis(facts, [values[at] for at in found.row.values()], inner),
    )
    axis = {"linecolor": look.muted, "showgrid": False, "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis, type="category", tickfont_size=11)
    figure.update_yaxes(**axis, type="category", dtick=1, tickfont_size=12, ticksuffix=" ")
    figure.update_annotations(font_size=13, x=0, xanchor="left")
    title = x if not marks else f"{x} ({'; '.join(marks)})"
    figure.update_xaxes(title_text=escaped(title), row=len(panels))
    return figure


def cells(
    summary: pd.DataFrame, *, x: str = "layer", y: str = "component", panel: str | None = None
) -> Cells:
    """Which row of a summary goes into which cell; see `heatmap`.

    Raises:
        ValueError: an unknown column, no graft to show, or two grafts for one cell.
    """
    wanted = [name for name in (panel, y, x) if name is not None]
    for name in wanted:
        check_column(summary, name, kind="summary")
    rows = summary.reset_index(drop=True)
    keep = rows[wanted].notna().all(axis=1)
    if {x, y} & set(GRAFT_COLUMNS):
        keep &= ~are_references(rows)
    rows = rows[keep]
    if rows.empty:
        raise ValueError(
            f"no graft has a value in every one of the columns {', '.join(map(repr, wanted))}: "
            "only grafts with one rule have these. Name columns that the grafts have."
        )
    names = rows[wanted].astype(str)
    if panel is None:
        names.insert(0, "", "")
    key = list(zip(*(names.iloc[:, i] for i in range(3)), strict=True))
    place = dict(zip(key, rows.index.tolist(), strict=True))
    if len(place) < len(key):
        _refuse(rows, wanted)
    panels = list(dict.fromkeys(k[0] for k in key))
    across = {p: tuple(_sorted([k[2] for k in key if k[0] == p])) for p in panels}
    down = {p: tuple(dict.fromkeys(k[1] for k in key if k[0] == p)) for p in panels}
    return Cells(across, down, place)


def _refuse(rows: pd.DataFrame, wanted: Sequence[str]) -> None:
    twice = rows[rows.duplicated(list(wanted), keep=False)]
    first = twice.iloc[0]
    same = twice[(twice[list(wanted)] == first[list(wanted)]).all(axis=1)]
    by = list(rows.columns[: rows.columns.get_loc("graft")])
    about = [c for c in (*by, *GRAFT_COLUMNS) if c in rows and c not in wanted]
    apart = [c for c in about if same[c].nunique(dropna=False) > 1]
    where = ", ".join(f"{name} {first[name]!r}" for name in wanted)
    grafts = ", ".join(repr(str(graft)) for graft in dict.fromkeys(same["graft"]))
    if apart:
        fix = (
            f"they differ in {', '.join(map(repr, apart))}: give panel={apart[0]!r}, or pass the "
            "rows of one value"
        )
    else:
        fix = "no column distinguishes them: pass each cell's row once"
    raise ValueError(f"{len(same)} rows for one cell ({where}), of {grafts}; {fix}")


def _sorted(values: Sequence[str]) -> list[str]:
    """Numbers and ranges such as 4-7 by where they start, then all else in its order."""
    seen = list(dict.fromkeys(values))
    spans = {value: re.fullmatch(r"(\d+)(?:-(\d+))?(?: \+ .*)?", value) for value in seen}
    numbers = {
        value: (int(found[1]), int(found[2] or found[1])) for value, found in spans.items() if found
    }
    return [*sorted(numbers, key=lambda v: numbers[v]), *(v for v in seen if v not in numbers)]


def _coloraxis(facts: Quantity, values: Sequence[float], room: int) -> dict[str, object]:
    # As wide as the data where it is signed: recovery may lie outside [0, 1], and nothing is cut.
    found = scale(facts, values, signed=facts.signed, anchored=False)
    return {
        "colorscale": theme.colorscale(found.colors),
        "cmin": found.low,
        "cmax": found.high,
        "colorbar": found.bar(room),
    }


def _marks(marked: Sequence[tuple[str, str, str]], marker: dict[str, object]) -> go.Scatter:
    hover = [said for _, _, said in marked]
    return go.Scatter(
        x=[escaped(across) for across, _, _ in marked],
        y=[escaped(down) for _, down, _ in marked],
        mode="markers",
        marker=marker,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>" if any(hover) else None,
        hoverinfo=None if any(hover) else "skip",
        name="no value" if any(hover) else "interval excludes 0",
    )


def _no_value(note: object) -> str:
    return f"no value: {note}" if isinstance(note, str) else "no value"


def _is_empty(trace: object) -> bool:
    return getattr(trace, "name", None) == "no value"


def _shared(look: theme.Theme) -> dict[str, object]:
    return {k: v for k, v in theme.layout(look).items() if k not in ("xaxis", "yaxis")}
