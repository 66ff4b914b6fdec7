"""Texts, prompts and tokens: what a model is given as a batch, and tokens read as text."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from graftlens.model.arch import Architecture
from graftlens.model.inputs import Batch, Input, Padding, collate, from_tokens
from graftlens.prompts import Prompt, Tokenized, encode, tokenize


class Reading:
    """The part of `GraftedTransformer` that reads what it is given."""

    arch: Architecture
    cfg: Any
    tokenizer: Any

    def batch(
        self,
        input: Input,
        *,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: Padding = "right",
    ) -> Batch:
        """Whatever can be run, as a batch.

        Raises:
            PromptError: an empty input, or a malformed attention mask.
            ValueError: texts for a model without a tokenizer, or token ids outside the vocabulary.
        """
        if isinstance(input, Batch):
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
            return from_tokens(
                input.long(),
                attention_mask,
                pad_id=getattr(self.tokenizer, "pad_token_id", None),
                bos_id=getattr(self.tokenizer, "bos_token_id", None),
            )
        if attention_mask is not None:
            raise ValueError("attention_mask goes with token ids; texts bring their own padding.")
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side={padding_side!r}. Allowed: "left" or "right".')
        prompts = self.tokenized(input, prepend_bos)
        high = max((i for prompt in prompts for i in prompt.ids), default=0)
        if high >= self.arch.d_vocab:
            raise ValueError(
                f"token id {high} is outside the vocabulary (0 to {self.arch.d_vocab - 1}): "
                "the tokenizer has tokens that the model lacks. Check tokenizer=…"
            )
        return collate(prompts, pad_id=self._pad_id(), side=padding_side)

    def tokenized(self, prompts: Any, prepend_bos: bool | None = None) -> tuple[Tokenized, ...]:
        """Prompts as tokens with spans; a single prompt counts as a list of one.

        Raises:
            ValueError: texts for a model without a tokenizer, or something that is no prompt, such
                as what a tokenizer returns.
        """
        if isinstance(prompts, Mapping):
            raise ValueError(
                f"a {type(prompts).__name__} with the keys {' '.join(map(str, prompts))} is no "
                'prompt. Of what a tokenizer returns, give the tensors (return_tensors="pt"): '
                'model.batch(enc["input_ids"], attention_mask=enc["attention_mask"]) is a batch '
                "that everything runs."
            )
        single = isinstance(prompts, str | Prompt | Tokenized) or not isinstance(prompts, Iterable)
        items = [prompts] if single else list(prompts)
        for item in items:
            if not isinstance(item, str | Prompt | Tokenized):
                raise ValueError(
                    f"{item!r} is no prompt. Give texts, Prompts, or a tensor of token ids."
                )
        return tuple(
            item if isinstance(item, Tokenized) else tokenize(item, self._tokenizer(), prepend_bos)
            for item in items
        )

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this model was loaded without a tokenizer, so it runs token tensors only. "
                "Load it with tokenizer=…, or set model.tokenizer."
            )
        return self.tokenizer

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            known = getattr(self.tokenizer, name, None)
            if known is not None and known < self.arch.d_vocab:
                return int(known)
        return 0

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: Padding = "right",
    ) -> Int[Tensor, "batch pos"]:
        """Token ids [batch, pos], padded. BOS is the tokenizer's own choice unless it is forced.

        To run texts of different lengths, give `model(…)` the texts: it knows what is padding.
        """
        batch = self.batch(input, prepend_bos=prepend_bos, padding_side=padding_side)
        return batch.tokens.to(self.cfg.device)

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids, or a list of texts for [batch, pos]."""
        ids = tokens.tolist() if isinstance(tokens, Tensor | np.ndarray) else tokens
        decode = partial(self._tokenizer().decode, clean_up_tokenization_spaces=False)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [decode(row) for row in ids]
        return decode(ids if isinstance(ids, list) else [ids])

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """The text of each token of one prompt; a list of such lists for several."""
        if isinstance(input, Tensor | np.ndarray):
            rows = input.tolist()
            many = bool(rows) and isinstance(rows[0], list) and len(rows) > 1
            rows = rows if rows and isinstance(rows[0], list) else [rows]
        else:
            many = not isinstance(input, str | Prompt | Tokenized)
            rows = [list(t.ids) for t in self.tokenized(input, prepend_bos)]
        texts = [[self.to_string([i]) for i in row] for row in rows]
        return texts if many else texts[0]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: a text of more tokens, or of none.
        """
        ids, _ = encode(string, self._tokenizer(), prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(
                f"{string!r} is {len(ids)} tokens ({ids}), not one. "
                "Check the leading space, or take one of model.to_tokens(…, prepend_bos=False)."
            )
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id."""
        text = self.to_string([token])
        assert isinstance(text, str)
        return text
