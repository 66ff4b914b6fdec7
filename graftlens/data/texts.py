"""Texts from files, as a person sees them."""

import re
from pathlib import Path

from graftlens.folder import parse_json, read_text

#: Suffixes of the files that `read_texts` reads, in lower or upper case.
TEXT_FILES = (".txt", ".jsonl")

# What ends a line on a screen or a page; what on a line leaves it blank: white space, and what
# nobody sees though it is not white space to Python (zero-width characters; a byte order mark
# inside a file, where files were joined).
_BREAK = r"\n\x0b\x0c\x85\u2028"
_BLANK = rf"(?:[^\S{_BREAK}\u2029]|[\u200b\u2060\ufeff])*"
_GAP = re.compile(rf"(?:[{_BREAK}]{_BLANK}){{2,}}|\u2029")
_EDGE = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"


def check_ending(name: str, file: Path) -> None:
    """Whether `read_texts` would read the file, which need not exist yet.

    Args:
        name: name of the setting that names the file.
        file: the file.

    Raises:
        ValueError: the file is of another kind.
    """
    if file.suffix.lower() not in TEXT_FILES:
        raise ValueError(
            f"{name}={str(file)!r} ends in {file.suffix!r}, but .txt (paragraphs) and .jsonl "
            "(objects with a text) are read. Convert it."
        )


def read_texts(file: Path, column: str = "text") -> list[str]:
    """The texts of a UTF-8 file: ``.jsonl``, an object with a text in each line, or paragraphs.

    Args:
        file: the file.
        column: the key of the texts in a ``.jsonl`` file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: another encoding, or a line that is not such an object.
    """
    return _objects(file, column) if file.suffix.lower() == ".jsonl" else read_paragraphs(file)


def read_paragraphs(file: Path) -> list[str]:
    """The paragraphs of a UTF-8 text, whatever the file's name: split at lines that look blank.

    Raises:
        OSError: a file that cannot be read.
        ValueError: another encoding.
    """
    pieces = (piece.strip(_EDGE) for piece in _GAP.split(read_text(file)))
    return [piece.replace("\n\ufeff", "\n") for piece in pieces if piece]


def _objects(file: Path, column: str) -> list[str]:
    texts = []
    # Not splitlines: it would split at separators that may occur inside a JSON string.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.lstrip("\ufeff")
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = parse_json(line, where)
        except ValueError as error:
            raise ValueError(f'{error} Each line is an object such as {{"text": "…"}}.') from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            there = " ".join(row) if isinstance(row, dict) else ""
            keys = f" Its keys are: {there}. Name that of the texts: column." if there else ""
            raise ValueError(
                f"{where} has no {column}. Each line is an object such as "
                f'{{"{column}": "…"}}; other keys are ignored.{keys}'
            )
        texts.append(row[column])
    return texts
