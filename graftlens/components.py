"""The closed vocabulary of what can be grafted: components, their groups, and layer groups.

Everything else in the library names weights with these words; nothing else defines them.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from enum import StrEnum


class Component(StrEnum):
    """One weight-bearing part of a layer or of the model. A bias travels with its weight."""

    EMBED = "embed"
    POS_EMBED = "pos_embed"
    LN1 = "ln1"
    Q = "q"
    K = "k"
    V = "v"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    O = "o"
    LN1_POST = "ln1_post"
    LN2 = "ln2"
    MLP_IN = "mlp_in"
    MLP_GATE = "mlp_gate"
    MLP_OUT = "mlp_out"
    LN2_POST = "ln2_post"
    LN_FINAL = "ln_final"
    UNEMBED = "unembed"


C = Component

#: Components that stand outside the layers; a rule restricted to layers never touches them.
MODEL_COMPONENTS = frozenset({C.EMBED, C.POS_EMBED, C.LN_FINAL, C.UNEMBED})

#: Components whose weights split by head. q and o split by query head, k and v by key-value head.
HEAD_COMPONENTS = frozenset({C.Q, C.K, C.V, C.O})

GROUPS: dict[str, tuple[Component, ...]] = {
    "attn": (C.Q, C.K, C.V, C.Q_NORM, C.K_NORM, C.O),
    "mlp": (C.MLP_IN, C.MLP_GATE, C.MLP_OUT),
    "ln": (C.LN1, C.LN1_POST, C.LN2, C.LN2_POST),
    "block": tuple(c for c in Component if c not in MODEL_COMPONENTS),
    "all": tuple(Component),
}

_FRACTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "half": (2, ("lower", "upper")),
    "quarter": (4, ("first", "second", "third", "fourth")),
    "eighth": (
        8,
        ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
    ),
}

#: Layer-group name -> (part, of how many). `all` is the one part of a family of one.
LAYER_GROUPS: dict[str, tuple[int, int]] = {"all": (0, 1)} | {
    f"{ordinal}_{fraction}": (i, n)
    for fraction, (n, ordinals) in _FRACTIONS.items()
    for i, ordinal in enumerate(ordinals)
}


#: Half of a character: no text that can be written to a file has one.
HALF = re.compile(r"[\ud800-\udfff]")


def cut(text: str, most: int) -> str:
    """A text for a message: its middle is left out where it is longer than `most`."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"


def brief(value: object) -> str:
    """A value as a message shows it: as in Python, and never long."""
    if isinstance(value, str) and len(value) > 1000:  # so that no copy of all of it is made
        value = cut(value, 900)
    return cut(repr(value), 300)


#: Of a graft as text, or of its name, which may be that text.
MAX_CHARACTERS = 1_000_000

#: Unicode's categories of control characters, halves of characters, line and paragraph separators.
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")


def check_name(name: str, what: str = "a graft's name") -> str:
    """A name that can stand in a table's cell, a plot's legend and a line of a log.

    Raises:
        ValueError: a name that is empty or very long, or that has a newline, a control character or
            half of a character in it.
    """
    if not name.strip():
        raise ValueError(f"{name!r} is {what} and empty. Write a name.")
    if len(name) > MAX_CHARACTERS:
        raise ValueError(
            f"{brief(name)} is {what} of {len(name):,} characters. Write a shorter one."
        )
    odd = next((c for c in name if unicodedata.category(c) in _UNWRITABLE), None)
    if odd is not None:
        raise ValueError(
            f"{brief(name)} is {what} and has the character {odd!a} in it. Write a name on one "
            "line, without control characters."
        )
    return name


def suggest(value: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else an empty string."""
    if len(value) > 200:  # the comparison takes the square of the length
        return ""
    close = difflib.get_close_matches(value, [str(a) for a in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse_components(words: str | Sequence[str]) -> tuple[str, ...]:
    """Component and group names from `"o + mlp"` or `["o", "mlp"]`, checked and kept as written.

    Groups stay groups: what `attn` holds depends on the architecture, so it is expanded only
    against one (`expand_components`).

    Raises:
        ValueError: a name that is neither a component nor a group, or no name at all.
    """
    if isinstance(words, str):
        names = [word.strip() for word in words.split("+")]
    elif not isinstance(words, Sequence):
        raise ValueError(
            f"components={words!r} is a {type(words).__name__}. "
            'Write names, as "o + mlp" or ["o", "mlp"].'
        )
    else:
        names = [str(word).strip() for word in words]
    if not names or not all(names):
        raise ValueError(
            f"components={brief(words)} names no component. Write one or more of {_vocabulary()}, "
            'as "o + mlp" or ["o", "mlp"].'
        )
    known = [*Component, *GROUPS]
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown component {brief(name)}. Allowed: {_vocabulary()}.{suggest(name, known)}"
            )
    return tuple(dict.fromkeys(names))


def _vocabulary() -> str:
    return f"{' '.join(Component)} (groups: {' '.join(GROUPS)})"


def expand_components(
    names: Sequence[str], available: Sequence[Component], architecture: str
) -> tuple[Component, ...]:
    """The components of one architecture that `names` select, in the vocabulary's order.

    A group gives those of its members that the architecture has; a component named by itself
    must be there.

    Raises:
        ValueError: a named component that the architecture lacks, or a group that is empty there.
    """
    chosen: set[Component] = set()
    for name in names:
        if name in GROUPS:
            members = set(GROUPS[name]) & set(available)
            if not members:
                raise ValueError(
                    f"component group {name!r} is empty in {architecture}, "
                    f"whose components are: {' '.join(available)}. Leave it out."
                )
            chosen |= members
        elif name not in available:
            raise ValueError(
                f"{architecture} has no component {name!r}. "
                f"Its components are: {' '.join(available)}. Leave it out of the graft."
            )
        else:
            chosen.add(Component(name))
    return tuple(c for c in Component if c in chosen)


def layer_group(name: str, n_layers: int) -> tuple[int, ...]:
    """The layers of a named group, for a model of `n_layers` layers.

    Each family (halves, quarters, eighths) cuts `range(n_layers)` at `round-down(i * n / parts)`,
    so it partitions the layers exactly at any depth; where there are fewer layers than parts, some
    groups are empty.

    Raises:
        ValueError: an unknown group name.
    """
    if name not in LAYER_GROUPS:
        raise ValueError(
            f"unknown layer group {brief(name)}. Allowed: {' '.join(LAYER_GROUPS)}, or layer "
            f'numbers such as 3 or "8-15".{suggest(name, LAYER_GROUPS)}'
        )
    part, parts = LAYER_GROUPS[name]
    return tuple(range(part * n_layers // parts, (part + 1) * n_layers // parts))


#: Layers and heads are numbered below this: far beyond every model, but a range is written out.
MAX_NUMBER = 10_000

_RANGE = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    """`"3"`, `"8-15"` (both ends in) or `"0,2-4"` as a sorted tuple of distinct numbers.

    Raises:
        ValueError: anything else, a range that runs backwards, or numbers of `MAX_NUMBER` and more;
            `what` names the argument.
    """
    numbers: set[int] = set()
    written = 0
    for piece in (p.strip() for p in text.split(",")):
        match = _RANGE.fullmatch(piece)
        if match is None:
            raise ValueError(
                f"{what}={brief(text)}: {brief(piece)} is no number or range. "
                'Write numbers and inclusive ranges, such as "3", "8-15" or "0,2-4".'
            )
        ends = [end for end in match.groups() if end]
        for end in ends:
            # A very long text is not read: that would take the square of its length.
            if len(end) > 9 or int(end) >= MAX_NUMBER:
                raise too_many(piece, what)
        low, high = int(ends[0]), int(ends[-1])
        if high < low:
            raise ValueError(
                f"{what}={text!r}: the range {piece!r} runs backwards. Write it as {high}-{low}."
            )
        written += high - low + 1
        if written > MAX_NUMBER:
            raise too_many(text, what)
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def too_many(number: object, what: str) -> ValueError:
    """What is said of a layer or head that no model has, before a range to it is written out."""
    return ValueError(
        f"{what}={brief(number)}: no model has {MAX_NUMBER:,} {what}. Write lower numbers, and "
        "fewer."
    )


def format_numbers(numbers: Sequence[int]) -> str:
    """The shortest text that `parse_numbers` reads back: `(0, 2, 3, 4)` is `"0,2-4"`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
