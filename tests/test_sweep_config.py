"""The sweep's config: what it expands to, and that whatever is wrong is said before a model loads.

No checkpoint here has its weights: `check` must do without them.
"""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from chattemplates import TEMPLATES
from command import graftlens
from families import save_checkpoint, tiny_model, tiny_sources
from toytokenizers import gpt2_style, llama3_style

from graftlens.data import MoviesConfig, evaluation_prompts, make_dataset, make_facts, save_dataset
from graftlens.graft import Graft
from graftlens.model.load import preview
from graftlens.sweep import launch, runner
from graftlens.sweep.config import Checked, ConfigError, SweepConfig, check, load_config
from graftlens.sweep.description import describe

EXAMPLES = sorted((Path(__file__).parent.parent / "experiments" / "sweeps").glob("*.yaml"))

N_LAYERS, N_HEADS, N_KV = 3, 4, 2  # of the tiny llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints without weights, and files that configs name."""
    root = tmp_path_factory.mktemp("sweep")
    tokenizer = gpt2_style()
    vocab = len(tokenizer)
    for name, model in tiny_sources("llama", ("pre", "sft", "third"), 1, vocab).items():
        save_checkpoint(model, root / name, tokenizer)
    save_checkpoint(tiny_model("gpt2", 1, vocab), root / "gpt2", tokenizer)
    for name in ("olmo_a", "olmo_b"):
        save_checkpoint(tiny_model("olmo", 1, vocab), root / name, tokenizer)
    for name in ("mute_a", "mute_b"):
        save_checkpoint(tiny_model("llama", 1, vocab), root / name)
    save_checkpoint(tiny_model("llama", 1, vocab), root / "foreign")
    llama3_style().save_pretrained(root / "foreign")
    save_checkpoint(tiny_model("llama", 1, vocab), root / "falcon")
    (root / "falcon" / "config.json").write_text('{"model_type": "falcon"}')
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "empty").mkdir()
    for weights in root.glob("*/*.safetensors"):
        weights.unlink()

    (root / "some.jsonl").write_text(
        '{"template": "{x} met", "fields": {"x": "Ann"}, "answer": " Bo", "name": "met"}\n\n'
        '{"template": "Who met {x}?", "fields": {"x": "Cy"}, "answer": " Di"}\n'
    )
    (root / "some.yaml").write_text('- {template: "It was", answer: " the lead"}\n')
    (root / "bad.jsonl").write_text(
        '{"template": "It was", "answer": " a"}\n{"template": "x",\n{"template": "It was"}\n'
    )
    (root / "lacking.jsonl").write_text('{"template": "It was"}\n{"template": "{y}", "answer": 3}')
    (root / "none.jsonl").write_text("\n")
    (root / "mapping.yaml").write_text("template: It was\n")
    return root


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are taken from the working directory."""
    monkeypatch.chdir(folder)


GOOD: dict[str, Any] = {
    "sources": {"pre": "./pre", "sft": "./sft"},
    "prompts": [
        {
            "template": "{first_entity} acted alongside",
            "fields": {"first_entity": "Anders Lindqvist"},
            "answer": " Renée",
        }
    ],
    "grafts": {"FE": "sft @ first_entity"},
}


def made(changes: str = "", tmp: Path = Path("sweep.yaml"), *overrides: str) -> Checked:
    """The good config with some of its keys given anew (`key: …`) or taken out (`key: OUT`)."""
    values = GOOD | (yaml.safe_load(changes) or {})
    tmp.write_text(yaml.safe_dump({k: v for k, v in values.items() if v != "OUT"}, sort_keys=False))
    return check(load_config(tmp, overrides))


# -- what is wrong -----------------------------------------------------------------------------

PROMPT = '{template: "{x} met", fields: {x: Ann}, answer: " Bo"}'

#: Keys of the config given anew -> what is said about them.
BAD_VALUES = {
    # keys
    "graft: {a: none}": r"sweep.yaml: unknown key 'graft'. Allowed: sources .*"
    r"Did you mean 'grafts'\?",
    "metrics: {topk: 3}": r"metrics: unknown key 'topk'. "
    r"Allowed: top_k answers distractors measures. Did you mean 'top_k'\?",
    "grids: {component: q}": r"grids.0: unknown key 'component'. .*Did you mean 'components'\?",
    "grids: [{}, {layers: {window: {size: 2}}}]": r"grids.1.layers: unknown key 'window'. Allowed: "
    r"windows. Did you mean 'windows'\?",
    "grids: {layers: {windows: {sizes: 2}}}": r"grids.0.layers.windows: unknown key 'sizes'. "
    r"Allowed: size stride.",
    "dataset: {movies: {facts: 9}}": r"dataset.0.movies: unknown key 'facts'. Allowed: n_facts",
    "dataset: {films: 9}": r"dataset.0: unknown key 'films'. Allowed: movies make path direction",
    "prompts: {template: It was, anwser: a}": r"prompts.0: unknown key 'anwser'. .*'answer'\?",
    "prompts: {file: some.jsonl, answer: a}": r"prompts.0: unknown key 'answer'. Allowed: file.",
    "sources: OUT": r"sweep.yaml: sources: this key is missing. Name -> checkpoint folder",
    "grids: {layers: {windows: {}}}": r"grids.0.layers.windows.size: this key is missing. Layers",
    # types
    "seed: one": r"seed: 'one' should be a valid integer",
    "seed: -1": r"seed: -1 should be greater than or equal to 0\.",
    "seed: true": r"seed: seed=True is a boolean, but a whole number is expected",
    "shards: 0": r"shards: 0 should be greater than or equal to 1",
    "shards: 1.5": r"shards: 1.5 should be a valid integer",
    "row_budget: false": r"row_budget=False is a boolean",
    "dtype: float8": r"dtype: 'float8' should be 'float32', 'float64', 'bfloat16' or 'float16'",
    "prepend_bos: 7": r"prepend_bos: 7 should be a valid boolean",
    "metrics: 10": r"metrics: 10 should be a mapping",
    "metrics: {top_k: 0}": r"metrics.top_k: 0 should be greater than or equal to 1",
    "metrics: {top_k: 100000}": r"metrics.top_k: 100000 is more than the vocabulary's \d+",
    "tokenizer: [a]": r"tokenizer: \['a'\] should be text. Put it in quotes.",
    # sources
    "sources: {pre: ./pre}": r"sources: 1 given. Give two or more, the base first",
    "sources: [./pre, ./sft]": r"sources: \['./pre', './sft'\] should be a mapping",
    "sources: {pre: ./pre, no: ./sft}": r"sources: the key False is not text. Put it in quotes.",
    "sources: {pre: ./pre, my sft: ./sft}": r"sources: source='my sft' is not a source name.",
    "sources: {pre: ./pre, sft: 3}": r"sources.sft: 3 should be text. Put it in quotes.",
    "sources: {pre: ./pre, sft: ''}": r"sources: sft is empty. Write a folder or a hub id",
    "sources: {pre: ./pre, sft: ./nowhere}": r"sources: source 'sft': there is no folder ./nowhere",
    "sources: {pre: ./pre, sft: ./empty}": r"source 'sft': folder .*empty has no config.json",
    "sources: {pre: ./pre, sft: ./gpt2}": r"'pre' .* 'sft' .* differ in architecture: model_type",
    "sources: {pre: ./pre, sft: ./foreign}": r"the tokenizer of 'sft' contradicts its embedding of",
    "sources: {pre: ./pre, sft: ./falcon}": r"model_type 'falcon' is not supported. Supported: gpt",
    "sources: {pre: ./adapter, sft: ./sft}": r"source 'pre', the base, is a PEFT adapter. Put the",
    "sources: {pre: ./mute_a, sft: ./mute_b}": r"no source has a tokenizer. Name one with the",
    "tokenizer: ./mute_a": r"tokenizer='./mute_a': this folder does not hold a tokenizer",
    # prompts
    "prompts: OUT": r"no prompts: give dataset or prompts",
    "prompts: []": r"no prompts: give dataset or prompts",
    "prompts: It was": r"prompts: 'It was': write a list of prompts, file: and the name",
    "prompts: [It was]": r"prompts.0: 'It was' should be a mapping with keys of: template mess",
    "prompts: {template: It was}": r"prompts.0.answer: this key is missing. The text that should",
    "prompts: {template: It was, answer: 1984}": r"prompts.0.answer: 1984 should be text"
    r". Put it in quotes.",
    "prompts: {template: It was, answer: ''}": r"prompts.0: answer='': write a text that is not e",
    'prompts: {template: "{y} is", answer: a}': r"prompts.0: template .* needs the field 'y'; gi",
    'prompts: {template: "{", answer: a}': r"prompts.0: template '{' is malformed",
    'prompts: {template: "{last}", answer: a, fields: {last: x}}': r"prompts.0: .* 'last' is a span"
    r" that every prompt has",
    "prompts: {template: It was, answer: a, distractors: b}": r"prompts.0.distractors: 'b' should "
    r"be a list",
    "{prompts: {template: 'It was ', answer: Anders}, grafts: {a: sft @ last}}": r"none of the 1 "
    r"prompts can be run. The first: 'Anders' after 'It was ' does not begin a token",
    "prompts: {file: away.jsonl}": r"prompts.0: .*No such file.*away.jsonl",
    "prompts: {file: bad.jsonl}": r"prompts.0.line 2: Expecting property name",
    "prompts: {file: lacking.jsonl}": r"(?s)prompts.0.line 1.answer: this key is missing.*"
    r"prompts.0.line 2.answer: 3 should be text",
    "prompts: {file: none.jsonl}": r"prompts.0: none.jsonl does not hold a prompt",
    "prompts: {file: mapping.yaml}": r"prompts.0: mapping.yaml holds a dict, not a list of prompts",
    "prompts: [{file: some.yaml}, {file: some.yaml}]": r"prompts.1: two sets of prompts are called "
    r"'some.yaml'",
    # datasets
    "dataset: {}": r"dataset.0: none of movies, make and path is given",
    "dataset: {movies: {}, path: films}": r"dataset.0: movies and path are given",
    "dataset: {path: ./empty}": r"dataset.0: empty is not a dataset of facts: it has no tr",
    "dataset: {movies: {n_facts: 0}}": r"dataset.0.movies.n_facts: 0 should be greater than or eq",
    "dataset: {movies: {n_facts: 3}, distractors: 5}": r"dataset.0: distractors=5 of 3 facts",
    "dataset: {movies: {n_facts: 9}, direction: up}": r"dataset.0.direction: 'up' should be 'ab' o",
    "dataset: [{movies: {n_facts: 9}}, {movies: {n_facts: 8}}]": r"dataset.1: two sets of prompts "
    r"are called 'movies seed 0'. Rename one",
    "templates: [qa]": r"templates: these are templates of a dataset, but no dataset is",
    "{dataset: {movies: {n_facts: 9}}, templates: [q]}": r"templates: unknown evaluation template "
    r"'q'. Allowed: headline qa .*Did you mean 'qa'\?",
    "{dataset: {movies: {n_facts: 9}}, templates: [qa, qa]}": r"templates: .*name each template on",
    "{dataset: {movies: {n_facts: 9}}, templates: []}": r"templates: \[\] .*at least 1 entry, not",
    # grafts
    "grafts: OUT": r"no grafts: give grafts or grids",
    "{grafts: {}, grids: []}": r"no grafts: give grafts or grids",
    "grafts: [none]": r"grafts: \['none'\] should be a mapping",
    "grafts: {a: }": r"grafts.a: None is not a graft. Write one line of text, or a list of rules",
    "grafts: {a: {sft @ last: o}}": r"grafts.a: unknown key 'sft @ last' in rule .*"
    r"Put a one-line rule in quotes",
    "grafts: {a: [{sft @ last: o}]}": r"grafts.a: unknown key 'sft @ last' .*in quotes",
    "grafts: {a: sft last}": r"grafts.a: graft 'sft last': 'sft last' is not a rule. Write .*pos",
    "grafts: {a: 'stf @ last'}": r"grafts.a: no source 'stf'. There are: pre sft. Did you",
    "grafts: {a: 'sft @ last : mpl'}": r"grafts.a: unknown component 'mpl'. Allowed: embed .*'mlp'",
    "grafts: {a: 'sft @ last : q_norm'}": r"grafts.a: llama has no component 'q_norm'. Its comp",
    "{sources: {pre: ./olmo_a, sft: ./olmo_b}, grafts: {a: 'sft @ last : ln'}}": r"grafts.a: "
    r"component group 'ln' is empty in olmo",
    "grafts: {a: 'sft @ last : o : 3'}": r"grafts.a: rule .*: no layer 3. llama here has 3 layers",
    "grafts: {a: 'sft @ last : o : uper_half'}": r"grafts.a: unknown layer group 'uper_half'.*Did",
    "grafts: {a: 'sft @ last : o : first_eighth'}": r"layer group 'first_eighth' is empty in a mod",
    "grafts: {a: 'sft @ last : o : 2-1'}": r"grafts.a: .*the range '2-1' runs backwards. Write it",
    "grafts: {a: 'sft @ last : embed : 1'}": r"grafts.a: .*embed is outside the layers",
    "grafts: {a: 'sft @ last : o : all : 4'}": r"grafts.a: .*no head 4 in o, which has 4 heads",
    "grafts: {a: 'sft @ last : k : all : 2'}": r"no head 2 in k, which has 2 key-value heads here",
    "grafts: {a: 'sft @ frist_entity'}": r"grafts.a: none of 1 prompts can run it. .*no span "
    r"'frist_entity' here. Spans of this prompt: first_entity bos last all prompt. Did",
    "grafts: {a: 'sft @ last & bos'}": r"grafts.a: none of 1 prompts .*selects none of the \d+ pos",
    "grafts: {a: 'sft @ ~all'}": r"grafts.a: none of 1 prompts can run it.*selects none",
    "grafts: {a: 'sft @ [99]'}": r"grafts.a: .*position 99 is outside the prompt, which has",
    "grafts: {a: 'sft @ first_entity#2'}": r"grafts.a: .*no occurrence first_entity#2: span 'fi",
    "grafts: {none: sft @ last}": r"grafts.none: two grafts are called 'none': 'none' and 'sft @ l",
    "{grafts: {sft @ last: sft @ bos}, grids: {positions: last}}": r"grids.0: two grafts are called"
    r" 'sft @ last': 'sft @ bos' and 'sft @ last'. Rename one",
    "base: nonne": r"base: no graft is called 'nonne'. Write the name of .*Did you mean 'none'\?",
    "full: SFT": r"full: no graft is called 'SFT'.",
    "{base: FE, full: FE}": r"full: 'FE' is also the base, and recovery is measured between two",
    # grids
    "grids: 3": r"grids: 3 should be a list",
    "grids: [3]": r"grids.0: 3 should be a mapping",
    "grids: {components: mpl}": r"grids.0.components: unknown component 'mpl'. Allowed: .*'mlp'\?",
    "grids: {components: []}": r"grids.0.components: the list is empty. Name an entry, or leave",
    "grids: {components: [q, 3]}": r"grids.0.components: 3 is not a component",
    "grids: {positions: last +}": r"grids.0.positions: at='last \+': a span or \[positions\] is mi",
    "grids: {positions: }": r"grids.0.positions: at=None is not a position",
    "grids: {positions: {last: o}}": r"grids.0.positions: at=\{'last': 'o'\} is not a position",
    "grids: {layers: upper}": r"grids.0.layers: unknown layer group 'upper'. Allowed: all",
    "grids: {layers: [-1]}": r"grids.0.layers: layers=-1: layers are counted from 0",
    "grids: {layers: [[0, true]]}": r"grids.0.layers: layers=\[True\]: True is not a whole number",
    "grids: {layers: [0, 7]}": r"grids.0: rule 'sft @ all : all : 7': no layer 7.*0 to 2\.$",
    "grids: {layers: [8, 9], components: [q, k]}": r"no layer 8.* \(And 3 more grafts like it.\)",
    "grids: {heads: each}": r"grids.0: heads=\[0\] with components all: all cannot be split by",
    "grids: {heads: each, components: q + k}": r"grids.0: heads of 'q \+ k': q and o have 4 heads",
    "grids: {heads: first, components: q}": r"grids.0.heads: heads='first': 'first' is not a num",
    "grids: {heads: , components: q}": r"grids.0.heads: heads is empty. Name heads, or leave",
    "grids: {heads: [[0, 4]], components: o}": r"grids.0: .*no head 4 in o, which has 4 heads",
    "grids: {source: task}": r"grids.0.source: no source 'task'. There are: pre sft",
    "grids: {source: [no]}": r"grids.0.source: False is not a source's name. Put it in quotes",
    "grids: {base: task @ last}": r"grids.0.base: no source 'task'",
    "grids: {base: [{last: o}]}": r"grids.0.base: unknown key 'last' in rule",
    "grids: {positions: second_entity}": r"grids.0: none of 1 prompts can run it.*no span 'second",
    "grids: {layers: {windows: 3}}": r"grids.0.layers.windows: 3 should be a mapping",
    "grids: {layers: {windows: {size: 4}}}": r"grids.0: windows of size 4: there are 3 layers here",
    "grids: {layers: {windows: {size: 2..4}}}": r"windows of size 2..4: there are 3 layers here, s",
    "grids: {layers: {windows: {size: 4..n}}}": r"windows of size 4..n: there are 3 layers here",
    "grids: {heads: {windows: {size: 3}}, components: k}": r"windows of size 3: there are 2 heads",
    "grids: {layers: {windows: {size: 0}}}": r"grids.0.layers.windows.size: 0 is not a size: s",
    "grids: {layers: {windows: {size: 0..2}}}": r"windows.size: '0..2' is not a size: sizes coun",
    "grids: {layers: {windows: {size: 00..2}}}": r"windows.size: '00..2' is not a size",
    "grids: {layers: {windows: {size: 3..1}}}": r"'3..1' runs backwards. Write 1..3",
    "grids: {layers: {windows: {size: n..2}}}": r"'n..2' is not a size",
    "grids: {layers: {windows: {size: true}}}": r"windows.size: size=True is a boolean",
    "grids: {layers: {windows: {size: []}}}": r"windows.size: \[\] is not a size",
    "grids: {layers: {windows: {size: [1, x]}}}": r"windows.size: \[1, 'x'\] is not a size",
    "grids: {layers: {windows: {size: 2, stride: 0}}}": r"windows.stride: 0 should be greater than",
    "grids: {layers: {windows: {size: 2, stride: true}}}": r"stride=True is a boolean",
}


@pytest.mark.parametrize("changes", BAD_VALUES)
def test_a_bad_value_is_refused(changes: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=BAD_VALUES[changes]):
        made(changes, tmp_path / "sweep.yaml")


#: The whole text of a config -> what is said about it.
BAD_TEXTS = {
    "": r"sweep.yaml: the file is empty. Write keys and values",
    "# nothing\n": r"sweep.yaml: the file is empty",
    "- a\n- b\n": r"sweep.yaml: a mapping of keys is expected, not a list",
    "just text": r"sweep.yaml: a mapping of keys is expected, not a str",
    "sources: {pre: a, sft: b": r"sweep.yaml: line 1, column 25: expected ',' or '}', but got",
    "grafts:\n  a: sft @ last : o\n": r"line 2, column 17: mapping values are not allowed here. "
    r'Put quotes around text that contains " : ", such as "sft @ last : o"',
    "grafts:\n  a: @last\n": r"line 2, column 6: found character '@' that cannot start any token",
    "sources:\n\tpre: a\n": r"line 2, column 1: found character '\\t' that cannot start any token",
    "seed: 1\nseed: 2\n": r"sweep.yaml: line 2, column 1: the key 'seed' appears twice",
    "grafts:\n  a: none\n  a: sft @ all\n": r"line 3, column 3: the key 'a' appears twice",
    "grafts:\n  a:\n    sft @ last : o\n": r"grafts.a: unknown key 'sft @ last' .*in quotes",
    "prompts:\n- template: It was\n  answer: no\n": r"prompts.0.answer: False should be text",
    "x: !!python/object/apply:os.getcwd []\n": r"could not determine a constructor for the tag",
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=BAD_TEXTS[text]):
        load_config(tmp_path / "sweep.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"away.yaml: there is no such file"):
        load_config(tmp_path / "away.yaml")
    with pytest.raises(ConfigError, match=r"the file could not be read \(.*directory"):
        load_config(tmp_path)
    (tmp_path / "sweep.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match=r"sweep\.yaml: is not UTF-8 text .* Save it as UTF-8"):
        load_config(tmp_path / "sweep.yaml")


BAD_OVERRIDES = {
    "seed": r"seed: not an override. Write key=value, with dots into sections: metrics.top_k=5",
    "=3": r"=3: not an override",
    "metrics..top_k=3": r"not an override",
    "metrics.topk=3": r"metrics: unknown key 'topk'",
    "sed=3": r"sweep.yaml: unknown key 'sed'. .*Did you mean 'seed'\?",
    "seed=": r"seed: None should be a valid integer",
    "seed.x=3": r"seed.x=3: this override cannot be applied: seed is 0 and has no keys",
    "grids.4.layers=each": r"grids.4.layers=each: this override cannot be applied: grids is a "
    r"list of 1, so it has no entry '4'",
    "grids.x.layers=each": r"grids is a list of 1, so it has no entry 'x'",
    "grids.0.layers={windows: {size: 9}}": r"windows of size 9: there are 3 layers",
    "grids.0.layers=[1": r"this override cannot be applied: line 1, column 3: expected ',' or '\]'",
    "grafts.FE=sft @ first_entity : mpl": r"grafts.FE: unknown component 'mpl'",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=BAD_OVERRIDES[override]):
        made("{seed: 0, grids: [{layers: each}]}", tmp_path / "sweep.yaml", override)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(
            "{seed: x, grafts: {a: sft, b: 'sft @ last : z'}, grids: [{layers: no}, {heads: []}],"
            " prompts: [{template: a}, {template: '{b}', answer: c}], sources: {pre: x}}",
            tmp_path / "sweep.yaml",
        )
    assert [where.split(": ")[-1] for where, _ in caught.value.problems] == [
        "sources", "grafts.a", "grafts.b", "grids.0.layers", "grids.1.heads", "seed",
        "prompts.0.answer", "prompts.1",
    ]  # fmt: skip
    assert len(str(caught.value).splitlines()) == 8
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    with pytest.raises(ConfigError) as caught:
        made(
            "{grafts: {a: 'sft @ last : o : 9', b: sft @ x, c: sft @ last}, base: d,"
            " grids: {layers: {windows: {size: 5}}},"
            " dataset: {movies: {n_facts: 2}, distractors: 9}}",
            tmp_path / "sweep.yaml",
        )
    assert [where for where, _ in caught.value.problems] == [
        "dataset.0", "grids.0", "base", "grafts.a", "grafts.b",
    ]  # fmt: skip


# -- what is right -----------------------------------------------------------------------------


def names(checked: Checked) -> list[str]:
    return [named.name for named in checked.grafts]


def test_the_two_ends_are_added(tmp_path: Path) -> None:
    checked = made("", tmp_path / "s.yaml")
    assert [(n.name, str(n.graft)) for n in checked.grafts] == [
        ("none", "none"), ("sft @ all", "sft @ all"), ("FE", "sft @ first_entity"),
    ]  # fmt: skip
    assert (checked.base, checked.full) == ("none", "sft @ all")
    assert checked.duplicates == {}


def test_ends_that_are_given_keep_their_names(tmp_path: Path) -> None:
    text = "{grafts: {PRE: none, FE: sft @ first_entity, SFT: sft @ all}, %s}"
    checked = made(text % "seed: 0", tmp_path / "s.yaml")
    assert names(checked) == ["PRE", "FE", "SFT"]
    assert (checked.base, checked.full) == ("PRE", "SFT")
    checked = made(text % "base: none, full: FE", tmp_path / "s.yaml")
    assert (checked.base, checked.full) == ("PRE", "FE")
    assert names(checked) == ["PRE", "FE", "SFT"]


def test_equal_grafts_run_once_under_the_first_name(tmp_path: Path) -> None:
    checked = made(
        "{grafts: {a: 'sft @ last : o : 0-1', b: [{source: sft, at: last, components: [o],"
        " layers: [1, 0]}], z: none}, grids: {positions: [last], components: o,"
        " layers: [[0, 1], 2]}, base: z}",
        tmp_path / "s.yaml",
    )
    assert names(checked) == ["sft @ all", "a", "z", "sft @ last : o : 2"]
    assert checked.duplicates == {"b": "a", "sft @ last : o : 0-1": "a"}
    assert made("{grafts: {a: none, b: none}, full: b, base: FE}".replace(
        "a: none", "FE: sft @ last, a: none"), tmp_path / "s.yaml").full == "a"  # fmt: skip


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    checked = made(
        "{sources: {pre: ./pre, sft: ./sft, task: ./third}, grafts: OUT, grids: [{positions: "
        "[first_entity, first_entity + last, [0, -1], -1], components: [q, [q, o]], layers: "
        "[all, upper_half, 1, [0, 2], '0-1'], heads: [all, 3, [0, 2]]}]}",
        tmp_path / "s.yaml",
    )
    expected = [
        Graft.rule(source, at, components, layers, heads)
        for at, components, layers, heads, source in itertools.product(
            ["first_entity", "first_entity + last", [0, -1], [-1]],
            ["q", "q + o"],
            ["all", "upper_half", [1], [0, 2], [0, 1]],
            [None, [3], [0, 2]],
            ["sft", "task"],
        )
    ]
    assert [named.graft for named in checked.grafts[2:]] == expected
    assert names(checked)[2:] == [str(graft) for graft in expected]
    assert len(expected) == 4 * 2 * 5 * 3 * 2
    last = checked.grafts[-1]
    assert (last.source, last.span, last.component, last.layer, last.head) == (
        "task", "[-1]", "q + o", "0-1", "0,2",
    )  # fmt: skip


def test_an_axis_left_out_means_all(tmp_path: Path) -> None:
    checked = made("{grafts: OUT, grids: [{}, {positions: last}]}", tmp_path / "s.yaml")
    assert names(checked) == ["none", "sft @ all", "sft @ last"]
    none, everywhere, last = checked.grafts
    assert (none.source, none.span, none.component, none.layer, none.head) == (None,) * 5
    assert (everywhere.span, everywhere.component, everywhere.layer) == ("all", "all", "all")
    assert (last.source, last.span, last.head) == ("sft", "last", "all")


def test_each_layer_and_each_head(tmp_path: Path) -> None:
    checked = made(
        "{grafts: OUT, grids: [{positions: last, components: [q, v, k + v], layers: each,"
        " heads: each}]}",
        tmp_path / "s.yaml",
    )
    expected = [
        Graft.rule("sft", "last", components, [layer], [head])
        for components, n in (("q", N_HEADS), ("v", N_KV), ("k + v", N_KV))
        for layer in range(N_LAYERS)
        for head in range(n)
    ]
    assert [named.graft for named in checked.grafts[2:]] == expected


def windows(sizes: list[int], stride: int, n: int) -> list[list[int]]:
    """Every run of each size whose start is a multiple of the stride; by trying all."""
    return [
        list(range(start, start + size))
        for size in sizes
        for start in range(n)
        if start % stride == 0 and start + size <= n
    ]


@pytest.mark.parametrize(
    ("written", "sizes", "stride"),
    [
        ("{size: 1..n}", [1, 2, 3], 1),
        ("{size: 1..n, stride: 2}", [1, 2, 3], 2),
        ("{size: n}", [3], 1),
        ("{size: '2'}", [2], 1),
        ("{size: 2, stride: 1}", [2], 1),
        ("{size: 1..2, stride: 3}", [1, 2], 3),
        ("{size: 1 .. 2}", [1, 2], 1),
        ("{size: [1, 3]}", [1, 3], 1),
    ],
)
def test_windows_are_all_that_fit(
    written: str, sizes: list[int], stride: int, tmp_path: Path
) -> None:
    checked = made(
        f"{{grafts: OUT, grids: [{{positions: last, layers: {{windows: {written}}}}}]}}",
        tmp_path / "s.yaml",
    )
    expected = windows(sizes, stride, N_LAYERS)
    assert [n.graft for n in checked.grafts[2:]] == [
        Graft.rule("sft", "last", layers=run) for run in expected
    ]


def test_windows_of_heads_and_entries_beside_windows(tmp_path: Path) -> None:
    checked = made(
        "{grafts: OUT, grids: [{components: k, heads: [{windows: {size: 1..n}}, all]}, "
        "{components: o, heads: [{windows: {size: 3}}]}]}",
        tmp_path / "s.yaml",
    )
    expected = [Graft.rule("sft", "all", "k", heads=run) for run in windows([1, 2], 1, N_KV)]
    expected.append(Graft.rule("sft", "all", "k"))
    expected += [Graft.rule("sft", "all", "o", heads=run) for run in windows([3], 1, N_HEADS)]
    assert [named.graft for named in checked.grafts[2:]] == expected


def test_a_grid_over_a_base_with_a_prefix(tmp_path: Path) -> None:
    checked = made(
        "{grafts: OUT, grids: [{positions: last, layers: [0, 1], base: 'sft @ first_entity : mlp',"
        " name: over}]}",
        tmp_path / "s.yaml",
    )
    text = "sft @ first_entity : mlp | sft @ last : all : 1"
    assert names(checked)[3] == f"over: {text}"
    assert checked.grafts[3].graft == Graft.parse(text)
    assert checked.grafts[3].span is None


def test_a_graft_that_fails_on_some_prompts_is_kept(tmp_path: Path) -> None:
    changes = f"prompts: [{PROMPT}, {{template: It was, answer: ' a'}}]"
    checked = made(f"{{{changes}, grafts: {{x: sft @ x}}}}", tmp_path / "s.yaml")
    assert names(checked)[-1] == "x"
    # Each rule runs somewhere, both together nowhere.
    both = f"prompts: [{PROMPT}, {PROMPT.replace('x', 'y')}]"
    with pytest.raises(ConfigError, match=r"grafts.b: none of 2 prompts.*no span 'y'"):
        made(f"{{{both}, grafts: {{b: sft @ x | sft @ y}}}}", tmp_path / "s.yaml")


def test_prompts_are_those_of_the_datasets_and_files(tmp_path: Path) -> None:
    films = make_dataset(MoviesConfig(n_facts=6, texts_per_fact=2, seed=3))
    save_dataset(films, tmp_path / "films")
    checked = made(
        "{dataset: [{movies: {n_facts: 5, seed: 1}}, {movies: {n_facts: 5, seed: 1}, direction: ba,"
        f" distractors: 0}}, {{path: '{tmp_path / 'films'}', name: mine}}], templates: [qa],"
        f" seed: 7, grafts: {{LT: sft @ last}}, prompts: [{PROMPT}, {{file: some.jsonl}},"
        " {file: some.yaml}]}",
        tmp_path / "s.yaml",
    )
    five = make_facts(5, 1)
    expected = [
        *evaluation_prompts(five, templates="qa", seed=7),
        *evaluation_prompts(five, templates="qa", direction="ba", distractors=0, seed=7),
        *evaluation_prompts(films.facts, templates="qa", seed=7),
    ]
    assert list(checked.prompts[:16]) == expected
    assert [p.text for p in checked.prompts[16:]] == ["Ann met", "Ann met", "Who met Cy?", "It was"]
    assert checked.prompts[17].name == "met"
    assert checked.dataset == (
        *["movies seed 1"] * 5, *["movies seed 1 ba"] * 5, *["mine"] * 6,
        "prompts", *["some.jsonl"] * 2, "some.yaml",
    )  # fmt: skip


def test_overrides(tmp_path: Path) -> None:
    checked = made(
        "{grids: [{layers: each}, {heads: all}], grafts: OUT}",
        tmp_path / "s.yaml",
        "grids.0.layers=[0, [1, 2]]",
        "grids.0.positions=~(first_entity + last)",
        "grids.1={positions: [[0, -1]], layers: {windows: {size: n}}}",
        "grafts.mine=sft @ last : o : 0",
        "grafts.(FE+LT)^C='sft @ ~(first_entity + last)'",
        "metrics.top_k=3",
        "sources.sft=./third",
        "shards=20",
        "prompts.0.answer=' Anders'",
        "row_budget=null",
    )
    assert names(checked) == [
        "none", "sft @ all", "mine", "(FE+LT)^C",
        "sft @ ~(first_entity + last) : all : 0", "sft @ ~(first_entity + last) : all : 1-2",
        "sft @ [0, -1] : all : 0-2",
    ]  # fmt: skip
    assert checked.config.metrics.top_k == 3
    assert checked.config.sources == {"pre": "./pre", "sft": "./third"}
    assert checked.config.shards == 20
    assert checked.prompts[0].answer == " Anders"


def test_a_prompt_keeps_signs_that_overrides_might_read(tmp_path: Path) -> None:
    """Nothing is filled in: a text stays what it is, ${…} and ??? too."""
    text = "prompts: {template: 'costs ${price} ???', answer: ' ???'}"
    checked = made(f"{{{text}, grafts: {{a: sft @ last}}}}".replace("{price}", "{{price}}"),
                   tmp_path / "s.yaml", "seed=3")  # fmt: skip
    assert checked.prompts[0].text == "costs ${price} ???"
    assert checked.prompts[0].answer == " ???"


def test_a_config_goes_to_yaml_and_back(tmp_path: Path) -> None:
    config = made(
        "{dataset: {movies: {n_facts: 5}}, prompts: [{file: some.jsonl}, " + PROMPT + "], grids: "
        "[{positions: [[0, -1], last], layers: [{windows: {size: [1, 2]}}, each, [0, upper_half]],"
        " heads: [[0, 1], 0-2], components: [[q, o]], base: sft @ bos, source: sft}], base: none,"
        " dtype: float32, row_budget: 50, grafts: {a: [{source: sft, at: last}, 'pre @ bos : o']}}",
        tmp_path / "s.yaml",
    ).config
    plain = config.model_dump(mode="json")
    assert json.loads(json.dumps(plain)) == plain
    assert SweepConfig.model_validate(plain) == config
    assert SweepConfig.model_validate(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert SweepConfig.model_validate(config.model_dump(mode="json", exclude_unset=True)) == config
    assert plain["grafts"] == {"a": "sft @ last | pre @ bos : o"}
    assert plain["grids"][0]["layers"] == [
        {"windows": {"size": [1, 2], "stride": 1}}, "each", "0 + upper_half",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    assert not list(folder.glob("*/*.safetensors")), "the test's own premise"
    assert made("", tmp_path / "s.yaml").arch.n_layers == N_LAYERS


def test_an_adapter_counts_as_the_base(tmp_path: Path) -> None:
    checked = made("sources: {pre: ./pre, sft: ./adapter}", tmp_path / "s.yaml")
    assert (checked.arch, checked.arch.family) == (preview({"a": "pre", "b": "sft"})[0], "llama")


def test_smollm2_stands_for_the_cached_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.model.smollm2.smollm2", lambda: folder / "pre")
    checked = made("sources: {pre: smollm2, sft: ./sft}", tmp_path / "s.yaml")
    assert checked.config.sources["pre"] == "smollm2"
    assert checked.config.locations() == {"pre": str(folder / "pre"), "sft": "./sft"}

    def fails() -> Path:
        raise RuntimeError("no route gave the checkpoint")

    monkeypatch.setattr("graftlens.model.smollm2.smollm2", fails)
    with pytest.raises(ConfigError, match="sources: no route gave the checkpoint"):
        made("sources: {pre: smollm2, sft: ./sft}", tmp_path / "s.yaml")


EXPECTED = {
    "chat_roles": 17,
    "last_token": 2 + 1 + 7 * N_LAYERS,
    "position_grid": 8,
    "windows": 2 + 3 * 6,
}


def test_every_example_is_expected() -> None:
    assert {path.stem for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_right(path: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATES["chatml"][0])
    sources = ["sources.pre=./pre", "sources.sft=./sft", f"chat_template={template}"]
    checked = check(load_config(path, sources))
    assert len(checked.grafts) == EXPECTED[path.stem]
    asked = " chat" if path.stem.startswith("chat") else ""
    assert set(checked.dataset) == {f"movies seed 0{asked}"}
    assert len(checked.prompts) % 40 == 0


# -- the command -------------------------------------------------------------------------------


def run(*arguments: str, code: int) -> str:
    """What the command says, all on one stream."""
    done = graftlens("sweep", *arguments)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def test_help_names_every_option() -> None:
    said = run("--help", code=0)
    for word in ("CONFIG", "graftlens list", "KEY=VALUE", "--out", "--dry-run", "--launcher",
                 "--devices", "--tasks", "--slurm", "only what is missing"):  # fmt: skip
        assert word in said


BAD_COMMANDS = {
    "": (2, "Missing argument 'CONFIG'"),
    "away.yaml": (1, "graftlens: away.yaml: there is no such file"),
    "good.yaml sed=3 --dry-run": (1, "graftlens: good.yaml: unknown key 'sed'"),
    "good.yaml --launcher pbs": (2, "'pbs' is not one of 'local', 'slurm'"),
    "good.yaml --tasks 0": (2, "Invalid value for '--tasks'"),
    "good.yaml --tasks 2": (2, "--tasks works only with --launcher slurm"),
    "good.yaml --devices cpu --launcher slurm": (2, "--devices works only with --launcher local"),
    "good.yaml --devices cuda:0,": (2, "write names, such as cuda:0,cuda:1"),
    "good.yaml --slurm timeout_min=3": (1, "this needs --launcher slurm"),
    "good.yaml --launcher slurm --slurm gpu": (1, "--slurm gpu: not an override"),
    "good.yaml --launch local": (2, "No such option"),
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_a_bad_command_is_one_message(command: str, tmp_path: Path) -> None:
    Path("good.yaml").write_text(yaml.safe_dump(GOOD))
    code, message = BAD_COMMANDS[command]
    said = " ".join(run(*command.split(), code=code).split())
    assert message in said.replace("│ ", "")


def test_a_description_says_what_would_be_done(tmp_path: Path) -> None:
    checked = made("{grafts: {LT: sft @ last, same: sft @ last}}", tmp_path / "s.yaml", "shards=3")
    ready = checked.prepared(0, checked.prompts[0])
    n, m = len(ready.tokens), len(ready.answer)
    # Below the top: `none` and `all` everywhere, LT where it differs; at the top the scored rows.
    rows = (2 * (2 * (n + m - 1) + m) + 3 * m) / 3
    lines = describe(checked).splitlines()
    assert lines[13:16] == [
        f"token rows needed:      {rows:.0f}",
        f"rows if run one by one: {3 * (n + m - 1)}",
        f"ratio:                  {3 * (n + m - 1) / rows:.1f}",
    ]
    cut = describe(made(yaml.safe_dump(GOOD), tmp_path / "s.yaml", "shards=2"))
    assert "grafts are cut into 2 blocks" in cut
    assert lines[:13] == [
        "sources   pre = ./pre (the base)",
        "          sft = ./sft",
        "model     llama, 3 layers, 4 heads (2 key-value), d_model 24",
        "prompts   1",
        "          prompts: {first_entity} acted alongside: 1",
        "grafts    3, recovery from none to sft @ all",
        "          none",
        "          sft @ all",
        "          LT = sft @ last",
        "          1 given twice are run once, such as same = LT",
        "cells     3, in 1 or more shards of up to 3",
        "",
        "1 prompts, 3 cells (prompt × graft), 1 layouts of tokens",
    ]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Something stands for the library, so that only the command itself runs; it prints what it is
    asked for, and a sweep's numbers are `ok` or not."""

    def install(ok: bool) -> None:
        monkeypatch.setattr("graftlens.reports.ensure_report", lambda folder: folder / "page")

        def stub(name: str) -> Callable[..., Any]:
            def called(*args: Any, **options: Any) -> Any:
                print(name, *map(str, args), *(f"{k}={v}" for k, v in options.items()))
                return SimpleNamespace(line=lambda: "the result", ok=ok, folder=Path("o"))

            return called

        for module, names in (
            (runner, "prepare_sweep run_sweep sweep_result"),
            (launch, "launch_local launch_slurm"),
        ):
            for name in names.split():
                assert callable(getattr(module, name))
                monkeypatch.setattr(module, name, stub(name))

    return install


COMMANDS = {
    "good.yaml --out o seed=3 shards=2": [
        "run_sweep good.yaml o overrides=['seed=3', 'shards=2'] measures=[] device=None"
    ],
    "good.yaml --devices cpu": [
        "run_sweep good.yaml graftlens-runs/sweeps/good overrides=[] measures=[] device=cpu"
    ],
    "good.yaml --devices cpu,cpu seed=1": [
        "prepare_sweep good.yaml graftlens-runs/sweeps/good overrides=['seed=1'] measures=[]",
        "launch_local graftlens-runs/sweeps/good ['cpu', 'cpu'] measures=[] outcomes=None",
        "sweep_result graftlens-runs/sweeps/good",
        "the result",
    ],
    "good.yaml --launcher slurm --tasks 3 --slurm timeout_min=9 --slurm slurm_partition=a "
    "--no-wait --out o": [
        "prepare_sweep good.yaml o overrides=[] measures=[]",
        "launch_slurm o tasks=3 resources={'timeout_min': 9, 'slurm_partition': 'a'} "
        "measures=[] outcomes=None wait=False",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_call(command: str, stubbed: Callable[[bool], None]) -> None:
    Path("good.yaml").write_text(yaml.safe_dump(GOOD))
    stubbed(True)
    done = graftlens("sweep", *command.split())
    assert done.returncode == 0, done.stderr
    wanted = list(COMMANDS[command])
    if "--no-wait" not in command:
        wanted.append(str(Path("o/page").resolve()))
    assert done.stdout.splitlines()[-len(wanted) :] == wanted
    assert not Path("graftlens-runs").exists()


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 3)])
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_the_exit_code_says_whether_the_numbers_can_be_trusted(
    ok: bool, code: int, devices: str, stubbed: Callable[[bool], None]
) -> None:
    Path("good.yaml").write_text(yaml.safe_dump(GOOD))
    stubbed(ok)
    assert graftlens("sweep", "good.yaml", "--devices", devices).returncode == code


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    Path("good.yaml").write_text(yaml.safe_dump(GOOD))
    said = run("good.yaml", "--dry-run", "shards=2", code=0)
    assert "cells     3, in 2 or more shards of up to 2" in said
    assert "rows if run one by one: " in said
    assert not Path("graftlens-runs").exists()


def test_a_limit_takes_the_first_prompts_of_each_template(tmp_path: Path) -> None:
    text = "{dataset: {movies: {n_facts: 6}}, prompts: [], templates: [headline, qa]}"
    whole = made(text, tmp_path / "s.yaml")
    few = made(text, tmp_path / "s.yaml", "limit=2")
    assert [p.name for p in few.prompts] == ["headline"] * 2 + ["qa"] * 2
    assert few.prompts == (*whole.prompts[:2], *whole.prompts[6:8])
    with pytest.raises(ConfigError, match="limit"):
        made(text, tmp_path / "s.yaml", "limit=0")


def test_an_answer_that_joins_the_last_word_is_pointed_at(tmp_path: Path) -> None:
    joined = "{prompts: [{template: Ann acted with, answer: Bo}], grafts: {LT: sft @ last}}"
    with pytest.warns(UserWarning, match=r"the answer 'Bo' continues .* Did you mean ' Bo'\?$"):
        made(joined, tmp_path / "s.yaml")


def test_strengths_that_multiply_too_far_are_refused_where_their_rules_meet() -> None:
    far = "1e+200*sft @ last | 1e+200*sft @ all"
    with pytest.raises(ConfigError) as error:
        check(SweepConfig.model_validate({**GOOD, "grafts": {"PRE": "none", "far": far}}))
    known = f"graft {far!r}: the strengths of the rules that meet here multiply to "
    assert known in str(error.value)
    apart = "1e200*sft @ last | 1e200*sft @ ~last | 1e200*sft @ last : mlp_out : 0 : n1"
    check(SweepConfig.model_validate({**GOOD, "grafts": {"apart": apart.rsplit(" | ", 1)[0]}}))
    with pytest.raises(ConfigError, match="rules that meet here"):
        check(SweepConfig.model_validate({**GOOD, "grafts": {"meet": apart}}))
