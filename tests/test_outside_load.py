"""Loading what outside checkpoints brought: dtypes, rotary settings, damaged and misplaced files.

What is right is Hugging Face's own model, loaded in float32 by name.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import save_checkpoint, tiny_model, tiny_pair
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from toytokenizers import TOKENIZERS
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from graftlens.graft import Graft
from graftlens.model import source as source_module
from graftlens.model.arch import PairError, UnsupportedArchitectureError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.load import preview
from graftlens.model.tokenizers import read_tokenizer

load = GraftedTransformer.from_pretrained

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ODD = "model.layers.1.mlp.up_proj.weight"


@torch.no_grad()
def off(model: GraftedTransformer, name: str, theirs: Any, length: int = 11) -> float:
    """max |difference| / max |logit| of a source to a Hugging Face model."""
    ids = torch.randint(90, (1, length), generator=torch.Generator().manual_seed(length))
    right = theirs(input_ids=ids, use_cache=False).logits
    return float((model(ids, graft=Graft.rule(name)) - right).abs().max() / right.abs().max())


def set_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def shard(folder: Path, state: dict[str, Tensor], parts: int = 3) -> Path:
    """The state over several files, some tensors of each kind in each."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    names = sorted(state)
    where = {name: f"model-{i % parts + 1:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {n: state[n].contiguous() for n in names if where[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def pickle(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair of tiny llamas in folders, for tests that change no file of them."""
    root = tmp_path_factory.mktemp("saved")
    return {n: save_checkpoint(m, root / n) for n, m in tiny_pair("llama", 1).items()}


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same pair; the second may be changed."""
    return saved | {"sft": Path(shutil.copytree(saved["sft"], tmp_path / "sft"))}


# -- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "gpt2", "neox-parallel", "gemma2", "phi3"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_files_say_the_dtype(variant: str, key: str, tmp_path: Path) -> None:
    """Regression: float32 files beside `"dtype": "bfloat16"` were rounded, off 1.4e-2.

    A finetuning too small for bfloat16 vanished, and the check compared with the rounded model.
    """
    pre = tiny_model(variant, 1)
    sft = copy.deepcopy(pre)
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter.mul_(1 + 2**-12)
    pair = {"pre": pre, "sft": sft}
    folders = {
        n: set_config(save_checkpoint(m, tmp_path / n), **{"dtype": ..., key: "bfloat16"})
        for n, m in pair.items()
    }
    model = load(folders, dtype="float32", verbose=False)
    for name, theirs in pair.items():
        assert off(model, name, theirs) < 1e-5
    assert all(len(weight.variants) == 2 for weight in model.stored())


@pytest.mark.parametrize("variant", ["llama3-rope-tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("kept", ["lm_head", "embedding"])
@pytest.mark.parametrize("fmt", ["safetensors", "pickled"])
def test_of_two_tied_tensors_a_file_may_hold_either(
    variant: str, kept: str, fmt: str, tmp_path: Path
) -> None:
    """safetensors' save_model (accelerate's, too) keeps the head; it was refused for a while."""
    pair = tiny_pair(variant, 1)
    for name, model in pair.items():
        folder = tmp_path / name
        model.config.save_pretrained(folder)
        state = dict(model.state_dict())
        table = next(k for k in state if k.endswith((".wte.weight", ".embed_tokens.weight")))
        del state[table if kept == "lm_head" else "lm_head.weight"]
        if fmt == "pickled":
            torch.save(state, folder / "pytorch_model.bin")
        elif kept == "lm_head":
            save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
            assert load_file(folder / WEIGHTS).keys() == state.keys(), "the test's own premise"
        else:
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    folders = {name: str(tmp_path / name) for name in pair}
    preview(folders)
    model = load(folders, verbose=False)
    for name, theirs in pair.items():
        assert off(model, name, theirs) < 1e-5
    # One of them is needed all the same.
    (tmp_path / "sft" / "pytorch_model.bin").unlink(missing_ok=True)
    state = {k: v for k, v in state.items() if k not in (table, "lm_head.weight")}
    save_file(state, tmp_path / "sft" / WEIGHTS, metadata={"format": "pt"})
    for read in (load, preview):
        with pytest.raises(UnsupportedArchitectureError, match="lacks tensors: "):
            read(folders)


def test_the_files_say_the_dtype_of_a_multimodal_model(tmp_path: Path) -> None:
    """Regression: there the wrong dtype is under `text_config`, too."""
    pair = {"pre": families.multimodal(1), "sft": families.multimodal(2)}
    folders = {}
    for name, theirs in pair.items():
        theirs.save_pretrained(tmp_path / name)
        text = json.loads((tmp_path / name / "config.json").read_text())["text_config"]
        folders[name] = set_config(
            tmp_path / name, dtype="bfloat16", text_config=text | {"dtype": "bfloat16"}
        )
    model = load(folders, verbose=False)
    for name, theirs in pair.items():
        assert off(model, name, theirs) < 1e-4
    assert preview(folders)[0] == model.arch


@pytest.mark.parametrize("kind", ["one file", "sharded", "pickled", "pickled as before torch 1.6"])
def test_files_of_mixed_dtypes_are_read_exactly(kind: str, copied: dict[str, Path]) -> None:
    """Regression: transformers takes one dtype for all, that of the config or the first tensor."""
    folder = copied["sft"]
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    state = load_file(folder / WEIGHTS)
    state = {n: state[n].to(dtypes[i % 3]) for i, n in enumerate(sorted(state))}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if kind == "sharded":
        shard(folder, state)
    elif kind != "one file":
        (folder / WEIGHTS).unlink()
        zipped = kind == "pickled"
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    set_config(folder, dtype="bfloat16")
    model = load(copied, dtype="float32", verbose=False)
    theirs = copy.deepcopy(tiny_pair("llama", 1)["sft"])
    theirs.load_state_dict({n: t.float() for n, t in state.items()})
    assert off(model, "sft", theirs) < 1e-5
    told = load(copied, verbose=False).differences.set_index("key").loc["stored dtypes"]
    assert (told["base"], told["value"]) == ("float32", "bfloat16 float16 float32")
    assert preview(copied)[0] == model.arch


def test_float64_files_run_in_float64(copied: dict[str, Path]) -> None:
    """Regression: rounded to float32 without a word."""
    for name in ("pre", "sft"):
        copied[name] = Path(shutil.copytree(copied[name], copied["sft"].parent / f"{name}64"))
        rewrite(copied[name], lambda s: s.update({n: t.double() for n, t in s.items()}))
    assert load(copied, verbose=False).cfg.dtype == torch.float64


def test_an_adapter_s_base_is_read_in_its_files_dtype(tmp_path: Path) -> None:
    """Regression: the base under an adapter was rounded to the config's bfloat16."""
    base = tiny_model("llama", 4)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    folder = set_config(save_checkpoint(base, tmp_path / "base"), dtype="bfloat16")
    model = load({"pre": folder, "sft": tmp_path / "adapter"}, verbose=False)
    assert off(model, "pre", base) < 1e-5
    assert off(model, "sft", adapted) < 1e-5


def test_the_check_reads_the_file(copied: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it compared with the model that had been rounded on the way in."""
    monkeypatch.setattr(source_module, "widest", lambda dtypes: torch.bfloat16)
    for name in ("safetensors", "pickled"):
        if name == "pickled":
            pickle(copied["sft"])
        with pytest.raises(
            PairError,
            match=r"^source 'pre': \S+ was loaded with different numbers from those that \S+ holds",
        ):
            load(copied)
    load(copied, check=False, verbose=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("kind", ["one file", "sharded", "pickled"])
@pytest.mark.parametrize("read", [load, preview])
def test_quantised_tensors_without_a_quantization_config(
    dtype: torch.dtype, kind: str, read: Any, copied: dict[str, Path]
) -> None:
    """Regression: float8 was taken for numbers, without the scales that they are to be read by."""
    state = load_file(copied["sft"] / WEIGHTS)
    state[ODD] = (state[ODD] * 8).to(dtype)
    save_file(state, copied["sft"] / WEIGHTS, metadata={"format": "pt"})
    if kind == "sharded":
        shard(copied["sft"], state)
    elif kind == "pickled":
        pickle(copied["sft"])
    with pytest.raises(PairError, match=rf"^source 'sft': \S+ holds {ODD} as \w+: quantised"):
        read(copied)


def test_a_loaded_model_with_float8_weights() -> None:
    pair = tiny_pair("llama", 1)
    weight = pair["sft"].model.layers[2].self_attn.k_proj
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PairError) as caught:
        load(pair)
    assert str(caught.value) == (
        "'sft': k weight, layer 2 is torch.float8_e4m3fn: quantised weights cannot be grafted "
        "exactly."
    )


@pytest.mark.parametrize("where", ["config.json", "model", "text_config"])
def test_quantised_configs_say_what_to_do(where: str, copied: dict[str, Path]) -> None:
    """Regression: "the forward covers quantization_config=." """
    found = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "x": "y" * 99}
    sources: Any = copied
    if where == "model":
        sources = tiny_pair("llama", 1)
        sources["sft"].config.quantization_config = found
    elif where == "config.json":
        set_config(copied["sft"], quantization_config=found)
    else:
        set_config(copied["sft"], text_config={"quantization_config": found})
    for read in [load] if where == "model" else [load, preview]:
        with pytest.raises(UnsupportedArchitectureError) as caught:
            read(sources)
        text = str(caught.value)
        assert "llama with quantization_config={'quant_method': 'fp8', " in text
        assert text.endswith(
            "… is not supported: quantised weights cannot be grafted exactly. Give the checkpoint "
            "that was quantised, or one that was dequantised and saved (model.dequantize() in "
            "transformers)."
        )
        assert len(text) < 500


def test_float16_that_overflows_is_named(copied: dict[str, Path]) -> None:
    """Regression: "logits differ by nan. Please report its config." """
    rewrite(copied["sft"], lambda s: s["model.layers.1.mlp.down_proj.weight"].mul_(3e4))
    with pytest.raises(PairError) as caught:
        load(copied, dtype="float16")
    assert str(caught.value).endswith(
        'float16. float16 overflows: load with dtype="bfloat16" or dtype="float32".'
    )
    assert load(copied, dtype="bfloat16", check=False, verbose=False).cfg.dtype == torch.bfloat16
    rewrite(copied["sft"], lambda s: s["model.layers.1.mlp.down_proj.weight"].fill_(1e5))
    with pytest.raises(PairError) as caught:
        load(copied, dtype="float16", check=False)
    assert str(caught.value) == (
        "source 'sft': mlp_out weight, layer 1 has numbers beyond float16's 65504. float16 "
        'overflows: load with dtype="bfloat16" or dtype="float32".'
    )


def test_a_dtype_that_nothing_runs_in() -> None:
    with pytest.raises(PairError, match="the forward runs in float64, float32, bfloat16 or"):
        load(tiny_pair("llama", 1), dtype=torch.float8_e4m3fn)


# -- rotary settings and contexts --------------------------------------------------------------


def llama(seed: int, **changes: Any) -> PreTrainedModel:
    plain = {k: v for k, v in families._grouped().items() if k != "rope_parameters"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**plain, "rope_theta": 50.0} | changes))
    return model.eval().requires_grad_(False)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 32,
}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "contexts": ({"max_position_embeddings": 64}, {"max_position_embeddings": 256}),
    "contexts, the shorter first": ({}, {"max_position_embeddings": 256}),
    "type and rope_type": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "both spellings": (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "linear by one": ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {}),
    "yarn's defaults": (
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1}, "max_position_embeddings": 99},
    ),
    "longrope": (
        {"rope_scaling": LONG},
        {"rope_scaling": {"type": "longrope"} | LONG},
    ),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "names of one activation": ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
}


@pytest.mark.parametrize("what", SAME)
def test_settings_that_change_no_number_are_no_difference(what: str, tmp_path: Path) -> None:
    """Regression: refused for the spelling, or for contexts that rotary positions do not need."""
    ours, theirs = SAME[what]
    pair = {"pre": llama(1, **ours), "sft": llama(2, **theirs)}
    folders = {name: save_checkpoint(m, tmp_path / name) for name, m in pair.items()}
    order = ("sft", "pre") if what == "contexts" else ("pre", "sft")  # the longer one first
    model = load({name: pair[name] for name in order}, check=False, verbose=False)
    assert model.cfg.n_ctx == max(m.config.max_position_embeddings for m in pair.values())
    assert preview(folders)[0].n_ctx == model.cfg.n_ctx
    for name, hugging_face in pair.items():
        for length in (11, 70):
            assert off(model, name, hugging_face, length) < 1e-4, (name, length)


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({}, {"rope_theta": 51.0}),
    "factor": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    "kind": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
    "yarn's attention factor": (
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"attention_factor": 1.5}},
    ),
    "dynamic by factor, beyond the context alone": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    "dynamic by context": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128},
    ),
    "long factors": (
        {"rope_scaling": LONG},
        {"rope_scaling": LONG | {"long_factor": [1.0, 2.0, 5.0]}},
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_tables_that_differ_are_each_source_s_own(what: str, tmp_path: Path) -> None:
    ours, theirs = DIFFERENT[what]
    pair = {"pre": llama(1, **ours), "sft": llama(2, **theirs)}
    folders = {name: save_checkpoint(m, tmp_path / name) for name, m in pair.items()}
    model = load(pair, check=False, verbose=False)
    assert model.rotary.differ
    assert preview(folders)[0] == model.arch
    for name, hugging_face in pair.items():
        for length in (11, 70, 140):
            assert off(model, name, hugging_face, length) < 1e-4, (name, length)


def test_learned_positions_of_other_lengths_are_a_difference() -> None:
    pair = {
        name: AutoModelForCausalLM.from_config(families._gpt2(n_positions=n))
        for name, n in (("pre", 64), ("sft", 32))
    }
    with pytest.raises(PairError, match=r"architecture: n_positions \(64 and 32\)"):
        load(pair)


# -- places ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the hub is asked for, where there is no network; the local cache is empty."""
    asked: list[str] = []

    def metadata(url: str, **options: Any) -> None:
        asked.append(url)
        assert options["timeout"] <= 10
        raise ConnectionError("no network here")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.mark.parametrize("name", ["nowhere", "models/sft"])
@pytest.mark.parametrize("read", [load, preview])
def test_a_folder_that_is_not_there(name: str, read: Any, hub: list[str]) -> None:
    """Regression: without `./`, 33 s of retries, then "couldn't connect"."""
    with pytest.raises(PairError) as caught:
        read({"pre": name, "sft": "b"})
    assert str(caught.value) == (
        f"source 'pre': {name!r} is neither a folder here nor a model in the local cache, and the "
        "hub could not be reached (ConnectionError: no network here). Check the folder's path or "
        "the connection."
    )
    assert len(hub) == 1
    with pytest.raises(PairError, match=rf"^tokenizer='{name}': '{name}' is neither a folder"):
        load(tiny_pair("llama", 1), tokenizer=name)
    assert len(hub) == 2


def test_offline_the_hub_is_not_asked(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PairError, match="in the local cache, and HF_HUB_OFFLINE is set, so the"):
        load({"pre": "models/sft", "sft": "b"})
    assert hub == []


@pytest.mark.parametrize("name", ["a/b/c", "./a", "~/a-b-c", "a b", "a\\b", "x" * 300, "org/.."])
@pytest.mark.parametrize("read", [load, preview])
def test_names_that_no_hub_model_has(name: str, read: Any, hub: list[str]) -> None:
    with pytest.raises(PairError, match=r"^source 'pre': there is no folder "):
        read({"pre": name, "sft": "b"})
    assert hub == []


def test_a_file_is_not_a_folder(saved: dict[str, Path]) -> None:
    with pytest.raises(PairError, match=r"config\.json is a file\. Give the folder"):
        load({"pre": saved["pre"] / "config.json", "sft": saved["sft"]})


@pytest.mark.parametrize("kind", ["one file", "sharded", "pickled"])
@pytest.mark.parametrize("offline", [True, False])
def test_a_fetched_hub_model_runs_without_the_hub(
    kind: str,
    offline: bool,
    hub: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    tokenizer = TOKENIZERS["llama3"]()
    pair = tiny_pair("llama", 5, len(tokenizer))
    for name, model in pair.items():
        place = tmp_path / "cache" / f"models--org--{name}"
        folder = save_checkpoint(model, place / "snapshots" / ("a" * 40), tokenizer)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
        if kind == "sharded":
            shard(folder, load_file(folder / WEIGHTS))
        elif kind == "pickled":
            pickle(folder)
    sources = {name: f"org/{name}" for name in pair}
    model = load(sources, verbose=False)
    for name, theirs in pair.items():
        assert off(model, name, theirs) < 1e-5
    assert model.tokenizer is not None
    assert model.cfg.model_name == "org/pre"
    assert preview(sources)[0] == model.arch
    assert len(hub) == (0 if offline else 4)


# -- damaged files -----------------------------------------------------------------------------

CONFIGS = {
    **{f"hidden_size={v!r}": {"hidden_size": v} for v in (None, "abc", -1, 0, [], {}, 1.5, True)},
    **{f"num_hidden_layers={v!r}": {"num_hidden_layers": v} for v in (None, "3", -1, 10**12)},
    **{f"num_attention_heads={v!r}": {"num_attention_heads": v} for v in (0, -4, 3, [4])},
    **{f"vocab_size={v!r}": {"vocab_size": v} for v in (None, 0, 10**9)},
    **{f"rms_norm_eps={v!r}": {"rms_norm_eps": v} for v in (None, "1e-5", -1, [1e-5])},
    "rms_norm_eps=NaN": {"rms_norm_eps": float("nan")},
    "rms_norm_eps=Infinity": {"rms_norm_eps": float("inf")},
    **{f"hidden_act={v!r}": {"hidden_act": v} for v in (None, "abc", 3)},
    **{f"max_position_embeddings={v!r}": {"max_position_embeddings": v} for v in (None, -1, "x")},
    "intermediate_size": {"intermediate_size": 10**9},
    **{f"head_dim={v!r}": {"head_dim": v} for v in (0, -1, "6")},
    **{f"model_type={v!r}": {"model_type": v} for v in (None, 3, [], "nonesuch", ...)},
    **{f"rope={v!r}": {"rope_parameters": v} for v in (3, "x", [1])},
    **{
        f"rope_theta={v!r}": {"rope_parameters": {"rope_type": "default", "rope_theta": v}}
        for v in (None, "x", -3.0, 0, float("nan"))
    },
    "rope_type": {"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 5.0}},
    "no factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5.0}},
    "attention_bias": {"attention_bias": True},
    "tie_word_embeddings": {"tie_word_embeddings": "yes"},
    "quantization_config": {"quantization_config": "fp8"},
}


def refused_alike(sources: dict[str, Path], both: bool = True) -> str:
    """The one sentence or two that loading and the dry run say."""
    sources = dict(reversed(sources.items()))  # the damaged one first, which saves time
    said = []
    for read in (load, preview) if both else (load,):
        with pytest.raises((PairError, UnsupportedArchitectureError)) as caught:
            read(sources)
        said.append(str(caught.value))
        assert "\n" not in said[-1]
        assert len(said[-1]) < 900
    assert len(set(said)) == 1
    return said[0]


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_damaged(what: str, copied: dict[str, Path]) -> None:
    """Regression: TypeError, KeyError, ZeroDivisionError and more of transformers came out.

    Some asked for terabytes of memory, and the dry run passed.
    """
    set_config(copied["sft"], **CONFIGS[what])
    text = refused_alike(copied)
    assert text.startswith("source 'sft': ")
    assert str(copied["sft"]) in text


CONTENTS = {
    "empty": b"",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "not JSON": b"{'a': 1}",
    "half": b'{"model_type": "lla',
    "latin-1": '{"model_type": "llama", "é": 1}'.encode("latin-1"),
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "zeros": bytes(200),
    "no model": b"{}",
    "all left out": b'{"model_type": "llama"}',
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_config_that_is_not_one(what: str, copied: dict[str, Path]) -> None:
    (copied["sft"] / "config.json").write_bytes(CONTENTS[what])
    text = refused_alike(copied)
    assert text.startswith("source 'sft': ")
    assert str(copied["sft"]) in text


def test_a_config_with_a_byte_order_mark(copied: dict[str, Path]) -> None:
    file = copied["sft"] / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert refused_alike(copied) == (
        f"source 'sft': {file} begins with a byte order mark, which transformers cannot read. "
        "Save it as UTF-8 without one."
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"eos_token_id": "x"}', b'{"eos_token_id": [1, null]}', b'{"a": NaN}'],
)
def test_generation_settings_that_are_damaged(content: bytes, copied: dict[str, Path]) -> None:
    """Regression: transformers leaves them out without a word, and a generation ends elsewhere."""
    file = copied["sft"] / "generation_config.json"
    file.write_bytes(content)
    assert refused_alike(copied).startswith(f"source 'sft': {file} ")


def _index(content: bytes) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        shard(folder, load_file(folder / WEIGHTS))
        (folder / INDEX).write_bytes(content)

    return write


def _sharded(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        shard(folder, load_file(folder / WEIGHTS))
        change(folder / "model-00002.safetensors")

    return write


class _Command:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors could not be read"),
    "text": (lambda f: (f / WEIGHTS).write_text("<html>404"), "could not be read"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 9000), "could not be read"),
    "short by a byte": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1),
        "could not be read",
    ),
    "a shard is missing": (_sharded(Path.unlink), r"model-00002\.safetensors is missing"),
    "a shard is truncated": (_sharded(lambda p: os.truncate(p, 99)), "00002.* could not be read"),
    "an empty index": (_index(b""), r"index\.json is not JSON"),
    "an index that is a list": (_index(b"[]"), r"index\.json holds a list"),
    "an index of nothing": (_index(b"{}"), r"index\.json does not say which file"),
    "an index of numbers": (
        _index(b'{"metadata": {}, "weight_map": {"a": 3}}'),
        r"index\.json does not say which file",
    ),
    "an index without tensors": (
        _index(b'{"metadata": {}, "weight_map": {}}'),
        r"index\.json does not name any tensor",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda s: s.update({ODD: torch.zeros(41, 24)})),
        rf"{ODD} has shape \(41, 24\); the config says \(40, 24\)",
    ),
    "a tensor less": (lambda f: rewrite(f, lambda s: s.pop(ODD)), f"lacks tensors: {ODD}"),
    "a tensor more": (
        lambda f: rewrite(f, lambda s: s.update({"model.sinks": torch.zeros(3)})),
        r"holds unused tensors: model\.sinks",
    ),
    "a truncated pickle": (
        lambda f: (pickle(f), os.truncate(f / "pytorch_model.bin", 9000)),
        r"pytorch_model\.bin could not be read",
    ),
    "an empty pickle": (
        lambda f: (pickle(f), (f / "pytorch_model.bin").write_bytes(b"")),
        r"pytorch_model\.bin could not be read",
    ),
    "a pickle of something else": (
        lambda f: (pickle(f), torch.save([1, 2], f / "pytorch_model.bin")),
        r"pytorch_model\.bin could not be read",
    ),
    "a pickle that runs a command": (
        lambda f: (pickle(f), torch.save({"a": _Command()}, f / "pytorch_model.bin")),
        r"pytorch_model\.bin could not be read \(UnpicklingError\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_weights_that_are_damaged(
    what: str, copied: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: torch's size mismatch, IndexError and others; and the dry run passed."""
    monkeypatch.chdir(tmp_path)
    change, message = DAMAGE[what]
    change(copied["sft"])
    text = refused_alike(copied)
    assert re.search(message, text), text
    assert str(copied["sft"]) in text
    assert "weights_only" not in text
    assert not Path("ran").exists()


def test_a_folder_without_weights(copied: dict[str, Path]) -> None:
    """A dry run needs none: sweeps are planned where the weights are not."""
    (copied["sft"] / WEIGHTS).unlink()
    assert "has a config but no weights (model.safetensors or" in refused_alike(copied, both=False)
    assert preview(copied)[0].n_layers == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{"])
def test_a_tokenizer_that_is_damaged(content: bytes, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama3"]()
    pair = tiny_pair("llama", 1, len(tokenizer))
    folders = {n: save_checkpoint(m, tmp_path / n, tokenizer) for n, m in pair.items()}
    (folders["sft"] / "tokenizer.json").write_bytes(content)
    told = refused_alike(folders)
    assert told.startswith(f"{folders['sft'] / 'tokenizer.json'} ")
    assert told.endswith(" Save the tokenizer again, or download the file again.")


@pytest.mark.parametrize("length", ["512", [512]])
def test_a_tokenizer_whose_longest_text_is_no_number(length: Any, tmp_path: Path) -> None:
    """Regression: a TypeError at the first text ("'>' not supported between …")."""
    TOKENIZERS["llama3"]().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(
        PairError, match=r"^the tokenizer of \S+ could .* is not a number\)\. Save the"
    ):
        read_tokenizer(str(tmp_path))


# -- code that comes with a checkpoint ---------------------------------------------------------

AUTO_MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
OWN_CODE = "import os\n\nos.mkdir('ran')\n\n\nclass Config: ...\n\n\nclass Model: ...\n"


@pytest.mark.parametrize("native", [True, False])
def test_code_that_comes_with_a_checkpoint_never_runs(
    native: bool, copied: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: transformers asked at the terminal whether to run it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question at the terminal"))
    (copied["sft"] / "own.py").write_text(OWN_CODE)
    set_config(copied["sft"], auto_map=AUTO_MAP, model_type="llama" if native else "own")
    if native:
        with pytest.warns(UserWarning, match=r"names code that comes .* transformers' own llama"):
            model = load(copied, verbose=False)
        assert off(model, "sft", tiny_pair("llama", 1)["sft"]) < 1e-5
    else:
        assert "needs code that comes with the checkpoint (auto_map)" in refused_alike(copied)
    assert not Path("ran").exists()


def test_a_tokenizer_s_own_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question at the terminal"))
    tokenizer = TOKENIZERS["llama3"]()
    pair = tiny_pair("llama", 1, len(tokenizer))
    folders = {n: save_checkpoint(m, tmp_path / n, tokenizer) for n, m in pair.items()}
    file = folders["sft"] / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folders["sft"] / "own.py").write_text(OWN_CODE)
    assert "tokenizer_config.json needs code that comes" in refused_alike(folders)
    assert not Path("ran").exists()


# -- models in other hands ---------------------------------------------------------------------


def _bridge(model: PreTrainedModel, folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = TOKENIZERS["llama3"]()
    save_checkpoint(model, folder, tokenizer)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def test_a_bridge_with_a_hook(tmp_path: Path) -> None:
    """Regression: "logits differ … Please report its config." """
    pair = tiny_pair("llama", 1, len(TOKENIZERS["llama3"]()))
    bridge = _bridge(pair["sft"], tmp_path)
    bridge.add_hook("blocks.1.hook_resid_post", lambda value, hook: value * 1.5)
    with pytest.raises(PairError) as caught:
        load({"pre": pair["pre"], "sft": bridge})
    assert "Its own model has hooks (on model.layers.1.hook_out), which grafts do not run" in str(
        caught.value
    )
    bridge.reset_hooks()
    assert off(load({"pre": pair["pre"], "sft": bridge}, verbose=False), "sft", pair["sft"]) < 1e-5


def test_a_transformers_model_with_hooks() -> None:
    """Those that change its logits are named; those that only look on are no reason to refuse."""
    pair = tiny_pair("llama", 1)
    seen: list[Any] = []
    pair["sft"].model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    assert off(load(pair, verbose=False), "sft", tiny_pair("llama", 1)["sft"]) < 1e-5
    handle = pair["sft"].lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(PairError, match=r"has hooks \(on model\.norm lm_head\), which grafts do"):
        load(pair)
    handle.remove()
    load(pair, verbose=False)


def test_hooks_that_transformers_itself_leaves_are_not_named() -> None:
    pair = tiny_pair("llama", 1)
    pair["sft"](torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)
    assert source_module.hooked_places(pair["sft"]) == ()


def test_each_module_keeps_its_mode() -> None:
    """Regression: a model in training came back with its frozen, evaluating parts in training."""
    pair = {
        name: AutoModelForCausalLM.from_config(families._gpt2(resid_pdrop=0.5, embd_pdrop=0.5))
        for name in ("pre", "sft")
    }
    pair["sft"].train()
    pair["sft"].transformer.h[1].eval()
    before = [module.training for module in pair["sft"].modules()]
    model = load(pair, verbose=False)
    assert [module.training for module in pair["sft"].modules()] == before
    assert off(model, "sft", pair["sft"].eval()) < 1e-5


def test_weights_that_are_computed_are_named() -> None:
    """Regression: "the checkpoint has no tensor …"."""
    for change in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm):
        pair = tiny_pair("llama", 1)
        pair["sft"].requires_grad_(True)
        change(pair["sft"].model.layers[0].mlp.up_proj)
        with pytest.raises(
            PairError, match=r"up_proj\.\S+ is a tensor from which a weight is computed"
        ):
            load(pair)


def test_weights_that_are_not_in_memory() -> None:
    pair = tiny_pair("llama", 1)
    pair["sft"].to("meta")
    with pytest.raises(PairError, match="weights of this model are not in memory"):
        load(pair)
