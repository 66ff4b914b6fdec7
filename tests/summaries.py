"""Results tables with known numbers, and their summaries, for tests of what shows them."""

import itertools

import numpy as np
import pandas as pd

from graftlens import stats

NO_RULE = dict.fromkeys(stats.GRAFT_COLUMNS)
ENDS = {
    "PRE": NO_RULE,
    "SFT": dict.fromkeys(stats.GRAFT_COLUMNS, "all") | {"source": "sft", "strength": 1.0},
}


def site(component="o", layer="0", span="last", source="sft", head="all"):
    """Name and tidy columns of a graft with one rule."""
    values = (source, span, component, layer, head, "all", 1.0)
    name = f"{source} @ {span} : {component} : {layer}"
    return {name: dict(zip(stats.GRAFT_COLUMNS, values, strict=True))}


def results(grafts, strength, *, templates=("headline",), n=24, seed=0):
    """A table in which graft g has rank 1 for about strength[g] of a template's prompts."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, template in enumerate(templates):
        for i, (graft, about) in itertools.product(range(n), grafts.items()):
            lift = strength[graft] + rng.normal() * 0.05
            rank = 1.0 if i < strength[graft] * n else 100.0
            row = {"prompt": number * n + i, "graft": graft} | about | {"template": template}
            row |= {"rank": rank, "prob": 0.5, "logprob": -8 + 6 * lift, "logit_diff": lift - 0.5}
            row |= {"answer_logprob": -9 + 6 * lift, "reason": None}
            rows.append(row)
    return pd.DataFrame(rows)


def summary(grafts, strength, *, resamples=100, **options):
    metrics = ("logprob", "logit_diff")
    table = results(grafts, strength, **options)
    return stats.summarise(table, metrics=metrics, resamples=resamples)


def site_map(layers=(0, 1, 2, 10), components=("q", "o"), spans=("last",), *, skip=(), **options):
    """Every (span, component, layer) alone; layer l of o recovers l/20, of q −l/40."""
    grafts, strength = dict(ENDS), {"PRE": 0.0, "SFT": 1.0}
    for span, component, layer in itertools.product(spans, components, layers):
        if (component, layer) not in skip:
            made = site(component, str(layer), span)
            grafts |= made
            strength |= dict.fromkeys(made, layer / 20 if component == "o" else -layer / 40)
    return summary(grafts, strength, **options)


def positions(strength=None, **options):
    """A summary of a few position grafts."""
    strength = strength or {"PRE": 0.0, "SFT": 1.0, "FE+LT": 0.9, "(FE+LT)^C": 0.1}
    return summary(dict.fromkeys(strength, NO_RULE), strength, **options)
