"""What graftlens knows about each architecture: facts, and where a checkpoint keeps its weights.

This table is the only place that distinguishes families. The forward reads `Architecture`;
`weights.py` reads `Layout`. To add a family, add an entry to `FAMILIES`; loading checks it against
Hugging Face's logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from graftlens.components import COMPONENTS, Component, Cut

C = Component

MlpKind = Literal["plain", "gated"]

#: (component, layer); the layer is None for components outside the layers.
Site = tuple[Component, int | None]


@dataclass(frozen=True)
class Architecture:
    """The facts of one architecture that the forward pass depends on.

    Attributes:
        family: Hugging Face's `model_type`.
        d_head: width of one head; `n_heads * d_head` need not be `d_model`.
        norm: `layer` is LayerNorm with weight and bias, `layer_plain` without, `rms` RMSNorm.
        norm_offset: added to the stored RMSNorm weight (Gemma keeps w - 1).
        norm_in_float32: the weight multiplies before the result is rounded to the model's dtype.
        pre_norms, post_norms: norms before a sublayer, and on its output before the residual add.
        parallel: attention and MLP both read the layer's input.
        mlp: which class every layer's MLP is, one of `graftlens.model.forward.MLPS`.
        qk_norm: RMSNorm on queries and keys, per `head` or over the `full` projection.
        rotary_dim: rotated dimensions of each head, 0 with learned positions.
        rope_kinds: per layer, which of the rotary module's tables it uses (None: the only one).
        rope_limit: prompts longer than this have tables of their own (dynamic and longrope
            scaling); None where tables never depend on length.
        attn_scales: per layer, the factor on q·k.
        windows: per layer, how many positions back attention reaches, itself included; None is all.
        embed_scale: factor on the embedding's output.
        qkv_clip: projections are clamped to ±this.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    attn_scales: tuple[float, ...]
    windows: tuple[int | None, ...]
    norm: Literal["layer", "layer_plain", "rms"] = "rms"
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    mlp: MlpKind = "gated"
    qk_norm: Literal["none", "head", "full"] = "none"
    rotary_dim: int = 0
    rope_kinds: tuple[str | None, ...] = ()
    rope_limit: int | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    qkv_clip: float | None = None

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that this architecture has, in the vocabulary's order."""
        return tuple(c for c, row in COMPONENTS.items() if row.present(self))

    def layers_of(self, component: Component) -> tuple[int | None, ...]:
        """The layers that have a component: all, or None for one outside the layers."""
        return tuple(range(self.n_layers)) if COMPONENTS[component].in_layers else (None,)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every component of every layer, in the vocabulary's order."""
        return tuple((c, layer) for c in self.components for layer in self.layers_of(c))

    def n_units_of(self, component: Component) -> int:
        """How many heads or neurons a component's weight can be cut into; 1 where it cannot."""
        match COMPONENTS[component].cut:
            case Cut.NONE:
                return 1
            case Cut.HEAD:
                return self.n_heads
            case Cut.KV_HEAD:
                return self.n_kv_heads
            case Cut.NEURON:
                return self.d_mlp

    def shape_of(self, component: Component, parameter: str = "weight") -> tuple[int, ...]:
        """The shape of a component's weight ([d_out, d_in] of a linear map) or bias."""
        shape = COMPONENTS[component].shape(self)
        return shape if parameter == "weight" else shape[:1]


@dataclass(frozen=True)
class Layout:
    """Where a Hugging Face state dict keeps each component.

    `modules` maps a component to its module's name, with `{l}` for the layer; `transposed` says
    that matrices in layers are kept as [d_in, d_out]. A fused module is named for each of its
    components and cut apart by `fused`.
    """

    modules: Mapping[Component, str]
    transposed: bool = False
    fused: Mapping[Component, "FusedPart"] = field(default_factory=dict)

    def transposes(self, component: Component) -> bool:
        """Whether a component's matrix is kept as [d_in, d_out]: only those in layers ever are."""
        return self.transposed and COMPONENTS[component].in_layers

    def fused_with(self, component: Component) -> tuple[Component, ...]:
        """The components of a fused module, in the order of their parts."""
        module = self.modules[component]
        together = [c for c in self.fused if self.modules[c] == module]
        return tuple(sorted(together, key=lambda c: self.fused[c].index))


@dataclass(frozen=True)
class FusedPart:
    """The rows of a fused projection that belong to one component.

    `how` is `stacked` (q, k, v one below the other; gate above up) or `per_head` (each head's q, k
    and v together, as GPT-NeoX has them).
    """

    how: Literal["stacked", "per_head"]
    index: int


@dataclass(frozen=True)
class Family:
    """One supported `model_type`: how to read its config, where its weights are."""

    read: Callable[[Any], Architecture]
    layout: Layout
    #: config option -> the values that the forward covers; any other is refused
    covered: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


class PairError(ValueError):
    """The sources cannot be grafted together; the message says which differ and how."""


class UnsupportedArchitectureError(ValueError):
    """The checkpoint's family, or one of its options, is not exactly supported."""


class ConfigValueError(UnsupportedArchitectureError):
    """A config's values are not those of any model."""


def _llama_modules(**changes: str) -> dict[Component, str]:
    layer = "model.layers.{l}."
    modules = {
        C.EMBED: "model.embed_tokens",
        C.LN1: layer + "input_layernorm",
        C.Q: layer + "self_attn.q_proj",
        C.K: layer + "self_attn.k_proj",
        C.V: layer + "self_attn.v_proj",
        C.O: layer + "self_attn.o_proj",
        C.Q_NORM: layer + "self_attn.q_norm",
        C.K_NORM: layer + "self_attn.k_norm",
        C.LN2: layer + "post_attention_layernorm",
        C.MLP_IN: layer + "mlp.up_proj",
        C.MLP_GATE: layer + "mlp.gate_proj",
        C.MLP_OUT: layer + "mlp.down_proj",
        C.LN_FINAL: "model.norm",
        C.UNEMBED: "lm_head",
    }
    return modules | {Component(name): layer + module for name, module in changes.items()}


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    """Per layer, the sliding window in positions; layer types decide if a config has them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if kinds is None:
        return (window,) * n_layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedArchitectureError(
                f"layer_types holds {kind!r}; covered are full_attention and sliding_attention."
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """The config's rope parameter sets: one, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _rope_limit(config: Any, settings: Sequence[Mapping[str, Any]]) -> int | None:
    """The length beyond which the tables change with the prompt's length, if they ever do."""
    kinds = {s.get("rope_type", "default") for s in settings}
    if "longrope" in kinds:
        named = [s.get("original_max_position_embeddings") for s in settings]
        return named[0] or getattr(config, "original_max_position_embeddings", 1)
    return config.max_position_embeddings if "dynamic" in kinds else None


def _rotary_facts(config: Any, d_head: int, n_layers: int, per_type: bool) -> dict[str, Any]:
    settings = _rope_settings(config)
    factor = settings[0].get("partial_rotary_factor", 1.0) or 1.0
    kinds = tuple(config.layer_types) if per_type else (None,) * n_layers
    return {
        "rotary_dim": int(d_head * factor),
        "rope_kinds": kinds,
        "rope_limit": _rope_limit(config, settings),
    }


def _power(value: int | float, exponent: float) -> float:
    """NaN, which is refused, where the power is not a real number."""
    return value**exponent if value >= 0 else math.nan


def _decoder(config: Any, **facts: Any) -> Architecture:
    """Llama and its relatives; `facts` says how one differs."""
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return Architecture(
        **{
            "family": config.model_type,
            "n_layers": n_layers,
            "d_model": config.hidden_size,
            "n_heads": n_heads,
            "n_kv_heads": getattr(config, "num_key_value_heads", None) or n_heads,
            "d_head": d_head,
            "d_mlp": config.intermediate_size,
            "d_vocab": config.vocab_size,
            "n_ctx": config.max_position_embeddings,
            "act_fn": getattr(config, "hidden_act", None),
            "eps": getattr(config, "rms_norm_eps", 1e-5),
            "attn_scales": (_power(d_head, -0.5),) * n_layers,
            "windows": _windows(config, n_layers),
        }
        | _rotary_facts(config, d_head, n_layers, per_type=False)
        | facts
    )


def _gemma(config: Any, **facts: Any) -> Architecture:
    return _decoder(
        config,
        **{
            "norm_offset": 1.0,
            "norm_in_float32": True,
            "embed_scale": _power(config.hidden_size, 0.5),
        }
        | facts,
    )


def _gemma2(config: Any, **facts: Any) -> Architecture:
    return _gemma(
        config,
        **{
            "act_fn": config.hidden_activation,
            "post_norms": True,
            "attn_scales": (_power(config.query_pre_attn_scalar, -0.5),) * config.num_hidden_layers,
            "attn_softcap": config.attn_logit_softcapping,
            "logit_softcap": config.final_logit_softcapping,
        }
        | facts,
    )


def _gemma3(config: Any) -> Architecture:
    facts = _rotary_facts(config, config.head_dim, config.num_hidden_layers, per_type=True)
    # Hugging Face's Gemma 3 stores attn_logit_softcapping and never applies it.
    return _gemma2(config, qk_norm="head", attn_softcap=None, **facts)


def _gpt2(config: Any) -> Architecture:
    d_head = config.n_embd // config.n_head
    scale = _power(d_head, -0.5) if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return Architecture(
        family="gpt2",
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        d_head=d_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        d_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        act_fn=config.activation_function,
        eps=config.layer_norm_epsilon,
        attn_scales=tuple(scale / (l + 1 if by_layer else 1) for l in range(config.n_layer)),
        windows=(None,) * config.n_layer,
        norm="layer",
        mlp="plain",
    )


def _gpt_neox(config: Any) -> Architecture:
    return _decoder(
        config,
        norm="layer",
        eps=config.layer_norm_eps,
        mlp="plain",
        parallel=config.use_parallel_residual,
    )


#: Facts -> the keys of configs that they are read from, for messages.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "family": ("model_type",),
    "n_layers": ("num_hidden_layers", "n_layer"),
    "d_model": ("hidden_size", "n_embd"),
    "embed_scale": ("hidden_size",),
    "n_heads": ("num_attention_heads", "n_head"),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "d_head": ("head_dim", "hidden_size", "num_attention_heads", "n_embd", "n_head"),
    "d_mlp": ("intermediate_size", "n_inner", "n_embd"),
    "n_ctx": ("max_position_embeddings", "n_positions"),
    "act_fn": ("hidden_act", "hidden_activation", "activation_function"),
    "eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "attn_scales": (
        *("query_pre_attn_scalar", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        *("head_dim", "hidden_size", "num_attention_heads", "n_embd", "n_head"),
    ),
    "windows": ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    "parallel": ("use_parallel_residual",),
    "rotary_dim": ("rope_parameters", "head_dim", "hidden_size"),
    "attn_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "qkv_clip": ("clip_qkv",),
}


def named_facts(names: Sequence[str], first: Any, second: Any) -> list[str]:
    """Facts in which two configs differ, as their keys with both values; a fact that no key
    explains is left out.

    Args:
        names: the facts.
        first, second: Hugging Face configs, or None.
    """
    found: dict[str, str] = {}
    known = [{} if config is None else config.to_dict() for config in (first, second)]
    for name in names:
        for key in _KEYS.get(name, ()):
            ours, theirs = (settings.get(key) for settings in known)
            if ours != theirs:
                found[key] = f"{key} ({brief(ours)} and {brief(theirs)})"
    return list(found.values())


_NEOX = "gpt_neox.layers.{l}."
_GPT2 = "transformer.h.{l}."
_QKV = (C.Q, C.K, C.V)

_GEMMA2_NORMS = {
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt2,
        Layout(
            {
                C.EMBED: "transformer.wte",
                C.POS_EMBED: "transformer.wpe",
                C.LN1: _GPT2 + "ln_1",
                **dict.fromkeys(_QKV, _GPT2 + "attn.c_attn"),
                C.O: _GPT2 + "attn.c_proj",
                C.LN2: _GPT2 + "ln_2",
                C.MLP_IN: _GPT2 + "mlp.c_fc",
                C.MLP_OUT: _GPT2 + "mlp.c_proj",
                C.LN_FINAL: "transformer.ln_f",
                C.UNEMBED: "lm_head",
            },
            transposed=True,
            fused={c: FusedPart("stacked", i) for i, c in enumerate(_QKV)},
        ),
        {"add_cross_attention": (False, None), "reorder_and_upcast_attn": (False, None)},
    ),
    "gpt_neox": Family(
        _gpt_neox,
        Layout(
            {
                C.EMBED: "gpt_neox.embed_in",
                C.LN1: _NEOX + "input_layernorm",
                **dict.fromkeys(_QKV, _NEOX + "attention.query_key_value"),
                C.O: _NEOX + "attention.dense",
                C.LN2: _NEOX + "post_attention_layernorm",
                C.MLP_IN: _NEOX + "mlp.dense_h_to_4h",
                C.MLP_OUT: _NEOX + "mlp.dense_4h_to_h",
                C.LN_FINAL: "gpt_neox.final_layer_norm",
                C.UNEMBED: "lm_head",
            },
            fused={c: FusedPart("per_head", i) for i, c in enumerate(_QKV)},
        ),
        {"is_decoder": (False, True, None)},
    ),
    "llama": Family(_decoder, Layout(_llama_modules()), {"pretraining_tp": (1, None)}),
    "mistral": Family(_decoder, Layout(_llama_modules())),
    "gemma": Family(
        _gemma, Layout(_llama_modules()), {"use_bidirectional_attention": (False, None)}
    ),
    "gemma2": Family(
        _gemma2,
        Layout(_llama_modules(**_GEMMA2_NORMS)),
        {"use_bidirectional_attention": (False, None)},
    ),
    "gemma3_text": Family(
        _gemma3,
        Layout(_llama_modules(**_GEMMA2_NORMS)),
        {"use_bidirectional_attention": (False, None)},
    ),
    "olmo": Family(
        lambda config: _decoder(config, norm="layer_plain", eps=1e-5, qkv_clip=config.clip_qkv),
        Layout(_llama_modules()),
    ),
    "olmo2": Family(
        lambda config: _decoder(
            config, pre_norms=False, post_norms=True, qk_norm="full", norm_in_float32=True
        ),
        Layout(
            _llama_modules(
                ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm"
            )
        ),
    ),
    "qwen2": Family(_decoder, Layout(_llama_modules())),
    "qwen3": Family(lambda config: _decoder(config, qk_norm="head"), Layout(_llama_modules())),
    "phi3": Family(
        _decoder,
        Layout(
            _llama_modules()
            | dict.fromkeys(_QKV, "model.layers.{l}.self_attn.qkv_proj")
            | dict.fromkeys((C.MLP_GATE, C.MLP_IN), "model.layers.{l}.mlp.gate_up_proj"),
            fused={c: FusedPart("stacked", i) for i, c in enumerate(_QKV)}
            | {c: FusedPart("stacked", i) for i, c in enumerate((C.MLP_GATE, C.MLP_IN))},
        ),
    ),
}


def supported() -> Sequence[str]:
    """The `model_type`s that can be loaded."""
    return tuple(FAMILIES)


def architecture(config: Any) -> Architecture:
    """The facts of a Hugging Face config.

    Raises:
        UnsupportedArchitectureError: a family that is not in the table, or one of its options with
            a value that the forward does not cover.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        refuse_multimodal(kind, config)
        raise UnsupportedArchitectureError(
            f"model_type {kind!r} is not supported. Supported: {' '.join(supported())}. "
            "A family is added by an entry in graftlens/model/arch.py (docs/howto/extending.md)."
        )
    refuse_quantised(config)
    family = FAMILIES[kind]
    everywhere: dict[str, tuple[Any, ...]] = {"is_encoder_decoder": (False, None)}
    for option, values in {**everywhere, **family.covered}.items():
        value = getattr(config, option, None)
        if value not in values:
            raise UnsupportedArchitectureError(
                f"{kind} with {option}={value!r} is not supported: the forward covers "
                f"{option}={' or '.join(repr(v) for v in values if v is not None)}. "
                "graftlens refuses what it cannot run exactly."
            )
    try:
        arch = family.read(config)
    except UnsupportedArchitectureError:
        raise
    except Exception as error:  # each kind of wrong value raises a different exception
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigValueError(f"{kind}: its values do not make a model ({why[:300]})") from error
    if wrong := [name for name in vars(arch) if not _possible(arch, name)]:
        listed = ", ".join(f"{name}={brief(getattr(arch, name))}" for name in wrong)
        raise ConfigValueError(f"{kind} with {listed} is not a model")
    return arch


def _setting(settings: Any, key: str) -> Any:
    """A setting of a config, or of the content of a config's file."""
    if isinstance(settings, Mapping):
        return settings.get(key)
    return getattr(settings, key, None)


def refuse_quantised(config: Any) -> None:
    """Refuse a config, or the content of its file, if it says that its weights are quantised.

    Raises:
        UnsupportedArchitectureError: it does.
    """
    for part in (config, _setting(config, "text_config")):
        for key in ("quantization_config", "compression_config"):
            if found := _setting(part, key):
                if isinstance(found, Mapping) and "quant_method" in found:
                    found = {"quant_method": found["quant_method"]} | dict(found)
                shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:80]}…"
                kind = _setting(config, "model_type")
                raise UnsupportedArchitectureError(
                    f"{kind} with {key}={shown} is not supported: quantised weights cannot be "
                    "grafted exactly. Give the checkpoint that was quantised, or "
                    "one that was dequantised and saved (model.dequantize() in transformers)."
                )


#: Keys of configs of models that read more than text.
_SENSES = (
    *("vision_config", "audio_config", "speech_config", "image_config", "thinker_config"),
    *("vision_tower", "mm_vision_tower", "img_processor", "audio_processor"),
)


def refuse_multimodal(kind: Any, config: Any) -> None:
    """Refuse a config, or the content of its file, of a model that reads more than text.

    Raises:
        UnsupportedArchitectureError: it is one.
    """
    if found := next((key for key in _SENSES if _setting(config, key) is not None), None):
        raise UnsupportedArchitectureError(
            f"model_type {kind!r} is multimodal (its config has {found}). Of such checkpoints only "
            "the text part of Gemma 3 is read. Give a text model, of these families: "
            f"{' '.join(supported())}."
        )


def _is_number(given: Any, least: float = -math.inf) -> bool:
    plain = isinstance(given, int | float) and not isinstance(given, bool)
    return plain and math.isfinite(given) and given >= least


def _possible(arch: Architecture, name: str) -> bool:
    """Whether a model can have this fact."""
    value = getattr(arch, name)
    match name:
        case "n_layers" | "d_model" | "n_heads" | "d_head" | "d_mlp" | "d_vocab" | "n_ctx":
            return isinstance(value, int) and _is_number(value, 1.0)
        case "n_kv_heads":
            return isinstance(value, int) and _is_number(value, 1.0) and arch.n_heads % value == 0
        case "rotary_dim":
            return isinstance(value, int) and 0 <= value <= arch.d_head
        case "rope_limit":
            return value is None or _is_number(value, 1.0)
        case "windows":
            return len(value) == arch.n_layers and all(
                w is None or _is_number(w, 1.0) for w in value
            )
        case "attn_scales":
            return all(_is_number(scale, 0.0) for scale in value)
        case "eps":
            return _is_number(value, 0.0)
        case "embed_scale" | "norm_offset":
            return _is_number(value)
        case "attn_softcap" | "logit_softcap" | "qkv_clip":
            return value is None or _is_number(value, 0.0)
        case "act_fn":
            return isinstance(value, str)
        case _:
            return True


def brief(value: object) -> str:
    """A fact for a message; of what there is per layer, only enough to show what it is."""
    if isinstance(value, tuple | list) and len(value) > 2:
        return f"{value[0]!r}, … over {len(value)} layers"
    return repr(value)
