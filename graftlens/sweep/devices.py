"""Devices that a sweep is told to run on, looked for before anything is written or loaded."""

import re
from collections.abc import Sequence

import torch

from graftlens.configfile import ConfigError


def check_devices(devices: Sequence[str]) -> None:
    """Refuse devices that are not here, or whose numbers would differ.

    Args:
        devices: as torch names them, such as ``cuda:0``.

    Raises:
        ConfigError: no device, one that is not here, or devices of several kinds.
    """
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if len(here) > 1:
        here.append("cuda")
    if torch.backends.mps.is_available():
        here.append("mps")
    if isinstance(devices, str) or not devices:
        raise ConfigError(
            (
                "devices",
                f"{devices!r} is no list of devices. Give one or more of {', '.join(here)}.",
            )
        )
    if unknown := [device for device in devices if device not in here and not _works(device)]:
        raise ConfigError(
            (
                "devices",
                f"{', '.join(map(repr, unknown))} is not here. There are {', '.join(here)}.",
            )
        )
    if len({re.sub(":.*", "", device) for device in devices}) > 1:
        raise ConfigError(
            (
                "devices",
                f"{', '.join(devices)} are of several kinds, whose last digits differ: a row would "
                "show which one computed it. Give devices of one kind.",
            )
        )


def _works(device: str) -> bool:
    """Whether torch can compute there: it knows more kinds than those that are listed."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
