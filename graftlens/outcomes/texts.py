"""Many texts under many grafts: prompts × grafts × samples → one table, a row each."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from graftlens.components import Component
from graftlens.graft import Graft, Grafts, named_grafts
from graftlens.memory import (
    ENOUGH_ROWS,
    LOGITS,
    affordable_cache,
    free_memory,
    out_of_memory,
)
from graftlens.model.decoding import Decoder, keeps, left_padded, with_one_more
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import Batch, collate
from graftlens.model.mask import silenced
from graftlens.model.sampling import count_tokens
from graftlens.outcomes.drawing import Drawing, draw_key, gumbels
from graftlens.outcomes.prefill import Ready, prefilled
from graftlens.planner import Planner
from graftlens.prompts import Prompt, PromptError, Tokenized, dated, doubled_bos, tokenize
from graftlens.references import References, marked, warn_of_reasons

#: The columns of a table of texts, without those that name its references.
COLUMNS = (
    *("prompt", "graft", "rule", "template", "prompt_text", "answer", "answers", "sample"),
    *("text", "tokens", "logprob", "stop", "reason"),
)

#: Rows leave a batch once so many of them are finished.
LEAVE = 1 / 8

#: Anything that texts can be generated from.
Given = Prompt | str | Tokenized


@dataclass(eq=False)
class _Text:
    """One text, as far as it is generated."""

    ready: Ready
    graft: int
    sample: int
    key: int
    ends: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    stop: str | None = None
    reason: str | None = None
    text: str | None = None


class Sampler:
    """Generates texts under one set of grafts; what prompts share is planned once.

    Example:
        >>> sampler = Sampler(model, {"PRE": Graft(), "SFT": Graft.rule("sft")}, Drawing(n=8))
        >>> table = sampler.table(dict(enumerate(prompts)))
    """

    def __init__(
        self,
        model: GraftedTransformer,
        grafts: Mapping[str, Graft],
        drawing: Drawing,
        *,
        prepend_bos: bool | None = None,
        token_budget: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """As `sample`; `say` gets the message about memory running out.

        Raises:
            ValueError: a graft that the model cannot run, no graft at all, or hooks on the model.
        """
        if not grafts:
            raise ValueError("no grafts: give at least one.")
        if token_budget is not None and token_budget < 1:
            raise ValueError(
                f"token_budget={token_budget}: write a number from 1, or leave it out."
            )
        self.model, self.grafts, self.drawing, self.say = model, dict(grafts), drawing, say
        self._given = [*self.grafts.values()]
        self._bos = model.prepends_bos(prepend_bos)
        self._planner = Planner(
            model.arch,
            model.sources,
            self._given,
            model.equal_sources,
            rotary=model.rotary,
            vocabularies=model.vocabularies,
            goes_on=True,
        )
        device, dtype = model.cfg.device, model.cfg.dtype
        self.budget = token_budget or affordable_cache(model.arch, device, dtype)
        self._most_rows = ENOUGH_ROWS.get(torch.device(device).type, ENOUGH_ROWS["cpu"])

    def table(
        self,
        prompts: Mapping[int, Given],
        advance: Callable[[int], object] = lambda texts: None,
        *,
        strict: bool = False,
    ) -> pd.DataFrame:
        """One row per (prompt, graft, sample), in their order, with `COLUMNS`.

        Args:
            prompts: number -> prompt.
            advance: told how many texts are finished.
            strict: refuse a graft that no prompt can run.

        Raises:
            ValueError: with `strict`, such a graft; nothing has run then.
        """
        ready, unready = self._ready(prompts)
        if strict and ready:
            self._refuse_idle(ready)
        texts = [
            _Text(one, graft, sample, draw_key(self.drawing.seed, one.tokens.ids, sample))
            for one in ready
            for graft in range(len(self._given))
            if graft not in one.reasons
            for sample in range(self.drawing.n)
        ]
        each = len(self._given) * self.drawing.n
        advance(each * len(prompts) - len(texts))
        # Prompts of one length waste no padding, and those of one structure share a plan.
        texts.sort(key=lambda text: len(text.ready.tokens))
        # Texts that cross a limit of rotary tables are computed again at every step, by graft.
        kept = [keeps(self.model.arch, self._longest(text)) for text in texts]
        again = self._by_graft(text for text, keep in zip(texts, kept, strict=True) if not keep)
        for some in ([text for text, keep in zip(texts, kept, strict=True) if keep], *again):
            self._run(some, advance)
        return self._frame(prompts, texts, {r.number: r.reasons for r in ready}, unready)

    # -- what to run -------------------------------------------------------------------------

    def _longest(self, text: _Text) -> int:
        return len(text.ready.tokens) + self.drawing.max_new_tokens

    def _by_graft(self, texts: Iterator[_Text]) -> list[list[_Text]]:
        found: dict[int, list[_Text]] = {}
        for text in texts:
            found.setdefault(text.graft, []).append(text)
        return [*found.values()]

    def _ready(self, prompts: Mapping[int, Given]) -> tuple[list[Ready], dict[int, str]]:
        """The prompts that can be run, and for the others, why not."""
        ready, unready, arch = list[Ready](), dict[int, str](), self.model.arch
        new = self.drawing.max_new_tokens
        for number, prompt in prompts.items():
            try:
                tokens = self._tokens(prompt).generating()
            except PromptError as error:
                unready[number] = str(error)
                continue
            # The last new token is not read.
            if arch.rotary_dim == 0 and len(tokens) + new - 1 > arch.n_ctx:
                unready[number] = (
                    f"a prompt of {len(tokens)} tokens and {new} new ones are more than the "
                    f"model's context of {arch.n_ctx}. Shorten it, or ask for fewer "
                    "(max_new_tokens)."
                )
            elif max(tokens.ids) >= arch.d_vocab:
                unready[number] = (
                    f"the tokenizer gives token id {max(tokens.ids)}, but the model's vocabulary "
                    f"ends at {arch.d_vocab - 1}."
                )
            else:
                ready.append(Ready.of(number, tokens, self._planner, arch.rope_limit))
        return ready, unready

    def _tokens(self, prompt: Given) -> Tokenized:
        if isinstance(prompt, Tokenized):
            return prompt
        return tokenize(prompt, self.model.tokenizer, self._bos)

    def _refuse_idle(self, ready: Sequence[Ready]) -> None:
        for number, (name, graft) in enumerate(self.grafts.items()):
            if any(number not in one.reasons for one in ready):
                continue
            if not all(silenced(graft, one.tokens) for one in ready):
                raise ValueError(
                    f"graft {name!r} can be run on none of {len(ready)} prompts: "
                    f"{ready[0].reasons[number]}"
                )

    def _run(self, texts: Sequence[_Text], advance: Callable[[int], object]) -> None:
        """Generate in batches; if memory runs out, the budget is halved and the batch is divided
        again."""
        waiting = list(texts)
        while waiting:
            batch = waiting[: self._fitting(waiting)]
            try:
                self._generate(batch)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                held = sum(map(self._longest, batch))
                self.budget = max(1, min(self.budget, held) // 2)
            else:
                advance(len(batch))
                waiting = waiting[len(batch) :]
                continue
            # Outside the handler, so that the error's frames no longer hold the tensors.
            free_memory(self.model.cfg.device)
            for text in batch:
                text.tokens, text.logprob, text.stop, text.reason = [], 0.0, None, None
            self.say(f"Memory ran out: continuing with at most {self.budget} cached tokens.")

    def _fitting(self, waiting: Sequence[_Text]) -> int:
        """How many of the texts that wait make a batch: one or more."""
        most = max(1, LOGITS // self.model.arch.d_vocab)
        count = widest = 0
        for text in waiting[:most]:
            widest = max(widest, self._longest(text))
            if count and (count + 1) * widest > self.budget:
                break
            count += 1
        return count

    # -- running -----------------------------------------------------------------------------

    @torch.no_grad()
    def _generate(self, texts: Sequence[_Text]) -> None:
        model, drawing, sampling = self.model, self.drawing, self.drawing.sampling
        decoder = self._started(texts)
        for text, ends in zip(texts, self._ends(texts), strict=True):
            text.ends = ends
        seen: Int[Tensor, "row d_vocab"] | None = None
        if sampling.counts:
            real = torch.from_numpy(decoder.real).to(decoder.tokens.device).long()
            seen = count_tokens(decoder.tokens, real, model.arch.d_vocab)
        said = [""] * len(texts)
        going = list(texts)
        for step in range(drawing.max_new_tokens):
            logits = decoder.logits
            logits = logits if logits.element_size() >= 4 else logits.float()
            scores = sampling.scores(logits, seen)
            if sampling.draws:
                keys = [text.key for text in going]
                noise = gumbels(keys, step, model.arch.d_vocab, logits.device)
                scores = scores + noise.to(scores.dtype)
            new = scores.argmax(-1)
            gained = logits.log_softmax(-1).gather(1, new[:, None])[:, 0]
            self._take(going, new, gained, self._readable(decoder))
            if drawing.stops is not None:
                said = self._watched(going, said)
            last = step == drawing.max_new_tokens - 1
            for text in going:
                text.stop = text.stop or ("length" if last else None)
            on = np.array([i for i, text in enumerate(going) if text.stop is None], dtype=np.int64)
            if not len(on):
                break
            decoder.append(new)
            if seen is not None:
                seen.scatter_add_(1, new[:, None], torch.ones_like(new[:, None]))
            if len(going) - len(on) >= LEAVE * len(going):
                decoder.take(on)
                going, said = [going[i] for i in on], [said[i] for i in on]
                seen = None if seen is None else seen[torch.from_numpy(on).to(seen.device)]
            decoder.step()
        for text in texts:
            if text.reason is None:
                text.text = self._said(text, without_end=True)

    def _started(self, texts: Sequence[_Text]) -> Decoder:
        room = self.drawing.max_new_tokens
        rows = [(text.ready, text.graft) for text in texts]
        if all(keeps(self.model.arch, self._longest(text)) for text in texts):
            return prefilled(self.model, self._planner, rows, room, self._most_rows)
        batch = left_padded(self._batch(texts), self.model.pad_id())
        mask = self.model.resolve(self._given[texts[0].graft], batch)
        return Decoder.run(self.model, batch, mask, room=room)

    def _batch(self, texts: Sequence[_Text]) -> Batch:
        prompts = [text.ready.tokens for text in texts]
        device = self.model.cfg.device
        return collate(prompts, pad_id=self.model.pad_id(), side="left", device=device)

    def _ends(self, texts: Sequence[_Text]) -> list[frozenset[int]]:
        """The tokens that end each text: those of all sources that it runs."""
        model = self.model
        known = model.ends_of([[source] for source in model.sources])
        if len({frozenset(ends) for ends in known}) == 1:
            return [frozenset(known[0])] * len(texts)
        of: dict[tuple[int, int], frozenset[int]] = {}
        for some in self._by_graft(iter(texts)):
            each = [*{text.ready.number: text for text in some}.values()]
            later = model.resolve(self._given[some[0].graft], with_one_more(self._batch(each)))
            for text, ends in zip(each, model.ends_of(later.row_sources), strict=True):
                of[text.ready.number, text.graft] = frozenset(ends)
        return [of[text.ready.number, text.graft] for text in texts]

    def _readable(self, decoder: Decoder) -> Int[np.ndarray, " row"] | None:
        """How many tokens the embedding that reads each row's new token has; None if all do."""
        vocabularies = self.model.vocabularies
        if not vocabularies.differ:
            return None
        return vocabularies.of_rows(decoder.step_mask[Component.EMBED, None])

    def _take(
        self,
        going: Sequence[_Text],
        new: Int[Tensor, " row"],
        gained: Float[Tensor, " row"],
        readable: Int[np.ndarray, " row"] | None,
    ) -> None:
        """Add each row's new token to its text."""
        both = torch.stack([new.double(), gained.double()]).cpu().numpy()
        for row, (text, token, logprob) in enumerate(
            zip(going, both[0].astype(np.int64).tolist(), both[1].tolist(), strict=True)
        ):
            if text.stop is not None:
                continue
            if logprob != logprob:
                text.stop = "reason"
                text.reason = (
                    f"the logits are not finite in {self.model.cfg.dtype}: weights or activations "
                    "overflow. Try a wider dtype."
                )
                continue
            text.tokens.append(token)
            text.logprob += logprob
            if token in text.ends:
                text.stop = "end"
            elif (
                readable is not None
                and token >= readable[row]
                and len(text.tokens) < self.drawing.max_new_tokens  # the last one is not read
            ):
                text.stop = "unreadable"

    def _watched(self, going: Sequence[_Text], before: Sequence[str]) -> list[str]:
        """What each row says now; those that a stop string ends are finished."""
        stops, now = self.drawing.stops, list(before)
        assert stops is not None
        for row, text in enumerate(going):
            if text.stop in (None, "unreadable"):
                now[row] = self._said(text)
                if stops.completed(before[row], now[row]):
                    text.stop = "stop"
        return now

    def _said(self, text: _Text, without_end: bool = False) -> str:
        tokens = text.tokens[:-1] if without_end and text.stop == "end" else text.tokens
        return str(self.model.added_text(text.ready.tokens.ids, tokens))

    # -- the table ---------------------------------------------------------------------------

    def _frame(
        self,
        prompts: Mapping[int, Given],
        texts: Sequence[_Text],
        failing: Mapping[int, Mapping[int, str]],
        unready: Mapping[int, str],
    ) -> pd.DataFrame:
        made = {(text.ready.number, text.graft, text.sample): text for text in texts}
        rows: list[dict[str, Any]] = []
        for number, prompt in prompts.items():
            given = prompt if isinstance(prompt, Prompt) else None
            about = {
                "template": given and (given.name or given.template),
                "prompt_text": self._prompt_text(prompt),
                "answer": given and given.answer,
                "answers": right_of(given),
            }
            for graft, (name, rule) in enumerate(self.grafts.items()):
                for sample in range(self.drawing.n):
                    row: dict[str, Any] = {
                        "prompt": number,
                        "graft": name,
                        "rule": str(rule),
                    } | about
                    text = made.get((number, graft, sample))
                    ran = text is not None and text.reason is None
                    row |= {
                        "sample": sample,
                        "text": text.text if text and ran else None,
                        "tokens": text.tokens if text and ran else None,
                        "logprob": text.logprob if text and ran else np.nan,
                        "stop": text.stop if text and ran else None,
                        "reason": text.reason
                        if text
                        else unready.get(number) or failing[number][graft],
                    }
                    rows.append(row)
        table = pd.DataFrame(rows, columns=[*COLUMNS])
        kept = ("template", "prompt_text", "answer", "text", "tokens", "stop", "reason")
        for column in kept:
            values = table[column].astype(object)
            table[column] = values.where(values.notna(), None)
        return table

    def _prompt_text(self, prompt: Given) -> str | None:
        if isinstance(prompt, Tokenized):
            return prompt.text
        return prompt.text if isinstance(prompt, Prompt) else prompt


def right_of(prompt: Prompt | None) -> list[str]:
    """The texts that are right after a prompt."""
    if prompt is None:
        return []
    return [*dict.fromkeys(filter(None, (prompt.answer, *prompt.answers)))]


def sample(
    model: GraftedTransformer,
    prompts: Given | Sequence[Given],
    grafts: Grafts,
    *,
    n: int = 1,
    max_new_tokens: int = 60,
    temperature: float | int = 1.0,
    top_p: float | int | None = None,
    top_k: int | None = None,
    repetition_penalty: float | int = 1.0,
    stop_strings: str | Sequence[str] = (),
    seed: int = 0,
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Generate texts from every prompt under every graft.

    Where a graft reaches is said by spans of the whole run: `prompt` is all given tokens,
    `generated` those that follow from the first new one on, `last` each position that is generated
    from, the prompt's own last included, `all` everything. In a chat `assistant` includes what is
    generated. All other spans, and numbers, are of the prompt.

    The base (PRE) and the full run (SFT), which rates are compared with, are generated as well if
    they are not among the grafts. Rows that grafts and samples of a prompt share are computed once.

    Args:
        model: the model; it needs a tokenizer.
        prompts: one or more prompts or texts.
        grafts: name -> graft, or one or more grafts, which are keyed by their text.
        n: texts of each prompt and graft.
        max_new_tokens: most tokens of a text.
        temperature: divides the logits; 0 takes the likeliest token at each step.
        top_p: draw from the likeliest tokens whose probabilities add up to this or more.
        top_k: draw from the k likeliest tokens only.
        repetition_penalty: of tokens that appeared, positive logits are divided and negative ones
            multiplied by it.
        stop_strings: texts that end a text once a new token completes one of them.
        seed: of the random numbers, which depend on (seed, the prompt's tokens, sample, step)
            alone: grafts are compared on equal draws.
        full: the run that counts as SFT, as in `evaluate`.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        token_budget: most tokens, of prompts and texts together, whose keys and values are kept at
            a time; None is what the machine's memory allows. It is halved when memory runs out.
        progress: whether to show a progress bar.

    Returns:
        One row per (prompt, graft, sample), with columns `prompt` (its number), `graft`, `rule`,
        `base_run` and `full_run` (the names of the two reference runs), `template`, `prompt_text`,
        `answer` (of a `Prompt`), `answers` (all that are right), `sample`, `text` (what was added,
        without its end token), `tokens` (its token ids, the end token included), `logprob` (of
        these tokens together, in nats, under the graft at temperature 1, before any penalty),
        `stop` (`end`: an end token of a source
        that ran; `stop`: a stop string; `length`: `max_new_tokens`; `unreadable`: a token that a
        source used there has no embedding for), and `reason`: why the prompt could not be run,
        where all others are NA.

    Raises:
        ValueError: no prompts or grafts; an option outside its range; a graft that the model cannot
            run, or that fails on every prompt (such as a misspelt span).
    """
    given = [prompts] if isinstance(prompts, Prompt | str | Tokenized) else list(prompts)
    parsed = named_grafts(grafts)
    if not given or not parsed:
        raise ValueError(
            f"{len(given)} prompts and {len(parsed)} grafts: give one or more of each."
        )
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so texts cannot be written. Load one with it."
        )
    stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    drawing = Drawing(n, max_new_tokens, temperature, top_p, top_k, repetition_penalty, stops, seed)
    runs = References.of(parsed, model.sources, full)
    bos = doubled_bos(given, model.tokenizer, model.prepends_bos(prepend_bos))
    for note in filter(None, (bos, dated(given, model.tokenizer))):
        warnings.warn(note, stacklevel=2)
    sampler = Sampler(
        model, runs.grafts, drawing, prepend_bos=prepend_bos, token_budget=token_budget
    )
    total = len(given) * len(runs.grafts) * n
    with tqdm(total=total, desc="texts", unit="text", disable=not progress) as bar:
        table = sampler.table(dict(enumerate(given)), bar.update, strict=True)
    warn_of_reasons(table, "texts could not be generated")
    return marked(table, runs.base, runs.full)
