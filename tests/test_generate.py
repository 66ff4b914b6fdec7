"""Generation: Hugging Face's own for uniform grafts, the sequential algorithm for all others.

One run of the sequential algorithm over prompt and continuation says what every step should have
given, since keys and values of earlier positions stay as they were: what follows the prompt, and
the prompt's own end, counts as `last`.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS
from reference import sequential_graft
from torch import Tensor

from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
NEW = 6


def _ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def _greedy(t: Tiny, source: str, row: list[int], new: int = NEW) -> list[int]:
    """Hugging Face's own greedy continuation; EOS does not stop it."""
    model = t.sources[source]
    out = model.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(row) :].tolist()


@EVERY_VARIANT
def test_uniform_grafts_give_hugging_faces_greedy_output(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    rows = [_ids(n, n) for n in (4, 9, 1)]
    tokens, mask = _left(rows)
    for source in t.sources:
        theirs = [_greedy(t, source, row) for row in rows]
        for cached in (True, False):
            ours = t.model.generate(
                tokens,
                NEW,
                graft=Graft.rule(source),
                attention_mask=mask,
                use_past_kv_cache=cached,
                stop_at_eos=False,
            )
            assert torch.equal(ours[:, : tokens.shape[1]], tokens)
            assert ours[:, tokens.shape[1] :].tolist() == theirs


def test_right_padded_tokens_come_back_padded_on_the_left(tiny: MakeTiny) -> None:
    t = tiny("llama")
    tokens = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    ours = t.model.generate(tokens, 4, graft="sft @ all", attention_mask=mask, stop_at_eos=False)
    assert ours[0].tolist() == [5, 6, 7, 8, 9, *_greedy(t, "sft", [5, 6, 7, 8, 9], 4)]
    assert ours[1].tolist() == [0, 0, 0, 11, 12, *_greedy(t, "sft", [11, 12], 4)]


@pytest.mark.parametrize("cached", [True, False])
def test_longrope_generates_across_its_boundary(tiny: MakeTiny, cached: bool) -> None:
    """From token 33 on the long factors hold; Hugging Face then computes its cache anew."""
    t = tiny("phi3-longrope")
    rows = [_ids(30, 1), _ids(32, 2), _ids(12, 3), _ids(40, 4)]
    tokens, mask = _left(rows)
    ours = t.model.generate(
        tokens,
        NEW,
        graft="sft @ all",
        attention_mask=mask,
        use_past_kv_cache=cached,
        stop_at_eos=False,
    )
    assert ours[:, 40:].tolist() == [_greedy(t, "sft", row) for row in rows]


# --- Grafts at positions -------------------------------------------------------------------------

Choose = Callable[[str, int | None, int, int | None], str]


def _at_spans(n: int) -> tuple[str, Choose]:
    """`last` moves on with generation; `[-1]`, `[1]` and `bos` keep to the prompt."""

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        source = "pre"
        if position >= n - 1:
            source = "sft"
        if position == n - 1 and component in ("q", "k", "mlp_in"):
            source = "alt"
        if position >= n - 1 and component == "v" and head == 0:
            source = "alt"
        if position == 1 and layer == 1:
            source = "sft"
        return source

    rules = ["sft @ last", "alt @ [-1] : q + k + mlp_in", "alt @ last : v : all : 0"]
    return " | ".join([*rules, "sft @ [1] : block : 1"]), choose


def _not_last(n: int) -> tuple[str, Choose]:
    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        return "pre" if position >= n - 1 or position == 0 else "sft"

    return "sft @ ~(bos + last)", choose


def _all_but_an_end(n: int) -> tuple[str, Choose]:
    """A complement of numbers holds what is generated too; `all` does as well."""

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        if component.startswith("mlp"):
            return "pre" if position == n - 1 else "alt"
        return "sft" if component in ("o", "unembed") else "pre"

    return "sft @ all : o | sft @ all : unembed | alt @ ~[-1] : mlp", choose


@pytest.mark.parametrize(
    ("variant", "make"),
    [
        *((variant, _at_spans) for variant in VARIANTS),
        *((v, _not_last) for v in ("gpt2", "neox-parallel", "mistral-window", "gemma3", "phi3")),
        *((v, _all_but_an_end) for v in ("gpt2", "llama-biased", "gemma2", "olmo2")),
    ],
)
def test_position_grafts_give_the_sequential_algorithm_step_by_step(
    tiny: MakeTiny, variant: str, make: Callable[[int], tuple[str, Choose]]
) -> None:
    t = tiny(variant, ("pre", "sft", "alt"))
    rows = [_ids(n, n + 1) for n in (5, 9, 3)]
    tokens, mask = _left(rows)
    ours = t.model.generate(tokens, NEW, graft=make(0)[0], attention_mask=mask, stop_at_eos=False)
    again = t.model.generate(
        tokens,
        NEW,
        graft=make(0)[0],
        attention_mask=mask,
        use_past_kv_cache=False,
        stop_at_eos=False,
    )
    assert torch.equal(ours, again)
    for i, row in enumerate(rows):
        whole = [*row, *ours[i, tokens.shape[1] :].tolist()]
        logits = sequential_graft(t.sources, whole[:-1], make(len(row))[1])
        assert logits[len(row) - 1 :].argmax(-1).tolist() == whole[len(row) :]
    plain = t.model.generate(tokens, NEW, attention_mask=mask, stop_at_eos=False)
    assert not torch.equal(ours, plain)


def test_the_prompts_own_end_stays_where_it_is(tiny: MakeTiny) -> None:
    """`[-1]` and `last` are the same for one token, and part from the second on."""
    t = tiny("llama")
    row = _ids(7, 3)
    batch = torch.tensor([row])
    n = len(row)

    def ends_there(component: str, layer: int | None, position: int, head: int | None) -> str:
        return "sft" if position == n - 1 else "pre"

    there = t.model.generate(batch, 8, graft="sft @ [-1]", stop_at_eos=False)[0].tolist()
    moving = t.model.generate(batch, 8, graft="sft @ last", stop_at_eos=False)[0].tolist()
    assert there[: n + 1] == moving[: n + 1]
    assert there != moving
    logits = sequential_graft(t.sources, there[:-1], ends_there)
    assert logits[n - 1 :].argmax(-1).tolist() == there[n:]


def test_grafts_in_force_hold_for_generation(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    batch = torch.tensor([_ids(6, 1)])
    wanted = t.model.generate(batch, 5, graft="sft @ last + [2]", stop_at_eos=False)
    with t.model.grafted("sft @ last + [2]"):
        assert torch.equal(t.model.generate(batch, 5, stop_at_eos=False), wanted)
    assert not torch.equal(t.model.generate(batch, 5, stop_at_eos=False), wanted)


# --- Texts ---------------------------------------------------------------------------------------

TEXTS = ["Who played the lead", "Renée Zellner-Ortiz starred in", "The"]


@pytest.mark.parametrize(
    ("variant", "tokenizer"),
    [("gpt2", "gpt2"), ("llama3-rope-tied", "llama3"), ("gemma2", "gemma")],
)
def test_texts_go_on_as_their_tokens_do(tiny: MakeTiny, variant: str, tokenizer: str) -> None:
    t = tiny(variant, tokenizer=tokenizer)
    assert t.tokenizer is not None
    texts = t.model.generate(TEXTS, NEW, graft="sft @ all", stop_at_eos=False)
    for text, given in zip(texts, TEXTS, strict=True):
        ids = t.tokenizer(given)["input_ids"]
        whole = [*ids, *_greedy(t, "sft", ids)]
        wanted = t.tokenizer.decode(whole[int(tokenizer != "gpt2") :])
        assert text == wanted
        assert text.startswith(given)
        assert t.model.generate(given, NEW, graft="sft @ all", stop_at_eos=False) == wanted
    tokens = t.model.generate(
        TEXTS, NEW, graft="sft @ all", stop_at_eos=False, return_type="tokens"
    )
    assert tokens[:, -NEW:].tolist() == [
        _greedy(t, "sft", t.tokenizer(given)["input_ids"]) for given in TEXTS
    ]


def test_prompts_with_spans_generate(tiny: MakeTiny) -> None:
    t = tiny("qwen3", tokenizer="gpt2")
    assert t.tokenizer is not None
    prompts = [
        Prompt("{actor} starred in", {"actor": "Anders Lindqvist"}),
        Prompt("The film with {actor} is called", {"actor": "Siobhán"}),
    ]
    tokens = t.model.generate(
        prompts, NEW, graft="sft @ actor + last", return_type="tokens", stop_at_eos=False
    )
    for i, prompt in enumerate(prompts):
        encoded = t.tokenizer(prompt.text, return_offsets_mapping=True)
        start = prompt.text.find(prompt.fields["actor"])
        end = start + len(prompt.fields["actor"])
        offsets = encoded["offset_mapping"]
        actor = {p for p, (a, b) in enumerate(offsets) if a < end and b > start}
        n = len(offsets)

        def choose(
            component: str,
            layer: int | None,
            position: int,
            head: int | None,
            actor: set[int] = actor,
            n: int = n,
        ) -> str:
            return "sft" if position in actor or position >= n - 1 else "pre"

        whole = [*encoded["input_ids"], *tokens[i, -NEW:].tolist()]
        logits = sequential_graft(t.sources, whole[:-1], choose)
        assert logits[n - 1 :].argmax(-1).tolist() == whole[n:]


# --- Stopping and drawing ------------------------------------------------------------------------


def test_an_eos_token_ends_its_prompt_and_no_other(tiny: MakeTiny) -> None:
    t = tiny("mistral-window")
    rows = [_ids(4, 4), _ids(9, 9)]
    tokens, mask = _left(rows)
    theirs = [_greedy(t, "pre", row, 8) for row in rows]
    end = theirs[0][2]
    assert end not in theirs[0][:2]
    assert end not in theirs[1]
    ours = t.model.generate(tokens, 8, attention_mask=mask, eos_token_id=end)
    assert ours[0, 9:].tolist() == [*theirs[0][:3], *[end] * 5]
    assert ours[1, 9:].tolist() == theirs[1]
    alone = t.model.generate(tokens[:1], 8, attention_mask=mask[:1], eos_token_id=[end, 96])
    assert alone[0, 9:].tolist() == theirs[0][:3]
    on = t.model.generate(tokens, 8, attention_mask=mask, eos_token_id=end, stop_at_eos=False)
    assert on[:, 9:].tolist() == theirs


def test_a_text_ends_before_its_eos_token(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    assert t.tokenizer is not None
    ids = t.tokenizer("The movie")["input_ids"]
    theirs = _greedy(t, "pre", ids, 5)
    text = t.model.generate("The movie", 5, eos_token_id=theirs[2])
    assert text == t.tokenizer.decode([*ids[1:], *theirs[:2]])


def test_no_new_tokens_is_the_prompt(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    assert t.model.generate("The movie", 0, stop_at_eos=False) == "The movie"
    tokens = torch.tensor([[5, 6]])
    assert torch.equal(t.model.generate(tokens, 0, stop_at_eos=False), tokens)


def test_drawing_repeats_with_its_generator(tiny: MakeTiny) -> None:
    t = tiny("llama")
    tokens = torch.tensor([_ids(4, 4)] * 3)

    def draw(seed: int, **options: object) -> Tensor:
        return t.model.generate(
            tokens,
            10,
            graft="sft @ last",
            do_sample=True,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, use_past_kv_cache=False))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    greedy = t.model.generate(tokens, 10, graft="sft @ last", stop_at_eos=False)
    assert torch.equal(draw(1, top_k=1), greedy)
    assert torch.equal(draw(1, temperature=1e-4), greedy)
    assert torch.equal(draw(1, temperature=0.0), greedy)


def test_drawn_tokens_follow_the_models_distribution(tiny: MakeTiny) -> None:
    t = tiny("llama")
    row = _ids(6, 5)
    many = torch.tensor([row] * 4000)
    generator = torch.Generator().manual_seed(0)
    drawn = t.model.generate(
        many,
        1,
        graft="sft @ all",
        do_sample=True,
        temperature=0.7,
        top_k=5,
        generator=generator,
        stop_at_eos=False,
    )[:, -1]
    values, ids = (t.logits("sft", row)[-1] / 0.7).topk(5)
    for probability, token in zip(values.softmax(-1).tolist(), ids.tolist(), strict=True):
        assert float((drawn == token).float().mean()) == pytest.approx(probability, abs=0.04)
    assert set(drawn.tolist()) <= set(ids.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, r"max_new_tokens=-1"),
        ({"graft": "sft @ title"}, "no span 'title'"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    tiny: MakeTiny, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("gpt2").model.generate(torch.tensor([[4, 5, 6]]), **options)


def test_a_resolved_mask_is_refused(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match="not a resolved mask"):
        t.model.generate(tokens, graft=t.model.resolve("sft @ last", tokens))


def test_generating_past_the_context_is_refused(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_ids(62, 1)])
    assert t.model.generate(tokens, 3, stop_at_eos=False).shape == (
        1,
        65,
    )  # the last token is not read
    with pytest.raises(ValueError, match="longer than the model's context of 64"):
        t.model.generate(tokens, 4, stop_at_eos=False)


@pytest.mark.parametrize("ends", [None, "one", "two"])
def test_it_ends_where_hugging_face_ends(tiny: MakeTiny, ends: str | None) -> None:
    """Regression: without a tokenizer, or with several EOS tokens in the settings, it ran on."""
    sources = copy.deepcopy(tiny("llama").sources)
    rows = [_ids(5, seed) for seed in range(4)]
    free = [_greedy(tiny("llama"), "pre", row, 8) for row in rows]
    chosen = {None: 96, "one": free[0][2], "two": [free[1][3], free[2][1]]}[ends]
    for model in sources.values():
        model.generation_config.eos_token_id = chosen
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    for row in rows:
        theirs = sources["pre"].generate(
            torch.tensor([row]), do_sample=False, max_new_tokens=8, attention_mask=torch.ones(1, 5)
        )
        assert model.generate(torch.tensor([row]), 8).tolist() == theirs.tolist()
    batch = torch.tensor(rows)
    theirs = sources["pre"].generate(
        batch, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(batch)
    )
    assert model.generate(batch, 8).tolist() == theirs.tolist()
