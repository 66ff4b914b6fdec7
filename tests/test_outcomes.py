"""Generated texts: Hugging Face's own for uniform grafts, the sequential algorithm for all others.

One run of the sequential algorithm over prompt and text says what every step should have drawn
from. Texts agree up to a step at which the two best (perturbed) logits are closer than rounding
makes them in float32; `agree` holds that margin.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chattemplates import CHATML
from conftest import MakeTiny, Tiny
from families import VARIANTS
from reference import sequential_graft
from torch import Tensor

from graftlens import GraftedTransformer, Prompt, evaluate, outcomes
from graftlens.model.decoding import Decoder

NEW = 7
PROMPTS = [
    Prompt("{actor} starred in", {"actor": "Anders Lindqvist"}),
    Prompt("The film with {actor} is called", {"actor": "Siobhán"}),
    Prompt("Who is {actor}?", {"actor": "Anders Lindqvist"}),
]
#: Of the largest logit: closer than this, two logits may change places in float32.
MARGIN = 1e-4


def noise(seed: int, prompt: Sequence[int], sample: int, step: int, size: int) -> Tensor:
    """Gumbel noise from Philox's words, in float64."""
    name = f"{seed} {sample} {' '.join(str(token) for token in prompt)}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    bits = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))
    words = bits.bit_generator.random_raw((size + 1) // 2)
    halves = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(-1)[:size]
    exponential = -np.log1p(-(halves.astype(np.float64) + 0.5) / 2**32)
    return torch.from_numpy(-np.log(exponential))


def agree(scores: Tensor, tokens: Sequence[int]) -> int:
    """How many steps took the token with the largest score; where one did not, the margin is
    asserted."""
    for step, (row, token) in enumerate(zip(scores, tokens, strict=True)):
        best, second = row.topk(2).values.tolist()
        if int(row.argmax()) != token:
            assert best - second < MARGIN * abs(best), f"step {step}: {best} {second}"
            return step
    return len(tokens)


Where = Callable[[int, int, set[int]], bool]

#: Positions as they are written -> whether a position is among them, given the prompt's length and
#: the entity's tokens. The table of the documentation, line by line.
REACH: dict[str, Where] = {
    "prompt": lambda p, n, _: p < n,
    "generated": lambda p, n, _: p >= n,
    "last": lambda p, n, _: p >= n - 1,
    "all": lambda *_: True,
    "bos": lambda p, *_: p == 0,
    "[-1]": lambda p, n, _: p == n - 1,
    "actor": lambda p, _, entity: p in entity,
    "actor + last": lambda p, n, entity: p in entity or p >= n - 1,
    "~generated": lambda p, n, _: p < n,
    "~last": lambda p, n, _: p < n - 1,
    "~actor": lambda p, _, entity: p not in entity,
    "actor + generated": lambda p, n, entity: p in entity or p >= n,
    "prompt & last": lambda p, n, _: p == n - 1,
}


def tokens_of(t: Tiny, prompt: Prompt) -> tuple[list[int], set[int]]:
    """A prompt's token ids, and which of them hold a character of the actor."""
    assert t.tokenizer is not None
    encoded = t.tokenizer(prompt.text, return_offsets_mapping=True)
    start = prompt.text.find(prompt.fields["actor"])
    end = start + len(prompt.fields["actor"])
    offsets = encoded["offset_mapping"]
    return encoded["input_ids"], {i for i, (a, b) in enumerate(offsets) if a < end and b > start}


def oracle(
    t: Tiny, prompt: Prompt, tokens: Sequence[int], where: Where, source: str = "sft"
) -> Tensor:
    """Logits of each step of a text under `source @ where`."""
    ids, entity = tokens_of(t, prompt)

    def choose(component: str, layer: int | None, position: int, unit: int | None) -> str:
        return source if where(position, len(ids), entity) else "pre"

    return sequential_graft(t.sources, [*ids, *tokens[:-1]], choose)[len(ids) - 1 :]


def check(t: Tiny, row: Any, where: Where, seed: int | None, temperature: float = 1.0) -> int:
    """A row of a table against the oracle: its tokens, and their log-probability."""
    prompt = PROMPTS[row["prompt"]]
    logits = oracle(t, prompt, row["tokens"], where).double()
    scores = logits
    if seed is not None:
        ids, _ = tokens_of(t, prompt)
        drawn = [noise(seed, ids, row["sample"], s, logits.shape[1]) for s in range(len(logits))]
        scores = logits / temperature + torch.stack(drawn)
    index = torch.tensor(row["tokens"])[:, None]
    summed = logits.log_softmax(-1).gather(1, index).sum()
    assert row["logprob"] == pytest.approx(float(summed), abs=1e-4 * len(logits))
    return agree(scores, row["tokens"])


def sample(t: Tiny, grafts: Any, **options: Any) -> pd.DataFrame:
    given = {"prompts": PROMPTS, "max_new_tokens": NEW, "progress": False, **options}
    return outcomes.sample(t.model, given.pop("prompts"), grafts, **given)


def endless(t: Tiny) -> Tiny:
    """The same sources, whose texts nothing ends."""
    t.model.end_tokens = dict.fromkeys(t.model.sources, (10_000,))
    return t


# --- Where grafts reach --------------------------------------------------------------------------


def test_every_line_of_the_table_of_spans_is_the_sequential_algorithm(tiny: MakeTiny) -> None:
    """Greedy and drawn, all grafts and prompts and samples in one batch."""
    t = endless(tiny("llama", tokenizer="gpt2"))
    grafts = {at: f"sft @ {at}" for at in REACH}
    for options in ({"temperature": 0}, {"n": 2, "temperature": 0.8, "seed": 5}):
        table = sample(t, grafts, **options)
        steps = agreed = 0
        for _, row in table.iterrows():
            if row["graft"] not in REACH:
                assert row["graft"] in ("PRE", "SFT")
                continue
            seed = options.get("seed")
            agreed += check(t, row, REACH[row["graft"]], seed, options["temperature"] or 1.0)
            steps += len(row["tokens"])
        assert steps == len(REACH) * len(PROMPTS) * NEW * options.get("n", 1)
        assert agreed > 0.98 * steps  # the margin is met in a step or two at most
        texts = table.groupby("graft")["tokens"].apply(lambda rows: str(list(rows)))
        assert texts["prompt"] == texts["~generated"]
        assert texts["prompt & last"] == texts["[-1]"]
        assert texts["all"] != texts["prompt"] != texts["generated"] != texts["last"]


@pytest.mark.parametrize(
    "variant",
    ["gpt2", "neox-parallel", "mistral-window", "gemma2", "gemma3", "qwen3", "phi3", "olmo2"],
)
def test_families_generate_as_the_sequential_algorithm(tiny: MakeTiny, variant: str) -> None:
    t = endless(tiny(variant, tokenizer="gpt2"))
    places = ("actor + last", "generated", "prompt")
    table = sample(t, {at: f"sft @ {at}" for at in places}, n=2, seed=1)
    rows = [row for _, row in table.iterrows() if row["graft"] in places]
    agreed = sum(check(t, row, REACH[row["graft"]], 1) for row in rows)
    assert agreed > 0.98 * len(rows) * NEW


@pytest.mark.parametrize("variant", VARIANTS)
def test_uniform_grafts_give_hugging_faces_greedy_text(tiny: MakeTiny, variant: str) -> None:
    t = endless(tiny(variant, tokenizer="gpt2"))
    table = sample(t, {"SFT": "sft @ all", "PRE": "none"}, temperature=0)
    for _, row in table.iterrows():
        ids, _ = tokens_of(t, PROMPTS[row["prompt"]])
        model = t.sources[{"PRE": "pre", "SFT": "sft"}[row["graft"]]]
        theirs = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = theirs.sequences[0, len(ids) :].tolist()
        same = next((i for i in range(NEW) if new[i] != row["tokens"][i]), NEW)
        if same < NEW:
            agree(theirs.logits[same], row["tokens"][same : same + 1])
        assert row["stop"] == "length"
        if row["tokens"] == new:
            assert row["text"] == t.tokenizer.decode(new)  # type: ignore[union-attr]


def test_a_text_beyond_the_short_tables_is_computed_anew(tiny: MakeTiny) -> None:
    """From token 33 on longrope's long factors hold, also for what came before."""
    t = endless(tiny("phi3-longrope", tokenizer="gpt2"))
    long = "Anders Lindqvist " * 12 + "starred in"
    ids = t.tokenizer(long)["input_ids"]  # type: ignore[misc]
    assert len(ids) < 33 <= len(ids) + 12
    grafts = {"SFT": "sft @ all", "here": "sft @ last"}
    table = sample(t, grafts, prompts=[long, "The film"], max_new_tokens=12, temperature=0)
    for _, row in table[(table["graft"] == "SFT") & (table["prompt"] == 0)].iterrows():
        theirs = t.sources["sft"].generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert row["tokens"] == theirs[0, len(ids) :].tolist()
    ours = t.model.generate(long, 12, graft="sft @ last", return_type="tokens", new_only=True)
    here = table[(table["graft"] == "here") & (table["prompt"] == 0)].iloc[0]
    assert here["tokens"] == ours[0].tolist()


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who acted?"}]


@pytest.mark.parametrize("prefill", [None, "It was"])
def test_an_assistant_says_what_is_generated(tiny: MakeTiny, prefill: str | None) -> None:
    t = endless(tiny("qwen3", tokenizer="gpt2"))
    t.model.tokenizer.chat_template = CHATML
    prompt = Prompt.chat(CHAT, prefill=prefill)
    tokens = t.model.tokenized(prompt)[0]
    said = {i for places in tokens.spans["assistant"] for i in places}
    assert bool(said) == (prefill is not None)
    n = len(tokens)
    table = sample(
        t,
        {"its": "sft @ assistant", "last one's": "sft @ assistant#-1", "user's": "sft @ user"},
        prompts=[prompt],
        n=3,
        seed=2,
    )
    for _, row in table.iterrows():
        user = {i for places in tokens.spans["user"] for i in places}
        reached = {"its": said, "last one's": said, "user's": user}.get(row["graft"])
        if reached is None:
            continue
        follows = row["graft"] != "user's"

        def choose(component: str, layer: int | None, position: int, unit: int | None) -> str:
            return "sft" if position in reached or (follows and position >= n) else "pre"  # noqa: B023

        whole = [*tokens.ids, *row["tokens"][:-1]]
        logits = sequential_graft(t.sources, whole, choose)[n - 1 :].double()
        drawn = [noise(2, tokens.ids, row["sample"], s, logits.shape[1]) for s in range(NEW)]
        assert agree(logits + torch.stack(drawn), row["tokens"]) == NEW


def test_what_is_generated_is_no_place_where_one_token_is_scored(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    prompt = Prompt("The film is", answer=" good")
    wanted = r"'generated' are the tokens that a model adds to a prompt, and here it adds none"
    with pytest.raises(ValueError, match=wanted):
        evaluate(t.model, prompt, "sft @ generated", progress=False)
    with pytest.raises(ValueError, match=wanted):
        t.model(prompt, graft="sft @ generated")
    whole = evaluate(t.model, prompt, {"a": "sft @ prompt", "b": "sft @ all"}, progress=False)
    a, b = (whole[whole["graft"] == name].iloc[0] for name in "ab")
    assert a["logprob"] == pytest.approx(b["logprob"])


def test_generate_knows_the_same_places(tiny: MakeTiny) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    for at in ("generated", "prompt", "~generated & ~actor"):
        table = sample(t, {"g": f"sft @ {at}"}, temperature=0)
        ours = t.model.generate(
            PROMPTS, NEW, graft=f"sft @ {at}", return_type="tokens", new_only=True
        )
        mine = table[table["graft"] == "g"]["tokens"]
        assert [*mine] == ours.tolist()


# --- Draws ---------------------------------------------------------------------------------------


def tokens_by(table: pd.DataFrame) -> dict[tuple[int, str, int], list[int]]:
    keys = zip(table["prompt"], table["graft"], table["sample"], strict=True)
    return dict(zip(keys, table["tokens"], strict=True))


def test_draws_depend_on_seed_prompt_sample_and_step_alone(tiny: MakeTiny) -> None:
    """Not on the batch, the other grafts and prompts, or the prompt's number."""
    t = endless(tiny("llama", tokenizer="gpt2"))
    grafts = {"a": "sft @ last", "b": "sft @ generated"}
    whole = tokens_by(sample(t, grafts, n=3, seed=4))
    one_by_one = tokens_by(sample(t, grafts, n=3, seed=4, token_budget=1))
    assert one_by_one == whole
    alone = tokens_by(sample(t, {"b": grafts["b"]}, n=2, seed=4, prompts=PROMPTS[::-1]))
    for (prompt, graft, number), tokens in alone.items():
        assert tokens == whole[2 - prompt, graft, number]
    others = tokens_by(sample(t, grafts, n=3, seed=5))
    assert all(others[key] != tokens for key, tokens in whole.items())
    assert len({str(tokens) for (p, g, _), tokens in whole.items() if (p, g) == (0, "a")}) == 3


def test_equal_grafts_draw_equal_texts(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    table = sample(t, {"SFT": "sft @ all", "twice": "pre @ all | sft @ prompt + generated"}, n=4)
    found = tokens_by(table)
    for (prompt, _, number), tokens in found.items():
        if _ == "SFT":
            assert found[prompt, "twice", number] == tokens


def test_drawn_tokens_follow_the_models_distribution(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    options = {"n": 4000, "max_new_tokens": 1, "temperature": 0.7, "prompts": PROMPTS[:1]}
    table = sample(t, "sft @ all", **options, top_k=5)
    drawn = table[table["graft"] != "PRE"]["tokens"].str[0]
    ids, _ = tokens_of(t, PROMPTS[0])
    values, best = (t.logits("sft", ids)[-1] / 0.7).topk(5)
    for probability, token in zip(values.softmax(-1).tolist(), best.tolist(), strict=True):
        assert float((drawn == token).mean()) == pytest.approx(probability, abs=0.03)
    assert set(drawn) <= set(best.tolist())
    nucleus = sample(t, "sft @ all", **options, top_p=0.3)
    kept = nucleus[nucleus["graft"] != "PRE"]["tokens"].str[0]
    probabilities, order = (t.logits("sft", ids)[-1] / 0.7).softmax(-1).sort(descending=True)
    inside = int((probabilities.cumsum(0) < 0.3).sum()) + 1
    assert set(kept) == set(order[:inside].tolist())


def test_greedy_with_a_penalty_is_hugging_faces(tiny: MakeTiny) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    table = sample(t, "sft @ all", temperature=0, repetition_penalty=1.7, max_new_tokens=12)
    for _, row in table[table["graft"] != "PRE"].iterrows():
        ids, _ = tokens_of(t, PROMPTS[row["prompt"]])
        theirs = t.sources["sft"].generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=None,
        )
        assert row["tokens"] == theirs[0, len(ids) :].tolist()


# --- Ends ----------------------------------------------------------------------------------------


def test_each_source_has_its_end_tokens_and_a_mixture_those_of_all(tiny: MakeTiny) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    grafts = {"PRE": "none", "SFT": "sft @ all", "mixed": "sft @ generated"}
    free = sample(t, grafts, n=8, max_new_tokens=20)
    ends = {"pre": {5, 9, 200, 120, 77}, "sft": {33, 64, 150, 90, 101}}
    t.model.end_tokens = {name: tuple(sorted(tokens)) for name, tokens in ends.items()}
    table = sample(t, grafts, n=8, max_new_tokens=20)
    here = {"PRE": ends["pre"], "SFT": ends["sft"], "mixed": ends["pre"] | ends["sft"]}
    stopped = dict.fromkeys(here, 0)
    for (_, was), (_, now) in zip(free.iterrows(), table.iterrows(), strict=True):
        first = next((i for i, x in enumerate(was["tokens"]) if x in here[now["graft"]]), None)
        wanted = was["tokens"] if first is None else was["tokens"][: first + 1]
        assert now["tokens"] == wanted
        assert now["stop"] == ("length" if first is None else "end")
        said = wanted if first is None else wanted[:-1]
        ids, _ = tokens_of(t, PROMPTS[now["prompt"]])
        decode = t.tokenizer.decode  # type: ignore[union-attr]
        assert now["text"] == decode([*ids, *said])[len(decode(ids)) :]
        stopped[now["graft"]] += first is not None
    assert all(stopped.values())


def test_stop_strings_end_a_text(tiny: MakeTiny) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    free = sample(t, "sft @ last", n=6, max_new_tokens=12)
    stops = ["e", "a"]
    table = sample(t, "sft @ last", n=6, max_new_tokens=12, stop_strings=stops)
    ended = 0
    for (_, was), (_, now) in zip(free.iterrows(), table.iterrows(), strict=True):
        assert was["text"].startswith(now["text"])
        places = [i for i, c in enumerate(was["text"]) if c in stops]
        if not places:
            assert now["stop"] == "length"
            continue
        ended += 1
        assert now["stop"] == "stop"
        assert len(now["text"]) > places[0]
        assert was["tokens"][: len(now["tokens"])] == now["tokens"]
        before = t.tokenizer.decode(now["tokens"][:-1])  # type: ignore[union-attr]
        assert not any(c in before for c in stops)
    assert ended > 10


def test_finished_rows_leave(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    free = sample(t, {"SFT": "sft @ all"}, n=16, max_new_tokens=16)
    t.model.end_tokens = dict.fromkeys(t.model.sources, tuple(range(0, 250, 7)))
    counts: list[int] = []
    original = Decoder.step

    def step(self: Decoder) -> None:
        counts.append(len(self.tokens))
        original(self)

    monkeypatch.setattr(Decoder, "step", step)
    table = sample(t, {"SFT": "sft @ all"}, n=16, max_new_tokens=16)
    lengths = np.array([*map(len, table["tokens"])])
    assert len(free) == len(table)
    on = [int((lengths > step).sum()) for step in range(1, 16)]
    wanted, held = [], len(lengths)
    for going in on:
        if not going:
            break
        if held - going >= held / 8:
            held = going
        wanted.append(held)
    assert counts == wanted
    assert wanted[-1] < len(lengths) / 2


def test_a_token_that_the_next_source_cannot_read_ends_a_text(tiny: MakeTiny) -> None:
    small = endless(tiny("llama", tokenizer="gpt2"))
    sources = {"pre": small.sources["pre"], "sft": small.sources["sft"]}
    larger = copy.deepcopy(sources["sft"])
    larger.resize_token_embeddings(larger.config.vocab_size + 40, mean_resizing=False)
    model = GraftedTransformer.from_pretrained(
        {"pre": sources["pre"], "sft": larger},
        tokenizer=small.tokenizer,
        check=False,
        verbose=False,
    )
    model.end_tokens = dict.fromkeys(model.sources, (10_000,))
    d_small = sources["pre"].config.vocab_size
    t = Tiny("llama", {"pre": sources["pre"], "sft": larger}, model, small.tokenizer)
    # Generated tokens come from sft's unembedding and go into pre's embedding.
    table = sample(t, {"out": "sft @ last : unembed"}, n=30, max_new_tokens=8, temperature=4.0)
    rows = table[table["graft"] == "out"]
    cut = rows[rows["stop"] == "unreadable"]
    assert len(cut) > 3
    for tokens in cut["tokens"]:
        assert tokens[-1] >= d_small
        assert all(token < d_small for token in tokens[:-1])
        assert len(tokens) < 8
    for tokens in rows[rows["stop"] == "length"]["tokens"]:
        assert all(token < d_small for token in tokens[:-1])


# --- Memory --------------------------------------------------------------------------------------


def test_running_out_of_memory_halves_the_budget(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    wanted = sample(t, {"a": "sft @ last"}, n=4)
    original = Decoder.step

    def step(self: Decoder) -> None:
        if len(self.tokens) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        original(self)

    monkeypatch.setattr(Decoder, "step", step)
    table = sample(t, {"a": "sft @ last"}, n=4)
    assert "Memory ran out: continuing with at most" in capsys.readouterr().out
    assert tokens_by(table) == tokens_by(wanted)
    assert np.allclose(table["logprob"], wanted["logprob"], atol=1e-4)


def test_batches_stay_within_the_budget(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    t = endless(tiny("llama", tokenizer="gpt2"))
    held: list[int] = []
    original = Decoder.step

    def step(self: Decoder) -> None:
        held.append(len(self.tokens) * (self.batch.real.shape[1] + NEW))
        original(self)

    monkeypatch.setattr(Decoder, "step", step)
    sample(t, {"a": "sft @ last"}, n=4, token_budget=120)
    longest = max(len(tokens_of(t, prompt)[0]) for prompt in PROMPTS) + NEW
    assert max(held) <= 120 < max(held) + longest


# --- The table -----------------------------------------------------------------------------------


def test_prompts_that_cannot_run_have_a_reason(tiny: MakeTiny) -> None:
    t = endless(tiny("gpt2", tokenizer="gpt2"))
    long = Prompt("{actor} " * 40 + "starred in", {"actor": "Anders Lindqvist"})
    other = Prompt("The film", answer=" Winter")
    with pytest.warns(UserWarning, match=r"8 of 18 texts could not be generated"):
        table = sample(t, {"FE": "sft @ actor"}, prompts=[long, other, PROMPTS[0]], n=2)
    assert [*table["graft"]] == ["PRE", "PRE", "SFT", "SFT", "FE", "FE"] * 3
    assert [*table["sample"]] == [0, 1] * 9
    of = table.set_index(["prompt", "graft"])["reason"]
    assert "new ones are more than the model's context of 64" in of[0, "PRE"].iloc[0]
    assert "no span 'actor' here" in of[1, "FE"].iloc[0]
    failed = table[table["reason"].notna()]
    assert failed[["text", "tokens", "stop", "logprob"]].isna().all(axis=None)
    ran = table[table["reason"].isna()]
    assert len(ran) == 10
    assert ran["answer"].tolist() == [" Winter"] * 4 + [None] * 6
    assert ran["answers"].tolist() == [[" Winter"]] * 4 + [[]] * 6
    assert all(math.isfinite(x) for x in ran["logprob"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"n=0: write a number from 1"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0: write a number from 1"),
        ({"n": 2, "temperature": 0}, r"temperature=0 with n=2: these texts would all be the same"),
        ({"temperature": -1.0}, r"temperature=-1.0: write a number from 0"),
        ({"top_p": 0.5, "top_k": 3}, r"top_k=3 and top_p=0.5: give one of them"),
        ({"stop_strings": [""]}, r"stop_strings: ''"),
        ({"token_budget": 0}, r"token_budget=0: write a number from 1"),
        ({"prompts": []}, r"0 prompts and 1 grafts"),
    ],
)
def test_options_outside_their_range_are_refused(
    tiny: MakeTiny, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(tiny("llama", tokenizer="gpt2"), "sft @ last", **options)


def test_a_graft_that_fails_everywhere_is_refused(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    with pytest.raises(ValueError, match=r"graft 'x' can be run on none of 3 prompts.*'title'"):
        sample(t, {"x": "sft @ title"})
    with pytest.raises(ValueError, match="selects none of the"):
        sample(t, {"x": "sft @ generated & prompt"})
    with pytest.raises(ValueError, match="no tokenizer, so texts cannot be written"):
        sample(tiny("llama"), {"x": "sft @ last"})
