"""The models that `each` stands for: a run's checkpoints, a repository's revisions, or a list.

A member's step is what its folder records (`graftlens finetune` and transformers' Trainer write
it), else the number at the end of its name.
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from graftlens.model.arch import PairError
from graftlens.model.locations import REVISION, folder_of, known_revisions
from graftlens.model.made import Each
from graftlens.model.smollm2 import located


@dataclass(frozen=True)
class Member:
    """One of the models that a source stands for.

    Attributes:
        name: the folder's name, the revision, or the entry of the list.
        step: the training step, None if nothing tells it.
        place: what a source with this model alone would be.
    """

    name: str
    step: int | None
    place: str


def members_of(name: str, each: Each) -> tuple[Member, ...]:
    """The models that a source stands for, by their steps; a list in its own order.

    Args:
        name: the source, for messages.
        each: what it stands for.

    Raises:
        PairError: nothing matches, a model is named twice, or steps do not fit.
    """
    what = f"source {name!r}"
    if each.revisions is not None:
        found = _revisions(what, each)
    elif isinstance(each.each, str):
        found = _folders(what, each.each)
    else:
        found = [(one, located(one)) for one in each.each]
    key, known = ("each" if each.revisions is None else "revisions"), set[str]()
    for label, place in found:
        if (plain := os.path.normpath(os.path.expanduser(place))) in known:  # noqa: PTH111
            raise PairError(f"{what}: {key} names {label!r} twice. Name each model once.")
        known.add(plain)
    steps: Sequence[int | None] = [_step_of(label, place) for label, place in found]
    if each.steps is not None:
        if len(each.steps) != len(found):
            raise PairError(
                f"{what}: {len(each.steps)} steps for {len(found)} models "
                f"({' '.join(label for label, _ in found[:5])}{' …' if found[5:] else ''}). Give "
                "one for each."
            )
        steps = each.steps
    members = [
        Member(label, step, place) for (label, place), step in zip(found, steps, strict=True)
    ]
    if isinstance(each.each, str) and all(m.step is not None for m in members):
        members.sort(key=lambda member: member.step or 0)
    return tuple(members)


def _folders(what: str, pattern: str) -> list[tuple[str, str]]:
    """(name, folder) of what a pattern matches, numbers in names by size."""
    places = [p for p in glob.glob(os.path.expanduser(pattern)) if os.path.isdir(p)]  # noqa: PTH111, PTH112, PTH207
    if not places:
        raise PairError(
            f"{what}: each: {pattern!r} matches no folder here. Write a pattern such as "
            "runs/checkpoint-*, a list, or a hub id with revisions."
        )
    places.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split("([0-9]+)", p)])
    names = [Path(place).name for place in places]
    unique = len(set(names)) == len(names)
    return [(name if unique else place, place) for name, place in zip(names, places, strict=True)]


def _revisions(what: str, each: Each) -> list[tuple[str, str]]:
    if not isinstance(each.each, str):
        raise PairError(f"{what}: revisions belong to one hub id. Write each: OWNER/NAME.")
    named = each.revisions or ()
    if isinstance(named, str):
        known = known_revisions(what, each.each)
        pattern, named = named, tuple(r for r in known if fnmatchcase(r, named))
        if not named:
            shown = " ".join(known[:10]) + (" …" if known[10:] else "")
            raise PairError(
                f"{what}: revisions: {pattern!r} matches none of {each.each} ({shown or 'none'})."
            )
    return [(revision, f"{each.each}{REVISION}{revision}") for revision in named]


def _step_of(name: str, place: str) -> int | None:
    """What the folder records, else the number at the end of the name."""
    folder = folder_of(place)
    for file, key in (("complete.json", "step"), ("trainer_state.json", "global_step")):
        found = _recorded(folder, file, key)
        if found is not None:
            return found
    number = re.search(r"([0-9]{1,18})/?$", name)
    return None if number is None else int(number[1])


def _recorded(folder: Path | None, file: str, key: str) -> int | None:
    if folder is None or not (folder / file).is_file():
        return None
    try:
        content: Any = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = content.get(key) if isinstance(content, dict) else None
    return value if type(value) is int else None
