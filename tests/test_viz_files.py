"""Figures and tables as files."""

import builtins
import importlib.util
import os
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import ask, chromium
from needs import needs
from summaries import positions, site_map

from graftlens.folder import write_whole
from graftlens.viz import bars, export, heatmaps, page, quantities, tables, text, theme

# --- files appear whole ----------------------------------------------------------------------


def test_an_older_file_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "file.txt"
    assert write_whole(path, "older\n") == path

    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"newer")
    assert path.read_text() == "older\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_what_is_not_a_module_is_packed_with_the_package():
    """Pages read their scripts and styles from the package: a wheel without them has no pages."""
    root = Path(__file__).parent.parent
    options = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    named = options["tool"]["setuptools"]["package-data"]
    patterns = [*named["*"], *named["graftlens"]]
    found = [path.relative_to(root / "graftlens") for path in root.glob("graftlens/**/*.*")]
    others = [path for path in found if path.suffix not in (".py", ".pyc")]
    assert {"page.html", "page.js", "page.css", "dashboard.js"} <= {path.name for path in others}
    assert [path for path in others if not any(path.match(p) for p in patterns)] == []


# --- tables ----------------------------------------------------------------------------------


def test_the_csv_reads_back_to_equal_numbers(tmp_path):
    table = site_map()
    written = tables.write_table(table, tmp_path / "map 0.5")
    assert written == {"csv": tmp_path / "map 0.5.csv", "md": tmp_path / "map 0.5.md"}
    back = pd.read_csv(written["csv"], float_precision="round_trip", keep_default_na=True)
    assert list(back.columns) == list(table.columns)
    for name in table.select_dtypes("number"):
        assert np.array_equal(back[name], table[name], equal_nan=True), name
    assert list(back["graft"]) == list(table["graft"])


def test_markdown_has_values_with_intervals(tmp_path):
    table = positions(templates=("a", "b"))
    path = tables.write_table(table, tmp_path / "t", caption="All | grafts")["md"]
    lines = path.read_text().splitlines()
    assert lines[0] == "**All \\| grafts**"
    assert lines[2] == (
        "| template | graft | n | top-1 accuracy | top-5 accuracy | top-50 accuracy "
        "| log-probability | logit diff | recovery |"
    )
    assert re.fullmatch(r"\|(---\|){9}", lines[3])
    facts = quantities.of_summary(table, "top5")
    for line, (_, row) in zip(lines[4:], table.iterrows(), strict=False):
        cells = line.strip("| ").split(" | ")
        assert cells[:3] == [row["template"], row["graft"], "24"]
        assert cells[4] == text.written(facts, row)
    assert "95% intervals over prompts" in lines[-1]
    assert "0 = PRE, 1 = SFT" in lines[-1]


def test_columns_are_chosen_and_other_tables_shown_plain(tmp_path):
    table = positions()
    assert list(tables.written_columns(table, ["graft", "top5"])) == ["graft", "top-5 accuracy"]
    with pytest.raises(ValueError, match="no column 'top7'; it has 'template', 'graft'"):
        tables.write_table(table, tmp_path / "t", columns=["top7"])
    assert list(tmp_path.iterdir()) == []
    other = pd.DataFrame(
        {"a|b": ["x|y\nz", "<b>", None], "b": [1.23456789, np.nan, -0.5], "c": [True, False, True]}
    )
    lines = tables.write_table(other, tmp_path / "o")["md"].read_text().splitlines()
    assert lines == [
        "| a\\|b | b | c |",
        "|---|---|---|",
        "| x\\|y z | 1.235 | yes |",
        "| \\<b\\> | – | no |",
        "| – | -0.5 | yes |",
    ]


# --- figures ---------------------------------------------------------------------------------


def test_a_figures_page_is_alone_and_draws(tmp_path):
    figure = heatmaps.heatmap(site_map())
    written = export.write_figure(figure, tmp_path / "f" / "map", formats=["html"], title="<Map>")
    assert written.skipped == {}
    assert written.paths == {"html": tmp_path / "f" / "map.html"}
    source = written.paths["html"].read_text(encoding="utf-8")
    assert "<title>&lt;Map&gt;</title>" in source
    assert 'content="default-src &#x27;none&#x27;' in source
    assert not re.search(r"<(?:link|img|iframe|object|base)\b|<script[^>]*\bsrc=", source)
    found, complaints = ask(
        written.paths["html"],
        """const chart = document.querySelector(".chart");
        const pane = chart.querySelector(".nsewdrag"), box = pane.getBoundingClientRect();
        // The pointer over the last of 4 columns in the second of 2 rows.
        const at = {clientX: box.left + box.width * 0.9, clientY: box.top + box.height * 0.7};
        pane.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, ...at}));
        await new Promise(r => setTimeout(r, 500));
        return {z: chart.data[0].z[1][3], hover: chart.querySelector(".hoverlayer").textContent,
                buttons: [...chart.querySelectorAll(".modebar-btn")].map(b => b.dataset.title)};""",
        tmp_path,
    )
    assert complaints == []
    assert found["z"] == figure.data[0].z[1][3]
    assert "layer 10, component o" in found["hover"]
    assert "24 prompts" in found["hover"]
    assert found["buttons"]
    assert not [b for b in found["buttons"] if re.search("share|cloud|chart studio", b, re.I)]


def test_figures_of_a_folder_share_one_script(tmp_path):
    """Each was 4.8 MB."""
    pages = [
        export.write_figure(figure, tmp_path / "f" / name, formats=["html"], shared=True).paths[
            "html"
        ]
        for name, figure in (
            ("bars", bars.grouped_bars(positions())),
            ("map", heatmaps.heatmap(site_map())),
        )
    ]
    (script,) = (tmp_path / "f").glob("*.js")
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        "bars.html",
        "map.html",
        script.name,
    }
    assert script.stat().st_size > 1_000_000
    for file, kind in zip(pages, ("bar", "heatmap"), strict=True):
        assert file.stat().st_size < 200_000
        assert re.findall(r'<script src="([^"]+)"', file.read_text()) == [script.name]
        found, complaints = ask(
            file, 'return document.querySelector(".chart").data[0].type;', file.parent
        )
        assert (found, complaints) == (kind, [])
    whole = export.write_figure(heatmaps.heatmap(site_map()), tmp_path / "alone", formats=["html"])
    assert "file:" not in whole.paths["html"].read_text()[:2000]
    before = script.stat().st_mtime_ns
    export.write_figure(
        bars.grouped_bars(positions()), tmp_path / "f" / "bars", formats=["html"], shared=True
    )
    assert script.stat().st_mtime_ns == before
    script.write_text("damaged")
    export.write_figure(
        bars.grouped_bars(positions()), tmp_path / "f" / "bars", formats=["html"], shared=True
    )
    assert script.stat().st_size > 1_000_000


def test_a_page_says_once_why_pictures_are_missing(tmp_path):
    figure = page.Figure("Caption.", "alt", bars.grouped_bars(positions()))
    why = "kaleido is not installed: pip install 'graftlens[plots]'"
    lacking = replace(figure, skipped={"png": why, "svg": why})
    odd = replace(figure, skipped={"svg": "the browser did not draw it: Oops"})
    shown = page.ExperimentPage(
        "t", "q", "l", [page.Part("p", figures=[lacking, lacking, odd])], {}
    )
    assert shown.missing == [
        f"2 of 3 figures have no PNG and no SVG: {why}.",
        "1 of 3 figures have no SVG: the browser did not draw it: Oops.",
    ]
    links = {"a file": tmp_path / "file"}
    written = page.experiment_page(tmp_path / "index.html", replace(shown, links=links)).read_text()
    assert written.count("kaleido is not installed") == 1
    assert "(No png" not in written


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    needs("kaleido")
    chromium()
    folder = tmp_path_factory.mktemp("pictures")
    figure = bars.grouped_bars(positions(templates=("a", "b")))
    with export.exporter():
        first = export.write_figure(figure, folder / "one", title="Positions")
        again = export.write_figure(figure, folder / "two", title="Positions")
    return first, again


def test_pictures_are_written_on_white_and_alike(pictures):
    first, again = pictures
    assert first.skipped == again.skipped == {}
    assert set(first.paths) == {"html", "png", "svg"}
    png = first.paths["png"].read_bytes()
    assert png.startswith(b"\x89PNG")
    width = int.from_bytes(png[16:20])
    assert width == export.WIDTH * export.SCALE
    svg = first.paths["svg"].read_text(encoding="utf-8")
    assert svg == again.paths["svg"].read_text(encoding="utf-8")
    assert png == again.paths["png"].read_bytes()
    assert re.search(r'class="main-svg"[^>]*background: rgb\(255, 255, 255\)|fill: rgb\(255', svg)
    assert "Positions" in svg
    assert "top-5 accuracy" in svg


def test_a_figure_is_left_as_it_was(pictures):
    figure = bars.grouped_bars(positions())
    before = figure.to_json()
    export._on_ground(figure, "A title")
    assert figure.to_json() == before


def test_a_figure_for_a_dark_page_has_a_dark_ground():
    for look in (theme.DARK, theme.LIGHT):
        made = export._on_ground(bars.grouped_bars(positions(), look=look), "A title")
        assert made["layout"]["paper_bgcolor"] == made["layout"]["plot_bgcolor"] == look.surface
        assert made["layout"]["title"]["font"]["color"] == look.text


def test_without_kaleido_pictures_are_skipped_with_the_reason(tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "kaleido" else known(n, *a)
    )
    written = export.write_figure(bars.grouped_bars(positions()), tmp_path / "f")
    assert list(written.paths) == ["html"]
    assert set(written.skipped) == {"png", "svg"}
    assert "pip install 'graftlens[plots]'" in written.skipped["png"]
    assert [file.name for file in tmp_path.iterdir()] == ["f.html"]


def test_without_a_browser_pictures_are_skipped_with_the_reason(tmp_path, monkeypatch):
    needs("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", staticmethod(lambda **_: None))
    written = export.write_figure(bars.grouped_bars(positions()), tmp_path / "f", formats=["svg"])
    assert written.paths == {}
    assert "no Chrome or Chromium was found" in written.skipped["svg"]
    assert "BROWSER_PATH" in written.skipped["svg"]


def test_a_browser_that_dies_is_a_reason_and_no_error(tmp_path, monkeypatch):
    needs("kaleido")
    broken = tmp_path / "broken-browser"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", staticmethod(lambda **_: str(broken)))
    monkeypatch.setattr(export, "PATIENCE", 20.0)
    with export.exporter():
        for _ in range(2):
            written = export.write_figure(
                bars.grouped_bars(positions()), tmp_path / "f", formats=["png"]
            )
            assert written.paths == {}
            assert "the browser did not start" in written.skipped["png"]


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'gif'; choose from html, png, svg"):
        export.write_figure(bars.grouped_bars(positions()), tmp_path / "f", formats=["html", "gif"])
    assert list(tmp_path.iterdir()) == []


def test_kaleido_is_not_imported_for_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    real = builtins.__import__
    asked = []
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: asked.append(name) or real(name, *a, **k)
    )
    export.write_figure(bars.grouped_bars(positions()), tmp_path / "f", formats=["html"])
    assert "kaleido" not in asked
