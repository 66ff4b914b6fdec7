"""The commands of `graftlens data`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlens.folder import RUNS

data = typer.Typer(
    no_args_is_help=True, help="Make datasets of facts.", rich_markup_mode="markdown"
)


@data.command("make")
def make(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="What to make: a file, or a name of graftlens list."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override those of the file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the dataset; for NAME.yaml the default is graftlens-runs/data/NAME."
        ),
    ] = None,
) -> None:
    """Make a dataset of facts: training texts, evaluation prompts, facts and provenance."""
    from graftlens.configfile import ConfigError, overridden, read_mapping
    from graftlens.data import make_dataset, save_dataset, spec_of
    from graftlens.data.dataset import refuse_existing
    from graftlens.data.languagemodels import told_on_command_line
    from graftlens.folder import at_home, inside, writable
    from graftlens.shipped import Kind, config_file

    path = config_file(Kind.DATA, config)
    folder = at_home(out) if out else inside(RUNS, "data", path.stem)
    refuse_existing(folder)  # before doing the work
    writable(folder)
    given = overrides or []
    try:
        spec = spec_of(overridden(read_mapping(path), given))
    except ConfigError as error:
        raise error.under(str(path), ": ") from None
    spec = told_on_command_line(spec, given)
    made = make_dataset(spec)
    save_dataset(made, folder)
    counts = ", ".join(f"{number} {what}" for what, number in made.provenance["counts"].items())
    typer.echo(f"{folder}: {counts}")


@data.command("wikipedia")
def wikipedia(
    titles: Annotated[list[str], typer.Argument(metavar="TITLE…", help="Titles of articles.")],
    out: Annotated[Path, typer.Option(help="Folder for the articles.")] = RUNS / "articles",
    language: Annotated[str, typer.Option(help="The Wikipedia's language code.")] = "en",
    user_agent: Annotated[
        str | None, typer.Option(help='Who is asking, such as "my-study/1.0 (me@example.org)".')
    ] = None,
) -> None:
    """Download Wikipedia articles, to add their facts by hand and train on them."""
    from graftlens.data.wikipedia import download

    for path in download(titles, out, language, user_agent):
        typer.echo(str(path))
