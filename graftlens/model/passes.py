"""What one forward pass shares between its layers: who reads whom, where, under which mask."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry

from graftlens.model.active import Active, InForce
from graftlens.model.arch import Architecture
from graftlens.model.inputs import positions_of
from graftlens.model.mask import GraftMask
from graftlens.model.rotary import Rotary, Turning, turning_at
from graftlens.model.tree import TreeBatch


@dataclass
class KeyValueCache:
    """Keys and values of earlier positions, rotated already, per layer.

    Attributes:
        room: for how many more positions than the first there is room, so that these are written
            where they stay.
        entries: layer -> keys and values of all positions so far, with the room behind them.
        counts: layer -> how many positions there are so far.
    """

    room: int = 0
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    rotated = True

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, `k` and `v` being the new ones'."""
        old = self.counts.get(layer, 0)
        now = self.counts[layer] = old + k.shape[1]
        if layer not in self.entries or self.entries[layer][0].shape[1] < now:
            past_k, past_v = self.entries.get(layer, (k[:, :0], v[:, :0]))
            self.entries[layer] = self._wider(past_k[:, :old], k), self._wider(past_v[:, :old], v)
        else:
            for kept, new in zip(self.entries[layer], (k, v), strict=True):
                kept[:, old:now] = new
        keys, values = self.entries[layer]
        return keys[:, :now], values[:, :now]

    def _wider(self, before: Tensor, new: Tensor) -> Tensor:
        parts = [before, new] if before.shape[1] else [new]
        if self.room:
            parts.append(new.new_empty(new.shape[0], self.room, *new.shape[2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def take(self, rows: Int[Tensor, " rows"], first: int) -> None:
        """Keep some rows only, from the position `first` on."""
        for layer, kept in self.entries.items():
            k, v = (x[:, first:].index_select(0, rows) for x in kept)
            self.entries[layer] = k, v
            self.counts[layer] -= first


class GivenCache:
    """TransformerLens's own cache of keys and values, whose keys are not rotated yet."""

    rotated = False

    def __init__(
        self,
        arch: Architecture,
        entries: Sequence[TransformerLensKeyValueCacheEntry],
        batch_size: int,
        rotary: Rotary | None,
        past: Tensor | None = None,
        first: int = 0,
    ) -> None:
        """Check that the cache fits.

        Args:
            arch: the model's.
            entries: one per layer, or the one of a layer that is called by itself.
            batch_size: of what runs now.
            rotary: the tables of all sources.
            past: which earlier positions are tokens, [batch, past]; None is all.
            first: the entry of the first layer that runs, which says how many positions came
                before.

        Raises:
            ValueError: a cache of another batch, or of a model of another shape, or sources whose
                rotary tables differ.
        """
        if rotary is not None and rotary.differ:
            raise ValueError(
                "a cache holds keys that are not turned yet, and does not know which source's they "
                "are; the rotary tables of these sources differ. Run the whole text at once, or "
                "model.generate(…)."
            )
        self.entries = entries
        keys = entries[first].past_keys
        wanted = (batch_size, arch.n_kv_heads, arch.d_head)
        if (keys.shape[0], *keys.shape[2:]) != wanted:
            raise ValueError(
                f"the cache of keys has shape {list(keys.shape)}; this run needs "
                f"[{batch_size}, past, {arch.n_kv_heads}, {arch.d_head}]: [batch, past, key-value "
                "head, d_head]. Make one for this model and batch: "
                "TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch_size)."
            )
        known = np.ones((batch_size, keys.shape[1]), dtype=bool)
        if past is not None and len(past) == batch_size and past.shape[1] >= keys.shape[1]:
            known = past[:, : keys.shape[1]].detach().cpu().numpy() != 0
        self._of: TransformerLensKeyValueCache | None = None
        self._before = [(entry.past_keys, entry.past_values) for entry in entries]
        #: Which earlier positions are tokens.
        self.past: Bool[np.ndarray, "batch past"] = known

    @classmethod
    def of(
        cls,
        arch: Architecture,
        cache: Any,
        batch_size: int,
        rotary: Rotary | None,
        past: Tensor | None = None,
        layer: int | None = None,
    ) -> "GivenCache":
        """The cache of a whole model, for a run that begins at `layer`; `past` overrides what it
        knows of padding.

        Raises:
            ValueError: something else, or a cache that does not fit.
        """
        if not isinstance(cache, TransformerLensKeyValueCache):
            raise ValueError(
                f"past_kv_cache is a {type(cache).__name__}. Give a TransformerLensKeyValueCache: "
                "TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch_size)."
            )
        if len(cache.entries) != arch.n_layers:
            raise ValueError(
                f"past_kv_cache has {len(cache.entries)} layers, the model {arch.n_layers}. "
                "Make one with TransformerLensKeyValueCache.init_cache(model.cfg, …)."
            )
        known = cache.previous_attention_mask if past is None else past
        first = min(slice(layer, None).indices(arch.n_layers)[0], arch.n_layers - 1)
        made = cls(arch, cache.entries, batch_size, rotary, known, first)
        made._of = cache
        return made

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, `k` and `v` being the new ones'.

        Raises:
            ValueError: a layer that has others than the layers before it, or heads in another
                number, as with `ungroup_grouped_query_attention`.
        """
        entry = self.entries[layer if self._of is not None else 0]
        n_past, n_heads = entry.past_keys.shape[1:3]
        if n_heads != k.shape[2]:
            raise ValueError(
                f"the cache has {n_heads} key-value heads, but {k.shape[2]} are hooked separately. "
                "Turn that off: model.set_ungroup_grouped_query_attention(False)."
            )
        if n_past != self.past.shape[1]:
            raise ValueError(
                f"the cache has {n_past} earlier positions in layer {layer}, but "
                f"{self.past.shape[1]} in the first layer of this run: a run that left layers out "
                "(stop_at_layer, start_at_layer) has filled only some. Run those layers, too, or "
                "make a new cache."
            )
        found = entry.append(k, v)
        return found[0], found[1]

    def restore(self) -> None:
        """Take out what a run has added, which did not come to its end."""
        for entry, (keys, values) in zip(self.entries, self._before, strict=True):
            entry.past_keys, entry.past_values = keys, values

    def remember(self, real: Bool[np.ndarray, "batch pos"]) -> None:
        """Which of the new positions are tokens, for the runs to come."""
        if self._of is None or self._of.frozen:
            return
        now = torch.from_numpy(np.concatenate([self.past, real], axis=1))
        self._of.previous_attention_mask = now.to(self._of.previous_attention_mask)


class AttentionOrder:
    """Which keys each query reads: causal, within a window, never padding."""

    def __init__(
        self,
        real: Bool[np.ndarray, "batch key"],
        n_queries: int,
        device: torch.device,
    ) -> None:
        """`real` says which keys are tokens; the queries are the last `n_queries` of them."""
        self.real, self.n_queries, self.device = real, n_queries, device
        self._masks: dict[int | None, Bool[Tensor, "batch_or_1 1 query key"]] = {}

    def __getitem__(self, window: int | None) -> Bool[Tensor, "batch_or_1 1 query key"]:
        """True where a query reads a key. Padding reads itself, so that no row is empty."""
        if window not in self._masks:
            keys = np.arange(self.real.shape[1])
            behind = keys[-self.n_queries :, None] - keys[None, :]
            reads = behind >= 0
            if window is not None:
                reads &= behind < window
            reads = reads[None]
            if not self.real.all():
                reads = (reads & self.real[:, None, :]) | (behind == 0)
            self._masks[window] = torch.from_numpy(reads[:, None]).to(
                self.device, non_blocking=True
            )
        return self._masks[window]

    def kernel(self, window: int | None) -> tuple[Tensor | None, bool]:
        """(attn_mask, is_causal) for `scaled_dot_product_attention`: a mask only where needed."""
        n_keys = self.real.shape[1]
        if (window is None or window >= n_keys) and self.real[:, 0].all():
            # Right padding comes after every token, so causal order hides it.
            if self.n_queries == n_keys:
                return None, True
            if self.n_queries == 1 and self.real.all():
                return None, False
        return self[window], False


@dataclass(frozen=True)
class Pass:
    """What one forward pass shares between its layers.

    Attributes:
        mask: which source every row uses at every site.
        turning: the rotary tables of its rows; None with learned positions.
        order: which keys each query reads.
        cache: keys and values of earlier positions, or None.
        tree: the rows of each layer, where the batch is a token tree.
    """

    mask: GraftMask | InForce
    turning: Turning | None
    order: AttentionOrder | None = None
    cache: KeyValueCache | GivenCache | None = None
    tree: TreeBatch | None = None

    def rows(self, layer: int, resid: Tensor) -> tuple[Tensor, Tensor]:
        """The residual rows that a layer goes on from, and those whose keys and values it makes.

        They are the same but in a tree, where one row may go on in several ways, or be read only.
        """
        if self.tree is None:
            return resid, resid
        return self.tree[layer].split(resid)

    def extended(self, layer: int, k: Tensor, v: Tensor, rotated: bool) -> tuple[Tensor, Tensor]:
        """Keys and values, those of earlier positions first if they are kept as these are:
        rotated, or not yet."""
        if self.cache is None or self.cache.rotated != rotated:
            return k, v
        return self.cache.append(layer, k, v)


class Alone:
    """Makes the pass of a layer, or of a part of one, that is called by itself."""

    def __init__(self, arch: Architecture, active: Active, rotary: Rotary | None) -> None:
        self.arch, self.active, self.rotary = arch, active, rotary

    def __call__(
        self,
        x: Float[Tensor, "batch pos *head d_model"],
        entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Tensor | None = None,
        *others: Tensor,
    ) -> Pass:
        """The pass of rows `x` under the graft in force.

        Args:
            x: what the part reads, queries where keys and values read something else.
            entry: keys and values of earlier positions of this layer.
            attention_mask: 1 for tokens and 0 for padding, earlier positions included,
                [batch, past + pos]; None is all tokens.
            others: what keys and values read, at the same places.

        Raises:
            ValueError: places differ under the graft in force, and these are not its places; or a
                cache or a mask of another shape.
        """
        batch, n_queries = places = x.shape[:2]
        for other in others:
            if other.shape[:2] != places:
                raise ValueError(
                    f"queries read {list(x.shape)}, keys and values {list(other.shape)}: give the "
                    "same positions to all three, and those before them as a cache."
                )
        cache = None if entry is None else GivenCache(self.arch, [entry], batch, self.rotary)
        past = 0 if cache is None else cache.past.shape[1]
        real = np.ones((batch, past + n_queries), dtype=bool)
        if attention_mask is not None:
            if tuple(attention_mask.shape) != real.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but there are "
                    f"{list(real.shape)} keys, those of earlier positions included."
                )
            real = attention_mask.detach().cpu().numpy() != 0
        order = AttentionOrder(real, n_queries, x.device)
        return Pass(
            InForce(self.active, places),
            turning_at(self.rotary, x, positions_of(real)),
            order,
            cache,
        )
