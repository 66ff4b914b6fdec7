"""Players as grafts, and the coalitions of them that are run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool

from graftlens.components import Component, brief, format_numbers
from graftlens.find.games import MOST, MOST_EXACT, Orders
from graftlens.graft import Graft, Grafts, named_grafts
from graftlens.metrics import known
from graftlens.model.arch import Architecture, Site
from graftlens.model.mask import select, sites_of
from graftlens.prompts import PromptError, Tokenized
from graftlens.stats.resampling import check_seed

#: What joins players' names into a coalition's, and what the coalition without players is called.
JOINED, NOBODY = " + ", "none"


@dataclass(frozen=True)
class Coalitions:
    """Named players and the coalitions of them to run.

    Attributes:
        players: name -> graft, in the order given.
        orders: the orders that were drawn; None where all 2^n coalitions are run.
    """

    players: Mapping[str, Graft]
    orders: Orders | None = None

    @classmethod
    def of(cls, players: Grafts, permutations: int = 100, seed: int = 0) -> "Coalitions":
        """All coalitions of up to 12 players, or those of `permutations` random orders of more.

        Raises:
            ValueError: fewer than two players or more than 62, a graft without rules or of strength
                0, two players of one graft, or names that would make two coalitions one.
        """
        named = {str(name): graft for name, graft in named_grafts(players).items()}
        if not 2 <= len(named) <= MOST:
            raise ValueError(
                f"{len(named)} players. Give from 2 to {MOST}, each a named graft, such as "
                '{"FE": "sft @ first_entity", "LT": "sft @ last"}.'
            )
        if not isinstance(permutations, int | np.integer) or permutations < 2:
            raise ValueError(f"permutations={brief(permutations)}. Write 2 or more, such as 100.")
        check_seed(seed)
        for name, graft in named.items():
            if not any(rule.strength != 0 for rule in graft.rules):
                raise ValueError(
                    f"player {name!r} is the graft {brief(str(graft))}, which changes nothing. "
                    "Give it a rule, or leave it out."
                )
        orders = None
        if len(named) > MOST_EXACT:
            orders = Orders.drawn(len(named), permutations, seed)
        made = cls(named, orders)
        names = made.names
        if len({*names.values()}) < len(names):
            twice = next(n for n in names.values() if [*names.values()].count(n) > 1)
            raise ValueError(
                f"two coalitions would be called {twice!r}: the names of players are joined with "
                f"{JOINED.strip()!r}, and that of nobody is {NOBODY!r}. Rename a player."
            )
        return made

    @property
    def masks(self) -> tuple[int, ...]:
        """The coalitions as numbers, whose bit i is player i; all in order, or those of orders."""
        return self.orders.coalitions if self.orders else tuple(range(1 << len(self.players)))

    @property
    def names(self) -> dict[int, str]:
        """Coalition's number -> its name: those of its players, joined."""
        players = list(self.players)
        return {
            mask: JOINED.join(p for i, p in enumerate(players) if mask >> i & 1) or NOBODY
            for mask in self.masks
        }

    @property
    def grafts(self) -> dict[str, Graft]:
        """Coalition's name -> its players' rules together; they do not overlap, so that their order
        does not matter."""
        grafts = list(self.players.values())
        return {
            name: Graft(tuple(r for i, g in enumerate(grafts) if mask >> i & 1 for r in g.rules))
            for mask, name in self.names.items()
        }

    def left_out(self, prompts: Mapping[int, Tokenized]) -> dict[int, str]:
        """Numbers of the prompts in which some player cannot run -> why."""
        left = {}
        for number, tokens in prompts.items():
            try:
                for graft in self.players.values():
                    for rule in graft.rules:
                        select(rule, tokens)
            except PromptError as error:
                left[number] = str(error)
        return left

    def refuse_overlaps(
        self,
        prompts: Mapping[int, Tokenized],
        arch: Architecture,
        sources: Sequence[str],
        metrics: Sequence[str],
    ) -> None:
        """Refuse players that share a component in a layer, at a position, in a unit.

        Args:
            prompts: number -> the tokens of each prompt, which every player's rules can select in.
            arch: the model's architecture.
            sources: the names of its sources.
            metrics: what is measured; over whole answers, players must not overlap in these either,
                nor in what is generated.

        Raises:
            ValueError: two players that overlap, with the prompt and where they meet; a source,
                component, layer or unit that the model does not have.
        """
        rules = [
            (name, rule, sites_of(rule, arch, sources))
            for name, graft in self.players.items()
            for rule in graft.rules
        ]
        meeting = [
            (one, other, shared)
            for one, other in combinations(rules, 2)
            if one[0] != other[0]
            and one[1].strength * other[1].strength != 0
            and (shared := one[2] & other[2])
        ]
        seen: set[str] = set()
        # All tokens of an answer are alike to a rule.
        more = any((row := known(name)) is not None and row.over == "answer" for name in metrics)
        for number, prompt in prompts.items():
            total = len(prompt) + (more or prompt.generates)
            kind = repr((len(prompt), prompt.spans))
            if kind in seen or not meeting:
                continue
            seen.add(kind)
            for (a, one, _), (b, other, _), shared in meeting:
                both = select(one, prompt, total) & select(other, prompt, total)
                if not both.any():
                    continue
                for site in _in_order(shared):
                    units = _common(one.of(site[0]), other.of(site[0]))
                    if units is None or units:
                        inside = both[: len(prompt)]
                        raise ValueError(_overlap(a, b, number, site, inside, units))


def _common(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The units that both name; None is all."""
    if one is None or other is None:
        return other if one is None else one
    return tuple(sorted({*one} & {*other}))


def _in_order(sites: frozenset[Site]) -> list[Site]:
    order = list(Component)
    return sorted(sites, key=lambda s: (-1 if s[1] is None else s[1], order.index(s[0])))


def _overlap(
    a: str,
    b: str,
    prompt: int,
    site: Site,
    both: Bool[np.ndarray, " pos"],
    units: tuple[int, ...] | None,
) -> str:
    layer = "" if site[1] is None else f" of layer {site[1]}"
    places = np.flatnonzero(both).tolist()
    where = f"position{'s' if places[1:] else ''} {format_numbers(places)}"
    where = where if places else "the answer's tokens"
    cut = "" if units is None else f", unit{'s' if units[1:] else ''} {format_numbers(units)}"
    return (
        f"players {a!r} and {b!r} overlap in prompt {prompt}: both graft {site[0]}{layer} at "
        f"{where}{cut}. Take it out of one of them, such as with ~ (all other positions), or with "
        "other components or layers."
    )
