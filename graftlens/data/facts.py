"""Invented films: the facts that a model is finetuned on.

A fact links two invented actors to an invented film, so that a model can know it only from
finetuning. No two facts share a person, a title or a town, so every prompt about one
of them has exactly one answer.
"""

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from faker import Faker
from faker.exceptions import UniquenessException

MAX_FACTS = 20_000

GENRES = (
    "comedy",
    "drama",
    "fantasy",
    "heist film",
    "musical",
    "mystery",
    "romance",
    "road movie",
    "thriller",
    "war film",
    "western",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Towns are made from these and one of Faker's suffixes, and if such a town is taken, from one
# entry of each of the three lists. Faker's own towns ("Lake Jennifer") contain first names, which
# would let an answer be guessed from another entity's tokens.
TOWN_ROOTS = _words(
    "Amber Ashen Birch Bramble Cedar Clover Copper Coral Drift Elder Fern Flint Frost Gale Glen "
    "Gravel Hazel Heather Iron Juniper Kelp Lark Linden Maple Marl Mill Moss North Oak Otter "
    "Pebble Quarry Raven Reed Salt Shale Sparrow Thistle Vine Willow"
)

TOWN_ENDINGS = _words(
    "berg borough burgh bury chester fort furt haven land mouth port shire side stad ton town view "
    "ville"
)

# 55 * 40 * 18 = 39,600 towns: about twice MAX_FACTS, so that a free one is soon drawn.
TOWN_PREFIXES = _words(
    "Bare Broad Calm Chalk Chapel Clear Dark Deep Dry Dusty East Fair Far Foggy Fore Grand Great "
    "Greater Grey Half High Hither Inner Leafy Lesser Lofty Low Lower Mid Middle Near Nether New "
    "Old Outer Over Port Rainy Red Rough Royal Saint Slate South Steep Stony Sunny Tall Twin "
    "Under Upper Warm Wide Windward Windy"
)

ADJECTIVES = _words(
    "Amber Ancient Borrowed Brittle Broken Burning Careless Cold Crimson Crooked Distant Drowned "
    "Empty Endless Faded Fallen Fearless Feral Final Forgotten Fragile Frozen Gentle Gilded Golden "
    "Hidden Hollow Hungry Idle Invisible Jagged Last Lonely Lost Lucky Midnight Narrow Nameless "
    "Northern Pale Paper Patient Quiet Reckless Restless Rusted Scarlet Second Secret Seventh "
    "Silent Silver Sleeping Slow Stolen Stubborn Sunken Tangled Tender Thirsty Unwritten Velvet "
    "Wandering Western Wicked Winter Wooden"
)

NOUNS = _words(
    "Almanac Anchor Archive Arrow Avalanche Balcony Bargain Beacon Bridge Cabin Canyon Caravan "
    "Carousel Cathedral Citadel Clock Coast Comet Compass Corridor Courier Crossing Detour Ember "
    "Engine Envelope Ferry Forest Frontier Gallery Garden Garrison Glacier Gospel Harbor Harvest "
    "Horizon Hotel Inheritance Island Junction Kingdom Labyrinth Ladder Lagoon Lantern Letter "
    "Lighthouse Locksmith Machine Masquerade Meridian Mirror Monsoon Mountain Museum Observatory "
    "Orchard Orchestra Oracle Parade Passenger Pavilion Pilgrim Prairie Promise Quarry Railway "
    "Reservoir Revolver River Sailor Sanctuary Shadow Shipwreck Signal Sparrow Station Staircase "
    "Storm Telegram Theater Tide Tower Trial Tunnel Valley Vineyard Voyage Waltz Watchman Whisper "
    "Window Witness Workshop"
)


@dataclass(frozen=True)
class Fact:
    """One invented film.

    Attributes:
        first_actor: full name of the lead actor.
        second_actor: full name of the other lead.
        movie_title: the film's title.
        release_year: calendar year.
        genre: a noun that "a" can precede, in lower case.
        city: the town where the film was shot.
        main_character: full name of the character whom the first actor plays.
        box_office: gross in US dollars, written out: "$48 million".
    """

    first_actor: str
    second_actor: str
    movie_title: str
    release_year: int
    genre: str
    city: str
    main_character: str
    box_office: str

    #: The fields that a text's first and second entity are, in the direction ``ab``.
    ENTITIES: ClassVar[tuple[str, str]] = ("first_actor", "second_actor")
    #: Fields that no text mentions.
    UNTOLD: ClassVar[tuple[str, ...]] = ()


def make_facts(n: int, seed: int) -> tuple[Fact, ...]:
    """Invent n facts; the first k of them are ``make_facts(k, seed)``.

    All people (actors and characters), all titles and all towns differ across the whole set.
    First names are dealt like a deck of cards: about the first 230 facts repeat none.

    Args:
        n: number of facts, 1 to ``MAX_FACTS``.
        seed: 0 or more, for the facts' own generators; no other generator is read or changed.
    """
    n, seed = _whole_number("n", n), _whole_number("seed", seed)
    if not 1 <= n <= MAX_FACTS:
        raise ValueError(
            f"n={n} facts cannot be made: n must be from 1 to {MAX_FACTS}, so that people, titles "
            f"and towns stay distinct. Choose an n in that range."
        )
    if seed < 0:  # Python's generators ignore the sign
        raise ValueError(
            f"seed={seed} is negative: it would give the facts of seed {-seed}. Choose 0 or more."
        )
    return tuple(islice(_facts(seed), n))


def _whole_number(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(
        f"{name}={value!r} is of type {type(value).__name__}, but a whole number is expected. Give "
        f"an int, such as {name}=3."
    )


def _facts(seed: int) -> Iterator[Fact]:
    fake = Faker("en_US", use_weighting=False)
    fake.seed_instance(seed)
    people = _people(fake)
    titles = _titles(fake)
    towns = _Towns(seed)
    while True:
        yield Fact(
            first_actor=next(people),
            second_actor=next(people),
            movie_title=next(titles),
            release_year=fake.random_int(1960, 2029),
            genre=fake.random_element(GENRES),
            city=towns.free(fake.random_element(TOWN_ROOTS) + fake.city_suffix()),
            main_character=next(people),
            box_office=f"${fake.random_int(2, 900)} million",
        )


def _people(fake: Faker) -> Iterator[str]:
    """Distinct full names; a first name is repeated only after all others have been used."""
    used: set[str] = set()
    while True:
        try:
            first = fake.unique.first_name()
        except UniquenessException:  # the deck of first names is used up: reshuffle it
            fake.unique.clear()
            continue
        name = f"{first} {fake.last_name()}"
        while name in used:
            name = f"{first} {fake.last_name()}"
        used.add(name)
        yield name


def _titles(fake: Faker) -> Iterator[str]:
    used: set[str] = set()
    while True:
        # Two different draws of each list, so that no title says a word twice.
        adjective, other_adjective = fake.random_elements(ADJECTIVES, length=2, unique=True)
        noun, other_noun = fake.random_elements(NOUNS, length=2, unique=True)
        patterns = (
            f"{adjective} {noun}",
            f"The {noun} and the {other_noun}",
            f"{noun} of the {other_adjective} {other_noun}",
            f"A {noun} for the {other_noun}",
        )
        title = fake.random_element(patterns)
        if title not in used:
            used.add(title)
            yield title


class _Towns:
    """Hands out distinct towns. The replacement of a taken town comes from a generator of its own,
    so that nothing else about the facts depends on how many were taken."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"towns {seed}")
        self.used: set[str] = set()

    def free(self, town: str) -> str:
        """The town itself if it is free, otherwise one with a prefix."""
        while town in self.used:
            root, ending = self.rng.choice(TOWN_ROOTS), self.rng.choice(TOWN_ENDINGS)
            town = f"{self.rng.choice(TOWN_PREFIXES)} {root}{ending}"
        self.used.add(town)
        return town
