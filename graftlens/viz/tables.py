"""Tables as files: CSV with every number, Markdown for readers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from graftlens.folder import write_whole
from graftlens.stats import GRAFT_COLUMNS
from graftlens.viz import text


def write_table(
    frame: pd.DataFrame,
    stem: str | Path,
    *,
    columns: Sequence[str] | None = None,
    caption: str = "",
) -> dict[str, Path]:
    """Write `stem`.csv and `stem`.md and return their paths as `csv` and `md`.

    The CSV has all columns with all digits. The Markdown has `columns` (by default those of
    `written_columns`) with every metric as in `92.5% [80.1, 97.4]`, under `caption`.

    Raises:
        ValueError: a column that the table lacks.
    """
    stem = Path(stem)
    shown = written_columns(frame, columns)
    lines = [f"**{_markdown(caption)}**", ""] if caption else []
    lines.append(_row(shown))
    lines.append(_row("---" for _ in shown).replace(" --- ", "---"))
    lines += [_row(cells) for cells in zip(*shown.values(), strict=True)]
    if measured := _measured(frame, columns):
        about = f"[low, high]: {text.level(frame)} intervals over {text.resampled(frame)}."
        if "recovery" in measured:
            about += f" Recovery: {text.measure(frame, 'recovery').title}."
        lines += ["", _markdown(about)]
    return {
        "csv": write_whole(_with(stem, "csv"), frame.to_csv(index=False, lineterminator="\n")),
        "md": write_whole(_with(stem, "md"), "\n".join([*lines, ""])),
    }


def written_columns(
    frame: pd.DataFrame, columns: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Heading -> cells of a table as a reader wants them.

    A metric with an interval is one column. By default a summary shows what groups it, the graft,
    `n` and the metrics; another table shows all its columns.

    Raises:
        ValueError: a column that the table lacks.
    """
    if frame.empty:
        return {}
    measured = _measured(frame, columns)
    found: dict[str, list[str]] = {}
    for name in _chosen(frame, columns):
        if name in measured:
            facts = text.measure(frame, name)
            found[text.measure_label(name)] = text.written_all(facts, frame)
        else:
            found[name.replace("_", " ")] = [_plain(value) for value in frame[name].tolist()]
    return found


def _chosen(frame: pd.DataFrame, columns: Sequence[str] | None) -> list[str]:
    have = [str(name) for name in frame.columns]
    if columns is not None:
        for name in columns:
            if name not in have:
                raise ValueError(
                    f"the table has no column {name!r}; it has {', '.join(map(repr, have))}"
                )
        return list(columns)
    if not _is_summary(frame):
        return have
    lead = [name for name in have[: have.index("graft") + 1] if name not in GRAFT_COLUMNS]
    return [*lead, "n", *text.metrics(frame)]


def _measured(frame: pd.DataFrame, columns: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that are metrics with an interval."""
    if not _is_summary(frame):
        return ()
    return tuple(m for m in text.metrics(frame) if columns is None or m in columns)


def _is_summary(frame: pd.DataFrame) -> bool:
    return {"graft", "n", "level"} <= set(frame.columns) and not frame.empty


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value is pd.NA or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with(stem: Path, ending: str) -> Path:
    # A name such as "layers 0.5" has a dot that starts no ending.
    return stem.with_name(f"{stem.name}.{ending}")


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(cell: object) -> str:
    """A cell's text, so that nothing in it ends the cell or is read as a mark."""
    said = " ".join(str(cell).split())
    for mark in "\\|*_`<>":
        said = said.replace(mark, f"\\{mark}")
    return said
