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
from graftlens.configfile import ConfigError
from graftlens.graft import Graft, Rule
from graftlens.model.adapters import Base, preview_adapter, read_adapter, read_peft, refuse_as_base
from graftlens.model.additions import Addition, Additions
from graftlens.model.arch import Architecture, PairError
from graftlens.model.differences import MADE_OF, Difference, told
from graftlens.model.hooked import read_hooked
from graftlens.model.locations import is_adapter
from graftlens.model.made import Each, Made, made_problems, source_given
from graftlens.model.making import refuse_unlike, with_made
from graftlens.model.pairing import activation, pair
from graftlens.model.rotary import Rotary
from graftlens.model.source import (
    Source,
    preview_checkpoint,
    read_bridge,
    read_checkpoint,
    read_transformers,
)
from graftlens.model.stored import widest
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
        rotary: the rotary tables of all sources, None with learned positions.
        activation: the MLP's non-linearity.
        tokenizer: the tokenizer that they share, None if no source has one.
        device, dtype: where and in what to run.
        chat_template: whose chat template the tokenizer has, in words; empty where it has none.
        differences: how the sources differ from the base, and what was done about it.
    """

    arch: Architecture
    sources: tuple[Source, ...]
    weights: dict[str, Weights]
    rotary: Rotary | None
    activation: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    chat_template: str = ""
    additions: Mapping[str, Additions] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()


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
        sources: name -> source, the base first. A source is a hub id, a checkpoint folder, a GGUF
            file, a PEFT adapter folder (applied to the base), a transformers model, a `PeftModel`,
            a `TransformerBridge` without compatibility mode, or with TransformerLens 3.9 a
            `HookedTransformer` whose weights were not processed; or a mapping such as
            `{"of": "sft", "rank": 8}`, which makes it of other sources (`graftlens.model.made`).
        tokenizer: a fast tokenizer, or where to load one from; otherwise the sources' own.
        chat_template: what writes conversations, as Jinja's text or a file that holds it; otherwise
            the base's, else that of the first source that has one.
        device: where to put the weights; the GPU if there is one, else the CPU.
        dtype: the dtype to run in. Left out, it is float32 on the CPU (float64 for checkpoints in
            float64), and on a GPU the narrowest that holds every number of all checkpoints. A
            checkpoint's own dtype is that of its files, regardless of its config.

    Raises:
        PairError: sources that differ in what no component carries (layers, heads, windows, norms'
            epsilon, …), or of which none has all tokens of the others; weights that are not finite
            or were processed (folded); files that are missing, damaged or quantised; float16 where
            a number overflows in it. All other differences are in `Loaded.differences`.
        ValueError: a source's name that the text form of grafts could not hold, or a GPU that does
            not exist.
        UnsupportedArchitectureError: a family or option that is not exactly supported.
    """
    sources = _checked(sources)
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

    plain = {name: g for name, g in sources.items() if not isinstance(g, Made)}
    if len(plain) < len(sources) and all(isinstance(g, str | Path) for g in plain.values()):
        _previewed(sources)  # what cannot be made is refused before weights are read
    read = _read_all(plain)
    arch, rotary, differences = pair(read)
    if len(read) < len(sources):
        read = with_made(read, sources)
        arch, rotary, more = pair(read)
        differences += [row for row in more if row.key == MADE_OF]
    own = {source.name: _dtypes(source) for source in read}
    if wanted is None:
        wanted = widest(tuple(d for found in own.values() for d in found))
        if target.type == "cpu":
            wanted = torch.promote_types(wanted, torch.float32)
    differences += _of_dtypes(own, wanted)

    found = [(s.name, s.tokenizer) for s in read]
    sizes = {s.name: s.arch.d_vocab for s in read}
    shared, of_tokenizers = shared_tokenizer(found, tokenizer, sizes)
    shared, template = with_chat_template(shared, found, chat_template)
    put = _Placing(target, wanted)
    prepared = {s.name: {site: put(t) for site, t in s.weights.items()} for s in read}
    additions = {s.name: {site: put.all(own) for site, own in s.additions.items()} for s in read}
    if wanted is torch.float16:
        _refuse_overflow(prepared, additions)
    names = list(sources)
    return Loaded(
        arch,
        tuple(read),
        _share_tied(prepared),
        rotary,
        activation(arch.act_fn),
        shared,
        target,
        wanted,
        template,
        additions,
        tuple(sorted([*differences, *of_tokenizers], key=lambda row: names.index(row.source))),
    )


def preview(
    sources: Mapping[str, Any],
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
) -> tuple[Architecture, Any]:
    """The architecture and tokenizer that `load` would find, without reading any weight.

    Args:
        sources: name -> hub id, checkpoint folder, PEFT adapter folder or what a source is made of,
            the base first.
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
    arch, found, sizes = _previewed(_checked(sources))
    arch = replace(arch, d_vocab=max(sizes.values()))
    shared, _ = shared_tokenizer(found, tokenizer, sizes)
    return arch, with_chat_template(shared, found, chat_template)[0]


def _previewed(
    sources: Mapping[str, Any],
) -> tuple[Architecture, list[tuple[str, Any]], dict[str, int]]:
    """Without weights: the architecture, each source's tokenizer, and how many tokens it has; what
    is made of them is checked.

    Raises:
        PairError, UnsupportedArchitectureError: as `preview`.
    """
    made = {name: given for name, given in sources.items() if isinstance(given, Made)}
    read: list[Source] = []
    adapters: list[tuple[str, Any]] = []
    rows: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for name, given in sources.items():
        if name in made:
            continue
        if is_adapter(given):
            folder = Path(given).expanduser()
            if not read:
                refuse_as_base(name)
            own, rows[name], rank = preview_adapter(name, folder)
            if rank is not None:
                ranks[name] = rank
            adapters.append((name, own))
            continue
        read.append(preview_checkpoint(name, str(given)))
    arch, _, _ = pair(read)
    base = read[0]
    whole = {name: max(base.arch.d_vocab, rows[name]) for name, _ in adapters}
    refuse_unlike(made, {s.name: s for s in read}, base.name, whole, ranks)
    found = [(s.name, s.tokenizer) for s in read] + adapters
    return arch, found, {s.name: s.arch.d_vocab for s in read} | whole


def _checked(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Sources under names that grafts can hold; mappings as what they describe."""
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
    described: dict[str, Any] = {}
    for name, value in sources.items():
        try:
            described[name] = source_given(value)
        except ConfigError as error:
            raise PairError(f"source {name!r}: {' '.join(str(error).splitlines())}") from None
    for name, what in made_problems(described):
        raise PairError(f"source {name!r}: {what}")
    for name, value in described.items():
        if isinstance(value, Each):
            raise PairError(
                f"source {name!r} is {value}, several models that a sweep runs one after another "
                "(run_sweep, graftlens sweep). Here give one of them."
            )
    return described


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


def _refuse_overflow(prepared: Mapping[str, Weights], additions: Mapping[str, Additions]) -> None:
    """Refuse numbers that float16 cannot hold, of tensors and of adapters' factors.

    What factors multiply out to is not looked at: the forward never does it."""
    for name, weights in prepared.items():
        held = [
            (f"{component} {what}", layer, t) for (component, layer, what), t in weights.items()
        ]
        held += [
            (f"what its adapter adds to {component}", layer, tensor)
            for (component, layer), own in additions[name].items()
            for one in own
            for tensor in one.tensors
            if tensor.is_floating_point()
        ]
        for what, layer, tensor in held:
            if not bool(torch.isfinite(tensor).all()):
                where = "" if layer is None else f", layer {layer}"
                raise PairError(
                    f"source {name!r}: {what}{where} has numbers beyond float16's 65504. {WIDER}"
                )


def _dtypes(source: Source) -> list[torch.dtype]:
    return sorted(source.dtypes or {t.dtype for t in source.weights.values()}, key=str)


def _of_dtypes(own: Mapping[str, Sequence[torch.dtype]], wanted: torch.dtype) -> list[Difference]:
    """The sources whose tensors are stored in other dtypes than the base's."""
    base, *others = own
    first = " ".join(map(short, own[base]))
    found = []
    for name in others:
        if (stored := " ".join(map(short, own[name]))) != first:
            done = f"all run in {short(wanted)}"
            found.append(told("stored dtypes", name, first, stored, "converted", done))
    return found


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
