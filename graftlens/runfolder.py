"""The output folder of a finetuning run, before and after the work: taken, looked at, labelled."""

import contextlib
import math
import os
import tempfile
from pathlib import Path

import yaml
from filelock import FileLock

from graftlens.checkpoints import is_ours, recorded, refuse_foreign, saving
from graftlens.folder import write_whole
from graftlens.locks import BusyError, take
from graftlens.recipes import FinetuneConfig, FinetuneRun

# The first line of a config.yaml of ours, which tells it from a recipe of the user's.
HEADER = "# Written by graftlens finetune: what the model in this folder was made of.\n"


class InUseError(RuntimeError):
    """Another process finetunes in the folder."""


def take_folder(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(folder / ".lock", held="finetunes there")
    except BusyError as error:
        raise InUseError(f"{error} Wait for it, or choose another output folder.") from None
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno is None:
            raise  # in our own words
        raise OSError(
            f"output={str(folder)!r} cannot be written ({error.strerror}). Choose another folder."
        ) from None
    try:
        with tempfile.TemporaryFile(dir=folder):
            return lock
    except OSError as error:
        lock.release()
        raise OSError(
            f"output={str(folder)!r} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def check_output(config: FinetuneConfig, texts: int, processes: int) -> None:
    """Nothing of somebody else's has a name that this run needs.

    Raises:
        FileExistsError: something has.
    """
    if recorded(config.output) is not None and is_ours(config.output / "model"):
        return  # finished
    batches = math.ceil(texts / (config.batch_size * processes))
    steps = math.ceil(batches / config.gradient_accumulation)
    saved = range(config.save_epochs, config.epochs, config.save_epochs)
    folders = ["model", ".model", *(f"checkpoints/checkpoint-{steps * epoch}" for epoch in saved)]
    if config.keep_epochs or config.keep == "best":
        numbers = range(1, config.epochs + 1)
        folders += [f"epochs/{dot}epoch-{number}" for dot in ("", ".") for number in numbers]
    refuse_foreign(config.output, ["log.jsonl"], folders)


def check_run(run: FinetuneRun) -> None:
    """The folder can be written, and holds nothing of somebody else's, before all the work."""
    finished = recorded(run.output) is not None and is_ours(run.output / "model")
    if not finished:
        refuse_foreign(run.output, ["log.jsonl"], ["model", ".model"])
        note = run.output / "config.yaml"
        if os.path.lexists(note) and not _is_note(note):
            refuse_foreign(run.output, ["config.yaml"], claimed=False)
    take_folder(run.output).release()


def note(run: FinetuneRun) -> None:
    """Write ``config.yaml``; one that an earlier release wrote stays as it is."""
    path = run.output / "config.yaml"
    made_of = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if not os.path.lexists(path) or _is_note(path):
        with saving(path):
            write_whole(path, HEADER + made_of)


def _is_note(path: Path) -> bool:
    """A truncated one is ours as long as its first line is."""
    with contextlib.suppress(OSError):
        return path.is_file() and path.read_bytes().startswith(HEADER.encode())
    return False
