"""Locks, devices and array jobs: what outside cases broke."""

import errno
import fcntl
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import typer
import yaml
from sweeps import checkpoints
from sweeps import config as sweep_config

from graftlens import engines, locks
from graftlens.cli import app
from graftlens.configfile import ConfigError
from graftlens.engines import Array, EngineError, Task, _note, _Resubmitted, submit
from graftlens.locks import LockError, locked
from graftlens.model import smollm2 as smollm2_module
from graftlens.sweep.disk import FolderError
from graftlens.sweep.runner import prepare_sweep


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep_config(checkpoints(tmp_path_factory.mktemp("pair")))


def broken(number: int) -> Any:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


# Locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_system_without_locks_is_refused(
    number: int,
    there: bool,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Regression: filelock's substitute outlives a killed process, and was then waited for without
    end and without a word."""
    path = tmp_path / "a.lock"
    if there:
        path.touch()
    monkeypatch.setattr(fcntl, "flock", broken(number))
    for wait in (True, False):
        with (
            pytest.raises(LockError, match=r"the file system of .* has no file locks \("),
            locked(path, wait=wait),
        ):
            pass
    with pytest.raises(FolderError, match=r"has no file locks .* Choose a folder on another file"):
        prepare_sweep(config, tmp_path / "out")
    monkeypatch.setattr(smollm2_module, "_fetch", None)
    with pytest.raises(LockError, match="has no file locks"):
        smollm2_module.smollm2(tmp_path / "cache")
    assert not recwarn.list


def test_it_is_said_what_is_waited_for_and_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a lock that another process held was waited for without a word."""
    monkeypatch.setattr(locks, "SAID", 0.01)
    path = tmp_path / "a.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            os.close(handle)

    with locked(path, wait=False) as held:
        assert not held
    with locked(path, say=say) as held:
        assert held
    assert len(said) == 3
    assert set(said) <= {
        f"waiting for {path}, which process {os.getpid()} holds",
        f"waiting for {path}, which another process holds",  # where the system does not tell
    }


def test_a_lock_does_not_write_through_a_planted_link(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """The claim's lock leads to a user's file, and to one that is not there."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for target in (victim, tmp_path / "new"):
        out = tmp_path / f"out-{target.name}"
        prepare_sweep(config, out)
        (out / "locks" / "claim.lock").unlink()
        (out / "locks" / "claim.lock").symlink_to(target)
        (out / "grafts.yaml").unlink()  # so that something is to be written
        with pytest.raises(FolderError, match=r"claim\.lock is a link where a lock file"):
            prepare_sweep(config, out)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_lock_does_not_empty_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_text("mine")
    with locked(tmp_path / "a.lock") as held:
        assert held
    assert (tmp_path / "a.lock").read_text() == "mine"


# What is refused before a folder is claimed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices", "nonsense"], "devices: 'nonsense' does not exist here"),
        (["--devices", "cpu,nonsense"], "devices: 'nonsense' does not exist here"),
        (["--launcher", "slurm", "--slurm", "mem=3"], "unknown key 'mem'"),
        (["--launcher", "slurm"], "Slurm was not found"),
    ],
)
def test_a_refused_command_claims_no_folder(
    options: list[str],
    said: str,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: the folder was claimed, so that another config was refused in it."""
    if "--launcher" in options:
        pytest.importorskip("submitit")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of what typer itself passes
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    out = tmp_path / "out"
    with pytest.raises((ConfigError, EngineError, typer.BadParameter), match=said):
        app(["sweep", str(path), "--out", str(out), *options], standalone_mode=False)
    assert not out.exists()


# Array jobs


class Planted:
    """What runs where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("planted",))


class Job:
    """A job as submitit has them."""

    def __init__(self, folder: Path, job_id: str = "12_0") -> None:
        self.job_id = job_id
        self.paths = SimpleNamespace(
            folder=folder,
            result_pickle=folder / f"{job_id}_0_result.pkl",
            stderr=folder / f"{job_id}_0_log.err",
        )
        self.state = "RUNNING"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose task is this process."""
    found = Job(tmp_path)
    environment = SimpleNamespace(paths=found.paths)
    submitit = SimpleNamespace(JobEnvironment=lambda: environment)
    monkeypatch.setattr(engines, "_submitit", lambda: submitit)
    return found


def test_a_planted_result_is_not_unpickled(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: whoever could write a task's result made the waiting process run anything."""
    monkeypatch.chdir(tmp_path)
    job.paths.result_pickle.write_bytes(pickle.dumps(("success", Planted())))
    array = Array([job], tmp_path, "name", cluster="local", joined=False)
    (task,) = array.poll()
    assert task.state == "running"
    assert not (tmp_path / "planted").exists()


def test_a_task_notes_how_it_ended(job: Job, tmp_path: Path) -> None:
    array = Array([job], tmp_path, "name", cluster="local", joined=False)

    def fail() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        _Resubmitted(fail, None, minutes=1)()
    assert array.poll() == (Task("12_0", "running"),)  # it may be about to run again
    job.state = "FAILED"
    (task,) = array.poll()
    assert task.state == "failed"
    assert task.problem is not None
    assert task.problem.endswith("\nValueError: no such thing")
    _Resubmitted(lambda: None, None, minutes=1)()
    (task,) = array.poll()
    assert task.state == "done"
    for damage in ("{", "[]", "3", '{"other": 1}'):
        job.paths.result_pickle.with_suffix(".json").write_text(damage)
        assert array.poll()[0].state == "running"


def test_what_a_task_notes_does_not_follow_links(job: Job, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    job.paths.result_pickle.with_suffix(".json").symlink_to(victim)
    _note(None)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"ids": 3}', '{"ids": []}', '{"ids": [7]}', '{"ids": ["../x"]}']
)
def test_a_damaged_record_of_a_job_is_named(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a second job was submitted beside one that may still run."""
    pytest.importorskip("submitit")
    for command in ("srun", "sbatch", "squeue"):
        (tmp_path / command).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "job.json").write_text(record)
    with pytest.raises(EngineError, match=r"job\.json .*squeue --name graftlens-[0-9a-f]{8}`"):
        submit(print, tasks=1, folder=folder)
    assert (folder / "job.json").read_text() == record


def test_nobody_else_writes_where_tasks_read_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    folder.chmod(0o2777)
    engines._own(folder)
    assert folder.stat().st_mode & 0o7777 == 0o2755
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(EngineError, match=r"slurm belongs to another user, who could make"):
        engines._own(folder)


def test_the_record_of_a_job_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: `.job.json.tmp` was opened through a link that somebody had planted."""
    pytest.importorskip("submitit")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / ".job.json.tmp").symlink_to(victim)
    (folder / "job.json").symlink_to(victim)
    array = submit(print, tasks=1, folder=folder, cluster="local")
    array.cancel()
    assert victim.read_text() == "mine"
    assert json.loads((folder / "job.json").read_text())["ids"] == [array.job_id]
