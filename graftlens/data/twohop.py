"""Facts of two hops: a person acts in a film, and the film has a director.

No text tells both hops, so a question from the person to the director needs two lookups, with the
film between them as the span `bridge` wherever a text names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graftlens.data.facts import MAX_FACTS, make_facts
from graftlens.data.templated import TemplatedSpec


@dataclass(frozen=True)
class Chain:
    """One chain of two hops.

    Attributes:
        person: an invented actor.
        film: the invented film in which the actor plays.
        director: the invented director of the film.
    """

    person: str
    film: str
    director: str

    ENTITIES: ClassVar[tuple[str, str]] = ("person", "director")
    UNTOLD: ClassVar[tuple[str, ...]] = ()
    BRIDGE: ClassVar[str] = "film"


class TwoHopSpec(TemplatedSpec):
    """Invented people, films and directors: person → film → director.

    Each training text tells one hop, in ``lists/two_hop.yaml``: who plays in a film, or who made
    it. Direction `ab` asks from the person for the director: `director` and `director_qa`
    across both hops, and `with_bridge` with the film named. The templates `hop1_…` ask for the film
    of a person and `hop2_…` for the director of a film, so that what one hop lacks is not taken for
    what two do.
    """

    facts: Literal["two_hop"] = "two_hop"
    """Chains of two hops."""

    template_names: ClassVar[tuple[str, ...]] = (
        *("director", "director_qa", "with_bridge"),
        *("hop1_film", "hop1_qa", "hop2_director", "hop2_qa"),
    )

    @property
    def fact_type(self) -> Any:
        return Chain

    @property
    def shipped_templates(self) -> str:
        return "two_hop"

    def collect(self) -> tuple[Chain, ...]:
        films = make_facts(self.number(MAX_FACTS), self.seed)
        return tuple(Chain(f.first_actor, f.movie_title, f.second_actor) for f in films)

    def revive(self, values: Mapping[str, Any]) -> Chain:
        return Chain(**values)
