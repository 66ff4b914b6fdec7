"""Texts, prompts and tokens: what a model is given as a batch, and tokens read as text."""

import copy
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from graftlens.components import Component
from graftlens.model.arch import Architecture
from graftlens.model.inputs import Batch, Input, Padding, collate, from_tokens
from graftlens.model.mask import GraftMask
from graftlens.model.vocabulary import Vocabularies
from graftlens.prompts import (
    Prompt,
    PromptError,
    Tokenized,
    dated,
    doubled_bos,
    encode,
    tokenize,
)

#: Modules that a warning does not point at.
_PASSED_ON = ("graftlens", "torch", "transformer_lens", "contextlib")


def tell(note: str) -> None:
    """Warn, pointing at the line that called this library, through any module."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _PASSED_ON:
        level, frame = level + 1, frame.f_back
    warnings.warn(note, stacklevel=level)


def whole(value: Any, what: str) -> int:
    """A whole number of any kind, as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what}={value!r}: write a whole number, or leave it out.") from None


class AssertedError(ValueError, AssertionError):
    """What is refused where TransformerLens's own models raise an AssertionError."""


def _listed(tokens: Any) -> Any:
    """Token ids of any kind as Python's numbers, nested by axis."""
    if isinstance(tokens, Tensor | np.ndarray | np.generic):
        return tokens.tolist()
    return [_listed(i) for i in tokens] if isinstance(tokens, list | tuple) else tokens


class Reading:
    """The part of `GraftedTransformer` that reads what it is given."""

    arch: Architecture
    cfg: Any
    hf_config: Any
    tokenizer: Any
    end_tokens: Mapping[str, tuple[int, ...]]
    pad_token: Mapping[str, int | None]
    sources: tuple[str, ...]
    unembed: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "tokenizer" and "cfg" in vars(self):
            self.cfg.reads(value)

    def batch(
        self,
        input: Input,
        *,
        attention_mask: Any = None,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
    ) -> Batch:
        """Anything that can be run, as a batch.

        Args:
            input: as in `forward`.
            attention_mask: a tensor of the tokens' shape, 1 for tokens, 0 for padding. Token ids
                without one are all tokens of the prompts, so those that look padded are refused:
                rows that begin or end in the pad token. If it is also the BOS token, it may begin
                every row once; if it is an EOS token, it may end every row once.
            prepend_bos: for texts; None is `model.cfg.default_prepend_bos`, which leaves it to the
                tokenizer unless it is set.
            padding_side: for texts; None is `model.tokenizer.padding_side`. A prompt's own numbers
                do not depend on it, only the columns in which they are.

        Raises:
            PromptError: an empty input, a malformed attention mask, or padding without one.
            ValueError: texts for a model without a tokenizer, or token ids outside the vocabulary.
        """
        if isinstance(input, Batch):
            if attention_mask is not None:
                raise ValueError("attention_mask applies to token ids; a Batch knows its padding.")
            return input
        if isinstance(input, Tensor):
            if input.is_floating_point() or input.ndim not in (1, 2):
                raise ValueError(
                    f"tokens of shape {tuple(input.shape)} and dtype {input.dtype}: "
                    "give whole numbers, [batch, pos] or [pos]."
                )
            if input.device.type == "cpu" and input.numel():
                low, high = int(input.min()), int(input.max())
                if low < 0 or high >= self.arch.d_vocab:
                    raise ValueError(
                        f"token id {low if low < 0 else high} is outside the vocabulary "
                        f"(0 to {self.arch.d_vocab - 1})."
                    )
            # Qwen's tokenizers have no BOS token, but its configs do.
            known = (getattr(x, "bos_token_id", None) for x in (self.tokenizer, self.hf_config))
            ends = {end for ends in self.end_tokens.values() for end in ends}
            if (eos := getattr(self.tokenizer, "eos_token_id", None)) is not None:
                ends.add(eos)
            return from_tokens(
                input.long(),
                attention_mask,
                pad_id=self._padding(),
                bos_id=next((bos for bos in known if bos is not None), None),
                eos_ids=ends,
            )
        if attention_mask is not None:
            raise ValueError("attention_mask applies to token ids; texts have their own padding.")
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        if side not in ("left", "right"):
            raise ValueError(f'padding_side={side!r}. Allowed: "left" or "right".')
        prompts = self.tokenized(input, prepend_bos)
        high = max((i for prompt in prompts for i in prompt.ids), default=0)
        if high >= self.arch.d_vocab:
            raise ValueError(
                f"token id {high} is outside the vocabulary (0 to {self.arch.d_vocab - 1}): "
                "the tokenizer has tokens that the model lacks. Check tokenizer=…"
            )
        return collate(prompts, pad_id=self.pad_id(), side=side)

    @property
    def vocabularies(self) -> Vocabularies:
        """How many tokens each source has rows for."""
        sizes = self.unembed.vocabularies.sizes
        return Vocabularies(self.sources, sizes, self.tokenizer)

    def refuse_lacking(self, batch: Batch, mask: GraftMask) -> None:
        """That no token is read from the embedding of a source that lacks it.

        Raises:
            PromptError: one is, with its prompt, position and source.
        """
        vocabularies = self.vocabularies
        if not vocabularies.differ:
            return
        tokens = batch.tokens.cpu().numpy()
        chosen = mask[Component.EMBED, None]
        known = vocabularies.of_rows(chosen).reshape(mask.shape)
        lacks = np.argwhere((tokens >= known) & batch.real)
        if len(lacks):
            row, column = lacks[0].tolist()
            here = row * mask.shape[1] + column
            sources = [s for s in chosen.sources if chosen.share(s)[here]]
            position = column - batch.starts[row]
            why = vocabularies.lacking(int(tokens[row, column]), sources, position)
            raise PromptError(f"prompt {row}: {why}")

    def tokenized(self, prompts: Any, prepend_bos: bool | None = None) -> tuple[Tokenized, ...]:
        """Prompts as tokens with spans; a single prompt counts as a list of one.

        Raises:
            ValueError: texts for a model without a tokenizer, or something that is not a prompt,
                such as what a tokenizer returns.
        """
        if isinstance(prompts, Mapping):
            raise ValueError(
                f"a {type(prompts).__name__} with the keys {' '.join(map(str, prompts))} is not a "
                'prompt. Of what a tokenizer returns, give the tensors (return_tensors="pt"): '
                'model.batch(enc["input_ids"], attention_mask=enc["attention_mask"]) is a batch '
                "that everything runs."
            )
        single = isinstance(prompts, str | Prompt | Tokenized) or not isinstance(prompts, Iterable)
        items = [prompts] if single else list(prompts)
        for item in items:
            if isinstance(item, Mapping) and "role" in item:
                raise ValueError(
                    "a list of messages is not a prompt by itself. Give Prompt.chat(messages)."
                )
            if not isinstance(item, str | Prompt | Tokenized):
                raise ValueError(
                    f"{item!r} is not a prompt. Give texts, Prompts, or a tensor of token ids."
                )
        bos = self.prepends_bos(prepend_bos)
        for note in (doubled_bos(items, self.tokenizer, bos), dated(items, self.tokenizer)):
            if note:
                tell(note)
        return tuple(
            item if isinstance(item, Tokenized) else tokenize(item, self._tokenizer(), bos)
            for item in items
        )

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise AssertedError(
                "this model was loaded without a tokenizer, so it runs token tensors only. "
                "Load it with tokenizer=…, or set model.tokenizer."
            )
        return self.tokenizer

    def _padding(self) -> int | None:
        """The token that prompts are padded with: the tokenizer's, else that of the settings."""
        if self.tokenizer is None:
            return next((pad for pad in self.pad_token.values() if pad is not None), None)
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            known = getattr(self.tokenizer, name, None)
            if known is not None and known < self.arch.d_vocab:
                return int(known)
        return None

    def pad_id(self) -> int:
        return self._padding() or 0

    def prepends_bos(self, asked: bool | None = None) -> bool | None:
        """Whether texts get a BOS token: the argument, else `cfg.default_prepend_bos`.

        Returns:
            None where it is left to the tokenizer.

        Raises:
            ValueError: `cfg.default_prepend_bos` is set to something else.
        """
        chosen = self.cfg.default_prepend_bos if asked is None else asked
        if chosen is not None and not isinstance(chosen, bool):
            raise ValueError(
                f"prepend_bos is {chosen!r}. Write True or False, or None to leave it to the "
                "tokenizer (also in model.cfg.default_prepend_bos)."
            )
        return chosen

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids [batch, pos], padded; `prepend_bos` and `padding_side` as in `batch`.

        To run texts of different lengths, give `model(…)` the texts: it knows what is padding.

        Args:
            input: as in `forward`.
            prepend_bos, padding_side: as in `batch`.
            move_to_device: False leaves the ids on the host.
            truncate: keep the first `cfg.n_ctx` tokens of each prompt (with a warning where that
                leaves some out).
        """
        batch = self.batch(input, prepend_bos=prepend_bos, padding_side=padding_side)
        limit, longest = self.cfg.n_ctx, max(batch.totals)
        if truncate and longest > limit:
            tell(
                f"of {longest} tokens, the {limit} that the model's context holds are kept. "
                "to_tokens(…, truncate=False) keeps all."
            )
            first = np.array(batch.starts)
            # Rows that are short enough keep their padding, on the side where it is.
            short = (first > 0) & (np.array(batch.totals) <= limit)
            first = np.where(short, batch.real.shape[1] - limit, first)
            columns = torch.from_numpy(first[:, None] + np.arange(limit))
            tokens = batch.tokens.gather(1, columns.to(batch.tokens.device))
        else:
            tokens = batch.tokens
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids, or a list of texts for [batch, pos].

        Raises:
            ValueError: more than two axes.
        """
        ids = _listed(tokens)
        decode = partial(self._tokenizer().decode, clean_up_tokenization_spaces=False)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            if any(isinstance(i, list) for row in ids for i in row):
                raise ValueError(
                    f"tokens of shape {tuple(np.shape(ids))}: give whole numbers, [batch, pos] "
                    "or [pos]."
                )
            return [decode(row) for row in ids]
        return decode(ids if isinstance(ids, list) else [ids])

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: Padding | None = None
    ) -> Any:
        """The text of each token of one prompt; a list of such lists for several.

        Args:
            input: a text or prompt, token ids, or a list of any of these.
            prepend_bos: for texts, as in `batch`.
            padding_side: no token of one prompt depends on it.
        """
        if isinstance(input, Tensor | np.ndarray):
            rows = _listed(input)
            rows = rows if isinstance(rows, list) else [rows]
            many = bool(rows) and isinstance(rows[0], list) and len(rows) > 1
            rows = rows if rows and isinstance(rows[0], list) else [rows]
        elif isinstance(input, list) and any(isinstance(i, Tensor | np.ndarray) for i in input):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        else:
            many = not isinstance(input, str | Prompt | Tokenized)
            rows = [list(t.ids) for t in self.tokenized(input, prepend_bos)]
        texts = [[self.to_string([i]) for i in row] for row in rows]
        return texts if many else texts[0]

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
    ) -> int:
        """Where a token first, or last, occurs in one prompt.

        Args:
            single_token: its id, or a text that is one token.
            input: a text or prompt, or token ids [pos] or [1, pos].
            mode: "first" or "last".
            prepend_bos, padding_side: for texts, as in `batch`.

        Raises:
            ValueError: a token that does not occur, several prompts, or another mode.
        """
        if mode not in ("first", "last"):
            raise ValueError(f'mode={mode!r}. Allowed: "first" or "last".')
        texts = not isinstance(input, Tensor | np.ndarray)
        tokens = self.to_tokens(input, prepend_bos, padding_side) if texts else input
        rows = np.atleast_2d(np.array(_listed(tokens)))
        if len(rows) != 1:
            raise AssertedError(f"{len(rows)} prompts: a position is that of one prompt.")
        if isinstance(single_token, str):
            single_token = self.to_single_token(single_token)
        found = np.flatnonzero(rows[0] == int(single_token))
        if not len(found):
            raise AssertedError(
                f"The token does not occur in the prompt: {int(single_token)} is none of "
                f"{rows[0].tolist()}."
            )
        return int(found[0 if mode == "first" else -1])

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Read texts with another tokenizer; it is copied, and pads on the right unless given.

        Raises:
            ValueError: something that is not a Hugging Face tokenizer, or another side.
        """
        if not hasattr(tokenizer, "padding_side") or not callable(tokenizer):
            raise AssertedError(
                f"{type(tokenizer).__name__} is not a tokenizer. Give one of transformers' fast "
                "tokenizers."
            )
        side = default_padding_side or "right"
        if side not in ("left", "right"):
            raise ValueError(f'default_padding_side={side!r}. Allowed: "left" or "right".')
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = side
        self.tokenizer = tokenizer

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: a text of more tokens, or of none.
        """
        ids, _ = encode(string, self._tokenizer(), prepend_bos=False)
        if len(ids) != 1:
            raise AssertedError(
                f"{string!r} is {len(ids)} tokens ({ids}), not one. "
                "Check the leading space, or take one of model.to_tokens(…, prepend_bos=False)."
            )
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id.

        Raises:
            ValueError: something that is not a whole number.
        """
        text = self.to_string([whole(token, "token")])
        assert isinstance(text, str)
        return text
