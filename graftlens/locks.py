"""Locks on folders: taken at once or waited for, but never without a word.

A lock is the kernel's (flock), so that it ends with its process. Where a file system has none, that
is said: a lock file that outlives a killed process would keep everybody out.
"""

import errno
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

#: Seconds of waiting before it is said what is waited for.
PATIENCE = 5.0

# What a file system without locks answers; NotImplementedError in older releases of filelock.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Another process holds the lock."""


def take(path: Path, *, held: str, wait: bool = False) -> FileLock:
    """Take the lock of a file, which is made if need be (an empty one; it stays).

    Args:
        path: the file.
        held: what another process does that holds it, such as "finetunes there".
        wait: whether to wait for the lock.

    Returns:
        The lock, to be released.

    Raises:
        BusyError: another process holds it, and `wait` is not set.
        OSError: the folder cannot be written, its file system has no locks, or the file is
            somebody else's.
    """
    _refuse_others(path)
    lock = FileLock(path)
    try:
        with _said_after(PATIENCE, path, held), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fallback that is refused below
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BusyError(f"{path.parent} is in use by another process that {held}.") from None
    except NotImplementedError:
        raise _no_locks(path) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _no_locks(path) from None
        raise OSError(
            f"{path.parent} cannot be written ({error.strerror or error}). Choose another folder."
        ) from None
    if "Soft" in type(lock).__name__:  # filelock changes the class of its own accord
        lock.release()
        raise _no_locks(path)
    return lock


@contextmanager
def held(path: Path, *, by: str) -> Iterator[None]:
    """Wait for the lock of a file and hold it.

    Args:
        path: the file.
        by: what a process does that holds it, such as "fetches the model".

    Raises:
        OSError: as of `take`.
    """
    lock = take(path, held=by, wait=True)
    try:
        yield
    finally:
        lock.release()


def _refuse_others(path: Path) -> None:
    """A file with something in it is nobody's lock, and older releases of filelock empty it."""
    if path.is_symlink() or path.is_dir() or (path.is_file() and path.stat().st_size):
        raise FileExistsError(
            f"{path} is in the way: it is not an empty file, so graftlens did not write it. Move "
            "it away, or choose another folder."
        )


def _no_locks(path: Path) -> OSError:
    return OSError(
        f"the file system of {path.parent} has no locks (flock), so two processes could write "
        "there at once. Choose a folder on a file system that has them."
    )


@contextmanager
def _said_after(seconds: float, path: Path, held: str) -> Iterator[None]:
    """By a timer of its own: on some network file systems the call itself hangs."""
    timer = threading.Timer(
        seconds,
        logger.warning,
        (
            "waiting for the lock %s: another process may hold it that %s; if there is none, its "
            "file system does not answer",
            path,
            held,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
