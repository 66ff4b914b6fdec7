"""A measure and its gradients at a strength common to all searched places, for a batch of prompts.

Every searched row (and unit of a row) has a strength of its own, all with the same value s, so that
y = (1 - s) * (the base's) + s * (the source's). One forward and one backward pass give the
measure's derivative with respect to each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.components import Component
from graftlens.find.asked import Asked
from graftlens.find.directions import Directions
from graftlens.graft import Graft
from graftlens.metrics import Predictions
from graftlens.model.arch import Site
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.inputs import collate
from graftlens.model.rotary import mixed_tables
from graftlens.prompts import PromptError

#: For each site that is not left out, what its rows add up to, by prompt, position and unit.
Scores = dict[Site, Float[np.ndarray, "prompt position unit"]]


@dataclass(frozen=True, eq=False)
class At:
    """What one pass gives: each prompt's value, in the measure's unit, and the derivatives."""

    values: Float[np.ndarray, " prompt"]
    scores: Scores


class Passes:
    """The passes of a few prompts, which run together."""

    def __init__(
        self,
        model: GraftedTransformer,
        asked: Asked,
        numbers: Sequence[int],
        directions: Directions | None = None,
    ) -> None:
        """Lay out the batch, and run the references that the measure compares with.

        Args:
            model: the model.
            asked: what is searched, in which prompts.
            numbers: the prompts that run together.
            directions: the singular directions, where they are asked for.
        """
        self.model, self.asked, self.numbers = model, asked, tuple(numbers)
        self.directions = directions
        items = [asked.prompts[number] for number in numbers]
        self.device = torch.device(model.cfg.device)
        self.dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        self.batch = collate(
            [one.scored.tokens for one in items],
            continuations=[one.tail for one in items],
            device=self.device,
        )
        self._n_positions = len(asked.positions)
        rows = np.full(self.batch.real.shape, len(items) * self._n_positions, dtype=np.int64)
        for row, one in enumerate(items):
            part, first = one.part, self.batch.starts[row]
            here = np.where(part >= 0, row * self._n_positions + part, rows[row, 0])
            rows[row, first : first + len(part)] = here
        #: The prompt and position that each row of the batch belongs to; the last number is none.
        self.segments = rows.reshape(-1)
        inner = Graft() if asked.outside == "base" else Graft.rule(asked.source)
        self._inner = model.resolve(inner, self.batch)
        self._searched = self._searched_rows()
        self._read()
        self._references = {
            run: self._logits_of(graft)
            for run, graft in (("base", Graft()), ("full", Graft.rule(asked.source)))
            if run in asked.measure.references
        }

    def _searched_rows(self) -> dict[Site, Tensor]:
        """For each site that is not left out, 1 in the rows (and units) that are searched."""
        asked, known = self.asked, dict[int, Tensor]()
        found = {}
        for site in asked.sites:
            if site in asked.equal:
                continue
            there = asked.there[site]
            if id(there) not in known:
                own = there[list(self.numbers)].reshape(-1, there.shape[2])
                padded = np.concatenate([own, np.zeros_like(own[:1])])[self.segments]
                rows = padded[:, 0] if there.shape[2] == 1 else padded
                known[id(there)] = torch.from_numpy(rows).to(self.device).to(self.dtype)
            found[site] = known[id(there)]
        return found

    def _read(self) -> None:
        """Which rows are unembedded, and for which token of which prompt."""
        width, whole = self.batch.real.shape[1], self.asked.measure.over == "answer"
        rows: list[int] = []
        tokens: list[int] = []
        owners: list[int] = []
        for number, column in enumerate(self.batch.last_columns()):
            answer = self.asked.prompts[self.numbers[number]].scored.answer
            for step, token in enumerate(answer if whole else answer[:1]):
                rows.append(number * width + column + step)
                tokens.append(token)
                owners.append(number)
        self._rows = np.array([rows])
        self._owners = torch.tensor(owners, device=self.device)
        self._tokens = torch.tensor(tokens, device=self.device)

    def _logits_of(self, graft: Graft) -> Float[Tensor, "read d_vocab"]:
        with torch.no_grad():
            return self.model.logits_of_rows(
                self.batch, self.model.resolve(graft, self.batch), self._rows
            )

    # -- passes ------------------------------------------------------------------------------

    def at(self, strength: float | int) -> At:
        """The values and derivatives at a strength from 0 (nothing grafted) to 1 (all of it).

        Raises:
            PromptError: a value that is not finite.
            ValueError: a measure that no gradient passes through.
        """
        outer = self.asked.outside == "base"
        mixed = strength if outer else 1 - strength
        leaves: dict[Site, Tensor] = {}
        strengths: dict[tuple[str, int | None], Tensor] = {}
        biases: dict[tuple[str, int | None], Tensor] = {}
        for site, rows in self._searched.items():
            leaves[site] = (rows * mixed).requires_grad_()
            key = (str(site[0]), site[1])
            strengths[key] = leaves[site]
            if self.asked.units[site][-1] == "bias":
                strengths[key], biases[key] = leaves[site][:, :-1], leaves[site][:, -1]
        source = self.asked.source if outer else self.asked.base
        mask = self._inner.strengthened(source, strengths, biases)
        sums: Scores = {}
        with self._noting(sums):
            logits = self.model.logits_of_rows(self.batch, mask, self._rows)
            values = self._values(logits, strength)
            gradients: tuple[Tensor | None, ...] = ()
            if leaves:  # there are none where all that is searched is equal in both sources
                wanted = list(leaves.values())
                gradients = torch.autograd.grad(values.sum(), wanted, allow_unused=True)
        sign = 1 if outer else -1
        found = dict(zip(leaves, gradients, strict=True))
        scores = self._added_up({s: sign * g for s, g in found.items() if g is not None})
        return At(values.detach().cpu().double().numpy(), scores | sums)

    def _added_up(self, gradients: dict[Site, Tensor]) -> Scores:
        """Gradients of rows, added up over each position of each prompt."""
        segments = torch.from_numpy(self.segments).to(self.device)
        count = len(self.numbers) * self._n_positions
        whole = [site for site, g in gradients.items() if g.ndim == 1]
        parts = []
        if whole:
            parts.append(torch.stack([gradients[site] for site in whole], dim=1))
        cut = [site for site in gradients if site not in set(whole)]
        parts += [gradients[site] for site in cut]
        if not parts:
            return {}
        # Not one copy from the device for each site.
        widths = [part.shape[1] for part in parts]
        sums = [
            part.new_zeros(count + 1, part.shape[1]).index_add_(0, segments, part)[:-1]
            for part in parts
        ]
        host = torch.cat(sums, dim=1).cpu().double().numpy()
        pieces = np.split(host, np.cumsum(widths)[:-1], axis=1)
        shape = (len(self.numbers), self._n_positions, -1)
        found: Scores = {}
        if whole:
            found |= {site: pieces[0][:, i].reshape(shape) for i, site in enumerate(whole)}
        later = pieces[1:] if whole else pieces
        return found | {s: p.reshape(shape) for s, p in zip(cut, later, strict=True)}

    @contextmanager
    def _noting(self, sums: Scores) -> Iterator[None]:
        """Inside, what directions contribute is noted by site."""
        if self.directions is None:
            yield
            return
        shape = (len(self.numbers), self._n_positions, -1)
        read = self.segments[self._rows[0]]
        outputs = {site for site in self._searched if site[0] is Component.UNEMBED}

        def add(site: Site, of_rows: Float[Tensor, "rows unit"]) -> None:
            rows = torch.from_numpy(read if site in outputs else self.segments).to(self.device)
            count = len(self.numbers) * self._n_positions
            made = of_rows.new_zeros(count + 1, of_rows.shape[1]).index_add_(0, rows, of_rows)
            sums[site] = made[:-1].cpu().double().numpy().reshape(shape)

        with self.directions.noted(self._searched, add):
            yield

    # -- the measure -------------------------------------------------------------------------

    def _values(
        self, logits: Float[Tensor, "read d_vocab"], strength: float | int
    ) -> Float[Tensor, " prompt"]:
        """The measure of each prompt, gradients included."""
        measure = self.asked.measure
        common = self.model.vocabularies.common
        here = Predictions(logits, n_common=common)
        beside = {run: Predictions(l, n_common=common) for run, l in self._references.items()}
        total = logits.new_zeros(len(self.numbers), dtype=here.logits.dtype)
        for index in self._alike():
            given: dict[str, Any] = {run: of.rows(index) for run, of in beside.items()}
            first = self._owners if index is None else self._owners[index]
            for need in ("distractors", "answers"):
                if need in measure.needs:
                    lists = self._lists(need)
                    given[need] = torch.tensor(
                        [lists[int(owner)] for owner in first], device=self.device
                    )
            answer = self._tokens if index is None else self._tokens[index]
            values = here.rows(index, answer=answer, **given).of(measure)
            self._check(values, len(answer))
            values = values.exp() if measure.log else values
            total = total.index_add(0, first, values.to(total.dtype))
        finite = total.detach().isfinite().cpu().numpy()
        if not finite.all():
            row = int(np.argmin(finite))
            raise PromptError(
                f"prompt {self.numbers[row]}: {measure.name} is {float(total[row])} at strength "
                f"{strength:.3g}, so that it has no gradient: the logits overflow in "
                f"{self.model.cfg.dtype}, or a source lacks the answer's token. Use a wider dtype, "
                "or leave the prompt out."
            )
        return total

    def _alike(self) -> list[Tensor | None]:
        """Rows that are measured together: as many distractors and answers; None is all."""
        needs = self.asked.measure.needs
        lists = [self._lists(need) for need in ("distractors", "answers") if need in needs]
        if not lists:
            return [None]
        owners = self._owners.tolist()
        kinds: dict[tuple[int, ...], list[int]] = {}
        for row, owner in enumerate(owners):
            kinds.setdefault(tuple(len(of[owner]) for of in lists), []).append(row)
        if len(kinds) == 1:
            return [None]
        return [torch.tensor(rows, device=self.device) for rows in kinds.values()]

    def _lists(self, need: str) -> list[tuple[int, ...]]:
        scored = [self.asked.prompts[number].scored for number in self.numbers]
        return [one.wrong if need == "distractors" else one.answers for one in scored]

    def _check(self, values: Any, rows: int) -> None:
        name = self.asked.measure.name
        if not isinstance(values, Tensor) or tuple(values.shape) != (rows,):
            given = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values)
            raise ValueError(
                f"measure {name!r} gave {given} for logits of {rows} rows. Its function must give "
                "a tensor of one number per row."
            )
        if self._searched and torch.is_grad_enabled() and not values.requires_grad:
            raise ValueError(
                f"measure {name!r}: no gradient reaches its values. Compute them from the logits "
                "with differentiable functions of tensors, or say differentiable=False and use "
                "find.exact_effects."
            )


@contextmanager
def differentiable(model: GraftedTransformer) -> Iterator[None]:
    """Inside, gradients are on and no parameter has one, whatever is in force outside.

    Raises:
        ValueError: a model that was loaded in inference mode, or has hooks.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was loaded inside torch.inference_mode(), whose tensors have no gradients. "
            "Load it outside."
        )
    hooked = [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    if hooked:
        raise ValueError(
            f"hooks are attached at {hooked[0]}: prompts run here in batches of attribution's own, "
            "at many strengths, in which a hook would not mean what it means in a run. Remove them "
            "(model.reset_hooks())."
        )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def refuse_mixed_tables(model: GraftedTransformer, asked: Asked) -> None:
    """That no query or key is searched whose rotary tables differ.

    Raises:
        ValueError: one is.
    """
    if model.rotary is None or not model.rotary.differ:
        return
    number = model.sources.index(asked.source)
    for component, layer in asked.sites:
        if component not in (Component.Q, Component.K) or layer is None:
            continue
        equal = model.rotary.equal(layer)
        if why := mixed_tables([0, number], equal, model.sources, component, layer):
            others = [c for c in model.arch.components if c not in (Component.Q, Component.K)]
            raise ValueError(
                f"attribution runs every strength from 0 to 1: {why} Leave q and k out: "
                f'within="{asked.source} @ all : {" + ".join(others)}", or use find.exact_effects.'
            )


def refuse_lacking_tokens(model: GraftedTransformer, asked: Asked) -> None:
    """That no token is read from the embedding of a source that lacks it, at either end.

    Raises:
        PromptError: one is.
    """
    if not model.vocabularies.differ:
        return
    for number, one in enumerate(asked.prompts):
        batch = collate([one.scored.tokens], continuations=[one.tail])
        for graft in asked.ends(number):
            try:
                model.refuse_lacking(batch, model.resolve(graft, batch))
            except PromptError as error:
                raise PromptError(f"prompt {number}{str(error).removeprefix('prompt 0')}") from None
