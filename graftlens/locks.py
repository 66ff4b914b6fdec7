"""Locks between processes, which the system releases when a process dies.

Waiting for a lock is announced, never silent, and a file system without locks is refused:
substitutes for locks outlive a process that is killed.
"""

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

#: Seconds of waiting after which a message says what is waited for; repeated after twice as long, …
SAID = 5.0
#: … but at least this often (seconds).
SELDOM = 600.0

#: Errors that systems raise on file systems that have no locks.
_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockError(OSError):
    """A lock that is not possible here; the message says why and what to do."""


@contextlib.contextmanager
def locked(
    path: Path, *, wait: bool = True, say: Callable[[str], object] = print
) -> Iterator[bool]:
    """Hold the lock of a file whose folder exists.

    Args:
        path: the lock's file. It is created, never written to, and left in place.
        wait: whether to wait for another process that holds it.
        say: called with what is waited for, if that takes long.

    Yields:
        Whether the lock is held: without `wait`, another process may hold it.

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
    """Who holds the lock of a file, if this system can tell."""
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
    """Called by a timer: on some network file systems, requesting a lock without waiting hangs."""
    note = f"{path} cannot be locked yet: its file system does not answer"
    timer = threading.Timer(SAID, say, (note,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _acquire(lock: BaseFileLock, path: Path, seconds: float) -> bool:
    """Try for `seconds`; whether the lock is held now."""
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
            raise LockError(f"{path} is a link where a lock file should be. Remove it.") from None
        raise
    if isinstance(lock, SoftFileLock):
        if held:
            lock.release()
        raise _without(path, os.strerror(errno.ENOSYS))
    return held


def _without(path: Path, why: str) -> LockError:
    return LockError(
        f"the file system of {path.parent} has no file locks ({why}), so processes could "
        "interfere with each other there. Choose a folder on another file system."
    )
