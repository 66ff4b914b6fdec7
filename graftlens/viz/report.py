"""One self-contained page about a run: what it shows, its charts and numbers, how it was run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pandas as pd

from graftlens.folder import at_home, write_whole
from graftlens.stats.chance import few_answers
from graftlens.viz import page, text
from graftlens.viz.examples import Example, Glimpse
from graftlens.viz.figures import bar_chart, dose_chart
from graftlens.viz.quantities import Quantity, measured, of_summary
from graftlens.viz.reading import glossary, nothing_learnt
from graftlens.viz.render import render
from graftlens.viz.sweeps import has_doses

#: With more grafts than this, a table of ranks prompt by prompt is unreadable.
MAX_GRAFTS = 40


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: pd.DataFrame,
    table: pd.DataFrame,
    examples: Sequence[Example] = (),
    glimpse: Glimpse | None = None,
    provenance: Mapping[str, object],
    charts: Sequence[page.Figure] | None = None,
    metric: str = "top5",
    lead: str | None = None,
    findings: Sequence[str] | None = None,
    max_prompts: int = 100,
) -> Path:
    """Write the report of a run to `path` and return it; the file appears whole or not at all.

    `summary` is `graftlens.stats.summarise(table, ...)`. `metric` is what the headline and the
    first chart are about. Charts default to `metric` and the recovery, if the summary has one, and
    to their dose response where a graft was run at several strengths. The lead sentence and the
    findings default to `text.headline` and `text.verdicts`. `glimpse` is what the page begins
    with. Ranks are listed prompt by prompt for the first `max_prompts` prompts; the page says how
    many more there are. With more than `MAX_GRAFTS` grafts they are left to the results table.
    """
    path = at_home(path)
    if max_prompts < 0:
        raise ValueError(f"max_prompts={max_prompts} is negative; give 0 to list no prompts")
    of_summary(summary, metric)
    if charts is None:
        names = dict.fromkeys((metric, *(m for m in measured(summary) if m == "recovery")))
        charts = [bar_chart(summary, name) for name in names]
        groups = text.groups(summary)
        for name, (group, part) in product(names, groups.items()):
            if has_doses(part, name):
                chart = dose_chart(part, name)
                where = f"{group}: " if len(groups) > 1 else ""
                charts.append(replace(chart, caption=where + chart.caption))
    if lead is None:
        lead = text.headline(summary, metric=metric)
    if findings is None:
        findings = [verdict.sentence for verdict in text.verdicts(summary, metric=metric)]
    html = render(
        "report.html",
        title=title,
        glimpse=glimpse,
        warnings=[*nothing_learnt(summary), *few_answers(table["answer"])],
        lead=lead,
        findings=findings,
        charts=charts,
        numbers=numbers(summary, table),
        examples=examples,
        ranks=_ranks(table, max_prompts),
        rules=_rules(table),
        glossary=glossary(summary),
        provenance=provenance,
        folder=path.parent,
    )
    return write_whole(path, html)


def numbers(summary: pd.DataFrame, table: pd.DataFrame) -> dict[str, object]:
    """What the template shows of a summary: its tables, a group each, and the notes below them."""
    facts = [of_summary(summary, name) for name in measured(summary)]
    first = summary.iloc[0]
    groups = []
    for name, part in text.groups(summary).items():
        n, left = int(part["n"].iloc[0]), int(part["not_run"].iloc[0])
        rows = [
            {
                "graft": row["graft"],
                "cells": [_cell(fact, row) for fact in facts],
                "failed": int(row["failed"]),
            }
            for _, row in part.iterrows()
        ]
        counted = f"{n} prompts used" + (f", {left} left out" if left else "")
        groups.append({"name": name, "counted": counted, "rows": rows})
    notes = [
        f"Each cell: the value, below it its {text.level(summary)} interval over "
        f"{text.resampled(summary)}. Intervals are those of a paired bootstrap "
        f"({int(first['resamples'])} resamples, seed {int(first['seed'])}); an accuracy with fewer "
        "than 5 successes or failures has a Wilson interval instead.",
        "A prompt is used only if it ran under every graft; the others are counted as left out.",
    ]
    if "recovery_of" in summary:
        notes.append(f"Recovery: {of_summary(summary, 'recovery').title}.")
    notes += filter(None, [text.common_note(summary)])
    notes += [f"{where}: {why}." for where, why in text.summary_notes(summary)]
    failed = table.loc[table["reason"].notna(), ["graft", "reason"]]
    for (graft, reason), rows_left in failed.groupby(
        ["graft", "reason"], sort=False, observed=True
    ):
        notes.append(f"{graft} was not run for {len(rows_left)} prompts: {reason}")
    head = [(fact.short or fact.label, fact.unit) for fact in facts]
    return {"head": head, "groups": groups, "notes": notes}


def _cell(fact: Quantity, row: "pd.Series[object]") -> dict[str, str]:
    number, _, interval = text.written(fact, row).partition(" ")
    value, low, high = (repr(float(row[f"{fact.name}{end}"])) for end in ("", "_low", "_high"))
    written = {"number": number, "interval": interval}
    return {"metric": fact.name, "value": value, "low": low, "high": high} | written


@dataclass(frozen=True)
class Ranks:
    """Prompt by prompt, the rank of the answer under each graft; without rows, `why` not."""

    grafts: Sequence[str] = ()
    rows: Sequence[Mapping[str, object]] = ()
    """`prompt` (its number), `text`, `answer`, and `cells`: rank, or None with the reason."""
    rest: int = 0
    """How many prompts are not listed."""
    why: str = ""


def _ranks(table: pd.DataFrame, max_prompts: int) -> Ranks:
    grafts = list(dict.fromkeys(table["graft"]))
    prompts = sorted(dict.fromkeys(table["prompt"]))
    shown = prompts[:max_prompts]
    if not shown:
        return Ranks(why=f"{len(prompts)} prompts, not listed here.")
    if len(grafts) > MAX_GRAFTS:
        return Ranks(
            why=f"The ranks of {len(prompts)} prompts under {len(grafts)} grafts are too many for "
            f"a table here (it is shown for up to {MAX_GRAFTS} grafts); they are in the results "
            "table."
        )
    kept = table[table["prompt"].isin(shown)].drop_duplicates(["prompt", "graft"], keep="last")
    texts = kept.drop_duplicates("prompt").set_index("prompt")
    cells = {
        (prompt, graft): (None, reason or "no row")
        if reason is not None or rank != rank
        else (rank, "")
        for prompt, graft, rank, reason in zip(
            kept["prompt"],
            kept["graft"],
            kept["rank"].to_numpy(dtype=float, na_value=float("nan")).tolist(),
            kept["reason"].astype(object).where(kept["reason"].notna(), None),
            strict=True,
        )
    }
    rows = [
        {
            "prompt": prompt,
            "text": texts.at[prompt, "text"],
            "answer": texts.at[prompt, "answer"],
            "cells": [cells.get((prompt, graft), (None, "no row")) for graft in grafts],
        }
        for prompt in shown
    ]
    return Ranks(grafts, rows, len(prompts) - len(shown))


def _rules(table: pd.DataFrame) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for graft, rule in table[["graft", "rule"]].drop_duplicates().itertuples(index=False):
        rules.setdefault(str(graft), []).append(str(rule))
    return rules
