"""The sequential algorithm of arXiv 2506.20746, kept slow and plain as an oracle for the fast one.

A copy of the base model reads the prompt token by token with its own key-value cache, and before
each token its real parameters are overwritten with those of the chosen sources. Nothing here knows
how graftlens computes a grafted pass.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, overload

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# A source, or sources with their shares: then the weights are mixed.
Chosen = str | dict[str, float] | dict[str, Fraction]
# (component, layer, position, unit) -> what it uses. The layer is None for the components outside
# the layers; the unit is a head of q, k, v and o, with `neurons` a neuron of the MLP's maps, and
# None for every other component.
Choose = Callable[[str, int | None, int, int | None], Chosen]

MODEL_COMPONENTS = ("embed", "pos_embed", "ln_final", "unembed")
HEAD_COMPONENTS = ("q", "k", "v", "o")
NEURON_COMPONENTS = ("mlp_in", "mlp_gate", "mlp_out")
LAYER_COMPONENTS = (
    *("ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "mlp_gate", "mlp_in", "mlp_out", "ln2_post"),
)

_GATED_MLP = {
    "mlp_in": "mlp.up_proj",
    "mlp_gate": "mlp.gate_proj",
    "mlp_out": "mlp.down_proj",
}
_SEPARATE_QKV = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_PRE_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_PRE_AND_POST_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_POST_NORMS = {
    "ln1_post": "post_attention_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_LLAMA_LIKE = {**_PRE_NORMS, **_SEPARATE_QKV, **_GATED_MLP}
_GEMMA_LIKE = {**_PRE_AND_POST_NORMS, **_SEPARATE_QKV, **_GATED_MLP}

# The module that holds each component's parameters, relative to its layer. Fused modules stand
# under each of the components they hold; what a family may lack (q_norm) is skipped if absent.
_MODULES: dict[str, dict[str, str]] = {
    "gpt2": {
        "ln1": "ln_1",
        **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
        "o": "attn.c_proj",
        "ln2": "ln_2",
        "mlp_in": "mlp.c_fc",
        "mlp_out": "mlp.c_proj",
    },
    "gpt_neox": {
        **_PRE_NORMS,
        **dict.fromkeys(("q", "k", "v"), "attention.query_key_value"),
        "o": "attention.dense",
        "mlp_in": "mlp.dense_h_to_4h",
        "mlp_out": "mlp.dense_4h_to_h",
    },
    "phi3": {
        **_PRE_NORMS,
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
        **dict.fromkeys(("mlp_in", "mlp_gate"), "mlp.gate_up_proj"),
        "mlp_out": "mlp.down_proj",
    },
    **dict.fromkeys(("llama", "mistral", "gemma", "olmo", "qwen2", "qwen3"), _LLAMA_LIKE),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_LIKE),
    "olmo2": {**_POST_NORMS, **_SEPARATE_QKV, **_GATED_MLP},
}


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers


def _final_norm(model: PreTrainedModel) -> nn.Module:
    name = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(model.config.model_type, "norm")
    return model.base_model.get_submodule(name)


def _d_head(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def n_heads_of(model: PreTrainedModel, component: str) -> int | None:
    """How many heads `choose` is asked about: key-value heads for k and v, None if not by head."""
    config = model.config
    if component not in HEAD_COMPONENTS:
        return None
    if component in ("k", "v"):
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_attention_heads


def n_neurons(model: PreTrainedModel) -> int:
    """The width of the MLP."""
    config = model.config
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.n_embd
    return config.intermediate_size


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Views of a module's parameters, the weight as [out, in] whatever the layout it is kept in."""
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    if isinstance(module, Conv1D):
        weight = weight.T
    return weight, bias


def _first_row(model: PreTrainedModel, component: str, head: int) -> int:
    """Where one head's rows begin in the module that makes queries, keys or values."""
    d_head = _d_head(model)
    queries = n_heads_of(model, "q") * d_head
    keys = n_heads_of(model, "k") * d_head
    which = ("q", "k", "v").index(component)
    match model.config.model_type:
        case "gpt_neox":  # head by head: its query rows, its key rows, its value rows
            return (3 * head + which) * d_head
        case "gpt2" | "phi3":  # all query heads, then all key heads, then all value heads
            return (0, queries, queries + keys)[which] + head * d_head
        case _:
            return head * d_head


def _parts(
    model: PreTrainedModel, component: str, layer: int | None, unit: int | None
) -> list[Tensor]:
    """Views of the parameters that a component (one head or neuron of it) owns; writing to them
    swaps it.

    A bias of o, and of mlp_out's neurons, is no unit's own and is handled apart.
    """
    if component in MODEL_COMPONENTS:
        assert layer is None
        assert unit is None
        if component == "pos_embed":
            return [model.base_model.wpe.weight] if model.config.model_type == "gpt2" else []
        module = {
            "embed": model.get_input_embeddings,
            "unembed": model.get_output_embeddings,
            "ln_final": lambda: _final_norm(model),
        }[component]()
        return list(module.parameters())

    assert layer is not None
    path = _MODULES[model.config.model_type].get(component)
    if path is None:
        return []
    try:
        module = _layers(model)[layer].get_submodule(path)
    except AttributeError:  # no q_norm or k_norm in this family
        return []
    if component in HEAD_COMPONENTS:
        assert unit is not None
        weight, bias = _weight_and_bias(module)
        if component == "o":
            return [weight[:, unit * _d_head(model) : (unit + 1) * _d_head(model)]]
        start = _first_row(model, component, unit)
        rows = slice(start, start + _d_head(model))
        return [weight[rows]] + ([] if bias is None else [bias[rows]])
    if component in NEURON_COMPONENTS:
        weight, bias = _weight_and_bias(module)
        if path == "mlp.gate_up_proj":
            d_mlp = model.config.intermediate_size
            first = 0 if component == "mlp_gate" else d_mlp
            weight = weight[first : first + d_mlp]
        if unit is not None and component == "mlp_out":
            return [weight[:, unit]]
        kept = [weight] + ([] if bias is None else [bias])
        return kept if unit is None else [part[unit] for part in kept]
    assert unit is None
    return list(module.parameters())


def components_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The components that have parameters in this model, in the order of the forward pass."""
    inside = [
        component
        for component in LAYER_COMPONENTS
        if _parts(model, component, 0, 0 if component in HEAD_COMPONENTS else None)
    ]
    outside = [component for component in MODEL_COMPONENTS if _parts(model, component, None, None)]
    before = [component for component in outside if component in ("embed", "pos_embed")]
    after = [component for component in outside if component in ("ln_final", "unembed")]
    return (*before, *inside, *after)


def _untie(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


class _WholePromptRotary(nn.Module):
    """Rotary tables of the whole prompt, row by row.

    Some scalings (longrope, dynamic) choose their frequencies by the sequence's length. Read token
    by token they would change them on the way; a full forward pass uses one choice throughout.
    """

    def __init__(self, rotary: nn.Module, n_tokens: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions = torch.arange(n_tokens)[None]

    def forward(self, x: Tensor, position_ids: Tensor, *layer_type: str) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, self.positions, *layer_type)
        return cos[:, position_ids[0]], sin[:, position_ids[0]]


def _bias(model: PreTrainedModel, component: str, layer: int) -> Tensor | None:
    """The bias of o or mlp_out, which is no unit's own."""
    path = _MODULES[model.config.model_type][component]
    return _layers(model)[layer].get_submodule(path).bias


# A parameter of the running copy, and what each source has in its place.
Parameter = tuple[Tensor, dict[str, Tensor]]


def _n_tokens(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _with_all_rows(runner: PreTrainedModel, models: dict[str, PreTrainedModel]) -> None:
    """Make room for the largest of the sources' vocabularies."""
    size = max(map(_n_tokens, models.values()))
    for module in (runner.get_input_embeddings(), runner.get_output_embeddings()):
        missing = size - len(module.weight)
        if missing:
            more = torch.full((missing, module.weight.shape[1]), torch.nan)
            whole = torch.cat([module.weight.detach(), more])
            module.weight = nn.Parameter(whole, requires_grad=False)


def _with_all_biases(models: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Copies in which a bias that only some of the models have is zero in the others."""
    biased = {
        name
        for model in models.values()
        for name, module in model.named_modules()
        if getattr(module, "bias", None) is not None
    }
    lacking = {
        source: [n for n in biased if model.get_submodule(n).bias is None]
        for source, model in models.items()
    }
    if not any(lacking.values()):
        return models
    made = copy.deepcopy(models)
    for source, names in lacking.items():
        for name in names:
            module = made[source].get_submodule(name)
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]), requires_grad=False)
    return made


def _own_tables(models: dict[str, PreTrainedModel]) -> bool:
    """Whether the sources' rotary tables may differ."""
    settings = [
        (getattr(m.config, "rope_parameters", None), m.config.max_position_embeddings)
        for m in models.values()
    ]
    return any(one != settings[0] for one in settings)


@contextmanager
def _turned_by_source(
    runner: PreTrainedModel, models: dict[str, PreTrainedModel], choose: Choose, n_tokens: int
) -> Iterator[list[int]]:
    """Each head of q and of k is turned by its own source's table; yields where to put the
    position of the token that is run."""
    tables = {
        name: _WholePromptRotary(model.base_model.rotary_emb, n_tokens)
        for name, model in models.items()
    }
    position, now = [0], [0]
    module = sys.modules[type(runner).__module__]
    original = module.apply_rotary_pos_emb
    kinds = getattr(runner.config, "layer_types", None)
    typed = runner.config.model_type == "gemma3_text"

    def one_head(component: str, x: Tensor, head: int) -> Tensor:
        chosen = choose(component, now[0], position[0], head)
        source = chosen if isinstance(chosen, str) else next(n for n, s in chosen.items() if s)
        kind = (kinds[now[0]],) if typed else ()
        cos, sin = tables[source](x, torch.tensor([[position[0]]]), *kind)
        mine = x[:, head : head + 1]
        return original(mine, mine, cos, sin)[0]

    def turned(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            torch.cat([one_head(c, x, head) for head in range(x.shape[1])], dim=1)
            for c, x in (("q", q), ("k", k))
        ]
        return parts[0], parts[1]

    for index, layer in enumerate(_layers(runner)):
        layer.register_forward_pre_hook(lambda *_, index=index: now.__setitem__(0, index))
    module.apply_rotary_pos_emb = turned
    try:
        yield position
    finally:
        module.apply_rotary_pos_emb = original


@dataclass
class _Site:
    """A component in a layer: what is overwritten there before a token."""

    component: str
    layer: int | None
    #: Unit -> its parameters; a component that is not cut has the one unit None.
    units: dict[int | None, list[Parameter]]
    #: The bias that is no unit's own.
    bias: Parameter | None
    #: Unit -> what is written there now; for the bias, the key is "bias".
    written: dict[int | str | None, Chosen] = field(default_factory=dict)

    def put(self, unit: int | str | None, chosen: Chosen, parameters: list[Parameter]) -> None:
        """Overwrite parameters with a source's or a mixture's, unless they hold it already."""
        if unit in self.written and self.written[unit] == chosen:
            return
        self.written[unit] = chosen if isinstance(chosen, str) else dict(chosen)  # type: ignore[assignment]
        for target, theirs in parameters:
            mixture = {chosen: 1.0} if isinstance(chosen, str) else chosen
            used = {name: float(share) for name, share in mixture.items() if share}
            if target.ndim:
                # A table over the vocabulary may have fewer rows: the others are never read.
                rows = min(len(theirs[name]) for name in used)
                target[:rows].copy_(sum(share * theirs[n][:rows] for n, share in used.items()))
            else:
                target.copy_(sum(share * theirs[name] for name, share in used.items()))


def _sites(
    runner: PreTrainedModel, models: dict[str, PreTrainedModel], neurons: bool
) -> list[_Site]:
    """All that is overwritten in the running copy."""
    sites = []
    for component in components_of(runner):
        n_units = n_heads_of(runner, component)
        if neurons and component in NEURON_COMPONENTS:
            n_units = n_neurons(runner)
        for layer in [None] if component in MODEL_COMPONENTS else range(len(_layers(runner))):
            units: dict[int | None, list[Parameter]] = {}
            for unit in [None] if n_units is None else range(n_units):
                theirs = {name: _parts(m, component, layer, unit) for name, m in models.items()}
                units[unit] = [
                    (target, {name: parts[number] for name, parts in theirs.items()})
                    for number, target in enumerate(_parts(runner, component, layer, unit))
                ]
            bias = None
            if component in ("o", "mlp_out") and n_units is not None:
                target = _bias(runner, component, layer)
                if target is not None:
                    bias = target, {n: _bias(m, component, layer) for n, m in models.items()}
            sites.append(_Site(component, layer, units, bias))
    return sites


def _overwrite(
    sites: list[_Site], base: str, choose: Choose, position: int, bias: Choose | None
) -> None:
    """Give the running copy the parameters chosen for one token."""
    for site in sites:
        choices: list[Chosen] = []
        for unit, parameters in site.units.items():
            choices.append(choose(site.component, site.layer, position, unit))
            site.put(unit, choices[-1], parameters)
        if site.bias is not None:
            agree = all(chosen == choices[0] for chosen in choices)
            own = choices[0] if agree else base
            own = own if bias is None else bias(site.component, site.layer, position, None)
            site.put("bias", own, [site.bias])


@overload
def sequential_graft(
    models: dict[str, PreTrainedModel],
    tokens: list[int],
    choose: Choose,
    hidden: Literal[False] = False,
    neurons: bool = False,
    bias: Choose | None = None,
) -> Tensor: ...


@overload
def sequential_graft(
    models: dict[str, PreTrainedModel],
    tokens: list[int],
    choose: Choose,
    hidden: Literal[True],
    neurons: bool = False,
    bias: Choose | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def sequential_graft(
    models: dict[str, PreTrainedModel],
    tokens: list[int],
    choose: Choose,
    hidden: bool = False,
    neurons: bool = False,
    bias: Choose | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits [pos, d_vocab] of a prompt, every parameter chosen per token; the first model is base.

    With `neurons`, `choose` is asked about each neuron of the MLP's maps; else about the maps.
    `bias` is asked about a bias that belongs to no unit; without it, what all units agree on.
    Sources may differ in their rotary tables, biases and vocabularies: a token that a source lacks
    has the logit -inf where it unembeds.
    With `hidden`, also the residual stream [layer + 1, pos, d_model]: what enters each layer, and
    what leaves the last one before the final norm.
    """
    models = _with_all_biases(models)
    runner = copy.deepcopy(next(iter(models.values()))).eval()
    _untie(runner)
    _with_all_rows(runner, models)
    if hasattr(runner.base_model, "rotary_emb"):
        rotary = _WholePromptRotary(runner.base_model.rotary_emb, len(tokens))
        runner.base_model.rotary_emb = rotary

    residuals: list[list[Tensor]] = [[] for _ in range(len(_layers(runner)) + 1)]
    for index, layer in enumerate(_layers(runner)):
        layer.register_forward_pre_hook(
            lambda _, args, index=index: residuals[index].append(args[0][0, 0].clone())
        )
    _layers(runner)[-1].register_forward_hook(
        lambda _, args, output: residuals[-1].append(output[0, 0].clone())
    )

    sites = _sites(runner, models, neurons)
    cache = DynamicCache(config=runner.config)
    logits = []
    with ExitStack() as stack:
        turned = [0]
        if _own_tables(models):
            turned = stack.enter_context(_turned_by_source(runner, models, choose, len(tokens)))
        for position, token in enumerate(tokens):
            turned[0] = position
            _overwrite(sites, next(iter(models)), choose, position, bias)
            output = runner(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            row = output.logits[0, 0]
            chosen = choose("unembed", None, position, None)
            used = [chosen] if isinstance(chosen, str) else [n for n, s in chosen.items() if s]
            row[min(_n_tokens(models[name]) for name in used) :] = -torch.inf
            logits.append(row)
    if hidden:
        return torch.stack(logits), torch.stack([torch.stack(layer) for layer in residuals])
    return torch.stack(logits)
