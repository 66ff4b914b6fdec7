"""Singular directions of a source's difference in a matrix, and what each contributes.

The difference D = W_source - W_base of a matrix is a sum of directions u σ vᵀ. With g the gradient
at the matrix's output and x its input, the derivative with respect to a row's strength is g·(D x),
to which the direction contributes (g·u)σ(v·x); the bias contributes g·(its difference).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.components import COMPONENTS
from graftlens.find.asked import Asked
from graftlens.find.places import Unit
from graftlens.model.arch import Site
from graftlens.model.directions import of_whole
from graftlens.model.embeddings import PosEmbed, TokenEmbed
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.weights import Sourced

#: Singular values below this share of the largest are rounding.
NEGLIGIBLE = 1e-7

#: Called with a site and what its directions, and its bias, contribute in each row.
Add = Callable[[Site, Float[Tensor, "rows unit"]], None]


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The difference of one matrix [d_out, d_in], the largest singular value first.

    Attributes:
        reads: σ v of each direction.
        writes: u of each.
        bias: the bias's difference, where there is one.
    """

    reads: Float[Tensor, "d_in rank"]
    writes: Float[Tensor, "d_out rank"]
    bias: Float[Tensor, " d_out"] | None

    @property
    def units(self) -> tuple[Unit, ...]:
        """How the directions are called, with the bias as the last."""
        named = [f"d{number}" for number in range(self.reads.shape[1])]
        return (*named, *(("bias",) if self.bias is not None else ()))


class Directions:
    """The directions of all searched matrices, decomposed once."""

    def __init__(self, model: GraftedTransformer, asked: Asked) -> None:
        """Decompose them, in float64.

        Raises:
            ValueError: head results or split inputs are switched on in the model, which then
                computes heads one by one and not by these matrices.
        """
        for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in"):
            if getattr(model.cfg, flag, False):
                raise ValueError(
                    f'by="direction" needs whole matrices, and model.cfg.{flag} computes heads one '
                    f"by one. Turn it off: model.set_{flag}(False)."
                )
        self.model, self.number = model, model.sources.index(asked.source)
        self.known = {
            site: self._decomposed(site)
            for site in asked.sites
            if len(COMPONENTS[site[0]].shape(model.arch)) == 2 and site not in asked.equal
        }

    def units(self, asked: Asked) -> dict[Site, Sequence[Unit]]:
        """What each site is cut into; (None,) where it has no matrix or none that differs."""
        return {s: self.known[s].units if s in self.known else (None,) for s in asked.sites}

    def _decomposed(self, site: Site) -> Decomposed:
        weight, bias = self.model.weights_of(*site)
        like = weight.like
        difference = _difference(weight, self.number)  # in float64, which not every device has
        whole = of_whole(difference, min(difference.shape))
        values = torch.linalg.vector_norm(whole.right, dim=1)
        kept = values > NEGLIGIBLE * values[:1]
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        own = None if bias is None else _difference(bias, self.number).to(device, dtype)
        reads, writes = whole.right[kept].T, whole.left[:, kept]
        return Decomposed(reads.to(device, dtype), writes.to(device, dtype), own)

    @contextmanager
    def noted(self, sites: Any, add: Add) -> Iterator[None]:
        """Inside, each backward pass hands over what the directions of these sites contribute."""
        with ExitStack() as stack:
            for site in sites:
                if site in self.known:
                    module: Any = self.model.module_of(*site)
                    module = getattr(module, "linear", module)
                    hook = partial(self._note, site, add)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _note(
        self,
        site: Site,
        add: Add,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
    ) -> None:
        """Remember a matrix's input until the gradient of its output comes."""
        known = self.known[site]
        scale = 1.0
        if isinstance(module, TokenEmbed | PosEmbed):
            # A table's matrix is read by row: y = D[token] = Σ u[token] σ vᵀ.
            ids = kwargs["positions"] if isinstance(module, PosEmbed) else args[0]
            from_input = known.writes[ids.flatten()]
            to_output = known.reads
            scale = module.scale if isinstance(module, TokenEmbed) else 1.0
        elif args[1].blended is None:
            return  # the map calls itself for what runs without the strengths
        else:
            from_input = args[0].x.detach().to(known.reads.dtype) @ known.reads
            to_output = known.writes

        def take(gradient: Tensor) -> None:
            g = scale * gradient.detach().reshape(-1, gradient.shape[-1]).to(to_output.dtype)
            parts = [(g @ to_output) * from_input]
            if known.bias is not None:
                parts.append((g @ known.bias)[:, None])
            add(site, torch.cat(parts, dim=1))

        if out.requires_grad:
            out.register_hook(take)


def _difference(weight: Sourced, number: int) -> Float[Tensor, "*shape"]:
    """A source's tensor minus the base's, in float64; of an adapter, its own factors alone."""

    def wide(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        tensor = tensor.cpu() if tensor.device.type == "mps" else tensor
        return tensor.double() if tensor.is_floating_point() else tensor

    made = wide(weight.whole(number)) - wide(weight.whole(0))
    for source, sign in ((number, 1.0), (0, -1.0)):
        for addition in weight.additions(source):
            factors = addition.like(*map(wide, addition.tensors))
            made = made + sign * factors.added_to(torch.zeros_like(made))
    return made
