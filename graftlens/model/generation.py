"""Continuing prompts under a graft."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers.generation import GenerateDecoderOnlyOutput

from graftlens.components import Component
from graftlens.model.decoding import Decoder, left_padded
from graftlens.model.inputs import Batch, Input, Padding, generating
from graftlens.model.mask import GraftLike, GraftMask
from graftlens.model.reading import AssertedError, tell, whole
from graftlens.model.sampling import Sampling, StopStrings, count_tokens
from graftlens.prompts import Prompt, Tokenized


@dataclass
class _Continued:
    """What one generation has added so far.

    Attributes:
        decoder: the prompts and what follows them.
        ends: the tokens that end each row.
        filler: what fills each row up after its end.
        lengths: how many tokens each row has of its own, its end included; -1 while it goes on.
        logits: of every new token, [batch, d_vocab] each, where they are asked for.
    """

    decoder: Decoder
    ends: list[tuple[int, ...]]
    filler: Int[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    logits: list[Float[Tensor, "batch d_vocab"]] = field(default_factory=list)

    @property
    def added(self) -> Int[Tensor, "batch new"]:
        """The new tokens."""
        return self.decoder.tokens[:, self.decoder.batch.real.shape[1] :]

    def kept(self) -> list[int]:
        """How many tokens each row has of its own, its end included."""
        n_new = self.added.shape[1]
        return [n_new if n < 0 else n for n in self.lengths.tolist()]


class Generation:
    """The part of `GraftedTransformer` that generates."""

    @torch.no_grad()
    def generate(
        self: Any,
        input: Input | Float[Tensor, "batch pos d_model"] = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[Any] | Tensor | None = None,
        do_sample: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        return_type: Literal["input", "str", "tokens", "embeds"] = "input",
        verbose: bool = False,
        *,
        graft: GraftLike = None,
        attention_mask: Any = None,
        generator: torch.Generator | None = None,
        repetition_penalty: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
        new_only: bool = False,
        output_logits: bool = False,
        return_dict_in_generate: bool | None = None,
        return_cache: bool = False,
        names_filter: Any = None,
    ) -> Any:
        """Continue prompts under a graft, greedily unless `do_sample`.

        At every step `last` is the position generated from, as in the paper's token-by-token
        algorithm: keys and values of earlier positions stay as they were computed. Numbers such as
        [-1] and fields always refer to the prompt. A prompt whose next token has no row in the
        embedding of a source that is used there ends with that token, with a warning.

        Args:
            input: anything that `forward` runs, or token embeddings [batch, pos, d_model] (as
                `model.embed` gives them: positions are added here).
            max_new_tokens: most tokens to add.
            stop_at_eos: a prompt that gave an end token is finished; it is filled up with padding.
            eos_token_id: the tokens that end every prompt. Unless given, a prompt that runs one
                source alone, as under `sft @ all`, ends where that source's generation settings
                say, and any other at the end tokens of all sources that it runs; for a source
                whose settings name none, its config's, else the tokenizer's EOS.
            do_sample: draw from the distribution instead of taking its mode. The draws are
                HookedTransformer's under the same seed.
            top_k: draw from the k likeliest only.
            top_p: draw from the likeliest whose probabilities add up to `top_p` or more.
            temperature: divides the logits when drawing; 0 takes the mode.
            freq_penalty: when drawing, subtracted from a token's logit once per time that it
                appeared in the prompt or after it.
            use_past_kv_cache: False recomputes every step from the start (slow; the same result).
            prepend_bos, padding_side: as in `forward`; what is generated from is padded on the
                left in any case.
            return_type: `input` gives texts for texts, tokens for tokens, embeddings for
                embeddings.
            verbose: show a progress bar.
            graft: as in `forward`; not a mask, since positions are added.
            attention_mask: 1 for tokens, 0 for padding; only with token ids or embeddings.
            generator: the randomness for drawing; None is PyTorch's own.
            repetition_penalty: as in Hugging Face's: of tokens that appeared, positive logits are
                divided and negative ones multiplied by it.
            stop_strings: texts that finish a prompt once a new token completes one of them.
            new_only: leave out the prompt and return only what was added.
            output_logits: return transformers' `GenerateDecoderOnlyOutput` instead: `sequences`
                are the tokens, `logits` one [batch, d_vocab] per new token, before any penalty.
            return_dict_in_generate: nothing, as in HookedTransformer 3.9: `output_logits` decides.
            return_cache: return a pair, the second the `ActivationCache` of one more run of
                everything, new tokens included, under what ran at each position.
            names_filter: which activations it has, as in `run_with_cache`.

        Returns:
            A text or a list of texts: each prompt's text as it was given (that of bare tokens is
            what they decode to, special tokens included), then the new text without its end token.
            Or tokens [batch, pos + new], prompts of different lengths padded on the left, with
            `new_only` [batch, new]; after its end a row is filled up with the pad token of its
            sources' settings, else with an end token. Of prompts given as embeddings, which have
            no tokens, texts and tokens are what was added.

        Raises:
            PromptError, ValueError: as `forward`, or an option outside its range.
        """
        if return_type not in ("input", "str", "tokens", "embeds"):
            raise AssertedError(
                f'return_type={return_type!r}. Allowed: "input", "str", "tokens" or "embeds".'
            )
        input = list(input) if isinstance(input, Iterator) else input
        embedded = isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 3
        if return_type == "input" and isinstance(input, Tensor | Batch):
            return_type = "embeds" if embedded else "tokens"
        if return_type == "embeds" and not embedded:
            raise ValueError(
                'return_type="embeds" is for prompts given as embeddings [batch, pos, d_model]. '
                'Take tokens (return_type="tokens") and embed them: model.embed(tokens).'
            )
        if return_cache and embedded:
            raise ValueError(
                "return_cache=True runs the tokens once more, but these prompts are embeddings. "
                "Give tokens or texts, or run the embeddings that generate returns: "
                "model.run_with_cache(resid, start_at_layer=0)."
            )
        made, steps = self._continuation(
            input,
            max_new_tokens,
            Sampling(do_sample, temperature, top_k, top_p, freq_penalty, repetition_penalty),
            graft=graft,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            use_past_kv_cache=use_past_kv_cache,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            generator=generator,
            output_logits=output_logits,
        )
        for _ in tqdm(steps, total=max_new_tokens, disable=not verbose):
            pass
        tokens = made.added if new_only or embedded else made.decoder.tokens
        result: Any = tokens
        if output_logits:
            result = GenerateDecoderOnlyOutput(sequences=tokens, logits=tuple(made.logits))
        elif return_type == "embeds":
            first = made.decoder.batch.real.shape[1] if new_only else 0
            result = made.decoder.embeds[:, first:]
        elif return_type != "tokens":
            texts = self._texts(input, made, new_only or embedded)
            result = texts[0] if isinstance(input, str | Prompt | Tokenized) else texts
        if not return_cache:
            return result
        grown = made.decoder.grown(made.kept())
        _, cache = self.run_with_cache(
            grown, return_type=None, graft=made.decoder.graft, names_filter=names_filter
        )
        return result, cache

    def generate_stream(
        self: Any,
        input: Input | Float[Tensor, "batch pos d_model"] = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[Any] | Tensor | None = None,
        do_sample: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = False,
        *,
        graft: GraftLike = None,
        attention_mask: Any = None,
        generator: torch.Generator | None = None,
        repetition_penalty: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
    ) -> Iterator[Any]:
        """Continue prompts and yield the new tokens in pieces; the options are those of `generate`.

        Args:
            input: as in `generate`, except embeddings.
            max_new_tokens: most tokens to add.
            max_tokens_per_yield: how many tokens (the prompt's among them, the first time) are
                gathered before they are handed out.
            return_type: `str` gives the texts of each piece (one text for one prompt); `input` and
                `tokens` give tokens, as in HookedTransformer 3.9.
            stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty,
                use_past_kv_cache, prepend_bos, padding_side, verbose, graft, attention_mask,
                generator, repetition_penalty, stop_strings: as in `generate`.

        Yields:
            Tokens [batch, pos + new], the first time with the prompts, then only new ones
            [batch, new]; texts likewise. The last piece may be shorter.

        Raises:
            PromptError, ValueError: as `generate`, before the first piece is asked for.
        """
        if return_type not in ("input", "str", "tokens"):
            raise AssertedError(
                f'return_type={return_type!r}. Allowed: "input", "str" or "tokens".'
            )
        if whole(max_tokens_per_yield, "max_tokens_per_yield") < 1:
            raise ValueError(f"max_tokens_per_yield={max_tokens_per_yield}: write a number from 1.")
        if isinstance(input, Tensor) and input.ndim == 3:
            raise ValueError(
                "generate_stream hands out the prompt's tokens first, which embeddings do not "
                "have. Use generate, or give tokens or texts."
            )
        input = list(input) if isinstance(input, Iterator) else input
        made, steps = self._continuation(
            input,
            max_new_tokens,
            Sampling(do_sample, temperature, top_k, top_p, freq_penalty, repetition_penalty),
            graft=graft,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            use_past_kv_cache=use_past_kv_cache,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            generator=generator,
        )
        shown = tqdm(steps, total=max_new_tokens, disable=not verbose)
        if return_type != "str":
            return _pieces(shown, made, max_tokens_per_yield)
        one = len(made.ends) == 1

        def texts() -> Iterator[Any]:
            told = [""] * len(made.ends)
            for _ in _pieces(shown, made, max_tokens_per_yield):
                # A character whose bytes are not complete waits for the tokens that end it.
                now = [
                    t.rstrip("\N{REPLACEMENT CHARACTER}") for t in self._texts(input, made, False)
                ]
                yield now[0][len(told[0]) :] if one else _beyond(told, now)
                told = now
            rest = _beyond(told, self._texts(input, made, False))
            if any(rest):
                yield rest[0] if one else rest

        return texts()

    @torch.no_grad()
    def _continuation(
        self: Any,
        input: Any,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        graft: GraftLike,
        attention_mask: Any,
        prepend_bos: bool | None,
        padding_side: Padding | None,
        use_past_kv_cache: bool,
        stop_at_eos: bool,
        eos_token_id: int | Sequence[Any] | Tensor | None,
        stop_strings: str | Sequence[str] | None,
        generator: torch.Generator | None,
        output_logits: bool = False,
    ) -> tuple[_Continued, Iterator[None]]:
        """The prompts as they run, and an iterator that adds one token to each per step."""
        if whole(max_new_tokens, "max_new_tokens") < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: write a number from 0.")
        if isinstance(graft, GraftMask):
            raise ValueError("generate adds positions: give it the graft, not a resolved mask.")
        stops = None if stop_strings is None else StopStrings(stop_strings)
        if stops is not None:
            self._tokenizer()
        start = self._start(
            input,
            0 if isinstance(input, Tensor) and input.ndim == 3 else None,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
        )
        if start.resid is not None and sampling.counts:
            raise ValueError(
                "freq_penalty and repetition_penalty count the tokens so far, which prompts given "
                "as embeddings do not have. Give tokens or texts."
            )
        batch = left_padded(generating(start.batch), self.pad_id())
        embeds = start.resid
        if embeds is not None and batch.starts != start.batch.starts:
            shifts = [new - old for new, old in zip(batch.starts, start.batch.starts, strict=True)]
            embeds = torch.stack([e.roll(n, 0) for e, n in zip(embeds, shifts, strict=True)])
        mask = self.resolve(graft, batch)
        if embeds is None:
            self.refuse_lacking(batch, mask)
        decoder = Decoder.run(
            self, batch, mask, room=max_new_tokens, cached=use_past_kv_cache, embeds=embeds
        )
        assert decoder.later is not None
        row_sources, device = decoder.later.row_sources, decoder.tokens.device
        usual = self.ends_of(row_sources, eos_token_id)
        ends = usual if stop_at_eos else [()] * len(row_sources)
        made = _Continued(
            decoder,
            ends,
            torch.tensor(self._fillers(usual, row_sources), device=device),
            torch.full((len(ends),), -1, device=device),
        )
        return made, self._steps(
            made, max_new_tokens, sampling, stops, generator, keep=output_logits
        )

    @torch.no_grad()
    def _steps(
        self: Any,
        made: _Continued,
        max_new_tokens: int,
        sampling: Sampling,
        stops: StopStrings | None,
        generator: torch.Generator | None,
        keep: bool,
    ) -> Iterator[None]:
        """Add one token to each row per step, until all rows are finished."""
        decoder, ends, lengths = made.decoder, made.ends, made.lengths
        device = lengths.device
        enders = sorted({end for row in ends for end in row})
        ended_by = torch.tensor([[e in row for row in ends] for e in enders], device=device)
        seen: Tensor | None = None
        if sampling.counts:
            real = torch.from_numpy(decoder.real).to(device).long()
            seen = count_tokens(decoder.tokens, real, self.arch.d_vocab)
        vocabularies, embed = self.vocabularies, decoder.step_mask[Component.EMBED, None]
        readable = torch.from_numpy(vocabularies.of_rows(embed)).to(device)
        watch = None if stops is None else _Watch(stops, self.to_string, decoder)
        for step in range(max_new_tokens):
            if keep:
                made.logits.append(decoder.logits)
            new = sampling.pick(decoder.logits, seen, generator)
            going = lengths < 0
            new = torch.where(going, new, made.filler)
            decoder.append(new)
            if seen is not None:
                seen.scatter_add_(1, new[:, None], going[:, None].long())
            over = torch.zeros_like(going)
            for end, rows in zip(enders, ended_by, strict=True):
                over |= (new == end) & rows
            if watch is not None:
                over |= watch.finished(going)
            last = step == max_new_tokens - 1
            if vocabularies.differ and not last:
                for row in torch.nonzero(going & ~over & (new >= readable))[:, 0].tolist():
                    sources = [s for s in embed.sources if embed.share(s)[row]]
                    position = decoder.batch.totals[row] + step
                    lacks = vocabularies.lacking(int(new[row]), sources, position)
                    tell(f"prompt {row} ends with the token generated last: {lacks}")
                    over[row] = True
            lengths.copy_(torch.where(going & over, step + 1, lengths))
            may_end = bool(enders or stops or vocabularies.differ)
            last = last or (may_end and bool((lengths >= 0).all()))
            yield
            if last:
                return
            decoder.step()

    def _texts(self: Any, input: Any, made: _Continued, new_only: bool) -> list[str]:
        """The text of each row, or only what was added to it."""
        batch, tokens = made.decoder.batch, made.decoder.tokens
        known: Any = [input] if isinstance(input, str | Prompt | Tokenized) else input
        items = batch.prompts if isinstance(input, Tensor | Batch) else known
        texts = []
        for i, (item, prompt, kept) in enumerate(
            zip(items, batch.prompts, made.kept(), strict=True)
        ):
            ids = tokens[i, batch.starts[i] :].tolist()
            own, added = ids[: len(prompt)], ids[len(prompt) :][:kept]
            if added and added[-1] in made.ends[i]:
                added = added[:-1]
            if made.decoder.embeds is not None:
                texts.append(self.to_string(added))
                continue
            new = self.added_text(own, added)
            text = item if isinstance(item, str) else prompt.text
            texts.append(new if new_only else (self.to_string(own) if text is None else text) + new)
        return texts

    def added_text(self: Any, prompt: Sequence[int], added: Sequence[int]) -> str:
        """What tokens add to the text of a prompt's own, without the prompt.

        Not what they give by themselves: a tokenizer may drop the space before a first word, and
        several tokens may make one character.
        """
        before, both = self.to_string([*prompt]), self.to_string([*prompt, *added])
        for known in (before, before.rstrip("\N{REPLACEMENT CHARACTER}")):
            if both.startswith(known):
                return str(both[len(known) :])
        return str(self.to_string([*added]))

    def ends_of(
        self: Any,
        row_sources: Sequence[Sequence[str]],
        given: int | Sequence[Any] | Tensor | None = None,
    ) -> list[tuple[int, ...]]:
        """The tokens that end each row: the ones given, or those of all sources that it runs."""
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


class _Watch:
    """Looks for stop strings in what a generation adds."""

    def __init__(
        self, stops: StopStrings, to_string: Callable[[list[int]], str], decoder: Decoder
    ) -> None:
        self.stops, self.to_string, self.decoder = stops, to_string, decoder
        self._known = self._now()

    def _now(self) -> list[str]:
        starts = self.decoder.batch.starts
        rows = self.decoder.tokens.tolist()
        if self.decoder.embeds is not None:  # the prompt has no text
            starts = (self.decoder.batch.real.shape[1],) * len(rows)
        return [self.to_string(row[start:]) for row, start in zip(rows, starts, strict=True)]

    def finished(self, going: Tensor) -> Tensor:
        """Which rows the tokens that were added last have finished."""
        before, self._known = self._known, self._now()
        found = [
            is_on and self.stops.completed(old, now)
            for is_on, old, now in zip(going.tolist(), before, self._known, strict=True)
        ]
        return torch.tensor(found, device=going.device)


def _pieces(steps: Any, made: _Continued, most: int) -> Iterator[Any]:
    """Tokens [batch, piece] as they come, `most` or more together; the prompts with the first."""
    handed, tokens = 0, None
    for _ in steps:
        tokens = made.decoder.tokens
        if tokens.shape[1] - handed >= most:
            yield tokens[:, handed:]
            handed = tokens.shape[1]
    if tokens is not None and handed < tokens.shape[1]:
        yield tokens[:, handed:]


def _beyond(told: Sequence[str], now: Sequence[str]) -> list[str]:
    return [text[len(known) :] for known, text in zip(told, now, strict=True)]
