"""Kills, full disks and other processes: the results are those of an undisturbed run, every bit."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from sweeps import (
    FAILED,
    Processes,
    assert_equal_tables,
    assert_part_of,
    checkpoints,
    config,
    kill_at_random_moments,
    read_whole,
    unfinished_files,
)
from waiting import until

from graftlens.sweep.disk import FolderError
from graftlens.sweep.results import read_manifest
from graftlens.sweep.runner import is_done, run_sweep

KILLS = 100  # at random moments
IN_A_SHARD = 53  # the disk operation that is the writing of the second shard

Config = dict[str, object]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and the processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config(checkpoints(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(
    processes: Processes, given: Config, tmp_path_factory: pytest.TempPathFactory
) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert processes.run(given, out) == 0
    table = read_whole(out)
    assert len(table) == 12 * 7
    assert table["reason"].notna().sum() == 11, "the graft of a span that eleven prompts lack"
    return table


@pytest.fixture(scope="module")
def few(given: Config) -> Config:
    """The same sweep in two shards."""
    return given | {"shards": 48}


@pytest.fixture(scope="module")
def undisturbed_few(
    processes: Processes, few: Config, tmp_path_factory: pytest.TempPathFactory
) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("few") / "out"
    assert processes.run(few, out) == 0
    return read_whole(out)


def _assert_whole(out: Path, undisturbed: pd.DataFrame) -> None:
    assert is_done(out)
    assert_equal_tables(read_whole(out), undisturbed)
    assert unfinished_files(out) == []


@pytest.mark.slow
def test_killed_at_random_moments(
    processes: Processes, given: Config, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    """A reader looks in all the time."""
    folders, seen = kill_at_random_moments(
        processes,
        given,
        tmp_path,
        lambda out: assert_part_of(out, undisturbed),
        kills=KILLS,
        seed=0,
    )
    for out in folders:
        _assert_whole(out, undisturbed)
    assert len(folders) >= 3
    assert len(seen) > 3, f"kills should leave sweeps in many states, not only {seen}"


@pytest.mark.slow
def test_killed_at_every_disk_operation(
    processes: Processes, few: Config, undisturbed_few: pd.DataFrame, tmp_path: Path
) -> None:
    """A process that is killed within the k-th write, fsync or rename, for every k."""
    for at in itertools.count(1):
        out = tmp_path / f"out{at}"
        if processes.run(few, out, fault="SIGKILL", at=at, trust=False) == 0:
            break
        assert_part_of(out, undisturbed_few)
        assert processes.run(few, out, trust=False) == 0
        _assert_whole(out, undisturbed_few)
        shutil.rmtree(out)
    assert at > 40, "the claim, the shards and the end are all of several operations"


@pytest.mark.slow
def test_an_error_at_every_disk_operation(
    processes: Processes, few: Config, undisturbed_few: pd.DataFrame, tmp_path: Path
) -> None:
    """Every write, fsync and rename fails once: one clear error, and the same call completes."""
    for at in itertools.count(1):
        out = tmp_path / f"out{at}"
        fault = ("ENOSPC", "EIO")[at % 2]
        code = processes.run(few, out, fault=fault, at=at, trust=False)
        if code == 0:
            break
        assert code == FAILED
        problem = processes.said(out)
        assert f"the sweep's folder {out} cannot be written" in problem
        assert os.strerror(getattr(errno, fault)) in problem
        assert "run the same command again" in problem
        assert ("Free space" in problem) == (fault == "ENOSPC")
        assert unfinished_files(out) == [], "what could not be written is taken away"
        assert_part_of(out, undisturbed_few)
        assert processes.run(few, out, trust=False) == 0
        _assert_whole(out, undisturbed_few)
        shutil.rmtree(out)
    assert at > 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)],
            capture_output=True,
            text=True,
        )
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        why = mounted.stderr.strip() if mounted else "there is no mount command"
        pytest.skip(f"a full disk needs a small one, and it cannot be mounted: {why}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("free", [0, 8, 24, 40])
def test_a_full_disk(
    free: int, processes: Processes, given: Config, undisturbed: pd.DataFrame, small_disk: Path
) -> None:
    """With `free` kB left."""
    out = small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 1024 * free))
    assert processes.run(given, out, trust=False) == FAILED
    assert f"folder {out} cannot be written ([Errno 28] No space left" in processes.said(out)
    assert "Free space there and run the same command again" in processes.said(out)
    assert unfinished_files(small_disk) == []
    assert_part_of(out, undisturbed)
    filler.unlink()
    assert processes.run(given, out, trust=False) == 0
    _assert_whole(out, undisturbed)


def test_a_disk_that_cannot_be_written(
    processes: Processes, given: Config, undisturbed: pd.DataFrame, small_disk: Path
) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    out = small_disk / "out"
    remount("ro")
    with pytest.raises(FolderError, match=r"cannot be written .*Read-only.*Make sure that the"):
        run_sweep(given, out, progress=False)
    remount("rw")
    assert processes.run(given, out, trust=False) == 0
    remount("ro")
    said: list[str] = []
    run_sweep(given, out, progress=False, say=said.append)
    assert f"{out} is finished: nothing to run." in said, "a finished sweep needs no writing"
    _assert_whole(out, undisturbed)
    remount("rw")


def test_a_folder_that_cannot_be(given: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"folder .*file/out cannot be written .*Not a directory"):
        run_sweep(given, tmp_path / "file" / "out", progress=False)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_folder(
    count: int, processes: Processes, given: Config, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pids = [processes.start(given, out) for _ in range(count)]
    while any(processes.ended(pid) is None for pid in pids):
        assert_part_of(out, undisturbed)
    assert [processes.ended(pid) for pid in pids] == [0] * count, processes.said(out)
    _assert_whole(out, undisturbed)


def test_processes_with_other_configs_do_not_mix(
    processes: Processes, given: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pids = [processes.start(given | {"seed": seed}, out, trust=False) for seed in (0, 1, 2, 3)]
    codes = [processes.wait(pid) for pid in pids]
    assert sorted(codes) == [0, 1, 1, 1]
    assert processes.said(out).count(f"{out} holds another sweep:\n  seed: ") == 3
    assert is_done(out)
    assert read_manifest(out).config["seed"] == codes.index(0)


@pytest.mark.slow
@pytest.mark.parametrize("at", [40, 44, 48, 54, 60])
def test_a_process_that_dies_leaves_its_shard_to_the_others(
    at: int, processes: Processes, given: Config, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    victim = processes.start(given, out, fault="SIGKILL", at=at)
    others = [processes.start(given, out) for _ in range(2)]
    assert [processes.wait(pid) for pid in others] == [0, 0], processes.said(out)
    assert processes.wait(victim) in (0, -signal.SIGKILL)
    _assert_whole(out, undisturbed)


def test_a_held_shard_is_waited_for_and_taken_over(
    processes: Processes, given: Config, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    """One process is stopped while it writes a shard; the other does all the rest, waits, and takes
    the shard when the first is killed."""
    out = tmp_path / "out"
    first = processes.start(given, out, fault="SIGSTOP", at=IN_A_SHARD)
    shards = out / "shards"

    def until_in(pid: int, happened: Callable[[], object]) -> None:
        until(lambda: happened() or processes.ended(pid) is not None, lambda: processes.said(out))
        assert happened(), processes.said(out)

    def half() -> list[str]:
        return [name for name in unfinished_files(shards) if name.startswith(".00001")]

    until_in(first, half)
    others = read_manifest(out).shards - 1
    assert others > 3
    second = processes.start(given, out)
    until_in(second, lambda: "waiting for other processes" in processes.said(out))
    assert len(list(shards.glob("*.parquet"))) == others, "the last one is held"
    assert half(), "by a process that is stopped"
    assert processes.ended(second) is None, "and waited for"
    assert processes.kill(first) == -signal.SIGKILL
    assert processes.wait(second) == 0, processes.said(out)
    assert "waiting for other processes: 1 of 6 shards" in processes.said(out)
    _assert_whole(out, undisturbed)
