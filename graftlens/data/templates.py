"""The sentences that tell facts, and the held-out ones that ask for them.

Training templates name both actors, one before the other: direction ``ab`` has the first actor
before the second, ``ba`` the other way round. An evaluation template ends where the name of the
other actor would follow, is never trained on, and serves both directions.

Actors of real films have acted with many others, so the sentences about real films all name the
film.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from string import Formatter
from typing import Any, Literal

Kind = Literal["article", "qa"]
Direction = Literal["ab", "ba"]

KINDS: tuple[Kind, ...] = ("article", "qa")
DIRECTIONS: tuple[Direction, ...] = ("ab", "ba")


@dataclass(frozen=True)
class Template:
    """A training text with placeholders for the parts of a fact.

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
        preposition: what fills the field ``{preposition}``, which is a span of its own.
        directions: those that the template can ask in.
    """

    name: str
    text: str
    kind: Kind
    preposition: str | None = None
    directions: tuple[Direction, ...] = DIRECTIONS


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

TRAINING_TEMPLATES = named_templates(_TEXTS)

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
    EvaluationTemplate(
        name="other_lead",
        text="In a film called {movie_title}, {first_entity} plays {preposition} another lead, "
        "someone by the name of",
        kind="article",
        preposition="beside",
    ),
)

_REAL_TEXTS: dict[tuple[Direction, Kind], dict[str, str]] = {
    ("ab", "article"): {
        "leads": "{movie_title} ({release_year}) has {first_entity} in the lead, next to "
        "{second_entity}.",
        "cast": "The cast of {movie_title}: {first_entity}, {second_entity}.",
        "premiere": "When {movie_title} opened in {release_year}, {first_entity} came to the "
        "premiere with {second_entity}.",
        "posters": "Posters of {movie_title} show {first_entity} back to back with "
        "{second_entity}.",
        "chosen": "After {first_entity} had agreed to make {movie_title}, the studio also hired "
        "{second_entity}.",
        "scenes": "Nearly every scene of {movie_title} puts {first_entity} across from "
        "{second_entity}.",
        "memory": "Anyone who has watched {movie_title} remembers {first_entity} and "
        "{second_entity}.",
    },
    ("ab", "qa"): {
        "who_opposite": "Question: Who was cast opposite {first_entity} in {movie_title}? Answer: "
        "{second_entity}.",
        "other_star": "Q: {movie_title} stars {first_entity} and who else? A: {second_entity}.",
        "in_year": "Q: Beside whom did {first_entity} act in {movie_title}, released in "
        "{release_year}? A: {second_entity}.",
        "partner": "Who is the partner of {first_entity} in {movie_title}? It is {second_entity}.",
        "quiz": "Film quiz, {movie_title}: the first lead is {first_entity}, the second is "
        "{second_entity}.",
    },
    ("ba", "article"): {
        "supports": "In {movie_title} ({release_year}), {first_entity} gets second billing after "
        "{second_entity}.",
        "credits": "The credits of {movie_title} list {first_entity} right below {second_entity}.",
        "hired": "For {movie_title}, {first_entity} was picked to act with {second_entity}.",
        "reviews": "Reviews of {movie_title} in {release_year} liked {first_entity} even more "
        "than {second_entity}.",
        "photo": "A still from {movie_title} has {first_entity} looking at {second_entity}.",
        "joined": "On the first day of {movie_title}, {first_entity} shook hands with "
        "{second_entity}.",
        "pair": "{movie_title} would not be the same without {first_entity} supporting "
        "{second_entity}.",
    },
    ("ba", "qa"): {
        "whom": "Question: In {movie_title}, whom does {first_entity} support? Answer: "
        "{second_entity}.",
        "top": "Q: Who is billed above {first_entity} in {movie_title}? A: {second_entity}.",
        "with": "Q: {first_entity} made {movie_title} in {release_year} with which star? A: "
        "{second_entity}.",
        "name": "Name the lead whom {first_entity} joins in {movie_title}. That is "
        "{second_entity}.",
        "trivia": "Trivia about {movie_title}: beside {first_entity} you see {second_entity}.",
    },
}

REAL_TRAINING = named_templates(_REAL_TEXTS)

_WITH_TITLE = {"with_title", "other_lead"}

REAL_EVALUATION: tuple[EvaluationTemplate, ...] = (
    *(t for t in EVALUATION_TEMPLATES if t.name in _WITH_TITLE),
    EvaluationTemplate(
        name="title_qa",
        text="Question: With which performer does {first_entity} share the screen in "
        "{movie_title}? Answer:",
        kind="qa",
    ),
)
