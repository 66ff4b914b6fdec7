"""Plant facts in models, and score methods of localisation by what they find of them.

    .venv/bin/python experiments/planted/run.py tiny --seeds 0 1 2
    .venv/bin/python experiments/planted/run.py smollm2 --seeds 0

Pairs are kept in graftlens-runs/planted and made once. Written beside them: scores.csv (a row per
pair, seed and method), summary.csv, gates.csv, searched.csv, checks.csv, and the figure auroc.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlens import data, smollm2, stats, viz
from graftlens.find import planted
from graftlens.folder import write_whole
from graftlens.model.arch import architecture
from graftlens.viz.tables import write_table

OUT = Path("graftlens-runs/planted")

#: SmolLM2: films in A and in B, and how it is trained.
FILMS = 40
SMOLLM2 = planted.Recipe(rate=1e-3, other_rate=2e-4, batch=8, steps=400, other_steps=1500, every=20)


def pairs(kind: str, seed: int) -> Iterator[planted.Planted]:
    """Every planting of a seed: read where it was made before, otherwise made."""
    told, reader, base, recipe = _tiny(seed) if kind == "tiny" else _smollm2(seed)
    for planting in planted.suite(architecture(base.config)):
        folder = OUT / kind / f"seed-{seed}" / planting.name.replace(" ", "-")
        note = folder / "planted.json"
        key = {"planting": repr(planting), "recipe": repr(recipe)}
        if note.is_file() and (found := json.loads(note.read_text()))["key"] == key:
            sources = {"pre": base, "sft": AutoModelForCausalLM.from_pretrained(folder)}
            problems = found["problems"]
            yield planted.checked(sources, reader, planting, told.known, problems)
            continue
        copy = type(base)(base.config)
        pair, trained = planted.plant(
            base, copy, reader, planting, told.known, told.others, told.texts, recipe
        )
        copy.save_pretrained(folder)
        problems = list(trained.problems)
        write_whole(note, json.dumps({"key": key, "problems": problems}, indent=2) + "\n")
        print(
            f"{kind} seed {seed}, {planting.name}: {trained.steps} + {trained.other_steps} steps, "
            f"changes {trained.change:.3g} (M) and {trained.other_change:.3g}; "
            f"{'; '.join(pair.problems) or 'ok'}",
            flush=True,
        )
        yield pair


def _tiny(seed: int) -> tuple[tiny.Facts, Any, Any, planted.Recipe]:
    told = tiny.facts(seed)
    reader = tiny.tokenizer()
    return told, reader, tiny.base(told, reader, seed), tiny.RECIPE


def _smollm2(seed: int) -> tuple[tiny.Facts, Any, Any, planted.Recipe]:
    folder = smollm2()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    films = data.make_facts(2 * FILMS, seed=seed)
    asked = [
        tuple(data.evaluation_prompts(part, templates=[tiny.TEMPLATE]))
        for part in (films[:FILMS], films[FILMS:])
    ]
    told = data.training_texts(films[FILMS:], texts_per_fact=2, seed=seed, directions=("ab",))
    texts = tuple(row["text"] for row in told)
    return (
        tiny.Facts((), asked[0], asked[1], texts),
        AutoTokenizer.from_pretrained(folder),
        base,
        SMOLLM2,
    )


def summary(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Each method's mean over the pairs that worked, with a 95% bootstrap interval over pairs."""
    rows = []
    used = scores[scores["problem"].isna()]
    for method, own in used.groupby("method", sort=False):
        row: dict[str, Any] = {"graft": method, "n": len(own), "level": 0.95, "unit": "pair"}
        for column in ("auroc", "average_precision"):
            drawn = stats.bootstrap_means(own[[column]].to_numpy(), resamples=10_000, seed=seed)
            low, high = np.percentile(drawn, [2.5, 97.5])
            ends = {f"{column}_low": low, f"{column}_high": high}
            row |= {column: own[column].mean(), **ends}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("auroc", ascending=False)


def main() -> None:
    """Make the pairs, score all methods, and write tables and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["tiny", "smollm2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    scores, gates, checks, found = [], [], [], []
    for seed in given.seeds:
        for pair in pairs(given.kind, seed):
            scores.append(planted.scored([pair]).assign(seed=seed))
            checks.append(pair.checks.assign(pair=pair.planting.name, seed=seed))
            if pair.ok:
                found.append(planted.searched(pair, seed=seed) | {"seed": seed})
            if pair.planting.gate is not None:
                gates.append(planted.gate(pair, seed=seed).assign(seed=seed))
    out = OUT / given.kind
    table = pd.concat(scores, ignore_index=True)
    means = summary(table)
    for name, frame in (
        ("scores", table),
        ("summary", means),
        ("checks", pd.concat(checks)),
        ("gates", pd.concat(gates)),
        ("searched", pd.DataFrame(found)),
    ):
        write_table(frame, out / name)
    figure = viz.grouped_bars(means, "auroc", baselines={"chance": 0.5})
    viz.write_figure(figure, out / "auroc", title=f"Planted truth, {given.kind}")
    failed = table.loc[table["problem"].notna(), ["pair", "seed", "problem"]].drop_duplicates()
    made = len(table[["pair", "seed"]].drop_duplicates())
    print(means.drop(columns=["level", "unit"]).to_string(index=False))
    print(f"{len(failed)} of {made} pairs failed")
    if len(failed):
        print(failed.to_string(index=False))


if __name__ == "__main__":
    main()
