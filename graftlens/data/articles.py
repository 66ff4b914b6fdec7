"""Articles: facts in running text, with prompts that are the beginnings of sentences.

No template tells these facts. A prompt is a sentence of the article up to the name that it asks
for, so training and evaluation are split by sentence: the sentences that prompts are cut from
are left out of the training texts, or training sees the article only in a language model's
rewrites.
"""

import logging
import random
from collections.abc import Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from graftlens.data.articlefiles import SHIPPED, ArticlePrompt, stored
from graftlens.data.articleprompts import ArticleFact, Context, Ready, prepared, together
from graftlens.data.dataset import USUAL, Asking, DatasetSpec, few_enough
from graftlens.data.rewriting import Rewrites, rewritten
from graftlens.data.templates import Direction
from graftlens.prompts import Prompt

#: Names of prompts: cut from a sentence, cut with the article before it, or given.
TEMPLATE_NAMES = ("sentence", "article", "given")

#: Left-out articles that the provenance names, for each reason.
NAMED = 20

TrainOn = Literal["original", "rewrites", "both"]

logger = logging.getLogger(__name__)


class ArticlesSpec(DatasetSpec):
    """Facts that articles tell in their own words.

    A fact counts as told if training has its article, whose training text has both names: whether
    some sentence links the two is not checked. So `half` and `heldout_facts` choose
    among articles, and keep together articles where one names both entities of a fact of the
    other: no told text has both names of an untold fact.

    An article is left out, and counted, if a fact could not be asked for or would not be told.
    """

    facts: Literal["articles"] = "articles"
    """The kind of dataset."""

    path: Path | None = None
    """A ``.jsonl`` file with one article per line, or a folder of articles: ``NAME.txt`` with
    ``NAME.json`` next to it for everything but the text, or ``NAME.json`` with the text in it;
    files of other kinds are ignored. All in UTF-8. By default the shipped articles about invented
    films."""

    context: Context = "sentence"
    """What a prompt has: its sentence, or the whole article up to there. A prompt never names what
    it asks for, so with ``article`` only first mentions can be asked for."""

    heldout_sentences: bool = True
    """Cut one prompt per fact, from the last sentence that makes one, and leave out of the training
    texts every sentence, of this article and of others, that says a prompt (cut or given) with its
    answer. Otherwise every suitable sentence makes a prompt, and those of originals are trained
    on: such prompts ask whether a text is remembered."""

    rewrites: Rewrites | None = None
    """Have a language model rewrite each article."""

    train_on: TrainOn = "original"
    """What training sees: the articles, their rewrites, or both; by default ``both`` if there are
    rewrites, or else the unchanged articles, ``original``. With ``rewrites`` alone no sentence is
    left out: every suitable sentence makes a prompt, and none of them is in a rewrite."""

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
                f"train_on={self.train_on!r}, but rewrites are {given}. Rewrites need "
                'train_on "rewrites" or "both"; without rewrites it is "original".'
            )
        return self

    @property
    def asks(self) -> tuple[Direction, ...]:
        return ("ab",)

    def collect(self) -> tuple[ArticleFact, ...]:
        """The facts of the usable articles, article by article in their order there."""
        chosen, refused = self._chosen()
        if refused:
            logger.warning("%s: articles are left out: %s", self._origin(), _counted(refused))
        return tuple(fact for ready in chosen for fact in ready.facts)

    def to_tell(self, n: int) -> tuple[bool, ...]:
        chosen, _ = self._chosen()
        groups = together(chosen)
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
        self, facts: Sequence[ArticleFact], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        """The facts' prompts; a fact may have several of one name, or none."""
        if how.direction != "ab":
            raise ValueError(
                f"direction={how.direction!r}: prompts are cut where a sentence names the second "
                'entity after the first, so only "ab" is possible. List a fact the other way round '
                "to ask for its first entity."
            )
        able = {prompt.name for index in asked for prompt in facts[index].prompts}
        there = [name for name in TEMPLATE_NAMES if name in able]
        names = there if how.templates is None else list(how.templates)
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
                rng = random.Random(f"distractors {how.seed} {name} {index}")
                wrong = [answer for answer in different if answer not in right[fact.first_entity]]
                count = few_enough(how.distractors, len(wrong))
                if not 0 <= count <= len(wrong):
                    raise ValueError(
                        f"distractors={how.distractors} of {len(facts)} facts: the distractors of "
                        f"{fact.first_entity} are the answers of facts about others, so 0 to "
                        f"{len(wrong)} are possible here. Ask for fewer, or give more facts."
                    )
                values = {"first_entity": fact.first_entity, **dict(fact.details)}
                made += [
                    prompt.about(fact.article, values, rng.sample(wrong, count))
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
                # Another version may split sentences differently.
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
        return SHIPPED if self.path is None else str(self.path)

    def _chosen(self) -> tuple[list[Ready], dict[str, tuple[str, ...]]]:
        """The articles to use, and the ids of those that were refused, by reason."""
        cut_all = not self.heldout_sentences or self.train_on == "rewrites"
        ready, reasons = prepared(stored(self.path), self.context, cut_all)
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
        taken: dict[int, Ready] = {}
        for index in order:
            if wanted > 0:
                # The text of the last one may tell more facts than are needed.
                taken[index] = ready[index].first(wanted)
                wanted -= len(taken[index].facts)
        return [taken[index] for index in sorted(taken)], refused


def _counted(refused: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{len(ids)} articles are refused: {reason} ({', '.join(ids[:3])}"
        f"{', …' if len(ids) > 3 else ''})"
        for reason, ids in refused.items()
    )
