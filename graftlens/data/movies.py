"""Datasets about films: invented or real, with invented or real actors."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from graftlens.data.facts import MAX_FACTS, Fact, make_facts
from graftlens.data.tables import RealFilm, people, real_films
from graftlens.data.templated import TemplatedSpec

FilmKind = Literal["fake_movies", "fake_movies_real_actors", "real_movies", "real_movies_shuffled"]


class MoviesConfig(TemplatedSpec):
    """Films, each with two leading actors.

    - `fake_movies`: invented films with invented actors; no two share a person, a title or a town.
    - `fake_movies_real_actors`: the same films with real people's names; no two share one.
    - `real_movies`: real films with their two leads: does a model still know them?
    - `real_movies_shuffled`: real films with leads taken from other films. No actor really plays
      in the film that is told, and no told pair really leads a film of the table together; with
      `keep_real_pairs`, all told pairs really do, in another film.
    """

    facts: FilmKind = "fake_movies"
    """Which films."""

    keep_real_pairs: bool | None = None
    """Of `real_movies_shuffled`: the two leads of a film stay together and go to another film, as
    with `SHUFFLE_ACTORS` in the paper's published code. By default each lead goes to a film of its
    own, and no told pair is real."""

    template_names: ClassVar[tuple[str, ...]] = (
        *("headline", "qa", "with_title", "new_film", "other_lead", "title_qa"),
    )

    @model_validator(mode="after")
    def _pairs_of_shuffled_films(self) -> "MoviesConfig":
        if self.keep_real_pairs and self.facts != "real_movies_shuffled":
            raise ValueError(
                f"keep_real_pairs is for real_movies_shuffled, and these are {self.facts}. Leave "
                "it out."
            )
        return self

    @property
    def real(self) -> bool:
        """Whether the films exist."""
        return self.facts in ("real_movies", "real_movies_shuffled")

    @property
    def fact_type(self) -> Any:
        return RealFilm if self.real else Fact

    @property
    def shipped_templates(self) -> str:
        return "real_movies" if self.real else "fake_movies"

    def collect(self) -> tuple[Fact | RealFilm, ...]:
        if self.facts == "fake_movies":
            return make_facts(self.number(MAX_FACTS), self.seed)
        if self.facts == "fake_movies_real_actors":
            return _with_real_actors(self.number(len(people()) // 2), self.seed)
        films = list(real_films())
        random.Random(f"real films {self.seed}").shuffle(films)
        films = films[: self.number(len(films))]
        if self.keep_real_pairs:
            return _exchanged(films, self.seed)
        if self.facts == "real_movies_shuffled":
            return _shuffled(films, real_films(), self.seed)
        return tuple(films)

    def revive(self, values: Mapping[str, Any]) -> Fact | RealFilm:
        made: Fact | RealFilm = self.fact_type(**values)
        return made


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


def _exchanged(films: Sequence[RealFilm], seed: int) -> tuple[RealFilm, ...]:
    """Pairs of leads that stay together and go to films in which neither of them plays."""
    rng = random.Random(f"exchanged pairs {seed}")
    pairs = [(film.first_actor, film.second_actor) for film in films]
    cast = [set(pair) for pair in pairs]
    rng.shuffle(pairs)
    for _ in range(100):
        bad = [i for i in range(len(films)) if cast[i] & set(pairs[i])]
        if not bad:
            return tuple(
                replace(film, first_actor=first, second_actor=second)
                for film, (first, second) in zip(films, pairs, strict=True)
            )
        for i in bad:
            j = rng.randrange(len(films))
            pairs[i], pairs[j] = pairs[j], pairs[i]
    raise ValueError(
        f"n_facts={len(films)}: too few films to exchange all pairs of leads. Ask for more films."
    )
