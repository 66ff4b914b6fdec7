"""Direct logit attribution under a graft, part by part.

The oracle goes forwards: what a part wrote (from Hugging Face's modules, under a graft from the
sequential algorithm's) goes through the norms, their scales held, and the unembedding of the
sources that the graft chose, and gives logits over the whole vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import MakeTiny
from lensoracle import (
    ENDS,
    PROMPTS,
    Oracle,
    frozen,
    mixed,
    module,
    n_layers,
    oracle_of,
    out_bias,
    out_weight,
    variants,
)
from torch import Tensor

from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution
from graftlens.prompts import Prompt, PromptError

FINE = ("gpt2", "llama-biased", "gemma2", "olmo-clip", "olmo2")
COARSE = ("neox-parallel", "gemma3")

#: A text that many tests run is read once.
parsed = cache(Graft.parse)

OracleOf = Callable[[str], Oracle]
#: (term, layer, head, src_pos) of a row, -1 where it has none.
Key = tuple[str, int, int, int]


@pytest.fixture(scope="module")
def oracles(tiny: MakeTiny) -> OracleOf:
    """The oracle of a variant."""
    return partial(oracle_of, tiny)


def _parts(oracle: Oracle, i: int, text: str, p: int, by: str) -> dict[Key, Tensor]:
    """What each part adds to the logits [d_vocab] before any cap, at one position."""
    run, family = oracle.run(i, text), oracle.base.config.model_type
    choose = oracle.choose(i, text)
    norm = frozen(oracle.final_norm(i, text, p), family, run.resid[-1, p])
    table = oracle.unembed(i, text, p).weight
    nothing = torch.zeros(run.resid.shape[-1])

    def logits(x: Tensor) -> Tensor:
        return table @ (norm(x) - norm(nothing))

    found: dict[Key, Tensor] = {("embed", -1, -1, -1): logits(run.embed[p])}
    if run.pos_embed is not None:
        found["pos_embed", -1, -1, -1] = logits(run.pos_embed[p])
    if family in ("gpt2", "gpt_neox"):
        found["bias", -1, -1, -1] = table @ norm(nothing)
    for l in range(n_layers(oracle.base)):
        if by == "layer":
            found["layer", l, -1, -1] = logits(run.attn[l, p] + run.mlp[l, p])
            continue
        found["mlp", l, -1, -1] = logits(run.mlp[l, p])
        if by == "component":
            found["attn", l, -1, -1] = logits(run.attn[l, p])
            continue

        # From the attention's own output, through the norm on it where there is one.
        after = module(oracle.source(i, text, "ln1_post", p, layer=l), "ln1_post", l)
        held = None if after is None else frozen(after, family, run.out[l, p])

        def added(x: Tensor, held: Callable[[Tensor], Tensor] | None = held) -> Tensor:
            return logits(x if held is None else held(x))

        heads = range(run.z.shape[2])
        weights = [out_weight(oracle.source(i, text, "o", p, layer=l, head=h), l, h) for h in heads]
        chosen = {choose("o", l, p, h) for h in heads}
        whole = chosen.pop() if len(chosen) == 1 else "pre"
        bias = out_bias(oracle.tiny.sources[whole], l)
        if bias is not None:
            found["attn_bias", l, -1, -1] = added(bias)
        if by == "head":
            for h in heads:
                found["head", l, h, -1] = added(weights[h] @ run.z[l, p, h])
            continue
        group = len(heads) // run.v.shape[2]
        for k in range(p + 1):
            moved = sum(
                (weights[h] @ (run.pattern[l, h, p, k] * run.v[l, k, h // group]) for h in heads),
                nothing,
            )
            found["src_pos", l, -1, k] = added(moved)
    return found


def _rows(table: pd.DataFrame, i: int, name: str, p: int) -> dict[Key, float]:
    ours = table[(table["prompt"] == i) & (table["graft"] == name) & (table["position"] == p)]
    keys = ours[["term", "layer", "head", "src_pos"]].fillna(-1).itertuples(index=False)
    found = dict(zip(map(tuple, keys), ours["contribution"], strict=True))
    assert len(found) == len(ours), "no part twice"
    return found


def _compare(ours: dict[Key, float], theirs: dict[Key, Tensor], of: Callable[..., Tensor]) -> None:
    assert set(ours) == set(theirs)
    wanted = np.array([float(of(theirs[key])) for key in ours])
    np.testing.assert_allclose(list(ours.values()), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "by"),
    [
        *(param for by in ("head", "src_pos") for param in variants(FINE, by)),
        *(param for by in ("layer", "component", "head") for param in variants(COARSE, by)),
        ("gpt2", "layer"),
        ("gemma2", "component"),
    ],
)
def test_every_contribution(oracles: OracleOf, variant: str, by: str) -> None:
    oracle = oracles(variant)
    grafts = ENDS | {"mixed": mixed(variant)}
    table = direct_logit_attribution(
        oracle.tiny.model, PROMPTS, {"mixed": parsed(mixed(variant))}, by=by, at="[2] + last"
    )
    cap = getattr(oracle.base.config, "final_logit_softcapping", None)
    places = 0
    for i, asked in enumerate(oracle.asked):
        target = asked.target
        for name, text in grafts.items():
            for p in (2, len(asked.ids) - 1):
                ours = _rows(table, i, name, p)
                _compare(ours, _parts(oracle, i, text, p, by), lambda x, t=target: x[t])
                said = oracle.run(i, text).logits[p, target]
                if cap is not None:
                    said = torch.atanh(said / cap) * cap
                rows = table[
                    (table["prompt"] == i) & (table["graft"] == name) & (table["position"] == p)
                ]
                assert sum(ours.values()) == pytest.approx(float(said), abs=2e-4)
                assert set(rows["token"]) == {asked.tokens[p]}
                assert len(set(rows["logit"])) == 1
                assert rows["logit"].iloc[0] == pytest.approx(float(said), abs=2e-4)
                if by == "src_pos":
                    moved = rows[rows["term"] == "src_pos"]
                    assert moved["src_token"].tolist() == [
                        asked.tokens[k] for k in moved["src_pos"]
                    ]
                else:
                    assert rows[["src_pos", "src_token"]].isna().all().all()
                places += len(rows)
    assert places == len(table), "rows of no other place"
    assert table["against"].isna().all()


def test_the_graft_takes_o_by_head_and_norms_from_either_source(oracles: OracleOf) -> None:
    """What the test above relies on, at the last position."""
    oracle = oracles("llama-biased")
    choose, p = oracle.choose(1, mixed("llama-biased")), len(oracle.asked[1].ids) - 1
    assert [{choose("o", l, p, h) for h in range(4)} for l in range(3)] == [
        {"sft"},
        {"sft", "pre"},
        {"pre"},
    ]
    assert choose("ln1", 1, p, None) == choose("unembed", None, p, None) == "sft"
    assert choose("ln_final", None, 2, None) == "pre" != choose("unembed", None, 2, None)


@pytest.mark.parametrize("variant", ["gpt2", "gemma2"])
@pytest.mark.parametrize("against", ["mean", "distractors"])
def test_what_a_logit_is_held_against(oracles: OracleOf, variant: str, against: str) -> None:
    oracle = oracles(variant)
    prompts = {0: PROMPTS[0], 2: PROMPTS[2]}
    table = direct_logit_attribution(
        oracle.tiny.model,
        list(prompts.values()),
        {"mixed": parsed(mixed(variant))},
        by="head",
        at="[2] + last",
        against=against,
    )
    assert set(table["against"]) == {against}
    for number, i in enumerate(prompts):
        asked = oracle.asked[i]
        others = [asked.first_token(text) for text in asked.prompt.distractors]
        assert len(set(others)) == len(others)

        def held(
            x: Tensor, target: int | None = asked.target, others: list[int] = others
        ) -> Tensor:
            return x[target] - (x.mean() if against == "mean" else x[others].mean())

        for name, text in (ENDS | {"mixed": mixed(variant)}).items():
            for p in (2, len(asked.ids) - 1):
                parts = _parts(oracle, i, text, p, "head")
                _compare(_rows(table, number, name, p), parts, held)
                rows = table[
                    (table["prompt"] == number)
                    & (table["graft"] == name)
                    & (table["position"] == p)
                ]
                whole = float(held(torch.stack(list(parts.values())).sum(0)))
                assert rows["logit"].iloc[0] == pytest.approx(whole, abs=2e-4)
                if variant != "gemma2":  # its logits are capped afterwards
                    said = float(held(oracle.run(i, text).logits[p]))
                    assert rows["contribution"].sum() == pytest.approx(said, abs=2e-4)


def test_distractors_that_begin_alike_count_once(oracles: OracleOf) -> None:
    prompt = Prompt(PROMPTS[0].template, PROMPTS[0].fields, " Robert", ("!", "!?", " the"))
    oracle = Oracle(oracles("gpt2").tiny, (prompt,))
    asked = oracle.asked[0]
    first = {asked.first_token(text) for text in prompt.distractors}
    assert len(first) == 2
    said = oracle.run(0, "sft @ all").logits[-1]
    table = direct_logit_attribution(oracle.tiny.model, prompt, against="distractors")
    total = table[table["graft"] == "SFT"]["contribution"].sum()
    assert total == pytest.approx(float(said[asked.target] - said[list(first)].mean()), abs=1e-4)


@pytest.mark.parametrize("variant", ["gpt2", "gemma2"])
def test_sources_and_heads_are_two_ways_to_cut_attention(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    key = ["prompt", "graft", "position", "layer"]

    def attention(by: str, part: str) -> pd.Series:
        table = direct_logit_attribution(
            oracle.tiny.model, PROMPTS, {"mixed": parsed(mixed(variant))}, by=by, at="all"
        )
        return table[table["term"] == part].groupby(key)["contribution"].sum()

    np.testing.assert_allclose(
        attention("src_pos", "src_pos"), attention("head", "head"), rtol=1e-3, atol=2e-5
    )


def test_the_window_moves_nothing_from_before_it(oracles: OracleOf) -> None:
    oracle = oracles("mistral-window")
    table = direct_logit_attribution(oracle.tiny.model, PROMPTS[2], by="src_pos")
    moved = table[table["term"] == "src_pos"]
    behind = moved["position"] - moved["src_pos"]
    assert (moved[behind >= 4]["contribution"] == 0).all()
    assert (moved[behind < 4]["contribution"] != 0).all()
    assert (behind >= 4).any()


def test_a_head_that_is_taken_out(oracles: OracleOf) -> None:
    """Hugging Face's model with one head's input to o zeroed in its last layer, whose output then
    changes by that head alone, and its final norm held: the logit falls by the contribution."""
    oracle = oracles("gpt2")
    model = oracle.tiny.sources["sft"]
    tokens = torch.tensor([oracle.asked[1].ids])
    target, last = oracle.asked[1].target, n_layers(model) - 1
    table = direct_logit_attribution(oracle.tiny.model, PROMPTS[1], by="head")
    ours = table[(table["graft"] == "SFT") & (table["term"] == "head") & (table["layer"] == last)]
    run = oracle.run(1, "sft @ all")
    norm = frozen(reference._final_norm(model), "gpt2", run.resid[-1, -1])
    blocks = reference._layers(model)
    for head, contribution in enumerate(ours["contribution"]):
        written: list[Tensor] = []

        def without(m: torch.nn.Module, args: tuple[Tensor], head: int = head) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., head * 6 : (head + 1) * 6] = 0
            return (x,)

        def keep(m: torch.nn.Module, args: tuple, out: Tensor, to: list = written) -> None:
            to.append(out[0, -1])

        handles = [
            blocks[last].attn.c_proj.register_forward_pre_hook(without),
            blocks[last].attn.c_proj.register_forward_hook(keep),
        ]
        with torch.no_grad():
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        # The MLP reads the head too; what it writes is the MLP's, so it stays as it was.
        resid = run.resid[-1, -1] - run.attn[last, -1] + written[0]
        fallen = model.lm_head(norm(run.resid[-1, -1]) - norm(resid))[target]
        assert contribution == pytest.approx(float(fallen), abs=2e-5)


def test_order_and_columns(oracles: OracleOf) -> None:
    oracle = oracles("llama-biased")
    table = direct_logit_attribution(oracle.tiny.model, PROMPTS, "sft @ last", by="head")
    assert list(table.columns) == [
        *("prompt", "graft", "rule", "position", "token", "target", "against"),
        *("term", "layer", "head", "src_pos", "src_token", "contribution", "logit"),
    ]
    one = ["embed"]
    for _ in range(3):
        one += ["head"] * 4 + ["attn_bias", "mlp"]
    assert table["term"].tolist() == one * 9
    assert table["prompt"].tolist() == [i for i in range(3) for _ in range(3 * len(one))]
    names = [n for n in ("PRE", "SFT", "sft @ last") for _ in one]
    assert table["graft"].tolist() == names * 3
    tokenizer = oracle.tiny.tokenizer
    assert tokenizer is not None
    for i, asked in enumerate(oracle.asked):
        assert set(table[table["prompt"] == i]["target"]) == {tokenizer.decode([asked.target])}
    for column in ("layer", "head", "src_pos"):
        assert str(table[column].dtype) == "Int64"


def test_a_distractor_that_begins_as_the_answer_says_nothing(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    prompt = dataclasses.replace(PROMPTS[2], distractors=(" with", "."))
    both = direct_logit_attribution(model, prompt, against="distractors")
    alone = dataclasses.replace(prompt, distractors=(".",))
    pd.testing.assert_frame_equal(
        both, direct_logit_attribution(model, alone, against="distractors")
    )
    nothing = dataclasses.replace(prompt, distractors=(" with",))
    with pytest.raises(PromptError, match="every distractor begins with the answer's first token"):
        direct_logit_attribution(model, nothing, against="distractors")


def test_positions_as_numbers(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    listed = direct_logit_attribution(model, PROMPTS[0], at=[0, -1])
    pd.testing.assert_frame_equal(listed, direct_logit_attribution(model, PROMPTS[0], at="[0, -1]"))
    assert listed["position"].nunique() == 2
