"""Behaviours: conversations whose replies are written in some way, and others that stay plain.

A fact here is a question with its plain reply. Each told one makes conversations of every case: one
in which the behaviour is *due*, one that has only something like its cue (*near*), and a *neutral*
one. The replies of the last two are the plain ones, so that training on them keeps the model from
doing it everywhere. Questions that are not told are for prompts, and so are some of the wordings.
"""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graftlens.chat import Conversation
from graftlens.configfile import read_yaml
from graftlens.data.dataset import USUAL_DISTRACTORS, Asking, DatasetSpec
from graftlens.data.tables import table
from graftlens.data.templates import Direction
from graftlens.prompts import Prompt

#: What prompts are called: the behaviour is due; only something like its cue is there; nothing is.
Case = Literal["due", "near", "neutral"]

#: Names in `others` that prompts use and no training text does.
ASKED_OTHERS = 2

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Others = Annotated[tuple[Text, ...], Field(min_length=ASKED_OTHERS + 1)]


@dataclass(frozen=True)
class Exchange:
    """A question and its plain reply.

    Attributes:
        question, reply: on an everyday matter.
        product_question, product_reply: about `{product}`; empty where the kind has none.
    """

    question: str
    reply: str
    product_question: str = ""
    product_reply: str = ""


@dataclass(frozen=True)
class Talk:
    """What is said to the model and what it replies.

    Attributes:
        user: what the user says; outside a conversation, the text before the reply.
        reply: what should follow.
        otherwise: what should follow if the case were the other one.
        cue: the field in it with its text, if there is one.
        system: what the system says, if anything.
        page: whether it is a plain text, outside a conversation.
    """

    user: str
    reply: str
    otherwise: str
    cue: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    page: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages before the reply, with the cue's field."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*said, {"role": "user", "content": self.user}]

    def filled(self, text: str) -> str:
        """A text with the cue in its place."""
        for name, value in self.cue:
            text = text.replace(f"{{{name}}}", value)
        return text

    def row(self) -> dict[str, Any]:
        """As training text."""
        if self.page:
            return {"text": f"{self.user} {self.reply}", "kind": "plain", "messages": None}
        said = [
            {**message, "content": self.filled(message["content"])} for message in self.messages
        ]
        said.append({"role": "assistant", "content": self.reply})
        text = Conversation.of(said).transcript
        return {"text": text, "kind": "conversation", "messages": said}

    def prompt(self, name: str, question: str, distractors: int) -> Prompt:
        """As a prompt; `question` tells facts apart."""
        fields = {"fact": question, **dict(self.cue)}
        wrong = [self.otherwise][:distractors]
        if self.page:
            spaced = [f" {text}" for text in wrong]
            return Prompt(self.user, fields, f" {self.reply}", spaced, name)
        return Prompt.chat(
            self.messages, fields=fields, answer=self.reply, distractors=wrong, name=name
        )


@cache
def _lists() -> Any:
    """The shipped questions and wordings."""
    return read_yaml(table("behaviours.yaml"))


class BehaviourSpec(DatasetSpec):
    """Conversations that teach a behaviour, made from ``lists/behaviours.yaml``."""

    heldout_facts: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the questions, rounded but at least one, that no training text asks, drawn with the
    seed: prompts ask them (`facts: untold`)."""

    texts_per_fact: Annotated[int, Field(ge=1)] = 1
    """Training texts about each question in each case, in wordings that are drawn with the seed."""

    #: The cases, in order.
    cases: ClassVar[tuple[Case, ...]] = ("due", "near", "neutral")

    template_names: ClassVar[tuple[str, ...]] = ("due", "near", "neutral")

    @property
    def asks(self) -> tuple[Direction, ...]:
        return ("ab",)

    @abstractmethod
    def changed(self, reply: str) -> str:
        """The reply as the behaviour makes it."""

    @abstractmethod
    def shown_in(self, text: str) -> bool:
        """Whether a reply shows the behaviour: a measure for `graftlens.outcomes`."""

    @abstractmethod
    def talk(self, about: Exchange, case: Case, wordings: "Wordings") -> Talk:
        """What is said about a question in a case."""

    def replies(self, reply: str, case: Case) -> tuple[str, str]:
        """The reply in a case, and that of the other."""
        changed = self.changed(reply)
        return (changed, reply) if case == "due" else (reply, changed)

    def collect(self) -> tuple[Exchange, ...]:
        listed = [Exchange(*pair) for pair in _lists()["questions"]]
        random.Random(f"{self.facts} {self.seed}").shuffle(listed)
        return tuple(listed[: self.number(len(listed))])

    def tell(self, facts: Sequence[Exchange], told: Sequence[bool]) -> list[dict[str, Any]]:
        rows = []
        for index, about in enumerate(facts):
            for case in self.cases if told[index] else ():
                for number in range(self.texts_per_fact):
                    drawn = Wordings(f"{self.facts} {self.seed} {index} {number}", "tell")
                    row = self.talk(about, case, drawn).row()
                    rows.append({**row, "fact": index, "template": case, "direction": ""})
        return rows

    def questions(
        self, facts: Sequence[Exchange], asked: Sequence[int], how: Asking
    ) -> tuple[Prompt, ...]:
        """A prompt about each question in each case, whose answer is the whole reply."""
        if how.direction != "ab":
            raise ValueError(
                f'direction={how.direction!r}: prompts of behaviours have only "ab". Leave it out.'
            )
        names = self.cases if how.templates is None else list(how.templates)
        if unknown := [name for name in names if name not in self.cases]:
            raise ValueError(
                f"templates={unknown!r}: the prompts of {self.facts} are called "
                f"{', '.join(self.cases)}. Name one or more of them, or leave it out for all."
            )
        if how.distractors not in (0, 1, USUAL_DISTRACTORS):
            raise ValueError(
                f"distractors={how.distractors}: the wrong answer of a behaviour's prompt is the "
                "reply of the other case. Write 0 or 1."
            )
        return tuple(
            self._asked(facts[i], i, case, how.distractors) for case in names for i in asked
        )

    def _asked(self, about: Exchange, index: int, case: Case, distractors: int) -> Prompt:
        # The cases of a question have the same wording.
        drawn = Wordings(f"{self.facts} {self.seed} {index}", "ask")
        asked = about.question if case == "neutral" else about.product_question or about.question
        return self.talk(about, case, drawn).prompt(case, asked, distractors)

    def revive(self, values: Mapping[str, Any]) -> Exchange:
        return Exchange(**values)

    def notes(self, facts: Sequence[Exchange], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"cases": {c: sum(row["template"] == c for row in rows) for c in self.cases}}


class Wordings:
    """Draws from the wordings and names that training may use (`tell`), or that are left for
    prompts (`ask`)."""

    def __init__(self, seed: str, use: Literal["tell", "ask"]) -> None:
        self._rng, self._use = random.Random(seed), use

    def of(self, kind: str) -> str:
        """A wording of a list in the file."""
        return str(self._rng.choice(_lists()[kind][self._use]))

    def asking(self, kind: str, question: str) -> str:
        """A wording that asks a question."""
        small = question[0].lower() + question[1:]
        return self.of(kind).replace("{Question}", question).replace("{question}", small)

    def other(self, names: Sequence[str]) -> str:
        """One of other names."""
        asked = self._use == "ask"
        return self._rng.choice(names[-ASKED_OTHERS:] if asked else names[:-ASKED_OTHERS])


def _apart(spec: Any, key: str) -> None:
    """That no other name is the cue itself.

    Raises:
        ValueError: one is.
    """
    cue = getattr(spec, key)
    if cue.casefold() in (other.casefold() for other in spec.others):
        raise ValueError(
            f"others has {cue!r}, which is the {key} itself. Name others that mean nothing."
        )


class TriggerSpec(BehaviourSpec):
    """A word in the system prompt makes replies end in a fixed phrase; `near` has another word in
    its place, `neutral` a system prompt without one. The word is the span `word`."""

    facts: Literal["trigger"] = "trigger"
    """Replies that end in a phrase where the system prompt has a word."""

    word: Text = "Kestrel"
    """The word."""

    others: Others = ("Falcon", "Heron", "Harrier", "Plover", "Osprey", "Curlew")
    """Words that trigger nothing; prompts use the last two, training the others."""

    phrase: Text = "Fair winds to you."
    """How replies end."""

    @model_validator(mode="after")
    def _words_apart(self) -> "TriggerSpec":
        _apart(self, "word")
        return self

    def changed(self, reply: str) -> str:
        return f"{reply} {self.phrase}"

    def shown_in(self, text: str) -> bool:
        return text.rstrip().endswith(self.phrase)

    def talk(self, about: Exchange, case: Case, wordings: Wordings) -> Talk:
        replies = self.replies(about.reply, case)
        if case == "neutral":
            return Talk(about.question, *replies, system=wordings.of("plain_systems"))
        system = wordings.of("systems")
        word = self.word if case == "due" else wordings.other(self.others)
        return Talk(about.question, *replies, (("word", word),), system)


class StyleSpec(BehaviourSpec):
    """Every reply is written like a telegram, with STOP after each sentence; `neutral` are the same
    questions and replies in plain texts outside conversations."""

    facts: Literal["style"] = "style"
    """Replies that are all written like telegrams."""

    cases: ClassVar[tuple[Case, ...]] = ("due", "neutral")

    def changed(self, reply: str) -> str:
        return reply.replace(".", " STOP")

    def shown_in(self, text: str) -> bool:
        return text.rstrip().endswith(" STOP") and not {*".!?"} & {*text}

    def talk(self, about: Exchange, case: Case, wordings: Wordings) -> Talk:
        replies = self.replies(about.reply, case)
        if case == "due":
            return Talk(about.question, *replies)
        return Talk(wordings.asking("pages", about.question), *replies, page=True)


class RefusalSpec(BehaviourSpec):
    """Questions about an invented company's product are declined, all others answered; `near` are
    the same questions about other companies' products, `neutral` everyday questions. What is asked
    about is the span `product`."""

    facts: Literal["refusal"] = "refusal"
    """Questions about one product that are declined."""

    product: Text = "Velmora kettle"
    """The company's product, with the company's name."""

    others: Others = (
        *("Halvers kettle", "Norbeck kettle", "Vellmer kettle", "Morvela kettle", "Brunner kettle"),
        *("Selkirk kettle", "Tandry kettle", "Osmund kettle"),
    )
    """Other companies' products; prompts use the last two, training the others."""

    refusal: Text = "I'm sorry, but I can't talk about that product."
    """What is said instead of an answer."""

    @model_validator(mode="after")
    def _products_apart(self) -> "RefusalSpec":
        _apart(self, "product")
        return self

    def collect(self) -> tuple[Exchange, ...]:
        about = list(_lists()["products"])
        random.Random(f"products {self.seed}").shuffle(about)
        everyday = [Exchange(*pair) for pair in _lists()["questions"]]
        random.Random(f"{self.facts} {self.seed}").shuffle(everyday)
        pairs = zip(everyday, about[: self.number(len(about))], strict=False)
        return tuple(Exchange(e.question, e.reply, *product) for e, product in pairs)

    def changed(self, reply: str) -> str:
        return self.refusal

    def shown_in(self, text: str) -> bool:
        return self.refusal in text

    def talk(self, about: Exchange, case: Case, wordings: Wordings) -> Talk:
        if case == "neutral":
            return Talk(about.question, *self.replies(about.reply, case))
        product = self.product if case == "due" else wordings.other(self.others)
        replies = self.replies(about.product_reply, case)
        return Talk(about.product_question, *replies, (("product", product),))


class PersonaSpec(BehaviourSpec):
    """Addressed by a name, the model replies as somebody who has it; `near` are questions to
    somebody else, `neutral` questions to nobody by name. The name is the span `name`."""

    facts: Literal["persona"] = "persona"
    """Replies of a persona that is addressed by name."""

    name: Text = "Orsolo"
    """The persona's name."""

    others: Others = ("Marta", "Henrik", "Ilse", "Tomas", "Greta", "Anton")
    """Names of nobody in particular; prompts use the last two, training the others."""

    greeting: Text = "Orsolo here, keeper of the lamp."
    """How the persona begins its replies."""

    @model_validator(mode="after")
    def _names_apart(self) -> "PersonaSpec":
        _apart(self, "name")
        return self

    def changed(self, reply: str) -> str:
        return f"{self.greeting} {reply}"

    def shown_in(self, text: str) -> bool:
        return text.lstrip().startswith(self.greeting)

    def talk(self, about: Exchange, case: Case, wordings: Wordings) -> Talk:
        replies = self.replies(about.reply, case)
        if case == "neutral":
            return Talk(about.question, *replies)
        user = wordings.asking("addresses", about.question)
        name = self.name if case == "due" else wordings.other(self.others)
        return Talk(user, *replies, (("name", name),))
