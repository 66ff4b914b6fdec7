"""LoRA adapters that are kept in their factors: their forward, their sweeps and their memory.

- forward: FE+LT of one adapter, in a batch of 64 × 14 tokens, against Hugging Face's plain forward
  of the base and PEFT's own forward of the adapter.
- few, many: sweeps of 4 and of 64 prompts over all adapters × 8 position grafts in one model,
  against the same cells with merged models, one pair (base, merged) after another. Those are run
  for a sample of the adapters (`--sample`), as each costs the same, and their times are scaled up.
  A merged checkpoint is read from memory that the system keeps of its file.
- memory: the bytes of the model's tensors over those of the base and of the adapters' own tensors.

The adapters are random: rank 16 on every linear map inside the layers. Contestants take turns, and
ratios are medians over rounds.

    python experiments/benchmarks/adapters.py [--model smollm2|llama-1b|tiny] [--adapters 50]
        [--cases forward few many] [--rounds 9] [--sample 2] [--batch 64] [--prompts 64]
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tasks import ENTITY, MODELS, N_TOKENS, checkpoint, seconds, tokens
from transformers import AutoModelForCausalLM

from graftlens import Graft, GraftedTransformer, position_grafts
from graftlens.data import evaluation_prompts, make_facts
from graftlens.model.smollm2 import smollm2
from graftlens.prompts import Prompt
from graftlens.sweep.scoring import Scorer

RANK = 16

load = partial(GraftedTransformer.from_pretrained, check=False, verbose=False)


def make_adapters(base: Path, folder: Path, count: int) -> dict[str, Path]:
    """Adapters with random numbers, by name."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(0.0, 0.02, generator=generator)
        made[f"a{number}"] = folder / f"adapter-{number}"
        model.save_pretrained(made[f"a{number}"], save_embedding_layers=False)
    return made


def merged(base: Path, adapter: Path, out: Path) -> Path:
    """The checkpoint of an adapter that is merged into its base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


def rounds_of(
    contestants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every contestant in each round, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            spent = seconds(call)
            if turn:
                times[name].append(spent)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> str:
    found = [mine / (scale * other) for mine, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def forward(base: Path, adapter: Path, batch: int, rounds: int) -> None:
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    other = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa"
    )
    peft = PeftModel.from_pretrained(other, adapter).eval()
    model = load({"pre": base, "sft": adapter}, dtype="float32")
    ids = tokens(batch, model.arch.d_vocab)
    contestants = {
        "Hugging Face, the base": lambda: hf(input_ids=ids, use_cache=False).logits,
        "PEFT, the adapter": lambda: peft(input_ids=ids, use_cache=False).logits,
        "no graft": partial(model, ids),
        "uniform graft": partial(model, ids, graft="sft @ all"),
        "FE+LT": partial(model, ids, graft=Graft.rule("sft", at=[*ENTITY, -1])),
    }
    times = rounds_of(contestants, rounds)
    plain, theirs = list(times.values())[:2]
    print(f"\nbatch {batch} × {N_TOKENS} tokens, float32, {rounds} rounds\n")
    print("| forward | median s | ratio to Hugging Face | ratio to PEFT |")
    print("| --- | --- | --- | --- |")
    for name, spent in times.items():
        cells = [name, f"{statistics.median(spent):.4f}", ratio(spent, plain), ratio(spent, theirs)]
        print(f"| {' | '.join(cells)} |")


def grafts_of(names: Sequence[str]) -> dict[str, Graft]:
    """Every position graft of every adapter."""
    return {f"{n} {key}": g for n in names for key, g in position_grafts(n).items()}


def sweeps(
    base: Path,
    adapters: Mapping[str, Path],
    whole: Sequence[Path],
    prompts: Mapping[str, Mapping[int, Prompt]],
    rounds: int,
) -> None:
    """Sweeps of prompts by name, over all adapters and over as many merged models."""
    tokenizer = str(smollm2())

    def opened() -> GraftedTransformer:
        return load({"pre": base, **adapters}, tokenizer=tokenizer, dtype="float32")

    def pair(folder: Path, into: list[GraftedTransformer]) -> None:
        into.append(load({"pre": base, "sft": folder}, tokenizer=tokenizer, dtype="float32"))

    begun = time.perf_counter()
    model = opened()
    print(f"\n{len(adapters)} adapters were loaded in {time.perf_counter() - begun:.1f} s.")
    print(memory(model, base, adapters))
    grafts = grafts_of(list(adapters))
    scale = len(adapters) / len(whole)
    print(
        f"\n{len(grafts)} grafts, float32, {rounds} rounds; {len(whole)} merged models were run in "
        f"each, their times × {scale:g}\n"
    )
    print("| sweep | prompts | median s | to merged models | to them without loading |")
    print("| --- | --- | --- | --- | --- |")
    for case, asked in prompts.items():
        times: dict[str, list[float]] = {"ours": [], "load": [], "theirs": []}
        for turn in range(rounds + 1):
            spent = {
                "ours": seconds(partial(cells, model, grafts, asked)),
                "load": 0.0,
                "theirs": 0.0,
            }
            for folder in whole:
                made: list[GraftedTransformer] = []
                spent["load"] += seconds(partial(pair, folder, made))
                spent["theirs"] += seconds(partial(cells, made[0], position_grafts(), asked))
            if turn:
                for name in times:
                    times[name].append(spent[name])
        both = [a + b for a, b in zip(times["load"], times["theirs"], strict=True)]
        row = [case, str(len(asked)), f"{statistics.median(times['ours']):.2f}"]
        row += [ratio(times["ours"], both, scale), ratio(times["ours"], times["theirs"], scale)]
        print(f"| {' | '.join(row)} |", flush=True)


def cells(
    model: GraftedTransformer, grafts: Mapping[str, Graft], prompts: Mapping[int, Prompt]
) -> None:
    Scorer(model, grafts, answers="first").table(dict(prompts))


def memory(model: GraftedTransformer, base: Path, adapters: Mapping[str, Path]) -> str:
    """What the model's tensors take, beside the base and the adapters' files."""
    held = [*model.parameters(), *model.buffers()]
    taken = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    needed = sum(p.numel() * p.element_size() for p in alone.parameters())
    for folder in adapters.values():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            needed += sum(4 * file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    mebi = 1 << 20
    return (
        f"The model holds {sum(taken.values()) / mebi:.0f} MiB, the base and the adapters' own "
        f"tensors are {needed / mebi:.0f} MiB: ratio {sum(taken.values()) / needed:.3f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument(
        "--cases", nargs="+", choices=["forward", "few", "many"], default=["forward", "few", "many"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample", type=int, default=2, help="merged models run in each round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the case many")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {sys.version.split()[0]}; {options.model}"
    )
    asked = evaluation_prompts(
        make_facts(max(16, options.prompts), seed=0), templates=("headline",)
    )
    prompts = {"few": 4, "many": options.prompts}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = Path(scratch)
        base = checkpoint(options.model, folder)
        with torch.inference_mode(False):
            adapters = make_adapters(base, folder, options.adapters)
            first = list(adapters.values())[: options.sample]
            whole = [merged(base, adapter, folder / f"merged-{adapter.name}") for adapter in first]
        if "forward" in options.cases:
            forward(base, first[0], options.batch, options.rounds)
        wanted = {case: dict(enumerate(asked[: prompts[case]])) for case in prompts}
        wanted = {case: some for case, some in wanted.items() if case in options.cases}
        if wanted:
            sweeps(base, adapters, whole, wanted, options.rounds)


if __name__ == "__main__":
    main()
