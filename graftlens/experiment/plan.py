"""What an experiment has to make: datasets, finetuned models and sweeps, each in its place.

Datasets and models are in a store that experiments share: two experiments that train the same
model on the same texts find the same checkpoint. Names of folders end in a digest of their
contents; nothing is read out of a name.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import graftlens.data
from graftlens.components import expand_components
from graftlens.configfile import ConfigError, settings_from
from graftlens.data import DatasetSpec, load_dataset, make_dataset, save_dataset
from graftlens.data.dataset import read_provenance
from graftlens.data.settings import Settings, within
from graftlens.experiment.analysis import check_figures, check_players, check_scored
from graftlens.experiment.config import BASE, ExperimentConfig, PartConfig, PromptsConfig
from graftlens.experiment.localising import rating_of
from graftlens.find.config import LocaliseConfig
from graftlens.finetune import FinetuneRun, TrainingData
from graftlens.folder import (
    file_digest,
    inside,
    move,
    read_text,
    refuse_differences,
    writable,
    write_whole,
)
from graftlens.metrics import Measure
from graftlens.model.load import preview
from graftlens.model.made import Each
from graftlens.runfolder import kept_checkpoints
from graftlens.sweep.config import Checked, SweepConfig, check, with_measures
from graftlens.sweep.outcomesettings import TextFunction, refuse_unnamed
from graftlens.sweep.promptsets import DatasetSection, Questions
from graftlens.sweep.results import read_manifest

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """The folder of datasets and models.

    What counts is the content: a dataset's folder is used only if it holds the dataset of its
    name, whatever a note in the store says.
    """

    folder: Path

    def dataset(self, name: str, spec: DatasetSpec) -> Path:
        """The dataset's folder; made if it does not exist or is damaged (then the old one is kept
        next to it, renamed).

        Raises:
            ValueError, OSError: it cannot be made or read, or its folder holds something else.
        """
        data = inside(self.folder, "data")
        described = _described(spec)
        # What this code made from a spec is noted, as making it may need a language model. The
        # folder is named by its content: other code that makes the same dataset finds the same
        # folder.
        note = inside(self.folder, "made") / digest([name, described, _made_by()])
        if (noted := _noted(note)) and self._holds(inside(data, noted), name, described):
            return data / noted
        writable(data / "dataset")  # before all the work
        made = make_dataset(spec)
        folder = inside(data, f"{name}-{digest([described, made.provenance['sha256']])}")
        if folder.exists() and not self._holds(folder, name, described):
            _put_aside(folder)
        if not folder.exists():
            try:
                save_dataset(made, folder)
            except OSError:
                if not folder.exists():  # otherwise another process made it meanwhile
                    raise
        if note.is_dir():
            raise ValueError(f"{note} is a folder where a note should be. Remove or rename it.")
        write_whole(note, folder.name)
        return folder

    def _holds(self, folder: Path, name: str, described: Mapping[str, Any]) -> bool:
        """Whether the folder has the complete dataset of its name."""
        try:
            sha = load_dataset(folder).provenance["sha256"]
        except (ValueError, OSError):
            return False
        return folder.name == f"{name}-{digest([described, sha])}"

    def training(self, config: ExperimentConfig, name: str, data: Path, start: str) -> FinetuneRun:
        """The training run of a model, with its folder in the store."""
        sha = read_provenance(data)["sha256"]
        recipe = config.recipe_of(name)
        key = digest([start, sorted(recipe.items(), key=lambda item: item[0]), sha])
        return settings_from(
            FinetuneRun,
            {
                "model": start,
                "output": inside(self.folder, "models", f"{name}-{key}"),
                "data": TrainingData(path=data),
                **recipe,
            },
        )


def _noted(note: Path) -> str:
    """The name of a dataset's folder in a note; empty if it has none."""
    try:
        name = "" if note.is_symlink() or not note.is_file() else read_text(note).strip()
    except (ValueError, OSError):
        return ""
    return name if re.fullmatch(r"[^/\\\0]+-[0-9a-f]{10}", name) else ""


def _put_aside(folder: Path) -> None:
    """Rename a damaged dataset, so that it can be rebuilt and nothing is lost.

    Raises:
        ValueError: a folder that is not one of our datasets.
    """
    if not (folder / "provenance.json").is_file() or not (folder / "train").is_dir():
        raise ValueError(
            f"{folder} is not a dataset that graftlens made (it has no provenance.json or no "
            "train), so it is left untouched. Rename or remove it, or name another store."
        )
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.damaged-{number}")):
        number += 1
    move(folder, aside)
    logger.warning("%s was damaged: it is rebuilt, and the old one is kept as %s", folder, aside)


def digest(value: Any) -> str:
    """Ten hexadecimal digits that differ if the values do."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _described(spec: DatasetSpec) -> dict[str, Any]:
    """The spec, and the content of the files that it names."""
    values = spec.model_dump(mode="json")
    return values | {"sha256 of files": [file_digest(path) for path in _files(spec)]}


def _files(settings: Settings) -> Iterator[Path]:
    """Every file that settings name, folders' files one by one."""
    for path in within(settings, Path):
        inner = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in inner if file.is_file())


@cache
def _made_by() -> str:
    """A digest of graftlens' own code and tables of facts: different ones make another dataset."""
    package = Path(graftlens.data.__file__).parent
    # Python writes and renames files in __pycache__ at any time.
    own = (path for path in sorted(package.rglob("*.*")) if "__pycache__" not in path.parts)
    return digest([file_digest(path) for path in own])


@dataclass(frozen=True)
class Plan:
    """An experiment resolved, without training.

    Attributes:
        config: the experiment.
        data: (dataset's name, its changed keys as text) -> folder.
        runs: model -> its training, in the order of training; existing models (`path`) are
            not in it.
        locations: source's model -> where it is, once trained.
        sweeps: part -> its sweep.
    """

    config: ExperimentConfig
    data: Mapping[tuple[str, str], Path]
    runs: Mapping[str, FinetuneRun]
    locations: Mapping[str, str]
    sweeps: Mapping[str, SweepConfig]

    def texts(self, model: str) -> int:
        """How many texts a model is trained on."""
        folder = self.runs[model].data.path
        assert folder is not None
        known = read_provenance(folder)["counts"]
        return int(known["texts"]) + int(known.get("supplemental texts", 0))

    def checked(self, part: str, *, trained: bool, measures: Sequence[Measure] = ()) -> Checked:
        """A part's sweep checked against its prompts and the models' architecture.

        Args:
            part: its name.
            trained: whether the models exist; otherwise the pretrained model stands in for each
                that will be trained from it.
            measures: of the user's own; those that the part does not name are added.

        Raises:
            ConfigError: everything that is wrong.
        """
        sweep = self.sweeps[part]
        if not trained:
            stand_in = self.config.pretrained()
            made = {str(run.output / "model") for run in self.runs.values()}
            kept = {kept_checkpoints(run.output) for run in self.runs.values()}
            sources: dict[str, Any] = {
                name: stand_in
                if isinstance(one, str) and one in made
                else Each(each=(stand_in,))
                if isinstance(one, Each) and one.each in kept
                else one
                for name, one in sweep.sources.items()
            }
            sweep = sweep.model_copy(update={"sources": sources})
        try:
            possible = _possible(sweep, self.config.parts[part].where_possible)
            places = possible.outcomes.functions if possible.outcomes else ()
            own = [m for m in measures if not isinstance(m, TextFunction) or m.place in places]
            return check(with_measures(possible, own), own)
        except ConfigError as error:
            named = [(self._where(part, where), what) for where, what in error.problems]
            raise ConfigError(*named).under(f"parts.{part}") from None

    def _where(self, part: str, where: str) -> str:
        """A place in a part's sweep as the experiment calls it: prompts, of whatever kind."""
        found = re.match(r"(dataset|prompts)\.(\d+)", where)
        if not found:
            return where
        asked = self.config.parts[part].questions
        own = [i for i in range(len(self.config.parts[part].prompts)) if i not in asked]
        numbers = [*asked] if found[1] == "dataset" else own
        return f"prompts.{numbers[int(found[2])]}{where[found.end() :]}"

    def check(self, measures: Sequence[Measure] = ()) -> None:
        """Check all parts before anything is trained; `measures` as in `checked`.

        Raises:
            ConfigError: everything that is wrong with any of them.
            ValueError: a function of texts that no part names.
        """
        texts = [part.outcomes for part in self.config.parts.values() if part.outcomes]
        refuse_unnamed(measures, [place for one in texts for place in one.functions])

        def look(name: str) -> None:
            part = self.config.parts[name]
            checked = self.checked(name, trained=False, measures=measures)
            try:
                check_scored(part, checked)
                check_figures(part, checked)
                check_players(part, checked)
                if part.localise is not None:
                    rating_of(checked, part.localise)
            except ConfigError as error:
                raise error.under(f"parts.{name}") from None

        _each(partial(look, name) for name in self.sweeps)

    def refuse_others(self, folder: Path) -> None:
        """Refuse a folder with an experiment of other models, before any is trained.

        Args:
            folder: the experiment's.

        Raises:
            ValueError: a sweep there has other sources.
        """
        for name, sweep in self.sweeps.items():
            place = folder / "sweeps" / name
            if not (place / "sweep.json").is_file():
                continue
            refuse_differences(
                f"{folder} holds this experiment with other models (part {name})",
                read_manifest(place).config.get("sources") or {},
                sweep.model_dump(mode="json")["sources"],
                "Choose another folder with --out, use the settings that are there, or remove the "
                "folder.",
            )


def _each(steps: Iterable[Callable[[], T]]) -> list[T]:
    """What each step gives, or one ConfigError with the problems of all."""
    made: list[T] = []
    problems: list[tuple[str, str]] = []
    for step in steps:
        try:
            made.append(step())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return made


def _possible(sweep: SweepConfig, names: Sequence[str]) -> SweepConfig:
    """The sweep without those of the named grafts that its architecture cannot run."""
    if not names:
        return sweep
    try:
        arch, _ = preview(sweep.locations(), sweep.tokenizer, sweep.chat_template)
    except (ValueError, OSError, RuntimeError):
        return sweep  # its check says what is wrong
    kept = {}
    for name, graft in sweep.grafts.items():
        try:
            for rule in graft.rules:
                expand_components(rule.components, arch.components, arch.family)
        except ValueError:
            if name in names:
                continue
        kept[name] = graft
    return sweep.model_copy(update={"grafts": kept})


def plan(config: ExperimentConfig, store: Store) -> Plan:
    """Make the datasets, and work out what to train and sweep.

    Raises:
        ConfigError: datasets that cannot be made, recipes or sweeps that cannot be run.
    """
    data: dict[tuple[str, str], Path] = {}

    def folder(where: str, name: str, change: Mapping[str, Any]) -> Path:
        key = (name, json.dumps(dict(change), sort_keys=True, default=str))
        if key not in data:
            try:
                data[key] = store.dataset(name, config.dataset(name, change))
            except (ValueError, OSError) as error:
                raise ConfigError((where, str(error))) from None
        return data[key]

    wanted = [
        (f"models.{name}.data", model.data, model.change)
        for name, model in config.models.items()
        if model.data is not None
    ] + [
        (f"parts.{name}.prompts.{i}", prompts.dataset, prompts.change)
        for name, part in config.parts.items()
        for i, prompts in part.questions.items()
    ]
    _each(partial(folder, *one) for one in wanted)
    locations = {BASE: config.pretrained()}
    runs: dict[str, FinetuneRun] = {}
    for name in config.order():
        model = config.models[name]
        if model.path is not None:
            locations[name] = model.path
            continue
        assert model.data is not None
        texts = folder(f"models.{name}.data", model.data, model.change)
        try:
            runs[name] = store.training(config, name, texts, locations[model.start])
        except ConfigError as error:
            raise error.under(f"models.{name}.recipe") from None
        locations[name] = str(runs[name].output / "model")

    def sweep(name: str, part: PartConfig) -> SweepConfig:
        folders = [
            folder(f"parts.{name}.prompts.{i}", prompts.dataset, prompts.change)
            for i, prompts in part.questions.items()
        ]
        try:
            return _sweep(config, part, locations, folders)
        except ConfigError as error:
            raise error.under(f"parts.{name}") from None

    names = list(config.parts)
    sweeps = _each(partial(sweep, name, config.parts[name]) for name in names)
    return Plan(config, data, runs, locations, dict(zip(names, sweeps, strict=True)))


def _located(source: Any, locations: Mapping[str, str]) -> Any:
    """A part's source as its sweep has it: models of the experiment by where they are."""
    if isinstance(source, Each) and isinstance(source.each, str) and source.each in locations:
        output = Path(locations[source.each]).parent
        return source.model_copy(update={"each": kept_checkpoints(output)})
    return locations[source] if isinstance(source, str) else source


def _sweep(
    config: ExperimentConfig, part: PartConfig, locations: Mapping[str, str], folders: list[Path]
) -> SweepConfig:
    own = tuple(prompts for prompts in part.prompts if not isinstance(prompts, PromptsConfig))
    values = {
        **config.settings(part),
        **({"prompts": own} if own else {}),
        "sources": {
            name: _located(model, locations) for name, model in config.sources(part).items()
        },
        "dataset": tuple(
            DatasetSection(
                path=str(folder),
                **{key: getattr(asked, key) for key in Questions.model_fields}
                | {"name": asked.titled(asked.dataset)},
            )
            for asked, folder in zip(part.questions.values(), folders, strict=True)
        ),
    }
    if part.localise is None:
        return settings_from(SweepConfig, values)
    given = part.model_fields_set | config.model_fields_set
    kept = {
        k: v for k, v in values.items() if k in LocaliseConfig.model_fields and (k in given or v)
    }
    # What a localisation keeps of a cell, and how many make a shard, has defaults of its own.
    kept = {k: v for k, v in kept.items() if k not in ("metrics", "shards") or k in given}
    return settings_from(LocaliseConfig, {**kept, "search": part.localise}).sweep()
