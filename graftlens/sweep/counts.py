"""What a sweep computes, counted before it runs: rows, logits, memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftlens.memory import LOGITS, row_bytes
from graftlens.model.tree import GATHERED
from graftlens.planner import Branches, Planner, Structure
from graftlens.prompts import Tokenized


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep computes. A row is one token position through all layers; in part of the
    layers it counts as that part.

    Attributes:
        prompts, cells: how many prompts, and how many (prompt, graft) pairs that can be run.
        structures: how many different structures the prompts have.
        rows: token rows that the sweep needs.
        rows_alone: token rows of the same cells run one by one.
        rows_cut: rows that are computed again because a tree is larger than the budget.
        logits: rows that are unembedded.
        peak: the most rows that a forward pass holds at a time.
        memory: bytes that such a pass takes besides the weights, estimated.
    """

    prompts: int
    cells: int
    structures: int
    rows: float
    rows_alone: float
    rows_cut: float
    logits: int
    peak: int
    memory: int

    @property
    def ratio(self) -> float:
        """How many times fewer rows than one by one."""
        return self.rows_alone / self.rows if self.rows else 1.0

    def summary(self) -> str:
        """The plan in a few lines of text."""
        again = (
            f" ({self.rows_cut:,.0f} of them again, where trees are cut)" if self.rows_cut else ""
        )
        return (
            f"{self.prompts:,} prompts, {self.cells:,} cells (prompt × graft), "
            f"{self.structures:,} layouts of tokens\n"
            f"token rows needed:      {self.rows:,.0f}{again}\n"
            f"rows if run one by one: {self.rows_alone:,.0f}\n"
            f"ratio:                  {self.ratio:.1f}\n"
            f"rows unembedded:        {self.logits:,}\n"
            f"expected memory:        {self.memory / 2**20:,.0f} MiB besides the weights "
            f"(at most {self.peak:,} rows per pass)"
        )


def plan(
    planner: Planner,
    prompts: Sequence[tuple[Tokenized, Branches]],
    row_budget: int | None = None,
    item: int = 4,
) -> SweepPlan:
    """Count what a sweep of tokenized prompts needs.

    Args:
        planner: the grafts.
        prompts: each prompt with what follows it.
        row_budget: rows that a pass holds at most; larger trees are cut. None sets no limit.
        item: bytes of a number of the model's dtype.
    """
    counts: dict[Structure, int] = {}
    for prompt, branches in prompts:
        structure, _ = planner.structure(prompt, branches)
        counts[structure] = counts.get(structure, 0) + 1
    n_layers = planner.arch.n_layers
    needed = again = alone = cells = logits = largest = together = gathered = 0
    for structure, count in counts.items():
        pieces = planner.pieces(structure, row_budget)
        here = sum(piece.tree.layer_rows for piece in pieces)
        needed += count * here
        if len(pieces) > 1:
            again += count * (here - sum(p.tree.layer_rows for p in planner.pieces(structure)))
        alone += count * len(structure.runnable) * len(structure.parents)
        cells += count * len(structure.runnable)
        logits += count * sum(len(piece.tree.final_rows) for piece in pieces)
        largest = max([largest, *(piece.tree.peak for piece in pieces)])
        together += count * sum(piece.tree.peak for piece in pieces)
        gathered += count * max((piece.tree.gathered for piece in pieces), default=0)
    peak = max(largest, together if row_budget is None else min(row_budget, together))
    return SweepPlan(
        prompts=len(prompts),
        cells=cells,
        structures=len(counts),
        rows=needed / n_layers,
        rows_alone=float(alone),
        rows_cut=again / n_layers,
        logits=logits,
        peak=peak,
        memory=peak * row_bytes(planner.arch, item)
        + min(gathered, GATHERED) * 2 * planner.arch.n_kv_heads * planner.arch.d_head * item
        + min(logits * planner.arch.d_vocab, LOGITS) * (2 * max(item, 4) + 1),
    )


def together(plans: Sequence[SweepPlan]) -> SweepPlan:
    """The plan of blocks of grafts, given those of each block over the same prompts."""

    added, most = ("cells", "rows", "rows_alone", "rows_cut", "logits"), ("structures", "peak")
    found: dict[str, Any] = {name: sum(getattr(one, name) for one in plans) for name in added}
    found |= {name: max(getattr(one, name) for one in plans) for name in (*most, "memory")}
    return replace(plans[0], **found)


def blocks_of(
    prompts: int, grafts: int, cells: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Bounds of the blocks of prompts and of grafts, so that no shard has more than `cells`.

    Only grafts of one shard share what they have in common, so they are cut only where there are
    more than `cells`.
    """

    def even(count: int, most: int) -> list[tuple[int, int]]:
        runs = -(-count // most)
        return [(count * i // runs, count * (i + 1) // runs) for i in range(runs)]

    of_grafts = even(grafts, cells)
    widest = max(high - low for low, high in of_grafts)
    return even(prompts, max(1, cells // widest)), of_grafts
