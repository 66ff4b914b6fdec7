"""Spans are the tokens of their fields, in every manner that tokenizers cut text.

The oracle works on bytes: it writes each token's own bytes one after another, which gives the text
again, and so knows which bytes of the text a token is. It never asks for offsets.
"""

import dataclasses
import pickle
import re
from typing import Any

import jaxtyping
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from toytokenizers import TOKENIZERS
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from graftlens.prompts import (
    FrozenMap,
    Prompt,
    PromptError,
    Tokenized,
    continuation,
    encode,
    tokenize,
)

MADE = {name: make() for name, make in TOKENIZERS.items()}
every_tokenizer = pytest.mark.parametrize("style", sorted(MADE))
with_bos = pytest.mark.parametrize("style", sorted(set(MADE) - {"gpt2"}))


# -- the oracle --------------------------------------------------------------------------------


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, others are counted on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def token_bytes(token: str, style: str) -> bytes:
    if style in ("gpt2", "llama3"):
        return bytes(_ALPHABET[letter] for letter in token)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def byte_ranges(text: str, ids: tuple[int, ...], style: str) -> list[tuple[int, int]]:
    """Which bytes of the text each token is; (0, 0) for BOS."""
    tokenizer = MADE[style]
    written = b""
    ranges = []
    for index in ids:
        before = len(written)
        if index != tokenizer.bos_token_id:
            written += token_bytes(tokenizer.convert_ids_to_tokens(index), style)
        ranges.append((before, len(written)))
    # Sentencepiece puts a space before the text, which is no byte of it.
    shift = len(written) - len(text.encode())
    assert written[shift:] == text.encode(), "the oracle itself: the tokens are the text"
    assert shift == (1 if style == "sentencepiece" and not text.startswith(" ") else 0)
    return [(max(a - shift, 0), max(b - shift, 0)) if a < b else (0, 0) for a, b in ranges]


def oracle(prompt: Prompt, ids: tuple[int, ...], style: str) -> dict[str, list[list[int]]]:
    """Field -> its runs, found by cutting the template at its braces and counting bytes."""
    ranges = byte_ranges(prompt.text, ids, style)
    runs: dict[str, list[list[int]]] = {}
    place = 0
    for piece in re.split(r"(\{\{|\}\}|\{\w+\})", prompt.template):
        if re.fullmatch(r"\{\w+\}", piece):
            name = piece[1:-1]
            end = place + len(prompt.fields[name].encode())
            run = [i for i, (a, b) in enumerate(ranges) if a < end and place < b]
            runs.setdefault(name, []).append(run)
            place = end
        else:
            place += len({"{{": "{", "}}": "}"}.get(piece, piece).encode())
    assert place == len(prompt.text.encode())
    return runs


def check(prompt: Prompt, style: str) -> Tokenized:
    found = tokenize(prompt, MADE[style])
    last = len(found.ids) - 1
    wanted: dict[str, list[list[int]]] = {
        **oracle(prompt, found.ids, style),
        "bos": [[0]],
        "last": [[last]],
        "all": [list(range(last + 1))],
        "prompt": [list(range(last + 1))],
    }
    assert {name: [list(run) for run in runs] for name, runs in found.spans.items()} == wanted
    return found


def decoded(found: Tokenized, span: str, style: str) -> list[str]:
    """The text of each run of a span, byte by byte."""
    tokens = [MADE[style].convert_ids_to_tokens(i) for i in found.ids]
    return [
        b"".join(token_bytes(tokens[i], style) for i in run).decode() for run in found.spans[span]
    ]


# -- spans -------------------------------------------------------------------------------------

NAMES = (
    "Zendaya",
    "Robert Downey Jr.",
    "Renée Zellner-Ortiz",
    "O'Hara",
    "Siobhán O'Malley",
    "Mary-Jane D'Angelo III",
    "François L'Écuyer",
    "X",
    "the man who was once the lead in The Glass River",
    "\U0001f642",
    "\U0001f469‍\U0001f680 Ada",
    "東京 太郎",
    "Łukasz Øvergård",
    "José",
    "1987",
    "Dr. J. R. R. T.",
    "नाम देव",
)
TEMPLATES = (
    "The movie with {x} was good",
    "{x} starred in a movie",
    "The movie starred {x}",
    "{x}",
    "In 'a{x}' and ({x}), there",
    "Q: Who is {x}?\nA: {x} is",
    "un{x}able prefix",
    "{x}{x}",
    "{x} {x}",
    "the {{{x}}} of set {{a}}",
)


@every_tokenizer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_spans_are_the_field_s_tokens(template: str, name: str, style: str) -> None:
    """Suffixes, hyphens, accents, emoji; at the very start, the very end, twice, inside a word."""
    check(Prompt(template, {"x": name}), style)


_TEXTS = st.text(
    st.sampled_from("abcdeRSTiou  .,'-éÉøŁ東京\U0001f642\n0123"), min_size=1, max_size=8
)
_FIELDS = _TEXTS.map(str.strip).filter(bool)


@settings(deadline=None, max_examples=120)
@given(
    style=st.sampled_from(sorted(MADE)),
    literals=st.lists(_TEXTS | st.just(""), min_size=2, max_size=4),
    order=st.lists(st.sampled_from(["a", "b", "c"]), min_size=3, max_size=3),
    fields=st.fixed_dictionaries({"a": _FIELDS, "b": _FIELDS, "c": _FIELDS}),
)
def test_any_template_with_any_fields(
    style: str, literals: list[str], order: list[str], fields: dict[str, str]
) -> None:
    template = literals[0] + "".join(
        f"{{{name}}}{literal}" for name, literal in zip(order, literals[1:], strict=False)
    )
    check(Prompt(template, fields), style)


@pytest.mark.parametrize(
    ("style", "spans"),
    [
        ("gpt2", ["Robert", " ", "D", "o", "w", "ne", "y", " Jr", "."]),
        ("llama3", ["Robert", " ", "D", "o", "w", "ne", "y", " Jr", "."]),
        ("sentencepiece", [" Rob", "ert", " ", "D", "o", "w", "n", "ey", " J", "r."]),
        ("gemma", ["R", "obert", " ", "D", "o", "w", "n", "ey", " J", "r."]),
    ],
)
def test_a_name_with_a_suffix_by_hand(style: str, spans: list[str]) -> None:
    """Lone spaces inside the name belong to it, also where offsets give them no width."""
    prompt = Prompt("{x} acted", {"x": "Robert Downey Jr."})
    found = tokenize(prompt, MADE[style])
    (run,) = found.spans["x"]
    texts = [token_bytes(MADE[style].convert_ids_to_tokens(found.ids[i]), style) for i in run]
    assert [t.decode() for t in texts] == spans


@every_tokenizer
def test_the_same_text_elsewhere_is_not_selected(style: str) -> None:
    """A search for token ids would find the first of these."""
    prompt = Prompt("Renée met Anders; Renée saw {x} and Renée left", {"x": "Renée"})
    found = check(prompt, style)
    (run,) = found.spans["x"]
    before = len(tokenize("Renée met Anders; Renée saw", MADE[style]))
    assert run[0] >= before
    assert decoded(found, "x", style)[0].strip() == "Renée"
    assert (
        tokenize("Renée met Anders; Renée saw Renée", MADE[style]).ids[run[0] :]
        == found.ids[run[0] : run[-1] + 1]
    )


@every_tokenizer
def test_a_field_that_stands_twice_has_two_runs_in_order(style: str) -> None:
    found = check(Prompt("Q: Who is {x}? A: {x} is", {"x": "Anders Lindqvist"}), style)
    assert [text.strip() for text in decoded(found, "x", style)] == ["Anders Lindqvist"] * 2
    assert found.spans["x"][0][-1] < found.spans["x"][1][0]


@every_tokenizer
def test_adjacent_fields_share_the_token_that_joins_them(style: str) -> None:
    """`Win` + `ter's`: whatever token crosses the border belongs to both."""
    found = check(Prompt("In {a}{b} End", {"a": "Wint", "b": "er's"}), style)
    a, b = found.spans["a"][0], found.spans["b"][0]
    assert b[0] in (a[-1], a[-1] + 1)


@every_tokenizer
def test_last_is_the_last_token_even_where_a_field_ends_the_prompt(style: str) -> None:
    found = check(Prompt("The lead was {x}", {"x": "Chloë Brontë-Smith Sr."}), style)
    assert found.spans["x"][0][-1] == found.spans["last"][0][0] == len(found) - 1


@with_bos
def test_bos_is_its_own_span_where_there_is_a_bos(style: str) -> None:
    found = check(Prompt("{x} acted", {"x": "Anders"}), style)
    assert found.ids[0] == MADE[style].bos_token_id
    assert found.spans["bos"] == ((0,),)
    assert 0 not in found.spans["x"][0]


def test_bos_is_the_first_position_where_there_is_no_bos() -> None:
    found = check(Prompt("{x} acted", {"x": "Anders"}), "gpt2")
    assert found.spans["bos"] == ((0,),)
    assert found.spans["x"][0][0] == 0


def test_a_normaliser_that_joins_letters_keeps_spans_right() -> None:
    """Qwen composes accents (NFC): offsets must still point into the text as it was given."""
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    decomposed = tokenize(Prompt("met {x} once", {"x": "Jose\u0301 N"}), tokenizer)
    composed = tokenize(Prompt("met {x} once", {"x": "José N"}), MADE["gpt2"])
    assert decomposed.ids == composed.ids
    assert decomposed.spans["x"] == composed.spans["x"]


def test_a_field_that_the_tokenizer_drops_is_an_error() -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("†", "")
    with pytest.raises(PromptError) as caught:
        tokenize(Prompt("met {x} once", {"x": "††"}), tokenizer)
    assert str(caught.value) == (
        "no token of 'met †† once' covers the field 'x' ('††'): the tokenizer drops it. "
        "Change the field's text."
    )


def test_fields_that_the_template_does_not_use_are_no_spans() -> None:
    prompt = Prompt("{x} acted", {"x": "Anders", "year": "2004", "last": "kept as a fact"})
    assert set(tokenize(prompt, MADE["gpt2"]).spans) == {"x", "bos", "last", "all", "prompt"}
    assert prompt.fields["year"] == "2004"
    assert tokenize(prompt, MADE["gpt2"]).spans["last"] == (
        (len(tokenize(prompt, MADE["gpt2"])) - 1,),
    )


@every_tokenizer
def test_a_text_has_the_standard_spans_only(style: str) -> None:
    found = tokenize("Anders acted", MADE[style])
    assert list(found.spans) == ["bos", "last", "all", "prompt"]
    assert found == Tokenized.bare(found.ids)


# -- BOS and EOS -------------------------------------------------------------------------------


@with_bos
def test_prepend_bos_forces_or_forbids_it(style: str) -> None:
    tokenizer = MADE[style]
    own, _ = encode("Anders acted", tokenizer)
    forced, _ = encode("Anders acted", tokenizer, prepend_bos=True)
    bare, offsets = encode("Anders acted", tokenizer, prepend_bos=False)
    assert own == forced == [tokenizer.bos_token_id, *bare]
    assert len(offsets) == len(bare)
    assert offsets[-1][1] == len("Anders acted")


def test_prepend_bos_moves_the_spans_of_a_tokenizer_that_adds_none() -> None:
    prompt = Prompt("{x} acted", {"x": "Anders"})
    own, forced = (tokenize(prompt, MADE["gpt2"], bos) for bos in (None, True))
    assert forced.ids == (MADE["gpt2"].bos_token_id, *own.ids)
    assert forced.spans["x"] == (tuple(i + 1 for i in own.spans["x"][0]),)
    assert tokenize(prompt, MADE["gpt2"], False) == own


def test_a_bos_that_the_text_brings_is_not_doubled() -> None:
    tokenizer = MADE["gpt2"]
    ids, _ = encode("<|endoftext|>Anders", tokenizer, prepend_bos=True)
    assert ids == encode("<|endoftext|>Anders", tokenizer)[0]


def test_no_bos_to_prepend_is_an_error() -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.bos_token = None
    with pytest.raises(PromptError) as caught:
        encode("Anders", tokenizer, prepend_bos=True)
    assert str(caught.value) == (
        f"prepend_bos=True, but {type(tokenizer).__name__} has no BOS token. "
        "Set tokenizer.bos_token, or leave prepend_bos out."
    )


def _appends_eos() -> PreTrainedTokenizerFast:
    tokenizer = TOKENIZERS["sentencepiece"]()
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0", special_tokens=ends
    )
    return tokenizer


def test_an_eos_that_the_tokenizer_appends_is_left_out() -> None:
    """Else `last` would be the EOS, after which the model says nothing."""
    tokenizer = _appends_eos()
    prompt = Prompt("The lead was {x}", {"x": "Anders"})
    assert tokenizer(prompt.text)["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenize(prompt, tokenizer) == tokenize(prompt, MADE["sentencepiece"])
    assert continuation(tokenize(prompt, tokenizer), " acted", tokenizer) == continuation(
        tokenize(prompt, MADE["sentencepiece"]), " acted", MADE["sentencepiece"]
    )


def test_an_eos_that_the_text_itself_holds_is_kept() -> None:
    ids, _ = encode("Anders<|endoftext|>", MADE["gpt2"])
    assert ids[-1] == MADE["gpt2"].eos_token_id


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(PromptError) as caught:
        tokenize("Anders", ByT5Tokenizer())
    assert str(caught.value) == (
        "ByT5Tokenizer does not give character offsets, so spans cannot be found. "
        "Load a fast tokenizer: AutoTokenizer.from_pretrained(…, use_fast=True)."
    )


def test_no_tokens_are_refused() -> None:
    for make in (lambda: Tokenized.bare([]), lambda: tokenize("", MADE["gpt2"])):
        with pytest.raises(PromptError, match=r"^a prompt of no tokens cannot be run\. Give at"):
            make()


# -- continuations -----------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("answer", [" Anders Lindqvist", " Twiggy", " 東京", ".", "\nA: yes"])
def test_a_continuation_completes_the_text(style: str, answer: str) -> None:
    prompt = tokenize(Prompt("{x} acted with", {"x": "Renée"}), MADE[style])
    ids = continuation(prompt, answer, MADE[style])
    assert prompt.ids + ids == tokenize("Renée acted with" + answer, MADE[style]).ids
    tokens = MADE[style].convert_ids_to_tokens(list(ids))
    assert b"".join(token_bytes(t, style) for t in tokens).decode() == answer


@settings(deadline=None, max_examples=80)
@given(style=st.sampled_from(sorted(MADE)), head=_FIELDS, tail=_TEXTS)
def test_a_continuation_is_exact_or_refused(style: str, head: str, tail: str) -> None:
    """Refused exactly where the joined text's tokens do not begin with the prompt's."""
    tokenizer = MADE[style]
    prompt = tokenize(Prompt("{x}", {"x": head}), tokenizer)
    whole = tokenize(head + tail, tokenizer).ids
    if whole[: len(prompt)] == prompt.ids and len(whole) > len(prompt):
        assert continuation(prompt, tail, tokenizer) == whole[len(prompt) :]
    else:
        with pytest.raises(PromptError, match="does not begin a token of its own"):
            continuation(prompt, tail, tokenizer)


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@every_tokenizer
def test_a_continuation_takes_the_prompt_s_bos(style: str, prepend_bos: bool | None) -> None:
    tokenizer = MADE[style]
    prompt = tokenize(Prompt("{x} acted", {"x": "Renée"}), tokenizer, prepend_bos)
    ids = continuation(prompt, " with", tokenizer, prepend_bos)
    assert ids == continuation(tokenize(Prompt("Renée acted"), tokenizer), " with", tokenizer)


def test_an_answer_that_merges_with_the_prompt_is_refused() -> None:
    prompt = tokenize(Prompt("Renée star"), MADE["gpt2"])
    merged = MADE["gpt2"].tokenize("Renée starred")
    assert merged[: len(prompt)] != MADE["gpt2"].tokenize("Renée star"), "the test's own premise"
    with pytest.raises(PromptError) as caught:
        continuation(prompt, "red in", MADE["gpt2"])
    assert str(caught.value) == (
        "'red in' after 'Renée star' does not begin a token of its own. "
        "End the prompt without a space and begin the answer with one."
    )


def test_an_answer_needs_a_text() -> None:
    with pytest.raises(PromptError, match=r"^an answer needs a prompt with text; this one"):
        continuation(Tokenized.bare([1, 2]), " x", MADE["gpt2"])


# -- prompts as values -------------------------------------------------------------------------


def test_text_and_character_spans_by_hand() -> None:
    prompt = Prompt("{{{a}}} met {b}, {a}", {"a": "É", "b": "東 京"})
    assert prompt.text == "{É} met 東 京, É"
    assert prompt.char_spans == {"a": ((1, 2), (13, 14)), "b": ((8, 11),)}


@given(a=_FIELDS, b=_FIELDS)
def test_character_spans_hold_the_fields(a: str, b: str) -> None:
    prompt = Prompt("x{a}y {b}{a}", {"a": a, "b": b})
    for name, ranges in prompt.char_spans.items():
        assert [prompt.text[i:j] for i, j in ranges] == [prompt.fields[name]] * len(ranges)


def test_braces_in_a_field_are_text() -> None:
    assert Prompt("a {x} b", {"x": "{y} }{"}).text == "a {y} }{ b"


@given(a=_FIELDS, b=_FIELDS)
def test_prompts_are_equal_by_value(a: str, b: str) -> None:
    first, again = (Prompt("{x} {y}", {"x": a, "y": b}, answer=" z") for _ in range(2))
    swapped = Prompt("{x} {y}", {"y": b, "x": a}, answer=" z")
    assert first == again == swapped
    assert hash(first) == hash(again) == hash(swapped)
    assert first != Prompt("{x} {y}", {"x": a, "y": b}, answer=" w")
    assert first != Prompt("{y} {x}", {"x": a, "y": b}, answer=" z")
    assume(a != b)
    assert first != Prompt("{x} {y}", {"x": b, "y": a}, answer=" z")


def test_prompts_are_frozen_and_keep_no_link_to_what_they_were_made_of() -> None:
    fields, distractors = {"x": "Anders"}, [" Tom"]
    prompt = Prompt("{x} acted", fields, " with", distractors)
    before = hash(prompt)
    fields["x"] = "Renée"
    distractors.append(" Ann")
    assert (prompt.text, prompt.distractors, hash(prompt)) == ("Anders acted", (" Tom",), before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.template = "other"
    with pytest.raises(TypeError):
        prompt.fields["x"] = "other"


def test_prompts_survive_pickling() -> None:
    """They travel to worker processes."""
    prompt = Prompt("{x} acted", {"x": "Anders"}, " with", (" Tom",), "short")
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    tokenized = tokenize(prompt, MADE["gpt2"])
    assert pickle.loads(pickle.dumps(tokenized)) == tokenized


def test_frozen_maps() -> None:
    assert FrozenMap({"a": "1", "b": "2"}) == FrozenMap([("b", "2"), ("a", "1")])
    assert hash(FrozenMap({"a": "1", "b": "2"})) == hash(FrozenMap([("b", "2"), ("a", "1")]))
    assert list(FrozenMap({"b": "2", "a": "1"})) == ["b", "a"]
    assert repr(FrozenMap({"a": "1"})) == "{'a': '1'}"


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        ("{x} acted", {}, "template '{x} acted' needs the field 'x'; given: none."),
        ("{x} {y}", {"x": "A", "z": "B"}, "template '{x} {y}' needs the field 'y'; given: x z."),
        (
            "{x} acted",
            {"x": ""},
            "field 'x' of template '{x} acted' is '': a field must be text that is not empty.",
        ),
        ("{x} acted", {"x": " \n"}, "field 'x' of template '{x} acted' is ' \\n': a field must"),
        (
            "a",
            {"x": ""},
            "field 'x' of template 'a' is '': a field must be text that is not empty.",
        ),
        (
            "{last} acted",
            {"last": "A"},
            "template '{last} acted': 'last' is a span that every prompt has. "
            "Give the field another name.",
        ),
        ("{bos}", {"bos": "A"}, "template '{bos}': 'bos' is a span that every prompt has."),
        ("{all}", {"all": "A"}, "template '{all}': 'all' is a span that every prompt has."),
        (
            "{x acted",
            {"x": "A"},
            "template '{x acted' is malformed (expected '}' before end of string). Write {field} "
            "for a field and double a literal brace.",
        ),
        ("x} acted", {"x": "A"}, "template 'x} acted' is malformed (Single '}' encountered"),
        ("{x} {", {"x": "A"}, "template '{x} {' is malformed (Single '{' encountered"),
        (
            "{} acted",
            {},
            "template '{} acted': '' is not a plain field. Write {name} with letters, digits and "
            "_, without format or conversion.",
        ),
        ("{0}", {"0": "A"}, "template '{0}': '0' is not a plain field."),
        ("{x!r}", {"x": "A"}, "template '{x!r}': 'x' is not a plain field."),
        ("{x:>9}", {"x": "A"}, "template '{x:>9}': 'x' is not a plain field."),
        ("{x.real}", {"x": "A"}, "template '{x.real}': 'x.real' is not a plain field."),
        ("{x[0]}", {"x": "A"}, "template '{x[0]}': 'x[0]' is not a plain field."),
        (
            "{first entity}",
            {"x": "A"},
            "template '{first entity}': 'first entity' is not a plain field.",
        ),
        ("", {}, "template='' gives an empty prompt. Write a text of one token or more."),
    ],
)
def test_malformed_prompts_are_refused(template: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Prompt(template, fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer": ""}, "answer='': write a text that is not empty, or leave it out."),
        # Regression: one text counted as a list of its letters.
        ({"distractors": " Tom"}, "distractors=' Tom' is one text. Write a list: [' Tom']."),
        ({"distractors": (" Tom", "")}, "distractor='': write a text that is not empty"),
    ],
)
def test_malformed_answers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Prompt("a", **arguments)


def test_a_name_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    wrong: Any = 3
    with pytest.raises(ValueError, match=r"^name=3: write a text, or leave it out"):
        Prompt("a", name=wrong)


@pytest.mark.parametrize("what", ["answers", "distractors"])
@pytest.mark.parametrize("texts", [None, {" Bo", " Cy"}, {" Bo": 1}, 3])
def test_lists_of_texts_have_an_order(
    what: str, texts: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: TypeError for None, and a set was taken in whatever order it had."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given: dict[str, Any] = {what: texts}
    with pytest.raises(ValueError, match=rf"{what}=.*: write a list of texts"):
        Prompt("It was", answer=" a", **given)
    given[what] = (text for text in [" Bo", " Cy"])
    assert getattr(Prompt("It was", answer=" a", **given), what) == (" Bo", " Cy")
