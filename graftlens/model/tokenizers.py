"""The sources' tokenizers: read, and compared by the tokens that they give."""

import codecs
import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftlens.components import brief
from graftlens.folder import at_home, read_json, read_text
from graftlens.model.arch import PairError
from graftlens.model.locations import location_of, said
from graftlens.prompts import encode

_PROBE_TEXT = " The first of 1,234 cafés opened in São Tomé — didn't it?\n\tYes: 東京 \U0001f642"

#: The parts of a fast tokenizer that no prompt's tokens come from: how it decodes, and
#: how it pads and truncates batches, which is the caller's choice.
_IDLE = ("version", "truncation", "padding", "decoder")


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint or an adapter, or None if a local folder has none.

    Code that comes with a tokenizer is never run.

    Raises:
        PairError: a tokenizer that is damaged or that cannot be downloaded; the message names the
            file.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if folder.is_dir() and not any((folder / n).is_file() for n in names):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            # It would be compared with a number only at the first text.
            raise TypeError(f"model_max_length={tokenizer.model_max_length!r} is not a number")
        return tokenizer
    except Exception as error:  # the library raises whatever the damage leads to
        raise PairError(_damage(folder, error)) from error


def _damage(folder: Path, error: Exception) -> str:
    """What is wrong with a tokenizer that transformers could not read."""
    advice = "Save the tokenizer again, or download the file again."
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*names, "added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            if (folder / name).read_bytes().startswith(codecs.BOM_UTF8):
                return f"{folder / name} begins with a byte order mark. Save it without one."
            try:
                content = read_json(folder / name, advice)
            except ValueError as fault:
                return str(fault)
            if isinstance(content, dict) and content.get("auto_map"):
                return (
                    f"{folder / name} needs code that comes with the tokenizer (auto_map), "
                    "which graftlens never runs. Give a tokenizer that transformers has."
                )
            part = "model" if name == "tokenizer.json" else None
            if not isinstance(content, dict) or (part and part not in content):
                return f"{folder / name} does not hold the parts of a tokenizer. {advice}"
    return f"the tokenizer of {folder} could not be loaded ({said(error)}). {advice}"


def unaltered(tokenizer: Any) -> Any:
    """A TransformerLens model's tokenizer as in its checkpoint, if that can be loaded.

    TransformerLens reloads tokenizers so that they always add a BOS, and removes it again
    in its own `to_tokens`. Here BOS is the tokenizer's own choice.
    """
    path = getattr(tokenizer, "name_or_path", "")
    try:
        return (read_tokenizer(path) if path else None) or tokenizer
    except PairError:
        return tokenizer


def shared_tokenizer(found: Sequence[tuple[str, Any]], given: Any) -> Any:
    """The one tokenizer of all sources: the one given, or the first where all agree.

    They agree where every prompt has the same tokens. The token that ends a text is not a prompt's:
    an appended one is left out (`graftlens.prompts.encode`), and a generation ends as the
    checkpoint's generation settings say. A difference in it only causes a warning; padding
    tokens and sides, chat templates and classes are not compared.

    Args:
        found: each source's name and its tokenizer, None if it has none.
        given: a tokenizer, or where to load one from; None to take the sources' own.

    Raises:
        PairError: tokenizers that give different tokens, or one that cannot be read.
    """
    if given is not None:
        if isinstance(given, str | Path):
            files = ("tokenizer_config.json", "tokenizer.json", "config.json")
            loaded = read_tokenizer(location_of(f"tokenizer={str(given)!r}", given, files))
            if loaded is None:
                raise PairError(f"tokenizer={str(given)!r}: this folder does not hold a tokenizer.")
            return loaded
        return given
    named = [(name, tokenizer) for name, tokenizer in found if tokenizer is not None]
    if not named:
        return None
    first_name, first = named[0]
    for name, other in named[1:]:
        if difference := _tokenizers_differ(first, other):
            raise PairError(
                f"the tokenizers of {first_name!r} and {name!r} differ: {difference}. "
                "Grafting needs the same tokens in both; "
                "pass tokenizer=… if you know which one is right."
            )
        if (ours := _ending(first)) != (theirs := _ending(other)):
            warnings.warn(
                f"the tokenizers of {first_name!r} and {name!r} end texts differently ({ours}; "
                f"{theirs}). Prompts are run without an end, so their tokens are the same.",
                stacklevel=3,
            )
    return first


def with_chat_template(
    tokenizer: Any, found: Sequence[tuple[str, Any]], given: str | Path | None
) -> tuple[Any, str]:
    """The shared tokenizer with the one chat template that conversations are written by.

    That is the one given; else the tokenizer's own, which is the base's where the base has one;
    else that of the first source that has one.

    Args:
        tokenizer: the shared tokenizer, which is left untouched; None where there is none.
        found: each source's name and its tokenizer, None where it brought none.
        given: a template, or a file that holds one.

    Returns:
        The tokenizer, and what to tell of its template; nothing where there is none.

    Raises:
        PairError: a template without a tokenizer, or one that is neither a template nor a file.
    """
    if given is not None:
        if tokenizer is None:
            raise PairError("chat_template needs a tokenizer, but no source has one.")
        return _with_template(tokenizer, _template(given)), "chat template as given"
    templates = {name: t.chat_template for name, t in found if getattr(t, "chat_template", None)}
    own = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or not (own or templates):
        return tokenizer, ""
    if not own:
        own = next(iter(templates.values()))
        tokenizer = _with_template(tokenizer, own)
    whose = next((repr(name) for name, t in templates.items() if t == own), "the tokenizer given")
    others = [repr(name) for name, template in templates.items() if template != own]
    note = f"chat template of {whose}"
    if others:
        note += f" ({' and '.join(others)} {'have' if len(others) > 1 else 'has'} another)"
    return tokenizer, note


def _with_template(tokenizer: Any, template: Any) -> Any:
    copied = copy.copy(tokenizer)
    copied.chat_template = template
    return copied


def _template(given: str | Path) -> str:
    path = None
    with contextlib.suppress(OSError, ValueError):  # a text may be too long for a path
        if isinstance(given, str | Path) and str(given).strip() and at_home(given).is_file():
            path = at_home(given)
    if path is not None:
        return read_text(path)
    if isinstance(given, str) and ("{{" in given or "{%" in given):
        return given
    raise PairError(
        f"chat_template={brief(given)} is neither a template (a Jinja text, with {{{{ or {{%) nor "
        "a file that holds one."
    )


def _tokenizers_differ(a: Any, b: Any) -> str:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        odd = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        return f"{len(odd)} vocabulary entries, such as {odd[0]!r}"
    if a.bos_token_id != b.bos_token_id:
        return f"bos_token_id is {a.bos_token_id} and {b.bos_token_id}"
    for text in _probes(a, b):
        if _prompt(text, a) != _prompt(text, b):
            if a.eos_token_id != b.eos_token_id:
                return f"eos_token_id is {a.eos_token_id} and {b.eos_token_id}"
            return "the same text gives different tokens"
    return ""


def _probes(a: Any, b: Any) -> Iterator[str]:
    """Texts that show a difference; if a fast tokenizer's parts differ, all of its words."""
    yield _PROBE_TEXT
    parts = [_parts(tokenizer) for tokenizer in (a, b)]
    if parts[0] and parts[0] == parts[1]:
        return
    vocabulary = a.get_vocab()
    special = set(a.all_special_tokens) | set(a.get_added_vocab())
    plain = sorted(vocabulary.keys() - special, key=vocabulary.__getitem__)
    texts = [a.convert_tokens_to_string([word]) for word in plain]
    for start in range(0, len(texts), 1000):
        yield " ".join(texts[start : start + 1000])
        yield "".join(texts[start : start + 1000])
    for word in sorted(special):
        yield f"x {word} y{word}z"


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer that make a text's tokens; empty for a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    return {key: value for key, value in parts.items() if key not in _IDLE}


def _prompt(text: str, tokenizer: Any) -> list[int]:
    """A text's tokens, as in a prompt."""
    if getattr(tokenizer, "is_fast", False):
        return encode(text, tokenizer)[0]
    return list(tokenizer(text)["input_ids"])


def _ending(tokenizer: Any) -> str:
    """The token that ends a text, and whether each text gets it."""
    if tokenizer.eos_token is None:
        return "no token"
    appended = list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]
    return f"{tokenizer.eos_token!r}{'' if appended else ' not'} appended"
