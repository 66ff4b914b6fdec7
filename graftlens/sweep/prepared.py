"""Prompts made ready to be run: tokenized once, with their answers and distractors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from graftlens.model.arch import Architecture
from graftlens.prompts import Prompt, PromptError, Tokenized, continuation, dated, tokenize

#: What a sweep calls the day that its prompts' tokens are of.
_DAY = "day that the chat template writes"

#: Whether a continuation is scored as a whole, or its first token only.
Extent = Literal["whole", "first"]


@dataclass(frozen=True)
class Scored:
    """A prompt ready to be run: its tokens, its answer's tokens, its distractors' tokens.

    Attributes:
        number: the prompt's number in the results.
        answer: the token ids that the answer adds after the prompt.
        distractors: likewise, for each distractor.
        answers: the different first tokens of all right answers (`Prompt.answers`).
    """

    number: int
    prompt: Prompt
    tokens: Tokenized
    answer: tuple[int, ...]
    distractors: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...] = ()

    def continuations(self, answers: Extent, distractors: Extent) -> list[tuple[int, ...]]:
        """The answer, as far as it is scored, and distractors that are scored as a whole.

        First tokens of distractors are read where the answer's is.
        """
        answer = self.answer if answers == "whole" else self.answer[:1]
        return [answer, *(self.distractors if distractors == "whole" else ())]

    @property
    def wrong(self) -> tuple[int, ...]:
        """The different first tokens of the distractors, without the answer's own."""
        first = dict.fromkeys(ids[0] for ids in self.distractors)
        return tuple(token for token in first if token != self.answer[0])


class Prepared:
    """Makes prompts ready to be run, each once; no model is needed.

    Example:
        >>> prepared = Prepared(tokenizer, arch, answers="first")
        >>> prepared(0, prompt).tokens
    """

    def __init__(
        self,
        tokenizer: Any,
        arch: Architecture,
        prepend_bos: bool | None = None,
        answers: Extent = "whole",
        distractors: Extent = "first",
    ) -> None:
        """Lengths are checked as far as answers and distractors are scored."""
        self.tokenizer, self.arch, self.prepend_bos = tokenizer, arch, prepend_bos
        self.answers, self.distractors = answers, distractors
        self._known: dict[tuple[int, Prompt], Scored | str] = {}

    def __call__(self, number: int, prompt: Prompt) -> Scored:
        """A prompt with its number in the results.

        Raises:
            PromptError: a prompt without an answer, or one that this model cannot run.
        """
        key = (number, prompt)
        if key not in self._known:
            try:
                self._known[key] = self._prepare(number, prompt)
            except PromptError as error:
                self._known[key] = str(error)
        found = self._known[key]
        if isinstance(found, str):
            raise PromptError(found)
        return found

    def all(self, prompts: Mapping[int, Prompt]) -> tuple[list[Scored], dict[int, str]]:
        """The prompts that can be run, and for the others, why not."""
        ready, unready = list[Scored](), dict[int, str]()
        for number, prompt in prompts.items():
            try:
                ready.append(self(number, prompt))
            except PromptError as error:
                unready[number] = str(error)
        return ready, unready

    def tokens(self, prompt: Prompt) -> Tokenized:
        """A prompt's tokens, with an answer or without.

        Raises:
            PromptError: a prompt that cannot be read.
        """
        return tokenize(prompt, self.tokenizer, self.prepend_bos)

    def generating(self, prompts: Sequence[Prompt]) -> tuple[list[Tokenized], dict[int, str]]:
        """The tokens of prompts that texts can be generated from, and for the others, why not."""
        ready, unready = list[Tokenized](), dict[int, str]()
        for number, prompt in enumerate(prompts):
            try:
                ready.append(self.tokens(prompt).generating())
            except PromptError as error:
                unready[number] = str(error)
        return ready, unready

    def continuations(self, scored: Scored) -> list[tuple[int, ...]]:
        """What follows a prompt, as far as it is scored here."""
        return scored.continuations(self.answers, self.distractors)

    def longest(self, ready: Iterable[Scored]) -> int:
        """The longest text that is run of these prompts, in tokens."""
        lengths = (len(s.tokens) + max(map(len, self.continuations(s))) - 1 for s in ready)
        return max(lengths, default=0)

    def _prepare(self, number: int, prompt: Prompt) -> Scored:
        if prompt.answer is None:
            raise PromptError("the prompt has no answer to score.")
        tokens = self.tokens(prompt)

        def follows(text: str) -> tuple[int, ...]:
            return continuation(tokens, text, self.tokenizer, self.prepend_bos)

        answer, others = follows(prompt.answer), tuple(map(follows, prompt.distractors))
        right = tuple(dict.fromkeys(follows(text)[0] for text in prompt.answers))
        scored = Scored(number, prompt, tokens, answer, others, right)
        length = self.longest([scored])
        if length > self.arch.n_ctx and self.arch.rotary_dim == 0:
            raise PromptError(
                f"prompt and answer (or a distractor, where they are scored as a whole) are "
                f"{length} tokens, more than the model's context of {self.arch.n_ctx}. Shorten the "
                "prompt."
            )
        highest = max(i for ids in (tokens.ids, answer, *others, right) for i in ids)
        if highest >= self.arch.d_vocab:
            raise PromptError(
                f"the tokenizer gives token id {highest}, but the model's vocabulary ends at "
                f"{self.arch.d_vocab - 1}."
            )
        return scored


def day_of(prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, str]:
    """The day that the prompts' tokens are of, where the chat template writes the day's date."""
    return {_DAY: date.today().isoformat()} if dated(prompts, tokenizer) else {}


def refuse_another_day(folder: Path, known: Mapping[str, Any]) -> None:
    """That prompts have today the tokens that they had.

    Args:
        folder: the sweep's.
        known: what it knows of its prompts, `day_of` included.

    Raises:
        ValueError: they have those of another day.
    """
    today = date.today().isoformat()
    if (day := known.get(_DAY, today)) != today:
        raise ValueError(
            f"{folder} was started on {day}, and the chat template writes the day's date: its "
            f"prompts have other tokens today, {today}. Start the sweep in a new folder, with the "
            'date fixed: template_options: {date_string: "26 Jul 2024"}, or as the template has it.'
        )


def joined_answers(prompts: Sequence[Prompt]) -> str | None:
    """A note on answers that continue the prompt's last word, which is rarely intended."""
    edges = [
        prompt.text[-1] + (prompt.answer or " ")[0]
        if prompt.conversation is None or prompt.conversation.begun
        else ""  # the chat template ends the last message
        for prompt in prompts
    ]
    numbers = [i for i, edge in enumerate(edges) if edge.isascii() and edge.isalnum()]
    if not numbers:
        return None
    answer = prompts[numbers[0]].answer
    more = f" (And {len(numbers) - 1} more prompts.)" if len(numbers) > 1 else ""
    return (
        f"prompt {numbers[0]}: the answer {answer!r} continues the prompt's last word. Did you "
        f"mean {' ' + str(answer)!r}?{more}"
    )
