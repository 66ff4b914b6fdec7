"""Articles as written: a text, the facts that it tells, and prompts given with it."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from graftlens.configfile import ConfigError, settings_from
from graftlens.data.sentences import occurrences
from graftlens.data.settings import Settings
from graftlens.data.tables import table
from graftlens.folder import parse_json, read_text
from graftlens.prompts import OTHER_SPANS, Prompt

#: The shipped set: invented films, each with an article about it.
SHIPPED = "articles.jsonl"

ENTITIES = ("first_entity", "second_entity")


@dataclass(frozen=True)
class ArticlePrompt:
    """A prompt about a fact.

    Attributes:
        name: `sentence` or `article` where it is cut, by its context; else `given`.
        template: with `{first_entity}` wherever the text has the name.
        answer: what follows, with its space.
        fields: of the template, in addition to those of the fact.
    """

    name: str
    template: str
    answer: str
    fields: tuple[tuple[str, str], ...] = ()

    def about(self, article: str, fact: Mapping[str, str], wrong: Sequence[str] = ()) -> Prompt:
        """The prompt with its fields: the article's id, the fact's but the answer, and its own.

        Args:
            article: the article's id.
            fact: its fields.
            wrong: the prompt's distractors.
        """
        fields = {name: value for name, value in fact.items() if name != "second_entity"}
        return Prompt(
            template=self.template,
            fields={"article": article, **fields, **dict(self.fields)},
            answer=self.answer,
            distractors=tuple(wrong),
            name=self.name,
        )


class GivenPrompt(Settings):
    """A prompt that is written for an article instead of being cut from it."""

    template: str
    """Text with fields in braces, `{first_entity}` among them, up to where the answer would
    follow."""

    answer: str
    """What follows, with or without a space before it."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Fields of the template in addition to the fact's own (`first_entity` and others)."""

    fact: Annotated[int, Field(ge=0)] = 0
    """Which of the article's facts it asks for, counted from 0."""

    @property
    def made(self) -> ArticlePrompt:
        """The prompt as those that are cut are."""
        answer = self.answer if self.answer.startswith(" ") else f" {self.answer}"
        return ArticlePrompt("given", self.template, answer, tuple(self.fields.items()))


class Article(Settings):
    """A text and the facts that it tells."""

    id: str
    """Its name; all articles of a set have different names."""

    title: str = ""
    """Its title."""

    text: str
    """The whole text; a line break ends a paragraph."""

    facts: Annotated[tuple[dict[str, str], ...], Field(min_length=1)]
    """What it tells: `first_entity` and `second_entity`, written as in the text, and other fields
    for tables."""

    prompts: tuple[GivenPrompt, ...] = ()
    """Prompts to use. The facts without any get theirs from the article's sentences."""

    url: str | None = None
    """Where it comes from."""

    revision: int | None = None
    """Its version there."""

    licence: str | None = None
    """What may be done with it."""

    @field_validator("facts", mode="before")
    @classmethod
    def _numbers_as_texts(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not all(isinstance(f, Mapping) for f in value):
            return value
        return tuple(
            {k: str(v) if isinstance(v, int | float) else v for k, v in fact.items()}
            for fact in value
        )

    @field_validator("facts")
    @classmethod
    def _names_on_one_line(cls, value: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        return tuple(
            {k: " ".join(v.split()) if k in ENTITIES else v for k, v in fact.items()}
            for fact in value
        )

    @model_validator(mode="after")
    def _usable(self) -> "Article":
        pairs: list[tuple[str, str]] = []
        for number, fact in enumerate(self.facts):
            where = f"fact {number} of the article {self.id!r}"
            for name in ENTITIES:
                if not fact.get(name):
                    raise ValueError(f"{where} has no {name}. Write the name as in the text.")
            pair = (fact["first_entity"], fact["second_entity"])
            if pair in pairs:
                raise ValueError(
                    f"{where} repeats fact {pairs.index(pair)}: {' and '.join(pair)}. List it once."
                )
            pairs.append(pair)
            _check_fields(where, fact)
        for number, prompt in enumerate(self.prompts):
            where = f"prompt {number} of the article {self.id!r}"
            if prompt.fact >= len(self.facts):
                raise ValueError(
                    f"{where} asks for fact {prompt.fact}, but it has {len(self.facts)}, counted "
                    "from 0."
                )
            if "second_entity" in prompt.fields or "{second_entity}" in prompt.template:
                raise ValueError(
                    f"{where} has a field second_entity, which is what prompts ask for. Leave it "
                    "out."
                )
            if "first_entity" in prompt.fields:
                raise ValueError(
                    f"{where} has a field first_entity, but that is its fact's. Leave it out."
                )
            _check_fields(where, prompt.fields)
            if not prompt.answer.strip():
                raise ValueError(
                    f"{where}: answer={prompt.answer!r}: write a text that is not empty. Here an "
                    "answer names something, and a space is added in front."
                )
            try:
                made = prompt.made.about(self.id, self.facts[prompt.fact])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if "first_entity" not in made.char_spans:
                raise ValueError(
                    f"{where}, {prompt.template!r}, lacks the field {{first_entity}}, where grafts "
                    "are set. Write it where the prompt names the first entity."
                )
            if made.text != made.text.rstrip():
                raise ValueError(
                    f"{where}, {prompt.template!r}, ends in white space. Leave that out: the "
                    "answer begins with a space."
                )
            if occurrences(made.text, prompt.answer):
                raise ValueError(
                    f"{where}, {prompt.template!r}, contains its answer {prompt.answer!r}. Leave "
                    "the answer out."
                )
        return self


def _check_fields(where: str, fields: Mapping[str, str]) -> None:
    for name, value in fields.items():
        if not name.isidentifier() or name in (*OTHER_SPANS, "article"):
            raise ValueError(
                f"{where} has a field {name!r}. Give it another name, of letters, digits and _, "
                f"and none of: article {' '.join(OTHER_SPANS)}."
            )
        if not value.strip():
            raise ValueError(f"{where} has an empty field {name!r}. Fill it in, or leave it out.")


def read_articles(path: Path | None) -> tuple[Article, ...]:
    """The articles of a file or folder; of the shipped set if none is named.

    Raises:
        FileNotFoundError: nothing exists there.
        ConfigError: an article that is not written as it should be; each is named.
    """
    return parsed(stored(path))


@dataclass(frozen=True)
class Stored:
    """An article as it is in its files.

    Attributes:
        where: what messages call it.
        values: JSON.
        text: the content of a file next to it, if the text has a file of its own.
        id: its id, unless `values` has another.
    """

    where: str
    values: str
    text: str | None = None
    id: str | None = None


def stored(path: Path | None) -> tuple[Stored, ...]:
    """What a file or folder holds; `read_articles` says what is refused."""
    if path is None:
        return _lines(table(SHIPPED), SHIPPED)
    if path.is_dir():
        raw = _folder(path)
    elif not path.is_file():
        raise FileNotFoundError(
            f"path={str(path)!r} does not exist. Name a .jsonl file or a folder of articles."
        )
    elif path.suffix.lower() == ".jsonl":
        raw = _lines(read_text(path), path.name)
    else:
        raise ValueError(
            f"path={str(path)!r} ends in {path.suffix!r}. Name a .jsonl file, or a folder of "
            ".txt and .json files."
        )
    if not raw:
        raise ValueError(f"{path} holds no article. Put NAME.txt and NAME.json into it.")
    return raw


def _lines(text: str, origin: str) -> tuple[Stored, ...]:
    return tuple(
        Stored(f"{origin}, line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _folder(folder: Path) -> tuple[Stored, ...]:
    raw: list[Stored] = []
    parts: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        kind = path.suffix.lower()
        if kind in (".txt", ".json"):
            other = parts.setdefault(path.stem, {}).setdefault(kind, path)
            if other != path:
                raise ValueError(
                    f"{folder} has {other.name} and {path.name}. Keep one of them, or rename one."
                )
    for stem, files in sorted(parts.items()):
        rest, text = files.get(".json"), files.get(".txt")
        if rest is None:
            raise FileNotFoundError(
                f"{text} has no {stem}.json beside it. Write its facts there: "
                '{"facts": [{"first_entity": "…", "second_entity": "…"}]}.'
            )
        beside = None if text is None else read_text(text)
        raw.append(Stored(rest.name, read_text(rest), beside, stem))
    return tuple(raw)


@lru_cache(maxsize=4)
def parsed(raw: tuple[Stored, ...]) -> tuple[Article, ...]:
    problems: list[tuple[str, str]] = []
    articles: list[Article] = []
    for one in raw:
        values = _json(one.values, one.where)
        if isinstance(values, dict) and one.id is not None:
            values = {"id": one.id, **values}
        if isinstance(values, dict) and one.text is not None:
            if "text" in values:
                problems.append(
                    (one.where, "it has a text, and there is also a .txt file. Keep one of them.")
                )
                continue
            values["text"] = one.text
        if isinstance(values, dict) and values.get("facts") == []:
            problems.append(
                (
                    one.where,
                    f"no facts yet: write them into {one.where}, such as "
                    '[{"first_entity": "…", "second_entity": "…"}], each name as in the text.',
                )
            )
            continue
        try:
            articles.append(settings_from(Article, _plain(values)))
        except ConfigError as error:
            problems += error.under(one.where, ": ").problems
    names = Counter(article.id for article in articles)
    problems += [
        ("", f"{count} articles have the id {name!r}. Give each its own.")
        for name, count in names.items()
        if count > 1
    ]
    if problems:
        raise ConfigError(*problems)
    return tuple(articles)


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text, where)
    except ValueError as error:
        raise ValueError(f"{error} Fix it.") from None


def _plain(value: Any) -> Any:
    """Texts in one Unicode form and with plain spaces, so that names can be found in them."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).replace("\u00a0", " ").replace("\r\n", "\n")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
