"""Locks between processes, which the system takes back from a process that dies.

A lock is waited for with a word, never silently, and a file system that has no locks is refused:
the substitutes for them outlive a process that is killed.
"""

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

#: Seconds of waiting after which it is said what is waited for; said again after twice as long, …
SAID = 5.0
#: … but at least this often (seconds).
SELDOM = 600.0

#: What systems answer on file systems that have no locks.
_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockError(OSError):
    """A lock that this place cannot have; the message says why and what to do."""


@contextlib.contextmanager
def locked(
    path: Path, *, wait: bool = True, say: Callable[[str], object] = print
) -> Iterator[bool]:
    """Hold the lock of a file, whose folder is there.

    Args:
        path: the lock's file. It is made, never written to, and left where it is.
        wait: whether to wait for another process that holds it.
        say: where it goes what is waited for, if that takes long.

    Yields:
        Whether it is held: without `wait`, another process may hold it.

    Raises:
        LockError: a file system without locks, or a link where the lock's file should be.
        OSError: a folder that cannot be written.
    """
    lock: BaseFileLock = FileLock(path)
    with _said_if_hung(path, say):
        held = _acquire(lock, path, 0.0)
    pause = SAID
    while wait and not held:
        held = _acquire(lock, path, pause)
        if not held:
            say(f"waiting for {path}, which {holder(path)} holds")
            pause = min(2 * pause, SELDOM)
    try:
        yield held
    finally:
        if held:
            lock.release()


def holder(path: Path) -> str:
    """Who holds the lock of a file, where this system tells."""
    with contextlib.suppress(OSError):
        state = path.stat()
        place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            kind, *_, process, where, _, _ = line.split()[1:]
            if kind == "FLOCK" and where == place and int(process) > 0:
                return f"process {process}"
    return "another process"


@contextlib.contextmanager
def _said_if_hung(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """By a timer: on some network file systems, asking for a lock without waiting hangs."""
    note = f"{path} cannot be locked yet: its file system does not answer"
    timer = threading.Timer(SAID, say, (note,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _acquire(lock: BaseFileLock, path: Path, seconds: float) -> bool:
    """Try for so long; whether it is held now."""
    try:
        with warnings.catch_warnings():
            # filelock's own substitute, which is refused below.
            warnings.filterwarnings("ignore", message="flock not supported")
            lock.acquire(timeout=seconds)
        held = True
    except Timeout:
        held = False
    except (OSError, NotImplementedError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOSYS
        if number in _MISSING:
            raise _without(path, os.strerror(number)) from None
        if path.is_symlink():
            raise LockError(
                f"{path} is a link, where the file of a lock should be. Remove it."
            ) from None
        raise
    if isinstance(lock, SoftFileLock):
        if held:
            lock.release()
        raise _without(path, os.strerror(errno.ENOSYS))
    return held


def _without(path: Path, why: str) -> LockError:
    return LockError(
        f"the file system of {path.parent} has no file locks ({why}), so processes could meet "
        "there. Choose a folder on another file system."
    )
