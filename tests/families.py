"""Tiny random Hugging Face models of every supported family, built from a config with no network.

Sizes differ from each other wherever a family allows it, scaling options are strong enough to show
on eleven tokens, and every parameter is drawn at random, so that a swapped axis, a forgotten bias
or an ignored config option changes the logits.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
N_CTX = 64
WINDOW = 4  # shorter than any test prompt
NORM_EPS = 0.03  # large enough that another epsilon changes the logits

# Families whose RMSNorm multiplies by (1 + weight): there the weights scatter around zero.
OFFSET_NORM_FAMILIES = frozenset({"gemma", "gemma2", "gemma3_text"})
# Families that multiply token embeddings by sqrt(d_model).
SCALED_EMBED_FAMILIES = OFFSET_NORM_FAMILIES

TOKEN_IDS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def _rope(theta: float = 50.0, **scaling: Any) -> dict[str, Any]:
    """Rotary parameters; the small base turns even the slowest pair visibly within a few tokens."""
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _gpt2(**changes: Any) -> GPT2Config:
    sizes = {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_inner": 40, "n_positions": N_CTX}
    values = {"vocab_size": VOCAB, "layer_norm_epsilon": NORM_EPS, **sizes, **TOKEN_IDS}
    return GPT2Config(**{**values, **changes})


def _neox(rotary: float = 0.5, **changes: Any) -> GPTNeoXConfig:
    values = {
        **_sizes(d_model=32, d_mlp=44),
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "rope_parameters": _rope(partial_rotary_factor=rotary),
    }
    return GPTNeoXConfig(**{**values, **changes})


def _sizes(
    d_model: int = 24, n_heads: int = 4, n_layers: int = 3, d_mlp: int = 40
) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "intermediate_size": d_mlp,
        "max_position_embeddings": N_CTX,
        **TOKEN_IDS,
    }


def _grouped(**sizes: int) -> dict[str, Any]:
    """Two query heads share a key-value head, RMS norms, rotary positions."""
    return {
        **_sizes(**sizes),
        "num_key_value_heads": 2,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": _rope(),
    }


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_grouped(), **changes})


def _mistral(**changes: Any) -> MistralConfig:
    return MistralConfig(**{**_grouped(), "sliding_window": None, **changes})


def _gemma() -> GemmaConfig:
    return GemmaConfig(
        **_sizes(),
        num_key_value_heads=1,
        head_dim=10,
        rope_parameters=_rope(),
        rms_norm_eps=NORM_EPS,
    )


def _gemma2() -> Gemma2Config:
    return Gemma2Config(
        **_sizes(n_heads=6, n_layers=4),
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=NORM_EPS,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
        sliding_window=WINDOW,
        rope_parameters=_rope(),
    )


def _gemma3() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **_sizes(n_heads=6, n_layers=4),
        num_key_value_heads=3,
        head_dim=10,
        rms_norm_eps=NORM_EPS,
        query_pre_attn_scalar=7,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": _rope(theta=500.0, rope_type="linear", factor=2.0),
            "sliding_attention": _rope(theta=20.0),
        },
    )


def _olmo(**changes: Any) -> OlmoConfig:
    values = _grouped()
    del values["rms_norm_eps"]  # its norm has no weight and a fixed epsilon
    return OlmoConfig(**{**values, **changes})


def _olmo2() -> Olmo2Config:
    return Olmo2Config(**_grouped())


def _qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**_grouped(), **changes})


def _qwen3() -> Qwen3Config:
    return Qwen3Config(**_grouped(), head_dim=10)


def _phi3(**changes: Any) -> Phi3Config:
    values = {
        **_grouped(d_model=32, d_mlp=44),
        "original_max_position_embeddings": N_CTX,
    }
    return Phi3Config(**{**values, **changes})


VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "gpt2-scaled-by-layer": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-untied": lambda: _gpt2(tie_word_embeddings=False),
    "gpt2-no-scale": lambda: _gpt2(scale_attn_weights=False),
    "neox-parallel": lambda: _neox(use_parallel_residual=True),
    "neox-sequential": lambda: _neox(use_parallel_residual=False, hidden_act="gelu_new"),
    "neox-full-rotary": lambda: _neox(rotary=1.0),
    "neox-no-bias": lambda: _neox(attention_bias=False),
    "llama": _llama,
    "llama3-rope-tied": lambda: _llama(
        tie_word_embeddings=True,
        rope_parameters=_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-biased": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-yarn": lambda: _llama(
        rope_parameters=_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "llama-linear-rope": lambda: _llama(rope_parameters=_rope(rope_type="linear", factor=2.0)),
    "llama-head-dim": lambda: _llama(head_dim=10),
    "mistral": _mistral,
    "mistral-window": lambda: _mistral(sliding_window=WINDOW, head_dim=10),
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo": _olmo,
    "olmo-clip": lambda: _olmo(clip_qkv=0.8),
    "olmo2": _olmo2,
    "qwen2": _qwen2,
    "qwen2-window": lambda: _qwen2(
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": _qwen3,
    "phi3": _phi3,
    # Short factors up to 32 tokens, long ones beyond: the length of the whole prompt decides.
    "phi3-longrope": lambda: _phi3(
        original_max_position_embeddings=32,
        rope_parameters=_rope(
            rope_type="longrope",
            short_factor=[1.0, 1.2, 1.5, 2.0],
            long_factor=[1.0, 2.0, 4.0, 8.0],
            original_max_position_embeddings=32,
        ),
    ),
    "phi3-partial-rotary": lambda: _phi3(rope_parameters=_rope(partial_rotary_factor=0.5)),
    "phi3-window": lambda: _phi3(sliding_window=WINDOW),
}


@torch.no_grad()
def _redraw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter anew, at scales where attention is neither uniform nor one-hot.

    Library initialisation leaves biases at zero and norms at one, where errors cannot be seen.
    """

    def draw(shape: torch.Size, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    family = model.config.model_type
    d_model = model.config.hidden_size
    tables = [model.get_input_embeddings().weight]
    if family == "gpt2":
        tables.append(model.transformer.wpe.weight)
    for name, parameter in model.named_parameters():  # a tied tensor appears once
        if any(parameter is table for table in tables):
            scale = d_model**-0.5 if family in SCALED_EMBED_FAMILIES else 0.6
            parameter.copy_(draw(parameter.shape, scale))
        elif name.endswith("bias"):
            parameter.copy_(draw(parameter.shape, 0.3))
        elif parameter.ndim == 1:
            centre = 0.0 if family in OFFSET_NORM_FAMILIES else 1.0
            parameter.copy_(centre + draw(parameter.shape, 0.2))
        else:
            # GPT-2's Conv1D keeps [in, out], every Linear [out, in].
            conv = family == "gpt2" and not name.startswith("lm_head")
            fan_in = parameter.shape[0 if conv else 1]
            gain = 2.0 if name.startswith("lm_head") else 1.3
            parameter.copy_(draw(parameter.shape, gain * fan_in**-0.5))


def tiny_model(name: str, seed: int, vocab_size: int | None = None) -> PreTrainedModel:
    """A float32 model in eval mode with eager attention: its logits are the reference.

    `vocab_size` makes room for a tokenizer; the default is smaller than any of the toy ones.
    """
    config = copy.deepcopy(VARIANTS[name]())
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return model_of(config, seed)


def model_of(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """As `tiny_model`, of any config of a supported family."""
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    model.config.architectures = [type(model).__name__]
    _redraw(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def tiny_sources(
    name: str, names: Sequence[str], seed: int, vocab_size: int | None = None
) -> dict[str, PreTrainedModel]:
    """Models of one variant under the given source names, different in every parameter."""
    return {
        source: tiny_model(name, seed * 1000 + index, vocab_size)
        for index, source in enumerate(names)
    }


def tiny_pair(name: str, seed: int, vocab_size: int | None = None) -> dict[str, PreTrainedModel]:
    """A base model `pre` and a model `sft` that differs from it in every parameter."""
    return tiny_sources(name, ("pre", "sft"), seed, vocab_size)


def save_checkpoint(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write a folder that `from_pretrained` reads; a tokenizer must fit the model's vocabulary."""
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            f"build the model with vocab_size={len(tokenizer)} or more"
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def multimodal(seed: int) -> Gemma3ForConditionalGeneration:
    """A Gemma 3 that also sees pictures."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=VARIANTS["gemma3"]().to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    model = Gemma3ForConditionalGeneration(config)
    text = model.model.language_model
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.25)
    return model.eval().requires_grad_(False)
