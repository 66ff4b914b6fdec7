"""Devices that a sweep should run on, checked before anything is written or loaded."""

import re
from collections.abc import Sequence

import torch

from graftlens.configfile import ConfigError


def check_devices(devices: Sequence[str]) -> None:
    """Refuse devices that do not exist here, or whose numbers would differ.

    Args:
        devices: as torch names them, such as ``cuda:0``.

    Raises:
        ConfigError: no device, one that does not exist here, or devices of several kinds.
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
                f"{devices!r} is not a list of devices. Give one or more of {', '.join(here)}.",
            )
        )
    if unknown := [device for device in devices if device not in here and not _works(device)]:
        raise ConfigError(
            (
                "devices",
                f"{', '.join(map(repr, unknown))} does not exist here. Available: "
                f"{', '.join(here)}.",
            )
        )
    if len({re.sub(":.*", "", device) for device in devices}) > 1:
        raise ConfigError(
            (
                "devices",
                f"{', '.join(devices)} are of several kinds, whose results differ in the last "
                "digits: a row would depend on which one computed it. Give devices of one kind.",
            )
        )


def _works(device: str) -> bool:
    """Whether torch can compute there: it accepts more kinds than those listed."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
