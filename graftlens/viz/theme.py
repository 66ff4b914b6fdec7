"""The colours of every plot: fixed for grafts and sources, safe for colour-blind readers.

The six hues stay apart under simulated protanopia, deuteranopia and tritanopia, and each has a
contrast of at least 3 with white and with the dark surface (tests hold both).
A graft and its complement share a hue; the complement is hatched. Colour is never the only mark:
bars have patterns and outlines, marked tokens are underlined.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GREY = "#8F8F8F"
VERMILION = "#B63A0D"
AMBER = "#C38800"
GREEN = "#147351"
BLUE = "#4291E1"
PURPLE = "#9542A5"

#: For names that are not known here: not the hues of PRE and SFT.
_FREE = (PURPLE, BLUE, AMBER, GREEN)
PALETTE = (*_FREE, VERMILION, GREY)
PATTERNS = ("", "/", ".", "x", "\\", "-")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")

#: Below zero, zero, above zero. Zero is a light grey, so that it differs from an empty cell.
DIVERGING = ("#0a2f5c", "#2166ac", "#8fbfe6", "#ebebeb", "#f0a582", "#b63a0d", "#661a00")
#: From nothing to all, darker all the way.
SEQUENTIAL = ("#e9eff2", "#b7d7e0", "#74b3cc", "#3a86b4", "#215b92", "#112a5c")

_SOURCES = {"pre": GREY, "sft": VERMILION, "task": PURPLE, "relation": GREEN}
_SPANS = {"first_entity": "FE", "last": "LT", "first_entity + last": "FE+LT"}


@dataclass(frozen=True)
class Theme:
    """Colours of a surface and what is written on it; bars dim enough for whiskers to show."""

    surface: str
    text: str
    muted: str
    grid: str
    bar_opacity: float


LIGHT = Theme(surface="#ffffff", text="#1b1f24", muted="#57606a", grid="#d8dde3", bar_opacity=1.0)
DARK = Theme(surface="#15181d", text="#e8eaed", muted="#a3abb5", grid="#3a414b", bar_opacity=0.75)


@dataclass(frozen=True)
class Fill:
    """A bar's colour and its hatch (plotly's pattern shape; "" is plain)."""

    color: str
    pattern: str


_GRAFTS = {
    "PRE": Fill(GREY, ""),
    "SFT": Fill(VERMILION, ""),
    "FE": Fill(AMBER, ""),
    "not-FE": Fill(AMBER, "/"),
    "LT": Fill(GREEN, ""),
    "not-LT": Fill(GREEN, "/"),
    "FE+LT": Fill(BLUE, ""),
    "(FE+LT)^C": Fill(BLUE, "/"),
}
#: Fills of grafts with names of their own, purple first.
_OTHERS = tuple(
    fill
    for pattern in PATTERNS
    for color in _FREE
    if (fill := Fill(color, pattern)) not in _GRAFTS.values()
)


@dataclass(frozen=True)
class Line:
    """How a line is drawn, in plotly's words for dashes and marker symbols."""

    color: str
    dash: str
    marker: str


def colorscale(colors: tuple[str, ...]) -> list[list[object]]:
    """Colours at even distances, as plotly takes them."""
    return [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]


def graft_fill(name: str) -> Fill:
    """The same fill for a graft's name in every plot; a name not known here gets a stable one.

    No other graft has the fill of a known one, nor the hues of PRE and SFT.
    """
    return _GRAFTS.get(name) or _stable(name)


def graft_fills(names: Iterable[str]) -> dict[str, Fill]:
    """A fill for each graft of one view: `graft_fill`, but no hue twice while there are others.

    Only names that are not known here give way, the later to the earlier: first to a hue that is
    free, then to a hatch.
    """
    names = list(dict.fromkeys(names))
    fills = {name: _GRAFTS[name] for name in names if name in _GRAFTS}
    for name in names:
        if name in fills:
            continue
        wanted = _OTHERS.index(graft_fill(name))
        turns = (*_OTHERS[wanted:], *_OTHERS[:wanted])
        free = [fill for fill in turns if fill not in fills.values()]
        hues = {fill.color for fill in fills.values()}
        new = [fill for fill in free if fill.color not in hues]
        fills[name] = (new or free or turns)[0]
    return {name: fills[name] for name in names}


def graft_lines(names: Iterable[str]) -> dict[str, Line]:
    """A line for each graft, in the colour of `graft_fills`; one whose bars are hatched is dashed.

    The marker follows the colour and is open where the line is dashed, so that a graft and its
    complement differ where dashes are hard to see. Of grafts with one colour and dash, the later
    ones get others.
    """
    lines: dict[str, Line] = {}
    for name, fill in graft_fills(names).items():
        color, dash = PALETTE.index(fill.color), DASHES[PATTERNS.index(fill.pattern)]
        hollow = "-open" if fill.pattern else ""
        turns = (Line(fill.color, dash, m + hollow) for m in (*MARKERS[color:], *MARKERS[:color]))
        line = next(turns)
        lines[name] = next((free for free in (line, *turns) if free not in lines.values()), line)
    return lines


def source_color(name: str) -> str:
    """The same colour for a source's name in every plot."""
    return _SOURCES.get(name) or _FREE[_number(name) % len(_FREE)]


def source_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each source of one view, the base first: `source_color`'s, but none twice.

    Names that are not known here give way: the base to grey, the others to a free colour.
    """
    colors = {name: _SOURCES[name] for name in names if name in _SOURCES}
    for name in names:
        if name not in colors:
            start = 0 if name == names[0] else PALETTE.index(source_color(name))
            first = (GREY,) if name == names[0] else ()
            turns = (*first, *PALETTE[start:], *PALETTE[:start])
            free = [c for c in turns if c not in colors.values()]
            # Grey belongs to the base as long as there is another source.
            free.sort(key=lambda color: color == GREY and name != names[0])
            colors[name] = free[0] if free else source_color(name)
    return {name: colors[name] for name in names}


def span_color(name: str) -> str:
    """The colour of the graft at a span's positions, whatever else it names."""
    return graft_fill(_SPANS.get(name, name)).color


def series_fill(index: int) -> Fill:
    """The fill of the index-th series that is neither a graft nor a source, such as a template."""
    # A colour that comes again has another hatch.
    lap, place = divmod(index, len(PALETTE))
    return Fill(PALETTE[place], PATTERNS[(place + lap) % len(PATTERNS)])


def series_line(index: int) -> Line:
    """Colour, dash and marker of the index-th line of a chart."""
    lap, place = divmod(index, len(PALETTE))
    return Line(
        PALETTE[place], DASHES[(place + lap) % len(DASHES)], MARKERS[(place + lap) % len(MARKERS)]
    )


def contrast(one: str, other: str) -> float:
    """How far two colours stand out from one another, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def ink(color: str) -> str:
    """Black or white: what is written in it on the colour has a contrast of 4.5 or more."""
    return max(("#000000", "#ffffff"), key=lambda written: contrast(written, color))


def mixed(colors: Sequence[str], share: float | int) -> str:
    """The colour at a share of the way along colours at even distances, as plotly mixes it."""
    at = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    low = min(int(at), len(colors) - 2)
    pairs = zip(channels(colors[low]), channels(colors[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def whiskers(
    value: "np.ndarray | Sequence[float]",
    low: "np.ndarray | Sequence[float]",
    high: "np.ndarray | Sequence[float]",
    *,
    color: str,
    thickness: float | int = 1.2,
    width: float | int = 4,
) -> dict[str, Any]:
    """Plotly's error bars from `low` to `high`; none where an end is NaN.

    The arrays are numpy's, which keep NaN; from lists, plotly would draw an interval of no width.
    """
    at = np.asarray(value, dtype=float)
    return {
        "type": "data",
        "symmetric": False,
        "array": np.asarray(high, dtype=float) - at,
        "arrayminus": at - np.asarray(low, dtype=float),
        "color": color,
        "thickness": thickness,
        "width": width,
    }


#: A legend in rows above the plot.
ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def layout(theme: Theme) -> dict[str, Any]:
    """Plotly layout settings that every figure shares: transparent, so that it fits any page."""
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "zerolinecolor": theme.muted,
        "automargin": True,
    }
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": theme.text, "family": "system-ui, sans-serif", "size": 13},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.muted, "activecolor": theme.text},
        "xaxis": axis,
        "yaxis": axis,
    }


def channels(color: str) -> tuple[int, ...]:
    """Red, green and blue, from 0 to 255."""
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def _luminance(color: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in channels(color))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _number(name: str) -> int:
    # crc32 and not hash(): the same colour in every process.
    return zlib.crc32(name.encode())


def _stable(name: str) -> Fill:
    return _OTHERS[_number(name) % len(_OTHERS)]
