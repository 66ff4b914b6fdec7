"""The words that users read: none of those that made native readers stumble comes back."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What was written once, and what is written now.
STUMBLES = {
    r"(?<!there )\b(?:is|are) no (?!longer\b|more\b|one\b|other\b)": "is not a …, or there is no …",
    r"\bnats a (?:token|prompt)\b": "nats per token",
    r"\b(?:rows|prompts|tokens|texts|grafts|seconds|numbers|answers) a "
    r"(?:token|prompt|text|row|fact|pass|graft|cell|site|second)\b(?! is)": "rows per pass, …",
    r"\bstands? twice\b": "appears twice",
    r"\b(?:go|goes|going) by (?:its|their) own\b": "is keyed by its text",
    r"\b(?:made?|making|load(?:ed)?|built|build|drawn|cut|dealt|trained) (?:it )?anew\b": "rebuilt",
    r"\b(?:be|been) had\b(?! )": "could not be obtained",
    r"\bcould (?:not )?be had\b": "could not be obtained",
    r"\b[Mm]end(?:s|ed)?\b": "fix",
    r"\bfor want of\b": "because … is missing",
    r"\bis at it already\b": "is already running",
    r"\bin vain\b": "useless",
    r"\bwas begun\b": "was started",
    r"\bthere already\b": "already exists",
    r"\bis not there\b": "does not exist",
    r"\bleft as it is\b": "left untouched",
    r"\bare held against\b": "are compared with",
    r"(?<!the )\binside of\b": "inside",
    r"\bgives? other (?:logits|tokens|numbers)\b": "gives different logits",
    r"\bgive the (?:same )?command again\b": "run the same command again",
    r"\bsays nothing of\b": "says nothing about",
    r"\bare the most\.": "at most … are allowed",
    r"\b(?:is|was|were) made of another\b": "was made from another",
    r"\b\d* ?reasons more\b": "more reasons",
}

#: Written to a language model, whose rewrites are data.
DATA = ("Write the following article anew.",)


def in_python(path: Path) -> Iterator[tuple[int, str]]:
    """Every text and comment of a module, with its line; f-strings with … for their values."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            yield node.lineno, "".join(map(str, texts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")


def in_notebook(path: Path) -> Iterator[tuple[int, str]]:
    """The cells' own texts, with the cell's number."""
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        yield number, "".join(cell["source"])


def in_text(path: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


READERS = {
    **dict.fromkeys(sorted(ROOT.glob("graftlens/**/*.py")), in_python),
    **dict.fromkeys(sorted(ROOT.glob("experiments/**/*.py")), in_python),
    **dict.fromkeys(sorted(ROOT.glob("notebooks/*.ipynb")), in_notebook),
    **{
        path: in_text
        for pattern in (
            "*.md",
            "docs/**/*.md",
            "experiments/**/*.md",
            "experiments/**/*.yaml",
            "graftlens/**/*.html",
        )
        for path in sorted(ROOT.glob(pattern))
    },
}


def stumbles(texts: Iterator[tuple[int, str]]) -> list[str]:
    """A line for each place with words of `STUMBLES`."""
    found = []
    for number, text in texts:
        flat = " ".join(text.split())
        if flat.startswith(DATA):
            continue
        for pattern, better in STUMBLES.items():
            for match in re.finditer(pattern, flat):
                near = flat[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{number}: …{near}… (write: {better})")
    return found


@pytest.mark.parametrize("folder", ["graftlens", "experiments", "notebooks", "docs", "."])
def test_texts_read_well(folder: str) -> None:
    """Docs, docstrings, comments and messages, of the whole project."""
    paths = [
        p for p in READERS if p.relative_to(ROOT).parts[0] == folder or p.parent == ROOT / folder
    ]
    assert paths
    found = [f"{p.relative_to(ROOT)}:{line}" for p in paths for line in stumbles(READERS[p](p))]
    assert not found, "\n" + "\n".join(found)


def test_the_patterns_find_what_they_name() -> None:
    once = {
        "'x' is no graft. Give a Graft": True,
        "there is no folder here": False,
        "3.1 nats a token": True,
        "the key 'a' stands twice": True,
        "grafts that go by their own texts": True,
        "Load it anew, or give its folder": False,
        "it is made anew": True,
        "SmolLM2 could not be had.": True,
        "Mend it and run it again": True,
        "amended": False,
        "(often for want of memory)": True,
        "Slurm job 3 is at it already": True,
        "the hub would be asked in vain": True,
        "40 rows a pass": True,
        "a prompt is no longer than that": False,
    }
    for text, wanted in once.items():
        assert bool(stumbles(iter([(1, text)]))) == wanted, text
