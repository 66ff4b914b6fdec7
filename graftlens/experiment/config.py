"""The config of an experiment: one YAML file says everything, from the facts to the figures."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graftlens.components import suggest
from graftlens.configfile import ConfigError, read_settings, settings_from
from graftlens.data import AnyDataset, DatasetSpec, spec_of
from graftlens.data.languagemodels import told_on_command_line
from graftlens.find.coalitions import Coalitions
from graftlens.find.config import Search, no_judge, text_problems
from graftlens.finetune import FinetuneConfig
from graftlens.folder import name_problems, read_text
from graftlens.graft import Rule
from graftlens.metrics import always_measured, averaged, known
from graftlens.model.made import Each, SourceField, made_problems
from graftlens.positions import At
from graftlens.presets import PRESETS
from graftlens.shipped import Kind, config_file
from graftlens.sweep.config import RunSettings
from graftlens.sweep.graftsettings import GraftSettings, unknown_sources
from graftlens.sweep.grid import GraftField, Grid
from graftlens.sweep.outcomesettings import OutcomeSettings
from graftlens.sweep.promptsets import (
    PromptColumn,
    PromptFile,
    PromptSection,
    Questions,
    Section,
    listed,
    sections_by_key,
)

#: The pretrained model's name among an experiment's sources.
BASE = "base"

#: Keys that a recipe may not have: an experiment sets them elsewhere.
_ELSEWHERE = ("model", "output")

#: The axes of a grid's grafts, which a figure may use.
Axis = Literal[
    "position",
    "component",
    "layer",
    "head",
    "neuron",
    "strength",
    "source_rank",
    "source",
    "layers",
    "rate",
    "draw",
    "step",
]


class ModelConfig(Section):
    """A model to finetune, or one that was finetuned before (`path`)."""

    data: str | None = None
    """The dataset to train on, by its name in `datasets`."""

    change: Mapping[str, Any] = {}
    """Keys of that dataset to change for this model, such as `{half: a}` or
    `{directions: [ab]}`."""

    start: str = BASE
    """What training starts from: `base`, or another model of the experiment."""

    recipe: Mapping[str, Any] = {}
    """Keys of `graftlens finetune` for this model's training alone."""

    path: str | None = None
    """A checkpoint folder, adapter folder or hub id to use instead of training."""

    @model_validator(mode="after")
    def _data_or_path(self) -> "ModelConfig":
        if (self.data is None) == (self.path is None):
            given = "neither data (to train on) nor path is"
            if self.data is not None:
                given = "both data (to train on) and path are"
            raise ValueError(f"{given} given. Give one.")
        if self.path is not None and (self.change or self.recipe or self.start != BASE):
            raise ValueError(
                "change, start and recipe describe training; path names a trained model."
            )
        return self


class PromptsConfig(Questions):
    """Prompts about a dataset's facts."""

    dataset: str
    """The dataset, by its name in `datasets`."""

    change: Mapping[str, Any] = {}
    """Keys of that dataset to change, such as `{half: b}`: only half b counts as told."""


def _prompts(value: Any, info: Any) -> Any:
    own = dict.fromkeys(("template", "messages"), PromptSection)
    return sections_by_key(
        value, {"file": PromptFile, "column": PromptColumn, **own}, PromptsConfig, info
    )


class FigureConfig(Section):
    """A figure of a part's results, one for each metric."""

    kind: Literal["bars", "heatmap", "lines"]
    """`bars`: grafts side by side, with intervals. `heatmap`: one cell per graft. `lines`: a metric
    over a number, such as a share of layers."""

    metrics: tuple[str, ...] = ("top5",)
    """What is drawn: top1, top5, top50, logprob, answer_logprob, prob, recovery, …"""

    by: Literal["template", "pooled"] = "template"
    """A figure or a colour for each template, or all prompts pooled, with facts as resampling
    units."""

    grafts: tuple[str, ...] | None = None
    """For bars, which grafts, in which order; by default all that `grafts` names."""

    x: Axis = "layer"
    """For grids: what runs from left to right. Where it is left out, lines of grids that have
    several strengths run along `strength`: a dose response. With `step`, lines are the named grafts
    over the checkpoints of `each`."""

    y: Axis = "component"
    """For heat maps: what runs from top to bottom."""

    panel: Axis | None = None
    """For grids: a panel of a heat map, a line or a bar colour for each value of this."""

    grids: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The grids to draw, by their names (a number from 0 for one without); by default all for heat
    maps and lines, and for bars the named grafts instead."""

    @property
    def of_grids(self) -> bool:
        """Whether it draws grids, and not the named grafts."""
        return (self.kind != "bars" and self.x != "step") or self.grids is not None


class Finding(Section):
    """The claim that one graft is enough and the rest is not."""

    enough: str
    """The graft that should bring the fact back, by name."""

    rest: str
    """The graft of everything else, which should not."""

    metric: str = "top5"
    """The metric by which it is judged."""


class InteractionsConfig(Section):
    """Players whose coalitions are all run: how they work together
    (`graftlens.find.interactions`)."""

    players: Mapping[str, GraftField]
    """Name -> graft, two or more, which do not overlap."""

    metrics: tuple[str, ...] = Field(default=("logprob", "top1"), min_length=1)
    """The measures in which they are compared; also those of the part's `outcomes`, by name."""

    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """What counts as no interaction, as a share of what all players add."""

    permutations: Annotated[int, Field(ge=2)] = 100
    """Orders that are drawn where there are more than 12 players."""

    @model_validator(mode="after")
    def _can_play(self) -> "InteractionsConfig":
        self.coalitions(0)
        return self

    def coalitions(self, seed: int) -> Coalitions:
        """The coalitions to run; `seed` is of the orders that are drawn."""
        return Coalitions.of(self.players, self.permutations, seed)


class PartConfig(RunSettings, GraftSettings):
    """One sweep of an experiment: some sources, prompts and grafts, and what to show of them.

    Run settings that it does not give are the experiment's.
    """

    title: str
    """The part's heading."""

    text: str = ""
    """What it asks, for the reader of the page."""

    sources: Mapping[str, SourceField] = {}
    """Source's name in grafts -> `base` or a model of the experiment, the sweep's base first; by
    default pre (the pretrained model), then each model under its own name. Also what a source is
    made of, as in a sweep: {of: sft, rank: 8}; {each: sft} are the checkpoints that the model's
    training keeps (`keep_checkpoints`)."""

    outcomes: OutcomeSettings | None = None
    """Texts that are generated of each prompt under each graft, and what is measured of them: a
    table and a figure of rates. `localise.metric` and `interactions.metrics` may name these."""

    prompts: Annotated[
        tuple[PromptsConfig | PromptSection | PromptFile | PromptColumn, ...],
        BeforeValidator(_prompts),
    ] = Field(min_length=1)
    """The prompts: questions about a dataset's facts, prompts of your own (`template:` or
    `messages:`), `file:` with a file of them, or `column:` with the column of any dataset."""

    where_possible: tuple[str, ...] = ()
    """Names of grafts that are left out where the architecture lacks a component that they name
    (`ln_final` in OLMo has no weights). The page says so. All others must be possible."""

    figures: Annotated[tuple[FigureConfig, ...], BeforeValidator(listed)] = ()
    """What is drawn; the dose response of grids with several strengths also where no figure draws
    them."""

    finding: Finding | None = None
    """A claim to check, template by template."""

    interactions: InteractionsConfig | None = None
    """Grafts that are run in all coalitions, besides those of `grafts` and `grids`."""

    localise: Search | None = None
    """Instead of a sweep: search the smallest set of places that does it. `grafts` are reported
    beside it."""

    @property
    def questions(self) -> dict[int, PromptsConfig]:
        """The prompts about facts, by their numbers among the prompts."""
        return {i: p for i, p in enumerate(self.prompts) if isinstance(p, PromptsConfig)}

    @property
    def named_grids(self) -> dict[str, Grid]:
        """The grids by their names."""
        return {grid.name or str(number): grid for number, grid in enumerate(self.grids)}

    @property
    def dosed(self) -> frozenset[str]:
        """The names of the grids that have several strengths."""
        return frozenset(n for n, g in self.named_grids.items() if len(set(g.strengths)) > 1)

    @property
    def shown(self) -> tuple[FigureConfig, ...]:
        """The figures with their `x`, then what is drawn of ranks and strengths that they leave
        out."""
        dosed = self.dosed
        found = []
        ranked = {name for name, grid in self.named_grids.items() if len(grid.ranks or ()) > 1}
        for figure in self.figures:
            left_out = figure.kind == "lines" and "x" not in figure.model_fields_set
            along = left_out and bool(dosed.intersection(figure.grids or self.named_grids))
            found.append(figure.model_copy(update={"x": "strength"}) if along else figure)
        drawn = {g for f in found if f.of_grids for g in f.grids or self.named_grids}
        if self.each is not None:  # its figures are lines over steps
            return tuple(found)
        curves = tuple(name for name in self.named_grids if name in ranked - drawn)
        if curves:
            found.append(
                FigureConfig(
                    kind="lines",
                    x="source_rank",
                    panel="position",
                    metrics=("recovery",),
                    grids=curves,
                )
            )
            drawn |= {*curves}
        left = tuple(name for name in self.named_grids if name in dosed - drawn)
        if left:
            found.append(
                FigureConfig(kind="lines", x="strength", metrics=("recovery",), grids=left)
            )
        return tuple(found)

    def graft_problems(self, given: Mapping[str, Any]) -> list[tuple[str, str]]:
        """As of every sweep; players are grafts, too."""
        if self.interactions is None:
            return super().graft_problems(given)
        players = self.interactions.players
        named = [(f"interactions.players.{n}", graft.sources) for n, graft in players.items()]
        found = [(f"sources.{name}", what) for name, what in made_problems(given)]
        if self.grafts or self.grids:
            found = super().graft_problems(given)
        return found + unknown_sources(named, self.with_ranks(given)[0])

    @property
    def each(self) -> str | None:
        """The source that stands for several models."""
        return next((name for name, one in self.sources.items() if isinstance(one, Each)), None)

    def _unlike_members(self, figure: FigureConfig, axes: Collection[str | None]) -> Iterator[str]:
        """What is wrong with a figure of a part whose models are run one after another, or not."""
        if self.each is None and "step" in axes:
            yield "step is the training step of models of one source, and none has each."
        if self.each is not None and (
            figure.kind != "lines" or figure.x != "step" or figure.panel or figure.grids
        ):
            yield (
                f"{self.each} stands for several models: a figure shows lines of named grafts over "
                "x: step, without panel and grids."
            )

    def _of_one_model(self) -> list[tuple[str, str]]:
        """What a part whose models are run one after another cannot have."""
        what = f"of one model, but {self.each} stands for several. Leave it out."
        keys = ("finding", "interactions", "localise") if self.each is not None else ()
        return [(key, what) for key in keys if getattr(self, key) is not None]

    def problems(self) -> list[tuple[str, str]]:
        """(where, what) of every name here that does not exist."""
        if self.localise is not None:
            what = "a part that localises has none: its page shows what was found. Leave it out."
            never = ("grids", "figures", "finding", "interactions", "where_possible", "paper")
            found = [(key, what) for key in (*never, "base", "full") if getattr(self, key)]
            unfit = text_problems(self.localise, self.outcomes)
            found += [(f"localise.{key}", what) for key, what in unfit]
            return found + self._of_one_model()
        problems = []
        named, grafts = self.named_grids, self.named_grafts()
        if len(named) < len(self.grids):
            problems.append(("grids", "two grids have the same name. Give each its own name."))
        for i, figure in enumerate(self.shown):
            where = f"figures.{i}"
            of_grids = figure.of_grids
            if of_grids and not self.grids:
                problems.append((where, f"kind {figure.kind} shows grids, but there are none."))
            elif not of_grids and not grafts:
                what = f"{figure.kind} show named grafts, but there are none. Name grids instead."
                problems.append((where, what))
            for name in figure.grids or ():
                if name not in named:
                    what = f"no grid is called {name!r}. Available: {' '.join(named) or 'none'}."
                    problems.append((f"{where}.grids", what + suggest(name, named)))
            drawn = [named[name] for name in figure.grids or named if name in named]
            left_out = i < len(self.figures) and "x" not in self.figures[i].model_fields_set
            dosed = [name for name in figure.grids or named if name in self.dosed]
            if figure.kind == "lines" and left_out and 0 < len(dosed) < len(drawn):
                others = [name for name in figure.grids or named if name in named.keys() - dosed]
                what = (
                    f"lines along which axis? Grid {dosed[0]} has several strengths, grid "
                    f"{others[0]} has not. Name x, or in grids those of one kind."
                )
                problems.append((where, what))
            axes = {figure.x, figure.panel} | ({figure.y} if figure.kind == "heatmap" else set())
            problems += [(where, what) for what in self._unlike_members(figure, axes)]
            if of_grids and "source_rank" in axes and any(g.ranks is None for g in drawn):
                problems.append(
                    (where, "source_rank applies to grids with ranks, and one has none.")
                )
            if of_grids and axes & {"rate", "draw"} and any(g.dropout is None for g in drawn):
                what = "rate and draw apply to grids with dropout, and a grid here has none."
                problems.append((where, what))
            for name in figure.grafts or ():
                if name not in grafts:
                    what = f"no graft is called {name!r}.{suggest(name, grafts)}"
                    problems.append((f"{where}.grafts", what))
        problems += [
            ("where_possible", f"no graft is called {name!r}.{suggest(name, grafts)}")
            for name in self.where_possible
            if name not in grafts
        ]
        if self.interactions is not None:
            made = self.interactions.coalitions(0).grafts
            problems += [
                (f"grafts.{name}", "a coalition of the players has this name. Rename the graft.")
                for name, graft in self.grafts.items()
                if made.get(name, graft) != graft
            ]
        problems += self._of_one_model()
        if self.finding:
            for role in ("enough", "rest"):
                name = getattr(self.finding, role)
                if name not in grafts:
                    what = f"no graft is called {name!r}.{suggest(name, grafts)}"
                    problems.append((f"finding.{role}", what))
        return problems


class ExperimentConfig(RunSettings):
    """An experiment: what to train, what to graft, what to show.

    Paths are relative to the working directory.
    """

    title: str
    """The experiment's name on its page."""

    question: str
    """What it asks."""

    expected: str = ""
    """What the paper found, to compare the result with."""

    model: str = "smollm2-135m"
    """The pretrained model: a preset's name (with its recipe), a hub id or a checkpoint folder."""

    recipe: Mapping[str, Any] = {}
    """Keys of `graftlens finetune` that replace those of the preset, for every model."""

    datasets: Mapping[str, AnyDataset] = Field(min_length=1)
    """Name -> a dataset, with the keys of `graftlens data make`."""

    models: Mapping[str, ModelConfig] = {}
    """Name -> a model to finetune."""

    parts: Mapping[str, PartConfig] = Field(min_length=1)
    """Name -> a sweep with its figures."""

    ks: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 50)
    """The k of the top-k accuracies in tables."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of training, distractors, the trust report's cells and resampling. The datasets have
    seeds of their own."""

    @model_validator(mode="after")
    def _known_names(self) -> "ExperimentConfig":
        problems = _recipe_problems(self.recipe)
        # Folders and files are named after these.
        for key, names in (
            ("datasets", self.datasets),
            ("models", self.models),
            ("parts", self.parts),
        ):
            problems += [(key, what) for _, what in name_problems(names)]
        for name, model in self.models.items():
            where = f"models.{name}"
            try:
                Rule(name, At.parse("all"))
            except ValueError as error:
                problems.append((where, str(error)))
            problems += [(f"{where}.{w}", what) for w, what in _recipe_problems(model.recipe)]
            if name == BASE:
                problems.append((where, f"{BASE!r} is the pretrained model. Choose another name."))
            if model.data is not None:
                problems += self._no_dataset(where, model.data, model.change)
            if model.start != BASE and model.start not in self.models:
                what = f"no model {model.start!r}. Available: {' '.join([BASE, *self.models])}."
                problems.append((f"{where}.start", what + suggest(model.start, self.models)))
        for name, part in self.parts.items():
            problems += [(f"parts.{name}.{w}", what) for w, what in self._unknown_in(part)]
        used = {model.data for model in self.models.values()}
        asked = (part.questions.values() for part in self.parts.values())
        used |= {prompts.dataset for several in asked for prompts in several}
        for name in self.datasets:
            if name not in used:
                what = "no model and no prompts use this dataset. Leave it out."
                others = [other for other in self.datasets if other != name]
                problems.append((f"datasets.{name}", what + suggest(name, others)))
        if all(model.start in (BASE, *self.models) for model in self.models.values()):
            try:
                self.order()
            except ValueError as error:
                problems.append(("models", str(error)))
        for name in self.models:
            lora = self.recipe_of(name).get("lora")
            if isinstance(lora, Mapping) and not lora.get("merge") and self.needs_whole(name):
                what = (
                    "training goes on from this model or from another to it, or it is run beside "
                    "another base, so it cannot be an adapter of the pretrained one. Leave it out."
                )
                problems.append((f"models.{name}.recipe.lora.merge", what))
        if problems:
            raise ConfigError(*problems)
        return self

    def _unknown_in(self, part: PartConfig) -> list[tuple[str, str]]:
        problems = part.problems()
        known = [BASE, *self.models]
        for name, source in part.sources.items():
            if isinstance(source, Each):
                problems += [(f"sources.{name}", what) for what in self._no_checkpoints(source)]
            elif isinstance(source, str) and source not in known:
                what = f"no model {source!r}. Available: {' '.join(known)}."
                problems.append((f"sources.{name}", what + suggest(source, known)))
        there = self.sources(part)
        if len(there) < 2:
            what = "a graft needs two sources or more. Name models, or give sources."
            problems.append(("sources", what))
        if part.localise is None or part.grafts:
            problems += part.graft_problems(there)
        for i, prompts in part.questions.items():
            problems += self._no_dataset(f"prompts.{i}", prompts.dataset, prompts.change)
        for i, figure in enumerate(part.shown):
            for metric in figure.metrics:
                if what := self._no_metric(metric, part):
                    problems.append((f"figures.{i}.metrics", what))
        for metric in part.interactions.metrics if part.interactions else ():
            if what := self._no_game(metric, part):
                problems.append(("interactions.metrics", what))
        if part.finding and (what := self._no_metric(part.finding.metric, part)):
            problems.append(("finding.metric", what))
        return problems

    def _no_game(self, name: str, part: PartConfig) -> str:
        """Why players cannot be compared in a metric; empty if they can."""
        texts = part.outcomes.measures if part.outcomes is not None else {}
        if part.outcomes is not None and name in texts:
            if name in self.settings(part)["metrics"].measures:
                return f"{name} is one of metrics.measures and of outcomes.measures. Rename one."
            return no_judge(name, part.outcomes)
        row = known(name)
        if row is not None and row.summary == "recovery":
            return f"{name} has no value in single prompts. Write logprob."
        every_k = row is not None and row.summary == "share"
        return "" if every_k else self._no_metric(name, part, texts)

    def _no_checkpoints(self, source: Each) -> Iterator[str]:
        """Why the checkpoints of a model of the experiment cannot be run."""
        name = source.each
        if not isinstance(name, str) or name not in self.models:
            return
        if self.models[name].path is not None:
            yield (
                f"{name!r} is not trained here, so it has no checkpoints. Write where they are: "
                "{each: runs/checkpoint-*}."
            )
        elif self.recipe_of(name).get("keep_checkpoints") is None:
            yield (
                f"the training of {name!r} keeps no checkpoints. Write in its recipe "
                "keep_checkpoints: all, or {every: 100}."
            )

    def _no_metric(self, name: str, part: PartConfig, more: Collection[str] = ()) -> str:
        """Why a part's tables will not have a metric; empty if they will. `more` may be named."""
        settings = self.settings(part)["metrics"]
        tops = [f"top{k}" for k in self.ks]
        measured = [m.name for m in always_measured() if m.summary == "mean"]
        there = [*tops, *measured, *settings.measures, "recovery"]
        row = known(name)
        if name not in there:
            if row is not None and row.summary == "share":
                return f"{name} is not among ks ({' '.join(map(str, self.ks))}). Add it there."
            if row is not None and row.summary == "mean":
                return f"{name} is not measured here. Add it to metrics.measures."
            what = f"unknown metric {name!r}. Allowed: {' '.join([*more, *there])}."
            return what + suggest(name, [*more, *there, *averaged()])
        if row is not None and row.over == "answer" and settings.answers != "whole":
            return f"{name} needs metrics.answers: whole."
        lacking = not all(map(_with_distractors, part.prompts))
        if row is not None and "distractors" in row.needs and lacking:
            return f"{name} needs distractors, but some of the part's prompts have none."
        return ""

    def _no_dataset(
        self, where: str, name: str, change: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        if name not in self.datasets:
            what = f"no dataset {name!r}. Available: {' '.join(self.datasets)}."
            return [(where, what + suggest(name, self.datasets))]
        try:
            self.dataset(name, change)
        except ConfigError as error:
            return list(error.under(f"{where}.change").problems)
        return []

    def dataset(self, name: str, change: Mapping[str, Any]) -> DatasetSpec:
        """A dataset with some of its keys changed."""
        spec = self.datasets[name]
        # The values themselves and not their dump, which loses what the command line said.
        values = {key: getattr(spec, key) for key in type(spec).model_fields}
        return spec_of(values | dict(change)) if change else spec

    def sources(self, part: PartConfig) -> dict[str, Any]:
        """Source's name -> `base`, a model, or what it is made of, the sweep's base first."""
        return dict(part.sources) or {"pre": BASE} | {name: name for name in self.models}

    def settings(self, part: PartConfig) -> dict[str, Any]:
        """What a part's sweep has in its config besides sources and prompts, by key: run settings
        from the part, or else from the experiment, and its grafts with the coalitions of its
        players."""
        found = {
            name: getattr(part if name in part.model_fields_set else self, name)
            for name in RunSettings.model_fields
        } | {name: getattr(part, name) for name in GraftSettings.model_fields}
        if part.outcomes is not None:
            found["outcomes"] = part.outcomes
        if part.interactions is not None:
            coalitions = part.interactions.coalitions(found["seed"]).grafts
            found["grafts"] = {**part.grafts, **coalitions}
        return found

    def order(self) -> tuple[str, ...]:
        """The models, each after the one that its training starts from.

        Raises:
            ValueError: models that start from one another in a circle.
        """
        done: list[str] = []
        left = list(self.models)
        while left:
            ready = [n for n in left if self.models[n].start in (BASE, *done)]
            if not ready:
                raise ValueError(
                    f"{', '.join(left)} start from one another. Let one start at base."
                )
            done += ready
            left = [name for name in left if name not in ready]
        return tuple(done)

    def pretrained(self) -> str:
        """The location of the pretrained model: a hub id, a folder or `smollm2-135m`."""
        return PRESETS[self.model].model if self.model in PRESETS else self.model

    @field_validator("model")
    @classmethod
    def _near_miss(cls, model: str) -> str:
        hint = suggest(model, PRESETS)
        if hint and model not in PRESETS and "/" not in model and not Path(model).exists():
            raise ValueError(
                f"{model!r} is not a preset or a folder, and it lacks the owner of a hub id.{hint} "
                f"Presets: {' '.join(PRESETS)}."
            )
        return model

    def recipe_of(self, name: str) -> dict[str, Any]:
        """The keys of `FinetuneConfig` that train a model: from preset, experiment and model, in
        order."""
        preset = PRESETS[self.model].recipe if self.model in PRESETS else {}
        recipe = {"seed": self.seed, **preset, **self.recipe, **self.models[name].recipe}
        if isinstance(lora := recipe.get("lora"), Mapping) and self.needs_whole(name):
            recipe["lora"] = {"merge": True, **lora}
        return recipe

    def needs_whole(self, name: str) -> bool:
        """Whether a model cannot be an adapter of the pretrained one: training goes from it, or
        from another to it, or it is run beside another base."""
        if self.models[name].start != BASE or name in {m.start for m in self.models.values()}:
            return True
        beside = [list(self.sources(part).values()) for part in self.parts.values()]
        every = [[s.each if isinstance(s, Each) else s for s in sources] for sources in beside]
        return any(name in sources and sources[0] != BASE for sources in every)


def _with_distractors(prompts: Section) -> bool:
    """Whether all of a section's prompts have wrong answers to compare with."""
    if isinstance(prompts, PromptFile):
        with contextlib.suppress(ValueError, OSError):  # the sweep's check says what is wrong
            return all(prompt.distractors for prompt in prompts.prompts())
        return True
    return bool(getattr(prompts, "distractors", ()))


def _recipe_problems(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = [name for name in FinetuneConfig.model_fields if name not in _ELSEWHERE]
    problems = [
        ("recipe", f"unknown key {name!r}. Allowed: {' '.join(known)}.{suggest(name, known)}")
        for name in recipe
        if name not in known
    ]
    values = {name: value for name, value in recipe.items() if name in known}
    try:
        settings_from(FinetuneConfig, {"model": "m", "output": Path("o"), **values})
    except ConfigError as error:
        problems += error.under("recipe").problems
    return problems


@dataclass(frozen=True)
class NamedExperiment:
    """An experiment's config and where it comes from.

    Attributes:
        name: the file's name without its suffix.
        config: what the file says, with the overrides.
        text: the file as it is, and the overrides.
    """

    name: str
    config: ExperimentConfig
    text: str


def find_experiment(name: str, overrides: Sequence[str] = ()) -> NamedExperiment:
    """Read an experiment that comes with graftlens, or a file, with `key=value` overrides.

    Raises:
        ConfigError: no such file, or everything that is wrong in it.
    """
    path = config_file(Kind.EXPERIMENT, name)
    config = told_on_command_line(read_settings(ExperimentConfig, path, overrides), overrides)
    said = "".join(f"#   {override}\n" for override in overrides)
    note = f"\n# and on the command line:\n{said}" if overrides else ""
    return NamedExperiment(path.stem, config, read_text(path) + note)
