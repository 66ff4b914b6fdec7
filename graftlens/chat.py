"""Conversations as prompts: messages, and how a chat template is asked to write them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftlens.components import brief, suggest

#: Who speaks in a conversation; each is the span of the tokens with characters of what it says.
ROLES = ("system", "user", "assistant", "tool")

#: Spans that a conversation has beside those of every prompt: the roles that speak in it, all that
#: the template writes, and each message with its markers.
CHAT_SPANS = (*ROLES, "template", "turn")

#: Names that no field may have: spans of conversations, and of all given or generated tokens.
RESERVED = (*CHAT_SPANS, "prompt", "generated")

#: A message's reasoning, under the names that templates read it by, the first given one first.
REASONING = ("reasoning_content", "thinking", "reasoning")

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
        messages: Any,
        *,
        prefill: str | None = None,
        reasoning: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        literal: bool = True,
    ) -> "Conversation":
        """A conversation, as `Prompt.chat` describes it, of what may be messages.

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
        clean = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
        for key, text, what in (
            ("prefill", prefill, "how the assistant's answer begins"),
            ("reasoning", reasoning, "what the assistant thinks before it answers"),
        ):
            if text is None:
                continue
            if not isinstance(text, str) or not text:
                raise ValueError(f"{key}={brief(text)}: write {what}, or leave {key} out.")
            if clean[-1]["role"] == "assistant":
                raise ValueError(
                    f"{key} begins the assistant's message, and the last message is already "
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
        begun = " and ".join(
            key for key, text in (("prefill", prefill), ("reasoning", reasoning)) if text
        )
        if begun and options.get("add_generation_prompt"):
            raise ValueError(
                f"template_options: add_generation_prompt cannot be combined with {begun}, which "
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
        if reasoning is not None:
            given["reasoning"] = reasoning
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
    def begun(self) -> dict[str, Any] | None:
        """The assistant's message that the answer continues: its prefill, and its reasoning."""
        said, thought = self._given["prefill"], self._given.get("reasoning")
        if said is None and thought is None:
            return None
        begun = {"role": "assistant", "content": said or ""}
        return begun if thought is None else {**begun, REASONING[0]: thought}

    def speakers(self) -> set[str]:
        """The roles that say something other than white space."""
        messages = [*self._given["messages"], *filter(None, [self.begun])]
        return {
            str(message["role"])
            for message in messages
            for path in texts(message)
            if str(at_keys(message, path)).strip()
        }

    def as_given(self) -> dict[str, Any]:
        """The arguments of `Conversation.of`."""
        found: dict[str, Any] = json.loads(self.json)
        return found

    @cached_property
    def transcript(self) -> str:
        """The conversation for people to read, as a prompt's template: `user: Who …?`."""
        lines = []
        for key in ("tools", "template_options"):
            if self._given[key]:
                lines.append(f"{key}: {_as_json(self._given[key])}")
        for message in [*self._given["messages"], *filter(None, [self.begun])]:
            thought = next((message[k] for k in REASONING if isinstance(message.get(k), str)), "")
            if thought:
                lines.append(f"{message['role']} (reasoning): {self._escaped(thought)}")
            said = [self._escaped(text) for text in contents(message)]
            calls = message.get("tool_calls")
            if calls:
                said.append(_as_json(calls))
            lines.append(f"{message['role']}:{' ' if any(said) else ''}{' '.join(said)}")
        if self.generation_prompt:
            lines.append("assistant:")
        return "\n\n".join(lines)

    def _escaped(self, text: str) -> str:
        return doubled(text) if self.literal else text

    @property
    def generation_prompt(self) -> bool:
        """Whether the template is asked for the marker that begins the assistant's answer."""
        last = self._given["messages"][-1]["role"]
        usual = self.begun is None and last != "assistant"
        return bool(self._given["template_options"].get("add_generation_prompt", usual))


def contents(message: Mapping[str, Any]) -> list[str]:
    """The texts that a message's content is made of."""
    content = message.get("content", ())
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _as_json(value: Any) -> str:
    return doubled(json.dumps(value, ensure_ascii=False))


def doubled(text: str) -> str:
    """A text as a template that means its braces as themselves."""
    return text.replace("{", "{{").replace("}", "}}")


def _message(where: str, message: Any) -> dict[str, Any]:
    """A message without keys that have no value, as transformers gives it to a template."""
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
    for key in REASONING:
        if not isinstance(clean.get(key, ""), str):
            raise ValueError(f"{where}: {key}={brief(clean[key])}. Write a text.")
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


def texts(message: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to a message's texts: content, reasoning, and what its tool calls say."""
    content = message.get("content")
    if isinstance(content, str):
        yield ("content",)
    for i in range(0 if isinstance(content, str) or content is None else len(content)):
        yield "content", i, "text"
    for key in REASONING:
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


def at_keys(message: Any, path: tuple[Any, ...]) -> Any:
    """What some keys lead to."""
    for key in path:
        message = message[key]
    return message


def _strings(value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, str):
        yield ()
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from ((key, *path) for path in _strings(inner))
