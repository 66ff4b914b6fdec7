"""One self-contained page about a run: what it shows, its charts and numbers, how it was run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from graftlens.folder import at_home, write_whole
from graftlens.viz import page, text
from graftlens.viz.figures import bar_chart
from graftlens.viz.spelling import characters

#: With more grafts than this the ranks prompt by prompt are no table that anyone reads.
MAX_GRAFTS = 40


@dataclass(frozen=True)
class Example:
    """One prompt to show. `grafted` says for each graft which tokens were touched by it."""

    title: str
    tokens: tuple[str, ...]
    grafted: dict[str, tuple[bool, ...]]
    answer: str
    target: str
    """The answer's first token, which is what ranks and accuracies are about."""
    predictions: dict[str, tuple[tuple[str, float], ...]]

    def __post_init__(self) -> None:
        for graft, marks in self.grafted.items():
            if len(marks) != len(self.tokens):
                raise ValueError(
                    f"example {self.title!r}: graft {graft!r} marks {len(marks)} tokens, the "
                    f"prompt has {len(self.tokens)}; give one True or False per token"
                )
        unknown = [graft for graft in self.predictions if graft not in self.grafted]
        if unknown:
            raise ValueError(
                f"example {self.title!r}: predictions for {', '.join(map(repr, unknown))}, but "
                f"grafted has {', '.join(map(repr, self.grafted))}; give the marks of each graft"
            )


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: pd.DataFrame,
    table: pd.DataFrame,
    examples: Sequence[Example] = (),
    provenance: Mapping[str, object],
    charts: Sequence[page.Figure] | None = None,
    metric: str = "top5",
    lead: str | None = None,
    findings: Sequence[str] | None = None,
    max_prompts: int = 100,
) -> Path:
    """Write the report of a run to `path` and return it; the file appears whole or not at all.

    `summary` is `graftlens.stats.summarise(table, ...)`. `metric` is what the headline and the
    first chart are about. Charts default to `metric` and the recovery, if the summary has one. The
    lead sentence and the findings below it default to `text.headline` and `text.verdicts`. Ranks
    are listed prompt by prompt for the first `max_prompts` prompts; the page says how many more
    there are. With more than `MAX_GRAFTS` grafts they are left to the results table.
    """
    path = at_home(path)
    if max_prompts < 0:
        raise ValueError(f"max_prompts={max_prompts} is negative; give 0 to list no prompts")
    text.measure(summary, metric)
    if charts is None:
        names = dict.fromkeys((metric, *(m for m in text.metrics(summary) if m == "recovery")))
        charts = [bar_chart(summary, name) for name in names]
    if lead is None:
        lead = text.headline(summary, metric=metric)
    if findings is None:
        findings = [verdict.sentence for verdict in text.verdicts(summary, metric=metric)]
    body = "\n".join(
        (
            f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p></header>",
            page.section("found", "What the numbers say", page.bullets(findings)),
            page.section("charts", "Charts", page.figures(charts, folder=path.parent)),
            page.section("numbers", "Numbers", _numbers(summary, table)),
            page.section("examples", "Example prompts", _examples(examples)) if examples else "",
            page.section("prompts", "Prompt by prompt", _prompts(table, max_prompts)),
            page.section("grafts", "The grafts", page.rules(_rules(table))),
            page.section("run", "What was run and how", page.definitions(provenance)),
        )
    )
    return write_whole(path, page.document(title, body))


def _numbers(summary: pd.DataFrame, table: pd.DataFrame) -> str:
    facts = [text.measure(summary, name) for name in text.metrics(summary)]
    first = summary.iloc[0]
    head = "".join(
        f"<th scope='col'>{escape(fact.name.replace('_', ' '))}"
        f"<small>{escape(fact.unit)}</small></th>"
        for fact in facts
    )
    parts = []
    for name, part in text.groups(summary).items():
        n, left = int(part["n"].iloc[0]), int(part["not_run"].iloc[0])
        rows = "".join(
            f"<tr><th scope='row'>{escape(str(row['graft']))}</th>"
            f"{''.join(_cell(fact, row) for fact in facts)}"
            f"<td class='count'>{int(row['failed'])}</td></tr>"
            for _, row in part.iterrows()
        )
        counted = f"{n} prompts used" + (f", {left} left out" if left else "")
        parts.append(
            f"<div class='scroll' tabindex='0' role='region' aria-label='Numbers, {escape(name)}'>"
            f"<table><caption>{escape(name)}: {counted}</caption>"
            f"<thead><tr><th scope='col'>graft</th>{head}"
            f"<th scope='col'>not run<small>prompts</small></th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    notes = [
        f"Each cell: the value, below it its {text.level(summary)} interval over "
        f"{text.resampled(summary)}. Intervals are those of a paired bootstrap "
        f"({int(first['resamples'])} resamples, seed {int(first['seed'])}); an accuracy with fewer "
        "than 5 successes or failures has a Wilson interval instead.",
        "A prompt is used only if it ran under every graft; the others are counted as left out.",
    ]
    if "recovery_of" in summary:
        notes.append(f"Recovery: {text.measure(summary, 'recovery').title}.")
    notes += [f"{where}: {why}." for where, why in text.recovery_notes(summary)]
    failed = table.loc[table["reason"].notna(), ["graft", "reason"]]
    for (graft, reason), rows_left in failed.groupby(
        ["graft", "reason"], sort=False, observed=True
    ):
        notes.append(f"{graft} was not run for {len(rows_left)} prompts: {reason}")
    return (
        "\n".join(parts)
        + f"<ul class='notes'>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul>"
    )


def _cell(fact: text.Measure, row: "pd.Series[object]") -> str:
    value, low, high = (float(row[f"{fact.name}{end}"]) for end in ("", "_low", "_high"))
    said = text.written(fact, row)
    number, _, interval = said.partition(" ")
    return (
        f"<td data-metric='{escape(fact.name)}' data-value='{value!r}' data-low='{low!r}' "
        f"data-high='{high!r}'>{escape(number)} <small>{escape(interval)}</small></td>"
    )


def _examples(examples: Sequence[Example]) -> str:
    legend = (
        "<p class='legend'>Key: <mark>marked</mark> token: finetuned weights here; "
        "<span class='token'>plain</span> token: base weights. "
        "<span class='ws'>·</span> is a space, <span class='ws'>↵</span> a line break, "
        "<span class='ws'>→</span> a tab. ✓ is the answer's first token.</p>"
    )
    parts = []
    for example in examples:
        rows = []
        for graft, marks in example.grafted.items():
            line = "".join(
                f"<mark>{_token(token)}</mark>"
                if on
                else f"<span class='token'>{_token(token)}</span>"
                for token, on in zip(example.tokens, marks, strict=True)
            )
            guesses = "".join(
                f"<li{_right(token == example.target)}><span class='token'>{_token(token)}</span> "
                f"{100 * probability:.1f}%{_tick(token == example.target)}</li>"
                for token, probability in example.predictions.get(graft, ())
            )
            guessed = (
                f"<ol class='guesses' aria-label='most likely next tokens'>{guesses}</ol>"
                if guesses
                else ""
            )
            rows.append(
                f"<div class='graft'><h4>{escape(graft)} <small>{_where(marks)}</small></h4>"
                f"<p class='tokens'>{line}</p>{guessed}</div>"
            )
        parts.append(
            f"<article><h3>{escape(example.title)}</h3>"
            f"<p>Answer: <strong>{_token(example.answer)}</strong></p>{''.join(rows)}</article>"
        )
    return legend + "\n".join(parts)


def _where(marks: Sequence[bool]) -> str:
    """The marked token numbers in words, so that nothing hangs on seeing the marks."""
    if not any(marks):
        return "base weights everywhere"
    if all(marks):
        return "finetuned weights at every token"
    runs: list[list[int]] = []
    for number, on in enumerate(marks, start=1):
        if on and runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        elif on:
            runs.append([number, number])
    said = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
    plural = "s" if sum(marks) > 1 else ""
    return f"finetuned weights at token{plural} {said} of {len(marks)}"


def _right(hit: bool) -> str:
    return " class='right'" if hit else ""


def _tick(hit: bool) -> str:
    return " <span aria-label='the answer'>✓</span>" if hit else ""


def _token(token: str) -> str:
    """A token's text as HTML: escaped, its white space and control characters made visible."""
    return "".join(
        f"<span class='ws'>{shown}</span>" if mark else escape(shown)
        for shown, mark in characters(token)
    )


def _prompts(table: pd.DataFrame, max_prompts: int) -> str:
    grafts = list(dict.fromkeys(table["graft"]))
    prompts = sorted(dict.fromkeys(table["prompt"]))
    shown = prompts[:max_prompts]
    if not shown:
        return f"<p>{len(prompts)} prompts, not listed here.</p>"
    if len(grafts) > MAX_GRAFTS:
        return (
            f"<p>The ranks of {len(prompts)} prompts under {len(grafts)} grafts are too many for a "
            f"table here (it is shown for up to {MAX_GRAFTS} grafts); they are in the results "
            "table.</p>"
        )
    kept = table[table["prompt"].isin(shown)].drop_duplicates(["prompt", "graft"], keep="last")
    texts = kept.drop_duplicates("prompt").set_index("prompt")
    cells = {
        (prompt, graft): _rank(rank, reason)
        for prompt, graft, rank, reason in zip(
            kept["prompt"],
            kept["graft"],
            kept["rank"].to_numpy(dtype=float, na_value=float("nan")).tolist(),
            kept["reason"].astype(object).where(kept["reason"].notna(), None),
            strict=True,
        )
    }
    absent = _rank(float("nan"), None)
    rows = "".join(
        f"<tr><th scope='row'>{escape(str(prompt))}</th><td class='text'>"
        f"{escape(str(texts.at[prompt, 'text']))}</td><td class='text'>"
        f"{escape(str(texts.at[prompt, 'answer']))}</td>"
        f"{''.join(cells.get((prompt, graft), absent) for graft in grafts)}</tr>"
        for prompt in shown
    )
    head = "".join(f"<th scope='col'>{escape(str(graft))}</th>" for graft in grafts)
    more = len(prompts) - len(shown)
    rest = f" The other {more} prompts are in the results table only." if more else ""
    return (
        f"<p>Rank of the answer's first token under each graft (1 = most likely, up to 5 in bold; "
        f"– = not run).{rest}</p><details><summary>Show {len(shown)} of {len(prompts)} prompts"
        "</summary><div class='scroll' tabindex='0' role='region' aria-label='Prompt by prompt'>"
        f"<table class='ranks'><thead><tr><th scope='col'>id</th><th scope='col'>prompt</th>"
        f"<th scope='col'>answer</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        "</div></details>"
    )


def _rank(rank: float, reason: str | None) -> str:
    if reason is not None or rank != rank:
        return f"<td class='count' title='{escape(str(reason or 'no row'))}'>–</td>"
    said = f"<strong>{rank:.0f}</strong>" if rank <= 5 else f"{rank:.0f}"
    return f"<td class='count'>{said}</td>"


def _rules(table: pd.DataFrame) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for graft, rule in table[["graft", "rule"]].drop_duplicates().itertuples(index=False):
        rules.setdefault(str(graft), []).append(str(rule))
    return rules
