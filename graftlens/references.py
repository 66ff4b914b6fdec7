"""The two runs that the others are measured against: the base, and one source everywhere.

Recovery is 0 in the first and 1 in the second. Tables of results name both in their columns
`base_run` and `full_run`, which every function that needs them reads.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

import pandas as pd

from graftlens.components import suggest
from graftlens.graft import Graft, as_graft

#: A table's columns that name the two runs; without a full run the second one is empty.
COLUMNS = ("base_run", "full_run")

#: The column of tables whose sources have different vocabularies: how many tokens all of them have.
#: KL, JS, entropy and mean logits are over these, renormalised.
COMMON_TOKENS = "common_tokens"

#: A table's columns that say which of several models, run one after another, a row is of.
MEMBERS = ("member", "step")


def in_steps(table: pd.DataFrame) -> bool:
    """Whether the models of a table with `MEMBERS` are told apart by their steps."""
    steps = table.drop_duplicates("member")["step"]
    return bool(steps.notna().all() and steps.is_unique)


@dataclass(frozen=True)
class References:
    """Named grafts, the two references among them.

    Attributes:
        grafts: name -> graft; references that were not given come first.
        base: the name of the run without a graft.
        full: the name of the run that counts as SFT; None if nothing says which one that is.
    """

    grafts: Mapping[str, Graft]
    base: str
    full: str | None

    @property
    def chosen(self) -> dict[str, Graft]:
        """The grafts of the references that are known, as `base` and `full`."""
        named = {"base": self.base, "full": self.full}
        return {role: self.grafts[name] for role, name in named.items() if name is not None}

    @classmethod
    def of(
        cls,
        grafts: Mapping[str, Graft],
        sources: Sequence[str],
        full: Graft | str | None = None,
        names: tuple[str, str] = ("PRE", "SFT"),
    ) -> "References":
        """The grafts, with those references added that are not among them.

        Args:
            grafts: name -> graft; a reference among them keeps its name.
            sources: the names of the sources, the base first.
            full: the full run: a graft, its text, or the name of a graft or a source. None is the
                only finetuned source everywhere; if there are several, the one that a graft of
                `grafts` uses everywhere.
            names: what added references are called, unless other grafts have these names.

        Raises:
            ValueError: a `full` that is not a graft, or that uses nothing but the base.
        """
        whole = _full(grafts, sources, full)
        added: dict[str, Graft] = {}
        chosen: list[str] = []
        for usual, graft in zip(names, (Graft(), whole), strict=True):
            if graft is None:
                continue
            known = next((name for name, given in grafts.items() if given == graft), None)
            if known is None:
                # A name that is given to another graft is not taken from it.
                free = chain((usual, str(graft)), (f"{usual} {n}" for n in count(2)))
                known = next(name for name in free if name not in grafts and name not in added)
                added[known] = graft
            chosen.append(known)
        return cls(added | dict(grafts), chosen[0], chosen[1] if whole is not None else None)


def _full(
    grafts: Mapping[str, Graft], sources: Sequence[str], full: Graft | str | None
) -> Graft | None:
    base, *others = sources
    if full is None:
        if len(others) == 1:
            return Graft.rule(others[0])
        given: dict[str, Graft] = {}
        for graft in grafts.values():
            source = _everywhere(graft, base)
            if source in others:
                given.setdefault(source, graft)
        return next(iter(given.values())) if len(given) == 1 else None
    # A given graft's name comes before a source's.
    known = {name: Graft.rule(name) for name in sources} | dict(grafts)
    found = known.get(full, full) if isinstance(full, str) else full
    # A text without an @ is not a rule: a name with a slip, or the base's.
    slip = isinstance(found, str) and "@" not in found
    whole = Graft() if slip else as_graft(found, "full")
    if _used(whole, base) <= {base}:
        example = others[-1] if others else base
        raise ValueError(
            f"full={str(full)!r} is not a run of a finetuned source. Give one of the sources "
            f"{' '.join(others)}, the name of one of the grafts, or a graft, such as "
            f'"{example} @ all".{suggest(str(full), [*others, *grafts])}'
        )
    return whole


def _used(graft: Graft, base: str) -> set[str]:
    """The sources that weights may come from under a graft."""
    used = {base}
    for rule in graft.rules:
        if (rule,) == Graft.rule(rule.source).rules:
            used = {rule.source}
        elif rule.strength != 0:
            used.add(rule.source)
    return used


def _everywhere(graft: Graft, base: str) -> str | None:
    """The source that all weights come from under a graft; None where several may."""
    used = _used(graft, base)
    return used.pop() if len(used) == 1 else None


def marked(table: pd.DataFrame, base: str, full: str | None) -> pd.DataFrame:
    """A table of results with the columns that name its references, after the grafts' own."""
    place = max(table.columns.get_loc(c) for c in ("graft", "rule") if c in table) + 1
    for offset, (column, name) in enumerate(zip(COLUMNS, (base, full), strict=True)):
        table.insert(place + offset, column, pd.Series(name, table.index, dtype=object))
    return table


def warn_of_reasons(table: pd.DataFrame, what: str) -> None:
    """Warn, at the caller's caller, of rows that have a reason instead of numbers; `what` says what
    these are."""
    missing = table["reason"].notna()
    if missing.any():
        warnings.warn(
            f"{missing.sum()} of {len(table)} {what}; first reason: "
            f"{table.loc[missing, 'reason'].iloc[0]}",
            stacklevel=3,
        )


def named_in(
    table: pd.DataFrame, base: str | None = None, full: str | None = None
) -> tuple[str, str | None]:
    """The names of a table's references: those given, else its own, else PRE and SFT.

    The second one is None where the table has the column and nothing in it.

    Raises:
        ValueError: a table that names several.
    """
    found: list[str | None] = []
    for column, given, usual in zip(COLUMNS, (base, full), ("PRE", "SFT"), strict=True):
        if given is not None or column not in table:
            found.append(usual if given is None else given)
            continue
        names = [str(name) for name in table[column].dropna().unique()]
        if len(names) > 1:
            raise ValueError(
                f"column {column!r} names several runs ({', '.join(map(repr, names))}): give "
                f"{column.removesuffix('_run')}= the name of one, or split the table by it"
            )
        found.append(names[0] if names else None)
    return found[0] or "PRE", found[1]


def are_references(table: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are of the table's references; none where it does not name them."""
    found = pd.Series(False, index=table.index)
    for column in COLUMNS:
        if column in table:
            found |= table["graft"].astype(object) == table[column].astype(object)
    return found


def common_tokens(table: pd.DataFrame) -> int | None:
    """How many tokens measures are over, where sources have different vocabularies; else None.

    Raises:
        ValueError: a table joined from several, of which this differs.
    """
    found = [] if COMMON_TOKENS not in table else table[COMMON_TOKENS].dropna().unique().tolist()
    if len(found) > 1:
        raise ValueError(
            f"column {COMMON_TOKENS!r} has {' and '.join(map(str, found))}: the rows are over "
            "different tokens. Split the table by it"
        )
    return int(found[0]) if found else None
