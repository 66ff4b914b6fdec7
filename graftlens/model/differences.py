"""How sources differ from the base in what affects no number, or in what can be carried.

What differs and cannot be carried exactly is refused in `pairing.py`; all else is told, here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd

#: What is done about a difference: it reaches no number; each source keeps its own; it goes along
#: with the components or positions that a source is used at; the source is read in another form.
Handling = Literal["ignored", "its own", "carried", "converted"]

COLUMNS = ("source", "key", "base", "value", "handling", "done")

#: The key of what a source is made of.
MADE_OF = "made of"

#: Keys that name a place or a version, and no property of the checkpoint.
_PLACES = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")

#: What keys of generation settings begin with.
GENERATION = "generation "

_ROPE = (
    *("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"),
    *("original_max_position_embeddings", "rotary_emb_base", "rope_interleaved"),
    *("partial_rotary_factor", "rotary_pct"),
)
_OWN_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Difference:
    """One way in which a source differs from the base, and what was done about it.

    Attributes:
        source: the source.
        key: what differs: a key of its config, or a few words.
        base, value: the base's and the source's own, plain values; lists and mappings as JSON.
        handling: what kind of thing was done.
        done: the same in words.
    """

    source: str
    key: str
    base: Any
    value: Any
    handling: Handling
    done: str

    def line(self, base: str) -> str:
        """The difference as a sentence; `base` is the base's name."""
        values = f"{_shown(self.value)} ({base}: {_shown(self.base)})"
        if self.source == base:
            values = _shown(self.value)
        return f"{self.source}: {self.key} {values}: {self.handling}, {self.done}"


def told(key: str, source: str, base: Any, value: Any, handling: Handling, done: str) -> Difference:
    """A difference, with its values made plain."""
    return Difference(source, key, _plain(base), _plain(value), handling, done)


def table(differences: Iterable[Difference]) -> pd.DataFrame:
    """One row per difference."""
    rows = [asdict(difference) for difference in differences]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(object)


def of_configs(
    source: str, base: Any, other: Any, *, same_tables: bool, context: int, common: int
) -> list[Difference]:
    """The differences of two Hugging Face configs whose sources make a pair.

    Args:
        source: the name of the second one's source.
        base, other: the configs; None (a HookedTransformer) differs in nothing.
        same_tables: whether their rotary tables are the same.
        context: the model's context.
        common: how many tokens all sources have.
    """
    if base is None or other is None:
        return []
    ours, theirs = settings(base), settings(other)
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if a != b and key not in _PLACES:
            handling, done = _done(key, same_tables, context)
            done = lacking(common) if key == "vocab_size" else done
            found.append(told(key, source, a, b, handling, done))
    return found


def lacking(common: int) -> str:
    """What is done about tokens that only some sources have."""
    return (
        "a token that a source lacks has the logit -inf where it unembeds; KL, JS, entropy and "
        f"attribution are over the {common} tokens that all sources have, renormalised"
    )


def settings(config: Any) -> dict[str, Any]:
    """All of a Hugging Face config's settings as plain values."""
    plain = json.loads(config.to_json_string(use_diff=False))
    plain.pop("_attn_implementation", None)
    plain["attn_implementation"] = getattr(config, "_attn_implementation", None)
    return {key: _canonical(value) for key, value in plain.items()}


def _done(key: str, same_tables: bool, context: int) -> tuple[Handling, str]:
    """What is done about a key of configs that make a pair."""
    if key in _ROPE and not same_tables:
        return "carried", "tables go with q at the query's position and with k at the key's"
    if key in _ROPE:
        return "ignored", "the rotary tables are the same"
    if key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        return "ignored", f"positions are rotary; the model's context is {context}"
    if key == "vocab_size":
        return "carried", ""
    if key.endswith("bias"):
        return "carried", "a bias that a source lacks is zero there"
    if key in ("tie_word_embeddings", "tie_encoder_decoder"):
        return "carried", "embed and unembed are two components"
    if key in _OWN_TOKENS:
        return "its own", "generate uses each source's"
    if key in ("dtype", "torch_dtype"):
        return "ignored", "the files say which dtypes they hold"
    if "drop" in key:
        return "ignored", "it acts in training only"
    return "ignored", "no number of the forward pass depends on it"


def of_generation(
    source: str, base: Mapping[str, Any], other: Mapping[str, Any]
) -> list[Difference]:
    """The differences of two generation settings, but for the tokens that configs name, too."""
    found = []
    for key in sorted(base.keys() | other.keys()):
        a, b = _canonical(base.get(key)), _canonical(other.get(key))
        if a == b or key in (*_PLACES, *_OWN_TOKENS) or key.startswith("_"):
            continue
        done = "generate has arguments of its own"
        found.append(told(GENERATION + key, source, a, b, "ignored", done))
    return found


def of_tokens(source: str, base: Sequence[Any], other: Sequence[Any]) -> list[Difference]:
    """The differences of the tokens that end a generation and that fill up behind it."""
    keys = ("eos_token_id", "pad_token_id")
    return [
        told(GENERATION + key, source, a, b, "its own", "generate uses each source's")
        for key, a, b in zip(keys, map(_canonical, base), map(_canonical, other), strict=True)
        if a != b
    ]


def without_repetition(rows: Sequence[Difference]) -> list[Difference]:
    """Differences without those of generation settings that only repeat the config's."""
    known = {(row.key, row.base, row.value) for row in rows}
    return [
        row
        for row in rows
        if (row.key.removeprefix(GENERATION), row.base, row.value) not in known
        or not row.key.startswith(GENERATION)
    ]


def _canonical(value: Any) -> Any:
    """Without what is not set, and one token for a list of one."""
    if isinstance(value, Mapping):
        kept = {k: _canonical(v) for k, v in value.items() if k != "type" and v is not None}
        return kept or None
    if isinstance(value, list | tuple):
        listed = [_canonical(v) for v in value]
        return listed[0] if len(listed) == 1 and isinstance(listed[0], int) else listed
    return value


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
