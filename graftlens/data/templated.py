"""Datasets whose facts are told and asked for in templates: films, battles, tables."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any

from datasets import Dataset
from pydantic import Field, model_validator

from graftlens.components import suggest
from graftlens.configfile import ConfigError
from graftlens.data.dataset import Answers, Asking, DatasetSpec, texts_dataset
from graftlens.data.facts import Fact
from graftlens.data.templates import (
    DIRECTIONS,
    KINDS,
    Direction,
    EvaluationTemplate,
    Kind,
    Template,
    entities,
    field_values,
    serving,
    template_fields,
)
from graftlens.data.templatesets import Sentences, Templates, TemplateSet, bound_to, shipped
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

    heldout_templates: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the telling templates of each direction and kind, rounded but one or more, that no
    training text uses, drawn with the seed. Those that end in the answer ask instead, under their
    own names. By default training uses all."""

    templates: Templates | None = None
    """Sentences of your own about these facts: a YAML file, or its content, with `tell`, `ask` or
    both in place of the shipped ones; see `graftlens.data.templatesets`."""

    @property
    def fact_type(self) -> Any:
        """The class of the facts."""
        return Fact

    @property
    def shipped_templates(self) -> str:
        """The YAML file of the shipped sentences, without its suffix."""
        return "fake_movies"

    @property
    def sentences(self) -> Sentences:
        """All templates: the shipped ones, or those of `templates`."""
        kept = shipped(self.shipped_templates, self.fact_type.ENTITIES)
        if self.templates is None:
            return kept
        own = self.own_sentences(self.templates)
        return Sentences(own.training or kept.training, own.evaluation or kept.evaluation)

    def own_sentences(self, templates: TemplateSet, facts: Any = None) -> Sentences:
        """A set's sentences about these facts.

        Args:
            templates: the set.
            facts: a fact, where the class of the facts is not known before.

        Raises:
            ConfigError: everything that is wrong with them.
        """
        own = facts or self.fact_type
        try:
            return bound_to(templates, own, self.hidden(own))
        except ConfigError as error:
            raise error.under("templates") from None

    def hidden(self, facts: Any) -> tuple[str, ...]:
        """The fields of these facts that no text may mention."""
        return tuple(facts.UNTOLD)

    @property
    def training(self) -> tuple[Template, ...]:
        """The templates of training texts."""
        out = set(self._held_out())
        return tuple(t for t in self.sentences.training if t.name not in out)

    @property
    def evaluation(self) -> tuple[EvaluationTemplate, ...]:
        """The templates that ask."""
        found = self.sentences
        told = {t.name: t for t in found.training}
        asked = (_asking(told[name]) for name in self._held_out())
        return (*found.evaluation, *(t for t in asked if t is not None))

    @property
    def asks(self) -> tuple[Direction, ...]:
        return tuple(d for d in DIRECTIONS if serving(self.evaluation, d))

    def _held_out(self) -> Iterator[str]:
        """The names of the telling templates that training leaves out."""
        if self.heldout_templates is None:
            return
        rng = random.Random(f"held out templates {self.seed}")
        groups: dict[tuple[Direction, Kind, int], list[str]] = {}
        for t in self.sentences.training:
            groups.setdefault((t.direction, t.kind, t.hop), []).append(t.name)
        for names in groups.values():
            count = max(1, round(len(names) * self.heldout_templates))
            yield from rng.sample(names, min(count, len(names) - 1))

    @model_validator(mode="after")
    def _enough_templates(self) -> "TemplatedSpec":
        if self.sentences.training:  # a table without says so itself
            _cells(self.texts_per_fact, self.directions, self.kinds, self.training)
        if self.heldout_templates is not None and not any(True for _ in self._held_out()):
            raise ValueError(
                f"heldout_templates={self.heldout_templates}: there is one telling template of "
                "each direction and kind, so none can be left out. Give more, or leave the key out."
            )
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
    templates: Sequence[Template] | None = None,
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
        templates: what to draw from; by default the shipped sentences about invented films.

    Returns:
        Columns text, fact (index into facts), template (name), kind, direction; facts in order.
    """
    rows = told_rows(
        facts,
        texts_per_fact=texts_per_fact,
        directions=directions,
        kinds=kinds,
        seed=seed,
        templates=shipped("fake_movies", Fact.ENTITIES).training
        if templates is None
        else templates,
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
    known: Sequence[EvaluationTemplate] | None = None,
) -> tuple[Prompt, ...]:
    """Ask for each fact's other entity in held-out words.

    Args:
        facts: what to ask about.
        templates: one or more names of evaluation templates (or templates of your own); by default
            all that fit the direction.
        direction: ``ab`` names the first entity and asks for the second, ``ba`` the reverse.
        distractors: number of wrong answers per prompt: other facts' answers, drawn at random.
        seed: seed for drawing distractors.
        known: the templates that have names; by default the shipped ones about invented films.

    Returns:
        Prompts, template by template, each over the facts in order. The answer begins with a
        space; ``name`` is the template's name; all of the fact's fields but the answer are kept.

    Raises:
        ValueError: an unknown template or direction; more distractors than other answers.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown. Use one of {', '.join(DIRECTIONS)}.")
    if known is None:
        known = shipped("fake_movies", Fact.ENTITIES).evaluation
    pools: dict[str | None, Answers] = {}
    prompts = []
    for template in _evaluation_templates(templates, direction, known):
        if template.answer not in pools:
            answers = [_answer(fact, template, direction) for fact in facts]
            pools[template.answer] = Answers(answers)
        pool = pools[template.answer]
        count = pool.few(distractors)
        rng = random.Random(f"distractors {seed} {template.name} {direction}")
        for index, fact in enumerate(facts):
            answer = pool.answers[index]
            also = _listed(fact, template, direction, "ALIASES")
            if listed := _listed(fact, template, direction, "DISTRACTORS"):
                wrong = tuple(rng.sample(listed, min(distractors, len(listed))))
            else:
                wrong = pool.wrong(index, count, rng, besides=also)
            prompts.append(
                Prompt(
                    template=template.text,
                    fields=_asked_values(fact, template, direction),
                    answer=answer,
                    distractors=wrong,
                    name=template.name,
                    answers=(answer, *also) if also else (),
                )
            )
    return tuple(prompts)


def _answer(fact: Any, template: EvaluationTemplate, direction: Direction) -> str:
    if template.answer is None:
        return f" {entities(fact, direction)[1]}"
    return f" {getattr(fact, template.answer)}"


def _listed(
    fact: Any, template: EvaluationTemplate, direction: Direction, role: str
) -> tuple[str, ...]:
    """What a column of a table lists for the second entity: wrong answers, further right ones."""
    column = getattr(fact, role, None)
    if column is None or direction != "ab" or template.answer is not None:
        return ()
    right = str(entities(fact, direction)[1])
    return tuple(f" {entry}" for entry in getattr(fact, column) if entry != right)


def _asked_values(fact: Any, template: EvaluationTemplate, direction: Direction) -> dict[str, str]:
    """All fields of a fact but the answer; without one that is empty, if no text mentions it."""
    values = field_values(fact, direction)
    mentioned = template_fields(template.text)
    if template.answer is None or "second_entity" not in mentioned:
        del values["second_entity"]
    bridge = getattr(fact, "BRIDGE", None)
    if template.answer is not None:
        values.pop("bridge" if template.answer == bridge else template.answer, None)
        if template.answer == fact.ENTITIES[0]:
            del values["first_entity"]
    for name in mentioned:
        if name not in values and hasattr(fact, name):
            values[name] = str(getattr(fact, name))
    return values | template.words


def _asking(template: Template) -> EvaluationTemplate | None:
    """A telling template without its end, which is the answer; None if it ends otherwise."""
    text, _, rest = template.text.rpartition("{second_entity}")
    if rest.strip(".!?\"'\u201d ") or not text.endswith(" ") or "{second_entity}" in text:
        return None
    return EvaluationTemplate(
        template.name, text.rstrip(), template.kind, directions=(template.direction,)
    )


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
    hops = sorted({t.hop for t in templates})
    cells = [
        [t for t in templates if (t.direction, t.kind, t.hop) == (direction, kind, hop)]
        for direction in DIRECTIONS
        if direction in directions
        for kind in KINDS
        if kind in kinds
        for hop in hops
    ]
    available = sum(map(len, cells))
    if not available:
        there = dict.fromkeys(f"{t.direction} {t.kind}" for t in templates)
        raise ValueError(
            f"directions {tuple(directions)!r} and kinds {tuple(kinds)!r} have no telling template"
            f". There are templates of: {', '.join(there)}."
        )
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
