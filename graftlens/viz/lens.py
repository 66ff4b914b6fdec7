"""Plots of what `graftlens.lens` finds inside a run: a table in, a figure out.

Layers go up, the embeddings at the bottom. A scale is the same for every run that a table holds, so
that two figures of one table can be compared by eye; where two runs are subtracted it is symmetric
around 0.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graftlens.viz import text, theme

#: Pixels: about how wide the inside of a figure is, and a character of a cell's label.
_INSIDE, _CHARACTER = 780, 6.4

#: White space and what stands for it, so that a token can be seen.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽"})


@dataclass(frozen=True)
class _Value:
    """How a column is named, written and coloured.

    `kind`: `share` is written in percent on a scale from 0 to 1; `rank` on a log scale, darkest at
    1; `fall` (log-probability) goes up to 0; `likeness` (cosine) is darkest where it is least; all
    else starts at 0.
    """

    label: str
    unit: str
    kind: Literal["plain", "share", "rank", "fall", "likeness"] = "plain"
    of_answer: bool = False

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"

    def coloured(self, value: float) -> float:
        return math.log10(value) if self.kind == "rank" else value

    def written(self, value: float) -> str:
        if math.isnan(value):
            return "no value"
        if self.kind == "share":
            return f"{100 * value:.3g}%"
        if self.kind == "rank":
            return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


LENS_VALUES: Mapping[str, _Value] = {
    "logprob": _Value("log-probability of the answer", "nats", "fall", True),
    "prob": _Value("probability of the answer", "%", "share", True),
    "rank": _Value("rank of the answer", "1 = most likely", "rank", True),
    "entropy": _Value("entropy of the next token", "nats"),
    "kl_base": _Value("KL(run ‖ PRE)", "nats"),
    "kl_full": _Value("KL(run ‖ SFT)", "nats"),
}
WEIGHT_VALUES: Mapping[str, _Value] = {
    "relative_frobenius": _Value("Frobenius norm of the difference", "1 = norm of the base"),
    "frobenius": _Value("Frobenius norm of the difference", "units of the weights"),
    "relative_spectral": _Value("spectral norm of the difference", "1 = norm of the base"),
    "spectral": _Value("spectral norm of the difference", "units of the weights"),
    "effective_rank": _Value("effective rank of the difference", "dimensions"),
    "stable_rank": _Value("stable rank of the difference", "dimensions"),
    "share_changed": _Value("entries that changed", "%", "share"),
}
ACTIVATION_VALUES: Mapping[str, _Value] = {
    "relative_base": _Value("distance to PRE", "1 = norm under PRE"),
    "relative_full": _Value("distance to SFT", "1 = norm under SFT"),
    "distance_base": _Value("distance to PRE", "units of the activation"),
    "distance_full": _Value("distance to SFT", "units of the activation"),
    "cosine_base": _Value("cosine with PRE", "1 = same direction", "likeness"),
    "cosine_full": _Value("cosine with SFT", "1 = same direction", "likeness"),
    "norm": _Value("norm of the activation", "units of the activation"),
}
PATTERN_VALUES: Mapping[str, _Value] = {
    "distance_base": _Value("attention moved from PRE's", "%, total variation", "share"),
    "distance_full": _Value("attention moved from SFT's", "%, total variation", "share"),
}
_LOGIT = _Value("contribution to the answer's logit", "logits")


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
    facts = _facts(LENS_VALUES, value)
    _check_columns(table, "logit_lens", "prompt", "graft", "layer", "position", "token", value)
    rows = _of_prompt(table, prompt)
    key = ["layer", "position"]
    shown = _of_run(rows, graft, key)
    other = None if minus is None else _of_run(rows, minus, key)
    if facts.of_answer and shown[value].isna().all():
        without = [name for name, about in LENS_VALUES.items() if not about.of_answer]
        raise ValueError(
            f"prompt {shown['prompt'].iloc[0]} has no answer, so it has no {value!r}. Show "
            f"{_listed(without)}, or give the prompt an answer"
        )
    layers = sorted({float(layer) for layer in shown["layer"]})
    positions = _tokens(shown)
    labels = int(_INSIDE / len(positions) / _CHARACTER) - 1
    found = {(float(row["layer"]), int(row["position"])): row for _, row in shown.iterrows()}
    below = {} if other is None else _lookup(other, value)
    cells: dict[tuple[float, int], _Cell] = {}
    for (layer, position), row in found.items():
        number = _number(row[value])
        z = facts.coloured(number)
        said = f"{facts.label}: {facts.written(number)}"
        if minus is not None:
            without_it = below.get((layer, position), math.nan)
            z -= facts.coloured(without_it)
            said += f" ({minus}: {facts.written(without_it)})"
        top = [str(token) for token in row["top_tokens"]]
        lines = [f"{_layer(layer)}, {shown_token(row['token'])} at {position}", said]
        if not pd.isna(row["target"]) and value not in ("rank", "prob"):
            rank, share = (_number(row[name]) for name in ("rank", "prob"))
            lines.append(
                f"answer {shown_token(row['target'])}: rank {LENS_VALUES['rank'].written(rank)}, "
                f"{LENS_VALUES['prob'].written(share)}"
            )
        chances = (LENS_VALUES["prob"].written(float(p)) for p in row["top_probs"])
        lines += [
            f"{place}. {shown_token(token)} {chance}"
            for place, (token, chance) in enumerate(zip(top, chances, strict=True), start=1)
        ]
        label = _short(shown_token(top[0]), labels) if top and labels >= 3 else ""
        cells[layer, position] = _Cell(z, lines, label)
    ends = {float(row["layer"]): str(row["stream"]) for _, row in shown.iterrows()}
    names = [_layer_tick(layer, ends[layer]) for layer in layers]
    # Those of the embeddings themselves are so low that they would take the whole scale.
    scaled = rows[rows["layer"] > 0] if facts.kind == "fall" and layers[-1] > 0 else rows
    held = [facts.coloured(v) for v in _numbers(scaled[value])]
    heading = _runs_named(graft, minus)
    if not pd.isna(shown["target"].iloc[0]):
        heading += f": answer {shown_token(shown['target'].iloc[0])}"
    return _grid(
        cells,
        across=(list(positions), list(positions.values())),
        down=(layers, names),
        scale=_scale(facts, held, [cell.z for cell in cells.values()], minus is not None),
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
    """`value` after each layer at one position, a line for each run: where does the answer come up?

    Over several prompts a line is the median, and its band goes from the lower to the upper
    quartile. Ranks are on a log axis with 1 at the top.

    Args:
        table: of `lens.logit_lens`.
        value: as in `lens_heatmap`.
        at: a position of the prompt; below zero it counts back from the last one that the table
            has of each prompt.
        prompts: their numbers; left out, all that have the value.

    Raises:
        ValueError: an unknown value, prompt or position, or no prompt with that value.
    """
    facts = _facts(LENS_VALUES, value)
    _check_columns(table, "logit_lens", "prompt", "graft", "layer", "position", value)
    have = _prompts(table)
    for number in prompts or ():
        if number not in have:
            raise ValueError(f"the table has no prompt {number!r}; it has {_listed(have)}")
    chosen = have if prompts is None else list(dict.fromkeys(prompts))
    rows = pd.concat([_at(table[table["prompt"] == number], at) for number in chosen])
    rows = rows.assign(**{value: _numbers(rows[value])})
    kept = rows[rows[value].notna()]
    _refuse_doubled(kept, ["prompt", "graft", "layer"])
    count = kept["prompt"].nunique()
    if count == 0:
        raise ValueError(
            f"none of the prompts {_listed(chosen)} has an answer, so there is no {value!r}: show "
            "'entropy', 'kl_base' or 'kl_full', or give the prompts answers"
        )
    figure = go.Figure()
    names = _grafts(kept)
    lines = theme.graft_lines(names)
    found: dict[str, pd.DataFrame] = {}
    for name in names:
        groups = kept[kept["graft"].astype(str) == name].groupby("layer", sort=True)[value]
        found[name] = pd.DataFrame({share: groups.quantile(share) for share in (0.25, 0.5, 0.75)})
    if count > 1:
        # All bands lie below all lines, the fainter the more there are.
        for name, ends in found.items():
            figure.add_scatter(
                x=[*map(float, ends.index), *map(float, ends.index[::-1])],
                y=[*ends[0.75], *ends[0.25][::-1]],
                fill="toself",
                fillcolor=lines[name].color,
                opacity=min(0.16, 0.45 / len(names)),
                mode="lines",
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=_escaped(name),
                name=f"{_escaped(name)}: quartiles",
            )
    for name, ends in found.items():
        line, label = lines[name], _escaped(name)
        hover = []
        for layer, low, middle, high in ends.itertuples():
            said = facts.written(middle)
            if count > 1:
                said = f"median {said} [{facts.written(low)}, {facts.written(high)}]"
            hover.append(f"{label}<br>{_layer(float(layer))}<br>{_escaped(facts.label)}: {said}")
        figure.add_scatter(
            x=[float(layer) for layer in ends.index],
            y=ends[0.5].tolist(),
            name=label,
            legendgroup=label,
            mode="lines+markers",
            line={"color": line.color, "dash": line.dash, "width": 2},
            marker={"symbol": line.marker, "size": 6},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    _dress_lines(figure, look, names)
    last = float(kept["layer"].max())
    figure.update_xaxes(
        title_text=f"layers that have run (0: embeddings, {last:g}: output)", zeroline=False
    )
    said = facts.title
    if count > 1:
        said += f"<br>median of {count} prompts, band: quartiles"
    missing = len(chosen) - count
    if missing:
        said += f"<br>{missing} without an answer left out"
    figure.update_yaxes(title_text=said)
    if facts.kind == "rank":
        most = math.log10(float(kept[value].max()))
        room = max(0.05 * most, 0.05)
        figure.update_yaxes(type="log", range=[most + room, -room], dtick=1, tickformat=",d")
    elif facts.kind == "share":
        figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    return figure


def attribution_heatmap(
    table: pd.DataFrame,
    graft: str,
    *,
    minus: str | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """What each head (or attention and MLP) of each layer adds to the answer's logit, directly.

    Of `lens.attribution(by="head")` it shows layer (up) × head (across), of `by="component"`
    layer × (attn, mlp), of `by="source"` layer × the token that attention moved it from; the other
    parts are in `attribution_bars`. With several prompts a cell is their mean. `minus` names
    another run whose contributions are taken from the first one's.

    Raises:
        ValueError: an unknown run, a table of whole layers, one with several positions of a prompt
            or with source positions of several prompts, or one without contributions.
    """
    _check_columns(table, "attribution", "prompt", "graft", "part", "layer", "contribution")
    parts = list(dict.fromkeys(table["part"].astype(str)))
    kinds = {"head": "head", "source": "source_position", "attn": "part"}
    kind = next((part for part in kinds if part in parts), None)
    if kind is None:
        raise ValueError(
            f"the table has the parts {_listed(parts)}: attribution_heatmap needs attribution(by="
            '"head"), "component" or "source"; attribution_bars shows every kind'
        )
    column = kinds[kind]
    chosen = table[table["part"].isin(["attn", "mlp"] if kind == "attn" else [kind])]
    _check_one_position(chosen)
    _check_sources(chosen)
    key = ["layer", column]
    means: dict[str, "pd.Series[float]"] = {}
    for name in dict.fromkeys((graft, *([minus] if minus is not None else []), *_grafts(chosen))):
        means[name], count = _mean_contribution(_of_run(chosen, name, ["prompt", *key]), key)
    used = means[graft] if minus is None else means[graft] - means[minus]
    names = {value: str(value) for value in dict.fromkeys(chosen[column])}
    if kind == "source":
        names = _tokens(chosen.assign(position=chosen[column], token=chosen["source_token"]))
    columns = list(names) if kind == "attn" else sorted(names)
    cells: dict[tuple[Any, Any], _Cell] = {}
    for (layer, part), z in used.items():
        named = {"head": f"head {part}", "source": f"from {names[part]} at {part}"}
        said = [f"layer {layer}, {named.get(kind, part)}", f"{_LOGIT.label}: {_LOGIT.written(z)}"]
        if minus is not None:
            ends = (f"{name} {_LOGIT.written(means[name][layer, part])}" for name in (graft, minus))
            said.append(", ".join(ends))
        cells[layer, part] = _Cell(z, [*said, *_mean_said(count)])
    layers = sorted({layer for layer, _ in cells})
    held = used if minus is not None else pd.concat(means.values())
    about = f"{_runs_named(graft, minus)}: direct contribution to the logit of {_answer(table)}"
    return _grid(
        cells,
        across=(columns, [names[value] for value in columns]),
        down=(layers, list(map(str, layers))),
        scale=_scale(_LOGIT, [], held.tolist(), True),
        heading=", ".join([about, *_mean_said(count)]),
        titles=({"head": "head", "source": "token attended to"}.get(kind, "part"), "layer"),
        look=look,
    )


def attribution_bars(
    table: pd.DataFrame,
    *,
    top: int = 15,
    grafts: Sequence[str] | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """The largest direct contributions to the answer's logit, a bar for each run.

    The `top` parts are those whose contribution is largest, with either sign, in any of the runs;
    the bar below them is all others together, so that a run's bars add up to its logit. With
    several prompts a bar is the mean over them. Of `attribution(by="source")` the layers are added
    up: what attention moved here from each position, and what the MLPs wrote.

    Raises:
        ValueError: an unknown run, a table with several positions of a prompt or with source
            positions of several prompts, or one without contributions.
    """
    _check_columns(table, "attribution", "prompt", "graft", "part", "layer", "contribution")
    if top < 1:
        raise ValueError(f"top={top} shows no part; give 1 or more")
    _check_one_position(table)
    sources = _check_sources(table)
    names = list(dict.fromkeys(grafts)) if grafts is not None else _grafts(table)
    key = ["part", *(c for c in ("layer", "head", "source_position") if c in table)]
    numbers = table.groupby(key, sort=False, dropna=False).ngroup()
    distinct = table[~numbers.duplicated()]
    labels = [_part(row, sources) for _, row in distinct.iterrows()]
    labelled = table.assign(label=numbers.map(dict(enumerate(labels))))
    means: dict[str, "pd.Series[float]"] = {}
    for name in names:
        rows = _of_run(labelled, name, ["prompt", *key])
        means[name], count = _mean_contribution(rows, ["label"])
    frame = pd.DataFrame(means)
    largest = frame.abs().max(axis=1).sort_values(ascending=False, kind="stable").index
    shown, rest = list(largest[:top]), list(largest[top:])
    bars = [*shown, *([f"the other {len(rest)} parts"] if rest else [])]
    figure = go.Figure()
    for name, fill in theme.graft_fills(names).items():
        values = [float(frame.loc[part, name]) for part in shown]
        values += [float(frame.loc[rest, name].sum())] if rest else []
        figure.add_bar(
            name=_escaped(name),
            orientation="h",
            x=values,
            y=[_escaped(part) for part in bars],
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
            customdata=[_LOGIT.written(value) for value in values],
            hovertemplate=f"{_escaped(name)}<br>%{{y}}: %{{customdata}}<extra></extra>",
        )
    _dress_lines(figure, look, names)
    figure.update_layout(
        barmode="group",
        bargap=0.3,
        bargroupgap=0.05,
        height=130 + len(bars) * max(22, 11 * len(names) + 6),
    )
    said = ", ".join([f"direct contribution to the logit of {_answer(table)}", *_mean_said(count)])
    figure.update_xaxes(title_text=_escaped(f"{said} (logits)"))
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=[_escaped(part) for part in bars],
        # The largest at the top.
        range=[len(bars) - 0.5, -0.5],
        dtick=1,
        showgrid=False,
        tickfont_size=12,
        ticksuffix=" ",
    )
    return figure


def weight_heatmap(
    table: pd.DataFrame,
    value: str = "relative_frobenius",
    *,
    part: Literal["weight", "bias"] = "weight",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How much finetuning changed each component (down) of each layer (across).

    Components outside the layers, such as `embed`, are in a last column of their own.

    Args:
        table: of `lens.weight_difference`, for one pair of sources.
        value: `relative_frobenius`, `frobenius`, `relative_spectral`, `spectral`,
            `effective_rank`, `stable_rank` or `share_changed`.
        part: the weights or the biases.

    Raises:
        ValueError: an unknown value or part, or rows of several pairs of sources.
    """
    facts = _facts(WEIGHT_VALUES, value)
    _check_columns(
        table, "weight_difference", "component", "layer", "part", "source", "base", value
    )
    rows = table[table["part"] == part]
    if rows.empty:
        raise ValueError(
            f"the table has no part {part!r}; it has {_listed(dict.fromkeys(table['part']))}"
        )
    pairs = list(dict.fromkeys(zip(rows["source"], rows["base"], strict=True)))
    if len(pairs) > 1:
        named = ", ".join(f"{source} against {base}" for source, base in pairs)
        raise ValueError(f"the table has several pairs of sources ({named}); pass the rows of one")
    _refuse_doubled(rows, ["component", "layer"])
    cells: dict[tuple[Any, Any], _Cell] = {}
    others = [name for name in WEIGHT_VALUES if name in rows and name != value]
    for _, row in rows.iterrows():
        layer = _OUTSIDE if pd.isna(row["layer"]) else int(row["layer"])
        number = _number(row[value])
        where = str(row["component"]) + ("" if layer == _OUTSIDE else f" in layer {layer}")
        said = [f"{where}: {int(row['entries']):,} entries" if "entries" in rows else where]
        said += [
            f"{name.replace('_', ' ')}: {WEIGHT_VALUES[name].written(_number(row[name]))}"
            for name in (value, *others)
        ]
        cells[str(row["component"]), layer] = _Cell(number, said)
    columns = sorted({layer for _, layer in cells}, key=lambda layer: (layer == _OUTSIDE, layer))
    components = list(dict.fromkeys(component for component, _ in cells))[::-1]
    held = [cell.z for cell in cells.values()]
    (source, base) = pairs[0]
    outside = " (–: outside the layers)" if _OUTSIDE in columns else ""
    return _grid(
        cells,
        across=(columns, ["–" if c == _OUTSIDE else str(c) for c in columns]),
        down=(components, components),
        scale=_scale(facts, held, held, False),
        heading=f"{source} − {base}" + (", biases" if part == "bias" else ""),
        titles=(f"layer{outside}", ""),
        look=look,
    )


#: The column of what is outside the layers.
_OUTSIDE = -1


def difference_heatmap(
    table: pd.DataFrame,
    graft: str,
    value: str | None = None,
    *,
    prompt: int | None = None,
    at: int | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How far a run is from PRE or SFT inside: by layer (up) and by token or head (across).

    Activations without heads are shown token by token of one prompt; attention patterns and
    activations of heads by head, as the mean over positions (of all prompts unless `prompt` says
    which).

    Args:
        table: of `lens.activation_difference` (rows of one kind of hook) or
            `lens.pattern_difference`.
        value: of activations `relative_base` (the default), `relative_full`, `distance_base`,
            `distance_full`, `cosine_base`, `cosine_full` or `norm`; of patterns `distance_base`
            (the default) or `distance_full`.
        prompt: its number, where a table of activations without heads has several.
        at: a position; below zero it counts back from the last one that the table has of each
            prompt.

    Raises:
        ValueError: an unknown value, run, prompt or position, or activations of several hooks.
    """
    patterns = "hook" not in table
    values = PATTERN_VALUES if patterns else ACTIVATION_VALUES
    value = next(iter(values)) if value is None else value
    facts = _facts(values, value)
    made_by = "pattern_difference" if patterns else "activation_difference"
    needed = ("prompt", "graft", "layer", "head", "position", "token", value)
    _check_columns(table, made_by, *needed)
    inside = table[table["layer"].notna()]
    # `blocks.3.hook_mlp_out` is one of the hooks hook_mlp_out.
    named = ["attention pattern"] if patterns else table["hook"].astype(str)
    hooks = list(dict.fromkeys(name.rpartition(".")[2] for name in named))
    if len(hooks) > 1:
        raise ValueError(f"the table has the hooks {_listed(hooks)}; pass the rows of one of them")
    if inside.empty:
        raise ValueError(f"{hooks[0]!r} is outside the layers; give the rows of a hook inside them")
    heads = bool(inside["head"].notna().any())
    rows = inside if heads and prompt is None else _of_prompt(inside, prompt)
    if at is not None:
        rows = pd.concat([_at(rows[rows["prompt"] == n], at) for n in _prompts(rows)])
    rows = rows.assign(**{value: _numbers(rows[value])})
    key = ["layer", "head" if heads else "position"]
    means: dict[str, "pd.Series[float]"] = {}
    for name in dict.fromkeys((graft, *_grafts(rows))):
        found = _of_run(rows, name, ["prompt", "layer", "head", "position"])
        means[name] = found.groupby(key, sort=True)[value].mean()
    places = rows[["prompt", "position"]].drop_duplicates()
    count = len(_prompts(rows))
    over = f"mean of {len(places)} positions" + (f" of {count} prompts" if count > 1 else "")
    if len(places) == 1:
        over = f"{shown_token(rows['token'].iloc[0])} at {int(rows['position'].iloc[0])}"
    tokens = {} if heads else _tokens(rows)
    cells: dict[tuple[Any, Any], _Cell] = {}
    for (layer, column), number in means[graft].items():
        where = f"head {int(column)}" if heads else f"{tokens[int(column)]} at {int(column)}"
        said = [f"layer {int(layer)}, {where}", f"{facts.label}: {facts.written(number)}"]
        cells[int(layer), int(column)] = _Cell(number, [*said, over] if heads else said)
    layers, columns = (sorted({place[i] for place in cells}) for i in (0, 1))
    held = [number for found in means.values() for number in found]
    return _grid(
        cells,
        across=(columns, list(map(str, columns)) if heads else list(tokens.values())),
        down=(layers, list(map(str, layers))),
        # Most heads move little attention, so that the scale ends where the data do.
        scale=_scale(facts, held, [], False, whole=False),
        heading=f"{graft}: {hooks[0]}" + (f", {over}" if heads else ""),
        titles=("head" if heads else "token", "layer"),
        look=look,
    )


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
    _refuse_doubled(summary, ["graft"])
    rows = summary.assign(graft=summary["graft"].astype(str)).set_index("graft")
    names = [name for name in rows.index if name + _PATCHED in rows.index]
    if not names:
        raise ValueError(
            f"the summary has {_listed(rows.index)}, and no graft with its patch (FE and "
            f"'FE{_PATCHED}'): summarise the table of lens.patching"
        )
    columns = [metric, f"{metric}_low", f"{metric}_high"]
    points: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        x, y = (_numbers(rows.loc[which, columns]) for which in (name, name + _PATCHED))
        if not math.isnan(x[0] + y[0]):
            points[name] = (x, y)
    if not points:
        raise ValueError(
            f"none of {_listed(names)} has a value of {metric!r} both by grafting and by patching"
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
            text=[_escaped(name)],
            textposition=sides[name],
            textfont_size=12,
            name=_escaped(name),
            customdata=[f"{_escaped(name)}<br>grafting {said[0]}<br>patching {said[1]}"],
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
    figure.update_xaxes(title_text="<br>".join(map(_escaped, below)))
    figure.update_yaxes(title_text=_escaped(f"{facts.axis} by patching: it passes through here"))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(range=span, zeroline=True, tickformat=".0%" if facts.share else "")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


#: What `lens.patching` adds to a graft's name where it is a patch.
_PATCHED = " (patched)"


def divergence_lines(
    table: pd.DataFrame,
    *,
    against: Sequence[str] | None = None,
    prompt: int | None = None,
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """KL(run ‖ other) at each token of a prompt: a panel for each of `against`, a line a run.

    Args:
        table: of `lens.divergence`.
        against: the other runs; left out, the first two of the table, which are PRE (where does a
            graft change what is predicted?) and SFT (where is it still not the finetuned model?).
        prompt: its number, where the table has several.

    Raises:
        ValueError: an unknown run or prompt.
    """
    _check_columns(table, "divergence", "prompt", "position", "token", "p", "q", "kl")
    rows = _of_prompt(table, prompt)
    names = list(dict.fromkeys([*rows["p"].astype(str), *rows["q"].astype(str)]))
    panels = list(dict.fromkeys(names[:2] if against is None else against))
    for name in panels:
        if name not in set(rows["q"].astype(str)):
            raise ValueError(f"the table has no divergence from {name!r}; it has {_listed(names)}")
    if not panels:
        raise ValueError(f"against is empty; name one or more of {_listed(names)}")
    _refuse_doubled(rows, ["p", "q", "position"])
    positions = _tokens(rows)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06 / len(panels),
    )
    lines = theme.graft_lines(names)
    labelled: set[str] = set()
    for number, other in enumerate(panels, start=1):
        part = rows[rows["q"].astype(str) == other]
        for name in names:
            found = part[part["p"].astype(str) == name].sort_values("position")
            if name == other or found.empty:
                continue
            line, kl = lines[name], _numbers(found["kl"])
            hover = [
                f"{_escaped(shown_token(token))} at {int(position)}"
                f"<br>KL({_escaped(name)} ‖ {_escaped(other)}): {value:.3g} nats"
                for token, position, value in zip(
                    found["token"], found["position"], kl, strict=True
                )
            ]
            figure.add_scatter(
                x=[list(positions).index(int(position)) for position in found["position"]],
                y=kl,
                name=_escaped(name),
                legendgroup=name,
                showlegend=name not in labelled,
                legendrank=names.index(name) + 1,
                mode="lines+markers",
                line={"color": line.color, "dash": line.dash, "width": 2},
                marker={"symbol": line.marker, "size": 7},
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
                row=number,
                col=1,
            )
            labelled.add(name)
        figure.update_yaxes(
            title_text=f"KL(run ‖ {_escaped(other)})<br>(nats)", rangemode="tozero", row=number
        )
    _dress_lines(figure, look, names)
    figure.update_layout(height=110 + 250 * len(panels))
    figure.update_xaxes(**_ticks(list(positions.values())), zeroline=False)
    figure.update_xaxes(title_text="token", row=len(panels))
    return figure


def shown_token(token: object) -> str:
    """A token's text in one visible line: `·` a space, `↵` a line break, `→` a tab."""
    seen = str(token).translate(_VISIBLE)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in seen)


# --- tables ---------------------------------------------------------------------------------------


def _facts(values: Mapping[str, _Value], name: str) -> _Value:
    if name not in values:
        raise ValueError(f"unknown value {name!r}; choose from {_listed(values)}")
    return values[name]


def _check_columns(table: pd.DataFrame, made_by: str, *columns: str) -> None:
    for column in columns:
        if column not in table.columns:
            raise ValueError(
                f"the table has no column {column!r}; it has {_listed(table.columns)}. "
                f"Give the table of lens.{made_by}"
            )


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _grafts(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["graft"].astype(str)))


def _prompts(table: pd.DataFrame) -> list[int]:
    return [int(number) for number in dict.fromkeys(table["prompt"])]


def _of_prompt(table: pd.DataFrame, prompt: int | None) -> pd.DataFrame:
    have = _prompts(table)
    if prompt is None and len(have) != 1:
        raise ValueError(f"the table has the prompts {_listed(have)}; say which with prompt=…")
    if prompt is not None and prompt not in have:
        raise ValueError(f"the table has no prompt {prompt!r}; it has {_listed(have)}")
    return table[table["prompt"] == (have[0] if prompt is None else prompt)]


def _of_run(table: pd.DataFrame, graft: str, key: Sequence[str]) -> pd.DataFrame:
    """The rows of one run, which are one for each value of `key`."""
    rows = table[table["graft"].astype(str) == graft]
    if rows.empty:
        raise ValueError(f"the table has no graft {graft!r}; it has {_listed(_grafts(table))}")
    _refuse_doubled(rows, ["graft", *key])
    return rows


def _refuse_doubled(rows: pd.DataFrame, key: Sequence[str]) -> None:
    twice = rows[rows.duplicated(list(key), keep=False)]
    if len(twice):
        first = twice.iloc[0]
        where = ", ".join(f"{name} {first[name]}" for name in key if not pd.isna(first[name]))
        raise ValueError(
            f"the table has several rows for {where}: pass each once, and the rows of one group"
        )


def _check_one_position(table: pd.DataFrame) -> None:
    if "position" not in table:
        return
    several = table.groupby("prompt", sort=False)["position"].nunique()
    for prompt in several.index[several > 1]:
        have = sorted({int(p) for p in table.loc[table["prompt"] == prompt, "position"]})
        raise ValueError(
            f"the table has the positions {_listed(have)} of prompt {prompt}: pass the rows of one"
        )


def _check_sources(table: pd.DataFrame) -> bool:
    """Whether a table of attributions is by source position; then it must be of one prompt."""
    sources = bool((table["part"] == "source").any())
    if sources and table["prompt"].nunique() > 1:
        raise ValueError(
            f"the table has source positions of the prompts {_listed(_prompts(table))}, which do "
            "not line up: pass the rows of one prompt"
        )
    return sources


def _at(rows: pd.DataFrame, at: int) -> pd.DataFrame:
    """The rows of one prompt at one position."""
    have = sorted({int(position) for position in rows["position"]})
    if not (at in have or -len(have) <= at < 0):
        raise ValueError(
            f"at={at}: prompt {rows['prompt'].iloc[0]} has the positions {_listed(have)} in the "
            f"table. Name one of them, or count back from the last (-1 to {-len(have)})"
        )
    return rows[rows["position"] == (at if at >= 0 else have[at])]


def _tokens(rows: pd.DataFrame) -> dict[int, str]:
    """Position -> its token as it is shown, in order."""
    found = rows.drop_duplicates("position").sort_values("position")
    pairs = zip(found["position"], found["token"], strict=True)
    return {int(position): _short(shown_token(token), 14) for position, token in pairs}


def _lookup(rows: pd.DataFrame, value: str) -> dict[tuple[float, int], float]:
    places = zip(rows["layer"], rows["position"], strict=True)
    keys = [(float(layer), int(position)) for layer, position in places]
    return dict(zip(keys, _numbers(rows[value]), strict=True))


def _number(value: Any) -> float:
    return math.nan if pd.isna(value) else float(value)


def _numbers(column: Iterable[Any]) -> list[float]:
    return [_number(value) for value in column]


def _mean_contribution(rows: pd.DataFrame, key: Sequence[str]) -> "tuple[pd.Series[float], int]":
    """The mean over prompts, and of how many: those without an answer have no contributions."""
    held = rows.assign(contribution=_numbers(rows["contribution"]))
    held = held[held["contribution"].notna()]
    if held.empty:
        raise ValueError(
            f"no contribution is known of the prompts {_listed(_prompts(rows))}: give them answers"
        )
    count = int(held["prompt"].nunique())
    # A part that a shorter prompt lacks contributes nothing to it.
    return held.groupby(list(key), sort=False)["contribution"].sum() / count, count


def _mean_said(count: int) -> list[str]:
    return [f"mean of {count} prompts"] if count > 1 else []


def _answer(table: pd.DataFrame) -> str:
    """Whose logit a table of attributions is about."""
    targets, others = (
        list(dict.fromkeys(table[column].dropna())) if column in table else []
        for column in ("target", "against")
    )
    said = shown_token(targets[0]) if len(targets) == 1 else "the answer"
    minus = {"mean": "the mean logit", "distractors": "its distractors"}
    return " minus ".join([said, *(minus.get(str(o), shown_token(o)) for o in others)])


def _part(row: "pd.Series[Any]", whole: bool) -> str:
    """A part of an attribution in a few characters; `whole`: the layers are taken together."""
    part = str(row["part"]).replace("_", " ")
    if part == "source":
        return f"attention to {shown_token(row['source_token'])} at {int(row['source_position'])}"
    if pd.isna(row["layer"]):
        return part
    if whole:
        return f"{part}, all layers"
    layer = f"L{int(row['layer'])}"
    if part == "head":
        return f"{layer}H{int(row['head'])}"
    return layer if part == "layer" else f"{layer} {part}"


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    z: float
    said: Sequence[str]
    label: str = ""


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    colors: tuple[str, ...]
    title: str
    ticks: Mapping[str, object] = field(default_factory=dict)


def _scale(
    facts: _Value, held: Sequence[float], shown: Sequence[float], signed: bool, whole: bool = True
) -> _Scale:
    """The colours for `held` (all that share the scale), or for the differences in `shown`."""
    held = [v for v in (shown if signed else held) if math.isfinite(v)]
    low, high = min(held, default=0.0), max(held, default=0.0)
    ticks: dict[str, object] = {}
    if facts.kind == "share":
        ticks["tickformat"] = ".0%" if max(abs(low), abs(high)) > 0.05 or whole else ".1%"
    if signed:
        end = max(abs(low), abs(high)) or 1.0
        diverging, title = theme.DIVERGING, facts.title
        if facts.kind == "rank":
            # A lower rank is better, and what is better is red for every value.
            diverging, title = diverging[::-1], "ratio of the ranks (1 = equal)"
            powers = range(-math.floor(end), math.floor(end) + 1)
            ticks = {"tickvals": list(powers)}
            ticks["ticktext"] = [f"1/{10**-p:,}" if p < 0 else f"{10**p:,}" for p in powers]
        return _Scale(-end, end, diverging, title, ticks)
    colors: tuple[str, ...] = theme.SEQUENTIAL
    if facts.kind == "rank":
        high = high or 1.0
        powers = range(math.floor(high) + 1)
        ticks = {"tickvals": list(powers), "ticktext": [f"{10**p:,}" for p in powers]}
        return _Scale(0.0, high, colors[::-1], facts.title, ticks)
    if facts.kind == "fall":
        return _Scale(low or -1.0, 0.0, colors, facts.title)
    if facts.kind == "likeness":
        return _Scale(low if low < 1 else 0.0, 1.0, colors[::-1], facts.title)
    end = 1.0 if facts.kind == "share" and whole else high or 1.0
    return _Scale(0.0, end, colors, facts.title, ticks)


def _grid(
    cells: Mapping[tuple[Any, Any], _Cell],
    *,
    across: tuple[Sequence[Any], Sequence[str]],
    down: tuple[Sequence[Any], Sequence[str]],
    scale: _Scale,
    heading: str,
    titles: tuple[str, str],
    look: theme.Theme,
    row: int = 22,
) -> go.Figure:
    """A heat map of `cells` by (row, column). `across` and `down`: keys and what the axes call
    them; the first row is at the bottom. A cell without a number stays empty."""
    found = [[cells.get((y, x)) for x in across[0]] for y in down[0]]
    figure = go.Figure()
    labelled = any(cell.label for cell in cells.values())
    figure.add_heatmap(
        z=[[None if c is None or not math.isfinite(c.z) else c.z for c in line] for line in found],
        text=[["" if c is None else _escaped(c.label) for c in line] for line in found],
        texttemplate="%{text}" if labelled else None,
        textfont_size=10 if row >= 20 else 9,
        customdata=[
            ["not there" if c is None else "<br>".join(map(_escaped, c.said)) for c in line]
            for line in found
        ],
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=scale.low,
        zmax=scale.high,
        colorscale=theme.colorscale(scale.colors),
        colorbar={
            "title": {"side": "right", "font": {"size": 12}},
            "thickness": 14,
            "outlinewidth": 0,
            **scale.ticks,
        },
    )
    inner = max(190, row * len(down[0]))
    title = _escaped(scale.title)
    figure.data[0].colorbar.title.text = (
        title.replace(" (", "<br>(") if 7.5 * len(title) > inner else title
    )
    figure.update_layout(
        **theme.layout(look), height=inner + 116, margin={"l": 70, "r": 16, "t": 40, "b": 76}
    )
    axis = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(
        **axis, **_ticks(across[1]), range=[-0.5, len(across[0]) - 0.5], title_text=titles[0]
    )
    figure.update_yaxes(
        **axis,
        tickvals=list(range(len(down[0]))),
        ticktext=[_escaped(name) for name in down[1]],
        tickfont_size=11 if row >= 20 else 9,
        ticksuffix=" ",
        range=[-0.5, len(down[0]) - 0.5],
        title_text=titles[1],
    )
    figure.add_annotation(
        text=_escaped(heading),
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yref="paper",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
        font_size=13,
    )
    return figure


def _ticks(names: Sequence[str]) -> dict[str, object]:
    """Every name at its place 0, 1, …; tokens repeat, so that they are no categories."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [_escaped(name) for name in names],
        "tickfont_size": 11 if len(names) <= 40 else 8,
        "autotickangles": [0, -45, -90],
    }


def _dress_lines(figure: go.Figure, look: theme.Theme, names: Sequence[str]) -> None:
    """Layout of a chart with a legend above, which takes a row for about 120 characters."""
    rows = 1 + sum(len(name) + 8 for name in names) // 120
    figure.update_layout(
        **{k: v for k, v in theme.layout(look).items() if k not in ("xaxis", "yaxis")},
        height=430,
        margin={"l": 70, "r": 16, "t": 26 + 22 * rows, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        hovermode="closest",
        showlegend=True,
    )
    axis = theme.layout(look)["xaxis"]
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)


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


def _runs_named(graft: str, minus: str | None) -> str:
    return graft if minus is None else f"{graft} − {minus}"


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


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _escaped(words: str) -> str:
    """Text that plotly shows as it is: no markup, and no mathematics between dollar signs."""
    return html.escape(words, quote=False).replace("$", "&#36;")
