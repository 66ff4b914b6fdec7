"""The output folder of a finetuning run, before and after the work: locked, checked, labelled."""

import contextlib
import glob
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from graftlens.checkpoints import is_ours, recorded, refuse_foreign, saving
from graftlens.folder import probe, write_whole
from graftlens.locks import LockError, locked
from graftlens.recipes import FinetuneConfig, FinetuneRun

logger = logging.getLogger(__name__)

# The first line of our config.yaml, which distinguishes it from a user's recipe.
HEADER = "# Written by graftlens finetune: what the model in this folder was made of.\n"


class InUseError(RuntimeError):
    """Another process is finetuning in the folder."""


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; its file stays.

    Raises:
        InUseError: another process is finetuning there.
        OSError: the folder cannot be written, has no locks, or holds a ``.lock`` of somebody else.
    """
    path = folder / ".lock"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size):
        raise FileExistsError(
            f"{path} is in the way: it is not an empty file, so graftlens did not write it. Move "
            "it away, or choose another folder."
        )
    with contextlib.ExitStack() as held:
        with _writing(folder):
            if not held.enter_context(locked(path, wait=False, say=logger.warning)):
                raise InUseError(
                    f"{folder} is in use by another process that is finetuning there. Wait for it, "
                    "or choose another output folder."
                )
            probe(path)
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except LockError:
        raise
    except OSError as error:
        raise OSError(
            f"output={str(folder)!r} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def check_output(config: FinetuneConfig, texts: int, processes: int) -> None:
    """Check that nothing of somebody else has a name that this run needs.

    Raises:
        FileExistsError: something has.
    """
    if recorded(config.output) is not None and is_ours(config.output / "model"):
        return  # finished
    batches = math.ceil(texts / (config.batch_size * processes))
    steps = math.ceil(batches / config.gradient_accumulation)
    saved = range(config.save_epochs, config.epochs, config.save_epochs)
    folders = ["model", ".model", *(f"checkpoints/checkpoint-{steps * epoch}" for epoch in saved)]
    if config.keep == "best":
        numbers = range(1, config.epochs + 1)
        folders += [f"epochs/{dot}epoch-{number}" for dot in ("", ".") for number in numbers]
    last = steps * config.epochs
    for step in range(1, last + 1) if config.keep_checkpoints is not None else ():
        if step == last or config.keeps(step, ends_epoch=step % steps == 0):
            folders += [f"kept/{dot}checkpoint-{step}" for dot in ("", ".")]
    refuse_foreign(config.output, ["log.jsonl"], folders)


def kept_checkpoints(output: Path) -> str:
    """The pattern of the folders in which `keep_checkpoints` leaves weights on the way."""
    return f"{glob.escape(str(output))}/kept/checkpoint-*"


def check_run(run: FinetuneRun) -> None:
    """Check, before all the work, that the folder can be written and holds nothing of somebody
    else."""
    finished = recorded(run.output) is not None and is_ours(run.output / "model")
    if not finished:
        refuse_foreign(run.output, ["log.jsonl"], ["model", ".model"])
        note = run.output / "config.yaml"
        if os.path.lexists(note) and not _is_note(note):
            refuse_foreign(run.output, ["config.yaml"], claimed=False)
    with taken(run.output):
        pass


def note(run: FinetuneRun) -> None:
    """Write ``config.yaml``; one written by an earlier release stays unchanged."""
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
