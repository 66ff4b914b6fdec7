"""How finetuning changed the weights: one row per weight, without running anything."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.components import suggest
from graftlens.model.grafted import GraftedTransformer

_COLUMNS = (
    *("source", "base", "component", "layer", "parameter", "entries"),
    *("frobenius", "relative_frobenius", "spectral", "relative_spectral"),
    *("effective_rank", "stable_rank", "share_changed"),
)


@torch.no_grad()
def weight_difference(
    model: GraftedTransformer,
    source: str | None = None,
    base: str | None = None,
    *,
    spectra: bool = True,
    ranks: Sequence[int] = (),
) -> pd.DataFrame:
    """The difference ΔW between two sources, weight by weight.

    Args:
        model: the model.
        source: the changed source; needed if there are several besides the base.
        base: the source it is compared with; the model's base unless given.
        spectra: whether to compute what needs singular values (the slow part of large models);
            if not, those columns are NA.
        ranks: how much of each matrix's ΔW a source `{of: …, rank: r}` holds: a column
            `share_of_rank_r` for each r.

    Returns:
        One row per component, layer (NA outside the layers) and parameter (`weight`, `bias`):
        `entries`; `frobenius` ‖ΔW‖_F and `relative_frobenius` ‖ΔW‖_F / ‖W‖_F; `spectral`, the
        largest singular value of ΔW, and `relative_spectral`, the same divided by that of W;
        `effective_rank` of ΔW, the exponential of the entropy of its singular values as a
        distribution (Roy and Vetterli 2007); `stable_rank` ‖ΔW‖_F² / ‖ΔW‖₂²; and `share_changed`,
        the share of entries that differ. `share_of_rank_r` is σ₁² + … + σ_r² over the sum of all
        σ², which is the share of ‖ΔW‖_F² in the best rank-r part (Eckart and Young 1936); NA for
        vectors, 0 where ΔW is 0. Norms are those of the tensors as stored (Gemma's norm
        weights are w - 1). A ΔW of zeros has ranks of 0. With tied embeddings `embed`
        and `unembed` are two rows of one tensor. Of tables over the vocabulary, the rows that both
        sources have are compared.

    Raises:
        ValueError: a source that the model does not have, or several to choose from; ranks below 1,
            or without `spectra`.
    """
    base = model.sources[0] if base is None else base
    if source is None:
        if len(model.sources) != 2:
            raise ValueError(
                f"this model has the sources {' '.join(model.sources)}: say which one is "
                f"compared with {base}, such as source={model.sources[-1]!r}."
            )
        source = next(name for name in model.sources if name != base)
    for what, name in (("source", source), ("base", base)):
        if name not in model.sources:
            raise ValueError(
                f"{what}={name!r} is not a source of this model. Allowed: "
                f"{' '.join(model.sources)}.{suggest(str(name), model.sources)}"
            )
    if source == base:
        raise ValueError(f"source={source!r} is the base itself. Name another source or base.")
    for rank in ranks:
        if type(rank) is not int or rank < 1 or not spectra:
            what = "needs spectra=True" if spectra is False else "is not a rank: ranks count from 1"
            raise ValueError(f"ranks: {rank!r} {what}.")
    after, before = model.sources.index(source), model.sources.index(base)
    rows = []
    for component, layer in model.arch.sites:
        pair = zip(("weight", "bias"), model.weights_of(component, layer), strict=True)
        for parameter, tensors in pair:
            if tensors is None:
                continue
            about: dict[str, object] = {"source": source, "base": base}
            about |= {"component": str(component), "layer": layer, "parameter": parameter}
            old, new = tensors[before], tensors[after]
            if tensors.sizes:
                both = min(tensors.sizes[before], tensors.sizes[after])
                old, new = old[:both], new[:both]
            rows.append(about | _measured(old, new, spectra, ranks))
    table = pd.DataFrame(rows, columns=[*_COLUMNS, *map(_share, ranks)])
    return table.astype({"layer": "Int64"})


def _share(rank: int) -> str:
    return f"share_of_rank_{rank}"


def _measured(
    before: Tensor, after: Tensor, spectra: bool, ranks: Sequence[int]
) -> dict[str, float | int | None]:
    old, delta = before.double(), after.double() - before.double()
    frobenius, whole = float(delta.norm()), float(old.norm())
    found: dict[str, float | int | None] = {
        "entries": delta.numel(),
        "frobenius": frobenius,
        "relative_frobenius": _ratio(frobenius, whole),
        "share_changed": float((before != after).double().mean()),
    }
    if not spectra:
        return found
    values = _singular_values(delta)
    spectral = float(values.max())
    shares = values / values.sum() if spectral else values
    if delta.ndim == 2:
        squares = values.sort(descending=True).values.square()
        total = float(squares.sum())
        found |= {_share(rank): _ratio(float(squares[:rank].sum()), total) for rank in ranks}
    entropy = -torch.special.xlogy(shares, shares).sum()
    return found | {
        "spectral": spectral,
        "relative_spectral": _ratio(spectral, float(_singular_values(old).max())),
        "effective_rank": float(entropy.exp()) if spectral else 0.0,
        "stable_rank": _ratio(frobenius**2, spectral**2),
    }


def _ratio(a: float, b: float) -> float:
    """a / b, where 0 / 0 is 0."""
    return 0.0 if a == b == 0 else a / b if b else float("inf")


def _singular_values(w: Float[Tensor, "*shape"]) -> Float[Tensor, " rank"]:
    """From the smaller Gram matrix in float64: accurate to about 1e-8 of the largest."""
    if w.ndim == 1:
        return w.norm()[None]
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
