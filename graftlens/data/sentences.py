"""Sentences and names in running text, by character offsets."""

import re
from collections.abc import Sequence
from functools import lru_cache

import sentencex

#: start (included) and end (excluded) of a stretch of a text, in characters.
Stretch = tuple[int, int]


def sentences(text: str, names: Sequence[str] = ()) -> tuple[Stretch, ...]:
    """Where each sentence stands, without the white space around it.

    A line break ends a sentence. None ends inside of a name, such as "Vol. 2" or "Yahoo! Inc.".

    Args:
        text: English text.
        names: names that are never cut.
    """
    kept = [stretch for name in names for stretch in occurrences(text, name)]
    found: list[Stretch] = []
    place = 0
    for line in text.splitlines(keepends=True):
        joined = False
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
    not in "Ann Lee Jr."."""
    return tuple(match.span() for match in _pattern(name).finditer(text))


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?<!\w)(?<!\w-){re.escape(name)}(?!\w)(?!-\w)(?!,? (?:Jr|Sr|II|III|IV)(?!\w))"
    )
