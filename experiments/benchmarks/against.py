"""This checkout's library against another's: the same tasks in turns, in one run.

Three workers stay up: the other checkout (old), this one (new), and the other once more (again),
which shows how far two runs of the same code differ. Only one computes at a time. In each round
every task runs once on every worker, the workers in another order each round, so that a ratio
compares neighbours; ratios are of one round, and the table has their median, quartiles and
extremes. A median of new / old within the extremes of again / old is not a difference that this run
can detect.

    python experiments/benchmarks/against.py --old ../graftlens-before
        [--model smollm2|llama-1b|tiny] [--rounds 9] [--batch 64] [--cases abcd] [--prompts N]

The tasks are forward.py's grafts of one forward and sweep.py's sweeps, with and without planning.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
NEW = HERE.parents[2]

#: Rounds that are run and not counted.
WARM = 2


class Worker:
    """A process that has one checkout's library, and runs a task when it is told to."""

    def __init__(self, checkout: Path, setup: Mapping[str, Any]) -> None:
        # The library of the checkout comes before the one that is installed.
        path = os.pathsep.join([str(checkout), str(HERE.parent)])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE), "--worker", str(checkout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.tasks: list[str] = self.ask(dict(setup))

    def ask(self, what: Any) -> Any:
        """The worker's answer; it computes only while it is asked."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended with exit status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def work(checkout: Path) -> None:
    """Be a worker: the tasks' names for the set-up, then seconds for each task's name."""
    # What the library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import graftlens

    found = Path(graftlens.__file__).resolve()
    if not found.is_relative_to(checkout.resolve()):
        raise SystemExit(f"graftlens was imported from {found}, which is not in {checkout}")
    known: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        said: Any
        if isinstance(asked, dict):
            known = tasks(**asked)
            said = list(known)
        else:
            said = seconds(known[asked])
        print(json.dumps(said), file=answers, flush=True)


def tasks(
    sources: Mapping[str, str], letters: str, batch: int, prompts: int | None
) -> dict[str, Callable[[], object]]:
    """Name -> what is timed."""
    import torch
    from tasks import PROMPTS, cases, forwards, tokens

    from graftlens import GraftedTransformer
    from graftlens.data import evaluation_prompts, make_facts
    from graftlens.model.smollm2 import smollm2
    from graftlens.sweep.scoring import Scorer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GraftedTransformer.from_pretrained(
        dict(sources),
        tokenizer=str(smollm2()),
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        check=False,
    )
    ids = tokens(batch, model.arch.d_vocab).to(device)
    made: dict[str, Callable[[], object]] = {
        f"forward: {name}": partial(model, ids, graft=graft) for name, graft in forwards().items()
    }
    asked = evaluation_prompts(make_facts(64, seed=0), templates=["headline"])
    for letter in letters:
        name, grafts = cases(model.arch.n_layers)[letter]
        swept = dict(enumerate(asked[: min(PROMPTS[letter], prompts or 64)]))

        # A new one each time, so that it plans again, as the first shard of a sweep does.
        def scorer(grafts: Mapping[str, Any] = grafts) -> Any:
            return Scorer(model, grafts, answers="first")

        made[f"sweep ({letter}) {name}"] = lambda s=scorer, p=swept: s().table(p)
        made[f"plan ({letter}) {name}"] = lambda s=scorer, p=swept: s().plan(p)
    return made


def seconds(task: Callable[[], object]) -> float:
    import torch
    from tasks import synchronise

    with torch.inference_mode():
        synchronise()
        start = time.perf_counter()
        task()
        synchronise()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="the folder of another checkout")
    parser.add_argument("--model", choices=["smollm2", "llama-1b", "tiny"], default="smollm2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64, help="prompts of a forward (default: 64)")
    parser.add_argument("--cases", default="abcd", help="letters of sweeps; none: ''")
    parser.add_argument("--prompts", type=int, help="prompts of a sweep, at most")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    if options.old is None or not (options.old / "graftlens" / "__init__.py").is_file():
        parser.error("--old: name the folder of another checkout, with its graftlens/ in it")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: quartiles need two or more")

    import torch
    from tasks import pair

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{'cuda' if torch.cuda.is_available() else 'cpu'}, Python {sys.version.split()[0]}; "
        f"{options.model}, {options.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        sources = {name: str(path) for name, path in pair(options.model, Path(scratch)).items()}
        setup = {
            "sources": sources,
            "letters": options.cases,
            "batch": options.batch,
            "prompts": options.prompts,
        }
        places = {"old": options.old.resolve(), "new": NEW, "again": options.old.resolve()}
        workers = {name: Worker(place, setup) for name, place in places.items()}
        try:
            times = turns(workers, options.rounds)
        finally:
            for worker in workers.values():
                worker.end()
    print(table(times))


def turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Task -> worker -> seconds in each round."""
    names = list(workers)
    made: dict[str, dict[str, list[float]]] = {}
    for turn in range(-WARM, rounds):
        for task in workers["new"].tasks:
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                spent = workers[name].ask(task)
                if turn >= 0:
                    made.setdefault(task, {}).setdefault(name, []).append(spent)
        print(f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up", file=sys.stderr)
    return made


def table(times: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Markdown: for each task the ratios of one round, and whether this run tells the two apart."""
    lines = [
        "| task | old, median s | new / old | quartiles | extremes | again / old | quartiles "
        "| extremes | new / old is |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, spent in times.items():
        cells = [task, f"{statistics.median(spent['old']):.4f}"]
        ratios = {
            name: sorted(a / b for a, b in zip(spent[name], spent["old"], strict=True))
            for name in ("new", "again")
        }
        for found in ratios.values():
            low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
            cells += [f"{middle:.3f}", f"{low:.3f}–{high:.3f}", f"{found[0]:.3f}–{found[-1]:.3f}"]
        median, same = statistics.median(ratios["new"]), ratios["again"]
        verdict = "less" if median < same[0] else "MORE" if median > same[-1] else "within"
        lines.append(f"| {' | '.join([*cells, verdict])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
