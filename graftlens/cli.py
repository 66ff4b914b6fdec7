"""The command line. Each command parses, validates and makes one library call."""

import io
import re
import sys
import warnings
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from graftlens import __version__
from graftlens.components import suggest
from graftlens.datacommands import data
from graftlens.folder import RUNS

#: The exit code of a command that Ctrl-C ended.
INTERRUPTED = 130

#: The exit code of a sweep whose trust report found something wrong.
UNTRUSTED = 3


#: The user's own measures of a sweep or an experiment.
OwnMeasures = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:NAME",
        help="A measure of your own (a graftlens.Measure), imported from there; repeat the option "
        "for more.",
    ),
]


class Launcher(StrEnum):
    """What runs a command's work."""

    local = "local"
    slurm = "slurm"


app = typer.Typer(
    name="graftlens",
    help="Find out where a language model keeps what it learned in finetuning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graftlens {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find out where a language model keeps what it learned in finetuning."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RUNS / "demo",
    facts: Annotated[
        int, typer.Option(min=6, help="Invented films; run time is proportional.")
    ] = 40,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the films and of the training.")] = 0,
) -> None:
    """See the finding on a real model: finetune SmolLM2-135M on invented films, then graft.

    Takes about five minutes on two cores and writes report.html into the folder.

    Run it again to continue after an interruption, or to reuse finished steps.
    """
    from graftlens.demo import demo as run

    run(out, facts=facts, epochs=epochs, seed=seed)


@app.command()
def finetune(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The recipe, and the data: a file, or a name of graftlens list."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override those of the file."),
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help="Run here, or as a job.")] = Launcher.local,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Resources of the job, such as slurm_partition=gpu."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the job, or leave it running.")] = True,
) -> None:
    """Finetune a model, here or as a job on Slurm.

    If interrupted, killed or requeued, running it again gives the same final weights.

    On several GPUs: accelerate launch --multi_gpu -m graftlens finetune CONFIG
    (batch_size is per GPU).
    """
    from graftlens.configfile import read_settings
    from graftlens.data.languagemodels import told_on_command_line
    from graftlens.finetune import FinetuneRun, finetune_run, launch_finetune
    from graftlens.processes import is_first
    from graftlens.shipped import Kind, config_file

    given = overrides or []
    path = config_file(Kind.FINETUNE, config)
    run = told_on_command_line(read_settings(FinetuneRun, path, given), given)
    resources = _resources(launcher, slurm, wait)
    if launcher is Launcher.slurm:
        result = launch_finetune(run, resources, wait=wait)
    else:
        result = finetune_run(run)
    if result is not None and is_first():
        typer.echo(result.line())


@app.command()
def sweep(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The sweep's config: a file, or a name of graftlens list."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that override those of the file, such as metrics.top_k=5 or "
            "grids.0.layers=each.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; for NAME.yaml the default is graftlens-runs/sweeps/NAME."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing.")
    ] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="Run on this machine, or as a Slurm array job.")
    ] = Launcher.local,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices of this machine, one worker on each, such as cuda:0,cuda:1."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="With slurm: number of workers in the job.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Resources of each worker's task, such as slurm_partition=gpu.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the job, or leave it running.")] = True,
    measure: OwnMeasures = None,
) -> None:
    """Run many grafts over many prompts, as described in a YAML file.

    If interrupted, killed or requeued, running it again computes only what is missing and gives
    the same rows. A folder that holds another sweep is left untouched. The exit code is 3 if the
    trust report found something wrong. The folder gets a page, report.html, with charts, tables and
    every graft's prompts.
    """
    resources = _resources(launcher, slurm, wait)
    names = _devices(devices)
    if launcher is Launcher.slurm and names:
        raise typer.BadParameter(
            "--devices works only with --launcher local. Use --tasks with slurm."
        )
    if launcher is Launcher.local and tasks is not None:
        raise typer.BadParameter(
            "--tasks works only with --launcher slurm. Use --devices with local."
        )
    from graftlens.shipped import Kind, config_file

    path = config_file(Kind.SWEEP, config)
    folder = out or RUNS / "sweeps" / path.stem
    given = overrides or []
    own = measure or []

    if dry_run:
        from graftlens.sweep.description import describe_sweep

        typer.echo(describe_sweep(path, overrides=given, measures=own))
        return
    from graftlens.sweep.runner import prepare_sweep, run_sweep, sweep_result

    if launcher is Launcher.local and len(names) < 2:
        device = names[0] if names else None
        _end_of_sweep(run_sweep(path, folder, overrides=given, measures=own, device=device))
        return
    from graftlens.engines import check_submission
    from graftlens.sweep.config import load_config
    from graftlens.sweep.devices import check_devices
    from graftlens.sweep.launch import launch_local, launch_slurm

    # What is refused is refused before the folder is claimed.
    if launcher is Launcher.local:
        check_devices(names)
    else:
        check_submission(tasks or 1, resources)
    prepare_sweep(path, folder, overrides=given, measures=own)
    # The folder does not say what the command line told of judges; this does.
    told = load_config(path, given).outcomes
    if launcher is Launcher.local:
        launch_local(folder, names, measures=own, outcomes=told)
    else:
        tasks = tasks or 1
        launch_slurm(
            folder, tasks=tasks, resources=resources, measures=own, outcomes=told, wait=wait
        )
    if wait:
        result = sweep_result(folder)
        typer.echo(result.line())
        _end_of_sweep(result)


@app.command()
def run(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="An experiment's config: a file, or a name of graftlens list."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that override those of the file, such as model=gpt2-xl, recipe.epochs=3 "
            "or "
            "datasets.films.n_facts=40.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the experiment; graftlens-runs/NAME-MODEL by default."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder for datasets and trained models; graftlens-runs/store by default."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices for the sweeps, one worker on each, such as cuda:0,cuda:1."),
    ] = None,
    launcher: Annotated[
        Launcher, typer.Option(help="Run here, or the whole experiment as a job.")
    ] = Launcher.local,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Resources of the job, such as slurm_partition=gpu."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the job, or leave it running.")] = True,
    measure: OwnMeasures = None,
) -> None:
    """Run an experiment: make its data, train its models, graft, and write tables and figures.

    Where model, or an entry of datasets, is a list (model=[smollm2-135m,gpt2]), every combination
    is run, and one page compares them.

    If interrupted, running it again continues where it stopped. Experiments share datasets and
    trained models. The exit code is 3 if a trust report found something wrong.
    """
    names = _devices(devices)
    resources = _resources(launcher, slurm, wait)
    if launcher is Launcher.slurm and names:
        raise typer.BadParameter("--devices works only with --launcher local.")
    from graftlens.experiment.variants import describe_variants, launch_variants, run_variants

    given: dict[str, Any] = {
        "overrides": overrides or (),
        "store": store,
        "measures": measure or (),
    }
    if dry_run:
        typer.echo(describe_variants(experiment, **given))
        return
    if launcher is Launcher.slurm:
        ok = launch_variants(experiment, out, resources=resources, wait=wait, **given)
    else:
        ok = all(result.ok for result in run_variants(experiment, out, devices=names, **given))
    if not ok:
        raise typer.Exit(UNTRUSTED)


@app.command()
def localise(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="The prompts, and what is searched: a file, or a name of graftlens list.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that override those of the file, such as search.target=0.9.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; for NAME.yaml the default is "
            "graftlens-runs/localise/NAME."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Device to run on, such as cuda:0.")] = None,
    measure: OwnMeasures = None,
) -> None:
    """Find the smallest set of places that does what a source does, judged on unseen facts.

    Writes the found graft, its tables and a page. If interrupted, running it again continues where
    it stopped and gives the same numbers. The exit code is 3 if the trust report on the found set
    found something wrong.
    """
    from graftlens.experiment.localising import describe_localise, run_localise
    from graftlens.shipped import Kind, config_file

    path = config_file(Kind.LOCALISE, config)
    given: dict[str, Any] = {"overrides": overrides or [], "measures": measure or []}
    if dry_run:
        typer.echo(describe_localise(path, **given))
        return
    folder = out or RUNS / "localise" / path.stem
    result = run_localise(path, folder, device=device, **given)
    if not result.ok:
        raise typer.Exit(UNTRUSTED)


@app.command()
def dashboard(
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="PRE SFT",
            help="Hub ids or folders of the pretrained and the finetuned model; smollm2-135m is "
            "the demo's. Grafts call them pre and sft.",
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a pair, a sweep's folder: its models, its prompts (--number) and its "
            "grafts, by name.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text, with {NAME} in place of each field.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a text, a file of prompts or conversations, as in a sweep's prompts: "
            "JSON lines, JSON or YAML."
        ),
    ] = None,
    number: Annotated[
        int, typer.Option(min=0, help="Which prompt of the file or the sweep, from 0.")
    ] = 0,
    graft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]GRAFT",
            help='Such as "FE+LT=sft @ first_entity + last"; repeat the option for more. PRE '
            "and SFT are always included.",
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="A field of the prompt: a span to graft at."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="The expected continuation, with its leading space.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat format: the user says the text.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="What the system says (with --chat).")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL",
            help="A further source that grafts can name: a model, or what it is made of, such as "
            '"half={of: sft, strength: 0.5}" or "rank8={of: sft, rank: 8}".',
        ),
    ] = None,
    full: Annotated[
        str | None,
        typer.Option(
            metavar="GRAFT", help="The graft to use as SFT, if not the pair's sft, such as task."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = RUNS / "dashboard.html",
    image: Annotated[
        Path | None, typer.Option(help="Also save a picture of the whole page (PNG).")
    ] = None,
    title: Annotated[str, typer.Option(help="The page's title.")] = "",
    top_k: Annotated[
        int, typer.Option(min=1, help="Number of tokens that the logit lens lists.")
    ] = 5,
    follow: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Continue the prompt with the likeliest tokens under this run (PRE, SFT or a "
            "graft's name), and show them, too.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of what follows (with --follow).")
    ] = 20,
    complete: Annotated[
        bool,
        typer.Option(
            "--complete",
            help="Leave nothing out of a long prompt's page, however large it gets: the attention "
            "of every head in full, the logit lens of every layer.",
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Device to run on, such as cuda:0.")] = None,
) -> None:
    """Look inside one prompt under grafts: attention, logit lens, tokens, on one offline page.

    Example: graftlens dashboard --pair smollm2-135m my-model --prompt "{first_entity} starred with"
    --field "first_entity=Ann Lee" --answer " Bo" --graft "FE=sft @ first_entity"
    """
    named = {}
    if sweep is None:
        named = _all_named("--graft", (g if "=" in g else f"{g}={g}" for g in graft or ()))
    fields = _all_named("--field", field or ())
    more = _all_named("--source", source or ())
    if (pair is None) == (sweep is None):
        given = "neither is" if pair is None else "both are"
        raise typer.BadParameter(f"{given} given. Give exactly one of --pair and --sweep.")
    own: dict[str, object] = {"--field": field, "--answer": answer, "--chat": chat}
    own |= {"--system": system}
    if sweep is not None:
        own |= {"--prompt": prompt, "--file": file, "--source": source, "--full": full}
        if name := next((n for n in own if own[n]), None):
            raise typer.BadParameter(f"{name} goes with --pair; a sweep's folder has its own.")
    elif (prompt is None) == (file is None):
        given = "neither is" if prompt is None else "both are"
        raise typer.BadParameter(f"{given} given. Give exactly one of --prompt and --file.")
    if file is not None and (name := next((n for n in own if own[n]), None)):
        raise typer.BadParameter(f"{name} goes with --prompt; a file's prompts have their own.")
    if file is None and sweep is None and number:
        raise typer.BadParameter("--number works only with --file or --sweep. Leave it out.")
    text = prompt or ""
    for name in fields:
        if f"{{{name}}}" not in text:
            near = suggest(name, re.findall(r"{(\w+)}", text))
            raise typer.BadParameter(f"--field {name}: the prompt has no {{{name}}}.{near}")
    if system is not None and not chat:
        raise typer.BadParameter("--system works only with --chat. Add --chat, or leave it out.")
    for name in ("pre", "sft"):
        if name in more:
            raise typer.BadParameter(f"--source {name} is one of the pair. Choose another name.")
    if image is not None and image.suffix.lower() != ".png":
        raise typer.BadParameter(
            f"--image {image}: the picture is a PNG, so its name must end in .png."
        )
    for path in (out, image):
        if path is not None and path.is_dir():
            raise typer.BadParameter(f"{path} is a folder. Name a file in it.")
    from graftlens.dashboards import write_dashboard, write_sweep_dashboard
    from graftlens.model.made import sources_as_text
    from graftlens.prompts import Prompt
    from graftlens.sweep.promptsets import ChatFormat, PromptFile

    shown: dict[str, Any] = {"image": image, "title": title, "top_k": top_k, "device": device}
    shown |= {"follow": follow, "max_new_tokens": max_new_tokens}
    shown["complete"] = complete
    if sweep is not None:
        page = write_sweep_dashboard(sweep, number, graft or (), out, **shown)
        typer.echo(str(page.resolve()))
        return
    assert pair is not None
    sources = dict(zip(("pre", "sft"), pair, strict=True)) | sources_as_text(more)
    if file is not None:
        prompts = PromptFile(file=str(file)).prompts()
        if number >= len(prompts):
            raise typer.BadParameter(
                f"--number {number}: {file} holds {len(prompts)} prompts, 0 to {len(prompts) - 1}."
            )
        asked = prompts[number]
    else:
        asked = Prompt(text, fields, answer=answer)
    if chat:
        asked = ChatFormat(system=system).asked(asked)
    page = write_dashboard(sources, asked, named, out, full=full, **shown)
    typer.echo(str(page.resolve()))


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Folders of experiments, sweeps and localisations, in any mixture.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; by default graftlens-runs/report.html, of one sweep "
            "report.html in its folder."
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="The measure to compare: top1, top5, recovery, …")
    ] = "top5",
) -> None:
    """Compare finished experiments, sweeps and localisations on one page.

    They may be of other models or other datasets. Of one run alone, it says where its page is;
    a sweep's is written again.
    """
    from graftlens.experiment.compare import report_of

    typer.echo(str(report_of(runs, out, metric=metric).resolve()))


def _end_of_sweep(result: Any) -> None:
    """Write the sweep's page; the exit code says whether its trust report found something wrong."""
    from graftlens.reports import ensure_report

    typer.echo(str(ensure_report(result.folder).resolve()))
    if not result.ok:
        raise typer.Exit(UNTRUSTED)


@app.command("list")
def list_configs() -> None:
    """Show the configs of experiments, sweeps, localisations, finetuning and data, by name."""
    from graftlens.shipped import listing

    typer.echo(listing())


@app.command("copy")
def copy_config(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name of graftlens list; with its kind (data/counterfact) where two have it.",
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="FILE.yaml", help="The new file; NAME.yaml by default."),
    ] = None,
) -> None:
    """Copy a config that comes with graftlens, to make it your own."""
    from graftlens.shipped import copy

    typer.echo(str(copy(name, target)))


app.add_typer(data, name="data")


def _named(text: str, option: str) -> tuple[str, str]:
    """The name and the value of ``NAME=VALUE``."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise typer.BadParameter(f"{option} {text!r}: write NAME=VALUE.")
    return name.strip(), value


def _all_named(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Name -> value of ``NAME=VALUE`` options, each name once."""
    found: dict[str, str] = {}
    for text in texts:
        name, value = _named(text, option)
        if name in found:
            raise typer.BadParameter(f"{option} {name!r} is given twice. Give it another name.")
        found[name] = value
    return found


def _devices(text: str | None) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        raise typer.BadParameter(f"--devices {text!r}: write names, such as cuda:0,cuda:1.")
    return names


def _resources(launcher: Launcher, slurm: list[str] | None, wait: bool) -> dict[str, Any]:
    """The mapping that ``--slurm key=value`` options make."""
    from graftlens.configfile import ConfigError, overridden

    if launcher is not Launcher.slurm and (slurm or not wait):
        given = "--slurm" if slurm else "--no-wait"
        raise ConfigError((given, "this needs --launcher slurm, but the launcher is local."))
    try:
        return dict(overridden({}, slurm or ()))
    except ConfigError as error:
        raise error.under("--slurm", " ") from None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of text, without the place in the source that Python shows."""
    typer.echo(f"graftlens: warning: {message}", err=True)


def _print_anything() -> None:
    """A terminal that lacks a character (an arrow, in Latin-1) shows its code: no work fails
    because of it.

    In a log file, too, each line appears at once, also the one that says which lock is waited
    for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def main() -> None:
    """The entry point: errors that a user can fix are one line, and so are warnings; an
    interruption says what to do next."""
    _print_anything()
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            # Without standalone mode, typer hands back the code of an Exit, also after an
            # interruption.
            code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        from graftlens.configfile import ConfigError

        # Of a config every problem is told, each in a line.
        lines = str(error).splitlines() if isinstance(error, ConfigError) else [str(error)]
        for line in lines:
            typer.echo(f"graftlens: {line}", err=True)
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        typer.echo("\nInterrupted. Run the same command again to continue.", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
