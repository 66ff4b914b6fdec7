"""Plots of `direct_logit_attribution`: what each term of a run adds to the answer's logit."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from graftlens.references import common_tokens
from graftlens.viz import drawing, theme
from graftlens.viz.lenstables import (
    as_floats,
    check_columns,
    grafts_of,
    listed,
    of_run,
    prompts_of,
    tokens_of,
)
from graftlens.viz.quantities import Quantity, scale
from graftlens.viz.spelling import escaped, shortened, visible

CONTRIBUTION = Quantity(
    "contribution", "contribution to the answer's logit", "logits", bounds=(None, None), signed=True
)


def logit_attribution_heatmap(
    table: pd.DataFrame,
    graft: str,
    *,
    minus: str | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """What each head (or attention and MLP) of each layer adds to the answer's logit, directly.

    Of `lens.direct_logit_attribution(by="head")` it shows layer (up) × head (across), of
    `by="component"` layer × (attn, mlp), of `by="src_pos"` layer × the token that attention moved
    it from; the other terms are in `logit_attribution_bars`. With several prompts each cell is
    their mean. `minus` names another run whose contributions are taken from the first one's.

    Raises:
        ValueError: an unknown run, a table of whole layers, one with several positions of a prompt
            or with attended positions of several prompts, or one without contributions.
    """
    check_columns(
        table, "direct_logit_attribution", "prompt", "graft", "term", "layer", "contribution"
    )
    terms = list(dict.fromkeys(table["term"].astype(str)))
    kinds = {"head": "head", "src_pos": "src_pos", "attn": "term"}
    kind = next((term for term in kinds if term in terms), None)
    if kind is None:
        raise ValueError(
            f"the table has the terms {listed(terms)}: logit_attribution_heatmap needs "
            'direct_logit_attribution(by="head"), "component" or "src_pos"; '
            "logit_attribution_bars shows every kind"
        )
    column = kinds[kind]
    chosen = table[table["term"].isin(["attn", "mlp"] if kind == "attn" else [kind])]
    _check_one_position(chosen)
    _check_sources(chosen)
    key = ["layer", column]
    means: dict[str, "pd.Series[float]"] = {}
    for name in dict.fromkeys((graft, *([minus] if minus is not None else []), *grafts_of(chosen))):
        means[name], count = _mean_contribution(of_run(chosen, name, ["prompt", *key]), key)
    used = means[graft] if minus is None else means[graft] - means[minus]
    names = {value: str(value) for value in dict.fromkeys(chosen[column])}
    if kind == "src_pos":
        names = tokens_of(chosen.assign(position=chosen[column], token=chosen["src_token"]))
    columns = list(names) if kind == "attn" else sorted(names)
    cells: dict[tuple[Any, Any], drawing.Cell] = {}
    for (layer, term), z in used.items():
        named = {"head": f"head {term}", "src_pos": f"from {names[term]} at {term}"}
        said = [
            f"layer {layer}, {named.get(kind, term)}",
            f"{CONTRIBUTION.label}: {CONTRIBUTION.written(z)}",
        ]
        if minus is not None:
            ends = (
                f"{name} {CONTRIBUTION.written(means[name][layer, term])}"
                for name in (graft, minus)
            )
            said.append(", ".join(ends))
        cells[layer, term] = drawing.Cell(z, [*said, *_mean_said(count)])
    layers = sorted({layer for layer, _ in cells})
    held = used if minus is not None else pd.concat(means.values())
    name = graft if minus is None else f"{graft} − {minus}"
    about = f"{name}: direct contribution to the logit of {_answer(table)}"
    return drawing.heatmap(
        cells,
        across=(columns, [names[value] for value in columns]),
        down=(layers, list(map(str, layers))),
        scale=scale(CONTRIBUTION, held.tolist(), signed=True),
        heading=", ".join([about, *_mean_said(count)]),
        titles=({"head": "head", "src_pos": "token attended to"}.get(kind, "term"), "layer"),
        look=look,
    )


def logit_attribution_bars(
    table: pd.DataFrame,
    *,
    top: int = 15,
    grafts: Sequence[str] | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """The largest direct contributions to the answer's logit, a bar for each run.

    The `top` terms are those whose contribution is largest, with either sign, in any of the runs;
    the bar below them is all others together, so that a run's bars add up to its logit. With
    several prompts a bar is the mean over them. Of `direct_logit_attribution(by="src_pos")` the
    layers are added up: what attention moved here from each position, and what the MLPs wrote.

    Raises:
        ValueError: an unknown run, a table with several positions of a prompt or with attended
            positions of several prompts, or one without contributions.
    """
    check_columns(
        table, "direct_logit_attribution", "prompt", "graft", "term", "layer", "contribution"
    )
    if top < 1:
        raise ValueError(f"top={top} shows no term; give 1 or more")
    _check_one_position(table)
    sources = _check_sources(table)
    names = list(dict.fromkeys(grafts)) if grafts is not None else grafts_of(table)
    key = ["term", *(c for c in ("layer", "head", "src_pos") if c in table)]
    numbers = table.groupby(key, sort=False, dropna=False).ngroup()
    distinct = table[~numbers.duplicated()]
    labels = [_term(row, sources) for _, row in distinct.iterrows()]
    labelled = table.assign(label=numbers.map(dict(enumerate(labels))))
    means: dict[str, "pd.Series[float]"] = {}
    for name in names:
        rows = of_run(labelled, name, ["prompt", *key])
        means[name], count = _mean_contribution(rows, ["label"])
    frame = pd.DataFrame(means)
    largest = frame.abs().max(axis=1).sort_values(ascending=False, kind="stable").index
    shown, rest = list(largest[:top]), list(largest[top:])
    bars = [*shown, *([f"the other {len(rest)} terms"] if rest else [])]
    figure = go.Figure()
    entries = shortened(names)
    for name, fill in theme.graft_fills(names).items():
        values = [float(frame.loc[term, name]) for term in shown]
        values += [float(frame.loc[rest, name].sum())] if rest else []
        figure.add_bar(
            name=escaped(entries[name]),
            orientation="h",
            x=values,
            y=[escaped(term) for term in bars],
            marker={
                "color": fill.color,
                "opacity": look.bar_opacity,
                "line": {"color": look.text, "width": 1},
                "pattern": {
                    "shape": fill.pattern,
                    "fillmode": "overlay",
                    "fgcolor": look.surface,
                    "fgopacity": 0.75,
                    "size": 7,
                },
            },
            customdata=[CONTRIBUTION.written(value) for value in values],
            hovertemplate=f"{drawing.wrapped(name, 70)}<br>%{{y}}: %{{customdata}}<extra></extra>",
        )
    figure.update_layout(
        **theme.layout(look),
        **drawing.legend_above(names, 130 + len(bars) * max(22, 11 * len(names) + 6)),
        barmode="group",
        bargap=0.3,
        bargroupgap=0.05,
    )
    said = ", ".join([f"direct contribution to the logit of {_answer(table)}", *_mean_said(count)])
    figure.update_xaxes(title_text=escaped(f"{said} (logits)"))
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=[escaped(term) for term in bars],
        # The largest at the top.
        range=[len(bars) - 0.5, -0.5],
        dtick=1,
        showgrid=False,
        tickfont_size=12,
        ticksuffix=" ",
    )
    return figure


def _check_one_position(table: pd.DataFrame) -> None:
    if "position" not in table:
        return
    several = table.groupby("prompt", sort=False)["position"].nunique()
    for prompt in several.index[several > 1]:
        have = sorted({int(p) for p in table.loc[table["prompt"] == prompt, "position"]})
        raise ValueError(
            f"the table has the positions {listed(have)} of prompt {prompt}: pass the rows of one"
        )


def _check_sources(table: pd.DataFrame) -> bool:
    """Whether a table of attributions is by source position; then it must be of one prompt."""
    sources = bool((table["term"] == "src_pos").any())
    if sources and table["prompt"].nunique() > 1:
        raise ValueError(
            f"the table has attended positions of the prompts {listed(prompts_of(table))}, which "
            f"do "
            "not line up: pass the rows of one prompt"
        )
    return sources


def _mean_contribution(rows: pd.DataFrame, key: Sequence[str]) -> "tuple[pd.Series[float], int]":
    """The mean over prompts, and of how many: those without an answer have no contributions."""
    held = rows.assign(contribution=as_floats(rows["contribution"]))
    held = held[held["contribution"].notna()]
    if held.empty:
        raise ValueError(
            f"no contribution is known for the prompts {listed(prompts_of(rows))}: give them "
            "answers"
        )
    count = int(held["prompt"].nunique())
    # A term that a shorter prompt lacks contributes nothing to it.
    return held.groupby(list(key), sort=False)["contribution"].sum() / count, count


def _mean_said(count: int) -> list[str]:
    return [f"mean of {count} prompts"] if count > 1 else []


def _answer(table: pd.DataFrame) -> str:
    """Whose logit a table of attributions is about."""
    targets, others = (
        list(dict.fromkeys(table[column].dropna())) if column in table else []
        for column in ("target", "against")
    )
    said = visible(targets[0]) if len(targets) == 1 else "the answer"
    count = common_tokens(table)
    over = "" if count is None else f" of the {count:,} tokens that all sources have"
    minus = {"mean": f"the mean logit{over}", "distractors": "its distractors"}
    return " minus ".join([said, *(minus.get(str(o), visible(o)) for o in others)])


def _term(row: "pd.Series[Any]", whole: bool) -> str:
    """A term of an attribution in a few characters; `whole`: the layers are taken together."""
    term = str(row["term"]).replace("_", " ")
    if term == "src pos":
        return f"attention to {visible(row['src_token'])} at {int(row['src_pos'])}"
    if pd.isna(row["layer"]):
        return term
    if whole:
        return f"{term}, all layers"
    layer = f"L{int(row['layer'])}"
    if term == "head":
        return f"{layer}H{int(row['head'])}"
    return layer if term == "layer" else f"{layer} {term}"
