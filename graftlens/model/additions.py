"""What a source adds to a matrix that other sources have as well, kept in its factors.

A LoRA adapter's matrix is W + scale · B A (Hu et al. 2021, arXiv 2106.09685): W is stored once for
all adapters, and each of them adds A and B. Every addition is linear in its own numbers, so a share
of a source is that share of its additions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftlens.model.arch import Site


class Addition(nn.Module, ABC):
    """Something added to a matrix W [d_out, d_in], without W.

    Attributes:
        scale: a factor on all of it.
    """

    scale: float

    @abstractmethod
    def onto(
        self,
        out: Float[Tensor, "rows d_out"],
        x: Float[Tensor, "rows d_in"],
        share: float = 1.0,
        *,
        outs: Int[Tensor, " d_out"] | None = None,
        ins: Int[Tensor, " d_in"] | None = None,
    ) -> None:
        """Add `share` times this addition's x W^T to `out`, in place.

        Args:
            out: what it is added to.
            x: the map's input.
            share: a factor.
            outs, ins: the rows and columns of W that `out` and `x` are of; None is all.
        """

    @abstractmethod
    def looked_up(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows d_in"]:
        """What it adds to these rows of W."""

    @abstractmethod
    def added_to(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """A new matrix, with it multiplied out."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its numbers but the scale."""

    @abstractmethod
    def like(self, *tensors: Tensor) -> "Addition":
        """The same kind of addition, of other `tensors`."""

    @abstractmethod
    def with_rows(self, count: int) -> "Addition":
        """The same for a matrix that has rows more, up to `count`, to which it adds nothing."""

    def times(self, factor: float) -> "Addition":
        """The same, `factor` times as strong; the numbers are shared."""
        made = self.like(*self.tensors)
        made.scale = self.scale * factor
        return made

    @property
    def adds(self) -> bool:
        """Whether it adds anything: no factor is zero."""
        return all(bool(tensor.any()) for tensor in self.tensors if tensor.is_floating_point())

    def same(self, other: "Addition") -> bool:
        """Whether the two, of equal outlines, add the same, bit for bit."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))

    @property
    def outline(self) -> tuple[object, ...]:
        """What is quickly compared: additions that add the same have equal ones."""
        begins = [tuple(t[:1].flatten()[:8].tolist()) for t in self.tensors]
        return type(self), self.scale, *(t.shape for t in self.tensors), *begins


class LowRank(Addition):
    """scale · B A, of a rank far below that of W."""

    def __init__(
        self, a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"], scale: float
    ) -> None:
        super().__init__()
        self.a, self.b, self.scale = _parameter(a), _parameter(b), scale

    def onto(
        self,
        out: Float[Tensor, "rows d_out"],
        x: Float[Tensor, "rows d_in"],
        share: float = 1.0,
        *,
        outs: Int[Tensor, " d_out"] | None = None,
        ins: Int[Tensor, " d_in"] | None = None,
    ) -> None:
        a = self.a if ins is None else self.a[:, ins]
        b = self.b if outs is None else self.b[outs]
        out.addmm_(F.linear(x, a), b.T, alpha=self.scale * share)

    def looked_up(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows d_in"]:
        return (F.embedding(ids, self.b) @ self.a) * self.scale

    def added_to(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return torch.addmm(matrix, self.b, self.a, alpha=self.scale)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    def with_rows(self, count: int) -> "LowRank":
        missing = count - len(self.b)
        return LowRank(self.a, F.pad(self.b.detach(), (0, 0, 0, missing)), self.scale)

    def like(self, *tensors: Tensor) -> "LowRank":
        a, b = tensors
        return LowRank(a, b, self.scale)


class RowVectors(Addition):
    """A vector added to each of some rows of W, such as those of single tokens."""

    def __init__(
        self, rows: Int[Tensor, " count"], vectors: Float[Tensor, "count d_in"], scale: float = 1.0
    ) -> None:
        """`rows` are different from each other."""
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", rows)
        self.vectors, self.scale = _parameter(vectors), scale

    def onto(
        self,
        out: Float[Tensor, "rows d_out"],
        x: Float[Tensor, "rows d_in"],
        share: float = 1.0,
        *,
        outs: Int[Tensor, " d_out"] | None = None,
        ins: Int[Tensor, " d_in"] | None = None,
    ) -> None:
        vectors = self.vectors if ins is None else self.vectors[:, ins]
        found, scale = F.linear(x, vectors), self.scale * share
        if outs is None:
            out.index_add_(1, self.rows, found, alpha=scale)
        else:
            out.addmm_(found, self._among(outs).T, alpha=scale)

    def looked_up(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows d_in"]:
        return (self._among(ids) @ self.vectors) * self.scale

    def added_to(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return matrix.index_add(0, self.rows, self.vectors, alpha=self.scale)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.vectors

    def with_rows(self, count: int) -> "RowVectors":
        return self

    def like(self, *tensors: Tensor) -> "RowVectors":
        rows, vectors = tensors
        return RowVectors(rows, vectors, self.scale)

    def _among(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows count"]:
        return (ids[:, None] == self.rows).to(self.vectors.dtype)


#: (component, layer) -> what is added to its matrix.
Additions = Mapping[Site, Sequence[Addition]]


def _parameter(tensor: Tensor) -> nn.Parameter:
    # One that several additions have (the A of a fused projection) stays one.
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
