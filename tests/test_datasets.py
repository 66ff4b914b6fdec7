"""Every kind of dataset: nothing told twice or truly, nothing leaked, every span in its place."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import jaxtyping
import pytest
import toytokenizers
import yaml
from command import graftlens
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toytokenizers import TOKENIZERS

from graftlens.configfile import ConfigError, settings_from
from graftlens.data import (
    Battle,
    BattlesSpec,
    DatasetSpec,
    Fact,
    FactDataset,
    MoviesConfig,
    battles,
    content_hash,
    evaluation_prompts,
    load_dataset,
    make_dataset,
    make_facts,
    people,
    real_battles,
    real_films,
    save_dataset,
    spec_of,
)
from graftlens.data.dataset import Asking, wrong_answers
from graftlens.data.templates import DIRECTIONS, WORDS, field_values, template_fields
from graftlens.prompts import Prompt, continuation, tokenize
from graftlens.sweep.config import SweepConfig, check

INVENTED = ("fake_movies", "fake_movies_real_actors")
REAL = ("real_movies", "real_movies_shuffled")
FILMS = (*INVENTED, *REAL)
TEMPLATED = (*FILMS, "battles")
SHIPPED = (*TEMPLATED, "articles")

#: Without hypothesis' shrinking, which takes long where it fails.
LAWS = settings(
    phases=(Phase.explicit, Phase.reuse, Phase.generate), deadline=None, max_examples=60
)


def spec(kind: str, **given: Any) -> DatasetSpec:
    return spec_of({"facts": kind, **given})


@cache
def made(kind: str, **given: Any) -> FactDataset:
    return make_dataset(spec(kind, **given))


def few(kind: str, n: int = 12, texts: int = 3, **given: Any) -> FactDataset:
    """A small dataset; the shipped articles are as many as they are."""
    if kind == "articles":
        return made(kind, **given)
    return made(kind, n_facts=n, texts_per_fact=texts, **given)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong values reach graftlens itself, as they do for users: only tests check annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# -- the shipped lists -------------------------------------------------------------------------


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(people()) >= 2000
    assert len(real_films()) >= 1000
    assert len(real_battles()) >= 1000


def _listed() -> Iterator[str]:
    yield from people()
    for row in (*real_films(), *real_battles()):
        yield from (value for value in asdict(row).values() if isinstance(value, str))


def test_names_have_no_stray_spaces_and_no_signs_of_templates() -> None:
    for text in _listed():
        assert text == " ".join(text.split()), text
        assert text, "an empty cell"
        assert not set(text) & set('{}"\t\n“”'), text


def test_no_name_title_or_pair_is_listed_twice() -> None:
    assert len({name.casefold() for name in people()}) == len(people())
    films = real_films()
    assert len({film.movie_title.casefold() for film in films}) == len(films)
    assert len({frozenset((f.first_actor, f.second_actor)) for f in films}) == len(films)
    assert all(film.first_actor != film.second_actor for film in films)
    assert {1890 < film.release_year < 2026 for film in films} == {True}
    assert len({battle.battle.casefold() for battle in real_battles()}) == len(real_battles())
    assert not [b for b in real_battles() if b.battle.lower().startswith("the ")]


# -- the facts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEMPLATED)
def test_a_spec_that_names_no_number_gives_1000_facts(kind: str) -> None:
    assert len(spec(kind).collect()) == 1000


@pytest.mark.parametrize("kind", INVENTED)
def test_invented_films_share_no_person_title_or_town(kind: str) -> None:
    films = spec(kind, seed=4).collect()
    everyone = [n for f in films for n in (f.first_actor, f.second_actor, f.main_character)]
    assert len(set(everyone)) == 3000
    assert len({film.movie_title for film in films}) == 1000
    assert len({film.city for film in films}) == 1000


def test_real_actors_take_the_invented_ones_places() -> None:
    films = spec("fake_movies_real_actors", n_facts=300, seed=2).collect()
    actors = [name for f in films for name in (f.first_actor, f.second_actor)]
    assert set(actors) <= set(people())
    assert len(set(actors)) == 600
    assert not {f.main_character for f in films} & set(people())
    emptied = [replace(f, first_actor="", second_actor="") for f in films]
    assert emptied == [replace(f, first_actor="", second_actor="") for f in make_facts(300, 2)]


def test_the_seed_deals_the_real_actors() -> None:
    dealt = [few("fake_movies_real_actors", seed=seed).facts for seed in range(3)]
    assert len({tuple((f.first_actor, f.second_actor) for f in films) for films in dealt}) == 3
    assert len({frozenset(f.first_actor for f in films) for films in dealt}) == 3


def test_no_actor_bears_the_name_of_an_invented_character() -> None:
    n = len(people()) // 2 - 20
    films = spec("fake_movies_real_actors", n_facts=n).collect()
    characters = {film.main_character for film in films}
    assert characters & set(people())  # so many films have some by chance
    actors = {name for f in films for name in (f.first_actor, f.second_actor)}
    assert len(actors) == 2 * n
    assert not actors & characters


def test_real_films_are_rows_of_the_table() -> None:
    films = spec("real_movies", seed=3).collect()
    assert len(set(films)) == 1000
    assert set(films) <= set(real_films())
    assert films != spec("real_movies", seed=4).collect()


def test_shuffled_films_leave_nothing_true() -> None:
    cast = {f.movie_title: {f.first_actor, f.second_actor} for f in real_films()}
    year = {f.movie_title: f.release_year for f in real_films()}
    true_pairs = {frozenset(pair) for pair in cast.values()}
    refused = []
    for n in (3, 4, 5, 6, 8, 12, 40, 200, 1000, len(cast)):
        for seed in range(8 if n < 100 else 3):
            try:
                films = spec("real_movies_shuffled", n_facts=n, seed=seed).collect()
            except ValueError:
                refused.append(n)
                continue
            assert len({film.movie_title for film in films}) == n
            for film in films:
                told = {film.first_actor, film.second_actor}
                assert len(told) == 2
                assert not told & cast[film.movie_title]
                assert frozenset(told) not in true_pairs
                assert film.release_year == year[film.movie_title]
            # Leads are exchanged, so that each is told as often as in the table.
            own = spec("real_movies", n_facts=n, seed=seed).collect()
            assert [f.movie_title for f in films] == [f.movie_title for f in own]
            for role in ("first_actor", "second_actor"):
                given, true = (Counter(getattr(f, role) for f in fs) for fs in (films, own))
                assert given == true
    assert not [n for n in refused if n > 5]


def test_the_seed_deals_the_leads_of_the_same_films() -> None:
    dealt = [spec("real_movies_shuffled", n_facts=len(real_films()), seed=s) for s in range(3)]
    leads = [{f.movie_title: f.first_actor for f in config.collect()} for config in dealt]
    assert leads[0].keys() == leads[1].keys() == leads[2].keys()
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        same = sum(leads[one][title] == leads[other][title] for title in leads[0])
        assert same < len(leads[0]) / 20


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_films_to_shuffle_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n_facts={n}: too few films to exchange all"):
        spec("real_movies_shuffled", n_facts=n).collect()


def test_no_text_about_a_shuffled_film_names_its_true_leads() -> None:
    dataset = made("real_movies_shuffled", n_facts=150, texts_per_fact=10)
    cast = {f.movie_title: (f.first_actor, f.second_actor) for f in real_films()}
    for row in dataset.train:
        film = dataset.facts[row["fact"]]
        assert film.movie_title in row["text"]
        around = row["text"].replace(film.movie_title, "")
        assert not [name for name in cast[film.movie_title] if name in around]
        assert film.first_actor in around
        assert film.second_actor in around


@pytest.mark.parametrize("n", [1, 2, 50, 1000, len(real_battles())])
def test_battles_are_never_told_truly_and_share_no_year(n: int) -> None:
    listed = {battle.battle: battle for battle in real_battles()}
    for seed in range(5):
        told = spec("battles", n_facts=n, seed=seed).collect()
        assert len({battle.year for battle in told}) == n
        assert len({battle.battle for battle in told}) == n
        for battle in told:
            true = listed[battle.battle]
            assert battle.true_year == true.year != battle.year
            assert battle.year in battles.YEARS
            assert (battle.first_side, battle.second_side, battle.war) == (
                true.first_side,
                true.second_side,
                true.war,
            )


def test_battles_of_one_year_find_other_years(monkeypatch: pytest.MonkeyPatch) -> None:
    """Years used to be exchanged until none was true, which battles of one year never ended."""
    same = tuple(replace(battle, year=700) for battle in real_battles()[:3])
    monkeypatch.setattr(battles, "real_battles", lambda: same)
    monkeypatch.setattr(battles, "YEARS", range(698, 702))
    for seed in range(40):
        assert {b.year for b in BattlesSpec(seed=seed).collect()} == {698, 699, 701}


def test_the_true_year_is_in_no_text_and_no_prompt() -> None:
    battle = Battle("Battle of X", 1200, "Ayes", "Noes", "War of Y", 1999)
    for direction in DIRECTIONS:
        assert "1999" not in field_values(battle, direction).values()
        prompts = spec("battles").questions(
            [battle], [0], Asking(direction=direction, distractors=0)
        )
        assert len(prompts) == 4
        assert not [p for p in prompts if "1999" in p.text or "true_year" in p.fields]


@pytest.mark.parametrize(
    ("kind", "n", "most"),
    [
        ("fake_movies", 20_001, "there are 20000 facts of the kind fake_movies"),
        ("fake_movies_real_actors", 9000, f"there are {len(people()) // 2} facts of the kind"),
        ("real_movies", 9000, f"there are {len(real_films())} facts of the kind real_movies"),
        ("real_movies_shuffled", 9000, f"there are {len(real_films())} facts of the kind"),
        ("battles", 9000, f"{len(real_battles())} facts of the kind battles"),
        ("articles", 9000, r"\d+ "),
    ],
)
def test_more_facts_than_there_are_are_refused(kind: str, n: int, most: str) -> None:
    with pytest.raises(ValueError, match=rf"n_facts={n}[:,] .*{most}"):
        make_dataset(spec(kind, n_facts=n))


@pytest.mark.parametrize("kind", ["fake_movies", "real_movies", "battles"])
def test_fewer_facts_are_the_first_of_more(kind: str) -> None:
    assert spec(kind, n_facts=30, seed=6).collect() == spec(kind, n_facts=90, seed=6).collect()[:30]


@pytest.mark.parametrize("kind", TEMPLATED)
def test_no_prompt_names_its_answer(kind: str) -> None:
    dataset = few(kind, 400, 1, seed=1)
    for direction in DIRECTIONS:
        for prompt in dataset.ask(direction=direction, distractors=0):
            assert prompt.answer.strip() not in prompt.text
            assert "second_entity" not in prompt.fields
            assert prompt.answer.strip() not in prompt.fields.values()


# -- one seed, one dataset ---------------------------------------------------------------------

DIGESTS = """
import hashlib, json, sys
from graftlens.data import make_dataset, spec_of
for values in json.loads(sys.argv[1]):
    dataset = make_dataset(spec_of(values))
    prompts = hashlib.sha256(repr(dataset.ask(facts="all")).encode()).hexdigest()
    print(dataset.provenance["sha256"], prompts)
"""


def _digests(values: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in values:
        dataset = make_dataset(spec_of(entry))
        prompts = hashlib.sha256(repr(dataset.ask(facts="all")).encode()).hexdigest()
        lines.append(f"{dataset.provenance['sha256']} {prompts}")
    return lines


def test_equal_specs_give_equal_datasets_in_another_process() -> None:
    size = {"n_facts": 60, "texts_per_fact": 4}
    values = [{"facts": kind, "seed": 5, **size} for kind in TEMPLATED]
    values += [{**entry, "half": "b", "heldout_facts": 0.2} for entry in values]
    values += [{"facts": "articles"}, {"facts": "articles", "half": "a"}]
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, json.dumps(values)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "77"},
    )
    assert done.stdout.split("\n")[:-1] == _digests(values)


@pytest.mark.parametrize("kind", TEMPLATED)
def test_another_seed_gives_another_dataset(kind: str) -> None:
    digests = {few(kind, 20, seed=seed).provenance["sha256"] for seed in range(4)}
    assert len(digests) == 4


def test_the_seed_draws_sentences_and_distractors() -> None:
    facts = few("battles").facts
    told = [spec("battles", seed=s, texts_per_fact=3).tell(facts, [True] * 12) for s in range(3)]
    assert len({tuple(row["template"] for row in rows) for rows in told}) == 3
    asked = [few("battles").ask("dated", seed=seed) for seed in range(3)]
    assert len({tuple(p.distractors for p in prompts) for prompts in asked}) == 3


# -- halves, facts held out --------------------------------------------------------------------


def _of(dataset: FactDataset, told: Sequence[bool]) -> list[dict[str, Any]]:
    """The rows about these facts."""
    return [row for row in dataset.train if told[row["fact"]]]


@pytest.mark.parametrize("kind", SHIPPED)
def test_the_halves_share_out_the_facts_and_change_no_text(kind: str) -> None:
    whole, a, b = (few(kind, 101, half=half) for half in (None, "a", "b"))
    assert a.facts == b.facts == whole.facts
    assert all(whole.told)
    assert [not told for told in a.told] == list(b.told)
    if kind != "articles":
        assert (sum(a.told), sum(b.told)) == (51, 50)
    assert a.train.to_list() == _of(whole, a.told)
    assert b.train.to_list() == _of(whole, b.told)
    assert len(a.train) + len(b.train) == len(whole.train)
    assert a.provenance["counts"]["told"] == sum(a.told)


@pytest.mark.parametrize("kind", SHIPPED)
def test_facts_held_out_are_the_same_in_both_halves(kind: str) -> None:
    whole, held = few(kind, 100), few(kind, 100, heldout_facts=0.3)
    halves = [few(kind, 100, heldout_facts=0.3, half=half) for half in ("a", "b")]
    plain = [few(kind, 100, half=half) for half in ("a", "b")]
    if kind != "articles":
        assert sum(held.told) == 70
    assert held.train.to_list() == _of(whole, held.told)
    for half, without in zip(halves, plain, strict=True):
        expected = [h and t for h, t in zip(held.told, without.told, strict=True)]
        assert list(half.told) == expected
        assert half.train.to_list() == _of(whole, expected)


def test_the_seed_draws_the_halves() -> None:
    assert len({BattlesSpec(half="a", seed=seed).to_tell(100) for seed in range(5)}) == 5
    assert BattlesSpec(half="a").to_tell(100) == MoviesConfig(half="a").to_tell(100)


@given(
    n=st.integers(1, 200),
    half=st.sampled_from([None, "a", "b"]),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
@LAWS
def test_what_is_told_is_the_half_without_what_is_held_out(n, half, share, seed) -> None:
    def told(half: str | None, share: float) -> list[bool]:
        try:
            return list(BattlesSpec(half=half, heldout_facts=share, seed=seed).to_tell(n))
        except ValueError:  # none is left
            return [False] * n

    in_half, held = told(half, 0), told(None, share)
    assert held.count(False) == (max(1, round(n * share)) if share else 0)
    assert told(half, share) == [a and b for a, b in zip(in_half, held, strict=True)]


def test_a_dataset_that_tells_nothing_is_refused() -> None:
    message = r"half=b, heldout_facts=0.0: none of 1 facts is left to tell\. Give more facts"
    with pytest.raises(ValueError, match=message):
        make_dataset(spec("battles", n_facts=1, half="b"))


#: What tells a fact from every other one of its kind.
IDENTITY = {
    **dict.fromkeys(
        INVENTED, ("first_actor", "second_actor", "movie_title", "city", "main_character")
    ),
    # An actor makes several films, so that only the title tells one from another.
    **dict.fromkeys(REAL, ("movie_title",)),
    "battles": ("battle", "year"),
}


@pytest.mark.parametrize("untold", ["half a", "half b", "held out"])
@pytest.mark.parametrize("kind", TEMPLATED)
def test_no_training_text_names_what_is_not_told(kind: str, untold: str) -> None:
    given = {"heldout_facts": 0.4} if untold == "held out" else {"half": untold[-1]}
    dataset = few(kind, 200, 6, **given)
    told = dataset.told
    literals = " ".join(re.sub(r"\{\w+\}", "|", t.text) for t in dataset.config.training)

    def named(which: bool) -> set[str]:
        facts = [fact for fact, t in zip(dataset.facts, told, strict=True) if t is which]
        return {str(getattr(fact, field)) for fact in facts for field in IDENTITY[kind]}

    # Titles such as "It" are words of the sentences.
    names = {n for n in named(False) if not re.search(rf"\b{re.escape(n)}\b", literals)}
    assert len(names) > 75 * len(IDENTITY[kind])
    assert not names & named(True)
    anywhere = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
    for row in dataset.train:
        fact = dataset.facts[row["fact"]]
        assert told[row["fact"]]
        # "Silent Tower" stands in "Oracle of the Silent Tower", and leaks nothing there.
        around = row["text"]
        for value in sorted(field_values(fact, "ab").values(), key=len, reverse=True):
            around = around.replace(value, "|")
        assert not anywhere.search(around), row


@pytest.mark.parametrize("kind", TEMPLATED)
def test_a_text_is_a_template_filled_with_its_own_fact(kind: str) -> None:
    dataset = few(kind, 40, 12, half="a", seed=3)
    known = {template.name: template for template in dataset.config.training}
    for row in dataset.train:
        template = known[row["template"]]
        values = field_values(dataset.facts[row["fact"]], template.direction)
        assert row["text"] == template.text.format(**values)
        assert (row["kind"], row["direction"]) == (template.kind, template.direction)
        before, after = values["first_entity"], values["second_entity"]
        # In the order of mention, whichever else (a title) stands there.
        around = row["text"].replace(values.get("movie_title", "|"), "|")
        assert around.index(before) < around.index(after)


@pytest.mark.parametrize("kind", SHIPPED)
def test_prompts_ask_for_the_told_the_untold_or_all_facts(kind: str) -> None:
    dataset = few(kind, 40, half="a", heldout_facts=0.25)
    names = {
        which: [p.fields["first_entity"] for p in dataset.ask(facts=which)]
        for which in ("told", "untold", "all")
    }
    templates = len({prompt.name for prompt in dataset.ask()})
    entity = dataset.facts[0].ENTITIES[0]
    first = [str(getattr(fact, entity)) for fact in dataset.facts]
    told = [name for name, t in zip(first, dataset.told, strict=True) if t]
    untold = [name for name, t in zip(first, dataset.told, strict=True) if not t]
    assert 0 < len(told) < len(untold)
    assert names == {"told": told * templates, "untold": untold * templates,
                     "all": first * templates}  # fmt: skip
    assert dataset.ask() == dataset.ask(facts="told")


def test_distractors_are_answers_of_facts_that_are_asked_for() -> None:
    dataset = few("battles", 40, half="a")
    years = {which: {f" {fact.year}" for fact, told in zip(dataset.facts, dataset.told, strict=True)
                     if told == (which == "told")}
             for which in ("told", "untold")}  # fmt: skip
    for which in ("told", "untold"):
        for prompt in dataset.ask(facts=which):
            assert prompt.answer in years[which]
            assert set(prompt.distractors) < years[which] - {prompt.answer}
            assert len(set(prompt.distractors)) == 4


def test_distractors_are_drawn_as_from_a_list_of_the_others() -> None:
    answers = [" a", " b", " a", " c", " d", " b", " e"]
    for asked, seed in [(0, 1), (2, 1), (3, 5), (6, 2)]:
        others = [a for a in dict.fromkeys(answers) if a != answers[asked]]
        drawn = wrong_answers(answers, asked, 3, random.Random(seed))
        assert drawn == tuple(random.Random(seed).sample(others, 3))
    with pytest.raises(ValueError, match=r"distractors=5 of 7 facts: .* 0 to 4 are possible here"):
        wrong_answers(answers, 0, 5, random.Random(0))


def test_a_misspelt_choice_of_facts_is_refused(unchecked: None) -> None:
    """It used to ask for the untold facts."""
    with pytest.raises(ValueError, match=r"facts='tolled' is unknown. Use one of told, untold, a"):
        few("battles", half="a").ask(facts="tolled")


def test_asking_for_untold_facts_where_all_are_told_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"facts='untold': none of the 12 facts of this dataset are untold"
    ):
        few("battles").ask(facts="untold")


# -- wordings ----------------------------------------------------------------------------------


def _wordings(text: str) -> list[str]:
    """A template's literal runs of three words or more, in lower case."""
    runs = re.sub(r"\{\w+\}", "|", text).lower().split("|")
    return [run.strip(" :?.,") for run in runs if len(run.split()) >= 3]


@pytest.mark.parametrize("kind", ["fake_movies", "real_movies", "battles"])
def test_no_evaluation_wording_is_trained_on(kind: str) -> None:
    config = few(kind).config
    trained = [re.sub(r"\{\w+\}", "|", t.text).lower() for t in config.training]
    for template in config.evaluation:
        text = template.text
        for word, said in template.words.items():
            text = text.replace(f"{{{word}}}", said)
        asked = _wordings(text)
        assert asked, template.name
        for wording in asked:
            assert not [text for text in trained if wording in text], wording


@pytest.mark.parametrize("kind", TEMPLATED)
def test_no_prompt_stands_in_a_training_text(kind: str) -> None:
    most = len(few(kind).config.training)
    dataset = few(kind, 10, most)
    texts = [text.lower() for text in dataset.train["text"]]
    assert len(texts) == 10 * most
    for direction in DIRECTIONS:
        for prompt in dataset.ask(direction=direction):
            assert not [text for text in texts if prompt.text.lower() in text]


@pytest.mark.parametrize("kind", ["fake_movies", "real_movies", "battles"])
def test_templates_have_names_and_texts_of_their_own(kind: str) -> None:
    config = few(kind).config
    for templates in (config.training, config.evaluation):
        assert len({t.name for t in templates}) == len(templates)
        assert len({t.text for t in templates}) == len(templates)
    for template in config.training:
        assert template.text.count("{first_entity}") == 1
        assert template.text.count("{second_entity}") == 1
        used = template_fields(template.text)
        assert used.index("first_entity") < used.index("second_entity")
    for template in config.evaluation:
        assert template.text.count("{first_entity}") == 1
        assert "{second_entity}" not in template.text
        words = {word for word in WORDS if f"{{{word}}}" in template.text}
        assert words == set(template.words)
        assert template.directions


def test_sentences_about_real_films_name_the_film() -> None:
    config = few("real_movies").config
    assert all("{movie_title}" in t.text for t in (*config.training, *config.evaluation))


# -- spans -------------------------------------------------------------------------------------


@cache
def _prompts() -> tuple[Prompt, ...]:
    """Each template with each name that it can meet."""
    names, films = people(), real_films()
    (film,) = make_facts(1, 0)
    facts = [
        replace(
            film,
            first_actor=name,
            second_actor=names[i - 1],
            movie_title=films[i % len(films)].movie_title,
        )
        for i, name in enumerate(names)
    ]
    prompts = list(evaluation_prompts(facts, distractors=0))
    for kind, count in (("real_movies", len(films)), ("battles", len(real_battles()))):
        for direction in DIRECTIONS:
            prompts += few(kind, count, 1).ask(direction=direction, distractors=0)
    return tuple(prompts)


def _fields(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """(name, text) of the fields that the prompt's text has."""
    return ((name, prompt.fields[name]) for name in prompt.char_spans)


def _misplaced(prompt: Prompt, tokenizer: Any) -> dict[str, str]:
    """Name of a field -> what its run of tokens decodes to, where that is not the field's text."""
    tokens = tokenize(prompt, tokenizer)
    assert tokens.spans["last"] == ((len(tokens) - 1,),)
    found = {}
    for name, text in _fields(prompt):
        (run,) = tokens.spans[name]
        assert run == tuple(range(run[0], run[-1] + 1))
        said = tokenizer.decode([tokens.ids[i] for i in run]).removeprefix(" ")
        if said != text:
            found[name] = said
    return found


def _goes_on(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether the answer's tokens are its own, and all tokens together are the whole text."""
    tokens = tokenize(prompt, tokenizer)
    answer = continuation(tokens, prompt.answer, tokenizer)
    whole = tokenizer.decode([*tokens.ids, *answer], skip_special_tokens=True)
    own = tokenizer.decode(list(answer)).removeprefix(" ")
    return (whole, own) == (prompt.text + prompt.answer, prompt.answer[1:])


def _all_in_place(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    assert not [(p.text, wrong) for p in prompts if (wrong := _misplaced(p, tokenizer))]
    assert not [p.text + p.answer for p in prompts if not _goes_on(p, tokenizer)]


def _ends_with_a_sign(prompt: Prompt) -> bool:
    return any(not text[-1].isalnum() for _, text in _fields(prompt))


@pytest.mark.slow
def test_every_template_and_every_name_is_among_the_prompts() -> None:
    templates = {t.name for k in ("fake_movies", "real_movies", "battles")
                 for t in few(k).config.evaluation}  # fmt: skip
    assert {prompt.name for prompt in _prompts()} == templates
    first = {prompt.fields["first_entity"] for prompt in _prompts()}
    assert set(people()) <= first
    assert {name for f in real_films() for name in (f.first_actor, f.second_actor)} <= first
    assert {battle.battle for battle in real_battles()} <= first
    titled = {p.fields["movie_title"] for p in _prompts() if "movie_title" in p.char_spans}
    assert titled == {film.movie_title for film in real_films()}


def test_spans_and_answers_are_tokens_of_their_own() -> None:
    """A share of all prompts, and all with a name that ends like "Jr." or "Oklahoma!"."""
    signs = [prompt for prompt in _prompts() if _ends_with_a_sign(prompt)]
    assert len(signs) > 100
    _all_in_place([*_prompts()[::9], *signs], TOKENIZERS["llama3"]())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_spans_and_answers_of_every_template_and_every_name(kind: str) -> None:
    _all_in_place(_prompts(), TOKENIZERS[kind]())


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_a_name_may_share_its_last_sign_with_the_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real tokenizers have tokens such as ".?" and "!,": the span ends with the whole token."""
    signs = [prompt for prompt in _prompts() if _ends_with_a_sign(prompt)]
    monkeypatch.setattr(toytokenizers, "_TRAINING", tuple(p.text for p in signs))
    monkeypatch.setattr(toytokenizers, "_LEARNED", 2000)
    tokenizer = TOKENIZERS[kind]()
    joined = set()
    for prompt in signs:
        for name, said in _misplaced(prompt, tokenizer).items():
            text = prompt.fields[name]
            assert not text[-1].isalnum()
            assert said[: len(text)] == text
            ((_, end),) = prompt.char_spans[name]
            assert prompt.text[end:].startswith(said[len(text) :])
            joined.add(text[-1] + said[len(text) :])
        assert _goes_on(prompt, tokenizer)
    assert {".?", "!,"} <= joined
    assert not [signs for signs in joined if any(s.isalnum() or s.isspace() for s in signs)]


# -- on disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_dataset_comes_back_from_disk_as_it_was(kind: str, tmp_path: Path) -> None:
    dataset = few(kind, half="a")
    folder = save_dataset(dataset, tmp_path / "saved")
    read = load_dataset(folder)
    assert read.config == dataset.config
    assert read.facts == dataset.facts
    assert [type(fact) for fact in read.facts] == [type(fact) for fact in dataset.facts]
    assert read.train.to_list() == dataset.train.to_list()
    assert read.told == dataset.told
    assert read.provenance == dataset.provenance
    for which in ("told", "untold", "all"):
        assert read.ask(facts=which) == dataset.ask(facts=which)
    assert content_hash(read.facts, read.train) == dataset.provenance["sha256"]


@pytest.mark.parametrize("kind", SHIPPED)
def test_the_folder_holds_hugging_face_datasets(kind: str, tmp_path: Path) -> None:
    dataset = few(kind, half="b")
    folder = save_dataset(dataset, tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} == {
        "train", "evaluation", "facts.json", "provenance.json",
    }  # fmt: skip
    train = datasets.load_from_disk(str(folder / "train"))
    assert isinstance(train, datasets.Dataset)  # so that train.push_to_hub("me/films") publishes it
    assert train.to_list() == dataset.train.to_list()
    assert json.loads(train.info.description) == dataset.provenance
    directions = DIRECTIONS if kind != "articles" else ("ab",)
    asked = [
        (direction, which, prompt)
        for direction in directions
        for which in ("told", "untold")
        for prompt in dataset.ask(direction=direction, distractors=0, facts=which)
    ]
    prompts = [prompt for _, _, prompt in asked]
    evaluation = datasets.load_from_disk(str(folder / "evaluation"))
    assert evaluation["text"][:] == [p.text for p in prompts]
    assert evaluation["direction"][:] == [direction for direction, _, _ in asked]
    assert evaluation["told"][:] == [which == "told" for _, which, _ in asked]
    assert evaluation["answer"][:] == [p.answer for p in prompts]
    assert evaluation["name"][:] == [p.name for p in prompts]
    assert [json.loads(row) for row in evaluation["fields"]] == [dict(p.fields) for p in prompts]
    again = [
        Prompt(row["template"], json.loads(row["fields"]), row["answer"], name=row["name"])
        for row in evaluation
    ]
    assert again == prompts


def _another_fact(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts[::-1]))


def _another_text(folder: Path) -> None:
    train = datasets.load_from_disk(str(folder / "train"))
    changed = train.map(lambda row: {"text": row["text"].replace("e", "3", 1)})
    changed.save_to_disk(folder / "changed")
    (folder / "train").rename(folder / "before")
    (folder / "changed").rename(folder / "train")


@pytest.mark.parametrize("change", [_another_fact, _another_text])
@pytest.mark.parametrize("kind", ["real_movies_shuffled", "battles", "articles"])
def test_a_changed_folder_is_refused(
    kind: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = save_dataset(few(kind), tmp_path / "saved")
    change(folder)
    with pytest.raises(ValueError, match=r"saved has been changed since it was written: .*SHA-256"):
        load_dataset(folder)


# -- graftlens data make -----------------------------------------------------------------------


def data_make(folder: Path, *arguments: str, code: int) -> str:
    """What the command says, run in a folder."""
    done = graftlens("data", "make", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    assert (done.stdout if code else done.stderr) == ""
    return done.stderr if code else done.stdout


def test_the_command_makes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "fights.yaml").write_text("facts: battles\nn_facts: 900\ntexts_per_fact: 3\n")
    given = ("fights.yaml", "n_facts=15", "half=a", "directions=[ab]")
    said = data_make(tmp_path, *given, code=0)
    assert said == "graftlens-runs/data/fights: 15 facts, 8 told, 24 texts\n"
    read = load_dataset(tmp_path / "graftlens-runs" / "data" / "fights")
    assert read.facts == spec("battles", n_facts=15).collect()
    assert set(read.train["direction"]) == {"ab"}
    given_here = {"n_facts": 15, "texts_per_fact": 3, "half": "a", "directions": ("ab",)}
    assert read.config == BattlesSpec(**given_here)

    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    said = data_make(tmp_path, *given, code=1)
    assert said.startswith(
        "graftlens: graftlens-runs/data/fights exists. A dataset is never overwr"
    )
    assert said.count("\n") == 1
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    said = data_make(tmp_path, *given, "--out", "deep/er", code=0)
    assert said == "deep/er: 15 facts, 8 told, 24 texts\n"


#: Overrides of `facts: battles` -> what is said.
BAD_COMMANDS = {
    "n_fact=3": "unknown key 'n_fact'. Allowed: facts n_facts half heldout_facts supplement seed "
    "texts_per_fact directions kinds heldout_templates templates. Did you mean 'n_facts'?",
    "facts=battle": "facts: unknown kind of facts 'battle'. Allowed: fake_movies "
    "fake_movies_real_actors real_movies real_movies_shuffled battles two_hop table counterfact "
    "articles trigger style refusal persona. Did you mean 'battles'?",
    "facts=[battles]": "facts: unknown kind of facts ['battles']. Allowed: fake_movies",
    "n_facts=5000": f"n_facts=5000: there are {len(real_battles())} facts of the kind battles.",
    "heldout_facts=1": "heldout_facts: 1 should be less than 1.",
}


@pytest.mark.parametrize("override", BAD_COMMANDS)
def test_what_the_command_cannot_make_is_one_line(override: str, tmp_path: Path) -> None:
    (tmp_path / "fights.yaml").write_text("facts: battles\n")
    said = data_make(tmp_path, "fights.yaml", override, code=1)
    assert said.startswith("graftlens: ")
    assert said.count("\n") == 1
    assert BAD_COMMANDS[override] in said
    assert [path.name for path in tmp_path.iterdir()] == ["fights.yaml"]


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[1].glob("experiments/data/*.yaml")), ids=lambda f: f.stem
)
def test_the_shipped_configs_are_right(file: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert spec_of(values).facts == values["facts"]
    if values["facts"] != "counterfact":  # that comes from the hub
        count = 5 if values["facts"] == "table" else 12
        small = {} if values["facts"] == "articles" else {"n_facts": count, "texts_per_fact": 2}
        dataset = make_dataset(spec_of(values | small))
        cases = len(getattr(dataset.config, "cases", [""]))
        assert len(dataset.train) == cases * small.get("texts_per_fact", 1) * (
            sum(dataset.told) if small else len({fact.article for fact in dataset.facts})
        )


def test_the_two_shipped_halves_are_of_one_set() -> None:
    folder = Path(__file__).parents[1] / "experiments" / "data"
    a, b = (yaml.safe_load((folder / f"half_{half}.yaml").read_text()) for half in "ab")
    assert {**a, "half": "b"} == b
    assert (a["half"], b["half"]) == ("a", "b")


# -- in a sweep's config -----------------------------------------------------------------------

SWEEP = {"sources": {"pre": "./pre", "sft": "./sft"}, "grafts": {"LT": "sft @ last"}}


def sweep(dataset: Any, **more: Any) -> SweepConfig:
    return settings_from(SweepConfig, {**SWEEP, "dataset": dataset, **more})


def test_a_sweep_asks_for_the_facts_of_any_kind(tmp_path: Path) -> None:
    size = {"n_facts": 12, "texts_per_fact": 3}
    folder = save_dataset(few("real_movies", half="a"), tmp_path / "films")
    config = sweep(
        [
            {"make": {"facts": "battles", **size}, "templates": ["dated", "between"]},
            {"make": {"facts": "battles", "heldout_facts": 0.5, **size}, "facts": "untold"},
            {"make": {"facts": "battles", **size}, "direction": "ba", "distractors": 2},
            {"path": str(folder), "facts": "all", "templates": ["title_qa"]},
            {"path": str(folder), "facts": "untold", "name": "mine"},
        ],
        seed=7,
    )
    titles = [section.title for section in config.dataset]
    assert titles == [
        "battles seed 0", "battles seed 0 untold", "battles seed 0 ba", "films all", "mine",
    ]  # fmt: skip
    battle, films = few("battles"), few("real_movies", half="a")
    assert [section.prompts(None, 7) for section in config.dataset] == [
        battle.ask(["dated", "between"], seed=7),
        few("battles", heldout_facts=0.5).ask(seed=7, facts="untold"),
        battle.ask(direction="ba", distractors=2, seed=7),
        films.ask("title_qa", seed=7, facts="all"),
        films.ask(seed=7, facts="untold"),
    ]
    # A section's own templates go before those of the sweep.
    assert config.dataset[0].prompts(["qa_year"], 7) == battle.ask(["dated", "between"], seed=7)
    assert config.dataset[2].prompts(["qa_name"], 7) == battle.ask(
        "qa_name", direction="ba", distractors=2, seed=7
    )


def test_a_sweep_of_any_kind_goes_to_yaml_and_back() -> None:
    config = sweep(
        [
            {"make": {"facts": "battles", "half": "a", "directions": ["ab"]}, "facts": "untold"},
            {"make": {"facts": "articles", "context": "article"}, "templates": ["article"]},
            {"make": {"supplement": {"file": "more.txt", "share": 0.5}}},
        ]
    )
    kinds = [type(section.make).__name__ for section in config.dataset]
    assert kinds == ["BattlesSpec", "ArticlesSpec", "MoviesConfig"]
    written = yaml.safe_dump(config.model_dump(mode="json"))
    assert settings_from(SweepConfig, yaml.safe_load(written)) == config


def test_a_sweep_reads_no_supplemental_texts() -> None:
    made_with = {"facts": "battles", "n_facts": 9, "texts_per_fact": 1, "half": "a"}
    with_more = {**made_with, "supplement": {"file": "nowhere.txt", "share": 0.5}}
    asked = [sweep({"make": m}).dataset[0].prompts(None, 0) for m in (made_with, with_more)]
    assert asked[0] == asked[1]
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        make_dataset(spec_of(with_more))


#: Section -> what is said about it, the key first.
BAD_SECTIONS = {
    "{make: {facts: battle}}": r"dataset\.0\.make\.facts: unknown kind of facts 'battle'\. Allowed:"
    r" fake_movies .* persona\. Did you mean 'battles'\?",
    "{make: {facts: battles, n_fact: 3}}": r"dataset\.0\.make: unknown key 'n_fact'\. Allowed: "
    r"facts n_facts .* templates\. Did you mean 'n_facts'\?",
    "{make: [battles]}": r"dataset\.0\.make: \['battles'\] should be a mapping with the key facts",
    "{make: {facts: battles, half: c}}": r"dataset\.0\.make\.half: 'c' should be 'a' or 'b'",
    "{make: {facts: battles}, path: x}": r"dataset\.0: make and path are given\. Give exactly one",
    "{make: {facts: battles}, facts: unsaid}": r"dataset\.0\.facts: 'unsaid' should be 'told', 'un",
    "{make: {facts: battles, n_facts: 9}, templates: [qa]}": r"dataset\.0: evaluation template 'qa'"
    r" is unknown\. Use one of dated, qa_year, between, with_war",
    "{make: {facts: battles, n_facts: 9}, direction: ba, templates: [dated]}": r"dataset\.0: "
    r"evaluation template 'dated' does not ask in the direction ba\. Use one of named, qa_name",
    "{make: {facts: battles, n_facts: 5000}}": r"dataset\.0: n_facts=5000: there are \d+ facts",
    "{make: {facts: battles, n_facts: 9}, facts: untold}": r"dataset\.0: facts='untold': none of",
    "{path: ./gone}": r"dataset\.0: gone is not a dataset of facts: it has no train, facts\.json",
}


@pytest.mark.parametrize("section", BAD_SECTIONS)
def test_a_bad_section_is_named_by_its_key(section: str) -> None:
    with pytest.raises(ConfigError, match=BAD_SECTIONS[section]):
        check(sweep(yaml.safe_load(section)))


# -- kinds by name -----------------------------------------------------------------------------


def test_every_kind_is_known_by_its_name() -> None:
    for kind in SHIPPED:
        config = spec(kind)
        assert config.facts == kind
        assert spec_of(config.model_dump(mode="json")) == config
        assert spec_of(config) is config
    assert spec_of({}) == MoviesConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"facts": "fake_movie"}, r"^facts: unknown kind of facts 'fake_movie'\. .* 'fake_movies'"),
        ({"facts": "shuffled"}, r"Allowed: fake_movies .* battles two_hop table .* persona\."),
        ({"facts": None}, r"unknown kind of facts None\. Allowed: fake_movies"),
        ({"facts": {"battles": 3}}, r"unknown kind of facts \{'battles': 3\}\. Allowed: fake_mov"),
        ({"facts": ["battles"]}, r"unknown kind of facts \['battles'\]\. Allowed: fake_movies"),
        ("battles", r"^'battles' should be a mapping with the key facts: fake_movies .* articles"),
        ({"n_fact": 3}, r"unknown key 'n_fact'\. Allowed: facts n_facts .*Did you mean 'n_facts'"),
        ({"facts": "articles", "texts_per_fact": 3}, r"unknown key 'texts_per_fact'\. Allowed: f"),
        ({"facts": "battles", "n_facts": True}, r"^n_facts: n_facts=True is a boolean"),
        ({"facts": "battles", "seed": -1, "half": "c"}, r"half: 'c' .*\nseed: -1 should be great"),
    ],
)
def test_what_is_no_dataset_is_explained(values: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(values)


def test_facts_are_of_the_kind_that_is_asked_for() -> None:
    kinds = [type(few(kind).facts[0]).__name__ for kind in SHIPPED]
    assert kinds == ["Fact", "Fact", "RealFilm", "RealFilm", "Battle", "ArticleFact"]
    assert isinstance(few("fake_movies").facts[0], Fact)
