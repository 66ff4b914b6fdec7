"""Generation: where it ends, what fills up after the end, and the text that comes back."""

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import MakeTiny
from families import tiny_sources
from torch import Tensor
from transformers import PreTrainedModel

from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

N = 5
ROWS = [torch.randint(3, 97, (N,), generator=torch.Generator().manual_seed(s)) for s in range(4)]
NEW = 8


def _free(source: PreTrainedModel, row: Tensor) -> list[int]:
    """Hugging Face's greedy continuation that nothing ends."""
    out = source.generate(
        row[None],
        attention_mask=torch.ones(1, len(row)),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(row) :].tolist()


def _theirs(source: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    batch = torch.stack(rows)
    return source.generate(
        batch, do_sample=False, max_new_tokens=NEW, attention_mask=torch.ones_like(batch)
    )


@pytest.fixture(scope="module")
def ends() -> dict[str, list[int]]:
    """End tokens that cut some rows of each source: those of its own third and fifth steps."""
    sources = tiny_sources("llama", ("pre", "sft", "alt"), 1)
    return {
        "pre": [_free(sources["pre"], ROWS[0])[3]],
        "sft": [_free(sources["sft"], ROWS[1])[2], _free(sources["sft"], ROWS[2])[4]],
        "alt": [_free(sources["alt"], ROWS[3])[3]],
    }


def _model(
    ends: dict[str, list[int]], pads: dict[str, int | None]
) -> tuple[GraftedTransformer, dict[str, PreTrainedModel]]:
    sources = copy.deepcopy(tiny_sources("llama", ("pre", "sft", "alt"), 1))
    for name, source in sources.items():
        found = ends[name]
        source.generation_config.eos_token_id = found[0] if len(found) == 1 else found
        source.generation_config.pad_token_id = pads.get(name)
    return GraftedTransformer.from_pretrained(sources, check=False, verbose=False), sources


@pytest.mark.parametrize("pads", [{}, {"pre": 90, "sft": 91}], ids=["no pad", "pads"])
def test_a_uniform_graft_ends_where_its_source_does(
    ends: dict[str, list[int]], pads: dict[str, int | None]
) -> None:
    """Regression: under `sft @ all` the base's end tokens held, so it ran past the SFT's own."""
    model, sources = _model(ends, pads)
    assert model.end_tokens == {name: tuple(found) for name, found in ends.items()}
    assert model.pad_token == {"pre": None, "sft": None, "alt": None} | pads
    batch = torch.stack(ROWS)
    wanted = {name: _theirs(source, ROWS) for name, source in sources.items()}
    assert any(
        (w[:, -1] != torch.tensor([_free(sources[n], r)[-1] for r in ROWS])).any()
        for n, w in wanted.items()
    )
    grafts = {"none": "pre", "pre @ all": "pre", "sft @ all": "sft", "alt @ all": "alt"}
    grafts |= {"alt @ all | sft @ all": "sft", "sft @ [0, 1, 2, 3, 4] + last": "sft"}
    for graft, source in grafts.items():
        ours = model.generate(batch, NEW, graft=graft, use_past_kv_cache=graft != "sft @ all")
        assert ours.tolist() == wanted[source].tolist(), graft
    with model.grafted("sft @ all"):
        assert model.generate(batch, NEW).tolist() == wanted["sft"].tolist()
    ours = model.generate(ROWS[1][None], NEW, graft="sft @ all")
    assert ours.tolist() == _theirs(sources["sft"], [ROWS[1]]).tolist()


@pytest.mark.parametrize(
    ("graft", "involved"),
    [
        ("sft @ last", ("pre", "sft")),
        ("sft @ all : q", ("pre", "sft")),
        ("sft @ all : block : 0", ("pre", "sft")),
        ("sft @ all : v : all : 0", ("pre", "sft")),
        ("sft @ [0, 1, 2, 3, 4]", ("pre", "sft")),  # what is generated is the base's
        ("alt @ all | sft @ last", ("sft", "alt")),
        ("alt @ bos | sft @ last", ("pre", "sft", "alt")),
    ],
)
def test_a_mixed_graft_ends_at_the_end_tokens_of_all_its_sources(
    ends: dict[str, list[int]], graft: str, involved: tuple[str, ...]
) -> None:
    model, _ = _model(ends, {})
    batch = torch.stack(ROWS)
    union = [end for name in involved for end in ends[name]]
    free = model.generate(batch, NEW, graft=graft, stop_at_eos=False)
    # Every row is what it is without end tokens, up to the first of the union, and then filled up.
    wanted = free.clone()
    for row in wanted:
        at = next((i for i in range(N, len(row)) if int(row[i]) in union), len(row))
        row[at + 1 :] = union[0]
    longest = max(
        next((i + 1 for i in range(N, len(row)) if int(row[i]) in union), len(row)) for row in free
    )
    ours = model.generate(batch, NEW, graft=graft)
    assert ours.tolist() == wanted[:, :longest].tolist()
    given = model.generate(batch, NEW, graft=graft, eos_token_id=union)
    assert given.tolist() == ours.tolist()


def test_the_end_tokens_of_a_mixture_are_each_sources_own(ends: dict[str, list[int]]) -> None:
    """An end token taken from what the graft gives shows that every source's tokens count."""
    for graft, owner in (("sft @ last", "pre"), ("sft @ last", "sft"), ("sft @ last", "alt")):
        model, _ = _model(ends, {})
        free = model.generate(ROWS[0][None], NEW, graft=graft, stop_at_eos=False)[0].tolist()
        model.end_tokens = dict.fromkeys(model.sources, (0,)) | {owner: (free[N + 2],)}
        ours = model.generate(ROWS[0][None], NEW, graft=graft)[0].tolist()
        at = free.index(free[N + 2], N)
        assert ours == (free if owner == "alt" else free[: at + 1]), owner


def test_explicit_end_tokens_hold_for_every_source(ends: dict[str, list[int]]) -> None:
    model, sources = _model(ends, {})
    batch = ROWS[0][None]
    free = _free(sources["sft"], ROWS[0])
    at = free.index(free[4])
    for given in (free[4], [free[4], 96], torch.tensor([free[4]]), torch.tensor(free[4])):
        ours = model.generate(batch, NEW, graft="sft @ all", eos_token_id=given)
        assert ours[0, N:].tolist() == free[: at + 1]
    for options in ({"stop_at_eos": False}, {"eos_token_id": []}):
        ours = model.generate(batch, NEW, graft="sft @ all", **options)
        assert ours[0, N:].tolist() == free
    with pytest.raises(ValueError, match=r"eos_token_id=1\.5: write a whole number"):
        model.generate(batch, NEW, eos_token_id=[1.5])


def test_a_source_without_end_tokens_has_the_tokenizers(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    eos = t.model.tokenizer.eos_token_id
    t.model.end_tokens = {"pre": (50,), "sft": ()}
    ids = t.model.to_tokens("Who")[0]
    free = _free(t.sources["sft"], ids)
    t.model.tokenizer = copy.deepcopy(t.model.tokenizer)
    assert eos not in free
    t.model.tokenizer.eos_token = t.model.tokenizer.convert_ids_to_tokens(free[3])
    out = t.model.generate(ids[None], NEW, graft="sft @ all")[0, len(ids) :].tolist()
    assert out == free[: free.index(free[3]) + 1]
    base = _free(t.sources["pre"], ids)
    assert 50 not in base
    assert t.model.generate(ids[None], NEW)[0, len(ids) :].tolist() == base


# --- The text that comes back --------------------------------------------------------------------

CHAT = "<|begin_of_text|>Who played the lead in The Glass River?"


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "sentencepiece", "gemma"])
def test_the_text_is_what_was_given_and_what_is_new(tiny: MakeTiny, kind: str) -> None:
    """Regression: a leading special token was dropped, so cutting off the prompt's length cut into
    what was generated.
    """
    t = tiny("llama", tokenizer=kind)
    model, tokenizer = t.model, t.model.tokenizer
    bos = tokenizer.bos_token
    given: list[Any] = [
        f"{bos}Who played the lead",
        "The movie  Winter's End",
        " Q: Łukasz",
        f"{bos}",
        Prompt(bos + "{who} starred in", {"who": "Renée Zellner-Ortiz"}),
    ]
    texts = [item.text if isinstance(item, Prompt) else item for item in given]
    options = {"graft": "sft @ all", "prepend_bos": False, "stop_at_eos": False}
    both = model.generate(given, 6, return_type="str", **options)
    new = model.generate(given, 6, return_type="str", new_only=True, **options)
    for text, out, added in zip(texts, both, new, strict=True):
        assert out == text + added
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        free = _free(t.sources["sft"], torch.tensor(ids))[:6]
        prompt, whole = tokenizer.decode(ids), tokenizer.decode(ids + free)
        assert whole == prompt + added
    assert model.generate(given[0], 6, **options) == both[0]
    assert model.generate(given[-1], 6, new_only=True, **options) == new[-1]
    tokens = model.generate(given, 6, return_type="tokens", **options)
    alone = model.generate(given, 6, return_type="tokens", new_only=True, **options)
    assert torch.equal(alone, tokens[:, -6:])
    assert (
        alone[0].tolist()
        == _free(
            t.sources["sft"],
            torch.tensor(tokenizer(texts[0], add_special_tokens=False)["input_ids"]),
        )[:6]
    )


def test_the_text_of_tokens_keeps_their_special_tokens(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    tokens = t.model.to_tokens("Who played")
    options = {"graft": "sft @ all", "stop_at_eos": False}
    text = t.model.generate(tokens, 4, return_type="str", **options)
    new = t.model.generate(tokens, 4, return_type="str", new_only=True, **options)
    prompt = "<|begin_of_text|>Who played"
    assert t.model.to_string(tokens[0]) == prompt
    assert text == [prompt + new[0]]
    # A batch of prompts knows their texts.
    prompts = [Prompt("Who {what}", {"what": "played"}), Prompt("The")]
    batch = t.model.batch(prompts)
    out = t.model.generate(batch, 4, return_type="str", **options)
    assert out == t.model.generate(prompts, 4, **options)
    assert out[0] == "Who played" + new[0]


def test_new_text_has_no_end_token(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    ids = t.model.to_tokens("The movie")[0]
    free = _free(t.sources["sft"], ids)
    end = free[2]
    assert end not in free[:2]
    new = t.model.generate("The movie", 6, graft="sft @ all", eos_token_id=end, new_only=True)
    assert new == t.model.tokenizer.decode(free[:2])
    cut = t.model.generate(
        "The movie", 6, graft="sft @ all", eos_token_id=end, new_only=True, return_type="tokens"
    )
    assert cut.tolist() == [free[:3]]
    assert t.model.generate("The movie", 0, new_only=True) == ""
    assert t.model.generate("<|begin_of_text|>The", 0, prepend_bos=False) == "<|begin_of_text|>The"


def test_a_character_that_generation_completes_is_not_lost(tiny: MakeTiny) -> None:
    """Tokens may end in the middle of a character; what follows may complete it."""
    t = tiny("llama", tokenizer="gpt2")
    ids = t.model.tokenizer("Łukasz")["input_ids"]
    halves = t.model.to_string(ids[:1])
    assert halves == "\N{REPLACEMENT CHARACTER}"
    assert t.model.added_text(ids[:1], ids[1:]) == "Łukasz"
    assert t.model.added_text(ids[:2], ids[2:]) == "ukasz"


# --- Contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_generation_past_the_context_is_told_of_once(tiny: MakeTiny, cached: bool) -> None:
    """Regression: rotary models generated past their context of 64 without a word."""
    t = tiny("llama")
    for length, new, notes in ((60, 5, 0), (60, 8, 1), (64, 1, 0), (64, 2, 1), (66, 3, 1)):
        tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            t.model.generate(tokens, new, stop_at_eos=False, use_past_kv_cache=cached)
        found = [w for w in told if "context of 64" in str(w.message)]
        assert len(found) == notes, (length, new)
