"""The trust report of a sweep: is its table complete, and do its numbers agree with Hugging Face's?

The records are compared with Hugging Face's own forward pass for each source by itself, and with
the sequential algorithm for random cells. The same cells in other batches give the noise floor:
no difference below it means anything.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftlens.graft import Graft
from graftlens.metrics import Measure, Predictions, is_own, measures
from graftlens.model.differences import Difference
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import collate
from graftlens.model.sequential import Sequential, SequentialError
from graftlens.prompts import Prompt, PromptError
from graftlens.sweep.disk import sealed_json
from graftlens.sweep.prepared import Extent, Prepared, Scored
from graftlens.sweep.scoring import score

#: The smallest number that float32 holds in full precision.
TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Rounding:
    """How much the same numbers differ in another shape of the computation, and how much is
    allowed.

    Attributes:
        cells: how many were scored again: alone, in reverse order, in small batches.
        nats: the largest difference of a log-probability between those; of one beyond 100 nats,
            in proportion to 100.
        hf_nats, hf_logits: Hugging Face's own, in one pass and token by token, of log-probabilities
            and of logits relative to the largest.
        bound_nats, bound_logits: the largest differences that count as rounding, for each token,
            in nats and relative to the largest logit. Where logits are large, as an amplifying
            graft makes them, a tenth of `bound_logits` of the largest is allowed in nats.
    """

    cells: int
    nats: float
    hf_nats: float
    hf_logits: float
    bound_nats: float = 1e-3
    bound_logits: float = 1e-4

    def nats_for(self, largest: float) -> float:
        """The largest difference in nats that counts as rounding among logits of this size."""
        return max(self.bound_nats, self.bound_logits * largest / 10)


@dataclass(frozen=True)
class Check:
    """One cell recomputed with Hugging Face's model.

    Attributes:
        prompt, graft: the cell.
        recorded: whether the table has it; else it was scored for the check.
        differences: measure -> absolute difference in nats; `logits` is that of the model's plain
            forward, relative to the largest logit.
        ranks: the target's rank as recorded and as recomputed; None where none is recorded.
        problems: what is beyond the bound.
    """

    prompt: int
    graft: str
    recorded: bool
    differences: Mapping[str, float]
    ranks: tuple[int, int] | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """Cells that could not be run for one reason, with one of them."""

    reason: str
    count: int
    prompt: int
    graft: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was checked of one of a sweep's tables, and the outcome.

    Attributes:
        rows: rows of the table, also those without numbers.
        problems: everything that is wrong, each with a row.
        unchecked: why nothing was computed again; empty if something was.
    """

    rows: int
    problems: tuple[str, ...]
    unchecked: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; this does not cover what was not checked (`unchecked`)."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}

    def head(self, what: str, about: str) -> list[str]:
        """The first lines of the report's text: `what` it is of, the verdict, problems first."""
        verdict = "ok" if self.ok else f"NOT OK, {len(self.problems)} problem(s)"
        lines = [f"{what}: {verdict} ({about})"]
        lines += [f"  !! {problem}" for problem in self.problems]
        if self.unchecked:
            lines.append(f"  NOT CHECKED against Hugging Face: {self.unchecked}")
        return lines


@dataclass(frozen=True, kw_only=True)
class TrustReport(Report):
    """What was checked of a sweep's cells, and the outcome.

    Attributes:
        dtype, device: what the model ran in and on.
        seed: which cells were drawn.
        rounding: the noise floor and the bounds; None where nothing could be run.
        sources: prompts under one source throughout, against its own forward pass.
        cells: random cells, against the sequential algorithm.
        refused: reasons for cells without numbers, the most common first.
        differences: how the sources differ from the base, and what was done about it.
    """

    dtype: str
    device: str
    seed: int
    rounding: Rounding | None
    sources: tuple[Check, ...]
    cells: tuple[Check, ...]
    refused: tuple[Refused, ...]
    differences: tuple[Difference, ...] = ()

    def text(self) -> str:
        """The report as text, with problems first."""
        lines = self.head("trust report", f"{self.rows} rows, {self.dtype} on {self.device}")
        if (r := self.rounding) is not None:
            lines.append(
                f"  rounding: up to {r.bound_nats:.1e} nats per token and {r.bound_logits:.1e} of "
                f"the largest logit are allowed; {r.cells} cells in other batches differ by "
                f"{r.nats:.1e} nats, Hugging Face with and without its cache by {r.hf_nats:.1e} "
                f"nats and {r.hf_logits:.1e} of the largest logit"
            )
        if self.sources:
            lines.append("  one source throughout = Hugging Face's own forward pass, at worst:")
            for name in dict.fromkeys(c.graft for c in self.sources):
                lines.append(f"    {name}: {_worst([c for c in self.sources if c.graft == name])}")
        if self.cells:
            lines.append(f"  random cells = the sequential algorithm: {_worst(self.cells)}")
        for c in self.cells:
            ranks = "" if c.ranks is None else ", rank {} and {}".format(*c.ranks)
            lines.append(f"    prompt {c.prompt} under {c.graft!r}: {_worst([c])}{ranks}")
        if self.differences:
            lines.append("  how the sources differ, and what was done about it:")
            lines += [f"    {d.source}: {d.key}: {d.handling}, {d.done}" for d in self.differences]
        lines.append(f"  could not be run: {sum(r.count for r in self.refused)} cells")
        lines += [
            f"    {r.count} x {r.reason} (prompt {r.prompt} under {r.graft!r})"
            for r in self.refused[:10]
        ]
        if len(self.refused) > 10:
            lines.append(f"    and {len(self.refused) - 10} more reasons")
        return "\n".join(lines)


def trust_report(
    model: GraftedTransformer,
    prompts: Mapping[int, Prompt],
    grafts: Mapping[str, Graft],
    results: pd.DataFrame,
    *,
    seed: int,
    cells: int = 6,
    row_budget: int | None = None,
    prepend_bos: bool | None = None,
    answers: Extent = "whole",
    prepared: Prepared | None = None,
    references: Mapping[str, Graft] | None = None,
    asked: Sequence[Measure] = (),
) -> TrustReport:
    """Check a finished sweep. A difference is reported, never raised.

    Args:
        model: the model that the sweep ran.
        prompts, grafts: all that were asked for, by number and by name.
        results: the sweep's table with `prompt` and `graft`; of the other columns of `score`, those
            that it lacks are not checked, and neither is a number that is NA.
        seed: which cells are drawn.
        cells: how many cells are computed again by the sequential algorithm.
        row_budget, prepend_bos, answers: as the sweep was run.
        prepared: the prompts' tokens, if they are there.
        references: the `base` and the `full` run, if measures compare with these.
        asked: the measures besides those of every table, of which the user's own are checked too.
    """
    own = [m for m in asked if is_own(m)]
    prepend_bos = model.prepends_bos(prepend_bos)
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "answers": answers}
    results = results.reset_index(drop=True)
    numbers, names = list(prompts), list(grafts)
    rows, problems = _places(results, numbers, names)
    problems += _contradictions(results, prompts, grafts)
    reasons = results.get("reason", pd.Series(index=results.index, dtype=object))
    ran = (rows >= 0) & np.append(reasons.isna().to_numpy(bool), False)[rows]

    ready = prepared or Prepared(model.tokenizer, model.arch, prepend_bos, answers)

    def scored(number: int) -> Scored | None:
        try:
            whole = ready(number, prompts[number])
        except PromptError:
            return None
        # Rotary tables may depend on what follows the prompt, so it must be what was run.
        return replace(whole, answer=whole.continuations(answers, "first")[0])

    drawn = [
        (s, name)
        for number, name in _draw(ran, numbers, grafts, cells, seed, scored)
        if (s := scored(number)) is not None
    ]
    few = list({s.number: s for s, _ in drawn}.values())[:3]
    some = {name: grafts[name] for name in list(dict.fromkeys(name for _, name in drawn))[:4]}
    unchecked, sequential = "" if drawn else "no cell has numbers.", None
    try:
        sequential = Sequential(model) if drawn else None
    except SequentialError as error:
        unchecked = str(error)
    rounding = _rounding(model, sequential, few, some, row_budget, options) if drawn else None

    def check(s: Scored, name: str, graft: Graft, source: str | None = None) -> Check:
        """One cell, by one source's plain forward pass or by the sequential algorithm."""
        assert sequential is not None
        assert rounding is not None
        recorded = False
        if grafts.get(name) == graft:
            place = numbers.index(s.number), names.index(name)
            recorded = bool(ran[place])
        if recorded:
            record = results.iloc[int(rows[place])].to_dict()
        else:
            table = score(model, {s.number: s.prompt}, {name: graft}, **options)
            record = table.iloc[0].to_dict()
        try:
            found = _compared(
                model, sequential, s, graft, record, rounding, source, references or {}, own
            )
        except (
            Exception
        ) as error:  # the report shows it, and a sweep's end does not fail because of it
            found = {}, None, (f"could not be recomputed: {error!r}.",)
        return Check(s.number, name, recorded, *found)

    alone: list[Check] = []
    again: list[Check] = []
    if rounding is not None and not rounding.nats <= rounding.bound_nats:
        problems.append(f"cells differ by {rounding.nats:.1e} nats between batches.")
    if sequential is not None:
        for i, source in enumerate(model.sources):
            same = (Graft.rule(source), *([Graft()] if i == 0 else []))
            throughout = {name: graft for name, graft in grafts.items() if graft in same}
            for name, graft in (throughout or {f"{source} @ all": same[0]}).items():
                alone += [check(s, name, graft, source) for s in few if _reads(model, s, graft)]
        again = [check(s, name, grafts[name]) for s, name in drawn]
    problems += [
        f"prompt {c.prompt} under {c.graft!r}: {p}" for c in alone + again for p in c.problems
    ]
    return TrustReport(
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        device=str(model.cfg.device),
        seed=seed,
        rows=len(results),
        rounding=rounding,
        sources=tuple(alone),
        cells=tuple(again),
        refused=_refused(results, reasons),
        problems=tuple(dict.fromkeys(problems)),
        unchecked=unchecked,
        differences=model.told_differences,
    )


def trust_content(
    reports: Sequence[Any], members: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """The content of ``trust.json``, and the report's text: one report, or one of each member.

    Args:
        reports: of each member, the report of its cells and that of its texts, where there are any.
        members: their names; none where there is one report.
    """

    def plain(report: Any) -> dict[str, Any]:
        return {name: value for name, value in report.to_dict().items() if name != "ok"}

    contents, texts, passed = [], [], []
    for cells, written in reports:
        content = {} if cells is None else plain(cells)
        contents.append(content | ({} if written is None else {"texts": plain(written)}))
        there = [one for one in (cells, written) if one is not None]
        texts.append("\n".join(one.text() for one in there))
        passed.append(all(one.ok for one in there))
    if not members:
        return {"ok": passed[0]} | sealed_json(contents[0] | {"text": texts[0]}), texts[0]
    text = "\n".join(f"{name}: {said}" for name, said in zip(members, texts, strict=True))
    own = {
        name: content | {"ok": ok}
        for name, content, ok in zip(members, contents, passed, strict=True)
    }
    return {"ok": all(passed)} | sealed_json({"members": own, "text": text}), text


# -- the table ---------------------------------------------------------------------------------


def _places(
    results: pd.DataFrame, prompts: Sequence[int], grafts: Sequence[str]
) -> tuple[Int[np.ndarray, "prompt graft"], list[str]]:
    """The row of each cell, -1 where there is none; and which are missing, doubled or foreign."""
    p = pd.Index(prompts).get_indexer(pd.Index(results["prompt"]))
    g = pd.Index(grafts, dtype=object).get_indexer(pd.Index(results["graft"].astype(object)))
    known = (p >= 0) & (g >= 0)
    cell = (p * len(grafts) + g)[known]
    counts = np.bincount(cell, minlength=len(prompts) * len(grafts))
    rows = np.full(counts.size, -1)
    rows[cell] = np.flatnonzero(known)
    problems = []
    for what, odd in (("missing", counts == 0), ("present more than once", counts > 1)):
        if odd.any():
            i, j = divmod(int(np.argmax(odd)), len(grafts))
            problems.append(
                f"{odd.sum()} cell(s) are {what}, such as prompt {prompts[i]} under {grafts[j]!r}."
            )
    if not known.all():
        problems.append(_such(results, "belong to no prompt and graft that were requested", ~known))
    return rows.reshape(len(prompts), len(grafts)), problems


def _contradictions(
    results: pd.DataFrame, prompts: Mapping[int, Prompt], grafts: Mapping[str, Graft]
) -> list[str]:
    """Rows that contradict themselves or what was asked."""
    wrong: dict[str, pd.Series] = {}
    if "rule" in results:
        rules = results["graft"].astype(object).map({n: str(g) for n, g in grafts.items()})
        wrong["have another graft's rule"] = results["rule"].astype(object) != rules
    if "text" in results:
        texts = results["prompt"].map({n: prompt.text for n, prompt in prompts.items()})
        wrong["have another prompt's text"] = results["text"].astype(object) != texts
    if {"logprob", "prob", "reason"} <= {*results.columns}:
        logprob, prob = (results[c].astype(float) for c in ("logprob", "prob"))
        wrong["have neither numbers nor a reason"] = logprob.isna() & results["reason"].isna()
        for m in measures():
            if m.name in results and m.holds in ("number", "count"):
                there = results[m.name].notna()
                wrong[f"have a {m.name} and a reason"] = there & results["reason"].notna()
                # Version 0.1.0 did not count ties.
                if m.always and not m.optional and m.name != "ties":
                    wrong[f"have a logprob but no {m.name}"] = logprob.notna() & ~there
        wrong["have a prob that is not exp(logprob)"] = (np.exp(logprob) - prob).abs() > 1e-6
    return [_such(results, what, odd.to_numpy(bool)) for what, odd in wrong.items() if odd.any()]


def _such(results: pd.DataFrame, what: str, odd: Bool[np.ndarray, " row"]) -> str:
    row = results.iloc[int(np.argmax(odd))]
    return f"{odd.sum()} row(s) {what}, such as prompt {row['prompt']} under {row['graft']!r}."


def _refused(results: pd.DataFrame, reasons: pd.Series) -> tuple[Refused, ...]:
    first = reasons[reasons.notna() & ~reasons.duplicated()]
    example = {reason: results.loc[i] for i, reason in first.items()}
    return tuple(
        Refused(str(r), int(n), int(example[r]["prompt"]), str(example[r]["graft"]))
        for r, n in reasons.value_counts().items()
        if n
    )


def _draw(
    ran: Bool[np.ndarray, "prompt graft"],
    prompts: Sequence[int],
    grafts: Mapping[str, Graft],
    count: int,
    seed: int,
    scored: Callable[[int], Scored | None],
) -> list[tuple[int, str]]:
    """Random cells that ran, of as many grafts as there are; answers of one and several tokens."""
    rng = np.random.default_rng(seed)
    names = list(grafts)
    plain = {Graft(), *(Graft.rule(s) for g in grafts.values() for s in g.sources)}
    order = sorted(rng.permutation(len(names)).tolist(), key=lambda g: grafts[names[g]] in plain)
    free, drawn = ran.copy(), list[tuple[int, str]]()
    while len(drawn) < count and free.any():
        for g in order:
            tried = rng.permutation(np.flatnonzero(free[:, g]))[:16].tolist()
            if not tried or len(drawn) == count:
                continue
            several = [p for p in tried if (s := scored(prompts[p])) and len(s.answer) > 1]
            single = [p for p in tried if p not in several]
            p = ((several or single) if len(drawn) % 2 == 0 else (single or several))[0]
            free[p, g] = False
            drawn.append((prompts[p], names[g]))
    return drawn


# -- comparing ---------------------------------------------------------------------------------


def _rounding(
    model: GraftedTransformer,
    sequential: Sequential | None,
    few: Sequence[Scored],
    grafts: Mapping[str, Graft],
    row_budget: int | None,
    options: Mapping[str, Any],
) -> Rounding:
    prompts = {s.number: s.prompt for s in few}
    backwards = dict(reversed(list(prompts.items())))
    small = 2 * max(len(s.tokens) + len(s.answer) for s in few)
    runs = [(prompts, row_budget), (backwards, row_budget), (prompts, small)]
    runs += [({n: prompt}, row_budget) for n, prompt in prompts.items()]
    tables = [score(model, some, grafts, row_budget=budget, **options) for some, budget in runs]
    groups = pd.concat(tables).groupby(["prompt", "graft"])[["logprob", "answer_logprob"]]
    size = groups.agg(lambda column: column.abs().max()).to_numpy(float)
    spread = (groups.max() - groups.min()).to_numpy(float) / np.fmax(1.0, size / 100)
    nats, logits, largest = [0.0], [0.0], [1e-9]
    if sequential is not None:
        for s, source in [(s, source) for s in few for source in model.sources]:
            once = sequential.whole(s.tokens, source).float()
            again = sequential.logits(s.tokens, Graft.rule(source)).float()
            first, second = (x[-1].log_softmax(-1)[s.answer[0]] for x in (once, again))
            nats.append(abs(float(_minus(first, second))))
            largest.append(_size(once))
            logits.append(float(_minus(once, again).abs().max()) / largest[-1])
    found = Rounding(
        groups.ngroups, _largest(spread[~np.isnan(spread)]), _largest(nats), _largest(logits)
    )
    eps = torch.finfo(model.cfg.dtype).eps
    if eps < 1e-6:
        return found
    # Half precision: five times the noise, and at least two roundings of the largest logit.
    bound = _largest([5 * found.nats, 5 * found.hf_nats, 2 * eps * _largest(largest)])
    relative = _largest([5 * found.hf_logits, bound / _largest(largest)])
    return replace(found, bound_nats=bound, bound_logits=relative)


def _compared(
    model: GraftedTransformer,
    sequential: Sequential,
    s: Scored,
    graft: Graft,
    record: Mapping[str, Any],
    rounding: Rounding,
    source: str | None,
    references: Mapping[str, Graft],
    own: Sequence[Measure],
) -> tuple[dict[str, float], tuple[int, int] | None, tuple[str, ...]]:
    """A record's differences from Hugging Face's numbers, the ranks, and what is beyond rounding.

    With `source` those are of one forward pass of that source, else of the sequential algorithm.
    """
    first, target = len(s.tokens) - 1, s.answer[0]

    def logits(answer: Sequence[int]) -> Float[Tensor, "token d_vocab"]:
        if source is not None:
            return sequential.whole(s.tokens, source, answer[:-1])[first:].float().cpu()
        at = range(first, first + len(answer))
        return sequential.logits(s.tokens, graft, answer[:-1], at=at).float().cpu()

    theirs = logits(s.answer)
    batch = collate([s.tokens], continuations=[s.answer[:-1]], device=model.cfg.device)
    columns = range(first, first + len(s.answer))
    ours = model.logits_at(batch, [columns], graft)[0].float().cpu()
    relative = float(_minus(ours, theirs).abs().max()) / _size(theirs)
    bound = rounding.nats_for(_size(theirs))
    differences, problems = {"logits": relative}, []
    if not relative <= rounding.bound_logits:
        problems.append(f"the plain forward differs by {relative:.1e} of the largest logit.")

    n_common = model.vocabularies.common
    first_only = _predictions(theirs[:1], s, n_common)
    runs: dict[str, Predictions] = {}
    if any(m.references and not pd.isna(record.get(m.name)) for m in (*measures(), *own)):
        runs = {run: _again(sequential, s, g, n_common) for run, g in references.items()}
        first_only = _predictions(theirs[:1], s, n_common, runs)

    # measure -> what Hugging Face gives, what is recorded, how many tokens' rounding it may have
    found: dict[str, tuple[float, Any, float]] = {}
    for m in sorted(measures(), key=lambda m: m.over == "distractors"):
        recorded: Any = record.get(m.name)
        if m.over == "answer":
            found[m.name] = (_summed(m, theirs, s.answer), recorded, len(s.answer))
        elif m.over == "distractors":
            for i, ids in enumerate(s.distractors if np.ndim(recorded) else ()):
                value = _summed(m, logits(ids), ids)
                found[f"{m.name}[{i}]"] = (value, recorded[i], len(ids))
        elif m.holds == "number" and m.function and not m.log and first_only.has(m):
            value = float(first_only.column(m)[0])
            found[m.name] = (value, recorded, _roundings(m, value))
    moved = [
        _rounded(first_only.logits, s, runs, rounding.bound_nats, i, n_common) for i in range(4)
    ]
    for m in own:
        if first_only.has(m):
            value, again = (float(first_only.column(m, np.float64)[0]) for _ in range(2))
            if value != again and not math.isnan(value):
                problems.append(f"{m.name} has several values for the same logits.")
            spread = _largest(abs(float(p.column(m, np.float64)[0]) - value) for p in moved)
            tokens = _roundings(m, value) + 2 * spread / rounding.bound_nats
            found[m.name] = (value, record.get(m.name), tokens)
    for name, (value, recorded, tokens) in found.items():
        if recorded is None or pd.isna(recorded):
            continue
        differences[name] = 0.0 if recorded == value else abs(float(recorded) - value)
        if not differences[name] <= tokens * bound:
            problems.append(f"{name} is {recorded:.6g}, Hugging Face gives {value:.6g}.")

    ranks, near = None, 2 * bound
    logprobs = first_only.logprobs[0]
    if not pd.isna(record.get("rank")):
        others = _minus(torch.cat([logprobs[:target], logprobs[target + 1 :]]), logprobs[target])
        # Tokens closer to the target than rounding may be on either side of it, or be tied.
        best, worst = 1 + int((others > near).sum()), 1 + int((others >= -near).sum())
        ranks = (int(record["rank"]), int(first_only.standing[0][0]))
        ties = 0 if pd.isna(record.get("ties")) else int(record["ties"])
        if not best <= ranks[0] <= worst:
            problems.append(f"rank is {ranks[0]}, Hugging Face gives {ranks[1]}.")
        elif not 0 <= ties <= worst - best:
            problems.append(f"ties is {ties}, Hugging Face has {worst - best} tokens near enough.")
    top: Any = record.get("top_tokens")
    if np.ndim(top):
        ordered = logprobs.sort(descending=True, stable=True)
        for i, (token, prob) in enumerate(zip(top, record["top_probs"], strict=True)):
            value = float(ordered.values[i])
            near_it = _minus(ordered.values, ordered.values[i]).abs() <= near
            close = ordered.indices[near_it].tolist()
            texts = [model.to_single_str_token(t) for t in close]
            # Beyond about -87 nats float32 keeps less of a probability, then nothing.
            tiny = abs(prob - math.exp(value)) < TINY
            if token not in texts or not (tiny or abs(math.log(max(prob, 1e-300)) - value) <= near):
                problems.append(
                    f"top token {i + 1} is {token!r} with {prob:.6g}, Hugging Face gives "
                    f"{texts[0]!r} with {math.exp(value):.6g}."
                )
    return differences, ranks, tuple(problems)


def _reads(model: GraftedTransformer, s: Scored, graft: Graft) -> bool:
    """Whether the sources of a graft have all tokens that they would read."""
    batch = collate([s.tokens], continuations=[s.answer[:-1]], device=model.cfg.device)
    try:
        model.refuse_lacking(batch, model.resolve(graft, batch))
    except PromptError:
        return False
    return True


def _minus(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """a - b, 0 where they are equal: both are -inf at tokens that a source lacks."""
    return (a - b).masked_fill(a == b, 0.0)


def _size(logits: Float[Tensor, "pos d_vocab"]) -> float:
    """The largest logit, without regard to its sign or to tokens that a source lacks."""
    return float(logits.masked_fill(logits.isneginf(), 0.0).abs().max())


def _predictions(
    logits: Float[Tensor, "1 d_vocab"],
    s: Scored,
    n_common: int | None,
    runs: Mapping[str, Predictions] | None = None,
) -> Predictions:
    """The distribution after a prompt, with the tokens that measures compare."""

    def ids(tokens: Sequence[int]) -> Tensor | None:
        return torch.tensor([tokens]) if tokens else None

    return Predictions(
        logits,
        answer=torch.tensor(s.answer[:1]),
        distractors=ids(s.wrong),
        answers=ids(s.answers),
        base=(runs or {}).get("base"),
        full=(runs or {}).get("full"),
        n_common=n_common,
    )


def _again(sequential: Sequential, s: Scored, graft: Graft, n_common: int) -> Predictions:
    """A reference run's distribution after the prompt, by the sequential algorithm."""
    first = len(s.tokens) - 1
    logits = sequential.logits(s.tokens, graft, s.answer[:-1], at=[first])
    return Predictions(logits.float().cpu(), n_common=n_common)


def _rounded(
    logits: Float[Tensor, "1 d_vocab"],
    s: Scored,
    runs: Mapping[str, Predictions],
    bound: float,
    seed: int,
    n_common: int | None,
) -> Predictions:
    """The same distribution with logits that differ by no more than rounding: how far does this
    move a user's own measure?"""
    rng = torch.Generator().manual_seed(seed)

    def moved(x: Float[Tensor, "1 d_vocab"]) -> Float[Tensor, "1 d_vocab"]:
        return x + bound * (2 * torch.rand(x.shape, generator=rng, dtype=x.dtype) - 1)

    others = {run: Predictions(moved(p.logits), n_common=p.n_common) for run, p in runs.items()}
    return _predictions(moved(logits), s, n_common, others)


def _summed(m: Measure, logits: Float[Tensor, "token d_vocab"], ids: Sequence[int]) -> float:
    """A measure along a continuation."""
    return float(np.sum(Predictions(logits, answer=torch.tensor(ids)).column(m, np.float64)))


def _roundings(m: Measure, value: float) -> float:
    """How many times over the rounding of a log-probability may show in a measure.

    Where each log-probability is off by at most e, a difference of logits is off by 2 e at most,
    and an expectation of log-probabilities by e (3 + its size).
    """
    if m.unit == "logits":
        return 2.0
    return 1.0 if m.always else 3.0 + abs(value)


def _largest(values: Iterable[float]) -> float:
    """The largest; NaN if any is, so that nothing passes for being incomparable."""
    return float(np.max(np.fromiter(values, float), initial=0.0))


def _worst(checks: Sequence[Check]) -> str:
    names = dict.fromkeys(name for check in checks for name in check.differences)
    largest = {n: _largest(c.differences[n] for c in checks if n in c.differences) for n in names}
    return ", ".join(f"{name} {value:.1e}" for name, value in largest.items()) or "nothing"
