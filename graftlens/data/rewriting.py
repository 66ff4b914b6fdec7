"""Articles rewritten by a language model, in other words and with the same names."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator
from tqdm.auto import tqdm

from graftlens.data.languagemodels import LanguageModel, Write, seed_of, trimmed, writer_of
from graftlens.data.sentences import occurrences, statements

INSTRUCTION = (
    "Write the following article anew. Say the same things in other words and in another order, "
    "sentence by sentence: copy no sentence. Keep every fact, and every name, title, number and "
    "date exactly as it is spelled, in full at each mention. Add nothing that the article does not "
    "say. Answer with the new article only, without a heading and without remarks of your own."
)

#: What a complete article may end in.
ENDINGS = (".", "!", "?", "…", '."', '!"', '?"', ".”", "!”", "?”", ".)", "'", "’", '"', "”")

logger = logging.getLogger(__name__)


class Rewrites(LanguageModel):
    """How a language model rewrites articles: behind an endpoint, or here.

    A rewrite is used where it has both names of every fact in full, repeats none of the sentences
    that prompts are cut from, and is complete.

    For its keys, see `LanguageModel`.
    """

    n: Annotated[int, Field(ge=1, le=1000)] = 3
    """Rewrites an article."""

    instruction: Annotated[str, Field(min_length=1)] = INSTRUCTION
    """The instruction before each article."""

    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature; 0 takes the likeliest token, so that all rewrites are the same."""

    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """The longest rewrite, in the model's tokens. A longer one is cut off and therefore refused."""

    attempts: Annotated[int, Field(ge=1, le=1000)] = 3
    """How often to try for each rewrite before giving up."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampling, combined with the dataset's. Not every server honours it."""

    @model_validator(mode="after")
    def _different(self) -> "Rewrites":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 gives the same text each time, but n={self.n}. Give a temperature, "
                "or n=1."
            )
        return self


@dataclass(frozen=True)
class Draft:
    """An article to rewrite.

    Attributes:
        id: its name.
        text: the article.
        names: what every rewrite must contain, in full.
        asked: what no rewrite may contain: the sentences that prompts are cut from, up to and with
            their answers.
    """

    id: str
    text: str
    names: tuple[str, ...]
    asked: tuple[str, ...]


def rewritten(
    drafts: Sequence[Draft], settings: Rewrites, seed: int, write: Write | None = None
) -> list[tuple[str, ...]]:
    """Rewrite every article `n` times, with a progress bar.

    Args:
        drafts: the articles.
        settings: how.
        seed: seed of the sampling, combined with the settings' own. What is drawn for an
            article depends neither on the other articles nor on their order.
        write: a model of your own instead of the one named in the settings.

    Returns:
        The accepted rewrites of each article, `n` or fewer, all different.

    Raises:
        ValueError: no rewrite was accepted; the message says why.
        RuntimeError: the endpoint does not answer or has no key, or its package is not installed.
    """
    write = write or writer_of(settings)
    made: list[tuple[str, ...]] = []
    reasons: list[str] = []
    with tqdm(total=len(drafts) * settings.n, desc="rewrites", disable=None) as bar:
        for draft in drafts:
            accepted: list[str] = []
            for number in range(settings.n):
                for attempt in range(settings.attempts):
                    place = f"{settings.seed} {seed} {draft.id} {number} {attempt}"
                    text = trimmed(write(f"{settings.instruction}\n\n{draft.text}", seed_of(place)))
                    why = "it repeats another one" if text in accepted else _fault(text, draft)
                    if why is None:
                        accepted.append(text)
                        break
                    reasons.append(why)
                    logger.info("rewrite %d of %s, attempt %d: %s", number, draft.id, attempt, why)
                else:
                    logger.warning(
                        "rewrite %d of the article %r was given up after %d attempts; the last "
                        "one: %s",
                        number,
                        draft.id,
                        settings.attempts,
                        why,
                    )
                bar.update()
            made.append(tuple(accepted))
    if drafts and not any(made):
        common = max(dict.fromkeys(reasons), key=reasons.count)
        raise ValueError(
            f"no rewrite of {len(drafts)} articles was accepted in {len(reasons)} attempts; most "
            f"often: {common}. Use a larger model, or a stricter instruction."
        )
    return made


def _fault(text: str, draft: Draft) -> str | None:
    """Why the text cannot be used as a rewrite."""
    if not text.endswith(ENDINGS):
        return "it is cut off or empty"
    if text == draft.text.strip():
        return "it is the article itself"
    missing = [name for name in draft.names if not occurrences(text, name)]
    if missing:
        return f"it lacks the name {missing[0]!r}"
    if any(statements(text, asked) for asked in draft.asked):
        return "it repeats a sentence that a prompt is cut from"
    return None
