"""Plots of the logit lens and of KL divergences: what runs predict by layer and by token.

Layers go up, the embeddings at the bottom. As in all plots of lens tables, a scale is the same for
every run that a table holds, so that two figures of one table can be compared by eye; where two
runs are subtracted it is symmetric around 0.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens import metrics
from graftlens.viz import drawing, theme
from graftlens.viz.lenstables import (
    as_float,
    as_floats,
    at_position,
    check_columns,
    grafts_of,
    listed,
    of_prompt,
    of_run,
    prompts_of,
    refuse_doubled,
    tokens_of,
)
from graftlens.viz.linecharts import add_band, add_line
from graftlens.viz.quantities import Quantity, known, scale
from graftlens.viz.spelling import escaped, inline, short, shortened, visible

#: Pixels: about how wide the inside of a figure is, and a character of a cell's label.
_INSIDE, _CHARACTER = 780, 6.4

#: What a table of the logit lens has at each layer and position.
LENS_VALUES: Mapping[str, Quantity] = {
    name: Quantity.of(name, base="PRE", full="SFT")
    for name in ("logprob", "prob", "rank", "entropy", "kl_base", "kl_full")
}

#: What a table of `lens.kl_divergence` has: how far a run is from PRE (base) or SFT (full).
DIVERGENCES: Mapping[str, Quantity] = {
    row.name: Quantity.of(row.name) for row in metrics.measures() if row.references
}


def lens_heatmap(
    table: pd.DataFrame,
    graft: str,
    *,
    value: str = "logprob",
    minus: str | None = None,
    prompt: int | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """What a run would predict after each layer (up) at each token of one prompt (across).

    Args:
        table: of `lens.logit_lens`.
        graft: the run that is shown; cells are labelled with its most likely token where there is
            room, and the hover text has its most likely tokens.
        value: `logprob`, `prob` or `rank` of the answer's first token (rank on a log scale),
            `entropy`, `kl_base` or `kl_full`. The scale of log-probabilities is that of the layers;
            the embeddings' may lie below it and are then palest.
        minus: another run, whose value is taken from the first one's (of ranks: the ratio). Red is
            where `graft` has more, of ranks where it ranks the answer higher.
        prompt: its number, where the table has several.

    Raises:
        ValueError: an unknown value, run or prompt, or a value of the answer without an answer.
    """
    facts = known(LENS_VALUES, value).within(table)
    check_columns(table, "logit_lens", "prompt", "graft", "layer", "position", "token", value)
    rows = of_prompt(table, prompt)
    key = ["layer", "position"]
    shown = of_run(rows, graft, key)
    other = None if minus is None else of_run(rows, minus, key)
    if facts.of_answer and shown[value].isna().all():
        without = [name for name, about in LENS_VALUES.items() if not about.of_answer]
        raise ValueError(
            f"prompt {shown['prompt'].iloc[0]} has no answer, so it has no {value!r}. Show "
            f"{listed(without)}, or give the prompt an answer"
        )
    layers = sorted({float(layer) for layer in shown["layer"]})
    positions = tokens_of(shown)
    labels = int(_INSIDE / len(positions) / _CHARACTER) - 1
    found = {(float(row["layer"]), int(row["position"])): row for _, row in shown.iterrows()}
    below = {} if other is None else _lookup(other, value)
    cells: dict[tuple[float, int], drawing.Cell] = {}
    for (layer, position), row in found.items():
        number = as_float(row[value])
        z = facts.coloured(number)
        said = f"{facts.label}: {facts.written(number)}"
        if minus is not None:
            without_it = below.get((layer, position), math.nan)
            z -= facts.coloured(without_it)
            said += f" ({minus}: {facts.written(without_it)})"
        top = [str(token) for token in row["top_tokens"]]
        lines = [f"{_layer(layer)}, {inline(row['token'])} at {position}", said]
        if not pd.isna(row["target"]) and value not in ("rank", "prob"):
            rank, share = (as_float(row[name]) for name in ("rank", "prob"))
            lines.append(
                f"answer {inline(row['target'])}: rank {LENS_VALUES['rank'].written(rank)}, "
                f"{LENS_VALUES['prob'].written(share)}"
            )
        chances = (LENS_VALUES["prob"].written(float(p)) for p in row["top_probs"])
        lines += [
            f"{place}. {inline(token)} {chance}"
            for place, (token, chance) in enumerate(zip(top, chances, strict=True), start=1)
        ]
        label = short(visible(top[0]), labels) if top and labels >= 3 else ""
        cells[layer, position] = drawing.Cell(z, lines, label)
    ends = {float(row["layer"]): str(row["stream"]) for _, row in shown.iterrows()}
    names = [_layer_tick(layer, ends[layer]) for layer in layers]
    # Those of the bare embeddings are so low that they would dominate the scale.
    scaled = rows[rows["layer"] > 0] if facts.is_logprob and layers[-1] > 0 else rows
    held = [facts.coloured(v) for v in as_floats(scaled[value])]
    shifted = [cell.z for cell in cells.values()]
    how = "/" if facts.is_rank else "−"
    heading = graft if minus is None else f"{graft} {how} {minus}"
    if not pd.isna(shown["target"].iloc[0]):
        heading += f": answer {inline(shown['target'].iloc[0])}"
    return drawing.heatmap(
        cells,
        across=(list(positions), list(positions.values())),
        down=(layers, names),
        scale=scale(facts, held if minus is None else shifted, signed=minus is not None),
        heading=heading,
        titles=("token", "layers that have run"),
        look=look,
        row=22 if len(layers) <= 40 else 16,
    )


def answer_by_layer(
    table: pd.DataFrame,
    value: str = "rank",
    *,
    at: int = -1,
    prompts: Sequence[int] | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """`value` after each layer at one position, a line for each run: where does the answer appear?

    Over several prompts a line is the median, and its band goes from the lower to the upper
    quartile. Ranks are on a log axis with 1 at the top.

    Args:
        table: of `lens.logit_lens`.
        value: as in `lens_heatmap`.
        at: a position of the prompt; below zero it counts back from the last one that the table
            has of each prompt.
        prompts: their numbers; by default all that have the value.

    Raises:
        ValueError: an unknown value, prompt or position, or no prompt with that value.
    """
    facts = known(LENS_VALUES, value).within(table)
    check_columns(table, "logit_lens", "prompt", "graft", "layer", "position", value)
    have = prompts_of(table)
    for number in prompts or ():
        if number not in have:
            raise ValueError(f"the table has no prompt {number!r}; it has {listed(have)}")
    chosen = have if prompts is None else list(dict.fromkeys(prompts))
    rows = pd.concat([at_position(table[table["prompt"] == number], at) for number in chosen])
    rows = rows.assign(**{value: as_floats(rows[value])})
    kept = rows[rows[value].notna()]
    refuse_doubled(kept, ["prompt", "graft", "layer"])
    count = kept["prompt"].nunique()
    if count == 0:
        raise ValueError(
            f"none of the prompts {listed(chosen)} has an answer, so there is no {value!r}: show "
            "'entropy', 'kl_base' or 'kl_full', or give the prompts answers"
        )
    figure = go.Figure()
    names = grafts_of(kept)
    lines, entries = theme.graft_lines(names), shortened(names)
    found: dict[str, pd.DataFrame] = {}
    for name in names:
        groups = kept[kept["graft"].astype(str) == name].groupby("layer", sort=True)[value]
        found[name] = pd.DataFrame({share: groups.quantile(share) for share in (0.25, 0.5, 0.75)})
    if count > 1:
        # All bands lie below all lines, the fainter the more there are.
        for name, ends in found.items():
            add_band(
                figure,
                ends.index.astype(float).tolist(),
                ends[0.25].tolist(),
                ends[0.75].tolist(),
                lines[name].color,
                opacity=min(0.16, 0.45 / len(names)),
                legendgroup=escaped(name),
                name=f"{escaped(name)}: quartiles",
            )
    for name, ends in found.items():
        line, label = lines[name], drawing.wrapped(name, 48)
        hover = []
        for layer, low, middle, high in ends.itertuples():
            said = facts.written(middle)
            if count > 1:
                said = f"median {said} [{facts.written(low)}, {facts.written(high)}]"
            hover.append(f"{label}<br>{_layer(float(layer))}<br>{escaped(facts.label)}: {said}")
        add_line(
            figure,
            [float(layer) for layer in ends.index],
            ends[0.5].tolist(),
            line,
            size=6,
            name=escaped(entries[name]),
            legendgroup=escaped(name),
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(**theme.layout(look), **drawing.legend_above(names, 430))
    last = float(kept["layer"].max())
    figure.update_xaxes(
        title_text=f"layers that have run (0: embeddings, {last:g}: output)",
        zeroline=False,
        dtick=1 if last <= 12 else None,
    )
    said = drawing.wrapped(facts.title, 32)
    if count > 1:
        said += f"<br>median of {count} prompts, band: quartiles"
    missing = len(chosen) - count
    if missing:
        said += f"<br>{missing} without an answer left out"
    figure.update_yaxes(title_text=said)
    if facts.is_rank:
        # A decade at least, so that the axis has two numbers.
        most = max(math.log10(float(kept[value].max())), 1.0)
        room = 0.05 * most
        figure.update_yaxes(type="log", range=[most + room, -room], dtick=1, tickformat=",d")
    figure.update_yaxes(**facts.ticks())
    return figure


def kl_divergence_lines(
    table: pd.DataFrame,
    *,
    values: Sequence[str] = ("kl_base", "kl_full"),
    prompt: int | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How far each run is from PRE and from SFT at each token of a prompt: a panel for each value.

    Args:
        table: of `lens.kl_divergence`.
        values: its columns; by default from PRE (where does a graft change what is predicted?) and
            from SFT (where is it still not the finetuned model?).
        prompt: its number, where the table has several.

    Raises:
        ValueError: an unknown value or prompt.
    """
    panels = list(dict.fromkeys(values))
    shown = [known(DIVERGENCES, name).within(table) for name in panels]
    if not panels:
        raise ValueError(f"values is empty; name one or more of {listed(DIVERGENCES)}")
    check_columns(table, "kl_divergence", "prompt", "graft", "position", "token", *panels)
    rows = of_prompt(table, prompt)
    names = grafts_of(rows)
    refuse_doubled(rows, ["graft", "position"])
    positions = tokens_of(rows)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06 / len(panels),
    )
    lines, entries = theme.graft_lines(names), shortened(names)
    panel_names = shortened(names, 20)
    labelled: set[str] = set()
    for number, facts in enumerate(shown, start=1):
        # The runs that all others are compared with come first in the table.
        place = 0 if metrics.measure(facts.name).references == ("base",) else 1
        other = names[min(place, len(names) - 1)]
        for name in names:
            found = rows[rows["graft"].astype(str) == name].sort_values("position")
            if name == other:
                continue
            line, nats = lines[name], as_floats(found[facts.name])
            label = Quantity.of(facts.name, base=other, full=other).label
            hover = [
                drawing.wrapped(f"{name}, {inline(token)} at {int(position)}", 70)
                + "<br>"
                + drawing.wrapped(f"{label}: {far:.3g} {facts.unit}", 70)
                for token, position, far in zip(
                    found["token"], found["position"], nats, strict=True
                )
            ]
            add_line(
                figure,
                [list(positions).index(int(position)) for position in found["position"]],
                nats,
                line,
                size=7,
                name=escaped(entries[name]),
                legendgroup=name,
                showlegend=name not in labelled,
                legendrank=names.index(name) + 1,
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
                row=number,
                col=1,
            )
            labelled.add(name)
        short_name = panel_names[other]
        shown_as = Quantity.of(facts.name, base=short_name, full=short_name)
        figure.update_yaxes(
            title_text=drawing.wrapped(shown_as.label, 24)
            + f"<br>{drawing.wrapped(f'({facts.unit})', 28)}",
            rangemode="tozero",
            row=number,
        )
    layout = theme.layout(look)
    figure.update_layout(**layout, **drawing.legend_above(names, 110 + 250 * len(panels)))
    figure.update_yaxes(layout["yaxis"])
    figure.update_xaxes(layout["xaxis"])
    figure.update_xaxes(**drawing.ticks(list(positions.values())), zeroline=False)
    figure.update_xaxes(title_text="token", row=len(panels))
    return figure


def _lookup(rows: pd.DataFrame, value: str) -> dict[tuple[float, int], float]:
    places = zip(rows["layer"], rows["position"], strict=True)
    keys = [(float(layer), int(position)) for layer, position in places]
    return dict(zip(keys, as_floats(rows[value]), strict=True))


def _layer(layer: float) -> str:
    """Where in a run, when `layer` layers have run."""
    if layer == 0:
        return "embeddings"
    whole = f"after {math.floor(layer)} layer{'s' if layer >= 2 else ''}"
    if layer == 0.5:
        return "after the first attention"
    return whole if layer == math.floor(layer) else f"{whole} and the next attention"


def _layer_tick(layer: float, stream: str) -> str:
    if layer == 0:
        return "embeddings"
    return "output" if stream == "final_post" else f"{layer:g}"
