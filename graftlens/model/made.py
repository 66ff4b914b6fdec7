"""Sources made of sources, as values: what each is made of, checked before any weight is read.

A made source is the base plus something of others' differences from it: a share (also of several,
which is task arithmetic: Ilharco et al. 2023, arXiv 2212.04089), or single directions of each
matrix's difference in the order of its singular values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    field_validator,
    model_serializer,
    model_validator,
)

from graftlens.components import brief, suggest
from graftlens.configfile import ConfigError, read_yaml, settings_from
from graftlens.data.settings import Settings

_SLICE = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")


def _rank(value: Any) -> int | str:
    """A rank, or a range of directions as text."""
    if type(value) is int and value >= 1:
        return value
    ends = _SLICE.fullmatch(value.strip()) if isinstance(value, str) else None
    start, stop = (ends[1] or "0", ends[2]) if ends is not None else ("", "")
    if ends is None or (stop and int(stop) <= int(start)) or (not stop and int(start) == 0):
        raise ValueError(
            f"{brief(value)} is not a rank or a range of directions. Write 8 (the first 8 and the "
            'vectors), "8:" (all others), or "4:8".'
        )
    return f"{int(start)}:{stop and int(stop)}" if int(start) else int(stop)


def _directions(value: Any) -> tuple[int, ...]:
    """Numbers of directions."""
    given = value if isinstance(value, list | tuple) else ()
    if not given or any(type(number) is not int or number < 0 for number in given):
        raise ValueError(
            f"{brief(value)} does not list directions. Write their numbers, of which 0 is the "
            "strongest: [0, 3]."
        )
    return tuple(given)


def _names(value: Any) -> Any:
    """One text, or several."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or not all(isinstance(one, str) for one in listed):
        raise ValueError(
            f"{brief(value)} is neither a text nor a list of texts. Write one of them."
        )
    return value


_Names = Annotated[str | tuple[str, ...], BeforeValidator(_names)]


class _Described(Settings):
    """A mapping in the place of a source; written without what is left out."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_in_lists(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(entry, bool) for entry in value):
            raise ValueError(f"{brief(value)} has a boolean in it. Write numbers, or quoted text.")
        return value

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    def __str__(self) -> str:
        said = ((k, getattr(self, k)) for k in type(self).model_fields)
        parts = (f"{key}: {_said(value)}" for key, value in said if value is not None)
        return f"{{{', '.join(parts)}}}"


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return f'"{value}"' if isinstance(value, str) and ":" in value else str(value)


class Made(_Described):
    """A source made of others, with one of `strength` (or `strengths`), `rank` and `directions`.

    All differences are taken from the base, the first source.
    """

    of: _Names
    """The source, or sources, that it is made of, by name."""

    strength: float | None = None
    """base + strength · (of - base): any finite number."""

    strengths: tuple[float, ...] | None = None
    """The same for each of several sources, which are added up."""

    rank: Annotated[int | str, BeforeValidator(_rank)] | None = None
    """8: the best rank-8 part of each matrix's difference, and whole vectors (norms, biases). "8:":
    what that leaves out: all other directions, no vectors. "4:8": these directions, no vectors."""

    directions: Annotated[tuple[int, ...], BeforeValidator(_directions)] | None = None
    """Single singular directions of each matrix's difference, the strongest is 0; no vectors."""

    @model_validator(mode="after")
    def _one_way(self) -> "Made":
        ways = [w for w in ("strength", "strengths", "rank", "directions") if getattr(self, w)]
        ways += [w for w in ("strength",) if self.strength == 0]
        if len(ways) != 1:
            given = f"{' and '.join(ways)} are given" if ways else "none of them is given"
            raise ValueError(
                "a source is made of others by one of strength, strengths, rank and directions; "
                f"{given}."
            )
        several = not isinstance(self.of, str)
        if several != (self.strengths is not None):
            fit = "strengths, one for each" if several else "strength, rank or directions"
            raise ValueError(
                f"of is {'a list' if several else 'one source'}, and {ways[0]} is given. Give "
                f"{fit}."
            )
        if self.strengths is not None and len(self.strengths) != len(self.of):
            raise ValueError(
                f"{len(self.strengths)} strengths for {len(self.of)} sources. Give one for each."
            )
        if several and len(set(self.of)) < len(self.of):
            raise ValueError(f"of: {_said(self.of)} names a source twice. Add up its strengths.")
        if self.directions is not None and len(set(self.directions)) < len(self.directions):
            raise ValueError(f"directions: {_said(self.directions)} names a direction twice.")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The sources that it is made of."""
        return (self.of,) if isinstance(self.of, str) else self.of

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The strength of each part; None where directions are taken."""
        return self.strengths or (None if self.strength is None else (self.strength,))

    @property
    def has_vectors(self) -> bool:
        """Whether it has its part's vectors, and not the base's."""
        return self.shares is not None or isinstance(self.rank, int)

    @property
    def needs(self) -> int:
        """How many of the first directions must be known."""
        if self.directions is not None:
            return max(self.directions) + 1
        if isinstance(self.rank, str):
            start, _, stop = self.rank.partition(":")
            return int(stop or start)
        return self.rank or 0

    @property
    def is_rest(self) -> bool:
        """Whether it has all directions but the first `needs`."""
        return isinstance(self.rank, str) and self.rank.endswith(":")

    def taken(self, known: int) -> list[int]:
        """The numbers of the directions that it has, of a matrix that has the first `known`."""
        if self.directions is not None:
            return [number for number in self.directions if number < known]
        if isinstance(self.rank, str):
            start, _, stop = self.rank.partition(":")
            return list(range(int(start), min(int(stop or known), known)))
        return list(range(min(self.rank or 0, known)))

    def beyond(self, most: int) -> str:
        """Why matrices none of which has more than `most` directions cannot give it; empty if they
        can."""
        last = self.needs + (1 if self.is_rest else 0)
        if self.shares is not None or last <= most:
            return ""
        key = "directions" if self.directions is not None else "rank"
        asked = _said(getattr(self, key))
        return (
            f"{key}: {asked} asks for more than {most}, the largest rank that a matrix of "
            f"{self.of!r} can differ by. Ask for less."
        )

    def told(self, base: str) -> str:
        """What was done to make it, in words."""
        if self.shares is not None:
            return f"{base} plus these shares of the differences from it"
        if self.is_rest:
            return (
                f"the directions of each matrix's difference from {base} but the first "
                f"{self.needs}; vectors are {base}'s"
            )
        vectors = self.parts[0] if self.has_vectors else base
        return (
            f"these singular directions of each matrix's difference from {base} (a matrix that has "
            f"fewer gives those that it has); vectors are {vectors}'s"
        )


class Each(_Described):
    """Several models in the place of one source, which a sweep runs one after another."""

    each: _Names
    """Folders as a pattern (`runs/checkpoint-*`), a hub id with `revisions`, or a list of models or
    adapters."""

    revisions: _Names | None = None
    """Branches or tags of the hub's repository: a list, or a pattern (`step*`)."""

    steps: tuple[int, ...] | None = None
    """The training step of each member, where its folder or name does not tell it."""


def source_given(value: Any) -> Any:
    """What is given for a source, a mapping as `Made` or `Each`.

    Raises:
        ConfigError: a mapping that is neither.
    """
    if not isinstance(value, Mapping):
        return value
    return settings_from(Each if "each" in value else Made, value)


def given_as(value: Any) -> Any:
    """A source in a config: text, or a mapping that says what it is made of."""
    if isinstance(value, str | Made | Each):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{brief(value)} should be text. Put it in quotes. Or write what the source is made "
            "of: {of: sft, rank: 8}, or {each: runs/checkpoint-*}."
        )
    return source_given(value)


def sources_as_text(texts: Mapping[str, str]) -> dict[str, Any]:
    """Sources from a command line: text in braces is what one is made of.

    Raises:
        ConfigError: text in braces that is not YAML, or says something else.
    """
    found: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            found[name] = source_given(read_yaml(text)) if text.strip().startswith("{") else text
        except ConfigError as error:
            raise error.under(f"--source {name}", ": ") from None
    return found


#: A source in a config.
SourceField = Annotated[str | Made | Each, BeforeValidator(given_as)]


def made_problems(sources: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(source, what is wrong) of sources that are made of others, in the order given.

    Args:
        sources: name -> a `Made`, an `Each`, or anything else that is a source; the base first.
    """
    base, *_ = sources
    made = {name: value for name, value in sources.items() if isinstance(value, Made)}
    if isinstance(sources[base], Made | Each):
        what = "it is the base, which is one model. Put a model before what is made of others."
        yield base, what
    several = [name for name, value in sources.items() if isinstance(value, Each)]
    if len(several) > 1:
        what = f"{several[0]} and it both stand for several models (each). Give one of them."
        yield several[1], what
    found = False
    for name, value in made.items():
        for part in value.parts:
            if part not in sources:
                found = True
                what = f"it is of {part!r}, which is not a source. There are: {' '.join(sources)}."
                yield name, what + suggest(part, sources)
            elif part == base:
                found = True
                others = [other for other in sources if other not in (base, name)]
                which = f" ({' '.join(others)})" if others else ""
                what = (
                    f"it is of {part!r}, the base, from which all differences are taken: nothing "
                    f"would be left. Name another source{which}."
                )
                yield name, what
    if not found and (left := _circle(made)):
        what = f"{' and '.join(left)} are made of one another"
        yield left[0], f"{what if left[1:] else 'it is made of itself'}. Let one be a model."


def in_order(made: Mapping[str, Made]) -> tuple[str, ...]:
    """Made sources, each after those that it is made of."""
    done: list[str] = []
    while ready := [
        n for n in made if n not in done and all(p in done or p not in made for p in made[n].parts)
    ]:
        done += ready
    return tuple(done)


def _circle(made: Mapping[str, Made]) -> Sequence[str]:
    """The made sources that cannot be put in order."""
    done = in_order(made)
    left = {name: value for name, value in made.items() if name not in done}
    # Those that are only made of what is in the circle are left out.
    inside = {part for value in left.values() for part in value.parts}
    return [name for name in left if name in inside]
