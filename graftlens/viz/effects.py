"""Plots of scores by place: tables of `find.attribute` and of `find.exact_effects`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens.components import COMPONENTS, HEAD_COMPONENTS, Component
from graftlens.stats import bootstrap_means
from graftlens.viz import drawing, theme
from graftlens.viz.lenstables import check_column
from graftlens.viz.quantities import Quantity, known, scale
from graftlens.viz.spelling import escaped, shortened

#: What such a table may have of each place, in units of its measure.
EFFECTS: Mapping[str, Quantity] = {
    name: Quantity(name, label, "", bounds=(None, None), signed=True)
    for name, label in (
        ("ig", "integrated gradients"),
        ("at_base", "gradient at the base"),
        ("at_full", "gradient at the full source"),
        ("alone", "effect alone in the base"),
        ("missing", "effect when missing from the full source"),
    )
}

#: Pixels: a row's height, the room above the panels, between two, and below.
_ROW, _HEAD, _BETWEEN, _FOOT = 22, 50, 62, 62

#: What the column of components outside the layers is called.
_OUTSIDE = "–"

_OF = ". Give the table of find.attribute or find.exact_effects"


def effect_heatmap(
    table: pd.DataFrame,
    value: str | None = None,
    *,
    metric: str = "logprob",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """Where the effect is: layer (across) × component (down), a panel for each position.

    A cell is the mean over prompts; units of a site are added up. Components outside the layers
    have a column of their own. All panels share one scale, symmetric around 0, which a few extreme
    cells do not stretch: the colour bar says how far they go.

    Args:
        table: of `find.attribute` or `find.exact_effects`.
        value: the column that is drawn; by default `ig`, of exact effects `alone`.
        metric: the measure that it was made with, for the unit.

    Raises:
        ValueError: a column that the table lacks, or a table without rows.
    """
    value = value or _first(table)
    facts = _facts(table, value, metric)
    sites = _by_prompt(table, value, ["position", "component", "layer"])
    means = sites.mean()
    panels = list(dict.fromkeys(key[0] for key in means.index))
    layers = sorted({key[2] for key in means.index if key[2] >= 0})
    outside = any(key[2] < 0 for key in means.index)
    columns = [*layers, *([-1] if outside else [])]
    rows = {panel: _components([k[1] for k in means.index if k[0] == panel]) for panel in panels}
    names = [_OUTSIDE if layer < 0 else str(layer) for layer in columns]
    return _panels(
        facts,
        [str(panel) for panel in panels],
        [
            [
                [means.get((panel, component, layer)) for layer in columns]
                for component in rows[panel]
            ]
            for panel in panels
        ],
        across=[names] * len(panels),
        down=[rows[panel] for panel in panels],
        said=lambda panel, down, across: (
            f"{down}{'' if across == _OUTSIDE else f', layer {across}'}, at {panel}"
        ),
        titles=("layer", ""),
        prompts=len(sites),
        look=look,
    )


def effect_bars(
    table: pd.DataFrame,
    value: str | None = None,
    *,
    by: Literal["position", "component"] = "position",
    metric: str = "logprob",
    seed: int = 0,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How much of the effect each position, or each component, has: a bar each, sites added up.

    Bars are means over prompts; whiskers are 95% percentile bootstrap intervals over prompts, where
    there are several. Integrated gradients add up to the whole effect; other columns do not.

    Args:
        table: of `find.attribute` or `find.exact_effects`.
        value: the column that is drawn; by default `ig`, of exact effects `alone`.
        by: what a bar is.
        metric: the measure that it was made with, for the unit.
        seed: of the resampling.

    Raises:
        ValueError: a column that the table lacks, an unknown `by`, or a table without rows.
    """
    value = value or _first(table)
    facts = _facts(table, value, metric)
    if by not in ("position", "component"):
        raise ValueError(f"by={by!r} is unknown; choose 'position' or 'component'")
    sums = _by_prompt(table, value, [by])
    names = list(sums.columns) if by == "position" else _components(list(sums.columns))
    sums = sums[names].fillna(0.0)
    held = sums.to_numpy(dtype=float)
    low, high = np.full((2, len(names)), np.nan)
    if len(held) > 1:
        draws = bootstrap_means(held, resamples=2000, seed=seed)
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    mean = held.mean(0)
    labels = [escaped(name) for name in shortened(map(str, names)).values()]
    figure = go.Figure()
    figure.add_bar(
        x=labels,
        y=mean.tolist(),
        error_y=theme.whiskers(mean, low, high, color=look.text),
        marker={
            "color": theme.BLUE,
            "opacity": look.bar_opacity,
            "line": {"color": look.text, "width": 1},
        },
        customdata=[
            f"{label}: {facts.written(m)} [{facts.written(a)}, {facts.written(b)}]"
            for label, m, a, b in zip(labels, mean, low, high, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )
    margin = {"l": 70, "r": 16, "t": 24, "b": 60}
    figure.update_layout(**theme.layout(look), height=430, margin=margin)
    whiskers = "; whiskers: 95% intervals over prompts" if len(held) > 1 else ""
    figure.update_xaxes(title_text=f"{by}{whiskers}", type="category", showgrid=False)
    figure.update_yaxes(title_text=escaped(facts.title), zeroline=True)
    return figure


def effect_head_map(
    table: pd.DataFrame,
    value: str | None = None,
    *,
    metric: str = "logprob",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """Which heads have the effect: layer (down) × head (across), a panel for q, k, v and o each.

    q and o have query heads, k and v key-value heads. A cell is the mean over prompts, positions
    added up; what belongs to no head is left out.

    Args:
        table: of `find.attribute` or `find.exact_effects` with `by="head"`.
        value: the column that is drawn; by default `ig`, of exact effects `alone`.
        metric: the measure that it was made with, for the unit.

    Raises:
        ValueError: a column that the table lacks, or a table without heads.
    """
    value = value or _first(table)
    facts = _facts(table, value, metric)
    numbers = pd.to_numeric(table["unit"].astype(object), errors="coerce")
    heads = table[table["component"].isin([str(c) for c in HEAD_COMPONENTS]) & numbers.notna()]
    if heads.empty:
        raise ValueError('the table has no head: make it with by="head"')
    heads = heads.assign(unit=numbers[heads.index].astype(int))
    sums = _by_prompt(heads, value, ["component", "layer", "unit"])
    means = sums.fillna(0.0).mean()
    panels = _components([key[0] for key in means.index])
    across = {p: sorted({key[2] for key in means.index if key[0] == p}) for p in panels}
    down = {p: sorted({key[1] for key in means.index if key[0] == p}) for p in panels}
    kinds = {p: str(COMPONENTS[Component(p)].cut) for p in panels}
    return _panels(
        facts,
        [f"{panel} ({kinds[panel]}s)" for panel in panels],
        [
            [[means.get((p, layer, head)) for head in across[p]] for layer in down[p]]
            for p in panels
        ],
        across=[[str(head) for head in across[p]] for p in panels],
        down=[[str(layer) for layer in down[p]] for p in panels],
        said=lambda panel, layer, head: f"{panel.partition(' (')[0]}, layer {layer}, head {head}",
        titles=("head", "layer"),
        prompts=len(sums),
        look=look,
    )


def _first(table: pd.DataFrame) -> str:
    """The score that a table is about."""
    return next((name for name in EFFECTS if name in table), next(iter(EFFECTS)))


def _facts(table: pd.DataFrame, value: str, metric: str) -> Quantity:
    """What is drawn, with the unit of the measure that it is of."""
    facts = known(EFFECTS, value)
    for column in ("prompt", "component", "layer", "position", "unit", value):
        check_column(table, column, _OF)
    if table[value].notna().sum() == 0:
        raise ValueError(f"the table has no value in its column {value!r}")
    measure = Quantity.of(metric).within(table)
    unit = "share of 1" if measure.share else measure.unit
    return Quantity(
        facts.name, f"{facts.label}, {measure.short}", unit, bounds=(None, None), signed=True
    )


def _by_prompt(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """[prompt, place]: sums of a column, in their order; the layer is -1 outside the layers."""
    rows = table.assign(
        layer=pd.to_numeric(table["layer"].astype(object), errors="coerce").fillna(-1).astype(int),
        value=pd.to_numeric(table[value].astype(object), errors="coerce"),
    )
    order = list(rows[list(by)].drop_duplicates().itertuples(index=False, name=None))
    sums = rows.groupby(["prompt", *by], sort=False, observed=True)["value"].sum(min_count=1)
    wide = sums.unstack(list(by))
    keys = order if len(by) > 1 else [key for (key,) in order]
    return wide[keys]


def _components(names: Sequence[Any]) -> list[str]:
    """Different components in the vocabulary's order."""
    there = set(map(str, names))
    return [str(component) for component in Component if component in there]


def _panels(
    facts: Quantity,
    panels: Sequence[str],
    values: Sequence[Sequence[Sequence[Any]]],
    *,
    across: Sequence[Sequence[str]],
    down: Sequence[Sequence[str]],
    said: Any,
    titles: tuple[str, str],
    prompts: int,
    look: theme.Theme,
) -> go.Figure:
    """Heat maps one below the other that share a scale."""
    heights = [_ROW * len(names) for names in down]
    inner = sum(heights) + _BETWEEN * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=[height / sum(heights) for height in heights],
        vertical_spacing=_BETWEEN / inner if len(panels) > 1 else 0,
        subplot_titles=[escaped(panel) for panel in panels],
    )
    every = []
    for number, (panel, cells) in enumerate(zip(panels, values, strict=True)):
        z = [
            [None if v is None or not math.isfinite(v) else float(v) for v in row] for row in cells
        ]
        every += [v for row in z for v in row if v is not None]
        figure.add_trace(
            go.Heatmap(
                x=list(across[number]),
                y=list(down[number]),
                z=z,
                **drawing.hovering(
                    [
                        [
                            escaped(said(panel, y, x))
                            + "<br>"
                            + ("not in the table" if v is None else escaped(facts.written(v)))
                            for x, v in zip(across[number], row, strict=True)
                        ]
                        for y, row in zip(down[number], z, strict=True)
                    ]
                ),
                hoverongaps=False,
                coloraxis="coloraxis",
            ),
            row=number + 1,
            col=1,
        )
    held = scale(facts, every, signed=True, robust=True)
    shared = {k: v for k, v in theme.layout(look).items() if k not in ("xaxis", "yaxis")}
    figure.update_layout(
        **shared,
        height=inner + _HEAD + _FOOT,
        margin={"l": 80, "r": 16, "t": _HEAD, "b": _FOOT},
        showlegend=False,
        coloraxis={
            "colorscale": theme.colorscale(held.colors),
            "cmin": held.low,
            "cmax": held.high,
            "colorbar": held.bar(inner),
        },
    )
    axis = {"linecolor": look.muted, "showgrid": False, "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis, type="category", tickfont_size=11)
    figure.update_yaxes(
        **axis, type="category", dtick=1, autorange="reversed", ticksuffix=" ", title_text=titles[1]
    )
    over = f"mean over {prompts} prompts" if prompts > 1 else "one prompt"
    figure.update_xaxes(title_text=f"{titles[0]} ({over})", row=len(panels))
    figure.update_annotations(font_size=13, x=0, xanchor="left")
    return figure
