"""Token positions as expressions over the spans of a prompt: the `at` of a rule.

``+`` is union, ``&`` intersection, ``~`` complement, ``(…)`` groups, ``[0, -1]`` names token
positions of the prompt, ``[3 % 64]`` those that are 3 modulo 64 (a short prompt may have none).
``name#2`` is the second occurrence of a span that occurs more than once, ``name#-1`` the last.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from graftlens.components import (
    brief,
    cut,
    suggest,
)

#: Span name -> its occurrences, each a tuple of token positions, in order.
Spans = Mapping[str, Sequence[Sequence[int]]]

#: How deep ~ and parentheses may be nested, far beyond what anyone writes.
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<span>[^\s+&~()\[\]#]+)(?:#(?P<number>-?[0-9]{1,9}))?|(?P<list>\[[^\]]*\])|(?P<op>[+&~()]))"
)


_MODULO = re.compile(r"\[\s*([0-9]{1,9})\s*%\s*([0-9]{1,9})\s*\]")


class At(ABC):
    """A set of token positions, written over the spans of a prompt. Build one with `At.parse`."""

    @staticmethod
    def parse(text: "str | int | Sequence[int] | At") -> "At":
        """Read an expression such as ``"~(first_entity + last)"``, or a list of positions.

        Raises:
            ValueError: text that is not such an expression; the message points at the place.
        """
        if isinstance(text, At):
            return text
        if isinstance(text, str):
            return _parse_expression(text)
        if isinstance(text, int | np.integer) and not isinstance(text, bool):
            return Positions((int(text),))
        if isinstance(text, Sequence | np.ndarray):
            return Positions(integers(text, "at"))
        raise ValueError(
            f'at={brief(text)} is not a position. Write spans ("first_entity + last"), '
            "or token positions ([0, -1])."
        )

    @abstractmethod
    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        """Which of `total` positions this selects in a prompt of `length` tokens.

        `total` exceeds `length` where generated or scored tokens follow the prompt; numbers below
        zero count back from the prompt's own end.

        Raises:
            ValueError: a span or occurrence that the prompt lacks, or a position outside it.
        """

    @abstractmethod
    def names(self) -> frozenset[str]:
        """The spans that the expression mentions."""

    @abstractmethod
    def counts_from_the_end(self) -> bool:
        """Whether the selection depends on where the prompt ends."""

    def may_be_empty(self) -> bool:
        """Whether it is meant to select nothing in some prompts; all others are refused there."""
        return False


@dataclass(frozen=True)
class Span(At):
    """All occurrences of a named span, or one: the `occurrence`-th from 1, or from -1, the last."""

    name: str
    occurrence: int | None = None

    def __str__(self) -> str:
        return self.name if self.occurrence is None else f"{self.name}#{self.occurrence}"

    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        if self.name == "turn" and "template" in spans and "turn" not in spans:
            raise ValueError(
                "no span 'turn' here: where each message ends under this chat template cannot be "
                "told. Use the roles and template instead."
            )
        if self.name == "generated" and "generated" not in spans:
            raise ValueError(
                "'generated' are the tokens that a model adds to a prompt, and here it adds none: "
                "the prompt alone runs. Name the position that the next token is read from, "
                "`last`, or generate (outcomes.sample, model.generate)."
            )
        if self.name not in spans:
            raise ValueError(
                f"no span {brief(self.name)} here. Spans of this prompt: {' '.join(spans)}."
                f"{suggest(self.name, spans)}"
            )
        found = spans[self.name]
        if self.occurrence is not None and not found:
            raise ValueError(
                f"no occurrence {self}: no message here is {self.name}'s. Leave it out."
            )
        if self.occurrence is not None and not 1 <= abs(self.occurrence) <= len(found):
            raise ValueError(
                f"no occurrence {self}: span {self.name!r} occurs {len(found)} time(s) in this "
                f"prompt. Write {self.name}#1"
                f"{f' to {self.name}#{len(found)}' if len(found) > 1 else ''}, "
                f"or {self.name} for all of them."
            )
        if self.occurrence is not None:
            found = [found[self.occurrence - (self.occurrence > 0)]]
            if not found[0]:
                raise ValueError(
                    f"{self} holds no token: that message is empty. Write another number, or "
                    f"{self.name} for all of them."
                )
        chosen = np.zeros(total or length, dtype=bool)
        for positions in found:
            chosen[list(positions)] = True
        return chosen

    def names(self) -> frozenset[str]:
        return frozenset({self.name})

    def counts_from_the_end(self) -> bool:
        return self.name == "last"


@dataclass(frozen=True)
class Positions(At):
    """Explicit token positions; below zero they count back from the prompt's last token."""

    positions: tuple[int, ...]

    def names(self) -> frozenset[str]:
        return frozenset()

    def __post_init__(self) -> None:
        if not self.positions:
            raise ValueError("at=[] does not name a position. Write at least one, such as [0, -1].")

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self.positions)) + "]"

    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        chosen = np.zeros(total or length, dtype=bool)
        for position in self.positions:
            if not -length <= position < length:
                raise ValueError(
                    f"position {position} is outside the prompt, which has {length} tokens. "
                    f"Write a number from {-length} to {length - 1}."
                )
            chosen[position % length] = True
        return chosen

    def counts_from_the_end(self) -> bool:
        return any(p < 0 for p in self.positions)


@dataclass(frozen=True)
class Modulo(At):
    """The positions p with p % divisor = remainder; a short prompt may have none.

    What follows a prompt counts as its last token.
    """

    remainder: int
    divisor: int

    def __post_init__(self) -> None:
        if not 0 <= self.remainder < self.divisor:
            raise ValueError(
                f"at={self}: no position is {self.remainder} modulo {self.divisor}. Write a number "
                f"from 0 to {self.divisor - 1} before the %."
            )

    def __str__(self) -> str:
        return f"[{self.remainder} % {self.divisor}]"

    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        positions = np.minimum(np.arange(total or length), length - 1)
        return positions % self.divisor == self.remainder

    def names(self) -> frozenset[str]:
        return frozenset()

    def counts_from_the_end(self) -> bool:
        return False

    def may_be_empty(self) -> bool:
        return True


@dataclass(frozen=True)
class Several(At):
    """Union (`+`) or intersection (`&`) of two or more expressions."""

    operator: str
    terms: tuple[At, ...]

    def __post_init__(self) -> None:
        # (a + b) + c is a + b + c, so that equal texts are equal values.
        flat = [
            t
            for term in self.terms
            for t in (
                term.terms
                if isinstance(term, Several) and term.operator == self.operator
                else (term,)
            )
        ]
        object.__setattr__(self, "terms", tuple(dict.fromkeys(flat)))

    def __str__(self) -> str:
        return f" {self.operator} ".join(
            f"({t})" if isinstance(t, Several) else str(t) for t in self.terms
        )

    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        selections = [term.select(spans, length, total) for term in self.terms]
        combine = np.logical_or if self.operator == "+" else np.logical_and
        return combine.reduce(selections)

    def names(self) -> frozenset[str]:
        return frozenset().union(*(t.names() for t in self.terms))

    def counts_from_the_end(self) -> bool:
        return any(t.counts_from_the_end() for t in self.terms)

    def may_be_empty(self) -> bool:
        return any(t.may_be_empty() for t in self.terms)


@dataclass(frozen=True)
class Complement(At):
    """Every position that `term` does not select, the BOS position included."""

    term: At

    def __str__(self) -> str:
        return f"~({self.term})" if isinstance(self.term, Several) else f"~{self.term}"

    def select(
        self, spans: Spans, length: int, total: int | None = None
    ) -> Bool[np.ndarray, "pos"]:
        return ~self.term.select(spans, length, total)

    def names(self) -> frozenset[str]:
        return self.term.names()

    def counts_from_the_end(self) -> bool:
        return self.term.counts_from_the_end()

    def may_be_empty(self) -> bool:
        return self.term.may_be_empty()


def integers(values: Any, what: str) -> tuple[int, ...]:
    """Distinct whole numbers of a list, in order; `what` is what a message calls it."""
    numbers = []
    for value in values:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise ValueError(
                f"{what}={brief(values)}: {brief(value)} is not a whole number. "
                'A list holds whole numbers; write names and ranges as text, such as "0-3".'
            )
        numbers.append(int(value))
    return tuple(dict.fromkeys(numbers))


def _parse_expression(text: str) -> At:
    tokens: list[tuple[str, At | str]] = []
    place, length = 0, len(text.rstrip())
    while place < length:
        match = _TOKEN.match(text, place)
        # Spans are named like a template's fields, in any script.
        if match is None or (match["span"] and not match["span"].isidentifier()):
            raise _syntax(text, place, "a span, [positions], +, &, ~ or parentheses")
        if match["span"]:
            if match["number"] is not None and not int(match["number"]):
                raise _syntax(
                    text, match.start("number"), "the number of an occurrence, from 1 or from -1,"
                )
            tokens.append(
                ("term", Span(match["span"], int(match["number"]) if match["number"] else None))
            )
        elif match["list"] and (numbers := _MODULO.fullmatch(match["list"])):
            tokens.append(("term", Modulo(int(numbers[1]), int(numbers[2]))))
        elif match["list"]:
            pieces = [piece.strip() for piece in match["list"][1:-1].split(",")]
            if not all(re.fullmatch(r"-?[0-9]{1,9}", piece) for piece in pieces):
                raise _syntax(text, match.start("list"), "whole numbers, such as [0, -1]")
            tokens.append(("term", Positions(integers([int(p) for p in pieces], "at"))))
        else:
            tokens.append((match["op"], match["op"]))
        place = match.end()

    cursor = 0

    def peek() -> str:
        return tokens[cursor][0] if cursor < len(tokens) else "end"

    def take() -> At | str:
        nonlocal cursor
        cursor += 1
        return tokens[cursor - 1][1]

    def several(operator: str, operand: Any) -> At:
        terms = [operand()]
        while peek() == operator:
            take()
            terms.append(operand())
        joined = Several(operator, tuple(terms))
        return joined if len(joined.terms) > 1 else joined.terms[0]

    def union() -> At:
        return several("+", lambda: several("&", atom))

    depth = 0

    def atom() -> At:
        nonlocal depth
        kind = peek()
        if kind in ("~", "("):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"at={brief(text)}: ~ and parentheses are nested more than {MAX_DEPTH} deep. "
                    "Write the positions more simply."
                )
            take()
            inner = Complement(atom()) if kind == "~" else union()
            if kind == "(":
                if peek() != ")":
                    raise ValueError(f"at={brief(text)}: a parenthesis is not closed.")
                take()
            depth -= 1
            return inner
        if kind == "term":
            term = take()
            assert isinstance(term, At)
            return term
        raise ValueError(
            f"at={brief(text)}: a span or [positions] is missing "
            f"{'at the end' if kind == 'end' else f'before {kind!r}'}. "
            'Write, for example, "first_entity + last" or "~(first_entity + last)".'
        )

    result = union()
    if peek() != "end":
        raise ValueError(
            f"at={brief(text)}: nothing joins {cut(str(tokens[cursor][1]), 200)} to what comes "
            "before it. Join with + or &."
        )
    return result


def _syntax(text: str, place: int, wanted: str) -> ValueError:
    return ValueError(f"at={brief(text)}: expected {wanted} at {brief(text[place:].strip())}.")
