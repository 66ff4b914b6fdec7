"""The sentences that tell facts, and the held-out ones that ask for them.

Training templates name both entities, one before the other: direction ``ab`` has the fact's first
entity before the second, ``ba`` the other way round. An evaluation template ends where the other
entity would follow, and is never trained on.

The shipped sentences are YAML files in ``lists``; `graftlens.data.templatesets` reads them, and
yours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from string import Formatter
from typing import Any, Literal

Kind = Literal["article", "qa"]
Direction = Literal["ab", "ba"]

KINDS: tuple[Kind, ...] = ("article", "qa")
DIRECTIONS: tuple[Direction, ...] = ("ab", "ba")

#: Fields of an evaluation template that it fills itself: each is a span.
WORDS = ("preposition", "relation", "relation_preposition")


@dataclass(frozen=True)
class Template:
    """A training text with placeholders for the parts of a fact.

    Attributes:
        name: unique among all training templates.
        text: with fields in braces; ``{first_entity}`` is the entity that is mentioned first.
        kind: prose, or a question with its answer.
        direction: ``ab`` where the first entity is the fact's first one, else ``ba``.
        hop: of a fact with a bridge, which of its two hops the text tells (1 or 2); else 0.
    """

    name: str
    text: str
    kind: Kind
    direction: Direction
    hop: int = 0


@dataclass(frozen=True)
class EvaluationTemplate:
    """A held-out text that ends right before the other entity.

    Attributes:
        name: unique among the evaluation templates.
        text: with fields in braces; the answer follows it after one space.
        kind: prose or question.
        preposition: what fills the field ``{preposition}``, which is a span of its own.
        directions: those that the template can ask in.
        relation, relation_preposition: likewise ``{relation}`` and ``{relation_preposition}``, the
            paper's R and RP ("stars", "in").
        answer: the column that it asks for, if that is not the other entity.
    """

    name: str
    text: str
    kind: Kind
    preposition: str | None = None
    directions: tuple[Direction, ...] = DIRECTIONS
    relation: str | None = None
    relation_preposition: str | None = None
    answer: str | None = None

    @property
    def words(self) -> dict[str, str]:
        """The fields that it fills itself."""
        return {name: word for name in WORDS if (word := getattr(self, name)) is not None}


def template_fields(text: str) -> tuple[str, ...]:
    """The names of the text's fields, in order of appearance, each once."""
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(text) if name))


def entities(fact: Any, direction: Direction) -> tuple[str, str]:
    """(first entity, second entity) in the order of mention; a fact's class says which fields these
    are."""
    first, second = (str(getattr(fact, name)) for name in fact.ENTITIES)
    return (first, second) if direction == "ab" else (second, first)


def field_values(fact: Any, direction: Direction) -> dict[str, str]:
    """The value of each field of a template, for one fact told in one direction."""
    first, second = entities(fact, direction)
    apart = {*fact.ENTITIES, *fact.UNTOLD}
    values = {f.name: str(getattr(fact, f.name)) for f in fields(fact) if f.name not in apart}
    if (bridge := getattr(fact, "BRIDGE", None)) is not None:
        values["bridge"] = values.pop(bridge)
    return {"first_entity": first, "second_entity": second, **values}


def named_templates(texts: dict[tuple[Direction, Kind], dict[str, str]]) -> tuple[Template, ...]:
    """Training templates, named by direction and kind."""
    return tuple(
        Template(name=f"{direction}_{kind}_{name}", text=text, kind=kind, direction=direction)
        for (direction, kind), named in texts.items()
        for name, text in named.items()
    )


def serving(
    templates: Sequence[EvaluationTemplate], direction: Direction
) -> tuple[EvaluationTemplate, ...]:
    """The templates that can ask in a direction."""
    return tuple(t for t in templates if direction in t.directions)
