"""An experiment's tables, figures and page, made from its summaries."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.experiment.analysis import PartTables, as_bars
from graftlens.experiment.config import ExperimentConfig, FigureConfig, PartConfig
from graftlens.find.found import Found
from graftlens.folder import inside
from graftlens.stats.chance import few_answers
from graftlens.sweep.config import Checked
from graftlens.textreports import rate_table
from graftlens.viz import text
from graftlens.viz.export import write_figure
from graftlens.viz.figures import bar_chart, dose_chart, heat_map, interaction_chart, line_chart
from graftlens.viz.interactions import WORDS, sentences
from graftlens.viz.localisation import found_figures
from graftlens.viz.page import Figure, Part, Table
from graftlens.viz.reading import glossary, nothing_learnt
from graftlens.viz.spelling import headed
from graftlens.viz.sweepcharts import main_metric
from graftlens.viz.tables import write_table
from graftlens.viz.textspage import Rates

#: Most grafts whose rules a page lists; most grafts that a note names.
LISTED, SHOWN = 60, 5

#: Of a localisation's table, what its file's name ends in.
FOUND = "found"

#: The longest name of a figure's file, without its suffix, in UTF-8 bytes.
LONGEST_STEM = 160


def show_part(
    name: str,
    config: ExperimentConfig,
    checked: Checked,
    tables: PartTables,
    out: Path,
    stems: set[str],
) -> tuple[Part, str]:
    """Write a part's tables (CSV, Markdown) and figures (HTML, and PNG and SVG if there is a
    browser) into `out/tables` and `out/figures`.

    Args:
        name: the part's.
        config: the experiment.
        checked: the part's sweep.
        tables: its results.
        out: the experiment's folder.
        stems: names of the figures that earlier parts wrote; this part's are added.

    Returns:
        The part for the page, and a sentence about its finding (empty without one).

    Raises:
        ValueError: a figure that cannot be drawn from these results; the message says which.
    """
    part = config.parts[name]
    shown = []
    for number, wanted in enumerate(part.shown if checked.scored else ()):
        grids = ", ".join(wanted.grids or ())
        label = grids or (str(number) if len(part.shown) > 1 else "")
        try:
            for stem, figure in _figures(wanted, part, tables):
                words = "-".join(filter(None, [name, label, stem]))
                file = inside(out, "figures") / _unlike(plain(words), stems)
                title = headed(
                    f"{part.title}{f' ({grids})' if grids else ''}", stem.replace("-", " ")
                )
                written = write_figure(figure.figure, file, title=title, shared=True)
                caption = f"{grids}: {figure.caption}" if grids else figure.caption
                figure = replace(figure, files=written.paths, skipped=written.skipped)
                shown.append(replace(figure, caption=caption))
        except ValueError as error:
            raise ValueError(f"parts.{name}.figures.{number}: {error}") from None
    players = tables.interactions
    if players is not None:
        drawn = interaction_chart(players.table, players.pairs)
        file = inside(out, "figures") / _unlike(plain(f"{name}-interactions"), stems)
        written = write_figure(drawn.figure, file, title=headed(part.title, "interactions"))
        why = "".join(f" (No {kind}: {why}.)" for kind, why in written.skipped.items())
        shown.append(replace(drawn, caption=drawn.caption + why, files=written.paths))
    for measure, drawn in _rates(tables).charts().items():
        file = inside(out, "figures") / _unlike(plain(f"{name}-rate-{measure}"), stems)
        written = write_figure(drawn.figure, file, title=headed(part.title, measure), shared=True)
        shown.append(replace(drawn, files=written.paths, skipped=written.skipped))
    rules = {named.name: str(named.graft) for named in checked.grafts}
    more = len(rules) - LISTED
    headline, verdicts = _finding(part, tables)
    return Part(
        title=part.title,
        text=part.text,
        findings=[
            *filter(None, [headline]),
            *verdicts,
            *(sentences(players.pairs) if players is not None else ()),
            *_notes(part, checked, tables),
        ],
        figures=shown,
        tables=list(_tables(name, tables, out)),
        rules={
            **dict(list(rules.items())[:LISTED]),
            **({"…": f"{more} more: see grafts.yaml in the sweep's folder"} if more > 0 else {}),
        },
        glossary=glossary(tables.template) | (WORDS if players is not None else {}),
        warnings=_warnings(part, checked, tables),
    ), headline


def _rates(tables: PartTables) -> Rates:
    return Rates(tables.rates, tables.rates_by_template)


def _warnings(part: PartConfig, checked: Checked, tables: PartTables) -> list[str]:
    """Why the part's numbers may mean less than they seem to. In a part that is about texts alone,
    nothing is read from the answers' tokens."""
    of_texts = len(tables.rates) and tables.interactions is None
    if of_texts and not (part.finding or part.figures or part.named_grids):
        return []
    answers = [prompt.answer for prompt in (checked.prompts if checked.scored else ())]
    shown = {metric for figure in part.figures for metric in figure.metrics}
    shown |= {part.finding.metric} if part.finding else set()
    few = few_answers(answers) if "top5" in shown or not shown else []
    return [*nothing_learnt(tables.template), *few]


def leading(tables: PartTables) -> str:
    """What a part without a finding shows, in a sentence or two; empty where it shows nothing."""
    if tables.interactions is not None:
        return " ".join(sentences(tables.interactions.pairs)[:2])
    if said := _rates(tables).leading():
        return said
    if not {"recovery", "logprob"} <= {*tables.pooled}:
        return ""
    return text.leading(tables.pooled, main_metric(tables.pooled))


def show_found(name: str, part: PartConfig, found: Found, out: Path, stems: set[str]) -> Part:
    """Write a localisation's tables and figures as `show_part` does a sweep's.

    Args:
        name: the part's.
        part: the part.
        found: what it found.
        out: the experiment's folder.
        stems: names of the figures that earlier parts wrote; this part's are added.

    Returns:
        The part for the page.
    """
    figures = []
    for stem, figure in found_figures(found).items():
        file = inside(out, "figures") / _unlike(plain(f"{name}-{stem}"), stems)
        written = write_figure(figure.figure, file, title=headed(part.title, stem))
        why = "".join(f" (No {kind}: {why}.)" for kind, why in written.skipped.items())
        figures.append(replace(figure, caption=figure.caption + why, files=written.paths))
    shown = []
    for kind, caption, frame in (
        (FOUND, "On held-out prompts, with facts as resampling units", found.summary),
        ("sites", "Every searched site", found.table),
    ):
        files = write_table(frame, inside(out, "tables") / f"{name}-{kind}", caption=caption)
        shown.append(Table(caption, frame, files))
    return Part(
        title=part.title,
        text=part.text,
        findings=[found.sentence, *found.notes],
        figures=figures,
        tables=shown,
        rules={"found": found.text, **{n: str(g) for n, g in part.grafts.items()}},
        warnings=nothing_learnt(found.summary),
    )


def _notes(part: PartConfig, checked: Checked, tables: PartTables) -> Iterator[str]:
    """What a reader must know that is not in the tables."""
    lacking = [name for name in part.where_possible if name not in checked.config.grafts]
    if lacking:
        yield (
            f"Left out, because {checked.arch.family} lacks a component that they name: "
            f"{'; '.join(lacking)}."
        )
    if note := text.common_note(tables.template):
        yield note
    for name in part.named_grafts():
        if name in checked.duplicates:
            yield f"{name} is the same graft as {checked.duplicates[name]} and was run once."
    if tables.failed:
        yield (
            f"{tables.failed} of {tables.cells} cells could not be run. A prompt counts only if it "
            "ran under every graft of its table."
        )
        for where, group in text.groups(tables.template).items():
            used, lost = int(group["n"].iloc[0]), int(group["not_run"].iloc[0])
            failed = group.loc[group["failed"] > 0, "graft"].astype(str).tolist()
            if lost:
                named = ", ".join(failed[:SHOWN]) + (" and others" if len(failed) > SHOWN else "")
                yield f"{where}: {lost} of {used + lost} prompts are not counted, due to {named}."


def _tables(name: str, tables: PartTables, out: Path) -> Iterator[Table]:
    kinds: tuple[tuple[str, str, pd.DataFrame], ...] = (
        ("pooled", "All templates together, with facts as resampling units", tables.pooled),
        ("grids", "The grids, all templates together", tables.pooled_grids),
        ("by-template", "Template by template", tables.template),
        *(
            (kind, f"Rates of generated texts{rest}", rate_table(rates) if len(rates) else rates)
            for kind, rest, rates in (
                ("rates", ", with facts as resampling units", tables.rates),
                ("rates-by-template", ", template by template", tables.rates_by_template),
            )
        ),
    )
    for kind, caption, frame in kinds:
        if len(frame):
            files = write_table(frame, inside(out, "tables") / f"{name}-{kind}", caption=caption)
            yield Table(caption, frame, files)
    if tables.interactions is None:
        return
    for kind, caption in (
        ("table", "Players: what each brings"),
        ("pairs", "Pairs of players: how they interact"),
        ("dividends", "Coalitions: what each adds beyond those within it (Harsanyi dividends)"),
        ("values", "Coalitions: the measures under each"),
    ):
        frame = getattr(tables.interactions, kind)
        if len(frame):
            stem = inside(out, "tables") / f"{name}-interactions-{kind}"
            files = write_table(frame, stem, caption=caption)
            yield Table(caption, frame.dropna(axis=1, how="all"), files)


def _finding(part: PartConfig, tables: PartTables) -> tuple[str, list[str]]:
    """What the templates show about the part's finding, together and each by itself."""
    if part.finding is None:
        return "", []
    ends = tables.template.iloc[0]
    names: dict[str, Any] = {
        "metric": part.finding.metric,
        "sufficient": part.finding.enough,
        "complement": part.finding.rest,
        "base": str(ends["base_run"]),
        "full": str(ends["full_run"]),
    }
    verdicts = text.verdicts(tables.template, **names)
    return text.headline(tables.template, **names), [verdict.sentence for verdict in verdicts]


def _figures(
    wanted: FigureConfig, part: PartConfig, tables: PartTables
) -> Iterator[tuple[str, Figure]]:
    """(what it is, the figure), one for each metric and, if they are separate, each group."""
    pooled = wanted.by == "pooled"
    if not wanted.of_grids:
        frame = tables.pooled if pooled else tables.template
        kept = wanted.grafts or tuple(part.named_grafts())
        if wanted.x == "step":
            for label, group in _apart(frame[frame["graft"].isin(kept)]):
                for metric in wanted.metrics:
                    stem = f"{metric}-{label}" if label else metric
                    yield stem, line_chart(group, "step", metric, series="graft")
            return
        frame = _in_order(frame, kept)
        for metric in wanted.metrics:
            yield metric, bar_chart(frame, metric)
        return
    frame = tables.pooled_grids if pooled else tables.template_grids
    grids = wanted.grids or tuple(dict.fromkeys(frame["grid"]))
    frame = frame[frame["grid"].isin(grids)]
    for label, drawn in _apart(frame):
        for metric in wanted.metrics:
            stem = f"{metric}-{label}" if label else metric
            if wanted.kind == "bars":
                figure = bar_chart(as_bars(drawn, wanted.x, wanted.panel), metric)
            elif wanted.kind == "heatmap":
                figure = heat_map(drawn, metric, x=wanted.x, y=wanted.y, panel=wanted.panel)
            elif wanted.x == "strength":
                figure = dose_chart(drawn, metric, series=wanted.panel)
            else:
                figure = line_chart(drawn, wanted.x, metric, series=wanted.panel)
            yield stem, figure


def _apart(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each dataset and template, and their names."""
    apart = [c for c in ("dataset", "template") if c in frame]
    split = frame.groupby(apart, sort=False, observed=True) if apart else [((), frame)]
    for key, group in split:
        yield "-".join(map(str, key)), group.drop(columns=apart)


def _in_order(frame: pd.DataFrame, grafts: tuple[str, ...]) -> pd.DataFrame:
    """The rows of some grafts, in the order given within each group."""
    place = {graft: number for number, graft in enumerate(grafts)}
    names = frame["graft"].astype(str)
    kept = frame[names.isin(place)].assign(_place=names.map(place))
    groups = list(frame.columns[: frame.columns.get_loc("graft")])
    if not groups:
        return kept.sort_values("_place", kind="stable").drop(columns="_place")
    parts = [
        group.sort_values("_place", kind="stable")
        for _, group in kept.groupby(groups, sort=False, observed=True)
    ]
    return pd.concat(parts).drop(columns="_place")


def plain(stem: str) -> str:
    """A file name without characters that cause trouble in file systems or links, cut if too
    long."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem)
    if len(name.encode()) <= LONGEST_STEM:
        return name
    start = name.encode()[: LONGEST_STEM - 11].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(stem.encode()).hexdigest()[:10]}"


def _unlike(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken; upper and lower case count as the same."""
    numbered, number = name, 1
    while numbered.casefold() in taken:
        number += 1
        numbered = f"{name}-{number}"
    taken.add(numbered.casefold())
    return numbered
