"""Texts out of files."""

import json
from pathlib import Path

#: Endings of the files that `read_texts` reads.
TEXT_FILES = (".txt", ".jsonl")


def check_ending(name: str, file: Path) -> None:
    """Whether `read_texts` would read the file, which need not be there yet.

    Args:
        name: of the setting that names the file.
        file: the file.

    Raises:
        ValueError: it is of another kind.
    """
    if file.suffix not in TEXT_FILES:
        raise ValueError(
            f"{name}={str(file)!r} ends in {file.suffix!r}, but .txt (paragraphs) and .jsonl "
            "(objects with a text) are read. Convert it."
        )


def read_texts(file: Path) -> list[str]:
    """The texts of a UTF-8 file: ``.jsonl``, an object with a ``text`` a line, or paragraphs.

    Raises:
        ValueError: a line that is no such object.
    """
    return _objects(file) if file.suffix == ".jsonl" else read_paragraphs(file)


def read_paragraphs(file: Path) -> list[str]:
    """The blank-line separated paragraphs of a UTF-8 text, whatever the file's name."""
    paragraphs = file.read_text(encoding="utf-8").split("\n\n")
    return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]


def _objects(file: Path) -> list[str]:
    texts = []
    # Not splitlines: it would cut at separators that may stand inside a JSON text.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number} is no JSON ({error.msg}). Each line is an object such as "
                '{"text": "…"}.'
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(
                f"{file}, line {number} has no text. Each line is an object such as "
                '{"text": "…"}; other keys are ignored.'
            )
        texts.append(row["text"])
    return texts
