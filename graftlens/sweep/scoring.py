"""Prompts × grafts → one row each: what is measured, and in which columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from graftlens.graft import Graft
from graftlens.memory import affordable_rows, free_memory, out_of_memory
from graftlens.metrics import Measure, always_measured
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.mask import silenced
from graftlens.model.tree import TreeBatch, TreeShape
from graftlens.planner import Branches, Piece, Planner, Structure
from graftlens.prompts import Prompt
from graftlens.sweep.cells import Cells, asked_for
from graftlens.sweep.counts import SweepPlan, plan, together
from graftlens.sweep.measuring import Found, Measuring, Wanted, needed_references
from graftlens.sweep.prepared import Extent, Prepared, Scored


class Scorer:
    """Scores prompts under one set of grafts; what prompts share is planned once.

    Example:
        >>> scorer = Scorer(model, {"PRE": Graft(), "LT": Graft.rule("sft", at="last")})
        >>> print(scorer.plan(prompts).summary())
        >>> table = scorer.table(prompts)
    """

    def __init__(
        self,
        model: GraftedTransformer,
        grafts: Mapping[str, Graft],
        *,
        top_k: int = 10,
        answers: Extent = "whole",
        distractors: Extent = "first",
        measures: Sequence[Measure | str] = (),
        references: Mapping[str, Graft] | None = None,
        prepend_bos: bool | None = None,
        row_budget: int | None = None,
        prepared: Prepared | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """As `score`; `say` gets the message about memory running out.

        `prepared` knows prompts that other scorers have seen, with the same settings.

        Raises:
            ValueError: a graft that the model cannot run, no graft at all, or a measure that
                compares with a run that is not among `references`.
        """
        if not grafts:
            raise ValueError("no grafts: give at least one.")
        for what, extent in (("answers", answers), ("distractors", distractors)):
            if extent not in get_args(Extent):
                raise ValueError(f'{what}={extent!r}. Allowed: "whole" or "first".')
        if row_budget is not None and row_budget < 1:
            raise ValueError(f"row_budget={row_budget}: write a number from 1, or leave it out.")
        if not 1 <= top_k <= model.arch.d_vocab:
            raise ValueError(
                f"top_k={top_k}: write a number from 1 to the vocabulary's {model.arch.d_vocab}."
            )
        self.model, self.grafts, self.say = model, dict(grafts), say
        self.needed = [*(references or {}).values()]
        self.prepared = prepared or Prepared(
            model.tokenizer, model.arch, model.prepends_bos(prepend_bos), answers, distractors
        )
        asked = asked_for(measures)
        self.measured = (*always_measured(), *asked)
        compared = needed_references(asked, references or {})
        self._measuring = Measuring(model, self.measured, top_k, tuple(compared))
        self.planner = Planner(
            model.arch,
            model.sources,
            list(self.grafts.values()),
            model.equal_sources,
            references=compared,
            rotary=model.rotary,
            vocabularies=model.vocabularies,
        )
        self.rows = row_budget or affordable_rows(model.arch, model.cfg.device, model.cfg.dtype)
        self._shape: tuple[Any, TreeShape] | None = None
        self._texts: dict[int, str] = {}

    def plan(self, prompts: Mapping[int, Prompt] | Sequence[Prompt]) -> SweepPlan:
        """What the sweep of these prompts will compute; nothing is run."""
        numbered = prompts if isinstance(prompts, Mapping) else dict(enumerate(prompts))
        ready, _ = self._ready(numbered)
        item = self.model.cfg.dtype.itemsize
        return plan(self.planner, [(s.tokens, self._branches(s)) for s in ready], self.rows, item)

    def table(
        self,
        prompts: Mapping[int, Prompt],
        advance: Callable[[int], object] = lambda cells: None,
        *,
        strict: bool = False,
    ) -> pd.DataFrame:
        """One row per (prompt, graft), in their order, with `columns`.

        Raises:
            ValueError: with `strict`, a graft that no prompt can run, unless what is missing is
                only a role that speaks in none of the conversations; nothing has run then.
        """
        ready, unready = self._ready(prompts)
        names = list(self.grafts)
        cells = Cells(list(prompts), len(names), self.measured)
        for number, reason in unready.items():
            cells.reason[cells.of[number]] = reason
        advance(len(unready) * len(names))
        waiting: list[_Work] = []
        structures = self._by_structure(ready, cells)
        if strict and ready:
            self._refuse_idle(ready, cells)
        for structure, members in structures:
            failing = len(names) - len(structure.runnable)
            advance(failing * len(members))
            waiting.extend(
                _Work(structure, piece, tuple(members))
                for piece in self.planner.pieces(structure, self.rows)
            )
            # Whole structures at a time: trees are large, and are dropped when they have run.
            waiting = self._run(waiting, cells, advance, rest=False)
        self._run(waiting, cells, advance, rest=True)
        return cells.frame(prompts, self.grafts, self._text)

    # -- what to run -------------------------------------------------------------------------

    def _ready(self, prompts: Mapping[int, Prompt]) -> tuple[list[Scored], dict[int, str]]:
        ready, unready = self.prepared.all(prompts)
        self.model.warn_beyond_context(self.prepared.longest(ready))
        return ready, unready

    def _branches(self, scored: Scored) -> Branches:
        continuations = self.prepared.continuations(scored)
        return Branches.of(scored.tokens.ids, continuations, self.model.arch.rope_limit)

    def _by_structure(
        self, ready: Sequence[Scored], cells: Cells
    ) -> list[tuple[Structure, list[tuple[Scored, Branches]]]]:
        found: dict[Structure, list[tuple[Scored, Branches]]] = {}
        for scored in ready:
            branches = self._branches(scored)
            structure, reasons = self.planner.structure(scored.tokens, branches)
            for graft, reason in reasons.items():
                cells.reason[cells.of[scored.number], graft] = reason
            found.setdefault(structure, []).append((scored, branches))
        return sorted(found.items(), key=lambda item: len(item[0].columns))

    def _refuse_idle(self, ready: Sequence[Scored], cells: Cells) -> None:
        reasons = cells.reason[[cells.of[scored.number] for scored in ready]]
        for name, column in zip(self.grafts, reasons.T, strict=True):
            if any(reason is None for reason in column):
                continue
            graft = self.grafts[name]
            if graft in self.needed or not all(silenced(graft, s.tokens) for s in ready):
                raise ValueError(
                    f"graft {name!r} can be run on none of {len(ready)} prompts: {column[0]}"
                )

    def _run(
        self,
        waiting: "list[_Work]",
        cells: Cells,
        advance: Callable[[int], object],
        rest: bool,
    ) -> "list[_Work]":
        """Run full batches of what waits, and with `rest` a last one; return what still waits.

        If memory runs out, the budget is halved and the batch is divided again.
        """
        while waiting:
            batch, left = _filled(waiting, self.rows)
            if not left and not rest:
                return batch
            try:
                self._score(batch, cells)
            except (RuntimeError, MemoryError) as error:
                alone = len(batch) == len(batch[0].members) == len(batch[0].piece.grafts) == 1
                if alone or not out_of_memory(error):
                    raise
                held = sum(len(work.members) * work.piece.tree.peak for work in batch)
                self.rows = max(1, min(self.rows, held) // 2)
                self._shape = None
                waiting = [
                    _Work(work.structure, piece, work.members)
                    for work in (*batch, *left)
                    for piece in self.planner.cut(work.structure, work.piece, self.rows)
                ]
            else:
                advance(sum(len(work.members) * len(work.piece.grafts) for work in batch))
                waiting = left
                continue
            # Outside the handler, so that the error's frames no longer hold the tensors.
            free_memory(self.model.cfg.device)
            self.say(f"Memory ran out: continuing with at most {self.rows} token rows per pass.")
        return []

    # -- running -----------------------------------------------------------------------------

    def _score(self, batch: "Sequence[_Work]", cells: Cells) -> None:
        trees = [(work.piece.tree, len(work.members)) for work in batch]
        key = tuple((id(tree), count) for tree, count in trees)
        if self._shape is None or self._shape[0] != key:
            device = torch.device(self.model.cfg.device)
            self._shape = (key, TreeShape(trees, self.planner.sides, device))
        tokens = [np.array([branches.tokens for _, branches in work.members]) for work in batch]
        tree = TreeBatch.of(self._shape[1], tokens)
        members = [(work, *member) for work in batch for member in work.members]
        wanted = [self._wanted(*member) for member in members]
        found = self._measuring(tree, wanted)
        for (work, scored, branches), w, f in zip(members, wanted, found, strict=True):
            self._fill(cells, work.piece, self._steps(scored, branches), w, f)

    def _steps(self, scored: Scored, branches: Branches) -> list[list[tuple[int, int]]]:
        """Per continuation, (node, token) of each token that is scored; the answer comes first."""
        pairs = zip(branches.paths, self.prepared.continuations(scored), strict=True)
        return [list(zip(path, ids, strict=True)) for path, ids in pairs]

    def _wanted(self, work: "_Work", scored: Scored, branches: Branches) -> Wanted:
        """What is wanted of a prompt's final rows."""
        tokens: dict[int, list[int]] = {}
        for node, token in chain(*self._steps(scored, branches)):
            of_node = tokens.setdefault(node, [])
            if token not in of_node:
                of_node.append(token)
        # First tokens are compared in the answer's own run, whatever tables others need.
        tree, first = work.piece.tree, branches.paths[0][0]
        rows = tree.outputs[tree.scored.index(first)]
        references = {run: int(rows[column]) for run, column in work.piece.references.items()}
        return Wanted(scored, tree.final_nodes, tokens, first, references)

    def _fill(
        self,
        cells: Cells,
        piece: Piece,
        continuations: Sequence[Sequence[tuple[int, int]]],
        wanted: Wanted,
        found: Found,
    ) -> None:
        """Put one prompt's numbers into the cells of the grafts that this tree has."""
        here = cells.of[wanted.scored.number]
        outputs = dict(zip(piece.tree.scored, piece.tree.outputs[:, piece.columns], strict=True))

        def along(m: Measure, steps: Sequence[tuple[int, int]]) -> Float[np.ndarray, " graft"]:
            values = found.steps[m.name]
            places = ((outputs[n], wanted.tokens[n].index(token)) for n, token in steps)
            return sum((values[place] for place in places), np.zeros(len(piece.grafts)))

        sums = {m.name: along(m, continuations[0]) for m in self.measured if m.over == "answer"}
        ran = np.isfinite(sums["answer_logprob"])
        if max(wanted.scored.answer) >= self.model.vocabularies.common:
            # A token that a source lacks has a probability of 0 where it unembeds.
            ran |= np.isneginf(sums["answer_logprob"])
        if not ran.all():
            cells.reason[here, piece.grafts[~ran]] = (
                f"the logits are not finite in {self.model.cfg.dtype}: weights or activations "
                "overflow. Try a wider dtype."
            )
        # What cannot be run has no numbers at all: they go to the other cells only.
        grafts, rows = piece.grafts[ran], outputs[wanted.first][ran]
        for m in self.measured:
            if m.over == "next":
                values = found.next[m.name][rows]
            elif m.over == "answer" and self.prepared.answers == "whole":
                values = sums[m.name][ran]
            elif m.over == "distractors" and len(continuations) > 1:
                values = np.stack([along(m, steps) for steps in continuations[1:]], axis=1)[ran]
            else:
                continue
            cell = cells.values[m.name]
            if m.holds in ("number", "count"):
                cell[here, grafts] = values
                continue
            for graft, listed in zip(grafts, values.tolist(), strict=True):
                cell[here, graft] = [*map(self._text, listed)] if m.holds == "tokens" else listed
        cells.target_id[here] = wanted.scored.answer[0]

    def _text(self, token: int) -> str:
        """A token as text; its id if the model has no tokenizer."""
        if token not in self._texts:
            known = self.model.tokenizer is not None
            self._texts[token] = self.model.to_single_str_token(token) if known else str(token)
        return self._texts[token]


@dataclass(frozen=True, eq=False)
class _Work:
    """Prompts of one structure, and the tree of some of their grafts."""

    structure: Structure
    piece: Piece
    members: tuple[tuple[Scored, Branches], ...]


def _filled(waiting: Sequence[_Work], rows: int) -> tuple[list[_Work], list[_Work]]:
    """One batch of at most `rows` rows (but at least one tree), and what is left."""
    batch: list[_Work] = []
    room = rows
    for index, work in enumerate(waiting):
        count = min(len(work.members), max(0, room) // work.piece.tree.peak)
        if count == 0 and not batch:
            count = 1
        if count:
            batch.append(replace(work, members=work.members[:count]))
            room -= count * work.piece.tree.peak
        if count < len(work.members):
            left = replace(work, members=work.members[count:])
            return batch, [left, *waiting[index + 1 :]]
    return batch, []


def score(
    model: GraftedTransformer,
    prompts: Mapping[int, Prompt],
    grafts: Mapping[str, Graft],
    *,
    advance: Callable[[int], object] = lambda cells: None,
    **settings: Any,
) -> pd.DataFrame:
    """Every prompt under every graft, in rows with `columns`; prompts in their order, then grafts.

    A prompt or graft that cannot be run gives a row with its `reason` and no numbers.

    Args:
        model: the model; no hooks may be attached.
        prompts: number -> prompt.
        grafts: name -> graft.
        advance: called with the number of cells (prompt, graft) that have just been done.
        settings: `top_k`, how many of the likeliest tokens to keep in each row; `answers`, whether
            the log-probability of the whole answer is measured (`"whole"`) or its first token only
            (`"first"`); `distractors`, likewise, where `"whole"` fills `distractor_logprobs`;
            `measures`, further measures; `references`, the grafts that are the `base` and the
            `full` run, where measures compare with these; `prepend_bos`, None leaves BOS to the
            tokenizer; `row_budget`, most token rows per forward pass, None measures free memory.
    """
    return Scorer(model, grafts, **settings).table(prompts, advance)


def dry_plan(
    arch: Architecture,
    sources: Sequence[str],
    prepared: Prepared,
    prompts: Mapping[int, Prompt],
    grafts: Sequence[Graft],
    *,
    measured: Sequence[Measure] = (),
    references: Mapping[str, Graft] | None = None,
    blocks: Sequence[tuple[int, int]] | None = None,
    row_budget: int | None = None,
    item: int = 4,
) -> SweepPlan:
    """What a sweep will compute, without a model: as if no two sources shared a tensor.

    Prompts that cannot be run are left out.

    Args:
        arch, sources: the architecture, and the names of the sources.
        prepared, prompts: the prompts, by number.
        grafts: the sweep's columns.
        measured: the measures besides those of every table.
        references: the runs that measures may compare with: their rows are part of every tree.
        blocks: bounds of the blocks that grafts are cut into; None is one.
        row_budget: rows that a pass holds at most. Without one, trees count as uncut.
        item: bytes of a number of the dtype to run in.
    """
    branches = [
        (s.tokens, Branches.of(s.tokens.ids, prepared.continuations(s), arch.rope_limit))
        for s in prepared.all(prompts)[0]
    ]
    compared = needed_references(measured, references or {})
    planners = (
        Planner(arch, sources, grafts[low:high], references=compared)
        for low, high in blocks or [(0, len(grafts))]
    )
    return together([plan(planner, branches, row_budget, item) for planner in planners])
