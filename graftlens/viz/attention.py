"""Attention heads by CircuitsVis, in a notebook or as a page, without a network."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from graftlens.folder import write_whole
from graftlens.viz import theme
from graftlens.viz.render import render
from graftlens.viz.spelling import inline

#: From no attention to all of it, and below zero, zero, above zero in differences.
PATTERN = theme.SEQUENTIAL[-1]
NEGATIVE, POSITIVE = theme.DIVERGING[1], theme.DIVERGING[-2]


def circuitsvis_script() -> Markup:
    """CircuitsVis's own script (a global `CircuitsVis`), escaped for use inside a script element.

    Raises:
        ModuleNotFoundError: CircuitsVis is not installed.
        FileNotFoundError: it is, without its script.
    """
    # Its Python package is not imported: that would import torch, and probe the network.
    found = importlib.util.find_spec("circuitsvis")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("circuitsvis is not installed: pip install circuitsvis")
    path = Path(next(iter(found.submodule_search_locations))) / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: this circuitsvis was installed without its script; "
            "pip install --force-reinstall circuitsvis"
        )
    script = re.sub(r"\n//# sourceMappingURL=\S*\s*$", "\n", path.read_text(encoding="utf-8"))
    # Inside a script element these would end it, or hide its end; they occur in strings only.
    script = re.sub(r"<(?=/?script|!--)", r"\\x3c", script, flags=re.IGNORECASE)
    # It tries WebAssembly, does without, and would violate the page's policy.
    return Markup(f"const CircuitsVis = (WebAssembly => {{\n{script}\nreturn CircuitsVis;\n}})();")


@dataclass(frozen=True)
class AttentionView:
    """Attention heads by CircuitsVis: shown by a notebook, or saved as a page."""

    html: str
    """A whole page that needs no network."""
    height: int = 900
    """Height in a notebook, pixels."""

    def save(self, path: str | Path) -> Path:
        """Write the page to `path` and return it; it appears whole or not at all."""
        return write_whole(path, self.html)

    def _repr_html_(self) -> str:
        return frame(self.html, height=self.height, title="Attention heads")


def attention_view(
    pattern: np.ndarray,
    tokens: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    height: int = 900,
) -> AttentionView:
    """Attention patterns, or differences of them, head by head: hover to look, click to keep.

    Args:
        pattern: [head, query, key]; where a value is negative it is shown as a difference, on a
            scale that is symmetric around 0, else on one from 0 to 1. What is above the diagonal
            is not shown.
        tokens: one text per position.
        names: one name per head; "head 0", "head 1", … if not given.
        height: of the view in a notebook, in pixels.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
        ModuleNotFoundError: CircuitsVis is not installed.
    """
    pattern = np.asarray(pattern, dtype=np.float64)
    n = len(tokens)
    if pattern.ndim != 3 or pattern.shape[1:] != (n, n) or not n or not len(pattern):
        raise ValueError(
            f"pattern has shape {pattern.shape}; it must be [head, query, key], here "
            f"[head, {n}, {n}] for {n} tokens, with at least one head and one token"
        )
    if not np.isfinite(pattern).all():
        raise ValueError("pattern has values that are not finite; give it without them")
    names = [f"head {head}" for head in range(len(pattern))] if names is None else list(names)
    if len(names) != len(pattern):
        raise ValueError(
            f"{len(names)} names for {len(pattern)} heads; give one name per head, or none"
        )
    signed = bool((pattern < 0).any())
    limit = float(np.abs(np.tril(pattern)).max()) or 1.0 if signed else 1.0
    props = {
        # Rows end at the diagonal: half the cells to draw.
        "attention": [
            [row[: query + 1] for query, row in enumerate(head)]
            for head in np.round(pattern, 4).tolist()
        ],
        "attentionHeadNames": names,
        "tokens": [inline(token) for token in tokens],
        "maxValue": limit,
        "minValue": -limit,
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE if signed else PATTERN,
        "maskUpperTri": True,
    }
    scale = f"from −{limit:.2g} (blue) to {limit:.2g} (red)" if signed else "from 0 to 1"
    html = render(
        "attention.html",
        title="Attention heads",
        scale=scale,
        props=props,
        circuitsvis=circuitsvis_script(),
    )
    return AttentionView(html, height)


def frame(html: str, *, height: int, title: str) -> str:
    """A whole page inside another, such as a notebook's output."""
    return render("frame.html", html=html, height=height, title=title)
