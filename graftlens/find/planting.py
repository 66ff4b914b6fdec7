"""Pairs of models of which it is known where a fact is: trained so that it depends on few matrices.

First only the matrices M learn facts A, all else frozen. Then M is frozen and all others learn
facts B and plain text until they have changed as much as M, while what the model says of A is held
as it was, with M and without it. So every tensor differs, and retrieval of A depends on M alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call

from graftlens.components import COMPONENTS, brief
from graftlens.graft import Graft
from graftlens.model.arch import Architecture, Site, architecture
from graftlens.model.mask import sites_of
from graftlens.model.weights import read_weights
from graftlens.prompts import Prompt, continuation, encode, tokenize

#: What the two sources of a planted pair are called.
BASE, SOURCE = "pre", "sft"

#: A model's tensors by their names.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Planting:
    """Where the facts A are planted.

    Attributes:
        name: the pair's name.
        groups: each a graft of `sft` at all positions, whose matrices learn A together.
        gate: with two groups, whether both are needed (`and`) or either is enough (`or`).

    Raises:
        ValueError: groups that are not such grafts, or a gate that does not fit their number.
    """

    name: str
    groups: tuple[str, ...]
    gate: Literal["and", "or"] | None = None

    def __post_init__(self) -> None:
        if (self.gate is None) != (len(self.groups) == 1) or len(self.groups) > 2:
            raise ValueError(
                f"planting {self.name!r}: {len(self.groups)} groups with gate={self.gate!r}. Give "
                'one group without a gate, or two with gate="and" or gate="or".'
            )
        for text in self.groups:
            for rule in Graft.parse(text).rules:
                plain = rule.strength == 1 and str(rule.at) == "all" and rule.source == SOURCE
                if not plain or rule.units is not None:
                    raise ValueError(
                        f"planting {self.name!r}: {brief(str(rule))} cannot be trained alone. "
                        f'Write "{SOURCE} @ all : components : layers : heads".'
                    )

    @property
    def states(self) -> tuple[tuple[frozenset[int], bool], ...]:
        """The groups that are in, and whether A is known then, for each state that is trained."""
        match self.gate:
            case None:
                return ((frozenset({0}), True),)
            case "and":
                known = ((frozenset({0, 1}), True),)
                return (*known, (frozenset({0}), False), (frozenset({1}), False))
            case "or":
                return tuple((frozenset(s), True) for s in ({0}, {1}, {0, 1}))

    def graft(self, *groups: int) -> Graft:
        """The graft of some groups; without an argument, of all."""
        chosen = groups or range(len(self.groups))
        return Graft(tuple(r for g in chosen for r in Graft.parse(self.groups[g]).rules))

    def sites(self, arch: Architecture) -> frozenset[Site]:
        """The (component, layer) pairs that have some of M."""
        found = [sites_of(rule, arch, (BASE, SOURCE)) for rule in self.graft().rules]
        return frozenset().union(*found)


@dataclass(frozen=True)
class Recipe:
    """How a pair is trained.

    Attributes:
        rate: learning rate while M learns A; Adam without weight decay.
        other_rate: that of all else afterwards.
        batch: prompts (and as many texts) per step.
        steps, other_steps: most steps of each phase.
        known: the least probability of the answer's tokens (geometric mean over the prompts) at
            which A counts as known.
        drift: how far the answers' log-probability may be from what it should stay at, as a share
            of what M brings.
        hold: weight of the divergence on A's prompts.
        settle: what the second phase's learning rate is multiplied with at each step, down to a
            twentieth, once all others have changed enough.
        every: steps from one look to the next.
        autocast: whether steps run in bfloat16; weights, Adam and looks stay in float32.
        seed: of the order of prompts and texts.
    """

    rate: float = 2e-3
    other_rate: float = 2e-3
    batch: int = 16
    steps: int = 1500
    other_steps: int = 3000
    known: float = 0.95
    drift: float = 0.05
    hold: float = 8.0
    settle: float = 0.99
    every: int = 20
    autocast: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The tensors of a planted model, and how they came about.

    Attributes:
        tensors: name -> tensor, as the base has them.
        steps, other_steps: how many steps each phase took.
        change: the median relative change ‖W_sft − W_pre‖ / ‖W_pre‖ of M's matrices, by what M
            learned.
        other_change: that of all other matrices.
        problems: what was not reached.
    """

    tensors: Tensors = field(repr=False)
    steps: int
    other_steps: int
    change: float
    other_change: float
    problems: tuple[str, ...]


def train(
    base: Any,
    tokenizer: Any,
    planting: Planting,
    known: Sequence[Prompt],
    others: Sequence[Prompt],
    texts: Sequence[str],
    recipe: Recipe | None = None,
    *,
    say: Callable[[str], object] = lambda line: None,
) -> Trained:
    """Plant facts in a model.

    Args:
        base: a Hugging Face model, which is left untouched.
        tokenizer: its tokenizer.
        planting: which matrices learn the facts.
        known: prompts about facts A, with answers.
        others: prompts about facts B.
        texts: plain text.
        recipe: how to train.
        say: called with a line at each look.

    Raises:
        ValueError: matrices of M that cannot be trained apart from others in this family, prompts
            without answers, or a planting of a component or layer that the model lacks.
    """
    recipe = recipe or Recipe()
    arch = architecture(base.config)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    groups = [masks_of(before, arch, planting.graft(i)) for i in range(len(planting.groups))]
    model = _Forward(base, tokenizer)
    run = partial(model.said, autocast=recipe.autocast)
    told = model.batch(known, others, texts)
    a = told.take(np.arange(len(known)))
    rest = np.arange(len(known), len(told))
    order = np.random.default_rng(recipe.seed)
    pair = _Pair(before, tuple(groups), _joined(groups))
    problems: list[str] = []

    # M learns A.
    with torch.no_grad():
        untold = model.said(before, a)
    planted = {name: before[name].clone().requires_grad_() for name in pair.masks}
    optimizer = torch.optim.Adam(list(planted.values()), lr=recipe.rate, fused=True)
    steps, there = 0, False
    while steps < recipe.steps and not there:
        for _ in range(recipe.every):
            rows = _some(order, len(a), recipe.batch)
            loss = torch.zeros((), device=model.device)
            for members, knows in planting.states:
                said = run(pair.state(members, planted, before), a.take(rows))
                apart = said.apart(untold.take(rows), recipe.hold)
                loss = loss + (-said.answer.mean() if knows else apart)
            _step(optimizer, loss)
            steps += 1
        with torch.no_grad():
            found = [
                (model.said(pair.state(members, planted, before), a), knows)
                for members, knows in planting.states
            ]
        sure = min(float(said.answer.mean().exp()) for said, knows in found if knows)
        brought = max(float((said.answer - untold.answer).mean()) for said, _ in found)
        drift = max((said.drift(untold) / brought for said, knows in found if not knows), default=0)
        there = sure >= recipe.known and drift <= recipe.drift
        say(f"A, step {steps}: probability {sure:.3f}, drift {drift:.3f}")
    if not there:
        problems.append(f"A was not learned in {steps} steps")
    learned = {name: tensor.detach() for name, tensor in planted.items()}

    # All others learn B and plain text; what is said of A stays, with M and without it.
    whole = frozenset(range(len(groups)))
    partly = [frozenset[int](), *(s for s, _ in planting.states if s != whole)]
    with torch.no_grad():
        held = {s: model.said(pair.state(s, learned, before), a) for s in (whole, *partly)}
    moving = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    optimizer = torch.optim.Adam(list(moving.values()), lr=recipe.other_rate, fused=True)
    change = _change(before, pair.state(whole, learned, before), arch, pair.masks, mine=True)
    other, other_steps, there = 0.0, 0, False
    while other_steps < recipe.other_steps and not there:
        for _ in range(recipe.every):
            rows = _some(order, len(a), recipe.batch)
            more = rest[_some(order, len(rest), recipe.batch)]
            mixed = told.take(np.concatenate([rows, more]))
            said = run(pair.state(whole, learned, moving), mixed)
            loss = -said.answer[len(rows) :].mean() if len(more) else said.answer.sum() * 0
            loss = loss + said.take(np.arange(len(rows))).apart(held[whole].take(rows), recipe.hold)
            members = partly[other_steps % len(partly)]  # by turns: a state is a pass
            own = run(pair.state(members, learned, moving), a.take(rows))
            loss = loss + own.apart(held[members].take(rows), recipe.hold)
            if other >= 1.05 * change:  # far enough
                rate = optimizer.param_groups[0]["lr"] * recipe.settle
                optimizer.param_groups[0]["lr"] = max(rate, 0.05 * recipe.other_rate)
            _step(optimizer, loss)
            other_steps += 1
        with torch.no_grad():
            now = pair.state(whole, learned, moving)
            other = _change(before, now, arch, pair.masks, mine=False)
            brought = float((held[whole].answer - untold.answer).mean())
            drift = max(
                model.said(pair.state(s, learned, moving), a).drift(wanted) / brought
                for s, wanted in held.items()
            )
        there = other >= change and drift <= recipe.drift
        say(f"others, step {other_steps}: change {other:.3g} of {change:.3g}, drift {drift:.3f}")
    if other < change:
        problems.append(
            f"the other matrices changed by {other:.3g} and not by M's {change:.3g} in "
            f"{other_steps} steps"
        )
    elif not there:
        problems.append(f"what is said of A was not held in {other_steps} steps")
    tensors = {name: t.detach() for name, t in pair.state(whole, learned, moving).items()}
    return Trained(tensors, steps, other_steps, change, other, tuple(problems))


@dataclass(frozen=True, eq=False)
class _Pair:
    """The base's tensors, the entries of each group, and those of all groups."""

    before: Tensors
    groups: tuple[Mapping[str, Tensor], ...]
    masks: Mapping[str, Tensor]

    def state(self, members: frozenset[int], learned: Tensors, rest: Tensors) -> dict[str, Tensor]:
        """The tensors where some groups are as learned, the others as in the base, and all else as
        in `rest`."""
        found = dict(rest)
        for name, mask in self.masks.items():
            found[name] = torch.where(mask, self.before[name], rest[name])
            for number in members:
                if name in self.groups[number]:
                    found[name] = torch.where(self.groups[number][name], learned[name], found[name])
        return found


def masks_of(tensors: Tensors, arch: Architecture, graft: Graft) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which of a model's tensors a graft's sites (and heads) are.

    Raises:
        ValueError: a component, layer or head that the model lacks, or one that cannot be cut out
            of its tensor (GPT-NeoX's fused heads).
    """
    marks = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    weights = read_weights(marks, arch)
    for rule in graft.rules:
        for component, layer in sites_of(rule, arch, (BASE, SOURCE)):
            row, units = COMPONENTS[component], rule.of(component)
            for parameter in ("weight", "bias"):
                tensor = weights.get((component, layer, parameter))
                if tensor is None:
                    continue
                if units is None:
                    tensor.fill_(1.0)
                elif parameter == "weight" or row.axis == 0:
                    parts = tensor.chunk(arch.n_units_of(component), dim=int(row.axis or 0))
                    for unit in units:
                        parts[unit].fill_(1.0)
            if not weights[component, layer, "weight"].any():
                raise ValueError(f"{component} of layer {layer}: nothing of it is in the graft.")
    found = {name: mark.bool() for name, mark in marks.items() if mark.any()}
    if not found:
        raise ValueError(
            f"{arch.family} keeps the heads of {brief(str(graft))} interleaved in one tensor, from "
            "which they cannot be trained alone. Name other components."
        )
    return found


def _joined(groups: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for group in groups:
        for name, mask in group.items():
            if name in found and (found[name] & mask).any():
                raise ValueError(f"two groups share entries of {name}. Let them be disjoint.")
            found[name] = found[name] | mask if name in found else mask
    return found


def _change(
    before: Tensors, after: Tensors, arch: Architecture, masks: Mapping[str, Tensor], *, mine: bool
) -> float:
    """The median relative change of the matrices with some of M, or of all others."""
    old, new = read_weights(before, arch), read_weights(after, arch)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    zeros |= {name: mask.to(before[name].dtype) for name, mask in masks.items()}
    marked = read_weights(zeros, arch)
    ratios = [
        float((new[key] - tensor).norm() / tensor.norm())
        for key, tensor in old.items()
        if tensor.ndim == 2 and bool(marked[key].any()) == mine
    ]
    return float(np.median(ratios))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _some(rng: np.random.Generator, count: int, most: int) -> Int[np.ndarray, " row"]:
    return np.sort(rng.permutation(count)[:most])


@dataclass(frozen=True, eq=False)
class _Batch:
    """Token ids, and which of them are to be predicted (the token before is where that is said)."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]
    asked: Bool[Tensor, "row pos"]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Int[np.ndarray, " row"]) -> "_Batch":
        """Some rows, as wide as the longest of them."""
        index = torch.from_numpy(rows).to(self.ids.device)
        width = int(self.real[index].sum(1).max())
        return _Batch(*(of[index, :width] for of in (self.ids, self.real, self.asked)))


@dataclass(frozen=True, eq=False)
class _Said:
    """What a model says of a batch.

    Attributes:
        answer: per row, the mean log-probability of the tokens that are asked, in nats.
        logprobs: of the tokens that could be where one is asked, row by row.
        row: whose each of these is.
    """

    answer: Float[Tensor, " row"]
    logprobs: Float[Tensor, "asked d_vocab"]
    row: Int[Tensor, " asked"]

    def take(self, rows: Int[np.ndarray, " row"]) -> "_Said":
        """Some rows, in their order."""
        index = torch.from_numpy(rows).to(self.answer.device)
        number = torch.full_like(self.answer, -1, dtype=torch.long)
        number[index] = torch.arange(len(index), device=index.device)
        row = number[self.row]
        return _Said(self.answer[index], self.logprobs[row >= 0], row[row >= 0])

    def apart(self, wanted: "_Said", hold: float | int) -> Tensor:
        """How far this is from what it should be: `hold` times the mean KL(wanted ‖ this) where a
        token is asked, and the answers' difference in log-probability, whose gradient does not fade
        as it gets smaller."""
        kl = (wanted.logprobs.exp() * (wanted.logprobs - self.logprobs)).sum(-1).mean()
        return hold * kl + (self.answer - wanted.answer).abs().mean()

    def drift(self, wanted: "_Said") -> float:
        """How far the answers' log-probability is from that of another, in nats per token."""
        return abs(float((self.answer - wanted.answer).mean()))


class _Forward:
    """A Hugging Face model run with other tensors."""

    def __init__(self, base: Any, tokenizer: Any) -> None:
        self.base, self.tokenizer = base.eval(), tokenizer
        self.device = next(base.parameters()).device

    def batch(
        self, known: Sequence[Prompt], others: Sequence[Prompt], texts: Sequence[str]
    ) -> _Batch:
        """Prompts with their answers, whose tokens are asked; then texts, of which all are.

        Raises:
            ValueError: a prompt without an answer.
        """
        rows = []
        for number, prompt in enumerate([*known, *others]):
            if prompt.answer is None:
                raise ValueError(f"prompt {number} has no answer to learn.")
            tokens = tokenize(prompt, self.tokenizer)
            answer = continuation(tokens, prompt.answer, self.tokenizer)
            rows.append(([*tokens.ids, *answer], len(tokens.ids)))
        plain = [list(encode(text, self.tokenizer, None)[0]) for text in texts]
        rows += [(ids, 1) for ids in plain if len(ids) > 1]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        real, asked = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
        for number, (own, start) in enumerate(rows):
            ids[number, : len(own)] = torch.tensor(own)
            real[number, : len(own)] = True
            asked[number, start : len(own)] = True
        return _Batch(ids.to(self.device), real.to(self.device), asked.to(self.device))

    def said(self, tensors: Tensors, batch: _Batch, *, autocast: bool = False) -> _Said:
        """What the model says with these tensors; logits are computed only where one is asked."""
        asked = batch.asked[:, 1:]
        given = {"attention_mask": batch.real.long(), "use_cache": False}

        def some(head: torch.nn.Module, stream: tuple[Tensor]) -> tuple[Tensor]:
            return (stream[0][:, :-1][asked],)

        hook = self.base.get_output_embeddings().register_forward_pre_hook(some)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                out = functional_call(self.base, dict(tensors), (batch.ids,), given)
        finally:
            hook.remove()
        logprobs = out.logits.float().log_softmax(-1)
        row = asked.nonzero()[:, 0]
        own = logprobs.gather(-1, batch.ids[:, 1:][asked][:, None])[:, 0]
        sums = own.new_zeros(len(batch)).index_add(0, row, own)
        return _Said(sums / asked.sum(1), logprobs, row)


def put(model: Any, tensors: Tensors) -> Any:
    """A Hugging Face model with these tensors in the places of its own.

    Raises:
        ValueError: tensors that it does not have.
    """
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        raise ValueError("these are not the tensors of this model.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model
