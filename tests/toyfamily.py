"""A toy family with a toy component, grafted, and a toy measure of it: run by `test_extending.py`
on an extended copy.

`mix` is a linear map after attention's output map, in a relative of Llama. Positions meet only in
attention, so a graft of it is plain arithmetic: another matrix at some rows.
"""

import copy

import torch
from torch import Tensor, nn
from toytokenizers import TOKENIZERS
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import logging

import graftlens
from graftlens import GraftedTransformer, Prompt, find, summarise, viz
from graftlens.components import GROUPS, Component
from graftlens.graft import Graft
from graftlens.lens.weights import weight_difference
from graftlens.model.sequential import Sequential
from graftlens.prompts import tokenize
from graftlens.sweep.scoring import Scorer

LAYERS, D_MODEL = 3, 24


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyAttention(LlamaAttention):
    def __init__(self, config: ToyConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mix = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        out, pattern = super().forward(*args, **kwargs)
        return self.mix(out), pattern


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = ToyAttention(config, index)


class At(nn.Module):
    """One map at some positions, another elsewhere."""

    def __init__(self, mine: nn.Linear, theirs: nn.Linear, positions: list[int]) -> None:
        super().__init__()
        self.mine, self.theirs, self.positions = mine, theirs, positions

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.mine.weight.T + self.mine.bias
        rows = x[:, self.positions]
        out[:, self.positions] = rows @ self.theirs.weight.T + self.theirs.bias
        return out


def toy(seed: int, vocab: int) -> ToyForCausalLM:
    config = ToyConfig(
        vocab_size=vocab,
        hidden_size=D_MODEL,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    model = ToyForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@torch.no_grad()
def main() -> None:
    logging.set_verbosity_error()
    AutoConfig.register("toy", ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
    tokenizer = TOKENIZERS["gpt2"]()
    sources = {name: toy(seed, len(tokenizer)) for seed, name in enumerate(("pre", "sft"))}
    # Loading compares each source's logits with its own model's.
    model = GraftedTransformer.from_pretrained(sources, tokenizer=tokenizer, verbose=False)
    prompt = Prompt(
        "The movie {title} was directed by", {"title": "Winter's End"}, answer=" José Núñez-Peña"
    )
    tokens = tokenize(prompt, tokenizer)
    ids = torch.tensor([tokens.ids])
    (title,) = tokens.spans["title"]

    def plainly(layers: list[int], positions: list[int]) -> Tensor:
        grafted = copy.deepcopy(sources["pre"])
        for layer in layers:
            mine = grafted.model.layers[layer].self_attn
            theirs = sources["sft"].model.layers[layer].self_attn
            mine.mix = At(mine.mix, theirs.mix, positions)
        return grafted(ids, use_cache=False).logits[0]

    mix = Component("mix")
    assert mix in model.arch.components
    assert mix in GROUPS["attn"]
    assert "mix" in repr(model)

    # A mask, and one graft.
    mask = model.resolve("sft @ title : mix : 1", prompt)
    chosen = [int(source) for source in mask.source_index(mix, 1)[0]]
    assert chosen == [int(place in title) for place in range(len(tokens))]
    assert not mask.source_index(mix, 0).any()
    close(model(prompt, graft=mask)[0], plainly([1], list(title)))
    attn = model.resolve("sft @ last : attn", prompt).source_index(mix, 2)[0]
    assert [int(source) for source in attn] == [0] * (len(tokens) - 1) + [1]

    # A sweep, each cell as by itself.
    last = len(tokens) - 1
    grafts = {"PRE": Graft(), "SFT": Graft.rule("sft")}
    places = {"title": list(title), "last": [last]}
    for name in places:
        for layer in range(LAYERS):
            grafts[f"{name} {layer}"] = Graft.rule("sft", at=name, components="mix", layers=[layer])
    scorer = Scorer(model, grafts, answers="first", measures=["confidence"])
    table = scorer.table({0: prompt}).set_index("graft")
    answer = int(table["target_id"].iloc[0])
    expected = {name: sources[name.lower()](ids).logits[0] for name in ("PRE", "SFT")}
    for name, positions in places.items():
        for layer in range(LAYERS):
            expected[f"{name} {layer}"] = plainly([layer], positions)
    for name, logits in expected.items():
        logprob = float(logits[last].log_softmax(-1)[answer])
        assert abs(table["logprob"][name] - logprob) < 1e-4, name
        confidence = float(logits[last].log_softmax(-1).max())
        assert abs(table["confidence"][name] - confidence) < 1e-4, name
    # What a map after attention does at the title in the last layer, no later position reads.
    assert table["logprob"].nunique() == len(grafts) - 1
    assert table["logprob"][f"title {LAYERS - 1}"] == table["logprob"]["PRE"]

    # Attribution and exact effects, by the same measure.
    given = {"positions": ["title", "rest"], "metric": "confidence"}
    effects = find.exact_effects(model, prompt, "sft", within="sft @ all : mix", **given)
    alone = effects.set_index(["position", "layer"])["alone"]
    for layer in range(LAYERS):
        gained = table["confidence"][f"title {layer}"] - table["confidence"]["PRE"]
        assert abs(alone["title", layer] - gained) < 1e-4
    scores = find.attribute(model, prompt, "sft", steps=1, **given)
    first = scores[(scores["component"] == "mix") & (scores["position"] == "title")]["at_base"]
    for layer in range(LAYERS):
        around = (f"{s}*sft @ title : mix : {layer}" for s in (1e-2, -1e-2))
        ends = [float(model(prompt, graft=g)[0, -1].log_softmax(-1).max()) for g in around]
        assert abs(first.iloc[layer] - (ends[0] - ends[1]) / 2e-2) < 1e-2 * first.abs().max()

    # The measure in statistics and plots.
    summary = summarise(
        table.reset_index(), by=(), full="SFT", metrics=["confidence"], recovery="confidence"
    )
    for at, row in summary.set_index("graft").iterrows():
        assert abs(row["confidence"] - table["confidence"][at]) < 1e-6
    assert set(summary["recovery_of"]) == {"confidence"}
    axis = viz.grouped_bars(summary, "confidence").layout.yaxis.title.text
    assert axis == "confidence (nats)", axis

    # The paper's algorithm on Hugging Face's modules.
    for graft in (grafts["title 1"], Graft.parse("sft @ title : attn | sft @ last : mlp")):
        close(Sequential(model).logits(tokens, graft), model(prompt, graft=graft)[0])

    # Views of the weights.
    for source, own in enumerate(sources.values()):
        for layer, block in enumerate(own.model.layers):
            assert torch.equal(model.W_mix[source, layer], block.self_attn.mix.weight.T)
    rows = weight_difference(model).query("component == 'mix'")
    assert len(rows) == 2 * LAYERS
    print(graftlens.__file__)


main()
