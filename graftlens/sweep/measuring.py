"""What is measured in the final rows of token trees, one piece of the logits at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.graft import Graft
from graftlens.memory import LOGITS
from graftlens.metrics import Measure, Predictions
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.tree import TreeBatch
from graftlens.sweep.prepared import Scored


@dataclass(frozen=True, eq=False)
class Wanted:
    """The final rows of one prompt under one tree.

    Attributes:
        scored: the prompt.
        nodes: per row, the node that it is read at.
        tokens: per node, the tokens along the continuations that are measured there.
        first: the node that predicts the answer's first token, which comes first there.
        references: the number of the row of each reference run that the prompt can run.
    """

    scored: Scored
    nodes: Int[np.ndarray, " final"]
    tokens: Mapping[int, Sequence[int]]
    first: int
    references: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Found:
    """What was measured in some final rows, NaN (-1 for tokens) where there is nothing.

    Attributes:
        next: measures of the next token: [final], lists [final, k].
        steps: measures along continuations, of each token that was wanted.
    """

    next: Mapping[str, np.ndarray]
    steps: Mapping[str, Float[np.ndarray, "final target"]]

    def rows(self, which: slice) -> "Found":
        """Some of the rows."""
        return Found(
            {name: values[which] for name, values in self.next.items()},
            {name: values[which] for name, values in self.steps.items()},
        )


class Measuring:
    """Measures the distributions that a token tree ends in; no [row, d_vocab] is kept."""

    def __init__(
        self,
        model: GraftedTransformer,
        measured: Sequence[Measure],
        top_k: int,
        runs: Sequence[str] = (),
    ) -> None:
        """`runs` are the reference runs that trees have rows of."""
        self.model, self.top_k, self.runs = model, min(top_k, model.arch.d_vocab), tuple(runs)
        self._n_common = model.vocabularies.common
        self._next = [m for m in measured if m.over == "next"]
        self._steps = [m for m in measured if m.over != "next"]
        self._needs = {need for m in self._next for need in m.needs}

    def __call__(self, tree: TreeBatch, wanted: Sequence[Wanted]) -> list[Found]:
        """Run a tree and measure; `wanted` are its prompts, in order.

        Raises:
            ValueError: the function of a measure does not give a number per row.
        """
        counts = [len(w.nodes) for w in wanted]
        bounds = np.cumsum([0, *counts]).tolist()
        prompt = np.repeat(np.arange(len(wanted)), counts)
        first = np.concatenate([w.nodes == w.first for w in wanted])
        kinds = np.array([self._kind(w) for w in wanted])[prompt]
        flat = [w.tokens[node] for w in wanted for node in w.nodes.tolist()]
        width = max(map(len, flat))
        tokens = np.array([[*t, *[t[0]] * (width - len(t))] for t in flat])
        ids = torch.from_numpy(tokens).to(self.model.cfg.device, non_blocking=True)
        beside = {run: np.arange(bounds[-1]) for run in self.runs}
        for w, (low, high) in zip(wanted, pairwise(bounds), strict=True):
            for run, row in w.references.items():
                beside[run][low:high] = low + row
        found = self._empty(bounds[-1], width)

        def keep(logits: Tensor, which: slice, *others: Tensor) -> None:
            here = Predictions(logits, top_k=self.top_k, n_common=self._n_common)
            beside = [Predictions(other, n_common=self._n_common) for other in others]
            runs = dict(zip(self.runs, beside, strict=True))
            for m in self._steps:
                for column in range(width):
                    at = here.rows(None, answer=ids[which, column])
                    found.steps[m.name][which, column] = at.column(m, np.float64)
            for kind in np.unique(kinds[which][first[which]], axis=0):
                rows = np.flatnonzero(first[which] & (kinds[which] == kind).all(axis=1))
                numbers = which.start + rows
                given: dict[str, Any] = {"answer": ids[torch.from_numpy(numbers).to(ids.device), 0]}
                of = [wanted[p].scored for p in prompt[numbers]]
                for name, lists in (
                    ("distractors", [s.wrong for s in of]),
                    ("answers", [s.answers for s in of]),
                ):
                    if name in self._needs and lists[0]:
                        given[name] = torch.tensor(lists, device=ids.device)
                index = None
                if len(rows) < len(logits):
                    index = torch.from_numpy(rows).to(ids.device)
                there = kind[-len(self.runs) :] if self.runs else ()
                for run, is_there in zip(self.runs, there, strict=True):
                    given[run] = runs[run].rows(index) if is_there else None
                self._fill(found, here.rows(index, **given), numbers)

        self.model.tree_logits(tree, keep, self.piece, list(beside.values()))
        return [found.rows(slice(*pair)) for pair in pairwise(bounds)]

    @property
    def piece(self) -> int:
        """Rows unembedded at a time."""
        return max(16, LOGITS // self.model.arch.d_vocab)

    def _kind(self, wanted: Wanted) -> list[int]:
        """Rows of one kind are measured together: as many distractors, answers, reference runs."""
        lists = {"distractors": wanted.scored.wrong, "answers": wanted.scored.answers}
        there = [len(tokens) if name in self._needs else 0 for name, tokens in lists.items()]
        return [*there, *(run in wanted.references for run in self.runs)]

    def _empty(self, rows: int, width: int) -> Found:
        values: dict[str, np.ndarray] = {}
        for m in self._next:
            shape = (rows, self.top_k) if m.holds in ("numbers", "tokens") else (rows,)
            tokens = m.holds == "tokens"
            values[m.name] = np.full(shape, -1 if tokens else np.nan, np.int64 if tokens else None)
        return Found(values, {m.name: np.full((rows, width), np.nan) for m in self._steps})

    def _fill(self, found: Found, rows: Predictions, numbers: Int[np.ndarray, " row"]) -> None:
        for m in self._next:
            if not rows.has(m):
                continue
            target = found.next[m.name]
            values = rows.column(m, np.int64 if m.holds == "tokens" else np.float64)
            if values.shape != (len(numbers), *target.shape[1:]):
                raise ValueError(
                    f"measure {m.name!r} gave values of shape {values.shape} for logits of "
                    f"{len(numbers)} rows. Its function must give one number per row."
                )
            target[numbers] = values


def needed_references(
    asked: Sequence[Measure], references: Mapping[str, Graft | None]
) -> dict[str, Graft]:
    """The reference runs that some measures compare with.

    Raises:
        ValueError: one that is not known.
    """
    found: dict[str, Graft] = {}
    for m in asked:
        for run in m.references:
            graft = references.get(run)
            if graft is None:
                raise ValueError(
                    f"measure {m.name!r} compares with the {run} run, and this model has several "
                    f"candidates. Name the graft: {run}=…"
                )
            found[run] = graft
    return found
