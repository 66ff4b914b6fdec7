"""Packages that some tests need; without one they are skipped, and say what to do."""

from typing import Any

import pytest


def needs(package: str) -> Any:
    """The package, or a skip."""
    return pytest.importorskip(
        package, reason=f"{package} is not installed: pip install -c constraints.txt -e '.[dev]'"
    )
