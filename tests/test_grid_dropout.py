"""Grids that leave layers out at random, that grow layer by layer, and that name each component."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import MakeTiny
from families import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import MODEL_COMPONENTS, sequential_graft

from graftlens.components import GROUPS, Component
from graftlens.configfile import ConfigError, settings_from
from graftlens.data.settings import Settings
from graftlens.graft import Graft
from graftlens.model.arch import Architecture, architecture
from graftlens.model.mask import sites_of
from graftlens.planner import Planner
from graftlens.positions import At
from graftlens.prompts import Prompt
from graftlens.sweep.grid import CumulativeEntry, Grid

SOURCES = ("pre", "sft")
ARCHS = {
    name: architecture(VARIANTS[name]())
    for name in ("llama", "gpt2", "neox-parallel", "olmo", "qwen3", "gemma2")
}
LLAMA = ARCHS["llama"]
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


def deep(n_layers: int) -> Architecture:
    """A Llama of any depth."""
    config = VARIANTS["llama"]()
    config.num_hidden_layers = n_layers
    return architecture(config)


def grid(**values) -> Grid:
    return settings_from(Grid, values)


def made(arch: Architecture, **values):
    return list(grid(**values).grafts(arch, SOURCES))


def sites(graft: Graft, arch: Architecture = LLAMA) -> set:
    return set().union(*(sites_of(rule, arch, SOURCES) for rule in graft.rules))


def layers(graft: Graft, arch: Architecture = LLAMA) -> set[int]:
    return {layer for _, layer in sites(graft, arch)}


def inner(arch: Architecture) -> set:
    """Every site in the layers."""
    names = [c for c in arch.components if c not in MODEL_COMPONENTS]
    return set(itertools.product(names, range(arch.n_layers)))


# -- dropout -----------------------------------------------------------------------------------


@given(
    n=st.integers(1, 30),
    rate=st.floats(0, 1),
    seed=st.integers(0, 100),
    draws=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_by_count_just_that_share_of_layers_is_left_out(n, rate, seed, draws):
    arch = deep(n)
    drop = {"rates": [rate], "draws": draws, "seed": seed}
    found = made(arch, components="block", positions="last", dropout=drop)
    assert len(found) == (draws if 0 < rate < 1 else 1)
    for entry in found:
        kept = layers(entry.graft, arch)
        assert len(kept) == n - round(rate * n)
        # A layer is kept or left out as a whole.
        assert sites(entry.graft, arch) == {s for s in inner(arch) if s[1] in kept}
        assert entry.tags["rate"] == rate
        assert entry.tags["layers"] == n
    assert [entry.tags["draw"] for entry in found] == list(range(len(found)))


@given(rate=st.floats(0, 1), seed=st.integers(0, 100), variant=st.sampled_from(sorted(ARCHS)))
@settings(deadline=None, max_examples=60)
def test_matrices_are_sites_of_their_own(rate, seed, variant):
    arch = ARCHS[variant]
    drop = {"rates": [rate], "unit": "matrix", "seed": seed}
    some = {*GROUPS["attn"], Component.MLP_OUT}
    for components, names in (("all", set(Component)), ("attn + mlp_out", some)):
        (entry,) = made(arch, components=components, dropout=drop)
        whole = {(c, l) for c, l in inner(arch) if c in names}
        kept = sites(entry.graft, arch)
        assert kept <= whole
        assert len(kept) == len(whole) - round(rate * len(whole))


def test_matrices_leave_out_other_sites_in_other_layers():
    arch = deep(12)
    (entry,) = made(arch, components="block", dropout={"rates": [0.5], "unit": "matrix"})
    by_layer = defaultdict(set)
    for component, layer in sites(entry.graft, arch):
        by_layer[layer].add(component)
    assert len({frozenset(kept) for kept in by_layer.values()}) > 6


@pytest.mark.parametrize("unit", ["layer", "matrix"])
def test_by_chance_each_is_left_out_with_that_probability(unit):
    arch, rate, seeds = deep(10), 0.3, 400
    counts, shares = defaultdict(int), []
    for seed in range(seeds):
        drop = {"rates": [rate], "by": "chance", "unit": unit, "seed": seed}
        (entry,) = made(arch, components="o + mlp_in", dropout=drop)
        kept = sites(entry.graft, arch)
        shares.append(1 - len(kept) / 20)
        for site in kept:
            counts[site] += 1
    units = 10 if unit == "layer" else 20
    # Four standard errors, for the mean and for each of the 20 sites.
    error = np.sqrt(rate * (1 - rate))
    assert np.mean(shares) == pytest.approx(rate, abs=4 * error / np.sqrt(seeds * units))
    assert len(counts) == 20
    for kept in counts.values():
        assert kept / seeds == pytest.approx(1 - rate, abs=4 * error / np.sqrt(seeds))
    assert np.var(shares) == pytest.approx(rate * (1 - rate) / units, rel=0.4)


@pytest.mark.parametrize("by", ["count", "chance"])
@pytest.mark.parametrize("unit", ["layer", "matrix"])
def test_the_ends_of_dropout_are_the_graft_on_the_layers_and_the_base(by, unit):
    drop = {"rates": [0, 1], "draws": 7, "by": by, "unit": unit}
    for variant, arch in ARCHS.items():
        nothing_out, all_out = made(arch, positions="last", dropout=drop)
        assert sites(nothing_out.graft, arch) == inner(arch), variant
        assert all_out.graft == Graft()
        assert [e.tags["rate"] for e in (nothing_out, all_out)] == [0, 1]
    under = Graft.parse("sft @ bos : q")
    *_, all_out = made(LLAMA, base=str(under), dropout=drop)
    assert all_out.graft == under
    (rule,) = made(LLAMA, positions="~last", dropout=drop)[0].graft.rules
    assert (rule.source, str(rule.at)) == ("sft", "~last")


def test_dropout_stays_within_the_layers_and_heads_of_the_graft():
    drop = {"rates": [0, 0.5], "draws": 5}
    arch = deep(8)
    for entry in made(arch, components="q + k", layers="upper_half", dropout=drop):
        assert len(layers(entry.graft, arch)) == 4 - round(4 * entry.tags["rate"])
        assert layers(entry.graft, arch) <= {4, 5, 6, 7}
        assert entry.tags["layers"] == 4
    for entry in made(arch, components="q", heads=[[0, 2]], dropout=drop):
        assert [list(rule.heads) for rule in entry.graft.rules] == [[0, 2]]


@given(
    first=st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True),
    second=st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True),
    by=st.sampled_from(["count", "chance"]),
    unit=st.sampled_from(["layer", "matrix"]),
)
@settings(deadline=None, max_examples=40)
def test_a_draw_does_not_depend_on_other_rates_and_draws(first, second, by, unit):
    arch = deep(9)

    def drawn(rates, draws):
        drop = {"rates": rates, "draws": draws, "by": by, "unit": unit, "seed": 3}
        return {
            (e.tags["rate"], e.tags["draw"]): e.graft
            for e in made(arch, positions="last", dropout=drop)
        }

    one, more = drawn(first, 2), drawn([*second, *[r for r in first if r not in second]], 4)
    assert one == drawn(first, 2)
    assert one.items() <= more.items()


def test_draws_and_seeds_differ():
    arch = deep(24)

    def grafts(**values):
        drop = {"rates": [0.5], "draws": 20, **values}
        return {e.graft for e in made(arch, positions="last", dropout=drop)}

    assert len(grafts()) == 20
    assert not grafts(seed=0) & grafts(seed=1)
    assert not grafts() & grafts(by="chance")


def test_every_draw_has_a_name_of_its_own_that_says_where():
    drop = {"rates": RATES, "draws": 3}
    entries = made(
        LLAMA,
        name="out",
        positions=["last", "first_entity"],
        components=["o", "mlp"],
        layers=["all", "upper_half"],
        dropout=drop,
    )
    assert len(entries) == 8 * (1 + 3 + 3 + 3 + 1)
    assert len({entry.name for entry in entries}) == len(entries)
    assert entries[0].name == "out: sft @ last : o - 0 (0)"
    assert "out: sft @ first_entity : mlp : upper_half - 0.75 (2)" in {e.name for e in entries}


def test_a_mask_of_a_draw_has_the_kept_sites_only(tiny):
    """What the model runs, place by place, and not what the rules say."""
    made_of = tiny("llama", tokenizer="llama3")
    model = made_of.model
    prompt = "Ann plays with"
    for unit in ("layer", "matrix"):
        drop = {"rates": [0, 0.4, 1], "draws": 3, "unit": unit}
        for entry in made(model.arch, positions="last", dropout=drop):
            mask = model.resolve(entry.graft, prompt)
            kept = sites(entry.graft, model.arch)
            for component in model.arch.components:
                inside = component not in MODEL_COMPONENTS
                for layer in range(model.arch.n_layers) if inside else [None]:
                    heads = range(model.arch.n_units_of(component)) if component in "qkvo" else [0]
                    for head in heads:
                        chosen = mask.source_index(
                            component, layer, head if component in "qkvo" else None
                        )
                        assert not chosen[0, :-1].any()
                        assert chosen[0, -1] == ((component, layer) in kept)


def test_what_dropout_cannot_do_is_an_error():
    with pytest.raises(ValueError, match=r"reaches no layer\. Leave dropout out"):
        made(LLAMA, components="unembed", dropout={"rates": [0.5]})
    for rates in ([-0.1], [1.1], []):
        with pytest.raises(ConfigError, match=r"dropout\.rates"):
            grid(dropout={"rates": rates})
    for wrong in ({"draws": 0}, {"by": "number"}, {"unit": "head"}, {"seed": -1}, {"rate": 1}):
        with pytest.raises(ConfigError, match="dropout"):
            grid(dropout={"rates": [0.5], **wrong})


def test_a_grid_with_dropout_is_written_and_read_back():
    one = grid(name="out", positions="last", dropout={"rates": [0, 0.5], "draws": 2, "seed": 4})
    assert isinstance(one, Settings)
    again = settings_from(Grid, one.model_dump(mode="json"))
    assert again == one
    assert made(LLAMA, **one.model_dump(mode="json")) == list(one.grafts(LLAMA, SOURCES))


# -- growing ranges ---------------------------------------------------------------------------


@given(n=st.integers(1, 30), stride=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_growing_runs_end_with_all_layers(n, stride):
    arch = deep(n)
    for end in ("below", "above"):
        entry = {"cumulative": end, "stride": stride}
        grafts = made(arch, components="block", layers=[entry])
        found = [sorted(layers(g.graft, arch)) for g in grafts]
        sizes = [*range(stride, n, stride), n]
        assert [len(f) for f in found] == sizes == [g.tags["layers"] for g in grafts]
        for run in found:
            start = 0 if end == "below" else n - len(run)
            assert run == list(range(start, start + len(run)))
        assert sites(grafts[-1].graft, arch) == inner(arch)
        assert len({g.name for g in grafts}) == len(grafts)


def test_growing_runs_of_heads_and_what_is_no_run():
    grafts = made(LLAMA, components="q", heads=[{"cumulative": "above"}])
    assert [list(g.graft.rules[0].heads) for g in grafts] == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert list(CumulativeEntry(cumulative="below").ranges(3)) == ["0", "0-1", "0-2"]
    for wrong in ({"cumulative": "left"}, {"cumulative": "below", "stride": 0}):
        with pytest.raises(ConfigError, match="layers"):
            grid(layers=[wrong])


# -- each component ----------------------------------------------------------------------------

PLAIN = ("ln1", "q", "k", "v", "o", "ln2", "mlp_in", "mlp_out")
GATED = ("ln1", "q", "k", "v", "o", "ln2", "mlp_in", "mlp_gate", "mlp_out")
EACH = {
    "gpt2": set(PLAIN),
    "neox-parallel": set(PLAIN),
    "llama": set(GATED),
    "olmo": set(GATED) - {"ln1", "ln2"},  # its norms have no weights
    "qwen3": {*GATED, "q_norm", "k_norm"},
    "gemma2": {*GATED, "ln1_post", "ln2_post"},
}


@pytest.mark.parametrize("variant", EACH)
def test_each_component_that_the_architecture_has_in_its_layers(variant):
    arch = ARCHS[variant]
    entries = made(arch, positions="last", components="each", layers="each")
    assert {e.tags["component"] for e in entries} == EACH[variant]
    assert len(entries) == len(EACH[variant]) * arch.n_layers
    # Every site of the layers once.
    found = [site for e in entries for site in sites(e.graft, arch)]
    assert len(found) == len(set(found))
    assert set(found) == inner(arch)
    mixed = made(arch, components=["each", "attn", "unembed"])
    assert {e.tags["component"] for e in mixed} == {*EACH[variant], "attn", "unembed"}
    # And a planner takes them.
    Planner(arch, SOURCES, [e.graft for e in entries])


# -- a draw for each token ---------------------------------------------------------------------


def test_every_token_has_a_draw_of_its_own() -> None:
    drop = {"rates": [0.5], "draws": 2, "per": "token"}
    one, two = made(deep(8), positions="all", components="block", dropout=drop)
    assert one.name == "sft @ all : block - 0.5 per token (0)"
    for entry in (one, two):
        by_token = defaultdict(set)
        for rule in entry.graft.rules:
            by_token[str(rule.at)] |= layers(Graft((rule,)), deep(8))
        assert len(by_token) == 64
        assert {len(kept) for kept in by_token.values()} == {4}, "half of eight layers"
        assert len({frozenset(kept) for kept in by_token.values()}) > 20
    assert one.graft != two.graft
    again, _ = made(deep(8), positions="all", components="block", dropout=drop)
    assert again.graft == one.graft
    assert Graft.parse(str(one.graft)) == one.graft


def test_a_draw_per_token_is_the_sequential_algorithms(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="llama3")
    prompt = Prompt("News: {first_entity} stars with", {"first_entity": "Ann Lee"})
    (tokens,) = t.model.tokenized(prompt)
    drop = {"rates": [0.5], "draws": 1, "per": "token", "seed": 3}
    entry, *_ = made(t.model.arch, positions="first_entity + last", dropout=drop)
    spans = {i for run in tokens.spans["first_entity"] for i in run} | {len(tokens) - 1}

    def choose(component: str, layer: int | None, position: int, unit: int | None) -> str:
        if position not in spans or layer is None:
            return "pre"
        mine = [r for r in entry.graft.rules if str(r.at).endswith(f"[{position % 64} % 64]")]
        return "sft" if any(layer in layers(Graft((r,)), t.model.arch) for r in mine) else "pre"

    theirs = sequential_graft(t.sources, list(tokens.ids), choose)
    ours = t.model(prompt, graft=entry.graft)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_positions_modulo_a_number_may_be_none() -> None:
    at = At.parse("first_entity & [1 % 3]")
    assert str(at) == "first_entity & [1 % 3]"
    assert At.parse(str(at)) == at
    spans = {"first_entity": ((1, 2, 3, 4),), "last": ((5,),)}
    assert np.flatnonzero(at.select(spans, 6)).tolist() == [1, 4]
    assert not At.parse("last & [1 % 3]").select(spans, 6).any()
    assert At.parse("~[0 % 2]").may_be_empty()
    # What follows counts as the last token: a sweep runs it as that, whatever its number.
    assert at.select(spans, 6, 9)[6:].tolist() == [False] * 3
    assert At.parse("[5 % 64]").select(spans, 6, 9).tolist() == [False] * 5 + [True] * 4
    assert not At.parse("first_entity").may_be_empty()
    with pytest.raises(ValueError, match=r"at=\[3 % 3\]: no position is 3 modulo 3"):
        At.parse("[3 % 3]")
