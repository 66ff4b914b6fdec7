"""What a reader needs beside the numbers: what names and words mean, and when to doubt."""

import re

import pandas as pd

from graftlens.metrics import known
from graftlens.references import are_references, named_in
from graftlens.viz import text
from graftlens.viz.quantities import Quantity, measured, of_summary

#: Nats below which finetuning has changed next to nothing.
TINY = 0.1

#: Names that position grafts have, how their rules begin, and what they stand for.
_SPANS = {
    "FE": ("first_entity", "the tokens of the entity that the prompt names first"),
    "LT": ("last", "the last token, from which what comes next is predicted"),
    "R": ("relation", "the tokens that name the relation between the entity and the answer"),
    "RP": ("relation_preposition", "the preposition that ends the relation"),
}


def glossary(summary: pd.DataFrame) -> dict[str, str]:
    """The names and words that a page of this summary uses -> what they mean."""
    if summary.empty:
        return {}
    base, full = named_in(summary)
    found = {
        "graft": "finetuned weights at some token positions, components and layers, the base's at "
        "all others, in one forward pass"
    }
    found[base] = "the base: the pretrained model's weights everywhere"
    if full is not None:
        found[full] = "the full run: the finetuned model's weights everywhere"
    names = list(dict.fromkeys(summary["graft"].astype(str)))
    spans = (
        summary["span"].fillna("").astype(str)
        if "span" in summary
        else pd.Series("", summary.index)
    )
    at = dict(zip(summary["graft"].astype(str), spans, strict=True))
    for name, (span, meaning) in _SPANS.items():
        used = [n for n in names if name in re.split(r"\W+", n)]
        if any(re.search(rf"\b{span}\b", at[n]) for n in used):
            found[name] = f"finetuned weights at {meaning}"
    if any(n.endswith("^C") or n.startswith("not-") for n in names):
        found["^C, not-"] = "finetuned weights at all other positions: the complement"
    told = measured(summary)
    for name in told:
        if name != "recovery":
            facts = of_summary(summary, name)
            word = "% of texts" if name == "rate" else facts.short or facts.label
            found[word] = _meaning(facts)
    if "recovery" in told and full is not None:
        label = of_summary(summary, str(summary["recovery_of"].iloc[0])).label
        found["recovery"] = (
            f"how much of the difference in {label} between {base} (0) and {full} (1) a graft "
            "covers; below 0 or above 1 is possible"
        )
    found["[low, high]"] = f"{text.level(summary)} interval over {text.resampled(summary)}"
    return found


def nothing_learnt(summary: pd.DataFrame) -> list[str]:
    """Of each group of prompts in which the full run is not better than the base, or by next to
    nothing, a sentence that says so; what grafts bring back is then meaningless. Of models that ran
    one after another, as a training's checkpoints do, it is about the last."""
    if summary.empty or "recovery_of" not in summary:
        return []
    if "member" in summary:
        summary = summary[summary["member"] == summary["member"].iloc[-1]]
    base, full = named_in(summary)
    if full is None:
        return []
    metric = str(summary["recovery_of"].iloc[0])
    if metric not in summary:
        return []
    facts = of_summary(summary, metric)
    found: dict[str, list[str]] = {}
    for name, part in text.groups(summary).items():
        rows = part.assign(graft=part["graft"].astype(str)).set_index("graft")
        if not {base, full} <= set(rows.index) or int(rows["n"].iloc[0]) == 0:
            continue
        gap = float(rows.at[full, metric]) - float(rows.at[base, metric])
        gap = -gap if facts.lower_is_better else gap
        if gap != gap:
            continue
        if gap == 0:
            why = f"{full} and {base} do not differ"
        elif known(metric) is None:  # nobody says which direction is better
            continue
        elif gap < 0:
            why = f"{full} is worse than {base}"
        elif bool(rows.loc[full:full, "recovery"].isna().all()) and _uncertain(part):
            why = f"{full} is not certainly better than {base}"
        elif facts.unit.startswith("nats") and gap < TINY:
            why = f"{full} is better than {base} by less than {TINY:g} nats"
        else:
            continue
        values = " and ".join(f"{end} {text.written(facts, rows.loc[end])}" for end in (base, full))
        found.setdefault(why, []).append(f"{name} ({facts.short or facts.label}: {values})")
    return [
        f"Finetuning has taught nothing that these prompts show: {why} in {'; '.join(where)}. "
        "What a graft brings back of it is then no evidence. Were these facts trained on, and "
        "for long enough?"
        for why, where in found.items()
    ]


def _uncertain(part: pd.DataFrame) -> bool:
    """Whether no graft has a recovery, although prompts ran."""
    return bool(part.loc[~are_references(part), "recovery"].isna().all())


def _meaning(facts: Quantity) -> str:
    """What a measure is, in words."""
    if found := re.fullmatch(r"top(\d+)", facts.name):
        most = "the likeliest" if found[1] == "1" else f"among the {found[1]} likeliest"
        return f"share of prompts in which the answer's first token is {most} as the next token"
    if found := re.fullmatch(r"KL\(graft ‖ (.+)\)", facts.label):
        return (
            f"how far the distribution of the next token is from that of {found[1]} "
            f"(Kullback–Leibler divergence, {facts.unit}); 0 is the same"
        )
    if facts.name == "rate":
        return "share of a graft's texts that have what is measured, or the label"
    return facts.title
