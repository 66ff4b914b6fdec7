"""A batch as the forward reads it: tokens, positions, which rows are real, and their spans."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from graftlens.prompts import Prompt, PromptError, Tokenized

Padding = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Prompts in one padded rectangle. Everything but `tokens` lives on the host.

    Attributes:
        tokens: token ids; padding holds any valid id.
        real: which places hold a token of the prompt (or of what follows it).
        prompts: the tokenized prompts, one per row.
        starts: per row, the column of its first token.
        totals: per row, the number of real tokens; more than `len(prompt)` if an answer or
            generated tokens follow, whose positions all count as `last`.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[np.ndarray, "batch pos"]
    prompts: tuple[Tokenized, ...]
    starts: tuple[int, ...]
    totals: tuple[int, ...]

    @property
    def extents(self) -> tuple[tuple[int, int, int], ...]:
        """Per row, its first column, the prompt's length, and the length with what follows."""
        return tuple(
            (start, len(prompt), total)
            for start, prompt, total in zip(self.starts, self.prompts, self.totals, strict=True)
        )

    @property
    def padded(self) -> bool:
        """Whether any place holds no token."""
        return not bool(self.real.all())

    def rows(self, which: slice) -> "Batch":
        """Some of the prompts, in a rectangle of the same width."""
        return Batch(
            self.tokens[which],
            self.real[which],
            self.prompts[which],
            self.starts[which],
            self.totals[which],
        )

    def position_ids(self) -> Int[np.ndarray, "batch pos"]:
        """Each row's own count from 0; padding gets 0."""
        return positions_of(self.real)

    def last_columns(self) -> tuple[int, ...]:
        """Per row, the column of the prompt's own last token."""
        return tuple(s + len(p) - 1 for s, p in zip(self.starts, self.prompts, strict=True))


def positions_of(real: Bool[np.ndarray, "batch pos"]) -> Int[np.ndarray, "batch pos"]:
    """Each row's own count of its tokens from 0; padding gets 0."""
    return np.where(real, np.cumsum(real, axis=1) - 1, 0)


#: What a run can be given: token tensors, texts, prompts, or a batch made of them.
Input = Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | str | Prompt | Sequence[Any] | Batch


def generating(batch: Batch) -> Batch:
    """The same prompts where tokens are generated after them, which rules may name."""
    return replace(batch, prompts=tuple(prompt.generating() for prompt in batch.prompts))


def collate(
    prompts: Sequence[Tokenized],
    *,
    pad_id: int = 0,
    side: Padding = "right",
    continuations: Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad tokenized prompts, each with the tokens that follow it, to one rectangle.

    Raises:
        PromptError: no prompt at all.
    """
    if not prompts:
        raise PromptError("no prompts: give at least one.")
    tails = continuations or [()] * len(prompts)
    rows = [[*p.ids, *tail] for p, tail in zip(prompts, tails, strict=True)]
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    starts = tuple(width - len(row) if side == "left" else 0 for row in rows)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, start : start + len(row)] = row
        real[i, start : start + len(row)] = True
    return Batch(
        torch.from_numpy(tokens).to(device), real, tuple(prompts), starts, tuple(map(len, rows))
    )


def from_tokens(
    tokens: Int[Tensor, "batch pos"] | Int[Tensor, " pos"],
    attention_mask: Any = None,
    *,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_ids: Collection[int] = (),
) -> Batch:
    """A batch of bare tokens. Without an attention mask every place is a token of the prompt.

    Args:
        tokens: token ids, on any device.
        attention_mask: of the tokens' shape ([1, pos] also with tokens [pos]), 1 for tokens and 0
            for padding on the left or on the right.
        pad_id: the pad token, where known: without a mask, rows are searched for padding. Four
            columns are copied to the host for it.
        bos_id, eos_ids: tokens that may begin and end a prompt. A pad token that is one of them is
            taken for it where it appears once, in every row.

    Raises:
        PromptError: a mask of another shape, with other values or with a gap, a row without tokens,
            or rows that begin or end in padding when there is no mask.
    """
    single = tokens.ndim == 1
    tokens = tokens[None] if single else tokens
    count, width = tokens.shape
    if count == 0 or width == 0:
        raise PromptError(f"tokens of shape {tuple(tokens.shape)}: give at least one token.")
    if attention_mask is None:
        if pad_id is not None:
            _refuse_hidden_padding(tokens, pad_id, bos_id, eos_ids)
        real = np.ones((count, width), dtype=bool)
    else:
        row = single and getattr(attention_mask, "ndim", 2) == 1
        real = np.atleast_2d(_real_places(attention_mask, tuple(tokens.shape[row:])))
    lengths = real.sum(axis=1).tolist()
    starts = tuple(np.argmax(real, axis=1).tolist())
    ids = tokens.detach().cpu().numpy() if tokens.device.type == "cpu" else None
    prompts = tuple(
        Tokenized.bare(ids[i, s : s + n].tolist() if ids is not None else [0] * n)
        for i, (s, n) in enumerate(zip(starts, lengths, strict=True))
    )
    return Batch(tokens, real, prompts, starts, tuple(lengths))


def _real_places(attention_mask: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "*shape"]:
    """An attention mask on the host, the tokens of each row consecutive."""
    if not isinstance(attention_mask, Tensor):
        raise PromptError(
            f"attention_mask is a {type(attention_mask).__name__}. Give a tensor of the tokens' "
            "shape, 1 for tokens and 0 for padding."
        )
    if tuple(attention_mask.shape) != shape:
        raise PromptError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, tokens have {shape}. "
            "Give one value per token."
        )
    host = attention_mask.detach().cpu()
    real = host == 1
    # An additive mask has 0 for tokens: its meaning would be inverted.
    if not bool((real | (host == 0)).all()):
        raise PromptError(
            f"attention_mask holds {host[~(real | (host == 0))][0].item()}. "
            "Write 1 for tokens and 0 for padding."
        )
    rows = np.atleast_2d(real.numpy())
    edges = np.abs(np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(np.int8), axis=1)).sum(axis=1)
    if not (edges == 2).all():
        row = int(np.argmax(edges != 2))
        raise PromptError(
            f"attention_mask row {row} is {rows[row].astype(int).tolist()}: the tokens of a "
            "prompt must be in one run, with padding on the left or on the right only."
        )
    return real.numpy()


def _refuse_hidden_padding(
    tokens: Int[Tensor, "batch pos"], pad_id: int, bos_id: int | None, eos_ids: Collection[int]
) -> None:
    """Refuse rows that begin or end in padding: where their prompts are must not be guessed."""
    width = tokens.shape[1]
    if width == 1:
        return  # a prompt has a token, so there is no room for padding
    outer_first = torch.cat([tokens[:, :2], tokens[:, -2:].flip(1)], dim=1)
    padding = outer_first.detach().cpu().numpy() == pad_id  # one copy from any device
    edges = (
        ("begins", padding[:, :2], pad_id == bos_id),
        ("ends", padding[:, 2:], pad_id in eos_ids),
    )
    for what, pads, may_be_meant in edges:
        once, twice = pads[:, 0], pads.all(axis=1)
        if not once.any() or (may_be_meant and once.all() and not twice.any()):
            continue
        row = int(np.argmax(twice if twice.any() else once))
        raise PromptError(
            f"row {row} {what} in the pad token {pad_id}, so the position of its prompt is "
            "unknown. Pass attention_mask (1 for tokens, 0 for padding; torch.ones_like(tokens) "
            "where all are tokens), or prompts as text."
        )
