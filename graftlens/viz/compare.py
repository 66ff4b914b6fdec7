"""Runs side by side on one page: the same grafts in other models, or on other facts."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from graftlens.folder import at_home
from graftlens.references import COLUMNS as REFERENCES
from graftlens.references import COMMON_TOKENS, are_references
from graftlens.viz import text
from graftlens.viz.figures import bar_chart, heat_map
from graftlens.viz.page import ExperimentPage, Figure, Part, Table, experiment_page, table_beside
from graftlens.viz.quantities import Quantity, of_summary
from graftlens.viz.reading import glossary, nothing_learnt
from graftlens.viz.spelling import capital

#: Bars of more grafts than this cannot be told apart.
MAX_BARS = 40

UNPAIRED = (
    "Runs with different models or datasets have different prompts. Each interval is that of its "
    "own run, and no interval or test here pairs one run's prompts with another's."
)


def compare_page(
    path: str | Path,
    runs: Mapping[str, Mapping[str, pd.DataFrame]],
    *,
    titles: Mapping[str, str] | None = None,
    provenance: Mapping[str, object],
    metric: str = "top5",
    title: str = "Runs compared",
) -> Path:
    """Write a page that compares runs to `path` and return it.

    Tables that are cut on the page are complete beside it, in the folder `<page's name>_tables`.

    A part that two or more runs share gets a chart and a table with a value for each graft and
    run: bars, or heat maps where every graft has one component and one layer; and how far the runs
    agree on the order of the grafts. Where the runs' groups (templates) are the same, each group
    is shown; where they are not, each run's mean over its groups, by their numbers of prompts.

    Args:
        runs: run -> part -> its summary.
        titles: part -> its title on the page; by default its name.
        provenance: what to say of the runs, as on other pages.

    Raises:
        ValueError: no run, or a summary without the metric.
    """
    if not runs:
        raise ValueError("no run was given to compare; name at least one")
    shared, alone = _sorted_parts(runs)
    path = at_home(path)
    parts = [
        _part((titles or {}).get(name, name), frames, metric, path, f"{number}_{_plain(name)}")
        for number, (name, frames) in enumerate(shared.items(), start=1)
    ]
    if alone:
        listed = [f"{(titles or {}).get(name, name)}: only in {run}" for name, run in alone.items()]
        parts.append(Part("Parts that only one run has", findings=listed))
    lead = f"{len(runs)} runs ({', '.join(runs)}), {len(shared)} parts in common. {UNPAIRED}"
    if len(runs) == 1:
        lead = f"One run ({next(iter(runs))}): there is nothing to compare it with."
    return experiment_page(
        path,
        ExperimentPage(
            title=title,
            question="Do the same grafts have the same effect in each run?",
            lead=lead,
            parts=parts,
            provenance=provenance,
        ),
    )


def agreement(one: pd.DataFrame, other: pd.DataFrame, metric: str) -> tuple[int, float]:
    """How many grafts two summaries share, and Kendall's τ-b between their orders by `metric`.

    Each summary has one row per graft. The ends of recovery are left out, because they would agree
    in any case. τ is NaN with fewer than two grafts, or where all values of one run are equal.
    """
    held = []
    for frame in (one, other):
        rows = frame[frame[metric].notna() & ~are_references(frame)]
        held.append(pd.Series(rows[metric].to_numpy(float), index=rows["graft"].astype(str)))
    both = pd.concat(held, axis=1, join="inner").to_numpy()
    if len(both) < 2 or any(np.ptp(both, axis=0) == 0):
        return len(both), float("nan")
    return len(both), float(kendalltau(both[:, 0], both[:, 1]).statistic)


def _sorted_parts(
    runs: Mapping[str, Mapping[str, pd.DataFrame]],
) -> tuple[dict[str, dict[str, pd.DataFrame]], dict[str, str]]:
    """The parts that can be compared, with the runs that have them, and the parts of one run."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for run, parts in runs.items():
        for name, frame in parts.items():
            found.setdefault(name, {})[run] = frame
    needed = min(2, len(runs))
    shared = {name: frames for name, frames in found.items() if len(frames) >= needed}
    alone = {name: next(iter(frames)) for name, frames in found.items() if name not in shared}
    return shared, alone


def _part(
    title: str, frames: Mapping[str, pd.DataFrame], metric: str, path: Path, stem: str
) -> Part:
    for run, frame in frames.items():
        try:
            of_summary(frame, metric)
        except ValueError as error:
            raise ValueError(f"part {title!r} of run {run!r}: {error}") from None
    views, pooled = _views(frames, metric)
    findings = _cautions(frames, metric)
    if pooled:
        findings.append(pooled)
    figures: list[Figure] = []
    tables: list[Table] = []
    orders = []
    for name, view in views.items():
        joined = _joined(view)
        where = f"{name}: " if len(views) > 1 else ""
        if all(map(_is_map, view.values())):
            drawn = heat_map(_panelled(joined), metric, panel="run")
        elif joined["graft"].nunique() <= MAX_BARS:
            drawn = bar_chart(joined, metric, legend_title="run")
        else:
            drawn = None
            findings.append(
                f"{where}{joined['graft'].nunique()} grafts are too many for bars (up to "
                f"{MAX_BARS} are drawn); the table has them."
            )
        if drawn is not None:
            figures.append(Figure(f"{where}{drawn.caption}", drawn.alt, drawn.figure))
        label = of_summary(joined, metric).title
        crossed = _crossed(view, metric)
        caption = capital(f"{where}{label} by graft and run")
        tables.append(table_beside(path, f"{stem}_{_plain(name)}", caption, crossed))
        for (a, one), (b, other) in combinations(view.items(), 2):
            count, tau = agreement(one, other, metric)
            orders.append({"group": name, "run": a, "and run": b, "grafts": count, "τ": tau})
    if orders:
        what = f"order of the grafts by {Quantity.of(metric).short}"
        findings.append(
            f"Kendall's τ-b says how far two runs agree on the {what}: 1 is the same order, 0 no "
            "relation, –1 the reverse. Grafts that both runs have count, without the ends of "
            "recovery."
        )
        tables.append(Table(f"Agreement between runs on the {what}", pd.DataFrame(orders)))
    return Part(
        title,
        f"In {', '.join(frames)}.",
        findings,
        figures,
        tables,
        glossary={w: said for frame in frames.values() for w, said in glossary(frame).items()},
        warnings=[
            f"{run}: {why}" for run, frame in frames.items() for why in nothing_learnt(frame)
        ],
    )


def _views(
    frames: Mapping[str, pd.DataFrame], metric: str
) -> tuple[dict[str, dict[str, pd.DataFrame]], str]:
    """Group -> run -> its rows, one per graft; and what to say where groups had to be pooled."""
    groups = {run: text.groups(frame) for run, frame in frames.items()}
    names = [list(parts) for parts in groups.values()]
    if all(set(name) == set(names[0]) for name in names):
        return {name: {run: parts[name] for run, parts in groups.items()} for name in names[0]}, ""
    pooled = {
        run: next(iter(parts.values())) if len(parts) == 1 else _pooled(parts, metric)
        for run, parts in groups.items()
    }
    said = "; ".join(f"{run}: {', '.join(parts)}" for run, parts in groups.items())
    return {"all groups": pooled}, (
        f"The runs have different groups of prompts ({said}). What is shown of a run with several "
        "is the mean over its groups, each counting by its prompts, without an interval."
    )


def _pooled(parts: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    rows = pd.concat(parts.values(), ignore_index=True)
    # A graft counts only with a value in every group, or its mean would be over other prompts.
    weighted = rows[metric].to_numpy(float) * rows["n"].to_numpy(float)
    by_graft = rows.assign(_weighted=weighted).groupby("graft", sort=False, observed=True)
    n = by_graft["n"].sum()
    mean = by_graft["_weighted"].sum(min_count=len(parts)) / n
    first = rows.drop_duplicates("graft").set_index("graft")
    ends = {f"{metric}_low": np.nan, f"{metric}_high": np.nan}
    return first.assign(**{"n": n, metric: mean}, **ends).reset_index()


def _joined(view: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table of all runs, grouped by run."""
    rows = []
    for run, frame in view.items():
        by = list(frame.columns[: frame.columns.get_loc("graft")])
        rows.append(frame.drop(columns=by))
        rows[-1].insert(0, "run", run)
    joined = pd.concat(rows, ignore_index=True)
    if COMMON_TOKENS in joined and joined[COMMON_TOKENS].nunique(dropna=False) > 1:
        joined = joined.drop(columns=COMMON_TOKENS)  # `_cautions` says what each is over
    front = ["run", "graft"]
    return joined[[*front, *(c for c in joined.columns if c not in front)]]


def _panelled(joined: pd.DataFrame) -> pd.DataFrame:
    """The same with `run` naming also whatever else tells two grafts of one cell apart."""
    cells = joined[~are_references(joined)]
    told = ("grid", "source", "span", "position", "head", "neuron", "strength")
    apart = [c for c in told if c in cells and cells[c].nunique() > 1]
    named = joined["run"].astype(str)
    for column in apart:
        named = named + " · " + joined[column].astype(str)
    return joined.assign(run=named)


def _is_map(frame: pd.DataFrame) -> bool:
    """Whether every graft, but for the ends, has one component and one layer."""
    if not {"component", "layer"} <= set(frame.columns):
        return False
    rows = frame[~are_references(frame)]
    component, layer = (
        rows[c].astype(object).fillna("").astype(str) for c in ("component", "layer")
    )
    single = component.ne("") & ~component.str.contains("+", regex=False)
    return len(rows) > 0 and bool((single & layer.str.fullmatch(r"\d+")).all())


def _crossed(view: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """A row per graft, a column per run, each cell a value with its interval."""
    columns = {}
    for run, frame in view.items():
        interval = not frame[f"{metric}_low"].isna().all()
        said = text.written_all(of_summary(frame, metric), frame, interval=interval)
        columns[run] = pd.Series(said, index=frame["graft"].astype(str))
    grafts = list(dict.fromkeys(graft for column in columns.values() for graft in column.index))
    crossed = pd.DataFrame({run: column.reindex(grafts) for run, column in columns.items()})
    crossed.insert(0, "graft", grafts)
    return crossed


def _cautions(frames: Mapping[str, pd.DataFrame], metric: str) -> list[str]:
    """What runs do differently, so that their numbers differ in kind."""
    said = []
    for what, columns in (
        ("level of the intervals", ("level",)),
        ("unit that is resampled", ("unit",)),
        ("ends of recovery", ("recovery_of", *REFERENCES)),
        ("number of tokens that KL, JS and entropy are over", (COMMON_TOKENS,)),
    ):
        if what == "ends of recovery" and metric != "recovery":
            continue
        held = {
            run: ", ".join(str(frame[c].iloc[0]) for c in columns if c in frame) or "all"
            for run, frame in frames.items()
        }
        if len(set(held.values())) > 1:
            said.append(
                f"The {what} is not the same: "
                f"{'; '.join(f'{run}: {value}' for run, value in held.items())}. Read each run's "
                "numbers with its own setting."
            )
    if all(map(_is_map, frames.values())):
        layers = [set(frame["layer"].dropna().astype(str)) for frame in frames.values()]
        if any(found != layers[0] for found in layers):
            said.append(
                "The runs do not have the same layers. A graft is compared with the one of the "
                "same layer number, which in a model of another depth is at another fraction of it."
            )
    counts = {run: _counts(frame["n"].tolist()) for run, frame in frames.items()}
    said.append(f"Prompts per group: {'; '.join(f'{run} {n}' for run, n in counts.items())}.")
    return said


def _plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "all"


def _counts(numbers: Sequence[int]) -> str:
    low, high = int(min(numbers)), int(max(numbers))
    return str(low) if low == high else f"{low} to {high}"
