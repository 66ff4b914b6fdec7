"""Spans of fields at a text's beginning and with white space at their edges; answers of it alone.

The oracle is that of test_prompts: it writes the tokens' own bytes one after another, and asks no
tokenizer for offsets.
"""

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prompts import token_bytes
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from toytokenizers import (
    gemma_style,
    gpt2_style,
    llama3_style,
    sentencepiece_style,
)
from transformers import PreTrainedTokenizerFast

from graftlens.prompts import Prompt, PromptError, continuation, tokenize


def with_normalizer() -> PreTrainedTokenizerFast:
    """Llama 2's: a space is put before every text, also before one that begins with a space."""
    made = gemma_style()
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return made


def with_prefix(trim: bool) -> PreTrainedTokenizerFast:
    """Byte-level with a space put before the text, its offsets with or without spaces."""
    made = gpt2_style()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return made


#: name -> (tokenizer, how its tokens are written)
MADE: dict[str, tuple[PreTrainedTokenizerFast, str]] = {
    "gpt2": (gpt2_style(), "gpt2"),
    "gpt2, a space before": (with_prefix(False), "gpt2"),
    "gpt2, a space before, trimmed": (with_prefix(True), "gpt2"),
    "llama3": (llama3_style(), "llama3"),
    "sentencepiece": (sentencepiece_style(), "sentencepiece"),
    "sentencepiece, always": (sentencepiece_style("always"), "sentencepiece"),
    "llama2": (with_normalizer(), "gemma"),
    "gemma": (gemma_style(), "gemma"),
}
CHAT = ("<|im_start|>", "<|im_end|>")
for _tokenizer, _ in MADE.values():
    _tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT])
every = pytest.mark.parametrize("name", list(MADE))


def ranges(text: str, ids: tuple[int, ...], name: str) -> list[tuple[int, int]]:
    """Which bytes of the text each token is made of; none for BOS and for a space of its own."""
    tokenizer, style = MADE[name]
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    whole, place = text.encode(), 0
    found: list[tuple[int, int]] = []
    for i, piece in enumerate(pieces):
        if ids[i] == tokenizer.bos_token_id:
            found.append((0, 0))
            continue
        said = piece.encode() if piece in CHAT else token_bytes(piece, style)
        begins = i == 0 or ids[i - 1] == tokenizer.bos_token_id or pieces[i - 1] in CHAT
        # Llama 2's comes before spaces of the text, too; the others' only where there is none.
        own = whole[place:].startswith(b" ") if name != "llama2" else False
        if begins and said.startswith(b" ") and not own:
            said = said[1:]
        found.append((place, place + len(said)))
        assert whole[place:].startswith(said), "the oracle itself: the tokens are the text"
        place += len(said)
    assert place == len(whole)
    return found


def oracle(prompt: Prompt, ids: tuple[int, ...], name: str) -> dict[str, list[list[int]]]:
    """Field -> its runs: tokens with a byte of the field, but no space of what follows it."""
    places = ranges(prompt.text, ids, name)
    whole = prompt.text.encode()
    runs: dict[str, list[list[int]]] = {}
    at = 0
    for piece in re.split(r"(\{\w+\})", prompt.template):
        if not re.fullmatch(r"\{\w+\}", piece):
            at += len(piece.encode())
            continue
        end = at + len(prompt.fields[piece[1:-1]].encode())
        run = []
        for i, (a, b) in enumerate(places):
            own, after = whole[max(a, at) : min(b, end)], whole[end:b]
            taken = a >= at and not own.strip() and after.strip()
            if own and not taken:
                run.append(i)
        runs.setdefault(piece[1:-1], []).append(run)
        at = end
    return runs


def check(template: str, fields: dict[str, str], name: str) -> list[list[str]]:
    """The runs are the oracle's; returns the tokens of each run of each field."""
    prompt = Prompt(template, fields)
    tokenizer, _ = MADE[name]
    found = tokenize(prompt, tokenizer)
    last = len(found.ids) - 1
    runs = {span: [list(run) for run in places] for span, places in found.spans.items()}
    wanted: dict[str, list[list[int]]] = {
        **oracle(prompt, found.ids, name),
        "bos": [[0]],
        "last": [[last]],
        "all": [list(range(last + 1))],
        "prompt": [list(range(last + 1))],
    }
    assert runs == wanted
    tokens = tokenizer.convert_ids_to_tokens(list(found.ids))
    return [[tokens[i] for i in run] for span in fields for run in runs[span]]


@every
def test_a_token_of_nothing_is_not_the_first_field_s(name: str) -> None:
    """W13: at the very start of the text, the tokenizer's own `▁` counted as the field's token."""
    for field in ("東", "東京 太郎", "Ødegård", "\U0001f642 x", "1987"):
        (run,) = check("{x} acted", {"x": field}, name)
        assert run[0] not in ("▁", "Ġ")


@every
def test_nor_after_a_special_token(name: str) -> None:
    """Some put their space after each special token, too, before words and before newlines."""
    check("<|im_start|>{x}<|im_end|>{y}", {"x": "東", "y": "\nHi"}, name)
    (run,) = check("<|im_start|>{x}\n", {"x": "user"}, name)
    assert run[0] not in ("▁", "Ġ")


@every
def test_a_newline_at_a_field_s_end_is_the_field_s(name: str) -> None:
    """N2: the token of the newline was not in the span of `<|im_start|>user` and a newline."""
    (run,) = check("{x}Hi <|im_end|>", {"x": "<|im_start|>user\n"}, name)
    assert run[0] == "<|im_start|>"
    assert run[-1] in ("Ċ", "<0x0A>")


@every
def test_a_space_that_the_next_word_s_token_has_taken_is_that_word_s(name: str) -> None:
    """` acted` is a token: the space that ends the field is its, and it is not the field's."""
    (run,) = check("Now {x}acted", {"x": "Ann "}, name)
    assert run[-1] not in ("Ġacted", "▁acted")
    a, b = check("Now {x}{y}", {"x": "Ann ", "y": "acted"}, name)
    assert b == ["Ġacted"] or b[0] in ("▁acted", "Ġ", "Ġa", "a")
    assert not set(a) & {"Ġacted", "▁acted"}
    # Where no word follows, or the space is a token of its own, it is the field's.
    for template, field in [("Now {x}", "Ann "), ("Now {x}東", "Ann "), ("Now {x}\n", "Ann  ")]:
        (run,) = check(template, {"x": field}, name)
        assert run[-1] in ("Ġ", "▁", "ĠĠ", "▁▁")


EDGES = st.text(st.sampled_from(" \n\t\r\xa0\u3000"), max_size=3)
MIDDLES = st.text(
    st.sampled_from("abcRTio.,'é東\u0301\U0001f642 \n\xa00123"), min_size=1, max_size=6
).filter(str.strip)
TEXTS = st.lists(st.sampled_from(["acted", " with", "\n", " ", "東", *CHAT]), max_size=3).map(
    "".join
)


@settings(deadline=None, max_examples=250)
@example(
    name="gpt2, a space before, trimmed",
    literals=["<|im_start|>", ""],
    order=["a", "a", "a"],
    a="R",
    b="b",
)
@given(
    name=st.sampled_from(list(MADE)),
    literals=st.lists(TEXTS, min_size=2, max_size=4),
    order=st.lists(st.sampled_from("ab"), min_size=3, max_size=3),
    a=st.tuples(EDGES, MIDDLES, EDGES).map("".join),
    b=st.tuples(EDGES, MIDDLES, EDGES).map("".join) | st.sampled_from(CHAT),
)
def test_any_field_with_white_space_at_its_edges(
    name: str, literals: list[str], order: list[str], a: str, b: str
) -> None:
    """Tabs, CRLF, no-break spaces, doubled spaces, CJK, emoji in pieces, adjacent and repeated."""
    template = literals[0] + "".join(
        f"{{{field}}}{literal}" for field, literal in zip(order, literals[1:], strict=False)
    )
    fields = {"a": a, "b": b}
    check(template, {n: fields[n] for n in dict.fromkeys(order[: len(literals) - 1])}, name)


def test_a_text_of_no_tokens_is_refused() -> None:
    """Its last position was -1."""
    tokenizer = gpt2_style()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(PromptError, match=r"^a prompt of no tokens cannot be run\."):
        tokenize(Prompt(" "), tokenizer)


# -- answers of white space --------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["\n", "\n\n", " ", "\t", "  "])
@every
def test_an_answer_may_be_white_space(answer: str, name: str) -> None:
    """`answer='\\n': write a text that is not empty` refused what a chat's end is."""
    tokenizer, _ = MADE[name]
    prompt = Prompt("Now {x}", {"x": "Ann"}, answer, distractors=(answer, " x"))
    found = tokenize(prompt, tokenizer)
    ids = continuation(found, answer, tokenizer)
    whole = tokenizer("Now Ann" + answer)["input_ids"]
    assert list(found.ids) + list(ids) == whole
    assert len(ids) > 0


@pytest.mark.parametrize("changes", [{"answer": ""}, {"distractors": ("",)}])
def test_an_empty_answer_stays_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"='': write a text that is not empty"):
        Prompt("Now", **changes)
