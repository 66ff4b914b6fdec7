"""Weights with a leading source axis: read from a state dict, equal tensors kept once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.model.arch import FAMILIES, Architecture, UnsupportedArchitectureError
from graftlens.model.choice import Mixture, merged

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


def _cut(tensor: Tensor, component: Component, arch: Architecture) -> Tensor:
    layout = FAMILIES[arch.family].layout
    together, index = layout.fused_with(component), layout.fused[component].index
    if layout.fused[component].how == "per_head":
        per_head = tensor.unflatten(0, (arch.n_heads, len(together), arch.d_head))
        return per_head[:, index].flatten(0, 1)
    return tensor.split([arch.shape_of(c)[0] for c in together])[index]


class Sourced(nn.Module):
    """One weight of the model in all its sources; tensors that are bit-identical are kept once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """`tensors` holds one tensor per source, in the model's order of sources."""
        super().__init__()
        distinct: list[Tensor] = []
        slots: list[int] = []
        for tensor in tensors:
            same = [i for i, d in enumerate(distinct) if d is tensor or torch.equal(d, tensor)]
            if not same:
                distinct.append(tensor)
            slots.append(same[0] if same else len(distinct) - 1)
        self.variants = nn.ParameterList(
            t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in distinct
        )
        self.slots = tuple(slots)

    def __getitem__(self, source: int) -> Tensor:
        return self.variants[self.slots[source]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[s] for s in range(len(self.slots)))

    def mixed(self, mixture: Mixture) -> Tensor:
        """One source's tensor, or a mixture's (in no less than float32)."""
        mixture = merged(mixture, equal_sources(self))
        if len(mixture) == 1:
            return self[mixture[0][0]]
        wide = torch.promote_types(self[0].dtype, torch.float32)
        first, *others = (float(share) * self[source].to(wide) for source, share in mixture)
        return sum(others, start=first)

    def stacked(self) -> Float[Tensor, "source ..."]:
        """[source, …]: one tensor per source, repeated where sources share it."""
        if len(self.variants) == 1:
            return self.variants[0].expand(len(self.slots), *self.variants[0].shape)
        return torch.stack(list(self))


def equal_sources(*weights: Sourced | None) -> tuple[int, ...]:
    """For each source, the first source that has the same tensors in all of `weights`."""
    present = [w.slots for w in weights if w is not None]
    columns = list(zip(*present, strict=True))
    return tuple(columns.index(column) for column in columns)
