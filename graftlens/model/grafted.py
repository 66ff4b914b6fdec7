"""`GraftedTransformer`: a HookedTransformer whose weights are chosen per position by a graft."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import COMPONENTS, Component, brief
from graftlens.graft import Graft
from graftlens.model.active import Active, said
from graftlens.model.additions import Additions
from graftlens.model.arch import Architecture
from graftlens.model.cache import GraftedCache, sliced
from graftlens.model.calls import Calls, Output, Start
from graftlens.model.circuits import Circuits
from graftlens.model.config import Device, GraftedConfig, config_of
from graftlens.model.differences import Difference, table
from graftlens.model.embeddings import PosEmbed, TokenEmbed, Unembed
from graftlens.model.forward import Builder, TransformerBlock
from graftlens.model.generation import Generation
from graftlens.model.hooks import Hooking
from graftlens.model.identity import (
    config_settings,
    facts_digest,
    fingerprint,
    prints_of_made,
    tokenizer_digest,
)
from graftlens.model.inputs import Batch, Input, Padding, positions_of
from graftlens.model.linear import Linear
from graftlens.model.load import load, short
from graftlens.model.mask import GraftLike, GraftMask, resolve
from graftlens.model.passes import AttentionOrder, GivenCache, Pass
from graftlens.model.points import FlaggedPoint
from graftlens.model.probe import probe
from graftlens.model.reading import AssertedError, Reading, tell, whole
from graftlens.model.rotary import Rotary, turning_at
from graftlens.model.source import Source
from graftlens.model.treeruns import TreeRuns
from graftlens.model.weights import Sourced, Weights, equal_sources

__all__ = ["GraftLike", "GraftedConfig", "GraftedTransformer", "Input"]

C = Component
T = TypeVar("T")

#: The arguments of `forward` that say where a run begins.
_START = tuple(signature(Calls._start).parameters)[1:]


class GraftedTransformer(Calls, TreeRuns, Reading, Generation, Circuits, Hooking):
    """A language model in several sources (PRE, SFT, …), run under a graft.

    Hooks, caches and shapes are HookedTransformer's; the weights have a leading source axis
    (`model.W_Q` is [source, layer, head, d_model, d_head]). Build one with `from_pretrained`.

    Example:
        >>> model = GraftedTransformer.from_pretrained({"pre": PRE, "sft": SFT})
        >>> logits, cache = model.run_with_cache(prompts, graft="sft @ first_entity + last")
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Mapping[str, Weights],
        *,
        rotary: Rotary | None = None,
        activation: nn.Module,
        tokenizer: Any = None,
        model_name: str = "",
        additions: Mapping[str, Additions] = MappingProxyType({}),
        read: Sequence[Source] = (),
        differences: Sequence[Difference] = (),
    ) -> None:
        """Put a model together from checked parts; `from_pretrained` checks them.

        Args:
            arch: the architecture's facts, with the largest vocabulary of all sources.
            weights: source name -> its tensors, the base first; tables over the vocabulary have as
                many rows as the source has tokens.
            rotary: the rotary tables of all sources; None with learned positions.
            activation: the MLP's non-linearity.
            tokenizer: a Hugging Face fast tokenizer, or None for token tensors only. The model
                pads on the right: one that pads on the left is copied. Set
                `model.tokenizer.padding_side` for another side.
            model_name: what the config calls the model.
            additions: source name -> what it adds to its matrices, kept apart from them.
            read: the sources as they were read: their configs, for checks against Hugging Face's
                forward, and the tokens that end a generation and fill up behind its end.
            differences: how they differ from the base, and what was done about it.
        """
        super().__init__()
        known = {source.name: source for source in read}
        self.hf_configs = {name: known[name].config if name in known else None for name in weights}
        self.hf_config = next(iter(self.hf_configs.values()))
        self.end_tokens = {n: known[n].end_tokens if n in known else () for n in weights}
        self.pad_token = {n: known[n].pad_token if n in known else None for n in weights}
        self._facts = {s.name: facts_digest(s.arch, s.config, s.rotary) for s in read}
        self.made = {s.name: s.made for s in read if s.made is not None}
        self.origins = {s.name: s.origin for s in read}
        self.told_differences = tuple(differences)
        self.arch = arch
        self.sources = tuple(weights)
        if getattr(tokenizer, "padding_side", "right") != "right":
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.rotary = rotary
        self.active = Active(arch, self.sources)
        added = [additions.get(name, {}) for name in weights]
        build = Builder(arch, list(weights.values()), self.active, self.rotary, added)
        sample = next(iter(next(iter(weights.values())).values()))
        name, base = model_name or arch.family, None if rotary is None else rotary.of_base
        self.cfg = config_of(arch, self.sources, name, sample, self.hf_config, base)
        self.cfg.reads(tokenizer)

        self.embed = TokenEmbed(build.weight(C.EMBED, None), self.active, arch.embed_scale)
        self.hook_embed = HookPoint()
        if C.POS_EMBED in arch.components:
            self.pos_embed = PosEmbed(build.weight(C.POS_EMBED, None), self.active)
            self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(
            TransformerBlock(arch, layer, build, activation, self.cfg, self.active)
            for layer in range(arch.n_layers)
        )
        self.ln_final = build.norm(C.LN_FINAL, None)
        self.unembed = Unembed(Linear(*build.linear(C.UNEMBED, None)), self.active)
        self.eval()
        self.setup()
        self._flagged = [hook for hook in self.hook_points() if isinstance(hook, FlaggedPoint)]

    @classmethod
    def from_pretrained(
        cls,
        sources: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        chat_template: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        check: bool = True,
        verbose: bool = True,
    ) -> "GraftedTransformer":
        """Load two or more sources of one architecture, and check each against its own model.

        Args:
            sources: name -> hub id, checkpoint folder, GGUF file, PEFT adapter folder, transformers
                model, `PeftModel`, `TransformerBridge` or (TransformerLens 3.9)
                `HookedTransformer`, the base first. A mapping is a source made of others:
                `{"of": "sft", "strength": 0.5}`, `{"of": "sft", "rank": 8}`.
            tokenizer: a fast tokenizer, or where to load one from; otherwise the sources' own. The
                model's pads on the right, however it was saved; set
                `model.tokenizer.padding_side` to pad elsewhere.
            chat_template: what writes conversations, as Jinja's text or a file that holds it, for
                all sources alike; otherwise the base's, else that of the first source that has one.
            device: by default the GPU if there is one, else the CPU.
            dtype: float32 on the CPU and the checkpoints' widest dtype on a GPU, unless given.
            check: compare each source's tensors with its files, and its logits with its own
                model's on a probe.
            verbose: print one line about what was loaded and checked, and one about each
                difference between the sources (`model.differences`).

        Raises:
            PairError: sources that cannot be grafted together (the message says what differs), or
                whose logits are not reproduced.
            ValueError: a source's name that the text form of grafts could not hold, or a GPU that
                does not exist.
            UnsupportedArchitectureError: a family or option that is not exactly supported.
        """
        loaded = load(
            sources,
            tokenizer=tokenizer,
            chat_template=chat_template,
            device=device,
            dtype=dtype,
        )
        read = loaded.sources
        model = cls(
            loaded.arch,
            loaded.weights,
            rotary=loaded.rotary,
            activation=loaded.activation,
            tokenizer=loaded.tokenizer,
            model_name=read[0].origin,
            additions=loaded.additions,
            read=read,
            differences=loaded.differences,
        ).to(loaded.device)

        def alone(source: str, tokens: Tensor) -> Tensor:
            return model(tokens, graft=Graft.rule(source), attention_mask=torch.ones_like(tokens))

        checked = "logits not checked"
        if check:
            worst = probe(alone, loaded.arch, read, loaded.device, loaded.dtype)
            checked = f"logits equal the sources' own within {worst:.0e}"
        if verbose:
            told = f"; {loaded.chat_template}" if loaded.chat_template else ""
            print(f"graftlens: {model.summary()}; {checked}{told}")
            for difference in loaded.differences:
                print(f"graftlens: {difference.line(model.sources[0])}")
        return model

    @property
    def differences(self) -> pd.DataFrame:
        """How the sources differ from the base, a row each: `source`, `key`, the `base`'s value and
        the source's `value`, `handling` (`ignored`, `its own`, `carried` or `converted`), and what
        was `done`, in words. A row about the base itself says how it was read."""
        return table(self.told_differences)

    def summary(self) -> str:
        """The model in one line: architecture, sources, what they share, dtype and device."""
        stored = list(self.stored())
        shared = sum(weight.is_shared for weight in stored)
        same = f"{shared} of {len(stored)} tensors are the same in all sources"
        if shared == len(stored):
            same = "ALL SOURCES ARE IDENTICAL, so no graft can change anything"
        arch = self.arch
        return (
            f"{arch.family}, {arch.n_layers} layers, d_model {arch.d_model}, "
            f"sources {' '.join(self.sources)} (base {self.sources[0]}); {same}; "
            f"{short(self.cfg.dtype)} on {self.cfg.device}"
        )

    def __repr__(self) -> str:
        """A short summary: what the model is and which graft is in force here, without its
        modules."""
        arch = self.arch
        heads = f"{arch.n_heads} heads of {arch.d_head}"
        if arch.n_kv_heads != arch.n_heads:
            heads += f" ({arch.n_kv_heads} key-value heads)"
        sizes = (
            f"{heads}, {arch.mlp} MLPs of {arch.d_mlp} neurons, vocabulary of {arch.d_vocab:,}, "
            f"context of {arch.n_ctx:,}"
        )
        return "\n".join(
            (
                f"{type(self).__name__} {self.cfg.model_name}",
                f"  {self.summary()}",
                f"  {sizes}",
                f"  components: {' '.join(arch.components)}",
                f"  graft in force: {said(self.active.here)}",
            )
        )

    # -- running ---------------------------------------------------------------------------------

    def forward(
        self,
        input: Input | Float[Tensor, "batch pos d_model"] | Start,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        start_at_layer: Any = None,
        tokens: Any = None,
        shortformer_pos_embed: None = None,
        attention_mask: Any = None,
        stop_at_layer: Any = None,
        past_kv_cache: Any = None,
        *,
        graft: GraftLike = None,
    ) -> Any:
        """One forward pass under a graft.

        Args:
            input: token ids [batch, pos], a text, a `Prompt`, or a list of texts or prompts; with
                `start_at_layer` the residual stream before that layer, [batch, pos, d_model].
            return_type: `logits` [batch, pos, d_vocab]; `loss`, the mean next-token cross-entropy
                in nats; `both`, a pair that has them as `.logits` and `.loss`; or None.
            loss_per_token: losses [batch, pos - 1] instead of their mean; padding gives 0.
            prepend_bos: for texts; None is `model.cfg.default_prepend_bos`, which leaves BOS to the
                tokenizer unless it is set.
            padding_side: where texts of different lengths are padded; None is
                `model.tokenizer.padding_side`, "right" unless it is set.
            start_at_layer: an integer: run `model.blocks[start_at_layer:]` only, on the residual
                stream that is given. Its rows are tokens without names, whose graft may speak of
                numbers, `last` and `all`, unless `tokens` says what they are.
            tokens: with `start_at_layer`, the prompts or tokens that the residual stream is of; a
                loss needs them.
            shortformer_pos_embed: nothing; none of the families has such positions.
            attention_mask: 1 for tokens, 0 for padding; only with token ids or a residual stream.
                Without one, token ids that look padded are refused: see `batch`.
            stop_at_layer: an integer: run `model.blocks[:stop_at_layer]` only and return the
                residual stream [batch, pos, d_model]. 0 gives the embeddings, -1 the stream before
                the last layer, the number of layers or more the stream after the last.
            past_kv_cache: a `TransformerLensKeyValueCache` with keys and values of earlier
                positions, to which those of this run are added unless it is frozen. A graft's
                positions are those of this run's tokens; what is in the cache stays as it is.
            graft: a `Graft`, its one-line text, or a mask from `resolve`; None is the graft of the
                surrounding `with model.grafted(…)`, else the base alone.

        A prompt longer than the model's context runs with a warning where positions are rotary.
        Where sources have different vocabularies, a token that a source lacks has the logit -inf
        at each position whose `unembed` it has a share in.

        Raises:
            PromptError: prompts that cannot be run, a graft that selects nothing in one, or a token
                that a source lacks which has a share in `embed` there.
            ValueError: a source, component, layer or head that the model lacks, a prompt longer
                than its learned positions, or a strength other than 0 and 1 at q or k between
                sources whose rotary tables differ.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f'return_type={return_type!r}. Allowed: "logits", "loss", "both" or None. '
                "A graft is given by name: graft=…"
            )
        start = self._start(
            input,
            start_at_layer,
            tokens=tokens,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            past_kv_cache=past_kv_cache,
        )
        if return_type in ("loss", "both") and not start.has_tokens:
            raise AssertedError(
                f"return_type={return_type!r} with start_at_layer needs to know the tokens. "
                "Give them: tokens=…"
            )
        mask = self.resolve(graft, start.batch)
        if start.resid is None:
            self.refuse_lacking(start.batch, mask)
        self.warn_beyond_context(start.longest)
        stop = None if stop_at_layer is None else whole(stop_at_layer, "stop_at_layer")
        if not isinstance(start.cache, GivenCache):
            return self._output(start, mask, stop, return_type, loss_per_token)
        try:
            out = self._output(start, mask, stop, return_type, loss_per_token)
        except BaseException:
            start.cache.restore()
            raise
        start.cache.remember(start.batch.real)
        return out

    def _output(
        self,
        start: Start,
        mask: GraftMask,
        stop: int | None,
        return_type: Literal["logits", "loss", "both"] | None,
        loss_per_token: bool,
    ) -> Any:
        """What `forward` returns of a run whose arguments are resolved."""
        resid = self.residual(start, mask, stop)
        if stop is not None:
            return resid
        if return_type is None:
            with self.active.run(mask):
                self._normed(resid, mask)
            return None
        logits = self.logits_from(resid, mask)
        if return_type == "logits":
            return logits
        batch = start.batch
        real = torch.from_numpy(batch.real) if batch.padded else None
        loss = self.loss_fn(logits, batch.tokens, real, loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def residual(
        self, start: Start, mask: GraftMask, stop_at_layer: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last layer, or before `stop_at_layer`."""
        with self.active.run(mask):
            self._refuse_silent_hooks("run")
            return self._run_layers(start, mask, stop_at_layer)

    def _run_layers(
        self, start: Start, mask: GraftMask, stop_at_layer: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        device, batch, keys, cache = self.cfg.device, start.batch, start.keys, start.cache
        counts = batch.position_ids()
        if start.past is not None:
            counts = counts + start.past.sum(axis=1, keepdims=True)
        if counts.max() >= self.arch.n_ctx and self.arch.rotary_dim == 0:
            raise ValueError(
                f"a prompt of {int(counts.max()) + 1} tokens is longer than the model's context of "
                f"{self.arch.n_ctx}. Shorten it."
            )
        if start.resid is None:
            tokens = batch.tokens.to(device, non_blocking=True)
            positions = torch.from_numpy(counts).to(device, non_blocking=True)
            resid = self._embedded(tokens, positions, mask, start.embeds)
        else:
            resid = start.resid.to(device)
        turned = counts if cache is None or cache.rotated else positions_of(keys)
        order = AttentionOrder(keys, counts.shape[1], resid.device)
        run = Pass(mask, turning_at(self.rotary, resid, turned), order, cache)
        for block in self.blocks[start.layer : stop_at_layer]:
            resid = block(resid, run=run)
        return resid

    def warn_beyond_context(self, longest: int) -> None:
        """Rotary positions never run out, but no source was trained on such long ones."""
        if longest > self.arch.n_ctx and self.arch.rotary_dim:
            tell(
                f"{longest} tokens are more than the model's context of {self.arch.n_ctx}: what it "
                "computes beyond that may mean little. Shorten the prompt or what is generated."
            )

    def _embedded(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        mask: GraftMask,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        if embeds is None:
            embeds = self.hook_embed(self.embed(tokens, mask[C.EMBED, None]))
        resid: Tensor = embeds.to(self.cfg.device)
        if self.arch.rotary_dim:
            return resid
        chosen = mask[C.POS_EMBED, None]
        offsets = self.pos_embed(tokens, positions=positions, chosen=chosen)
        return resid + self.hook_pos_embed(offsets)

    def logits_from(
        self, resid: Float[Tensor, "batch pos d_model"], mask: GraftMask
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """A residual stream read as logits, by the `ln_final` and `unembed` of each row's source.

        Args:
            resid: rows of any layer.
            mask: what they ran under, cut to these rows (`mask.pick`).

        Raises:
            ValueError: strengths so large that the logits overflow.
        """
        logits = self._read_out(resid, mask)
        if mask.graft.extrapolates and not bool(logits.amax(-1).isfinite().all()):
            raise ValueError(
                f"graft {brief(str(mask.graft))}: its logits are not finite in "
                f"{str(self.cfg.dtype).removeprefix('torch.')}: strengths as large as these "
                'overflow. Lower them, or load the model with dtype="float64".'
            )
        return logits

    def _read_out(
        self, resid: Float[Tensor, "batch pos d_model"], mask: GraftMask
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """`logits_from`, whatever numbers come out."""
        with self.active.run(mask):
            logits = self.unembed(self._normed(resid, mask), mask[C.UNEMBED, None])
        transformed: Tensor = self.apply_output_logits_transform(logits)
        return transformed

    def _normed(
        self, resid: Float[Tensor, "batch pos d_model"], mask: GraftMask
    ) -> Float[Tensor, "batch pos d_model"]:
        normed: Tensor = self.ln_final(resid, mask.sites.get((C.LN_FINAL, None)))
        return normed

    @torch.no_grad()
    def logits_at(
        self, prompts: Input, columns: Sequence[Sequence[int]], graft: GraftLike = None
    ) -> list[Float[Tensor, "columns d_vocab"]]:
        """Next-token logits at chosen columns of each prompt; no other row is unembedded.

        Args:
            prompts: as in `forward`.
            columns: per prompt, columns of the padded batch.
            graft: as in `forward`.
        """
        batch = self.batch(prompts)
        mask = self.resolve(graft, batch)
        self.refuse_lacking(batch, mask)
        self.warn_beyond_context(max(batch.totals))
        width = batch.real.shape[1]
        rows = np.array([[i * width + c for i, cs in enumerate(columns) for c in cs]])
        return list(self.logits_of_rows(batch, mask, rows).split([len(cs) for cs in columns]))

    def logits_of_rows(
        self, batch: Batch, mask: GraftMask, rows: Int[np.ndarray, "1 row"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Next-token logits of rows of the batch, by number; gradients reach them.

        Args:
            batch: the prompts.
            mask: what they run, resolved for this batch.
            rows: numbers through `[batch · pos]`.
        """
        resid = self.residual(Start(batch), mask).flatten(0, 1)
        index = torch.from_numpy(rows[0]).to(resid.device, non_blocking=True)
        return self.logits_from(resid.index_select(0, index)[None], mask.pick(rows))[0]

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        graft: GraftLike = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """As HookedTransformer's; the `ActivationCache` knows under which graft it was filled.

        Its head results, biases and final projections use the weights that the graft chose. So
        do the dictionary of `return_cache_object=False` and an `ActivationCache` made of it.

        Raises:
            RuntimeError: another thread or task runs the model, or has hooks on it.
        """
        call = signature(self.forward)
        rest = {name: kwargs.pop(name) for name in tuple(kwargs) if name not in call.parameters}
        given = call.bind(*model_args, **kwargs).arguments
        start = self._start(**{name: given.pop(name) for name in _START if name in given})
        mask = self.resolve(graft, start.batch)
        if remove_batch_dim and mask.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim=True with {mask.shape[0]} prompts: give one, or leave it out."
            )
        out, activations = super().run_with_cache(
            start, remove_batch_dim=remove_batch_dim, graft=mask, **given, **rest
        )
        if rest.get("pos_slice") is not None:
            kept = np.atleast_1d(sliced(torch.arange(mask.shape[1]), rest["pos_slice"], 0))
            mask = mask.take(None, kept)
        activations.mask = mask
        if not return_cache_object:
            return out, activations
        return out, GraftedCache(activations, self, mask, has_batch_dim=not remove_batch_dim)

    @contextmanager
    def grafted(self, graft: GraftLike) -> Iterator["GraftedTransformer"]:
        """Every run inside uses `graft`, unless it is given another one.

        For code that calls the model itself, such as `transformer_lens.patching`. It applies in
        this thread or task (and in tasks created inside); another one that does not name a graft
        meanwhile is refused with a RuntimeError.

        Weights without a source axis (`blocks[l].attn.W_O`, `blocks[l].ln1.w`, `ln_final.w`, …) are
        the graft's inside, and a ValueError where its positions or heads differ.
        """
        graft = Graft.parse(graft) if isinstance(graft, str) else graft
        if not isinstance(graft, Graft | GraftMask | None):
            raise ValueError(_no_graft(graft))
        with self.active.grafted(graft):
            yield self

    def resolve(self, graft: GraftLike, prompts: Input) -> GraftMask:
        """Which source every row uses when `prompts` run under `graft`; pass it on as `graft=`.

        Raises:
            PromptError: prompts that the graft cannot be applied to.
            ValueError: a source, component, layer or head that the model lacks, or a mask that was
                resolved for a batch of another shape or with prompts at other positions.
        """
        if graft is None:
            graft = self.active.innermost or Graft()
        batch = self.batch(prompts)
        if isinstance(graft, GraftMask):
            if graft.shape != batch.real.shape or graft.extents != batch.extents:
                raise ValueError(
                    f"the mask of {str(graft.graft)!r} was resolved for a batch of shape "
                    f"{graft.shape} with prompts at {_columns(graft.extents)}; this one has "
                    f"{batch.real.shape} with prompts at {_columns(batch.extents)}. "
                    "Resolve the graft again."
                )
            if self.rotary is not None:
                self.rotary.check(graft)
            return graft
        graft = Graft.parse(graft) if isinstance(graft, str) else graft or Graft()
        if not isinstance(graft, Graft):
            raise ValueError(_no_graft(graft))
        mask = resolve(graft, batch, self.arch, self.sources)
        if self.rotary is not None:
            self.rotary.check(mask)
        return mask

    # -- weights ---------------------------------------------------------------------------------

    def module_of(self, component: Component, layer: int | None) -> nn.Module:
        """The module that computes a component in a layer (None for those outside the layers).

        Raises:
            ValueError: a component that the architecture lacks there.
        """
        block = self if layer is None else self.blocks[layer]
        arch = self.arch
        if component not in arch.components or layer not in arch.layers_of(component):
            raise ValueError(f"{self.arch.family} has no {component} in layer {layer}.")
        home = COMPONENTS[component].home
        module = getattr(block if home is None else getattr(block, home), component.value)
        assert isinstance(module, nn.Module)
        return module

    def weights_of(self, component: Component, layer: int | None) -> tuple[Sourced, Sourced | None]:
        """Weight and bias of a component in a layer, in all sources."""
        module = self.module_of(component, layer)
        owner: Any = getattr(module, "linear", module)
        return owner.weight, getattr(owner, "bias", None)

    def equal_sources(self, component: Component, layer: int | None) -> tuple[int, ...]:
        """For each source, the first source with the same tensors of a component in a layer, and
        at q and k with the same rotary table."""
        equal = equal_sources(*self.weights_of(component, layer))
        if component in (C.Q, C.K) and layer is not None and self.rotary is not None:
            both = list(zip(equal, self.rotary.equal(layer), strict=True))
            return tuple(both.index(pair) for pair in both)
        return equal

    def stored(self) -> Iterator[Sourced]:
        """Every weight of the model once, with its sources."""
        return (module for module in self.modules() if isinstance(module, Sourced))

    def fingerprints(self) -> dict[str, str]:
        """Source name -> SHA-256 of what decides its numbers.

        These are its tensors, in the dtype they run in, what the forward pass takes from the
        config (norms' epsilon, rotary embedding, …), and the tokenizer. A source made of others
        has theirs, the base's, and how it is made of them.
        """
        tokenizer = tokenizer_digest(self.tokenizer)
        weights = [(n, m) for n, m in self.named_modules() if isinstance(m, Sourced)]
        known: dict[Any, bytes] = {}  # what sources share is read once
        prints = {
            source: fingerprint(weights, index, f"{self._facts.get(source)} {tokenizer}", known)
            for index, source in enumerate(self.sources)
            if source not in self.made
        }
        prints |= prints_of_made(self.made, prints, self.sources[0])
        return {source: prints[source] for source in self.sources}

    def settings(self) -> dict[str, Any]:
        """What fingerprints cover besides tensors, in the config's own words, for messages."""
        configs = {
            name: {} if config is None else config_settings(config)
            for name, config in self.hf_configs.items()
        }
        base, *others = configs
        found: dict[str, Any] = {
            "config": configs[base],
            "tokenizer": tokenizer_digest(self.tokenizer),
        }
        own = {name: configs[name] for name in others if configs[name] != configs[base]}
        made = {name: value.model_dump(mode="json") for name, value in self.made.items()}
        return found | ({"configs": own} if own else {}) | ({"made": made} if made else {})

    def to(self, *args: Any, **kwargs: Any) -> "GraftedTransformer":
        """Move to a device or dtype, like any module; `cfg` follows."""
        kwargs.pop("print_details", None)
        moved: GraftedTransformer = nn.Module.to(self, *args, **kwargs)
        return moved

    def _apply(self, fn: Any, recurse: bool = True) -> "GraftedTransformer":
        """What `.to`, `.half`, `.cuda` and the like all call."""
        super()._apply(fn, recurse)
        sample = self.embed.weight.like
        self.cfg.device, self.cfg.dtype = Device(sample.device), sample.dtype
        if self.rotary is not None:
            self.rotary.to(sample.device)
        return self

    def cuda(self, device: Any = None) -> "GraftedTransformer":
        """Move to a GPU."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def cpu(self) -> "GraftedTransformer":
        """Move to the CPU."""
        return self.to("cpu")

    def move_model_modules_to_device(self) -> None:
        """Put all parts where `cfg.device` says, as HookedTransformer's method does."""
        self.to(self.cfg.device)

    def mps(self) -> "GraftedTransformer":
        """Move to Apple's GPU."""
        return self.to("mps")


def _no_graft(value: object) -> str:
    return (
        f"graft={value!r} is a {type(value).__name__}. Give a Graft, its one-line text, a "
        "mask from model.resolve, or None."
    )


def _columns(extents: Sequence[tuple[int, int, int]]) -> str:
    """The columns of the first few prompts of a batch, for a message."""
    shown = [f"{start}-{start + total - 1}" for start, _, total in extents[:3]]
    return f"columns {', '.join(shown)}{' …' if len(extents) > 3 else ''}"
