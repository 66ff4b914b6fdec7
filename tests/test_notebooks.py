"""The notebooks: what is committed, and that every cell of it runs on a tiny pair."""

import ast
import base64
import importlib.util
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from browser import chromium
from nbformat.v4 import new_code_cell, new_notebook, new_output
from needs import needs
from tinybase import FACTS, tiny_base, tiny_finetuned

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

#: What the tiny pair's runs put in place of a notebook's own parameters.
SMALL: dict[str, dict[str, Any]] = {
    "1_first_graft": {"n_facts": FACTS},
    "2_positions": {"n_facts": FACTS, "templates": ["headline", "qa", "with_title"]},
    "3_components_and_layers": {
        "n_facts": FACTS,
        "n_prompts": 4,
        "sizes": [2, 4],
        "stride": 2,
        "out": "sweep",
    },
    "4_looking_inside": {"n_facts": FACTS, "n_prompts": 3},
    "5_your_own_models_and_facts": {"epochs": 3, "out": "finetuned"},
    "6_composing_with_transformerlens": {"n_facts": FACTS, "probed": [0, 7]},
    "7_finding_places": {
        "n_facts": FACTS,
        "held_out": 0.5,
        "n_random": 5,
        "rounds": 1,
        "steps": "auto",
        "page": "found.html",
    },
}

#: One notebook runs in the fast tests; a kernel alone takes some seconds to start.
FAST = "1_first_graft"


def _runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = _runner()


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _tagged(notebook: Any) -> list[Any]:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]


def _assigned(source: str) -> set[str]:
    """The names that a cell gives values to."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _kinds(cell: Any) -> list[set[str]]:
    """What a cell shows, whether a figure or page is still itself or a picture already."""
    shown = []
    for output in cell.outputs:
        if "data" not in output:
            shown.append({str(output.get("name", output.output_type))})
        elif run.PLOTLY in output.data:
            shown.append({"image/png"})
        else:
            large = len(output.data.get("text/html", "")) > run.HTML_LIMIT
            shown.append({"image/png" if k == "text/html" and large else k for k in output.data})
    return shown


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny base, and what it becomes when it is told a few films."""
    base = tiny_base(tmp_path_factory.mktemp("pre"))
    return {"pre": str(base), "sft": str(tiny_finetuned(base, tmp_path_factory.mktemp("sft")))}


@pytest.fixture(scope="module")
def executed(
    pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Any]:
    """A committed notebook as it comes out of a run on the tiny pair, each run once."""

    @cache
    def made(path: Path) -> Any:
        notebook = _read(path)
        (parameters,) = _tagged(notebook)
        names = _assigned(parameters.source)
        values = SMALL[path.stem] | {k: v for k, v in pair.items() if k in names}
        assert set(values) == names, "the test sets each parameter, and no more"
        parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        for cell in _code(notebook):
            cell.outputs = []
        run.execute(notebook, tmp_path_factory.mktemp(path.stem))
        return notebook

    return made


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem == FAST else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_every_cell_runs_on_a_tiny_pair(path: Path, executed: Callable[[Path], Any]) -> None:
    """The cells are the committed ones but for the parameters, and show what those show."""
    notebook = executed(path)
    assert run.failures(notebook) == []
    for before, after in zip(_code(_read(path)), _code(notebook), strict=True):
        assert _kinds(before) == _kinds(after), before.source
    if path.stem == FAST:  # here, since another process would run the notebook again
        _what_is_said_of_logits_is_so(_read(path), notebook)


def _what_is_said_of_logits_is_so(*notebooks: Any) -> None:
    """Before the first grafted token only rounding changes, in any pair; from there on all does."""
    for said in notebooks:
        (cell,) = (c for c in _code(said) if "change = " in c.source)
        lines = cell.outputs[0].text.strip("\n").splitlines()[1:]
        change = [(line.rsplit(" ", 1)[0].strip(), float(line.split()[-1])) for line in lines]
        start = 1 + [token for token, _ in change].index(":")
        assert all(largest < 1e-3 for _, largest in change[:start])
        assert all(largest > 0.01 for _, largest in change[start:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path: Path) -> None:
    notebook = _read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < run.FILE_LIMIT
    assert run.failures(notebook) + run.excesses(notebook) == []
    assert notebook.cells[0].cell_type == "markdown"
    install, parameters = notebook.cells[1:3]
    assert 'if importlib.util.find_spec("graftlens") is None:' in install.source
    assert '"pip", "install", "-q", "graftlens"' in install.source
    needs_demo = "graftlens-runs/demo" in parameters.source
    assert ('"-m", "graftlens", "demo"' in install.source) == needs_demo
    assert _tagged(notebook) == [parameters], "the next cell has the parameters"
    counts = [cell.execution_count for cell in _code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run once, from top to bottom"
    assert sum(len(cell.outputs) for cell in _code(notebook)) >= 5
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_no_functions(path: Path) -> None:
    """What they would define belongs in the library."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    for cell in _code(_read(path)):
        defined = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, kinds)]
        assert not defined, cell.source


def test_notebooks_name_one_another_right() -> None:
    named = set()
    for path in NOTEBOOKS:
        for cell in _read(path).cells:
            named |= set(re.findall(r"\]\(([^)]*\.ipynb)\)", cell.source))
    assert named
    assert named <= {path.name for path in NOTEBOOKS}
    assert sorted(SMALL) == [path.stem for path in NOTEBOOKS]


def _with_output(output: Any) -> Any:
    return new_notebook(cells=[new_code_cell("1", outputs=[output])])


def test_bad_outputs_are_found() -> None:
    error = new_output("error", ename="ValueError", evalue="no span", traceback=[])
    assert run.failures(_with_output(error)) == ["cell 0 failed: ValueError: no span"]
    warned = new_output("stream", name="stderr", text="UserWarning: few prompts")
    assert run.failures(_with_output(warned)) == [
        "cell 0 wrote to stderr: UserWarning: few prompts"
    ]
    for path in ("/home/ann/model", "/tmp/x/sft", "/Users/ann/model"):
        shown = new_output("stream", text=f"model: {path}")
        assert run.excesses(_with_output(shown)) == [
            f"cell 0 shows a path of this machine: {path!r}"
        ]
    fine = new_output("stream", text="notebook-sweep/trust.txt; see https://a.org/home/page; 1/2")
    assert run.excesses(_with_output(fine)) == []
    page = new_output("display_data", {"text/html": "x" * 50_001})
    assert run.excesses(_with_output(page)) == ["cell 0 has 50001 bytes of HTML"]


def test_a_failing_cell_ends_the_run(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    notebook = new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="division by zero"):
        run.execute(notebook, tmp_path)


def test_tidying_keeps_a_picture_and_drops_what_differs_between_runs() -> None:
    picture = base64.b64encode(b"picture").decode()
    data = {"text/html": "x" * 50_001, "image/png": picture, "text/plain": "<View at 0x7fa1>"}
    notebook = _with_output(new_output("display_data", data, metadata={"image/png": {"width": 9}}))
    notebook.cells[0].metadata = {"tags": ["parameters"], "execution": {"started": "today"}}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    run.tidy(notebook)
    (output,) = notebook.cells[0].outputs
    assert output.data == {"image/png": picture, "text/plain": "<View>"}
    assert notebook.cells[0].metadata == {"tags": ["parameters"]}
    assert notebook.metadata["language_info"] == {"name": "python"}


@pytest.mark.slow
def test_figures_and_pages_become_pictures() -> None:
    """Plotly's bundle and a page in a frame are PNGs afterwards, the same ones every time."""
    chromium()
    image = needs("PIL.Image")
    figure = go.Figure(go.Bar(x=["FE", "LT"], y=[0.1, 0.5])).to_plotly_json()
    framed = (
        f'<iframe srcdoc="&lt;body style=&quot;background:#f00&quot;&gt;{"x" * 60_000}"></iframe>'
    )
    first, second = [
        new_notebook(
            cells=[
                new_code_cell(outputs=[new_output("display_data", {run.PLOTLY: figure})]),
                new_code_cell(outputs=[new_output("display_data", {"text/html": framed})]),
            ]
        )
        for _ in range(2)
    ]
    for notebook in (first, second):
        run.tidy(notebook)
    chart, page = (cell.outputs[0].data for cell in first.cells)
    assert list(chart) == list(page) == ["image/png"]
    assert [c.outputs for c in first.cells] == [c.outputs for c in second.cells]
    drawn, shot = (image.open(io.BytesIO(base64.b64decode(d["image/png"]))) for d in (chart, page))
    assert drawn.size == (900 * 1.5, 430 * 1.5)
    assert drawn.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "on white"
    assert shot.convert("RGB").getpixel((0, 0)) == (255, 0, 0), "the page inside the frame"


def test_rare_colours_survive_in_small_pictures() -> None:
    """Choosing colours by how often they occur had merged the marks of two runs into one."""
    image = needs("PIL.Image")
    shades = [(x, x, y) for y in range(200, 256) for x in range(100, 256)]
    picture = image.new("RGB", (156, 56))
    picture.putdata(shades)
    marks = [(242, 182, 47), (11, 127, 97), (63, 143, 220)]
    for number, mark in enumerate(marks):
        picture.putpixel((number, 0), mark)
    written = io.BytesIO()
    picture.save(written, "png")
    small = image.open(io.BytesIO(base64.b64decode(run._small(written.getvalue()))))
    assert len(small.getcolors(256)) <= 256
    for number, mark in enumerate(marks):
        kept = small.convert("RGB").getpixel((number, 0))
        assert max(abs(a - b) for a, b in zip(kept, mark, strict=True)) <= 8


def test_names_choose_notebooks() -> None:
    assert [p.stem for p in run.notebooks(["2_positions", "1_first_graft.ipynb"])] == [
        "2_positions",
        "1_first_graft",
    ]
    assert run.notebooks() == NOTEBOOKS
    with pytest.raises(ValueError, match=r"no notebook '8_more'. There are: 1_first_graft"):
        run.notebooks(["8_more"])
