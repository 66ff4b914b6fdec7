"""Articles told again by a language model, in other words and with the same names."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from tqdm.auto import tqdm

from graftlens.data.sentences import occurrences, statements
from graftlens.data.settings import Settings

#: (prompt, seed) -> what the language model writes.
Write = Callable[[str, int], str]

INSTRUCTION = (
    "Write the following article anew. Say the same things in other words and in another order, "
    "sentence by sentence: copy no sentence. Keep every fact, and every name, title, number and "
    "date exactly as it is spelled, in full at each mention. Add nothing that the article does not "
    "say. Answer with the new article only, without a heading and without remarks of your own."
)

#: What a whole article may end in.
ENDINGS = (".", "!", "?", "…", '."', '!"', '?"', ".”", "!”", "?”", ".)", "'", "’", '"', "”")

logger = logging.getLogger(__name__)


class Rewrites(Settings):
    """How a language model rewrites articles: behind an endpoint, or here.

    A rewrite is used where it has both names of every fact in full, repeats none of the sentences
    that prompts are cut from, and is complete.
    """

    n: Annotated[int, Field(ge=1)] = 3
    """Rewrites an article."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, such as ``http://localhost:8000/v1``. Needs the
    extra ``llm``: ``pip install "graftlens[llm]"``."""

    endpoint_model: str | None = None
    """What the server calls the model."""

    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; null for a server that wants none. The key
    itself is stored nowhere."""

    model: str | None = None
    """A causal language model to load here instead: hub id or checkpoint folder. An instruction
    follower is wanted."""

    instruction: Annotated[str, Field(min_length=1)] = INSTRUCTION
    """What the model is told before each article."""

    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Of the sampling; 0 takes the likeliest token, and then each rewrite is the same."""

    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """The longest rewrite, in the model's tokens. A longer one is cut off, and so refused."""

    attempts: Annotated[int, Field(ge=1)] = 3
    """How often to try for each rewrite before it is given up."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampling, beside the dataset's. Not every server heeds it."""

    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for one answer of the endpoint."""

    @model_validator(mode="after")
    def _one_model(self) -> "Rewrites":
        if (self.endpoint is None) == (self.model is None):
            given = "neither endpoint nor model" if self.model is None else "endpoint and model"
            raise ValueError(
                f"{given} is given, but one model writes. Give one of endpoint (a base URL, with "
                "endpoint_model), model (a hub id or folder)."
            )
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError(
                f"endpoint={self.endpoint!r} and endpoint_model={self.endpoint_model!r} go "
                "together: where the server is, and what it calls the model."
            )
        if self.endpoint is not None:
            parts = urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"endpoint={self.endpoint!r} is no address. Write a base URL, such as "
                    "http://localhost:8000/v1."
                )
            if parts.username or parts.password:
                raise ValueError(
                    "endpoint has a user name or password in it, which would be stored with the "
                    "dataset. Put the key into an environment variable (api_key_env)."
                )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 writes the same each time, and n={self.n}. Give a temperature, or "
                "n=1."
            )
        return self


@dataclass(frozen=True)
class Draft:
    """An article to rewrite.

    Attributes:
        id: its name.
        text: the article.
        names: what every rewrite must have, in full.
        asked: what no rewrite may have: the sentences that prompts are cut from, up to and with
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
        seed: of the sampling, beside the settings' own. What is drawn for an article depends
            neither on the others nor on their order.
        write: a model of your own instead of the one that the settings name.

    Returns:
        The accepted rewrites of each article, `n` or fewer, all different.

    Raises:
        ValueError: none at all was accepted; the message says why.
        RuntimeError: the endpoint does not answer or has no key, or its package is not there.
    """
    write = write or _writer(settings)
    made: list[tuple[str, ...]] = []
    reasons: list[str] = []
    with tqdm(total=len(drafts) * settings.n, desc="rewrites", disable=None) as bar:
        for draft in drafts:
            accepted: list[str] = []
            for number in range(settings.n):
                for attempt in range(settings.attempts):
                    place = f"{settings.seed} {seed} {draft.id} {number} {attempt}"
                    text = _trimmed(write(f"{settings.instruction}\n\n{draft.text}", _seed(place)))
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
            f"often: {common}. Use a larger model, or a sterner instruction."
        )
    return made


def _fault(text: str, draft: Draft) -> str | None:
    """Why the text is no rewrite to be used."""
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


def _trimmed(text: str) -> str:
    """The text without what some models write around it."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", text, flags=re.DOTALL)
    return (fenced.group(1) if fenced else text).strip()


def _seed(place: str) -> int:
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1


def _writer(settings: Rewrites) -> Write:
    if settings.model is not None:
        # Loads torch and transformers, which data alone does without.
        from graftlens.model.writer import writer

        return writer(
            settings.model, temperature=settings.temperature, max_tokens=settings.max_tokens
        )
    return _endpoint(settings)


def _endpoint(settings: Rewrites) -> Write:
    try:
        import openai
    except ImportError:
        raise RuntimeError(
            'an endpoint needs the package openai: pip install "graftlens[llm]".'
        ) from None
    key = "none" if settings.api_key_env is None else os.environ.get(settings.api_key_env)
    if not key:
        raise RuntimeError(
            f"the environment variable {settings.api_key_env} is not set. Put the endpoint's key "
            "there, name another variable (api_key_env), or write api_key_env: null for a server "
            "that wants none."
        )
    client = openai.OpenAI(
        base_url=settings.endpoint, api_key=key, timeout=settings.timeout_s, max_retries=4
    )

    def write(prompt: str, seed: int) -> str:
        try:
            answer: Any = client.chat.completions.create(
                model=settings.endpoint_model or "",
                messages=[{"role": "user", "content": prompt}],
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=seed,
            )
            choice = answer.choices[0]
            # What a token limit ended is a rewrite cut off, whatever it ends in.
            return "" if choice.finish_reason == "length" else choice.message.content or ""
        except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"the endpoint {settings.endpoint} gave no answer "
                f"({type(error).__name__}: {error}). Check its address, endpoint_model="
                f"{settings.endpoint_model!r} and the key."
            ) from error

    return write
