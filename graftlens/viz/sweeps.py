"""Plots of sweeps over layers and strengths: a summary in, a figure out."""

import re
from dataclasses import replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from graftlens.components import layer_group
from graftlens.graft import parse_layers
from graftlens.references import are_references
from graftlens.viz import drawing, text, theme
from graftlens.viz.bars import add_baselines
from graftlens.viz.heatmaps import heatmap
from graftlens.viz.lenstables import check_column, listed
from graftlens.viz.linecharts import add_line
from graftlens.viz.quantities import of_summary
from graftlens.viz.spelling import escaped, shortened

#: How the error about a missing column ends.
_OF_GRIDS = ". The results of a sweep's grid have it"

_WINDOW = re.compile(r"(\d+)(?:-(\d+))?")


def window_triangle(
    summary: pd.DataFrame,
    metric: str = "recovery",
    *,
    panel: str | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` of grafts of neighbouring layers: first layer (across) × last layer (up).

    Single layers are the diagonal; the longer a window, the further from it. `panel` names a column
    each of whose values (a span, a component) gets a panel of its own. Scales and marks are those
    of `heatmap`. Grafts whose column `layer` is neither a layer (`5`) nor a range (`4-7`) are left
    out; windows that were not run are blank.

    Raises:
        ValueError: an unknown metric or column, no window, or two grafts for one cell.
    """
    of_summary(summary, metric)
    for column in ("layer", *([panel] if panel is not None else [])):
        check_column(summary, column, _OF_GRIDS, kind="summary")
    ends = [_WINDOW.fullmatch(str(layer)) for layer in summary["layer"]]
    rows = summary[[end is not None for end in ends]]
    if rows.empty:
        raise ValueError(
            "no graft has a window of layers such as 5 or 4-7 in the column 'layer': "
            f"it has {listed(dict.fromkeys(map(str, summary['layer'])))}"
        )
    first = [int(end[1]) for end in ends if end is not None]
    last = [int(end[2] or end[1]) for end in ends if end is not None]
    rows = rows.assign(**{_FIRST: first, _LAST: last})
    # Rows of a heat map keep their order and start at the top; here layers go up.
    order = [_LAST]
    if panel is not None:
        rows, order = rows.assign(**{_PANEL: pd.factorize(rows[panel])[0]}), [_PANEL, _LAST]
    rows = rows.sort_values(order, ascending=[name != _LAST for name in order], kind="stable")
    figure = heatmap(rows, metric, x=_FIRST, y=_LAST, panel=panel, cross_not_run=False, look=look)
    figure.update_yaxes(title_text=_LAST)
    return figure


#: What the axes and the hover text of a triangle call its columns.
_FIRST, _LAST = "first layer", "last layer"
_PANEL = "__panel"


def size_curve(
    summary: pd.DataFrame,
    metric: str = "recovery",
    *,
    size: Literal["layers", "share"] = "layers",
    series: str | None = None,
    n_layers: int | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` against how many layers a graft has: how few are enough?

    Every graft is a faint point; a solid line joins the best graft of each size, a dashed one their
    mean. The best of many looks better than it would on other prompts; the interval in its hover
    text does not account for the choice. Grafts without a value in `layer` or `series` are left
    out, and so are the two grafts between which recovery is measured.

    Args:
        size: the number of layers, or their share of the model's.
        series: a column (`span`, `component`, `source`) each of whose values gets its own lines.
        n_layers: how many layers the model has; needed for shares and for groups such as
            `upper_half`.

    Raises:
        ValueError: an unknown metric, size or column, groups without `n_layers`, layers that the
            model lacks, several groups of prompts, or no graft to show.
    """
    facts = of_summary(summary, metric)
    for column in ("layer", *([series] if series is not None else [])):
        check_column(summary, column, _OF_GRIDS, kind="summary")
    if size not in ("layers", "share"):
        raise ValueError(f"unknown size {size!r}; choose from 'layers', 'share'")
    if size == "share" and n_layers is None:
        raise ValueError("size='share' needs n_layers, the number of the model's layers")
    rows = summary[summary["layer"].notna()].reset_index(drop=True)
    if series is not None:
        rows = rows[rows[series].notna()]
    rows = rows[~are_references(rows)]
    rows = rows[rows[metric].notna()]
    if rows.empty:
        wanted = "'layer'" if series is None else f"'layer' and {series!r}"
        raise ValueError(f"no graft has a value of {metric!r} and a value in {wanted}")
    twice = rows[rows.duplicated(["graft", *([series] if series is not None else [])])]
    if len(twice):
        raise ValueError(
            f"the summary has several rows for graft {twice['graft'].iloc[0]}: pass the rows of "
            "one group of prompts, or name the groups' column as series"
        )
    counts = {str(layer): _count(str(layer), n_layers) for layer in dict.fromkeys(rows["layer"])}
    over = n_layers if size == "share" and n_layers is not None else 1
    rows = rows.assign(**{_SIZE: [counts[str(layer)] / over for layer in rows["layer"]]})
    figure = go.Figure()
    names = [None] if series is None else list(dict.fromkeys(rows[series]))
    extreme = "lowest" if facts.lower_is_better else "highest"
    drawn = [
        (name, _line(series, name, index), rows if name is None else rows[rows[series].eq(name)])
        for index, name in enumerate(names)
    ]
    for name, line, part in drawn:
        label = _label(name)
        hover = [
            f"{escaped(graft)}<br>{said}"
            for graft, said in zip(part["graft"], text.written_all(facts, part), strict=True)
        ]
        figure.add_scatter(
            x=part[_SIZE].tolist(),
            y=part[metric].tolist(),
            mode="markers",
            marker={"color": line.color, "symbol": line.marker, "size": 6, "opacity": 0.3},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            name=f"{label}grafts",
            legendgroup=label,
            showlegend=False,
        )
    for name, line, part in drawn:
        label = _label(name)
        groups = part.groupby(_SIZE, sort=True)[metric]
        chosen = part.loc[groups.idxmin() if facts.lower_is_better else groups.idxmax()]
        values = text.written_all(facts, chosen)
        best = [
            f"{extreme} of {n}: {escaped(graft)}<br>{value}"
            for n, graft, value in zip(groups.count(), chosen["graft"], values, strict=True)
        ]
        mean = [
            f"{label}mean of {n}: {value:.3g}"
            for n, value in zip(groups.count(), groups.mean(), strict=True)
        ]
        for what, heights, dash, hover in (
            (extreme, chosen[metric], "solid", best),
            ("mean", groups.mean(), "dash", mean),
        ):
            marker = line.marker + ("-open" if dash == "dash" else "")
            add_line(
                figure,
                [float(at) for at in groups.mean().index],
                heights.tolist(),
                replace(line, dash=dash, marker=marker),
                name=f"{label}{what}",
                legendgroup=label,
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
            )
    entries = [2 * len(_label(name)) + 24 for name in names]
    legend_rows = 1 + sum(entries) // 120
    figure.update_layout(
        **theme.layout(look),
        height=430,
        margin={"l": 60, "r": 16, "t": 26 + 22 * legend_rows, "b": 60},
        legend=theme.ABOVE,
        hovermode="closest",
    )
    title = "layers in the graft" if size == "layers" else "share of the model's layers (%)"
    figure.update_xaxes(title_text=f"{title}; faint points: each graft", zeroline=False)
    figure.update_yaxes(title_text=escaped(facts.axis), **facts.ticks())
    if size == "share":
        figure.update_xaxes(range=[0, 1.03], tickformat=".0%")
    else:
        most = max(counts.values())
        figure.update_xaxes(
            range=[0, 1.04 * most], tickformat=",d", dtick=1 if most <= 16 else None
        )
    return figure


_SIZE = "__size"

#: The strength in the text of a rule, as in `doses: 0.5*sft @ last`.
_FACTOR = re.compile(r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\*")


def dose_response(
    summary: pd.DataFrame,
    metric: str = "recovery",
    *,
    series: str | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`metric` of each graft against its strength, with intervals: how much of it is needed?

    A strength of 0 changes nothing, 1 takes the source's weights, and what lies beyond amplifies
    the difference. Dotted lines are at the two runs between which recovery is measured; such a run
    is also a point of the line of its own rule at other strengths. Grafts without a value in
    `strength` are left out.

    Args:
        summary: of one group of prompts, of a sweep's table or of `evaluate`'s. Grafts with several
            rules (`graft.scaled(0.5)`) take part if the table is given a column `strength`.
        series: a column (`span`, `component`, `layer`, …) each of whose values gets a line; left
            out, each graft does, whatever strength its name has.

    Raises:
        ValueError: an unknown metric or column, several rows for one strength of a line, or no
            graft to show.
    """
    facts = of_summary(summary, metric)
    for column in ("strength", *([series] if series is not None else [])):
        check_column(summary, column, _OF_GRIDS, kind="summary")
    ends = are_references(summary)
    points = _points(summary, series)
    if points.empty:
        raise ValueError("no graft but the references has a value in 'strength'")
    # Prompts of which none ran have no values: as in the other plots, axes without points.
    kept = points[points[metric].notna()] if points[metric].notna().any() else points
    for (name, dose), count in kept.value_counts([_LINE, _DOSE], sort=False).items():
        if count > 1:
            raise ValueError(
                f"{count} rows for strength {dose:g} of {name!r}: pass the rows of one group of "
                "prompts, and give as series a column that tells its grafts apart"
            )
    names = list(dict.fromkeys(kept[_LINE]))
    entries = shortened(names)
    figure = go.Figure()
    for index, name in enumerate(names):
        part = kept[kept[_LINE] == name].sort_values(_DOSE)
        line = _line(series, name, index)
        value, low, high = (part[f"{metric}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        said = zip(part[_DOSE], text.written_all(facts, part), strict=True)
        add_line(
            figure,
            part[_DOSE].tolist(),
            value.tolist(),
            line,
            name=escaped(entries[name]),
            error_y=theme.whiskers(value, low, high, color=line.color),
            meta=part["graft"].astype(str).tolist(),
            customdata=[
                f"{drawing.wrapped(name, 70)}<br>strength {dose:g}<br>{number}"
                for dose, number in said
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(**theme.layout(look), **drawing.legend_above(names, 430))
    figure.update_xaxes(
        title_text=f"strength (1: the source's weights; {text.whiskers(kept, facts)})",
        zeroline=False,
    )
    figure.update_yaxes(title_text=escaped(facts.axis), **facts.ticks())
    known = summary[ends].drop_duplicates("graft")
    baselines = dict(zip(known["graft"].astype(str), known[metric].astype(float), strict=True))
    if metric == "recovery":  # by definition, also where the table has the grafts of a grid only
        baselines = {str(kept["base_run"].iloc[0]): 0.0, str(kept["full_run"].iloc[0]): 1.0}
    add_baselines(figure, facts, kept, baselines)
    return figure


_LINE, _DOSE = "__line", "__dose"

#: What tells grafts apart but for their strengths, in the tables of sweeps and of experiments.
_RULE = [
    *("source", "span", "position", "component", "layer", "head", "neuron"),
    *("grid", "rate", "draw"),
]


def has_doses(summary: pd.DataFrame, metric: str) -> bool:
    """Whether `dose_response` has a line to draw: some graft at several strengths, each once."""
    if "strength" not in summary:
        return False
    points = _points(summary[summary[metric].notna()])
    doses = points.groupby(_LINE)[_DOSE]
    return bool((doses.nunique() > 1).any() and (doses.nunique() == doses.size()).all())


def _points(summary: pd.DataFrame, series: str | None = None) -> pd.DataFrame:
    """The rows of a dose response, with the line and the strength of each.

    A run that recovery is measured between is a point only where the same rule was run at other
    strengths (`sft @ all` beside `0.5*sft @ all`).
    """
    rows = summary[summary["strength"].notna()]
    rows = rows if series is None else rows[rows[series].notna()]
    names = (rows["graft"] if series is None else rows[series]).astype(str)
    lines: list[str | None] = [_FACTOR.sub("", name, 1) for name in names]
    rules = list(rows.reindex(columns=_RULE).astype(str).itertuples(index=False, name=None))
    ends, doses = are_references(rows).tolist(), rows["strength"].astype(float).tolist()
    own = [i for i, end in enumerate(ends) if not end]
    line_of = {rules[i]: lines[i] for i in own}
    there = {(lines[i], doses[i]) for i in own}
    known = "source" in rows and bool({"span", "position"} & {*rows})
    for i, end in enumerate(ends):
        if end:
            line = line_of.get(rules[i]) if known else None
            lines[i] = None if (line, doses[i]) in there else line
    made = rows.assign(**{_LINE: lines, _DOSE: doses})
    made = made.iloc[sorted(range(len(made)), key=ends.__getitem__)]  # lines in the grafts' order
    return made[made[_LINE].notna()]


def _line(series: str | None, name: object, index: int) -> theme.Line:
    """A series' own line; a source or a span has its colour, as everywhere."""
    line = theme.series_line(index)
    fixed = {"source": theme.source_color, "span": theme.span_color}
    return replace(line, color=fixed[series](str(name))) if series in fixed else line


def _label(name: object) -> str:
    return "" if name is None else f"{escaped(str(name))}: "


def _count(layer: str, n_layers: int | None) -> int:
    """How many layers a `layer` column's text names."""
    items = parse_layers(layer)
    groups = [item for item in items if isinstance(item, str)]
    if groups and n_layers is None:
        raise ValueError(
            f"layer {layer!r} is a group: give n_layers, the number of the model's layers"
        )
    found = {item for item in items if isinstance(item, int)}
    if n_layers is not None:
        if found and max(found) >= n_layers:
            raise ValueError(
                f"layer {layer!r} goes beyond n_layers={n_layers}: layers are 0 to {n_layers - 1}"
            )
        for group in groups:
            found.update(layer_group(group, n_layers))
    return len(found)
