"""Running: layers to stop at, padding, BOS, contexts and texts as people give them."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import tiny_pair
from torch import Tensor
from toytokenizers import TOKENIZERS, gpt2_style, llama3_style

import graftlens
from graftlens.lens import logit_lens
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import from_tokens
from graftlens.prompts import Prompt, PromptError


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


class _OnGpu(Tensor):
    """A tensor that says it is on a GPU, and notes what is copied to the host."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def cpu(self) -> Tensor:  # type: ignore[override]
        _COPIED.append(tuple(self.shape))
        return self.as_subclass(Tensor)


_COPIED: list[tuple[int, ...]] = []


# --- Layers --------------------------------------------------------------------------------------


def test_stopping_at_a_layer_is_a_slice_over_the_layers(tiny: MakeTiny) -> None:
    """Regression: -1 ran all layers (one too far), and 99 was a bare IndexError."""
    t = tiny("llama")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        streams = t.sources["sft"](tokens, output_hidden_states=True).hidden_states
    n = t.model.arch.n_layers
    final = t.model(tokens, graft="sft @ all", stop_at_layer=n)
    ran = {0: 0, 1: 1, n - 1: n - 1, -1: n - 1, -2: n - 2, -n: 0, -50: 0, np.int64(-1): n - 1}
    for stop, index in ran.items():
        out, cache = t.model.run_with_cache(tokens, graft="sft @ all", stop_at_layer=stop)
        _close(out, streams[index])
        _close(t.model(tokens, graft="sft @ all", stop_at_layer=stop), streams[index])
        done = {name for name in cache if name.endswith("hook_resid_post")}
        assert len(done) == index, stop
    for stop in (99, n, torch.tensor(n)):
        assert torch.equal(t.model(tokens, graft="sft @ all", stop_at_layer=stop), final)
    hooked = t.model.run_with_hooks(tokens, graft="sft @ all", stop_at_layer=-1)
    _close(hooked, streams[n - 1])


@pytest.mark.parametrize("stop", [1.0, "1", True, [1]])
def test_a_layer_to_stop_at_is_a_whole_number(tiny: MakeTiny, stop: object) -> None:
    with pytest.raises(ValueError, match=r"stop_at_layer=.* write a whole number"):
        tiny("llama").model(torch.tensor([[5, 6]]), stop_at_layer=stop)


# --- Padding that no mask accounts for -----------------------------------------------------------

PAD, BOS, EOS = 9, 1, 2
#: rows; which of (pad, bos, eos) are what -> what is said of them, None where they run.
HIDDEN: dict[str, tuple[list[list[int]], int, int, str | None]] = {
    "pad = bos = eos, one row of two padded by one": ([[9, 5, 6], [5, 6, 7]], 9, 9, "row 0 begins"),
    "pad = bos = eos, both rows begin in BOS": ([[9, 5, 6], [9, 6, 7]], 9, 9, None),
    "pad = bos = eos, one row beginning in BOS": ([[9, 5, 6]], 9, 9, None),
    "pad = bos = eos, one padded row": ([[9, 9, 6]], 9, 9, "row 0 begins"),
    "pad = bos = eos, BOS and one pad": ([[9, 5, 6], [9, 9, 7]], 9, 9, "row 1 begins"),
    "pad = bos = eos, all padded by two": ([[9, 9, 5], [9, 9, 6]], 9, 9, "row 0 begins"),
    "pad = bos = eos, rows that end in EOS": ([[5, 6, 9], [6, 7, 9]], 9, 9, None),
    "pad = bos = eos, a padded end": ([[5, 9, 9]], 9, 9, "row 0 ends"),
    "pad = bos = eos, one padded end of two": ([[5, 6, 7], [5, 6, 9]], 9, 9, "row 1 ends"),
    "pad = eos, a row that begins in it": ([[9, 5, 6]], 1, 9, "row 0 begins"),
    "pad = eos, all rows begin in it": ([[9, 5, 6], [9, 5, 6]], 1, 9, "row 0 begins"),
    "pad = eos, rows that end in it once": ([[1, 5, 9], [1, 6, 9]], 1, 9, None),
    "pad = eos, EOS and a pad": ([[1, 5, 9], [1, 9, 9]], 1, 9, "row 1 ends"),
    "pad alone, at the start": ([[9, 1, 6]], 1, 2, "row 0 begins"),
    "pad alone, at the end": ([[1, 6, 9]], 1, 2, "row 0 ends"),
    "pad alone, in the middle": ([[1, 9, 6]], 1, 2, None),
    "pad = bos, at the end": ([[9, 6, 9]], 9, 2, "row 0 ends"),
    "a row of one token": ([[9], [5]], 1, 2, None),
    "two tokens, one of them padding": ([[9, 5]], 1, 2, "row 0 begins"),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_padding_without_a_mask_is_refused_on_every_device(case: str, gpu: bool) -> None:
    """Regression: a row left-padded by one (GPT-2's pad is its BOS), one padded row by itself, and
    any padded batch on a GPU ran silently with the padding as tokens.
    """
    rows, bos, eos, said = HIDDEN[case]
    tokens = torch.tensor(rows)
    known = {"pad_id": PAD, "bos_id": bos, "eos_ids": (eos,)}
    _COPIED.clear()
    for given in (tokens, tokens[0])[: 2 if len(rows) == 1 else 1]:
        given = given.as_subclass(_OnGpu) if gpu else given
        if said is None:
            assert not from_tokens(given, **known).padded
        else:
            with pytest.raises(PromptError, match=rf"{said} (in|with) the pad token 9.*attention_"):
                from_tokens(given, **known)
    if gpu and len(rows[0]) > 1:
        assert set(_COPIED) == {(len(rows), 4)}  # the edges, in one copy
    for mask in (torch.ones_like(tokens), torch.ones_like(tokens).bool()):
        assert not from_tokens(tokens, mask, **known).padded


@pytest.mark.parametrize("side", ["left", "right"])
def test_gpt2_padded_by_one_token_is_hugging_faces_with_its_mask(tiny: MakeTiny, side: str) -> None:
    """Regression: without the mask it ran silently, off by half of the largest logit."""
    t = tiny("gpt2", tokenizer="gpt2")
    pad = t.model.tokenizer.pad_token_id
    assert pad == t.model.tokenizer.bos_token_id == t.model.tokenizer.eos_token_id
    long, short = [50, 61, 72, 83], [33, 44, 55]
    padded = [pad, *short] if side == "left" else [*short, pad]
    tokens = torch.tensor([long, padded])
    with pytest.raises(PromptError, match=r"row 1 .* pad token 0.*Pass attention_mask"):
        t.model(tokens)
    with pytest.raises(PromptError, match=r"row 1 .* pad token 0"):
        t.model.run_with_cache(tokens, graft="sft @ last")
    with pytest.raises(PromptError, match=r"row 1 .* pad token 0"):
        t.model.generate(tokens)
    mask = (tokens != pad).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        theirs = t.sources["sft"](tokens, attention_mask=mask, position_ids=positions).logits
    ours = t.model(tokens, graft="sft @ all", attention_mask=mask)
    real = mask.bool()
    _close(ours[real], theirs[real])


def test_what_to_tokens_pads_is_not_run_without_its_mask(tiny: MakeTiny) -> None:
    """Regression: a tokenizer without a pad token has texts padded with EOS, which nothing saw."""
    t = tiny("llama", tokenizer="llama3")
    model = t.model
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.pad_token = None
    tokens = model.to_tokens(["Who played the lead", "The"])
    assert tokens[1, -1] == model.tokenizer.eos_token_id
    with pytest.raises(PromptError, match=r"row 1 ends in the pad token 1"):
        model(tokens)
    assert model(model.to_tokens("The movie")).shape[1] == len(
        model.tokenizer("The movie").input_ids
    )


def test_a_pad_token_of_the_settings_counts_where_there_is_no_tokenizer() -> None:
    pair = tiny_pair("llama", seed=1)
    for source in pair.values():
        source.generation_config.pad_token_id = 0
    model = GraftedTransformer.from_pretrained(pair, check=True, verbose=False)
    with pytest.raises(PromptError, match="row 0 begins in the pad token 0"):
        model(torch.tensor([[0, 0, 5]]))


def test_a_bos_token_that_only_the_config_has_is_one() -> None:
    """Qwen 2.5: no BOS token in the tokenizer; its config's is the pad token. It was refused."""
    tokenizer = gpt2_style()
    tokenizer.bos_token = None
    pair = tiny_pair("qwen2", seed=1, vocab_size=len(tokenizer))
    pad = tokenizer.pad_token_id
    for source in pair.values():
        source.config.bos_token_id = pad
    model = GraftedTransformer.from_pretrained(pair, tokenizer=tokenizer, verbose=False)
    tokens = torch.tensor([[pad, 5, 6, 7], [pad, 8, 9, 10]])
    theirs = pair["sft"](tokens, use_cache=False).logits
    _close(model(tokens, graft="sft @ all"), theirs)
    for hidden in ([[pad, pad, 6, 7], [pad, 8, 9, 10]], [[pad, 5, 6, 7], [11, 8, 9, 10]]):
        with pytest.raises(PromptError, match=f"row 0 begins in the pad token {pad}"):
            model(torch.tensor(hidden))


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "of scores": (torch.tensor([[0.0, 0.0, -1e9]]), r"holds -1000000000.0. Write 1 for tokens"),
    "of nan": (torch.tensor([[1.0, 1.0, torch.nan]]), r"holds nan"),
    "of segments": (torch.tensor([[1, 1, 2]]), r"holds 2. Write 1"),
    "negative": (torch.tensor([[1, 1, -1]]), r"holds -1. Write 1"),
    "with a hole": (torch.tensor([[1, 0, 1]]), r"row 0 is \[1, 0, 1\].*in one run"),
    "of nothing": (torch.tensor([[0, 0, 0]]), r"row 0 is \[0, 0, 0\]"),
    "too long": (torch.ones(1, 4), r"shape \(1, 4\), tokens have \(1, 3\)"),
    "of one dimension": (torch.ones(3), r"shape \(3,\), tokens have \(1, 3\)"),
    "of four dimensions": (torch.ones(1, 1, 3, 3), r"shape \(1, 1, 3, 3\)"),
    "a list": ([[1, 1, 0]], r"attention_mask is a list. Give a tensor"),
    "an array": (np.ones((1, 3)), r"attention_mask is a ndarray. Give a tensor"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_mask_that_means_something_else_is_refused(tiny: MakeTiny, case: str) -> None:
    """Regression: a mask of scores (0 for tokens) was read the other way round, 2 as a token."""
    mask, said = BAD_MASKS[case]
    with pytest.raises(PromptError, match=said):
        tiny("llama").model(torch.tensor([[5, 6, 7]]), attention_mask=mask)


def test_masks_of_any_number_type_and_of_one_row(tiny: MakeTiny) -> None:
    t = tiny("llama")
    alone = t.logits("pre", [5, 6, 7])
    for mask in ([0, 1, 1, 1], [0.0, 1.0, 1.0, 1.0], [False, True, True, True]):
        row = torch.tensor([9, 5, 6, 7])
        _close(t.model(row, attention_mask=torch.tensor(mask))[0, 1:], alone)
        _close(t.model(row[None], attention_mask=torch.tensor([mask]))[0, 1:], alone)
        # Regression: a tokenizer's mask [1, pos] beside a row [pos] was refused for a while.
        _close(t.model(row, attention_mask=torch.tensor([mask]))[0, 1:], alone)
    batch = t.model.batch(torch.tensor([9, 5, 6, 7]), attention_mask=torch.tensor([0, 1, 1, 1]))
    _close(t.model(batch)[0, 1:], alone)
    with pytest.raises(ValueError, match="a Batch knows its padding"):
        t.model(batch, attention_mask=torch.ones(1, 4))


# --- BOS -----------------------------------------------------------------------------------------

TWICE = r"begins with the BOS token '<\|begin_of_text\|>'.*Pass prepend_bos=False"


@pytest.fixture
def told() -> Iterator[list[Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _bos_notes(told: list[Any]) -> list[str]:
    return [str(w.message) for w in told if "BOS token" in str(w.message)]


def test_a_second_bos_token_is_told_of_once_a_call(tiny: MakeTiny, told: list[Any]) -> None:
    """Regression: a text that begins with BOS got two of them without a word."""
    t = tiny("llama", tokenizer="llama3")
    text = "<|begin_of_text|>Who played"
    chat = "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    written = t.model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who played"}], chat_template=chat, tokenize=False
    )
    prompt = Prompt("<|begin_of_text|>Who is {name}", {"name": "Ann"}, answer=" Bob")
    calls = {
        "to_tokens": lambda: t.model.to_tokens(text),
        "forward": lambda: t.model(text),
        "forced": lambda: t.model(text, prepend_bos=True),
        "many": lambda: t.model(["The", text, written]),
        "cache": lambda: t.model.run_with_cache(text),
        "strings": lambda: t.model.to_str_tokens(text),
        "generate": lambda: t.model.generate(written, 1),
        "prompt": lambda: t.model(prompt),
        "evaluate": lambda: graftlens.evaluate(t.model, [prompt], "sft @ all", progress=False),
        "lens": lambda: logit_lens(t.model, prompt, "sft @ all"),
    }
    for name, call in calls.items():
        told.clear()
        call()
        notes = _bos_notes(told)
        assert len(notes) == 1, name
        assert "Pass prepend_bos=False" in notes[0]
    told.clear()
    t.model(["The", text, written])
    assert _bos_notes(told)[0].startswith("prompt 1 begins with the BOS token '<|begin_of_text|>'")
    assert _bos_notes(told)[0].endswith("(And 1 more prompts.)")
    assert told[0].filename == __file__


def test_one_bos_token_needs_no_word(tiny: MakeTiny, told: list[Any]) -> None:
    llama, gpt2 = tiny("llama", tokenizer="llama3").model, tiny("gpt2", tokenizer="gpt2").model
    text = "<|begin_of_text|>Who played"
    assert llama.to_tokens(text, prepend_bos=False)[0].tolist().count(0) == 1
    assert torch.equal(llama.to_tokens(text, prepend_bos=False), llama.to_tokens("Who played"))
    llama.to_tokens("Who <|begin_of_text|>")
    for twice in ("<|endoftext|>Who", "<|endoftext|><|endoftext|>Who"):
        gpt2.to_tokens(twice)
    gpt2.to_tokens("<|endoftext|>Who", prepend_bos=True)
    assert not _bos_notes(told)


def test_cfg_says_whether_texts_get_a_bos_token(tiny: MakeTiny) -> None:
    """Regression: setting `model.cfg.default_prepend_bos` had no effect."""
    texts = ["Who is", "The movie Winter's End was"]
    prompt = Prompt("Who is {name}", {"name": "Ann"}, answer=" Bob", distractors=[" The"])
    for kind, own in (("llama3", True), ("gpt2", False)):
        t = tiny("llama", tokenizer=kind)
        model, plain = t.model, {}
        for forced in (None, True, False):
            plain[forced] = [
                model.to_tokens(texts, prepend_bos=forced),
                model(texts, graft="sft @ last", prepend_bos=forced),
                model.generate(texts, 2, return_type="tokens", prepend_bos=forced),
            ]
            if kind == "gpt2":
                options = {"progress": False, "prepend_bos": forced}
                table = graftlens.evaluate(model, [prompt], "sft @ last", **options)
                lens = logit_lens(model, prompt, "sft @ last", prepend_bos=forced)
                plain[forced] += [table["logprob"].iloc[-1], lens]
        for forced in (True, False, None):
            model.cfg.default_prepend_bos = forced
            wanted = plain[forced]
            assert torch.equal(model.to_tokens(texts), wanted[0])
            assert torch.equal(model(texts, graft="sft @ last"), wanted[1])
            assert torch.equal(model.generate(texts, 2, return_type="tokens"), wanted[2])
            if kind == "gpt2":
                table = graftlens.evaluate(model, [prompt], "sft @ last", progress=False)
                assert table["logprob"].iloc[-1] == wanted[3]
                assert logit_lens(model, prompt, "sft @ last").equals(wanted[4])
            bos = model.tokenizer.bos_token_id
            assert bool((model.to_tokens(texts)[:, 0] == bos).all()) == (
                own if forced is None else forced
            )
            # What a call asks for goes first.
            assert torch.equal(model.to_tokens(texts, prepend_bos=True), plain[True][0])
    model.cfg.default_prepend_bos = "yes"
    with pytest.raises(ValueError, match=r"'yes'. Write True or False, or None"):
        model("Who")


# --- The padding side ----------------------------------------------------------------------------


def test_the_tokenizers_padding_side_is_the_models(tiny: MakeTiny) -> None:
    """Regression: setting `model.tokenizer.padding_side` had no effect."""
    t = tiny("llama", tokenizer="llama3")
    model = t.model
    model.tokenizer = copy.deepcopy(model.tokenizer)
    texts = ["Who is", "The movie Winter's End was", "Q:"]
    right = model(texts, graft="sft @ last")
    lens = logit_lens(model, texts, "sft @ all")
    model.tokenizer.padding_side = "left"
    left = model(texts, graft="sft @ last")
    assert torch.equal(left, model(texts, graft="sft @ last", padding_side="left"))
    assert torch.equal(right, model(texts, graft="sft @ last", padding_side="right"))
    theirs = model.tokenizer(texts, return_tensors="pt", padding=True)
    assert torch.equal(model.to_tokens(texts), theirs.input_ids)
    given = model(theirs.input_ids, graft="sft @ last", attention_mask=theirs.attention_mask)
    assert torch.equal(left, given)
    for i, n in enumerate(theirs.attention_mask.sum(1).tolist()):
        _close(left[i, -n:], right[i, :n])
    other = logit_lens(model, texts, "sft @ all")
    for name in lens.columns:
        if lens[name].dtype.kind in "if":
            ours, wanted = (list(table[name].dropna()) for table in (other, lens))
            assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5), name
    model.tokenizer.padding_side = "middle"
    with pytest.raises(ValueError, match=r"padding_side='middle'. Allowed"):
        model(texts)


def test_a_tokenizer_that_pads_on_the_left_changes_no_places() -> None:
    """Chat models bring such ones: columns stay where they are with any other, and the caller's
    tokenizer stays as it is.
    """
    tokenizer = llama3_style()
    pair = tiny_pair("llama", 1, len(tokenizer))
    texts = ["Who is", "The movie Winter's End was"]
    one = GraftedTransformer.from_pretrained(pair, tokenizer=tokenizer, check=False, verbose=False)
    wanted = one(texts)
    tokenizer.padding_side = "left"
    two = GraftedTransformer.from_pretrained(pair, tokenizer=tokenizer, check=False, verbose=False)
    assert two.tokenizer.padding_side == "right"
    assert tokenizer.padding_side == "left"
    assert torch.equal(two(texts), wanted)


# --- Contexts ------------------------------------------------------------------------------------

BEYOND = r"tokens are more than the model's context of 64"


def _context_notes(told: list[Any]) -> list[str]:
    return [str(w.message) for w in told if "context of 64" in str(w.message)]


def test_a_text_beyond_the_context_of_rotary_positions_is_told_of(
    tiny: MakeTiny, told: list[Any]
) -> None:
    """Regression: 100,000 characters ran without a word where the context is 64."""
    t = tiny("llama", tokenizer="gpt2")
    text = "The capital of the country " * 20
    n = t.model.to_tokens(text, truncate=False).shape[1]
    assert n > 64
    assert not told
    prompt = Prompt(text.strip(), answer=" Bob")
    for call in (
        lambda: t.model(text),
        lambda: t.model(["Who", text], "loss", graft="sft @ last"),
        lambda: t.model.run_with_cache(text),
        lambda: t.model.logits_at(text, [[0]]),
        lambda: graftlens.evaluate(t.model, [prompt], "sft @ all", progress=False),
    ):
        told.clear()
        call()
        assert len(_context_notes(told)) == 1
    assert str(told[0].message).startswith(f"{n}") or "tokens are more" in str(told[0].message)
    told.clear()
    t.model(torch.full((1, 64), 5))
    # Padding is no part of a prompt.
    mask = torch.ones(1, 70, dtype=torch.long)
    mask[0, :10] = 0
    t.model(torch.full((1, 70), 5), attention_mask=mask)
    assert not _context_notes(told)
    with pytest.raises(ValueError, match=r"longer than the model's context of 64. Shorten it"):
        tiny("gpt2", tokenizer="gpt2").model(text)


# --- Half a character ----------------------------------------------------------------------------

HALVES = ["Who \ud800 played", "\udfff", "caf\udce9"]


@pytest.mark.parametrize("text", HALVES, ids=ascii)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_character_is_refused_in_one_sentence(tiny: MakeTiny, text: str, kind: str) -> None:
    """Regression: a lone surrogate was a TypeError out of the tokenizer."""
    model = tiny("llama", tokenizer=kind).model
    said = rf"holds U\+{ord(next(c for c in text if c >= chr(0xD800))):X} at character \d+: half"
    for call in (
        lambda: model(text),
        lambda: model.to_tokens(["The", text]),
        lambda: model.to_str_tokens(text),
        lambda: model.to_single_token(text),
        lambda: model.tokens_to_residual_directions(text),
        lambda: model.generate(text),
        lambda: Prompt(text),
        lambda: Prompt("Who is {name}", {"name": text}),
        lambda: Prompt("Who is {name}", {"name": "Ann", "unused": text}),
        lambda: Prompt("Who", answer=text),
        lambda: Prompt("Who", answer=" a", distractors=[" b", text]),
        lambda: Prompt("Who", name=text),
    ):
        with pytest.raises(ValueError, match=said) as error:
            call()
        str(error.value).encode()  # can be printed and logged


def test_whole_characters_beyond_the_basic_plane_are_no_halves(tiny: MakeTiny) -> None:
    t: Tiny = tiny("llama", tokenizer="gpt2")
    assert t.model.to_string(t.model.to_tokens("a \U0001f642 b", prepend_bos=False)[0]) == (
        "a \U0001f642 b"
    )
