"""What the site has beside the pages of docs/: the API reference, a page for each public package,
and the files of the repository that pages link to, so that links work here as in a checkout."""

import ast
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

#: Where in the site the repository's files go.
REPOSITORY = "repository"

#: Title and introduction of each public package's page.
PACKAGES = {
    "graftlens": "Models, grafts, prompts, sweeps, and what runs them.",
    "graftlens.data": "Facts, and the texts and questions made of them.",
    "graftlens.find": "Which places matter: attribution, searches, interactions, planted truth.",
    "graftlens.lens": "What grafted runs compute where.",
    "graftlens.outcomes": "Texts generated under grafts, and what is measured of them.",
    "graftlens.stats": "Intervals, paired comparisons, stability.",
    "graftlens.viz": "Charts, tables and pages.",
    "graftlens.model": "The parts of a grafted model.",
}

#: Searches show explanations before the reference and the repository's files.
BEHIND = {"boost": 0.3}

#: A docstring's section on what is returned, up to the next one.
RETURNS = re.compile(r"^Returns:\n((?:    .*(?:\n|\Z)|\n)+)", re.M)

#: A Markdown link or picture with a relative address.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


class Returns(Extension):
    """What a function returns is prose, in which a colon does not end a type."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = RETURNS.sub(_as_prose, obj.docstring.value)


def _as_prose(section: re.Match[str]) -> str:
    return f"**Returns:**\n\n{textwrap.dedent(section[1])}"


def public(package: str) -> list[str]:
    """Names that a package's stub exports, without the public packages below it."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    names = [
        alias.asname or alias.name
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return [name for name in names if f"{package}.{name}" not in PACKAGES]


def reference(package: str) -> str:
    """The Markdown of a package's page."""
    entries = [f"::: {package}.{name}\n" for name in sorted(public(package), key=str.lower)]
    return "\n".join([f"# {package}\n", f"{PACKAGES[package]}\n", *entries])


def linked(page: Path, seen: set[Path]) -> Iterator[Path]:
    """Files outside docs/ that a Markdown file links to, and those that they link to."""
    for address in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / address).resolve()
        inside = file.is_relative_to(ROOT / "docs") or not file.is_relative_to(ROOT)
        if inside or file in seen or not file.is_file():
            continue
        seen.add(file)
        yield file
        if file.suffix == ".md":
            yield from linked(file, seen)


def on_files(files: Files, config: Any) -> Files:
    for package in PACKAGES:
        content = reference(package)
        files.append(File.generated(config, f"api/{package}.md", content=content))
    seen: set[Path] = set()
    for page in [f for f in files.documentation_pages() if f.abs_src_path]:
        for file in linked(Path(page.abs_src_path), seen):
            name = f"{REPOSITORY}/{file.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that leave docs/ go to the site's copy of the repository."""
    here = posixpath.dirname(page.file.src_uri)
    copied = page.file.src_uri.startswith(f"{REPOSITORY}/")
    if copied or page.file.src_uri.startswith("api/"):
        page.meta["search"] = BEHIND

    def site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        if copied and target.startswith(f"{REPOSITORY}/docs/"):
            target = target.removeprefix(f"{REPOSITORY}/docs/")
        elif target.startswith("../"):
            target = posixpath.join(REPOSITORY, target.removeprefix("../"))
        else:
            return match[1]
        return posixpath.relpath(target, here)

    return LINK.sub(site, markdown)
