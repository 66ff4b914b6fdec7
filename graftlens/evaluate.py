"""Prompts × grafts → one table, a row each. Every graft sees the same prompts."""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from graftlens.graft import Graft
from graftlens.metrics import next_token, sequence_logprob
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import collate
from graftlens.model.mask import resolve, select
from graftlens.prompts import Prompt, PromptError, Tokenized, continuation, tokenize

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
    "prob",
    "logprob",
    "top_tokens",
    "top_probs",
    "answer_logprob",
    "logit_diff",
    "reason",
)


def position_grafts(
    source: str = "sft", entity: str = "first_entity", base: str | None = None
) -> dict[str, Graft]:
    """The paper's position grafts (arXiv 2506.20746): where is the fact retrieved?

    `entity` (FE) is where enrichment would show, the last token (LT) where recall would; a
    complement grafts every other position, BOS included.

    Args:
        source: the finetuned source.
        entity: the span of the entity that the prompt names.
        base: the source that runs elsewhere, if that is not the model's base.
    """
    places = {
        "PRE": None,
        "SFT": "all",
        "FE": entity,
        "LT": "last",
        "FE+LT": f"{entity} + last",
        "(FE+LT)^C": f"~({entity} + last)",
        "not-FE": f"~{entity}",
        "not-LT": "~last",
    }
    below = Graft() if base is None else Graft.rule(base)
    return {
        name: below if at is None else below | Graft.rule(source, at=at)
        for name, at in places.items()
    }


@dataclass(frozen=True)
class _Scored:
    """A prompt ready to be run: its tokens, its answer's tokens, its distractors' first tokens."""

    index: int
    prompt: Prompt
    tokens: Tokenized
    answer: tuple[int, ...]
    distractors: tuple[int, ...]


def evaluate(
    model: GraftedTransformer,
    prompts: Prompt | Sequence[Prompt],
    grafts: Graft | str | Mapping[str, Graft | str] | Sequence[Graft | str],
    *,
    top_k: int = 10,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every prompt under every graft and score its answer.

    The whole answer is scored as it would be generated: its positions count as `last`.

    Args:
        model: the model.
        prompts: one or more prompts with answers.
        grafts: name -> graft, or one or more grafts that go by their own texts.
        top_k: how many of the likeliest tokens to keep in each row.
        batch_size: prompts per forward pass.
        prepend_bos: None leaves BOS to the tokenizer.
        progress: whether to show a progress bar.

    Returns:
        One row per (prompt, graft), prompts in their order, with columns `prompt` (its number),
        `graft`, `rule` (the graft's text), `template`, `text`, `answer`, `target` and `target_id`
        (the answer's first token), `rank` (1 is best), `prob`, `logprob` (nats), `top_tokens`,
        `top_probs`, `answer_logprob` (nats, whole answer), `logit_diff` (target minus the best
        distractor's first token; one that begins with the target itself is left out, NA where
        none is left), and `reason`: why the prompt could not be run, where all numbers are NA.
        `graftlens.stats.summarise` turns it into accuracies.

    Raises:
        ValueError: no prompts or grafts; a graft that the model cannot run; a graft that fails on
            every prompt (such as a misspelt span).
    """
    if isinstance(prompts, Prompt):
        prompts = [prompts]
    if isinstance(grafts, Graft | str):
        grafts = [grafts]
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"{prompt!r} is no Prompt. Write Prompt(text, answer=…): evaluate scores answers."
            )
    if batch_size < 1 or top_k < 1:
        raise ValueError(f"batch_size={batch_size}, top_k={top_k}: write numbers from 1.")
    named = {str(g): g for g in grafts} if not isinstance(grafts, Mapping) else dict(grafts)
    parsed = {n: Graft.parse(g) if isinstance(g, str) else g for n, g in named.items()}
    if not prompts or not parsed:
        raise ValueError(
            f"{len(prompts)} prompts and {len(parsed)} grafts: give one or more of each."
        )

    ready: list[_Scored] = []
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for index, prompt in enumerate(prompts):
        try:
            ready.append(_prepare(model, index, prompt, prepend_bos))
        except PromptError as error:
            for name, graft in parsed.items():
                rows[index, name] = _row(index, prompt, name, graft) | {"reason": str(error)}

    runnable: dict[str, list[_Scored]] = {}
    for name, graft in parsed.items():
        runnable[name] = []
        reason = ""
        for scored in ready:
            try:
                for rule in graft.rules:
                    select(rule, scored.tokens)
            except PromptError as error:
                reason = str(error)
                row = _row(scored.index, scored.prompt, name, graft)
                rows[scored.index, name] = row | {"reason": reason}
            else:
                runnable[name].append(scored)
        if ready and not runnable[name]:
            raise ValueError(f"graft {name!r} can be run on none of {len(ready)} prompts: {reason}")
        if runnable[name]:
            first = collate([runnable[name][0].tokens])
            resolve(graft, first, model.arch, model.sources)

    total = sum(map(len, runnable.values()))
    with tqdm(total=total, desc="grafts", unit="run", disable=not progress) as bar:
        for name, graft in parsed.items():
            for part in _batches(runnable[name], batch_size):
                for scored, numbers in zip(part, _score(model, graft, part, top_k), strict=True):
                    row = _row(scored.index, scored.prompt, name, graft)
                    rows[scored.index, name] = row | numbers
                bar.update(len(part))
    ordered = [rows[index, name] for index in range(len(prompts)) for name in parsed]
    if missing := [row["reason"] for row in ordered if row["reason"] is not None]:
        warnings.warn(
            f"{len(missing)} of {len(ordered)} rows could not be run; first reason: {missing[0]}",
            stacklevel=2,
        )
    table = pd.DataFrame(ordered, columns=list(COLUMNS))
    whole = {"target_id": "Int64", "rank": "Int64"}
    real = dict.fromkeys(("prob", "logprob", "answer_logprob", "logit_diff"), "float64")
    return table.astype(whole | real)


def _prepare(
    model: GraftedTransformer, index: int, prompt: Prompt, prepend_bos: bool | None
) -> _Scored:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so prompts cannot be run. Load one with it.")
    if prompt.answer is None:
        raise PromptError("the prompt has no answer to score.")
    tokens = tokenize(prompt, tokenizer, prepend_bos)
    edge = prompt.text[-1] + prompt.answer[0]
    if edge.isascii() and edge.isalnum():
        warnings.warn(
            f"prompt {index}: the answer {prompt.answer!r} goes on with the prompt's last word. "
            f"Did you mean {' ' + prompt.answer!r}?",
            stacklevel=3,
        )
    answer = continuation(tokens, prompt.answer, tokenizer, prepend_bos)
    length = len(tokens) + len(answer) - 1
    if length > model.arch.n_ctx and model.arch.rotary_dim == 0:
        raise PromptError(
            f"prompt and answer are {length} tokens, more than the model's context of "
            f"{model.arch.n_ctx}. Shorten the prompt."
        )
    if max(*tokens.ids, *answer) >= model.arch.d_vocab:
        raise PromptError(
            f"the tokenizer gives token id {max(*tokens.ids, *answer)}, the model's vocabulary "
            f"ends at {model.arch.d_vocab - 1}."
        )
    others = [continuation(tokens, d, tokenizer, prepend_bos)[0] for d in prompt.distractors]
    return _Scored(index, prompt, tokens, answer, tuple(t for t in others if t != answer[0]))


def _row(index: int, prompt: Prompt, name: str, graft: Graft) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {
        "prompt": index,
        "graft": name,
        "rule": str(graft),
        "template": prompt.name or prompt.template,
        "text": prompt.text,
        "answer": prompt.answer,
    }


def _batches(items: Sequence[_Scored], size: int) -> Iterator[list[_Scored]]:
    """Prompts of similar length together, so that little is padding."""
    ordered = sorted(items, key=lambda s: len(s.tokens) + len(s.answer))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _score(
    model: GraftedTransformer, graft: Graft, part: Sequence[_Scored], top_k: int
) -> list[dict[str, Any]]:
    batch = collate(
        [s.tokens for s in part],
        continuations=[s.answer[:-1] for s in part],
        device=model.cfg.device,
    )
    columns = [range(len(s.tokens) - 1, len(s.tokens) - 1 + len(s.answer)) for s in part]
    logits = [rows.float().cpu() for rows in model.logits_at(batch, columns, graft)]
    targets = torch.tensor([s.answer[0] for s in part])
    first = torch.stack([rows[0] for rows in logits])
    measured = next_token(first, targets, top_k)
    results = []
    for i, scored in enumerate(part):
        best = [float(first[i, d]) for d in scored.distractors]
        results.append(
            {
                "target": model.to_single_str_token(scored.answer[0]),
                "target_id": scored.answer[0],
                "rank": int(measured.rank[i]),
                "prob": math.exp(float(measured.logprob[i])),
                "logprob": float(measured.logprob[i]),
                "top_tokens": [model.to_single_str_token(t) for t in measured.top_ids[i].tolist()],
                "top_probs": measured.top_logprobs[i].exp().tolist(),
                "answer_logprob": float(sequence_logprob(logits[i], torch.tensor(scored.answer))),
                "logit_diff": float(first[i, scored.answer[0]]) - max(best) if best else None,
            }
        )
    return results


class _Module(ModuleType):
    """`graftlens.evaluate` is this module and, called, its main function.

    A package's attribute is the module once anything has imported it, and the function in
    `from graftlens import evaluate` otherwise: both spellings must mean the same.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
