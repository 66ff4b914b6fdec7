"""Pairs as people have them, by the differences of their real configs, made small.

Each loads with nothing but its two models and runs exactly, or is refused with the sentence below.
Contexts and thetas are the real ones; layers, widths and vocabularies are small, and where one
vocabulary is larger it is larger by as many tokens.
"""

import copy
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Tiny
from families import VARIANTS, model_of, multimodal, save_checkpoint
from reference import sequential_graft
from test_laws import _chooser, _join, _random_rules, _tokens
from test_pair_laws import _same
from tokenizers import AddedToken, processors
from toytokenizers import TOKENIZERS
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GgufConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from graftlens.evaluation import evaluate
from graftlens.model.arch import PairError, UnsupportedArchitectureError
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt
from graftlens.sweep.results import read_results
from graftlens.sweep.runner import run_sweep

load = GraftedTransformer.from_pretrained

FEW = 90
SIZES: dict[str, Any] = {
    "vocab_size": FEW,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


LLAMA3 = _rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
LONG = _rope(
    10000.0,
    rope_type="longrope",
    short_factor=[1.0, 1.05, 1.1],
    long_factor=[1.07, 1.1, 64.0],
    original_max_position_embeddings=4096,
)


@dataclass(frozen=True)
class Row:
    """Two models of one class.

    Attributes:
        kind: their config's class.
        same: settings that they share.
        base, other: settings of each.
        ends: end tokens of the second one's generation settings, if it has its own.
        told: key -> how its difference is handled.
        refused: the sentence with which the pair is refused.
        seen: whose config was compared with a public copy of it; the rest is from memory.
    """

    kind: Callable[..., Any]
    same: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    ends: int | list[int] | None = None
    told: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    seen: str = ""


OLMO = SIZES | {
    "max_position_embeddings": 4096,
    "rope_parameters": _rope(500000.0),
    "rms_norm_eps": 1e-6,
}

CONTEXT = {"max_position_embeddings": "ignored"}
ENDS = {"generation eos_token_id": "its own"}
EOS = {"eos_token_id": "its own"}

PAIRS: dict[str, Row] = {
    "Qwen3-0.6B-Base and Qwen3-0.6B": Row(
        Qwen3Config,
        GROUPED | {"head_dim": 10, "rope_parameters": _rope(1e6), "tie_word_embeddings": True},
        {"max_position_embeddings": 32768, "eos_token_id": 3},
        {"max_position_embeddings": 40960, "eos_token_id": 5},
        told=CONTEXT | EOS,
        seen="the second",
    ),
    "Qwen2.5-0.5B and -Instruct": Row(
        Qwen2Config,
        GROUPED
        | {"max_position_embeddings": 32768, "rope_parameters": _rope(1e6)}
        | {"tie_word_embeddings": True, "use_sliding_window": False},
        {"eos_token_id": 3, "max_window_layers": 24},
        {"eos_token_id": 5, "max_window_layers": 21},
        ends=[5, 3],
        told=EOS | ENDS | {"max_window_layers": "ignored"},
        seen="the first; of the second, its family's generation settings",
    ),
    "Qwen2.5-7B and -Instruct": Row(
        Qwen2Config,
        GROUPED | {"rope_parameters": _rope(1e6), "use_sliding_window": False},
        {"max_position_embeddings": 131072, "sliding_window": 131072, "eos_token_id": 3},
        {"max_position_embeddings": 32768, "sliding_window": 32768, "eos_token_id": 5},
        told=CONTEXT | EOS,
        seen="both",
    ),
    "Llama-3.2-1B and -Instruct": Row(
        LlamaConfig,
        GROUPED
        | {
            "rope_parameters": LLAMA3 | {"factor": 32.0},
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "head_dim": 8,
        },
        {"eos_token_id": 3},
        {"eos_token_id": [3, 8, 9]},
        told=EOS,
        seen="the first; of the second, the end tokens of Llama-3.1-8B-Instruct",
    ),
    "Llama-3-8B and Llama-3.1-8B": Row(
        LlamaConfig,
        GROUPED,
        {"max_position_embeddings": 8192, "rope_parameters": _rope(500000.0)},
        {"max_position_embeddings": 131072, "rope_parameters": LLAMA3},
        told=CONTEXT | {"rope_parameters": "carried"},
        seen="the second",
    ),
    "gemma-2b and -it": Row(
        GemmaConfig,
        SIZES | {"num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 8192},
        {"eos_token_id": 1},
        {"eos_token_id": 1},
        ends=[1, 7],
        told=ENDS,
        seen="both, without the second one's generation settings",
    ),
    "gemma-2-2b and -it": Row(
        Gemma2Config,
        GROUPED | {"head_dim": 10, "query_pre_attn_scalar": 256, "sliding_window": 4096},
        {"eos_token_id": 1},
        {"eos_token_id": [1, 7]},
        told=EOS,
        seen="both",
    ),
    "gemma-3-270m and -it": Row(
        Gemma3TextConfig,
        GROUPED | {"head_dim": 10, "sliding_window": 512, "max_position_embeddings": 32768},
        {"eos_token_id": 1},
        {"eos_token_id": 1, "use_bidirectional_attention": False},
        ends=[1, 6],
        told=ENDS,
        seen="the first",
    ),
    "gemma-3-1b-pt and -it": Row(
        Gemma3TextConfig,
        GROUPED | {"head_dim": 10, "sliding_window": 512, "max_position_embeddings": 32768},
        {"eos_token_id": 1, "cache_implementation": "hybrid"},
        {"eos_token_id": [1, 6], "cache_implementation": "hybrid"},
        told=EOS,
        seen="the second",
    ),
    "SmolLM2-135M and -Instruct": Row(
        LlamaConfig,
        GROUPED | {"max_position_embeddings": 8192, "rope_parameters": _rope(100000.0)},
        {"bos_token_id": 0, "eos_token_id": 0},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        told=EOS | {"bos_token_id": "its own", "pad_token_id": "its own"},
        seen="the first",
    ),
    "OLMo-2-0425-1B and -SFT": Row(
        Olmo2Config,
        OLMO,
        {"eos_token_id": 5, "pad_token_id": 7, "use_cache": True},
        {"eos_token_id": 5, "pad_token_id": 7, "use_cache": False},
        told={"use_cache": "ignored"},
        seen="the first",
    ),
    "OLMo-2-0425-1B and -DPO": Row(
        Olmo2Config,
        OLMO,
        {"eos_token_id": 5, "pad_token_id": 7},
        {"eos_token_id": 5, "pad_token_id": 7, "bos_token_id": 5},
        told={"bos_token_id": "its own"},
        seen="the first",
    ),
    "OLMo-2-0425-1B and -Instruct": Row(
        Olmo2Config,
        OLMO,
        {"eos_token_id": 5, "pad_token_id": 7},
        {"eos_token_id": 5, "pad_token_id": 7, "attention_dropout": 0.1},
        told={"attention_dropout": "ignored"},
        seen="the first",
    ),
    "Phi-3-mini-4k and -128k": Row(
        Phi3Config,
        SIZES | {"original_max_position_embeddings": 4096, "pad_token_id": 3},
        {"max_position_embeddings": 4096, "sliding_window": 2047, "rope_parameters": _rope(1e4)},
        {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_parameters": LONG},
        refused="differ in architecture: sliding_window (2047 and 262144). No component carries",
        seen="both",
    ),
    "Phi-3 without windows, 4k and 128k": Row(
        Phi3Config,
        SIZES | {"original_max_position_embeddings": 4096, "pad_token_id": 3},
        {"max_position_embeddings": 4096, "rope_parameters": _rope(1e4)},
        {"max_position_embeddings": 131072, "rope_parameters": LONG},
        told=CONTEXT | {"rope_parameters": "carried"},
    ),
    "Mistral-7B-v0.1 and Zephyr": Row(
        MistralConfig,
        GROUPED | {"max_position_embeddings": 32768, "sliding_window": 4096},
        {"rope_parameters": _rope(10000.0)},
        {"rope_parameters": _rope(10000.0), "pad_token_id": 2},
        told={"pad_token_id": "its own"},
        seen="the first",
    ),
    "Mistral-7B-v0.1 and OpenHermes-2.5": Row(
        MistralConfig,
        GROUPED | {"max_position_embeddings": 32768, "sliding_window": 4096},
        {"eos_token_id": 2, "use_cache": True},
        {"eos_token_id": FEW, "vocab_size": FEW + 2, "use_cache": False},
        told=EOS | {"vocab_size": "carried", "use_cache": "ignored"},
        seen="the first",
    ),
    "Mistral-7B-v0.1 and -v0.2": Row(
        MistralConfig,
        GROUPED | {"max_position_embeddings": 32768},
        {"sliding_window": 4096, "rope_parameters": _rope(1e4)},
        {"sliding_window": None, "rope_parameters": _rope(1e6)},
        refused="differ in architecture: sliding_window (4096 and None). No component carries",
        seen="the first",
    ),
    "Llama-2-7b and CodeLlama-7b": Row(
        LlamaConfig,
        SIZES,
        {"max_position_embeddings": 4096, "rope_parameters": _rope(1e4)},
        {
            "max_position_embeddings": 16384,
            "rope_parameters": _rope(1e6),
            "vocab_size": FEW + 16,
        },
        told=CONTEXT | {"rope_parameters": "carried", "vocab_size": "carried"},
        seen="both",
    ),
    "Llama-2-7b and Vicuna-7b-v1.5": Row(
        LlamaConfig,
        SIZES | {"max_position_embeddings": 4096},
        {"pad_token_id": None},
        {"pad_token_id": 0},
        told={"pad_token_id": "its own"},
        seen="the second",
    ),
    "pythia-1.4b and a finetune": Row(
        GPTNeoXConfig,
        SIZES
        | {"rope_parameters": _rope(1e4, partial_rotary_factor=0.25), "head_dim": 8}
        | {"hidden_size": 32, "max_position_embeddings": 2048},
        {"use_cache": True, "attention_dropout": 0.0},
        {"use_cache": False, "attention_dropout": 0.1, "vocab_size": FEW + 1},
        told={
            "use_cache": "ignored",
            "attention_dropout": "ignored",
            "vocab_size": "carried",
        },
        seen="those of its family",
    ),
    "gpt2 and DialoGPT-small": Row(
        GPT2Config,
        {"vocab_size": FEW, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64},
        {"task_specific_params": {"text-generation": {"max_length": 50}}},
        {"task_specific_params": {"conversational": {"max_length": 1000}}, "resid_pdrop": 0.2},
        told={"task_specific_params": "ignored", "resid_pdrop": "ignored"},
    ),
    "gpt2 and distilgpt2": Row(
        GPT2Config,
        {"vocab_size": FEW, "n_embd": 24, "n_head": 4, "n_positions": 64},
        {"n_layer": 4},
        {"n_layer": 2},
        refused="differ in architecture: n_layer (4 and 2). No component carries that",
        seen="the second",
    ),
    "Qwen2.5-1.5B and -3B": Row(
        Qwen2Config,
        GROUPED,
        {"hidden_size": 24, "rms_norm_eps": 1e-6},
        {"hidden_size": 32, "rms_norm_eps": 1e-5},
        refused="hidden_size (24 and 32)",
    ),
}


def _models(row: Row) -> dict[str, Any]:
    made = {}
    for seed, (name, own) in enumerate((("base", row.base), ("chat", row.other)), start=1):
        made[name] = model_of(row.kind(**{**row.same, **own}), seed)
    if row.ends is not None:
        made["chat"].generation_config.eos_token_id = row.ends
    return made


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_loads_exactly_or_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = PAIRS[name]
    sources = _models(row)
    if row.refused:
        with pytest.raises(PairError) as caught:
            load(sources)
        assert row.refused in str(caught.value)
        assert str(caught.value).startswith("'base' (base (")
        return
    model = load(sources)
    table = model.differences
    assert dict(zip(table["key"], table["handling"], strict=True)) == dict(row.told)
    lines = capsys.readouterr().out.splitlines()
    assert "logits equal the sources' own" in lines[0]
    assert len(lines) == 1 + len(table)
    for (_, told), line in zip(table.iterrows(), lines[1:], strict=True):
        assert line.startswith(f"graftlens: chat: {told['key']} ")
        assert line.endswith(f": {told['handling']}, {told['done']}")
    t = Tiny(name, sources, model, None)
    rules = _random_rules(t, random.Random(name), 3, 7)
    tokens = _tokens(7, seed=1)
    ours = model(torch.tensor([tokens]), graft=_join(rules))[0].detach()
    _same(ours, sequential_graft(sources, tokens, _chooser(rules, "base")))
    chat = [*(row.ends if isinstance(row.ends, list) else [])] or row.other.get("eos_token_id")
    if chat is not None:
        assert model.end_tokens["chat"] == tuple(chat if isinstance(chat, list) else [chat])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sliding_window": ("mistral-window", {"sliding_window": 5}, "(4 and 5)"),
    "layer_types": (
        "gemma3",
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        "('sliding_attention', … over 4 layers and 'sliding_attention', … over 4 layers)",
    ),
    "attn_logit_softcapping": ("gemma2", {"attn_logit_softcapping": 2.0}, "(1.5 and 2.0)"),
    "final_logit_softcapping": ("gemma2", {"final_logit_softcapping": None}, "(3.0 and None)"),
    "query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 9}, "(7 and 9)"),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 1e-5}, "(0.03 and 1e-05)"),
    "layer_norm_epsilon": ("gpt2", {"layer_norm_epsilon": 1e-5}, "(0.03 and 1e-05)"),
    "hidden_act": ("qwen3", {"hidden_act": "gelu"}, "('silu' and 'gelu')"),
    "activation_function": ("gpt2", {"activation_function": "relu"}, "('gelu_new' and 'relu')"),
    "num_attention_heads": ("llama-head-dim", {"num_attention_heads": 2}, "(4 and 2)"),
    "scale_attn_weights": ("gpt2", {"scale_attn_weights": False}, "(True and False)"),
    "use_parallel_residual": ("neox-parallel", {"use_parallel_residual": False}, "(True and False"),
    "clip_qkv": ("olmo-clip", {"clip_qkv": None}, "(0.8 and None)"),
    "hidden_size": ("gemma", {"hidden_size": 32}, "(24 and 32)"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_no_component_carries_is_refused_by_its_key(key: str) -> None:
    variant, changes, values = REFUSED[key]
    config = VARIANTS[variant]()
    other = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    with pytest.raises(PairError) as caught:
        load({"base": model_of(config, 1), "chat": model_of(other, 2)})
    assert f"differ in architecture: {key} {values}" in str(caught.value)


# -- tokenizers --------------------------------------------------------------------------------


def _chat_tokens(names: str, *, begins: bool = False, plain: str = "") -> Any:
    """The toy tokenizer with chat markers added, `plain` as an ordinary added token."""
    tokenizer = TOKENIZERS["gpt2"]()
    for name in names.split():
        tokenizer.add_tokens([AddedToken(name, special=name != plain, normalized=False)])
    if begins:
        first = names.split()[0]
        tokenizer.bos_token = first
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0",
            special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))],
        )
    return tokenizer


def _folders(
    tmp_path: Path, base: Any, chat: Any, sizes: tuple[int, int] | None = None, **other: Any
) -> dict[str, Path]:
    few, many = sizes or (len(base), len(chat))
    configs = (
        LlamaConfig(**GROUPED | {"vocab_size": few}),
        LlamaConfig(**GROUPED | {"vocab_size": many} | other),
    )
    return {
        name: save_checkpoint(model_of(config, seed), tmp_path / name, tokenizer)
        for name, config, tokenizer, seed in zip(
            ("base", "chat"), configs, (base, chat), (1, 2), strict=True
        )
    }


@pytest.mark.parametrize("pair", ["Qwen2.5-Math-1.5B", "Llama-3.1-8B"])
def test_respelled_markers_of_a_distillation_are_carried_by_id(pair: str, tmp_path: Path) -> None:
    """DeepSeek-R1-Distill-Qwen-1.5B and -Llama-8B rename the markers of their bases; the first also
    begins texts with one, has another context, and is untied."""
    begins = pair.startswith("Qwen")
    base = _chat_tokens("<|im_start|> <|im_end|> <|box_start|>")
    chat = _chat_tokens("<｜begin｜> <｜User｜> <think>", begins=begins, plain="<think>")
    folders = _folders(tmp_path, base, chat, max_position_embeddings=131072)
    model = load(folders, verbose=False)
    told = model.differences.set_index("key")
    assert told.loc["special tokens", "handling"] == "carried"
    assert "3 special tokens are the same by id" in told.loc["special tokens", "done"]
    assert told.loc["special tokens", "base"] == "<|im_start|>, <|im_end|>, <|box_start|>"
    assert ("begin of prompts" in told.index) == begins
    assert model.tokenizer.get_vocab() == base.get_vocab(), "of equal ones the base's"
    assert model.to_tokens("a <|im_end|>")[0].tolist() == base("a <|im_end|>")["input_ids"]
    assert model.vocabularies.sizes == (len(base), len(base))


def test_the_larger_tokenizer_tokenizes(tmp_path: Path) -> None:
    """Chat models add markers: OpenHermes-2.5 two, to the 32,000 of Mistral."""
    base, chat = TOKENIZERS["gpt2"](), _chat_tokens("<|im_end|> <|im_start|>")
    chat.eos_token, chat.chat_template = "<|im_end|>", "{{ messages }}"
    folders = _folders(tmp_path, base, chat)
    for order in (("base", "chat"), ("chat", "base")):
        model = load({name: folders[name] for name in order}, verbose=False)
        marked = model.to_tokens("a<|im_end|>")
        assert marked[0].tolist() == chat("a<|im_end|>")["input_ids"]
        told = model.differences.set_index("key")
        assert told.loc["tokens of the tokenizer", "done"] == (
            "the larger one tokenizes, that of 'chat'"
        )
        assert model.tokenizer.chat_template == "{{ messages }}"
        with pytest.raises(ValueError, match=r"prompt 0: token \d+ \('<\|im_end\|>'\) at position"):
            model("a<|im_end|>", graft="base @ all")
        assert bool(model("a<|im_end|>", graft="chat @ all")[0, -1].isfinite().all())
        assert int(model("a", graft="base @ all")[0, -1].isneginf().sum()) == 2
    table = evaluate(
        load(folders, verbose=False),
        [Prompt("a", answer="<|im_end|>"), Prompt("a<|im_end|>", answer="b")],
        {"base": "base @ all", "chat": "chat @ all"},
        progress=False,
    ).set_index(["prompt", "graft"])
    assert table.loc[(0, "base"), "prob"] == 0 < table.loc[(0, "chat"), "prob"]
    assert table.loc[(0, "base"), "logprob"] == -float("inf")
    assert "has no row in the embedding of 'base'" in table.loc[(1, "base"), "reason"]
    assert pd.isna(table.loc[(1, "chat"), "reason"])


def test_a_sweep_over_tokens_that_the_base_lacks(tmp_path: Path) -> None:
    """Its folder says what differs; the trust report leaves out what cannot be run."""
    folders = _folders(tmp_path, TOKENIZERS["gpt2"](), _chat_tokens("<|im_end|> <|im_start|>"))
    prompts = [
        {"template": "{a} acted", "fields": {"a": "Anders"}, "answer": "<|im_end|>"},
        {"template": "{a} acted<|im_end|>", "fields": {"a": "Renée"}, "answer": " in"},
        {"template": "{a} acted", "fields": {"a": "Chloë"}, "answer": " in"},
    ]
    config = {
        "sources": {name: str(folder) for name, folder in folders.items()},
        "prompts": prompts,
        "grafts": {"PRE": "none", "CHAT": "chat @ all", "LT": "chat @ last", "FE": "chat @ a"},
        "metrics": {"top_k": 3, "measures": ["kl_base", "js_full"]},
    }
    run_sweep(config, tmp_path / "out", say=lambda text: None)
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())["models"]["differences"]
    assert [row["key"] for row in kept] == ["vocab_size", "tokens of the tokenizer"]
    report = json.loads((tmp_path / "out" / "trust.json").read_text())
    assert report["ok"], report["problems"]
    assert [row["key"] for row in report["differences"]] == [row["key"] for row in kept]
    table = read_results(tmp_path / "out").set_index(["prompt", "graft"])
    assert table.loc[(0, "PRE"), "prob"] == 0 < table.loc[(0, "CHAT"), "prob"]
    assert table.loc[(1, "PRE"), "reason"] == table.loc[(1, "FE"), "reason"]
    assert "has no row in the embedding of 'base'" in table.loc[(1, "PRE"), "reason"]
    assert table.loc[(1, "CHAT"), "prob"] > 0
    assert table.loc[(2, "LT"), "kl_base"] > 0


def test_vocabularies_of_which_neither_has_the_other_s(tmp_path: Path) -> None:
    base, chat = TOKENIZERS["gpt2"](), TOKENIZERS["gpt2"]()
    base.add_tokens(["one", "two", "three"])
    chat.add_tokens(["eins", "zwei"])
    first = len(base) - 3
    with pytest.raises(PairError) as caught:
        load(_folders(tmp_path, base, chat))
    assert str(caught.value) == (
        "the tokenizers of 'base' and 'chat' differ: neither has all tokens of the other ("
        f"{first} is 'one' and 'eins'; {first + 1} is 'two' and 'zwei'; {first + 2} is 'three' in "
        "'base' alone). Grafting needs the same tokens in both; pass tokenizer=… if you know which "
        "one is right."
    )


def test_a_tokenizer_that_contradicts_the_embedding(tmp_path: Path) -> None:
    base, chat = TOKENIZERS["gpt2"](), TOKENIZERS["gpt2"]()
    chat.add_tokens(["new"])
    folders = _folders(tmp_path, base, base)
    chat.save_pretrained(folders["chat"])
    with pytest.raises(PairError) as caught:
        load(folders)
    assert str(caught.value) == (
        f"the tokenizer of 'chat' contradicts its embedding of {len(base)} rows: there is none for "
        f"token {len(base)} ('new'). Resize the embedding (model.resize_token_embeddings(n)) and "
        "save the model, or pass the tokenizer that it was trained with as tokenizer=…"
    )
    chat = TOKENIZERS["gpt2"]()
    chat.add_tokens([AddedToken("<picture>", special=True)])  # as Gemma 3's, in its text models
    chat.save_pretrained(folders["chat"])
    model = load(folders, verbose=False)
    with pytest.raises(ValueError, match=f"token id {len(base)} is outside the vocabulary"):
        model("a <picture>")
    chat.add_tokens(["new"])
    with pytest.raises(PairError) as caught:
        load(folders, tokenizer=chat)
    assert str(caught.value) == (
        f"the tokenizer given contradicts the embedding of 'base' of {len(base)} rows: there is "
        f"none for token {len(base) + 1} ('new'). Give the one that it was trained with."
    )


# -- other forms -------------------------------------------------------------------------------


def test_stored_dtypes_that_differ_run_in_float32(tmp_path: Path) -> None:
    models = _models(PAIRS["Llama-2-7b and Vicuna-7b-v1.5"])
    models["chat"].to(torch.float16)
    folders = {name: save_checkpoint(m, tmp_path / name) for name, m in models.items()}
    model = load(folders, verbose=False)
    assert model.cfg.dtype == torch.float32
    told = model.differences.set_index("key").loc["stored dtypes"]
    assert (told["base"], told["value"], told["done"]) == (
        "float32",
        "float16",
        "all run in float32",
    )
    asked = load(folders, verbose=False, dtype="bfloat16")
    assert asked.cfg.dtype == torch.bfloat16
    assert asked.differences.set_index("key").loc["stored dtypes", "done"] == "all run in bfloat16"


def test_the_text_part_of_gemma_3_4b_is_told() -> None:
    sources = {"base": multimodal(1), "chat": multimodal(2)}
    model = load(sources, verbose=False)
    table = model.differences
    told = table[table["key"] == "model_type"]
    assert told["source"].tolist() == ["base", "chat"]
    assert told["handling"].tolist() == ["converted"] * 2
    assert told["done"].iloc[0] == "its text part is read, which sees no pictures"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "llava", "vision_config": {}}, "'llava' is multimodal"),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "'qwen2_vl' is multimodal"),
        ({"model_type": "gemma3n", "audio_config": {"a": 1}}, "'gemma3n' is multimodal"),
        (
            {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
            "llama with quantization_config={'quant_method': 'gptq', 'bits': 4} is not supported",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantised weights cannot be grafted exactly. Give the checkpoint that was quantised",
        ),
    ],
)
def test_other_forms_are_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    models = _models(PAIRS["Llama-2-7b and Vicuna-7b-v1.5"])
    folders = {name: save_checkpoint(m, tmp_path / name) for name, m in models.items()}
    file = folders["chat"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load(folders)
    assert str(caught.value).startswith("source 'chat': ")
    assert named in str(caught.value)


def _write_gguf(model: Any, path: Path) -> None:
    """A GGUF file of a tiny Llama, its matrices in 8 bits."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        parts = module.split(".", 3)
        if module.startswith("model.layers."):
            written = f"blk.{parts[2]}.{names[parts[3]]}.weight"
        else:
            written = f"{names[module]}.weight"
        values = tensor.float().numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # GGUF keeps the halves of each head interleaved
                n = getattr(config, heads)
                values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2)
                values = values.reshape(tensor.shape)
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(written, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(written, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised_as_transformers_does_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        head_dim=8,
    )
    base = model_of(config, 1)
    folder = save_checkpoint(base, tmp_path / "base")
    file = tmp_path / "quantised.gguf"
    _write_gguf(base, file)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    model = load({"base": folder, "q8": file}, tokenizer=TOKENIZERS["gpt2"](), verbose=False)
    told = model.differences.set_index("key").loc["format"]
    assert (told["value"], told["handling"]) == ("GGUF", "converted")
    tokens = torch.tensor([_tokens(9, seed=2)])
    ours = model(tokens, graft="q8 @ all").detach()
    with torch.no_grad():
        wanted = theirs(tokens).logits
        own = base(tokens).logits
    _same(ours[0], wanted[0])
    assert float((ours - own).abs().max()) > 1e-3, "eight bits are not the base's own"
    with pytest.raises(PairError, match=r"source 'q8': there is no file .*other\.gguf\."):
        load({"base": folder, "q8": tmp_path / "other.gguf"})
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(PairError, match=r"quantised\.gguf could not be read"):
        load({"base": folder, "q8": file})
