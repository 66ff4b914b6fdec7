"""Engines that run functions: processes of this machine, or an array job on Slurm.

Nothing here knows what the functions do. It must be possible to kill a process at any instant
and have another one continue: that is what makes requeueing safe.
"""

import hashlib
import json
import os
import pickle
import queue
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graftlens.configfile import ConfigError, settings_from
from graftlens.data.settings import Settings
from graftlens.folder import read_json, write_whole

Say = Callable[[str], None]

#: Most tasks of one array job; Slurm's own limit (MaxArraySize) is rarely higher.
MAX_TASKS = 10_000

#: Called now and then with the state of the tasks; True ends the waiting.
Watch = Callable[[Sequence["Task"]], bool | None]

#: Lines of a failed task's log that are shown.
TAIL = 15
#: Seconds that a process gets to end on its own.
GRACE = 8.0
#: Seconds after which a task without a result, which Slurm no longer knows, counts as dead: a
#: result may appear late on a network file system.
LATE = 5.0
#: The file that says which job runs in a folder.
RECORD = "job.json"
#: Time-outs of one task after which submitit would give up; a job that makes progress is not
#: limited.
TIMEOUTS = 1_000_000

# A task in one of these may still run; in any other, it has ended.
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
_RUNNING |= {"PREEMPTED"}  # it is requeued, or Slurm forgets it after a while


class EngineError(RuntimeError):
    """An engine is missing, refused a job, or its tasks failed."""


@dataclass(frozen=True)
class Task:
    """The state of one process, or of one task of an array job.

    Attributes:
        name: the device of a process, the id of a task.
        state: waiting (or requeued), running, done, or failed.
        problem: for a failed one, what happened and the last lines that it wrote.
    """

    name: str
    state: Literal["waiting", "running", "done", "failed"]
    problem: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")


# -- processes of this machine -----------------------------------------------------------------

# The parent's end of standard input is what keeps a child alive: however the parent ends, its
# children do too.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from graftlens.engines import _child; _child()"
)


def run_processes(
    functions: Mapping[str, Callable[[], object]],
    *,
    environment: Mapping[str, str] | None = None,
    say: Say = print,
    watch: Watch | None = None,
) -> tuple[Task, ...]:
    """Run each function in a new process, all at once, until the last one ends.

    What a process writes is passed on line by line, with its name in front. Whatever ends this call
    (Ctrl-C, an error, a kill) ends the processes.

    Args:
        functions: by name; each can be pickled (a function of a module, a `functools.partial`).
        environment: variables that the processes get besides this process's own.
        say: where lines go.
        watch: called a few times a second.

    Returns:
        How each ended, in the order given.
    """
    lines: queue.Queue[tuple[str, str]] = queue.Queue()
    last: dict[str, deque[str]] = {name: deque(maxlen=TAIL) for name in functions}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    readers: dict[str, threading.Thread] = {}

    def tell() -> None:
        while not lines.empty():
            name, line = lines.get()
            last[name].append(line)
            say(f"[{name}] {line}")

    def stand(name: str) -> Task:
        code = processes[name].poll()
        if code is None:
            return Task(name, "running")
        readers[name].join(1.0)  # for its last lines
        tell()
        if code == 0:
            return Task(name, "done")
        return Task(name, "failed", "\n".join([_death(code), *last[name]]))

    try:
        for name, function in functions.items():
            processes[name] = _start(function, environment or {})
            reader = threading.Thread(
                target=_read, args=(name, processes[name], lines), daemon=True
            )
            reader.start()
            readers[name] = reader
        while True:
            tasks = tuple(stand(name) for name in functions)
            tell()
            if (watch is not None and watch(tasks)) or all(task.ended for task in tasks):
                return tuple(map(stand, functions))
            time.sleep(0.2)
    finally:
        _stop(processes.values())
        tell()


def _start(
    function: Callable[[], object], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C at the terminal reaches this process alone
    )
    assert process.stdin is not None
    try:
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps(function))
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once, as its exit code shows
    return process


def _child() -> None:
    """What a process runs: the function, until it returns or the parent is gone."""
    # A command that a script starts with `&` ignores Ctrl-C, and so would its processes: but this
    # is how they are told to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        function()
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    while os.read(0, 1024):  # nothing more is written, so this ends with the pipe
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE / 2)
    os._exit(130)


def _read(
    name: str, process: subprocess.Popen[bytes], lines: "queue.Queue[tuple[str, str]]"
) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put((name, line.decode(errors="replace").rstrip()))


def _stop(processes: Any) -> None:
    """End what is still running: gently first, and by force after a while."""
    alive = [process for process in processes if process.poll() is None]
    try:
        for process in alive:
            process.stdin.close()
        until = time.monotonic() + GRACE
        for process in alive:
            process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in alive:
            process.kill()
            process.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (often because it ran out of memory)" if code == -9 else "")


# -- Slurm -------------------------------------------------------------------------------------

# Starts a task's Python with the signal to requeue held back: it would kill a task that has not yet
# reached the code where submitit handles it. The task then unblocks it.
_HELD_BACK = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class SlurmResources(Settings):
    """What each task of an array job gets, in submitit's names."""

    timeout_min: Annotated[int, Field(ge=1)] = 60
    """Minutes that a task may run; one that needs more is requeued and continues."""

    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """CPU cores of a task."""

    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a task. A worker uses one."""

    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a task, in GB."""

    slurm_partition: str | None = None
    """Partition (queue) to run in."""

    slurm_account: str | None = None
    """Account to charge."""

    slurm_qos: str | None = None
    """Quality of service."""

    slurm_constraint: str | None = None
    """Features that a node must have."""

    slurm_gres: str | None = None
    """Generic resources, such as ``gpu:a100:1``."""

    slurm_nodelist: str | None = None
    """Nodes to run on."""

    slurm_exclude: str | None = None
    """Nodes not to run on."""

    slurm_comment: str | None = None
    """A comment that Slurm keeps with the job."""

    slurm_mem_per_cpu: str | None = None
    """Memory of each core, such as ``4GB``."""

    slurm_mem_per_gpu: str | None = None
    """Memory for each GPU, such as ``40GB``."""

    slurm_signal_delay_s: Annotated[int, Field(ge=1)] = 90
    """How many seconds before its time is up a task is told to requeue itself."""

    slurm_array_parallelism: Annotated[int, Field(ge=1)] | None = None
    """Most tasks that run at once."""

    slurm_setup: tuple[str, ...] | None = None
    """Shell commands that a task runs first, such as ``module load cuda``."""

    slurm_srun_args: tuple[str, ...] | None = None
    """Arguments for srun."""

    slurm_additional_parameters: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Any other option of sbatch, by its long name."""

    @model_validator(mode="after")
    def _time_to_requeue(self) -> "SlurmResources":
        if self.slurm_signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"slurm_signal_delay_s={self.slurm_signal_delay_s} with timeout_min="
                f"{self.timeout_min}: each task would be told to requeue itself as soon as it "
                f"starts. Set slurm_signal_delay_s below {60 * self.timeout_min}."
            )
        owned = {"array", "job-name", "output", "error", "signal", "requeue", "time", "open-mode"}
        given = {name.replace("_", "-") for name in self.slurm_additional_parameters}
        if taken := sorted(given & owned):
            raise ValueError(
                f"slurm_additional_parameters: {', '.join(taken)} cannot be set, because "
                "requeueing depends on it. Leave it out (time is timeout_min, signal is "
                "slurm_signal_delay_s)."
            )
        return self


class Array:
    """An array job: tasks that run one function each, on a cluster.

    Attributes:
        job_id: Slurm's id of the job.
        folder: where its logs are, and the pickles that its tasks read.
    """

    def __init__(
        self, jobs: Sequence[Any], folder: Path, name: str, *, cluster: str, joined: bool
    ) -> None:
        self.job_id = str(jobs[0].job_id).split("_")[0]
        self.folder = folder
        self.joined = joined
        self._jobs = jobs
        self._name = name
        self._cluster = cluster
        self._states: dict[str, tuple[str, str]] = {}
        self._since: dict[str, float] = {}  # when a task was first seen ended without a result

    def describe(self) -> str:
        """What the job is, and how to inspect it, stop it, and read its logs."""
        what = "is already running" if self.joined else f"of {len(self._jobs)} task(s) is submitted"
        return (
            f"Slurm job {self.job_id} {what}. To inspect it: squeue -j {self.job_id}; to stop it: "
            f"scancel {self.job_id}; logs: {self.folder}/{self.job_id}_*_log.err"
        )

    def poll(self) -> tuple[Task, ...]:
        """The state of the tasks now."""
        if self._cluster == "slurm":
            self._states = _queue(self.job_id, self._name, self._states)
        else:
            self._states = {str(job.job_id): (_local(job), "") for job in self._jobs}
        return tuple(map(self._stand, self._jobs))

    def wait(
        self, watch: Watch | None = None, *, first_s: float = 1.0, longest_s: float = 20.0
    ) -> tuple[Task, ...]:
        """Wait until every task has ended, or `watch` returns true.

        Args:
            watch: called each time that the queue is checked.
            first_s: seconds between the first checks; the interval grows with the time waited.
            longest_s: most seconds between two checks.
        """
        began = time.monotonic()
        while True:
            tasks = self.poll()
            if (watch is not None and watch(tasks)) or all(task.ended for task in tasks):
                return tasks
            time.sleep(min(longest_s, max(first_s, (time.monotonic() - began) / 30)))

    def cancel(self) -> None:
        """Stop every task, and remove waiting ones from the queue."""
        for job in self._jobs:
            job.cancel(check=False)

    def _stand(self, job: Any) -> Task:
        name = str(job.job_id)
        outcome = _outcome(job)
        if outcome == "":
            return Task(name, "done")
        # An error counts only when Slurm runs the task no more: a task that has itself requeued is
        # killed by that, often before it knows that it succeeded.
        state, reason = self._states.get(name, ("", ""))
        if state in _WAITING | _RUNNING:
            self._since.pop(name, None)
            return Task(name, "waiting" if state in _WAITING else "running")
        if outcome is not None:
            return Task(name, "failed", self._problem(job, "ended with an error", outcome))
        if time.monotonic() - self._since.setdefault(name, time.monotonic()) < LATE:
            return Task(name, "running")
        said = ", ".join(filter(None, (state, reason))) or "nothing about it any more"
        words = f"died without a result (the queue says {said})"
        return Task(name, "failed", self._problem(job, words, None))

    def _problem(self, job: Any, words: str, trace: str | None) -> str:
        text = (
            trace if trace is not None else (_read_text(job.paths.stderr) or "it wrote no output")
        )
        lines = [line for line in text.splitlines() if line.strip()][-TAIL:]
        return "\n".join([f"{words}; its log is {job.paths.stderr}, and ends:", *lines])


def submit(
    function: Callable[[], object],
    *,
    tasks: int,
    folder: Path,
    resources: SlurmResources | Mapping[str, Any] | None = None,
    name: str = "graftlens",
    saved: Callable[[], object] | None = None,
    cluster: Literal["slurm", "local"] = "slurm",
) -> Array:
    """Submit an array job whose tasks each run the function.

    A task that is preempted, or whose time is up, is requeued and runs the function again, as
    often as needed. A task that is killed or fails is not. If the folder's last job is still
    waiting or running, it is joined, and nothing is submitted.

    Args:
        function: can be pickled (a function of a module, a `functools.partial` of it); its return
            value is dropped.
        tasks: number of tasks.
        folder: for logs and pickles, on a file system that the nodes share.
        resources: what each task gets; a mapping is checked.
        name: of the job, as the queue shows it.
        saved: how much of the work is saved, as a value that can be compared; a task whose time is
            up without a change to it fails, since it would start over forever.
        cluster: ``local`` is submitit's imitation of Slurm on this machine.

    Raises:
        ConfigError: invalid resources; the message names everything that is wrong.
        EngineError: submitit or Slurm is missing, Slurm refused the job, or the folder belongs to
            another user or holds a damaged record of its job.
    """
    resources = check_submission(tasks, resources, cluster=cluster)
    submitit = _submitit()
    folder = folder.resolve()
    name = f"{name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"
    if cluster == "slurm" and (joined := _join(folder, name)) is not None:
        return joined
    folder.mkdir(parents=True, exist_ok=True)
    _own(folder)
    executor = submitit.AutoExecutor(
        folder,
        cluster=cluster,
        slurm_max_num_timeout=TIMEOUTS,
        slurm_python=f"{shlex.quote(sys.executable)} -c {shlex.quote(_HELD_BACK)}",
    )
    given = resources.model_dump(exclude_none=True)
    given |= {key: list(value) for key, value in given.items() if isinstance(value, tuple)}
    given["slurm_additional_parameters"] |= {"requeue": True}
    if (cores := resources.cpus_per_task) is not None:
        # srun does not pass on what sbatch was given (since 22.05), and torch would start as many
        # threads as the node has cores.
        threads = f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cores}}}"
        given["slurm_setup"] = [
            f"export SRUN_CPUS_PER_TASK={cores}",
            threads,
            *given.get("slurm_setup", ()),
        ]
    executor.update_parameters(name=name, **given)
    task = _Resubmitted(function, saved, resources.timeout_min)
    try:
        with executor.batch():
            jobs = [executor.submit(task) for _ in range(tasks)]
    except submitit.core.utils.FailedJobError as error:
        why = str(error).strip().splitlines()
        raise EngineError(
            f"sbatch refused the job: {why[-1] if why else 'it gave no reason'}. Check the "
            "Slurm resources: partitions, accounts, time limits and memory differ between clusters."
        ) from None
    record = json.dumps({"ids": [str(job.job_id) for job in jobs], "name": name})
    write_whole(folder / RECORD, record)
    return Array(jobs, folder, name, cluster=cluster, joined=False)


def check_submission(
    tasks: int,
    resources: SlurmResources | Mapping[str, Any] | None = None,
    *,
    cluster: Literal["slurm", "local"] = "slurm",
) -> SlurmResources:
    """Refuse what `submit` would refuse, before anything is written; returns the resources.

    Raises:
        ConfigError: invalid resources or number of tasks.
        EngineError: submitit or Slurm is missing.
    """
    if tasks < 1:
        raise ConfigError(("tasks", f"{tasks} is not a number of tasks. Give 1 or more."))
    if tasks > MAX_TASKS:
        raise ConfigError(("tasks", f"{tasks} tasks: an array job has at most {MAX_TASKS:,}."))
    if not isinstance(resources, SlurmResources):
        try:
            resources = settings_from(SlurmResources, resources or {})
        except ConfigError as error:
            raise error.under("slurm") from None
    _submitit()
    if cluster == "slurm" and any(shutil.which(c) is None for c in ("srun", "sbatch", "squeue")):
        raise EngineError(
            "Slurm was not found: srun, sbatch and squeue are not all on the PATH. Run this on "
            "a machine that submits jobs to the cluster, or choose the local launcher."
        )
    return resources


def _own(folder: Path) -> None:
    """Let nobody else write where the tasks read pickles: unpickling can run code.

    Raises:
        EngineError: the folder belongs to another user.
    """
    if os.name != "posix":
        return
    state = folder.stat()
    if state.st_uid != os.geteuid():
        raise EngineError(
            f"{folder} belongs to another user, who could make the job's tasks run any code. "
            "Choose an output folder of your own."
        )
    if state.st_mode & 0o022:
        folder.chmod(stat.S_IMODE(state.st_mode) & ~0o022)


class _Resubmitted:
    """A function whose task, told that its time is up, asks submitit to run it again."""

    def __init__(
        self, function: Callable[[], object], saved: Callable[[], object] | None, minutes: int
    ) -> None:
        self.function = function
        self.saved = saved
        self.minutes = minutes

    def __call__(self) -> None:
        _forget()
        try:
            self.began = time.monotonic()
            self.before = self.saved() if self.saved is not None else None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
            self.function()
        except Exception:
            _note(traceback.format_exc())
            raise
        _note(None)

    def checkpoint(self) -> Any:
        """What submitit runs next time; called in the task, by the signal handler."""
        minutes = (time.monotonic() - self.began) / 60
        # A task that is preempted early had no time to save anything.
        if self.saved is not None and minutes > self.minutes / 2 and self.saved() == self.before:
            raise EngineError(
                f"in {minutes:.0f} minutes this task saved nothing, so it would start over "
                f"forever. Raise timeout_min (now {self.minutes}), or save more often."
            )
        submitit = _submitit()
        # Left by a process that was killed while writing it; submitit would refuse to continue.
        pickled = submitit.JobEnvironment().paths.submitted_pickle
        pickled.with_suffix(pickled.suffix + ".save_tmp").unlink(missing_ok=True)
        return submitit.helpers.DelayedSubmission(self)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise EngineError(
            "Slurm jobs are submitted with submitit, which is not installed. Run "
            'pip install "graftlens[slurm]".'
        ) from None
    return submitit


def _join(folder: Path, name: str) -> Array | None:
    """The folder's last job, if any of its tasks is still waiting or running.

    Raises:
        EngineError: its record is damaged.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return None
    advice = (
        f"It records which job runs here: see `squeue --name {name}`. If there is none, remove "
        "that file and run the same command again."
    )
    try:
        record = read_json(path, advice)
    except ValueError as error:
        raise EngineError(str(error)) from None
    ids = record.get("ids") if isinstance(record, dict) else None
    if not (
        isinstance(ids, list)
        and ids
        and all(isinstance(one, str) and re.fullmatch(r"[0-9]+(?:_[0-9]+)?", one) for one in ids)
    ):
        raise EngineError(f"{path} is damaged: it lists no jobs. {advice}")
    jobs = [_submitit().SlurmJob(folder=folder, job_id=job_id) for job_id in ids]
    array = Array(jobs, folder, name, cluster="slurm", joined=True)
    states = _queue(array.job_id, name, {})
    alive = any(states.get(job_id, ("",))[0] in _WAITING | _RUNNING for job_id in ids)
    return array if alive else None


def _queue(
    job_id: str, name: str, before: dict[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """Task id -> (state, reason), of the tasks that Slurm knows; what it said `before` if it does
    not answer. Not every cluster keeps accounting data (sacct), but each has a queue."""
    command = ["squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%i|%T|%r|%j"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return before
    if answer.returncode != 0:
        return {} if "Invalid job id" in answer.stderr else before
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    # Another cluster's job may have the same number; the name tells them apart.
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 4 and row[3] == name}


def _local(job: Any) -> str:
    return "RUNNING" if job.state == "RUNNING" else "FAILED"


def _note(problem: str | None) -> None:
    """In a task, record how it ended, as text: submitit's own pickles can run code and are never
    read here. Outside a task, do nothing."""
    try:
        paths = _submitit().JobEnvironment().paths
    except RuntimeError:
        return
    write_whole(_noted(paths), json.dumps({"problem": problem}))


def _forget() -> None:
    """In a task, remove the record of an earlier turn, which was cut short by being requeued."""
    try:
        _noted(_submitit().JobEnvironment().paths).unlink(missing_ok=True)
    except RuntimeError:
        return


def _noted(paths: Any) -> Path:
    """The file in which a task records how it ended."""
    return Path(paths.result_pickle.with_suffix(".json"))


def _outcome(job: Any) -> str | None:
    """The traceback of a task that has ended, empty if it ended well; None for any other."""
    try:
        list(job.paths.folder.iterdir())  # makes a network file system refresh its view
        noted = json.loads(_noted(job.paths).read_text(encoding="utf-8"))
        problem = noted["problem"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return "" if problem is None else str(problem)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
