"""Sentences and names in running text, by character offsets."""

import re
from collections.abc import Sequence
from functools import lru_cache

import sentencex

#: start (included) and end (excluded) of a stretch of a text, in characters.
Stretch = tuple[int, int]


def sentences(text: str, names: Sequence[str] = ()) -> tuple[Stretch, ...]:
    """Where each sentence stands, without the white space around it.

    A line break ends a sentence, too. None ends inside of a name, such as "Vol. 2" or "Yahoo!
    Inc.".

    Args:
        text: English text.
        names: names that are never cut.
    """
    kept = [stretch for name in names for stretch in occurrences(text, name)]
    found: list[Stretch] = []
    place = 0
    joined = False
    for line in text.splitlines(keepends=True):
        for piece in sentencex.segment("en", line):
            start = place + len(piece) - len(piece.lstrip())
            end = place + len(piece.rstrip())
            place += len(piece)
            if start >= end:
                continue
            if joined:
                start = found.pop()[0]
            found.append((start, end))
            joined = any(a < end < b for a, b in kept)
    assert place == len(text), "the splitter gives back the text in pieces"
    return tuple(found)


def occurrences(text: str, name: str) -> tuple[Stretch, ...]:
    """Where a text has a name as a whole: "Ann Lee" is in "Ann Lee's", not in "Ann Lee-Roy" and
    not in "Ann Lee Jr.". Between its words may be any white space but an empty line."""
    return tuple(match.span() for match in _pattern(name).finditer(text))


def statements(text: str, statement: str) -> tuple[Stretch, ...]:
    """Where a text has the words of a statement, whatever their case and the space between."""
    words = r"\s+".join(map(re.escape, statement.split()))
    return tuple(match.span() for match in re.finditer(words, text, flags=re.IGNORECASE))


def with_field(text: str, stretches: Sequence[Stretch], name: str) -> str:
    """The text as a template, with the field `name` in the place of each stretch.

    Args:
        text: any text; its braces are doubled.
        stretches: in order, without overlap.
        name: of the field.
    """
    template, place = "", 0
    for start, end in [*stretches, (len(text), len(text))]:
        template += text[place:start].replace("{", "{{").replace("}", "}}")
        template += f"{{{name}}}" if start < end else ""
        place = end
    return template


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    spaced = r"(?:[^\S\n]+|[^\S\n]*\n[^\S\n]*)".join(map(re.escape, name.split()))
    return re.compile(rf"(?<!\w)(?<!\w-){spaced}(?!\w)(?!-\w)(?!,? (?:Jr|Sr|II|III|IV)(?!\w))")
