"""The site of docs/: its pictures, its API reference, and that it builds without a warning."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest
import yaml
from browser import View, look
from shown import PAGES, ROOT, module
from test_public import PUBLIC


def test_the_pictures_are_those_of_their_script(tmp_path: Path) -> None:
    draw = module("draw")
    draw.write(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 2 * len(draw.DRAWINGS)
    assert drawn == sorted(path.name for path in draw.FOLDER.glob("*.svg"))
    for name in drawn:
        assert (draw.FOLDER / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_reference_has_every_public_name() -> None:
    hooks = module("hooks")
    assert set(hooks.PACKAGES) == set(PUBLIC)
    for package in PUBLIC:
        names = {n for n in import_module(package).__all__ if f"{package}.{n}" not in PUBLIC}
        entries = re.findall(rf"^::: {re.escape(package)}\.(\w+)$", hooks.reference(package), re.M)
        assert sorted(entries) == sorted(names - {"__version__"}), package


def test_every_page_is_found_by_the_navigation() -> None:
    """`mkdocs build --strict` says so, too, where it runs."""
    found = re.findall(r": ([\w/.]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert {page for page in found if not page.startswith("api/")} == pages
    assert {page for page in found if page.startswith("api/")} == {f"api/{p}.md" for p in PUBLIC}


def test_workflows_publish_the_site() -> None:
    site = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())
    steps = [step.get("run", "") for step in site["jobs"]["build"]["steps"]]
    assert "python -m mkdocs build --strict" in steps
    assert {"push", "pull_request"} == {*site[True]}, "YAML reads `on` as true"
    assert site["jobs"]["publish"]["if"] == "github.event_name == 'push'"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly(site: Path) -> None:
    for package in PUBLIC:
        page = (site / "api" / package / "index.html").read_text(encoding="utf-8")
        for name in re.findall(r"^::: (\S+)$", module("hooks").reference(package), flags=re.M):
            assert f'id="{name}"' in page, f"{name} has no entry"
            entry = page.split(f'id="{name}"')[1].split("<h2")[0]
            assert "<p>" in entry or "<code>" in entry, f"{name} has an empty entry"
    assert not list(site.glob("*.py"))
    said = (site / "index.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="(https?://[^"]+)"', said)
    fetched = [a for a in addresses if a.endswith((".js", ".css", ".woff2")) or "font" in a]
    assert not fetched, "the site's pages need nothing from elsewhere"


class Files(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


#: What a reader types -> a section that must be among the first three pages found.
SOUGHT = {
    "recovery": "/concepts/numbers/#recovery",
    "adapter": "/howto/adapters/",
    "LoRA": "/howto/adapters/",
    "add a family": "/howto/extending/#a-family",
}

SEARCH = """
  const box = document.querySelector(".md-search__input");
  const found = {};
  for (const words of WORDS) {
    box.focus();
    box.value = words;
    box.dispatchEvent(new Event("keyup"));
    const hits = () => [...document.querySelectorAll(".md-search-result__item")].slice(0, 3)
      .flatMap(hit => [...hit.querySelectorAll("a")].map(a => new URL(a.href)));
    // Addresses carry the words that were found there: these are not the hits of the words before.
    const mine = url => (url.searchParams.get("h") ?? "")
      .includes(words.toLowerCase().split(" ").at(-1));
    while (!hits().some(mine)) await new Promise(done => setTimeout(done, 50));
    found[words] = hits().map(url => url.pathname + url.hash);
  }
  return found;
"""


@pytest.mark.slow
def test_the_search_finds_what_a_reader_asks_for(address: str) -> None:
    script = SEARCH.replace("WORDS", json.dumps(list(SOUGHT)))
    (found,) = look({"site": address}, [View()], script).values()
    assert {words: page for words, page in SOUGHT.items() if page not in found[words]} == {}, found
