"""How much memory a sweep may use, and what to do when it runs out."""

import gc
from collections.abc import Callable, Sequence

import psutil
import torch

from graftlens.model.arch import Architecture
from graftlens.sweep.counts import row_bytes

#: Rows per pass beyond which nothing gets faster; smaller passes lose less when memory runs out.
ENOUGH_ROWS = {"cpu": 4096, "cuda": 65536}
#: Share of the free memory that activations may take, as estimated.
SHARE = 0.5


def affordable_rows(
    arch: Architecture, device: torch.device | str, dtype: torch.dtype, row: int | None = None
) -> int:
    """Token rows that a pass may hold, given the memory that is free now.

    Args:
        arch, device, dtype: the model's.
        row: bytes that a row takes; None is what it takes in a forward pass.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    enough = ENOUGH_ROWS.get(device.type, ENOUGH_ROWS["cpu"])
    return max(1, min(enough, int(SHARE * free / (row or row_bytes(arch, dtype.itemsize)))))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "out of memory" in text


def free_memory(device: torch.device | str) -> None:
    """Release what a failed pass held."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def halving(
    batches: Sequence[Sequence[int]],
    run: Callable[[Sequence[int]], object],
    device: torch.device | str,
    say: Callable[[str], None] = print,
) -> None:
    """Run batches of numbered items one after another; one that memory runs out on in two halves,
    and no later one larger than these.

    Raises:
        RuntimeError: memory runs out on a single item. So does any other error of `run`.
    """
    waiting = [list(batch) for batch in batches]
    while waiting:
        batch = waiting[0]
        try:
            run(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
        else:
            waiting.pop(0)
            continue
        # Outside the handler, so that the error's frames no longer hold the tensors.
        free_memory(device)
        most = len(batch) // 2
        waiting = [b[i : i + most] for b in waiting for i in range(0, len(b), most)]
        say(f"Memory ran out: continuing with at most {most} prompts per pass.")
