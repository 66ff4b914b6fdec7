"""The logit lens of grafted runs, and where an answer first appears in it."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.graft import Graft, Grafts, Where
from graftlens.lens.runs import (
    Places,
    Runs,
    columns_of,
    from_1,
    look_into,
    measured_next,
    refuse_patched_output,
    target_ids,
    tidy,
    token_text,
    unhooked,
)
from graftlens.metrics import Measure, Predictions, measure
from graftlens.model.cache import GraftedCache
from graftlens.model.grafted import GraftedTransformer, Input

#: Most bytes of the logits that are read at a time, of every run. The allocator maps and clears
#: larger tensors at every step, which is slower.
BYTES = 24 << 20

#: What `kl_divergence` measures.
DIVERGENCES = ("kl_base", "kl_full", "kl_from_base", "kl_from_full", "js_base", "js_full")


@torch.no_grad()
def logit_lens(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts | None = None,
    *,
    at: Where = "all",
    incl_mid: bool = False,
    top_k: int = 5,
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
    targets: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The residual stream of each run read as next-token logits, by layer and position.

    Logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): each stream goes through
    the run's final norm and unembedding. Under a graft these are the ones that the graft chose at
    that position, so the last layer gives the run's own output. Hooks that are attached to the
    model act on the layers, but hooks of `ln_final` and `unembed` do not act on this reading; a
    patch of these is refused.

    Args:
        model: the model.
        prompts: anything that can be run; prompts with an answer have it ranked.
        grafts: name -> graft, or grafts, which are keyed by their text. The base alone (PRE) and
            one source everywhere (SFT) are always among the runs.
        at: the positions to read, as in a rule: `"last"`, `"first_entity + last"`.
        incl_mid: also the streams between attention and MLP.
        top_k: how many of the likeliest tokens to keep.
        full: the run that counts as SFT and that `kl_full` is measured against: a graft, the name
            of one of `grafts`, or a finetuned source's name; needed if there are several
            finetuned sources and none is called `sft`.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        targets: per prompt, the id of the token to follow; by default the answer's first one.
        layers: after how many layers to read, 0 for the embeddings; by default after each.

    Returns:
        One row per prompt, graft, layer and position: `prompt` (its number), `graft`, `rule`,
        `layer` (how many layers have run; half a layer more between attention and MLP), `stream`
        (TransformerLens's name: `0_pre`, `3_mid`, `final_post`), `position`, `token`, `target` and
        `target_id` (the answer's first token), its `rank` (1 is best), `ties` (other tokens with
        exactly its logit, of which those with smaller ids rank before it), `prob` and `logprob`
        (nats), `entropy` (nats), `kl_base` and `kl_full` (KL of this distribution to that of PRE
        and of SFT at the same layer and position, nats), `top_tokens`, `top_probs`. If a
        prompt has no answer, the columns about it are NA. Where sources have different
        vocabularies, entropy and KL are those of the tokens that all have, renormalised
        (the column `common_tokens` says how many).

    Raises:
        PromptError: prompts that cannot be run, or without the positions `at`.
        ValueError: a graft that the model cannot run, a `top_k` that is not a number from 1, a
            patch of `ln_final` or `unembed` in force, or `incl_mid` with parallel attention and
            MLP, which have no stream between them; `layers` that the model lacks;
            `targets` of other than one token per prompt.
    """
    top_k = from_1("top_k", top_k)
    refuse_patched_output(model)
    runs = Runs.of(model.sources, grafts, full)
    streams = streams_of(model, incl_mid)
    if layers is not None:
        streams = [stream for stream in streams if stream[0] in layers]
        if not streams or len(streams) < len(set(layers)):
            raise ValueError(
                f"layers={list(layers)}: name one or more numbers of layers that have run, from 0 "
                f"to {model.cfg.n_layers}."
            )
    hooks = [hook for _, _, hook in streams]
    tables = []
    whole = model.batch(prompts, prepend_bos=prepend_bos)
    followed = target_ids(model, whole.prompts, prepend_bos, targets)
    for places, caches in look_into(model, whole, runs, hooks, at):
        found: dict[str, list[pd.DataFrame]] = {name: [] for name in runs.grafts}
        for layer, stream, hook in streams:
            read = _Reading(model, runs, places, caches, hook, followed, top_k)
            for name, table in read.tables().items():
                columns = {**runs.columns(name), "layer": layer, "stream": stream}
                found[name].append(table.assign(**columns))
        tables += [table for several in found.values() for table in several]
    first = ("prompt", "graft", "rule", "layer", "stream", "position", "token")
    table = tidy(tables, first, whole=("target_id", "rank", "ties"))
    table = model.vocabularies.marked(table)
    return table if incl_mid else table.astype({"layer": int})


def emergence(table: pd.DataFrame, k: int = 1) -> pd.DataFrame:
    """Where the answer comes up: the first layer from which its rank stays within `k`.

    Args:
        table: from `logit_lens`, with one or several positions per prompt, including the last
            layer's rows (stream `final_post`).
        k: the rank that counts, 1 for the likeliest token.

    Returns:
        `prompt`, `graft`, `position` and `layer`: how many layers have run when the answer's rank
        is at most `k` and stays so up to the output; NA where the output's rank is above `k`.
        Prompts without an answer have no row.

    Raises:
        ValueError: `k` is not a whole number from 1, or a table without answers, without the last
            layer of some run, or with two rows for one layer of it.
    """
    k = from_1("k", k)
    if not {"rank", "layer", "stream"} <= set(table) or table["rank"].isna().all():
        raise ValueError(
            "no prompt of this table has an answer, or the table is not from logit_lens. Give the "
            "table that logit_lens returns for Prompts with answer=…"
        )
    ranked = table[table["rank"].notna()]
    rows = []
    for key, part in ranked.groupby(["prompt", "graft", "position"], sort=False):
        part = part.sort_values("layer")
        about = "prompt {}, graft {!r}, position {}".format(*key)
        if part["stream"].iloc[-1] != "final_post":
            raise ValueError(
                f"{about}: this table has no row of the last layer (stream final_post). Give all "
                "layers of logit_lens."
            )
        if twice := part["layer"][part["layer"].duplicated()].tolist():
            raise ValueError(
                f"{about}: this table has two rows of layer {twice[0]:g}. If it was joined from "
                "several tables, give their prompts distinct numbers."
            )
        within = (part["rank"] <= k).to_numpy(dtype=bool)
        after = len(within) - int(np.argmin(within[::-1])) if not within.all() else 0
        layer = part["layer"].iloc[after] if within[-1] else pd.NA
        rows.append((*key, layer))
    made = pd.DataFrame(rows, columns=["prompt", "graft", "position", "layer"])
    return made.astype({"layer": "Float64" if (ranked["layer"] % 1).any() else "Int64"})


@torch.no_grad()
def kl_divergence(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts | None = None,
    *,
    at: Where = "all",
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How far each run's next-token distribution is from PRE's and SFT's, position by position.

    Hooks that are attached to `ln_final` and `unembed` do not act on it, as in `logit_lens`, and
    patches of these are refused. To measure from another run, name it as `full`.

    Args:
        model, prompts, grafts, at, full, prepend_bos: as in `logit_lens`.

    Returns:
        One row per prompt, graft and position: `prompt`, `graft`, `rule`, `position`, `token`, and
        in nats `kl_base` and `kl_full`, the Kullback-Leibler divergence KL(graft ‖ PRE) and
        KL(graft ‖ SFT); `kl_from_base` and `kl_from_full`, the other way round; `js_base` and
        `js_full`, the Jensen-Shannon divergences. Where sources have different vocabularies, all
        are those of the tokens that all have, renormalised (the column `common_tokens` says how
        many).

    Raises:
        PromptError, ValueError: as in `logit_lens`.
    """
    refuse_patched_output(model)
    runs = Runs.of(model.sources, grafts, full)
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    measured = [measure(name) for name in DIVERGENCES]
    tables: list[pd.DataFrame] = []
    whole = model.batch(prompts, prepend_bos=prepend_bos)
    for places, caches in look_into(model, whole, runs, [hook], at):
        found: dict[str, list[pd.DataFrame]] = {name: [] for name in runs.grafts}
        for rows in _parts(model, places):
            n_common = model.vocabularies.common
            said = {
                name: Predictions(_read(model, places, cache, hook, rows), n_common=n_common)
                for name, cache in caches.items()
            }
            base, full_run = said[runs.base], said[runs.full]
            for name, reading in said.items():
                compared = Predictions(reading.logits, base=base, full=full_run, n_common=n_common)
                columns = columns_of(model, compared, measured)
                found[name].append(places.table[rows].assign(**columns))
        for name, several in found.items():
            tables += [table.assign(**runs.columns(name)) for table in several]
    return model.vocabularies.marked(tidy(tables, ("prompt", "graft", "rule", "position", "token")))


def streams_of(model: GraftedTransformer, incl_mid: bool = False) -> list[tuple[float, str, str]]:
    """(layers run, TransformerLens's name, hook) of every stream."""
    if incl_mid and model.arch.parallel:
        raise ValueError(
            f"incl_mid=True: attention and MLP of {model.arch.family} are parallel, so there is no "
            "stream between them. Leave incl_mid out."
        )
    found: list[tuple[float, str, str]] = []
    for l in range(model.cfg.n_layers):
        found.append((float(l), f"{l}_pre", f"blocks.{l}.hook_resid_pre"))
        if incl_mid:
            found.append((l + 0.5, f"{l}_mid", f"blocks.{l}.hook_resid_mid"))
    last = model.cfg.n_layers
    return [*found, (float(last), "final_post", f"blocks.{last - 1}.hook_resid_post")]


def _parts(model: GraftedTransformer, places: Places) -> Iterator[slice]:
    """The places, as many at a time as `BYTES` allows."""
    size = max(1, BYTES // (4 * model.cfg.d_vocab))
    for start in range(0, len(places.rows), size):
        yield slice(start, start + size)


class _Reading:
    """One stream of all runs, read at all places."""

    def __init__(
        self,
        model: GraftedTransformer,
        runs: Runs,
        places: Places,
        caches: dict[str, GraftedCache],
        hook: str,
        targets: Sequence[int | None],
        top_k: int,
    ) -> None:
        self.model, self.runs, self.places, self.caches = model, runs, places, caches
        self.hook, self.top_k, self.n_common = hook, top_k, model.vocabularies.common
        self.targets = [targets[i] for i in places.table["prompt"]]

    def tables(self) -> dict[str, pd.DataFrame]:
        tables: dict[str, list[pd.DataFrame]] = {name: [] for name in self.runs.grafts}
        for rows in _parts(self.model, self.places):
            said = {
                name: _read(self.model, self.places, cache, self.hook, rows)
                for name, cache in self.caches.items()
            }
            base, full = (
                Predictions(said[name], top_k=self.top_k, n_common=self.n_common)
                for name in (self.runs.base, self.runs.full)
            )
            for name, logits in said.items():
                own = {self.runs.base: base, self.runs.full: full}.get(name)
                tables[name].append(self._table(logits, own, base, full, rows))
        return {name: pd.concat(several) for name, several in tables.items()}

    def _table(
        self,
        logits: Float[Tensor, "place d_vocab"],
        own: Predictions | None,
        base: Predictions,
        full: Predictions,
        rows: slice,
    ) -> pd.DataFrame:
        targets = self.targets[rows]
        ids = torch.tensor([t or 0 for t in targets], device=logits.device)
        own = own or Predictions(logits, top_k=self.top_k, n_common=self.n_common)
        # What is known of the base and of the full run is not computed twice.
        reading = own.rows(None, answer=ids, base=base, full=full)
        columns = columns_of(self.model, reading, _measured())
        known = np.array([t is not None for t in targets])
        for m in _measured():
            if m.holds == "count":
                pairs = zip(columns[m.name], known, strict=True)
                columns[m.name] = [int(n) if k else pd.NA for n, k in pairs]
            elif "answer" in m.needs:
                columns[m.name] = np.where(known, columns[m.name], np.nan)
        return self.places.table[rows].assign(
            target=[None if t is None else token_text(self.model, t) for t in targets],
            target_id=[pd.NA if t is None else t for t in targets],
            **columns,
        )


def _measured() -> list[Measure]:
    """What is read off each stream; lists come last."""
    always = measured_next()
    lists = [m for m in always if m.holds in ("numbers", "tokens")]
    more = [measure(name) for name in ("entropy", "kl_base", "kl_full")]
    return [*(m for m in always if m not in lists), *more, *lists]


def _read(
    model: GraftedTransformer, places: Places, cache: GraftedCache, hook: str, rows: slice
) -> Float[Tensor, "place d_vocab"]:
    """A stream at some places as logits, by the weights that the graft chose there."""
    index = places.rows[rows]
    resid = cache[hook].flatten(0, 1)[torch.from_numpy(index).to(cache[hook].device)]
    with unhooked(model):
        logits = model.logits_from(resid[None], cache.mask.pick(index[None]))[0]
    return logits if logits.dtype == torch.float64 else logits.float()
