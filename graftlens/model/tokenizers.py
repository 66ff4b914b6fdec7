"""The sources' tokenizers: read, and compared by the tokens that they give."""

import codecs
import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftlens.components import brief
from graftlens.folder import at_home, read_json, read_text
from graftlens.model.arch import PairError
from graftlens.model.differences import Difference, told
from graftlens.model.locations import gguf_of, location_of, said
from graftlens.prompts import encode

_PROBE_TEXT = " The first of 1,234 cafés opened in São Tomé — didn't it?\n\tYes: 東京 \U0001f642"

#: The parts of a fast tokenizer that no prompt's tokens come from: how it decodes, and
#: how it pads and truncates batches, which is the caller's choice.
_IDLE = ("version", "truncation", "padding", "decoder")

#: Parts that deal with special tokens alone.
_AROUND = ("added_tokens", "post_processor")


#: What to do about a checkpoint whose tokenizer has more tokens than its embedding has rows.
_RESIZE = (
    "Resize the embedding (model.resize_token_embeddings(n)) and save the model, or pass the "
    "tokenizer that it was trained with as tokenizer=…"
)


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint or an adapter, or None if a local folder has none.

    Code that comes with a tokenizer is never run.

    Raises:
        PairError: a tokenizer that is damaged or that cannot be downloaded; the message names the
            file.
    """
    from transformers import AutoTokenizer

    if (gguf := gguf_of(path)) is not None:
        return _of_gguf(*gguf)
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


def _of_gguf(folder: str, file: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    except Exception as error:  # whatever the file leads to
        if error.args == ("tokens",):  # the key of a tokenizer, which the file lacks
            return None
        raise PairError(
            f"the tokenizer in {folder}/{file} could not be read ({said(error)}). Pass the model's "
            "own as tokenizer=…"
        ) from error


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


def shared_tokenizer(
    found: Sequence[tuple[str, Any]],
    given: Any,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Any, list[Difference]]:
    """The one tokenizer that makes the tokens of all sources, and how theirs differ.

    That is the one given; else the one with the most tokens, of equal ones the first. It must have
    all tokens of the others at the same ids (special ones may be spelled differently), and give
    each text the tokens that they give. What is put before and behind a text is not compared: an
    appended end is left out of prompts (`graftlens.prompts.encode`), and a generation ends as the
    checkpoint's generation settings say.

    Args:
        found: each source's name and its tokenizer, None if it has none.
        given: a tokenizer, or where to load one from; None to take the sources' own.
        sizes: how many tokens each source has rows for.

    Raises:
        PairError: tokenizers that give different tokens, one that gives tokens that its own model
            (or, of one that is given, every model) has no row for, or one that cannot be read.
    """
    if given is not None:
        if isinstance(given, str | Path):
            files = ("tokenizer_config.json", "tokenizer.json", "config.json")
            loaded = read_tokenizer(location_of(f"tokenizer={str(given)!r}", given, files))
            if loaded is None:
                raise PairError(f"tokenizer={str(given)!r}: this folder does not hold a tokenizer.")
            given = loaded
        if sizes:
            largest, size = max(sizes.items(), key=lambda item: item[1])
            rows, advice = f"the embedding of {largest!r}", "Give the one that it was trained with."
            _refuse_beyond("the tokenizer given", _Words.of(given), rows, size, advice)
        return given, []
    named = [(name, tokenizer) for name, tokenizer in found if tokenizer is not None]
    if not named:
        return None, []
    words = {name: _Words.of(tokenizer) for name, tokenizer in named}
    for name in words:
        if name in sizes:
            whose = f"the tokenizer of {name!r}"
            _refuse_beyond(whose, words[name], "its embedding", sizes[name], _RESIZE)
    most = max(len(w.by_id) for w in words.values())
    owner, chosen = next((n, t) for n, t in named if len(words[n].by_id) == most)
    base_name, base = named[0]
    differences: list[Difference] = []
    for name, other in named:
        if name != owner:
            first, second = sorted((name, owner), key=list(words).index)
            if not words[name].within(words[owner]):
                odd = _odd_tokens(words[first], words[second], first, second)
                _refuse(first, second, f"neither has all tokens of the other ({odd})")
            if difference := _texts_differ(chosen, other, words[owner], words[name]):
                _refuse(first, second, difference)
    for name, other in named[1:]:
        differences += _told(name, base, other, words[base_name], words[name], owner)
    return chosen, differences


def _refuse(first: str, second: str, difference: str) -> None:
    raise PairError(
        f"the tokenizers of {first!r} and {second!r} differ: {difference}. "
        "Grafting needs the same tokens in both; pass tokenizer=… if you know which one is right."
    )


@dataclass(frozen=True)
class _Words:
    """A tokenizer's tokens by id, with those that were added and those that are special."""

    by_id: Mapping[int, str]
    added: frozenset[int]
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "_Words":
        vocabulary = tokenizer.get_vocab()
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in decoder.items() if token.special}
        special |= {i for i in tokenizer.all_special_ids if i is not None}
        by_id = {i: word for word, i in vocabulary.items()}
        return cls(by_id, frozenset({*decoder, *special}), frozenset(special))

    def respelled(self, other: "_Words") -> list[int]:
        """Ids of special tokens that another tokenizer spells differently."""
        return [i for i in self._different(other) if self._special(other, i)]

    def odd(self, other: "_Words") -> list[int]:
        """Ids of tokens that another one lacks, or that are another word there."""
        lacks = [i for i in self.by_id if i not in other.by_id]
        return sorted([*lacks, *(i for i in self._different(other) if not self._special(other, i))])

    def within(self, other: "_Words") -> bool:
        """Whether another tokenizer has all of these tokens, by id."""
        return not self.odd(other)

    def _different(self, other: "_Words") -> list[int]:
        both = self.by_id.keys() & other.by_id.keys()
        return sorted(i for i in both if self.by_id[i] != other.by_id[i])

    def _special(self, other: "_Words", token: int) -> bool:
        added = token in self.added and token in other.added
        return added and (token in self.special or token in other.special)


def _odd_tokens(ours: _Words, theirs: _Words, first: str, second: str) -> str:
    """The first three tokens that only one has, or that are different words."""
    found = sorted({*ours.odd(theirs), *theirs.odd(ours)})
    said = []
    for i in found[:3]:
        a, b = ours.by_id.get(i), theirs.by_id.get(i)
        if a is not None and b is not None:
            said.append(f"{i} is {a!r} and {b!r}")
        else:
            word, name = (a, first) if b is None else (b, second)
            said.append(f"{i} is {word!r} in {name!r} alone")
    return f"{'; '.join(said)}{f' (and {len(found) - 3} more)' if len(found) > 3 else ''}"


def _refuse_beyond(whose: str, words: _Words, rows: str, size: int, advice: str) -> None:
    """Refuse a tokenizer with ordinary tokens that an embedding has no rows for.

    Special ones beyond the last row are those of another form of the model, such as the pictures
    of a multimodal Gemma 3: a prompt with one of them is refused when it is run.
    """
    beyond = [i for i in sorted(words.by_id) if i >= size and i not in words.special]
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise PairError(
            f"{whose} contradicts {rows} of {size} rows: there is none for token {beyond[0]} "
            f"({words.by_id[beyond[0]]!r}){more}. {advice}"
        )


def _told(
    name: str, base: Any, other: Any, ours: _Words, theirs: _Words, owner: str
) -> list[Difference]:
    """What differs between two tokenizers that give the same tokens."""
    found = []
    if ours.by_id.keys() != theirs.by_id.keys():
        done = f"the larger one tokenizes, that of {owner!r}"
        sizes = len(ours.by_id), len(theirs.by_id)
        found.append(told("tokens of the tokenizer", name, *sizes, "carried", done))
    if respelled := ours.respelled(theirs):
        spelled = [", ".join(w.by_id[i] for i in respelled[:3]) for w in (ours, theirs)]
        done = f"{len(respelled)} special tokens are the same by id; texts spell them as {owner!r}"
        found.append(told("special tokens", name, spelled[0], spelled[1], "carried", done))
    settings: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
        ("begin of prompts", _beginning, f"prompts begin as the tokenizer of {owner!r} has it"),
        ("end of texts", _ending, "prompts run without an end"),
        ("pad_token", lambda t: getattr(t, "pad_token", None), "padding is never read"),
        ("padding_side", lambda t: getattr(t, "padding_side", None), "the model pads on the right"),
        ("tokenizer_class", lambda t: type(t).__name__, "they give the same tokens"),
        ("model_max_length", lambda t: t.model_max_length, "prompts are never cut"),
    )
    for key, setting, done in settings:
        a, b = setting(base), setting(other)
        if a != b:
            found.append(told(key, name, a, b, "ignored", done))
    templates = [getattr(t, "chat_template", None) for t in (base, other)]
    if templates[0] != templates[1]:
        a, b = ("none" if t is None else "its own" for t in templates)
        done = "all sources read what one template writes (chat_template=…)"
        found.append(told("chat_template", name, a, b, "ignored", done))
    return found


def with_chat_template(
    tokenizer: Any, found: Sequence[tuple[str, Any]], given: str | Path | None
) -> tuple[Any, str]:
    """The shared tokenizer with the one chat template that conversations are written by.

    That is the one given; else that of a tokenizer that was given; else the base's; else that of
    the first source that has one. A tokenizer that spells the base's special tokens differently
    keeps its own.

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
    base = next((t for _, t in found if t is not None), None)
    larger = tokenizer is not base and any(tokenizer is t for _, t in found)
    if larger and own and _Words.of(tokenizer).respelled(_Words.of(base)):
        larger = False
    if templates and (larger or not own):
        first = next(iter(templates.values()))
        if first != own:
            own, tokenizer = first, _with_template(tokenizer, first)
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


def _texts_differ(a: Any, b: Any, ours: _Words, theirs: _Words) -> str:
    """How two tokenizers differ in the tokens of texts, `a` having all tokens of `b`."""
    for text in _probes(a, b, ours, theirs):
        mine, others = _prompt(text, a), _prompt(text, b)
        # A text with a word that only one of them knows says nothing.
        if mine != others and all(token in theirs.by_id for token in mine):
            if a.eos_token_id != b.eos_token_id:
                return (
                    "the same text gives different tokens (eos_token_id is "
                    f"{b.eos_token_id} and {a.eos_token_id})"
                )
            return "the same text gives different tokens"
    return ""


def _probes(a: Any, b: Any, ours: _Words, theirs: _Words) -> Iterator[str]:
    """Texts that show a difference; if a fast tokenizer's parts differ, all words of both."""
    yield _PROBE_TEXT
    parts = [_parts(tokenizer) for tokenizer in (a, b)]
    if parts[0] and parts[0] == parts[1]:
        return
    core = [{k: v for k, v in part.items() if k not in _AROUND} for part in parts]
    same = {i for i, word in theirs.by_id.items() if ours.by_id.get(i) == word}
    if not core[0] or core[0] != core[1]:
        plain = [theirs.by_id[i] for i in sorted(same - theirs.added - ours.added)]
        texts = [b.convert_tokens_to_string([word]) for word in plain]
        for start in range(0, len(texts), 1000):
            yield " ".join(texts[start : start + 1000])
            yield "".join(texts[start : start + 1000])
    for token in sorted(same & (theirs.added | ours.added)):
        word = theirs.by_id[token]
        yield f"x {word} y{word}z"


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer that make a text's tokens; empty for a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    return {key: value for key, value in parts.items() if key not in _IDLE}


def _prompt(text: str, tokenizer: Any) -> list[int]:
    """A text's tokens, as in a prompt, without the token that begins it."""
    if getattr(tokenizer, "is_fast", False):
        ids = encode(text, tokenizer)[0]
    else:
        ids = list(tokenizer(text)["input_ids"])
    begun = ids[:1] == [tokenizer.bos_token_id] and _beginning(tokenizer) is not None
    return ids[1:] if begun else ids


def _beginning(tokenizer: Any) -> str | None:
    """The token that the tokenizer puts before a text."""
    ids = list(tokenizer("a")["input_ids"])
    begins = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token if begins else None


def _ending(tokenizer: Any) -> str:
    """The token that ends a text, and whether each text gets it."""
    if tokenizer.eos_token is None:
        return "no token"
    appended = list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]
    return f"{tokenizer.eos_token!r}{'' if appended else ' not'} appended"
