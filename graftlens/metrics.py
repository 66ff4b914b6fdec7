"""What is measured of a next-token distribution. All logarithms are natural."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NextTokens:
    """What is kept of many next-token distributions.

    Attributes:
        logits: of the tokens that were asked for.
        logprobs: of the same tokens, in nats.
        rank: of the first token asked for: 1 for the likeliest; tokens with exactly its logit do
            not push it down.
        top_ids, top_logprobs: the k likeliest tokens, best first.
    """

    logits: Float[np.ndarray, "row target"]
    logprobs: Float[np.ndarray, "row target"]
    rank: Int[np.ndarray, " row"]
    top_ids: Int[np.ndarray, "row k"]
    top_logprobs: Float[np.ndarray, "row k"]

    def rows(self, which: slice) -> "NextTokens":
        """Some of the distributions."""
        return NextTokens(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["NextTokens"]) -> "NextTokens":
        """One after another."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def next_tokens(
    logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, "row target"], k: int
) -> NextTokens:
    """Measure distributions in float32 and bring what is kept to the host.

    Args:
        logits: one distribution a row.
        targets: the tokens to be measured in each row; `rank` is that of the first.
        k: how many of the likeliest tokens to keep; at most the vocabulary.
    """
    logits = logits.float()
    wanted = logits.gather(1, targets)
    rank = _counts(logits > wanted[:, :1]) + 1
    # Five times as fast on a CPU as logsumexp, which would do.
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(k, logits.shape[1]), dim=-1)
    return NextTokens(
        logits=wanted.cpu().numpy(),
        logprobs=logprobs.gather(1, targets).cpu().numpy(),
        rank=rank,
        top_ids=top.indices.cpu().numpy(),
        top_logprobs=top.values.cpu().numpy(),
    )


def _counts(true: Bool[Tensor, "row d_vocab"]) -> Int[np.ndarray, " row"]:
    """How many entries of each row are true; numpy counts a row six times as fast as torch."""
    if true.device.type != "cpu":
        return true.sum(1).cpu().numpy()
    return np.array([np.count_nonzero(row) for row in true.numpy()], dtype=np.int64)


def sequence_logprob(
    logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]
) -> Float[Tensor, ""]:
    """The log-probability of a run of tokens, each given those before it, in nats."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return logprobs.gather(1, tokens[:, None]).sum()
