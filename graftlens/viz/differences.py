"""Plots of how far apart two models are: in their weights, and in what runs compute."""

from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

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
from graftlens.viz.quantities import Quantity, known, scale
from graftlens.viz.spelling import visible

_CHANGE = "norm of the difference"
_NORM, _WEIGHTS, _ACTIVATION = (
    "1 = norm of the base",
    "units of the weights",
    "units of the activation",
)
_COSINE, _SHARE = (-1.0, 1.0), (0.0, 1.0)


def _named(*quantities: Quantity) -> dict[str, Quantity]:
    return {quantity.name: quantity for quantity in quantities}


WEIGHT_VALUES = _named(
    Quantity("relative_frobenius", f"Frobenius {_CHANGE}", _NORM),
    Quantity("frobenius", f"Frobenius {_CHANGE}", _WEIGHTS),
    Quantity("relative_spectral", f"spectral {_CHANGE}", _NORM),
    Quantity("spectral", f"spectral {_CHANGE}", _WEIGHTS),
    Quantity("effective_rank", "effective rank of the difference", "dimensions"),
    Quantity("stable_rank", "stable rank of the difference", "dimensions"),
    Quantity("share_changed", "entries that changed", "%", bounds=_SHARE),
)
ACTIVATION_VALUES = _named(
    Quantity("relative_base", "distance to PRE", "1 = norm under PRE"),
    Quantity("relative_full", "distance to SFT", "1 = norm under SFT"),
    Quantity("distance_base", "distance to PRE", _ACTIVATION),
    Quantity("distance_full", "distance to SFT", _ACTIVATION),
    Quantity("cosine_base", "cosine with PRE", "1 = same direction", bounds=_COSINE),
    Quantity("cosine_full", "cosine with SFT", "1 = same direction", bounds=_COSINE),
    Quantity("norm", "norm of the activation", _ACTIVATION),
)
PATTERN_VALUES = _named(
    Quantity("distance_base", "attention moved from PRE's", "%, total variation", bounds=_SHARE),
    Quantity("distance_full", "attention moved from SFT's", "%, total variation", bounds=_SHARE),
)

#: The column of what is outside the layers.
_OUTSIDE = -1


def weight_heatmap(
    table: pd.DataFrame,
    value: str = "relative_frobenius",
    *,
    parameter: Literal["weight", "bias"] = "weight",
    look: theme.Theme = theme.LIGHT,
) -> go.Figure:
    """How much finetuning changed each component (down) of each layer (across).

    Components outside the layers, such as `embed`, are in a last column of their own.

    Args:
        table: of `lens.weight_difference`, for one pair of sources.
        value: `relative_frobenius`, `frobenius`, `relative_spectral`, `spectral`,
            `effective_rank`, `stable_rank` or `share_changed`.
        parameter: the weights or the biases.

    Raises:
        ValueError: an unknown value or parameter, or rows of several pairs of sources.
    """
    facts = known(WEIGHT_VALUES, value)
    check_columns(
        table, "weight_difference", "component", "layer", "parameter", "source", "base", value
    )
    rows = table[table["parameter"] == parameter]
    if rows.empty:
        raise ValueError(
            f"the table has no parameter {parameter!r}; it has "
            f"{listed(dict.fromkeys(table['parameter']))}"
        )
    pairs = list(dict.fromkeys(zip(rows["source"], rows["base"], strict=True)))
    if len(pairs) > 1:
        named = ", ".join(f"{source} against {base}" for source, base in pairs)
        raise ValueError(f"the table has several pairs of sources ({named}); pass the rows of one")
    refuse_doubled(rows, ["component", "layer"])
    cells: dict[tuple[Any, Any], drawing.Cell] = {}
    others = [name for name in WEIGHT_VALUES if name in rows and name != value]
    for _, row in rows.iterrows():
        layer = _OUTSIDE if pd.isna(row["layer"]) else int(row["layer"])
        number = as_float(row[value])
        where = str(row["component"]) + ("" if layer == _OUTSIDE else f" in layer {layer}")
        said = [f"{where}: {int(row['entries']):,} entries" if "entries" in rows else where]
        said += [
            f"{name.replace('_', ' ')}: {WEIGHT_VALUES[name].written(as_float(row[name]))}"
            for name in (value, *others)
        ]
        cells[str(row["component"]), layer] = drawing.Cell(number, said)
    columns = sorted({layer for _, layer in cells}, key=lambda layer: (layer == _OUTSIDE, layer))
    components = list(dict.fromkeys(component for component, _ in cells))[::-1]
    held = [cell.z for cell in cells.values()]
    (source, base) = pairs[0]
    outside = " (–: outside the layers)" if _OUTSIDE in columns else ""
    return drawing.heatmap(
        cells,
        across=(columns, ["–" if c == _OUTSIDE else str(c) for c in columns]),
        down=(components, components),
        scale=scale(facts, held),
        heading=f"{source} − {base}" + (", biases" if parameter == "bias" else ""),
        titles=(f"layer{outside}", ""),
        look=look,
    )


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
    facts = known(values, value)
    made_by = "pattern_difference" if patterns else "activation_difference"
    needed = ("prompt", "graft", "layer", "head", "position", "token", value)
    check_columns(table, made_by, *needed)
    inside = table[table["layer"].notna()]
    # `blocks.3.hook_mlp_out` is one of the hooks hook_mlp_out.
    named = ["attention pattern"] if patterns else table["hook"].astype(str)
    hooks = list(dict.fromkeys(name.rpartition(".")[2] for name in named))
    if len(hooks) > 1:
        raise ValueError(f"the table has the hooks {listed(hooks)}; pass the rows of one of them")
    if inside.empty:
        raise ValueError(f"{hooks[0]!r} is outside the layers; give the rows of a hook inside them")
    heads = bool(inside["head"].notna().any())
    rows = inside if heads and prompt is None else of_prompt(inside, prompt)
    if at is not None:
        rows = pd.concat([at_position(rows[rows["prompt"] == n], at) for n in prompts_of(rows)])
    rows = rows.assign(**{value: as_floats(rows[value])})
    key = ["layer", "head" if heads else "position"]
    means: dict[str, "pd.Series[float]"] = {}
    for name in dict.fromkeys((graft, *grafts_of(rows))):
        found = of_run(rows, name, ["prompt", "layer", "head", "position"])
        means[name] = found.groupby(key, sort=True)[value].mean()
    places = rows[["prompt", "position"]].drop_duplicates()
    count = len(prompts_of(rows))
    over = f"mean of {len(places)} positions" + (f" of {count} prompts" if count > 1 else "")
    if len(places) == 1:
        over = f"{visible(rows['token'].iloc[0])} at {int(rows['position'].iloc[0])}"
    tokens = {} if heads else tokens_of(rows)
    cells: dict[tuple[Any, Any], drawing.Cell] = {}
    for (layer, column), number in means[graft].items():
        where = f"head {int(column)}" if heads else f"{tokens[int(column)]} at {int(column)}"
        said = [f"layer {int(layer)}, {where}", f"{facts.label}: {facts.written(number)}"]
        cells[int(layer), int(column)] = drawing.Cell(number, [*said, over] if heads else said)
    layers, columns = (sorted({place[i] for place in cells}) for i in (0, 1))
    held = [number for found in means.values() for number in found]
    return drawing.heatmap(
        cells,
        across=(columns, list(map(str, columns)) if heads else list(tokens.values())),
        down=(layers, list(map(str, layers))),
        # Most heads move little attention, so that the scale ends where the data do.
        scale=scale(facts, held, whole=False),
        heading=f"{graft}: {hooks[0]}" + (f", {over}" if heads else ""),
        titles=("head" if heads else "token", "layer"),
        look=look,
    )
