"""Reading TransformerLens 3.9's `HookedTransformer` as a source."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.model.arch import Architecture, PairError, UnsupportedArchitectureError
from graftlens.model.config import families_of_classes
from graftlens.model.source import Source
from graftlens.model.tokenizers import unaltered
from graftlens.model.weights import Weights

C = Component

#: Config options that the forward does not cover, with the value that turns them off.
_OFF: dict[str, Any] = {
    "attn_only": False,
    "attention_dir": "causal",
    "num_experts": None,
    "post_embedding_ln": False,
    "rotary_adjacent_pairs": False,
    "use_attention_sinks": False,
    "use_dynamic_ntk_rope": False,
    "use_logn_attn": False,
}


class RotaryTables(nn.Module):
    """The cos and sin that each layer of a HookedTransformer keeps, looked up by position."""

    def __init__(self, tables: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.tables = {k: (c.detach().clone(), s.detach().clone()) for k, (c, s) in tables.items()}

    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "batch pos"], kind: str | None = None
    ) -> tuple[Float[Tensor, "batch pos dim"], Float[Tensor, "batch pos dim"]]:
        """cos and sin of one kind at the given positions."""
        cos, sin = self.tables[kind] if kind else next(iter(self.tables.values()))
        index = position_ids.to(cos.device)
        return cos[index].to(x), sin[index].to(x)


def read_hooked(name: str, model: Any) -> Source:
    """Read a `HookedTransformer` whose weights were loaded without processing.

    Gemma's norms are read as HookedTransformer stores them (1 added, embeddings scaled), so a Gemma
    read here pairs with another HookedTransformer, not with a Hugging Face checkpoint.

    Raises:
        PairError: weights that were folded or centred.
        UnsupportedArchitectureError: an option that the forward does not cover.
    """
    cfg = model.cfg
    _refuse_processed(name, model)
    for option, off in _OFF.items():
        value = getattr(cfg, option, off)
        if value != off:
            raise UnsupportedArchitectureError(
                f"source {name!r}: HookedTransformer with {option}={value!r} is not supported; "
                f"the forward covers {option}={off!r}."
            )
    if cfg.final_rms and cfg.normalization_type != "RMS":  # every RMSNorm config says final_rms
        raise UnsupportedArchitectureError(
            f"source {name!r}: HookedTransformer with final_rms=True and normalization_type="
            f"{cfg.normalization_type!r} is not supported; the forward covers one kind of norm."
        )
    kinds, rotary = _rotary(model)
    weights = _weights(model)
    arch = _architecture(cfg, model, kinds, weights)
    if lacking := [site for site in arch.sites if (*site, "weight") not in weights]:
        component, layer = lacking[0]
        raise UnsupportedArchitectureError(
            f"source {name!r}: this HookedTransformer has no {component}"
            f"{'' if layer is None else f' in layer {layer}'}, which its config implies."
        )

    @torch.no_grad()
    def logits(
        tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch pos d_vocab"]:
        # A HookedTransformer casts by its config's dtype, so it runs in its own.
        return model(tokens.to(cfg.device), return_type="logits").to(tokens.device)

    return Source(
        name,
        f"{name} (HookedTransformer)",
        arch,
        weights,
        rotary,
        unaltered(model.tokenizer),
        logits,
    )


def _refuse_processed(name: str, model: Any) -> None:
    """Folding leaves no norm weights; centring leaves means of exactly zero."""
    fix = "Load it with HookedTransformer.from_pretrained_no_processing."
    kind = model.cfg.normalization_type
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise UnsupportedArchitectureError(
            f"source {name!r}: HookedTransformer with normalization_type={kind!r} is not "
            "supported; the forward covers 'LN' and 'RMS'."
        )
    if kind in ("LNPre", "RMSPre") and model.cfg.original_architecture != "OlmoForCausalLM":
        raise PairError(
            f"source {name!r}: normalization_type is {kind!r}, so the norms were folded into the "
            f"weights; grafting needs the raw ones. {fix}"
        )
    attns = [block.attn for block in model.blocks]
    if any(bool(a.b_Q.any()) for a in attns) and not any(bool(a.b_V.any()) for a in attns):
        raise PairError(f"source {name!r}: value biases were folded into b_O. {fix}")
    for what, tensor, axis in (
        ("W_U is centred over the vocabulary", model.unembed.W_U, 1),
        ("W_E is centred over d_model", model.embed.W_E, 1),
    ):
        spread = tensor.float().std()
        if bool((tensor.float().mean(axis).abs() < 1e-5 * spread).all()):
            raise PairError(f"source {name!r}: {what}; grafting needs the raw weights. {fix}")


def _rotary(model: Any) -> tuple[tuple[str | None, ...], RotaryTables | None]:
    if model.cfg.positional_embedding_type == "standard":
        return (), None
    if model.cfg.positional_embedding_type != "rotary":
        raise UnsupportedArchitectureError(
            f"positional_embedding_type={model.cfg.positional_embedding_type!r} is not supported; "
            "the forward covers 'standard' and 'rotary'."
        )
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    kinds: list[str | None] = []
    for block in model.blocks:
        cos, sin = block.attn.rotary_cos, block.attn.rotary_sin
        same = [k for k, (c, s) in tables.items() if torch.equal(cos, c) and torch.equal(sin, s)]
        kind = same[0] if same else f"table {len(tables)}"
        tables[kind] = (cos, sin)
        kinds.append(kind)
    if len(tables) == 1:
        # One table for all layers, as Hugging Face's rotary modules have it.
        return (None,) * len(kinds), RotaryTables(tables)
    return tuple(kinds), RotaryTables(tables)


def _architecture(
    cfg: Any, model: Any, kinds: tuple[str | None, ...], weights: Weights
) -> Architecture:
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    q_norm = weights.get((C.Q_NORM, 0, "weight"))
    qk_norm: Literal["none", "head", "full"] = "none"
    if q_norm is not None:
        qk_norm = "head" if len(q_norm) == cfg.d_head else "full"
    norms: dict[str, Literal["layer", "layer_plain", "rms"]] = {
        "LN": "layer",
        "LNPre": "layer_plain",
        "RMS": "rms",
    }
    after = cfg.original_architecture == "Olmo2ForCausalLM"
    windows = [
        cfg.window_size if cfg.use_local_attn and cfg.attn_types[l] == "local" else None
        for l in range(cfg.n_layers)
    ]

    def cap(value: float | None) -> float | None:
        return value if value is not None and value > 0 else None

    return Architecture(
        family=families_of_classes().get(cfg.original_architecture, "HookedTransformer"),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=n_kv,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        act_fn=cfg.act_fn,
        eps=cfg.eps,
        # sqrt(d_head) there, d_head ** -0.5 elsewhere: rounded alike, so that they compare equal.
        attn_scales=tuple(round(float(b.attn.attn_scale) ** 2, 9) ** -0.5 for b in model.blocks),
        windows=tuple(windows),
        norm=norms[cfg.normalization_type],
        pre_norms=not after,
        post_norms=after or cfg.use_normalization_before_and_after,
        parallel=cfg.parallel_attn_mlp,
        mlp="gated" if cfg.gated_mlp else "plain",
        qk_norm=qk_norm,
        rotary_dim=cfg.rotary_dim if kinds else 0,
        rope_kinds=kinds,
        attn_softcap=cap(cfg.attn_scores_soft_cap),
        logit_softcap=cap(cfg.output_logits_soft_cap),
        qkv_clip=cfg.clip_qkv,
    )


def _weights(model: Any) -> Weights:
    """HookedTransformer's tensors as [d_out, d_in]; biases that are all zero count as absent."""
    cfg = model.cfg
    after = cfg.original_architecture == "Olmo2ForCausalLM"
    found: Weights = {}

    def put(
        component: Component, layer: int | None, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        found[component, layer, "weight"] = weight.detach().clone()
        if bias is not None and bool(bias.any()):
            found[component, layer, "bias"] = bias.detach().flatten().clone()

    def norm(component: Component, layer: int | None, module: Any) -> None:
        if hasattr(module, "w"):
            put(component, layer, module.w)
            if hasattr(module, "b"):
                found[component, layer, "bias"] = module.b.detach().clone()

    def onto_heads(weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).flatten(0, 1)

    put(C.EMBED, None, model.embed.W_E)
    if cfg.positional_embedding_type == "standard":
        put(C.POS_EMBED, None, model.pos_embed.W_pos)
    for layer, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        norm(C.LN1_POST if after else C.LN1, layer, block.ln1)
        norm(C.LN2_POST if after else C.LN2, layer, block.ln2)
        if cfg.use_normalization_before_and_after:
            norm(C.LN1_POST, layer, block.ln1_post)
            norm(C.LN2_POST, layer, block.ln2_post)
        grouped = "_W_K" if hasattr(attn, "_W_K") else "W_K"
        prefix = grouped.removesuffix("W_K")
        put(C.Q, layer, onto_heads(attn.W_Q), attn.b_Q)
        for component, letter in ((C.K, "K"), (C.V, "V")):
            weight = getattr(attn, f"{prefix}W_{letter}")
            put(component, layer, onto_heads(weight), getattr(attn, f"{prefix}b_{letter}"))
        put(C.O, layer, attn.W_O.flatten(0, 1).T, attn.b_O)
        if getattr(attn, "q_norm", None) is not None:
            norm(C.Q_NORM, layer, attn.q_norm)
            norm(C.K_NORM, layer, attn.k_norm)
        if cfg.gated_mlp and bool(mlp.b_in.any()):
            raise UnsupportedArchitectureError(
                f"layer {layer}: HookedTransformer adds a gated MLP's b_in after the gate, Hugging "
                "Face before it. Load the checkpoint itself."
            )
        put(C.MLP_IN, layer, mlp.W_in.T, mlp.b_in)
        put(C.MLP_OUT, layer, mlp.W_out.T, mlp.b_out)
        if cfg.gated_mlp:
            put(C.MLP_GATE, layer, mlp.W_gate.T)
    norm(C.LN_FINAL, None, model.ln_final)
    put(C.UNEMBED, None, model.unembed.W_U.T, model.unembed.b_U)
    return found
