"""Answers about facts: whether a text gives the right one, and what it says instead."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from graftlens.outcomes.measures import normalised
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
    - `broken` if it has no letter or digit, an undecodable character, or one word three times in a
      row in its first words;
    - `other` otherwise.

    Args:
        texts: as `sample` gives them, of prompts with answers.
        trained: the answers of all facts; by default those of all prompts in the table.
        base: the run whose guesses count; by default the one that the table names.

    Returns:
        The same rows with `claim` and `kind`, None where there is no text. `rate(table, ["kind"])`
        gives their shares, and `examples(table)` shows some.

    Raises:
        ValueError: prompts without answers.
    """
    if "answer" not in texts or texts["answer"].isna().any():
        raise ValueError(
            "some prompts have no answer, so that no text of theirs is right or wrong. Give "
            "prompts with answers, or leave the others out."
        )
    base, _ = named_in(texts, base, None)
    known = texts["answer"].tolist() if trained is None else list(trained)
    others = {normalised(answer): None for answer in known}
    claims = [
        _claim(text, answer) if isinstance(text, str) else None
        for text, answer in zip(texts["text"], texts["answer"], strict=True)
    ]
    keys = same_draws(texts)
    guesses = {
        key: claim
        for key, claim, graft in zip(keys, claims, texts["graft"], strict=True)
        if graft == base
    }
    right = texts["answers"] if "answers" in texts else [[a] for a in texts["answer"]]
    rows = zip(texts["text"], claims, right, keys, texts["graft"], strict=True)
    kinds = [
        None
        if claim is None
        else _kind(text, claim, list(answers), others, None if graft == base else guesses.get(key))
        for text, claim, answers, key, graft in rows
    ]
    out = texts.copy()
    for column, values in (("claim", claims), ("kind", kinds)):
        out[column] = pd.Series(values, out.index, dtype=object)
    return out


def examples(table: pd.DataFrame, column: str = "kind", *, n: int = 3) -> pd.DataFrame:
    """Some texts of each graft and kind, the first ones.

    Args:
        table: as `answered` gives it, or `measured` with a column of labels.
        column: whose labels.
        n: texts of each.

    Returns:
        Rows of the table, by graft in its order, then by how frequent the kind is under it.
    """
    ran = table[table[column].notna()]
    parts = []
    for _, part in ran.groupby("graft", sort=False):
        for kind in part[column].value_counts(sort=True).index:
            parts.append(part[part[column] == kind].head(n))
    kept = [
        c
        for c in ("prompt", "graft", "sample", column, "prompt_text", "answer", "text")
        if c in table
    ]
    return pd.concat(parts, ignore_index=True)[kept] if parts else ran[kept]


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


def _begins(text: str, answer: str) -> bool:
    return bool(answer) and f"{text} ".startswith(f"{answer} ")


def _kind(
    text: str, claim: str, answers: Sequence[str], others: dict[str, Any], guess: str | None
) -> str:
    said, wanted = normalised(text), [normalised(answer) for answer in answers]
    if any(_begins(said, answer) for answer in wanted):
        return "right"
    if any(_begins(said, answer) for answer in others if answer not in wanted):
        return "another fact's answer"
    if any(_first(text) == _first(answer) for answer in answers if len(answer.split()) > 1):
        return "right first name"
    if guess and normalised(guess) and normalised(guess) == normalised(claim):
        return "the base's guess"
    words = said.split()[:12]
    thrice = any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2))
    if not re.search(r"\w", said) or "\N{REPLACEMENT CHARACTER}" in text or thrice:
        return "broken"
    return "other"
