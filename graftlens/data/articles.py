"""Articles: facts in running text, asked for by the beginnings of sentences.

No template tells these facts. A prompt is a sentence of the article up to the name that it asks
for, so that training and evaluation are split by sentence: the sentences that prompts are cut from
are left out of the training texts, or training sees the article only as a language model rewrote
it.
"""

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from graftlens.configfile import ConfigError, settings_from
from graftlens.data.dataset import USUAL, DatasetSpec, wrong_answers
from graftlens.data.rewriting import Draft, Rewrites, rewritten
from graftlens.data.sentences import Stretch, occurrences, sentences
from graftlens.data.settings import Settings
from graftlens.data.tables import table
from graftlens.data.templates import Direction
from graftlens.prompts import STANDARD_SPANS, Prompt

#: The shipped set: invented films, each with an article about it.
SHIPPED = "articles.jsonl"

#: What prompts are called: cut from a sentence, cut with the article before it, or given.
TEMPLATE_NAMES = ("sentence", "article", "given")

TrainOn = Literal["original", "rewrites", "both"]
Context = Literal["sentence", "article"]


class GivenPrompt(Settings):
    """A prompt that is written beside an article instead of cut from it."""

    template: str
    """Text with fields in braces, up to where the answer would follow."""

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
    """Prompts to use. The facts without any get theirs from the article's sentences. No sentence is
    left out for a given prompt, so write it in words that the article does not have."""

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

    @model_validator(mode="after")
    def _usable(self) -> "Article":
        for number, fact in enumerate(self.facts):
            for name in ("first_entity", "second_entity"):
                if not fact.get(name, "").strip():
                    raise ValueError(
                        f"fact {number} of the article {self.id!r} has no {name}. Write the name "
                        "as it stands in the text."
                    )
            for name in fact:
                if not name.isidentifier() or name in (*STANDARD_SPANS, "article"):
                    raise ValueError(
                        f"fact {number} of the article {self.id!r} has a field {name!r}. Give it "
                        f"another name, of letters, digits and _, and none of: article "
                        f"{' '.join(STANDARD_SPANS)}."
                    )
        for number, prompt in enumerate(self.prompts):
            if prompt.fact >= len(self.facts):
                raise ValueError(
                    f"prompt {number} of the article {self.id!r} asks for fact {prompt.fact}, but "
                    f"it has {len(self.facts)}, counted from 0."
                )
            if "second_entity" in prompt.fields or "{second_entity}" in prompt.template:
                raise ValueError(
                    f"prompt {number} of the article {self.id!r} has a field second_entity, which "
                    "is what prompts ask for. Leave it out."
                )
        return self


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

    ENTITIES: ClassVar[tuple[str, str]] = ("first_entity", "second_entity")
    UNTOLD: ClassVar[tuple[str, ...]] = ("prompts",)

    article: str
    title: str
    first_entity: str
    second_entity: str
    details: tuple[tuple[str, str], ...]
    prompts: tuple[ArticlePrompt, ...]


class ArticlesSpec(DatasetSpec):
    """Facts that articles tell in their own words.

    An article tells all of its facts, so `half` and `heldout_facts` choose among articles. An
    article is left out, and counted, where a fact could not be asked for, or would not be told.
    """

    facts: Literal["articles"] = "articles"
    """The kind of dataset."""

    source: Path | None = None
    """A ``.jsonl`` file with an article a line, or a folder of articles: ``NAME.txt`` with
    ``NAME.json`` beside it for everything but the text, or ``NAME.json`` with the text in it; files
    of other kinds are not looked at. Left out: the shipped articles about invented films."""

    context: Context = "sentence"
    """What a prompt has: its sentence, or the whole article up to there. A prompt never names what
    it asks for, so with ``article`` only first mentions can be asked for."""

    heldout_sentences: bool = True
    """Cut one prompt a fact, from the last sentence that makes one, and leave that sentence out of
    the training texts. Without it every sentence that can makes a prompt, and those of originals
    are trained on: such prompts ask whether a text is remembered."""

    rewrites: Rewrites | None = None
    """Have a language model rewrite each article."""

    train_on: TrainOn = "original"
    """What training sees: the articles, their rewrites, or both. With ``rewrites`` alone no
    sentence is left out: every one that can makes a prompt, and none of them is in a rewrite."""

    template_names: ClassVar[tuple[str, ...]] = TEMPLATE_NAMES

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
        return tuple(fact for ready in self._chosen()[0] for fact in ready.facts)

    def to_tell(self, n: int) -> tuple[bool, ...]:
        chosen, _ = self._chosen()
        drawn = super().to_tell(len(chosen))
        return tuple(t for t, ready in zip(drawn, chosen, strict=True) for _ in ready.facts)

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
        there = [n for n in TEMPLATE_NAMES if any(p.name == n for f in facts for p in f.prompts)]
        names = there if templates is None else list(templates)
        unknown = [name for name in names if name not in there]
        if unknown or not names:
            raise ValueError(
                f"templates={names!r}: the prompts of these articles are called "
                f"{', '.join(there)}. Name one or more of them, or leave it out for all."
            )
        answers = [f" {fact.second_entity}" for fact in facts]
        made = []
        for name in names:
            for index in asked:
                fact = facts[index]
                rng = random.Random(f"distractors {seed} {name} {index}")
                for prompt in fact.prompts:
                    if prompt.name != name:
                        continue
                    others = [prompt.answer, *answers[:index], *answers[index + 1 :]]
                    made.append(
                        Prompt(
                            template=prompt.template,
                            fields={
                                "article": fact.article,
                                "first_entity": fact.first_entity,
                                **dict(fact.details),
                                **dict(prompt.fields),
                            },
                            answer=prompt.answer,
                            distractors=wrong_answers(others, 0, distractors, rng),
                            name=name,
                        )
                    )
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
                "refused": dict(sorted(refused.items())),
                "licences": sorted({r.article.licence for r in chosen if r.article.licence}),
            }
        }
        if self.rewrites is not None:
            told = self.to_tell(len(facts))
            articles = {fact.article for fact, t in zip(facts, told, strict=True) if t}
            asked = self.rewrites.n * len(articles)
            made = sum(row["template"] == "rewrite" for row in rows)
            notes["rewrites"] = {"asked for": asked, "made": made, "refused": asked - made}
        return notes

    def _chosen(self) -> tuple["list[_Ready]", Counter[str]]:
        """The articles to use, and how many were refused for which reason."""
        refused: Counter[str] = Counter()
        ready: list[_Ready] = []
        for article in read_articles(self.source):
            made = _prepare(article, self)
            if isinstance(made, str):
                refused[made] += 1
            else:
                ready.append(made)
        there = sum(len(r.facts) for r in ready)
        wanted = min(USUAL, there) if self.n_facts is None else self.n_facts
        if not 1 <= wanted <= there:
            why = "".join(f"; {count} articles are refused: {r}" for r, count in refused.items())
            raise ValueError(
                f"n_facts={self.n_facts}: {self.source or 'the shipped set'} has {there} facts "
                f"that can be told and asked for{why}. Lower n_facts, or give more articles."
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
    if source is None:
        given = _lines(table(SHIPPED), SHIPPED)
    elif source.is_dir():
        given = _folder(source)
    elif not source.is_file():
        raise FileNotFoundError(
            f"source={str(source)!r} is not there. Name a .jsonl file or a folder of articles."
        )
    elif source.suffix == ".jsonl":
        given = _lines(source.read_text(encoding="utf-8"), source.name)
    else:
        raise ValueError(
            f"source={str(source)!r} ends in {source.suffix!r}. Name a .jsonl file, or a folder of "
            ".txt and .json files."
        )
    if not given:
        raise ValueError(f"{source} holds no article. Put NAME.txt and NAME.json into it.")
    problems: list[tuple[str, str]] = []
    articles: list[Article] = []
    for where, values in given:
        try:
            articles.append(settings_from(Article, _plain(values)))
        except ConfigError as error:
            problems += error.under(where, ": ").problems
    names = Counter(article.id for article in articles)
    problems += [
        ("", f"{count} articles have the id {name!r}. Give each its own.")
        for name, count in names.items()
        if count > 1
    ]
    if problems:
        raise ConfigError(*problems)
    return tuple(articles)


def _lines(text: str, origin: str) -> list[tuple[str, Any]]:
    """(where, values) of each line that is not empty."""
    return [
        (f"{origin}, line {number}", _json(line, f"{origin}, line {number}"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _folder(folder: Path) -> list[tuple[str, Any]]:
    given: list[tuple[str, Any]] = []
    stems = sorted({p.stem for p in folder.iterdir() if p.suffix in (".txt", ".json")})
    for stem in stems:
        text, rest = folder / f"{stem}.txt", folder / f"{stem}.json"
        if not rest.is_file():
            raise FileNotFoundError(
                f"{text} has no {rest.name} beside it. Write its facts there: "
                '{"facts": [{"first_entity": "…", "second_entity": "…"}]}.'
            )
        values = _json(rest.read_text(encoding="utf-8"), str(rest))
        if isinstance(values, dict):
            values = {"id": stem, **values}
            if text.is_file():
                if "text" in values:
                    raise ValueError(
                        f"{rest} has a text, and {text.name} is there, too. Keep one of them."
                    )
                values["text"] = text.read_text(encoding="utf-8")
        given.append((rest.name, values))
    return given


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}). Mend it.") from None


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
class _Cut:
    """The number of a sentence, and where in the text it and the answer begin."""

    sentence: int
    start: int
    end: int


def _prepare(article: Article, spec: ArticlesSpec) -> _Ready | str:
    """The article with its prompts, or why it cannot be used."""
    text = article.text
    names = [fact[key] for fact in article.facts for key in ("first_entity", "second_entity")]
    if not all(occurrences(text, name) for name in names):
        return "the text does not name both entities of a fact"
    stretches = sentences(text, names)
    removed: set[int] = set()
    facts: list[ArticleFact] = []
    asked: list[str] = []
    for number, fact in enumerate(article.facts):
        first, second = fact["first_entity"], fact["second_entity"]
        prompts = [_given(prompt, fact) for prompt in article.prompts if prompt.fact == number]
        if not prompts:
            ones, others = _apart(occurrences(text, first), occurrences(text, second))
            cuts = [
                _Cut(i, start, end)
                for i, (start, stop) in enumerate(stretches)
                if (end := _answer(text, start, stop, ones, others, spec.context)) is not None
            ]
            if not cuts:
                return "no prompt for a fact can be cut from a sentence"
            if spec.heldout_sentences and spec.train_on != "rewrites":
                cuts = cuts[-1:]
                removed.add(cuts[0].sentence)
            asked += [text[cut.start : cut.end] + second for cut in cuts]
            prompts = [
                ArticlePrompt(spec.context, _template(text, cut, ones, spec.context), f" {second}")
                for cut in cuts
            ]
        facts.append(
            ArticleFact(
                article=article.id,
                title=article.title,
                first_entity=first,
                second_entity=second,
                details=tuple((k, v) for k, v in fact.items() if k not in ArticleFact.ENTITIES),
                prompts=tuple(prompts),
            )
        )
    training = _without(text, [stretches[i] for i in sorted(removed)])
    if not all(occurrences(training, name) for name in names):
        return "a fact is told nowhere else than in the sentence that asks for it"
    return _Ready(
        article, tuple(facts), training, Draft(article.id, text, tuple(names), tuple(asked))
    )


def _given(prompt: GivenPrompt, fact: Mapping[str, str]) -> ArticlePrompt:
    answer = prompt.answer if prompt.answer.startswith(" ") else f" {prompt.answer}"
    return ArticlePrompt("given", prompt.template, answer, tuple(prompt.fields.items()))


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


def _template(text: str, cut: _Cut, ones: Sequence[Stretch], context: Context) -> str:
    """The text up to the answer, with the first entity as a field wherever it stands."""
    place = 0 if context == "article" else cut.start
    template = ""
    for start, end in ones:
        if place <= start and end <= cut.end:
            template += _literal(text[place:start]) + "{first_entity}"
            place = end
    return (template + _literal(text[place : cut.end])).strip()


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


def _literal(text: str) -> str:
    """The text with its braces doubled, as templates write them."""
    return text.replace("{", "{{").replace("}", "}}")
