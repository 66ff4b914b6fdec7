"""Configs that were read as something else than what stands there, and sizes without bounds."""

import dataclasses
import math
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeTiny
from hypothesis import given
from hypothesis import strategies as st

from graftlens import cli, plainyaml
from graftlens.configfile import ConfigError, overridden, read_settings, read_yaml, settings_from
from graftlens.finetune import FinetuneConfig
from graftlens.graft import Graft, named_grafts
from graftlens.positions import Complement
from graftlens.sweep.config import SweepConfig
from graftlens.sweep.grid import MAX_GRAFTS, Dropout, Grid

GOOD: dict[str, Any] = {
    "sources": {"pre": "./pre", "sft": "./sft"},
    "prompts": [{"template": "It was", "answer": " a"}],
    "grafts": {"LT": "sft @ last"},
}


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text)
    return str(caught.value)


# -- numbers (W12) -----------------------------------------------------------------------------

ODD = (
    *("08", "010", "007", "1:30", "1:3", "12:30:45", "-1:30", "0o17", "0x1F", "0b101", "1_000"),
    *("1:30.5", "1_000.5", "0_9", "+08", "00"),
)


@pytest.mark.parametrize("number", ODD)
@pytest.mark.parametrize("where", ["seed: {}", "layers: [{}]", "[0, {}]", "{}: a", "a: !!int {}"])
def test_only_plain_decimal_numbers(number: str, where: str) -> None:
    """YAML 1.1 read `[1:3]` as layer 63, `1:30` as 90, `010` as 8, `1_000` as 1000."""
    text = where.format(number)
    said = refused(text)
    assert f"{number!r} is not a plain decimal number" in said
    assert said.startswith(
        f"line 1, column {text.index(number if '!!' not in text else '!!') + 1}:"
    )
    assert said.endswith("if it is text.")


@pytest.mark.parametrize("number", ODD)
def test_the_same_in_quotes_is_a_text(number: str) -> None:
    assert read_yaml(f"a: '{number}'") == {"a": number}
    assert read_yaml(f"a: !!str {number}") == {"a": number}


@pytest.mark.parametrize("key", ["seed", "grids.0.layers", "metrics.top_k", "limit"])
def test_overrides_are_read_alike(key: str) -> None:
    """`seed=1:30` was 90, `grids.0.layers=[1:3]` layer 63."""
    for given_ in ("1:30", "[1:3]", "010"):
        with pytest.raises(
            ConfigError, match=r"this override cannot be applied: line 1, .* plain dec"
        ):
            overridden({"grids": [{}]}, [f"{key}={given_}"])


def test_a_graft_s_yaml_is_read_alike() -> None:
    """`Graft.from_yaml` had PyYAML's own loader."""
    with pytest.raises(ValueError, match=r"is not YAML \('1:3' is not a plain decimal number"):
        Graft.from_yaml("[{source: sft, at: last, layers: [1:3]}]")
    with pytest.raises(ValueError, match=r"the key 'at' appears twice"):
        Graft.from_yaml("[{source: sft, at: last, at: all}]")


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_whole_numbers_read_back(number: int) -> None:
    assert read_yaml(f"a: {number}") == {"a": number}


def test_numbers_that_go_on_working() -> None:
    text = "[0, -3, +5, 0.5, -0.5, 5., 1.5e+3, .inf, -.inf, 1e-4]"
    assert read_yaml(text)[:9] == [0, -3, 5, 0.5, -0.5, 5.0, 1500.0, math.inf, -math.inf]
    assert math.isnan(read_yaml(".nan"))
    for rate in ("3e-4", "3.0e-4", "0.0003", "3E-04"):
        made = settings_from(
            FinetuneConfig, read_yaml(f"{{model: m, output: o, learning_rate: {rate}}}")
        )
        assert made.learning_rate == 3e-4
    assert read_yaml("[~, null, true, no, on]") == [None, None, True, False, True]


def test_a_date_is_a_text() -> None:
    """It was a date object, which no key takes."""
    assert read_yaml("[2024-01-01, 2024-01-01 10:00:00, =]") == [
        "2024-01-01",
        "2024-01-01 10:00:00",
        "=",
    ]
    with pytest.raises(ConfigError, match=r"seed: '2024-01-01' should be a valid integer"):
        settings_from(SweepConfig, GOOD | read_yaml("seed: 2024-01-01"))


def test_a_truth_value_for_a_text_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"answer: False should be text\. Put it in quotes\. In YAML"
    ):
        settings_from(SweepConfig, GOOD | read_yaml("prompts: {template: It, answer: no}"))


@pytest.mark.parametrize("number", ["9223372036854775808", "-9223372036854775809", "9" * 5000])
def test_a_number_that_is_too_large(number: str) -> None:
    """Of 4,300 digits and more the user read about `sys.set_int_max_str_digits`."""
    said = refused(f"seed: {number}")
    assert said.endswith("is too large a number: 2^63 - 1 is the largest.")
    assert len(said) < 500


# -- keys, tags, texts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, b: 2, a: 3}", "line 1, column 14: the key 'a' appears twice."),
        ('{a: 1, "a": 3}', "line 1, column 8: the key 'a' appears twice."),
        ("{<<: {a: 1}, <<: {a: 2}}", "the key '<<' appears twice."),
        ("{[a]: 1, [a]: 2}", "line 1, column 2: a list or a mapping cannot be a key. Write text."),
        ("{{a: 1}: 1}", "line 1, column 2: a list or a mapping cannot be a key. Write text."),
        ("? [a]\n: 1", "line 1, column 3: a list or a mapping cannot be a key. Write text."),
        ("a: !!python/name:os.system x", "could not determine a constructor for the tag"),
        ("a: !!binary aGk=", "could not determine a constructor for the tag"),
        ("a: !!bool maybe", "could not determine a constructor for the tag"),
        ("a: !mine x", "could not determine a constructor for the tag '!mine'"),
        ("a: !!int x", "'x' is not a plain decimal number"),
        ("a: !!float x", "'x' is not a plain decimal number"),
        ("a: &a [*a]", "line 1, column 8: the alias *a is inside its own value."),
        ("a: &a {b: [*a]}", "the alias *a is inside its own value."),
        ("a: *b", "found undefined alias"),
        ("a:\n  b\x07", "line 2, column 4: the character '\\x07' is not allowed in YAML."),
    ],
)
def test_what_yaml_would_take_is_refused_in_one_line(text: str, message: str) -> None:
    """Of `!!bool maybe` the user read "'maybe'", of a control character two lines of PyYAML's."""
    said = refused(text)
    assert message in said
    assert "\n" not in said


def test_merging_is_what_it_is_in_yaml() -> None:
    text = "{base: &b {x: 1, y: 1}, in: {a: &a {<<: *b, x: 2}}, c: {<<: *a, z: 3}}"
    assert read_yaml(text) == {
        "base": {"x": 1, "y": 1},
        "in": {"a": {"x": 2, "y": 1}},
        "c": {"x": 2, "y": 1, "z": 3},
    }, "and a merged mapping was refused for keys that stand twice"


def test_an_override_of_one_place_changes_one_place() -> None:
    """Where a value was an alias's, it changed all of them."""
    values = read_yaml("{a: &x {k: 1, l: [0]}, b: *x}")
    assert overridden(values, ["a.k=2", "a.l.0=5"]) == {
        "a": {"k": 2, "l": [5]},
        "b": {"k": 1, "l": [0]},
    }
    assert values == {"a": {"k": 1, "l": [0]}, "b": {"k": 1, "l": [0]}}


def test_a_character_in_two_escapes_is_one_character() -> None:
    assert read_yaml('"\\ud83d\\ude00"') == "\U0001f600"


HALVES: list[dict[str, Any]] = [
    {"grafts": {"a\ud800": "none"}},
    {"grids": [{"name": "a\udcff"}]},
    {"sources": {"pre": "./\ud800", "sft": "./sft"}},
    {"prompts": [{"template": "It \ud800", "answer": " a"}]},
    {"prompts": [{"template": "{x}", "answer": " a", "fields": {"x": "\udfff"}}]},
    {"prompts": [{"template": "It", "answer": "\ud800"}]},
    {"base": "\ud800"},
    {"tokenizer": "\ud800"},
    {"dataset": {"path": "x", "name": "\ud800"}},
    {"grafts": {"a": "sft @ \ud800"}},
]


@pytest.mark.parametrize("changes", HALVES, ids=ascii)
def test_half_of_a_character_is_refused(changes: dict[str, Any]) -> None:
    """A graft's name with a lone surrogate was found when half of the folder was written."""
    with pytest.raises(
        ConfigError, match=r"contains half of a character \(a lone surrogate\)"
    ) as caught:
        settings_from(SweepConfig, GOOD | changes)
    str(caught.value).encode()


def test_half_of_a_character_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        'sources: {pre: a, sft: b}\nprompts: {template: a, answer: b}\ngrafts: {"x\\ud800": none}'
    )
    with pytest.raises(ConfigError, match="half of a character"):
        read_settings(SweepConfig, path)
    path.write_text(path.read_text().replace("\\ud800", ""))
    with pytest.raises(ConfigError, match="half of a character"):
        read_settings(SweepConfig, path, ["grafts.x=sft @ all : o : \udcff"])
    with pytest.raises(ConfigError, match=r"the character '\\udcff' is not allowed in YAML"):
        read_settings(SweepConfig, path, ["base=\udcff"])


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31m", "a\u2028b", "\x00", " ", ""])
def test_a_graft_s_name_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is a graft's name and "):
        settings_from(SweepConfig, GOOD | {"grafts": {name: "none"}})
    with pytest.raises(ConfigError, match=r"grids\.0\.name: .*is a graft's name and "):
        settings_from(SweepConfig, GOOD | {"grids": [{"name": name}]})
    with pytest.raises(ValueError, match=r"is a graft's name and "):
        named_grafts({name: "none"})
    if name:
        with pytest.raises(ConfigError, match=r"is the name of a set of prompts and "):
            settings_from(SweepConfig, GOOD | {"dataset": {"path": "x", "name": name}})


def test_names_in_any_script_stay() -> None:
    for name in ("FE+LT", "(FE+LT)^C", "東京", "\U0001f469\u200d\U0001f680", "נָקוּד", "a: b / c"):
        assert list(settings_from(SweepConfig, GOOD | {"grafts": {name: "none"}}).grafts) == [name]


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graft", "message"),
    [
        ("sft @ last : q : 0-30000000", "layers='0-30000000': no model has 10,000 layers."),
        ("sft @ last : q : 10000", "layers='10000': no model has 10,000 layers."),
        ("sft @ last : q : all : 0-30000000", "heads='0-30000000': no model has 10,000 heads."),
        ("sft @ last : q : " + "9" * 5000, "no model has 10,000 layers."),
        ("sft @ last : q : " + "+".join(["0-9999"] * 999), "no model has 10,000 layers."),
        ("sft @ last : q : " + ",".join(["0-9999"] * 999), "no model has 10,000 layers."),
        ("sft @ " + "(" * 300 + "last" + ")" * 300, "nested more than 50 deep."),
        ("sft @ " + "~" * 3000 + "last", "nested more than 50 deep."),
        ("sft @ " + "~(" * 400 + "last" + ")" * 400, "nested more than 50 deep."),
        ("sft @ last#" + "9" * 5000, "expected a span"),
        ("sft @ [" + "9" * 5000 + "]", "whole numbers, such as [0, -1]"),
        ("|".join(["sft @ last"] * 20_000), "a graft of 20,000 rules; at most 10,000 are allowed."),
        ("x" * 2_000_000, "has 2,000,000 characters; at most 1,000,000 are allowed."),
        ("sft @ last : " + "z" * 500_000, "unknown component 'zzz"),
        ("sft @ last : q : " + "z" * 500_000, "unknown layer group 'zzz"),
        ("z z" * 100_000 + "@ last", "is not a source name."),
        ("sft @ " + "x" * 500_000 + " y", "expected"),
    ],
    ids=range(17),
)
def test_a_graft_s_size_is_known_before_it_is_made(graft: str, message: str) -> None:
    """`0-30000000` took 18 GB, 300 parentheses ended in "maximum recursion depth exceeded"."""
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        Graft.parse(graft)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 10_000_000
    said = str(caught.value)
    assert message.removesuffix("expected") in said or "nothing joins" in said
    assert len(said) < 2000


def test_numbers_given_as_numbers_are_bounded_too() -> None:
    with pytest.raises(ValueError, match="no model has 10,000 layers"):
        Graft.rule("sft", layers=[3, 10**9])
    with pytest.raises(ValueError, match="no model has 10,000 heads"):
        Graft.rule("sft", components="q", heads=[10**30])
    assert Graft.rule("sft", components="q", layers="0-9999").rules[0].layers[-1] == 9999


def test_nesting_that_a_person_writes_stays() -> None:
    at = Graft.parse("sft @ " + "~(" * 25 + "last" + ")" * 25).rules[0].at
    assert isinstance(at, Complement)
    assert (
        Graft.parse("sft @ " + " + ".join(["(last)"] * 2000)).rules[0]
        == Graft.parse("sft @ last").rules[0]
    )


#: Each is a list of ten times the one before.
LEVELS = "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 900 + "]" * 900, "lists and mappings are nested more than 100 levels deep."),
        ("[" * 100_000, "lists and mappings are nested more than 100 levels deep."),
        ("{a: " * 900 + "1" + "}" * 900, "nested more than 100 levels deep."),
        ("- " * 3000 + "a", "nested more than 100 levels deep."),
        ("a: &a [1,2,3,4,5,6,7,8,9,0]\n" + LEVELS, "expand to more than 1,000,000 characters."),
        (
            "a: &a {x: 1}\n" + LEVELS.replace("[", "{<<: [").replace("]", "]}"),
            "expand to more than",
        ),
        ("x: &a " + "y" * 50_000 + "\nb: [" + "*a, " * 100 + "]", "expand to more than 1,000,000"),
        ("a" * 10_000_001, "10,000,001 characters, which is more than the 10,000,000 of a config."),
    ],
    ids=range(8),
)
def test_a_config_s_size_is_known_before_it_is_made(text: str, message: str) -> None:
    """900 lists ended in a recursion error, 7 levels of aliases in an error of 25 MB."""
    said = refused(text)
    assert message in said
    assert len(said) < 300


def test_a_few_aliases_stay() -> None:
    text = "a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b, *a]"
    assert read_yaml(text)["c"] == [[[1, 2], [1, 2]], [[1, 2], [1, 2]], [1, 2]]


def test_many_keys_are_looked_up_and_not_searched_for() -> None:
    """Each key was compared with all before it: 40,000 took 14 seconds."""
    compared = 0

    class Key(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    loader = plainyaml._Loader("{}")
    node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    node.value = [
        (yaml.ScalarNode("tag:yaml.org,2002:str", Key(f"k{i}")), node) for i in range(3000)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml.SafeLoader, "compose_mapping_node", lambda self, anchor: node)
        loader.compose_mapping_node(None)
    assert compared < 3000


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "x" * 5_000_000},
        {"seed": list(range(100_000))},
        {"x" * 5_000_000: 1},
        {f"key{i}": 1 for i in range(3000)},
        {"prompts": [{"template": "x"}] * 3000},
        {"grafts": {f"g{i}": "nonex" for i in range(3000)}},
        {"grafts": {"g": [{"source": "y" * 5_000_000, "at": "last last"}]}},
        {"grids": [{"components": "z" * 5_000_000}]},
        {"dtype": "z" * 5_000_000},
        {"base": {"a": "z" * 5_000_000}},
        {"metrics": "z" * 5_000_000},
    ],
    ids=range(11),
)
def test_an_error_is_never_long(changes: dict[str, Any]) -> None:
    """It repeated whatever it was given, once per problem."""
    with pytest.raises(ConfigError) as caught:
        settings_from(SweepConfig, GOOD | changes)
    assert len(str(caught.value)) < 60_000
    if len(changes) > 100 or any(
        len(v) == 3000 for v in changes.values() if isinstance(v, list | dict)
    ):
        assert str(caught.value).endswith("And 2950 more problems like these.")


def test_draws_are_bounded() -> None:
    """`draws: 100000000` ran without an end."""
    with pytest.raises(
        ConfigError, match=r"draws: 100000000 should be less than or equal to 100000"
    ):
        settings_from(SweepConfig, GOOD | {"grids": {"dropout": {"rates": [0.5], "draws": 10**8}}})
    assert Dropout(rates=(0.0, 0.5, 0.7, 1.0), draws=7).count == 16


@pytest.mark.parametrize(
    ("grid", "count"),
    [
        ({"dropout": {"rates": [0.1, 0.5, 0.9], "draws": 100_000}}, 300_000),
        ({"layers": {"windows": {"size": "1..n"}}, "heads": "each", "components": "q"}, 207_360),
        (
            {"positions": ["last", "bos", "all"] * 20, "layers": "each", "heads": "each",
             "components": ["q", "o", "k"]},
            60 * 80 * (64 + 64 + 8),
        ),
    ],
)  # fmt: skip
def test_a_grid_s_grafts_are_counted_before_they_are_made(
    tiny: MakeTiny, grid: dict[str, Any], count: int
) -> None:
    arch = tiny("llama").model.arch
    large = dataclasses.replace(arch, n_layers=80, n_heads=64, n_kv_heads=8)
    made = settings_from(Grid, grid).grafts(large, ("pre", "sft"))
    with pytest.raises(
        ValueError, match=rf"^this grid makes {count:,} grafts .*{MAX_GRAFTS:,} are"
    ):
        next(made)


@pytest.mark.parametrize("path", ["a." * 5000 + "b", "a" * 100_000])
def test_a_deep_override_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from(SweepConfig, overridden(GOOD, [f"{path}=1"]))
    assert len(str(caught.value)) < 3000


def test_a_seed_that_training_cannot_take() -> None:
    """NumPy said so when the model was loaded."""
    with pytest.raises(ConfigError, match="seed: 4294967296 should be less than 4294967296"):
        settings_from(FinetuneConfig, {"model": "m", "output": "o", "seed": 2**32})


# -- warnings on the command line --------------------------------------------------------------


def test_a_warning_is_a_sentence_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--answer` without its space showed a path of the source and a line of code."""

    def command(**_: Any) -> int:
        warnings.warn("the answer 'Bo' continues the prompt's last word.", stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "app", command)
    shown = warnings.showwarning
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().err == (
        "graftlens: warning: the answer 'Bo' continues the prompt's last word.\n"
    )
    assert warnings.showwarning is shown


@pytest.mark.parametrize("setting", ["epochs", "rank"])
def test_sizes_of_a_finetuning_are_bounded(setting: str) -> None:
    """Regression: `epochs: 1000000000000` took all memory (a name for each checkpoint), and so did
    such a rank."""
    large = {setting: 10**12} if setting == "epochs" else {"lora": {setting: 10**12}}
    with pytest.raises(
        ConfigError, match=rf"{setting}: 1000000000000 should be less than or equal"
    ):
        settings_from(FinetuneConfig, {"model": "m", "output": "o", **large})
