"""What is computed from weights alone, and how TransformerLens's own functions read them.

The oracles are formulas over the checkpoints' matrices; `test_compat_surface.py` compares the same
calls with TransformerLens 3.9's HookedTransformer.
"""

import copy
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformer_lens
from conftest import MakeTiny, Tiny
from torch import Tensor
from transformer_lens import SVDInterpreter, patching

SHAPES = ("gpt2", "llama", "neox-parallel", "gemma2")
EACH = pytest.mark.parametrize("variant", SHAPES)
TOKENS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(4))

needs_4 = pytest.mark.skipif(
    "HookedTransformer" in dir(transformer_lens), reason="the functions of TransformerLens 4"
)


def per_head(t: Tiny, name: str, source: str) -> Tensor:
    """W_Q, W_K, W_V or W_O of a source, [layer, query head, …], from the stacked views' rows."""
    weight = getattr(t.model, name)[t.model.sources.index(source)]
    return weight.repeat_interleave(t.model.arch.n_heads // weight.shape[1], dim=1)


@EACH
def test_circuits_are_products_of_the_weights_in_force(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    for source in t.sources:
        w_q, w_k, w_v, w_o = (per_head(t, f"W_{letter}", source) for letter in "QKVO")
        with t.model.grafted(f"{source} @ all"):
            qk, ov, attn = t.model.QK, t.model.OV, t.model.blocks[1].attn
            torch.testing.assert_close(qk.AB, w_q @ w_k.mT)
            torch.testing.assert_close(ov.AB, w_v @ w_o)
            torch.testing.assert_close(attn.QK.AB, qk.AB[1])
            torch.testing.assert_close(attn.OV.AB, ov.AB[1])
            # The trace of a matrix is the sum of its eigenvalues.
            traces = ov.AB.diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close(ov.eigenvalues.sum(-1).real, traces, atol=1e-4, rtol=1e-4)
            if variant == "gpt2":
                both = torch.cat([t.model.embed.W_E, t.model.pos_embed.W_pos])
                assert torch.equal(t.model.W_E_pos, both)
    assert torch.equal(t.model.QK.A, per_head(t, "W_Q", "pre"))  # without a graft, the base


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_composition_scores_are_norms_of_products(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    with t.model.grafted("sft @ all"):
        ov, qk = t.model.OV.AB, t.model.QK.AB
        for mode, reads in (("Q", qk), ("K", qk.mT), ("V", ov)):
            scores = t.model.all_composition_scores(mode)
            n_layers, n_heads = ov.shape[:2]
            assert scores.shape == (n_layers, n_heads, n_layers, n_heads)
            for first, head, then, other in ((0, 0, 1, 1), (0, 1, 2, 0), (1, 1, 2, 1)):
                a, b = ov[first, head], reads[then, other]
                wanted = (a @ b).norm() / a.norm() / b.norm()
                torch.testing.assert_close(scores[first, head, then, other], wanted)
            assert not scores[1, :, :2].any()
    with pytest.raises(ValueError, match=r"mode='q'. Allowed: .Q., .K. or .V."):
        t.model.all_composition_scores("q")
    assert t.model.all_head_labels()[:2] == ["L0H0", "L0H1"]


def test_circuits_without_a_single_answer_are_refused(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    asked: dict[str, Callable[[], Any]] = {
        "W_Q[source, layer]": lambda: model.QK,
        "W_O[source, layer]": lambda: model.blocks[1].attn.W_O,
        "b_O[source, layer]": lambda: model.blocks[1].attn.b_O,
        "W_V[source, layer]": lambda: model.all_composition_scores("V"),
        "W_E[source]": lambda: model.W_E_pos,
        "W_U[source]": lambda: model.tl_parameters()["unembed.W_U"],
        "blocks[1].ln1.weight[source]": lambda: model.blocks[1].ln1.w,
        "blocks[1].ln1.bias[source]": lambda: model.blocks[1].ln1.b,
        "ln_final.weight[source]": lambda: model.ln_final.w,
    }
    with model.grafted("sft @ last"):
        for way, ask in asked.items():
            with pytest.raises(ValueError, match=re.escape(f"as in model.{way}; or")):
                ask()
    for way in asked:  # what is named can be written
        eval(f"model.{way}", {"model": model, "source": 1, "layer": 1})
    assert model.n_params_total  # a number, whatever is in force


def test_rotary_models_have_no_position_embedding_to_append(tiny: MakeTiny) -> None:
    with pytest.raises(AttributeError, match="llama has no pos_embed, so no W_E_pos"):
        _ = tiny("llama").model.W_E_pos


@EACH
def test_parameters_under_hookedtransformers_names(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    arch = t.model.arch
    with t.model.grafted("sft @ all"):
        named = t.model.tl_parameters()
        w_o = t.model.blocks[1].attn.W_O.clone()
    # They are of the graft that was in force when they were asked for.
    assert torch.equal(named["blocks.1.attn.W_O"], w_o)
    assert named["blocks.1.attn.W_V"].shape == (arch.n_heads, arch.d_model, arch.d_head)
    assert set(named) == {name for name, _ in named.items()}
    assert "ln_final.w" in named
    assert "blocks.9.attn.W_O" not in named
    with pytest.raises(KeyError):
        named["blocks.0.attn.hook_q"]
    hf = t.sources["sft"]
    scale = arch.embed_scale
    torch.testing.assert_close(named["embed.W_E"], hf.get_input_embeddings().weight * scale)
    norm = hf.get_decoder().norm.weight if variant in ("llama", "gemma2") else None
    if norm is not None:
        torch.testing.assert_close(named["ln_final.w"], norm + arch.norm_offset)
    counted = sum(value.numel() for value in t.model.tl_parameters().values())
    repeated = sum(
        t.model.tl_parameters()[name].numel() * (1 - arch.n_kv_heads / arch.n_heads)
        for name in named
        if name.endswith(("_K", "_V"))
    )
    assert t.model.n_params_total == counted - repeated


@EACH
def test_singular_vectors_are_those_of_the_weights_in_force(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    for source in t.sources:
        with t.model.grafted(f"{source} @ all"):
            svd = SVDInterpreter(t.model)
            w_u = t.model.unembed.W_U
            block = t.model.blocks[1]
            norm = block.ln2.w + t.model.arch.norm_offset
            matrices = {
                "OV": block.attn.OV.AB[1],
                "w_in": block.mlp.W_in.T * norm,
                "w_out": block.mlp.W_out,
            }
        for kind, matrix in matrices.items():
            found = svd.get_singular_vectors(kind, layer_index=1, num_vectors=2, head_index=1)
            right = torch.linalg.svd(matrix)[2][:2]
            wanted = (w_u.T @ right.T).abs()
            torch.testing.assert_close(found[:, 0].abs(), wanted, atol=1e-4, rtol=1e-3)


def test_weights_are_never_processed(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    for name in (
        *("process_weights_", "load_and_process_state_dict", "fold_layer_norm"),
        *("fold_value_biases", "center_writing_weights", "center_unembed"),
        "refactor_factored_attn_matrices",
    ):
        with pytest.raises(ValueError, match=f"{name}: grafting needs every source's raw weights"):
            getattr(model, name)({})


def test_the_config_has_hookedtransformers_fields(tiny: MakeTiny) -> None:
    t = tiny("gpt2-scaled-by-layer", tokenizer="gpt2")
    cfg, hf = t.model.cfg, t.sources["pre"].config
    assert cfg.device == "cpu"
    assert cfg.device == torch.device("cpu")
    assert cfg.device != "cuda"
    assert (cfg.device.type, {cfg.device: 1}["cpu"]) == ("cpu", 1)
    assert cfg.scale_attn_by_inverse_layer_idx
    assert cfg.use_attn_scale
    assert cfg.attn_scale == pytest.approx((hf.n_embd // hf.n_head) ** 0.5)
    assert (cfg.original_architecture, cfg.from_checkpoint, cfg.n_devices, cfg.seed) == (
        *("GPT2LMHeadModel", False, 1, None),
    )
    assert (cfg.use_local_attn, cfg.window_size, cfg.attn_types) == (False, None, None)
    layer = 4 * hf.n_embd**2 + 2 * hf.n_embd * cfg.d_mlp
    assert cfg.n_params == hf.n_layer * layer
    assert cfg.tokenizer_prepends_bos is False
    assert tiny("gpt2").model.cfg.tokenizer_name is None
    assert type(cfg).unwrap(cfg) is cfg
    again = type(cfg).unwrap(cfg.to_dict())
    assert again == cfg
    assert again is not cfg
    assert cfg.to_dict()["d_vocab_out"] == cfg.d_vocab
    local = tiny("gemma3").model.cfg
    windows = tiny("gemma3").model.arch.windows
    assert local.attn_types == ["local" if w else "global" for w in windows]
    assert local.window_size == max(w for w in windows if w)
    assert local.use_local_attn
    assert tiny("llama").model.cfg.rotary_base == 50
    assert cfg.from_dict({**cfg.to_dict(), "other": 1}) == cfg
    assert not cfg.is_layer_norm_activation()
    assert tiny("olmo-clip").model.cfg.clip_qkv == 0.8
    assert tiny("gemma3").model.cfg.rotary_base_local is not None
    assert tiny("gpt2-no-scale").model.cfg.attn_scale == -1
    assert cfg.rotary_base == 10000


def test_tokenizers_can_be_set_and_the_config_follows(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    assert t.model.cfg.tokenizer_prepends_bos
    with pytest.raises(ValueError, match="list is not a tokenizer"):
        t.model.set_tokenizer([])
    with pytest.raises(ValueError, match='Allowed: "left" or "right"'):
        t.model.set_tokenizer(t.tokenizer, default_padding_side="middle")
    t.model.set_tokenizer(t.tokenizer, default_padding_side="left")
    assert t.model.tokenizer.padding_side == "left"
    assert t.model.tokenizer is not t.tokenizer
    t.model.tokenizer = None
    assert t.model.cfg.tokenizer_prepends_bos is None


def test_tokens_are_cut_to_the_context_with_a_warning(tiny: MakeTiny) -> None:
    t = tiny("gpt2", tokenizer="gpt2")
    limit = t.model.cfg.n_ctx
    texts = ["The Quiet Harbour " * limit, "Anders Lindqvist"]
    whole = [t.tokenizer(text)["input_ids"] for text in texts]
    for side, place in (
        ("right", slice(None, len(whole[1]))),
        ("left", slice(-len(whole[1]), None)),
    ):
        with pytest.warns(UserWarning, match=rf"the {limit} that the model's context holds"):
            tokens = t.model.to_tokens(texts, padding_side=side)
        assert tokens.shape == (2, limit)
        assert tokens[0].tolist() == whole[0][:limit]
        assert tokens[1, place].tolist() == whole[1]
    kept = t.model.to_tokens(texts[0], truncate=False, move_to_device=False)
    assert kept[0].tolist() == whole[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.model.to_tokens(texts[1])


def test_positions_of_tokens(tiny: MakeTiny) -> None:
    t = tiny("gpt2", tokenizer="gpt2")
    text = "Anders in The Quiet in The"
    ids = t.tokenizer(text)["input_ids"]
    wanted = t.model.to_single_token(" in")
    assert t.model.get_token_position(" in", text) == ids.index(wanted)
    assert t.model.get_token_position(wanted, torch.tensor([ids]), mode="last") == (
        len(ids) - 1 - ids[::-1].index(wanted)
    )
    assert t.model.get_token_position(torch.tensor(4), torch.tensor([2.0, 4, 4])) == 1
    for error, call in (
        ("The token does not occur", lambda: t.model.get_token_position(3, torch.tensor([2]))),
        ("2 prompts", lambda: t.model.get_token_position(3, torch.tensor([[3], [3]]))),
        ("not one", lambda: t.model.to_single_token(text)),
    ):
        with pytest.raises(AssertionError, match=error) as caught:
            call()
        assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="mode='middle'"):
        t.model.get_token_position(3, torch.tensor([3]), mode="middle")


def test_token_ids_of_any_kind_are_read_as_text(tiny: MakeTiny) -> None:
    t = tiny("gpt2", tokenizer="gpt2")
    one, two = (t.tokenizer.decode([i]) for i in (40, 41))
    ids = torch.tensor([40, 41])
    for given in (ids, ids.numpy(), [40, 41], [torch.tensor(40), torch.tensor(41)]):
        assert t.model.to_string(given) == one + two
    for given in (ids[None], ids[None].numpy(), [[40, 41]], [ids]):
        assert t.model.to_string(given) == [one + two]
    assert t.model.to_string(torch.tensor(40)) == t.model.to_string(40) == one
    for given in (ids, ids[None], ids.numpy()):
        assert t.model.to_str_tokens(given, padding_side="left") == [one, two]
    assert t.model.to_str_tokens([ids, ids[:1]]) == [[one, two], [one]]
    assert t.model.to_str_tokens(torch.tensor(40)) == [one]
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 1, 2\)"):
        t.model.to_string(ids[None, None])


# -- TransformerLens 4's own functions -------------------------------------------------------------


@needs_4
@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "neox-parallel"])
def test_the_logit_lens_of_transformerlens_reads_the_weights_in_force(
    tiny: MakeTiny, variant: str
) -> None:
    from transformer_lens.tools.analysis import logit_lens, logit_readout

    t = tiny(variant)
    logits, cache = t.model.run_with_cache(TOKENS, graft="sft @ all")
    wanted = cache.logit_lens()
    # From a cache, outside the graft; from the model, inside it; and of the stream alone.
    found = logit_lens(cache, positions=None)
    torch.testing.assert_close(found.values, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.values[-1], logits, atol=1e-4, rtol=1e-4)
    with t.model.grafted("sft @ all"):
        found = logit_lens(t.model, TOKENS, positions=None, targets=TOKENS)
        read = logit_readout(t.model, cache["resid_post", -1], top_k=3)
    # Two ways to the same logits differ by rounding, and so may ranks of tokens that nearly tie.
    own = wanted.gather(-1, TOKENS.expand(len(wanted), -1, -1)[..., None])
    least, most = (wanted > own + 1e-5).sum(-1), (wanted > own - 1e-5).sum(-1) - 1
    ranks = found.rank_trajectory()
    assert bool(((least <= ranks) & (ranks <= most)).all())
    assert int((least < most).sum()) <= 2
    torch.testing.assert_close(logits.gather(-1, read.top_ids), logits.topk(3).values)
    base = logit_readout(t.model, cache["resid_post", -1]).values
    assert (base - logits).abs().max() > 0.1  # without a graft, the base's
    # By position: right where what it reads is one source's, else refused.
    grafted, cache = t.model.run_with_cache(TOKENS, graft="sft @ last")
    last = logit_lens(cache)
    torch.testing.assert_close(last.values[-1], grafted[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.values, cache.logit_lens()[:, :, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="logit_lens of TransformerLens reads one W_U for all"):
        logit_lens(cache, positions=None)


@needs_4
def test_direct_logit_attribution_of_transformerlens_warns_once(tiny: MakeTiny) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution

    t = tiny("gpt2")
    for unit in ("component", "layer", "head"):
        with t.model.grafted("sft @ last"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = direct_logit_attribution(t.model, TOKENS, 5, 7, unit=unit)
        assert len(told) == 1
        assert "leaves out ln_final's weight" in str(told[0].message)
        _, cache = t.model.run_with_cache(TOKENS, graft="sft @ last")
        scale = cache["ln_final.hook_scale"][:, -1]
        direction = t.model.W_U[1][:, 5] - t.model.W_U[1][:, 7]
        if unit == "component":
            centred = cache["resid_post", -1][:, -1]
            centred = centred - centred.mean(-1, keepdim=True)
            wanted = (centred / scale) @ direction
            torch.testing.assert_close(found.attribution.sum(0), wanted, atol=1e-4, rtol=1e-4)


@needs_4
def test_edges_are_attributed_and_patched_under_a_graft(tiny: MakeTiny) -> None:
    """`attribution_patch` looks attention's inputs up at the attention."""
    from transformer_lens.tools.analysis import (
        EdgeAttributionConfig,
        attribution_patch,
        faithfulness,
    )

    t = tiny("gpt2")
    model, clean, corrupt = t.model, TOKENS[:1, :3], TOKENS[1:, :3]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 7]

    model.requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    for graft in ("sft @ all", "sft @ last : q + k + v + mlp + ln"):
        with model.grafted(graft):
            edge = attribution_patch(
                model, clean, corrupt, metric, EdgeAttributionConfig(granularity="edge")
            )
            node = attribution_patch(model, clean, corrupt, metric)
            kept = faithfulness(model, clean, corrupt, metric, list(edge.edge_scores))
        assert not model.cfg.use_split_qkv_input
        assert kept.recovered == pytest.approx(1, abs=1e-3)
        # A writer's edges add up to what its own gradient says.
        for writer, score in node.node_scores.items():
            assert edge.node_scores[writer] == pytest.approx(score, abs=2e-4)
    caches = [model.run_with_cache(x, graft="sft @ all")[1] for x in (clean, corrupt)]
    with model.grafted("sft @ all"):
        results = patching.get_act_patch_direct_path(
            model, corrupt, *caches, metric, src_layer=0, src_head=1, component="v", verbose=False
        )
        delta = (caches[0]["z", 0] - caches[1]["z", 0])[:, :, 1] @ model.blocks[0].attn.W_O[1]
        _, cache = model.run_with_cache(corrupt)
        last, arch = model.blocks[-1], model.arch
        x = cache["resid_pre", -1] + delta
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + arch.eps).sqrt() * last.ln1.w + last.ln1.b
        z = cache["pattern", -1][:, 0] @ (x @ last.attn.W_V[0] + last.attn.b_V[0])

        def put(value: Tensor, hook: Any) -> Tensor:
            return torch.cat([z[:, :, None], value[:, :, 1:]], dim=2)

        name = f"blocks.{arch.n_layers - 1}.attn.hook_z"
        wanted = metric(model.run_with_hooks(corrupt, fwd_hooks=[(name, put)]))
    assert results.shape == (arch.n_layers, arch.n_heads)
    assert not results[0].any()
    torch.testing.assert_close(results[-1, 0], wanted, atol=1e-4, rtol=1e-4)


@needs_4
def test_heads_before_a_norm_are_no_direct_path(tiny: MakeTiny) -> None:
    """With a norm after attention, a head's output is not what is added to the stream."""
    t = tiny("gemma2")
    _, cache = t.model.run_with_cache(TOKENS)
    with pytest.raises(ValueError, match="normalized or scaled before the residual add"):
        patching.get_act_patch_direct_path(
            t.model, TOKENS, cache, cache, lambda logits: logits[0, 0, 0], 0, 0, verbose=False
        )


@needs_4
def test_second_names_of_hooks_are_the_same_hooks(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    own, second = "blocks.1.hook_q_input", "blocks.1.attn.hook_q_input"
    assert model.hook_dict[own] is model.hook_dict[second]
    with pytest.raises(ValueError, match=f"'{second}' does not fire"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(second, lambda x, hook: x)])
    model.set_use_split_qkv_input(True)
    seen: list[str] = []
    logits = model.run_with_hooks(
        TOKENS, fwd_hooks=[(second, lambda x, hook: seen.append(hook.name))]
    )
    assert seen == [own]
    torch.testing.assert_close(logits, model(TOKENS))
    _, cache = model.run_with_cache(TOKENS, names_filter=second)
    assert list(cache.keys()) == [own]
    _, cache = model.run_with_cache(TOKENS)
    assert not any(".attn.hook_q_input" in name for name in cache)
    copied = copy.deepcopy(model)
    assert copied.hook_dict[second] is copied.blocks[1].hook_q_input


def test_readers_outside_transformerlens_get_the_source_axis(tiny: MakeTiny) -> None:
    """Only TransformerLens's own functions are given the weights in force alone."""
    model = tiny("llama").model
    reader: dict[str, Any] = {"__name__": "transformer_lens.somewhere"}
    code = "def read(model, name): return getattr(model, name)"
    exec(code, reader)
    with model.grafted("sft @ all"):
        for name in ("W_Q", "W_K", "b_V", "W_in", "W_out", "W_U", "b_U", "W_E"):
            view = getattr(model, name)
            assert view.shape[0] == 2
            wanted = view[1]
            if name in ("W_K", "b_V"):
                wanted = wanted.repeat_interleave(2, dim=1)
            assert torch.equal(reader["read"](model, name), wanted), name
    with pytest.raises(AttributeError, match="llama has no pos_embed, so no W_pos"):
        reader["read"](model, "W_pos")
    assert reader["read"](SimpleNamespace(W_Q=1), "W_Q") == 1
