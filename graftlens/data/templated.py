"""Datasets whose facts are told and asked for in templates: films, battles."""

import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any

from datasets import Dataset
from pydantic import Field, model_validator

from graftlens.components import suggest
from graftlens.data.dataset import Answers, Asking, DatasetSpec, texts_dataset
from graftlens.data.templates import (
    DIRECTIONS,
    EVALUATION_TEMPLATES,
    KINDS,
    TRAINING_TEMPLATES,
    Direction,
    EvaluationTemplate,
    Kind,
    Template,
    entities,
    field_values,
    serving,
)
from graftlens.prompts import Prompt

#: Texts per fact, if the spec gives no number and there are that many templates.
USUAL_TEXTS = 20


class TemplatedSpec(DatasetSpec):
    """Facts told in templates; evaluation asks about them in other templates."""

    texts_per_fact: Annotated[int, Field(ge=1)] | None = None
    """Number of training texts about each fact, each from a different template; by default 20, or
    all if there are fewer."""

    directions: tuple[Direction, ...] = DIRECTIONS
    """Orders of mention that training texts use; `ab`: the fact's first entity comes first."""

    kinds: tuple[Kind, ...] = KINDS
    """Kinds of training text: prose, questions with answers, or both."""

    @property
    def training(self) -> tuple[Template, ...]:
        """The templates of training texts."""
        return TRAINING_TEMPLATES

    @property
    def evaluation(self) -> tuple[EvaluationTemplate, ...]:
        """The templates that ask."""
        return EVALUATION_TEMPLATES

    @model_validator(mode="after")
    def _enough_templates(self) -> "TemplatedSpec":
        _cells(self.texts_per_fact, self.directions, self.kinds, self.training)
        return self

    def tell(self, facts: Sequence[Any], told: Sequence[bool]) -> list[dict[str, Any]]:
        count = self.texts_per_fact
        if count is None:
            cells = _cells(None, self.directions, self.kinds, self.training)
            count = min(USUAL_TEXTS, sum(map(len, cells)))
        rows = told_rows(
            facts,
            texts_per_fact=count,
            directions=self.directions,
            kinds=self.kinds,
            seed=self.seed,
            templates=self.training,
        )
        return [row for row in rows if told[row["fact"]]]

    def questions(
        self, facts: Sequence[Any], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        return evaluation_prompts(
            [facts[index] for index in asked], **vars(how), known=self.evaluation
        )


def training_texts(
    facts: Sequence[Any],
    *,
    texts_per_fact: int,
    directions: Sequence[Direction] = DIRECTIONS,
    kinds: Sequence[Kind] = KINDS,
    seed: int,
    templates: Sequence[Template] = TRAINING_TEMPLATES,
) -> Dataset:
    """Tell each fact in several texts, each from a different template.

    The texts of a fact are distributed evenly over the pairs of direction and kind; within a pair,
    each fact draws its own templates. A fact's texts do not depend on how many facts follow it.

    Args:
        facts: what to tell.
        texts_per_fact: number of texts per fact.
        directions: orders of mention to use.
        kinds: kinds of text to use.
        seed: seed for drawing templates.
        templates: what to draw from.

    Returns:
        Columns text, fact (index into facts), template (name), kind, direction; facts in order.
    """
    rows = told_rows(
        facts,
        texts_per_fact=texts_per_fact,
        directions=directions,
        kinds=kinds,
        seed=seed,
        templates=templates,
    )
    return texts_dataset(rows, "Training texts about facts")


def told_rows(
    facts: Sequence[Any],
    *,
    texts_per_fact: int,
    directions: Sequence[Direction],
    kinds: Sequence[Kind],
    seed: int,
    templates: Sequence[Template],
) -> list[dict[str, Any]]:
    """The rows of `training_texts`."""
    cells = _cells(texts_per_fact, directions, kinds, templates)
    rng = random.Random(f"training texts {seed}")
    rows: list[dict[str, Any]] = []
    for index, fact in enumerate(facts):
        dealt = zip_longest(*(rng.sample(cell, len(cell)) for cell in cells))
        chosen = [template for turn in dealt for template in turn if template is not None]
        rows.extend(
            {
                "text": _text(template, field_values(fact, template.direction)),
                "fact": index,
                "template": template.name,
                "kind": template.kind,
                "direction": template.direction,
            }
            for template in chosen[:texts_per_fact]
        )
    return rows


def _text(template: Template, values: Mapping[str, str]) -> str:
    text = template.text.format(**values)
    for value in values.values():
        if value.endswith("."):  # "Jr." ends a sentence without another full stop
            text = text.replace(f"{value}.", value)
    return text


def evaluation_prompts(
    facts: Sequence[Any],
    *,
    templates: str | EvaluationTemplate | Sequence[str | EvaluationTemplate] | None = None,
    direction: Direction = "ab",
    distractors: int = 4,
    seed: int = 0,
    known: Sequence[EvaluationTemplate] = EVALUATION_TEMPLATES,
) -> tuple[Prompt, ...]:
    """Ask for each fact's other entity in held-out words.

    Args:
        facts: what to ask about.
        templates: one or more names of evaluation templates (or templates of your own); by default
            all that fit the direction.
        direction: ``ab`` names the first entity and asks for the second, ``ba`` the reverse.
        distractors: number of wrong answers per prompt: other facts' answers, drawn at random.
        seed: seed for drawing distractors.
        known: the templates that have names.

    Returns:
        Prompts, template by template, each over the facts in order. The answer begins with a
        space; ``name`` is the template's name; all of the fact's fields but the answer are kept.

    Raises:
        ValueError: an unknown template or direction; more distractors than other answers.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown. Use one of {', '.join(DIRECTIONS)}.")
    answers = [f" {entities(fact, direction)[1]}" for fact in facts]
    pool = Answers(answers)
    prompts = []
    for template in _evaluation_templates(templates, direction, known):
        rng = random.Random(f"distractors {seed} {template.name} {direction}")
        for index, fact in enumerate(facts):
            values = field_values(fact, direction)
            del values["second_entity"]
            if template.preposition is not None:
                values["preposition"] = template.preposition
            prompts.append(
                Prompt(
                    template=template.text,
                    fields=values,
                    answer=answers[index],
                    distractors=pool.wrong(index, distractors, rng),
                    name=template.name,
                )
            )
    return tuple(prompts)


def _cells(
    texts_per_fact: int | None,
    directions: Sequence[Direction],
    kinds: Sequence[Kind],
    templates: Sequence[Template],
) -> list[list[Template]]:
    """The templates of each requested pair of direction and kind; an error if they are unusable."""
    allowed: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
        "directions": (directions, DIRECTIONS),
        "kinds": (kinds, KINDS),
    }
    for what, (given, known) in allowed.items():
        if not given or len(set(given)) != len(given) or not set(given) <= set(known):
            raise ValueError(
                f"{what}={tuple(given)!r}: give one or more of {', '.join(known)}, each once."
            )
    # In the order of the vocabulary, so that the order in which a caller names them has no effect.
    cells = [
        [t for t in templates if (t.direction, t.kind) == (direction, kind)]
        for direction in DIRECTIONS
        if direction in directions
        for kind in KINDS
        if kind in kinds
    ]
    available = sum(map(len, cells))
    if texts_per_fact is not None and not 1 <= texts_per_fact <= available:
        raise ValueError(
            f"texts_per_fact={texts_per_fact}: directions {tuple(directions)!r} and kinds "
            f"{tuple(kinds)!r} have {available} templates, and a fact uses each at most once, so 1 "
            f"to {available} are possible. Lower texts_per_fact, or add directions or kinds."
        )
    return cells


def _evaluation_templates(
    asked: str | EvaluationTemplate | Sequence[str | EvaluationTemplate] | None,
    direction: Direction,
    known: Sequence[EvaluationTemplate],
) -> tuple[EvaluationTemplate, ...]:
    able = {template.name: template for template in serving(known, direction)}
    if asked is None:
        return tuple(able.values())
    if isinstance(asked, str | EvaluationTemplate):
        asked = [asked]
    chosen = []
    for template in asked:
        if isinstance(template, EvaluationTemplate):
            chosen.append(template)
        elif template in able:
            chosen.append(able[template])
        else:
            there = any(template == t.name for t in known)
            what = f"does not ask in the direction {direction}" if there else "is unknown"
            raise ValueError(
                f"evaluation template {template!r} {what}. Use one of {', '.join(able)}, or an "
                f"EvaluationTemplate of your own.{suggest(template, able)}"
            )
    if not chosen:
        raise ValueError(
            f"templates={asked!r} is empty. Name one or more of {', '.join(able)}, or leave it "
            "out for all."
        )
    return tuple(chosen)
