"""Shards taken one after another by several processes: nothing is lost, and nothing waits for the
dead.

A shard is computed under a lock that vanishes with its process, so that the shard of a killed
worker is taken over. Locks only save work: a shard computed twice has equal rows.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlens.locks import holder
from graftlens.sweep.disk import lock, lock_path, write
from graftlens.sweep.shards import Shards

#: Seconds between two checks for shards that another process holds.
POLL = 0.5


@dataclass(eq=False)
class Job:
    """One table's shards, on their way.

    Attributes:
        out: the sweep's folder.
        shards: the table's.
        compute: the bytes of a shard's file.
        bar: shows how many rows are there.
        unit: how many rows the bar counts as one.
        missing: the shards that are not there yet.
    """

    out: Path
    shards: Shards
    compute: Callable[[int], bytes]
    bar: Any
    unit: int = 1
    missing: list[int] = field(default_factory=list)

    def advance(self, rows: int) -> None:
        """Show that so many more rows are computed."""
        self.bar.update(rows / self.unit)

    def take(self, shards: Collection[int]) -> None:
        """Compute what is missing of these and no other process computes."""
        for shard in [shard for shard in self.missing if shard in shards]:
            if self._take(shard):
                self.missing.remove(shard)
                left = sum(map(self.shards.rows, self.missing))
                self.bar.update((self.shards.total - left) / self.unit - self.bar.n)

    def _take(self, shard: int) -> bool:
        """Compute a shard unless another process does; whether it exists now."""
        if self.shards.read(self.out, shard) is not None:
            return True
        with lock(self.out, self.lock_name(shard), wait=False) as held:
            if held and self.shards.read(self.out, shard) is None:
                write(self.out, self.shards.path(self.out, shard), self.compute(shard))
            return held

    def lock_name(self, shard: int) -> str:
        kind = "" if self.shards.folder == "shards" else f"{self.shards.folder}-"
        return f"{kind}{shard:05d}"


def fill(
    jobs: Sequence[Job], rounds: int, begin: Callable[[int], None], say: Callable[[str], object]
) -> None:
    """Compute all that is missing, or wait for those that do.

    Args:
        jobs: the tables.
        rounds: how many members there are, or 1.
        begin: called before the shards of each member are taken.
        say: called with whom is waited for.
    """
    for number in range(rounds):
        begin(number)
        for job in jobs:
            job.take(job.shards.of(number))
    waiting = False
    while any(job.missing for job in jobs):
        before = sum(len(job.missing) for job in jobs)
        for job in jobs:
            job.take(range(len(job.shards)))
        left = [(job, shard) for job in jobs for shard in job.missing]
        if left and len(left) == before:
            if not waiting:
                job, first = left[0]
                held = holder(lock_path(job.out, job.lock_name(first)))
                say(
                    f"waiting for other processes: {len(left)} of "
                    f"{sum(len(job.shards) for job in jobs)} shards, the first held by {held}"
                )
            waiting = True
            time.sleep(POLL)
