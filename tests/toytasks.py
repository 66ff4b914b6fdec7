"""Functions that processes and array tasks run in tests; they are found by name."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from waiting import HANG

from graftlens import engines


def write(path: Path, text: str = "done") -> None:
    print(f"writing {path.name}")
    path.write_text(text)


def die(path: Path) -> None:
    """Leave a mark, and be killed."""
    path.write_text("here")
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(message: str) -> None:
    raise ValueError(message)


def wait_long(path: Path) -> None:
    """Leave one mark at the start and another at the end, which comes early at an interruption."""
    engines.GRACE = 2 * HANG  # a busy machine may take its time to write the other mark
    try:
        path.write_text(str(os.getpid()))
        time.sleep(HANG)
    finally:
        path.with_suffix(".ended").write_text("ended")


def need_turns(path: Path, turns: int) -> None:
    """Count the starts, and end by oneself only in the last of so many turns."""
    with path.open("a") as file:
        file.write("turn\n")
    if len(path.read_text().splitlines()) < turns:
        time.sleep(HANG)


def fail_when_ended(path: Path, then: str) -> None:
    """In the first turn, fail as soon as Slurm ends the task; in the second, end well or die."""
    with path.open("a") as file:
        file.write("turn\n")
    if path.read_text() != "turn\n":
        return os.kill(os.getpid(), signal.SIGKILL) if then == "die" else None

    def failed(*_: object) -> None:
        raise RuntimeError("ended by Slurm")

    signal.signal(signal.SIGTERM, failed)
    path.with_name("ready").touch()
    time.sleep(HANG)
    return None


def threads(path: Path) -> None:
    names = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")
    path.write_text(" ".join(os.environ.get(name, "none") for name in names))


def die_once(mark: Path, out: Path, **more: Any) -> None:
    """Be a sweep's worker that is killed at its second shard, if it is the first to get there."""
    from graftlens.sweep import claim, runner

    write, shards = claim.write, []

    def fatal(folder: Path, path: Path, content: bytes) -> None:
        if path.parent.name == "shards":  # the shard's lock is held
            shards.append(path)
        if len(shards) == 2:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        write(folder, path, content)

    claim.write = fatal
    runner.work(out, **more)


def fail_to_work(*_: Any, **__: Any) -> None:
    fail("the disk is gone")
