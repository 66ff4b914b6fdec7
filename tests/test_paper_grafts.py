"""The published code's grafts: equal to a plain copy of what it does, module by module."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTiny
from families import save_checkpoint, tiny_model
from toytokenizers import llama3_style
from transformers import DynamicCache, LlamaConfig

from graftlens import ConfigError, Graft, Prompt, SweepConfig, paper_grafts
from graftlens.configfile import settings_from
from graftlens.model.arch import architecture
from graftlens.sweep import paper
from graftlens.sweep.config import check, load_config
from graftlens.sweep.paper import published

TEXT = "News: Ann Lee stars with"
PROMPT = {"template": "News: {first_entity} stars with", "fields": {"first_entity": "Ann Lee"}}
PARTS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
)


def by_copies(base: Any, donor: Any, ids: list[int], wanted: dict[int, list[int]]) -> torch.Tensor:
    """The logits at the last token: for each token a copy of the base, into whose modules the
    donor's are loaded where `wanted` has layers for it, as the published code does it: embeddings
    by the module's state, and never the final norm or the head by its own name."""
    cache, logits = DynamicCache(), None
    for place, token in enumerate(ids):
        model = copy.deepcopy(base)
        if wanted.get(place):
            model.model.embed_tokens.load_state_dict(donor.model.embed_tokens.state_dict())
            for layer in wanted[place]:
                for part in PARTS:
                    own = model.model.layers[layer].get_submodule(part)
                    own.load_state_dict(donor.model.layers[layer].get_submodule(part).state_dict())
        with torch.no_grad():
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        logits = out.logits[0, -1]
    assert logits is not None
    return logits


@pytest.mark.parametrize("variant", ["llama3-rope-tied", "llama"])
@pytest.mark.parametrize("kind", ["positions", "quarters", "eighths"])
def test_they_equal_copies_with_modules_loaded(variant: str, kind: str, tiny: MakeTiny) -> None:
    t = tiny(variant, tokenizer="llama3")
    prompt = Prompt(PROMPT["template"], PROMPT["fields"])
    (tokens,) = t.model.tokenized(prompt)
    ids, entity = list(tokens.ids), [i for run in tokens.spans["first_entity"] for i in run]
    n, last = t.model.arch.n_layers, len(ids) - 1
    q = n // 4
    layers = {
        "first quarter": range(q), "second quarter": range(q, 2 * q),
        "third quarter": range(2 * q, 3 * q), "fourth quarter": range(3 * q, n),
        "first eighth": range(q // 2), "second eighth": range(q // 2, q),
        "third eighth": range(2 * q, 3 * q // 2), "fourth eighth": range(3 * q // 2, 2 * q),
        "fifth eighth": range(2 * q, 5 * q // 2), "sixth eighth": range(5 * q // 2, 3 * q),
    }  # fmt: skip
    places = {"FE": entity, "LT": [last], "FE+LT": [*entity, last]}
    rest = set(range(len(ids)))
    places |= {"(FE+LT)^C": rest - {*entity, last}, "not-FE": rest - {*entity}}
    places |= {"not-LT": rest - {last}}
    grafts = paper_grafts(t.model, kind)
    seen = 0
    for name, graft in grafts.items():
        if name in ("PRE", "SFT"):
            continue
        where, _, which = name.partition(", ")
        chosen = list(layers[which]) if which else list(range(n))
        theirs = by_copies(*t.sources.values(), ids, dict.fromkeys(places[where], chosen))
        ours = t.model(prompt, graft=graft)[0, -1]
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
        seen += 1
    assert seen == {"positions": 6, "quarters": 12, "eighths": 18}[kind]


def test_what_they_are_by_depth_and_tying() -> None:
    lt = published("positions", None, True, "sft")["LT"]
    assert str(lt) == "sft @ last : embed + unembed + block"
    assert str(published("positions", None, False, "sft")["LT"]) == "sft @ last : embed + block"

    deep = architecture(LlamaConfig(num_hidden_layers=30))
    assert [list(r) for r in paper._quarters(30)][3] == [*range(21, 30)]
    assert [len(r) for r in paper._eighths(30)] == [3, 4, 0, 4, 3, 4]
    eighth = published("eighths", deep, False, "sft")["LT, third eighth"]
    assert eighth == Graft(), "its range is empty, so nothing is grafted"
    hybrid = published("hybrid", deep, False, "sft")["hybrid"]
    assert "mlp_gate" not in str(hybrid)
    assert str(hybrid.rules[1]) == "relation @ last : o + mlp_in + mlp_out : 14-29"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("tied"), llama3_style()
    models = {
        name: tiny_model("llama3-rope-tied", seed=seed, vocab_size=len(tokenizer))
        for seed, name in enumerate(("pre", "sft"))
    }
    return {n: str(save_checkpoint(m, folder / n, tokenizer)) for n, m in models.items()}


def config(pair: dict[str, str], **more: Any) -> SweepConfig:
    given = {"sources": pair, "prompts": [PROMPT | {"answer": " Bo"}]}
    return settings_from(SweepConfig, given | more)


def test_configs_take_them_by_a_word(pair: dict[str, str]) -> None:
    checked = check(config(pair, grafts="paper"))
    rules = {named.name: str(named.graft) for named in checked.grafts}
    assert rules["LT"] == "sft @ last : embed + unembed + block"
    assert list(rules)[:4] == ["PRE", "SFT", "FE", "LT"]
    assert (checked.base, checked.full) == ("PRE", "SFT")
    more = check(config(pair, paper="components", grafts={"mine": "sft @ last : mlp_gate"}))
    assert {"O+FFN", "mine"} <= {named.name for named in more.grafts}
    other = {"base": pair["pre"], "chat": pair["sft"]}
    named = check(config(other, grafts="paper quarters")).grafts
    assert {n.graft.sources for n in named if n.name.startswith("LT")} == {("chat",)}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"grafts": "papers"}, "grafts: 'papers' is not a mapping of names to grafts"),
        ({"grafts": "paper quarter"}, "kind='quarter' is unknown. Allowed: positions components"),
        ({"grafts": "paper hybrid"}, "no source 'task'. There are: pre sft."),
        ({"paper": "positions", "grafts": {"FE": "sft @ last"}}, "grafts.FE: the paper's grafts"),
    ],
)
def test_what_is_wrong_is_said(pair: dict[str, str], more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(pair, **more)
    assert said in str(caught.value)


def test_an_unknown_kind_is_refused(tiny: MakeTiny) -> None:
    with pytest.raises(ValueError, match=r"kind='halves' is unknown. Allowed: positions"):
        paper_grafts(tiny("llama").model, "halves")


def test_a_config_file_may_say_it(pair: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        f"sources: {{pre: {pair['pre']}, sft: {pair['sft']}}}\ngrafts: paper\n"
        'prompts: [{template: "{first_entity} and", fields: {first_entity: Ann}, answer: " Bo"}]\n'
    )
    assert load_config(file).paper == "positions"
    assert load_config(file, ["grafts=paper components"]).paper == "components"
