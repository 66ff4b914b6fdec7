"""One self-contained HTML page about a run: what it shows, its charts and numbers, how it was run.

The page opens without a network and loads nothing: styles, scripts and plotly's JavaScript (once)
are inside, and its content policy forbids the rest.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from graftlens.viz import text, theme
from graftlens.viz.bars import grouped_bars


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


@dataclass(frozen=True)
class Chart:
    """A figure with its caption and, for readers who cannot see it, a description."""

    caption: str
    alt: str
    figure: go.Figure


def bar_chart(summary: pd.DataFrame, metric: str) -> Chart:
    """`grouped_bars` with a caption and a description made from the same numbers."""
    facts = text.measure(summary, metric)
    level = f"{100 * float(summary['level'].iloc[0]):g}%"
    caption = (
        f"{_capital(facts.title)}; whiskers: {level} intervals over {text.resampled(summary)}."
    )
    said = []
    for name, part in text.groups(summary).items():
        values = (f"{row['graft']} {text.written(facts, row)}" for _, row in part.iterrows())
        said.append(f"{name}: {', '.join(values)}")
    alt = f"Bar chart of {facts.label} by graft. {'. '.join(said)}."
    return Chart(caption, alt, grouped_bars(summary, metric))


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: pd.DataFrame,
    table: pd.DataFrame,
    examples: Sequence[Example] = (),
    provenance: Mapping[str, object],
    charts: Sequence[Chart] | None = None,
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
    there are.
    """
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
            _section("found", "What the numbers say", _findings(findings)),
            _section("charts", "Charts", _charts(charts)),
            _section("numbers", "Numbers", _numbers(summary, table)),
            _section("examples", "Example prompts", _examples(examples)) if examples else "",
            _section("prompts", "Prompt by prompt", _prompts(table, max_prompts)),
            _section("grafts", "The grafts", _rules(table)),
            _section("run", "What was run and how", _definitions(provenance)),
        )
    )
    return _write_whole(Path(path), _page(title, body))


def _page(title: str, body: str) -> str:
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    )
    looks = {"light": asdict(theme.LIGHT), "dark": asdict(theme.DARK)}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(title)}</title>
<style>{_variables(theme.LIGHT)}
@media screen and (prefers-color-scheme: dark) {{ {_variables(theme.DARK)} }}
{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{get_plotlyjs()}</script>
<script>const looks = {_json(looks)};
{_SCRIPT}</script>
</body>
</html>
"""


def _section(name: str, title: str, content: str) -> str:
    return f"<section aria-labelledby='{name}'><h2 id='{name}'>{title}</h2>\n{content}</section>"


def _findings(findings: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(finding)}</li>' for finding in findings)}</ul>"


def _charts(charts: Sequence[Chart]) -> str:
    parts = []
    for index, chart in enumerate(charts):
        figure = _json(json.loads(chart.figure.to_json()))
        height = chart.figure.layout.height or 430
        parts.append(
            f"<figure><div class='chart' id='chart-{index}' role='img' "
            f"aria-label='{escape(chart.alt)}' style='height:{int(height)}px'></div>"
            f"<script type='application/json' id='chart-{index}-figure'>{figure}</script>"
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )
    needs = (
        "<noscript><p>The charts need JavaScript; the table below has their numbers.</p></noscript>"
    )
    return "\n".join((*parts, needs))


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
    level = f"{100 * float(first['level']):g}%"
    notes = [
        f"Each cell: the value, below it its {level} interval over {text.resampled(summary)}. "
        f"Intervals are those of a paired bootstrap ({int(first['resamples'])} resamples, seed "
        f"{int(first['seed'])}); an accuracy with fewer than 5 successes or failures has a Wilson "
        "interval instead.",
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
    marks = {" ": "·", "\n": "↵", "\t": "→", "\u00a0": "⍽"}
    parts = []
    for char in token:
        if char in marks:
            parts.append(f"<span class='ws'>{marks[char]}</span>")
        elif char.isprintable():
            parts.append(escape(char))
        else:
            parts.append(f"<span class='ws'>\\u{ord(char):04x}</span>")
    return "".join(parts) or "<span class='ws'>∅</span>"


def _prompts(table: pd.DataFrame, max_prompts: int) -> str:
    grafts = list(dict.fromkeys(table["graft"]))
    prompts = sorted(dict.fromkeys(table["prompt"]))
    shown = prompts[:max_prompts]
    if not shown:
        return f"<p>{len(prompts)} prompts, not listed here.</p>"
    rows = []
    kept = table[table["prompt"].isin(shown)]
    for prompt, part in kept.groupby("prompt", sort=True):
        first = part.iloc[0]
        by_graft = {str(row["graft"]): row for _, row in part.iterrows()}
        ranks = "".join(_rank(by_graft.get(str(graft))) for graft in grafts)
        rows.append(
            f"<tr><th scope='row'>{escape(str(prompt))}</th><td class='text'>"
            f"{escape(str(first['text']))}</td><td class='text'>{escape(str(first['answer']))}</td>"
            f"{ranks}</tr>"
        )
    head = "".join(f"<th scope='col'>{escape(str(graft))}</th>" for graft in grafts)
    more = len(prompts) - len(shown)
    rest = f" The other {more} prompts are in the results table only." if more else ""
    return (
        f"<p>Rank of the answer's first token under each graft (1 = most likely, up to 5 in bold; "
        f"– = not run).{rest}</p><details><summary>Show {len(shown)} of {len(prompts)} prompts"
        "</summary><div class='scroll' tabindex='0' role='region' aria-label='Prompt by prompt'>"
        f"<table class='ranks'><thead><tr><th scope='col'>id</th><th scope='col'>prompt</th>"
        f"<th scope='col'>answer</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div></details>"
    )


def _rank(row: "pd.Series[object] | None") -> str:
    if row is None or not pd.isna(row["reason"]) or pd.isna(row["rank"]):
        why = "no row" if row is None or pd.isna(row["reason"]) else str(row["reason"])
        return f"<td class='count' title='{escape(why)}'>–</td>"
    rank = int(row["rank"])
    return f"<td class='count'>{f'<strong>{rank}</strong>' if rank <= 5 else rank}</td>"


def _rules(table: pd.DataFrame) -> str:
    rules: dict[str, list[str]] = {}
    for graft, rule in zip(table["graft"], table["rule"], strict=True):
        known = rules.setdefault(str(graft), [])
        if str(rule) not in known:
            known.append(str(rule))
    items = "".join(
        f"<dt>{escape(graft)}</dt><dd>"
        f"{' or '.join(f'<code>{escape(rule)}</code>' for rule in known)}</dd>"
        for graft, known in rules.items()
    )
    return f"<dl>{items}</dl>"


def _definitions(value: Mapping[str, object]) -> str:
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{_described(inner)}</dd>" for key, inner in value.items()
    )
    return f"<dl>{items}</dl>"


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return _definitions(value) if value else "none"
    if isinstance(value, list | tuple):
        if not value:
            return "none"
        if any(isinstance(item, Mapping | list | tuple) for item in value):
            return f"<ol>{''.join(f'<li>{_described(item)}</li>' for item in value)}</ol>"
        return ", ".join(_described(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"<code>{escape(str(value))}</code>"


def _write_whole(path: Path, page: str) -> Path:
    # Written beside its place and moved there, so that a reader never sees half a page.
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return path


def _json(value: object) -> str:
    # Inside a script element only "<" can end it or start a comment.
    return json.dumps(_finite(value), allow_nan=False).replace("<", "\\u003c")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _variables(look: theme.Theme) -> str:
    return (
        f":root {{ --surface: {look.surface}; --text: {look.text}; --muted: {look.muted}; "
        f"--grid: {look.grid}; --sft: {theme.source_color('sft')}; }}"
    )


_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--surface); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
h4 { font-size: .95rem; margin: .75rem 0 .15rem; }
small { color: var(--muted); font-weight: normal; font-size: .85em; }
.lead { font-size: 1.15rem; margin: 0; padding: .75rem 1rem; border-left: 4px solid var(--sft); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
figure { margin: 0 0 1.5rem; }
figcaption, .notes, .legend { color: var(--muted); font-size: .9rem; }
.chart { width: 100%; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th small, td small { display: block; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--surface); }
.text { text-align: left; white-space: normal; min-width: 12rem; }
.ranks .text + .text { min-width: 8rem; }
summary { cursor: pointer; margin-bottom: .5rem; }
.tokens { margin: 0; line-height: 2.1; overflow-wrap: anywhere; }
.token, mark { display: inline-block; max-width: 100%; line-height: 1.5; padding: .1rem .12rem;
  border-radius: 2px; color: inherit; }
.token { border-bottom: 1px dotted var(--muted); margin-right: 2px; }
mark { border-bottom: 3px solid var(--sft); font-weight: 600; margin-right: 2px;
  background: color-mix(in srgb, var(--sft) 22%, transparent); }
.ws { color: var(--muted); font-weight: normal; user-select: none; }
.guesses { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .1rem 0 0;
  padding: 0; font-size: .9rem; color: var(--muted); }
.guesses .right { color: var(--text); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.25rem;
  margin: 0; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dd > dl { padding-left: .75rem; border-left: 2px solid var(--grid); }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 3rem; }
  h1 { font-size: 1.35rem; }
  .lead { font-size: 1.05rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .modebar { display: none !important; }
  mark, .lead { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, article > div { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: .7rem; }
  th, td { padding: .15rem .3rem; }
}
"""

_SCRIPT = """
const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
const charts = [...document.querySelectorAll(".chart")];
const settings = {responsive: true, displaylogo: false, showSendToCloud: false,
  displayModeBar: window.innerWidth > 640 ? "hover" : false,
  plotlyServerURL: "", modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"]};
function dress(chart, printing) {
  const look = looks[wantsDark.matches && !printing ? "dark" : "light"];
  const layout = {"font.color": look.text, "modebar.color": look.muted,
    "modebar.activecolor": look.text};
  for (const axis of Object.keys(chart.layout).filter(key => /^[xy]axis/.test(key))) {
    layout[axis + ".gridcolor"] = look.grid;
    layout[axis + ".linecolor"] = layout[axis + ".zerolinecolor"] = look.muted;
  }
  const bars = chart.data.map((trace, i) => trace.type === "bar" ? i : -1).filter(i => i >= 0);
  const outlines = {"error_y.color": look.text, "marker.line.color": look.text,
    "marker.pattern.fgcolor": look.surface, "marker.opacity": look.bar_opacity};
  return bars.length ? Plotly.update(chart, outlines, layout, bars)
                     : Plotly.relayout(chart, layout);
}
for (const chart of charts) {
  const figure = JSON.parse(document.getElementById(chart.id + "-figure").textContent);
  Plotly.newPlot(chart, figure.data, figure.layout, settings).then(() => dress(chart, false));
}
wantsDark.addEventListener("change", () => charts.forEach(chart => dress(chart, false)));
window.addEventListener("beforeprint", () => charts.forEach(chart => dress(chart, true)));
window.addEventListener("afterprint", () => charts.forEach(chart => dress(chart, false)));
"""
