"""Fixtures that several test files share: quiet libraries, and sources built once a session."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from families import tiny_sources
from toytokenizers import TOKENIZERS
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

if TYPE_CHECKING:
    from graftlens.model.grafted import GraftedTransformer

# The first has graftlens checked from its first import on, which is after this.
pytest_plugins = ["typecheck", "progress"]


@dataclass(frozen=True)
class Tiny:
    """A grafted model and the Hugging Face models that it was made from, which stay apart."""

    variant: str
    sources: dict[str, PreTrainedModel]
    model: "GraftedTransformer"
    tokenizer: PreTrainedTokenizerBase | None

    def logits(self, source: str, tokens: list[int]) -> torch.Tensor:
        """One source's own logits [pos, d_vocab] of a prompt by itself."""
        with torch.no_grad():
            return self.sources[source](torch.tensor([tokens]), use_cache=False).logits[0]


MakeTiny = Callable[..., Tiny]


def pytest_configure() -> None:
    """Make the tests' processes alike, wherever they were started.

    Started by a script with `&`, all would ignore SIGINT, and tests that send it would hang.
    Workers of pytest-xdist share the cores: with threads for all cores each, they starve.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        share = max(1, (os.cpu_count() or 1) // workers)
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(share))  # for child processes, too
        torch.set_num_threads(int(threads))


@pytest.fixture(scope="module", autouse=True)
def _what_stays() -> None:
    """What imports and earlier modules' tests left stays: from half a million objects on, which no
    search for garbage need look at. A sweep searches before it loads each of several models.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    """Configs of a few layers make transformers warn about what they leave out."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """No test loses power, and a sweep waits for the disk at every file it writes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny() -> MakeTiny:
    """`tiny(variant, names, tokenizer=…)`: sources cached for the session, a model made anew.

    The Hugging Face models are read-only by agreement; a test that changes one copies it first.
    """
    from graftlens.model.grafted import GraftedTransformer

    tokenizers = {name: cache(build) for name, build in TOKENIZERS.items()}

    @cache
    def sources(
        variant: str, names: tuple[str, ...], seed: int, vocab: int | None
    ) -> dict[str, PreTrainedModel]:
        return tiny_sources(variant, names, seed, vocab)

    def make(
        variant: str,
        names: tuple[str, ...] = ("pre", "sft"),
        seed: int = 1,
        tokenizer: str | None = None,
    ) -> Tiny:
        reader = None if tokenizer is None else tokenizers[tokenizer]()
        models = sources(variant, names, seed, None if reader is None else len(reader))
        model = GraftedTransformer.from_pretrained(
            models, tokenizer=reader, check=False, verbose=False
        )
        return Tiny(variant, models, model, reader)

    return make
