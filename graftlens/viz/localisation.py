"""A localisation: its sites as heat maps, its curve, its example, and the page of all of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens.folder import at_home, write_whole
from graftlens.viz import drawing, text, theme
from graftlens.viz.figures import bar_chart
from graftlens.viz.linecharts import add_line
from graftlens.viz.page import Figure, Table
from graftlens.viz.quantities import Quantity, Scale, scale
from graftlens.viz.reading import glossary
from graftlens.viz.render import render
from graftlens.viz.spelling import escaped, visible

#: What the heat maps of sites can show -> what that is called.
VIEWS = {
    "score": "score (integrated gradients)",
    "alone": "alone in the base",
    "missing": "missing from the full source",
    "in_set": "in the found set",
}

#: What a component outside the layers has for a layer.
NO_LAYER = "–"

#: Pixels: a row of a heat map, the room for a panel's title and its column names, the foot.
_ROW, _BETWEEN, _FOOT = 22, 62, 62


@runtime_checkable
class Localised(Protocol):
    """What the page needs of `graftlens.find.localise`'s result."""

    @property
    def table(self) -> pd.DataFrame: ...
    @property
    def search(self) -> pd.DataFrame: ...
    @property
    def curve(self) -> pd.DataFrame: ...
    @property
    def summary(self) -> pd.DataFrame: ...
    @property
    def differences(self) -> pd.DataFrame: ...
    @property
    def random(self) -> pd.DataFrame: ...
    @property
    def failures(self) -> pd.DataFrame: ...
    @property
    def example(self) -> pd.DataFrame: ...
    @property
    def rounds(self) -> pd.DataFrame: ...
    @property
    def costs(self) -> pd.DataFrame: ...
    @property
    def split(self) -> pd.DataFrame: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def judged(self) -> str: ...
    @property
    def jaccard(self) -> tuple[float, ...]: ...
    @property
    def p_value(self) -> float: ...
    @property
    def cpr(self) -> float: ...
    @property
    def cmd(self) -> float: ...
    @property
    def goal(self) -> Any: ...
    @property
    def target(self) -> Any: ...
    @property
    def metric(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def size(self) -> Any: ...
    @property
    def total(self) -> Any: ...
    @property
    def sentence(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def yaml(self) -> str: ...


def site_map(
    table: pd.DataFrame, value: str = "score", *, look: theme.Theme = theme.LIGHT
) -> go.Figure:
    """A heat map of sites, layer by component, with a panel for each position.

    Args:
        table: `Found.table`, or any with `component`, `layer`, `position` and the value.
        value: `score`, `alone` or `missing`, whose scale is symmetric around 0, or `in_set`.
        look: the colours.

    Raises:
        ValueError: a value that the table does not have.
    """
    if value not in VIEWS or value not in table:
        have = [name for name in VIEWS if name in table]
        raise ValueError(f"value={value!r} is not in the table. It has: {' '.join(have)}.")
    positions = list(dict.fromkeys(table["position"]))
    components = list(dict.fromkeys(table["component"]))
    layers = [NO_LAYER] if table["layer"].isna().any() else []
    layers += [str(n) for n in sorted(table["layer"].dropna().astype(int).unique())]
    across = {layer: i for i, layer in enumerate(layers)}
    down = {component: i for i, component in enumerate(components)}
    count = len(positions)
    inner = count * _ROW * len(components) + (count - 1) * _BETWEEN
    figure = make_subplots(
        rows=count,
        cols=1,
        vertical_spacing=_BETWEEN / inner if count > 1 else 0,
        subplot_titles=[escaped(_panel(str(position), positions)) for position in positions],
    )
    shares = _shares(table) if value == "in_set" else table[value].to_numpy(dtype=float)
    for number, position in enumerate(positions, 1):
        rows = np.flatnonzero((table["position"] == position).to_numpy(bool))
        z = np.full((len(components), len(layers)), np.nan)
        said = np.full(z.shape, "", dtype=object)
        for row in rows.tolist():
            one = table.iloc[row]
            layer = NO_LAYER if pd.isna(one["layer"]) else str(int(one["layer"]))
            place = down[one["component"]], across[layer]
            z[place], said[place] = shares[row], _said(one, layer)
        figure.add_heatmap(
            x=layers,
            y=[escaped(component) for component in components],
            z=[[None if math.isnan(v) else v for v in line] for line in z.tolist()],
            **drawing.hovering(said.tolist()),
            hoverongaps=False,
            coloraxis="coloraxis",
            row=number,
            col=1,
        )
    colours = _scale(value, shares.tolist())
    figure.update_layout(
        **{k: v for k, v in theme.layout(look).items() if k not in ("xaxis", "yaxis")},
        height=inner + 44 + _FOOT + 14,
        margin={"l": 80, "r": 16, "t": 44, "b": _FOOT},
        showlegend=False,
        coloraxis={
            "colorscale": theme.colorscale(colours.colors),
            "cmin": colours.low,
            "cmax": colours.high,
            "colorbar": colours.bar(min(inner, 300)),
        },
    )
    axis = {"linecolor": look.muted, "showgrid": False, "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis, type="category", tickfont_size=11)
    figure.update_yaxes(**axis, type="category", dtick=1, autorange="reversed", ticksuffix=" ")
    figure.update_annotations(font_size=13, x=0, xanchor="left")
    figure.update_xaxes(title_text=f"layer ({NO_LAYER}: outside the layers)", row=count)
    return figure


def _panel(position: str, positions: Sequence[object]) -> str:
    """A panel's title: the position, in words where it is all that the other panels are not."""
    others = {str(other) for other in positions} - {position}
    inside = position.removeprefix("~").removeprefix("(").removesuffix(")")
    if position.startswith("~") and others == set(inside.split(" + ")):
        return f"all other tokens: {position}"
    return position


def _shares(table: pd.DataFrame) -> np.ndarray:
    """1 for sites in the set, 0.5 for those of which it has some units, else 0."""
    inside = table["in_set"].to_numpy(bool)
    partly = table["units"].notna().to_numpy(bool) if "units" in table else np.zeros_like(inside)
    return np.where(inside, np.where(partly, 0.5, 1.0), 0.0)


def _said(row: "pd.Series[Any]", layer: str) -> str:
    lines = [f"{row['component']} {'' if layer == NO_LAYER else layer} @ {row['position']}"]
    lines += [f"{name}: {row[name]:.3g}" for name in ("score", "alone", "missing") if name in row]
    if "order" in row:
        lines.append(f"order: {row['order']}")
    if "in_set" in row:
        units = row.get("units")
        some = "" if units is None or pd.isna(units) else f" (units {units})"
        lines.append(f"in the set{some}" if row["in_set"] else "not in the set")
    if "stability" in row:
        lines.append(f"in {100 * row['stability']:.0f}% of the resamples")
    return "<br>".join(map(escaped, lines))


def _scale(value: str, values: Sequence[float]) -> Scale:
    if value == "in_set":
        return Scale(
            0.0,
            1.0,
            theme.SEQUENTIAL,
            "in the set",
            {"tickvals": [0, 0.5, 1], "ticktext": ["not", "in part", "whole"]},
        )
    quantity = Quantity(value, VIEWS[value], "in units of the measure", short=value, signed=True)
    return scale(quantity, values, signed=True, robust=True)


def recovery_curve(
    curve: pd.DataFrame,
    *,
    target: float | int | None = None,
    found: tuple[int, float] | None = None,
    goal: str = "sufficient",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """Recovery of nested sets over their size, and of what is left without them.

    Args:
        curve: `Found.curve`.
        target: the recovery to reach, a dashed line.
        found: size and recovery of the found set.
        goal: what the search was for: where the target's line is.
        look: the colours.
    """
    figure = go.Figure()
    shown = curve[curve["size"] > 0]
    for index, (name, label) in enumerate(
        (("recovery", "the sites alone"), ("rest", "all but the sites"))
    ):
        value, low, high = (
            shown[f"{name}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")
        )
        line = theme.series_line(index)
        add_line(
            figure,
            shown["size"].tolist(),
            value.tolist(),
            line,
            name=label,
            error_y=theme.whiskers(value, low, high, color=line.color),
            hovertemplate=f"{label}<br>%{{x}} sites: %{{y:.3f}}<extra></extra>",
        )
    if found is not None:
        figure.add_scatter(
            x=[found[0]],
            y=[found[1]],
            mode="markers",
            name="the found set",
            marker={"symbol": "star", "size": 15, "color": theme.VERMILION},
            hovertemplate="the found set<br>%{x} sites: %{y:.3f}<extra></extra>",
        )
    lines = [target] if target is not None and goal in ("sufficient", "both") else []
    lines += [1 - target] if target is not None and goal in ("necessary", "both") else []
    for height in lines:
        figure.add_hline(y=height, line={"dash": "dot", "width": 1, "color": theme.GREY})
    figure.update_layout(
        **theme.layout(look),
        height=430,
        margin={"l": 60, "r": 16, "t": 60, "b": 60},
        legend=theme.ABOVE,
        hovermode="closest",
    )
    figure.update_xaxes(type="log", title_text="sites, in the order of their scores", dtick=1)
    figure.update_yaxes(title_text="recovery (0 = base, 1 = full)")
    return figure


def set_on_prompt(example: pd.DataFrame, *, look: theme.Theme = theme.LIGHT) -> go.Figure:
    """On which tokens a set has which components, and of how many layers.

    Args:
        example: `Found.example`.
        look: the colours.
    """
    tokens = example.drop_duplicates("pos").sort_values("pos")
    components = list(dict.fromkeys(example["component"].dropna()))
    across = {pos: i for i, pos in enumerate(tokens["pos"])}
    down = {component: i for i, component in enumerate(components)}
    z = [[0] * len(across) for _ in components]
    said = [["not in the set"] * len(across) for _ in components]
    for row in example.dropna(subset="component").to_dict("records"):
        place = down[row["component"]], across[row["pos"]]
        z[place[0]][place[1]] = row["count"]
        text = f"{row['component']} at {visible(row['token'])}: layers {row['layers']}"
        said[place[0]][place[1]] = escaped(text)
    most = max([1, *(count for line in z for count in line)])
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(len(across))),
        y=[escaped(component) for component in components],
        z=z,
        **drawing.hovering(said),
        zmin=0,
        zmax=most,
        colorscale=theme.colorscale(theme.SEQUENTIAL),
        colorbar={"title": {"text": "layers", "side": "right"}, "thickness": 14, "outlinewidth": 0},
    )
    height = max(150, 24 * len(components))
    figure.update_layout(
        **theme.layout(look), height=height + 110, margin={"l": 80, "r": 16, "t": 40, "b": 70}
    )
    figure.update_xaxes(
        tickvals=list(range(len(across))),
        ticktext=[escaped(visible(token)) for token in tokens["token"]],
        tickfont_size=11,
        autotickangles=[0, -45, -90],
        automargin=True,
        title_text="token",
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, ticksuffix=" ")
    return figure


def random_histogram(
    random: pd.DataFrame,
    value: float | int,
    column: str = "enough",
    *,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """The recoveries of random sets, and that of the found one as a line.

    Args:
        random: `Found.random`.
        value: the found set's recovery.
        column: `enough`, or `without` for what is left without each set.
        look: the colours.
    """
    figure = go.Figure()
    figure.add_histogram(
        x=random[column].tolist(), nbinsx=30, marker={"color": theme.BLUE}, name="random sets"
    )
    figure.add_vline(x=value, line={"color": theme.VERMILION, "width": 3})
    figure.add_annotation(
        x=value, y=1, yref="paper", yanchor="bottom", text="the found set", showarrow=False
    )
    figure.update_layout(
        **theme.layout(look), height=300, margin={"l": 60, "r": 16, "t": 40, "b": 60}, bargap=0.05
    )
    figure.update_xaxes(title_text="recovery (0 = base, 1 = full)", zeroline=False)
    figure.update_yaxes(title_text="random sets")
    return figure


#: Tables of the page -> their captions.
_CAPTIONS = {
    "summary": "On the held-out prompts",
    "differences": "The found set minus others, on the same held-out facts (p adjusted by Holm)",
    "curve": "Recovery over size, on the held-out prompts",
    "failures": "Held-out prompts whose answer the found set does not put first",
    "split": "Which prompts were for what",
    "search": "What was judged on the search side",
    "rounds": "Rounds of refinement",
    "costs": "How many runs it took, before rows are shared",
    "table": "Every searched site, the largest score first",
}


#: What the table of failures is where texts judge.
UNLIKE = (
    "Held-out prompts on which its texts are at least as near to the base's as to the full source's"
)


def localisation_page(
    found: Localised,
    path: str | Path,
    *,
    title: str = "",
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, Mapping[str, Path]] | None = None,
    links: Mapping[str, Path] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of a localisation to `path` and return it; it appears whole or not at all.

    Args:
        found: what `graftlens.find.localise` found.
        path: the page.
        title: its heading.
        provenance: what was run and how.
        files: a table's name -> kind (csv, md) -> the same table as a file.
        links: what a further file is -> where it is.
        notes: what a reader must know besides.
    """
    path = at_home(path)
    own = _judged(found)
    views = [(name, label, False) for name, label in VIEWS.items() if name in found.table]
    captions = _CAPTIONS | ({"failures": UNLIKE} if found.judged else {})
    tables = {
        name: Table(caption, _ordered(getattr(found, name)), dict((files or {}).get(name, {})))
        for name, caption in captions.items()
        if len(getattr(found, name))
    }
    bars = found.summary[~found.summary["graft"].isin(["PRE", "SFT"])]
    compared = [bar_chart(bars, "recovery")]
    column = "without" if found.goal == "necessary" else "enough"
    if len(found.random):
        chance = random_histogram(found.random, own, column)
        spread = found.random[column]
        compared.append(
            Figure(
                f"{_MEANT[column]} random sets matched by component and position, and "
                f"{_SAME[column]} the found set.",
                f"Histogram of {len(spread)} random sets, from {spread.min():.3f} to "
                f"{spread.max():.3f}; the found set has {own:.3f}.",
                chance,
            )
        )
    said = [*found.notes, *notes, *filter(None, [text.common_note(found.summary)])]
    html = render(
        "localisation.html",
        title=title or f"The places that do what {found.source} does",
        found=found,
        notes=said,
        measured=_measured(found),
        views=views,
        unmeasured="alone" not in found.table,
        maps=_maps(found),
        curve=_curve_figure(found),
        example=Figure(
            "How many layers of each component the set has at each token.",
            "Heat map of the found set on one prompt, component by token.",
            set_on_prompt(found.example),
        ),
        tokens=_tokens(found.example),
        compared=compared,
        chance=_chance(found),
        stable=_stable(found),
        tables=tables,
        glossary=glossary(found.summary) | _NAMES,
        provenance=provenance or {},
        links=links or {},
        folder=path.parent,
    )
    return write_whole(path, html)


#: Grafts that only this page has, and what they are.
_NAMES = {
    "found": "finetuned weights at the found set of sites alone",
    "complement": "finetuned weights at all searched sites but these",
}

#: What a random set's recovery is of.
_MEANT = {"enough": "Recoveries of", "without": "Recoveries of what is left without"}
_SAME = {"enough": "that of", "without": "that without"}

#: What the page shows of differences.
_DIFFERENCES = ["a", "b", "metric", "difference", "low", "high", "p_adjusted", "units"]


def _judged(found: Localised) -> float:
    """The recovery that the goal is about: of the set, or of what is left without it."""
    name = "complement" if found.goal == "necessary" else "found"
    return float(found.summary.set_index("graft").at[name, "recovery"])


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """A table as the page shows it: sites in the order of their scores, differences without how
    they were computed, the curve's columns in words."""
    if set(_DIFFERENCES) <= set(frame):
        return frame[_DIFFERENCES].rename(columns={"a": "graft", "b": "minus"})
    if {"size", "rest"} <= set(frame):
        ends = {f"rest{end}": f"recovery of all but these{end}" for end in ("", "_low", "_high")}
        return frame.rename(columns={"size": "sites", "share": "share of all sites"} | ends)
    return frame.sort_values("order", ignore_index=True) if "order" in frame else frame


def found_figures(found: Localised) -> dict[str, Figure]:
    """The figures of a localisation that a page of several parts shows, by name."""
    maps = {f"sites-{name.replace('_', '-')}": figure for name, figure in _maps(found).items()}
    return {"curve": _curve_figure(found), **maps}


def _maps(found: Localised) -> dict[str, Figure]:
    """A heat map of the sites for everything that was measured of them."""
    return {
        name: Figure(
            f"{said[:1].upper()}{said[1:]}: component by layer, a panel for each position.",
            _map_in_words(found.table, name, said),
            site_map(found.table, name),
        )
        for name, said in VIEWS.items()
        if name in found.table
    }


def _curve_figure(found: Localised) -> Figure:
    own = _judged(found)
    caption = (
        "Recovery of the first sites in the order of their scores, and of everything but these, on "
        "the held-out prompts. Dotted: the target. Circuit performance ratio (area under the first "
        f"line over the share of sites) {found.cpr:.3f}, circuit-model distance (area between it "
        f"and 1) {found.cmd:.3f}."
    )
    ends = ", ".join(
        f"{int(size)} sites {value:.2f}"
        for size, value in zip(found.curve["size"], found.curve["recovery"], strict=True)
    )
    figure = recovery_curve(
        found.curve,
        target=float(found.target),
        found=(int(found.size.sites), own),
        goal=str(found.goal),
    )
    return Figure(caption, f"Line chart of recovery over size: {ends}.", figure)


def _map_in_words(table: pd.DataFrame, name: str, said: str) -> str:
    if name == "in_set":
        return f"Heat map of the found set: {int(table['in_set'].sum())} of {len(table)} sites."
    best = table.loc[table[name].astype(float).idxmax()]
    layer = "" if pd.isna(best["layer"]) else f" {int(best['layer'])}"
    return (
        f"Heat map of sites, {said}; the largest is {best[name]:.3g} at {best['component']}{layer} "
        f"@ {best['position']}."
    )


def _measured(found: Localised) -> str:
    size, total = found.size, found.total
    share = size.parameters / total.parameters
    units = f" ({size.units} heads or neurons)" if size.units else ""
    return (
        f"{size.sites} of {total.sites} sites{units}: {size.parameters:,.0f} of "
        f"{total.parameters:,.0f} parameters × positions ({100 * share:.1f}%). A site is a "
        "component of a layer at a position."
    )


def _chance(found: Localised) -> str:
    if not len(found.random):
        return ""
    rows = [(name, found.random[name].astype(float)) for name in _OF_RANDOM if name in found.random]
    said = [
        f"{_OF_RANDOM[name]} {values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
        for name, values in rows
        if values.notna().all()
    ]
    left = ", of what is left without each" if found.goal == "necessary" else ""
    return (
        f"{len(found.random)} random sets with as many sites of each component at each position: "
        f"p = {found.p_value:.3g} for doing as well by chance. Their means (least to largest)"
        f"{left}: {', '.join(said)}."
    )


#: Columns of random sets -> what they are called.
_OF_RANDOM = {
    "enough": "recovery",
    "without": "recovery without the set",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "kl_full": "KL divergence from the full run",
}


def _stable(found: Localised) -> str:
    if not found.jaccard:
        return ""
    low, high = min(found.jaccard), max(found.jaccard)
    mean = sum(found.jaccard) / len(found.jaccard)
    return (
        f"Stability: with the facts of the search resampled {len(found.jaccard)} times, as many "
        f"first sites overlap with the found ones by {mean:.2f} ({low:.2f} to {high:.2f}; Jaccard "
        "index: 1 is the same sites)."
    )


def _tokens(example: pd.DataFrame) -> list[dict[str, str]]:
    found = []
    for _, rows in example.groupby("pos", sort=True):
        said = [
            f"{row['component']}: layers {row['layers']}"
            for row in rows.dropna(subset="component").to_dict("records")
        ]
        found.append({"text": str(rows["token"].iloc[0]), "said": "; ".join(said)})
    return found
