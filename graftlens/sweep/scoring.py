"""Prompts × grafts → one row each: what is measured, and in which columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.graft import Graft
from graftlens.metrics import NextTokens, next_tokens
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.tree import TreeBatch, TreeShape
from graftlens.prompts import Prompt, PromptError, Tokenized, continuation, tokenize
from graftlens.sweep.memory import affordable_rows, free_memory, out_of_memory
from graftlens.sweep.planner import LOGITS, Branches, Part, Planner, Structure, SweepPlan, plan

#: Whether a continuation is scored as a whole, or its first token only.
Extent = Literal["whole", "first"]

COLUMNS = (
    "prompt",
    "graft",
    "rule",
    "template",
    "text",
    "answer",
    "target",
    "target_id",
    "rank",
    "ties",
    "prob",
    "logprob",
    "top_tokens",
    "top_probs",
    "answer_logprob",
    "distractor_logprobs",
    "logit_diff",
    "reason",
)


@dataclass(frozen=True)
class Scored:
    """A prompt ready to be run: its tokens, its answer's tokens, its distractors' tokens.

    Attributes:
        number: the prompt's number in the results.
        answer: the token ids that the answer adds after the prompt.
        distractors: likewise, for each distractor.
    """

    number: int
    prompt: Prompt
    tokens: Tokenized
    answer: tuple[int, ...]
    distractors: tuple[tuple[int, ...], ...]

    def continuations(self, answers: Extent, distractors: Extent) -> list[tuple[int, ...]]:
        """The answer, as far as it is scored, and distractors that are scored as a whole.

        First tokens of distractors are read where the answer's is.
        """
        answer = self.answer if answers == "whole" else self.answer[:1]
        return [answer, *(self.distractors if distractors == "whole" else ())]


def prepare(
    number: int,
    prompt: Prompt,
    tokenizer: Any,
    arch: Architecture,
    prepend_bos: bool | None = None,
    answers: Extent = "whole",
    distractors: Extent = "first",
) -> Scored:
    """Tokenize a prompt, its answer and its distractors; no model is needed.

    Its length is checked as far as answer and distractors are scored.

    Raises:
        PromptError: a prompt without an answer, or one that this model cannot run.
    """
    if prompt.answer is None:
        raise PromptError("the prompt has no answer to score.")
    tokens = tokenize(prompt, tokenizer, prepend_bos)
    answer = continuation(tokens, prompt.answer, tokenizer, prepend_bos)
    others = tuple(continuation(tokens, d, tokenizer, prepend_bos) for d in prompt.distractors)
    scored = Scored(number, prompt, tokens, answer, others)
    length = len(tokens) + max(map(len, scored.continuations(answers, distractors))) - 1
    if length > arch.n_ctx and arch.rotary_dim == 0:
        raise PromptError(
            f"prompt and answer (or a distractor, where they are scored as a whole) are {length} "
            f"tokens, more than the model's context of {arch.n_ctx}. Shorten the prompt."
        )
    highest = max(i for ids in (tokens.ids, answer, *others) for i in ids)
    if highest >= arch.d_vocab:
        raise PromptError(
            f"the tokenizer gives token id {highest}, the model's vocabulary ends at "
            f"{arch.d_vocab - 1}."
        )
    return scored


def joined_answers(prompts: Sequence[Prompt]) -> str | None:
    """A note on answers that go on with the prompt's last word, which is seldom meant."""
    edges = [prompt.text[-1] + (prompt.answer or " ")[0] for prompt in prompts]
    numbers = [i for i, edge in enumerate(edges) if edge.isascii() and edge.isalnum()]
    if not numbers:
        return None
    answer = prompts[numbers[0]].answer
    more = f" (And {len(numbers) - 1} prompts more.)" if len(numbers) > 1 else ""
    return (
        f"prompt {numbers[0]}: the answer {answer!r} goes on with the prompt's last word. Did you "
        f"mean {' ' + str(answer)!r}?{more}"
    )


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
        prepend_bos: bool | None = None,
        row_budget: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """As `score`; `say` gets the line that tells of memory running out.

        Raises:
            ValueError: a graft that the model cannot run, or no graft at all.
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
        self.answers, self.distractors = answers, distractors
        self.top_k, self.prepend_bos = top_k, model.prepends_bos(prepend_bos)
        self.planner = Planner(
            model.arch, model.sources, list(self.grafts.values()), model.equal_sources
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
        """One row per (prompt, graft), in their order, with `COLUMNS`.

        Raises:
            ValueError: with `strict`, a graft that no prompt can run; nothing has run then.
        """
        ready, unready = self._ready(prompts)
        names = list(self.grafts)
        cells = _Cells(list(prompts), len(names))
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
                _Work(structure, part, tuple(members))
                for part in self.planner.parts(structure, self.rows)
            )
            # Whole structures at a time: trees are large, and are dropped when they have run.
            waiting = self._run(waiting, cells, advance, rest=False)
        self._run(waiting, cells, advance, rest=True)
        return self._frame(prompts, cells)

    # -- what to run -------------------------------------------------------------------------

    def _ready(self, prompts: Mapping[int, Prompt]) -> tuple[list[Scored], dict[int, str]]:
        ready, unready = [], {}
        for number, prompt in prompts.items():
            try:
                ready.append(
                    prepare(
                        number,
                        prompt,
                        self.model.tokenizer,
                        self.model.arch,
                        self.prepend_bos,
                        self.answers,
                        self.distractors,
                    )
                )
            except PromptError as error:
                unready[number] = str(error)
        whole = (len(s.tokens) + max(map(len, self._continuations(s))) - 1 for s in ready)
        self.model.warn_beyond_context(max(whole, default=0))
        return ready, unready

    def _branches(self, scored: Scored) -> Branches:
        return Branches.of(
            scored.tokens.ids, self._continuations(scored), self.model.arch.rope_limit
        )

    def _continuations(self, scored: Scored) -> list[tuple[int, ...]]:
        return scored.continuations(self.answers, self.distractors)

    def _by_structure(
        self, ready: Sequence[Scored], cells: "_Cells"
    ) -> list[tuple[Structure, list[tuple[Scored, Branches]]]]:
        found: dict[Structure, list[tuple[Scored, Branches]]] = {}
        for scored in ready:
            branches = self._branches(scored)
            structure, reasons = self.planner.structure(scored.tokens, branches)
            for graft, reason in reasons.items():
                cells.reason[cells.of[scored.number], graft] = reason
            found.setdefault(structure, []).append((scored, branches))
        return sorted(found.items(), key=lambda item: len(item[0].columns))

    def _refuse_idle(self, ready: Sequence[Scored], cells: "_Cells") -> None:
        reasons = cells.reason[[cells.of[scored.number] for scored in ready]]
        for name, column in zip(self.grafts, reasons.T, strict=True):
            if all(reason is not None for reason in column):
                raise ValueError(
                    f"graft {name!r} can be run on none of {len(ready)} prompts: {column[0]}"
                )

    def _run(
        self,
        waiting: "list[_Work]",
        cells: "_Cells",
        advance: Callable[[int], object],
        rest: bool,
    ) -> "list[_Work]":
        """Run full batches of what waits, and with `rest` a last one; hand back what still waits.

        Where memory runs out, the budget is halved and the batch cut anew.
        """
        while waiting:
            batch, left = _filled(waiting, self.rows)
            if not left and not rest:
                return batch
            try:
                self._score(batch, cells)
            except (RuntimeError, MemoryError) as error:
                alone = len(batch) == len(batch[0].members) == len(batch[0].part.grafts) == 1
                if alone or not out_of_memory(error):
                    raise
                held = sum(len(work.members) * work.part.tree.peak for work in batch)
                self.rows = max(1, min(self.rows, held) // 2)
                self._shape = None
                waiting = [
                    _Work(work.structure, part, work.members)
                    for work in (*batch, *left)
                    for part in self.planner.cut(work.structure, work.part, self.rows)
                ]
            else:
                advance(sum(len(work.members) * len(work.part.grafts) for work in batch))
                waiting = left
                continue
            # Out of the handler, so that the error's frames no longer hold the tensors.
            free_memory(self.model.cfg.device)
            self.say(f"Memory ran out: going on with at most {self.rows} token rows a pass.")
        return []

    # -- running -----------------------------------------------------------------------------

    def _score(self, batch: "Sequence[_Work]", cells: "_Cells") -> None:
        trees = [(work.part.tree, len(work.members)) for work in batch]
        key = tuple((id(tree), count) for tree, count in trees)
        if self._shape is None or self._shape[0] != key:
            device = torch.device(self.model.cfg.device)
            self._shape = (key, TreeShape(trees, self.planner.sides, device))
        tokens = [np.array([branches.tokens for _, branches in work.members]) for work in batch]
        tree = TreeBatch.of(self._shape[1], tokens)
        wanted, lists = self._targets(batch)
        measured = self._measure(tree, wanted)
        start = 0
        for work, targets in zip(batch, lists, strict=True):
            n_finals = len(work.part.tree.final_rows)
            for (scored, branches), slots in zip(work.members, targets, strict=True):
                rows = slice(start, start + n_finals)
                self._fill(cells, work, scored, branches, slots, measured.rows(rows))
                start += n_finals

    def _targets(
        self, batch: "Sequence[_Work]"
    ) -> tuple[Int[np.ndarray, "final target"], list[list[dict[tuple[int, int], int]]]]:
        """The tokens whose logits are wanted in each final row, and where each one stands.

        Returns token ids, repeated to fill up, and per prompt (node, token) -> its column.
        """
        rows: list[list[list[int]]] = []
        columns: list[list[dict[tuple[int, int], int]]] = []
        for work in batch:
            of_work: list[dict[tuple[int, int], int]] = []
            for scored, branches in work.members:
                # First tokens are compared in the answer's own run, whatever tables others need.
                at = {branches.paths[0][0]: self._first_tokens(scored)}
                for path, ids in zip(branches.paths, self._continuations(scored), strict=True):
                    for node, token in zip(path, ids, strict=True):
                        tokens = at.setdefault(node, [])
                        if token not in tokens:
                            tokens.append(token)
                of_work.append(
                    {(node, t): i for node, tokens in at.items() for i, t in enumerate(tokens)}
                )
                rows.append([at[node] for node in work.part.tree.final_nodes.tolist()])
            columns.append(of_work)
        flat = [tokens for of_prompt in rows for tokens in of_prompt]
        width = max(map(len, flat))
        return np.array([t + t[:1] * (width - len(t)) for t in flat]), columns

    @staticmethod
    def _first_tokens(scored: Scored) -> list[int]:
        return list(dict.fromkeys(ids[0] for ids in (scored.answer, *scored.distractors)))

    def _measure(self, tree: TreeBatch, wanted: Int[np.ndarray, "final target"]) -> NextTokens:
        ids = torch.from_numpy(wanted).to(self.model.cfg.device, non_blocking=True)

        def keep(logits: Tensor, which: slice) -> NextTokens:
            return next_tokens(logits, ids[which], self.top_k)

        return NextTokens.joined(self.model.tree_logits(tree, keep, self._logit_rows))

    @property
    def _logit_rows(self) -> int:
        """Rows unembedded at a time."""
        return max(16, LOGITS // self.model.arch.d_vocab)

    def _fill(
        self,
        cells: "_Cells",
        work: "_Work",
        scored: Scored,
        branches: Branches,
        slots: Mapping[tuple[int, int], int],
        found: NextTokens,
    ) -> None:
        """Put one prompt's numbers into the cells of the grafts that this tree has."""
        here, grafts = cells.of[scored.number], work.part.grafts
        outputs = dict(zip(work.part.tree.scored, work.part.tree.outputs, strict=True))
        logprobs = found.logprobs.astype(np.float64)
        top = np.exp(found.top_logprobs.astype(np.float64))

        def along(path: Sequence[int], ids: Sequence[int]) -> Float[np.ndarray, " graft"]:
            steps = zip(path, ids, strict=True)
            return sum(
                (logprobs[outputs[n], slots[n, t]] for n, t in steps),
                np.zeros(len(work.part.grafts)),
            )

        continuations = self._continuations(scored)
        last = branches.paths[0][0]
        rows = outputs[last]
        answered = along(branches.paths[0], continuations[0])
        broken = ~np.isfinite(answered)
        if broken.any():
            cells.reason[here, grafts[broken]] = (
                f"the logits are not finite in {self.model.cfg.dtype}: weights or activations "
                "overflow. Try a wider dtype."
            )
        # What cannot be run has no numbers at all: they go to the other cells only.
        grafts, rows, answered = grafts[~broken], rows[~broken], answered[~broken]
        cells.logprob[here, grafts] = logprobs[rows, 0]
        cells.rank[here, grafts] = found.rank[rows]
        cells.ties[here, grafts] = found.ties[rows]
        if self.answers == "whole":
            cells.answer_logprob[here, grafts] = answered
        others = [slots[last, token] for token in self._first_tokens(scored)[1:]]
        if others:
            best = found.logits[rows][:, others].max(axis=1)
            cells.logit_diff[here, grafts] = found.logits[rows, 0] - best
        if self.distractors == "whole" and len(continuations) > 1:
            each = np.stack(
                [along(*pair) for pair in zip(branches.paths[1:], continuations[1:], strict=True)],
                axis=1,
            )[~broken]
            for graft, values in zip(grafts, each.tolist(), strict=True):
                cells.distractor_logprobs[here, graft] = values
        texts = {
            row: [self._text(t) for t in found.top_ids[row].tolist()] for row in set(rows.tolist())
        }
        for graft, row in zip(grafts, rows.tolist(), strict=True):
            cells.top_tokens[here, graft] = texts[row]
            cells.top_probs[here, graft] = top[row].tolist()
        cells.target_id[here] = scored.answer[0]

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.model.to_single_str_token(token)
        return self._texts[token]

    def _frame(self, prompts: Mapping[int, Prompt], cells: "_Cells") -> pd.DataFrame:
        names, rules = list(self.grafts), [str(g) for g in self.grafts.values()]
        count = len(names)

        def of_prompts(values: Sequence[Any]) -> np.ndarray:
            return np.repeat(np.array([*values, None], dtype=object)[:-1], count)

        def whole(values: np.ndarray) -> pd.arrays.IntegerArray:
            return pd.arrays.IntegerArray(values.reshape(-1).astype(np.int64), missing)

        missing = pd.notna(cells.reason).reshape(-1)
        ids = np.broadcast_to(cells.target_id[:, None], cells.rank.shape)
        targets = [self._text(t) if t >= 0 else None for t in cells.target_id.tolist()]
        given = list(prompts.values())
        target = of_prompts(targets)
        target[missing] = None
        logprob = cells.logprob.reshape(-1)
        columns = {
            "prompt": np.repeat(np.array(list(prompts), dtype=np.int64), count),
            "graft": np.tile(np.array(names, dtype=object), len(given)),
            "rule": np.tile(np.array(rules, dtype=object), len(given)),
            "template": of_prompts([p.name or p.template for p in given]),
            "text": of_prompts([p.text for p in given]),
            "answer": of_prompts([p.answer for p in given]),
            "target": target,
            "target_id": whole(ids),
            "rank": whole(cells.rank),
            "ties": whole(cells.ties),
            "prob": np.exp(logprob),
            "logprob": logprob,
            "top_tokens": cells.top_tokens.reshape(-1),
            "top_probs": cells.top_probs.reshape(-1),
            "answer_logprob": cells.answer_logprob.reshape(-1),
            "distractor_logprobs": cells.distractor_logprobs.reshape(-1),
            "logit_diff": cells.logit_diff.reshape(-1),
            "reason": cells.reason.reshape(-1),
        }
        return pd.DataFrame(columns, columns=list(COLUMNS))


class _Cells:
    """The numbers of all (prompt, graft) cells, NaN or None until they are there."""

    def __init__(self, numbers: Sequence[int], n_grafts: int) -> None:
        shape = (len(numbers), n_grafts)
        self.of = {number: i for i, number in enumerate(numbers)}
        self.logprob = np.full(shape, np.nan)
        self.answer_logprob = np.full(shape, np.nan)
        self.logit_diff = np.full(shape, np.nan)
        self.rank = np.zeros(shape, dtype=np.int64)
        self.ties = np.zeros(shape, dtype=np.int64)
        self.target_id = np.full(shape[0], -1, dtype=np.int64)
        self.top_tokens = np.full(shape, None, dtype=object)
        self.top_probs = np.full(shape, None, dtype=object)
        self.distractor_logprobs = np.full(shape, None, dtype=object)
        self.reason = np.full(shape, None, dtype=object)


@dataclass(frozen=True, eq=False)
class _Work:
    """Prompts of one structure, and the tree of some of their grafts."""

    structure: Structure
    part: Part
    members: tuple[tuple[Scored, Branches], ...]


def _filled(waiting: Sequence[_Work], rows: int) -> tuple[list[_Work], list[_Work]]:
    """One batch of at most `rows` rows (but at least one tree), and what is left."""
    batch: list[_Work] = []
    room = rows
    for index, work in enumerate(waiting):
        count = min(len(work.members), max(0, room) // work.part.tree.peak)
        if count == 0 and not batch:
            count = 1
        if count:
            batch.append(replace(work, members=work.members[:count]))
            room -= count * work.part.tree.peak
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
    """Every prompt under every graft, in rows with `COLUMNS`; prompts in their order, then grafts.

    A prompt or graft that cannot be run gives a row with its `reason` and no numbers.

    Args:
        model: the model; no hooks may be attached.
        prompts: number -> prompt.
        grafts: name -> graft.
        advance: called with the number of cells (prompt, graft) that have just been done.
        settings: `top_k`, how many of the likeliest tokens to keep in each row; `answers`, whether
            the log-probability of the whole answer is measured (`"whole"`) or its first token only
            (`"first"`); `distractors`, likewise, where `"whole"` fills `distractor_logprobs`;
            `prepend_bos`, None leaves BOS to the tokenizer; `row_budget`, token rows a forward pass
            at most, None measures free memory.
    """
    return Scorer(model, grafts, **settings).table(prompts, advance)


def dry_plan(
    arch: Architecture,
    tokenizer: Any,
    sources: Sequence[str],
    prompts: Sequence[Prompt],
    grafts: Sequence[Graft],
    *,
    answers: Extent = "whole",
    distractors: Extent = "first",
    prepend_bos: bool | None = None,
    row_budget: int | None = None,
    item: int = 4,
) -> SweepPlan:
    """What a sweep will compute, without a model: as if no two sources shared a tensor.

    Prompts that cannot be run are left out. Without a budget, trees count as uncut. `item` is the
    bytes of a number of the dtype to run in.
    """
    planner = Planner(arch, sources, grafts)
    ready = []
    for number, prompt in enumerate(prompts):
        try:
            scored = prepare(number, prompt, tokenizer, arch, prepend_bos, answers, distractors)
        except PromptError:
            continue
        continuations = scored.continuations(answers, distractors)
        branches = Branches.of(scored.tokens.ids, continuations, arch.rope_limit)
        ready.append((scored.tokens, branches))
    return plan(planner, ready, row_budget, item)
