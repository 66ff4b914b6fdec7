"""The processes that train one model together, as accelerate or torchrun started them.

Each has a part of every batch. Only the first one touches the run's folder; the others get what it
read or made there.
"""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# The others wait while the first one measures perplexity or writes a checkpoint.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """One process of a group.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have reached this call."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of `make` in the first process; all processes call this, and all get it.

        Raises:
            RuntimeError: in the other processes, if `make` failed in the first one.
        """
        if self.count == 1:
            return make()
        import torch.distributed

        box: list[Any] = [None, "the first process ended"]
        if not self.is_first:
            torch.distributed.broadcast_object_list(box, src=0)
            if box[1] is not None:
                raise RuntimeError(f"process {self.rank} of {self.count} also stops: {box[1]}")
            return box[0]
        try:
            box = [make(), None]
            return box[0]
        except BaseException as error:
            box = [None, f"{type(error).__name__}: {error}"]
            raise
        finally:
            torch.distributed.broadcast_object_list(box, src=0)

    def leave_at_exit(self) -> None:
        """Leave the group before the interpreter ends, after all shared work is done.

        A thread of the group that still holds tensors then aborts the process
        (https://github.com/pytorch/pytorch/pull/179291). After a failure, leaving could wait
        for processes that never arrive, so this is called after success only.
        """
        if self.count > 1:
            atexit.register(_leave)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the first of those that a launcher started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def started_together(*, cpu: bool) -> Processes:
    """The group that this process was started in; a lone process is a group of one.

    Args:
        cpu: whether they will train on the CPU even if there is an accelerator.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return Processes()
    from accelerate import PartialState  # type: ignore[import-untyped]

    atexit.unregister(_leave)  # what starts now may fail
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)
