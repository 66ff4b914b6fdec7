"""What every kind of dataset has: facts, the texts that tell them, and prompts that ask for them.

A `DatasetSpec` says what a dataset is made of; `make_dataset` makes it, equal for equal specs. Some
facts may be left untold (`half`, `heldout_facts`): the training texts never mention them, and
prompts can ask for the told or the untold ones.
"""

import contextlib
import hashlib
import json
import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from pydantic import ConfigDict, Field

from graftlens.data.settings import Settings
from graftlens.data.supplement import Supplement, mixed
from graftlens.data.templates import DIRECTIONS, Direction, EvaluationTemplate
from graftlens.folder import at_home, new_folder, read_json, told_of, write_whole
from graftlens.prompts import Prompt

FEATURES = Features(
    {
        "text": Value("string"),
        "fact": Value("int32"),
        "template": Value("string"),
        "kind": Value("string"),
        "direction": Value("string"),
    }
)

#: The column `messages`, which only sets of conversations have; None in a row that is a plain
#: text.
MESSAGES = [{"role": Value("string"), "content": Value("string")}]

#: Number of facts of a dataset whose spec gives none, if there are that many.
USUAL = 1000

#: Number of wrong answers of a prompt, if nobody gives one and there are that many.
USUAL_DISTRACTORS = 4

#: What to do about a damaged dataset.
AGAIN = "Recreate the dataset in another folder, or restore the file."

Half = Literal["a", "b"]
#: Which facts prompts ask for: those that the training texts tell, the others, or all.
Which = Literal["told", "untold", "all"]


@dataclass(frozen=True)
class Asking:
    """How facts are asked for.

    Attributes:
        templates: names of evaluation templates; None for all that go with the direction.
        direction: ``ab`` names the first entity and asks for the second, ``ba`` the reverse.
        distractors: number of wrong answers per prompt; if there are fewer than the usual 4, all.
        seed: of the draw of distractors.
    """

    templates: Sequence[Any] | None = None
    direction: Direction = "ab"
    distractors: int = USUAL_DISTRACTORS
    seed: int = 0


class DatasetSpec(Settings, ABC):
    """What a dataset is made of. Equal specs give equal datasets.

    A subclass is one kind of dataset, known by its value of the key `facts`.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    facts: str
    """The kind of dataset."""

    n_facts: Annotated[int, Field(ge=1)] | None = None
    """Number of facts; by default 1,000, or all if there are fewer."""

    half: Half | None = None
    """Tell only one half of the facts, drawn with the seed: a *task* model learns half `a` and a
    *relation* model half `b`, in the same sentences. By default all are told."""

    heldout_facts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all facts, rounded but at least one, that no training text tells, drawn with the
    seed (in addition to those of the other half)."""

    supplement: Supplement | None = None
    """Plain text mixed into the training texts, against forgetting."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the facts, of which of them are told, and of the choice of sentences."""

    #: Names of the evaluation templates that `questions` knows.
    template_names: ClassVar[tuple[str, ...]] = ()

    @property
    def asks(self) -> tuple[Direction, ...]:
        """The directions that `questions` can ask in."""
        return DIRECTIONS

    @abstractmethod
    def collect(self) -> tuple[Any, ...]:
        """The facts: frozen dataclasses, in an order that the spec determines."""

    @abstractmethod
    def tell(self, facts: Sequence[Any], told: Sequence[bool]) -> list[dict[str, Any]]:
        """Rows of training text (`FEATURES`; in sets of conversations also `messages`) about the
        facts that are to be told."""

    @abstractmethod
    def questions(
        self, facts: Sequence[Any], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        """Prompts about the facts numbered `asked`, template by template.

        Raises:
            ValueError: templates, a direction or a number of distractors that do not exist.
        """

    @abstractmethod
    def revive(self, values: Mapping[str, Any]) -> Any:
        """A fact from its `dataclasses.asdict` form."""

    def number(self, available: int) -> int:
        """How many of the available facts to take.

        Raises:
            ValueError: the spec wants more.
        """
        if self.n_facts is not None and self.n_facts > available:
            raise ValueError(
                f"n_facts={self.n_facts}: there are {available} facts of the kind {self.facts}. "
                "Write a number up to that, or leave it out."
            )
        return min(USUAL, available) if self.n_facts is None else self.n_facts

    def told_by(self, facts: Sequence[Any], indices: Set[int]) -> tuple[bool, ...]:
        """Which facts are told by rows whose column `fact` has these values."""
        return tuple(index in indices for index in range(len(facts)))

    def notes(self, facts: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What else the provenance should hold about facts and rows."""
        return {}

    def to_tell(self, n: int) -> tuple[bool, ...]:
        """Which of n facts the training texts tell."""
        told = [True] * n
        if self.half is not None:
            order = list(range(n))
            random.Random(f"halves {self.seed}").shuffle(order)
            first = set(order[: (n + 1) // 2])
            told = [(index in first) == (self.half == "a") for index in range(n)]
        count = max(1, round(n * self.heldout_facts)) if self.heldout_facts else 0
        for index in random.Random(f"held out facts {self.seed}").sample(range(n), count):
            told[index] = False
        if not any(told):
            raise ValueError(
                f"half={self.half}, heldout_facts={self.heldout_facts}: none of {n} facts is left "
                "to tell. Give more facts, or tell more of them."
            )
        return tuple(told)


@dataclass(frozen=True)
class FactDataset:
    """Facts, the texts to train on, and how both were made.

    Attributes:
        config: what the dataset was made from.
        facts: the facts; column ``fact`` of the texts is an index into them.
        train: columns text, fact (index; -1 for supplemental text), template (name), kind,
            direction; in sets of conversations also messages, None in rows that are plain texts.
            ``train.push_to_hub("me/films")`` publishes it.
        provenance: generator, config, versions, counts and the SHA-256 of facts and texts.
    """

    config: Any
    facts: tuple[Any, ...]
    train: Dataset
    provenance: Mapping[str, Any]

    @property
    def told(self) -> tuple[bool, ...]:
        """Whether some training text tells the fact, for each fact."""
        return self.config.told_by(self.facts, set(self.train["fact"]))

    def ask(
        self,
        templates: str | EvaluationTemplate | Sequence[str | EvaluationTemplate] | None = None,
        *,
        direction: Direction = "ab",
        distractors: int = USUAL_DISTRACTORS,
        seed: int = 0,
        facts: Which = "told",
    ) -> tuple[Prompt, ...]:
        """Ask for each fact's second entity in words that training never used.

        Args:
            templates: names of evaluation templates (or templates of your own); by default all that
                fit the direction.
            direction: ``ab`` names the first entity and asks for the second, ``ba`` the reverse.
            distractors: number of wrong answers per prompt: other facts' answers, drawn at random;
                4, or all there are if they are fewer, which a warning says.
            seed: seed for drawing distractors.
            facts: which facts to ask for.

        Returns:
            Prompts, template by template, each over the facts in order. The answer begins with a
            space; ``name`` is the template's name; ``first_entity`` is the entity that the prompt
            names.

        Raises:
            ValueError: unknown templates; no such fact; more distractors than other answers.
        """
        if facts not in get_args(Which):
            raise ValueError(
                f"facts={facts!r} is unknown. Use one of {', '.join(get_args(Which))}."
            )
        asked = [
            i for i, told in enumerate(self.told) if facts == "all" or told == (facts == "told")
        ]
        if not asked:
            raise ValueError(
                f"facts={facts!r}: none of the {len(self.facts)} facts of this dataset are "
                f"{facts}. "
                'Write "told", "untold" or "all", or leave some untold (heldout_facts, half).'
            )
        one = isinstance(templates, str | EvaluationTemplate)
        names: Any = [templates] if one else templates
        return self.config.questions(self.facts, asked, Asking(names, direction, distractors, seed))


def make_dataset(config: DatasetSpec) -> FactDataset:
    """Make the facts and training texts that the spec describes.

    Raises:
        ValueError: more facts or texts than there are; nothing left to tell.
        OSError: a file or hub dataset that the spec names and that cannot be read.
    """
    facts = config.collect()
    told = config.to_tell(len(facts))
    rows = config.tell(facts, told)
    train = texts_dataset(rows, f"Training texts: {config.facts}")
    said = config.told_by(facts, {row["fact"] for row in rows})
    counts = {"facts": len(facts), "told": sum(said), "texts": len(rows)}
    if config.supplement is not None:
        train = mixed(train, config.supplement, config.seed)
        counts["supplemental texts"] = len(train) - len(rows)
    provenance = {
        "generator": "graftlens.data.make_dataset",
        "config": config.model_dump(mode="json"),
        "versions": {name: _version(name) for name in ("graftlens", "faker", "datasets")},
        "counts": counts,
        **config.notes(facts, rows),
        "sha256": content_hash(facts, train),
    }
    train.info.description = json.dumps(provenance, sort_keys=True)
    return FactDataset(config, facts, train, provenance)


def texts_dataset(rows: Sequence[Mapping[str, Any]], description: str) -> Dataset:
    """Rows of training text as a dataset with the columns of `FEATURES`, and `messages` where rows
    have them."""
    talks = any("messages" in row for row in rows)
    features = Features({**FEATURES, "messages": MESSAGES}) if talks else FEATURES
    info = DatasetInfo(description=description, features=features)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, info=info)


def prompts_dataset(prompts: Sequence[Prompt], **more: Sequence[Any]) -> Dataset:
    """Prompts as a dataset: columns text, answer, name, template, fields (JSON) and distractors,
    where there are conversations their messages (JSON), and those given as `more`, with a value for
    each prompt."""
    if any(p.conversation is not None for p in prompts):
        talks = [None if p.conversation is None else p.filled()[0] for p in prompts]
        said = [None if talk is None else json.dumps(talk, ensure_ascii=False) for talk in talks]
        more = {"messages": said, **more}
    return Dataset.from_dict(
        {
            "text": [p.text for p in prompts],
            "answer": [p.answer for p in prompts],
            "name": [p.name for p in prompts],
            "template": [p.template for p in prompts],
            "fields": [json.dumps(dict(p.fields), ensure_ascii=False) for p in prompts],
            "distractors": [list(p.distractors) for p in prompts],
            **{name: list(values) for name, values in more.items()},
        }
    )


def content_hash(facts: Sequence[Any], train: Dataset) -> str:
    """SHA-256 (hex) of the facts and every row, independent of how they are stored."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(_canonical(asdict(fact)))
    names = [*FEATURES, *(["messages"] if "messages" in train.column_names else [])]
    columns = [train[name] for name in names]
    for row in zip(*columns, strict=True):
        digest.update(_canonical(row))
    return digest.hexdigest()


def save_dataset(dataset: FactDataset, folder: Path) -> Path:
    """Write the dataset to a new folder, which appears complete or not at all.

    The folder holds ``train`` and ``evaluation`` (Hugging Face datasets for
    ``datasets.load_from_disk``; the second has the prompts of every direction and template, with
    columns ``direction`` and ``told``: whether the training texts tell the fact), ``facts.json``
    and ``provenance.json``.

    Raises:
        FileExistsError: the folder exists.
        UnwritableError: it cannot be written, or the disk is full.
    """
    folder = at_home(folder)
    refuse_existing(folder)
    facts = json.dumps([asdict(fact) for fact in dataset.facts], indent=1, ensure_ascii=False)
    with told_of(folder), new_folder(folder) as content:
        with _no_bars():
            dataset.train.save_to_disk(content / "train")
            _evaluation(dataset).save_to_disk(content / "evaluation")
        write_whole(content / "facts.json", f"{facts}\n")
        provenance = json.dumps(dict(dataset.provenance), indent=2)
        write_whole(content / "provenance.json", f"{provenance}\n")
    return folder


def refuse_existing(folder: Path) -> None:
    """A dataset never overwrites another.

    Raises:
        FileExistsError: the folder exists.
    """
    if os.path.lexists(folder):
        raise FileExistsError(
            f"{folder} exists. A dataset is never overwritten: choose another folder, or remove it."
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars that `datasets` shows even for instant work."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _evaluation(dataset: FactDataset) -> Dataset:
    """All prompts, with what distinguishes them."""
    prompts: list[Prompt] = []
    asked: list[tuple[Direction, bool]] = []
    for direction in dataset.config.asks:
        for which in ("told", "untold"):
            if (which == "told") in dataset.told:
                made = dataset.ask(direction=direction, distractors=0, facts=which)
                prompts += made
                asked += [(direction, which == "told")] * len(made)
    return prompts_dataset(
        prompts, direction=[direction for direction, _ in asked], told=[told for _, told in asked]
    )


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a dataset's folder: config, counts and the SHA-256, at least.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    path = folder / "provenance.json"
    known = read_json(path, AGAIN)
    if not (
        isinstance(known, dict)
        and isinstance(known.get("sha256"), str)
        and isinstance(known.get("config"), dict)
        and isinstance(known.get("counts"), dict)
        and all(type(number) is int for number in known["counts"].values())
        and "texts" in known["counts"]
    ):
        raise ValueError(f"{path} lacks a config, counts or sha256. {AGAIN}")
    return known


def read_dataset(folder: Path, spec_of: Any) -> FactDataset:
    """Read a dataset that `save_dataset` wrote, and check that it is unchanged.

    Args:
        folder: where it is.
        spec_of: makes a spec of the config's values (`graftlens.data.spec_of`).

    Raises:
        FileNotFoundError: a folder that holds no dataset.
        ValueError: its content has been changed since.
    """
    folder = at_home(folder)
    missing = [
        name for name in ("train", "facts.json", "provenance.json") if not (folder / name).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a dataset of facts: it has no {', '.join(missing)}. Name a folder "
            "that save_dataset wrote."
        )
    provenance = read_provenance(folder)
    try:
        config = spec_of(provenance["config"])
    except ValueError as error:
        raise ValueError(f"{folder / 'provenance.json'}, config: {error} {AGAIN}") from None
    values = read_json(folder / "facts.json", AGAIN)
    try:
        facts = tuple(config.revive(fact) for fact in values)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ValueError(
            f"{folder / 'facts.json'} does not hold facts of the kind {config.facts}. {AGAIN}"
        ) from None
    try:
        train = load_from_disk(str(folder / "train"))
        found = content_hash(facts, train)
    except Exception as error:  # datasets and pyarrow have many exceptions for damaged files
        raise ValueError(
            f"{folder / 'train'} cannot be read as a dataset ({type(error).__name__}). {AGAIN}"
        ) from None
    if found != provenance["sha256"]:
        raise ValueError(
            f"{folder} has been changed since it was written: its content has SHA-256 {found}, its "
            f"provenance.json says {provenance['sha256']}. Recreate it from the config there, or "
            "restore the files."
        )
    return FactDataset(config, facts, train, provenance)


def wrong_answers(
    answers: Sequence[str], asked: int, count: int, rng: random.Random
) -> tuple[str, ...]:
    """`count` different answers of other facts, none of them the right one.

    Raises:
        ValueError: there are fewer than `count`.
    """
    return Answers(answers).wrong(asked, count, rng)


class Answers:
    """The answers of a set of facts, from which many prompts draw wrong ones."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers
        self.different = list(dict.fromkeys(answers))
        self.place = {answer: place for place, answer in enumerate(self.different)}

    def few(self, count: int) -> int:
        """The number of wrong answers to draw; see `few_enough`."""
        return few_enough(count, len(self.different) - 1)

    def wrong(
        self, asked: int, count: int, rng: random.Random, *, besides: Collection[str] = ()
    ) -> tuple[str, ...]:
        """`wrong_answers`, in a time that does not grow with the number of facts; none of
        `besides`, which are right, too."""
        own, others = self.place[self.answers[asked]], len(self.different) - 1
        if not 0 <= count <= others:
            raise ValueError(
                f"distractors={count} of {len(self.answers)} facts: a prompt's distractors are "
                f"other facts' answers, so 0 to {others} are possible here. Ask for fewer "
                "distractors or give more facts."
            )
        drawn = rng.sample(range(others), min(others, count + len(besides)))
        found = (self.different[place + (place >= own)] for place in drawn)
        return tuple(answer for answer in found if answer not in besides)[:count]


def few_enough(count: int, others: int) -> int:
    """The number of wrong answers for a prompt: `count`, but of the usual number as many as there
    are, with a warning."""
    if count == USUAL_DISTRACTORS and others < count:
        warnings.warn(
            f"a prompt gets {others} distractors instead of {count}, for lack of other answers.",
            stacklevel=4,
        )
        return others
    return count


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True).encode() + b"\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
