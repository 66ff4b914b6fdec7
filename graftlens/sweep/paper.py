"""The grafts that equal those of the code that was published with the paper (arXiv 2506.20746).

They differ from what the paper's words, and `graftlens.position_grafts`, say:

- Grafting a token replaces its embedding and the parts of all layers, and neither the final norm
  nor learned positions. A Hugging Face model with tied embeddings has one tensor as embedding and
  unembedding, so that the token is read out with the finetuned unembedding, too; without, it is
  the pretrained one. So LT is `embed + unembed + block` where embeddings are tied, else
  `embed + block`.
- The embedding goes along whatever the layers are.
- Quarters are `n // 4` layers long, and the last one takes what is left. Of the eighths, the third
  is empty, so that nothing at all is grafted, and the seventh and eighth have no name. The upper
  half begins where the third quarter does.
- The hybrid's feed-forward network lacks the gate.
- `patch_lm_head: last_token` does nothing: it is the same as `never`. (`always` applies the
  finetuned final norm to a residual stream that was already normed; that is not a graft.)
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from graftlens.components import suggest
from graftlens.graft import Graft
from graftlens.model.arch import Architecture
from graftlens.model.grafted import GraftedTransformer

Kind = Literal["positions", "components", "quarters", "eighths", "hybrid"]

#: Component grafts at the last token, by the names of `experiments/components.yaml`.
_COMPONENTS: Mapping[str, str] = {
    "Attn": "q + k + v",
    "Attn+O": "q + k + v + o",
    "O": "o",
    "FFN": "mlp",
    "O+FFN": "o + mlp",
    "O+FFN-up": "o + mlp_in",
    "O+FFN-down": "o + mlp_out",
    "Attn+FFN": "q + k + v + mlp",
    "Attn+O+FFN": "q + k + v + o + mlp",
}

_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth")


def paper_grafts(
    model: GraftedTransformer,
    kind: str = "positions",
    *,
    source: str = "sft",
    entity: str = "first_entity",
) -> dict[str, Graft]:
    """The grafts that equal those of the paper's published code, as `graftlens.sweep.paper` says.

    Args:
        model: says how many layers there are, and whether the base's embeddings are tied.
        kind: `positions`: PRE, SFT, FE, LT, both, their complements; `components` at the last
            token; `quarters` and `eighths` of the layers at FE, LT and both; `hybrid` of the
            sources `task` and `relation`.
        source: the finetuned source (a hybrid has its own two).
        entity: the span of the entity that the prompt names.

    Raises:
        ValueError: an unknown kind.
    """
    config = model.hf_configs[model.sources[0]]
    if config is None:  # a HookedTransformer's weights are two tensors
        tied = model.embed.W_E.T.equal(model.unembed.W_U)
    else:
        tied = bool(getattr(config, "tie_word_embeddings", False))
    return published(checked_kind(kind), model.arch, tied, source, entity)


def checked_kind(kind: Any) -> str:
    """The kind of published grafts, if it is one.

    Raises:
        ValueError: it is not.
    """
    kinds = get_args(Kind)
    if kind not in kinds:
        hint = suggest(kind, kinds) if isinstance(kind, str) else ""
        raise ValueError(f"kind={kind!r} is unknown. Allowed: {' '.join(kinds)}.{hint}")
    return str(kind)


def published(
    kind: str, arch: Architecture | None, tied: bool, source: str, entity: str = "first_entity"
) -> dict[str, Graft]:
    """The grafts of a kind for an architecture; without one, their names and sources alone hold."""
    n_layers = 4 if arch is None else arch.n_layers
    outside = "embed + unembed" if tied else "embed"
    full = {"PRE": Graft(), "SFT": Graft.rule(source)}
    places = {"FE": entity, "LT": "last", "FE+LT": f"{entity} + last"}
    if kind == "positions":
        places |= {
            "(FE+LT)^C": f"~({entity} + last)",
            "not-FE": f"~{entity}",
            "not-LT": "~last",
        }
        whole = f"{outside} + block"
        return full | {name: Graft.rule(source, at, whole) for name, at in places.items()}
    if kind == "components":
        return full | {
            name: Graft.rule(source, "last", components) for name, components in _COMPONENTS.items()
        }
    if kind == "hybrid":
        return _hybrid(n_layers, entity)
    return full | {
        f"{name}, {ordinal} {kind.removesuffix('s')}": Graft()
        if not layers
        else Graft.rule(source, at, outside) | Graft.rule(source, at, "block", layers)
        for name, at in places.items()
        for ordinal, layers in zip(_ORDER, _LAYERS[kind](n_layers), strict=False)
    }


def _hybrid(n_layers: int, entity: str) -> dict[str, Graft]:
    """Task attention at FE and LT, relation O and FFN without the gate at LT in the upper half."""
    upper = range(2 * (n_layers // 4), n_layers)
    task = Graft.rule("task", f"{entity} + last", "q + k + v")
    relation = Graft.rule("relation", "last", "o + mlp_in + mlp_out", upper)
    return {
        "PRE": Graft(),
        "TASK": Graft.rule("task"),
        "RELATION": Graft.rule("relation"),
        "hybrid": task | relation,
        "task half alone": task,
        "relation half alone": relation,
    }


def _quarters(n: int) -> list[range]:
    q = n // 4
    return [range(q), range(q, 2 * q), range(2 * q, 3 * q), range(3 * q, n)]


def _eighths(n: int) -> list[range]:
    q = n // 4
    return [
        range(q // 2),
        range(q // 2, q),
        range(0),  # its bounds are the wrong way round there: it begins at 2 q
        range(3 * q // 2, 2 * q),
        range(2 * q, 5 * q // 2),
        range(5 * q // 2, 3 * q),
    ]


_LAYERS = {"quarters": _quarters, "eighths": _eighths}
