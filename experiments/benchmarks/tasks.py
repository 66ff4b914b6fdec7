"""What the benchmarks run: pairs of models, grafts of a forward, grafts of sweeps.

Only names that are public are imported from graftlens, so that `against.py` can run these tasks on
the library of another checkout.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from graftlens import Graft, position_grafts
from graftlens.model.smollm2 import smollm2

#: Positions of the first entity, and tokens of a prompt of the forward's benchmark.
ENTITY = range(1, 5)
N_TOKENS = 14

COMPONENTS = ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out")
GROUPS = ("attn", "mlp", "ln", "q + k", "q + o", "k + v", "v + o", "o + mlp")

#: Shapes of random Llamas: that of Llama-3.2-1B, and one to try a benchmark with.
SHAPES = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
    },
}
MODELS = ("smollm2", *SHAPES)


def checkpoint(name: str, folder: Path) -> Path:
    """A model by its name in `MODELS`."""
    return smollm2() if name == "smollm2" else _random(name, folder / "pre")


def pair(name: str, folder: Path) -> dict[str, Path]:
    """Two checkpoints: a model by its name, and the same with noise on every weight."""
    pre = checkpoint(name, folder)
    return {"pre": pre, "sft": _perturbed(pre, folder / "sft")}


def _random(name: str, out: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=2048, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def _perturbed(folder: Path, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.01 * float(parameter.std()))
    model.save_pretrained(out)
    return out


def tokens(batch: int, d_vocab: int) -> torch.Tensor:
    """Random token ids [batch, N_TOKENS]."""
    return torch.randint(d_vocab, (batch, N_TOKENS), generator=torch.Generator().manual_seed(2))


def forwards() -> dict[str, Graft]:
    """The grafts of the forward's benchmark."""
    return {
        "no graft": Graft(),
        "uniform graft": Graft.rule("sft"),
        "FE+LT": Graft.rule("sft", at=[*ENTITY, -1]),
        "FE+LT, o + mlp": Graft.rule("sft", at=[*ENTITY, -1], components="o + mlp"),
    }


def cases(n_layers: int) -> dict[str, tuple[str, dict[str, Graft]]]:
    """Letter of a sweep -> what it is, and its grafts."""
    windows = [(a, b) for a in range(n_layers) for b in range(a, n_layers)]
    places = ("first_entity", "last", "first_entity + last")
    last = {c: Graft.rule("sft", "last", c) for c in (*COMPONENTS, *GROUPS)}
    single = [Graft.rule("sft", "last", c, [l]) for l in range(n_layers) for c in COMPONENTS]
    window = [
        Graft.rule("sft", at, "block", list(range(a, b + 1))) for a, b in windows for at in places
    ]
    return {
        "a": ("position grid", position_grafts()),
        "b": ("components at LT", last),
        "c": ("layer × component at LT", {str(g): g for g in single}),
        "d": ("layer windows at FE, LT, FE+LT", {str(g): g for g in window}),
    }


#: Letter of a sweep -> how many prompts it has.
PROMPTS = {"a": 64, "b": 64, "c": 16, "d": 2}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start
