"""Conversations as prompts: what a chat template writes, and which message each character is from.

Characters are traced, never searched for. The template is run again with marks (characters that
occur nowhere else) between the characters of the messages. Where it writes the same text apart from
the marks, they show where each character went. So contents may quote role names, markers or the
template's own syntax, and templates may trim contents, merge messages or leave parts out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from typing import Any

from graftlens.chatturns import Leaf, Turns, mixed
from graftlens.components import brief, suggest

#: Who speaks in a conversation; each is the span of the tokens with characters of what it says.
ROLES = ("system", "user", "assistant", "tool")

#: Spans that a conversation has beside those of every prompt: the roles that speak in it, all that
#: the template writes, and each message with its markers.
CHAT_SPANS = (*ROLES, "template", "turn")

#: Names that no field may have: spans of conversations, and of all given or generated tokens.
RESERVED = (*CHAT_SPANS, "prompt", "generated")

#: A message's reasoning, under the names that templates read it by, the first given one first.
_REASONING = ("reasoning_content", "thinking", "reasoning")

#: What begins and ends a thought inside an assistant's content.
_OPENING = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]")
_CLOSING = ("</think>", "</thinking>", "</thought>", "</reasoning>", "[/THINK]")

#: Arguments of `apply_chat_template` that are not its template's options.
_OURS = (
    *(
        "self",
        "conversation",
        "messages",
        "tools",
        "tokenize",
        "chat_template",
        "continue_final_message",
    ),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)

#: Renderings at most until a template counts as one that cannot be followed, and marks in one.
_MOST_RENDERINGS, _MOST_MARKS = 4000, 50_000


@dataclass(frozen=True)
class Conversation:
    """Messages, and how a chat template is asked to write them. Immutable and hashable.

    Build one with `Conversation.of`.

    Attributes:
        json: all of it as one text of JSON, in the order given.
    """

    json: str

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        prefill: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        literal: bool = True,
    ) -> "Conversation":
        """A conversation, as `Prompt.chat` describes it.

        Raises:
            ValueError: messages, tools or options that are not what a template can be given.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ValueError(
                f"messages={brief(messages)}: write a list of messages, such as "
                '[{"role": "user", "content": "Who are you?"}].'
            )
        if not messages:
            raise ValueError("messages=[]: a conversation has one message or more.")
        clean = [_message(i, message) for i, message in enumerate(messages)]
        if prefill is not None:
            if not isinstance(prefill, str) or not prefill:
                raise ValueError(
                    f"prefill={prefill!r}: write how the assistant's answer begins, or leave "
                    "prefill out."
                )
            if clean[-1]["role"] == "assistant":
                raise ValueError(
                    "prefill begins the assistant's message, and the last message is already "
                    "the assistant's. Leave one of them out."
                )
        if not isinstance(template_options, Mapping | None) or not all(
            isinstance(name, str) for name in template_options or ()
        ):
            raise ValueError(
                f"template_options={brief(template_options)}: write a mapping of options, such as "
                '{"enable_thinking": False}.'
            )
        options = dict(template_options or {})
        for name in options:
            if name in _OURS:
                raise ValueError(
                    f"template_options: {name!r} is not an option of a template. Options are what "
                    'the chat template itself reads, such as {"enable_thinking": False}.'
                )
        if prefill is not None and options.get("add_generation_prompt"):
            raise ValueError(
                "template_options: add_generation_prompt cannot be combined with prefill, which "
                "already begins the assistant's message."
            )
        if tools is not None and not (
            isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise ValueError(
                f"tools={brief(tools)}: write a list of JSON schemas; "
                "transformers.utils.get_json_schema(function) makes one."
            )
        given = {
            "messages": clean,
            "prefill": prefill,
            "tools": None if tools is None else list(tools),
            "template_options": options,
            "literal": literal,
        }
        try:
            return cls(json.dumps(given, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"messages, tools and template_options hold JSON values only ({error}). Write "
                "texts, numbers, lists and mappings."
            ) from None

    @cached_property
    def _given(self) -> dict[str, Any]:
        return self.as_given()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages, as new objects; contents with their `{field}` places."""
        found: list[dict[str, Any]] = json.loads(self.json)["messages"]
        return found

    @property
    def literal(self) -> bool:
        """Whether braces in contents are meant as themselves."""
        return bool(self._given["literal"])

    @property
    def prefill(self) -> str | None:
        """How the assistant's last message begins."""
        found: str | None = self._given["prefill"]
        return found

    def as_given(self) -> dict[str, Any]:
        """The arguments of `Conversation.of`."""
        found: dict[str, Any] = json.loads(self.json)
        return found

    @cached_property
    def transcript(self) -> str:
        """The conversation for people to read, as a prompt's template: `user: Who …?`."""
        lines = []
        for message in self._given["messages"]:
            said = [self._escaped(text) for text in contents(message)]
            calls = message.get("tool_calls")
            if calls:
                said.append(doubled(json.dumps(calls, ensure_ascii=False)))
            lines.append(f"{message['role']}: {' '.join(said)}")
        if self.prefill is not None:
            lines.append(f"assistant: {self._escaped(self.prefill)}")
        elif self.generation_prompt:
            lines.append("assistant:")
        return "\n\n".join(lines)

    def _escaped(self, text: str) -> str:
        return doubled(text) if self.literal else text

    @property
    def generation_prompt(self) -> bool:
        """Whether the template is asked for the marker that begins the assistant's answer."""
        last = self._given["messages"][-1]["role"]
        usual = self.prefill is None and last != "assistant"
        return bool(self._given["template_options"].get("add_generation_prompt", usual))


def contents(message: Mapping[str, Any]) -> list[str]:
    """The texts that a message's content is made of."""
    content = message.get("content", ())
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def doubled(text: str) -> str:
    """A text as a template that means its braces as themselves."""
    return text.replace("{", "{{").replace("}", "}}")


def _message(number: int, message: Any) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping) or "role" not in message:
        advice = (
            " Rename from to role, value to content, human to user and gpt to assistant."
            if isinstance(message, Mapping) and {"from", "value"} <= message.keys()
            else ""
        )
        raise ValueError(
            f'{where} is {brief(message)}. Write {{"role": "user", "content": "Who are you?"}}.'
            f"{advice}"
        )
    # As transformers does before a template sees them.
    clean = {key: value for key, value in message.items() if value is not None}
    role = message["role"]
    if role not in ROLES:
        advice = (
            " What a developer says is the system's: write system."
            if role == "developer"
            else suggest(str(role), ROLES)
        )
        raise ValueError(
            f"{where}: role={brief(role)} is unknown. Allowed: {' '.join(ROLES)}.{advice}"
        )
    calls = clean.get("tool_calls", [])
    if not isinstance(calls, list | tuple) or not all(
        isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping)
        for call in calls
    ):
        raise ValueError(
            f'{where}: tool_calls={brief(calls)}. Write a list of {{"type": "function", '
            '"function": {"name": "…", "arguments": {}}}.'
        )
    content = clean.get("content")
    if content is None and not clean.get("tool_calls"):
        raise ValueError(f'{where}: no content. Write "content": "…", which may be empty.')
    parts = content if isinstance(content, list | tuple) else ()
    in_parts = bool(parts) and all(
        isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in parts
    )
    if content is not None and not isinstance(content, str) and not in_parts:
        raise ValueError(
            f"{where}: content={brief(content)}. Write a text, or a list of "
            '{"type": "text", "text": "…"}; other kinds of content are not supported.'
        )
    return clean


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
            leaves out a message, mixes the texts of several, or decides by a message's text what
            becomes of it in a way that cannot be followed.
    """
    return _Rendering(conversation, tokenizer, messages).rendered()


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
        self.open = conversation.prefill is not None
        self.prompted = conversation.generation_prompt
        self.messages = conversation.messages if messages is None else list(messages)
        if messages is None and self.open:
            self.messages.append({"role": "assistant", "content": conversation.prefill})
        self.plain = self.apply(self.messages, continued=self.open, prompted=self.prompted)
        self.leaves = [
            (i, *path) for i, message in enumerate(self.messages) for path in texts(message)
        ]
        used = set(self.plain).union(*(self.text_of(leaf) for leaf in self.leaves))
        private = (*range(0xF0002, 0xFFFFE), *range(0x100000, 0x10FFFE))
        self.marks = [chr(c) for c in private if chr(c) not in used][:_MOST_MARKS]
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
        except Exception as error:  # a template raises whatever its author wrote
            said = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses this conversation: {said}") from None
        return str(text)

    def text_of(self, leaf: Leaf) -> str:
        """The text that the leaf leads to."""
        found: Any = self.messages
        for key in leaf:
            found = found[key]
        return str(found)

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
            inner: Any = copied
            for key in leaf[:-1]:
                inner = inner[key]
            inner[leaf[-1]] = "".join([*pieces, text[done:]])
        return copied

    # -- which message each character is from ------------------------------------------------------

    def find(self, boundaries: Sequence[tuple[Leaf, int]]) -> None:
        """Learn where marks at these boundaries come out.

        All at once where that changes nothing else; else by halves, as only a few do: inside white
        space that is trimmed, or inside a text that the template looks for.
        """
        if not boundaries:
            return
        if len(boundaries) > len(self.marks):
            for start in range(0, len(boundaries), len(self.marks)):
                self.find(boundaries[start : start + len(self.marks)])
            return
        self.renderings += 1
        if self.renderings > _MOST_RENDERINGS:
            number = boundaries[0][0][0]
            raise ValueError(_unfollowed(number, self.messages[number]["role"]))
        marks = dict(zip(boundaries, self.marks, strict=False))
        try:
            text = self.apply(self.marked(marks), continued=self.open, prompted=self.prompted)
        except ValueError:
            text = ""
        if text.translate({ord(mark): None for mark in marks.values()}) == self.plain:
            self.note(text, marks)
        elif len(boundaries) > 1:
            half = len(boundaries) // 2
            self.find(boundaries[:half])
            self.find(boundaries[half:])

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
        outer: list[tuple[Leaf, int]] = []
        for leaf in self.leaves:
            text = self.text_of(leaf)
            start = len(text) - len(text.lstrip())
            end = max(start, len(text.rstrip()))
            for j in range(len(text) + 1):
                # Apart, as most templates trim: then those within change the text.
                (inner if start <= j <= end else outer).append((leaf, j))
        self.find(inner)
        for leaf in self.leaves:
            self.find([boundary for boundary in outer if boundary[0] == leaf])
        places = {leaf: self.ranges(leaf) for leaf in self.leaves}
        self.check(places)
        owners = [-1] * len(self.plain)
        for leaf, found in places.items():
            for a, b in filter(None, found):
                for i in range(a, b):
                    if owners[i] not in (-1, leaf[0]):
                        raise ValueError(mixed(owners[i], leaf[0]))
                    owners[i] = leaf[0]
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
            if leaf[1] in _REASONING and earlier and not any(found):
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
            if not any(found) and text.strip() not in self.plain:
                what = "" if leaf[1] == "content" else f"{leaf[1]} of "
                raise ValueError(
                    f"the chat template leaves out {what}messages[{number}] ({role}): "
                    f"{brief(text)}, or a part of it. Leave that out, or use a template that "
                    "writes it."
                )
            raise ValueError(_unfollowed(number, role))


def texts(message: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to a message's texts: content, reasoning, and what its tool calls say."""
    content = message.get("content")
    if isinstance(content, str):
        yield ("content",)
    for i in range(0 if isinstance(content, str) or content is None else len(content)):
        yield "content", i, "text"
    for key in _REASONING:
        if isinstance(message.get(key), str):
            yield (key,)
            break
    for i, call in enumerate(message.get("tool_calls") or ()):
        inner = ("function",) if "function" in call else ()
        function = call.get("function", call)
        if isinstance(function.get("name"), str):
            yield "tool_calls", i, *inner, "name"
        for path in _strings(function.get("arguments")):
            yield "tool_calls", i, *inner, "arguments", *path


def _strings(value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, str):
        yield ()
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from ((key, *path) for path in _strings(inner))


def _unfollowed(number: int, role: str) -> str:
    return (
        f"the chat template decides by the text of messages[{number}] ({role}) what to write, so "
        "where that text is cannot be followed. Change the text, or use a simpler template."
    )
