"""Files and folders of this project's own: read with a plain word for what is wrong, written whole.

What is written appears in one rename, never through a link that somebody planted, and never outside
of the folder that it belongs to. What is not ours is recognised by what is missing inside, not by a
name, and is left alone.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """A UTF-8 file as a person sees it: without a byte order mark.

    Raises:
        OSError: a file that is missing or that cannot be read.
        ValueError: a file of another encoding.
    """
    content = Path(path).expanduser().read_bytes()
    if (place := content.find(0)) >= 0:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {place} is 0, as in UTF-16 or a binary file). "
            "Save it as UTF-8."
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is {content[error.start]:#04x}). "
            "Save it as UTF-8."
        ) from None


def parse_json(text: str, where: str | Path) -> Any:
    """Plain values of a JSON text; a key that appears twice is refused, as in YAML.

    Args:
        text: the JSON text.
        where: the file, or the file and the line, for messages.

    Raises:
        ValueError: text that is not JSON, or a key that appears twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise ValueError(f"{where}: the key {key!r} appears twice. Leave one.")
            made[key] = value
        return made

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None


def read_json(path: str | Path, advice: str) -> Any:
    """The content of a JSON file, whose every fault names the file and says what to do.

    Args:
        path: the file.
        advice: what to do where it is missing or damaged: one sentence.

    Raises:
        ValueError: a file that is missing, unreadable, of another encoding, or not JSON.
    """
    try:
        return parse_json(read_text(path), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}). {advice}") from None
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from None


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` (text as UTF-8) and return the path; missing folders are made.

    It is written beside its place, on the disk, and moved there in one rename: a reader never sees
    half a file, an older file survives a write that fails, and a link at the path is replaced, not
    followed.

    Raises:
        OSError: a folder that cannot be written, or a full disk; nothing half-written is left.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    half = _half(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(half, flags, 0o666), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
    sync(path.parent)
    return path


def sync(folder: Path) -> None:
    """Ask the disk to hold the folder's names."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def halves(path: Path) -> Iterator[Path]:
    """What killed writers of `path` left beside it."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+-[0-9a-f]{{16}}\.tmp")
    return (beside for beside in path.parent.iterdir() if ours.fullmatch(beside.name))


def inside(folder: Path, *names: str) -> Path:
    """The path of `names` in `folder`, each of them a name and not a way to somewhere else.

    Raises:
        ValueError: a name that is empty, that has a separator in it, or that leads out of `folder`
            (``..``, an absolute path, a link to elsewhere).
    """
    path = folder
    for name in names:
        if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(
                f"{name!r} is used as the name of a file, so it may not be empty, be . or .., or "
                "have / or \\ in it. Choose another name."
            )
        path = path / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder}. Remove the link, or choose another name.")
    return path


def _half(path: Path) -> Path:
    """A name that nobody can have guessed, for the file while it is being written."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
