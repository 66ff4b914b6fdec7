"""`graftlens demo`: the paper's finding on a real pretrained model, on a laptop's CPU.

Finetunes SmolLM2-135M on invented films, then asks for each film's other actor in words that
training never used, under the position grafts of the paper. Every step writes only complete files,
so an interrupted run resumes where it stopped.
"""

import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.data import evaluation_prompts, make_dataset, make_facts, training_texts
from graftlens.evaluation import evaluate, position_grafts
from graftlens.finetune import FinetuneConfig, demo_configs, finetune
from graftlens.folder import (
    RUNS,
    claim,
    parse_json,
    read_text,
    writable,
    write_whole,
)
from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.smollm2 import origin, smollm2
from graftlens.prompts import Prompt
from graftlens.reports import ENOUGH, example
from graftlens.stats import summarise
from graftlens.viz.examples import Example, Glimpse, first_right, glimpse
from graftlens.viz.text import headline, text_table

EPOCHS = 6
TEMPLATES = ("headline", "qa", "with_title", "new_film")
HELD_OUT = 8  # films whose texts are held out for perplexity
DEFAULT_OUT = RUNS / "demo"

#: The page, in the given folder; the results and what they describe, in their own folder.
PAGE, TABLE, KEY = "report.html", "results.parquet", "results.json"


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo run.

    Attributes:
        table: one row per (prompt, graft), as from `evaluate`.
        summary: accuracies and recovery with intervals, as from `summarise`.
        report: the page that was written.
        seconds: wall-clock seconds of this call, by step.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    report: Path
    seconds: Mapping[str, float]


def demo(
    out: Path = DEFAULT_OUT,
    *,
    facts: int = 40,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Run the demonstration and write `out/report.html`; finished steps are reused.

    Args:
        out: folder for the results; each combination of settings has its own folder in it.
        facts: number of invented films; run time is proportional.
        epochs: passes over the training texts.
        seed: for the films, their texts and the training.
        progress: whether to show progress bars.
        say: where messages go.

    Raises:
        SmolLM2UnavailableError: the model is neither in the cache nor available for download.
        ValueError: fewer than six facts, or no epochs; `out` holds files that the demo did not
            write, under names that it writes.
        OSError: a folder that cannot be written.
    """
    if facts < 6:
        raise ValueError(
            f"facts={facts}: the demo needs 6 or more, so that each fact has four wrong answers "
            "for comparison and the texts fill a batch."
        )
    clock = _Clock()
    out = Path(out).expanduser()
    folder = out / f"facts-{facts}-epochs-{epochs}-seed-{seed}"
    for path in (out / PAGE, folder / KEY):
        writable(path)
    _claim(out, folder)

    say("1/4  the pretrained model: SmolLM2-135M-Instruct")
    base = smollm2()
    came_from = origin(base)
    say(f"     {came_from}")
    movies, recipe = demo_configs(
        str(base), folder / "finetune", facts=facts, epochs=epochs, seed=seed
    )
    dataset = make_dataset(movies)
    clock.lap("fetch the model, make the facts")

    say(f"2/4  finetuning on {facts} invented films, {len(dataset.train)} texts, {epochs} epochs")
    # Films that training never mentions, in its templates: how well the language itself is kept.
    others = make_facts(facts + HELD_OUT, seed)[facts:]
    heldout = training_texts(others, texts_per_fact=2, directions=movies.directions, seed=seed)
    trained = finetune(recipe, dataset.train, heldout, progress=progress)
    clock.lap("finetune")

    say("3/4  grafting")
    model = GraftedTransformer.from_pretrained({"pre": base, "sft": trained.folder})
    grafts = position_grafts()
    prompts = evaluation_prompts(dataset.facts, templates=TEMPLATES, seed=seed)
    fingerprints = model.fingerprints()
    key = {
        "graftlens": version("graftlens"),
        "models": fingerprints,
        "grafts": {name: str(graft) for name, graft in grafts.items()},
        "prompts": [[p.text, p.answer, list(p.distractors)] for p in prompts],
    }
    table = _kept_results(folder, key)
    if table is None:
        table = evaluate(model, prompts, grafts, progress=progress)
        _keep_results(folder, key, table)
    else:
        say("     the results already exist")
    clock.lap("load and evaluate")

    say("4/4  report")
    summary = summarise(table, seed=seed, recovery="logprob")
    provenance = {
        "command": f"graftlens demo --facts {facts} --epochs {epochs} --seed {seed} --out {out}",
        "question": "Each prompt names one actor of an invented film; the right next token begins "
        "the other actor's name. Training described each film in other words than these prompts.",
        "data": {
            "facts": facts,
            "training texts": len(dataset.train),
            "sha256 of facts and texts": dataset.provenance["sha256"],
        },
        "finetuning": _recipe(recipe)
        | {
            "steps": trained.steps,
            "seconds": round(trained.seconds, 1),
            "mean loss of the last epoch (nats per token)": _mean(
                trained.losses[-trained.steps // epochs :]
            ),
            "perplexity on texts about films that were not trained on": ", ".join(
                f"{p:.1f}" for p in trained.perplexities
            )
            + " (before training, then after each epoch)",
        },
        "models": {
            "pretrained": came_from,
            "sources": {
                name: {"from": place.name, "SHA-256": fingerprints[name]}
                for name, place in (("pre", base), ("sft", trained.folder))
            },
        },
        "versions": {
            name: version(name)
            for name in ("graftlens", "torch", "transformers", "transformer-lens", "faker")
        },
        "machine": f"Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores",
    }
    from graftlens.viz.report import write_report

    report = write_report(
        out / PAGE,
        title="Where a finetuned fact is retrieved: SmolLM2-135M",
        summary=summary,
        table=table,
        lead=f"{headline(summary)} The pretrained model: {came_from}.",
        examples=_examples(model, prompts, grafts, table),
        glimpse=_glimpse(model, prompts, grafts, table, summary),
        provenance=provenance,
    )
    clock.lap("report")
    say("")
    say(text_table(summary, show=["top1", "top5", "recovery"]))
    say(headline(summary))
    say(f"\n{report.resolve()}")
    return DemoResult(table, summary, report, clock.laps)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _recipe(config: FinetuneConfig) -> dict[str, Any]:
    shown = ("epochs", "learning_rate", "weight_decay", "warmup_steps", "batch_size", "precision")
    return {name.replace("_", " "): getattr(config, name) for name in (*shown, "seed")}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


def _claim(out: Path, folder: Path) -> None:
    """A marker inside identifies both folders as the demo's; anything else is left untouched."""
    run = "finetune/run.json"
    for place, names, before in (
        (out, [PAGE], f"facts-*/{run}"),
        (folder, [KEY, TABLE], run),
    ):
        # Earlier releases left runs without markers.
        claim(place, "demo", taken=() if any(place.glob(before)) else names)


def _kept_results(folder: Path, key: Mapping[str, Any]) -> pd.DataFrame | None:
    """The results of an earlier call, if they belong to exactly these models, prompts and
    grafts."""
    try:
        known = parse_json(read_text(folder / KEY), folder / KEY)
        table = (folder / TABLE).read_bytes()
    except (OSError, ValueError):
        return None
    if known != json.loads(json.dumps({**key, "table": _sha256(table)})):
        return None
    return pd.read_parquet(io.BytesIO(table))


def _keep_results(folder: Path, key: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Write the table, and then the key that makes it valid."""
    (folder / KEY).unlink(missing_ok=True)
    content = io.BytesIO()
    table.to_parquet(content)
    write_whole(folder / TABLE, content.getvalue())
    whole = {**key, "table": _sha256(content.getvalue())}
    write_whole(folder / KEY, json.dumps(whole))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _examples(
    model: GraftedTransformer,
    prompts: Sequence[Prompt],
    grafts: Mapping[str, Graft],
    table: pd.DataFrame,
) -> list[Example]:
    """The first prompt of each template, with the tokens that each graft touches."""
    first: dict[str | None, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt.name, index)
    return [_example(model, str(n), i, prompts, grafts, table) for n, i in first.items()]


def _example(
    model: GraftedTransformer,
    title: str,
    number: int,
    prompts: Sequence[Prompt],
    grafts: Mapping[str, Graft],
    table: pd.DataFrame,
) -> Example:
    (tokens,) = model.tokenized(prompts[number])
    texts = [model.to_single_str_token(token) for token in tokens.ids]
    return example(title, prompts[number], tokens, texts, grafts, table[table["prompt"] == number])


def _glimpse(
    model: GraftedTransformer,
    prompts: Sequence[Prompt],
    grafts: Mapping[str, Graft],
    table: pd.DataFrame,
    summary: pd.DataFrame,
) -> Glimpse | None:
    """A prompt of the first template, with what the model goes on to say under FE+LT and under its
    complement: as many tokens as the answer has."""
    number = first_right(table, "SFT", prompts[0].name)
    if number is None:
        return None
    prompt = prompts[number]
    (alone,), (whole,) = (model.tokenized(p) for p in (prompt, f"{prompt.text}{prompt.answer}"))
    says = {
        name: model.generate(
            prompt,
            max_new_tokens=max(1, len(whole) - len(alone)),
            graft=grafts[name],
            return_type="str",
            new_only=True,
        )
        for name in ENOUGH
    }
    shown = _example(model, str(prompt.name), number, prompts, grafts, table)
    return glimpse(shown, summary, ENOUGH, says=says)
