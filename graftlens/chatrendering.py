"""What a chat template writes of a conversation, and which message each character is from.

Characters are traced, never searched for. The template is run again with marks (characters that
occur nowhere else) between the characters of the messages. Where it writes the same text apart from
the marks, they show where each character went. So contents may quote role names, markers or the
template's own syntax, and templates may trim contents, merge messages or leave parts out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html import escape
from itertools import chain, groupby, islice, pairwise
from typing import Any

from jinja2 import TemplateSyntaxError

from graftlens.chat import REASONING, Conversation, at_keys, texts
from graftlens.chatturns import Turns, as_seen, reads, write
from graftlens.components import brief

#: What begins and ends a thought inside an assistant's content.
_OPENING = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]")
_CLOSING = ("</think>", "</thinking>", "</thought>", "</reasoning>", "[/THINK]")

#: The keys that lead to a text in a list of messages.
Leaf = tuple[Any, ...]

#: Renderings at most until a template counts as one that cannot be followed, and marks in one.
_MOST_RENDERINGS, _MOST_MARKS = 4000, 50_000


@dataclass(frozen=True)
class Rendered:
    """What a chat template wrote, and which message each character is from.

    Attributes:
        text: what the model reads.
        owners: per character, the number of the message that it is from; -1 for the template's.
        places: per message, for each of its `texts`, where each of that text's characters is; None
            for one that the template left out.
        turns: (start, end) of each message with its markers, in the order of the text; the
            generation prompt is the last one. None where a message's end cannot be told.
        roles: who speaks in each message.
    """

    text: str
    owners: tuple[int, ...]
    places: tuple[tuple[tuple[tuple[int, int] | None, ...], ...], ...]
    turns: tuple[tuple[int, int], ...] | None
    roles: tuple[str, ...]


def render(
    conversation: Conversation, tokenizer: Any, messages: Sequence[Mapping[str, Any]] | None = None
) -> Rendered:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        conversation: the conversation.
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: the conversation's messages with their fields filled in, the prefill as the last
            one; left out, they are taken as they are.

    Raises:
        ValueError: a tokenizer without a chat template; a template that refuses the conversation,
            leaves out a message, mixes the texts of several, writes the time of day, or decides by
            a message's text what becomes of it in a way that cannot be followed.
    """
    for _ in range(2):
        rendering = _Rendering(conversation, tokenizer, messages)
        try:
            if not rendering.moves():
                return rendering.rendered()
        except ValueError:
            if not rendering.moves():
                raise
    raise ValueError(
        "the chat template writes the time of day, so its tokens change from one call to the next. "
        "Give the time by an option that the template reads, or use a template without it."
    )


def date_options(conversation: Conversation, tokenizer: Any) -> list[str] | None:
    """The options by which a chat template that writes the day's date here takes another date.

    Returns:
        Their names; None where it does not write the day's date.
    """
    given = conversation.as_given()
    try:
        source = str(tokenizer.get_chat_template(None, given["tools"]))
    except ValueError:  # several templates, of which none is meant: `render` says so
        return None
    if "strftime_now" not in source:
        return None
    messages = as_seen([*given["messages"], *filter(None, [conversation.begun])])
    options = {**tokenizer.special_tokens_map, **given["template_options"]}
    options["add_generation_prompt"] = conversation.generation_prompt
    written = [
        write(source, messages, given["tools"], options | {"strftime_now": day.strftime})
        for day in (datetime(2001, 2, 3, 4, 5, 6), datetime(2019, 11, 28, 17, 48, 39))
    ]
    if written[0] is not None and written[0] == written[1]:
        return None
    return sorted(name for name in reads(source) if "date" in name.lower())


class _Rendering:
    """One conversation under one template."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template, so it cannot write a "
                "conversation. Give one: GraftedTransformer.from_pretrained(…, chat_template=…), "
                "or in a sweep the key chat_template."
            )
        self.tokenizer, self.given = tokenizer, conversation.as_given()
        begun = conversation.begun
        self.open = begun is not None
        self.prompted = conversation.generation_prompt
        self.messages = conversation.messages if messages is None else list(messages)
        if messages is None and begun is not None:
            self.messages.append(begun)
        self.plain = self.apply(self.messages, continued=self.open, prompted=self.prompted)
        self.leaves = [
            (i, *path) for i, message in enumerate(self.messages) for path in texts(message)
        ]
        used = set(self.plain).union(*(self.text_of(leaf) for leaf in self.leaves))
        private = map(chr, chain(range(0xF0002, 0xFFFFE), range(0x100000, 0x10FFFE)))
        count = sum(len(self.text_of(leaf)) + 1 for leaf in self.leaves) + len(self.messages) + 8
        unused = (character for character in private if character not in used)
        self.marks = list(islice(unused, min(count, _MOST_MARKS)))
        self.renderings = 0
        #: (leaf, boundary) -> where a mark there comes out; None where the template drops it. A
        #: boundary that is not in here cannot be marked without changing what is written.
        self.known: dict[tuple[Leaf, int], int | None] = {}

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continued: bool = False,
        prompted: bool = False,
    ) -> str:
        """What the template writes."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.given["tools"],
                tokenize=False,
                continue_final_message=continued,
                **self.given["template_options"] | {"add_generation_prompt": prompted},
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message})."
            ) from None
        except Exception as error:  # a template raises whatever its author wrote
            if continued:
                self.apply(messages)  # that may say what is wrong
                begun = messages[-1]["content"] or next(
                    str(messages[-1][key]) for key in REASONING if key in messages[-1]
                )
                raise ValueError(
                    "the chat template does not write how the assistant's answer begins "
                    f"({brief(begun)}) as it is given. Leave that out, or use a template that "
                    "writes it."
                ) from None
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses this conversation: {said}") from None
        return str(text)

    def moves(self) -> bool:
        """Whether the template writes something else by now."""
        return "strftime_now" in self.source and self.plain != self.apply(
            self.messages, continued=self.open, prompted=self.prompted
        )

    def text_of(self, leaf: Leaf) -> str:
        """The text that the leaf leads to."""
        return str(at_keys(self.messages, leaf))

    def marked(self, marks: Mapping[tuple[Leaf, int], str]) -> list[Any]:
        """The messages with a mark at each of these boundaries."""
        copied: list[Any] = json.loads(json.dumps(self.messages))
        by_leaf: dict[Leaf, list[int]] = {}
        for leaf, boundary in marks:
            by_leaf.setdefault(leaf, []).append(boundary)
        for leaf, boundaries in by_leaf.items():
            text, pieces, done = self.text_of(leaf), [], 0
            for boundary in sorted(boundaries):
                pieces += [text[done:boundary], marks[leaf, boundary]]
                done = boundary
            at_keys(copied, leaf[:-1])[leaf[-1]] = "".join([*pieces, text[done:]])
        return copied

    # -- which message each character is from ------------------------------------------------------

    def find(self, boundaries: Sequence[tuple[Leaf, int]]) -> None:
        """Learn where marks at these boundaries come out.

        All at once where that changes nothing else; else by halves, as only a few do: inside white
        space that is trimmed, or inside a text that the template looks for.
        """
        if len(boundaries) > len(self.marks):
            for start in range(0, len(boundaries), len(self.marks)):
                self.find(boundaries[start : start + len(self.marks)])
        elif boundaries and not self.come_out(boundaries) and len(boundaries) > 1:
            half = len(boundaries) // 2
            self.find(boundaries[:half])
            self.find(boundaries[half:])

    def find_outer(self, boundaries: Sequence[tuple[Leaf, int]]) -> None:
        """Learn where marks in the white space at an end come out, which the template may trim.

        Args:
            boundaries: from the text outwards.
        """
        boundaries = boundaries[: len(self.marks)]
        if not boundaries or self.come_out(boundaries):
            return
        low, high = 0, len(boundaries)  # the first `low` come out, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.come_out(boundaries[:middle]) else (low, middle)

    def come_out(self, boundaries: Sequence[tuple[Leaf, int]]) -> bool:
        """Whether marks at these boundaries change nothing else; then where they are is noted."""
        self.renderings += 1
        if self.renderings > _MOST_RENDERINGS:
            number = boundaries[0][0][0]
            raise ValueError(_unfollowed(number, self.messages[number]["role"]))
        marks = dict(zip(boundaries, self.marks, strict=False))
        try:
            text = self.apply(self.marked(marks), continued=self.open, prompted=self.prompted)
        except ValueError:
            return False
        if text.translate({ord(mark): None for mark in marks.values()}) != self.plain:
            return False
        self.note(text, marks)
        return True

    def note(self, text: str, marks: Mapping[tuple[Leaf, int], str]) -> None:
        """Where the marks came out in a text that is the plain one but for them."""
        owner = {mark: boundary for boundary, mark in marks.items()}
        self.known.update(dict.fromkeys(marks))
        place = 0
        for character in text:
            boundary = owner.get(character)
            if boundary is None:
                place += 1
                continue
            if self.known[boundary] is not None:
                if boundary[0][-1] == "name":
                    continue  # of a function, which a template may write again with the answer
                number = boundary[0][0]
                raise ValueError(
                    f"the chat template writes a text of messages[{number}] "
                    f"({self.messages[number]['role']}) more than once, so its tokens would be in "
                    "several places. Use a template that writes it once."
                )
            self.known[boundary] = place

    def ranges(self, leaf: Leaf) -> tuple[tuple[int, int] | None, ...]:
        """Where each character of a text is; None for one that does not exist."""
        text = self.text_of(leaf)
        known = [self.known.get((leaf, j)) for j in range(len(text) + 1)]
        found: list[tuple[int, int] | None] = [
            self.own(character, a, b) if a is not None and b is not None and a < b else None
            for character, (a, b) in zip(text, pairwise(known), strict=True)
        ]
        # Inside of what the template looks for (`<tool_response>`) no mark can be: what is there as
        # it is in the message, joined on to what is known, is the message's. White space at the
        # ends is not, as a mark beside it would have come through; nor are the markers of a thought
        # that the template takes apart, as it writes its own.
        start = self.thought(leaf)
        while start < len(text):
            if found[start] is not None or (known[start] is not None is not known[start + 1]):
                start += 1
                continue
            end = start + 1
            while end < len(text) and known[end] is None:
                end += 1
            self.bridge(text, known, start, end, found)
            start = end
        return tuple(found)

    def own(self, character: str, start: int, end: int) -> tuple[int, int]:
        """What of the text from `start` to `end` is a message's character, written there.

        All of it, where it is the character escaped or replaced; else what the template writes
        beside the character (`indent`, quoted lines) is the template's.
        """
        written = self.plain[start:end]
        escaped = {escape(character), f"\\{character}", f"\\u{ord(character):04x}"}
        escaped |= {json.dumps(character)[1:-1], json.dumps(character, ensure_ascii=False)[1:-1]}
        if written in escaped or character not in written:
            return start, end
        place = start + written.index(character)
        return place, place + 1

    def thought(self, leaf: Leaf) -> int:
        """Where the answer begins in an assistant's content that begins with its thought.

        0 where the template does not look for the marker that ends a thought, or lets marks into
        it, as those that write contents as they are.
        """
        if leaf[1] != "content" or self.messages[leaf[0]]["role"] != "assistant":
            return 0
        text = self.text_of(leaf)
        for closing in _CLOSING:
            start = text.rfind(closing)
            inside = range(start + 1, start + len(closing))
            if start >= 0 and closing in self.source:
                if all((leaf, j) in self.known and self.known[leaf, j] is not None for j in inside):
                    return 0
                after = text[start + len(closing) :]
                return len(text) - len(after.lstrip())
        return 0

    @cached_property
    def source(self) -> str:
        """The chat template."""
        return str(self.tokenizer.get_chat_template(None, self.given["tools"]))

    def bridge(
        self,
        text: str,
        known: Sequence[int | None],
        start: int,
        end: int,
        found: list[tuple[int, int] | None],
    ) -> None:
        """Fill in the characters from `start` to `end`, where they join on to a known boundary."""
        low, high = start, end
        if known[start] is None:  # only the end is known
            low += len(text[start:end]) - len(text[start:end].lstrip())
        if known[end] is None:
            high -= len(text[start:end]) - len(text[start:end].rstrip())
        left, right = known[start], known[end]
        if left is not None and right is not None:
            place = left
            fits = right - left == high - low
        elif left is not None:
            place, fits = left, True
        elif right is not None:
            place, fits = right - (high - low), True
        else:
            return
        written = self.plain[max(place, 0) : max(place, 0) + high - low]
        # Templates may write a title's capitals.
        fits &= place >= 0 and low < high and len(written) == high - low
        if fits and written.casefold() == text[low:high].casefold():
            for i in range(low, high):
                found[i] = (place + i - low, place + i - low + 1)

    def rendered(self) -> Rendered:
        """The text, its characters' owners, and its turns."""
        inner: list[tuple[Leaf, int]] = []
        outer: list[list[tuple[Leaf, int]]] = []
        for leaf in self.leaves:
            text = self.text_of(leaf)
            start = len(text) - len(text.lstrip())
            end = max(start, len(text.rstrip()))
            inner += [(leaf, j) for j in range(start, end + 1)]
            # Apart, as most templates trim: then those within change the text.
            outer.append([(leaf, j) for j in reversed(range(start))])
            outer.append([(leaf, j) for j in range(end + 1, len(text) + 1)])
        self.find(inner)
        for boundaries in outer:
            self.find_outer(boundaries)
        places = {leaf: self.ranges(leaf) for leaf in self.leaves}
        self.check(places)
        owners = [-1] * len(self.plain)
        for leaf, found in places.items():
            for a, b in filter(None, found):
                for i in range(a, b):
                    if owners[i] not in (-1, leaf[0]):
                        raise ValueError(_mixed(owners[i], leaf[0]))
                    owners[i] = leaf[0]
        runs = [number for number, _ in groupby(o for o in owners if o >= 0)]
        for place, number in enumerate(runs):
            if number in runs[:place]:
                raise ValueError(_mixed(runs[place - 1], number))
        if self.open and len(self.messages) - 1 not in owners:
            raise ValueError(
                f"the chat template trims away how the assistant's answer begins "
                f"({self.messages[-1]['content']!r}), so that nothing of it would be read. Leave "
                "prefill out."
            )
        return Rendered(
            self.plain,
            tuple(owners),
            tuple(
                tuple(found for leaf, found in places.items() if leaf[0] == i)
                for i in range(len(self.messages))
            ),
            Turns(self, owners).found(),
            tuple(message["role"] for message in self.messages),
        )

    def check(self, places: Mapping[Leaf, Sequence[tuple[int, int] | None]]) -> None:
        """Refuse what was lost on the way.

        A message may lose white space at its ends, and an earlier answer its thought.

        Raises:
            ValueError: it names the message.
        """
        for leaf, found in places.items():
            number, text = leaf[0], self.text_of(leaf)
            role = self.messages[number]["role"]
            earlier = number + 1 < len(self.messages)
            if leaf[1] in REASONING and earlier and not any(found):
                continue
            answer = self.thought(leaf)
            start = max(answer, len(text) - len(text.lstrip()))
            lost = [place is None for place in found]
            missing = any(lost[start : max(start, len(text.rstrip()))])
            if not earlier:  # of the last thought, only its markers are not the message's
                markers = re.finditer("|".join(map(re.escape, _CLOSING + _OPENING)), text[:answer])
                written = {i for marker in markers for i in range(*marker.span())}
                missing |= any(
                    lost[i] and i not in written and not text[i].isspace() for i in range(answer)
                )
            if not missing:
                continue
            content = self.messages[number].get("content")
            if leaf[1] == "content" and isinstance(content, list) and str(content) in self.plain:
                raise ValueError(
                    f"the chat template writes the content of messages[{number}] ({role}) as a "
                    "list, as it knows no contents in parts. Give the content as one text."
                )
            thought = all(lost[i] for i in range(answer) if not text[i].isspace())
            if answer and thought and not any(lost[answer : len(text.rstrip())]):
                raise ValueError(
                    f"the chat template leaves out what messages[{number}] ({role}) thinks before "
                    f"its answer: {brief(text[:answer].strip())}. Leave that out, or use a "
                    "template that writes it."
                )
            marks = [self.known.get((leaf, j), 0) for j in range(len(text) + 1)]
            if marks.count(None) == len(marks) or not (any(found) or text.strip() in self.plain):
                what = "" if leaf[1] == "content" else f"{leaf[1]} of "
                raise ValueError(
                    f"the chat template leaves out {what}messages[{number}] ({role}): "
                    f"{brief(text)}, or a part of it. Leave that out, or use a template that "
                    "writes it."
                )
            raise ValueError(_unfollowed(number, role))


def _mixed(first: int, second: int) -> str:
    """What is wrong where the texts of two messages cannot be told apart."""
    first, second = sorted((first, second))
    return (
        f"the chat template mixes the texts of messages[{first}] and messages[{second}], so their "
        "tokens cannot be told apart. Use a template that writes one after the other."
    )


def _unfollowed(number: int, role: str) -> str:
    return (
        f"the chat template decides by the text of messages[{number}] ({role}) what to write, so "
        "where that text is cannot be followed. Change the text, or use a simpler template."
    )
