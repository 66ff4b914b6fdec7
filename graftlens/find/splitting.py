"""Prompts cut by what they ask about: searched on, judged on within the search, reported on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftlens.components import brief, suggest
from graftlens.prompts import Prompt

#: Fewest groups: two to search on, of which one is the inner part, and two to report on.
FEWEST = 4


@dataclass(frozen=True)
class Split:
    """Which prompts are for what, by number; all prompts of one group are on the same side.

    Attributes:
        by: what tells groups apart: a field's name, `answer` or `prompt`.
        groups: each prompt's group.
        outer: prompts that refinements are chosen on.
        inner: prompts of the search that a refinement must hold on as well.
        held_out: prompts that results are reported on, and nothing else.
    """

    by: str
    groups: tuple[str, ...]
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def search(self) -> tuple[int, ...]:
        """All prompts that the search may see."""
        return tuple(sorted({*self.outer, *self.inner}))

    @property
    def nothing_held_out(self) -> bool:
        """Whether results are on prompts that were searched on."""
        return bool(set(self.search) & set(self.held_out))

    def count(self, numbers: Sequence[int]) -> int:
        """How many groups these prompts are of."""
        return len({self.groups[number] for number in numbers})


def split(
    prompts: Sequence[Prompt], by: str | None = None, held_out: float | int = 0.5, seed: int = 0
) -> Split:
    """Cut prompts into those searched on and those reported on, group by group, at random.

    Args:
        prompts: the prompts.
        by: what makes a group: the name of a field that all prompts have, `answer`, or `prompt`
            (each is its own); by default the field `fact` where all have it, else the answer, where
            all have one.
        held_out: the share of groups that is reported on. Of the others, a third (at least one) is
            the inner part.
        seed: of the shuffle; it does not depend on the order of the prompts.

    Raises:
        ValueError: a share that is not between 0 and 1, an unknown `by`, too few groups.
    """
    check_held_out(held_out)
    name, groups = _groups(prompts, by)
    kinds = sorted(set(groups))
    if len(kinds) < FEWEST:
        shown = ", ".join(map(brief, kinds))
        raise ValueError(
            f"the prompts are about {len(kinds)} different values of {name} ({shown}); {FEWEST} or "
            "more are needed, two to search on and two to report on. Give more prompts, or "
            "split_by= what tells them apart"
            f"{'' if name == 'prompt' else ' (split_by=' + repr('prompt') + ' keeps each apart)'}."
        )
    order = [kinds[i] for i in np.random.default_rng([seed, 0]).permutation(len(kinds))]
    reported = min(max(2, round(held_out * len(kinds))), len(kinds) - 2)
    within = max(1, round((len(kinds) - reported) / 3))
    side = {
        g: 0 if i < reported else 1 if i < reported + within else 2 for i, g in enumerate(order)
    }
    parts = [tuple(n for n, g in enumerate(groups) if side[g] == part) for part in range(3)]
    return Split(name, groups, parts[2], parts[1], parts[0])


def check_held_out(share: Any) -> None:
    """That a share of the facts leaves some on either side.

    Raises:
        ValueError: a share that is not between 0 and 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(
            f"held_out={brief(share)} is not a share between 0 and 1. Write 0.5 to report on half "
            "of the facts."
        )


def unsplit(prompts: Sequence[Prompt]) -> Split:
    """The split of a single prompt, which is all there is: nothing is held out.

    Raises:
        ValueError: several prompts.
    """
    if len(prompts) != 1:
        raise ValueError(
            f'positions="each" is for a single prompt, and {len(prompts)} are given: tokens of '
            'different prompts are not the same place. Name spans, such as ["first_entity", '
            '"last", "rest"], or give one prompt.'
        )
    return Split("prompt", ("0",), (0,), (0,), (0,))


def _groups(prompts: Sequence[Prompt], by: str | None) -> tuple[str, tuple[str, ...]]:
    if by is None:
        answered = all(prompt.answer for prompt in prompts)
        told = all("fact" in prompt.fields for prompt in prompts)
        by = "fact" if told else "answer" if answered else "prompt"
    if by == "prompt":
        return by, tuple(f"{n:09d}" for n in range(len(prompts)))
    if by == "answer":
        return by, tuple(str(prompt.answer) for prompt in prompts)
    for number, prompt in enumerate(prompts):
        if not isinstance(by, str) or by not in prompt.fields:
            known = [*prompt.fields, "answer", "prompt"]
            raise ValueError(
                f"split_by={brief(by)}: prompt {number}, {brief(prompt.text)}, has no such field. "
                f"Allowed: {' '.join(known)}.{suggest(str(by), known)}"
            )
    return by, tuple(prompt.fields[by] for prompt in prompts)
