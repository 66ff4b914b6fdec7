"""Tokens that only some sources have rows for.

A source's embedding and unembedding have rows for the first so many token ids. A row that such a
source has a share in cannot give a later token: its logit there is -inf. Nor can it read one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.model.choice import Choice
from graftlens.references import COMMON_TOKENS

_ADVICE = "Take embed there from a source that has the token."


@dataclass(frozen=True)
class Vocabularies:
    """How many tokens each source has rows for.

    Attributes:
        sources: the sources' names.
        sizes: per source, the number of rows; ids from there on are tokens that it lacks.
        tokenizer: how tokens are spelled, if there is a tokenizer.
    """

    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    tokenizer: Any = None

    @property
    def common(self) -> int:
        """How many tokens all sources have."""
        return min(self.sizes)

    @property
    def whole(self) -> int:
        """How many tokens the source with the most of them has."""
        return max(self.sizes)

    @property
    def differ(self) -> bool:
        """Whether some source lacks tokens that another one has."""
        return self.common < self.whole

    def marked(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table of measures with the column `common_tokens`, where vocabularies differ."""
        return table.assign(**{COMMON_TOKENS: self.common}) if self.differ else table

    def of_rows(self, chosen: Choice) -> Int[np.ndarray, " rows"]:
        """Per row, how many tokens all of the sources have that have a share in it."""
        found: Int[np.ndarray, " rows"] | None = None
        for source in chosen.sources:
            mine = np.where(chosen.share(source) != 0, self.sizes[source], self.whole)
            found = mine if found is None else np.minimum(found, mine)
        assert found is not None, "every row runs some source"
        return found

    def limited(
        self, logits: Float[Tensor, "rows d_vocab"], chosen: Choice
    ) -> Float[Tensor, "rows d_vocab"]:
        """Logits, -inf where a source with a share in the row lacks the token."""
        if not self.differ:
            return logits
        known = self.of_rows(chosen)
        if (known == self.whole).all():
            return logits
        there = torch.from_numpy(known).to(logits.device, non_blocking=True)
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(ids >= there[:, None], -torch.inf)

    def lacking(self, token: int, sources: Sequence[int], position: int) -> str:
        """Which of the sources lacks a token that is read at a position; nothing if none does."""
        lacks = next((s for s in sources if token >= self.sizes[s]), None)
        if lacks is None:
            return ""
        spelled = "" if self.tokenizer is None else f" ({self.tokenizer.decode([token])!r})"
        return (
            f"token {token}{spelled} at position {position} has no row in the embedding of "
            f"{self.sources[lacks]!r} ({self.sizes[lacks]} rows), which is used there. {_ADVICE}"
        )


def nan_below(table: Float[Tensor, "d_vocab *width"], rows: int) -> Float[Tensor, "d_vocab *width"]:
    """A table over the vocabulary with NaN from a row on; the table itself where it has all."""
    if rows >= table.shape[0]:
        return table
    return torch.cat([table[:rows], torch.full_like(table[rows:], torch.nan)])
