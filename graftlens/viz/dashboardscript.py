"""What the script of a dashboard's page is given: numbers, their scales and colours."""

import base64
from collections.abc import Iterable, Sequence

import numpy as np

from graftlens.viz import attention, theme
from graftlens.viz.dashboarddata import DashboardData, LensArrays
from graftlens.viz.spelling import isolated, visible

#: Attention is kept as 16-bit numbers: this stands for 1.
FULL = 65535

_MEASURES: dict[str, dict[str, object]] = {
    "logprob": {
        "title": "log-probability",
        "unit": "nats",
        "note": "Log-probability of each token given those before it. No colour: certain. The "
        "first token has none.",
    },
    "kl_base": {
        "title": "KL to PRE",
        "unit": "nats",
        "note": "KL(run ‖ PRE) of the distributions of what comes after each token.",
    },
    "kl_full": {
        "title": "KL to SFT",
        "unit": "nats",
        "note": "KL(run ‖ SFT) of the distributions of what comes after each token.",
    },
    "attribution": {
        "title": "attribution",
        "unit": "logits",
        "note": "What the attention of all layers moved from each position to the last one, as its "
        "direct contribution to the answer's logit.",
    },
}

_KINDS = {
    "logprob": "log-probability of the answer (nats)",
    "rank": "rank of the answer (logarithmic)",
    "top_prob": "probability of the most likely token",
    "kl_base": "KL to PRE at the same layer (nats)",
    "kl_full": "KL to SFT at the same layer (nats)",
    "diff_base": "log-probability of the answer, run − PRE (nats)",
    "diff_full": "log-probability of the answer, run − SFT (nats)",
}
_OF_ANSWER = ("logprob", "rank", "diff_base", "diff_full")


def measures(data: DashboardData) -> list[tuple[str, str, bool]]:
    """The measures that tokens can be coloured by, as a choice; is one out of the question?"""
    attributed = any(run.attribution is not None for run in data.runs.values())
    return [
        (name, str(fact["title"]), name == "attribution" and not attributed)
        for name, fact in _MEASURES.items()
    ]


def kinds(lens: LensArrays) -> list[tuple[str, str, bool]]:
    """The values that the logit lens can show, as a choice; those of the answer need one."""
    return [
        (name, title, lens.target is None and name in _OF_ANSWER) for name, title in _KINDS.items()
    ]


def facts(data: DashboardData, lens: LensArrays) -> dict[str, object]:
    """All that the page's script needs, save the attention patterns."""
    measures = {name: _measured(data, name) for name in _MEASURES}
    words: dict[str, int] = {}
    lenses = []
    for run in data.runs:
        k = lens.top_probs[run].shape[-1]
        shape = (*lens.numbers[run]["rank"].shape, k)
        ids = [words.setdefault(_token(t), len(words)) for ts in lens.top[run] for t in ts]
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
        "tokens": [_token(token) for token in data.tokens],
        "runs": list(data.runs),
        "measures": {
            name: _MEASURES[name] | _scale(values.values(), name == "attribution")
            for name, values in measures.items()
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
                name: {"title": title} | _lens_scale(lens, name) for name, title in _KINDS.items()
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


def _token(token: str) -> str:
    return isolated(visible(token))


def _measured(data: DashboardData, name: str) -> dict[str, np.ndarray]:
    """Run -> a measure at each position; without the runs that lack it."""
    if name == "logprob":
        return {run: np.asarray(given.token_logprobs) for run, given in data.runs.items()}
    if name == "attribution":
        return {
            run: np.asarray(given.attribution)
            for run, given in data.runs.items()
            if given.attribution is not None
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


def _scale(values: Iterable[np.ndarray], symmetric: bool) -> dict[str, float]:
    """The least and the greatest of all runs, with 0 between them or at an end."""
    known = [value[np.isfinite(value)] for value in map(np.asarray, values)]
    all_ = np.concatenate([*known, np.zeros(1)])
    low, high = float(all_.min()), float(all_.max())
    if symmetric:
        high = max(high, -low)
        low = -high
    return {"low": low, "high": high}


def _after_embeddings(values: Sequence[np.ndarray], symmetric: bool) -> dict[str, object]:
    """A scale over the layers' rows, and whether the embeddings' own row goes beyond it.

    Log-probabilities of the bare embeddings are so low that they would take the whole scale.
    """
    kept = [value[1:] if len(value) > 1 else value for value in values]
    scale, whole = _scale(kept, symmetric), _scale(values, symmetric)
    return {**scale, "beyond": whole != scale}


def _lens_scale(lens: LensArrays, name: str) -> dict[str, object]:
    if name == "top_prob":
        return {"low": 0.0, "high": 1.0, "kind": "sequential"}
    if name in ("diff_base", "diff_full"):
        # One scale for both differences, so that they can be compared.
        known = lens.numbers
        both = [known[a]["logprob"] - known[b]["logprob"] for a in known for b in ("PRE", "SFT")]
        return _after_embeddings(both, True) | {"kind": "diverging"}
    values = [numbers[name] for numbers in lens.numbers.values()]
    if name == "logprob":
        return _after_embeddings(values, False) | {"kind": "sequential"}
    if name == "rank":
        return {"low": 0.0, "high": _scale([np.log10(v) for v in values], False)["high"]} | {
            "kind": "rank"
        }
    if name in ("kl_base", "kl_full"):
        values = [numbers[kl] for numbers in lens.numbers.values() for kl in ("kl_base", "kl_full")]
    return _scale(values, False) | {"kind": "sequential"}


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
