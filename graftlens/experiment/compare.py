"""Several finished folders (experiments, sweeps; other models, other datasets) side by side on one
page."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.experiment.analysis import TAGS
from graftlens.experiment.show import FOUND
from graftlens.folder import RUNS, at_home, inside, name_problems, read_json
from graftlens.references import are_references
from graftlens.reports import sweep_report, sweep_summary
from graftlens.stats import GRAFT_COLUMNS
from graftlens.sweep.results import read_manifest
from graftlens.sweep.runner import sweep_result
from graftlens.viz.compare import compare_page
from graftlens.viz.page import page_at
from graftlens.viz.tables import read_table

#: What to do about a run whose files are damaged.
AGAIN = "Run the experiment again into the same folder: graftlens run rewrites the file."

#: The page, where none is named.
PAGE = RUNS / "report.html"


@dataclass(frozen=True)
class Compared:
    """A folder's results, as the page compares them.

    Attributes:
        labels: what it may be called, the shortest first; the first that tells all apart is taken.
        parts: part -> its summary by template. The part "" has no name of its own: it is compared
            with every part of the others that has a graft of it.
        titles: part -> its title.
        about: what the page says of it.
    """

    labels: tuple[str, ...]
    parts: Mapping[str, pd.DataFrame]
    titles: Mapping[str, str]
    about: Mapping[str, Any]


def report_of(runs: Sequence[Path], out: Path | None = None, *, metric: str = "top5") -> Path:
    """The page of one run, of a sweep written again; or one that compares several runs, as
    `compare_runs` writes it."""
    if len(runs) == 1 and (at_home(runs[0]) / "sweep.json").is_file():
        return sweep_report(runs[0], out)
    if len(runs) == 1 and out is None and _index(runs[0]).is_file():
        _read_run(at_home(runs[0]))  # that it is one, and finished
        return _index(runs[0])
    return compare_runs(runs, PAGE if out is None else out, metric=metric)


def compare_runs(runs: Sequence[Path], out: Path, *, metric: str = "top5") -> Path:
    """Write a page that compares the parts that the runs share.

    Args:
        runs: two or more folders of experiments that `graftlens run` finished, of sweeps and of
            localisations, in any mixture. A sweep or a localisation is compared with every part of
            an experiment that has one of its grafts by name, and with the other sweeps and
            localisations.
        out: the page to write.
        metric: what is compared.

    Returns:
        The page.

    Raises:
        ValueError: fewer than two runs, a folder without a run or with a damaged one, no part in
            common, a metric that they lack; a file at `out` that is not a page of graftlens.
        OSError: a page that cannot be written.
    """
    out = page_at(at_home(out), "Name another file with --out.")
    found = {run: _read_run(run) for run in map(at_home, runs)}
    if len(runs) < 2:
        own = [f" {run}'s own page is {index}." for run in runs if (index := _index(run)).is_file()]
        raise ValueError(
            f"{len(runs)} given: name two or more folders that graftlens run, sweep or localise "
            f"wrote.{''.join(own)}"
        )
    if len({run.resolve() for run in found}) < len(runs):
        raise ValueError("a folder is named twice. Name each run once.")
    labels = _labels(found)
    tables = _parts({labels[run]: one.parts for run, one in found.items()})
    names = [name for parts in tables.values() for name in parts]
    if not any(names.count(name) > 1 for name in names):
        parts = "; ".join(
            f"{label}: {', '.join(name or 'one without a name' for name in found)}"
            for label, found in tables.items()
        )
        raise ValueError(
            f"these runs have no part in common ({parts}). Compare runs of one experiment, sweeps "
            "of the same grafts, or give parts with the same grafts the same name."
        )
    titles = {name: title for one in found.values() for name, title in one.titles.items()}
    provenance = {labels[run]: dict(one.about) for run, one in found.items()}
    return compare_page(out, tables, titles=titles, provenance=provenance, metric=metric)


def _index(run: Path) -> Path:
    return at_home(run) / "index.html"


def _read_run(run: Path) -> Compared:
    for marker, read in KINDS.items():
        if (run / marker).is_file():
            return read(run)
    named = " or ".join(KINDS)
    if not run.is_dir():
        raise FileNotFoundError(f"the folder {run} does not exist. Name one of a finished run.")
    raise ValueError(
        f"{run} holds no finished experiment, sweep or localisation: there is no {named} in it. "
        "Name a folder that graftlens run, sweep or localise wrote, and finish it first."
    )


def _experiment(run: Path) -> Compared:
    record = _record(run / "experiment.json")
    titles = {name: str(part["title"]) for name, part in record["parts"].items()}
    return Compared(
        labels=(str(record["model"]), f"{record['name']}, {record['model']}", run.name),
        parts=_tables(run, record),
        titles=titles | {f"{name}, grids": f"{title}: grids" for name, title in titles.items()},
        about={key: record[key] for key in ("name", "model", "datasets", "finished")},
    )


def _sweep(run: Path) -> Compared:
    sweep_result(run)  # that it is finished
    manifest = read_manifest(run)
    places = {
        name: Path(place).name if Path(place).exists() else place
        for name, place in manifest.config["sources"].items()
    }
    return Compared(
        labels=(run.resolve().name, str(run)),
        parts={"": sweep_summary(run)},
        titles={"": "Grafts without a part"},
        about={"sources": places, "cells": manifest.cells, "versions": dict(manifest.versions)},
    )


def _localisation(run: Path) -> Compared:
    path = inside(run, "tables", "summary.csv")
    if not path.is_file():
        raise ValueError(
            f"{run} holds a localisation that is not finished. Run its command again to continue."
        )
    return Compared(
        labels=(run.resolve().name, str(run)),
        parts={"": _read(path)},
        titles={"": "Grafts without a part"},
        about={"localisation": run.resolve().name},
    )


#: Which file marks a kind of folder -> what reads it. A new kind of folder is a row here.
KINDS: Mapping[str, Callable[[Path], Compared]] = {
    "experiment.json": _experiment,
    "sweep.json": _sweep,
    "localise.json": _localisation,
}


def _record(path: Path) -> dict[str, Any]:
    record = read_json(path, AGAIN)
    if (
        not isinstance(record, dict)
        or not {"name", "model", "datasets", "finished"} <= record.keys()
        or not isinstance(record.get("parts"), dict)
        or not all(isinstance(part, dict) and "title" in part for part in record["parts"].values())
    ):
        raise ValueError(f"{path} is not what an experiment writes. {AGAIN}")
    if problems := name_problems(record["parts"]):
        raise ValueError(f"{path}, parts: {problems[0][1]}")
    return record


def _labels(found: Mapping[Path, Compared]) -> dict[Path, str]:
    """A name for each run: its model if that distinguishes the runs, else its folder."""
    for which in range(max(len(one.labels) for one in found.values())):
        named = {run: one.labels[min(which, len(one.labels) - 1)] for run, one in found.items()}
        if len(set(named.values())) == len(named):
            return named
    return {run: str(run) for run in found}


def _parts(
    runs: Mapping[str, Mapping[str, pd.DataFrame]],
) -> dict[str, dict[str, pd.DataFrame]]:
    """Run -> part -> its summary, where a part without a name is also each that shares a graft."""
    named: dict[str, set[str]] = {}
    for parts in runs.values():
        for name, frame in parts.items():
            if name:
                named.setdefault(name, set()).update(_grafts(frame))
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for run, parts in runs.items():
        found[run] = dict(parts)
        for nameless in [frame for name, frame in parts.items() if not name]:
            own = _grafts(nameless)
            shared = {name: nameless for name, grafts in named.items() if own & grafts}
            found[run] |= shared
    if sum("" in parts for parts in found.values()) == 1:  # nothing to compare it with
        for parts in found.values():
            if len(parts) > 1:
                parts.pop("", None)
    return found


def _grafts(frame: pd.DataFrame) -> set[str]:
    """The names of a summary's grafts, without the ends of recovery."""
    return set(frame.loc[~are_references(frame), "graft"].astype(str))


def _tables(run: Path, record: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Part -> its table by template, and `PART, grids` -> that of its grids, templates pooled."""
    found = {}
    for name, part in record["parts"].items():
        if part.get("texts") and not part.get("cells"):
            continue  # it has texts alone
        localised = inside(run, "tables", f"{name}-{FOUND}.csv")
        if localised.is_file():
            found[name] = _read(localised)
            continue
        frame = _read(inside(run, "tables", f"{name}-by-template.csv"))
        if "member" in frame:
            continue  # one graft has a row for each step of a training
        grids = inside(run, "tables", f"{name}-grids.csv")
        if grids.is_file():
            tagged = _read(grids)
            found[f"{name}, grids"] = tagged
            frame = frame[~frame["graft"].isin(tagged["graft"])]
        if frame["graft"].nunique() > 0:
            found[name] = frame
    return found


def _read(path: Path) -> pd.DataFrame:
    types: dict[Hashable, Any] = dict.fromkeys(
        (*GRAFT_COLUMNS, *TAGS, "graft", "template", "dataset"), str
    )
    types |= dict.fromkeys(("layers", "rate", "draw", "source_rank", "step"), float)
    try:
        frame = read_table(path, dtype=types)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} {AGAIN}") from None
    # Version 0.1.0 called the columns that name the two references base and full.
    frame = frame.rename(columns={"base": "base_run", "full": "full_run"})
    if "graft" not in frame or frame.empty:
        raise ValueError(f"{path} is not a table of grafts. {AGAIN}")
    return frame
