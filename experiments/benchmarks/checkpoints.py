"""Peak memory of a sweep over a run's checkpoints, one after another, against one checkpoint alone.

Each sweep runs in a process of its own, on the CPU, and reports the most memory that it ever held
(`ru_maxrss`, which contains Python and its libraries; what these take alone is also shown). The
checkpoints are random: the base with noise on every weight.

    python experiments/benchmarks/checkpoints.py [--model smollm2|llama-1b|tiny] [--checkpoints 12]
        [--prompts 8] [--rounds 3]
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tasks import MODELS, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlens import run_sweep
from graftlens.model.smollm2 import smollm2

GRAFTS = {
    "PRE": "none",
    "SFT": "time @ all",
    "FE": "time @ first_entity",
    "LT": "time @ last",
    "FE+LT": "time @ first_entity + last",
}


def make_checkpoints(base: Path, folder: Path, count: int) -> None:
    """The base with different noise, as folders `checkpoint-10`, `checkpoint-20`, …"""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    generator = torch.Generator().manual_seed(0)
    for number in range(1, count + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        model.save_pretrained(folder / f"checkpoint-{number * 10}")
        tokenizer.save_pretrained(folder / f"checkpoint-{number * 10}")


def peak(base: Path, pattern: str, out: Path, prompts: int) -> float:
    """MiB that a sweep of this pattern's checkpoints took at most, in a process of its own."""
    command = [sys.executable, __file__, "--inner", str(base), pattern, str(out), str(prompts)]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def inner(base: str, pattern: str, out: str, prompts: str) -> None:
    """In the process: run, and print the peak."""
    if pattern:
        config = {
            "sources": {"pre": base, "time": {"each": pattern}},
            "tokenizer": str(smollm2()),
            "dataset": {"movies": {"n_facts": 16, "seed": 0}},
            "templates": ["headline"],
            "limit": int(prompts),
            "grafts": GRAFTS,
            "row_budget": 2048,
        }
        run_sweep(config, out, device="cpu", progress=False, say=lambda _: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {sys.version.split()[0]}; {options.model}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = checkpoint(options.model, folder)
        make_checkpoints(base, folder, options.checkpoints)
        patterns = {"imports": "", "one": "checkpoint-10", "all": "checkpoint-*"}
        found: dict[str, list[float]] = {name: [] for name in patterns}
        for turn in range(options.rounds):
            for name, pattern in patterns.items():
                place = str(folder / pattern) if pattern else ""
                found[name].append(
                    peak(base, place, folder / f"out-{name}-{turn}", options.prompts)
                )
        middle = {name: statistics.median(values) for name, values in found.items()}
        ratios = [a / b for a, b in zip(found["all"], found["one"], strict=True)]
        print("| checkpoints | peak MiB |\n| --- | --- |")
        print(f"| none, imports alone | {middle['imports']:.0f} |")
        print(f"| 1 | {middle['one']:.0f} |")
        print(f"| {options.checkpoints} | {middle['all']:.0f} |")
        print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
