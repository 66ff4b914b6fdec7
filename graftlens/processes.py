"""The processes that train one model together, as accelerate or torchrun started them.

Each has a part of every batch. Only the first one touches the run's folder; the others get what it
read or made there.
"""

import atexit
import itertools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# The others wait while the first one measures perplexity or writes a checkpoint.
PATIENCE = timedelta(hours=12)

# Numbers of the calls by which processes share a value, the same in all of them.
_CALLS = itertools.count()


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
        store, key = _store(), f"graftlens/{next(_CALLS)}"
        if not self.is_first:
            self.wait()  # until it is there
            made, failed = pickle.loads(store.get(key))
            self.wait()
            if failed is not None:
                raise RuntimeError(f"process {self.rank} of {self.count} also stops: {failed}")
            return made
        try:
            made = make()
            said = pickle.dumps((made, None))
            return made
        except BaseException as error:
            said = pickle.dumps((None, f"{type(error).__name__}: {error}"))
            raise
        finally:
            store.set(key, said)
            self.wait()
            self.wait()  # until all have read it: this process may hold the store

    def leave_at_exit(self) -> None:
        """Leave the group before the interpreter ends, after all shared work is done.

        After a failure, leaving could wait for processes that never arrive, so this is called
        after success only.
        """
        if self.count > 1:
            atexit.register(_leave)


def _store() -> Any:
    """Where the group's processes leave each other values.

    Broadcasts would do, too, but a thread of the group keeps what it sent a moment longer, and
    aborts the process if the interpreter ends meanwhile; DistributedDataParallel keeps the group's
    threads for good, so leaving does not wait for them
    (https://github.com/pytorch/pytorch/issues/190489). What a barrier leaves to them is harmless.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


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
