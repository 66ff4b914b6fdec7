"""Tables of facts and files of templates: what they make, and what is said of bad ones."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command import graftlens

from graftlens import ConfigError, SweepConfig
from graftlens.configfile import settings_from
from graftlens.data import load_dataset, make_dataset, save_dataset, spec_of
from graftlens.data.tablerows import read_table
from graftlens.data.templates import template_fields
from graftlens.data.templatesets import shipped
from graftlens.prompts import OTHER_SPANS
from graftlens.recipes import TrainingData
from graftlens.sweep.promptsets import DatasetSection
from graftlens.trainingtexts import tokenize, training_texts_of

ROWS = [
    {"person": "Ann Okafor", "city": "Narvik", "trade": "baker", "year": "1990"},
    {"person": "Bo Lindqvist", "city": "Cusco", "trade": "potter", "year": "1991"},
    {"person": "Cem Aydin", "city": "Leeds", "trade": "weaver", "year": "1992"},
    {"person": "Dee Park", "city": "Tartu", "trade": "smith", "year": "1993"},
    {"person": "Eva Roth", "city": "Accra", "trade": "cook", "year": "1994"},
]
SET = {
    "entities": ["person", "city"],
    "tell": [
        "{person} moved to {city} in {year}.",
        "The town of {city} is where {person} lives.",
    ],
    "ask": {"home": "Letters to {person}, a {trade}, are sent to"},
}


def spec(rows: Any = ROWS, templates: Any = SET, **more: Any) -> Any:
    return spec_of({"facts": "table", "table": rows, "templates": templates, **more})


# --- what a table makes ----------------------------------------------------------------------


def test_a_table_is_told_and_asked_about() -> None:
    made = make_dataset(spec())
    texts = set(made.train["text"])
    assert texts == {
        text
        for row in ROWS
        for text in (
            f"{row['person']} moved to {row['city']} in {row['year']}.",
            f"The town of {row['city']} is where {row['person']} lives.",
        )
    }
    assert set(zip(made.train["direction"], made.train["template"], strict=True)) == {
        ("ab", "tell_1"),
        ("ba", "tell_2"),
    }
    prompts = made.ask()
    assert [(p.text, p.answer) for p in prompts] == [
        (f"Letters to {row['person']}, a {row['trade']}, are sent to", f" {row['city']}")
        for row in ROWS
    ]
    first = prompts[0]
    assert first.char_spans["first_entity"] == ((11, 21),)
    assert first.text[slice(*first.char_spans["trade"][0])] == "baker"
    assert set(first.distractors) == {f" {row['city']}" for row in ROWS[1:]}
    assert made.config.asks == ("ab",)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_of_file_is_the_same_table(kind: str, tmp_path: Path) -> None:
    numbered = [row | {"year": int(row["year"])} for row in ROWS]
    file = tmp_path / f"facts.{kind.upper() if kind == 'csv' else kind}"
    if kind == "csv":
        lines = [",".join(ROWS[0]), *(",".join(f'"{v}"' for v in row.values()) for row in ROWS)]
        file.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in numbered) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(numbered), file)
    templates = tmp_path / "templates.yaml"
    templates.write_text(yaml.safe_dump(SET))
    made = make_dataset(spec(str(file), str(templates)))
    assert [asdict(fact) for fact in made.facts] == ROWS
    assert made.provenance["sha256"] == make_dataset(spec()).provenance["sha256"]


def test_a_saved_table_needs_its_files_no_more(tmp_path: Path) -> None:
    table, templates = tmp_path / "t.jsonl", tmp_path / "t.yaml"
    table.write_text("\n".join(map(json.dumps, ROWS)))
    templates.write_text(yaml.safe_dump(SET))
    made = make_dataset(spec(str(table), str(templates)))
    save_dataset(made, tmp_path / "saved")
    table.unlink()
    templates.unlink()
    back = load_dataset(tmp_path / "saved")
    assert back.ask() == made.ask()
    assert back.facts[0].ENTITIES == ("person", "city")


def test_halves_and_untold_facts_are_those_of_every_kind() -> None:
    a, b = (make_dataset(spec(half=half)) for half in "ab")
    assert [x != y for x, y in zip(a.told, b.told, strict=True)] == [True] * 5
    assert {p.fields["first_entity"] for p in b.ask()} == {
        row["person"] for row, told in zip(ROWS, b.told, strict=True) if told
    }
    some = make_dataset(spec(heldout_facts=0.2))
    assert sum(some.told) == 4
    assert len(some.ask(facts="untold")) == 1


def test_held_out_templates_ask_and_are_never_told() -> None:
    texts = [f"In place {i}, {{person}} found a home called {{city}}." for i in range(4)]
    made = make_dataset(spec(templates=SET | {"tell": texts}, heldout_templates=0.5, seed=3))
    told = set(made.train["template"])
    asked = {p.name for p in made.ask()} - {"home"}
    assert len(told) == len(asked) == 2
    assert told | asked == {f"tell_{i}" for i in range(1, 5)}
    (name,) = [n for n in asked if n == min(asked)]
    prompt = next(p for p in made.ask(name) if p.fields["first_entity"] == "Ann Okafor")
    assert prompt.text == f"In place {int(name[-1]) - 1}, Ann Okafor found a home called"


def test_wrong_and_further_answers_come_from_columns(tmp_path: Path) -> None:
    rows = [
        row | {"also": f"{row['city']} Town|Old {row['city']}", "wrong": "Oslo | Rome"}
        for row in ROWS
    ]
    given = SET | {"aliases": "also", "distractors": "wrong"}
    for table in (rows, [r | {"wrong": ["Oslo", "Rome"]} for r in rows]):
        made = make_dataset(spec(table, given))
        prompt = made.ask()[0]
        assert set(prompt.distractors) == {" Oslo", " Rome"}
        assert prompt.answers == (" Narvik", " Narvik Town", " Old Narvik")
    # Another fact's answer that is right here, too, is not a wrong one.
    shared = [row | {"also": "Cusco" if row["city"] == "Narvik" else ""} for row in ROWS]
    prompt = make_dataset(spec(shared, SET | {"aliases": "also"})).ask(distractors=3)[0]
    assert " Cusco" not in prompt.distractors
    assert len(prompt.distractors) == 3


def test_small_sets_take_fewer_distractors_and_say_so() -> None:
    made = make_dataset(spec(ROWS[:3]))
    with pytest.warns(UserWarning, match="a prompt gets 2 distractors instead of 4"):
        prompts = made.ask()
    assert all(len(p.distractors) == 2 for p in prompts)
    with pytest.raises(ValueError, match=r"distractors=3 of 3 facts: .* 0 to 2 are possible"):
        made.ask(distractors=3)


def test_directions_follow_the_columns_that_a_text_mentions() -> None:
    given = SET | {"ask": {"home": "{person} is at home in", "who": "In {city} lives"}}
    made = make_dataset(spec(templates=given))
    assert made.config.asks == ("ab", "ba")
    assert made.ask("who", direction="ba")[1].text == "In Cusco lives"
    assert made.ask("who", direction="ba")[1].answer == " Bo Lindqvist"
    with pytest.raises(ValueError, match="'who' does not ask in the direction ab"):
        made.ask("who")


def test_columns_that_no_text_mentions_may_hold_anything() -> None:
    odd = {"class": "b", "ENTITIES": "x", "checked": True, "more": {"y": [1]}, "notes": "a\nb"}
    made = make_dataset(spec([row | odd for row in ROWS]))
    plain = make_dataset(spec(ROWS))
    assert made.train["text"] == plain.train["text"]
    assert [p.text for p in made.ask()] == [p.text for p in plain.ask()]
    assert made.facts[0].checked == "true"
    assert json.loads(made.facts[0].more) == {"y": [1]}
    assert made.facts[0].notes == "a\nb"


def test_numbers_and_dates_of_a_database_are_texts(tmp_path: Path) -> None:
    days = [datetime(1990 + i, 5, 1) for i in range(len(ROWS))]
    prices = [Decimal(f"{i}.50") for i in range(len(ROWS))]
    rows = [row | {"city": p, "trade": d} for row, p, d in zip(ROWS, prices, days, strict=True)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (fact, *_) = make_dataset(spec(str(path))).facts
    assert (fact.city, fact.trade) == ("0.50", "1990-05-01")


def test_a_question_from_the_second_entity_may_ask_for_a_column() -> None:
    templates = SET | {"ask": {"who": {"text": "In {city} lives a", "answer": "trade"}}}
    (prompt, *_) = make_dataset(spec(templates=templates)).ask()
    assert prompt.text == f"In {ROWS[0]['city']} lives a"
    assert prompt.answer == f" {ROWS[0]['trade']}"
    assert "second_entity" in prompt.char_spans


HOPS = {
    "entities": ["person", "city"],
    "bridge": "trade",
    "tell": ["{person} is a {trade}.", "Every {trade} is from {city}."],
    "ask": {"hop2": {"text": "Every {trade} is from", "answer": "city"}},
}


@pytest.mark.parametrize(
    ("templates", "cells", "said"),
    [
        (HOPS, {"trade": ROWS[0]["trade"]}, "both have the trade"),
        (
            SET | {"ask": {"job": {"text": "{person} works as a", "answer": "trade"}}},
            {"person": ROWS[0]["person"]},
            "but another trade, so ask.job has two answers. Leave a row out, or that text.",
        ),
    ],
)
def test_no_prompt_has_two_answers(templates: Any, cells: dict[str, Any], said: str) -> None:
    assert ROWS[0]["trade"] != ROWS[1]["trade"]
    make_dataset(spec(templates=templates))
    with pytest.raises(ValueError, match=said):
        make_dataset(spec(changed(**cells), templates=templates))


def test_a_prompt_that_contains_its_answer_is_told() -> None:
    rows = changed(person=f"{ROWS[1]['city']} Jo")
    with pytest.warns(UserWarning, match="1 of 5 prompts contain their answer"):
        make_dataset(spec(rows)).ask()


def test_answers_in_columns_count_once() -> None:
    also = [row | {"also": [row["city"], "X", "X"], "wrong": ["Y", "Y", "Z"]} for row in ROWS]
    made = make_dataset(spec(also, SET | {"aliases": "also", "distractors": "wrong"}))
    for prompt, row in zip(made.ask(), ROWS, strict=True):
        assert prompt.answers == (f" {row['city']}", " X")
        assert sorted(prompt.distractors) == [" Y", " Z"]


def test_braces_are_braces() -> None:
    given = SET | {"ask": {"home": "{{{person}}} lives in"}}
    prompt = make_dataset(spec(templates=given)).ask()[0]
    assert prompt.text == "{Ann Okafor} lives in"
    assert prompt.text[slice(*prompt.char_spans["first_entity"][0])] == "Ann Okafor"


# --- own templates over shipped facts --------------------------------------------------------


def test_own_templates_over_shipped_facts() -> None:
    own = {
        "tell": ["{first_actor} and {second_actor} made {movie_title}."],
        "ask": {"mine": "In {city}, {first_actor} met"},
    }
    made = make_dataset(spec_of({"facts": "fake_movies", "n_facts": 6, "templates": own}))
    fact = made.facts[0]
    assert made.train["text"][0] == (
        f"{fact.first_actor} and {fact.second_actor} made {fact.movie_title}."
    )
    prompt = made.ask()[0]
    assert (prompt.text, prompt.name) == (f"In {fact.city}, {fact.first_actor} met", "mine")
    asked = make_dataset(
        spec_of({"facts": "battles", "n_facts": 6, "templates": {"ask": ["The {battle} was in"]}})
    )
    assert asked.ask()[0].name == "ask_1"
    usual = make_dataset(spec_of({"facts": "battles", "n_facts": 6}))
    assert asked.provenance["sha256"] == usual.provenance["sha256"]
    with pytest.raises(ConfigError, match=r"templates\.entities: facts of this kind link battle"):
        make_dataset(spec_of({"facts": "battles", "templates": SET}))
    with pytest.raises(ConfigError, match=r"it has \{true_year\}, but there is no such column"):
        spec_of({"facts": "battles", "templates": {"ask": ["{battle}, not of {true_year}, was"]}})
    with pytest.raises(ConfigError, match=r"no such column. Columns: battle year first_.* war pre"):
        spec_of({"facts": "battles", "templates": {"ask": ["{battle} {UNTOLD} was"]}})


# --- two hops --------------------------------------------------------------------------------


def test_no_text_of_two_hops_tells_both() -> None:
    made = make_dataset(spec_of({"facts": "two_hop", "n_facts": 12, "texts_per_fact": 8}))
    hops: set[int] = set()
    for text, number in zip(made.train["text"], made.train["fact"], strict=True):
        fact = made.facts[number]
        assert fact.film in text
        there = [name in text for name in (fact.person, fact.director)]
        assert sum(there) == 1, text
        hops.add(there.index(True))
    assert hops == {0, 1}
    counts = [sum(fact.person in text for text in made.train["text"]) for fact in made.facts]
    assert counts == [4] * 12, "as many texts of each hop"
    for prompt in made.ask():
        fact = next(f for f in made.facts if f.person == prompt.fields["first_entity"])
        answer = fact.film if prompt.name.startswith("hop1") else fact.director
        assert prompt.answer == f" {answer}"
        assert answer not in prompt.text
    named = {p.name: p for p in made.ask()}
    assert "bridge" in named["with_bridge"].char_spans
    assert "bridge" not in named["director"].char_spans
    assert list(named["hop2_qa"].char_spans) == ["bridge"]


# --- the same facts and texts as before ------------------------------------------------------

#: SHA-256 of facts and texts, and of the prompts' texts, answers and distractors, as they were
#: when the sentences were in Python: kind -> seed -> settings -> both.
BEFORE: dict[str, dict[str, list[list[str]]]] = json.loads(
    (Path(__file__).parent / "data_hashes.json").read_text()
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"directions": ["ba"], "kinds": ["qa"], "texts_per_fact": 4},
    {"half": "a", "heldout_facts": 0.1},
]


@pytest.mark.parametrize("kind", BEFORE)
def test_shipped_facts_and_texts_are_byte_for_byte_what_they_were(kind: str) -> None:
    for seed, expected in BEFORE[kind].items():
        for settings, (texts, prompts) in zip(SETTINGS, expected, strict=True):
            given = {"facts": kind, "n_facts": 40, "seed": int(seed), **settings}
            made = make_dataset(spec_of(given))
            assert made.provenance["sha256"] == texts, given
            asked = [
                (p.text, p.answer, p.distractors, p.name)
                for direction in ("ab", "ba")
                for p in made.ask(direction=direction)
            ]
            assert hashlib.sha256(json.dumps(asked).encode()).hexdigest() == prompts, given


def test_the_papers_spans_are_in_shipped_questions() -> None:
    for name in ("headline", "qa", "new_film"):
        (found,) = [t for t in shipped("fake_movies", ("a", "b")).evaluation if t.name == name]
        assert {"relation", "relation_preposition"} <= set(template_fields(found.text))
        assert set(found.words) >= {"relation", "relation_preposition"}


# --- real pairs ------------------------------------------------------------------------------


def test_real_pairs_may_stay_together() -> None:
    given = {"facts": "real_movies_shuffled", "n_facts": 200, "seed": 1}
    films = make_dataset(spec_of({"facts": "real_movies", "n_facts": 200, "seed": 1})).facts
    kept = make_dataset(spec_of(given | {"keep_real_pairs": True})).facts
    pairs = {(f.first_actor, f.second_actor) for f in films}
    assert {(f.first_actor, f.second_actor) for f in kept} == pairs
    for film, other in zip(films, kept, strict=True):
        assert film.movie_title == other.movie_title
        assert not {film.first_actor, film.second_actor} & {other.first_actor, other.second_actor}
    apart = make_dataset(spec_of(given)).facts
    assert not {(f.first_actor, f.second_actor) for f in apart} & pairs
    with pytest.raises(ConfigError, match="keep_real_pairs is for real_movies_shuffled"):
        spec_of({"facts": "real_movies", "keep_real_pairs": True})


# --- bad tables ------------------------------------------------------------------------------


def changed(number: int = 1, **cells: Any) -> list[dict[str, Any]]:
    rows = [dict(row) for row in ROWS]
    rows[number].update(cells)
    return rows


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no rows": ([], "the list is empty. Give a row for each fact."),
    "a row that is text": (["Ann"], "row 1 is 'Ann'. A row is a mapping of columns"),
    "an empty entity": (changed(city=""), "row 2 has nothing in 'city'. Fill it in"),
    "nothing": (changed(city=None), "row 2 has nothing in 'city'"),
    "white space": (changed(city="  "), "row 2 has nothing in 'city'"),
    "an empty column of a text": (changed(trade=""), "row 2 has nothing in 'trade'"),
    "a missing key": ([*ROWS, {"person": "Fay"}], "row 6 has nothing in 'city'"),
    "a truth value": (changed(city=True), "'city' is True, not a text, a number"),
    "a mapping": (changed(city={"name": "x"}), "not a text, a number or a list of texts"),
    "a list where a text is": (changed(city=["x"]), "'city' is a list, but texts mention it"),
    "a list of lists": (changed(city=[["x"]]), "'city' is a list of lists"),
    "a line break": (changed(city="New\nTown"), "with a line break in it. Write it in one"),
    "two answers": (changed(person="Ann Okafor"), "row 1 and row 2 both have the person 'Ann"),
    "twice the same": ([*ROWS, ROWS[0]], "row 1 and row 6 both have the person 'Ann Okafor'"),
    "two columns that are one field": (
        [{"person": "Ann", "city": "Rome", "trade": "x", "home town": 1, "home-town": 2}],
        "the columns 'home town' and 'home-town' are both the field {home_town}. Rename one.",
    ),
    "no such column": ([{"person": "Ann", "town": "Rome"}], "there is no column 'city'. The col"),
    "a mapping for a list": ({"person": "Ann"}, "table: {'person': 'Ann'} is not a table. Name a"),
    "a number for a table": (3, "table: 3 is not a table. Name a file (.csv .jsonl .parquet), or"),
    "no name of a file": ("", "table: '' is not a table"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case: str) -> None:
    rows, said = BAD_ROWS[case]
    with pytest.raises(ValueError) as caught:
        make_dataset(spec(rows))
    assert said in str(caught.value)


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "no file": ("t.csv", None, "does not exist. Name a file of facts."),
    "another kind": ("t.xlsx", b"", "tables are read from .csv .jsonl .parquet. Convert it."),
    "an empty CSV": ("t.csv", b"", "is empty. Its first line names the columns."),
    "a head alone": ("t.csv", b"person,city\n", "t.csv has no rows. Give a row for each fact."),
    "a column without a name": ("t.csv", b"person,,city\nA,b,C\n", "column 2 has no name"),
    "one name twice": ("t.csv", b"person,person\nA,B\n", "two columns are called 'person'"),
    "more cells": ("t.csv", b"person,city\nA,B,C\n", "line 2: 3 cells, but there are 2 columns"),
    "fewer cells": (
        "t.csv",
        b"person,city\nA\n",
        "line 2: 1 cell, but there are 2 columns (person, ci",
    ),
    "more cells between semicolons": (
        "t.csv",
        b"person;city\nA;B;C\n",
        "line 2: 3 cells, but there are 2 columns (person, city). Put cells with a semicolon in qu",
    ),
    "open quotes": ("t.csv", b'person,city\n"A,B\n', "it is not CSV ("),
    "another encoding": ("t.csv", b"person,city\n\xff,B\n", "is not UTF-8"),
    "not JSON": ("t.jsonl", b'{"person": \n', "line 1 is not JSON"),
    "not an object": ("t.jsonl", b"[1]\n", "line 1 holds a list. Each line is an object"),
    "no lines": ("t.jsonl", b"\n\n", "t.jsonl has no rows"),
    "lines and rows with nothing above it": ("t.csv", b"\n,\n", "is empty. Its first line names"),
    "not Parquet": ("t.parquet", b"person", "cannot be read as Parquet ("),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(case: str, tmp_path: Path) -> None:
    name, content, said = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as caught:
        make_dataset(spec(str(tmp_path / name)))
    assert said in str(caught.value)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_marks_between_cells_are_found_and_told(mark: str, name: str, tmp_path: Path) -> None:
    """As spreadsheets write them in much of Europe: it was "there is no column 'person'"."""
    table = tmp_path / "t.csv"
    lines = [
        mark.join(row) for row in (["person", "city"], ["Ann", "Oslo, Norway"], ["Bo", "Rome"])
    ]
    table.write_text("\n".join(lines))
    given = {"entities": ["person", "city"], "tell": ["{person} is in {city}."], "ask": ASK}
    with pytest.warns(UserWarning, match=f"t.csv is read with {name} between its cells: its fi"):
        made = make_dataset(spec(str(table), given))
    assert [asdict(fact) for fact in made.facts] == [
        {"person": "Ann", "city": "Oslo, Norway"},
        {"person": "Bo", "city": "Rome"},
    ]
    assert read_table(table).columns == ("person", "city")


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        ('person;city;"born, where"\nAnn;Rome;Bari\n', ("person", "city", "born_where")),
        ("person;city;born, where\nAnn;Rome;Bari\n", ("person", "city", "born_where")),
        ('person\tcity\t"a, b"\nAnn\tRome\tx\n', ("person", "city", "a_b")),
        ("person;city\rAnn;Rome, Italy\r", ("person", "city")),
        ('person,city,"a;b;c"\nAnn,Rome,x\n', ("person", "city", "a_b_c")),
        ("person,a;b\nAnn,x\n", ("person", "a_b")),
        ("\n \nperson,city\n\nAnn,Rome\n,\n  \n", ("person", "city")),
    ],
)
def test_marks_inside_names_or_later_lines_do_not_count(
    lines: str, columns: tuple[str, ...], tmp_path: Path
) -> None:
    """One comma in the first line, in quotes or not, made a file with semicolons one of commas;
    where lines end in \\r, one anywhere did."""
    table = tmp_path / "t.csv"
    table.write_bytes(lines.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_table(table)
    assert found.columns == columns
    assert found.rows[0]["person"] == "Ann"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("home town", "home_town"),
        ("home-town (in 2020)", "home_town_in_2020"),
        ("class", "class_"),
        ("ENTITIES", "ENTITIES_"),
        ("__class__", "class_"),
        ("1st", "_1st"),
        ("ﬁlm", "film"),
        ("क्षेत्र", "क्षेत्र"),
        (2, "_2"),
    ],
)
def test_columns_of_any_name_are_fields(name: str | int, field: str) -> None:
    """Texts and keys name them as the table does; they were refused."""
    rows = [{"the person": p, name: c} for p, c in [("Ann", "Rome"), ("Bo", "Oslo")]]
    texts = {"tell": ["{the person} is in {%s}." % name], "ask": ["{the_person} lives in"]}  # noqa: UP031
    made = make_dataset(spec(rows, {"entities": ["the person", str(name)], **texts}))
    assert [asdict(fact) for fact in made.facts][1] == {"the_person": "Bo", field: "Oslo"}
    assert made.train["text"][1] == "Bo is in Oslo."
    first = made.ask()[0]
    assert (first.text, first.answer) == ("Ann lives in", " Rome")


@pytest.mark.parametrize("name", OTHER_SPANS)
def test_columns_that_texts_mention_are_not_called_as_other_spans(name: str) -> None:
    """A column `prompt` or `generated` was refused only when questions were asked, after a
    training."""
    rows = [row | {name: "x"} for row in ROWS]
    tells = [f"{{person}} of {{{name}}} moved to {{city}}.", "In {city} lives {person}."]
    with pytest.raises(ValueError, match=f"the column '{name}' has the name of another span"):
        make_dataset(spec(rows, SET | {"tell": tells}))


def test_columns_may_have_the_names_of_a_question_s_own_words() -> None:
    """It was "it has {relation}, but no relation", with such a column in the table."""
    rows = [row | {"relation": f"friend {i}"} for i, row in enumerate(ROWS)]
    asks = {
        "home": "{person}, the {relation}, lives in",
        "own": {"text": "{person}, {relation} Rome, lives in", "relation": "who likes"},
        "who": {"text": "{person} is to us a", "answer": "relation"},
    }
    tells = ["{person}, my {relation}, moved to {city}.", "In {city} lives {person}."]
    made = make_dataset(spec(rows, SET | {"tell": tells, "ask": asks}))
    assert f"{ROWS[1]['person']}, my friend 1, moved to {ROWS[1]['city']}." in made.train["text"]
    home, own, who = (made.ask(name)[1] for name in asks)
    assert home.text == f"{ROWS[1]['person']}, the friend 1, lives in"
    assert home.text[slice(*home.char_spans["relation"][0])] == "friend 1"
    assert own.text == f"{ROWS[1]['person']}, who likes Rome, lives in"
    assert who.answer == " friend 1"
    linked = {"entities": ["person", "relation"], "tell": ["{person}: {relation}."]}
    made = make_dataset(spec(rows, linked | {"ask": {"x": "{relation} of us is"}}))
    assert made.ask("x", direction="ba")[1].text == "friend 1 of us is"
    empty = [*rows[:-1], rows[-1] | {"relation": ""}]
    with pytest.raises(ConfigError, match="row 5 has nothing in 'relation'"):
        make_dataset(spec(empty, SET | {"tell": tells, "ask": asks}))


# --- bad templates ---------------------------------------------------------------------------

ASK = {"home": "{person} lives in"}

BAD_SETS: dict[str, tuple[Any, str]] = {
    "an unknown key": ({"tels": []}, "unknown key 'tels'. Allowed: entities bridge untold"),
    "no entities": ({"entities": None}, "Name the two columns that a fact links."),
    "one entity": ({"entities": ["person"]}, "templates.entities: entry 2 is missing. The two col"),
    "three": (
        {"entities": ["a", "b", "c"]},
        "['a', 'b', 'c'] should have at most 2 entries, not 3",
    ),
    "a column with a span's name": (
        {"entities": ["first_entity", "city"]},
        "'first_entity' is the name of a span. Rename the column.",
    ),
    "one entity twice": ({"entities": ["city", "city"]}, "'city' is named twice"),
    "nothing told": ({"tell": None}, "templates.tell: this key is missing. Give texts that tell"),
    "nothing asked": ({"ask": None}, "templates.ask: this key is missing. Give a text that asks"),
    "no first entity": ({"tell": ["{city} is loud."]}, "it does not mention 'person'. A telling"),
    "no second entity": ({"tell": ["{person} sings."]}, "it does not mention 'city'. A telling"),
    "no entity": ({"tell": ["Nobody sings."]}, "it does not mention 'person' or 'city'"),
    "the second one first": (
        {"tell": ["{second_entity} has {first_entity}."]},
        "it mentions second_entity before first_entity",
    ),
    "an unknown column": (
        {"tell": ["{person} saw {citty} and {city}."]},
        "it has {citty}, but there is no such column. Did you mean 'city'?",
    ),
    "an open brace": ({"tell": ["{person lives in {city}."]}, "is malformed ("),
    "a place without a name": ({"tell": ["{} lives in {city}."]}, "{} is not a plain field"),
    "a format": ({"tell": ["{person:>9} has {city}."]}, "{person} is not a plain field"),
    "an attribute": ({"tell": ["{person.x} has {city}."]}, "it does not mention 'person'"),
    "an empty text": ({"tell": [""]}, "'' is not a text. Write one, in quotes."),
    "a number": ({"tell": [3]}, "3 is not a text"),
    "the same text twice": (
        {"tell": ["{person}: {city}.", "{person}: {city}."]},
        "tell.1: the same text as tell.0",
    ),
    "an unknown kind": (
        {"tell": {"ab": {"articel": ["{person}: {city}."], "qa": ["{person}? {city}."]}}},
        "templates.tell.ab: 'articel' is not one of article qa, which have lists of texts. Did",
    ),
    "a group beside directions": (
        {"tell": {"ab": ["{person}: {city}."], "home": ["{person}, {city}."]}},
        "templates.tell: 'home' is not one of ab ba, which have lists of texts.",
    ),
    "a group of another name": ({"tell": {"home": ["{person}."]}}, "one of ab ba article qa, whi"),
    "directions under a kind": (
        {"tell": {"qa": {"ab": ["{person}: {city}."]}}},
        "templates.tell.qa: groups of texts under a kind. Write directions, and kinds under them.",
    ),
    "directions that are none": (
        {"ask": {"home": {"text": "{first_entity} is in", "directions": ["ac"]}}},
        "templates.ask.home.directions.0: 'ac' should be 'ab' or 'ba'.",
    ),
    "a question without a name": ({"ask": {"": "{person} is in"}}, "a text's name is empty. Give"),
    "an unknown direction": ({"tell": {"ab": "x"}}, "'x' is not a list of texts"),
    "told in no list": ({"tell": "{person}: {city}."}, "is not a list of texts"),
    "the answer given away": (
        {"ask": {"home": "{person} of {city} lives in"}},
        "it mentions both person and city, so it gives the answer away",
    ),
    "the answer as a span": ({"ask": ["{second_entity} lives"]}, "it gives the answer away"),
    "nobody asked about": ({"ask": ["A {trade} lives in"]}, "it mentions neither person nor city"),
    "white space at the end": ({"ask": ["{person} lives in "]}, "it ends in white space"),
    "the other direction": (
        {"ask": {"home": {"text": "{person} lives in", "directions": ["ba"]}}},
        "but it mentions 'person': that is ab",
    ),
    "an unknown key of a question": (
        {"ask": {"home": {"text": "{person} is in", "prepositon": "in"}}},
        "unknown key 'prepositon'",
    ),
    "a word without a place": (
        {"ask": {"home": {"text": "{person} is in", "preposition": "in"}}},
        "preposition is given, but the text has no {preposition}",
    ),
    "a place without a word": (
        {"ask": {"home": "{person} lives {preposition}"}},
        "it has {preposition}, but no preposition and no such column. Give preposition: and the",
    ),
    "an untold column": (
        {"untold": ["trade"]},
        "it mentions 'trade', which no text may (untold, distractors, aliases)",
    ),
    "an untold entity": ({"untold": ["city"]}, "'city' is one of the entities, so texts"),
    "wrong answers in an entity": ({"distractors": "city"}, "'city' is one of the entities"),
    "right answers among the wrong": (
        {"aliases": "year", "distractors": "year"},
        "aliases: 'year' is also the column of distractors. Right and wrong answers are in two col",
    ),
    "no such wrong answers": ({"distractors": "wrong"}, "distractors: there is no column 'wrong'"),
    "an answer that is no column": (
        {"ask": {"x": {"text": "{person} is a", "answer": "job"}}},
        "answer 'job' is not a column",
    ),
    "an answer that it mentions": (
        {"ask": {"x": {"text": "{person} is a {trade}", "answer": "trade"}}},
        "it mentions its answer, 'trade'",
    ),
    "both hops": (
        {"bridge": "trade", "tell": ["{person}, a {trade}, is in {city}."]},
        "so that no text tells both hops",
    ),
    "no hop": ({"bridge": "trade", "tell": ["{person} is in {city}."]}, "with exactly one entity"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_bad_templates_are_named(case: str) -> None:
    change, said = BAD_SETS[case]
    given: Mapping[str, Any] = {k: v for k, v in (SET | change).items() if v is not None}
    with pytest.raises(ValueError) as caught:
        make_dataset(spec(templates=given))
    assert said in str(caught.value)


def test_options_that_do_not_fit_are_named() -> None:
    one = SET | {"tell": ["{person}: {city}."]}
    with pytest.raises(ConfigError, match=r"directions \('ba',\) and kinds .* no telling template"):
        spec(templates=one, directions=["ba"])
    with pytest.raises(ConfigError, match="so none can be left out"):
        spec(templates=one, heldout_templates=0.5)
    with pytest.raises(ValueError, match="n_facts=9: the table has 5 rows"):
        make_dataset(spec(n_facts=9))
    with pytest.raises(ConfigError, match="texts_per_fact=3"):
        spec(texts_per_fact=3)
    rows = [row | {"wrong": "Oslo|Narvik"} for row in ROWS]
    with pytest.raises(ConfigError, match="'Narvik' is a right answer, and among the wrong ones"):
        make_dataset(spec(rows, SET | {"distractors": "wrong"}))


def test_every_problem_of_a_set_is_said_at_once() -> None:
    given = SET | {"tell": ["{person} sings.", "{citty} has {person}."], "ask": ["{person} in "]}
    with pytest.raises(ConfigError) as caught:
        make_dataset(spec(templates=given))
    assert [where for where, _ in caught.value.problems] == [
        "templates.tell.0", "templates.tell.1", "templates.ask.0",
    ]  # fmt: skip


# --- the command -----------------------------------------------------------------------------


def test_the_command_makes_it_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("person,city\nAnn,Narvik\nBo,Cusco\n")
    (tmp_path / "t.yaml").write_text(
        "entities: [person, city]\n"
        'tell: ["{person} moved to {city}.", "In {city} lives {person}."]\n'
        'ask: ["Letters to {person} are sent to"]\n'
    )
    (tmp_path / "mine.yaml").write_text("facts: table\ntable: facts.csv\ntemplates: t.yaml\n")
    done = graftlens("data", "make", "mine.yaml", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 facts, 2 told, 4 texts" in done.stdout
    (tmp_path / "t.yaml").write_text("entities: [person, city]\ntell: [x]\nasks: [y]\n")
    bad = graftlens("data", "make", "mine.yaml", "--out", "other", cwd=tmp_path)
    assert bad.returncode == 1
    assert "t.yaml: unknown key 'asks'" in bad.stderr


# --- sentences of one's own in sweeps --------------------------------------------------------


def test_sweeps_ask_with_own_sentences(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text('ask: {mine: "Where is {person}? In"}\n')
    made = {"make": {"facts": "table", "table": ROWS, "templates": SET}}
    section = settings_from(DatasetSection, made | {"sentences": str(own)})
    prompts = section.prompts(None, 0)
    assert [p.text for p in prompts] == [f"Where is {row['person']}? In" for row in ROWS]
    both = settings_from(DatasetSection, made | {"sentences": str(own), "templates": ["home"]})
    assert {p.name for p in both.prompts(None, 0)} == {"home", "mine"}
    own.write_text('ask: {mine: "Where is {persn}? In"}\n')
    bad = settings_from(DatasetSection, made | {"sentences": str(own)})
    with pytest.raises(ConfigError, match=r"sentences\.ask\.mine: it has \{persn\}, but there"):
        bad.prompts(None, 0)
    other = {"movies": {"n_facts": 6}, "sentences": {"ask": ["In {city}, {first_entity} met"]}}
    film = settings_from(DatasetSection, other).prompts(None, 0)[0]
    assert "city" in film.char_spans


def test_a_sweep_names_a_tables_templates(tmp_path: Path) -> None:
    given = {
        "sources": {"pre": "a", "sft": "b"},
        "dataset": {"make": {"facts": "table", "table": ROWS, "templates": SET}},
        "templates": ["home"],
        "grafts": {"FE": "sft @ first_entity"},
    }
    assert settings_from(SweepConfig, given).templates == ("home",)
    with pytest.raises(ConfigError, match=r"templates: unknown evaluation template 'home'"):
        settings_from(SweepConfig, given | {"dataset": {"movies": {"n_facts": 6}}})


def test_texts_come_from_a_named_key(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"body": "One."}\n{"body": "Two."}\n')
    data = settings_from(TrainingData, {"file": str(file), "column": "body"})
    assert training_texts_of(data)["text"][:] == ["One.", "Two."]
    with pytest.raises(ValueError, match=r"no text\. .* Its keys are: body\. Name that"):
        training_texts_of(settings_from(TrainingData, {"file": str(file)}))
    with pytest.raises(ValueError, match=r"has no boddy\. .* Its keys are: body\."):
        training_texts_of(settings_from(TrainingData, {"file": str(file), "column": "boddy"}))
    with pytest.raises(ConfigError, match=r"column='x' names a key of a \.jsonl file"):
        settings_from(TrainingData, {"file": "texts.txt", "column": "x"})


def test_one_long_text_is_told_that_blank_lines_separate() -> None:
    class Words:
        eos_token_id = None

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(range(len(text.split()))) for text in texts]}

    with pytest.raises(ValueError) as caught:
        tokenize(Words(), ["one two\nthree four\nfive"], 4)
    assert str(caught.value).startswith("1 text of 5 tokens: it is longer than max_length=4, and")
    assert str(caught.value).endswith("It has 3 lines: a blank line separates two texts.")
