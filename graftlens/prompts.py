"""Prompts with named spans, and where those spans are among the tokens.

Spans are found by character offsets: the template says where each field is in the text, the
tokenizer says which characters each token covers. Token ids are never searched for.
"""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from graftlens.chat import RESERVED, ROLES, Conversation, texts
from graftlens.chatrendering import Rendered, date_options, render
from graftlens.positions import Spans

#: Spans that every prompt has: its first position (the BOS token where the tokenizer puts one),
#: the position that the next token is predicted from, all positions, and those of its own tokens,
#: without what follows.
STANDARD_SPANS = ("bos", "last", "all", "prompt")
#: Names that no field can have: they are other spans, of every prompt or of conversations.
OTHER_SPANS = tuple(dict.fromkeys((*STANDARD_SPANS, *RESERVED)))


class FrozenMap(Mapping[str, str]):
    """An immutable, hashable mapping from names to texts, in the order given."""

    def __init__(self, items: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> str:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Prompt:
    """A text made from a template, whose fields are spans that a graft can name.

    Attributes:
        template: text with `{field}` places (a literal brace is doubled). Field names become span
            names; a field that appears twice gives a span with two occurrences (`name#1`,
            `name#2`).
        fields: the text of each field. Fields that the template does not use are kept as facts
            about the prompt, and are not spans.
        answer: the text that should follow, with its leading space if it has one; it may be
            white space only, such as a newline.
        distractors: wrong answers to compare with, written like the answer.
        name: what this template is called in tables.
        answers: all texts that are right, written like the answer, for `answer_set_prob`.
        conversation: the messages of a chat, as `Prompt.chat` makes them; `template` is then their
            transcript, and the model reads what its chat template makes of them.

    Raises:
        ValueError: a field that is missing, empty, or named like a standard span or one of a
            conversation's; a malformed template; an empty answer or distractor; a text that
            contains half of a character.
    """

    template: str
    fields: Mapping[str, str] = field(default_factory=FrozenMap)
    answer: str | None = None
    distractors: Sequence[str] = ()
    name: str | None = None
    answers: Sequence[str] = ()
    conversation: Conversation | None = None

    @classmethod
    def chat(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        fields: Mapping[str, str] | None = None,
        answer: str | None = None,
        prefill: str | None = None,
        reasoning: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        distractors: Sequence[str] = (),
        name: str | None = None,
        answers: Sequence[str] = (),
    ) -> "Prompt":
        """A conversation, which the tokenizer's chat template writes.

        Its tokens are those of `apply_chat_template`. Each belongs to one of the spans `system`,
        `user`, `assistant` and `tool` (a token with any character of what such a message says) or
        to `template` (all that the template writes). `turn` is a message with its markers, the
        generation prompt the last one. `user#1` is the first user message, `user#-1` the last.

        Args:
            messages: `{"role": …, "content": …}` and what else the template reads. Roles: system,
                user, assistant, tool. What an assistant says is also its reasoning, and of its tool
                calls the names and the texts of the arguments.
            fields: the text of each `{field}` of the contents; without any, braces are literal.
            answer: the text that should follow. The generation prompt ends with a newline or a
                marker in most templates: the answer then begins without a space.
            prefill: how the assistant's answer begins; without it the template is asked for the
                generation prompt, unless the last message is the assistant's.
            reasoning: what the assistant has thought before it answers, for templates that write
                it; the answer follows, or goes on after the prefill.
            tools: JSON schemas of functions, for templates that write them.
            template_options: what else the template reads, such as `{"enable_thinking": False}`.
            distractors, answers: those of the `Prompt`.
            name: likewise; conversations without fields are called `chat` in tables unless they are
                given a name.

        Raises:
            ValueError: a role or content that is unknown; as `Prompt`.
        """
        conversation = Conversation.of(
            messages,
            prefill=prefill,
            reasoning=reasoning,
            tools=tools,
            template_options=template_options,
            literal=not fields,
        )
        if not fields and name is None:
            name = "chat"  # else tables would take each of them for a template
        template = conversation.transcript
        return cls(template, fields or {}, answer, distractors, name, answers, conversation)

    def __post_init__(self) -> None:
        if self.conversation is not None and self.template != self.conversation.transcript:
            raise ValueError(
                f"template={self.template!r} is not the transcript of the conversation. Make a "
                "prompt of a conversation with Prompt.chat(messages)."
            )
        if not isinstance(self.template, str):
            raise ValueError(f"template={self.template!r}: write a text.")
        if not isinstance(self.name, str | None):
            raise ValueError(f"name={self.name!r}: write a text, or leave it out.")
        if not isinstance(self.fields, Mapping):
            raise ValueError(
                f"fields={self.fields!r}: write a mapping, such as {{'first_entity': 'Ann'}}."
            )
        object.__setattr__(self, "fields", FrozenMap(self.fields))
        for what in ("distractors", "answers"):
            texts = getattr(self, what)
            if isinstance(texts, str):
                raise ValueError(f"{what}={texts!r} is one text. Write a list: [{texts!r}].")
            if not isinstance(texts, Iterable) or isinstance(texts, Set | Mapping):
                # A set has no order.
                raise ValueError(f"{what}={texts!r}: write a list of texts.")
            object.__setattr__(self, what, tuple(texts))
        for key, value in self.fields.items():
            if key in RESERVED:
                raise ValueError(
                    f"template {self.template!r}: {key!r} is a span of conversations "
                    f"({' '.join(RESERVED)} are). Give the field another name."
                )
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"field {key!r} of template {self.template!r} is {value!r}: "
                    "a field must be text that is not empty."
                )
        others = [("distractor", text) for text in self.distractors]
        others += [("one of answers", text) for text in self.answers]
        for what, text in [("answer", self.answer), *others]:
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(
                    f"{what}={text!r}: write a text that is not empty, or leave it out."
                )
        named = [("template", self.template), ("name", self.name), ("answer", self.answer), *others]
        named += [(f"field {key!r}:", value) for key, value in self.fields.items()]
        for what, text in named:
            if isinstance(text, str) and (half := lone_surrogate(text)):
                raise ValueError(f"{what} {half}")
        if not self.text:
            raise ValueError(
                "template='' gives an empty prompt. Write a text of one token or more."
            )

    @cached_property
    def _pieces(self) -> tuple[tuple[str, str | None], ...]:
        """(literal text, following field or None), in order."""
        return self._parsed(self.template)

    def _parsed(self, template: str) -> tuple[tuple[str, str | None], ...]:
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(
                f"template {template!r} is malformed ({error}). Write {{field}} for a field "
                "and double a literal brace."
            ) from None
        pieces = []
        for literal, name, spec, conversion in parsed:
            if name is not None:
                if not name.isidentifier() or spec or conversion:
                    raise ValueError(
                        f"template {template!r}: {name!r} is not a plain field. Write {{name}} "
                        "with letters, digits and _, without format or conversion."
                    )
                if name in STANDARD_SPANS:
                    raise ValueError(
                        f"template {template!r}: {name!r} is a span that every prompt has. "
                        "Give the field another name."
                    )
                if name not in self.fields:
                    raise ValueError(
                        f"template {template!r} needs the field {name!r}; "
                        f"given: {' '.join(self.fields) or 'none'}."
                    )
            pieces.append((literal, name))
        return tuple(pieces)

    @cached_property
    def text(self) -> str:
        """The prompt as the model reads it; of a conversation, its transcript."""
        return "".join(
            literal + (self.fields[name] if name else "") for literal, name in self._pieces
        )

    @cached_property
    def char_spans(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Field name -> the (start, end) character ranges of its occurrences in `text`."""
        spans: dict[str, list[tuple[int, int]]] = {}
        place = 0
        for literal, name in self._pieces:
            place += len(literal)
            if name:
                value = self.fields[name]
                spans.setdefault(name, []).append((place, place + len(value)))
                place += len(value)
        return {name: tuple(ranges) for name, ranges in spans.items()}

    def filled(self) -> tuple[list[dict[str, Any]], list[list[list[tuple[str, int, int]]]]]:
        """A conversation's messages with their fields filled in, the prefill as the last one.

        Returns:
            The messages; and per message, for each of its texts, the name and the first and last
            character of each field in it.

        Raises:
            PromptError: a field in a tool call.
        """
        assert self.conversation is not None
        messages = [*self.conversation.messages, *filter(None, [self.conversation.begun])]
        spans: list[list[list[tuple[str, int, int]]]] = []
        for number, message in enumerate(messages):
            spans.append([])
            for path in texts(message):
                inner: Any = message
                for key in path[:-1]:
                    inner = inner[key]
                if path[0] != "tool_calls":
                    inner[path[-1]], found = self._filled(inner[path[-1]])
                elif self.fields and (
                    name := next((n for n in self.fields if f"{{{n}}}" in inner[path[-1]]), None)
                ):
                    raise PromptError(
                        f"messages[{number}]: fields are filled in contents and reasoning only, "
                        f"and a tool call holds {{{name}}}. Write its text there."
                    )
                else:
                    found = []
                spans[-1].append(found)
        return messages, spans

    def _filled(self, template: str) -> tuple[str, list[tuple[str, int, int]]]:
        if self.conversation is not None and self.conversation.literal:
            return template, []
        text, spans = "", []
        for literal, name in self._parsed(template):
            text += literal
            if name:
                spans.append((name, len(text), len(text) + len(self.fields[name])))
                text += self.fields[name]
        return text, spans


class PromptError(ValueError):
    """A prompt cannot be run as requested; the message says why and what to do."""


@dataclass(frozen=True)
class Tokenized:
    """The tokens of one prompt, and the positions of its spans.

    Attributes:
        ids: token ids, without padding.
        spans: span name -> its occurrences, each token positions; fields, of a conversation
            all roles (also those that say nothing), `template` and `turn`, then `bos`, `last`,
            `all`, `prompt`, and `generated` where tokens are generated after it.
        prompt: where the tokens come from, None for bare tokens.
        text: what the tokens were read from: the prompt's text, or what the chat template made of
            its conversation; None for bare tokens.
    """

    ids: tuple[int, ...]
    spans: Spans
    prompt: Prompt | None = None
    text: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def roles(self) -> tuple[str, ...] | None:
        """Of a conversation, the one of `system`, `user`, … and `template` that each token is."""
        if self.prompt is None or self.prompt.conversation is None:
            return None
        named = [(role, self.spans.get(role, ())) for role in (*ROLES, "template")]
        found = {i: role for role, places in named for tokens in places for i in tokens}
        return tuple(found[i] for i in range(len(self)))

    @property
    def generates(self) -> bool:
        """Whether tokens are generated after it, which rules may name."""
        return "generated" in self.spans

    def generating(self) -> "Tokenized":
        """The same prompt where tokens are generated after it: `generated` is a span of it, and an
        assistant says them."""
        return self if self.generates else replace(self, spans={**self.spans, "generated": ((),)})

    def spans_with(self, total: int) -> Spans:
        """The spans where the prompt with what follows it has `total` tokens."""
        length = len(self)
        if total <= length:
            return self.spans
        new = tuple(range(length, total))
        found = {**self.spans, "last": ((length - 1, *new),), "all": (tuple(range(total)),)}
        if self.generates:
            found["generated"] = (new,)
        if self.generates and self.prompt is not None and self.prompt.conversation is not None:
            said = tuple(self.spans["assistant"])
            goes_on = said and not self.prompt.conversation.generation_prompt
            found["assistant"] = (*said[:-1], (*said[-1], *new)) if goes_on else (*said, new)
        return found

    @classmethod
    def bare(cls, ids: Sequence[int]) -> "Tokenized":
        """Tokens without a text: only the standard spans.

        Raises:
            PromptError: no token at all.
        """
        if not len(ids):
            raise PromptError("a prompt of no tokens cannot be run. Give at least one token.")
        return cls(tuple(ids), _standard(len(ids)))


def _standard(length: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    every = (tuple(range(length)),)
    return {"bos": ((0,),), "last": ((length - 1,),), "all": every, "prompt": every}


def lone_surrogate(text: str) -> str | None:
    """What is wrong with a text that contains half of a surrogate pair, which is not a
    character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = error.start
        return (
            f"{text[max(0, place - 20) : place + 21]!r} holds U+{ord(text[place]):X} at character "
            f"{place}: half of a surrogate pair, which is not a character. Read the text again "
            "with the right encoding, or leave it out."
        )
    return None


def encode(
    text: str, tokenizer: Any, prepend_bos: bool | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the characters that each covers; (0, 0) for added tokens.

    Args:
        text: any text.
        tokenizer: a Hugging Face fast tokenizer.
        prepend_bos: None leaves it to the tokenizer, True and False force it. An EOS token that
            the tokenizer appends is left out: the prompt is to be continued.

    Raises:
        PromptError: a tokenizer without character offsets, or without a BOS token to prepend; a
            text that contains half of a character.
    """
    if half := lone_surrogate(text):
        raise PromptError(f"the text {half}")
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} does not give character offsets, so spans cannot be "
            "found. Load a fast tokenizer: AutoTokenizer.from_pretrained(…, use_fast=True)."
        )
    encoded = tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=prepend_bos is not False
    )
    ids, offsets = list(encoded["input_ids"]), [tuple(o) for o in encoded["offset_mapping"]]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids.pop()
        offsets.pop()
    if prepend_bos:
        if tokenizer.bos_token_id is None:
            raise PromptError(
                f"prepend_bos=True, but {type(tokenizer).__name__} has no BOS token. "
                "Set tokenizer.bos_token, or leave prepend_bos out."
            )
        if not ids or ids[0] != tokenizer.bos_token_id:
            ids.insert(0, tokenizer.bos_token_id)
            offsets.insert(0, (0, 0))
    return ids, offsets


def doubled_bos(
    prompts: Sequence[Any], tokenizer: Any, prepend_bos: bool | None = None
) -> str | None:
    """A note on texts that begin with the BOS token and get another one in front.

    Args:
        prompts: texts and `Prompt`s; anything else is passed over.
        tokenizer: a Hugging Face fast tokenizer, or None.
        prepend_bos: None leaves BOS to the tokenizer, True and False force it.
    """
    bos = getattr(tokenizer, "bos_token", None) or ""
    texts = [p.text if isinstance(p, Prompt) else p if isinstance(p, str) else "" for p in prompts]
    numbers = [i for i, text in enumerate(texts) if bos and text.lstrip().startswith(bos)]
    if not numbers or not getattr(tokenizer, "is_fast", False):
        return None
    first = texts[numbers[0]]
    ids, _ = encode(first, tokenizer, prepend_bos)
    if ids.count(tokenizer.bos_token_id) <= first.count(bos):
        return None
    more = f" (And {len(numbers) - 1} more prompts.)" if len(numbers) > 1 else ""
    return (
        f"prompt {numbers[0]} begins with the BOS token {bos!r}, and another one is added in "
        "front: the model reads both. Pass prepend_bos=False if the text has its own, or leave it "
        f"out of the text.{more}"
    )


def dated(prompts: Sequence[Any], tokenizer: Any) -> str | None:
    """A note on conversations whose chat template writes the day's date among their tokens.

    Args:
        prompts: `Prompt`s; anything else is passed over.
        tokenizer: a Hugging Face tokenizer, or None.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    talks = (p.conversation for p in prompts if isinstance(p, Prompt))
    found = (date_options(talk, tokenizer) for talk in talks if talk is not None)
    options = next((names for names in found if names is not None), None)
    if options is None:
        return None
    advice = (
        f'Fix it: template_options={{"{options[0]}": "26 Jul 2024"}}.'
        if options
        else "It reads no option for the date: give another template by chat_template."
    )
    return (
        "the chat template writes today's date where none is given, so tomorrow's tokens would be "
        f"different. {advice}"
    )


def tokenize(prompt: "Prompt | str", tokenizer: Any, prepend_bos: bool | None = None) -> Tokenized:
    """The tokens of a prompt, with its spans: each the tokens that share a character with a field.

    Left out are a token that shares only white space at the field's end, if it begins the next
    word (` acted` after the field `Ann `), and a space that the tokenizer adds where the text
    has none (`▁` before the first word).

    Args:
        prompt: a `Prompt`, or a text without fields.
        tokenizer: a Hugging Face fast tokenizer.
        prepend_bos: None leaves it to the tokenizer, True and False force it.

    Raises:
        PromptError: a field that no token covers, a text of no tokens, or a tokenizer without
            offsets.
    """
    if isinstance(prompt, str):
        ids, _ = encode(prompt, tokenizer, prepend_bos)
        return Tokenized.bare(ids)
    if prompt.conversation is not None:
        return _tokenize_chat(prompt, tokenizer, prepend_bos)
    text = prompt.text
    ids, offsets = encode(text, tokenizer, prepend_bos)
    standard = Tokenized.bare(ids).spans
    covered = _covered(text, tokenizer.convert_ids_to_tokens(ids), offsets)
    spans = {
        name: tuple(_occurrence(text, covered, name, *place) for place in places)
        for name, places in prompt.char_spans.items()
    }
    return Tokenized(tuple(ids), {**spans, **standard}, prompt, text)


def _occurrence(
    text: str, covered: Sequence[tuple[int, int]], name: str, start: int, end: int
) -> tuple[int, ...]:
    """The tokens of a field that is the text from `start` to `end`."""
    tokens = tuple(
        i
        for i, (a, b) in enumerate(covered)
        if a < end and b > start and not _begins_what_follows(text, a, b, end)
    )
    if not tokens:
        raise PromptError(
            f"no token of {text!r} covers the field {name!r} "
            f"({text[start:end]!r}): the tokenizer drops it. "
            "Change the field's text."
        )
    return tokens


def _encode_chat(
    text: str, tokenizer: Any, prepend_bos: bool | None
) -> tuple[list[int], list[tuple[int, int]]]:
    """As `apply_chat_template`: the template writes the BOS token, or there is none."""
    ids, offsets = encode(text, tokenizer, prepend_bos=False)
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is not None and ids[:1] != [bos]:
        return [bos, *ids], [(0, 0), *offsets]
    return ids, offsets


def _tokenize_chat(prompt: Prompt, tokenizer: Any, prepend_bos: bool | None) -> Tokenized:
    assert prompt.conversation is not None
    messages, fields = prompt.filled()
    try:
        rendered = render(prompt.conversation, tokenizer, messages)
    except ValueError as error:
        raise PromptError(str(error)) from None
    text = rendered.text
    ids, offsets = _encode_chat(text, tokenizer, prepend_bos)
    standard = Tokenized.bare(ids).spans
    covered = _covered(text, tokenizer.convert_ids_to_tokens(ids), offsets)
    spans: dict[str, list[tuple[int, ...]]] = {}
    for message, places in zip(fields, rendered.places, strict=True):
        for found, characters in zip(message, places, strict=True):
            for name, start, end in found:
                there = [place for place in characters[start:end] if place is not None]
                if not there:
                    raise PromptError(
                        f"the chat template leaves out the field {name!r} "
                        f"({prompt.fields[name]!r}). Take it out of that message, or use a "
                        "template that writes it."
                    )
                found_at = there[0][0], there[-1][1]
                spans.setdefault(name, []).append(_occurrence(text, covered, name, *found_at))
    added = offsets[0] == covered[0] == (0, 0)  # a BOS token that the template did not write
    named = {**spans, **_roles(rendered, covered)}
    if rendered.turns is not None:
        named["turn"] = _turns(rendered.turns, offsets, covered, int(added))
    return Tokenized(
        tuple(ids), {**{n: tuple(r) for n, r in named.items()}, **standard}, prompt, text
    )


def _roles(
    rendered: Rendered, covered: Sequence[tuple[int, int]]
) -> dict[str, list[tuple[int, ...]]]:
    """Role -> for each of its messages, the tokens with characters of what it says; `template`.

    A role that says nothing has no tokens, but is there: its complement is every token.
    """
    said: list[list[int]] = [[] for _ in rendered.roles]
    template: list[list[int]] = []
    for i, (a, b) in enumerate(covered):
        owners = set(rendered.owners[a:b]) - {-1}
        if len(owners) > 1:
            raise PromptError(
                f"the token of {rendered.text[a:b]!r} holds characters of messages "
                f"{' and '.join(map(str, sorted(owners)))}, so its role is not clear. Change the "
                "texts where they meet, or use a template that writes something between them."
            )
        if owners:
            said[owners.pop()].append(i)
        elif template and template[-1][-1] == i - 1:
            template[-1].append(i)
        else:
            template.append([i])
    spans = {
        role: [tuple(tokens) for r, tokens in zip(rendered.roles, said, strict=True) if r == role]
        for role in ROLES
    }
    return {**spans, "template": [tuple(tokens) for tokens in template]}


def _turns(
    turns: Sequence[tuple[int, int]],
    offsets: Sequence[tuple[int, int]],
    covered: Sequence[tuple[int, int]],
    first: int,
) -> list[tuple[int, ...]]:
    """The tokens that begin in each turn, from the position `first` on."""
    starts, done = [], 0
    for (a, b), (low, high) in zip(offsets, covered, strict=True):
        if a == b and low < high:
            a = low  # white space that the tokenizer leaves out of offsets
        done = max(done, a)  # a token without a width is where the one before it is
        starts.append(done)
    return [
        tuple(i for i in range(first, len(starts)) if low <= starts[i] < high)
        for low, high in turns
    ]


#: How tokenizers write white space: SentencePiece's mark, GPT-2's, themselves.
_WHITE = {"▁": " ", "Ġ": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"} | {c: c for c in " \n\r\t"}
_SPACES = "▁Ġ "


def _covered(
    text: str, pieces: Sequence[str | None], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The characters that each token consists of, where tokenizers' offsets say otherwise.

    Byte-level tokenizers may leave the white space before and after a word out of its token's
    offsets, so that a token of white space has no width. And a tokenizer may add a space of its own
    before a word, whose offsets then claim the word's first character.
    """
    found: list[tuple[int, int]] = []
    done = 0  # where the token before ends
    for i, (piece, (a, b)) in enumerate(zip(pieces, offsets, strict=True)):
        piece, here = piece or "", text[a:b]
        before = "".join(_WHITE[c] for c in takewhile(_WHITE.__contains__, piece))
        after = "".join(_WHITE[c] for c in takewhile(_WHITE.__contains__, reversed(piece)))[::-1]
        if before and len(before) == len(piece):
            following = offsets[i + 1 : i + 2]
            if a == b:
                real = text.startswith(before, done)
                a, b = (done, done + len(before)) if real else (0, 0)
            elif here != piece and (
                here.strip(_SPACES).strip() or (following and following[0][0] == a)
            ):
                a, b = 0, 0  # these are another token's characters
            after = ""
        before = before[: max(0, len(before) - len(here) + len(here.lstrip()))]
        after = after[len(here) - len(here.rstrip()) :]
        if before and done == a - 1 and not text[done].isspace():
            # The tokenizer's own space was cut off, which the text does not have.
            a, before = done, ""
        while before and done < a < b and text[a - 1] == before[-1]:
            a, before = a - 1, before[:-1]
        while after and a < b and text[b : b + 1] == after[0]:
            b, after = b + 1, after[1:]
        found.append((a, b))
        done = max(done, b)
    return found


def _begins_what_follows(text: str, start: int, stop: int, end: int) -> bool:
    """Whether a token at [start, stop) has only white space before `end`, and a word after it."""
    return stop > end and not text[start:end].strip() and bool(text[end:stop].strip())


def continuation(
    prompt: Tokenized, text: str, tokenizer: Any, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """The token ids that `text` adds after the prompt, as they are in the text as a whole.

    Raises:
        PromptError: the text's first characters join the prompt's last token, so that no token
            begins where the text does.
    """
    if prompt.prompt is None or prompt.text is None:
        raise PromptError("an answer needs a prompt with text; this one is bare tokens.")
    whole = ids_with(prompt, text, tokenizer, prepend_bos)
    if whole[: len(prompt)] != prompt.ids or len(whole) == len(prompt):
        raise PromptError(
            f"{text!r} after {prompt.text[-20:]!r} does not begin a token of its own. "
            "End the prompt without a space and begin the answer with one."
        )
    return whole[len(prompt) :]


def ids_with(
    prompt: Tokenized, text: str, tokenizer: Any, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """The token ids of a prompt's text with another text joined on."""
    assert prompt.prompt is not None
    assert prompt.text is not None
    encoder = encode if prompt.prompt.conversation is None else _encode_chat
    return tuple(encoder(prompt.text + text, tokenizer, prepend_bos)[0])
