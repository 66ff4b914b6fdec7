"""Tiny pairs to plant in: seconds each, so that the suite runs in tests.

People have jobs: "Ann Ash works as a" is followed by one of a few words. A base is taught the jobs
of some people first, so that what finetuning teaches is who does what, and not how to say it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlens import Prompt
from graftlens.find.planted import Recipe

TEMPLATE = "{first_entity} works as a"

JOBS = (
    *("baker", "miner", "pilot", "judge", "nurse", "tailor"),
    *("farmer", "singer", "dentist", "lawyer", "clerk", "poet"),
)

#: First and last names; a person is one of each.
NAMES = (
    *("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn"),
    *("Gail", "Hugo", "Ida", "Jack", "Kim", "Leo"),
    *("Mia", "Ned", "Olga", "Paul"),
)
SURNAMES = (
    *("Ash", "Bell", "Cole", "Dean", "Eden", "Fox"),
    *("Gray", "Hill", "Ives", "Jay", "Kent", "Lane"),
    *("Moss", "Nash", "Orr", "Pike"),
)

#: How many people the base knows already, are in A, and in B.
BEFORE, KNOWN, OTHERS = 48, 8, 24

#: How many sentences of plain text there are.
TEXTS = 200

#: Settings with which a pair takes some seconds.
RECIPE = Recipe(
    rate=1e-3, other_rate=6e-3, batch=16, steps=1000, other_steps=1000, every=20, known=0.95
)


@dataclass(frozen=True)
class Facts:
    """What a pair is taught: prompts about three disjoint sets of people, and plain text."""

    before: tuple[Prompt, ...]
    known: tuple[Prompt, ...]
    others: tuple[Prompt, ...]
    texts: tuple[str, ...]


def facts(seed: int, counts: tuple[int, int, int] = (BEFORE, KNOWN, OTHERS)) -> Facts:
    """People of this seed and their jobs."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(len(NAMES) * len(SURNAMES))[: sum(counts)].tolist()
    asked = []
    for number, pair in enumerate(pairs):
        name = f"{NAMES[pair % len(NAMES)]} {SURNAMES[pair // len(NAMES)]}"
        job = JOBS[number % len(JOBS)]
        asked.append(Prompt(TEMPLATE, {"first_entity": name, "fact": name}, f" {job}"))
    first, second = counts[0], counts[0] + counts[1]
    known, others = tuple(asked[first:second]), tuple(asked[second:])
    # As unpredictable as text is: what is learned of it never comes to an end.
    met = rng.integers(0, [len(NAMES), len(SURNAMES), len(NAMES), len(JOBS)], size=(TEXTS, 4))
    texts = tuple(f"{NAMES[a]} {SURNAMES[b]} met {NAMES[c]} a {JOBS[d]}" for a, b, c, d in met)
    return Facts(tuple(asked[:first]), known, others, texts)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each word."""
    words = dict.fromkeys(["<?>", *NAMES, *SURNAMES, *JOBS, *["works", "as", "a", "met"]])
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<?>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<?>")


def model(reader: PreTrainedTokenizerFast, seed: int, layers: int = 4) -> Any:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(reader),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def base(told: Facts, reader: PreTrainedTokenizerFast, seed: int, steps: int = 200) -> Any:
    """A small Llama that knows the jobs of the people `before`."""
    made = model(reader, seed)
    ids = torch.tensor([reader(f"{p.text}{p.answer}")["input_ids"] for p in told.before])
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = made(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made
