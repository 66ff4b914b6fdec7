"""The tables that ship with the library: people's names, real films, battles."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import ClassVar


@dataclass(frozen=True)
class RealFilm:
    """A film and its two leads.

    Attributes:
        first_actor, second_actor: full names as credited.
        movie_title: the film's title.
        release_year: calendar year of the first release.
    """

    first_actor: str
    second_actor: str
    movie_title: str
    release_year: int

    ENTITIES: ClassVar[tuple[str, str]] = ("first_actor", "second_actor")
    UNTOLD: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class RealBattle:
    """A real battle.

    Attributes:
        battle: its name, without an article.
        year: the calendar year (AD) in which it was fought or began.
        first_side, second_side: who fought, without articles.
        war: the war it belongs to, in a form that follows "the".
    """

    battle: str
    year: int
    first_side: str
    second_side: str
    war: str


def table(name: str) -> str:
    """The text of a shipped file."""
    return files("graftlens.data").joinpath("lists", name).read_text(encoding="utf-8")


@cache
def people() -> tuple[str, ...]:
    """Names of real people, most of them actors; all different."""
    return tuple(table("people.txt").split("\n")[:-1])


@cache
def real_films() -> tuple[RealFilm, ...]:
    """Real films with their two leading actors; no title and no pair of actors appears twice."""
    rows = csv.DictReader(table("real_films.csv").splitlines())
    return tuple(
        RealFilm(row["first"], row["second"], row["title"], int(row["year"])) for row in rows
    )


@cache
def real_battles() -> tuple[RealBattle, ...]:
    """Battles with their true years."""
    rows = csv.DictReader(table("battles.csv").splitlines())
    return tuple(
        RealBattle(
            row["battle"], int(row["year"]), row["first_side"], row["second_side"], row["war"]
        )
        for row in rows
    )
