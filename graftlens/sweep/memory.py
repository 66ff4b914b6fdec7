"""How much memory a sweep may use, and what to do when it runs out."""

import gc

import psutil
import torch

from graftlens.model.arch import Architecture
from graftlens.sweep.counts import row_bytes

#: Rows per pass beyond which nothing gets faster; smaller passes lose less when memory runs out.
ENOUGH_ROWS = {"cpu": 4096, "cuda": 65536}
#: Share of the free memory that activations may take, as estimated.
SHARE = 0.5


def affordable_rows(arch: Architecture, device: torch.device | str, dtype: torch.dtype) -> int:
    """Token rows that a forward pass may hold, given the memory that is free now."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    enough = ENOUGH_ROWS.get(device.type, ENOUGH_ROWS["cpu"])
    return max(1, min(enough, int(SHARE * free / row_bytes(arch, dtype.itemsize))))


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
