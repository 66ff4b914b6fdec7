"""The trust report of a sweep's texts: would Hugging Face's model, swapped token by token, have
written them?

Some texts are read again by the sequential algorithm, and each of their tokens must be the one that
its logits give: the likeliest, or the one that the noise of (seed, prompt, sample, step) draws. Two
candidates that are closer than rounding may change places. Where a text goes on after such a step,
it is the recorded one whose next token is asked for, so that no step goes unchecked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftlens.graft import Graft
from graftlens.model.decoding import keeps
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.sampling import count_tokens
from graftlens.model.sequential import Sequential, SequentialError
from graftlens.outcomes.drawing import Drawing, draw_key, gumbels
from graftlens.prompts import Prompt, Tokenized, tokenize
from graftlens.sweep.trust import Report

#: Of the largest logit: candidates that are closer than this may change places.
MARGIN = 1e-4
#: Nats per token by which a recorded log-probability may differ.
NATS = 1e-3


@dataclass(frozen=True)
class TextCheck:
    """One text, read again by the sequential algorithm.

    Attributes:
        prompt, graft, sample: the text.
        steps: its tokens.
        close: how many of them another candidate was within rounding of.
        logprob: by how much the recorded log-probability differs, in nats.
        problems: what is beyond the margin.
    """

    prompt: int
    graft: str
    sample: int
    steps: int
    close: int
    logprob: float
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextReport(Report):
    """What was checked of a sweep's texts, and the outcome.

    Attributes:
        greedy: whether texts take the likeliest token at each step.
        margin: of the largest logit: what counts as rounding.
        texts: the texts that were read again.
        refused: reason -> number of texts that could not be generated for that reason.
    """

    greedy: bool
    margin: float
    texts: tuple[TextCheck, ...]
    refused: Mapping[str, int]

    def text(self) -> str:
        """The report as text, with problems first."""
        lines = self.head("trust report of texts", f"{self.rows} texts")
        if self.texts:
            what = "takes" if self.greedy else "draws with the same random numbers"
            steps = sum(text.steps for text in self.texts)
            close = sum(text.close for text in self.texts)
            worst = max(text.logprob for text in self.texts)
            lines.append(
                f"  random texts = what the sequential algorithm {what}: {steps} tokens of "
                f"{len(self.texts)} texts, {close} of them where two candidates are within "
                f"{self.margin:.1e} of the largest logit; log-probabilities differ by {worst:.1e} "
                "nats at most"
            )
        lines += [
            f"    prompt {t.prompt} under {t.graft!r}, sample {t.sample}: {t.steps} tokens"
            for t in self.texts
        ]
        lines.append(f"  could not be generated: {sum(self.refused.values())} texts")
        lines += [f"    {count} x {reason}" for reason, count in [*self.refused.items()][:10]]
        return "\n".join(lines)


def check_texts(
    model: GraftedTransformer,
    prompts: Mapping[int, Prompt],
    grafts: Mapping[str, Graft],
    texts: pd.DataFrame,
    drawing: Drawing,
    *,
    seed: int,
    count: int = 6,
    prepend_bos: bool | None = None,
) -> TextReport:
    """Check the texts of a finished sweep. A difference is reported, never raised.

    Args:
        model: the model that generated them.
        prompts, grafts: all that were asked for, by number and by name.
        texts: the table, as `read_texts` gives it.
        drawing: how they were generated.
        seed: which texts are read again.
        count: how many.
        prepend_bos: as the sweep was run.
    """
    problems = _incomplete(texts, prompts, grafts, drawing)
    drawn = _drawn(texts, grafts, count, seed)
    unchecked, sequential = "" if drawn else "no text was generated.", None
    try:
        sequential = Sequential(model) if drawn else None
    except SequentialError as error:
        unchecked = str(error)
    checks: list[TextCheck] = []
    margin = MARGIN
    if sequential is not None:
        bos = model.prepends_bos(prepend_bos)
        again = [(row, tokenize(prompts[row["prompt"]], model.tokenizer, bos)) for row in drawn]
        margin = _margin(model, sequential, [tokens for _, tokens in again])
        for row, tokens in again:
            name, sample = str(row["graft"]), int(row["sample"])
            try:
                graft = grafts[name]
                found = _read_again(model, sequential, tokens, graft, row, drawing, margin)
            except (
                Exception
            ) as error:  # the report shows it, and a sweep's end does not fail because of it
                found = 0, 0.0, (f"could not be read again: {error!r}.",)
            checks.append(TextCheck(row["prompt"], name, sample, len(row["tokens"]), *found))
    problems += [
        f"prompt {c.prompt} under {c.graft!r}, sample {c.sample}: {what}"
        for c in checks
        for what in c.problems
    ]
    reasons = texts["reason"].value_counts()
    return TextReport(
        rows=len(texts),
        greedy=not drawing.sampling.draws,
        margin=margin,
        texts=tuple(checks),
        refused={str(reason): int(n) for reason, n in reasons.items()},
        problems=tuple(problems),
        unchecked=unchecked,
    )


# -- the table ---------------------------------------------------------------------------------


def _incomplete(
    texts: pd.DataFrame,
    prompts: Mapping[int, Prompt],
    grafts: Mapping[str, Graft],
    drawing: Drawing,
) -> list[str]:
    """Texts that are missing or doubled, and rows that contradict themselves."""
    keys = pd.MultiIndex.from_frame(texts[["prompt", "graft", "sample"]])
    asked = pd.MultiIndex.from_product([list(prompts), list(grafts), range(drawing.n)])
    problems = []
    for what, odd in (
        ("missing", asked.difference(keys)),
        ("present more than once", keys[keys.duplicated()]),
        ("of no prompt, graft and sample that were requested", keys.difference(asked)),
    ):
        if len(odd):
            prompt, graft, sample = odd[0]
            problems.append(
                f"{len(odd)} text(s) are {what}, such as prompt {prompt} under {graft!r}, sample "
                f"{sample}."
            )
    there = texts["text"].notna()
    lengths = texts["tokens"].map(len, na_action="ignore")
    full = lengths == drawing.max_new_tokens
    for what, rows in (
        ("have neither a text nor a reason", ~there & texts["reason"].isna()),
        ("have a text and a reason", there & texts["reason"].notna()),
        ("are longer than max_new_tokens", lengths > drawing.max_new_tokens),
        ("end for their length before it", (texts["stop"] == "length") & ~full),
        ("end for no reason", there & texts["stop"].isna()),
    ):
        if rows.any():
            first = texts[rows].iloc[0]
            problems.append(
                f"{rows.sum()} text(s) {what}, such as prompt {first['prompt']} under "
                f"{first['graft']!r}, sample {first['sample']}."
            )
    return problems


def _drawn(
    texts: pd.DataFrame, grafts: Mapping[str, Graft], count: int, seed: int
) -> list[dict[str, Any]]:
    """Random texts of as many grafts as there are, those of one source throughout last."""
    rng = np.random.default_rng(seed)
    plain = {Graft(), *(Graft.rule(s) for graft in grafts.values() for s in graft.sources)}
    names = [list(grafts)[i] for i in rng.permutation(len(grafts))]
    there = np.flatnonzero(texts["text"].notna())
    of = texts["graft"].astype(str).to_numpy()[there]
    left = {
        name: rng.permutation(there[of == name]).tolist()
        for name in sorted(names, key=lambda name: grafts[name] in plain)
    }
    found: list[dict[str, Any]] = []
    while len(found) < count and any(left.values()):
        for rows in left.values():
            if rows and len(found) < count:
                found.append(texts.iloc[rows.pop()].to_dict())
    return found


# -- comparing ---------------------------------------------------------------------------------


def _margin(
    model: GraftedTransformer, sequential: Sequential, prompts: Sequence[Tokenized]
) -> float:
    """What counts as rounding, of the largest logit: more than `MARGIN` in half precision alone."""
    eps = torch.finfo(model.cfg.dtype).eps
    if eps < 1e-6:
        return MARGIN
    noise = [MARGIN, 2 * eps]
    for tokens in prompts[:3]:
        for source in model.sources:
            once = sequential.whole(tokens, source)[-1].float()
            again = sequential.logits(tokens, Graft.rule(source))[-1].float()
            difference = (once - again).masked_fill(once == again, 0.0)
            noise.append(5 * float(difference.abs().max()) / _size(once))
    return max(noise)


def _read_again(
    model: GraftedTransformer,
    sequential: Sequential,
    tokens: Tokenized,
    graft: Graft,
    row: Mapping[str, Any],
    drawing: Drawing,
    margin: float,
) -> tuple[int, float, tuple[str, ...]]:
    """How many steps were close, the difference of the log-probability, and what is wrong."""
    chosen = [int(token) for token in row["tokens"]]
    generating, first = tokens.generating(), len(tokens) - 1
    if keeps(model.arch, len(tokens) + drawing.max_new_tokens):
        at = range(first, first + len(chosen))
        logits = sequential.logits(generating, graft, chosen[:-1], at=at, by_run=True)
    else:  # every step reads with the rotary tables of its own length
        steps = [
            sequential.logits(generating, graft, chosen[:step], at=[first + step])
            for step in range(len(chosen))
        ]
        logits = torch.cat(steps)
    logits = logits.float().cpu()
    problems: list[str] = []
    close = 0
    key = draw_key(drawing.seed, tokens.ids, int(row["sample"]))
    for step, token in enumerate(chosen):
        before = torch.tensor([[*tokens.ids, *chosen[:step]]])
        seen = count_tokens(before, torch.ones_like(before), logits.shape[1])
        scores, certain, possible, allowed = _candidates(logits[step], seen, drawing, margin)
        if drawing.sampling.draws:
            scores = scores + gumbels([key], step, logits.shape[1], "cpu")[0]
        best = float(scores[certain].max())
        theirs = int(scores.masked_fill(~certain, -torch.inf).argmax())
        close += int((scores[possible] >= best - allowed).sum()) > 1
        if not possible[token] or not float(scores[token]) >= best - allowed:
            problems.append(
                f"token {step + 1} is {model.to_single_str_token(token)!r}, the sequential "
                f"algorithm has {model.to_single_str_token(theirs)!r} there."
            )
            break  # what follows follows from another text
    gained = logits.double().log_softmax(-1).gather(1, torch.tensor(chosen)[:, None])
    difference = abs(float(gained.sum()) - float(row["logprob"]))
    half = torch.finfo(model.cfg.dtype).eps > 1e-6
    nats = max(NATS, margin * _size(logits) / (1 if half else 10))
    if not difference <= nats * len(chosen):
        problems.append(
            f"its log-probability is {row['logprob']:.6g}, Hugging Face gives "
            f"{float(gained.sum()):.6g}."
        )
    return close, difference, (*problems, *_badly_ended(model, tokens, graft, row, chosen, drawing))


def _candidates(
    logits: Float[Tensor, " d_vocab"],
    seen: Tensor,
    drawing: Drawing,
    margin: float,
) -> tuple[Float[Tensor, " d_vocab"], Bool[Tensor, " d_vocab"], Bool[Tensor, " d_vocab"], float]:
    """What a token is drawn from.

    Returns:
        The scores of all tokens, top-k and top-p aside; which tokens are certainly among those that
        are drawn from, and which possibly, if every logit may be off by rounding; and how much
        rounding is in the scores.
    """
    sampling = drawing.sampling
    scores = replace(sampling, top_k=None, top_p=None).scores(logits[None], seen)[0].double()
    steepest = max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)
    allowed = margin * _size(logits) * steepest / (sampling.temperature or 1.0)
    there = ~scores.isneginf()
    if not sampling.draws or (sampling.top_k is None and sampling.top_p is None):
        return scores, there, there, allowed
    ordered, order = scores.sort(descending=True)
    likeliest = ordered.softmax(-1).cumsum(-1).clamp(max=1.0)
    mass = torch.cat([torch.zeros(1, dtype=torch.double), likeliest])
    # Of each token: how many are certainly likelier, and how many at most may be.
    ascending = ordered.flip(0)
    size = len(ordered)
    surely = size - torch.searchsorted(ascending, ordered + allowed, right=True)
    perhaps = size - torch.searchsorted(ascending, ordered - allowed, right=False)
    if sampling.top_k is not None:
        least, most, limit = surely + 1, perhaps, min(sampling.top_k, size)
        kept = most <= limit, least <= limit
    else:
        assert sampling.top_p is not None
        factor = float(np.exp(2 * allowed))
        own = ordered.softmax(-1)
        low, high = mass[surely] / factor, (mass[perhaps] - own).clamp(min=0.0) * factor
        kept = high <= sampling.top_p - 1e-6, low <= sampling.top_p + 1e-6
        kept[0][0] = True  # the likeliest is never left out
    certain, possible = (torch.empty_like(there).index_put((order,), those) for those in kept)
    if not bool((certain & there).any()):
        certain = scores >= float(ordered[0])
    return scores, certain & there, possible & there, allowed


def _badly_ended(
    model: GraftedTransformer,
    tokens: Tokenized,
    graft: Graft,
    row: Mapping[str, Any],
    chosen: Sequence[int],
    drawing: Drawing,
) -> list[str]:
    """What is wrong with the text that the tokens make, and with its end."""
    ran = {model.sources[0], *graft.sources}
    every = [set(model.ends_of([[source]])[0]) for source in sorted(ran)]
    any_end, all_ends = set.union(*every), set.intersection(*every)
    problems = []
    if set(chosen[:-1]) & all_ends:
        problems.append("it goes on after an end token.")
    if row["stop"] == "end" and chosen[-1] not in any_end:
        problems.append("it ends at a token that is not an end token of its sources.")
    said = model.added_text(tokens.ids, chosen[:-1] if row["stop"] == "end" else chosen)
    if said != row["text"]:
        problems.append(f"its tokens say {said[:60]!r}, it says {str(row['text'])[:60]!r}.")
    stopped = any(stop in said for stop in drawing.stop_strings)
    if row["stop"] == "stop" and not stopped:
        problems.append("no stop string is in it, but it ends at one.")
    return problems


def _size(logits: Float[Tensor, "*pos d_vocab"]) -> float:
    """The largest logit, without regard to its sign or to tokens that a source lacks."""
    return float(logits.masked_fill(logits.isneginf(), 0.0).abs().max())
