"""Adapters as they come from outside: run as PEFT runs them, or refused in one sentence."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_checkpoint, tiny_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from toytokenizers import TOKENIZERS
from transformers import PreTrainedModel

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.model.arch import PairError, UnsupportedArchitectureError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.load import preview

load = GraftedTransformer.from_pretrained

TOLERANCE = 1e-5  # relative to the largest logit, float32
TIED = "llama3-rope-tied"
Q = ["q_proj", "down_proj"]
IDS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

built = cache(tiny_model)


def base_of(variant: str = "llama") -> PreTrainedModel:
    return built(variant, 4)


def adapted(config: Any, variant: str = "llama") -> Any:
    """A PeftModel whose every trainable number was moved."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base_of(variant)), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": Q, "task_type": "CAUSAL_LM", **options}
    )


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The folder of a LoRA adapter, for a test to damage."""
    adapted(lora()).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def peft_logits(folder: Path, variant: str = "llama") -> Tensor:
    """The oracle: PEFT's own unmerged forward."""
    model = PeftModel.from_pretrained(copy.deepcopy(base_of(variant)), folder).eval()
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def off(
    sources: Mapping[str, Any], wanted: Tensor, variant: str = "llama", **options: Any
) -> float:
    """How far SFT is from what is wanted; PRE must be the base all the while."""
    model = load(sources, verbose=False, **options)
    base = base_of(variant)(input_ids=IDS, use_cache=False).logits
    assert float((model(IDS) - base).abs().max() / base.abs().max()) < TOLERANCE
    assert float((wanted - base).abs().max() / base.abs().max()) > 0.01, "the test's own premise"
    ours = model(IDS, graft=Graft.rule("sft"))
    return float((ours - wanted).abs().max() / wanted.abs().max())


def refusal(folder: Any, base: Any = None, kind: type[Exception] = PairError) -> str:
    with pytest.raises(kind) as caught:
        load({"pre": base_of() if base is None else base, "sft": folder}, verbose=False)
    message = str(caught.value)
    assert message.startswith("source 'sft': ")
    assert "\n" not in message
    return message


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(edit(load_file(path))), path)


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what an adapter can be --------------------------------------------------------------------

KINDS: dict[str, tuple[str, Any]] = {
    "patterns": (
        "llama",
        lora(rank_pattern={".*[02].*down_proj": 5}, alpha_pattern={"^model.*(q|k)_proj": 30}),
    ),
    "regex": ("llama", lora(target_modules=r".*\.layers\.[12]\..*(q|v)_proj")),
    "excluded": ("llama", lora(target_modules="all-linear", exclude_modules=r".*layers\.1\..*")),
    "layers": ("llama", lora(layers_to_transform=[0, 2], layers_pattern="layers")),
    "rslora": ("llama", lora(use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "biases": ("gpt2", lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "biases of its layers": ("gpt2", lora(target_modules=["c_attn"], bias="lora_only")),
    "saved modules": ("llama", lora(modules_to_save=["lm_head", "embed_tokens", "norm"])),
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
    "adalora": (
        "llama",
        AdaLoraConfig(target_modules=Q, total_step=9, init_r=3, task_type="CAUSAL_LM"),
    ),
    "ia3": ("llama", IA3Config(target_modules=Q, feedforward_modules=".*down_proj")),
    "loha": ("llama", LoHaConfig(r=2, target_modules=Q)),
    "vera": ("llama", VeraConfig(r=2, target_modules=Q, save_projection=False)),
    "tokens": ("llama", TrainableTokensConfig(token_indices=IDS[0, :2].tolist())),
    # A tied base: what is trained of one of the two must not reach the other.
    "tied head": (TIED, lora(target_modules=["lm_head"])),
    "tied embedding": (TIED, lora(target_modules=["embed_tokens"])),
    "tied both": (TIED, lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied head, dora": (TIED, lora(target_modules=["lm_head"], use_dora=True)),
    "tied by peft": (TIED, lora(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tied by a pattern": (
        TIED,
        lora(target_modules=r"model\.embed_tokens|.*q_proj", ensure_weight_tying=True),
    ),
    "tied, saved head": (TIED, lora(modules_to_save=["lm_head"])),
    "tied, saved embedding": (TIED, lora(modules_to_save=["embed_tokens"])),
    "tied, tokens": (TIED, lora(trainable_token_indices=IDS[0, :2].tolist())),
    "tied, tokens apart": (
        TIED,
        lora(trainable_token_indices={"lm_head": [3], "embed_tokens": IDS[0, :2].tolist()}),
    ),
    "tied gpt2": ("gpt2", lora(target_modules=["lm_head"])),
    "tied, scaled embedding": ("gemma2", lora(target_modules=["embed_tokens"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_run_as_in_peft(kind: str, tmp_path: Path) -> None:
    """Regression: merged into one of two tied embeddings, an adapter changed both (off 120 %).

    Nothing but the probe found it, so it is looked at without the probe, too.
    """
    variant, config = KINDS[kind]
    model = adapted(copy.deepcopy(config), variant)
    model.save_pretrained(tmp_path)
    wanted = peft_logits(tmp_path, variant)
    base = base_of(variant)
    assert off({"pre": base, "sft": tmp_path}, wanted, variant, check=False) < TOLERANCE
    with torch.no_grad():
        own = model(input_ids=IDS, use_cache=False).logits
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert off({"pre": base, "sft": model}, own, variant) < TOLERANCE
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), "the model that was given is as it was"


def test_an_adapter_on_a_tied_embedding_unties_its_own_source_only(tmp_path: Path) -> None:
    model = adapted(lora(target_modules=["lm_head"]), TIED)
    grafted = load({"pre": base_of(TIED), "sft": model}, verbose=False)
    embed, unembed = grafted.embed.weight, grafted.unembed.linear.weight
    assert torch.equal(embed[0], unembed[0])
    assert torch.equal(embed[0], embed[1])
    layer = model.get_base_model().lm_head
    trained = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(unembed[1], trained, atol=1e-6)
    # Both components can be grafted apart.
    with torch.no_grad():
        head = grafted(IDS, graft="sft @ all : unembed")
        both = grafted(IDS, graft="sft @ all")
    assert torch.equal(head, both)
    assert Component.EMBED in grafted.arch.components


def test_a_tied_head_s_adapter_on_half_precision_files(tmp_path: Path) -> None:
    base = copy.deepcopy(base_of(TIED)).to(torch.bfloat16)
    adapted(lora(target_modules=["lm_head"]), TIED).save_pretrained(tmp_path / "adapter")
    save_checkpoint(base, tmp_path / "base")
    rounded = copy.deepcopy(base_of(TIED))
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    # The adapter's file holds the float32 embedding that it was trained beside.
    change(tmp_path / "adapter", lambda t: {k: v for k, v in t.items() if "base_layer" not in k})
    model = load({"pre": tmp_path / "base", "sft": tmp_path / "adapter"}, dtype="float32")
    oracle = PeftModel.from_pretrained(rounded, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = oracle(input_ids=IDS, use_cache=False).logits
        ours = model(IDS, graft="sft @ all")
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


def test_adapters_saved_by_pickle(plain: Path) -> None:
    wanted = peft_logits(plain)
    tensors = load_file(plain / "adapter_model.safetensors")
    (plain / "adapter_model.safetensors").unlink()
    torch.save(tensors, plain / "adapter_model.bin")
    assert off({"pre": base_of(), "sft": plain}, wanted) < TOLERANCE
    del tensors[next(iter(tensors))]
    torch.save(tensors, plain / "adapter_model.bin")
    assert "lacks tensors" in refusal(plain, kind=UnsupportedArchitectureError)
    torch.save([1, 2], plain / "adapter_model.bin")
    assert "are not tensors by name" in refusal(plain)
    (plain / "adapter_model.bin").write_bytes(b"PK\x03\x04 not a pickle")
    assert f"the weights in {plain} are damaged" in refusal(plain)


# -- tensors that are missing, unknown or of another shape -------------------------------------


def _of_layer_1(key: str) -> bool:
    return ".layers.1." in key


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: {k: v for k, v in t.items() if not _of_layer_1(k)},
            "lacks tensors: base_model.model.model.layers.1.mlp.down_proj.lora_A.weight, ",
        ),
        (
            lambda t: {k: v for k, v in t.items() if not (_of_layer_1(k) and "q_proj.lora_B" in k)},
            "lacks tensors: base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight. ",
        ),
        (
            lambda t: {f"_fsdp_wrapped_module.{k}": v for k, v in t.items()},
            "lacks tensors: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, ",
        ),
        (
            lambda t: {
                k.replace("model.layers", "model._orig_mod.layers"): v for k, v in t.items()
            },
            "lacks tensors: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, ",
        ),
        (
            lambda t: {
                **t,
                "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 24),
            },
            "holds unused tensors: base_model.model.model.layers.7.mlp.up_proj.lora_A.weight. ",
        ),
    ],
)
def test_adapters_with_missing_or_unknown_tensors_are_refused(
    edit: Any, said: str, plain: Path
) -> None:
    """Regression: PEFT drew what was missing at random and warned; SFT equalled PRE, or worse."""
    change(plain, edit)
    message = refusal(plain, kind=UnsupportedArchitectureError)
    assert message.startswith(f"source 'sft': the adapter {plain} {said}")
    assert "graftlens refuses what it cannot run exactly" in message


@pytest.mark.parametrize(
    "kind", ["dora", "saved modules", "biases", "ia3", "loha", "adalora", "vera", "tokens"]
)
def test_every_tensor_of_every_kind_is_needed(kind: str, tmp_path: Path) -> None:
    variant, config = KINDS[kind]
    adapted(copy.deepcopy(config), variant).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    for part in {key.split(".")[-2] for key in whole} | {"bias"}:
        for key in [key for key in whole if part in key.split(".")][-1:]:
            save_file({k: v for k, v in whole.items() if k != key}, path)
            message = refusal(tmp_path, base_of(variant), UnsupportedArchitectureError)
            assert f"lacks tensors: {key}. " in message


def test_a_rank_that_is_not_the_config_s(plain: Path) -> None:
    """Regression: torch's "size mismatch"."""
    settings(plain, r=5)
    message = refusal(plain)
    assert "lora_A.weight has shape (3, " in message
    assert "the base and the adapter's config say (5, " in message


def test_adapters_of_another_architecture(plain: Path) -> None:
    """Regression: torch's "size mismatch", or PEFT's list of modules."""
    message = refusal(plain, base_of("phi3"))
    assert f"the adapter {plain} does not fit the base" in message
    message = refusal(plain, base_of("llama-head-dim"))
    assert "has shape" in message
    assert message.endswith("Give the model that it was trained on as the base.")


def test_adapters_with_added_tokens(tmp_path: Path) -> None:
    """Regression: torch's "size mismatch"; it runs with both tables, or on a base of the size."""
    base = copy.deepcopy(base_of())
    base.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    model = get_peft_model(copy.deepcopy(base), lora(modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "whole")
    folders = {"pre": save_checkpoint(base_of(), tmp_path / "base"), "sft": tmp_path / "whole"}
    assert load(folders, verbose=False).arch == preview(folders)[0]
    alone = get_peft_model(copy.deepcopy(base), lora(modules_to_save=["embed_tokens"]))
    alone.save_pretrained(tmp_path, save_embedding_layers=False)
    message = refusal(tmp_path)
    assert f"has shape ({VOCAB + 3}, 24)" in message
    assert message.endswith(
        "Where finetuning added tokens, resize the base's embeddings to match: "
        f"base.resize_token_embeddings({VOCAB + 3})."
    )
    loaded = load({"pre": base, "sft": tmp_path / "whole"}, verbose=False)
    new = torch.tensor([[5, VOCAB + 1, 7, VOCAB + 2]])
    with torch.no_grad():
        wanted = model.eval()(input_ids=new, use_cache=False).logits
        ours = loaded(new, graft="sft @ all")
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


def test_quantised_tensors(plain: Path) -> None:
    change(plain, lambda t: {k: v.to(torch.int8) for k, v in t.items()})
    assert "is torch.int8: quantised weights cannot be grafted exactly." in refusal(plain)


def test_tensors_that_are_not_finite(plain: Path) -> None:
    change(plain, lambda t: {k: v * torch.nan for k, v in t.items()})
    with pytest.raises(PairError, match="holds values that are not finite"):
        load({"pre": base_of(), "sft": plain})


# -- kinds and options that are refused --------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    ],
)
def test_trained_prompts_are_refused(config: Any, tmp_path: Path) -> None:
    """Regression: AttributeError after the weights were read; the dry run passed."""
    model = adapted(config)
    model.save_pretrained(tmp_path / "adapter")
    message = refusal(tmp_path / "adapter", kind=UnsupportedArchitectureError)
    assert f"is an adapter of the kind {config.peft_type.value}, which trains additions" in message
    base = save_checkpoint(base_of(), tmp_path / "base")
    with pytest.raises(UnsupportedArchitectureError) as caught:
        preview({"pre": base, "sft": tmp_path / "adapter"})
    assert str(caught.value) == message
    assert "which trains additions" in refusal(model, kind=UnsupportedArchitectureError)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task_type": "SEQ_CLS"}, "was trained for the task SEQ_CLS"),
        ({"peft_type": "NEWER"}, "has peft_type 'NEWER', which the installed peft does not know"),
        ({"new_option": 4}, "has options that the installed peft does not know: new_option=4. "),
        ({"init_lora_weights": "pissa_niter_4"}, "began with init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "began with init_lora_weights='loftq'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers of the base"),
        ({"modules_to_save": ["(.*)*x"]}, "modules_to_save of the adapter"),
    ],
)
def test_options_that_are_not_exact_are_refused(
    changes: dict[str, Any], said: str, plain: Path
) -> None:
    settings(plain, **changes)
    assert said in refusal(plain, kind=UnsupportedArchitectureError)


def test_options_of_a_newer_peft_that_are_off_change_nothing(plain: Path) -> None:
    wanted = peft_logits(plain)
    settings(plain, new_switch=False, new_config=None, new_list=[], task_type=None)
    assert off({"pre": base_of(), "sft": plain}, wanted) < TOLERANCE


def test_adapters_whose_merge_is_not_their_forward() -> None:
    invoked = lora(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    assert "PEFT could not merge" in refusal(adapted(invoked))


def test_an_adapter_on_an_adapter(plain: Path) -> None:
    with pytest.raises(PairError, match=r"and so is the base\. .*merge_and_unload"):
        load({"pre": adapted(lora()), "sft": plain})


# -- damaged folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"null", "does not say which kind of adapter it is (peft_type)"),
        (b"[]", "does not say which kind of adapter it is (peft_type)"),
        (b"{}", "does not say which kind of adapter it is (peft_type)"),
        (b'{"peft_type": ["LORA"]}', "does not say which kind of adapter it is (peft_type)"),
        (b'{"peft_type": "LORA"', "adapter_config.json is not JSON"),
        (b"", "adapter_config.json is not JSON"),
        (b'\xff{"a": 1}', "adapter_config.json is not UTF-8 text"),
        (b'{"peft_type": "LORA", "r": "two"}', "does not fit the base"),
        (b'{"peft_type": "LORA", "target_modules": "("}', "is not a pattern"),
        (b'{"peft_type": "LORA", "target_modules": "nowhere"}', "matches no module of the base"),
        (b'{"peft_type": "LORA", "target_modules": ["nowhere"]}', "does not fit the base"),
    ],
)
def test_damaged_settings(content: bytes, said: str, plain: Path) -> None:
    """Regression: another library's exception, which named no file."""
    (plain / "adapter_config.json").write_bytes(content)
    message = refusal(plain)
    assert str(plain) in message
    assert said in message


def test_a_folder_without_weights(plain: Path, tmp_path: Path) -> None:
    """Regression: "Repo id must be in the form …"."""
    (plain / "adapter_model.safetensors").unlink()
    assert f"the adapter's folder {plain} has no weights" in refusal(plain)


@pytest.mark.parametrize("size", [0, 7, 200, -100])
def test_truncated_weights(size: int, plain: Path) -> None:
    """Regression: SafetensorError; now also found by the dry run."""
    path = plain / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(plain)
    assert f"the weights {path} are damaged" in message
    save_checkpoint(base_of(), plain / "base")
    with pytest.raises(PairError) as caught:
        preview({"pre": plain / "base", "sft": plain})
    assert str(caught.value) == message


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(\w|\w\w|\.)*\.(\w|\w\w)*9\w[xyz]"},
        {"exclude_modules": r"(\w|\w\w|\.)*\.(\w|\w\w)*9\w[xyz]"},
        {"rank_pattern": {r"(\w|\w\w|\.)*\.(\w|\w\w)*9\w[xyz]": 4}},
    ],
)
def test_patterns_that_would_run_for_ever(changes: dict[str, Any], plain: Path) -> None:
    """Regression: a folder that someone was sent could keep the process busy for ever."""
    settings(plain, **changes)
    assert "takes too long to match" in refusal(plain)


def test_patterns_that_python_alone_cannot_match(plain: Path) -> None:
    """Python's own matcher needs 2^n steps for this one; it means what it says."""
    wanted = peft_logits(plain)
    settings(plain, target_modules=r"(?:(?:\w+\.?)+)+(?:q|down)_proj")
    assert off({"pre": base_of(), "sft": plain}, wanted) < TOLERANCE


# -- the adapter's tokenizer -------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """A checkpoint with a tokenizer and an adapter on it."""
    tokenizer = TOKENIZERS["llama3"]()
    base = tiny_model("llama", 4, vocab_size=len(tokenizer) + 3)
    save_checkpoint(base, tmp_path / "base", tokenizer)
    get_peft_model(base, lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    return {"pre": tmp_path / "base", "sft": tmp_path / "adapter"}


def test_a_tokenizer_in_the_adapter_s_folder_is_compared(texts: dict[str, Path]) -> None:
    """Regression: it was ignored, so that "<film>" became the tokens of its letters."""
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.save_pretrained(texts["sft"])
    assert load(texts, verbose=False).tokenizer.get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["<film>"])
    tokenizer.save_pretrained(texts["sft"])
    loaded = load(texts, verbose=False)
    assert loaded.to_tokens("<film>")[0].tolist() == tokenizer("<film>")["input_ids"]
    assert preview(texts)[1].get_vocab() == tokenizer.get_vocab()
    spare = loaded.arch.d_vocab - len(tokenizer)
    tokenizer.add_tokens([f"<film {i}>" for i in range(spare + 1)])
    tokenizer.save_pretrained(texts["sft"])
    for find in (load, preview):
        with pytest.raises(PairError, match="the tokenizer of 'sft' contradicts its embedding of"):
            find(texts)
    with pytest.raises(
        PairError, match="the tokenizer given contradicts the embedding of 'pre' of"
    ):
        load(texts, tokenizer=tokenizer)


def test_the_adapter_s_tokenizer_serves_where_the_base_has_none(texts: dict[str, Path]) -> None:
    for path in texts["pre"].glob("tokenizer*"):
        path.unlink()
    assert load(texts, verbose=False).tokenizer is None
    TOKENIZERS["llama3"]().save_pretrained(texts["sft"])
    assert load(texts, verbose=False).tokenizer is not None
    assert preview(texts)[1] is not None
    (texts["sft"] / "tokenizer.json").write_text("{}")
    with pytest.raises(PairError, match=r"tokenizer\.json does not hold the parts of a tokenizer"):
        load(texts)
