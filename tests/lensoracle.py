"""What the lens should say, worked out on Hugging Face's own modules.

PRE and SFT are the models' own forwards, a grafted run is the sequential algorithm; all are watched
by hooks on Hugging Face's modules. A graft's text is read here a second time, and every formula is
written in the direction of the forward pass. Nothing here imports what it is an oracle for.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import positions
import pytest
import reference
import torch
from conftest import MakeTiny, Tiny
from reference import Choose, components_of, n_heads_of, sequential_graft
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlens.prompts import Prompt

#: What the lens calls the two runs that it always makes -> their grafts as text.
ENDS = {"PRE": "none", "SFT": "sft @ all"}

#: Three lengths, one with a span that occurs twice.
PROMPTS = (
    Prompt("{first_entity} met", {"first_entity": "Ann"}, " Robert", (" the", " with", "!")),
    Prompt("In {title} with {first_entity}!", {"title": "It", "first_entity": "Bo"}, " the"),
    Prompt(
        "{first_entity} and {friend}, {first_entity}",
        {"first_entity": "Zo", "friend": "Al"},
        " with",
        (" The", "."),
    ),
)


#: variant -> tokenizer. Each norm, each way of fusing, windows, caps, a clip and tied embeddings.
FAMILIES = {
    "gpt2": "gpt2",
    "neox-parallel": "gpt2",
    "llama-biased": "llama3",
    "mistral-window": "gpt2",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "olmo-clip": "gpt2",
    "olmo2": "gpt2",
    "qwen3": "llama3",
    "phi3-longrope": "sentencepiece",
}

#: The others run with the slow tests.
QUICK = ("gpt2", "llama-biased", "gemma2")


def variants(names: Iterable[str], *rest: object) -> list[Any]:
    """Parameters of a test: a variant and what else it takes; all but a few variants are slow."""
    return [
        pytest.param(name, *rest, marks=() if name in QUICK else pytest.mark.slow) for name in names
    ]


#: By components, heads and layers. At the last position o is sft's, sft's in two heads, and pre's,
#: by layer; norm and unembedding are of either source, in all four pairs.
MIXED = (
    "sft @ first_entity : attn + mlp + embed | sft @ last : o : 0 | sft @ last : o : 1 : 1,3 "
    "| sft @ [2] : o : 1 : 0,2 | sft @ last : mlp_out + v | sft @ [1] : mlp_in + k "
    "| sft @ [0] : v : all : 0 | sft @ [1, 2, -1] : unembed"
)
_NORMS = " | sft @ last : ln | sft @ [0, 1, -1] : ln_final"


def mixed(variant: str) -> str:
    """A graft of many parts; OLMo's norms have no weights, so there is nothing of them to graft."""
    return MIXED if variant.startswith("olmo-") else MIXED + _NORMS


# --- Grafts, read a second time ------------------------------------------------------------------

_GROUPS = {
    "attn": {"q", "k", "v", "o", "q_norm", "k_norm"},
    "mlp": {"mlp_in", "mlp_gate", "mlp_out"},
    "ln": {"ln1", "ln2", "ln1_post", "ln2_post"},
}


def _numbers(text: str) -> set[int] | None:
    if text == "all":
        return None
    found: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def chooser(text: str, spans: positions.Spans, length: int, base: str = "pre") -> Choose:
    """A graft's text as a function of the site; grafts of this file's tests only."""
    rules = []
    for piece in () if text == "none" else text.split("|"):
        source, rest = piece.split("@")
        at, components, layers, heads = ([f.strip() for f in rest.split(":")] + ["all"] * 3)[:4]
        named: set[str] = set()
        for name in components.split("+"):
            named |= _GROUPS.get(name.strip(), {name.strip()})
        where = positions.evaluate(at, spans, length)
        rules.append((source.strip(), where, named, _numbers(layers), _numbers(heads)))

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        found = base
        for source, where, named, layers, heads in rules:
            if (
                position in where
                and ("all" in named or component in named)
                and (layers is None or layer in layers)
                and (heads is None or head in heads)
            ):
                found = source
        return found

    return choose


# --- Hugging Face's modules ----------------------------------------------------------------------


def n_layers(model: PreTrainedModel) -> int:
    """How many layers a model has."""
    return len(reference._layers(model))


def module(model: PreTrainedModel, component: str, layer: int | None) -> nn.Module | None:
    """The module that computes a component (with others, where it is fused), None without one."""
    if layer is None:
        return {
            "embed": model.get_input_embeddings,
            "pos_embed": lambda: getattr(model.base_model, "wpe", None),
            "ln_final": lambda: reference._final_norm(model),
            "unembed": model.get_output_embeddings,
        }[component]()
    path = reference._MODULES[model.config.model_type].get(component)
    block = reference._layers(model)[layer]
    return dict(block.named_modules()).get(path) if path else None


def columns(model: PreTrainedModel, component: str, head: int | None) -> slice:
    """Where a component (one head of q, k or v) lies in its module's output."""
    if component in ("q", "k", "v"):
        assert head is not None
        start = reference._first_row(model, component, head)
        return slice(start, start + reference._d_head(model))
    if component in ("mlp_in", "mlp_gate") and model.config.model_type == "phi3":
        width = model.config.intermediate_size
        return slice(0, width) if component == "mlp_gate" else slice(width, 2 * width)
    return slice(None)


def out_weight(model: PreTrainedModel, layer: int, head: int) -> Tensor:
    """One head's part of the attention's output map, [d_model, d_head]."""
    (weight,) = reference._parts(model, "o", layer, head)
    return weight


def out_bias(model: PreTrainedModel, layer: int) -> Tensor | None:
    """The output map's bias."""
    found = module(model, "o", layer)
    return getattr(found, "bias", None)


def _child(block: nn.Module, *names: str) -> nn.Module:
    return next(getattr(block, name) for name in names if hasattr(block, name))


def frozen(norm: nn.Module, family: str, at: Tensor) -> Callable[[Tensor], Tensor]:
    """A norm whose scale is held at what it is for `at` [d_model]: affine in what it is given."""
    centred = family in ("gpt2", "gpt_neox", "olmo")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5))
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    gain = 1.0 if weight is None else weight + (1.0 if family.startswith("gemma") else 0.0)

    def deviation(x: Tensor) -> Tensor:
        return x - x.mean() if centred else x

    scale = (deviation(at).pow(2).mean() + eps).sqrt()

    def apply(x: Tensor) -> Tensor:
        return deviation(x) / scale * gain + (0.0 if bias is None else bias)

    torch.testing.assert_close(apply(at), norm(at), rtol=1e-4, atol=1e-5)
    return apply


# --- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of one prompt: what Hugging Face's modules were given and gave.

    Attributes:
        logits: [pos, d_vocab].
        resid: [layer + 1, pos, d_model], before each layer and before the final norm.
        mid: [layer, pos, d_model], what the MLP's side reads (before its norm).
        attn, mlp: [layer, pos, d_model], what is added to the residual stream.
        out: [layer, pos, d_model], the attention's output map's own output, before any norm on it.
        z: [layer, pos, head, d_head], that map's input.
        v: [layer, pos, kv_head, d_head], the values that are read (clipped where they are).
        pattern: [layer, head, query, key].
        embed: [pos, d_model]; pos_embed: likewise, or None.
    """

    logits: Tensor
    resid: Tensor
    mid: Tensor
    attn: Tensor
    mlp: Tensor
    out: Tensor
    z: Tensor
    v: Tensor
    pattern: Tensor
    embed: Tensor
    pos_embed: Tensor | None


class Watched:
    """Records what a model's modules do, in one pass or token by token."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Hooks a copy of `model`, kept in `self.model`; copies of it record here too."""
        self.model = copy.deepcopy(model)
        self.seen: dict[tuple[str, int | None], list[Tensor]] = {}
        for layer, block in enumerate(reference._layers(self.model)):
            attention = _child(block, "attn", "attention", "self_attn")
            post = module(self.model, "ln1_post", layer)
            self._out("attn", layer, post or attention)
            self._out("mlp", layer, module(self.model, "ln2_post", layer) or block.mlp)
            self._out("v", layer, module(self.model, "v", layer))
            self._out("out", layer, module(self.model, "o", layer))
            self._in("z", layer, module(self.model, "o", layer))
            self._in("resid", layer, block)
            # Where no norm stands before the MLP, it reads the stream itself.
            self._in("mid", layer, module(self.model, "ln2", layer) or block.mlp)
            attention.register_forward_hook(
                lambda m, args, out, l=layer: self._keep("pattern", l, out[1][0].transpose(0, 1))
            )
        self._in("resid", None, reference._final_norm(self.model))
        self._out("pos_embed", None, module(self.model, "pos_embed", None))

    def _keep(self, name: str, layer: int | None, x: Tensor) -> None:
        self.seen.setdefault((name, layer), []).append(x.detach().clone())

    def _in(self, name: str, layer: int | None, part: nn.Module | None) -> None:
        assert part is not None
        part.register_forward_pre_hook(lambda m, args: self._keep(name, layer, args[0][0]))

    def _out(self, name: str, layer: int | None, part: nn.Module | None) -> None:
        def keep(m: nn.Module, args: Any, out: Any) -> None:
            self._keep(name, layer, (out[0] if isinstance(out, tuple) else out)[0])

        if part is not None:
            part.register_forward_hook(keep)

    def run(self, logits: Tensor) -> Run:
        """What was seen since it was made."""
        layers = range(n_layers(self.model))
        config = self.model.config
        d_head = reference._d_head(self.model)

        def stacked(name: str) -> Tensor:
            return torch.stack([torch.cat(self.seen[name, l]) for l in layers])

        resid = torch.cat([stacked("resid"), torch.cat(self.seen["resid", None])[None]])
        raw = stacked("v")
        v = torch.stack(
            [
                raw[..., columns(self.model, "v", head)]
                for head in range(n_heads_of(self.model, "v") or 0)
            ],
            2,
        )
        clip = getattr(config, "clip_qkv", None)
        position = self.seen.get(("pos_embed", None))
        pos_embed = None if position is None else torch.cat(position)
        return Run(
            logits=logits,
            resid=resid,
            mid=stacked("mid"),
            attn=stacked("attn"),
            mlp=stacked("mlp"),
            out=stacked("out"),
            z=stacked("z").unflatten(-1, (-1, d_head)),
            v=v if clip is None else v.clamp(-clip, clip),
            pattern=torch.stack([_square(self.seen["pattern", l]) for l in layers]),
            embed=resid[0] if pos_embed is None else resid[0] - pos_embed,
            pos_embed=pos_embed,
        )


def _square(pieces: Sequence[Tensor]) -> Tensor:
    """Rows [query, head, key] of whole passes or single tokens as [head, query, key].

    A sliding window's cache forgets early keys: a row's last column is always its own position.
    """
    n = sum(len(piece) for piece in pieces)
    made = torch.zeros(n, pieces[0].shape[1], n)
    done = 0
    for piece in pieces:
        end = done + len(piece)
        made[done:end, :, end - piece.shape[-1] : end] = piece
        done = end
    return made.transpose(0, 1)


@dataclass
class Asked:
    """A prompt as Hugging Face's tokenizer has it, with its spans by character offsets."""

    prompt: Prompt
    tokenizer: Any

    @cached_property
    def ids(self) -> list[int]:
        return self.tokenizer(self.prompt.text)["input_ids"]

    @cached_property
    def tokens(self) -> list[str]:
        return [self.tokenizer.decode([i]) for i in self.ids]

    @cached_property
    def spans(self) -> dict[str, list[list[int]]]:
        """Of these tests' fields, none of whose texts stands elsewhere in its prompt."""
        offsets = self.tokenizer(self.prompt.text, return_offsets_mapping=True)["offset_mapping"]
        # At a text's start the tokenizer's own "▁" claims the first letter, which it does not show.
        pieces = self.tokenizer.convert_ids_to_tokens(self.ids)
        found: dict[str, list[list[int]]] = {}
        for name, text in self.prompt.fields.items():
            start = self.prompt.text.find(text)
            while start >= 0:
                end = start + len(text)
                over = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
                run = [i for i in over if pieces[i] != "▁"]
                found.setdefault(name, []).append(run)
                start = self.prompt.text.find(text, end)
        n = len(self.ids)
        return {**found, "bos": [[0]], "last": [[n - 1]], "all": [list(range(n))]}

    def first_token(self, text: str) -> int:
        """The first token of what follows the prompt."""
        whole = self.tokenizer(self.prompt.text + text)["input_ids"]
        assert whole[: len(self.ids)] == self.ids
        return whole[len(self.ids)]

    @property
    def target(self) -> int | None:
        """The answer's first token."""
        return None if self.prompt.answer is None else self.first_token(self.prompt.answer)


@dataclass
class Oracle:
    """A tiny pair and prompts, with every run made once."""

    tiny: Tiny
    prompts: Sequence[Prompt] = PROMPTS
    _runs: dict[tuple[int, str], Run] = field(default_factory=dict)

    @cached_property
    def asked(self) -> list[Asked]:
        return [Asked(prompt, self.tiny.tokenizer) for prompt in self.prompts]

    @property
    def base(self) -> PreTrainedModel:
        """The base, for its config."""
        return next(iter(self.tiny.sources.values()))

    def choose(self, index: int, text: str) -> Choose:
        """A graft of one prompt as a function of the site."""
        asked = self.asked[index]
        return chooser(text, asked.spans, len(asked.ids), next(iter(self.tiny.sources)))

    def run(self, index: int, text: str) -> Run:
        """A prompt under a graft: a model's own forward, else the sequential algorithm."""
        if (index, text) not in self._runs:
            ids, sources = self.asked[index].ids, self.tiny.sources
            whole = {"none": next(iter(sources)), **{f"{s} @ all": s for s in sources}}.get(text)
            watched = Watched(sources[whole] if whole else self.base)
            if whole:
                with torch.no_grad():
                    logits = watched.model(torch.tensor([ids]), use_cache=False).logits[0]
            else:
                models = {**sources, next(iter(sources)): watched.model}
                logits = sequential_graft(models, ids, self.choose(index, text))
            self._runs[index, text] = watched.run(logits)
        return self._runs[index, text]

    def source(self, index: int, text: str, component: str, p: int, **site: int) -> PreTrainedModel:
        """The model that a graft takes a component from at one position."""
        name = self.choose(index, text)(component, site.get("layer"), p, site.get("head"))
        return self.tiny.sources[name]

    def final_norm(self, index: int, text: str, p: int) -> nn.Module:
        """The final norm that a graft chose at one position."""
        return reference._final_norm(self.source(index, text, "ln_final", p))

    def unembed(self, index: int, text: str, p: int) -> nn.Module:
        """The unembedding that a graft chose at one position."""
        return self.source(index, text, "unembed", p).get_output_embeddings()

    def read(self, index: int, text: str, stream: Tensor) -> Tensor:
        """A stream [pos, d_model] of a run as log-probabilities [pos, d_vocab], in float64."""
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        rows = []
        with torch.no_grad():
            for p, x in enumerate(stream):
                normed = self.final_norm(index, text, p)(x)
                logits = self.unembed(index, text, p)(normed).double()
                rows.append(logits if cap is None else torch.tanh(logits / cap) * cap)
        return torch.stack(rows).log_softmax(-1)

    def streams(self, index: int, text: str) -> dict[tuple[float, str], Tensor]:
        """(layers run, TransformerLens's name) -> stream [pos, d_model]."""
        run, last = self.run(index, text), n_layers(self.base)
        found: dict[tuple[float, str], Tensor] = {}
        for l in range(last):
            found[l, f"{l}_pre"] = run.resid[l]
            found[l + 0.5, f"{l}_mid"] = run.mid[l]
        found[last, "final_post"] = run.resid[last]
        return found


@cache
def oracle_of(tiny: MakeTiny, variant: str) -> Oracle:
    """The oracle of a variant, whose runs are made once for all files."""
    return Oracle(tiny(variant, tokenizer=FAMILIES[variant]))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities [..., d_vocab], nats, by PyTorch's own."""
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


# --- Patching ------------------------------------------------------------------------------------


def _by_position(model: PreTrainedModel, x: Tensor) -> Tensor:
    """A module's output with positions first, [pos, ...]; Gemma 3 norms its heads after turning."""
    turned = x.ndim == 4 and model.config.model_type == "gemma3_text"
    return x[0].transpose(0, 1) if turned else x[0]


def _in_and_out(
    model: PreTrainedModel, ids: Sequence[int]
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """What each module without parts was given, and gave [pos, width], in a model's own run."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(m: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            seen[m] = (args[0], _by_position(model, out).flatten(1).clone())

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_hook(keep) for m in leaves]
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def patched_copy(
    sources: Mapping[str, PreTrainedModel], ids: Sequence[int], patch: Choose, onto: str
) -> PreTrainedModel:
    """A copy of `onto` whose modules give, at every site, what the source that `patch` names gave
    in its own run; the base's name leaves a site as it is.

    It may be run in one pass or token by token. o's bias belongs to no head, as in a graft: it
    comes along where all heads of a position come from one source.
    """
    base = next(iter(sources))
    own = {name: _in_and_out(model, ids) for name, model in sources.items() if name != base}
    runner = copy.deepcopy(sources[onto])
    wanted: dict[nn.Module, list[tuple[str, int | None]]] = {}
    for component in components_of(runner):
        outside = component in reference.MODEL_COMPONENTS
        for layer in [None] if outside else range(n_layers(runner)):
            part = module(runner, component, layer)
            assert part is not None
            wanted.setdefault(part, []).append((component, layer))

    for part, sites in wanted.items():
        done = [0]

        def put(m: nn.Module, args: Any, out: Any, sites: Any = sites, done: Any = done) -> Tensor:
            made = out.clone()
            for i, row in enumerate(_by_position(runner, made)):
                flat = row.flatten()
                for component, layer in sites:
                    _patch_row(flat, m, args[0][0], component, layer, done[0] + i, i)
                row.copy_(flat.view_as(row))
            done[0] += i + 1
            return made

        part.register_forward_hook(put)

    def _patch_row(
        row: Tensor,
        m: nn.Module,
        given: Tensor,
        component: str,
        layer: int | None,
        p: int,
        here: int,
    ) -> None:
        n_heads = n_heads_of(runner, component)
        heads: list[int | None] = [None] if n_heads is None else list(range(n_heads))
        chosen = [patch(component, layer, p, head) for head in heads]
        whole = component != "o" or len(set(chosen)) == 1
        for head, source in zip(heads, chosen, strict=True):
            if source == base:
                continue
            theirs = module(sources[source], component, layer)
            assert theirs is not None
            their_input, their_output = own[source][theirs]
            if whole:
                place = columns(runner, component, head)
                row[place] = their_output[p][place]
                continue
            assert head is not None
            d_head = reference._d_head(runner)
            mine = slice(head * d_head, (head + 1) * d_head)
            weight, _ = reference._weight_and_bias(m)
            assert weight is not None
            assert layer is not None
            row += out_weight(sources[source], layer, head) @ their_input[0, p, mine]
            row -= weight[:, mine] @ given[here, mine]

    return runner
