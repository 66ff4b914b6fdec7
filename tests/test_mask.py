"""A resolved mask says, place by place, what its graft means there, or why it cannot."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from positions import evaluate
from reference import MODEL_COMPONENTS

from graftlens.components import (
    GROUPS,
    HEAD_COMPONENTS,
    LAYER_GROUPS,
    Component,
)
from graftlens.graft import Graft
from graftlens.model.arch import Architecture, architecture
from graftlens.model.choice import Selection, UnitSelection
from graftlens.model.inputs import Batch, Padding, collate, from_tokens
from graftlens.model.mask import GraftMask, resolve
from graftlens.prompts import PromptError, Tokenized

ARCHS = {name: architecture(make()) for name, make in VARIANTS.items()}
SOURCES = ("pre", "sft", "task")
CPU = torch.device("cpu")


def prompt(length: int, first: Sequence[int] = (1, 2), second: Sequence[int] = ()) -> Tokenized:
    """Bare tokens with a span `name` that occurs once or twice."""
    spans = tuple(tuple(run) for run in (first, second) if run)
    bare = Tokenized.bare(list(range(10, 10 + length)))
    return Tokenized(bare.ids, {"name": spans, **bare.spans})


def expand(names: Sequence[str], arch: Architecture) -> set[str]:
    return {str(c) for name in names for c in GROUPS.get(name, [name])} & set(
        map(str, arch.components)
    )


def expected(
    graft: Graft, batch: Batch, arch: Architecture, component: str, layer: int | None, head: int
) -> list[list[int]]:
    """Source numbers [batch, pos] at one site, worked out place by place from the rules' texts."""
    rows = []
    for i, item in enumerate(batch.prompts):
        total, length = batch.totals[i], len(item)
        spans = {
            **item.spans,
            "last": [list(range(length - 1, total))],
            "all": [list(range(total))],
        }
        row = [0] * batch.real.shape[1]
        for rule in graft:
            layers: set[int] = set()
            for piece in rule.layers:
                if isinstance(piece, int):
                    layers.add(piece)
                else:
                    part, parts = LAYER_GROUPS[piece]
                    low, high = (k * arch.n_layers // parts for k in (part, part + 1))
                    layers |= set(range(low, high))
            there = component in expand(rule.components, arch)
            there &= rule.layers == ("all",) if layer is None else layer in layers
            there &= rule.heads is None or head in rule.heads
            if not there:
                continue
            # Numbers count in the prompt itself, the complement in all that there is.
            text = re.sub(r"-(\d+)", lambda m, n=length: str(n - int(m[1])), str(rule.at))
            for position in evaluate(text, spans, total):
                row[batch.starts[i] + position] = SOURCES.index(rule.source)
        rows.append(row)
    return rows


def sites(arch: Architecture) -> list[tuple[str, int | None]]:
    return [
        (str(c), layer)
        for c in arch.components
        for layer in ([None] if c in MODEL_COMPONENTS else range(arch.n_layers))
    ]


def assert_is(mask: GraftMask, graft: Graft, batch: Batch, arch: Architecture) -> None:
    """Compare at every real place; padding may hold anything."""
    assert {(str(c), layer) for c, layer in mask.sites} == set(sites(arch))
    for component, layer in sites(arch):
        heads = arch.n_units_of(Component(component)) if component in HEAD_COMPONENTS else 1
        for head in range(heads):
            found = mask.source_index(component, layer, head)
            wanted = np.array(expected(graft, batch, arch, component, layer, head))
            np.testing.assert_array_equal(
                found[batch.real], wanted[batch.real], err_msg=f"{component} {layer} {head}"
            )


# -- against the evaluator ---------------------------------------------------------------------

_AT = st.sampled_from(
    [
        "name", "last", "bos", "all", "~name", "name + last", "~(name + last)", "[0, -1]", "[-2]",
        "name#1", "~last", "~bos & ~last", "name & ~[1]", "~(~name & ~last)", "[1] + bos",
    ]
)  # fmt: skip


@st.composite
def one_rule(draw: st.DrawFn, arch: Architecture) -> Graft:
    heads = draw(st.none() | st.lists(st.integers(0, arch.n_kv_heads - 1), min_size=1, max_size=3))
    numbers = st.lists(st.integers(0, arch.n_layers - 1), min_size=1, max_size=2)
    layers = draw(st.one_of(st.just("all"), st.just("upper_half"), numbers))
    if heads is not None:
        words = [*"qkvo"]
    else:
        words = [*map(str, arch.components), "attn", "mlp", "block", "all"]
        if layers != "all":
            words = [w for w in words if w not in map(str, MODEL_COMPONENTS)]
    components = draw(st.lists(st.sampled_from(words), min_size=1, max_size=2))
    return Graft.rule(draw(st.sampled_from(SOURCES)), draw(_AT), components, layers, heads)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, Graft, Batch]:
    arch = ARCHS[draw(st.sampled_from(["gpt2", "llama", "gemma2", "olmo", "olmo2", "qwen3"]))]
    graft = Graft()
    for _ in range(draw(st.integers(0, 4))):
        graft |= draw(one_rule(arch))
    prompts = []
    for _ in range(draw(st.integers(1, 4))):
        second = draw(st.sampled_from([(), (4,), (3, 4)]))
        prompts.append(prompt(draw(st.integers(5, 9)), second=second))
    tails = None
    if draw(st.booleans()):
        tails = [list(range(draw(st.integers(0, 3)))) for _ in prompts]
    side: Padding = draw(st.sampled_from(["left", "right"]))
    return arch, graft, collate(prompts, side=side, continuations=tails)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_masks_mean_what_grafts_say(case: tuple[Architecture, Graft, Batch]) -> None:
    """Every component, layer, head, prompt and position; padded; with answers that follow."""
    arch, graft, batch = case
    assert_is(resolve(graft, batch, arch, SOURCES), graft, batch, arch)


@settings(deadline=None, max_examples=40)
@given(cases(), st.data())
def test_taking_rows_and_columns(
    case: tuple[Architecture, Graft, Batch], data: st.DataObject
) -> None:
    arch, graft, batch = case
    mask = resolve(graft, batch, arch, SOURCES)
    count, width = mask.shape
    rows = data.draw(st.none() | st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
    columns = data.draw(st.none() | st.lists(st.integers(0, width - 1), min_size=1, max_size=4))
    part = mask.take(
        None if rows is None else np.array(rows), None if columns is None else np.array(columns)
    )
    keep_rows = list(range(count)) if rows is None else rows
    keep_columns = list(range(width)) if columns is None else columns
    assert part.shape == (len(keep_rows), len(keep_columns))
    assert part.graft == graft
    assert part.sites.keys() == mask.sites.keys()
    for component, layer in sites(arch):
        heads = arch.n_units_of(Component(component)) if component in HEAD_COMPONENTS else 1
        for head in range(heads):
            np.testing.assert_array_equal(
                part.source_index(component, layer, head),
                mask.source_index(component, layer, head)[np.ix_(keep_rows, keep_columns)],
            )


def selection_sources(
    selection: Selection, equal: tuple[int, ...] | None = None
) -> Int[np.ndarray, " rows"]:
    """The one source of each row."""
    shares = np.stack([selection.share(s, equal) for s in range(len(SOURCES))])
    assert ((shares == 1).sum(axis=0) == 1).all()
    return shares.argmax(axis=0)


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([(0, 1, 2), (0, 1, 1), (0, 0, 2), (0, 0, 0), (0, 1, 0)]))
def test_every_row_is_computed_once(
    case: tuple[Architecture, Graft, Batch], equal: tuple[int, ...]
) -> None:
    """Rows of sources with equal tensors are computed together; all of these are all rows."""
    arch, graft, batch = case
    mask = resolve(graft, batch, arch, SOURCES)
    for chosen in mask.sites.values():
        for selection in (
            [s for _, s in chosen.groups] if isinstance(chosen, UnitSelection) else [chosen]
        ):
            merged = selection_sources(selection, equal)
            pieces = selection.source_rows(equal, CPU)
            rows = torch.cat([piece.rows for piece in pieces]).tolist()
            assert sorted(rows) == list(range(batch.real.size))
            for piece in pieces:
                assert set(merged[piece.rows.numpy()].tolist()) == {piece.source}
            only = selection.only(equal)
            real = set(merged[batch.real.reshape(-1)].tolist())
            assert only == (real.pop() if len(real) == 1 else None)
            named = [selection.mixtures[i] for i in selection.per_row(CPU).tolist()]
            assert [m[0][0] for m in named] == selection_sources(selection).tolist()


# -- shapes of the answer ----------------------------------------------------------------------


def test_one_prompt_by_hand() -> None:
    arch = ARCHS["llama"]
    graft = Graft.parse("sft @ name + last | task @ last : o : 1-2 | pre @ name#2 : q : 0 : 1")
    mask = resolve(graft, collate([prompt(6, (1, 2), (4,))]), arch, SOURCES)
    assert mask.source_index("mlp_in", 0).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert mask.source_index("embed").tolist() == [[0, 1, 1, 0, 1, 1]]
    assert mask.source_index("o", 0).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert mask.source_index("o", 2).tolist() == [[0, 1, 1, 0, 1, 2]]
    assert mask.source_index("q", 0, unit=0).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert mask.source_index("q", 0, unit=1).tolist() == [[0, 1, 1, 0, 0, 1]]
    # A part that belongs to no head takes the source only where all heads agree.
    assert mask.source_index("q", 0).tolist() == [[0, 1, 1, 0, 0, 1]]
    assert mask.shape == (1, 6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("line", ["none", "sft @ all", "pre @ last", "sft @ all | sft @ last : o"])
def test_a_uniform_mask_stays_uniform_despite_padding(side: Padding, line: str) -> None:
    """Else a padded batch of a plain model would be gathered row by row."""
    mask = resolve(
        Graft.parse(line), collate([prompt(9), prompt(5)], side=side), ARCHS["llama"], SOURCES
    )
    source = 1 if "sft" in line else 0
    for chosen in mask.sites.values():
        assert isinstance(chosen, Selection)
        assert chosen.sources == (source,)
        assert chosen.only((0, 1, 2)) == source
        assert len(chosen.source_rows((0, 1, 2), CPU)) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_continuations_count_as_last(side: Padding) -> None:
    """Each position that an answer's token is scored at was, when generated, the last one."""
    batch = collate([prompt(5), prompt(7)], side=side, continuations=[[1, 2], []])
    mask = resolve(Graft.rule("sft", "last"), batch, ARCHS["llama"], SOURCES)
    assert mask.source_index("q", 0).tolist() == [
        [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]
    ]  # fmt: skip
    counted = resolve(Graft.rule("sft", [-1]), batch, ARCHS["llama"], SOURCES)
    assert counted.source_index("q", 0).tolist() == [
        [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]
    ]  # fmt: skip
    rest = resolve(Graft.rule("sft", "~(name + last)"), batch, ARCHS["llama"], SOURCES)
    assert rest.source_index("q", 0).tolist() == [
        [1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1, 0]
    ]  # fmt: skip
    whole = resolve(Graft.rule("sft"), batch, ARCHS["llama"], SOURCES)
    assert whole.source_index("q", 0).tolist() == [[1] * 7] * 2


def test_left_padding_shifts_the_spans() -> None:
    graft = Graft.rule("sft", "name + bos")
    for side, row in [("right", [1, 1, 1, 0, 0]), ("left", [0, 0, 1, 1, 1, 0, 0])]:
        batch = collate([prompt(5), prompt(7)], side=side)
        found = resolve(graft, batch, ARCHS["llama"], SOURCES).source_index("v", 1)
        assert found[0][: len(row)].tolist() == row, side


def test_groups_of_heads_share_a_selection() -> None:
    """Four query heads of which two differ from the others are two pieces of work, not four."""
    mask = resolve(
        Graft.rule("sft", "last", "q + k", heads=[1]), collate([prompt(5)]), ARCHS["llama"], SOURCES
    )
    chosen = mask[Component.Q, 0]
    assert isinstance(chosen, UnitSelection)
    assert sorted(heads for heads, _ in chosen.groups) == [(0, 2, 3), (1,)]
    assert isinstance(mask[Component.K, 0], UnitSelection)
    assert isinstance(mask[Component.V, 0], Selection)


def test_heads_that_agree_in_the_end_are_no_split() -> None:
    graft = Graft.rule("sft", "last", "q", heads=[1]) | Graft.rule("sft", "last", "q")
    mask = resolve(graft, collate([prompt(5)]), ARCHS["llama"], SOURCES)
    assert isinstance(mask[Component.Q, 0], Selection)
    every = Graft.rule("sft", "last", "q", heads="0-3")
    assert isinstance(
        resolve(every, collate([prompt(5)]), ARCHS["llama"], SOURCES)[Component.Q, 0], Selection
    )


def test_sites_that_agree_are_one_object() -> None:
    """Gathers and blocks are made once for all of them."""
    mask = resolve(Graft.rule("sft", "last"), collate([prompt(5)]), ARCHS["llama"], SOURCES)
    assert len({id(chosen) for chosen in mask.sites.values()}) == 1
    layers = resolve(
        Graft.rule("sft", "last", layers=1), collate([prompt(5)]), ARCHS["llama"], SOURCES
    )
    assert len({id(chosen) for chosen in layers.sites.values()}) == 2


def test_bare_tokens_have_the_standard_spans() -> None:
    tokens = torch.arange(12).reshape(2, 6)
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = resolve(
        Graft.rule("sft", "bos + last"), from_tokens(tokens, attention), ARCHS["llama"], SOURCES
    )
    assert mask.source_index("q", 0).tolist() == [[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1]]


def test_a_site_that_is_not_there_is_a_key_error() -> None:
    mask = resolve(Graft(), collate([prompt(5)]), ARCHS["gpt2"], SOURCES)
    with pytest.raises(KeyError):
        mask.source_index("mlp_gate", 0)
    with pytest.raises(KeyError):
        mask.source_index("q", 3)


# -- nothing selects silently ------------------------------------------------------------------

_GPT2 = "embed pos_embed ln1 q k v o ln2 mlp_in mlp_out ln_final unembed"
_LLAMA = "embed ln1 q k v o ln2 mlp_in mlp_gate mlp_out ln_final unembed"
_OLMO = "embed q k v o mlp_in mlp_gate mlp_out unembed"
_OLMO2 = "embed q k v q_norm k_norm o ln1_post mlp_in mlp_gate mlp_out ln2_post ln_final unembed"
_NEOX = "embed ln1 q k v o ln2 mlp_in mlp_out ln_final unembed"


def _lacks(family: str, component: str, has: str) -> str:
    return (
        f"{family} has no component '{component}'. Its components are: {has}. "
        "Leave it out of the graft."
    )


REFUSED = [
    (
        "llama",
        "stf @ last",
        "rule 'stf @ last': no source 'stf'. This model has: pre sft task. Did you mean 'sft'?",
    ),
    ("llama", "relation @ last", "no source 'relation'. This model has: pre sft task."),
    ("gpt2", "sft @ last : mlp_gate", _lacks("gpt2", "mlp_gate", _GPT2)),
    ("gpt2", "sft @ last : o + q_norm", _lacks("gpt2", "q_norm", _GPT2)),
    ("llama", "sft @ last : pos_embed", _lacks("llama", "pos_embed", _LLAMA)),
    ("llama", "sft @ last : q_norm", _lacks("llama", "q_norm", _LLAMA)),
    ("llama", "sft @ last : ln1_post", _lacks("llama", "ln1_post", _LLAMA)),
    ("olmo", "sft @ last : ln1", _lacks("olmo", "ln1", _OLMO)),
    ("olmo", "sft @ last : ln_final", _lacks("olmo", "ln_final", _OLMO)),
    ("olmo2", "sft @ last : ln1", _lacks("olmo2", "ln1", _OLMO2)),
    ("neox-parallel", "sft @ last : mlp_gate", _lacks("gpt_neox", "mlp_gate", _NEOX)),
    (
        "olmo",
        "sft @ last : ln",
        f"component group 'ln' is empty in olmo, whose components are: {_OLMO}. Leave it out.",
    ),
    (
        "llama",
        "sft @ last : o : 3",
        "rule 'sft @ last : o : 3': no layer 3. llama here has 3 layers: 0 to 2.",
    ),
    ("gemma2", "sft @ last : o : 2-9", "no layer 4. gemma2 here has 4 layers: 0 to 3."),
    (
        "llama",
        "sft @ last : o : first_eighth",
        "rule 'sft @ last : o : first_eighth': layer group 'first_eighth' is empty in a model of 3 "
        "layers. Name a larger group, or layer numbers.",
    ),
    ("llama", "sft @ last : o : first_quarter", "layer group 'first_quarter' is empty in a model"),
    (
        "llama",
        "sft @ last : q + k : all : 2",
        "rule 'sft @ last : q + k : all : 2': no head 2 in k, which has 2 key-value heads here: "
        "0 to 1.",
    ),
    ("llama", "sft @ last : v : all : 0,3", "no head 3 in v, which has 2 key-value heads here"),
    ("llama", "sft @ last : q : all : 4", "no head 4 in q, which has 4 heads here: 0 to 3."),
    ("llama", "sft @ last : o : all : 9", "no head 9 in o, which has 4 heads here: 0 to 3."),
    ("gpt2", "sft @ last : k : all : 4", "no head 4 in k, which has 4 key-value heads here"),
    (
        "llama",
        "sft @ last : embed + o : 1",
        "rule 'sft @ last : embed + o : 1': embed is outside the layers, so layers cannot "
        "restrict it. Give it a rule of its own, without layers.",
    ),
    (
        "gpt2",
        "sft @ last : unembed + pos_embed + ln_final : upper_half",
        "pos_embed ln_final unembed is outside the layers",
    ),
]


@pytest.mark.parametrize(("variant", "line", "message"), REFUSED)
def test_what_the_model_lacks_is_refused(variant: str, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(Graft.parse(line), collate([prompt(6)]), ARCHS[variant], SOURCES)


@pytest.mark.parametrize("variant", sorted(ARCHS))
def test_what_every_architecture_has_is_accepted_and_the_rest_refused(variant: str) -> None:
    arch = ARCHS[variant]
    batch = collate([prompt(6)])
    for component in Component:
        graft = Graft.rule("sft", "last", str(component))
        if component in arch.components:
            mask = resolve(graft, batch, arch, SOURCES)
            layer = None if component in MODEL_COMPONENTS else arch.n_layers - 1
            assert mask.source_index(component, layer).tolist() == [[0, 0, 0, 0, 0, 1]]
        else:
            with pytest.raises(ValueError, match=f"{arch.family} has no component '{component}'"):
                resolve(graft, batch, arch, SOURCES)


def test_layers_keep_all_within_the_layers() -> None:
    mask = resolve(
        Graft.rule("sft", "last", layers="lower_half + upper_half"),
        collate([prompt(6)]),
        ARCHS["llama"],
        SOURCES,
    )
    assert mask.source_index("ln1", 0)[0, -1] == 1
    assert mask.source_index("embed")[0, -1] == mask.source_index("unembed")[0, -1] == 0


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            "name#2",
            "prompt 2, rule 'sft @ name#2': no occurrence name#2: span 'name' occurs 1 time(s) in "
            "this prompt. Write name#1, or name for all of them.",
        ),
        (
            "nmae",
            "prompt 0, rule 'sft @ nmae': no span 'nmae' here. Spans of this prompt: name bos last "
            "all prompt. Did you mean 'name'?",
        ),
        (
            [5],
            "prompt 2, rule 'sft @ [5]': position 5 is outside the prompt, which has 5 tokens. "
            "Write a number from -5 to 4.",
        ),
        ([-6], "prompt 2, rule 'sft @ [-6]': position -6 is outside the prompt, which has 5"),
        (
            "~all",
            "prompt 0, rule 'sft @ ~all': ~all selects none of the 7 positions. "
            "Change the positions, or leave the rule out.",
        ),
        ("name & last", "prompt 0, rule 'sft @ name & last': name & last selects none of the 7"),
        ("[4] & last", "prompt 0, rule 'sft @ [4] & last': [4] & last selects none of the 7"),
    ],
)
def test_what_one_prompt_of_many_lacks_names_the_prompt(at: str | list[int], message: str) -> None:
    prompts = [prompt(7, (1,), (3,)), prompt(6, (1,), (3,)), prompt(5, (1,))]
    with pytest.raises(PromptError, match=f"^{re.escape(message)}"):
        resolve(Graft.rule("sft", at), collate(prompts), ARCHS["llama"], SOURCES)


def test_a_span_that_one_prompt_lacks_altogether() -> None:
    bare = Tokenized.bare([1, 2, 3])
    with pytest.raises(PromptError) as caught:
        resolve(
            Graft.parse("sft @ last | sft @ name"),
            collate([prompt(5), bare]),
            ARCHS["llama"],
            SOURCES,
        )
    assert str(caught.value) == (
        "prompt 1, rule 'sft @ name': no span 'name' here. "
        "Spans of this prompt: bos last all prompt."
    )


def test_everything_but_the_last_of_a_prompt_of_one_token() -> None:
    with pytest.raises(PromptError, match=re.escape("prompt 1, rule 'sft @ ~last': ~last selects")):
        resolve(
            Graft.rule("sft", "~last"),
            collate([prompt(5), Tokenized.bare([3])]),
            ARCHS["llama"],
            SOURCES,
        )
