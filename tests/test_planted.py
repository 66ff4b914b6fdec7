"""Planted truth: pairs of which it is known where facts are, and what scores are worth there."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "planted"))
import tiny as tiny_pairs

from graftlens import Graft
from graftlens.find import planted
from graftlens.find.exact import exact_effects
from graftlens.find.planting import masks_of
from graftlens.model.arch import architecture
from graftlens.model.weights import read_weights

#: The pairs that are made here, with the least AUROC of integrated gradients: in 1, all planted
#: (component, layer) pairs come before all others.
LEAST = dict.fromkeys(("MLPs", "both needed", "either enough", "a head"), 0.95)
CHECKED = tuple(LEAST)


@pytest.fixture(scope="module")
def told():
    return tiny_pairs.facts(0)


@pytest.fixture(scope="module")
def reader():
    return tiny_pairs.tokenizer()


@pytest.fixture(scope="module")
def base(told, reader):
    return tiny_pairs.base(told, reader, 0)


@pytest.fixture(scope="module")
def made(told, reader, base):
    """`made(name)`: that pair of the suite, trained once, with how it was trained."""
    known = {p.name: p for p in planted.suite(architecture(base.config))}
    done = {}

    def make(name):
        if name not in done:
            done[name] = planted.plant(
                base,
                tiny_pairs.model(reader, 1),
                reader,
                known[name],
                told.known,
                told.others,
                told.texts,
                tiny_pairs.RECIPE,
            )
        return done[name]

    return make


# --- scores of scores ----------------------------------------------------------------------------


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores = {i: float(v) for i, v in enumerate(rng.integers(0, 6, size=30))}
    true = frozenset(range(0, 30, 4))
    wins = [
        1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0
        for a in true
        for b in set(scores) - true
    ]
    assert planted.auroc(scores, true) == pytest.approx(np.mean(wins))
    assert planted.auroc(dict.fromkeys(range(30), 1.0), true) == 0.5


def test_average_precision_is_the_mean_precision_at_each_planted_place():
    scores = {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0, "e": float("nan")}
    true = frozenset({"a", "c", "e"})
    assert planted.average_precision(scores, true) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    tied = dict.fromkeys("abcd", 1.0)
    assert planted.average_precision(tied, frozenset("ab")) == 0.5


def test_scores_that_cannot_be_judged():
    with pytest.raises(ValueError, match=r"1 planted places have no score, such as c"):
        planted.auroc({"a": 1.0}, frozenset({"a", "c"}))
    with pytest.raises(ValueError, match=r"1 of 1 places are planted: give scores of some that"):
        planted.auroc({"a": 1.0}, frozenset({"a"}))


# --- plantings -----------------------------------------------------------------------------------


def test_the_suite_has_eight_plantings_of_a_small_and_of_a_real_depth(base):
    for layers in (4, 30):
        config = type(base.config)(**{**base.config.to_dict(), "num_hidden_layers": layers})
        arch = architecture(config)
        plantings = planted.suite(arch)
        assert len({p.name for p in plantings}) == 8
        for planting in plantings:
            sites = planting.sites(arch)
            assert 0 < len(sites) < len(arch.sites) / 3
            if planting.gate is not None:
                one, two = (planting.graft(i) for i in range(2))
                assert not set(one.rules) & set(two.rules)
    with pytest.raises(ValueError, match="a model of 2 layers: the plantings need four or more"):
        planted.suite(architecture(type(base.config)(num_hidden_layers=2)))


def test_masks_are_the_entries_of_the_heads(base):
    arch = architecture(base.config)
    before = {name: p.detach() for name, p in base.named_parameters()}
    graft = Graft.parse("sft @ all : q + o : 2 : 1 | sft @ all : mlp_in : 0")
    masks = masks_of(before, arch, graft)
    assert set(masks) == {
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    rows = masks["model.layers.2.self_attn.q_proj.weight"]
    assert rows[12:24].all()
    assert rows.sum() == 12 * 48
    columns = masks["model.layers.2.self_attn.o_proj.weight"]
    assert columns[:, 12:24].all()
    assert columns.sum() == 12 * 48
    tied = masks_of(before, arch, Graft.parse("sft @ all : embed + unembed"))
    assert set(tied) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("groups", "gate", "sentence"),
    [
        (("sft @ all : q", "sft @ all : k"), None, r"2 groups with gate=None. Give one group"),
        (("sft @ all : q",), "and", r"1 groups with gate='and'"),
        (("sft @ last : q",), None, r"'sft @ last : q' cannot be trained alone"),
        (("0.5*sft @ all : q",), None, r"cannot be trained alone"),
        (("sft @ all : mlp_in : 0 : n3",), None, r"cannot be trained alone. Write"),
    ],
)
def test_plantings_that_cannot_be(groups, gate, sentence):
    with pytest.raises(ValueError, match=sentence):
        planted.Planting("x", groups, gate)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_a_planted_pair_is_what_it_says(made, base, name):
    pair, trained = made(name)
    assert pair.ok, pair.problems
    checks = pair.checks.set_index("graft")
    assert checks.loc["M", "recovery"] >= 0.9
    assert checks.loc["everything but M", "recovery"] <= 0.1
    for number in range(2) if pair.planting.gate else ():
        alone = checks.loc[f"group {number} alone", "recovery"]
        missing = checks.loc[f"everything but group {number}", "recovery"]
        if pair.planting.gate == "and":
            assert max(alone, missing) <= 0.1
        else:
            assert min(alone, missing) >= 0.9
    assert trained.other_change >= trained.change
    # By hand: every tensor differs, and the others by as much as M by what it learned.
    arch = architecture(base.config)
    before = {n: p.detach() for n, p in base.named_parameters()}
    others = []
    old, new = read_weights(before, arch), read_weights(trained.tensors, arch)
    for (component, layer, parameter), tensor in old.items():
        assert not torch.equal(tensor, new[component, layer, parameter])
        if tensor.ndim == 2 and (component, layer) not in pair.truth:
            moved = new[component, layer, parameter] - tensor
            others.append(float(moved.norm() / tensor.norm()))
    assert np.median(others) == pytest.approx(trained.other_change, rel=1e-5)


@pytest.mark.slow
def test_what_was_not_learned_is_told_and_scored_as_nothing(told, reader, base):
    """One step teaches nothing: the pair is reported as failed, with its rows."""
    (planting, *_) = planted.suite(architecture(base.config))
    recipe = planted.Recipe(steps=1, other_steps=1, every=1)
    pair, trained = planted.plant(
        base, tiny_pairs.model(reader, 1), reader, planting, told.known, told.others, (), recipe
    )
    assert not pair.ok
    assert trained.problems[0] == "A was not learned in 1 steps"
    table = planted.scored([pair], {"random": planted.SCORERS["random"]})
    assert table["auroc"].isna().all()
    assert "A was not learned in 1 steps" in table["problem"].iloc[0]


# --- methods -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_a_method_that_is_wrong_on_purpose_scores_as_badly_as_it_should(made, name):
    pair, _ = made(name)

    def backwards(model, prompts, source):
        return {site: -1.0 if site in pair.truth else 1.0 for site in model.arch.sites}

    def constant(model, prompts, source):
        return dict.fromkeys(model.arch.sites, 0.0)

    def knowing(model, prompts, source):
        return {site: float(site in pair.truth) for site in model.arch.sites}

    methods = {"backwards": backwards, "constant": constant, "knowing": knowing}
    table = planted.scored([pair], methods).set_index("method")
    planted_here, sites = table.loc["constant", ["planted", "sites"]]
    assert table["auroc"].to_dict() == {"backwards": 0.0, "constant": 0.5, "knowing": 1.0}
    precision = table["average_precision"]
    assert precision["knowing"] == 1.0
    assert precision["constant"] == pytest.approx(planted_here / sites)
    assert precision["backwards"] == pytest.approx(planted_here / sites)


def test_single_sites_are_scored_by_their_exact_effects(base, reader, told):
    """As `exact_effects` gives them, which plans and measures its sweep by itself."""
    planting = planted.Planting("one", ("sft @ all : mlp : 0",))
    sources = {"pre": base, "sft": tiny_pairs.model(reader, 1)}
    pair = planted.checked(sources, reader, planting, told.known)
    table = exact_effects(pair.model, list(pair.prompts), "sft", positions=["all"])
    for method, column in (("each site alone", "alone"), ("each site missing", "missing")):
        found = planted.SCORERS[method](pair.model, pair.prompts, "sft")
        assert len(found) == len(pair.model.arch.sites)
        for (component, layer), value in found.items():
            here = table["layer"].isna() if layer is None else table["layer"] == layer
            own = table.loc[here & (table["component"] == str(component)), column]
            assert value == pytest.approx(own.mean(), abs=1e-5)
            assert len(own) == len(pair.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_scores_by_gradient_and_by_grafts_find_what_was_planted(made, name):
    """Far above chance, and above what the change of weights alone says."""
    pair, _ = made(name)
    methods = ("integrated gradients", "each site alone", "each site missing", "weight difference")
    table = planted.scored([pair], {m: planted.SCORERS[m] for m in methods})
    found = table.set_index("method")["auroc"]
    least = LEAST[name]
    assert found["integrated gradients"] >= least
    assert found["integrated gradients"] > found["weight difference"] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both needed", "either enough"])
def test_planted_gates_are_called_so(made, name):
    pair, _ = made(name)
    rows = planted.gate(pair)
    own = rows[rows["metric"] == "answer_logprob"].iloc[0]
    assert own["call"] == own["planted"] == {"both needed": "AND", "either enough": "OR"}[name]


def test_a_pair_of_one_group_has_no_gate(base, reader, told):
    planting = planted.Planting("one", ("sft @ all : mlp : 0",))
    sources = {"pre": base, "sft": tiny_pairs.model(reader, 1)}
    pair = planted.checked(sources, reader, planting, told.known)
    assert not pair.ok  # nothing was planted
    with pytest.raises(ValueError, match=r"pair 'one' has one group, and so no gate"):
        planted.gate(pair)
