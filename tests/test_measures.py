"""Measures: every row of `METRICS` against plain formulas over one run's logits, and adding one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny

from graftlens import Graft, Prompt
from graftlens.evaluation import evaluate
from graftlens.prompts import continuation, tokenize

ASKED = (
    *("kl_base", "kl_full", "kl_from_base", "kl_from_full", "js_base", "js_full"),
    *("entropy", "margin", "answer_set_prob"),
)
GRAFTS = {
    "PRE": Graft(),
    "SFT": Graft.rule("sft"),
    "LT": Graft.parse("sft @ last"),
    "mlp": Graft.parse("sft @ first_entity + last : mlp"),
    "out": Graft.parse("sft @ last : ln_final + unembed"),
}


def prompts() -> list[Prompt]:
    text = "{first_entity} plays with"
    return [
        Prompt(text, {"first_entity": "Ann"}, " Mara Finn", ("!", " Bo"), answers=(" Mara", " Bo")),
        Prompt(text, {"first_entity": "Zoë Reed-Lang"}, " Bo", ("!", " the film", " Mara")),
        Prompt("In a film {first_entity} was", {"first_entity": "Bo"}, " Mara", answers=("!",)),
    ]


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def by_hand(t: Tiny, prompt: Prompt, grafts: Mapping[str, Graft], base: str, full: str) -> Any:
    """Graft -> measure -> value, from the logits of the grafts run one by one."""
    with torch.no_grad():
        logits = {n: t.model(prompt, graft=g)[0, -1].double() for n, g in grafts.items()}
    said = {n: x.log_softmax(-1) for n, x in logits.items()}
    tokens = tokenize(prompt, t.tokenizer)

    def first(text: str) -> int:
        return continuation(tokens, text, t.tokenizer)[0]

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum())

    answer, right = first(prompt.answer or ""), sorted({first(text) for text in prompt.answers})
    found: dict[str, dict[str, float]] = {}
    for name, p in said.items():
        here = {"entropy": float(-(p.exp() * p).sum())}
        for run, other in (("base", said[base]), ("full", said[full])):
            middle = ((p.exp() + other.exp()) / 2).log()
            here[f"kl_{run}"], here[f"kl_from_{run}"] = kl(p, other), kl(other, p)
            here[f"js_{run}"] = (kl(p, middle) + kl(other, middle)) / 2
        own = logits[name].tolist()
        here["margin"] = own[answer] - max(x for i, x in enumerate(own) if i != answer)
        here["answer_set_prob"] = float(p[right].exp().sum()) if right else np.nan
        found[name] = here
    return found


@pytest.mark.parametrize("budget", [None, 9])
def test_measures_are_those_of_plain_formulas(llama: Tiny, budget: int | None) -> None:
    """Also where grafts are cut into several trees, each with its own rows of the references."""
    table = evaluate(
        llama.model, prompts(), GRAFTS, measures=ASKED, row_budget=budget, progress=False
    )
    plain = evaluate(llama.model, prompts(), GRAFTS, row_budget=budget, progress=False)
    pd.testing.assert_frame_equal(table.drop(columns=[*ASKED]), plain)
    assert list(table.columns)[-len(ASKED) - 1 :] == [*ASKED, "reason"]
    for number, prompt in enumerate(prompts()):
        wanted = by_hand(llama, prompt, GRAFTS, "PRE", "SFT")
        rows = table[table["prompt"] == number].set_index("graft")
        for name, values in wanted.items():
            for measure, value in values.items():
                assert rows.loc[name, measure] == pytest.approx(value, abs=2e-5, nan_ok=True)
        assert rows.loc["PRE", "kl_base"] == rows.loc["SFT", "kl_full"] == 0
