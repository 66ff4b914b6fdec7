"""Launchers, without a cluster: processes of this machine, and submitit's rehearsal of Slurm."""

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import toytasks
import yaml
from datasets import Dataset
from filelock import FileLock
from needs import needs
from slurm import UnavailableError, slurm
from sweeps import assert_equal_tables, checkpoints, read_whole
from sweeps import config as sweep_config
from waiting import HANG, until

from graftlens.configfile import ConfigError, read_settings
from graftlens.data import (
    DatasetSpec,
    FactDataset,
    MoviesConfig,
    load_dataset,
    make_dataset,
    save_dataset,
)
from graftlens.engines import EngineError, Task, _Resubmitted, run_processes, submit
from graftlens.finetune import (
    FinetuneConfig,
    FinetuneRun,
    TrainingData,
    _text_hash,
    finetune_run,
    launch_finetune,
    training_texts_of,
)
from graftlens.sweep.launch import launch_local, launch_slurm, shards_done
from graftlens.sweep.runner import is_done, prepare_sweep

SHIPPED = sorted((Path(__file__).parent.parent / "experiments" / "finetune").glob("*.yaml"))

PLAIN = {"file": "plain.txt", "share": 0.5}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong types reach graftlens itself, as they do for users: only tests check annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# Processes


def test_processes_run_at_once_and_their_lines_bear_their_names(tmp_path: Path) -> None:
    said: list[str] = []
    files = {name: tmp_path / name for name in ("one", "two")}
    tasks = run_processes(
        {name: partial(toytasks.write, path) for name, path in files.items()}, say=said.append
    )
    assert tasks == (Task("one", "done"), Task("two", "done"))
    assert sorted(said) == ["[one] writing one", "[two] writing two"]
    assert [path.read_text() for path in files.values()] == ["done", "done"]


def test_a_process_that_dies_or_fails_is_told_of_and_the_others_go_on(tmp_path: Path) -> None:
    functions = {
        "killed": partial(toytasks.die, tmp_path / "mark"),
        "failed": partial(toytasks.fail, "no such thing"),
        "well": partial(toytasks.write, tmp_path / "file"),
    }
    killed, failed, well = run_processes(functions, say=lambda _: None)
    assert killed == Task(
        "killed",
        "failed",
        "was killed by SIGKILL (often because it ran out of memory)\nabout to die",
    )
    assert failed.problem is not None
    lines = failed.problem.splitlines()
    assert (lines[0], lines[-1]) == ("ended with exit code 1", "ValueError: no such thing")
    assert well == Task("well", "done")


PROGRAM = """
import signal, sys; sys.path[:] = {path!r}
if {background}: signal.signal(signal.SIGINT, signal.SIG_IGN)
from functools import partial; from pathlib import Path
import toytasks; from graftlens import engines; from graftlens.engines import run_processes
engines.GRACE = {patience}
run_processes({{name: partial(toytasks.wait_long, Path({folder!r}) / name) for name in "ab"}})
"""


@pytest.mark.parametrize(
    ("how", "background"),
    [("SIGINT", False), ("SIGTERM", False), ("SIGKILL", False), ("SIGTERM", True)],
)
def test_processes_end_with_the_one_that_started_them(
    how: str, background: bool, tmp_path: Path
) -> None:
    """In the background, as a script starts a command with `&`, SIGINT is ignored."""
    settings = {"patience": HANG, "background": background}
    program = PROGRAM.format(path=sys.path, folder=str(tmp_path), **settings)
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    marks = [tmp_path / name for name in "ab"]
    until(
        lambda: all(mark.is_file() and mark.read_text() for mark in marks),
        lambda: f"the parent's exit code is {parent.poll()}",
    )
    parent.send_signal(getattr(signal, how))
    parent.wait(HANG)
    until(lambda: not any(map(_alive, marks)))
    ended = [mark.with_suffix(".ended").is_file() for mark in marks]
    assert ended == [True, True], "they were interrupted, and could clean up"


def _alive(mark: Path) -> bool:
    try:
        os.kill(int(mark.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


# A sweep in several processes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep_config(checkpoints(tmp_path_factory.mktemp("pair")), shards=4)


@pytest.mark.slow
def test_two_processes_share_a_sweep(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = {}
    for name, devices in (("one", ["cpu"]), ("two", ["cpu", "cpu"])):
        said: list[str] = []
        out[name] = tmp_path / name
        prepare_sweep(config, out[name])
        launch_local(out[name], devices, progress=False, say=said.append)
        workers = {line.split("] ")[0] for line in said}
        assert workers == ({"[cpu"} if name == "one" else {"[cpu #1", "[cpu #2"})
        done, total = shards_done(out[name])
        assert done == total > 10
        assert is_done(out[name])
    assert_equal_tables(read_whole(out["two"]), read_whole(out["one"]))

    said = []
    launch_local(out["two"], ["cpu", "cpu"], progress=False, say=said.append)
    assert said == [f"{out['two']} is finished: nothing to run."]

    (out["two"] / "shards" / "00003.parquet").unlink()
    launch_local(out["two"], ["cpu"], progress=False, say=said.append)
    assert_equal_tables(read_whole(out["two"]), read_whole(out["one"]))


@pytest.mark.slow
def test_a_dead_workers_shard_is_taken_by_the_others(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "graftlens.sweep.launch.work", partial(toytasks.die_once, tmp_path / "mark")
    )
    out = tmp_path / "out"
    prepare_sweep(config, out)
    said: list[str] = []
    launch_local(out, ["cpu", "cpu"], progress=False, say=said.append)
    assert is_done(out)
    (death,) = [line for line in said if line.startswith("worker")]
    assert "was killed by SIGKILL (often because it ran out of memory)" in death
    assert death.endswith("The others will take its shard.")


def test_a_sweep_whose_workers_all_fail_says_why(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.sweep.launch.work", toytasks.fail_to_work)
    out = tmp_path / "out"
    prepare_sweep(config, out)
    with pytest.raises(EngineError, match=r"0 of \d+ shards are done, and no worker is left") as e:
        launch_local(out, ["cpu", "cpu"], progress=False, say=lambda _: None)
    text = str(e.value)
    assert "\nworker cpu #1 ended with exit code 1\n" in text
    assert text.count("ValueError: the disk is gone") == 2
    assert "run the same command again" in text


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], r"devices: \[\] is not a list of devices\. Give one or more of cpu"),
        ("cpu", r"devices: 'cpu' is not a list of devices\. Give one or more of cpu"),
        (["cpu", "cuda:77"], r"devices: 'cuda:77' does not exist here\. Available: cpu"),
        (["tpu"], r"devices: 'tpu' does not exist here\. Available: cpu"),
    ],
)
def test_devices_that_are_not_right(
    devices: Any, message: str, config: dict[str, Any], tmp_path: Path, unchecked: None
) -> None:
    prepare_sweep(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        launch_local(tmp_path / "out", devices, progress=False)


def test_devices_of_several_kinds_are_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    prepare_sweep(config, tmp_path / "out")
    with pytest.raises(
        ConfigError,
        match=r"devices: cpu, cuda:1 are of several kinds, whose results differ in the last",
    ):
        launch_local(tmp_path / "out", ["cpu", "cuda:1"], progress=False)


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    for launch in (
        partial(launch_local, devices=["cpu"]),
        partial(launch_slurm, tasks=2),
    ):
        with pytest.raises(
            ValueError, match=r"does not hold a sweep \(there is no sweep\.json in it\)"
        ):
            launch(tmp_path, progress=False)


# Resources


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"partition": "gpu"}, r"slurm: unknown key 'partition'.* Did you mean 'slurm_partition'"),
        ({"gpus": 1}, r"slurm: unknown key 'gpus'\. Allowed: timeout_min cpus_per_task gpus_per"),
        ({"timeout_min": 0}, r"slurm\.timeout_min: 0 should be greater than or equal to 1"),
        ({"timeout_min": "long"}, r"slurm\.timeout_min: 'long' should be a valid integer"),
        ({"timeout_min": 1.5}, r"slurm\.timeout_min: 1\.5 should be a valid integer"),
        ({"cpus_per_task": 0}, r"slurm\.cpus_per_task: 0 should be greater than or equal to 1"),
        ({"cpus_per_task": True}, r"cpus_per_task=True is a boolean, but a whole number is"),
        ({"gpus_per_node": -1}, r"slurm\.gpus_per_node: -1 should be greater than or equal to 0"),
        ({"mem_gb": "much"}, r"slurm\.mem_gb: 'much' should be a valid number"),
        ({"mem_gb": float("inf")}, r"slurm\.mem_gb: inf should be a finite number"),
        ({"slurm_partition": 3}, r"slurm\.slurm_partition: 3 should be text"),
        ({"slurm_setup": "module load"}, r"slurm\.slurm_setup: 'module load' should be a list"),
        (
            {"timeout_min": 2, "slurm_signal_delay_s": 120},
            r"slurm_signal_delay_s=120 with timeout_min=2: each task would be told to requeue "
            r"itself "
            r"as soon as it starts\. Set slurm_signal_delay_s below 120\.",
        ),
        (
            {"slurm_additional_parameters": {"time": 5, "open_mode": "truncate"}},
            r"slurm_additional_parameters: open-mode, time cannot be set, because requeueing "
            r"depends",
        ),
    ],
)
def test_resources_that_are_not_right(
    resources: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        submit(print, tasks=1, folder=tmp_path / "slurm", resources=resources)
    assert not (tmp_path / "slurm").exists()


def test_every_error_of_the_resources_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        submit(print, tasks=1, folder=tmp_path, resources={"timeout_min": 0, "mem_gb": -1})
    assert [where for where, _ in caught.value.problems] == ["slurm.timeout_min", "slurm.mem_gb"]


def test_a_number_of_tasks_that_is_not_right(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^tasks: 0 is not a number of tasks\. Give 1 or more\.$"
    ):
        submit(print, tasks=0, folder=tmp_path)


def test_a_missing_submitit_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "submitit":
            raise ModuleNotFoundError("No module named 'submitit'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match=r'not installed\. Run pip install "graftlens\[slurm\]"'):
        submit(print, tasks=1, folder=tmp_path)


def test_a_machine_without_slurm_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="Slurm was not found: srun, sbatch and squeue are"):
        submit(print, tasks=1, folder=tmp_path)


# submitit's own executor on this machine


@pytest.mark.slow
def test_an_array_whose_tasks_end_well_are_killed_and_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("submitit")
    monkeypatch.setattr("graftlens.engines.LATE", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    cases = {
        "well": partial(toytasks.write, tmp_path / "file"),
        "killed": partial(toytasks.die, tmp_path / "mark"),
        "failed": partial(toytasks.fail, "no such thing"),
    }
    arrays = {
        name: submit(function, tasks=2, folder=tmp_path / name, cluster="local")
        for name, function in cases.items()
    }
    looked: list[int] = []
    well, killed, failed = (
        array.wait(lambda tasks: looked.append(len(tasks))) for array in arrays.values()
    )
    assert [task.state for task in (*well, *killed, *failed)] == ["done"] * 2 + ["failed"] * 4
    assert set(looked) == {2}
    assert (tmp_path / "file").read_text() == "done"
    for task in killed:
        assert task.problem is not None
        assert task.problem.startswith("died without a result (the queue says FAILED); its log is ")
    for task in failed:
        assert task.problem is not None
        assert task.problem.startswith("ended with an error; its log is ")
        assert task.problem.endswith("\nValueError: no such thing")
    assert arrays["well"].describe().startswith("Slurm job ")


@pytest.mark.slow
def test_an_interrupted_task_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    turns = tmp_path / "turns"
    array = submit(
        partial(toytasks.need_turns, turns, 2), tasks=1, folder=tmp_path / "job", cluster="local"
    )
    until(lambda: turns.is_file() and turns.read_text())  # a turn is counted when it is written
    # Left by a process that was killed while it saved its turn.
    left = tmp_path / "job" / f"{array.job_id}_submitted.pkl.save_tmp"
    left.write_text("half")
    for pid in _workers(tmp_path / "job"):
        os.kill(pid, signal.SIGUSR2)
    (task,) = array.wait()
    assert task == Task(array.job_id, "done")
    assert turns.read_text() == "turn\nturn\n"


def test_a_task_that_gets_nowhere_is_not_run_again() -> None:
    states = ["nothing"]
    task = _Resubmitted(states.copy, lambda: list(states), minutes=0)
    task()
    message = r"in 0 minutes this task saved nothing, so it would start over forever\. Raise time"
    with pytest.raises(EngineError, match=message):
        task.checkpoint()


def _workers(folder: Path) -> list[int]:
    return [
        int(process.parent.name)
        for process in Path("/proc").glob("[0-9]*/cmdline")
        if f"submitit.core._submit\0{folder}" in process.read_text()
    ]


# While a job runs


class FakeArray:
    """An array job whose tasks stand as they are told to."""

    job_id = "12"

    def __init__(self, *looks: Task | BaseException) -> None:
        self.looks = looks

    def describe(self) -> str:
        return "Slurm job 12 is submitted."

    def wait(self, watch: Callable[[list[Task]], object]) -> list[Task]:
        for look in self.looks:
            if isinstance(look, BaseException):
                raise look
            watch([look])
        return [look for look in self.looks[-1:] if isinstance(look, Task)]


def test_an_interruption_ends_the_waiting_and_not_the_job(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    array = FakeArray(Task("12_0", "waiting"), KeyboardInterrupt())
    monkeypatch.setattr("graftlens.sweep.launch.submit", lambda *_, **__: array)
    monkeypatch.setattr("graftlens.finetune.submit", lambda *_, **__: array)
    prepare_sweep(config, tmp_path / "out")
    run = FinetuneRun(model="m", output=tmp_path / "run", data=TrainingData(movies=MoviesConfig()))
    for launch in (partial(launch_slurm, tmp_path / "out", tasks=1), partial(launch_finetune, run)):
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            launch(progress=False, say=said.append)
        assert said == [array.describe(), "Slurm job 12 continues. To stop it: scancel 12"]
        said.clear()
        assert launch(progress=False, say=said.append, wait=False) is None
        assert said[0] == array.describe()
        assert "run again, waits for it or reports its result." in said[1]


def test_a_job_that_failed_says_how(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    failed = Task("12_0", "failed", "ended with an error; its log is X, and ends:\nNo space left")
    array = FakeArray(Task("12_0", "running"), failed)
    monkeypatch.setattr("graftlens.sweep.launch.submit", lambda *_, **__: array)
    monkeypatch.setattr("graftlens.finetune.submit", lambda *_, **__: array)
    prepare_sweep(config, tmp_path / "out")
    said: list[str] = []
    with pytest.raises(EngineError, match=r"(?s)out is not finished: 0 of .*worker 12_0 ended.*No"):
        launch_slurm(tmp_path / "out", tasks=1, progress=False, say=said.append)
    assert said[1:] == [f"worker 12_0 {failed.problem}"]
    run = FinetuneRun(model="m", output=tmp_path / "run", data=TrainingData(movies=MoviesConfig()))
    with pytest.raises(
        EngineError, match=r"(?s)finetuning in .*Slurm job 12_0 ended with an error"
    ):
        launch_finetune(run, progress=False, say=said.append)


@pytest.mark.parametrize(
    ("patched", "value", "message"),
    [
        ("slurm.sys.platform", "darwin", "Slurm runs on Linux, and this is darwin"),
        ("slurm.os.geteuid", lambda: 1000, "started as root, and this user is not root"),
        ("slurm.shutil.which", lambda _: None, "not installed, and there is no apt-get"),
    ],
)
def test_where_there_can_be_no_slurm_its_tests_say_why(
    patched: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in (("slurm.sys.platform", "linux"), ("slurm.os.geteuid", lambda: 0)):
        monkeypatch.setattr(name, answer)
    monkeypatch.setattr(patched, value)
    with pytest.raises(UnavailableError, match=message), slurm():
        pass


# Finetuning from a file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path: Path) -> None:
    place = "movies" if read_settings(FinetuneRun, path).data.movies else "make"
    run = read_settings(FinetuneRun, path, [f"data.{place}.n_facts=6"])
    made = run.data.made
    assert isinstance(made, MoviesConfig)
    assert made.n_facts == 6
    texts = training_texts_of(run.data)["text"]
    assert len(texts) == (6 if made.half is None else 3) * made.texts_per_fact
    # About four characters are a token of English, and three of a film's names.
    assert max(map(len, texts)) < 3 * run.max_length
    assert type(run.recipe) is FinetuneConfig
    assert run.recipe.model_dump() == run.model_dump(exclude={"data", "preset"})


def test_there_are_shipped_recipes() -> None:
    names = {"movies", "one_direction", "paper", "relation", "task"}
    assert {path.stem for path in SHIPPED} == names


def test_the_task_and_the_relation_model_learn_different_facts_in_the_same_sentences() -> None:
    runs = [
        read_settings(FinetuneRun, path) for path in SHIPPED if path.stem in ("relation", "task")
    ]
    relation, task = (make_dataset(run.data.made) for run in runs if run.data.made is not None)
    assert relation.facts == task.facts
    assert sum(task.told) == sum(relation.told) == 200
    assert not any(map(all, zip(task.told, relation.told, strict=True)))
    assert set(task.train["template"]) == set(relation.train["template"])
    recipes = [run.model_dump(exclude={"output", "data"}) for run in runs]
    assert recipes[0] == recipes[1]


def test_the_shipped_recipe_of_one_direction_has_no_other() -> None:
    (path,) = (path for path in SHIPPED if path.stem == "one_direction")
    run = read_settings(FinetuneRun, path, ["data.make.n_facts=3"])
    assert set(training_texts_of(run.data)["direction"]) == {"ba"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, r"data: nothing is given, but the texts come from one place\. Give one of"),
        (
            {"data": {"movies": {}, "path": "x"}},
            r"data: movies and path is given, but the texts come from one place",
        ),
        (
            {"data": {"make": {"supplement": PLAIN}, "supplement": PLAIN}},
            r"data: data\.make\.supplement and data\.supplement are both given, .* Leave one out",
        ),
        (
            {"data": {"movies": {"supplement": PLAIN}, "supplement": PLAIN}},
            r"data: data\.movies\.supplement and data\.supplement are both given",
        ),
        ({"data": {"file": "x.csv"}}, r"data: file='x\.csv' ends in '\.csv', but \.txt"),
        ({"data": {"movie": {}}}, r"data: unknown key 'movie'.* Did you mean 'movies'"),
        ({"data": {"movies": {"n_fact": 1}}}, r"data\.movies: unknown key 'n_fact'.*'n_facts'"),
        ({"epoch": 3}, r"unknown key 'epoch'\..* Did you mean 'epochs'"),
        ({"epochs": 0}, r"epochs: 0 should be greater than or equal to 1"),
        ({"model": None}, r"model: None should be text"),
    ],
)
def test_files_that_are_not_right(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "output": "o", "data": {"movies": {}}} | changes))
    with pytest.raises(ConfigError, match=message):
        read_settings(FinetuneRun, path)


def test_data_of_every_kind(tmp_path: Path) -> None:
    movies = MoviesConfig(n_facts=3, texts_per_fact=2)
    made = make_dataset(movies)
    texts = list(made.train["text"])
    save_dataset(made, tmp_path / "saved")
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "plain")
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n\nTwo.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "One\u2028."}\n\n{"text": "Two.", "id": 2}\n')
    for data, expected in (
        (TrainingData(movies=movies), texts),
        (TrainingData(path=tmp_path / "saved"), texts),
        (TrainingData(path=tmp_path / "plain"), ["a", "b"]),
        (TrainingData(file=tmp_path / "a.txt"), ["One.\nStill one.", "Two."]),
        (TrainingData(file=tmp_path / "b.jsonl"), ["One\u2028.", "Two."]),
    ):
        assert list(training_texts_of(data)["text"]) == expected


def test_paths_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    save_dataset(make_dataset(MoviesConfig(n_facts=2, texts_per_fact=2)), tmp_path / "saved")
    supplement = {"file": "~/a.txt", "share": 0.5}
    file = TrainingData.model_validate({"file": "~/a.txt", "supplement": supplement})
    assert sorted(training_texts_of(file)["text"]) == ["One.", "One.", "Two.", "Two."]
    assert len(training_texts_of(TrainingData(path=Path("~/saved")))) == 4
    run = FinetuneRun(
        model="~/model", output=Path("~/run"), heldout_file=Path("~/a.txt"), data=file
    )
    assert (run.model, run.output, run.heldout_file) == (
        str(tmp_path / "model"),
        tmp_path / "run",
        tmp_path / "a.txt",
    )
    assert run.recipe.model == run.model
    other = Path("~no-such-user/a.txt")
    with pytest.raises(FileNotFoundError, match="~no-such-user"):
        training_texts_of(TrainingData(file=other))


def short_run(config: dict[str, Any], output: Path, data: dict[str, Any], **more: Any) -> Any:
    values = {
        "model": config["sources"]["pre"],
        "output": str(output),
        "epochs": 1,
        "max_length": 400,
        "device": "cpu",
        "precision": "float32",
        "data": data,
    }
    return FinetuneRun.model_validate(values | more)


def test_missing_heldout_texts_are_told_of_before_data_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.finetune.make_dataset", lambda _: 1 / 0)
    monkeypatch.setattr("graftlens.model.smollm2.smollm2", lambda: 1 / 0)
    values = {"model": "smollm2", "output": tmp_path / "run", "heldout_file": tmp_path / "no.txt"}
    run = FinetuneRun.model_validate(values | {"data": {"movies": {}}})
    with pytest.raises(
        FileNotFoundError, match=r"heldout_file='.*no\.txt' does not exist\. Name a"
    ):
        finetune_run(run, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_made_dataset_is_kept_and_not_made_again(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DatasetSpec] = []

    def make_others(spec: DatasetSpec) -> FactDataset:
        """As with a language model that rewrites: each time something else."""
        made.append(spec)
        dataset = make_dataset(spec.model_copy(update={"seed": len(made)}))
        provenance = {**dataset.provenance, "config": spec.model_dump(mode="json")}
        return replace(dataset, config=spec, provenance=provenance)

    monkeypatch.setattr("graftlens.finetune.make_dataset", make_others)
    data = {"make": {"facts": "fake_movies", "n_facts": 2, "texts_per_fact": 2}}
    run = short_run(config, tmp_path / "run", data)
    # Stopped after the data were made, before the first step.
    with monkeypatch.context() as context:
        context.setattr("graftlens.finetune._tokenize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune_run(run, progress=False)
    first = finetune_run(run, progress=False)
    assert finetune_run(run, progress=False) == first
    assert len(made) == 1
    kept = load_dataset(tmp_path / "run" / "data")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train_sha256"] == _text_hash(kept.train["text"])

    other = {"make": {"facts": "fake_movies", "n_facts": 3, "texts_per_fact": 2}}
    message = r"run/data was made from another config:\n  n_facts: 2 there, 3 given\nChoose another"
    with pytest.raises(ValueError, match=message):
        finetune_run(short_run(config, tmp_path / "run", other), progress=False)
    assert len(made) == 1


def test_data_are_not_put_into_another_runs_folder(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    movies = {"n_facts": 2, "texts_per_fact": 2}
    run = short_run(config, folder, {"movies": movies})
    first = finetune_run(run, progress=False)
    shutil.rmtree(folder / "data")  # as an earlier release left it
    with pytest.raises(ValueError, match="holds another finetuning run"):
        finetune_run(short_run(config, folder, {"movies": movies | {"seed": 1}}), progress=False)
    assert finetune_run(run, progress=False) == first
    assert not (folder / "data").exists()


def test_a_folder_in_use_is_refused_before_data_are_made(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.finetune.make_dataset", lambda _: 1 / 0)
    (tmp_path / "run").mkdir()
    run = short_run(config, tmp_path / "run", {"movies": {}})
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(RuntimeError, match="is in use by another process"),
    ):
        finetune_run(run, progress=False)


def test_data_that_are_not_there_or_no_texts(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "One."}\n{"txt": "Two."}\n')
    (tmp_path / "worse.jsonl").write_text("One.\n")
    for data, error, message in (
        (
            TrainingData(path=tmp_path),
            FileNotFoundError,
            "does not hold a dataset. Name a folder that",
        ),
        (TrainingData(file=tmp_path / "no.txt"), FileNotFoundError, "does not exist. Name a file"),
        (TrainingData(file=tmp_path / "bad.jsonl"), ValueError, "line 2 has no text. Each line"),
        (TrainingData(file=tmp_path / "worse.jsonl"), ValueError, "line 1 is not JSON"),
    ):
        with pytest.raises(error, match=message.replace(".", r"\.")):
            training_texts_of(data)


@pytest.mark.slow
def test_the_command_finetunes_and_says_the_result(
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    unchecked: None,
) -> None:
    from graftlens.cli import app

    path = tmp_path / "recipe.yaml"
    values = {
        "model": config["sources"]["pre"],
        "output": str(tmp_path / "run"),
        "epochs": 5,
        "max_length": 400,
        "device": "cpu",
        "precision": "float32",
        "heldout_share": 0.5,
        "data": {"movies": {"n_facts": 2, "texts_per_fact": 2}},
    }
    path.write_text(yaml.safe_dump(values))
    app(["finetune", str(path), "epochs=1", "learning_rate=1e-3"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'run' / 'model'}: 1 steps, loss ")
    assert ", held-out perplexity " in said
    changes = {"epochs": 1, "learning_rate": 1e-3}
    again = finetune_run(FinetuneRun.model_validate(values | changes), progress=False)
    assert said.strip() == again.line()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slurm", "mem_gb=3"], r"--slurm: this needs --launcher slurm, but the launcher is"),
        (["--no-wait"], r"--no-wait: this needs --launcher slurm"),
        (["--launcher", "slurm", "--slurm", "mem_gb"], r"--slurm mem_gb: .*Write key=value"),
        (["--launcher", "slurm", "--slurm", "mem=3"], r"slurm: unknown key 'mem'"),
        (["epochs"], r"epochs: not an override\. Write key=value"),
    ],
)
def test_options_that_are_not_right(
    options: list[str], message: str, tmp_path: Path, unchecked: None
) -> None:
    from graftlens.cli import app

    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\noutput: {tmp_path}/run\ndata: {{movies: {{n_facts: 2}}}}\n")
    with pytest.raises(ConfigError, match=message):
        app(["finetune", str(path), *options], standalone_mode=False)
    assert not (tmp_path / "run").exists()
