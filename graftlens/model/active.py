"""The graft that is in force for a model here, and which of several threads or tasks may use its
hooks.

A graft in force belongs to the thread or task that set it (a context variable); hooks are on the
model itself, so they would act in every run. Anything that would mix the two is refused at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graftlens.components import COMPONENTS, Component
from graftlens.graft import Graft
from graftlens.model.arch import Architecture, Site
from graftlens.model.choice import Choice, Equal, Mixture, Selection, merged
from graftlens.model.inputs import collate
from graftlens.model.mask import GraftMask, resolve, sites_of, uniform_mixture
from graftlens.model.weights import Sourced, equal_sources
from graftlens.positions import Span
from graftlens.prompts import Tokenized

C = Component

#: A graft in force, a forward pass under its mask, or hooks that are temporarily on the model.
Kind = Literal["graft", "pass", "hooks"]


@dataclass(eq=False)
class _Held:
    """One `with` that is active; `level` numbers nested hooks from 1."""

    active: "Active"
    kind: Kind
    graft: Graft | GraftMask | None = None
    level: int = 0
    over: bool = False


#: What this thread or task is inside, for all models, innermost last.
_HERE: ContextVar[tuple[_Held, ...]] = ContextVar("here", default=())

#: Held while a model's `with`s are examined; a collected generator may end one during that
#: time.
_LOCK = RLock()


class Active:
    """Which graft the model is under now: for whoever reads a weight without a position."""

    def __init__(self, arch: Architecture, sources: tuple[str, ...]) -> None:
        self.arch, self.sources = arch, sources
        #: For each source at a site, the first one with the same tensors.
        self.equal: dict[Site, Equal] = {}
        self._live: set[_Held] = set()  # in all threads and tasks

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model is in no `with`.
        return Active, (self.arch, self.sources), {"equal": self.equal}

    # -- what is in force here -------------------------------------------------------------------

    @property
    def stack(self) -> list[Graft | GraftMask | None]:
        """What `with model.grafted(…)` has put in force here, innermost last."""
        return self._of_kinds("graft")

    @property
    def running(self) -> list[GraftMask]:
        """The masks of forward passes that are running here, so that hooks see what runs."""
        return [
            held.graft
            for held in self._here()
            if isinstance(held.graft, GraftMask) and held.kind == "pass"
        ]

    @property
    def innermost(self) -> Graft | GraftMask | None:
        """The graft of the innermost `with model.grafted(…)`.

        Raises:
            RuntimeError: there is none here, but one in another thread or task.
        """
        return self._last("graft")

    @property
    def current(self) -> Graft | GraftMask | None:
        """The mask of the running pass or the graft in force, whichever is the innermost.

        Raises:
            RuntimeError: there is none here, but a graft in force in another thread or task.
        """
        return self._last("graft", "pass")

    @property
    def here(self) -> Graft | GraftMask | None:
        """As `current`, but None if only another thread or task has a graft in force."""
        mine = self._of_kinds("graft", "pass")
        return mine[-1] if mine else None

    def _here(self) -> list[_Held]:
        return [held for held in _HERE.get() if held.active is self and not held.over]

    def _of_kinds(self, *kinds: Kind) -> list[Graft | GraftMask | None]:
        return [held.graft for held in self._here() if held.kind in kinds]

    def _last(self, *kinds: Kind) -> Graft | GraftMask | None:
        mine = self._of_kinds(*kinds)
        if mine:
            return mine[-1]
        if self._live:
            with _LOCK:
                others = [h.graft for h in self._live - set(_HERE.get()) if h.kind == "graft"]
            if others:
                raise RuntimeError(
                    f"`with model.grafted({said(others[0])!r})` is in force in another thread or "
                    "task, but none in this one, so it is unclear which graft is meant here. "
                    'Name it (graft=…; "none" is the base), or put it in force here as well '
                    "(with model.grafted(…))."
                )
        return None

    # -- putting something in force --------------------------------------------------------------

    @contextmanager
    def grafted(self, graft: Graft | GraftMask | None) -> Iterator[None]:
        """A graft in force for what this thread or task runs inside."""
        with self._held(_Held(self, "graft", graft)):
            yield

    @contextmanager
    def under(self, graft: Graft | GraftMask | None) -> Iterator[None]:
        """As `grafted`, for a moment in which none of the user's code runs: other threads do not
        see it."""
        with _entered(_Held(self, "graft", graft)):
            yield

    @contextmanager
    def run(self, mask: GraftMask) -> Iterator[None]:
        """A forward pass under `mask`.

        Raises:
            RuntimeError: another thread or task has put hooks on the model for a run of its own.
        """
        with self._held(_Held(self, "pass", mask)):
            yield

    @contextmanager
    def hooking(self) -> Iterator[int]:
        """Hooks that are temporarily on the model, and their level (nested ones have different
        levels).

        Raises:
            RuntimeError: another thread or task has hooks there, or a running pass.
        """
        with self._held(_Held(self, "hooks")) as level:
            yield level

    def check(self, kind: Kind) -> None:
        """That nothing of another thread or task would mix with a pass, or with hooks.

        Raises:
            RuntimeError: it would.
        """
        if self._live:
            with _LOCK:
                self._check(kind)

    def _check(self, kind: Kind) -> None:
        others = {held.kind for held in self._live - set(_HERE.get())}
        alone = (
            "Run them one after another (a threading.Lock around each), or give each a copy of the "
            "model (copy.deepcopy)."
        )
        if "hooks" in others and kind != "graft":
            raise RuntimeError(
                "another thread or task has hooks on this model for a run of its own (as "
                "run_with_cache and `with model.hooks(…)` put there), and they would act here "
                f"as well. {alone}"
            )
        if "pass" in others and kind == "hooks":
            raise RuntimeError(
                "another thread or task is running this model, and hooks that change now would "
                f"change its run as well. {alone}"
            )

    @contextmanager
    def _held(self, mine: _Held) -> Iterator[int]:
        try:
            with _LOCK:
                self._check(mine.kind)
                if mine.kind == "hooks":
                    mine.level = self._level() + 1
                self._live.add(mine)
            with _entered(mine):
                yield mine.level
        finally:
            with _LOCK:
                self._live.discard(mine)

    def _level(self) -> int:
        return max((held.level for held in tuple(self._live)), default=0)

    @property
    def level(self) -> int:
        """How deeply hooks are nested."""
        with _LOCK:
            return self._level()

    # -- weights without a position --------------------------------------------------------------

    def of(
        self,
        weight: Sourced,
        component: Component,
        layer: int | None,
        parameter: Literal["weight", "bias"] = "weight",
    ) -> Tensor:
        """The one tensor that a site uses now; the base's if no graft is in force.

        Raises:
            ValueError: under a graft for which positions or heads differ there.
            RuntimeError: as for `current`.
        """
        if weight.is_shared:
            return weight[0]
        row, graft = COMPONENTS[component], self.current
        # A bias of a map from units belongs to none of them.
        whole = row.axis == 1 and parameter == "bias"
        used = self._used(component, layer, equal_sources(weight), whole)
        if len(used) == 1:
            return weight.shown(used.pop()).to(weight.like.dtype)
        if row.view is not None:
            view = row.view if parameter == "weight" else f"b_{row.view.removeprefix('W_')}"
            way = f"{view}[source]" if layer is None else f"{view}[source, layer]"
        else:
            inside = "" if row.home is None else f"{row.home}."
            way = f"{component}.{parameter}[source]"  # a norm
            way = way if layer is None else f"blocks[{layer}].{inside}{way}"
        where = "" if layer is None else f" in layer {layer}"
        blended = graft[component, layer].blended if isinstance(graft, GraftMask) else None
        why = "positions, heads or neurons differ"
        if blended is not None:
            why = f"a tensor of strengths mixes {self.sources[blended.source]} in"
        raise ValueError(
            f"under graft {said(graft)!r} there is no single {parameter} for "
            f"{component}{where}: {why}. "
            f"Choose a source yourself, as in model.{way}; or put one in force, as in "
            f'`with model.grafted("{self.sources[-1]} @ all")`.'
        )

    def rows(self, component: Component, layer: int | None, places: torch.Size) -> Choice:
        """What a module uses when it is called by itself.

        Args:
            component: what is called.
            layer: its layer; None outside the layers.
            places: the shape of its input but for the width. Where positions differ: the mask's
                [batch, pos], with heads after it inside the layers, and with the axes of a stack
                before it outside of them.

        Raises:
            ValueError: places differ under the graft in force, and these are not its places.
            RuntimeError: as for `current` and `run`.
        """
        self.check("pass")
        graft, equal = self.current, self.equal[component, layer]
        places = places if layer is None else places[:2]
        count = int(np.prod(places))
        if isinstance(graft, GraftMask):
            chosen = graft[component, layer]
            if tuple(places[-2:]) == graft.shape:
                entries = count // (graft.shape[0] * graft.shape[1])
                every = np.arange(graft.shape[0] * graft.shape[1])
                return chosen if entries == 1 else chosen.pick(np.tile(every, entries))
        else:
            used = self._used(component, layer, equal, False)
            if len(used) == 1:
                return Selection.uniform(used.pop(), count)
            rules = [r for r in (graft or Graft()).rules if r.strength != 0]
            rules = [r for r in rules if (component, layer) in sites_of(r, self.arch, self.sources)]
            where = "" if layer is None else f" in layer {layer}"
            if any(rule.at != Span("all") for rule in rules):
                raise ValueError(
                    f"{component}{where} was called directly under graft {said(graft)!r}, which "
                    "needs a prompt to be resolved. "
                    "Use `with model.grafted(model.resolve(graft, prompts))`."
                )
            anywhere = collate([Tokenized.bare([0])])
            chosen = resolve(Graft(tuple(rules)), anywhere, self.arch, self.sources)[
                component, layer
            ]
        if chosen.blended is None and all(
            len({merged(mixture, equal) for mixture in selection.mixtures}) == 1
            for selection in (chosen.whole, *(selection for _, selection in chosen.selections()))
        ):
            return chosen.pick(np.zeros(count, dtype=np.int64))
        raise ValueError(self._misplaced(component, layer, places))

    def _misplaced(self, component: Component, layer: int | None, places: torch.Size) -> str:
        """Why a module cannot be called by itself on these places."""
        graft = self.current
        assert isinstance(graft, GraftMask)
        said_of = (
            f"{component}{'' if layer is None else f' in layer {layer}'} was called directly on "
            f"{list(places)} vectors under graft {said(graft)!r}, for which the positions of its "
            f"batch of {list(graft.shape)} use different weights. "
        )
        if layer is not None:
            return (
                f"{said_of}Give it [batch, pos, …] of that batch, or choose one source for all: "
                f'with model.grafted("{self.sources[-1]} @ all").'
            )
        return (
            f"{said_of}Give it [batch, pos, d_model] of that batch, or a stack of such; or use the "
            "cache's own methods (cache.logit_lens, cache.accumulated_resid(apply_ln=True), "
            "cache.logit_attrs)."
        )

    def _used(
        self, component: Component, layer: int | None, equal: Equal, whole: bool
    ) -> set[Mixture]:
        """What a site's rows run, equal sources as one; nothing where a graft that is not resolved
        may give several. `whole` asks about what belongs to no unit."""
        graft = self.current
        if isinstance(graft, GraftMask):
            chosen = graft[component, layer]
            return {merged(m, equal) for m in (chosen.whole if whole else chosen).mixtures}
        only = uniform_mixture(graft or Graft(), (component, layer), self.arch, self.sources)
        return set() if only is None else {merged(only, equal)}


class InForce:
    """What the rows of a part run that is called by itself: the graft in force, site by site."""

    def __init__(self, active: Active, places: torch.Size) -> None:
        """`places` is the shape of what the part reads, but for its width."""
        self.active, self.places = active, places

    def __getitem__(self, site: Site) -> Choice:
        return self.active.rows(*site, self.places)


@contextmanager
def _entered(mine: _Held) -> Iterator[None]:
    token = _HERE.set((*_HERE.get(), mine))
    try:
        yield
    finally:
        # Generators may end in any order, and in a different context from the one they started in.
        left = tuple(held for held in _HERE.get() if held is not mine)
        try:
            _HERE.reset(token)
            _HERE.set(left)
        except ValueError:
            mine.over = True


def said(graft: Graft | GraftMask | None) -> str:
    return str(graft.graft if isinstance(graft, GraftMask) else graft or Graft())
