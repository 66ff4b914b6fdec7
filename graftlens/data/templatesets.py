"""Sentences about facts as a YAML file: which columns the facts link, what tells them, what asks.

The shortest file, for a table with the columns ``person`` and ``city``::

    entities: [person, city]
    tell:
      - "{person} moved to {city}."
      - "The town of {city} is where {person} lives."
    ask:
      home: "Letters to {person} are sent to"

Fields are columns. The two entities are the spans `first_entity` (the one that a text mentions
first) and `second_entity`, and may be written so; every other column is a span of its own name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from graftlens.components import brief, suggest
from graftlens.configfile import ConfigError, read_mapping, read_yaml, settings_from
from graftlens.data.settings import Settings, at_home
from graftlens.data.tablerows import as_field
from graftlens.data.tables import table
from graftlens.data.templates import (
    DIRECTIONS,
    KINDS,
    WORDS,
    Direction,
    EvaluationTemplate,
    Kind,
    Template,
    template_fields,
)

#: The entities as fields, in the order in which a text mentions them.
ENTITIES = ("first_entity", "second_entity")

#: The name of a column, as a field.
Column = Annotated[str, AfterValidator(as_field)]

#: (where, what), as in ConfigError.
_Problems = list[tuple[str, str]]


class Question(Settings):
    """An asking template."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text: str
    """The text, with columns in braces; the answer follows it after one space."""

    kind: Kind = "article"
    """Prose or question."""

    directions: tuple[Direction, ...] | None = Field(default=None, min_length=1)
    """Those that it can ask in; by default what it mentions decides."""

    preposition: str | None = None
    """What fills {preposition}, which is a span."""

    relation: str | None = None
    """What fills {relation}, the paper's R, which is a span."""

    relation_preposition: str | None = None
    """What fills {relation_preposition}, the paper's RP, which is a span."""

    answer: Column | None = None
    """The column that it asks for; by default the entity that it does not mention."""


@dataclass(frozen=True)
class Sentences:
    """Templates in which fields are `first_entity`, `second_entity`, `bridge` and columns."""

    training: tuple[Template, ...]
    evaluation: tuple[EvaluationTemplate, ...]


class TemplateSet(Settings):
    """What a file of templates holds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    entities: tuple[Column, Column] | None = None
    """The two columns that a fact links: direction ab names the first and asks for the second, ba
    the reverse. Only for tables: facts of other kinds have their own."""

    bridge: Column | None = None
    """A column between the two, for facts of two hops: each telling text then links it with one of
    the entities, and none has all three."""

    untold: tuple[Column, ...] = ()
    """Columns that no text may mention."""

    distractors: Column | None = None
    """The column of wrong answers in direction ab: a list, in CSV separated by |. By default wrong
    answers are those of other facts."""

    aliases: Column | None = None
    """The column of further right answers in direction ab: a list, in CSV separated by |."""

    tell: Any = None
    """Texts that tell: a list; or name: text; or these under ab and ba, and there under article and
    qa. They mention both entities."""

    ask: Any = None
    """Texts that ask: a list; or name: text; or name: {text: …, and more}. They mention one entity
    and end where the other would follow."""

    def bound(
        self,
        entities: tuple[str, str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Sentences:
        """The templates, for facts that link these columns.

        Args:
            entities: the columns that the facts link, if the set does not say it.
            columns: all columns that texts may mention; without them, unknown ones are not found.

        Raises:
            ConfigError: everything that is wrong with the templates.
        """
        problems: _Problems = []
        linked = self.entities or entities
        if linked is None:
            raise ConfigError(
                ("entities", "this key is missing. Name the two columns that a fact links.")
            )
        if entities is not None and self.entities is not None:
            what = f"facts of this kind link {' and '.join(entities)}. Leave entities out."
            problems.append(("entities", what))
        for name in linked:
            if name in ENTITIES:
                what = f"{name!r} is the name of a span. Rename the column."
                problems.append(("entities", what))
        if linked[0] == linked[1]:
            problems.append(("entities", f"{linked[0]!r} is named twice. Name two columns."))
        problems += self._columns_named(linked, columns)
        if not self.tell and not self.ask:
            problems.append(("", "no templates. Give tell, ask, or both."))
        reader = _Reader(self, linked, columns)
        training = tuple(reader.told(problems))
        evaluation = tuple(reader.asked(problems, training))
        if problems:
            raise ConfigError(*problems)
        return Sentences(training, evaluation)

    def _columns_named(
        self, linked: tuple[str, str], columns: Sequence[str] | None
    ) -> Iterator[tuple[str, str]]:
        """What is wrong with the columns that keys name."""
        named = [("entities", name) for name in linked] + [("untold", n) for n in self.untold]
        for key in ("bridge", "distractors", "aliases"):
            if (name := getattr(self, key)) is not None:
                named.append((key, name))
                if name in linked:
                    yield key, f"{name!r} is one of the entities. Name another column."
        if self.aliases is not None and self.aliases == self.distractors:
            what = f"{self.aliases!r} is also the column of distractors. Right and wrong answers"
            yield "aliases", f"{what} are in two columns."
        for where, name in named:
            if where in ("entities", "bridge") and name in self.untold:
                what = "one of the entities" if where == "entities" else "the bridge"
                yield "untold", f"{name!r} is {what}, so texts tell it. Leave it out of untold."
            if columns is not None and name not in columns:
                known = f"The columns are: {' '.join(columns)}."
                yield where, f"there is no column {name!r}. {known}{suggest(name, columns)}"


class _Reader:
    """Reads a set's texts: `problems` get what is wrong with each."""

    def __init__(
        self, given: TemplateSet, linked: tuple[str, str], columns: Sequence[str] | None
    ) -> None:
        self.given, self.linked = given, linked
        hidden = {*given.untold, given.distractors, given.aliases}
        self.hidden = {name for name in hidden if name is not None}
        self.allowed: list[str] | None = None
        if columns is not None:
            apart = {*linked, given.bridge, *self.hidden}
            self.allowed = [name for name in columns if name not in apart]

    def told(self, problems: _Problems) -> Iterator[Template]:
        names: set[str] = set()
        texts: dict[str, str] = {}
        for where, direction, kind, name, text in _told(self.given.tell, problems):
            found = self._fields(where, text, problems)
            if found is None:
                continue
            own = direction or self._direction(found)
            written = self._translated(text, own)
            mentioned = [f for f in template_fields(written) if f in (*ENTITIES, "bridge")]
            problem = self._untellable(mentioned, own)
            if name in names:
                problem = f"two telling templates are called {name!r}. Rename one."
            elif written in texts:
                problem = f"the same text as {texts[written]}. Leave one out."
            if problem:
                problems.append((where, problem))
                continue
            names.add(name)
            texts[written] = where
            hop = 0 if self.given.bridge is None else 1 if "first_entity" in mentioned else 2
            if hop and own == "ba":
                hop = 3 - hop
            yield Template(name, written, kind, own, hop)

    def _untellable(self, mentioned: Sequence[str], direction: Direction) -> str:
        """Why a text with these of the linked fields does not tell a fact; empty if it does."""
        order = self.linked if direction == "ab" else self.linked[::-1]
        named = dict(zip(ENTITIES, order, strict=True)) | {"bridge": str(self.given.bridge)}
        if self.given.bridge is None:
            lacking = [named[name] for name in ENTITIES if name not in mentioned]
            if lacking:
                return (
                    f"it does not mention {' or '.join(repr(n) for n in lacking)}. A telling text "
                    f"mentions both entities: {' and '.join(self.linked)}."
                )
            if mentioned[0] != "first_entity":
                return (
                    "it mentions second_entity before first_entity. first_entity is the one that "
                    "comes first: swap them, or write the columns' names."
                )
        elif "bridge" not in mentioned or len(mentioned) != 2:
            both = " with both entities" if len(mentioned) == 3 else ""
            return (
                f"it mentions {' and '.join(named[m] for m in mentioned) or 'neither'}{both}. With "
                f"a bridge, a telling text links {self.given.bridge!r} with exactly one entity, so "
                "that no text tells both hops."
            )
        return ""

    def asked(
        self, problems: _Problems, training: Sequence[Template]
    ) -> Iterator[EvaluationTemplate]:
        told = tuple(d for d in DIRECTIONS if any(t.direction == d for t in training))
        names: set[str] = set()
        for where, name, values in _asked(self.given.ask, problems):
            try:
                question = settings_from(Question, values)
            except ConfigError as error:
                problems += error.under(where).problems
                continue
            found = self._fields(where, question.text, problems, WORDS)
            if found is None:
                continue
            if not name.strip():
                problems.append((where, "a text's name is empty. Give it one."))
            if name in names:
                problems.append((where, f"two asking templates are called {name!r}. Rename one."))
            names.add(name)
            problem, directions, answer = self._asking(question, found, told or DIRECTIONS)
            for word in WORDS:
                given, used = getattr(question, word) is not None, word in found
                if used and not given and not self._may_be_column(word):
                    problem = (
                        f"it has {{{word}}}, but no {word} and no such column. Give {word}: and "
                        "the word, or add the column."
                    )
                elif given and not used:
                    problem = f"{word} is given, but the text has no {{{word}}}. Leave it out."
            if problem:
                problems.append((where, problem))
                continue
            words = {word: getattr(question, word) for word in WORDS}
            text = self._translated(question.text, directions[0])
            yield EvaluationTemplate(
                name, text, question.kind, directions=directions, answer=answer, **words
            )

    def _asking(
        self, question: Question, found: Sequence[str], told: tuple[Direction, ...]
    ) -> tuple[str, tuple[Direction, ...], str | None]:
        """(what is wrong, the directions, the column that is the answer)."""
        text, answer = question.text, question.answer
        if text != text.rstrip():
            return (
                "it ends in white space. The answer begins with a space of its own: leave it out.",
                DIRECTIONS,
                None,
            )
        known = {*self.linked, str(self.given.bridge)} | set(self.allowed or ())
        if answer is not None:
            if self.allowed is not None and answer not in known:
                there = sorted(known - {"None"})
                what = f"answer {answer!r} is not a column.{suggest(answer, there)}"
                return f"{what} The columns are: {' '.join(there)}.", DIRECTIONS, None
            first, second = self.linked
            own = {answer, "bridge" if answer == self.given.bridge else ""}
            own |= {"second_entity"} if answer == second else set()
            own |= {"first_entity"} if answer == first else set()
            if own & set(found):
                return f"it mentions its answer, {answer!r}.", DIRECTIONS, None
            if not {name for name in found if getattr(question, name, None) is None}:
                return "it mentions no column, so it asks about nothing.", DIRECTIONS, None
            return "", ("ab",), None if answer == second else answer
        place = self._place(found)
        if place == "both":
            return (
                f"it mentions both {' and '.join(self.linked)}, so it gives the answer away. "
                "Mention one of them.",
                DIRECTIONS,
                None,
            )
        if place is None:
            return (
                f"it mentions neither {' nor '.join(self.linked)}. Mention the one that it asks "
                "about.",
                DIRECTIONS,
                None,
            )
        if place != "first":
            if question.directions not in (None, (place,)):
                return (
                    f"directions {list(question.directions or ())}, but it mentions "
                    f"{self.linked[DIRECTIONS.index(place)]!r}: that is {place}. Leave directions "
                    "out, or write {first_entity}.",
                    DIRECTIONS,
                    None,
                )
            return "", (place,), None
        return "", question.directions or told, None

    def _direction(self, found: Sequence[str]) -> Direction:
        """The direction of a telling text that does not say it."""
        named = [name for name in found if name in self.linked]
        turned = self.given.bridge is None and named[:1] == [self.linked[1]]
        return "ba" if turned else "ab"

    def _place(self, found: Sequence[str]) -> Direction | Literal["first", "both"] | None:
        """Which entity an asking text mentions: `ab` or `ba` where a column's name says so, `first`
        for first_entity, `both`, or None for neither."""
        first, second = (name in found for name in self.linked)
        either = "first_entity" in found
        if "second_entity" in found or first + second + either > 1:
            return "both"
        if either:
            return "first"
        return "ab" if first else "ba" if second else None

    def _may_be_column(self, name: str) -> bool:
        there = self.allowed is None or name in self.allowed
        return there or name in (*self.linked, self.given.bridge)

    def _fields(
        self, where: str, text: Any, problems: _Problems, words: Sequence[str] = ()
    ) -> tuple[str, ...] | None:
        """The fields of a text, if all of them can be filled."""
        if not isinstance(text, str) or not text.strip():
            problems.append((where, f"{brief(text)} is not a text. Write one, in quotes."))
            return None
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            what = f"{brief(text)} is malformed ({error}). Write {{column}}, and double other "
            problems.append((where, f"{what}braces."))
            return None
        for _, name, spec, conversion in parsed:
            if name is None:
                continue
            if not name.strip() or spec or conversion:
                what = f"{{{name}}} is not a plain field. Write a column's name alone in braces"
                problems.append((where, f"{what}, as in {{city}}."))
                return None
            if problem := self._unknown(as_field(name), words):
                problems.append((where, problem))
                return None
        return tuple(dict.fromkeys(map(as_field, template_fields(text))))

    def _unknown(self, name: str, words: Sequence[str]) -> str:
        """Why a field cannot be filled; empty if it can."""
        own = (*ENTITIES, *self.linked, *words)
        if name in own or (self.given.bridge and name in ("bridge", self.given.bridge)):
            return ""
        if name in self.hidden:
            return f"it mentions {name!r}, which no text may (untold, distractors, aliases)."
        if self.allowed is None or name in self.allowed:
            return ""
        known = [*self.linked, *filter(None, [self.given.bridge]), *self.allowed, *words]
        return (
            f"it has {{{name}}}, but there is no such column.{suggest(name, known)} Columns: "
            f"{' '.join(known)}."
        )

    def _translated(self, text: str, direction: Direction) -> str:
        """The text with the entities and the bridge under their names as spans."""
        first, second = ENTITIES if direction == "ab" else ENTITIES[::-1]
        names = {self.linked[0]: first, self.linked[1]: second}
        if self.given.bridge is not None:
            names[self.given.bridge] = "bridge"
        pieces = []
        for literal, name, _, _ in Formatter().parse(text):
            pieces.append(literal.replace("{", "{{").replace("}", "}}"))
            own = None if name is None else as_field(name)
            pieces.append("" if own is None else f"{{{names.get(own, own)}}}")
        return "".join(pieces)


def _named(where: str, given: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(where, name, text) of a list or a mapping of texts."""
    if isinstance(given, Mapping):
        for name, text in given.items():
            yield f"{where}.{name}", f"{prefix}{name}", text
    else:
        for number, text in enumerate(given):
            yield f"{where}.{number}", f"{prefix}{number + 1}", text


def _are_texts(where: str, given: Any, problems: _Problems, other: str = "or name: text") -> bool:
    """Whether a list or a mapping is given; if not, the problem is noted."""
    if isinstance(given, list | tuple | Mapping) and given:
        return True
    problems.append((where, f"{brief(given)} is not a list of texts. Write a list, {other}."))
    return False


def _told(
    given: Any, problems: _Problems
) -> Iterator[tuple[str, Direction | None, Kind, str, Any]]:
    """(where, direction, kind, name, text) of every telling text."""
    if given is None:
        return
    if not _are_texts("tell", given, problems):
        return
    groups: list[tuple[str, Direction | None, Kind, Any, str]] = []
    if not isinstance(given, Mapping):
        groups.append(("tell", None, "article", given, "tell_"))
    elif set(given) <= set(DIRECTIONS):
        for direction, inner in given.items():
            if isinstance(inner, Mapping) and set(inner) <= set(KINDS):
                groups += [
                    (f"tell.{direction}.{kind}", direction, kind, texts, f"{direction}_{kind}_")
                    for kind, texts in inner.items()
                ]
            else:
                groups.append((f"tell.{direction}", direction, "article", inner, f"{direction}_"))
    elif set(given) <= set(KINDS):
        groups += [(f"tell.{kind}", None, kind, texts, f"{kind}_") for kind, texts in given.items()]
    else:
        groups.append(("tell", None, "article", given, ""))
    for where, direction, kind, texts, prefix in groups:
        if not _are_texts(where, texts, problems):
            continue
        if wrong := _misplaced(where, texts):
            problems += wrong
            continue
        for place, name, text in _named(where, texts, prefix):
            yield place, direction, kind, name, text


def _misplaced(where: str, texts: Any) -> _Problems:
    """Of groups of texts, those that are neither directions nor kinds, or not where these are."""
    several = (list, tuple, Mapping)
    if not isinstance(texts, Mapping) or not any(isinstance(t, several) for t in texts.values()):
        return []
    place = where.rpartition(".")[2]
    if place in KINDS:
        return [(where, "groups of texts under a kind. Write directions, and kinds under them.")]
    known = (KINDS,) if place in DIRECTIONS else (DIRECTIONS, KINDS)
    there = next((words for words in known if set(words) & set(texts)), sum(known, ()))
    what = f"is not one of {' '.join(there)}, which have lists of texts."
    return [
        (where, f"{key!r} {what}{suggest(str(key), there)}") for key in texts if key not in there
    ]


def _asked(given: Any, problems: _Problems) -> Iterator[tuple[str, str, Any]]:
    """(where, name, keys of a `Question`) of every asking text."""
    if given is None:
        return
    if not _are_texts("ask", given, problems, "name: text, or name: {…}"):
        return
    for where, name, value in _named("ask", given, "" if isinstance(given, Mapping) else "ask_"):
        yield where, name, {"text": value} if isinstance(value, str) else value


def read_templates(value: Any) -> Any:
    """The content of a file of templates, of a mapping with its keys, or what was read before.

    Raises:
        ConfigError: a file that cannot be read, or with other keys.
    """
    if isinstance(value, Path) or (isinstance(value, str) and value.strip()):
        path = at_home(Path(value))
        try:
            return settings_from(TemplateSet, read_mapping(path))
        except ConfigError as error:
            lines = [f"{where}: {what}" if where else what for where, what in error.problems]
            raise ConfigError(*(("", f"{path}: {line}") for line in lines)) from None
    return value


#: A set of templates as a field of a config: a file, or its content.
Templates = Annotated[TemplateSet, BeforeValidator(read_templates)]


@cache
def shipped(name: str, entities: tuple[str, str] | None = None) -> Sentences:
    """The sentences of a YAML file in the package.

    Args:
        name: the file's, without its suffix.
        entities: the columns that the facts link, if the file does not say it.
    """
    return settings_from(TemplateSet, read_yaml(table(f"{name}.yaml"))).bound(entities)


def bound_to(templates: TemplateSet, facts: Any, hidden: Sequence[str] = ()) -> Sentences:
    """The sentences of a set for facts of a class that says which fields it links.

    Args:
        templates: the set.
        facts: the class of the facts, or a fact.
        hidden: fields that no text may mention, besides those that the class names.

    Raises:
        ConfigError: everything that is wrong with the sentences.
    """
    own = [
        (key, "it is for tables, and these facts are not one. Leave it out.")
        for key in ("bridge", "distractors", "aliases")
        if getattr(templates, key) is not None
    ]
    if own:
        raise ConfigError(*own)
    known = [field.name for field in fields(facts) if field.name not in hidden]
    with_bridge = templates
    if (bridge := getattr(facts, "BRIDGE", None)) is not None:
        with_bridge = templates.model_copy(update={"bridge": bridge})
    return with_bridge.bound(tuple(facts.ENTITIES), known)
