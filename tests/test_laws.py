"""DESIGN's laws 1 to 4: what a graft computes, and that a run leaves nothing behind.

What a graft means is worked out here a second time, site by site, from rules in a form of the
test's own (`Wanted`), and run by the sequential algorithm in `reference`.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HEAD_COMPONENTS, MODEL_COMPONENTS, components_of, n_heads_of, sequential_graft
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
ONE_OF_EACH_FAMILY = (
    *("gpt2", "neox-parallel", "llama-biased", "mistral-window", "gemma", "gemma2", "gemma3"),
    *("olmo-clip", "olmo2", "qwen2-window", "qwen3", "phi3"),
)
EACH_FAMILY = pytest.mark.parametrize("variant", ONE_OF_EACH_FAMILY)
LENGTH = 11  # longer than every window

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def _tokens(n: int = LENGTH, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < tolerance, difference


# --- What a graft means, written down a second time ----------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """One rule as plain sets. `layers` None is all, and then components outside them count too."""

    source: str
    positions: frozenset[int]
    components: frozenset[str]
    layers: frozenset[int] | None = None
    heads: frozenset[int] | None = None

    def graft(self) -> Graft:
        """The same rule in the library's words."""
        return Graft.rule(
            self.source,
            at=sorted(self.positions),
            components=sorted(self.components),
            layers="all" if self.layers is None else sorted(self.layers),
            heads=None if self.heads is None else sorted(self.heads),
        )

    def meets(self, component: str, layer: int | None, position: int, head: int | None) -> bool:
        """Whether the rule reaches one site."""
        return (
            component in self.components
            and position in self.positions
            and (self.layers is None or layer in self.layers)
            and (self.heads is None or head in self.heads)
        )


def _join(rules: Sequence[Wanted]) -> Graft:
    graft = Graft()
    for rule in rules:
        graft |= rule.graft()
    return graft


def _chooser(
    rules: Sequence[Wanted], base: str
) -> Callable[[str, int | None, int, int | None], str]:
    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        source = base
        for rule in rules:
            if rule.meets(component, layer, position, head):
                source = rule.source
        return source

    return choose


def _some(rng: random.Random, values: Sequence[Any], most: int | None = None) -> frozenset[Any]:
    return frozenset(rng.sample(list(values), rng.randint(1, most or len(values))))


def _random_rules(tiny: Tiny, rng: random.Random, n_rules: int, length: int) -> list[Wanted]:
    """Rules over single sites and small sets of them, by head about one time in three."""
    model = next(iter(tiny.sources.values()))
    available = components_of(model)
    inside = [c for c in available if c not in MODEL_COMPONENTS]
    rules = []
    for _ in range(n_rules):
        source = rng.choice(list(tiny.sources))
        positions = _some(rng, range(length), 4)
        kind = rng.choice(["site", "head", "several", "everywhere"])
        layers: frozenset[int] | None = _some(rng, range(tiny.model.arch.n_layers), 2)
        heads = None
        if kind == "site":
            components = frozenset({rng.choice(inside)})
            layers = frozenset({rng.randrange(tiny.model.arch.n_layers)})
        elif kind == "head":
            components = frozenset({rng.choice(HEAD_COMPONENTS)})
            heads = _some(rng, range(n_heads_of(model, next(iter(components))) or 0))
        elif kind == "several":
            components = _some(rng, inside)
        else:
            components, layers = _some(rng, available), None
        rules.append(Wanted(source, positions, components, layers, heads))
    return rules


def _run_watched(model: GraftedTransformer, tokens: Tensor, graft: Graft, split: bool) -> Tensor:
    """Run with a hook on every hook point: nothing may then take a short cut."""
    fired: set[str] = set()

    def watch(value: Tensor, hook: HookPoint) -> None:
        fired.add(hook.name)

    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for flag in flags:
        getattr(model, f"set_{flag}")(split)
    logits = model.run_with_hooks(tokens, graft=graft, fwd_hooks=[(lambda name: True, watch)])
    for flag in flags:
        getattr(model, f"set_{flag}")(False)
    last = model.arch.n_layers - 1
    assert f"blocks.{last}.attn.hook_pattern" in fired
    assert f"blocks.{last}.mlp.hook_post" in fired
    assert (f"blocks.{last}.attn.hook_result" in fired) == split
    assert (f"blocks.{last}.hook_k_input" in fired) == split
    return logits


# --- Law 1 ---------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_the_empty_graft_is_the_base_and_a_full_graft_its_source(
    tiny: MakeTiny, variant: str
) -> None:
    t = tiny(variant)
    rows = [_tokens(seed=1), _tokens(seed=2)]
    for graft, source in [
        (None, "pre"),
        (Graft(), "pre"),
        ("none", "pre"),
        ("sft @ all", "sft"),
        (Graft.rule("sft"), "sft"),
        ("pre @ all", "pre"),
    ]:
        ours = t.model(torch.tensor(rows), graft=graft)
        for row, tokens in zip(ours, rows, strict=True):
            _close(row, t.logits(source, tokens))


@EVERY_VARIANT
def test_uniform_grafts_with_every_hook_attached(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    tokens = _tokens(seed=3)
    for source in t.sources:
        for split in (False, True):
            ours = _run_watched(t.model, torch.tensor([tokens]), Graft.rule(source), split)
            _close(ours[0], t.logits(source, tokens))


@EVERY_VARIANT
def test_a_prompt_of_one_token(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    _close(t.model(torch.tensor([7]), graft="sft @ last")[0], t.logits("sft", [7]))


# --- Law 2 ---------------------------------------------------------------------------------------


@EVERY_VARIANT
@pytest.mark.parametrize("names", [("pre", "sft"), ("pre", "task", "relation")], ids=["2", "3"])
def test_random_grafts_are_the_sequential_algorithm(
    tiny: MakeTiny, variant: str, names: tuple[str, ...]
) -> None:
    t = tiny(variant, names, seed=2)
    for seed, n_rules in enumerate((6, 14)):
        rng = random.Random(f"{variant}{names}{seed}")
        rules = _random_rules(t, rng, n_rules, length=LENGTH)
        graft = _join(rules)
        tokens = _tokens(seed=seed)
        theirs = sequential_graft(t.sources, tokens, _chooser(rules, names[0]))
        assert (theirs - t.logits(names[0], tokens)).abs().max() > 1e-2
        batch = torch.tensor([tokens])
        _close(t.model(batch, graft=graft)[0], theirs)
        _close(_run_watched(t.model, batch, graft, split=False)[0], theirs)
        _close(_run_watched(t.model, batch, graft, split=True)[0], theirs)


@EVERY_VARIANT
def test_each_component_alone_is_the_sequential_algorithm(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, seed=3)
    rng = random.Random(variant)
    tokens = _tokens(seed=9)
    batch = torch.tensor([tokens])
    base = t.logits("pre", tokens)
    assert {*components_of(t.sources["pre"])} == {c.value for c in t.model.arch.components}
    for component in components_of(t.sources["pre"]):
        positions = frozenset(rng.sample(range(LENGTH), 3))
        rule = Wanted("sft", positions, frozenset({component}))
        theirs = sequential_graft(t.sources, tokens, _chooser([rule], "pre"))
        assert (theirs - base).abs().max() > 1e-3 * base.abs().max(), component
        _close(t.model(batch, graft=rule.graft())[0], theirs)
        if variant in ONE_OF_EACH_FAMILY:
            _close(_run_watched(t.model, batch, rule.graft(), split=False)[0], theirs)


@EACH_FAMILY
def test_each_head_alone_is_the_sequential_algorithm(tiny: MakeTiny, variant: str) -> None:
    """One head of one component in one layer; o's bias must stay the base's."""
    t = tiny(variant, seed=4)
    tokens = _tokens(seed=4)
    batch = torch.tensor([tokens])
    for component in HEAD_COMPONENTS:
        head = (n_heads_of(t.sources["pre"], component) or 0) - 1
        rule = Wanted(
            "sft",
            frozenset({2, LENGTH - 1}),
            frozenset({component}),
            frozenset({1}),
            frozenset({head}),
        )
        theirs = sequential_graft(t.sources, tokens, _chooser([rule], "pre"))
        _close(t.model(batch, graft=rule.graft())[0], theirs)
        _close(_run_watched(t.model, batch, rule.graft(), split=True)[0], theirs)


@EACH_FAMILY
def test_prompts_of_one_batch_do_not_meet(tiny: MakeTiny, variant: str) -> None:
    """Rows of one source are gathered across prompts: each must come back to its own place."""
    t = tiny(variant, seed=5)
    rows = [_tokens(seed=s) for s in (1, 2, 3)]
    rules = _random_rules(t, random.Random(variant), 6, LENGTH)
    ours = t.model(torch.tensor(rows), graft=_join(rules))
    for row, tokens in zip(ours, rows, strict=True):
        _close(row, sequential_graft(t.sources, tokens, _chooser(rules, "pre")))


@PROPERTY
@given(seed=st.integers(0, 10**6), n_rules=st.integers(1, 8))
def test_a_mask_names_the_source_of_every_site(tiny: MakeTiny, seed: int, n_rules: int) -> None:
    t = tiny("gemma3", ("pre", "task", "relation"))
    rules = _random_rules(t, random.Random(seed), n_rules, LENGTH)
    mask = t.model.resolve(_join(rules), torch.tensor([_tokens()] * 2))
    choose = _chooser(rules, "pre")
    model = t.sources["pre"]
    for component in components_of(model):
        for layer in [None] if component in MODEL_COMPONENTS else range(t.model.arch.n_layers):
            n_heads = n_heads_of(model, component)
            for head in [None] if n_heads is None else range(n_heads):
                names = [choose(component, layer, p, head) for p in range(LENGTH)]
                wanted = [t.model.sources.index(name) for name in names]
                found = mask.source_index(component, layer, head)
                assert found.tolist() == [wanted, wanted], (component, layer, head)


# --- Law 3 ---------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_a_graft_leaves_earlier_logits_as_they_were(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    tokens = _tokens(seed=6)
    batch = torch.tensor([tokens])
    base = t.model(batch)[0]
    for position in (1, 5, LENGTH - 1):
        ours = t.model(batch, graft=Graft.rule("sft", at=[position]))[0]
        assert (ours[:position] - base[:position]).abs().max() <= 1e-6 * base.abs().max()
        assert (ours[position] - base[position]).abs().max() > 1e-2 * base.abs().max()


@EVERY_VARIANT
def test_grafting_a_source_onto_itself_does_nothing(tiny: MakeTiny, variant: str) -> None:
    """A twin of the base: every mask over the two is a uniform one in effect."""
    t = tiny(variant)
    twins = {"pre": t.sources["pre"], "twin": copy.deepcopy(t.sources["pre"])}
    model = GraftedTransformer.from_pretrained(twins, check=False, verbose=False)
    tokens = _tokens(seed=7)
    graft = "twin @ [2, 5] : q + mlp_out + o | twin @ last"
    assert torch.equal(model(torch.tensor([tokens]), graft=graft), model(torch.tensor([tokens])))
    graft += " | twin @ [1] : k + o : 1 : 0"  # heads apart are summed in another order
    _close(model(torch.tensor([tokens]), graft=graft)[0], t.logits("pre", tokens))
    base = t.model(torch.tensor([tokens]))
    assert torch.equal(t.model(torch.tensor([tokens]), graft="pre @ [3] : mlp | pre @ last"), base)


@EVERY_VARIANT
@pytest.mark.parametrize(
    ("graft", "source"),
    [
        ("sft @ bos | sft @ ~bos", "sft"),
        ("sft @ [0, 1, 2] | sft @ ~[0, 1, 2] : block | sft @ ~bos + [2]", "sft"),
        ("sft @ all | pre @ all", "pre"),
        ("sft @ all : attn | sft @ all : mlp | sft @ all", "sft"),
        ("pre @ last | sft @ all : q : all : 0 | sft @ all", "sft"),
    ],
)
def test_what_is_uniform_in_effect_is_that_source(
    tiny: MakeTiny, variant: str, graft: str, source: str
) -> None:
    t = tiny(variant)
    tokens = _tokens(seed=8)
    ours = t.model(torch.tensor([tokens]), graft=graft)[0]
    _close(ours, t.logits(source, tokens))
    assert torch.equal(ours, t.model(torch.tensor([tokens]), graft=Graft.rule(source))[0])


def test_all_heads_one_by_one_are_the_whole_component(tiny: MakeTiny) -> None:
    t = tiny("llama-biased")
    rules = [f"sft @ [3] : {c} : all : {h}" for c in "qo" for h in range(4)]
    rules += [f"sft @ [3] : {c} : all : {h}" for c in "kv" for h in range(2)]
    tokens = torch.tensor([_tokens()])
    by_head = t.model(tokens, graft=" | ".join(rules))
    assert torch.equal(by_head, t.model(tokens, graft="sft @ [3] : q + k + v + o"))


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_disjoint_rules_commute_and_the_later_of_two_wins(tiny: MakeTiny, seed: int) -> None:
    t = tiny("qwen3", ("pre", "task", "relation"))
    rng = random.Random(seed)
    tokens = _tokens(seed=seed)
    batch = torch.tensor([tokens])
    places = rng.sample(range(LENGTH), 6)
    inside = [c for c in components_of(t.sources["pre"]) if c not in MODEL_COMPONENTS]
    components = _some(rng, inside)
    first = Wanted("task", frozenset(places[:3]), components)
    second = Wanted("relation", frozenset(places[3:]), components, frozenset({0, 2}))
    there = t.model(batch, graft=first.graft() | second.graft())
    back = t.model(batch, graft=second.graft() | first.graft())
    _close(there, back, 1e-6)

    over = Wanted("relation", first.positions, first.components)
    both = t.model(batch, graft=first.graft() | over.graft())
    _close(both[0], sequential_graft(t.sources, tokens, _chooser([over], "pre")))


# --- Law 4: nothing is left behind ---------------------------------------------------------------


def _state(model: GraftedTransformer) -> dict[str, Any]:
    """Everything that a run might leave changed."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    hooks = {
        name: (len(p.fwd_hooks), len(p.bwd_hooks), len(p._forward_hooks), len(p._backward_hooks))
        for name, p in model.hook_dict.items()
    }
    return {
        "weights": digest.hexdigest(),
        "where": [p.data_ptr() for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": hooks,
        "contexts": [dict(p.ctx) for p in model.hook_dict.values()],
        "caching": model.is_caching,
        "active": list(model.active.stack),
        "cfg": model.cfg.to_dict(),
        "training": model.training,
    }


MIXED = "sft @ last + [1] : o + mlp | sft @ [2] | sft @ [3] : q : 1 : 0"


@EACH_FAMILY
def test_a_run_leaves_the_model_as_it_was(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    model, tokens = t.model, torch.tensor([_tokens()])
    before = _state(model)
    plain = model(tokens)
    model(tokens, graft=MIXED)
    model(tokens, "loss", graft="sft @ all")
    model.run_with_cache(tokens, graft=MIXED)
    model.run_with_hooks(
        tokens, graft=MIXED, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)]
    )
    model.generate(tokens, 3, graft=MIXED)
    with model.grafted(MIXED):
        model(tokens)
        with model.grafted("sft @ all"):
            model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, graft=MIXED)
    cache.stack_head_results()
    cache.decompose_resid(apply_ln=True)
    assert _state(model) == before
    assert torch.equal(model(tokens), plain)


class _StopError(Exception):
    pass


def _stop(value: Tensor, hook: HookPoint) -> None:
    raise _StopError


def _failures(model: GraftedTransformer, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    hooks = [("blocks.0.hook_resid_pre", lambda x, hook: x * 2), ("blocks.1.attn.hook_z", _stop)]

    def in_a_block() -> None:
        with model.grafted("sft @ all"), model.grafted(MIXED):
            model(tokens)
            raise _StopError

    def in_a_hook_in_a_block() -> None:
        with model.grafted(MIXED), model.hooks(fwd_hooks=hooks):
            model(tokens)

    def in_a_cache() -> None:
        _, cache = model.run_with_cache(tokens, graft=MIXED)
        cache.logit_attrs(cache["resid_post", 0][None], tokens="a text without a tokenizer")

    def in_a_backward_hook() -> None:
        with torch.enable_grad():
            model.run_with_hooks(tokens, graft=MIXED, bwd_hooks=[("nowhere", _stop)])

    return {
        "a hook": lambda: model.run_with_hooks(tokens, graft=MIXED, fwd_hooks=hooks),
        "a hook while caching": lambda: _cache_with_a_failing_hook(model, tokens, hooks),
        "a hook name": lambda: model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.hook_resid_pre", _stop), ("blocks.0.hook_resid", _stop)]
        ),
        "a filter": lambda: model.run_with_cache(tokens, graft=MIXED, names_filter="nowhere"),
        "a position": lambda: model.run_with_cache(tokens, graft="sft @ last | sft @ [30]"),
        "a span": lambda: model.run_with_hooks(tokens, graft="sft @ title", fwd_hooks=hooks),
        "a source": lambda: model(tokens, graft="other @ last"),
        "a component": lambda: model.generate(tokens, graft="sft @ last : nonsense"),
        "generation": lambda: model.generate(tokens, 3, graft="sft @ [-20]"),
        "a block": in_a_block,
        "a hook in a block": in_a_hook_in_a_block,
        "a block's graft": lambda: model.grafted("sft @@ last").__enter__(),
        "a cache": in_a_cache,
        "a backward hook's name": in_a_backward_hook,
    }


def _cache_with_a_failing_hook(
    model: GraftedTransformer, tokens: Tensor, hooks: list[tuple[str, Any]]
) -> None:
    with model.hooks(fwd_hooks=hooks):
        model.run_with_cache(tokens, graft=MIXED)


@pytest.mark.parametrize("where", list(_failures(None, None)))  # type: ignore[arg-type]
def test_an_exception_leaves_the_model_as_it_was(tiny: MakeTiny, where: str) -> None:
    t = tiny("llama-biased")
    tokens = torch.tensor([_tokens()])
    before = _state(t.model)
    with pytest.raises((_StopError, ValueError)):
        _failures(t.model, tokens)[where]()
    assert _state(t.model) == before
    _close(t.model(tokens)[0], t.logits("pre", tokens[0].tolist()))


def test_a_hook_that_is_there_to_stay_survives_a_run_that_fails(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    seen: list[str] = []
    t.model.add_perma_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(hook.name))
    with suppress(_StopError):
        t.model.run_with_hooks(
            torch.tensor([_tokens()]), fwd_hooks=[("blocks.1.hook_resid_pre", _stop)]
        )
    t.model(torch.tensor([_tokens()]))
    assert seen == ["blocks.0.hook_resid_pre"] * 2


def test_the_sources_themselves_are_not_touched(tiny: MakeTiny) -> None:
    """Neither may the grafted model share their memory: training one must not change the other."""
    t = tiny("phi3")
    models = {name: copy.deepcopy(model) for name, model in t.sources.items()}
    model = GraftedTransformer.from_pretrained(models, verbose=False)
    tokens = torch.tensor([_tokens()])
    before = model(tokens, graft=MIXED)
    for name, source in models.items():
        for ours, theirs in zip(source.parameters(), t.sources[name].parameters(), strict=True):
            assert torch.equal(ours, theirs)
            ours.data.zero_()
    assert torch.equal(model(tokens, graft=MIXED), before)


# --- Identical tensors are stored once -----------------------------------------------------------


def _storages(model: nn.Module) -> int:
    return len({p.untyped_storage().data_ptr() for p in model.parameters()})


def _load(**sources: nn.Module) -> GraftedTransformer:
    return GraftedTransformer.from_pretrained(sources, verbose=False)


def test_only_what_differs_is_stored_twice() -> None:
    """One MLP of one layer and one norm of another: two tensors more than one model has."""
    pre = tiny_model("llama", seed=1)
    sft = copy.deepcopy(pre)
    other = tiny_model("llama", seed=2)
    changed = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"]
    for name in changed:
        sft.get_parameter(name).data.copy_(other.get_parameter(name))
    model = _load(pre=pre, sft=sft)
    one = len(list(pre.parameters()))
    assert _storages(model) == one + 2
    tokens = _tokens()
    rules = [Wanted("sft", frozenset({1, 4, 10}), frozenset({"mlp_in", "ln1", "q"}))]
    theirs = sequential_graft({"pre": pre, "sft": sft}, tokens, _chooser(rules, "pre"))
    _close(model(torch.tensor([tokens]), graft=_join(rules))[0], theirs)


def test_of_three_sources_two_may_agree() -> None:
    pre, sft = tiny_model("llama-biased", seed=1), tiny_model("llama-biased", seed=2)
    one = len(list(pre.parameters()))
    again = copy.deepcopy(sft)
    again.model.layers[0].mlp.down_proj.bias.data.add_(1.0)
    model = _load(pre=pre, sft=sft, again=again)
    assert _storages(model) == 2 * one + 1
    tokens = _tokens()
    rules = [
        Wanted("sft", frozenset({1, 2}), frozenset({"mlp_out", "v", "unembed"})),
        Wanted("again", frozenset({4, 10}), frozenset({"mlp_out", "o", "embed"})),
    ]
    sources = {"pre": pre, "sft": sft, "again": again}
    theirs = sequential_graft(sources, tokens, _chooser(rules, "pre"))
    _close(model(torch.tensor([tokens]), graft=_join(rules))[0], theirs)


def test_twins_cost_nothing() -> None:
    pre = tiny_model("qwen3", seed=1)
    assert _storages(_load(pre=pre, a=copy.deepcopy(pre), b=pre)) == len(list(pre.parameters()))


@pytest.mark.parametrize("variant", ["llama3-rope-tied", "gpt2", "gemma2"])
def test_tied_embeddings_are_one_tensor_and_two_components(variant: str) -> None:
    pair = {"pre": tiny_model(variant, seed=1), "sft": tiny_model(variant, seed=2)}
    model = _load(**pair)
    embed, unembed = model.embed.weight, model.unembed.linear.weight
    for source in range(2):
        assert embed[source].data_ptr() == unembed[source].data_ptr()
    held = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    assert sum(held.values()) == sum(p.numel() for m in pair.values() for p in m.parameters())
    tokens = _tokens()
    for component in ("embed", "unembed"):
        rules = [Wanted("sft", frozenset({0, 3, 10}), frozenset({component}))]
        theirs = sequential_graft(pair, tokens, _chooser(rules, "pre"))
        _close(model(torch.tensor([tokens]), graft=_join(rules))[0], theirs)


def test_one_source_may_have_untied_what_another_ties() -> None:
    pre = tiny_model("llama3-rope-tied", seed=1)
    sft = copy.deepcopy(pre)
    sft.lm_head.weight = nn.Parameter(sft.lm_head.weight.detach() + 0.5, requires_grad=False)
    sft.config.tie_word_embeddings = False
    model = _load(pre=pre, sft=sft)
    assert _storages(model) == len(list(pre.parameters())) + 1
    tokens = torch.tensor([_tokens()])
    with torch.no_grad():
        _close(model(tokens, graft="sft @ all"), sft(tokens).logits)
        _close(model(tokens), pre(tokens).logits)


def test_the_stacked_weights_are_the_sources_own(tiny: MakeTiny) -> None:
    """`model.W_Q[source, layer, head]` and the like against the checkpoints' own matrices."""
    t = tiny("llama-biased")
    arch = t.model.arch
    for s, source in enumerate(t.sources.values()):
        assert torch.equal(t.model.W_E[s], source.model.embed_tokens.weight)
        assert torch.equal(t.model.W_U[s], source.lm_head.weight.T)
        for l, layer in enumerate(source.model.layers):
            attn, mlp = layer.self_attn, layer.mlp
            x = torch.randn(arch.d_model, generator=torch.Generator().manual_seed(l))
            heads = {"Q": (attn.q_proj, 4), "K": (attn.k_proj, 2), "V": (attn.v_proj, 2)}
            for name, (linear, n_heads) in heads.items():
                weight = getattr(t.model, f"W_{name}")[s, l]
                bias = getattr(t.model, f"b_{name}")[s, l]
                ours = torch.einsum("m,hmd->hd", x, weight) + bias
                _close(ours, linear(x).view(n_heads, arch.d_head), 1e-5)
            z = torch.randn(arch.n_heads, arch.d_head, generator=torch.Generator().manual_seed(l))
            ours = torch.einsum("hd,hdm->m", z, t.model.W_O[s, l]) + t.model.b_O[s, l]
            _close(ours, attn.o_proj(z.flatten()), 1e-5)
            _close(x @ t.model.W_in[s, l] + t.model.b_in[s, l], mlp.up_proj(x), 1e-5)
            assert torch.equal(t.model.W_gate[s, l], mlp.gate_proj.weight.T)
            assert torch.equal(t.model.W_out[s, l], mlp.down_proj.weight.T)
            assert torch.equal(t.model.b_out[s, l], mlp.down_proj.bias)


def test_masks_are_reusable_and_checked_against_the_batch(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_tokens(), _tokens(seed=1)])
    mask = t.model.resolve(MIXED, tokens)
    assert torch.equal(t.model(tokens, graft=mask), t.model(tokens, graft=MIXED))
    with t.model.grafted(mask):
        assert torch.equal(t.model(tokens), t.model(tokens, graft=MIXED))
    with pytest.raises(ValueError, match=r"resolved for a batch of shape \(2, 11\)"):
        t.model(tokens[:1], graft=mask)
    taken = mask.take(np.array([1]), np.array([2, 3])).source_index("mlp_out", 0)
    assert taken.tolist() == [[1, 0]]


def test_the_innermost_block_is_in_force_and_an_explicit_graft_goes_before_it(
    tiny: MakeTiny,
) -> None:
    t = tiny("olmo2")
    tokens = _tokens()
    batch = torch.tensor([tokens])
    with t.model.grafted("sft @ all"):
        _close(t.model(batch)[0], t.logits("sft", tokens))
        _close(t.model(batch, graft="none")[0], t.logits("pre", tokens))
        _close(t.model(batch, graft=Graft())[0], t.logits("pre", tokens))
        with t.model.grafted(None):
            _close(t.model(batch)[0], t.logits("pre", tokens))
        with t.model.grafted(Graft()):
            _close(t.model(batch)[0], t.logits("pre", tokens))
        _close(t.model(batch)[0], t.logits("sft", tokens))
    _close(t.model(batch)[0], t.logits("pre", tokens))
