"""The maps of the grafted forward: linear maps, norms and embeddings, by each row's source.

Every map is told what each row runs (`Selection`). Rows of one source are gathered, multiplied by
that source's own weight, and put back: one matrix product's work in all, and no delta is ever added
to a weight. Sources that share a matrix, as the adapters of one base do, share its product; what
each of them adds is computed for its own rows. Where every row uses the same source, nothing is
gathered. Rows that mix sources go through each of them, and the results are added up by their
shares.
"""

from collections.abc import Callable
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.model.active import Active
from graftlens.model.additions import Addition
from graftlens.model.arch import Architecture
from graftlens.model.choice import (
    Choice,
    Selection,
    SourceRows,
    Strengthened,
    UnitSelection,
)
from graftlens.model.weights import Sourced, equal_sources

C = Component


class Gathered:
    """Rows of one activation, gathered by index at most once for all maps that read it."""

    def __init__(self, x: Num[Tensor, "rows *width"]) -> None:
        self.x = x
        self._taken: dict[int, Tensor] = {}

    def __getitem__(self, piece: SourceRows) -> Tensor:
        return self.take(piece.rows)

    def take(self, rows: Int[Tensor, " rows"] | slice) -> Tensor:
        """Some rows."""
        if isinstance(rows, slice):
            return self.x[rows]
        key = id(rows)
        if key not in self._taken:
            self._taken[key] = self.x.index_select(0, rows)
        return self._taken[key]


#: Up to this share of the rows, those of other sources are computed twice rather than all gathered.
FEW = 1 / 16

#: Up to so many groups of units are computed one by one; more of them by source, all units at once.
GROUPS_APART = 16


def by_source(
    x: Gathered, chosen: Selection, equal: tuple[int, ...], apply: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "rows *out"]:
    """`apply(rows, source)` on the rows of each source, put back in the rows' own order; of a
    mixture, the sources' results by their shares."""
    only = chosen.only(equal)
    if only is not None:
        return apply(x.x, only)
    pieces = chosen.source_rows(equal, x.x.device)
    if any(piece.share is not None for piece in pieces):
        return _added_up(x, pieces, apply)
    most = max(pieces, key=lambda piece: len(piece.rows))
    out: Tensor | None = None
    if len(x.x) - len(most.rows) <= FEW * len(x.x):
        # Gathering and putting back nearly all rows costs more than computing a few for nothing.
        out, pieces = apply(x.x, most.source), tuple(b for b in pieces if b is not most)
    for piece in pieces:
        result = apply(x[piece], piece.source)
        if out is None:
            out = result.new_empty(x.x.shape[0], *result.shape[1:])
        out.index_copy_(0, piece.rows, result)
    assert out is not None
    return out


def _added_up(
    x: Gathered, pieces: tuple[SourceRows, ...], apply: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "rows *out"]:
    """One product for each source, however many strengths there are; added up in no less than
    float32."""
    total: Tensor | None = None
    for piece in pieces:
        # Rows of one source alone are its own numbers: times 1, added to 0.
        every = len(piece.rows) == len(x.x)
        result = apply(x.x if every else x[piece], piece.source)
        dtype, wide = result.dtype, torch.promote_types(result.dtype, torch.float32)
        result = result.to(wide)
        if piece.share is not None:
            result = result * piece.scale(wide, result.ndim)
        if total is None:
            total = result.new_zeros(len(x.x), *result.shape[1:])
        total = total + result if every else total.index_add(0, piece.rows, result)
    assert total is not None
    return total.to(dtype)


#: (addition, rows of an output, the same rows of the input, a share): adds in place.
Adds = Callable[[Addition, Tensor, Tensor, float], None]


def with_additions(
    out: Float[Tensor, "rows *out"], x: Gathered, chosen: Selection, weight: Sourced, adds: Adds
) -> Float[Tensor, "rows *out"]:
    """What each row's sources add to the tensor that they share with others, added in place."""
    if weight.adding.isdisjoint(chosen.sources):
        return out
    found = chosen.added_rows(weight.added_alike, weight.adding, out.device)
    rows, theirs = found.rows, x.take(found.rows)
    mine = out[rows] if isinstance(rows, slice) else out.index_select(0, rows)
    for start, stop, mixture in found.pieces:
        for source, share in mixture:
            for addition in weight.additions(source):
                adds(addition, mine[start:stop], theirs[start:stop], share)
    return out if isinstance(rows, slice) else out.index_copy_(0, rows, mine)


def mixed_with(
    chosen: Strengthened,
    own: Float[Tensor, "rows *out"],
    theirs: Callable[[], Float[Tensor, "rows *out"]],
    equal: tuple[int, ...],
    strength: Float[Tensor, "rows _out"] | None = None,
) -> Float[Tensor, "rows *out"]:
    """(1 - s) * own + s * theirs, where s is `strength` or, without it, the choice's own; in no
    less than float32, in which strengths are not rounded. At 0 and 1 it is `own` and `theirs`."""
    dtype, wide = own.dtype, torch.promote_types(own.dtype, torch.float32)
    strength = (chosen.strength if strength is None else strength).to(wide)
    if runs_already(chosen, equal):
        return own + 0 * strength.sum().to(dtype)
    strength = strength.reshape(*strength.shape, *(1,) * (own.ndim - strength.ndim))
    return torch.lerp(own.to(wide), theirs().to(wide), strength).to(dtype)


def runs_already(chosen: Strengthened, equal: tuple[int, ...]) -> bool:
    """Whether what is mixed in is what runs without it, so that it needs no work."""
    return chosen.only(equal) is not None


class Linear(nn.Module):
    """x W^T + b, with W and b of the source that each row uses."""

    def __init__(self, weight: Sourced, bias: Sourced | None, n_units: int = 1) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.n_units = n_units
        self.equal = equal_sources(weight, bias)
        # Sources that share W and differ in their biases share the product with W, too.
        self._bias_apart = bias is not None and any(
            bias.slots[source] != bias.slots[first] for source, first in enumerate(weight.alike)
        )

    def plain(
        self, x: Float[Tensor, "rows d_in"], source: int, *, bias: bool = True
    ) -> Float[Tensor, "rows d_out"]:
        """Every row through one source."""
        own = None if self.bias is None or not bias else self.bias[source]
        out = F.linear(x, self.weight.whole(source), own)
        for addition in self.weight.additions(source):
            addition.onto(out, x)
        return out

    def _by_row(
        self,
        x: Gathered,
        chosen: Selection,
        *,
        outs: Int[Tensor, " columns"] | None = None,
        ins: Int[Tensor, " columns"] | None = None,
        bias: bool = True,
    ) -> Float[Tensor, "rows _out"]:
        """Each row through its source: one product with what several share, and what each adds.

        Args:
            x: the rows, only `ins` of their columns where these are given.
            chosen: what each row runs.
            outs: the columns of the output that are wanted; all without.
            ins: the columns of the input that are there; all without.
            bias: whether to add the bias.
        """
        own = self.bias if bias else None

        def whole(rows: Tensor, source: int) -> Tensor:
            weight = self.weight.whole(source)
            weight = weight if outs is None else weight[outs]
            weight = weight if ins is None else weight[:, ins]
            if own is None or self._bias_apart:
                return F.linear(rows, weight)
            return F.linear(rows, weight, own[source] if outs is None else own[source][outs])

        def adds(addition: Addition, out: Tensor, rows: Tensor, share: float) -> None:
            addition.onto(out, rows, share, outs=outs, ins=ins)

        out = by_source(x, chosen, self.weight.alike, whole)
        if own is not None and self._bias_apart:
            apart = per_row(own, chosen).to(out.dtype)
            out = out + (apart if outs is None else apart[..., outs])
        return with_additions(out, x, chosen, self.weight, adds)

    def bias_or_zeros(self, source: int) -> Float[Tensor, " d_out"]:
        """A source's bias, zeros if the map has none."""
        like = self.weight.like
        return like.new_zeros(like.shape[0]) if self.bias is None else self.bias[source]

    def bias_now(self, active: Active, component: Component, layer: int | None) -> Tensor:
        """The one bias in use [d_out], as `Active.of` says; zeros where the map has none."""
        return (
            self.bias_or_zeros(0)
            if self.bias is None
            else active.of(self.bias, component, layer, "bias")
        )

    def forward(self, x: Gathered, chosen: Choice) -> Float[Tensor, "rows d_out"]:
        return chosen.ask(
            rows=lambda rows: self._by_row(x, rows),
            units=lambda units: self._by_unit(x, units),
            strengths=lambda mixed: self._blended(x, mixed),
        )

    def _by_unit(self, x: Gathered, chosen: UnitSelection) -> Float[Tensor, "rows d_out"]:
        """The map where units differ in their sources."""
        raise TypeError(f"{type(self).__name__} has no units")

    def _blended(self, x: Gathered, chosen: Strengthened) -> Float[Tensor, "rows d_out"]:
        """The map where a tensor of strengths mixes a source in."""
        own = self(x, chosen.inner)
        strength = self._spread(chosen.strength, own.shape[1]) if chosen.by_unit else None
        return mixed_with(chosen, own, lambda: self._mixed_in(x, chosen, own), self.equal, strength)

    def _mixed_in(
        self, x: Gathered, chosen: Strengthened, own: Float[Tensor, "rows d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """What the source gives that is mixed in; of an adapter, what runs without it and more."""
        alike, inner = self.weight.alike, chosen.inner
        plain = inner.alike is not None and self.weight.adding.isdisjoint(inner.sources)
        if self._bias_apart or not plain or inner.only(alike) != alike[chosen.source]:
            return self.plain(x.x, chosen.source)
        out = own.clone()
        for addition in self.weight.additions(chosen.source):
            addition.onto(out, x.x)
        return out

    def columns(self, units: Int[Tensor, " units"], width: int) -> Int[Tensor, " columns"]:
        """The columns of `width` that belong to some units."""
        own = width // self.n_units
        within = torch.arange(own, device=units.device)
        return (units[:, None] * own + within).flatten()

    def _onto_units(
        self,
        x: Gathered,
        chosen: UnitSelection,
        width: int,
        apply: Callable[[Selection, Tensor], Tensor],
    ) -> Float[Tensor, "rows width"]:
        """`apply(selection, columns)` for each group of units, into their columns of `width`."""
        out: Tensor | None = None
        for units, selection in chosen.on(x.x.device):
            columns = self.columns(units, width)
            result = apply(selection, columns)
            out = result.new_empty(result.shape[0], width) if out is None else out
            out = out.index_copy(1, columns, result)
        assert out is not None
        return out

    def _spread(self, shares: Float[Tensor, "rows unit"], width: int) -> Tensor:
        """What there is for each unit, for each of the columns of `width`."""
        if shares.shape[1] != self.n_units:
            raise ValueError(
                f"strengths for {shares.shape[1]} units, of a map that has {self.n_units}."
            )
        return shares.repeat_interleave(width // self.n_units, dim=1)

    def _each_head(
        self,
        x: Float[Tensor, "rows head d_in"],
        chosen: Choice,
        apply: Callable[[Tensor, int, Tensor | slice], Tensor],
    ) -> Float[Tensor, "rows head d_out"]:
        """`apply(rows, source, heads)` where every head reads an input of its own."""

        def every(rows: Tensor, source: int) -> Tensor:
            return apply(rows, source, slice(None))

        def by_unit(chosen: UnitSelection) -> Tensor:
            out: Tensor | None = None
            for heads, selection in chosen.on(x.device):

                def mine(rows: Tensor, source: int, heads: Tensor = heads) -> Tensor:
                    return apply(rows, source, heads)

                found = by_source(Gathered(x[:, heads]), selection, self.equal, mine)
                out = found.new_empty(*x.shape[:2], found.shape[2]) if out is None else out
                out = out.index_copy(1, heads, found)
            assert out is not None
            return out

        def blended(chosen: Strengthened) -> Tensor:
            own = self._each_head(x, chosen.inner, apply)
            return mixed_with(chosen, own, lambda: every(x, chosen.source), self.equal)

        return chosen.ask(
            rows=lambda rows: by_source(Gathered(x), rows, self.equal, every),
            units=by_unit,
            strengths=blended,
        )


class UnitsOut(Linear):
    """A map onto units (q, k, v onto heads, mlp_in and mlp_gate onto neurons), whose biases are
    theirs: each group of units is computed with its own rows' sources."""

    def _by_unit(self, x: Gathered, chosen: UnitSelection) -> Float[Tensor, "rows d_out"]:
        width = self.weight.like.shape[0]
        if len(chosen.groups) > GROUPS_APART:
            return self._by_share(x, chosen, width)

        def weigh(selection: Selection, columns: Tensor) -> Tensor:
            return self._by_row(x, selection, outs=columns)

        return self._onto_units(x, chosen, width, weigh)

    def _by_share(self, x: Gathered, chosen: UnitSelection, width: int) -> Tensor:
        """One product for each source, each of its columns times its unit's share."""
        like = self.weight.like
        out = like.new_zeros(x.x.shape[0], width)
        for source in sorted({self.equal[source] for source in chosen.sources}):
            rows, shares = chosen.unit_shares(source, self.equal, like)
            result = self.plain(x.x.index_select(0, rows), source)
            out = out.index_add(0, rows, result * self._spread(shares, width))
        return out

    def split(
        self, x: Float[Tensor, "rows head d_model"], chosen: Choice
    ) -> Float[Tensor, "rows d_out"]:
        """The map where each head reads an input of its own (`use_split_qkv_input`)."""

        def apply(rows: Tensor, source: int, heads: Tensor | slice) -> Tensor:
            out = torch.einsum(
                "rhi,hio->rho", rows, per_head_out(self.weight[source], self.n_units)[heads]
            )
            if self.bias is not None:
                out = out + self.bias[source].unflatten(0, (self.n_units, -1))[heads]
            return out

        return self._each_head(x, chosen, apply).flatten(1)


class UnitsIn(Linear):
    """A map from units (o from heads, mlp_out from neurons). Its bias belongs to none of them: see
    `Choice.whole`."""

    def _by_unit(self, x: Gathered, chosen: UnitSelection) -> Float[Tensor, "rows d_out"]:
        return self.add_bias(self.product(x, chosen), chosen)

    def _blended(self, x: Gathered, chosen: Strengthened) -> Float[Tensor, "rows d_out"]:
        if not chosen.by_unit:
            return super()._blended(x, chosen)
        return self.add_bias(self.product(x, chosen), chosen)

    def _weigh(self, rows: Float[Tensor, "rows d_in"], source: int) -> Tensor:
        return self.plain(rows, source, bias=False)

    def product(self, x: Gathered, chosen: Choice) -> Float[Tensor, "rows d_out"]:
        """What the units give, before the bias."""
        return chosen.ask(
            rows=lambda rows: self._by_row(x, rows, bias=False),
            units=lambda units: self._product_by_unit(x, units),
            strengths=lambda mixed: self._product_blended(x, mixed),
        )

    def _product_blended(self, x: Gathered, chosen: Strengthened) -> Float[Tensor, "rows d_out"]:
        if not chosen.by_unit or runs_already(chosen, self.equal):
            own = self.product(x, chosen.inner)
            return mixed_with(chosen, own, lambda: self._weigh(x.x, chosen.source), self.equal)
        theirs = (x.x * self._spread(chosen.strength, x.x.shape[1])).to(x.x.dtype)
        own = self.product(Gathered(x.x - theirs), chosen.inner)
        return own + self._weigh(theirs, chosen.source)

    def _product_by_unit(self, x: Gathered, chosen: UnitSelection) -> Float[Tensor, "rows d_out"]:
        if len(chosen.groups) > GROUPS_APART:
            return self._by_share(x, chosen)
        total: Tensor | None = None
        for units, selection in chosen.on(x.x.device):
            columns = self.columns(units, x.x.shape[1])
            mine = Gathered(x.x.index_select(1, columns))
            result = self._by_row(mine, selection, ins=columns, bias=False)
            total = result if total is None else total + result
        assert total is not None
        return total

    def _by_share(self, x: Gathered, chosen: UnitSelection) -> Float[Tensor, "rows d_out"]:
        """One product for each source, each unit's input times the source's share of it."""
        like = self.weight.like
        total = like.new_zeros(x.x.shape[0], like.shape[0])
        for source in sorted({self.equal[source] for source in chosen.sources}):
            rows, shares = chosen.unit_shares(source, self.equal, like)
            theirs = x.x.index_select(0, rows) * self._spread(shares, x.x.shape[1])
            total = total.index_add(0, rows, self._weigh(theirs, source))
        return total

    def add_bias(self, x: Float[Tensor, "rows d_out"], chosen: Choice) -> Tensor:
        """What the map gives, from what its units give."""
        return x if self.bias is None else x + per_row(self.bias, chosen.whole).to(x.dtype)

    def results(
        self, z: Float[Tensor, "rows head d_head"], chosen: Choice
    ) -> Float[Tensor, "rows head d_model"]:
        """What each head adds to the residual stream, before the bias."""

        def apply(rows: Tensor, source: int, heads: Tensor | slice) -> Tensor:
            weight = per_head_in(self.weight[source], self.n_units)[heads]
            return torch.einsum("rhi,hio->rho", rows, weight)

        return self._each_head(z, chosen, apply)

    def read_back(
        self, direction: Float[Tensor, "rows d_model"], chosen: Choice
    ) -> Float[Tensor, "rows unit d_in"]:
        """A direction behind the map as one before it, in float32: a product with what this gives
        is what each unit adds along `direction`."""
        x, width = Gathered(direction), self.weight.like.shape[1]

        def weigh(selection: Selection, columns: Tensor) -> Tensor:
            def of_columns(rows: Tensor, source: int) -> Tensor:
                return rows @ self.weight[source][:, columns].float()

            return by_source(x, selection, self.equal, of_columns)

        def back(rows: Tensor, source: int) -> Tensor:
            return rows @ self.weight[source].float()

        def blended(chosen: Strengthened) -> Tensor:
            own = self.read_back(direction, chosen.inner).flatten(1)
            strength = self._spread(chosen.strength, width) if chosen.by_unit else None
            return mixed_with(chosen, own, lambda: back(x.x, chosen.source), self.equal, strength)

        return chosen.ask(
            rows=lambda rows: by_source(x, rows, self.equal, back),
            units=lambda units: self._onto_units(x, units, width, weigh),
            strengths=blended,
        ).unflatten(1, (self.n_units, -1))


def per_row(weight: Sourced, chosen: Choice) -> Float[Tensor, "rows width"] | Tensor:
    """A vector-shaped weight for every row, or one vector where all rows agree."""
    equal = equal_sources(weight)

    def looked_up(chosen: Selection) -> Tensor:
        only = chosen.only(equal)
        if only is not None:
            return weight[only]
        used = [weight.mixed(mixture) for mixture in chosen.mixtures]
        dtype = max((vector.dtype for vector in used), key=lambda dtype: dtype.itemsize)
        table = torch.stack([vector.to(dtype) for vector in used])
        return table.index_select(0, chosen.per_row(table.device))

    def blended(chosen: Strengthened) -> Tensor:
        own = per_row(weight, chosen.inner.whole).expand(len(chosen.strength), -1)
        return mixed_with(chosen, own, lambda: weight[chosen.source], equal)

    return chosen.ask(rows=looked_up, units=no_units, strengths=blended)


def no_units(chosen: UnitSelection) -> NoReturn:
    """The answer of a weight that is not cut into units."""
    raise TypeError("this weight has no units: only attention's and the MLP's have")


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
        self, x: Float[Tensor, "*batch_pos_head width"], chosen: Choice | None = None
    ) -> Float[Tensor, "*batch_pos_head width"]:
        """The norm of every row; called by itself, with the weights of the graft in force."""
        dtype, places = x.dtype, x.shape[:-1]
        if self.weight is not None and chosen is None:
            chosen = self.active.rows(self.component, self.layer, places)
        x = x if dtype == torch.float64 else x.float()
        if self.arch.norm != "rms":
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.arch.eps).sqrt()
        # Where squares overflow, x / inf would be 0, as if there were nothing.
        scale = self.hook_scale(scale.nan_to_num(nan=torch.nan, posinf=torch.nan))
        x = self.hook_normalized(x / scale)
        if self.weight is None or chosen is None:
            return x.to(dtype)
        keep = self.arch.norm_in_float32 or self.arch.norm == "layer"
        x = x if keep else x.to(dtype)
        if self.layer is not None:  # a norm over heads has one weight for all of a row's heads
            places = torch.Size((*places[:2], *(1,) * len(places[2:])))
        shape = (*places, x.shape[-1])
        x = x * self._rows(self.weight, chosen, shape, self.arch.norm_offset, x.dtype)
        if self.bias is not None:
            x = x + self._rows(self.bias, chosen, shape, 0.0, x.dtype)
        return x.to(dtype)

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self.arch.eps

    @property
    def w(self) -> Float[Tensor, " width"] | None:
        """The base's weight as stored (Gemma's is w - 1), or that of a graft in force that is
        uniform here; None where the norm has none."""
        return None if self.weight is None else self._now(self.weight, "weight")

    @property
    def b(self) -> Float[Tensor, " width"] | None:
        """The base's bias, or that of a graft in force that is uniform here; None where the norm
        has none."""
        return None if self.bias is None else self._now(self.bias, "bias")

    def _now(self, tensor: Sourced, parameter: Literal["weight", "bias"]) -> Tensor:
        return self.active.of(tensor, self.component, self.layer, parameter)

    @staticmethod
    def _rows(
        weight: Sourced,
        chosen: Choice,
        shape: tuple[int, ...],
        offset: float,
        dtype: torch.dtype,
    ) -> Tensor:
        vector = per_row(weight, chosen).to(dtype)
        vector = vector + offset if offset else vector
        return vector if vector.ndim == 1 else vector.reshape(shape)


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
