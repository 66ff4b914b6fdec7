"""The page of a sweep: its charts and numbers, and behind each graft its prompts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from graftlens.folder import at_home, write_whole
from graftlens.references import named_in
from graftlens.stats.chance import few_answers
from graftlens.viz import text
from graftlens.viz.examples import Example, Glimpse
from graftlens.viz.page import table_beside
from graftlens.viz.quantities import of_summary
from graftlens.viz.reading import glossary, nothing_learnt
from graftlens.viz.render import render
from graftlens.viz.report import numbers
from graftlens.viz.spelling import visible
from graftlens.viz.sweepcharts import (
    effects,
    largest,
    main_metric,
    member_charts,
    sweep_charts,
)
from graftlens.viz.textspage import Texts

#: Most grafts that the table of numbers lists.
LISTED = 100

#: Most of a cell's likeliest tokens that the page keeps.
TOKENS = 5


@dataclass(frozen=True)
class Sweep:
    """What the page of a sweep shows.

    Attributes:
        title, lead: the heading, and what was run in a sentence.
        summary: `graftlens.stats.summarise` of its table.
        table: its cells, a row each: prompt, graft, rule, template, text, answer, target, rank,
            prob, top_tokens, top_probs (of `shown` prompts), reason.
        shown: the numbers of the prompts that can be looked at.
        notes: what a reader must know, such as which grafts are left out.
        said: which prompts the page has behind a graft.
        members: of a sweep whose source stands for several models, the summary of them all, by
            member and step; all else is of one of them.
        examples: prompts with the tokens that grafts touch.
        glimpse: what the page begins with, if there is such a prompt.
        trust, trusted: the trust report, and whether it found nothing wrong.
        command: the words of a command that opens the dashboard of a prompt, without `--number` and
            `--graft`.
        provenance: what was run and how.
        texts: what was generated.
    """

    title: str
    lead: str
    summary: pd.DataFrame
    table: pd.DataFrame
    shown: Collection[int]
    notes: Sequence[str]
    said: str
    examples: Sequence[Example]
    glimpse: Glimpse | None
    trust: str
    trusted: bool
    command: Sequence[str]
    provenance: Mapping[str, object]
    texts: Texts | None = None
    members: pd.DataFrame | None = None


def sweep_page(path: str | Path, sweep: Sweep) -> Path:
    """Write the page of a sweep to `path` and return it; the file appears whole or not at all.

    A click on a bar, on a cell of a heat map or on a graft's name shows the graft's prompts: rank
    and probability of the answer, the likeliest tokens, and the command that opens the dashboard.
    """
    path = at_home(path)
    charts, notes = sweep_charts(sweep.summary)
    found = _found(sweep.summary)
    listed = largest(sweep.summary, LISTED)
    said = numbers(listed, sweep.table[sweep.table["graft"].isin(listed["graft"])])
    grafts = sweep.summary["graft"].nunique()
    if listed["graft"].nunique() < grafts:
        notes.append(
            f"The table of numbers lists the {LISTED} of {grafts} grafts whose log-probability "
            "differs most from the base's."
        )
    every = sweep.members
    beside = "Each graft under each model"
    html = render(
        "sweep.html",
        title=sweep.title,
        glimpse=sweep.glimpse,
        warnings=[*nothing_learnt(sweep.summary), *few_answers(sweep.table["answer"])],
        lead=" ".join(filter(None, [found, sweep.lead])),
        findings=[*_findings(sweep.summary), *sweep.notes, *notes],
        charts=charts,
        glossary=glossary(sweep.summary),
        numbers=said,
        examples=sweep.examples,
        trust=sweep.trust,
        trusted=sweep.trusted,
        behind=_behind(sweep),
        texts=sweep.texts,
        member_charts=[] if every is None else member_charts(every),
        members=None if every is None else table_beside(path, "members", beside, every),
        provenance=sweep.provenance,
        folder=path.parent,
    )
    return write_whole(path, html)


def _is_finding(summary: pd.DataFrame) -> bool:
    """Whether it can say if FE+LT is enough."""
    both = {"FE+LT", "(FE+LT)^C"} <= set(summary["graft"].astype(str))
    return both and named_in(summary)[1] is not None and "top5" in summary


def _found(summary: pd.DataFrame) -> str:
    """What the sweep found, in a sentence or two."""
    if not _is_finding(summary):
        return text.leading(summary, main_metric(summary))
    base, full = named_in(summary)
    return text.headline(summary, base=base, full=str(full))


def _findings(summary: pd.DataFrame) -> list[str]:
    """What each group of prompts shows: whether FE+LT is enough where it was run, or else which
    graft does most and which least."""
    if _is_finding(summary):
        base, full = named_in(summary)
        found = text.verdicts(summary, base=base, full=str(full))
        return [verdict.sentence for verdict in found]
    facts = of_summary(summary, main_metric(summary))
    said = []
    for name, part in text.groups(summary).items():
        rows = text.ranked(facts, part)
        if len(rows) < 2:
            continue
        most, least = (
            f"{row['graft']} ({text.written(facts, row)})"
            for _, row in rows.iloc[[0, -1]].iterrows()
        )
        count = text.prompts(int(part["n"].iloc[0]))
        said.append(
            f"{name} ({count}): by {facts.label}, most is {most}, least {least}, of "
            f"{len(rows)} grafts. The best of many looks better than it would on other prompts."
        )
    return said


def _behind(sweep: Sweep) -> dict[str, object]:
    """The cells as the page's script reads them: texts once, and a short list for each cell."""
    table = sweep.table[sweep.table["prompt"].isin(sweep.shown)]
    grafts = list(dict.fromkeys(table["graft"].astype(str)))
    rules = dict(zip(table["graft"].astype(str), table["rule"].astype(str), strict=True))
    prompts = table.drop_duplicates("prompt")
    places = {number: i for i, number in enumerate(prompts["prompt"].tolist())}
    tokens: dict[str, int] = {}
    reasons: dict[str, int] = {}
    templates = {name: i for i, name in enumerate(dict.fromkeys(prompts["template"].astype(str)))}
    cells: list[list[object]] = [[None] * len(prompts) for _ in grafts]
    number_of = {graft: i for i, graft in enumerate(grafts)}
    columns = ("graft", "prompt", "rank", "prob", "top_tokens", "top_probs", "reason")
    for graft, prompt, rank, prob, likeliest, probs, reason in zip(
        *(table[column].tolist() for column in columns), strict=True
    ):
        cell: object
        if isinstance(reason, str):
            cell = reasons.setdefault(reason, len(reasons))
        else:
            shown = zip(list(likeliest)[:TOKENS], list(probs)[:TOKENS], strict=True)
            pairs = [(tokens.setdefault(token, len(tokens)), _digits(p)) for token, p in shown]
            cell = [int(rank), _digits(prob), *(value for pair in pairs for value in pair)]
        cells[number_of[str(graft)]][places[prompt]] = cell
    ran = table[table["reason"].isna()].drop_duplicates("prompt").set_index("prompt")["target"]
    base, full = named_in(sweep.summary)
    far = effects(sweep.summary).drop([base, full], errors="ignore")
    others = [graft for graft in far.sort_values(ascending=False).index if graft in number_of]
    said = _said(sweep.summary)
    return {
        "said": sweep.said,
        "command": list(sweep.command),
        "first": others[0] if others else grafts[0],
        "templates": list(templates),
        "tokens": list(map(visible, tokens)),
        "reasons": list(reasons),
        "grafts": [
            {
                "name": graft,
                "rule": "" if rules[graft] == "none" else rules[graft],
                "end": graft in (base, full),
                "numbers": said.get(graft, []),
            }
            for graft in grafts
        ],
        "prompts": [
            {
                "number": number,
                "text": str(words),
                "answer": visible(answer),
                "template": templates[str(template)],
                "target": tokens.get(ran.get(number), -1),
            }
            for number, words, answer, template in zip(
                *(prompts[name].tolist() for name in ("prompt", "text", "answer", "template")),
                strict=True,
            )
        ],
        "cells": cells,
    }


def _said(summary: pd.DataFrame) -> dict[str, list[str]]:
    """Graft -> what its summary says, a line for each group of prompts."""
    metrics = dict.fromkeys((main_metric(summary), "top1", "top5", "logprob"))
    facts = [of_summary(summary, name) for name in metrics if f"{name}_low" in summary]
    found: dict[str, list[str]] = {}
    for name, part in text.groups(summary).items():
        columns = [text.written_all(fact, part) for fact in facts]
        for graft, *values in zip(part["graft"].astype(str), *columns, strict=True):
            pairs = zip(facts, values, strict=True)
            line = "; ".join(f"{fact.short or fact.label} {value}" for fact, value in pairs)
            found.setdefault(graft, []).append(f"{name}: {line}")
    return found


def _digits(value: object) -> float:
    return float(f"{float(str(value)):.3g}")
