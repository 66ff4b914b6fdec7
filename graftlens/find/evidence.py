"""What a found set does on facts that the search did not see, beside what it is compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from graftlens.find.judging import BASE, FULL, Judge, pivoted, recovery
from graftlens.find.matched import matched_sets
from graftlens.find.places import Place
from graftlens.find.splitting import Split
from graftlens.graft import Graft
from graftlens.references import marked
from graftlens.stats import compare_all, summarise

#: Names of the found set and of what is left without it, in tables.
FOUND, REST = "found", "complement"

#: Shares of the places at which MIB evaluates a circuit's curve.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

#: Recoveries that differ by less are equal: the same set in another batch.
ROUNDING = 1e-6

#: Likeliest tokens that runs keep.
TOP = 5

#: Most sign patterns for one p-value of a difference.
PERMUTATIONS = 10_000


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured on the prompts that results are reported on.

    Attributes:
        summary: a row for the found set, its complement, the references and each comparison, as
            `graftlens.summarise` gives it, with intervals over facts.
        table: the rows behind the summary, one for each prompt and graft, with the column `fact`.
        differences: the found set minus its complement and minus each comparison, on the same
            facts: a row for each in recovery, top-1, top-5 and KL divergence from the full run, as
            `graftlens.stats.compare_all` gives it.
        curve: a row for each size of nested sets: `size`, `share`, `recovery` and `rest` (that of
            the complement), each with its interval.
        cpr, cmd: areas of the curve. With f(k) the recovery of the nested set with the share k of
            all places, the circuit performance ratio is the integral of f over k from 0 to 1, and
            the circuit-model distance that of |1 − f|, both by the trapezoidal rule over the shares
            in `SHARES` (Mueller et al. 2025, *MIB: A Mechanistic Interpretability Benchmark*, ICML,
            arXiv 2504.13151, section 3) and 0, where f is 0. A CPR near 1 with a CMD near 0 is a
            small set that does all; overshoot raises both.
        random: a row for each random set: `draw`; `enough` and `without`, NaN where the goal does
            not ask for it; unless texts judge, `top1`, `top5` (shares of prompts) and `kl_full`
            (a mean, in nats) of the set in the base, or of what is left without it where the goal
            is `necessary`.
        p_value: of the hypothesis that the found set does no better than a random one that is
            matched by component and position: (1 + how many do at least as well) / (1 + how many
            were drawn); NaN where no other set is like the found one. With `goal="both"`, the
            larger of the two.
        failures: prompts whose answer the found set does not put first: `prompt`, `text`,
            `answer`, `rank`, `prob`, `says` and `says_prob` (its likeliest token), `full_rank`,
            `full_says`, `base_says`. Where texts judge, the prompts on which its texts are at least
            as near to the base's as to the full source's: the measure, and the first text, of each.
    """

    summary: pd.DataFrame
    table: pd.DataFrame
    differences: pd.DataFrame
    curve: pd.DataFrame
    cpr: float
    cmd: float
    random: pd.DataFrame
    p_value: float
    failures: pd.DataFrame


def evidence(
    judge: Judge,
    found: Sequence[Place],
    order: Sequence[Place],
    searched: Sequence[Place],
    split: Split,
    compare: Mapping[str, Graft],
    *,
    random: int,
    seed: int,
) -> Evidence:
    """Run everything that is reported, on held-out prompts only.

    Args:
        judge: runs grafts, and says what a set is put into and taken out of.
        found: the found set.
        order: all sites in the order of their scores, for the curve.
        searched: all sites.
        split: the prompts.
        compare: name -> graft to compare with.
        random: how many random sets to draw.
        seed: of the draws and of the bootstrap.
    """
    numbers = split.held_out
    own = {FOUND: judge.put_in(found), REST: judge.taken_out(found)}
    judge.say(f"reporting on {len(numbers)} prompts: the found set, comparisons, the curve")
    tables = [judge.run("found", numbers, own)]
    if others := {n: g for n, g in compare.items() if g not in (judge.base, judge.full)}:
        tables.append(_without_ends(judge.run("compared", numbers, others)))
    facts = {number: split.groups[number] for number in numbers}
    table = _told(pd.concat(tables, ignore_index=True), facts)
    curve = _curve(judge, order, numbers, facts, seed)
    if random:
        judge.say(f"{random} random sets, matched by component and position")
    drawn, p_value = _random(judge, found, searched, numbers, table, random, seed)
    return Evidence(
        summary=_summarised(table, judge, seed),
        table=table,
        differences=_differences(table, judge, seed),
        curve=curve,
        cpr=_area(curve, lambda f: f),
        cmd=_area(curve, lambda f: abs(1 - f)),
        random=drawn,
        p_value=p_value,
        failures=unlike(table, judge.metric) if judge.of_texts else failures(table),
    )


def _without_ends(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["graft"].isin([BASE, FULL])]


def _told(table: pd.DataFrame, facts: Mapping[int, str]) -> pd.DataFrame:
    """A table with its references' names, and each prompt's fact."""
    kept = table.drop(columns=[c for c in ("base_run", "full_run") if c in table])
    rows = kept.astype({"graft": object}).reset_index(drop=True)
    return marked(rows, BASE, FULL).assign(fact=rows["prompt"].map(facts))


def _summarised(table: pd.DataFrame, judge: Judge, seed: int) -> pd.DataFrame:
    metrics = dict.fromkeys((judge.metric, *(() if judge.of_texts else ("logprob", "kl_full"))))
    return summarise(
        table,
        by=(),
        ks=() if judge.of_texts else (1, TOP),
        metrics=[*metrics],
        recovery=judge.metric,
        unit="fact",
        seed=seed,
    )


def _differences(table: pd.DataFrame, judge: Judge, seed: int) -> pd.DataFrame:
    """The found set minus each other graft, paired."""
    others = [name for name in dict.fromkeys(table["graft"]) if name not in (FOUND, BASE, FULL)]
    pairs = [(FOUND, name) for name in others]
    compared = (judge.metric,) if judge.of_texts else ("top1", f"top{TOP}", "kl_full")
    return pd.concat(
        [
            compare_all(
                table,
                pairs,
                metric=what,
                recovery=judge.metric,
                unit="fact",
                permutations=PERMUTATIONS,
                seed=seed,
            )
            for what in ("recovery", *compared)
        ],
        ignore_index=True,
    )


def _curve(
    judge: Judge,
    order: Sequence[Place],
    numbers: Sequence[int],
    facts: Mapping[int, str],
    seed: int,
) -> pd.DataFrame:
    """Recovery over size, with intervals."""
    count = len(order)
    sizes = sorted({int(share * count) for share in SHARES} - {0})
    grafts = {f"{size}": judge.put_in(order[:size]) for size in sizes}
    grafts |= {f"~{size}": judge.taken_out(order[:size]) for size in sizes}
    table = _told(judge.run("curve", numbers, grafts), facts)
    said = summarise(
        table, by=(), ks=(), metrics=(), recovery=judge.metric, unit="fact", seed=seed
    ).set_index("graft")
    ends = ("", "_low", "_high")
    rows: list[dict[str, float]] = []
    for size in (0, *sizes):
        names = (BASE, FULL) if size == 0 else (f"{size}", f"~{size}")
        row: dict[str, float] = {"size": size, "share": size / count}
        for what, name in zip(("recovery", "rest"), names, strict=True):
            row |= {f"{what}{end}": float(said.at[name, f"recovery{end}"]) for end in ends}
        rows.append(row)
    return pd.DataFrame(rows).astype({"size": int})


def _area(curve: pd.DataFrame, height: object) -> float:
    """The area under some function of recovery, from no place to all, by the trapezoidal rule."""
    assert callable(height)
    shares = curve["share"].tolist()
    heights = [height(value) for value in curve["recovery"].tolist()]
    steps = zip(shares, shares[1:], heights, heights[1:], strict=False)
    return float(sum((right - left) * (a + b) / 2 for left, right, a, b in steps))


def _random(
    judge: Judge,
    found: Sequence[Place],
    searched: Sequence[Place],
    numbers: Sequence[int],
    table: pd.DataFrame,
    count: int,
    seed: int,
) -> tuple[pd.DataFrame, float]:
    """The recoveries of random sets, and how often they do as well as the found one."""
    columns = ["draw", "enough", "without"]
    columns += [] if judge.of_texts else ["top1", f"top{TOP}", "kl_full"]
    sets = matched_sets(found, searched, judge.arch, count=count, seed=seed) if count else []
    if not sets:
        return pd.DataFrame(columns=columns, dtype=float), math.nan
    judged, ran = judge.judged("random", numbers, sets)
    shown = "without" if judge.goal == "necessary" else "set"
    of = dict(list(ran.groupby("graft", sort=False)))
    rows: list[list[float]] = []
    for i, one in enumerate(judged):
        rows.append([i, one.enough, one.without])
        if not judge.of_texts:
            mine = of[f"{shown} {i}"]
            ranks = mine["rank"].astype(float)
            hits = [float((ranks <= k).mean()) for k in (1, TOP)]
            rows[-1] += [*hits, float(mine["kl_full"].mean())]
    _, values = pivoted(table, judge.metric)
    own = {name: recovery(values[name], values[BASE], values[FULL]) for name in (FOUND, REST)}
    better = {
        "sufficient": np.array([one.enough >= own[FOUND] - ROUNDING for one in judged]),
        "necessary": np.array([one.without <= own[REST] + ROUNDING for one in judged]),
    }
    asked = [hits for goal, hits in better.items() if judge.goal in (goal, "both")]
    drawn = pd.DataFrame(rows, columns=columns).astype({"draw": int})
    return drawn, max((1 + int(hits.sum())) / (1 + len(sets)) for hits in asked)


def unlike(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The prompts on which the found set's texts are, by their measure, at least as near to the
    base's as to the full source's, and the first text of each."""
    rows = {name: part.set_index("prompt") for name, part in table.groupby("graft", sort=False)}
    found, full, base = rows[FOUND], rows[FULL], rows[BASE]
    apart = [(one[metric] - found[metric]).abs() for one in (full, base)]
    wrong = found[(apart[0] >= apart[1]) & (full[metric] != base[metric])]
    return pd.DataFrame(
        {
            "prompt": number,
            "text": row["text"],
            metric: float(row[metric]),
            "says": row["says"],
            **{
                f"{name}_{what}": one.at[number, column]
                for name, one in (("full", full), ("base", base))
                for what, column in ((metric, metric), ("says", "says"))
            },
        }
        for number, row in wrong.iterrows()
    )


def failures(table: pd.DataFrame) -> pd.DataFrame:
    """The prompts whose answer the found set does not put first, and what it says instead."""
    rows = {name: part.set_index("prompt") for name, part in table.groupby("graft", sort=False)}
    found, full, base = rows[FOUND], rows[FULL], rows[BASE]
    wrong = found[found["rank"].astype(float) > 1]
    return pd.DataFrame(
        {
            "prompt": number,
            "text": row["text"],
            "answer": row["answer"],
            "rank": int(row["rank"]),
            "prob": float(row["prob"]),
            "says": row["top_tokens"][0],
            "says_prob": float(row["top_probs"][0]),
            "full_rank": int(full.at[number, "rank"]),
            "full_says": full.at[number, "top_tokens"][0],
            "base_says": base.at[number, "top_tokens"][0],
        }
        for number, row in wrong.iterrows()
    )
