"""Whether sources make a pair: what differs and can be carried, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from graftlens.components import Component
from graftlens.model.arch import (
    Architecture,
    PairError,
    UnsupportedArchitectureError,
    brief,
    named_facts,
)
from graftlens.model.differences import (
    Difference,
    lacking,
    of_configs,
    of_generation,
    of_tokens,
    told,
    without_repetition,
)
from graftlens.model.rotary import Rotary
from graftlens.model.source import Source

C = Component

#: Facts that may differ, because components, positions or sources carry them.
_MERGED = "merged into the base's weights in float32"

_CARRIED = ("d_vocab", "rope_kinds", "rope_limit")


def pair(sources: Sequence[Source]) -> tuple[Architecture, Rotary | None, list[Difference]]:
    """The architecture and the rotary tables of sources that make a pair, and how they differ.

    The architecture has the longest context where positions are rotary, the largest vocabulary, and
    the shortest text whose length changes a table. A bias that only some sources have is made zero
    in the others.

    Raises:
        PairError: sources that differ in what no component carries, shapes that contradict them, or
            weights that are quantised or not finite.
    """
    base = sources[0]
    told_biases = _fill_biases(sources)
    for source in sources:
        _check_facts(base, source)
    rotary = None
    if base.rotary is not None:
        rotary = Rotary([(_rotary_of(s), s.arch) for s in sources])
    limits = [s.arch.rope_limit for s in sources if s.arch.rope_limit is not None]
    arch = replace(
        base.arch,
        n_ctx=max(s.arch.n_ctx for s in sources),
        d_vocab=max(s.arch.d_vocab for s in sources),
        rope_limit=min(limits, default=None),
    )
    common = min(s.arch.d_vocab for s in sources)
    found: list[Difference] = []
    for number, source in enumerate(sources):
        _check_weights(base, source)
        _check_additions(source)
        found += source.notes
        if source.merged:
            found.append(told("adapter", source.name, None, source.merged, "converted", _MERGED))
        if number == 0 or source.made is not None:
            continue
        same = rotary is None or rotary.slots[0] == rotary.slots[number]
        rows = of_configs(
            source.name,
            base.config,
            source.config,
            same_tables=same,
            context=arch.n_ctx,
            common=common,
        )
        keys = {row.key for row in rows}
        rows += _of_facts(base, source, same, keys, common)
        rows += [row for row in told_biases if row.source == source.name and not _has_bias(keys)]
        rows += of_generation(source.name, base.generation, source.generation)
        rows += of_tokens(
            source.name, (base.end_tokens, base.pad_token), (source.end_tokens, source.pad_token)
        )
        found += without_repetition(rows)
    return arch, rotary, found


def _rotary_of(source: Source) -> nn.Module:
    assert source.rotary is not None, "the same facts have the same kind of positions"
    return source.rotary


def _has_bias(keys: set[str]) -> bool:
    return any(key.endswith("bias") for key in keys)


def _of_facts(
    base: Source, source: Source, same_tables: bool, keys: set[str], common: int
) -> list[Difference]:
    """What differs although no config's key says so."""
    found = []
    ours, theirs = base.arch, source.arch
    if ours.d_vocab != theirs.d_vocab and "vocab_size" not in keys:
        sizes = ours.d_vocab, theirs.d_vocab
        found.append(told("vocab_size", source.name, *sizes, "carried", lacking(common)))
    if not same_tables and not any(key.startswith("rope") for key in keys):
        done = "tables go with q at the query's position and with k at the key's"
        found.append(told("rotary tables", source.name, "its own", "its own", "carried", done))
    return found


# -- facts -------------------------------------------------------------------------------------


def _check_facts(base: Source, other: Source) -> None:
    """Refuse what no component carries, with the config's key and both values."""
    arch = comparable(other.arch, base.arch)
    if arch == base.arch:
        return
    ours, theirs = vars(base.arch), vars(arch)
    differing = [name for name in ours if ours[name] != theirs[name]]
    named = named_facts(differing, base.config, other.config) or [
        f"{name} ({brief(ours[name])} and {brief(theirs[name])})" for name in differing
    ]
    raise PairError(
        f"{base.name!r} ({base.origin}) and {other.name!r} ({other.origin}) differ in "
        f"architecture: {', '.join(named)}. No component carries that from one to the other: give "
        "sources that agree in it."
    )


def comparable(arch: Architecture, base: Architecture) -> Architecture:
    """An architecture in which all that changes no number, or that can be carried, is as in the
    base's."""
    arch = replace(arch, **{name: getattr(base, name) for name in _CARRIED})
    if arch.rotary_dim and base.rotary_dim:  # tables turn as much of a head as they are wide
        arch = replace(arch, n_ctx=base.n_ctx, rotary_dim=base.rotary_dim)
    if arch.act_fn != base.act_fn:
        x = torch.linspace(-8, 8, 257)
        if torch.equal(activation(arch.act_fn)(x), activation(base.act_fn)(x)):
            arch = replace(arch, act_fn=base.act_fn)
    return arch


def activation(name: str) -> nn.Module:
    """A non-linearity by transformers' name for it.

    Raises:
        UnsupportedArchitectureError: a name that transformers does not have.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UnsupportedArchitectureError(
            f"act_fn={name!r} is not supported. Supported are transformers' activations: "
            f"{' '.join(sorted(ACT2FN))}."
        )
    return ACT2FN[name]


# -- weights -----------------------------------------------------------------------------------


def _check_weights(base: Source, other: Source) -> None:
    if base.weights.keys() != other.weights.keys():
        odd = sorted(base.weights.keys() ^ other.weights.keys(), key=str)[0]
        component, layer, parameter = odd
        raise PairError(
            f"only one of {base.name!r} and {other.name!r} has a {parameter} for {component}"
            f"{'' if layer is None else f' in layer {layer}'}."
        )
    for (component, layer, parameter), tensor in other.weights.items():
        if other is not base and tensor is base.weights[component, layer, parameter]:
            continue
        where = (
            f"{other.name!r}: {component} {parameter}{'' if layer is None else f', layer {layer}'}"
        )
        shape, expected = tensor.shape, base.weights[component, layer, parameter].shape
        if component in (C.EMBED, C.UNEMBED):  # each has its own tokens
            shape, expected = shape[1:], expected[1:]
        if shape != expected:
            raise PairError(
                f"{where} has shape {tuple(tensor.shape)}; {base.name!r} has "
                f"{tuple(base.weights[component, layer, parameter].shape)}."
            )
        if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
            raise PairError(
                f"{where} is {tensor.dtype}: quantised weights cannot be grafted exactly."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PairError(
                f"{where} holds values that are not finite. Training diverged, or the file is "
                "damaged; load an earlier checkpoint."
            )


def _check_additions(source: Source) -> None:
    for (component, layer), own in source.additions.items():
        where = f"{source.name!r}: {component} weight{'' if layer is None else f', layer {layer}'}"
        if not all(bool(torch.isfinite(t).all()) for one in own for t in one.tensors):
            raise PairError(
                f"{where} holds values that are not finite. Training diverged, or the file is "
                "damaged; load an earlier checkpoint."
            )


def _fill_biases(sources: Sequence[Source]) -> list[Difference]:
    """Make a bias that only some sources have zero in the others."""
    sites = {site for source in sources for site in source.weights if site[2] == "bias"}
    has = {source.name: sites & source.weights.keys() for source in sources}
    found = []
    for source in sources[1:]:
        odd = {component for component, _, _ in has[source.name] ^ has[sources[0].name]}
        if odd:
            mine = {component for component, _, _ in has[source.name]}
            listed = " ".join(component for component in Component if component in odd)
            values = ("none", "its own") if odd <= mine else ("its own", "none")
            done = "a bias that a source lacks is zero there"
            found.append(told(f"bias of {listed}", source.name, *values, "carried", done))
    for source in sources:
        for component, layer, parameter in sites - source.weights.keys():
            weight = source.weights.get((component, layer, "weight"))
            if weight is not None:
                source.weights[component, layer, parameter] = weight.new_zeros(weight.shape[0])
    return found
