"""`find.localise`: planted places are found, nothing searched on is reported, refusals."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny
from peft import LoraConfig, get_peft_model
from reference import sequential_graft

from graftlens import find
from graftlens.components import COMPONENTS, Component
from graftlens.find.evidence import SHARES, _area
from graftlens.find.judging import Judge, Judged, recovery
from graftlens.find.matched import matched_sets
from graftlens.find.places import Place
from graftlens.find.searching import EVALUATIONS, down_to_units, nested, refined, series
from graftlens.find.sets import Size, gathered, site_of, without
from graftlens.find.splitting import Split, split
from graftlens.graft import Graft
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.making import largest_rank
from graftlens.prompts import Prompt, PromptError, continuation

PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.", "Siobhán", "Ben Ode", "Mia", "Oskar", "Lea")
POSITIONS = ["first_entity", "last", "rest"]


def prompts_of(answers: Sequence[str] | None = None) -> list[Prompt]:
    """Two prompts for each of eight people, each person a fact."""
    texts = ("{first_entity} plays with", "In a film {first_entity} was seen next to")
    return [
        Prompt(
            text,
            {"first_entity": person, "fact": f"film {number}"},
            " Mara" if answers is None else answers[2 * number + place],
        )
        for number, person in enumerate(PEOPLE)
        for place, text in enumerate(texts)
    ]


#: The sites of the planted pair: they act at the last token only, as nothing after them mixes
#: positions.
PLANTED = ("q", "mlp_out", "unembed")


def _tensor(model: Any, site: str) -> torch.Tensor:
    last = model.model.layers[-1]
    modules = {"q": last.self_attn.q_proj, "mlp_out": last.mlp.down_proj, "unembed": model.lm_head}
    return modules[site].weight


@pytest.fixture(scope="module")
def planted(tiny: MakeTiny) -> tuple[GraftedTransformer, dict[str, Any], list[Prompt]]:
    """A pair that differs in three tensors, and prompts whose answers need all three.

    The answers are chosen by Hugging Face's models in which one of the three is missing: for each
    prompt the token that loses most, at its least, when any one is.
    """
    llama = tiny("llama", tokenizer="llama3")
    pre = copy.deepcopy(llama.sources["pre"])
    if pre.config.tie_word_embeddings:
        pre.lm_head.weight = torch.nn.Parameter(pre.lm_head.weight.clone(), requires_grad=False)
        pre.config.tie_word_embeddings = False

    def changed(sites: Sequence[str]) -> Any:
        model = copy.deepcopy(pre)
        for site in sites:
            tensor = _tensor(model, site)
            with torch.no_grad():
                tensor.copy_(_tensor(llama.sources["sft"], site))
        return model

    mixed = {some: changed(some) for n in range(4) for some in itertools.combinations(PLANTED, n)}
    tokenizer = llama.tokenizer
    assert tokenizer is not None
    model = GraftedTransformer.from_pretrained(
        {"pre": pre, "sft": mixed[PLANTED]}, tokenizer=tokenizer, check=False, verbose=False
    )
    answers = []
    for prompt in prompts_of():
        (tokens,) = model.tokenized(prompt)
        said = {
            some: one(torch.tensor([list(tokens.ids)])).logits[0, -1].log_softmax(-1)
            for some, one in mixed.items()
        }
        full = said[PLANTED]
        losses = [full - said[some] for some in itertools.combinations(PLANTED, 2)]
        least = torch.stack(losses).amin(0)
        for token in least.argsort(descending=True).tolist():
            text = tokenizer.decode([token])
            with contextlib.suppress(PromptError):
                begins = text.startswith(" ") and text.strip()
                if begins and continuation(tokens, text, tokenizer, None) == (token,):
                    break
        assert least[token] > 0
        answers.append(text)
    return model, mixed, prompts_of(answers)


@pytest.fixture(scope="module")
def found(planted: Any) -> Any:
    model, _, prompts = planted
    return find.localise(
        model, prompts, "sft", positions=POSITIONS, target=0.999, goal="both", random=20, seed=1
    )


def test_planted_places_are_found_exactly(found: Any) -> None:
    last = found.table["layer"].max()
    assert {(str(p.component), p.layer, p.position) for p in found.places} == {
        ("q", last, "last"),
        ("mlp_out", last, "last"),
        ("unembed", None, "last"),
    }
    assert found.reached
    assert str(found.graft) == f"sft @ last : q + mlp_out : {last} | sft @ last : unembed"
    assert Graft.from_yaml(found.yaml) == Graft.parse(found.text) == found.graft
    rows = found.summary.set_index("graft")
    assert rows.at["found", "recovery"] == pytest.approx(1, abs=1e-4)
    assert rows.at["complement", "recovery"] == pytest.approx(0, abs=1e-4)
    # No other site changes a number, so 17 of the table's scores are zero but three.
    assert set(found.table.loc[found.table["score"].abs() > 1e-6, "component"]) == set(PLANTED)
    enough = (found.random["enough"] > rows.at["found", "recovery"] - 1e-5).sum()
    rest = (found.random["without"] < rows.at["complement", "recovery"] + 1e-5).sum()
    assert found.p_value == pytest.approx((1 + max(enough, rest)) / 21)
    assert found.sentence.startswith("3 of ")
    assert found.table.loc[found.table["in_set"], "stability"].min() > 0.8


def _as_adapter(pre: Any, sft: Any) -> Any:
    """The planted differences as a LoRA adapter, by their singular values."""
    last = len(pre.model.layers) - 1
    modules = {f"model.layers.{last}.self_attn.q_proj": "q", "lm_head": "unembed"}
    modules |= {f"model.layers.{last}.mlp.down_proj": "mlp_out"}
    rank = max(min(_tensor(pre, site).shape) for site in PLANTED)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
    adapter = get_peft_model(copy.deepcopy(pre), settings)
    for name, site in modules.items():
        delta = _tensor(sft, site).double() - _tensor(pre, site).double()
        u, values, v = torch.linalg.svd(delta.detach(), full_matrices=False)
        layer = adapter.get_base_model().get_submodule(name)
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        a.zero_()[: len(values)] = values[:, None] * v
        b.zero_()[:, : len(values)] = u
    return adapter


@pytest.mark.parametrize("kind", ["adapter", "made"])
def test_an_adapter_and_a_made_source_are_localised_as_what_they_equal(
    kind: str, planted: Any, found: Any, tmp_path: Path
) -> None:
    whole, mixed, prompts = planted
    pre, sft = mixed[()], mixed[PLANTED]
    if kind == "adapter":
        _as_adapter(pre, sft).save_pretrained(tmp_path)
        sources = {"pre": pre, "sft": tmp_path}
    else:
        recipe = {"of": "whole", "rank": largest_rank(whole.arch)}
        sources = {"pre": pre, "whole": sft, "sft": recipe}
    model = GraftedTransformer.from_pretrained(
        sources, tokenizer=whole.tokenizer, check=False, verbose=False
    )
    weight, _ = model.weights_of(Component.Q, whole.arch.n_layers - 1)
    assert weight.additions(model.sources.index("sft")), "it is kept in factors"
    own = find.localise(
        model, prompts, "sft", positions=POSITIONS, target=0.999, goal="both", random=0, seed=1
    )
    assert own.graft == found.graft
    assert own.table["score"].to_numpy() == pytest.approx(found.table["score"].to_numpy(), abs=1e-4)
    rows, wanted = (one.summary.set_index("graft")["logprob"] for one in (own, found))
    assert rows.loc[["PRE", "SFT", "found", "complement"]].to_dict() == pytest.approx(
        wanted.loc[["PRE", "SFT", "found", "complement"]].to_dict(), abs=1e-4
    )


def test_the_report_has_hugging_face_s_numbers(found: Any, planted: Any) -> None:
    """The mixed models' own, as the three act at the last token only."""
    model, mixed, prompts = planted
    held = sorted(set(found.rows["prompt"]))
    whole: dict[str, list[float]] = {"found": [], "PRE": []}
    for number in held:
        (tokens,) = model.tokenized(prompts[number])
        (answer,) = continuation(tokens, prompts[number].answer, model.tokenizer, None)
        for name, some in (("found", PLANTED), ("PRE", ())):
            logits = mixed[some](torch.tensor([list(tokens.ids)])).logits[0, -1]
            whole[name].append(float(logits.log_softmax(-1)[answer]))
    rows = found.summary.set_index("graft")
    for name, values in whole.items():
        assert rows.at[name, "logprob"] == pytest.approx(np.mean(values), abs=1e-4)


def test_random_sets_have_hugging_face_s_numbers(found: Any, planted: Any) -> None:
    """A random set is the mixed model of those planted sites that it happens to have."""
    model, mixed, prompts = planted
    searched = [
        Place(Component(row["component"]), None if pd.isna(row["layer"]) else row["layer"], at)
        for at in dict.fromkeys(found.table["position"])
        for row in found.table[found.table["position"] == at].to_dict("records")
    ]
    sets = matched_sets(found.places, sorted(searched), model.arch, count=20, seed=1)
    there = set(found.places)
    said = []
    for number in sorted(set(found.rows["prompt"])):
        (tokens,) = model.tokenized(prompts[number])
        (answer,) = continuation(tokens, prompts[number].answer, model.tokenizer, None)
        logits = {
            some: one(torch.tensor([list(tokens.ids)])).logits[0, -1].log_softmax(-1)
            for some, one in mixed.items()
        }
        full = logits[PLANTED]
        said.append(
            {
                some: ((own > own[answer]).sum().item(), ((own.exp()) * (own - full)).sum().item())
                for some, own in logits.items()
            }
        )
    kinds = set()
    for drawn, row in zip(sets, found.random.to_dict("records"), strict=True):
        names = {str(p.component) for p in drawn if p in there}
        some = tuple(name for name in PLANTED if name in names)
        kinds.add(some)
        above, divergence = np.array([one[some] for one in said]).T
        assert row["top1"] == np.mean(above < 1)
        assert row["top5"] == np.mean(above < 5)
        assert row["kl_full"] == pytest.approx(np.mean(divergence), abs=1e-4)
    assert len(kinds) > 1


def test_differences_are_paired_and_costs_count_the_exact_effects(planted: Any) -> None:
    model, _, prompts = planted
    found = find.localise(
        model,
        prompts,
        "sft",
        positions=["last", "rest"],
        compare={"unembed": "sft @ last : unembed"},
        random=0,
        rounds=0,
        effects=True,
    )
    rows = found.differences.set_index(["b", "metric"])
    assert set(rows.index) == {
        (name, metric)
        for name in ("complement", "unembed")
        for metric in ("recovery", "top1", "top5", "kl_full")
    }
    values = found.rows.pivot(index="prompt", columns="graft", values="logprob").astype(float)
    mean = values.mean()
    gap = (mean["found"] - mean["unembed"]) / (mean["SFT"] - mean["PRE"])
    row = rows.loc["unembed", "recovery"]
    assert row["difference"] == pytest.approx(gap)
    assert row["low"] < gap < row["high"]
    assert row["units"] == len(set(found.rows["fact"])) < row["n"] == len(values)
    # A place of a prompt is run alone and missing, unless its tensors are equal.
    (cost,) = found.costs[found.costs["step"] == "effects"].to_dict("records")
    searched = int(found.split.set_index("part").at["search", "prompts"])
    assert cost["forwards"] == searched * (2 + 2 * len(PLANTED) * 2)
    assert cost["backwards"] == 0
    held = set(found.rows["prompt"])
    asked = [prompt for number, prompt in enumerate(prompts) if number not in held]
    exact = find.exact_effects(model, asked, "sft", positions=["last", "rest"])
    key = ["component", "layer", "position"]
    means = exact.groupby(key, dropna=False)[["alone", "missing"]].mean().reset_index()
    both = found.table.merge(means, on=key, suffixes=("", "_exact"))
    assert len(both) == len(found.table)
    for what in ("alone", "missing"):
        assert both[what].abs().max() > 0
        assert both[what].to_numpy() == pytest.approx(both[f"{what}_exact"].to_numpy(), abs=1e-5)


def test_a_measure_that_falls_is_taken_from(planted: Any) -> None:
    model, _, prompts = planted
    found = find.localise(
        model,
        prompts,
        "sft",
        positions=POSITIONS,
        metric="kl_full",
        goal="necessary",
        random=3,
        rounds=0,
    )
    assert "of what sft takes from the " in found.sentence
    assert {str(p.component) for p in found.places} <= set(PLANTED)


def test_facts_are_on_one_side_and_the_search_sees_no_other(planted: Any, found: Any) -> None:
    """With other answers on the held-out side the search finds the very same, number for number;
    with other answers on its own side it does not."""
    model, _, prompts = planted
    held = set(found.rows["prompt"])
    assert 0 < len(held) < len(prompts)
    facts = [prompt.fields["fact"] for prompt in prompts]
    assert not {facts[n] for n in held} & {facts[n] for n in range(len(prompts)) if n not in held}

    def asked(changed: set[int]) -> Any:
        other = [replace(p, answer=" the") if n in changed else p for n, p in enumerate(prompts)]
        return find.localise(
            model, other, "sft", positions=POSITIONS, target=0.999, goal="both", random=0, seed=1
        )

    unseen = asked(held)
    pd.testing.assert_frame_equal(unseen.table, found.table, check_exact=True)
    pd.testing.assert_frame_equal(unseen.search, found.search, check_exact=True)
    assert unseen.graft == found.graft
    assert not unseen.summary["logprob"].equals(found.summary["logprob"])
    seen = asked(set(range(len(prompts))) - held)
    assert not seen.table["score"].equals(found.table["score"])


def test_every_step_runs_the_prompts_that_it_may(planted: Any, monkeypatch: Any) -> None:
    model, _, prompts = planted
    steps: dict[str, set[int]] = {}
    from graftlens.find import localisation

    real = localisation.InMemory.__call__

    def noted(self: Any, step: str, numbers: Any, grafts: Any) -> pd.DataFrame:
        steps.setdefault(step, set()).update(numbers)
        return real(self, step, numbers, grafts)

    monkeypatch.setattr(localisation.InMemory, "__call__", noted)
    find.localise(model, prompts, "sft", positions=POSITIONS, target=0.999, random=5, seed=3)
    parts = split(prompts, seed=3)
    reports = {"found", "compared", "curve", "random"}
    assert reports <= set(steps)
    for step, numbers in steps.items():
        own = parts.held_out if step in reports else parts.search
        assert numbers <= set(own), step
    chosen_on = [s for s in steps if s.endswith("-each") or "-sets-" in s]
    assert len(chosen_on) >= 2
    assert all(steps[s] == set(parts.outer) for s in chosen_on)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["head", "neuron"])
def test_found_sites_are_cut_down_to_their_units(tiny: MakeTiny, by: str) -> None:
    """What the found units recover is what the sequential algorithm gives."""
    llama = tiny("llama", tokenizer="llama3")
    prompts = prompts_of()
    group = "attn" if by == "head" else "mlp"
    found = find.localise(
        llama.model,
        prompts,
        "sft",
        positions=["all"],
        target=0.5,
        by=by,
        within=f"sft @ all : {group}",
        outside="full",
        random=3,
        seed=0,
    )
    units = [p for p in found.places if p.unit is not None]
    assert units
    assert {COMPONENTS[p.component].group for p in found.places} == {group}
    assert f" of {found.total.sites} sites" in found.sentence
    chosen = {(str(p.component), p.layer, p.unit) for p in found.places}
    number = int(found.rows["prompt"].iloc[0])
    (tokens,) = llama.model.tokenized(prompts[number])
    row = found.rows[(found.rows["prompt"] == number) & (found.rows["graft"] == "found")].iloc[0]

    def choose(component: str, layer: int | None, position: int, unit: int | None) -> str:
        if COMPONENTS[Component(component)].group != group:
            return "sft"
        whole = (component, layer, None) in chosen
        return "sft" if whole or (component, layer, unit) in chosen else "pre"

    if by == "head":
        logits = sequential_graft(llama.sources, list(tokens.ids), choose)
    else:
        logits = sequential_graft(llama.sources, list(tokens.ids), choose, neurons=True)
    value = float(logits[-1].log_softmax(-1)[int(row["target_id"])])
    assert row["logprob"] == pytest.approx(value, abs=2e-4)


def test_a_single_prompt_token_by_token_says_that_nothing_is_held_out(planted: Any) -> None:
    model, _, prompts = planted
    found = find.localise(model, prompts[0], "sft", positions="each", target=0.999, random=0)
    (tokens,) = model.tokenized(prompts[0])
    assert {p.position for p in found.places} == {len(tokens) - 1}
    assert {str(p.component) for p in found.places} == set(PLANTED)
    assert any("Nothing is held out" in note for note in found.notes)
    assert "nothing was held out" in found.sentence


def test_few_possible_answers_are_told_of(planted: Any) -> None:
    model, _, prompts = planted
    count = len({prompt.answer for prompt in prompts})
    found = find.localise(model, prompts, "sft", positions=["last"], target=0.5, random=0, rounds=0)
    said = [note for note in found.notes if "possible answer" in note]
    assert [f"have {count} possible answer" in note for note in said] == [True] * (count <= 10)


def test_a_target_out_of_reach_gives_the_best_set_and_says_so(planted: Any) -> None:
    model, _, prompts = planted
    found = find.localise(
        model, prompts, "sft", positions=["first_entity"], target=0.9, random=0, rounds=0
    )
    assert not found.reached
    assert any("was not reached" in note for note in found.notes)
    assert found.sentence.startswith("The target of 90% was not reached")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 1.5}, "target=1.5 is not a share"),
        ({"target": 0}, "target=0 is not a share"),
        ({"target": True}, "target=True is not a share"),
        ({"goal": "enough"}, "goal='enough'. Allowed: 'sufficient' 'necessary' 'both'"),
        ({"by": "direction"}, "A singular direction is a score only"),
        ({"by": "layer"}, "by='layer'. Allowed: 'site' 'head' 'neuron'"),
        ({"rounds": -1}, "rounds=-1: write a whole number from 0"),
        ({"random": -2}, "random=-2: write a whole number from 0"),
        ({"resamples": True}, "resamples=True: write a whole number from 0"),
        ({"held_out": 0}, "held_out=0 is not a share between 0 and 1"),
        ({"held_out": "half"}, "held_out='half' is not a share between 0 and 1"),
        ({"seed": -1}, "seed=-1: write a whole number from 0"),
        ({"seed": "x"}, "seed='x': write a whole number from 0"),
        ({"split_by": ["fact"]}, r"split_by=\['fact'\]: prompt 0, .* has no such field"),
        ({"held_out": 1.0}, "held_out=1.0 is not a share between 0 and 1"),
        ({"split_by": "film"}, "split_by='film': prompt 0, .* has no such field"),
        ({"positions": "each"}, "is for a single prompt, and 16 are given"),
        ({"positions": ["last", "all"]}, "overlap"),
        ({"positions": ["actor"]}, "no span 'actor'"),
        ({"positions": []}, "Write a list of spans"),
        ({"metric": "rank"}, "no gradient passes through it"),
        ({"metric": "likelihood"}, "is not a measure"),
        ({"metric": "logit_diff"}, "has no distractors"),
        ({"outside": "none"}, "outside='none'. Allowed"),
        ({"within": "sft @"}, "at=''|is missing|not a rule"),
        ({"steps": 0}, "steps=0"),
        ({"compare": {"found": "sft @ last"}}, "a graft is called 'found'"),
        ({"compare": {"x": "sft last"}}, "is not a rule"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(
    planted: Any, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, _, prompts = planted
    given = {"positions": POSITIONS, "random": 0, "rounds": 0} | changes
    with pytest.raises(ValueError, match=said):
        find.localise(model, prompts, "sft", **given)


def test_other_sources_prompts_and_equal_pairs_are_refused(planted: Any, tiny: MakeTiny) -> None:
    model, _, prompts = planted
    localise = inspect.unwrap(find.localise)
    tokens = torch.tensor([[5, 9, 11]])
    for wrong, given, said in (
        (None, prompts, "model=None is not a GraftedTransformer"),
        (model, tokens, "give a list of Prompts with answers"),
        (model, None, "prompts=None: give a list of Prompts with answers"),
    ):
        with pytest.raises(ValueError, match=said):
            localise(wrong, given, "sft", positions=POSITIONS)
    for source, said in (("pre", "is the base"), ("task", "is not a source of this model")):
        with pytest.raises(ValueError, match=said):
            find.localise(model, prompts, source, positions=POSITIONS)
    with pytest.raises(
        ValueError, match=r"about 2 different values of fact .*4 or more are needed"
    ):
        find.localise(model, prompts[:4], "sft", positions=POSITIONS)
    with pytest.raises(PromptError, match="prompt 1: the prompt has no answer"):
        find.localise(
            model, [prompts[0], replace(prompts[1], answer=None)], "sft", positions=POSITIONS
        )
    llama = tiny("llama", tokenizer="llama3")
    same = GraftedTransformer.from_pretrained(
        {"pre": llama.sources["pre"], "sft": llama.sources["pre"]},
        tokenizer=llama.tokenizer,
        check=False,
        verbose=False,
    )
    with pytest.raises(ValueError, match="nothing to recover"):
        find.localise(same, prompts, "sft", positions=POSITIONS)


# -- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_gathered_graft_is_the_union_of_its_places(tiny: MakeTiny, seed: int) -> None:
    llama = tiny("llama", tokenizer="llama3")
    arch, prompt = llama.model.arch, prompts_of()[1]
    spans = {"first_entity": "first_entity", "last": "last", "rest": "~(first_entity + last)"}
    every = [Place(c, layer, p) for c, layer in arch.sites for p in spans.values()]
    rng = np.random.default_rng(seed)
    places = [every[i] for i in rng.permutation(len(every))[: 5 + 20 * seed]]
    heads = [Place(Component.Q, 0, "first_entity", h) for h in (1, 3)]
    places = [p for p in places if site_of(p) != site_of(heads[0])] + heads
    one = llama.model.resolve(gathered(places, "sft", arch), prompt)
    single = [llama.model.resolve(Graft((p.rule("sft"),)), prompt) for p in places]
    rest = llama.model.resolve(without(places, Graft.rule("sft"), "pre", arch), prompt)
    for component, layer in arch.sites:
        for unit in range(arch.n_units_of(component)):
            shares = [m.shares(component, layer, unit)[1] for m in single]
            union = np.max(shares, axis=0)
            assert np.array_equal(one.shares(component, layer, unit)[1], union)
            assert np.array_equal(rest.shares(component, layer, unit)[1], 1 - union)
    assert len(gathered(places, "sft", arch).rules) <= len(places)


def test_rules_are_gathered_over_layers(tiny: MakeTiny) -> None:
    arch = tiny("llama").model.arch
    layers = range(arch.n_layers)
    places = [Place(c, l, "last") for l in layers for c in (Component.Q, Component.K)]
    places += [Place(Component.O, 0, "last", h) for h in range(arch.n_heads)]
    places += [Place(Component.UNEMBED, None, "last"), Place(Component.MLP_IN, 1, "bos", 4)]
    assert str(gathered(places, "sft", arch)) == (
        f"sft @ last : q + k : 0-{arch.n_layers - 1} | sft @ last : o : 0 | sft @ last : unembed"
        " | sft @ bos : mlp_in : 1 : n4"
    )
    with pytest.raises(ValueError, match="no graft can choose 'bias' by itself"):
        gathered([Place(Component.O, 0, "last", "bias")], "sft", arch)


def test_sizes_count_parameters_times_positions(tiny: MakeTiny) -> None:
    gpt2 = tiny("gpt2")
    arch = gpt2.model.arch
    places = [Place(Component.Q, 0, "last"), Place(Component.MLP_IN, 1, "first_entity", 2)]
    size = Size.of(places, arch, {"q", "mlp_in"}, {"last": 1, "first_entity": 2.5})
    whole = sum(p.numel() for p in gpt2.sources["pre"].transformer.h[0].attn.c_attn.parameters())
    assert size == Size(2, 1, whole / 3 + 2.5 * (arch.d_model + 1))


def test_splits_keep_facts_together_and_depend_on_the_seed() -> None:
    prompts = prompts_of()
    found = split(prompts, seed=0)
    assert found.by == "fact"
    parts = (found.outer, found.inner, found.held_out)
    assert sorted(itertools.chain(*parts)) == list(range(len(prompts)))
    facts = [{prompts[n].fields["fact"] for n in part} for part in parts]
    assert [len(f) for f in facts] == [3, 1, 4]
    assert not facts[0] & facts[1] | facts[1] & facts[2] | facts[0] & facts[2]
    assert split(prompts, seed=0) == found
    assert len({split(prompts, seed=s).held_out for s in range(5)}) > 1
    # The order of the prompts does not decide which facts are held out.
    back = split(prompts[::-1], seed=0)
    assert {prompts[::-1][n].fields["fact"] for n in back.held_out} == facts[2]
    assert split(prompts, "answer" if False else "prompt", held_out=0.75).count(range(16)) == 16


class _Toy(Judge):
    """Judges sets by a function of their members on each prompt, and counts."""

    def worth(self, places: Sequence[Place], number: int) -> float:
        raise NotImplementedError

    def __call__(
        self, step: str, numbers: Sequence[int], sets: Sequence[Sequence[Place]]
    ) -> list[Judged]:
        found = []
        for places in sets:
            worth = {n: self.worth(places, n) for n in numbers}
            inner = [worth[n] for n in numbers if n in self.inner]
            mean = float(np.mean(list(worth.values())))
            within = float(np.mean(inner)) if inner else float("nan")
            nan = float("nan")
            found.append(Judged(tuple(places), mean, nan, mean - self.target, within - self.target))
        _Toy.seen.append((step, len(sets)))
        return found

    seen: list[tuple[str, int]] = []  # noqa: RUF012


SPLIT = Split("fact", tuple("abcdef"), (0, 1), (2,), (3, 4, 5))


def _judge(kind: type[_Toy], target: float, arch: Architecture) -> _Toy:
    _Toy.seen = []
    return kind(
        exact=lambda *given: pd.DataFrame(),
        arch=arch,
        source="sft",
        base_source="pre",
        base=Graft(),
        full=Graft.rule("sft"),
        metric="logprob",
        goal="sufficient",
        target=target,
        inner=frozenset({2}),
    )


def _line(count: int) -> list[Place]:
    return [Place(Component.Q, layer, "last") for layer in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 819, 3300])
def test_the_smallest_nested_set_is_found_in_twenty_sizes(count: int, tiny: MakeTiny) -> None:
    class Share(_Toy):
        def worth(self, places: Sequence[Place], number: int) -> float:
            return len(places) / count

    arch = tiny("llama").model.arch
    for target in (1e-9, 0.05, 0.5, 0.73, 1.0):
        found = nested(_judge(Share, target, arch), _line(count), (0, 1, 2), "nested")
        assert len(found.judged) <= EVALUATIONS
        wanted = max(1, int(np.ceil(round(target * count, 6))))
        assert wanted <= len(found.chosen.places) <= wanted + found.apart
        assert found.apart <= (0 if count <= 1000 else 1)
    sizes = series(count)
    assert sizes[0] == 1 or count == 1
    assert sizes[-1] == count
    assert len(sizes) <= 10


def test_a_small_set_is_found_though_the_places_after_it_do_harm(tiny: MakeTiny) -> None:
    """Six places are enough, and each after them takes something away until half are there: of the
    sizes 1, 2, 4, 9, 19 and 39, none below 39 reached the target, and bisection looked above 19."""

    class Harmed(_Toy):
        def worth(self, places: Sequence[Place], number: int) -> float:
            size = len(places)
            return size / 6 if size <= 6 else max(1 - 0.1 * (size - 6), size / 39)

    order = _line(39)
    judge = _judge(Harmed, 0.9, tiny("llama").model.arch)
    found = nested(judge, order, SPLIT.search, "nested")
    assert [*found.chosen.places] == order[:6]
    assert len(found.judged) <= EVALUATIONS


def test_rounds_drop_what_is_not_needed_if_the_inner_part_agrees(tiny: MakeTiny) -> None:
    order = _line(20)
    needed = {order[0], order[5]}

    class Both(_Toy):
        def worth(self, places: Sequence[Place], number: int) -> float:
            return len(needed & set(places)) / 2

    class Inner(Both):
        """On the inner part, the first six are all needed."""

        def worth(self, places: Sequence[Place], number: int) -> float:
            if number == 2:
                return len(set(order[:6]) & set(places)) / 6
            return super().worth(places, number)

    arch = tiny("llama").model.arch
    for kind, left in ((Both, needed), (Inner, set(order[:6]))):
        judge = _judge(kind, 0.95, arch)
        first = nested(judge, order, SPLIT.search, "nested")
        assert set(first.chosen.places) == set(order[:6])
        chosen, rounds = refined(judge, first.chosen, order, SPLIT, 2)
        assert set(chosen.places) == left
        assert rounds[0].kept == (kind is Both)


@pytest.mark.parametrize("number", [2, 0])
def test_a_part_with_nothing_to_recover_ends_the_rounds_and_not_the_search(
    number: int, tiny: MakeTiny
) -> None:
    """Texts say the same under both sources on an inner part of one fact soon: it was a ValueError,
    once all nested sets had been run."""
    order, split_ = _line(4), Split("fact", tuple("abcd"), (0,), (2,), (1, 3))
    judge = _judge(_Toy, 0.9, tiny("llama").model.arch)

    def exact(step: str, numbers: Sequence[int], grafts: Any) -> pd.DataFrame:
        graft_of = {judge.put_in(order[:size]): size for size in range(1, 5)}
        rows = [
            {
                "prompt": n, "graft": name, "rule": str(graft), "reason": None,
                "logprob": 0.0 if n == number else {"PRE": 0.0, "SFT": 1.0}.get(
                    name, graft_of.get(graft, 0) / 4
                ),
            }
            for n in numbers
            for name, graft in grafts.items()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    real = Judge(**{**vars(judge), "exact": exact})
    first = nested(real, order, split_.search, "nested")
    assert (len(first.chosen.places), first.chosen.enough) == (4, 1.0)
    assert not first.chosen.parted
    assert np.isnan(first.chosen.inner)
    assert refined(real, first.chosen, order, split_, 2) == (first.chosen, [])
    units = [Place(Component.Q, 0, "last", unit) for unit in range(2)]
    assert down_to_units(real, first.chosen, units, split_)[0] is first.chosen
    with pytest.raises(ValueError, match="there is nothing to recover"):
        nested(real, order, (number,), "nested")


def test_rounds_add_what_a_set_lacks(tiny: MakeTiny) -> None:
    order = _line(12)

    class Late(_Toy):
        def worth(self, places: Sequence[Place], number: int) -> float:
            return 0.5 * (order[0] in places) + 0.5 * (order[3] in places)

    judge = _judge(Late, 0.95, tiny("llama").model.arch)
    (start,) = judge("start", SPLIT.search, [order[:2]])
    assert not start.reached
    chosen, _ = refined(judge, start, order, SPLIT, 1)
    assert set(chosen.places) == {order[0], order[3]}


def test_random_sets_have_as_many_sites_of_each_component_at_each_position(
    tiny: MakeTiny,
) -> None:
    arch = tiny("llama").model.arch
    at = ("first_entity", "last")
    every = [Place(c, l, p) for c, l in arch.sites for p in at]
    chosen = [Place(Component.Q, 0, "last"), Place(Component.V, 1, "last")]
    chosen += [Place(Component.MLP_IN, 1, "first_entity", n) for n in (3, 7)]
    drawn = matched_sets(chosen, every, arch, count=40, seed=0)

    def shape(places: Sequence[Place]) -> list[tuple[str, Any, bool]]:
        return sorted((str(p.component), p.position, p.unit is None) for p in places)

    assert len(drawn) == 40
    assert all(shape(s) == shape(chosen) and len(set(s)) == len(s) for s in drawn)
    assert {p.layer for s in drawn for p in s if p.component == "q"} == set(range(arch.n_layers))
    assert drawn == matched_sets(chosen, every, arch, count=40, seed=0)
    whole = [p for p in every if p.component == "unembed"]
    assert matched_sets(whole, every, arch, count=40, seed=0) == []


def test_areas_are_mib_s() -> None:
    """By hand: f rises from 0 to 1 at a tenth and stays, overshoots, or rises evenly."""
    even = pd.DataFrame({"share": [0.0, *SHARES], "recovery": [0.0, *SHARES]})
    assert _area(even, lambda f: f) == pytest.approx(0.5)
    assert _area(even, lambda f: abs(1 - f)) == pytest.approx(0.5)
    step = pd.DataFrame({"share": [0.0, 0.1, 0.5, 1.0], "recovery": [0.0, 1.0, 1.0, 1.0]})
    assert _area(step, lambda f: f) == pytest.approx(0.95)
    assert _area(step, lambda f: abs(1 - f)) == pytest.approx(0.05)
    over = pd.DataFrame({"share": [0.0, 0.5, 1.0], "recovery": [0.0, 2.0, 1.0]})
    assert _area(over, lambda f: f) == pytest.approx(1.25)
    assert _area(over, lambda f: abs(1 - f)) == pytest.approx(0.75)


def test_recovery_is_a_ratio_of_means() -> None:
    base, full = np.array([-4.0, -2.0]), np.array([0.0, 0.0])
    assert recovery(np.array([-1.0, -1.0]), base, full) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="nothing to recover"):
        recovery(base, base, base)
