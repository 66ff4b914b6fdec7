"""Charts of a sweep, chosen by what its grafts vary: heat maps, triangles, dose responses, bars."""

import re
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from graftlens.references import MEMBERS, are_references, in_steps
from graftlens.viz import text
from graftlens.viz.figures import bar_chart, dose_chart, heat_map, line_chart
from graftlens.viz.page import Figure
from graftlens.viz.quantities import measured, of_summary
from graftlens.viz.spelling import capital
from graftlens.viz.sweeps import has_doses, window_triangle

#: What a graft's columns may vary in, as the axes of a heat map: of equally many values, the first.
AXES = ("layer", "component", "head", "neuron", "span", "strength", "source")

#: From how many grafts with one rule on there is a heat map; fewer are bars.
MAPPED = 12
#: A panel of a heat map with fewer cells than this is bars, too.
PANEL = 4
#: Most panels of a heat map, bars of a chart, lines of a dose response.
PANELS, BARS, LINES = 24, 40, 12

_WINDOW = re.compile(r"\d+-\d+")


def effects(summary: pd.DataFrame) -> "pd.Series[float]":
    """Graft -> how far its mean log-probability is from the base's, in the group where that is
    most. Infinite where it has none, as under a source that lacks a token."""
    far = pd.Series(0.0, index=dict.fromkeys(summary["graft"].astype(str)))
    for part in text.groups(summary).values():
        means = pd.Series(part["logprob"].to_numpy(float), index=part["graft"].astype(str))
        apart = (means - means[str(part["base_run"].iloc[0])]).abs().fillna(np.inf)
        far = np.maximum(far, apart)
    return far


def largest(summary: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows of the `most` grafts with the largest effects, and of the references, in order."""
    names = summary["graft"].astype(str)
    far = effects(summary).sort_values(ascending=False, kind="stable")
    return summary[names.isin(far.index[:most]) | are_references(summary)]


def main_metric(summary: pd.DataFrame) -> str:
    """Recovery, or the log-probability where nothing has a recovery."""
    others = summary[~are_references(summary)]
    return "recovery" if others["recovery"].notna().any() else "logprob"


@dataclass(frozen=True)
class _Map:
    """How grafts with one rule are laid out: which run along x and y, and what tells panels
    apart."""

    x: str
    y: str
    panel: tuple[str, ...]
    grafts: frozenset[str]

    @property
    def label(self) -> str | None:
        return " and ".join(self.panel) if self.panel else None

    def frame(self, summary: pd.DataFrame) -> pd.DataFrame:
        rows = summary[summary["graft"].astype(str).isin(self.grafts)]
        return _labelled(rows, self.panel)


def _labelled(rows: pd.DataFrame, panel: Sequence[str]) -> pd.DataFrame:
    if len(panel) < 2:
        return rows
    values = rows[list(panel)].astype(str).agg(" · ".join, axis=1)
    return rows.assign(**{" and ".join(panel): values})


def sweep_charts(summary: pd.DataFrame) -> tuple[list[Figure], list[str]]:
    """The charts of a sweep's summary, and what a reader must know of what they leave out.

    Grafts that differ in two or more of `AXES` are cells of heat maps, one for each group of
    prompts, with a panel for each value of what is left; windows of layers are a triangle. Grafts
    that differ in strength, or in their source's rank, are lines, too. All others are bars.
    """
    metric = main_metric(summary)
    groups = text.groups(summary)
    first = next(iter(groups.values()))
    figures: list[Figure] = []
    layout, notes = _layout(first, effects(summary))
    if layout is not None:
        figures += [
            _titled(_map(layout, part, metric), name, groups)
            for name, part in groups.items()
            if _has_any(part, metric)
        ]
    figures += list(_doses(groups, metric))
    figures += list(_ranks(groups, metric))
    mapped = frozenset() if layout is None else layout.grafts
    rest = summary[~summary["graft"].astype(str).isin(mapped)]
    others = rest.loc[~are_references(rest), "graft"].nunique()
    if others > BARS:
        rest = largest(rest, BARS)
        notes.append(
            f"Of {others} grafts that are not in a heat map, the {BARS} whose log-probability "
            "differs most from the base's are bars."
        )
    if others:
        names = ("top5", metric) if "top5" in measured(summary) else (metric,)
        figures += [bar_chart(rest, name, legend_title="prompts") for name in names]
    return figures, notes


def _has_any(part: pd.DataFrame, metric: str) -> bool:
    """Whether there is anything to draw. Why there is no recovery, the notes on the numbers say."""
    return bool(part.loc[~are_references(part), metric].notna().any())


def member_charts(summary: pd.DataFrame) -> list[Figure]:
    """What changes from one model of a source to the next, a chart for each group of prompts: lines
    over their steps, or bars for each model where steps do not tell them apart."""
    metric = main_metric(summary)
    along = in_steps(summary)
    last = summary[summary["member"] == summary["member"].iloc[-1]].drop(columns=list(MEMBERS))
    drawn = largest(last, LINES)["graft"]
    kept = summary[summary["graft"].isin(drawn)].drop(columns="member" if along else "step")
    by = last.columns[: last.columns.get_loc("graft")]
    if metric == "recovery":
        kept = kept[~are_references(kept)]  # 0 and 1 by definition
    parts = text.groups(kept.drop(columns="step" if along else "member"))
    figures = []
    for name, part in parts.items():
        if not _has_any(part, metric):
            continue
        rows = kept.loc[part.index].drop(columns=by)
        if along:
            figure = line_chart(rows, "step", metric, series="graft")
        else:
            figure = bar_chart(rows, metric, legend_title="model")
        figures.append(_titled(figure, name, parts))
    return figures


def _layout(rows: pd.DataFrame, far: "pd.Series[float]") -> tuple[_Map | None, list[str]]:
    """How the grafts with one rule are laid out, if they are enough for a map."""
    single = rows[rows["source"].notna() & ~are_references(rows)]
    counts = {axis: single[axis].astype(str).nunique() for axis in AXES}
    varying = [axis for axis in AXES if counts[axis] > 1]
    if len(varying) < 2 or len(single) < MAPPED:
        return None, []
    x = "layer" if "layer" in varying else max(varying, key=counts.__getitem__)
    y = max((axis for axis in varying if axis != x), key=counts.__getitem__)
    panel = tuple(axis for axis in varying if axis not in (x, y))
    keys = single[list(panel)].astype(str).agg(" · ".join, axis=1) if panel else single["graft"]
    if not panel:
        return _Map(x, y, panel, frozenset(single["graft"].astype(str))), []
    sizes = keys.value_counts()
    full = sizes.index[sizes >= PANEL]
    notes = []
    if len(full) > PANELS:
        reach = far.reindex(single["graft"].astype(str)).groupby(keys.to_numpy()).max()
        full = reach[full].sort_values(ascending=False, kind="stable").index[:PANELS]
        notes.append(
            f"Of {int((sizes >= PANEL).sum())} panels by {' and '.join(panel)}, the {PANELS} with "
            "the largest effects are drawn."
        )
    kept = single[keys.isin(full)]
    if len(kept) < MAPPED:
        return None, []
    panel = tuple(axis for axis in panel if kept[axis].astype(str).nunique() > 1)
    return _Map(x, y, panel, frozenset(kept["graft"].astype(str))), notes


def _map(layout: _Map, part: pd.DataFrame, metric: str) -> Figure:
    frame = layout.frame(part)
    windows = frame["layer"].astype(str).str.fullmatch(_WINDOW)
    if layout.x != "layer" or not windows.mean() > 0.5:
        return heat_map(frame, metric, x=layout.x, y=layout.y, panel=layout.label)
    axes = (layout.y, *layout.panel)
    axes = tuple(axis for axis in axes if frame[axis].astype(str).nunique() > 1)
    frame = _labelled(frame, axes)
    panel = " and ".join(axes) if axes else None
    facts = of_summary(frame, metric)
    each = f", one panel for each {panel}" if panel else ""
    caption = f"{capital(facts.title)} of neighbouring layers, by the first and the last{each}."
    best = frame.sort_values(metric, ascending=facts.lower_is_better, kind="stable").iloc[0]
    said = text.written(facts, best)
    alt = f"Triangle of {facts.label} by first and last layer{each}. Best: {best['graft']} {said}."
    return Figure(caption, alt, window_triangle(frame, metric, panel=panel))


def _doses(groups: dict[str, pd.DataFrame], metric: str) -> Iterator[Figure]:
    for name, part in groups.items():
        if not has_doses(part, metric):
            continue
        single = part[part["source"].notna() & ~are_references(part)]
        if len(single) <= LINES * single["strength"].nunique():
            yield _titled(dose_chart(part, metric), name, groups)


def _ranks(groups: dict[str, pd.DataFrame], metric: str) -> Iterator[Figure]:
    """The metric over the rank of what each source is cut to, a line for each place."""
    for name, part in groups.items():
        if "source_rank" not in part:
            continue
        single = part[part["source_rank"].notna() & ~are_references(part)]
        places = [a for a in AXES if a != "source" and single[a].astype(str).nunique() > 1]
        lines = len(single[places].drop_duplicates()) if places else 1
        # Two sources that are cut have two values at a rank.
        twice = single.duplicated([*places, "source_rank"]).any()
        if single["source_rank"].nunique() > 1 and lines <= LINES and not twice:
            series = " and ".join(places) or None
            chart = line_chart(_labelled(single, places), "source_rank", metric, series=series)
            yield _titled(chart, name, groups)


def _titled(figure: Figure, name: str, groups: Sized) -> Figure:
    """The figure with its group's name in front of the caption, where there are several."""
    return replace(figure, caption=f"{name}: {figure.caption}") if len(groups) > 1 else figure
