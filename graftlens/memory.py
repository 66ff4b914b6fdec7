"""How much memory runs of many prompts may use, and what to do when it runs out."""

import gc
from collections.abc import Callable, Sequence

import psutil
import torch

from graftlens.model.arch import Architecture

#: Rows per pass beyond which nothing gets faster; smaller passes lose less when memory runs out.
ENOUGH_ROWS = {"cpu": 4096, "cuda": 65536}
#: Share of the free memory that activations may take, as estimated.
SHARE = 0.5
#: Cached tokens beyond which a step of generation gets no faster per row.
ENOUGH_CACHED = {"cpu": 1 << 13, "cuda": 1 << 18}
#: Logits that are there at a time, as numbers.
LOGITS = 1 << 24


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


def affordable_cache(arch: Architecture, device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens whose keys and values may be kept at a time, given all the memory that there is.

    What is free now does not count: the same texts are then always generated in the same batches.
    """
    device = torch.device(device)
    if device.type == "cuda":
        _, whole = torch.cuda.mem_get_info(device)
    else:
        whole = psutil.virtual_memory().total
    enough = ENOUGH_CACHED.get(device.type, ENOUGH_CACHED["cpu"])
    # Twice: the keys of a tree are there while each row gets its own.
    token = 2 * 2 * arch.n_layers * arch.n_kv_heads * arch.d_head * dtype.itemsize
    return max(1, min(enough, int(SHARE * whole / token)))


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


def row_bytes(arch: Architecture, item: int) -> int:
    """Approximate bytes of activations that a row takes in a layer; `item` is the bytes of a
    number.

    Counted: the residual stream with its norms and gathered copies, queries, keys, values with
    their rotations, and the inside of the MLP. The lists that attention gathers, and logits, come
    to that: they go in pieces of a fixed size.
    """
    heads = (arch.n_heads + 2 * arch.n_kv_heads) * arch.d_head
    return item * (8 * arch.d_model + 4 * heads + (4 if arch.mlp == "gated" else 3) * arch.d_mlp)
