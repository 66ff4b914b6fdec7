"""One row per group and graft: means and recovery, each with its interval."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from graftlens.metrics import some_over_common
from graftlens.references import COMMON_TOKENS, MEMBERS, common_tokens, named_in
from graftlens.stats.intervals import mean_intervals
from graftlens.stats.recovery import recoveries
from graftlens.stats.resampling import Draw, means_of, numbered, unit_count
from graftlens.stats.table import (
    NO_FULL_RUN,
    Pivot,
    check_groups,
    check_metrics,
    check_units,
    checked_table,
    choose_run,
    column_of,
    end_places,
    endless,
    graft_facts,
    groups_of,
    with_notes,
)


def summarise(
    table: pd.DataFrame,
    *,
    by: str | Sequence[str] = ("template",),
    ks: Sequence[int] = (1, 5, 50),
    metrics: Sequence[str] = ("logprob", "answer_logprob"),
    recovery: str | None = "logprob",
    base: str | None = None,
    full: str | None = None,
    grafts: Sequence[str] | None = None,
    unit: str = "prompt",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean accuracies, log-probabilities and recovery of every graft, each with its interval.

    One row per group of `by` and graft, in the order in which they first appear:

    - `n`: prompts used, the same for every graft of the group; `not_run`: prompts of the group left
      out because they did not run under every graft; `failed`: how many of those had no result
      under this very graft;
    - for each metric `m` (`top{k}` for k in `ks`, then `metrics`): its mean `m`, `m_low`, `m_high`;
    - `recovery` = (mean(graft) − mean(base)) / (mean(full) − mean(base)) of the metric named by the
      argument, with `recovery_low`, `recovery_high`, and `recovery_note`: None, or why a value or
      its interval is NaN;
    - `note`: None, or which metrics have no mean (NaN) because they are infinite for some prompt,
      as the log-probability of a token that a source lacks is; ranks and probabilities are not;
    - `source`, `span`, `component`, `layer`, `head`, `neuron` and `strength` of a graft with one
      rule, if the table has these columns or the column `rule`, and `source_rank` if it has that;
    - `recovery_of`, `base_run`, `full_run`, `level`, `resamples`, `seed`, `unit`: how the row was
      computed; `units`: how many units the prompts used belong to; `common_tokens`: how many tokens
      KL, JS and entropy are over, where sources have different vocabularies.

    Intervals are percentile intervals of a paired bootstrap over units (Efron & Tibshirani 1993,
    chapter 13). Two cases in which that would claim more than the data support:

    - An accuracy with fewer than 5 successes or fewer than 5 failures gets a Wilson score interval
      (Wilson 1927; Brown, Cai & DasGupta 2001). The bootstrap of 0 of 40 is [0, 0], as if more
      prompts could never change it; Wilson's is [0, 0.088]. If the unit is not the prompt, units
      with any success or failure are counted, and the interval is that of as many prompts as there
      are units of equal size (Kish, *Survey Sampling*, 1965: Σ(size)² / Σ(size²)), as if a unit's
      prompts always agreed.
    - A mean of other metrics over one unit has no interval (NaN).

    Recovery is computed within each resample. It is NaN where full − base is 0 or its interval
    includes 0 (there is nothing to recover), and where the table names no full run. The few
    resamples in which full − base has the other sign count against both ends. Recovery is 0 for
    `base` and 1 for `full` by definition; for another graft an interval without width (all
    resamples equal) is given as NaN with a note.

    A metric that a prompt may lack (`logit_diff` without distractors, `answer_logprob` where only
    the first token was scored) is NaN if no prompt of a group has it; if only some have it, that is
    an error, because its mean would be over other prompts.

    Args:
        by: columns whose values are groups of prompts; `member` or `step` where models were run one
            after another (`each`).
        grafts: the grafts to summarise; by default all but those that ran on no prompt at all.
        base, full: the grafts between which recovery is measured; by default those that the table
            names (`evaluate` and `read_results` do), else PRE and SFT.

    Raises:
        ValueError: unknown metrics, grafts or columns, a table with missing or duplicated
            values, or prompts that belong to several groups or units.
    """
    about = graft_facts(table)
    if recovery is not None:
        base, full = named_in(table, base, full)
    by = (by,) if isinstance(by, str) else tuple(by)
    names = (*(f"top{k}" for k in ks), *metrics)
    wanted = names if recovery is None else (*names, recovery)
    check_metrics(table, wanted)
    common = common_tokens(table) if some_over_common(wanted) else None
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"metric {name!r} is requested twice; name each metric once")
    draw = Draw(unit, level, resamples, seed)
    within = [name for name in by if name in MEMBERS]
    table = checked_table(table, (*by, *draw.columns, *map(column_of, wanted)), within)
    check_groups(table, by)
    check_units(table, unit)
    chosen = choose_run(table, grafts, (base, full))
    ends = None
    if base is not None and full is not None and recovery is not None:
        ends = end_places(chosen, base, full, "recovery=None")
    rows: list[dict[str, object]] = []
    for key, group in groups_of(table[table["graft"].isin(chosen)], by):
        pivot = Pivot.of(group, chosen)
        used = pivot.ran_everywhere
        needed = np.broadcast_to(used[:, None], pivot.ran.shape)
        values = {name: pivot.values(name, needed)[used] for name in dict.fromkeys(wanted)}
        units = numbered(pivot.units(unit)[used])
        n = int(used.sum())
        found: dict[str, tuple[Sequence[object] | np.ndarray, ...]] = {}
        notes = {name: endless(name, values[name], pivot.prompts[used]) for name in values}
        for name in names:
            found[name] = _means(name, values[name], units, draw)
        if recovery is not None and ends is not None:
            found["recovery"] = _recoveries(values[recovery], notes[recovery], ends, units, draw)
        elif recovery is not None:
            nothing = np.full(len(chosen), np.nan)
            found["recovery"] = (nothing, nothing, nothing, [NO_FULL_RUN] * len(chosen))
        for column, graft in enumerate(chosen):
            row = dict(zip(by, key, strict=True))
            row |= {"graft": graft} | about.get(graft, {}) | {"n": n, "not_run": len(used) - n}
            row["failed"] = int((~pivot.ran[:, column]).sum())
            for name, parts in found.items():
                kinds = zip(("", "_low", "_high", "_note"), parts, strict=False)
                row |= {f"{name}{kind}": part[column] for kind, part in kinds}
            row["note"] = "; ".join(filter(None, (notes[name][column] for name in names))) or None
            if recovery is not None:
                row |= {"recovery_of": recovery, "base_run": base, "full_run": full}
            row |= {"level": level, "resamples": resamples, "seed": seed}
            row |= {"unit": unit, "units": unit_count(units)}
            rows.append(row if common is None else row | {COMMON_TOKENS: common})
    return with_notes(with_notes(pd.DataFrame(rows), "recovery_note"), "note")


def _means(
    name: str,
    values: Float[np.ndarray, "prompt graft"],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and interval of each column; NaN where a value is infinite."""
    means, low, high = np.full((3, values.shape[1]), np.nan)
    finite = ~np.isinf(values).any(axis=0)
    means[finite] = means_of(values[:, finite])
    low[finite], high[finite] = mean_intervals(name, values[:, finite], units, draw)
    return means, low, high


def _recoveries(
    values: Float[np.ndarray, "prompt graft"],
    notes: Sequence[str | None],
    ends: tuple[int, int],
    units: Int[np.ndarray, " prompt"],
    draw: Draw,
) -> tuple[Sequence[object] | np.ndarray, ...]:
    """As `recoveries`, with the `notes` of columns that have infinite values."""
    # Without a base or full run there is no recovery of any other graft either.
    why = next((notes[end] for end in ends if notes[end] is not None), None)
    if why is not None:
        nothing = np.full(len(notes), np.nan)
        return nothing, nothing, nothing, [note or why for note in notes]
    kept = [column for column, note in enumerate(notes) if note is None]
    within = (kept.index(ends[0]), kept.index(ends[1]))
    ratios, low, high = np.full((3, len(notes)), np.nan)
    said = list(notes)
    *numbers, more = recoveries(values[:, kept], within, units, draw)
    for out, found in zip((ratios, low, high), numbers, strict=True):
        out[kept] = found
    for column, note in zip(kept, more, strict=True):
        said[column] = note
    return ratios, low, high, said
