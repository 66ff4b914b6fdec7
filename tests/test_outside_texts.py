"""Texts read as a person sees them, or refused by name: what outside files broke."""

from pathlib import Path

import pytest
from datasets import Dataset
from pydantic import ValidationError

from graftlens.data.supplement import Supplement, mixed
from graftlens.data.texts import check_ending, read_paragraphs, read_texts
from graftlens.recipes import TrainingData
from graftlens.trainingtexts import training_texts_of

BOM = "\ufeff"


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "blank", ["", " ", " \t ", "\u3000", "\u00a0", "\x0c", "\u200b", BOM, " " * 300]
)
def test_a_line_that_looks_blank_parts_two_texts(blank: str, end: str, tmp_path: Path) -> None:
    """A line of spaces between two texts made one text of them."""
    path = written(tmp_path / "a.txt", f"One{end}goes on.{end}{blank}{end}Two.{end}{blank}{end}")
    assert read_paragraphs(path) == ["One\ngoes on.", "Two."]


def test_marks_of_the_byte_order_are_not_trained_on(tmp_path: Path) -> None:
    """At the beginning, and where files were put together."""
    path = written(tmp_path / "a.txt", f"{BOM}One.\n\n{BOM}Two\n{BOM}lines.\n")
    assert read_texts(path) == ["One.", "Two\nlines."]
    path = written(tmp_path / "a.jsonl", f'{BOM}{{"text": "One."}}\r\n{BOM}{{"text": "Two."}}')
    assert read_texts(path) == ["One.", "Two."]


def test_unicode_has_separators_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "One\u2028goes on.\u2029Two.\u2028\u2028Three.\x0b\x85Four")
    assert read_texts(path) == ["One\u2028goes on.", "Two.", "Three.", "Four"]


def test_a_long_run_of_spaces_takes_no_long_time(tmp_path: Path) -> None:
    """A pattern that begins again at each space would take minutes for this."""
    line = f"a{' ' * 300_000}b"
    assert read_texts(written(tmp_path / "a.txt", f"{line}\n\n{line}")) == [line, line]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1e"])
def test_separators_inside_json_texts_cut_no_line(separator: str, tmp_path: Path) -> None:
    quoted = separator if separator > "\x1f" else f"\\u{ord(separator):04x}"
    path = written(tmp_path / "a.jsonl", f'{{"text": "One{quoted}more."}}\n{{"text": "Two."}}\n')
    assert read_texts(path) == [f"One{separator}more.", "Two."]


@pytest.mark.parametrize("name", ["p.JSONL", "p.Jsonl", "p.jsonl"])
def test_endings_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    """p.JSONL was read as paragraphs."""
    path = written(tmp_path / name, '{"text": "One."}\n{"text": "Two."}\n')
    check_ending("file", path)
    assert read_texts(path) == ["One.", "Two."]
    assert training_texts_of(TrainingData(file=path))["text"][:] == ["One.", "Two."]
    supplement = Supplement(file=path, share=0.5)
    assert len(mixed(Dataset.from_dict({"text": ["a", "b"]}), supplement, 0)) == 4
    assert read_texts(written(tmp_path / "p.TXT", "One.\n\nTwo.")) == ["One.", "Two."]
    with pytest.raises(ValidationError, match=r"ends in '\.CSV', but \.txt"):
        TrainingData(file=tmp_path / "p.CSV")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift-jis"]
)
def test_other_encodings_are_refused_by_name(encoding: str, name: str, tmp_path: Path) -> None:
    """UTF-16 without a mark is valid UTF-8, with a NUL beside each letter."""
    text = "日本" if encoding == "shift-jis" else "café"
    path = written(tmp_path / name, f'{{"text": "{text}"}}\n', encoding)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text \(byte \d+ is .*Save it as U"):
        read_texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "text": "b"}', r"line 2: the key 'text' appears twice\. Leave one"),
        ('{"text": "a", "x": {"k": 1, "k": 2}}', r"line 2: the key 'k' appears twice"),
        ("{'text': 'a'}", r"line 2 is not JSON .* Each line is an object such as"),
        ('{"text": null}', r"line 2 has no text"),
        ('["text"]', r"line 2 has no text"),
        ("null", r"line 2 has no text"),
        ('{"text": "half \\ud83d"}', r"line 2 contains half of a character \(\\ud83d\)"),
        ("[" * 100_000, r"line 2 is nested too deeply"),
    ],
)
def test_lines_that_are_not_right(line: str, message: str, tmp_path: Path) -> None:
    """A key that appears twice had its last value; half a character ended in a TypeError."""
    path = written(tmp_path / "a.jsonl", f'{{"text": "One."}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        read_texts(path)
