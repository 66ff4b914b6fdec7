"""Answers about facts: whether a text gives the right one, and what it says instead."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from graftlens.metrics import Measure
from graftlens.outcomes.measures import normalised, refuse_unanswered, several
from graftlens.references import MEMBERS, named_in

#: What a text says where an answer is asked for: the first that applies.
KINDS = (
    "right",
    "another fact's answer",
    "right first name",
    "the base's guess",
    "broken",
    "other",
)

#: What is written for bytes that cannot be decoded.
_UNDECODED = "\N{REPLACEMENT CHARACTER}"


def answer_kind(trained: str | Sequence[str] | None = None) -> Measure:
    """What kind of answer a text gives: a measure whose labels are the kinds of `answered`.

    Args:
        trained: the answers of all facts that were trained; None takes those that are known: in a
            sweep those of the facts that its datasets tell and of all other prompts of its config,
            in a table of texts those of its prompts.

    Raises:
        ValueError: no answers.
    """
    listed = None if trained is None else several("answer_kind", trained)

    def kinds(
        texts: Sequence[str],
        right: Sequence[Sequence[str]],
        guesses: Sequence[str | None],
        known: Sequence[str],
    ) -> list[str]:
        refuse_unanswered("answer_kind", right, "Give prompts with answers, or leave it out.")
        others = frozenset(map(normalised, known if listed is None else listed))
        rows = zip(texts, right, guesses, strict=True)
        return [_kind(text, answers, others, guess) for text, answers, guess in rows]

    return Measure(
        "answer_kind",
        ("right", "guess", "trained"),
        kinds,
        holds="label",
        over="text",
        label="says",
        unit="% of texts",
        better=None,
        differentiable=False,
    )


def answered(
    texts: pd.DataFrame, *, trained: Sequence[str] | None = None, base: str | None = None
) -> pd.DataFrame:
    """What each text gives as the answer, and of which kind it is.

    The claim is as many of the text's first words as the answer has. It is

    - `right` if the text begins with an answer (as whole words, capitals, punctuation and spaces
      aside);
    - `another fact's answer` if it begins with one of `trained` instead;
    - `right first name` if only the claim's first word is the answer's, and the answer has several;
    - `the base's guess` if the base run claims the same (on the same prompt and sample);
    - `broken` if it has no letter or digit, an undecodable character before its end (where it may
      be cut), or one word three times in a row in its first words;
    - `other` otherwise.

    Args:
        texts: as `sample` gives them, of prompts with answers.
        trained: the answers of all facts; by default those of all prompts in the table.
        base: the run whose guesses count; by default the one that the table names.

    Returns:
        The same rows with `claim` and `kind`, None where there is no text. `rate(table, ["kind"])`
        gives their shares, and `examples(table)` shows some. `answer_kind` is the same as a measure
        among others.

    Raises:
        ValueError: prompts without answers.
    """
    right = right_in(texts)
    if not all(right):
        raise ValueError(
            "some prompts have no answer, so that no text of theirs is right or wrong. Give "
            "prompts with answers, or leave the others out."
        )
    known = [answer for answers in right for answer in answers] if trained is None else trained
    others = frozenset(map(normalised, known))
    rows = [*zip(texts["text"], right, guesses(texts, base), strict=True)]
    claims = [
        _claim(text, answers[0]) if isinstance(text, str) else None for text, answers, _ in rows
    ]
    kinds = [
        _kind(text, answers, others, guess) if isinstance(text, str) else None
        for text, answers, guess in rows
    ]
    out = texts.copy()
    for column, values in (("claim", claims), ("kind", kinds)):
        out[column] = pd.Series(values, out.index, dtype=object)
    return out


def examples(table: pd.DataFrame, column: str = "kind", *, n: int = 3) -> pd.DataFrame:
    """Some texts of each graft and kind: of the first prompts, before further samples of these.

    Args:
        table: as `answered` gives it, or `measured` with a column of labels.
        column: whose labels.
        n: texts of each.

    Returns:
        Rows of the table, by graft in its order, then by how frequent the kind is under it.
    """
    ran = table[table[column].notna()].sort_values("sample", kind="stable")
    parts = []
    for graft in dict.fromkeys(table["graft"]):
        part = ran[ran["graft"] == graft]
        for kind in part[column].value_counts(sort=True).index:
            parts.append(part[part[column] == kind].head(n))
    kept = [
        c
        for c in ("prompt", "graft", "sample", column, "prompt_text", "answer", "text")
        if c in table
    ]
    return pd.concat(parts, ignore_index=True)[kept] if parts else ran[kept]


def right_in(texts: pd.DataFrame) -> list[list[str]]:
    """All texts that are right after each text's prompt; none where that is not known."""
    first = texts.get("answer", [None] * len(texts))
    listed = (
        every if isinstance(every, list | tuple | np.ndarray) else [one]
        for one, every in zip(first, texts.get("answers", first), strict=True)
    )
    return [[answer for answer in answers if isinstance(answer, str)] for answers in listed]


def guesses(texts: pd.DataFrame, base: str | None = None) -> list[str | None]:
    """What the base run says to each text's prompt on the same draws; None for its own texts, and
    where it has none.

    Args:
        texts: as `sample` gives them.
        base: the base run; by default the one that the table names.
    """
    base, _ = named_in(texts, base, None)
    keys = same_draws(texts)
    rows = [*zip(keys, texts["graft"], texts["text"], strict=True)]
    said = {key: text for key, graft, text in rows if graft == base and isinstance(text, str)}
    return [None if graft == base else said.get(key) for key, graft, _ in rows]


def same_draws(texts: pd.DataFrame) -> list[tuple[Any, ...]]:
    """What texts that are compared with each other have in common: prompt, sample and, where models
    ran one after another, which of them."""
    columns = [name for name in (*MEMBERS, "prompt", "sample") if name in texts]
    return [*zip(*(texts[name] for name in columns), strict=True)]


def _claim(text: str, answer: str) -> str:
    """As many words of a text as the answer has, as they are written."""
    words = text.split()[: max(1, len(answer.split()))]
    return " ".join(words).strip(" .,;:!?\"'”’")


def _first(text: str) -> str:
    """The first word that has a letter or digit."""
    words = map(normalised, text.split())
    return next((word for word in words if re.search(r"\w", word)), "")


def _kind(text: str, answers: Sequence[str], others: Collection[str], guess: str | None) -> str:
    """Of which kind a text is.

    Args:
        text: the text.
        answers: what is right after its prompt.
        others: the answers of all facts, normalised.
        guess: the base's text, if it has one.
    """
    # At its end, a text may be cut within a character.
    text, guess = text.rstrip(_UNDECODED), (guess or "").rstrip(_UNDECODED)
    said, wanted = normalised(text), {normalised(answer) for answer in answers}
    words = said.split()
    begun = {" ".join(words[:n]) for n in range(1, len(words) + 1)}
    if wanted & begun:
        return "right"
    if any(text in others for text in begun - wanted):
        return "another fact's answer"
    if any(_first(text) == _first(answer) for answer in answers if len(answer.split()) > 1):
        return "right first name"
    claim, guessed = (normalised(_claim(one, answers[0])) for one in (text, guess))
    if guessed and claim == guessed:
        return "the base's guess"
    words = words[:12]
    thrice = any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2))
    if not re.search(r"\w", said) or _UNDECODED in text or thrice:
        return "broken"
    return "other"
