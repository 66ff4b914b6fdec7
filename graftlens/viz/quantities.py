"""Quantities that are drawn: how a column is named, written and coloured.

Measures of a distribution have all of it from their rows in `graftlens.metrics.METRICS`; what lens
tables have besides (distances, norms, ranks of matrices) is written down where it is drawn.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from graftlens import metrics
from graftlens.references import common_tokens
from graftlens.viz import theme
from graftlens.viz.lenstables import listed
from graftlens.viz.spelling import escaped


@dataclass(frozen=True)
class Quantity:
    """How one column is named, written and coloured.

    Colours follow from `bounds`: from 0 to 1 is a share, written in percent; up to 0 a
    log-probability; from 1 a rank, darkest at 1, on a log scale; from -1 to 1 a cosine, darkest
    where it is least; all else starts at 0.
    """

    name: str
    label: str
    unit: str
    short: str = ""
    """For axes and running text; left out, the label."""
    bounds: tuple[float | None, float | None] = (0.0, None)
    lower_is_better: bool = False
    signed: bool = False
    """Zero means something, so that signs are told apart by hue."""
    of_answer: bool = False
    over_common: bool = False
    """It is over the tokens that all sources have."""

    @classmethod
    def of(cls, name: str, *, base: str = "base", full: str = "full") -> "Quantity":
        """A measure's, from its row in `METRICS`; a bare one of a name that has no row.

        `base` and `full` name the runs that it compares with, if it does, in its labels.
        """
        row = metrics.measure(name)
        runs = {"base": base, "full": full} if row.references else {}

        def named(label: str) -> str:
            return re.sub(r"\w+", lambda word: runs.get(word[0], word[0]), label)

        return cls(
            name=name,
            label=named(row.label),
            unit=row.unit,
            short=named(row.short),
            bounds=row.bounds,
            lower_is_better=row.better == "lower",
            signed=row.signed,
            of_answer=bool({"answer", "standing"} & {*row.needs}),
            over_common=row.over_common,
        )

    def within(self, table: pd.DataFrame) -> "Quantity":
        """The same with, in its unit, how many tokens a table has it over, if these are not all."""
        count = common_tokens(table) if self.over_common else None
        if count is None:
            return self
        return replace(self, unit=f"{self.unit}, over {count:,} common tokens")

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"

    @property
    def axis(self) -> str:
        """A title short enough for the side of a chart."""
        return f"{self.short or self.label} ({self.unit})"

    @property
    def share(self) -> bool:
        return self.bounds == (0, 1)

    @property
    def is_rank(self) -> bool:
        return self.bounds == (1, None)

    @property
    def is_logprob(self) -> bool:
        return self.bounds[0] is None and self.bounds[1] == 0

    @property
    def is_cosine(self) -> bool:
        return self.bounds == (-1, 1)

    def coloured(self, value: float) -> float:
        """Where a value is on the scale of its colours."""
        return math.log10(value) if self.is_rank else value

    def written(self, value: float) -> str:
        """A value by itself, to three digits."""
        if math.isnan(value):
            return "no value"
        if self.share:
            return f"{100 * value:.3g}%"
        if self.is_rank:
            return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"

    def number(self, value: float) -> str:
        """A value among others of a column, with as many decimals as they; a share's in percent."""
        text = f"{100 * value:.1f}" if self.share else f"{value:.2f}"
        return text.removeprefix("-") if float(text) == 0 else text

    def ticks(self) -> dict[str, object]:
        """Settings of a plotly axis of it: of a share all of it, and markers at its ends whole."""
        return {"range": [-0.02, 1.02], "tickformat": ".0%"} if self.share else {}


def known(quantities: Mapping[str, Quantity], name: str) -> Quantity:
    """What is known of the column `name`; an error lists the columns that could be shown."""
    if name not in quantities:
        raise ValueError(f"unknown value {name!r}; choose from {listed(quantities)}")
    return quantities[name]


def measured(summary: pd.DataFrame) -> tuple[str, ...]:
    """The measures that have an interval in this summary, in its order."""
    return tuple(name[:-4] for name in summary.columns if name.endswith("_low"))


def of_summary(summary: pd.DataFrame, name: str | Quantity) -> Quantity:
    """A measure of this summary; an error if the summary does not have it. What is a quantity
    already stays it."""
    if isinstance(name, Quantity):
        return name
    have = measured(summary)
    if name not in have:
        raise ValueError(
            f"the summary has no metric {name!r}; it has {', '.join(map(repr, have))}. "
            "Ask summarise() for it"
        )
    runs = {
        run: str(summary[f"{run}_run"].iloc[0])
        for run in ("base", "full")
        if f"{run}_run" in summary and summary[f"{run}_run"].notna().any()
    }
    found = Quantity.of(name, **runs)
    if name != "recovery":
        return found.within(summary)
    what = Quantity.of(str(summary["recovery_of"].iloc[0]), **runs)
    unit = f"0 = {runs.get('base')}, 1 = {runs.get('full')}"
    found = replace(found, label=f"recovery of {what.short}", unit=unit)
    return replace(found, over_common=what.over_common).within(summary)


@dataclass(frozen=True)
class Scale:
    """Colours from `low` to `high`; `ticks` are settings of plotly's colour bar."""

    low: float
    high: float
    colors: tuple[str, ...]
    title: str
    ticks: Mapping[str, object] = field(default_factory=dict)

    def bar(self, room: int) -> dict[str, object]:
        """Plotly's colour bar, `room` pixels high."""
        title = escaped(self.title)
        if 8 * len(title) > room:
            title = title.replace(" (", "<br>(")
        return {
            "title": {"text": title, "side": "right", "font": {"size": 12}},
            "thickness": 14,
            "outlinewidth": 0,
            **self.ticks,
        }


def scale(
    quantity: Quantity,
    values: Sequence[float],
    *,
    signed: bool = False,
    whole: bool = True,
    anchored: bool = True,
    robust: bool = False,
) -> Scale:
    """The colours for all values that share a scale, as `Quantity.coloured` gives them.

    Args:
        quantity: what is coloured.
        values: all of them; those that are not finite are left out.
        signed: symmetric around 0, as differences are.
        whole: a share's scale goes from 0 to 1, whatever the data.
        anchored: what is not a share begins (or ends) at its bound, and not where the data do.
        robust: a symmetric scale ends before a few values that are far from all others, which have
            the colour of its end; its title says how far they go.
    """
    held = [value for value in values if math.isfinite(value)]
    low, high = min(held, default=0.0), max(held, default=0.0)
    ticks: dict[str, object] = {}
    if quantity.share:
        coarse = whole or max(abs(low), abs(high)) > 0.05
        ticks["tickformat"] = ".0%" if coarse else ".1%"
    if signed:
        sizes = sorted(map(abs, held), reverse=True)
        beyond = _outlying(sizes) if robust else 0
        found = _symmetric(quantity, (sizes[beyond:] or [0.0])[0] or 1.0, ticks)
        said = f"{found.title}; {beyond} beyond, up to {sizes[0]:.3g}" if beyond else found.title
        return replace(found, title=said)
    colors: tuple[str, ...] = theme.SEQUENTIAL
    if quantity.share:
        return Scale(0.0, 1.0 if whole else high or 1.0, colors, quantity.axis, ticks)
    if not anchored:
        room = 0.5 if low == high else 0.0
        return Scale(low - room, high + room, colors, quantity.axis)
    if quantity.is_rank:
        high = high or 1.0
        powers = range(math.floor(high) + 1)
        ticks = {"tickvals": list(powers), "ticktext": [f"{10**p:,}" for p in powers]}
        return Scale(0.0, high, colors[::-1], quantity.axis, ticks)
    if quantity.is_logprob:
        return Scale(low or -1.0, 0.0, colors, quantity.axis)
    if quantity.is_cosine:
        return Scale(low if low < 1 else 0.0, 1.0, colors[::-1], quantity.axis)
    return Scale(min(low, 0.0), high or 1.0, colors, quantity.axis)


def _outlying(sizes: Sequence[float]) -> int:
    """How many of the sizes, the greatest first, a scale leaves out: one in fifty, or one of ten or
    more, if the greatest is more than three times what remains."""
    few = max(len(sizes) // 50, 1)
    if len(sizes) < 10 or not 0 < 3 * sizes[few] < sizes[0]:
        return 0
    return sum(size > sizes[few] for size in sizes)


def _symmetric(quantity: Quantity, end: float, ticks: dict[str, object]) -> Scale:
    if not quantity.is_rank:
        return Scale(-end, end, theme.DIVERGING, quantity.axis, ticks)
    # A lower rank is better, and what is better is red for every value.
    powers = range(-math.floor(end), math.floor(end) + 1)
    said = [f"1/{10**-p:,}" if p < 0 else f"{10**p:,}" for p in powers]
    ticks = {"tickvals": list(powers), "ticktext": said}
    return Scale(-end, end, theme.DIVERGING[::-1], "ratio of the ranks (1 = equal)", ticks)
