"""The last check of loading: each source's logits against those of its own model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftlens.model.arch import Architecture, PairError
from graftlens.model.load import WIDER, short
from graftlens.model.source import Source


def probe(
    run: Callable[[str, Tensor], Tensor],
    arch: Architecture,
    sources: Sequence[Source],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest difference from any source's own logits, run in the same dtype.

    In float32 it is the largest difference relative to the largest logit; in half precision the
    root mean square of the differences relative to that of the logits.

    Args:
        run: logits [batch, pos, d_vocab] of token ids under one source everywhere, by its name.
        arch: the architecture of the pair.
        sources: the sources, each with its own forward; one without is left out.
        device: where the model is.
        dtype: what it runs in.

    Raises:
        PairError: a difference beyond rounding, or tensors that differ from a source's files.
    """
    windows = [w for w in arch.windows if w is not None]
    exact = torch.finfo(dtype).bits >= 32
    # Half precision rounds at every step, so there the mean is compared, and the bound is wider:
    # twice the difference between Hugging Face's own half precision and its float32 on the families
    # tested.
    allowed = 1e-4 if exact else 3 * torch.finfo(dtype).eps * (1 + arch.n_layers) ** 0.5
    # Long enough to exceed a sliding window, if that is affordable.
    length = min(
        [*(s.arch.n_ctx for s in sources), max([24, *(w + 8 for w in windows if w <= 120)])]
    )
    common = min(s.arch.d_vocab for s in sources)
    tokens = torch.randint(common, (2, length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    worst = 0.0
    for source in sources:
        if source.prove is not None:
            source.prove()
        if source.logits is None:
            continue
        with torch.no_grad():
            ours = run(source.name, tokens).float()[..., : source.arch.d_vocab]
        theirs = source.logits(tokens, dtype).to(ours)
        order = torch.inf if exact else 2
        difference = float(
            torch.linalg.vector_norm(ours - theirs, order)
            / torch.linalg.vector_norm(theirs, order).clamp_min(1e-9)
        )
        who = f"source {source.name!r} ({source.origin})"
        if not bool(torch.isfinite(theirs).all()):
            raise PairError(
                f"{who}: its own model's logits are not finite in {short(dtype)}. "
                + (WIDER if dtype is torch.float16 else "Its weights do not make a working model.")
            )
        if not bool(torch.isfinite(ours).all()) and dtype is torch.float16:
            raise PairError(f"{who}: its logits overflow in float16. {WIDER}")
        if not difference <= allowed:
            why = "This checkpoint is not supported exactly. Please report its config."
            if source.hooks:
                why = (
                    f"Its own model has hooks (on {' '.join(source.hooks[:5])}), which grafts do "
                    "not run: remove them (model.reset_hooks(), or handle.remove()) and load again."
                )
            raise PairError(
                f"{who}: logits differ from its own model's by {difference:.1e} (relative); "
                f"{allowed:.1e} is rounding in {short(dtype)}. {why}"
            )
        worst = max(worst, difference)
    return worst
