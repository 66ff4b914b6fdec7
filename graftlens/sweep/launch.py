"""A sweep's workers in several processes: one for each device of a machine, or tasks on Slurm.

Each process is one `graftlens.sweep.runner.work`: it loads the models once and takes shards until
none is left. A process that dies costs only the shard that it was working on, which the others take
over.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from graftlens.engines import EngineError, Say, SlurmResources, Task, run_processes, submit
from graftlens.sweep.devices import check_devices
from graftlens.sweep.outcomesettings import OutcomeSettings
from graftlens.sweep.results import read_manifest
from graftlens.sweep.runner import is_done, is_finished, work


def launch_local(
    out: str | Path,
    devices: Sequence[str],
    *,
    measures: Sequence[str] = (),
    outcomes: OutcomeSettings | None = None,
    progress: bool = True,
    say: Say = print,
) -> None:
    """Run a prepared sweep to its end in one process per device.

    A process that dies is reported, and the others take its shard. Ctrl-C ends all of them; the
    same call continues from there.

    Args:
        out: folder of the sweep, as `prepare_sweep` left it.
        devices: as torch names them, such as ``cuda:0``; one that is named twice gets two
            processes. CPU processes share the cores, unless OMP_NUM_THREADS says otherwise.
        measures: where each process imports the user's own measures from (``module:name``).
        outcomes: as in `work`; a judge's key itself reaches the processes by the environment alone.
        progress: whether to show a bar of shards.
        say: called with each message.

    Raises:
        ConfigError: no device, one that does not exist here, or devices of several kinds.
        ValueError: a folder without a sweep.
        EngineError: the sweep is not finished because every process died.
    """
    out = Path(out).expanduser().resolve()
    check_devices(devices)
    names = _names(devices)
    with _Bar(out, progress, say) as bar:
        if not bar.finished():
            environment = {}
            if devices[0] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = str(max(1, _cores() // len(devices)))
            functions = {
                name: partial(
                    work,
                    out,
                    device=device,
                    measures=[*measures],
                    outcomes=outcomes,
                    progress=False,
                )
                for name, device in zip(names, devices, strict=True)
            }
            tasks = run_processes(functions, environment=environment, say=bar.say, watch=bar.watch)
            bar.watch(tasks)
            _check_finished(out, tasks)


def launch_slurm(
    out: str | Path,
    *,
    tasks: int,
    resources: SlurmResources | Mapping[str, Any] | None = None,
    measures: Sequence[str] = (),
    outcomes: OutcomeSettings | None = None,
    wait: bool = True,
    progress: bool = True,
    say: Say = print,
) -> None:
    """Run a prepared sweep in an array job on Slurm.

    A task that is preempted or runs out of time is requeued and goes on. If the folder's job is
    still waiting or running, no other is submitted. Ctrl-C ends the waiting, not the job.

    Args:
        out: folder of the sweep, as `prepare_sweep` left it, on a file system that the nodes share.
        tasks: number of workers.
        resources: what each gets, as in `SlurmResources`; a worker uses its first GPU.
        measures: where each worker imports the user's own measures from (``module:name``).
        outcomes: as in `work`; a judge's key itself reaches the workers by the job's environment.
        wait: whether to wait for the end of the sweep; otherwise the job is left running.
        progress: whether to show a bar of shards while waiting.
        say: called with each message.

    Raises:
        ConfigError: invalid resources or number of tasks.
        ValueError: a folder without a sweep.
        EngineError: submitit or Slurm is missing, Slurm refused the job, or the sweep is not
            finished because every task died.
    """
    out = Path(out).expanduser().resolve()
    with _Bar(out, progress and wait, say) as bar:
        if bar.finished():
            return
        array = submit(
            partial(work, out, measures=[*measures], outcomes=outcomes, progress=False),
            tasks=tasks,
            folder=out / "slurm",
            resources=resources,
            name="graftlens-sweep",
            saved=partial(shards_done, out),
        )
        bar.say(array.describe())
        if not wait:
            say("The same sweep command, run again, waits for it or reports its result.")
            return
        try:
            ended = array.wait(bar.watch)
        except KeyboardInterrupt:
            say(f"Slurm job {array.job_id} continues. To stop it: scancel {array.job_id}")
            raise
        if _is_complete(out) and not all(task.ended for task in ended):
            array.cancel()  # tasks that wait in the queue would find nothing to do
        else:
            _check_finished(out, ended)


def shards_done(out: Path) -> tuple[int, int]:
    """(finished shards, all shards) of a sweep's folder."""
    tables = read_manifest(out).tables
    paths = [table.path(out, shard) for table in tables for shard in range(len(table))]
    return sum(path.is_file() for path in paths), len(paths)


class _Bar:
    """Shows the shards that are done, and reports each failed task once."""

    def __init__(self, out: Path, progress: bool, say: Say) -> None:
        self._out, self._say = out, say
        done, total = shards_done(out)
        self._bar = tqdm(
            desc="sweep",
            unit="shard",
            total=total,
            initial=done,
            disable=not progress,
            mininterval=1.0,
            miniters=0,
        )
        self._failed: set[str] = set()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        self._bar.clear()
        self._say(text)
        self._bar.refresh()

    def finished(self) -> bool:
        if is_finished(self._out):
            self.say(f"{self._out} is finished: nothing to run.")
            return True
        return False

    def watch(self, tasks: Sequence[Task]) -> bool:
        """Whether the sweep is done."""
        done, _ = shards_done(self._out)
        states = [task.state for task in tasks]
        counts = {state: states.count(state) for state in ("running", "waiting", "failed")}
        self._bar.set_postfix({state: n for state, n in counts.items() if n}, refresh=False)
        self._bar.update(done - self._bar.n)
        for task in tasks:
            if task.state == "failed" and task.name not in self._failed:
                self._failed.add(task.name)
                left = any(not other.ended for other in tasks)
                self.say(
                    f"worker {task.name} {task.problem}"
                    + ("\nThe others will take its shard." if left else "")
                )
        return "running" not in states and _is_complete(self._out)


def _is_complete(out: Path) -> bool:
    """Whether a sweep is done and none of its shards has been removed since."""
    done, total = shards_done(out)
    return done == total and is_done(out)


def _check_finished(out: Path, tasks: Sequence[Task]) -> None:
    if is_finished(out):
        return
    done, total = shards_done(out)
    problems = [f"\nworker {task.name} {task.problem}" for task in tasks if task.state == "failed"]
    raise EngineError(
        f"{out} is not finished: {done} of {total} shards are done, and no worker is left. Fix "
        "what ended the workers and run the same command again; it computes only what is missing."
        + "".join(problems)
    )


def _names(devices: Sequence[str]) -> list[str]:
    """A name for each process."""
    return [
        device if devices.count(device) == 1 else f"{device} #{devices[:i].count(device) + 1}"
        for i, device in enumerate(devices)
    ]


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
