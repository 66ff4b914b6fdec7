"""Rules with a strength and rules of single neurons, against the sequential algorithm.

What a graft means is worked out here from rules in a form of the tests' own (`Wanted`), as shares
of sources at each site; the oracle in `reference` mixes real parameters by these shares.
"""

import copy
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import tiny_sources
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

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.mask import Mixtures, UnitSelection, atoms
from graftlens.model.sequential import Sequential
from graftlens.prompts import Tokenized
from graftlens.sweep.planner import Branches, Planner

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


def _chooser(rules: Sequence[Wanted], base: str) -> Choose:
    def choose(component: str, layer: int | None, position: int, unit: int | None) -> Any:
        shares = {base: 1.0}
        for rule in rules:
            if rule.meets(component, layer, position, unit):
                shares = {name: share * (1 - rule.strength) for name, share in shares.items()}
                shares[rule.source] = shares.get(rule.source, 0.0) + rule.strength
        # Whether units agree is asked of the mixture, not of the way that led to it.
        return {name: round(shares[name], 12) for name in sorted(shares) if round(shares[name], 12)}

    return choose


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
    theirs = sequential_graft(t.sources, tokens, _chooser(rules, "pre"), neurons=True)
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
    theirs = sequential_graft(t.sources, tokens, _chooser(rules, "pre"), neurons=True)
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
    (part,) = Planner(model.arch, model.sources, grafts, model.equal_sources).parts(structure)
    assert part.tree.outputs.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2, 1, 1]]


def test_a_thousand_grafts_of_single_neurons_are_planned_fast() -> None:
    """Units are grouped by what the rules treat alike: a choice has no entry for each neuron."""
    cuts = [(3, 4, 5), (4,), (9, 4), ()]
    atom_of = atoms([c for c in cuts if c], 12)
    assert len(set(atom_of.tolist())) == 4
    assert atom_of[3] == atom_of[5] != atom_of[4] != atom_of[9]
    assert len(set(atom_of[[0, 1, 2, 6, 7, 8, 10, 11]].tolist())) == 1
    assert len(np.unique(atoms([(n,) for n in range(1000)], 14_336))) == 1001


# -- gradients ---------------------------------------------------------------------------------
