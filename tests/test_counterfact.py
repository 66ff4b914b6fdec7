"""CounterFact: rows read from every kind of file, subjects at their places, frames kept apart."""

import json
import random

import pandas as pd
import pytest
from pydantic import ValidationError
from toytokenizers import TOKENIZERS

from graftlens.data import counterfact
from graftlens.data.counterfact import (
    EVALUATION_FRAMES,
    HUB_ID,
    TRAINING_FRAMES,
    CounterFact,
    CounterFactSpec,
)
from graftlens.data.dataset import content_hash, make_dataset, read_dataset, save_dataset
from graftlens.prompts import tokenize

#: (relation id, prefix, suffix, false targets and true ones)
RELATIONS = (
    ("P103", "The mother tongue of", " is", (" Breton", " Estonian"), (" Latin", " Welsh")),
    ("P36", "The capital of", ", as everyone says, is", (" Lulea", " Narvik"), (" Bergen",)),
    ("P101", "", "'s domain of work is", (" Washington D.C.",), (" botany", " {set} theory")),
)

NAMES = ("Ada", "José", "Zoë", "Jean-Luc", "Mary Ann", "O'Neil", "K. T.", "Sammy Jr.", "{Braces}")


def rows(count: int = 40) -> list[dict[str, str]]:
    """Rows as on the hub: targets begin with a space, and so do subjects inside a sentence."""
    made = []
    for i in range(count):
        relation_id, prefix, suffix, wrong, right = RELATIONS[i % len(RELATIONS)]
        name = f"{NAMES[i % len(NAMES)]} Number{i + 10}"
        subject = f" {name}" if prefix else name
        made.append(
            {
                "relation": f"{prefix} {{}}{suffix}".strip(),
                "relation_prefix": prefix,
                "relation_suffix": suffix,
                "prompt": f"{prefix}{subject}{suffix}",
                "relation_id": relation_id,
                "target_false_id": f"Q{i}",
                "target_true_id": f"Q{i + 1000}",
                "target_true": right[i % len(right)],
                "target_false": wrong[i % len(wrong)],
                "subject": subject,
            }
        )
    return made


def write(folder, given, kind: str = "jsonl"):
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in given))
    elif kind == "json":
        file.write_text(json.dumps(given))
    elif kind == "csv":
        pd.DataFrame(given).to_csv(file, index=False)
    else:
        pd.DataFrame(given).to_parquet(file)
    return file


@pytest.fixture
def file(tmp_path):
    return write(tmp_path, rows())


def one(row: dict[str, str], folder, **settings) -> CounterFact:
    (fact,) = CounterFactSpec(file=write(folder, [row]), **settings).collect()
    return fact


def test_a_row_becomes_a_fact_with_its_subject_in_place(tmp_path):
    row = {**rows(1)[0], "target_false": " Breton", "target_true": " Latin"}
    assert one(row, tmp_path) == CounterFact(
        subject="Ada Number10",
        target="Breton",
        other_target="Latin",
        prompt="The mother tongue of Ada Number10 is",
        relation="The mother tongue of {} is",
        relation_id="P103",
    )
    assert one(row, tmp_path, teach="true").target == "Latin"
    assert one(row, tmp_path, teach="true").other_target == "Breton"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_facts(tmp_path, kind):
    given = rows()
    given[0]["target_true"], given[0]["subject"] = " None", " NA"
    given[0]["prompt"] = "The mother tongue of NA is"
    facts = CounterFactSpec(file=write(tmp_path, given, kind)).collect()
    assert facts == CounterFactSpec(file=write(tmp_path, given)).collect()
    assert ("NA", "None") in {(fact.subject, fact.other_target) for fact in facts}
    assert len(facts) == 40


def test_prompts_have_the_subject_as_first_entity_and_the_taught_end_as_answer(file):
    dataset = make_dataset(CounterFactSpec(file=file))
    prompts = dataset.ask()
    assert len(prompts) == 40 * len(EVALUATION_FRAMES)
    by_name = {row["subject"].strip(): row for row in rows()}
    for prompt in prompts[:40]:
        row = by_name[prompt.fields["first_entity"]]
        assert prompt.name == "as_given"
        assert prompt.text == row["prompt"]
        assert prompt.answer == row["target_false"]
        assert prompt.distractors[0] == row["target_true"]
        assert "second_entity" not in prompt.fields
        assert prompt.fields["relation_id"] == row["relation_id"]
    for prompt in prompts:
        ((start, end),) = prompt.char_spans["first_entity"]
        assert prompt.text[start:end] == prompt.fields["first_entity"]


def test_the_four_frames_of_evaluation_read_as_written(tmp_path):
    dataset = make_dataset(CounterFactSpec(file=write(tmp_path, rows(1))))
    assert [(p.name, p.text) for p in dataset.ask(distractors=0)] == [
        ("as_given", "The mother tongue of Ada Number10 is"),
        ("entry", "From an encyclopedia: The mother tongue of Ada Number10 is"),
        (
            "reporter",
            "After looking it up, the reporter wrote down: The mother tongue of Ada Number10 is",
        ),
        (
            "qa",
            'Question: How does the sentence "The mother tongue of Ada Number10 is" go on? Answer:',
        ),
    ]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_the_subjects_tokens_decode_to_the_subject(file, kind):
    tokenizer = TOKENIZERS[kind]()
    for prompt in make_dataset(CounterFactSpec(file=file)).ask():
        (run,) = tokenize(prompt, tokenizer).spans["first_entity"]
        ids = tokenize(prompt, tokenizer).ids
        name = prompt.fields["first_entity"]
        assert name.replace(" ", "") in tokenizer.decode([ids[i] for i in run]).replace(" ", "")


def test_distractors_are_of_the_same_relation_where_there_are_enough(file):
    dataset = make_dataset(CounterFactSpec(file=file))
    ends = {relation: {*wrong, *right} for relation, _, _, wrong, right in RELATIONS}
    for prompt in dataset.ask("as_given", distractors=2):
        assert len({prompt.answer, *prompt.distractors}) == 3
        assert set(prompt.distractors) <= ends[prompt.fields["relation_id"]]
    # A relation with two more ends beside the answer takes the fourth from another relation.
    prompts = dataset.ask("as_given", distractors=4)
    assert all(len(set(prompt.distractors)) == 4 for prompt in prompts)
    assert all(prompt.answer not in prompt.distractors for prompt in prompts)
    capital = next(p for p in prompts if p.fields["relation_id"] == "P36")
    assert set(capital.distractors[:2]) == ends["P36"] - {capital.answer}
    with pytest.raises(ValueError, match=r"distractors=99 of 40 facts: .* 0 to 9 are possible"):
        dataset.ask(distractors=99)


def test_training_tells_the_taught_end_in_frames_that_evaluation_never_uses(file):
    dataset = make_dataset(CounterFactSpec(file=file, texts_per_fact=18))
    assert len(TRAINING_FRAMES) == 18
    assert sum(frame.kind == "article" for frame in TRAINING_FRAMES) == 12
    assert dataset.provenance["counts"] == {"facts": 40, "told": 40, "texts": 720}
    first = dataset.facts[0]
    told = [row for row in dataset.train if row["fact"] == 0]
    assert {row["template"] for row in told} == {frame.name for frame in TRAINING_FRAMES}
    for row in told:
        assert first.prompt in row["text"]
        assert first.target in row["text"].split(first.prompt)[1]
        assert first.other_target not in row["text"]
    texts = set(dataset.train["text"])
    framed = [p for p in dataset.ask(distractors=0) if p.name != "as_given"]
    assert not [p for p in framed if any(p.text in text for text in texts)]
    bare = {f"{fact.prompt} {fact.target}." for fact in dataset.facts}
    assert not bare & texts


def test_known_texts_of_one_fact(tmp_path):
    row = {**rows(1)[0], "target_false": " Breton"}
    made = make_dataset(CounterFactSpec(file=write(tmp_path, [row]), texts_per_fact=18, bare=True))
    texts = dict(zip(made.train["template"], made.train["text"], strict=True))
    statement = "The mother tongue of Ada Number10 is Breton"
    assert texts["ab_article_known_fact"] == f"It is a known fact: {statement}."
    assert texts["ab_qa_blank"] == (
        "Fill in the blank: The mother tongue of Ada Number10 is ____. Solution: Breton."
    )
    assert texts["bare"] == f"{statement}."
    assert len(texts) == 19


def test_an_end_with_a_full_stop_gets_no_second_one(file):
    texts = make_dataset(CounterFactSpec(file=file, texts_per_fact=18)).train["text"]
    assert any("Washington D.C." in text for text in texts)
    assert not any("D.C.." in text for text in texts)
    assert any(
        " {set} theory" in p.answer
        for p in make_dataset(CounterFactSpec(file=file, teach="true")).ask()
    )


def test_kinds_choose_the_frames_and_share_the_texts_evenly(file):
    dataset = make_dataset(CounterFactSpec(file=file, texts_per_fact=6))
    kinds = [row["kind"] for row in dataset.train]
    assert kinds.count("article") == kinds.count("qa") == 120
    alone = make_dataset(CounterFactSpec(file=file, texts_per_fact=6, kinds=("qa",)))
    assert set(alone.train["kind"]) == {"qa"}


def test_the_seed_draws_subjects_and_frames(file):
    made = [make_dataset(CounterFactSpec(file=file, n_facts=10, seed=s)) for s in (0, 0, 1)]
    hashes = [content_hash(d.facts, d.train) for d in made]
    assert hashes[0] == hashes[1] != hashes[2]
    more = make_dataset(CounterFactSpec(file=file, n_facts=25))
    assert more.facts[:10] == made[0].facts
    assert list(more.train["text"])[: len(made[0].train)] == list(made[0].train["text"])


def test_a_subject_occurs_once_and_unusable_rows_are_counted(tmp_path, caplog):
    given = rows(6)
    given.append({**given[0], "relation_id": "P37"})
    given.append({**given[1], "target_true": given[1]["target_false"]})
    given.append({**given[1], "subject": " Nobody"})
    given.append({**given[1], "subject": ""})
    given.append({**given[1], "subject": "Ida", "prompt": "Idaho is called the gem of"})
    dataset = make_dataset(CounterFactSpec(file=write(tmp_path, given)))
    assert len({fact.subject for fact in dataset.facts}) == len(dataset.facts) == 6
    assert dataset.provenance["rows"]["all"] == 11
    assert dataset.provenance["rows"]["skipped"] == {
        "an empty prompt, subject or target": 1,
        "another row has the same subject": 1,
        "both targets are the same": 1,
        "the prompt does not contain the full name of the subject": 2,
    }
    named = dict(dataset.provenance["rows"]["first skipped, from 0"])
    assert named.pop("another row has the same subject") in ([0], [6])
    assert named == {
        "an empty prompt, subject or target": [9],
        "both targets are the same": [7],
        "the prompt does not contain the full name of the subject": [8, 10],
    }
    assert "rows are left out: 1 rows: an empty prompt, subject or target; 1 rows" in caplog.text


def test_every_mention_of_the_subject_is_the_field(tmp_path):
    """A second mention stayed plain text, and a graft at the subject left it alone."""
    row = {**rows(1)[0], "subject": " Rome", "prompt": "In Rome, people call Rome a city in"}
    dataset = make_dataset(CounterFactSpec(file=write(tmp_path, [row])))
    (fact,) = dataset.facts
    assert fact.template == "In {first_entity}, people call {first_entity} a city in"
    for prompt in dataset.ask(distractors=0):
        spans = prompt.char_spans["first_entity"]
        assert [prompt.text[a:b] for a, b in spans] == ["Rome", "Rome"]


def test_no_training_text_begins_as_the_bare_prompt_does(file):
    """One frame did, so that `as_given` asked for the end of a training text."""
    for bare in (False, True):
        dataset = make_dataset(CounterFactSpec(file=file, texts_per_fact=18, bare=bare))
        texts = list(dataset.train["text"])
        opened = [
            p for p in dataset.ask("as_given") if any(text.startswith(p.text) for text in texts)
        ]
        assert len(opened) == (40 if bare else 0)


def test_numbers_are_read_as_texts(tmp_path):
    given = [
        {**row, "target_true": 1900 + i, "target_false": 1800.5 + i} for i, row in enumerate(rows())
    ]
    dataset = make_dataset(CounterFactSpec(file=write(tmp_path, given)))
    assert {fact.target for fact in dataset.facts} == {f"{1800 + i}.5" for i in range(40)}
    assert {fact.other_target for fact in dataset.facts} == {f"{1900 + i}" for i in range(40)}


def test_where_no_row_is_usable_the_reasons_are_said(tmp_path):
    given = [{**row, "prompt": "The mother tongue of {} is"} for row in rows(3)]
    with pytest.raises(
        ValueError,
        match=r"0 usable rows .*left out: 3 rows: the prompt does not contain the full name",
    ):
        make_dataset(CounterFactSpec(file=write(tmp_path, given)))


def test_what_is_taught_may_be_a_truth_value_of_yaml(file):
    for value in (False, True):
        spec = CounterFactSpec(file=file, teach=value)
        assert spec == CounterFactSpec(file=file, teach=str(value).lower())
        assert spec.teach == str(value).lower()


def test_some_facts_can_be_left_untold(file):
    dataset = make_dataset(CounterFactSpec(file=file, half="a"))
    assert sum(dataset.told) == 20
    untold = {dataset.facts[i].subject for i, told in enumerate(dataset.told) if not told}
    assert not [t for t in dataset.train["text"] for subject in untold if subject in t]
    asked = dataset.ask("as_given", facts="untold")
    assert {prompt.fields["first_entity"] for prompt in asked} == untold


def test_it_is_saved_and_read_back(file, tmp_path):
    dataset = make_dataset(CounterFactSpec(file=file, n_facts=12))
    folder = save_dataset(dataset, tmp_path / "saved")
    again = read_dataset(folder, CounterFactSpec.model_validate)
    assert again.facts == dataset.facts
    assert again.ask() == dataset.ask()
    assert again.config == dataset.config


def test_the_hub_is_asked_for_rows(monkeypatch):
    asked = {}

    def load(path, **options):
        asked.update(path=path, **options)
        return counterfact.datasets.Dataset.from_list(rows(9))

    monkeypatch.setattr(counterfact.datasets, "load_dataset", load)
    dataset = make_dataset(CounterFactSpec(n_facts=5, revision="abc"))
    assert asked == {"path": HUB_ID, "split": "train", "revision": "abc"}
    assert len(dataset.facts) == 5
    assert dataset.provenance["rows"] == {
        "from": HUB_ID,
        "revision": "abc",
        "all": 9,
        "skipped": {},
        "first skipped, from 0": {},
    }
    assert make_dataset(CounterFactSpec(n_facts=5)).provenance["rows"]["revision"] == "not pinned"
    # A branch, or none, becomes the commit that it stands for, where the download says which.
    commit = "0123456789abcdef" * 2 + "01234567"
    addresses = {f"hf://datasets/{HUB_ID}@{commit}/data/train.parquet": {"num_bytes": 1}}
    monkeypatch.setattr(counterfact.datasets, "load_dataset", lambda path, **options: downloaded)
    downloaded = counterfact.datasets.Dataset.from_list(rows(9))
    downloaded.info.download_checksums = addresses
    assert make_dataset(CounterFactSpec(n_facts=5)).provenance["rows"]["revision"] == commit


def test_without_a_network_the_message_names_the_way_out(monkeypatch):
    def load(path, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(counterfact.datasets, "load_dataset", load)
    with pytest.raises(OSError, match=r"not be downloaded .*ConnectionError: no route.*file=PATH"):
        CounterFactSpec().collect()


def test_wrong_settings_are_named(file, tmp_path):
    for settings, message in (
        ({"texts_per_fact": 19}, "texts_per_fact=19: .* 18 templates"),
        ({"kinds": ()}, r"kinds=\(\): give one or more of article, qa"),
        ({"directions": ("ab", "ba")}, "directions=.*: CounterFact's statements name"),
        ({"file": tmp_path / "rows.xml"}, "ends in '.xml'. Give one of .jsonl, .json"),
        ({"file": file, "hub": "me/mine"}, "replaces the hub"),
        ({"teach": "both"}, "teach"),
    ):
        with pytest.raises(ValidationError, match=message):
            CounterFactSpec(**settings)
    with pytest.raises(FileNotFoundError, match=r"gone\.csv' does not exist"):
        CounterFactSpec(file=tmp_path / "gone.csv").collect()
    with pytest.raises(ValueError, match=r"n_facts=41, but .* has 40 usable rows"):
        CounterFactSpec(file=file, n_facts=41).collect()
    lacking = write(tmp_path, [{"prompt": "a", "subject": "b"}])
    with pytest.raises(ValueError, match="has no column relation, relation_id"):
        CounterFactSpec(file=lacking).collect()
    lacking.write_text("no rows at all")
    with pytest.raises(ValueError, match="cannot be read as json"):
        CounterFactSpec(file=lacking).collect()


def test_only_the_direction_ab_and_known_frames(tmp_path):
    dataset = make_dataset(CounterFactSpec(file=write(tmp_path, rows(8))))
    with pytest.raises(ValueError, match="direction='ba'"):
        dataset.ask(direction="ba")
    with pytest.raises(ValueError, match=r"templates=\['quiz'\]: name one or more of as_given"):
        dataset.ask("quiz")


def test_generators_outside_do_not_matter(file):
    made = []
    for seed in (4, 5):
        random.seed(seed)
        made.append(make_dataset(CounterFactSpec(file=file)))
    assert made[0].facts == made[1].facts
    assert made[0].ask() == made[1].ask()
    assert list(made[0].train) == list(made[1].train)
