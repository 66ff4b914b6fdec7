"""A model's settings under HookedTransformer's names, for code that reads a model's `cfg`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlens.model.arch import Architecture, supported


class Device(str):
    """A device as HookedTransformer's config has it, a text; it also equals a `torch.device`."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other) if isinstance(other, torch.device) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    @property
    def type(self) -> str:
        """What kind of device it is, such as "cuda"."""
        return torch.device(self).type


@dataclass
class GraftedConfig:
    """The architecture under HookedTransformer's names, and the flags that turn costly hooks on.

    `n_params` counts as there: the matrices of attention and MLPs. `rotary_base` is None where the
    sources do not say it. Of the fields that HookedTransformer sets when it builds a model from
    nothing (`init_weights`, `seed`, …), and of options that no supported architecture has
    (`num_experts`, …), the values are those of a loaded one.
    """

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int | None
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    normalization_type: Literal["LN", "LNPre", "RMS"]
    positional_embedding_type: Literal["standard", "rotary"]
    parallel_attn_mlp: bool
    gated_mlp: bool
    use_normalization_before_and_after: bool
    use_qk_norm: bool
    attn_scores_soft_cap: float
    output_logits_soft_cap: float
    rotary_dim: int | None
    dtype: torch.dtype
    device: Device
    sources: tuple[str, ...]
    original_architecture: str | None
    n_params: int
    use_attn_scale: bool
    attn_scale: float
    scale_attn_by_inverse_layer_idx: bool
    use_local_attn: bool
    window_size: int | None
    attn_types: list[str] | None
    rotary_base: int | float | None
    rotary_base_local: int | float | None
    use_NTK_by_parts_rope: bool  # noqa: N815
    clip_qkv: float | None
    initializer_range: float
    final_rms: bool
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False
    attn_only: bool = False
    attention_dir: str = "causal"
    ungroup_grouped_query_attention: bool = False
    rotary_adjacent_pairs: bool = False
    post_embedding_ln: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False  # as there: `embed` and `unembed` are two parts
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    init_mode: str = "gpt2"
    init_weights: bool = False
    seed: int | None = None
    n_devices: int = 1
    #: Whether texts get a BOS token; None leaves it to the tokenizer. May be set at any time.
    default_prepend_bos: bool | None = None
    #: Whether the tokenizer puts a BOS token first by itself; None without a tokenizer.
    tokenizer_prepends_bos: bool | None = None
    tokenizer_name: str | None = None

    @property
    def d_vocab_out(self) -> int:
        """Entries of the output vocabulary."""
        return self.d_vocab

    def to_dict(self) -> dict[str, Any]:
        """All settings as a dictionary, from which `unwrap` makes the config again."""
        return {**asdict(self), "d_vocab_out": self.d_vocab_out}

    @classmethod
    def unwrap(cls, config: "Mapping[str, Any] | GraftedConfig") -> "GraftedConfig":
        """A config as it is, or the one whose settings a dictionary holds."""
        return config if isinstance(config, GraftedConfig) else cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GraftedConfig":
        """The config whose settings a dictionary holds; others are passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in known})

    def is_layer_norm_activation(self) -> bool:
        """Whether the non-linearity has a norm of its own: no supported architecture's has."""
        return False

    def reads(self, tokenizer: Any) -> None:
        """Take over what the config says of a tokenizer."""
        self.tokenizer_name = getattr(tokenizer, "name_or_path", None)
        self.tokenizer_prepends_bos = None if tokenizer is None else _prepends_bos(tokenizer)


def config_of(
    arch: Architecture,
    sources: tuple[str, ...],
    name: str,
    sample: Tensor,
    hf_config: Any,
    rotary: nn.Module | None,
) -> GraftedConfig:
    """The config of a model; `sample` is one of its tensors, `hf_config` None if it was not loaded
    from Hugging Face."""
    scales, layers = arch.attn_scales, range(1, arch.n_layers + 1)
    by_layer = len(set(scales)) > 1 and scales == tuple(scales[0] / layer for layer in layers)
    divisor = arch.d_head**0.5 if scales[0] == arch.d_head**-0.5 else 1 / scales[0]
    rope = getattr(hf_config, "rope_parameters", None) or {}
    matrices = 2 * arch.d_model * arch.d_head * (arch.n_heads + arch.n_heads)
    matrices += arch.d_model * arch.d_mlp * (3 if arch.mlp == "gated" else 2)
    reach = {window for window in arch.windows if window is not None}
    norms: dict[str, Literal["LN", "LNPre", "RMS"]] = {
        "layer": "LN",
        "layer_plain": "LNPre",
        "rms": "RMS",
    }
    return GraftedConfig(
        model_name=name,
        n_layers=arch.n_layers,
        d_model=arch.d_model,
        n_heads=arch.n_heads,
        n_key_value_heads=None if arch.n_kv_heads == arch.n_heads else arch.n_kv_heads,
        d_head=arch.d_head,
        d_mlp=arch.d_mlp,
        d_vocab=arch.d_vocab,
        n_ctx=arch.n_ctx,
        act_fn=arch.act_fn,
        eps=arch.eps,
        normalization_type=norms[arch.norm],
        positional_embedding_type="rotary" if arch.rotary_dim else "standard",
        parallel_attn_mlp=arch.parallel,
        gated_mlp=arch.mlp == "gated",
        use_normalization_before_and_after=arch.pre_norms and arch.post_norms,
        use_qk_norm=arch.qk_norm != "none",
        attn_scores_soft_cap=arch.attn_softcap or -1.0,
        output_logits_soft_cap=arch.logit_softcap or -1.0,
        rotary_dim=arch.rotary_dim or None,
        dtype=sample.dtype,
        device=Device(sample.device),
        sources=sources,
        original_architecture=_class_of(arch, hf_config),
        n_params=arch.n_layers * matrices,
        use_attn_scale=divisor != 1,
        attn_scale=divisor if divisor != 1 else -1.0,
        scale_attn_by_inverse_layer_idx=by_layer
        or bool(getattr(hf_config, "scale_attn_by_inverse_layer_idx", False)),
        use_local_attn=bool(reach),
        window_size=max(reach, default=None),
        attn_types=["local" if w else "global" for w in arch.windows] if reach else None,
        rotary_base=_rotary_base(arch, rope, None if hf_config is not None else rotary),
        rotary_base_local=_theta(rope.get("sliding_attention", {})),
        use_NTK_by_parts_rope=rope.get("rope_type") == "llama3",
        clip_qkv=arch.qkv_clip,
        # What HookedTransformer's loader has: for some families the checkpoint's.
        initializer_range=0.8 / arch.d_model**0.5
        if arch.family in ("gpt2", "gpt_neox", "llama", "mistral")
        else getattr(hf_config, "initializer_range", 0.02),
        final_rms=arch.norm == "rms",
    )


def families_of_classes() -> dict[str, str]:
    """Hugging Face's class of a causal language model -> the family that reads it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {names[family]: family for family in supported() if family in names}


def _class_of(arch: Architecture, hf_config: Any) -> str | None:
    """The Hugging Face class that a checkpoint is of."""
    if named := getattr(hf_config, "architectures", None):
        return str(named[0])
    return next(
        (name for name, family in families_of_classes().items() if family == arch.family), None
    )


def _theta(settings: Mapping[str, Any]) -> int | float | None:
    theta = settings.get("rope_theta")
    return int(theta) if theta is not None and theta == int(theta) else theta


def _rotary_base(
    arch: Architecture, rope: Mapping[str, Any], rotary: nn.Module | None
) -> int | float | None:
    """θ of the rotary embedding: as the settings have it (of several kinds, that of the layers that
    see everything), else as the second angle of the tables has it; 10,000, HookedTransformer's
    default, where positions are learned."""
    if not arch.rotary_dim:
        return 10000
    if rotary is None or arch.rotary_dim == 2:
        return _theta(rope.get("full_attention", rope))
    kind = () if arch.rope_kinds[-1] is None else (arch.rope_kinds[-1],)
    first = torch.ones(1, 1, dtype=torch.long)
    cos, sin = (t.double() for t in rotary(torch.zeros(1, dtype=torch.float64), first, *kind))
    theta = float(torch.atan2(sin, cos)[0, 0, 1]) ** (-arch.rotary_dim / 2)
    return _theta({"rope_theta": float(f"{theta:.3g}")})


def _prepends_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
