"""Facts and sentences of your own: a table of facts, and a file of templates."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from graftlens.components import brief
from graftlens.configfile import ConfigError
from graftlens.data.dataset import USUAL, Asking
from graftlens.data.tablerows import (
    FILES,
    Cell,
    Table,
    check_table,
    listed,
    read_table,
    row_class,
)
from graftlens.data.templated import TemplatedSpec
from graftlens.data.templates import Direction, template_fields
from graftlens.data.templatesets import ENTITIES, Sentences, Templates
from graftlens.prompts import OTHER_SPANS, Prompt

#: Names that columns which texts mention cannot have: they are other spans.
_TAKEN = (*ENTITIES, *OTHER_SPANS)


def _path_or_rows(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value.strip()):
        check_table(Path(value))
        return Path(value)
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{brief(value)} is not a table. Name a file ({' '.join(FILES)}), or write a list of "
            "rows: [{person: Ann, city: Rome}, …]."
        )
    if not value:
        raise ValueError("the list is empty. Give a row for each fact.")
    for number, row in enumerate(value, 1):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} is {brief(row)}. A row is a mapping of columns, such as "
                "{person: Ann, city: Rome}."
            )
    return tuple(value)


def _says(text: str, words: str) -> bool:
    """Whether a text has these words, not as parts of others."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


class TableSpec(TemplatedSpec):
    """Facts in a table of your own: a row each, with any columns.

    Direction `ab` names the first of the two columns that the templates link and asks for the
    second, `ba` the reverse.
    """

    facts: Literal["table"] = "table"
    """A table."""

    table: Annotated[Path | tuple[Mapping[Any, Any], ...], BeforeValidator(_path_or_rows)]
    """A CSV (with a line of names), JSONL or Parquet file with a row per fact, or the rows
    themselves: [{person: Ann, city: Rome}, …]."""

    templates: Templates
    """The sentences that tell the facts and that ask for them: a YAML file, or its content. See
    `graftlens.data.templatesets`."""

    @model_validator(mode="after")
    def _something_told(self) -> "TableSpec":
        if not self.templates.tell:
            raise ConfigError(("templates.tell", "this key is missing. Give texts that tell."))
        if not self.templates.ask:
            raise ConfigError(("templates.ask", "this key is missing. Give a text that asks."))
        return self

    @property
    def sentences(self) -> Sentences:
        try:
            return self.templates.bound()
        except ConfigError as error:
            raise error.under("templates") from None

    def collect(self) -> tuple[Any, ...]:
        """The table's facts, in its order.

        Raises:
            FileNotFoundError, ValueError: a table or templates that cannot be used.
        """
        found = self._read()
        try:
            self.templates.bound(columns=found.columns)
        except ConfigError as error:
            raise error.under("templates") from None
        self._refuse_taken(found)
        problems = list(self._empty(found))
        if problems:
            raise ConfigError(*(("table", what) for what in problems))
        self._refuse_two_answers(found)
        self._refuse_differing(found)
        made = self._class(found.columns)
        count = min(USUAL, len(found.rows)) if self.n_facts is None else self.n_facts
        if count > len(found.rows):
            raise ValueError(
                f"n_facts={count}: the table has {len(found.rows)} rows. Write a number up to "
                "that, or leave it out."
            )
        lists = {self.templates.aliases, self.templates.distractors}
        return tuple(
            made(**{c: listed(cell) if c in lists else cell for c, cell in row.items()})
            for row in found.rows[:count]
        )

    def questions(
        self, facts: Sequence[Any], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        prompts = super().questions(facts, asked, how)
        told = [p for p in prompts if _says(p.text, str(p.answer).strip())]
        if told:
            warnings.warn(
                f"{len(told)} of {len(prompts)} prompts contain their answer, such as "
                f"{told[0].text!r} (answer{told[0].answer!r}), so they can be answered by copying. "
                "Change those rows, or leave them out.",
                stacklevel=2,
            )
        return prompts

    def revive(self, values: Mapping[str, Any]) -> Any:
        cells = {c: tuple(v) if isinstance(v, list) else v for c, v in values.items()}
        return self._class(tuple(values))(**cells)

    def hidden(self, facts: Any) -> tuple[str, ...]:
        given = self.templates
        lists = [name for name in (given.aliases, given.distractors) if name is not None]
        return (*given.untold, *lists)

    def notes(self, facts: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = self._read()
        return {"table": {"rows": len(found.rows), "columns": list(found.columns)}}

    def _read(self) -> Table:
        given = self.templates
        used = {*self._mentioned(), given.aliases, given.distractors}
        return read_table(self.table, {name for name in used if name is not None})

    def _class(self, columns: tuple[str, ...]) -> Any:
        given = self.templates
        assert given.entities is not None
        hidden = [c for c in (given.aliases, given.distractors) if c is not None]
        # A column that no text mentions need not have a value, and is not kept as a field.
        hidden += [c for c in columns if c not in self._mentioned()]
        return row_class(
            columns,
            given.entities,
            tuple(dict.fromkeys([*given.untold, *hidden])),
            given.bridge,
            given.aliases,
            given.distractors,
        )

    def _mentioned(self) -> set[str]:
        """The columns that the facts link or that some text mentions."""
        given, found = self.templates, self.sentences
        named = {name for t in found.training for name in template_fields(t.text)}
        # A word that a question gives itself is none of the columns.
        named |= {f for t in found.evaluation for f in template_fields(t.text) if f not in t.words}
        asked = {t.answer for t in found.evaluation}
        linked = {*(given.entities or ()), given.bridge}
        return {name for name in (named | asked | linked) - {*ENTITIES, None} if name}

    def _refuse_taken(self, found: Table) -> None:
        taken = [name for name in _TAKEN if name in self._mentioned() and name in found.columns]
        if taken:
            raise ConfigError(
                ("table", f"the column {taken[0]!r} has the name of another span. Rename it.")
            )

    def _empty(self, found: Table) -> Iterator[str]:
        """Every cell that has to have a text and has none, or has a list."""
        mentioned = [column for column in found.columns if column in self._mentioned()]
        for where, row in zip(found.where, found.rows, strict=True):
            for column in mentioned:
                cell = row[column]
                if isinstance(cell, tuple):
                    yield f"{where}: {column!r} is a list, but texts mention it. Write one text."
                elif not cell:
                    yield f"{where} has nothing in {column!r}. Fill it in, or leave the row out."
            yield from self._answers(where, row)

    def _answers(self, where: str, row: Mapping[str, Cell]) -> Iterator[str]:
        """What is wrong with a row's further answers and wrong answers."""
        given = self.templates
        assert given.entities is not None
        right = [str(row[given.entities[1]])]
        right += listed(row[given.aliases]) if given.aliases else ()
        if given.distractors is not None:
            wrong = listed(row[given.distractors])
            if both := [answer for answer in wrong if answer in right]:
                yield (
                    f"{where}: {both[0]!r} is a right answer, and among the wrong ones in "
                    f"{given.distractors!r}. Take it out there."
                )
            if not wrong:
                yield f"{where} has no wrong answers in {given.distractors!r}. Give one or more."

    def _refuse_two_answers(self, found: Table) -> None:
        """A prompt has one right answer: where it asks, no entity has two rows."""
        given = self.templates
        assert given.entities is not None
        asked = {d for t in self.evaluation if t.answer is None for d in t.directions}
        columns: dict[Direction, tuple[str, str]] = {
            "ab": given.entities,
            "ba": (given.entities[1], given.entities[0]),
        }
        for direction, (named, answer) in columns.items():
            first: dict[str, int] = {}
            for number, row in enumerate(found.rows):
                other = first.setdefault(str(row[named]), number)
                if other != number and direction in asked:
                    same = row[answer] == found.rows[other][answer]
                    fix = (
                        "Leave one out." if same else f"Leave one out, or give {answer!r} aliases."
                    )
                    raise ConfigError(
                        (
                            "table",
                            f"{found.where[other]} and {found.where[number].split(', ')[-1]} both "
                            f"have the {named} {row[named]!r}, so a prompt about it has two "
                            f"answers. {fix}",
                        )
                    )

    def _refuse_differing(self, found: Table) -> None:
        """A prompt that asks for a column, or from the bridge, has the same answer in every row
        that makes the same prompt."""
        given = self.templates
        assert given.entities is not None
        names = {**dict(zip(ENTITIES, given.entities, strict=True)), "bridge": given.bridge}
        for asked in self.evaluation:
            fields = template_fields(asked.text)
            if asked.answer is None and set(fields) & set(ENTITIES):
                continue
            answer = asked.answer or given.entities[1]
            named = [name for f in fields if (name := names.get(f) or f) in found.columns]
            first: dict[tuple[Cell, ...], int] = {}
            for number, row in enumerate(found.rows):
                other = first.setdefault(tuple(row[name] for name in named), number)
                if row[answer] != found.rows[other][answer]:
                    said = " and ".join(f"the {name} {row[name]!r}" for name in named)
                    what = (
                        f"{found.where[other]} and {found.where[number].split(', ')[-1]} both have "
                        f"{said}, but another {answer}, so ask.{asked.name} has two answers. Leave "
                        "a row out, or that text."
                    )
                    raise ConfigError(("table", what))
