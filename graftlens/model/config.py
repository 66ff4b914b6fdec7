"""A model's settings under HookedTransformer's names, for code that reads a model's `cfg`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graftlens.model.arch import Architecture


@dataclass
class GraftedConfig:
    """The architecture under HookedTransformer's names, and the flags that turn costly hooks on."""

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
    normalization_type: Literal["LN", "RMS"]
    positional_embedding_type: Literal["standard", "rotary"]
    parallel_attn_mlp: bool
    gated_mlp: bool
    use_normalization_before_and_after: bool
    use_qk_norm: bool
    attn_scores_soft_cap: float
    output_logits_soft_cap: float
    rotary_dim: int | None
    dtype: torch.dtype
    device: torch.device
    sources: tuple[str, ...]
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    attn_only: bool = False
    final_rms: bool = False
    attention_dir: str = "causal"
    ungroup_grouped_query_attention: bool = False
    #: Whether texts get a BOS token; None leaves it to the tokenizer. May be set at any time.
    default_prepend_bos: bool | None = None
    tokenizer_name: str | None = None

    @property
    def d_vocab_out(self) -> int:
        """Entries of the output vocabulary."""
        return self.d_vocab

    def to_dict(self) -> dict[str, Any]:
        """All settings as a dictionary."""
        return asdict(self)


def config_of(
    arch: Architecture, sources: tuple[str, ...], name: str, sample: Tensor, tokenizer: Any
) -> GraftedConfig:
    """The config of a model; `sample` is one of its tensors."""
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
        normalization_type="RMS" if arch.norm == "rms" else "LN",
        positional_embedding_type="rotary" if arch.rotary_dim else "standard",
        parallel_attn_mlp=arch.parallel,
        gated_mlp=arch.mlp == "gated",
        use_normalization_before_and_after=arch.pre_norms and arch.post_norms,
        use_qk_norm=arch.qk_norm != "none",
        attn_scores_soft_cap=arch.attn_softcap or -1.0,
        output_logits_soft_cap=arch.logit_softcap or -1.0,
        rotary_dim=arch.rotary_dim or None,
        dtype=sample.dtype,
        device=sample.device,
        sources=sources,
        tokenizer_name=getattr(tokenizer, "name_or_path", None),
    )
