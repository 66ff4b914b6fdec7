"""What is measured of a next-token distribution. All logarithms are natural."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class NextToken:
    """Measures of one target token under many distributions.

    Attributes:
        rank: 1 for the likeliest token; tokens with exactly the target's logit do not push it down.
        logprob: in nats.
        top_ids, top_logprobs: the k likeliest tokens, best first.
    """

    rank: Int[Tensor, " prompt"]
    logprob: Float[Tensor, " prompt"]
    top_ids: Int[Tensor, "prompt k"]
    top_logprobs: Float[Tensor, "prompt k"]


def next_token(
    logits: Float[Tensor, "prompt d_vocab"], targets: Int[Tensor, " prompt"], k: int
) -> NextToken:
    """Rank, log-probability and the top k tokens, in float32.

    Args:
        logits: one distribution a prompt.
        targets: the token to be measured.
        k: how many of the likeliest tokens to keep; at most the vocabulary.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, targets[:, None])
    top = logprobs.topk(min(k, logprobs.shape[1]), dim=-1)
    return NextToken(
        rank=(logprobs > own).sum(1) + 1,
        logprob=own[:, 0],
        top_ids=top.indices,
        top_logprobs=top.values,
    )


def sequence_logprob(
    logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]
) -> Float[Tensor, ""]:
    """The log-probability of a run of tokens, each given those before it, in nats."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return logprobs.gather(1, tokens[:, None]).sum()
