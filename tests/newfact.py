"""A family that needs a new fact of `Architecture`: run by `test_extending.py` on an extended copy.

Granite multiplies what attention and MLP add to the residual stream. All is compared with Hugging
Face's own models.
"""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from toytokenizers import TOKENIZERS
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.utils import logging

import graftlens
from graftlens import GraftedTransformer, Prompt, lens
from graftlens.graft import Graft
from graftlens.model.sequential import Sequential
from graftlens.prompts import tokenize
from graftlens.sweep.scoring import Scorer

LAYERS = 3
FACTORS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.7,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.0,
}


def granite(seed: int, vocab: int, **changes: float) -> GraniteForCausalLM:
    torch.manual_seed(seed)
    config = GraniteConfig(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **FACTORS | changes,
    )
    model = GraniteForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def refused(sft: GraniteForCausalLM, said: str) -> None:
    sources = {"pre": granite(0, sft.config.vocab_size), "sft": sft}
    with pytest.raises(ValueError, match=re.escape(said)):
        GraftedTransformer.from_pretrained(sources, verbose=False)


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    tokenizer = TOKENIZERS["gpt2"]()
    vocab = len(tokenizer)
    sources = {name: granite(seed, vocab) for seed, name in enumerate(("pre", "sft"))}
    # Loading compares each source's logits with its own model's.
    model = GraftedTransformer.from_pretrained(sources, tokenizer=tokenizer, verbose=False)
    prompt = Prompt("The movie {title} was directed by", {"title": "Winter's End"}, answer=" José")
    tokens = tokenize(prompt, tokenizer)
    ids = torch.tensor([tokens.ids])
    pre, sft = (sources[name](ids).logits[0] for name in ("pre", "sft"))
    close(model(prompt)[0], pre)
    close(model(prompt, graft="sft @ all")[0], sft)
    # The factor is one that shows.
    plain = granite(0, vocab, residual_multiplier=1.0)(ids).logits[0]
    assert float((plain - pre).abs().max() / pre.abs().max()) > 0.05

    # A layer's modules of the other source at all positions.
    for component, module in (("mlp", "mlp"), ("attn", "self_attn")):
        grafted = copy.deepcopy(sources["pre"])
        setattr(grafted.model.layers[1], module, getattr(sources["sft"].model.layers[1], module))
        ours = model(prompt, graft=f"sft @ all : {component} : 1")[0]
        close(ours, grafted(ids, use_cache=False).logits[0])
    # The paper's algorithm on Hugging Face's modules, some positions each.
    grafts = {
        "title": Graft.parse("sft @ title : mlp_out | sft @ last : attn"),
        "last": Graft.parse("sft @ last"),
    }
    expected = {name: Sequential(model).logits(tokens, graft) for name, graft in grafts.items()}
    for name, graft in grafts.items():
        close(expected[name], model(prompt, graft=graft)[0])
    # A sweep, whose forward runs on a tree.
    runs = {"PRE": Graft(), "SFT": Graft.rule("sft"), **grafts}
    table = Scorer(model, runs, answers="first").table({0: prompt}).set_index("graft")
    answer = int(table["target_id"].iloc[0])
    for name, logits in {"PRE": pre, "SFT": sft, **expected}.items():
        logprob = float(logits[-1].log_softmax(-1)[answer])
        assert abs(table["logprob"][name] - logprob) < 1e-4, name

    # Attributions add up to the logit, which is Hugging Face's.
    for by in ("component", "head", "src_pos"):
        terms = lens.direct_logit_attribution(model, prompt, grafts, by=by)
        for name, part in terms.groupby("graft"):
            logit = float({"PRE": pre, "SFT": sft, **expected}[str(name)][-1, answer])
            assert abs(part["contribution"].sum() - logit) < 1e-3 * max(1, abs(logit)), (by, name)

    refused(granite(1, vocab, logits_scaling=8.0), "granite with logits_scaling=8.0")
    refused(granite(1, vocab, residual_multiplier=0.5), "residual_scale (0.4 and 0.5)")
    refused(granite(1, vocab, residual_multiplier=float("nan")), "residual_scale=nan")
    print(graftlens.__file__)


main()
