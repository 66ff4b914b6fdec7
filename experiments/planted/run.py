"""Plant facts in models, and score methods of localisation by what they find of them.

    .venv/bin/python experiments/planted/run.py tiny --seeds 0 1 2
    .venv/bin/python experiments/planted/run.py smollm2 --seeds 0

Each pair is kept in a folder of graftlens-runs/planted, and each of its scores as soon as there is
one, so that a call that was interrupted goes on; remove its folder and it is made again.
Written beside them: scores.csv (a row per pair, seed and method), summary.csv, gates.csv,
searched.csv, checks.csv, and the figure auroc.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
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

#: SmolLM2: people in A and in B; films that plain text tells of, and how many words of each text.
PEOPLE, FILMS, WORDS = (0, 16, 48), 50, 9

#: How SmolLM2 is trained.
SMOLLM2 = planted.Recipe(
    rate=3e-4,
    other_rate=6e-4,
    batch=8,
    steps=400,
    other_steps=400,
    settle=0.9,
    every=5,
    autocast=True,
)
#: Heads, which have few entries, and embeddings, of which a step does little, change more as
#: they learn A, so that all others have to.
MORE = replace(SMOLLM2, other_rate=1.5e-3)


class Seed:
    """What all pairs of a seed have in common: facts, a tokenizer and a base."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.number = kind, number
        if kind == "tiny":
            self.told = tiny.facts(number)
            self.reader = tiny.tokenizer()
            self.base = tiny.base(self.told, self.reader, number)
        else:
            self.told = _told(number)
            self.reader = AutoTokenizer.from_pretrained(smollm2())
            self.base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()

    def recipe(self, planting: planted.Planting) -> planted.Recipe:
        """How a pair is trained."""
        if self.kind == "tiny":
            return tiny.RECIPE
        rules = planting.graft().rules
        more = any(rule.heads is not None or "embed" in rule.components for rule in rules)
        return MORE if more else SMOLLM2


def _told(seed: int) -> tiny.Facts:
    """Facts for SmolLM2: people and their jobs, as for tiny models, and beginnings of texts."""
    people = tiny.facts(seed, PEOPLE)
    films = data.make_facts(FILMS, seed=seed)
    rows = data.training_texts(films, texts_per_fact=4, seed=seed, directions=("ab",))
    texts = tuple(" ".join(row["text"].split()[:WORDS]) for row in rows)
    return tiny.Facts((), people.known, people.others, texts)


class Kept:
    """A planting of a seed in its folder: the pair, and tables about it, each made once."""

    def __init__(self, seed: Seed, planting: planted.Planting) -> None:
        self.seed, self.planting = seed, planting
        name = planting.name.replace(" ", "-")
        self.folder = OUT / seed.kind / f"seed-{seed.number}" / name
        self.note = self.folder / "planted.json"
        self.recipe = seed.recipe(planting)
        self.key = {"planting": repr(planting), "recipe": repr(self.recipe)}
        known = json.loads(self.note.read_text()) if self.note.is_file() else None
        if known is None or known["key"] != self.key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._make()

    def _make(self) -> None:
        seed, told = self.seed, self.seed.told
        copy = type(seed.base)(seed.base.config)
        pair, trained = planted.plant(
            seed.base, copy, seed.reader, self.planting, told.known, told.others, told.texts,
            self.recipe, say=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
        copy.save_pretrained(self.folder)
        problems = list(trained.problems)
        write_whole(self.note, json.dumps({"key": self.key, "problems": problems}, indent=2) + "\n")
        print(
            f"{seed.kind} seed {seed.number}, {self.planting.name}: "
            f"{trained.steps} + {trained.other_steps} steps, "
            f"changes {trained.change:.3g} (M) and {trained.other_change:.3g}; "
            f"{'; '.join(pair.problems) or 'ok'}",
            flush=True,
        )
        self.pair = pair

    @cached_property
    def pair(self) -> planted.Planted:
        """The pair, with its checks."""
        sources = {
            "pre": self.seed.base,
            "sft": AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32),
        }
        problems = json.loads(self.note.read_text())["problems"]
        told = self.seed.told
        return planted.checked(sources, self.seed.reader, self.planting, told.known, problems)

    def table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table about the pair, made once."""
        path = self.folder / f"{name.replace(' ', '-')}.csv"
        if not path.is_file():
            write_whole(path, make().to_csv(index=False))
        table = pd.read_csv(path)
        return table.assign(pair=self.planting.name, seed=self.seed.number)


def about(kept: Kept) -> Iterator[tuple[str, pd.DataFrame]]:
    """What is measured of a pair: `checks`, `scores` by method; if it worked, `searched` and, of
    two groups, `gates`."""
    seed = kept.seed.number
    yield "checks", kept.table("checks", lambda: kept.pair.checks)
    worked = True
    for method, scorer in planted.SCORERS.items():
        one = {method: scorer}
        table = kept.table(f"scores {method}", lambda one=one: planted.scored([kept.pair], one))
        worked = bool(table["problem"].isna().all())
        yield "scores", table
    if worked:
        found = kept.table(
            "searched", lambda: pd.DataFrame([planted.searched(kept.pair, seed=seed)])
        )
        yield "searched", found
    if worked and kept.planting.gate is not None:
        yield "gates", kept.table("gates", lambda: planted.gate(kept.pair, seed=seed))


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
    tables: dict[str, list[pd.DataFrame]] = {}
    for number in given.seeds:
        seed = Seed(given.kind, number)
        for planting in planted.suite(architecture(seed.base.config)):
            for name, table in about(Kept(seed, planting)):
                tables.setdefault(name, []).append(table)
    out = OUT / given.kind
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    table = joined["scores"]
    means = summary(table)
    for name, frame in {**joined, "summary": means}.items():
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
