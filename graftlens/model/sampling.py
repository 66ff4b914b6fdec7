"""How a next token is chosen from logits: the likeliest, or one drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.model.reading import AssertedError


@dataclass(frozen=True)
class Sampling:
    """The options of one generation, applied in this order, which is TransformerLens's.

    Attributes:
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        repetition_penalty: logits of tokens that appeared are divided by it where positive, and
            multiplied by it where negative (Keskar et al., arXiv 1909.05858); drawing or not.
        temperature: divides the logits when drawing; 0 takes the likeliest.
        freq_penalty: subtracted from a token's logit, when drawing, once per time that it appeared.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities add up to this or more (Holtzman
            et al., arXiv 1904.09751).
    """

    do_sample: bool = False
    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None
    freq_penalty: float | int = 0.0
    repetition_penalty: float | int = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an option outside its range, or both `top_k` and `top_p`.
        """
        for name, low, allowed in (
            ("temperature", 0.0, "a number from 0 (0 takes the likeliest token)"),
            ("freq_penalty", 0.0, "a number from 0"),
            ("repetition_penalty", math.ulp(0.0), "a number above 0 (1 changes nothing)"),
        ):
            value = getattr(self, name)
            if not (_is_number(value) and low <= value < math.inf):
                raise ValueError(f"{name}={value!r}: write {allowed}.")
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            raise AssertedError(f"top_k={self.top_k!r}: write a whole number from 1, or None.")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise AssertedError(
                f"top_p={self.top_p!r}: write a number above 0 and up to 1, or None."
            )
        if self.top_k is not None and self.top_p is not None:
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p}: give one of them. (TransformerLens "
                "leaves out top_p where both are given.)"
            )

    @property
    def counts(self) -> bool:
        """Whether the choice depends on which tokens appeared before."""
        return self.repetition_penalty != 1 or (self.draws and self.freq_penalty != 0)

    @property
    def draws(self) -> bool:
        """Whether there is anything random."""
        return self.do_sample and self.temperature != 0

    def pick(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        seen: Int[Tensor, "batch d_vocab"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, " batch"]:
        """The next token of each row.

        Args:
            logits: of each row's next token.
            seen: how often each token appeared in each row; needed where `counts`.
            generator: the randomness; None is PyTorch's own.
        """
        scores = self.scores(logits, seen)
        if not self.draws:
            return scores.argmax(-1)
        return torch.multinomial(scores.float().softmax(-1), 1, generator=generator)[:, 0]

    def scores(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        seen: Int[Tensor, "batch d_vocab"] | None = None,
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the distribution that is drawn from, or of which the likeliest is taken; -inf
        where a token is left out."""
        if self.repetition_penalty != 1:
            assert seen is not None
            penalised = torch.where(
                logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
            )
            logits = torch.where(seen > 0, penalised, logits)
        if not self.draws:
            return logits
        logits = logits / self.temperature
        if self.freq_penalty:
            assert seen is not None
            logits = logits - self.freq_penalty * seen
        if self.top_k is not None:
            floor = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        elif self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            # A token stays if the likelier ones do not yet add up to more than top_p.
            likelier = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            likelier[:, 0] = 0
            left_out = torch.zeros_like(logits, dtype=torch.bool)
            left_out.scatter_(-1, order, likelier > self.top_p)
            logits = logits.masked_fill(left_out, -torch.inf)
        return logits


def count_tokens(
    tokens: Int[Tensor, "batch pos"], real: Int[Tensor, "batch pos"], d_vocab: int
) -> Int[Tensor, "batch d_vocab"]:
    """How often each token appears in each row, where `real` is 1 and not 0."""
    seen = torch.zeros(len(tokens), d_vocab, dtype=torch.long, device=tokens.device)
    return seen.scatter_add_(1, tokens, real)


class StopStrings:
    """Which texts end a generation: a row is finished once a token completes one of them."""

    def __init__(self, strings: str | Sequence[str]) -> None:
        """Check the strings.

        Raises:
            ValueError: none, or one that is empty or no text.
        """
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        wrong = [s for s in self.strings if not isinstance(s, str) or not s]
        if wrong or not self.strings:
            said = repr(wrong[0]) if wrong else repr(strings)
            raise ValueError(f"stop_strings: {said}. Give a text, or several, none of them empty.")

    def completed(self, before: str, now: str) -> bool:
        """Whether the text `now` has a string that ends beyond what it had as `before`."""
        # The last character of what was there may have been incomplete.
        pairs = enumerate(zip(before, now, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(now)))
        return any(now.find(s, max(0, same - len(s) + 1)) >= 0 for s in self.strings)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
