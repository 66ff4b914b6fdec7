"""The data for the script of a dashboard's page: numbers, their scales and colours."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftlens.viz import attention, text, theme
from graftlens.viz.attribution import CONTRIBUTION
from graftlens.viz.dashboarddata import DashboardData, LensArrays
from graftlens.viz.quantities import Quantity, scale
from graftlens.viz.spelling import inline

#: Attention is kept as 16-bit numbers: this stands for 1.
FULL = 65535

_KL = {name: Quantity.of(name, base="PRE", full="SFT") for name in ("kl_base", "kl_full")}

#: What tokens can be coloured by, and what is said of it.
TOKENS: Mapping[str, tuple[Quantity, str]] = {
    "logprob": (
        Quantity.of("logprob"),
        "Log-probability of each token given those before it. No colour: certain. The first token "
        "has none.",
    ),
    "kl_base": (
        _KL["kl_base"],
        "Of the distributions of what comes after each token.",
    ),
    "kl_full": (
        _KL["kl_full"],
        "Of the distributions of what comes after each token.",
    ),
    "direct_logit_attribution": (
        CONTRIBUTION,
        "What the attention of all layers moved from each position to the last one, as its direct "
        "contribution to the answer's logit.",
    ),
}


@dataclass(frozen=True)
class Shown:
    """What the logit lens can show: `minus` names the run whose values are taken from it."""

    title: str
    quantity: Quantity
    minus: str | None = None


_LOGPROB, _RANK = Quantity.of("logprob"), Quantity.of("rank")
_TOP_PROB = Quantity("top_prob", "probability of the most likely token", "%", bounds=(0.0, 1.0))

LENS: Mapping[str, Shown] = {
    "logprob": Shown(_LOGPROB.title, _LOGPROB),
    "rank": Shown(f"{_RANK.label} (logarithmic)", _RANK),
    "top_prob": Shown(_TOP_PROB.label, _TOP_PROB),
    **{
        name: Shown(f"{quantity.label} at the same layer (nats)", quantity)
        for name, quantity in _KL.items()
    },
    **{
        name: Shown(f"{_LOGPROB.label}, run − {run} ({_LOGPROB.unit})", _LOGPROB, run)
        for name, run in (("diff_base", "PRE"), ("diff_full", "SFT"))
    },
}


def measures(data: DashboardData) -> list[tuple[str, str, bool]]:
    """What tokens can be coloured by, as a choice; some of it may not have been computed."""
    attributed = any(run.direct_logit_attribution is not None for run in data.runs.values())
    return [
        (
            name,
            quantity.short or quantity.label,
            name == "direct_logit_attribution" and not attributed,
        )
        for name, (quantity, _) in TOKENS.items()
    ]


def kinds(lens: LensArrays) -> list[tuple[str, str, bool]]:
    """What the logit lens can show, as a choice; values of the answer need one."""
    return [
        (name, shown.title, lens.target is None and shown.quantity.of_answer)
        for name, shown in LENS.items()
    ]


def facts(data: DashboardData, lens: LensArrays) -> dict[str, object]:
    """All that the page's script needs, save the attention patterns."""
    measures = {name: _measured(data, name) for name in TOKENS}
    common = text.common_note(data.kl_divergence)
    words: dict[str, int] = {}
    lenses = []
    for run in data.runs:
        k = lens.top_probs[run].shape[-1]
        shape = (*lens.numbers[run]["rank"].shape, k)
        ids = [words.setdefault(inline(t), len(words)) for ts in lens.top[run] for t in ts]
        lenses.append(
            {name: _short(values) for name, values in lens.numbers[run].items()}
            | {
                "rank": lens.numbers[run]["rank"].tolist(),
                "top": np.array(ids).reshape(shape).tolist(),
                "top_probs": _short(lens.top_probs[run]),
            }
        )
    _, heads, _, _ = np.shape(data.runs["PRE"].pattern)
    others = list(data.sources[1:])
    known = theme.source_colors(data.sources)
    return {
        "tokens": [inline(token) for token in data.tokens],
        "runs": list(data.runs),
        "measures": {
            name: {
                "title": quantity.short or quantity.label,
                "unit": quantity.unit,
                "note": f"{note} {common}".strip() if quantity.over_common else note,
            }
            | _ends(quantity, list(measures[name].values()), quantity.signed)
            for name, (quantity, note) in TOKENS.items()
        },
        "values": {
            name: [_short(values[run]) if run in values else None for run in data.runs]
            for name, values in measures.items()
        },
        "components": list(data.components),
        "sources": [{"name": s, "color": known[s]} for s in others],
        "shares": [
            [_short(np.asarray(run.shares[s])) if s in run.shares else None for s in others]
            for run in data.runs.values()
        ],
        "lens": {
            "layers": [lens.layer_name(layer) for layer in lens.layers],
            "reached": [lens.reached(layer) for layer in lens.layers],
            "words": list(words),
            "runs": lenses,
            "kinds": {
                name: {"title": shown.title} | _lens_scale(lens, name, shown)
                for name, shown in LENS.items()
            },
        },
        "heads": heads,
        "full": FULL,
        "colors": {
            "pattern": attention.PATTERN,
            "negative": attention.NEGATIVE,
            "positive": attention.POSITIVE,
            "sequential": theme.SEQUENTIAL,
            "diverging": theme.DIVERGING,
        },
    }


def _measured(data: DashboardData, name: str) -> dict[str, np.ndarray]:
    """Run -> a measure at each position; without the runs that lack it."""
    if name == "logprob":
        return {run: np.asarray(given.token_logprobs) for run, given in data.runs.items()}
    if name == "direct_logit_attribution":
        return {
            run: np.asarray(given.direct_logit_attribution)
            for run, given in data.runs.items()
            if given.direct_logit_attribution is not None
        }
    n = len(data.tokens)
    found = {}
    for run in data.runs:
        part = data.kl_divergence[data.kl_divergence["graft"] == run].sort_values("position")
        if part["position"].tolist() != list(range(n)):
            raise ValueError(
                f"the table of KL divergences has {len(part)} rows of run {run!r}; it must have "
                f"one for each of {n} positions"
            )
        found[run] = part[name].to_numpy(dtype=float)
    return found


def _ends(
    quantity: Quantity, values: Sequence[np.ndarray], signed: bool = False
) -> dict[str, object]:
    """The ends of the scale that all runs share."""
    held = [quantity.coloured(v) for value in values for v in value[np.isfinite(value)].tolist()]
    found = scale(quantity, held, signed=signed)
    return {"low": found.low, "high": found.high}


def _lens_scale(lens: LensArrays, name: str, shown: Shown) -> dict[str, object]:
    """The scale of a lens, its kind, and whether the embeddings' own row goes beyond it.

    Log-probabilities of the bare embeddings are so low that they would dominate the scale.
    """
    quantity, runs = shown.quantity, lens.numbers
    if shown.minus is not None:
        # One scale for both differences, so that they can be compared.
        pairs = [(a, b) for a in runs for b in ("PRE", "SFT")]
        values = [runs[a][quantity.name] - runs[b][quantity.name] for a, b in pairs]
        kind = "diverging"
    elif name == "top_prob":
        values, kind = [], "sequential"
    else:
        columns = ("kl_base", "kl_full") if name in ("kl_base", "kl_full") else (name,)
        values = [numbers[column] for numbers in runs.values() for column in columns]
        kind = "rank" if quantity.is_rank else "sequential"
    signed = shown.minus is not None
    whole = _ends(quantity, values, signed)
    if quantity is not _LOGPROB:
        return whole | {"kind": kind}
    kept = _ends(quantity, [value[1:] if len(value) > 1 else value for value in values], signed)
    return kept | {"beyond": kept != whole, "kind": kind}


def _short(values: np.ndarray) -> object:
    """Nested lists of five significant digits; what is not finite stays so."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values) & (np.abs(values) > 1e-12)
    size = np.floor(np.log10(np.abs(values), where=known, out=np.zeros_like(values)))
    unit = 10.0 ** (4 - size)
    # Dividing by a power of ten and not multiplying by its inverse: the shortest decimals.
    return np.where(
        known, np.round(values * unit) / unit, np.where(np.isnan(values), values, 0.0)
    ).tolist()


def packed(pattern: np.ndarray) -> str:
    """Base64 of [layer, head, lower triangle by rows] in little-endian 16-bit numbers."""
    rows, columns = np.tril_indices(pattern.shape[-1])
    lower = np.clip(np.asarray(pattern, dtype=np.float64)[:, :, rows, columns], 0, 1)
    return base64.b64encode(np.round(lower * FULL).astype("<u2").tobytes()).decode()
