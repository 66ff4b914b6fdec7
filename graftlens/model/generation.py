"""Continuing prompts under a graft."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.model.forward import KeyValueCache
from graftlens.model.inputs import Batch, Input, collate
from graftlens.model.mask import GraftLike, GraftMask
from graftlens.prompts import Prompt, Tokenized


class Generation:
    """The part of `GraftedTransformer` that generates."""

    @torch.no_grad()
    def generate(
        self: Any,
        input: Input,
        max_new_tokens: int = 10,
        *,
        graft: GraftLike = None,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        prepend_bos: bool | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        use_past_kv_cache: bool = True,
    ) -> Any:
        """Continue prompts under a graft, greedily unless `do_sample`.

        At every step `last` is the position generated from, as in the paper's token-by-token
        algorithm: keys and values of earlier positions stay as they were computed. Numbers such as
        [-1] and fields keep to the prompt.

        Args:
            input: anything that `forward` runs.
            max_new_tokens: how many tokens to add at most.
            graft: as in `forward`; not a mask, since positions are added.
            attention_mask: 1 for tokens, 0 for padding; only with token ids.
            do_sample: draw from the distribution instead of taking its mode.
            temperature: divides the logits when drawing.
            top_k: draw from the k likeliest only.
            generator: the randomness for drawing.
            stop_at_eos: a prompt that gave an EOS token is finished; it is filled up with padding.
            eos_token_id: the tokens that end a prompt; unless given, those of the base's generation
                settings, else the tokenizer's EOS.
            prepend_bos: None leaves BOS to the tokenizer.
            return_type: `input` gives texts for texts, tokens for tokens; the prompt is included.
            use_past_kv_cache: False recomputes every step from the start (slow; the same result).

        Returns:
            The text, a list of texts, or tokens [batch, pos + new]; texts of different lengths are
            padded on the left.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: write a number from 0.")
        if isinstance(graft, GraftMask):
            raise ValueError("generate adds positions: give it the graft, not a resolved mask.")
        if do_sample and temperature <= 0:
            raise ValueError(
                f"temperature={temperature}: write a number above 0, or do_sample=False."
            )
        given = self.batch(input, attention_mask=attention_mask, prepend_bos=prepend_bos)
        batch = _left_padded(given, self._pad_id())
        ends = self._ends(eos_token_id) if stop_at_eos else ()
        # What fills up after the end: as Hugging Face chooses it.
        known = (self.pad_token, getattr(self.tokenizer, "pad_token_id", None), *ends, 0)
        filler = next(token for token in known if token is not None)

        # Where rotary tables change with the length, keys that are kept would be out of date.
        limit, longest = self.arch.rope_limit, max(batch.totals) + max_new_tokens
        kept = use_past_kv_cache and (limit is None or longest <= limit)
        cache = KeyValueCache() if kept else None
        mask = self.resolve(graft, batch)
        logits = self.logits_from(self._residual(batch, mask, cache=cache)[:, -1:], _last(mask))
        rule = mask.graft
        tokens, real = batch.tokens.to(self.cfg.device), batch.real
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step_mask: GraftMask | None = None
        for step in range(max_new_tokens):
            new = _pick(logits[:, -1], do_sample, temperature, top_k, generator)
            new = torch.where(done, torch.full_like(new, filler), new)
            for end in ends:
                done |= new == end
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            past, real = real, np.pad(real, ((0, 0), (0, 1)), constant_values=True)
            if step == max_new_tokens - 1 or (ends and bool(done.all())):
                break
            grown = Batch(tokens, real, batch.prompts, batch.starts, tuple(real.sum(1).tolist()))
            if cache is None:
                mask = self.resolve(rule, grown)
                logits = self.logits_from(self._residual(grown, mask)[:, -1:], _last(mask))
                continue
            if step_mask is None:
                # Every later step has the same selection: the new position is `last`.
                step_mask = _last(self.resolve(rule, grown))
            one = Batch(
                tokens[:, -1:], real[:, -1:], batch.prompts, batch.starts, (1,) * len(tokens)
            )
            resid = self._residual(one, step_mask, cache=cache, past=past)
            logits = self.logits_from(resid, step_mask)
        if return_type == "tokens" or (
            return_type == "input" and isinstance(input, Tensor | Batch)
        ):
            return tokens
        texts = []
        for row, start, prompt in zip(tokens.tolist(), batch.starts, batch.prompts, strict=True):
            ids = row[start:]
            stop = next((i for i in range(len(prompt), len(ids)) if ids[i] in ends), len(ids))
            begin = int(ids[0] == getattr(self.tokenizer, "bos_token_id", None))
            texts.append(self.to_string(ids[begin:stop]))
        return texts[0] if isinstance(input, str | Prompt) else texts

    def _ends(self: Any, given: int | Sequence[int] | None) -> tuple[int, ...]:
        if given is not None:
            return (given,) if isinstance(given, int) else tuple(given)
        known = getattr(self.tokenizer, "eos_token_id", None)
        return self.end_tokens or (() if known is None else (int(known),))


def _last(mask: GraftMask) -> GraftMask:
    """The mask of the last column."""
    return mask.take(None, np.array([mask.shape[1] - 1]))


def _left_padded(batch: Batch, pad_id: int) -> Batch:
    """The same prompts with padding on the left, so that new tokens join on at one column."""
    if not batch.padded or batch.real[:, -1].all():
        return batch
    rows = batch.tokens.tolist()
    prompts = [
        Tokenized(tuple(row[s : s + len(p)]), p.runs, p.prompt)
        for row, s, p in zip(rows, batch.starts, batch.prompts, strict=True)
    ]
    return collate(prompts, pad_id=pad_id, side="left", device=batch.tokens.device)


def _pick(
    logits: Float[Tensor, "batch d_vocab"],
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " batch"]:
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
