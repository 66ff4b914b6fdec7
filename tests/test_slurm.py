"""Launching on a real Slurm (a node made of Debian's packages): nothing is lost or different."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from filelock import FileLock
from needs import needs
from safetensors.torch import load_file
from slurm import Slurm, UnavailableError, slurm
from sweeps import assert_equal_tables, checkpoints, read_whole, unfinished_files
from sweeps import config as sweep_config
from toytasks import die, fail_when_ended, need_turns, threads
from waiting import HANG, until

from graftlens.engines import Array, EngineError, Task, submit
from graftlens.finetune import FinetuneRun, finetune_run
from graftlens.sweep.launch import launch_local, launch_slurm, shards_done
from graftlens.sweep.runner import is_done, prepare_sweep

needs("submitit")

pytestmark = pytest.mark.slow


#: A minute is the least that Slurm allows.
BRIEF = {"timeout_min": 10, "slurm_partition": "main", "cpus_per_task": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # bits depend on their number, and the tasks have one
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    # Tasks get this environment, and have to find the tests' functions.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), before["PYTHONPATH"]))
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with slurm() as running:
            yield running
    except UnavailableError as error:
        pytest.skip(f"no Slurm can be set up here: {error}")
    finally:
        torch.set_num_threads(threads_before)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of shards of one cell each, so that it can be struck on its way."""
    return sweep_config(checkpoints(tmp_path_factory.mktemp("pair")), shards=1)


@pytest.fixture(scope="module")
def local(
    config: dict[str, Any], cluster: Slurm, tmp_path_factory: pytest.TempPathFactory
) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("local") / "out"
    prepare_sweep(config, out)
    launch_local(out, ["cpu"], progress=False)
    return read_whole(out)


def assert_as_local(out: Path, local: pd.DataFrame) -> None:
    assert is_done(out)
    assert_equal_tables(read_whole(out), local)
    assert unfinished_files(out) == []


def launch(out: Path, **more: Any) -> tuple[Any, list[str]]:
    """Start `launch_slurm` in a thread of its own; the thread, and what it said."""
    from threading import Thread

    said: list[str] = []

    def run() -> None:
        try:
            launch_slurm(out, progress=False, say=said.append, resources=BRIEF, **more)
        except BaseException as error:
            said.append(f"{type(error).__name__}: {error}")

    thread = Thread(target=run, daemon=True)
    thread.start()
    until(lambda: said, lambda: "no job was submitted")
    return thread, said


@contextlib.contextmanager
def graftlens(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command of the program, on Slurm."""
    command = [sys.executable, "-m", "graftlens", *words, "--launcher", "slurm"]
    command += [word for key, value in BRIEF.items() for word in ("--slurm", f"{key}={value}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def job_of(out: Path) -> str:
    """The id of the job that runs in a folder."""
    return next((out / "slurm").glob("*_submission.sh")).name.split("_")[0]


def logs(out: Path) -> str:
    return "\n".join(
        f"{path.name}:\n{path.read_text()}" for path in sorted((out / "slurm").glob("*_log.*"))
    )


def at_least(out: Path, shards: int) -> None:
    until(lambda: shards_done(out)[0] >= shards, lambda: logs(out))


class Gate:
    """Holds the shards of a prepared sweep from one on, so that it gets no further."""

    def __init__(self, out: Path, first: int) -> None:
        shards = range(first, shards_done(out)[1])
        self.locks = {n: FileLock(out / "locks" / f"{n:05d}.lock") for n in shards}
        for lock in self.locks.values():
            lock.acquire(timeout=0)

    def open(self, upto: int | None = None) -> None:
        """Let the shards before `upto` go, all of them by default."""
        for number in [n for n in self.locks if upto is None or n < upto]:
            self.locks.pop(number).release()


def test_a_killed_task_costs_its_shard(
    cluster: Slurm, config: dict[str, Any], local: pd.DataFrame, tmp_path: Path
) -> None:
    """By the command, with two tasks of which one is killed at its shard."""
    out = tmp_path / "out"
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = ["sweep", str(path), "--out", str(out), "--tasks", "2"]
    prepare_sweep(config, out)
    gate = Gate(out, 3)
    with graftlens(*command) as process:
        at_least(out, 3)
        job = job_of(out)
        pids = [cluster.worker(f"{job}_{index}") for index in (0, 1)]
        victim = next(index for index, pid in enumerate(pids) if pid is not None)
        os.kill(pids[victim] or 0, signal.SIGKILL)
        done, total = shards_done(out)
        assert 3 == done < total
        gate.open()
        said, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0
    assert_as_local(out, local)
    first, death, *_, last, page = said.splitlines()
    assert first.startswith(
        f"Slurm job {job} of 2 task(s) is submitted. To inspect it: squeue -j {job};"
    )
    assert death.startswith(f"worker {job}_{victim} died without a result (the queue says FAILED")
    assert last.startswith(f"{out}: {len(local)} cells; trust report passed")
    assert page.startswith(f"{out / 'report.html'}")

    # Given again, there is nothing to do, and nothing is submitted.
    again: list[str] = []
    launch_slurm(out, tasks=2, resources=BRIEF, say=again.append)
    assert again == [f"{out} is finished: nothing to run."]


def test_a_requeued_task_goes_on(
    cluster: Slurm, config: dict[str, Any], local: pd.DataFrame, tmp_path: Path
) -> None:
    """Told by its signal that time is over; then preempted by Slurm without a word."""
    out = tmp_path / "out"
    prepare_sweep(config, out)
    gate = Gate(out, 2)
    thread, said = launch(out, tasks=1)
    job = job_of(out)
    for shards, command in (
        (2, ("scancel", "--signal=USR2", job)),
        (4, ("scontrol", "requeue", job)),
    ):
        gate.open(shards)
        at_least(out, shards)
        cluster.run(*command)
        until(lambda: cluster.tasks(job) == {job: "PENDING"}, lambda: str(cluster.tasks(job)))
        done, total = shards_done(out)
        assert shards == done < total
        if shards == 2:  # the same command joins the job that waits
            joined: list[str] = []
            launch_slurm(out, tasks=1, resources=BRIEF, wait=False, say=joined.append)
            assert joined[0].startswith(
                f"Slurm job {job} is already running. To inspect it: squeue -j"
            )
    gate.open()
    thread.join(HANG)
    assert not thread.is_alive(), logs(out)
    assert said[1:] == []
    assert_as_local(out, local)
    log = next((out / "slurm").glob("*_log.out")).read_text()
    assert log.count("graftlens: llama") == 3, "the models are loaded once a start"


def ended(array: Array) -> Task:
    """How the one task of an array ended."""
    end = time.monotonic() + HANG
    (task,) = array.wait(lambda _: time.monotonic() > end, longest_s=1.0)
    return task


def test_a_task_whose_time_is_over_is_requeued_by_itself(cluster: Slurm, tmp_path: Path) -> None:
    """The signal comes from Slurm, about 15 seconds after the start."""
    turns = tmp_path / "turns"
    array = submit(
        partial(need_turns, turns, 2),
        tasks=1,
        folder=tmp_path / "slurm",
        resources=BRIEF | {"timeout_min": 1, "slurm_signal_delay_s": 45},
    )
    task = ended(array)
    assert task.state == "done", task.problem
    assert turns.read_text() == "turn\nturn\n"


def test_a_task_preempted_before_it_began_is_requeued(cluster: Slurm, tmp_path: Path) -> None:
    """SIGUSR2 kills a Python that does not handle it yet."""
    turns = tmp_path / "turns"
    array = submit(partial(need_turns, turns, 1), tasks=1, folder=tmp_path, resources=BRIEF)
    job = array.job_id
    until(lambda: cluster.worker(job), cluster.logs)
    cluster.run("scancel", "--signal=USR2", job)
    until(lambda: cluster.tasks(job) == {job: "PENDING"}, cluster.logs)
    assert not turns.exists()
    task = ended(array)
    assert task.state == "done", task.problem
    assert turns.read_text() == "turn\n"


@pytest.mark.parametrize("then", ["end", "die"])
def test_the_error_of_a_task_that_slurm_requeues_is_not_its_end(
    cluster: Slurm, tmp_path: Path, then: str
) -> None:
    """Slurm ended a task that had asked to be requeued before it knew so, and the launcher took the
    error that came of it for the end of the task, which waited to go on."""
    turns = tmp_path / "turns"
    array = submit(
        partial(fail_when_ended, turns, then), tasks=1, folder=tmp_path / "slurm", resources=BRIEF
    )
    job = array.job_id
    until(turns.with_name("ready").exists, cluster.logs)
    cluster.run("scontrol", "requeue", job)
    until(lambda: cluster.tasks(job) == {job: "PENDING"}, cluster.logs)
    (noted,) = (tmp_path / "slurm").glob("*_result.json")
    assert "RuntimeError: ended by Slurm" in noted.read_text()
    assert array.poll() == (Task(job, "waiting"),)
    task = ended(array)
    assert turns.read_text() == "turn\nturn\n"
    if then == "end":
        assert task == Task(job, "done")
    else:
        assert task.state == "failed"
        assert (task.problem or "").startswith("died without a result (the queue says FAILED")


def test_what_tasks_get(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("graftlens.engines.LATE", 1.0)
    arrays = [
        submit(function, tasks=1, folder=tmp_path / name, resources=BRIEF | {"cpus_per_task": 2})
        for name, function in (
            ("threads", partial(threads, tmp_path / "threads.txt")),
            ("die", partial(die, tmp_path / "died.txt")),
        )
    ]
    threaded, died = map(ended, arrays)
    assert threaded.state == "done", threaded.problem
    assert (tmp_path / "threads.txt").read_text() == "2 2"
    assert (died.name, died.state) == (arrays[1].job_id, "failed")
    assert "died without a result (the queue says FAILED, NonZeroExitCode)" in (died.problem or "")


def test_a_job_that_slurm_refuses(cluster: Slurm, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"sbatch refused the job: .*partition"):
        submit(print, tasks=1, folder=tmp_path, resources={"slurm_partition": "nowhere"})


def test_finetuning_preempted_once(cluster: Slurm, config: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "model": config["sources"]["pre"],
        "epochs": 40,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "max_length": 400,
        "precision": "float32",
        "device": "cpu",
        "data": {"movies": {"n_facts": 4, "texts_per_fact": 3}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    with graftlens("finetune", str(recipe), f"output={out}") as process:
        checkpoints = out / "checkpoints"
        until(lambda: any(checkpoints.glob("*/complete.json")), lambda: logs(out))
        job = job_of(out)
        cluster.run("scancel", "--signal=USR2", job)
        until(lambda: cluster.tasks(job) == {job: "PENDING"}, lambda: logs(out))
        assert not (out / "model").exists()
        said, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0
    first, last = said.splitlines()
    assert first.startswith(
        f"Slurm job {job} of 1 task(s) is submitted. To inspect it: squeue -j {job};"
    )
    assert last.startswith(f"{out / 'model'}: 120 steps, loss ")

    whole = finetune_run(
        FinetuneRun.model_validate(values | {"output": tmp_path / "whole"}), progress=False
    )
    one, other = (load_file(f / "model.safetensors") for f in (out / "model", whole.folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
