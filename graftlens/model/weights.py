"""Weights with a leading source axis: read from a state dict, equal tensors kept once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.model.additions import Addition, LowRank
from graftlens.model.arch import FAMILIES, Architecture, UnsupportedArchitectureError
from graftlens.model.choice import Equal, Mixture, merged
from graftlens.model.vocabulary import nan_below

C = Component

#: (component, layer or None, "weight" or "bias") -> tensor; linear weights are [d_out, d_in].
Weights = dict[tuple[Component, int | None, str], Tensor]

#: Buffers that old checkpoints carry; they are recomputed from the config, not read.
OLD_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


@dataclass(frozen=True)
class StateReader:
    """Hands out the tensors of one state dict and remembers which were never used."""

    state: Mapping[str, Tensor]
    taken: set[str]

    def get(self, name: str) -> Tensor | None:
        if name not in self.state:
            return None
        self.taken.add(name)
        return self.state[name]


def read_weights(state: Mapping[str, Tensor], arch: Architecture) -> Weights:
    """Every component's tensors from a Hugging Face state dict, fused projections cut apart.

    Raises:
        UnsupportedArchitectureError: a tensor is missing, has a different shape from what the
            config says, or is not used by the forward.
    """
    reader = StateReader(state, set())
    layout = FAMILIES[arch.family].layout
    weights: Weights = {}
    for component, layer in arch.sites:
        module = layout.modules[component].format(l=layer)
        for parameter in ("weight", "bias"):
            tensor = reader.get(f"{module}.{parameter}")
            if tensor is None and component is C.UNEMBED and parameter == "weight":
                tensor = weights[C.EMBED, None, "weight"]
            if tensor is None:
                if parameter == "weight":
                    raise UnsupportedArchitectureError(
                        f"the checkpoint has no tensor {module}.{parameter} ({component})."
                    )
                continue
            if layout.transposes(component) and tensor.ndim == 2:
                tensor = tensor.T
            if component in layout.fused:
                tensor = _cut(tensor, component, arch)
            expected = arch.shape_of(component, parameter)
            if tuple(tensor.shape) != expected:
                raise UnsupportedArchitectureError(
                    f"{module}.{parameter} ({component}) has shape {tuple(tensor.shape)}; "
                    f"the config says {expected}."
                )
            weights[component, layer, parameter] = tensor
    unused = [name for name in state if name not in reader.taken and not name.endswith(OLD_BUFFERS)]
    if unused:
        raise UnsupportedArchitectureError(
            f"the checkpoint holds tensors that the {arch.family} forward does not use: "
            f"{', '.join(unused[:5])}{' …' if len(unused) > 5 else ''}. "
            "graftlens refuses what it cannot run exactly."
        )
    return weights


def state_of(
    weights: Mapping[tuple[Component, int | None, str], Tensor], arch: Architecture
) -> dict[str, Tensor]:
    """The Hugging Face state dict of every component's tensors: what `read_weights` reads."""
    layout = FAMILIES[arch.family].layout
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[Component, Tensor]] = {}
    for (component, layer, parameter), tensor in weights.items():
        name = f"{layout.modules[component].format(l=layer)}.{parameter}"
        parts.setdefault(name, {})[component] = tensor
    for name, found in parts.items():
        first = next(iter(found))
        tensor = joined(found, arch) if first in layout.fused else found[first]
        state[name] = tensor.T if layout.transposes(first) and tensor.ndim == 2 else tensor
    return state


def joined(parts: Mapping[Component, Tensor], arch: Architecture) -> Tensor:
    """The fused projection that components are parts of."""
    fused = FAMILIES[arch.family].layout.fused
    ordered = sorted(parts, key=lambda component: fused[component].index)
    if fused[ordered[0]].how == "stacked":
        return torch.cat([parts[component] for component in ordered])
    heads = [parts[component].unflatten(0, (arch.n_heads, arch.d_head)) for component in ordered]
    return torch.stack(heads, 1).flatten(0, 2)


def read_additions(
    found: Mapping[str, Sequence[Addition]], arch: Architecture
) -> dict[tuple[Component, int | None], tuple[Addition, ...]]:
    """Every component's additions from those of Hugging Face's modules, with fused ones cut apart.

    Args:
        found: a module's name -> what is added to its matrix, as [d_out, d_in].
        arch: the architecture.

    Raises:
        UnsupportedArchitectureError: additions to a module that the forward does not have.
    """
    layout = FAMILIES[arch.family].layout
    additions: dict[tuple[Component, int | None], tuple[Addition, ...]] = {}
    used = set()
    for component, layer in arch.sites:
        module = layout.modules[component].format(l=layer)
        own = found.get(module, ())
        used.add(module)
        if component in layout.fused:
            own = [_cut_addition(addition, component, arch) for addition in own]
        if own:
            additions[component, layer] = tuple(own)
    if unused := sorted(found.keys() - used):
        raise UnsupportedArchitectureError(
            f"something is added to modules that the {arch.family} forward does not have: "
            f"{', '.join(unused[:5])}{' …' if len(unused) > 5 else ''}. "
            "graftlens refuses what it cannot run exactly."
        )
    return additions


def _cut_addition(addition: Addition, component: Component, arch: Architecture) -> Addition:
    assert isinstance(addition, LowRank), "fused projections have no tokens"
    return LowRank(addition.a, _cut(addition.b.detach(), component, arch), addition.scale)


def _cut(tensor: Tensor, component: Component, arch: Architecture) -> Tensor:
    layout = FAMILIES[arch.family].layout
    together, index = layout.fused_with(component), layout.fused[component].index
    if layout.fused[component].how == "per_head":
        per_head = tensor.unflatten(0, (arch.n_heads, len(together), arch.d_head))
        return per_head[:, index].flatten(0, 1)
    return tensor.split([arch.shape_of(c)[0] for c in together])[index]


class Sourced(nn.Module):
    """One weight of the model in all its sources; what is bit-identical is kept once.

    A source's weight is one of the `variants`, plus additions that are kept in their factors (the
    LoRA adapters of one matrix). `weight[source]` multiplies them out at each access.

    Attributes:
        variants: the distinct whole tensors.
        slots: for each source, which combination of a variant and additions it has.
        sizes: of tables over the vocabulary, how many of the rows each source has, where some lack
            the last ones; these are 0 here, and NaN where they are shown. Else empty.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        additions: Sequence[Sequence[Addition]] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Put the tensors of one weight together.

        Args:
            tensors: one per source, in the model's order of sources.
            additions: what each source adds to its tensor; none without.
            sizes: as the attribute.
        """
        super().__init__()
        self.sizes = tuple(sizes)
        distinct: list[Tensor] = []
        whole: list[int] = []
        for source, tensor in enumerate(tensors):
            near = [w for w in whole if not sizes or sizes[whole.index(w)] == sizes[source]]
            same = [i for i in near if distinct[i] is tensor or torch.equal(distinct[i], tensor)]
            if not same:
                distinct.append(tensor)
            whole.append(same[0] if same else len(distinct) - 1)
        self.variants = nn.ParameterList(
            t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in distinct
        )
        self._whole = tuple(whole)
        known = nn.ModuleList()
        # Only additions that look alike are compared number by number.
        similar: dict[object, list[int]] = {}

        def number_of(addition: Addition) -> int:
            near = similar.setdefault(addition.outline, [])
            for number in near:
                if addition.same(known[number]):  # type: ignore[arg-type]
                    return number
            near.append(len(known))
            known.append(addition)
            return near[-1]

        self._added = tuple(tuple(map(number_of, own)) for own in additions or [()] * len(tensors))
        self._additions = known
        self.slots = _numbered(zip(self._whole, self._added, strict=True))

    def __getitem__(self, source: int) -> Tensor:
        tensor = self.whole(source)
        for addition in self.additions(source):
            tensor = addition.added_to(tensor)
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[s] for s in range(len(self.slots)))

    def whole(self, source: int) -> Tensor:
        """A source's tensor without its additions."""
        tensor: Tensor = self.variants[self._whole[source]]
        return tensor

    def of_slot(self, slot: int) -> Tensor:
        """The tensor of the sources that have this combination, its additions multiplied out."""
        return self[self.slots.index(slot)]

    def additions(self, source: int) -> tuple[Addition, ...]:
        """What a source adds to its tensor."""
        return tuple(self._additions[number] for number in self._added[source])  # type: ignore[misc]

    @property
    def like(self) -> Tensor:
        """A tensor of the weight's shape, dtype and device."""
        return self.whole(0)

    @property
    def is_shared(self) -> bool:
        """Whether all sources have the same."""
        return len(set(self.slots)) == 1

    @cached_property
    def alike(self) -> Equal:
        """For each source, the first one with the same whole tensor."""
        return _first_of(self._whole)

    @cached_property
    def added_alike(self) -> Equal:
        """For each source, the first one with the same additions."""
        return _first_of(self._added)

    @cached_property
    def adding(self) -> frozenset[int]:
        """The sources that have additions."""
        return frozenset(source for source, added in enumerate(self._added) if added)

    def mixed(self, mixture: Mixture) -> Tensor:
        """One source's tensor, or a mixture's (in no less than float32)."""
        mixture = merged(mixture, equal_sources(self))
        if len(mixture) == 1:
            return self[mixture[0][0]]
        wide = torch.promote_types(self.like.dtype, torch.float32)
        first, *others = (float(share) * self[source].to(wide) for source, share in mixture)
        return sum(others, start=first)

    def shown(self, mixture: Mixture) -> Tensor:
        """As `mixed`, with NaN in rows that one of the sources lacks."""
        found = self.mixed(mixture)
        return nan_below(found, min(self.sizes[s] for s, _ in mixture)) if self.sizes else found

    def stacked(self) -> Float[Tensor, "source ..."]:
        """[source, …]: one tensor per source, repeated where sources share it; NaN in rows that a
        source lacks."""
        if self.is_shared:
            return self[0].expand(len(self.slots), *self.like.shape)
        if self.sizes:
            return torch.stack([nan_below(t, n) for t, n in zip(self, self.sizes, strict=True)])
        return torch.stack(list(self))


def equal_sources(*weights: Sourced | None) -> Equal:
    """For each source, the first source that has the same tensors in all of `weights`."""
    return _first_of(list(zip(*(w.slots for w in weights if w is not None), strict=True)))


def _first_of(values: Sequence[object]) -> tuple[int, ...]:
    """For each value, the number of the first that equals it."""
    first: dict[object, int] = {}
    return tuple(first.setdefault(value, number) for number, value in enumerate(values))


def _numbered(values: Iterable[object]) -> tuple[int, ...]:
    """Each value's number, counting distinct ones from 0."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(value, len(numbers)) for value in values)
