"""How far a grafted run's activations and attention patterns are from PRE's and SFT's."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.graft import Graft, Grafts, Where
from graftlens.lens.runs import PAIRS, Places, Runs, hook_names, layer_of, look_into, tidy
from graftlens.model.grafted import GraftedTransformer, Input


@torch.no_grad()
def activation_difference(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts | None = None,
    *,
    hooks: str | Sequence[str] = "hook_resid_post",
    at: Where = "all",
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Each run's activations compared with those of PRE and of SFT, by layer and position.

    Args:
        model, prompts, grafts, at, full, prepend_bos: as in `logit_lens`.
        hooks: hook names, or last parts of names (`"hook_resid_post"`, `"hook_z"`) for every layer.

    Returns:
        One row per prompt, graft, hook, position (and head, where the activation has heads):
        `norm` (Euclidean), `distance_base` and `distance_full` (norm of the difference from PRE
        and from SFT), `relative_base` and `relative_full` (the same divided by the norm there),
        `cosine_base` and `cosine_full`.

    Raises:
        ValueError: a hook that does not exist, is turned off, or is over pairs of positions.
        PromptError: prompts that cannot be run, or without the positions `at`.
    """
    names = hook_names(model, hooks)
    for name in names:
        if name.endswith(PAIRS):
            raise ValueError(
                f"{name!r} is over pairs of positions. Use pattern_difference for attention."
            )
    runs = Runs.of(model.sources, grafts, full)
    tables = []
    batch = model.batch(prompts, prepend_bos=prepend_bos)
    for places, caches in look_into(model, batch, runs, names, at):
        for hook in names:
            taken = {n: places.pick(cache[hook]).double() for n, cache in caches.items()}
            base, full_run = taken[runs.base], taken[runs.full]
            for name, x in taken.items():
                about = {**runs.columns(name), "hook": hook, "layer": layer_of(hook)}
                tables.append(_distances(places, x, base, full_run).assign(**about))
    first = ("prompt", "graft", "rule", "hook", "layer", "head", "position", "token")
    return tidy(tables, first, whole=("layer", "head"))


@torch.no_grad()
def pattern_difference(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts | None = None,
    *,
    at: Where = "all",
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Each run's attention compared with that of PRE and of SFT, head by head and query by query.

    Args:
        model, prompts, grafts, full, prepend_bos: as in `logit_lens`.
        at: the positions that attend (queries).

    Returns:
        One row per prompt, graft, layer, head and position: `distance_base` and `distance_full`,
        the total variation distance between the two patterns of that query (half the sum of
        absolute differences: 0 if equal, 1 if disjoint).

    Raises:
        PromptError: prompts that cannot be run, or without the positions `at`.
    """
    runs = Runs.of(model.sources, grafts, full)
    names = hook_names(model, "hook_pattern")
    tables = []
    batch = model.batch(prompts, prepend_bos=prepend_bos)
    for places, caches in look_into(model, batch, runs, names, at):
        starts = np.array(places.batch.starts)[places.prompt]
        for hook in names:
            taken = {
                n: cache[hook][places.prompt, :, places.position + starts].double()
                for n, cache in caches.items()
            }
            for name, x in taken.items():
                heads = x.shape[1]
                about = {**runs.columns(name), "layer": layer_of(hook)}
                distances = {
                    f"distance_{what}": _numbers((x - taken[other]).abs().sum(-1) / 2)
                    for what, other in (("base", runs.base), ("full", runs.full))
                }
                table = _by_head(places, heads).assign(**about, **distances)
                tables.append(table)
    return tidy(tables, ("prompt", "graft", "rule", "layer", "head", "position", "token"))


def _distances(
    places: Places,
    x: Float[Tensor, "place *head width"],
    base: Float[Tensor, "place *head width"],
    full: Float[Tensor, "place *head width"],
) -> pd.DataFrame:
    about = places.table.assign(head=pd.NA) if x.ndim == 2 else _by_head(places, x.shape[1])
    columns = {"norm": _numbers(x.norm(dim=-1))}
    for what, y in (("base", base), ("full", full)):
        columns[f"distance_{what}"] = _numbers((x - y).norm(dim=-1))
        columns[f"relative_{what}"] = _numbers((x - y).norm(dim=-1) / y.norm(dim=-1))
        columns[f"cosine_{what}"] = _numbers(torch.cosine_similarity(x, y, dim=-1))
    return about.assign(**columns)


def _by_head(places: Places, heads: int) -> pd.DataFrame:
    """The places, once for each head."""
    repeated = places.table.loc[places.table.index.repeat(heads)]
    return repeated.assign(head=np.tile(np.arange(heads), len(places.rows)))


def _numbers(x: Float[Tensor, "place *head"]) -> np.ndarray:
    return x.flatten().cpu().numpy()
