"""Position expressions evaluated a second time, as Python sets, straight from their text.

Slow, and written apart from the library's parser and arrays, so that the two can be compared.
"""

import re
from collections.abc import Mapping, Sequence

Spans = Mapping[str, Sequence[Sequence[int]]]


def evaluate(text: str, spans: Spans, length: int) -> set[int]:
    """The positions an expression means, worked out without the library's parser or arrays."""
    everything = set(range(length))
    rest = text.replace(" ", "")

    def union() -> set[int]:
        nonlocal rest
        found = intersection()
        while rest.startswith("+"):
            rest = rest[1:]
            found = found | intersection()
        return found

    def intersection() -> set[int]:
        nonlocal rest
        found = atom()
        while rest.startswith("&"):
            rest = rest[1:]
            found = found & atom()
        return found

    def atom() -> set[int]:
        nonlocal rest
        if rest.startswith("~"):
            rest = rest[1:]
            return everything - atom()
        if rest.startswith("("):
            rest = rest[1:]
            found = union()
            assert rest.startswith(")")
            rest = rest[1:]
            return found
        if rest.startswith("["):
            inside, rest = rest[1:].split("]", 1)
            return {int(n) + length if int(n) < 0 else int(n) for n in inside.split(",")}
        match = re.match(r"\w+", rest)
        assert match is not None, rest
        name, rest = match[0], rest[match.end() :]
        occurrences = spans[name]
        if rest.startswith("#"):
            digits = re.match(r"#(-?)(\d+)", rest)
            assert digits is not None, rest
            rest = rest[digits.end() :]
            ordered = occurrences[::-1] if digits[1] else occurrences
            occurrences = (ordered[int(digits[2]) - 1],)
        return {position for tokens in occurrences for position in tokens}

    result = union()
    assert not rest, rest
    return result
