"""Where a sweep's prompts come from: datasets of facts, prompts of your own, files."""

import contextlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from graftlens.chat import REASONING, Conversation, contents, doubled
from graftlens.components import brief, check_name, suggest
from graftlens.configfile import ConfigError, gather, read_yaml, settings_from
from graftlens.data import (
    MAX_FACTS,
    AnyDataset,
    Direction,
    FactDataset,
    MoviesConfig,
    load_dataset,
    make_dataset,
)
from graftlens.data.dataset import USUAL_DISTRACTORS, Which
from graftlens.data.rows import read_rows
from graftlens.data.settings import Settings
from graftlens.data.templated import TemplatedSpec
from graftlens.data.templates import EvaluationTemplate, serving
from graftlens.data.templatesets import Templates
from graftlens.folder import at_home, parse_json, read_text
from graftlens.prompts import Prompt


class Section(Settings):
    """A section of a sweep's config."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Movies(Section):
    """The facts of a dataset of invented films, as `MoviesConfig` makes them."""

    n_facts: Annotated[int, Field(ge=1, le=MAX_FACTS)] = 200
    """Number of films."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the facts."""


class ChatFormat(Section):
    """How a dataset's prompts are asked in a conversation: each is what the user says."""

    system: str | None = None
    """What the system says before; left out: nothing but what the chat template writes."""

    prefill: str | None = None
    """How the assistant's answer begins. Without it, answers begin without a space."""

    template_options: Mapping[str, Any] = {}
    """What else the chat template reads, such as `{enable_thinking: false}`."""

    def asked(self, prompt: Prompt) -> Prompt:
        """The prompt as a conversation, with the same fields, answer and name.

        Raises:
            ValueError: it is one already.
        """
        if prompt.conversation is not None:
            raise ValueError(
                f"chat: the prompts {prompt.name!r} are conversations already. Leave chat out."
            )

        def written(text: str) -> str:
            return doubled(text) if prompt.fields else text

        def follows(text: str) -> str:
            return text if self.prefill is not None else text.lstrip(" ")

        messages = [{"role": "user", "content": prompt.template if prompt.fields else prompt.text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": written(self.system)})

        return Prompt.chat(
            messages,
            fields=prompt.fields,
            answer=None if prompt.answer is None else follows(prompt.answer),
            prefill=None if self.prefill is None else written(self.prefill),
            template_options=self.template_options,
            distractors=[follows(text) for text in prompt.distractors],
            answers=[follows(text) for text in prompt.answers],
            name=prompt.name,
        )


class Questions(Section):
    """Which prompts to ask about a dataset's facts."""

    direction: Direction = "ab"
    """`ab` names the first entity and asks for the second, `ba` the reverse."""

    facts: Which = "told"
    """Ask about the facts that the training texts tell (`told`), the others (`untold`), or
    `all`."""

    templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Evaluation templates, by name; by default all that fit the direction, or in a sweep those
    that it names for all its datasets."""

    sentences: Templates | None = None
    """Sentences of your own that ask, besides those that `templates` names: a YAML file with the
    key `ask`, or its content; see `graftlens.data.templatesets`."""

    distractors: Annotated[int, Field(ge=0)] = USUAL_DISTRACTORS
    """Wrong answers per prompt: other facts' answers, drawn with the seed; of the usual 4, as
    many as there are."""

    chat: ChatFormat | None = None
    """Ask in conversations; left out, the prompts are plain texts."""

    name: str | None = None
    """The name of these prompts in tables; by default the dataset's name and what is asked."""

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str | None) -> str | None:
        return check_name(name, "the name of a set of prompts") if name else name

    def titled(self, dataset: str) -> str:
        """The name in tables of these prompts about a dataset."""
        asked = [
            self.direction if self.direction != "ab" else "",
            self.facts if self.facts != "told" else "",
            "chat" if self.chat is not None else "",
        ]
        return self.name or " ".join(filter(None, [dataset, *asked]))


class FactsOf(Section):
    """A dataset of facts: one of `movies`, `make` and `path`."""

    movies: Movies | None = None
    """Invented films, made from their number and seed."""

    make: AnyDataset | None = None
    """A dataset of any kind, made here: the keys of a config of `graftlens data make`."""

    path: str | None = None
    """A folder written by `graftlens.data.save_dataset` or `graftlens data make`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "FactsOf":
        given = [n for n in ("movies", "make", "path") if getattr(self, n) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are" if given else "none of movies, make and path is"
            raise ValueError(f"{what} given. Give exactly one of movies, make and path.")
        return self

    def may_name_templates(self) -> bool:
        """Whether the facts may have templates that are not shipped: their names are known once the
        dataset is made."""
        own = ("templates", "heldout_templates")
        return self.path is not None or any(getattr(self.make, key, None) for key in own)

    def called(self) -> str:
        """What the dataset is called: "movies seed 0", its kind and seed, or its folder's name."""
        if self.movies:
            return f"movies seed {self.movies.seed}"
        if self.make:
            return f"{self.make.facts} seed {self.make.seed}"
        return Path(str(self.path)).name

    def dataset(self) -> FactDataset:
        """The facts; ValueError or OSError if they could not be obtained."""
        if self.path is not None:
            return load_dataset(at_home(self.path))
        if self.make is not None:
            # A supplement has no prompts, and might have to be downloaded.
            return make_dataset(self.make.model_copy(update={"supplement": None}))
        assert self.movies is not None
        # The texts are not needed: one per fact shows that it is told.
        return make_dataset(
            MoviesConfig(n_facts=self.movies.n_facts, seed=self.movies.seed, texts_per_fact=1)
        )


class DatasetSection(Questions, FactsOf):
    """Prompts about the facts of a dataset: give `movies`, `make` or `path`."""

    @property
    def title(self) -> str:
        """The prompts' name in tables."""
        return self.titled(self.called())

    def prompts(self, templates: Sequence[str] | None, seed: int) -> tuple[Prompt, ...]:
        """The prompts, template by template; ValueError or OSError if they could not be
        obtained."""
        found = self.dataset()
        asked = found.ask(
            self._asked(found, self.templates or templates),
            direction=self.direction,
            distractors=self.distractors,
            seed=seed,
            facts=self.facts,
        )
        return asked if self.chat is None else tuple(map(self.chat.asked, asked))

    def trained(self, templates: Sequence[str] | None, seed: int) -> tuple[Prompt, ...]:
        """Prompts for the facts that the training texts tell, asked in the same way; none where
        they tell none."""
        told = self.model_copy(update={"facts": "told", "distractors": 0, "chat": None})
        try:
            return told.prompts(templates, seed)
        except ValueError:
            return ()

    def _asked(
        self, found: FactDataset, names: Sequence[str] | None
    ) -> Sequence[str | EvaluationTemplate] | None:
        """The templates to ask with, own sentences last."""
        if self.sentences is None:
            return names
        spec = found.config
        if not isinstance(spec, TemplatedSpec):
            raise ValueError(
                f"sentences are for facts that templates tell, and the prompts of {spec.facts} are "
                "made otherwise. Leave it out."
            )
        try:
            own = spec.own_sentences(self.sentences, found.facts[0]).evaluation
        except ConfigError as error:
            raise ConfigError(
                *((w.replace("templates", "sentences", 1), what) for w, what in error.problems)
            ) from None
        fit = serving(own, self.direction)
        if not fit:
            raise ValueError(f"sentences: none asks in the direction {self.direction}.")
        return [*(names or ()), *fit]


class PromptSection(Section):
    """One prompt of your own, as `graftlens.Prompt` takes it."""

    template: str | None = None
    """Text with `{field}` placeholders; the fields' names are spans."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    """Instead of a template, a conversation, as `graftlens.Prompt.chat` takes it."""

    prefill: str | None = None
    """How the assistant's answer to the messages begins."""

    reasoning: str | None = None
    """What the assistant has thought before it answers the messages."""

    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of functions, for chat templates that write them."""

    template_options: Mapping[str, Any] = {}
    """What else the chat template reads, such as `{enable_thinking: false}`."""

    answer: str | None = None
    """The text that should follow, with its leading space where it has one. It may be left out
    where texts are generated (`outcomes`)."""

    fields: Mapping[str, str] = {}
    """The text of each field; where there is one, braces in messages are placeholders."""

    distractors: tuple[str, ...] = ()
    """Wrong answers to compare with, written like the answer."""

    name: str | None = None
    """The template's name in tables; `chat` for conversations without fields."""

    answers: tuple[str, ...] = ()
    """All correct texts, written like the answer, for answer_set_prob."""

    @model_validator(mode="after")
    def _makes_a_prompt(self) -> "PromptSection":
        if (self.template is None) == (self.messages is None):
            given = "neither is" if self.template is None else "both are"
            raise ValueError(f"{given} given. Give exactly one of template and messages.")
        if self.messages is None:
            for key in ("prefill", "reasoning", "tools", "template_options"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} is allowed only with messages. Leave it out, or give messages."
                    )
        self.prompt.text  # noqa: B018
        return self

    def answered(self) -> "PromptSection":
        """Itself, if it has an answer.

        Raises:
            ConfigError: it has none.
        """
        if self.answer is None:
            what = (
                "this key is missing. The text that should follow, with its leading space where it "
                "has one."
            )
            raise ConfigError(("answer", what))
        return self

    @property
    def prompt(self) -> Prompt:
        """The prompt as a value."""
        if self.messages is None:
            assert self.template is not None
            return Prompt(
                self.template, self.fields, self.answer, self.distractors, self.name, self.answers
            )
        return Prompt.chat(
            self.messages,
            fields=self.fields,
            answer=self.answer,
            prefill=self.prefill,
            reasoning=self.reasoning,
            tools=self.tools,
            template_options=self.template_options,
            distractors=self.distractors,
            name=self.name,
            answers=self.answers,
        )


class PromptFile(Section):
    """Prompts from a UTF-8 file: JSON lines (`.jsonl`), a JSON list (`.json`), or else a YAML list;
    keys as in the config."""

    file: str
    """The file, from the working directory."""

    def prompts(self, answered: bool = True) -> list[Prompt]:
        """Every prompt of the file; `answered` refuses those without an answer.

        Raises:
            ConfigError: every entry that is not a prompt.
            ValueError, OSError: a file that holds no prompts, or cannot be read.
        """
        path = at_home(self.file)
        text = read_text(path)
        kind = path.suffix.lower()
        if kind == ".jsonl":
            # Not splitlines: it would split at separators that may occur inside a JSON string.
            lines = [(f"line {i}", l) for i, l in enumerate(text.split("\n"), 1) if l.strip()]
            places = [place for place, _ in lines]
            entries = gather(partial(_entry, path.name), lines)
        else:
            entries = parse_json(text, path.name) if kind == ".json" else read_yaml(text) or []
            if not isinstance(entries, list):
                raise ValueError(
                    f"{path.name} holds a {type(entries).__name__}, not a list of prompts."
                )
            places = list(map(str, range(len(entries))))
        if not entries:
            raise ValueError(f"{path.name} does not hold a prompt.")
        named = zip(places, entries, strict=True)

        def read(entry: Any) -> PromptSection:
            section = settings_from(PromptSection, entry)
            return section.answered() if answered else section

        return [section.prompt for section in gather(read, named)]


class PromptColumn(Section):
    """Prompts from a column of a dataset: conversations, or texts."""

    dataset: str
    """A dataset's folder or file (`.jsonl`, `.json`, `.parquet`, `.csv`), or its hub id."""

    column: str = "messages"
    """The column: lists of messages (also as JSON), or texts. Keys without a value, by which
    datasets make rows alike, are left out of messages and tools."""

    split: str = "train"
    """Split of the dataset."""

    answer: str | None = None
    """The column of answers; left out: the last message, which has to be the assistant's. What it
    has thought before it answers (`reasoning_content`) is then part of the prompt."""

    prefill: str | None = None
    """The column of how the answer begins; its last message then has to begin so."""

    tools: str | None = None
    """The column of tools: lists of JSON schemas, or such a list as JSON."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Rows to take, drawn with the sweep's seed and in the dataset's order; left out: all."""

    template_options: Mapping[str, Any] = {}
    """What else the chat template reads."""

    name: str | None = None
    """The name of these prompts in tables; by default the dataset's name."""

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str | None) -> str | None:
        return check_name(name, "the name of a set of prompts") if name else name

    @property
    def title(self) -> str:
        """The prompts' name in tables."""
        return self.name or Path(self.dataset).name

    def prompts(self, seed: int, answered: bool = True) -> list[Prompt]:
        """A prompt for each row that is taken; without `answered`, a row need not have an answer,
        and a conversation that ends with a question has none.

        Raises:
            ValueError: a column that is missing, or a row that is not a prompt with an answer.
            OSError: a dataset that cannot be read.
        """
        rows = read_rows(self.dataset, self.split)
        for key in ("column", "answer", "prefill", "tools"):
            name = getattr(self, key)
            if name is not None and name not in rows.column_names:
                raise ValueError(
                    f"{key}={name!r} is not one of the columns of {self.dataset}: "
                    f"{', '.join(rows.column_names)}.{suggest(name, rows.column_names)}"
                )
        numbers: Sequence[int] = range(len(rows))
        if self.limit is not None and self.limit < len(rows):
            numbers = sorted(random.Random(f"prompts {seed}").sample(numbers, self.limit))
        if not len(numbers):
            raise ValueError(f"{self.dataset} has no row in the split {self.split}.")
        made = []
        for number in numbers:
            try:
                made.append(self._prompt(rows[number], answered))
            except ValueError as error:
                raise ValueError(f"{self.dataset}, row {number}: {error}") from None
        return made

    def _prompt(self, row: Mapping[str, Any], answered: bool) -> Prompt:
        found = {
            key: row[name] for key in ("answer", "prefill", "tools") if (name := getattr(self, key))
        }
        given, tools = _listed_in(row[self.column]), _listed_in(found.get("tools"))
        answer, prefill, reasoning = found.get("answer"), found.get("prefill") or None, None
        if isinstance(given, str):
            if answer is None and answered:
                raise ValueError("a text without an answer. Name the column of answers: answer.")
            if prefill or tools:
                raise ValueError("a text has no prefill or tools: they are for conversations.")
            return Prompt(doubled(given), {}, answer, name=self.title)
        Conversation.of(given)  # that says what is wrong with it
        if self.answer is None and (answered or given[-1].get("role") == "assistant"):
            *given, last = given
            answer, reasoning = _answer_of(last, prefill or "")
        if (answer is None and answered) or not given:
            raise ValueError("it has no question, or no answer. Leave the row out.")
        return Prompt.chat(
            given,
            answer=answer,
            prefill=prefill,
            reasoning=reasoning,
            tools=tools or None,
            template_options=self.template_options,
            name=self.title,
        )


def _listed_in(value: Any) -> Any:
    """What a cell holds, without keys that have no value; a list of mappings in JSON as one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            found = json.loads(value)
            if found and all(isinstance(item, Mapping) for item in found):
                return found
    return _valued(value)


def _valued(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _valued(inner) for key, inner in value.items() if inner is not None}
    return [_valued(inner) for inner in value] if isinstance(value, list) else value


def _answer_of(message: Mapping[str, Any], prefill: str) -> tuple[str, str | None]:
    """The answer that a conversation's last message gives, after the prefill, and its reasoning."""
    said = "" if message.get("tool_calls") else "".join(contents(message))
    if message["role"] != "assistant" or not said:
        raise ValueError(
            "the last message is not an answer of the assistant's in words. Name the column of "
            "answers: answer."
        )
    if not said.startswith(prefill) or said == prefill:
        raise ValueError(
            f"the last message, {brief(said)}, does not go on after the prefill {brief(prefill)}."
        )
    thought = next((message[key] for key in REASONING if message.get(key)), None)
    return said[len(prefill) :], thought


def _entry(file: str, line: str) -> Any:
    """A line of JSON lines; the message begins with the problem, as the caller puts the place
    before it."""
    try:
        return parse_json(line, "it")
    except ValueError as error:
        syntax = re.fullmatch(r"it is not JSON \((.*)\)\.", str(error))
        said = f"{syntax[1]}: this line is not JSON" if syntax else str(error).rstrip(".")
        raise ValueError(f"{said} ({file}).") from None


def listed(value: Any) -> Any:
    """A single section as a list of one."""
    return [value] if isinstance(value, dict | Settings) else value


def prompt_sections(value: Any, info: Any) -> Any:
    """The sections of a sweep's key `prompts`; ConfigError names each that is wrong."""
    kinds: dict[str, type[Section]] = {"file": PromptFile, "dataset": PromptColumn}
    return sections_by_key(value, kinds, PromptSection, info)


def sections_by_key(
    value: Any, kinds: Mapping[str, type[Section]], usual: type[Section], info: Any = None
) -> list[Section]:
    """The sections of a list; ConfigError names each that is wrong. Prompts need an answer, unless
    texts are generated.

    Args:
        value: what the config says.
        kinds: a key that a section has -> its kind.
        usual: the kind of sections that have none of these keys.
        info: pydantic's, with the fields before: whether there are `outcomes`.
    """
    answered = info is None or not info.data.get("outcomes")

    def section(entry: Any) -> Section:
        keys = entry if isinstance(entry, Mapping) else ()
        kind = next((kind for key, kind in kinds.items() if key in keys), usual)
        made = entry if isinstance(entry, Section) else settings_from(kind, entry)
        return made.answered() if answered and isinstance(made, PromptSection) else made

    given = listed(value)
    if not isinstance(given, list | tuple):
        raise ValueError(
            f"{value!r}: write a list of prompts, file: and the name of a file, or "
            "dataset: and the name of a dataset."
        )
    return gather(section, ((str(i), entry) for i, entry in enumerate(given)))
