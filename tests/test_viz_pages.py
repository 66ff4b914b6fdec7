"""The page of an experiment and the page that compares runs."""

import base64
import itertools
import re
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from browser import ask
from scipy.stats import kendalltau
from summaries import ENDS, positions, site_map
from test_report import Page

from graftlens.viz import compare, figures, page, quantities, report, tables, text
from graftlens.viz.render import render
from graftlens.viz.spelling import headed


def experiment(folder):
    table = positions(templates=("headline", "award"))
    sites = site_map(range(40), ("q", "o"))
    files = tables.write_table(sites, folder / "tables" / "site map")
    bar = figures.bar_chart(table, "top5", files={"png": folder / "figures" / "positions.png"})
    return page.ExperimentPage(
        title="Positions & <sites>",
        question="Where?",
        lead="At FE+LT.",
        parts=[
            page.Part(
                "Positions <1>",
                "All components.",
                ["FE+LT is enough."],
                [bar],
                [page.Table("Positions", table)],
                {"PRE": "", "FE+LT": "sft @ first_entity + last"},
            ),
            page.Part(
                "Sites",
                figures=[figures.heat_map(sites)],
                tables=[page.Table("Sites", sites, files)],
            ),
        ],
        provenance={"seed": 0, "models": {"pre": "3f8a"}},
        links={"the sweep's report": folder / "sweep" / "a b" / "report.html"},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made = experiment(folder)
    path = page.experiment_page(folder / "index.html", made)
    assert path == folder / "index.html"
    return path, made, Page(path)


def test_the_page_is_whole(written):
    _, _, found = written
    assert found.stack == []
    assert [text for tag, text in found.headings if tag == "h1"] == ["Positions & <sites>"]
    assert [text for tag, text in found.headings if tag == "h2"] == [
        "Positions <1>",
        "Sites",
        "What was run and how",
        "Further files",
    ]
    words = "".join(found.words)
    for piece in ("Where?", "At FE+LT.", "FE+LT is enough.", "3f8a", "(no rule: the base)"):
        assert piece in words


def test_links_are_relative_and_lead_to_the_files(written):
    path, _, found = written
    links = [attrs["href"] for tag, attrs in found.tags if tag == "a"]
    outer = [link for link in links if not link.startswith("#")]
    assert "figures/positions.png" in outer
    assert "sweep/a%20b/report.html" in outer
    assert [link for link in outer if link.endswith(".csv")] == ["tables/site%20map.csv"] * 2
    assert (path.parent / unquote("tables/site%20map.csv")).is_file()
    ids = {attrs.get("id") for _, attrs in found.tags}
    assert {link[1:] for link in links if link.startswith("#")} <= ids


def test_the_page_loads_nothing(written):
    path, _, found = written
    for tag, attrs in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
        assert not str(attrs.get("href", "")).startswith(("http", "//", "/"))
    assert len([s for s in found.scripts if len(s) > 1_000_000]) == 1
    policy = next(a["content"] for t, a in found.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert str(path.parent) not in path.read_text(encoding="utf-8")


def test_long_tables_are_cut_and_say_so(written):
    _, made, found = written
    rows = len(made.parts[1].tables[0].frame)
    assert rows == 82
    words = " ".join("".join(found.words).split())
    assert "The first 60 of 82 rows are shown here. All 82 are in the CSV file." in words
    assert len([tag for tag, _ in found.tags if tag == "tr"]) == (1 + 8) + (1 + 60)


def test_cells_on_the_page_are_those_of_the_table(written):
    path, made, _ = written
    table = made.parts[0].tables[0].frame
    source = path.read_text(encoding="utf-8")
    for said in text.written_all(quantities.of_summary(table, "recovery"), table):
        value, interval = said.split(" ", 1)
        assert f"<td>{value} <small>{interval}</small></td>" in source


@pytest.mark.parametrize(
    ("title", "said"),
    [("Positions", "Positions: gpt2"), ("Where?", "Where? gpt2"), ("Go!", "Go! gpt2")],
)
def test_what_follows_a_title_follows_a_question_without_a_colon(title, said):
    assert headed(title, "gpt2") == said


def test_columns_of_numbers_are_told_from_those_of_words():
    frame = pd.DataFrame(
        {"graft": ["0.5*sft @ last", "-1*sft"], "run": ["20.0% [8.3, 41.7]", "–"]}
        | {"layer": ["0-3", "4"], "n": [1, 2], "why": ["", "3 of 4 failed"]}
    )
    head = page.Table("t", frame).cells().head
    assert [name for name, words in head if words] == ["graft", "why"]


def test_in_a_browser_every_chart_is_drawn(written, tmp_path):
    path, made, _ = written
    script = """
      const charts = [...document.querySelectorAll(".chart")];
      const details = document.querySelector("details");
      details.querySelector("summary").click();
      return {drawn: charts.map(c => c.querySelectorAll(".main-svg").length),
              y: charts[0].data[0].y, open: details.open,
              wide: document.documentElement.scrollWidth > innerWidth};"""
    found, complaints = ask(path, script, tmp_path, height=500)
    assert complaints == []
    assert len(found["drawn"]) == 2
    assert all(found["drawn"])
    first = made.parts[0].tables[0].frame
    assert found["y"] == first.loc[first["template"] == "headline", "top5"].tolist()
    assert found["open"] is True
    assert found["wide"] is False
    narrow, complaints = ask(path, script, tmp_path, width=500, height=900)
    assert complaints == []
    assert narrow["wide"] is False


def test_a_page_of_many_grafts_stays_small(tmp_path):
    names = ("first_entity", "movie_title", "preposition", "rest", "last")
    table = site_map(range(30), ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out"), names, n=4)
    table = pd.concat([table] + [table.assign(graft=table["graft"] + f" {i}") for i in range(1)])
    assert len(table) > 1500
    map_of = table.drop_duplicates([*("span", "component", "layer")])
    made = page.ExperimentPage(
        "t",
        "q",
        "l",
        [
            page.Part(
                "p",
                figures=[figures.heat_map(map_of, panel="span")],
                tables=[page.Table("t", table)],
                rules={graft: graft for graft in table["graft"]},
            )
        ],
        {},
    )
    path = page.experiment_page(tmp_path / "p.html", made)
    empty = page.experiment_page(tmp_path / "e.html", page.ExperimentPage("", "", "", [], {}))
    assert path.stat().st_size - empty.stat().st_size < 1_500_000


# --- the report beside it --------------------------------------------------------------------


def test_a_report_of_many_grafts_leaves_the_ranks_out(tmp_path):
    names = [f"graft {i}" for i in range(41)]
    rows = [
        {
            "prompt": p,
            "graft": g,
            "rule": g,
            "text": "t",
            "answer": "a",
            "rank": 1.0,
            "reason": None,
        }
        for p, g in itertools.product(range(2), names)
    ]

    def said_of(rows):
        return render("ranks.html", ranks=report._ranks(pd.DataFrame(rows), 100))

    said = said_of(rows)
    assert "<table" not in said
    assert "The ranks of 2 prompts under 41 grafts are too many for a table here" in said
    said = said_of(rows[:3])
    assert said.count("<td class='count'><strong>1</strong></td>") == 3


# --- runs compared ---------------------------------------------------------------------------

WEAK = {"PRE": 0.0, "SFT": 1.0, "FE+LT": 0.3, "(FE+LT)^C": 0.6, "FE": 0.2}


def test_kendalls_tau_is_that_of_the_shared_grafts_without_the_ends():
    one = positions({"PRE": 0.0, "SFT": 1.0, "a": 0.2, "b": 0.5, "c": 0.9, "d": 0.4})
    other = positions({"PRE": 0.0, "SFT": 1.0, "c": 0.4, "b": 0.6, "a": 0.1, "e": 0.9})
    assert compare.agreement(one, other, "top5") == (3, pytest.approx(1 / 3))
    count, tau = compare.agreement(site_map(), site_map(seed=1), "recovery")
    values = [
        f[f["layer"].ne("all") & f["layer"].notna()]["recovery"]
        for f in (site_map(), site_map(seed=1))
    ]
    assert count == 8
    assert tau == pytest.approx(kendalltau(*values).statistic)
    same = positions({"PRE": 0.0, "SFT": 1.0, "a": 0.5, "b": 0.5})
    assert np.isnan(compare.agreement(same, same, "top5")[1])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    groups = {"templates": ("headline", "award")}
    runs = {
        "small <1>": {
            "positions": positions(**groups),
            "sites": site_map(range(40)),
            "mixed": positions(templates=("a", "b")),
            "alone": positions(),
        },
        "large": {
            "positions": positions(WEAK, n=40, **groups),
            "sites": site_map(range(20), seed=1),
            "mixed": positions(WEAK, templates=("c",)),
        },
    }
    folder = tmp_path_factory.mktemp("compared")
    path = compare.compare_page(
        folder / "runs.html",
        runs,
        titles={"positions": "Position grafts"},
        provenance={"runs": list(runs)},
        metric="top5",
    )
    return path, runs, Page(path)


def figures_of(found):
    import json

    return [json.loads(s) for s in found.scripts if s.startswith('{"data"')]


def ends_of(array):
    """An array of error bars, which is typed in a figure's JSON."""
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])


def test_bars_have_one_colour_a_run_and_the_runs_numbers(compared):
    _, runs, found = compared
    headline = figures_of(found)[0]
    assert [t["name"] for t in headline["data"]] == ["small &lt;1&gt;", "large"]
    for trace, parts in zip(headline["data"], runs.values(), strict=True):
        table = parts["positions"]
        rows = table[table["template"] == "headline"]
        assert trace["y"] == rows["top5"].tolist()
        above = ends_of(trace["error_y"]["array"])
        assert np.allclose(np.add(trace["y"], above), rows["top5_high"])


def test_maps_of_the_runs_share_a_scale(compared):
    _, _, found = compared
    drawn = figures_of(found)[2]
    maps = [t for t in drawn["data"] if t["type"] == "heatmap"]
    assert [len(m["x"]) for m in maps] == [40, 20]
    assert {m["coloraxis"] for m in maps} == {"coloraxis"}
    words = " ".join("".join(found.words).split())
    assert "The runs do not have the same layers." in words


def test_groups_that_differ_are_pooled_without_an_interval(compared):
    _, runs, found = compared
    pooled, own = figures_of(found)[3]["data"]
    table = runs["small <1>"]["mixed"]
    assert np.allclose(pooled["y"], table.groupby("graft", sort=False)["top5"].mean())
    assert np.isnan(ends_of(pooled["error_y"]["array"])).all()
    other = runs["large"]["mixed"]
    assert own["y"] == other["top5"].tolist()
    words = " ".join("".join(found.words).split())
    assert "The runs have different groups of prompts (small <1>: a, b; large: c)." in words


def test_the_page_says_what_cannot_be_compared(compared):
    path, _, found = compared
    words = " ".join("".join(found.words).split())
    assert compare.UNPAIRED in words
    assert "alone: only in small <1>" in words
    assert "Prompts per group: small <1> 24; large 40." in words
    assert [text for tag, text in found.headings if tag == "h2"][:3] == [
        "Position grafts",
        "sites",
        "mixed",
    ]
    assert found.stack == []
    whole = path.parent / "runs_tables" / "2_sites_headline.csv"
    back = pd.read_csv(whole)
    assert len(back) == 2 + 2 * 40
    assert list(back.columns) == ["graft", "small <1>", "large"]
    assert "All 82 are in the CSV file." in words


def test_a_graft_that_a_run_lacks_is_a_dash(compared):
    _, runs, _ = compared
    view = {run: parts["positions"].query("template == 'award'") for run, parts in runs.items()}
    crossed = compare._crossed(view, "top5").set_index("graft")
    assert pd.isna(crossed.at["FE", "small <1>"])
    assert crossed.at["FE", "large"].startswith("20.0% [")


def test_in_a_browser_the_comparison_draws(compared, tmp_path):
    found, complaints = ask(
        compared[0],
        """return [...document.querySelectorAll(".chart")]
          .map(c => c.querySelectorAll(".main-svg").length > 0);""",
        tmp_path,
    )
    assert complaints == []
    assert found == [True] * 4


def test_runs_that_cannot_be_compared_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match="no run was given to compare"):
        compare.compare_page(tmp_path / "c.html", {}, provenance={})
    with pytest.raises(ValueError, match="part 'p' of run 'one': the summary has no metric 'top9'"):
        compare.compare_page(
            tmp_path / "c.html", {"one": {"p": positions()}}, provenance={}, metric="top9"
        )


def test_one_run_is_shown_alone(tmp_path):
    path = compare.compare_page(tmp_path / "c.html", {"one": {"p": positions()}}, provenance={})
    words = "".join(Page(path).words)
    assert "One run (one): there is nothing to compare it with." in words
    assert not re.search("Kendall", words)
    assert set(ENDS) <= set(positions()["graft"])
