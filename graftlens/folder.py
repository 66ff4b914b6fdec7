"""The project's own files and folders: read with plain messages about what is wrong, and written as
a whole.

What is written appears in one rename, never through a link that somebody planted, and never outside
the folder that it belongs to. What is not ours is recognised by what is missing inside, not by its
name, and is left alone.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Names that Windows reserves for devices, whatever their suffix.
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in "0123456789¹²³")}
)

#: Where commands write what nobody named a folder for.
RUNS = Path("graftlens-runs")

#: Most UTF-8 bytes of a name; suffixes, digests and marks of unfinished files come on top.
LONGEST_NAME = 120


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
    """Plain values of a JSON text; a key that appears twice is refused, as in YAML, and so is
    anything that no text or number can hold: half of a character, a number with thousands of
    digits.

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

    def whole(digits: str) -> int:
        if len(digits) > 1000:
            raise ValueError(f"{where}: a number of {len(digits)} digits is too long.")
        return int(digits)

    try:
        values = json.loads(text, object_pairs_hook=once, parse_int=whole)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(
            f"{where} contains half of a character (\\u{half:04x}), which no text can hold."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None


def read_json(path: str | Path, advice: str) -> Any:
    """The content of a JSON file, where each error names the file and says what to do.

    Args:
        path: the file.
        advice: what to do if it is missing or damaged: one sentence.

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

    It is written next to its place, flushed to disk, and moved there in one rename: a reader never
    sees half a file, an older file survives a write that fails, and a link at the path is replaced,
    not followed.

    Raises:
        UnwritableError: a folder that cannot be written, or a full disk; nothing half-written is
            left.
    """
    path = Path(path).expanduser()
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        half = _half(path)
        try:
            _write(half, content.encode() if isinstance(content, str) else content)
            half.replace(path)
        finally:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
        sync(path.parent)
    return path


class UnwritableError(OSError):
    """A place that cannot be written; the message names it and says what to do."""

    def __init__(self, path: Path, error: OSError) -> None:
        what = error.strerror or " ".join(str(error).split())
        super().__init__(error.errno, what)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Free space there" if full else "Make its folder writable"
        self.said = f"{path} cannot be written ({what.lower()}). {advice}, or choose another place."

    def __str__(self) -> str:
        return self.said


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Report a disk error with the place and what to do.

    Raises:
        UnwritableError: a folder that cannot be written, or a full disk.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(path, error) from None


def writable(path: str | Path) -> Path:
    """The path of a file that is to be written later, with `~` expanded, if it can be written.

    Call it before long work. Nothing is left behind.

    Raises:
        UnwritableError: a folder of that name, a folder that cannot be made or written, a name that
            is too long, a full disk.
    """
    path = Path(path).expanduser()
    with told_of(path):
        probe(path)
    return path


#: How often a folder is made again that another process, which tried the same, has removed.
TRIES = 100


def probe(path: Path) -> None:
    """Write something next to a file that is to be written later, and remove it again.

    Raises:
        OSError: the file cannot be written there.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)  # finds names that are too long
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _try_writing(path)
    return _try_writing(path)


def _try_writing(path: Path) -> None:
    missing: list[Path] = []
    for folder in path.parents:
        if os.path.lexists(folder):
            break
        missing.append(folder)
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                made.append(folder)
        half = _half(path)
        try:
            _write(half, bytes(4096))
        finally:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process has written into it
                folder.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a folder to make, which then appears as `folder`: whole, on the disk, or
    not at all.

    It is alone in a working folder next to `folder`, which is removed.

    Raises:
        OSError: a folder that cannot be written, or one that already exists.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        content = work / "content"
        yield content
        flush(content)
        move(content, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move(path: Path, place: Path) -> None:
    """Rename a file or folder, on the disk as well."""
    path.rename(place)
    sync(place.parent)


def sync(folder: Path) -> None:
    """Flush the folder's names to disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush(folder: Path) -> None:
    """Flush every file of the folder to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -- whose a folder is -------------------------------------------------------------------------

#: The file in a folder that marks it as ours and says what it is.
MARKER = ".graftlens"


def claim(folder: Path, what: str, taken: Iterable[str] | None = None) -> None:
    """Make a folder ours by a marker in it, before anything else is written there.

    Args:
        folder: it need not exist yet.
        what: what the folder is, which the marker says.
        taken: what would be written; a folder without the marker is refused if it has any of
            these, or by default if it has anything at all.

    Raises:
        ValueError: a file, or a folder with somebody else's content.
        OSError: a folder that cannot be written.
    """
    if is_claimed(folder, what):
        return
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Choose another.")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if taken is not None:
        # A marker that cannot be read is rewritten, but a link belongs to somebody else.
        there &= {*taken, *([MARKER] if (folder / MARKER).is_symlink() else [])}
    others = sorted(there)
    if others and not is_claimed(folder, what):  # another process may just have claimed it
        raise ValueError(
            f"{folder} has {', '.join(others[:3])}{' and more' if len(others) > 3 else ''} in it "
            f"and no {MARKER} of {what}, so graftlens did not create it, and nothing "
            "there is overwritten. Choose another folder."
        )
    write_whole(folder / MARKER, f"graftlens {what}\n")


def is_claimed(folder: Path, what: str) -> bool:
    """Whether a folder has our marker, whatever its name."""
    marker = folder / MARKER
    try:
        return not marker.is_symlink() and marker.read_bytes() == f"graftlens {what}\n".encode()
    except OSError:
        return False


# -- what a folder holds and what is given -----------------------------------------------------

#: Differences that a refusal shows, and characters of a long value around where it differs.
SHOWN, WIDE = 20, 160


def differences(
    there: Any, given: Any, name: str = "", *, besides: Collection[str] = ()
) -> list[str]:
    """A line for each key whose values differ, in the order of the keys.

    Args:
        there: plain values, as JSON has them.
        given: likewise.
        name: the key that they are found at, for the lines.
        besides: keys that may differ, with dots into sections.
    """
    if there == given or name in besides:
        return []
    if isinstance(there, Mapping) and isinstance(given, Mapping):
        lines = []
        for key in dict.fromkeys([*there, *given]):
            inner = f"{name}.{key}" if name else str(key)
            lines += differences(there.get(key), given.get(key), inner, besides=besides)
        return lines
    if isinstance(there, list) and isinstance(given, list):
        return differences(dict(enumerate(there)), dict(enumerate(given)), name, besides=besides)
    old, new = ("nothing" if value is None else repr(value) for value in (there, given))
    if max(len(old), len(new)) > WIDE:
        pairs = enumerate(zip(old, new, strict=False))
        start = max(0, next((i for i, (a, b) in pairs if a != b), WIDE) - WIDE // 4)
        old, new = (f"…{text[start : start + WIDE]}…" for text in (old, new))
    return [f"  {name}: {old} there, {new} given"]


def refusal(what: str, lines: Sequence[str], advice: str) -> str:
    """A message of differences.

    Args:
        what: what is there, such as "FOLDER holds another sweep".
        lines: as `differences` gives them.
        advice: what to do.
    """
    more = [f"  … and {len(lines) - SHOWN} more differences"] if len(lines) > SHOWN else []
    return "\n".join([f"{what}:", *lines[:SHOWN], *more, advice])


def refuse_differences(
    what: str, there: Any, given: Any, advice: str, *, besides: Collection[str] = ()
) -> None:
    """Check that what a folder holds is what is given.

    Raises:
        ValueError: the two differ; the message has each difference.
    """
    if lines := differences(there, given, besides=besides):
        raise ValueError(refusal(what, lines, advice))


def halves(path: Path) -> Iterator[Path]:
    """Remove what killed writers of `path` left next to it."""
    return halves_of(path.parent, re.escape(_shortened(path.name)))


def halves_of(folder: Path, names: str) -> Iterator[Path]:
    """What killed writers left in a folder of files with certain names (a regular expression)."""
    ours = re.compile(rf"\.(?:{names})\.[0-9]+-[0-9a-f]{{16}}\.tmp")
    return (path for path in folder.iterdir() if ours.fullmatch(path.name))


def inside(folder: Path, *names: str) -> Path:
    """The path of `names` in `folder`, each of them a name and not a path to somewhere else.

    Raises:
        ValueError: a name that is empty, that has a separator in it, or that leads out of `folder`
            (``..``, an absolute path, a link to elsewhere).
    """
    path = folder
    for name in names:
        if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(
                f"{name!r} is used as the name of a file, so it may not be empty, be . or .., or "
                "contain / or \\. Choose another name."
            )
        path = path / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a ring, or a name that is too long
        within = False
    if not within:
        raise ValueError(f"{path} leads out of {folder}. Remove the link, or choose another name.")
    return path


def name_fault(name: str) -> str:
    """What is wrong with a name chosen for a file or folder; empty if nothing is.

    It must mean the same on every system and to every reader: not a path to another folder, not a
    Windows device, and nothing invisible or that only looks like a separator.
    """
    # Width folding turns a fullwidth solidus into a solidus, and two dots may be one character.
    for text in (name, unicodedata.normalize("NFKC", name)):
        if not text.strip():
            return "a name may not be empty"
        if bad := [c for c in text if c in '/\\<>:"|?*' or unicodedata.category(c)[0] == "C"]:
            return f"a name may not contain {bad[0]!r}"
        if bad := [c for c in text if unicodedata.category(c) in ("Zl", "Zp")]:
            return f"a name may not contain {bad[0]!r}"
        if text[0] in ".-~ " or text[-1] in ". ":
            return "a name may not begin with . - ~ or a space, nor end with . or a space"
        if text.split(".")[0].strip().lower() in _DEVICES:
            return "Windows reserves this name for a device"
        if len(text.encode()) > LONGEST_NAME:
            return (
                f"a name may have up to {LONGEST_NAME} bytes, but this one has {len(text.encode())}"
            )
    return ""


def name_problems(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, what is wrong with it) for names of files or folders side by side; also for two that
    some file systems treat as the same."""
    problems: list[tuple[str, str]] = []
    known: dict[str, str] = {}
    for name in names:
        if fault := name_fault(name):
            what = f"{_shown(name)} is used as the name of a file, and {fault}. Choose another."
            problems.append((name, what))
        same = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        other = known.setdefault(same, name)
        if other != name:
            what = f"{other!a} and {name!a} are the same name on some file systems."
            problems.append((name, f"{what} Choose another for one of them."))
    return problems


def at_home(path: str | Path) -> Path:
    """The path with a ``~`` at its beginning replaced by the home folder.

    Raises:
        ValueError: ``~name`` of a user who does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path} begins with the home folder of a user who does not exist. Write the path out."
        ) from None


def _shown(name: str) -> str:
    """A name in a message: no character acts on the terminal, and a long one is cut."""
    return repr(name) if len(name) <= 60 else f"{name[:60]!r}…"


def _half(path: Path) -> Path:
    """A name that nobody can guess, for the file while it is being written."""
    name = _shortened(path.name)
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _shortened(name: str) -> str:
    """As much of a name as leaves room for what `_half` adds: names have at most 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def _write(half: Path, content: bytes) -> None:
    """Write a new file, on the disk when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(half, flags, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
