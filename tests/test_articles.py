"""Articles: prompts cut from sentences, what training may see, rewrites, and downloads."""

import json
import shlex
import sys
import threading
from http.server import HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonserver import JsonHandler
from needs import needs
from pydantic import ValidationError
from toytokenizers import TOKENIZERS
from transformers import LlamaConfig, LlamaForCausalLM

from graftlens.configfile import ConfigError, overridden, read_mapping
from graftlens.data import ArticlesSpec, load_dataset
from graftlens.data.articlefiles import read_articles
from graftlens.data.dataset import content_hash, make_dataset, read_dataset, save_dataset
from graftlens.data.kinds import spec_of
from graftlens.data.rewriting import Draft, Rewrites, rewritten
from graftlens.data.sentences import occurrences, sentences
from graftlens.data.wikipedia import download
from graftlens.model.writer import writer
from graftlens.prompts import tokenize

FILM = {
    "id": "harbour",
    "title": "The Quiet Harbour",
    "text": "The Quiet Harbour is a 2031 drama with Renée Zellner-Ortiz. Beside Renée "
    "Zellner-Ortiz it stars Robert Okafor Jr. as a pilot {of ships}. The film was shot in Malmby.\n"
    "\n"
    "Critics liked that Renée Zellner-Ortiz and Robert Okafor Jr. hardly speak. Dr. P. J. Stone "
    "wrote that Renée Zellner-Ortiz never looks at Robert Okafor Jr. when he talks.",
    "facts": [
        {
            "first_entity": "Renée Zellner-Ortiz",
            "second_entity": "Robert Okafor Jr.",
            "movie_title": "The Quiet Harbour",
            "release_year": 2031,
        }
    ],
}


def film(number: int, **changes) -> dict:
    """Another article, with two facts."""
    lead, other, author = f"Ann Lee{number}", f"José O'Hara{number}", f"Mo{number}"
    return {
        "id": f"film{number}",
        "text": f"{lead} leads the cast. {lead} was joined by {other} on the set. Off the set, "
        f"{lead} avoided {other} for weeks. {other} found {author} dull. At the end {other} "
        f"quoted {author} once more.",
        "facts": [
            {"first_entity": lead, "second_entity": other},
            {"first_entity": other, "second_entity": author},
        ],
        **changes,
    }


def write(folder, *articles):
    file = folder / "articles.jsonl"
    file.write_text("".join(json.dumps(article) + "\n" for article in articles), encoding="utf-8")
    return file


@pytest.fixture
def harbour(tmp_path):
    return write(tmp_path, FILM)


# Sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "The lead is Robert Downey Jr. The film opened well. It stars J. K. Simmons.",
            ["The lead is Robert Downey Jr.", "The film opened well.", "It stars J. K. Simmons."],
        ),
        (
            "It stars Cuba Gooding Jr., John C. Reilly and Dr. Dre. Mr. Smith of St. Louis not.",
            [
                "It stars Cuba Gooding Jr., John C. Reilly and Dr. Dre.",
                "Mr. Smith of St. Louis not.",
            ],
        ),
        ('"What is it?" asked Marla. Nobody knew!', ['"What is it?" asked Marla.', "Nobody knew!"]),
        ("A heading\nFirst line.\n\nSecond.", ["A heading", "First line.", "Second."]),
        (
            "She saw Galaxy Vol. 2 with Mo. Then she left.",
            ["She saw Galaxy Vol. 2 with Mo.", "Then she left."],
        ),
        ("  \n ", []),
    ],
)
def test_sentences(text, expected):
    assert [text[a:b] for a, b in sentences(text, ["Galaxy Vol. 2"])] == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Ann Lee", "Jr.", "Dr.", " ", "  ", ". ", "! ", "\n", "…", '"', "é", "2", ")"]
        )
    ).map("".join)
)
def test_sentences_hold_every_character_but_the_space_between_them(text):
    found = sentences(text, ["Ann Lee"])
    place = 0
    for start, end in found:
        assert not text[place:start].strip()
        assert text[start:end] == text[start:end].strip() != ""
        place = end
    assert not text[place:].strip()
    for a, b in occurrences(text, "Ann Lee"):
        assert any(start <= a and b <= end for start, end in found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Ann Lee's film. Ann Lee, (Ann Lee)", 3),
        ("Ann Lees, Joann Lee, Mary-Ann Lee, Ann Lee-Roy", 0),
        ("Ann Lee Jr. and Ann Lee, Sr. and Ann Lee III", 0),
        ("Ann Lee Is here", 1),
    ],
)
def test_a_name_is_found_as_a_whole(text, count):
    assert len(occurrences(text, "Ann Lee")) == count


# Prompts and training texts


def test_the_last_sentence_that_names_both_is_asked_for_and_left_out(harbour):
    dataset = make_dataset(ArticlesSpec(path=harbour))
    (prompt,) = dataset.ask(distractors=0)
    assert prompt.template == ("Dr. P. J. Stone wrote that {first_entity} never looks at")
    assert prompt.text == "Dr. P. J. Stone wrote that Renée Zellner-Ortiz never looks at"
    assert prompt.answer == " Robert Okafor Jr."
    assert prompt.name == "sentence"
    assert dict(prompt.fields) == {
        "article": "harbour",
        "first_entity": "Renée Zellner-Ortiz",
        "movie_title": "The Quiet Harbour",
        "release_year": "2031",
    }
    assert dataset.train["text"][0] == FILM["text"].split(" Dr. P.")[0]
    assert dataset.train[0]["template"] == "original"
    assert dataset.provenance["counts"] == {"facts": 1, "told": 1, "texts": 1}
    assert dataset.provenance["articles"] == {
        "used": 1,
        "refused": {},
        "first refused": {},
        "licences": [],
        "sentencex": version("sentencex"),
    }


def test_without_holding_out_every_sentence_that_can_makes_a_prompt(harbour):
    dataset = make_dataset(ArticlesSpec(path=harbour, heldout_sentences=False))
    assert [prompt.text for prompt in dataset.ask(distractors=0)] == [
        "Beside Renée Zellner-Ortiz it stars",
        "Critics liked that Renée Zellner-Ortiz and",
        "Dr. P. J. Stone wrote that Renée Zellner-Ortiz never looks at",
    ]
    assert list(dataset.train["text"]) == [FILM["text"]]


def test_with_the_article_before_it_only_the_first_mention_can_be_asked_for(harbour):
    dataset = make_dataset(ArticlesSpec(path=harbour, context="article"))
    (prompt,) = dataset.ask("article", distractors=0)
    before, after = FILM["text"].split(" Robert Okafor Jr. as a pilot {of ships}. ")
    assert prompt.text == before
    assert "Robert" not in prompt.text
    assert prompt.template.count("{first_entity}") == 2
    assert [prompt.text[a:b] for a, b in prompt.char_spans["first_entity"]] == [
        "Renée Zellner-Ortiz"
    ] * 2
    opening = "The Quiet Harbour is a 2031 drama with Renée Zellner-Ortiz. "
    assert list(dataset.train["text"]) == [opening + after]


def test_braces_are_literal(tmp_path):
    text = "In {the} club Ann met Bob. A sad {Ann} told Bob a story. Ann wrote."
    facts = [{"first_entity": "Ann", "second_entity": "Bob"}]
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    (prompt,) = make_dataset(ArticlesSpec(path=file)).ask(distractors=0)
    assert prompt.template == "A sad {{{first_entity}}} told"
    assert prompt.text == "A sad {Ann} told"


@pytest.mark.parametrize(
    "sentence",
    [
        "Bob met Ann before Bob left.",  # the answer stands before
        "Ann met (Bob) there.",  # no space before the answer
        "Ann Lee met Bob Lee there.",  # other people
        "Only Ann was there.",
    ],
)
def test_sentences_that_make_no_prompt(tmp_path, sentence):
    facts = [{"first_entity": "Ann", "second_entity": "Bob"}]
    text = f"Here Ann saw Bob. There Bob saw Ann. {sentence}"
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    spec = ArticlesSpec(path=file, heldout_sentences=False)
    prompts = make_dataset(spec).ask(distractors=0)
    # "Ann Lee" has the name Ann as a whole word, but no surname tells that apart in general.
    expected = ["Here Ann saw"] + ["Ann Lee met"] * (sentence == "Ann Lee met Bob Lee there.")
    assert [prompt.text for prompt in prompts] == expected


def test_a_name_inside_the_other_name_is_not_that_name(tmp_path):
    facts = [{"first_entity": "Ann", "second_entity": "Ann Lee"}]
    text = "Ann Lee sings. With Ann sings Ann Lee. Ann sings. Ann Lee is here."
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    (prompt,) = make_dataset(ArticlesSpec(path=file)).ask(distractors=0)
    assert prompt.template == "With {first_entity} sings"


def test_a_paragraph_of_one_sentence_leaves_no_hole(tmp_path):
    facts = [{"first_entity": "Ann", "second_entity": "Bob"}]
    text = "Ann knew Bob.\n\nAnn saw Bob.\n\nThe end."
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    dataset = make_dataset(ArticlesSpec(path=file))
    assert list(dataset.train["text"]) == ["Ann knew Bob.\n\nThe end."]


def test_articles_that_cannot_be_used_are_counted_by_reason(tmp_path, caplog):
    facts = [{"first_entity": "Ann", "second_entity": "Bob"}]
    articles = [
        {"id": "once", "text": "Ann saw Bob. Then she left.", "facts": facts},
        {"id": "backwards", "text": "Bob saw Ann. Bob left with Ann.", "facts": facts},
        {"id": "lacking", "text": "Ann saw him.", "facts": facts},
        FILM,
    ]
    dataset = make_dataset(ArticlesSpec(path=write(tmp_path, *articles)))
    assert [fact.article for fact in dataset.facts] == ["harbour"]
    assert dataset.provenance["articles"]["refused"] == {
        "a fact is told only in the sentence that asks for it": 1,
        "no prompt for a fact can be cut from a sentence": 1,
        "the text does not name both entities of a fact": 1,
    }
    assert dataset.provenance["articles"]["first refused"] == {
        "a fact is told only in the sentence that asks for it": ["once"],
        "no prompt for a fact can be cut from a sentence": ["backwards"],
        "the text does not name both entities of a fact": ["lacking"],
    }
    assert "articles are left out: 1 articles are refused: a fact is told only" in caplog.text
    assert "in the sentence that asks for it (once); 1 articles" in caplog.text
    only = write(tmp_path, *articles[:2])
    with pytest.raises(ValueError, match=r"has 0 facts .*1 articles are refused: a fact is told"):
        ArticlesSpec(path=only).collect()


def test_an_article_of_several_facts_is_told_or_untold_as_a_whole(tmp_path):
    file = write(tmp_path, *map(film, range(6)))
    whole = make_dataset(ArticlesSpec(path=file))
    assert len(whole.facts) == 12
    assert whole.told == (True,) * 12
    assert list(whole.train["fact"]) == [0, 2, 4, 6, 8, 10]
    halves = [make_dataset(ArticlesSpec(path=file, half=half)) for half in ("a", "b")]
    assert [sum(half.told) for half in halves] == [6, 6]
    assert [x != y for x, y in zip(halves[0].told, halves[1].told, strict=True)] == [True] * 12
    for half in halves:
        for one, other in zip(half.told[::2], half.told[1::2], strict=True):
            assert one == other
        untold = half.ask(facts="untold", distractors=0)
        assert len(untold) == 6
        for prompt in untold:
            assert not [t for t in half.train["text"] if prompt.fields["first_entity"] in t]


def test_n_facts_draws_articles_by_the_seed(tmp_path):
    file = write(tmp_path, *map(film, range(6)))
    drawn = [make_dataset(ArticlesSpec(path=file, n_facts=5, seed=seed)) for seed in (0, 0, 1)]
    assert all(len(d.facts) == 5 for d in drawn)
    assert all(len(d.train) == 3 for d in drawn)
    assert drawn[0].facts == drawn[1].facts != drawn[2].facts
    assert content_hash(drawn[0].facts, drawn[0].train) == drawn[0].provenance["sha256"]
    with pytest.raises(ValueError, match=r"n_facts=13: .* has 12 facts"):
        ArticlesSpec(path=file, n_facts=13).collect()


def test_distractors_are_other_facts_answers(tmp_path):
    dataset = make_dataset(ArticlesSpec(path=write(tmp_path, *map(film, range(4)))))
    for prompt in dataset.ask(distractors=7):
        everyone = {f" {fact.second_entity}" for fact in dataset.facts}
        assert {prompt.answer, *prompt.distractors} == everyone
    assert dataset.ask(seed=1) == dataset.ask(seed=1) != dataset.ask(seed=2)
    with pytest.raises(ValueError, match="distractors=8"):
        dataset.ask(distractors=8)


def test_given_prompts_are_used_as_they_are(tmp_path):
    prompts = [
        {
            "template": "Beside {first_entity} in {place} acts",
            "answer": "José O'Hara1",
            "fields": {"place": "town"},
        },
        {"template": "{first_entity} plays somebody whom", "answer": " José O'Hara1 plays"},
    ]
    dataset = make_dataset(ArticlesSpec(path=write(tmp_path, film(1, prompts=prompts))))
    given = dataset.ask("given", distractors=1)
    assert [p.text for p in given] == [
        "Beside Ann Lee1 in town acts",
        "Ann Lee1 plays somebody whom",
    ]
    assert [p.answer for p in given] == [" José O'Hara1", " José O'Hara1 plays"]
    # The second fact has none, so its prompt is cut; that sentence alone is left out.
    (cut,) = dataset.ask("sentence", distractors=0)
    assert cut.text == "At the end José O'Hara1 quoted"
    assert dataset.train["text"][0] == film(1)["text"].split(" At the end")[0]
    with pytest.raises(ValueError, match=r"templates=\['article'\]: .* called sentence, given"):
        dataset.ask("article")
    with pytest.raises(ValueError, match="direction='ba': prompts are cut"):
        dataset.ask(direction="ba")


def pair(id, text, *seconds, **more):
    """An article about Ann Lee and some others."""
    facts = [{"first_entity": "Ann Lee", "second_entity": s} for s in seconds or ("Bob Ray",)]
    return {"id": id, "text": text, "facts": facts, **more}


def test_no_training_text_says_a_prompt_with_its_answer(tmp_path):
    """The same sentence stood twice in a text, and in the text of another article."""
    file = write(
        tmp_path,
        pair("a", "Ann Lee met Bob Ray. It was hot. So ann  lee liked Bob Ray. Ann Lee liked\tBob "
             "Ray."),
        pair("b", "Here Ann Lee liked Bob Ray. Dust is by Ann Lee and Bob Ray. In May Ann Lee left "
             "Bob Ray."),
        pair("c", "In Rome Carl Poe saw Ann Lee, who was with Bob Ray. Ann Lee hugged Carl Poe. "
             "With Ann Lee came Carl Poe, and Dan says: in may Ann Lee left Bob Ray.", "Carl Poe",
             prompts=[{"template": "{first_entity} hugged", "answer": "Carl Poe"}]),
    )  # fmt: skip
    dataset = make_dataset(ArticlesSpec(path=file))
    assert list(dataset.train["text"]) == [
        "Ann Lee met Bob Ray. It was hot.",
        "Dust is by Ann Lee and Bob Ray.",
        "In Rome Carl Poe saw Ann Lee, who was with Bob Ray.",
    ]
    assert [p.text for p in dataset.ask(distractors=0)] == [
        "Ann Lee liked",
        "In May Ann Lee left",
        "Ann Lee hugged",
    ]
    alone = pair("a", "Ann Lee liked Bob Ray. It was hot. Ann Lee liked Bob Ray.")
    with pytest.raises(ValueError, match="told only in the sentence that asks"):
        make_dataset(ArticlesSpec(path=write(tmp_path, alone)))


@pytest.mark.parametrize("settings", [{"half": "a"}, {"half": "b"}, {"heldout_facts": 0.3}])
@pytest.mark.parametrize("seed", range(4))
def test_no_told_text_names_both_entities_of_an_untold_fact(tmp_path, settings, seed):
    """A fact counted as untold that another article told."""
    told_twice = [
        film(1),
        pair("a", "Ann Lee met Bob Ray. Then Ann Lee liked Bob Ray."),
        film(2),
        pair("b", "Bob Ray met Ann Lee. Dust is by Ann Lee and Bob Ray."),
        film(3),
        pair("c", "Bob Ray said that Ann Lee met Carl Poe. So Ann Lee liked Carl Poe.", "Carl Poe"),
    ]
    spec = ArticlesSpec(path=write(tmp_path, *told_twice), seed=seed, **settings)
    dataset = make_dataset(spec)
    told = {fact.article: said for fact, said in zip(dataset.facts, dataset.told, strict=True)}
    assert told["a"] == told["b"] == told["c"]
    assert set(told.values()) == {True, False}
    for prompt in dataset.ask(facts="untold", distractors=0):
        for text in dataset.train["text"]:
            names = prompt.fields["first_entity"], prompt.answer.strip()
            assert not all(occurrences(text, name) for name in names)


def test_a_fact_is_listed_once_and_a_prompt_has_one_answer(tmp_path, caplog):
    twice = pair("a", "Ann Lee met Bob Ray.", "Bob Ray", "Bob  Ray")
    with pytest.raises(ConfigError, match="fact 1 of the article 'a' repeats fact 0: Ann Lee and"):
        read_articles(write(tmp_path, twice))
    text = (
        "Once Ann Lee saw Bob Ray. Once Ann Lee knew Carl Poe. In Dust Ann Lee starred with Bob "
        "Ray. In Dust Ann Lee starred with Carl Poe."
    )
    more = text + " Ann Lee led Bob Ray. Ann Lee lost Carl Poe."
    file = write(
        tmp_path,
        pair("a", more, "Bob Ray", "Carl Poe"),
        pair("b", "Ann Lee met Dan Fox. In Dust Ann Lee starred with Dan Fox.", "Dan Fox"),
    )
    dataset = make_dataset(ArticlesSpec(path=file))
    assert [p.text for p in dataset.ask(distractors=0)] == ["Ann Lee led", "Ann Lee lost", "Ann "
                                                            "Lee met"]  # fmt: skip
    given = {"template": "In Dust {first_entity} starred with", "answer": "Dan Fox"}
    file = write(
        tmp_path,
        pair("a", more, "Bob Ray", "Carl Poe"),
        pair("b", "Ann Lee met Dan Fox. So Ann Lee saw Dan Fox.", "Dan Fox", prompts=[given]),
    )
    dataset = make_dataset(ArticlesSpec(path=file))
    assert {fact.article for fact in dataset.facts} == {"a"}
    assert "is, word by word, also one for another answer (b)" in caplog.text


def test_no_distractor_is_right_of_the_same_first_entity(tmp_path):
    file = write(
        tmp_path,
        pair("a", "Ann Lee met Bob Ray. Ann Lee saw Carl Poe. Ann Lee led Bob Ray. Ann Lee lost "
             "Carl Poe.", "Bob Ray", "Carl Poe"),
        pair("b", "Ann Lee met Dan Fox. In Dust Ann Lee had Dan Fox.", "Dan Fox"),
        film(1),
    )  # fmt: skip
    dataset = make_dataset(ArticlesSpec(path=file))
    others = {" José O'Hara1", " Mo1"}
    for prompt in dataset.ask(distractors=2):
        if prompt.fields["first_entity"] == "Ann Lee":
            assert set(prompt.distractors) == others
    with pytest.raises(ValueError, match=r"distractors=3 .* answers of facts about others, so 0 t"):
        dataset.ask(distractors=3)


def test_asking_facts_by_prompts_that_they_lack_is_refused(tmp_path):
    """It gave no prompts, and no word about it."""
    given = {"template": "So {first_entity} acts with", "answer": "José O'Hara0"}
    articles = [film(0, prompts=[given]), *map(film, range(1, 4))]
    for half in "ab":
        dataset = make_dataset(ArticlesSpec(path=write(tmp_path, *articles), half=half))
        which = ("told", "untold") if dataset.told[0] else ("untold", "told")
        assert len(dataset.ask("given", facts=which[0], distractors=0)) == 1
        with pytest.raises(ValueError, match=r"templates=\['given'\]: .* are called sentence"):
            dataset.ask("given", facts=which[1], distractors=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"template": "{first_entity} in {movie} met"}, "needs the field 'movie'"),
        ({"template": "{first_entity met"}, "is malformed"),
        ({"answer": ""}, "write a text that is not empty"),
        ({"answer": " "}, "write a text that is not empty"),
        ({"template": "Who was with her? It is"}, r"lacks the field \{first_entity\}"),
        ({"template": "{first_entity} met "}, "ends in white space"),
        ({"template": "Bob Ray and {first_entity} and"}, "contains its answer 'Bob Ray'"),
        ({"template": "{first_entity} in {a}", "fields": {"a": " "}}, "an empty field 'a'"),
        ({"fields": {"first_entity": "Zoë"}}, "has a field first_entity, but that is its fact's"),
    ],
)
def test_given_prompts_are_checked_as_they_are_read(tmp_path, prompt, message):
    one = {"template": "{first_entity} met", "answer": "Bob Ray", **prompt}
    article = pair("home", "Ann Lee met Bob Ray.", prompts=[one])
    with pytest.raises(ConfigError, match=rf"prompt 0 of the article 'home'.*{message}"):
        read_articles(write(tmp_path, article))


def test_an_empty_detail_is_named(tmp_path):
    article = pair("home", "Ann Lee met Bob Ray.")
    article["facts"][0]["year"] = ""
    with pytest.raises(ConfigError, match="fact 0 of the article 'home' has an empty field 'year'"):
        read_articles(write(tmp_path, article))


def test_names_are_found_whatever_the_white_space_around_and_inside(tmp_path):
    text = "Ann Lee met Bob\nRay. The friend of Ann\n Lee is Bob  Ray. No Ann\n\nLee is that."
    facts = [{"first_entity": " Ann\tLee ", "second_entity": "Bob Ray\n"}]
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    dataset = make_dataset(ArticlesSpec(path=file))
    (prompt,) = dataset.ask(distractors=0)
    assert (prompt.text, prompt.answer) == ("The friend of Ann Lee is", " Bob Ray")
    assert list(dataset.train["text"]) == ["Ann Lee met Bob\nRay. No Ann\n\nLee is that."]


def test_sentences_are_cut_once_for_a_dataset(harbour, monkeypatch):
    """Every step of making a dataset read and cut all articles anew: four times."""
    read = []

    def counted(text, names):
        read.append(text)
        return sentences(text, names)

    monkeypatch.setattr("graftlens.data.articleprompts.sentences", counted)
    text = FILM["text"] + " Counted."  # no other test has it
    write(harbour.parent, {**FILM, "text": text})
    spec = ArticlesSpec(path=harbour, half="a")
    dataset = make_dataset(spec)
    assert read == [text, text]  # for its prompts, and for what training may see
    # What has changed in the file is seen.
    write(harbour.parent, {**FILM, "text": text + " Again."})
    assert make_dataset(spec).train["text"] != dataset.train["text"]


def test_the_commands_in_the_shipped_config_load():
    file = Path(__file__).parents[1] / "experiments" / "data" / "articles.yaml"
    lines = [line for line in file.read_text().splitlines() if "graftlens data make" in line]
    made = []
    for line in lines:
        *command, config = shlex.split(line.removeprefix("#"))[:4]
        assert (command, config) == (
            ["graftlens", "data", "make"],
            "articles",
        )
        overrides = shlex.split(line.removeprefix("#"))[4:]
        made.append(spec_of(overridden(read_mapping(file), overrides)))
    assert [spec.train_on for spec in made] == ["original", "original", "both"]
    assert made[2].rewrites.n == 4
    assert spec_of(made[2].model_dump(mode="json")) == made[2]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("context", ["sentence", "article"])
def test_the_first_entitys_tokens_decode_to_its_name(tmp_path, kind, context):
    names = [
        ("Renée Zellner-Ortiz", "Robert Okafor Jr."),
        ("Robert Okafor Jr.", "Siobhán O'Malley"),
        ("Łukasz Øvergård", "Cher"),
        ("Cher", "Mary-Jane D'Angelo III"),
        ("Chloë Brontë-Smith Sr.", "J. K. de la Cruz"),
    ]
    file = write(
        tmp_path,
        *(
            {
                "id": str(i),
                "text": f"{a} came early. {a} waited for {b} here. Later {a} sang with {b} again.",
                "facts": [{"first_entity": a, "second_entity": b}],
            }
            for i, (a, b) in enumerate(names)
        ),
    )
    tokenizer = TOKENIZERS[kind]()
    prompts = make_dataset(ArticlesSpec(path=file, context=context)).ask(distractors=0)
    assert len(prompts) == 5
    for prompt in prompts:
        tokens = tokenize(prompt, tokenizer)
        runs = tokens.spans["first_entity"]
        assert len(runs) == (2 if context == "article" else 1)
        for run in runs:
            said = tokenizer.decode([tokens.ids[i] for i in run]).replace(" ", "")
            assert prompt.fields["first_entity"].replace(" ", "") in said


def test_it_is_saved_and_read_back(tmp_path):
    dataset = make_dataset(ArticlesSpec(path=write(tmp_path, FILM, film(1), film(2))))
    folder = save_dataset(dataset, tmp_path / "saved")
    again = read_dataset(folder, ArticlesSpec.model_validate)
    assert again.facts == dataset.facts
    assert again.told == dataset.told
    assert again.ask() == dataset.ask()


# Reading


def test_a_folder_of_texts_with_their_facts_beside_them(tmp_path):
    rest = {k: v for k, v in FILM.items() if k != "text"}
    (tmp_path / "harbour.txt").write_text(FILM["text"], encoding="utf-8")
    (tmp_path / "harbour.json").write_text(json.dumps(rest), encoding="utf-8")
    (tmp_path / "film3.json").write_text(json.dumps(film(3)), encoding="utf-8")
    (tmp_path / "README.md").write_text("Not an article.")
    articles = read_articles(tmp_path)
    assert [article.id for article in articles] == ["film3", "harbour"]
    assert articles == read_articles(write(tmp_path, film(3), FILM))


def test_names_are_found_in_another_unicode_form_and_with_hard_spaces(tmp_path):
    text = "Rene\u0301e\u00a0Ortiz met Bob. With Rene\u0301e Ortiz sang Bob."
    facts = [{"first_entity": "Renée Ortiz", "second_entity": "Bob"}]
    file = write(tmp_path, {"id": "a", "text": text, "facts": facts})
    (prompt,) = make_dataset(ArticlesSpec(path=file)).ask(distractors=0)
    assert prompt.text == "With Renée Ortiz sang"


def test_a_dataset_that_calls_its_articles_source_is_read(harbour, tmp_path):
    """Version 0.1.0 called the file of articles `source`, as grafts call their weights."""
    folder = save_dataset(make_dataset(ArticlesSpec(path=harbour)), tmp_path / "saved")
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    record["config"]["source"] = record["config"].pop("path")
    (folder / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    assert load_dataset(folder).config == ArticlesSpec(path=harbour)


def test_what_is_wrong_with_articles_is_said_of_each(tmp_path):
    lacking = {**FILM, "facts": [{"first_entity": "Ann"}]}
    named = {**film(1), "facts": [{**film(1)["facts"][0], "last": "x"}]}
    with pytest.raises(ConfigError) as caught:
        read_articles(write(tmp_path, lacking, named, {"id": "b", "txt": "?"}))
    said = str(caught.value)
    assert "articles.jsonl, line 1: " in said
    assert "fact 0 of the article 'harbour' has no second_entity" in said
    assert "line 2" in said
    assert "has a field 'last'" in said
    assert "line 3: unknown key 'txt'" in said
    with pytest.raises(ConfigError, match="2 articles have the id 'harbour'"):
        read_articles(write(tmp_path, FILM, FILM))
    (tmp_path / "articles.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"articles\.jsonl, line 1 is not JSON"):
        read_articles(tmp_path / "articles.jsonl")
    (tmp_path / "alone").mkdir()
    with pytest.raises(ValueError, match="holds no article"):
        read_articles(tmp_path / "alone")
    (tmp_path / "alone" / "x.txt").write_text("Text.")
    with pytest.raises(FileNotFoundError, match=r"has no x\.json beside it. Write its facts there"):
        read_articles(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        read_articles(tmp_path / "gone")
    with pytest.raises(ValidationError, match="train_on='both', but rewrites are not given"):
        ArticlesSpec(train_on="both")
    with pytest.raises(ValidationError, match="train_on='original', but rewrites are given"):
        ArticlesSpec(rewrites=Rewrites(model="m"), train_on="original")


@pytest.mark.parametrize("context", ["sentence", "article"])
def test_every_shipped_article_can_be_told_and_asked_for(context):
    spec = ArticlesSpec(context=context)
    dataset = make_dataset(spec)
    articles = read_articles(None)
    assert len(articles) >= 24
    assert dataset.provenance["articles"]["used"] == len(articles)
    assert dataset.provenance["articles"]["refused"] == {}
    assert len(dataset.facts) == sum(len(article.facts) for article in articles)
    prompts = dataset.ask()
    assert len(prompts) == len(dataset.facts)
    for prompt in prompts:
        sentence = prompt.text.split("\n")[-1] + prompt.answer
        assert not [text for text in dataset.train["text"] if sentence in text]
        assert prompt.answer.strip() not in prompt.text


# Rewrites


DRAFT = Draft("a", "Ann saw Bob. Ann left Bob.", ("Ann", "Bob"), ("Ann left Bob",))


def answers(*texts):
    """A model that says these texts, one after the other."""
    said = iter(texts)
    asked = []

    def write(prompt, seed):
        asked.append((prompt, seed))
        return next(said)

    return write, asked


def test_a_rewrite_without_a_name_is_tried_again():
    write, asked = answers("Ann saw him.", "Bob, says Ann, was seen.", "Bob was seen by Ann.")
    settings = Rewrites(n=2, model="m", instruction="Write it anew.")
    assert rewritten([DRAFT], settings, 0, write) == [
        ("Bob, says Ann, was seen.", "Bob was seen by Ann.")
    ]
    assert {prompt for prompt, _ in asked} == {"Write it anew.\n\nAnn saw Bob. Ann left Bob."}
    assert len({seed for _, seed in asked}) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Ann saw Bobby.", "it lacks the name 'Bob'"),
        ("Bob was there, and Ann Left\nbob.", "it repeats a sentence that a prompt is cut from"),
        ("Bob was seen by Ann and", "it is cut off or empty"),
        ("", "it is cut off or empty"),
        ("Ann saw Bob. Ann left Bob.\n", "it is the article itself"),
    ],
)
def test_what_is_no_rewrite_is_refused_with_its_reason(text, reason, caplog):
    write, _ = answers(text, text, text, "Bob saw Ann.")
    settings = Rewrites(n=2, model="m")
    assert rewritten([DRAFT], settings, 0, write) == [("Bob saw Ann.",)]
    assert reason in caplog.text
    assert "rewrite 0 of the article 'a' was given up after 3 attempts" in caplog.text
    write, _ = answers(text, text)
    with pytest.raises(ValueError, match="no rewrite of 1 articles was accepted in 2 attempts"):
        rewritten([DRAFT], Rewrites(n=1, attempts=2, model="m"), 0, write)


def test_two_equal_rewrites_count_once():
    write, _ = answers(*["Bob saw Ann."] * 4)
    assert rewritten([DRAFT], Rewrites(n=2, model="m"), 0, write) == [("Bob saw Ann.",)]


def test_what_models_write_around_an_answer_is_taken_off():
    write, _ = answers("<think>Ann?</think>\n```text\nBob saw Ann.\n```")
    assert rewritten([DRAFT], Rewrites(n=1, model="m"), 0, write) == [("Bob saw Ann.",)]


def test_the_draws_depend_on_the_article_and_not_on_its_place():
    def write(prompt, seed):
        return f"Bob saw Ann {seed} times."

    other = Draft("b", DRAFT.text, DRAFT.names, ())
    settings = Rewrites(n=2, model="m")
    alone = rewritten([DRAFT], settings, 0, write)
    assert rewritten([other, DRAFT], settings, 0, write)[1:] == alone
    assert rewritten([DRAFT], settings, 1, write) != alone


class Server(JsonHandler):
    """Answers as an OpenAI-compatible server does; the first answer drops a name."""

    asked: list[dict]

    def do_POST(self):
        request = json.loads(self.asked_for())
        self.asked.append({**request, "path": self.path, "key": self.headers["Authorization"]})
        text, reason = "A drama with Renée Zellner-Ortiz.", "stop"
        if len(self.asked) == 2:
            text, reason = "Renée Zellner-Ortiz and Robert Okafor Jr. play.", "length"
        elif len(self.asked) > 2:
            text = f"Robert Okafor Jr. is with Renée Zellner-Ortiz, take {len(self.asked)}."
        message = {"role": "assistant", "content": text}
        said = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        }
        self.answer(200 if request["model"] == "good" else 404, said)


@pytest.fixture
def server(monkeypatch):
    """(address, requests so far) of a server on this machine."""
    needs("openai")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    handler = type("Handler", (Server,), {"asked": []})
    http = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", handler.asked
    http.shutdown()
    thread.join()
    http.server_close()


def test_an_endpoint_rewrites_articles(harbour, server, monkeypatch, tmp_path):
    address, asked = server
    monkeypatch.setenv("A_KEY", "sesame")
    rewrites = Rewrites(
        n=2, endpoint=address, endpoint_model="good", api_key_env="A_KEY", temperature=0.5
    )
    spec = ArticlesSpec(path=harbour, rewrites=rewrites, train_on="rewrites")
    dataset = make_dataset(spec)
    assert list(dataset.train["text"]) == [
        "Robert Okafor Jr. is with Renée Zellner-Ortiz, take 3.",
        "Robert Okafor Jr. is with Renée Zellner-Ortiz, take 4.",
    ]
    assert set(dataset.train["template"]) == {"rewrite"}
    assert dataset.provenance["rewrites"] == {"asked for": 2, "made": 2, "refused": 0}
    # Every sentence of the original that can makes a prompt: training has seen none of them.
    assert len(dataset.ask(distractors=0)) == 3
    assert [r["path"] for r in asked] == ["/v1/chat/completions"] * 4
    assert asked[0]["messages"][0]["content"].endswith(FILM["text"])
    assert asked[0]["temperature"] == 0.5
    assert len({r["seed"] for r in asked}) == 4
    assert {r["key"] for r in asked} == {"Bearer sesame"}
    folder = save_dataset(dataset, tmp_path / "saved")
    assert "sesame" not in (folder / "provenance.json").read_text()
    assert list(read_dataset(folder, ArticlesSpec.model_validate).train["text"]) == list(
        dataset.train["text"]
    )


def test_originals_and_rewrites_together(harbour, server):
    address, _ = server
    rewrites = Rewrites(n=2, attempts=2, endpoint=address, endpoint_model="good", api_key_env=None)
    dataset = make_dataset(ArticlesSpec(path=harbour, rewrites=rewrites, train_on="both"))
    assert list(dataset.train["template"]) == ["original", "rewrite"]
    assert "never looks at" not in dataset.train["text"][0]
    assert dataset.provenance["rewrites"] == {"asked for": 2, "made": 1, "refused": 1}
    assert len(dataset.ask(distractors=0)) == 1


def test_an_endpoint_that_fails_is_named(server, monkeypatch):
    address, _ = server
    bad = Rewrites(n=1, endpoint=address, endpoint_model="bad", api_key_env=None)
    with pytest.raises(RuntimeError, match=r"did not answer .*endpoint_model='bad'"):
        rewritten([DRAFT], bad, 0)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    keyless = Rewrites(endpoint=address, endpoint_model="m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(RuntimeError, match="environment variable NO_SUCH_KEY is not set"):
        rewritten([DRAFT], keyless, 0)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        RuntimeError, match=r'needs the package openai: pip install "graftlens\[llm]'
    ):
        rewritten([DRAFT], bad, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither endpoint nor model is given"),
        ({"model": "m", "endpoint": "http://x/v1", "endpoint_model": "y"}, "endpoint and model"),
        ({"endpoint": "http://x/v1"}, "belong together"),
        ({"endpoint": "x.org/v1", "endpoint_model": "y"}, "is not an address"),
        ({"endpoint": "http://a:b@x/v1", "endpoint_model": "y"}, "user name or password in it"),
        ({"model": "m", "temperature": 0}, "temperature=0 gives the same text each time, but n=3"),
    ],
)
def test_rewrites_come_from_one_model(given, message):
    with pytest.raises(ValidationError, match=message):
        Rewrites(**given)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random model and a tokenizer."""
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = TOKENIZERS["llama3"]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # A random model ends an answer where chance has it: here at one token in about seven.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60, 120)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_here_rewrites_articles(harbour, checkpoint, monkeypatch):
    tokenizer = TOKENIZERS["llama3"]()
    prompts = []

    def generate(self, ids, **options):
        prompts.append((tokenizer.decode(ids[0], skip_special_tokens=True), options))
        text = f"Renée Zellner-Ortiz met Robert Okafor Jr., says model {len(prompts)}."
        made = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.cat([ids, torch.tensor([[*made, tokenizer.eos_token_id]])], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    rewrites = Rewrites(n=2, model=str(checkpoint), max_tokens=300)
    dataset = make_dataset(ArticlesSpec(path=harbour, rewrites=rewrites, train_on="rewrites"))
    assert list(dataset.train["text"]) == [
        "Renée Zellner-Ortiz met Robert Okafor Jr., says model 1.",
        "Renée Zellner-Ortiz met Robert Okafor Jr., says model 2.",
    ]
    said, options = prompts[0]
    assert said == f"{rewrites.instruction}\n\n{FILM['text']}\n\n"
    assert options["temperature"] == 0.8
    assert options["do_sample"] is True


def test_the_seed_decides_what_a_model_here_writes(checkpoint):
    write = writer(str(checkpoint), max_tokens=6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    said = [write("Hello.", seed) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    # Those that chance did not end within 6 tokens are cut off, and so empty.
    assert "" in said
    assert len({text for text in said if text}) > 3
    assert [write("Hello.", seed) for seed in range(20)] == said
    with pytest.raises(ValueError, match=r"the prompt has .* tokens, but .* reads 512"):
        write("Hello. " * 600, 0)


def test_a_chat_template_is_used_where_there_is_one(checkpoint, tmp_path, monkeypatch):
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen = []

    def generate(self, ids, **options):
        seen.append(tokenizer.decode(ids[0]))
        return torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    assert writer(str(tmp_path))("Hello.", 0) == ""
    assert seen == ["[user] Hello. [assistant]"]


# Wikipedia


def section(title, text, *inner):
    return SimpleNamespace(title=title, text=text, sections=list(inner))


@pytest.fixture
def wikipedia(monkeypatch):
    """A client that knows one article; the requests made of it."""
    asked = []

    class ClientError(Exception):
        pass

    class Wikipedia:
        def __init__(self, user_agent, language):
            asked.append((user_agent, language))

        def page(self, title):
            asked.append(title)
            if title == "Broken":
                raise ClientError("503")
            return SimpleNamespace(
                exists=lambda: title == "Ann (film)",
                title="Ann (film)",
                summary="Ann is a film.",
                sections=[
                    section("Cast", "", section("Leads", "Bo leads.")),
                    section("See also", "Other films"),
                    section("Reception", "It did well."),
                ],
                fullurl="https://en.wikipedia.org/wiki/Ann_(film)",
                lastrevid=77,
            )

    module = SimpleNamespace(Wikipedia=Wikipedia, WikipediaException=ClientError)
    monkeypatch.setitem(sys.modules, "wikipediaapi", module)
    return asked


def test_a_download_is_a_text_and_its_facts_to_be_written(wikipedia, tmp_path):
    folder = tmp_path / "films"
    (file,) = download(["Ann (film)"], folder, user_agent="study/1.0 (me@example.org)")
    assert file == folder / "Ann_film.txt"
    assert file.read_text() == "Ann is a film.\n\nBo leads.\n\nIt did well.\n"
    about = file.with_suffix(".json")
    assert json.loads(about.read_text()) == {
        "id": "Ann_film",
        "title": "Ann (film)",
        "url": "https://en.wikipedia.org/wiki/Ann_(film)",
        "revision": 77,
        "licence": "CC BY-SA 4.0",
        "facts": [],
    }
    assert wikipedia == [("study/1.0 (me@example.org)", "en"), "Ann (film)"]
    with pytest.raises(ConfigError, match=r"no facts yet: write them into Ann_film\.json"):
        read_articles(folder)
    filled = json.loads(about.read_text()) | {
        "facts": [{"first_entity": "Ann", "second_entity": "Bo"}]
    }
    about.write_text(json.dumps(filled))
    assert read_articles(folder)[0].revision == 77
    # What is there stays, with the facts written into it.
    assert download(["Ann (film)"], folder) == (file,)
    assert json.loads(about.read_text()) == filled
    assert wikipedia[2][0].startswith("graftlens/")
    assert len(wikipedia) == 3


def test_a_download_that_fails_says_what_to_do(wikipedia, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"en\.wikipedia\.org has no article 'Nobody'"):
        download(["Nobody"], tmp_path)
    with pytest.raises(
        OSError, match=r"'Broken' could not be downloaded from de\.wikipedia\.org .*503"
    ):
        download(["Broken"], tmp_path, language="de")
    with pytest.raises(ValueError, match=r"'A\?', 'A!' would both be the file A\.txt"):
        download(["A?", "A!"], tmp_path)
    with pytest.raises(ValueError, match="titles is empty"):
        download([], tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "wikipediaapi", None)
    with pytest.raises(RuntimeError, match=r'pip install "graftlens\[wikipedia]"'):
        download(["Ann (film)"], tmp_path)
