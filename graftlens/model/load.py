"""Loading sources: read each checkpoint, and check that they make a pair.

What is not exactly supported is refused. Loading reads Hugging Face state dicts directly, so a
loaded model that is given as a source is neither changed nor kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.graft import Graft, Rule
from graftlens.model.adapters import Base, preview_adapter, read_adapter, read_peft, refuse_as_base
from graftlens.model.additions import Addition, Additions
from graftlens.model.arch import (
    Architecture,
    PairError,
    UnsupportedArchitectureError,
    brief,
)
from graftlens.model.hooked import read_hooked
from graftlens.model.identity import rotary_tables
from graftlens.model.locations import is_adapter
from graftlens.model.source import (
    Source,
    preview_checkpoint,
    read_bridge,
    read_checkpoint,
    read_transformers,
)
from graftlens.model.tokenizers import shared_tokenizer, with_chat_template
from graftlens.model.weights import Weights

WIDER = 'float16 overflows: load with dtype="bfloat16" or dtype="float32".'


@dataclass(frozen=True)
class Loaded:
    """Sources that make a pair, checked: what a `GraftedTransformer` is assembled from.

    Attributes:
        arch: the architecture that they share.
        sources: what was read of each, the base first, in their own dtypes.
        weights: source name -> its tensors, on the device and in the dtype to run in.
        additions: source name -> what it adds to its matrices, likewise.
        rotary: the rotary module, None with learned positions.
        activation: the MLP's non-linearity.
        tokenizer: the tokenizer that they share, None if no source has one.
        device, dtype: where and in what to run.
        chat_template: whose chat template the tokenizer has, in words; empty where it has none.
    """

    arch: Architecture
    sources: tuple[Source, ...]
    weights: dict[str, Weights]
    rotary: nn.Module | None
    activation: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    chat_template: str = ""
    additions: Mapping[str, Additions] = field(default_factory=dict)


def load(
    sources: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    chat_template: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Loaded:
    """Read two or more sources of one architecture, and check that they make a pair.

    Args:
        sources: name -> source, the base first. A source is a hub id, a checkpoint folder, a
            PEFT/LoRA adapter folder (applied to the base), a transformers model, a
            `TransformerBridge` without compatibility mode, or with TransformerLens 3.9 a
            `HookedTransformer` whose weights were not processed.
        tokenizer: a fast tokenizer, or where to load one from; otherwise the sources' own.
        chat_template: what writes conversations, as Jinja's text or a file that holds it; otherwise
            the base's, else that of the first source that has one.
        device: where to put the weights; the GPU if there is one, else the CPU.
        dtype: the dtype to run in. Left out, it is float32 on the CPU (float64 for checkpoints in
            float64) and the checkpoints' own on a GPU, and checkpoints of different dtypes are
            refused. A checkpoint's own dtype is that of its files, regardless of its config.

    Raises:
        PairError: sources that differ in architecture, shapes, dtype or tokenizer, that are not
            finite, or that were processed (folded); files that are missing, damaged or quantised;
            float16 where a number overflows in it. A bias that only some sources have is not
            a difference: it is zero in the others. Neither are contexts of different lengths with
            rotary positions: the pair's is the longest. Rotary settings are compared by the tables
                that they come to.
        ValueError: a source's name that the text form of grafts could not hold, or a GPU that does
            not exist.
        UnsupportedArchitectureError: a family or option that is not exactly supported.
    """
    _check_names(sources)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}, but this PyTorch sees no GPU. Leave device out, or write "
            'device="cpu".'
        )
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise PairError(
            f"dtype={dtype!r} is not a floating-point dtype of torch. "
            'Write, for example, "bfloat16".'
        )
    if wanted is not None and torch.finfo(wanted).bits < 16:
        raise PairError(
            f"dtype={dtype!r}: the forward runs in float64, float32, bfloat16 or float16. Give one "
            "of them."
        )

    read = _read_all(sources)
    _fill_biases(read)
    for source in read:
        _check_pair(read[0], source)
        _check_additions(source)
    arch = _pair_arch(read)
    own = {name: _dtypes(source) for name, source in zip(sources, read, strict=True)}
    if wanted is None:
        distinct = {d for found in own.values() for d in found}
        if len(distinct) > 1:
            listed = ", ".join(f"{n}: {' '.join(map(short, f))}" for n, f in own.items())
            raise PairError(
                f"the sources' dtypes differ ({listed}). Name the one to run in, such as "
                "dtype=torch.float32."
            )
        (wanted,) = distinct
        if target.type == "cpu":
            wanted = torch.promote_types(wanted, torch.float32)

    found = [(s.name, s.tokenizer) for s in read]
    shared, told = with_chat_template(shared_tokenizer(found, tokenizer), found, chat_template)
    put = _Placing(target, wanted)
    prepared = {s.name: {site: put(t) for site, t in s.weights.items()} for s in read}
    if wanted is torch.float16:
        _refuse_overflow(prepared)
    return Loaded(
        arch,
        tuple(read),
        _share_tied(prepared),
        # Tables that are kept, as a HookedTransformer's, end with the source's context.
        max(read, key=lambda source: source.arch.n_ctx).rotary,
        _activation(arch.act_fn),
        shared,
        target,
        wanted,
        told,
        {s.name: {site: put.all(own) for site, own in s.additions.items()} for s in read},
    )


def preview(
    sources: Mapping[str, str | Path],
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
) -> tuple[Architecture, Any]:
    """The architecture and tokenizer that `load` would find, without reading any weight.

    Args:
        sources: name -> hub id, checkpoint folder or PEFT adapter folder, the base first.
        tokenizer: where to load a tokenizer from; otherwise the sources' own.
        chat_template: as in `load`.

    Returns:
        The architecture, and the tokenizer or None if no source has one.

    Raises:
        PairError: a source that does not exist or whose files are missing or damaged (of a folder
            their headers are read), or sources whose architecture or tokenizers differ.
        ValueError: a source's name that the text form of grafts could not hold.
        UnsupportedArchitectureError: a family or option that is not exactly supported.
    """
    _check_names(sources)
    read: list[Source] = []
    adapters: list[tuple[str, Any]] = []
    for name, given in sources.items():
        if is_adapter(given):
            folder = Path(given).expanduser()
            if not read:
                refuse_as_base(name)
            adapters.append((name, preview_adapter(name, folder)))
            continue
        read.append(preview_checkpoint(name, str(given)))
    for source in read:
        _check_pair(read[0], source)
    found = [(s.name, s.tokenizer) for s in read] + adapters
    shared = shared_tokenizer(found, tokenizer)
    return _pair_arch(read), with_chat_template(shared, found, chat_template)[0]


def _check_names(sources: Mapping[str, Any]) -> None:
    if not isinstance(sources, Mapping) or len(sources) < 2:
        # Not the value itself, which may be of any kind and length.
        given = (
            " ".join(map(str, sources)) if isinstance(sources, Mapping) else type(sources).__name__
        )
        raise PairError(
            f"sources: {given or 'none'}. Give two or more as a mapping from names, the base "
            'first, such as {"pre": "org/model", "sft": "path/to/checkpoint"}.'
        )
    for name in sources:
        Rule(name, Graft.rule("x").rules[0].at)  # the grammar's own check of a source's name


# -- reading one source ------------------------------------------------------------------------


def _read_all(sources: Mapping[str, Any]) -> list[Source]:
    read: list[Source] = []
    base: Base | None = None
    for name, given in sources.items():
        if not (isinstance(given, str | Path) and is_adapter(given)):
            read.append(_read(name, given))
            continue
        if not read:
            refuse_as_base(name)
        if base is None:
            base = Base.of(name, next(iter(sources.values())), read[0])
        read.append(read_adapter(name, Path(given).expanduser(), base))
    return read


def _read(name: str, given: Any) -> Source:
    kinds = {cls.__name__ for cls in type(given).__mro__}
    if isinstance(given, str | Path):
        return read_checkpoint(name, str(given))
    if "TransformerBridge" in kinds:
        return read_bridge(name, given)
    if "HookedTransformer" in kinds:
        return read_hooked(name, given)
    if "PeftModel" in kinds:
        # The adapter's own tensors are float32 whatever the model's are.
        dtypes = (given.get_base_model().get_input_embeddings().weight.dtype,)
        return replace(read_peft(name, given, f"{name} (PEFT)"), dtypes=dtypes)
    if isinstance(given, nn.Module) and hasattr(given, "config"):
        return read_transformers(name, given, f"{name} ({type(given).__name__})")
    raise PairError(
        f"source {name!r} is a {type(given).__name__}. Give a hub id, a checkpoint folder, a PEFT "
        "adapter folder, a transformers model, or a TransformerBridge."
    )


class _Placing:
    """Puts tensors where the model runs, in its dtype; what shares memory still does afterwards."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._made: dict[object, Tensor] = {}
        self._parameters: dict[int, nn.Parameter] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._made:
            there = tensor.detach().to(self.device, self.dtype)
            self._made[key] = _own_storage(there.contiguous())
        return self._made[key]

    def all(self, additions: Sequence[Addition]) -> tuple[Addition, ...]:
        """Additions whose tensors are there; those that add nothing are left out."""
        return tuple(
            one.like(*map(self._of_addition, one.tensors)) for one in additions if one.adds
        )

    def _of_addition(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        there = self(tensor)
        return self._parameters.setdefault(id(there), nn.Parameter(there))


# -- checks ------------------------------------------------------------------------------------


def _check_pair(base: Source, other: Source) -> None:
    arch = _comparable(other.arch, base.arch)
    if base.arch != arch:
        ours, theirs = vars(base.arch), vars(arch)
        differing = [
            f"{k} ({brief(ours[k])} and {brief(theirs[k])})" for k in ours if ours[k] != theirs[k]
        ]
        hint = ""
        if base.arch.d_vocab != other.arch.d_vocab:
            hint = (
                " Where finetuning added tokens, resize the base's embeddings to match: "
                "base.resize_token_embeddings(n)."
            )
        raise PairError(
            f"{base.name!r} ({base.origin}) and {other.name!r} ({other.origin}) differ in "
            f"architecture: {', '.join(differing)}.{hint}"
        )
    if not _same_tables(base, other):
        first, second = _rope_settings(base), _rope_settings(other)
        if first == second:  # some kinds of tables depend on the context's length
            first, second = base.arch.n_ctx, other.arch.n_ctx
        raise PairError(
            f"{base.name!r} and {other.name!r} differ in rope_parameters: {first} and {second}. "
            "Positions must mean the same in both."
        )
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
        if tensor.shape != base.weights[component, layer, parameter].shape:
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


def _comparable(arch: Architecture, base: Architecture) -> Architecture:
    """An architecture in which everything that changes no number is spelled as in the base's."""
    if arch.rotary_dim and base.rotary_dim:
        arch = replace(arch, n_ctx=base.n_ctx)
    if arch.act_fn != base.act_fn:
        x = torch.linspace(-8, 8, 257)
        if torch.equal(_activation(arch.act_fn)(x), _activation(base.act_fn)(x)):
            arch = replace(arch, act_fn=base.act_fn)
    return arch


def _pair_arch(read: list[Source]) -> Architecture:
    """The architecture of sources that make a pair: with rotary positions, the longest context."""
    return replace(read[0].arch, n_ctx=max(source.arch.n_ctx for source in read))


def _same_tables(base: Source, other: Source) -> bool:
    if base.rotary is None or other.rotary is None or base is other:
        return True
    # A HookedTransformer keeps its tables, which end with its context.
    kept = [s.arch.n_ctx for s in (base, other) if s.config is None]
    longest = min([1 << 17, *kept])
    ours = rotary_tables(base.arch, base.rotary, longest)
    theirs = rotary_tables(other.arch, other.rotary, longest)
    if type(base.rotary) is type(other.rotary):
        return all(map(torch.equal, ours, theirs))
    # It also computes them in another way, with different last digits.
    return all(torch.allclose(a, b, atol=1e-2) for a, b in zip(ours, theirs, strict=True))


def _rope_settings(source: Source) -> Any:
    return getattr(source.config, "rope_parameters", None)


def _refuse_overflow(prepared: Mapping[str, Weights]) -> None:
    for name, weights in prepared.items():
        for (component, layer, parameter), tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                where = "" if layer is None else f", layer {layer}"
                raise PairError(
                    f"source {name!r}: {component} {parameter}{where} has numbers beyond float16's "
                    "65504. " + WIDER
                )


def _fill_biases(read: list[Source]) -> None:
    """A bias that only some sources have is zero in the others."""
    sites = {site for source in read for site in source.weights if site[2] == "bias"}
    for source in read:
        for component, layer, parameter in sites - source.weights.keys():
            weight = source.weights.get((component, layer, "weight"))
            if weight is not None:
                source.weights[component, layer, parameter] = weight.new_zeros(weight.shape[0])


def _dtypes(source: Source) -> list[torch.dtype]:
    return sorted(source.dtypes or {t.dtype for t in source.weights.values()}, key=str)


def _own_storage(tensor: Tensor) -> Tensor:
    """A part of a fused projection as a separate tensor: it must not keep the others alive."""
    alone = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def short(dtype: torch.dtype) -> str:
    """A dtype's name in messages: `float32`."""
    return str(dtype).removeprefix("torch.")


def _share_tied(prepared: dict[str, Weights]) -> dict[str, Weights]:
    """Keep one tensor where embedding and unembedding are the same."""
    for weights in prepared.values():
        embed = weights[Component.EMBED, None, "weight"]
        site = (Component.UNEMBED, None, "weight")
        if weights[site].shape == embed.shape and torch.equal(weights[site], embed):
            weights[site] = embed
    return prepared


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UnsupportedArchitectureError(
            f"act_fn={name!r} is not supported. Supported are transformers' activations: "
            f"{' '.join(sorted(ACT2FN))}."
        )
    return ACT2FN[name]
