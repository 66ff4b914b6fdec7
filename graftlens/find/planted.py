"""Planted truth: how far a localisation can be believed.

Where facts are is not known of real models. Of a planted pair it is (`graftlens.find.planting`), so
that every method can be scored by how well it ranks what was planted: a function of (model,
prompts, source) to a score for each (component, layer), and one line in `SCORERS`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from graftlens.evaluation import evaluate
from graftlens.find.attribution import attribute
from graftlens.find.interactions import interactions
from graftlens.find.localisation import localise
from graftlens.find.planting import BASE, SOURCE, Planting, Recipe, Trained, put, train
from graftlens.find.ranks import auroc, average_precision
from graftlens.graft import Graft
from graftlens.lens.patching import patching
from graftlens.lens.weights import weight_difference
from graftlens.model.arch import Architecture, Site
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

__all__ = [
    "SCORERS",
    "Planted",
    "Planting",
    "Recipe",
    "Scorer",
    "auroc",
    "average_precision",
    "checked",
    "gate",
    "plant",
    "scored",
    "searched",
    "suite",
]

#: (model, prompts, source) -> a score for each (component, layer), the higher the more of the fact.
Scorer = Callable[[GraftedTransformer, Sequence[Prompt], str], Mapping[Site, float]]

#: What has to be true of a pair: the least recovery of what brings A back, the most of what does
#: not.
ENOUGH, TOO_LITTLE = 0.9, 0.1

#: The measure of recovery.
METRIC = "answer_logprob"


@dataclass(frozen=True, eq=False)
class Planted:
    """A pair of which it is known where facts A are.

    Attributes:
        planting: where they were planted.
        model: with the sources `pre` and `sft`.
        prompts: about facts A.
        truth: the (component, layer) pairs that have some of M.
        checks: a row per graft that was checked: `graft`, `recovery` of the answers'
            log-probability from `pre` to `sft`, `at_least` or `at_most` (NaN where none), and `ok`.
        problems: what did not work; empty if the pair can be used.
    """

    planting: Planting
    model: GraftedTransformer
    prompts: tuple[Prompt, ...]
    truth: frozenset[Site]
    checks: pd.DataFrame
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the planting worked."""
        return not self.problems


def plant(
    base: Any,
    copy: Any,
    tokenizer: Any,
    planting: Planting,
    known: Sequence[Prompt],
    others: Sequence[Prompt],
    texts: Sequence[str] = (),
    recipe: Recipe | None = None,
    *,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Planted, Trained]:
    """Train a pair and check it; see `graftlens.find.planting`.

    Args:
        base: a Hugging Face model, which is left untouched.
        copy: another model of its config, which gets the trained tensors.
        tokenizer: their tokenizer.
        planting: where facts A are planted.
        known: prompts about facts A, with answers.
        others: prompts about facts B.
        texts: plain text.
        recipe: how to train.
        say: called with a line at each look.

    Raises:
        ValueError: as `graftlens.find.planting.train`. A pair that did not work is returned, with
            its problems.
    """
    trained = train(base, tokenizer, planting, known, others, texts, recipe, say=say)
    pair = {BASE: base, SOURCE: put(copy, trained.tensors)}
    return checked(pair, tokenizer, planting, known, trained.problems), trained


def checked(
    sources: Mapping[str, Any],
    tokenizer: Any,
    planting: Planting,
    prompts: Sequence[Prompt],
    problems: Sequence[str] = (),
) -> Planted:
    """A pair with its checks: M alone brings A back, and everything but M does not; of two groups,
    each alone does not (`and`) or does (`or`).

    Args:
        sources: `pre` and `sft`, as `GraftedTransformer.from_pretrained` takes them.
        tokenizer: their tokenizer, if they are models and not folders.
        planting: where facts A were planted.
        prompts: about facts A.
        problems: what is known to have gone wrong in training.
    """
    model = GraftedTransformer.from_pretrained(dict(sources), tokenizer=tokenizer, verbose=False)
    wanted = _wanted(planting)
    grafts = {name: graft for name, (graft, _, _) in wanted.items()}
    table = evaluate(model, list(prompts), {BASE: Graft(), SOURCE: Graft.rule(SOURCE), **grafts},
                     progress=False)  # fmt: skip
    value = table.groupby("graft", observed=True)[METRIC].mean()
    whole = value[SOURCE] - value[BASE]
    rows = []
    for name, (_, least, most) in wanted.items():
        recovery = float((value[name] - value[BASE]) / whole)
        ok = not (recovery < least) and not (recovery > most)
        rows.append({"graft": name, "recovery": recovery, "at_least": least, "at_most": most,
                     "ok": ok})  # fmt: skip
    wrong = [f"{row['graft']} recovers {row['recovery']:.3f}" for row in rows if not row["ok"]]
    same = {
        f"{component}{'' if layer is None else f' of layer {layer}'}"
        for component, layer in model.arch.sites
        if len({*model.equal_sources(component, layer)}) == 1
    }
    wrong += [f"{', '.join(sorted(same))}: the same in both sources"] if same else []
    return Planted(
        planting,
        model,
        tuple(prompts),
        planting.sites(model.arch),
        pd.DataFrame(rows),
        (*problems, *wrong),
    )


def _wanted(planting: Planting) -> dict[str, tuple[Graft, float, float]]:
    """Name -> (graft, the least recovery, the most)."""
    brings, does_not = (ENOUGH, np.inf), (-np.inf, TOO_LITTLE)

    def without(graft: Graft) -> Graft:
        back = tuple(
            Graft.rule(BASE, r.at, r.components, r.layers, r.heads).rules[0] for r in graft.rules
        )
        return Graft.rule(SOURCE) | Graft(back)

    found = {
        "M": (planting.graft(), *brings),
        "everything but M": (without(planting.graft()), *does_not),
    }
    for number in range(len(planting.groups)) if planting.gate else ():
        alone = brings if planting.gate == "or" else does_not
        own = planting.graft(number)
        found[f"group {number} alone"] = (own, *alone)
        found[f"everything but group {number}"] = (without(own), *alone)
    return found


# -- scoring ---------------------------------------------------------------------------------


def _weights(column: str) -> Scorer:
    def scores(
        model: GraftedTransformer, prompts: Sequence[Prompt], source: str
    ) -> dict[Site, float]:
        table = weight_difference(model, source, spectra=False)
        rows = table[table["parameter"] == "weight"]
        return _by_site(model.arch, rows, column)

    return scores


def _patched(
    model: GraftedTransformer, prompts: Sequence[Prompt], source: str
) -> dict[Site, float]:
    """Cross-model activation patching of each site at all positions: the gain in log-probability.

    The output of `ln_final` and `unembed` is the answer itself, so that they are not patched (NaN).
    """
    grafts = _each_site(model.arch, source)
    table = patching(model, list(prompts), list(grafts.values()), patches_only=True)
    value = table.groupby("graft", observed=True)["logprob"].mean()
    base = value[str(table["base_run"].iloc[0])]
    return {site: float(value[f"{graft} (patched)"] - base) for site, graft in grafts.items()}


def _attributed(*columns: str, steps: int | Literal["auto"] = 1) -> Scorer:
    """The mean of some columns of `attribute`, at all positions together.

    The gradients at the ends need no integral, so that one node is enough, and what it does not add
    up to is nothing to warn of.
    """

    def scores(
        model: GraftedTransformer, prompts: Sequence[Prompt], source: str
    ) -> dict[Site, float]:
        with warnings.catch_warnings():
            if steps == 1:
                warnings.simplefilter("ignore", UserWarning)
            table = attribute(model, list(prompts), source, positions=["all"], steps=steps)
        each = [_by_site(model.arch, table, column) for column in columns]
        return {site: sum(found[site] for found in each) / len(each) for site in each[0]}

    return scores


def _exact(*, missing: bool = False) -> Scorer:
    """What each site adds to the base, or what the full source lacks without it, by exact grafts at
    all positions: half of what `exact_effects` runs."""

    def scores(
        model: GraftedTransformer, prompts: Sequence[Prompt], source: str
    ) -> dict[Site, float]:
        start, put = (Graft.rule(source), BASE) if missing else (Graft(), source)
        grafts = {site: start | graft for site, graft in _each_site(model.arch, put).items()}
        table = evaluate(model, list(prompts), [start, *grafts.values()], answers="first", top_k=1,
                         progress=False)  # fmt: skip
        value = table.groupby("graft", observed=True)["logprob"].mean()
        change = {site: float(value[str(g)] - value[str(start)]) for site, g in grafts.items()}
        return {site: -found if missing else found for site, found in change.items()}

    return scores


def _each_site(arch: Architecture, source: str) -> dict[Site, Graft]:
    """A graft of each site at all positions."""
    layers: dict[Site, Any] = {site: "all" if site[1] is None else [site[1]] for site in arch.sites}
    return {site: Graft.rule(source, "all", [site[0]], layers[site]) for site in arch.sites}


def chance(seed: int = 0) -> Scorer:
    """Scores drawn at random."""

    def scores(
        model: GraftedTransformer, prompts: Sequence[Prompt], source: str
    ) -> dict[Site, float]:
        drawn = np.random.default_rng(seed).random(len(model.arch.sites))
        return dict(zip(model.arch.sites, drawn.tolist(), strict=True))

    return scores


def _by_site(arch: Architecture, table: pd.DataFrame, column: str) -> dict[Site, float]:
    """A column's sum over positions and units, and mean over prompts, of each site."""
    layer = pd.to_numeric(table["layer"].astype(object), errors="coerce").fillna(-1).astype(int)
    value = pd.to_numeric(table[column].astype(object), errors="coerce")
    sums = value.groupby([table["component"].astype(str), layer]).sum()
    count = max(1, table["prompt"].nunique()) if "prompt" in table else 1
    return {
        (component, layer): float(sums[str(component), -1 if layer is None else layer]) / count
        for component, layer in arch.sites
    }


#: The methods by name. One of your own is a line: `SCORERS["mine"] = my_function`.
SCORERS: dict[str, Scorer] = {
    "integrated gradients": _attributed("ig", steps="auto"),
    "gradient at base": _attributed("at_base"),
    "gradient at full": _attributed("at_full"),
    "mean of both gradients": _attributed("at_base", "at_full"),
    "each site alone": _exact(),
    "each site missing": _exact(missing=True),
    "weight difference": _weights("frobenius"),
    "relative weight difference": _weights("relative_frobenius"),
    "activation patching": _patched,
    "random": chance(),
}


def scored(pairs: Sequence[Planted], scorers: Mapping[str, Scorer] | None = None) -> pd.DataFrame:
    """Each method on each pair: how well its scores rank the planted (component, layer) pairs.

    Args:
        pairs: the pairs; those that did not work have rows with their `problem` and no numbers.
        scorers: the methods; by default `SCORERS`.

    Returns:
        A row per pair and method: `pair`, `method`, `auroc`, `average_precision`, `planted` and
        `sites` (how many there are), `problem`.

    Raises:
        ValueError: a method that gives no score to a planted place.
    """
    rows = []
    for pair in pairs:
        for name, scorer in (SCORERS if scorers is None else scorers).items():
            row: dict[str, Any] = {"pair": pair.planting.name, "method": name}
            row |= {"auroc": np.nan, "average_precision": np.nan}
            row |= {"planted": len(pair.truth), "sites": len(pair.model.arch.sites)}
            row["problem"] = "; ".join(pair.problems) or None
            if pair.ok:
                scores = scorer(pair.model, pair.prompts, SOURCE)
                row["auroc"] = auroc(scores, pair.truth)
                row["average_precision"] = average_precision(scores, pair.truth)
            rows.append(row)
    return pd.DataFrame(rows)


def gate(pair: Planted, *, seed: int = 0) -> pd.DataFrame:
    """What `interactions` calls the two groups of a pair that has a gate, measure by measure.

    Returns:
        `pairs` of `find.interactions`, in the answers' log-probability and in top-1.

    Raises:
        ValueError: a pair without a gate.
    """
    if pair.planting.gate is None:
        raise ValueError(f"pair {pair.planting.name!r} has one group, and so no gate.")
    players = {f"group {n}": pair.planting.graft(n) for n in range(len(pair.planting.groups))}
    found = interactions(
        pair.model,
        list(pair.prompts),
        players,
        metrics=(METRIC, "top1"),
        seed=seed,
        progress=False,
    )
    return found.pairs.assign(pair=pair.planting.name, planted=pair.planting.gate.upper())


def searched(pair: Planted, *, target: float | int = 0.9, seed: int = 0) -> dict[str, Any]:
    """What `localise` finds of a pair at all positions together, against what was planted.

    Returns:
        `pair`, `precision` (the share of found (component, layer) pairs that have some of M),
        `recall` (the share of those with some of M that were found), `found` (how many), `reached`
        (whether the target was), `planted`.

    Raises:
        ValueError: prompts of fewer facts than a search and its report need.
    """
    found = localise(
        pair.model,
        list(pair.prompts),
        SOURCE,
        positions=["all"],
        target=target,
        random=1,
        resamples=1,
        seed=seed,
    )
    there = {(place.component, place.layer) for place in found.places}
    hits = len(there & pair.truth)
    return {
        "pair": pair.planting.name,
        "precision": hits / len(there) if there else np.nan,
        "recall": hits / len(pair.truth),
        "found": len(there),
        "planted": len(pair.truth),
        "reached": found.reached,
    }


# -- the plantings ---------------------------------------------------------------------------


def suite(arch: Architecture) -> tuple[Planting, ...]:
    """Eight plantings for a model of four layers or more.

    MLPs of a few layers; v and o of a few layers; the embeddings; one whole layer; an early and a
    late MLP that are both needed; an early MLP and a late attention each of which is enough; a
    single head; heads spread over layers.

    Raises:
        ValueError: a model of fewer than four layers.
    """
    n = arch.n_layers
    if n < 4:
        raise ValueError(f"a model of {n} layers: the plantings need four or more.")
    few = f"{n // 4}-{max(n // 4, n // 2 - 1)}"
    middle, early, late = n // 2, f"0-{max(0, n // 8)}", f"{n - 1 - max(0, n // 8)}-{n - 1}"
    group = arch.n_heads // arch.n_kv_heads

    def head(layer: int, number: int) -> str:
        where = f"{SOURCE} @ all : "
        return f"{where}q + o : {layer} : {number} | {where}k + v : {layer} : {number // group}"

    spread = [head(n * i // 4, (2 * i + 1) % arch.n_heads) for i in range(3)]
    return (
        Planting("MLPs", (f"{SOURCE} @ all : mlp : {few}",)),
        Planting("v and o", (f"{SOURCE} @ all : v + o : {few}",)),
        Planting("embeddings", (f"{SOURCE} @ all : embed + unembed",)),
        Planting("a layer", (f"{SOURCE} @ all : block : {middle}",)),
        Planting(
            "both needed",
            (f"{SOURCE} @ all : mlp : {early}", f"{SOURCE} @ all : mlp : {late}"),
            "and",
        ),
        Planting(
            "either enough",
            (f"{SOURCE} @ all : mlp : {early}", f"{SOURCE} @ all : attn : {late}"),
            "or",
        ),
        Planting("a head", (head(middle, 1),)),
        Planting("heads", (" | ".join(spread),)),
    )
