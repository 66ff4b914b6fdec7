"""Generated texts against Hugging Face's batched `generate`, and many grafts in one call.

- batch: 64 prompts, 48 new tokens, drawn at temperature 1 without end tokens: a uniform graft, a
  position graft and an unmerged adapter, each against Hugging Face's `generate` of the same prompts
  in one batch, padded on the left, drawn as well. `rows per s` is what 64 × 48 tokens come to.
- calls: 12 grafts × 8 prompts × 8 samples in one call against one graft and prompt at a time. Of
  these 96 calls, a round makes as many as --sample says, evenly over grafts and prompts, and their
  time is scaled up.

Contestants take turns; ratios are medians over rounds, above 1 where ours is the faster one.

    python experiments/benchmarks/generate.py [--model smollm2|llama-1b|tiny] [--rounds 5]
        [--cases batch calls] [--sample 96]
"""

import argparse
import itertools
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from adapters import make_adapters, rounds_of
from tasks import MODELS, pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlens import Graft, GraftedTransformer, Prompt, position_grafts
from graftlens.data import evaluation_prompts, make_facts
from graftlens.model.smollm2 import smollm2
from graftlens.outcomes import Drawing, Sampler

ROWS, NEW = 64, 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loaded(sources: Mapping[str, Path]) -> GraftedTransformer:
    """The sources in one model, whose texts nothing ends."""
    model = GraftedTransformer.from_pretrained(
        sources,
        tokenizer=AutoTokenizer.from_pretrained(smollm2()),
        device=DEVICE,
        dtype=torch.float32,
        check=False,
        verbose=False,
    )
    model.end_tokens = dict.fromkeys(model.sources, (model.arch.d_vocab,))
    return model


def asked() -> list[Prompt]:
    """64 prompts, each of another film."""
    return list(evaluation_prompts(make_facts(ROWS, seed=0), templates=["headline"]))


def texts(model: GraftedTransformer, graft: Graft) -> Callable[[], object]:
    sampler = Sampler(model, {"graft": graft}, Drawing(max_new_tokens=NEW))
    prompts = dict(enumerate(asked()))
    return lambda: sampler.table(prompts)


def hugging_face(folder: Path) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model = model.to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2(), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([p.text for p in asked()], return_tensors="pt", padding=True).to(DEVICE)

    def call() -> object:
        out = model.generate(
            **batch, max_new_tokens=NEW, do_sample=True, eos_token_id=None, pad_token_id=0
        )
        assert out.shape[1] == batch["input_ids"].shape[1] + NEW
        return tokenizer.batch_decode(out)

    return call


def batch(sources: Mapping[str, Path], folder: Path, rounds: int) -> None:
    place = Graft.rule("sft", at="first_entity + last")
    whole = loaded(sources)
    adapter = loaded({"pre": sources["pre"], **make_adapters(sources["pre"], folder, 1)})
    contestants = {
        "Hugging Face": hugging_face(sources["sft"]),
        "uniform graft": texts(whole, Graft.rule("sft")),
        "position graft (FE+LT)": texts(whole, place),
        "unmerged adapter": texts(adapter, Graft.rule("a0")),
        "position graft of the adapter": texts(adapter, Graft.rule("a0", at="first_entity + last")),
    }
    times = rounds_of(contestants, rounds)
    print(f"\n{ROWS} prompts, {NEW} new tokens, float32, {rounds} rounds\n")
    print("| texts | median s | tokens per s | of Hugging Face's speed |")
    print("| --- | --- | --- | --- |")
    for name, spent in times.items():
        found = [his / mine for his, mine in zip(times["Hugging Face"], spent, strict=True)]
        middle = statistics.median(spent)
        print(
            f"| {name} | {middle:.2f} | {ROWS * NEW / middle:.0f} | "
            f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |"
        )


def calls(sources: Mapping[str, Path], rounds: int, sample: int) -> None:
    model = loaded(sources)
    spots = ("first_entity", "last", "first_entity + last", "generated")
    grafts = position_grafts() | {
        f"{spot}: mlp": Graft.rule("sft", at=spot, components="mlp") for spot in spots
    }
    assert len(grafts) == 12
    drawing, prompts = Drawing(n=8, max_new_tokens=NEW), asked()[:8]
    together = Sampler(model, grafts, drawing)
    alone = [Sampler(model, {name: graft}, drawing) for name, graft in grafts.items()]
    # Graft i with prompt i + k: each graft once before any is met again, and so are the prompts.
    pairs = [(i, (i + k) % len(prompts)) for k in range(len(prompts)) for i in range(len(alone))]
    turn = itertools.count()

    def one_by_one() -> None:
        begin = next(turn) * sample
        for n in range(begin, begin + sample):
            graft, number = pairs[n % len(pairs)]
            alone[graft].table({number: prompts[number]})

    times = rounds_of(
        {
            "one call": lambda: together.table(dict(enumerate(prompts))),
            "one graft and prompt at a time": one_by_one,
        },
        rounds,
    )
    ours, theirs = times.values()
    theirs[:] = [spent * len(pairs) / sample for spent in theirs]
    found = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
    print(f"\n12 grafts × 8 prompts × 8 samples, {NEW} new tokens, {rounds} rounds\n")
    print("| how | median s |")
    print("| --- | --- |")
    for name, spent in times.items():
        print(f"| {name} | {statistics.median(spent):.2f} |")
    print(f"\none call is {statistics.median(found):.2f} times as fast", end="")
    print(f" ({min(found):.2f} to {max(found):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cases", nargs="+", choices=("batch", "calls"), default=["batch", "calls"]
    )
    parser.add_argument("--sample", type=int, default=96)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{DEVICE}, Python {sys.version.split()[0]}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        sources = pair(options.model, Path(scratch))
        if "batch" in options.cases:
            batch(sources, Path(scratch), options.rounds)
        if "calls" in options.cases:
            calls(sources, options.rounds, options.sample)


if __name__ == "__main__":
    main()
