"""A language model that writes texts: behind an endpoint, or here; and who may be sent a key."""

import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from graftlens.configfile import overridden
from graftlens.data.settings import Settings, within

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

#: (prompt, seed) -> what the language model writes.
Write = Callable[[str, int], str]

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

S = TypeVar("S", bound=BaseModel)


class _MadeInCode(ModelMetaclass):
    """Distinguishes `Rewrites(...)` in a program, whose author names the endpoint and the key, from
    validation of a config's values, which may come from somebody else: that makes no call."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        made = super().__call__(*args, **values)
        made._named = True
        return made


class LanguageModel(Settings, metaclass=_MadeInCode):
    """Which language model writes, and how.

    A key is sent only to its provider's own host (`PROVIDERS`), or from a variable to an endpoint
    that were both named on the command line (``….endpoint=… ….api_key_env=…``) or in Python: a
    config alone sends no key anywhere else, and no key is sent unencrypted to another machine.
    """

    _named: bool = PrivateAttr(default=False)

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

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 takes the likeliest token."""

    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """The longest answer, in the model's tokens. A longer one is cut off and does not count."""

    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for one answer of the endpoint."""

    @model_validator(mode="before")
    @classmethod
    def _providers_own_key(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "api_key_env" not in values:
            return {**values, "api_key_env": PROVIDERS.get(_host(values.get("endpoint")))}
        return values

    @model_validator(mode="after")
    def _one_model(self) -> "LanguageModel":
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
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def key(self) -> str | None:
        """The endpoint's key from the environment; None for a server that needs none.

        Raises:
            ValueError: a key that may not go to that endpoint.
            RuntimeError: a variable that is not set, or that holds something other than a key.
        """
        if self.api_key_env is None or self.endpoint is None:
            return None
        host, name = _host(self.endpoint), type(self).__name__
        section = name.lower()
        if PROVIDERS.get(host) != self.api_key_env and not self._named:
            raise ValueError(
                f"the key in {self.api_key_env} is not sent to {self.endpoint}: a config may name "
                "a provider's own host with its own variable (such as api.openai.com and "
                "OPENAI_API_KEY) and nothing else. If you trust that server with that key, name "
                f"both on the command line ({section}.endpoint=… {section}.api_key_env=…), or in "
                f"Python with {name}(...); for a server that needs no key write api_key_env: null."
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
    """Let language models in `settings` use a key if their endpoint and the key's variable were
    both named by `key=value` overrides, in one section.

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
    for model in within(settings, LanguageModel):
        if (model.endpoint, model.api_key_env) in named:
            model._named = True
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


def trimmed(text: str) -> str:
    """The text without what some models add around it."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", text, flags=re.DOTALL)
    return (fenced.group(1) if fenced else text).strip()


def seed_of(place: str) -> int:
    """A seed that a text says, the same in every process."""
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1


def writer_of(settings: LanguageModel) -> Write:
    """What the model writes for a prompt and a seed; empty where it was cut off.

    Raises:
        ValueError: a key that may not go to that endpoint.
        RuntimeError: a key that is missing, or a package that is not installed; when called, an
            endpoint that does not answer.
    """
    if settings.model is not None:
        # Loads torch and transformers, which the rest of `data` does not need.
        from graftlens.model.writer import writer

        return writer(
            settings.model, temperature=settings.temperature, max_tokens=settings.max_tokens
        )
    return _endpoint(settings)


def _endpoint(settings: LanguageModel) -> Write:
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
