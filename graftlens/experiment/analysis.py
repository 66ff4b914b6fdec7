"""From a part's results to the tables that its figures draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from graftlens.configfile import ConfigError
from graftlens.experiment.config import ExperimentConfig, PartConfig
from graftlens.find.coalitions import Coalitions
from graftlens.find.config import no_judge
from graftlens.find.interactions import Interactions, measured_interactions
from graftlens.find.rating import beside, rated_cells
from graftlens.metrics import always_measured
from graftlens.prompts import Tokenized
from graftlens.references import COLUMNS as REFERENCES
from graftlens.references import COMMON_TOKENS, MEMBERS
from graftlens.reports import measured_in
from graftlens.stats import GRAFT_COLUMNS, summarise
from graftlens.stats.resampling import Draw
from graftlens.sweep.config import Checked
from graftlens.sweep.results import facts_of, read_manifest, read_results
from graftlens.sweep.texttables import read_texts
from graftlens.textreports import rare_in, text_rates

#: The axes of a grid's grafts, as columns.
TAGS = (
    *("grid", "position", "component", "layer", "head", "neuron", "strength", "source_rank"),
    *("source", "layers", "rate", "draw"),
)

#: The columns that say which prompts, and which model, a row is of.
GROUPS = (*MEMBERS, "dataset", "template")

#: What one graft is in a figure.
_MARKS = {"bars": "bar", "heatmap": "cell", "lines": "point"}

#: Columns of the results that statistics need besides the measures.
_NEEDED = ("prompt", "graft", "rule", *REFERENCES, "template", "dataset", "answer", "reason")


@dataclass(frozen=True)
class PartTables:
    """A part's results, summarised.

    Attributes:
        template: a row for each dataset (where there are several), template and graft, with
            intervals over prompts.
        pooled: all templates together, with intervals over facts.
        template_grids, pooled_grids: the same for the grafts of the part's grids, with their axis
            entries as columns (`TAGS`). Equal grafts each have their own row.
        cells: number of (prompt, graft).
        failed: number of cells that could not be run.
        interactions: how the part's players work together.
        rates, rates_by_template: how often its texts are what is measured (`text_rates`), all
            templates together and one by one.
    """

    template: pd.DataFrame
    pooled: pd.DataFrame
    template_grids: pd.DataFrame
    pooled_grids: pd.DataFrame
    cells: int
    failed: int
    interactions: Interactions | None = None
    rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    rates_by_template: pd.DataFrame = field(default_factory=pd.DataFrame)


def part_tables(
    config: ExperimentConfig, part: PartConfig, checked: Checked, folder: Path
) -> PartTables:
    """Read a finished sweep and summarise it.

    Args:
        config: the experiment.
        part: the part that the sweep is of.
        checked: the part's sweep.
        folder: the sweep's folder.
    """
    rates = _rates(part, checked, folder)
    if not checked.scored:
        none = pd.DataFrame()
        played = _interactions(part, checked, folder, none)
        return PartTables(none, none, none, none, cells=0, failed=0, interactions=played, **rates)
    own = checked.config.metrics.measures
    measured = [*(m.name for m in always_measured() if m.summary == "mean"), *own]
    members = MEMBERS if checked.members else ()
    there = read_manifest(folder).columns
    more = [COMMON_TOKENS] if COMMON_TOKENS in there else []
    table = read_results(folder, columns=[*members, *_NEEDED, *measured, *more])
    assert isinstance(table, pd.DataFrame)
    table = table.assign(fact=facts_of(folder).reindex(table["prompt"]).to_numpy())
    cells, failed = len(table), int(table["reason"].notna().sum())
    drawn = (metric for figure in part.shown for metric in figure.metrics)
    asked = [metric for metric in (*own, *drawn) if metric in measured]
    metrics = measured_in(table, asked, checked.config.metrics.answers)
    table = table[~table["graft"].isin(_of_generated(checked))]
    interactions = _interactions(part, checked, folder, table)
    table = table[~table["graft"].isin(_coalitions_alone(part, checked))]
    apart = (*members, *(("dataset",) if table["dataset"].nunique() > 1 else ()))
    frames = {}
    for name, by, unit in (("template", (*apart, "template"), "prompt"), ("pooled", apart, "fact")):
        frames[name] = summarise(
            table, by=by, ks=config.ks, metrics=metrics, unit=unit, seed=checked.config.seed
        )
    tags = _tags(part, checked)
    return PartTables(
        template=_with_twins(frames["template"], part, checked),
        pooled=_with_twins(frames["pooled"], part, checked),
        template_grids=_tagged(frames["template"], tags),
        pooled_grids=_tagged(frames["pooled"], tags),
        cells=cells,
        failed=failed,
        interactions=interactions,
        **rates,
    )


def _rates(part: PartConfig, checked: Checked, folder: Path) -> dict[str, pd.DataFrame]:
    """The rates of a part's texts, by the attributes of `PartTables`."""
    if checked.config.outcomes is None:
        return {}
    texts = read_texts(folder)
    rare = {*rare_in(texts, (checked.base, checked.full)), *_coalitions_alone(part, checked)}
    apart = ["dataset"] if texts["dataset"].nunique() > 1 else []
    found = {"rates": text_rates(folder, by=apart, facts=facts_of(folder), without=rare)}
    if texts["template"].nunique() > 1:
        by = [*apart, "template"]
        found["rates_by_template"] = text_rates(folder, by=by, without=rare)
    return found


def _of_generated(checked: Checked) -> set[str]:
    """The grafts of generated tokens, which have texts and no cells."""
    reached = {
        named.name
        for named in checked.grafts
        if any("generated" in rule.at.names() for rule in named.graft.rules)
    }
    return reached if checked.config.outcomes is not None else set()


def check_scored(part: PartConfig, checked: Checked) -> None:
    """Find what needs answers in a part whose prompts have none, before anything is trained.

    Raises:
        ConfigError: there is something.
    """
    if checked.scored:
        return
    what = "it needs prompts with answers, and none has one: the part makes texts alone."
    problems = [
        (key, f"{what} Leave it out.") for key in ("figures", "finding") if getattr(part, key)
    ]
    if of_cells := _played(part)[0]:
        fix = "Name measures of outcomes instead."
        problems.append(("interactions.metrics", f"{' '.join(of_cells)}: {what} {fix}"))
    if problems:
        raise ConfigError(*problems)


def _played(part: PartConfig) -> tuple[list[str], list[str]]:
    """The measures in which a part's players are compared: of cells, and of texts."""
    asked = part.interactions.metrics if part.interactions is not None else ()
    texts = part.outcomes.measures if part.outcomes is not None else {}
    return [n for n in asked if n not in texts], [n for n in asked if n in texts]


def _interactions(
    part: PartConfig, checked: Checked, folder: Path, cells: pd.DataFrame
) -> Interactions | None:
    """How the part's players work together, if it has any.

    Args:
        part, checked, folder: as in `part_tables`.
        cells: the sweep's, with facts; nothing is read of them where texts alone are compared.
    """
    if part.interactions is None:
        return None
    seed = checked.config.seed
    of_cells, of_texts = _played(part)
    table = cells
    if of_texts:
        said = rated_cells(read_texts(folder), of_texts)
        facts = facts_of(folder).reindex(said["prompt"]).to_numpy()
        table = beside(cells, said, of_texts) if of_cells else said.assign(fact=facts)
    return measured_interactions(
        part.interactions.coalitions(seed),
        table,
        part.interactions.metrics,
        Draw("fact", 0.95, 10_000, seed),
        margin=part.interactions.margin,
        ran=checked.duplicates,
    )


def _coalitions_alone(part: PartConfig, checked: Checked) -> set[str]:
    """The grafts that are only coalitions: none of the part's own, and no reference."""
    if part.interactions is None:
        return set()
    kept = {*part.named_grafts(), checked.base, checked.full, *_tags(part, checked)["graft"]}
    kept |= {checked.duplicates.get(name, name) for name in part.named_grafts()}
    return {*part.interactions.coalitions(checked.config.seed).grafts} - kept


def check_players(part: PartConfig, checked: Checked) -> None:
    """Find players that overlap, before anything is trained.

    Raises:
        ConfigError: they do, or no prompt can run them all.
    """
    if part.interactions is None:
        return
    planned = part.interactions.coalitions(checked.config.seed)
    of_cells, of_texts = _played(part)
    for name in of_texts:
        assert part.outcomes is not None
        if what := no_judge(name, part.outcomes, checked.functions):
            raise ConfigError(("interactions.metrics", what))
    if of_cells:
        ready, _ = checked.prepared.all(dict(enumerate(checked.prompts)))
        _can_play(planned, checked, {one.number: one.tokens for one in ready}, of_cells)
    if of_texts:
        generating, unread = checked.prepared.generating(checked.prompts)
        numbers = [n for n in range(len(checked.prompts)) if n not in unread]
        _can_play(planned, checked, dict(zip(numbers, generating, strict=True)), of_texts)


def _can_play(
    planned: Coalitions,
    checked: Checked,
    tokens: Mapping[int, Tokenized],
    metrics: Sequence[str],
) -> None:
    """That some prompt can run all players, and that they do not overlap."""
    left = planned.left_out(tokens)
    try:
        if len(left) == len(tokens):
            why = next(iter(left.values()), "none can be run")
            raise ValueError(f"none of {len(tokens)} prompts can run every player: {why}")
        fit = {number: those for number, those in tokens.items() if number not in left}
        planned.refuse_overlaps(fit, checked.arch, tuple(checked.config.sources), metrics)
    except ValueError as error:
        raise ConfigError(("interactions.players", str(error))) from None


def _with_twins(summary: pd.DataFrame, part: PartConfig, checked: Checked) -> pd.DataFrame:
    """The summary with a row for each named graft, also for one that equals another and was run
    under the other's name."""
    twins = {name: ran for name, ran in checked.duplicates.items() if name in part.named_grafts()}
    rows = [summary[summary["graft"] == ran].assign(graft=name) for name, ran in twins.items()]
    return pd.concat([summary, *rows], ignore_index=True) if rows else summary


def _tags(part: PartConfig, checked: Checked) -> pd.DataFrame:
    """A row for each graft of the part's grids: its tags, its name, and the name it ran under."""
    rows = [
        {"named": entry.name, "graft": checked.duplicates.get(entry.name, entry.name)}
        | {"grid": grid.name or str(number)}
        | dict(entry.tags)
        for number, grid in enumerate(part.grids)
        for entry in grid.grafts(checked.arch, tuple(checked.config.sources))
    ]
    return pd.DataFrame(rows, columns=["named", "graft", *TAGS])


def check_figures(part: PartConfig, checked: Checked) -> None:
    """Find figures that cannot be drawn, before anything is trained.

    Raises:
        ConfigError: every figure in which several grafts would be one bar, cell or point.
    """
    tags = _tags(part, checked)
    problems = []
    for number, figure in enumerate(part.shown):
        # Lines show several draws at one place (but not of strengths, where without a panel each
        # graft has its line), and named grafts have names of their own.
        alone = figure.x != "strength" or figure.panel is None
        if (figure.kind == "lines" and alone) or not figure.of_grids:
            continue
        axes = [figure.x, *([figure.y] if figure.kind == "heatmap" else [])]
        axes += [figure.panel] if figure.panel is not None else []
        rows = tags[tags["grid"].isin(figure.grids)] if figure.grids else tags
        if rows.duplicated(axes).any():
            what = (
                f"several grafts would be one {_MARKS[figure.kind]} "
                f"({', '.join(axes)} are equal). Name another axis or a panel, or fewer grids."
            )
            problems.append((f"figures.{number}", what))
    if problems:
        raise ConfigError(*problems)


def _tagged(summary: pd.DataFrame, tags: pd.DataFrame) -> pd.DataFrame:
    plain = summary.drop(columns=[c for c in (*GRAFT_COLUMNS, "source_rank") if c in summary])
    joined = tags.merge(plain.astype({"graft": str}), on="graft", how="inner")
    joined = joined.drop(columns="graft").rename(columns={"named": "graft"})
    lead = [c for c in GROUPS if c in joined]
    rest = [c for c in joined if c not in (*lead, "graft", *TAGS)]
    return joined[[*lead, "graft", *TAGS, *rest]]


def as_bars(frame: pd.DataFrame, label: str, group: str | None) -> pd.DataFrame:
    """A grid's summary as one that bars can show: bars named by `label`, coloured by `group`.

    Raises:
        ValueError: two grafts that would be the same bar.
    """
    groups = [group] if group is not None else []
    made = frame.drop(columns="graft").rename(columns={label: "graft"})
    if made.duplicated([*groups, "graft"]).any():
        raise ValueError(
            f"bars named by {label!r}, coloured by {group!r}: several grafts would be one bar. "
            "Draw fewer grids, or another x or panel."
        )
    rest = [c for c in made if c not in (*groups, "graft", *TAGS)]
    return made[[*groups, "graft", *rest]]
