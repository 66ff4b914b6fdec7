"""The grafted forward against Hugging Face's plain forward and the sequential algorithm.

Everything is timed in one run, the contestants taking turns, so that a ratio compares like with
like; the absolute times are this machine's alone.

    python experiments/benchmarks/forward.py [--models smollm2 llama-1b] [--rounds 15]
        [--batch N]
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.smollm2 import smollm2

ENTITY = range(1, 5)
N_TOKENS = 14


def perturbed(folder: Path, out: Path) -> Path:
    """A second source: the same checkpoint with noise on every weight."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.01 * float(parameter.std()))
    model.save_pretrained(out)
    return out


def llama_1b(out: Path) -> Path:
    """A random Llama with the shape of Llama-3.2-1B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, every contestant once a round after two rounds of warming up."""
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


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sequential(
    models: dict[str, LlamaForCausalLM], tokens: torch.Tensor, graft_at: set[int]
) -> None:
    """The paper's algorithm at its fastest: token by token with a KV cache, no weight copied.

    For a position graft of all components it is enough to run each token in the model that it
    belongs to, on one cache.
    """
    cache = DynamicCache()
    for position in range(tokens.shape[1]):
        model = models["sft" if position in graft_at else "pre"]
        model(
            input_ids=tokens[:, position : position + 1],
            past_key_values=cache,
            position_ids=torch.tensor([[position]], device=tokens.device),
        )


def bench(name: str, pre: Path, sft: Path, batch: int, rounds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hf = {
        key: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        .to(device)
        .eval()
        for key, folder in {"pre": pre, "sft": sft}.items()
        if name == "smollm2" or key == "pre"
    }
    model = GraftedTransformer.from_pretrained(
        {"pre": pre, "sft": sft}, device=device, dtype=dtype, check=False
    )
    vocab = model.arch.d_vocab
    tokens = torch.randint(vocab, (batch, N_TOKENS), generator=torch.Generator().manual_seed(2)).to(
        device
    )
    fe_lt = Graft.rule("sft", at=[*ENTITY, -1])
    uniform = Graft.rule("sft")
    contestants: dict[str, Callable[[], object]] = {
        "Hugging Face": lambda: hf["pre"](input_ids=tokens, use_cache=False).logits,
        "no graft": lambda: model(tokens),
        "uniform graft": lambda: model(tokens, graft=uniform),
        "FE+LT": lambda: model(tokens, graft=fe_lt),
        "FE+LT, o + mlp": lambda: model(
            tokens, graft=Graft.rule("sft", at=[*ENTITY, -1], components="o + mlp")
        ),
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
                "sequential": lambda: sequential(hf, tokens[:1], places),
                "grafted": lambda: model(tokens, graft=fe_lt),
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
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-1b"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64, help="prompts a batch (default: 64)")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {sys.version.split()[0]}"
    )
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            pre = smollm2() if name == "smollm2" else llama_1b(Path(scratch) / "pre")
            sft = perturbed(pre, Path(scratch) / "sft")
            bench(name, pre, sft, options.batch, options.rounds)


if __name__ == "__main__":
    main()
