"""How often a sweep's texts are this or that, from its folder: tables, and what pages show."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from graftlens.folder import at_home
from graftlens.outcomes.rates import rate
from graftlens.references import MEMBERS
from graftlens.stats import GRAFT_COLUMNS
from graftlens.sweep.results import Manifest, facts_of, read_manifest
from graftlens.sweep.texttables import read_texts
from graftlens.viz.tables import write_table
from graftlens.viz.textspage import Rates, Texts, shown_texts

#: The tables of rates in a sweep's folder, without the endings.
RATES = "rates"

#: Most groups of prompts (templates of a dataset) that are shown one by one.
GROUPS = 8


def text_rates(
    folder: str | Path,
    *,
    by: Sequence[str] = (),
    facts: "pd.Series[str] | None" = None,
    without: Collection[str] = (),
) -> pd.DataFrame:
    """The rates of a sweep's texts: `graftlens.outcomes.rate` of what its config measures.

    Args:
        folder: the sweep's, finished.
        by: columns by which prompts are grouped; those of members are always among them.
        facts: prompt's number -> its fact, if prompts of one fact belong together.
        without: grafts to leave out.

    Returns:
        As `rate`, with columns `base_run`, `full_run`, `share` (whether the measure says which
        share of texts is so, and not a mean) and `recovery_of`; no rows where nothing is measured.

    Raises:
        ValueError: a folder without texts.
    """
    folder = at_home(folder)
    manifest = read_manifest(folder)
    names = measures_of(manifest)
    texts = read_texts(folder)
    texts = texts[~texts["graft"].isin(set(without))].reset_index(drop=True)
    lead = [*(MEMBERS if manifest.members else ()), *by]
    names = [name for name in names if name in texts]
    if not names or texts["text"].isna().all():
        return pd.DataFrame(columns=[*lead, "graft", "measure", "label", "share"])
    unit = "prompt"
    if facts is not None:
        texts, unit = texts.assign(fact=facts.reindex(texts["prompt"]).to_numpy()), "fact"
    found = rate(texts, names, by=lead, unit=unit, seed=manifest.config["seed"])
    shares = {name: _is_share(texts[name]) for name in names}
    ends = {f"{run}_run": name for run, name in manifest.recovery.items()}
    return found.assign(share=found["measure"].map(shares), **ends, recovery_of="rate")


def measures_of(manifest: Manifest) -> list[str]:
    """The names of a sweep's measures of texts."""
    return [*((manifest.config.get("outcomes") or {}).get("measures") or ())]


def _is_share(values: "pd.Series[float]") -> bool:
    """Whether a measure's mean is a share of texts: it is a label, or yes or no."""
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return True
    return bool(values.dropna().isin([0.0, 1.0]).all())


def rate_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Rates as tables in files have them: intervals named by their columns, and no column that
    holds nothing."""
    found = rates.rename(columns={"low": "rate_low", "high": "rate_high"}).drop(columns="share")
    lead = [c for c in found if c in (*MEMBERS, "dataset", "template", "measure", "label")]
    empty = [c for c in ("label",) if c in found and found[c].isna().all()]
    rest = [c for c in found if c not in lead and c not in GRAFT_COLUMNS]
    return found[[*lead, *rest]].drop(columns=empty)


def rare_in(texts: pd.DataFrame, ends: Collection[str]) -> dict[str, int]:
    """Grafts whose texts were generated on fewer than half as many prompts as those of the ends of
    recovery, and on how many: with them, few prompts would count."""
    ran = texts[texts["text"].notna()].groupby("graft", sort=False)["prompt"].nunique()
    counts = {str(g): int(ran.get(g, 0)) for g in dict.fromkeys(texts["graft"])}
    least = min(counts[end] for end in ends) / 2
    return {name: n for name, n in counts.items() if n < least and name not in ends}


def texts_shown(folder: Path, manifest: Manifest) -> tuple[Texts, Rates, list[str]]:
    """What a sweep's page shows of its texts, their rates (of the last member where there are
    several), and notes. The rates are written into the folder, too."""
    ends = tuple(manifest.recovery.values())
    texts = read_texts(folder)
    rare = rare_in(texts, ends)
    notes = [
        f"{name} has texts of {n} prompts only. It is left out of rates, in which a prompt counts "
        "only if it ran under every graft."
        for name, n in rare.items()
    ]
    facts = facts_of(folder)
    rates = text_rates(folder, facts=None if facts.is_unique else facts, without=rare)
    apart = pd.DataFrame()
    if len(rates):
        write_table(rate_table(rates), folder / RATES, caption="Rates of generated texts")
        by = [name for name in ("dataset", "template") if texts[name].nunique() > 1]
        if "template" in by and len(texts[by].drop_duplicates()) <= GROUPS:
            apart = text_rates(folder, by=by, without=rare)
    grafts = [str(graft["name"]) for graft in manifest.grafts]
    ordered = [*dict.fromkeys((*ends, *grafts))]
    spans = {str(graft["name"]): graft["span"] for graft in manifest.grafts}
    rates = rates.assign(span=rates["graft"].map(spans))
    found = Rates(rates, apart)
    shown = shown_texts(texts, found, measures_of(manifest), ordered)
    if manifest.members and len(rates):
        last = rates["member"] == manifest.members[-1]["name"]
        found = Rates(rates[last].drop(columns=[*MEMBERS]))
    return shown, found, notes
