"""Tokenizers from outside: one difference in a prompt's tokens is refused, all else is none."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import save_checkpoint, tiny_model
from tokenizers import models, processors
from toytokenizers import TOKENIZERS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.load import preview
from graftlens.model.tokenizers import read_tokenizer, shared_tokenizer
from graftlens.prompts import encode

load = GraftedTransformer.from_pretrained

TEXTS = ("Renée Zellner acted", " 1,234 <|end_of_text|> x", "東京\n\n", "a")


def llama3() -> Any:
    return TOKENIZERS["llama3"]()


def appending(tokenizer: Any, token: str) -> Any:
    """The tokenizer, with a token at the end of each text."""
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {token}:0",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (begin, token)],
    )
    return tokenizer


def shared(first: Any, second: Any) -> Any:
    return shared_tokenizer([("pre", first), ("sft", second)], None)[0]


def told(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    _, differences = shared_tokenizer([("pre", first), ("sft", second)], None)
    return {d.key: (d.base, d.value) for d in differences}


@pytest.mark.parametrize("appends", ["pre", "sft", "both"])
def test_an_appended_end_is_no_difference(appends: str) -> None:
    """Regression: refused, though prompts are cut before it and have the same tokens."""
    end = "<|end_of_text|>"
    pair = {
        name: appending(llama3(), end) if appends in (name, "both") else llama3()
        for name in ("pre", "sft")
    }
    assert (pair["pre"]("a")["input_ids"] == pair["sft"]("a")["input_ids"]) == (appends == "both")
    assert shared(*pair.values()) is pair["pre"]
    said = told(*pair.values())
    assert said.keys() == (set() if appends == "both" else {"end of texts"})
    if said:
        assert set(said["end of texts"]) == {f"'{end}' appended", f"'{end}' not appended"}
    for text in TEXTS:
        assert encode(text, pair["pre"])[0] == encode(text, pair["sft"])[0]


def test_an_appended_token_that_is_not_the_end_is_a_difference() -> None:
    """It stays in a prompt."""
    first, second = llama3(), llama3()
    for tokenizer in (first, second):
        tokenizer.add_tokens(["<sep>"], special_tokens=True)
    with pytest.raises(PairError, match="the same text gives different tokens"):
        shared(first, appending(second, "<sep>"))


def test_another_end_token_is_told_and_no_difference() -> None:
    """Base and chat models end differently; the generation settings say with what."""
    first, second = llama3(), llama3()
    for tokenizer in (first, second):
        tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    second.eos_token = "<|im_end|>"
    assert shared(first, second) is first
    assert told(first, second)["end of texts"] == (
        "'<|end_of_text|>' not appended",
        "'<|im_end|>' not appended",
    )


def _pad(tokenizer: Any) -> None:
    tokenizer.pad_token = "<|begin_of_text|>"
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 5
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=30)


def test_what_reaches_no_prompt_is_no_difference() -> None:
    first, second = llama3(), llama3()
    _pad(second)
    assert shared(first, second) is first
    keys = {"pad_token", "padding_side", "model_max_length", "chat_template"}
    assert told(first, second).keys() == keys
    as_other_class = type("ChatTokenizer", (PreTrainedTokenizerFast,), {})(
        tokenizer_object=llama3().backend_tokenizer,
        bos_token=first.bos_token,
        eos_token=first.eos_token,
    )
    assert shared(first, as_other_class) is first
    assert told(first, as_other_class)["tokenizer_class"][1] == "ChatTokenizer"


def _other_merges(tokenizer: Any) -> None:
    """The same vocabulary, the last merge left out: only texts with that word show it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer.backend_tokenizer.model = models.BPE(vocab=state["vocab"], merges=merges[:-1])


def _normalized(tokenizer: Any) -> None:
    """A special token that swallows the space before it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"][1]["lstrip"] = True
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))


@pytest.mark.parametrize("change", [_other_merges, _normalized])
def test_differences_that_one_text_does_not_show(change: Callable[[Any], None]) -> None:
    """Regression: one sentence was compared, and words that it lacks ran with PRE's tokens."""
    first, second = llama3(), llama3()
    change(second)
    assert first.get_vocab() == second.get_vocab()
    with pytest.raises(PairError, match="the same text gives different tokens"):
        shared(first, second)


def test_a_pair_whose_finetune_appends_an_end_loads(tmp_path: Path) -> None:
    tokenizer = llama3()
    model = tiny_model("llama", 1, vocab_size=len(tokenizer))
    other = tiny_model("llama", 2, vocab_size=len(tokenizer))
    folders = {
        "pre": save_checkpoint(model, tmp_path / "pre", tokenizer),
        "sft": save_checkpoint(other, tmp_path / "sft", appending(llama3(), "<|end_of_text|>")),
    }
    loaded = load(folders, check=False, verbose=False)
    assert loaded.to_tokens("Who")[0].tolist() == tokenizer("Who")["input_ids"]
    assert loaded.differences["key"].tolist() == ["end of texts"]
    preview(folders)


# -- damaged tokenizers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"null", " does not hold the parts of a tokenizer. "),
        (b"[]", " does not hold the parts of a tokenizer. "),
        (b'"text"', " does not hold the parts of a tokenizer. "),
        (b"", " is not JSON ("),
        (b'{"version": "1.0", "trunc', " is not JSON ("),
        (b'{"a": "\xe9"}', " is not UTF-8 text (byte 7 is 0xe9). "),
        (b'\xef\xbb\xbf{"a": 1}', " begins with a byte order mark. "),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    """Regression: AttributeError, KeyError, JSONDecodeError, …, which named no file."""
    llama3().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairError) as caught:
        read_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / name}{said}")
    assert "\n" not in str(caught.value)
    with pytest.raises(PairError, match=re.escape(str(tmp_path / name))):
        shared_tokenizer([], str(tmp_path))


def test_an_empty_tokenizer_is_named(tmp_path: Path) -> None:
    llama3().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PairError, match=r"tokenizer\.json does not hold the parts of a tokenizer"):
        read_tokenizer(str(tmp_path))


def test_a_tokenizer_s_own_code_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it was left to a question at the terminal."""

    def asked(*_: Any) -> None:
        raise AssertionError("nobody is asked")

    monkeypatch.setattr("builtins.input", asked)
    llama3().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(PairError, match=r"tokenizer_config\.json needs code that comes"):
        read_tokenizer(str(tmp_path))


def test_a_folder_s_tokenizer_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    llama3().save_pretrained(tmp_path)
    ours, theirs = read_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    (tmp_path / "tokenizer.json").unlink()
    assert read_tokenizer(str(tmp_path)) is None
