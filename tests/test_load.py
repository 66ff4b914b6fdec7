"""Loading: every way of giving a source runs its own logits, and what makes no pair is refused."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import VARIANTS, multimodal, save_checkpoint, tiny_model, tiny_pair, tiny_sources
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor
from toytokenizers import TOKENIZERS
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPTJConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import graftlens.model.arch as arch_module
import graftlens.model.load as loading
from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.model.arch import PairError, UnsupportedArchitectureError, architecture
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

load = GraftedTransformer.from_pretrained

TOLERANCE = 1e-4  # relative to the largest logit, float32


def tokens(vocab: int = families.VOCAB, length: int = 11, batch: int = 2) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def reference(model: Any, ids: Tensor) -> Tensor:
    """A Hugging Face model's own logits."""
    was_training = model.training
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    return logits


@torch.no_grad()
def run(model: GraftedTransformer, source: str, ids: Tensor) -> Tensor:
    return model(ids, graft=Graft.rule(source))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def assert_sources_are(model: GraftedTransformer, wanted: Mapping[str, Any]) -> None:
    assert model.sources == tuple(wanted)
    ids = tokens(model.cfg.d_vocab)
    logits = {name: reference(theirs, ids) for name, theirs in wanted.items()}
    for name, theirs in logits.items():
        assert difference(run(model, name, ids), theirs) < TOLERANCE, name
    first, second = list(logits.values())[:2]
    assert difference(first, second) > 0.01, "the test's own premise: the sources differ"


@pytest.fixture
def pair() -> dict[str, PreTrainedModel]:
    return tiny_pair("llama", seed=1)


# -- ways of giving a source -------------------------------------------------------------------


def test_loaded_models_are_left_as_they_were(pair: dict[str, PreTrainedModel]) -> None:
    """No weight, hook, mode, gradient flag or config is touched."""
    pair["pre"].train()
    pair["sft"].eval().requires_grad_(True)
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in pair.items()}
    configs = {n: m.config.to_dict() for n, m in pair.items()}
    model = load(pair)
    run(model, "sft", tokens())
    assert pair["pre"].training
    assert not pair["sft"].training
    assert all(p.requires_grad for p in pair["sft"].parameters())
    for name, theirs in pair.items():
        state = theirs.state_dict()
        assert state.keys() == before[name].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, before[name][key]), (name, key)
        assert theirs.config.to_dict() == configs[name]
        for module in theirs.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    assert_sources_are(model, pair)


def test_the_model_keeps_its_weights_while_a_source_is_trained_on(
    pair: dict[str, PreTrainedModel],
) -> None:
    """A snapshot: what was loaded is what runs."""
    model = load(pair)
    before = {name: run(model, name, tokens()) for name in pair}
    with torch.no_grad():
        for theirs in pair.values():
            for parameter in theirs.parameters():
                parameter.add_(1.0)
            for buffer in theirs.buffers():
                buffer.mul_(3.0)
    for name, logits in before.items():
        assert torch.equal(run(model, name, tokens()), logits)


def test_moving_the_model_leaves_the_sources(pair: dict[str, PreTrainedModel]) -> None:
    model = load(pair)
    model.to(torch.float64)
    assert {p.dtype for p in pair["pre"].parameters()} == {torch.float32}


_STYLE = {name: sorted(TOKENIZERS)[i % len(TOKENIZERS)] for i, name in enumerate(VARIANTS)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_folders_with_their_tokenizers(variant: str, tmp_path: Path) -> None:
    """Texts and prompts run at once, in every family."""
    tokenizer = TOKENIZERS[_STYLE[variant]]()
    pair = tiny_pair(variant, seed=2, vocab_size=len(tokenizer) + 3)
    folders = {
        name: save_checkpoint(model, tmp_path / name, tokenizer) for name, model in pair.items()
    }
    model = load({"pre": folders["pre"], "sft": str(folders["sft"])})
    assert_sources_are(model, pair)
    prompt = Prompt("{x} acted with", {"x": "Renée Zellner-Ortiz"})
    # Asked of the one that was loaded: transformers rebuilds some families' tokenizers.
    ids = torch.tensor([model.tokenizer(prompt.text)["input_ids"]])
    with torch.no_grad():
        assert difference(model(prompt), reference(pair["pre"], ids)) < TOLERANCE
        assert difference(model(prompt.text), reference(pair["pre"], ids)) < TOLERANCE
        grafted = model(prompt, graft="sft @ x")
    assert difference(grafted, reference(pair["pre"], ids)) > 1e-3


def test_kinds_of_source_mix(pair: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    folder = save_checkpoint(pair["sft"], tmp_path / "sft")
    assert_sources_are(load({"pre": pair["pre"], "sft": folder}), pair)
    assert_sources_are(
        load({"sft": folder, "pre": pair["pre"]}), {"sft": pair["sft"], "pre": pair["pre"]}
    )


def test_three_sources() -> None:
    three = tiny_sources("gpt2", ("pre", "task", "relation"), seed=3)
    model = load(three)
    assert_sources_are(model, three)
    assert model.W_Q.shape[0] == 3


def test_the_same_source_twice_is_stored_once(pair: dict[str, PreTrainedModel]) -> None:
    model = load({"a": pair["pre"], "b": copy.deepcopy(pair["pre"])})
    assert all(len(weight.variants) == 1 for weight in model.stored())
    assert torch.equal(run(model, "a", tokens()), run(model, "b", tokens()))


# -- adapters ----------------------------------------------------------------------------------


def _with_lora(base: PreTrainedModel, modules: list[str], seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=modules, init_lora_weights=False, bias="none"
    )
    return get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize(
    ("variant", "modules"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("neox-parallel", ["query_key_value"]),
    ],
)
@pytest.mark.parametrize("given", ["folder", "loaded", "object"])
def test_lora_adapters_run_as_in_peft(
    variant: str, modules: list[str], given: str, tmp_path: Path
) -> None:
    base = tiny_model(variant, seed=4)
    adapted = _with_lora(base, modules, seed=5)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    wanted = {"pre": base, "sft": adapted}
    if given == "folder":
        sources = {"pre": save_checkpoint(base, tmp_path / "base"), "sft": adapter}
    elif given == "loaded":
        sources = {"pre": base, "sft": adapter}
    else:
        sources = {"pre": base, "sft": adapted}
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    model = load(sources)
    assert_sources_are(model, wanted)
    after = adapted.state_dict()
    assert after.keys() == before.keys(), "the PEFT model is not merged in place"
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    # What the adapter does not touch is kept once.
    assert len(model.embed.weight.variants) == 1


def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    base = tiny_model("llama", seed=4)
    adapted = {name: _with_lora(base, ["q_proj", "o_proj"], seed) for seed, name in enumerate("ab")}
    for name, model in adapted.items():
        model.save_pretrained(tmp_path / name)
    model = load({"pre": base, "a": tmp_path / "a", "b": tmp_path / "b"})
    assert_sources_are(model, {"pre": base, **adapted})


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    base = tiny_model("llama", seed=4)
    _with_lora(base, ["q_proj"], 1).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PairError) as caught:
        load({"sft": tmp_path / "adapter", "pre": base})
    assert str(caught.value) == (
        "source 'sft', the base, is a PEFT adapter. Put the model that it adapts first: "
        '{"pre": base, "sft": adapter}.'
    )


def test_a_model_that_peft_has_changed_is_named(pair: dict[str, PreTrainedModel]) -> None:
    """Regression: "the checkpoint has no tensor" told a user of get_peft_model nothing."""
    base = pair["pre"]
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PairError) as caught:
        load({"pre": base, "sft": adapted})
    assert str(caught.value) == (
        "source 'pre': PEFT has put its layers into this model (get_peft_model changes the model "
        "it is given). Load the model again, or give its folder."
    )


# -- tokenizers --------------------------------------------------------------------------------


def test_without_a_tokenizer_tokens_run_and_texts_say_what_to_do(
    pair: dict[str, PreTrainedModel],
) -> None:
    model = load(pair)
    assert model.tokenizer is None
    assert_sources_are(model, pair)
    with torch.no_grad():
        part = model(tokens(), graft="sft @ bos + [2] + last")
    assert difference(part, reference(pair["pre"], tokens())) > 1e-3
    for text in ("Anders", Prompt("{x} acted", {"x": "Anders"})):
        with pytest.raises(ValueError) as caught:
            model(text)
        assert str(caught.value) == (
            "this model was loaded without a tokenizer, so it runs token tensors only. "
            "Load it with tokenizer=…, or set model.tokenizer."
        )
    with pytest.raises(ValueError, match=r"no span 'x' here\. Spans of this prompt: bos last all"):
        model(tokens(), graft="sft @ x")


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_tokenizer_can_be_given(as_folder: bool, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama3"]()
    pair = tiny_pair("llama", seed=1, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model = load(pair, tokenizer=str(tmp_path) if as_folder else tokenizer)
    ids = torch.tensor([tokenizer("Renée acted")["input_ids"]])
    with torch.no_grad():
        assert difference(model("Renée acted"), reference(pair["pre"], ids)) < TOLERANCE


def test_a_folder_without_a_tokenizer_is_not_taken_for_one(
    pair: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    """Regression: it meant no tokenizer, without a word."""
    with pytest.raises(PairError, match=re.escape(f"tokenizer={str(tmp_path)!r}: this")):
        load(pair, tokenizer=str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_named() -> None:
    """Regression: "index out of range in self"."""
    with pytest.raises(PairError) as caught:
        load(tiny_pair("llama", seed=1), tokenizer=TOKENIZERS["gpt2"]())
    assert re.fullmatch(
        r"the tokenizer given contradicts the embedding of 'pre' of 97 rows: there is none for "
        r"token 97 \('.+'\) and \d+ more\. Give the one that it was trained with\.",
        str(caught.value),
    )


def _folders(tmp_path: Path, change: Callable[[Any], Any]) -> dict[str, Path]:
    """Two checkpoints, the second with a tokenizer that `change` has made of the first's."""
    first, second = TOKENIZERS["gpt2"](), TOKENIZERS["gpt2"]()
    second = change(second) or second
    pair = tiny_pair("llama", seed=1, vocab_size=len(first) + 5)
    return {
        "pre": save_checkpoint(pair["pre"], tmp_path / "pre", first),
        "sft": save_checkpoint(pair["sft"], tmp_path / "sft", second),
    }


def _lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _other_words(tokenizer: Any) -> None:
    """Words no longer keep the space before them."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False)]
    )


def _other_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lower, "the same text gives different tokens"),
        (_other_words, "the same text gives different tokens"),
        (_other_eos, "the same text gives different tokens (eos_token_id is "),
        (lambda _: TOKENIZERS["llama3"](), "neither has all tokens of the other (1 is "),
    ],
)
def test_tokenizers_that_differ_are_refused(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    folders = _folders(tmp_path, change)
    with pytest.raises(PairError) as caught:
        load(folders)
    text = str(caught.value)
    assert text.startswith("the tokenizers of 'pre' and 'sft' differ: ")
    assert message in text
    assert text.endswith(
        "Grafting needs the same tokens in both; pass tokenizer=… if you know which one is right."
    )
    given = TOKENIZERS["gpt2"]()
    assert load(folders, tokenizer=given).tokenizer is given


def test_a_finetune_saved_without_a_tokenizer_uses_the_base_s(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gemma"]()
    pair = tiny_pair("gemma2", seed=1, vocab_size=len(tokenizer))
    folders = {
        "pre": save_checkpoint(pair["pre"], tmp_path / "pre", tokenizer),
        "sft": save_checkpoint(pair["sft"], tmp_path / "sft"),
    }
    assert load(folders).tokenizer.get_vocab() == tokenizer.get_vocab()


# -- pairs that are refused --------------------------------------------------------------------


def _refused(sources: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(PairError) as caught:
        load(sources, **options)
    return str(caught.value)


def test_different_families() -> None:
    text = _refused({"pre": tiny_model("llama", 1), "sft": tiny_model("mistral", 1)})
    assert text.startswith(
        "'pre' (pre (LlamaForCausalLM)) and 'sft' (sft (MistralForCausalLM)) differ in "
        "architecture: model_type ('llama' and 'mistral')"
    )


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers (3 and 2)"),
        ({"intermediate_size": 44}, "intermediate_size (40 and 44)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads (2 and 4)"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps (0.03 and 1e-05)"),
        ({"hidden_act": "gelu"}, "hidden_act ('silu' and 'gelu')"),
        ({"head_dim": 10}, "head_dim (6 and 10)"),
    ],
)
def test_different_architectures(
    pair: dict[str, PreTrainedModel], changes: dict[str, Any], difference: str
) -> None:
    other = AutoModelForCausalLM.from_config(families._llama(**changes))
    text = _refused({"pre": pair["pre"], "sft": other})
    assert f"differ in architecture: {difference}" in text


def test_a_bias_in_one_source_only_is_zero_in_the_other(pair: dict[str, PreTrainedModel]) -> None:
    """Finetuning with biases added is the same architecture; no bias and a zero bias are equal."""
    torch.manual_seed(3)
    other = AutoModelForCausalLM.from_config(families._llama(mlp_bias=True)).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    for wanted in ({"pre": pair["pre"], "sft": other}, {"sft": other, "pre": pair["pre"]}):
        model = load(wanted)
        assert_sources_are(model, wanted)
        biases = model.b_in[list(wanted).index("pre")]
        assert torch.equal(biases, torch.zeros_like(biases))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pre", "sft"])
def test_weights_that_are_not_finite(
    pair: dict[str, PreTrainedModel], name: str, bad: float
) -> None:
    with torch.no_grad():
        pair[name].model.layers[1].mlp.down_proj.weight[3, 4] = bad
    assert _refused(pair, check=False) == (
        f"{name!r}: mlp_out weight, layer 1 holds values that are not finite. Training diverged, "
        "or the file is damaged; load an earlier checkpoint."
    )


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    """In float32, with weights that bfloat16 can hold; `.to` would round its rotary module too."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return rounded


def test_mixed_dtypes_run_in_the_widest(pair: dict[str, PreTrainedModel]) -> None:
    wanted = _rounded(pair["sft"])
    pair["sft"].to(torch.bfloat16)
    model = load(pair)
    assert model.cfg.dtype == torch.float32
    assert difference(run(model, "sft", tokens()), reference(wanted, tokens())) < TOLERANCE


@pytest.mark.parametrize(
    ("pre", "sft", "run_in"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),  # neither holds the other's numbers
        ("bfloat16", "float64", "float64"),
    ],
)
def test_the_widest_stored_dtype_is_what_other_devices_run_in(
    pre: str,
    sft: str,
    run_in: str,
    pair: dict[str, PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is not the CPU, as a GPU is; `meta` has no numbers to compare."""
    monkeypatch.setattr(loading, "_share_tied", lambda prepared: prepared)
    monkeypatch.setattr(loading, "_refuse_overflow", lambda *given: None)
    pair["pre"].to(getattr(torch, pre))
    pair["sft"].to(getattr(torch, sft))
    found = loading.load(pair, device="meta")
    assert found.dtype == getattr(torch, run_in)
    assert {t.dtype for weights in found.weights.values() for t in weights.values()} == {
        found.dtype
    }
    said = [row.done for row in found.differences if row.key == "stored dtypes"]
    assert said == ([] if pre == sft else [f"all run in {run_in}"])
    asked = loading.load(pair, device="meta", dtype="bfloat16")
    assert asked.dtype == torch.bfloat16


def test_mixed_dtypes_within_one_source(pair: dict[str, PreTrainedModel]) -> None:
    pair["sft"].model.layers[0].mlp.to(torch.bfloat16)
    told = load(pair, check=False).differences.set_index("key").loc["stored dtypes"]
    assert (told["base"], told["value"]) == ("float32", "bfloat16 float32")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "Tensor", torch.int64])
def test_a_dtype_that_is_none_is_named(pair: dict[str, PreTrainedModel], dtype: Any) -> None:
    """Regression: AttributeError, or an autograd error deep inside."""
    assert _refused(pair, dtype=dtype) == (
        f'dtype={dtype!r} is not a floating-point dtype of torch. Write, for example, "bfloat16".'
    )


def test_quantised_tensors(pair: dict[str, PreTrainedModel]) -> None:
    weight = pair["sft"].model.layers[2].self_attn.k_proj
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
    assert _refused(pair) == (
        "'sft': k weight, layer 2 is torch.int8: quantised weights cannot be grafted exactly."
    )


def test_quantised_configs(pair: dict[str, PreTrainedModel]) -> None:
    pair["sft"].config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        UnsupportedArchitectureError,
        match=r"^llama with quantization_config=\{'quant_method': 'bitsandbytes'\} is not",
    ):
        load(pair)


# -- sources that are none ---------------------------------------------------------------------


def test_one_source_is_no_pair(pair: dict[str, PreTrainedModel]) -> None:
    """Regression: the message printed the whole model."""
    wanted = (
        "Give two or more as a mapping from names, the base first, such as "
        '{"pre": "org/model", "sft": "path/to/checkpoint"}.'
    )
    assert _refused({"pre": pair["pre"]}) == f"sources: pre. {wanted}"
    assert _refused({}) == f"sources: none. {wanted}"


@pytest.mark.parametrize("name", ["", "1st", "my sft", "a/b", "sft:1", "a|b"])
def test_names_that_no_graft_could_write(pair: dict[str, PreTrainedModel], name: str) -> None:
    with pytest.raises(ValueError) as caught:
        load({"pre": pair["pre"], name: pair["sft"]})
    assert str(caught.value).startswith(f"source={name!r} is not a source name. Names begin with")


@pytest.mark.parametrize("given", [None, 3, ["a"], torch.nn.Linear(2, 2)])
def test_things_that_are_no_source(pair: dict[str, PreTrainedModel], given: Any) -> None:
    assert _refused({"pre": pair["pre"], "sft": given}) == (
        f"source 'sft' is a {type(given).__name__}. Give a hub id, a checkpoint folder, a PEFT "
        "adapter folder, a transformers model, or a TransformerBridge."
    )


def test_folders_that_are_no_checkpoint(pair: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert _refused({"pre": pair["pre"], "sft": missing}) == (
        f"source 'sft': there is no folder {missing}."
    )
    assert _refused({"pre": "./nowhere", "sft": pair["sft"]}) == (
        "source 'pre': there is no folder ./nowhere."
    )
    assert _refused({"pre": pair["pre"], "sft": tmp_path}) == (
        f"source 'sft': folder {tmp_path} has no config.json, so it is not a checkpoint. "
        "Give the folder that save_pretrained wrote."
    )


@pytest.mark.parametrize("headless", ["body", "classifier"])
def test_models_without_a_language_model_head(
    pair: dict[str, PreTrainedModel], headless: str
) -> None:
    given = (
        pair["sft"].model
        if headless == "body"
        else LlamaForSequenceClassification(families._llama(pad_token_id=0))
    )
    assert _refused({"pre": pair["pre"], "sft": given}) == (
        f"source 'sft' is a {type(given).__name__}, which has no language-model head. "
        "Load it with AutoModelForCausalLM."
    )


# -- what is not exactly supported -------------------------------------------------------------

OTHER_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": lambda: OPTConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=1,
        ffn_dim=30,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=1, num_attention_heads=4
    ),
    "gptj": lambda: GPTJConfig(vocab_size=97, n_embd=24, n_layer=1, n_head=4, rotary_dim=4),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@pytest.mark.parametrize("saved", [False, True])
def test_other_families_are_refused_with_the_list(family: str, saved: bool, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_config(OTHER_FAMILIES[family]())
    if saved:
        model.save_pretrained(tmp_path)
        model = tmp_path
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load({"pre": model, "sft": model})
    assert str(caught.value) == (
        f"model_type {family!r} is not supported. Supported: gpt2 gpt_neox llama mistral gemma "
        "gemma2 gemma3_text olmo olmo2 qwen2 qwen3 phi3. A family is added by an entry in "
        "graftlens/model/arch.py (docs/howto/extending.md)."
    )


@pytest.mark.parametrize(
    ("variant", "option", "value", "covered"),
    [
        ("gpt2", "add_cross_attention", True, "False"),
        ("gpt2", "reorder_and_upcast_attn", True, "False"),
        ("gemma", "use_bidirectional_attention", True, "False"),
        ("gemma2", "use_bidirectional_attention", True, "False"),
        ("gemma3", "use_bidirectional_attention", True, "False"),
        ("llama", "pretraining_tp", 2, "1"),
        ("qwen2", "is_encoder_decoder", True, "False"),
    ],
)
def test_options_that_the_forward_does_not_cover(
    variant: str, option: str, value: Any, covered: str
) -> None:
    config = VARIANTS[variant]()
    setattr(config, option, value)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture(config)
    assert str(caught.value) == (
        f"{config.model_type} with {option}={value!r} is not supported: the forward covers "
        f"{option}={covered}. graftlens refuses what it cannot run exactly."
    )


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_unknown_layer_types(variant: str) -> None:
    config = VARIANTS[variant]()
    config.layer_types = ["full_attention", "chunked_attention", *config.layer_types[2:]]
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture(config)
    assert str(caught.value) == (
        "layer_types holds 'chunked_attention'; covered are full_attention and sliding_attention."
    )


def _rewritten(
    model: PreTrainedModel, folder: Path, change: Callable[[dict[str, Tensor]], None]
) -> Path:
    """A checkpoint folder whose tensors `change` has edited."""
    save_checkpoint(model, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_folder_with_tensors_that_the_forward_does_not_use(
    pair: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    """Regression: transformers drops them with a log line, and loading went on."""
    odd = "model.layers.0.self_attn.sinks"
    folder = _rewritten(pair["sft"], tmp_path / "x", lambda s: s.update({odd: torch.ones(4)}))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load({"pre": pair["pre"], "sft": folder})
    assert str(caught.value) == (
        f"source 'sft': the checkpoint {folder} holds unused tensors: {odd}. "
        "graftlens refuses what it cannot run exactly."
    )


@pytest.mark.parametrize("odd", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_folder_that_lacks_tensors(
    pair: dict[str, PreTrainedModel], tmp_path: Path, odd: str
) -> None:
    """Regression: transformers draws them at random with a log line, and loading went on.

    The probe cannot see it: the model that it compares with has the same random tensor.
    """
    folder = _rewritten(pair["sft"], tmp_path / "x", lambda s: s.pop(odd))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load({"pre": pair["pre"], "sft": folder})
    assert str(caught.value) == (
        f"source 'sft': the checkpoint {folder} lacks tensors: {odd}. "
        "graftlens refuses what it cannot run exactly."
    )


@pytest.mark.parametrize(
    ("variant", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        (
            "neox-parallel",
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "gpt_neox.layers.2.attention.rotary_emb.inv_freq",
            ],
        ),
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_buffers_that_old_checkpoints_carry_are_no_weights(
    variant: str, buffers: list[str], tmp_path: Path
) -> None:
    """The hub's gpt2 and pythia checkpoints have causal masks among their tensors."""
    pair = tiny_pair(variant, seed=1)
    folder = _rewritten(
        pair["sft"], tmp_path / "x", lambda s: s.update({b: torch.ones(3) for b in buffers})
    )
    assert_sources_are(load({"pre": pair["pre"], "sft": folder}), pair)


def test_a_loaded_model_with_a_tensor_of_its_own(pair: dict[str, PreTrainedModel]) -> None:
    pair["sft"].model.layers[0].self_attn.register_parameter(
        "sinks", torch.nn.Parameter(torch.ones(4))
    )
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load(pair)
    assert str(caught.value) == (
        "the checkpoint holds tensors that the llama forward does not use: "
        "model.layers.0.self_attn.sinks. graftlens refuses what it cannot run exactly."
    )


def test_a_tensor_of_another_shape(pair: dict[str, PreTrainedModel]) -> None:
    layer = pair["sft"].model.layers[1].mlp
    layer.up_proj = torch.nn.Linear(24, 41, bias=False)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load(pair)
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj.weight (mlp_in) has shape (41, 24); the config says (40, 24)."
    )


# -- the probe ---------------------------------------------------------------------------------

SABOTAGE = {
    "eps": lambda a: replace(a, eps=1e-6),
    "scale": lambda a: replace(a, attn_scales=(1.0,) * a.n_layers),
    "one layer's scale": lambda a: replace(a, attn_scales=(*a.attn_scales[:-1], 0.3)),
    "activation": lambda a: replace(a, act_fn="gelu"),
    "rotary width": lambda a: replace(a, embed_scale=1.01),
    "norm offset": lambda a: replace(a, norm_offset=0.01),
    "window": lambda a: replace(a, windows=(None, 20, None)),
    "soft cap": lambda a: replace(a, logit_softcap=30.0),
    "parallel": lambda a: replace(a, parallel=True),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_probe_catches_a_forward_that_is_wrong(
    pair: dict[str, PreTrainedModel], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a mistake that a family's entry could hold; `check=False` lets it through."""
    family = arch_module.FAMILIES["llama"]
    wrong = replace(family, read=lambda config: SABOTAGE[what](family.read(config)))
    monkeypatch.setitem(arch_module.FAMILIES, "llama", wrong)
    text = _refused(pair)
    assert re.fullmatch(
        r"source 'pre' \(pre \(LlamaForCausalLM\)\): logits differ from its own model's by "
        r"\d\.\de[-+]\d\d \(relative\); 1\.0e-04 is rounding in float32\. This checkpoint is not "
        r"supported exactly\. Please report its config\.",
        text,
    ), text
    load(pair, check=False)


def test_the_probe_looks_at_every_source(pair: dict[str, PreTrainedModel]) -> None:
    """The second source's own forward does something else."""
    pair["sft"].lm_head.register_forward_hook(lambda module, args, out: out * 1.01)
    assert _refused(pair).startswith("source 'sft' (sft (LlamaForCausalLM)): logits differ from")


def test_one_line_says_what_was_loaded_and_checked(
    pair: dict[str, PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    pair["sft"].model.embed_tokens.load_state_dict(pair["pre"].model.embed_tokens.state_dict())
    load(pair)
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"graftlens: llama, 3 layers, d_model 24, sources pre sft \(base pre\); "
        r"1 of 30 tensors are the same in all sources; float32 on cpu; "
        r"logits equal the sources' own within \de-0\d\n",
        printed,
    ), printed
    load(pair, check=False)
    assert capsys.readouterr().out.endswith("; float32 on cpu; logits not checked\n")
    load(pair, verbose=False)
    assert capsys.readouterr().out == ""


# -- dtypes ------------------------------------------------------------------------------------


def test_bfloat16_checkpoints_run_in_float32_on_the_cpu(tmp_path: Path) -> None:
    """Regression: the rotary module of a model cast with `.to` ran with rounded frequencies."""
    pair = tiny_pair("llama", seed=6)
    wide = {name: _rounded(m) for name, m in pair.items()}
    folders = {n: save_checkpoint(m.to(torch.bfloat16), tmp_path / n) for n, m in pair.items()}
    for sources in (folders, pair):
        model = load(sources)
        assert model.cfg.dtype == torch.float32
        assert_sources_are(model, wide)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2", "gemma3", "olmo2", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_runs_near_hugging_face_s(variant: str, dtype: Any) -> None:
    pair = tiny_pair(variant, seed=6)
    model = load(pair, dtype=dtype)
    assert model.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, theirs in pair.items():
        narrow = reference(copy.deepcopy(theirs).to(torch.bfloat16), tokens())
        ours = run(model, name, tokens())
        assert ours.dtype == torch.bfloat16
        # As near as rounding allows: not much farther than Hugging Face is from its own float32.
        rounding = difference(narrow, reference(theirs, tokens()))
        assert difference(ours, narrow) <= max(2 * rounding, 0.02)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_probe_allows_for_bfloat16_s_rounding(dtype: str | None) -> None:
    """Weights as training begins with them, as smooth as a real model's."""
    pair = {}
    for seed, name in enumerate(("pre", "sft")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(VARIANTS["llama"](), dtype=torch.bfloat16)
        pair[name] = model.eval()
    model = load(pair, dtype=dtype)
    assert model.cfg.dtype == (torch.bfloat16 if dtype else torch.float32)


def test_float64(pair: dict[str, PreTrainedModel]) -> None:
    model = load(pair, dtype=torch.float64)
    theirs = reference(copy.deepcopy(pair["sft"]).double(), tokens())
    assert difference(run(model, "sft", tokens()).float(), theirs.float()) < 1e-5


# -- multimodal Gemma 3 ------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True])
def test_the_text_part_of_a_multimodal_gemma_3(saved: bool, tmp_path: Path) -> None:
    pair = {"pre": multimodal(1), "sft": multimodal(2)}
    sources: dict[str, Any] = dict(pair)
    if saved:
        for name, model in pair.items():
            model.save_pretrained(tmp_path / name)
            sources[name] = tmp_path / name
    model = load(sources)
    assert model.arch.family == "gemma3_text"
    ids = tokens(90)
    for name, theirs in pair.items():
        assert difference(run(model, name, ids), reference(theirs, ids)) < TOLERANCE
        assert not theirs.training
    assert difference(run(model, "pre", ids), run(model, "sft", ids)) > 0.01


# -- odd but legal configs ---------------------------------------------------------------------


def _gemma2(**changes: Any) -> Gemma2Config:
    values = {
        **families._sizes(n_heads=6, n_layers=4),
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": families.NORM_EPS,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "sliding_window": families.WINDOW,
        "rope_parameters": families._rope(),
    }
    return Gemma2Config(**{**values, **changes})


def _qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**families._grouped(), "head_dim": 10, **changes})


def _longrope(**changes: Any) -> dict[str, Any]:
    return families._rope(
        rope_type="longrope",
        short_factor=[1.0, 1.2, 1.5],
        long_factor=[1.0, 2.0, 4.0],
        original_max_position_embeddings=32,
        **changes,
    )


def _without_rope() -> dict[str, Any]:
    return {k: v for k, v in families._grouped().items() if k != "rope_parameters"}


ODD: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama, one key-value head": lambda: families._llama(num_key_value_heads=1),
    "llama, no groups": lambda: families._llama(num_key_value_heads=4),
    "llama, gelu": lambda: families._llama(hidden_act="gelu"),
    "llama, relu2": lambda: families._llama(hidden_act="relu2"),
    "llama, one layer": lambda: families._llama(num_hidden_layers=1),
    "llama, one head": lambda: families._llama(num_attention_heads=1, num_key_value_heads=1),
    "llama, partial rotary": lambda: families._llama(
        head_dim=12, rope_parameters=families._rope(partial_rotary_factor=0.5)
    ),
    "llama, old rope_scaling": lambda: LlamaConfig(
        **_without_rope(), rope_theta=50.0, rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "llama, longrope": lambda: families._llama(rope_parameters=_longrope(factor=2.0)),
    "llama, dynamic rope": lambda: families._llama(
        max_position_embeddings=16, rope_parameters=families._rope(rope_type="dynamic", factor=4.0)
    ),
    "llama, padded vocabulary": lambda: families._llama(vocab_size=128, pad_token_id=100),
    "gpt2, no n_inner": lambda: families._gpt2(n_inner=None),
    "gpt2, n_inner": lambda: families._gpt2(n_inner=17),
    "gpt2, relu": lambda: families._gpt2(activation_function="relu"),
    "gpt2, short context": lambda: families._gpt2(n_positions=11),
    "gpt2, one head": lambda: families._gpt2(n_head=1),
    "neox, tied": lambda: families._neox(tie_word_embeddings=True),
    "neox, linear rope": lambda: families._neox(
        rope_parameters=families._rope(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)
    ),
    "neox, odd rotary width": lambda: families._neox(rotary=0.3),
    "mistral, one key-value head": lambda: families._mistral(num_key_value_heads=1),
    "qwen2, tied": lambda: families._qwen2(tie_word_embeddings=True),
    "qwen2, window that is off": lambda: families._qwen2(
        use_sliding_window=False, sliding_window=families.WINDOW, max_window_layers=1
    ),
    "qwen2, max_window_layers": lambda: families._qwen2(
        use_sliding_window=True, sliding_window=families.WINDOW, max_window_layers=1
    ),
    "qwen3, attention bias": lambda: _qwen3(attention_bias=True),
    "qwen3, tied, one key-value head": lambda: _qwen3(
        tie_word_embeddings=True, num_key_value_heads=1
    ),
    "qwen3, window": lambda: _qwen3(
        use_sliding_window=True, sliding_window=families.WINDOW, max_window_layers=1
    ),
    "gemma, hub's hidden_act": lambda: GemmaConfig(
        **families._sizes(), num_key_value_heads=1, head_dim=10, hidden_act="gelu"
    ),
    "gemma2, no soft caps": lambda: _gemma2(
        attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma2, no final cap": lambda: _gemma2(final_logit_softcapping=None),
    "gemma2, untied": lambda: _gemma2(tie_word_embeddings=False),
    "gemma2, bias": lambda: _gemma2(attention_bias=True),
    "olmo, tied": lambda: families._olmo(tie_word_embeddings=True),
    "olmo, bias": lambda: families._olmo(attention_bias=True),
    "olmo2, bias": lambda: Olmo2Config(**families._grouped(), attention_bias=True),
    "olmo2, tied": lambda: Olmo2Config(**families._grouped(), tie_word_embeddings=True),
    "phi3, tied, no groups": lambda: families._phi3(
        tie_word_embeddings=True, num_key_value_heads=4
    ),
    "phi3, longrope and partial rotary": lambda: families._phi3(
        original_max_position_embeddings=32,
        rope_parameters=_longrope(partial_rotary_factor=0.75),
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_but_legal_configs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs that users' checkpoints may have; short and long prompts, every source."""
    monkeypatch.setitem(VARIANTS, what, ODD[what])
    pair = tiny_pair(what, seed=7)
    model = load(pair)
    lengths = [11] if model.arch.rotary_dim == 0 else [11, 40]
    for name, theirs in pair.items():
        for length in lengths:
            ids = tokens(model.cfg.d_vocab, length)
            ours = run(model, name, ids)
            assert difference(ours, reference(theirs, ids)) < TOLERANCE, (name, length)


def test_a_tied_base_with_an_untied_finetune() -> None:
    """Finetuning that unties gives the unembedding weights of its own."""
    pre = tiny_model("llama3-rope-tied", seed=1)
    config = copy.deepcopy(pre.config)
    config.tie_word_embeddings = False
    sft = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    sft.load_state_dict(pre.state_dict())
    with torch.no_grad():
        sft.lm_head.weight.add_(torch.randn(sft.lm_head.weight.shape))
    model = load({"pre": pre, "sft": sft.eval()})
    assert_sources_are(model, {"pre": pre, "sft": sft})
    assert len(model.embed.weight.variants) == 1
    assert len(model.unembed.linear.weight.variants) == 2
    changed = model(tokens(), graft=Graft.rule("sft", components="unembed"))
    assert difference(changed.detach(), reference(sft, tokens())) < TOLERANCE


def test_tied_embeddings_are_two_components_of_one_tensor() -> None:
    model = load(tiny_pair("gpt2", seed=1))
    assert model.unembed.linear.weight is model.embed.weight
    both = model(tokens(), graft="sft @ all : embed + unembed").detach()
    one = model(tokens(), graft="sft @ all : embed").detach()
    assert difference(both, one) > 0.01
    assert {Component.EMBED, Component.UNEMBED} <= set(model.arch.components)


def test_dynamic_rope_does_not_remember_longer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: after one long prompt, the next shorter ones had the long one's frequencies."""
    monkeypatch.setitem(VARIANTS, "dynamic", ODD["llama, dynamic rope"])
    pair = tiny_pair("dynamic", seed=7)
    model = load(pair)
    before = run(model, "sft", tokens(length=20))
    run(model, "sft", tokens(length=50))
    assert torch.equal(run(model, "sft", tokens(length=20)), before)
    assert difference(before, reference(pair["sft"], tokens(length=20))) < TOLERANCE
