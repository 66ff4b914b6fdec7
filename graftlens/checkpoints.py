"""The folder of a finetuning run: who owns it, and what in it is complete after any kill or fault.

The folder is ours because its ``run.json`` says what the run is. A folder in it is ours because of
a marker inside: `UNFINISHED` while it is written (the Trainer writes its checkpoints in place, file
by file), and then ``complete.json``, which is written last and has the SHA-256 of every file. What
has neither belongs to somebody else: it is never read, replaced or removed.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftlens.folder import (
    file_digest,
    flush,
    json_digest,
    move,
    parse_json,
    read_json,
    read_text,
    refuse_differences,
    write_whole,
)

MARKER = "complete.json"
UNFINISHED = ".graftlens-unfinished"

#: Suffixes of files that a loader could read; an added one can change what is loaded.
LOADED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".pt", ".pth", ".py")

#: What to do if a folder holds another run.
ADVICE = "Choose another output folder, use the settings that are there, or remove the folder."

logger = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file of ours has changed since it was written."""


# -- whose the folder is -----------------------------------------------------------------------


def recorded(folder: Path) -> Mapping[str, Any] | None:
    """What the folder's run is, as ``run.json`` says; None if the folder belongs to nobody.

    If that file is missing or damaged, a result or checkpoint of ours tells.

    Raises:
        ValueError: a ``run.json`` that belongs to somebody else, or is damaged beyond repair.
    """
    path, problem = folder / "run.json", ""
    if os.path.lexists(path):
        try:
            found = parse_json(read_text(path), path)
            if is_identity(found):
                return found
            if isinstance(found, dict) and "start" not in found:
                raise _in_the_way(path)
            problem = f"{path} does not say what the run is"
        except _InTheWayError:
            raise
        except (OSError, ValueError) as error:
            problem = str(error).rstrip(".")
    checkpoints = sorted(_numbered(folder / "checkpoints", "checkpoint").items(), reverse=True)
    for saved in (folder / "model", *(path for _, path in checkpoints)):
        with contextlib.suppress(OSError, ValueError):
            if is_identity(said := _marker(saved).get("run")):
                if problem:
                    logger.warning("%s: rebuilt from %s", problem, saved / MARKER)
                return said
    if problem:
        raise ValueError(
            f"{problem}, and there is no checkpoint that does. Choose another output folder, or "
            f"remove {path} to start the run in this folder again."
        )
    return None


def is_earlier(folder: Path) -> bool:
    """Whether a run's ``run.json`` lacks the config of the start."""
    run = recorded(folder)
    return run is not None and "settings" not in run["start"]


def is_identity(value: Any) -> bool:
    """Whether the value has the shape of what `claim` writes."""
    keys = {"config": "learning_rate", "data": "train_sha256", "start": "weights_sha256"}
    return isinstance(value, Mapping) and all(
        isinstance(value.get(section), Mapping) and key in value[section]
        for section, key in keys.items()
    )


def refuse_foreign(
    output: Path, files: Iterable[str] = (), folders: Iterable[str] = (), *, claimed: bool = True
) -> None:
    """Check that what a run will write replaces nothing that is not ours.

    Args:
        output: the run's folder, which need not exist.
        files: names of files in it, ours if the folder is.
        folders: ways to folders in it, ours if they have a marker.
        claimed: whether to check if the folder is ours; otherwise it is not.

    Raises:
        FileExistsError: something is in the way; the message names it.
        ValueError: a ``run.json`` that is damaged beyond repair.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise _in_the_way(output)
    ours = claimed and recorded(output) is not None
    for name in files:
        path = output / name
        if os.path.lexists(path) and not (ours and path.is_file() and not path.is_symlink()):
            raise _in_the_way(path)
    for path in (output / "checkpoints", output / "epochs", output / "kept"):
        # The target of a link belongs to somebody else.
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise _in_the_way(path)
    for name in folders:
        path = output / name
        if (found := foreign(path, ours)) is not None:
            raise _in_the_way(found)


def foreign(path: Path, claimed: bool = True) -> Path | None:
    """What in a folder is not ours: itself, a file in it, or None (also if it does not exist).

    Args:
        path: the folder.
        claimed: whether it is in a folder of ours; nothing else there is ours.
    """
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        return path
    if not any(path.iterdir()) or (path / UNFINISHED).is_file():
        return None
    if not claimed or not is_ours(path):
        return path
    return next(iter(_added(path)), None)


def is_ours(folder: Path) -> bool:
    """Whether it is a folder of ours: by a marker inside.

    The result of an earlier release has none but its record.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / UNFINISHED).is_file() or (folder / MARKER).is_file():
        return True
    with contextlib.suppress(OSError, ValueError):
        return is_identity(parse_json(read_text(folder / "finetune.json"), folder))
    return False


class _InTheWayError(FileExistsError):
    """Report that something that is not ours has a name that a run needs."""


def _in_the_way(path: Path) -> _InTheWayError:
    return _InTheWayError(
        f"{path} is in the way: graftlens finetune did not write it, and replaces only its own "
        "files. Choose another output folder, or move it away."
    )


def check_claim(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    elsewhere: Collection[str] = (),
) -> None:
    """Check that the folder belongs to nobody, or to this run.

    Args:
        folder: the run's folder.
        identity: what determines the result: plain values, in sections.
        defaults: values for names that ``run.json`` does not have.
        elsewhere: dotted names that may differ, as they only say where something is.

    Raises:
        ValueError: the folder, or a checkpoint or result in it, belongs to another run; the message
            has each difference.
    """
    holds: dict[str, Any] = {f"{folder} holds another finetuning run": recorded(folder)}
    for path in numbered(folder / "checkpoints", "checkpoint").values():
        with contextlib.suppress(DamagedError):
            holds[f"{path} is of another finetuning run"] = _marker(path).get("run")
    path = folder / "model" / "finetune.json"
    # A damaged one is reported elsewhere.
    if is_intact(path) or not (path.parent / MARKER).is_file():
        with contextlib.suppress(OSError, ValueError, TypeError):
            whole = parse_json(read_text(path), path)
            holds[f"{path.parent} is of another finetuning run"] = {
                section: whole[section] for section in identity if section in whole
            }
    for what, there in holds.items():
        if is_identity(there):
            refuse_differences(what, _filled(there, defaults), identity, ADVICE, besides=elsewhere)


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Record in ``run.json`` what this folder's run is, unless that is done (`check_claim`)."""
    path = folder / "run.json"
    with contextlib.suppress(OSError, ValueError):
        if is_identity(parse_json(read_text(path), path)):
            return
    write_whole(path, json.dumps(identity, indent=2) + "\n")


# -- folders that are whole, or known not to be ------------------------------------------------


def begin(folder: Path) -> None:
    """Make the folder, and mark it as ours and incomplete.

    Raises:
        FileExistsError: there is one that is not ours.
    """
    if (found := foreign(folder)) is not None:
        raise _in_the_way(found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()  # at once: at no moment does the folder belong to nobody


def seal(folder: Path, **facts: Any) -> None:
    """Write the marker, with these facts and the SHA-256 of every file.

    From now on the folder is complete, and `verify` finds what has changed.
    """
    flush(folder)
    files = {_name(path, folder): file_digest(path) for path in sorted(_files(folder))}
    marker = {"made_by": "graftlens finetune", **facts, "files": files}
    marker["sha256"] = json_digest(marker)
    write_whole(folder / MARKER, json.dumps(marker, indent=1) + "\n")
    (folder / UNFINISHED).unlink(missing_ok=True)


def verify(folder: Path) -> Mapping[str, Any]:
    """Check every file of a folder that was sealed; the marker's content.

    Raises:
        DamagedError: a file or the marker is missing or has changed.
        FileExistsError: a file that a loader could read was added.
    """
    if (folder / UNFINISHED).exists() and not (folder / MARKER).exists():
        raise DamagedError(f"{folder} is half-written")
    marker = _marker(folder)
    for name, expected in marker["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        size = isinstance(expected, int)
        if (path.stat().st_size if size else file_digest(path)) != expected:
            raise DamagedError(
                f"{path} has changed since it was written: its {'size' if size else 'SHA-256'} "
                "differs"
            )
    for path in _added(folder):
        if path.suffix.lower() in LOADED:
            raise FileExistsError(
                f"{path} was added to a folder of graftlens finetune, and a loader could read it. "
                "Move it away and run the same command again."
            )
    return marker


def is_intact(path: Path) -> bool:
    """Whether this one file of a sealed folder is unchanged."""
    with contextlib.suppress(OSError, ValueError):
        return bool(_marker(path.parent)["files"].get(path.name) == file_digest(path))
    return False


def write_folder(folder: Path, write: Callable[[Path], Any], **facts: Any) -> None:
    """Replace the folder by what `write` puts into the one that it is given, sealed.

    Raises:
        OSError: it cannot be written (a full disk), or the existing one is not ours.
    """
    work = folder.with_name(f".{folder.name}")
    for path in (work, folder):
        if (found := foreign(path)) is not None:
            raise _in_the_way(found)
    with saving(folder):
        if work.exists():
            discard(work)
        begin(work)
        try:
            write(work)
            seal(work, **facts)
        except Exception:
            discard(work)  # it may be what fills the disk
            raise
        if folder.exists():
            discard(folder)
        move(work, folder)


@contextlib.contextmanager
def saving(place: Path) -> Iterator[None]:
    """One plain sentence for an error in writing, whichever library writes.

    Raises:
        OSError: names the place and what to do.
    """
    try:
        yield
    except _InTheWayError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        # torch.save does not mention the disk, only where in its own source it noticed.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(
            re.search(r"No space left|quota exceeded|inline_container|PytorchStreamWriter", said)
        )
        if isinstance(error, RuntimeError) and not full and "stream" not in said:
            raise
        what = "the disk is full" if full else getattr(error, "strerror", None) or said
        raise OSError(
            f"{place} could not be written: {what}. Fix that and run the same command again; it "
            "resumes from its last checkpoint."
        ) from error


def mark_complete(checkpoint: Path, *, seconds: float, run: Mapping[str, Any]) -> None:
    """Seal the checkpoint; from now on it can be resumed from.

    Args:
        checkpoint: a folder that the Trainer wrote.
        seconds: of training that led to it.
        run: what determines the result, as `claim` writes it.
    """
    seal(checkpoint, run=run, seconds=seconds)


def seconds_of(checkpoint: Path) -> float:
    """What `mark_complete` was told."""
    return float(_marker(checkpoint)["seconds"])


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint to resume from; newer ones that are half-written or damaged are removed.

    Raises:
        FileExistsError: a file was added to it that could change what is loaded.
    """
    for _, path in sorted(_numbered(folder, "checkpoint").items(), reverse=True):
        if not is_ours(path):
            continue
        try:
            marker = verify(path)
        except DamagedError as error:
            logger.warning(
                "%s is incomplete or damaged (%s): removed; the run resumes from the one before "
                "it, or starts again",
                path,
                error,
            )
            discard(path)
            continue
        if "sizes" in marker:
            logger.warning("%s has no checksums: an earlier release wrote it", path)
        return path
    return None


def remove_others(folder: Path, kind: str, kept: int | None) -> None:
    """Remove our folders ``KIND-NUMBER`` but the one numbered `kept`."""
    for number, path in _numbered(folder, kind).items():
        if number != kept and is_ours(path):
            discard(path)


def remove_all(folder: Path, kind: str) -> None:
    """Remove our folders ``KIND-NUMBER``, half-written ones too, and the folder if it is empty."""
    if not folder.is_dir():
        return
    ours = [
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"\.?{kind}-[0-9]+", path.name) and is_ours(path)
    ]
    alone = len(ours) == len(list(folder.iterdir())) and not any(map(_added_list, ours))
    if alone and not folder.is_symlink():
        for path in ours:
            _empty(path)
        shutil.rmtree(folder)
        return
    for path in ours:
        discard(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def discard(folder: Path) -> None:
    """Remove a folder of ours; files that somebody added to it stay."""
    if not (added := _added_list(folder)):
        _empty(folder)
        shutil.rmtree(folder)
        return
    for path in list(_files(folder)):
        if path not in added:
            path.unlink()
    (folder / MARKER).unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    """Remove all but a mark that the folder is ours: a kill on the way leaves nothing without an
    owner."""
    (folder / UNFINISHED).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Number -> our folder ``KIND-NUMBER``."""
    return {n: path for n, path in _numbered(folder, kind).items() if is_ours(path)}


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """What other programs left there (.DS_Store) is not ours."""
    return {
        int(path.name.removeprefix(f"{kind}-")): path
        for path in folder.glob(f"{kind}-*")
        if path.is_dir() and re.fullmatch(rf"{kind}-[0-9]+", path.name)
    }


def _marker(folder: Path) -> Mapping[str, Any]:
    """The marker's content, with ``files``: name -> SHA-256 (size, of an earlier release).

    Raises:
        DamagedError: it is missing or has changed.
    """
    path = folder / MARKER
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        found = read_json(path, "")
    except ValueError as error:
        raise DamagedError(str(error).strip().rstrip(".")) from None
    damaged = DamagedError(f"{path} has changed since it was written")
    if not isinstance(found, dict):
        raise damaged
    if found.keys() == {"sizes", "seconds"} and isinstance(found["sizes"], dict):
        return found | {"files": found["sizes"]}
    said = found.pop("sha256", None)
    if said != json_digest(found) or not isinstance(found.get("files"), dict):
        raise damaged
    return found


def _added(folder: Path) -> Iterator[Path]:
    """Files of a sealed folder that its marker does not list; hidden ones do not count."""
    if (folder / UNFINISHED).is_file():
        return
    try:
        known = _marker(folder)["files"]
    except DamagedError:
        return  # it cannot be known
    for path in _files(folder):
        if _name(path, folder) not in known and not path.name.startswith("."):
            yield path


def _added_list(folder: Path) -> list[Path]:
    return list(_added(folder))


def _files(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != UNFINISHED and path != folder / MARKER
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _filled(there: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is there, and the defaults for what is not, section by section."""
    sections = [k for k, v in defaults.items() if isinstance(v, Mapping)]
    both = [key for key in sections if isinstance(there.get(key), Mapping)]
    return {**defaults, **there} | {key: _filled(there[key], defaults[key]) for key in both}
