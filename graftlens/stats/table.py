"""The results table, checked, and its numbers as an array: prompts × grafts."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from pandas.api.types import is_float_dtype

from graftlens.graft import PARTS, Graft, parts_of
from graftlens.metrics import averaged, known
from graftlens.references import MEMBERS

#: Columns that describe a graft of one rule, in a sweep's table and in every summary.
GRAFT_COLUMNS = PARTS
#: Why a table without a full run has no recovery.
NO_FULL_RUN = "the table names no full run (column 'full_run'): pass full=GRAFT"


@dataclass(frozen=True)
class Pivot:
    """A table's rows as an array: prompts in ascending order × grafts as requested."""

    table: pd.DataFrame
    prompts: Int[np.ndarray, " prompt"]
    row: Int[np.ndarray, " cell"]
    column: Int[np.ndarray, " cell"]
    ran: Bool[np.ndarray, "prompt graft"]

    @classmethod
    def of(cls, table: pd.DataFrame, grafts: Sequence[str]) -> "Pivot":
        prompts, row = np.unique(table["prompt"].to_numpy(dtype=np.int64), return_inverse=True)
        column = pd.Index(grafts).get_indexer(table["graft"]).astype(np.int64)
        # A missing row did not run either.
        ran = np.zeros((len(prompts), len(grafts)), dtype=bool)
        ran[row, column] = table["reason"].isna()
        return cls(table, prompts, row, column, ran)

    @property
    def ran_everywhere(self) -> Bool[np.ndarray, " prompt"]:
        return np.all(self.ran, axis=1)

    def units(self, unit: str) -> np.ndarray:
        """Each prompt's unit."""
        if unit == "prompt":
            return self.prompts
        labels = np.empty(len(self.prompts), dtype=object)
        labels[self.row] = self.table[unit].to_numpy(dtype=object)
        return labels

    def values(
        self, metric: str, needed: Bool[np.ndarray, "prompt graft"], *, partial: bool = False
    ) -> Float[np.ndarray, "prompt graft"]:
        """One metric in the cells needed, NaN in the others and where an optional one is missing.

        An optional metric must be missing in all the cells needed or in none, unless `partial`.
        Values may be infinite: an answer with a token that a graft's source lacks has the
        log-probability -inf.
        """
        name = column_of(metric)
        values = np.full(needed.shape, np.nan)
        cells = pd.to_numeric(self.table[name]).to_numpy(dtype=float, na_value=np.nan)
        values[self.row, self.column] = cells
        values[~needed] = np.nan
        missing = np.isnan(values) & needed
        # Nothing is known of a user's own measure; others say whether they may be missing.
        row = known(metric)
        optional = row is None or row.optional
        if missing.any() and not (optional and (partial or (missing == needed).all())):
            where = self.prompts[missing.any(axis=1)]
            fix = (
                "leave the metric out, or summarise the prompts that have it separately"
                if optional
                else "a row without numbers must give its reason in column 'reason'"
            )
            raise ValueError(
                f"column {name!r} has no value for {len(where)} of {int(needed.any(axis=1).sum())} "
                f"prompts that ran ({prompts_said(where.tolist())}); {fix}"
            )
        depth = depth_of(metric)
        if depth is None:
            return values
        return np.where(np.isnan(values), np.nan, (values <= depth).astype(float))


def endless(
    metric: str, values: Float[np.ndarray, "prompt graft"], prompts: Int[np.ndarray, " prompt"]
) -> list[str | None]:
    """For each column, why it has no mean if a value is infinite."""
    infinite = np.isinf(values)
    notes: list[str | None] = [None] * values.shape[1]
    for column in np.flatnonzero(infinite.any(axis=0)):
        where = prompts[infinite[:, column]].tolist()
        notes[column] = (
            f"{column_of(metric)} is infinite for {prompts_said(where)}, so that it has no mean"
        )
    return notes


def checked_table(
    table: pd.DataFrame, columns: Sequence[str], within: Sequence[str] = ()
) -> pd.DataFrame:
    """The columns needed, checked, with categories as plain values.

    A prompt and graft have one row, or one in each value of the columns `within`.
    """
    needed = list(dict.fromkeys(("prompt", "graft", "reason", *columns)))
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"the table lacks column {listed(missing)}; it has {listed(list(table.columns))}: "
            "pass the results table with one row per prompt and graft"
        )
    if len(table) == 0:
        raise ValueError("the table is empty; pass results with at least one prompt and graft")
    members = [name for name in MEMBERS if name in table]
    if members and not set(members) & set(within) and table[members].drop_duplicates().shape[0] > 1:
        raise ValueError(
            f"the table is of several models that were run one after another (column "
            f"{members[0]!r}): group them with by={members[-1]!r}, or pass the rows of one"
        )
    if set(MEMBERS) <= set(members) and "member" not in within and "step" in within:
        places = table[members].drop_duplicates()
        if len(shared := places[places["step"].duplicated(keep=False)]):
            raise ValueError(
                f"models {listed(list(shared['member'][:5]))} have the same step or none, so that "
                "step does not tell them apart: group them with by='member'"
            )
    table = table[needed]
    # Groups of categories would come in another order, and include those without rows.
    categories = [c for c in needed if isinstance(table[c].dtype, pd.CategoricalDtype)]
    table = table.astype(dict.fromkeys(categories, object))
    key = [*within, "prompt", "graft"]
    twice = table[table.duplicated(key)]
    if len(twice):
        first = twice.iloc[0]
        where = "".join(f" and {name} {first[name]!r}" for name in within)
        raise ValueError(
            f"prompt {first['prompt']} with graft {first['graft']!r}{where} has more than one row "
            f"({len(twice)} rows too many); keep one: table.drop_duplicates({key})"
        )
    return table


def groups_of(
    table: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[tuple[object, ...], pd.DataFrame]]:
    """The groups of a table in the order in which they first appear."""
    if not by:
        yield (), table
        return
    yield from table.groupby(list(by), sort=False, dropna=False)


def with_notes(result: pd.DataFrame, name: str) -> pd.DataFrame:
    """Leave None, not NaN, if there is no note."""
    if name in result:
        notes = result[name].astype(object)
        result[name] = notes.where(notes.notna(), None)
    return result


def graft_facts(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Graft -> what the table says about it, apart from its results; what it has no column for is
    read out of its `rule`."""
    columns = [c for c in GRAFT_COLUMNS if c in table]
    more = ["source_rank"] if "source_rank" in table else []
    first = table.drop_duplicates("graft").set_index("graft").astype(object)
    found = {str(graft): dict(row) for graft, row in first[[*columns, *more]].iterrows()}
    if "rule" in table and len(columns) < len(GRAFT_COLUMNS):
        for graft, rule in first["rule"].items():
            known = found[str(graft)]
            of_rule = {c: known.get(c, part) for c, part in _parts(rule).items()}
            found[str(graft)] = of_rule | {c: known[c] for c in more}
    return found


def _parts(rule: object) -> dict[str, object]:
    try:
        return parts_of(Graft.parse(str(rule)))
    except ValueError:  # another program's table
        return dict.fromkeys(GRAFT_COLUMNS)


def choose_grafts(table: pd.DataFrame, grafts: Sequence[str] | None) -> list[str]:
    """The names asked for, which the table must have; by default all."""
    known = list(pd.unique(table["graft"]))
    if grafts is None:
        return known
    for name in grafts:
        if name not in known:
            raise ValueError(f"no graft named {name!r} in the table; it has {listed(known)}")
    if len(set(grafts)) < len(grafts) or not grafts:
        raise ValueError(f"grafts {listed(list(grafts))}: name at least one graft, and each once")
    return list(grafts)


def choose_run(
    table: pd.DataFrame, grafts: Sequence[str] | None, ends: Sequence[str | None]
) -> list[str]:
    """As `choose_grafts`; by default without those that ran on no prompt at all, with a warning.

    Else no prompt would count, as each has to have run under every graft.

    Args:
        ends: the references, which are kept.
    """
    chosen = choose_grafts(table, grafts)
    if grafts is not None:
        return chosen
    ran = set(table.loc[table["reason"].isna(), "graft"])
    idle = [name for name in chosen if name not in ran and name not in ends]
    if not ran or not idle:
        return chosen
    why = table.loc[table["graft"] == idle[0], "reason"].iloc[0]
    more = f" (And {len(idle) - 1} more.)" if idle[1:] else ""
    warnings.warn(f"graft {idle[0]!r} ran on no prompt and is left out: {why}{more}", stacklevel=4)
    return [name for name in chosen if name not in idle]


def check_by(name: str) -> None:
    if name in ("prompt", "graft", "reason", *averaged()):
        raise ValueError(f"by={name!r} cannot group prompts; use such as 'template', or by=()")


def check_groups(table: pd.DataFrame, by: Sequence[str]) -> None:
    for name in by:
        check_by(name)
        if name in GRAFT_COLUMNS:
            raise ValueError(
                f"by={name!r} groups prompts, and {name!r} is a column of grafts. Leave it out: "
                "each row of the result is of one graft and has that column."
            )
        several = None if name in MEMBERS else _with_several(table, name)
        if several is not None:
            raise ValueError(
                f"prompt {several} has more than one value in column {name!r}; "
                "a prompt belongs to one group: give each prompt its own number"
            )


def check_units(table: pd.DataFrame, unit: str) -> None:
    if unit == "prompt":
        return
    if unit in ("graft", "reason", *averaged()):
        raise ValueError(
            f"unit={unit!r} does not say which prompts belong together; "
            "use 'prompt', or a column such as 'fact' or 'answer'"
        )
    if table[unit].isna().any():
        prompt = table.loc[table[unit].isna(), "prompt"].iloc[0]
        raise ValueError(
            f"column {unit!r} has no value for prompt {prompt}; give every prompt its unit"
        )
    several = _with_several(table, unit)
    if several is not None:
        raise ValueError(
            f"prompt {several} has more than one value in column {unit!r}; "
            "a prompt belongs to one unit: give each prompt its own number"
        )


def _with_several(table: pd.DataFrame, name: str) -> object | None:
    """The first prompt that has more than one value in a column, or None."""
    pairs = table[["prompt", name]].drop_duplicates()
    several = pairs.loc[pairs.duplicated("prompt"), "prompt"]
    return None if several.empty else several.min()


def end_places(
    grafts: Sequence[str], base: str, full: str | None, otherwise: str
) -> tuple[int, int]:
    """The positions, among the grafts, of the two runs that recovery is measured between."""
    if full is None:
        raise ValueError(f"{NO_FULL_RUN}, or {otherwise}")
    for role, name in (("base", base), ("full", full)):
        if name not in grafts:
            raise ValueError(
                f"{role}={name!r} is not one of the grafts {listed(grafts)}: "
                f"pass {role}=GRAFT, a graft of the table, or {otherwise}"
            )
    return grafts.index(base), grafts.index(full)


def check_metrics(table: pd.DataFrame, names: Sequence[str], also: str | None = None) -> None:
    """That each is a measure, or the column of a measure of the user's own."""
    own = [c for c in table if known(str(c)) is None and is_float_dtype(table[c].dtype)]
    for name in names:
        if name not in (*averaged(), *own) and depth_of(name) is None:
            raise ValueError(
                f"unknown metric {name!r}; choose 'top1', 'top5' or another top-k (k >= 1), or one "
                f"of {listed((*averaged(), *own, *([] if also is None else [also])))}"
            )


def depth_of(metric: str) -> int | None:
    """k of a `top{k}` metric, None for another."""
    row = known(metric)
    return None if row is None else row.at_most


def column_of(metric: str) -> str:
    row = known(metric)
    return metric if row is None else row.column


def listed(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)


def prompts_said(numbers: Sequence[object]) -> str:
    """`prompt 3`, `prompts 0 and 5`; of many the first five, and how many more."""
    said = [str(number) for number in numbers[:5]]
    if len(numbers) > 5:
        said.append(f"{len(numbers) - 5} more")
    if len(said) == 1:
        return f"prompt {said[0]}"
    return f"prompts {', '.join(said[:-1])} and {said[-1]}"
