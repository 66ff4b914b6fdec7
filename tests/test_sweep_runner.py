"""A sweep's folder: what runs, what is written, what is refused, and reading it all back."""

import copy
import json
import platform
import shutil
import warnings
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from families import save_checkpoint, tiny_model
from hypothesis import given as drawn
from hypothesis import strategies as st
from sweeps import (
    GRAFTS,
    NoReport,
    Processes,
    assert_equal_tables,
    checkpoints,
    config,
    read_whole,
    unfinished_files,
)
from toytokenizers import gpt2_style, llama3_style

from graftlens.evaluation import evaluate
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt
from graftlens.stats import summarise
from graftlens.sweep import runner
from graftlens.sweep.config import SweepConfig, check
from graftlens.sweep.counts import blocks_of
from graftlens.sweep.results import (
    RESULT_COLUMNS,
    SHARD,
    Manifest,
    prompt_table,
    read_manifest,
    read_results,
    read_shard,
    shard_path,
    to_bytes,
)
from graftlens.sweep.runner import SweepResult, prepare_sweep, run_sweep, sweep_result, work
from graftlens.viz import heatmap

Config = dict[str, Any]


def quietly(given: Any, out: Path, **options: Any) -> SweepResult:
    return run_sweep(given, out, progress=False, **{"say": lambda text: None} | options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def given(sources: dict[str, str]) -> Config:
    return config(sources)


@pytest.fixture(autouse=True)
def _no_trust_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tested elsewhere, and takes long under type checks; `finished` has a real one."""
    monkeypatch.setattr(runner, "trust_report", lambda *args, **options: NoReport())


@pytest.fixture(scope="module")
def finished(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that ran in a process of its own, without type checks, with its trust report."""
    out = tmp_path_factory.mktemp("finished") / "out"
    processes = Processes()
    assert processes.run(config(sources), out) == 0, processes.said(out)
    processes.close()
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished sweep, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_the_results_are_those_of_the_grafts_run_directly(
    given: Config, finished: Path, sources: dict[str, str]
) -> None:
    model = GraftedTransformer.from_pretrained(sources, verbose=False)
    prompts = [Prompt(**prompt) for prompt in given["prompts"]]
    with pytest.warns(UserWarning, match="11 of 84 rows could not be run"):
        expected = evaluate(model, prompts, given["grafts"], top_k=3, progress=False)
    table = read_results(finished)
    assert isinstance(table, pd.DataFrame)
    assert tuple(table.columns) == RESULT_COLUMNS
    for column in ("prompt", "graft", "rule", "template", "text", "answer", "target", "reason"):
        assert table[column].astype(object).equals(expected[column].astype(object)), column
    assert table["target_id"].equals(expected["target_id"])
    assert table["rank"].equals(expected["rank"])
    for column in ("prob", "logprob", "answer_logprob", "logit_diff"):
        np.testing.assert_allclose(table[column], expected[column], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(table["top_probs"], expected["top_probs"], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    ran = table["reason"].isna()
    assert [list(t) for t in table["top_tokens"][ran]] == expected["top_tokens"][ran].tolist()


def test_the_end_says_what_the_trust_report_found(finished: Path, copied: Path) -> None:
    trust = json.loads((finished / "trust.json").read_text())
    assert trust["ok"] is True
    assert trust["rows"] == 84
    assert trust["text"].lower().startswith("trust report: ok (84 rows")
    assert "; trust report passed; " in sweep_result(finished).line()
    (copied / "trust.json").write_text(json.dumps(trust | {"ok": False}))
    assert not sweep_result(copied).ok
    assert f"; trust report FAILED (see {copied}/trust.txt); " in sweep_result(copied).line()


def test_neurons_of_a_grid_are_not_the_unit_that_is_resampled(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """Regression: both were the column `unit`, and summaries lost the neurons."""
    grid = {"components": ["mlp", "mlp_out"], "units": ["0-3", "4-7"]}
    quietly(
        config(sources, grafts={"PRE": "none", "SFT": "sft @ all"}, grids=[grid], shards=1),
        tmp_path / "out",
    )
    table = read_results(tmp_path / "out")
    assert isinstance(table, pd.DataFrame)
    summary = summarise(table, by=(), unit="answer", resamples=20)
    assert set(summary["unit"]) == {"answer"}
    rows = summary[summary["neuron"].isin(["0-3", "4-7"])]
    assert list(rows["component"]) == ["mlp", "mlp", "mlp_out", "mlp_out"]
    (cells,) = heatmap(summary, "logprob", x="neuron").data
    assert list(cells.x) == ["0-3", "4-7"]
    np.testing.assert_array_equal(np.ravel(cells.z), rows["logprob"])


def test_columns_say_what_prompts_and_grafts_are(finished: Path, sources: dict[str, str]) -> None:
    table = read_results(finished)
    assert isinstance(table, pd.DataFrame)
    rows = table[table["prompt"] == 4].set_index("graft")
    tidy = ["rule", "source", "span", "component", "layer", "head", "neuron", "strength"]
    found = rows[tidy].astype(object).where(rows[tidy].notna(), None)
    assert found.loc["o at LT"].tolist() == [
        "sft @ last : o : 1-2",
        "sft",
        "last",
        "o",
        "1-2",
        "all",
        "all",
        1.0,
    ]
    assert found.loc["PRE"].tolist() == ["none", *[None] * 7]
    assert found.loc["two"].tolist()[1:] == [None] * 7
    assert set(table["template"]) == {"plays", "long", "short"}
    assert set(table["dataset"]) == {"prompts"}
    assert set(table["model"]) == {f"pre: {sources['pre']}, sft: {sources['sft']}"}
    assert list(table["graft"].cat.categories) == [*GRAFTS, "T"]
    repeated = ("graft", *tidy, "template", "dataset", "model", "text", "answer")
    assert all(isinstance(table[column].dtype, pd.CategoricalDtype) for column in repeated)


@pytest.mark.parametrize("cells", [4])
def test_more_grafts_than_a_shard_holds(
    sources: dict[str, str], finished: Path, tmp_path: Path, cells: int
) -> None:
    """Grafts are cut into blocks too; the rows are the same to rounding, the reasons exactly."""
    quietly(config(sources, shards=cells), tmp_path / "out")
    assert len(read_manifest(tmp_path / "out").graft_blocks) > 1
    pd.testing.assert_frame_equal(read_results(tmp_path / "out"), read_results(finished), rtol=1e-4)


def test_the_folder_carries_what_was_run(
    given: Config, sources: dict[str, str], tmp_path: Path
) -> None:
    text = "# kept as it is written\n" + yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    out = tmp_path / "folder" / "of" / "out"
    said: list[str] = []
    result = run_sweep(path, out, overrides=["seed=3"], progress=False, say=said.append)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml",
        "done.json",
        "grafts.yaml",
        "locks",
        "prompts.parquet",
        "shards",
        "sweep.json",
        "trust.json",
        "trust.txt",
    ]
    kept = (out / "config.yaml").read_text()
    assert kept == text + "\n# and on the command line:\n#   seed=3\n"
    assert yaml.safe_load((out / "grafts.yaml").read_text()) == given["grafts"]
    manifest = json.loads((out / "sweep.json").read_text())
    model = GraftedTransformer.from_pretrained(sources, verbose=False)
    assert manifest["models"]["fingerprints"] == model.fingerprints()
    assert manifest["models"]["dtype"] == "float32"
    assert manifest["models"]["row_budget"] >= 1
    assert "logits equal the sources' own within" in manifest["models"]["pair_check"]
    assert manifest["versions"] == {
        name: version(name) for name in ("graftlens", "torch", "transformers", "transformer-lens")
    } | {"python": platform.python_version()}
    assert manifest["config"]["seed"] == 3
    assert manifest["overrides"] == ["seed=3"]
    assert manifest["grafts"][3]["rule"] == "sft @ last"
    assert manifest["recovery"] == {"base": "PRE", "full": "SFT"}
    names = sorted(p.name for p in (out / "shards").iterdir())
    assert names == [f"{i:05d}.parquet" for i in range(manifest["shards"])]
    prompts = pq.read_table(out / "prompts.parquet").to_pylist()
    assert [p["text"] for p in prompts][:2] == ["Ann plays with", "Zoë Reed-Lang plays with"]
    assert result == sweep_result(out)
    assert result.ok
    assert (result.cells, list(result.not_run.values())) == (84, [11])
    assert said[0].startswith("graftlens: llama, 3 layers")
    assert said[2:] == [result.line()]
    assert result.line().startswith(
        f"{out}: 84 cells; trust report passed; 11 cells could not be run: 11 × "
    )
    assert "no span 'title'" in result.line()


def test_a_finished_sweep_is_not_run_again(
    given: Config, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    monkeypatch.setattr(GraftedTransformer, "from_pretrained", None)
    said: list[str] = []
    # However the same sweep is written.
    given["grafts"] = {name: [text] for name, text in given["grafts"].items()}
    given["grafts"]["PRE"] = []
    result = quietly(given, copied, say=said.append)
    assert said == [f"{copied} is finished: nothing to run.", result.line()]
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def change(**changes: Any) -> Callable[[Config], None]:
    return lambda given: given.update(changes)


def in_prompt(**changes: Any) -> Callable[[Config], None]:
    return lambda given: given["prompts"][1].update(changes)


def in_grafts(**changes: str) -> Callable[[Config], None]:
    return lambda given: given["grafts"].update(changes)


def without_graft(given: Config) -> None:
    del given["grafts"]["two"]


def graft_moved(given: Config) -> None:
    given["grafts"]["FE"] = given["grafts"].pop("FE")


def prompt_dropped(given: Config) -> None:
    given["prompts"].pop()


def sources_swapped(given: Config) -> None:
    given["sources"] = dict(reversed(given["sources"].items()))


CHANGES: dict[str, tuple[Callable[[Config], None], str]] = {
    "graft": (
        in_grafts(FE="sft @ last : q"),
        "grafts.FE: 'sft @ first_entity' there, 'sft @ last : q' given",
    ),
    "new graft": (in_grafts(new="sft @ bos"), "grafts.new: nothing there, 'sft @ bos' given"),
    "no graft": (without_graft, f"grafts.two: {GRAFTS['two']!r} there, nothing given"),
    "order": (
        graft_moved,
        "order of grafts: 'PRE, SFT, FE, LT, o at LT, two, T' there, "
        "'PRE, SFT, LT, o at LT, two, T, FE' given",
    ),
    "answer": (in_prompt(answer=" Al"), "prompts.1.answer: ' Mara Finn' there, ' Al' given"),
    "name": (in_prompt(name="p"), "prompts.1.name: 'plays' there, 'p' given"),
    "field": (
        in_prompt(fields={"first_entity": "Al"}),
        "prompts.1.fields.first_entity: 'Zoë Reed-Lang' there, 'Al' given",
    ),
    "distractors": (
        in_prompt(distractors=["!"]),
        "prompts.1.distractors.1: ' Mara' there, nothing given",
    ),
    "prompt dropped": (prompt_dropped, "prompts.number: 12 there, 11 given"),
    "top_k": (change(metrics={"top_k": 4}), "metrics.top_k: 3 there, 4 given"),
    "seed": (change(seed=1), "seed: 0 there, 1 given"),
    "shards": (change(shards=30), "shards: 16 there, 30 given"),
    "row budget": (change(row_budget=64), "row_budget: nothing there, 64 given"),
    "bos": (change(prepend_bos=False), "prepend_bos: nothing there, False given"),
    "dtype": (change(dtype="float64"), "dtype: nothing there, 'float64' given"),
    "base source": (sources_swapped, "base source: 'pre' there, 'sft' given"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_sweep_is_refused(name: str, given: Config, copied: Path) -> None:
    make, difference = CHANGES[name]
    given = copy.deepcopy(given)
    make(given)
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    for done in (True, False):
        if not done:
            (copied / "done.json").unlink()
        with pytest.raises(ValueError) as error:
            quietly(given, copied)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{copied} holds another sweep:"
        assert f"  {difference}" in lines
        assert lines[-1] == (
            f"Choose another folder, use the config that is there ({copied}/config.yaml), or "
            "remove the folder."
        )
    del before[copied / "done.json"]
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_long_difference_is_cut(given: Config, copied: Path) -> None:
    given["grafts"] |= {f"extra {i}": f"sft @ [{i}]" for i in range(40)}
    with pytest.raises(ValueError, match="and 21 more differences\nChoose") as error:
        quietly(given, copied)
    assert max(map(len, str(error.value).splitlines())) < 450


def test_a_long_value_is_shown_where_it_differs(given: Config, copied: Path) -> None:
    given["prompts"][0]["template"] = "{first_entity}" + " plays" * 90 + " with"
    given["prompts"][0]["answer"] = " Mara Finn" + " Mara" * 90 + " Finn"
    out = copied.parent / "long"
    prepare_sweep(given, out)
    given["prompts"][0]["answer"] += "!"
    with pytest.raises(ValueError) as error:
        prepare_sweep(given, out)
    line = next(line for line in str(error.value).splitlines() if "prompts.0.answer" in line)
    assert line.count(" Finn'… there") == 1
    assert line.endswith(" Finn!'… given")
    assert len(line) < 400


@pytest.mark.parametrize("state", ["done", "unfinished"])
def test_other_weights_at_the_same_place_are_refused(state: str, tmp_path: Path) -> None:
    """Regression against the worst mistake: a model trained anew, and the old results shown."""
    sources = checkpoints(tmp_path)
    given, out = config(sources), tmp_path / "out"
    quietly(given, out)
    if state == "unfinished":
        (out / "done.json").unlink()
        shard_path(out, 1).unlink()
    there = read_manifest(out).models
    assert there is not None
    tokenizer = llama3_style()
    save_checkpoint(tiny_model("llama", 77, len(tokenizer)), Path(sources["sft"]), tokenizer)
    with pytest.raises(ValueError) as error:
        quietly(given, out)
    first, difference, last = str(error.value).splitlines()
    assert first == f"{out} holds results of other weights:"
    assert difference.startswith(f"  fingerprints.sft: {there['fingerprints']['sft']!r} there, '")
    assert last == "Restore the weights that it was started with, or choose another folder."
    checkpoints(tmp_path)
    assert quietly(given, out).ok, "the same weights, written anew, are the same"


def test_another_tokenizer_at_the_same_place_is_refused(tmp_path: Path) -> None:
    sources = checkpoints(tmp_path)
    given, out = config(sources, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "out"
    llama3_style().save_pretrained(tmp_path / "tokenizer")
    prepare_sweep(given, out)
    gpt2_style().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"prompts\.sha256 of tokens: "):
        prepare_sweep(given, out)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


def shortened(path: Path) -> None:
    path.write_bytes(to_bytes(pq.read_table(path)[1:]))


def of_another_sweep(path: Path) -> None:
    table = pq.read_table(path)
    path.write_bytes(to_bytes(table.replace_schema_metadata({"graftlens.key": "another"})))


@pytest.mark.parametrize(
    ("damage", "done"),
    [
        (truncated, True),
        (truncated, False),
        (emptied, True),
        (flipped, True),
        (zeroed, True),
        (shortened, True),
        (of_another_sweep, True),
        (Path.unlink, False),
    ],
)
def test_a_damaged_shard_is_computed_again(
    damage: Callable[[Path], None],
    done: bool,
    given: Config,
    copied: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not done:
        (copied / "done.json").unlink()
    damage(shard_path(copied, 2))
    (copied / "shards" / ".00002.parquet.12-0123456789abcdef.tmp").write_bytes(b"half")
    (copied / "shards" / "00002.parquet.node-12.tmp").write_bytes(b"half, of version 0.1.0")
    with pytest.warns(UserWarning, match="is not finished: 5 of 6 shards are done"):
        assert len(read_whole(copied)) == 84 - read_manifest(copied).cell_shards.rows(2)
    computed = []
    table = runner.Scorer.table

    def counted(self: runner.Scorer, prompts: Any, *args: Any, **kwargs: Any) -> pd.DataFrame:
        computed.append(prompts)
        return table(self, prompts, *args, **kwargs)

    monkeypatch.setattr(runner.Scorer, "table", counted)
    quietly(given, copied)
    assert len(computed) == 1, "only what is missing"
    assert_equal_tables(read_whole(copied), read_whole(finished))
    assert unfinished_files(copied) == []


def test_other_versions_are_said(
    given: Config, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = read_manifest(copied).versions
    monkeypatch.setattr(runner, "_versions", lambda: dict(versions) | {"torch": "9.0"})
    said: list[str] = []
    quietly(given, copied, say=said.append)
    assert len(said) == 2, "a finished sweep is one whatever is installed now"
    shard_path(copied, 0).unlink()
    quietly(given, copied, say=said.append)
    assert said[2] == (
        "this sweep was started with other versions:\n"
        f"  torch: {versions['torch']!r} there, '9.0' given"
    )
    assert said[3] == "New results may differ from the existing ones in the last digits."


@pytest.mark.parametrize("name", ["prompts.parquet", "grafts.yaml", "config.yaml"])
def test_a_damaged_file_is_written_anew(name: str, given: Config, copied: Path) -> None:
    whole = (copied / name).read_bytes()
    if name == "config.yaml":
        (copied / name).unlink()
    else:
        truncated(copied / name) if len(whole) > 100 else emptied(copied / name)
    if name == "prompts.parquet":
        with pytest.raises(ValueError, match=r"prompts.parquet cannot be read .*command again"):
            read_results(copied)
    quietly(given, copied)
    assert (copied / name).read_bytes() == whole


def test_the_bar_counts_prompts_and_what_was_there(
    given: Config, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "done.json").unlink()
    lost = read_manifest(copied).cell_shards.rows(2)
    shard_path(copied, 2).unlink()
    bars: list[Any] = []

    class Bar(runner.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(runner, "tqdm", Bar)
    run_sweep(given, copied, say=lambda text: None)
    (bar,) = bars
    grafts = len(read_manifest(copied).grafts)
    assert (bar.total, bar.unit) == (84 / grafts, "prompt")
    assert bar.initial == pytest.approx((84 - lost) / grafts)
    assert bar.n == pytest.approx(84 / grafts)
    assert f"{84 // grafts} of {84 // grafts} prompts" in str(bar)
    assert "prompt/s" in str(bar)


@drawn(st.integers(1, 60), st.integers(1, 200), st.integers(1, 400))
def test_shards_hold_every_cell_once(prompts: int, grafts: int, cells: int) -> None:
    blocks = blocks_of(prompts, grafts, cells)
    seen = np.zeros((prompts, grafts), dtype=int)
    for low, high in blocks[0]:
        for first, last in blocks[1]:
            seen[low:high, first:last] += 1
            assert 1 <= (high - low) * (last - first) <= cells
    assert (seen == 1).all()
    widest = max(last - first for first, last in blocks[1])
    assert widest == grafts or grafts > cells, "grafts of a shard share: they stay together"


def test_prompts_of_one_shape_share_a_shard(given: Config, tmp_path: Path) -> None:
    """Cut by the config alone: the same on every start, and lengths do not mix needlessly."""
    one, two = (prepare_sweep(given, tmp_path / name) for name in "ab")
    assert one == two
    assert (tmp_path / "a" / "prompts.parquet").read_bytes() == (
        tmp_path / "b" / "prompts.parquet"
    ).read_bytes()
    many = copy.deepcopy(given)
    many["prompts"] = [p for p in many["prompts"] for _ in range(9)]
    many["grafts"] = {"LT": "sft @ last"}
    many["shards"] = 9 * 3
    manifest = prepare_sweep(many, tmp_path / "c")
    assert manifest.cells == 108 * 3
    tokenizer = llama3_style()
    table = pq.read_table(tmp_path / "c" / "prompts.parquet").to_pandas()
    lengths = table["text"].map(lambda text: len(tokenizer(text)["input_ids"]))
    assert lengths.groupby(table["block"]).nunique().max() == 1


def test_equal_grafts_run_once(given: Config, tmp_path: Path) -> None:
    given["grafts"]["again"] = "sft @ last"
    manifest = prepare_sweep(given, tmp_path / "out")
    assert manifest.duplicates == {"again": "LT"}
    assert "again" not in [graft["name"] for graft in manifest.grafts]


def test_a_checked_config_or_its_value_will_do(given: Config, copied: Path) -> None:
    value = SweepConfig.model_validate(given)
    assert prepare_sweep(value, copied) == prepare_sweep(check(value), copied)
    with pytest.raises(ValueError, match=r"overrides=\['seed=1'\]: these apply to a config file"):
        prepare_sweep(value, copied, overrides=["seed=1"])


def test_a_worker_needs_a_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not hold a sweep \(there is no sweep.json in it\)"):
        work(tmp_path)
    with pytest.raises(ValueError, match="does not hold a sweep"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "sweep.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="is not what this version of graftlens writes"):
        read_results(tmp_path)


def test_an_unfinished_sweep_is_read_with_a_warning(given: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare_sweep(given, out)
    assert manifest.models is None
    with pytest.warns(UserWarning, match="is not finished: 0 of 6 shards are done. Run the"):
        table = read_results(out)
    assert isinstance(table, pd.DataFrame)
    assert tuple(table.columns) == RESULT_COLUMNS
    assert len(table) == 0
    with pytest.raises(ValueError, match=r"is not finished\. Run the sweep's command again"):
        sweep_result(out)


def test_reading_some_columns(finished: Path) -> None:
    table = read_results(finished, columns=["logprob", "text", "graft"])
    assert isinstance(table, pd.DataFrame)
    whole = read_results(finished)
    assert isinstance(whole, pd.DataFrame)
    pd.testing.assert_frame_equal(table, whole[["logprob", "text", "graft"]])
    with pytest.raises(
        ValueError, match=r"columns: 'logits' is not a list of columns .* prompt graft"
    ):
        read_results(finished, columns=["logprob", "logits"])
    with pytest.raises(ValueError, match="columns: 'logprob' is not a list of columns"):
        read_results(finished, columns="logprob")
    with pytest.raises(ValueError, match="batch_rows=0: write a number from 1"):
        read_results(finished, batch_rows=0)


@pytest.mark.parametrize("size", [1, 5, 12, 84, 1000])
def test_reading_in_batches(size: int, finished: Path) -> None:
    batches = list(read_results(finished, batch_rows=size))
    assert [len(batch) for batch in batches] == [size] * (84 // size) + [84 % size] * (
        84 % size > 0
    )
    together = pd.concat(batches).sort_values(["prompt", "graft"]).reset_index(drop=True)
    whole = read_results(finished)
    assert isinstance(whole, pd.DataFrame)
    pd.testing.assert_frame_equal(together, whole)


def _synthetic(out: Path, prompts: int, grafts: int, block: int) -> Manifest:
    """A finished sweep of made-up numbers."""
    manifest = Manifest(
        identity={},
        config={"sources": {"pre": "a", "sft": "b"}},
        overrides=(),
        grafts=[
            {"name": f"g{i}", "rule": f"sft @ [{i}]", "source": "sft", "span": f"[{i}]"}
            | dict.fromkeys(("component", "layer", "head"), "all")
            for i in range(grafts)
        ],
        duplicates={},
        recovery={},
        prompt_blocks=[block] * (prompts // block),
        graft_blocks=[[0, grafts]],
        versions={},
        models={"dtype": "float32", "fingerprints": {}, "row_budget": 1},
    )
    (out / "shards").mkdir(parents=True)
    (out / "sweep.json").write_text(manifest.to_json())
    texts = [Prompt(f"prompt {i}", answer=" a") for i in range(prompts)]
    blocks = [i // block for i in range(prompts)]
    (out / "prompts.parquet").write_bytes(to_bytes(prompt_table(texts, ["d"] * prompts, blocks)))
    rng = np.random.default_rng(0)
    for shard in range(manifest.shards):
        numbers = np.repeat(np.arange(block) + shard * block, grafts)
        n = len(numbers)
        columns: dict[str, Any] = {
            name: pa.nulls(n, SHARD.field(name).type) for name in SHARD.names
        }
        columns |= {
            "prompt": numbers,
            "graft": np.tile(np.arange(grafts), block),
            "logprob": -rng.random(n),
            "top_tokens": [[f"token{j}" for j in range(10)]] * n,
            "top_probs": rng.random((n, 10)).tolist(),
        }
        table = pa.table(columns, schema=SHARD.with_metadata({"graftlens.key": manifest.key}))
        shard_path(out, shard).write_bytes(to_bytes(table))
    return manifest


@pytest.mark.slow
def test_batches_hold_a_batch_and_a_shard(tmp_path: Path) -> None:
    """So that 10^7 rows can be read: what is held does not grow with their number."""
    out = tmp_path / "out"
    manifest = _synthetic(out, prompts=2000, grafts=150, block=25)
    assert manifest.cells == 300_000
    shard = read_shard(out, manifest, 0)
    assert shard is not None
    before = pa.total_allocated_bytes()
    held, rows, batches, total = 0, 0, [], 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in read_results(out, batch_rows=5000):
            assert isinstance(batch, pd.DataFrame)
            held = max(held, pa.total_allocated_bytes() - before)
            rows += len(batch)
            total += batch["logprob"].sum()
            batches.append(weakref.ref(batch))
    assert rows == manifest.cells
    assert sum(ref() is not None for ref in batches) == 1, "only the last one is alive"
    assert held < 8 * shard.nbytes, "of 80 shards"
    whole = read_results(out, columns=["logprob"])
    assert isinstance(whole, pd.DataFrame)
    assert whole["logprob"].sum() == pytest.approx(total)
