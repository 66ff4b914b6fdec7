"""Run the notebooks in place and keep their outputs small: `python notebooks/run.py [NAMES…]`.

Kernels run in the working directory, where `graftlens demo` left its model. What is kept:

- a plotly figure as one PNG, because GitHub shows nothing else of it;
- an HTML output of more than `HTML_LIMIT` bytes (a dashboard) as a PNG of that page;
- no progress bars, times or machine's versions, so that a second run on one machine gives an equal
  file.

Pictures need the extra `notebooks` and a Chrome or Chromium.
"""

import asyncio
import base64
import contextlib
import html
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import nbformat
    from nbclient import NotebookClient
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is not installed: running the notebooks needs the extra `notebooks`. "
        "In a clone: .venv/bin/pip install -c constraints.txt -e '.[notebooks]'"
    )

FOLDER = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"

#: Bytes of an HTML output beyond which a picture takes its place.
HTML_LIMIT = 50_000
#: Bytes of a notebook.
FILE_LIMIT = 500_000
#: Seconds that one cell may take.
PATIENCE = 900

#: What a kernel's environment has beside the caller's. Without ipywidgets tqdm warns, also if off.
ENVIRONMENT = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TQDM_DISABLE": "1",
}

#: Figures: width in pixels, and pixels of the picture for each. Pages: the same, and the height.
FIGURE_WIDTH, FIGURE_SCALE = 900, 1.5
PAGE_WIDTH, PAGE_HEIGHT, PAGE_SCALE = 1100, 1200, 1.25

#: Paths that belong to one machine.
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|tmp|Users|usr|opt|var|mnt|work)/\w")

#: Where an object lies in memory.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks with these names (`1_first_graft` or `1_first_graft.ipynb`), or all.

    Raises:
        ValueError: a name that no notebook has.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no notebook {name!r}. There are: {' '.join(known)}.")
    return [known[name] for name in wanted]


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells of a notebook, with `folder` as working directory; outputs go into it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails; the message has its traceback.
    """
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    with _environment(ENVIRONMENT):
        client.execute()


def failures(notebook: Any) -> list[str]:
    """What no run should produce: errors and warnings."""
    found = []
    for number, output in _outputs(notebook):
        if output.output_type == "error":
            found.append(f"cell {number} failed: {output.ename}: {output.evalue}")
        if output.get("name") == "stderr":
            found.append(f"cell {number} wrote to stderr: {output.text[:500]}")
    return found


def excesses(notebook: Any) -> list[str]:
    """What a repository should not contain: paths of one machine, and large pages."""
    found = []
    for number, output in _outputs(notebook):
        for kind, text in _texts(output).items():
            if path := MACHINE_PATH.search(text):
                around = text[path.start() : path.start() + 60]
                found.append(f"cell {number} shows a path of this machine: {around!r}")
            if kind == "text/html" and len(text.encode()) > HTML_LIMIT:
                found.append(f"cell {number} has {len(text.encode())} bytes of HTML")
    return found


def tidy(notebook: Any) -> None:
    """Large outputs become pictures, and what differs between machines is removed."""
    figures = [output.data for _, output in _outputs(notebook) if PLOTLY in output.get("data", {})]
    pictures = asyncio.run(_drawn([data.pop(PLOTLY) for data in figures])) if figures else []
    for data, picture in zip(figures, pictures, strict=True):
        data.clear()
        data["image/png"] = _small(picture)
    for _, output in _outputs(notebook):
        data = output.get("data", {})
        if len(data.get("text/html", "").encode()) > HTML_LIMIT:
            page = data.pop("text/html")
            if "image/png" not in data:
                data["image/png"] = _small(_photographed(page))
        if "text/plain" in data:
            data["text/plain"] = ADDRESS.sub("", data["text/plain"])
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main(names: Sequence[str]) -> int:
    """Run the notebooks in place; a notebook with a problem is left as it was."""
    failed = 0
    for path in notebooks(names):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook, Path.cwd())
        tidy(notebook)
        text = nbformat.writes(notebook) + "\n"
        found = failures(notebook) + excesses(notebook)
        if len(text.encode()) > FILE_LIMIT:
            found.append(f"{len(text.encode())} bytes; a notebook has at most {FILE_LIMIT}")
        for problem in found:
            print(f"{path.name}: {problem}", file=sys.stderr)
        if found:
            failed += 1
            continue
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text.encode()) // 1000} kB")
    return 1 if failed else 0


def _outputs(notebook: Any) -> Iterator[tuple[int, Any]]:
    """Every output with the number of its cell."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            yield number, output


def _texts(output: Any) -> dict[str, str]:
    """Everything readable that an output shows, by its kind."""
    found = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
    if "text" in output:
        found["stream"] = output.text
    return {kind: t if isinstance(t, str) else json.dumps(t) for kind, t in found.items()}


async def _drawn(figures: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Pictures of figures, by one browser."""
    import kaleido

    # MathJax would be loaded from the network, and no label here is mathematics.
    async with kaleido.Kaleido(mathjax=False) as browser:
        options = {"format": "png", "width": FIGURE_WIDTH, "scale": FIGURE_SCALE}
        return [
            await browser.calc_fig({"data": f["data"], "layout": _white(f["layout"])}, opts=options)
            for f in figures
        ]


def _white(layout: Mapping[str, Any]) -> dict[str, Any]:
    """A figure without a background of its own would be unreadable on GitHub's dark pages."""
    ground = {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}
    return {"height": 430, **layout, **ground}


def _photographed(page: str) -> bytes:
    """A PNG of the top of a page; of a page inside a frame, of that page."""
    from graftlens.viz.screenshot import screenshot

    inside = re.match(r'\s*<iframe srcdoc="([^"]*)"', page)
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "page.html"), Path(folder, "page.png")
        file.write_text(html.unescape(inside[1]) if inside else page, encoding="utf-8")
        screenshot(file, picture, width=PAGE_WIDTH, height=PAGE_HEIGHT, scale=PAGE_SCALE)
        return picture.read_bytes()


def _small(picture: bytes) -> str:
    """A PNG of 256 colours, in base64: a third of what a browser writes, and looks the same.

    Colours are chosen to cover the range, not by how often they occur: the few pixels that say
    which run is which keep their colour.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    cover, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    written = io.BytesIO()
    image.quantize(256, method=cover, dither=plain).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that a kernel started inside inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
