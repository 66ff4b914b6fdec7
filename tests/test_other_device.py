"""A run reads no number of a device that is not the CPU, and makes no tensor beside it.

PyTorch's `meta` device has shapes and no numbers: reading one raises, and so do most mixtures of
devices, which raise or wait on a GPU. Of values it says nothing.
"""

import copy
import random

import pytest
import torch
from conftest import MakeTiny
from loras import adapted
from test_laws import EACH_FAMILY, LENGTH, _join, _random_rules, _tokens
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer

BATCH = torch.tensor([_tokens(seed=1), _tokens(seed=2)])


def _run(model: GraftedTransformer, graft: Graft) -> None:
    """With nothing attached, with a hook on everything, and backward."""

    def watch(value: Tensor, hook: HookPoint) -> Tensor:
        assert value.device.type == "meta", hook.name
        return value * 1

    _, cache = model.run_with_cache(BATCH, graft=graft)
    assert {value.device.type for value in cache.values()} == {"meta"}
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.run_with_hooks(BATCH, graft=graft, fwd_hooks=[(lambda name: True, watch)])
    model.set_use_attn_result(False)
    model.set_use_split_qkv_input(False)
    model.requires_grad_(True)
    logits = model(BATCH, graft=graft)
    assert logits.shape == (*BATCH.shape, model.cfg.d_vocab)
    logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@EACH_FAMILY
def test_random_grafts_run_where_no_number_can_be_read(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, ("pre", "task", "relation"))
    rng = random.Random(variant)
    graft = _join(_random_rules(t, rng, 8, LENGTH)) | Graft.parse("0.5*task @ last : mlp + attn")
    t.model.to("meta")
    for given in (Graft(), Graft.rule("task")):
        assert t.model(BATCH, graft=given).device.type == "meta"
    _run(t.model, graft)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_so_do_grafts_of_adapters(variant: str) -> None:
    model = copy.deepcopy(adapted(variant).model).to("meta")
    assert model(BATCH, graft="task @ all").device.type == "meta"
    _run(model, Graft.parse("task @ last | relation @ [1, 2] : q + mlp_out | 0.5*task @ [3]"))
