"""Plain text among the training texts, so that a model does not forget how to write."""

import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import datasets
from datasets import Dataset, Value, concatenate_datasets, load_from_disk
from pydantic import Field, model_validator

from graftlens.data.settings import Settings
from graftlens.data.texts import check_ending, read_texts

#: The values of a supplemental text in the columns of a training set.
LABELS: dict[str, Any] = {"fact": -1, "template": "supplement", "kind": "plain", "direction": ""}

# Rows of a streamed dataset that are shuffled together.
SHUFFLED = 10_000


class Supplement(Settings):
    """Plain text to mix into the training texts, against forgetting."""

    file: Path | None = None
    """Texts on this machine: ``.txt`` (blank-line separated paragraphs), ``.jsonl`` (an object with
    a ``text`` in each line), or a folder that `graftlens.data.save_dataset` or a dataset's
    ``save_to_disk`` wrote."""

    hub: str | None = None
    """Texts of a dataset on the Hugging Face hub, such as ``Salesforce/wikitext``. It is streamed,
    so that only the beginning is fetched, but each call needs the network."""

    config: str | None = None
    """Name of the hub dataset's configuration, such as ``wikitext-103-raw-v1``."""

    split: str = "train"
    """Split of the hub dataset."""

    column: str = "text"
    """Column that holds the texts (of a hub dataset or a saved one)."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of supplemental texts among all training texts: 0.2 adds one to every four."""

    max_chars: Annotated[int, Field(ge=1)] = 1000
    """A longer text is cut at the last whitespace before this many characters, and only its
    beginning is used. An English token has about four characters: compare the recipe's
    ``max_length``."""

    @model_validator(mode="after")
    def _one_source(self) -> "Supplement":
        if (self.file is None) == (self.hub is None):
            given = "neither file nor hub" if self.file is None else "file and hub"
            raise ValueError(
                f"{given} is given, but supplemental texts come from one place. Give one of file "
                "(.txt, .jsonl or a saved dataset's folder), hub (a dataset's name)."
            )
        if self.file is not None:
            if self.config is not None:
                raise ValueError(
                    f"config={self.config!r} applies to hub only, but the texts come from a file. "
                    "Leave it out."
                )
            if self.file.suffix and not self.file.is_dir():
                check_ending("file", self.file)
        return self


def mixed(train: Dataset, supplement: Supplement, seed: int) -> Dataset:
    """The training texts, unchanged, and after them supplemental ones.

    Args:
        train: column ``text``, and any of the columns of `LABELS`.
        supplement: where the other texts come from, and how many.
        seed: seed for drawing among them, without replacement.

    Returns:
        The columns of `train`. A supplemental row has its text and what `LABELS` says; any other
        column is empty there.

    Raises:
        OSError: the texts do not exist, or cannot be downloaded from the hub.
        ValueError: there are too few texts, or the share amounts to none.
    """
    count = round(len(train) * supplement.share / (1 - supplement.share))
    if count == 0:
        raise ValueError(
            f"supplement.share={supplement.share} of {len(train)} training texts amounts to no "
            "text. Give a larger share, or no supplement."
        )
    if supplement.hub is not None:
        whole, source = _streamed(supplement, seed, count), supplement.hub
    else:
        whole, source = _on_disk(supplement), str(supplement.file)
    texts = [cut for text in whole if (cut := _cut(text, supplement.max_chars))]
    if len(texts) < count:
        raise ValueError(
            f"{source} has {len(texts)} texts, but supplement.share={supplement.share} with "
            f"{len(train)} training texts needs {count}. Give a smaller share or another source."
        )
    drawn = random.Random(f"supplement {seed}").sample(texts, count)
    columns = {name: _column(name, train.features[name], drawn) for name in train.column_names}
    return concatenate_datasets([train, Dataset.from_dict(columns, features=train.features)])


def _column(name: str, feature: Any, texts: list[str]) -> list[Any]:
    if name == "text":
        return texts
    label = LABELS.get(name)
    wanted = ("string", "large_string") if isinstance(label, str) else ("int",)
    fits = isinstance(feature, Value) and feature.dtype.startswith(wanted)
    return [label if fits else None] * len(texts)


def _on_disk(supplement: Supplement) -> list[str]:
    place = supplement.file
    assert place is not None
    if place.is_dir():
        # save_dataset keeps the texts in a subfolder.
        folder = place / "train" if (place / "provenance.json").is_file() else place
        if not (folder / "dataset_info.json").is_file():
            raise FileNotFoundError(
                f"supplement.file={str(place)!r} does not hold a dataset. Name a folder "
                "that save_dataset or a dataset's save_to_disk wrote, or a file of texts."
            )
        rows = load_from_disk(str(folder))
        _check_column(supplement, rows.column_names)
        return list(rows[supplement.column])
    if not place.is_file():
        raise FileNotFoundError(
            f"supplement.file={str(place)!r} does not exist. Name a file of texts, or a saved "
            "dataset's folder."
        )
    check_ending("supplement.file", place)
    return read_texts(place)


def _streamed(supplement: Supplement, seed: int, count: int) -> list[str]:
    texts: list[str] = []
    rows = _hub_rows(supplement, seed)
    # Many such datasets have empty rows between paragraphs.
    while len(texts) < count and (more := list(islice(rows, count - len(texts)))):
        _check_column(supplement, more[0])
        found = (row[supplement.column] or "" for row in more)
        texts.extend(text for text in found if text.strip())
    return texts


def _hub_rows(supplement: Supplement, seed: int) -> Iterator[Any]:
    try:
        rows = datasets.load_dataset(
            supplement.hub, supplement.config, split=supplement.split, streaming=True
        )
        yield from rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    except Exception as error:  # each kind of failure on the way has its own class
        named = f"supplement.hub={supplement.hub!r}"
        if supplement.config is not None:
            named += f", config={supplement.config!r}"
        raise OSError(
            f"{named}, split={supplement.split!r} could not be downloaded from the Hugging Face "
            f"hub ({type(error).__name__}: {error}). Check these names, and that this machine has "
            "access to the hub; or download the texts elsewhere and name them: "
            "supplement.file=PATH."
        ) from error


def _check_column(supplement: Supplement, columns: Any) -> None:
    if supplement.column not in columns:
        raise ValueError(
            f"supplement.column={supplement.column!r} is not one of the columns of "
            f"{supplement.hub or supplement.file}: {', '.join(columns)}. Name the one that holds "
            "the texts."
        )


def _cut(text: str, longest: int) -> str:
    """The beginning of the text, without a word cut in two if it contains whitespace."""
    text = text.strip()
    if len(text) <= longest:
        return text
    whole = re.match(rf".{{1,{longest}}}(?=\s)", text, re.DOTALL)
    return whole[0].rstrip() if whole else text[:longest]
