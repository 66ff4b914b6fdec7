"""Every kind of page at the widths of half and whole screens, in both schemes and on paper: nothing
goes beyond it, nothing is cut off, and what is written and drawn can be told from its ground."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import View, look
from summaries import positions, results, site_map
from sweeps import checkpoints, config
from test_localise_page import Result
from test_report import EXAMPLE, make_table
from test_sweep_texts import given, unanswered
from test_viz_dashboard import LONG, make
from test_viz_interactions import tables as interaction_tables
from test_viz_pages import experiment

from graftlens import stats, sweep_report, viz
from graftlens.sweep.runner import run_sweep
from graftlens.viz import compare, export, figures, page, report
from graftlens.viz.attention import attention_view
from graftlens.viz.dashboard import Dashboard

NARROW, WIDE, PAPER = 700, 1400, 718
SCREENS = [View(width, dark) for width in (NARROW, WIDE) for dark in (False, True)]
VIEWS = [*SCREENS, View(PAPER, print=True)]
GRAFTS = ("PRE", "SFT", "FE", "LT", "FE+LT", "not-FE", "not-LT", "(FE+LT)^C")


def reported(folder: Path) -> Path:
    """As the demo's."""
    shares = dict(zip(GRAFTS, (0, 1, 0.2, 0.4, 0.9, 0.8, 0.6, 0.1), strict=True))
    table = make_table(shares, templates=("headline", "with_title", "new_film", "qa"))
    return report.write_report(
        folder / "report.html",
        title="Where a finetuned fact is retrieved",
        summary=stats.summarise(table, resamples=50),
        table=table,
        examples=[EXAMPLE],
        provenance={"command": "graftlens demo --out " + "a-folder-with-a-long-name/" * 6},
    )


def run_page(folder: Path) -> Path:
    """As `graftlens run`'s, with interactions and wide tables."""
    made = experiment(folder)
    players, pairs = interaction_tables()
    wide = results({"PRE": {}, "SFT": {}}, {"PRE": 0.0, "SFT": 1.0}, n=3)
    wide = wide.assign(**{f"another column {i}": i / 7 for i in range(14)})
    more = page.Part(
        "Players",
        figures=[figures.interaction_chart(players, pairs)],
        tables=[page.Table("Players", players), page.Table("Many columns", wide)],
        rules={"sft @ " + " + ".join(f"layer_{i}" for i in range(60)): "sft @ " + "x" * 300},
    )
    whole = page.ExperimentPage(**(vars(made) | {"parts": [*made.parts, more]}))
    return page.experiment_page(folder / "index.html", whole)


def compared(folder: Path) -> Path:
    runs = {
        name: {"positions": positions(dict(zip(GRAFTS, np.linspace(0, 1, 8), strict=True))),
               "sites": site_map(range(30), seed=seed)}
        for seed, name in enumerate(("smollm2-135m on invented films", "gpt2 on battles"))
    }  # fmt: skip
    return compare.compare_page(folder / "compared.html", runs, provenance={"runs": list(runs)})


def swept(folder: Path) -> Path:
    asked = config(checkpoints(folder / "pair"))
    asked["grids"] = [
        {"positions": ["last", "first_entity"], "components": ["q", "mlp"], "layers": "each"}
    ]
    run_sweep(asked, folder / "sweep", progress=False, say=lambda text: None)
    return sweep_report(folder / "sweep")


def with_texts(folder: Path) -> dict[str, Path]:
    """Sweeps that make texts: beside cells, and alone; one text is long, one without a space."""
    sources = checkpoints(folder / "pair")
    found = {}
    for name, asked in (("sweep with texts", given(sources)), ("texts alone", unanswered(sources))):
        asked["outcomes"]["sampling"] = {"n": 2, "max_new_tokens": 16, "seed": 3}
        asked["prompts"][0]["template"] += " the film of the film of the film " + "no" * 12
        out = folder / name.replace(" ", "-")
        run_sweep(asked, out, progress=False, say=lambda text: None)
        found[name] = sweep_report(out)
    return found


def dashboards(folder: Path) -> dict[str, Path]:
    made = make()
    long = make()
    names = dict(zip(made.runs, ("PRE", "SFT", *LONG), strict=False))
    long = make(
        runs={names[name]: run for name, run in made.runs.items()},
        lens=made.lens.assign(graft=made.lens["graft"].map(names)),
        kl_divergence=made.kl_divergence.assign(graft=made.kl_divergence["graft"].map(names)),
    )
    return {
        "dashboard": Dashboard(made).save(folder / "dashboard.html"),
        "dashboard of long names": Dashboard(long).save(folder / "long.html"),
    }


def differences(folder: Path) -> Path:
    rows = [
        {"component": c, "layer": layer, "parameter": "weight", "source": "sft", "base": "pre",
         "relative_frobenius": layer / 30}
        for c in ("q", "k", "v", "o", "mlp_in", "mlp_out")
        for layer in range(30)
    ]  # fmt: skip
    figure = viz.weight_heatmap(pd.DataFrame(rows).astype({"layer": "Int64"}))
    written = export.write_figure(figure, folder / "differences", formats=("html",))
    return written.paths["html"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    tokens = ("<bos>", " the", " film", " of", " Ann")
    pattern = np.tril(np.full((12, 5, 5), 0.2))
    return {
        "report": reported(folder),
        "run": run_page(folder / "run"),
        "comparison": compared(folder),
        "sweep": swept(folder),
        "localisation": viz.localisation_page(Result(), folder / "found.html", provenance={}),
        "differences": differences(folder),
        "attention": attention_view(pattern, tokens).save(folder / "attention.html"),
        **dashboards(folder),
        **with_texts(folder),
    }


MEASURE = """
  const root = document.documentElement, wide = root.clientWidth;
  const name = e => e.id || e.className || e.tagName;
  const framed = e => e.closest(".scroll, pre, datalist, select");
  const beyond = [...document.querySelectorAll("main *")].filter(e => !framed(e) &&
    e.getClientRects().length && e.getBoundingClientRect().right > wide + 1 &&
    !e.closest("svg")).map(name);
  const cut = [...document.querySelectorAll(".main-svg text")].filter(t => {
    const svg = t.closest(".main-svg").getBoundingClientRect(), own = t.getBoundingClientRect();
    return own.width && t.textContent.trim() && (own.left < svg.left - 1 ||
      own.right > svg.right + 1 || own.bottom > svg.bottom + 1 || own.top < svg.top - 1);
  }).map(t => t.textContent);
  const silent = [...document.querySelectorAll(".scroll")].filter(s =>
    s.scrollWidth > s.clientWidth + 1 && getComputedStyle(s).overflowX === "visible").map(name);
  const unmarked = [], lost = [];
  for (const frame of document.querySelectorAll(".scroll")) {
    if (frame.scrollWidth <= frame.clientWidth + 1) continue;
    if (!frame.classList.contains("wide")) unmarked.push(name(frame));
    const key = frame.querySelector("tbody .key") ?? frame.querySelector("tbody tr > :first-child");
    frame.scrollLeft = 1e6;
    if (key && key.getBoundingClientRect().left < frame.getBoundingClientRect().left - 1)
      lost.push(key.textContent);
    frame.scrollLeft = 0;
  }
  // Colours, whatever their notation, as a canvas mixes them, on the grounds that lie below.
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const mixed = colors => {
    pen.globalAlpha = 1;
    for (const color of colors) { pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v =>
      v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const above = e => e ? [e, ...above(e.parentElement)] : [];
  const contrast = (e, color) => {
    const around = above(e), inverted = around.some(a => getComputedStyle(a).filter !== "none");
    const grounds = around.map(a => getComputedStyle(a).backgroundColor).reverse();
    // What is inverted is drawn on the white that it was made for.
    const below = inverted ? ["#fff", ...grounds.slice(-4)] : ["#fff", ...grounds];
    const seen = [mixed(below), mixed([...below, color])].map(rgb =>
      inverted ? rgb.map(v => 0.91 * 255 - 0.82 * v) : rgb).map(light);
    return Math.max(...seen) / Math.min(...seen);
  };
  const faint = new Set();
  const judge = (e, color, least) => {
    if (!e.getClientRects().length || above(e).some(a =>
      a.disabled || getComputedStyle(a).backgroundImage !== "none")) return;
    const found = contrast(e, color);
    if (found < least) faint.add(`${e.textContent.slice(0, 20)} ${name(e)} ${found.toFixed(1)}`);
  };
  for (const e of document.querySelectorAll("main *:not(svg *)"))
    if ([...e.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
      judge(e, getComputedStyle(e).color, 4.5);
  for (const e of document.querySelectorAll(
    ".xtick text, .ytick text, .legendtext, .annotation-text, .xtitle, .ytitle, .cbaxis text"))
    judge(e, getComputedStyle(e).fill, 4.5);
  for (const e of document.querySelectorAll(".errorbar path"))
    judge(e, getComputedStyle(e).stroke, 3);
  return {over: root.scrollWidth - wide, beyond, cut, silent, unmarked, lost, faint: [...faint]};
"""


@pytest.mark.slow
def test_nothing_goes_beyond_a_page_or_is_cut_off(pages: dict[str, Path]) -> None:
    """What is wider than a page scrolls in a frame that says so and keeps its key column; what is
    written has a contrast of 4.5 with its ground, and whiskers have one of 3."""
    wrong: dict[str, Any] = {}
    for (name, view), found in look(pages, VIEWS, MEASURE).items():
        if found.pop("over") > 0 or any(found.values()):
            wrong[f"{name}, {view}"] = found
    assert wrong == {}
