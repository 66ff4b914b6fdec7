"""Where each message of a conversation begins and ends, with the markers that a template writes.

What stands between two messages ends the first and begins the second. Which part is which shows
where the template writes one without the other: a message alone, or the conversation so far.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

#: Where a text stands in a list of messages.
Leaf = tuple[Any, ...]


@runtime_checkable
class Rendering(Protocol):
    """A conversation under one template, and what is known of its characters.

    Attributes:
        plain: what the template writes.
        messages: the conversation, a given beginning of the answer included.
        known: (text, boundary in it) -> where that comes out; None where it does not.
        marks: characters that the conversation lacks.
        open: the last message goes on.
        prompted: a generation prompt follows.
    """

    tokenizer: Any
    plain: str
    messages: list[Any]
    known: dict[tuple[Leaf, int], int | None]
    marks: list[str]
    open: bool
    prompted: bool

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continued: bool = False,
        prompted: bool = False,
    ) -> str:
        """What the template writes of some messages."""

    def marked(self, marks: Mapping[tuple[Leaf, int], str]) -> list[Any]:
        """The messages with a mark at each of these boundaries."""


def mixed(first: int, second: int) -> str:
    """What is wrong where the texts of two messages cannot be told apart."""
    first, second = sorted((first, second))
    return (
        f"the chat template mixes the texts of messages[{first}] and messages[{second}], so their "
        "tokens cannot be told apart. Use a template that writes one after the other."
    )


class Turns:
    """The turns of a conversation whose characters' messages are known."""

    def __init__(self, rendering: Rendering, owners: Sequence[int]) -> None:
        self.of, self.plain = rendering, rendering.plain
        self.messages, self.known = rendering.messages, rendering.known
        self.mark, self.other = rendering.marks[:2]
        self.heads: dict[str, str] = {}
        self.extents: dict[int, tuple[int, int]] = {}
        for (leaf, _), place in self.known.items():
            if place is not None:
                self.extend(leaf[0], place, place)
        for place, owner in enumerate(owners):
            if owner >= 0:
                self.extend(owner, place, place + 1)
        for number, message in enumerate(self.messages):
            if number not in self.extents and message.get("content") == "":
                self.place_empty(number)

    def extend(self, number: int, start: int, end: int) -> None:
        """Note that a message is there."""
        low, high = self.extents.get(number, (start, end))
        self.extents[number] = min(low, start), max(high, end)

    def place_empty(self, number: int) -> None:
        """Where an empty message is whose template looks whether it is empty."""
        messages = list(self.messages)
        messages[number] = {**messages[number], "content": self.mark}
        before, after = self.halves(messages, self.of.open, self.of.prompted)
        if after is None or not before or not self.plain.startswith(before):
            return
        rest = self.plain[len(before) :]
        # What is written instead of it, `(empty)`, is there too.
        self.extend(
            number, len(before), len(self.plain) - len(after) if rest.endswith(after) else 0
        )

    def halves(
        self, messages: Sequence[Any], continued: bool = False, prompted: bool = False
    ) -> tuple[str, str | None]:
        """What is written before and after the mark; ("", None) where it is not written once."""
        try:
            before, *after = self.of.apply(messages, continued=continued, prompted=prompted).split(
                self.mark
            )
        except ValueError:
            return "", None
        return (before, after[0]) if len(after) == 1 else ("", None)

    def found(self) -> tuple[tuple[int, int], ...] | None:
        """(start, end) of each message with its markers, the generation prompt last.

        What the template writes before the first message (a default system prompt, tools) is in no
        turn, as far as it can be told from the message's own marker. None where a message's end
        cannot be told.

        Raises:
            ValueError: messages that overlap.
        """
        order = sorted(self.extents, key=lambda number: (*self.extents[number], number))
        for a, b in pairwise(order):
            if self.extents[a][1] > self.extents[b][0]:
                raise ValueError(mixed(a, b))
        found, given, start = [], -1, self.first(order) if order else 0
        for place, number in enumerate(order):
            given = max(given, number)
            last = place + 1 == len(order)
            high = self.extents[number][1]
            if last:
                more = self.prompt(given, number)
            else:
                gap = self.plain[high : self.extents[order[place + 1]][0]]
                tail = self.tail(given, number)
                more = self.cut(given, number, gap, order[place + 1], tail)
                if tail is None and more is None:
                    continue  # merged: the next message shares this turn
            if more is None:
                return None
            if start < high + more:
                found.append((start, high + more))
            start = high + more
        if order and start < len(self.plain):
            found.append((start, len(self.plain)))
        return tuple(found)

    def first(self, order: Sequence[int]) -> int:
        """Where the first turn begins."""
        first = order[0]
        bos = getattr(self.of.tokenizer, "bos_token", None) or ""
        asked = next((n for n in order if self.messages[n]["role"] == "user"), first)
        own = self.own_marker(asked)
        if own.strip() and asked == first and own in self.plain[: self.extents[first][0]]:
            return self.plain.index(own)  # after it may be tools
        # Some templates begin every turn with the BOS token, most only the text.
        return len(bos) if self.plain.startswith(bos) and bos not in own else 0

    def cut(
        self, given: int, number: int, gap: str, following: int, tail: str | None
    ) -> int | None:
        """How much of what is between two messages is the first one's; None where it isn't told."""
        role = self.messages[following]["role"]
        if tail is None:
            marker = self.own_marker(following)
            return gap.index(marker) if marker.strip() and marker in gap else None
        if begins := self.begins(gap, role):
            return len(gap) - len(begins)
        return self.ending(gap, tail, self.others(given, number, role))

    def begins(self, gap: str, role: str) -> str:
        """What begins a message that comes after `gap`, where it is all that begins one alone."""
        head = self.head(role)
        bos = getattr(self.of.tokenizer, "bos_token", None) or ""
        # A template's own last newline is not written.
        heads = (head, head.removeprefix(bos))
        found = [text.removesuffix(end) for end in ("", "\n") for text in heads]
        return next((text for text in found if text.strip() and gap.endswith(text)), "")

    def ending(self, gap: str, tail: str, others: Sequence[str]) -> int | None:
        """How much of a text ends a message, which ends with `tail` if it is the last one.

        Args:
            gap: what is written after the message.
            tail: what is written after it where it is the last one.
            others: what is written between it and messages of other roles.
        """
        if shared := self.shared(tail, gap):
            return shared
        # The last one ends otherwise: what comes next begins with a token of its own.
        common = len(gap)
        for other in others:
            common = min(common, self.common(gap, other))
        if not others:
            common = 0
        places = {
            place
            for word in self.special
            for place in range(1, common)
            if word and gap.startswith(word, place) and place + len(word) <= common
        }
        if places:
            return max(places)
        return 0 if not tail and not any(c.isalnum() for c in gap[:common]) else None

    def others(self, given: int, number: int, role: str) -> list[str]:
        """What is written between a message and ones of other roles than this."""
        found = []
        for other in ("user", "assistant", "tool", "system"):
            if other != role:
                messages = self.messages[: given + 1]
                messages[number] = self.with_mark(number, last=True)
                messages.append({"role": other, "content": self.other})
                _, after = self.halves(messages)
                if after is not None and self.other in after:
                    found.append(self.rest_of(number, after.partition(self.other)[0]))
        return found

    def prompt(self, given: int, number: int) -> int | None:
        """How much of what follows the last message is its own; the rest asks for an answer."""
        rest = self.plain[self.extents[number][1] :]
        tail = self.tail(given, number)
        if not rest or tail is None:
            return 0 if self.of.prompted else len(rest)
        begins = self.begins(rest, "assistant")
        if tail == rest:
            if self.of.open:
                return len(rest)
            # The template writes the same whether it is asked for an answer or not.
            asks = self.others(given, number, "user")
            again = self.others(given, number, "assistant")
            if any(other.startswith(rest) for other in again[:1]) or not again or not asks:
                return len(rest)
            if begins:
                return len(rest) - len(begins)
            if not asks[0].startswith(rest):
                return len(rest)
            shared = self.shared(again[0], rest)
            return shared or len(rest)
        if not self.of.prompted:
            return len(rest)
        if tail and rest.startswith(tail):
            return len(tail)
        if begins:
            return len(rest) - len(begins)
        return self.ending(rest, tail, self.others(given, number, "assistant"))

    def tail(self, given: int, number: int) -> str | None:
        """What is written after a message where messages up to the number `given` are all.

        None where the template refuses them, or leaves the message out.
        """
        messages = self.messages[: given + 1]
        messages[number] = self.with_mark(number, last=True)
        _, after = self.halves(messages)
        return None if after is None else self.rest_of(number, after)

    def rest_of(self, number: int, after: str) -> str:
        """What follows a message's text, of what follows its last mark."""
        end = self.extents[number][1]
        places = [p for (leaf, _), p in self.known.items() if leaf[0] == number and p is not None]
        here = self.plain[max(places) : end] if places else ""
        return after.removeprefix(here)

    def head(self, role: str) -> str:
        """What is written before a message that is the only one; empty where there cannot be."""
        if role not in self.heads:
            self.heads[role] = self.halves([{"role": role, "content": self.mark}])[0]
        return self.heads[role]

    def own_marker(self, number: int) -> str:
        """What begins a message of the user's, learnt from a second one like it.

        Of other messages nothing is known, as templates may refuse a second one.
        """
        message = self.messages[number]
        if message["role"] != "user":
            return ""
        answered = [message, {"role": "assistant", "content": f"x{self.other}"}]

        def between(*more: Any) -> str | None:
            before, after = self.halves([*answered, *more])
            return None if after is None else before.partition(self.other)[2]

        gap = between(self.with_mark(number, last=False))
        try:
            tail = self.of.apply(answered).partition(self.other)[2]
        except ValueError:
            return ""
        if gap is None:
            return ""
        others = [between({"role": r, "content": self.mark}) for r in ("assistant", "tool")]
        if begins := self.begins(gap, "user"):
            return begins
        cut = self.ending(gap, tail, [other for other in others if other is not None])
        return "" if cut is None else gap[cut:]

    def common(self, one: str, other: str) -> int:
        """How many characters two texts begin with in common, cutting no special token.

        Else `</s>`, which ends a whole conversation, and `<|user|>` had a character in common.
        """
        pairs = enumerate(zip(one, other, strict=False))
        cut = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
        for word in self.special:
            for written in (one, other):
                start = written.rfind(word, 0, cut + len(word) - 1)
                if 0 <= start < cut < start + len(word):
                    cut = start
        return cut

    def shared(self, tail: str, text: str) -> int:
        """How many characters of a message's end two texts begin with in common."""
        cut = self.common(tail, text)
        # No marker is cut that is not a token of its own: `<|user|>` and `<|assistant|>`.
        while 0 < cut < len(tail) and not text[cut - 1].isspace():
            if any(rest.startswith(self.special) for rest in (tail[cut:], text[cut:])):
                break
            if text[:cut].endswith(self.special):
                break
            cut -= 1
        return cut

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts that the tokenizer has special or added tokens for."""
        tokenizer = self.of.tokenizer
        return (*{*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()},)

    def with_mark(self, number: int, *, last: bool) -> dict[str, Any]:
        """A message with a mark at the last or the first of its boundaries that come out."""
        there = [
            (place, leaf, j)
            for (leaf, j), place in self.known.items()
            if leaf[0] == number and place is not None
        ]
        if not there:  # an empty one
            return {**self.messages[number], "content": self.mark}
        _, leaf, j = max(there) if last else min(there)
        marked: dict[str, Any] = self.of.marked({(leaf, j): self.mark})[number]
        return marked
