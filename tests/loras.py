"""Tiny models with LoRA adapters of many shapes, and the same merged by PEFT."""

import copy
from functools import cache
from typing import Any

import torch
from conftest import Tiny
from families import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from graftlens.model.grafted import GraftedTransformer

EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}

load = GraftedTransformer.from_pretrained
built = cache(tiny_model)


def moved(model: Any, seed: int) -> Any:
    """A PeftModel whose every trainable number is drawn anew around what it was."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()


def on(base: PreTrainedModel, seed: int = 1, **options: Any) -> Any:
    """A copy of the base with an adapter."""
    settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings | options))
    return moved(model, seed)


def everywhere(base: PreTrainedModel) -> dict[str, Any]:
    """Options of an adapter on the embedding, the head and the maps of one layer, with biases."""
    table = EMBEDDING.get(base.config.model_type, "embed_tokens")
    maps = r"(attn|mlp|self_attn|attention)\.\w*(proj|attn|fc|dense|value|4h|_h)"
    return {
        "target_modules": rf"(.*\.)?({table}|lm_head)|.*\.1\.{maps}",
        "bias": "all",
        "use_rslora": True,
        "rank_pattern": {table: 2},
        "alpha_pattern": {"lm_head": 11},
    }


def merged(model: Any) -> PreTrainedModel:
    """What PEFT makes of a PeftModel's copy; tied embeddings are two first."""
    ours = copy.deepcopy(model)
    plain = ours.get_base_model()
    table, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    table, head = (getattr(module, "base_layer", module) for module in (table, head))
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    assert head.weight is not table.weight
    return ours.merge_and_unload().eval().requires_grad_(False)


@cache
def adapted(variant: str) -> Tiny:
    """A base with two adapters as sources `task` and `relation`, and PEFT's merged models."""
    base = built(variant, 4)
    given = {"task": on(base, 1), "relation": on(base, 2, **everywhere(base))}
    sources = {"pre": base} | {name: merged(model) for name, model in given.items()}
    return Tiny(variant, sources, load({"pre": base, **given}, verbose=False), None)
