"""What a summary says, in words and in aligned plain text."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from graftlens.references import are_references, common_tokens
from graftlens.viz.quantities import Quantity, measured, of_summary
from graftlens.viz.spelling import capital

#: From what difference on, as a share of the way from base to full, two measures disagree.
APART = 0.25

#: Most groups of prompts of which one sentence says what is best there.
NAMED = 3

Outcome = Literal["reproduced", "not reproduced", "untestable", "not checked"]


@dataclass(frozen=True)
class Verdict:
    """What one group of prompts says about the finding, and the numbers it rests on."""

    group: str
    outcome: Outcome
    sentence: str
    otherwise: str = ""
    """What recovery says, where it disagrees."""


def groups(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The summary's rows by group (the columns before `graft`), in order, named for a reader."""
    by = list(summary.columns[: summary.columns.get_loc("graft")])
    if not by:
        return {"all prompts": summary}
    parts = summary.groupby(by, sort=False, dropna=False, observed=True)
    return {_joined(key): part for key, part in parts}


def written(facts: Quantity, row: "pd.Series[object]", *, interval: bool = True) -> str:
    """A value with its interval, as in `92.5% [80.0, 97.5]` or `-1.20 [-1.41, -0.98]`."""
    ends = (facts.name, f"{facts.name}_low", f"{facts.name}_high")
    value, low, high = (float(row[name]) for name in ends)
    return _written(facts, value, low, high, interval)


def written_all(facts: Quantity, rows: pd.DataFrame, *, interval: bool = True) -> list[str]:
    """`written` for every row, fast for thousands of them."""
    ends = (facts.name, f"{facts.name}_low", f"{facts.name}_high")
    columns = (rows[name].to_numpy(dtype=float).tolist() for name in ends)
    return [
        _written(facts, value, low, high, interval)
        for value, low, high in zip(*columns, strict=True)
    ]


def _written(facts: Quantity, value: float, low: float, high: float, interval: bool) -> str:
    if math.isnan(value):
        return "n/a"
    text = f"{facts.number(value)}{'%' if facts.share else ''}"
    if not interval:
        return text
    if math.isnan(low):
        return f"{text} [n/a]"
    return f"{text} [{facts.number(low)}, {facts.number(high)}]"


def text_table(summary: pd.DataFrame, *, show: Sequence[str] | None = None) -> str:
    """An aligned plain-text table for a terminal; `show` chooses metrics (default: all)."""
    facts = [of_summary(summary, name) for name in (measured(summary) if show is None else show)]
    lines = []
    for name, part in groups(summary).items():
        first = part.iloc[0]
        lines.append(f"{name}: {prompts(int(first['n']))}{_left_out(int(first['not_run']))}")
        head = ["graft", *(fact.name for fact in facts)]
        rows = [
            [str(row["graft"]), *(written(fact, row) for fact in facts)]
            for _, row in part.iterrows()
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for cells in (head, *rows):
            start = cells[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
            lines.append("  ".join((f"  {start}", *rest)))
        lines.append("")
    lines.append(f"[low, high]: {level(summary)} intervals over {resampled(summary)}.")
    if "recovery" in [fact.name for fact in facts]:
        lines.append(f"recovery: {of_summary(summary, 'recovery').title}.")
    lines += filter(None, [common_note(summary)])
    notes = summary_notes(summary)
    return "\n".join([*lines, *(f"{where}: {note}." for where, note in notes)]) + "\n"


def level(summary: pd.DataFrame) -> str:
    """The level of the intervals, as in `95%`."""
    return f"{100 * float(summary['level'].iloc[0]):g}%"


def has_intervals(summary: pd.DataFrame, facts: Quantity) -> bool:
    """Whether any graft has one, but for the ends of recovery, which are 0 and 1 by definition."""
    low = summary[f"{facts.name}_low"]
    if facts.name == "recovery":
        low = low[~are_references(summary)]
    return bool(low.notna().any())


def whiskers(summary: pd.DataFrame, facts: Quantity) -> str:
    """What an axis says of the intervals: their level, or that there are none."""
    if has_intervals(summary, facts):
        return f"whiskers: {level(summary)} interval"
    few = "n" in summary and bool((summary["n"] <= 1).all())
    return "no interval: one prompt" if few else "no intervals"


def resampled(summary: pd.DataFrame) -> str:
    """What the intervals are over: prompts, or prompts grouped by a unit such as the fact."""
    unit = str(summary["unit"].iloc[0]) if "unit" in summary else "prompt"
    return "prompts" if unit == "prompt" else f"prompts grouped by {unit}"


def common_note(table: pd.DataFrame) -> str:
    """What is said of KL, JS and entropy in a table that has them over some tokens only; else
    nothing."""
    count = common_tokens(table)
    if count is None:
        return ""
    return f"KL, JS and entropy are over the {count:,} tokens that all sources have, renormalised."


def summary_notes(summary: pd.DataFrame) -> list[tuple[str, str]]:
    """Which rows have no mean, no recovery or no interval of it, and why: (where, why), merged by
    group."""
    notes: list[tuple[str, str]] = []
    for column, what in (("note", ""), ("recovery_note", "recovery, ")):
        if column not in summary:
            continue
        for name, part in groups(summary).items():
            for why in dict.fromkeys(part[column].dropna()):
                named = part.loc[part[column] == why, "graft"]
                where = "every graft" if len(named) == len(part) else ", ".join(named)
                notes.append((f"{what}{name}, {where}", str(why)))
    return notes


def verdicts(
    summary: pd.DataFrame,
    *,
    metric: str = "top5",
    sufficient: str = "FE+LT",
    complement: str = "(FE+LT)^C",
    base: str = "PRE",
    full: str = "SFT",
) -> tuple[Verdict, ...]:
    """Group by group: do the weights at `sufficient` bring the fact back, and the rest not?

    *Untestable*: the interval of `full` is not above that of `base`. *Reproduced*: `sufficient`
    covers at least half of the way from base to full, `complement` less than half, and their
    intervals do not overlap. All else is *not reproduced*. Where one of the four grafts is not in
    the summary, nothing is claimed (*not checked*). Where the summary's recovery, which is of
    another metric, says of one of the two that it covers a share of the way that differs by `APART`
    or more, the sentence says both. For metrics where more is better.
    """
    facts = of_summary(summary, metric)
    found = []
    for name, part in groups(summary).items():
        rows = {str(row["graft"]): row for _, row in part.iterrows()}
        said = {graft: f"{graft} {written(facts, row)}" for graft, row in rows.items()}
        missing = [graft for graft in (base, full, sufficient, complement) if graft not in rows]
        if missing:
            numbers = "; ".join(said.values())
            outcome: Outcome = "not checked"
            why = f"{', '.join(missing)} was not run, so the finding is not checked here"
            otherwise = ""
        else:
            numbers = "; ".join(said[graft] for graft in (base, full, sufficient, complement))
            four = [rows[graft] for graft in (base, full, sufficient, complement)]
            outcome, why = _judge(facts, *four)
            otherwise = _otherwise(facts, summary, *four)
        n = prompts(int(part["n"].iloc[0]))
        sentence = " ".join(filter(None, [f"{name} ({n}): {numbers}. {why}.", otherwise]))
        found.append(Verdict(name, outcome, sentence, otherwise))
    return tuple(found)


def ranked(facts: Quantity, part: pd.DataFrame) -> pd.DataFrame:
    """The rows of a group whose graft has a value, without the ends of recovery, the best first."""
    rows = part[~are_references(part) & part[facts.name].notna()]
    return rows.sort_values(facts.name, ascending=facts.lower_is_better, kind="stable")


def leading(summary: pd.DataFrame, metric: str) -> str:
    """Which graft does most by a metric, group by group of up to `NAMED`, in one sentence; empty
    where there are not several to choose from. Of models that ran one after another, it is about
    the last."""
    facts, several = of_summary(summary, metric), "member" in summary
    if several:
        summary = summary[summary["member"] == summary["member"].iloc[-1]]
    parts = {name: ranked(facts, part) for name, part in groups(summary).items()}
    firsts = {name: rows for name, rows in parts.items() if len(rows) > 1}
    if not firsts:
        return ""
    said = [
        f"{f'in {name} ' if several or len(firsts) > 1 else ''}{rows.iloc[0]['graft']} "
        f"{written(facts, rows.iloc[0])}"
        for name, rows in firsts.items()
    ]
    count = max(map(len, firsts.values()))
    more = len(said) - NAMED
    rest = f"; and in {more} more groups of prompts, see below" if more > 0 else ""
    best = "least" if facts.lower_is_better else "most"
    return f"Of {count} grafts, {best} {facts.label}: {'; '.join(said[:NAMED])}{rest}."


def headline(
    summary: pd.DataFrame,
    *,
    metric: str = "top5",
    sufficient: str = "FE+LT",
    complement: str = "(FE+LT)^C",
    base: str = "PRE",
    full: str = "SFT",
) -> str:
    """What the summary shows in a sentence or two, also where the finding did not reproduce."""
    facts = of_summary(summary, metric)
    found = verdicts(
        summary,
        metric=metric,
        sufficient=sufficient,
        complement=complement,
        base=base,
        full=full,
    )
    named: dict[Outcome, list[str]] = {}
    for verdict in found:
        named.setdefault(verdict.outcome, []).append(verdict.group)
    if list(named) == ["not checked"]:
        return (
            f"{facts.label[0].upper()}{facts.label[1:]} of {summary['graft'].nunique()} grafts; "
            f"whether {sufficient} is enough was not checked, because "
            f"{', '.join((base, full, sufficient, complement))} were not all run."
        )
    count = len(found)
    claim = (
        f"by {facts.label}, {sufficient} alone brings the finetuned fact back and all other "
        "positions do not"
    )
    good, bad = named.get("reproduced", []), named.get("not reproduced", [])
    if good:
        where = f" in {_out_of(good, count)}" if count > 1 else ""
        start = f"The finding is reproduced{where}: {claim}"
    elif bad:
        where = f" in {_out_of(bad, count, every='any of the')}" if count > 1 else ""
        start = f"The finding did NOT reproduce{where} (the claim: {claim})"
    else:
        start = f"The finding could not be tested: {full} is not clearly better than {base}"
    about = good or bad or named["untestable"]
    ranges = ", ".join(
        f"{graft} {_range(facts, summary, about, graft)}"
        for graft in (sufficient, complement, base, full)
    )
    ends = []
    if good and bad:
        ends.append(f"It did NOT reproduce in {', '.join(bad)}.")
    if "untestable" in named and (good or bad):
        ends.append(f"It could not be tested in {', '.join(named['untestable'])}.")
    if "not checked" in named:
        ends.append(f"It was not checked in {', '.join(named['not checked'])}.")
    if apart := [verdict.group for verdict in found if verdict.otherwise]:
        recovered = of_summary(summary, "recovery")
        reached, rest = (
            f"{graft} {_range(recovered, summary, apart, graft)}"
            for graft in (sufficient, complement)
        )
        ends.append(
            f"{capital(recovered.label)} disagrees in {', '.join(apart)}: {reached}, {rest}."
        )
    return " ".join((f"{start}; {facts.label} {ranges}.", *ends))


def _judge(
    facts: Quantity,
    base: "pd.Series[object]",
    full: "pd.Series[object]",
    sufficient: "pd.Series[object]",
    complement: "pd.Series[object]",
) -> tuple[Outcome, str]:
    name = facts.name
    names = [str(row["graft"]) for row in (base, full, sufficient, complement)]
    if int(base["n"]) == 0:
        return "untestable", "No prompt ran under every graft"
    if not float(full[f"{name}_low"]) > float(base[f"{name}_high"]):
        return "untestable", f"{names[1]} is not clearly better than {names[0]}: nothing to test"
    gap = float(full[name]) - float(base[name])
    reached, rest = (
        (float(row[name]) - float(base[name])) / gap for row in (sufficient, complement)
    )
    apart = float(sufficient[f"{name}_low"]) > float(complement[f"{name}_high"])
    numbers = (
        f"of the way from {names[0]} to {names[1]}, {names[2]} covers {100 * reached:.0f}% and "
        f"{names[3]} {100 * rest:.0f}%"
    )
    if reached >= 0.5 and rest < 0.5 and apart:
        return "reproduced", f"Reproduced: {numbers}"
    if reached >= 0.5 and rest < 0.5:
        return "not reproduced", f"Not reproduced: {numbers}, but their intervals overlap"
    return "not reproduced", f"Not reproduced: {numbers}"


def _otherwise(
    facts: Quantity,
    summary: pd.DataFrame,
    base: "pd.Series[object]",
    full: "pd.Series[object]",
    sufficient: "pd.Series[object]",
    complement: "pd.Series[object]",
) -> str:
    """What recovery says of two grafts, where it says of one of them what `facts` does not."""
    if "recovery_low" not in summary or facts.name in ("recovery", summary["recovery_of"].iloc[0]):
        return ""
    recovered = of_summary(summary, "recovery")
    gap = float(full[facts.name]) - float(base[facts.name])
    apart = []
    for row in (sufficient, complement):
        share = (float(row[facts.name]) - float(base[facts.name])) / gap if gap > 0 else 0.0
        apart.append(abs(float(row["recovery"]) - share) >= APART)
    if not any(apart):
        return ""
    said = " and ".join(
        f"{row['graft']} {written(recovered, row)}" for row in (sufficient, complement)
    )
    return f"{capital(recovered.label)} disagrees: {said} ({recovered.unit})."


def _range(facts: Quantity, summary: pd.DataFrame, about: Sequence[str], graft: str) -> str:
    """The least and the greatest value of one graft over the groups that a sentence is about."""
    parts = [part for name, part in groups(summary).items() if name in about]
    rows = pd.concat(parts)
    values = rows.loc[rows["graft"] == graft, facts.name].dropna()
    if len(values) == 0:
        return "n/a"
    ends = [facts.number(float(end)) for end in (values.min(), values.max())]
    return " to ".join(dict.fromkeys(ends)) + ("%" if facts.share else "")


def _out_of(named: Sequence[str], count: int, every: str = "all") -> str:
    if len(named) == count:
        return f"{every} {count} groups of prompts"
    return f"{len(named)} of {count} groups of prompts ({', '.join(named)})"


def _joined(key: Hashable) -> str:
    return " · ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def prompts(n: int) -> str:
    """A number of prompts in words."""
    return f"{n} prompt" if n == 1 else f"{n} prompts"


def _left_out(n: int) -> str:
    return f", {n} left out (did not run under every graft)" if n else ""
