"""`graftlens localise`: its folder is resumed bit for bit, and refused where it is another's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from command import graftlens
from loras import on
from sweeps import checkpoints
from test_report import Page
from transformers import AutoModelForCausalLM

from graftlens.configfile import ConfigError, settings_from
from graftlens.experiment import localising
from graftlens.experiment.config import ExperimentConfig
from graftlens.experiment.localising import TABLES, describe_localise, run_localise
from graftlens.find.config import LocaliseConfig
from graftlens.graft import Graft
from graftlens.viz.tables import read_table

PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.", "Siobhán", "Ben Ode", "Mia")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("pair"))


def config(sources: dict[str, str], **search: Any) -> dict[str, Any]:
    prompts = [
        {
            "template": "{first_entity} plays with",
            "fields": {"first_entity": person, "fact": f"film {number}"},
            "answer": " Mara Finn",
        }
        for number, person in enumerate(PEOPLE)
    ]
    small = {"positions": ["first_entity", "last", "rest"], "target": 0.8, "random": 4}
    small |= {"rounds": 1, "resamples": 3, "steps": 2}
    return {"sources": sources, "prompts": prompts, "search": small | search}


def quiet(given: Any, out: Path, **more: Any) -> localising.LocaliseResult:
    return run_localise(given, out, progress=False, say=lambda line: None, **more)


def tables(out: Path) -> dict[str, bytes]:
    kept = {path.name: path.read_bytes() for path in (out / "tables").iterdir()}
    return kept | {"found.yaml": (out / "found.yaml").read_bytes()}


@pytest.fixture(scope="module")
def whole(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    result = quiet(config(sources), out)
    assert result.ok
    assert result.folder == out
    return out


def test_a_finished_folder_has_everything(whole: Path, sources: dict[str, str]) -> None:
    found = yaml.safe_load((whole / "found.yaml").read_text())
    result = quiet(config(sources), whole)
    assert Graft.from_list(found["found"]) == result.found.graft
    assert Graft.from_list(found["complement"]) == result.found.rest
    for name in TABLES:
        frame = getattr(result.found, name)
        if len(frame):
            assert len(read_table(whole / "tables" / f"{name}.csv")) == len(frame)
    report = (whole / "trust.txt").read_text()
    assert report.startswith("trust report: ok")
    assert "under 'found'" in report
    assert "under 'complement'" in report
    assert result.found.sentence in (whole / "index.html").read_text().replace("&#39;", "'")


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    whole: Path, sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every second thing that it computed, until it is done."""
    from graftlens.find import stored

    out = tmp_path / "out"
    real, left = stored.fill, [0]

    def fill(*given: Any, **more: Any) -> Any:
        found = real(*given, **more)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(stored, "fill", fill)
    stops = 0
    while True:
        # What exists is read; each time two more steps are computed.
        left[0] = 2 * (stops + 1)
        try:
            quiet(config(sources), out)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2
    assert tables(out) == tables(whole)


@pytest.mark.slow
def test_killed_processes_lose_nothing(
    whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL at some writes to the disk; then the command itself finishes the folder."""
    out, path = tmp_path / "out", tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(sources)))
    program = """
import os, signal, sys
from pathlib import Path
from sweeps import Faults
from graftlens.experiment.localising import run_localise
faults = Faults(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
with faults.installed():
    run_localise(sys.argv[1], Path(sys.argv[2]), progress=False)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for at in (9, 40, 90):
        ended = subprocess.run(
            [sys.executable, "-c", program, str(path), str(out), str(at)],
            cwd=Path(__file__).parent,
            env=environment,
            capture_output=True,
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    said = graftlens("localise", path, "--out", out)
    assert said.returncode == 0, said.stderr
    assert tables(out) == tables(whole)


def test_damaged_files_are_computed_again(
    whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(whole, out)
    first = out / "attribution" / "00000.parquet"
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2] + b"\0" + content[len(content) // 2 + 1 :])
    shard = next((out / "steps" / "found" / "shards").iterdir())
    shard.unlink()
    quiet(config(sources), out)
    assert first.read_bytes() == content
    assert tables(out) == tables(whole)


def test_another_search_prompt_or_weight_is_refused(
    whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    before = tables(whole)
    for changes, said in (
        ({"target": 0.7}, r"search\.target: 0\.8 there, 0\.7 given"),
        ({"goal": "necessary"}, r"search\.goal: 'sufficient' there, 'necessary' given"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)holds another localisation.*{said}"):
            quiet(config(sources, **changes), whole)
    other = config(sources)
    other["prompts"][1]["answer"] = " the film"
    with pytest.raises(ValueError, match=r"prompts\.sha256"):
        quiet(other, whole)
    with pytest.raises(ValueError, match=r"models\.fingerprints\.sft|sources\.sft"):
        quiet(config(checkpoints(tmp_path / "other", seed=2)), whole)
    assert tables(whole) == before


def test_a_search_that_cannot_be_asked_leaves_the_folder_to_another(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """A mistyped span was what the folder was about from then on."""
    with pytest.raises(ValueError, match="no span 'titel' here"):
        quiet(config(sources, positions=["titel"]), tmp_path / "out")
    assert not (tmp_path / "out" / "localise.json").exists()


def test_rows_per_pass_are_those_asked_for(sources: dict[str, str], tmp_path: Path) -> None:
    """`row_budget` was read, and then the free memory decided."""
    out = tmp_path / "out"
    quiet(config(sources, rounds=0, random=0) | {"row_budget": 40}, out)
    assert json.loads((out / "localise.json").read_text())["row_budget"] == 40
    steps = [json.loads(path.read_text()) for path in (out / "steps").glob("*/sweep.json")]
    assert {step["models"]["row_budget"] for step in steps} == {40}


def test_metrics_that_are_given_in_part_leave_the_rest_as_it_is(sources: dict[str, str]) -> None:
    """A measure more made all answers whole."""
    asked = {"metrics": {"measures": ["kl_base"]}}
    metrics = settings_from(LocaliseConfig, config(sources) | asked).metrics
    assert (metrics.top_k, metrics.answers, metrics.measures) == (5, "first", ("kl_base",))


def test_what_is_somebody_else_s_is_left_alone(sources: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"index\.html in it and no \.graftlens of localisation"):
        quiet(config(sources), tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"positions": ["last"], "source": "task"}}, "search.source: 'task' is not"),
        ({"search": {"positions": ["last"], "goal": "enough"}}, "search.goal"),
        ({"search": {"positions": ["last"], "by": "direction"}}, "search.by"),
        ({"search": {"positions": ["last"], "target": 2}}, "search.target"),
        ({"search": {"positions": ["last"], "size": 3}}, "unknown key 'size'"),
        ({"search": {}}, "search.positions: this key is missing"),
        ({"grafts": {"found": "sft @ last"}}, "a graft is called 'found'"),
        ({"grafts": {"x": "task @ last"}}, "no source 'task'"),
        ({"prompts": []}, "no prompts"),
        ({"grids": []}, "unknown key 'grids'"),
        (
            {"search": {"positions": ["last"], "metric": "answer_logprob"}},
            "search.metric: answer_logprob needs metrics.answers: whole",
        ),
        (
            {"search": {"positions": ["last"], "metric": "likelihood"}},
            "unknown measure 'likelihood'",
        ),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_run_is_refused_before_anything(
    sources: dict[str, str], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        quiet(config(sources) | changes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_describes_and_runs(
    whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "where.yaml"
    path.write_text(yaml.safe_dump(config(sources)))
    said = graftlens("localise", path, "--dry-run", "search.target=0.6", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "sufficient, recovery of logprob to 0.6" in said.stdout
    assert "3 prompts (3 facts) to search on" in said.stdout
    count = len(read_table(whole / "tables" / "table.csv"))
    assert f"          {count} sites (components of layers at positions)" in said.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["where.yaml"]
    assert "3 facts) to report on" in describe_localise(path)
    said = graftlens("localise", path, "limit=3", cwd=tmp_path)
    assert said.returncode == 1
    assert "4 or more are needed" in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["where.yaml"]
    few = ("search.random=0", "search.rounds=0")
    said = graftlens("localise", path, *few, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "trust report passed" in said.stdout
    assert (tmp_path / "graftlens-runs" / "localise" / "where" / "index.html").is_file()


def test_the_command_compares_a_localisation_with_a_sweep(whole: Path, tmp_path: Path) -> None:
    """The sweep is the one that the localisation itself ran of its found set."""
    sweep, page = whole / "steps" / "found", tmp_path / "both.html"
    said = graftlens("report", whole, sweep, "--out", page, "--metric", "logprob")
    assert said.returncode == 0, said.stderr
    words = " ".join(" ".join(Page(page).words).split())
    kept = read_table(whole / "tables" / "summary.csv").set_index("graft")
    for graft in ("found", "complement"):
        number = f"{kept.at[graft, 'logprob']:.2f}"
        assert words.count(number) >= 2, "of the localisation and of its sweep"
    alone = graftlens("report", whole)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == f"{whole / 'index.html'}\n"


@pytest.mark.parametrize("name", ["lora", "half"])
def test_the_command_localises_an_adapter_and_what_is_made_of_it(
    name: str, sources: dict[str, str], tmp_path: Path
) -> None:
    """The adapter's own forward pass, of PEFT, is what the trust report compares with."""
    on(AutoModelForCausalLM.from_pretrained(sources["pre"]), 3).save_pretrained(tmp_path / "lora")
    given = {"pre": sources["pre"], "lora": str(tmp_path / "lora")}
    given |= {"half": {"of": "lora", "strength": 0.5}}
    path, out = tmp_path / "where.yaml", tmp_path / "out"
    few = {"source": name, "positions": ["last", "rest"], "rounds": 0, "random": 2}
    path.write_text(yaml.safe_dump(config(given, **few), sort_keys=False))
    said = graftlens("localise", path, "--out", out)
    assert said.returncode == 0, said.stderr
    assert "trust report passed" in said.stdout
    found = yaml.safe_load((out / "found.yaml").read_text())
    assert {rule["source"] for rule in found["found"]} == {name}
    trust = (out / "trust.txt").read_text()
    assert "one source throughout = Hugging Face's own forward pass, at worst:" in trust
    assert "NOT CHECKED" not in trust


def test_shipped_configs_load() -> None:
    root = Path(__file__).parent.parent / "experiments" / "localise"
    paths = sorted(root.glob("*.yaml"))
    assert paths
    for path in paths:
        given = LocaliseConfig.model_validate(yaml.safe_load(path.read_text()))
        assert isinstance(given.sweep().grafts["FE+LT"], Graft)


def test_tables_are_written_as_they_are(whole: Path, sources: dict[str, str]) -> None:
    result = quiet(config(sources), whole)
    kept = read_table(whole / "tables" / "table.csv")
    pd.testing.assert_series_equal(
        kept["score"], result.found.table["score"].astype(float), check_exact=True
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grids": [{"layers": "each"}]}, r"parts\.one\.grids: a part that localises has none"),
        ({"figures": [{"kind": "bars"}]}, r"parts\.one\.figures: a part that localises has none"),
        ({"finding": {"enough": "a", "rest": "b"}}, r"parts\.one\.finding: a part that localises"),
        ({"localise": {"positions": []}, "grafts": {"a": "task @ last"}}, "no source 'task'"),
        ({"localise": {"position": ["last"]}}, r"parts\.one\.localise: unknown key 'position'"),
    ],
    ids=str,
)
def test_a_part_that_localises_has_nothing_else(changes: dict[str, Any], said: str) -> None:
    part = {
        "title": "One",
        "prompts": {"dataset": "films"},
        "localise": {"positions": ["last", "rest"]},
    }
    films = {"facts": "fake_movies", "n_facts": 8}
    whole = {
        "title": "T",
        "question": "?",
        "datasets": {"films": films},
        "models": {"sft": {"data": "films"}},
    }
    with pytest.raises(ConfigError, match=said):
        settings_from(ExperimentConfig, {**whole, "parts": {"one": {**part, **changes}}})
    assert settings_from(ExperimentConfig, {**whole, "parts": {"one": part}}).parts["one"].localise
