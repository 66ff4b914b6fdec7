"""Players for `interactions`, made from a graft that was found."""

from typing import Any

from graftlens.components import COMPONENTS, GROUPS, Component, brief, expand_components
from graftlens.graft import Graft, Rule, as_graft
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer

#: Component group -> what its part of a graft is called; all that is in none of these is `other`.
_KINDS = {"attn": "attention", "mlp": "MLP"}


def players_of(found: Any, model: GraftedTransformer | None = None) -> dict[str, Graft]:
    """A found set's parts: each of its positions × attention, MLP or other components.

    Norms, embeddings and the unembedding are `other`; norms of queries and keys are attention's.
    The parts do not overlap if the graft's rules do not.

    Args:
        found: what `localise` found, or a graft or its text.
        model: needed only where a rule names a group (`all`, `block`) that has components of
            several kinds: which ones an architecture has.

    Returns:
        Name (`last: MLP`) -> graft, in the order of the graft's rules.

    Raises:
        ValueError: what is not a graft and has none, a graft without rules, or a group of several
            kinds without a model.
    """
    held = found if isinstance(found, Graft | str) else getattr(found, "graft", found)
    graft = as_graft(held, "found")
    if not graft.rules:
        raise ValueError("found is the graft 'none', which has no parts. Give one with rules.")
    arch = None if model is None else model.arch
    parts: dict[str, list[Rule]] = {}
    for rule in graft.rules:
        for kind, components in _split(rule, arch).items():
            layers = rule.layers
            inside = [c for c in components if c in GROUPS or COMPONENTS[Component(c)].in_layers]
            # Named beside layers, what is outside of them would be an error; in a group it is not.
            kept = components if layers == ("all",) else tuple(inside)
            if not kept:
                continue
            made = Rule(rule.source, rule.at, kept, layers, rule.heads, rule.units, rule.strength)
            parts.setdefault(f"{rule.at}: {kind}", []).append(made)
    return {name: Graft(tuple(rules)) for name, rules in parts.items()}


def _split(rule: Rule, arch: Architecture | None) -> dict[str, tuple[str, ...]]:
    """Kind -> the components of a rule that are of it."""
    found: dict[str, tuple[str, ...]] = {}
    for name in rule.components:
        group = name if name in GROUPS else str(COMPONENTS[Component(name)].group)
        if name not in GROUPS or name in _KINDS or name == "ln":
            kind = _KINDS.get(group, "other")
            found[kind] = (*found.get(kind, ()), name)
            continue
        if arch is None:
            raise ValueError(
                f"rule {brief(str(rule))} names {name!r}, and which components that has is the "
                "architecture's: give the model, players_of(found, model)."
            )
        for component in expand_components((name,), arch.components, arch.family):
            kind = _KINDS.get(str(COMPONENTS[component].group), "other")
            found[kind] = (*found.get(kind, ()), str(component))
    return {k: tuple(dict.fromkeys(found[k])) for k in (*_KINDS.values(), "other") if k in found}
