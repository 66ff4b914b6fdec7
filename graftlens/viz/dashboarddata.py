"""What a dashboard shows: one prompt under several runs, as arrays and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from graftlens.viz.lenstables import listed


@dataclass(frozen=True)
class Run:
    """What one run of the prompt gave; [pos] is one number per token of the prompt."""

    rule: str
    """The graft's text; "none" for the base."""
    pattern: np.ndarray
    """[layer, head, query, key]: attention, each row adding up to 1."""
    token_logprobs: np.ndarray
    """[pos]: log-probability of each token given those before it (nats); NaN for the first."""
    direct_logit_attribution: np.ndarray | None
    """[pos]: what attention moved from there to the answer's logit (logits), if it was computed."""
    shares: Mapping[str, np.ndarray]
    """Source -> [component, pos]: the share of the component, over layers and heads, from it."""
    where: Sequence[str]
    """[pos]: what is grafted there, in words; "" where nothing is."""


@dataclass(frozen=True)
class DashboardData:
    """One prompt under several runs, the first two of them "PRE" and "SFT"."""

    title: str
    text: str
    answer: str | None
    tokens: Sequence[str]
    components: Sequence[str]
    """What the rows of each run's `shares` are."""
    runs: Mapping[str, Run]
    lens: pd.DataFrame
    """`graftlens.lens.logit_lens` of this prompt: every run, every position."""
    kl_divergence: pd.DataFrame
    """`graftlens.lens.kl_divergence` of this prompt."""
    sources: Sequence[str]
    """The base first."""
    provenance: Mapping[str, object]
    roles: Sequence[str] | None = None
    """[pos]: of a conversation, who says the token, or "template"."""
    complete: bool = False
    """Keep the attention of every head in full, however large the page gets."""
    rise: pd.DataFrame | None = None
    """`logit_lens` of every layer at the last position, if `lens` has not every layer."""

    def __post_init__(self) -> None:
        names = list(self.runs)
        if names[:2] != ["PRE", "SFT"]:
            raise ValueError(f"runs are {listed(names)}; the first two must be 'PRE' and 'SFT'")
        n = len(self.tokens)
        if not n:
            raise ValueError("tokens are empty; a dashboard needs a prompt of at least one token")
        if self.roles is not None and len(self.roles) != n:
            raise ValueError(f"{len(self.roles)} roles; with {n} tokens there must be {n}")
        first = np.shape(self.runs["PRE"].pattern)
        if len(first) != 4 or first[2:] != (n, n):
            raise ValueError(
                f"run 'PRE': pattern has shape {first}; it must be [layer, head, query, key], and "
                f"the prompt has {n} tokens"
            )
        for name, run in self.runs.items():
            found: list[tuple[str, Sequence[int], Sequence[int]]] = [
                ("pattern", np.shape(run.pattern), first),
                ("token_logprobs", np.shape(run.token_logprobs), (n,)),
                ("where", (len(run.where),), (n,)),
            ]
            if run.direct_logit_attribution is not None:
                found.append(
                    ("direct_logit_attribution", np.shape(run.direct_logit_attribution), (n,))
                )
            for source, share in run.shares.items():
                if source not in self.sources:
                    raise ValueError(
                        f"run {name!r}: shares of source {source!r}; the sources are "
                        f"{listed(self.sources)}"
                    )
                found.append((f"shares[{source!r}]", np.shape(share), (len(self.components), n)))
            for what, shape, right in found:
                if tuple(shape) != tuple(right):
                    raise ValueError(
                        f"run {name!r}: {what} has shape {tuple(shape)}; with {n} tokens and "
                        f"{len(self.components)} components it must be {tuple(right)}"
                    )
            low, high = float(np.min(run.pattern)), float(np.max(run.pattern))
            if low < -1e-3 or high > 1 + 1e-3 or np.isnan(low + high):
                raise ValueError(
                    f"run {name!r}: pattern goes from {low:g} to {high:g}; give what the softmax "
                    "gave, from 0 to 1"
                )


class LensArrays:
    """The lens table as arrays: [layer, pos] of each run, and [layer, pos, k] of its top tokens."""

    def __init__(self, data: DashboardData) -> None:
        table, n = data.lens, len(data.tokens)
        if (prompts := table["prompt"].nunique()) != 1:
            raise ValueError(f"the lens table has {prompts} prompts; give the rows of one")
        self.layers: list[float] = sorted(table["layer"].astype(float).unique().tolist())
        self.streams = table.drop_duplicates("layer").set_index("layer")["stream"].to_dict()
        self.numbers: dict[str, dict[str, np.ndarray]] = {}
        self.top: dict[str, list[list[str]]] = {}
        self.top_probs: dict[str, np.ndarray] = {}
        shape = len(self.layers), n
        for run in data.runs:
            part = table[table["graft"] == run].sort_values(["layer", "position"])
            where = list(zip(part["layer"].astype(float), part["position"], strict=True))
            if where != [(layer, at) for layer in self.layers for at in range(n)]:
                raise ValueError(
                    f"the lens table has {len(where)} rows of run {run!r}; it must have one for "
                    f"each of {shape[0]} layers and {n} positions: logit_lens(…, at='all')"
                )
            self.numbers[run] = {
                name: part[name].to_numpy(dtype=float, na_value=np.nan).reshape(shape)
                for name in ("rank", "prob", "logprob", "kl_base", "kl_full")
            }
            self.top[run] = [list(tokens) for tokens in part["top_tokens"]]
            self.top_probs[run] = np.array(part["top_probs"].tolist(), dtype=float).reshape(
                *shape, -1
            )
        targets = table["target"].dropna()
        self.target: str | None = None if targets.empty else str(targets.iloc[0])

    def last(self, run: str, name: str) -> float:
        """A number of the run's output at the last position."""
        return float(self.numbers[run][name][-1, -1])

    def skipped(self, layers: int) -> str:
        """What is said of the layers that the table leaves out; nothing if it has all."""
        if len(self.layers) > layers:
            return ""
        return (
            f"Left out to save time and room: {layers + 1 - len(self.layers)} of {layers + 1} "
            "layers. With --complete (in Python complete=True) the page has all of them."
        )

    def layer_name(self, layer: float) -> str:
        said = f"{layer:g}"
        if layer == 0:
            return f"{said} embeddings"
        return f"{said} output" if layer == self.layers[-1] else said

    def reached(self, layer: float) -> str:
        """Where in the run that is, for a text."""
        run = f"{layer:g} {'layer has' if layer == 1 else 'layers have'} run"
        said = "embeddings" if layer == 0 else run
        return f"{said} ({self.streams[layer]})"
