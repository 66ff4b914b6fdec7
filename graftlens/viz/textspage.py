"""Generated texts on a page: prompts down, grafts across, and how often texts are this or that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.folder import at_home, write_whole
from graftlens.outcomes.facts import examples
from graftlens.references import MEMBERS, are_references, in_steps
from graftlens.viz import text
from graftlens.viz.figures import bar_chart, line_chart
from graftlens.viz.page import Figure
from graftlens.viz.quantities import Quantity
from graftlens.viz.reading import glossary
from graftlens.viz.render import render

#: Most grafts that a page has texts of, and most texts.
GRAFTS, TEXTS = 16, 20_000

#: Most grafts besides the reference runs that are compared from model to model.
LINES = 12


#: Most labels of a measure that are shown under each graft, and texts of each.
LABELS, EXAMPLES = 8, 3


@dataclass(frozen=True)
class Labelled:
    """Some texts of each label that a measure gives, under each graft.

    Attributes:
        measure: its name.
        rows: per graft, its name, how many texts have a label, and its labels, the most frequent
            first: label, how many texts have it, and some of them: (text, prompt's number, answer
            or None).
    """

    measure: str
    rows: Sequence[tuple[str, int, Sequence[tuple[str, int, Sequence[tuple[str, int, Any]]]]]]


@dataclass(frozen=True)
class Texts:
    """What a page shows of texts.

    Attributes:
        charts: the rates, a chart for each measure.
        notes: what a reader must know of them.
        data: the texts as the page's script reads them.
        measures: what can be filtered by: (its number, what is read, whether it cannot be chosen).
        said: which texts are there.
        labelled: examples of each label, of measures of labels.
        members: of a source that stands for several models, each (its number, its name, whether it
            cannot be chosen), and the number of the one that is shown first.
    """

    charts: Sequence[Figure]
    notes: Sequence[str]
    data: Mapping[str, object]
    measures: Sequence[tuple[str, str, bool]]
    said: str
    members: tuple[Sequence[tuple[str, str, bool]], int] = ((), 0)
    labelled: Sequence[Labelled] = ()


#: What a chart of rates reads of them.
_DRAWN = ("rate", "rate_low", "rate_high", "n", "level", "resamples", "seed", "unit")


def rate_charts(rates: pd.DataFrame) -> dict[str, Figure]:
    """Measure -> a chart: a bar for each graft (of labels, for each graft and label) with its
    interval. Of models that ran one after another, the rates of each measure (of labels, of each)
    from one to the next: lines over their steps, or bars for each model where steps do not tell
    them apart.

    Args:
        rates: as `graftlens.outcomes.rate` gives it, `share` saying which measures are shares of
            texts.
    """
    rates = _summary(rates)
    groups = list(rates.columns[: rates.columns.get_loc("graft")])
    if "member" in rates:
        return _from_model_to_model(rates, [g for g in groups if g not in MEMBERS])
    charts = {}
    for measure, part in rates.groupby("measure", sort=False):
        labels = ["label"] if part["label"].notna().any() else []
        rows = part[[*groups, *labels, "graft", *_DRAWN]]
        charts[str(measure)] = bar_chart(rows, _quantity(str(measure), part))
    return charts


def _summary(rates: pd.DataFrame) -> pd.DataFrame:
    """Rates with the columns of a summary."""
    return rates.rename(columns={"low": "rate_low", "high": "rate_high"})


def _from_model_to_model(rates: pd.DataFrame, groups: Sequence[str]) -> dict[str, Figure]:
    along = in_steps(rates)
    charts = {}
    apart = ["measure", "label", *groups]
    for (measure, label, *group), part in rates.groupby(apart, sort=False, dropna=False):
        kind = [label] if isinstance(label, str) else []
        name = ": ".join(map(str, [measure, *kind, *group]))
        facts, drawn = _quantity(name, part), _furthest(part, LINES)
        if along:
            chart = line_chart(drawn[["step", "graft", *_DRAWN]], "step", facts, series="graft")
        else:
            chart = bar_chart(drawn[["member", "graft", *_DRAWN]], facts, legend_title="model")
        if (count := drawn["graft"].nunique()) < (every := part["graft"].nunique()):
            said = (
                f"{chart.caption} {count} of {every} grafts: those that differ most from the base."
            )
            chart = replace(chart, caption=said)
        charts[name] = chart
    return charts


def _furthest(part: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows of the `most` grafts whose rates are furthest from the base's under some model, and
    of the reference runs."""
    base = part[part["graft"] == part["base_run"]].set_index("member")["rate"]
    far = (part["rate"] - part["member"].map(base)).abs().where(~are_references(part))
    order = far.groupby(part["graft"], sort=False).max().sort_values(ascending=False, kind="stable")
    return part[part["graft"].isin(order.index[:most]) | are_references(part)]


def _quantity(label: str, part: pd.DataFrame) -> Quantity:
    share = bool(part["share"].all())
    unit, bounds = ("% of texts", (0.0, 1.0)) if share else ("mean", (None, None))
    return Quantity("rate", label=label, unit=unit, bounds=bounds)


@dataclass(frozen=True)
class Rates:
    """How often texts are what is measured of them: template by template, as a behaviour is due
    after some prompts and not after others. Labels, and models that ran one after another, are
    shown of all templates together.

    Attributes:
        together: as in `rate_charts`, of all templates.
        by_template: the same, of each template; without rows where that is not told.
    """

    together: pd.DataFrame
    by_template: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def apart(self) -> pd.DataFrame:
        """Those that are shown template by template."""
        rates = self.by_template
        return rates.iloc[:0] if "member" in rates or rates.empty else rates[rates["label"].isna()]

    def charts(self) -> dict[str, Figure]:
        """Measure -> its chart."""
        charts = {} if self.together.empty else rate_charts(self.together)
        return charts if self.apart.empty else charts | rate_charts(self.apart)

    def said(self) -> list[str]:
        """Of each measure, label and group of prompts in which the reference runs differ, a
        sentence."""
        apart = self.apart
        rest = self.together
        if len(apart):
            rest = rest[~rest["measure"].isin(set(apart["measure"]))]
        return [
            sentence
            for rates in (apart, rest)
            if len(rates)
            for sentence in rate_findings(told_apart(rates))
        ]

    def leading(self) -> str:
        """What a page that is about texts alone begins with; empty where nothing is measured."""
        if self.together.empty or "member" in self.together:
            return ""
        base, full = (str(self.together[f"{run}_run"].iloc[0]) for run in ("base", "full"))
        alike = f"{full} and {base} have the same rates, so that recovery of these has no meaning."
        return next(iter(self.said()), alike)


def shown_texts(
    table: pd.DataFrame, rates: Rates, measures: Sequence[str], grafts: Sequence[str]
) -> Texts:
    """What a page shows of a table of texts.

    Args:
        table: as `graftlens.read_texts` gives it.
        rates: of its measures; where there are none, there are no charts.
        measures: the columns of its measures.
        grafts: the grafts, those to show first in front.
    """
    notes = []
    kept = list(grafts)[:GRAFTS]
    if len(kept) < len(grafts):
        notes.append(f"Texts of {len(kept)} of {len(grafts)} grafts are here; read_texts has all.")
    part = table[table["graft"].isin(kept)]
    each = max(1, len(part) // max(1, part["prompt"].nunique()))
    prompts = part.drop_duplicates("prompt")
    count = len(prompts)
    prompts = prompts.iloc[: max(1, TEXTS // each)]
    part = part[part["prompt"].isin(prompts["prompt"])]
    options: list[tuple[str, str | None]] = []
    for name in measures:
        values = part[name].dropna()
        if not pd.api.types.is_numeric_dtype(part[name].dtype):
            options += [(name, label) for label in _labels(values)]
        elif values.isin([0.0, 1.0]).all():
            options.append((name, None))
    unread = [name for name in measures if f"{name}_unread" in table]
    for name in unread:
        lost = int(table[f"{name}_unread"].notna().sum())
        notes.append(f"{name}: {lost} replies of the judge could not be read; these have no value.")
    members = _members(part)
    last = table[table["graft"].isin(kept)]
    last = last[last["member"] == members[-1]] if "member" in last else last
    labelled = [_labelled(last, kept, name) for name in measures if _labels(last[name])]
    if any(last.groupby("graft")[one.measure].nunique().max() > LABELS for one in labelled):
        notes.append(f"Of each graft's labels the {LABELS} most frequent ones have examples here.")
    said = f"All {count:,} prompts are here."
    if len(prompts) < count:
        said = f"The first {len(prompts):,} of {count:,} prompts are here."
    return Texts(
        charts=[*rates.charts().values()],
        notes=notes,
        data=_data(part, prompts, kept, measures, options),
        measures=[
            (str(number), name if label is None else f"{name}: {label}", False)
            for number, (name, label) in enumerate(options)
        ],
        said=said,
        members=([(str(i), m, False) for i, m in enumerate(members)], len(members) - 1),
        labelled=labelled,
    )


def _labels(values: "pd.Series[Any]") -> list[str]:
    """The labels that a measure gives; none where it gives numbers."""
    numbers = pd.api.types.is_numeric_dtype(values.dtype)
    return [] if numbers else sorted({*map(str, values.dropna())})


def _labelled(table: pd.DataFrame, grafts: Sequence[str], name: str) -> Labelled:
    """What each graft says, by label."""
    some = dict([*examples(table, name, n=EXAMPLES).groupby(["graft", name], sort=False)])
    rows = []
    for graft in grafts:
        counts = table.loc[table["graft"] == graft, name].value_counts()
        labels = [
            (
                str(label),
                int(count),
                [
                    (str(row["text"]), int(row["prompt"]), row["answer"])
                    for row in some[graft, label].to_dict("records")
                ],
            )
            for label, count in counts.head(LABELS).items()
        ]
        if labels:
            rows.append((graft, int(counts.sum()), labels))
    return Labelled(name, rows)


def _members(table: pd.DataFrame) -> list[str]:
    """The models of a table that ran one after another; a nameless one where there is one alone."""
    return [*map(str, dict.fromkeys(table["member"]))] if "member" in table else [""]


def _data(
    part: pd.DataFrame,
    prompts: pd.DataFrame,
    grafts: Sequence[str],
    measures: Sequence[str],
    options: Sequence[tuple[str, str | None]],
) -> dict[str, object]:
    """Texts by model, prompt and graft: each is a list of its words, why it ended, and the values
    of its measures; or the reason why there is none."""
    rules = dict(zip(part["graft"].astype(str), part["rule"].astype(str), strict=True))
    rows = {number: i for i, number in enumerate(prompts["prompt"].tolist())}
    columns = {graft: i for i, graft in enumerate(grafts)}
    models = {name: i for i, name in enumerate(_members(part))}
    cells: list[list[list[list[object]]]] = [[[[] for _ in grafts] for _ in rows] for _ in models]
    if "member" not in part:
        part = part.assign(member="")
    names = ("member", "prompt", "graft", "text", "stop", "reason", *measures)
    for model, number, graft, words, stop, reason, *values in zip(
        *(part[name].tolist() for name in names), strict=True
    ):
        cell = cells[models[str(model)]][rows[number]][columns[str(graft)]]
        if isinstance(words, str):
            cell.append([words, stop, *(_value(value) for value in values)])
        elif not cell:
            cell.append(str(reason))
    return {
        "measures": list(measures),
        "options": [{"measure": [*measures].index(n), "label": label} for n, label in options],
        "grafts": [{"name": graft, "rule": rules.get(graft, "")} for graft in grafts],
        "prompts": [
            {"number": number, "text": str(words), "template": str(template), "answer": answer}
            for number, words, template, answer in zip(
                *(prompts[n].tolist() for n in ("prompt", "prompt_text", "template", "answer")),
                strict=True,
            )
        ],
        "cells": cells,
    }


def _value(value: Any) -> object:
    if isinstance(value, str):
        return value
    return None if value is None or value != value else float(f"{float(value):.4g}")


def texts_page(
    path: str | Path,
    *,
    title: str,
    lead: str,
    texts: Texts,
    rates: Rates,
    notes: Sequence[str],
    trust: str,
    trusted: bool,
    provenance: Mapping[str, object],
) -> Path:
    """Write the page of a sweep that makes texts alone, and return it; the file appears whole or
    not at all."""
    path = at_home(path)
    html = render(
        "textsweep.html",
        title=title,
        lead=" ".join(filter(None, [rates.leading(), lead])),
        findings=[*rates.said(), *notes],
        # Of rates no page shows a recovery.
        glossary=glossary(_summary(rates.together).drop(columns="recovery_low", errors="ignore")),
        texts=texts,
        trust=trust,
        trusted=trusted,
        provenance=provenance,
        folder=path.parent,
    )
    return write_whole(path, html)


def rate_findings(rates: pd.DataFrame) -> list[str]:
    """What each measure shows between the two reference runs, group by group of prompts, in a
    sentence."""
    found = []
    for (measure, label, *group), part in rates.groupby(_keys(rates), sort=False, dropna=False):
        base, full = (str(part[f"{run}_run"].iloc[0]) for run in ("base", "full"))
        rows = part.set_index(part["graft"].astype(str))
        if base not in rows.index or full not in rows.index:
            continue
        facts = Quantity(
            "rate", str(measure), "", bounds=(0.0, 1.0) if part["share"].all() else (None, None)
        )
        rows = _summary(rows)
        said = ", ".join(f"{name} {text.written(facts, rows.loc[name])}" for name in (base, full))
        others = rows.drop([base, full])
        others = others[others["rate"].notna()]
        if len(others):
            most = others.loc[others["rate"].idxmax()]
            value = text.written(facts, most)
            said += (
                f"; of {len(others)} other grafts most under {most['graft']} ({value})"
                if len(others) > 1
                else f", {most['graft']} {value}"
            )
        name = measure if not isinstance(label, str) else f"{measure}: {label}"
        where = f" ({', '.join(map(str, group))})" if group else ""
        found.append(f"{name}{where}: {said}.")
    return found


def told_apart(rates: pd.DataFrame) -> pd.DataFrame:
    """The rates of those measures, labels and groups of prompts in which the two reference runs
    differ."""
    ends = rates["graft"].isin({*rates["base_run"], *rates["full_run"]})
    each = rates["rate"].where(ends).groupby([rates[key] for key in _keys(rates)], dropna=False)
    return rates[each.transform("nunique") > 1]


def _keys(rates: pd.DataFrame) -> list[str]:
    """The columns that name what is measured, and then the group of prompts."""
    groups = rates.columns[: rates.columns.get_loc("graft")]
    return ["measure", "label", *(name for name in groups if name not in ("measure", "label"))]
