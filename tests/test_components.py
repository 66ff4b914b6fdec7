"""The vocabulary: every group means what it says, at any depth, and every slip is named."""

import itertools
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlens.components import (
    COMPONENTS,
    GROUPS,
    HEAD_COMPONENTS,
    LAYER_GROUPS,
    Component,
    Cut,
    expand_components,
    format_numbers,
    layer_group,
    parse_components,
    parse_numbers,
    suggest,
)

_LLAMA = "embed ln1 q k v o ln2 mlp_in mlp_gate mlp_out ln_final unembed"
LLAMA = tuple(Component(name) for name in _LLAMA.split(" "))

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
FAMILIES = {
    "halves": ["lower_half", "upper_half"],
    "quarters": [f"{ordinal}_quarter" for ordinal in ORDINALS[:4]],
    "eighths": [f"{ordinal}_eighth" for ordinal in ORDINALS],
    "one": ["all"],
}


def test_the_vocabulary_is_the_design_s() -> None:
    """A renamed component would break every saved graft."""
    assert " ".join(Component) == (
        "embed pos_embed ln1 q k v q_norm k_norm o ln1_post ln2 mlp_in mlp_gate mlp_out ln2_post "
        "ln_final unembed"
    )
    outside = {str(c) for c, row in COMPONENTS.items() if not row.in_layers}
    assert outside == {"embed", "pos_embed", "ln_final", "unembed"}
    assert {str(c) for c in HEAD_COMPONENTS} == {"q", "k", "v", "o"}
    neurons = {str(c) for c, row in COMPONENTS.items() if row.cut is Cut.NEURON}
    assert neurons == {"mlp_in", "mlp_gate", "mlp_out"}


def test_a_component_is_a_word_and_its_row() -> None:
    assert tuple(COMPONENTS) == tuple(Component)
    for component, row in COMPONENTS.items():
        assert Component(component.value) is component is pickle.loads(pickle.dumps(component))
        # What is cut says on which axis, and only that.
        assert (row.cut is Cut.NONE) == (row.axis is None)
    with pytest.raises(TypeError, match="component 'lonely' has no row"):
        Component._new_member_(Component, "lonely")


def test_groups_hold_what_the_design_says() -> None:
    assert {name: " ".join(members) for name, members in GROUPS.items()} == {
        "attn": "q k v q_norm k_norm o",
        "mlp": "mlp_in mlp_gate mlp_out",
        "ln": "ln1 ln1_post ln2 ln2_post",
        "block": "ln1 q k v q_norm k_norm o ln1_post ln2 mlp_in mlp_gate mlp_out ln2_post",
        "all": " ".join(Component),
    }


def test_block_is_attn_mlp_and_ln_without_overlap() -> None:
    parts = [*GROUPS["attn"], *GROUPS["mlp"], *GROUPS["ln"]]
    assert len(parts) == len(set(parts))
    assert set(parts) == set(GROUPS["block"])
    assert set(GROUPS["block"]) == {c for c, row in COMPONENTS.items() if row.in_layers}


def test_no_name_means_two_things() -> None:
    names = [*Component, *GROUPS]
    assert len(names) == len(set(names))


# -- layer groups ------------------------------------------------------------------------------


def test_the_layer_groups_are_these() -> None:
    assert set(LAYER_GROUPS) == {name for names in FAMILIES.values() for name in names}


@given(n=st.integers(1, 130), family=st.sampled_from(sorted(FAMILIES)))
def test_every_family_partitions_the_layers_in_order(n: int, family: str) -> None:
    """In order, contiguous, nothing twice, nothing left out, at any depth."""
    joined = [layer for name in FAMILIES[family] for layer in layer_group(name, n)]
    assert joined == list(range(n))


@given(n=st.integers(1, 130), family=st.sampled_from(sorted(FAMILIES)))
def test_the_parts_of_a_family_are_as_equal_as_they_can_be(n: int, family: str) -> None:
    sizes = [len(layer_group(name, n)) for name in FAMILIES[family]]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("name", "n", "layers"),
    [
        ("all", 3, (0, 1, 2)),
        ("lower_half", 12, (0, 1, 2, 3, 4, 5)),
        ("upper_half", 12, (6, 7, 8, 9, 10, 11)),
        ("lower_half", 5, (0, 1)),
        ("upper_half", 5, (2, 3, 4)),
        ("third_quarter", 30, (15, 16, 17, 18, 19, 20, 21)),
        ("eighth_eighth", 32, (28, 29, 30, 31)),
        ("first_eighth", 4, ()),
        ("lower_half", 1, ()),
    ],
)
def test_layer_groups_by_hand(name: str, n: int, layers: tuple[int, ...]) -> None:
    assert layer_group(name, n) == layers


@given(n=st.integers(1, 130), i=st.integers(0, 3))
def test_quarters_are_two_eighths_each(n: int, i: int) -> None:
    eighths = [layer_group(f"{ORDINALS[2 * i + k]}_eighth", n) for k in (0, 1)]
    assert layer_group(f"{ORDINALS[i]}_quarter", n) == eighths[0] + eighths[1]


def test_an_unknown_layer_group_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        layer_group("uper_half", 12)
    text = str(caught.value)
    assert text.startswith("unknown layer group 'uper_half'. Allowed: all lower_half upper_half")
    assert 'layer numbers such as 3 or "8-15"' in text
    assert text.endswith("Did you mean 'upper_half'?")


# -- numbers -----------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 200), min_size=1))
def test_numbers_round_trip(numbers: set[int]) -> None:
    assert parse_numbers(format_numbers(sorted(numbers)), "layers") == tuple(sorted(numbers))


@given(st.sets(st.integers(0, 30), min_size=1))
def test_formatted_numbers_are_maximal_runs(numbers: set[int]) -> None:
    """The shortest text: two neighbouring pieces never touch."""
    pieces = [[int(n) for n in p.split("-")] for p in format_numbers(sorted(numbers)).split(",")]
    assert all(a[-1] + 1 < b[0] for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)),
        ("8-15", tuple(range(8, 16))),
        ("0,2-4", (0, 2, 3, 4)),
        (" 4 , 1-2 ", (1, 2, 4)),
        ("5-5", (5,)),
        ("1-3,2-4,3", (1, 2, 3, 4)),
        ("007", (7,)),
    ],
)
def test_numbers_by_hand(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text, "layers") == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layers='': '' is not a number or range"),
        ("1,", "layers='1,': '' is not a number or range"),
        ("x", "layers='x': 'x' is not a number or range"),
        ("-1", "layers='-1': '-1' is not a number or range"),
        ("1.5", "layers='1.5': '1.5' is not a number or range"),
        ("1..3", "layers='1..3': '1..3' is not a number or range"),
        ("8-", "layers='8-': '8-' is not a number or range"),
        ("1-2-3", "layers='1-2-3': '1-2-3' is not a number or range"),
        ("15-8", "layers='15-8': the range '15-8' runs backwards. Write it as 8-15."),
    ],
)
def test_malformed_numbers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_numbers(text, "layers")


def test_a_malformed_number_shows_the_three_forms() -> None:
    with pytest.raises(ValueError, match=re.escape('such as "3", "8-15" or "0,2-4".')):
        parse_numbers("three", "heads")


# -- component names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("o", ("o",)),
        ("o + mlp", ("o", "mlp")),
        (["o", "mlp"], ("o", "mlp")),
        ((Component.O, "mlp"), ("o", "mlp")),
        ("mlp+o", ("mlp", "o")),
        (" o +  o + q", ("o", "q")),
        ("all", ("all",)),
    ],
)
def test_component_names_are_kept_as_written(words: str | list[str], names: tuple[str]) -> None:
    assert parse_components(words) == names


@pytest.mark.parametrize("words", ["", " ", [], "o +", "+ o", ["o", ""], "o + + mlp"])
def test_no_component_is_an_error(words: str | list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_components(words)
    text = str(caught.value)
    assert text.startswith(
        f"components={words!r} does not name a component. Write one or more of embed "
    )
    assert '"o + mlp" or ["o", "mlp"]' in text


@pytest.mark.parametrize(
    ("word", "meant"),
    [("atn", "attn"), ("mlp_inn", "mlp_in"), ("un_embed", "unembed"), ("blocks", "block")],
)
def test_an_unknown_component_is_named_with_a_suggestion(word: str, meant: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_components(f"o + {word}")
    text = str(caught.value)
    assert text.startswith(f"unknown component {word!r}. Allowed: {' '.join(Component)} ")
    assert "(groups: attn mlp ln block all)" in text
    assert text.endswith(f"Did you mean {meant!r}?")


def test_case_matters() -> None:
    with pytest.raises(ValueError, match="unknown component 'Q'"):
        parse_components("Q")


def test_no_suggestion_for_what_is_far_from_everything() -> None:
    assert suggest("zzzzzz", Component) == ""
    assert suggest("mlp_ou", Component) == " Did you mean 'mlp_out'?"


# -- components of one architecture ------------------------------------------------------------


@given(st.lists(st.sampled_from([*LLAMA, *GROUPS]), min_size=1))
def test_expansion_is_the_union_in_the_vocabulary_s_order(names: list[str]) -> None:
    expanded = expand_components([str(n) for n in names], LLAMA, "llama")
    wanted = {c for n in names for c in GROUPS.get(n, [n]) if c in LLAMA}
    assert list(expanded) == [c for c in Component if c in wanted]


def test_a_group_gives_what_the_architecture_has() -> None:
    assert expand_components(["attn"], LLAMA, "llama") == tuple("qkvo")
    assert expand_components(["ln"], LLAMA, "llama") == ("ln1", "ln2")
    assert expand_components(["all"], LLAMA, "llama") == LLAMA


def test_a_component_that_the_architecture_lacks_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        expand_components(["o", "q_norm"], LLAMA, "llama")
    assert str(caught.value) == (
        f"llama has no component 'q_norm'. Its components are: {' '.join(LLAMA)}. "
        "Leave it out of the graft."
    )


def test_a_group_that_is_empty_there_is_named() -> None:
    without = tuple(c for c in LLAMA if not c.startswith("ln"))
    with pytest.raises(ValueError) as caught:
        expand_components(["ln"], without, "olmo")
    assert str(caught.value) == (
        f"component group 'ln' is empty in olmo, whose components are: {' '.join(without)}. "
        "Leave it out."
    )
