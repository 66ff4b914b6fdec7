"""The grafted forward pass: attention, MLP and layers, in one sitting.

Each linear map, norm and embedding (`linear.py`) is told which source each row uses. Module tree,
hook names and shapes are HookedTransformer's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix, TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.model.active import Active, InForce
from graftlens.model.additions import Additions
from graftlens.model.arch import Architecture, MlpKind
from graftlens.model.choice import Choice, Equal, Selection
from graftlens.model.linear import (
    Gathered,
    Linear,
    Norm,
    UnitsIn,
    UnitsOut,
    by_source,
    per_head_in,
    per_head_out,
)
from graftlens.model.passes import Alone, AttentionOrder, Pass
from graftlens.model.points import FlaggedPoint
from graftlens.model.rotary import Rotary
from graftlens.model.tree import TreeGroup
from graftlens.model.weights import Sourced, Weights, equal_sources

C = Component

#: A hook on rows [row, d_mlp], which it sees as [batch, pos, d_mlp].
Hooked = Callable[[HookPoint, Tensor], Tensor]


class Attention(nn.Module):
    """Attention whose q, k, v, o and norms each come from the source that the position uses."""

    def __init__(
        self, arch: Architecture, layer: int, build: "Builder", flags: Any, active: Active
    ) -> None:
        super().__init__()
        self.arch, self.layer, self.flags, self.active = arch, layer, flags, active
        self.alone = build.alone
        self.q = UnitsOut(*build.linear(C.Q, layer), arch.n_heads)
        self.k = UnitsOut(*build.linear(C.K, layer), arch.n_kv_heads)
        self.v = UnitsOut(*build.linear(C.V, layer), arch.n_kv_heads)
        self.o = UnitsIn(*build.linear(C.O, layer), arch.n_heads)
        if arch.qk_norm != "none":
            self.q_norm = build.norm(C.Q_NORM, layer)
            self.k_norm = build.norm(C.K_NORM, layer)
        # In HookedTransformer's order, which is that of `hook_dict`; k and v are
        # [batch, pos, kv_head, d_head], or per query head: `ungrouped`.
        self.hook_k = HookPoint()
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_v = HookPoint()
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        # [batch, pos, head, d_model]
        self.hook_result = FlaggedPoint(flags, "use_attn_result")
        if arch.rotary_dim:
            self.hook_rot_k = HookPoint()
            self.hook_rot_q = HookPoint()

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch key_pos *kv_head d_model"],
        value_input: Float[Tensor, "batch key_pos *kv_head d_model"],
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Tensor | None = None,
        *,
        run: Pass | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the residual stream; called by itself, under the graft in force.

        Args:
            query_input, key_input, value_input: what q, k and v read, after the norm.
            past_kv_cache_entry: keys and values of earlier positions, of this layer.
            attention_mask: 1 for tokens and 0 for padding, earlier positions included.
            run: the pass that this layer is part of.
        """
        run = run or self.alone(
            query_input, past_kv_cache_entry, attention_mask, key_input, value_input
        )
        arch, layer, mask = self.arch, self.layer, run.mask
        places = query_input.shape[:2]
        gathered: dict[int, Gathered] = {}

        def project(linear: UnitsOut, x: Tensor, component: Component) -> Tensor:
            chosen = mask[component, layer]
            if x.ndim == 4:
                out = linear.split(x.flatten(0, 1), chosen)
            else:
                rows = gathered.setdefault(id(x), Gathered(x.flatten(0, 1)))
                out = linear(rows, chosen)
            return out.unflatten(1, (linear.n_units, arch.d_head)).unflatten(0, x.shape[:2])

        def keyed(linear: UnitsOut, x: Tensor, component: Component) -> Tensor:
            if not self.ungrouped or run.tree is not None:
                return project(linear, x, component)
            if x.ndim == 3:
                return project(linear, x, component).repeat_interleave(self.n_shared, dim=2)
            each = x.unflatten(2, (arch.n_kv_heads, self.n_shared)).unbind(3)
            return torch.stack([project(linear, y, component) for y in each], 3).flatten(2, 3)

        q = self.hook_q(project(self.q, query_input, C.Q))
        k = self.hook_k(keyed(self.k, key_input, C.K))
        v = self.hook_v(keyed(self.v, value_input, C.V))
        if arch.qk_norm != "none":
            q = self._qk_norm(self.q_norm, q, mask[C.Q_NORM, layer])
            k = self._qk_norm(self.k_norm, k, mask[C.K_NORM, layer])
        if arch.qkv_clip is not None:
            q, k, v = (t.clamp(-arch.qkv_clip, arch.qkv_clip) for t in (q, k, v))
        k, v = run.extended(layer, k, v, rotated=False)
        if run.turning is not None:
            q = self.hook_rot_q(run.turning(q, layer, 0, mask[C.Q, layer]))
            k = self.hook_rot_k(run.turning(k, layer, 1, mask[C.K, layer]))
        k, v = run.extended(layer, k, v, rotated=True)

        if run.tree is None:
            assert run.order is not None
            z = self._attend(q, k, v, run.order)
        else:
            z = run.tree[layer].attend(q, k, v, self._attend)
        z = self.hook_z(z)
        rows = z.flatten(0, 1)
        chosen = mask[C.O, layer]
        if self.flags.use_attn_result:
            result = self.hook_result(self.o.results(rows, chosen).unflatten(0, places))
            out = self.o.add_bias(result.sum(2).flatten(0, 1), chosen)
        else:
            out = self.o(Gathered(rows.flatten(1)), chosen)
        return out.unflatten(0, places)

    def _qk_norm(self, norm: Norm, x: Tensor, chosen: Choice) -> Tensor:
        if self.arch.qk_norm == "full":
            return norm(x.flatten(2), chosen).unflatten(2, x.shape[2:])
        return norm(x, chosen)

    def _attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_head"],
        order: AttentionOrder | TreeGroup,
    ) -> Float[Tensor, "batch query head d_head"]:
        arch = self.arch
        window, scale = arch.windows[self.layer], arch.attn_scales[self.layer]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        seen = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if not seen and arch.attn_softcap is None:
            attn_mask, is_causal = order.kernel(window)
            if grouped and q.shape[2] == 1:
                # The query heads of one key-value head are as many queries of it, so that no key
                # is copied for them.
                q = q.squeeze(2).unflatten(1, (k.shape[1], -1))
                z = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale)
                return z.flatten(1, 2)[:, None]
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )
            return z.transpose(1, 2)
        if grouped:
            k, v = (t.repeat_interleave(self.n_shared, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) * scale
        if arch.attn_softcap is not None:
            scores = torch.tanh(scores / arch.attn_softcap) * arch.attn_softcap
        scores = self.hook_attn_scores(scores.masked_fill(~order[window], -torch.inf))
        # HookedTransformer's order: softmax in float32 for narrow dtypes, as Hugging Face has it.
        pattern = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        pattern = self.hook_pattern(pattern.to(v.dtype))
        return (pattern @ v).transpose(1, 2)

    @property
    def layer_id(self) -> int:
        """The layer, under HookedTransformer's name."""
        return self.layer

    @property
    def attn_type(self) -> str:
        """`local` where this layer's attention has a window, else `global`."""
        return "global" if self.arch.windows[self.layer] is None else "local"

    @property
    def attn_scale(self) -> float:
        """What this layer's attention scores are divided by."""
        return 1 / self.arch.attn_scales[self.layer]

    @property
    def n_shared(self) -> int:
        """How many query heads read one key-value head."""
        return self.arch.n_heads // self.arch.n_kv_heads

    @property
    def ungrouped(self) -> bool:
        """Whether k and v, and inputs of their own, are given once for each query head."""
        return self.n_shared > 1 and bool(self.flags.ungroup_grouped_query_attention)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of each query head, of the weights that `W_Q` and `W_K` give."""
        return FactoredMatrix(self.W_Q, per_query_head(self.W_K, self.arch).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of each query head, of the weights that `W_V` and `W_O` give."""
        return FactoredMatrix(per_query_head(self.W_V, self.arch), self.W_O)

    def _weight(self, component: Component) -> Tensor:
        linear: Linear = getattr(self, component.value)
        return self.active.of(linear.weight, component, self.layer)

    def _bias(self, component: Component) -> Tensor:
        linear: Linear = getattr(self, component.value)
        return linear.bias_now(self.active, component, self.layer)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """The base's queries, or those of a graft in force that is uniform here."""
        return per_head_out(self._weight(C.Q), self.arch.n_heads)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The base's keys, or those of a graft in force that is uniform here."""
        return per_head_out(self._weight(C.K), self.arch.n_kv_heads)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The base's values, or those of a graft in force that is uniform here."""
        return per_head_out(self._weight(C.V), self.arch.n_kv_heads)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The base's output map, or that of a graft in force that is uniform here."""
        return per_head_in(self._weight(C.O), self.arch.n_heads)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """The query bias, zeros where there is none."""
        return self._bias(C.Q).unflatten(0, (self.arch.n_heads, -1))

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """The key bias, zeros where there is none."""
        return self._bias(C.K).unflatten(0, (self.arch.n_kv_heads, -1))

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """The value bias, zeros where there is none."""
        return self._bias(C.V).unflatten(0, (self.arch.n_kv_heads, -1))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """The output bias, zeros where there is none."""
        return self._bias(C.O)


def per_query_head(
    weight: Float[Tensor, "kv_head *shape"], arch: Architecture
) -> Float[Tensor, "head *shape"]:
    """What belongs to key-value heads, repeated for each query head that reads one."""
    return weight.repeat_interleave(arch.n_heads // arch.n_kv_heads, dim=0)


class MLP(nn.Module):
    """A plain MLP; `hook_pre` and `hook_post` are [batch, pos, d_mlp]."""

    #: Names of the hook points, in HookedTransformer's order.
    HOOKS: tuple[str, ...] = ("hook_pre", "hook_post")

    def __init__(
        self, arch: Architecture, layer: int, build: "Builder", act: nn.Module, active: Active
    ) -> None:
        super().__init__()
        self.layer, self.act, self.active = layer, act, active
        self.mlp_in = UnitsOut(*build.linear(C.MLP_IN, layer), arch.d_mlp)
        self.mlp_out = UnitsIn(*build.linear(C.MLP_OUT, layer), arch.d_mlp)
        for hook in self.HOOKS:
            setattr(self, hook, HookPoint())

    def forward(
        self, x: Float[Tensor, "*batch_and_pos d_model"], run: Pass | None = None
    ) -> Float[Tensor, "*batch_and_pos d_model"]:
        """What the MLP makes of `x`; called by itself, under the graft in force."""
        places, rows = x.shape[:-1], Gathered(x.reshape(-1, x.shape[-1]))
        linears = self._linears()
        mask = InForce(self.active, places) if run is None else run.mask
        chosen = {c: mask[c, self.layer] for c in linears}
        one = chosen[C.MLP_IN].alike
        watched = any(hook.has_hooks() for hook in self._inside()) or any(
            linear._forward_hooks for linear in linears.values()
        )
        if not watched and one is not None and all(c is one for c in chosen.values()):
            weights = (w for linear in linears.values() for w in (linear.weight, linear.bias))
            equal = equal_sources(*weights)
            if any(linear.weight.adding & {*one.sources} for linear in linears.values()):
                return self._in_order(rows, one, equal).unflatten(0, places)
            if not one.mixed(equal):
                # Nobody looks inside: each source's rows go through the whole MLP at once.
                return by_source(rows, one, equal, self._whole).unflatten(0, places)

        def hooked(hook: HookPoint, t: Tensor) -> Tensor:
            return hook(t.unflatten(0, places)).reshape(t.shape)

        post = hooked(self.hook_post, self._hidden(rows, chosen, hooked))
        return self.mlp_out(Gathered(post), chosen[C.MLP_OUT]).unflatten(0, places)

    def _hidden(
        self, x: Gathered, chosen: Mapping[Component, Choice], hooked: Hooked
    ) -> Float[Tensor, "rows d_mlp"]:
        return self.act(hooked(self.hook_pre, self.mlp_in(x, chosen[C.MLP_IN])))

    def _whole(self, x: Float[Tensor, "rows d_model"], source: int) -> Tensor:
        return self.mlp_out.plain(self.act(self.mlp_in.plain(x, source)), source)

    def _in_order(self, x: Gathered, one: Selection, equal: Equal) -> Float[Tensor, "rows d_model"]:
        """All maps with the rows of one adapter next to each other, so that what it adds needs no
        gathering inside."""
        order = one.arranged(equal, x.x.device)
        if order is not None:
            x, one = Gathered(x.x.index_select(0, order.rows)), order.chosen

        def unseen(hook: HookPoint, t: Tensor) -> Tensor:
            return t

        hidden = self._hidden(x, dict.fromkeys(self._linears(), one), unseen)
        out = self.mlp_out(Gathered(hidden), one)
        return out if order is None else out.index_select(0, order.back)

    def _linears(self) -> dict[Component, Linear]:
        return {C.MLP_IN: self.mlp_in, C.MLP_OUT: self.mlp_out}

    @property
    def act_fn(self) -> nn.Module:
        """The non-linearity, under HookedTransformer's name."""
        return self.act

    def _inside(self) -> tuple[HookPoint, ...]:
        return tuple(getattr(self, hook) for hook in self.HOOKS)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The base's input map, or that of a graft in force that is uniform here."""
        return self.active.of(self.mlp_in.weight, C.MLP_IN, self.layer).T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """The base's output map, or that of a graft in force that is uniform here."""
        return self.active.of(self.mlp_out.weight, C.MLP_OUT, self.layer).T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """The input bias, zeros where there is none."""
        return self.mlp_in.bias_now(self.active, C.MLP_IN, self.layer)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """The output bias, zeros where there is none."""
        return self.mlp_out.bias_now(self.active, C.MLP_OUT, self.layer)


class GatedMLP(MLP):
    """An MLP whose input map is multiplied by a gate; `hook_pre` is the gate's, and
    `hook_pre_linear` [batch, pos, d_mlp] the input map's.
    """

    HOOKS = ("hook_pre", "hook_pre_linear", "hook_post")

    def __init__(
        self, arch: Architecture, layer: int, build: "Builder", act: nn.Module, active: Active
    ) -> None:
        super().__init__(arch, layer, build, act, active)
        self.mlp_gate = UnitsOut(*build.linear(C.MLP_GATE, layer), arch.d_mlp)

    def _hidden(
        self, x: Gathered, chosen: Mapping[Component, Choice], hooked: Hooked
    ) -> Float[Tensor, "rows d_mlp"]:
        pre = hooked(self.hook_pre, self.mlp_gate(x, chosen[C.MLP_GATE]))
        linear = hooked(self.hook_pre_linear, self.mlp_in(x, chosen[C.MLP_IN]))
        return self.act(pre) * linear

    def _whole(self, x: Float[Tensor, "rows d_model"], source: int) -> Tensor:
        inner = self.mlp_in.plain(x, source)
        inner = self.act(self.mlp_gate.plain(x, source)) * inner
        return self.mlp_out.plain(inner, source)

    def _linears(self) -> dict[Component, Linear]:
        return super()._linears() | {C.MLP_GATE: self.mlp_gate}

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """The base's gate, or that of a graft in force that is uniform here."""
        return self.active.of(self.mlp_gate.weight, C.MLP_GATE, self.layer).T


#: The classes that `Architecture.mlp` names.
MLPS: dict[MlpKind, type[MLP]] = {"plain": MLP, "gated": GatedMLP}


class TransformerBlock(nn.Module):
    """One layer: norms before or after its sublayers, sequential or parallel."""

    ln1: Norm
    ln1_post: Norm
    ln2: Norm
    ln2_post: Norm

    #: Asked by TransformerLens 4's readers of the residual stream, as are the properties below.
    hook_out_is_single_residual_stream = True

    def __init__(
        self,
        arch: Architecture,
        layer: int,
        build: "Builder",
        act: nn.Module,
        flags: Any,
        active: Active,
    ) -> None:
        super().__init__()
        self.arch, self.layer, self.flags = arch, layer, flags
        for before, after in ((C.LN1, C.LN1_POST), (C.LN2, C.LN2_POST)):
            if arch.pre_norms:
                setattr(self, before.value, build.norm(before, layer))
            if arch.post_norms:
                setattr(self, after.value, build.norm(after, layer))
        self.attn = Attention(arch, layer, build, flags, active)
        self.mlp = MLPS[arch.mlp](arch, layer, build, act, active)
        # [batch, pos, head, d_model], of k and v [batch, pos, kv_head, d_model]
        self.hook_attn_in = FlaggedPoint(flags, "use_attn_in", unless="use_split_qkv_input")
        self.hook_q_input = FlaggedPoint(flags, "use_split_qkv_input")
        self.hook_k_input = FlaggedPoint(flags, "use_split_qkv_input")
        self.hook_v_input = FlaggedPoint(flags, "use_split_qkv_input")
        # [batch, pos, d_model], as are all below
        self.hook_mlp_in = FlaggedPoint(flags, "use_hook_mlp_in")
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_pre = HookPoint()
        if not arch.parallel:
            self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: None = None,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Tensor | None = None,
        *,
        run: Pass | None = None,
    ) -> Float[Tensor, "batch pos_after d_model"]:
        """The residual stream after the layer; called by itself, under the graft in force.

        Args:
            resid_pre: the stream before it.
            shortformer_pos_embed: nothing; none of the families has such positions.
            past_kv_cache_entry: keys and values of earlier positions, of this layer.
            attention_mask: 1 for tokens and 0 for padding, earlier positions included.
            run: the pass that this layer is part of.
        """
        run = run or self.attn.alone(resid_pre, past_kv_cache_entry, attention_mask)
        resid_pre, read = run.rows(self.layer, self.hook_resid_pre(resid_pre))
        attn_out = self.attn(*self._attention_inputs(resid_pre, read, run), run=run)
        if self.arch.post_norms:
            attn_out = self._norm("ln1_post", attn_out, run)
        attn_out = self.hook_attn_out(attn_out)
        resid_mid = resid_pre if self.arch.parallel else self.hook_resid_mid(resid_pre + attn_out)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if self.flags.use_hook_mlp_in else resid_mid
        mlp_out = self.mlp(self._norm("ln2", mlp_in, run) if self.arch.pre_norms else mlp_in, run)
        if self.arch.post_norms:
            mlp_out = self._norm("ln2_post", mlp_out, run)
        mlp_out = self.hook_mlp_out(mlp_out)
        if self.arch.parallel:
            return self.hook_resid_post(mlp_out + attn_out + resid_pre)
        return self.hook_resid_post(resid_mid + mlp_out)

    def _attention_inputs(
        self, resid: Tensor, read: Tensor, run: Pass
    ) -> tuple[Tensor, Tensor, Tensor]:
        def norm(x: Tensor) -> Tensor:
            return self._norm("ln1", x, run) if self.arch.pre_norms else x

        if run.tree is not None:
            x = norm(resid)
            if read is resid:
                return x, x, x
            if self.arch.pre_norms:
                read = self.ln1(read, run.tree[self.layer].on_keys.get(C.LN1))
            return x, read, read

        def per_head(n_heads: int) -> Tensor:
            return resid[:, :, None].expand(-1, -1, n_heads, -1).clone()

        n_heads = self.arch.n_heads
        n_kv = n_heads if self.attn.ungrouped else self.arch.n_kv_heads
        if self.flags.use_split_qkv_input:
            return (
                norm(self.hook_q_input(per_head(n_heads))),
                norm(self.hook_k_input(per_head(n_kv))),
                norm(self.hook_v_input(per_head(n_kv))),
            )
        if self.flags.use_attn_in:
            x = norm(self.hook_attn_in(per_head(n_heads)))
            return x, x, x
        x = norm(resid)
        return x, x, x

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The parts of a layer, by name."""
        return dict(self.named_children())

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Which part of a layer writes attention's output to the residual stream."""
        return {"hook_attn_out": f"{'ln1_post' if self.arch.post_norms else 'attn'}.hook_out"}

    def _norm(self, name: str, x: Tensor, run: Pass) -> Tensor:
        norm: Norm = getattr(self, name)
        return norm(x, None if norm.weight is None else run.mask[C(name), self.layer])


class Builder:
    """Builds modules from the weights of all sources, sharing what they share."""

    def __init__(
        self,
        arch: Architecture,
        sources: list[Weights],
        active: Active,
        rotary: Rotary | None,
        additions: Sequence[Additions] = (),
    ) -> None:
        """`additions` are what each source adds to its matrices; without, nothing."""
        self.arch, self.sources, self.active = arch, sources, active
        self.alone = Alone(arch, active, rotary)
        self.additions = additions or [{}] * len(sources)
        self._known: dict[object, Sourced] = {}
        self._parameters: dict[object, nn.Parameter] = {}
        self._padded: dict[object, Tensor] = {}

    def sourced(self, component: Component, layer: int | None, parameter: str) -> Sourced | None:
        tensors = [weights.get((component, layer, parameter)) for weights in self.sources]
        present = [t for t in tensors if t is not None]
        if not present:
            return None
        matrix = parameter == "weight"
        added = [own.get((component, layer), ()) if matrix else () for own in self.additions]
        # The same tensors used in two places (tied embeddings) become one module, or where only
        # additions differ, one parameter in two.
        key = (*map(_memory, present), *(tuple(map(id, own)) for own in added))
        if key not in self._known:
            sizes = [len(t) for t in present] if component in (C.EMBED, C.UNEMBED) else []
            if len(set(sizes)) > 1:
                n = self.arch.d_vocab
                present = [*map(self._with_all_tokens, present)]
                added = [tuple(one.with_rows(n) for one in own) for own in added]
            else:
                sizes = []
            self._known[key] = Sourced([*map(self._parameter, present)], added, sizes)
        return self._known[key]

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        key = _memory(tensor)
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(tensor)
        return self._parameters[key]

    def _with_all_tokens(self, table: Float[Tensor, "tokens *width"]) -> Tensor:
        """A table with zeros in the rows that its source lacks."""
        missing = self.arch.d_vocab - len(table)
        if not missing:
            return table
        key = _memory(table)
        if key not in self._padded:
            self._padded[key] = torch.cat([table, table.new_zeros(missing, *table.shape[1:])])
        return self._padded[key]

    def weight(self, component: Component, layer: int | None) -> Sourced:
        weight, _ = self.linear(component, layer)
        return weight

    def linear(self, component: Component, layer: int | None) -> tuple[Sourced, Sourced | None]:
        weight, bias = self._both(component, layer)
        assert weight is not None, f"{component} {layer} was checked when it was read"
        return weight, bias

    def norm(self, component: Component, layer: int | None) -> Norm:
        weight, bias = self._both(component, layer)
        return Norm(self.arch, weight, bias, self.active, component, layer)

    def _both(
        self, component: Component, layer: int | None
    ) -> tuple[Sourced | None, Sourced | None]:
        """Weight and bias of a site, whose equal sources are noted for those who ask."""
        weight = self.sourced(component, layer, "weight")
        bias = self.sourced(component, layer, "bias")
        equal = equal_sources(weight, bias)
        if component in (C.Q, C.K) and layer is not None and self.alone.rotary is not None:
            both = list(zip(equal, self.alone.rotary.equal(layer), strict=True))
            equal = tuple(both.index(pair) for pair in both)
        self.active.equal[component, layer] = equal
        return weight, bias


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What tells two tensors apart that are not the same numbers in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
