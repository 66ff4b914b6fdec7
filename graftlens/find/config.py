"""The config of a localisation: prompts and sources as in a sweep, and what is searched."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graftlens.components import suggest
from graftlens.configfile import ConfigError, read_settings
from graftlens.data.languagemodels import told_on_command_line
from graftlens.find.asked import EACH, Outside
from graftlens.find.attribution import ALLOWED
from graftlens.find.judging import BASE, FULL, Goal
from graftlens.find.localisation import compared
from graftlens.graft import Graft
from graftlens.metrics import Measure, known
from graftlens.model.made import SourceField
from graftlens.outcomes.measures import gives_labels, named
from graftlens.sweep.cells import refuse_taken
from graftlens.sweep.config import Metrics, RunSettings, SweepConfig
from graftlens.sweep.grid import GraftField
from graftlens.sweep.outcomesettings import OutcomeSettings, TextFunction
from graftlens.sweep.promptsets import (
    DatasetSection,
    PromptColumn,
    PromptFile,
    PromptSection,
    Section,
    listed,
    prompt_sections,
)

Count = Annotated[int, Field(ge=0)]

#: What a localisation keeps of each cell by default.
_KEPT: Mapping[str, Any] = {"top_k": 5, "answers": "first"}


class Search(Section):
    """What a localisation searches, and how it reports (see `graftlens.find.localise`)."""

    positions: tuple[str, ...] | Literal["each"]
    """Spans that do not overlap, `rest` for all other tokens; or `each`, every token by itself,
    for a single prompt."""

    source: str | None = None
    """The source that is searched; by default the second one."""

    target: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The recovery to reach."""

    metric: str = "logprob"
    """The measure that recovery is of: of one token or an answer, or one of `outcomes.measures`."""

    continuations: Literal["full", "answers"] = "full"
    """Where texts judge, what gradients are of the log-probability of: the source's own greedy
    texts, or the prompts' answers."""

    goal: Goal = "sufficient"
    """`sufficient`: enough in the base; `necessary`: the full source does without it no more than 1
    - target; `both`."""

    by: Literal["site", "head", "neuron"] = "site"
    """Whole sites, or down to heads or neurons inside the found ones."""

    steps: Annotated[int, Field(ge=1, le=ALLOWED)] | Literal["auto"] = "auto"
    """Steps of each attribution; `auto` doubles them until the scores add up."""

    within: GraftField | None = None
    """A graft whose places the search keeps to."""

    outside: Outside = "base"
    """What runs at places that are not searched."""

    split_by: str | None = None
    """What tells facts apart: a field, `answer` or `prompt`; by default the field `fact` where all
    prompts have one, else the answer."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of the facts that is reported on."""

    rounds: Count = 2
    """Most rounds of refinement."""

    random: Count = 100
    """Random sets to compare with, matched by component and position."""

    resamples: Count = 20
    """Resamples of the facts for stability."""

    effects: bool = False
    """Whether to measure each site alone in the base and missing from the full source as well,
    which takes longer than all the rest."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if known(metric) is None and not metric.isidentifier():
            raise ValueError(f"{metric!r} is not the name of a measure.")
        return metric

    def options(self) -> dict[str, Any]:
        """The arguments of `attribute` and `exact_effects` alike."""
        positions = self.positions if self.positions == EACH else list(self.positions)
        return {
            "positions": positions,
            "metric": self.metric,
            "within": self.within,
            "outside": self.outside,
        }


class LocaliseConfig(RunSettings):
    """Where to look for what a source does. One YAML file holds it all.

    Paths are relative to the working directory.
    """

    sources: Mapping[str, SourceField]
    """Name -> checkpoint folder, adapter folder, hub id or what the source is made of, the base
    first, two or more."""

    search: Search
    """What is searched, and how it is reported."""

    dataset: Annotated[tuple[DatasetSection, ...], BeforeValidator(listed)] = ()
    """One or more sets of prompts about the facts of a dataset."""

    templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Evaluation templates of the datasets, by name; by default all."""

    outcomes: OutcomeSettings | None = None
    """Texts that are generated under every graft, and measures of them; the one that
    `search.metric` names is the judge. Prompts need no answer then."""

    prompts: Annotated[
        tuple[PromptSection | PromptFile | PromptColumn, ...], BeforeValidator(prompt_sections)
    ] = ()
    """Prompts of your own, as in a sweep."""

    grafts: Mapping[str, GraftField] = {}
    """Name -> graft to report beside the found set; by default the position grafts."""

    metrics: Metrics = Metrics(**_KEPT)
    """What is kept of each cell, besides what the search and its report need."""

    shards: Annotated[int, Field(ge=1)] = 1024
    """Cells (a prompt under a graft) per shard, about: what a kill costs."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _in_part(cls, given: Any) -> Any:
        """What is not said of them is as without the key, and not as in a sweep."""
        return {**_KEPT, **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _as_a_sweep(self) -> "LocaliseConfig":
        others = list(self.sources)[1:]
        if self.search.source is not None and self.search.source not in others:
            what = f"{self.search.source!r} is not a source besides the base. There are: "
            raise ConfigError(("search.source", f"{what}{' '.join(others)}."))
        self.sweep()
        if self.grafts:
            try:
                compared((), self.source, self.grafts)
            except ValueError as error:
                raise ConfigError(("grafts", str(error))) from None
        if problems := [*text_problems(self.search, self.outcomes)]:
            raise ConfigError(*((f"search.{key}", what) for key, what in problems))
        row = None if self.outcomes is not None else known(self.search.metric)
        if row is not None and row.over == "answer" and self.metrics.answers != "whole":
            what = f"{row.name} needs metrics.answers: whole. Set it, or choose another metric."
            raise ConfigError(("search.metric", what))
        return self

    @property
    def source(self) -> str:
        """The source that is searched."""
        return self.search.source or list(self.sources)[1]

    def sweep(self) -> SweepConfig:
        """The sweep that the exact runs are steps of: all prompts under the comparisons.

        Raises:
            ConfigError: everything that is wrong with sources, prompts or grafts.
        """
        shared = set(RunSettings.model_fields) | {"sources", "dataset", "templates", "prompts"}
        judged = () if self.outcomes is not None else _measured(self.search.metric)
        asked = dict.fromkeys((*self.metrics.measures, *judged))
        metrics = self.metrics.model_copy(update={"measures": tuple(asked)})
        values = {name: getattr(self, name) for name in shared if name != "metrics"}
        whole = {FULL: Graft.rule(self.source)} if len(self.sources) > 1 else {}
        names = {BASE: Graft(), **whole, **self.grafts}
        kept = {
            k: v for k, v in values.items() if v not in ((), None) or k in self.model_fields_set
        }
        return SweepConfig(**kept, metrics=metrics, grafts=names, outcomes=self.outcomes)


def text_problems(search: Search, outcomes: OutcomeSettings | None) -> Iterator[tuple[str, str]]:
    """What of a search does not go with texts as its judge, or without: (key, what)."""
    if outcomes is None:
        if search.continuations != "full":
            yield (
                "continuations",
                "these are for texts as the judge. Give outcomes, or leave it out.",
            )
        return
    if search.metric in outcomes.measures:
        if what := no_judge(search.metric, outcomes):
            yield "metric", what
    else:
        there = " ".join(outcomes.measures) or "none"
        hint = suggest(search.metric, outcomes.measures)
        yield (
            "metric",
            f"{search.metric!r} is not one of outcomes.measures ({there}). Name the one that "
            f"judges, or leave outcomes out.{hint}",
        )
    if search.effects:
        yield (
            "effects",
            "every site by itself would take too long to judge by texts. Leave it out.",
        )


def no_judge(name: str, outcomes: OutcomeSettings, functions: Sequence[Measure] = ()) -> str:
    """Why a measure of texts cannot judge grafts; empty if it can, or if that is seen only once its
    function is imported, as those of `functions` are, or has read a text."""
    settings = outcomes.measures[name]
    given: Any = Measure(name, over="text")
    if settings.function is None:
        given = settings.made()
    for one in functions:
        if isinstance(one, TextFunction) and one.place == settings.function:
            given = one.given
    made = named(name, given)
    try:
        refuse_taken(made)
    except ValueError as error:
        return str(error)
    if not gives_labels(given):
        return ""
    return (
        f"{name!r} gives labels, which have no mean. Name a measure that gives a number, such as "
        "{contains: [...]} of what counts."
    )


def _measured(metric: str) -> tuple[str, ...]:
    """The measures that reports need and that not every table has."""
    row = known(metric)
    return ("kl_full",) if row is not None and row.always else (metric, "kl_full")


def load_localise(path: Path, overrides: Sequence[str] = ()) -> LocaliseConfig:
    """Read a localisation's YAML file, with `key=value` overrides (`search.target=0.9`).

    Raises:
        ConfigError: everything that is wrong with the file itself, at once.
    """
    return told_on_command_line(read_settings(LocaliseConfig, path, overrides), overrides)
