"""How texts are drawn, and the random numbers they are drawn with.

A token is drawn as the one whose perturbed logit is the largest: logits / temperature, each with
noise of the standard Gumbel distribution added, have their maximum at each token with exactly its
probability (Gumbel 1954; Yellott 1977). The noise depends on (seed, the prompt's tokens, sample,
step) alone, so that grafts are compared on equal draws: where two grafts agree on a distribution,
they draw the same token, and where they nearly agree, they nearly always do.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from graftlens.model.reading import whole
from graftlens.model.sampling import Sampling, StopStrings

#: The lowest temperature besides 0.
COLDEST = 1e-6


@dataclass(frozen=True)
class Drawing:
    """How many texts are generated of each prompt under each graft, and how.

    Attributes:
        n: texts of each prompt and graft.
        max_new_tokens: most tokens of a text.
        temperature: divides the logits; 0 takes the likeliest token at each step.
        top_p: draw from the likeliest tokens whose probabilities add up to this or more.
        top_k: draw from the k likeliest tokens only.
        repetition_penalty: of tokens that appeared, positive logits are divided and negative ones
            multiplied by it; 1 changes nothing.
        stop_strings: texts that end a text once a new token completes one of them.
        seed: of the random numbers.

    Raises:
        ValueError: an option outside its range, several texts where nothing is random, or
            `top_k` with `top_p`.
    """

    n: int = 1
    max_new_tokens: int = 60
    temperature: float | int = 1.0
    top_p: float | int | None = None
    top_k: int | None = None
    repetition_penalty: float | int = 1.0
    stop_strings: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens"):
            if whole(getattr(self, name), name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: write a number from 1.")
        whole(self.seed, "seed")
        given: Any = self.stop_strings
        given = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "stop_strings", given)
        _ = self.sampling, self.stops
        if 0 < self.temperature < COLDEST:  # the logits that it divides would be infinite
            raise ValueError(
                f"temperature={self.temperature}: write 0 for the likeliest token, or a number "
                f"from {COLDEST:g}."
            )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 with n={self.n}: these texts would all be the same. Write n=1, or "
                "a temperature above 0."
            )

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen."""
        return Sampling(
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def stops(self) -> StopStrings | None:
        """What ends a text besides end tokens."""
        return StopStrings(self.stop_strings) if self.stop_strings else None

    def as_given(self) -> dict[str, Any]:
        """The options that are not what they are by default."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: found[f.name] for f in fields(self) if found[f.name] != f.default}


def draw_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """What the noise of one text is made from: 128 bits of (seed, the prompt's tokens, sample)."""
    said = f"{seed} {sample} {' '.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:16], "little")


def uniforms(key: int, step: int, count: int) -> Float32[np.ndarray, " count"]:
    """Uniform numbers in (0, 1): 32 bits each of the generator Philox 4×64 (Salmon et al. 2011),
    whose counter begins at the step."""
    bits = np.random.Philox(key=key, counter=step << 192).random_raw(-(-count // 2))
    words = bits.astype("<u8").view("<u4")[:count].astype(np.float32)
    return np.minimum((words + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))


def gumbels(
    keys: Sequence[int], step: int, d_vocab: int, device: torch.device | str
) -> Float[Tensor, "row d_vocab"]:
    """Standard Gumbel noise of each row's next token; rows with one key have the same."""
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    made = np.stack([uniforms(key, step, d_vocab) for key in distinct])
    noise = torch.from_numpy(made).to(device).neg_().log1p_().neg_().log_().neg_()
    if len(distinct) == len(keys):
        return noise
    places = torch.tensor([distinct[key] for key in keys], device=noise.device)
    return noise.index_select(0, places)
