"""The code that README and docs/ show: its blocks, and what each is."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent

#: README and the pages of docs/, by their names in the repository.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    number: int
    """Of the page's blocks, from 0."""
    language: str
    note: str
    """The comment in the line above: `not run: WHY`, or of YAML what it configures."""
    text: str


def blocks(page: str, language: str | None = None, *, within: str | None = None) -> list[Block]:
    """A page's blocks, of one language if that is given, between two markers if they are."""
    text = PAGES[page]
    if within is not None:
        text = text.split(f"<!-- {within} -->")[1].split(f"<!-- /{within} -->")[0]
    pattern = r"^(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, text, flags=re.M | re.S)
    every = [Block(page, i, lang, note, body) for i, (note, lang, body) in enumerate(found)]
    return [b for b in every if language in (None, b.language)]


def marked(page: str, name: str) -> str:
    """The text of the only block between a page's markers `name`."""
    (block,) = blocks(page, within=name)
    return block.text


def module(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
