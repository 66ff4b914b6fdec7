"""Waiting for events, however busy the machine is.

A test waits for what should happen, never for a length of time. The one bound is so long that only
a hang reaches it.
"""

import time
from collections.abc import Callable

#: Seconds after which something that should have happened has hung. No busy machine takes as long.
HANG = 1200.0


def until(
    happened: Callable[[], object], why: Callable[[], object] = lambda: "", *, every: float = 0.02
) -> None:
    """Return once something is so; `why` may say more of what did not happen, or fail earlier.

    Args:
        happened: looked at again and again.
        why: for the message; called only when it has hung.
        every: seconds between two looks.
    """
    end = time.monotonic() + HANG
    while not happened():
        assert time.monotonic() < end, f"it has hung: {why()}"
        time.sleep(every)
