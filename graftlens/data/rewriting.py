"""Articles rewritten by a language model, in other words and with the same names."""

import hashlib
import ipaddress
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, model_validator
from tqdm.auto import tqdm

from graftlens.configfile import overridden
from graftlens.data.sentences import occurrences, statements
from graftlens.data.settings import Settings, within

#: (prompt, seed) -> what the language model writes.
Write = Callable[[str, int], str]

INSTRUCTION = (
    "Write the following article anew. Say the same things in other words and in another order, "
    "sentence by sentence: copy no sentence. Keep every fact, and every name, title, number and "
    "date exactly as it is spelled, in full at each mention. Add nothing that the article does not "
    "say. Answer with the new article only, without a heading and without remarks of your own."
)

#: What a complete article may end in.
ENDINGS = (".", "!", "?", "…", '."', '!"', '?"', ".”", "!”", "?”", ".)", "'", "’", '"', "”")

#: Host of a provider -> the variable that holds the provider's own key. A config may send this key
#: to this host, and nothing else anywhere.
PROVIDERS = {
    "api.openai.com": "OPENAI_API_KEY",
    "api.anthropic.com": "ANTHROPIC_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "api.fireworks.ai": "FIREWORKS_API_KEY",
    "api.groq.com": "GROQ_API_KEY",
    "api.mistral.ai": "MISTRAL_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
    "api.x.ai": "XAI_API_KEY",
    "generativelanguage.googleapis.com": "GEMINI_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "router.huggingface.co": "HF_TOKEN",
}

#: scheme, host, port, path. Narrower than URLs in general: anything that two URL parsers could
#: take for different hosts is excluded.
_ADDRESS = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?(/[a-z0-9._~%/+:-]*)?",
    re.IGNORECASE | re.ASCII,
)

#: What every server is sent besides the key.
_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-length", "content-type", "host"}
    | {"user-agent"}
)

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=BaseModel)


class _MadeInCode(type(BaseModel)):  # type: ignore[misc]
    """Distinguishes `Rewrites(...)` in a program, whose author names the endpoint and the key, from
    validation of a config's values, which may come from somebody else: that makes no call."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        made = super().__call__(*args, **values)
        made._named = True
        return made


class Rewrites(Settings, metaclass=_MadeInCode):
    """How a language model rewrites articles: behind an endpoint, or here.

    A rewrite is used where it has both names of every fact in full, repeats none of the sentences
    that prompts are cut from, and is complete.

    A key is sent only to its provider's own host (`PROVIDERS`), or from a variable to an endpoint
    that were both named on the command line (``rewrites.endpoint=… rewrites.api_key_env=…``) or in
    Python (``Rewrites(...)``): a config alone sends no key anywhere else, and no key is sent
    unencrypted to another machine.
    """

    _named: bool = PrivateAttr(default=False)

    n: Annotated[int, Field(ge=1, le=1000)] = 3
    """Rewrites an article."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, such as ``http://localhost:8000/v1``. Needs the
    extra ``llm``: ``pip install "graftlens[llm]"``."""

    endpoint_model: str | None = None
    """The server's name for the model."""

    api_key_env: str | None = None
    """Environment variable, in capitals, that holds the server's key; null for a server that needs
    none. By default the provider's own (`PROVIDERS`), and none for any other host. The key itself
    is never stored."""

    model: str | None = None
    """A causal language model to load here instead: hub id or checkpoint folder. It should follow
    instructions."""

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

    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for one answer of the endpoint."""

    @model_validator(mode="before")
    @classmethod
    def _providers_own_key(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "api_key_env" not in values:
            return {**values, "api_key_env": PROVIDERS.get(_host(values.get("endpoint")))}
        return values

    @model_validator(mode="after")
    def _one_model(self) -> "Rewrites":
        self._check_secrets()
        if (self.endpoint is None) == (self.model is None):
            given = "neither endpoint nor model" if self.model is None else "endpoint and model"
            raise ValueError(
                f"{given} is given, but exactly one model is needed. Give one of endpoint (a base "
                "URL, with endpoint_model), model (a hub id or folder)."
            )
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError(
                f"endpoint={self.endpoint!r} and endpoint_model={self.endpoint_model!r} belong "
                "together: where the server is, and its name for the model."
            )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 gives the same text each time, but n={self.n}. Give a temperature, "
                "or n=1."
            )
        return self

    def _check_secrets(self) -> None:
        """Nothing that may be a key is stored with a dataset or shown in a message."""
        if self.api_key_env is not None and not re.fullmatch(
            r"[A-Z_][A-Z0-9_]{0,99}", self.api_key_env
        ):
            raise ValueError(
                "api_key_env is the name of an environment variable in capitals, such as "
                "OPENAI_API_KEY, and never the key itself. Put the key into that variable."
            )
        if self.endpoint is None:
            return
        if "@" in self.endpoint:
            raise ValueError(
                "endpoint has a user name or password in it, which would be stored with the "
                "dataset. Put the key into an environment variable (api_key_env)."
            )
        if "?" in self.endpoint or "#" in self.endpoint:
            raise ValueError(
                "endpoint has a query (after ? or #), which would be stored with the dataset and "
                "may be a key. Leave it out, and put the key into an environment variable "
                "(api_key_env)."
            )
        parts = _ADDRESS.fullmatch(self.endpoint)
        if parts is None or not 0 < int(parts[3] or 1) < 65536:
            raise ValueError(
                f"endpoint={self.endpoint!r} is not an address. Write a base URL, such as "
                "http://localhost:8000/v1."
            )

    def __eq__(self, other: object) -> bool:
        # Where the values were named is not part of the settings: equal settings are stored
        # equally.
        return isinstance(other, Rewrites) and self.__dict__ == other.__dict__

    def key(self) -> str | None:
        """The endpoint's key from the environment; None for a server that needs none.

        Raises:
            ValueError: a key that may not go to that endpoint.
            RuntimeError: a variable that is not set, or that holds something other than a key.
        """
        if self.api_key_env is None or self.endpoint is None:
            return None
        host = _host(self.endpoint)
        if PROVIDERS.get(host) != self.api_key_env and not self._named:
            raise ValueError(
                f"the key in {self.api_key_env} is not sent to {self.endpoint}: a config may name "
                "a provider's own host with its own variable (such as api.openai.com and "
                "OPENAI_API_KEY) and nothing else. If you trust that server with that key, name "
                "both on the command line (rewrites.endpoint=… rewrites.api_key_env=…), or in "
                "Python with Rewrites(...); for a server that needs no key write api_key_env: null."
            )
        if not self.endpoint.lower().startswith("https:") and not _loopback(host):
            raise ValueError(
                f"the key in {self.api_key_env} is not sent to {self.endpoint}, because http is "
                "not encrypted. Write https, or api_key_env: null for a server that needs no key."
            )
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise RuntimeError(
                f"the environment variable {self.api_key_env} is not set. Put the endpoint's key "
                "there, name another variable (api_key_env), or write api_key_env: null for a "
                "server that needs none."
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RuntimeError(
                f"the environment variable {self.api_key_env} does not hold a key: it contains "
                "spaces, line breaks or non-ASCII characters. Put the endpoint's key there."
            )
        return key


def told_on_command_line(settings: S, overrides: Sequence[str]) -> S:
    """Let rewrites in `settings` use a key if their endpoint and the key's variable were both named
    by `key=value` overrides, in one section.

    Args:
        settings: read from a config with these overrides.
        overrides: as `graftlens.configfile.read_settings` takes them.

    Returns:
        The same settings.
    """
    given = overridden({}, overrides)
    named = {
        (section["endpoint"], section["api_key_env"])
        for section in within(given, dict)
        if isinstance(section.get("endpoint"), str) and isinstance(section.get("api_key_env"), str)
    }
    for rewrites in within(settings, Rewrites):
        if (rewrites.endpoint, rewrites.api_key_env) in named:
            rewrites._named = True
    return settings


def _host(endpoint: Any) -> str:
    """The host of an address, in lower case; empty if it is not an address."""
    parts = _ADDRESS.fullmatch(endpoint) if isinstance(endpoint, str) else None
    if parts is None:
        return ""
    return parts[2].lower()


def _loopback(host: str) -> bool:
    """Whether data sent there stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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


def _trimmed(text: str) -> str:
    """The text without what some models add around it."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", text, flags=re.DOTALL)
    return (fenced.group(1) if fenced else text).strip()


def _seed(place: str) -> int:
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1


def _writer(settings: Rewrites) -> Write:
    if settings.model is not None:
        # Loads torch and transformers, which the rest of `data` does not need.
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
    key = settings.key()
    openai_itself = _host(settings.endpoint) == "api.openai.com"

    def own_headers_only(request: Any) -> None:
        # The package sends the contents of OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID, … to any server.
        for name in [n for n in request.headers if n.lower() not in _HEADERS]:
            del request.headers[name]
        request.headers["Authorization"] = f"Bearer {key or 'none'}"

    # Redirects are not followed: they lead to hosts that nobody named.
    client = openai.OpenAI(
        base_url=settings.endpoint,
        api_key=key or "none",
        timeout=settings.timeout_s,
        max_retries=4,
        http_client=openai.DefaultHttpxClient(
            follow_redirects=False,
            event_hooks={} if openai_itself else {"request": [own_headers_only]},
        ),
    )

    def write(prompt: str, seed: int) -> str:
        why = ""
        try:
            answer: Any = client.chat.completions.create(
                model=settings.endpoint_model or "",
                messages=[{"role": "user", "content": prompt}],
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=seed,
            )
            choice = answer.choices[0]
            text = choice.message.content or ""
            if not isinstance(text, str):
                raise TypeError
        except openai.APIStatusError as error:
            why = f"{type(error).__name__}, HTTP status {error.status_code}"
        except Exception as error:  # whatever openai and httpx raise for what a server may send
            why = type(error).__name__
        # Reported without the server's own words, which may echo the key, and raised out here,
        # where the error that has them is no longer its context.
        if why:
            raise RuntimeError(
                f"the endpoint {settings.endpoint} did not answer ({why}). Check its address, "
                f"endpoint_model={settings.endpoint_model!r} and the key."
            )
        # A text that hit the token limit is cut off, whatever it ends in; and a text that contains
        # the key must not be kept.
        if choice.finish_reason == "length" or (key is not None and key in text):
            return ""
        return text

    return write
