"""The command line. Each command parses, validates and makes one library call."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftlens import __version__

#: The exit code of a command that Ctrl-C ended.
INTERRUPTED = 130

app = typer.Typer(
    name="graftlens",
    help="Find out where a language model keeps what it learned in finetuning.",
    no_args_is_help=True,
    add_completion=False,
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
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("graftlens-demo"),
    facts: Annotated[
        int, typer.Option(min=6, help="Invented films; the time grows in proportion.")
    ] = 40,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the films and of the training.")] = 0,
) -> None:
    """See the finding on a real model: finetune SmolLM2-135M on invented films, then graft.

    Takes five to eight minutes on two cores and writes report.html into the folder.

    Run it again to go on after an interruption, or to use what is there.
    """
    from graftlens.demo import demo as run

    run(out, facts=facts, epochs=epochs, seed=seed)


def main() -> None:
    """The entry point: errors that a user can mend are one line, an interruption says what next."""
    code = 0
    try:
        # Without standalone mode, typer hands back the code of an Exit, an interruption's too.
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"graftlens: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        typer.echo("\nInterrupted. Run the same command again to go on.", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
