"""What HookedTransformer's users type besides runs and caches: the same as in TransformerLens 3.9.

Every call is made on each source's HookedTransformer, on the grafted model with that source's graft
in force, and (for the base) with none. Under a graft by position it gives a value or is refused
with a reason.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from hookedpairs import EACH_SHAPE, TOKENS, hooked_pair, needs_hooked, same
from torch import Tensor
from transformer_lens import SVDInterpreter, patching

from graftlens.model.arch import architecture
from graftlens.model.config import config_of

pytestmark = [pytest.mark.compat, needs_hooked]

Calls = dict[str, Callable[[Any], Any]]
TEXT = "Anders Lindqvist starred in The Quiet Harbour"
TEXTS = [TEXT[:25], "Robert Okafor acted alongside Siobhan in The Glass River"]
LONG = [" in The Quiet Harbour" * 40, TEXT]


def raised(call: Callable[[], Any], *kinds: type[Exception]) -> bool:
    try:
        call()
    except kinds:
        return True
    return False


def refused(call: Callable[[], Any]) -> str | None:
    """Why a call is refused, if it is."""
    try:
        call()
    except ValueError as refusal:
        return str(refusal)
    return None


# HookedTransformer has no position embeddings with rotary positions, and no OV of grouped heads in
# SVDInterpreter: there, only that ours are refused or right is asked elsewhere.
CIRCUITS: Calls = {
    "QK": lambda m: (m.QK.A, m.QK.B, m.blocks[1].attn.QK.AB),
    "OV": lambda m: (m.OV.AB, m.OV[1, 0].AB, m.blocks[2].attn.OV.AB),
    "spectrum": lambda m: (m.OV.S, m.OV.eigenvalues.abs().sort(-1).values),
    "full OV": lambda m: (m.embed.W_E @ m.OV[0, 1] @ m.unembed.W_U).AB,
    "full QK": lambda m: (m.embed.W_E @ m.QK[0, 0] @ m.embed.W_E.T).AB,
    **{
        f"composition {mode}": lambda m, mode=mode: m.all_composition_scores(mode) for mode in "QKV"
    },
    **{
        f"singular {kind}": lambda m, kind=kind: (
            SVDInterpreter(m).get_singular_vectors(kind, 1, num_vectors=3, head_index=1).abs()
        )
        for kind in ("OV", "w_in", "w_out")
    },
    "singular refusals": lambda m: [
        raised(partial(SVDInterpreter(m).get_singular_vectors, *given), AssertionError)
        for given in (("OV", 0), ("w_in", 99), ("OV", 0, 3, 99))
    ],
    "embeddings": lambda m: m.W_E_pos,
    "directions": lambda m: [
        m.tokens_to_residual_directions(t)
        for t in (5, " in", torch.tensor(5), torch.tensor([5]), torch.tensor([5, 6]), TOKENS)
    ],
    "biases": lambda m: (
        *(m.accumulated_bias(1), m.accumulated_bias(1, mlp_input=True)),
        m.accumulated_bias(3, include_mlp_biases=False),
    ),
    "labels": lambda m: (m.all_head_labels(), m.n_params_total),
    "modules": lambda m: [
        [m.blocks[1].attn.W_Q, m.blocks[1].attn.W_O, m.blocks[1].attn.b_Q, m.blocks[1].attn.b_O],
        [m.blocks[0].mlp.W_in, m.blocks[0].mlp.W_out, m.blocks[0].mlp.b_in, m.blocks[0].mlp.b_out],
        [m.blocks[1].attn.attn_scale, m.blocks[1].attn.layer_id, m.blocks[0].ln1.eps],
        [part.cfg.n_ctx for part in (m.embed, m.unembed, m.blocks[0], m.blocks[0].mlp)],
        [m.embed.W_E, m.unembed.W_U, m.unembed.b_U, m.ln_final.w, m.blocks[2].ln1.w],
    ],
}

CFG = (
    *("relative_attention_max_distance", "relative_attention_num_buckets"),
    *("decoder_start_token_id", "tie_word_embeddings"),
    *("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "act_fn", "d_vocab"),
    *("d_vocab_out", "eps", "use_attn_result", "use_attn_scale", "attn_scale"),
    *("use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "use_local_attn"),
    *("original_architecture", "from_checkpoint", "checkpoint_index", "checkpoint_label_type"),
    *("checkpoint_value", "tokenizer_prepends_bos", "window_size", "attn_types"),
    *("normalization_type", "device", "n_devices", "attention_dir", "attn_only", "seed"),
    *("initializer_range", "init_mode", "scale_attn_by_inverse_layer_idx"),
    *("positional_embedding_type", "final_rms", "parallel_attn_mlp", "rotary_dim", "n_params"),
    *("use_hook_tokens", "gated_mlp", "dtype", "n_key_value_heads", "rotary_base"),
    *("rotary_base_local", "rotary_adjacent_pairs", "post_embedding_ln", "num_experts"),
    *("experts_per_token", "use_NTK_by_parts_rope", "clip_qkv", "load_in_4bit"),
    *("trust_remote_code", "ungroup_grouped_query_attention", "attn_scores_soft_cap"),
    *("output_logits_soft_cap", "use_normalization_before_and_after", "use_qk_norm"),
)

CONFIG: Calls = {
    **{name: lambda m, name=name: getattr(m.cfg, name) for name in CFG},
    "as a dictionary": lambda m: [m.cfg.to_dict()[name] for name in CFG if name != "d_vocab_out"],
    "unwrapped": lambda m: (
        m.cfg.unwrap(m.cfg) is m.cfg,
        *(type(m.cfg).unwrap(m.cfg.to_dict()) == m.cfg, m.cfg.is_layer_norm_activation()),
    ),
    "device": lambda m: (m.cfg.device == "cpu", f"{m.cfg.device}", {"cpu": 1}[m.cfg.device]),
}

TOKENIZING: Calls = {
    **{
        f"tokens {options}": lambda m, options=options: (
            m.to_tokens(TEXT, **options),
            m.to_tokens(TEXTS, **options),
            *([] if options.get("truncate") is False else [m.to_tokens(LONG, **options)]),
        )
        for options in (
            {"prepend_bos": True},
            {"prepend_bos": False, "padding_side": "left"},
            {"padding_side": "right", "move_to_device": False},
            {"padding_side": "left", "truncate": True},
            {"truncate": False},
        )
    },
    "whole": lambda m: m.to_tokens(LONG[0], truncate=False),
    "nothing": lambda m: m.to_tokens("", prepend_bos=True),
    "strings": lambda m: [
        m.to_string(given)
        for given in (
            *(m.to_tokens(TEXT)[0], m.to_tokens(TEXT), [5, 6], [[5, 6], [7, 8]], np.array([5, 6])),
            *(np.array([[5, 6]]), torch.tensor(5), 5, [torch.tensor(5), torch.tensor(6)], []),
        )
    ],
    "string tokens": lambda m: [
        m.to_str_tokens(given, prepend_bos=bos, padding_side=side)
        for bos, side in ((True, "left"), (False, "right"))
        for given in (
            *(TEXT, TEXTS, [TEXT], torch.tensor([5, 6]), torch.tensor([[5, 6]]), torch.tensor(5)),
            *(np.array([5, 6]), np.array(5), np.array([[5, 6]]), [torch.tensor([5, 6])]),
        )
    ],
    "single": lambda m: (
        *(m.to_single_token(" in"), m.to_single_str_token(50)),
        raised(lambda: m.to_single_token(TEXT), AssertionError),
    ),
    "positions": lambda m: (
        *(m.get_token_position(" in", TEXT), m.get_token_position(" in", TEXT, prepend_bos=True)),
        m.get_token_position(" in", TEXT, prepend_bos=False, padding_side="left"),
        m.get_token_position(2, torch.tensor([2.0, 3, 4, 2, 5]), mode="last"),
        m.get_token_position(torch.tensor(3), torch.tensor([[2, 3, 3]])),
        m.get_token_position(m.tokenizer.bos_token_id, TEXT, prepend_bos=True),
        raised(lambda: m.get_token_position(" in", "Robert", prepend_bos=False), AssertionError),
        raised(lambda: m.get_token_position(5, TOKENS), AssertionError),
        raised(lambda: m.get_token_position(2, torch.tensor([2]), mode="middle"), ValueError),
    ),
}


def halve(value: Tensor, hook: Any) -> Tensor:
    return 0.5 * value


def cut_head(value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, :, 1] *= 0.3
    return value


class Counted:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, value: Tensor, hook: Any) -> None:
        self.count += 1


def first(name: str) -> bool:
    return name == "hook_embed"


def _attached(m: Any) -> int:
    return len(m.hook_dict["hook_embed"].fwd_hooks)


def nested(m: Any) -> Any:
    counted, seen = Counted(), []
    m.add_perma_hook(first, counted)
    with m.hooks(fwd_hooks=[(first, counted)]):
        seen.append(_attached(m))
        with m.hooks(fwd_hooks=[("hook_embed", counted)]):
            m(TOKENS)
            seen.append(_attached(m))
        m.run_with_cache(TOKENS)
        seen += [_attached(m), counted.count]
        m.reset_hooks()
        seen.append(_attached(m))
    m.remove_all_hook_fns()
    seen.append(_attached(m))
    m.remove_all_hook_fns(including_permanent=True)
    return [*seen, _attached(m)]


def failing(m: Any) -> Any:
    def fail(value: Tensor, hook: Any) -> None:
        raise LookupError("a hook's own")

    failed = raised(lambda: m.run_with_hooks(TOKENS, fwd_hooks=[(first, fail)]), LookupError)
    return failed, _attached(m)


def ordered(m: Any) -> Any:
    out = []
    for zero, prepend in ((0, True), (0, False), (1, True), (1, False)):
        for index in range(2):
            hook = torch.zeros_like if index == zero else torch.ones_like
            m.add_hook(
                "blocks.0.hook_resid_post", lambda x, hook, f=hook: f(x) + x / 9, prepend=prepend
            )
        out.append(m(TOKENS))
        m.reset_hooks()
    return out


def in_place(m: Any) -> Tensor:
    def cut(value: Tensor, hook: Any) -> Tensor:
        value[:, 1] = 0.0
        return value

    return m.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", cut), (first, cut)])


def flagged(m: Any) -> Any:
    out = []
    flags = {
        "use_attn_result": "blocks.0.attn.hook_result",
        "use_split_qkv_input": "blocks.0.hook_k_input",
        "use_hook_mlp_in": "blocks.0.hook_mlp_in",
    }
    if m.cfg.n_key_value_heads is None:
        flags["use_attn_in"] = "blocks.0.hook_attn_in"
    for flag, name in flags.items():
        out.append(raised(partial(m.add_hook, name, halve), AssertionError))
        getattr(m, f"set_{flag}")(True)
        m.add_hook(name, halve)
        out.append(m(TOKENS))
        m.reset_hooks()
        out.append(dict(m.run_with_cache(TOKENS, names_filter=name)[1].cache_dict))
        getattr(m, f"set_{flag}")(False)
    return out


def ungrouped(m: Any) -> Any:
    """Each query head's own keys and values, seen and changed alone."""
    out = []
    m.set_ungroup_grouped_query_attention(True)
    for split, ends in ((False, ("hook_k", "hook_v")), (True, ("_input", "hook_k"))):
        m.set_use_split_qkv_input(split)
        names = [name for name in m.hook_dict if name.endswith(ends)]
        out.append(dict(m.run_with_cache(TOKENS, names_filter=names)[1].items()))
        for name in ("attn.hook_v", *(["hook_k_input"] if split else [])):
            out.append(m.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.{name}", cut_head)]))
    m.set_use_split_qkv_input(False)
    m.set_ungroup_grouped_query_attention(False)
    return out


def backward(m: Any) -> Any:
    counted = Counted()

    def bare(gradient: Tensor, hook: Any) -> Any:
        counted.count += 1
        return gradient

    m.requires_grad_(True)
    hooks = [("blocks.0.hook_resid_post", bare), ("blocks.1.hook_mlp_out", counted)]
    with torch.enable_grad(), m.hooks(bwd_hooks=hooks):
        m(TOKENS).sum().backward()
    m.zero_grad()
    m.requires_grad_(False)
    return counted.count


def cached(m: Any) -> Any:
    some: dict[str, Tensor] = {}
    more = m.add_caching_hooks("blocks.0.hook_resid_post")
    m.cache_some(some, first)
    m(TOKENS)
    m.reset_hooks()
    return dict(more), some


#: Hooks of all kinds whose value is halved; the shapes lack some of them.
HALVED = (
    *("hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid"),
    *("blocks.1.hook_resid_post", "blocks.1.attn.hook_q", "blocks.1.attn.hook_v"),
    *("blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_attn_scores"),
    *("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"),
    *("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_pre_linear", "blocks.1.mlp.hook_post"),
    *("blocks.1.hook_mlp_out", "blocks.1.ln1.hook_scale", "blocks.1.ln2.hook_normalized"),
    *("ln_final.hook_scale", "ln_final.hook_normalized"),
)


def halved(m: Any) -> dict[str, Tensor]:
    names = [name for name in HALVED if name in m.hook_dict]
    return {name: m.run_with_hooks(TOKENS, fwd_hooks=[(name, halve)]) for name in names}


HOOKS: Calls = {
    **{call.__name__: call for call in (nested, failing, ordered, in_place, flagged, backward)},
    "ungrouped": ungrouped,
    **{call.__name__: call for call in (cached, halved)},
    "contexts": lambda m: (
        m.run_with_hooks(TOKENS, fwd_hooks=[(first, lambda x, hook: hook.ctx.update(seen=1))]),
        *(dict(m.hook_dict["hook_embed"].ctx), m.blocks[1].attn.hook_q.layer(), m.reset_hooks()),
    ),
    "modules": lambda m: [name in m.mod_dict for name in ("blocks.0.attn", "ln_final", "embed")],
}


def _patched(m: Any, name: str) -> Tensor:
    _, cache = m.run_with_cache(TOKENS[1:, :4])
    return torch.as_tensor(
        getattr(patching, name)(m, TOKENS[:1, :4], cache, lambda x: x[0, -1, 17])
    )


PATCHING: Calls = {
    name: lambda m, name=f"get_act_patch_{name}": _patched(m, name)
    for name in (
        *("resid_pre", "block_every", "attn_head_v_by_pos", "attn_head_pattern_all_pos"),
        "attn_head_all_pos_every",
    )
}

GROUPS = {
    "circuits": CIRCUITS,
    "config": CONFIG,
    "tokenizing": TOKENIZING,
    "hooks": HOOKS,
    "patching": PATCHING,
}

#: What HookedTransformer has not: position embeddings beside rotary ones, a matrix of its own for
#: each query head that `SVDInterpreter` could read.
LACKING = {("llama", "embeddings"), ("neox-parallel", "embeddings"), ("llama", "singular OV")}


@pytest.mark.filterwarnings("ignore:of .* tokens, the .* are kept")
@EACH_SHAPE
@pytest.mark.parametrize("group", GROUPS)
@torch.no_grad()
def test_calls_give_what_hookedtransformer_gives(variant: str, group: str) -> None:
    pair = hooked_pair(variant)
    pair.model.cfg.default_prepend_bos = False
    for name, call in GROUPS[group].items():
        if (variant, name) in LACKING:
            continue
        for source, hooked in pair.hooked.items():
            theirs = call(hooked)
            with pair.model.grafted(f"{source} @ all"):
                same(call(pair.model), theirs, f"{name} of {source}", 1e-4)
            if source == "pre":
                same(call(pair.model), theirs, f"{name} without a graft", 1e-4)
        with pair.model.grafted("sft @ last"):
            refusal = refused(lambda: call(pair.model))  # noqa: B023
        # Only weights have no single answer.
        told = r"no single (weight|bias) .* as in model\.\w+\["
        assert refusal is None or (group == "circuits" and re.search(told, refusal)), name


@EACH_SHAPE
def test_lists_of_hooks_end_alike(variant: str) -> None:
    pair = hooked_pair(variant)
    assert sorted(pair.model.hook_dict) == sorted(pair.hooked["pre"].hook_dict)


@pytest.mark.parametrize("variant", ["neox-parallel", "llama", "qwen2", "llama3-rope-tied", "phi3"])
def test_configs_are_those_that_transformerlens_makes(variant: str, tmp_path: Path) -> None:
    """From the same config.json, by TransformerLens's own table of architectures."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    config = tiny_model(variant, 1).config
    config.save_pretrained(tmp_path)
    theirs = HookedTransformerConfig(**convert_hf_model_config(str(tmp_path)), device="cpu")
    ours = config_of(architecture(config), ("pre",), "", torch.zeros(1), config, None)
    # It reads NeoX's base where transformers 5 no longer has it, and says LN of Phi-3's last norm.
    beside = {"neox-parallel": {"rotary_base"}, "phi3": {"final_rms"}}.get(variant, set())
    beside |= {"init_weights", "tokenizer_prepends_bos"}
    for name in set(CFG) - beside:
        same(getattr(ours, name), getattr(theirs, name), name)
