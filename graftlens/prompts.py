"""Prompts with named spans, and where those spans lie among the tokens.

Spans are found by character offsets: the template says where each field stands in the text, the
tokenizer says which characters each token covers. Token ids are never searched for.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graftlens.graft import Runs

#: Spans that every prompt has: its first position (the BOS token where the tokenizer puts one),
#: the position that the next token is predicted from, and all positions.
STANDARD_SPANS = ("bos", "last", "all")


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
            names; a field that appears twice gives a span of two runs (`name#1`, `name#2`).
        fields: the text of each field. Fields that the template does not use are kept as facts
            about the prompt, and are no spans.
        answer: the text that should follow, with its leading space where it has one; it may be
            white space alone, such as a newline.
        distractors: wrong answers to compare with, written like the answer.
        name: what this template is called in tables.
        answers: all texts that are right, written like the answer, for `answer_set_prob`.

    Raises:
        ValueError: a field that is missing, empty, or named like a standard span; a malformed
            template; an empty answer or distractor; a text that holds half of a character.
    """

    template: str
    fields: Mapping[str, str] = field(default_factory=FrozenMap)
    answer: str | None = None
    distractors: Sequence[str] = ()
    name: str | None = None
    answers: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise ValueError(f"template={self.template!r}: write a text.")
        if not isinstance(self.fields, Mapping):
            raise ValueError(
                f"fields={self.fields!r}: write a mapping, such as {{'first_entity': 'Ann'}}."
            )
        object.__setattr__(self, "fields", FrozenMap(self.fields))
        for what in ("distractors", "answers"):
            texts = getattr(self, what)
            if isinstance(texts, str):
                raise ValueError(f"{what}={texts!r} is one text. Write a list: [{texts!r}].")
            object.__setattr__(self, what, tuple(texts))
        for key, value in self.fields.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"field {key!r} of template {self.template!r} is {value!r}: "
                    "a field is a text that is not empty."
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
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(
                f"template {self.template!r} is malformed ({error}). Write {{field}} for a field "
                "and double a brace that is meant as itself."
            ) from None
        pieces = []
        for literal, name, spec, conversion in parsed:
            if name is not None:
                if not name.isidentifier() or spec or conversion:
                    raise ValueError(
                        f"template {self.template!r}: {name!r} is no plain field. Write {{name}} "
                        "with letters, digits and _, without format or conversion."
                    )
                if name in STANDARD_SPANS:
                    raise ValueError(
                        f"template {self.template!r}: {name!r} is a span that every prompt has. "
                        "Give the field another name."
                    )
                if name not in self.fields:
                    raise ValueError(
                        f"template {self.template!r} needs the field {name!r}; "
                        f"given: {' '.join(self.fields) or 'none'}."
                    )
            pieces.append((literal, name))
        return tuple(pieces)

    @cached_property
    def text(self) -> str:
        """The prompt as the model reads it."""
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


class PromptError(ValueError):
    """A prompt that cannot be run as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Tokenized:
    """The tokens of one prompt, and the positions of its spans.

    Attributes:
        ids: token ids, without padding.
        runs: span name -> its runs of token positions; fields, then `bos`, `last`, `all`.
        prompt: where the tokens come from, None for bare tokens.
    """

    ids: tuple[int, ...]
    runs: Runs
    prompt: Prompt | None = None

    def __len__(self) -> int:
        return len(self.ids)

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
    return {"bos": ((0,),), "last": ((length - 1,),), "all": (tuple(range(length)),)}


def lone_surrogate(text: str) -> str | None:
    """What is wrong with a text that holds half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = error.start
        return (
            f"{text[max(0, place - 20) : place + 21]!r} holds U+{ord(text[place]):X} at character "
            f"{place}: half of a surrogate pair, which is not a character. Read the text again in "
            "its right encoding, or leave it out."
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
            text that holds half of a character.
    """
    if half := lone_surrogate(text):
        raise PromptError(f"the text {half}")
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} gives no character offsets, so spans cannot be found. "
            "Load a fast tokenizer: AutoTokenizer.from_pretrained(…, use_fast=True)."
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
    """A note on texts that begin with the BOS token and get another one put before it.

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
    more = f" (And {len(numbers) - 1} prompts more.)" if len(numbers) > 1 else ""
    return (
        f"prompt {numbers[0]} begins with the BOS token {bos!r}, and another one is put before it: "
        "the model reads both. Pass prepend_bos=False where the text brings its own, or leave it "
        f"out of the text.{more}"
    )


def tokenize(prompt: "Prompt | str", tokenizer: Any, prepend_bos: bool | None = None) -> Tokenized:
    """The tokens of a prompt, with its spans: each the tokens that share a character with a field.

    Left out are a token that shares nothing but white space at the field's end, where it begins the
    next word (` acted` after the field `Ann `), and a space that the tokenizer puts where the text
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
    text = prompt.text
    ids, offsets = encode(text, tokenizer, prepend_bos)
    standard = Tokenized.bare(ids).runs
    covered = _covered(text, tokenizer.convert_ids_to_tokens(ids), offsets)
    runs: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, ranges in prompt.char_spans.items():
        found = []
        for start, end in ranges:
            run = tuple(
                i
                for i, (a, b) in enumerate(covered)
                if a < end and b > start and not _begins_what_follows(text, a, b, end)
            )
            if not run:
                raise PromptError(
                    f"no token of {text!r} covers the field {name!r} "
                    f"({text[start:end]!r}): the tokenizer drops it. "
                    "Change the field's text."
                )
            found.append(run)
        runs[name] = tuple(found)
    return Tokenized(tuple(ids), {**runs, **standard}, prompt)


#: How tokenizers write a space: SentencePiece's mark, GPT-2's, itself.
_SPACES = "▁Ġ "


def _covered(
    text: str, pieces: Sequence[str | None], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The characters that each token is made of, where tokenizers' offsets say otherwise.

    Byte-level tokenizers may leave the spaces before a word out of its token's offsets, so that a
    token of spaces has no width. And a tokenizer may put a space of its own before a word, which
    gets the word's first character as if it were made of that.
    """
    found: list[tuple[int, int]] = []
    done = 0  # where the token before ends
    for i, (piece, (a, b)) in enumerate(zip(pieces, offsets, strict=True)):
        piece = piece or ""
        spaces = len(piece) - len(piece.lstrip(_SPACES))
        if spaces and spaces == len(piece):
            here, following = text[a:b], offsets[i + 1 : i + 2]
            if a == b:
                real = text[done : done + spaces] == " " * spaces
                a, b = (done, done + spaces) if real else (0, 0)
            elif here.strip(_SPACES).strip() or (following and following[0][0] == a):
                a, b = 0, 0  # these are another token's characters
        while spaces and a < b and a > done and text[a - 1] == " ":
            a, spaces = a - 1, spaces - 1
        found.append((a, b))
        done = max(done, b)
    return found


def _begins_what_follows(text: str, start: int, stop: int, end: int) -> bool:
    """Whether a token at [start, stop) has only white space before `end`, and a word after it."""
    return stop > end and not text[start:end].strip() and bool(text[end:stop].strip())


def continuation(
    prompt: Tokenized, text: str, tokenizer: Any, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """The token ids that `text` adds after the prompt, as they stand in the text as a whole.

    Raises:
        PromptError: the text's first characters join the prompt's last token, so that no token
            begins where the text does.
    """
    if prompt.prompt is None:
        raise PromptError("an answer needs a prompt with a text; this one is bare tokens.")
    whole, _ = encode(prompt.prompt.text + text, tokenizer, prepend_bos)
    if tuple(whole[: len(prompt)]) != prompt.ids or len(whole) == len(prompt):
        raise PromptError(
            f"{text!r} after {prompt.prompt.text[-20:]!r} does not begin a token of its own. "
            "End the prompt without a space and begin the answer with one."
        )
    return tuple(whole[len(prompt) :])
