"""The folder of a finetuning run: whose it is, and what in it is complete after any kill.

A folder of our own is written beside its place and moved there in one rename. The Trainer writes
its checkpoints in place, file by file; such a folder counts only with a marker, which is written
last and lists every file's size.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

MARKER = "complete.json"

logger = logging.getLogger(__name__)


def claim(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    elsewhere: Collection[str] = (),
) -> None:
    """Write down in ``run.json`` what this folder's run is, or check that it is this one.

    Args:
        folder: the run's folder.
        identity: what determines the result: plain values, in sections.
        defaults: what holds for a name that ``run.json`` does not have.
        elsewhere: dotted names that may differ, as they only say where something is.

    Raises:
        ValueError: the folder holds another run; the message has each difference.
    """
    path = folder / "run.json"
    if not path.exists():
        write_text(path, json.dumps(identity, indent=2) + "\n")
        return
    there = _flat(defaults) | _flat(json.loads(path.read_text()))
    refuse_differences(f"{folder} holds another finetuning run", there, identity, elsewhere)


def refuse_differences(
    what: str, there: Mapping[str, Any], given: Mapping[str, Any], elsewhere: Collection[str] = ()
) -> None:
    """Check that what a run's folder holds is what is given.

    Args:
        what: the message's beginning.
        there: plain values, in sections.
        given: likewise.
        elsewhere: dotted names that may differ.

    Raises:
        ValueError: the two differ; the message has each difference.
    """
    there, given = _flat(there), _flat(given)
    different = [
        f"  {name}: {there.get(name)!r} there, {given.get(name)!r} given"
        for name in sorted((there.keys() | given.keys()) - set(elsewhere))
        if there.get(name) != given.get(name)
    ]
    if different:
        raise ValueError(
            f"{what}:\n"
            + "\n".join(different)
            + "\nChoose another output folder, give what is there, or remove the folder."
        )


def write_text(path: Path, text: str) -> None:
    """Replace the file by one that is complete."""
    work = path.with_name(f".{path.name}.tmp")
    with work.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Replace the folder by what `write` puts into the one that it is given."""
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work)
    flush(work)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)


def flush(folder: Path) -> None:
    """Ask the disk to hold every file of the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def mark_complete(checkpoint: Path, *, seconds: float) -> None:
    """Write the marker; from now on the checkpoint is one to resume from.

    Args:
        checkpoint: a folder that the Trainer wrote.
        seconds: of training that led to it.
    """
    flush(checkpoint)
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    marker = json.dumps({"sizes": sizes, "seconds": seconds}, indent=1) + "\n"
    write_text(checkpoint / MARKER, marker)


def seconds_of(checkpoint: Path) -> float:
    """What `mark_complete` was told."""
    return float(json.loads((checkpoint / MARKER).read_text())["seconds"])


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint to resume from; incomplete ones are removed."""
    complete: dict[int, Path] = {}
    for step, path in _numbered(folder, "checkpoint").items():
        if _is_complete(path):
            complete[step] = path
        else:
            logger.warning("%s is incomplete (a process was killed while saving): removed", path)
            shutil.rmtree(path)
    return complete[max(complete)] if complete else None


def remove_others(folder: Path, kind: str, kept: int | None) -> None:
    """Remove the folders ``KIND-NUMBER`` but the one numbered `kept`."""
    for number, path in _numbered(folder, kind).items():
        if number != kept:
            shutil.rmtree(path)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """What others left there (.DS_Store) is not ours."""
    return {
        int(path.name.removeprefix(f"{kind}-")): path
        for path in folder.glob(f"{kind}-*")
        if path.is_dir() and re.fullmatch(rf"{kind}-[0-9]+", path.name)
    }


def _is_complete(checkpoint: Path) -> bool:
    marker = checkpoint / MARKER
    if not marker.is_file():
        return False
    sizes = json.loads(marker.read_text())["sizes"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )
