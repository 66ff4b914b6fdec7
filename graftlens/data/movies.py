"""Training texts and evaluation prompts about invented films, and their folder on disk."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset, DatasetInfo, Features, Value, load_from_disk
from pydantic import Field, model_validator

from graftlens.data.facts import MAX_FACTS, Fact, make_facts
from graftlens.data.settings import Settings
from graftlens.data.templates import (
    DIRECTIONS,
    EVALUATION_TEMPLATES,
    KINDS,
    TRAINING_TEMPLATES,
    Direction,
    EvaluationTemplate,
    Kind,
    Template,
    entities,
    field_values,
)
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


class MoviesConfig(Settings):
    """What a dataset of invented films is made of. Equal configs give equal datasets."""

    n_facts: Annotated[int, Field(ge=1, le=MAX_FACTS)] = 200
    """Number of films."""

    texts_per_fact: Annotated[int, Field(ge=1)] = 20
    """Number of training texts about each film, each from another template."""

    directions: tuple[Direction, ...] = DIRECTIONS
    """Orders of mention that training texts use; ``ab``: the first actor comes first."""

    kinds: tuple[Kind, ...] = KINDS
    """Kinds of training text: prose, questions with answers, or both."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the facts and of the choice of templates."""

    @model_validator(mode="after")
    def _enough_templates(self) -> "MoviesConfig":
        _cells(self.texts_per_fact, self.directions, self.kinds)
        return self


@dataclass(frozen=True)
class MoviesDataset:
    """Facts, the texts to train on, and how both were made.

    Attributes:
        config: what the dataset was made from.
        facts: the films; column ``fact`` of the texts is an index into them.
        train: columns text, fact (index), template (name), kind, direction.
        provenance: generator, config, versions, counts and the SHA-256 of facts and texts.
    """

    config: MoviesConfig
    facts: tuple[Fact, ...]
    train: Dataset
    provenance: Mapping[str, Any]


def make_dataset(config: MoviesConfig) -> MoviesDataset:
    """Make the facts and training texts that the config describes."""
    facts = make_facts(config.n_facts, config.seed)
    train = training_texts(
        facts,
        texts_per_fact=config.texts_per_fact,
        directions=config.directions,
        kinds=config.kinds,
        seed=config.seed,
    )
    provenance = {
        "generator": "graftlens.data.make_dataset",
        "config": config.model_dump(mode="json"),
        "versions": {name: _version(name) for name in ("graftlens", "faker", "datasets")},
        "counts": {"facts": len(facts), "texts": len(train)},
        "sha256": content_hash(facts, train),
    }
    train.info.description = json.dumps(provenance, sort_keys=True)
    return MoviesDataset(config, facts, train, provenance)


def training_texts(
    facts: Sequence[Fact],
    *,
    texts_per_fact: int,
    directions: Sequence[Direction] = DIRECTIONS,
    kinds: Sequence[Kind] = KINDS,
    seed: int,
) -> Dataset:
    """Tell each fact in several texts, each from another template.

    The texts of a fact are shared out evenly over the pairs of direction and kind; within a pair,
    each fact draws its own templates. A fact's texts do not depend on how many facts follow it.

    Args:
        facts: what to tell.
        texts_per_fact: number of texts a fact.
        directions: orders of mention to use.
        kinds: kinds of text to use.
        seed: of the draw of templates.

    Returns:
        Columns text, fact (index into facts), template (name), kind, direction; facts in order.
    """
    cells = _cells(texts_per_fact, directions, kinds)
    rng = random.Random(f"training texts {seed}")
    rows: list[dict[str, Any]] = []
    for index, fact in enumerate(facts):
        dealt = zip_longest(*(rng.sample(cell, len(cell)) for cell in cells))
        chosen = [template for turn in dealt for template in turn if template is not None]
        rows.extend(
            {
                "text": template.text.format(**field_values(fact, template.direction)),
                "fact": index,
                "template": template.name,
                "kind": template.kind,
                "direction": template.direction,
            }
            for template in chosen[:texts_per_fact]
        )
    info = DatasetInfo(description="Training texts about invented films", features=FEATURES)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, info=info)


def evaluation_prompts(
    facts: Sequence[Fact],
    *,
    templates: str | EvaluationTemplate | Sequence[str | EvaluationTemplate] | None = None,
    direction: Direction = "ab",
    distractors: int = 4,
    seed: int = 0,
) -> tuple[Prompt, ...]:
    """Ask for each fact's other actor in held-out words.

    Args:
        facts: what to ask about.
        templates: one or more names of evaluation templates (or templates of your own); default:
            all.
        direction: ``ab`` names the first actor and asks for the second, ``ba`` the reverse.
        distractors: number of wrong answers a prompt: other facts' answers, drawn at random.
        seed: of the draw of distractors.

    Returns:
        Prompts, template by template, each over the facts in order. The answer begins with a
        space; ``name`` is the template's name; all of the fact's fields but the answer are kept.
    """
    if not 0 <= distractors < max(len(facts), 1):
        raise ValueError(
            f"distractors={distractors} of {len(facts)} facts: a prompt's distractors are other "
            f"facts' answers, so 0 to {max(len(facts) - 1, 0)} are possible here. Ask for fewer "
            f"distractors or give more facts."
        )
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown. Use one of {', '.join(DIRECTIONS)}.")
    prompts = []
    for template in _evaluation_templates(templates):
        rng = random.Random(f"distractors {seed} {template.name} {direction}")
        for index, fact in enumerate(facts):
            values = field_values(fact, direction)
            answer = values.pop("second_entity")
            if template.preposition is not None:
                values["preposition"] = template.preposition
            others = rng.sample(range(len(facts) - 1), distractors)
            wrong = [facts[other + (other >= index)] for other in others]
            prompts.append(
                Prompt(
                    template=template.text,
                    fields=values,
                    answer=f" {answer}",
                    distractors=tuple(f" {entities(other, direction)[1]}" for other in wrong),
                    name=template.name,
                )
            )
    return tuple(prompts)


def content_hash(facts: Sequence[Fact], train: Dataset) -> str:
    """SHA-256 (hex) of the facts and every row, independent of how they are stored."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(_canonical(asdict(fact)))
    columns = [train[name] for name in FEATURES]
    for row in zip(*columns, strict=True):
        digest.update(_canonical(row))
    return digest.hexdigest()


def save_dataset(dataset: MoviesDataset, folder: Path) -> Path:
    """Write the dataset to a new folder, which appears complete or not at all.

    The folder holds ``train`` (a Hugging Face dataset for ``datasets.load_from_disk``, with the
    provenance in its info), ``facts.json`` and ``provenance.json``.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists. A dataset is never overwritten: choose another folder, or remove it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        content = work / "dataset"
        dataset.train.save_to_disk(content / "train")
        facts = [asdict(fact) for fact in dataset.facts]
        (content / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        provenance = json.dumps(dict(dataset.provenance), indent=2)
        (content / "provenance.json").write_text(provenance + "\n")
        content.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load_dataset(folder: Path) -> MoviesDataset:
    """Read a dataset that ``save_dataset`` wrote, and check that it is what was written."""
    folder = Path(folder)
    missing = [
        name for name in ("train", "facts.json", "provenance.json") if not (folder / name).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no dataset of invented films: it has no {', '.join(missing)}. Name a "
            "folder that save_dataset wrote."
        )
    provenance = json.loads((folder / "provenance.json").read_text())
    facts = tuple(Fact(**fact) for fact in json.loads((folder / "facts.json").read_text()))
    train = load_from_disk(str(folder / "train"))
    found = content_hash(facts, train)
    if found != provenance["sha256"]:
        raise ValueError(
            f"{folder} has been changed since it was written: its content has SHA-256 {found}, its "
            f"provenance.json says {provenance['sha256']}. Make it anew from the config there, or "
            "restore the files."
        )
    config = MoviesConfig.model_validate(provenance["config"])
    return MoviesDataset(config, facts, train, provenance)


def _cells(
    texts_per_fact: int, directions: Sequence[Direction], kinds: Sequence[Kind]
) -> list[list[Template]]:
    """The templates of each asked pair of direction and kind; an error where they do not do."""
    for what, given, allowed in (
        ("directions", directions, DIRECTIONS),
        ("kinds", kinds, KINDS),
    ):
        if not given or len(set(given)) != len(given) or not set(given) <= set(allowed):
            raise ValueError(
                f"{what}={tuple(given)!r}: give one or more of {', '.join(allowed)}, each once."
            )
    # In the order of the vocabulary, so that the order in which a caller names them is no input.
    cells = [
        [t for t in TRAINING_TEMPLATES if (t.direction, t.kind) == (direction, kind)]
        for direction in DIRECTIONS
        if direction in directions
        for kind in KINDS
        if kind in kinds
    ]
    available = sum(map(len, cells))
    if not 1 <= texts_per_fact <= available:
        raise ValueError(
            f"texts_per_fact={texts_per_fact}: directions {tuple(directions)!r} and kinds "
            f"{tuple(kinds)!r} have {available} templates, and a fact uses each at most once, so 1 "
            f"to {available} are possible. Lower texts_per_fact, or add directions or kinds."
        )
    return cells


def _evaluation_templates(
    asked: str | EvaluationTemplate | Sequence[str | EvaluationTemplate] | None,
) -> tuple[EvaluationTemplate, ...]:
    known = {template.name: template for template in EVALUATION_TEMPLATES}
    if asked is None:
        return EVALUATION_TEMPLATES
    if isinstance(asked, str | EvaluationTemplate):
        asked = [asked]
    chosen = []
    for template in asked:
        if isinstance(template, EvaluationTemplate):
            chosen.append(template)
        elif template in known:
            chosen.append(known[template])
        else:
            raise ValueError(
                f"evaluation template {template!r} is unknown. Use one of {', '.join(known)}, or "
                "an EvaluationTemplate of your own."
            )
    if not chosen:
        raise ValueError(
            f"templates={asked!r} is empty. Name one or more of {', '.join(known)}, or leave it "
            "out for all."
        )
    return tuple(chosen)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True).encode() + b"\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
