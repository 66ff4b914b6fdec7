"""What a sweep needs from the disk: files that appear whole and carry a checksum, and locks.

A Parquet file has the SHA-256 of all its bytes between its data and its footer, where Parquet
readers ignore it. A JSON file has that of its content under the key ``sha256``.
Folders started by version 0.1.0 have neither; their files can be read as they are.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlens.folder import (
    MARKER,
    claim,
    halves_of,
    inside,
    is_claimed,
    json_digest,
    sync,
    write_whole,
)
from graftlens.locks import LockError, locked

#: What marks a checksum in a Parquet file, and the lengths of both (bytes).
SEAL = b"graftlens sha256"
SEALED = len(SEAL) + hashlib.sha256().digest_size

#: The files of a sweep's folder other than its shards.
FILES = (
    "config.yaml",
    "grafts.yaml",
    "prompts.parquet",
    "sweep.json",
    "trust.txt",
    "trust.json",
    "done.json",
    "report.html",
)

#: The others of a sweep that generates texts.
OF_TEXTS = ("measured.parquet", "rates.csv", "rates.md")

_SHARD = r"[0-9]{5,}\.parquet"
_LOCK = r"(?:claim|finish|(?:texts-)?[0-9]{5,})\.lock"

#: The folders of a sweep's shards.
SHARDS = ("shards", "texts")


class FolderError(OSError):
    """A sweep's folder cannot be written; the message says why and what to do."""


class DamagedError(ValueError):
    """The content of a file is not what was written."""


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Add to a disk error which folder it concerns and what to do."""
    try:
        yield
    except FolderError:
        raise
    except LockError as error:
        raise FolderError(str(error)) from None
    except OSError as error:
        kept = "what is finished is kept."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"Free space there and run the same command again: {kept}"
        else:
            advice = (
                "Make sure that the folder can be written, or choose another; then run the same "
                f"command again: {kept}"
            )
        why = f"[Errno {error.errno}] {error.strerror}" if error.errno else error
        raise FolderError(
            f"the sweep's folder {out} cannot be written ({why}). {advice}"
        ) from error


def write(out: Path, path: Path, content: bytes) -> None:
    """Put a whole file in place; it is on the disk when this returns.

    Raises:
        FolderError: a folder that cannot be written, or a full disk.
    """
    with writing(out):
        write_whole(path, content)


@contextlib.contextmanager
def lock(
    out: Path, name: str, *, wait: bool = True, say: Callable[[str], object] = print
) -> Iterator[bool]:
    """Hold a lock of the sweep; yields whether it is held, which without `wait` it may not be.

    Raises:
        FolderError: a folder that cannot be written, or that is on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        with writing(out):
            held = stack.enter_context(locked(lock_path(out, name), wait=wait, say=say))
        yield held


def lock_path(out: Path, name: str) -> Path:
    return out / "locks" / f"{name}.lock"


# -- whose the folder is -----------------------------------------------------------------------


def refuse_foreign(out: Path, folders: Sequence[str] = SHARDS[:1]) -> None:
    """Refuse a folder that is not a sweep's and has files where a sweep's would be written.

    `folders` are those of the sweep's shards.

    Raises:
        ValueError: the message names the file.
    """
    if (out / "sweep.json").is_file() or is_claimed(out / "locks", "sweep"):
        return
    taken = FILES if SHARDS[1] not in folders else (*FILES, *OF_TEXTS)
    places = [out / name for name in taken if os.path.lexists(out / name)]
    of_shards = [(out / name, _SHARD) for name in folders]
    for folder, names in (*of_shards, (out / "locks", _LOCK)):
        if folder.is_dir():
            places += sorted(p for p in folder.iterdir() if re.fullmatch(names, p.name))
        elif os.path.lexists(folder):
            places.append(folder)
    if places:
        raise ValueError(
            f"{out} is not a sweep's folder, and {places[0].relative_to(out)} is in it, which a "
            "sweep would overwrite. Choose another folder, or move that file away."
        )


def make_folders(out: Path, folders: Sequence[str] = SHARDS[:1]) -> None:
    """Create the folders of a sweep, and mark them as ours; `folders` are those of its shards.

    Raises:
        ValueError: a link that leads out of the sweep's folder.
        OSError: a folder that cannot be written.
    """
    for name in (*folders, "locks"):
        inside(out, name)
    for folder in (out, *(out / name for name in folders), out / "locks"):
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
    claim(out / "locks", "sweep", taken=())


def clear_halves(out: Path) -> None:
    """Remove what killed writers left half-written, in this version and in 0.1.0."""
    for folder, names in (
        (out, "|".join(map(re.escape, (*FILES, *OF_TEXTS)))),
        *((out / name, _SHARD) for name in SHARDS if (out / name).is_dir()),
        (out / "locks", re.escape(MARKER)),
    ):
        earlier = re.compile(rf"(?:{names})\..+-[0-9]+\.tmp")
        left = [path for path in folder.iterdir() if earlier.fullmatch(path.name)]
        for half in (*left, *halves_of(folder, names)):
            half.unlink(missing_ok=True)


# -- checksums ---------------------------------------------------------------------------------


def sealed(parquet: bytes) -> bytes:
    """A Parquet file with the checksum of its bytes in it."""
    at = _footer(parquet)
    return parquet[:at] + SEAL + hashlib.sha256(parquet).digest() + parquet[at:]


def unsealed(content: bytes, *, required: bool) -> bytes:
    """The Parquet file that `sealed` was given.

    Args:
        content: the bytes of the file.
        required: whether the file must have a checksum.

    Raises:
        DamagedError: any byte differs from what was written.
    """
    at = _footer(content) - SEALED
    if at >= 0 and content[at : at + len(SEAL)] == SEAL:
        parquet = content[:at] + content[at + SEALED :]
        if hashlib.sha256(parquet).digest() == content[at + len(SEAL) : at + SEALED]:
            return parquet
        raise DamagedError("its checksum differs")
    # A damaged length of the footer points elsewhere.
    if required or SEAL in content:
        raise DamagedError("its checksum is not where it should be")
    return content


def _footer(parquet: bytes) -> int:
    """Where the footer of a Parquet file begins: its length is in front of the last four bytes."""
    return len(parquet) - 8 - int.from_bytes(parquet[-8:-4], "little")


def sealed_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its checksum."""
    return {**value, "sha256": json_digest(json.loads(json.dumps(value)))}


def check_json(content: Mapping[str, Any], *, required: bool = False) -> None:
    """Check the checksum of a JSON file's content, if it has or must have one.

    Raises:
        DamagedError: the content is not what was written.
    """
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if (required or "sha256" in content) and content.get("sha256") != json_digest(rest):
        raise DamagedError("its checksum differs")
