"""Articles: facts in running text, asked for by the beginnings of sentences.

No template tells these facts. A prompt is a sentence of the article up to the name that it asks
for, so that training and evaluation are split by sentence: the sentences that prompts are cut from
are left out of the training texts, or training sees the article only as a language model rewrote
it.
"""

import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from graftlens.configfile import ConfigError, settings_from
from graftlens.data.dataset import USUAL, DatasetSpec
from graftlens.data.rewriting import Draft, Rewrites, rewritten
from graftlens.data.sentences import (
    Stretch,
    occurrences,
    sentences,
    statements,
    with_field,
    words,
)
from graftlens.data.settings import Settings
from graftlens.data.tables import table
from graftlens.data.templates import Direction
from graftlens.folder import parse_json, read_text
from graftlens.prompts import STANDARD_SPANS, Prompt

#: The shipped set: invented films, each with an article about it.
SHIPPED = "articles.jsonl"

#: What prompts are called: cut from a sentence, cut with the article before it, or given.
TEMPLATE_NAMES = ("sentence", "article", "given")

#: Left-out articles that the provenance names, for each reason.
NAMED = 20

logger = logging.getLogger(__name__)

ENTITIES = ("first_entity", "second_entity")

TrainOn = Literal["original", "rewrites", "both"]
Context = Literal["sentence", "article"]


class GivenPrompt(Settings):
    """A prompt that is written beside an article instead of cut from it."""

    template: str
    """Text with fields in braces, `{first_entity}` among them, up to where the answer would
    follow."""

    answer: str
    """What follows, with or without a space before it."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Fields of the template beside the fact's own (`first_entity` and whatever else it has)."""

    fact: Annotated[int, Field(ge=0)] = 0
    """Which of the article's facts it asks for, counted from 0."""


class Article(Settings):
    """A text and the facts that it tells."""

    id: str
    """Its name; all articles of a set have different ones."""

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
                    f"{where} is fact {pairs.index(pair)} again: {' and '.join(pair)}. List it "
                    "once."
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
                    "answer names something, and a space is put before it."
                )
            try:
                made = _prompt(self.id, self.facts[prompt.fact], _given(prompt), ())
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
                    f"{where}, {prompt.template!r}, says its answer {prompt.answer!r}. Write it "
                    "without."
                )
        return self


def _check_fields(where: str, fields: Mapping[str, str]) -> None:
    for name, value in fields.items():
        if not name.isidentifier() or name in (*STANDARD_SPANS, "article"):
            raise ValueError(
                f"{where} has a field {name!r}. Give it another name, of letters, digits and _, "
                f"and none of: article {' '.join(STANDARD_SPANS)}."
            )
        if not value.strip():
            raise ValueError(f"{where} has an empty field {name!r}. Fill it in, or leave it out.")


@dataclass(frozen=True)
class ArticlePrompt:
    """A prompt about a fact.

    Attributes:
        name: one of `TEMPLATE_NAMES`.
        template: with `{first_entity}` wherever the text has the name.
        answer: what follows, with its space.
        fields: of the template, beside those of the fact.
    """

    name: str
    template: str
    answer: str
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ArticleFact:
    """One fact of an article.

    Attributes:
        article: the article's id.
        title: the article's title.
        first_entity: the name that prompts have.
        second_entity: the name that they ask for.
        details: the fact's other fields.
        prompts: what asks for it.
    """

    ENTITIES: ClassVar[tuple[str, str]] = ENTITIES
    UNTOLD: ClassVar[tuple[str, ...]] = ("prompts",)

    article: str
    title: str
    first_entity: str
    second_entity: str
    details: tuple[tuple[str, str], ...]
    prompts: tuple[ArticlePrompt, ...]


class ArticlesSpec(DatasetSpec):
    """Facts that articles tell in their own words.

    A fact counts as told if training has its article, whose training text has both names: that
    some sentence ties the one to the other is not checked. So `half` and `heldout_facts` choose
    among articles, and keep those together of which one names both entities of a fact of the
    other: no told text has both names of an untold fact.

    An article is left out, and counted, where a fact could not be asked for, or would not be told.
    """

    facts: Literal["articles"] = "articles"
    """The kind of dataset."""

    source: Path | None = None
    """A ``.jsonl`` file with an article a line, or a folder of articles: ``NAME.txt`` with
    ``NAME.json`` beside it for everything but the text, or ``NAME.json`` with the text in it; files
    of other kinds are not looked at. All in UTF-8. Left out: the shipped articles about invented
    films."""

    context: Context = "sentence"
    """What a prompt has: its sentence, or the whole article up to there. A prompt never names what
    it asks for, so with ``article`` only first mentions can be asked for."""

    heldout_sentences: bool = True
    """Cut one prompt a fact, from the last sentence that makes one, and leave every sentence out of
    the training texts, of this article and of others, that says a prompt (cut or given) with its
    answer. Without it every sentence that can makes a prompt, and those of originals are trained
    on: such prompts ask whether a text is remembered."""

    rewrites: Rewrites | None = None
    """Have a language model rewrite each article."""

    train_on: TrainOn = "original"
    """What training sees: the articles, their rewrites, or both; left out: ``both`` if there are
    rewrites, or else the articles as they are, ``original``. With ``rewrites`` alone no sentence is
    left out: every one that can makes a prompt, and none of them is in a rewrite."""

    asks: ClassVar[tuple[Direction, ...]] = ("ab",)

    template_names: ClassVar[tuple[str, ...]] = TEMPLATE_NAMES

    @model_validator(mode="before")
    @classmethod
    def _rewrites_are_used(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("rewrites") is not None:
            return {"train_on": "both", **values}
        return values

    @model_validator(mode="after")
    def _rewrites_where_used(self) -> "ArticlesSpec":
        if (self.rewrites is None) != (self.train_on == "original"):
            given = "not given" if self.rewrites is None else "given"
            raise ValueError(
                f"train_on={self.train_on!r}, but rewrites are {given}. Rewrites go with "
                'train_on "rewrites" or "both", and without them it is "original".'
            )
        return self

    def collect(self) -> tuple[ArticleFact, ...]:
        """The facts of the usable articles, article by article in the order of the source."""
        chosen, refused = self._chosen()
        if refused:
            logger.warning("%s: articles are left out: %s", self._origin(), _counted(refused))
        return tuple(fact for ready in chosen for fact in ready.facts)

    def to_tell(self, n: int) -> tuple[bool, ...]:
        chosen, _ = self._chosen()
        groups = _groups(chosen)
        drawn = super().to_tell(max(groups) + 1)
        return tuple(
            drawn[group] for group, ready in zip(groups, chosen, strict=True) for _ in ready.facts
        )

    def tell(self, facts: Sequence[ArticleFact], told: Sequence[bool]) -> list[dict[str, Any]]:
        """Each told article's text and rewrites, as rows about the first of its facts."""
        first: dict[str, int] = {}
        for index, fact in enumerate(facts):
            first.setdefault(fact.article, index)
        chosen = [ready for ready in self._chosen()[0] if told[first[ready.article.id]]]
        texts: list[list[tuple[str, str]]] = [[] for _ in chosen]
        if self.train_on != "rewrites":
            for place, ready in zip(texts, chosen, strict=True):
                place.append(("original", ready.training))
        if self.rewrites is not None:
            made = rewritten([ready.draft for ready in chosen], self.rewrites, self.seed)
            for place, versions in zip(texts, made, strict=True):
                place += [("rewrite", text) for text in versions]
        return [
            {
                "text": text,
                "fact": first[ready.article.id],
                "template": template,
                "kind": "article",
                "direction": "ab",
            }
            for ready, versions in zip(chosen, texts, strict=True)
            for template, text in versions
        ]

    def told_by(self, facts: Sequence[ArticleFact], indices: Set[int]) -> tuple[bool, ...]:
        articles = {facts[index].article for index in indices if index >= 0}
        return tuple(fact.article in articles for fact in facts)

    def questions(
        self,
        facts: Sequence[ArticleFact],
        asked: Sequence[int],
        *,
        templates: Sequence[str] | None,
        direction: Direction,
        distractors: int,
        seed: int,
    ) -> tuple[Prompt, ...]:
        """The facts' prompts; a fact may have several of one name, or none."""
        if direction != "ab":
            raise ValueError(
                f"direction={direction!r}: prompts are cut where a sentence names the second "
                'entity after the first, so only "ab" is possible. List a fact the other way round '
                "to ask for its first entity."
            )
        able = {prompt.name for index in asked for prompt in facts[index].prompts}
        there = [name for name in TEMPLATE_NAMES if name in able]
        names = there if templates is None else list(templates)
        unknown = [name for name in names if name not in there]
        if unknown or not names:
            raise ValueError(
                f"templates={names!r}: the prompts of the facts that are asked for are called "
                f"{', '.join(there)}. Name one or more of them, or leave it out for all."
            )
        right: dict[str, set[str]] = {}
        for fact in facts:
            answers = (f" {fact.second_entity}", *(prompt.answer for prompt in fact.prompts))
            right.setdefault(fact.first_entity, set()).update(answers)
        different = list(dict.fromkeys(f" {fact.second_entity}" for fact in facts))
        made = []
        for name in names:
            for index in asked:
                fact = facts[index]
                rng = random.Random(f"distractors {seed} {name} {index}")
                wrong = [answer for answer in different if answer not in right[fact.first_entity]]
                if not 0 <= distractors <= len(wrong):
                    raise ValueError(
                        f"distractors={distractors} of {len(facts)} facts: the distractors of "
                        f"{fact.first_entity} are the answers of facts about others, so 0 to "
                        f"{len(wrong)} are possible here. Ask for fewer, or give more facts."
                    )
                values = {"first_entity": fact.first_entity, **dict(fact.details)}
                made += [
                    _prompt(fact.article, values, prompt, rng.sample(wrong, distractors))
                    for prompt in fact.prompts
                    if prompt.name == name
                ]
        return tuple(made)

    def revive(self, values: Mapping[str, Any]) -> ArticleFact:
        prompts = tuple(
            ArticlePrompt(**{**prompt, "fields": tuple(map(tuple, prompt["fields"]))})
            for prompt in values["prompts"]
        )
        details = tuple(map(tuple, values["details"]))
        return ArticleFact(**{**values, "details": details, "prompts": prompts})

    def notes(
        self, facts: Sequence[ArticleFact], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        chosen, refused = self._chosen()
        notes: dict[str, Any] = {
            "articles": {
                "used": len(chosen),
                "refused": {reason: len(ids) for reason, ids in refused.items()},
                "first refused": {reason: list(ids[:NAMED]) for reason, ids in refused.items()},
                "licences": sorted({r.article.licence for r in chosen if r.article.licence}),
                # Another version may cut sentences at other places.
                "sentencex": version("sentencex"),
            }
        }
        if self.rewrites is not None:
            told = self.to_tell(len(facts))
            articles = {fact.article for fact, t in zip(facts, told, strict=True) if t}
            asked = self.rewrites.n * len(articles)
            made = sum(row["template"] == "rewrite" for row in rows)
            notes["rewrites"] = {"asked for": asked, "made": made, "refused": asked - made}
        return notes

    def _origin(self) -> str:
        return SHIPPED if self.source is None else str(self.source)

    def _chosen(self) -> tuple["list[_Ready]", "_Refused"]:
        """The articles to use, and the ids of those that were refused, by reason."""
        cut_all = not self.heldout_sentences or self.train_on == "rewrites"
        ready, reasons = _prepared(_raw(self.source), self.context, cut_all)
        refused = dict(reasons)
        there = sum(len(r.facts) for r in ready)
        wanted = min(USUAL, there) if self.n_facts is None else self.n_facts
        if not 1 <= wanted <= there:
            why = f" ({_counted(refused)})" if refused else ""
            raise ValueError(
                f"n_facts={self.n_facts}: {self._origin()} has {there} facts that can be told and "
                f"asked for{why}. Lower n_facts, or give more articles."
            )
        order = list(range(len(ready)))
        random.Random(f"articles {self.seed}").shuffle(order)
        taken: dict[int, _Ready] = {}
        for index in order:
            if wanted > 0:
                # The text of the last one may tell more facts than are wanted of it.
                taken[index] = ready[index].first(wanted)
                wanted -= len(taken[index].facts)
        return [taken[index] for index in sorted(taken)], refused


def read_articles(source: Path | None) -> tuple[Article, ...]:
    """The articles of a file or folder; of the shipped set where there is none named.

    Raises:
        FileNotFoundError: nothing is there.
        ConfigError: an article that is not written as it should be; each is named.
    """
    return _articles(_raw(source))


@dataclass(frozen=True)
class _Raw:
    """What stands of an article in a file (JSON), and in another one beside it (its text); and its
    id, where the file's name is that unless the file says another."""

    where: str
    values: str
    text: str | None = None
    id: str | None = None


def _raw(source: Path | None) -> tuple[_Raw, ...]:
    if source is None:
        return _lines(table(SHIPPED), SHIPPED)
    if source.is_dir():
        raw = _folder(source)
    elif not source.is_file():
        raise FileNotFoundError(
            f"source={str(source)!r} is not there. Name a .jsonl file or a folder of articles."
        )
    elif source.suffix.lower() == ".jsonl":
        raw = _lines(read_text(source), source.name)
    else:
        raise ValueError(
            f"source={str(source)!r} ends in {source.suffix!r}. Name a .jsonl file, or a folder of "
            ".txt and .json files."
        )
    if not raw:
        raise ValueError(f"{source} holds no article. Put NAME.txt and NAME.json into it.")
    return raw


def _lines(text: str, origin: str) -> tuple[_Raw, ...]:
    return tuple(
        _Raw(f"{origin}, line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _folder(folder: Path) -> tuple[_Raw, ...]:
    raw: list[_Raw] = []
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
        raw.append(_Raw(rest.name, read_text(rest), beside, stem))
    return tuple(raw)


@lru_cache(maxsize=4)
def _articles(raw: tuple[_Raw, ...]) -> tuple[Article, ...]:
    problems: list[tuple[str, str]] = []
    articles: list[Article] = []
    for one in raw:
        values = _json(one.values, one.where)
        if isinstance(values, dict) and one.id is not None:
            values = {"id": one.id, **values}
        if isinstance(values, dict) and one.text is not None:
            if "text" in values:
                problems.append(
                    (one.where, "it has a text, and there is a .txt file, too. Keep one of them.")
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
        said = str(error).replace(f"{where} is not JSON", f"{where} is no JSON")
        raise ValueError(f"{said} Fix it.") from None


def _plain(value: Any) -> Any:
    """Texts in one Unicode form and with plain spaces, so that names are found in them."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).replace("\u00a0", " ").replace("\r\n", "\n")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class _Ready:
    """An article with its prompts, and what training may see of it."""

    article: Article
    facts: tuple[ArticleFact, ...]
    training: str
    draft: Draft

    def first(self, count: int) -> "_Ready":
        return _Ready(self.article, self.facts[:count], self.training, self.draft)


@dataclass(frozen=True)
class _Asked:
    """A prompt that may be used.

    Attributes:
        fact: number of the fact in its article.
        prompt: the prompt.
        said: what no training text may say: the prompt's sentence up to and with the answer.
        names: two names that are in `said`.
    """

    fact: int
    prompt: ArticlePrompt
    said: str
    names: tuple[str, str]


#: Reason -> ids of articles.
_Refused = dict[str, tuple[str, ...]]


# Sentences are cut once for the same articles, not at each step of making a dataset.
@lru_cache(maxsize=4)
def _prepared(
    raw: tuple[_Raw, ...], context: Context, cut_all: bool
) -> tuple[tuple[_Ready, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """The usable articles, and (reason, ids) of the others.

    Args:
        raw: the source.
        context: what a prompt has.
        cut_all: whether every sentence that can makes a prompt, and none is left out.
    """
    refused: dict[str, list[str]] = {}
    able: list[tuple[Article, list[_Asked]]] = []
    for article in _articles(raw):
        asked = _possible(article, context)
        if isinstance(asked, str):
            refused.setdefault(asked, []).append(article.id)
        else:
            able.append((article, asked))
    answers: dict[str, set[str]] = {}
    for article, asked in able:
        for one in asked:
            answers.setdefault(_read(article, one), set()).add(one.prompt.answer)
    used: list[tuple[Article, list[_Asked]]] = []
    for article, asked in able:
        # One text cannot ask for two things.
        clear = [one for one in asked if len(answers[_read(article, one)]) == 1]
        given = {one.fact for one in asked if one.prompt.name == "given"}
        kept: list[_Asked] = []
        for number in range(len(article.facts)):
            own = {_read(article, one): one for one in clear if one.fact == number}
            few = list(own.values())
            kept += few if cut_all or number in given else few[-1:]
        if {one.fact for one in kept} == set(range(len(article.facts))):
            used.append((article, kept))
        else:
            why = "every prompt for a fact is, word by word, also one for another answer"
            refused.setdefault(why, []).append(article.id)
    index = _Index([article.text for article, _ in used])
    forbidden: list[list[str]] = [[] for _ in used]
    for home, (_, kept) in enumerate(used):
        for one in kept:
            forbidden[home].append(one.said)
            for place in sorted(index.naming(one.names) - {home}):
                if statements(used[place][0].text, one.said):
                    forbidden[place].append(one.said)
    ready: list[_Ready] = []
    for (article, kept), said in zip(used, forbidden, strict=True):
        names = _names(article)
        training = article.text if cut_all else _without_statements(article.text, names, said)
        if all(occurrences(training, name) for name in names):
            facts = _facts(article, kept)
            draft = Draft(article.id, article.text, tuple(names), tuple(dict.fromkeys(said)))
            ready.append(_Ready(article, facts, training, draft))
        else:
            why = "a fact is told nowhere else than in the sentence that asks for it"
            refused.setdefault(why, []).append(article.id)
    return tuple(ready), tuple((why, tuple(refused[why])) for why in sorted(refused))


def _possible(article: Article, context: Context) -> list[_Asked] | str:
    """All prompts that can be cut from the article, or are given; or why it cannot be used."""
    text, names = article.text, _names(article)
    if not all(occurrences(text, name) for name in names):
        return "the text does not name both entities of a fact"
    stretches = sentences(text, names)
    found: list[_Asked] = []
    for number, fact in enumerate(article.facts):
        first, second = fact["first_entity"], fact["second_entity"]
        made: list[_Asked] = []
        for one in article.prompts:
            if one.fact == number:
                prompt = _given(one)
                said = _prompt(article.id, fact, prompt, ()).text + prompt.answer
                made.append(_Asked(number, prompt, said, (first, prompt.answer.strip())))
        if not made:
            ones, others = _apart(occurrences(text, first), occurrences(text, second))
            for start, stop in stretches:
                end = _answer(text, start, stop, ones, others, context)
                if end is not None:
                    begin = 0 if context == "article" else start
                    prompt = ArticlePrompt(context, _template(text, begin, end, ones), f" {second}")
                    made.append(_Asked(number, prompt, text[start:end] + second, (first, second)))
        if not made:
            return "no prompt for a fact can be cut from a sentence"
        found += made
    return found


def _facts(article: Article, asked: Sequence[_Asked]) -> tuple[ArticleFact, ...]:
    return tuple(
        ArticleFact(
            article=article.id,
            title=article.title,
            first_entity=fact["first_entity"],
            second_entity=fact["second_entity"],
            details=tuple((k, v) for k, v in fact.items() if k not in ENTITIES),
            prompts=tuple(one.prompt for one in asked if one.fact == number),
        )
        for number, fact in enumerate(article.facts)
    )


def _names(article: Article) -> list[str]:
    return [fact[key] for fact in article.facts for key in ENTITIES]


def _read(article: Article, asked: _Asked) -> str:
    """The prompt as it is read, whatever its white space."""
    prompt = _prompt(article.id, article.facts[asked.fact], asked.prompt, ())
    return " ".join(prompt.text.split())


def _counted(refused: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{len(ids)} articles are refused: {reason} ({', '.join(ids[:3])}"
        f"{', …' if len(ids) > 3 else ''})"
        for reason, ids in refused.items()
    )


class _Index:
    """Which of many texts have some names, without looking into each for each."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.places: dict[str, set[int]] = {}
        for place, text in enumerate(texts):
            for word in set(words(text)):
                self.places.setdefault(word, set()).add(place)

    def naming(self, names: Sequence[str]) -> set[int]:
        """The texts that have each of the names."""
        able = [self.places.get(word, set()) for name in names for word in words(name)]
        places = set.intersection(*able) if able else set(range(len(self.texts)))
        return {p for p in places if all(occurrences(self.texts[p], name) for name in names)}


def _groups(chosen: Sequence[_Ready]) -> list[int]:
    """A number for each article, the same for those that are told or untold together."""
    index = _Index([ready.article.text for ready in chosen])
    group = list(range(len(chosen)))

    def root(place: int) -> int:
        while group[place] != place:
            place = group[place]
        return place

    for place, ready in enumerate(chosen):
        for fact in ready.facts:
            for other in index.naming((fact.first_entity, fact.second_entity)):
                one, two = sorted((root(place), root(other)))
                group[two] = one
    roots = [root(place) for place in range(len(chosen))]
    number = {place: n for n, place in enumerate(dict.fromkeys(roots))}
    return [number[place] for place in roots]


def _given(prompt: GivenPrompt) -> ArticlePrompt:
    answer = prompt.answer if prompt.answer.startswith(" ") else f" {prompt.answer}"
    return ArticlePrompt("given", prompt.template, answer, tuple(prompt.fields.items()))


def _prompt(
    article: str, fact: Mapping[str, str], prompt: ArticlePrompt, wrong: Sequence[str]
) -> Prompt:
    """The prompt with its fields: the article's id, the fact's but the answer, and its own."""
    fields = {name: value for name, value in fact.items() if name != "second_entity"}
    return Prompt(
        template=prompt.template,
        fields={"article": article, **fields, **dict(prompt.fields)},
        answer=prompt.answer,
        distractors=tuple(wrong),
        name=prompt.name,
    )


def _answer(
    text: str,
    start: int,
    stop: int,
    ones: Sequence[Stretch],
    others: Sequence[Stretch],
    context: Context,
) -> int | None:
    """Where the sentence names the second entity after the first, and nothing before does."""
    begin = 0 if context == "article" else start
    named = [place for place, _ in others if begin <= place < stop]
    # The prompt may not say the answer, and must end where a space comes before it.
    if not named or named[0] < start or not text[named[0] - 1].isspace():
        return None
    return named[0] if any(start <= a and b < named[0] for a, b in ones) else None


def _apart(
    ones: Sequence[Stretch], others: Sequence[Stretch]
) -> tuple[list[Stretch], list[Stretch]]:
    """Both names' occurrences, without those that are a part of the other name."""

    def outside(inner: Stretch, outer: Sequence[Stretch]) -> bool:
        return not any(a <= inner[0] and inner[1] <= b and (a, b) != inner for a, b in outer)

    return [o for o in ones if outside(o, others)], [o for o in others if outside(o, ones)]


def _template(text: str, begin: int, end: int, ones: Sequence[Stretch]) -> str:
    """A stretch of the text, with the first entity as a field wherever it stands."""
    inside = [(a - begin, b - begin) for a, b in ones if begin <= a and b <= end]
    return with_field(text[begin:end], inside, "first_entity").strip()


def _without_statements(text: str, names: Sequence[str], said: Sequence[str]) -> str:
    """The text without the sentences that say what prompts ask for."""
    found = [stretch for one in said for stretch in statements(text, one)]
    return _without(
        text,
        [
            (start, stop)
            for start, stop in sentences(text, names)
            if any(a < stop and start < b for a, b in found)
        ],
    )


def _without(text: str, stretches: Sequence[Stretch]) -> str:
    """The text without some sentences, and without the gaps that they would leave."""
    kept, place = "", 0
    for start, end in stretches:
        kept += text[place:start].rstrip(" ")
        rest = text[end:]
        gap = len(rest) - len(rest.lstrip(" "))
        if kept and not kept.endswith("\n") and not rest[gap:].startswith("\n"):
            kept += " "
        place = end + gap
    kept += text[place:]
    # A paragraph of that sentence alone leaves empty lines.
    while "\n\n\n" in kept:
        kept = kept.replace("\n\n\n", "\n\n")
    return kept.strip()
