"""What is public is what the packages export, and README, docs/ and the notebooks use nothing
else."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest
from shown import PAGES, ROOT, blocks

import graftlens

PARTS = ("", ".data", ".find", ".lens", ".outcomes", ".viz", ".stats", ".model")
PUBLIC = tuple(f"graftlens{part}" for part in PARTS)


def code() -> dict[str, str]:
    """Where -> Python that users are shown."""
    shown = {f"{b.page} block {b.number}": b.text for page in PAGES for b in blocks(page, "python")}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        shown[path.name] = "\n".join(sources)
    return shown


def used(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything of graftlens that some code imports, or takes from a module."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "graftlens":
                    bound = alias.asname or "graftlens"
                    modules[bound] = alias.name if alias.asname else bound
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graftlens":
            for alias in node.names:
                yield str(node.module), alias.name
                if f"{node.module}.{alias.name}" in PUBLIC:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None:
                yield module, node.attr


def is_public(module: str, name: str) -> bool:
    if module not in PUBLIC:
        return False
    return name in ("", "__version__", *import_module(module).__all__)


@pytest.mark.parametrize("where", code())
def test_what_is_shown_uses_public_names_only(where: str) -> None:
    found = set(used(ast.parse(code()[where])))
    assert not {f"{module} {name}" for module, name in found if not is_public(module, name)}


def test_what_is_shown_is_read() -> None:
    """Of the test itself: it sees imports, attributes of modules, and what is not public."""
    shown = {pair for text in code().values() for pair in used(ast.parse(text))}
    assert {("graftlens", "evaluate"), ("graftlens.viz", "heatmap")} <= shown
    program = "from graftlens import lens as l, viz\nimport graftlens.graft\nl.tidy\nviz.heatmap"
    found = set(used(ast.parse(program)))
    private = {("graftlens.graft", ""), ("graftlens.lens", "tidy")}
    assert {pair for pair in found if not is_public(*pair)} == private


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_docs_are_public(page: str) -> None:
    for module, name in re.findall(r"\b(graftlens(?:\.\w+)*)\.([A-Za-z_]\w*)\(", PAGES[page]):
        assert is_public(module, name), f"{module}.{name}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there_and_says_what_it_is(module: str) -> None:
    package = import_module(module)
    names = package.__all__
    assert sorted(set(names)) == sorted(names)
    for name in names:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__module__.startswith("graftlens."), f"{module}.{name}"
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = package.nothing_of_the_kind


def test_everything_of_graftlens_at_once() -> None:
    """In a fresh interpreter, after modules that are called as their functions were imported."""
    program = (
        "import graftlens.lens.patching, graftlens.evaluation\n"
        "from graftlens import *\n"
        "print(lens.patching.__name__, viz.heatmap.__name__, data.make_facts.__name__,"
        " evaluate.__name__, graftlens.evaluate is evaluate)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["patching", "heatmap", "make_facts", "evaluate", "True"]
    assert {"lens", "outcomes", "viz", "data"} <= set(graftlens.__all__)
