"""Running token trees: many grafts of many prompts in one pass."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.model.hooks import first_of
from graftlens.model.passes import KeyValueCache, Pass
from graftlens.model.rotary import turning_of_tree
from graftlens.model.tree import TreeBatch, TreeShape

T = TypeVar("T")


class TreeRuns:
    """The part of `GraftedTransformer` that runs the trees of a sweep."""

    @torch.no_grad()
    def tree_logits(
        self: Any,
        tree: TreeBatch,
        keep: Callable[..., T],
        rows: int = 256,
        beside: Sequence[Int[np.ndarray, " final"]] = (),
        cache: KeyValueCache | None = None,
    ) -> list[T]:
        """What `keep` makes of a token tree's logits, which never exist all at once.

        Args:
            tree: the trees to run.
            keep: called with logits [row, d_vocab] and which of the final rows they are, in order;
                then with the logits of those that `beside` names.
            rows: how many rows are unembedded at a time.
            beside: final rows to read with each final row, such as those of a reference run.
            cache: an empty one, to be filled with the keys and values of each layer's key rows.

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
            run = Pass(shape.mask, turning, cache=cache, tree=tree)
            for block in self.blocks:
                resid = block(resid, run=run)
        final = resid.index_select(1, shape.final_rows)
        kept = []
        for start in range(0, final.shape[1], rows):
            stop = min(start + rows, final.shape[1])
            mask = shape.output_mask.pick(np.arange(start, stop)[None])
            logits = self._read_out(final[:, start:stop], mask)[0]
            found = (
                self._final_logits(final, shape, b[start:stop], (logits, start)) for b in beside
            )
            kept.append(keep(logits, slice(start, stop), *found))
        return kept

    def _final_logits(
        self: Any,
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
            parts.append(self._read_out(final.index_select(1, there(wanted[~here])), mask)[0])
        order = np.argsort(np.argsort(~here, kind="stable"))
        return torch.cat(parts).index_select(0, there(order[place]))
