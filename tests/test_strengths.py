"""Rules with a strength and rules of single neurons, against the sequential algorithm.

What a graft means is worked out here from rules in a form of the tests' own (`Wanted`), as shares
of sources at each site; the oracle in `reference` mixes real parameters by these shares.
"""

import copy
import inspect
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import tiny_sources
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    HEAD_COMPONENTS,
    MODEL_COMPONENTS,
    NEURON_COMPONENTS,
    Choose,
    components_of,
    n_heads_of,
    n_neurons,
    sequential_graft,
)
from test_laws import EACH_FAMILY, _close, _run_watched
from test_sweep import tree_logits

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution, logit_lens, patched
from graftlens.model.choice import Mixtures, UnitSelection, atoms
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.mask import GraftMask
from graftlens.model.sequential import Sequential
from graftlens.planner import Branches, Planner
from graftlens.prompts import Prompt, Tokenized
from graftlens.references import References
from graftlens.sweep.config import NamedGraft
from graftlens.sweep.grid import Grid
from graftlens.sweep.scoring import score
from graftlens.sweep.trust import trust_report

LENGTH = 7
NAMES = ("pre", "task", "relation")
STRENGTHS = (0.5, 1.0, 2.0, -1.0, 0.3, 0.0)


def _tokens(seed: int) -> list[int]:
    return torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Wanted:
    """One rule as plain sets. `layers` None is all, and then components outside them count too."""

    source: str
    strength: float
    positions: frozenset[int]
    components: frozenset[str]
    layers: frozenset[int] | None = None
    units: frozenset[int] | None = None

    def graft(self) -> Graft:
        """The same rule in the library's words."""
        by_head = self.components <= set(HEAD_COMPONENTS)
        units = None if self.units is None else sorted(self.units)
        return Graft.rule(
            self.source,
            at=sorted(self.positions),
            components=sorted(self.components),
            layers="all" if self.layers is None else sorted(self.layers),
            heads=units if by_head else None,
            units=None if by_head else units,
            strength=self.strength,
        )

    def meets(self, component: str, layer: int | None, position: int, unit: int | None) -> bool:
        """Whether the rule reaches one site."""
        return (
            component in self.components
            and position in self.positions
            and (self.layers is None or layer in self.layers)
            and (self.units is None or unit in self.units)
        )


def _join(rules: Sequence[Wanted]) -> Graft:
    graft = Graft()
    for rule in rules:
        graft |= rule.graft()
    return graft


Shares = dict[str, Fraction]


def _blend(shares: Shares, rule: Wanted) -> Shares:
    """What a rule makes of what ran, exactly by its strength as it is written."""
    s = Fraction(str(rule.strength))
    made = {name: (1 - s) * share for name, share in shares.items()}
    made[rule.source] = made.get(rule.source, Fraction(0)) + s
    return {name: share for name, share in made.items() if share}


def _chooser(rules: Sequence[Wanted], base: str) -> Choose:
    def choose(component: str, layer: int | None, position: int, unit: int | None) -> Any:
        shares = {base: Fraction(1)}
        for rule in rules:
            if rule.meets(component, layer, position, unit):
                shares = _blend(shares, rule)
        return shares

    return choose


def _of_bias(rules: Sequence[Wanted], base: str, n_units: Mapping[str, int]) -> Choose:
    """The bias of o and of mlp_out: mixed by rules of no unit, and by those of some units made what
    all units then run, or the base's."""

    def choose(component: str, layer: int | None, position: int, unit: int | None) -> Any:
        bias = {base: Fraction(1)}
        of_units = [bias] * n_units[component]
        for rule in rules:
            met = [rule.meets(component, layer, position, u) for u in range(len(of_units))]
            if not any(met) or rule.strength == 0:
                continue
            pairs = zip(of_units, met, strict=True)
            of_units = [_blend(one, rule) if m else one for one, m in pairs]
            if rule.units is None:
                bias = _blend(bias, rule)
            else:
                agree = all(one == of_units[0] for one in of_units)
                bias = of_units[0] if agree else {base: Fraction(1)}
        return bias

    return choose


def _oracle(t: Tiny, tokens: list[int], rules: Sequence[Wanted]) -> torch.Tensor:
    model = t.sources["pre"]
    units = {"o": n_heads_of(model, "o") or 0, "mlp_out": n_neurons(model)}
    bias = _of_bias(rules, "pre", units)
    return sequential_graft(t.sources, tokens, _chooser(rules, "pre"), neurons=True, bias=bias)


def _some(rng: random.Random, values: Sequence[Any], most: int) -> frozenset[Any]:
    return frozenset(rng.sample(list(values), rng.randint(1, min(most, len(values)))))


def _random_rules(t: Tiny, rng: random.Random, n_rules: int) -> list[Wanted]:
    """Rules over single sites, heads, neurons, several components and whole spans."""
    model = next(iter(t.sources.values()))
    available = components_of(model)
    inside = [c for c in available if c not in MODEL_COMPONENTS]
    rules = []
    for number in range(n_rules):
        kind = ("site", "head", "neuron", "several", "everywhere")[number % 5]
        layers: frozenset[int] | None = _some(rng, range(t.model.arch.n_layers), 2)
        units = None
        if kind == "head":
            components = frozenset({rng.choice(HEAD_COMPONENTS)})
            n_heads = n_heads_of(model, next(iter(components))) or 0
            units = _some(rng, range(n_heads), n_heads)
        elif kind == "neuron":
            components = _some(rng, [c for c in NEURON_COMPONENTS if c in inside], 3)
            units = _some(rng, range(n_neurons(model)), 9)
        elif kind == "everywhere":
            components, layers = frozenset(available), None
        else:
            components = _some(rng, inside, 1 if kind == "site" else 4)
        source, strength = rng.choice(list(t.sources)), rng.choice(STRENGTHS)
        positions = _some(rng, range(LENGTH), 4)
        rules.append(Wanted(source, strength, positions, components, layers, units))
    rng.shuffle(rules)
    return rules


# -- the law -----------------------------------------------------------------------------------


@EACH_FAMILY
def test_random_mixtures_and_units_are_the_sequential_algorithm(
    tiny: MakeTiny, variant: str
) -> None:
    t = tiny(variant, NAMES, seed=2)
    rng = random.Random(f"mixtures {variant}")
    rules = _random_rules(t, rng, 10)
    graft, tokens = _join(rules), _tokens(1)
    theirs = _oracle(t, tokens, rules)
    assert (theirs - t.logits("pre", tokens)).abs().max() > 1e-2
    batch = torch.tensor([tokens])
    _close(t.model(batch, graft=graft)[0], theirs)
    _close(_run_watched(t.model, batch, graft, split=False)[0], theirs)
    _close(_run_watched(t.model, batch, graft, split=True)[0], theirs)
    _close(Sequential(t.model).logits(Tokenized.bare(tokens), graft), theirs)


@EACH_FAMILY
def test_each_component_mixed_alone_is_the_sequential_algorithm(
    tiny: MakeTiny, variant: str
) -> None:
    """Prompts of one batch under single components at a strength; in one prompt all in a row."""
    t = tiny(variant, seed=3)
    tokens, available = _tokens(9), components_of(t.sources["pre"])
    rng = random.Random(variant)
    rules = [
        Wanted("sft", rng.choice(STRENGTHS[:4]), _some(rng, range(LENGTH), 3), frozenset({c}))
        for c in available
    ]
    theirs = sequential_graft(t.sources, tokens, _chooser(rules, "pre"))
    _close(t.model(torch.tensor([tokens]), graft=_join(rules))[0], theirs)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased"])
def test_many_groups_of_units_are_computed_by_source(tiny: MakeTiny, variant: str) -> None:
    """More groups of neurons than are computed one by one, in maps with biases."""
    t = tiny(variant, NAMES, seed=2)
    rng = random.Random(variant)
    present = [c for c in NEURON_COMPONENTS if c in components_of(t.sources["pre"])]
    rules = [
        Wanted(
            rng.choice(NAMES), rng.choice(STRENGTHS), _some(rng, range(LENGTH), 4),
            frozenset({"mlp_out", rng.choice(present)}), None, _some(rng, range(40), 5),
        )
        for _ in range(40)
    ]  # fmt: skip
    tokens, graft = _tokens(3), _join(rules)
    mask = t.model.resolve(graft, torch.tensor([tokens]))
    chosen = mask[Component.MLP_OUT, 0]
    assert isinstance(chosen, UnitSelection)
    assert len(chosen.groups) > 16
    theirs = _oracle(t, tokens, rules)
    _close(t.model(torch.tensor([tokens]), graft=mask)[0], theirs)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma3", "olmo2"])
def test_strength_one_and_nought_are_todays_rule_and_none(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    batch = torch.tensor([_tokens(4)])
    for line in ("sft @ last : o + mlp", "sft @ [1] : q : 1 : 0 | sft @ last", "sft @ all"):
        plain = Graft.parse(line)
        one = Graft.parse(re.sub("sft", "1.0*sft", line))
        assert str(one) == str(plain)
        nought = Graft.parse(re.sub("sft", "0*sft", line))
        ours = t.model(batch, graft=plain)
        assert torch.equal(t.model(batch, graft=one), ours)
        assert torch.equal(t.model(batch, graft=nought), t.model(batch))
        assert torch.equal(t.model(batch, graft=plain | nought), ours)
        _close(t.model(batch, graft=plain.scaled(1))[0], ours[0], 1e-6)
        _close(t.model(batch, graft=plain.scaled(0))[0], t.model(batch)[0], 1e-6)


def test_scaled_is_the_graft_followed_by_the_rest_of_the_base() -> None:
    graft = Graft.parse("sft @ last | 0.5*sft @ bos : mlp")
    assert str(graft.scaled(0.7)) == f"{graft} | 0.3*pre @ all"
    assert str(graft.scaled(2, base="v0")) == f"{graft} | -1*v0 @ all"
    assert graft.scaled(0.1).rules[-1].strength == 0.9
    for bad in (True, math.nan, -math.inf):
        with pytest.raises(ValueError, match="is not a finite number"):
            graft.scaled(bad)


def test_uniform_mixtures_are_models_of_mixed_weights(tiny: MakeTiny) -> None:
    """`graft.scaled` on everything: a model between, or beyond, two checkpoints."""
    t = tiny("llama-biased")
    for s in (0.3, 2.0, -0.5):
        middle = copy.deepcopy(t.sources["pre"])
        for name, parameter in middle.named_parameters():
            base, other = (m.get_parameter(name) for m in t.sources.values())
            parameter.data.copy_((1 - s) * base + s * other)
        tokens = torch.tensor([_tokens(5)])
        graft = Graft.rule("sft").scaled(s)
        with torch.no_grad():
            _close(t.model(tokens, graft=graft)[0], middle(tokens).logits[0])
            out = t.model.generate(tokens, 3, graft=graft, do_sample=False)
            theirs = middle.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out[0, :9].tolist() == theirs[0, :9].tolist()
        with t.model.grafted(graft):
            weight = middle.model.layers[1].self_attn.o_proj.weight
            _close(t.model.blocks[1].attn.W_O.flatten(0, 1), weight.T, 1e-6)
            _close(t.model.ln_final.w, middle.model.norm.weight, 1e-6)


# -- canonical forms ---------------------------------------------------------------------------


def test_mixtures_have_one_form() -> None:
    mixtures = Mixtures(3)

    def code(*steps: tuple[int, float]) -> int:
        now = np.zeros(1, dtype=np.int32)
        for source, strength in steps:
            now = mixtures.blend(now, source, strength)
        return int(now[0])

    assert [code((s, 1)) for s in range(3)] == [0, 1, 2]
    assert code((1, 0.5), (2, 1.0)) == 2
    assert code((1, 0)) == code((0, 0.7)) == code((1, 0.5), (0, 1)) == 0
    half = code((1, 0.5))
    assert half == 3
    # 1 - 0.7 is 0.3 as it is written, so these are the same mixture.
    assert code((1, 0.3)) == code((1, 1), (0, 0.7))
    # Shares that cancel vanish, and what is left alone is all.
    assert code((1, 2), (1, 0), (0, 0.5), (0, 0)) == code((1, 1))
    both = code((1, 0.5), (2, 0.5))
    merged = mixtures.merge(np.array([both, half, 2], dtype=np.int32), (0, 0, 2))
    assert merged.tolist() == [code((2, 0.5)), 0, 2]
    assert mixtures.merge_one(both, (0, 0, 0)) == 0
    # pre 0.25, a 0.25, b 0.5, where b equals a: a has 0.75
    assert mixtures.merge_one(both, (0, 1, 1)) == code((1, 0.75))
    with pytest.raises(ValueError, match=r"multiply to .*, which is more than a number"):
        code((1, 1e200), (1, 1e200))


def test_equal_mixtures_are_one_row_of_a_sweep(tiny: MakeTiny) -> None:
    """Strength 0 and the base; one strength written in two ways; sources with equal tensors."""
    sources = tiny_sources("llama", ("pre", "sft"), 1)
    sources["twin"] = copy.deepcopy(sources["sft"])
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    lines = [
        *("none", "0*sft @ last", "0.3*pre @ last", "sft @ last | pre @ last"),
        *("0.3*sft @ last", "sft @ last | 0.7*pre @ last", "0.3*twin @ last"),
        *("0.3*twin @ last : all | 0*sft @ all", "0.5*sft @ last : mlp_out : 1 : n3"),
        "sft @ last : mlp_out : 1 : n3 | 0.5*pre @ last : mlp_out : 1 : n3-4",
    ]
    grafts = [Graft.parse(line) for line in lines]
    prompt = Tokenized.bare(_tokens(2))
    structure, _ = Planner(model.arch, model.sources, grafts).structure(
        prompt, Branches.of(prompt.ids, [(0,)])
    )
    (piece,) = Planner(model.arch, model.sources, grafts, model.equal_sources).pieces(structure)
    assert piece.tree.outputs.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2, 1, 1]]


def test_a_thousand_grafts_of_single_neurons_are_planned_fast() -> None:
    """Units are grouped by what the rules treat alike: a choice has no entry for each neuron."""
    cuts = [(3, 4, 5), (4,), (9, 4), ()]
    atom_of = atoms([c for c in cuts if c], 12)
    assert len(set(atom_of.tolist())) == 4
    assert atom_of[3] == atom_of[5] != atom_of[4] != atom_of[9]
    assert len(set(atom_of[[0, 1, 2, 6, 7, 8, 10, 11]].tolist())) == 1
    assert len(np.unique(atoms([(n,) for n in range(1000)], 14_336))) == 1001


# -- in words ----------------------------------------------------------------------------------

_NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
_NEURONS = st.sets(st.integers(0, 60_000), min_size=1, max_size=6).map(sorted)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(_NUMBERS, st.none() | _NEURONS, st.sampled_from(["mlp", "mlp_in + mlp_out", "mlp_gate"]))
def test_strengths_and_neurons_come_back_from_text_and_yaml(
    strength: float, units: list[int] | None, components: str
) -> None:
    graft = Graft.rule("sft", "last", components, [3], units=units, strength=strength)
    (rule,) = graft.rules
    assert rule.strength == strength
    for back in (Graft.parse(str(graft)), Graft.from_yaml(graft.to_yaml())):
        assert back == graft
        assert hash(back) == hash(graft)
    assert ("strength" in rule.to_dict()) == (strength != 1)
    assert rule.to_dict().get("units") == units


def test_how_strengths_and_neurons_are_written() -> None:
    lines = {
        "0.5*sft @ last : mlp": "0.5*sft @ last : mlp",
        " -1.0 * sft@last": "-1*sft @ last",
        "2.50*sft @ last": "2.5*sft @ last",
        "1e-05*sft @ bos": "1e-05*sft @ bos",
        "+.5e1*sft @ bos": "5*sft @ bos",
        "1*sft @ bos": "sft @ bos",
        "-0*sft @ bos": "0*sft @ bos",
        "0.00e-400*sft @ bos": "0*sft @ bos",
        "sft @ last : mlp_out : 20 : n12-13": "sft @ last : mlp_out : 20 : n12-13",
        "sft @ last : mlp : : n 5,3,4": "sft @ last : mlp : all : n3-5",
        "sft @ last : mlp_in : all : n14335": "sft @ last : mlp_in : all : n14335",
    }
    for given_, written in lines.items():
        assert str(Graft.parse(given_)) == written
    graft = Graft.rule("sft", "last", "mlp_out", 20, units="12-13", strength=0.5)
    assert graft.to_list() == [
        {
            "source": "sft", "at": "last", "components": ["mlp_out"], "layers": [20],
            "units": [12, 13], "strength": 0.5,
        }
    ]  # fmt: skip
    assert Graft.rule("sft", components="mlp", units=7) == Graft.parse("sft @ all : mlp : all : n7")
    assert Graft.rule("sft", components="mlp", units="all") == Graft.parse("sft @ all : mlp")


_NUMBER = "is not a finite number. Write one, such as 0.5 (half of the way to the source), 2 or -1;"
_CUT = (
    "cannot be split by neuron. Neurons apply to mlp_in, mlp_gate and mlp_out only: write "
    'components="mlp", or leave units out.'
)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"strength": float("nan")}, f"strength=nan {_NUMBER}"),
        ({"strength": float("inf")}, f"strength=inf {_NUMBER}"),
        ({"strength": 10**400}, f"{_NUMBER}"),
        ({"strength": True}, f"strength=True {_NUMBER}"),
        ("x*sft @ last", f"strength='x' {_NUMBER}"),
        ("*sft @ last", f"strength='' {_NUMBER}"),
        ("1e999*sft @ last", f"strength=inf {_NUMBER}"),
        ("1e-400*sft @ last", "strength='1e-400' is closer to 0 than a number here can be."),
        ("-0.00001e-399*sft @ last", "strength='-0.00001e-399' is closer to 0 than a number here"),
        ("nan*sft @ last", f"strength='nan' {_NUMBER}"),
        ("2*3*sft @ last", "source='3*sft' is not a source name."),
        ({"components": "o", "units": [1]}, f"units=[1] with components o: o {_CUT}"),
        ({"components": "mlp + ln2", "units": [1]}, f"mlp + ln2: ln2 {_CUT}"),
        ({"units": [1]}, f"units=[1] with components all: all {_CUT}"),
        (
            {"components": "mlp", "heads": [1]},
            "heads=[1] with components mlp: mlp cannot be split by head. Heads apply to q, k, v",
        ),
        (
            {"components": "mlp", "units": []},
            "units=[]: name at least one neuron, counted from 0, or leave units out for all.",
        ),
        ({"components": "mlp", "units": [-1]}, "units=[-1]: name at least one neuron, counted fro"),
        ({"components": "mlp", "units": [200_000]}, "units=200000: no model has 200,000 units."),
        ({"components": "mlp", "units": [True]}, "units=[True]: True is not a whole number."),
        ("sft @ last : mlp : 0 : n1-x", "units='1-x': '1-x' is no"),
        ("sft @ last : mlp : 0 : 1", "heads=[1] with components mlp"),
        ("sft @ last : q : 0 : n1", "units=[1] with components q"),
    ],
)
def test_what_is_not_a_strength_or_a_neuron_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Graft.from_list(
            [{"source": "sft", "at": "last"} | rule] if isinstance(rule, dict) else rule
        )


def test_a_neuron_that_the_model_lacks(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    with pytest.raises(ValueError, match="no neuron 40 in mlp_in, which has 40 neurons here: 0 to"):
        model.resolve("sft @ last : mlp : 0 : n39-40", torch.tensor([[1, 2]]))


# -- sweeps ------------------------------------------------------------------------------------


def test_a_sweep_of_strengths_and_neurons_is_trusted(tiny: MakeTiny) -> None:
    """Against Hugging Face's own classes: in trees, in the report, and generated from."""
    model = tiny("llama-biased", tokenizer="llama3").model
    grafts = {
        "PRE": Graft(),
        "SFT": Graft.rule("sft"),
        **{f"{s:g}": Graft.rule("sft", "last", "mlp", strength=s) for s in (0.5, 2.0, -1.0)},
        "neurons": Graft.parse("sft @ last : mlp : 1 : n3-9 | 0.5*sft @ bos : o : all : 0"),
        "scaled": Graft.rule("sft").scaled(0.3),
    }
    prompts = [Tokenized.bare(_tokens(seed)) for seed in (1, 2)]
    batch = torch.tensor([prompt.ids for prompt in prompts])
    planner = Planner(model.arch, model.sources, list(grafts.values()), model.equal_sources)
    peer = Sequential(model)
    for prompt in prompts:
        branches = Branches.of(prompt.ids, [(5, 6)], model.arch.rope_limit)
        (found,) = tree_logits(model, planner, [(prompt, branches)])
        for number, graft in enumerate(grafts.values()):
            ours = torch.stack([found[number, node] for node in branches.paths[0]])
            _close(ours, peer.logits(prompt, graft, [5])[-2:], 1e-4)
    for graft in (grafts["0.5"], grafts["neurons"]):
        out = model.generate(batch, 1, graft=graft, do_sample=False, new_only=True)
        for prompt, token in zip(prompts, out[:, 0].tolist(), strict=True):
            assert token == int(peer.logits(prompt, graft)[-1].argmax())
    asked = {0: Prompt("Ann plays", answer=" Mara Finn")}
    table = score(model, asked, grafts)
    assert trust_report(model, asked, grafts, table, seed=0).ok
    row = table.index[table["graft"] == "0.5"][0]
    wrong = table.copy()
    wrong.loc[row, "logprob"] = table.loc[table["graft"] == "2", "logprob"].iloc[0]
    assert not trust_report(model, asked, grafts, wrong, seed=0).ok


# -- the lens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased"])
def test_patches_and_attributions_under_strengths_and_neurons(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, tokenizer="llama3")
    tokens, site = _tokens(8), "blocks.1.hook_mlp_out"
    batch = torch.tensor([tokens])

    def written(graft: str) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with patched(t.model, batch, graft):
            t.model.run_with_hooks(batch, fwd_hooks=[(site, lambda x, hook: kept.append(x[0, -1]))])
        return kept[0].detach()

    with torch.no_grad():
        base = t.model.run_with_cache(batch)[1][site][0, -1]
    whole = written("sft @ last : mlp_out : 1")
    assert (whole - base).abs().max() > 0.1
    _close(written("0.5*sft @ last : mlp_out : 1"), (base + whole) / 2)
    _close(written("sft @ last : mlp_out : 1 : n0-20 | sft @ last : mlp_out : 1 : n21-39"), whole)
    parts = [written(f"sft @ last : mlp_out : 1 : {units}") for units in ("n0-20", "n21-39")]
    pre, sft = (b.detach() for b in t.model.blocks[1].mlp.mlp_out.bias)
    _close(sum(parts) - base, whole - (sft - pre))  # which belongs to none of them

    graft = "0.3*sft @ last | 2*sft @ [1] : o : 1 : 0 | sft @ last : mlp : 0 : n3-9"
    prompt = Prompt("Ann plays", answer=" Mara Finn")
    table = direct_logit_attribution(t.model, prompt, graft, by="head")
    table = table[table["graft"] == graft]
    assert table["contribution"].sum() == pytest.approx(table["logit"].iloc[0], abs=1e-3)
    logits, cache = t.model.run_with_cache(prompt, graft=graft)
    assert (logits[0, -1] - table["logit"].iloc[0]).abs().min() < 1e-3
    _close(cache.logit_lens()[-1].detach(), logits.detach(), 1e-4)


# -- grids -------------------------------------------------------------------------------------


def test_a_grid_over_strengths_and_neurons(tiny: MakeTiny) -> None:
    arch = tiny("llama").model.arch
    grid = Grid.model_validate(
        {"positions": "last", "components": "mlp_out", "layers": [0, 1], "strengths": [0, 0.25, 2]}
    )
    found = list(grid.grafts(arch, ("pre", "sft")))
    assert [g.name for g in found[:3]] == [
        "0*sft @ last : mlp_out : 0",
        "0.25*sft @ last : mlp_out : 0",
        "2*sft @ last : mlp_out : 0",
    ]
    assert [g.tags["strength"] for g in found] == [0.0, 0.25, 2.0] * 2
    assert [g.tags["neuron"] for g in found] == ["all"] * 6
    one = NamedGraft.of(found[1].name, found[1].graft)
    about = (one.source, one.span, one.component, one.layer, one.head, one.neuron, one.strength)
    assert about == ("sft", "last", "mlp_out", "0", "all", "all", 0.25)

    units = {"components": "mlp", "units": ["each", {"windows": {"size": 20, "stride": 20}}]}
    found = list(Grid.model_validate(units).grafts(arch, ("pre", "sft")))
    assert [g.tags["neuron"] for g in found] == [*map(str, range(40)), "0-19", "20-39"]
    assert str(found[-1].graft) == "sft @ all : mlp : all : n20-39"
    one = NamedGraft.of("x", found[-1].graft)
    assert (one.head, one.neuron, one.strength) == ("all", "20-39", 1.0)

    dropped = Grid.model_validate(
        {"components": "mlp", "strengths": 0.5, "units": 3, "dropout": {"rates": [0.5]}}
    )
    (draw,) = dropped.grafts(arch, ("pre", "sft"))
    assert draw.name == "0.5*sft @ all : mlp : all : n3 - 0.5 (0)"
    assert all((rule.strength, rule.units) == (0.5, (3,)) for rule in draw.graft)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"strengths": []}, "the list is empty. Name a strength, or leave the axis out for 1."),
        ({"strengths": [0.5, True]}, "strength=True is not a finite number."),
        ({"units": None}, "units is empty. Name neurons, or leave the axis out for all."),
        ({"units": ["first"]}, "units='first': 'first' is no"),
    ],
)
def test_axes_of_a_grid_that_are_refused(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid.model_validate(grid)


# -- gradients ---------------------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's norms and softmax are in float32 in any model; here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


class _Gradients:
    """A tiny pair in float64, its strengths at some sites, and what they do to a loss."""

    tokens = (40, 7, 93, 21)
    under = "sft @ [1] : mlp"

    def __init__(self, variant: str) -> None:
        pair = tiny_sources(variant, ("pre", "sft"), seed=3)
        self.models = {name: model.double() for name, model in pair.items()}
        self.model = GraftedTransformer.from_pretrained(
            self.models, check=False, verbose=False, dtype=torch.float64
        ).requires_grad_(False)
        self.random = torch.Generator().manual_seed(0)
        #: The loss is a product of these with the last two positions' logits.
        self.weights = self.drawn(2, 97)
        self.by_site: dict[tuple[str, int | None], torch.Tensor] = {}
        self.of_bias: dict[tuple[str, int | None], torch.Tensor] = {}

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.random, dtype=torch.float64) - 0.3

    def gradients(self) -> list[torch.Tensor]:
        """Of the strengths by site, then those of biases; the logits are the oracle's, too."""
        for strength in (*self.by_site.values(), *self.of_bias.values()):
            strength.requires_grad_(True)
        batch = torch.tensor([self.tokens])
        mask = self.model.resolve(self.under, batch).strengthened("sft", *self._both())
        logits = self.model(batch, graft=mask)[0]
        _close(logits.detach(), self.oracle({}), 1e-6)
        wanted = [s for of in self._both() for s in of.values()]
        return list(torch.autograd.grad((logits[-2:] * self.weights).sum(), wanted))

    def _both(self) -> tuple[dict[tuple[str, int | None], torch.Tensor], ...]:
        return self.by_site, self.of_bias

    def oracle(self, change: dict[int, torch.Tensor]) -> torch.Tensor:
        """Logits with weights mixed, strengths changed by number."""
        numbers = {
            key: i for i, key in enumerate((of, k) for of in (0, 1) for k in self._both()[of])
        }
        neurons = any(s.ndim == 2 for s in self.by_site.values())

        def at(of: int) -> Choose:
            def choose(component: str, layer: int | None, position: int, unit: int | None) -> Any:
                given_ = self.under != "none" and position == 1 and component.startswith("mlp")
                shares = {"sft" if given_ else "pre": 1.0}
                strength = self._both()[of].get((component, layer))
                if strength is None:
                    return shares
                moved = change.get(numbers[of, (component, layer)], torch.zeros_like(strength))
                place = (position, unit) if strength.ndim == 2 else (position,)
                s = float((strength + moved).detach()[place])
                shares = {name: share * (1 - s) for name, share in shares.items()}
                return shares | {"sft": shares.get("sft", 0.0) + s}

            return choose

        bias = at(1) if neurons else None
        return sequential_graft(self.models, list(self.tokens), at(0), neurons=neurons, bias=bias)

    def difference(self, change: dict[int, torch.Tensor], step: float = 1e-4) -> float:
        """The loss's central difference along a direction, by number of strengths."""
        ends = [
            float((self.oracle({i: sign * d for i, d in change.items()})[-2:] * self.weights).sum())
            for sign in (step, -step)
        ]
        return (ends[0] - ends[1]) / (2 * step)

    def check(self, groups: Sequence[Sequence[int]]) -> None:
        """Gradients against central differences, along a direction for each group of sites."""
        found = self.gradients()
        largest = max(float(g.abs().max()) for g in found)
        for group in groups:
            change = {i: torch.sign(self.drawn(*found[i].shape)) for i in group}
            ours = sum(float((found[i] * d).sum()) for i, d in change.items())
            assert abs(ours - self.difference(change)) < 1e-3 * largest, group


def _at_every_site(variant: str) -> _Gradients:
    case = _Gradients(variant)
    case.by_site = {(str(c), l): case.drawn(len(case.tokens)) for c, l in case.model.arch.sites}
    return case


@EACH_FAMILY
def test_gradients_of_strengths_are_central_differences(exact: None, variant: str) -> None:
    """All sites at once, and some by themselves."""
    case = _at_every_site(variant)
    every = range(len(case.by_site))
    some = random.Random(variant).sample(every, 2)
    case.check([every, *([i] for i in some)])


@pytest.mark.slow
@EACH_FAMILY
def test_gradients_of_strengths_at_every_site(exact: None, variant: str) -> None:
    case = _at_every_site(variant)
    case.check([[i] for i in range(len(case.by_site))])


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased"])
def test_gradients_of_strengths_of_units_and_of_biases(exact: None, variant: str) -> None:
    case = _Gradients(variant)
    case.under = "none"
    arch, rows = case.model.arch, len(case.tokens)
    for component in (*HEAD_COMPONENTS, *NEURON_COMPONENTS):
        if component in arch.components:
            units = arch.n_units_of(Component(component))
            case.by_site[component, 1] = case.drawn(rows, units)
            if component in ("o", "mlp_out"):
                case.of_bias[component, 1] = case.drawn(rows)
    sites = len(case.by_site)
    case.check([range(3), [3], range(4, sites - 1), [sites - 1], [sites, sites + 1]])


def test_strengths_without_a_bias_of_their_own_leave_it_as_it_was(tiny: MakeTiny) -> None:
    """All units wholly from a source, but not the bias: as heads one by one from two sources."""
    t = tiny("llama-biased")
    batch = torch.tensor([_tokens(6)])
    mask = t.model.resolve("none", batch)
    o = (Component.O, 1)
    heads = torch.ones(LENGTH, 4)
    kept = t.model(batch, graft=mask.strengthened("sft", {o: heads}))
    both = t.model(batch, graft=mask.strengthened("sft", {o: heads}, bias={o: torch.ones(LENGTH)}))
    _close(both[0], t.model(batch, graft="sft @ all : o : 1")[0], 1e-5)
    assert not torch.allclose(kept, both, atol=1e-3)
    rows = mask.strengthened("sft", {o: torch.ones(LENGTH)})
    _close(t.model(batch, graft=rows)[0], both[0], 1e-5)
    _, cache = t.model.run_with_cache(batch, graft=rows)
    _close(cache.logit_lens()[-1], both, 1e-5)
    # Mixed in twice, and where it runs already.
    twice = rows.strengthened("sft", {o: torch.full((LENGTH,), 0.5)})
    _close(t.model(batch, graft=twice)[0], both[0], 1e-5)
    already = t.model.resolve("sft @ all", batch)
    strength = torch.full((LENGTH,), 0.5, requires_grad=True)
    again = t.model(batch, graft=already.strengthened("sft", {o: strength}))
    assert torch.equal(again, t.model(batch, graft=already))
    again.sum().backward()
    assert strength.grad is not None
    assert strength.grad.abs().max() == 0


def test_strengths_of_the_wrong_shape_or_place_are_refused(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    batch = torch.tensor([_tokens(6)])
    mask = model.resolve("none", batch)
    row, o = torch.ones(LENGTH), (Component.O, 1)
    for strengths, bias, message in [
        ({(Component.O, 9): row}, None, "strengths of o in layer 9: no such site in this mask."),
        ({("o", None): row}, None, "strengths of o: no such site in this mask."),
        ({o: torch.ones(3)}, None, "strengths of o in layer 1 have shape [3]. Give one for each"),
        ({o: torch.ones(1, LENGTH)}, None, "have shape [1, 7]. Give one for each of the batch's 7"),
        ({}, {o: row}, "strengths of o in layer 1: a bias alone."),
        ({o: row}, {o: row}, "the bias of o in layer 1 has strengths of its own, one per row"),
        (
            {("q", 0): torch.ones(LENGTH, 4)}, {("q", 0): row},
            "the bias of q in layer 0 goes with each head, so it has no strengths of its own.",
        ),
        (
            {("ln1", 0): torch.ones(LENGTH, 7)}, None,
            "strengths of ln1 in layer 0 have shape [7, 7], but ln1 has no units. Give one for ea",
        ),
        ({("embed", None): torch.ones(LENGTH, 7)}, None, "but embed has no units."),
        ({("unembed", None): torch.ones(LENGTH, 1)}, None, "but unembed has no units."),
        (
            {o: torch.ones(LENGTH, 3)}, None,
            "strengths of o in layer 1 are for 3 units, but o has 4 heads. Give [7, 4].",
        ),
        ({o: torch.ones(LENGTH, dtype=torch.int64)}, None, "o in layer 1 are a tensor of int64."),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            mask.strengthened("sft", strengths, bias)
    with pytest.raises(ValueError, match=re.escape("no source 'stf'. This mask has: pre sft. Did")):
        mask.strengthened("stf", {o: row})
    # Without the tests' type checks.
    untyped = inspect.unwrap(GraftMask.strengthened)
    with pytest.raises(ValueError, match="strengths of o in layer 1 are a ndarray"):
        untyped(mask, "sft", {o: np.ones(LENGTH)})
    picked = mask.take(np.array([0]), np.array([2, 3]))
    with pytest.raises(ValueError, match="are for 3 units, but k has 2 key-value heads"):
        picked.strengthened("sft", {("k", 0): torch.ones(2, 3)})


# -- a bias that belongs to no unit ------------------------------------------------------------

LAYER_0 = {"o": "blocks.0.hook_attn_out", "mlp_out": "blocks.0.hook_mlp_out"}


def _at_layer_0(model: GraftedTransformer, component: str, graft: Any) -> torch.Tensor:
    """What attention or the MLP of the first layer writes; its inputs are the base's."""
    batch, site = torch.tensor([_tokens(5)]), LAYER_0[component]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, graft=graft, names_filter=site)
    return cache[site][0].detach()


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.999, 1.0, 2.0])
@pytest.mark.parametrize(
    ("variant", "component", "before"),
    [
        ("gpt2", "o", "sft @ all : o : 0 : 0"),
        ("gpt2", "o", "0.7*sft @ all : o : 0 : 0-2"),
        ("gpt2", "mlp_out", "sft @ all : mlp_out : 0 : n0-3"),
        (
            "llama-biased",
            "mlp_out",
            "2*sft @ [1] : mlp_out : 0 : n0-39 | sft @ [2] : mlp_out : 0 : n3",
        ),
    ],
)
def test_a_strength_over_some_units_is_between_what_ran_and_the_source(
    tiny: MakeTiny, variant: str, component: str, before: str, strength: float
) -> None:
    """(1 - s) * before + s * source, the bias included; as rule, as tensor, in trees and in the
    sequential algorithm."""
    model = tiny(variant).model
    part = model.module_of(Component(component), 0)
    assert not torch.equal(part.bias[0], part.bias[1])
    rule = f"{strength}*sft @ all : {component} : 0"
    ran, source = (
        _at_layer_0(model, component, g) for g in (before, f"sft @ all : {component} : 0")
    )
    wanted = (1 - strength) * ran + strength * source
    graft = f"{before} | {rule}"
    _close(_at_layer_0(model, component, graft), wanted, 1e-6)

    batch = torch.tensor([_tokens(5)])
    mask = model.resolve(before, batch)
    tensor = mask.strengthened("sft", {(component, 0): torch.full((LENGTH,), strength)})
    _close(_at_layer_0(model, component, tensor), wanted, 1e-6)
    units = range(model.arch.n_units_of(Component(component)))
    rows = model.resolve(graft, batch)
    for unit in (None, *units):
        np.testing.assert_allclose(
            tensor.shares(component, 0, unit), rows.shares(component, 0, unit), atol=1e-7
        )

    prompt = Tokenized.bare(_tokens(5))
    ours = model(batch, graft=graft)[0].detach()
    _close(ours, Sequential(model).logits(prompt, Graft.parse(graft)))
    parsed = [Graft.parse(line) for line in (graft, before, rule)]
    planner = Planner(model.arch, model.sources, parsed, model.equal_sources)
    branches = Branches.of(prompt.ids, [(0,)])
    (found,) = tree_logits(model, planner, [(prompt, branches)])
    _close(found[0, branches.paths[0][-1]], ours[-1])


def test_units_agree_in_decimals_in_the_sequential_algorithm_too(tiny: MakeTiny) -> None:
    """1 - 0.7 * 0.7 is 0.51, which floats miss."""
    t = tiny("gpt2")
    prompt = Tokenized.bare(_tokens(5))
    twice = "0.3*sft @ all : o : all : 0 | 0.3*sft @ all : o : all : 0"
    graft = Graft.parse(f"{twice} | 0.51*sft @ all : o : all : 1-3")
    batch = torch.tensor([prompt.ids])
    ours = t.model(batch, graft=graft)[0].detach()
    _close(ours, t.model(batch, graft="0.51*sft @ all : o")[0].detach())
    _close(Sequential(t.model).logits(prompt, graft), ours)
    asked = {0: Prompt("Ann plays", answer=" Mara Finn")}
    model = tiny("gpt2", tokenizer="llama3").model
    grafts = {"PRE": Graft(), "twice": graft}
    report = trust_report(model, asked, grafts, score(model, asked, grafts), seed=0)
    assert report.ok, report.text()


def test_a_bias_of_units_that_name_equal_sources(tiny: MakeTiny) -> None:
    """Units that name two sources with equal tensors do not agree: the bias is the base's, in the
    run, in trees, and in the views."""
    sources = tiny_sources("gpt2", ("pre", "task"), 1)
    sources["relation"] = copy.deepcopy(sources["task"])
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    batch = torch.tensor([_tokens(5)])
    for component, cuts in (("o", ("0", "1-3")), ("mlp_out", ("n0-7", "n8-39"))):
        first, rest = (f"@ all : {component} : 0 : {cut}" for cut in cuts)
        two = f"task {first} | relation {rest}"
        one = f"task {first} | task {rest}"
        bias = {"o": "b_O", "mlp_out": "b_out"}[component]
        part = model.blocks[0].attn if component == "o" else model.blocks[0].mlp
        for graft, source in ((two, 0), (one, 1)):
            with model.grafted(model.resolve(graft, batch)):
                assert torch.equal(getattr(part, bias), getattr(model, bias)[source, 0])
            prompt = Tokenized.bare(_tokens(5))
            ours = model(batch, graft=graft)[0].detach()
            _close(ours, Sequential(model).logits(prompt, Graft.parse(graft)))
            planner = Planner(model.arch, model.sources, [Graft.parse(graft)], model.equal_sources)
            branches = Branches.of(prompt.ids, [(0,)])
            (found,) = tree_logits(model, planner, [(prompt, branches)])
            _close(found[0, branches.paths[0][-1]], ours[-1])
        gap = getattr(model, bias)[1, 0] - getattr(model, bias)[0, 0]
        out = [_at_layer_0(model, component, graft) for graft in (one, two)]
        _close(out[0] - out[1], gap.detach().expand(LENGTH, -1), 1e-5)
        # Where some units stay the base's, their weight is not one, but the bias is.
        with model.grafted(model.resolve(f"task {first}", batch)):
            assert torch.equal(getattr(part, bias), getattr(model, bias)[0, 0])


@pytest.mark.parametrize("component", ["o", "mlp_out"])
def test_patches_of_units_and_of_a_bias_between(component: str) -> None:
    """Of sources that differ in one map only, a patch there is what the graft gives."""
    sources = tiny_sources("gpt2", NAMES, seed=2)
    differs = {"o": "h.0.attn.c_proj", "mlp_out": "h.0.mlp.c_proj"}[component]
    for other in (sources["task"], sources["relation"]):
        for name, parameter in other.named_parameters():
            if differs not in name:
                parameter.data.copy_(sources["pre"].get_parameter(name))
    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    batch, cut = torch.tensor([_tokens(5)]), {"o": "0-1", "mlp_out": "n0-9"}[component]
    for graft in (
        f"task @ all : {component} : 0 : {cut} | 0.4*relation @ [1, 2, -1] : {component} : 0",
        f"0.3*relation @ all : {component} | 2*task @ [1, 3] : {component} : 0 : {cut}",
    ):
        kept: list[torch.Tensor] = []
        keep = (LAYER_0[component], lambda x, hook, kept=kept: kept.append(x[0].detach()))
        with patched(model, batch, graft):
            model.run_with_hooks(batch, fwd_hooks=[keep])
        _close(kept[0], _at_layer_0(model, component, graft), 1e-5)


# -- choices answer for themselves -------------------------------------------------------------


def test_masks_with_tensors_of_strengths_say_what_runs(tiny: MakeTiny) -> None:
    model = tiny("llama-biased").model
    batch = torch.tensor([_tokens(6)])
    mask, o, site = model.resolve("sft @ [0] : o : 1 : 0", batch), ("o", 1), (Component.O, 1)
    by_row = mask.strengthened("sft", {o: torch.tensor([0.5, 0.25, *[0.0] * 5])})
    assert by_row.shares("o", 1, 0)[1, 0].tolist() == [1, 0.25, 0, 0, 0, 0, 0]
    assert by_row.shares("o", 1, 1)[1, 0].tolist() == [0.5, 0.25, 0, 0, 0, 0, 0]
    assert by_row.shares("o", 1)[1, 0].tolist() == [0.5, 0.25, 0, 0, 0, 0, 0]
    assert by_row[site].rows_of(1).tolist() == [0, 1]
    assert by_row[site].rows_of(0).tolist() == list(range(7))
    with pytest.raises(ValueError, match="some places mix sources at o in layer 1"):
        by_row.source_index("o", 1)
    heads = torch.zeros(LENGTH, 4)
    heads[2, 3] = 2.0
    by_head = mask.strengthened("sft", {o: heads})
    assert by_head.shares("o", 1, 3)[:, 0, 2].tolist() == [-1, 2]
    assert by_head.shares("o", 1)[1].tolist() == [[0] * 7]
    assert by_head[site].rows_of(1).tolist() == [0, 2]
    assert by_head[site].only() is None
    # Of strengths upon strengths, the rows that in the end have a share.
    twice = by_head.strengthened("pre", {o: torch.tensor([0.0, 0.0, 1.0, *[0.5] * 4])})
    assert [twice[site].rows_of(source).tolist() for source in (0, 1)] == [list(range(7)), [0]]
    whole = model.resolve("sft @ all", batch)
    again = whole.strengthened("sft", {o: torch.rand(LENGTH)})
    assert again[site].only() == 1
    assert again.source_index("o", 1).tolist() == [[1] * 7]
    assert model.resolve("sft @ all : o : 1 : 0", batch)[site].only() is None
    with (
        pytest.raises(ValueError, match="weight for o in layer 1: a tensor of strengths mixes sft"),
        model.grafted(by_row),
    ):
        _ = model.blocks[1].attn.W_O
    known = "a tensor of strengths is mixed in at o in layer 1, which a patch does not know"
    with pytest.raises(ValueError, match=known), patched(model, batch, by_row):
        pass


@pytest.mark.filterwarnings("ignore:logit_attrs leaves out")
def test_logit_attributions_mix_unembeddings_by_tensors_of_strengths(tiny: MakeTiny) -> None:
    """They are those of the same strengths as numbers, and gradients reach them."""
    model = tiny("llama-biased").model
    batch = torch.tensor([_tokens(7), _tokens(8)])
    s = torch.full((2 * LENGTH,), 0.3, requires_grad=True)
    mask = model.resolve("sft @ [0, 2] : mlp", batch).strengthened("sft", {("unembed", None): s})
    found = {}
    for name, graft in (("tensor", mask), ("rule", "sft @ [0, 2] : mlp | 0.3*sft @ all : unembed")):
        _, cache = model.run_with_cache(batch, graft=graft)
        found[name] = cache.logit_attrs(cache.decompose_resid(), 5, 6)
    _close(found["tensor"].detach(), found["rule"])
    found["tensor"].sum().backward()
    assert s.grad is not None
    assert bool((s.grad != 0).all())


def test_what_heads_add_along_a_direction_reads_back_through_o(tiny: MakeTiny) -> None:
    """For each form that a choice has: as what the heads write, projected."""
    model = tiny("llama-biased").model
    batch = torch.tensor([_tokens(7)])
    seed = torch.Generator().manual_seed(0)
    o, site = model.blocks[1].attn.o, (Component.O, 1)
    z = torch.randn(LENGTH, 4, 6, generator=seed)[..., : o.weight[0].shape[1] // 4]
    direction = torch.randn(LENGTH, model.cfg.d_model, generator=seed)
    by_head = model.resolve("sft @ [1] : o : 1 : 0,2 | 0.5*sft @ [2] : o : 1 : 1", batch)
    heads = torch.rand(LENGTH, 4, generator=seed)
    for mask in (
        model.resolve("sft @ [1, 3] | 2*sft @ [4]", batch),
        by_head,
        by_head.strengthened("sft", {("o", 1): heads[:, 0]}),
        by_head.strengthened("sft", {("o", 1): heads}),
    ):
        written = o.results(z, mask[site]) @ direction[:, :, None]
        _close((o.read_back(direction, mask[site]) * z).sum(-1), written[..., 0])


def test_views_of_mixed_weights_have_the_models_dtype(tiny: MakeTiny) -> None:
    model = copy.deepcopy(tiny("gpt2").model).to(torch.bfloat16)
    with model.grafted("0.5*sft @ all"):
        attn = model.blocks[1].attn
        of_model = (model.unembed.W_U, model.embed.W_E, model.ln_final.w)
        for view in (attn.W_O, attn.b_O, attn.b_Q, *of_model):
            assert view.dtype == torch.bfloat16
        both = model.W_O[:, 1].float()
        _close(attn.W_O.float(), both.mean(0), 1e-2)


# -- strengths that cannot be, or are not, what they seem --------------------------------------


@pytest.mark.parametrize(
    "full",
    ["0*task @ all", "task @ all | pre @ all", "task @ all : mlp | -1*pre @ all | pre @ all"],
)
def test_a_full_run_that_is_the_base_is_refused(full: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"full={full!r} is not a run of a finetuned")):
        References.of({"PRE": Graft()}, ("pre", "task", "relation"), full)
    near = References.of({"PRE": Graft()}, ("pre", "task", "relation"), "0.1*task @ all")
    assert near.full == "SFT"
    one = {"x": Graft.parse("task @ all | 0*relation @ last")}
    assert References.of(one, ("pre", "task", "relation")).full == "x"


def test_strengths_that_multiply_too_far_are_refused_with_their_graft(tiny: MakeTiny) -> None:
    model = tiny("gpt2", tokenizer="llama3").model
    known = (
        "graft '1e+200*sft @ last | 1e+200*sft @ all': the strengths of the rules that meet here"
    )
    graft = Graft.parse("1e+200*sft @ last | 1e+200*sft @ all")
    with pytest.raises(ValueError, match=re.escape(known)):
        model.resolve(graft, torch.tensor([_tokens(1)]))
    asked = {0: Prompt("Ann plays", answer=" Mara Finn")}
    with pytest.raises(ValueError, match=re.escape(known)):
        score(model, asked, {"far": graft})


@pytest.mark.parametrize("line", ["100*sft @ last", "-100*sft @ all : mlp", "40*sft @ all"])
def test_amplifications_are_trusted(tiny: MakeTiny, line: str) -> None:
    """Logits in the thousands have their own rounding; what is wrong beyond it is still seen."""
    model = tiny("llama", tokenizer="llama3").model
    grafts = {"PRE": Graft(), "SFT": Graft.rule("sft"), "far": Graft.parse(line)}
    asked = {
        i: Prompt(text, answer=" Mara Finn") for i, text in enumerate(["Ann plays", "Ann Finn"])
    }
    table = score(model, asked, grafts)
    report = trust_report(model, asked, grafts, table, seed=0)
    assert report.ok, report.text()
    wrong = table.copy()
    for row in table.index[table["graft"] == "far"]:
        wrong.loc[row, "logprob"] = 1.001 * table.loc[row, "logprob"] - 0.01
        wrong.loc[row, "prob"] = math.exp(wrong.loc[row, "logprob"])
    assert not trust_report(model, asked, grafts, wrong, seed=0).ok


def test_scaled_on_a_base_of_another_name_says_how(tiny: MakeTiny) -> None:
    model = tiny("gpt2", ("v0", "sft")).model
    known = (
        """no source 'pre'. This model has: v0 sft. If it is the rest of graft.scaled(…), name"""
    )
    with pytest.raises(ValueError, match=re.escape(f'{known} the base: base="v0".')):
        model.resolve(Graft.rule("sft").scaled(0.5), torch.tensor([_tokens(1)]))


def test_logits_that_overflow_are_not_given(tiny: MakeTiny) -> None:
    """NaN was what a graft far beyond its source gave, without a word."""
    model = tiny("llama", tokenizer="llama3").model
    far, text = "1e30*sft @ all", "Ann plays"
    said = re.escape(
        "graft '1e+30*sft @ all': its logits are not finite in float32: strengths as large as "
        'these overflow. Lower them, or load the model with dtype="float64".'
    )
    for run in (
        lambda: model(text, graft=far),
        lambda: model.generate(text, graft=far, max_new_tokens=2, verbose=False),
        lambda: model.run_with_cache(text, graft=far),
        lambda: logit_lens(model, text, {"far": far}),
    ):
        with pytest.raises(ValueError, match=said):
            run()
    table = score(model, {0: Prompt(text, answer=" Mara")}, {"far": Graft.parse(far)})
    assert "the logits are not finite in torch.float32" in table["reason"].iloc[0]
    assert bool(model(text, graft="1e3*sft @ all").isfinite().all())
