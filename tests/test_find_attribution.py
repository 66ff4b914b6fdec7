"""Attribution, against the sequential algorithm on weights that are really mixed, against sweeps,
and against Hugging Face's logits."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS, tiny_model, tiny_sources
from loras import adapted
from reference import components_of, sequential_graft
from test_laws import EACH_FAMILY, ONE_OF_EACH_FAMILY
from toytokenizers import TOKENIZERS

from graftlens import Graft, Prompt, evaluate, find
from graftlens.components import Component
from graftlens.find import attribution, gradients
from graftlens.find.asked import Asked
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer

TEMPLATES = ("{first_entity} plays with", "In a film of last year, {first_entity} was next to")
PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.")
POSITIONS = ["first_entity", "last", "rest"]
SITE = ["component", "layer", "position"]


def asking(count: int = 6) -> list[Prompt]:
    """Prompts of different lengths."""
    given = [(t, p) for t in TEMPLATES for p in PEOPLE][:count]
    return [
        Prompt(t, {"first_entity": p}, " Mara Finn", ("!", "."), answers=(" Mara", "!"))
        for t, p in given
    ]


def near(variant: str, share: float = 0.3) -> Tiny:
    """A pair that differs in every parameter, as little as after a finetuning: between two models
    that have nothing in common, the path of weights is too rough for a few steps."""
    tokenizer = TOKENIZERS["llama3"]()
    sources = tiny_sources(variant, ("pre", "sft"), 1, len(tokenizer))
    for theirs, own in zip(sources["sft"].parameters(), sources["pre"].parameters(), strict=True):
        theirs.data.lerp_(own.data, 1 - share)
    model = GraftedTransformer.from_pretrained(
        sources, tokenizer=tokenizer, check=False, verbose=False
    )
    return Tiny(variant, sources, model, tokenizer)


@pytest.fixture(scope="module")
def llama() -> Tiny:
    return near("llama")


# -- gradients, against central differences of the sequential algorithm ------------------------

IDS = [40, 7, 93, 21]
TARGET = 11
#: The tokens of each position.
AT = {"[1]": [1], "[-1]": [3], "~([1] + [-1])": [0, 2]}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, softmax and measures are in float32 in any model; here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


Place = tuple[str, int | None, str]


class Oracle:
    """A tiny pair in float64, and log-probabilities of weights that are mixed for real."""

    def __init__(self, variant: str) -> None:
        pair = tiny_sources(variant, ("pre", "sft"), seed=3)
        self.models = {name: model.double() for name, model in pair.items()}
        self.model = GraftedTransformer.from_pretrained(
            self.models, check=False, verbose=False, dtype=torch.float64
        )

    def attributed(self, **options: Any) -> pd.DataFrame:
        given: dict[str, Any] = {"positions": ["[1]", "[-1]", "rest"], "targets": [TARGET]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the scores of")
            return find.attribute(self.model, torch.tensor([IDS]), "sft", **given, **options)

    def logprob(self, strength: float, change: dict[Place, float]) -> float:
        """With all strengths alike, but for those that change."""
        positions = {token: name for name, tokens in AT.items() for token in tokens}

        def choose(component: str, layer: int | None, position: int, unit: int | None) -> Any:
            s = strength + change.get((component, layer, positions[position]), 0.0)
            return {"pre": 1 - s, "sft": s}

        logits = sequential_graft(self.models, IDS, choose)
        return float(logits[-1].log_softmax(-1)[TARGET])

    def slope(self, strength: float, change: dict[Place, float]) -> float:
        """The central difference along a direction."""
        step = 1e-6  # the paths of families that clamp have kinks
        ends = [
            self.logprob(strength, {place: sign * step * d for place, d in change.items()})
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)


def places_in(table: pd.DataFrame) -> list[Place]:
    return [
        (place.component.value, place.layer, str(place.position)) for place in find.places_of(table)
    ]


def check_slopes(
    oracle: Oracle, table: pd.DataFrame, column: str, strength: float, groups: list[list[int]]
) -> None:
    places, found = places_in(table), table[column].to_numpy()
    draw = random.Random(column)
    for group in groups:
        change = {places[i]: draw.choice((-1.0, 1.0)) for i in group}
        ours = sum(found[i] * d for i, d in zip(group, change.values(), strict=True))
        assert abs(ours - oracle.slope(strength, change)) < 1e-5 * np.abs(found).max(), group


@pytest.mark.parametrize(
    "variant",
    [
        variant if variant in ONE_OF_EACH_FAMILY else pytest.param(variant, marks=pytest.mark.slow)
        for variant in VARIANTS
    ],
)
def test_gradients_at_both_ends_are_central_differences(exact: None, variant: str) -> None:
    """All places at once, and some by themselves; the values are the sources' own."""
    oracle = Oracle(variant)
    table = oracle.attributed(steps=1)
    places = places_in(table)
    assert len(places) == 3 * len(oracle.model.arch.sites)
    assert {c for c, _, _ in places} == set(components_of(oracle.models["pre"]))
    every = list(range(len(places)))
    some = [[i] for i in random.Random(variant).sample(every, 2)]
    for column, strength in (("at_base", 0.0), ("at_full", 1.0)):
        check_slopes(oracle, table, column, strength, [every, *some])
    for value, source in (("value_base", "pre"), ("value_full", "sft")):
        with torch.no_grad():
            logits = oracle.models[source](torch.tensor([IDS]), use_cache=False).logits[0, -1]
        assert abs(table[value][0] - float(logits.log_softmax(-1)[TARGET])) < 1e-9


@pytest.mark.slow
@EACH_FAMILY
def test_gradients_of_every_place_are_central_differences(exact: None, variant: str) -> None:
    """Each place by itself, half-way between the ends: the one node of a single step."""
    oracle = Oracle(variant)
    table = oracle.attributed(steps=1)
    check_slopes(oracle, table, "ig", 0.5, [[i] for i in range(len(table))])


def test_integrals_are_those_of_the_sequential_algorithm(exact: None) -> None:
    """Four nodes of Gauss-Legendre, written out here, for a few places."""
    oracle = Oracle("llama-biased")
    table = oracle.attributed(steps=4)
    inner, outer = (3 / 7 - 2 / 7 * 1.2**0.5) ** 0.5, (3 / 7 + 2 / 7 * 1.2**0.5) ** 0.5
    light, heavy = (18 - 30**0.5) / 36, (18 + 30**0.5) / 36
    nodes = [(-outer, light), (-inner, heavy), (inner, heavy), (outer, light)]
    places = places_in(table)
    for i in random.Random(0).sample(range(len(places)), 3):
        expected = sum(w / 2 * oracle.slope((1 + x) / 2, {places[i]: 1.0}) for x, w in nodes)
        assert abs(table["ig"][i] - expected) < 1e-5 * table["ig"].abs().max()


# -- what adds up ------------------------------------------------------------------------------


def _added(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["prompt", *SITE]
    return table.groupby(keys, sort=False, dropna=False)[["ig", "at_base", "at_full"]].sum()


@pytest.mark.parametrize("outside", ["base", "full"])
@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "neox-sequential", "gemma2"])
def test_units_and_biases_add_up_to_their_sites(tiny: MakeTiny, variant: str, outside: Any) -> None:
    model = tiny(variant).model
    arch = model.arch
    tokens = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"positions": [[1], [-1]], "targets": [5, 6], "outside": outside}
    given |= {"steps": 2, "within": "sft @ [1, -1]"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of")
        sites = find.attribute(model, tokens, "sft", **given)
        assert sites["unit"].isna().all()
        whole = _added(sites)
        for by in ("head", "neuron", "direction"):
            table = find.attribute(model, tokens, "sft", by=by, **given)
            added = _added(table)
            pd.testing.assert_index_equal(added.index, whole.index)
            scale = whole.abs().max().max()
            np.testing.assert_allclose(added, whole, atol=2e-5 * scale)
            for value in ("value_base", "value_full"):
                np.testing.assert_allclose(
                    table.groupby("prompt")[value].first(),
                    sites.groupby("prompt")[value].first(),
                    atol=1e-5,
                )
            one = table[(table["prompt"] == 0) & (table["position"] == "[1]")]
            of = {key: list(rows) for key, rows in one.groupby(["component", "layer"])["unit"]}
            has_bias = model.weights_of(Component.O, 0)[1] is not None
            biased = ["bias"] if has_bias else []
            if by == "head":
                assert of["q", 1] == list(range(arch.n_heads))
                assert of["k", 1] == of["v", 0] == list(range(arch.n_kv_heads))
                assert of["o", 1] == [*range(arch.n_heads), *biased]
                assert len(of["mlp_in", 1]) == 1
            elif by == "neuron":
                assert of["mlp_in", 1] == list(range(arch.d_mlp))
                assert of["mlp_out", 1][: arch.d_mlp] == list(range(arch.d_mlp))
                assert len(of["q", 1]) == 1
            else:
                rank = min(arch.shape_of(Component.O))
                assert of["o", 1] == [*(f"d{i}" for i in range(rank)), *biased]


def test_directions_are_singular_ones(tiny: MakeTiny) -> None:
    """A difference of rank two has two directions; the larger acts as its own rank-one pair."""
    draw = torch.Generator().manual_seed(1)
    base = tiny_model("llama", 4)
    sources = {name: copy.deepcopy(base) for name in ("pre", "sft", "first")}
    u, _ = torch.linalg.qr(torch.randn(24, 2, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(40, 2, generator=draw))
    for name, values in (("sft", (3.0, 0.5)), ("first", (3.0,))):
        weight = sources[name].model.layers[1].mlp.down_proj.weight
        weight.data += (u[:, : len(values)] * torch.tensor(values)) @ v[:, : len(values)].T
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    given: dict[str, Any] = {"positions": ["rest"], "targets": [9], "by": "direction", "steps": 1}
    tokens = torch.tensor([IDS])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of")
        table = find.attribute(model, tokens, "sft", **given)
        first = find.attribute(model, tokens, "first", **given)
    mine = table[(table["component"] == "mlp_out") & (table["layer"] == 1)]
    assert mine["unit"].tolist()[:2] == ["d0", "d1"]
    # What is left is the rounding of the sum of weights, far below both.
    sizes = mine["at_base"].abs()
    assert not (sizes.iloc[2:] > 1e-4 * sizes.iloc[:2].min()).any()
    alone = first[(first["component"] == "mlp_out") & (first["layer"] == 1)]
    assert abs(mine["at_base"].iloc[0] - alone["at_base"].iloc[0]) < 1e-4 * abs(
        alone["at_base"].iloc[0]
    )
    assert (table.drop(index=mine.index)[["ig", "at_base", "at_full"]] == 0).all().all()


@pytest.mark.parametrize("by", ["site", "head", "neuron", "direction"])
def test_adapters_are_attributed_as_their_merged_models(by: Any) -> None:
    t = adapted("llama-biased")
    merged = GraftedTransformer.from_pretrained(t.sources, check=False, verbose=False)
    given: dict[str, Any] = {"positions": ["[0]", "rest"], "targets": [5], "by": by, "steps": 2}
    tables = []
    for model in (t.model, merged):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the scores of")
            tables.append(find.attribute(model, torch.tensor([IDS]), "relation", **given))
    ours, theirs = tables
    assert ours["ig"].abs().max() > 0
    if by == "direction":
        # Which directions there are is the factors' own rank; the merged have rounding as well.
        ranks = ours.groupby(SITE, dropna=False)["unit"].count()
        assert set(ranks[["q", "v"]]) <= {0, 1, 3, 4}
        ours, theirs = _added(ours), _added(theirs)
    scores = ["ig", "at_base", "at_full"]
    np.testing.assert_allclose(
        ours[scores], theirs[scores], atol=1e-4 * float(theirs[scores].abs().max().max())
    )


def test_three_sites_that_differ_are_found(llama: Tiny) -> None:
    """All others have the score 0, exactly."""
    base = llama.sources["pre"]
    changed = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(0)
    layers = changed.model.layers
    for weight in (
        layers[0].self_attn.v_proj.weight, layers[1].mlp.down_proj.weight, changed.lm_head.weight,
    ):  # fmt: skip
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    model = GraftedTransformer.from_pretrained(
        {"pre": base, "sft": changed}, tokenizer=llama.tokenizer, check=False, verbose=False
    )
    for by in ("site", "head", "neuron"):
        table = find.attribute(model, asking(), "sft", positions=POSITIONS, by=by, steps="auto")
        there = table[table["ig"] != 0]
        sites = {(c, None if pd.isna(l) else int(l)) for c, l in there[SITE[:2]].to_numpy()}
        assert sites == {("v", 0), ("mlp_out", 1), ("unembed", None)}
        # The last token alone is unembedded, and v of it is read by itself alone.
        assert set(there[there["component"] == "unembed"]["position"]) == {"last"}
        assert (table["completeness"].dropna() < 0.01).all()
        rest = table[~table["component"].isin(["v", "mlp_out", "unembed"])]
        assert (rest[["at_base", "at_full"]] == 0).all().all()


@pytest.mark.parametrize("by", ["site", "head", "neuron", "direction"])
def test_what_is_equal_in_both_sources_has_the_score_0(llama: Tiny, by: Any) -> None:
    """Also where nothing else is searched, so that no gradient is asked for."""
    base = llama.sources["pre"]
    changed = copy.deepcopy(base)
    changed.model.layers[0].self_attn.v_proj.weight.data *= 2
    model = GraftedTransformer.from_pretrained(
        {"pre": base, "sft": changed}, tokenizer=llama.tokenizer, check=False, verbose=False
    )
    given: dict[str, Any] = {"positions": POSITIONS, "within": "sft @ all : mlp", "by": by}
    table = find.attribute(model, asking(2), "sft", steps="auto", **given)
    assert set(table["component"]) == {"mlp_in", "mlp_gate", "mlp_out"}
    assert (table[["ig", "at_base", "at_full"]] == 0).all().all()
    assert table["completeness"].isna().all()
    whole = find.attribute(model, asking(2), "sft", positions=POSITIONS)
    for end in ("value_base", "value_full"):
        expected = whole.groupby("prompt")["value_base"].first()
        np.testing.assert_allclose(table.groupby("prompt")[end].first(), expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["gpt2", "gemma3", "qwen3", "olmo-clip"])
def test_the_scores_of_a_prompt_add_up(variant: str) -> None:
    """To the difference of the two sources' own log-probabilities. olmo-clip's path has kinks:
    queries, keys and values are clamped."""
    t = near(variant, 0.1)
    prompts = asking(4)
    table = find.attribute(t.model, prompts, "sft", positions=POSITIONS, steps="auto")
    assert t.tokenizer is not None
    for number, (_, rows) in enumerate(table.groupby("prompt")):
        prompt = prompts[number]
        ids = t.tokenizer(prompt.text)["input_ids"]
        answer = t.tokenizer(f"{prompt.text} Mara Finn")["input_ids"][len(ids)]
        base, full = (float(t.logits(n, ids)[-1].log_softmax(-1)[answer]) for n in ("pre", "sft"))
        assert abs(rows["value_base"].iloc[0] - base) < 1e-4
        assert abs(rows["value_full"].iloc[0] - full) < 1e-4
        missing = abs(rows["ig"].sum() - (full - base)) / abs(full - base)
        assert abs(rows["completeness"].iloc[0] - missing) < 1e-3
        assert missing < 0.01


def test_too_few_steps_are_told(tiny: MakeTiny) -> None:
    t = tiny("olmo-clip", tokenizer="llama3")
    with pytest.warns(UserWarning, match=r"for \d of 4 prompts the scores' sum misses"):
        table = find.attribute(t.model, asking(4), "sft", positions=POSITIONS, steps=1)
    assert table["completeness"].max() > 0.01


def test_more_steps_are_taken_for_what_does_not_add_up(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only for these prompts, doubled each time."""
    ran: list[tuple[int, int]] = []
    true = attribution.integral

    def integral(passes: gradients.Passes, nodes: int) -> gradients.Scores:
        ran.append((len(passes.numbers), nodes))
        scores = true(passes, nodes)
        if nodes < 32:  # prompt 1 does not add up yet
            for row, number in enumerate(passes.numbers):
                if number == 1:
                    scores = {site: s.copy() for site, s in scores.items()}
                    for s in scores.values():
                        s[row] *= 2
        return scores

    monkeypatch.setattr(attribution, "integral", integral)
    found = find.attribute(llama.model, asking(3), "sft", positions=POSITIONS, steps="auto")
    others = [count for count, nodes in ran if nodes == 8]
    assert others == [3]
    assert [count for count, nodes in ran if nodes == 32][-1] == 1
    monkeypatch.undo()
    expected = find.attribute(llama.model, asking(3), "sft", positions=POSITIONS, steps=32)
    mine = found["prompt"] == 1
    np.testing.assert_allclose(found["ig"][mine], expected["ig"][mine], atol=1e-5)


# -- the ends are a sweep's --------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "all": {"positions": POSITIONS},
    "some": {"positions": ["first_entity", "last"]},
    "numbers": {"positions": ["first_entity", [-1]]},
    "each": {"positions": "each"},
    "within": {"positions": POSITIONS, "within": "sft @ last : mlp | sft @ first_entity : q : 1"},
    "heads": {"positions": ["last"], "within": "sft @ last : o + q : 1 : 0-1", "by": "head"},
    "the rest of the source": {"positions": ["last"], "outside": "full"},
    "each in the source": {"positions": "each", "outside": "full", "within": "sft @ last"},
}


@pytest.mark.parametrize("metric", ["logprob", "answer_logprob", "kl_base", "js_full", "prob"])
@pytest.mark.parametrize("case", CASES)
def test_values_at_the_ends_are_a_sweeps(llama: Tiny, case: str, metric: str) -> None:
    """Of the grafts with nothing and with everything that is searched grafted."""
    model, prompts = llama.model, asking(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of")
        table = find.attribute(model, prompts, "sft", metric=metric, steps=1, **CASES[case])
    asked = Asked.of(model, prompts, "sft", metric=metric, **CASES[case])
    measures = [metric] if metric.startswith(("kl", "js")) else []
    for number, prompt in enumerate(prompts):
        base, full = asked.ends(number)
        swept = evaluate(
            model, prompt, {"base": base, "full": full}, measures=measures, progress=False
        ).set_index("graft")
        rows = table[table["prompt"] == number]
        for end in ("base", "full"):
            value, expected = rows[f"value_{end}"].iloc[0], swept.loc[end, metric]
            assert abs(value - expected) < 2e-5 + 1e-5 * abs(expected), (number, end)


@pytest.mark.parametrize(
    "metric", ["entropy", "margin", "logit_diff", "answer_set_prob", "kl_from_full"]
)
def test_other_measures_add_up(llama: Tiny, metric: str) -> None:
    """`margin` and `logit_diff` bend where another token becomes the best one, so there what is
    missing is compared with what the places give and take."""
    table = _quietly(
        llama.model, asking(2), "sft", positions=POSITIONS, metric=metric, steps="auto"
    )
    for _, rows in table.groupby("prompt"):
        difference = rows["value_full"].iloc[0] - rows["value_base"].iloc[0]
        scale = rows["ig"].abs().sum() if metric in ("margin", "logit_diff") else abs(difference)
        assert abs(difference) > 1e-3
        assert abs(rows["ig"].sum() - difference) < 0.01 * scale


def test_a_measure_of_the_users_own(llama: Tiny) -> None:
    """Twice the log-probability has twice its scores, also where it is written in place."""

    def doubled(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return 2 * logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]

    own = Measure("doubled", ("answer",), doubled)
    given: dict[str, Any] = {"positions": POSITIONS, "steps": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of")
        mine = find.attribute(llama.model, asking(2), "sft", metric=own, **given)
        plain = find.attribute(llama.model, asking(2), "sft", **given)
    for column in ("ig", "at_base", "at_full", "value_base", "value_full"):
        np.testing.assert_allclose(mine[column], 2 * plain[column], atol=1e-5, rtol=1e-5)


def test_a_pair_with_two_vocabularies_adds_up_in_what_both_have(tiny: MakeTiny) -> None:
    """KL is over the common tokens, as in a sweep."""
    sources = {"pre": tiny_model("llama", 1, 90), "sft": tiny_model("llama", 2, 97)}
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    tokens = torch.tensor([[40, 7, 83, 21]])
    table = find.attribute(
        model, tokens, "sft", positions=["rest"], targets=[11], metric="kl_base", steps="auto"
    )
    with torch.no_grad():
        p, q = (sources[n](tokens).logits[0, -1, :90].log_softmax(-1) for n in ("sft", "pre"))
    assert abs(table["value_full"][0] - float((p.exp() * (p - q)).sum())) < 1e-4
    assert table["completeness"][0] < 0.01


def test_half_precision_has_its_own_rounding_only(llama: Tiny) -> None:
    """Strengths are not rounded with it."""
    given: dict[str, Any] = {"positions": POSITIONS, "steps": 4}
    expected = _quietly(llama.model, asking(2), "sft", **given)
    half = copy.deepcopy(llama.model).to(torch.bfloat16)
    for by in ("site", "neuron", "direction"):
        found = _quietly(half, asking(2), "sft", by=by, **given)
        added = _added(found)
        difference = added["ig"].to_numpy() - expected["ig"].to_numpy()
        assert np.abs(difference).max() < 0.06 * expected["ig"].abs().max(), by


# -- batches -----------------------------------------------------------------------------------


def _quietly(*args: Any, **options: Any) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of")
        return find.attribute(*args, **options)


@pytest.mark.parametrize("variant", ["gpt2", "mistral-window", "phi3-longrope"])
def test_prompts_together_are_as_by_themselves(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, tokenizer="llama3")
    prompts = asking(5)
    for given in ({"positions": POSITIONS}, {"positions": "each", "metric": "answer_logprob"}):
        options: dict[str, Any] = {"steps": 2, **given}
        together = _quietly(t.model, prompts, "sft", **options)
        alone = [_quietly(t.model, prompt, "sft", **options) for prompt in prompts]
        expected = pd.concat([one.assign(prompt=i) for i, one in enumerate(alone)])
        pd.testing.assert_frame_equal(
            together, expected.reset_index(drop=True), atol=1e-4, rtol=1e-4
        )


def test_tokens_with_padding_are_their_prompts(llama: Tiny) -> None:
    model, prompts = llama.model, asking(4)
    batch = model.batch(prompts, padding_side="left")
    mask = torch.from_numpy(batch.real).long()
    targets = [
        Asked.of(model, p, "sft", positions="each").prompts[0].scored.answer[0] for p in prompts
    ]
    given: dict[str, Any] = {"positions": "each", "steps": 2}
    by_tokens = _quietly(
        model, model.batch(batch.tokens, attention_mask=mask), "sft", targets=targets, **given
    )
    by_prompts = _quietly(model, prompts, "sft", **given)
    pd.testing.assert_frame_equal(by_tokens, by_prompts, atol=1e-4, rtol=1e-4)


def test_batches_are_halved_when_memory_runs_out(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"positions": POSITIONS, "steps": 2}
    expected = _quietly(llama.model, asking(), "sft", **given)
    true, sizes = gradients.Passes.at, list[int]()

    def at(passes: gradients.Passes, strength: float) -> gradients.At:
        sizes.append(len(passes.numbers))
        if len(passes.numbers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(passes, strength)

    monkeypatch.setattr(gradients.Passes, "at", at)
    found = _quietly(llama.model, asking(), "sft", **given)
    pd.testing.assert_frame_equal(found, expected, atol=1e-4, rtol=1e-4)
    assert sizes[:2] == [6, 3]
    assert "Memory ran out: continuing with at most 1 prompts per pass" in capsys.readouterr().out

    def never(passes: gradients.Passes, strength: float) -> gradients.At:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradients.Passes, "at", never)
    with pytest.raises(torch.OutOfMemoryError):
        _quietly(llama.model, asking(), "sft", **given)


def test_memory_bounds_the_batches(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"positions": POSITIONS, "steps": 1}
    expected = _quietly(llama.model, asking(), "sft", **given)
    monkeypatch.setattr(attribution, "affordable_rows", lambda *args: 40)
    made: list[int] = []
    true = gradients.Passes.__init__

    def init(passes: gradients.Passes, *args: Any) -> None:
        true(passes, *args)
        made.append(passes.batch.real.size)

    monkeypatch.setattr(gradients.Passes, "__init__", init)
    found = _quietly(llama.model, asking(), "sft", **given)
    assert len(made) > 2
    assert max(made) <= 40
    pd.testing.assert_frame_equal(found, expected, atol=1e-4, rtol=1e-4)


# -- the model is as before --------------------------------------------------------------------


@pytest.fixture
def learning(tiny: MakeTiny) -> Iterator[GraftedTransformer]:
    """A model some of whose parameters learn, and have a gradient."""
    model = tiny("gpt2").model.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        if number % 2:
            parameter.requires_grad_(True)
            parameter.grad = torch.full_like(parameter, 3.0)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    yield model
    for name, parameter in model.named_parameters():
        learns, value = before[name]
        assert parameter.requires_grad is learns
        assert torch.equal(parameter, value)
        assert parameter.grad is None or bool((parameter.grad == 3.0).all())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.active.innermost is None


def _asked(model: GraftedTransformer, **options: Any) -> pd.DataFrame:
    given: dict[str, Any] = {"positions": ["rest"], "targets": [5], "steps": 1, **options}
    return _quietly(model, torch.tensor([IDS]), "sft", **given)


@pytest.mark.parametrize("by", ["site", "neuron", "direction"])
def test_the_model_is_as_before(learning: GraftedTransformer, by: Any) -> None:
    expected = _asked(learning, by=by)
    with torch.no_grad():
        pd.testing.assert_frame_equal(_asked(learning, by=by), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        pd.testing.assert_frame_equal(_asked(learning, by=by), expected)
        assert torch.is_inference_mode_enabled()
    with learning.grafted("sft @ [0]"):
        pd.testing.assert_frame_equal(_asked(learning, by=by), expected)
        assert learning.active.innermost == Graft.parse("sft @ [0]")


@pytest.mark.parametrize("by", ["site", "direction"])
def test_the_model_is_as_before_after_an_exception(learning: GraftedTransformer, by: Any) -> None:
    def failing(logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("in the measure")

    with pytest.raises(KeyError, match="in the measure"):
        _asked(learning, by=by, metric=Measure("failing", (), failing))


# -- exact effects -----------------------------------------------------------------------------


def _one_by_one(
    llama: Tiny, prompt: Prompt, base: Graft, full: Graft, metric: str
) -> Callable[[Graft], float]:
    names = [metric] if metric.startswith("kl") else []

    @cache
    def value(graft: Graft) -> float:
        table = evaluate(llama.model, prompt, {"x": graft}, measures=names, progress=False)
        return float(table.set_index("graft").loc["x", metric])

    return value


@pytest.mark.parametrize(
    ("case", "metric"),
    [
        *(("all", "logprob"), ("each", "answer_logprob"), ("within", "kl_base")),
        *(("some", "rank"), ("heads", "logprob"), ("the rest of the source", "logprob")),
    ],
)
def test_exact_effects_are_grafts_one_by_one(llama: Tiny, case: str, metric: str) -> None:
    prompts = asking(5)[::2]
    table = find.exact_effects(llama.model, prompts, "sft", metric=metric, **CASES[case])
    if metric != "rank":
        shape = _quietly(llama.model, prompts, "sft", metric=metric, steps=1, **CASES[case])
        same = ["prompt", *SITE, "unit"]
        pd.testing.assert_frame_equal(table[same], shape[same])
        for end in ("value_base", "value_full"):
            np.testing.assert_allclose(table[end], shape[end], atol=1e-4)
    asked = Asked.of(llama.model, prompts, "sft", metric=metric, exact=True, **CASES[case])
    for number, prompt in enumerate(prompts):
        base, full = asked.ends(number)
        value = _one_by_one(llama, prompt, base, full, metric)
        mine = table[table["prompt"] == number].reset_index(drop=True)
        assert abs(mine["value_base"][0] - value(base)) < 1e-4
        assert abs(mine["value_full"][0] - value(full)) < 1e-4
        places = find.places_of(mine)
        assert len(places) == len(mine)
        for i in random.Random(number).sample(range(len(places)), 3):
            alone = value(base | Graft((places[i].rule("sft"),))) - value(base)
            missing = value(full) - value(full | Graft((places[i].rule("pre"),)))
            assert abs(mine["alone"][i] - alone) < 1e-4
            assert abs(mine["missing"][i] - missing) < 1e-4


def test_exact_effects_of_tokens_are_the_sequential_algorithms(tiny: MakeTiny) -> None:
    """By head, for a model with biases and without a tokenizer; a bias alone has none."""
    t = tiny("gpt2")
    table = find.exact_effects(
        t.model, torch.tensor([IDS]), "sft",
        positions=[[1], [-1]], targets=[TARGET], by="head", within="sft @ [1, -1] : o + q",
        steps="auto",  # as attribute takes it
    )  # fmt: skip
    assert table[table["unit"] == "bias"][["alone", "missing"]].isna().all().all()

    def logprob(component: str, layer: int, position: int, head: int) -> float:
        def choose(c: str, l: int | None, p: int, unit: int | None) -> str:
            return "sft" if (c, l, p, unit) == (component, layer, position, head) else "pre"

        logits = sequential_graft(t.sources, IDS, choose)
        return float(logits[-1].log_softmax(-1)[TARGET])

    base = float(t.logits("pre", IDS)[-1].log_softmax(-1)[TARGET])
    whole = table[table["unit"] != "bias"]
    for i in random.Random(0).sample(range(len(whole)), 4):
        row = whole.iloc[i]
        position = 1 if row["position"] == "[1]" else 3
        theirs = logprob(row["component"], int(row["layer"]), position, int(row["unit"]))
        assert abs(row["alone"] - (theirs - base)) < 1e-4


def test_sites_with_equal_tensors_have_no_effect(tiny: MakeTiny) -> None:
    base = tiny_model("llama", 1)
    changed = copy.deepcopy(base)
    changed.model.layers[1].mlp.up_proj.weight.data += 0.1
    model = GraftedTransformer.from_pretrained(
        {"pre": base, "sft": changed}, check=False, verbose=False
    )
    table = find.exact_effects(
        model, torch.tensor([IDS]), "sft", positions=["rest"], targets=[TARGET]
    )
    moved = table[(table["alone"] != 0) | (table["missing"] != 0)]
    assert moved[SITE].values.tolist() == [["mlp_in", 1, "all"]]
    full = moved["value_full"].iloc[0] - moved["value_base"].iloc[0]
    np.testing.assert_allclose(moved[["alone", "missing"]].iloc[0], full, atol=1e-5)
