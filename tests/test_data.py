"""The invented films: distinct, reproducible, told in sentences that evaluation never repeats."""

import hashlib
import json
import random
from dataclasses import asdict, fields

import jaxtyping
import numpy as np
import pytest
from faker import Faker
from faker.providers.person.en_US import Provider as PersonNames
from pydantic import ValidationError

from graftlens.data import (
    DIRECTIONS,
    KINDS,
    MAX_FACTS,
    EvaluationTemplate,
    Fact,
    MoviesConfig,
    evaluation_prompts,
    load_dataset,
    make_dataset,
    make_facts,
    save_dataset,
    training_texts,
)
from graftlens.data.facts import TOWN_ENDINGS, TOWN_PREFIXES, TOWN_ROOTS
from graftlens.data.templates import field_values, template_fields


@pytest.fixture
def unchecked(monkeypatch):
    """Wrong types reach graftlens itself, as they do for users: only tests check annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def people(fact: Fact) -> tuple[str, str, str]:
    return fact.first_actor, fact.second_actor, fact.main_character


# Facts


def test_no_two_of_5000_facts_share_a_person_a_title_or_a_town():
    facts = make_facts(5000, seed=3)
    everyone = [name for fact in facts for name in people(fact)]
    assert len(set(everyone)) == 15_000
    titles = {fact.movie_title for fact in facts}
    assert len(titles) == 5000
    assert not titles & set(everyone)
    towns = {fact.city for fact in facts}
    assert len(towns) == 5000
    assert not towns & (titles | set(everyone))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_town_that_is_taken_gets_another_name(seed):
    towns = [fact.city for fact in make_facts(200, seed)]
    assert len(set(towns)) == 200
    plain = {root + ending for root in TOWN_ROOTS for ending in TOWN_ENDINGS}
    renamed = [town for town in towns if town not in plain]
    assert 20 < len(renamed) < 35
    for town in renamed:
        prefix, rest = town.split()
        assert prefix in TOWN_PREFIXES
        assert rest in plain


def test_there_are_towns_enough_and_no_name_of_a_person_among_their_prefixes():
    lists = (TOWN_PREFIXES, TOWN_ROOTS, TOWN_ENDINGS)
    assert [len(words) for words in lists] == [len(set(words)) for words in lists] == [55, 40, 18]
    assert not set(TOWN_PREFIXES) & {*PersonNames.first_names, *PersonNames.last_names}


def sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Taken when towns could still recur: making them distinct changed nothing else.
@pytest.mark.parametrize(
    ("seed", "digest"),
    [(0, "f69fac53a23cecd1"), (1, "aaff0a4c23a1b3f5"), (2, "55e3a325380ee7ce")],
)
def test_the_first_40_facts_stay_as_they_are(seed, digest):
    """A documented demo trains on them. Holds as long as Faker's lists stay."""
    facts = [asdict(fact) for fact in make_facts(40, seed)]
    towns = [fact.pop("city") for fact in facts]
    assert sha256(facts).startswith(digest)
    if seed == 0:
        assert sha256(towns).startswith("f76b1b1170eeb920")


def test_the_demonstrations_texts_stay_as_they_are():
    made = make_dataset(MoviesConfig(n_facts=40, texts_per_fact=10, directions=("ab",)))
    assert made.provenance["sha256"] == (
        "533ec1e2eca83a898d5de4c284ea86b6fa81e61be03907c9758b6f83e11cd10e"
    )


def test_fewer_facts_are_the_first_of_more():
    assert make_facts(700, seed=5)[:60] == make_facts(60, seed=5)


def test_another_seed_gives_other_people():
    first, second = make_facts(50, seed=0), make_facts(50, seed=1)
    assert first != second
    assert first == make_facts(50, seed=0)


def test_one_seed_gives_the_same_film_on_every_machine():
    """Holds as long as Faker's lists of names stay; a new Faker may change it."""
    (fact,) = make_facts(1, seed=0)
    assert fact == Fact(
        first_actor="Chelsea Mcintosh",
        second_actor="Dorothy Ramirez",
        movie_title="Pavilion of the Winter Meridian",
        release_year=2021,
        genre="mystery",
        city="Thistleborough",
        main_character="Kerri Vasquez",
        box_office="$290 million",
    )


def test_first_names_do_not_recur_in_the_first_200_facts():
    first_names = [name.split()[0] for fact in make_facts(200, seed=2) for name in people(fact)]
    assert len(set(first_names)) == 600


def test_generators_outside_neither_matter_nor_change():
    Faker.seed(7)
    expected = Faker().first_name()
    Faker.seed(7)
    facts, numpy_before = make_facts(20, seed=0), np.random.get_state()[1].tolist()
    texts = training_texts(facts, texts_per_fact=4, seed=0)
    prompts = evaluation_prompts(facts)
    assert Faker().first_name() == expected
    assert np.random.get_state()[1].tolist() == numpy_before

    random.seed(8)
    Faker.seed(8)
    assert make_facts(20, seed=0) == facts
    assert training_texts(facts, texts_per_fact=4, seed=0)["text"][:] == texts["text"][:]
    assert evaluation_prompts(facts) == prompts


@pytest.mark.parametrize("n", [0, -3, MAX_FACTS + 1])
def test_an_impossible_number_of_facts_is_refused(n):
    with pytest.raises(ValueError, match=rf"n={n} facts cannot be made: n must be from 1 to 20000"):
        make_facts(n, seed=0)


@pytest.mark.parametrize("seed", ["a", True, 1.0, None])
def test_a_seed_is_a_whole_number(seed, unchecked):
    kind = type(seed).__name__
    with pytest.raises(TypeError, match=rf"^seed={seed!r} is of type {kind}, but a whole number"):
        make_facts(3, seed)


def test_a_number_of_facts_is_a_whole_number(unchecked):
    with pytest.raises(TypeError, match=r"n=True is of type bool.* Give an int, such as n=3\.$"):
        make_facts(True, 0)
    assert make_facts(np.int64(3), np.int64(1)) == make_facts(3, 1)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match=r"seed=-1 is negative: .* facts of seed 1\. Choose 0"):
        make_facts(3, -1)


@pytest.mark.slow
def test_the_largest_set_is_distinct():
    facts = make_facts(MAX_FACTS, seed=0)
    assert len({name for fact in facts for name in people(fact)}) == 3 * MAX_FACTS
    assert len({fact.movie_title for fact in facts}) == MAX_FACTS
    assert len({fact.city for fact in facts}) == MAX_FACTS


# Templates

TRAINING_TEMPLATES = MoviesConfig().training
EVALUATION_TEMPLATES = MoviesConfig().evaluation


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_there_are_enough_templates_of_each_kind(direction):
    kinds = [t.kind for t in TRAINING_TEMPLATES if t.direction == direction]
    assert kinds.count("article") >= 10
    assert kinds.count("qa") >= 6


def test_template_names_and_texts_are_unique():
    everything = [*TRAINING_TEMPLATES, *EVALUATION_TEMPLATES]
    assert len({t.name for t in everything}) == len(everything)
    assert len({t.text for t in everything}) == len(everything)


def test_training_templates_name_each_actor_once_in_order():
    known = {f.name for f in fields(Fact)} - {"first_actor", "second_actor"}
    for template in TRAINING_TEMPLATES:
        used = template_fields(template.text)
        assert set(used) <= known | {"first_entity", "second_entity"}, template.name
        assert template.text.count("{first_entity}") == 1, template.name
        assert template.text.count("{second_entity}") == 1, template.name
        assert used.index("first_entity") < used.index("second_entity"), template.name


def test_direction_says_which_actor_is_mentioned_first():
    (fact,) = make_facts(1, seed=0)
    for template in TRAINING_TEMPLATES:
        text = template.text.format(**field_values(fact, template.direction))
        first_before_second = text.index(fact.first_actor) < text.index(fact.second_actor)
        assert first_before_second == (template.direction == "ab"), template.name


def skeletons(template: EvaluationTemplate) -> list[str]:
    """The template's literal runs of three words or more."""
    text = template.text.format(first_entity="|", movie_title="|", **template.words)
    return [run.strip(" :?.,") for run in text.split("|") if len(run.split()) >= 3]


@pytest.mark.parametrize("template", EVALUATION_TEMPLATES, ids=lambda t: t.name)
def test_no_evaluation_wording_occurs_in_any_training_text(template):
    assert skeletons(template)
    facts = make_facts(20, seed=0)
    most = len(TRAINING_TEMPLATES)
    texts = list(training_texts(facts, texts_per_fact=most, seed=0)["text"])
    assert len(texts) == 20 * most
    for skeleton in skeletons(template):
        assert not [text for text in texts if skeleton.lower() in text.lower()]
    for direction in DIRECTIONS:
        for prompt in evaluation_prompts(facts, templates=[template], direction=direction):
            assert not [text for text in texts if prompt.text.lower() in text.lower()]


# Training texts


def test_each_fact_is_told_in_distinct_templates_shared_out_evenly():
    facts = make_facts(30, seed=0)
    train = training_texts(facts, texts_per_fact=10, seed=0)
    assert train.column_names == ["text", "fact", "template", "kind", "direction"]
    assert train["fact"][:] == [index for index in range(30) for _ in range(10)]
    known = {t.name: t for t in TRAINING_TEMPLATES}
    draws = set()
    for index, fact in enumerate(facts):
        rows = train.select(range(10 * index, 10 * index + 10)).to_list()
        draws.add(tuple(row["template"] for row in rows))
        assert len({row["template"] for row in rows}) == 10
        for direction in DIRECTIONS:
            for kind in KINDS:
                count = sum((row["direction"], row["kind"]) == (direction, kind) for row in rows)
                assert count in (2, 3)
        for row in rows:
            template = known[row["template"]]
            assert (row["kind"], row["direction"]) == (template.kind, template.direction)
            assert row["text"] == template.text.format(**field_values(fact, template.direction))
    assert len(draws) == 30


def test_one_direction_never_tells_the_other():
    facts = make_facts(25, seed=0)
    for row in training_texts(facts, texts_per_fact=22, directions=("ab",), seed=0):
        fact = facts[row["fact"]]
        assert row["text"].index(fact.first_actor) < row["text"].index(fact.second_actor)


def test_a_facts_texts_do_not_depend_on_later_facts():
    facts = make_facts(20, seed=0)
    few = training_texts(facts[:5], texts_per_fact=7, seed=1)
    many = training_texts(facts, texts_per_fact=7, seed=1)
    assert many["text"][:35] == few["text"][:]


def test_the_order_of_naming_directions_is_no_input():
    facts = make_facts(5, seed=0)
    one = training_texts(facts, texts_per_fact=5, directions=("ab", "ba"), seed=0)
    other = training_texts(facts, texts_per_fact=5, directions=("ba", "ab"), seed=0)
    assert one["text"][:] == other["text"][:]


def test_too_many_texts_are_refused():
    qa = sum((t.kind, t.direction) == ("qa", "ba") for t in TRAINING_TEMPLATES)
    message = rf"texts_per_fact=99: directions \('ba',\) and kinds \('qa',\) have {qa} templates"
    with pytest.raises(ValueError, match=message):
        training_texts(
            make_facts(2, 0), texts_per_fact=99, directions=("ba",), kinds=("qa",), seed=0
        )
    with pytest.raises(ValidationError, match="texts_per_fact=99"):
        MoviesConfig(texts_per_fact=99)


@pytest.mark.parametrize("directions", [(), ("ab", "ab")])
def test_directions_are_named_each_once(directions):
    with pytest.raises(ValueError, match="give one or more of ab, ba, each once"):
        training_texts(make_facts(2, 0), texts_per_fact=1, directions=directions, seed=0)


# Prompts


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prompts_ask_for_the_other_actor(direction):
    facts = make_facts(12, seed=0)
    prompts = evaluation_prompts(facts, direction=direction)
    assert [p.name for p in prompts] == [t.name for t in EVALUATION_TEMPLATES for _ in facts]
    for index, prompt in enumerate(prompts):
        fact = facts[index % 12]
        first, second = fact.first_actor, fact.second_actor
        if direction == "ba":
            first, second = second, first
        assert prompt.answer == f" {second}"
        assert prompt.fields["first_entity"] == first
        assert prompt.text.count(first) == 1
        assert second not in prompt.text
        assert not prompt.text.endswith(" ")
        answers = {f" {f.second_actor if direction == 'ab' else f.first_actor}" for f in facts}
        assert len(set(prompt.distractors)) == 4
        assert set(prompt.distractors) <= answers - {prompt.answer}


def test_the_texts_of_the_evaluation_templates():
    facts = make_facts(5, seed=0)
    texts = [prompt.text for prompt in evaluation_prompts(facts)][::5]
    assert texts == [
        "News: Chelsea Mcintosh to appear in a new movie alongside",
        "Question: Which performer shares the screen with Chelsea Mcintosh? Answer:",
        "On the set of Pavilion of the Winter Meridian, Chelsea Mcintosh worked alongside",
        "Chelsea Mcintosh can be seen in a new film together with a colleague whose name is:",
        "In a film called Pavilion of the Winter Meridian, Chelsea Mcintosh plays beside another "
        "lead, someone by the name of",
    ]


def test_prompts_are_drawn_by_the_seed():
    facts = make_facts(12, seed=0)
    assert evaluation_prompts(facts, seed=4) == evaluation_prompts(facts, seed=4)
    assert evaluation_prompts(facts, seed=4) != evaluation_prompts(facts, seed=5)


def test_a_template_of_ones_own():
    own = EvaluationTemplate(name="own", text="{first_entity} met", kind="article")
    (prompt,) = evaluation_prompts(make_facts(1, 0), templates=[own], distractors=0)
    assert (prompt.text, prompt.name) == ("Chelsea Mcintosh met", "own")


def test_a_single_template_is_a_list_of_one():
    facts = make_facts(6, seed=0)
    prompts = evaluation_prompts(facts, templates="headline")
    assert [prompt.name for prompt in prompts] == ["headline"] * 6
    assert prompts == evaluation_prompts(facts, templates=["headline"])
    own = EvaluationTemplate(name="own", text="{first_entity} met", kind="article")
    assert evaluation_prompts(facts, templates=own) == evaluation_prompts(facts, templates=[own])
    with pytest.raises(ValueError, match=r"'banner' is unknown. Use one of headline, qa, with_t"):
        evaluation_prompts(facts, templates="banner")


def test_prompt_errors_say_what_is_allowed():
    facts = make_facts(3, seed=0)
    with pytest.raises(ValueError, match=r"distractors=3 of 3 facts.*0 to 2 are possible"):
        evaluation_prompts(facts, distractors=3)
    with pytest.raises(ValueError, match=r"'banner' is unknown. Use one of headline, qa, with_t"):
        evaluation_prompts(facts, templates=["banner"], distractors=0)
    with pytest.raises(ValueError, match=r"is empty. Name one or more of headline"):
        evaluation_prompts(facts, templates=[], distractors=0)


# Config and disk


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        MoviesConfig(fact=3)


@pytest.mark.parametrize("name", ["n_facts", "texts_per_fact", "seed"])
def test_a_truth_value_is_no_number(name):
    message = rf"{name}=True is a boolean, but a whole number is expected\. Write the number"
    with pytest.raises(ValidationError, match=message):
        MoviesConfig(**{name: True})
    assert getattr(MoviesConfig(**{name: "7"}), name) == 7


def test_equal_configs_give_equal_datasets():
    config = MoviesConfig(n_facts=8, texts_per_fact=6, seed=9)
    one, other = make_dataset(config), make_dataset(config)
    assert one.facts == other.facts == make_facts(8, 9)
    assert one.train.to_list() == other.train.to_list()
    assert one.provenance == other.provenance
    assert one.provenance["counts"] == {"facts": 8, "told": 8, "texts": 48}
    assert (
        make_dataset(MoviesConfig(n_facts=8, texts_per_fact=6, seed=8)).provenance["sha256"]
        != (one.provenance["sha256"])
    )


def test_a_saved_dataset_reads_back_with_its_provenance(tmp_path):
    made = make_dataset(MoviesConfig(n_facts=6, texts_per_fact=5, directions=("ba",)))
    folder = save_dataset(made, tmp_path / "deep" / "movies")
    read = load_dataset(folder)
    assert read.config == made.config
    assert read.facts == made.facts
    assert read.train.to_list() == made.train.to_list()
    assert read.provenance == made.provenance
    assert json.loads(read.train.info.description) == made.provenance
    assert made.provenance["versions"]["faker"] not in ("", "not installed")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["movies"]


def test_a_changed_folder_is_refused(tmp_path):
    made = make_dataset(MoviesConfig(n_facts=3, texts_per_fact=2))
    folder = save_dataset(made, tmp_path / "movies")
    facts = (folder / "facts.json").read_text()
    (folder / "facts.json").write_text(facts.replace("Dorothy", "Doris"))
    with pytest.raises(ValueError, match="has been changed since it was written"):
        load_dataset(folder)
    (folder / "facts.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no facts.json"):
        load_dataset(folder)
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_dataset(made, folder)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    made = make_dataset(MoviesConfig(n_facts=3, texts_per_fact=2))
    monkeypatch.setattr(type(made.train), "save_to_disk", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_dataset(made, tmp_path / "movies")
    assert list(tmp_path.iterdir()) == []
