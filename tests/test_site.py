"""The site of docs/: its pictures, its API reference, and that it builds without a warning."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
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


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    for package in PUBLIC:
        page = (tmp_path / "api" / package / "index.html").read_text(encoding="utf-8")
        for name in re.findall(r"^::: (\S+)$", module("hooks").reference(package), flags=re.M):
            assert f'id="{name}"' in page, f"{name} has no entry"
            entry = page.split(f'id="{name}"')[1].split("<h2")[0]
            assert "<p>" in entry or "<code>" in entry, f"{name} has an empty entry"
    said = (tmp_path / "index.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="(https?://[^"]+)"', said)
    fetched = [a for a in addresses if a.endswith((".js", ".css", ".woff2")) or "font" in a]
    assert not fetched, "the site's pages need nothing from elsewhere"
