"""The sweep's planner and tree forward: equal to one by one, and not a row too many."""

import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS, tiny_sources
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import MODEL_COMPONENTS, sequential_graft

from graftlens import planner as planner_module
from graftlens.components import HEAD_COMPONENTS, Component
from graftlens.evaluation import evaluate, position_grafts
from graftlens.graft import Graft
from graftlens.model import tree
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import collate
from graftlens.model.tree import TokenTree, TreeBatch, TreeShape
from graftlens.planner import Branches, Planner
from graftlens.prompts import Prompt, Tokenized
from graftlens.sweep.cells import asked_for, columns
from graftlens.sweep.measuring import Found, Measuring
from graftlens.sweep.prepared import Prepared
from graftlens.sweep.scoring import Scorer, dry_plan, score

SOURCES = ("pre", "sft", "task")
PLACES = ("last", "all", "bos", "~last", "~bos", "[2]", "[1, 3]", "[-2]", "~[4]", "bos + last")


@st.composite
def grafts_of(draw: st.DrawFn, arch: Architecture, n_rules: int = 3) -> Graft:
    """Any graft that `arch` can run: every component, group, layer, head and neuron, every place,
    at any strength.
    """
    graft = Graft()
    for _ in range(draw(st.integers(0, n_rules))):
        source, at = draw(st.sampled_from(SOURCES)), draw(st.sampled_from(PLACES))
        strength = draw(st.sampled_from([1, 1, 1, 0.5, 2, -1, 0]))
        layers = draw(
            st.one_of(
                st.just("all"),
                st.lists(st.integers(0, arch.n_layers - 1), min_size=1, max_size=2),
            )
        )
        cut = draw(st.sampled_from(["heads", "neurons", "none"]))
        if cut == "heads":
            components = draw(
                st.lists(
                    st.sampled_from([c for c in arch.components if c in HEAD_COMPONENTS]),
                    min_size=1,
                )
            )
            n_heads = min(arch.n_units_of(c) for c in components)
            heads = draw(st.one_of(st.none(), st.sets(st.integers(0, n_heads - 1), min_size=1)))
            heads = heads and sorted(heads)
            graft |= Graft.rule(source, at, components, layers, heads, strength=strength)
        elif cut == "neurons":
            components = draw(st.sampled_from([["mlp"], ["mlp_in"], ["mlp_out"]]))
            units = sorted(draw(st.sets(st.integers(0, arch.d_mlp - 1), min_size=1, max_size=4)))
            graft |= Graft.rule(source, at, components, layers, units=units, strength=strength)
        else:
            inside = [str(c) for c in arch.components if c not in MODEL_COMPONENTS]
            outside = [str(c) for c in arch.components if c in MODEL_COMPONENTS]
            known = [*inside, "attn", "mlp", "all", *(outside if layers == "all" else ())]
            components = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
            graft |= Graft.rule(source, at, components, layers, strength=strength)
    return graft


def tree_logits(
    model: GraftedTransformer,
    planner: Planner,
    prompts: Sequence[tuple[Tokenized, Branches]],
    peak: int | None = None,
) -> list[dict[tuple[int, int], torch.Tensor]]:
    """Per prompt, (graft, node) -> its logits, all prompts in as few passes as `peak` allows."""
    found: list[dict[tuple[int, int], torch.Tensor]] = [{} for _ in prompts]
    jobs = []
    for index, (prompt, branches) in enumerate(prompts):
        structure, reasons = planner.structure(prompt, branches)
        assert not reasons
        jobs += [(index, piece, branches) for piece in planner.pieces(structure, peak)]
    passes = [jobs] if peak is None else [[job] for job in jobs]
    for batch in passes:
        shape = TreeShape(
            [(piece.tree, 1) for _, piece, _ in batch], planner.sides, torch.device("cpu")
        )
        tree = TreeBatch.of(shape, [np.array([branches.tokens]) for _, _, branches in batch])
        logits = torch.cat(model.tree_logits(tree, lambda logits, rows: logits.clone(), rows=7))
        start = 0
        for index, piece, _ in batch:
            for node, rows in zip(piece.tree.scored, piece.tree.outputs, strict=True):
                for graft, row in zip(piece.grafts.tolist(), rows.tolist(), strict=True):
                    found[index][graft, node] = logits[start + row]
            start += len(piece.tree.final_rows)
    return found


def rows_by_brute_force(
    model: GraftedTransformer, grafts: Sequence[Graft], prompt: Tokenized, branches: Branches
) -> list[int]:
    """How many different residual rows come out of each layer, counted one by one.

    What a row is made of is written out whole: its input, its own components' sources, and the keys
    and values that it reads. Which source is used comes from masks, which the planner never sees.
    """
    arch = model.arch
    here = arch.components
    keys = [c for c in (Component.LN1, Component.K, Component.K_NORM, Component.V) if c in here]
    inputs = [c for c in (Component.EMBED, Component.POS_EMBED) if c in here]
    others = [c for c in here if c not in (*MODEL_COMPONENTS, *keys) or c is Component.LN1]
    numbers: dict[object, int] = {}
    seen: list[set[int]] = [set() for _ in range(arch.n_layers + 1)]

    def number(thing: object) -> int:
        return numbers.setdefault(thing, len(numbers))

    before: dict[int, list[int]] = {}
    for node, parent in enumerate(branches.parents):
        before[node] = [*before.get(parent, []), node]

    for graft in grafts:
        mask = model.resolve(graft, collate([prompt], continuations=[(0,)]))

        @cache
        def shares(component: Component, layer: int | None, mask=mask) -> np.ndarray:  # type: ignore[no-untyped-def]
            """[source, unit, column]"""
            found = np.empty((len(SOURCES), arch.n_units_of(component), mask.shape[1]))
            for units, selection in mask[component, layer].selections():
                for source in range(len(SOURCES)):
                    found[source, slice(None) if units is None else list(units)] = selection.share(
                        source
                    )
            return found

        def sources(component: Component, layer: int | None, node: int, shares=shares) -> bytes:  # type: ignore[no-untyped-def]
            return shares(component, layer)[:, :, branches.columns[node]].tobytes()

        @cache
        def entering(layer: int, node: int, sources=sources) -> int:  # type: ignore[no-untyped-def]
            if layer == 0:
                value: object = ("in", node, *(sources(c, None, node) for c in inputs))
            else:
                own = [sources(c, layer - 1, node) for c in others]
                reach = arch.windows[layer - 1]
                near = before[node] if reach is None else before[node][-reach:]
                read = [key(layer - 1, other) for other in near]
                value = ("row", layer, node, entering(layer - 1, node), *own, *read)
            seen[layer].add(number(value))
            return number(value)

        @cache
        def key(layer: int, node: int, sources=sources, entering=entering) -> int:  # type: ignore[no-untyped-def]
            own = [sources(c, layer, node) for c in keys]
            return number(("key", layer, node, entering(layer, node), *own))

        for path in branches.paths:
            for node in path:
                entering(arch.n_layers, node)
    return [len(rows) for rows in seen[1:]]


ids = st.lists(st.integers(0, 96), min_size=6, max_size=11)

#: No shrinking: an example takes a second, and a failing one is read as it is.
LAW = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(LAW, max_examples=5)
@given(data=st.data())
def test_a_tree_is_the_grafts_one_by_one_and_no_row_too_many(
    tiny: MakeTiny, variant: str, data: st.DataObject
) -> None:
    """Two prompts in one pass, answers and distractors as branches, any grafts."""
    model = _model(tiny, variant)
    grafts = data.draw(st.lists(grafts_of(model.arch), min_size=2, max_size=7))
    prompts = []
    for _ in range(2):
        prompt = Tokenized.bare(data.draw(ids))
        tails = data.draw(
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3)
        )
        prompts.append((prompt, tails, Branches.of(prompt.ids, tails, model.arch.rope_limit)))
    planner = Planner(model.arch, model.sources, grafts, model.equal_sources)
    peak = data.draw(st.sampled_from([None, 25]))
    found = tree_logits(model, planner, [(p, b) for p, _, b in prompts], peak)
    for (prompt, tails, branches), logits in zip(prompts, found, strict=True):
        batch = collate([prompt] * len(tails), continuations=[tail[:-1] for tail in tails])
        columns = [range(len(prompt) - 1, len(prompt) - 1 + len(tail)) for tail in tails]
        for index, graft in enumerate(grafts):
            each = model.logits_at(batch, columns, graft)
            for alone, path in zip(each, branches.paths, strict=True):
                ours = torch.stack([logits[index, node] for node in path])
                assert float((ours - alone).abs().max() / alone.abs().max()) < 1e-4
        structure, _ = planner.structure(prompt, branches)
        (piece,) = planner.pieces(structure)
        expected = rows_by_brute_force(model, grafts, prompt, branches)
        assert [len(layer.queries) for layer in piece.tree.layers] == expected


_MODELS: dict[str, GraftedTransformer] = {}


def _model(tiny: MakeTiny, variant: str) -> GraftedTransformer:
    if variant not in _MODELS:
        _MODELS[variant] = tiny(variant, SOURCES).model
    return _MODELS[variant]


@pytest.mark.parametrize("variant", ["gpt2", "neox-parallel", "llama-biased", "gemma3"])
@settings(LAW, max_examples=8)
@given(data=st.data())
def test_sources_that_share_tensors(tiny: MakeTiny, variant: str, data: st.DataObject) -> None:
    """Rows are shared where finetuning changed nothing, and not a number with them."""
    key = f"{variant} shared"
    if key not in _MODELS:
        models = tiny_sources(variant, SOURCES, 1)
        pre, sft, task = models.values()
        for index, name in enumerate(task.state_dict()):
            if index % 3:
                task.state_dict()[name].copy_((pre, sft)[index % 2].state_dict()[name])
            if index % 4 == 0:
                sft.state_dict()[name].copy_(pre.state_dict()[name])
        _MODELS[key] = GraftedTransformer.from_pretrained(models, check=False, verbose=False)
    model = _MODELS[key]
    grafts = data.draw(st.lists(grafts_of(model.arch), min_size=3, max_size=8))
    prompt = Tokenized.bare(data.draw(ids))
    branches = Branches.of(prompt.ids, [(0,)])
    planner = Planner(model.arch, model.sources, grafts, model.equal_sources)
    (logits,) = tree_logits(model, planner, [(prompt, branches)])
    for index, graft in enumerate(grafts):
        alone = model(torch.tensor([prompt.ids]), graft=graft)[0, -1]
        ours = logits[index, len(prompt) - 1]
        assert float((ours - alone).abs().max() / alone.abs().max()) < 1e-4


@pytest.mark.parametrize(
    "variant", ["gpt2", "neox-parallel", "gemma2", "qwen3", "phi3-longrope", "mistral-window"]
)
def test_a_tree_is_the_sequential_algorithm(tiny: MakeTiny, variant: str) -> None:
    """Against the paper's own loop, which knows nothing of masks, batches or trees."""
    pair = tiny(variant, SOURCES)
    rows = {
        "none": lambda c, l, p, h: "pre",
        "sft @ [1, 2] | task @ last": lambda c, l, p, h: (
            "sft" if p in (1, 2) else "task" if p >= 6 else "pre"
        ),
        "sft @ ~bos : k + o : 1": lambda c, l, p, h: (
            "sft" if p >= 1 and c in "ko" and l == 1 else "pre"
        ),
        "task @ all : mlp_in": lambda c, l, p, h: "task" if c == "mlp_in" else "pre",
        "sft @ last : v : all : 1": lambda c, l, p, h: (
            "sft" if p >= 6 and c == "v" and h == 1 else "pre"
        ),
    }
    prompt, tails = Tokenized.bare([5, 9, 2, 44, 7, 31, 8]), [[3, 4, 6], [3, 9]]
    branches = Branches.of(prompt.ids, tails, pair.model.arch.rope_limit)
    planner = Planner(pair.model.arch, pair.model.sources, [Graft.parse(text) for text in rows])
    (logits,) = tree_logits(pair.model, planner, [(prompt, branches)])
    for index, choose in enumerate(rows.values()):
        for tail, path in zip(tails, branches.paths, strict=True):
            whole = sequential_graft(pair.sources, [*prompt.ids, *tail[:-1]], choose)
            ours = torch.stack([logits[index, node] for node in path])
            theirs = whole[len(prompt) - 1 :]
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_rows_that_split_keep_their_own_choices(tiny: MakeTiny) -> None:
    """Regression: query rows and key rows of one residual row were taken for the same rows where
    there were as many of each, though they stood in another order.
    """
    model = _model(tiny, "llama")
    grafts = [
        Graft(),
        Graft.parse("sft @ ~last | task @ ~[4] : all : 0"),
        Graft.parse("sft @ last : all : 0"),
    ]
    prompt = Tokenized.bare([67, 17, 57, 67, 12, 15, 26])
    branches = Branches.of(prompt.ids, [(0,)])
    planner = Planner(model.arch, model.sources, grafts)
    (logits,) = tree_logits(model, planner, [(prompt, branches)])
    for index, graft in enumerate(grafts):
        alone = model(torch.tensor([prompt.ids]), graft=graft)[0, -1]
        torch.testing.assert_close(logits[index, 6], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["gpt2", "neox-parallel", "llama-biased"])
def test_heads_of_equal_sources_keep_o_s_bias(tiny: MakeTiny, variant: str) -> None:
    """Regression: where two sources share o's tensors, heads of the one and of the other counted as
    agreeing, and the row took their bias instead of the base's.
    """
    three = tiny_sources(variant, ("pre", "a"), 1)
    three["b"] = three["a"]
    model = GraftedTransformer.from_pretrained(three, check=False, verbose=False)
    half = model.arch.n_heads // 2
    first, second = list(range(half)), list(range(half, model.arch.n_heads))
    both = Graft.rule("a", "all", "o", "all", first) | Graft.rule("b", "all", "o", "all", second)
    grafts = [Graft(), both, Graft.rule("a", "all", "o")]
    prompt = Tokenized.bare([67, 17, 57, 67, 12])
    branches = Branches.of(prompt.ids, [(0,)])
    planner = Planner(model.arch, model.sources, grafts, model.equal_sources)
    (logits,) = tree_logits(model, planner, [(prompt, branches)])
    for index, graft in enumerate(grafts):
        alone = model(torch.tensor([prompt.ids]), graft=graft)[0, -1]
        torch.testing.assert_close(logits[index, 4], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[1, 4], logits[2, 4]), "the biases differ"


@pytest.mark.parametrize("variant", ["gemma3", "mistral-window", "qwen2-window", "llama"])
def test_long_prompts_and_short_lists(
    tiny: MakeTiny, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows much shorter than the prompt, and attention in many pieces."""
    monkeypatch.setattr(tree, "GATHERED", 60)
    model = _model(tiny, variant)
    grafts = [Graft.rule("sft", [i], c, [l]) for i in (1, 17, 20) for c in "kvo" for l in (0, 1)]
    prompt = Tokenized.bare([(7 * i) % 97 for i in range(23)])
    branches = Branches.of(prompt.ids, [(0, 4), (0, 5)])
    planner = Planner(model.arch, model.sources, grafts, model.equal_sources)
    (logits,) = tree_logits(model, planner, [(prompt, branches)])
    structure, _ = planner.structure(prompt, branches)
    (piece,) = planner.pieces(structure)
    expected = rows_by_brute_force(model, grafts, prompt, branches)
    assert [len(layer.queries) for layer in piece.tree.layers] == expected
    for index, graft in enumerate(grafts):
        (alone,) = model.logits_at(collate([prompt], continuations=[[0]]), [[22, 23]], graft)
        ours = torch.stack([logits[index, node] for node in branches.paths[0]])
        assert float((ours - alone).abs().max() / alone.abs().max()) < 1e-4


# -- how many rows ---------------------------------------------------------------------------------


def _tree(arch: Architecture, grafts: Sequence[Graft], n_tokens: int = 14) -> TokenTree:
    """The plan of single-token answers; the first entity stands at positions 1 to 4."""
    prompt = Tokenized(
        tuple(range(n_tokens)),
        {
            "first_entity": ((1, 2, 3, 4),),
            "bos": ((0,),),
            "last": ((n_tokens - 1,),),
            "all": (tuple(range(n_tokens)),),
        },
    )
    branches = Branches.of(prompt.ids, [(50,)])
    planner = Planner(arch, ("pre", "sft"), grafts)
    structure, _ = planner.structure(prompt, branches)
    (piece,) = planner.pieces(structure)
    return piece.tree


def _deep(n_layers: int) -> Architecture:
    return Architecture(
        family="llama", n_layers=n_layers, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=8,
        d_vocab=97, n_ctx=64, act_fn="silu", eps=1e-5, attn_scales=(0.5,) * n_layers,
        windows=(None,) * n_layers, rotary_dim=4, rope_kinds=(None,) * n_layers,
    )  # fmt: skip


def test_rows_of_a_last_token_sweep() -> None:
    """The base's prefix once, then one row a graft and layer, from the layer where it differs."""
    arch = _deep(16)
    parts = ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out")
    grafts = [Graft.rule("sft", "last", c, [l]) for l in range(16) for c in parts]
    tree = _tree(arch, grafts)
    # Up to layer l, the grafts of layers 0 to l have gone their own way; the last layer needs the
    # scored rows alone.
    last = [7 * (l + 1) + (1 if l < 15 else 0) for l in range(16)]
    assert [len(layer.queries) for layer in tree.layers] == [
        13 * (l < 15) + n for l, n in enumerate(last)
    ]
    # In the layer of a graft of q, o or the MLP, keys and values are still the base's.
    assert len(tree.layers[0].keys) == 13 + 3, "base, k and v"
    assert len(tree.final_rows) == len(grafts)


def test_a_graft_that_differs_nowhere_costs_nothing() -> None:
    """Equal grafts, other words for the same, and rules that a later one covers share every row."""
    arch = _deep(4)
    one = _tree(arch, [Graft.rule("sft", "last", "attn")])
    same = [
        "sft @ last : attn",
        "sft @ last : q + k + v + o",
        "sft @ [-1] : attn",
        "sft @ last : attn : 0-3",
        "pre @ last : q | sft @ last : attn",
    ]
    tree = _tree(arch, [Graft.parse(text) for text in same])
    assert [len(l.queries) for l in tree.layers] == [len(l.queries) for l in one.layers]
    assert tree.outputs.tolist() == [[0] * len(same)]


def test_equal_tensors_share_rows(tiny: MakeTiny) -> None:
    """A component that finetuning did not change makes no rows."""
    pair = tiny("llama", tokenizer="llama3")
    changed = {n: p.clone() for n, p in pair.sources["sft"].state_dict().items()}
    frozen = {
        n: (pair.sources["pre"].state_dict()[n] if "mlp" in n else p) for n, p in changed.items()
    }
    import copy

    sft = copy.deepcopy(pair.sources["sft"])
    sft.load_state_dict(frozen)
    model = GraftedTransformer.from_pretrained(
        {"pre": pair.sources["pre"], "sft": sft},
        tokenizer=pair.tokenizer,
        check=False,
        verbose=False,
    )
    prompt = {0: Prompt("Ann plays with", answer=" Mara")}
    mlp = Scorer(model, {"PRE": Graft(), "mlp": Graft.parse("sft @ all : mlp")}).plan(prompt)
    alone = Scorer(model, {"PRE": Graft()}).plan(prompt)
    assert mlp.rows == alone.rows
    both = Scorer(model, {"PRE": Graft(), "attn": Graft.parse("sft @ all : attn")}).plan(prompt)
    assert both.rows > alone.rows


def test_prompts_of_equal_structure_share_one_plan() -> None:
    planner = Planner(_deep(3), ("pre", "sft"), [Graft(), Graft.parse("sft @ last")])
    structures = set()
    for tokens in ([3, 4, 5], [9, 9, 9]):
        prompt = Tokenized.bare(tokens)
        structures.add(planner.structure(prompt, Branches.of(prompt.ids, [(1, 2), (3,)]))[0])
    assert len(structures) == 1
    (structure,) = structures
    assert planner.pieces(structure) is planner.pieces(structure)
    longer = Tokenized.bare([1, 2, 3, 4])
    assert planner.structure(longer, Branches.of(longer.ids, [(1, 2), (3,)]))[0] != structure


def test_the_ratios_of_the_design() -> None:
    """DESIGN's numbers count the base's prefix in every layer; the last layer's is not needed."""
    arch = _deep(16)
    parts = ("q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out")
    names = [*parts, "attn", "mlp", "q + k", "k + v", "q + o", "v + o", "o + mlp", "ln"]
    windows = [list(range(a, b + 1)) for a in range(16) for b in range(a, 16)]
    sweeps = {
        7.5: [Graft.rule("sft", "last", c) for c in names],
        21: [Graft.rule("sft", "last", c, [l]) for l in range(16) for c in parts],
        7.3: [
            Graft.rule("sft", at, "all", w)
            for w in windows
            for at in ("first_entity", "last", "first_entity + last")
        ],
    }
    for ratio, grafts in sweeps.items():
        tree = _tree(arch, grafts)
        saved = 13 if ratio != 7.3 else 0
        rows = (tree.layer_rows + saved) / 16
        assert len(grafts) * 14 / rows >= 0.97 * ratio, (ratio, len(grafts) * 14 / rows)


# -- scoring ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", SOURCES, tokenizer="llama3")


def _prompts() -> dict[int, Prompt]:
    people = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.", "Bo")
    return {
        10 + i: Prompt(
            f"{{first_entity}} plays {verb} with",
            {"first_entity": person},
            " Mara Finn",
            (" Jo Low", " Mara Lee", " Q"),
        )
        for i, (person, verb) in enumerate(
            (p, v) for p in people for v in ("chess", "a very long game of Go")
        )
    }


def test_the_whole_table_is_the_grafts_one_by_one(llama: Tiny) -> None:
    prompts, grafts = _prompts(), position_grafts() | {"o": Graft.parse("task @ last : o : 1")}
    table = score(llama.model, prompts, grafts, distractors="whole", top_k=3)
    assert table["prompt"].tolist() == [n for n in prompts for _ in grafts]
    tokenizer = llama.tokenizer
    assert tokenizer is not None
    for (number, name), rows in table.groupby(["prompt", "graft"], sort=False):
        prompt, row = prompts[number], rows.iloc[0]
        ids = tokenizer(prompt.text)["input_ids"]
        found = []
        for text in (prompt.answer, *prompt.distractors):
            whole = tokenizer(prompt.text + str(text))["input_ids"]
            (tokens,) = llama.model.tokenized(prompt)
            tail = whole[len(ids) :]
            batch = collate([tokens], continuations=[tail[:-1]])
            (logits,) = llama.model.logits_at(
                batch, [range(len(ids) - 1, len(whole) - 1)], grafts[name]
            )
            logprobs = logits.log_softmax(-1)
            found.append(sum(float(logprobs[i, t]) for i, t in enumerate(tail)))
        assert row["answer_logprob"] == pytest.approx(found[0], abs=1e-3)
        assert row["distractor_logprobs"] == pytest.approx(found[1:], abs=1e-3)


@pytest.mark.parametrize("budget", [1, 17, 60, 300])
def test_no_budget_changes_a_number(llama: Tiny, budget: int) -> None:
    prompts, grafts = _prompts(), position_grafts()
    done: list[int] = []
    small = Scorer(llama.model, grafts, row_budget=budget).table(prompts, done.append)
    pd.testing.assert_frame_equal(small, score(llama.model, prompts, grafts), rtol=1e-4)
    assert sum(done) == len(prompts) * len(grafts)


def test_first_tokens_only(llama: Tiny) -> None:
    grafts = {"PRE": Graft(), "LT": Graft.parse("sft @ last")}
    first = score(llama.model, _prompts(), grafts, answers="first")
    whole = score(llama.model, _prompts(), grafts)
    assert first["answer_logprob"].isna().all()
    rest = [c for c in whole.columns if c != "answer_logprob"]
    pd.testing.assert_frame_equal(first[rest], whole[rest], rtol=1e-4)


def test_memory_that_runs_out_halves_the_budget(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, grafts = _prompts(), position_grafts()
    expected = score(llama.model, prompts, grafts)
    real = GraftedTransformer.tree_logits
    sizes: list[int] = []

    def limited(self: GraftedTransformer, tree: TreeBatch, *args: object) -> object:
        sizes.append(tree.shape.positions.shape[1])
        if max(len(l.query_places) for l in tree.shape.layers) > 120:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, tree, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GraftedTransformer, "tree_logits", limited)
    said: list[str] = []
    scorer = Scorer(llama.model, grafts, row_budget=1000, say=said.append)
    pd.testing.assert_frame_equal(scorer.table(prompts), expected, rtol=1e-4)
    lines = [
        re.fullmatch(r"Memory ran out: continuing with at most (\d+) token .*", l) for l in said
    ]
    budgets = [int(line[1]) for line in lines if line]
    assert 0 < len(budgets) == len(said) <= 4
    assert budgets == sorted(set(budgets), reverse=True)
    assert budgets[-1] == scorer.rows > 30, "no smaller than it must be"
    # Other errors are not hidden.
    monkeypatch.setattr(
        GraftedTransformer, "tree_logits", lambda *a: (_ for _ in ()).throw(RuntimeError("shape"))
    )
    with pytest.raises(RuntimeError, match="shape"):
        scorer.table(prompts)


def test_memory_that_never_suffices_is_an_error(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise MemoryError("not enough")

    monkeypatch.setattr(GraftedTransformer, "tree_logits", never)
    with pytest.raises(MemoryError, match="not enough"):
        Scorer(llama.model, position_grafts(), row_budget=200, say=lambda line: None).table(
            _prompts()
        )


def test_what_cannot_run_has_its_reason_and_the_rest_its_numbers(llama: Tiny) -> None:
    prompts = {
        0: Prompt("{film} with", {"film": "It"}, " Al"),
        1: Prompt("{first_entity} with", {"first_entity": "Ann"}, " Al"),
        2: Prompt("{first_entity} with", {"first_entity": "Ann"}),
    }
    grafts = {
        "F": Graft.parse("sft @ film"),
        "LT": Graft.parse("sft @ last"),
        "A": Graft.parse("sft @ ~all"),
    }
    table = score(llama.model, prompts, grafts).set_index(["prompt", "graft"])
    assert "no span 'film'" in table.loc[(1, "F"), "reason"]
    assert "selects none" in table.loc[(1, "A"), "reason"]
    assert table.loc[2, "reason"].eq("the prompt has no answer to score.").all()
    ran = table[table["reason"].isna()]
    assert sorted(ran.index) == [(0, "F"), (0, "LT"), (1, "LT")]
    alone = score(llama.model, {1: prompts[1]}, {"LT": grafts["LT"]})
    assert ran.loc[(1, "LT"), "logprob"] == pytest.approx(alone["logprob"].iloc[0], rel=1e-5)
    with pytest.raises(ValueError, match="'A' can be run on none of 2 prompts"):
        evaluate(llama.model, list(prompts.values()), grafts, progress=False)


def test_logits_that_are_not_finite_are_no_result(tiny: MakeTiny) -> None:
    """Regression: no logit is above NaN, so such a cell had rank 1."""
    pair = tiny("llama", tokenizer="llama3")
    for block in pair.model.blocks:
        with torch.no_grad():
            block.mlp.mlp_out.weight.variants[1].mul_(1e38)
    grafts = {"PRE": Graft(), "SFT": Graft.parse("sft @ all")}
    table = score(pair.model, _prompts(), grafts).set_index("graft")
    assert table.loc["PRE", "reason"].isna().all()
    assert table.loc["SFT", "reason"].str.contains("logits are not finite in torch.float32").all()
    numbers = ["rank", "prob", "logprob", "answer_logprob", "logit_diff", "top_tokens"]
    assert table.loc["SFT", numbers].isna().all().all()


def test_a_whole_answer_that_is_not_finite_is_no_result(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token may be well and a later one not: then no number of the cell stands."""

    real = Measuring.__call__

    def broken(self: Measuring, *args: Any) -> list[Found]:
        found = real(self, *args)
        for one in found:
            for steps in one.steps.values():
                steps[1:] = np.nan
        return found

    monkeypatch.setattr(Measuring, "__call__", broken)
    prompt = {0: next(iter(_prompts().values()))}
    (row,) = score(llama.model, prompt, {"PRE": Graft()}, distractors="whole").to_dict("records")
    assert "not finite" in row["reason"]
    assert all(row[c] is None or pd.isna(row[c]) for c in columns()[8:16])


def test_only_distractors_that_are_run_count(tiny: MakeTiny) -> None:
    """Regression: a long distractor whose first token alone is scored made a prompt too long."""
    pair = tiny("gpt2", tokenizer="gpt2")
    prompt = {0: Prompt("Ann plays", answer=" chess", distractors=(" Bo" * 40, " Q"))}
    grafts = {"PRE": Graft(), "LT": Graft.parse("sft @ last")}
    table = score(pair.model, prompt, grafts)
    assert table["reason"].isna().all()
    assert table["logit_diff"].notna().all()
    whole = score(pair.model, prompt, grafts, distractors="whole")
    assert whole["reason"].str.contains("more than the model's context of 64").all()


def test_options_that_are_none_are_refused(llama: Tiny) -> None:
    grafts = {"PRE": Graft()}
    for wrong, message in (
        ({"row_budget": 0}, "row_budget=0: write a number from 1"),
        ({"top_k": 0}, "top_k=0: write a number from 1 to the vocabulary's"),
        ({"top_k": 10**6}, "top_k=1000000"),
    ):
        with pytest.raises(ValueError, match=message):
            Scorer(llama.model, grafts, **wrong)
    with pytest.raises(ValueError, match="no grafts"):
        Scorer(llama.model, {})


def test_plans_that_are_kept_are_bounded(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "KEPT_BYTES", 1)
    scorer = Scorer(llama.model, position_grafts())
    scorer.table(_prompts())
    assert len(scorer.planner._trees) == 1


def test_hooks_are_refused(llama: Tiny) -> None:
    with (
        llama.model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x)]),
        pytest.raises(
            ValueError, match=r"hooks are attached at blocks.0.hook_resid_post.*reset_hooks"
        ),
    ):
        score(llama.model, _prompts(), {"LT": Graft.parse("sft @ last")})
    score(llama.model, _prompts(), {"LT": Graft.parse("sft @ last")})


def test_a_graft_in_force_changes_nothing_here(llama: Tiny) -> None:
    grafts = {"PRE": Graft(), "LT": Graft.parse("sft @ last")}
    expected = score(llama.model, _prompts(), grafts)
    with llama.model.grafted("sft @ all"):
        pd.testing.assert_frame_equal(score(llama.model, _prompts(), grafts), expected)


def test_the_plan_in_words(llama: Tiny) -> None:
    prompts = _prompts()
    scorer = Scorer(llama.model, position_grafts(), answers="first", row_budget=4096)
    found = scorer.plan(prompts)
    lengths = [len(llama.model.tokenized(p)[0]) for p in prompts.values()]
    assert found.rows_alone == 8 * sum(lengths)
    assert found.cells == 8 * len(prompts)
    text = found.summary()
    for line in (
        f"rows if run one by one: {found.rows_alone:,.0f}",
        f"ratio:                  {found.ratio:.1f}",
    ):
        assert line in text
    assert "MiB besides the weights" in text
    dry = dry_plan(
        llama.model.arch,
        SOURCES,
        Prepared(llama.tokenizer, llama.model.arch, answers="first"),
        prompts,
        list(position_grafts().values()),
    )
    assert (dry.rows, dry.rows_alone) == (found.rows, found.rows_alone)
    # Grafts in blocks, each with rows of the reference that it lacks.
    grafts, references = position_grafts(), {"base": Graft(), "full": Graft.rule("sft")}
    names, bounds = list(grafts), [(0, 3), (3, 8)]
    each = [
        Scorer(
            llama.model,
            {name: grafts[name] for name in names[low:high]},
            measures=["kl_full"],
            references=references,
            answers="first",
            row_budget=50,
        ).plan(prompts)
        for low, high in bounds
    ]
    dry = dry_plan(
        llama.model.arch,
        SOURCES,
        Prepared(llama.tokenizer, llama.model.arch, answers="first"),
        prompts,
        list(grafts.values()),
        measured=asked_for(["kl_full"]),
        references=references,
        blocks=bounds,
        row_budget=50,
    )
    for name in ("cells", "rows", "rows_alone", "rows_cut", "logits"):
        assert getattr(dry, name) == pytest.approx(sum(getattr(one, name) for one in each)), name
    assert dry.peak == max(one.peak for one in each)
    cut = Scorer(llama.model, position_grafts(), answers="first", row_budget=20).plan(prompts)
    assert cut.rows_cut > 0
    assert cut.rows == pytest.approx(found.rows + cut.rows_cut)
    assert "again, where trees are cut" in cut.summary()


def test_half_precision(tiny: MakeTiny) -> None:
    pair = tiny("llama", SOURCES, tokenizer="llama3")
    expected = score(pair.model, _prompts(), position_grafts())
    half = pair.model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = score(half, _prompts(), position_grafts())
    assert np.abs(table["logprob"] - expected["logprob"]).max() < 0.3
