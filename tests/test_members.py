"""Sweeps over made sources and over the models of one source, one after another."""

import gc
import json
import re
import shutil
import signal
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from command import graftlens
from families import save_checkpoint, tiny_model
from loras import on
from sweeps import Processes, assert_equal_tables, config, read_whole, unfinished_files
from toytokenizers import llama3_style

from graftlens.configfile import ConfigError
from graftlens.evaluation import evaluate
from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.made import Each
from graftlens.model.members import members_of
from graftlens.reports import sweep_report, sweep_summary
from graftlens.stats import compare_all, summarise
from graftlens.sweep.config import SweepConfig, check, load_config
from graftlens.sweep.description import describe_sweep
from graftlens.sweep.models import Models
from graftlens.sweep.results import read_manifest, read_results
from graftlens.sweep.runner import is_finished, run_sweep
from graftlens.viz import lines
from graftlens.viz import page as page_module
from graftlens.viz.tables import read_table

STEPS = (40, 5, 120)
GRAFTS = {"PRE": "none", "SFT": "time @ all", "LT": "time @ last", "q": "time @ last : q : 1"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and the processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, `sft`, three checkpoints of a run and an adapter, with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = llama3_style()
    models = {
        name: tiny_model("llama", seed, len(tokenizer)) for seed, name in enumerate(("pre", "sft"))
    }
    models |= {f"checkpoint-{step}": tiny_model("llama", step, len(tokenizer)) for step in STEPS}
    for name, model in models.items():
        save_checkpoint(model, folder / name, tokenizer)
    on(models["pre"], 3).save_pretrained(folder / "lora")
    return folder


def of_time(run: Path, **changes: Any) -> dict[str, Any]:
    """A sweep of the three checkpoints: 12 prompts under 4 grafts each, in 3 shards each."""
    sources = {"pre": str(run / "pre"), "time": {"each": str(run / "checkpoint-*")}}
    return config(sources, grafts=GRAFTS, shards=16, **changes)


def quiet(given: Any, out: Path, **options: Any) -> Any:
    return run_sweep(given, out, progress=False, say=lambda _: None, **options)


def drawn(page: Path) -> list[dict[str, Any]]:
    """A page's figures."""
    source = page.read_text(encoding="utf-8")
    held = re.findall(r"id='chart-\d+-figure'>(.*?)</script>", source, re.DOTALL)
    return [json.loads(figure) for figure in held]


# -- made sources in configs -------------------------------------------------------------------


def test_a_sweep_of_made_sources_is_what_evaluate_gives(run: Path, tmp_path: Path) -> None:
    sources = {
        "pre": str(run / "pre"),
        "sft": str(run / "sft"),
        "half": {"of": "sft", "strength": 0.5},
        "rank2": {"of": "sft", "rank": 2},
        "rest2": {"of": "sft", "rank": "2:"},
        "lora": str(run / "lora"),
        "sum": {"of": ["lora", "sft"], "strengths": [1, 0.25]},
    }
    grafts = {name: f"{name} @ last" for name in sources if name != "pre"}
    grafts["both"] = "rank2 @ last | rest2 @ first_entity : mlp"
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config(sources, grafts=grafts), sort_keys=False))
    result = quiet(file, tmp_path / "out")
    assert result.ok
    assert {check["graft"] for check in result.trust["sources"]} >= {
        "half @ all",
        "rank2 @ all",
        "sum @ all",
    }
    table = read_results(tmp_path / "out")
    assert isinstance(table, pd.DataFrame)
    assert table.loc[table["graft"] == "rank2", "source_rank"].unique().tolist() == [2]
    assert table.loc[table["graft"] == "half", "source_rank"].isna().all()
    assert '"2:"' in table["model"].iloc[0]
    model = GraftedTransformer.from_pretrained(sources, verbose=False)
    checked = check(load_config(file))
    again = evaluate(model, checked.prompts, grafts, progress=False)
    for name in grafts:
        one, other = (t.loc[t["graft"] == name, "logprob"].to_numpy(float) for t in (table, again))
        assert one == pytest.approx(other, abs=1e-5)
    page = sweep_report(tmp_path / "out").read_text()
    assert "rest2" in page
    assert model.fingerprints()["half"] in page
    # The same again changes nothing; another recipe is another sweep.
    assert is_finished(tmp_path / "out")
    assert quiet(file, tmp_path / "out").cells == result.cells
    with pytest.raises(ValueError, match=r"sources\.rank2\.rank: 2 there, 3 given"):
        quiet(file, tmp_path / "out", overrides=["sources.rank2.rank=3"])


def test_ranks_are_an_axis_of_a_grid(run: Path, tmp_path: Path) -> None:
    sources = {"pre": str(run / "pre"), "sft": str(run / "sft")}
    grid = {"positions": ["last", "first_entity + last"], "ranks": [1, 4, "all"]}
    given = config(sources, grafts={}, grids=[grid], limit=2)
    assert "sft_rank4 = {of: sft, rank: 4}" in describe_sweep(given)
    result = quiet(given, tmp_path / "out")
    assert result.ok
    table = read_results(tmp_path / "out")
    assert isinstance(table, pd.DataFrame)
    grafts = ["sft_rank1 @ last", "sft_rank4 @ last", "sft @ last"]
    assert grafts == [g for g in table["graft"].unique() if str(g).endswith("@ last")]
    assert table.loc[table["source"] == "sft_rank4", "source_rank"].eq(4).all()
    made = {"sft_rank1": {"of": "sft", "rank": 1}}
    model = GraftedTransformer.from_pretrained(sources | made, verbose=False)
    prompts = check(SweepConfig.model_validate(given)).prompts
    again = evaluate(model, prompts, {"one": "sft_rank1 @ last"}, progress=False)
    again = again[again["graft"] == "one"]
    mine = table[table["graft"] == "sft_rank1 @ last"]
    assert mine["logprob"].to_numpy(float) == pytest.approx(
        again["logprob"].to_numpy(float), abs=1e-5
    )
    summary = summarise(table, by=(), metrics=(), ks=(1,)).dropna(subset=["source_rank"])
    figure = lines(summary, "source_rank", "recovery", series="span")
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["1", "4"]
    names = {line.name: list(line.x) for line in figure.data}
    assert names == {"last": [1, 4], "first_entity + last": [1, 4]}
    on_page = [
        {line["name"]: line["x"] for line in chart["data"]}
        for chart in drawn(sweep_report(tmp_path / "out"))
        if chart["layout"]["xaxis"]["title"]["text"].startswith("source rank")
    ]
    assert on_page == [names] * table["template"].nunique()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"sources": {"a": {"of": "b", "rank": 2}}},
            r"sources\.a: it is of 'b', which is not a so",
        ),
        ({"sources": {"a": {"of": "a", "rank": 2}}}, r"sources\.a: it is made of itself"),
        (
            {"sources": {"a": {"of": "sft", "rank": 99}}},
            r"sources: source 'a': rank: 99 asks for m",
        ),
        ({"sources": {"a": {"of": "sft", "half": 9}}}, r"sources\.a: unknown key 'half'"),
        ({"sources": {"a": 5}}, r"sources\.a: 5 should be text\. Put it in quotes\. Or write what"),
        ({"sources": {"a": {"each": "no/*"}}}, r"sources: source 'a': each: 'no/\*' matches no fo"),
        (
            {"sources": {"a": {"each": ["x"]}, "b": {"each": ["y"]}}},
            r"sources\.b: a and it both stand for several models",
        ),
        (
            {"grids": [{"ranks": [0]}]},
            r"grids\.0\.ranks: 0 is not a rank\. Write numbers from 1, o",
        ),
        ({"grids": [{"ranks": [99]}]}, "source 'sft_rank99': rank: 99 asks for more than 24"),
        (
            {"sources": {"sft_rank2": {"of": "sft", "rank": 3}}, "grids": [{"ranks": [2]}]},
            r"grids\.0\.ranks: it adds a source 'sft_rank2', but another has that name",
        ),
    ],
)
def test_bad_sources_are_refused_with_the_config(
    changes: dict[str, Any], what: str, run: Path
) -> None:
    given = config({"pre": str(run / "pre"), "sft": str(run / "sft")}, grafts={"LT": "sft @ last"})
    sources = given["sources"] | changes.pop("sources", {})
    with pytest.raises(ConfigError, match=what):
        describe_sweep({**given, **changes, "sources": sources})


# -- one after another -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert quiet(of_time(run), out).ok
    return out


def test_each_member_s_rows_are_those_of_its_own_sweep(
    run: Path, whole: Path, tmp_path: Path
) -> None:
    table = read_whole(whole)
    assert list(table.columns[:2]) == ["member", "step"]
    assert list(dict.fromkeys(table["step"])) == sorted(STEPS)
    assert list(dict.fromkeys(table["member"])) == [f"checkpoint-{s}" for s in sorted(STEPS)]
    for step in STEPS:
        alone = of_time(run)
        alone["sources"] = {"pre": str(run / "pre"), "time": str(run / f"checkpoint-{step}")}
        quiet(alone, tmp_path / str(step))
        mine = table[table["step"] == step].drop(columns=["member", "step", "model"])
        other = read_whole(tmp_path / str(step)).drop(columns="model")
        assert_equal_tables(mine.reset_index(drop=True), other)


def test_the_record_and_the_trust_report_are_by_member(run: Path, whole: Path) -> None:
    manifest = read_manifest(whole)
    assert [m["step"] for m in manifest.members] == sorted(STEPS)
    assert manifest.shards == 3 * len(manifest.cell_shards.of(0))
    recorded = manifest.models["members"]
    assert len({recorded[name]["fingerprints"]["time"] for name in recorded}) == 3
    assert len({recorded[name]["fingerprints"]["pre"] for name in recorded}) == 1
    trust = json.loads((whole / "trust.json").read_text())
    assert list(trust["members"]) == [m["name"] for m in manifest.members]
    assert all(report["rows"] == 12 * 4 for report in trust["members"].values())
    assert all(report["cells"] and report["sources"] for report in trust["members"].values())
    text = (whole / "trust.txt").read_text()
    assert all(f"{m['name']}: trust report: ok (48 rows" in text for m in manifest.members)
    assert is_finished(whole)


@pytest.mark.slow
def test_numbers_that_are_not_those_of_the_member_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the second member ran the first one's weights, its trust report would say so."""
    original = Models.__call__

    def first(self: Models, number: int) -> Any:
        model = original(self, number)
        checking = bool(list((tmp_path / "out" / "shards").glob("00008*")))
        if number == 1 and not checking:
            other = GraftedTransformer.from_pretrained(
                {"pre": str(run / "pre"), "time": str(run / "checkpoint-5")}, verbose=False
            )
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = theirs.data
        elif number == 1:
            self._held = None
            model = original(self, number)
        return model

    monkeypatch.setattr(Models, "__call__", first)
    result = quiet(of_time(run), tmp_path / "out")
    assert not result.ok
    members = result.trust["members"]
    assert [report["ok"] for report in members.values()] == [True, False, True]


def test_members_are_grouped_in_statistics_and_drawn_over_steps(whole: Path) -> None:
    table = read_results(whole)
    assert isinstance(table, pd.DataFrame)
    with pytest.raises(ValueError, match=r"several models that were run one after another .* by='"):
        summarise(table)
    summary = summarise(table, by="step", metrics=("logprob",))
    for step in STEPS:
        mine = table[table["step"] == step].drop(columns=["member", "step"])
        one = summarise(mine, by=(), metrics=("logprob",))
        both = summary[summary["step"] == step].drop(columns="step").reset_index(drop=True)
        pd.testing.assert_frame_equal(both, one)
    figure = lines(summary, "step", "recovery", series="graft")
    assert {line.name for line in figure.data} == set(GRAFTS)
    assert all(list(line.x) == sorted(STEPS) for line in figure.data)


def test_members_are_compared_one_by_one(whole: Path) -> None:
    table = read_whole(whole)
    options = {"resamples": 100, "permutations": 100}
    compared = compare_all(table, [("LT", "SFT")], by="step", **options)
    assert list(compared["step"]) == sorted(STEPS)
    for step, difference in zip(compared["step"], compared["difference"], strict=True):
        own = table[table["step"] == step].drop(columns=["member", "step"])
        alone = compare_all(own, [("LT", "SFT")], **options)
        assert difference == alone["difference"].item()


def test_a_page_of_members_compares_them_and_is_else_about_the_last(run: Path, whole: Path) -> None:
    """Members were pooled for the page's table, which statistics refuse."""
    page = sweep_report(whole).read_text()
    last = f"checkpoint-{max(STEPS)}"
    assert f"All else on this page is about the last, {last}." in page
    for step in STEPS:
        sources = {"pre": str(run / "pre"), "time": str(run / f"checkpoint-{step}")}
        model = GraftedTransformer.from_pretrained(sources, verbose=False)
        assert model.fingerprints()["time"] in page
    table = read_whole(whole)
    table = table[(table["member"] == last) & (table["graft"] == "SFT")]
    summary = sweep_summary(whole)
    shown = summary.loc[summary["graft"].astype(str) == "SFT"]
    assert shown["n"].sum() == len(table)
    assert np.average(shown["logprob"], weights=shown["n"]) == pytest.approx(
        table["logprob"].mean()
    )


def test_the_page_draws_members_over_steps_and_lists_them(whole: Path) -> None:
    page = sweep_report(whole)
    table = read_whole(whole)
    summary = summarise(table, by=("member", "step", "template"), metrics=("logprob",))
    charts = [f for f in drawn(page) if f["layout"]["xaxis"]["title"]["text"].startswith("step")]
    templates = list(dict.fromkeys(table["template"]))
    drawable = summary[summary["graft"].isin(["LT", "q"]) & summary["recovery"].notna()]
    with_numbers = [name for name in templates if name in set(drawable["template"])]
    assert len(charts) == len(with_numbers) > 0
    for chart, template in zip(charts, with_numbers, strict=True):
        assert {line["name"] for line in chart["data"]} == {"LT", "q"}
        for line in chart["data"]:
            of_line = (summary["template"] == template) & (summary["graft"] == line["name"])
            mine = summary[of_line].sort_values("step")
            assert line["x"] == sorted(STEPS)
            known = mine["recovery"].notna()
            assert [y for y in line["y"] if y is not None] == pytest.approx(
                mine.loc[known, "recovery"].tolist()
            )
    assert any(y is not None for chart in charts for line in chart["data"] for y in line["y"])
    source = page.read_text(encoding="utf-8")
    section = re.search(r"<section aria-labelledby='members'>.*?</section>", source, re.DOTALL)[0]
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>", section)
    assert set(rows) == {(f"checkpoint-{step}", str(step)) for step in STEPS}
    assert len(rows) == len(STEPS) * len(GRAFTS) * len(templates)


def test_what_the_page_cuts_of_members_is_in_files(whole: Path, tmp_path: Path) -> None:
    """With a table of more rows than a page shows."""
    shutil.copytree(whole, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page_module, "MAX_ROWS", 5)
        page = sweep_report(tmp_path / "out")
    assert "href='report_tables/members.csv'" in page.read_text(encoding="utf-8")
    listed = read_table(tmp_path / "out" / "report_tables" / "members.csv")
    assert set(listed["step"]) == set(STEPS)
    assert {"recovery", "recovery_low", "n", "graft", "template"} <= set(listed.columns)
    # The page and its tables are not part of the sweep's results.
    assert is_finished(tmp_path / "out")
    assert sweep_report(tmp_path / "out") == page


@pytest.mark.slow
def test_the_page_draws_members_without_steps_as_bars(run: Path, tmp_path: Path) -> None:
    each = [str(run / "sft"), str(run / "lora")]
    sources = {"pre": str(run / "pre"), "time": {"each": each}}
    quiet(config(sources, grafts=GRAFTS, limit=2), tmp_path / "out")
    names = [
        [str(trace.get("name")).removesuffix(" (n/a)") for trace in figure["data"]]
        for figure in drawn(sweep_report(tmp_path / "out"))
    ]
    assert each in names


def test_members_of_one_step_are_not_pooled(whole: Path) -> None:
    table = read_whole(whole).assign(step=5)
    what = "models 'checkpoint-5', 'checkpoint-40', .* have the same step .* by='member'"
    with pytest.raises(ValueError, match=what):
        summarise(table, by="step")
    assert summarise(table, by="member", resamples=100)["member"].nunique() == len(STEPS)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.close()


#: Disk operations at which a run is killed: in the shards of each member, and at the end.
MOMENTS = (50, 76, 97, 118)


@pytest.mark.slow
def test_a_killed_sweep_of_members_goes_on_to_the_same_rows(
    run: Path, whole: Path, processes: Processes, tmp_path: Path
) -> None:
    expected = read_whole(whole)
    there = set()
    for at in MOMENTS:
        out = tmp_path / str(at)
        code = processes.run(of_time(run), out, fault="SIGKILL", at=at)
        assert code == -signal.SIGKILL
        there.add(_rows_of(out, expected))
        assert processes.run(of_time(run), out) == 0, processes.said(out)
        assert_equal_tables(read_whole(out), expected)
        assert unfinished_files(out) == []
    assert len(there) == len(MOMENTS), there


def _rows_of(out: Path, expected: pd.DataFrame) -> int:
    """How many of the rows are there, each as expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*is not finished: \d+ of \d+ shards are done")
        table = read_whole(out)
    key = ["member", "prompt", "graft"]
    known = expected.set_index(key).index.isin(table.set_index(key).index)
    assert_equal_tables(table, expected[known].reset_index(drop=True))
    return len(table)


def test_two_members_are_never_in_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[GraftedTransformer]] = []
    most: list[int] = []
    original = GraftedTransformer.from_pretrained

    def counted(*args: Any, **kwargs: Any) -> GraftedTransformer:
        gc.collect()
        most.append(sum(one() is not None for one in held))
        model = original(*args, **kwargs)
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(GraftedTransformer, "from_pretrained", counted)
    quiet(of_time(run, limit=1), tmp_path / "out")
    assert len(most) >= 3
    assert set(most) == {0}


def test_members_may_be_adapters_and_parts_of_others(run: Path, tmp_path: Path) -> None:
    given = of_time(run, limit=1)
    given["sources"] = {
        "pre": str(run / "pre"),
        "time": {"each": [str(run / "lora"), str(run / "checkpoint-5")], "steps": [1, 2]},
        "low": {"of": "time", "rank": 2},
    }
    given["grafts"] = {"SFT": "time @ all", "low": "low @ last"}
    assert quiet(given, tmp_path / "out").ok
    table = read_results(tmp_path / "out")
    assert isinstance(table, pd.DataFrame)
    assert list(dict.fromkeys(table["step"])) == [1, 2]
    for name, step in (("lora", 1), ("checkpoint-5", 2)):
        sources = {
            "pre": str(run / "pre"),
            "time": str(run / name),
            "low": {"of": "time", "rank": 2},
        }
        model = GraftedTransformer.from_pretrained(sources, verbose=False)
        prompts = check(SweepConfig.model_validate(given)).prompts
        again = evaluate(model, prompts, {"low": "low @ last"}, full="time @ all", progress=False)
        mine = table[(table["step"] == step) & (table["graft"] == "low")]["logprob"].to_numpy(float)
        other = again[again["graft"] == "low"]["logprob"].to_numpy(float)
        assert mine == pytest.approx(other, abs=1e-5)


# -- which they are ----------------------------------------------------------------------------


def test_steps_are_what_the_folders_record(run: Path, tmp_path: Path) -> None:
    for name, file, content in (
        ("a-9", "complete.json", {"step": 70}),
        ("b-8", "trainer_state.json", {"global_step": 30}),
        ("c-7", "other.json", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
    (tmp_path / "d-6").write_text("a file is not a model")
    found = members_of("time", Each(each=str(tmp_path / "*-*")))
    assert [(m.name, m.step) for m in found] == [("c-7", 7), ("b-8", 30), ("a-9", 70)]
    (tmp_path / "last").mkdir()
    found = members_of("time", Each(each=str(tmp_path / "*")))
    assert [(m.name, m.step) for m in found] == [
        ("a-9", 70),
        ("b-8", 30),
        ("c-7", 7),
        ("last", None),
    ]
    listed = members_of("time", Each(each=("y/two", "x/one"), steps=(5, 3)))
    assert [(m.name, m.step) for m in listed] == [("y/two", 5), ("x/one", 3)]


@pytest.mark.parametrize(
    ("each", "what"),
    [
        ({"each": ["a/b", "a/b"]}, "each names 'a/b' twice. Name each model once."),
        ({"each": ["runs/b", "./runs/b/"]}, "each names './runs/b/' twice. Name each model once."),
        ({"each": "a/b", "revisions": ["x", "x"]}, "revisions names 'x' twice. Name each model o"),
        (
            {"each": ["a/b", "a/c"], "steps": [1]},
            "1 steps for 2 models .a/b a/c.. Give one for each",
        ),
        (
            {"each": ["a/b"], "revisions": ["x"]},
            "revisions belong to one hub id. Write each: OWNER",
        ),
    ],
)
def test_bad_members_are_refused(each: dict[str, Any], what: str) -> None:
    with pytest.raises(PairError, match=f"source 'time': {what}"):
        members_of("time", Each.model_validate(each))


def test_members_of_another_shape_are_refused(run: Path, tmp_path: Path) -> None:
    size = len(llama3_style())
    save_checkpoint(
        tiny_model("llama-head-dim", 1, size), tmp_path / "checkpoint-9", llama3_style()
    )
    given = of_time(run)
    listed = [str(run / "checkpoint-5"), str(tmp_path / "checkpoint-9")]
    given["sources"]["time"] = {"each": listed}
    with pytest.raises(ConfigError, match=r"sources: .*differ in architecture: head_dim"):
        describe_sweep(given)


def hub(folder: Path, run: Path, revisions: Mapping[str, int]) -> None:
    """A cache in which a repository has revisions."""
    repo = folder / "models--me--run"
    for number, (name, step) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (run / f"checkpoint-{step}").iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.slow
def test_revisions_of_a_repository(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub(tmp_path / "hub", run, {f"step{step}": step for step in STEPS} | {"main": 5})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revisions in ("step*", [f"step{step}" for step in STEPS]):
        found = members_of("time", Each.model_validate({"each": "me/run", "revisions": revisions}))
        assert [(m.name, m.step) for m in found] == [(f"step{s}", s) for s in sorted(STEPS)]
    given = of_time(run)
    given["sources"]["time"] = {"each": "me/run", "revisions": "step*"}
    assert quiet(given, tmp_path / "out").ok
    table, expected = (
        read_whole(out).drop(columns=["member", "model"]) for out in (tmp_path / "out", whole)
    )
    assert_equal_tables(table, expected)
    with pytest.raises(PairError, match=r"revisions: 'epoch\*' matches none of me/run"):
        members_of("time", Each(each="me/run", revisions="epoch*"))
    given["sources"]["time"] = {"each": "me/run", "revisions": ["step7"]}
    with pytest.raises(
        ConfigError, match="the revision 'step7' of me/run is not in the local cache"
    ):
        describe_sweep(given)


def test_a_sweep_of_members_says_what_it_will_do(run: Path) -> None:
    said = describe_sweep(of_time(run))
    assert "members   3, one after another: checkpoint-5 checkpoint-40 checkpoint-120" in said
    assert "48 of each member, so 144 in all" in said


def test_other_members_are_another_sweep(run: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    given = of_time(run)
    pattern = str(run / "checkpoint-[14]*")
    given["sources"]["time"] = {"each": pattern}
    with pytest.raises(ValueError, match="holds another sweep"):
        quiet(given, tmp_path / "out")


@pytest.mark.parametrize(
    "changed",
    [
        "checkpoint-5",
        pytest.param("checkpoint-120", marks=pytest.mark.slow),
        pytest.param("pre", marks=pytest.mark.slow),
    ],
)
def test_members_whose_weights_changed_are_not_taken_for_those_that_ran(
    run: Path, tmp_path: Path, changed: str
) -> None:
    """Where every shard of a member was there, its weights were not looked at again."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    given = of_time(copied, limit=1)
    quiet(given, tmp_path / "out")
    weights = copied / changed / "model.safetensors"
    content = weights.read_bytes()
    weights.touch()
    assert quiet(given, tmp_path / "out").ok  # the same numbers, written again
    tokenizer = llama3_style()
    save_checkpoint(tiny_model("llama", 77, len(tokenizer)), copied / changed, tokenizer)
    with pytest.raises(ValueError, match="holds results of other weights"):
        quiet(given, tmp_path / "out")
    weights.write_bytes(content)
    assert quiet(given, tmp_path / "out").ok


# -- dashboards and the command line -----------------------------------------------------------


def test_a_dashboard_on_the_command_line_takes_what_a_source_is_made_of(
    run: Path, tmp_path: Path
) -> None:
    ask = [*("dashboard", "--pair", run / "pre", run / "sft", "--out", tmp_path / "page.html")]
    ask += ["--prompt", "{first_entity} plays with", "--field", "first_entity=Ann"]
    made = ["--source", "half={of: sft, strength: 0.5}", "--graft", "half=half @ last"]
    done = graftlens(*ask, *made)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "half @ last" in page
    for wrong, what in (
        ("half={of: stf, rank: 2}", "source 'half': it is of 'stf', which is not a source"),
        ("half={ofs: sft}", "--source half: unknown key 'ofs'"),
        ("half={each: runs/*}", "several models that a sweep runs one after another"),
    ):
        done = graftlens(*ask, "--source", wrong, "--graft", "half=half @ last")
        assert done.returncode == 1
        assert what in done.stderr
