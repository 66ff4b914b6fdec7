"""The same names, shapes and values as TransformerLens's own models, in both supported versions.

TransformerLens 3.9 still has `HookedTransformer`: there it is the oracle for hooks and caches, and
a source to load from. `TransformerBridge` is a source in 3.9 and in 4.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_pair
from hookedpairs import (
    EACH_HOOKED,
    FLATTENED,
    TOKENS,
    N,
    close,
    hooked_model,
    needs_hooked,
)
from reference import sequential_graft
from torch import Tensor
from toytokenizers import gpt2_style
from transformers import PreTrainedModel

from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer

pytestmark = pytest.mark.compat


def _flags(model: Any, on: bool) -> None:
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{flag}")(on)


@needs_hooked
@EACH_HOOKED
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_every_hook_has_hookedtransformers_name_shape_and_value(variant: str, flags: bool) -> None:
    pair = tiny_pair(variant, seed=1)
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    _flags(model, flags)
    for source, hf in pair.items():
        hooked = hooked_model(variant, hf)
        _flags(hooked, flags)
        theirs, their_cache = hooked.run_with_cache(TOKENS)
        with torch.no_grad():
            close(theirs, hf(TOKENS).logits, "the oracle itself")
        ours, our_cache = model.run_with_cache(TOKENS, graft=f"{source} @ all")
        close(ours, theirs, "logits")
        for name in their_cache.cache_dict:
            wanted, found = their_cache[name], our_cache[name]
            if name.endswith(FLATTENED):
                wanted = wanted.reshape(found.shape)
            close(found, wanted, name)
        assert set(our_cache.keys()) == set(their_cache.keys())
        assert set(model.hook_dict) == set(hooked.hook_dict)


@needs_hooked
@EACH_HOOKED
def test_what_caches_compute_is_what_hookedtransformers_caches_do(variant: str) -> None:
    pair = tiny_pair(variant, seed=1)
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    for source, hf in pair.items():
        hooked = hooked_model(variant, hf)
        _, theirs = hooked.run_with_cache(TOKENS)
        _, ours = model.run_with_cache(TOKENS, graft=f"{source} @ all")
        calls: dict[str, Callable[[Any], Any]] = {
            "accumulated": lambda c: c.accumulated_resid(return_labels=True),
            "accumulated, normed": lambda c: c.accumulated_resid(apply_ln=True, return_labels=True),
            "decomposed": lambda c: c.decompose_resid(return_labels=True),
            "decomposed, at": lambda c: c.decompose_resid(2, pos_slice=-1, return_labels=True),
            "heads": lambda c: c.stack_head_results(return_labels=True),
            "heads, normed": lambda c: c.stack_head_results(apply_ln=True, return_labels=True),
            "heads, rest": lambda c: c.stack_head_results(
                2, incl_remainder=True, return_labels=True
            ),
            "whole": lambda c: c.get_full_resid_decomposition(
                expand_neurons=False, return_labels=True
            ),
            "whole, neurons": lambda c: c.get_full_resid_decomposition(
                2, expand_neurons=True, return_labels=True
            ),
            "neurons": lambda c: (c.get_neuron_results(1, neuron_slice=(3, 9)), []),
            "attributions": lambda c: (
                # A token for each prompt needs one position in 3.9.
                c.logit_attrs(
                    c.decompose_resid(pos_slice=-1),
                    torch.tensor([5, 6]),
                    torch.tensor([7, 8]),
                    pos_slice=-1,
                ),
                [],
            ),
            "attributions, each": lambda c: (c.logit_attrs(c.decompose_resid(), TOKENS), []),
            "normed for a layer": lambda c: (c.apply_ln_to_stack(c.decompose_resid(1), 1), []),
        }
        for what, call in calls.items():
            (found, our_labels), (wanted, their_labels) = call(ours), call(theirs)
            close(found, wanted, what, 5e-5)
            assert our_labels == their_labels, what


@needs_hooked
@EACH_HOOKED
def test_weights_are_hookedtransformers_with_a_source_axis(variant: str) -> None:
    pair = tiny_pair(variant, seed=1)
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    offset = variant.startswith("gemma")  # HookedTransformer scales the embedding beforehand
    for index, hf in enumerate(pair.values()):
        hooked = hooked_model(variant, hf)
        names = ["W_Q", "W_O", "W_in", "W_out", "W_U", "b_Q", "b_O", "b_in", "b_out", "b_U"]
        names += [] if offset else ["W_E"]
        names += ["W_gate"] if model.arch.mlp == "gated" else []
        names += ["W_pos"] if variant == "gpt2" else []
        for name in names:
            close(getattr(model, name)[index], getattr(hooked, name), name)
        # HookedTransformer repeats grouped keys and values for each query head.
        repeat = model.arch.n_heads // model.arch.n_kv_heads
        for name in ("W_K", "W_V", "b_K", "b_V"):
            ours = getattr(model, name)[index].repeat_interleave(repeat, dim=1)
            close(ours, getattr(hooked, name), name)


@needs_hooked
@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "qwen3"])
def test_interventions_have_hookedtransformers_effect(variant: str) -> None:
    pair = tiny_pair(variant, seed=1)
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    hooked = hooked_model(variant, pair["sft"])
    for name, axis in [
        ("blocks.1.attn.hook_z", 2),
        ("blocks.1.attn.hook_pattern", 1),
        ("blocks.0.attn.hook_q", 2),
        ("blocks.2.mlp.hook_post", 1),
        ("blocks.0.hook_resid_mid", 1),
        ("blocks.1.ln1.hook_scale", 1),
    ]:

        def halve(value: Tensor, hook: Any, axis: int = axis) -> Tensor:
            value = value.clone()
            value.select(axis, 1).mul_(0.5)
            return value

        theirs = hooked.run_with_hooks(TOKENS, fwd_hooks=[(name, halve)])
        ours = model.run_with_hooks(TOKENS, graft="sft @ all", fwd_hooks=[(name, halve)])
        close(ours, theirs, name)


# --- HookedTransformer as a source ---------------------------------------------------------------


def _digest(module: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@needs_hooked
@EACH_HOOKED
def test_hookedtransformers_are_read_and_grafted_exactly(variant: str) -> None:
    pair = tiny_pair(variant, seed=1)
    hooked = {name: hooked_model(variant, model) for name, model in pair.items()}
    before = {name: _digest(model) for name, model in hooked.items()}
    model = GraftedTransformer.from_pretrained(hooked, verbose=False)
    for name, source in hooked.items():
        close(model(TOKENS, graft=f"{name} @ all"), source(TOKENS), name)
        assert _digest(source) == before[name]
        for parameter in source.parameters():
            parameter.data.zero_()
    rules = "sft @ last | sft @ [2] : k + mlp_out | sft @ [5] : q : 1 : 1"

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        chosen = position == N - 1 or (position == 2 and component in ("k", "mlp_out"))
        chosen |= (component, layer, position, head) == ("q", 1, 5, 1)
        return "sft" if chosen else "pre"

    theirs = sequential_graft(pair, TOKENS[0].tolist(), choose)
    close(model(TOKENS, graft=rules)[0], theirs, "grafted")


@needs_hooked
def test_a_hookedtransformer_beside_a_transformers_model() -> None:
    pair = tiny_pair("gpt2", seed=1)
    model = GraftedTransformer.from_pretrained(
        {"pre": pair["pre"], "sft": hooked_model("gpt2", pair["sft"])}, verbose=False
    )
    theirs = sequential_graft(
        pair, TOKENS[0].tolist(), lambda c, l, p, h: "sft" if p == N - 1 else "pre"
    )
    close(model(TOKENS, graft="sft @ last")[0], theirs)


@needs_hooked
@pytest.mark.parametrize(
    ("variant", "processing"),
    [
        pytest.param(variant, options, id=f"{variant}-{'+'.join(options)}")
        for variant in ("gpt2", "llama", "neox-parallel", "gemma2")
        for options in (
            {"fold_ln": True},
            {"center_writing_weights": True},
            {"center_unembed": True},
            {"fold_ln": True, "center_writing_weights": True, "center_unembed": True},
        )
        # TransformerLens does not centre the weights of RMSNorm models.
        if list(options) != ["center_writing_weights"] or variant not in ("llama", "gemma2")
    ],
)
def test_processed_hookedtransformers_are_refused(
    variant: str, processing: dict[str, bool]
) -> None:
    pair = tiny_pair(variant, seed=1)
    hooked = {name: hooked_model(variant, model) for name, model in pair.items()}
    off = dict.fromkeys(
        (
            *("fold_ln", "center_writing_weights", "center_unembed"),
            "refactor_factored_attn_matrices",
        ),
        False,
    )
    hooked["sft"].process_weights_(**{**off, **processing})
    with pytest.raises(PairError, match=r"'sft'.*from_pretrained_no_processing"):
        GraftedTransformer.from_pretrained(hooked, verbose=False)


@needs_hooked
def test_folded_value_biases_are_refused() -> None:
    """Value biases moved into o's bias: v and o would no longer be the checkpoint's own."""
    pair = tiny_pair("gpt2", seed=1)
    hooked = {name: hooked_model("gpt2", model) for name, model in pair.items()}
    state = hooked["sft"].state_dict()
    hooked["sft"].load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=True,
    )
    assert float(hooked["sft"].blocks[0].attn.b_V.abs().max()) == 0
    with pytest.raises(PairError):
        GraftedTransformer.from_pretrained(hooked, verbose=False)


# --- TransformerBridge as a source ---------------------------------------------------------------

BRIDGED = ("gpt2", "neox-parallel", "llama", "gemma2", "qwen3", "phi3", "mistral-window")


def _bridges(variant: str, folder: Path) -> tuple[dict[str, PreTrainedModel], dict[str, Any]]:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = gpt2_style()
    pair = tiny_pair(variant, seed=1, vocab_size=len(tokenizer))
    bridges = {}
    for name, model in pair.items():
        path = save_checkpoint(model, folder / name, tokenizer)
        bridges[name] = TransformerBridge.boot_transformers(str(path), device="cpu")
    return pair, bridges


@pytest.mark.parametrize("variant", BRIDGED)
def test_bridges_are_read_and_left_alone(variant: str, tmp_path: Path) -> None:
    pair, bridges = _bridges(variant, tmp_path)
    before = {name: _digest(bridge.original_model) for name, bridge in bridges.items()}
    with torch.no_grad():
        logits = {name: bridge(TOKENS) for name, bridge in bridges.items()}
    model = GraftedTransformer.from_pretrained(bridges, verbose=False)
    for name, bridge in bridges.items():
        close(model(TOKENS, graft=f"{name} @ all"), logits[name], name)
        assert _digest(bridge.original_model) == before[name]
        with torch.no_grad():
            assert torch.equal(bridge(TOKENS), logits[name])
            for parameter in bridge.original_model.parameters():
                parameter.zero_()
    theirs = sequential_graft(
        pair, TOKENS[0].tolist(), lambda c, l, p, h: "sft" if p == N - 1 or c == "k" else "pre"
    )
    close(model(TOKENS, graft="sft @ last | sft @ all : k")[0], theirs, "grafted")
    # The tokenizer came along, without the BOS that TransformerLens makes it put first.
    text = "Anders Lindqvist starred in"
    ids = torch.tensor([gpt2_style()(text)["input_ids"]])
    assert torch.equal(model.to_tokens(text), ids)
    with torch.no_grad():
        close(model(text, graft="sft @ all"), pair["sft"](ids).logits)


def test_a_bridge_beside_a_checkpoint_folder(tmp_path: Path) -> None:
    pair, bridges = _bridges("llama", tmp_path)
    model = GraftedTransformer.from_pretrained(
        {"pre": str(tmp_path / "pre"), "sft": bridges["sft"]}, verbose=False
    )
    theirs = sequential_graft(
        pair, TOKENS[0].tolist(), lambda c, l, p, h: "sft" if p == N - 1 else "pre"
    )
    close(model(TOKENS, graft="sft @ last")[0], theirs)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("no_processing", [False, True])
def test_compatibility_mode_is_refused(variant: str, no_processing: bool, tmp_path: Path) -> None:
    """Without processing the mode changes no weight, but it renames hooks: still boot anew."""
    _, bridges = _bridges(variant, tmp_path)
    bridges["sft"].enable_compatibility_mode(no_processing=no_processing)
    with pytest.raises(PairError, match=r"'sft'.*compatibility mode.*Boot it again"):
        GraftedTransformer.from_pretrained(bridges, verbose=False)


def test_hooks_caches_and_patching_run_in_this_version() -> None:
    """A short pass over what the other files test at length with one version only."""
    from transformer_lens import patching

    pair = tiny_pair("llama", seed=1)
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    tokens = TOKENS[:1]

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        return "sft" if position == N - 1 or (component == "o" and position == 3) else "pre"

    graft = "sft @ last | sft @ [3] : o"
    theirs, hidden = sequential_graft(pair, tokens[0].tolist(), choose, hidden=True)
    logits, cache = model.run_with_cache(tokens, graft=graft)
    close(logits[0], theirs)
    close(cache.accumulated_resid()[:, 0], hidden)
    whole = cache.get_full_resid_decomposition(expand_neurons=False)
    close(whole.sum(0)[0], hidden[-1])
    close(cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1), whole[:, :, -1])
    _, part = model.run_with_cache(tokens, graft=graft, pos_slice=[1, 9])
    close(part["rot_k", 1], cache["rot_k", 1][:, [1, 9]])
    other = TOKENS[1:]
    with model.grafted(graft):
        found = patching.get_act_patch_resid_pre(
            model, tokens, model.run_with_cache(other)[1], lambda x: x[0, -1, 17]
        )
    for p in range(N):
        swapped = copy.copy(tokens[0].tolist())
        swapped[p] = int(other[0, p])
        wanted = sequential_graft(pair, swapped, choose)[-1, 17]
        assert float(found[0, p]) == pytest.approx(float(wanted), abs=2e-4)
    assert model.generate(tokens, 3, graft=graft).shape == (1, N + 3)
