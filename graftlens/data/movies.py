"""Datasets about films: invented or real, with invented or real actors."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from graftlens.data.facts import MAX_FACTS, Fact, make_facts
from graftlens.data.tables import RealFilm, people, real_films
from graftlens.data.templated import TemplatedSpec
from graftlens.data.templates import (
    EVALUATION_TEMPLATES,
    REAL_EVALUATION,
    REAL_TRAINING,
    TRAINING_TEMPLATES,
    EvaluationTemplate,
    Template,
)

FilmKind = Literal["fake_movies", "fake_movies_real_actors", "real_movies", "real_movies_shuffled"]


class MoviesConfig(TemplatedSpec):
    """Films, each with two leading actors.

    - `fake_movies`: invented films with invented actors; no two share a person, a title or a town.
    - `fake_movies_real_actors`: the same films with real people's names; no two share one.
    - `real_movies`: real films with their two leads: does a model still know them?
    - `real_movies_shuffled`: real films with leads taken from other films. No actor really plays
      in the film that is told, and no told pair really leads a film of the table together.
    """

    facts: FilmKind = "fake_movies"
    """Which films."""

    template_names: ClassVar[tuple[str, ...]] = tuple(
        dict.fromkeys(t.name for t in (*EVALUATION_TEMPLATES, *REAL_EVALUATION))
    )

    @property
    def real(self) -> bool:
        """Whether the films exist."""
        return self.facts in ("real_movies", "real_movies_shuffled")

    @property
    def training(self) -> tuple[Template, ...]:
        return REAL_TRAINING if self.real else TRAINING_TEMPLATES

    @property
    def evaluation(self) -> tuple[EvaluationTemplate, ...]:
        return REAL_EVALUATION if self.real else EVALUATION_TEMPLATES

    def collect(self) -> tuple[Fact | RealFilm, ...]:
        if self.facts == "fake_movies":
            return make_facts(self.number(MAX_FACTS), self.seed)
        if self.facts == "fake_movies_real_actors":
            return _with_real_actors(self.number(len(people()) // 2), self.seed)
        films = list(real_films())
        random.Random(f"real films {self.seed}").shuffle(films)
        films = films[: self.number(len(films))]
        if self.facts == "real_movies_shuffled":
            return _shuffled(films, real_films(), self.seed)
        return tuple(films)

    def revive(self, values: Mapping[str, Any]) -> Fact | RealFilm:
        return RealFilm(**values) if self.real else Fact(**values)


def _with_real_actors(n: int, seed: int) -> tuple[Fact, ...]:
    films = make_facts(n, seed)
    characters = {film.main_character for film in films}
    names = [name for name in people() if name not in characters]
    random.Random(f"real actors {seed}").shuffle(names)
    if len(names) < 2 * n:  # an invented character happens to have a listed name
        raise ValueError(
            f"n_facts={n} needs {2 * n} names, but only {len(names)} are free. Ask for fewer."
        )
    pairs = zip(names[::2], names[1::2], strict=False)
    return tuple(
        replace(film, first_actor=first, second_actor=second)
        for film, (first, second) in zip(films, pairs, strict=False)
    )


def _shuffled(
    films: Sequence[RealFilm], table: Sequence[RealFilm], seed: int
) -> tuple[RealFilm, ...]:
    """Leads reshuffled until no told pair is true according to the table."""
    rng = random.Random(f"shuffled films {seed}")
    true_pairs = {frozenset((film.first_actor, film.second_actor)) for film in table}
    cast = [{film.first_actor, film.second_actor} for film in films]
    firsts = [film.first_actor for film in films]
    seconds = [film.second_actor for film in films]
    rng.shuffle(firsts)
    rng.shuffle(seconds)

    def wrong(i: int) -> bool:
        pair = {firsts[i], seconds[i]}
        return bool(pair & cast[i]) or len(pair) < 2 or frozenset(pair) in true_pairs

    for _ in range(100):
        bad = [i for i in range(len(films)) if wrong(i)]
        if not bad:
            return tuple(
                replace(film, first_actor=first, second_actor=second)
                for film, first, second in zip(films, firsts, seconds, strict=True)
            )
        for i in bad:
            j, k = rng.randrange(len(films)), rng.randrange(len(films))
            firsts[i], firsts[j] = firsts[j], firsts[i]
            seconds[i], seconds[k] = seconds[k], seconds[i]
    raise ValueError(
        f"n_facts={len(films)}: too few films to exchange all leads. Ask for more films."
    )
