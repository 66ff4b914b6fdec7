"""Exact recoveries of sets of places: what gradients propose is judged here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from graftlens.find.places import Place
from graftlens.find.sets import gathered, without
from graftlens.graft import Graft
from graftlens.model.arch import Architecture

#: What a set must be: enough in the base; needed in the full source; both.
Goal = Literal["sufficient", "necessary", "both"]

#: Names of the two runs that recovery is measured between.
BASE, FULL = "PRE", "SFT"


@runtime_checkable
class Exact(Protocol):
    """What runs grafts exactly, in memory or in a folder that keeps what it ran."""

    def __call__(
        self, step: str, numbers: Sequence[int], grafts: Mapping[str, Graft]
    ) -> pd.DataFrame:
        """A row for each of these prompts under each graft, with the columns of `evaluate`, or of
        `Rating.table`.

        Args:
            step: what the runs are for; the same step always has the same prompts and grafts.
            numbers: the prompts, by number.
            grafts: name -> graft, none of them twice; those of both references among them.
        """
        ...


@dataclass(frozen=True)
class Judged:
    """A set of places with its exact recoveries, NaN where the goal does not ask for one.

    Attributes:
        places: the set.
        enough: recovery of the set alone, on all prompts that were run.
        without: recovery of the full source without it.
        margin: how far the goal is exceeded; below 0, how far it is missed.
        inner: the margin on the inner part alone; NaN where that has nothing to recover.
        parted: whether both the inner part and the rest have something to recover, so that sets can
            be chosen on one and judged on the other.
    """

    places: tuple[Place, ...]
    enough: float
    without: float
    margin: float
    inner: float
    parted: bool = True

    @property
    def reached(self) -> bool:
        """Whether the set is what the goal asks for."""
        return self.margin >= 0

    @property
    def value(self) -> float:
        """What the set does for the goal; a place's contribution is a difference of it."""
        return sum(v for v in (self.enough, -self.without) if not math.isnan(v))


@dataclass(frozen=True)
class Judge:
    """Judges sets of places by exact runs.

    Attributes:
        exact: runs grafts.
        arch, source, base_source: the architecture, the source that is searched, the model's base.
        base, full: the grafts that recovery is measured between; sets are put into `base` and taken
            out of `full`.
        metric: the measure.
        goal, target: what a set must be.
        inner: the numbers of the inner part's prompts.
        say: called with a line about each step.
        of_texts: whether the measure is one of generated texts (`graftlens.find.rating`): tables
            have no ranks and likeliest tokens then.
    """

    exact: Exact
    arch: Architecture
    source: str
    base_source: str
    base: Graft
    full: Graft
    metric: str
    goal: Goal
    target: float
    inner: frozenset[int]
    say: Callable[[str], object] = lambda line: None
    of_texts: bool = False

    def put_in(self, places: Sequence[Place]) -> Graft:
        """The base with these places."""
        return self.base | gathered(places, self.source, self.arch)

    def taken_out(self, places: Sequence[Place]) -> Graft:
        """The full source without these places."""
        return without(places, self.full, self.base_source, self.arch)

    def margin(self, enough: float, rest: float) -> float:
        """How far recoveries of a set and of what is left without it exceed the goal."""
        margins = {"sufficient": enough - self.target, "necessary": 1 - self.target - rest}
        asked = [m for goal, m in margins.items() if self.goal in (goal, "both")]
        return min(asked)

    def __call__(
        self, step: str, numbers: Sequence[int], sets: Sequence[Sequence[Place]]
    ) -> list[Judged]:
        """The recoveries of some sets, as `judged` gives them."""
        return self.judged(step, numbers, sets)[0]

    def judged(
        self, step: str, numbers: Sequence[int], sets: Sequence[Sequence[Place]]
    ) -> tuple[list[Judged], pd.DataFrame]:
        """The recoveries of some sets, all by one sweep, and the rows of its table.

        The grafts of set number i are called `set i` and `without i` there, as the goal asks.

        Raises:
            ValueError: nothing to recover, a prompt that cannot be run, or a measure that is
                infinite.
        """
        asked: list[tuple[str, Graft]] = []
        if self.goal in ("sufficient", "both"):
            asked += [(f"set {i}", self.put_in(places)) for i, places in enumerate(sets)]
        if self.goal in ("necessary", "both"):
            asked += [(f"without {i}", self.taken_out(places)) for i, places in enumerate(sets)]
        table = self.run(step, numbers, dict(asked))
        prompts, values = pivoted(table, self.metric)
        inner = np.array([number in self.inner for number in prompts])

        def of(kind: str, i: int, rows: np.ndarray) -> float:
            name = f"{kind} {i}"
            if name not in values or not rows.any():
                return math.nan
            return recovery(values[name][rows], values[BASE][rows], values[FULL][rows])

        every = np.ones(len(prompts), dtype=bool)
        parts = [rows for rows in (inner, ~inner) if rows.any()]
        gaps = [np.mean((values[FULL] - values[BASE])[rows]) for rows in parts]
        parted = all(gap != 0 for gap in gaps)
        agreeing = inner if parted else np.zeros_like(inner)
        found = []
        for i, places in enumerate(sets):
            enough, rest = (of(kind, i, every) for kind in ("set", "without"))
            within = self.margin(*(of(kind, i, agreeing) for kind in ("set", "without")))
            margin = self.margin(enough, rest)
            found.append(Judged(tuple(places), enough, rest, margin, within, parted))
        return found, table

    def run(self, step: str, numbers: Sequence[int], grafts: Mapping[str, Graft]) -> pd.DataFrame:
        """The exact table of these grafts and the references, each graft run once.

        Raises:
            ValueError: a prompt that cannot be run.
        """
        first = {self.base: BASE, self.full: FULL}
        for name, graft in grafts.items():
            first.setdefault(graft, name)
        ran = self.exact(step, numbers, {name: graft for graft, name in first.items()})
        failed = ran[ran["reason"].notna()]
        if len(failed):
            row = failed.iloc[0]
            raise ValueError(
                f"prompt {row['prompt']} could not be run under {row['rule']!r}: {row['reason']} "
                "Leave the prompt out."
            )
        twins = [
            ran[ran["graft"].astype(object) == first[graft]].assign(graft=name)
            for name, graft in grafts.items()
            if first[graft] != name
        ]
        return pd.concat([ran.astype({"graft": object}), *twins], ignore_index=True)


def pivoted(table: pd.DataFrame, metric: str) -> tuple[list[int], dict[str, np.ndarray]]:
    """The prompts' numbers, and for each graft a measure's values [prompt].

    Raises:
        ValueError: values that are infinite or missing.
    """
    cells = table.assign(graft=table["graft"].astype(object)).pivot(
        index="prompt", columns="graft", values=metric
    )
    values = cells.astype(float)
    if not np.isfinite(values.to_numpy()).all():
        where = values.index[~np.isfinite(values.to_numpy()).all(axis=1)]
        raise ValueError(
            f"metric={metric!r} is infinite or missing for prompt {where[0]}, so that it has no "
            "mean. Choose another metric, or leave the prompt out."
        )
    return [int(n) for n in values.index], {str(c): values[c].to_numpy() for c in values}


def recovery(values: np.ndarray, base: np.ndarray, full: np.ndarray) -> float:
    """(mean(values) − mean(base)) / (mean(full) − mean(base)), over the same prompts.

    Raises:
        ValueError: the two ends are equal.
    """
    gap = float(np.mean(full - base))
    if gap == 0:
        raise ValueError(
            "the source and the base give equal values for these prompts, so there is nothing to "
            "recover. Ask prompts that finetuning changed, or choose another metric."
        )
    return float(np.mean(values - base)) / gap
