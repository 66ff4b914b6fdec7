"""LoRA adapters in their factors: grafts, sweeps, views and memory, against PEFT's own models."""

import copy
import json
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from families import save_checkpoint
from loras import adapted, built, everywhere, load, merged, moved, on
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from test_laws import EACH_FAMILY, _close, _run_watched
from test_strengths import _join, _oracle, _random_rules, _tokens
from torch import Tensor

from graftlens.components import Component
from graftlens.evaluation import position_grafts
from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution, weight_difference
from graftlens.model import linear
from graftlens.model.additions import LowRank, RowVectors
from graftlens.model.arch import PairError, UnsupportedArchitectureError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.sequential import Sequential
from graftlens.model.weights import Sourced
from graftlens.planner import Branches, Planner
from graftlens.prompts import Prompt
from graftlens.sweep.scoring import score
from graftlens.sweep.trust import trust_report

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

IDS = torch.tensor([_tokens(0), _tokens(1)])


@pytest.fixture
def llama() -> Tiny:
    return adapted("llama")


def storage(model: GraftedTransformer) -> int:
    """Bytes of all that the model holds, each storage once."""
    held = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()
    )


# -- grafts ------------------------------------------------------------------------------------


@EACH_FAMILY
def test_random_grafts_of_adapters_are_the_sequential_algorithm(variant: str) -> None:
    """Positions, heads, neurons and strengths, against real parameters that PEFT merged."""
    t = adapted(variant)
    for seed, n_rules in enumerate((4, 12)):
        rules = _random_rules(t, random.Random(f"{variant}{seed}"), n_rules)
        tokens = _tokens(seed)
        theirs = _oracle(t, tokens, rules)
        graft, batch = _join(rules), torch.tensor([tokens])
        with torch.no_grad():
            _close(t.model(batch, graft=graft)[0], theirs)
            _close(_run_watched(t.model, batch, graft, split=bool(seed))[0], theirs)


@EACH_FAMILY
def test_whole_adapters_are_their_own_models(variant: str) -> None:
    t = adapted(variant)
    for name in t.sources:
        for row, tokens in zip(t.model(IDS, graft=f"{name} @ all"), IDS, strict=True):
            _close(row, t.logits(name, tokens.tolist()))


def test_the_product_with_what_adapters_share_is_one_for_all_rows(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of three sources, position by position, and of mixtures of them."""
    shared = {w.like.data_ptr(): w for w in llama.model.stored() if w.like.ndim == 2}
    assert all(len(weight.variants) == 1 for weight in shared.values())
    rows: dict[int, list[int]] = {}
    original = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in shared:
            rows.setdefault(weight.data_ptr(), []).append(len(x))
        return original(x, weight, bias)

    monkeypatch.setattr(linear.F, "linear", counted)
    llama.model(IDS, graft="task @ [1, 2] | relation @ last | 0.5*relation @ [1, 3] | task @ [5]")
    maps = len(shared) - 1  # the embedding is looked up
    assert len(rows) == maps
    assert all(found == [IDS.numel()] for found in rows.values())


def test_many_adapters_in_one_batch() -> None:
    """Their rows are neither in order nor next to each other."""
    base = built("qwen3", 4)
    models = {f"a{seed}": on(base, seed, r=1 + seed % 4) for seed in range(7)}
    model = load({"pre": base, **models}, verbose=False)
    rng = random.Random(0)
    graft = Graft()
    for place in range(1, IDS.shape[1]):
        graft |= Graft.rule(rng.choice(list(models)), [place])
    whole = load({"pre": base, **{n: merged(m) for n, m in models.items()}}, verbose=False)
    _close(model(IDS, graft=graft), whole(IDS, graft=graft))


# -- what a source can be ----------------------------------------------------------------------


def in_factors(model: GraftedTransformer) -> bool:
    """Whether no matrix is held twice."""
    return all(len(w.variants) == 1 for w in model.stored() if w.like.ndim == 2)


def off(model: GraftedTransformer, peft: Any, source: str = "sft") -> float:
    with torch.no_grad():
        wanted = peft(input_ids=IDS, use_cache=False).logits
        ours = model(IDS, graft=f"{source} @ all")
    return float((ours - wanted).abs().max() / wanted.abs().max())


KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "a transposed map": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "a transposed map, said so": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "fused by head": ("neox-parallel", {"target_modules": ["query_key_value"]}),
    "fused one below the other": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "an embedding": ("gemma2", {"target_modules": ["embed_tokens"]}),
    "a tied head": ("llama3-rope-tied", {"target_modules": ["lm_head"]}),
    "both of a tied pair": ("gpt2", {"target_modules": ["lm_head", "wte", "wpe"]}),
    "biases of its layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "a bias of B's own": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "tokens of a tied pair": (
        "llama3-rope-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": IDS[0, :2].tolist()},
    ),
    "a parameter": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "a transposed parameter": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["attn.c_attn.weight", "c_fc.weight"]},
    ),
    "scales and ranks": (
        "llama",
        {
            "use_rslora": True,
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {r"layers\.1\..*v_proj": 20},
        },
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_adapters_are_kept_in_factors(kind: str, tmp_path: Path) -> None:
    variant, options = KEPT[kind]
    base = built(variant, 4)
    peft = on(base, **options)
    peft.save_pretrained(tmp_path)
    own = copy.deepcopy(peft.get_base_model())  # what was loaded is not changed by being a source
    for sft in (tmp_path, peft):
        with warnings.catch_warnings():  # PEFT asks models by names that transformers deprecates
            warnings.simplefilter("error", FutureWarning)
            model = load({"pre": base, "sft": sft}, verbose=False)
        assert in_factors(model)
        assert off(model, peft) < 1e-5
        assert float((model(IDS) - model(IDS, graft="sft @ all")).abs().max()) > 1e-3
    for name, tensor in own.state_dict().items():
        assert torch.equal(peft.get_base_model().state_dict()[name], tensor)


def test_several_active_adapters_add_up() -> None:
    base = built("llama", 4)
    peft = on(base, target_modules=["q_proj", "down_proj"])
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, "modules_to_save": ["lm_head"]}
    peft.add_adapter("more", LoraConfig(**options))
    peft.add_adapter("idle", LoraConfig(target_modules=["q_proj"]))
    peft.base_model.set_adapter(["default", "more"])
    peft = moved(peft, 3)
    model = load({"pre": base, "sft": peft}, verbose=False)
    q = model.module_of(Component.Q, 0).weight
    assert [type(one) for one in q.additions(1)] == [LowRank, LowRank]
    assert off(model, peft) < 1e-5
    peft.set_adapter("default")
    assert off(load({"pre": base, "sft": peft}, verbose=False), peft) < 1e-5


def test_adapters_that_are_merged_in_place_or_scaled() -> None:
    base = built("llama", 4)
    peft = on(base)
    for layer in peft.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.3)
    model = load({"pre": base, "sft": peft}, verbose=False)
    assert off(model, peft) < 1e-5
    peft.merge_adapter()
    model = load({"pre": base, "sft": peft}, verbose=False)
    assert not in_factors(model)
    assert off(model, peft) < 1e-5


def test_adapters_that_are_switched_off_are_refused() -> None:
    base = built("llama", 4)
    peft = on(base)
    peft.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load({"pre": base, "sft": peft})
    assert re.fullmatch(
        r"source 'sft': the model's adapters are switched off \(in model\.layers\.0\.\S+\), so it "
        r"runs as its base\. Switch them on \(model\.base_model\.enable_adapter_layers\(\)\), or "
        r"give the base\.",
        str(caught.value),
    )


def test_other_kinds_are_merged_and_the_model_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = built("llama", 4)
    dora = on(base, use_dora=True, target_modules=["q_proj"])
    dora.save_pretrained(tmp_path)
    ia3 = get_peft_model(
        copy.deepcopy(base), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    ia3 = moved(ia3, 5)
    model = load({"pre": base, "dora": tmp_path, "ia3": ia3, "lora": on(base)})
    assert off(model, dora, "dora") < 1e-5
    assert off(model, ia3, "ia3") < 1e-5
    said = capsys.readouterr().out
    told = model.differences.query("key == 'adapter'")
    assert told["source"].tolist() == ["dora", "ia3"]
    assert said.count("in float32") == 2
    assert "graftlens: dora: adapter" in said
    assert len(model.module_of(Component.Q, 0).weight.variants) == 2  # the base's and dora's
    assert len(model.module_of(Component.V, 0).weight.variants) == 1


def test_an_adapter_that_adds_nothing_is_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    base = built("llama", 4)
    new = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    model = load({"pre": base, "sft": new})
    assert "ALL SOURCES ARE IDENTICAL" in capsys.readouterr().out
    assert model.equal_sources(Component.Q, 0) == (0, 0)


def test_equal_adapters_are_one() -> None:
    base = built("llama", 4)
    model = load({"pre": base, "a": on(base, 1), "b": on(base, 1), "c": on(base, 2)}, verbose=False)
    assert model.equal_sources(Component.Q, 0) == (0, 1, 1, 3)
    prints = model.fingerprints()
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3


def test_a_fingerprint_covers_factors_and_scale(tmp_path: Path) -> None:
    base = built("llama", 4)
    on(base, 1).save_pretrained(tmp_path)
    before = load({"pre": base, "sft": tmp_path}, verbose=False).fingerprints()
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 7}))
    after = load({"pre": base, "sft": tmp_path}, verbose=False).fingerprints()
    assert before["pre"] == after["pre"]
    assert before["sft"] != after["sft"]


def test_an_adapter_of_a_model_that_says_its_name(tmp_path: Path) -> None:
    base = copy.deepcopy(built("llama", 4))
    peft = on(base)
    peft.peft_config["default"].base_model_name_or_path = "org/one-model"
    peft.save_pretrained(tmp_path)
    base.config._name_or_path = "org/another"
    with pytest.warns(
        UserWarning, match=r"says that it was trained on org/one-model; here it is applied to org/a"
    ):
        load({"pre": base, "sft": tmp_path}, verbose=False)


def test_adapters_of_the_smaller_of_two_vocabularies() -> None:
    """Their tables stay in factors, and have no rows for the tokens that they lack."""
    base, larger = built("llama", 4), built("llama", 5, vocab_size=105)
    peft = on(base, **everywhere(base))
    model = load({"pre": base, "sft": peft, "large": larger}, verbose=False)
    whole = load({"pre": base, "sft": merged(peft), "large": larger}, verbose=False)
    for name in ("embed", "unembed"):
        weight = model.weights_of(Component(name), None)[0]
        assert len(weight.variants) == 2
        assert weight.adding == {1}
    for graft in ("sft @ all", "sft @ [1] | large @ [2, 3]", "0.5*sft @ all"):
        ours, theirs = model(IDS, graft=graft), whole(IDS, graft=graft)
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(model.W_U, whole.W_U, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["saved whole", "with adapters", "tied"])
def test_a_folder_with_tables_of_more_tokens(kind: str, tmp_path: Path) -> None:
    """As finetuning with added tokens saves it: its tables are the larger."""
    base = built("llama3-rope-tied" if kind == "tied" else "llama", 4)
    few = base.config.vocab_size
    own = copy.deepcopy(base)
    own.resize_token_embeddings(few + 5, mean_resizing=False)
    tables = ["embed_tokens", "lm_head"]
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": tables}
    if kind == "with adapters":
        options = {"target_modules": ["q_proj", *tables]}
    peft = on(own, **options)
    peft.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = load({"pre": base, "sft": tmp_path}, verbose=False)
    assert model.vocabularies.sizes == (few, few + 5)
    assert off(model, peft) < 1e-5
    assert bool(model(IDS)[..., few:].isneginf().all())
    assert base.config.vocab_size == few
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_half_precision_files_below_a_float32_adapter(tmp_path: Path) -> None:
    base = copy.deepcopy(built("llama3-rope-tied", 4))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    save_checkpoint(copy.deepcopy(base).to(torch.bfloat16), tmp_path / "base")
    peft = on(base, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    peft.save_pretrained(tmp_path / "adapter")
    model = load({"pre": tmp_path / "base", "sft": tmp_path / "adapter"}, verbose=False)
    assert in_factors(model)
    assert off(model, peft) < 1e-5
    narrow = load(
        {"pre": tmp_path / "base", "sft": tmp_path / "adapter"}, dtype="bfloat16", verbose=False
    )
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert off(narrow, peft) < 0.05


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["folders", "models"])
def test_fifty_adapters_take_little_more_than_the_base(given: str, tmp_path: Path) -> None:
    base = built("gpt2", 4)
    options = {"r": 1, "target_modules": ["c_attn", "wte"], "bias": "lora_only"}
    sources: dict[str, Any] = {"pre": base}
    own = 0
    peft = on(base, **options)
    for seed in range(50):
        if given == "models":
            peft = on(base, seed, **options)
        else:
            moved(peft, seed).save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        own += sum(p.numel() * p.element_size() for p in peft.parameters() if p.requires_grad)
        sources[f"a{seed}"] = tmp_path / str(seed) if given == "folders" else peft
    model = load(sources, verbose=False, check=False)
    alone = sum(p.numel() * p.element_size() for p in base.parameters())
    assert storage(model) <= 1.05 * (alone + own)
    copied = copy.deepcopy(model).to(torch.float64)
    assert storage(copied) <= 2 * 1.05 * (alone + own), "what is shared still is in another dtype"


# -- sweeps, trust, generation ------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept() -> tuple[GraftedTransformer, dict[str, Graft]]:
    from toytokenizers import TOKENIZERS

    tokenizer = TOKENIZERS["llama3"]()
    base = built("llama", 4, vocab_size=len(tokenizer))
    adapters = {name: on(base, seed, r=2) for seed, name in enumerate(("a", "b"))}
    adapters["c"] = on(base, 9, target_modules=["o_proj"], layers_to_transform=[1])
    model = load({"pre": base, **adapters}, tokenizer=tokenizer, verbose=False)
    grafts = {f"{n} {k}": g for n in adapters for k, g in position_grafts(n).items()}
    return model, grafts | {
        "half": Graft.parse("0.5*a @ last | b @ first_entity : mlp_in : 0 : n3")
    }


PROMPTS = [
    Prompt(text, {"first_entity": who}, answer=" Mara Finn", distractors=("!", " Mara"))
    for text in ("{first_entity} plays with", "In a film, {first_entity} was seen next to")
    for who in ("Ann", "Zoë Reed-Lang")
]
ASKED = dict(enumerate(PROMPTS))


def test_sweeps_of_adapters_are_the_grafts_one_by_one(swept: Any) -> None:
    model, grafts = swept
    together = score(model, ASKED, grafts)
    for name, graft in grafts.items():
        alone = score(model, ASKED, {name: graft})
        mine = together[together["graft"] == name]
        assert mine["logprob"].to_numpy() == pytest.approx(alone["logprob"].to_numpy(), abs=1e-4)


def test_sweeps_of_adapters_are_trusted(swept: Any) -> None:
    """By the sequential algorithm on parameters that are multiplied out."""
    model, grafts = swept
    table = score(model, ASKED, grafts)
    report = trust_report(model, ASKED, grafts, table, cells=12, seed=0)
    assert report.ok, report


def test_rows_are_shared_where_an_adapter_changes_nothing(swept: Any) -> None:
    """`c` is one map of one layer: below it, its rows are the base's."""
    model, _ = swept
    (tokens,) = model.tokenized([PROMPTS[0]])

    def rows(grafts: list[str]) -> list[int]:
        parsed = [Graft.parse(graft) for graft in grafts]
        planner = Planner(model.arch, model.sources, parsed, model.equal_sources)
        branches = Branches.of(tokens.ids, [(5,)])
        structure, _ = planner.structure(tokens, branches)
        (piece,) = planner.pieces(structure)
        return [len(layer.queries) for layer in piece.tree.layers]

    n = len(tokens.ids)
    assert rows(["none", "c @ all"]) == [n, 2 * n, 2]
    assert rows(["none", "c @ all : mlp + q + ln"]) == [n, n, 1]
    assert rows(["none", "a @ all"]) == [2 * n, 2 * n, 2]


def test_generation_under_an_adapter_is_peft_s() -> None:
    base = built("llama", 4)
    peft = on(base)
    model = load({"pre": base, "sft": peft}, verbose=False)
    theirs = peft.generate(
        input_ids=IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = model.generate(
        IDS[:1],
        max_new_tokens=8,
        graft="sft @ all",
        do_sample=False,
        stop_at_eos=False,
        return_type="tokens",
    )
    assert ours.tolist() == theirs.tolist()


# -- views -------------------------------------------------------------------------------------


@EACH_FAMILY
def test_views_and_differences_are_those_of_merged_models(variant: str) -> None:
    t = adapted(variant)
    whole = load(t.sources, verbose=False, check=False)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_E", "W_U", "b_O", "b_in"):
        ours, theirs = getattr(t.model, name), getattr(whole, name)
        assert torch.allclose(ours, theirs, atol=1e-5), name
    with t.model.grafted("task @ all"), whole.grafted("task @ all"):
        assert torch.allclose(t.model.blocks[1].attn.W_O, whole.blocks[1].attn.W_O, atol=1e-5)
        assert torch.allclose(t.model.unembed.W_U, whole.unembed.W_U, atol=1e-5)
    ours, theirs = (weight_difference(m, "relation", spectra=False) for m in (t.model, whole))
    assert ours["frobenius"].to_numpy() == pytest.approx(theirs["frobenius"].to_numpy(), rel=1e-3)
    assert (ours["frobenius"] == 0).tolist() == (theirs["frobenius"] == 0).tolist()


def test_the_difference_of_an_adapter_has_its_rank(llama: Tiny) -> None:
    table = weight_difference(llama.model, "task")
    q = table[(table["component"] == "q") & (table["parameter"] == "weight")]
    assert (q["effective_rank"] <= 3.001).all()


def test_attributions_under_adapters_add_up(swept: Any) -> None:
    model, grafts = swept
    some = {name: grafts[name] for name in ("a FE+LT", "half")}
    for by in ("head", "component"):
        table = direct_logit_attribution(
            model, PROMPTS[:2], some, by=by, full=Graft.parse("a @ all")
        )
        for _, rows in table.groupby(["prompt", "graft", "position"]):
            assert rows["contribution"].sum() == pytest.approx(rows["logit"].iloc[0], abs=1e-3)


# -- strengths ---------------------------------------------------------------------------------


def test_gradients_of_an_adapter_s_strengths_are_central_differences(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model).double()
    peer = copy.deepcopy(model)
    ids = IDS[:1]
    sites = [("q", 0), ("mlp_out", 1), ("embed", None), ("unembed", None), ("v", 2)]
    base = torch.full((ids.numel(),), 0.3, dtype=torch.float64)
    strengths = {site: base.clone().requires_grad_() for site in sites}
    mask = model.resolve("relation @ [2]", ids)
    model(ids, graft=mask.strengthened("task", strengths))[0, -1, 7].backward()
    for site, strength in strengths.items():
        place, step = 3 if site[0] != "unembed" else ids.numel() - 1, 1e-4
        values = []
        for sign in (1, -1):
            changed = {s: base.clone() for s in sites}
            changed[site][place] += sign * step
            with torch.no_grad():
                values.append(peer(ids, graft=mask.strengthened("task", changed))[0, -1, 7])
        slope = float(values[0] - values[1]) / (2 * step)
        assert float(strength.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_the_sequential_peer_runs_strengths_of_adapters(llama: Tiny) -> None:
    peer = Sequential(llama.model)
    graft = Graft.parse("0.5*task @ [1, 3] | -1*relation @ last : mlp | task @ [2] : o : 1 : 0")
    (item,) = llama.model.batch(IDS[:1]).prompts
    with torch.no_grad():
        _close(llama.model(IDS[:1], graft=graft)[0], peer.logits(item, graft))


# -- additions themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low rank", "rows"])
def test_additions_are_the_matrices_that_they_stand_for(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(7, 5, generator=draw), torch.randn(4, 5, generator=draw)
    added: LowRank | RowVectors
    if kind == "low rank":
        added = LowRank(torch.randn(2, 5, generator=draw), torch.randn(7, 2, generator=draw), 0.7)
        delta = 0.7 * added.b @ added.a
    else:
        added = RowVectors(torch.tensor([6, 1]), torch.randn(2, 5, generator=draw), 0.7)
        delta = torch.zeros(7, 5).index_add(0, added.rows, 0.7 * added.vectors)
    assert torch.allclose(added.added_to(matrix), matrix + delta)
    ids = torch.tensor([1, 0, 6, 6])
    assert torch.allclose(added.looked_up(ids), delta[ids], atol=1e-6)
    outs, ins = torch.tensor([6, 2, 1]), torch.tensor([4, 0])
    for rows, columns in ((None, None), (outs, None), (None, ins), (outs, ins)):
        part = delta if rows is None else delta[rows]
        part = part if columns is None else part[:, columns]
        given = x if columns is None else x[:, columns]
        with torch.no_grad():
            out = torch.ones(4, len(part))
            added.onto(out, given, 0.5, outs=rows, ins=columns)
        assert torch.allclose(out, 1 + 0.5 * given @ part.T, atol=1e-6)


def test_sourced_weights_know_who_shares_what() -> None:
    first, second = torch.ones(3, 2), torch.zeros(3, 2)
    a, b = (LowRank(torch.full((1, 2), v), torch.ones(3, 1), 1.0) for v in (2.0, 3.0))
    again = LowRank(torch.full((1, 2), 2.0), torch.ones(3, 1), 1.0)
    weight = Sourced(
        [first, first, first.clone(), second, first], [(), (a,), (again,), (a, b), (b,)]
    )
    assert weight.alike == (0, 0, 0, 3, 0)
    assert weight.added_alike == (0, 1, 1, 3, 4)
    assert weight.slots == (0, 1, 1, 2, 3)
    assert weight.adding == frozenset({1, 2, 3, 4})
    assert [float(weight[s][0, 0]) for s in range(5)] == [1.0, 3.0, 3.0, 5.0, 4.0]
    assert math.prod(weight.stacked().shape) == 30


@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_tokens_beyond_the_bases_rows(kind: str, tmp_path: Path) -> None:
    """PEFT's own words were those of an index error."""
    base = built("llama", 4)
    rows = base.config.vocab_size
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(rows + 3, mean_resizing=False)
    tokens = [2, rows + 2, rows]
    if kind == "lora":
        settings: Any = LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    else:
        settings = TrainableTokensConfig(token_indices=tokens)
    moved(get_peft_model(copy.deepcopy(larger), settings), 1).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PairError) as caught:
        load({"pre": base, "sft": tmp_path / "adapter"})
    option = "trainable_token_indices" if kind == "lora" else "token_indices"
    assert str(caught.value) == (
        f"source 'sft': the adapter {tmp_path / 'adapter'} has {option} with {rows + 2}, but the "
        f"base has the tokens 0 to {rows - 1}. Where finetuning added tokens, give a base that has "
        f"rows for them: base.resize_token_embeddings({rows + 3})."
    )
    model = load({"pre": larger, "sft": tmp_path / "adapter"}, verbose=False)
    assert in_factors(model)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_overflow_float16_are_refused_by_name(factor: str) -> None:
    """Also unchecked, where the comparison of logits would not have found the infinite numbers."""
    base = built("llama", 4)
    adapter = on(base, target_modules=["v_proj"])
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if factor in name and ".1." in name:
                parameter[0, 0] = 7e4
    said = (
        "source 'sft': what its adapter adds to v, layer 1 has numbers beyond float16's 65504. "
        'float16 overflows: load with dtype="bfloat16" or dtype="float32".'
    )
    for check in (False, True):
        with pytest.raises(PairError, match=re.escape(said)):
            load({"pre": base, "sft": adapter}, dtype="float16", check=check, verbose=False)
    wide = load({"pre": base, "sft": adapter}, dtype="bfloat16", check=False, verbose=False)
    assert bool(wide(IDS, graft="sft @ all").isfinite().all())
