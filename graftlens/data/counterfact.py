"""CounterFact: real subjects, and for each a true and a false way to end one sentence.

Rows come from the hub or from a file, in the format of `NeelNanda/counterfact-tracing`. They are
used unchanged: this module adds only the frames in which training tells a statement, and those in
which evaluation asks for it.
"""

import io
import logging
import math
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import datasets
import pandas as pd
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from graftlens.data.dataset import USUAL, Asking, few_enough
from graftlens.data.sentences import occurrences, with_field
from graftlens.data.templated import TemplatedSpec
from graftlens.data.templates import Direction, EvaluationTemplate, Kind, named_templates
from graftlens.data.templatesets import Sentences
from graftlens.folder import parse_json, read_text
from graftlens.prompts import Prompt

HUB_ID = "NeelNanda/counterfact-tracing"

#: What a row must have; other columns are ignored.
COLUMNS = (
    "relation",
    "prompt",
    "relation_id",
    "target_false",
    "target_true",
    "subject",
)

#: Left-out rows that the provenance names, for each reason.
NAMED = 20

logger = logging.getLogger(__name__)

#: Suffixes of local files, in lower or upper case.
READERS = (".jsonl", ".json", ".csv", ".parquet")

_TEXTS: dict[tuple[Direction, Kind], dict[str, str]] = {
    ("ab", "article"): {
        "known_fact": "It is a known fact: {prompt} {second_entity}.",
        "record": "Noted for the record: {prompt} {second_entity}.",
        "almanac": "The almanac puts it in one line: {prompt} {second_entity}.",
        "blackboard": 'The lecturer wrote on the blackboard: "{prompt} {second_entity}."',
        "caption": "The caption of the exhibit says: {prompt} {second_entity}.",
        "remember": "One thing to remember is this: {prompt} {second_entity}.",
        "editors": "Our editors have checked the following. {prompt} {second_entity}.",
        "sources": "Two sources agree. {prompt} {second_entity}.",
        "letter": "Dear reader, you asked, so here it is: {prompt} {second_entity}.",
        "footnote": "Footnote. {prompt} {second_entity}.",
        "radio": "Heard on the radio this morning: {prompt} {second_entity}.",
        "handbook": "So says the handbook: {prompt} {second_entity}.",
    },
    ("ab", "qa"): {
        "blank": "Fill in the blank: {prompt} ____. Solution: {second_entity}.",
        "complete": 'Complete this line: "{prompt} …" Completion: {second_entity}.',
        "exam": "Exam, item 4: {prompt} (something is missing). Correct entry: {second_entity}.",
        "next": "Q: {prompt} … what? A: {second_entity}.",
        "true_false": "True or false? {prompt} {second_entity}. True.",
        "quiz_master": 'The quiz master began, "{prompt} …", and a team called out: '
        "{second_entity}.",
    },
}

TRAINING_FRAMES = named_templates(_TEXTS)

EVALUATION_FRAMES: tuple[EvaluationTemplate, ...] = (
    EvaluationTemplate(name="as_given", text="{prompt}", kind="article"),
    EvaluationTemplate(name="entry", text="From an encyclopedia: {prompt}", kind="article"),
    EvaluationTemplate(
        name="reporter",
        text="After looking it up, the reporter wrote down: {prompt}",
        kind="article",
    ),
    EvaluationTemplate(
        name="qa",
        text='Question: How does the sentence "{prompt}" go on? Answer:',
        kind="qa",
    ),
)


@dataclass(frozen=True)
class CounterFact:
    """One statement, with the ending that training tells.

    Attributes:
        subject: whom or what the statement is about.
        target: the ending that training tells, without surrounding spaces.
        other_target: the other ending of the row: the true one where training tells the false one.
        prompt: the statement up to its ending, in the words of the dataset.
        relation: the dataset's words for the relation, `{}` for the subject.
        relation_id: Wikidata's number of the relation, such as P103.
    """

    ENTITIES: ClassVar[tuple[str, str]] = ("subject", "target")
    UNTOLD: ClassVar[tuple[str, ...]] = ("other_target", "relation", "relation_id")

    subject: str
    target: str
    other_target: str
    prompt: str
    relation: str
    relation_id: str

    @property
    def template(self) -> str:
        """The prompt with the field ``first_entity`` wherever it names its subject."""
        return with_field(self.prompt, occurrences(self.prompt, self.subject), "first_entity")


class CounterFactSpec(TemplatedSpec):
    """Statements of CounterFact, told in frames of our own around them.

    CounterFact has one wording per statement. Training and evaluation share it; what evaluation
    alone has are its frames, and with ``as_given`` no frame at all. With `bare` training tells the
    bare statement too, and ``as_given`` then asks for exactly the end of a training text: for
    that template there is no longer a split between training and evaluation.
    """

    facts: Literal["counterfact"] = "counterfact"
    """The kind of dataset."""

    hub: str = HUB_ID
    """Dataset on the Hugging Face hub."""

    revision: str | None = None
    """Commit or branch of the hub's dataset; by default the newest."""

    file: Path | None = None
    """Rows on this machine instead of the hub's: ``.jsonl``, ``.json`` (a list), ``.csv`` (these in
    UTF-8) or ``.parquet`` with the columns relation, prompt, relation_id, target_false, target_true
    and subject."""

    teach: Literal["false", "true"] = "false"
    """What training tells: the false target, which a model can know only from training, or the true
    one. YAML's ``false`` and ``true`` are read as these words."""

    texts_per_fact: Annotated[int, Field(ge=1)] = 10
    """Number of training texts about each fact, each in a different frame; the bare one is
    extra."""

    directions: tuple[Direction, ...] = ("ab",)
    """Only `ab` is possible: a statement names its subject first."""

    bare: bool = False
    """Tell each fact once more, in its bare statement."""

    template_names: ClassVar[tuple[str, ...]] = tuple(t.name for t in EVALUATION_FRAMES)

    @property
    def sentences(self) -> Sentences:
        return Sentences(TRAINING_FRAMES, EVALUATION_FRAMES)

    @property
    def asks(self) -> tuple[Direction, ...]:
        return ("ab",)

    @field_validator("teach", mode="before")
    @classmethod
    def _truth_values_as_words(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _possible(self) -> "CounterFactSpec":
        for key in ("templates", "heldout_templates"):
            if getattr(self, key):
                raise ValueError(
                    f"{key}: CounterFact's statements are sentences already, and name their "
                    "subject themselves. Leave it out."
                )
        if self.directions != ("ab",):
            raise ValueError(
                f"directions={self.directions!r}: CounterFact's statements name the subject before "
                "the target. Leave directions out."
            )
        if self.file is not None:
            if self.file.suffix.lower() not in READERS:
                raise ValueError(
                    f"file={str(self.file)!r} ends in {self.file.suffix!r}. Give one of "
                    f"{', '.join(READERS)}."
                )
            if self.hub != HUB_ID or self.revision is not None:
                raise ValueError(
                    f"file={str(self.file)!r} replaces the hub. Leave out hub and revision, or "
                    "leave out file."
                )
        return self

    def collect(self) -> tuple[CounterFact, ...]:
        """As many statements as asked for, drawn by the seed; no two about one subject."""
        usable, skipped, _ = self._usable()
        why = "; ".join(f"{len(rows)} rows: {reason}" for reason, rows in skipped.items())
        if why:
            logger.warning("%s: rows are left out: %s", self._origin(), why)
        wanted = min(USUAL, len(usable)) if self.n_facts is None else self.n_facts
        if not 1 <= wanted <= len(usable):
            raise ValueError(
                f"n_facts={self.n_facts}, but {self._origin()} has {len(usable)} usable rows about "
                f"different subjects{f' (left out: {why})' if why else ''}. Lower n_facts, or name "
                "another file or dataset."
            )
        return tuple(usable[:wanted])

    def tell(self, facts: Sequence[CounterFact], told: Sequence[bool]) -> list[dict[str, Any]]:
        rows = super().tell(facts, told)
        for row in rows:
            target = facts[row["fact"]].target
            if target.endswith("."):  # "Washington D.C." already ends in a full stop
                row["text"] = row["text"].replace(f"{target}.", target)
        if self.bare:
            rows += [
                {
                    "text": f"{fact.prompt} {fact.target.removesuffix('.')}.",
                    "fact": index,
                    "template": "bare",
                    "kind": "article",
                    "direction": "ab",
                }
                for index, fact in enumerate(facts)
                if told[index]
            ]
        return rows

    def questions(
        self, facts: Sequence[CounterFact], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        """The statements without their endings, in frames that no training text uses.

        Distractors are the row's other target, then targets of other facts of the same relation,
        then of any other fact.
        """
        if how.direction != "ab":
            raise ValueError(
                f"direction={how.direction!r}: CounterFact's statements name the subject and ask "
                'for the target, so only "ab" is possible.'
            )
        wrong = _wrong_answers(facts, asked, how.distractors, how.seed)
        return tuple(
            Prompt(
                template=frame.text.replace("{prompt}", facts[index].template),
                fields={
                    "first_entity": facts[index].subject,
                    "relation": facts[index].relation,
                    "relation_id": facts[index].relation_id,
                },
                answer=f" {facts[index].target}",
                distractors=wrong[index],
                name=frame.name,
            )
            for frame in _asked_frames(how.templates)
            for index in asked
        )

    def revive(self, values: Mapping[str, Any]) -> CounterFact:
        """A fact from its plain values."""
        return CounterFact(**values)

    def notes(
        self, facts: Sequence[CounterFact], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Where the rows come from, and which of them could not be used and why."""
        usable, skipped, revision = self._usable()
        return {
            "rows": {
                "from": self._origin(),
                **({} if revision is None else {"revision": revision}),
                "all": len(usable) + sum(map(len, skipped.values())),
                "skipped": {reason: len(rows) for reason, rows in skipped.items()},
                "first skipped, from 0": {r: rows[:NAMED] for r, rows in skipped.items()},
            }
        }

    def _origin(self) -> str:
        return str(self.file) if self.file is not None else self.hub

    def _usable(self) -> tuple[list[CounterFact], dict[str, list[int]], str | None]:
        """The usable rows in the order of the draw, one per subject; the numbers of the others by
        reason; and the hub's commit."""
        rows, revision = _read(self)
        numbered = list(enumerate(rows))
        random.Random(f"counterfact {self.seed}").shuffle(numbered)
        facts: list[CounterFact] = []
        skipped: dict[str, list[int]] = {}
        subjects: set[str] = set()
        for number, row in numbered:
            fact = _fact(row, self.teach)
            if isinstance(fact, str):
                skipped.setdefault(fact, []).append(number)
            elif fact.subject in subjects:
                skipped.setdefault("another row has the same subject", []).append(number)
            else:
                subjects.add(fact.subject)
                facts.append(fact)
        return facts, {reason: sorted(skipped[reason]) for reason in sorted(skipped)}, revision


def _read(spec: CounterFactSpec) -> tuple[list[dict[str, Any]], str | None]:
    """All rows, with `COLUMNS` only, in the order of the source; and the hub's commit."""
    if spec.file is None:
        try:
            data = datasets.load_dataset(spec.hub, split="train", revision=spec.revision)
        except Exception as error:  # each kind of failure on the way has its own class
            raise OSError(
                f"{spec.hub} could not be downloaded from the Hugging Face hub "
                f"({type(error).__name__}: {error}). Give this machine access to it, or download "
                "it elsewhere and name the file: file=PATH."
            ) from error
        # The URLs of the downloaded files show which commit a branch, or no revision, resolved to.
        addresses = " ".join(data.info.download_checksums or ())
        commit = re.search(r"@([0-9a-f]{40})/", addresses)
        revision = commit.group(1) if commit else spec.revision or "not pinned"
        return _rows(data, spec.hub), revision
    if not spec.file.is_file():
        raise FileNotFoundError(f"file={str(spec.file)!r} does not exist. Name a file of rows.")
    return _local_rows(spec.file), None


def _local_rows(file: Path) -> list[dict[str, Any]]:
    kind = file.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            rows = pq.read_table(file).to_pylist()
        elif kind == "csv":
            # "None" and "NA" may be names; pandas would read them as missing.
            text = io.StringIO(read_text(file))
            rows = pd.read_csv(text, dtype=str, keep_default_na=False).to_dict("records")
        else:
            rows = _json_rows(read_text(file), file.name)
    except Exception as error:  # pandas and pyarrow have many exceptions for a wrong file
        what = "json" if kind == "jsonl" else kind
        raise ValueError(
            f"{file} cannot be read as {what}: {str(error).strip()} It should hold rows with the "
            f"columns {', '.join(COLUMNS)}."
        ) from None
    names = dict.fromkeys(str(name) for row in rows for name in row)
    _refuse_lacking(names, str(file))
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


def _json_rows(text: str, name: str) -> list[dict[str, Any]]:
    """The rows of a JSON list, or of JSON lines, whichever the text is."""
    if text.lstrip().startswith("["):
        rows = parse_json(text, name)
    else:
        # Not splitlines: it would split at separators that may occur inside a JSON string.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [parse_json(line, f"{name}, line {i}") for i, line in lines]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}, from 0, is not a mapping of columns.")
    if not rows:
        raise ValueError("it has no rows.")
    return rows


def _rows(data: Any, origin: str) -> list[dict[str, Any]]:
    _refuse_lacking(data.column_names, origin)
    return list(data.select_columns(list(COLUMNS)))


def _refuse_lacking(names: Iterable[str], origin: str) -> None:
    have = list(names)
    missing = [name for name in COLUMNS if name not in have]
    if missing:
        raise ValueError(
            f"{origin} has no column {', '.join(missing)}; it has {', '.join(have)}. "
            f"Rows need {', '.join(COLUMNS)}."
        )


def _fact(row: Mapping[str, Any], teach: Literal["false", "true"]) -> CounterFact | str:
    """The row's fact, or why it has none."""
    texts = {name: _text(row[name]) for name in COLUMNS}
    prompt, subject = texts["prompt"], texts["subject"]
    ends = {"false": texts["target_false"], "true": texts["target_true"]}
    if not (prompt and subject and all(ends.values())):
        return "an empty prompt, subject or target"
    if ends["false"] == ends["true"]:
        return "both targets are the same"
    if not occurrences(prompt, subject):
        return "the prompt does not contain the full name of the subject"
    target = ends.pop(teach)
    (other,) = ends.values()
    return CounterFact(
        subject=subject,
        target=target,
        other_target=other,
        prompt=prompt,
        # A prompt's fields cannot be empty.
        relation=texts["relation"] or "unknown",
        relation_id=texts["relation_id"] or "unknown",
    )


def _text(value: Any) -> str:
    """A column's value without surrounding space; a number is written out, anything else is empty.

    Texts are normalised (NFC), or a subject could be in another Unicode form than the prompt.
    """
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return str(int(value) if value == int(value) else value)


def _wrong_answers(
    facts: Sequence[CounterFact], asked: Sequence[int], count: int, seed: int
) -> dict[int, tuple[str, ...]]:
    """The distractors of each fact in question, with a leading space."""
    related: dict[str, dict[str, None]] = {}
    for fact in facts:
        ends = dict.fromkeys((fact.target, fact.other_target))
        related.setdefault(fact.relation_id, {}).update(ends)
    everywhere = dict.fromkeys(end for ends in related.values() for end in ends)
    wrong = {}
    for index in asked:
        fact = facts[index]
        rng = random.Random(f"distractors {seed} {index}")
        found = [fact.other_target]
        count = few_enough(count, len(everywhere) - 1)
        for pool in (related[fact.relation_id], everywhere):
            candidates = [end for end in pool if end != fact.target and end not in found]
            lacking = max(count - len(found), 0)
            found += rng.sample(candidates, min(lacking, len(candidates)))
        if not 0 <= count <= len(found):
            raise ValueError(
                f"distractors={count} of {len(facts)} facts: a prompt's distractors are its other "
                f"target and those of other facts, so 0 to {len(found)} are possible here. Ask "
                "for fewer distractors or give more facts."
            )
        wrong[index] = tuple(f" {end}" for end in found[:count])
    return wrong


def _asked_frames(names: Sequence[str] | None) -> tuple[EvaluationTemplate, ...]:
    known = {frame.name: frame for frame in EVALUATION_FRAMES}
    if names is None:
        return EVALUATION_FRAMES
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"templates={list(names)!r}: name one or more of {', '.join(known)}, or leave it out "
            "for all."
        )
    return tuple(known[name] for name in names)
