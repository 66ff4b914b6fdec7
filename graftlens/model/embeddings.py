"""The two ends of the model: tables of token and position embeddings, and the unembedding.

Called by themselves, they use the graft in force, else the base.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.model.active import Active
from graftlens.model.additions import Addition
from graftlens.model.choice import Choice, Selection, Strengthened
from graftlens.model.linear import (
    Gathered,
    Linear,
    by_source,
    mixed_with,
    no_units,
    with_additions,
)
from graftlens.model.vocabulary import Vocabularies
from graftlens.model.weights import Sourced, equal_sources

C = Component


def looked_up(
    table: Sourced, ids: Int[Tensor, " rows"], chosen: Choice
) -> Float[Tensor, "rows d_model"]:
    """Rows of a table, each from the table of the source that the place uses."""
    wanted = Gathered(ids)

    def whole(rows: Tensor, source: int) -> Tensor:
        return F.embedding(rows, table.whole(source))

    def adds(addition: Addition, out: Tensor, rows: Tensor, share: float) -> None:
        out.add_(addition.looked_up(rows), alpha=share)

    def by_row(chosen: Selection) -> Tensor:
        out = by_source(wanted, chosen, table.alike, whole)
        return with_additions(out, wanted, chosen, table, adds)

    def blended(chosen: Strengthened) -> Tensor:
        own = looked_up(table, ids, chosen.inner)
        theirs = Selection.uniform(chosen.source, len(ids))
        return mixed_with(chosen, own, lambda: by_row(theirs), equal_sources(table))

    return chosen.ask(rows=by_row, units=no_units, strengths=blended)


class TokenEmbed(nn.Module):
    """The token embedding."""

    def __init__(self, weight: Sourced, active: Active, scale: float) -> None:
        super().__init__()
        self.weight, self.active, self.scale = weight, active, scale

    def forward(
        self, tokens: Int[Tensor, "*batch_and_pos"], chosen: Choice | None = None
    ) -> Float[Tensor, "*batch_and_pos d_model"]:
        """The embedding of each token."""
        if chosen is None:
            chosen = self.active.rows(C.EMBED, None, tokens.shape)
            self._refuse_lacking(tokens, chosen)
        out = looked_up(self.weight, tokens.flatten(), chosen)
        if self.scale != 1.0:
            out = out * torch.tensor(self.scale, dtype=out.dtype)
        return out.reshape(*tokens.shape, out.shape[-1])

    def _refuse_lacking(self, tokens: Int[Tensor, "*batch_and_pos"], chosen: Choice) -> None:
        sizes = self.weight.sizes
        if not sizes:
            return
        known = Vocabularies(self.active.sources, sizes).of_rows(chosen)
        lacking = np.flatnonzero(tokens.flatten().cpu().numpy() >= known)
        if len(lacking):
            raise ValueError(
                f"embed was called directly on token {int(tokens.flatten()[int(lacking[0])])}, "
                "which a source lacks that is used there. Its embedding has no row for it."
            )

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The base's table as stored, or that of a graft in force that is uniform here."""
        return self.active.of(self.weight, C.EMBED, None)


class PosEmbed(nn.Module):
    """The position embedding."""

    def __init__(self, weight: Sourced, active: Active) -> None:
        super().__init__()
        self.weight, self.active = weight, active

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Tensor | None = None,
        *,
        positions: Int[Tensor, "batch pos"] | None = None,
        chosen: Choice | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The embedding of each token's position; the tokens themselves do not matter.

        Args:
            tokens: token ids.
            past_kv_pos_offset: how many positions came before.
            attention_mask: 1 for tokens, 0 for padding, which gets zeros; positions that came
                before included, [batch, past + pos].
            positions: where each token is, if that is known already.
            chosen: what runs at each place.

        Raises:
            ValueError: a mask of another shape, or positions beyond the model's context.
        """
        chosen = chosen or self.active.rows(C.POS_EMBED, None, tokens.shape)
        if positions is not None:
            return looked_up(self.weight, positions.flatten(), chosen).unflatten(0, tokens.shape)
        width = past_kv_pos_offset + tokens.shape[1]
        real = torch.ones(len(tokens), width, dtype=torch.long, device=self.weight.like.device)
        if attention_mask is not None:
            if tuple(attention_mask.shape) != tuple(real.shape):
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but with those before "
                    f"there are {list(real.shape)} positions."
                )
            real = attention_mask.to(real)
        counts = (real.cumsum(1) - 1).clamp_min(0)[:, past_kv_pos_offset:]
        n_ctx = len(self.weight.like)
        if int(counts.max()) >= n_ctx:
            raise ValueError(
                f"position {int(counts.max())} is beyond the model's context, {n_ctx}."
            )
        out = looked_up(self.weight, counts.flatten(), chosen).unflatten(0, tokens.shape)
        return out * real[:, past_kv_pos_offset:, None].to(out)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The base's table, or that of a graft in force that is uniform here."""
        return self.active.of(self.weight, C.POS_EMBED, None)


class Unembed(nn.Module):
    """The unembedding. Logits of tokens that a source with a share in the row lacks are -inf."""

    def __init__(self, linear: Linear, active: Active) -> None:
        super().__init__()
        self.linear, self.active = linear, active
        sizes = linear.weight.sizes or (len(linear.weight.like),) * len(active.sources)
        self.vocabularies = Vocabularies(active.sources, sizes)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(
        self, x: Float[Tensor, "*batch_and_pos d_model"], chosen: Choice | None = None
    ) -> Float[Tensor, "*batch_and_pos d_vocab"]:
        """The logits of each vector, before any soft cap."""
        places = x.shape[:-1]
        chosen = chosen or self.active.rows(C.UNEMBED, None, places)
        rows = Gathered(self.hook_in(x).reshape(-1, x.shape[-1]))
        out = self.vocabularies.limited(self.linear(rows, chosen), chosen)
        return self.hook_out(out.reshape(*places, out.shape[-1]))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The base's unembedding, or that of a graft in force that is uniform here."""
        return self.active.of(self.linear.weight, C.UNEMBED, None).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias, zeros where there is none."""
        return self.linear.bias_now(self.active, C.UNEMBED, None)
