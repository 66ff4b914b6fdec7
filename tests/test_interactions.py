"""Coalitions of grafts: their values against single runs, and what they come to against formulas
written out with sums over subsets and orders."""

from collections.abc import Iterable
from itertools import combinations, permutations
from math import factorial
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from gates import PLACES, Kind, gated
from scipy.stats import norm

from graftlens import Graft, Measure, Prompt, find
from graftlens.find.coalitions import Coalitions
from graftlens.find.games import Orders, Weights, dividends, pairs_of
from graftlens.find.interactions import Interactions, measured_interactions
from graftlens.stats.intervals import wilson
from graftlens.stats.resampling import Draw

PLAYERS = {
    "FE": "sft @ first_entity : attn + mlp",
    "LT attention": "sft @ last : attn",
    "LT MLP": "sft @ last : mlp : 0-1 | sft @ last : mlp_out : 2",
    "rest": "sft @ ~(first_entity + last) : block | sft @ all : unembed",
}
PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.", "Siobhán")


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def prompts() -> list[Prompt]:
    return [
        Prompt(text, {"first_entity": person, "fact": person}, " Mara Finn", name=text)
        for text in ("{first_entity} plays with", "Last year, {first_entity} met")
        for person in PEOPLE
    ]


@pytest.fixture(scope="module")
def found(llama: Tiny) -> Interactions:
    return find.interactions(llama.model, prompts(), PLAYERS, resamples=200, progress=False)


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are not checked, so that a wrong value reaches the library's own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def subsets(items: Iterable[int]) -> list[frozenset[int]]:
    items = list(items)
    return [frozenset(s) for size in range(len(items) + 1) for s in combinations(items, size)]


def worth(found: Interactions, metric: str) -> dict[frozenset[int], float]:
    """Players' numbers -> v."""
    names = list(found.players)
    rows = found.values[found.values["metric"] == metric]
    by = dict(zip(rows["coalition"], rows["value"], strict=True))
    made = {}
    for s in subsets(range(len(names))):
        made[s] = by[" + ".join(names[i] for i in sorted(s)) or "none"]
    return made


def synthetic(
    v: "dict[frozenset[int], np.ndarray]", n: int, metric: str = "logprob", per_fact: int = 1
) -> tuple[Coalitions, pd.DataFrame]:
    """A table with given values, [prompt], of each coalition."""
    planned = Coalitions.of({f"p{i}": f"sft @ [{i}]" for i in range(n)})
    rows = []
    for mask, name in planned.names.items():
        inside = frozenset(i for i in range(n) if mask >> i & 1)
        for prompt, value in enumerate(v[inside]):
            row = {"prompt": prompt, "graft": name, "reason": None, "fact": prompt // per_fact}
            rows.append(row | {metric: float(value)})
    return planned, pd.DataFrame(rows)


# --- values ------------------------------------------------------------------------------------


def test_every_coalition_is_its_grafts_run_alone(llama: Tiny, found: Interactions) -> None:
    graft = {name: Graft.parse(text) for name, text in PLAYERS.items()}
    by = found.results.set_index(["prompt", "graft"])["logprob"]
    for chosen in subsets(range(4)):
        names = [list(PLAYERS)[i] for i in sorted(chosen)]
        joined = Graft()
        for name in names:
            joined |= graft[name]
        for number in (0, 5):
            prompt = prompts()[number]
            answer = llama.tokenizer(prompt.text + " Mara Finn")["input_ids"]
            length = len(llama.tokenizer(prompt.text)["input_ids"])
            with torch.no_grad():
                logits = llama.model(prompt, graft=joined)[0, -1]
            alone = float(logits.log_softmax(-1)[answer[length]])
            assert by[number, " + ".join(names) or "none"] == pytest.approx(alone, abs=2e-5)


def test_values_are_means_over_prompts(found: Interactions) -> None:
    results = found.results
    for _, row in found.values.iterrows():
        rows = results[results["graft"] == row["coalition"]]
        own = rows["logprob"] if row["metric"] == "logprob" else rows["rank"] == 1
        assert row["value"] == pytest.approx(own.astype(float).mean(), abs=1e-12)
    assert set(found.values["metric"]) == {"logprob", "top1"}
    assert len(found.values) == 2 * 2**4
    assert set(found.values["n"]) == {8}
    assert set(found.values["units"]) == {4}


# --- indices against sums over subsets and orders ----------------------------------------------


def test_shapley_is_the_mean_over_all_orders_of_joining(found: Interactions) -> None:
    v = worth(found, "logprob")
    orders = list(permutations(range(4)))
    table = found.table[found.table["metric"] == "logprob"].set_index("player")
    for i, player in enumerate(found.players):
        added = [v[frozenset(o[: o.index(i) + 1])] - v[frozenset(o[: o.index(i)])] for o in orders]
        row = table.loc[player]
        assert row["shapley"] == pytest.approx(np.mean(added), abs=1e-9)
        rest = [s for s in subsets(range(4)) if i not in s]
        assert row["banzhaf"] == pytest.approx(np.mean([v[s | {i}] - v[s] for s in rest]), abs=1e-9)
        everybody = frozenset(range(4))
        assert row["alone"] == pytest.approx(v[frozenset({i})] - v[frozenset()], abs=1e-9)
        assert row["missing"] == pytest.approx(v[everybody] - v[everybody - {i}], abs=1e-9)
    own = found.table[found.table["metric"] == "logprob"]
    whole = v[frozenset(range(4))] - v[frozenset()]
    assert own["shapley"].sum() == pytest.approx(whole, abs=1e-9)
    assert own["share"].sum() == pytest.approx(1.0)


def test_pairs_and_dividends_are_their_definitions(found: Interactions) -> None:
    v = worth(found, "logprob")
    names = list(found.players)
    for a, b in combinations(range(4), 2):
        row = found.pairs.query("metric == 'logprob' and a == @names[@a] and b == @names[@b]")
        rest = subsets({0, 1, 2, 3} - {a, b})
        delta = {s: v[s | {a, b}] - v[s | {a}] - v[s | {b}] + v[s] for s in rest}
        both = {s: v[s | {a, b}] - v[s] for s in rest}
        weight = {s: factorial(len(s)) * factorial(2 - len(s)) / factorial(3) for s in rest}
        said = row.iloc[0]
        assert said["interaction"] == pytest.approx(sum(weight[s] * delta[s] for s in rest))
        assert said["banzhaf_interaction"] == pytest.approx(np.mean(list(delta.values())))
        assert said["joint"] == pytest.approx(sum(weight[s] * both[s] for s in rest))
        assert said["share"] == pytest.approx(said["interaction"] / said["joint"])
        assert said["at_base"] == pytest.approx(delta[frozenset()], abs=1e-9)
        assert said["at_full"] == pytest.approx(delta[frozenset({0, 1, 2, 3}) - {a, b}], abs=1e-9)
    rows = found.dividends[found.dividends["metric"] == "logprob"].set_index("coalition")
    assert len(rows) == 2**4 - 1
    for s in subsets(range(4))[1:]:
        m = sum((-1) ** (len(s) - len(t)) * v[t] for t in subsets(s))
        name = " + ".join(names[i] for i in sorted(s))
        assert rows.loc[name, "dividend"] == pytest.approx(m, abs=1e-9)
        assert rows.loc[name, "size"] == len(s)


def test_all_orders_together_are_exact() -> None:
    """What sampled orders estimate is what the exact values are."""
    n, rng = 4, np.random.default_rng(0)
    values = rng.normal(size=(3, 1 << n))
    exact, weights = dividends(values), Weights.of(n)
    orders = Orders(n, tuple(permutations(range(n))))
    sampled = values[:, list(orders.coalitions)]
    for i in range(n):
        added = orders.marginals(sampled, i).mean(1)
        np.testing.assert_allclose(added, (exact @ weights.shapley)[:, i], atol=1e-9)
    for number, (a, b) in enumerate(pairs_of(n)):
        apart, together = orders.meetings(sampled, a, b)
        np.testing.assert_allclose(
            apart.mean(1), (exact @ weights.interaction)[:, number], atol=1e-9
        )
        np.testing.assert_allclose(together.mean(1), (exact @ weights.joint)[:, number], atol=1e-9)


def test_many_players_are_sampled_with_standard_errors() -> None:
    n, facts, rng = 14, 30, np.random.default_rng(3)
    planned = Coalitions.of({f"p{i}": f"sft @ [{i}]" for i in range(n)}, permutations=60, seed=1)
    assert planned.orders is not None
    assert len(planned.masks) < 2**n / 5
    own = rng.normal(1.0, 0.1, size=(facts, n))
    rows = []
    for mask, name in planned.names.items():
        inside = np.array([mask >> i & 1 for i in range(n)])
        value = own @ inside + 3.0 * (inside[0] * inside[1]) - 2.0 * (inside[2] * inside[3])
        rows += [
            {"prompt": p, "graft": name, "reason": None, "fact": p, "logprob": float(value[p])}
            for p in range(facts)
        ]
    draw = Draw("fact", 0.95, 500, 0)
    found = measured_interactions(planned, pd.DataFrame(rows), ["logprob"], draw)
    assert not found.exact
    table = found.table.set_index("player")
    truth = own.mean(0) + np.array([1.5, 1.5, -1.0, -1.0] + [0.0] * 10)
    for i in range(n):
        row = table.loc[f"p{i}"]
        if i < 4:  # joins before its partner or after: a coin for each order
            assert 0 < row["shapley_se"] < 0.5
            assert abs(row["shapley"] - truth[i]) < 4 * row["shapley_se"]
        else:
            assert row["shapley"] == pytest.approx(truth[i])
            assert row["shapley_se"] == pytest.approx(0.0, abs=1e-12)
        assert row["shapley_low"] < row["shapley"] < row["shapley_high"]
    assert table["shapley"].sum() == pytest.approx(own.mean(0).sum() + 1.0)
    assert table["banzhaf"].isna().all()
    assert found.dividends.empty
    pairs = found.pairs.set_index(["a", "b"])
    assert pairs.loc[("p0", "p1"), "interaction"] == pytest.approx(3.0)
    assert pairs.loc[("p0", "p1"), "call"] == "AND"
    assert pairs.loc[("p2", "p3"), "interaction"] == pytest.approx(-2.0)
    assert pairs.loc[("p2", "p3"), "call"] == "OR"
    assert pairs.loc[("p4", "p9"), "at_base"] == pytest.approx(0.0, abs=1e-9)
    assert pairs.loc[("p0", "p1"), "at_full"] == pytest.approx(3.0)
    assert pairs.loc[("p4", "p9"), "call"] == "additive"
    again = Coalitions.of(planned.players, permutations=60, seed=1)
    assert again.masks == planned.masks
    assert Coalitions.of(planned.players, permutations=60, seed=2).masks != planned.masks


# --- intervals ---------------------------------------------------------------------------------


def test_intervals_are_over_facts_and_not_over_prompts() -> None:
    rng, facts = np.random.default_rng(0), 60
    shift = {s: np.repeat(rng.normal(size=facts), 3) for s in subsets(range(2))}
    planned, table = synthetic(shift, 2, per_fact=3)
    draw = Draw("fact", 0.95, 4000, 0)
    row = measured_interactions(planned, table, ["logprob"], draw).pairs.iloc[0]
    none, one, other, both = (shift[frozenset(s)][::3] for s in ([], [0], [1], [0, 1]))
    each = both - one - other + none
    half = norm.ppf(0.975) * each.std(ddof=1) / np.sqrt(facts)
    assert row["interaction"] == pytest.approx(each.mean())
    assert row["interaction_high"] - row["interaction"] == pytest.approx(half, rel=0.12)
    assert row["interaction"] - row["interaction_low"] == pytest.approx(half, rel=0.12)
    assert (row["n"], row["units"]) == (180, 60)


def test_top1_of_few_facts_is_not_sure() -> None:
    """All facts agree: the interval is Wilson's, with the others as far off as they can be."""
    facts = 20
    rank = {s: np.full(facts, 1.0 if len(s) == 2 else 9.0) for s in subsets(range(2))}
    planned, table = synthetic(rank, 2, metric="rank")
    found = measured_interactions(planned, table, ["top1"], Draw("fact", 0.95, 200, 0))
    row = found.pairs.iloc[0]
    _, most = wilson(0, facts)
    assert row["interaction"] == 1.0
    assert row["interaction_low"] == pytest.approx(1 - most - 2 * most)
    assert row["call"] == "AND"
    few, table = synthetic({s: v[:3] for s, v in rank.items()}, 2, metric="rank")
    found = measured_interactions(few, table, ["top1"], Draw("fact", 0.95, 200, 0))
    assert found.pairs["call"].tolist() == ["undecided"]


# --- gates made by hand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "call", "share"),
    [("and", "AND", 1.0), ("or", "OR", -1.0), ("additive", "additive", 0)],
)
def test_a_gate_made_by_hand_is_called_so(kind: Kind, call: str, share: float | int) -> None:
    model, asked = gated(kind)
    players = dict(zip("ab", PLACES[kind], strict=True))
    measures = ["logprob", "top1", "kl_full"]
    found = find.interactions(
        model, asked, players, metrics=measures, resamples=500, progress=False
    )
    row = found.pairs[found.pairs["metric"] == "logprob"].iloc[0]
    assert row["call"] == call
    assert row["share"] == pytest.approx(share, abs=0.05)
    value = found.values.set_index(["metric", "coalition"])["value"]
    assert value["top1", "none"] == 0.0
    assert value["top1", "a + b"] == 1.0
    assert value["logprob", "a + b"] > value["logprob", "none"] + 1
    alone = {"and": (0.0, 0.0), "or": (1.0, 1.0)}.get(kind)
    if alone is not None:
        assert (value["top1", "a"], value["top1", "b"]) == alone
        # The divergence from the full run falls: an AND was called OR there, and the reverse.
        assert value["kl_full", "a + b"] < value["kl_full", "none"] - 0.5
        assert found.calls.loc[0, measures].tolist() == [call] * 3
    else:
        # Each fact has one place only, so that in each the other adds exactly nothing.
        assert value["top1", "a"] + value["top1", "b"] == 1.0
        assert 0 < value["top1", "a"] < 1
        assert row["interaction"] == pytest.approx(0.0, abs=1e-5)


def test_what_adds_up_in_log_probability_may_be_an_and_in_top1() -> None:
    facts, rng = 40, np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=facts)
    planned, table = synthetic({s: noise * len(s) - 4 + len(s) for s in subsets(range(2))}, 2)
    table["rank"] = np.where(table["graft"] == "p0 + p1", 1.0, 2.0)
    found = measured_interactions(planned, table, ["logprob", "top1"], Draw("fact", 0.95, 300, 0))
    assert found.calls.to_dict("records") == [
        {"a": "p0", "b": "p1", "logprob": "additive", "top1": "AND"}
    ]


# --- players of a found set --------------------------------------------------------------------


def test_players_of_a_graft_are_its_positions_by_kind(llama: Tiny) -> None:
    graft = Graft.parse(
        "sft @ last : q + mlp_in + ln2 : 0-1 | sft @ last : mlp_out : 2 : n1-3 | "
        "sft @ first_entity : attn | sft @ all : unembed"
    )
    players = find.players_of(graft)
    assert {name: str(g) for name, g in players.items()} == {
        "last: attention": "sft @ last : q : 0-1",
        "last: MLP": "sft @ last : mlp_in : 0-1 | sft @ last : mlp_out : 2 : n1-3",
        "last: other": "sft @ last : ln2 : 0-1",
        "first_entity: attention": "sft @ first_entity : attn",
        "all: other": "sft @ all : unembed",
    }
    assert find.players_of(SimpleNamespace(graft=graft)) == players  # as `localise` gives it
    whole = find.players_of("sft @ last | 0.5*sft @ first_entity : block : 1", llama.model)
    assert {name: str(g) for name, g in whole.items()} == {
        "last: attention": "sft @ last : q + k + v + o",
        "last: MLP": "sft @ last : mlp_in + mlp_gate + mlp_out",
        "last: other": "sft @ last : embed + ln1 + ln2 + ln_final + unembed",
        "first_entity: attention": "0.5*sft @ first_entity : q + k + v + o : 1",
        "first_entity: MLP": "0.5*sft @ first_entity : mlp_in + mlp_gate + mlp_out : 1",
        "first_entity: other": "0.5*sft @ first_entity : ln1 + ln2 : 1",
    }


def test_the_players_together_are_the_graft(llama: Tiny) -> None:
    graft = Graft.parse("sft @ last | sft @ first_entity : block : 1")
    players = find.players_of(graft, llama.model)
    found = find.interactions(llama.model, prompts(), players, resamples=50, progress=False)
    everybody = " + ".join(players)
    whole = found.results[found.results["graft"] == everybody].set_index("prompt")["logprob"]
    with torch.no_grad():
        for number in (1, 6):
            prompt = prompts()[number]
            length = len(llama.tokenizer(prompt.text)["input_ids"])
            answer = llama.tokenizer(prompt.text + " Mara Finn")["input_ids"][length]
            logits = llama.model(prompt, graft=graft)[0, -1]
            alone = float(logits.log_softmax(-1)[answer])
            assert whole[number] == pytest.approx(alone, abs=2e-5)


# --- what is refused, and what is left out -----------------------------------------------------


@pytest.mark.parametrize(
    ("players", "sentence"),
    [
        ({"a": "sft @ last"}, r"1 players. Give from 2 to 62, each a named graft"),
        ({"a": "sft @ last", "b": "none"}, r"player 'b' is the graft 'none', which changes noth"),
        ({"a": "sft @ last", "b": "0*sft @ bos"}, r"player 'b' .* which changes nothing"),
        ({"a": "sft @ last", "b": "sft @ last : q"}, r"'a' and 'b' overlap in prompt 0: both graft "
         r"q of layer 0 at position \d+\. Take it out"),
        ({"a": "sft @ last : unembed", "b": "sft @ all : unembed"}, r"both graft unembed at posit"),
        ({"a": "sft @ last : q : 1 : 0-1", "b": "sft @ last : q : 1 : 1-2"}, r"both graft q of "
         r"layer 1 at position \d+, unit 1\."),
        ({"a": "sft @ last : k : 1", "b": "sft @ ~bos : k : 1 : 1"}, r"position \d+, unit 1\."),
        ({"a": "sft @ last", "b": "task @ bos"}, r"no source 'task'. This model has: pre sft"),
        ({"a": "sft @ last", "b": "sft @ bos : q : 99"}, r"no layer 99"),
        ({"a": "sft @ last", "b": "sft @ title"}, r"none of 8 prompts can run every player. .*"
         r"no span 'title' here"),
        ({"a": "sft @ last", "b": "sft @ bos", "a + b": "sft @ [1]"}, r"two coalitions would be "
         r"called 'a \+ b'.* Rename a player"),
        ({"a": "sft @ last", "none": "sft @ bos"}, r"two coalitions would be called 'none'"),
        ({str(i): f"sft @ [{i}]" for i in range(63)}, r"63 players. Give from 2 to 62"),
        ({"a": "sft @ last", "b": 3}, r"grafts\['b'\]=3 is not a graft"),
    ],
)  # fmt: skip
def test_players_that_cannot_play(llama: Tiny, players, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find.interactions(llama.model, prompts(), players, progress=False)


def test_players_must_not_overlap_in_the_answer_either(llama: Tiny) -> None:
    """Its tokens count as `last`, and as all but the prompt's own last one."""
    players = {"a": "sft @ last : mlp", "b": "sft @ ~[-1] : mlp"}
    asked = prompts()[:2]
    with pytest.raises(ValueError, match=r"both graft mlp_in of layer 0 at the answer's tokens\."):
        find.interactions(llama.model, asked, players, metrics="answer_logprob", progress=False)
    apart = players | {"b": "sft @ ~last : mlp"}
    for chosen, metric in ((apart, "answer_logprob"), (players, "logprob")):
        found = find.interactions(
            llama.model, asked, chosen, metrics=metric, resamples=20, progress=False
        )
        assert set(found.values["n"]) == {2}


def test_heads_and_neurons_of_one_site_may_be_shared_out(llama: Tiny) -> None:
    players = {"a": "sft @ last : q + mlp_in : 1", "b": "sft @ last : o : 1 : 0"}
    players |= {"c": "sft @ last : o : 1 : 1", "d": "sft @ last : mlp_out : 1 : n0-3"}
    found = find.interactions(llama.model, prompts()[:2], players, resamples=20, progress=False)
    assert len(found.values) == 2 * 16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metrics": "recovery"}, r"'recovery' has no mean over prompts. Allowed: top1 top5"),
        ({"metrics": "logporb"}, r"'logporb' has no mean .* Did you mean 'logprob'"),
        ({"metrics": []}, r"metrics=\[\]: name at least one measure"),
        ({"metrics": ["top1", "top1"]}, r"name at least one measure, and each once"),
        ({"metrics": "logit_diff"}, r"'logit_diff' was not measured here"),
        ({"metrics": None}, r"metrics=None\. Give one, or a list of them"),
        ({"metrics": [3]}, r"metrics: 3 has no mean over prompts\. Allowed: top1"),
        ({"margin": 1.5}, r"margin=1.5: write a share of the whole effect"),
        ({"margin": "a"}, r"margin='a': write a share of the whole effect"),
        ({"permutations": 2.5}, r"permutations=2.5. Write 2 or more"),
        ({"seed": -1}, r"seed=-1: write a whole number from 0"),
        ({"seed": None}, r"seed=None: write a whole number from 0"),
        ({"level": "95%"}, r"level='95%' is not in \(0, 1\)"),
        ({"resamples": 1.5}, r"resamples=1.5 is not a whole number"),
        ({"permutations": 1}, r"permutations=1. Write 2 or more"),
        ({"level": 1.5}, r"level=1.5 is not in \(0, 1\)"),
        ({"resamples": 0}, r"resamples=0 is not positive"),
    ],
)
def test_settings_that_are_wrong(llama: Tiny, options, sentence: str, unchecked: None) -> None:
    players = {"a": "sft @ last", "b": "sft @ bos"}
    with pytest.raises(ValueError, match=sentence):
        find.interactions(llama.model, prompts()[:2], players, progress=False, **options)


def test_what_is_not_a_prompt(llama: Tiny, unchecked: None) -> None:
    players = {"a": "sft @ last", "b": "sft @ bos"}
    with pytest.raises(ValueError, match=r"number 1 is 'Ann', not a Prompt. Write Prompt\(text"):
        find.interactions(llama.model, [prompts()[0], "Ann"], players)
    with pytest.raises(ValueError, match=r"prompts=None\. Give one, or a list of them"):
        find.interactions(llama.model, None, players)
    with pytest.raises(ValueError, match=r"model=None is not a GraftedTransformer\. Give what"):
        find.interactions(None, prompts(), players)
    with pytest.raises(ValueError, match=r"found=3 is not a graft"):
        find.players_of(3)
    with pytest.raises(ValueError, match=r"found is the graft 'none', which has no parts"):
        find.players_of("none")
    with pytest.raises(ValueError, match=r"names 'all', and which components .* give the model"):
        find.players_of("sft @ last")


def test_prompts_that_lack_a_span_are_left_out_and_told(llama: Tiny) -> None:
    other = Prompt("{first_entity} met {title} and", {"first_entity": "Ann", "title": "It"}, " A")
    asked = [*prompts()[:2], other]
    players = {"a": "sft @ first_entity", "b": "sft @ title"}
    with pytest.warns(UserWarning, match=r"2 of 3 prompts cannot run every player .* prompt 0"):
        found = find.interactions(llama.model, asked, players, resamples=20, progress=False)
    assert set(found.not_run) == {0, 1}
    assert "no span 'title' here" in found.not_run[0]
    assert set(found.results["prompt"]) == {2}
    assert set(found.values["n"]) == {1}


def test_facts_are_answers_where_prompts_name_none(llama: Tiny) -> None:
    texts = ("{first_entity} met", "{first_entity} and")
    asked = [
        Prompt(t, {"first_entity": p}, a)
        for t in texts
        for p, a in zip(PEOPLE[:3], (" A", " B", " C"), strict=True)
    ]
    players = {"a": "sft @ last", "b": "sft @ bos"}
    found = find.interactions(llama.model, asked, players, resamples=20, progress=False)
    assert set(found.table["units"]) == {3}
    assert set(found.table["n"]) == {6}


def test_a_measure_of_ones_own_is_a_game_too(llama: Tiny) -> None:
    own = Measure("peak", (), lambda logits: logits.amax(-1), label="highest logit")
    players = {"a": "sft @ last : mlp", "b": "sft @ last : attn"}
    found = find.interactions(
        llama.model, prompts()[:2], players, metrics=[own, "kl_base"], resamples=20, progress=False
    )
    assert found.calls.columns.tolist() == ["a", "b", "peak", "kl_base"]
    value = found.values.set_index(["metric", "coalition"])["value"]
    with torch.no_grad():
        tops = [float(llama.model(p, graft="sft @ last : mlp")[0, -1].max()) for p in prompts()[:2]]
    assert value["peak", "a"] == pytest.approx(np.mean(tops), abs=2e-5)
    assert value["kl_base", "none"] == pytest.approx(0.0, abs=1e-6)
