"""Integrated gradients along one strength of all searched places, from the base to the source.

Integrated gradients are Sundararajan et al. 2017 (arXiv 1703.01365): the derivatives along a
straight path add up to the difference between its ends. Here the path is that of the weights,
W(s) = (1 - s) W_base + s W_source, with a strength for each row of each component.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from graftlens.components import brief
from graftlens.find.asked import Asked, By, Outside
from graftlens.find.directions import Directions
from graftlens.find.gradients import (
    Passes,
    Scores,
    differentiable,
    refuse_lacking_tokens,
    refuse_mixed_tables,
)
from graftlens.find.places import Layout
from graftlens.graft import Graft, Where
from graftlens.memory import affordable_rows, halving
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer, Input

#: A prompt adds up if what is missing is at most this share of the difference.
CLOSED = 0.01
#: The most nodes that "auto" takes, and how many it begins with.
MOST, FIRST = 64, 8
#: Differences below this are too small to say how much of them is missing.
NOTHING = 1e-3
#: The most nodes that can be asked for.
ALLOWED = 1024


def attribute(
    model: GraftedTransformer,
    prompts: Input,
    source: str,
    *,
    positions: Sequence[Where] | Literal["each"],
    by: By = "site",
    metric: Measure | str = "logprob",
    steps: int | Literal["auto"] = 8,
    within: Graft | str | None = None,
    outside: Outside = "base",
    targets: Any = None,
    continuations: Sequence[str] | str | None = None,
) -> pd.DataFrame:
    """How much each place contributes to what a source's weights change.

    All searched places get one strength s, from 0 (the base's weights) to 1 (the source's). `ig` is
    the integral over s of the measure's derivative with respect to a place's own strength
    (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365, by Gauss-Legendre
    quadrature), so that all places of a prompt add up to the difference between the ends.
    `at_base` and `at_full` are the derivatives at the ends: what the first step from the base
    gives, and what the first step back from the full run takes. They are proposals:
    `exact_effects` computes each place by itself.

    Args:
        model: the model, without hooks.
        prompts: prompts with answers; or token ids [batch, pos], or a batch of them
            (`model.batch(tokens, attention_mask=…)`), with `targets`.
        source: whose weights the search is about.
        positions: spans, expressions over spans or token numbers that do not overlap, and "rest"
            for all other tokens; or "each", every token by itself.
        by: what a row is: a whole `site` (component × layer); a `head` (query heads of q and o,
            key-value heads of k and v); a `neuron` of mlp_in, mlp_gate and mlp_out; a singular
            `direction` of the source's difference in a matrix, a score that no graft can check. All
            come from the same backward pass. Sites without such units keep a row.
        metric: a measure that gradients pass through, by its name or as a `Measure`. Over a whole
            answer (`answer_logprob`), its tokens follow the prompt, and their positions count as
            `last` and as `all`, as in a sweep; with positions="each" they run what is `outside`.
        steps: nodes of the quadrature; "auto" doubles them, up to 64, for the prompts that do not
            add up to 1 %.
        within: search only the sites, positions, heads and neurons that this graft grafts.
        outside: what runs at all places that are not searched: the `base`, or the source (`full`).
        targets: with token ids, the id of the token that should follow each prompt.
        continuations: of each prompt, the text that follows it instead of its answer, as generated:
            positions may then name `generated`, and `assistant` includes it, as in `outcomes`.

    Returns:
        One row per prompt and place, in the model's order: `prompt` (its number); `component`;
        `layer` (NA outside the layers); `position` (the expression, "rest" written out, or the
        token's number); `unit` (the number of a head or neuron; "bias", what of `o` and `mlp_out`
        belongs to none, of a direction any bias; "d0", "d1", … directions, the largest singular
        value first; NA for a whole site); `ig`, `at_base` and `at_full`, in units of the measure;
        `value_base` and `value_full`, the measure at strengths 0 and 1; `completeness`, the share
        of their difference that `ig` leaves unexplained, NA where it is below 0.001. Sites whose
        tensors are equal in both sources have the score 0. Where the sources have different
        vocabularies and the measure is KL, JS or entropy, `common_tokens` is how many tokens it is
        over: those that all sources have. `attrs["passes"]` counts the forward and backward passes,
        one for each prompt at each strength.

    Raises:
        PromptError: prompts that cannot be run or lack what the measure needs, positions that
            overlap or select nothing in a prompt, a value that is not finite.
        ValueError: any other argument that is not allowed; q or k between sources whose rotary
            tables differ; hooks on the model; a model that was loaded in inference mode.
    """
    nodes = quadrature_nodes(steps)
    asked = Asked.of(
        model,
        prompts,
        source,
        positions=positions,
        metric=metric,
        by=by,
        within=within,
        outside=outside,
        targets=targets,
        continuations=continuations,
    )
    refuse_mixed_tables(model, asked)
    refuse_lacking_tokens(model, asked)
    with differentiable(model):
        directions = Directions(model, asked) if asked.by == "direction" else None
        found = _Integrals(model, asked, directions, nodes)
        found.run()
    _warn(found.completeness, steps)
    table = found.table()
    return model.vocabularies.marked(table) if asked.measure.over_common else table


def quadrature_nodes(steps: Any) -> int | None:
    """The number of nodes; None is "auto".

    Raises:
        ValueError: a number that is not allowed.
    """
    if isinstance(steps, str) and steps == "auto":
        return None
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or not 1 <= steps <= ALLOWED:
        raise ValueError(
            f'steps={brief(steps)}: write a whole number from 1 to {ALLOWED}, or "auto".'
        )
    return int(steps)


class _Integrals:
    """The integrals of all prompts, batch by batch."""

    def __init__(
        self,
        model: GraftedTransformer,
        asked: Asked,
        directions: Directions | None,
        nodes: int | None,
    ) -> None:
        self.model, self.asked, self.directions, self.nodes = model, asked, directions, nodes
        units = asked.units if directions is None else directions.units(asked)
        self.layout = Layout(units, asked.positions, asked.there)
        count = len(asked.prompts)
        self.rows: dict[str, list[Any]] = {n: [None] * count for n in ("ig", "at_base", "at_full")}
        self.values = {n: np.full(count, np.nan) for n in ("value_base", "value_full")}
        self.completeness = np.full(count, np.nan)
        self.passes = 0

    def run(self) -> None:
        """All prompts, those of similar lengths together, as many as the memory holds."""
        lengths = [len(one.part) for one in self.asked.prompts]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        cfg = self.model.cfg
        rows = affordable_rows(self.model.arch, cfg.device, cfg.dtype, self._row_bytes())
        batches: list[list[int]] = [[]]
        for number in order:
            if batches[-1] and (len(batches[-1]) + 1) * lengths[number] > rows:
                batches.append([])
            batches[-1].append(number)
        halving(batches, self._batch, cfg.device)

    def _row_bytes(self) -> int:
        """Approximate bytes that one row takes: all that the backward pass needs of all layers,
        and strengths by unit with their gradients."""
        arch, item = self.model.arch, max(4, self.model.cfg.dtype.itemsize)
        of_units = sum(len(units) for units in self.layout.units.values() if len(units) > 1)
        heads = (arch.n_heads + 2 * arch.n_kv_heads) * arch.d_head
        of_layer = 12 * arch.d_model + 6 * heads + 10 * arch.d_mlp
        return item * (arch.n_layers * of_layer + 4 * of_units)

    def _batch(self, numbers: Sequence[int]) -> None:
        passes = Passes(self.model, self.asked, numbers, self.directions)
        for strength, what in ((0.0, "base"), (1.0, "full")):
            found = passes.at(strength)
            self._keep(f"at_{what}", numbers, found.scores)
            self.values[f"value_{what}"][list(numbers)] = found.values
            self.passes += len(numbers)
        nodes, rest = self.nodes or FIRST, list(numbers)
        while rest:
            self._keep("ig", rest, integral(passes, nodes))
            self.passes += nodes * len(rest)
            nodes *= 2
            if self.nodes is not None or nodes > MOST:
                break
            rest = [number for number in rest if self.completeness[number] > CLOSED]
            if rest:
                passes = Passes(self.model, self.asked, rest, self.directions)

    def _keep(self, what: str, numbers: Sequence[int], scores: Scores) -> None:
        for number, row in zip(numbers, self.layout.flat(scores, numbers), strict=True):
            self.rows[what][number] = row
            if what == "ig":
                full, base = (self.values[f"value_{end}"][number] for end in ("full", "base"))
                if abs(full - base) >= NOTHING:
                    self.completeness[number] = abs(row.sum() - (full - base)) / abs(full - base)

    def table(self) -> pd.DataFrame:
        """All prompts' rows."""
        found = self.layout.frame(self.rows, {**self.values, "completeness": self.completeness})
        found.attrs["passes"] = self.passes
        return found


def integral(passes: Passes, nodes: int) -> Scores:
    """The derivatives integrated over the strength, by Gauss-Legendre quadrature."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    total: Scores = {}
    for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
        for site, scores in passes.at((1 + place) / 2).scores.items():
            part = weight / 2 * scores
            total[site] = total[site] + part if site in total else part
    return total


def _warn(completeness: Float[np.ndarray, " prompt"], steps: int | str) -> None:
    far = np.flatnonzero(completeness > CLOSED)
    if len(far):
        worst = int(np.nanargmax(completeness))
        advice = (
            f"{MOST} steps were not enough, so the measure jumps or bends sharply on the way: "
            "compare with find.exact_effects."
            if steps == "auto"
            else 'Take more steps, or steps="auto".'
        )
        warnings.warn(
            f"for {len(far)} of {len(completeness)} prompts the scores' sum misses the whole "
            f"effect by more than 1 % (worst is prompt {worst}: by {completeness[worst]:.1%}). "
            f"{advice}",
            stacklevel=3,
        )
