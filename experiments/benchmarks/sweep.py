"""Sweeps against the same grafts one by one: sequentially, batched without sharing, and the floor.

(a) the position grid, (b) component grafts at the last token, (c) one layer × one component at the
last token, (d) all windows of layers at FE, LT and FE+LT. In each round every contestant runs once,
so that a ratio compares like with like; ratios are medians over rounds.

- sequential: Hugging Face's own forward token by token with a KV cache, parameters swapped by
  pointer (`graftlens.model.sequential`); a random sample of the grafts on one prompt.
- last: the same, but only the last token is unembedded, which Hugging Face's forward cannot do.
- by run: as last, and neighbouring tokens with equal weights run in one pass.
- unshared: each graft in a batch of its own of 64 prompts (`model.logits_at`), only scored rows
  unembedded; a sample of the grafts.
- floor: the rows that the plan needs × the seconds that Hugging Face's plain forward takes for a
  row in a batch of 64, which unembeds every row once.
- parted floor: the same in two parts: rows needed × seconds per row below the unembedding, and rows
  that must be unembedded × seconds of the unembedding. A sweep of many grafts at the last token
  unembeds more rows than it has token rows; one at many positions fewer.

    python experiments/benchmarks/sweep.py [--model smollm2|llama-1b] [--cases abcd] [--rounds 5]
        [--prompts 64]
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import MODELS, PROMPTS, cases, pair, seconds, tokens
from transformers import AutoModelForCausalLM

from graftlens.data import evaluation_prompts, make_facts
from graftlens.graft import Graft
from graftlens.metrics import Predictions, always_measured
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.sequential import Sequential
from graftlens.model.smollm2 import smollm2
from graftlens.prompts import Prompt
from graftlens.sweep.prepared import Prepared
from graftlens.sweep.scoring import Scorer

BATCH = 64


def unshared(model: GraftedTransformer, prompts: Sequence[Prompt], graft: Graft) -> None:
    """One graft over a batch of prompts, measured as in a sweep."""
    batch = model.batch(list(prompts))
    logits = torch.cat(model.logits_at(batch, [[c] for c in batch.last_columns()], graft))
    prepared = Prepared(model.tokenizer, model.arch)
    targets = torch.tensor([prepared(0, p).answer[0] for p in prompts], device=logits.device)
    found = Predictions(logits, answer=targets, top_k=10)
    for m in always_measured():
        if found.has(m):
            found.column(m)


@dataclass(frozen=True)
class Round:
    """Seconds in one round: of a sweep per prompt, of the others per prompt and graft.

    `hf` is Hugging Face's plain forward per row, `body` all of it below the unembedding.
    """

    hf: float
    body: float
    sweep: float
    plan: float
    one: float
    last: float
    run: float
    alone: float


class Case:
    """One sweep with all its contestants."""

    def __init__(
        self,
        model: GraftedTransformer,
        hf: torch.nn.Module,
        sequential: Sequential,
        prompts: Sequence[Prompt],
        grafts: dict[str, Graft],
        count: int,
    ) -> None:
        self.model, self.hf, self.sequential = model, hf, sequential
        self.prompts, self.grafts = prompts, grafts
        self.swept = dict(enumerate(prompts[:count]))
        sample = random.Random(0).sample(list(grafts.values()), min(len(grafts), 6))
        self.batched, self.looped = sample, sample[:4]
        self.tokens = tokens(BATCH, model.arch.d_vocab).to(model.cfg.device)

    def scorer(self) -> Scorer:
        """A new one each time, so that it plans again, as the first shard of a sweep does."""
        return Scorer(self.model, self.grafts, answers="first")

    def round(self, turn: int) -> Round:
        (ids,) = self.model.tokenized(self.prompts[turn % len(self.prompts)])
        last = [len(ids) - 1]

        def loop(at: list[int] | None, by_run: bool = False) -> None:
            for graft in self.looped:
                self.sequential.logits(ids, graft, at=at, by_run=by_run)

        def batches() -> None:
            for graft in self.batched:
                unshared(self.model, self.prompts[:BATCH], graft)

        plain = seconds(lambda: self.hf(input_ids=self.tokens, use_cache=False).logits)
        body = seconds(lambda: self.hf.base_model(input_ids=self.tokens, use_cache=False))
        cells = len(self.batched) * len(self.prompts[:BATCH])
        return Round(
            hf=plain / self.tokens.numel(),
            body=body / self.tokens.numel(),
            sweep=seconds(lambda: self.scorer().table(self.swept)) / len(self.swept),
            plan=seconds(lambda: self.scorer().plan(self.swept)) / len(self.swept),
            one=seconds(lambda: loop(None)) / len(self.looped),
            last=seconds(lambda: loop(last)) / len(self.looped),
            run=seconds(lambda: loop(last, by_run=True)) / len(self.looped),
            alone=seconds(batches) / cells,
        )

    def line(self, name: str, rounds: int) -> str:
        plan = self.scorer().plan(self.swept)
        rows, n = plan.rows / len(self.swept), len(self.grafts)
        unembedded = plan.logits / len(self.swept)
        turns = [self.round(turn) for turn in range(rounds + 1)][1:]

        def ratio(of: Callable[[Round], float]) -> float:
            return statistics.median(map(of, turns))

        gain = ratio(lambda t: n * t.alone / t.sweep)
        cells = [
            name,
            str(n),
            str(len(self.swept)),
            f"{rows:.1f}",
            f"{plan.rows_alone / len(self.swept):.0f}",
            f"{plan.ratio:.1f}",
            f"{unembedded:.0f}",
            f"{ratio(lambda t: t.sweep):.3f}",
            f"{ratio(lambda t: n * t.one / t.sweep):.0f}",
            f"{ratio(lambda t: n * t.last / t.sweep):.0f}",
            f"{ratio(lambda t: n * t.run / t.sweep):.0f}",
            f"{gain:.1f}",
            f"{gain / plan.ratio:.0%}",
            f"{ratio(lambda t: t.sweep / (rows * t.hf)):.2f}",
            f"{ratio(lambda t: t.sweep / (rows * t.body + unembedded * (t.hf - t.body))):.2f}",
            f"{ratio(lambda t: t.plan / t.sweep):.1%}",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| sweep | grafts | prompts | rows per prompt | one by one | row ratio | unembedded | s per "
    "prompt | × sequential | × last | × by run | × unshared | of row ratio | × floor "
    "| × parted floor | planning |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--cases", default="abcd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{device}, Python {sys.version.split()[0]}; {options.model}, {dtype}\n"
    )
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        sources = pair(options.model, Path(scratch))
        model = GraftedTransformer.from_pretrained(
            sources, tokenizer=str(smollm2()), device=device, dtype=dtype, check=False
        )
        hf = (
            AutoModelForCausalLM.from_pretrained(
                sources["pre"], dtype=dtype, attn_implementation="sdpa"
            )
            .to(device)
            .eval()
        )
        facts = make_facts(max(options.prompts, 5), seed=0)
        prompts = evaluation_prompts(facts, templates=["headline"])[: options.prompts]
        sequential = Sequential(model)
        print(HEAD + "\n" + "| --- " * HEAD.count(" |") + "|")
        known = cases(model.arch.n_layers)
        for letter in options.cases:
            name, grafts = known[letter]
            case = Case(model, hf, sequential, prompts, grafts, PROMPTS[letter])
            print(case.line(f"({letter}) {name}", options.rounds), flush=True)


if __name__ == "__main__":
    main()
