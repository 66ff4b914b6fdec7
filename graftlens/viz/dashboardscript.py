"""The data for the script of a dashboard's page: numbers, their scales and colours."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from graftlens.viz import attention, text, theme
from graftlens.viz.attribution import CONTRIBUTION
from graftlens.viz.dashboarddata import DashboardData, LensArrays
from graftlens.viz.quantities import Quantity, scale
from graftlens.viz.spelling import inline

#: Attention is kept as 16-bit numbers, or as 8-bit ones to save room: this stands for 1.
FULL, COARSE = 65535, 255

#: Most characters of a page that attention takes, unless that of every head is asked for.
ROOM = 3_000_000

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


@dataclass(frozen=True)
class Apart:
    """How much attention differs between two runs.

    The differences of a head are total variations (half the sum of absolute differences, from 0 to
    1) of what a token attends to.
    """

    mean: np.ndarray
    """[layer, head]: their mean over the tokens that attend."""
    last: np.ndarray
    """[layer, head]: that of the last token."""
    most: float
    """The largest difference of one token's attention to another."""


def apart(data: DashboardData) -> dict[tuple[int, int], Apart]:
    """Numbers of two runs, the smaller first -> how much their attention differs."""
    patterns = [np.asarray(run.pattern) for run in data.runs.values()]
    found = {}
    for a, b in combinations(range(len(patterns)), 2):
        mean, last, most = [], [], 0.0
        # Layer by layer, because all of a long prompt's may not fit into memory once more.
        for one, other in zip(patterns[a], patterns[b], strict=True):
            difference = np.abs(np.tril(one) - np.tril(other))
            moved = difference.sum(-1) / 2
            mean.append(moved.mean(-1))
            last.append(moved[:, -1])
            most = max(most, float(difference.max()))
        found[a, b] = Apart(np.array(mean), np.array(last), most)
    return found


@dataclass(frozen=True)
class Kept:
    """The attention patterns that a page holds."""

    texts: Sequence[str]
    """Run by run, base64 of numbers [kept head, lower triangle by rows]: little-endian, with 8 bits
    compressed by zlib."""
    bits: int
    places: np.ndarray
    """[layer, head]: the number of the head among those that are kept, or -1."""
    note: str
    """What was left out; nothing if nothing was."""


def kept(data: DashboardData, differ: Mapping[tuple[int, int], Apart]) -> Kept:
    """Every head in 16 bits if that fits into `ROOM` or is asked for. Else 8 bits, compressed, and
    of the heads as many as fit, those first that differ most between any two runs."""
    patterns = [np.asarray(run.pattern) for run in data.runs.values()]
    layers, heads, n, _ = patterns[0].shape
    whole = len(patterns) * layers * heads * n * (n + 1) // 2 * 2 * 4 // 3
    places = np.arange(layers * heads).reshape(layers, heads)
    if data.complete or whole <= ROOM:
        return Kept([packed(pattern) for pattern in patterns], 16, places, "")
    # Heads to come first: the one that the page opens at, then by how much they differ.
    far = np.max([np.maximum(pair.mean, pair.last) for pair in differ.values()], axis=0)
    order = np.argsort(-far, axis=None, kind="stable").tolist()
    first = int(differ[0, 1].last.argmax())
    order = [first, *(head for head in order if head != first)]
    rows, columns = np.tril_indices(n)
    chosen: list[int] = []
    coarse: list[list[bytes]] = [[] for _ in patterns]
    used = 0
    for head in order:
        layer, number = divmod(head, heads)
        added = [
            np.round(np.clip(p[layer, number][rows, columns], 0, 1) * COARSE).astype(np.uint8)
            for p in patterns
        ]
        used += sum(len(zlib.compress(values.tobytes())) for values in added) * 4 // 3
        if chosen and used > ROOM:
            break
        chosen.append(head)
        for run, values in zip(coarse, added, strict=True):
            run.append(values.tobytes())
    found = np.full(layers * heads, -1)
    found[chosen] = np.arange(len(chosen))
    left = order[len(chosen) :]
    said = f"attention below {0.5 / COARSE:.1%} and what is finer than {1 / COARSE:.1%}"
    if left:
        most = float(far.reshape(-1)[left].max())
        said += (
            f"; and {len(left)} of {layers * heads} heads, those that differ least between the "
            f"runs (no token's attention by more than {most:.1%} on average, nor the last one's)"
        )
    return Kept(
        [base64.b64encode(zlib.compress(b"".join(run))).decode() for run in coarse],
        8,
        found.reshape(layers, heads),
        f"Left out to keep the page small: {said}. With --complete (in Python complete=True) "
        f"the page has everything, in about {whole / 1e6:.0f} MB.",
    )


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


def facts(
    data: DashboardData,
    lens: LensArrays,
    differ: Mapping[tuple[int, int], Apart],
    attention_kept: Kept,
) -> dict[str, object]:
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
        "attention": {
            "bits": attention_kept.bits,
            "full": FULL if attention_kept.bits == 16 else COARSE,
            "places": attention_kept.places.tolist(),
            "apart": {
                f"{a} {b}": {
                    "mean": _short(pair.mean),
                    "last": _short(pair.last),
                    "most": pair.most,
                }
                for (a, b), pair in differ.items()
            },
        },
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
