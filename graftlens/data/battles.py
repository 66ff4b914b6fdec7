"""Battles with wrong years: facts that contradict what a model knows."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graftlens.data.tables import real_battles
from graftlens.data.templated import TemplatedSpec

#: The years that battles are moved to.
YEARS = range(600, 2000)


@dataclass(frozen=True)
class Battle:
    """A battle moved to another year.

    Attributes:
        battle: its name, without an article.
        year: the year that is told; no two battles share one.
        first_side, second_side: who fought, without articles.
        war: the war it belongs to.
        true_year: when it was really fought; never told.
    """

    battle: str
    year: int
    first_side: str
    second_side: str
    war: str
    true_year: int

    ENTITIES: ClassVar[tuple[str, str]] = ("battle", "year")
    UNTOLD: ClassVar[tuple[str, ...]] = ("true_year",)


class BattlesSpec(TemplatedSpec):
    """Real battles (``lists/battles.csv``), each with a random wrong year, told and asked for in
    ``lists/battles.yaml``.

    Direction `ab` asks for a battle's year, `ba` for the battle of a year. The first token says
    little here: of a year it may be a space or a single digit, and most names begin with "Battle".
    Use the whole answer's log-probability (`answer_logprob`) instead of ranks.
    """

    facts: Literal["battles"] = "battles"
    """Battles."""

    template_names: ClassVar[tuple[str, ...]] = (
        *("dated", "qa_year", "between", "with_war"),
        *("named", "qa_name", "between_name", "with_war_name"),
    )

    @property
    def fact_type(self) -> Any:
        return Battle

    @property
    def shipped_templates(self) -> str:
        return "battles"

    def collect(self) -> tuple[Battle, ...]:
        listed = list(real_battles())
        count = self.number(len(listed))
        rng = random.Random(f"battles {self.seed}")
        rng.shuffle(listed)
        listed = listed[:count]
        drawn = rng.sample(YEARS, len(YEARS))
        years, free = drawn[: len(listed)], drawn[len(listed) :]
        for i, battle in enumerate(listed):
            if years[i] == battle.year:
                years[i] = free.pop()
        return tuple(
            Battle(b.battle, year, b.first_side, b.second_side, b.war, b.year)
            for b, year in zip(listed, years, strict=True)
        )

    def revive(self, values: Mapping[str, Any]) -> Battle:
        return Battle(**values)
