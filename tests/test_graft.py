"""The graft algebra: a value that writes and reads back as itself, and selects what it says."""

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from families import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from positions import evaluate

from graftlens.components import HEAD_COMPONENTS, LAYER_GROUPS, Component
from graftlens.graft import Graft, Rule
from graftlens.model.arch import architecture
from graftlens.model.inputs import Batch, collate
from graftlens.model.mask import GraftMask, resolve
from graftlens.positions import At, Complement, Positions, Span
from graftlens.prompts import Tokenized

SPANS = ("first_entity", "second_entity", "last", "bos", "all")
LENGTH = 9

quick = settings(deadline=None, max_examples=60)

#: Spans of a prompt of nine tokens, one that occurs twice and one that overlaps another.
OCCURRENCES = {
    "first_entity": ((2, 3), (6,)),
    "second_entity": ((3, 4, 5),),
    "bos": ((0,),),
    "last": ((8,),),
    "all": (tuple(range(LENGTH)),),
}

# -- what hypothesis draws ---------------------------------------------------------------------

_ATOMS = st.one_of(
    st.sampled_from(SPANS),
    st.sampled_from(
        ["first_entity#1", "first_entity#2", "second_entity#1", "first_entity#-1", "bos#-1"]
    ),
    st.lists(st.integers(-LENGTH, LENGTH - 1), min_size=1, max_size=3).map(str),
)

#: Expressions as text, with redundant parentheses, odd spaces and double complements.
EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        inner.map(lambda e: f"~({e})"),
        inner.map(lambda e: f"( {e} )"),
        inner.map(lambda e: f"~ {e}" if e.startswith("~") else f"~({e})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda es: "(" + " + ".join(es) + ")"),
        st.lists(inner, min_size=2, max_size=3).map(lambda es: "&".join(f"({e})" for e in es)),
        st.tuples(inner, inner, inner).map(lambda e: f"({e[0]})&({e[1]})+({e[2]})"),
    ),
    max_leaves=6,
)

SOURCES = st.sampled_from(["pre", "sft", "task", "step-1000", "a.b_c"])
_HEADLESS = [str(c) for c in Component if c not in HEAD_COMPONENTS]
_LAYERS = st.one_of(
    st.just("all"),
    st.integers(0, 40),
    st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from(sorted(LAYER_GROUPS))), min_size=1, max_size=4
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda p: f"{min(p)}-{sum(p)}"),
    st.just("lower_half + 7"),
)


@st.composite
def rules(draw: st.DrawFn) -> Graft:
    """A graft of one rule over the whole vocabulary."""
    heads = draw(st.none() | st.lists(st.integers(0, 12), min_size=1, max_size=3))
    words = [*"qkvo"] if heads is not None else [*"qkvo", *_HEADLESS, "attn", "mlp", "ln", "all"]
    components = draw(st.lists(st.sampled_from(words), min_size=1, max_size=3))
    return Graft.rule(draw(SOURCES), draw(EXPRESSIONS), components, draw(_LAYERS), heads)


GRAFTS = st.lists(rules(), max_size=4).map(
    lambda drawn: Graft(tuple(rule for graft in drawn for rule in graft))
)


def selected(at: At | str, length: int = LENGTH) -> set[int]:
    return set(np.flatnonzero(At.parse(at).select(OCCURRENCES, length)).tolist())


# -- values ------------------------------------------------------------------------------------


@quick
@given(GRAFTS)
def test_a_graft_reads_back_from_its_line(graft: Graft) -> None:
    assert Graft.parse(str(graft)) == graft


@quick
@given(GRAFTS)
def test_a_graft_reads_back_from_yaml(graft: Graft) -> None:
    assert Graft.from_yaml(graft.to_yaml()) == graft


@quick
@given(GRAFTS)
def test_a_graft_reads_back_from_a_list(graft: Graft) -> None:
    assert Graft.from_list(graft.to_list()) == graft


@quick
@given(GRAFTS)
def test_a_graft_reads_back_from_its_lines_in_a_list(graft: Graft) -> None:
    assert Graft.from_list([str(Graft((rule,))) for rule in graft]) == graft


@quick
@given(GRAFTS)
def test_the_representation_makes_the_graft_again(graft: Graft) -> None:
    assert eval(repr(graft), {"Graft": Graft}) == graft


@quick
@given(GRAFTS, GRAFTS)
def test_equal_exactly_where_the_text_is_and_then_with_one_hash(a: Graft, b: Graft) -> None:
    assert (a == b) == (str(a) == str(b))
    assert hash(Graft.parse(str(a))) == hash(a)
    assert len({a, b, Graft(a.rules)}) == (1 if a == b else 2)


@quick
@given(GRAFTS, GRAFTS, GRAFTS)
def test_joining_is_associative_and_the_empty_graft_its_identity(
    a: Graft, b: Graft, c: Graft
) -> None:
    assert (a | b) | c == a | (b | c)
    assert a | Graft() == a == Graft() | a
    assert (a | b).rules == a.rules + b.rules


def test_grafts_rules_and_positions_are_frozen() -> None:
    graft = Graft.rule("sft", at="first_entity + [0] + ~last#1")
    rule = graft.rules[0]
    for value, name in [(graft, "rules"), (rule, "source"), (rule.at, "terms")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    for term, name in zip(rule.at.terms, ("name", "positions", "term"), strict=True):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(term, name, None)


def test_the_empty_graft() -> None:
    empty = Graft()
    assert str(empty) == "none"
    assert empty == Graft.parse("none") == Graft.parse(" none ") == Graft.from_list([])
    assert Graft.from_yaml(empty.to_yaml()) == Graft.from_yaml("none") == empty
    assert not empty
    assert list(empty) == []
    assert empty.sources == ()
    assert Graft.rule("sft")


def test_sources_come_in_order_of_first_use() -> None:
    graft = Graft.parse("b @ last | a @ bos | b @ all")
    assert graft.sources == ("b", "a")


@pytest.mark.parametrize(
    ("graft", "line"),
    [
        (Graft.rule("sft"), "sft @ all"),
        (Graft.rule("sft", at="first_entity + last"), "sft @ first_entity + last"),
        (
            Graft.rule("sft", at="last", components="o + mlp", layers="upper_half"),
            "sft @ last : o + mlp : upper_half",
        ),
        (
            Graft.rule("task", at="first_entity + last")
            | Graft.rule("relation", at="last", components=["o", "mlp"], layers="8-15"),
            "task @ first_entity + last | relation @ last : o + mlp : 8-15",
        ),
        (Graft.rule("sft", at="~(first_entity + last)"), "sft @ ~(first_entity + last)"),
        (
            Graft.rule("sft", at=[0, -1], layers=[3], components="q", heads=[2]),
            "sft @ [0, -1] : q : 3 : 2",
        ),
        (Graft.rule("sft", layers=[3, 1, 2, 9]), "sft @ all : all : 1-3,9"),
        (Graft.rule("sft", layers="upper_half+0"), "sft @ all : all : upper_half + 0"),
        (Graft.rule("sft", layers="all + 3"), "sft @ all"),
        (Graft.rule("sft", components="q", heads="0-2,5"), "sft @ all : q : all : 0-2,5"),
        (Graft.rule("sft", components="q", heads=3), "sft @ all : q : all : 3"),
        (Graft.rule("sft", at=0), "sft @ [0]"),
        (Graft.rule("sft", at="a & (b + c) & ~~d#2"), "sft @ a & (b + c) & ~~d#2"),
        (Graft.rule("sft", at="(a & b) + c"), "sft @ (a & b) + c"),
        (Graft.rule("sft", at="a + (b + a)"), "sft @ a + b"),
        (Graft.rule("sft", at="ville_de_naissance + नाम"), "sft @ ville_de_naissance + नाम"),
    ],
)
def test_grafts_by_hand(graft: Graft, line: str) -> None:
    assert str(graft) == line
    assert Graft.parse(line) == graft


def test_spaces_do_not_matter_in_a_line() -> None:
    assert Graft.parse("  sft@~( a+last )&[0,-1]:o+mlp:8-15 |pre@a#2::upper_half") == Graft.parse(
        "sft @ ~(a + last) & [0, -1] : o + mlp : 8-15 | pre @ a#2 : all : upper_half"
    )


def test_at_takes_an_expression_a_number_or_a_list() -> None:
    assert At.parse(3) == At.parse([3]) == At.parse("[3]") == Positions((3,))
    assert At.parse(np.int64(3)) == Positions((3,))
    assert At.parse((0, -1, 0)) == Positions((0, -1))
    assert At.parse(range(2)) == At.parse("[0, 1]")
    assert At.parse(Span("last")) == Span("last")
    assert At.parse("last#2") == Span("last", 2)
    assert At.parse("user#-1 & ~last") == At.parse(str(At.parse("user#-1&~last")))


def test_names_and_dependence_on_the_end() -> None:
    at = At.parse("~(first_entity + [0]) & year#2")
    assert at.names() == {"first_entity", "year"}
    assert not at.counts_from_the_end()
    for text in ("last", "~last", "a + [-1]", "~(a & [0, -2])"):
        assert At.parse(text).counts_from_the_end(), text


# -- what an expression selects ----------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS)
def test_expressions_mean_python_s_sets(text: str) -> None:
    assert selected(text) == evaluate(text, OCCURRENCES, LENGTH)


@quick
@given(EXPRESSIONS)
def test_the_normal_form_means_the_same(text: str) -> None:
    assert selected(str(At.parse(text))) == evaluate(text, OCCURRENCES, LENGTH)


@quick
@given(EXPRESSIONS, EXPRESSIONS)
def test_de_morgan(a: str, b: str) -> None:
    assert selected(f"~(({a}) + ({b}))") == selected(f"~({a}) & ~({b})")
    assert selected(f"~(({a}) & ({b}))") == selected(f"~({a}) + ~({b})")


@quick
@given(EXPRESSIONS)
def test_complement_partitions_and_undoes_itself(a: str) -> None:
    inside, outside = selected(a), selected(f"~({a})")
    assert inside | outside == set(range(LENGTH))
    assert not inside & outside
    assert selected(f"~~({a})") == inside
    at = At.parse(a)
    assert selected(Complement(Complement(at))) == inside


def test_intersection_binds_tighter_than_union() -> None:
    assert selected("bos + first_entity & second_entity") == {0, 3}
    assert selected("(bos + first_entity) & second_entity") == {3}


def test_occurrences_are_counted_from_one() -> None:
    assert selected("first_entity") == {2, 3, 6}
    assert selected("first_entity#1") == {2, 3}
    assert selected("first_entity#2") == {6}
    assert selected("~first_entity#2") == set(range(LENGTH)) - {6}


def test_negative_positions_count_from_the_prompt_s_end_not_from_what_follows() -> None:
    at = At.parse([0, -1, -9])
    assert np.flatnonzero(at.select(OCCURRENCES, LENGTH)).tolist() == [0, 8]
    assert np.flatnonzero(at.select(OCCURRENCES, LENGTH, LENGTH + 4)).tolist() == [0, 8]
    assert at.select(OCCURRENCES, LENGTH, LENGTH + 4).shape == (13,)
    assert np.flatnonzero(At.parse("~all").select(OCCURRENCES, LENGTH, 11)).tolist() == [9, 10]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            "first_entty",
            "no span 'first_entty' here. Spans of this prompt: first_entity second_entity bos last "
            "all. Did you mean 'first_entity'?",
        ),
        (
            "first_entity#3",
            "no occurrence first_entity#3: span 'first_entity' occurs 2 time(s) in this prompt. "
            "Write first_entity#1 to first_entity#2, or first_entity for all of them.",
        ),
        (
            [9],
            "position 9 is outside the prompt, which has 9 tokens. Write a number from -9 to 8.",
        ),
        (
            [-10],
            "position -10 is outside the prompt, which has 9 tokens. Write a number from -9 to 8.",
        ),
        ("~(last + [12])", "position 12 is outside the prompt"),
    ],
)
def test_what_a_prompt_lacks_is_named(at: str | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        At.parse(at).select(OCCURRENCES, LENGTH)


# -- in a resolved mask ------------------------------------------------------------------------

ARCH = architecture(VARIANTS["llama"]())  # 3 layers, 4 heads, 2 key-value heads
MASK_SOURCES = ("pre", "sft", "task")


def batch() -> Batch:
    return collate([Tokenized(tuple(range(LENGTH)), OCCURRENCES)])


def places(mask: GraftMask) -> dict[tuple[str, int | None, int], list[int]]:
    """Source numbers by site and head or neuron, for comparison."""
    found = {}
    for component, layer in mask.sites:
        for units, _ in mask[component, layer].selections():
            alike = range(ARCH.n_units_of(component)) if units is None else list(units)
            sources = mask.source_index(component, layer, alike[0])[0].tolist()
            found.update({(str(component), layer, unit): sources for unit in alike})
    return found


@st.composite
def runnable(draw: st.DrawFn, source: st.SearchStrategy[str] | None = None) -> Graft:
    """A rule that the small Llama can run on the nine tokens."""
    heads = draw(st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=2))
    layers = draw(st.sampled_from(["all", "upper_half", "0", "1-2", "first_quarter + 2"]))
    if layers.startswith("first_quarter"):
        layers = "lower_half + 2"  # quarters can be empty in three layers
    words = [*"qkvo"] if heads else ["q", "o", "v", "mlp", "attn", "ln", "block", "mlp_gate"]
    if layers == "all" and not heads:
        words += ["embed", "unembed", "all", "ln_final"]
    components = draw(st.lists(st.sampled_from(words), min_size=1, max_size=2))
    at = draw(EXPRESSIONS.filter(lambda e: evaluate(e, OCCURRENCES, LENGTH)))
    name = draw(source if source is not None else st.sampled_from(MASK_SOURCES))
    return Graft.rule(name, at, components, layers, heads)


@settings(deadline=None, max_examples=30)
@given(runnable(), runnable())
def test_the_later_rule_wins_where_two_meet(a: Graft, b: Graft) -> None:
    """Where b reaches, the join is b; elsewhere it is a."""
    joined = places(resolve(a | b, batch(), ARCH, MASK_SOURCES))
    first = places(resolve(a, batch(), ARCH, MASK_SOURCES))
    # b under two names: where the answers differ from one another, b reaches.
    reach = [
        places(
            resolve(
                Graft((dataclasses.replace(b.rules[0], source=name),)), batch(), ARCH, MASK_SOURCES
            )
        )
        for name in ("sft", "task")
    ]
    number = MASK_SOURCES.index(b.rules[0].source)
    for site, found in joined.items():
        wanted = [
            number if r != s else before
            for r, s, before in zip(reach[0][site], reach[1][site], first[site], strict=True)
        ]
        assert found == wanted, site


@settings(deadline=None, max_examples=30)
@given(runnable(st.just("sft")), EXPRESSIONS, st.sampled_from(["q", "mlp", "all"]))
def test_disjoint_rules_commute(a: Graft, at: str, components: str) -> None:
    own = str(a.rules[0].at)
    apart = f"({at}) & ~({own})"
    if not evaluate(apart, OCCURRENCES, LENGTH):
        return
    b = Graft.rule("task", apart, components)
    left = resolve(a | b, batch(), ARCH, MASK_SOURCES)
    right = resolve(b | a, batch(), ARCH, MASK_SOURCES)
    assert places(left) == places(right)


def test_rules_on_different_components_layers_or_heads_commute() -> None:
    a = Graft.rule("sft", "last", "q", heads=[0])
    for b in (
        Graft.rule("task", "last", "q", heads=[1, 3]),
        Graft.rule("task", "last", "k + o + mlp + unembed"),
    ):
        left = places(resolve(a | b, batch(), ARCH, MASK_SOURCES))
        assert left == places(resolve(b | a, batch(), ARCH, MASK_SOURCES))
    a, b = Graft.rule("sft", layers="0-1"), Graft.rule("task", layers=2)
    left = places(resolve(a | b, batch(), ARCH, MASK_SOURCES))
    assert left == places(resolve(b | a, batch(), ARCH, MASK_SOURCES))


# -- everything that is refused ----------------------------------------------------------------

_RULE_FORM = (
    'is not a rule. Write "source @ positions : components : layers : heads" (from components on, '
    'what is left out means all), such as "sft @ last : o + mlp : upper_half" or '
    '"0.5*sft @ last : mlp_out : 20 : n12-13"; join rules with |; "none" is the graft without '
    "rules."
)
_WANTED = "expected a span, [positions], +, &, ~ or parentheses at"
_NAMES = "Names begin with a letter or _, followed by letters, digits, _ . -"
_FORMS = 'Write numbers and inclusive ranges, such as "3", "8-15" or "0,2-4".'
_HEADS = 'Heads apply to q, k, v and o only: write components="q + k + v + o", or leave heads out.'

_IN_LISTS = (
    "is not a whole number. A list holds whole numbers; write names and ranges as text, such as "
    '"0-3".'
)

MALFORMED = {
    "": f"graft '': '' {_RULE_FORM}",
    "   ": f"graft '   ': '' {_RULE_FORM}",
    "sft": f"graft 'sft': 'sft' {_RULE_FORM}",
    "sft last": f"graft 'sft last': 'sft last' {_RULE_FORM}",
    "sft @ last |": f"graft 'sft @ last |': '' {_RULE_FORM}",
    "| sft @ last": f"graft '| sft @ last': '' {_RULE_FORM}",
    "none | sft @ last": f"graft 'none | sft @ last': 'none' {_RULE_FORM}",
    "sft @ last : o : 3 : 2 : 1": "'sft @ last : o : 3 : 2 : 1' is not a rule.",
    "@ last": f"source='' is not a source name. {_NAMES}",
    "1st @ last": f"source='1st' is not a source name. {_NAMES}",
    "my source @ last": f"source='my source' is not a source name. {_NAMES}",
    "org/model @ last": f"source='org/model' is not a source name. {_NAMES}",
    "sft @": "at='': a span or [positions] is missing at the end. Write, for example,",
    "sft @ : o": "at='': a span or [positions] is missing at the end.",
    "sft @ last +": "at='last +': a span or [positions] is missing at the end.",
    "sft @ ~": "at='~': a span or [positions] is missing at the end.",
    "sft @ + last": (
        "at='+ last': a span or [positions] is missing before '+'. "
        'Write, for example, "first_entity + last" or "~(first_entity + last)".'
    ),
    "sft @ a + & b": "at='a + & b': a span or [positions] is missing before '&'.",
    "sft @ ()": "at='()': a span or [positions] is missing before ')'.",
    "sft @ (last": "at='(last': a parenthesis is not closed.",
    "sft @ ~(a + (b & c)": "at='~(a + (b & c)': a parenthesis is not closed.",
    "sft @ last)": "at='last)': nothing joins ) to what comes before it. Join with + or &.",
    "sft @ first last": "at='first last': nothing joins last to what comes before it.",
    "sft @ a ~b": "at='a ~b': nothing joins ~ to what comes before it. Join with + or &.",
    "sft @ a [0]": "at='a [0]': nothing joins [0] to what comes before it.",
    "sft @ last @ x": f"at='last @ x': {_WANTED} '@ x'.",
    "sft @ a - b": f"at='a - b': {_WANTED} '- b'.",
    "sft @ 0": f"at='0': {_WANTED} '0'.",
    "sft @ a, b": f"at='a, b': {_WANTED} 'a, b'.",
    "sft @ a#": f"at='a#': {_WANTED} '#'.",
    "sft @ a#0": "at='a#0': expected the number of an occurrence, from 1 or from -1, at '0'.",
    "sft @ a#-0": "at='a#-0': expected the number of an occurrence, from 1 or from -1, at '-0'.",
    "sft @ [0": f"at='[0': {_WANTED} '[0'.",
    "sft @ []": "at='[]': expected whole numbers, such as [0, -1] at '[]'.",
    "sft @ [0, ]": "at='[0, ]': expected whole numbers, such as [0, -1] at '[0, ]'.",
    "sft @ [1.5]": "at='[1.5]': expected whole numbers, such as [0, -1] at '[1.5]'.",
    "sft @ [a]": "at='[a]': expected whole numbers, such as [0, -1] at '[a]'.",
    "sft @ last : o +": "components='o +' does not name a component. Write one or more of embed",
    "sft @ last : attention": "unknown component 'attention'. Allowed: embed pos_embed ln1 q k v",
    "sft @ last : qq": "unknown component 'qq'.",
    "sft @ last : o : top_half": "unknown layer group 'top_half'. Allowed: all lower_half",
    "sft @ last : o : -1": "unknown layer group '-1'. Allowed: all lower_half upper_half",
    "sft @ last : o : 3-1": "layers='3-1': the range '3-1' runs backwards. Write it as 1-3.",
    "sft @ last : o : 3..5": f"layers='3..5': '3..5' is not a number or range. {_FORMS}",
    "sft @ last : o : 1 + ": "unknown layer group ''. Allowed: all lower_half",
    "sft @ last : q : all : x": f"heads='x': 'x' is not a number or range. {_FORMS}",
    "sft @ last : q : all : -1": f"heads='-1': '-1' is not a number or range. {_FORMS}",
    "sft @ last : mlp : all : 0": (
        f"heads=[0] with components mlp: mlp cannot be split by head. {_HEADS}"
    ),
    "sft @ last : : : 1": f"heads=[1] with components all: all cannot be split by head. {_HEADS}",
    "sft @ last : q + attn : 2 : 1": (
        f"heads=[1] with components q + attn: attn cannot be split by head. {_HEADS}"
    ),
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_lines_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(MALFORMED[text])):
        Graft.parse(text)


def test_an_error_in_a_later_rule_is_found() -> None:
    with pytest.raises(ValueError, match="unknown component 'oo'"):
        Graft.parse("sft @ last : o | sft @ last : oo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": []}, "at=[] does not name a position. Write at least one, such as [0, -1]."),
        ({"at": True}, "at=True is not a position. Write spans"),
        ({"at": [0, True]}, "at=[0, True]: True is not a whole number."),
        ({"layers": -1}, "layers=-1: layers are counted from 0; -1 is not a layer."),
        ({"layers": [0, -3]}, "layers=[0, -3]: layers are counted from 0; -3 is not a layer."),
        ({"layers": []}, "layers=[] does not name a layer. Write a group (all lower_half"),
        ({"layers": [True]}, "layers=[True]: True is not a whole number."),
        ({"components": []}, "components=[] does not name a component."),
        (
            {"components": "q", "heads": []},
            "heads=[]: name at least one head, counted from 0, or leave heads out for all.",
        ),
        ({"components": "q", "heads": [-1]}, "heads=[-1]: name at least one head, counted from 0"),
        ({"components": "q", "heads": [True]}, "heads=[True]: True is not a whole number."),
        ({"components": "q", "heads": True}, "heads=True is a bool."),
        ({"source": "a b"}, "source='a b' is not a source name."),
    ],
)
def test_malformed_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Graft.rule(**{"source": "sft", **arguments})


def test_a_rule_checks_its_source_however_it_is_made() -> None:
    with pytest.raises(ValueError, match="source='' is not a source name"):
        Rule("", Span("last"))


# -- YAML --------------------------------------------------------------------------------------


def test_yaml_as_people_write_it() -> None:
    text = """
- source: sft
  at: ~(first_entity + last)
- source: sft
  at: [0, -1]
  components: q + k
  layers: 8-15
  heads: 0-1
- {source: task, at: first_entity#2, components: [o, mlp], layers: [upper_half, 3], heads: null}
- sft @ last
- "pre @ last : o : 3 | task @ bos"
- {source: sft, at: 0, layers: "3"}
"""
    assert str(Graft.from_yaml(text)) == (
        "sft @ ~(first_entity + last) | sft @ [0, -1] : q + k : 8-15 : 0-1"
        " | task @ first_entity#2 : o + mlp : upper_half + 3 | sft @ last | pre @ last : o : 3"
        " | task @ bos | sft @ [0] : all : 3"
    )


def test_one_rule_needs_no_list() -> None:
    assert Graft.from_yaml("{source: sft, at: last}") == Graft.rule("sft", "last")
    assert Graft.from_yaml('"sft @ last : o"') == Graft.rule("sft", "last", "o")


def test_defaults_are_left_out_of_yaml() -> None:
    assert Graft.rule("sft", "~last").to_list() == [{"source": "sft", "at": "~last"}]
    assert Graft.rule("sft", 0, "q", 2, 1).to_list() == [
        {"source": "sft", "at": "[0]", "components": ["q"], "layers": [2], "heads": [1]}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {source: sft, at: last, layer: 3}",
            "unknown key 'layer' in rule {'source': 'sft', 'at': 'last', 'layer': 3}. "
            "Allowed: source at components layers heads units strength. Did you mean 'layers'?",
        ),
        ("- {source: sft, at: last, 3: 4}", "unknown key 3 in rule"),
        ("- {source: sft}", "rule {'source': 'sft'} needs the keys source and at."),
        ("- {at: last}", "rule {'at': 'last'} needs the keys source and at."),
        # Regression: an empty `at:` meant every position.
        (
            "- source: sft\n  at:",
            "rule {'source': 'sft', 'at': None} needs the keys source and at.",
        ),
        ("- source:\n  at: last", "rule {'source': None, 'at': 'last'} needs the keys source and"),
        ("- 3", "3 is not a rule. A rule has the keys source at components layers heads"),
        ("- [sft, last]", "['sft', 'last'] is not a rule."),
        ("3", "3 is not a graft. Write one line of text, or a list of rules, each with the keys"),
        ("", "None is not a graft."),
        ('- {source: sft, at: "0"}', "at='0': expected a span, [positions]"),
        # Regressions: YAML reads an unquoted line with colons as a mapping, or not at all.
        (
            "- sft @ last : o",
            "unknown key 'sft @ last' in rule {'sft @ last': 'o'}. Allowed: source at components "
            "layers heads units strength. Put a one-line rule in quotes.",
        ),
        ("- sft @ last : o : 3", "graft '- sft @ last : o : 3' is not YAML (mapping values are"),
        ("[unclosed", "graft '[unclosed' is not YAML (while parsing"),
    ],
)
def test_yaml_oddities_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Graft.from_yaml(text)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(ValueError, match="is not YAML"):
        Graft.from_yaml("!!python/object/apply:os.getcwd []")


def test_wrong_types_are_named_for_users_who_run_without_type_checks() -> None:
    """Under pytest the run-time checks refuse these first; users see the library's own words.

    Regression: a number for `components`, `layers` or `heads` was "object is not iterable".
    """
    program = r"""
from graftlens.graft import Graft
for rule in (
    {"source": 5, "at": "last"},
    {"source": False, "at": "last"},
    {"source": "sft", "at": 1.5},
    {"source": "sft", "at": {"a": 1}},
    {"source": "sft", "at": ["first", "last"]},
    {"source": "sft", "at": "last", "components": "q", "heads": ["0-1"]},
    {"source": "sft", "at": "last", "components": 3},
    {"source": "sft", "at": "last", "components": {"o": 1}},
    {"source": "sft", "at": "last", "layers": 1.5},
    {"source": "sft", "at": "last", "layers": {"a": 1}},
    {"source": "sft", "at": "last", "components": "q", "heads": 1.5},
):
    try:
        print("accepted", Graft.from_list([rule]))
    except ValueError as error:
        print(error)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed == [
        f"source=5 is not a source name. {_NAMES}",
        f"source=False is not a source name. {_NAMES}",
        "at=1.5 is not a position. "
        'Write spans ("first_entity + last"), or token positions ([0, -1]).',
        "at={'a': 1} is not a position. "
        'Write spans ("first_entity + last"), or token positions ([0, -1]).',
        f"at=['first', 'last']: 'first' {_IN_LISTS}",
        f"heads=['0-1']: '0-1' {_IN_LISTS}",
        'components=3 is a int. Write names, as "o + mlp" or ["o", "mlp"].',
        'components={\'o\': 1} is a dict. Write names, as "o + mlp" or ["o", "mlp"].',
        "layers=1.5 is a float. "
        'Write a group ("upper_half"), numbers ([3, 4]) or a range ("8-15").',
        "layers={'a': 1} is a dict. "
        'Write a group ("upper_half"), numbers ([3, 4]) or a range ("8-15").',
        'heads=1.5 is a float. Write numbers ([0, 2]) or a range ("0-3").',
    ]
