"""Given texts, and where texts part: against Hugging Face's logits and the sequential algorithm."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chattemplates import CHATML
from conftest import MakeTiny, Tiny
from reference import sequential_graft
from torch import Tensor

from graftlens import GraftedTransformer, Prompt, outcomes

TEXTS = [
    "Anders Lindqvist starred in The Quiet Harbour.",
    "The movie Winter's End was directed by José Núñez-Peña.",
]


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="gpt2")


def ids_of(t: Tiny, text: str) -> list[int]:
    assert t.tokenizer is not None
    return t.tokenizer(text)["input_ids"]


def logprobs(t: Tiny, ids: list[int], where: Callable[[int], bool]) -> Tensor:
    """[pos, d_vocab] under `sft` at some positions."""

    def choose(component: str, layer: int | None, position: int, unit: int | None) -> str:
        return "sft" if where(position) else "pre"

    return sequential_graft(t.sources, ids, choose).double().log_softmax(-1)


def divergence_of(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def row(table: pd.DataFrame, text: int, graft: str, span: str = "all") -> Any:
    found = table[(table["text"] == text) & (table["graft"] == graft) & (table["span"] == span)]
    assert len(found) == 1
    return found.iloc[0]


def check(mine: Any, own: Tensor, base: Tensor, full: Tensor, ids: list[int], first: int) -> None:
    places = range(first, len(ids))
    summed = sum(float(own[i - 1, ids[i]]) for i in places)
    assert mine["n"] == len(places)
    assert mine["logprob"] == pytest.approx(summed, abs=1e-3)
    assert mine["perplexity"] == pytest.approx(np.exp(-summed / len(places)), rel=1e-4)
    for name, other in (("kl_base", base), ("kl_full", full)):
        wanted = sum(divergence_of(own[i - 1], other[i - 1]) for i in places)
        assert mine[name] == pytest.approx(wanted, abs=1e-3)


def test_texts_are_scored_as_the_sequential_algorithm_reads_them(llama: Tiny) -> None:
    table = outcomes.score_texts(llama.model, TEXTS, {"LT": "sft @ last", "start": "sft @ [1, 2]"})
    assert set(table["graft"]) == {"PRE", "SFT", "LT", "start"}
    for number, text in enumerate(TEXTS):
        ids = ids_of(llama, text)
        n = len(ids)
        base, full = (llama.logits(s, ids).double().log_softmax(-1) for s in ("pre", "sft"))
        for graft, where in (
            ("LT", lambda p, n=n: p == n - 1),
            ("start", lambda p: p in (1, 2)),
            ("SFT", lambda _: True),
        ):
            check(row(table, number, graft), logprobs(llama, ids, where), base, full, ids, 1)
        assert row(table, number, "PRE")["kl_base"] == pytest.approx(0, abs=1e-5)


def test_a_continuation_counts_as_generated(llama: Tiny) -> None:
    prompt = Prompt("{actor} starred in", {"actor": "Anders Lindqvist"})
    tails = [" The Quiet Harbour.", " Winter's End"]
    grafts = {"generated": "sft @ generated", "last": "sft @ last", "actor": "sft @ actor"}
    table = outcomes.score_texts(llama.model, [prompt] * 2, grafts, continuations=tails)
    n, actor = len(ids_of(llama, prompt.text)), llama.model.tokenized(prompt)[0].spans["actor"][0]
    for number, tail in enumerate(tails):
        ids = ids_of(llama, prompt.text + tail)
        base, full = (llama.logits(s, ids).double().log_softmax(-1) for s in ("pre", "sft"))
        for graft, where in (
            ("generated", lambda p: p >= n),
            ("last", lambda p: p >= n - 1),
            ("actor", lambda p: p in actor),
        ):
            own = logprobs(llama, ids, where)
            for span in ("all", "generated"):
                check(row(table, number, graft, span), own, base, full, ids, n)
    with pytest.raises(ValueError, match="1 continuations for more texts"):
        outcomes.score_texts(llama.model, [prompt] * 2, grafts, continuations=tails[:1])
    with pytest.raises(ValueError, match="more continuations than the 1 texts"):
        outcomes.score_texts(llama.model, [prompt], grafts, continuations=tails)


def test_sums_are_by_span_and_role(tiny: MakeTiny) -> None:
    t = tiny("qwen3", tokenizer="gpt2")
    t.model.tokenizer.chat_template = CHATML
    talk = [
        {"role": "user", "content": "Who acted?"},
        {"role": "assistant", "content": "Anders Lindqvist did."},
    ]
    table = outcomes.score_texts(t.model, [{"messages": talk}], {"user": "sft @ user"})
    each = outcomes.score_texts(
        t.model, [{"messages": talk}], {"user": "sft @ user"}, per_token=True
    )
    prompt = Prompt.chat(talk, template_options={"add_generation_prompt": False})
    tokens = t.model.tokenized(prompt)[0]
    user = {i for places in tokens.spans["user"] for i in places}
    own = logprobs(t, [*tokens.ids], lambda p: p in user)
    mine = each[each["graft"] == "user"]
    assert mine["position"].tolist() == [*range(1, len(tokens))]
    assert mine["token_id"].tolist() == [*tokens.ids[1:]]
    wanted = [float(own[i - 1, tokens.ids[i]]) for i in range(1, len(tokens))]
    assert mine["logprob"].tolist() == pytest.approx(wanted, abs=1e-4)
    roles = tokens.roles()
    assert roles is not None
    for role in ("user", "assistant", "template"):
        places = [i for i in range(1, len(tokens)) if roles[i] == role]
        found = row(table, 0, "user", role)
        assert found["n"] == len(places)
        assert found["logprob"] == pytest.approx(sum(wanted[i - 1] for i in places), abs=1e-3)
    assert set(table["span"]) == {"all", "user", "assistant", "template"}


def test_a_dataset_is_streamed(llama: Tiny) -> None:
    from datasets import IterableDataset

    taken: list[int] = []

    def rows() -> Any:
        for number, text in enumerate(itertools.chain(TEXTS, ["The"], TEXTS[:1])):
            taken.append(number)
            yield {"text": text}

    streamed = IterableDataset.from_generator(rows)
    table = outcomes.score_texts(llama.model, streamed, "sft @ last", chunk=2)
    listed = outcomes.score_texts(llama.model, [*TEXTS, "The", TEXTS[0]], "sft @ last")
    pd.testing.assert_frame_equal(table, listed)
    assert taken == [0, 1, 2, 3]
    short = table[table["text"] == 2]
    assert short["reason"].str.contains("no token to score").all()
    assert short["logprob"].isna().all()
    with pytest.raises(ValueError, match="a row with the keys body has no text or messages"):
        outcomes.score_texts(llama.model, [{"body": "a b"}], "sft @ last")
    with pytest.raises(ValueError, match="no texts: give at least one"):
        outcomes.score_texts(llama.model, [], "sft @ last")


def test_texts_with_tokens_that_a_source_lacks(llama: Tiny) -> None:
    larger = copy.deepcopy(llama.sources["sft"])
    larger.resize_token_embeddings(larger.config.vocab_size + 8, mean_resizing=False)
    model = GraftedTransformer.from_pretrained(
        {"pre": llama.sources["pre"], "sft": larger},
        tokenizer=llama.tokenizer, check=False, verbose=False,
    )  # fmt: skip
    table = outcomes.score_texts(model, TEXTS[:1], "sft @ last")
    ids, size = ids_of(llama, TEXTS[0]), llama.sources["pre"].config.vocab_size
    with torch.no_grad():
        full = larger(torch.tensor([ids])).logits[0, :, :size].double().log_softmax(-1)
    base = llama.logits("pre", ids).double().log_softmax(-1)
    wanted = sum(divergence_of(full[i], base[i]) for i in range(len(ids) - 1))
    assert row(table, 0, "SFT")["kl_base"] == pytest.approx(wanted, abs=1e-3)


def test_texts_part_where_their_tokens_do(llama: Tiny) -> None:
    prompts = ["Anders Lindqvist starred in", "The film", "Who"]
    grafts = {"LT": "sft @ last", "out": "sft @ last : unembed"}
    texts = outcomes.sample(
        llama.model, prompts, grafts, temperature=0, max_new_tokens=6, progress=False
    )
    table = outcomes.divergence(llama.model, texts)
    by = {(r["graft"], r["prompt"]): r["tokens"] for _, r in texts.iterrows()}
    parted = 0
    for _, r in table.iterrows():
        for run, name in (("base", "PRE"), ("full", "SFT")):
            mine, theirs = r["tokens"], by[name, r["prompt"]]
            step = next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None
            )
            assert r[f"parts_{run}"] == (mine != theirs)
            if step is not None:
                parted += 1
                assert r[f"step_{run}"] == step
                assert r[f"here_{run}"] == llama.model.to_single_str_token(mine[step])
                assert r[f"there_{run}"] == llama.model.to_single_str_token(theirs[step])
            elif mine == theirs:
                assert np.isnan(r[f"step_{run}"])
    assert parted > 5
    rates = outcomes.rate(table, ["parts_base"]).set_index("graft")
    assert rates.loc["PRE", "rate"] == 0
    with pytest.raises(ValueError, match="base='none' is not one of the grafts"):
        outcomes.divergence(llama.model, texts, base="none")
