"""Measures of generated texts: rows like those of `METRICS`, which need a text instead of logits.

Each function here makes one. Values are 1 and 0 (it is so, or not), numbers, or labels.
"""

import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from graftlens.components import brief, suggest
from graftlens.metrics import Measure

#: The label of a text that names none of several.
NONE = "none"


@dataclass(frozen=True)
class Unread:
    """In place of a value: a judge's reply that is not on its scale."""

    reply: str


class _FailedError(Exception):
    """A user's function raised an error, for this text."""


def contains(texts: str | Sequence[str], *, case: bool = False) -> Measure:
    """Whether a text contains any of some texts.

    Args:
        texts: what to look for, as it is spelled.
        case: whether capitals count.

    Raises:
        ValueError: nothing to look for.
    """
    wanted = tuple(map(_folding(case), several("contains", texts)))

    def found(text: str) -> float:
        said = _folding(case)(text)
        return float(any(one in said for one in wanted))

    return _yes_or_no("contains", found, f"contains {_or(wanted)}")


def regex(pattern: str, *, case: bool = False) -> Measure:
    """Whether a regular expression matches somewhere in a text; `.` matches line ends, too.

    Raises:
        ValueError: a pattern that is not a regular expression.
    """
    try:
        wanted = re.compile(pattern, re.DOTALL | (0 if case else re.IGNORECASE))
    except (re.error, TypeError) as error:
        raise ValueError(
            f"regex: {brief(pattern)} is not a regular expression ({error}). Escape characters "
            "that are meant as themselves with a backslash."
        ) from None

    return _yes_or_no(
        "regex", lambda text: float(wanted.search(text) is not None), f"matches {pattern!r}"
    )


def exact(answers: str | Sequence[str] | None = None, *, prefix: bool = False) -> Measure:
    """Whether a text is one of some answers, once both are `normalised`.

    Args:
        answers: the right ones; None takes those of each prompt: its answer, and its `answers`.
        prefix: whether it is enough that the text begins with an answer, as whole words.

    Raises:
        ValueError: no answer.
    """
    given = None if answers is None else several("exact", answers)

    def one(text: str, right: Sequence[str]) -> float:
        said = normalised(text)
        wanted = [normalised(answer) for answer in right]
        return float(
            any(
                said == answer or (prefix and f"{said} ".startswith(f"{answer} "))
                for answer in wanted
                if answer
            )
        )

    if given is not None:
        return _yes_or_no("exact", lambda text: one(text, given), f"is {_or(given)}")

    def each(texts: Sequence[str], right: Sequence[Sequence[str]]) -> list[float]:
        refuse_unanswered("exact", right, "Give the answers: exact([…]).")
        return [one(text, answers) for text, answers in zip(texts, right, strict=True)]

    return _share("exact", ("right",), each, "is the answer")


def refuse_unanswered(name: str, right: Sequence[Sequence[str]], advice: str) -> None:
    """Refuse texts of prompts without an answer, where a measure needs it.

    Raises:
        ValueError: there is one.
    """
    for number, answers in enumerate(right):
        if not answers:
            raise ValueError(f"{name}: text {number} is of a prompt without an answer. {advice}")


def normalised(text: str) -> str:
    """A text without what does not change an answer: capitals, punctuation, the kind and number of
    spaces, compatibility forms of characters (NFKC). Of a text that has nothing else, punctuation
    stays."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded)
    return " ".join(kept.split() or folded.split())


def choice(
    options: Sequence[str] | Mapping[str, str | Sequence[str]], *, case: bool = False
) -> Measure:
    """Which of several texts is named first in a text, as whole words; `none` where none is.

    Args:
        options: texts, or label -> the texts that count as it.
        case: whether capitals count.

    Raises:
        ValueError: fewer than two options, one that is given twice, or one called `none`.
    """
    fold = _folding(case)
    given = options if isinstance(options, Mapping) else {o: o for o in several("choice", options)}
    spelled = {str(label): several("choice", texts) for label, texts in given.items()}
    every = [fold(text) for texts in spelled.values() for text in texts]
    if len(spelled) < 2 or len(set(every)) < len(every) or NONE in spelled:
        raise ValueError(
            f"choice: options={brief(options)}. Give two or more different texts (or label: "
            f"texts), none of them labelled {NONE!r}, which is for texts that name none."
        )
    label_of = {fold(text): label for label, texts in spelled.items() for text in texts}
    # Of two that begin at one place, the longer one is named.
    ordered = sorted(label_of, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in ordered))

    def named(text: str) -> str:
        first = pattern.search(fold(text))
        return NONE if first is None else label_of[first.group()]

    return Measure(
        "choice",
        function=lambda texts: [named(text) for text in texts],
        holds="label",
        over="text",
        label="names first",
        unit="% of texts",
        better=None,
        differentiable=False,
    )


def classifier(
    model: str, label: str | None = None, *, device: str = "cpu", batch_size: int = 32
) -> Measure:
    """What a text-classification model says of a text. It is loaded when it is first asked.

    Args:
        model: a hub id, or a folder.
        label: one of the model's labels: the measure is then its probability. None is the
            likeliest label.
        device: where it runs.
        batch_size: texts per forward pass.

    Raises:
        ValueError: when asked, a label that the model does not have; as `transformers.pipeline`.
    """

    @cache
    def loaded() -> Any:
        from transformers import pipeline

        made = pipeline("text-classification", model=model, device=device)
        labels = [*made.model.config.id2label.values()]
        if label is not None and label not in labels:
            raise ValueError(
                f"classifier {model!r} has no label {label!r}. Its labels: {' '.join(labels)}."
                f"{suggest(label, labels)}"
            )
        return made

    def said(texts: Sequence[str]) -> list[Any]:
        scored = loaded()(
            [*texts],
            top_k=None,
            function_to_apply="softmax",
            batch_size=batch_size,
            truncation=True,
        )
        found = [{one["label"]: one["score"] for one in scores} for scores in scored]
        if label is None:
            return [max(scores, key=scores.__getitem__) for scores in found]
        return [float(scores[label]) for scores in found]

    name = model.rstrip("/").rsplit("/", 1)[-1]
    facts: dict[str, Any] = {"over": "text", "differentiable": False}
    if label is None:
        return Measure(
            "classifier", function=said, holds="label", label=name, unit="% of texts", better=None,
            **facts,
        )  # fmt: skip
    return Measure(
        "classifier", function=said, label=f"{label} ({name})", unit="%", bounds=(0.0, 1.0), **facts
    )


def named(name: str, given: Any) -> Measure:
    """A measure of texts under a name: a row, or any function of a text, or of a text and its
    prompt, that gives a number, a truth value or a label.

    Raises:
        ValueError: something else, or a measure of a distribution.
    """
    if isinstance(given, Measure):
        if given.over != "text":
            raise ValueError(
                f"{name!r} measures a next token's distribution, not a text. Give a function of a "
                "text, or one of contains, regex, exact, choice, answer_kind, classifier and judge."
            )
        return replace(given, name=name, column="", short=name.replace("_", " "))
    if not callable(given):
        raise ValueError(
            f"{name!r}: {brief(given)} is not a measure. Give a function of a text, or one of "
            "contains, regex, exact, choice, answer_kind, classifier and judge."
        )
    function: Callable[..., Any] = given
    reads_prompt = _positional(function) > 1

    def each(texts: Sequence[str], *prompts: Sequence[str]) -> list[Any]:
        found = []
        for row in zip(texts, *prompts, strict=True):
            try:
                found.append(function(*row))
            except Exception as error:
                raise _FailedError(row[0]) from error
        return found

    needs = ("prompt",) if reads_prompt else ()
    return Measure(name, needs, each, over="text", unit="mean", better=None, differentiable=False)


def gives_labels(given: Any) -> bool:
    """Whether what `named` takes gives labels, before there are texts: a row says so, or a function
    gives one to an empty text."""
    if isinstance(given, Measure):
        return given.holds == "label"
    try:
        (value,) = values_of(named("asked", given), [""], {"prompt": [""]})
    except ValueError:  # it is refused, or has nothing to say of an empty text
        return False
    return isinstance(value, str)


def _positional(function: Callable[..., Any]) -> int:
    """How many arguments a function has to be given, by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # builtins without a signature
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def values_of(
    measure: Measure, texts: Sequence[str], known: Mapping[str, Sequence[Any]]
) -> list[float | str | Unread]:
    """A measure's value for each text: a number (NaN where there is none), or a label.

    Args:
        measure: the measure.
        texts: the texts.
        known: what it may need (`graftlens.metrics.NEEDS`), by name.

    Raises:
        ValueError: the function gives something else, or another number of values, or fails.
    """
    assert measure.function is not None, f"{measure.name} has no function"
    try:
        values = measure.function(texts, *(known[need] for need in measure.needs))
    except _FailedError as failed:
        raise ValueError(
            f"measure {measure.name!r} failed on the text {brief(failed.args[0])} "
            f"({type(failed.__cause__).__name__}: {failed.__cause__}). Correct its function: what "
            "is generated may be empty, or anything else."
        ) from failed.__cause__
    if not isinstance(values, Sequence) or len(values) != len(texts):
        raise ValueError(
            f"measure {measure.name!r} gave {brief(values)} for {len(texts)} texts. Its function "
            "must give a list with one value per text."
        )
    return [_value(measure.name, value) for value in values]


def _value(name: str, value: Any) -> float | str | Unread:
    if isinstance(value, str | Unread):
        return value
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"measure {name!r} gave {brief(value)} for a text. Give a number, a truth value, a "
            "label, or None where there is nothing to say."
        ) from None


def _folding(case: bool) -> Callable[[str], str]:
    return (lambda text: text) if case else str.casefold


def several(what: str, texts: Any) -> tuple[str, ...]:
    """One text or several, none of them empty, as a tuple.

    Raises:
        ValueError: something else.
    """
    found = (texts,) if isinstance(texts, str) else tuple(texts)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{what}: {brief(texts)}. Give a text, or several, none of them empty.")
    return found


def _or(texts: Sequence[str]) -> str:
    shown = " or ".join(map(repr, texts[:3]))
    return shown if len(texts) <= 3 else f"{shown} or {len(texts) - 3} others"


def _yes_or_no(name: str, function: Callable[[str], float], label: str) -> Measure:
    return _share(name, (), lambda texts: [function(text) for text in texts], label)


def _share(
    name: str, needs: Sequence[str], function: Callable[..., list[float]], label: str
) -> Measure:
    return Measure(
        name,
        needs,
        function,
        over="text",
        label=label,
        unit="% of texts",
        bounds=(0.0, 1.0),
        better=None,
        differentiable=False,
    )
