"""Attribution against Hugging Face's plain forward, and against sweeps of single places.

In each round every contestant runs once, so that a ratio compares like with like; ratios are
medians over rounds.

- plain: Hugging Face's forward (sdpa, no gradients) of the same batch, which unembeds every token.
- a step: one forward and backward pass at one strength, by site, head, neuron and direction.
- each, 8 steps: `find.attribute` of every site at every token, ends included.
- sweep: each of these sites by itself in the base, by one sweep whose rows are shared, planning
  included. Both have the same few prompts: a single one is too few rows for its weights.
- neurons: `find.attribute` by neuron at the first entity, the last token and the rest, against
  single neurons by a sweep: 1,000 drawn at random, and extrapolated to all of them by number (in a
  sweep of all, neighbours would share more).

    python experiments/benchmarks/attribution.py [--model smollm2|llama-1b|tiny] [--rounds 3]
        [--prompts 16] [--swept 4] [--neurons 1000]
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tasks import MODELS, pair, seconds
from transformers import AutoModelForCausalLM

from graftlens import Graft, GraftedTransformer, Prompt, Scorer, find
from graftlens.data import evaluation_prompts, make_facts
from graftlens.find.asked import Asked
from graftlens.find.directions import Directions
from graftlens.find.gradients import Passes, differentiable
from graftlens.model.smollm2 import smollm2

POSITIONS = ["first_entity", "last", "rest"]
UNITS = ("site", "head", "neuron", "direction")
STEPS = 8


class Contest:
    """All contestants on the same prompts."""

    def __init__(
        self,
        model: GraftedTransformer,
        hf: Any,
        prompts: Sequence[Prompt],
        swept: int,
        drawn: int,
    ) -> None:
        self.model, self.hf, self.prompts, self.few = model, hf, prompts, prompts[:swept]
        batch = model.batch(list(prompts))
        device = model.cfg.device
        self.tokens = batch.tokens.to(device)
        self.real = torch.from_numpy(batch.real).long().to(device)
        self.passes: dict[str, Passes] = {}
        with differentiable(model):
            for by in UNITS:
                asked = Asked.of(model, prompts, "sft", positions=POSITIONS, by=by)
                directions = Directions(model, asked) if by == "direction" else None
                self.passes[by] = Passes(model, asked, range(len(prompts)), directions)
        table = find.attribute(model, self.few, "sft", positions="each", steps=1)
        self.sites = find.places_of(table)
        table = find.attribute(
            model, self.few[:1], "sft", positions=POSITIONS, by="neuron", steps=1
        )
        table = table[table["unit"].notna() & (table["unit"] != "bias")]
        self.n_neurons = len(table)
        some = random.Random(0).sample(range(len(table)), min(drawn, len(table)))
        self.neurons = find.places_of(table.iloc[sorted(some)])

    def sweep(self, places: Sequence[find.Place], prompts: Sequence[Prompt]) -> None:
        """Each place by itself; a new scorer, so that it plans again."""
        grafts = {str(place): Graft((place.rule("sft"),)) for place in places}
        Scorer(self.model, grafts, answers="first", top_k=1).table(dict(enumerate(prompts)))

    def step(self, by: str) -> None:
        with differentiable(self.model):
            self.passes[by].at(0.5)

    def attribute(self, prompts: Sequence[Prompt], **options: Any) -> None:
        find.attribute(self.model, prompts, "sft", steps=STEPS, **options)

    def plain(self) -> None:
        with torch.inference_mode():
            self.hf(input_ids=self.tokens, attention_mask=self.real, use_cache=False)

    def round(self) -> dict[str, float]:
        """Seconds of every contestant."""
        found = {"plain": seconds(self.plain)}
        found |= {by: seconds(lambda by=by: self.step(by)) for by in UNITS}
        found["each"] = seconds(lambda: self.attribute(self.few, positions="each"))
        found["sweep"] = seconds(lambda: self.sweep(self.sites, self.few))
        one = self.few[:1]
        found["by neuron"] = seconds(lambda: self.attribute(one, positions=POSITIONS, by="neuron"))
        found["neurons"] = seconds(lambda: self.sweep(self.neurons, one))
        return found


def report(contest: Contest, rounds: Sequence[Mapping[str, float]]) -> str:
    """Markdown: medians, and ratios of one round."""

    def median(of: str) -> float:
        return statistics.median(r[of] for r in rounds)

    def ratio(of: str, to: str, factor: float = 1.0) -> float:
        return statistics.median(factor * r[of] / r[to] for r in rounds)

    count, width = contest.tokens.shape
    share = contest.n_neurons / len(contest.neurons)
    lines = [
        f"One step, {count} prompts × {width} tokens:",
        "",
        "| pass | median s | ratio to Hugging Face |",
        "| --- | --- | --- |",
        f"| Hugging Face's plain forward | {median('plain'):.3f} | 1.00 |",
        *(f"| by {by} | {median(by):.3f} | {ratio(by, 'plain'):.2f} |" for by in UNITS),
        "",
        "| question | places | attribution, s | exact, s | times as cheap |",
        "| --- | --- | --- | --- | --- |",
        f"| all sites of each token, {len(contest.few)} prompt(s), {STEPS} steps "
        f"| {len(contest.sites):,} | {median('each'):.2f} | {median('sweep'):.1f} "
        f"| {ratio('sweep', 'each'):.1f} |",
        f"| all neurons at three positions, 1 prompt, {STEPS} steps | {contest.n_neurons:,} "
        f"| {median('by neuron'):.2f} | {share * median('neurons'):,.0f} (extrapolated from "
        f"{len(contest.neurons):,} drawn at random: {median('neurons'):.1f}) "
        f"| {ratio('neurons', 'by neuron', share):,.0f} |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--swept", type=int, default=4, help="prompts of the sweep of all sites")
    parser.add_argument("--neurons", type=int, default=1000, help="neurons drawn for the sweep")
    options = parser.parse_args()
    if min(options.rounds, options.prompts, options.swept, options.neurons) < 1:
        parser.error("--rounds, --prompts, --swept and --neurons: write numbers from 1")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{device}, Python {sys.version.split()[0]}; {options.model}, {options.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folders = pair(options.model, Path(scratch))
        model = GraftedTransformer.from_pretrained(
            folders, tokenizer=smollm2(), device=device, dtype=dtype, check=False, verbose=False
        )
        hf = AutoModelForCausalLM.from_pretrained(folders["pre"], dtype=dtype).to(device).eval()
        asked = evaluation_prompts(make_facts(64, seed=0), templates=["headline"])
        contest = Contest(model, hf, asked[: options.prompts], options.swept, options.neurons)
        contest.plain()
        contest.step("site")  # warm
        print(report(contest, [contest.round() for _ in range(options.rounds)]))


if __name__ == "__main__":
    main()
