"""The singular directions of what a source's matrix differs by from the base's.

A difference in factors (an adapter's) is decomposed in its factors. Of a whole one, the leading
singular vectors of the shorter side are the eigenvectors of its Gram matrix, in float64: accurate
to about 1e-8 of the largest singular value. They are kept in graftlens' cache under a digest of the
difference, so that no matrix is decomposed twice.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from graftlens.folder import write_whole
from graftlens.model.additions import Addition, LowRank, RowVectors
from graftlens.model.arch import Site
from graftlens.model.smollm2 import default_cache
from graftlens.model.source import Source

#: Matrices whose shorter side is below this are decomposed faster than a file is read.
KEPT_FROM = 128


@dataclass(frozen=True)
class Directions:
    """The first singular directions of a matrix; left @ right is their sum.

    Attributes:
        left: U, of orthonormal columns.
        right: singular values times V^T.
    """

    left: Float[Tensor, "d_out k"]
    right: Float[Tensor, "k d_in"]

    def addition(self, taken: Sequence[int], scale: float = 1.0) -> LowRank:
        """The sum of those directions, in factors."""
        rows = list(taken)
        return LowRank(self.right[rows].contiguous(), self.left[:, rows].contiguous(), scale)


class Decomposed:
    """The directions of all matrices of sources, each worked out once.

    Args:
        base: what they differ from.
        needs: source -> how many directions of it are asked for at most.
    """

    def __init__(self, base: Source, needs: Mapping[str, int]) -> None:
        self.base, self.needs = base, needs
        self._known: dict[tuple[str, Site], Directions] = {}
        self._ranks: dict[tuple[str, Site], int] = {}

    def rank(self, source: Source, site: Site) -> int:
        """The largest rank that a source's matrix can differ by from the base's, 0 if it is equal:
        that of its factors, or of the matrix."""
        if (source.name, site) not in self._ranks:
            own, base = source.weights[(*site, "weight")], self.base.weights[(*site, "weight")]
            rank = min(base.shape)
            if is_same(own, base):
                rank = min(rank, sum(_rank_of(one) for one in source.additions.get(site, ())))
            self._ranks[source.name, site] = rank
        return self._ranks[source.name, site]

    def of(self, source: Source, site: Site) -> Directions:
        """The first directions of a matrix: of factors all, else as many as are asked for."""
        key = (source.name, site)
        if key not in self._known:
            own, base = source.weights[(*site, "weight")], self.base.weights[(*site, "weight")]
            wide = torch.promote_types(torch.promote_types(own.dtype, base.dtype), torch.float32)
            added, rank = source.additions.get(site, ()), self.rank(source, site)
            if is_same(own, base):
                found = _of_factors(added, len(base), rank)
            else:
                delta = own.double() - base.double()
                for one in added:
                    wider = one.like(*(_double(t) for t in one.tensors))
                    delta = wider.added_to(delta)
                count = min(self.needs[source.name], rank)
                found = of_whole(delta.detach(), count, cached=True)
            self._known[key] = Directions(found.left.to(wide), found.right.to(wide))
        return self._known[key]


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are one, or hold the same numbers."""
    return tensor is other or (tensor.dtype == other.dtype and torch.equal(tensor, other))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _rank_of(addition: Addition) -> int:
    """How many rows A has, or how many rows of the matrix it changes."""
    return len(addition.tensors[0]) if addition.adds else 0


def _of_factors(added: Sequence[Addition], d_out: int, count: int) -> Directions:
    """B A of several additions, by the singular values of the product of their triangles."""
    pairs = [_factors(one, d_out) for one in added if one.adds]
    b, a = torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs])
    (left, down), (right, up) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(down @ up.T, full_matrices=False)
    return Directions((left @ u)[:, :count], (values[:, None] * (v @ right.T))[:count])


def _factors(addition: Addition, d_out: int) -> tuple[Tensor, Tensor]:
    """B with the scale, and A."""
    if isinstance(addition, LowRank):
        a, b = map(_double, addition.tensors)
        return b * addition.scale, a
    assert isinstance(addition, RowVectors)
    rows, vectors = addition.tensors
    b = torch.zeros(d_out, len(rows), dtype=torch.float64, device=vectors.device)
    b[rows, torch.arange(len(rows), device=rows.device)] = addition.scale
    return b, _double(vectors)


def of_whole(delta: Float[Tensor, "d_out d_in"], count: int, *, cached: bool = False) -> Directions:
    """The first `count` directions of a matrix in float64, from graftlens' cache if `cached`."""
    wide = delta.shape[0] <= delta.shape[1]
    basis = (_basis if cached else _eigenvectors)(delta if wide else delta.T, count)
    if wide:
        return Directions(basis, basis.T @ delta)
    right = delta @ basis  # columns of U, times the singular values
    values = torch.linalg.vector_norm(right, dim=0)
    left = right / values.clamp_min(torch.finfo(right.dtype).tiny)
    return Directions(left, values[:, None] * basis.T)


def _basis(delta: Float[Tensor, "short long"], count: int) -> Float[Tensor, "short count"]:
    """The first left singular vectors of a matrix, from the cache if they are there."""
    if len(delta) < KEPT_FROM:
        return _eigenvectors(delta, count)
    file = default_cache() / "directions" / f"{_digest(delta)}.safetensors"
    if (kept := _kept(file, len(delta))) is not None and kept.shape[1] >= count:
        return kept[:, :count].to(delta.device)
    basis = _eigenvectors(delta, count)
    with contextlib.suppress(OSError):  # the cache only saves time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, safetensors.torch.save({"basis": basis.cpu().contiguous()}))
    return basis


def _eigenvectors(delta: Float[Tensor, "short long"], count: int) -> Float[Tensor, "short count"]:
    gram = (delta @ delta.T).cpu()  # not every device decomposes
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count].to(delta.device)


def _digest(delta: Tensor) -> str:
    numbers = delta.cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(delta.shape)} {delta.dtype}".encode())
    digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kept(file: Path, rows: int) -> Tensor | None:
    """What the cache holds of a matrix; None if it holds nothing that can be read."""
    try:
        found = safetensors.torch.load(file.read_bytes())["basis"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    whole = found.ndim == 2 and len(found) == rows and found.dtype == torch.float64
    return found if whole and bool(torch.isfinite(found).all()) else None
