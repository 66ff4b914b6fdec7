"""Running an experiment: data, models, sweeps, then tables, figures and one page.

Each step writes only complete files and finds what an earlier call left, so that an interrupted
experiment resumes where it stopped: datasets and models in the store, sweeps in the
experiment's folder::

    OUT/index.html             the page
    OUT/experiment.json        what was run, of which data and with which models
    OUT/experiment.yaml        the config as it was given
    OUT/.graftlens             marks the folder as ours: without it, no file there is touched
    OUT/sweeps/PART/           a sweep's folder, with its trust report and its own page
    OUT/tables/, OUT/figures/
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftlens.data.dataset import read_provenance
from graftlens.experiment.analysis import part_tables
from graftlens.experiment.config import (
    ExperimentConfig,
    NamedExperiment,
    PartConfig,
    find_experiment,
)
from graftlens.experiment.localising import localise_checked, searched
from graftlens.experiment.plan import Plan, Store, plan
from graftlens.experiment.show import leading, plain, show_found, show_part
from graftlens.finetune import FinetuneResult, FinetuneRun, InUseError, finetune_run
from graftlens.folder import RUNS, at_home, claim, inside, read_json, writable, write_whole
from graftlens.model.smollm2 import rounded_sources
from graftlens.reports import (
    PAGE,
    ensure_report,
    named_sources,
    sweep_glimpse,
    sweep_sources,
)
from graftlens.sweep.cells import Measures, own_measures
from graftlens.sweep.description import describe
from graftlens.sweep.devices import check_devices
from graftlens.sweep.launch import launch_local
from graftlens.sweep.outcomesettings import TextFunction
from graftlens.sweep.results import read_manifest
from graftlens.sweep.runner import SweepResult, prepare_sweep, run_sweep, sweep_result
from graftlens.trainingtexts import tokenize, training_texts_of
from graftlens.viz.examples import Glimpse
from graftlens.viz.export import exporter
from graftlens.viz.page import ExperimentPage, Part, experiment_page
from graftlens.viz.spelling import headed

#: What is written into an experiment's folder.
WRITTEN = ("index.html", "experiment.json", "experiment.yaml", "sweeps", "tables", "figures")

#: Seconds between two checks for a model that another process trains.
POLL = 5.0


@dataclass(frozen=True)
class ExperimentResult:
    """A finished experiment.

    Attributes:
        folder: where it is.
        page: the page that shows it.
        sweeps: part -> its sweep.
        seconds: wall-clock seconds of this call.
    """

    folder: Path
    page: Path
    sweeps: Mapping[str, SweepResult]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the trust report of every sweep found nothing wrong."""
        return all(sweep.ok for sweep in self.sweeps.values())


def run_experiment(
    experiment: str | Path | NamedExperiment,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    measures: Measures = (),
    devices: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> ExperimentResult:
    """Run an experiment, or resume an interrupted one, or show a finished one again.

    Args:
        experiment: a name in `experiments/`, the path of a config, or a config that was read.
        out: the experiment's folder; by default `graftlens-runs/NAME-MODEL`.
        overrides: `key=value` settings that replace those of the file.
        store: folder of datasets and trained models, which experiments share; by default
            `graftlens-runs/store`.
        measures: of your own, or where to import them from (``module:name``; with several devices
            only this), for all parts, also those whose `metrics.measures` do not name them.
        devices: devices for the sweeps, one worker on each; by default a single one.
        progress: whether to show progress bars.
        say: called with each message.

    Raises:
        ConfigError: everything that is wrong with the config, before a weight is read.
        ValueError: a folder that holds another experiment, or files that do not belong to an
            experiment; a figure that cannot be drawn.
        OSError: a folder that cannot be written.
    """
    started = time.monotonic()
    named = _named(experiment, overrides)
    config = named.config
    if devices:
        check_devices(devices)
    own = own_measures(measures)
    places = [one for one in measures if isinstance(one, str)]
    if len(devices) > 1 and len(places) < len(own):
        raise ValueError(
            "measures: each device's process imports them. Say where from, as 'module:name'."
        )
    folder = at_home(out) if out is not None else default_folder(named)
    writable(folder / "index.html")
    planned = plan(config, _store(store))
    planned.check(own)
    planned.refuse_others(folder)
    for name in ("sweeps", "tables", "figures"):
        inside(folder, name)  # before anything is trained
    claim(folder, "experiment", taken=() if _of_an_older_version(folder) else WRITTEN)

    trained: dict[str, FinetuneResult] = {}
    for number, (name, run) in enumerate(planned.runs.items(), 1):
        say(f"model {number}/{len(planned.runs)}: {name}")
        trained[name] = _train(run, progress, say)
        say(f"  {trained[name].line()}")
    sweeps: dict[str, SweepResult] = {}
    parts: list[Part] = []
    said: list[str] = []
    others: list[str] = []  # what parts show that no finding is asked of
    rounded: dict[str, None] = {}
    stems: set[str] = set()
    glimpse: Glimpse | None = None
    with exporter():
        for number, (name, part) in enumerate(config.parts.items(), 1):
            say(f"part {number}/{len(config.parts)}: {name}, {part.title}")
            checked = planned.checked(name, trained=True, measures=own)
            rounded |= dict.fromkeys(rounded_sources(checked.config.sources))
            place = inside(folder, "sweeps", name)
            if part.localise is not None:
                result = localise_checked(
                    checked,
                    part.localise,
                    _searched_source(config, part),
                    part.grafts or None,
                    place,
                    text=named.text,
                    own=[m for m in own if not isinstance(m, TextFunction)] + [*checked.functions],
                    device=devices[0] if devices else None,
                    progress=progress,
                    say=lambda s: say(f"  {s}"),
                )
                forwards = int(result.found.costs["forwards"].sum())
                sweeps[name] = SweepResult(place, forwards, {}, result.trust)
                parts.append(show_found(name, part, result.found, folder, stems))
                said.append(result.found.sentence)
                continue
            if len(devices) > 1:
                prepare_sweep(checked, place)
                told = checked.config.outcomes
                launch_local(place, list(devices), measures=places, outcomes=told)
                sweeps[name] = sweep_result(place)
                say(f"  {sweeps[name].line()}")
            else:
                device = devices[0] if devices else None
                sweeps[name] = run_sweep(
                    checked,
                    place,
                    measures=own,
                    device=device,
                    progress=progress,
                    say=lambda s: say(f"  {s}"),
                )
            ensure_report(place)
            tables = part_tables(config, part, checked, place)
            shown, headline = show_part(name, config, checked, tables, folder, stems)
            parts.append(shown)
            if glimpse is None and part.finding is not None:
                both = (part.finding.enough, part.finding.rest)
                ran = [checked.duplicates.get(graft, graft) for graft in both]
                glimpse = sweep_glimpse(place, tables.template, ran, metric=part.finding.metric)
            if found := headline or leading(tables):
                kept = said if headline else others
                kept.append(found if len(config.parts) == 1 else headed(part.title, found))
    record = _record(named, planned, trained, sweeps)
    write_whole(folder / "experiment.yaml", named.text)
    write_whole(folder / "experiment.json", json.dumps(record, indent=2, default=str) + "\n")
    expected = [f"The paper: {config.expected}"] if config.expected else []
    lead = " ".join([*(said or others), *expected, *rounded])
    links = {"the config": folder / "experiment.yaml", "what was run": folder / "experiment.json"}
    for name in sweeps:
        place = folder / "sweeps" / name
        if config.parts[name].localise is not None:
            links[f"the localisation of {name}"] = place / "index.html"
        else:
            links[f"the prompts of {name}, graft by graft"] = place / PAGE
        links[f"trust report of {name}"] = place / "trust.txt"
    page = experiment_page(
        folder / "index.html",
        ExperimentPage(
            title=headed(config.title, config.model),
            question=config.question,
            lead=lead or config.title,
            parts=parts,
            provenance={k: v for k, v in record.items() if k not in ("title", "question", "parts")},
            links=links,
            glimpse=glimpse,
        ),
    )
    say(str(page.resolve()))
    return ExperimentResult(folder, page, sweeps, time.monotonic() - started)


def describe_experiment(
    experiment: str | Path | NamedExperiment,
    *,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    measures: Measures = (),
) -> str:
    """What an experiment would train and sweep, as text; datasets are made, but no weight is read.

    Arguments are those of `run_experiment`.

    Raises:
        ConfigError: everything that is wrong with the config.
    """
    named = _named(experiment, overrides)
    planned = plan(named.config, _store(store))
    own = own_measures(measures)
    planned.check(own)
    checked = {
        name: planned.checked(name, trained=False, measures=own) for name in named.config.parts
    }
    tokenizer = next(iter(checked.values())).prepared.tokenizer
    lines = [headed(named.config.title, named.config.question), ""]
    for name, run in planned.runs.items():
        there = " (already trained)" if (run.output / "model").is_dir() else ""
        recipe = run.recipe
        data = planned.texts(name)
        data -= round(data * recipe.heldout_share)
        steps = -(-data // (recipe.batch_size * recipe.gradient_accumulation)) * recipe.epochs
        texts = training_texts_of(run.data, run.seed)["text"]
        rows = tokenize(tokenizer, texts, max_length=sys.maxsize)
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        lines.append(
            f"model     {name}: {data} texts, {recipe.epochs} epochs, about {steps} steps of "
            f"{recipe.batch_size * recipe.gradient_accumulation} and "
            f"{round(mean * data * recipe.epochs):,} tokens in all, learning rate "
            f"{recipe.learning_rate:g}{there}"
        )
    for name in named.config.parts:
        lines += [
            "",
            f"part      {name}",
            describe(checked[name], planned.sweeps[name].sources),
        ]
        if (search := named.config.parts[name].localise) is not None:
            source = _searched_source(named.config, named.config.parts[name])
            lines += ["", searched(checked[name], search, source)]
    return "\n".join(lines)


def _searched_source(config: ExperimentConfig, part: PartConfig) -> str:
    """The source that a part that localises searches."""
    assert part.localise is not None
    return part.localise.source or list(config.sources(part))[1]


def default_folder(named: NamedExperiment) -> Path:
    """The default folder of an experiment: one for each experiment and model."""
    model = Path(named.config.model).name or "model"
    return inside(RUNS, plain(f"{named.name}-{model}"))


def _store(folder: str | Path | None) -> Store:
    return Store(at_home(folder) if folder is not None else RUNS / "store")


def _of_an_older_version(folder: Path) -> bool:
    """Whether an experiment was started here when folders had another marker, or finished when they
    had none."""
    if (folder / "graftlens-run.json").is_file():
        return True
    try:
        record = read_json(folder / "experiment.json", "")
    except ValueError:
        return False
    return (
        isinstance(record, dict)
        and {"name", "parts", "finished"} <= record.keys()
        and isinstance(record.get("versions"), dict)
        and "graftlens" in record["versions"]
    )


def _train(run: FinetuneRun, progress: bool, say: Callable[[str], None]) -> FinetuneResult:
    """Train, or wait for another experiment that trains the same model."""
    waited = False
    while True:
        try:
            return finetune_run(run, progress=progress)
        except InUseError:
            if not waited:
                say(f"  another process is training in {run.output}: waiting for it")
            waited = True
            time.sleep(POLL)


def _named(experiment: str | Path | NamedExperiment, overrides: Sequence[str]) -> NamedExperiment:
    if isinstance(experiment, NamedExperiment):
        if overrides:
            raise ValueError(f"overrides={list(overrides)}: these apply to a config file.")
        return experiment
    return find_experiment(str(experiment), overrides)


def _record(
    named: NamedExperiment,
    planned: Plan,
    trained: Mapping[str, FinetuneResult],
    sweeps: Mapping[str, SweepResult],
) -> dict[str, Any]:
    config = named.config
    packages = ("graftlens", "torch", "transformers", "transformer-lens", "datasets")
    return {
        "name": named.name,
        "title": config.title,
        "question": config.question,
        "model": config.model,
        "models": {
            name: _training(run.recipe.model_dump(mode="json"), trained[name])
            for name, run in planned.runs.items()
        },
        "datasets": {
            f"{name} {change}".removesuffix(" {}"): _provenance(folder)
            for (name, change), folder in planned.data.items()
        },
        "sources": {name: _sources(sweep.folder) for name, sweep in sweeps.items()},
        "parts": {
            name: {
                "title": part.title,
                "cells": sweeps[name].cells,
                **({"texts": sweeps[name].texts} if sweeps[name].texts else {}),
                "cells that could not be run": sum(sweeps[name].not_run.values()),
                "trust report": "passed" if sweeps[name].ok else "FAILED",
            }
            for name, part in config.parts.items()
        },
        "versions": {name: version(name) for name in packages},
        "machine": f"Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _sources(folder: Path) -> dict[str, object]:
    """The sources of a part, with their fingerprints."""
    if (folder / "sweep.json").is_file():
        return sweep_sources(read_manifest(folder))
    asked = read_json(folder / "localise.json", "Run the experiment again.")["asked"]
    return named_sources(asked["sources"], asked["models"]["fingerprints"])


def _training(recipe: Mapping[str, Any], result: FinetuneResult) -> dict[str, Any]:
    shown = {key: value for key, value in recipe.items() if key not in ("output", "model")}
    found = {
        "steps": result.steps,
        "epoch kept": result.epoch,
        "loss at first and last step (nats per token)": [result.losses[0], result.losses[-1]],
        "held-out perplexity before training and after each epoch": list(result.perplexities),
        "seconds": round(result.seconds, 1),
    }
    return {**found, "recipe": {k: v for k, v in shown.items() if v not in (None, (), [])}}


def _provenance(folder: Path) -> dict[str, Any]:
    known = read_provenance(folder)
    return {key: known[key] for key in ("counts", "sha256")} | {"made of": known["config"]}
