"""A model's hooks: TransformerLens's, and an error where one would never fire."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import transformer_lens
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from graftlens.components import suggest
from graftlens.model.active import Active
from graftlens.model.arch import Architecture
from graftlens.model.cache import Activations
from graftlens.model.points import FlaggedPoint, SilentHookError, UnknownHookError
from graftlens.model.reading import AssertedError

#: Hooks of a layer that TransformerLens 4 looks up at its attention, as its own models have them.
_AT_ATTENTION = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


class Hooking(HookedRootModule):
    """The part of `GraftedTransformer` that has hooks."""

    arch: Architecture
    active: Active
    cfg: Any
    _flagged: list[FlaggedPoint]

    def setup(self) -> None:
        """As in TransformerLens. With version 4, attention's inputs have a second name in
        `hook_dict`: `blocks.{l}.attn.hook_q_input` is `blocks.{l}.hook_q_input`."""
        super().setup()
        for module in self.modules():
            ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
            if ours and not isinstance(module, HookPoint):
                module.cfg = self.cfg  # as each part of a HookedTransformer has it
        if "HookedTransformer" not in dir(transformer_lens):
            for name, point in tuple(self.hook_dict.items()):
                block, _, hook = name.rpartition(".")
                if hook in _AT_ATTENTION:
                    self.hook_dict[f"{block}.attn.{hook}"] = point

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether `blocks.*.attn.hook_result` [batch, pos, head, d_model] is computed.

        Raises, as do all below:
            ValueError: a hook is attached that would no longer fire.
            RuntimeError: another thread or task is running the model.
        """
        self._set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether `hook_q_input`, `hook_k_input`, `hook_v_input` fire, one input per head."""
        self._set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether `hook_attn_in` fires, one input per head for q, k and v together.

        It does not fire while `use_split_qkv_input` is on, which gives q, k and v their own.

        Raises:
            ValueError: with grouped-query heads, where q and k have different numbers of heads.
        """
        grouped = self.arch.n_heads != self.arch.n_kv_heads
        if use_attn_in and grouped and not self.cfg.ungroup_grouped_query_attention:
            raise AssertedError(
                f"hook_attn_in needs as many key-value heads as heads; here they are "
                f"{self.arch.n_kv_heads} and {self.arch.n_heads}. Use set_use_split_qkv_input, or "
                "set_ungroup_grouped_query_attention first."
            )
        self._set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether `blocks.*.hook_mlp_in` fires."""
        self._set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Whether hooks see k and v of grouped-query attention once for each query head.

        `hook_k`, `hook_v` and their split inputs then have as many heads as q, each of which can be
        changed alone; what the model computes stays the same.

        Raises:
            ValueError: also where one norm reads all keys of a position together.
        """
        if ungroup_grouped_query_attention and self.arch.qk_norm == "full":
            raise ValueError(
                f"{self.arch.family} normalises the keys of all heads together, so they cannot be "
                "changed for one query head alone."
            )
        self._set_flag("ungroup_grouped_query_attention", ungroup_grouped_query_attention)

    def _set_flag(self, flag: str, on: bool) -> None:
        self.active.check("hooks")
        before = getattr(self.cfg, flag)
        setattr(self.cfg, flag, on)
        try:
            self._refuse_silent_hooks(f"set_{flag}({on})")
        except ValueError:
            setattr(self.cfg, flag, before)
            raise

    def _refuse_silent_hooks(self, what: str) -> None:
        """Check that every attached hook fires: a flag may have been turned off since."""
        silent = [point for point in self._flagged if point.hooked and not point.fires]
        if silent:
            raise SilentHookError(
                f"{what}: hooks are attached at {first_of(point.name for point in silent)}, which "
                f"would not fire. {silent[0].way} Or remove the hooks first (model.reset_hooks(), "
                "permanent ones with including_permanent=True)."
            )

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        bwd_hooks: Sequence[tuple[Any, Any]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """TransformerLens's context of temporary hooks; an unknown hook name is an error.

        A filter chooses among the hooks whose flag is on.

        Raises:
            ValueError: a hook name that does not exist, a filter that matches none, or a hook whose
                flag is off, so that it would never fire.
            RuntimeError: another thread or task runs the model, or has hooks on it; and, inside, a
                run of another thread or task.
        """
        given = [(self._names(n, "hook"), h, "fwd") for n, h in fwd_hooks]
        given += [(self._names(n, "hook"), h, "bwd") for n, h in bwd_hooks]
        with self.active.hooking() as level:
            try:
                for names, hook, direction in given:
                    for name in names:
                        self.hook_dict[name].add_hook(hook, dir=direction, level=level)
                yield self
            finally:
                if reset_hooks_end:
                    # Not this class's own, which would refuse if another context ends this one.
                    super().reset_hooks(clear_contexts, including_permanent=False, level=level)

    @property
    def context_level(self) -> int:
        """How deeply `with model.hooks(…)` and the like are nested."""
        return self.active.level

    @context_level.setter
    def context_level(self, level: int) -> None:
        """HookedRootModule's initialiser sets it to 0, which it is."""

    def add_hook(self, name: Any, hook: Any, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens: on the model until it is removed, in the runs of every thread.

        A filter chooses among the hooks whose flag is on.

        Raises:
            ValueError: as for `hooks`; so does `hook_point.add_hook` itself.
            RuntimeError: another thread or task runs the model, or has hooks on it.
        """
        self.active.check("hooks")
        for each in self._names(name, "hook"):
            super().add_hook(each, hook, *args, **kwargs)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens.

        Raises:
            RuntimeError: another thread or task runs the model, or has hooks on it.
        """
        self.active.check("hooks")
        super().reset_hooks(*args, **kwargs)

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; the arguments are those of `get_caching_hooks`."""
        cached, fwd, bwd = self.get_caching_hooks(*args, **kwargs)
        for direction, hooks in (("fwd", fwd), ("bwd", bwd)):
            for name, hook in hooks:
                self.add_hook(name, hook, dir=direction)
        return cached

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> Any:
        """As in TransformerLens: a function that chooses no hook, or an empty list, caches nothing;
        a name that does not exist is an error.

        Unless `cache` is given, the dictionary remembers the graft of the run that filled it, so
        that an `ActivationCache` made from it knows which weights to compute with.
        """
        names = self._names(names_filter, "names_filter", may_be_none=True)
        cache = Activations() if cache is None else cache
        cached, *hooks = super().get_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)
        kept = None if pos_slice is None else Slice.unwrap(pos_slice)

        def keep(tensor: Tensor, hook: HookPoint, save: Any) -> None:
            passes = self.active.running  # none where a backward hook fires
            if passes and isinstance(cache, Activations):
                cache.filled(str(hook.name), passes[-1], kept)
            if kept is not None:
                # TransformerLens guesses the axis from the name, and cuts heads at hook_rot_q.
                per_pair = str(hook.name).endswith(("hook_attn_scores", "hook_pattern"))
                tensor = kept.apply(tensor, dim=2 if per_pair else 1)
            save(tensor, hook=hook)

        return cached, *([(name, partial(keep, save=save)) for name, save in h] for h in hooks)

    def _names(self, chosen: Any, what: str, may_be_none: bool = False) -> list[str]:
        """The hook points' own names, of which TransformerLens 4 knows some by another one."""
        known = self.hook_dict
        silent = {n for n, p in known.items() if isinstance(p, FlaggedPoint) and not p.fires}
        if chosen is None or callable(chosen):
            matching = [n for n in known if chosen is None or chosen(n)]
            firing = [n for n in matching if n not in silent]
            own = [n for n in firing if known[n].name == n]
            if not firing and may_be_none and matching:
                first = matching[0]
                raise SilentHookError(
                    f"{what}: {first!r} does not fire, to save memory. {known[first].way}"
                )
            if not firing and not may_be_none:
                raise ValueError(
                    f"{what} matches none of the {len(known)} hooks. Hook names look like "
                    '"blocks.0.hook_resid_post"; list(model.hook_dict) has them all.'
                )
            return own or [str(known[n].name) for n in firing]
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        for name in names:
            if name not in known:
                raise UnknownHookError(
                    f"{what}: no hook {name!r}. list(model.hook_dict) has all names."
                    f"{suggest(str(name), known)}"
                )
            if name in silent:
                raise SilentHookError(
                    f"{what}: {name!r} does not fire, to save memory. {known[name].way}"
                )
        return [str(known[name].name) for name in names]


def first_of(names: Iterable[str | None]) -> str:
    """The first few of some names, for a message."""
    known = [str(name) for name in names]
    return ", ".join(known[:3]) + (" …" if len(known) > 3 else "")
