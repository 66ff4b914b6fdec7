"""The grafted forward against Hugging Face's plain forward and the sequential algorithm.

Everything is timed in one run, the contestants taking turns, so that a ratio compares like with
like; the absolute times hold for this machine only.

    python experiments/benchmarks/forward.py [--models smollm2 llama-1b] [--rounds 15]
        [--batch N]
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from tasks import ENTITY, MODELS, N_TOKENS, forwards, pair, synchronise, tokens
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from graftlens import GraftedTransformer


def turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, every contestant once per round, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, call in contestants.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def sequential(models: dict[str, LlamaForCausalLM], ids: torch.Tensor, graft_at: set[int]) -> None:
    """The paper's algorithm at its fastest: token by token with a KV cache, no weight copied.

    For a position graft of all components it is enough to run each token in the model that it
    belongs to, on one cache.
    """
    cache = DynamicCache()
    for position in range(ids.shape[1]):
        model = models["sft" if position in graft_at else "pre"]
        model(
            input_ids=ids[:, position : position + 1],
            past_key_values=cache,
            position_ids=torch.tensor([[position]], device=ids.device),
        )


def bench(name: str, sources: Mapping[str, Path], batch: int, rounds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hf = {
        key: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        .to(device)
        .eval()
        for key, folder in sources.items()
        if name == "smollm2" or key == "pre"
    }
    model = GraftedTransformer.from_pretrained(sources, device=device, dtype=dtype, check=False)
    ids = tokens(batch, model.arch.d_vocab).to(device)
    contestants: dict[str, Callable[[], object]] = {
        "Hugging Face": lambda: hf["pre"](input_ids=ids, use_cache=False).logits,
        **{name: partial(model, ids, graft=graft) for name, graft in forwards().items()},
    }
    with torch.inference_mode():
        times = turns(contestants, rounds)
        peer = times["Hugging Face"]
        print(f"\n{name}: batch {batch} × {N_TOKENS} tokens, {dtype}, {device}\n")
        print("| forward | median s | ratio to Hugging Face (median of rounds) |")
        print("| --- | --- | --- |")
        for contestant, seconds in times.items():
            ratio = statistics.median(s / p for s, p in zip(seconds, peer, strict=True))
            print(f"| {contestant} | {statistics.median(seconds):.4f} | {ratio:.3f} |")
        if len(hf) < 2:
            return
        places = {*ENTITY, N_TOKENS - 1}
        one = turns(
            {
                "sequential": lambda: sequential(hf, ids[:1], places),
                "grafted": contestants["FE+LT"],
            },
            max(3, rounds // 3),
        )
    slow, fast = (statistics.median(one[k]) for k in ("sequential", "grafted"))
    print(
        f"\nPer prompt and graft: sequential (KV cache, one model per source) {slow:.4f} s, "
        f"grafted (batch of {batch}) {fast / batch:.5f} s, "
        f"{slow / (fast / batch):.1f} times as fast."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "llama-1b"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64, help="prompts per batch (default: 64)")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {sys.version.split()[0]}"
    )
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            bench(name, pair(name, Path(scratch)), options.batch, options.rounds)


if __name__ == "__main__":
    main()
