"""The dashboard: one prompt under several runs, on one page that needs no network.

What is grafted where, tokens coloured by a measure, the logit lens, where the answer comes up, and
attention head by head. It takes arrays and tables; `graftlens.lens` makes them.
"""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from graftlens.folder import write_whole
from graftlens.viz import attention, dashboardscript, drawing, theme
from graftlens.viz.dashboarddata import DashboardData, LensArrays, Run
from graftlens.viz.lens import answer_by_layer
from graftlens.viz.lenstables import listed
from graftlens.viz.page import Figure
from graftlens.viz.quantities import Quantity
from graftlens.viz.render import render
from graftlens.viz.screenshot import screenshot
from graftlens.viz.spelling import inline, spanned
from graftlens.viz.text import common_note

#: The narrowest that two charts side by side come to, pixels.
NARROW = 416

#: Columns on the answer, and how they are written.
_RANKED = (("rank", ".0f"), ("prob", ".4f"), ("logprob", ".3f"))


class Dashboard:
    """A dashboard: shown by a notebook, saved as a page or as a picture."""

    def __init__(self, data: DashboardData) -> None:
        self.data = data
        self.html = dashboard_page(data)

    def save(self, path: str | Path) -> Path:
        """Write the page to `path` and return it; it appears whole or not at all."""
        return write_whole(path, self.html)

    def save_image(
        self,
        path: str | Path,
        *,
        width: int = 1800,
        height: int | None = None,
        scale: int | float = 1,
        dark: bool = False,
    ) -> Path:
        """Write a PNG of the page, as `graftlens.viz.screenshot.screenshot` does."""
        with tempfile.TemporaryDirectory(prefix="graftlens-") as folder:
            saved = self.save(Path(folder) / "dashboard.html")
            return screenshot(saved, path, width=width, height=height, scale=scale, dark=dark)

    def __repr__(self) -> str:
        return f"<dashboard of {self.data.text!r} under {listed(self.data.runs)}>"

    def _repr_html_(self) -> str:
        return attention.frame(self.html, height=900, title=self.data.title)


def dashboard_page(data: DashboardData) -> str:
    """The whole page as HTML.

    Raises:
        ValueError: the lens table lacks a run, a layer or a position; or the table of KL
            divergences does.
        ModuleNotFoundError: CircuitsVis is not installed.
    """
    lens = LensArrays(data)
    layers = np.shape(data.runs["PRE"].pattern)[0]
    differ = dashboardscript.apart(data)
    start = _start(differ)
    kept = dashboardscript.kept(data, differ)
    return render(
        "dashboard.html",
        title=data.title,
        text=data.text,
        answer=data.answer,
        target=lens.target,
        ranked=[] if lens.target is None else [_heading(name) for name, _ in _RANKED],
        outputs=_outputs(data, lens),
        base=data.sources[0],
        others=list(data.sources[1:]),
        colors=theme.source_colors(data.sources),
        strips=[_strip(data, name, run) for name, run in data.runs.items()],
        runs=[(str(number), run, False) for number, run in enumerate(data.runs)],
        chosen=2 if len(data.runs) > 2 else 1,
        measures=dashboardscript.measures(data),
        kinds=dashboardscript.kinds(lens),
        first_kind="kl_base" if lens.target is None else "logprob",
        common=common_note(data.lens),
        skipped=lens.skipped(layers),
        rise=_rise(data, lens),
        layers=[(str(layer), str(layer), False) for layer in range(layers)],
        start=start,
        provenance=data.provenance,
        left_out=kept.note,
        facts=dashboardscript.facts(data, lens, differ, kept) | {"start": start},
        circuitsvis=attention.circuitsvis_script(),
        patterns=kept.texts,
    )


def _outputs(data: DashboardData, lens: LensArrays) -> list[dict[str, object]]:
    """Run by run: its name and rule, where the answer is at the end, and its likeliest tokens."""
    fills = theme.graft_fills(data.runs)
    return [
        {
            "name": name,
            "rule": _rule(name, run),
            "color": fills[name].color,
            "hatched": bool(fills[name].pattern),
            "numbers": []
            if lens.target is None
            else [(what, _written(lens.last(name, what), form)) for what, form in _RANKED],
            "guesses": list(zip(lens.top[name][-1], lens.top_probs[name][-1, -1], strict=False)),
        }
        for name, run in data.runs.items()
    ]


def _heading(name: str) -> dict[str, str]:
    quantity = Quantity.of(name)
    # Shares are written from 0 to 1 here, to four digits, and have no unit.
    return {"name": quantity.short, "unit": "" if quantity.share else quantity.unit}


def _rule(name: str, run: Run) -> str:
    """The graft's text; nothing where it is the run's name as well."""
    return "" if run.rule == name else run.rule


def _strip(data: DashboardData, name: str, run: Run) -> dict[str, object]:
    """A run's tokens with the sources that each takes weights from, and the places in words."""
    others = data.sources[1:]
    shares = {s: np.asarray(run.shares[s], dtype=float) for s in others if s in run.shares}
    known = theme.source_colors(data.sources)
    tokens = []
    for at, token in enumerate(data.tokens):
        here = {source: share[:, at] for source, share in shares.items() if share[:, at].any()}
        tokens.append(
            {
                "text": token,
                "at": at,
                "role": data.roles[at] if data.roles else "",
                "where": run.where[at],
                "sources": list(here),
                # A share is a sum of many small ones.
                "whole": len(here) == 1 and bool(np.all(next(iter(here.values())) > 1 - 1e-6)),
                "stripes": _stripes([known[source] for source in here]),
            }
        )
    places: dict[str, list[int]] = {}
    for at, said in enumerate(run.where):
        if said:
            places.setdefault(said, []).append(at)
    return {
        "name": name,
        "rule": _rule(name, run),
        "said": [(role, list(group)) for role, group in groupby(tokens, itemgetter("role"))],
        "places": [
            f"{'position' if len(at) == 1 else 'positions'} {spanned(at)}: {said}"
            for said, at in places.items()
        ],
    }


def _stripes(colors: Sequence[str]) -> str:
    """Colours side by side, tinted as one alone is, as stops of a gradient."""
    ends = [f"{100 * i / len(colors):.0f}%" for i in range(len(colors) + 1)] if colors else []
    return ", ".join(
        f"color-mix(in srgb, {color} 25%, transparent) {low} {high}"
        for color, (low, high) in zip(colors, pairwise(ends), strict=True)
    )


def _rise(data: DashboardData, lens: LensArrays) -> list[Figure]:
    """Rank and log-probability of the answer by layer; nothing without an answer."""
    if lens.target is None:
        return []
    target, runs = inline(lens.target), ", ".join(data.runs)
    fitting = drawing.legend_above(list(data.runs), 380, NARROW)
    table = data.lens if data.rise is None else data.rise
    rows = pd.concat([table[table["graft"] == run] for run in data.runs])
    return [
        Figure(
            f"{what[0].upper()}{what[1:]} of {target} at the last position, by layer{how}",
            f"Lines of {runs}: the answer's {what} after each layer.",
            answer_by_layer(rows, value).update_layout(fitting),
        )
        for value, how in (("rank", " (logarithmic; 1 on top)"), ("logprob", ""))
        for what in (Quantity.of(value).short,)
    ]


def _start(differ: Mapping[tuple[int, int], dashboardscript.Apart]) -> tuple[int, int]:
    """Layer and head where the last token attends most differently under PRE and SFT."""
    last = differ[0, 1].last
    layer, head = np.unravel_index(int(last.argmax()), last.shape)
    return int(layer), int(head)


def _written(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form).replace("-", "−")
