"""What all lens functions share: the runs to look into, prompts in chunks, and rows of places."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from graftlens.components import (
    COMPONENTS,
    Component,
    Side,
    components_where,
    format_numbers,
    suggest,
)
from graftlens.graft import Graft, Grafts, Where, named_grafts
from graftlens.metrics import Measure, Predictions, always_measured
from graftlens.model.arch import Site
from graftlens.model.cache import GraftedCache
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import Batch
from graftlens.positions import At
from graftlens.prompts import PromptError, Tokenized, continuation, ids_with
from graftlens.references import References

C = Component

#: Hooks over pairs of positions: their rows are distributions, or masked.
PAIRS = ("hook_pattern", "hook_attn_scores")

#: The models that are patched in this context, each with the sites whose outputs are replaced.
PATCHES: ContextVar[tuple[tuple[GraftedTransformer, frozenset[Site]], ...]] = ContextVar(
    "patches", default=()
)

#: The runs of this context that are read again and not made again.
KEPT: ContextVar["Kept | None"] = ContextVar("kept", default=None)

#: Most prompts that run together, and most bytes of their caches if there are several.
CHUNK, BUDGET = 8, 1 << 30


@dataclass(frozen=True)
class Kept:
    """What runs of a batch left: the activations by graft."""

    model: GraftedTransformer
    batch: Batch
    caches: Mapping[Graft, GraftedCache]

    def found(
        self, model: GraftedTransformer, batch: Batch, graft: Graft, names: Sequence[str]
    ) -> GraftedCache | None:
        """The activations of the same run, if it left all that are named."""
        cache = self.caches.get(graft) if model is self.model else None
        same = batch.prompts == self.batch.prompts and batch.totals == self.batch.totals
        if cache is None or not same or not torch.equal(batch.tokens, self.batch.tokens):
            return None
        return cache if all(name in cache.cache_dict for name in names) else None


@contextmanager
def kept_runs(
    model: GraftedTransformer, batch: Batch, caches: Mapping[Graft, GraftedCache]
) -> Iterator[None]:
    """Inside, `cached` reads these activations instead of running the same graft again.

    The model, its hooks and its patches must be as they were when the runs were made.
    """
    token = KEPT.set(Kept(model, batch, caches))
    try:
        yield
    finally:
        KEPT.reset(token)


def refuse_patches(
    model: GraftedTransformer, components: Collection[Component], why: str, instead: str
) -> None:
    """Refuse a patch of components that a table could not show correctly.

    Args:
        model: the model.
        components: those that must not be patched.
        why, instead: what would be wrong about the patched run, and what to do.

    Raises:
        ValueError: one of the components is patched here.
    """
    layers: dict[Component, list[int]] = {}
    for component, layer in chain(*(sites for patched, sites in PATCHES.get() if patched is model)):
        if component in components:
            layers.setdefault(component, []).extend([] if layer is None else [layer])
    if layers:
        names = [
            c + (f" (layers {format_numbers(sorted(set(layers[c])))})" if layers[c] else "")
            for c in Component
            if c in layers
        ]
        raise ValueError(f"inside patched(…) of {' and '.join(names)}: {why}. {instead}")


def refuse_patched_output(model: GraftedTransformer) -> None:
    """Refuse a patch of the final norm or the unembedding, through which streams are read again.

    Raises:
        ValueError: one of them is.
    """
    inside = [c for c in model.arch.components if COMPONENTS[c].side is Side.INPUT]
    refuse_patches(
        model,
        components_where(lambda row: row.side is Side.OUTPUT),
        "streams are read here by the norm and the unembedding of the run's own graft, which "
        "patches do not change",
        f'Leave them out of the patch (": {" + ".join([*inside, "block"])}" is all the rest), or '
        "take the patched output itself from model(prompts).",
    )


@contextmanager
def unhooked(model: GraftedTransformer) -> Iterator[None]:
    """Inside, hooks of the final norm and the unembedding are off: what is read is not [batch,
    pos]."""
    points = [
        point
        for module in (model.ln_final, model.unembed)
        for point in module.modules()
        if isinstance(point, HookPoint)
    ]
    with model.active.hooking():
        kept = [(point, point._forward_hooks) for point in points]
        for point in points:
            point._forward_hooks = OrderedDict()
        try:
            yield
        finally:
            for point, hooks in kept:
                point._forward_hooks = hooks


@dataclass(frozen=True)
class Runs:
    """Named grafts, including the two runs that the others are compared with.

    Attributes:
        grafts: name -> graft; the base alone first, then one source everywhere, then the rest.
        base: the name of the run without a graft.
        full: the name of the run that is one source everywhere.
    """

    grafts: Mapping[str, Graft]
    base: str
    full: str

    @classmethod
    def of(cls, sources: Sequence[str], grafts: Grafts | None, full: Graft | str | None) -> "Runs":
        """The base (PRE) and one source everywhere (SFT), then the rest of `grafts`.

        Without a `full` run that is the source `sft`, or the only finetuned one.

        Raises:
            ValueError: a model of several finetuned sources, none of them `sft`, of which `full`
                must name one; a graft that is not a graft; or a `full` that is the base.
        """
        given = {} if grafts is None else named_grafts(grafts)
        others = sources[1:]
        if full is None and "sft" in others:
            full = Graft.rule("sft")
        elif full is None and len(others) != 1:
            raise ValueError(
                f"this model has the sources {' '.join(sources)}: say which one the runs "
                f'are compared with, such as full="{sources[-1]} @ all".'
            )
        found = References.of(given, sources, full)
        assert found.full is not None
        first = {name: found.grafts[name] for name in (found.base, found.full)}
        return cls(first | dict(found.grafts), found.base, found.full)

    def columns(self, name: str) -> dict[str, str]:
        """The columns of a table that describe a run."""
        return {"graft": name, "rule": str(self.grafts[name])}


@dataclass(frozen=True)
class Places:
    """Positions of the prompts of one batch, as rows.

    Attributes:
        batch: the prompts.
        ids: their token ids [batch][pos], on the host.
        prompt: per place, the row of its prompt in the batch.
        position: per place, its position in its prompt.
        rows: per place, its row in `[batch · pos]`.
        table: prompt (its number in the whole input), position and token of each place.
    """

    batch: Batch
    ids: list[list[int]]
    prompt: Int[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]
    rows: Int[np.ndarray, " place"]
    table: pd.DataFrame

    def pick(self, x: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "place *width"]:
        """The places of an activation."""
        index = torch.from_numpy(self.rows).to(x.device)
        return x.flatten(0, 1).index_select(0, index)


def chunks(
    model: GraftedTransformer, whole: Batch, runs: Runs, at: Where, size: int = CHUNK
) -> Iterator[Places]:
    """The places `at` of the prompts, in order: a few prompts at a time, or all of them if there
    are patches or hooks, which apply to the whole batch.

    Raises:
        PromptError: prompts that cannot be run, that have no such place, or to which one of the
            grafts cannot be applied.
        ValueError: `at` is not an expression over spans.
    """
    where = At.parse(at.tolist() if isinstance(at, Tensor | np.ndarray) else at)
    # Before anything runs, and with the prompts' own numbers in the message.
    for graft in runs.grafts.values():
        model.resolve(graft, whole)
    ids = whole.tokens.tolist()
    if any(model is one for one, _ in PATCHES.get()) or any(
        point._forward_hooks for point in model.hook_dict.values()
    ):
        size = len(ids)
    for start in range(0, len(ids), size):
        batch = whole.rows(slice(start, start + size))
        yield _places(model, batch, ids[start : start + size], start, where)


def _places(
    model: GraftedTransformer, batch: Batch, ids: list[list[int]], first: int, where: At
) -> Places:
    prompt, position, rows, tokens = [], [], [], []
    width = batch.real.shape[1]
    for row, item in enumerate(batch.prompts):
        total = batch.totals[row] if item.generates else len(item)
        try:
            chosen = np.flatnonzero(where.select(item.spans_with(total), len(item), total))
        except ValueError as error:
            raise PromptError(f"prompt {first + row}, at={str(where)!r}: {error}") from None
        if not len(chosen):
            raise PromptError(f"prompt {first + row}: at={str(where)!r} selects no position.")
        columns = batch.starts[row] + chosen
        prompt += [row] * len(chosen)
        position += chosen.tolist()
        rows += (row * width + columns).tolist()
        tokens += [token_text(model, ids[row][i]) for i in columns]
    table = pd.DataFrame(
        {"prompt": first + np.array(prompt), "position": position, "token": tokens}
    )
    return Places(batch, ids, np.array(prompt), np.array(position), np.array(rows), table)


def token_text(model: GraftedTransformer, token: int) -> str:
    """A token as text; its id if the model has no tokenizer."""
    return str(token) if model.tokenizer is None else model.to_single_str_token(token)


def measured_next() -> list[Measure]:
    """What every table has of a next-token distribution and its answer."""
    return [m for m in always_measured() if m.over == "next" and "distractors" not in m.needs]


def columns_of(
    model: GraftedTransformer, reading: Predictions, measures: Iterable[Measure]
) -> dict[str, np.ndarray | list[Any]]:
    """Measures as columns: tokens as texts, lists as lists."""
    columns: dict[str, np.ndarray | list[Any]] = {}
    for m in measures:
        column = reading.column(m)
        if m.holds == "tokens":
            columns[m.name] = [[token_text(model, i) for i in row] for row in column.tolist()]
        else:
            columns[m.name] = column.tolist() if m.holds == "numbers" else column
    return columns


def target_ids(
    model: GraftedTransformer,
    prompts: Sequence[Tokenized],
    prepend_bos: bool | None,
    targets: Sequence[int] | None = None,
) -> list[int | None]:
    """The token that is followed after each prompt: that of `targets`, by default the first of the
    prompt's answer; None where a prompt has none.

    Raises:
        ValueError: as many targets as there are prompts, in the vocabulary, are not given.
    """
    if targets is not None:
        n_tokens = model.cfg.d_vocab
        if len(targets) != len(prompts) or not all(0 <= t < n_tokens for t in targets):
            raise ValueError(
                f"targets={list(targets)}: give the id of one token for each of {len(prompts)} "
                f"prompts, from 0 to {n_tokens - 1}."
            )
        return [int(target) for target in targets]
    return [
        None
        if item.prompt is None or item.prompt.answer is None
        else first_token(model, item, item.prompt.answer, prepend_bos)
        for item in prompts
    ]


def first_token(
    model: GraftedTransformer, item: Tokenized, text: str, prepend_bos: bool | None
) -> int:
    """The first token of a text that follows a prompt.

    Raises:
        PromptError: a prompt without a text, or a text that does not begin a token of its own.
    """
    tokenizer = model._tokenizer()
    if item.prompt is not None and ids_with(item, "", tokenizer, prepend_bos) != item.ids:
        # Made elsewhere, with another prepend_bos.
        prepend_bos = item.ids[0] == tokenizer.bos_token_id
    return continuation(item, text, tokenizer, prepend_bos)[0]


def needed_target_ids(
    model: GraftedTransformer,
    prompts: Sequence[Tokenized],
    prepend_bos: bool | None,
    what: str,
    targets: Sequence[int] | None = None,
) -> list[int]:
    """As `target_ids`, of prompts that all need one.

    Raises:
        PromptError: a prompt without an answer `what` needs.
    """
    found: list[int] = []
    for number, target in enumerate(target_ids(model, prompts, prepend_bos, targets)):
        if target is None:
            raise PromptError(
                f"prompt {number} has no answer to {what}. Give Prompt(text, answer=…)."
            )
        found.append(target)
    return found


@torch.no_grad()
def cached(
    model: GraftedTransformer, batch: Batch, graft: Graft, names: Sequence[str]
) -> GraftedCache:
    """The named activations of one run, which ends with the layers unless they need more; of a run
    that `kept_runs` has, those."""
    kept = KEPT.get()
    if kept is not None and (found := kept.found(model, batch, graft, names)) is not None:
        return found
    after = any(name.startswith(("ln_final", "unembed")) for name in names)
    stop = None if after else model.cfg.n_layers
    _, cache = model.run_with_cache(
        batch, graft=graft, stop_at_layer=stop, names_filter=list(names)
    )
    assert isinstance(cache, GraftedCache)
    return cache


def hook_names(model: GraftedTransformer, wanted: str | Sequence[str]) -> list[str]:
    """Full hook names; a name without a module, such as `hook_resid_post`, stands for that hook in
    every layer.

    Raises:
        ValueError: a name that no hook has, or no name at all.
    """
    single = isinstance(wanted, str) or not isinstance(wanted, Iterable)
    asked = [wanted] if single else list(wanted)
    if not asked:
        raise ValueError(
            f"hooks={wanted!r} does not name a hook. Name one, such as hook_resid_post."
        )
    names: list[str] = []
    for want in asked:
        found = [n for n in model.hook_dict if n == want or n.endswith(f".{want}")]
        if not found:
            short = dict.fromkeys(n.rsplit(".", 1)[-1] for n in model.hook_dict)
            raise ValueError(
                f"no hook {want!r}. Write a hook's name, or its last part for every layer: "
                f"{' '.join(short)}.{suggest(str(want), short)}"
            )
        names += found
    return list(dict.fromkeys(names))


def from_1(what: str, number: object) -> int:
    """An option that is a whole number from 1.

    Raises:
        ValueError: anything else.
    """
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"{what}={number!r}: write a whole number from 1.")
    return int(number)


def layer_of(hook: str) -> int | None:
    """The layer that a hook belongs to, None for those outside the layers."""
    return int(hook.split(".")[1]) if hook.startswith("blocks.") else None


def look_into(
    model: GraftedTransformer,
    whole: Batch,
    runs: Runs,
    hooks: Sequence[str],
    at: Where,
) -> Iterator[tuple[Places, dict[str, GraftedCache]]]:
    """The places `at` of a few prompts at a time, with the hooks' activations in every run."""
    size = BUDGET // (len(runs.grafts) * _cache_bytes(model, whole, hooks))
    for places in chunks(model, whole, runs, at, max(1, min(CHUNK, size))):
        yield (
            places,
            {
                name: cached(model, places.batch, graft, hooks)
                for name, graft in runs.grafts.items()
            },
        )


def _cache_bytes(model: GraftedTransformer, whole: Batch, hooks: Sequence[str]) -> int:
    """Most bytes that the hooks of one prompt take in a cache."""
    arch, width = model.arch, whole.real.shape[1]
    row = max(arch.d_model, arch.n_heads * arch.d_head, arch.d_mlp)
    sizes = [width * arch.n_heads if name.endswith(PAIRS) else row for name in hooks]
    return 4 * width * sum(sizes)


def tidy(
    tables: Sequence[pd.DataFrame], first: Sequence[str], whole: Sequence[str] = ()
) -> pd.DataFrame:
    """One table from several, prompt by prompt.

    Args:
        tables: with a column `prompt`, each in its final order.
        first: the columns that come first; the others follow in their order.
        whole: columns of whole numbers that may be NA.
    """
    table = pd.concat(tables, ignore_index=True)
    table = table.astype(dict.fromkeys([c for c in whole if c in table], "Int64"))
    table = table[[*first, *(c for c in table if c not in first)]]
    return table.sort_values("prompt", kind="stable", ignore_index=True)
