"""Cross-model activation patching on the sites of a graft.

A graft changes the *mechanism* at a place: its weights run on whatever comes in. A patch changes
the *information*: the outputs that the finetuned model's own run had there are put in, whoever
computed what led to them. A fact that a patch brings back at a site, and a graft does not, passes
through there and originates before (activation patching: Vig et al. 2020, arXiv 2004.12265; across
finetuned models: Prakash et al. 2024, arXiv 2402.14811, section 5).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlens.components import Component
from graftlens.graft import Graft, Grafts
from graftlens.lens.runs import Places, Runs, chunks, joined, target_ids, token_text
from graftlens.metrics import next_tokens
from graftlens.model.forward import HeadsIn, HeadsOut
from graftlens.model.grafted import GraftedTransformer, GraftLike, Input
from graftlens.model.inputs import Batch
from graftlens.model.mask import HeadSelection, Selection
from graftlens.prompts import PromptError

C = Component

#: What the run is called in which a graft's sites are patched.
PATCHED = "{} (patched)"


@contextmanager
def patched(
    model: GraftedTransformer, prompts: Input, graft: GraftLike, *, prepend_bos: bool | None = None
) -> Iterator[GraftedTransformer]:
    """Inside, a run of `prompts` has SFT's own activations at the sites of `graft`.

    Each site (component, layer, position, head) that the graft gives to a source has the output of
    the component replaced by what it is when that source runs everywhere. All else runs as it
    would: the base, or the graft that the run is given.

    Args:
        model: the model.
        prompts: the prompts that are run inside; anything that `model` runs.
        graft: where to patch, and from which source: a graft, its text, or a mask.
        prepend_bos: None leaves BOS to the tokenizer.

    Example:
        >>> with patched(model, prompt, "sft @ first_entity : mlp : 8-15"):
        ...     logits, cache = model.run_with_cache(prompt)

    Raises:
        PromptError, ValueError: as for a run under the graft; inside, a run of other prompts; and a
            flag by which q, k, v or o do not run as one map (`use_split_qkv_input`,
            `use_attn_in`, `use_attn_result`).
    """
    batch = prompts if isinstance(prompts, Batch) else model.batch(prompts, prepend_bos=prepend_bos)
    mask = model.resolve(graft, batch)
    _check_flags(model)
    real = batch.real.reshape(-1)
    sites = [
        _Site(model.part(component, layer), chosen, real)
        for (component, layer), chosen in mask.sites.items()
    ]
    for source in sorted({s for site in sites for s in site.sources}):
        with ExitStack() as handles, torch.no_grad():
            for site in sites:
                handles.enter_context(_hooked(site.module, site.capture(source)))
            model(batch, graft=Graft.rule(model.sources[source]))
    with ExitStack() as handles:
        handles.enter_context(_checked(model, batch))
        for site in sites:
            if site.sources:
                handles.enter_context(_hooked(site.module, site.put))
        yield model


@torch.no_grad()
def patching(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts,
    *,
    top_k: int = 10,
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Every graft as a graft and as a patch, side by side: does the fact originate there or pass?

    Args:
        model: the model.
        prompts: prompts with answers.
        grafts: name -> graft, or grafts that go by their texts; PRE and SFT are always among them.
        top_k: how many of the likeliest tokens to keep.
        full: the run that counts as SFT; needed where there are several finetuned sources.
        prepend_bos: None leaves BOS to the tokenizer.

    Returns:
        One row per prompt and run, with `evaluate`'s columns of the answer's first token and `how`
        (`graft` or `patch`). The patch of a graft is the run `NAME (patched)`, so that `summarise`
        gives accuracies and recovery of both, and `compare` the difference between them.

    Raises:
        PromptError: a prompt without an answer, or one that a graft cannot be applied to.
        ValueError: as for `patched`.
    """
    runs = Runs.of(model, grafts, full)
    parts = []
    for places in chunks(model, prompts, "last", prepend_bos):
        batch = places.batch
        targets = target_ids(model, batch.prompts, prepend_bos)
        for row, target in enumerate(targets):
            if target is None:
                number = int(places.table["prompt"].iloc[row])
                raise PromptError(
                    f"prompt {number} has no answer to score. Give Prompt(text, answer=…)."
                )
        ids = [target for target in targets if target is not None]
        for name, graft in runs.grafts.items():
            said = runs.columns(name) | {"how": "graft"}
            parts.append(_scored(model, places, model(batch, graft=graft), ids, top_k, said))
            if name in (runs.base, runs.full):
                continue
            with patched(model, batch, graft):
                logits = model(batch, graft=Graft())
            said |= {"graft": PATCHED.format(name), "how": "patch"}
            parts.append(_scored(model, places, logits, ids, top_k, said))
    table = joined(parts).sort_values("prompt", kind="stable", ignore_index=True)
    table.attrs["recovery"] = {"base": runs.base, "full": runs.full}
    return table


def _scored(
    model: GraftedTransformer,
    places: Places,
    logits: Tensor,
    targets: list[int],
    top_k: int,
    said: dict[str, str],
) -> pd.DataFrame:
    last = places.pick(logits)
    found = next_tokens(last, torch.tensor(targets, device=last.device)[:, None], top_k)
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
            "rank": found.rank,
            "prob": np.exp(found.logprobs[:, 0]),
            "logprob": found.logprobs[:, 0],
            "top_tokens": [[token_text(model, i) for i in row] for row in found.top_ids.tolist()],
            "top_probs": np.exp(found.top_logprobs).tolist(),
            "answer_logprob": pd.NA,
            "reason": None,
        }
    )


@dataclass(frozen=True)
class _Kept:
    """What a source's own run had at some rows, of some heads (None is all)."""

    rows: Tensor
    heads: tuple[int, ...] | None
    values: Tensor


class _Site:
    """One component in one layer: where its output is replaced, and by what."""

    def __init__(
        self, module: nn.Module, chosen: Selection | HeadSelection, real: np.ndarray
    ) -> None:
        self.module = module
        self.kept: list[_Kept] = []
        groups: list[tuple[tuple[int, ...] | None, Selection]] = (
            [(None, chosen)] if isinstance(chosen, Selection) else list(chosen.groups)
        )
        #: (source, heads, rows) of everything that is not the base's.
        self.wanted = [
            (int(source), heads, np.flatnonzero((selection.choice == source) & real))
            for heads, selection in groups
            for source in np.unique(selection.choice[real])
            if source != 0
        ]
        self.sources = {source for source, _, _ in self.wanted}
        self.by_head = isinstance(chosen, HeadSelection)

    def capture(self, source: int) -> Callable[..., None]:
        """A forward hook that keeps what this site needs of a source's own run."""

        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            for wanted, heads, rows in self.wanted:
                if wanted == source:
                    index = torch.from_numpy(rows).to(out.device)
                    parts = self._parts(module, args, out)[index]
                    self.kept.append(_Kept(index, heads, parts.clone()))

        return keep

    def put(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """A forward hook that puts in what was kept."""
        made = out.clone()
        # Rows [batch · pos], whatever the map's own shape: a view, so that `made` is written to.
        flat = made if made.ndim == 2 else made.view(-1, *made.shape[2:]).flatten(1)
        for kept in self.kept:
            if kept.heads is None:
                flat[kept.rows] = kept.values
                continue
            heads = list(kept.heads)
            if isinstance(module, HeadsIn):
                # Heads of o add up: theirs for ours.
                ours = self._parts(module, args, out)[kept.rows]
                flat[kept.rows] += (kept.values - ours)[:, heads].sum(1)
            else:
                assert isinstance(module, HeadsOut), "only q, k, v and o have heads"
                by_head = flat.view(len(flat), module.n_heads, -1)
                index = torch.tensor(heads, device=out.device)
                by_head[kept.rows[:, None], index] = kept.values[:, heads]
        return made

    def _parts(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The output row by row, and head by head where heads differ."""
        if not self.by_head:
            return out if out.ndim == 2 else out.flatten(0, 1).flatten(1)
        if isinstance(module, HeadsIn):
            z, chosen = args[0].x, args[1]
            return module.results(z.unflatten(1, (module.n_heads, -1)), chosen)
        assert isinstance(module, HeadsOut), "only q, k, v and o have heads"
        return out.unflatten(1, (module.n_heads, -1))


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[RemovableHandle]:
    handle = module.register_forward_hook(hook)
    try:
        yield handle
    finally:
        handle.remove()


@contextmanager
def _checked(model: GraftedTransformer, batch: Batch) -> Iterator[None]:
    """Runs of other prompts are refused: the rows would be other prompts' rows."""

    def check(_: nn.Module, args: tuple[Any, ...]) -> None:
        _check_flags(model)
        given = args[0]
        if given.shape != batch.tokens.shape or not torch.equal(given.cpu(), batch.tokens.cpu()):
            raise ValueError(
                f"these are not the prompts that are patched: tokens {tuple(given.shape)}, patched "
                f"are {tuple(batch.tokens.shape)}. Inside patched(…), run the prompts that it was "
                "given, padded on the same side."
            )

    handle = model.embed.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _check_flags(model: GraftedTransformer) -> None:
    for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result"):
        if getattr(model.cfg, flag):
            raise ValueError(
                f"model.cfg.{flag} is on, so attention does not run as one map that can be "
                f"patched. Turn it off: model.set_{flag}(False)."
            )
