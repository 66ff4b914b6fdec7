"""Prompts cut from an article's sentences, and what training may then see of the article."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from graftlens.data.articlefiles import ENTITIES, Article, ArticlePrompt, Stored, parsed
from graftlens.data.rewriting import Draft
from graftlens.data.sentences import (
    Stretch,
    occurrences,
    sentences,
    statements,
    with_field,
    words,
)

Context = Literal["sentence", "article"]


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


@dataclass(frozen=True)
class Ready:
    """An article with its prompts, and what training may see of it."""

    article: Article
    facts: tuple[ArticleFact, ...]
    training: str
    draft: Draft

    def first(self, count: int) -> "Ready":
        return Ready(self.article, self.facts[:count], self.training, self.draft)


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


# The same articles are split into sentences once, not at each step of making a dataset.
@lru_cache(maxsize=4)
def prepared(
    raw: tuple[Stored, ...], context: Context, cut_all: bool
) -> tuple[tuple[Ready, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """The usable articles, and (reason, ids) of the others.

    Args:
        raw: the articles.
        context: what a prompt has.
        cut_all: whether every suitable sentence makes a prompt, and none is left out.
    """
    refused: dict[str, list[str]] = {}
    able: list[tuple[Article, list[_Asked]]] = []
    for article in parsed(raw):
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
    index = Index([article.text for article, _ in used])
    forbidden: list[list[str]] = [[] for _ in used]
    for home, (_, kept) in enumerate(used):
        for one in kept:
            forbidden[home].append(one.said)
            for place in sorted(index.naming(one.names) - {home}):
                if statements(used[place][0].text, one.said):
                    forbidden[place].append(one.said)
    ready: list[Ready] = []
    for (article, kept), said in zip(used, forbidden, strict=True):
        names = _names(article)
        training = article.text if cut_all else _without_statements(article.text, names, said)
        if all(occurrences(training, name) for name in names):
            facts = _facts(article, kept)
            draft = Draft(article.id, article.text, tuple(names), tuple(dict.fromkeys(said)))
            ready.append(Ready(article, facts, training, draft))
        else:
            why = "a fact is told only in the sentence that asks for it"
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
                prompt = one.made
                said = prompt.about(article.id, fact).text + prompt.answer
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
    prompt = asked.prompt.about(article.id, article.facts[asked.fact])
    return " ".join(prompt.text.split())


class Index:
    """Which of many texts contain some names, without searching each text for each name."""

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


def together(chosen: Sequence[Ready]) -> list[int]:
    """A number for each article, the same for articles that are told or untold together."""
    index = Index([ready.article.text for ready in chosen])
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
    # The prompt may not contain the answer, and must end where a space precedes it.
    if not named or named[0] < start or not text[named[0] - 1].isspace():
        return None
    return named[0] if any(start <= a and b < named[0] for a, b in ones) else None


def _apart(
    ones: Sequence[Stretch], others: Sequence[Stretch]
) -> tuple[list[Stretch], list[Stretch]]:
    """Both names' occurrences, without those that are part of the other name."""

    def outside(inner: Stretch, outer: Sequence[Stretch]) -> bool:
        return not any(a <= inner[0] and inner[1] <= b and (a, b) != inner for a, b in outer)

    return [o for o in ones if outside(o, others)], [o for o in others if outside(o, ones)]


def _template(text: str, begin: int, end: int, ones: Sequence[Stretch]) -> str:
    """A stretch of the text, with the first entity as a field wherever it appears."""
    inside = [(a - begin, b - begin) for a, b in ones if begin <= a and b <= end]
    return with_field(text[begin:end], inside, "first_entity").strip()


def _without_statements(text: str, names: Sequence[str], said: Sequence[str]) -> str:
    """The text without the sentences that contain what prompts ask for."""
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
