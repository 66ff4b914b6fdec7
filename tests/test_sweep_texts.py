"""Texts in sweeps: a second table with the cells' shards, locks, resumption and trust."""

import html
import json
import linecache
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from browser import ask
from families import save_checkpoint, tiny_model, tiny_pair
from reference import sequential_graft
from sweeps import (
    Processes,
    assert_equal_tables,
    assert_part_of,
    checkpoints,
    config,
    kill_at_random_moments,
    read_whole,
    unfinished_files,
)
from test_members import drawn
from test_outcomes import agree, noise
from test_report import Page
from tinybase import tiny_base, tiny_finetuned
from toytokenizers import llama3_style

from graftlens import (
    GraftedTransformer,
    outcomes,
    plainyaml,
    read_results,
    read_texts,
    run_sweep,
    sweep_report,
)
from graftlens.configfile import ConfigError, settings_from
from graftlens.data import MoviesConfig, make_dataset
from graftlens.experiment.compare import compare_runs
from graftlens.experiment.run import run_experiment
from graftlens.graft import Graft
from graftlens.outcomes.drawing import Drawing
from graftlens.outcomes.measures import values_of
from graftlens.outcomes.texts import Sampler
from graftlens.sweep.config import SweepConfig, check, load_config
from graftlens.sweep.outcomesettings import OutcomeSettings
from graftlens.sweep.results import facts_of, read_manifest
from graftlens.sweep.runner import is_finished, prepare_sweep
from graftlens.sweep.texttrust import _candidates, check_texts
from graftlens.viz.examples import first_right
from graftlens.viz.export import write_figure
from graftlens.viz.tables import read_table
from graftlens.viz.textspage import (
    Rates,
    rate_charts,
    rate_findings,
    shown_texts,
    texts_page,
    told_apart,
)

NEW = 6
KILLS = 30  # at random moments
ROWS = ("prompt", "graft", "sample")
SAMPLING = {"n": 2, "max_new_tokens": NEW, "seed": 3}
MEASURES = {
    "an_a": {"contains": ["a"]},
    "wordy": {"regex": {"pattern": r"\w+ \w+", "case": True}},
    "first": {"choice": ["film", "the"]},
}
GRAFTS = {
    "PRE": "none",
    "SFT": "sft @ all",
    "LT": "sft @ last",
    "new": "sft @ generated",
    "given": "sft @ prompt : mlp",
}

#: Positions of grafts, given the prompt's length.
REACH = {
    "PRE": lambda p, n: False,
    "new": lambda p, n: p >= n,
    "LT": lambda p, n: p >= n - 1,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and the processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.close()


def given(sources: dict[str, str], **changes: Any) -> dict[str, Any]:
    """12 prompts under 5 grafts, 2 texts of each: 120 texts in 6 shards; 2 shards of cells."""
    texts = {"sampling": SAMPLING, "measures": MEASURES, "shards": 20}
    texts |= changes.pop("outcomes", {})
    return config(sources, **{"grafts": GRAFTS, "outcomes": texts, "shards": 30, **changes})


def unanswered(sources: dict[str, str], **changes: Any) -> dict[str, Any]:
    """The same without answers."""
    found = given(sources, **changes)
    for prompt in found["prompts"]:
        del prompt["answer"], prompt["distractors"]
    return found


def quiet(given: Any, out: Path, **options: Any) -> Any:
    return run_sweep(given, out, progress=False, say=lambda _: None, **options)


def whole(out: Path) -> pd.DataFrame:
    """The texts, in a form whose every bit can be compared."""
    table = read_texts(out)
    for column in ("tokens", "answers"):
        values = [None if v is None else tuple(v) for v in table[column]]
        table[column] = pd.Series(values, dtype=object)
    return table


def equal(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.fixture(scope="module")
def swept(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "out"
    result = quiet(given(sources), out)
    assert result.ok, result.trust
    assert result.cells == 60
    assert result.texts == 120
    return out


# -- the table ---------------------------------------------------------------------------------


def test_the_texts_of_a_sweep_are_those_of_sample_and_of_the_sequential_algorithm(
    swept: Path, sources: dict[str, str]
) -> None:
    table = read_texts(swept)
    manifest = read_manifest(swept)
    assert len(manifest.text_shards) == 6
    assert manifest.token_budget == manifest.models["token_budget"] > 0  # type: ignore[index]
    model = GraftedTransformer.from_pretrained(sources, verbose=False)
    prompts = list(check(SweepConfig(**given(sources))).prompts)
    again = outcomes.sample(model, prompts, GRAFTS, progress=False, **SAMPLING)
    same = ["prompt", "graft", "rule", "prompt_text", "answer", "sample", "stop", "reason"]
    pd.testing.assert_frame_equal(table[same], again[same])
    assert [*table["answers"]] == [*again["answers"]]
    assert table["base_run"].unique().tolist() == ["PRE"]
    # Other batches differ by rounding: nearly all texts are equal.
    assert (table["text"] == again["text"]).mean() > 0.9
    pair = tiny_pair("llama", 1, vocab_size=model.arch.d_vocab)
    for name, inside in REACH.items():
        row = table[(table["graft"] == name) & (table["prompt"] == 5)].iloc[1]
        ids = model.to_tokens(row["prompt_text"])[0].tolist()
        tokens = [int(token) for token in row["tokens"]]

        def choose(component: str, layer: int | None, p: int, unit: int | None) -> str:
            return "sft" if inside(p, len(ids)) else "pre"  # noqa: B023

        logits = sequential_graft(pair, [*ids, *tokens[:-1]], choose)[len(ids) - 1 :].double()
        drawn = [noise(3, ids, 1, step, logits.shape[1]) for step in range(len(tokens))]
        assert agree(logits + torch.stack(drawn), tokens) == len(tokens)
        summed = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
        assert row["logprob"] == pytest.approx(float(summed), abs=1e-3)


def test_measures_are_columns_and_rates_their_means(swept: Path) -> None:
    table = read_texts(swept)
    assert [*table.columns[-4:]] == [*MEASURES, "reason"]
    said = table["text"].astype(str)
    assert table["an_a"].tolist() == [float("a" in text.lower()) for text in said]
    assert set(table["first"]) <= {"film", "the", "none"}
    rates = outcomes.rate(table, ["an_a"], resamples=50).set_index("graft")["rate"]
    expected = table.groupby("graft")["an_a"].mean()
    ran = set(table.loc[table["reason"].notna(), "prompt"])
    assert not ran
    assert rates.to_dict() == pytest.approx(expected.to_dict())


def test_cells_of_generated_tokens_have_the_reason(swept: Path) -> None:
    """One-token scoring adds no tokens, so such a graft has texts and no cells."""
    cells = read_results(swept)
    assert isinstance(cells, pd.DataFrame)
    reasons = cells.loc[cells["graft"] == "new", "reason"]
    assert len(reasons) == 12
    assert reasons.str.contains("'generated' are the tokens that a model adds").all()
    assert cells.loc[cells["graft"] != "new", "reason"].isna().all()
    assert read_texts(swept)["reason"].isna().all()


def test_a_sweep_without_answers_makes_texts_alone(
    sources: dict[str, str], swept: Path, tmp_path: Path
) -> None:
    result = quiet(unanswered(sources), tmp_path / "out")
    assert result.ok
    assert result.cells == 0
    assert result.texts == 120
    assert result.line().startswith(f"{tmp_path / 'out'}: 120 texts; trust report passed")
    assert is_finished(tmp_path / "out")
    assert len(read_results(tmp_path / "out")) == 0
    one, other = read_texts(swept), read_texts(tmp_path / "out")
    assert other["answers"].map(len).sum() == 0
    assert (one["text"] == other["text"]).mean() > 0.9
    page = sweep_report(tmp_path / "out")
    bars = {trace["name"] for trace in drawn(page)[0]["data"]}
    assert bars == set(other["template"]), "template by template, as on an experiment's page"
    words = "".join(Page(page).words)
    assert "the pretrained model's weights everywhere" in words
    assert "share of a graft's texts that have what is measured" in words
    assert "what comes next is predicted" in words, "LT is explained"
    assert "recovery" not in words
    assert "trust report of texts: ok (120 texts)" in (tmp_path / "out/trust.txt").read_text()
    with pytest.raises(ValueError, match="has texts and no cells"):
        compare_runs([tmp_path / "out", swept], tmp_path / "page.html")


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_killed_and_resumed_is_the_same_bit_for_bit(
    sources: dict[str, str], swept: Path, tmp_path: Path, processes: Processes
) -> None:
    """Killed at moments all over the run; what a reader sees meanwhile are rows of the whole."""
    expected = whole(swept)
    out = tmp_path / "out"
    options: dict[str, Any] = {"trust": False}
    codes, seen = [], set()
    for at in (20, 36, 41, 17, 12):
        codes.append(processes.run(given(sources), out, fault="SIGKILL", at=at, **options))
        seen.add(assert_part_of(out, expected, whole, ROWS))
    assert codes.count(-signal.SIGKILL) >= 3
    assert seen & {20, 40, 60, 80, 100}, "some texts were there, and others were not"
    assert processes.run(given(sources), out, **options) == 0, processes.said(out)
    equal(whole(out), expected)
    assert is_finished(out)
    assert not unfinished_files(out)


@pytest.mark.slow
def test_texts_killed_at_random_moments(
    sources: dict[str, str], swept: Path, tmp_path: Path, processes: Processes
) -> None:
    """A reader looks in all the time; the trust report of what was resumed passes, and its measures
    and rates are those of the undisturbed run."""
    expected, cells = whole(swept), read_whole(swept)
    folders, seen = kill_at_random_moments(
        processes,
        given(sources),
        tmp_path,
        lambda out: assert_part_of(out, expected, whole, ROWS),
        kills=KILLS,
        seed=1,
    )
    for out in folders:
        equal(whole(out), expected)
        assert_equal_tables(read_whole(out), cells)
        assert is_finished(out)
        assert not unfinished_files(out)
        trust = json.loads((out / "trust.json").read_text())
        assert (trust["ok"], trust["texts"]["problems"], trust["texts"]["rows"]) == (True, [], 120)
    assert len(seen & {20, 40, 60, 80, 100}) > 1, f"some texts without the others, not only {seen}"


def test_what_is_damaged_or_removed_is_made_again(
    sources: dict[str, str], swept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    path = read_manifest(out).text_shards.path(out, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    (out / "measured.parquet").unlink()
    assert not is_finished(out)
    with pytest.warns(UserWarning, match="5 of 6 shards are done"):
        assert len(read_texts(out)) == 100
    assert quiet(given(sources), out).ok
    equal(whole(out), whole(swept))
    (out / "measured.parquet").unlink()
    assert not is_finished(out)
    assert quiet(given(sources), out).ok
    equal(whole(out), whole(swept))


STEPS = (5, 10)
ALONG = {"PRE": "none", "all": "time @ all", "new": "time @ generated"}


def of_members(folder: Path, each: Any, *names: str) -> dict[str, Any]:
    tokenizer = llama3_style()
    for seed, name in enumerate(("pre", *names)):
        save_checkpoint(tiny_model("llama", seed, len(tokenizer)), folder / name, tokenizer)
    sources: dict[str, Any] = {"pre": str(folder / "pre")}
    return unanswered(sources | {"time": {"each": each}}, grafts=ALONG)


@pytest.fixture(scope="module")
def along(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over two checkpoints; its sources are beside it."""
    root = tmp_path_factory.mktemp("along")
    names = [f"checkpoint-{step}" for step in STEPS]
    assert quiet(of_members(root, str(root / "checkpoint-*"), *names), root / "out").ok
    return root / "out"


def test_members_have_texts_of_their_own(along: Path, tmp_path: Path) -> None:
    table = read_texts(along)
    assert table.groupby("step").size().to_dict() == {5: 72, 10: 72}
    trust = json.loads((along / "trust.json").read_text())
    assert {*trust["members"]} == {"checkpoint-5", "checkpoint-10"}
    assert all(member["texts"]["texts"] for member in trust["members"].values())
    single = {"pre": str(along.parent / "pre"), "time": str(along.parent / "checkpoint-10")}
    assert quiet(unanswered(single, grafts=ALONG), tmp_path / "one").ok
    one = whole(tmp_path / "one")
    own = whole(along)
    own = own[own["step"] == 10].drop(columns=["member", "step"]).reset_index(drop=True)
    equal(own, one)
    rates = outcomes.rate(table, ["an_a"], by=("member", "step"), resamples=50)
    assert len(rates) == 6


def test_the_page_compares_rates_over_members(along: Path) -> None:
    """Lines over steps, a chart for each measure, and of labels for each of them."""
    page = sweep_report(along)
    table = read_texts(along)
    labels = sorted(set(table["first"]))
    values = {name: table[name] for name in ("an_a", "wordy")}
    values |= {f"first: {label}": table["first"] == label for label in labels}
    charts = drawn(page)
    assert len(charts) == len(values)
    for chart, (name, value) in zip(charts, values.items(), strict=True):
        assert chart["layout"]["yaxis"]["title"]["text"] == f"{name} (% of texts)"
        assert chart["layout"]["xaxis"]["title"]["text"].startswith("step")
        means = value.astype(float).groupby([table["graft"], table["step"]]).mean()
        assert {line["name"] for line in chart["data"]} == set(ALONG)
        for line in chart["data"]:
            assert line["x"] == [*STEPS]
            assert line["y"] == pytest.approx(means[line["name"]].tolist())
    said = page.read_text(encoding="utf-8")
    assert "All else on this page but the texts is about the last, checkpoint-10." in said
    told = held(page)
    assert len(told["cells"]) == len(STEPS)


def test_members_without_steps_are_bars(tmp_path: Path) -> None:
    each = [str(tmp_path / name) for name in ("early", "late")]
    assert quiet(of_members(tmp_path, each, "early", "late"), tmp_path / "out").ok
    for chart in drawn(sweep_report(tmp_path / "out")):
        names = {str(trace.get("name")).removesuffix(" (n/a)") for trace in chart["data"]}
        assert {*each} <= names


def test_in_a_browser_the_model_is_chosen_whose_texts_are_shown(
    along: Path, tmp_path: Path
) -> None:
    script = """const choice = document.getElementById("texts-member");
      const first = () => [...document.querySelectorAll("#texts-table tbody tr")]
        .map(row => row.cells[2].querySelector(".generated").textContent);
      const shown = {[choice.selectedOptions[0].textContent]: first()};
      for (const option of choice.options) {
        choice.value = option.value; choice.dispatchEvent(new Event("change"));
        shown[option.textContent] = first(); }
      return shown;"""
    found, complaints = ask(sweep_report(along), script, tmp_path)
    assert complaints == []
    table = read_texts(along)
    firsts = table[(table["graft"] == "all") & (table["sample"] == 0)]
    texts = firsts.groupby("member", sort=False)["text"].apply(list).to_dict()
    assert [*found] == ["checkpoint-10", "checkpoint-5"], "the last is shown first"
    assert found == {name: [t or "(nothing)" for t in those] for name, those in texts.items()}
    assert texts["checkpoint-5"] != texts["checkpoint-10"]


def test_of_many_grafts_those_that_differ_most_are_compared() -> None:
    rows = [
        {"member": f"m{step}", "step": step, "graft": f"g{i}", "measure": "m", "label": None,
         "rate": 0.5 + (i * step if i < 3 else 0.01 * i) / 100, "low": 0.0, "high": 1.0, "n": 4,
         "level": 0.95, "resamples": 9, "seed": 0, "unit": "prompt", "share": True,
         "base_run": "g0", "full_run": "g3"}
        for step in (1, 2) for i in range(20)
    ]  # fmt: skip
    (chart,) = rate_charts(pd.DataFrame(rows)).values()
    names = [line.name for line in chart.figure.data]
    assert names == ["g0", "g1", "g2", "g3", *(f"g{i}" for i in range(10, 20))]
    assert "14 of 20 grafts: those that differ most from the base." in chart.caption


def test_what_is_said_of_rates_is_where_the_runs_differ() -> None:
    """A behaviour is due after some prompts; that it is not seen after others is no finding."""
    rate = {("due", "SFT"): 1.0, ("due", "LT"): 0.75, ("near", "LT"): 0.25}
    rows = [
        {"template": template, "graft": graft, "measure": measure, "label": None,
         "rate": rate.get((template, graft), 0.0) if measure == "m" else 0.5,
         "low": 0.0, "high": 1.0, "n": 4, "level": 0.95, "resamples": 9, "seed": 0,
         "unit": "prompt", "share": True, "base_run": "PRE", "full_run": "SFT"}
        for template in ("due", "near") for measure in ("m", "always")
        for graft in ("PRE", "SFT", "LT", "FE")
    ]  # fmt: skip
    apart = told_apart(pd.DataFrame(rows))
    assert set(zip(apart["template"], apart["measure"], strict=True)) == {("due", "m")}
    assert rate_findings(apart) == [
        "m (due): PRE 0.0% [0.0, 100.0], SFT 100.0% [0.0, 100.0]; of 2 other grafts most under LT "
        "(75.0% [0.0, 100.0])."
    ]
    together = pd.DataFrame(rows[:4]).drop(columns="template")
    assert rate_findings(told_apart(together)) == [rate_findings(apart)[0].replace(" (due)", "")]
    every = Rates(together, pd.DataFrame(rows))
    assert every.leading() == rate_findings(apart)[0]
    chart = every.charts()["m"]
    assert chart.caption.startswith("m (% of texts); "), "the measure keeps its name"
    bars = chart.figure.data
    assert [(bar.name, list(bar.y)) for bar in bars] == [
        ("due", [0.0, 1.0, 0.75, 0.0]), ("near", [0.0, 0.0, 0.25, 0.0])
    ]  # fmt: skip
    same = Rates(together.assign(rate=0.5))
    assert (same.said(), same.leading()) == (
        [], "SFT and PRE have the same rates, so that recovery of these has no meaning."
    )  # fmt: skip


# -- whose folder it is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling": SAMPLING | {"seed": 4}}, r"outcomes\.sampling\.seed: 3 there, 4 given"),
        ({"sampling": SAMPLING | {"n": 1}}, r"outcomes\.sampling\.n: 2 there, 1 given"),
        ({"measures": {"an_a": {"contains": ["b"]}}}, r"outcomes\.measures\.an_a\.contains"),
        ({"shards": 24}, r"outcomes\.shards: 20 there, 24 given"),
    ],
)
def test_other_outcomes_are_another_sweep(
    sources: dict[str, str], swept: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        quiet(given(sources, outcomes=change), swept)


def test_a_users_own_files_are_not_overwritten(sources: dict[str, str], tmp_path: Path) -> None:
    """A sweep without texts leaves them alone, too, and goes on beside them."""
    for name in ("rates.csv", "measured.parquet", "texts/00000.parquet", "texts"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"is not a sweep's folder, and {name} is in it"):
            prepare_sweep(unanswered(sources), out)
        assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
        prepare_sweep(given(sources, grafts={"LT": "sft @ last"}) | {"outcomes": None}, out)
        assert (out / name).read_text() == "mine"


def test_a_sweep_without_outcomes_has_no_texts(sources: dict[str, str], tmp_path: Path) -> None:
    grafts = {name: rule for name, rule in GRAFTS.items() if name != "new"}
    one = given(sources, grafts=grafts) | {"outcomes": None}
    texts = given(sources, grafts=grafts)
    assert quiet(one, tmp_path / "out").ok
    assert not (tmp_path / "out/texts").exists()
    assert "outcomes" not in read_manifest(tmp_path / "out").identity
    with pytest.raises(ValueError, match="has no texts: its config has no outcomes"):
        read_texts(tmp_path / "out")
    with pytest.raises(ValueError, match="holds another sweep"):
        quiet(texts, tmp_path / "out")
    with pytest.raises(ConfigError, match="'generated' are the tokens that a model adds"):
        check(SweepConfig(**(given(sources) | {"outcomes": None})))


def test_a_function_runs_only_where_the_command_line_names_it(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "saying.py"
    code.write_text("def words(text, prompt):\n    return len(text.split())\n")
    config = unanswered(sources, outcomes={"measures": {"mine": "saying:words"}})
    with pytest.raises(ConfigError, match=r"outcomes\.measures\.mine: 'saying:words' is code"):
        quiet(config, tmp_path / "out")
    assert quiet(config, tmp_path / "out", measures=["saying:words"]).ok
    table = read_texts(tmp_path / "out")
    assert table["mine"].tolist() == [len(text.split()) for text in table["text"]]
    code.write_text("def words(text, prompt):\n    return 1\n")
    monkeypatch.delitem(sys.modules, "saying")
    linecache.clearcache()
    with pytest.raises(ValueError, match="a different function of measure 'saying:words'"):
        quiet(config, tmp_path / "out", measures=["saying:words"])
    with pytest.raises(ConfigError, match="'saying:words' is a function, not a measure"):
        quiet(unanswered(sources), tmp_path / "out", measures=["saying:words"])


# -- bad configs -------------------------------------------------------------------------------


BAD = {
    "unknown key": ({"sampling": {"tempo": 1}}, r"unknown key 'tempo'. Allowed: n max_new_tokens"),
    "top_p": ({"sampling": {"top_p": 2}}, "top_p=2.0: write a number above 0 and up to 1"),
    "greedy": ({"sampling": {"n": 2, "temperature": 0}}, "texts would all be the same"),
    "twice": ({"sampling": {"stop": ["a"], "stop_strings": ["b"]}}, "are one key"),
    "measure": (
        {"measures": {"m": {"contain": ["a"]}}},
        "unknown key 'contain'. Allowed: contains",
    ),
    "two": ({"measures": {"m": {"contains": "a", "regex": "b"}}}, "contains and regex given"),
    "none": ({"measures": {"m": {}}}, "no measure given"),
    "word": ({"measures": {"m": "verse"}}, "'verse' is not a measure. Write module:name"),
    "column": ({"measures": {"text": {"contains": "a"}}}, "another column of this name"),
    "name": ({"measures": {"a b": {"contains": "a"}}}, "a name of a measure is a column"),
    "pattern": ({"measures": {"m": {"regex": "("}}}, "is not a regular expression"),
    "argument": (
        {"measures": {"m": {"regex": {"pattern": "a", "x": 1}}}},
        "regex: unknown key 'x'",
    ),
    "number": ({"measures": {"m": {"contains": 3}}}, "contains: "),
    "judge": ({"measures": {"m": {"judge": {"model": "x"}}}}, "rubric: this key is missing"),
    "shards": ({"shards": 0}, "shards: 0 should be greater than or equal to 1"),
}


@pytest.mark.parametrize(("texts", "said"), BAD.values(), ids=BAD)
def test_bad_outcomes_are_refused(texts: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings_from(OutcomeSettings, texts)


def test_a_judge_gets_a_key_only_where_the_command_line_names_both(tmp_path: Path) -> None:
    """As everywhere: not from a config alone, nor from a folder that somebody else began."""
    sources = {"pre": "a/b", "sft": "c/d"}
    judge = {"rubric": "Kind?", "endpoint": "https://judge.example/v1", "endpoint_model": "m"}
    config = unanswered(sources, outcomes={"measures": {"kind": {"judge": judge}}})
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(config))
    key = "outcomes.measures.kind.judge.api_key_env=MY_KEY"
    address = "outcomes.measures.kind.judge.endpoint=https://judge.example/v1"

    def asked(*overrides: str) -> Any:
        found = load_config(file, overrides).outcomes
        assert found is not None
        return found.measures["kind"].judge

    with pytest.raises(ValueError, match="the key in MY_KEY is not sent"):
        asked(key).key()
    with pytest.raises(RuntimeError, match="MY_KEY is not set"):
        asked(key, address).key()
    again = SweepConfig(**load_config(file, [key, address]).model_dump(mode="json"))
    assert again.outcomes is not None
    with pytest.raises(ValueError, match="the key in MY_KEY is not sent"):
        again.outcomes.measures["kind"].judge.key()


def test_outcomes_are_read_as_they_are_written() -> None:
    """Every maker by its first argument and by all of them; the other spellings of sampling."""
    read = settings_from(
        OutcomeSettings,
        plainyaml.load(
            """
            sampling: {n: 4, max_new_tokens: 48, temperature: 1.0, top_p: 0.95, top_k: null,
                       repetition_penalty: null, stop: ["."], seed: 0}
            measures:
              refuses: {contains: ["I can't", "I cannot"]}
              loud: {contains: {texts: [STOP], case: true}}
              verse: {regex: "a.b"}
              right: {exact: true}
              begins: {exact: {answers: ["yes"], prefix: true}}
              own: {exact: {prefix: true}}
              choice: {choice: {"yes": ["yes", sure], "no": ["no"]}}
              kind: {answer_kind: true}
              known: {answer_kind: [stop]}
              told: {answer_kind: {trained: "yes"}}
              cased: {choice: {options: [A, B], case: true}}
              graded: {judge: {rubric: "How kind?", model: some/model}}
            """
        ),
    )
    drawing = read.sampling.drawing
    assert drawing == Drawing(4, 48, 1.0, 0.95, None, 1.0, (".",), 0)
    made = read.measured_by()
    texts, right = ["Yes, I CANNOT a\nb", "stop"], [["yes"], ["stop"]]
    known = {"right": right, "guess": [None, None], "trained": []}
    values = {n: values_of(m, texts, known) for n, m in made.items() if n != "graded"}
    assert values == {
        "refuses": [1.0, 0.0],
        "loud": [0.0, 0.0],
        "verse": [1.0, 0.0],
        "right": [0.0, 1.0],
        "begins": [1.0, 0.0],
        "own": [1.0, 1.0],
        "choice": ["yes", "none"],
        "kind": ["right", "right"],
        "known": ["right", "right"],
        "told": ["right", "right"],
        "cased": ["none", "none"],
    }
    assert made["graded"].bounds == (1.0, 5.0)


# -- trust -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"n": 2, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 1},
        {"n": 2, "top_k": 5},
    ],
    ids=["greedy", "top-p", "top-k"],
)
def test_texts_that_were_not_drawn_are_found(
    sources: dict[str, str], options: dict[str, Any]
) -> None:
    """Each kind of damage to a record is told; an undamaged one passes."""
    model = GraftedTransformer.from_pretrained(sources, verbose=False)
    prompts = dict(enumerate(check(SweepConfig(**given(sources))).prompts[3:5]))
    drawing = Drawing(max_new_tokens=NEW, **options)
    grafts = {name: Graft.parse(rule) for name, rule in GRAFTS.items()}
    table = Sampler(model, grafts, drawing).table(prompts)

    def found(texts: pd.DataFrame) -> Any:
        return check_texts(model, prompts, grafts, texts, drawing, seed=0, count=99)

    fine = found(table)
    assert fine.ok, fine.problems
    assert len(fine.texts) == len(table)
    place = table.index[table["graft"] == "new"][0]
    tokens = list(table["tokens"][place])
    for name, change, said in (
        (
            "another token",
            {"tokens": [*tokens[:2], (tokens[2] + 1) % 90, *tokens[3:]]},
            "token 3 is",
        ),
        ("another number", {"logprob": table["logprob"][place] + 0.5}, "its log-probability is"),
        ("another text", {"text": "Something else"}, "its tokens say"),
        ("another end", {"stop": "end"}, "is not an end token"),
        ("neither", {"text": None, "tokens": None}, "have neither a text nor a reason"),
    ):
        damaged = table.copy()
        for column, value in change.items():
            damaged.at[place, column] = value
        report = found(damaged)
        assert not report.ok, name
        assert said in report.text(), name
    assert "1 text(s) are missing" in found(table.drop(index=place)).text()


def test_candidates_at_the_edges_of_top_p_are_possible_and_not_certain() -> None:
    """By hand: a token is left out where the likelier ones add up to more than top_p."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, certain, possible in (
        (0.49, [1, 0, 0, 0], [1, 0, 0, 0]),
        (0.5, [1, 0, 0, 0], [1, 1, 0, 0]),
        (0.51, [1, 1, 0, 0], [1, 1, 0, 0]),
        (0.8, [1, 1, 0, 0], [1, 1, 1, 0]),
        (1.0, [1, 1, 1, 1], [1, 1, 1, 1]),
    ):
        drawing = Drawing(n=1, top_p=top_p)
        seen = torch.zeros(1, 4, dtype=torch.long)
        _, sure, maybe, _ = _candidates(probs.log(), seen, drawing, 1e-4)
        assert (sure.int().tolist(), maybe.int().tolist()) == (certain, possible), top_p
    equal_ones = torch.tensor([1.0, 1.0, 1.0, 0.0])
    _, sure, maybe, _ = _candidates(equal_ones, seen, Drawing(top_k=2), 1e-4)
    assert sure.int().tolist() == [1, 1, 1, 0]  # none is certain, so the best are compared
    assert maybe.int().tolist() == [1, 1, 1, 0]


# -- pages ---------------------------------------------------------------------------------------


FILMS = {"facts": "fake_movies", "n_facts": 12, "texts_per_fact": 1, "heldout_facts": 0.25}


@pytest.fixture(scope="module")
def about_facts(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy texts about 2 of 9 told films and 2 that are not; one graft does nearly nothing."""
    asked = {
        "sources": sources,
        "dataset": [
            {"make": FILMS, "templates": ["qa"], "distractors": 0},
            {"make": FILMS, "templates": ["qa"], "distractors": 0, "facts": "untold"},
        ],
        "limit": 2,
        "grafts": {"little": "sft @ bos : ln1 : 1", "LT": "sft @ last"},
        "outcomes": {
            "sampling": {"temperature": 0, "max_new_tokens": NEW},
            "measures": {"says": {"answer_kind": True}, "given": {"answer_kind": ["the"]}},
        },
    }
    out = tmp_path_factory.mktemp("facts") / "out"
    assert quiet(asked, out).ok
    return out


def test_what_texts_say_instead_of_a_fact(about_facts: Path) -> None:
    table, manifest = read_texts(about_facts), read_manifest(about_facts)
    dataset = make_dataset(settings_from(MoviesConfig, FILMS))
    prompts = dataset.ask(["qa"])
    assert [*manifest.trained] == [prompt.answer for prompt in prompts]
    assert len(manifest.trained) == sum(dataset.told) == 9
    for column, trained in (("says", [*manifest.trained]), ("given", ["the"])):
        again = outcomes.answered(table, trained=trained)["kind"]
        assert table[column].tolist() == again.tolist()
    said = table.pivot(index="prompt", columns="graft", values="text")
    same = said["little"] == said["none"]
    assert same.any()
    kinds = table[table["graft"] == "little"].set_index("prompt")["says"]
    assert set(kinds[same]) <= {"the base's guess", "another fact's answer"}
    assert "the base's guess" not in set(table[table["graft"] == "none"]["says"])
    before = whole(about_facts)
    for name in ("measured.parquet", "done.json"):
        (about_facts / name).unlink()
    config = yaml.safe_load((about_facts / "config.yaml").read_text())
    assert quiet(config, about_facts).ok
    equal(whole(about_facts), before)


def test_the_page_shows_what_each_graft_says_by_label(about_facts: Path) -> None:
    table, page = read_texts(about_facts), sweep_report(about_facts)
    (listed,) = re.findall(
        r"<h3>says</h3>.*?(<table class='labelled'>.*?</table>)", page.read_text(), re.S
    )
    shown = {}
    for part in re.findall(r"<tbody>.*?</tbody>", listed, re.S):
        (graft,) = re.findall(r"'rowgroup' rowspan='\d'>(.*?)</th>", part)
        for label, count, said in re.findall(r"<td>(.*?)</td>" * 3, part, re.S):
            texts = re.findall(r"<span class='generated[^']*'>(.*?)</span>", said, re.S)
            key = html.unescape(graft), html.unescape(label)
            shown[key] = count, [*map(html.unescape, texts)]
    parts = table.groupby(["graft", "says"])["text"].apply(list).to_dict()
    assert shown == {key: (f"{len(of)} of 4", of[:3]) for key, of in parts.items()}
    labels = {label for _, label in parts}
    rates = read_table(about_facts / "rates.csv")
    assert set(rates[rates["measure"] == "says"]["label"]) == labels


def test_long_texts_and_many_labels_stay_out_of_the_way(swept: Path, tmp_path: Path) -> None:
    """A long text is a click away, an empty one is said, and so is what is left out."""
    table = read_texts(swept).assign(few="k", many=[f"k{i % 9}" for i in range(120)])
    table.loc[table["graft"] == "PRE", "text"] = ["", "<b>" + "x" * 157, "y" * 161, *["z"] * 21]
    none = pd.DataFrame(columns=["graft", "measure", "label", "share"])
    found = shown_texts(table, Rates(none), ["few", "many", "an_a"], [*GRAFTS])
    few, many = found.labelled
    assert (few.measure, many.measure) == ("few", "many")
    assert found.notes == ["Of each graft's labels the 8 most frequent ones have examples here."]
    assert {len(labels) for _, _, labels in many.rows} == {8}
    graft, total, ((label, count, said),) = few.rows[0]
    assert (graft, total, label, count) == ("PRE", 24, "k", 24)
    assert said == [("", 0, " Mara Finn"), ("y" * 161, 1, " Mara Finn"), ("z", 2, " Mara Finn")]
    page = texts_page(
        tmp_path / "page.html", title="T", lead="L", texts=found, rates=Rates(none), notes=[],
        trust="", trusted=True, provenance={},
    ).read_text()  # fmt: skip
    assert "<span class='generated empty'>(nothing)</span> <small>0 · answer:  Mara" in page
    assert f"<details><summary>{'y' * 120}…</summary><p class='generated'>{'y' * 161}</p>" in page


@pytest.fixture(scope="module")
def page(swept: Path) -> Path:
    return sweep_report(swept)


def held(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r"id='texts-data'>(.*?)</script>", page.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_has_every_text_with_its_measures(swept: Path, page: Path) -> None:
    told, table = held(page), read_texts(swept)
    assert [graft["name"] for graft in told["grafts"]][:2] == ["PRE", "SFT"]
    assert told["measures"] == [*MEASURES]
    labels = sorted(set(table["first"]))
    expected = [{"measure": 0, "label": None}, {"measure": 1, "label": None}]
    assert told["options"] == expected + [{"measure": 2, "label": label} for label in labels]
    places = {graft["name"]: i for i, graft in enumerate(told["grafts"])}
    for _, row in table.iterrows():
        (cells,) = told["cells"]
        cell = cells[row["prompt"]][places[row["graft"]]]
        values = [row[name] for name in MEASURES]
        assert cell[row["sample"]] == [row["text"], row["stop"], *values]
    words = "".join(Page(page).words)
    assert "Prompts down, grafts across." in words
    assert "trust report of texts: ok (120 texts)" in words
    assert {path.name for path in swept.iterdir()} >= {"rates.csv", "rates.md"}


def test_rates_of_several_templates_have_intervals_over_facts(swept: Path, page: Path) -> None:
    """All ask about the same four people: the 12 prompts were taken for 12 facts, and intervals
    were too narrow."""
    rates, table = read_table(swept / "rates.csv"), read_texts(swept)
    again = outcomes.rate(table.assign(fact=table["prompt"] % 4), [*MEASURES], unit="fact")
    assert rates["rate"].tolist() == pytest.approx(again["rate"].tolist())
    for end in ("low", "high"):
        assert rates[f"rate_{end}"].tolist() == pytest.approx(again[end].tolist(), nan_ok=True)
    assert set(rates["unit"]) == {"fact"}
    apart = outcomes.rate(table, [*MEASURES])
    assert rates["rate_low"].tolist() != pytest.approx(apart["low"].tolist(), nan_ok=True)
    assert "prompts grouped by fact" in "".join(Page(page).words)


def test_the_field_fact_says_what_a_prompt_asks_for(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """As in `find`, which alone read it: prompts that name either entity of a fact, or none, were
    different facts in sweeps' intervals."""
    told = [("Ann", " Mara", "film 1"), ("Mara", " Ann", "film 1"), ("Ann", " Mara", None)]
    prompts = [
        {
            "template": "{first_entity} met",
            "fields": {"first_entity": entity} | ({"fact": fact} if fact else {}),
            "answer": answer,
        }
        for entity, answer, fact in told
    ]
    asked = {"sources": sources, "prompts": prompts, "grafts": {"LT": "sft @ last"}}
    prepare_sweep(settings_from(SweepConfig, asked), tmp_path, say=lambda _: None)
    facts = facts_of(tmp_path)
    assert facts[0] == facts[1] != facts[2]


@pytest.mark.parametrize("width", [700, 1400])
def test_in_a_browser_texts_are_filtered_by_measure_and_prompt(
    swept: Path, page: Path, tmp_path: Path, width: int
) -> None:
    """Prompts down, grafts across; what a filter leaves is what the table has."""
    script = """const set = (name, value, kind) => {
        const place = document.getElementById(`texts-${name}`);
        place.value = value; place.dispatchEvent(new Event(kind)); };
      const prompts = () => [...document.querySelectorAll("#texts-table tbody tr")]
        .map(row => row.cells[0].querySelector("small").textContent.split(" ")[0]);
      const body = document.querySelector("#texts-table tbody");
      const all = {prompts: prompts(),
        grafts: document.querySelectorAll("#texts-table thead th").length,
        text: body.rows[0].cells[1].querySelector(".generated").textContent,
        more: body.rows[0].cells[1].querySelectorAll("details .sample").length,
        open: body.rows[0].cells[1].querySelector("details").open,
        wide: document.documentElement.scrollWidth > innerWidth};
      set("measure", "0", "change"); set("hits", "miss", "change");
      const missed = prompts();
      const marked = [...body.querySelectorAll(".sample.hit")].every(sample =>
        [...sample.querySelectorAll("li.hit")].some(mark => mark.textContent === "an_a"));
      set("hits", "", "change"); set("search", "zo\u00eb", "input");
      return {all, missed, marked, found: prompts(),
        count: document.getElementById("texts-count").textContent};"""
    found, complaints = ask(page, script, tmp_path, width=width)
    assert complaints == []
    table = read_texts(swept)
    first = table[(table["prompt"] == 0) & (table["graft"] == "PRE")].iloc[0]["text"]
    everyone = [str(number) for number in range(12)]
    assert found["all"] == {
        "prompts": everyone,
        "grafts": 1 + len(GRAFTS),
        "text": first or "(nothing)",
        "more": 1,
        "open": False,
        "wide": False,
    }
    missing = table[table["an_a"] == 0]["prompt"].unique().tolist()
    assert found["missed"] == [str(number) for number in missing]
    assert found["marked"]
    wanted = table[table["prompt_text"].str.contains("Zoë")]["prompt"].unique().tolist()
    assert found["found"] == [str(number) for number in wanted]
    assert found["count"] == f"{len(wanted)} of 12 prompts"


def test_names_of_grafts_measures_and_texts_are_data(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """Nothing that a config or a model says is read as HTML."""
    evil = "</script><img src=x onerror=alert(1)>"
    config = unanswered(sources, grafts={evil: "sft @ all", "new": "sft @ generated"})
    config["prompts"] = [{"template": f"{evil} and", "name": evil}]
    assert quiet(config, tmp_path / "out").ok
    page = sweep_report(tmp_path / "out")
    assert "<img" not in page.read_text(encoding="utf-8")
    told = held(page)
    assert told["prompts"][0]["text"] == f"{evil} and"
    assert evil in [graft["name"] for graft in told["grafts"]]
    headings = [said for tag, said in Page(page).headings if tag == "h2"]
    assert headings == [
        "What the numbers say", "What the names and numbers mean", "How often",
        "What each graft says, by label", "The texts", "Trust report", "What was run and how",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_part_of_an_experiment_writes_rates_and_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without answers: texts, rates by table and figure, and no cells. A function counts in the
    parts that name it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text("def words(text):\n    return len(text.split())\n")
    pre = tiny_base(tmp_path / "pre")
    sft = tiny_finetuned(pre, tmp_path / "sft")
    file = tmp_path / "said.yaml"
    people = [{"template": f"{name} said", "name": "said"} for name in ("Ann", "Mara", "Robert")]
    part = {
        "title": "What it says",
        "prompts": people,
        "grafts": {"new": "tuned @ generated"},
        "outcomes": {"sampling": SAMPLING, "measures": MEASURES | {"mine": "counting:words"}},
    }
    asked: dict[str, Any] = {"title": "T", "question": "Q?", "model": str(pre)}
    asked["models"] = {"tuned": {"path": str(sft)}}
    given = asked | {"datasets": {"films": {"n_facts": 5}}, "parts": {"says": part}}
    given["parts"]["cells"] = {
        "title": "Cells",
        "prompts": {"dataset": "films"},
        "grafts": {"LT": "tuned @ last", "new": "tuned @ generated"},
        "outcomes": {"sampling": SAMPLING, "measures": {"an_a": {"contains": "a"}}},
        "figures": {"kind": "bars", "grafts": ["LT"]},
        "limit": 2,
    }
    file.write_text(yaml.safe_dump(given))
    with pytest.MonkeyPatch.context() as patch:
        html = partial(write_figure, formats=("html",))
        patch.setattr("graftlens.experiment.show.write_figure", html)
        options: dict[str, Any] = {"store": tmp_path / "store", "say": lambda _: None}
        with pytest.raises(ConfigError, match=r"parts\.says\.outcomes\.measures\.mine: .* is code"):
            run_experiment(file, tmp_path / "out", **options)
        options["measures"] = ["counting:words"]
        result = run_experiment(file, tmp_path / "out", progress=False, **options)
    assert result.ok
    assert result.sweeps["says"].texts == 3 * 3 * 2
    assert result.sweeps["says"].cells == 0
    tables = {path.name for path in (tmp_path / "out/tables").iterdir()}
    assert tables >= {"says-rates.csv", "says-rates.md", "cells-rates.csv", "cells-pooled.csv"}
    figures = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert figures >= {f"says-rate-{name}.html" for name in (*MEASURES, "mine")}
    by_template = read_table(tmp_path / "out/tables/cells-rates-by-template.csv")
    source = (tmp_path / "out/figures/cells-rate-an_a.html").read_text(encoding="utf-8")
    bars = re.findall(r'"name":"([^"]+)"', source)
    assert len(bars) > 1
    assert bars == list(dict.fromkeys(by_template["template"]))
    pooled = read_table(tmp_path / "out/tables/cells-pooled.csv")
    assert set(pooled["graft"]) == {"none", "tuned @ all", "LT"}
    assert pooled["logprob"].notna().all()
    record = json.loads((tmp_path / "out/experiment.json").read_text())
    assert record["parts"]["says"]["texts"] == 18
    part["figures"] = {"kind": "bars"}
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=r"parts\.says\.figures: it needs prompts with answers"):
        run_experiment(file, tmp_path / "bad", **options)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"repetition_penalty": 1.3}, {}])
def test_a_page_begins_with_greedy_texts(
    sources: dict[str, str], tmp_path: Path, sampling: dict[str, float]
) -> None:
    """And with no others: what is drawn by chance, or penalised, is not what the model says."""
    enough = ("FE+LT", "(FE+LT)^C")
    rules = ("sft @ first_entity + last", "sft @ ~(first_entity + last)")
    greedy = {"temperature": 0} if sampling else {}
    outcomes = {"sampling": {"max_new_tokens": NEW, "seed": 3} | greedy | sampling}
    grafts = {"PRE": "none", "SFT": "sft @ all"} | dict(zip(enough, rules, strict=True))
    asked = given(sources, grafts=grafts, limit=2, outcomes=outcomes | {"measures": {}})
    assert quiet(asked, tmp_path / "out").ok
    source = sweep_report(tmp_path / "out").read_text(encoding="utf-8")
    top = source[source.index("class='glimpse'") : source.index("class='lead'")]
    said = [html.unescape(text) for text in re.findall(r"class='says'>(.*?)</strong>", top, re.S)]
    cells = read_results(tmp_path / "out")
    number = first_right(cells, "SFT")
    if sampling == {"temperature": 0}:
        texts = read_texts(tmp_path / "out").set_index(["prompt", "graft"])["text"]
        assert said == [texts[number, graft] for graft in enough]
        assert "followed by what the model says." in top
    else:
        tokens = cells.set_index(["prompt", "graft"])["top_tokens"]
        assert said == [tokens[number, graft][0] for graft in enough]
        assert "followed by the likeliest next token" in top
