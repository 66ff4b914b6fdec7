"""What a run can be given under HookedTransformer's names, and where it begins."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftlens.model.arch import Architecture
from graftlens.model.inputs import Batch, Input, Padding, from_tokens
from graftlens.model.mask import GraftLike
from graftlens.model.passes import GivenCache, KeyValueCache
from graftlens.model.reading import whole


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, ""] | Float[Tensor, "batch targets"]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        batch: the prompts; their tokens are placeholders where a residual stream was given alone.
        layer: the first layer that runs.
        resid: the residual stream before that layer, instead of embeddings.
        embeds: token embeddings, instead of the tokens' own.
        cache: keys and values of earlier positions.
        past: which of these are tokens; None where there are none.
        has_tokens: whether the batch's tokens are known.
    """

    batch: Batch
    layer: int | None = None
    resid: Float[Tensor, "batch pos d_model"] | None = None
    embeds: Float[Tensor, "batch pos d_model"] | None = None
    cache: KeyValueCache | GivenCache | None = None
    past: Bool[np.ndarray, "batch past"] | None = None
    has_tokens: bool = True

    @property
    def longest(self) -> int:
        """The length of the longest prompt, earlier positions included."""
        before = 0 if self.past is None else self.past.sum(axis=1)
        return int((np.array(self.batch.totals) + before).max())

    @property
    def keys(self) -> Bool[np.ndarray, "batch key"]:
        """Which positions are tokens, the earlier ones first."""
        real = self.batch.real
        return real if self.past is None else np.concatenate([self.past, real], axis=1)


class Calls:
    """The part of `GraftedTransformer` that knows HookedTransformer's ways to call a model."""

    arch: Architecture
    cfg: Any

    def _start(
        self: Any,
        input: Any,
        start_at_layer: Any = None,
        *,
        tokens: Input | None = None,
        attention_mask: Any = None,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        past_kv_cache: Any = None,
    ) -> Start:
        """Where a run begins that is given these arguments of `forward`."""
        if isinstance(input, Start):
            return input
        if start_at_layer is None:
            if tokens is not None:
                raise ValueError(
                    "tokens=… says which tokens a residual stream is of, with start_at_layer=…. "
                    "Without it, give the tokens as the input."
                )
            batch = self.batch(
                input,
                attention_mask=attention_mask,
                prepend_bos=prepend_bos,
                padding_side=padding_side,
            )
            return self._continued(Start(batch), past_kv_cache)
        layer = whole(start_at_layer, "start_at_layer")
        if not (isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 3):
            said = f"a {type(input).__name__}"
            if isinstance(input, Tensor):
                said = f"a tensor of shape {list(input.shape)} and dtype {input.dtype}"
            raise ValueError(
                f"start_at_layer={layer} needs the residual stream before that layer, "
                f"[batch, pos, {self.arch.d_model}]; the input is {said}."
            )
        if input.shape[-1] != self.arch.d_model:
            raise ValueError(
                f"a residual stream of shape {list(input.shape)}: this model's is "
                f"[batch, pos, {self.arch.d_model}]."
            )
        width, before = input.shape[1], None
        if isinstance(attention_mask, Tensor) and past_kv_cache is not None:
            before, attention_mask = attention_mask[:, :-width], attention_mask[:, -width:]
        if tokens is None:
            placeholders = torch.zeros(input.shape[:2], dtype=torch.long)
            batch = from_tokens(placeholders, attention_mask)
        else:
            batch = self.batch(
                tokens,
                attention_mask=attention_mask if isinstance(tokens, Tensor) else None,
                prepend_bos=prepend_bos,
                padding_side=padding_side,
            )
            if batch.real.shape != tuple(input.shape[:2]):
                raise ValueError(
                    f"a residual stream of shape {list(input.shape)} and tokens of shape "
                    f"{list(batch.real.shape)}: give the tokens of the same [batch, pos]."
                )
        start = Start(batch, layer, input, has_tokens=tokens is not None)
        return self._continued(start, past_kv_cache, before)

    def _continued(self: Any, start: Start, given: Any, before: Tensor | None = None) -> Start:
        """A start that goes on from TransformerLens's own cache, if there is one."""
        if given is None:
            return start
        cache = GivenCache.of(
            self.arch, given, len(start.batch.real), self.rotary, before, start.layer
        )
        return replace(start, cache=cache, past=cache.past)

    def input_to_embed(
        self: Any,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        attention_mask: Any = None,
        past_kv_cache: Any = None,
        *,
        graft: GraftLike = None,
    ) -> (
        tuple[
            Float[Tensor, "batch pos d_model"],
            Int[Tensor, "batch pos"],
            None,
            Int[Tensor, "batch key"],
        ]
        | tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], None, None]
    ):
        """An input as the residual stream before the first layer.

        Args: as for `forward`.

        Returns:
            The residual stream; the tokens; None, where HookedTransformer has the positions of
            shortformer models; and the attention mask, earlier positions included, or None where
            everything is a token. `model(resid, start_at_layer=0, tokens=tokens,
            attention_mask=mask)` goes on from there.
        """
        start = self._start(
            input,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            past_kv_cache=past_kv_cache,
        )
        mask = self.resolve(graft, start.batch)
        self.refuse_lacking(start.batch, mask)
        self.warn_beyond_context(start.longest)
        resid = self.residual(start, mask, 0)
        tokens = start.batch.tokens.to(resid.device)
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        if isinstance(start.cache, GivenCache):
            start.cache.remember(start.batch.real)
        elif attention_mask is None and not start.batch.padded and not left:
            return resid, tokens, None, None
        return resid, tokens, None, torch.from_numpy(start.keys).to(tokens)

    def get_pos_offset(self: Any, past_kv_cache: Any, batch_size: int) -> int:
        """How many positions a cache of keys and values has, 0 where there is none.

        Raises:
            ValueError: something else, or the cache of another batch or model.
        """
        if past_kv_cache is None:
            return 0
        return int(GivenCache.of(self.arch, past_kv_cache, batch_size, None).past.shape[1])

    def get_residual(
        self: Any,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Float[Tensor, "batch pos d_model"] | tuple[Float[Tensor, "batch pos d_model"], None]:
        """The residual stream before the first layer: token embeddings, and those of positions
        where they are learned, of the graft in force.

        Args:
            embed: what `model.embed(tokens)` gives.
            pos_offset: how many positions came before, as `get_pos_offset` says.
            prepend_bos, device: nothing, as in HookedTransformer 3.9.
            attention_mask: 1 for tokens, 0 for padding, earlier positions included.
            tokens: nothing that `embed` does not say.
            return_shortformer_pos_embed: return a pair; its second is None, as none of the families
                has such positions.

        Raises:
            ValueError: as `model.pos_embed`, called by itself.
        """
        resid = embed
        if self.arch.rotary_dim == 0:
            places = torch.zeros(embed.shape[:2], dtype=torch.long, device=embed.device)
            resid = embed + self.hook_pos_embed(self.pos_embed(places, pos_offset, attention_mask))
        return (resid, None) if return_shortformer_pos_embed else resid

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch targets"]:
        """The next-token cross-entropy in nats.

        Args:
            logits: of each position.
            tokens: the tokens there; each is the target of the position before it.
            attention_mask: 1 for tokens, 0 for padding, which does not count.
            per_token: losses [batch, pos - 1] instead of their mean; padding gives 0.
        """
        tokens = tokens.to(logits.device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)
        weight = torch.ones_like(losses)
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, tokens have "
                    f"{list(tokens.shape)}. Give one value per token."
                )
            real = attention_mask.to(losses.device) != 0
            weight = (real[:, 1:] & real[:, :-1]).to(losses)
        losses = losses.where(weight > 0, 0.0)  # padding may be a token that a source lacks
        return losses if per_token else losses.sum() / weight.sum()
