"""Sentences and names in running text, by character offsets."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import sentencex

#: start (included) and end (excluded) of a stretch of a text, in characters.
Stretch = tuple[int, int]


def sentences(text: str, names: Sequence[str] = ()) -> tuple[Stretch, ...]:
    """Where each sentence is, without the white space around it.

    A line break also ends a sentence. No sentence ends inside a name, such as "Vol. 2" or "Yahoo!
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
    assert place == len(text), "the splitter returns the text in pieces"
    return tuple(found)


def occurrences(text: str, name: str) -> tuple[Stretch, ...]:
    """Where a text contains a whole name: "Ann Lee" is in "Ann Lee's", not in "Ann Lee-Roy" and
    not in "Ann Lee Jr.". Its words may be separated by any white space but an empty line.

    What counts as whole depends on the script. Chinese, Japanese, Thai and similar scripts put no
    space between words, so a name may end anywhere except inside a katakana word. In Korean
    a particle may follow it, and in Arabic and Hebrew a prefix (such as "and" or "in") may precede
    it. No name ends before an accent or vowel sign that belongs to its last letter.
    """
    found: list[Stretch] = []
    place = 0
    while name.strip() and (match := _pattern(name).search(text, place)):
        start, end = match.span()
        whole = _whole(text, start, end)
        found += [(start, end)] if whole else []
        # A name that is cut may overlap one that is not.
        place = end if whole else start + 1
    return tuple(found)


def statements(text: str, statement: str) -> tuple[Stretch, ...]:
    """Where a text contains the words of a statement, regardless of case and spacing."""
    spaced = r"\s+".join(map(re.escape, statement.split()))
    return tuple(match.span() for match in re.finditer(spaced, text, flags=re.IGNORECASE))


def with_field(text: str, stretches: Sequence[Stretch], name: str) -> str:
    """The text as a template, with the field `name` in place of each stretch.

    Args:
        text: any text; its braces are doubled.
        stretches: in order, without overlap.
        name: name of the field.
    """
    template, place = "", 0
    for start, end in [*stretches, (len(text), len(text))]:
        template += text[place:start].replace("{", "{{").replace("}", "}}")
        template += f"{{{name}}}" if start < end else ""
        place = end
    return template


def words(text: str) -> list[str]:
    """The words of a text that are always delimited by spaces or punctuation: words in scripts
    that `occurrences` knows to work otherwise are left out."""
    return _SPACED.findall(text)


#: Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Han.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u3005-\u3007\u3021-\u3029\u3031-\u3035"
    "\u303b\u303c\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"
_HEBREW = "\u05d0-\u05ea"
_ARABIC = "\u0620-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufefc"

_SPACED = re.compile(rf"[^\W{_UNSPACED}{_HANGUL}{_HEBREW}{_ARABIC}]+")
_WORD = re.compile(rf"[^\W{_UNSPACED}]")
_ANY_UNSPACED = re.compile(rf"[{_UNSPACED}]")
_IN_KATAKANA = re.compile(rf"[{_KATAKANA}]")

#: What may be prefixed to a name: conjunctions, prepositions, the article.
_PREFIX = re.compile("[وف]?[بكلس]?(?:ال)?|[وف]?لل|ו?[שמ]?[בכלמ]?ה?")

#: Korean particles and forms of "to be", which follow a name without a space, possibly several of
#: them.
_PARTICLES = (
    "이었습니다|였습니다|에게서|에서는|에서도|에서의|으로서|으로써|이든지|"
    "이라고|이라는|이라도|이었다|이었던|이에요|입니까|입니다|한테서|같이|"
    "까지|께서|대로|든지|라고|라는|라도|로서|로써|마다|마저|만큼|밖에|"
    "보다|부터|에게|에는|에도|에서|였다|였던|예요|으로|이고|이나|이다|"
    "이란|이랑|이며|이야|이여|이자|인가|조차|처럼|하고|한테|가|고|과|께|"
    "나|는|님|다|도|들|란|랑|로|를|만|며|뿐|씨|아|야|에|여|와|은|"
    "을|의|이|인"
)

_PARTICLES_AFTER = re.compile(rf"(?:{_PARTICLES}){{1,3}}(?![{_HANGUL}])")


def _whole(text: str, start: int, end: int) -> bool:
    """Whether a name in a text is cut at neither end."""
    first, last = text[start], _letter_before(text, end)
    before, after = _letter_before(text, start), text[end : end + 1]
    if _joins(first) or _joins(after) or _in_katakana(before, first) or _in_katakana(last, after):
        return False
    if _WORD.match(before) and not _ANY_UNSPACED.match(first):
        run = re.search(r"\w*\Z", text[:start])
        if run is None or not _PREFIX.fullmatch(run[0]) or not run[0]:
            return False
    if _WORD.match(after) and not _ANY_UNSPACED.match(last):
        return _PARTICLES_AFTER.match(text, end) is not None
    return True


def _letter_before(text: str, place: int) -> str:
    """The last character before an offset that is not a combining mark; empty at the beginning."""
    while place > 0 and _joins(text[place - 1]):
        place -= 1
    return text[place - 1 : place] if place else ""


def _in_katakana(one: str, other: str) -> bool:
    """Whether two neighbouring characters belong to one katakana word."""
    return bool(_IN_KATAKANA.match(one) and _IN_KATAKANA.match(other))


def _joins(character: str) -> bool:
    """Whether a character belongs to the one before it: an accent, a vowel sign, a joiner."""
    return character != "" and (
        unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"
    )


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    spaced = r"(?:[^\S\n]+|[^\S\n]*\n[^\S\n]*)".join(map(re.escape, name.split()))
    return re.compile(rf"(?<!\w-){spaced}(?!-\w)(?!,? (?:Jr|Sr|II|III|IV)(?!\w))")
