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
        rank: of the first token asked for: 1 for the likeliest. Of tokens with equal logits the
            one with the smaller id comes first, so that no two have one rank.
        ties: how many other tokens have exactly the logit of the first token asked for.
        top_ids, top_logprobs: the k likeliest tokens, best first, in the same order.
    """

    logits: Float[np.ndarray, "row target"]
    logprobs: Float[np.ndarray, "row target"]
    rank: Int[np.ndarray, " row"]
    ties: Int[np.ndarray, " row"]
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

    Ranks and ties are those of the logits as they come, in their own dtype.

    Args:
        logits: one distribution a row.
        targets: the tokens to be measured in each row; `rank` is that of the first.
        k: how many of the likeliest tokens to keep; at most the vocabulary.
    """
    # float32 keeps every half-precision logit apart that was apart; of float64 it would make ties.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rank, ties = _standing(logits, targets[:, 0])
    top = likeliest(logits, k)
    logits = logits.float()
    # Five times as fast on a CPU as logsumexp, which would do.
    logprobs = logits.log_softmax(-1)
    return NextTokens(
        logits=logits.gather(1, targets).cpu().numpy(),
        logprobs=logprobs.gather(1, targets).cpu().numpy(),
        rank=rank,
        ties=ties,
        top_ids=top.cpu().numpy(),
        top_logprobs=logprobs.gather(1, top).cpu().numpy(),
    )


def likeliest(logits: Float[Tensor, "row d_vocab"], k: int) -> Int[Tensor, "row k"]:
    """The ids of the k largest logits of each row, best first, of equal ones the smaller id first.

    `torch.topk` leaves the order of equal ones, and which of them it takes, undefined.
    """
    d_vocab = logits.shape[1]
    k = min(k, d_vocab)
    top = logits.topk(min(k + 1, d_vocab), dim=-1)
    ids = top.indices[:, :k]
    if d_vocab > k:
        # Where the next one is equal to the last that is in, the equal ones are chosen by id.
        torn = (top.values[:, k - 1] == top.values[:, k]).nonzero()[:, 0]
        if len(torn):
            edge = top.values[torn, k - 1 : k]
            numbers = torch.arange(d_vocab, device=logits.device)
            equal = torch.where(logits[torn] == edge, numbers, d_vocab)
            equal = equal.topk(k, dim=-1, largest=False).values
            place = torch.arange(k, device=logits.device) - (top.values[torn] > edge).sum(1, True)
            chosen = torch.where(place < 0, ids[torn], equal.gather(1, place.clamp_min(0)))
            ids = ids.index_copy(0, torn, chosen)
    ids = ids.sort(dim=-1).values
    values = logits.gather(1, ids) + 0.0  # -0.0 is 0.0, also for a sort by bits
    return ids.gather(1, values.sort(dim=-1, descending=True, stable=True).indices)


def _standing(
    logits: Float[Tensor, "row d_vocab"], target: Int[Tensor, " row"]
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """The rank of each row's target, and how many other tokens have its logit."""
    own = logits.gather(1, target[:, None])
    rank = 1 + _counts(logits > own)
    ties = np.maximum(_counts(logits == own) - 1, 0)  # NaN is not even equal to itself
    if tied := np.flatnonzero(ties).tolist():
        numbers = torch.arange(logits.shape[1], device=logits.device)
        before = (logits[tied] == own[tied]) & (numbers < target[tied][:, None])
        rank[tied] += _counts(before)
    return rank, ties


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
