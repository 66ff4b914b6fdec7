"""The sources' tokenizers: read, and compared by the tokens that they give."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlens.model.arch import PairError
from graftlens.model.places import place_of, said

_PROBE_TEXT = " The first of 1,234 cafés opened in São Tomé — didn't it?\n\tYes: 東京 \U0001f642"


def read_tokenizer(path: str) -> Any:
    """The tokenizer beside a checkpoint, or None where a local folder has none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if folder.is_dir() and not any((folder / n).is_file() for n in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of the hub, the network, or whatever damaged files set off
        raise PairError(
            f"the tokenizer of {path} could not be loaded ({said(error)}). Save or fetch it again; "
            "code that comes with a checkpoint (auto_map) is never run."
        ) from error


def unaltered(tokenizer: Any) -> Any:
    """A TransformerLens model's tokenizer as its checkpoint has it, where that can be loaded.

    TransformerLens reloads tokenizers so that they always put a BOS first, and takes it off again
    in its own `to_tokens`. Here BOS is the tokenizer's own choice.
    """
    path = getattr(tokenizer, "name_or_path", "")
    try:
        return (read_tokenizer(path) if path else None) or tokenizer
    except (OSError, ValueError):
        return tokenizer


def shared_tokenizer(found: Sequence[tuple[str, Any]], given: Any) -> Any:
    """The one tokenizer of all sources: the one given, or the first where all agree.

    Args:
        found: each source's name and its tokenizer, None where it brought none.
        given: a tokenizer, or where to load one from; None to take the sources' own.

    Raises:
        PairError: tokenizers that give different tokens.
    """
    if given is not None:
        if isinstance(given, str | Path):
            files = ("tokenizer_config.json", "tokenizer.json", "config.json")
            loaded = read_tokenizer(place_of(f"tokenizer={str(given)!r}", given, files))
            if loaded is None:
                raise PairError(f"tokenizer={str(given)!r}: this folder holds no tokenizer.")
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
    return first


def _tokenizers_differ(a: Any, b: Any) -> str:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        odd = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        return f"{len(odd)} vocabulary entries, such as {odd[0]!r}"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)} and {getattr(b, name)}"
    if a(_PROBE_TEXT)["input_ids"] != b(_PROBE_TEXT)["input_ids"]:
        return "the same text gives other tokens"
    return ""
