"""Cross-model activation patching on the sites of a graft.

A graft changes the *mechanism* at a place: its weights run on whatever comes in. A patch changes
the *information*: the activations from the finetuned model's own run are inserted, regardless of
what the grafted run computed before. A fact that a patch brings back at a site, and a graft does
not, passes through there and originates earlier (activation patching: Vig et al. 2020, arXiv
2004.12265; across finetuned models, as CMAP: Prakash et al. 2024, arXiv 2402.14811).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlens.components import COMPONENTS, Component, Side
from graftlens.graft import Graft, Grafts
from graftlens.lens.runs import (
    PATCHES,
    Places,
    Runs,
    chunks,
    columns_of,
    from_1,
    measured_next,
    needed_target_ids,
    tidy,
    token_text,
)
from graftlens.metrics import Predictions
from graftlens.model.arch import Site
from graftlens.model.choice import Choice, Selection
from graftlens.model.grafted import GraftedTransformer, GraftLike, Input
from graftlens.model.inputs import Batch
from graftlens.model.linear import Gathered, UnitsIn, UnitsOut
from graftlens.model.mask import GraftMask
from graftlens.references import marked

C = Component

#: True while patches in force must not change what runs.
SUSPENDED: ContextVar[bool] = ContextVar("suspended", default=False)

#: How many numbers are kept at a time of the sources' own runs.
HELD = 2**26

#: The name of the run in which a graft's sites are patched.
PATCHED = "{} (patched)"


@contextmanager
def patched(
    model: GraftedTransformer, prompts: Input, graft: GraftLike, *, prepend_bos: bool | None = None
) -> Iterator[GraftedTransformer]:
    """Inside, a run of `prompts` has SFT's own activations at the sites of `graft`.

    Each site (component, layer, position, head) that the graft gives to a source has the output of
    the component replaced by what it is when that source runs everywhere. Everything else runs
    as it would without the patch: the base, or the graft that the run is given. Hooks that are
    attached to the model act in that source's run too. What `lens` calls PRE or SFT inside is the
    patched run of that graft. A graft without rules patches nothing.

    `logit_lens`, `kl_divergence` and `direct_logit_attribution` read streams by the norm and the
    unembedding of the run's own graft, so they refuse a patch of `ln_final` or `unembed`, as
    `"sft @ last"` is. Patch `: embed + pos_embed + block` (`pos_embed` where the model has one),
    or read `model(prompts)`.

    Args:
        model: the model.
        prompts: the prompts that are run inside; anything that `model` runs.
        graft: where to patch, and from which source: a graft, its text, or a mask.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.

    Example:
        >>> with patched(model, prompt, "sft @ first_entity : mlp : 8-15"):
        ...     logits, cache = model.run_with_cache(prompt)

    Raises:
        PromptError, ValueError: as for a run under the graft; rules that give no site to a source
            other than the base; inside, a run of other prompts; and a flag by which q, k, v or o
            do not run as one map (`use_split_qkv_input`, `use_attn_in`, `use_attn_result`).
        RuntimeError: another thread or task runs the model or has hooks on it; and, there, a run
            while this one is inside.
    """
    batch = prompts if isinstance(prompts, Batch) else model.batch(prompts, prepend_bos=prepend_bos)
    mask = model.resolve(graft, batch)
    sites = _sites(model, batch, mask)
    if sites:
        _capture(model, batch, sites.values())
    elif mask.graft:
        raise ValueError(_of_the_base(model, mask.graft))
    with _put_in(model, batch, sites):
        yield model


def _sites(model: GraftedTransformer, batch: Batch, mask: GraftMask) -> dict[Site, "_Site"]:
    """Where a patch puts something in."""
    mask.check_numbers("a patch")
    real = batch.real.reshape(-1)
    made = {
        site: _Site(model.module_of(*site), chosen, real) for site, chosen in mask.sites.items()
    }
    return {where: site for where, site in made.items() if site.sources}


def _capture(model: GraftedTransformer, batch: Batch, sites: Collection["_Site"]) -> None:
    """Keep what each site needs, by one run of each source."""
    if sites:
        _check_flags(model)
    for source in sorted({s for site in sites for s in site.sources}):
        with ExitStack() as handles, model.active.hooking(), _suspended(), torch.no_grad():
            for site in sites:
                handles.enter_context(_hooked(site.module, site.capture(source)))
            model(batch, graft=Graft.rule(model.sources[source]))


@contextmanager
def _put_in(
    model: GraftedTransformer, batch: Batch, sites: Mapping[Site, "_Site"]
) -> Iterator[None]:
    """Inside, a run has what the sites have kept."""
    if not sites:
        yield
        return

    def put(site: _Site) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if SUSPENDED.get():
                return out
            _check_rows(model, batch)
            return site.put(module, args, out)

        return hook

    with ExitStack() as handles:
        handles.enter_context(model.active.hooking())
        handles.enter_context(_in_force(model, frozenset(sites)))
        handles.enter_context(_checked(model, batch))
        for site in sites.values():
            handles.enter_context(_hooked(site.module, put(site)))
        yield


def _of_the_base(model: GraftedTransformer, graft: Graft) -> str:
    base, other = model.sources[0], model.sources[-1]
    return (
        f"the patch {str(graft)!r} {_NO_SITE}. Activations of the "
        f"base ({base}) cannot be patched in, because it is what runs anyway. To patch it onto "
        f"{other}, load "
        f'{other} as the base (GraftedTransformer.from_pretrained({{"{other}": …, "{base}": …}})) '
        f'and patch "{base} @ …".'
    )


@torch.no_grad()
def patching(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts,
    *,
    top_k: int = 10,
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
    patches_only: bool = False,
) -> pd.DataFrame:
    """Every graft as a graft and as a patch, side by side: does the fact originate there or pass
    through?

    The output itself is not patched: `ln_final` and `unembed` are left out of every patch, because
    SFT's own logits would be SFT's answer whatever came before. A graft of these alone has no
    patch, and neither does one that gives a prompt's sites to the base only: its row has a `reason`
    and no numbers.

    Args:
        model: the model.
        prompts: prompts with answers.
        grafts: name -> graft, or grafts, which are keyed by their text; PRE and SFT are always
            among them.
        top_k: how many of the likeliest tokens to keep.
        full: the run that counts as SFT, as in `logit_lens`.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        patches_only: leave the grafts themselves out, except for PRE and SFT: half of the runs.

    Returns:
        One row per prompt and run, with `evaluate`'s columns of the answer's first token and `how`
        (`graft` or `patch`). The patch of a graft is the run `NAME (patched)`, so that `summarise`
        gives accuracies and recovery of both, and `compare` the difference between them.

    Raises:
        PromptError: a prompt without an answer, or one that a graft cannot be applied to.
        ValueError: a `top_k` that is not a number from 1, a graft that has the name of another
            one's patch, or a flag, as for `patched`.
    """
    top_k = from_1("top_k", top_k)
    runs = Runs.of(model.sources, grafts, full)
    for name in runs.grafts:
        if PATCHED.format(name) in runs.grafts:
            raise ValueError(
                f"a graft is called {PATCHED.format(name)!r}, which is the name of the patch of "
                f"{name!r}. Give it another name."
            )
    tables: list[pd.DataFrame] = []
    whole = model.batch(prompts, prepend_bos=prepend_bos)
    targets = needed_target_ids(model, whole.prompts, prepend_bos, "score")
    for places in chunks(model, whole, runs, "last"):
        ids = [targets[i] for i in places.table["prompt"]]
        tables += _side_by_side(model, places, runs, ids, top_k, patches_only)
    return marked(tidy(tables, ("prompt", "graft", "rule", "how")), runs.base, runs.full)


def _side_by_side(
    model: GraftedTransformer,
    places: Places,
    runs: Runs,
    targets: list[int],
    top_k: int,
    patches_only: bool,
) -> Iterator[pd.DataFrame]:
    """Each run's table: PRE, SFT, then each graft and its patch."""
    batch, references = places.batch, (runs.base, runs.full)

    def scored(graft: Graft, said: Mapping[str, str]) -> pd.DataFrame:
        return _scored(model, places, model(batch, graft=graft), targets, top_k, said)

    for name in references:
        yield scored(runs.grafts[name], runs.columns(name) | {"how": "graft"})
    masks = {
        name: model.resolve(graft, batch)
        for name, graft in runs.grafts.items()
        if name not in references
    }
    inside = {name: _without_output(mask) for name, mask in masks.items()}
    for name, sites in _captured(model, batch, inside):
        if not patches_only:
            yield scored(runs.grafts[name], runs.columns(name) | {"how": "graft"})
        with _put_in(model, batch, sites):
            said = {"graft": PATCHED.format(name), "how": "patch"}
            table = scored(Graft(), runs.columns(name) | said)
        kept = _prompts_of(inside[name], batch)
        if not kept.all():
            numbers = [m.name for m in measured_next()]
            none = {c: table[c].astype(object).where(kept, pd.NA) for c in numbers}
            there = _prompts_of(masks[name], batch)
            why = np.where(there, _OUTPUT_ONLY, f"the graft {_NO_SITE}")
            reason = [None if k else str(w) for k, w in zip(kept, why, strict=True)]
            none["reason"] = pd.Series(reason, table.index, dtype=object)  # None stays None
            table = table.assign(**none)
        yield table


def _captured(
    model: GraftedTransformer, batch: Batch, masks: Mapping[str, GraftMask]
) -> Iterator[tuple[str, dict[Site, "_Site"]]]:
    """Each mask's sites with what they keep: of as many masks at once as memory is meant for."""
    arch, held = model.arch, 0
    width = max(arch.d_model, arch.d_mlp, arch.n_heads * arch.d_head)
    group: dict[str, dict[Site, _Site]] = {}
    for name, mask in masks.items():
        sites = _sites(model, batch, mask)
        size = width * sum(len(w.rows) for site in sites.values() for w in site.wanted)
        if group and held + size > HELD:
            yield from _kept_by(model, batch, group)
            group, held = {}, 0
        group[name], held = sites, held + size
    yield from _kept_by(model, batch, group)


def _kept_by(
    model: GraftedTransformer, batch: Batch, group: Mapping[str, dict[Site, "_Site"]]
) -> Iterator[tuple[str, dict[Site, "_Site"]]]:
    _capture(model, batch, [site for sites in group.values() for site in sites.values()])
    yield from group.items()


_OUTPUT_ONLY = "the graft covers only ln_final and unembed, whose output is the answer itself"
_NO_SITE = "gives no site to a source other than the base"


def _without_output(mask: GraftMask) -> GraftMask:
    """The mask with the base at the final norm and the unembedding."""
    base = Selection.uniform(0, int(np.prod(mask.shape)))
    sites = {
        site: base if COMPONENTS[site[0]].side is Side.OUTPUT else chosen
        for site, chosen in mask.sites.items()
    }
    return replace(mask, sites=sites)


def _prompts_of(mask: GraftMask, batch: Batch) -> Bool[np.ndarray, " batch"]:
    """Which prompts have a site that is not the base's."""
    found = np.zeros(batch.real.shape, dtype=bool)
    for chosen in mask.sites.values():
        for _, selection in chosen.selections():
            found |= selection.share(0).reshape(found.shape) != 1
    return (found & batch.real).any(1)


def _scored(
    model: GraftedTransformer,
    places: Places,
    logits: Tensor,
    targets: list[int],
    top_k: int,
    said: Mapping[str, str],
) -> pd.DataFrame:
    last = places.pick(logits)
    found = Predictions(last, answer=torch.tensor(targets, device=last.device), top_k=top_k)
    asked = [item.prompt for item in places.batch.prompts]
    return pd.DataFrame(
        {
            "prompt": places.table["prompt"],
            **{name: [value] * len(targets) for name, value in said.items()},
            "template": [None if p is None else p.name or p.template for p in asked],
            "text": [None if p is None else p.text for p in asked],
            "answer": [None if p is None else p.answer for p in asked],
            "target": [token_text(model, t) for t in targets],
            "target_id": targets,
            **columns_of(model, found, measured_next()),
            "answer_logprob": pd.NA,
            "reason": None,
        }
    )


@dataclass(frozen=True)
class _Wanted:
    """What is put in at some rows: a source's share of some units (None is all)."""

    source: int
    units: tuple[int, ...] | None
    rows: Int[np.ndarray, " rows"]
    share: Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class _Kept:
    """Activations from a source's own run, and its share of the rows (None is all of them)."""

    rows: Int[Tensor, " rows"]
    units: tuple[int, ...] | None
    values: Float[Tensor, "rows width"]
    share: Float[Tensor, "rows 1"] | None


class _Site:
    """One component in one layer: where its output is replaced, and by what."""

    def __init__(self, module: nn.Module, chosen: Choice, real: np.ndarray) -> None:
        self.module = module
        self.kept: list[_Kept] = []
        #: Everything that is not the base's.
        self.wanted: list[_Wanted] = []
        groups = [units for units, _ in chosen.selections() if units is not None]
        # What belongs to no unit comes with the whole output, and units that run something else
        # are then changed; a map onto units has nothing that belongs to none.
        apart = bool(groups) and not isinstance(module, UnitsIn)
        for units in groups if apart else [None, *groups]:
            for source in {*chosen.sources, *chosen.whole.sources}:
                share = chosen.share(source, unit=None if units is None else units[0])
                if units is not None and not apart:
                    share = share - chosen.share(source)
                rows = np.flatnonzero((share != 0) & real)
                if source and len(rows):
                    self.wanted.append(_Wanted(source, units, rows, share[rows]))
        self.sources = {wanted.source for wanted in self.wanted}

    def capture(self, source: int) -> Callable[..., None]:
        """A forward hook that keeps what this site needs of a source's own run."""

        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            for wanted in self.wanted:
                if wanted.source == source:
                    index = torch.from_numpy(wanted.rows).to(out.device)
                    values = _given(module, args, out, wanted.units)[index]
                    share = torch.from_numpy(wanted.share).to(values)
                    mixed = None if (wanted.share == 1).all() else share[:, None]
                    self.kept.append(_Kept(index, wanted.units, values, mixed))

        return keep

    def put(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """A forward hook that puts in what was kept."""
        made = out.clone()
        flat = _rows(made)
        for kept in self.kept:
            if kept.share is None and not (kept.units and isinstance(module, UnitsIn)):
                flat[kept.rows[:, None], _columns(module, flat, kept.units)] = kept.values
                continue
            # Units that add up, and shares of a whole: theirs for ours.
            change = kept.values - _given(module, args, out, kept.units)[kept.rows]
            change = change if kept.share is None else kept.share * change
            units = None if isinstance(module, UnitsIn) else kept.units
            flat[kept.rows[:, None], _columns(module, flat, units)] += change
        return made


def _rows(out: Tensor) -> Tensor:
    """A view of an output as rows [batch · pos, width], whatever the shape of its map's output."""
    return out if out.ndim == 2 else out.view(-1, *out.shape[2:]).flatten(1)


def _columns(
    module: nn.Module, out: Tensor, units: tuple[int, ...] | None
) -> Int[Tensor, " columns"]:
    """The columns of an output that some units give; None is all."""
    if units is None:
        return torch.arange(out.shape[1], device=out.device)
    assert isinstance(module, UnitsOut), "only attention and the MLP have units"
    return module.columns(torch.tensor(units, device=out.device), out.shape[1])


def _given(
    module: nn.Module, args: tuple[Any, ...], out: Tensor, units: tuple[int, ...] | None
) -> Float[Tensor, "row width"]:
    """What some units give (None is all): their columns; of a map from units, what they add."""
    flat = _rows(out)
    if units is not None and isinstance(module, UnitsIn):
        x: Gathered = args[0]
        mine = module.columns(torch.tensor(units, device=out.device), x.x.shape[1])
        alone = torch.zeros_like(x.x).index_copy(1, mine, x.x[:, mine])
        return module.product(Gathered(alone), args[1])
    return flat if units is None else flat[:, _columns(module, flat, units)]


@contextmanager
def _suspended() -> Iterator[None]:
    """Inside, no patch acts; used for a source's own run."""
    token = SUSPENDED.set(True)
    try:
        yield
    finally:
        SUSPENDED.reset(token)


@contextmanager
def _in_force(model: GraftedTransformer, sites: frozenset[Site]) -> Iterator[None]:
    """Tells the lens that a few prompts are not the whole batch that is patched, and that it
    recomputes some sites."""
    token = PATCHES.set((*PATCHES.get(), (model, sites)))
    try:
        yield
    finally:
        PATCHES.reset(token)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[RemovableHandle]:
    handle = module.register_forward_hook(hook)
    try:
        yield handle
    finally:
        handle.remove()


@contextmanager
def _checked(model: GraftedTransformer, batch: Batch) -> Iterator[None]:
    """Runs of other prompts are refused: their rows do not correspond."""

    def check(_: nn.Module, args: tuple[Any, ...]) -> None:
        if SUSPENDED.get():
            return
        _check_flags(model)
        _check_rows(model, batch)
        if not torch.equal(args[0], batch.tokens.to(args[0].device)):
            raise ValueError(_OTHERS)

    handle = model.embed.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


_OTHERS = (
    "these are not the prompts that are patched, or not all of their rows. Inside patched(…), run "
    "the prompts that it was given, as a whole and padded on the same side: model(prompts), "
    "run_with_cache, run_with_hooks."
)


def _check_rows(model: GraftedTransformer, batch: Batch) -> None:
    """Check that the current pass has the rows that are patched, at their positions."""
    mask = model.active.current
    if not isinstance(mask, GraftMask) or (mask.shape, mask.extents) != (
        batch.real.shape,
        batch.extents,
    ):
        raise ValueError(_OTHERS)


def _check_flags(model: GraftedTransformer) -> None:
    for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result"):
        if getattr(model.cfg, flag):
            raise ValueError(
                f"model.cfg.{flag} is on, so attention does not run as one map that can be "
                f"patched. Turn it off: model.set_{flag}(False)."
            )
