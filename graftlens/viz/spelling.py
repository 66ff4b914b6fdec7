"""How text is spelled in figures and on pages: tokens that can be seen, labels that fit."""

import html
import unicodedata
from collections.abc import Iterable, Sequence

from graftlens.components import format_numbers

#: White space, and what stands for it.
_MARKS = {" ": "␣", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽"}


def characters(token: object) -> list[tuple[str, bool]]:
    """A token's characters as they are shown, and whether each is a mark for one that is not seen.

    A space is "␣", a line break "↵", a carriage return "␍", a tab "→", a no-break space "⍽", any
    other character that cannot be printed its code, and nothing at all "∅".
    """
    shown = [
        (_MARKS[char], True)
        if char in _MARKS
        else (char, False)
        if char.isprintable()
        else (f"\\u{ord(char):04x}", True)
        for char in str(token)
    ]
    return shown or [("∅", True)]


def visible(token: object) -> str:
    """A token's text in one line that can be seen (see `characters`); not escaped."""
    return "".join(shown for shown, _ in characters(token))


def inline(token: object) -> str:
    """A token's text in one line that can be seen, inside another text."""
    return isolated(visible(token))


def headed(title: str, rest: str) -> str:
    """A title and what follows it: after a colon, unless the title ends as a sentence does."""
    ended = title.endswith(("?", "!", ".", "…", ":"))
    return f"{title}{'' if ended else ':'} {rest}"


def capital(sentence: str) -> str:
    """The sentence with a capital at its start."""
    return sentence[:1].upper() + sentence[1:]


def short(words: str, most: int) -> str:
    """`words`, cut to `most` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def spanned(numbers: Sequence[int]) -> str:
    """Whole numbers, consecutive ones in one piece: 0, 2–4."""
    return format_numbers(numbers).replace("-", "–").replace(",", ", ")


def isolated(words: str) -> str:
    """A token inside a text; one that is written right to left leaves what follows in its place.

    The marks around it (U+2066, U+2069) have no width; a token that needs none gets none.
    """
    backwards = any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in words)
    return f"\u2066{words}\u2069" if backwards else words


def shortened(names: Iterable[str], most: int = 40) -> dict[str, str]:
    """Names short enough for a legend: long ones without their middle, but still distinct."""
    cut = {
        name: name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}"
        for name in names
    }
    seen: dict[str, list[str]] = {}
    for name, said in cut.items():
        seen.setdefault(said, []).append(name)
    return {
        name: f"{said} ({seen[said].index(name) + 1})" if len(seen[said]) > 1 else said
        for name, said in cut.items()
    }


def escaped(words: str) -> str:
    """Text that plotly shows as it is: no markup, no mathematics between dollar signs, and no place
    of a hover template."""
    return html.escape(words, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")
