"""Supplemental text: the right number, drawn by seed, beside unchanged training texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, Value
from pydantic import ValidationError

from graftlens.data import MoviesConfig, make_dataset, save_dataset
from graftlens.data.supplement import Supplement, mixed
from graftlens.finetune import TrainingData, training_texts_of


@pytest.fixture
def train() -> Dataset:
    return make_dataset(MoviesConfig(n_facts=4, texts_per_fact=3)).train


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """40 paragraphs, one of them long."""
    path = tmp_path / "plain.txt"
    paragraphs = [f"Paragraph {number} tells of rain." for number in range(39)]
    path.write_text("\n\n".join([*paragraphs, "word " * 300]))
    return path


def added(train: Dataset, supplement: Supplement, seed: int = 0) -> list[str]:
    return list(mixed(train, supplement, seed)["text"])[len(train) :]


@pytest.mark.parametrize(("share", "count"), [(0.2, 3), (0.5, 12), (0.75, 36), (0.05, 1)])
def test_the_share_is_of_all_texts(share: float, count: int, train: Dataset, plain: Path) -> None:
    both = mixed(train, Supplement(file=plain, share=share), 0)
    assert len(both) == 12 + count
    assert both.features == train.features
    assert both.select(range(12)).to_list() == train.to_list()
    assert len(set(both["text"])) == 12 + count
    for row in both.select(range(12, len(both))).to_list():
        text = row.pop("text")
        assert text.startswith(("Paragraph ", "word word"))
        assert row == {"fact": -1, "template": "supplement", "kind": "plain", "direction": ""}


def test_the_seed_draws_them(train: Dataset, plain: Path) -> None:
    supplement = Supplement(file=plain, share=0.5)
    assert added(train, supplement, 1) == added(train, supplement, 1)
    assert added(train, supplement, 1) != added(train, supplement, 2)
    assert set(added(train, supplement, 1)) != set(added(train, supplement, 2))


def test_too_few_texts_are_an_error(train: Dataset, plain: Path) -> None:
    message = r"plain\.txt has 40 texts, but supplement\.share=0\.8 with 12 training texts needs 48"
    with pytest.raises(ValueError, match=message):
        mixed(train, Supplement(file=plain, share=0.8), 0)
    with pytest.raises(ValueError, match=r"share=0\.01 of 12 training texts amounts to no text"):
        mixed(train, Supplement(file=plain, share=0.01), 0)


@pytest.mark.parametrize(
    ("text", "longest", "cut"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("one  two", 4, "one"),
        ("one\ntwo three", 8, "one\ntwo"),
        ("onetwothree four", 6, "onetwo"),
        ("  one two ", 7, "one two"),
    ],
)
def test_long_texts_are_cut_between_words(
    text: str, longest: int, cut: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    supplement = Supplement(file=path, share=0.5, max_chars=longest)
    assert added(Dataset.from_dict({"text": ["x"]}), supplement) == [cut]


def test_texts_of_every_kind(train: Dataset, tmp_path: Path) -> None:
    lines = [f"Line {number}." for number in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"words": lines}).save_to_disk(tmp_path / "named")
    made = make_dataset(MoviesConfig(n_facts=6, texts_per_fact=2, seed=1))
    save_dataset(made, tmp_path / "ours")
    for name, more, expected in (
        ("a.jsonl", {}, lines),
        ("a.txt", {}, lines),
        ("saved", {}, lines),
        ("named", {"column": "words"}, lines),
        ("ours", {}, list(made.train["text"])),
    ):
        texts = added(train, Supplement(file=tmp_path / name, share=0.5, **more))
        assert sorted(texts) == sorted(expected), name


def test_columns_of_ones_own_are_empty_in_supplemental_rows(plain: Path) -> None:
    features = Features({"text": Value("string"), "fact": Value("string"), "id": Value("int64")})
    train = Dataset.from_dict({"text": ["a"], "fact": ["f"], "id": [7]}, features=features)
    both = mixed(train, Supplement(file=plain, share=0.5), 0)
    assert both[0] == {"text": "a", "fact": "f", "id": 7}
    assert (both[1]["fact"], both[1]["id"]) == (None, None)


class Hub:
    """Stands for `datasets.load_dataset`, and counts the rows that were read."""

    def __init__(self, texts: list[str | None], column: str = "text") -> None:
        self.texts, self.column = texts, column
        self.asked: list[Any] = []
        self.read = 0

    def __call__(self, *args: Any, **kwargs: Any) -> IterableDataset:
        self.asked.append((args, kwargs))
        return IterableDataset.from_generator(self.rows)

    def rows(self) -> Iterator[dict[str, str | None]]:
        for text in self.texts:
            self.read += 1
            yield {self.column: text}

    def __reduce__(self) -> Any:  # `datasets` hashes what generates
        return (Hub, ([], self.column))


def test_a_hub_dataset_is_streamed(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["" if number % 2 else f"Row {number}." for number in range(400)]
    hub = Hub([None, "  ", *rows])
    monkeypatch.setattr("datasets.load_dataset", hub)
    monkeypatch.setattr("graftlens.data.supplement.SHUFFLED", 50)
    supplement = Supplement(hub="some/texts", config="small", share=0.5)
    texts = added(train, supplement, 3)
    assert hub.asked == [(("some/texts", "small"), {"split": "train", "streaming": True})]
    assert len(set(texts)) == 12
    assert set(texts) <= set(rows)
    assert hub.read < 150
    assert added(train, supplement, 3) == texts
    assert set(added(train, supplement, 4)) != set(texts)


def test_a_hub_dataset_that_does_not_do(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub(["One.", "", "Two."], "content"))
    with pytest.raises(
        ValueError, match=r"column='text' is not one of the columns of a/b: content\."
    ):
        mixed(train, Supplement(hub="a/b", share=0.5), 0)
    supplement = Supplement(hub="a/b", column="content", share=0.5)
    with pytest.raises(ValueError, match=r"a/b has 2 texts, but .* needs 12"):
        mixed(train, supplement, 0)


@pytest.mark.parametrize("step", ["named", "read"])
def test_a_hub_dataset_that_cannot_be_had(
    step: str, train: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if step == "named":
            raise ValueError("BuilderConfig 'big' not found. Available: ['small']")
        return IterableDataset.from_generator(offline)

    monkeypatch.setattr("datasets.load_dataset", refuse)
    supplement = Supplement(hub="a/b", config="big", split="all", share=0.5)
    what = {"named": r"ValueError: BuilderConfig 'big'", "read": "ConnectionError: no network"}
    message = (
        rf"supplement\.hub='a/b', config='big', split='all' could not be downloaded .*"
        rf"\({what[step]}.*"
        r"Check these names, .* supplement\.file=PATH"
    )
    with pytest.raises(OSError, match=message):
        mixed(train, supplement, 0)


def offline() -> Iterator[dict[str, str]]:
    raise ConnectionError("no network")
    yield {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither file nor hub is given"),
        ({"file": "a.txt", "hub": "a/b"}, "file and hub is given, but supplemental texts come"),
        ({"file": "a.csv"}, r"file='a\.csv' ends in '\.csv', but \.txt \(paragraphs\)"),
        ({"file": "a.txt", "config": "x"}, "config='x' applies to hub only"),
        ({"hub": "a/b", "share": 0}, "greater than 0"),
        ({"hub": "a/b", "share": 1}, "less than 1"),
        ({"hub": "a/b", "max_chars": 0}, "greater than or equal to 1"),
        ({"hub": "a/b", "rows": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_are_not_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Supplement(**{"share": 0.5} | settings)


def test_texts_that_are_not_there(train: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("no.txt", "does not exist"), ("empty", "does not hold a dataset")):
        with pytest.raises(FileNotFoundError, match=message):
            mixed(train, Supplement(file=tmp_path / name, share=0.5), 0)
    Dataset.from_dict({"words": ["a"]}).save_to_disk(tmp_path / "named")
    with pytest.raises(ValueError, match=r"column='text' is not one of the columns of .*: words\."):
        mixed(train, Supplement(file=tmp_path / "named", share=0.5), 0)


def test_finetuning_mixes_them_in(train: Dataset, plain: Path) -> None:
    movies = MoviesConfig(n_facts=4, texts_per_fact=3)
    supplement = Supplement(file=plain, share=0.25)
    texts = training_texts_of(TrainingData(movies=movies, supplement=supplement), seed=5)
    assert texts.to_list() == mixed(train, supplement, 5).to_list()
    assert len(texts) == 16
    with pytest.raises(ValidationError, match="nothing is given, but the texts come from one pl"):
        TrainingData(supplement=supplement)
