"""Sources made of sources: the same arithmetic done on state dicts, grafted by the sequential
algorithm."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from families import VARIANTS, model_of, save_checkpoint, tiny_sources
from loras import built, load, merged, on
from test_adapters import in_factors
from test_laws import EACH_FAMILY, _close, _run_watched
from test_strengths import _join, _oracle, _random_rules, _tokens
from torch import Tensor
from transformers import PreTrainedModel

from graftlens.find import attribute
from graftlens.graft import Graft
from graftlens.lens import weight_difference
from graftlens.model import directions
from graftlens.model import load as loading
from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.load import preview

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")

IDS = torch.tensor([_tokens(0), _tokens(1)])

RECIPES: dict[str, dict[str, Any]] = {
    "half": {"of": "sft", "strength": 0.5},
    "far": {"of": "sft", "strength": -1.5},
    "rank2": {"of": "sft", "rank": 2},
    "rest2": {"of": "sft", "rank": "2:"},
    "middle": {"of": "sft", "rank": "1:4"},
    "single": {"of": "sft", "directions": [3, 0]},
    "sum": {"of": ["sft", "other"], "strengths": [1, -0.5]},
    "nested": {"of": "rank2", "strength": 2},
}


# -- the same on state dicts -------------------------------------------------------------------

State = Mapping[str, Tensor]


def matrices(model: PreTrainedModel, name: str, tensor: Tensor) -> Iterator[Tensor]:
    """The matrices that a parameter of Hugging Face's model holds, as views: q, k and v, and gate
    and up, are matrices of their own."""
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name.endswith("c_attn.weight"):
        yield from tensor.T.split(config.n_embd)
    elif name.endswith("query_key_value.weight"):
        heads = tensor.unflatten(0, (config.num_attention_heads, 3, d_head))
        yield from (heads[:, index] for index in range(3))
    elif name.endswith("qkv_proj.weight"):
        kv = config.num_key_value_heads * d_head
        yield from tensor.split([config.num_attention_heads * d_head, kv, kv])
    elif name.endswith("gate_up_proj.weight"):
        yield from tensor.split(config.intermediate_size)
    else:
        yield tensor


def cut(model: PreTrainedModel, base: State, own: State, chosen: slice | list[int]) -> State:
    """The base plus some singular directions of each matrix's difference from it."""
    made = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in made.items():
        if tensor.ndim != 2:
            continue
        both = (matrices(model, name, each) for each in (tensor, own[name]))
        for target, theirs in zip(*both, strict=True):
            shape, flat = target.shape, target.shape[:-1].numel()
            delta = (theirs.double() - target.double()).reshape(flat, -1)
            u, values, v = torch.linalg.svd(delta, full_matrices=False)
            kept = chosen
            if isinstance(chosen, list):
                kept = [number for number in chosen if number < len(values)]
            part = (u[:, kept] * values[kept]) @ v[kept]
            target += part.reshape(shape).float()
    return made


def with_vectors(made: State, own: State) -> State:
    return {name: own[name] if tensor.ndim == 1 else tensor for name, tensor in made.items()}


def plus(base: State, *terms: tuple[State, float]) -> State:
    """Task arithmetic, in float64."""

    def total(name: str) -> Tensor:
        first = base[name].double()
        return (first + sum(s * (own[name].double() - first) for own, s in terms)).float()

    return {name: total(name) for name in base}


def of_state(like: PreTrainedModel, state: State) -> PreTrainedModel:
    made = copy.deepcopy(like)
    head, table = made.get_output_embeddings(), made.get_input_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    assert head.weight is not table.weight
    made.load_state_dict(state)
    return made


def oracles(sources: Mapping[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """The recipes' models, by arithmetic on state dicts."""
    like = sources["pre"]
    pre, sft, other = (sources[name].state_dict() for name in ("pre", "sft", "other"))
    rank2 = with_vectors(cut(like, pre, sft, slice(2)), sft)
    states = {
        "half": plus(pre, (sft, 0.5)),
        "far": plus(pre, (sft, -1.5)),
        "rank2": rank2,
        "rest2": cut(like, pre, sft, slice(2, None)),
        "middle": cut(like, pre, sft, slice(1, 4)),
        "single": cut(like, pre, sft, [3, 0]),
        "sum": plus(pre, (sft, 1.0), (other, -0.5)),
        "nested": plus(pre, (rank2, 2.0)),
    }
    return {name: of_state(like, state) for name, state in states.items()}


@cache
def made(variant: str) -> Tiny:
    sources = tiny_sources(variant, ("pre", "sft", "other"), 7)
    model = load({**sources, **RECIPES}, verbose=False)
    return Tiny(variant, {**sources, **oracles(sources)}, model, None)


# -- laws --------------------------------------------------------------------------------------


@EACH_FAMILY
def test_random_grafts_of_made_sources_are_the_sequential_algorithm(variant: str) -> None:
    """Positions, heads, neurons and strengths, against real parameters made by the same
    arithmetic."""
    t = made(variant)
    for seed, n_rules in enumerate((5, 14)):
        rules = _random_rules(t, random.Random(f"{variant}{seed}"), n_rules)
        tokens = _tokens(seed)
        theirs = _oracle(t, tokens, rules)
        graft, batch = _join(rules), torch.tensor([tokens])
        with torch.no_grad():
            _close(t.model(batch, graft=graft)[0], theirs, 5e-5)
            _close(_run_watched(t.model, batch, graft, split=bool(seed))[0], theirs, 5e-5)


@EACH_FAMILY
def test_whole_made_sources_are_their_own_models(variant: str) -> None:
    t = made(variant)
    for name in RECIPES:
        for row, tokens in zip(t.model(IDS, graft=f"{name} @ all"), IDS, strict=True):
            _close(row, t.logits(name, tokens.tolist()), 5e-5)


@EACH_FAMILY
def test_a_rank_and_its_rest_are_the_whole(variant: str) -> None:
    """As weights and as logits, to the rounding of float32."""
    t = made(variant)
    pre, sft, rank, rest = (t.model.sources.index(n) for n in ("pre", "sft", "rank2", "rest2"))
    for weight in t.model.stored():
        base = weight[pre].double()
        both = (weight[rank].double() - base) + (weight[rest].double() - base)
        largest = max(float(weight[s].abs().max()) for s in (pre, sft, rank, rest))
        assert float((both - (weight[sft].double() - base)).abs().max()) < 5e-7 * largest
    sources = tiny_sources(variant, ("pre", "sft"), 7)
    parts = {name: RECIPES[name] for name in ("rank2", "rest2")}
    whole = {"of": ["rank2", "rest2"], "strengths": [1, 1]}
    model = load({**sources, **parts, "whole": whole}, verbose=False)
    with torch.no_grad():
        _close(model(IDS, graft="whole @ all"), model(IDS, graft="sft @ all"))


def test_a_rank_is_the_best_part_and_keeps_its_norms() -> None:
    t = made("llama-biased")
    pre, sft, rank = (t.model.sources.index(n) for n in ("pre", "sft", "rank2"))
    for each in t.model.stored():
        if each.like.ndim == 1:
            assert torch.equal(each[rank], each[sft])
        else:
            assert torch.linalg.matrix_rank((each[rank] - each[pre]).double(), rtol=1e-5) == 2


# -- kept in parts -----------------------------------------------------------------------------


def test_low_ranks_share_the_base_s_matrices() -> None:
    sources = tiny_sources("llama", ("pre", "sft"), 3)
    ranks = {f"r{rank}": {"of": "sft", "rank": rank} for rank in (1, 2, 4)}
    model = load({**sources, **ranks, "rest": {"of": "sft", "rank": "4:"}}, verbose=False)
    for weight in model.stored():
        if weight.like.ndim == 2:
            assert len(weight.variants) == 2
            assert [len(weight.additions(s)) for s in range(6)] == [0, 0, 1, 1, 1, 1]


@EACH_FAMILY
def test_what_is_made_of_adapters_stays_in_factors(variant: str) -> None:
    base = built(variant, 4)
    given = {"task": on(base, 1), "more": on(base, 2, r=2, bias="all")}
    recipes: dict[str, Any] = {
        "half": {"of": "task", "strength": 0.5},
        "first": {"of": "task", "rank": 1},
        "rest": {"of": "task", "rank": "1:"},
        "one": {"of": "more", "directions": [1]},
        "sum": {"of": ["task", "more"], "strengths": [1, 2]},
    }
    model = load({"pre": base, **given, **recipes}, verbose=False)
    assert in_factors(model)
    task, more = (merged(given[name]).state_dict() for name in ("task", "more"))
    pre = of_state(base, base.state_dict()).state_dict()
    rank1 = with_vectors(cut(base, pre, task, slice(1)), task)
    states = {
        "half": plus(pre, (task, 0.5)),
        "first": rank1,
        "rest": cut(base, pre, task, slice(1, None)),
        "one": cut(base, pre, more, [1]),
        "sum": plus(pre, (task, 1.0), (more, 2.0)),
    }
    for name, state in states.items():
        theirs = of_state(base, {key: state[key] for key in pre})
        with torch.no_grad():
            _close(model(IDS, graft=f"{name} @ all"), theirs(IDS, use_cache=False).logits, 5e-5)


# -- what is computed once ---------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "directions"


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the matrices that are decomposed, one after another."""
    sizes: list[int] = []
    original = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        sizes.append(len(matrix))
        return original(matrix)

    monkeypatch.setattr(directions.torch.linalg, "eigh", counted)
    return sizes


def wide(seed: int) -> PreTrainedModel:
    """A model whose matrices are large enough to be kept."""
    config = copy.deepcopy(VARIANTS["llama"]())
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 128, 1
    config.vocab_size, config.head_dim = 130, 32
    return model_of(config, seed)


def test_a_pair_is_decomposed_once(own_cache: Path, decomposed: list[int]) -> None:
    pair = {"pre": wide(1), "sft": wide(2)}
    ranks = {f"r{rank}": {"of": "sft", "rank": rank} for rank in (3, 9)}
    model = load({**pair, **ranks}, verbose=False)
    whole = [size for size in decomposed if size >= directions.KEPT_FROM]
    # Embedding and head, q and o, three maps of the MLP; k and v are smaller.
    assert len(whole) == 7
    assert len(decomposed) == 9
    assert len(list(own_cache.iterdir())) == 7
    decomposed.clear()
    again = load({**pair, **ranks}, verbose=False)
    assert [size for size in decomposed if size >= directions.KEPT_FROM] == []
    assert torch.equal(model(IDS, graft="r9 @ all"), again(IDS, graft="r9 @ all"))
    load({**pair, "r4": {"of": "sft", "rank": 4}}, verbose=False)
    assert [size for size in decomposed if size >= directions.KEPT_FROM] == []
    # More directions than are kept, another pair, and a damaged file are worked out.
    load({**pair, "r20": {"of": "sft", "rank": 20}}, verbose=False)
    assert sum(size >= directions.KEPT_FROM for size in decomposed) == 7
    decomposed.clear()
    load({"pre": pair["pre"], "sft": wide(3), "r2": {"of": "sft", "rank": 2}}, verbose=False)
    assert sum(size >= directions.KEPT_FROM for size in decomposed) == 7
    decomposed.clear()
    for file in own_cache.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    mended = load({**pair, **ranks}, verbose=False)
    assert sum(size >= directions.KEPT_FROM for size in decomposed) == 7
    _close(mended(IDS, graft="r9 @ all"), model(IDS, graft="r9 @ all"), 1e-6)


def test_the_identity_of_what_is_made_is_that_of_its_parts() -> None:
    pair = tiny_sources("llama", ("pre", "sft"), 3)

    def prints(recipe: dict[str, Any], **others: PreTrainedModel) -> dict[str, str]:
        return load({**pair, **others, "made": recipe}, verbose=False).fingerprints()

    first = prints({"of": "sft", "rank": 2})
    assert list(first) == ["pre", "sft", "made"]
    assert len(set(first.values())) == 3
    assert prints({"of": "sft", "rank": 2}) == first
    assert prints({"of": "sft", "rank": "0:2"}) == first
    for other in (
        {"of": "sft", "rank": 3},
        {"of": "sft", "rank": "2:"},
        {"of": "sft", "strength": 2.0},
    ):
        found = prints(other)
        assert found["made"] != first["made"]
        assert found["sft"] == first["sft"]
    moved = copy.deepcopy(pair["sft"])
    moved.get_input_embeddings().weight[3, 4] += 0.5
    assert prints({"of": "sft", "rank": 2}, sft=moved)["made"] != first["made"]


# -- what is told ------------------------------------------------------------------------------


def test_the_share_of_a_difference_that_a_rank_holds() -> None:
    t = made("gpt2")
    found = weight_difference(t.model, "sft", ranks=[1, 2, 24])
    pre, sft = (t.sources[name].state_dict() for name in ("pre", "sft"))
    name = "transformer.h.1.mlp.c_fc.weight"
    values = torch.linalg.svdvals((sft[name] - pre[name]).double()).square()
    row = found[(found["component"] == "mlp_in") & (found["layer"] == 1)]
    row = row[row["parameter"] == "weight"].iloc[0]
    for rank in (1, 2, 24):
        share = float(values[:rank].sum() / values.sum())
        assert row[f"share_of_rank_{rank}"] == pytest.approx(share, rel=1e-6)
    assert row["share_of_rank_24"] == pytest.approx(1)
    assert found[found["parameter"] == "bias"]["share_of_rank_1"].isna().all()
    assert "share_of_rank_1" not in weight_difference(t.model, "sft")
    # What a source of that rank differs by holds it all.
    low = weight_difference(t.model, "rank2", ranks=[2])
    matrices = low[(low["parameter"] == "weight") & low["share_of_rank_2"].notna()]
    assert matrices["share_of_rank_2"].to_numpy() == pytest.approx(1)
    with pytest.raises(ValueError, match="ranks: 0 is not a rank: ranks count from 1"):
        weight_difference(t.model, "sft", ranks=[0])
    with pytest.raises(ValueError, match="ranks: 2 needs spectra=True"):
        weight_difference(t.model, "sft", ranks=[2], spectra=False)


def test_the_model_says_what_is_made_of_what() -> None:
    rows = made("llama").model.differences
    told = rows[rows["key"] == "made of"].set_index("source")
    assert list(told.index) == list(RECIPES)
    assert told.loc["rank2", "value"] == "{of: sft, rank: 2}"
    assert "vectors are sft's" in told.loc["rank2", "done"]
    assert told.loc["rest2", "value"] == '{of: sft, rank: "2:"}'
    assert "vectors are pre's" in told.loc["rest2", "done"]
    assert told.loc["sum", "value"] == "{of: [sft, other], strengths: [1, -0.5]}"
    assert (rows[rows["source"].isin(RECIPES)]["key"] == "made of").all()


def test_generation_runs_made_sources() -> None:
    t = made("qwen3")
    ids = t.model.generate(IDS[:1], max_new_tokens=3, graft="half @ all")
    theirs = t.sources["half"].generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.tolist() == theirs.tolist()


# -- refusals ----------------------------------------------------------------------------------

TINY = ("pre", "sft")


@pytest.mark.parametrize(
    ("sources", "what"),
    [
        (
            {"a": {"of": "b", "strength": 1}, "b": {"of": "a", "rank": 2}},
            "source 'a': a and b are made of one another. Let one be a model.",
        ),
        (
            {"a": {"of": "stf", "rank": 2}},
            r"source 'a': it is of 'stf', which is not a source\. There are: pre sft a\. Did you "
            "mean 'sft'",
        ),
        ({"a": {"of": "pre", "rank": 2}}, "source 'a': it is of 'pre', the base, from which all"),
        (
            {"a": {"of": "sft", "rank": 98}},
            r"source 'a': rank: 98 asks for more than \d+, the largest rank that a matrix of 'sft'",
        ),
        ({"a": {"of": "sft", "rank": "40:"}}, "source 'a': rank: \"40:\" asks for more than"),
        ({"a": {"of": "sft", "directions": [40]}}, r"source 'a': directions: \[40\] asks for more"),
        ({"a": {"of": "sft", "rank": 0}}, "rank: 0 is not a rank or a range of directions"),
        ({"a": {"of": "sft", "rank": "0:"}}, "rank: '0:' is not a rank or a range"),
        ({"a": {"of": "sft", "rank": "5:3"}}, "rank: '5:3' is not a rank or a range"),
        (
            {"a": {"of": "sft"}},
            "a source is made of others by one of strength, .* none of them is given",
        ),
        (
            {"a": {"of": "sft", "rank": 2, "strength": 0.5}},
            "a source is made of others by one of .* strength and rank are given",
        ),
        ({"a": {"of": ["sft"], "strength": 1}}, "of is a list, and strength is given. Give streng"),
        ({"a": {"of": "sft", "strengths": [1]}}, "of is one source, and strengths is given."),
        ({"a": {"of": ["sft", "sft"], "strengths": [1, 2]}}, "names a source twice. Add up its"),
        ({"a": {"of": ["sft"], "strengths": [1, 2]}}, "2 strengths for 1 sources. Give one for ea"),
        ({"a": {"of": "sft", "directions": [1, 1]}}, "names a direction twice"),
        *(
            (
                {"a": {key: given}},
                rf"^source 'a': {key}: {said} is neither a text nor a list of texts\. [^.]*\.$",
            )
            for key in ("of", "each")
            for given, said in (([], r"\[\]"), (5, "5"), (["sft", 5], r"\['sft', 5\]"))
        ),
        (
            {"a": {"of": "sft", "directions": [-1]}},
            r"^source 'a': directions: \[-1\] does not list directions\. [^.]*\.$",
        ),
        (
            {"a": {"of": "sft", "directions": []}},
            r"^source 'a': directions: \[\] does not list directions\. [^.]*\.$",
        ),
        ({"a": {"of": "sft", "directions": [True]}}, r"directions: \[True\] has a boolean in it"),
        ({"a": {"of": ["sft"], "strengths": [True]}}, r"strengths: \[True\] has a boolean in it"),
        ({"a": {"of": "sft", "rank": "1 2:"}}, "rank: '1 2:' is not a rank or a range"),
        ({"a": {"of": "sft", "ranks": 2}}, "unknown key 'ranks'"),
        ({"a": {"each": "runs/*"}}, r"source 'a' is {each: runs/\*}, several models that a sweep"),
    ],
)
def test_what_cannot_be_made_is_refused_before_weights_are_read(
    sources: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair = {n: str(save_checkpoint(built("llama", s), tmp_path / n)) for s, n in enumerate(TINY)}
    with pytest.raises(PairError, match=what):
        preview({**pair, **sources})
    with pytest.raises(PairError, match=what):
        load({**{name: built("llama", s) for s, name in enumerate(TINY)}, **sources})
    monkeypatch.setattr(loading, "_read_all", _unread)
    with pytest.raises(PairError, match=what):
        load({**pair, **sources})


def _unread(sources: Any) -> Any:
    raise AssertionError(f"weights of {list(sources)} were read")


def test_the_base_is_not_made() -> None:
    with pytest.raises(PairError, match="source 'a': it is the base, which is one model"):
        load({"a": {"of": "sft", "rank": 2}, "sft": built("llama", 1)})


def test_a_rank_above_an_adapter_s_is_refused() -> None:
    base = built("llama", 4)
    with pytest.raises(PairError, match="rank: 4 asks for more than 3, the largest rank that a ma"):
        load({"pre": base, "task": on(base, 1), "a": {"of": "task", "rank": 4}})


@pytest.mark.parametrize(
    ("options", "sources", "what"),
    [
        ({}, {"a": {"of": "task", "rank": 4}}, "rank: 4 asks for more than 3,"),
        (
            {"r": 2},
            {"a": {"of": "task", "directions": [2]}},
            r"directions: \[2\] asks for more than 2",
        ),
        (
            {"rank_pattern": {"down_proj": 5}},
            {"a": {"of": "task", "rank": "5:"}},
            'rank: "5:" asks for more than 5,',
        ),
        (
            {},
            {"half": {"of": "task", "strength": 0.5}, "a": {"of": "half", "rank": 4}},
            "rank: 4 asks for more than 3, the largest rank that a matrix of 'half'",
        ),
        (
            {},
            {"two": {"of": ["task", "task2"], "strengths": [1, 1]}, "a": {"of": "two", "rank": 7}},
            "rank: 7 asks for more than 6, the largest rank that a matrix of 'two'",
        ),
        (
            {},
            {"one": {"of": "task", "directions": [1]}, "a": {"of": "one", "rank": 2}},
            "rank: 2 asks for more than 1, the largest rank that a matrix of 'one'",
        ),
    ],
)
def test_a_rank_above_an_adapter_s_is_refused_before_weights_are_read(
    options: dict[str, Any],
    sources: dict[str, Any],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {"pre": save_checkpoint(built("llama", 4), tmp_path / "pre")}
    for seed, name in enumerate(("task", "task2")):
        given[name] = tmp_path / name
        on(built("llama", 4), seed, **options).save_pretrained(given[name])
    with pytest.raises(PairError, match=f"source 'a': {what}"):
        preview({**given, **sources})
    monkeypatch.setattr(loading, "_read_all", _unread)
    with pytest.raises(PairError, match=f"source 'a': {what}"):
        load({**given, **sources})


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["up_proj"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"down_proj": 4}},
    ],
)
def test_ranks_that_some_matrix_has_are_not_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = save_checkpoint(built("llama", 4), tmp_path / "pre")
    on(built("llama", 4), 1, **options).save_pretrained(tmp_path / "task")
    sources = {"pre": base, "task": tmp_path / "task", "a": {"of": "task", "rank": 4}}
    preview(sources)
    assert load(sources, verbose=False).sources == ("pre", "task", "a")


Change = Callable[[Any], None]


def _tables(config: Any) -> None:
    config.rope_parameters["rope_theta"] = 77.0


def _tokens_more(config: Any) -> None:
    config.vocab_size += 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_tables, "is made of 'sft', whose rotary tables are not those of 'pre'"),
        (_tokens_more, "is made of 'sft', whose vocabulary has 100 tokens; that of 'pre' has 97"),
    ],
)
@pytest.mark.parametrize("recipe", [{"of": "sft", "rank": 2}, {"of": "sft", "strength": 0.5}])
def test_other_tables_and_vocabularies_are_refused(
    change: Change, what: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    config = copy.deepcopy(VARIANTS["llama"]())
    change(config)
    pair = {"pre": built("llama", 1), "sft": model_of(config, 2)}
    assert isinstance(load(pair, verbose=False), GraftedTransformer)
    with pytest.raises(PairError, match=f"source 'a' {what}"):
        load({**pair, "a": recipe})
    folders = {name: str(save_checkpoint(m, tmp_path / name)) for name, m in pair.items()}
    with pytest.raises(PairError, match=f"source 'a' {what}"):
        preview({**folders, "a": recipe})


def test_grafts_name_made_sources_as_any_other() -> None:
    t = made("llama")
    with torch.no_grad():
        one = t.model(IDS, graft=Graft.rule("rank2", at=[2]))
        other = t.model(IDS, graft="rank2 @ [2]")
    assert torch.equal(one, other)


# -- finding places ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["rank2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("half", "rest2", "single"))],
)
def test_attributions_of_made_sources_add_up(name: str) -> None:
    """To the difference between the base and the state dict's own model."""
    t = made("llama")
    targets = [5, 90]
    table = attribute(
        t.model, IDS, name, positions=[0, "last", "rest"], steps=64, targets=torch.tensor(targets)
    )
    for number, (tokens, target) in enumerate(zip(IDS.tolist(), targets, strict=True)):
        ends = [float(t.logits(s, tokens)[-1].log_softmax(-1)[target]) for s in ("pre", name)]
        mine = table[table["prompt"] == number]
        assert float(mine["value_base"].iloc[0]) == pytest.approx(ends[0], abs=1e-4)
        assert float(mine["value_full"].iloc[0]) == pytest.approx(ends[1], abs=1e-4)
        assert abs(ends[1] - ends[0]) > 0.04
        assert float(mine["ig"].sum()) == pytest.approx(ends[1] - ends[0], abs=0.02)
    if name in ("rest2", "single"):  # which have the base's norms
        norms = table[table["component"].isin(["ln1", "ln2", "ln_final"])]
        assert len(norms)
        assert (norms["ig"] == 0).all()
