"""The page of a localisation and its figures, from tables made by hand."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import ask
from test_report import Page

from graftlens import viz
from graftlens.references import marked
from graftlens.stats import summarise
from graftlens.viz.localisation import VIEWS, found_figures, random_histogram, set_on_prompt
from graftlens.viz.page import is_page

LAYERS, POSITIONS = 30, ("first_entity", "last", "~(first_entity + last)")
COMPONENTS = ("ln1", "q", "k", "v", "o", "ln2", "mlp_in", "mlp_gate", "mlp_out")


@dataclass(frozen=True)
class Count:
    sites: int
    units: int
    parameters: float


def sites() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    places = [(c, None) for c in ("embed", "ln_final", "unembed")]
    places += [(c, layer) for layer in range(LAYERS) for c in COMPONENTS]
    rows = [
        {"component": c, "layer": layer, "position": p, "score": float(rng.normal())}
        for c, layer in places
        for p in POSITIONS
    ]
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    order = (-table["score"]).argsort().argsort() + 1
    inside = order <= 40
    units = pd.Series(pd.NA, index=table.index, dtype=object)
    units[table.index[inside & (table["component"] == "q")][:1]] = "0-2"
    return table.assign(
        at_base=0.0, at_full=0.0, order=order, in_set=inside, units=units, stability=0.5
    )


def summary() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    means = {"PRE": -9.0, "SFT": -0.2, "found": -0.5, "complement": -8.8, "FE+LT": -0.7}
    rows = [
        {
            "prompt": n,
            "graft": graft,
            "fact": f"film {n // 2}",
            "logprob": mean + 0.1 * float(rng.normal()),
            "kl_full": float(rng.uniform()),
            "rank": int(rng.integers(1, 9)),
            "reason": None,
        }
        for n in range(24)
        for graft, mean in means.items()
    ]
    table = marked(pd.DataFrame(rows), "PRE", "SFT")
    return summarise(
        table, by=(), ks=(1, 5), metrics=["logprob", "kl_full"], recovery="logprob", unit="fact"
    )


def curve() -> pd.DataFrame:
    sizes = np.array([0, 8, 81, 163, 409, 819])
    value = np.array([0.0, 0.1, 0.6, 0.9, 1.0, 1.0])
    found = {"size": sizes, "share": sizes / 819}
    for name, middle in (("recovery", value), ("rest", 1 - value)):
        found |= {name: middle, f"{name}_low": middle - 0.02, f"{name}_high": middle + 0.02}
    return pd.DataFrame(found)


@dataclass
class Result:
    """What the page needs, without a model."""

    table: pd.DataFrame = field(default_factory=sites)
    search: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            {"part": ["nested"], "size": [40], "share": [0.05], "enough": [0.96], "without": [None]}
        )
    )
    curve: pd.DataFrame = field(default_factory=curve)
    summary: pd.DataFrame = field(default_factory=summary)
    differences: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            {
                "a": ["found"],
                "b": ["FE+LT"],
                "metric": ["recovery"],
                "n": [24],
                "difference": [0.0125],
                "low": [-0.0175],
                "high": [0.0425],
                "p_adjusted": [0.375],
                "units": [12],
            }
        )
    )
    random: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            {"draw": range(100), "enough": np.linspace(0, 0.4, 100)}
        )
    )
    failures: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            {"prompt": [3], "text": ["News: <b>Ann</b> in"], "says": [" </script>the"]}
        )
    )
    example: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            [
                {"pos": 0, "token": "News", "component": None, "layers": None, "count": 0},
                {"pos": 1, "token": " Ann", "component": "q", "layers": "3-5", "count": 3},
                {"pos": 1, "token": " Ann", "component": "mlp_in", "layers": "9", "count": 1},
                {"pos": 2, "token": " in\n", "component": "unembed", "layers": "all", "count": 1},
            ]
        )
    )
    rounds: pd.DataFrame = field(default_factory=pd.DataFrame)
    costs: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame({"step": ["nested-series"], "forwards": [160]})
    )
    split: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame({"part": ["search"], "prompts": [16], "facts": [16]})
    )
    notes: tuple[str, ...] = ("The report rests on 12 facts.",)
    judged: str = ""
    jaccard: tuple[float, ...] = (0.5, 0.7)
    p_value: float = 1 / 101
    cpr: float = 0.93
    cmd: float = 0.08
    goal: Any = "sufficient"
    target: Any = 0.95
    metric: str = "logprob"
    source: str = "sft"
    size: Any = field(default_factory=lambda: Count(40, 0, 1e6))
    total: Any = field(default_factory=lambda: Count(819, 0, 2e8))
    sentence: str = "40 of 819 sites are enough for 97% [95, 98] of <what> sft adds."
    text: str = "sft @ last : q + k : 20-23 | sft @ first_entity : mlp_in : 9"
    yaml: str = "- source: sft\n  at: last\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("found") / "found.html"
    assert viz.localisation_page(Result(), path, provenance={"seed": 0}) == path
    return path


def test_the_page_says_what_was_found_first(written: Path) -> None:
    found = Page(written)
    assert found.stack == []
    assert is_page(written)
    text = written.read_text(encoding="utf-8")
    lead = text.split("class='lead'>")[1].split("</p>")[0]
    assert lead == "40 of 819 sites are enough for 97% [95, 98] of &lt;what&gt; sft adds."
    assert "<b>Ann</b>" not in text
    assert "</script>the" not in text
    assert "40 of 819 sites: 1,000,000 of 200,000,000 parameters" in text
    assert "p = 0.0099" in text
    assert "recovery 0.200 (0.000 to 0.400)" in text, "what random sets do"
    assert "The found set minus others" in text
    assert "<td>0.0125 <small>[-0.0175, 0.0425]</small></td>" in text
    for value in ("0.6 <small>[0.58, 0.62]</small>", "0.4 <small>[0.38, 0.42]</small>"):
        assert f"<td>{value}</td>" in text
    assert "how far the distribution of the next token is from that of SFT" in text
    for word in ("found", "complement", "recovery"):
        assert text.index(f"<dt>{word}</dt>") < text.index("id='curve'"), "before they are needed"
    assert "by 0.60 (0.50 to 0.70" in text
    assert "alone and missing were not measured" in text


def with_effects() -> pd.DataFrame:
    """The sites as `localise(…, effects=True)` has them."""
    rng = np.random.default_rng(2)
    table = sites()
    return table.assign(alone=rng.normal(size=len(table)), missing=rng.normal(size=len(table)))


@pytest.mark.parametrize(("width", "effects"), [(700, True), (1400, False)])
def test_the_page_fits_and_shows_each_map(
    written: Path, tmp_path: Path, width: int, effects: bool
) -> None:
    if effects:
        written = viz.localisation_page(Result(with_effects()), tmp_path / "found.html")
    script = """
      const choose = document.getElementById("sites-view");
      const seen = {};
      for (const option of choose.options) {
        choose.value = option.value;
        choose.dispatchEvent(new Event("change"));
        await new Promise(done => setTimeout(done, 400));
        const shown = [...document.querySelectorAll("[data-view]")].filter(v => !v.hidden);
        const chart = shown[0].querySelector(".chart");
        seen[option.value] = [shown.length, shown[0].dataset.view,
          chart.querySelectorAll(".hm").length, chart._fullData[0].z[3][1],
          chart.getBoundingClientRect().width - chart._fullLayout.width];
      }
      const page = document.documentElement;
      return {seen, wide: page.scrollWidth - page.clientWidth,
        marks: [...document.querySelectorAll("#example-tokens mark")].map(m => m.title)};
    """
    found, complaints = ask(written, script, tmp_path, width=width)
    assert complaints == []
    assert found["wide"] <= 0
    assert set(found["seen"]) == ({*VIEWS} if effects else {"score", "in_set"})
    table = with_effects()
    assert list(dict.fromkeys(table["component"])).index("ln1") == 3
    (first,) = table[
        (table["component"] == "ln1") & (table["layer"] == 0) & (table["position"] == POSITIONS[0])
    ].to_dict("records")
    for view in VIEWS if effects else ("score", "in_set"):
        shown, name, panels, value, apart = found["seen"][view]
        assert (shown, name, panels) == (1, view, len(POSITIONS))
        assert value == pytest.approx(float(first[view]))
        assert abs(apart) < 2, "a map that was hidden fits the page"
    assert found["marks"] == ["q: layers 3-5; mlp_in: layers 9", "unembed: layers all"]


def test_a_needed_set_is_shown_by_what_is_left_without_it(tmp_path: Path) -> None:
    """The goal's own recovery is the star of the curve and the line among random sets."""
    random = pd.DataFrame({"draw": range(4), "without": [0.5, 0.6, 0.7, 0.8]})
    result = Result(goal="necessary", random=random)
    rest = float(result.summary.set_index("graft").at["complement", "recovery"])
    (star,) = [t for t in found_figures(result)["curve"].figure.data if t.name == "the found set"]
    assert list(star.y) == [rest]
    text = viz.localisation_page(result, tmp_path / "found.html").read_text(encoding="utf-8")
    assert "Recoveries of what is left without random sets matched" in text
    assert f"the found set has {rest:.3f}" in text
    assert "of what is left without each: recovery without the set 0.650" in text


def test_the_map_has_each_site_in_its_cell() -> None:
    table = sites()
    figure = viz.site_map(table, "score")
    maps = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    assert len(maps) == len(POSITIONS)
    for trace, position in zip(maps, POSITIONS, strict=True):
        for row in table[table["position"] == position].to_dict("records"):
            across = "–" if pd.isna(row["layer"]) else str(row["layer"])
            cell = trace.z[list(trace.y).index(row["component"])][list(trace.x).index(across)]
            assert cell == row["score"]
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    inside = viz.site_map(table, "in_set")
    values = [v for trace in inside.data for line in trace.z for v in line if v is not None]
    assert sorted(values) == sorted([0.5] + [1.0] * 39 + [0.0] * (len(table) - 40))
    with pytest.raises(
        ValueError, match=r"value='alone' is not in the table\. It has: score in_set"
    ):
        viz.site_map(table, "alone")


@pytest.mark.parametrize(
    ("positions", "titles"),
    [
        (
            ("first_entity", "last", "~(first_entity + last)"),
            ["first_entity", "last", "all other tokens: ~(first_entity + last)"],
        ),
        (("~last", "last"), ["all other tokens: ~last", "last"]),
        (("~(bos + last)", "last"), ["~(bos + last)", "last"]),
        (("~last",), ["~last"]),
    ],
)
def test_a_panel_of_all_the_rest_says_so(positions: tuple[str, ...], titles: list[str]) -> None:
    rows = [{"component": "q", "layer": 0, "position": at, "score": 1.0} for at in positions]
    figure = viz.site_map(pd.DataFrame(rows).astype({"layer": "Int64"}), "score")
    assert [note.text for note in figure.layout.annotations] == titles


def test_notes_are_on_the_page(tmp_path: Path) -> None:
    page = viz.localisation_page(Result(), tmp_path / "found.html", notes=["Mind <this>."])
    assert "<li>Mind &lt;this&gt;.</li>" in page.read_text(encoding="utf-8")


def test_figures_have_the_tables_numbers() -> None:
    result = Result()
    figure = viz.recovery_curve(result.curve, target=0.95, found=(40, 0.97))
    own, rest, star = figure.data
    assert list(own.x) == list(rest.x) == [8, 81, 163, 409, 819]
    assert list(own.y) == [0.1, 0.6, 0.9, 1.0, 1.0]
    assert list(rest.y) == pytest.approx([0.9, 0.4, 0.1, 0.0, 0.0])
    assert (list(star.x), list(star.y)) == ([40], [0.97])
    (line,) = figure.layout.shapes
    assert line.y0 == 0.95
    (grid,) = set_on_prompt(result.example).data
    assert [list(line) for line in grid.z] == [[0, 3, 0], [0, 1, 0], [0, 0, 1]]
    (bars,) = random_histogram(result.random, 0.97).data
    assert list(bars.x) == result.random["enough"].tolist()
    assert set(found_figures(result)) == {"curve", "sites-score", "sites-in-set"}
    assert set(VIEWS) == {"score", "alone", "missing", "in_set"}
