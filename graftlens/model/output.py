"""`ln_final` and `unembed`, which readers of the residual stream also call directly."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.model.active import Active
from graftlens.model.choice import Choice
from graftlens.model.linear import Gathered, Linear, Norm
from graftlens.model.vocabulary import Vocabularies
from graftlens.model.weights import equal_sources

C = Component


class FinalNorm(Norm):
    """`ln_final`: called directly, it uses the graft in force, else the base."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(norm.arch, norm.weight, norm.bias, norm.active, norm.component, norm.layer)

    def forward(
        self, x: Float[Tensor, "*batch_and_pos d_model"], chosen: Choice | None = None
    ) -> Float[Tensor, "*batch_and_pos d_model"]:
        if chosen is None and self.weight is not None:
            equal = equal_sources(self.weight, self.bias)
            chosen = self.active.rows(C.LN_FINAL, x.shape[:-1], equal)
        return super().forward(x, chosen)


class Unembed(nn.Module):
    """`unembed`: called directly, it uses the graft in force, else the base.

    Logits of tokens that a source with a share in the row lacks are -inf.
    """

    def __init__(self, linear: Linear, active: Active) -> None:
        super().__init__()
        self.linear, self.active = linear, active
        sizes = linear.weight.sizes or (len(linear.weight.like),) * len(active.sources)
        self.vocabularies = Vocabularies(active.sources, sizes)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(
        self, x: Float[Tensor, "*batch_and_pos d_model"], chosen: Choice | None = None
    ) -> Float[Tensor, "*batch_and_pos d_vocab"]:
        places = x.shape[:-1]
        chosen = chosen or self.active.rows(C.UNEMBED, places, self.linear.equal)
        rows = Gathered(self.hook_in(x).reshape(-1, x.shape[-1]))
        out = self.vocabularies.limited(self.linear(rows, chosen), chosen)
        return self.hook_out(out.reshape(*places, out.shape[-1]))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The base's unembedding, or that of a graft in force that is uniform here."""
        return self.active.of(self.linear.weight, C.UNEMBED, None).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias, zeros where there is none."""
        return self.linear.bias_now(self.active, C.UNEMBED, None)
