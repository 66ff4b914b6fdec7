"""Prompts that grow by one token per step under a graft, with a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.graft import Graft
from graftlens.model.arch import Architecture
from graftlens.model.calls import Start
from graftlens.model.inputs import Batch, collate
from graftlens.model.mask import GraftMask
from graftlens.model.passes import KeyValueCache


class Decoder:
    """Prompts and what follows them; at every step `last` is the position generated from.

    Attributes:
        logits: of each row's next token, [batch, d_vocab].
        batch: the prompts as they were given, padded on the left, without what follows.
        tokens: prompts and what follows, [batch, pos].
        graft: what runs, where all rows run one graft.
        step_mask: what the positions after the prompts run, [batch, 1].
        later: what the prompts with one more token run, where `run` has run them.
        embeds: what runs instead of the tokens' embeddings, [batch, pos, d_model], where the
            prompts were given as embeddings.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        logits: Float[Tensor, "batch d_vocab"],
        step_mask: GraftMask,
        cache: KeyValueCache | None,
        graft: Graft | None = None,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> None:
        """Prompts that have run.

        Args:
            model: a GraftedTransformer.
            batch: prompts that end in one column.
            logits: of their next tokens.
            step_mask: what follows runs.
            cache: their keys and values; None recomputes all positions at each step, under `graft`.
            graft: what all of them run.
            embeds: the prompts' embeddings, where there are no tokens.
        """
        self.model, self.batch, self.logits, self.embeds = model, batch, logits, embeds
        self.step_mask, self.graft, self._cache = step_mask, graft, cache
        self.later: GraftMask | None = None
        self.longest = max(batch.totals)
        self.tokens, self.real = batch.tokens.to(model.cfg.device), batch.real
        self._past = self.real  # before the token that was added last

    @classmethod
    def run(
        cls,
        model: Any,
        batch: Batch,
        mask: GraftMask,
        *,
        room: int,
        cached: bool = True,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> "Decoder":
        """Run prompts that all have one graft.

        Args:
            model: a GraftedTransformer.
            batch: prompts that end in one column.
            mask: what the prompts run; its graft is applied again to what follows.
            room: how many tokens will be added at most.
            cached: keep keys and values; otherwise every step recomputes all positions.
            embeds: the prompts' embeddings, where there are no tokens.
        """
        longest = max(batch.totals)
        model.warn_beyond_context(longest)
        kept = cached and keeps(model.arch, longest + room)
        cache = KeyValueCache(room) if kept else None
        resid = model.residual(Start(batch, embeds=embeds, cache=cache), mask)
        logits = model.logits_from(resid[:, -1:], _last(mask))[:, -1]
        # Every step has the same selection: the new position is `last`.
        later = model.resolve(mask.graft, with_one_more(batch))
        made = cls(model, batch, logits, _last(later), cache, mask.graft, embeds)
        made.later = later
        return made

    def take(self, rows: Int[np.ndarray, " kept"]) -> None:
        """Go on with some of the rows only."""
        given, first = self.batch, min(self.batch.starts[row] for row in rows)
        index = torch.from_numpy(rows).to(self.tokens.device, non_blocking=True)
        self.batch = Batch(
            given.tokens[torch.from_numpy(rows).to(given.tokens.device), first:],
            given.real[rows, first:],
            tuple(given.prompts[row] for row in rows),
            tuple(given.starts[row] - first for row in rows),
            tuple(given.totals[row] for row in rows),
        )
        self.tokens = self.tokens[:, first:].index_select(0, index)
        self.logits = self.logits.index_select(0, index)
        self.real, self._past = self.real[rows, first:], self._past[rows, first:]
        self.step_mask, self.later = self.step_mask.take(rows, None), None
        if self.embeds is not None:
            self.embeds = self.embeds[:, first:].index_select(0, index)
        if self._cache is not None:
            self._cache.take(index, first)

    def append(self, new: Int[Tensor, " batch"]) -> None:
        """Add one token to each row, without running it."""
        self.tokens = torch.cat([self.tokens, new[:, None]], dim=1)
        self._past = self.real
        self.real = np.pad(self.real, ((0, 0), (0, 1)), constant_values=True)
        if self.embeds is not None:
            self.embeds = torch.cat([self.embeds, self._embedded(new)], dim=1)

    def step(self) -> None:
        """Run the tokens that were added last; `logits` are then of the next ones."""
        model, n_new = self.model, self.tokens.shape[1] - self.batch.real.shape[1]
        if self.longest + n_new - 1 == model.arch.n_ctx:
            model.warn_beyond_context(self.longest + n_new)
        if self._cache is None:
            grown = self.grown()
            mask = model.resolve(self.graft, grown)
            resid = model.residual(Start(grown, embeds=self.embeds), mask)[:, -1:]
            self.logits = model.logits_from(resid, _last(mask))[:, -1]
            return
        given = self.batch
        one = Batch(
            self.tokens[:, -1:],
            self.real[:, -1:],
            given.prompts,
            given.starts,
            (1,) * len(self.real),
        )
        embeds = None if self.embeds is None else self.embeds[:, -1:]
        start = Start(one, embeds=embeds, cache=self._cache, past=self._past)
        resid = model.residual(start, self.step_mask)
        self.logits = model.logits_from(resid, self.step_mask)[:, -1]

    def grown(self, lengths: Sequence[int] | None = None) -> Batch:
        """Prompts and what follows as one batch, of which the first `lengths` new tokens of each
        row are real; None is all."""
        given = self.batch
        real = self.real.copy()
        if lengths is not None:
            columns = np.arange(real.shape[1]) - given.real.shape[1]
            real &= columns[None] < np.asarray(lengths)[:, None]
        totals = tuple(int(n) for n in real.sum(axis=1))
        return Batch(self.tokens, real, given.prompts, given.starts, totals)

    def _embedded(self, new: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 d_model"]:
        """The embeddings of new tokens, from the table that generated positions use."""
        with self.model.active.under(self.step_mask):
            made: Tensor = self.model.embed(new[:, None])
        return made


def keeps(arch: Architecture, longest: int) -> bool:
    """Whether keys of earlier positions hold in texts of up to so many tokens.

    If rotary tables change with the length, cached keys would be out of date.
    """
    return arch.rope_limit is None or longest <= arch.rope_limit


def with_one_more(batch: Batch) -> Batch:
    """The prompts with one token more in each row, which ends in the last column."""
    real = np.pad(batch.real, ((0, 0), (0, 1)), constant_values=True)
    tokens = torch.cat([batch.tokens, torch.zeros_like(batch.tokens[:, -1:])], dim=1)
    totals = tuple(total + 1 for total in batch.totals)
    return Batch(tokens, real, batch.prompts, batch.starts, totals)


def left_padded(batch: Batch, pad_id: int) -> Batch:
    """The same prompts with padding on the left, so that new tokens join on at one column."""
    if not batch.padded or batch.real[:, -1].all():
        return batch
    rows = batch.tokens.tolist()
    prompts = [
        replace(p, ids=tuple(row[s : s + len(p)]))
        for row, s, p in zip(rows, batch.starts, batch.prompts, strict=True)
    ]
    return collate(prompts, pad_id=pad_id, side="left", device=batch.tokens.device)


def _last(mask: GraftMask) -> GraftMask:
    """The mask of the last column."""
    return mask.take(None, np.array([mask.shape[1] - 1]))
