"""Several experiments that were run (other models, other datasets) side by side in one page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.experiment.analysis import TAGS
from graftlens.folder import writable
from graftlens.stats import GRAFT_COLUMNS
from graftlens.viz.compare import compare_page


def compare_runs(runs: Sequence[Path], out: Path, *, metric: str = "top5") -> Path:
    """Write a page that compares the parts that the runs share.

    Args:
        runs: folders of experiments that `graftlens run` finished, two or more.
        out: the page to write.
        metric: what is compared.

    Returns:
        The page.

    Raises:
        ValueError: fewer than two runs, a folder that holds none, no part in common, a metric that
            they lack.
        OSError: a page that cannot be written.
    """
    out = writable(out)
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} given: name two or more folders that graftlens run wrote.")
    runs = [Path(run).expanduser() for run in runs]
    records = {run: _record(run) for run in runs}
    if len(records) < len(runs):
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
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _labels(records: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A name for each run: its model if that tells the runs apart, else its folder."""
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
        frame = _read(run / "tables" / f"{name}-by-template.csv")
        grids = run / "tables" / f"{name}-grids.csv"
        if grids.is_file():
            tagged = _read(grids)
            found[f"{name}, grids"] = tagged
            frame = frame[~frame["graft"].isin(tagged["graft"])]
        if frame["graft"].nunique() > 0:
            found[name] = frame
    return found


def _read(path: Path) -> pd.DataFrame:
    texts = dict.fromkeys((*GRAFT_COLUMNS, *TAGS, "graft", "template", "dataset"), str)
    numbers = dict.fromkeys(("layers", "rate", "draw"), float)
    return pd.read_csv(path, dtype=texts | numbers, keep_default_na=False, na_values=[""])
