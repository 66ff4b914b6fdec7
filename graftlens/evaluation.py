"""Prompts × grafts → one table, a row each. Every graft sees the same prompts."""

import warnings
from collections.abc import Sequence
from typing import Literal

import pandas as pd
from tqdm.auto import tqdm

from graftlens.components import brief
from graftlens.graft import Graft, Grafts, named_grafts
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, dated, doubled_bos
from graftlens.references import References, marked, warn_of_reasons
from graftlens.sweep.prepared import joined_answers
from graftlens.sweep.scoring import Scorer

__all__ = ["evaluate", "position_grafts"]


def position_grafts(
    source: str = "sft",
    entity: str = "first_entity",
    base: str | None = None,
    *,
    kind: Literal["fact", "chat"] = "fact",
    prompts: Prompt | Sequence[Prompt] | None = None,
) -> dict[str, Graft]:
    """The paper's position grafts (arXiv 2506.20746): where is the fact retrieved?

    `entity` (FE) is where enrichment would show, the last token (LT) where recall would; a
    complement grafts every other position, BOS included.

    Args:
        source: the finetuned source.
        entity: the span of the entity that the prompt names.
        base: the source that runs elsewhere, if that is not the model's base.
        kind: `fact`, or `chat` for prompts that are conversations (`Prompt.chat`): what the system
            and the user say, what the chat template writes, the last token, and the complements.
            `entity` plays no part there. Where a role says nothing, its complement is every token,
            and a graft of it alone has no numbers but a reason in tables.
        prompts: of kind `chat`, the conversations to graft: roles that say nothing in any of them
            are left out, with a warning.

    Raises:
        ValueError: an unknown kind; prompts that are not conversations.
    """
    places: dict[str, str | None] = {"PRE": None, "SFT": "all"}
    if kind == "chat":
        roles = _speaking(("system", "user", "template"), prompts)
        places |= {role: role for role in roles} | {"LT": "last"}
        places |= {f"not-{role}": f"~{role}" for role in roles} | {"not-LT": "~last"}
    elif kind == "fact":
        places |= {
            "FE": entity,
            "LT": "last",
            "FE+LT": f"{entity} + last",
            "(FE+LT)^C": f"~({entity} + last)",
            "not-FE": f"~{entity}",
            "not-LT": "~last",
        }
    else:
        raise ValueError(f'kind={kind!r} is unknown. Allowed: "fact" or "chat".')
    if prompts is not None and kind != "chat":
        raise ValueError('prompts is for kind="chat". Leave it out.')
    below = Graft() if base is None else Graft.rule(base)
    return {
        name: below if at is None else below | Graft.rule(source, at=at)
        for name, at in places.items()
    }


def _speaking(roles: Sequence[str], prompts: Prompt | Sequence[Prompt] | None) -> Sequence[str]:
    """The roles without those that say nothing in any of the prompts, if there are prompts."""
    if prompts is None:
        return roles
    speaking = {"template"}
    for number, prompt in enumerate([prompts] if isinstance(prompts, Prompt) else prompts):
        if not isinstance(prompt, Prompt) or prompt.conversation is None:
            raise ValueError(
                f"prompts: number {number} is {brief(prompt)}, not a conversation. Give prompts "
                "made by Prompt.chat."
            )
        speaking |= prompt.conversation.speakers()
    if silent := [role for role in roles if role not in speaking]:
        warnings.warn(
            f"{' and '.join(silent)} says nothing in these conversations, so the grafts of it are "
            "left out.",
            stacklevel=3,
        )
    return [role for role in roles if role in speaking]


def evaluate(
    model: GraftedTransformer,
    prompts: Prompt | Sequence[Prompt],
    grafts: Grafts,
    *,
    top_k: int = 10,
    answers: Literal["whole", "first"] = "whole",
    distractors: Literal["first", "whole"] = "first",
    measures: Sequence[Measure | str] = (),
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
    row_budget: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every prompt under every graft and score its answer.

    The base (PRE) and the full run (SFT), which recovery is measured between, run first if they are
    not among the grafts. What grafts of a prompt have in common is computed once
    (`graftlens.sweep`). The whole answer is scored as it would be generated: its positions count as
    `last`.

    Args:
        model: the model.
        prompts: one or more prompts with answers.
        grafts: name -> graft, or one or more grafts, which are keyed by their text.
        top_k: how many of the likeliest tokens to keep in each row.
        answers: measure the log-probability of the whole answer, or its first token only
            (cheaper; `answer_logprob` is NA then).
        distractors: likewise, where `"whole"` fills `distractor_logprobs`.
        measures: further measures, a column each: `kl_base` and `kl_full` (KL(graft ‖ reference) in
            nats, from the base and from the full run), `kl_from_base` and `kl_from_full` (the other
            way round), `js_base`, `js_full`, `entropy` (nats), `margin` (the answer's logit minus
            the best other token's), `answer_set_prob` (of the first tokens of `Prompt.answers`), or
            a `graftlens.Measure` of your own.
        full: the run that counts as SFT: the name of a graft or a source, or a graft. None is the
            only finetuned source everywhere; where there are several, the one that `grafts` has
            everywhere, or else no run: the column `full_run` is empty then, and recovery is NA.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        row_budget: most token rows per forward pass; None measures free memory.
        progress: whether to show a progress bar.

    Returns:
        One row per (prompt, graft), prompts in their order, with columns `prompt` (its number),
        `graft`, `rule` (the graft's text), `base_run` and `full_run` (the names of the two runs
        that recovery is measured between), `template`, `text`, `answer`, `target` and `target_id`
        (the answer's first token), `rank` (1 is best; of tokens with equal logits the one with the
        smaller id comes first), `ties` (how many other tokens have exactly its logit), `prob`,
        `logprob` (nats), `top_tokens` and `top_probs` (in the order of ranks), `answer_logprob`
        (nats, whole answer), `distractor_logprobs`, `logit_diff`
        (target minus the best distractor's first token; one that begins with the target itself is
        left out, NA where none is left), and `reason`: why the prompt could not be run, where all
        numbers are NA. Where sources have different vocabularies and a measure is KL, JS or
        entropy, `common_tokens` says how many tokens it is over: those that all sources have.
        `graftlens.stats.summarise` turns it into accuracies.

    Raises:
        ValueError: no prompts or grafts; a graft that the model cannot run; a graft that fails on
            every prompt (such as a misspelt span). One of a role that speaks in none of the
            conversations gives rows with that reason, and a warning, unless it is a reference.
    """
    if isinstance(prompts, Prompt | str):
        prompts = [prompts]
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"{prompt!r} is not a Prompt. Write Prompt(text, answer=…): evaluate scores "
                "answers."
            )
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: write a number from 1.")
    parsed = named_grafts(grafts)
    if not prompts or not parsed:
        raise ValueError(
            f"{len(prompts)} prompts and {len(parsed)} grafts: give one or more of each."
        )
    runs = References.of(parsed, model.sources, full)
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so prompts cannot be run. Load one with it.")
    bos = doubled_bos(prompts, model.tokenizer, model.prepends_bos(prepend_bos))
    for note in filter(None, (joined_answers(prompts), bos, dated(prompts, model.tokenizer))):
        warnings.warn(note, stacklevel=2)
    scorer = Scorer(
        model,
        runs.grafts,
        top_k=top_k,
        answers=answers,
        distractors=distractors,
        measures=measures,
        references=runs.chosen,
        prepend_bos=prepend_bos,
        row_budget=row_budget,
    )
    total = len(prompts) * len(runs.grafts)
    with tqdm(total=total, desc="grafts", unit="run", disable=not progress) as bar:
        table = scorer.table(dict(enumerate(prompts)), bar.update, strict=True)
    warn_of_reasons(table, "rows could not be run")
    table = marked(table, runs.base, runs.full)
    return (
        model.vocabularies.marked(table) if any(m.over_common for m in scorer.measured) else table
    )
