"""Sources made of others: their tensors, and what they add in factors, from those of their parts.

What a part has in factors stays in factors, and so do single directions: the matrix is the base's,
which all of them share. The directions that remain when the first ones are taken away are the
part's own matrix minus those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.model.additions import Addition
from graftlens.model.arch import Architecture, PairError, Site
from graftlens.model.differences import MADE_OF, told
from graftlens.model.directions import Decomposed, is_same
from graftlens.model.made import Made, in_order
from graftlens.model.rotary import Rotary
from graftlens.model.source import Logits, Source, evaluating, language_model
from graftlens.model.weights import Weights, state_of


def with_made(read: Sequence[Source], sources: Mapping[str, Any]) -> list[Source]:
    """All sources in their order: those that were read, and those made of them.

    Args:
        read: the sources that were read, the base first; they make a pair.
        sources: name -> what was given; each `Made` among them is made.

    Raises:
        PairError: parts that differ from the base in their rotary tables or vocabularies; ranks or
            directions beyond those of the matrices.
    """
    made = {name: value for name, value in sources.items() if isinstance(value, Made)}
    base = read[0]
    known = {source.name: source for source in read}
    refuse_unlike(made, known, base.name)
    needs: dict[str, int] = {}
    for value in made.values():
        for part in value.parts:
            needs[part] = max(needs.get(part, 0), value.needs)
    decomposed = Decomposed(base, needs)
    for name in in_order(made):
        known[name] = _make(name, made[name], base, known, decomposed)
    return [known[name] for name in sources]


def refuse_unlike(
    made: Mapping[str, Made],
    known: Mapping[str, Source],
    base: str,
    sizes: Mapping[str, int] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Refuse what is made of sources whose differences from the base are not those of weights.

    Args:
        made: the sources that are made of others.
        known: the sources that were read, or their configs were.
        base: the base's name.
        sizes: how many tokens sources that are not `known` have.
        ranks: the largest rank that a source can change a matrix by, where it is below that of the
            matrices.

    Raises:
        PairError: parts that differ from the base in their rotary tables or vocabularies, or a rank
            or direction that no matrix has.
    """
    first = known[base]
    tokens = {name: source.arch.d_vocab for name, source in known.items()} | dict(sizes or {})
    top = largest_rank(first.arch)
    most = dict(ranks or {})
    for name in in_order(made):
        value = made[name]
        own = [min(top, most.get(part, top)) for part in value.parts]
        if why := value.beyond(own[0]):
            raise PairError(f"source {name!r}: {why}")
        most[name] = sum(own) if value.shares is not None else len(value.taken(own[0]))
        for part in value.parts:
            if tokens.get(part, first.arch.d_vocab) != first.arch.d_vocab:
                raise PairError(
                    f"source {name!r} is made of {part!r}, whose vocabulary has {tokens[part]} "
                    f"tokens; that of {base!r} has {first.arch.d_vocab}. A source can be made of "
                    "those that have the base's vocabulary."
                )
            other = known.get(part)
            if other is None or other.rotary is None or first.rotary is None:
                continue
            tables = Rotary([(first.rotary, first.arch), (other.rotary, other.arch)])
            if tables.slots[0] != tables.slots[1]:
                raise PairError(
                    f"source {name!r} is made of {part!r}, whose rotary tables are not those of "
                    f"{base!r}: a mixture of weights has no table. A source can be made of those "
                    "that have the base's tables."
                )


def largest_rank(arch: Architecture) -> int:
    """The largest rank that a matrix of this architecture can have."""
    shapes = (arch.shape_of(component) for component in arch.components)
    return max(min(shape) for shape in shapes if len(shape) == 2)


def _make(
    name: str, made: Made, base: Source, known: Mapping[str, Source], decomposed: Decomposed
) -> Source:
    parts = [known[part] for part in made.parts]
    if made.shares is not None:
        weights, additions = _summed(base, list(zip(parts, made.shares, strict=True)))
    else:
        weights, additions = _cut(name, made, base, parts[0], decomposed)
    first = parts[0]
    dtypes = {d for source in (base, *parts) for d in source.dtypes}
    dtypes |= {t.dtype for s in (base, *parts) if not s.dtypes for t in s.weights.values()}
    done = made.told(base.name)
    return replace(
        first,
        name=name,
        origin=str(made),
        weights=weights,
        additions=additions,
        tokenizer=None,
        dtypes=tuple(sorted(dtypes, key=str)),
        hooks=(),
        prove=None,
        merged="",
        notes=(told(MADE_OF, name, None, str(made), "converted", done),),
        logits=_logits((base, *parts), weights, additions),
        model=None,
        made=made,
    )


def _summed(
    base: Source, parts: Sequence[tuple[Source, float]]
) -> tuple[Weights, dict[Site, tuple[Addition, ...]]]:
    """The base plus shares of the differences from it."""
    weights: Weights = {}
    for site, old in base.weights.items():
        theirs = [(part.weights[site], share) for part, share in parts]
        own = [(tensor, share) for tensor, share in theirs if share and not is_same(tensor, old)]
        if not own:
            weights[site] = old
        elif len(own) == 1 and own[0][1] == 1:
            weights[site] = own[0][0]
        else:
            total = old.double()
            for tensor, share in own:
                total = total + share * (tensor.double() - old.double())
            weights[site] = total.to(torch.promote_types(old.dtype, torch.float32))
    additions: dict[Site, tuple[Addition, ...]] = {}
    for part, share in parts:
        for place, added in part.additions.items() if share else ():
            more = tuple(one.times(share) for one in added)
            additions[place] = (*additions.get(place, ()), *more)
    return weights, additions


def _cut(
    name: str, made: Made, base: Source, part: Source, decomposed: Decomposed
) -> tuple[Weights, dict[Site, tuple[Addition, ...]]]:
    """The base plus some directions of one source's differences from it."""
    places = [
        (c, l) for c, l, p in base.weights if p == "weight" and base.weights[c, l, p].ndim == 2
    ]
    ranks = {place: decomposed.rank(part, place) for place in places}
    if why := made.beyond(max(ranks.values(), default=0)):
        raise PairError(f"source {name!r}: {why}")
    chosen = part if made.has_vectors else base
    weights: Weights = {site: chosen.weights[site] for site in base.weights}
    additions: dict[Site, tuple[Addition, ...]] = {}
    for place, rank in ranks.items():
        site = (*place, "weight")
        old, new = base.weights[site], part.weights[site]
        weights[site] = old
        taken = made.taken(rank)
        if not taken:
            continue
        if made.is_rest and not is_same(new, old):
            # Too many to be kept in factors: the whole, minus the few that are left out.
            weights[site] = new
            out = decomposed.of(part, place).addition(range(made.needs), -1.0)
            additions[place] = (*part.additions.get(place, ()), out)
        else:
            additions[place] = (decomposed.of(part, place).addition(taken),)
    return weights, additions


def _logits(
    sources: Sequence[Source], weights: Weights, additions: Mapping[Site, Sequence[Addition]]
) -> Logits | None:
    """The forward pass of a Hugging Face model of one of the sources, with these tensors in the
    places of its own; None where there is none."""
    arch = sources[0].arch
    names = state_of(weights, arch).keys()
    models = (language_model(s.model) for s in sources if s.model is not None)
    model = next((m for m in models if names <= m.state_dict().keys()), None)
    if model is None:
        return None

    @torch.no_grad()
    def logits(
        tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch pos d_vocab"]:
        whole = dict(weights)
        for (component, layer), added in additions.items():
            tensor = whole[component, layer, "weight"]
            wide = torch.promote_types(tensor.dtype, torch.float32)
            for one in added:
                tensor = one.added_to(tensor.to(wide))
            whole[component, layer, "weight"] = tensor
        state = {name: tensor.to(dtype) for name, tensor in state_of(whole, arch).items()}
        given = {"input_ids": tokens.to(next(iter(state.values())).device), "use_cache": False}
        with evaluating(model):
            out = torch.func.functional_call(model, state, (), given, tie_weights=False)
        return out.logits.to(tokens.device)

    return logits
