"""What can be asked of `find`: which tokens each position has, what is refused and how, and
places as values."""

import copy
import inspect
import re
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny
from families import VARIANTS, model_of, tiny_sources

from graftlens import Graft, Prompt, find
from graftlens.components import Component
from graftlens.find.asked import Asked
from graftlens.find.places import in_order
from graftlens.metrics import METRICS, Measure
from graftlens.model.grafted import GraftedTransformer

TEMPLATES = ("{first_entity} plays with", "In a film of last year, {first_entity} was next to")
PEOPLE = ("Ann", "Zoë Reed-Lang")
POSITIONS = ["first_entity", "last", "rest"]


def asking(**changes: Any) -> list[Prompt]:
    """Four prompts of different lengths."""
    given = {"answer": " Mara Finn", "distractors": ("!", "."), **changes}
    return [Prompt(text, {"first_entity": p}, **given) for text in TEMPLATES for p in PEOPLE]


@pytest.fixture(scope="module")
def model(tiny: MakeTiny) -> GraftedTransformer:
    return tiny("gpt2", tokenizer="llama3").model


def test_every_token_belongs_to_one_position(model: GraftedTransformer) -> None:
    asked = Asked.of(model, asking(), "sft", positions=["last", "rest", "first_entity"])
    assert asked.positions == ("last", "~(last + first_entity)", "first_entity")
    for one in asked.prompts:
        length = len(one.scored.tokens)
        assert len(one.part) == length
        entity = [i for ids in one.scored.tokens.spans["first_entity"] for i in ids]
        expected = [1] * length
        for i in entity:
            expected[i] = 2
        expected[-1] = 0
        assert one.part.tolist() == expected
    alone = Asked.of(model, asking()[0], "sft", positions=["rest"])
    assert alone.positions == ("all",)
    assert set(alone.prompts[0].part) == {0}


def test_tokens_of_whole_answers_belong_where_a_sweep_puts_them(model: GraftedTransformer) -> None:
    """They count as `last` and as `all`; numbers are the prompt's own, and so is each token."""
    tokens = model.tokenized(asking()[0])[0]
    for positions, expected in (
        (POSITIONS, 1),
        (["first_entity", "rest"], 1),
        (["first_entity", "last"], 1),
        (["first_entity", "[-1]", "rest"], 2),
        (["first_entity", "[-1]"], -1),
        ("each", -1),
    ):
        asked = Asked.of(model, asking()[0], "sft", positions=positions, metric="answer_logprob")
        (one,) = asked.prompts
        assert len(one.tail) == len(one.scored.answer) - 1 > 0
        assert set(one.part[len(tokens) :]) == {expected}, positions


def test_the_rest_may_be_nothing_in_some_prompts(model: GraftedTransformer) -> None:
    prompts = [Prompt("{a}{b}", {"a": "Ann", "b": " went"}, " up"), asking()[0]]
    asked = Asked.of(model, prompts[0], "sft", positions=["~last", "last", "rest"])
    assert not asked.there[Component.EMBED, None][0, 2, 0]
    assert asked.has(0) == (0, 1)
    assert asked.ends(0) == (Graft(), Graft.rule("sft"))


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma3"])
def test_sites_are_in_the_models_order(tiny: MakeTiny, variant: str) -> None:
    arch = tiny(variant).model.arch
    sites = in_order(arch)
    assert sorted(sites, key=arch.sites.index) == list(arch.sites)
    assert sites[0] == ("embed", None)
    assert sites[-2:] == (("ln_final", None), ("unembed", None))
    inside = [layer for _, layer in sites if layer is not None]
    assert inside == sorted(inside)
    places = [find.Place(c, l, "last") for c, l in sites]
    assert sorted(places, reverse=True) == places[::-1]


def test_places_are_rules(model: GraftedTransformer) -> None:
    q, out, embed = Component.Q, Component.MLP_OUT, Component.EMBED
    expected = {
        find.Place(q, 1, "last"): "sft @ last : q : 1",
        find.Place(q, 1, "~(first_entity + last)", 2): "sft @ ~(first_entity + last) : q : 1 : 2",
        find.Place(out, 0, 3, 7): "sft @ [3] : mlp_out : 0 : n7",
        find.Place(embed, None, "last"): "sft @ last : embed",
    }
    for place, text in expected.items():
        assert str(place.rule("sft")) == text
    order = [find.Place(q, 1, 3, unit) for unit in (None, 0, 2, 10, "d2", "d10", "bias")]
    assert sorted(order, reverse=True) == order[::-1]
    assert find.Place(q, 1, 9) < find.Place(q, 1, 10) < find.Place(q, 1, "last")
    for unit in ("bias", "d3"):
        with pytest.raises(ValueError, match=f"no graft can choose '{unit}' by itself"):
            find.Place(out, 0, "last", unit).rule("sft")


def test_places_of_a_table_and_their_ranking() -> None:
    """The mean over prompts, a place that a prompt lacks counting as 0; turned where the measure
    falls."""
    table = pd.DataFrame(
        {
            "prompt": [0, 0, 0, 1, 1],
            "component": ["q", "mlp_out", "unembed", "q", "unembed"],
            "layer": pd.array([0, 1, None, 0, None], dtype="Int64"),
            "position": ["last"] * 5,
            "unit": pd.array([2, "bias", pd.NA, 2, pd.NA], dtype=object),
            "ig": [1.0, 5.0, 2.0, 2.0, 4.0],
            "at_base": [0.0, 1.0, 0.0, 2.0, 1.0],
            "value_base": [0.0] * 5,
            "value_full": [9.0, 9.0, 9.0, 1.0, 1.0],
        }
    )
    places = find.places_of(table)
    assert places == (
        find.Place(Component.Q, 0, "last", 2),
        find.Place(Component.MLP_OUT, 1, "last", "bias"),
        find.Place(Component.UNEMBED, None, "last"),
    )
    ranked = find.ranking(table)
    assert ranked["score"].tolist() == [3.0, 2.5, 1.5]
    assert find.places_of(ranked) == (places[2], places[1], places[0])
    assert ranked["at_base"].tolist() == [0.5, 0.5, 1.0]
    falling = find.ranking(table.assign(value_full=-table["value_full"]))
    assert falling["score"].tolist() == [-1.5, -2.5, -3.0]
    assert falling["ig"].tolist() == [1.5, 2.5, 3.0]
    with pytest.raises(ValueError, match="the table has no column 'position'"):
        find.places_of(table.drop(columns="position"))
    with pytest.raises(ValueError, match=r"a table of 5 rows with the scores \[\]\. Give what"):
        find.ranking(table.drop(columns=["ig", "at_base"]))


@pytest.mark.parametrize("outside", ["base", "full"])
def test_ends_graft_what_is_searched(model: GraftedTransformer, outside: Any) -> None:
    """Site by site, as masks of the two grafts say it."""
    prompt = asking()[1]
    for positions, by, within in (
        (POSITIONS, "site", None),
        (["last"], "site", None),
        (["first_entity", "last"], "site", "sft @ last : mlp + q : 1 | sft @ first_entity : k"),
        (["first_entity", "last"], "head", "sft @ last : q : 1 : 0-1 | sft @ all : mlp"),
        (["last"], "neuron", "sft @ last : mlp_in : 0,2 : n3-9"),
        ("each", "site", "sft @ last : mlp"),
        ("each", "site", None),
    ):
        asked = Asked.of(
            model, prompt, "sft", positions=positions, by=by, within=within, outside=outside
        )
        tokens = asked.prompts[0].scored.tokens
        masks = [model.resolve(graft, prompt) for graft in asked.ends(0)]
        for site in asked.every:
            for unit in range(model.arch.n_units_of(site[0])):
                before, after = (m.source_index(*site, unit)[0] for m in masks)
                searched = np.zeros(len(tokens), dtype=bool)
                if site in asked.sites:
                    there = asked.there[site][0]
                    column = there[:, unit if there.shape[1] > 1 else 0]
                    searched = (asked.prompts[0].part >= 0) & column[asked.prompts[0].part]
                other = int(outside == "full")
                assert (before == np.where(searched, 0, other)).all()
                assert (after == np.where(searched, 1, other)).all()


# -- what is refused ---------------------------------------------------------------------------

TOKENS = torch.tensor([[5, 9, 11], [7, 8, 20]])
PLAIN = Prompt("Ann plays", answer=" up")


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"source": "stf"}, "source='stf' is not a source of this model. Allowed: sft. D"),
    "the base": ({"source": "pre"}, "source='pre' is the base, from which nothing is grafted."),
    "by": ({"by": "heads"}, "by='heads'. Allowed: 'site' 'head' 'neuron' 'direction'."),
    "outside": ({"outside": "sft"}, "outside='sft'. Allowed: 'base' 'full'."),
    "no steps": ({"steps": 0}, 'steps=0: write a whole number from 1 to 1024, or "auto".'),
    "half a step": ({"steps": 2.5}, 'steps=2.5: write a whole number from 1 to 1024, or "auto".'),
    "steps in words": ({"steps": "many"}, "steps='many': write a whole number from 1 to 1024"),
    "true steps": ({"steps": True}, "steps=True: write a whole number"),
    "unknown measure": ({"metric": "logprobs"}, "metric='logprobs' is not a measure. Allowed: pro"),
    "rank": ({"metric": "rank"}, "metric='rank': no gradient passes through it. Allowed: prob l"),
    "top-k": ({"metric": "top5"}, "metric='top5': it is not computed from one run's logits."),
    "lists": ({"metric": "top_probs"}, "metric='top_probs': it is not one number per prompt."),
    "no measure": ({"metric": None}, "metric=None is not a measure. Allowed:"),
    "own name": (
        {"metric": Measure("prompt", ("answer",), _flat)},
        "measure 'prompt': tables have another column of this name. Rename the measure.",
    ),
    "no distractors": (
        {"prompts": [asking()[0], PLAIN], "positions": ["last"], "metric": "logit_diff"},
        "prompt 1 has no distractors that begin unlike the answer, which 'logit_diff' needs. Give",
    ),
    "no answers": (
        {"metric": "answer_set_prob"},
        "prompt 0 has no answers, which 'answer_set_prob' needs. Give Prompt(…, answers=[…])",
    ),
    "no answer": (
        {"prompts": [asking()[0], Prompt("Ann plays")], "positions": ["last"]},
        "prompt 1: the prompt has no answer to score.",
    ),
    "no prompts": ({"prompts": []}, "prompts=[]: give one or more Prompts with answers, or a tens"),
    "texts": ({"prompts": ["Ann plays"]}, "'Ann plays' is not a Prompt. Write Prompt(text, answer"),
    "targets of prompts": ({"targets": [3]}, "targets=… says what follows token tensors; these pr"),
    "no targets": (
        {"prompts": TOKENS, "positions": ["last"]},
        "tokens of 2 prompts without targets. Give targets=…, for each prompt the id of the token",
    ),
    "few targets": (
        {"prompts": TOKENS, "positions": ["last"], "targets": [3]},
        "targets=[3] for 2 prompts. Give one token id for each, such as targets=[0, 0].",
    ),
    "targets that are not ids": (
        {"prompts": TOKENS, "positions": ["last"], "targets": torch.tensor([0.5, 1.0])},
        "targets=tensor([0.5000, 1.0000]) for 2 prompts. Give one token id for each",
    ),
    "targets beyond the vocabulary": (
        {"prompts": TOKENS, "positions": ["last"], "targets": [3, 10**6]},
        "targets: prompt 1 has the token id 1000000, which is outside the vocabulary (0 to",
    ),
    "tokens beyond the vocabulary": (
        {"prompts": TOKENS + 10**6, "positions": ["last"], "targets": [3, 4]},
        "token id 1000020 is outside the vocabulary",
    ),
    "a single position": (
        {"positions": "last"},
        'positions=\'last\'. Write a list of spans, such as ["first_entity", "last", "rest"], or',
    ),
    "no position": ({"positions": []}, "positions=[]. Write a list of spans"),
    "unknown span": (
        {"positions": ["first_entitty", "rest"]},
        "prompt 0, rule 'sft @ first_entitty': no span 'first_entitty' here. Spans of this prompt:",
    ),
    "overlap": (
        {"positions": ["first_entity", "last", "~last"]},
        "prompt 0: positions 'first_entity' and '~last' overlap at token 1. Give spans that share",
    ),
    "the same twice": (
        {"positions": ["last", "last"]},
        "prompt 0: positions 'last' and 'last' overlap at token",
    ),
    "two rests": ({"positions": ["rest", "last", "rest"]}, "'rest' appears twice. Write it once."),
    "a field called rest": (
        {"prompts": Prompt("{rest} plays", {"rest": "Ann"}, " up"), "positions": ["last", "rest"]},
        "prompt 0 has a field 'rest', which is also what positions=… calls all other tokens.",
    ),
    "beyond the prompt": (
        {"positions": [[40], "rest"]},
        "prompt 0, rule 'sft @ [40]': position 40 is outside the prompt, which has",
    ),
    "positions that no prompt has": (
        {"positions": ["[60 % 64]"]},
        "positions=['[60 % 64]'] select no token of any prompt. Give positions that the prompts ha",
    ),
    "malformed position": ({"positions": ["last +"]}, "a span or [positions] is missing at the en"),
    "within nothing": ({"within": "none"}, "within='none' has no site at the positions 'first_ent"),
    "within elsewhere": (
        {"positions": ["first_entity"], "within": "sft @ last"},
        "within='sft @ last' has no site at the positions 'first_entity'. Give positions that it",
    ),
    "within part of a position": (
        {"within": "sft @ bos"},
        "prompt 0: within='sft @ bos' grafts some tokens of the position '~(first_entity + last)'",
    ),
    "within some heads": (
        {"within": "sft @ last : q : 1 : 0"},
        "within='sft @ last : q : 1 : 0' chooses some heads of q. Score them by themselves, by=\"h",
    ),
    "within some neurons": (
        {"within": "sft @ last : mlp_in : 1 : n0", "by": "head"},
        'chooses some neurons of mlp_in. Score them by themselves, by="neuron", or give a graft',
    ),
    "within another source": ({"within": "stf @ last"}, "rule 'stf @ last': no source 'stf'. This"),
    "within no graft": ({"within": 3}, "within=3 is not a graft. Give a Graft or its one-line tex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(model: GraftedTransformer, case: str) -> None:
    changes, message = REFUSED[case]
    given = {"prompts": asking(), "source": "sft", "positions": POSITIONS, **changes}
    prompts, source = given.pop("prompts"), given.pop("source")
    attribute = inspect.unwrap(find.attribute)  # without the tests' type checks
    with pytest.raises(ValueError, match=re.escape(message)):
        attribute(model, prompts, source, **given)


def test_exact_effects_refuses_directions(model: GraftedTransformer) -> None:
    with pytest.raises(ValueError, match='by="direction": no graft can choose a direction, so it'):
        find.exact_effects(model, asking(), "sft", positions=POSITIONS, by="direction")
    with pytest.raises(ValueError, match='steps=0: write a whole number from 1 to 1024, or "auto"'):
        find.exact_effects(model, asking(), "sft", positions=POSITIONS, steps=0)


def test_other_models_and_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"model='llama' is not a GraftedTransformer. Give what"):
        find.attribute("llama", asking(), "sft", positions=POSITIONS)  # type: ignore[arg-type]
    for read in (find.places_of, find.ranking):
        with pytest.raises(ValueError, match=r"table=None: give what find.attribute or find.exact"):
            read(None)  # type: ignore[arg-type]


def test_what_the_model_lacks_is_refused(tiny: MakeTiny) -> None:
    bare = tiny("llama").model
    attribute = inspect.unwrap(find.attribute)
    with pytest.raises(ValueError, match="this model has no tokenizer, so prompts cannot be run"):
        attribute(bare, asking(), "sft", positions=POSITIONS)
    tokens, targets = torch.tensor([[5, 9, 11]]), [3]

    def asked(model: GraftedTransformer, **options: Any) -> pd.DataFrame:
        table: pd.DataFrame = attribute(
            model, tokens, "sft", positions=["last"], targets=targets, **options
        )
        return table

    bare.set_use_attn_result(True)
    with pytest.raises(ValueError, match=r"model\.cfg\.use_attn_result computes heads one by"):
        asked(bare, by="direction")
    bare.set_use_attn_result(False)
    bare.add_hook("blocks.0.hook_mlp_out", lambda x, hook: None)
    with pytest.raises(ValueError, match=r"hooks are attached at blocks\.0\.hook_mlp_out: p"):
        asked(bare)
    bare.reset_hooks()
    for name, function, message in (
        ("torn", lambda logits: logits.detach()[:, 0], "no gradient reaches its values"),
        ("wide", lambda logits: logits, "gave shape .1, 97. for logits of 1 rows"),
        ("plain", lambda logits: 3.0, "gave <class 'float'> for logits of 1 rows"),
    ):
        with pytest.raises(ValueError, match=f"measure '{name}'.*{message}"):
            asked(bare, metric=Measure(name, (), function))
    with torch.inference_mode():
        inferred = copy.deepcopy(bare)
    with pytest.raises(ValueError, match=r"the model was loaded inside torch\.inference_mode"):
        asked(inferred)


def test_tables_that_differ_are_refused_for_gradients_only() -> None:
    """Rotary tables: a mixture of two rotations is not a rotation."""
    configs = [VARIANTS["llama"](), VARIANTS["llama"]()]
    configs[1].rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    sources = {n: model_of(c, i) for i, (n, c) in enumerate(zip(("pre", "sft"), configs))}  # noqa: B905
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    given: dict[str, Any] = {"positions": ["last", "rest"], "targets": [3]}
    tokens = torch.tensor([[5, 9, 11]])
    known = (
        "attribution runs every strength from 0 to 1: q in layer 0 would mix 'pre' and 'sft', "
        "whose rotary tables differ"
    )
    with pytest.raises(ValueError, match=re.escape(known)) as refused:
        find.attribute(model, tokens, "sft", **given)
    (within,) = re.findall(r'within="([^"]*)"', str(refused.value))
    table = find.attribute(model, tokens, "sft", within=within, **given)
    assert not {"q", "k"} & set(table["component"])
    assert table["ig"].abs().max() > 0
    exact = find.exact_effects(model, tokens, "sft", **given)
    assert {"q", "k"} < set(exact["component"])


def test_a_value_that_is_not_finite_is_refused_with_its_prompt() -> None:
    sources = tiny_sources("llama", ("pre", "sft"), 1)
    sources["sft"].lm_head.weight.data[7] = 1e38
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    tokens = torch.tensor([[5, 9, 11], [5, 9, 12]])
    with pytest.raises(ValueError, match=r"prompt \d: logprob is -?(inf|nan) at strength"):
        find.attribute(model, tokens, "sft", positions=["last"], targets=[3, 4])


def test_all_measures_of_one_number_can_be_asked_for(model: GraftedTransformer) -> None:
    prompts = asking(answers=(" Mara", "!"))
    names = {n for n, m in METRICS.items() if isinstance(m, Measure) and m.function is not None}
    fit = {n for n in names if METRICS[n].differentiable and METRICS[n].holds == "number"}
    assert {"logprob", "kl_base", "kl_full", "js_full", "entropy", "margin"} <= fit
    for name in fit:
        assert (
            Asked.of(model, prompts, "sft", positions=POSITIONS, metric=name).measure.name == name
        )
