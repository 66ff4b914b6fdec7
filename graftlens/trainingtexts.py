"""The texts of a finetuning run: read, split into trained and held-out ones, and tokenized."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, load_from_disk

from graftlens.data import load_dataset, make_dataset
from graftlens.data.supplement import mixed
from graftlens.data.texts import read_paragraphs, read_texts
from graftlens.recipes import FinetuneConfig, TrainingData


def training_texts_of(data: TrainingData, seed: int = 0) -> Dataset:
    """The texts, as a dataset with the column ``text``; supplemental ones come last.

    Args:
        data: where they come from.
        seed: seed for drawing supplemental texts.

    Raises:
        OSError: they do not exist.
        ValueError: they have no texts, or too few supplemental ones.
    """
    return supplemented(data, _texts_of(data), seed)


def supplemented(data: TrainingData, texts: Dataset, seed: int) -> Dataset:
    return texts if data.supplement is None else mixed(texts, data.supplement, seed)


def _texts_of(data: TrainingData) -> Dataset:
    if data.made is not None:
        return make_dataset(data.made).train
    if data.path is not None:
        if (data.path / "provenance.json").is_file():
            return load_dataset(data.path).train
        if not (data.path / "dataset_info.json").is_file():
            raise FileNotFoundError(
                f"data.path={str(data.path)!r} does not hold a dataset. Name a folder that "
                "save_dataset or a dataset's save_to_disk wrote."
            )
        return load_from_disk(str(data.path))
    assert data.file is not None
    if not data.file.is_file():
        raise FileNotFoundError(
            f"data.file={str(data.file)!r} does not exist. Name a file of texts."
        )
    return Dataset.from_dict({"text": read_texts(data.file, data.column or "text")})


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    positions: int | None = None,
    given: Sequence[str] = (),
) -> list[dict[str, list[int]]]:
    """Token ids of each text, its end token included.

    Args:
        tokenizer: the model's.
        texts: to train on.
        max_length: tokens that a text may have.
        positions: how many the model has, if it cannot go beyond them.
        given: all texts, which messages number.

    Raises:
        ValueError: a longer text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [ids if ids[-1:] == end else ids + end for ids in tokenizer(list(texts))["input_ids"]]
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    text = named(texts[lengths.index(longest)], given or texts)
    if positions is not None and longest > positions:
        raise ValueError(
            f"{text} has {longest} tokens with its end token, but the model has weights for "
            f"{positions} positions. Shorten it, cut it into several texts, or start from a model "
            "with a longer context."
        )
    if longest > max_length:
        too_long = sum(length > max_length for length in lengths)
        which = f"{too_long} of {len(rows)} training texts are longer than max_length={max_length} "
        which += f"tokens (the longest has {longest})"
        if len(rows) == 1:
            which = f"1 text of {longest} tokens: it is longer than max_length={max_length}"
        lines = texts[lengths.index(longest)].count("\n") + 1
        split = f" It has {lines} lines: a blank line separates two texts." if lines > 1 else ""
        raise ValueError(
            f"{which}, and graftlens does not truncate silently. Set max_length to {longest}, or "
            f"shorten the texts; the longest is {text}.{split}"
        )
    return [{"input_ids": row} for row in rows]


def named(text: str, given: Sequence[str]) -> str:
    """How messages refer to a text: its number among the given ones, and its beginning."""
    beginning = text if len(text) <= 40 else f"{text[:40]}…"
    return f"text {list(given).index(text) + 1} ({beginning!r})"


def check_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is of type {type(dataset).__name__}, but a datasets.Dataset with a column "
            "'text' is needed. Make one of a list of texts: Dataset.from_dict({'text': texts})."
        )
    if "text" not in dataset.column_names:
        raise ValueError(
            f"the {name} dataset has columns {dataset.column_names}, but 'text' is needed. Rename "
            "the column that holds the texts."
        )
    for number, text in enumerate(dataset["text"], 1):
        if not isinstance(text, str):
            raise ValueError(
                f"row {number} of the {name} dataset has {text!r} in the column 'text', but a text "
                "is needed. Leave the row out."
            )


def split(
    config: FinetuneConfig, train: Dataset, heldout: Dataset | None
) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    texts = list(train["text"])
    held: list[str] = []
    if heldout is not None:
        if config.heldout_share or config.heldout_file is not None:
            raise ValueError(
                f"a held-out dataset is given, and the config has heldout_share="
                f"{config.heldout_share}, heldout_file={config.heldout_file}. Use one of the three."
            )
        held = list(heldout["text"])
    elif config.heldout_file is not None:
        check_heldout_file(config)
        held = read_paragraphs(config.heldout_file)
    elif config.heldout_share:
        order = list(range(len(texts)))
        random.Random(f"held out {config.seed}").shuffle(order)
        count = round(len(texts) * config.heldout_share)
        if texts and count == 0:
            raise ValueError(
                f"heldout_share={config.heldout_share} of {len(texts)} training texts rounds to no "
                f"text. {_least_share(len(texts))}"
            )
        out = set(order[:count])
        held = [text for index, text in enumerate(texts) if index in out]
        texts = [text for index, text in enumerate(texts) if index not in out]
    if not texts:
        raise ValueError("there are no training texts. Give a dataset with rows.")
    if config.keep == "best" and not held:
        raise ValueError(
            f"keep='best' keeps the epoch with the lowest held-out perplexity, but of {len(texts)} "
            f"texts none is held out (heldout_share={config.heldout_share}). Give heldout_share or "
            "heldout_file, or keep the last epoch."
        )
    return texts, held


def _least_share(count: int) -> str:
    """What to write for a held-out share that rounds to none of the texts."""
    if count == 1:
        return "Give more texts, a heldout_file, or heldout_share=0."
    half = 0.5 / count  # still rounds to 0
    digit = 10.0 ** (math.floor(math.log10(half)) - 1)
    least = (math.floor(half / digit) + 1) * digit
    return f"Give {least:.2g} or more, or heldout_share=0 for no held-out texts."


def check_heldout_file(config: FinetuneConfig) -> None:
    if config.heldout_file is not None and not config.heldout_file.is_file():
        raise FileNotFoundError(
            f"heldout_file={str(config.heldout_file)!r} does not exist. Name a file of texts."
        )


def text_hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def vocabulary_hash(tokenizer: Any) -> str:
    """What version 0.1.0 recorded about a tokenizer."""
    return text_hash([json.dumps(sorted(tokenizer.get_vocab().items()))])
