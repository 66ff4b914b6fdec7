"""A small sweep, and processes that run it and can be killed at any moment.

Run as a program, this file is the process that the others are forked from: it has imported all that
a sweep needs, so that each start takes no longer than the sweep itself.
"""

import contextlib
import errno
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from waiting import until

TEMPLATES = {
    "plays": "{first_entity} plays with",
    "long": "In a film of last year, {first_entity} was seen next to",
    "short": "{first_entity} and",
}
PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.", "Siobhán")
GRAFTS = {
    "PRE": "none",
    "SFT": "sft @ all",
    "FE": "sft @ first_entity",
    "LT": "sft @ last",
    "o at LT": "sft @ last : o : 1-2",
    "two": "sft @ bos | sft @ last : q : 0 : 1",
}
FAILED = 3  # the exit code of a process whose folder could not be written


def checkpoints(folder: Path, seed: int = 1) -> dict[str, str]:
    """Two tiny checkpoints with a tokenizer."""
    from families import save_checkpoint, tiny_pair
    from toytokenizers import llama3_style

    tokenizer = llama3_style()
    pair = tiny_pair("llama", seed, vocab_size=len(tokenizer))
    return {n: str(save_checkpoint(m, folder / n, tokenizer)) for n, m in pair.items()}


def config(sources: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """The content of a sweep's config: 12 prompts, of which one has a title, under 7 grafts, in 6
    shards of 2 prompts under all grafts."""
    prompts: list[dict[str, Any]] = [
        {
            "template": text,
            "fields": {"first_entity": person},
            "answer": " Mara Finn",
            "distractors": ["!", " Mara", " the film"],
            "name": name,
        }
        for name, text in TEMPLATES.items()
        for person in PEOPLE
    ]
    prompts[2]["template"] += " {title} and"
    prompts[2]["fields"] |= {"title": "It"}
    return {
        "sources": dict(sources),
        "prompts": prompts,
        "grafts": GRAFTS | {"T": "sft @ title"},
        "metrics": {"top_k": 3},
        "shards": 16,
        **changes,
    }


def read_whole(out: Path) -> pd.DataFrame:
    """The results, in a form whose every bit can be compared."""
    from graftlens.sweep.results import read_results

    table = read_results(out)
    for column in ("top_tokens", "top_probs", "distractor_logprobs"):
        values = [None if v is None else tuple(v) for v in table[column]]
        table[column] = pd.Series(values, dtype=object)
    return table


def assert_equal_tables(table: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(table, expected, check_exact=True, check_categorical=True)


def assert_part_of(
    out: Path,
    expected: pd.DataFrame,
    read: Callable[[Path], pd.DataFrame] = read_whole,
    rows: Sequence[str] = ("prompt", "graft"),
) -> int:
    """What a reader sees now is rows of the whole, none twice; how many.

    Args:
        out: the sweep's folder.
        expected: the whole.
        read: reads what is there; columns that it does not have yet are not compared.
        rows: the columns that tell rows apart.
    """
    if not (out / "sweep.json").is_file():
        return 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*is not finished: \d+ of \d+ shards are done")
        table = read(out)
    keys, known = (one.set_index([*rows]).index for one in (table, expected))
    assert not keys.has_duplicates
    assert_equal_tables(table, expected[known.isin(keys)].reset_index(drop=True)[[*table]])
    return len(table)


def unfinished_files(out: Path) -> list[str]:
    """Names of files that some write left half done."""
    return [path.name for path in out.rglob("*.tmp")]


class Faults:
    """Something happens at the k-th thing that is asked of the disk, counted from 1.

    Asked are: the making of a file (once it is there), its writing (half of it is written), fsync
    of file or folder, and rename (just before it, and once it is done).
    """

    def __init__(self, at: int, strike: Any) -> None:
        self.at, self.strike, self.asked = at, strike, 0

    def _count(self) -> None:
        self.asked += 1
        if self.asked == self.at:
            self.strike()

    @contextlib.contextmanager
    def installed(self) -> Iterator["Faults"]:
        replace, fsync, opener, wrap = os.replace, os.fsync, os.open, os.fdopen
        faults = self
        halves: set[int] = set()

        class Half:
            """A file whose writing can fail half-way."""

            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, content: bytes) -> int:
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                faults._count()
                return len(content) // 2 + self.file.write(content[len(content) // 2 :])

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> "Half":
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.close()

        def faulty_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            handle = opener(path, flags, *args, **kwargs)
            if str(path).endswith(".tmp"):
                halves.add(handle)
                try:
                    faults._count()
                except OSError:
                    os.close(handle)
                    Path(path).unlink()  # as if it had not been made
                    raise
            return handle

        def faulty_fdopen(handle: int, *args: Any, **kwargs: Any) -> Any:
            file = wrap(handle, *args, **kwargs)
            if handle not in halves:
                return file
            halves.remove(handle)
            return Half(file)

        def faulty_replace(*args: Any, **kwargs: Any) -> None:
            faults._count()
            replace(*args, **kwargs)
            faults._count()

        def faulty_fsync(handle: int) -> None:
            faults._count()
            fsync(handle)

        os.replace, os.fsync = faulty_replace, faulty_fsync  # type: ignore[assignment]
        os.open, os.fdopen = faulty_open, faulty_fdopen
        try:
            yield self
        finally:
            os.replace, os.fsync, os.open, os.fdopen = replace, fsync, opener, wrap


def _strike(fault: str) -> None:
    """Die or stop, or fail as the disk would: `SIGKILL`, `SIGSTOP`, `ENOSPC`, `EIO`."""
    if fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
    else:
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number))


class Processes:
    """Starts sweeps in processes of their own, forked from one that has imported everything."""

    def __init__(self) -> None:
        self._logs = tempfile.TemporaryDirectory()  # the sweeps' own disk may be full
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=Path(__file__).parent,
        )
        assert self._ask({}) == "ready"

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, config: Any, out: Path, *, fault: str = "", at: int = 0, trust: bool = True
    ) -> int:
        """The process id. With a `fault` (see `_strike`) it meets that `at` a disk operation;
        without `trust` the trust report is not computed."""
        job = {"config": config, "out": str(out), "fault": fault, "at": at, "trust": trust}
        job["log"] = str(self._log(out))
        return int(self._ask({"start": job}))

    def said(self, out: Path) -> str:
        """What the processes of a folder have said."""
        return self._log(out).read_text()

    def _log(self, out: Path) -> Path:
        return Path(self._logs.name) / str(out).replace(os.sep, "_")

    def ended(self, pid: int) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        code = self._ask({"ended": pid})
        assert code is None or isinstance(code, int)
        return code

    def wait(self, pid: int) -> int:
        """The exit code, once it has ended."""
        until(lambda: self.ended(pid) is not None, lambda: f"process {pid} does not end")
        code = self.ended(pid)
        assert code is not None
        return code

    def run(self, config: Any, out: Path, **options: Any) -> int:
        """Start and wait: the exit code, which is `FAILED` for a folder that cannot be written."""
        code = self.wait(self.start(config, out, **options))
        assert code in (0, FAILED, -signal.SIGKILL), self.said(out)
        return code

    def kill(self, pid: int) -> int:
        if self.ended(pid) is None:
            os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._logs.cleanup()


def processor_seconds(pid: int) -> float:
    """What a process that was not yet asked for its exit code has used."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def kill_at_random_moments(
    processes: Processes,
    given: Any,
    folder: Path,
    look: Callable[[Path], int],
    *,
    kills: int,
    seed: int,
) -> tuple[list[Path], set[int]]:
    """kill -9 from outside, at random moments of the whole run, until the sweep is done in spite of
    it, in folder after folder.

    Args:
        processes: start the sweeps.
        given: the sweep's config.
        folder: where folders of sweeps are made.
        look: checks what a reader sees in a folder, all the time, and says how much that is.
        kills: how many there are at least.
        seed: of the moments.

    Returns:
        The folders, each run to its end, and what was seen.
    """
    whole = 0.0  # seconds of a processor, which a busy machine leaves as they are
    for name in ("warm", "timed"):
        pid = processes.start(given, folder / name)
        while processes.ended(pid) is None:
            whole = processor_seconds(pid)
            time.sleep(0.002)
        assert processes.wait(pid) == 0, processes.said(folder / name)
    from graftlens.sweep.runner import is_done

    rng = random.Random(seed)
    killed, folders, seen = 0, list[Path](), set[int]()
    while killed < kills:
        out = folder / f"out{len(folders)}"
        folders.append(out)
        while not is_done(out):
            # Some at once, most within the time that what is left may take.
            delay = rng.choice([0.02, 0.3, 1.0]) * rng.random() * whole
            pid = processes.start(given, out)
            while processor_seconds(pid) < delay and processes.ended(pid) is None:
                seen.add(look(out))
            code = processes.kill(pid)
            assert code in (0, -signal.SIGKILL), processes.said(out)
            killed += code == -signal.SIGKILL
            seen.add(look(out))
        assert processes.run(given, out) == 0
    return folders, seen


def _serve() -> None:
    import torch

    import graftlens.sweep.runner  # noqa: F401

    torch.set_num_threads(1)
    codes: dict[int, int] = {}
    used: Path | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = "ready"
        if "start" in request:
            if used is not None and used.exists():
                # What the first child imported while it ran, the others need not import again.
                for name in used.read_text().split():
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
                used = None
            elif not codes:
                used = Path(request["start"]["log"]).with_name("modules")
            answer = os.fork()
            if answer == 0:
                _sweep(request["start"])
        elif "ended" in request:
            pid = request["ended"]
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


def _sweep(job: Mapping[str, Any]) -> None:
    """In a child: run and exit."""
    from graftlens.sweep import runner
    from graftlens.sweep.disk import FolderError

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    if not job["trust"]:
        runner.trust_report = lambda *args, **kwargs: NoReport()
        runner.check_texts = lambda *args, **kwargs: NoReport()
    try:
        faults = Faults(job["at"], lambda: _strike(job["fault"]))
        with faults.installed() if job["fault"] else contextlib.nullcontext():
            runner.run_sweep(job["config"], Path(job["out"]), progress=False)
        code = 0
        Path(job["log"]).with_name("modules").write_text("\n".join(sys.modules))
    except FolderError as error:
        print(error)
        code = FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class NoReport:
    """Stands in for a trust report, which takes longer than the small sweep itself."""

    ok = True

    def to_dict(self) -> dict[str, Any]:
        return {}

    def text(self) -> str:
        return ""


if __name__ == "__main__":
    _serve()
