"""The shipped experiments, run whole on a model that is trained in seconds."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from browser import ask, chromium
from chattemplates import CHATML
from needs import needs
from reference import sequential_graft
from test_report import Page
from tinybase import FACTS, LAYERS, RECIPE, small, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from waiting import HANG, until

from graftlens.cli import app
from graftlens.configfile import ConfigError, settings_from
from graftlens.data import dataset as dataset_module
from graftlens.data import load_dataset, save_dataset
from graftlens.data.dataset import Asking
from graftlens.data.movies import MoviesConfig
from graftlens.experiment import plan as plan_module
from graftlens.experiment.compare import _read as read_part
from graftlens.experiment.compare import compare_runs
from graftlens.experiment.config import ExperimentConfig, NamedExperiment, find_experiment
from graftlens.experiment.plan import Store, plan
from graftlens.experiment.run import ExperimentResult, describe_experiment, run_experiment
from graftlens.graft import Graft
from graftlens.metrics import Measure
from graftlens.references import are_references
from graftlens.sweep.results import read_manifest, read_results
from graftlens.viz.export import write_figure

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "experiments").glob("*.yaml"))
#: Those that have hundreds of grafts, or train long.
QUICK = ("positions", "unembedding")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a store that the tests of this file share."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """Figures as HTML only: pictures take most of the time, and one test draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "graftlens.experiment.show.write_figure", partial(write_figure, formats=("html",))
        )
        yield


@pytest.fixture(scope="module")
def ran(base, place) -> Callable[[str], ExperimentResult]:
    """`ran("hybrid")`: that shipped experiment, made small and run once."""
    done: dict[str, ExperimentResult] = {}

    def run(name: str) -> ExperimentResult:
        if name not in done:
            config = ROOT / "experiments" / f"{name}.yaml"
            done[name] = run_experiment(
                config,
                place / "runs" / name,
                overrides=[f"model={base}", *small(config, place)],
                store=place / "store",
                progress=False,
                say=lambda _: None,
            )
        return done[name]

    return run


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def files_in(folder: Path) -> dict[str, bytes]:
    """Every table's bytes by its name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "tables").iterdir())}


def links(page: Path) -> set[Path]:
    """The files that a page links to."""
    hrefs = [about["href"] for tag, about in Page(page).tags if tag == "a" and "href" in about]
    return {(page.parent / unquote(href)).resolve() for href in hrefs if not href.startswith("#")}


# -- the shipped experiments, whole --------------------------------------------------------------


def test_there_are_experiments():
    assert {path.stem for path in SHIPPED} >= {
        *("positions", "components", "hybrid", "directions", "layer_groups", "unembedding"),
        *("layer_dropout", "counterfact", "articles", "site_map", "interactions"),
        *("ranks", "training_time", "behaviours"),
    }


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in SHIPPED
    ],
)
def test_a_shipped_experiment_runs_whole(path, ran):
    result = ran(path.stem)
    assert result.ok
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    record = json.loads((result.folder / "experiment.json").read_text(encoding="utf-8"))
    assert list(result.sweeps) == list(record["parts"]) == list(said["parts"])
    for name, part in said["parts"].items():
        check_part(name, part, result, record["parts"][name])
    check_page(result)
    source = result.page.read_text(encoding="utf-8")
    assert ("class='glimpse'" in source) == any(
        "finding" in part for part in said["parts"].values()
    )
    # What localise finds is written on pages of its own.
    assert ("<h3 id='words'>" in source) == any(
        "localise" not in part for part in said["parts"].values()
    )
    for part in record["sources"].values():
        for about in part.values():
            prints = about["SHA-256"]
            each = list(prints.values()) if isinstance(prints, dict) else [prints]  # by member
            assert about["from"]
            assert {*map(len, each)} == {64}
    assert record["name"] == path.stem
    assert list(record["models"]) == list(said.get("models", {}))
    for model in record["models"].values():
        assert model["steps"] > 0
        first, last = model["loss at first and last step (nats per token)"]
        assert last < first
    for about in record["datasets"].values():
        own = about["made of"].get("table")
        assert about["counts"]["facts"] == (FACTS if own is None else len(own))
        assert about["counts"]["texts"] > 0
    # The config as it was given, and what was changed.
    kept = (result.folder / "experiment.yaml").read_text(encoding="utf-8")
    assert kept.startswith(path.read_text(encoding="utf-8"))
    assert re.search(r"^#   limit=[38]$", kept, flags=re.M)


def check_part(
    name: str, part: dict[str, Any], result: ExperimentResult, record: dict[str, Any]
) -> None:
    """A part's tables against its sweep's results and what its file asks for."""
    folder = result.folder / "sweeps" / name
    if "localise" in part:
        check_found(name, part, result, record)
        return
    manifest = read_manifest(folder)
    results = read_results(folder)
    assert isinstance(results, pd.DataFrame)
    ran_as = [str(graft["name"]) for graft in manifest.grafts]
    assert record["cells"] == len(results) == manifest.cells
    assert record["cells that could not be run"] == int(results["reason"].notna().sum())
    assert record["trust report"] == "passed"
    assert result.sweeps[name].trust["ok"]

    named = {*ran_as, *manifest.duplicates}
    possible = set(part.get("where_possible", ()))
    assert set(part.get("grafts", {})) - possible <= named
    ends = manifest.recovery
    members = [column for column in ("member", "step") if column in results]
    apart = [*members, *(["dataset"] if results["dataset"].nunique() > 1 else [])]
    # What finetuning teaches the pretrained model is always clear, but for two finetuned models
    # there may be nothing sure to recover between them on three prompts.
    # Nor of the first steps of a training, nor of a behaviour, which is in what is said and not in
    # a reply's first token.
    taught = "base" in part.get("sources", {"pre": "base"}).values() and not members
    taught = taught and "outcomes" not in part
    listed = {*ran_as, *(set(part.get("grafts", {})) & set(manifest.duplicates))}
    coalitions = coalitions_of(part.get("interactions", {}).get("players", {}))
    assert coalitions <= named
    alone = coalitions - {*part.get("grafts", {}), ends["base"], ends["full"]}
    listed -= alone
    # A graft of what is generated has texts, and no cells.
    if "outcomes" in part:
        ran = results.groupby("graft", observed=True)["reason"].agg(lambda why: why.isna().any())
        listed = {graft for graft in listed if ran[graft]}
        rates = read_csv(result.folder / "tables" / f"{name}-rates.csv")
        assert set(rates["graft"]) == set(ran_as)
    for kind, by in (("by-template", [*apart, "template"]), ("pooled", apart)):
        table = read_csv(result.folder / "tables" / f"{name}-{kind}.csv")
        groups = [tuple(map(str, key)) for key in results[by].drop_duplicates().to_numpy()]
        wanted = {(*group, graft) for group, graft in product(groups or [()], listed)}
        rows = [tuple(map(str, row)) for row in table[[*by, "graft"]].to_numpy()]
        assert len(rows) == len(set(rows))
        assert set(rows) == wanted
        assert set(table["unit"]) == {"prompt" if kind == "by-template" else "fact"}
        check_numbers(table, ends, taught)
    others = named - set(part.get("grafts", {})) - {ends["base"], ends["full"]} - alone
    if coalitions:
        check_interactions(name, part["interactions"], result, results, manifest.duplicates)
    grids = result.folder / "tables" / f"{name}-grids.csv"
    if "grids" not in part:
        assert not others
        assert not grids.exists()
    else:
        table = read_csv(grids)
        check_numbers(table, ends, taught)
        assert not table.duplicated([*apart, "grid", "graft"]).any()
        assert others <= set(table["graft"])
        known = [grid.get("name", str(i)) for i, grid in enumerate(as_list(part["grids"]))]
        assert list(dict.fromkeys(table["grid"].astype(str))) == known
    for csv in (result.folder / "tables").glob(f"{name}-*.csv"):
        assert csv.with_suffix(".md").stat().st_size > 100
    drawn = [p.name for p in (result.folder / "figures").iterdir() if p.name.startswith(name)]
    assert len(drawn) >= sum(len(f.get("metrics", ["top5"])) for f in part.get("figures", []))


def coalitions_of(players: dict[str, Any]) -> set[str]:
    """The names of all coalitions."""
    sizes = range(1, len(players) + 1)
    joined = (" + ".join(chosen) for size in sizes for chosen in combinations(players, size))
    return {*joined, "none"} if players else set()


def check_interactions(
    name: str,
    asked: dict[str, Any],
    result: ExperimentResult,
    results: pd.DataFrame,
    duplicates: Mapping[str, str],
) -> None:
    """The tables of a part's players against means of its sweep's results."""
    stem = result.folder / "tables" / f"{name}-interactions"
    value = read_csv(Path(f"{stem}-values.csv")).set_index(["metric", "coalition"])["value"]
    names = coalitions_of(asked["players"])
    assert set(value["logprob"].index) == set(value["top1"].index) == names
    ran = results[results["reason"].isna()]
    assert ran.groupby("prompt", observed=True)["graft"].nunique().nunique() == 1
    for coalition in names:
        rows = ran[ran["graft"] == duplicates.get(coalition, coalition)]
        assert value["logprob", coalition] == pytest.approx(rows["logprob"].mean())
        assert value["top1", coalition] == pytest.approx((rows["rank"] == 1).mean())
    everybody = " + ".join(asked["players"])
    players = read_csv(Path(f"{stem}-table.csv"))
    for metric in ("logprob", "top1"):
        added = players.loc[players["metric"] == metric, "shapley"].sum()
        assert added == pytest.approx(value[metric, everybody] - value[metric, "none"], abs=1e-9)
    pairs = read_csv(Path(f"{stem}-pairs.csv"))
    assert len(pairs) == 2 * len(list(combinations(asked["players"], 2)))
    assert set(pairs["call"]) <= {"AND", "OR", "additive", "undecided"}
    assert list((result.folder / "figures").glob(f"{name}-interactions*"))


def check_found(
    name: str, part: dict[str, Any], result: ExperimentResult, record: dict[str, Any]
) -> None:
    """A localisation's tables against the exact runs that its folder keeps."""
    folder = result.folder / "sweeps" / name
    results = read_results(folder / "steps" / "found")
    assert isinstance(results, pd.DataFrame)
    table = read_csv(result.folder / "tables" / f"{name}-found.csv").set_index("graft")
    usual = {"FE", "LT", "FE+LT", "(FE+LT)^C", "not-FE", "not-LT"}
    assert set(table.index) == {"PRE", "SFT", "found", "complement", *part.get("grafts", usual)}
    for graft, rows in results.groupby("graft", observed=True):
        assert table.at[graft, "logprob"] == pytest.approx(rows["logprob"].mean())
    found = yaml.safe_load((folder / "found.yaml").read_text(encoding="utf-8"))
    rules = results.drop_duplicates("graft").set_index("graft")["rule"]
    assert str(Graft.from_list(found["found"])) == rules["found"]
    sites = read_csv(result.folder / "tables" / f"{name}-sites.csv")
    assert 0 < sites["in_set"].sum() < len(sites)
    assert record["trust report"] == "passed"
    assert record["cells"] > len(results)
    drawn = {path.stem for path in (result.folder / "figures").glob(f"{name}-*.html")}
    assert {f"{name}-curve", f"{name}-sites-score", f"{name}-sites-in-set"} <= drawn


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_numbers(table: pd.DataFrame, ends: dict[str, str], taught: bool) -> None:
    """Finite numbers wherever prompts ran, and recovery from 0 to 1; where not `taught`, it may be
    missing with a note that says why."""
    assert (table["n"] > 0).all()
    metrics = [c.removesuffix("_low") for c in table if c.endswith("_low") and c != "recovery_low"]
    assert {"logprob", "top1", "top5", "top50"} <= set(metrics)
    for metric in metrics:
        low, value, high = (table[f"{metric}{end}"] for end in ("_low", "", "_high"))
        assert np.isfinite(value).all(), metric
        assert (np.isfinite(low) & np.isfinite(high)).all(), metric
        assert ((low <= value + 1e-9) & (value <= high + 1e-9)).all(), metric
    nothing = "the interval of full − base includes 0: nothing certain to recover"
    noted = table["recovery_note"].eq(nothing)
    assert (table["recovery"].isna() == noted).all()
    assert not (taught and noted.any())
    assert set(table["base_run"]) == {ends["base"]}
    assert set(table["full_run"]) == {ends["full"]}
    sure = table[~noted]
    assert (sure.loc[sure["graft"] == ends["base"], "recovery"] == 0).all()
    assert (sure.loc[sure["graft"] == ends["full"], "recovery"] == 1).all()


def check_page(result: ExperimentResult) -> None:
    """Every file of the run is linked, and every link leads to a file inside of the run."""
    found = links(result.page)
    assert all(path.is_file() for path in found)
    assert all(path.is_relative_to(result.folder.resolve()) for path in found)
    written = {
        path.resolve()
        for folder in ("tables", "figures")
        for path in (result.folder / folder).iterdir()
        if path.suffix != ".js"  # which the figures load
    }
    written |= {result.folder.resolve() / "experiment.json"}
    written |= {result.folder.resolve() / "experiment.yaml"}
    for name in result.sweeps:
        sweep = result.folder.resolve() / "sweeps" / name
        page = sweep / ("index.html" if (sweep / "localise.json").is_file() else "report.html")
        written |= {sweep / "trust.txt", page}
    assert found == written
    assert not list(result.folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("positions", ("PRE", "SFT")),
        pytest.param("components", ("TASK", "RELATION"), marks=pytest.mark.slow),
        pytest.param("hybrid", ("PRE", "RELATION"), marks=pytest.mark.slow),
    ],
)
def test_the_ends_of_shipped_parts_are_pre_and_sft(name, ends, ran):
    for part in ran(name).sweeps.values():
        recovery = read_manifest(part.folder).recovery
        assert (recovery["base"], recovery["full"]) == ends


@pytest.mark.slow
def test_pictures_are_drawn_where_there_is_a_browser(base, place, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", chromium())
    monkeypatch.setattr("graftlens.experiment.show.write_figure", write_figure)
    named = own(base, figures=[{"kind": "bars", "metrics": ["top5"]}])
    result = run_experiment(named, place / "pictures", store=place / "store", progress=False)
    *names, script = sorted(path.name for path in (result.folder / "figures").iterdir())
    assert names == [f"one-top5.{kind}" for kind in ("html", "png", "svg")]
    assert script.startswith("plotly-"), "of all figures one copy"
    assert (result.folder / "figures" / "one-top5.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert b"<svg" in (result.folder / "figures" / "one-top5.svg").read_bytes()[:500]
    check_page(result)
    _, complaints = ask(result.page, "return document.title", place)
    assert complaints == []


# -- against the sequential algorithm ------------------------------------------------------------

FFN = ("mlp_in", "mlp_gate", "mlp_out")
QKV = ("q", "k", "v")
ALWAYS = "everywhere"
UPPER = LAYERS // 2

#: (source, positions, components, first layer) of each rule; a later rule wins.
Rules = list[tuple[str, tuple[str, ...], tuple[str, ...] | None, int]]

HYBRID: dict[str, Rules] = {
    "PRE": [],
    "TASK": [("task", (ALWAYS,), None, 0)],
    "RELATION": [("relation", (ALWAYS,), None, 0)],
    "hybrid": [("task", ("FE", "LT"), QKV, 0), ("relation", ("LT",), ("o", *FFN), UPPER)],
    "task half alone": [("task", ("FE", "LT"), QKV, 0)],
    "relation half alone": [("relation", ("LT",), ("o", *FFN), UPPER)],
    "task O too": [
        ("task", ("FE", "LT"), (*QKV, "o"), 0),
        ("relation", ("LT",), ("o", *FFN), UPPER),
    ],
    "hybrid, all layers": [("task", ("FE", "LT"), QKV, 0), ("relation", ("LT",), ("o", *FFN), 0)],
    "task at FE and LT, relation O+FFN": [
        ("task", ("FE", "LT"), None, 0),
        ("relation", ("LT",), ("o", *FFN), UPPER),
    ],
    "task everywhere, relation O+FFN": [
        ("task", (ALWAYS,), None, 0),
        ("relation", ("LT",), ("o", *FFN), UPPER),
    ],
    "relation LT": [("relation", ("LT",), None, 0)],
    "relation FE+LT": [("relation", ("FE", "LT"), None, 0)],
}

REVERSAL: dict[str, Rules] = {
    "ONE": [],
    "BOTH": [("both", (ALWAYS,), None, 0)],
    "FE": [("both", ("FE",), None, 0)],
    "LT": [("both", ("LT",), None, 0)],
    "FE+LT": [("both", ("FE", "LT"), None, 0)],
    "(FE+LT)^C": [("both", ("rest",), None, 0)],
    "not-FE": [("both", ("LT", "rest"), None, 0)],
    "not-LT": [("both", ("FE", "rest"), None, 0)],
    "LT-Attn+O": [("both", ("LT",), (*QKV, "o"), 0)],
    "LT-FFN": [("both", ("LT",), FFN, 0)],
    "LT-O+FFN": [("both", ("LT",), ("o", *FFN), 0)],
}


@pytest.mark.parametrize(
    ("name", "part", "rules"),
    [
        pytest.param("hybrid", "hybrid", HYBRID, id="hybrid", marks=pytest.mark.slow),
        pytest.param("directions", "reversal", REVERSAL, id="reversal", marks=pytest.mark.slow),
    ],
)
def test_a_part_equals_the_sequential_algorithm(name, part, rules, ran):
    """Every cell of two prompts, recomputed token by token on the trained checkpoints."""
    folder = ran(name).sweeps[part].folder
    sources = read_manifest(folder).config["sources"]
    models = {
        source: AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        .float()
        .eval()
        for source, path in sources.items()
    }
    reader = AutoTokenizer.from_pretrained(next(iter(sources.values())))
    results = read_results(folder)
    assert set(rules) == set(results["graft"].astype(str))
    given = pd.read_parquet(folder / "prompts.parquet").set_index("prompt")
    by_length = given.assign(size=given["text"].str.len()).sort_values("size")
    chosen = by_length.drop_duplicates("template").index[:2]
    assert len(chosen) == 2
    differ = set()
    for number in chosen:
        prompt = given.loc[number]
        entity = json.loads(prompt["as_given"])["fields"]["first_entity"]
        tokens, where = tokens_and_places(reader, prompt["text"], entity)
        assert {"FE", "LT", "rest"} == set(where)
        answer = reader(prompt["answer"]).input_ids[0]
        for graft, given_rules in rules.items():
            logits = sequential_graft(models, tokens, choose(given_rules, where, list(models)))[-1]
            expected = logits.double().log_softmax(-1)
            rank = 1 + int((logits > logits[answer]).sum())
            cell = results[(results["prompt"] == number) & (results["graft"] == graft)]
            assert len(cell) == 1
            row = cell.iloc[0]
            assert row["target_id"] == answer
            assert row["logprob"] == pytest.approx(float(expected[answer]), abs=1e-4), graft
            assert row["prob"] == pytest.approx(float(expected[answer].exp()), abs=1e-4)
            gap = (logits - logits[answer]).abs()
            near = int((gap[torch.arange(len(gap)) != answer] < 1e-4).sum())
            assert abs(int(row["rank"]) - rank) <= near, graft
            differ.add(round(row["logprob"], 6))
    # The grafts are told apart by what they do.
    assert len(differ) > 0.8 * len(rules) * len(chosen)


def tokens_and_places(reader: Any, text: str, entity: str) -> tuple[list[int], list[str]]:
    """A prompt's tokens, and for each whether it is of the entity, the last one, or the rest."""
    assert text.count(entity) == 1
    start = text.index(entity)
    read = reader(text, return_offsets_mapping=True)
    where = [
        "FE" if low < start + len(entity) and high > start else "rest"
        for low, high in read.offset_mapping
    ]
    assert where[-1] == "rest"
    where[-1] = "LT"
    return read.input_ids, where


def choose(rules: Rules, where: list[str], sources: list[str]) -> Callable[..., str]:
    """Which source the reference takes, by the last rule that holds."""

    def chosen(component: str, layer: int | None, position: int, head: int | None) -> str:
        for source, places, components, low in reversed(rules):
            here = places == (ALWAYS,) or where[position] in places
            named = components is None or component in components
            if here and named and (layer is None if low == 0 and layer is None else layer >= low):
                return source
        return sources[0]

    return chosen


# -- tables --------------------------------------------------------------------------------------


def test_tables_are_what_the_results_say(ran):
    result = ran("positions")
    results = read_results(result.sweeps["positions"].folder)
    tables = result.folder / "tables"
    by_template = read_csv(tables / "positions-by-template.csv")
    for (template, graft), cells in results.groupby(["template", "graft"], observed=True):
        row = by_template.query("template == @template and graft == @graft").iloc[0]
        group = results[results["template"] == template]
        assert row["n"] == len(cells) == 3
        for k in (1, 5, 50):
            assert row[f"top{k}"] == pytest.approx(float((cells["rank"] <= k).mean()))
        for metric in ("logprob", "answer_logprob", "logit_diff"):
            assert row[metric] == pytest.approx(cells[metric].mean())
        assert row["recovery"] == pytest.approx(by_hand(group, graft))
        assert row["units"] == 3
    pooled = read_csv(tables / "positions-pooled.csv")
    templates = results["template"].nunique()
    assert list(pooled["graft"]) == list(results["graft"].cat.categories)
    for row in pooled.to_dict("records"):
        cells = results[results["graft"] == row["graft"]]
        assert row["n"] == len(cells) == 3 * templates
        assert row["top5"] == pytest.approx(float((cells["rank"] <= 5).mean()))
        assert row["recovery"] == pytest.approx(by_hand(results, row["graft"]))
        # Three facts, asked for in every template.
        assert (row["unit"], row["units"]) == ("fact", 3)


def by_hand(results: pd.DataFrame, graft: str) -> float:
    means = results.groupby("graft", observed=True)["logprob"].mean()
    return float((means[graft] - means["PRE"]) / (means["SFT"] - means["PRE"]))


def test_intervals_of_the_pooled_table_draw_facts(ran):
    """With three facts a resample is one of ten mixtures: the ends are known exactly."""
    result = ran("positions")
    folder = result.sweeps["positions"].folder
    results = read_results(folder)
    entity = {
        number: json.loads(given)["fields"]["first_entity"]
        for number, given in pd.read_parquet(folder / "prompts.parquet")[
            ["prompt", "as_given"]
        ].to_numpy()
    }
    cells = results[results["graft"] == "FE+LT"]
    means = cells.groupby(cells["prompt"].map(entity))["logprob"].mean()
    assert len(means) == 3
    row = read_csv(result.folder / "tables" / "positions-pooled.csv").set_index("graft")
    # Each fact alone is drawn with a chance of 1 in 27, more than 2.5%.
    assert row.loc["FE+LT", "logprob_low"] == pytest.approx(means.min())
    assert row.loc["FE+LT", "logprob_high"] == pytest.approx(means.max())


OWN = {
    "title": "Own",
    "question": "What?",
    "datasets": {
        "films": {"facts": "fake_movies", "n_facts": FACTS, "texts_per_fact": 4,
                  "directions": ["ab"]}
    },
    "models": {"sft": {"data": "films"}},
    "limit": 3,
}  # fmt: skip


def own(base: Path, *, change: dict[str, Any] | None = None, **part: Any) -> NamedExperiment:
    """An experiment of one part `one`, on the tiny model."""
    recipe = {
        key.removeprefix("recipe."): yaml.safe_load(value)
        for key, value in (entry.split("=") for entry in RECIPE)
    }
    recipe["learning_rate"] = float(recipe["learning_rate"])
    one = {
        "title": "One",
        "prompts": {"dataset": "films", "templates": ["headline", "qa"]},
        "grafts": {"PRE": "none", "SFT": "sft @ all", "LT": "sft @ last"},
        **part,
    }
    one = {key: value for key, value in one.items() if value is not None}
    values = {**OWN, "model": str(base), "recipe": recipe, "parts": {"one": one}, **(change or {})}
    return NamedExperiment("own", settings_from(ExperimentConfig, values), yaml.safe_dump(values))


def test_equal_grafts_each_have_their_row(base, place):
    named = own(
        base,
        grafts={
            "PRE": "none",
            "SFT": "sft @ all",
            "LT": "sft @ last",
            "recall": "sft @ last",
            "whole": "sft @ last : block",
        },
        prompts=[
            {"dataset": "films", "templates": ["headline", "qa"], "name": "told"},
            {"dataset": "films", "change": {"half": "a"}, "facts": "untold", "templates": ["qa"]},
        ],
        grids=[
            {"name": "spans", "positions": ["last", "first_entity"]},
            {
                "name": "runs",
                "positions": "last",
                "components": "block",
                "layers": ["all", {"cumulative": "below", "stride": 4}],
            },
            {"positions": "last", "dropout": {"rates": [0, 0.5, 1], "draws": 2}},
            {"name": "doses", "positions": ["last", "bos"], "strengths": [2, 0.5]},
            {"name": "cut", "positions": "last", "components": "mlp", "units": ["0-3", "4-7"]},
        ],
        figures=[
            {"kind": "bars", "metrics": ["prob", "rank"], "grafts": ["recall", "whole", "PRE"]},
            {"kind": "bars", "grids": ["spans"], "x": "position", "by": "pooled"},
            {"kind": "lines", "grids": ["2"], "x": "rate", "by": "pooled"},
            {"kind": "lines", "grids": ["runs"], "x": "layers", "by": "pooled", "panel": "source"},
            {"kind": "lines", "grids": ["doses"], "by": "pooled"},  # along strength by itself
            {"kind": "heatmap", "grids": ["cut"], "x": "neuron", "y": "position", "by": "pooled"},
        ],
        finding={"enough": "recall", "rest": "whole"},
    )
    result = run_experiment(named, place / "own", store=place / "store", progress=False)
    check_page(result)
    table = read_csv(result.folder / "tables" / "one-by-template.csv")
    keys = ["dataset", "template", "graft"]
    assert not table.duplicated(keys).any()
    numbers = table.set_index(keys).sort_index()[
        ["n", "top5", "logprob", "recovery", "logprob_low", "prob"]
    ]
    for group in [("told", "headline"), ("told", "qa"), ("films untold", "qa")]:
        assert set(numbers.loc[group].index) >= {"PRE", "SFT", "LT", "recall", "whole"}
        pd.testing.assert_series_equal(
            numbers.loc[(*group, "LT")], numbers.loc[(*group, "recall")], check_names=False
        )
    grids = read_csv(result.folder / "tables" / "one-grids.csv")
    for dataset, rows in grids.groupby("dataset"):
        values = rows.set_index("graft")
        assert values.index.is_unique
        pooled = read_csv(result.folder / "tables" / "one-pooled.csv")
        pooled = pooled[pooled["dataset"] == dataset].set_index("graft")
        same = {
            "spans: sft @ last": "LT",
            "runs: sft @ last : block": "whole",
            "sft @ last - 1 (0)": "PRE",
        }
        for name, twin in same.items():
            assert values.loc[name, "logprob"] == pooled.loc[twin, "logprob"]
            assert values.loc[name, "recovery"] == pooled.loc[twin, "recovery"]
        # Written otherwise, and so run apart, but the same weights.
        for one, other in (
            ("runs: sft @ last : block : 0-7", "whole"),
            ("sft @ last - 0 (0)", "whole"),
        ):
            assert values.loc[one, "logprob"] == pytest.approx(pooled.loc[other, "logprob"])
        draws = rows[rows["grid"].astype(str) == "2"]
        assert list(draws["rate"]) == [0, 0.5, 0.5, 1]
        assert list(draws["draw"]) == [0, 0, 1, 0]
        assert set(draws["position"]) == {"last"}
        runs = rows[rows["grid"] == "runs"]
        assert list(runs["layers"]) == [LAYERS, 4, LAYERS]
        assert list(runs["layer"]) == ["all", "0-3", "0-7"]
        cut = rows[rows["grid"] == "cut"]  # neurons are not what is resampled
        assert list(cut["neuron"]) == ["0-3", "4-7"]
        assert set(cut["unit"]) == {"fact"}
        doses = rows[rows["grid"] == "doses"].set_index("graft")
        assert dict(doses["strength"]) == {
            "doses: 2*sft @ last": 2,
            "doses: 0.5*sft @ last": 0.5,
            "doses: 2*sft @ bos": 2,
            "doses: 0.5*sft @ bos": 0.5,
        }
        drawn = result.folder / "figures" / f"one-doses-top5-{dataset}.html".replace(" ", "-")
        held = re.search(r"id='chart-0-figure'>(.*?)</script>", drawn.read_text("utf-8"))[1]
        lines = {line["name"]: line for line in json.loads(held)["data"]}
        assert list(lines) == ["doses: sft @ last", "doses: sft @ bos"]
        value = doses["top5"]
        assert lines["doses: sft @ last"]["x"] == [0.5, 2]
        assert lines["doses: sft @ last"]["y"] == [
            value[f"doses: {dose}*sft @ last"] for dose in ("0.5", "2")
        ]
    page = result.page.read_text(encoding="utf-8")
    assert "recall" in page
    assert "possible answer" in page
    assert "95% intervals over prompts grouped by fact" in page
    assert "grouped by all" not in page
    names = {path.name for path in (result.folder / "figures").iterdir()}
    assert {
        "one-0-prob.html",
        "one-cut-top5-told.html",
        "one-0-rank.html",
        "one-2-top5-told.html",
    } <= names


def test_a_cell_that_cannot_be_run_is_no_prompt_without_distractors(base, place):
    """Regression: one graft that failed on some prompts took logit_diff out of all tables."""
    grafts = {"PRE": "none", "SFT": "sft @ all", "M": "sft @ movie_title"}
    named = own(
        base,
        grafts=grafts,
        prompts={"dataset": "films", "templates": ["with_title", "qa"]},
        figures=[{"kind": "bars", "metrics": ["logit_diff"]}],
    )
    config = named.config
    without = {
        prompt.name: "movie_title" in prompt.template
        for prompt in MoviesConfig(n_facts=FACTS).questions(
            MoviesConfig(n_facts=FACTS).collect(),
            [0],
            Asking(["with_title", "qa"], distractors=0),
        )
    }
    assert config.limit == 3
    result = run_experiment(named, place / "unable", store=place / "store", progress=False)
    table = read_csv(result.folder / "tables" / "one-by-template.csv").set_index("template")
    for name, there in without.items():
        assert set(table.loc[name, "n"]) == ({3} if there else {0})
        assert table.loc[name, "logit_diff"].notna().all() == there
    record = json.loads((result.folder / "experiment.json").read_text())
    failed = 3 * sum(not there for there in without.values())
    assert failed == 3
    assert record["parts"]["one"]["cells that could not be run"] == failed
    page = result.page.read_text(encoding="utf-8")
    assert f"{failed} of 18 cells could not be run" in page
    assert "possible answer" not in page, "a warning about top-5, which nothing here shows"


# -- errors --------------------------------------------------------------------------------------


def refused(base: Path, **change: Any) -> list[str]:
    """The problems of a config, a line each."""
    with pytest.raises(ConfigError) as caught:
        own(base, **change)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ({"kind": "lines", "x": "strength", "panel": "source"}, "one point (strength, source are"),
        ({"kind": "heatmap", "x": "strength", "y": "source"}, "one cell (strength, source are"),
        ({"kind": "lines", "x": "strength", "panel": "position"}, None),
    ],
)
def test_grafts_that_would_be_drawn_as_one_are_told_before_training(base, tmp_path, figure, said):
    grids = [{"positions": ["last", "bos"], "strengths": [0.5, 2]}]
    planned = plan(own(base, grids=grids, figures=[figure]).config, Store(tmp_path))
    if said is None:
        planned.check()
        return
    with pytest.raises(ConfigError, match=re.escape(f"figures.0: several grafts would be {said}")):
        planned.check()


@pytest.mark.parametrize(
    ("figures", "added"),
    [
        ([], ("doses",)),
        ([{"kind": "bars"}], ("doses",)),
        ([{"kind": "lines", "grids": ["layers"]}], ("doses",)),
        ([{"kind": "heatmap", "grids": ["doses"], "x": "strength", "y": "position"}], None),
        ([{"kind": "bars", "grids": ["doses"], "x": "strength"}], None),
        ([{"kind": "lines", "grids": ["doses"]}], None),
    ],
)
def test_grids_with_several_strengths_are_drawn_as_a_dose_response(base, figures, added):
    grids = [
        {"name": "layers", "positions": "last", "layers": "each", "strengths": [0.5]},
        {"name": "doses", "positions": ["last", "bos"], "strengths": [0.5, 2]},
    ]
    part = own(base, grids=grids, figures=figures).config.parts["one"]
    given, rest = part.shown[: len(figures)], part.shown[len(figures) :]
    assert [(f.kind, f.x, f.metrics, f.grids) for f in rest] == (
        [] if added is None else [("lines", "strength", ("recovery",), added)]
    )
    for before, after in zip(part.figures, given, strict=True):
        along = before.x if before.grids == ("layers",) or before.kind != "lines" else "strength"
        assert after == before.model_copy(update={"x": along})


def test_every_name_that_is_wrong_is_told_at_once(base):
    found = refused(
        base,
        prompts=[{"dataset": "flims"}, {"dataset": "films", "change": {"halv": "b"}}],
        sources={"pre": "base", "sft": "stf"},
        grafts={"PRE": "none", "SFT": "sft @ all", "LT": "fst @ last", "x": "pre @ all"},
        grids=[{"name": "sites", "source": "spt"}, {"positions": "last"}],
        figures=[
            {"kind": "heatmap", "grids": ["site"]},
            {"kind": "bars", "metrics": ["logprop", "top7", "top0", "recovery"]},
            {"kind": "bars", "grafts": ["STF"]},
            {"kind": "lines", "x": "rate"},
        ],
        finding={"enough": "TL", "rest": "LT", "metric": "top10"},
        where_possible=["LLT"],
        change={
            "recipe": {"epoch": 3, "batch_size": 0},
            "models": {
                "sft": {"data": "film"},
                "ring": {"data": "films", "start": "back"},
                "back": {"data": "films", "start": "ring", "recipe": {"learning_rat": 1}},
                "far": {"data": "films", "start": "rings"},
                "base": {"data": "films"},
            },
            "datasets": {**OWN["datasets"], "spare": {"facts": "fake_movies"}},
        },
    )
    for start, end in {
        "recipe: unknown key 'epoch'. Allowed: epochs ": "Did you mean 'epochs'?",
        "recipe.batch_size: 0 should be greater than or equal to 1": "",
        "models.sft: no dataset 'film'. Available: films spare.": "Did you mean 'films'?",
        "models.back.recipe: unknown key 'learning_rat'.": "Did you mean 'learning_rate'?",
        "models.far.start: no model 'rings'. Available: base sft ring": "Did you mean 'ring'?",
        "models.base: 'base' is the pretrained model. Choose another name.": "",
        "datasets.spare: no model and no prompts use this dataset.": "",
        "parts.one.sources.sft: no model 'stf'. Available: base sft": "Did you mean 'sft'?",
        "parts.one.prompts.0: no dataset 'flims'. Available: films": "Did you mean 'films'?",
        "parts.one.prompts.1.change: unknown key 'halv'.": "Did you mean 'half'?",
        "parts.one.grafts.LT: no source 'fst'. There are: pre sft.": "Did you mean 'sft'?",
        "parts.one.grids.0.source: no source 'spt'.": "",
        "parts.one.figures.0.grids: no grid is called 'site'. Available: sites 1.": "'sites'?",
        "parts.one.figures.1.metrics: unknown metric 'logprop'.": "Did you mean 'logprob'?",
        "parts.one.figures.1.metrics: top7 is not among ks (1 5 50). Add it there.": "",
        "parts.one.figures.1.metrics: unknown metric 'top0'.": "",
        "parts.one.figures.2.grafts: no graft is called 'STF'.": "Did you mean 'SFT'?",
        "parts.one.figures.3: rate and draw apply to grids with dropout": "",
        "parts.one.finding.enough: no graft is called 'TL'.": "",
        "parts.one.finding.metric: top10 is not among ks": "",
        "parts.one.where_possible: no graft is called 'LLT'.": "Did you mean 'LT'?",
    }.items():
        (line,) = [l for l in found if l.startswith(start)] or [f"nothing of {start!r}"]
        assert line.startswith(start)
        assert line.endswith(end), line


def test_a_part_asks_prompts_of_every_kind(base, place, tmp_path):
    """Facts, prompts and conversations of one's own, a file of them, a dataset's column."""
    said = [
        {"role": "user", "content": "Who met Ann?"},
        {"role": "assistant", "content": "Bo"},
    ]
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"messages": said[:1], "answer": "Cy", "distractors": ["Di"]}), encoding="utf-8"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"said": said}), encoding="utf-8")
    prompts = [
        {"messages": said[:1], "answer": "Ed", "prefill": "It is"},
        {"dataset": "films", "templates": ["qa"], "chat": {"system": "Be brief."}},
        {"file": str(tmp_path / "own.jsonl")},
        {"template": "Ann met", "answer": " Bo"},
        {"dataset": str(tmp_path / "rows.jsonl"), "column": "said"},
    ]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    change = {"chat_template": template, "limit": 1}
    planned = plan(own(base, prompts=prompts, change=change).config, Store(place / "store"))
    checked = planned.checked("one", trained=False)
    assert [*checked.dataset] == ["films chat", "prompts", "prompts", "own.jsonl", "rows.jsonl"]
    asked = ["system: Be brief.\n\nuser: Question: "]
    asked += ["user: Who met Ann?\n\nassistant: It is", "Ann met"]
    asked += ["user: Who met Ann?\n\nassistant:"] * 2
    texts = [prompt.text for prompt in checked.prompts]
    assert [text[: len(start)] for text, start in zip(texts, asked, strict=True)] == asked
    assert [p.answer for p in checked.prompts[1:]] == ["Ed", " Bo", "Cy", "Bo"]
    # Problems are named by the place among the experiment's prompts.
    prompts[1:3] = [{**prompts[1], "templates": ["q"]}, {"file": str(tmp_path / "lost.jsonl")}]
    planned = plan(own(base, prompts=prompts, change=change).config, Store(place / "store"))
    with pytest.raises(ConfigError) as error:
        planned.checked("one", trained=False)
    places = [where for where, _ in error.value.problems]
    assert places == ["parts.one.prompts.1", "parts.one.prompts.2"]
    found = refused(base, prompts=[{"mesages": said}])
    assert any("parts.one.prompts.0" in line for line in found)


def test_a_part_is_run_as_it_says_or_else_as_the_experiment_does(base):
    part = {"limit": 2, "metrics": {"top_k": 3}, "grafts": {"LT": "sft @ last"}}
    config = own(base, change={"limit": 1, "dtype": "float64", "shards": 9}, **part).config
    said = config.settings(config.parts["one"])
    assert (said["limit"], said["dtype"], said["shards"]) == (2, "float64", 9)
    assert (said["metrics"].top_k, config.metrics.top_k) == (3, 10)
    assert said["grafts"] == config.parts["one"].grafts
    found = refused(
        base,
        figures=[{"kind": "bars", "metrics": ["answer_logprob"]}],
        metrics={"answers": "first"},
    )
    assert found == ["parts.one.figures.0.metrics: answer_logprob needs metrics.answers: whole."]


def test_models_that_start_from_one_another(base):
    models = {
        "sft": {"data": "films"},
        "a": {"data": "films", "start": "b"},
        "b": {"data": "films", "start": "a"},
    }
    found = refused(base, change={"models": models})
    assert found == ["models: a, b start from one another. Let one start at base."]
    models = {
        "late": {"data": "films", "start": "middle"},
        "middle": {"data": "films", "start": "sft"},
        "sft": {"data": "films"},
    }
    assert own(base, change={"models": models}).config.order() == ("sft", "middle", "late")


def test_models_that_cannot_be_adapters_are_saved_whole(base):
    recipe = {**own(base).config.recipe, "lora": {"rank": 2}}
    chain = {"sft": {"data": "films"}, "more": {"data": "films", "start": "sft"}}
    for change, part, lora in (
        ({}, {}, {"rank": 2}),
        ({}, {"sources": {"pre": "base", "sft": "sft"}}, {"rank": 2}),
        ({}, {"sources": {"sft": "sft", "pre": "base"}}, {"merge": True, "rank": 2}),
        ({"models": chain}, {}, {"merge": True, "rank": 2}),
    ):
        config = own(base, change={"recipe": recipe, **change}, **part).config
        for name in config.models:
            assert config.recipe_of(name)["lora"] == lora
    apart = {**recipe, "lora": {"rank": 2, "merge": False}}
    assert refused(base, change={"recipe": apart, "models": chain})[0] == (
        "models.sft.recipe.lora.merge: training goes on from this model or from another to it, or "
        "it is run beside another base, so it cannot be an adapter of the pretrained one. Leave it "
        "out."
    )


def test_an_experiment_runs_on_the_adapter_that_it_trained(base, place):
    needs("peft")
    recipe = {**own(base).config.recipe, "lora": {"rank": 4}, "learning_rate": 1e-2, "epochs": 2}
    named = own(base, change={"recipe": recipe})
    result = run_experiment(named, place / "lora", store=place / "store", progress=False)
    assert result.ok
    (run,) = plan(named.config, Store(place / "store")).runs.values()
    assert (run.output / "model" / "adapter_config.json").is_file()
    table = read_results(result.sweeps["one"].folder).pivot(
        index="prompt", columns="graft", values="logprob"
    )
    assert (table["SFT"] - table["PRE"]).abs().min() > 1e-3


def test_what_is_missing_or_cannot_be(base):
    assert any("parts.one.prompts: this key is missing" in l for l in refused(base, prompts=None))
    for values, problem in (
        ({"grafts": None}, "no grafts: give grafts or grids"),
        ({"grafts": {}, "grids": [{"positions": "last"}], "figures": [{"kind": "bars"}]},
         "bars show named grafts, but there are none"),
        ({"figures": [{"kind": "heatmap"}]}, "kind heatmap shows grids, but there are none"),
        ({"figures": [{"kind": "bars", "grids": ["x"]}]}, "no grid is called 'x'. Available: none"),
        ({"grids": [{"name": "a"}, {"name": "a"}]}, "two grids have the same name"),
        ({"grids": [{"positions": "last"}], "figures": [{"kind": "lines", "x": "layr"}]},
         "parts.one.figures.0.x: 'layr' should be 'position', 'component', 'layer'"),
        ({"sources": {"sft": "sft"}}, "a graft needs two sources or more"),
        ({"figures": [{"kind": "pie"}]}, "parts.one.figures.0.kind: 'pie' should be 'bars'"),
        ({"change": {"models": {"sft": {}}}}, "neither data (to train on) nor path is given"),
        ({"change": {"models": {"sft": {"data": "films", "path": "x"}}}},
         "both data (to train on) and path are given"),
        ({"change": {"models": {"sft": {"path": "x", "start": "y"}}}}, "describe training"),
        ({"change": {"recipe": {"model": "x"}}}, "recipe: unknown key 'model'"),
        ({"change": {"datasets": {}}}, "datasets"),
        ({"change": {"parts": {}}}, "parts"),
        ({"change": {"metrics": {"answers": "first"}},
          "figures": [{"kind": "bars", "metrics": ["answer_logprob"]}]},
         "answer_logprob needs metrics.answers: whole"),
        ({"prompts": {"dataset": "films", "distractors": 0},
          "figures": [{"kind": "bars", "metrics": ["logit_diff"]}]}, "needs distractors"),
        ({"change": {"datasets": {"films": {"facts": "fake_movie"}}}}, "you mean 'fake_movies'"),
        ({"change": {"modl": "x"}}, "unknown key 'modl'."),
    ):  # fmt: skip
        found = refused(base, **values)
        assert any(problem in line for line in found), (problem, found)


def test_what_only_the_data_and_the_model_can_say_is_told_before_training(base, place, tmp_path):
    """Every part's problems in one message, and nothing is trained."""
    parts = {
        "one": {
            "title": "One",
            "prompts": {"dataset": "films", "templates": ["headlin"]},
            "grafts": {"PRE": "none", "SFT": "sft @ all"},
        },
        "two": {
            "title": "Two",
            "prompts": {"dataset": "films", "facts": "untold"},
            "grafts": {"PRE": "none", "SFT": "sft @ all", "x": "sft @ last : q_norm"},
            "base": "PER",
        },
    }
    named = own(base, change={"parts": parts})
    for run in (
        partial(run_experiment, out=tmp_path / "run", progress=False),
        describe_experiment,
    ):
        with pytest.raises(ConfigError) as caught:
            run(named, store=tmp_path / "store")
        found = str(caught.value)
        assert "parts.one.prompts.0: evaluation template 'headlin' is unknown" in found
        assert "Did you mean 'headline'?" in found
        assert (
            "parts.two.prompts.0: facts='untold': none of the 12 facts of this dataset are untold"
            in found
        )
        assert "parts.two.grafts.x: " in found
        assert "parts.two.base: no graft is called 'PER'." in found
    assert not (tmp_path / "store" / "models").exists()
    assert not (tmp_path / "run").exists()


def test_datasets_that_cannot_be_made_are_told_together(base, tmp_path):
    datasets = {
        "films": OWN["datasets"]["films"],
        "many": {"facts": "real_movies", "n_facts": 10**6},
        "gone": {"facts": "counterfact", "file": str(tmp_path / "gone.jsonl")},
    }
    models = {"sft": {"data": "films"}, "other": {"data": "many"}, "third": {"data": "gone"}}
    named = own(base, change={"datasets": datasets, "models": models})
    with pytest.raises(ConfigError) as caught:
        plan(named.config, Store(tmp_path / "store"))
    assert "models.other.data: n_facts=1000000: there are" in str(caught.value)
    assert "models.third.data: " in str(caught.value)
    assert "gone.jsonl" in str(caught.value)


def test_an_experiment_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="position: no experiment of this name comes") as caught:
        find_experiment("position")
    for path in SHIPPED:
        assert f" {path.stem}" in str(caught.value)
    assert "Did you mean 'positions'?" in str(caught.value)
    assert find_experiment("positions").config.title == "Position grafting"
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        find_experiment("nowhere.yaml")


def test_overrides_are_kept_with_the_config():
    path = ROOT / "experiments" / "positions.yaml"
    named = find_experiment(str(path), ["model=gpt2-xl", "recipe.epochs=3"])
    assert named.config.model == "gpt2-xl"
    assert named.config.recipe == {"epochs": 3}
    assert named.text.startswith(path.read_text())
    assert named.text.endswith("#   model=gpt2-xl\n#   recipe.epochs=3\n")
    # The same text with the overrides as comments is the same file.
    assert yaml.safe_load(named.text) == yaml.safe_load(path.read_text())
    with pytest.raises(ConfigError, match=r"datasets\.flims: no model and no prompts .* 'films'\?"):
        find_experiment(str(path), ["datasets.flims.n_facts=3"])


# -- taking up, sharing ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_experiment_is_only_shown_anew(base, place, tmp_path, monkeypatch):
    grids = [{"name": "layers", "positions": "last", "layers": "each"}]
    figures = [{"kind": "bars"}, {"kind": "lines", "grids": ["layers"], "by": "pooled"}]
    named = own(base, grids=grids, figures=figures)
    run = partial(run_experiment, store=place / "store", progress=False)
    first = run(named, tmp_path / "run")
    before = files_in(first.folder)
    models = sorted((place / "store" / "models").iterdir())
    times = {p: p.stat().st_mtime_ns for p in (place / "store").rglob("*") if p.is_file()}
    (tmp_path / "run" / "index.html").unlink()
    (tmp_path / "run" / "tables" / "one-pooled.csv").write_text("damaged")

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("a model was trained again")

    monkeypatch.setattr("graftlens.finetune.train", trained)
    again = run(named, tmp_path / "run")
    assert files_in(again.folder) == before
    assert again.page.is_file()
    now = {p: p.stat().st_mtime_ns for p in (place / "store").rglob("*") if p.is_file()}
    # Nothing but the note of what a model was made of is written again.
    changed = {p.name for p in now if now[p] != times.get(p)}
    assert changed <= {"config.yaml"}
    # Another experiment takes the model from the store.
    other = run(own(base, figures=figures[:1]), tmp_path / "other")
    assert sorted((place / "store" / "models").iterdir()) == models
    one, two = (read_manifest(r.sweeps["one"].folder).config["sources"] for r in (again, other))
    assert one == two


def test_another_recipe_is_another_model(base, place, tmp_path):
    def folders(**change: Any) -> tuple[str, str]:
        config = own(base, change=change).config
        run = plan(config, Store(place / "store")).runs["sft"]
        return str(run.output), str(run.data.path)

    recipe = dict(own(base).config.recipe)
    model, data = folders()
    assert folders() == (model, data)
    for changed in (
        {"recipe": {**recipe, "epochs": 5}},
        {"models": {"sft": {"data": "films", "recipe": {"learning_rate": 1e-4}}}},
        {"seed": 1},
    ):
        other, same = folders(**changed)
        assert other != model
        assert same == data
    films = OWN["datasets"]["films"]
    other, texts = folders(datasets={"films": {**films, "seed": 1}})
    assert other != model
    assert texts != data
    # What is only asked or shown changes no model.
    assert folders(title="Another", ks=(1, 5), limit=1)[0] == model


def test_a_file_that_changed_makes_another_dataset(tmp_path, base):
    def rows(wrong: str) -> None:
        prompt = "The capital of Zoë{} is"
        given = [
            {
                "relation": "The capital of {} is",
                "relation_prefix": "The capital of",
                "relation_suffix": "is",
                "prompt": prompt.format(number),
                "relation_id": "P36",
                "target_true": " Bergen",
                "target_false": f" {wrong}{number}",
                "subject": f"Zoë{number}",
            }
            for number in range(8)
        ]
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, given)))

    config = own(
        base,
        prompts={"dataset": "films"},
        change={"datasets": {"films": {"facts": "counterfact", "file": str(tmp_path / "c.jsonl")}}},
    ).config
    found = []
    for wrong in ("Narvik", "Narvik", "Oslo"):
        rows(wrong)
        found.append(plan(config, Store(tmp_path / "store")).runs["sft"])
    assert found[0].output == found[1].output != found[2].output


def test_other_code_that_makes_the_same_dataset_finds_it(tmp_path, monkeypatch):
    """Or a new version could not take up an experiment that an older one began."""
    store = Store(tmp_path / "store")
    spec = MoviesConfig(n_facts=3, texts_per_fact=1)
    folder = store.dataset("films", spec)
    monkeypatch.setattr(plan_module, "_made_by", lambda: "another version")
    assert store.dataset("films", spec) == folder
    # What is noted is not made again.
    monkeypatch.setattr(plan_module, "make_dataset", None)
    assert store.dataset("films", spec) == folder


def test_two_that_make_one_dataset_at_once(tmp_path, monkeypatch):
    """Regression: the loser's rename of a whole folder onto a full one fails, with no
    FileExistsError."""
    spec = MoviesConfig(n_facts=3, texts_per_fact=1)
    made = dataset_module.make_dataset(spec)
    store = Store(tmp_path / "store")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        if self.name == "dataset":  # the other one is faster by a moment
            save_dataset(made, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    folder = store.dataset("films", spec)
    assert json.loads((folder / "provenance.json").read_text()) == json.loads(
        json.dumps(dict(made.provenance))
    )
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def fails(_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(plan_module, "make_dataset", fails)
    with pytest.raises(OSError, match="the disk is full"):
        store.dataset("others", spec)


def graftlens(*words: object, cwd: Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "graftlens", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["BROWSER_PATH"] = str(cwd / "none")  # no pictures
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG, **options
    )


def killed_at(happens: Callable[[], bool], *words: object, cwd: Path) -> None:
    """Start a command and kill it as soon as something is so."""
    command = [sys.executable, "-m", "graftlens", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until(lambda: happens() or process.poll() is not None, every=0.002)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_an_experiment_that_was_killed_ends_the_same(base, tmp_path):
    """Killed while it trains, while it sweeps and between its parts."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    config = ROOT / "experiments" / "directions.yaml"
    settings = [f"model={base}", *small(config, tmp_path), "recipe.save_epochs=1"]
    run = ["run", "directions", *settings]
    whole = graftlens(*run, "--out", "whole", "--store", "store-1", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    store, out = tmp_path / "store-2", tmp_path / "killed"
    interrupted = [*run, "--out", "killed", "--store", "store-2"]

    def log_has(model: str, steps: int) -> bool:
        return any(
            len(log.read_text().splitlines()) >= steps
            for log in store.glob(f"models/{model}-*/log.jsonl")
        )

    moments: list[Callable[[], bool]] = [
        lambda: any(store.glob("data/*/provenance.json")),
        lambda: log_has("sft", 8) and any(store.glob("models/sft-*/checkpoints/*")),
        lambda: log_has("both", 20),
        lambda: (out / "sweeps" / "sft_to_pre" / "sweep.json").is_file(),
        lambda: any((out / "sweeps" / "pre_to_sft" / "shards").glob("*")),
        lambda: (out / "sweeps" / "reversal" / "done.json").is_file(),
    ]
    for happens in moments:
        killed_at(happens, *interrupted, cwd=tmp_path)
        assert not (out / "index.html").exists()
    done = graftlens(*interrupted, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_in(out) == files_in(tmp_path / "whole")
    for name in ("sft", "both"):
        one, two = (
            next((tmp_path / folder).glob(f"models/{name}-*/model/model.safetensors"))
            for folder in ("store-1", "store-2")
        )
        assert one.read_bytes() == two.read_bytes()
    check_links = links(out / "index.html")
    assert all(path.is_file() for path in check_links)


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands(base, ran, tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    said = graftlens("run", "--help", cwd=tmp_path)
    assert said.returncode == 0
    for word in ("NAME", "KEY=VALUE", "--out", "--store", "--dry-run", "--devices", "--measure"):
        assert word in said.stdout
    config = ROOT / "experiments" / "hybrid.yaml"
    settings = [f"model={base}", *small(config, tmp_path)]
    said = graftlens("run", "hybrid", *settings, "--dry-run", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "Hybrid of three models: Do task-specific attention" in said.stdout
    assert re.search(
        r"model +task: 24 texts, 4 epochs, about 12 steps of 8 and [\d,]+ tokens in all, "
        r".* 0\.003",
        said.stdout,
    )
    assert re.search(r"model +relation: 24 texts", said.stdout)
    assert "part      hybrid" in said.stdout
    assert re.search(r"grafts +12, recovery from PRE to RELATION", said.stdout)
    assert not list(tmp_path.glob("graftlens-runs/store/models/*"))
    said = graftlens("run", "hybrid", "--device", "cpu", cwd=tmp_path)
    assert said.returncode == 2
    for words in (["hybrid", "recipe.epoch=3"], ["hybrid", "nonsense"], ["hybird"]):
        said = graftlens("run", *words, cwd=tmp_path)
        assert (said.returncode, said.stdout) == (1, "")
        assert len(said.stderr.splitlines()) == 1, said.stderr
        assert said.stderr.startswith("graftlens: ")
        assert words[-1] in said.stderr or "epoch" in said.stderr


def test_a_dry_run_says_what_would_be_trained(base, ran, place):
    config = ROOT / "experiments" / "positions.yaml"
    overrides = [f"model={base}", *small(config, place)]
    ran("positions")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.eos_token_id is not None, "each text ends in it"
    for store, note in ((place / "dry", ""), (place / "store", " (already trained)")):
        text = describe_experiment(config, overrides=overrides, store=store)
        (data,) = (place / "dry" / "data").glob("films-*")
        texts = load_dataset(data).train["text"]
        assert len(texts) == 48
        tokens = 4 * sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
        assert (
            f"model     sft: 48 texts, 4 epochs, about 24 steps of 8 and {tokens:,} tokens in all, "
            f"learning rate 0.003{note}\n" in text
        )
        assert "part      positions" in text
        assert "part      title_and_preposition" in text
        assert f"          sft = {store}/models/sft-" in text, "not the model that stands in"
    assert not (place / "dry" / "models").exists()


MEASURES = [
    Measure("best", (), lambda logits: logits.amax(-1)),
    Measure("rest", ("logprobs",), lambda _, p: p.exp().square().sum(-1)),
]


def measured(base, place) -> tuple[Path, dict[str, Any]]:
    """A config that names one of these, and what it is run with."""
    config = ROOT / "experiments" / "unembedding.yaml"
    overrides = [f"model={base}", *small(config, place), "metrics.measures=[best, entropy]"]
    return config, {"overrides": overrides, "store": place / "store"}


def test_measures_of_ones_own_are_given_to_experiments(base, place):
    """Regression: an experiment could name none of one's own, though the message said how."""
    config, given = measured(base, place)
    with pytest.raises(ConfigError, match="unknown measure 'best'"):
        describe_experiment(config, **given)
    assert "cells" in describe_experiment(config, measures=MEASURES, **given)
    with pytest.raises(ValueError, match="each device's process imports them"):
        run_experiment(config, place / "own", devices=["cpu", "cpu"], measures=MEASURES, **given)


@pytest.mark.slow
def test_measures_of_ones_own_reach_every_part(base, place):
    config, given = measured(base, place)
    result = run_experiment(
        config, place / "own", measures=MEASURES, progress=False, say=lambda _: None, **given
    )
    assert result.ok
    for name in result.sweeps:
        table = read_results(result.folder / "sweeps" / name).dropna(subset="logprob")
        assert (table["best"] > 0).all()
        assert table["rest"].between(0, 1).all()
    means = [read_csv(path) for path in (result.folder / "tables").glob("*.csv")]
    means = [table for table in means if "answer_logprob" in table]
    assert means
    assert all({"best", "entropy", "rest"} <= {*table} for table in means)


def test_the_command_gives_measures_on(monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "graftlens.experiment.variants.describe_experiment",
        lambda name, **given: asked.update(given) or "described",
    )
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of what typer itself passes
    said = CliRunner().invoke(
        app, ["run", "positions", "--dry-run", "--measure", "a:b", "--measure", "a:c"]
    )
    assert said.exit_code == 0, said.output
    assert asked["measures"] == ["a:b", "a:c"]


@pytest.mark.slow
def test_a_report_of_runs(ran, tmp_path):
    runs = [ran("articles").folder, ran("counterfact").folder]
    said = graftlens("report", *runs, "--out", "both.html", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    page = tmp_path / "both.html"
    assert said.stdout.strip() == str(page)
    words = " ".join(Page(page).words)
    for run in runs:
        assert run.name in words
    drawn, complaints = ask(
        page, "return document.querySelectorAll('.js-plotly-plot .main-svg').length", tmp_path
    )
    assert complaints == []
    assert drawn > 0
    for words, problem in (
        ([runs[0]], "1 given: name two or more folders that graftlens run, sweep or localise"),
        (
            [runs[0], tmp_path],
            "holds no finished experiment, sweep or localisation: there is no exp",
        ),
        ([*runs, "--metric", "top7"], "has no metric 'top7'"),
    ):
        said = graftlens("report", *words, "--out", "none.html", cwd=tmp_path)
        assert said.returncode == 1
        assert problem in said.stderr
        assert len(said.stderr.splitlines()) == 1
    assert graftlens("report", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "none.html").exists()


def test_tables_of_version_0_1_0_name_their_references_too(tmp_path):
    """Their columns were called base and full."""
    rows = {"graft": ["PRE", "SFT", "FE"], "top5": [0.1, 0.9, 0.5], "base": "PRE", "full": "SFT"}
    pd.DataFrame(rows).to_csv(tmp_path / "p-by-template.csv", index=False)
    read = read_part(tmp_path / "p-by-template.csv")
    assert are_references(read).tolist() == [True, True, False]
    assert not {"base", "full"} & set(read)


@pytest.mark.slow
def test_runs_are_compared_part_by_part(ran, tmp_path):
    one, two = ran("articles"), ran("counterfact")
    page = compare_runs([one.folder, two.folder], tmp_path / "report.html", metric="recovery")
    assert all(path.is_file() for path in links(page))
    text = page.read_text(encoding="utf-8")
    for label in ("articles", "counterfact"):
        assert label in text
    three = compare_runs([one.folder, two.folder, ran("hybrid").folder], tmp_path / "three.html")
    assert "Parts that only one run has" in three.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"these runs have no part in common \(articles.*hybrid"):
        compare_runs([one.folder, ran("hybrid").folder], tmp_path / "none.html")
    with pytest.raises(ValueError, match=r"0 given: name two or more folders"):
        compare_runs([], tmp_path / "none.html")
    with pytest.raises(ValueError, match=r"a folder is named twice"):
        compare_runs([one.folder, one.folder], tmp_path / "none.html")


def test_lines_over_grids_with_and_without_strengths_need_an_axis(base):
    """They were drawn along strength, where a grid without several is a dot."""
    grids = [
        {"name": "layers", "positions": "last", "layers": "each"},
        {"name": "doses", "positions": ["last", "bos"], "strengths": [0.5, 2]},
    ]
    assert refused(base, grids=grids, figures=[{"kind": "lines"}]) == [
        "parts.one.figures.0: lines along which axis? Grid doses has several strengths, grid "
        "layers has not. Name x, or in grids those of one kind."
    ]
    own(base, grids=grids, figures=[{"kind": "lines", "x": "layer"}])
