"""The texts of a finetuning run: read, split into trained and held-out ones, and tokenized."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, load_from_disk

from graftlens.chat import Conversation
from graftlens.data import load_dataset, make_dataset
from graftlens.data.supplement import mixed
from graftlens.data.texts import read_paragraphs, read_texts
from graftlens.prompts import Prompt, PromptError
from graftlens.prompts import tokenize as tokens_of
from graftlens.recipes import FinetuneConfig, TrainingData

#: What is trained on: a text as it is, or a conversation, of which only the replies are learned.
Text = str | Conversation

#: Token ids of a text; of a conversation also its labels, -100 where nothing is learned.
Row = dict[str, list[int]]


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


def texts_in(dataset: Dataset) -> list[Text]:
    """The texts of a dataset that `check_dataset` has passed: a row with `messages` is a
    conversation, any other its `text`."""
    texts = list(dataset["text"])
    if "messages" not in dataset.column_names:
        return texts
    talks = dataset["messages"]
    return [
        text if said is None else Conversation.of(said)
        for text, said in zip(texts, talks, strict=True)
    ]


def rows_of(tokenizer: Any, texts: Sequence[Text], given: Sequence[Text] = ()) -> list[Row]:
    """Token ids of each text, plain ones without an end token.

    Raises:
        ValueError: a conversation that cannot be written, or in which the assistant says nothing.
    """
    plain = [text for text in texts if isinstance(text, str)]
    ids = iter(tokenizer(plain)["input_ids"] if plain else ())
    rows: list[Row] = []
    for text in texts:
        if isinstance(text, str):
            rows.append({"input_ids": next(ids)})
            continue
        try:
            rows.append(_replies(tokenizer, text))
        except PromptError as error:
            raise ValueError(f"{named(text, given or texts)}: {error}") from None
    return rows


def _replies(tokenizer: Any, talk: Conversation) -> Row:
    """The tokens of a conversation, and as labels those of what the assistant says, each message
    with what the template writes after it up to the token that ends it.

    Where the template does not end a reply that nothing follows with a special token, the
    tokenizer's end token does.

    Raises:
        PromptError: a conversation that cannot be written, or in which the assistant says nothing.
    """
    tokens = tokens_of(Prompt(talk.transcript, conversation=talk, name="chat"), tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, one in added if one.special)}
    ids = list(tokens.ids)
    written = {i for run in tokens.spans["template"] for i in run}
    said = [reply for reply in tokens.spans["assistant"] if reply]
    if not said:
        raise PromptError(
            "the assistant says nothing in it, so there is nothing to learn. Leave it out."
        )
    learned: set[int] = set()
    for reply in said:
        after = list(itertools.takewhile(written.__contains__, range(reply[-1] + 1, len(ids))))
        end = next((n for n, i in enumerate(after, 1) if ids[i] in special), None)
        is_last = reply[-1] + len(after) + 1 == len(ids)
        learned |= {*reply, *after[:end]} if end or is_last else {*reply}
    if end is None and is_last and tokenizer.eos_token_id is not None:
        learned.add(len(ids))
        ids.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": [t if i in learned else -100 for i, t in enumerate(ids)]}


def tokenize(
    tokenizer: Any,
    texts: Sequence[Text],
    max_length: int,
    positions: int | None = None,
    given: Sequence[Text] = (),
) -> list[Row]:
    """Token ids of each text, its end token included.

    Args:
        tokenizer: the model's.
        texts: to train on.
        max_length: tokens that a text may have.
        positions: how many the model has, if it cannot go beyond them.
        given: all texts, which messages number.

    Raises:
        ValueError: a longer text; as `rows_of`.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = rows_of(tokenizer, texts, given)
    for row in rows:
        if "labels" not in row and row["input_ids"][-1:] != end:
            row["input_ids"] = row["input_ids"] + end
    lengths = [len(row["input_ids"]) for row in rows]
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
        one = texts[lengths.index(longest)]
        lines = one.count("\n") + 1 if isinstance(one, str) else 1
        split = f" It has {lines} lines: a blank line separates two texts." if lines > 1 else ""
        raise ValueError(
            f"{which}, and graftlens does not truncate silently. Set max_length to {longest}, or "
            f"shorten the texts; the longest is {text}.{split}"
        )
    return rows


def named(text: Text, given: Sequence[Text]) -> str:
    """How messages refer to a text: its number among the given ones, and its beginning."""
    said = text if isinstance(text, str) else text.transcript
    beginning = said if len(said) <= 40 else f"{said[:40]}…"
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
    talks = dataset["messages"] if "messages" in dataset.column_names else ()
    for number, said in enumerate(talks, 1):
        try:
            _ = said is None or Conversation.of(said)
        except ValueError as error:
            raise ValueError(f"row {number} of the {name} dataset: {error}") from None


def split(
    config: FinetuneConfig, train: Dataset, heldout: Dataset | None
) -> tuple[list[Text], list[Text]]:
    """(training texts, held-out texts)."""
    texts = texts_in(train)
    held: list[Text] = []
    if heldout is not None:
        if config.heldout_share or config.heldout_file is not None:
            raise ValueError(
                f"a held-out dataset is given, and the config has heldout_share="
                f"{config.heldout_share}, heldout_file={config.heldout_file}. Use one of the three."
            )
        held = texts_in(heldout)
    elif config.heldout_file is not None:
        check_heldout_file(config)
        held = [*read_paragraphs(config.heldout_file)]
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


def text_hash(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        said = text if isinstance(text, str) else text.messages
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def vocabulary_hash(tokenizer: Any) -> str:
    """What version 0.1.0 recorded about a tokenizer."""
    return text_hash([json.dumps(sorted(tokenizer.get_vocab().items()))])
