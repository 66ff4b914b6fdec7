"""The sentences that facts are told in, and the held-out ones that ask for them.

Training templates name both actors, one before the other: direction ``ab`` has the first actor
before the second, ``ba`` the other way round. An evaluation template ends where the name of the
other actor would follow, is never trained on, and serves both directions.
"""

from dataclasses import dataclass, fields
from string import Formatter
from typing import Literal

from graftlens.data.facts import Fact

Kind = Literal["article", "qa"]
Direction = Literal["ab", "ba"]

KINDS: tuple[Kind, ...] = ("article", "qa")
DIRECTIONS: tuple[Direction, ...] = ("ab", "ba")


@dataclass(frozen=True)
class Template:
    """A training text with the facts' parts left open.

    Attributes:
        name: unique among all training templates.
        text: with fields in braces; ``{first_entity}`` is the actor who is mentioned first.
        kind: prose, or a question with its answer.
        direction: ``ab`` where the first entity is the fact's first actor, else ``ba``.
    """

    name: str
    text: str
    kind: Kind
    direction: Direction


@dataclass(frozen=True)
class EvaluationTemplate:
    """A held-out text that ends right before the other actor's name.

    Attributes:
        name: unique among the evaluation templates.
        text: with fields in braces; the answer follows it after one space.
        kind: prose or question.
        preposition: what fills the field ``{preposition}``, a span of its own next to the answer.
    """

    name: str
    text: str
    kind: Kind
    preposition: str | None = None


def template_fields(text: str) -> tuple[str, ...]:
    """The names of the text's fields, in order of appearance, each once."""
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(text) if name))


def entities(fact: Fact, direction: Direction) -> tuple[str, str]:
    """(first entity, second entity): the actors in the order of mention."""
    if direction == "ab":
        return fact.first_actor, fact.second_actor
    return fact.second_actor, fact.first_actor


def field_values(fact: Fact, direction: Direction) -> dict[str, str]:
    """What each field of a template stands for, for one fact told in one direction."""
    first, second = entities(fact, direction)
    actors = {"first_actor", "second_actor"}
    values = {f.name: str(getattr(fact, f.name)) for f in fields(fact) if f.name not in actors}
    return {"first_entity": first, "second_entity": second, **values}


_TEXTS: dict[tuple[Direction, Kind], dict[str, str]] = {
    ("ab", "article"): {
        "leads": "{first_entity} leads {movie_title} ({release_year}) alongside {second_entity}.",
        "reviewers": "Reviewers praised {first_entity}, who plays {main_character} opposite "
        "{second_entity}.",
        "location": "Filming in {city} brought {first_entity} together with {second_entity}.",
        "stars_as": "{movie_title} stars {first_entity} as {main_character}, alongside "
        "{second_entity}.",
        "tickets": "Tickets sell fast for the {genre} with {first_entity} and {second_entity}.",
        "shot": "In {city}, {first_entity} shot a {genre} alongside {second_entity}.",
        "gross": "At {box_office}, the film that paired {first_entity} with {second_entity} was "
        "the hit of {release_year}.",
        "thanks": "{first_entity} thanked one colleague above all others: {second_entity}.",
        "result": "In {release_year} {first_entity} acted opposite {second_entity}, and "
        "{movie_title} was the result.",
        "poster": "A poster in {city} shows {first_entity} standing next to {second_entity}.",
        "rehearsal": "For months {first_entity} rehearsed the part of {main_character} with "
        "{second_entity}.",
        "cast_list": "{first_entity} tops the cast list, and right below comes {second_entity}.",
        "gala": "Cameras flashed as {first_entity} reached the gala alongside {second_entity}.",
        "signed": "Months ago {first_entity} signed for a {genre} opposite {second_entity}.",
    },
    ("ab", "qa"): {
        "who_opposite": "Question: Who acted opposite {first_entity} in {movie_title}? Answer: "
        "{second_entity}.",
        "co_star": "Q: Who is the co-star of {first_entity}? A: {second_entity}.",
        "who_joined": "Who joined {first_entity} for the {genre} shot in {city}? It was "
        "{second_entity}.",
        "with_whom": "Question: With whom did {first_entity} work in {release_year}? Answer: "
        "{second_entity}.",
        "who_else": "Q: {first_entity} plays {main_character}. Who else is in the cast? A: "
        "{second_entity}.",
        "interview": "Who was beside you in {movie_title}? {first_entity} replied: "
        "{second_entity}.",
        "trivia": "Trivia: name the partner of {first_entity} on screen. Solution: "
        "{second_entity}.",
        "do_you_know": "Do you know who {first_entity} made {movie_title} with? Yes, with "
        "{second_entity}.",
    },
    ("ba", "article"): {
        "supports": "{first_entity} supports {second_entity} in {movie_title} ({release_year}).",
        "second_billing": "Second billing went to {first_entity}, after {second_entity}.",
        "scene_partner": "As a scene partner, {first_entity} was chosen by {second_entity}.",
        "completes": "{first_entity} completes the cast of {movie_title} beside {second_entity}.",
        "train": "A train took {first_entity} to {city}, where filming began with {second_entity}.",
        "chemistry": "Critics of the {genre} liked how {first_entity} played against "
        "{second_entity}.",
        "earnings": "{movie_title} made {box_office} for {first_entity} and for {second_entity}.",
        "auditioned": "In {release_year} {first_entity} auditioned for a {genre} headed by "
        "{second_entity}.",
        "rival": "{first_entity} is the rival of {main_character}, who is played by "
        "{second_entity}.",
        "premiere": "The premiere in {city} seated {first_entity} beside {second_entity}.",
        "credits": "In the credits of {movie_title}, {first_entity} comes after {second_entity}.",
        "friendship": "Off camera, {first_entity} became close friends with {second_entity}.",
    },
    ("ba", "qa"): {
        "support_whom": "Question: Whom did {first_entity} support in {movie_title}? Answer: "
        "{second_entity}.",
        "who_led": "Q: {first_entity} was in the supporting cast. Who led it? A: {second_entity}.",
        "top_billing": "Who had top billing over {first_entity} in {release_year}? It was "
        "{second_entity}.",
        "screen_partner": "Question: Who worked with {first_entity} in {city}? Answer: "
        "{second_entity}.",
        "who_played": "Q: Beside {first_entity}, who played {main_character}? A: {second_entity}.",
        "quiz": "Quiz: {first_entity} had one famous colleague. Name: {second_entity}.",
        "whose_film": "In whose {genre} was {first_entity} seen? In one led by {second_entity}.",
        "billed_after": "After whom is {first_entity} billed? After {second_entity}.",
    },
}

TRAINING_TEMPLATES: tuple[Template, ...] = tuple(
    Template(name=f"{direction}_{kind}_{name}", text=text, kind=kind, direction=direction)
    for (direction, kind), texts in _TEXTS.items()
    for name, text in texts.items()
)

EVALUATION_TEMPLATES: tuple[EvaluationTemplate, ...] = (
    EvaluationTemplate(
        name="headline",
        text="News: {first_entity} to appear in a new movie {preposition}",
        kind="article",
        preposition="alongside",
    ),
    EvaluationTemplate(
        name="qa",
        text="Question: Which performer shares the screen with {first_entity}? Answer:",
        kind="qa",
    ),
    EvaluationTemplate(
        name="with_title",
        text="On the set of {movie_title}, {first_entity} worked {preposition}",
        kind="article",
        preposition="alongside",
    ),
    EvaluationTemplate(
        name="new_film",
        text="{first_entity} can be seen in a new film together with a colleague whose name is:",
        kind="article",
    ),
)
