"""Experiments of several models and datasets: every combination is one experiment, and one page
compares them; here, or as jobs on Slurm."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from graftlens.configfile import ConfigError, overridden, read_mapping, settings_from
from graftlens.data.languagemodels import told_on_command_line
from graftlens.engines import EngineError, SlurmResources, submit
from graftlens.experiment.compare import compare_runs
from graftlens.experiment.config import ExperimentConfig, NamedExperiment
from graftlens.experiment.run import (
    ExperimentResult,
    default_folder,
    describe_experiment,
    run_experiment,
)
from graftlens.experiment.show import plain
from graftlens.folder import RUNS, at_home, inside, read_text
from graftlens.shipped import Kind, config_file
from graftlens.sweep.cells import Measures

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One combination of the lists of a config.

    Attributes:
        named: the experiment.
        label: what tells it from the others, as part of a folder's name: "smollm2-135m-films-2";
            empty where the config has no lists.
    """

    named: NamedExperiment
    label: str


def variants(experiment: str, overrides: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The experiments of a config: one, or where `model` or an entry of `datasets` is a list, one
    for each combination.

    Raises:
        ConfigError: no such file, an empty list, or everything that is wrong with the combinations.
    """
    path = config_file(Kind.EXPERIMENT, experiment)
    try:
        values = overridden(read_mapping(path), overrides)
        axes = list(_axes(values))
    except ConfigError as error:
        raise error.under(str(path), ": ") from None
    said = "".join(f"#   {override}\n" for override in overrides)
    note = f"\n# and on the command line:\n{said}" if overrides else ""
    text = read_text(path) + note
    made = []
    problems: dict[tuple[str, str], None] = {}
    for chosen in product(*(axis.entries for axis in axes)):
        label = "-".join(entry.label for entry in chosen)
        one = values
        for axis, entry in zip(axes, chosen, strict=True):
            one = axis.put(one, entry.value)
        try:
            config = told_on_command_line(settings_from(ExperimentConfig, one), overrides)
        except ConfigError as error:
            problems |= dict.fromkeys(error.under(str(path), ": ").problems)
            continue
        which = f"\n# of its lists: {label}\n" if label else ""
        name = f"{path.stem}-{_without_model(axes, chosen)}".rstrip("-")
        made.append(Variant(NamedExperiment(name, config, text + which), label))
    if problems:
        raise ConfigError(*problems)
    return tuple(made)


def run_variants(
    experiment: str,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    measures: Measures = (),
    devices: Sequence[str] = (),
    metric: str = "top5",
    progress: bool = True,
    say: Say = print,
) -> tuple[ExperimentResult, ...]:
    """Run an experiment, or every combination of its lists, and then the page that compares them.

    Args:
        experiment, overrides, store, measures, devices, progress, say: as in `run_experiment`.
        out: the experiment's folder; with lists, the folder of one for each combination and of
            `compared.html`. By default in `graftlens-runs`.
        metric: what the page compares.

    Raises:
        ConfigError, ValueError, OSError: as `run_experiment`.
    """
    found = variants(experiment, overrides)
    folders = [folder_of(variant, out) for variant in found]
    results = []
    for number, (variant, folder) in enumerate(zip(found, folders, strict=True), 1):
        if len(found) > 1:
            say(f"experiment {number}/{len(found)}: {variant.label}")
        results.append(
            run_experiment(
                variant.named,
                folder,
                store=store,
                measures=measures,
                devices=devices,
                progress=progress,
                say=say,
            )
        )
    if len(found) > 1:
        say(str(compared(found, out, metric).resolve()))
    return tuple(results)


def compared(found: Sequence[Variant], out: str | Path | None, metric: str = "top5") -> Path:
    """Write the page that compares finished variants, and return it."""
    folders = [folder_of(variant, out) for variant in found]
    first = re.sub(r"[^\w.-]+", "-", found[0].named.name.split("-")[0]) or "runs"
    page = RUNS / f"{first}-compared.html" if out is None else at_home(out) / "compared.html"
    return compare_runs(folders, page, metric=metric)


def launch_variants(
    experiment: str,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    measures: Sequence[str] = (),
    resources: SlurmResources | Mapping[str, Any] | None = None,
    wait: bool = True,
    say: Say = print,
) -> bool:
    """Run whole experiments as jobs on Slurm, one for each combination of the config's lists.

    A job makes the data, trains the models, sweeps, and writes the page; preempted or out of time,
    it is requeued and continues. The folders, and the store, are on a file system that the nodes
    share. Called again, it joins the jobs that are still running.

    Args:
        experiment, out, overrides, store: as in `run_variants`.
        measures: where each job imports the user's own measures from (``module:name``).
        resources: what each job gets.
        wait: whether to wait for the end; otherwise the jobs are left running.
        say: called with each message.

    Returns:
        Whether the trust reports of all sweeps found nothing wrong; true without waiting.

    Raises:
        ConfigError: everything that is wrong with the config or the resources.
        EngineError: submitit or Slurm is missing, Slurm refused a job, or one failed.
    """
    found = variants(experiment, overrides)
    arrays = []
    for number, variant in enumerate(found):
        folder = folder_of(variant, out)
        array = submit(
            partial(
                run_one,
                experiment,
                number,
                out,
                overrides=tuple(overrides),
                store=store,
                measures=tuple(measures),
            ),
            tasks=1,
            folder=folder / "slurm",
            resources=resources,
            name="graftlens-run",
        )
        say(f"{variant.label or variant.named.name}: {array.describe()}")
        arrays.append((folder, array))
    if not wait:
        say("The same command, run again, waits for them or reports their results.")
        return True
    for folder, array in arrays:
        (task,) = array.wait(lambda tasks: None)
        if task.state == "failed":
            raise EngineError(
                f"the experiment in {folder} is not finished: Slurm job {task.name} "
                f"{task.problem}\nFix that and run the same command again; it continues."
            )
    # What is finished is read again here: nothing is trained or swept.
    return all(
        result.ok
        for result in run_variants(
            experiment, out, overrides=overrides, store=store, measures=measures, say=say
        )
    )


def run_one(
    experiment: str,
    number: int,
    out: str | Path | None,
    *,
    overrides: Sequence[str],
    store: str | Path | None,
    measures: Sequence[str],
) -> None:
    """Run one of the combinations of a config, as a job does."""
    variant = variants(experiment, overrides)[number]
    run_experiment(
        variant.named,
        folder_of(variant, out),
        store=store,
        measures=measures,
        progress=False,
    )


def describe_variants(
    experiment: str,
    *,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    measures: Measures = (),
) -> str:
    """What every combination would train and sweep, as text; see `describe_experiment`."""
    said = []
    found = variants(experiment, overrides)
    for variant in found:
        text = describe_experiment(variant.named, store=store, measures=measures)
        said.append(f"--- {variant.label}\n{text}" if len(found) > 1 else text)
    return "\n\n".join(said)


def folder_of(variant: Variant, out: str | Path | None) -> Path:
    """The folder of a variant: `out`, or with several a folder in it."""
    if out is None:
        return default_folder(variant.named)
    return inside(at_home(out), plain(variant.label)) if variant.label else at_home(out)


@dataclass(frozen=True)
class _Entry:
    value: Any
    label: str


@dataclass(frozen=True)
class _Axis:
    """A list of a config, and where it is."""

    keys: tuple[str, ...]
    entries: tuple[_Entry, ...]

    def put(self, values: Mapping[str, Any], value: Any) -> dict[str, Any]:
        """The config with one entry in place of the list."""
        first, *rest = self.keys
        inner = _Axis(tuple(rest), ()).put(values[first], value) if rest else value
        return {**values, first: inner}


def _axes(values: Any) -> Iterator[_Axis]:
    """The lists of a config: `model`, and entries of `datasets`."""
    if isinstance(models := values.get("model"), list):
        if not models or not all(isinstance(model, str) for model in models):
            raise ConfigError(("model", "write a name, or a list of names: [smollm2-135m, gpt2]."))
        if len(set(models)) < len(models):
            raise ConfigError(("model", f"{models}: name each model once."))
        yield _Axis(("model",), tuple(_Entry(m, plain(Path(m).name or "model")) for m in models))
    datasets = values.get("datasets")
    for name, given in datasets.items() if isinstance(datasets, Mapping) else ():
        if not isinstance(given, list):
            continue
        if not given:
            raise ConfigError((f"datasets.{name}", "the list is empty. Give a dataset or more."))
        entries = tuple(_Entry(one, f"{plain(str(name))}-{i}") for i, one in enumerate(given, 1))
        yield _Axis(("datasets", str(name)), entries)


def _without_model(axes: Sequence[_Axis], chosen: Sequence[_Entry]) -> str:
    """What tells a variant apart but for its model, which folders and tables name themselves."""
    pairs = zip(axes, chosen, strict=True)
    return "-".join(entry.label for axis, entry in pairs if axis.keys != ("model",))
