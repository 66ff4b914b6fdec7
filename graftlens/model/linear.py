"""The maps of the grafted forward: linear maps, norms and embeddings, by each row's source.

Every map is told which source each row uses (`Selection`). Rows of one source are gathered,
multiplied by that source's own weight, and put back: one matrix product's work in all, and no
delta is ever added to a weight. Where every row uses the same source, nothing is gathered.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.model.active import Active
from graftlens.model.arch import Architecture
from graftlens.model.mask import Block, HeadSelection, Selection
from graftlens.model.weights import Sourced, equal_sources

C = Component
Chosen = Selection | HeadSelection


class Gathered:
    """Rows of one activation, gathered by index at most once for all maps that read it."""

    def __init__(self, x: Num[Tensor, "rows *width"]) -> None:
        self.x = x
        self._taken: dict[int, Tensor] = {}

    def __getitem__(self, block: Block) -> Tensor:
        key = id(block.rows)
        if key not in self._taken:
            self._taken[key] = self.x.index_select(0, block.rows)
        return self._taken[key]


#: Up to this share of the rows, those of other sources are computed twice rather than all gathered.
FEW = 1 / 16


def by_source(
    x: Gathered, chosen: Selection, equal: tuple[int, ...], apply: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "rows *out"]:
    """`apply(rows, source)` on the rows of each source, put back in the rows' own order."""
    only = chosen.only(equal)
    if only is not None:
        return apply(x.x, only)
    blocks = chosen.blocks(equal, x.x.device)
    most = max(blocks, key=lambda block: len(block.rows))
    out: Tensor | None = None
    if len(x.x) - len(most.rows) <= FEW * len(x.x):
        # Gathering and putting back nearly all rows costs more than a few rows computed in vain.
        out, blocks = apply(x.x, most.source), tuple(b for b in blocks if b is not most)
    for block in blocks:
        result = apply(x[block], block.source)
        if out is None:
            out = result.new_empty(x.x.shape[0], *result.shape[1:])
        out.index_copy_(0, block.rows, result)
    assert out is not None
    return out


class Linear(nn.Module):
    """x W^T + b, with W and b of the source that each row uses."""

    def __init__(self, weight: Sourced, bias: Sourced | None, n_heads: int = 1) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.n_heads = n_heads
        self.equal = equal_sources(weight, bias)

    def plain(self, x: Float[Tensor, "rows d_in"], source: int) -> Float[Tensor, "rows d_out"]:
        bias = None if self.bias is None else self.bias[source]
        return F.linear(x, self.weight[source], bias)

    def bias_or_zeros(self, source: int) -> Float[Tensor, " d_out"]:
        """A source's bias, zeros where the map has none."""
        weight = self.weight[source]
        return weight.new_zeros(weight.shape[0]) if self.bias is None else self.bias[source]

    def bias_now(self, active: Active, component: Component, layer: int | None) -> Tensor:
        """The one bias in use [d_out], as `Active.of` says; zeros where the map has none."""
        return (
            self.bias_or_zeros(0) if self.bias is None else active.of(self.bias, component, layer)
        )

    def forward(self, x: Gathered, chosen: Chosen) -> Float[Tensor, "rows d_out"]:
        if isinstance(chosen, Selection):
            return by_source(x, chosen, self.equal, self.plain)
        return self._heads_differ(x, chosen)

    def _heads_differ(self, x: Gathered, chosen: HeadSelection) -> Float[Tensor, "rows d_out"]:
        raise TypeError(f"{type(self).__name__} has no heads")

    def _columns(self, heads: Int[Tensor, " heads"], width: int) -> Int[Tensor, " columns"]:
        """The columns of `width` that belong to some heads."""
        d_head = width // self.n_heads
        within = torch.arange(d_head, device=heads.device)
        return (heads[:, None] * d_head + within).flatten()

    def _each_head(
        self,
        x: Float[Tensor, "rows head d_in"],
        chosen: Chosen,
        apply: Callable[[Tensor, int, Tensor | slice], Tensor],
    ) -> Float[Tensor, "rows head d_out"]:
        """`apply(rows, source, heads)` where every head reads an input of its own."""
        everything = slice(None)
        if isinstance(chosen, Selection):
            return by_source(Gathered(x), chosen, self.equal, lambda r, s: apply(r, s, everything))
        out: Tensor | None = None
        for heads, selection in chosen.on(x.device):

            def mine(rows: Tensor, source: int, heads: Tensor = heads) -> Tensor:
                return apply(rows, source, heads)

            part = by_source(Gathered(x[:, heads]), selection, self.equal, mine)
            out = part.new_empty(*x.shape[:2], part.shape[2]) if out is None else out
            out = out.index_copy(1, heads, part)
        assert out is not None
        return out


class HeadsOut(Linear):
    """A map onto heads (q, k, v): each group of heads is computed with its own rows' sources."""

    def _heads_differ(self, x: Gathered, chosen: HeadSelection) -> Float[Tensor, "rows d_out"]:
        width = self.weight[0].shape[0]
        out: Tensor | None = None
        for heads, selection in chosen.on(x.x.device):
            columns = self._columns(heads, width)

            def part(rows: Tensor, source: int, columns: Tensor = columns) -> Tensor:
                bias = None if self.bias is None else self.bias[source][columns]
                return F.linear(rows, self.weight[source][columns], bias)

            result = by_source(x, selection, self.equal, part)
            out = result.new_empty(result.shape[0], width) if out is None else out
            out = out.index_copy(1, columns, result)
        assert out is not None
        return out

    def split(
        self, x: Float[Tensor, "rows head d_model"], chosen: Chosen
    ) -> Float[Tensor, "rows d_out"]:
        """The map where each head reads an input of its own (`use_split_qkv_input`)."""

        def apply(rows: Tensor, source: int, heads: Tensor | slice) -> Tensor:
            out = torch.einsum(
                "rhi,hio->rho", rows, per_head_out(self.weight[source], self.n_heads)[heads]
            )
            if self.bias is not None:
                out = out + self.bias[source].unflatten(0, (self.n_heads, -1))[heads]
            return out

        return self._each_head(x, chosen, apply).flatten(1)


class HeadsIn(Linear):
    """A map from heads (o). Its bias belongs to no head: see `HeadSelection.whole`."""

    def _heads_differ(self, x: Gathered, chosen: HeadSelection) -> Float[Tensor, "rows d_out"]:
        total: Tensor | None = None
        for heads, selection in chosen.on(x.x.device):
            columns = self._columns(heads, x.x.shape[1])

            def part(rows: Tensor, source: int, columns: Tensor = columns) -> Tensor:
                return F.linear(rows, self.weight[source][:, columns])

            mine = Gathered(x.x.index_select(1, columns))
            result = by_source(mine, selection, self.equal, part)
            total = result if total is None else total + result
        assert total is not None
        return self.add_bias(total, chosen)

    def add_bias(self, x: Float[Tensor, "rows d_out"], chosen: Chosen) -> Tensor:
        if self.bias is None:
            return x
        whole = chosen if isinstance(chosen, Selection) else chosen.whole
        return x + per_row(self.bias, whole)

    def results(
        self, z: Float[Tensor, "rows head d_head"], chosen: Chosen
    ) -> Float[Tensor, "rows head d_model"]:
        """What each head adds to the residual stream, before the bias."""

        def apply(rows: Tensor, source: int, heads: Tensor | slice) -> Tensor:
            weight = per_head_in(self.weight[source], self.n_heads)[heads]
            return torch.einsum("rhi,hio->rho", rows, weight)

        return self._each_head(z, chosen, apply)


def per_row(weight: Sourced, chosen: Selection) -> Float[Tensor, "rows width"] | Tensor:
    """A vector-shaped weight for every row, or one vector where all rows agree."""
    only = chosen.only(equal_sources(weight))
    if only is not None:
        return weight[only]
    return weight.stacked().index_select(0, chosen.per_row(weight[0].device))


class Norm(nn.Module):
    """LayerNorm or RMSNorm with the weights of the source that each row uses."""

    def __init__(
        self,
        arch: Architecture,
        weight: Sourced | None,
        bias: Sourced | None,
        active: Active,
        component: Component,
        layer: int | None,
    ) -> None:
        super().__init__()
        self.arch, self.active, self.component, self.layer = arch, active, component, layer
        self.weight = weight
        self.bias = bias
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(
        self, x: Float[Tensor, "*batch_pos_head width"], chosen: Selection | None
    ) -> Float[Tensor, "*batch_pos_head width"]:
        dtype = x.dtype
        x = x if dtype == torch.float64 else x.float()
        if self.arch.norm != "rms":
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.arch.eps).sqrt())
        x = self.hook_normalized(x / scale)
        if self.weight is None or chosen is None:
            return x.to(dtype)
        keep = self.arch.norm_in_float32 or self.arch.norm == "layer"
        x = x if keep else x.to(dtype)
        # RMSNorm over heads has one weight for all of a row's heads.
        shape = (*x.shape[:2], *(1,) * (x.ndim - 3), x.shape[-1])
        x = x * self._rows(self.weight, chosen, shape, self.arch.norm_offset, x.dtype)
        if self.bias is not None:
            x = x + self._rows(self.bias, chosen, shape, 0.0, x.dtype)
        return x.to(dtype)

    @property
    def w(self) -> Float[Tensor, " width"] | None:
        """The base's weight as stored (Gemma's is w - 1), or that of a graft in force that is
        uniform here; None where the norm has none."""
        return None if self.weight is None else self._now(self.weight)

    @property
    def b(self) -> Float[Tensor, " width"] | None:
        """The base's bias, or that of a graft in force that is uniform here; None where the norm
        has none."""
        return None if self.bias is None else self._now(self.bias)

    def _now(self, weight: Sourced) -> Tensor:
        return self.active.of(weight, self.component, self.layer)

    @staticmethod
    def _rows(
        weight: Sourced,
        chosen: Selection,
        shape: tuple[int, ...],
        offset: float,
        dtype: torch.dtype,
    ) -> Tensor:
        vector = per_row(weight, chosen).to(dtype)
        vector = vector + offset if offset else vector
        return vector if vector.ndim == 1 else vector.reshape(shape)


class Embed(nn.Module):
    """Rows of an embedding table, each from the table of the source that the place uses."""

    def __init__(self, weight: Sourced, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.equal = equal_sources(weight)

    def forward(
        self, ids: Int[Tensor, "batch pos"], chosen: Selection
    ) -> Float[Tensor, "batch pos d_model"]:
        def look_up(rows: Tensor, source: int) -> Tensor:
            return F.embedding(rows, self.weight[source])

        out = by_source(Gathered(ids.flatten()), chosen, self.equal, look_up)
        if self.scale != 1.0:
            out = out * torch.tensor(self.scale, dtype=out.dtype)
        return out.unflatten(0, ids.shape)


class TokenEmbed(Embed):
    """The token embedding, under HookedTransformer's name for its weight."""

    def __init__(self, weight: Sourced, active: Active, scale: float) -> None:
        super().__init__(weight, scale)
        self.active = active

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The base's table as stored, or that of a graft in force that is uniform here."""
        return self.active.of(self.weight, C.EMBED, None)


class PosEmbed(Embed):
    """The position embedding, under HookedTransformer's name for its weight."""

    def __init__(self, weight: Sourced, active: Active) -> None:
        super().__init__(weight)
        self.active = active

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The base's table, or that of a graft in force that is uniform here."""
        return self.active.of(self.weight, C.POS_EMBED, None)


def per_head_out(
    weight: Float[Tensor, "*axes head_width d_model"], n_heads: int
) -> Float[Tensor, "*axes head d_model d_head"]:
    """A map onto heads in HookedTransformer's layout (W_Q, W_K, W_V)."""
    return weight.unflatten(-2, (n_heads, -1)).transpose(-1, -2)


def per_head_in(
    weight: Float[Tensor, "*axes d_model head_width"], n_heads: int
) -> Float[Tensor, "*axes head d_head d_model"]:
    """A map from heads in HookedTransformer's layout (W_O)."""
    return weight.transpose(-1, -2).unflatten(-2, (n_heads, -1))
