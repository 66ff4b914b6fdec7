"""Continuing prompts under a graft."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.components import Component
from graftlens.model.forward import KeyValueCache
from graftlens.model.inputs import Batch, Input, collate
from graftlens.model.mask import GraftLike, GraftMask
from graftlens.model.reading import tell, whole
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
        attention_mask: Any = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[Any] | Tensor | None = None,
        prepend_bos: bool | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        new_only: bool = False,
        use_past_kv_cache: bool = True,
    ) -> Any:
        """Continue prompts under a graft, greedily unless `do_sample`.

        At every step `last` is the position generated from, as in the paper's token-by-token
        algorithm: keys and values of earlier positions stay as they were computed. Numbers such as
        [-1] and fields always refer to the prompt. A prompt whose next token has no row in the
        embedding of a source that is used there ends with that token, with a warning.

        Args:
            input: anything that `forward` runs.
            max_new_tokens: most tokens to add.
            graft: as in `forward`; not a mask, since positions are added.
            attention_mask: 1 for tokens, 0 for padding; only with token ids.
            do_sample: draw from the distribution instead of taking its mode.
            temperature: divides the logits when drawing.
            top_k: draw from the k likeliest only.
            generator: the randomness for drawing.
            stop_at_eos: a prompt that gave an end token is finished; it is filled up with padding.
            eos_token_id: the tokens that end every prompt. Unless given, a prompt that runs one
                source alone, as under `sft @ all`, ends where that source's generation settings
                say, and any other at the end tokens of all sources that it runs; for a source
                whose settings name none, its config's, else the tokenizer's EOS.
            prepend_bos: as in `forward`.
            return_type: `input` gives texts for texts, tokens for tokens.
            new_only: leave out the prompt and return only what was added.
            use_past_kv_cache: False recomputes every step from the start (slow; the same result).

        Returns:
            A text or a list of texts: each prompt's text as it was given (that of bare tokens is
            what they decode to, special tokens included), then the new text without its end token.
            Or tokens [batch, pos + new], prompts of different lengths padded on the left, with
            `new_only` [batch, new]; after its end a row is filled up with the pad token of its
            sources' settings, else with an end token.

        Raises:
            PromptError, ValueError: as `forward`, or an option outside its range.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: write a number from 0.")
        if isinstance(graft, GraftMask):
            raise ValueError("generate adds positions: give it the graft, not a resolved mask.")
        if do_sample and temperature <= 0:
            raise ValueError(
                f"temperature={temperature}: write a number above 0, or do_sample=False."
            )
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f'return_type={return_type!r}. Allowed: "input", "str" or "tokens".')
        input = list(input) if isinstance(input, Iterator) else input
        given = self.batch(input, attention_mask=attention_mask, prepend_bos=prepend_bos)
        batch = _left_padded(given, self._pad_id())
        self.refuse_lacking(batch, self.resolve(graft, batch))
        longest = max(batch.totals)
        self.warn_beyond_context(longest)

        # If rotary tables change with the length, cached keys would be out of date.
        limit = self.arch.rope_limit
        kept = use_past_kv_cache and (limit is None or longest + max_new_tokens <= limit)
        cache = KeyValueCache() if kept else None
        mask = self.resolve(graft, batch)
        logits = self.logits_from(self._residual(batch, mask, cache=cache)[:, -1:], _last(mask))
        rule = mask.graft
        tokens, real = batch.tokens.to(self.cfg.device), batch.real
        later = self.resolve(rule, _grown(batch, tokens[:, -1:]))
        # Every later step has the same selection: the new position is `last`.
        step_mask = _last(later)
        row_sources = _sources_of_rows(later)
        ends = self._ends(eos_token_id, row_sources) if stop_at_eos else [()] * len(tokens)
        filler = torch.tensor(self._fillers(ends, row_sources), device=tokens.device)
        enders = sorted({end for row in ends for end in row})
        ended_by = torch.tensor([[e in row for row in ends] for e in enders], device=tokens.device)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        vocabularies = self.vocabularies
        embed = step_mask[Component.EMBED, None]
        readable = torch.from_numpy(vocabularies.of_rows(embed)).to(tokens.device)
        lengths: dict[int, int] = {}  # of rows that end because a source cannot read the last token
        for step in range(max_new_tokens):
            new = _pick(logits[:, -1], do_sample, temperature, top_k, generator)
            new = torch.where(done, filler, new)
            for end, rows in zip(enders, ended_by, strict=True):
                done |= (new == end) & rows
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            past, real = real, np.pad(real, ((0, 0), (0, 1)), constant_values=True)
            if step == max_new_tokens - 1 or (enders and bool(done.all())):
                break
            if vocabularies.differ:
                for row in torch.nonzero(~done & (new >= readable))[:, 0].tolist():
                    sources = [s for s in embed.sources if embed.share(s)[row]]
                    position = batch.totals[row] + step
                    lacks = vocabularies.lacking(int(new[row]), sources, position)
                    tell(f"prompt {row} ends with the token generated last: {lacks}")
                    lengths[row], done[row] = step + 1, True
                if done.all():
                    break
            if longest + step == self.arch.n_ctx:
                self.warn_beyond_context(longest + step + 1)
            if cache is None:
                grown = Batch(
                    tokens, real, batch.prompts, batch.starts, tuple(real.sum(1).tolist())
                )
                mask = self.resolve(rule, grown)
                logits = self.logits_from(self._residual(grown, mask)[:, -1:], _last(mask))
                continue
            one = Batch(
                tokens[:, -1:], real[:, -1:], batch.prompts, batch.starts, (1,) * len(tokens)
            )
            resid = self._residual(one, step_mask, cache=cache, past=past)
            logits = self.logits_from(resid, step_mask)
        if return_type == "tokens" or (
            return_type == "input" and isinstance(input, Tensor | Batch)
        ):
            return tokens[:, batch.real.shape[1] :] if new_only else tokens
        single = isinstance(input, str | Prompt | Tokenized)
        items: Any = [input] if single else input
        if isinstance(input, Tensor | Batch):
            items = batch.prompts
        texts = []
        for i, (item, prompt) in enumerate(zip(items, batch.prompts, strict=True)):
            ids = tokens[i, batch.starts[i] :].tolist()
            added = ids[len(prompt) :]
            added = added[: lengths.get(i, len(added))]
            stop = next((n for n, token in enumerate(added) if token in ends[i]), len(added))
            new = self._added_text(ids[: len(prompt)], added[:stop])
            known = item if isinstance(item, str) else prompt.text
            before = self.to_string(ids[: len(prompt)]) if known is None else known
            texts.append(new if new_only else before + new)
        return texts[0] if single else texts

    def _added_text(self: Any, prompt: Sequence[int], added: Sequence[int]) -> str:
        """What tokens add to the text of a prompt's own, without the prompt.

        Not what they give by themselves: a tokenizer may drop the space before a first word, and
        several tokens may make one character.
        """
        before, both = self.to_string([*prompt]), self.to_string([*prompt, *added])
        for known in (before, before.rstrip("\N{REPLACEMENT CHARACTER}")):
            if both.startswith(known):
                return str(both[len(known) :])
        return str(self.to_string([*added]))

    def _ends(
        self: Any,
        given: int | Sequence[Any] | Tensor | None,
        row_sources: Sequence[Sequence[str]],
    ) -> list[tuple[int, ...]]:
        """The tokens that end each row."""
        if given is not None:
            given = given.flatten().tolist() if isinstance(given, Tensor) else given
            listed = given if isinstance(given, Sequence) else [given]
            return [tuple(whole(end, "eos_token_id") for end in listed)] * len(row_sources)
        known = getattr(self.tokenizer, "eos_token_id", None)
        usual = () if known is None else (int(known),)
        return [
            tuple(dict.fromkeys(end for name in names for end in self.end_tokens[name] or usual))
            for names in row_sources
        ]

    def _fillers(
        self: Any, ends: Sequence[Sequence[int]], row_sources: Sequence[Sequence[str]]
    ) -> list[int]:
        """What fills each row up after its end, as Hugging Face chooses it."""
        known = [
            (*(self.pad_token[name] for name in names), *row, 0)
            for row, names in zip(ends, row_sources, strict=True)
        ]
        return [next(token for token in tokens if token is not None) for tokens in known]


def _grown(batch: Batch, token: Int[Tensor, "batch 1"]) -> Batch:
    """The batch with one token more in each row."""
    real = np.pad(batch.real, ((0, 0), (0, 1)), constant_values=True)
    tokens = torch.cat([batch.tokens.to(token.device), token], dim=1)
    totals = tuple(total + 1 for total in batch.totals)
    return Batch(tokens, real, batch.prompts, batch.starts, totals)


def _sources_of_rows(mask: GraftMask) -> list[list[str]]:
    """The sources that each prompt runs at any site."""
    real = np.zeros(mask.shape, dtype=bool)
    for row, (start, _, total) in zip(real, mask.extents, strict=True):
        row[start : start + total] = True
    used = np.zeros((mask.shape[0], len(mask.sources)), dtype=bool)
    for chosen in {id(chosen): chosen for chosen in mask.sites.values()}.values():
        for _, selection in chosen.parts():
            for source in selection.sources:
                has = selection.share(source).reshape(mask.shape) != 0
                used[:, source] |= (has & real).any(1)
    return [[mask.sources[s] for s in np.flatnonzero(row)] for row in used]


def _last(mask: GraftMask) -> GraftMask:
    """The mask of the last column."""
    return mask.take(None, np.array([mask.shape[1] - 1]))


def _left_padded(batch: Batch, pad_id: int) -> Batch:
    """The same prompts with padding on the left, so that new tokens join on at one column."""
    if not batch.padded or batch.real[:, -1].all():
        return batch
    rows = batch.tokens.tolist()
    prompts = [
        replace(p, ids=tuple(row[s : s + len(p)]))
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
