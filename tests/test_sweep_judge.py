"""A judge whose key the command line lets it use, in sweeps that several processes share."""

import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from command import graftlens
from sweeps import checkpoints
from test_outcomes_measures import server  # noqa: F401
from test_sweep_texts import unanswered

from graftlens import read_texts
from graftlens.data.languagemodels import LanguageModel
from graftlens.engines import Task
from graftlens.experiment.run import run_experiment
from graftlens.sweep.runner import is_finished, work
from graftlens.viz.tables import read_table

KEY = "sk-secret-of-mine-20"


@pytest.fixture
def asked(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """What the command is given; its judge needs a key."""
    for name, value in {"MY_KEY": KEY, "GRAFTLENS_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    endpoint = f"http://127.0.0.1:{server.server_port}/v1"
    rubric = {"rubric": "Is it kind?", "scale": {"yes": 1, "no": 0}}
    judge = rubric | {"endpoint": endpoint, "endpoint_model": "good", "api_key_env": "MY_KEY"}
    few = unanswered(
        checkpoints(tmp_path / "models"),
        grafts={"LT": "sft @ last"},
        outcomes={"measures": {"kind": {"judge": judge}}},
        limit=1,
    )
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(few))
    place = "outcomes.measures.kind.judge"
    named = [f"{place}.endpoint={endpoint}", f"{place}.api_key_env=MY_KEY"]
    server.seen = []

    def says(question: str, turn: int) -> str:
        server.seen.append([p.info["cmdline"] for p in psutil.process_iter(["cmdline"])])
        return "no" if turn % 3 else "yes"

    server.says = says
    return ["sweep", str(tmp_path / "s.yaml"), *named, "--out", str(tmp_path / "out")]


def assert_judged_in_secret(server: Any, tmp_path: Path, said: str) -> None:  # noqa: F811
    table = read_texts(tmp_path / "out")
    assert is_finished(tmp_path / "out")
    assert table["kind"].notna().all()
    assert set(table["kind"]) == {0.0, 1.0}
    assert {one["key"] for one in server.asked} == {f"Bearer {KEY}"}
    assert_nowhere(tmp_path, said)
    assert server.seen
    assert not [words for seen in server.seen for words in seen if KEY in " ".join(words or ())]


def assert_nowhere(tmp_path: Path, said: str) -> None:
    """The key is in nothing that was said, and in no file."""
    assert KEY not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_several_devices_measure_in_one_call(
    server: Any,  # noqa: F811
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key is in no file, no log and no process's arguments, and no second call is needed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = graftlens(*asked, "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    assert "trust report passed" in done.stdout
    assert_judged_in_secret(server, tmp_path, done.stdout + done.stderr)


@pytest.mark.parametrize("told", [True, False])
def test_what_processes_are_given_has_the_permission_and_not_the_key(
    told: bool,
    server: Any,  # noqa: F811
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without both named on the command line, neither has a process the permission."""

    def in_turn(functions: Mapping[str, Any], *, environment: Any, **_: Any) -> Sequence[Task]:
        sent = {name: pickle.dumps(function) for name, function in functions.items()}
        assert KEY not in str(environment)
        assert not any(KEY.encode() in content for content in sent.values())
        problem = ""
        try:
            for content in sent.values():
                pickle.loads(content)()
        except ValueError as error:
            problem = str(error)
        return [Task(name, "failed" if problem else "done", problem) for name in sent]

    monkeypatch.setattr("graftlens.sweep.launch.run_processes", in_turn)
    words = asked if told else [*asked[:2], *asked[4:]]
    done = graftlens(*words, "--devices", "cpu,cpu")
    assert done.returncode == (0 if told else 1), done.stderr
    if told:
        assert_judged_in_secret(server, tmp_path, done.stdout + done.stderr)
    else:
        assert "the key in MY_KEY is not sent to" in done.stderr
        assert server.asked == []


def test_a_judge_that_fails_costs_no_text_and_no_reply(
    server: Any,  # noqa: F811
    asked: list[str],
    tmp_path: Path,
) -> None:
    """First errors, then rubbish about a text: what was said is kept, what is missing is shown."""
    server.says = lambda question, turn: "yes" if turn < 4 else 400
    words = [*asked, "outcomes.measures.kind.judge.workers=1"]
    failed = graftlens(*words)
    assert failed.returncode == 1
    assert "did not answer (BadRequestError, HTTP status 400)" in failed.stderr
    assert KEY not in failed.stderr + failed.stdout
    kept = {p: p.read_bytes() for p in (tmp_path / "out" / "texts").iterdir()}
    before = [one["messages"][0]["content"] for one in server.asked]
    assert len(before) >= 4
    odd = before[3]
    server.says = lambda question, turn: f"maybe {KEY}" if question == odd else " “No”. "
    done = graftlens(*words)
    assert done.returncode == 0, done.stderr
    after = [one["messages"][0]["content"] for one in server.asked[len(before) :]]
    assert not {*before[:3]} & {*after}, "three replies were known"
    assert after.count(odd) == 3
    assert {p: p.read_bytes() for p in (tmp_path / "out" / "texts").iterdir()} == kept
    table = read_texts(tmp_path / "out")
    assert table["kind"].value_counts(dropna=False).sort_index().index.tolist()[:2] == [0.0, 1.0]
    missing = table[table["kind"].isna()]
    assert set(missing["kind_unread"]) == {""}, "a reply that holds the key is not kept"
    assert all(f"<answer>\n{text}\n</answer>" in odd for text in missing["text"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"kind: {len(missing)} replies of the judge could not be read" in page
    rates = read_table(tmp_path / "out" / "rates.csv")
    assert rates["unread"].sum() == len(missing)
    assert_nowhere(tmp_path, done.stdout + done.stderr)


@pytest.mark.slow
def test_parts_of_an_experiment_hand_on_what_the_command_line_told(
    server: Any,  # noqa: F811
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = yaml.safe_load((tmp_path / "s.yaml").read_text())
    pre, sft = (given["sources"][name] for name in ("pre", "sft"))
    part = {key: given[key] for key in ("prompts", "grafts", "outcomes", "limit")}
    experiment = {"title": "T", "question": "Q?", "model": pre, "models": {"sft": {"path": sft}}}
    experiment["datasets"] = {"films": {"n_facts": 5}}
    cells = {"title": "C", "prompts": {"dataset": "films"}, "grafts": {"LT": "sft @ last"}}
    experiment["parts"] = {"says": part | {"title": "S"}, "cells": cells | {"limit": 1}}
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(experiment))

    def in_turn(out: Path, devices: Sequence[str], *, measures: Any, outcomes: Any) -> None:
        sent = pickle.dumps(partial(work, out, outcomes=outcomes, progress=False))
        assert KEY.encode() not in sent
        pickle.loads(sent)()

    monkeypatch.setattr("graftlens.experiment.run.launch_local", in_turn)
    named = [f"parts.says.{words}" for words in asked[2:4]]
    result = run_experiment(
        file,
        tmp_path / "run",
        overrides=named,
        store=tmp_path / "store",
        devices=["cpu", "cpu"],
        say=lambda _: None,
    )
    assert result.ok
    assert read_texts(result.sweeps["says"].folder)["kind"].notna().all()
    assert {one["key"] for one in server.asked} == {f"Bearer {KEY}"}
    assert_nowhere(tmp_path, "")


def test_permission_is_kept_where_settings_are_pickled_and_nowhere_else() -> None:
    made = LanguageModel(endpoint="https://a.example/v1", endpoint_model="m", api_key_env="MY_KEY")
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    with pytest.raises(RuntimeError, match="MY_KEY is not set"):
        again.key()
    read = LanguageModel.model_validate(made.model_dump())
    with pytest.raises(ValueError, match="the key in MY_KEY is not sent"):
        pickle.loads(pickle.dumps(read)).key()
