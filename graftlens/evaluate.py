"""Prompts × grafts → one table, a row each. Every graft sees the same prompts."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from graftlens.graft import Graft, Grafts, named_grafts
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, doubled_bos
from graftlens.sweep.cells import columns
from graftlens.sweep.prepared import joined_answers
from graftlens.sweep.scoring import Scorer

#: The columns of a table without further measures.
COLUMNS = columns()

__all__ = ["COLUMNS", "evaluate", "position_grafts"]


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


def evaluate(
    model: GraftedTransformer,
    prompts: Prompt | Sequence[Prompt],
    grafts: Grafts,
    *,
    top_k: int = 10,
    answers: Literal["whole", "first"] = "whole",
    distractors: Literal["first", "whole"] = "first",
    measures: Sequence[Measure | str] = (),
    prepend_bos: bool | None = None,
    row_budget: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every prompt under every graft and score its answer.

    What grafts of a prompt have in common is computed once (`graftlens.sweep`). The whole answer is
    scored as it would be generated: its positions count as `last`.

    Args:
        model: the model.
        prompts: one or more prompts with answers.
        grafts: name -> graft, or one or more grafts that go by their own texts.
        top_k: how many of the likeliest tokens to keep in each row.
        answers: measure the log-probability of the whole answer, or its first token only
            (cheaper; `answer_logprob` is NA then).
        distractors: likewise, where `"whole"` fills `distractor_logprobs`.
        measures: further measures, a column each: `kl_base` and `kl_full` (KL(graft ‖ reference) in
            nats, from the base and from the full run), `kl_from_base` and `kl_from_full` (the other
            way round), `js_base`, `js_full`, `entropy` (nats), `margin` (the answer's logit minus
            the best other token's), `answer_set_prob` (of the first tokens of `Prompt.answers`), or
            a `graftlens.metrics.Measure` of your own.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        row_budget: token rows a forward pass at most; None measures free memory.
        progress: whether to show a progress bar.

    Returns:
        One row per (prompt, graft), prompts in their order, with columns `prompt` (its number),
        `graft`, `rule` (the graft's text), `template`, `text`, `answer`, `target` and `target_id`
        (the answer's first token), `rank` (1 is best; of tokens with equal logits the one with the
        smaller id comes first), `ties` (how many other tokens have exactly its logit), `prob`,
        `logprob` (nats), `top_tokens` and `top_probs` (in the order of ranks), `answer_logprob`
        (nats, whole answer), `distractor_logprobs`, `logit_diff`
        (target minus the best distractor's first token; one that begins with the target itself is
        left out, NA where none is left), and `reason`: why the prompt could not be run, where all
        numbers are NA.
        `graftlens.stats.summarise` turns it into accuracies.

    Raises:
        ValueError: no prompts or grafts; a graft that the model cannot run; a graft that fails on
            every prompt (such as a misspelt span).
    """
    if isinstance(prompts, Prompt | str):
        prompts = [prompts]
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"{prompt!r} is no Prompt. Write Prompt(text, answer=…): evaluate scores answers."
            )
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: write a number from 1.")
    parsed = named_grafts(grafts)
    if not prompts or not parsed:
        raise ValueError(
            f"{len(prompts)} prompts and {len(parsed)} grafts: give one or more of each."
        )

    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so prompts cannot be run. Load one with it.")
    bos = doubled_bos(prompts, model.tokenizer, model.prepends_bos(prepend_bos))
    for note in filter(None, (joined_answers(prompts), bos)):
        warnings.warn(note, stacklevel=2)
    scorer = Scorer(
        model,
        parsed,
        top_k=top_k,
        answers=answers,
        distractors=distractors,
        measures=measures,
        references=_references(model, parsed),
        prepend_bos=prepend_bos,
        row_budget=row_budget,
    )
    total = len(prompts) * len(parsed)
    with tqdm(total=total, desc="grafts", unit="run", disable=not progress) as bar:
        table = scorer.table(dict(enumerate(prompts)), bar.update, strict=True)
    table.attrs["recovery"] = _ends(parsed)
    missing = table["reason"].notna()
    if missing.any():
        warnings.warn(
            f"{missing.sum()} of {len(table)} rows could not be run; first reason: "
            f"{table.loc[missing, 'reason'].iloc[0]}",
            stacklevel=2,
        )
    return table


def _ends(grafts: Mapping[str, Graft]) -> dict[str, str]:
    """The names of the base alone and of one source everywhere, for statistics to find."""
    found: dict[str, str] = {}
    for name, graft in grafts.items():
        if not graft:
            found.setdefault("base", name)
        elif graft in (Graft.rule(source) for source in graft.sources):
            found.setdefault("full", name)
    return found


def _references(model: GraftedTransformer, grafts: Mapping[str, Graft]) -> dict[str, Graft]:
    """The base run, and the full run where it is clear which it is."""
    named = _ends(grafts)
    found = {"base": Graft()}
    if "full" in named:
        found["full"] = grafts[named["full"]]
    elif len(model.sources) == 2:
        found["full"] = Graft.rule(model.sources[1])
    return found


class _Module(ModuleType):
    """`graftlens.evaluate` is this module and, called, its main function.

    A package's attribute is the module once anything has imported it, and the function in
    `from graftlens import evaluate` otherwise: both spellings must mean the same.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
