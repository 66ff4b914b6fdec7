"""Pairs of tiny Llamas made by hand, in which two places are an AND, an OR, or just add up."""

from typing import Any, Literal

import torch
from toytokenizers import llama3_style
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

Kind = Literal["and", "or", "additive"]

#: The residual's directions: two that tokens begin with, and the one that the answer is read from.
EVEN, ODD, ANSWER = 0, 1, 2
WIDTH = 16

#: The two places of each pair, as grafts of the finetuned source.
PLACES: dict[Kind, tuple[str, str]] = {
    "and": ("sft @ last : mlp_gate : 0", "sft @ last : mlp_in : 0"),
    "or": ("sft @ last : mlp_out : 0", "sft @ last : mlp_out : 1"),
    "additive": ("sft @ last : mlp_out : 0", "sft @ last : mlp_out : 1"),
}


def gated(kind: Kind, facts: int = 12) -> tuple[GraftedTransformer, list[Prompt]]:
    """A pair and prompts, each about a fact of its own, whose answer only SFT gives.

    Attention writes nothing. A neuron is silu(gate · x) · (in · x), written by `out` into the
    direction that the answer's logit reads.

    - `and`: gate and in of one neuron are 0 in PRE, so that either alone writes nothing.
    - `or`: the neurons of two layers write far more than the rest of the residual holds, so that
      after the final norm either alone is as good as both.
    - `additive`: one layer's neuron answers to tokens of even number, the other's to those of odd
      number: of each fact, one place does all and the other nothing.
    """
    tokenizer = llama3_style()
    pair = {name: _source(kind, name == "sft", tokenizer) for name in ("pre", "sft")}
    model = GraftedTransformer.from_pretrained(
        pair, tokenizer=tokenizer, check=False, verbose=False
    )
    endings = "abcdefghijklmnopqrstuvwxyz"[:facts]
    return model, [
        Prompt("{first_entity} and " + end, {"first_entity": "Ann", "fact": end}, "!")
        for end in endings
    ]


def _source(kind: Kind, finetuned: bool, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    answer = tokenizer("x!", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        tokens: Any = model.model.embed_tokens.weight
        tokens[:] = 0.3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
        tokens[:, [EVEN, ODD, ANSWER]] = 0.0
        even = torch.arange(len(tokens)) % 2 == 0
        if kind == "additive":
            tokens[even, EVEN], tokens[~even, ODD] = 1.0, 1.0
        else:
            tokens[:, EVEN] = 1.0
        head: Any = model.lm_head.weight
        head[:] = 0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(2))
        head[:, [EVEN, ODD, ANSWER]] = 0.0
        head[answer] = 0.0
        head[answer, ANSWER] = 5.0
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            mlp: Any = layer.mlp
            for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                matrix.weight.zero_()
            reads = ODD if kind == "additive" and number == 1 else EVEN
            if kind == "and" and number == 1:
                continue
            if kind != "and" or finetuned:
                mlp.gate_proj.weight[0, reads] = 2.0
                mlp.up_proj.weight[0, reads] = 2.0
            if kind == "and" or finetuned:
                mlp.down_proj.weight[ANSWER, 0] = 100.0
    return model
