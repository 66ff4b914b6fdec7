"""Direct logit attribution under a graft: which terms of a run make up the answer's logit.

The residual stream before the final norm is the sum of what embeddings, heads and MLPs wrote. With
the norm's scale held at its actual value, the answer's logit is linear in that sum, so each
term has a contribution and they add up (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"; Wang et al. 2022, arXiv 2211.00593). Each term is read with the
weights that the graft chose at its position: W_O, norms and unembedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.components import Component
from graftlens.graft import Graft, Grafts, Where
from graftlens.lens.runs import (
    Places,
    Runs,
    first_token,
    look_into,
    needed_target_ids,
    refuse_patched_output,
    refuse_patches,
    tidy,
    token_text,
)
from graftlens.model.cache import GraftedCache
from graftlens.model.choice import Choice
from graftlens.model.forward import TransformerBlock
from graftlens.model.grafted import GraftedTransformer, Input
from graftlens.model.linear import Norm, per_row
from graftlens.model.mask import GraftMask
from graftlens.model.weights import Sourced
from graftlens.prompts import PromptError, Tokenized

C = Component

By = Literal["layer", "component", "head", "src_pos"]
Against = Literal["mean", "distractors"]


@torch.no_grad()
def direct_logit_attribution(
    model: GraftedTransformer,
    prompts: Input,
    grafts: Grafts | None = None,
    *,
    by: By = "component",
    at: Where = "last",
    against: Against | None = None,
    full: Graft | str | None = None,
    prepend_bos: bool | None = None,
    targets: Sequence[int] | None = None,
) -> pd.DataFrame:
    """What each term of a run contributes to the logit of the answer's first token.

    Args:
        model: the model.
        prompts: prompts with answers.
        grafts: name -> graft, or grafts, which are keyed by their text; PRE and SFT are always
            among them.
        by: `layer`; `component` (attention and MLP of each layer); `head`; or `src_pos`,
            what attention moved here by the position attended to.
        at: the positions at which the logit is read.
        against: what is subtracted from the answer's logit: the `mean` logit over the vocabulary
            (over the tokens that all sources have, where these differ; the column `common_tokens`
            says how many), or the mean logit of the prompt's `distractors` (first tokens, other
            than the answer's).
            None is the logit itself.
        full: the run that counts as SFT, as in `logit_lens`.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        targets: per prompt, the id of the token to attribute; by default the answer's first one.

    Returns:
        One row per prompt, graft, position and term, with `term` (`embed`, `pos_embed`, `layer`,
        `attn`, `attn_bias`, `head`, `src_pos`, `mlp`, or `bias`, which is the final norm's and the
        unembedding's), `layer`, `head`, `src_pos` and `src_token` where the term has
        one, `contribution` (logits) and `logit`, to which the contributions of a position add up
        (to the rounding of the model's dtype, and unless a hook changes the stream between terms).
        `logit` is worked out in float32 from the last stream: the logit of a model in bfloat16 or
        float16 itself has the rounding of that dtype. Where an architecture caps its logits
        (Gemma 2), `logit` is the one before the cap.

    Raises:
        PromptError: a prompt without an answer, or without distractors if they are needed; a token
            that a source lacks whose unembedding is used there, so that its logit is -inf.
        ValueError: a value of `by` or `against` that is not one of those above; a patch of
            `ln_final` or `unembed` in force, which reading the stream would ignore; `targets` of
            other than one token per prompt; or, with `head` and `src_pos`, a patch of `o` or
            `ln1_post`, after which what heads wrote is not what attention wrote.
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r}. Allowed: {' '.join(get_args(By))}.")
    if against is not None and against not in get_args(Against):
        raise ValueError(f"against={against!r}. Allowed: {' '.join(get_args(Against))}, or None.")
    refuse_patched_output(model)
    if by in ("head", "src_pos"):
        refuse_patches(
            model,
            (C.O, C.LN1_POST),
            f"what by={by!r} finds in the heads does not add up to what attention wrote",
            'Use by="component" or by="layer", which add up.',
        )
    runs = Runs.of(model.sources, grafts, full)
    hooks = attribution_hooks(model, by)
    terms = []
    whole = model.batch(prompts, prepend_bos=prepend_bos)
    followed = needed_target_ids(model, whole.prompts, prepend_bos, "attribute", targets)
    others = _others(model, whole.prompts, followed, against, prepend_bos)
    for places, caches in look_into(model, whole, runs, hooks, at):
        asked = places.table["prompt"]
        wanted = _Wanted(
            [followed[i] for i in asked],
            [others[i] for i in asked],
            against == "mean",
            model.vocabularies.common,
        )
        for name, cache in caches.items():
            read = _Attribution(model, places, cache, wanted)
            said = {**runs.columns(name), "against": against}
            terms += [term.assign(**said) for term in read.terms(by)]
    columns = (
        *("prompt", "graft", "rule", "position", "token", "target", "against"),
        *("term", "layer", "head", "src_pos", "src_token"),
        *("contribution", "logit"),
    )
    terms = [term.reindex(columns=columns) for term in terms]
    table = tidy(terms, columns, whole=("layer", "head", "src_pos"))
    return model.vocabularies.marked(table) if against == "mean" else table


@dataclass(frozen=True)
class _Wanted:
    """Per place, the token whose logit is explained, and those that it is compared with; a mean is
    over the `common` tokens that all sources have."""

    target: list[int]
    others: list[tuple[int, ...]]
    mean: bool
    common: int

    def of_rows(
        self, table: Float[Tensor, "d_vocab *width"], rows: np.ndarray
    ) -> Float[Tensor, "place *width"]:
        """Each place's row of a table over the vocabulary, minus what it is compared with."""
        found = table[torch.tensor([self.target[i] for i in rows], device=table.device)]
        if self.mean:
            return found - table[: self.common].mean(0)
        if not any(self.others):
            return found
        rest = [table[torch.tensor(self.others[i], device=table.device)].mean(0) for i in rows]
        return found - torch.stack(rest)


def _others(
    model: GraftedTransformer,
    prompts: Sequence[Tokenized],
    targets: Sequence[int],
    against: Against | None,
    prepend_bos: bool | None,
) -> list[tuple[int, ...]]:
    """What each prompt's answer is compared with: first tokens of its distractors, or nothing."""
    if against != "distractors":
        return [()] * len(prompts)
    return [
        _distractors(model, i, item, target, prepend_bos)
        for i, (item, target) in enumerate(zip(prompts, targets, strict=True))
    ]


def _distractors(
    model: GraftedTransformer, number: int, item: Tokenized, target: int, prepend_bos: bool | None
) -> tuple[int, ...]:
    texts = () if item.prompt is None else item.prompt.distractors
    if not texts:
        raise PromptError(
            f"prompt {number} has no distractors. Give Prompt(…, distractors=[…]), or use "
            "another against=…"
        )
    found = {first_token(model, item, text, prepend_bos): text for text in texts}
    # A distractor that begins like the answer says nothing about the answer's first token.
    found.pop(target, None)
    if not found:
        raise PromptError(
            f"prompt {number}: every distractor begins with the answer's first token. Give others, "
            "or use another against=…"
        )
    return tuple(found)


class _Attribution:
    """One run's contributions at all places of a batch."""

    def __init__(
        self, model: GraftedTransformer, places: Places, cache: GraftedCache, wanted: _Wanted
    ) -> None:
        self.model, self.places, self.cache = model, places, cache
        self.mask: GraftMask = cache.mask.pick(places.rows[None])
        self.device = model.cfg.device
        self.about = places.table.assign(
            target=[token_text(model, t) for t in wanted.target],
        )
        chosen = self.mask[C.UNEMBED, None]
        self._refuse_lacking(chosen, wanted)
        weight, bias = model.weights_of(C.UNEMBED, None)
        direction = self._unembedded(weight, chosen, wanted)
        self.bias = torch.zeros(len(places.rows), device=self.device)
        self.has_bias = bias is not None
        if bias is not None:
            self.bias = self.bias + self._unembedded(bias, chosen, wanted)
        norm = model.ln_final
        if norm.bias is not None:
            own = per_row(norm.bias, self.mask[C.LN_FINAL, None]).float()
            self.bias, self.has_bias = self.bias + (own * direction).sum(-1), True
        #: What a vector in the residual stream adds to the logit: its product with this.
        self.direction = self._before(norm, C.LN_FINAL, None, direction)
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        self.about["logit"] = self._numbers(self._along(last, self.direction) + self.bias)

    def _refuse_lacking(self, chosen: Choice, wanted: _Wanted) -> None:
        """That the logits which are explained are numbers."""
        known = self.model.vocabularies.of_rows(chosen)
        pairs = zip(wanted.target, wanted.others, strict=True)
        for place, (target, others) in enumerate(pairs):
            if (token := max((target, *others))) >= known[place]:
                about = self.places.table.iloc[place]
                raise PromptError(
                    f"prompt {about['prompt']}, position {about['position']}, graft "
                    f"{str(self.cache.mask.graft)!r}: token {token} "
                    f"({token_text(self.model, token)!r}) has no row in an unembedding that is "
                    "used there, so that its logit is -inf and has no terms. Take unembed from a "
                    "source that has the token, or another answer."
                )

    def terms(self, by: By) -> Iterator[pd.DataFrame]:
        """Tables of contributions, the embeddings' first."""
        yield self._rows("embed", self._along("hook_embed", self.direction))
        if C.POS_EMBED in self.model.arch.components:
            yield self._rows("pos_embed", self._along("hook_pos_embed", self.direction))
        for l in range(self.model.cfg.n_layers):
            attn = self._along(f"blocks.{l}.hook_attn_out", self.direction)
            mlp = self._along(f"blocks.{l}.hook_mlp_out", self.direction)
            if by == "layer":
                yield self._rows("layer", attn + mlp, layer=l)
                continue
            if by == "component":
                yield self._rows("attn", attn, layer=l)
            else:
                yield from self._attention(l, by)
            yield self._rows("mlp", mlp, layer=l)
        if self.has_bias:
            yield self._rows("bias", self.bias)

    def _attention(self, layer: int, by: By) -> Iterator[pd.DataFrame]:
        """A layer's attention, head by head or by the position attended to."""
        block = self.model.blocks[layer]
        assert isinstance(block, TransformerBlock)
        attn, direction = block.attn, self.direction
        if self.model.arch.post_norms:
            direction = self._before(block.ln1_post, C.LN1_POST, layer, direction)
        chosen = self.mask[C.O, layer]
        read = attn.o.read_back(direction, chosen)
        if by == "head":
            z = self._at(f"blocks.{layer}.attn.hook_z")
            per_head = (z * read).sum(-1)
            for head in range(self.model.cfg.n_heads):
                yield self._rows("head", per_head[:, head], layer=layer, head=head)
        else:
            yield self._by_src_pos(layer, read)
        if attn.o.bias is not None:
            bias = per_row(attn.o.bias, chosen.whole).float()
            yield self._rows("attn_bias", (bias * direction).sum(-1), layer=layer)

    def _by_src_pos(self, layer: int, read: Float[Tensor, "place head d_head"]) -> pd.DataFrame:
        """What all heads of a layer moved to each place, by the position attended to."""
        arch, batch = self.model.arch, self.places.batch
        pattern = self.cache[f"blocks.{layer}.attn.hook_pattern"].float()
        v = self.cache[f"blocks.{layer}.attn.hook_v"].float()
        if arch.qkv_clip is not None:
            v = v.clamp(-arch.qkv_clip, arch.qkv_clip)
        v = v.repeat_interleave(arch.n_heads // arch.n_kv_heads, dim=2)
        prompt = torch.from_numpy(self.places.prompt).to(v.device)
        starts = np.array(batch.starts)[self.places.prompt]
        column = torch.from_numpy(self.places.position + starts).to(v.device)
        moved = torch.einsum("rhk,rkhd,rhd->rk", pattern[prompt, :, column], v[prompt], read)
        values = moved.cpu().double().numpy()
        terms = []
        for row, (number, position) in enumerate(
            zip(self.places.prompt, self.places.position, strict=True)
        ):
            start = batch.starts[number]
            about = self.about.iloc[[row] * (position + 1)]
            terms.append(
                about.assign(
                    term="src_pos",
                    layer=layer,
                    src_pos=np.arange(position + 1),
                    src_token=self.texts[number][: position + 1],
                    contribution=values[row, start : start + position + 1],
                )
            )
        return pd.concat(terms)

    @cached_property
    def texts(self) -> list[list[str]]:
        """Each prompt's tokens, from its first one on."""
        starts = self.places.batch.starts
        return [
            [token_text(self.model, token) for token in ids[start:]]
            for ids, start in zip(self.places.ids, starts, strict=True)
        ]

    def _at(self, hook: str) -> Float[Tensor, "place *width"]:
        return self.places.pick(self.cache[hook]).float()

    def _along(
        self, hook: str, direction: Float[Tensor, "place d_model"]
    ) -> Float[Tensor, " place"]:
        return (self._at(hook) * direction).sum(-1)

    def _unembedded(
        self, tables: Sourced, chosen: Choice, wanted: _Wanted
    ) -> Float[Tensor, "place *width"]:
        """Each place's row of its own source's table, or of several mixed."""
        made: Tensor | None = None
        for source in chosen.sources:
            rows = chosen.rows_of(source)
            found = wanted.of_rows(tables[source].float(), rows)
            index = torch.from_numpy(rows).to(found.device)
            share = chosen.share_on(source, found)[index]
            made = found.new_zeros(len(self.about), *found.shape[1:]) if made is None else made
            made[index] += found * share.reshape(-1, *(1,) * (found.ndim - 1))
        assert made is not None
        return made

    def _before(
        self,
        norm: Norm,
        component: Component,
        layer: int | None,
        direction: Float[Tensor, "place d_model"],
    ) -> Float[Tensor, "place d_model"]:
        """A direction after a norm, as one before it, with the norm's scale held fixed."""
        name = component.value if layer is None else f"blocks.{layer}.{component.value}"
        if norm.weight is not None:
            weight = per_row(norm.weight, self.mask[component, layer]).float()
            direction = direction * (weight + self.model.arch.norm_offset)
        direction = direction / self._at(f"{name}.hook_scale")
        if self.model.arch.norm != "rms":
            # LayerNorm subtracts the mean, which is the same as centring the direction.
            direction = direction - direction.mean(-1, keepdim=True)
        return direction

    def _rows(
        self,
        term: str,
        values: Float[Tensor, " place"],
        *,
        layer: int | None = None,
        head: int | None = None,
    ) -> pd.DataFrame:
        return self.about.assign(
            term=term, layer=layer, head=head, contribution=self._numbers(values)
        )

    def _numbers(self, values: Float[Tensor, " place"]) -> np.ndarray:
        return values.cpu().double().numpy()


def attribution_hooks(model: GraftedTransformer, by: By) -> list[str]:
    """The hooks that `direct_logit_attribution` reads."""
    arch = model.arch
    last = model.cfg.n_layers - 1
    names = ["hook_embed", "ln_final.hook_scale", f"blocks.{last}.hook_resid_post"]
    if C.POS_EMBED in arch.components:
        names.append("hook_pos_embed")
    for l in range(model.cfg.n_layers):
        names += [f"blocks.{l}.hook_attn_out", f"blocks.{l}.hook_mlp_out"]
        if by in ("head", "src_pos") and arch.post_norms:
            names.append(f"blocks.{l}.ln1_post.hook_scale")
        if by == "head":
            names.append(f"blocks.{l}.attn.hook_z")
        if by == "src_pos":
            names += [f"blocks.{l}.attn.hook_pattern", f"blocks.{l}.attn.hook_v"]
    return names
