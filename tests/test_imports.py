"""The import direction of the design, read out of the source files."""

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "graftlens"

#: Lowest first: a module imports from its own layer and from those before it.
LAYERS = (
    "components",
    "positions",
    "graft",
    "references",
    "prompts",
    "model",
    "memory",
    "planner",
    "lens",
    "outcomes",
    "sweep",
    "evaluation",
    "find",
    "dashboards",
    "textreports",
    "reports",
    "demo",
    "experiment",
    "cli",
    "__main__",
)
#: Parts that stand beside the layers, and what they may never import.
BESIDE = {
    "chat": {"prompts", "model", "sweep", "cli", "viz"},
    "chatrendering": {"prompts", "model", "sweep", "cli", "viz"},
    "chatturns": {"prompts", "model", "sweep", "cli", "viz"},
    "checkpoints": {"sweep", "cli", "viz"},
    "configfile": {"data", "finetune", "model", "sweep", "cli", "viz"},
    "data": {"sweep", "cli", "viz"},
    "datacommands": {"finetune", "model", "sweep", "cli", "viz"},
    "engines": {"sweep", "finetune", "model", "cli", "viz"},
    "finetune": {"sweep", "cli", "viz"},
    "finetuned": {"finetune", "model", "sweep", "cli", "viz"},
    "folder": {"data", "finetune", "model", "sweep", "cli", "viz"},
    "locks": {"data", "finetune", "model", "sweep", "cli", "viz"},
    "metrics": {"sweep", "cli", "viz"},
    "plainyaml": {"graft", "data", "finetune", "model", "sweep", "cli", "viz"},
    "perplexity": {"finetune", "sweep", "cli", "viz"},
    "presets": {"model", "sweep", "cli", "viz"},
    "processes": {"model", "sweep", "cli", "viz"},
    "recipes": {"finetune", "model", "sweep", "cli", "viz"},
    "shipped": {"data", "finetune", "model", "sweep", "cli", "viz"},
    "runfolder": {"finetune", "model", "sweep", "cli", "viz"},
    "stats": {"sweep", "cli", "viz"},
    "training": {"finetune", "sweep", "cli", "viz"},
    "trainingtexts": {"finetune", "model", "sweep", "cli", "viz"},
    "viz": {"sweep", "cli"},
}
#: Outside packages that only these parts may import. `cli` gets them through the parts it calls.
ONLY_IN = {
    "transformer_lens": {"model", "lens"},
    "transformers": {"model", "outcomes", "training"},
    "plotly": {"viz"},
    "kaleido": {"viz"},
    "circuitsvis": {"viz"},
}


FILES = {
    path: "/".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: A module's name -> its file.
MODULES = {
    f"graftlens.{name.replace('/', '.')}".removesuffix(".__init__"): path
    for path, name in FILES.items()
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write it from graftlens on"
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else {base, *names}
    return found


def part(module: str) -> str:
    """`graftlens.model.mask` belongs to `model`."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=FILES.get)
def test_imports_point_one_way(path: Path) -> None:
    own = FILES[path].split("/")[0]
    found = imports(path)
    for package, parts in ONLY_IN.items():
        used = [m for m in found if m.split(".")[0] == package]
        assert not used or own in parts, f"{own} imports {used}: only {sorted(parts)} may"
    inner = {part(m) for m in found if m.split(".")[0] == "graftlens"} - {""}
    assert not inner & BESIDE.get(own, set()), f"{own} imports {inner}"
    if own in LAYERS:
        above = set(LAYERS[LAYERS.index(own) + 1 :])
        assert not inner & above, f"{own} imports {sorted(inner & above)}, which build on it"
        shows = ("dashboards", "textreports", "reports", "demo", "experiment", "cli")
        assert own in shows or "viz" not in inner, f"{own} imports plots; plots import results"


def _bound(node: ast.AST) -> str | None:
    """The name that a node gives to something, in whatever scope."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return name
        case ast.alias(name=name, asname=other):
            return other or name.split(".")[0]
        case ast.arg(arg=name) | ast.MatchMapping(rest=name):
            return name
        case (
            ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.ClassDef(name=name)
            | ast.ExceptHandler(name=name)
            | ast.MatchAs(name=name)
            | ast.MatchStar(name=name)
        ):
            return name
    return None


@pytest.mark.parametrize("folder", ["graftlens", "tests", "experiments", "notebooks", "docs"])
def test_every_name_is_one_that_its_module_knows(folder: str) -> None:
    """Ruff and mypy would take the words of shape strings for names, so neither looks for names
    that nothing defines: an import was lost, and every experiment ended in a NameError."""
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        known = {*dir(builtins), "__file__", *map(_bound, nodes)}
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert not used - known, f"{path.relative_to(PACKAGE.parent)}: {sorted(used - known)}"


def test_every_part_has_a_rule() -> None:
    parts = {name.split("/")[0] for name in FILES.values()} - {"__init__"}
    assert parts == {*LAYERS, *BESIDE}


def test_no_module_is_longer_than_one_sitting() -> None:
    lines = {name: len(path.read_text().splitlines()) for path, name in FILES.items()}
    assert len(lines) > 50
    assert not {name: count for name, count in lines.items() if count > 700}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not in functions or under TYPE_CHECKING either, which only hide one.

    The package itself is left out: it loads its names when they are asked for.
    """
    inner = MODULES.keys() - {"graftlens"}
    reads = {name: imports(MODULES[name]) & inner for name in inner}
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' → '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for read in sorted(reads[name]):
                follow(read, (*way, name))
            done.add(name)

    for name in sorted(inner):
        follow(name, ())


@pytest.mark.parametrize("name", ["components", "graft", "references", "prompts", "stats"])
def test_the_values_load_without_the_heavy_packages(name: str) -> None:
    """A notebook that only writes grafts, or a cluster job that only plans, starts at once."""
    everything = f"import sys; from graftlens.{name} import *"
    program = f"{everything}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "transformers", "transformer_lens", "plotly", "circuitsvis", "datasets"}
    assert not heavy & set(loaded)
