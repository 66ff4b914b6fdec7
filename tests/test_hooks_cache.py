"""Hooks, caches and what reads them, under empty, uniform and mixed grafts.

Values are held against the sequential algorithm's residual stream, Hugging Face's own modules
applied row by row, and finite differences; never against the same code run another way.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS
from reference import sequential_graft
from torch import Tensor, nn
from transformer_lens import ActivationCache, patching
from transformer_lens.hook_points import HookPoint

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
N = 9
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


def _ids(n: int = N, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 3e-5) -> None:
    assert ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < tolerance, difference


# Each graft as text for the library, and as a function of the site for the oracle.
Choose = Callable[[str, int | None, int, int | None], str]
MIXED = (
    "sft @ [1] + last | pre @ last : v + mlp_in : 1 | sft @ [3] : o : all : 0,2 "
    "| sft @ [4, 5] : o | sft @ [2] : mlp_out + k | sft @ [0, 4] : unembed"
)


def _mixed(component: str, layer: int | None, position: int, head: int | None) -> str:
    last = N - 1
    chosen = position in (1, last)
    if position == last and layer == 1 and component in ("v", "mlp_in"):
        chosen = False
    if component == "o" and (position in (4, 5) or (position == 3 and head in (0, 2))):
        chosen = True
    if position == 2 and component in ("mlp_out", "k"):
        chosen = True
    if position in (0, 4) and component == "unembed":
        chosen = True
    return "sft" if chosen else "pre"


GRAFTS: dict[str, tuple[str, Choose]] = {
    "empty": ("none", lambda c, l, p, h: "pre"),
    "uniform": ("sft @ all", lambda c, l, p, h: "sft"),
    "mixed": (MIXED, _mixed),
}
EACH_GRAFT = pytest.mark.parametrize("graft", GRAFTS)
#: Families whose residual stream is a plain sum, with and without biases, and GPT-2's layout.
READABLE = pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "qwen3", "neox-parallel"])


def _run(t: Tiny, graft: str, seed: int = 0) -> tuple[Tensor, ActivationCache, Tensor, Tensor]:
    """Our logits and cache, the oracle's logits and residual stream, for one prompt."""
    tokens = _ids(seed=seed)
    text, choose = GRAFTS[graft]
    logits, cache = t.model.run_with_cache(torch.tensor([tokens]), graft=text)
    theirs, hidden = sequential_graft(t.sources, tokens, choose, hidden=True)
    return logits, cache, theirs, hidden


def _layers(model: nn.Module) -> nn.ModuleList:
    return model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers


def _final_norm(model: nn.Module) -> nn.Module:
    names = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
    return model.base_model.get_submodule(names.get(model.config.model_type, "norm"))


def _out_projection(model: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """Weight [d_model, head · d_head] and bias of an attention's output."""
    names = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
    module = _layers(model)[layer].get_submodule(
        names.get(model.config.model_type, "self_attn.o_proj")
    )
    weight = module.weight.T if model.config.model_type == "gpt2" else module.weight
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias
    return weight, bias


# --- Names and shapes ----------------------------------------------------------------------------


@EVERY_VARIANT
def test_every_hook_fires_with_hookedtransformers_shape(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    arch = t.model.arch
    d, heads, kv, d_head, d_mlp = (
        arch.d_model,
        arch.n_heads,
        arch.n_kv_heads,
        arch.d_head,
        arch.d_mlp,
    )
    for flag in FLAGS:
        getattr(t.model, f"set_{flag}")(True)
    _, cache = t.model.run_with_cache(torch.tensor([_ids(), _ids(seed=1)]), graft="sft @ last")
    head = (2, N)
    shapes = {
        **{f"hook_resid_{x}": (*head, d) for x in ("pre", "mid", "post")},
        **{f"hook_{x}": (*head, d) for x in ("attn_out", "mlp_out", "mlp_in")},
        "hook_q_input": (*head, heads, d),
        "hook_k_input": (*head, kv, d),
        "hook_v_input": (*head, kv, d),
        "attn.hook_q": (*head, heads, d_head),
        "attn.hook_k": (*head, kv, d_head),
        "attn.hook_v": (*head, kv, d_head),
        "attn.hook_rot_q": (*head, heads, d_head),
        "attn.hook_rot_k": (*head, kv, d_head),
        "attn.hook_z": (*head, heads, d_head),
        "attn.hook_result": (*head, heads, d),
        "attn.hook_attn_scores": (2, heads, N, N),
        "attn.hook_pattern": (2, heads, N, N),
        **{f"mlp.hook_{x}": (*head, d_mlp) for x in ("pre", "pre_linear", "post")},
    }
    absent = {"attn.hook_rot_q", "attn.hook_rot_k"} if variant.startswith("gpt2") else set()
    absent |= set() if arch.mlp == "gated" else {"mlp.hook_pre_linear"}
    absent |= {"hook_resid_mid"} if arch.parallel else set()
    for layer in range(arch.n_layers):
        for name, shape in shapes.items():
            full = f"blocks.{layer}.{name}"
            assert (full in cache) == (name not in absent), full
            if full in cache:
                assert tuple(cache[full].shape) == shape, full
    assert tuple(cache["hook_embed"].shape) == (*head, d)
    assert ("hook_pos_embed" in cache) == variant.startswith("gpt2")
    assert tuple(cache["ln_final.hook_scale"].shape) == (*head, 1)
    assert tuple(cache["ln_final.hook_normalized"].shape) == (*head, d)
    silent = {str(point.name) for point in t.model.hook_points()} - set(cache.keys())
    assert {n.rsplit(".", 1)[-1] for n in silent} <= {"hook_attn_in"}


# --- Values --------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_the_cached_residual_stream_is_the_sequential_algorithms(
    tiny: MakeTiny, variant: str
) -> None:
    t = tiny(variant)
    logits, cache, theirs, hidden = _run(t, "mixed")
    _close(logits[0], theirs)
    for layer in range(t.model.arch.n_layers):
        _close(cache["resid_pre", layer][0], hidden[layer])
        _close(cache["resid_post", layer][0], hidden[layer + 1])
    stack, labels = cache.accumulated_resid(return_labels=True)
    _close(stack[:, 0], hidden)
    assert labels == [*(f"{l}_pre" for l in range(t.model.arch.n_layers)), "final_post"]


@EVERY_VARIANT
@EACH_GRAFT
def test_decompositions_sum_to_the_residual_stream(
    tiny: MakeTiny, variant: str, graft: str
) -> None:
    t = tiny(variant)
    _, cache, _, hidden = _run(t, graft)
    _close(cache.decompose_resid().sum(0)[0], hidden[-1])
    _close(cache.decompose_resid(layer=1).sum(0)[0], hidden[1])
    _close(cache.decompose_resid(pos_slice=-1).sum(0)[0], hidden[-1][-1])


def _sources_at(choose: Choose, component: str, layer: int | None, head: int | None) -> list[str]:
    return [choose(component, layer, p, head) for p in range(N)]


@EVERY_VARIANT
@EACH_GRAFT
def test_head_results_are_each_rows_own(tiny: MakeTiny, variant: str, graft: str) -> None:
    """Each head's z times the very W_O that the row used, from the checkpoint itself."""
    t = tiny(variant)
    _, cache, _, _ = _run(t, graft)
    choose = GRAFTS[graft][1]
    arch = t.model.arch
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{l}H{h}" for l in range(arch.n_layers) for h in range(arch.n_heads)]
    stack = stack.unflatten(0, (arch.n_layers, arch.n_heads))[:, :, 0]
    for layer in range(arch.n_layers):
        total = torch.zeros(N, arch.d_model)
        for head in range(arch.n_heads):
            columns = slice(head * arch.d_head, (head + 1) * arch.d_head)
            for p, source in enumerate(_sources_at(choose, "o", layer, head)):
                weight, _ = _out_projection(t.sources[source], layer)
                wanted = weight[:, columns] @ cache["z", layer][0, p, head]
                _close(stack[layer, head, p], wanted)
                total[p] += wanted
        for p in range(N):
            used = {choose("o", layer, p, head) for head in range(arch.n_heads)}
            _, bias = _out_projection(t.sources[used.pop() if len(used) == 1 else "pre"], layer)
            total[p] += bias
        if not arch.post_norms:
            _close(cache["attn_out", layer][0], total)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma2", "olmo2"])
@EACH_GRAFT
def test_results_that_the_run_computes_are_those_made_afterwards(
    tiny: MakeTiny, variant: str, graft: str
) -> None:
    t = tiny(variant)
    logits, cache, _, _ = _run(t, graft)
    after = cache.stack_head_results()
    t.model.set_use_attn_result(True)
    same, inside = t.model.run_with_cache(torch.tensor([_ids()]), graft=GRAFTS[graft][0])
    _close(same, logits)
    _close(inside.stack_head_results(), after)


@READABLE
@EACH_GRAFT
def test_the_remainder_and_the_bias_complete_the_residual_stream(
    tiny: MakeTiny, variant: str, graft: str
) -> None:
    t = tiny(variant)
    _, cache, _, hidden = _run(t, graft)
    _close(cache.stack_head_results(incl_remainder=True).sum(0)[0], hidden[-1])
    for layer in (1, None):
        whole, labels = cache.get_full_resid_decomposition(
            layer, expand_neurons=False, return_labels=True
        )
        assert labels[-1] == "bias"
        _close(whole.sum(0)[0], hidden[-1 if layer is None else layer])
    at = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
    _close(at.sum(0)[0], hidden[-1][-1])
    part = cache.get_full_resid_decomposition(None, False, False, False, [1, 4])
    _close(part.sum(0)[0], hidden[-1][[1, 4]])


@READABLE
@pytest.mark.parametrize("graft", ["empty", "uniform"])
def test_neurons_sum_to_the_residual_stream(tiny: MakeTiny, variant: str, graft: str) -> None:
    t = tiny(variant)
    _, cache, _, hidden = _run(t, graft)
    _close(cache.get_full_resid_decomposition(expand_neurons=True).sum(0)[0], hidden[-1])
    neurons = cache.get_neuron_results(1)
    assert tuple(neurons.shape) == (1, N, t.model.arch.d_mlp, t.model.arch.d_model)
    names = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
    for p, source in enumerate(_sources_at(GRAFTS[graft][1], "mlp_out", 1, None)):
        model = t.sources[source]
        module = _layers(model)[1].get_submodule(
            names.get(model.config.model_type, "mlp.down_proj")
        )
        weight = module.weight if model.config.model_type == "gpt2" else module.weight.T
        _close(neurons[0, p], cache["post", 1][0, p][:, None] * weight)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma", "olmo2", "olmo"])
@EACH_GRAFT
def test_the_logit_lens_norms_and_unembeds_each_row_with_its_own(
    tiny: MakeTiny, variant: str, graft: str
) -> None:
    t = tiny(variant)
    _, cache, theirs, hidden = _run(t, graft)
    choose = GRAFTS[graft][1]
    normed = cache.accumulated_resid(apply_ln=True)[:, 0]
    for p in range(N):
        norm = _final_norm(t.sources[choose("ln_final", None, p, None)])
        head = t.sources[choose("unembed", None, p, None)].get_output_embeddings()
        _close(normed[:, p], norm(hidden[:, p]))
        _close(head(normed[-1, p]), theirs[p])


@READABLE
@EACH_GRAFT
def test_logit_attributions_follow_the_formula(tiny: MakeTiny, variant: str, graft: str) -> None:
    """(component / scale) · W_U[token], with the scale of the whole stream and each row's W_U."""
    t = tiny(variant)
    _, cache, _, hidden = _run(t, graft)
    choose = GRAFTS[graft][1]
    arch = t.model.arch
    final = hidden[-1]
    if arch.norm == "layer":
        final = final - final.mean(-1, keepdim=True)
    scale = (final.pow(2).mean(-1, keepdim=True) + arch.eps).sqrt()
    stack = cache.decompose_resid()
    centred = stack[:, 0] - (stack[:, 0].mean(-1, keepdim=True) if arch.norm == "layer" else 0)
    used = _sources_at(choose, "unembed", None, None)
    tables = [t.sources[source].get_output_embeddings().weight for source in used]
    _close(cache.apply_ln_to_stack(stack)[:, 0], centred / scale)

    right, wrong = 17, 40
    wanted = torch.stack(
        [(centred[:, p] / scale[p]) @ (tables[p][right] - tables[p][wrong]) for p in range(N)], 1
    )
    _close(cache.logit_attrs(stack, right, wrong)[:, 0], wanted)
    alone = torch.stack([(centred[:, p] / scale[p]) @ tables[p][right] for p in range(N)], 1)
    _close(cache.logit_attrs(stack, right)[:, 0], alone)
    tokens = torch.tensor([_ids(seed=5)])
    each = torch.stack([(centred[:, p] / scale[p]) @ tables[p][tokens[0, p]] for p in range(N)], 1)
    _close(cache.logit_attrs(stack, tokens)[:, 0], each)
    last = cache.logit_attrs(stack[:, :, -1], right, wrong, pos_slice=-1)
    _close(last[:, 0], wanted[:, -1])
    part = cache.logit_attrs(stack[:, :, 2:5], right, wrong, pos_slice=(2, 5))
    _close(part[:, 0], wanted[:, 2:5])
    one = cache.logit_attrs(stack, right, wrong, batch_slice=0)
    _close(one, wanted)


def test_logit_attributions_of_a_batch_take_each_prompts_token_and_source(tiny: MakeTiny) -> None:
    """The unembedding differs between prompts here, not only between positions."""
    t = tiny("llama-biased")
    rows = [_ids(4, 1), _ids(9, 2), _ids(6, 3)]
    tokens = torch.tensor([row + [3] * (9 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (9 - len(row)) for row in rows])
    _, cache = t.model.run_with_cache(
        tokens, graft="sft @ last : unembed | sft @ [2] : o", attention_mask=mask
    )
    stack = cache.decompose_resid()
    answers = torch.tensor([10, 20, 30])
    found = cache.logit_attrs(stack[:, :, 3], answers, pos_slice=3)
    for i, row in enumerate(rows):
        source = t.sources["sft" if len(row) == 4 else "pre"]
        scale = (cache["resid_post", 2][i, 3].pow(2).mean() + t.model.arch.eps).sqrt()
        wanted = stack[:, i, 3] / scale @ source.lm_head.weight[answers[i]]
        _close(found[:, i], wanted)
    picked = cache.logit_attrs(stack[:, :, 3], 10, pos_slice=3, batch_slice=[0])
    _close(picked[:, 0], found[:, 0])


# --- Cutting caches ------------------------------------------------------------------------------


def test_a_part_of_the_batch_keeps_its_own_grafts(tiny: MakeTiny) -> None:
    t = tiny("llama-biased")
    rows = [_ids(4, 1), _ids(9, 2), _ids(6, 3)]
    tokens = torch.tensor([[3] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    graft = "sft @ [1] + last : o + mlp | sft @ [0] : o : 1 : 2"
    _, cache = t.model.run_with_cache(tokens, graft=graft, attention_mask=mask)
    heads, whole = (
        cache.stack_head_results(),
        cache.get_full_resid_decomposition(expand_neurons=False),
    )
    fresh = t.model.run_with_cache(tokens, graft=graft, attention_mask=mask)[1]
    for chosen, index in [
        (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]),
        ((0, 2), [0, 1]),
        (torch.tensor([1]), [1]),
    ]:
        if isinstance(chosen, slice):
            part = fresh.apply_slice_to_batch_dim((chosen.start, chosen.stop))
        else:
            part = fresh.apply_slice_to_batch_dim(chosen)
        _close(part.stack_head_results(), heads[:, index])
        _close(part.get_full_resid_decomposition(expand_neurons=False), whole[:, index])
        assert torch.equal(part["z", 1], cache["z", 1][index])
    one = fresh.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim
    _close(one.stack_head_results(), heads[:, 1])
    _close(one.accumulated_resid(apply_ln=True), cache.accumulated_resid(apply_ln=True)[:, 1])


@READABLE
@EACH_GRAFT
def test_a_cache_without_batch_dim(tiny: MakeTiny, variant: str, graft: str) -> None:
    t = tiny(variant)
    _, cache, _, hidden = _run(t, graft)
    stack = cache.decompose_resid()
    wanted = {
        "heads": cache.stack_head_results(),
        "norm": cache.accumulated_resid(apply_ln=True),
        "logits": cache.logit_attrs(stack, 5, 6),
        "at": cache.logit_attrs(stack[:, :, -1], 5, 6, pos_slice=-1),
    }
    _, bare = t.model.run_with_cache(
        torch.tensor([_ids()]), graft=GRAFTS[graft][0], remove_batch_dim=True
    )
    assert tuple(bare["resid_pre", 0].shape) == (N, t.model.arch.d_model)
    _close(bare.accumulated_resid(), hidden)
    _close(bare.stack_head_results(), wanted["heads"][:, 0])
    _close(bare.accumulated_resid(apply_ln=True), wanted["norm"][:, 0])
    without = bare.decompose_resid()
    found = bare.logit_attrs(without, 5, 6, has_batch_dim=False)
    _close(found, wanted["logits"][:, 0])
    found = bare.logit_attrs(without[:, -1], 5, 6, pos_slice=-1, has_batch_dim=False)
    _close(found, wanted["at"][:, 0])
    whole = bare.get_full_resid_decomposition(expand_neurons=False)
    _close(whole.sum(0), hidden[-1])
    _close(cache.remove_batch_dim().stack_head_results(), wanted["heads"][:, 0])


def test_removing_the_batch_dim_of_several_prompts_is_refused(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    with pytest.raises((ValueError, AssertionError), match=r"2|batch"):
        t.model.run_with_cache(torch.tensor([_ids(), _ids()]), remove_batch_dim=True)


@EACH_GRAFT
@pytest.mark.parametrize("chosen", [-1, (2, 5), [1, 4, 7]])
def test_a_cache_of_some_positions(tiny: MakeTiny, graft: str, chosen: object) -> None:
    t = tiny("llama-biased")
    _, cache, _, _ = _run(t, graft)
    _, part = t.model.run_with_cache(
        torch.tensor([_ids()]), graft=GRAFTS[graft][0], pos_slice=chosen
    )
    # TransformerLens keeps one position as an axis of length one.
    index = {-1: [-1], (2, 5): [2, 3, 4]}.get(chosen if isinstance(chosen, int) else tuple(chosen))
    index = index or [1, 4, 7]
    for name in cache.cache_dict:
        pairs = name.endswith(("hook_attn_scores", "hook_pattern"))
        _close(
            part[name].nan_to_num(neginf=0),
            cache[name].nan_to_num(neginf=0)[
                (slice(None), slice(None), index) if pairs else (slice(None), index)
            ],
        )
    _close(part.stack_head_results(), cache.stack_head_results()[:, :, index])
    stack = cache.decompose_resid()
    wanted = cache.logit_attrs(stack, 5, 6)[:, :, index]
    _close(part.logit_attrs(part.decompose_resid(), 5, 6), wanted)


def test_names_filters_choose_what_is_kept(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_ids()])
    _, everything = t.model.run_with_cache(tokens, graft=MIXED)
    for chosen, names in [
        ("blocks.1.hook_resid_post", {"blocks.1.hook_resid_post"}),
        (["hook_embed", "blocks.0.attn.hook_z"], {"hook_embed", "blocks.0.attn.hook_z"}),
        (
            lambda name: name.endswith("hook_pattern"),
            {f"blocks.{l}.attn.hook_pattern" for l in range(3)},
        ),
    ]:
        logits, cache = t.model.run_with_cache(tokens, graft=MIXED, names_filter=chosen)
        assert set(cache.keys()) == names
        for name in names:
            _close(cache[name], everything[name])
        _close(logits, t.model(tokens, graft=MIXED))
    _, plain = t.model.run_with_cache(tokens, graft=MIXED, return_cache_object=False)
    assert isinstance(plain, dict)


# --- Intervening ---------------------------------------------------------------------------------


@EVERY_VARIANT
def test_a_hook_that_replaces_an_embedding_replaces_the_token(tiny: MakeTiny, variant: str) -> None:
    """hook_embed of another prompt at one place: the oracle reads that prompt's token there."""
    t = tiny(variant)
    tokens, other = _ids(seed=1), _ids(seed=2)
    _, cache = t.model.run_with_cache(torch.tensor([other]), graft=MIXED)

    def put(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        value[:, 3] = cache["hook_embed"][:, 3]
        return value

    ours = t.model.run_with_hooks(
        torch.tensor([tokens]), graft=MIXED, fwd_hooks=[("hook_embed", put)]
    )
    swapped = [*tokens[:3], other[3], *tokens[4:]]
    _close(ours[0], sequential_graft(t.sources, swapped, _mixed))


@pytest.mark.parametrize("variant", ["llama-biased", "gpt2", "neox-parallel", "gemma3"])
def test_an_ablated_pattern_head_equals_a_zeroed_value(tiny: MakeTiny, variant: str) -> None:
    """Without its pattern a head adds nothing, whichever of two hooks takes it away."""
    t = tiny(variant)
    tokens = torch.tensor([_ids()])

    def no_pattern(pattern: Tensor, hook: HookPoint) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 1] = 0
        return pattern

    def no_z(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    one = t.model.run_with_hooks(
        tokens, graft=MIXED, fwd_hooks=[("blocks.1.attn.hook_pattern", no_pattern)]
    )
    two = t.model.run_with_hooks(tokens, graft=MIXED, fwd_hooks=[("blocks.1.attn.hook_z", no_z)])
    _close(one, two)
    assert (one - t.model(tokens, graft=MIXED)).abs().max() > 1e-3


def test_one_heads_input_reaches_that_head_alone(tiny: MakeTiny) -> None:
    """hook_k_input of one key-value head, against the checkpoint's own norm and projection."""
    t = tiny("llama-biased")
    t.model.set_use_split_qkv_input(True)
    tokens = torch.tensor([_ids()])
    shift = torch.randn(t.model.arch.d_model, generator=torch.Generator().manual_seed(3))
    names = [f"blocks.1.{n}" for n in ("attn.hook_q", "attn.hook_k", "attn.hook_v")]
    _, before = t.model.run_with_cache(
        tokens, graft=MIXED, names_filter=[*names, "blocks.1.hook_resid_pre"]
    )

    def put(value: Tensor, hook: HookPoint) -> Tensor:
        value[:, :, 1] += shift
        return value

    with t.model.hooks(fwd_hooks=[("blocks.1.hook_k_input", put)]):
        _, after = t.model.run_with_cache(tokens, graft=MIXED, names_filter=names)
    assert torch.equal(after[names[0]], before[names[0]])
    assert torch.equal(after[names[2]], before[names[2]])
    assert torch.equal(after[names[1]][:, :, 0], before[names[1]][:, :, 0])
    for p in range(N):
        norm = _layers(t.sources[_mixed("ln1", 1, p, None)])[1].input_layernorm
        project = _layers(t.sources[_mixed("k", 1, p, 1)])[1].self_attn.k_proj
        x = before["blocks.1.hook_resid_pre"][0, p] + shift
        wanted = project(norm(x)).unflatten(0, (2, -1))[1]
        _close(after[names[1]][0, p, 1], wanted)


def test_the_mlp_input_hook_moves_the_mlp_alone(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    t.model.set_use_hook_mlp_in(True)
    tokens = torch.tensor([_ids()])
    with t.model.hooks(fwd_hooks=[("blocks.0.hook_mlp_in", lambda x, hook: x * 0)]):
        _, cache = t.model.run_with_cache(tokens, graft=MIXED)
    for p in range(N):
        norm = _layers(t.sources[_mixed("ln2", 0, p, None)])[0].ln_2
        into = _layers(t.sources[_mixed("mlp_in", 0, p, None)])[0].mlp.c_fc
        _close(cache["pre", 0][0, p], into(norm(torch.zeros(1, 24)))[0])
    _close(
        cache["resid_mid", 0] + cache["mlp_out", 0], cache["resid_post", 0]
    )  # the stream itself was left alone


# --- What is refused -----------------------------------------------------------------------------


def test_unknown_silent_and_empty_hooks_are_errors(tiny: MakeTiny) -> None:
    model, tokens = tiny("llama").model, torch.tensor([_ids()])

    def look(value: Tensor, hook: HookPoint) -> None:
        return None

    with pytest.raises(ValueError, match=r"no hook 'blocks.0.hook_resid_prex'.*Did you mean"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_prex", look)])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.3\.hook_resid_pre'"):
        model.run_with_cache(tokens, names_filter="blocks.3.hook_resid_pre")
    with pytest.raises(KeyError, match="no hook 'nothing'") as caught:  # as in TransformerLens
        model.run_with_cache(tokens, names_filter=["hook_embed", "nothing"])
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("names_filter: no hook")
    # A filter may choose nothing, as in TransformerLens, but not only what never fires.
    for nothing in (lambda name: "hook_pos_embed" in name, []):
        assert len(model.run_with_cache(tokens, names_filter=nothing)[1]) == 0
    with pytest.raises(ValueError, match=r"names_filter: .blocks\.0\.attn\.hook_result. does not"):
        model.run_with_cache(tokens, names_filter=lambda name: "hook_result" in name)
    with pytest.raises(ValueError, match="matches none"):
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, look)])
    for name, flag in [
        ("attn.hook_result", "use_attn_result"),
        ("hook_q_input", "use_split_qkv_input"),
        ("hook_mlp_in", "use_hook_mlp_in"),
        ("hook_attn_in", "use_attn_in"),
    ]:
        full = f"blocks.0.{name}"
        message = rf"'{full}' does not fire.*model.set_{flag}\(True\)"
        with pytest.raises(ValueError, match=message):
            model.run_with_hooks(tokens, fwd_hooks=[(full, look)])
        with pytest.raises(ValueError, match=message):
            model.run_with_cache(tokens, names_filter=full)
    with pytest.raises(ValueError, match="2 and 4"):
        model.set_use_attn_in(True)


def test_a_weight_that_rows_differ_in_is_not_handed_out(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_ids()])
    attn = t.model.blocks[1].attn
    weights = {s: m.transformer.h[1].attn.c_proj.weight for s, m in t.sources.items()}
    assert torch.equal(attn.W_O.flatten(0, 1), weights["pre"])
    with t.model.grafted(t.model.resolve("sft @ all", tokens)):
        assert torch.equal(attn.W_O.flatten(0, 1), weights["sft"])
    with (
        t.model.grafted(t.model.resolve("sft @ last", tokens)),
        pytest.raises(ValueError, match="no single weight for o in layer 1"),
    ):
        _ = attn.W_O


# --- transformer_lens.patching -------------------------------------------------------------------


def _last(logits: Tensor) -> Tensor:
    return logits[0, -1, 17] - logits[0, -1, 40]


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2"])
def test_patching_the_first_layers_input_swaps_tokens(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    corrupted, clean = _ids(seed=1), _ids(seed=2)
    _, cache = t.model.run_with_cache(torch.tensor([clean]), graft=MIXED)
    with t.model.grafted(MIXED):
        found = patching.get_act_patch_resid_pre(t.model, torch.tensor([corrupted]), cache, _last)
    assert tuple(found.shape) == (t.model.arch.n_layers, N)
    for p in range(N):
        tokens = [*corrupted[:p], clean[p], *corrupted[p + 1 :]]
        wanted = sequential_graft(t.sources, tokens, _mixed)
        assert float(found[0, p]) == pytest.approx(float(_last(wanted[None])), abs=2e-4)
    # At the last position, the last layer's input decides everything but what it attends to.
    assert not torch.allclose(found[0], found[-1])
    assert t.model.active.stack == []


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    ("name", "hook", "axis"),
    [
        ("get_act_patch_attn_head_out_all_pos", "hook_z", 2),
        ("get_act_patch_attn_head_q_all_pos", "hook_q", 2),
        ("get_act_patch_attn_head_pattern_all_pos", "hook_pattern", 1),
    ],
)
def test_patching_heads_runs_under_the_graft_in_force(
    tiny: MakeTiny, variant: str, name: str, hook: str, axis: int
) -> None:
    t = tiny(variant)
    corrupted, clean = torch.tensor([_ids(seed=1)]), torch.tensor([_ids(seed=2)])
    _, cache = t.model.run_with_cache(clean, graft=MIXED)
    with t.model.grafted(MIXED):
        found = getattr(patching, name)(t.model, corrupted, cache, _last)
    bare = getattr(patching, name)(t.model, corrupted, cache, _last)
    assert not torch.allclose(found, bare)
    for layer in range(t.model.arch.n_layers):
        for head in range(t.model.arch.n_heads):

            def put(value: Tensor, hook: HookPoint, head: int = head) -> Tensor:
                value = value.clone()
                value.select(axis, head).copy_(cache[hook.name].select(axis, head))
                return value

            logits = t.model.run_with_hooks(
                corrupted, graft=MIXED, fwd_hooks=[(f"blocks.{layer}.attn.{hook}", put)]
            )
            assert float(found[layer, head]) == pytest.approx(float(_last(logits)), abs=1e-5)


@pytest.mark.parametrize("which", ["k", "v"])
def test_patching_keys_and_values(tiny: MakeTiny, which: str) -> None:
    """With every position of every head patched in the first layer, keys and values are clean."""
    t = tiny("gpt2")
    corrupted, clean = torch.tensor([_ids(seed=1)]), torch.tensor([_ids(seed=2)])
    _, cache = t.model.run_with_cache(clean, graft=MIXED)
    sweep = getattr(patching, f"get_act_patch_attn_head_{which}_all_pos")
    with t.model.grafted(MIXED):
        found = sweep(t.model, corrupted, cache, _last)
    assert tuple(found.shape) == (3, 4)
    assert (found - _last(t.model(corrupted, graft=MIXED))).abs().min() > 1e-6


# --- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma2", "olmo2", "neox-parallel"])
def test_gradients_are_finite_differences(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    model = t.model.to(torch.float64)
    tokens = torch.tensor([_ids()])
    names = [
        *("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_q", "blocks.1.attn.hook_k"),
        *("blocks.1.attn.hook_v", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"),
        *("blocks.1.mlp.hook_post", "blocks.2.hook_attn_out", "ln_final.hook_normalized"),
    ]
    for name in names:
        seen: dict[str, Tensor] = {}

        def keep(gradient: Tensor, hook: HookPoint, seen: dict[str, Tensor] = seen) -> None:
            seen[hook.name] = gradient

        with torch.enable_grad(), model.hooks(bwd_hooks=[(name, keep)]):
            _last(model(tokens, graft=MIXED)).backward()
        (gradient,) = seen.values()
        model.zero_grad()
        direction = torch.randn(
            gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )

        def moved(step: float, name: str = name, direction: Tensor = direction) -> float:
            hooks = [(name, lambda value, hook: value + step * direction)]
            with torch.no_grad():
                return float(_last(model.run_with_hooks(tokens, graft=MIXED, fwd_hooks=hooks)))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name
        assert abs(slope) > 1e-6


def test_gradients_reach_only_the_sources_that_rows_used(tiny: MakeTiny) -> None:
    t = tiny("llama-biased")
    model = t.model.requires_grad_(True)
    model(torch.tensor([_ids()]), graft="sft @ [2] : mlp_out : 1").pow(2).sum().backward()
    out = model.blocks[1].mlp.mlp_out.weight
    assert float(out[1].grad.abs().max()) > 0
    other = model.blocks[0].mlp.mlp_out.weight
    assert other[1].grad is None or float(other[1].grad.abs().max()) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_are_finite(tiny: MakeTiny, side: str) -> None:
    t = tiny("mistral-window")
    rows = [_ids(9, 1), _ids(3, 2)]
    pad = [[3] * (9 - len(r)) for r in rows]
    keep = [[1] * len(r) for r in rows]
    joined = zip(rows, pad, keep, strict=True)
    if side == "left":
        tokens = [p + r for r, p, _ in joined]
        mask = [[0] * (9 - len(k)) + k for k in keep]
    else:
        tokens = [r + p for r, p, _ in joined]
        mask = [k + [0] * (9 - len(k)) for k in keep]
    _, cache = t.model.run_with_cache(
        torch.tensor(tokens),
        "loss",
        graft="sft @ last",
        attention_mask=torch.tensor(mask),
        incl_bwd=True,
    )
    gradient = cache["blocks.0.hook_resid_pre_grad"]
    assert gradient.isfinite().all()
    padding = torch.tensor(mask) == 0
    assert (gradient[padding] == 0).all()
    assert (gradient[~padding].abs().sum(-1)[:-1] > 0).any()


# --- Moving and copying --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama3-rope-tied", "gemma2", "olmo2", "phi3"])
def test_dtypes_follow_to(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    tokens = _ids()
    batch = torch.tensor([tokens])
    double = t.model.to(torch.float64)
    assert double is t.model
    assert double.cfg.dtype == torch.float64
    logits = double(batch, graft=MIXED)
    assert logits.dtype == torch.float64
    _close(logits[0].float(), sequential_graft(t.sources, tokens, _mixed))

    half = tiny(variant).model.to(torch.bfloat16)
    assert half.cfg.dtype == torch.bfloat16
    theirs = {s: copy.deepcopy(m).to(torch.bfloat16) for s, m in t.sources.items()}
    for source, model in theirs.items():
        with torch.no_grad():
            wanted = model(batch).logits
        ours = half(batch, graft=f"{source} @ all")
        assert ours.dtype == torch.bfloat16
        _close(ours.float(), wanted.float(), 4e-2)
    for tied in {"gpt2", "llama3-rope-tied", "gemma2"} & {variant}:
        assert half.embed.weight[1].data_ptr() == half.unembed.linear.weight[1].data_ptr(), tied


@pytest.mark.parametrize("variant", ["gpt2", "llama3-rope-tied", "gemma3"])
def test_a_deep_copy_is_whole_and_apart(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    tokens = torch.tensor([_ids()])
    before = t.model(tokens, graft=MIXED)
    twin = copy.deepcopy(t.model)
    ours = {p.data_ptr() for p in t.model.parameters()}
    assert len(list(twin.parameters())) == len(list(t.model.parameters()))
    assert not ours & {p.data_ptr() for p in twin.parameters()}
    assert torch.equal(twin(tokens, graft=MIXED), before)
    with twin.grafted("sft @ all"):
        _close(twin(tokens)[0], t.logits("sft", tokens[0].tolist()))
        _close(t.model(tokens)[0], t.logits("pre", tokens[0].tolist()))
    mask = twin.resolve("sft @ all", tokens)
    with twin.grafted(mask), torch.no_grad():
        resid = twin(tokens, stop_at_layer=t.model.arch.n_layers)
        logits = twin.unembed(twin.ln_final(resid))
        if t.model.arch.logit_softcap is None:
            _close(logits[0], t.logits("sft", tokens[0].tolist()))
    twin.set_use_attn_result(True)
    assert not t.model.cfg.use_attn_result
    _, cache = twin.run_with_cache(tokens, graft=MIXED)
    assert "blocks.0.attn.hook_result" in cache.cache_dict
    assert cache.model is twin
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(t.model(tokens, graft=MIXED), before)
    assert (twin(tokens, graft=MIXED) == 0).all()


@EVERY_VARIANT
def test_stopping_at_a_layer_gives_what_enters_it(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    tokens = _ids()
    _, hidden = sequential_graft(t.sources, tokens, _mixed, hidden=True)
    n = t.model.arch.n_layers
    for stop, index in [(0, 0), (1, 1), (n, n), (-1, n - 1), (-n, 0), (-99, 0), (99, n)]:
        ours = t.model(torch.tensor([tokens]), graft=MIXED, stop_at_layer=stop)
        _close(ours[0], hidden[index])
