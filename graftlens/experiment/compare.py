"""Several finished experiments (other models, other datasets) side by side on one page."""

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.experiment.analysis import TAGS
from graftlens.folder import at_home, inside, name_problems, read_json, writable
from graftlens.stats import GRAFT_COLUMNS
from graftlens.viz.compare import compare_page
from graftlens.viz.page import is_page
from graftlens.viz.tables import read_table

#: What to do about a run whose files are damaged.
AGAIN = "Run the experiment again into the same folder: graftlens run rewrites the file."


def compare_runs(runs: Sequence[Path], out: Path, *, metric: str = "top5") -> Path:
    """Write a page that compares the parts that the runs share.

    Args:
        runs: two or more folders of experiments that `graftlens run` finished.
        out: the page to write.
        metric: what is compared.

    Returns:
        The page.

    Raises:
        ValueError: fewer than two runs, a folder without a run or with a damaged one, no part in
            common, a metric that they lack; a file at `out` that is not a page of graftlens.
        OSError: a page that cannot be written.
    """
    out = writable(at_home(out))
    if os.path.lexists(out) and not is_page(out):
        raise ValueError(
            f"{out} exists and is not a page that graftlens wrote, so it is left untouched. Name "
            "another file with --out."
        )
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} given: name two or more folders that graftlens run wrote.")
    folders = [at_home(run) for run in runs]
    records = {run: _record(run) for run in folders}
    if len({run.resolve() for run in records}) < len(runs):
        raise ValueError("a folder is named twice. Name each run once.")
    labels = _labels(records)
    tables = {labels[run]: _tables(run, record) for run, record in records.items()}
    names = [name for found in tables.values() for name in found]
    shared = [name for name in names if names.count(name) > 1]
    if not shared:
        parts = "; ".join(f"{label}: {', '.join(found)}" for label, found in tables.items())
        raise ValueError(
            f"these runs have no part in common ({parts}). Compare runs of one experiment, or give "
            "parts with the same grafts the same name."
        )
    titles = {
        name: str(part["title"])
        for record in records.values()
        for name, part in record["parts"].items()
    }
    titles |= {f"{name}, grids": f"{title}: grids" for name, title in titles.items()}
    provenance = {
        labels[run]: {key: record[key] for key in ("name", "model", "datasets", "finished")}
        for run, record in records.items()
    }
    return compare_page(out, tables, titles=titles, provenance=provenance, metric=metric)


def _record(run: Path) -> dict[str, Any]:
    path = run / "experiment.json"
    if not path.is_file():
        raise ValueError(
            f"{run} holds no finished experiment: there is no {path.name}. Name a folder that "
            "graftlens run wrote, and finish it first."
        )
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


def _labels(records: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A name for each run: its model if that distinguishes the runs, else its folder."""
    for label in (
        lambda run, record: str(record["model"]),
        lambda run, record: f"{record['name']}, {record['model']}",
        lambda run, record: run.name,
    ):
        found = {run: label(run, record) for run, record in records.items()}
        if len(set(found.values())) == len(found):
            return found
    return {run: str(run) for run in records}


def _tables(run: Path, record: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Part -> its table by template, and `PART, grids` -> that of its grids, templates pooled."""
    found = {}
    for name in record["parts"]:
        frame = _read(inside(run, "tables", f"{name}-by-template.csv"))
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
    types |= dict.fromkeys(("layers", "rate", "draw"), float)
    try:
        frame = read_table(path, dtype=types)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} {AGAIN}") from None
    # Version 0.1.0 called the columns that name the two references base and full.
    frame = frame.rename(columns={"base": "base_run", "full": "full_run"})
    if "graft" not in frame or frame.empty:
        raise ValueError(f"{path} is not a table of grafts. {AGAIN}")
    return frame
