"""What decides a source's numbers: weights, the config's facts, rotary tables, the tokenizer."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftlens.folder import json_digest
from graftlens.model.arch import (
    FAMILIES,
    Architecture,
    UnsupportedArchitectureError,
    architecture,
)
from graftlens.model.made import Made, in_order
from graftlens.model.rotary import LONGEST, Table, lengths_that_tell, samples
from graftlens.model.weights import Sourced

#: What transformers keeps in a config although no number depends on it, or what is covered
#: elsewhere.
_IDLE = (
    *("_name_or_path", "architectures", "auto_map", "transformers_version"),
    *("dtype", "torch_dtype", "max_position_embeddings", "rope_scaling"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
)

#: Kinds of rotary tables that depend on how long a context the config names.
_BY_CONTEXT = {"dynamic", "longrope", "yarn"}


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of everything that decides a tokenizer's tokens; None without one."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        content = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # those of the last call
            content.pop(setting, None)
    if template := getattr(tokenizer, "chat_template", None):
        content["chat template"] = template
    content["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return json_digest(content)


class _Asked:
    """A config that remembers which settings were read."""

    def __init__(self, config: Any) -> None:
        self.config, self.names = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.config, name)


def config_settings(config: Any) -> dict[str, Any]:
    """A Hugging Face config's settings that decide numbers, as plain values.

    For a supported family, those that its architecture is read from, and the dropouts of training;
    for any other, all that transformers knows.
    """
    asked = _Asked(config)
    with contextlib.suppress(UnsupportedArchitectureError):
        architecture(asked)
    plain = json.loads(config.to_json_string(use_diff=False))
    known = config.model_type in FAMILIES
    return {
        name: _canonical(value)
        for name, value in sorted(plain.items())
        if name not in _IDLE
        and value is not None
        and (not known or name in asked.names or "drop" in name)
    }


def fingerprint(
    weights: Sequence[tuple[str, Sourced]], index: int, facts: str, known: dict[Any, bytes]
) -> str:
    """SHA-256 of one source's tensors and of the facts about it.

    Args:
        weights: the model's weights by name.
        index: the source's number.
        facts: what else decides its numbers.
        known: digests of tensors by the memory that they are in, to which those read now are
            added.
    """

    def of(tensor: Tensor) -> bytes:
        # Not id(): that of a cut tensor is soon another one's.
        key = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in known:
            raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            known[key] = hashlib.sha256(raw.data).digest()
        return known[key]

    digest = hashlib.sha256()
    for name, weight in weights:
        tensor = weight.whole(index)
        tensor = tensor[: weight.sizes[index]] if weight.sizes else tensor
        digest.update(name.encode() + of(tensor))
        for added in weight.additions(index):
            digest.update(repr((type(added).__name__, added.scale)).encode())
            digest.update(b"".join(map(of, added.tensors)))
    digest.update(facts.encode())
    return digest.hexdigest()


def prints_of_made(
    made: Mapping[str, Made], prints: Mapping[str, str], base: str
) -> dict[str, str]:
    """The fingerprints of sources that are made of others: the parts', the base's, and how.

    Args:
        made: name -> what the source is made of.
        prints: the fingerprints of all other sources.
        base: the base's name.
    """
    found = dict(prints)
    for name in in_order(made):
        parts = [found[part] for part in (base, *made[name].parts)]
        found[name] = json_digest([parts, made[name].model_dump(mode="json", exclude={"of"})])
    return {name: found[name] for name in made}


def facts_digest(arch: Architecture, config: Any, rotary: nn.Module | None) -> str:
    """SHA-256 of what the forward pass takes from a config, however the config spells it."""
    facts: dict[str, Any] = {name: _plain(value) for name, value in vars(arch).items()}
    if arch.rotary_dim:
        del facts["n_ctx"]  # the length of a text decides its tables, not what the config allows
        facts["rotary"] = _rotary_facts(arch, config, rotary)
    return json_digest(facts)


def rotary_tables(arch: Architecture, rotary: nn.Module, longest: int = LONGEST) -> list[Tensor]:
    """cos and sin of every kind of table, at positions and in texts long enough to distinguish
    them.

    Args:
        arch: the architecture.
        rotary: its rotary module, which is left unchanged.
        longest: positions from this one on are left out if tables do not depend on the length.
    """
    lengths = lengths_that_tell(arch.rope_limit, longest)
    kinds = dict.fromkeys(arch.rope_kinds)
    tables = [Table(rotary, kind, arch.rope_limit, arch.n_ctx) for kind in kinds]
    return [sample for table in tables for sample in samples(table, lengths)]


def _rotary_facts(arch: Architecture, config: Any, rotary: nn.Module | None) -> Any:
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        assert rotary is not None
        digest = hashlib.sha256()
        for table in rotary_tables(arch, rotary, min(arch.n_ctx, 1 << 17)):
            digest.update(table.float().cpu().numpy().tobytes())
        return digest.hexdigest()
    # From the config: tables differ in their last bits between machines.
    used = {str(part) for part in _values(parameters)}
    context = config.max_position_embeddings if used & _BY_CONTEXT else None
    return _plain([_canonical(parameters), context])


def _canonical(value: Any) -> Any:
    """Without the old spelling of `rope_type`, and without what is not set."""
    if isinstance(value, Mapping):
        return {k: _canonical(v) for k, v in value.items() if k != "type" and v is not None}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _values(inner)]
    return [value]


def _plain(value: Any) -> Any:
    """A value in JSON form; the last digits of a root may differ between machines."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    return value
