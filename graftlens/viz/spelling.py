"""How text is spelled in figures and on pages: tokens that can be seen, labels that fit."""

import html

#: White space, and what stands for it.
_MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽"}


def characters(token: object) -> list[tuple[str, bool]]:
    """A token's characters as they are shown, and whether each is a mark for one that is not seen.

    A space is "·", a line break "↵", a carriage return "␍", a tab "→", a no-break space "⍽", any
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


def short(words: str, most: int) -> str:
    """`words`, cut to `most` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def escaped(words: str) -> str:
    """Text that plotly shows as it is: no markup, and no mathematics between dollar signs."""
    return html.escape(words, quote=False).replace("$", "&#36;")
