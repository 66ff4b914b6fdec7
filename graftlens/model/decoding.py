"""Prompts that grow by one token per step under a graft, with a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        embeds: what runs instead of the tokens' embeddings, [batch, pos, d_model], where the
            prompts were given as embeddings.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        mask: GraftMask,
        *,
        room: int,
        cached: bool = True,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> None:
        """Run the prompts.

        Args:
            model: a GraftedTransformer.
            batch: prompts that end in one column.
            mask: what the prompts run; its graft is applied again to what follows.
            room: how many tokens will be added at most.
            cached: keep keys and values; otherwise every step recomputes all positions.
            embeds: the prompts' embeddings, where there are no tokens.
        """
        self.model, self.batch, self.embeds = model, batch, embeds
        self.longest = max(batch.totals)
        model.warn_beyond_context(self.longest)
        # If rotary tables change with the length, cached keys would be out of date.
        limit = model.arch.rope_limit
        kept = cached and (limit is None or self.longest + room <= limit)
        self._cache = KeyValueCache() if kept else None
        self.tokens, self.real = batch.tokens.to(model.cfg.device), batch.real
        self._past = self.real  # before the token that was added last
        resid = model.residual(Start(batch, embeds=embeds, cache=self._cache), mask)
        self.logits = model.logits_from(resid[:, -1:], _last(mask))[:, -1]
        self.graft = mask.graft
        first = torch.zeros_like(self.tokens[:, -1:])
        #: What runs at prompts and a first new token.
        self.later: GraftMask = model.resolve(self.graft, self._with(first))
        # Every later step has the same selection: the new position is `last`.
        self.step_mask = _last(self.later)

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

    def _with(self, token: Int[Tensor, "batch 1"]) -> Batch:
        """The prompts with one token more in each row."""
        given = self.batch
        real = np.pad(given.real, ((0, 0), (0, 1)), constant_values=True)
        tokens = torch.cat([self.tokens, token], dim=1)
        totals = tuple(total + 1 for total in given.totals)
        return Batch(tokens, real, given.prompts, given.starts, totals)

    def _embedded(self, new: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 d_model"]:
        """The embeddings of new tokens, from the table that generated positions use."""
        with self.model.active.under(self.step_mask):
            made: Tensor = self.model.embed(new[:, None])
        return made

    @property
    def row_sources(self) -> list[list[str]]:
        """The sources that each prompt runs at any site, what follows it included."""
        mask = self.later
        real = np.zeros(mask.shape, dtype=bool)
        for row, (start, _, total) in zip(real, mask.extents, strict=True):
            row[start : start + total] = True
        used = np.zeros((mask.shape[0], len(mask.sources)), dtype=bool)
        for chosen in {id(chosen): chosen for chosen in mask.sites.values()}.values():
            for _, selection in chosen.selections():
                for source in selection.sources:
                    has = selection.share(source).reshape(mask.shape) != 0
                    used[:, source] |= (has & real).any(1)
        return [[mask.sources[s] for s in np.flatnonzero(row)] for row in used]


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
