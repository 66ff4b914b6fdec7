"""`GraftedTransformer`: a HookedTransformer whose weights are chosen per position by a graft."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from graftlens.components import COMPONENTS, Component
from graftlens.graft import Graft
from graftlens.model.active import Active, said
from graftlens.model.additions import Additions
from graftlens.model.arch import Architecture
from graftlens.model.cache import GraftedCache, sliced
from graftlens.model.circuits import Circuits
from graftlens.model.config import Device, GraftedConfig, config_of
from graftlens.model.differences import Difference, table
from graftlens.model.forward import AttentionOrder, Builder, KeyValueCache, Pass, TransformerBlock
from graftlens.model.generation import Generation
from graftlens.model.hooks import Hooking, first_of
from graftlens.model.identity import config_settings, facts_digest, tokenizer_digest
from graftlens.model.inputs import Batch, Input, Padding
from graftlens.model.linear import Linear, PosEmbed, TokenEmbed
from graftlens.model.load import load, short
from graftlens.model.mask import GraftLike, GraftMask, resolve
from graftlens.model.output import FinalNorm, Unembed
from graftlens.model.points import FlaggedPoint
from graftlens.model.probe import probe
from graftlens.model.reading import Reading, tell, whole
from graftlens.model.rotary import Rotary, Turning, turning_of_tree
from graftlens.model.source import Source
from graftlens.model.tree import TreeBatch, TreeShape
from graftlens.model.weights import Sourced, Weights, equal_sources

__all__ = ["GraftLike", "GraftedConfig", "GraftedTransformer", "Input"]

C = Component
T = TypeVar("T")


class GraftedTransformer(Reading, Generation, Circuits, Hooking):
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
        build = Builder(arch, list(weights.values()), self.active, added)
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
        self.ln_final = FinalNorm(build.norm(C.LN_FINAL, None))
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
            sources: name -> hub id, checkpoint folder, PEFT adapter folder, transformers model,
                `TransformerBridge` or (TransformerLens 3.9) `HookedTransformer`, the base first.
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
        input: Input,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        *,
        graft: GraftLike = None,
        attention_mask: Any = None,
        prepend_bos: bool | None = None,
        padding_side: Padding | None = None,
        loss_per_token: bool = False,
        stop_at_layer: Any = None,
    ) -> Any:
        """One forward pass under a graft.

        Args:
            input: token ids [batch, pos], a text, a `Prompt`, or a list of texts or prompts.
            return_type: `logits` [batch, pos, d_vocab]; `loss`, the mean next-token cross-entropy
                in nats; `both`; or None.
            graft: a `Graft`, its one-line text, or a mask from `resolve`; None is the graft of the
                surrounding `with model.grafted(…)`, else the base alone.
            attention_mask: 1 for tokens, 0 for padding; only with token ids. Without one, token
                ids that look padded are refused: see `batch`.
            prepend_bos: for texts; None is `model.cfg.default_prepend_bos`, which leaves BOS to the
                tokenizer unless it is set.
            padding_side: where texts of different lengths are padded; None is
                `model.tokenizer.padding_side`, "right" unless it is set.
            loss_per_token: losses [batch, pos - 1] instead of their mean; padding gives 0.
            stop_at_layer: an integer: run `model.blocks[:stop_at_layer]` only and return the
                residual stream [batch, pos, d_model]. 0 gives the embeddings, -1 the stream before
                the last layer, the number of layers or more the stream after the last.

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
        batch = self.batch(
            input, attention_mask=attention_mask, prepend_bos=prepend_bos, padding_side=padding_side
        )
        mask = self.resolve(graft, batch)
        self.refuse_lacking(batch, mask)
        self.warn_beyond_context(max(batch.totals))
        stop = None if stop_at_layer is None else whole(stop_at_layer, "stop_at_layer")
        resid = self._residual(batch, mask, stop)
        if stop is not None:
            return resid
        if return_type is None:
            return None
        logits = self.logits_from(resid, mask)
        if return_type == "logits":
            return logits
        if return_type not in ("loss", "both"):
            raise ValueError(
                f'return_type={return_type!r}. Allowed: "logits", "loss", "both" or None. '
                "A graft is given by name: graft=…"
            )
        loss = self._loss(logits, batch, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _residual(
        self,
        batch: Batch,
        mask: GraftMask,
        stop_at_layer: int | None = None,
        cache: KeyValueCache | None = None,
        past: Bool[np.ndarray, "batch past"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last layer; `past` says which cached positions are real."""
        with self.active.run(mask):
            self._refuse_silent_hooks("run")
            return self._run_layers(batch, mask, stop_at_layer, cache, past)

    def _run_layers(
        self,
        batch: Batch,
        mask: GraftMask,
        stop_at_layer: int | None,
        cache: KeyValueCache | None,
        past: Bool[np.ndarray, "batch past"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        tokens = batch.tokens.to(self.cfg.device, non_blocking=True)
        counts = batch.position_ids() + (0 if past is None else past.sum(1, keepdims=True))
        if counts.max() >= self.arch.n_ctx and self.arch.rotary_dim == 0:
            raise ValueError(
                f"a prompt of {int(counts.max()) + 1} tokens is longer than the model's context of "
                f"{self.arch.n_ctx}. Shorten it."
            )
        positions = torch.from_numpy(counts).to(tokens.device, non_blocking=True)
        resid = self._embedded(tokens, positions, mask)
        keys = batch.real if past is None else np.concatenate([past, batch.real], axis=1)
        order = AttentionOrder(keys, counts.shape[1], tokens.device)
        run = Pass(mask, self._turning(resid, positions, counts), order, cache)
        for block in self.blocks[:stop_at_layer]:
            resid = block(resid, run)
        return resid

    def warn_beyond_context(self, longest: int) -> None:
        """Rotary positions never run out, but no source was trained on such long ones."""
        if longest > self.arch.n_ctx and self.arch.rotary_dim:
            tell(
                f"{longest} tokens are more than the model's context of {self.arch.n_ctx}: what it "
                "computes beyond that may mean little. Shorten the prompt or what is generated."
            )

    def _embedded(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], mask: GraftMask
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_embed(self.embed(tokens, mask[C.EMBED, None]))
        if self.arch.rotary_dim:
            return resid
        offsets = self.pos_embed(positions, mask[C.POS_EMBED, None])
        return resid + self.hook_pos_embed(offsets)

    @torch.no_grad()
    def tree_logits(
        self,
        tree: TreeBatch,
        keep: Callable[..., T],
        rows: int = 256,
        beside: Sequence[Int[np.ndarray, " final"]] = (),
    ) -> list[T]:
        """What `keep` makes of a token tree's logits, which never exist all at once.

        Args:
            tree: the trees to run.
            keep: called with logits [row, d_vocab] and which of the final rows they are, in order;
                then with the logits of those that `beside` names.
            rows: how many rows are unembedded at a time.
            beside: final rows to read with each final row, such as those of a reference run.

        Raises:
            ValueError: hooks are attached, which do not fit a tree's rows.
            RuntimeError: they belong to a run of another thread or task.
        """
        self.active.check("pass")
        hooked = [name for name, hook in self.hook_dict.items() if hook.has_hooks()]
        if hooked:
            raise ValueError(
                f"hooks are attached at {first_of(hooked)}, "
                "but a sweep's rows are not [batch, pos]: what a hook changed there would not mean "
                "what it means in a run. Remove them (model.reset_hooks()), or run the grafts one "
                "by one with model.run_with_hooks(…)."
            )
        shape = tree.shape
        with self.active.run(shape.mask):
            resid = self._embedded(tree.tokens, shape.positions, shape.mask)
            turning = None
            if self.rotary is not None:
                turning = turning_of_tree(self.rotary, self.arch, resid, tree)
            run = Pass(shape.mask, turning, tree=tree)
            for block in self.blocks:
                resid = block(resid, run)
        final = resid.index_select(1, shape.final_rows)
        kept = []
        for start in range(0, final.shape[1], rows):
            stop = min(start + rows, final.shape[1])
            mask = shape.output_mask.pick(np.arange(start, stop)[None])
            logits = self.logits_from(final[:, start:stop], mask)[0]
            found = (
                self._final_logits(final, shape, b[start:stop], (logits, start)) for b in beside
            )
            kept.append(keep(logits, slice(start, stop), *found))
        return kept

    def _final_logits(
        self,
        final: Float[Tensor, "1 final d_model"],
        shape: TreeShape,
        numbers: Int[np.ndarray, " row"],
        known: tuple[Float[Tensor, "known d_vocab"], int],
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits of final rows by number, each unembedded once.

        `known` are logits that already exist, and the number of the first of them.
        """
        logits, first = known
        wanted, place = np.unique(numbers, return_inverse=True)
        here = (wanted >= first) & (wanted < first + len(logits))

        def there(rows: Int[np.ndarray, " row"]) -> Tensor:
            return torch.from_numpy(rows).to(final.device, non_blocking=True)

        parts = [logits.index_select(0, there(wanted[here] - first))]
        if not here.all():
            mask = shape.output_mask.pick(wanted[~here][None])
            parts.append(self.logits_from(final.index_select(1, there(wanted[~here])), mask)[0])
        order = np.argsort(np.argsort(~here, kind="stable"))
        return torch.cat(parts).index_select(0, there(order[place]))

    def logits_from(
        self, resid: Float[Tensor, "batch pos d_model"], mask: GraftMask
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """A residual stream read as logits, by the `ln_final` and `unembed` of each row's source.

        Args:
            resid: rows of any layer.
            mask: what they ran under, cut to these rows (`mask.pick`).
        """
        norm = mask.sites.get((C.LN_FINAL, None))
        with self.active.run(mask):
            resid = self.ln_final(resid, norm)
            logits = self.unembed(resid, mask[C.UNEMBED, None])
        return self.apply_output_logits_transform(logits)

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
        resid = self._residual(batch, mask).flatten(0, 1)
        picked = resid.index_select(
            0, torch.from_numpy(rows[0]).to(resid.device, non_blocking=True)
        )
        logits = self.logits_from(picked[None], mask.pick(rows))[0]
        return list(logits.split([len(cs) for cs in columns]))

    def _turning(
        self, like: Tensor, positions: Int[Tensor, "batch pos"], counts: np.ndarray
    ) -> Turning | None:
        """The rotary tables of all sources at these positions."""
        if self.rotary is None:
            return None
        return Turning(self.rotary, self.rotary.made(like, positions, counts))

    def _loss(self, logits: Tensor, batch: Batch, per_token: bool) -> Tensor:
        tokens = batch.tokens.to(logits.device)
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)
        weight = torch.from_numpy(batch.real[:, 1:] & batch.real[:, :-1]).to(losses)
        losses = losses.where(weight > 0, 0.0)  # padding may be a token that a source lacks
        return losses if per_token else losses.sum() / weight.sum()

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
        given = model_args[0] if model_args else kwargs.pop("input")
        names = ("attention_mask", "prepend_bos", "padding_side")
        batch = self.batch(given, **{n: kwargs.pop(n) for n in names if n in kwargs})
        mask = self.resolve(graft, batch)
        if remove_batch_dim and mask.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim=True with {mask.shape[0]} prompts: give one, or leave it out."
            )
        out, activations = super().run_with_cache(
            batch, *model_args[1:], remove_batch_dim=remove_batch_dim, graft=mask, **kwargs
        )
        kept = np.atleast_1d(sliced(torch.arange(mask.shape[1]), kwargs.get("pos_slice"), 0))
        activations.mask = mask = mask.take(None, kept)
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
        config (norms' epsilon, rotary embedding, …), and the tokenizer.
        """
        tokenizer = str(tokenizer_digest(self.tokenizer))
        names = [n for n, m in self.named_modules() if isinstance(m, Sourced)]
        prints = {}
        known: dict[int, bytes] = {}  # what sources share is read once

        def of(tensor: Tensor) -> bytes:
            if id(tensor) not in known:
                raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                known[id(tensor)] = hashlib.sha256(raw.data).digest()
            return known[id(tensor)]

        for index, source in enumerate(self.sources):
            digest = hashlib.sha256()
            for name in names:
                weight = self.get_submodule(name)
                assert isinstance(weight, Sourced)
                tensor = weight.whole(index)
                tensor = tensor[: weight.sizes[index]] if weight.sizes else tensor
                digest.update(name.encode() + of(tensor))
                for added in weight.additions(index):
                    digest.update(repr((type(added).__name__, added.scale)).encode())
                    digest.update(b"".join(map(of, added.tensors)))
            digest.update(f"{self._facts.get(source)} {tokenizer}".encode())
            prints[source] = digest.hexdigest()
        return prints

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
        return found | ({"configs": own} if own else {})

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


def _no_graft(value: object) -> str:
    return (
        f"graft={value!r} is a {type(value).__name__}. Give a Graft, its one-line text, a "
        "mask from model.resolve, or None."
    )


def _columns(extents: Sequence[tuple[int, int, int]]) -> str:
    """The columns of the first few prompts of a batch, for a message."""
    shown = [f"{start}-{start + total - 1}" for start, _, total in extents[:3]]
    return f"columns {', '.join(shown)}{' …' if len(extents) > 3 else ''}"
