"""Loading sources: read each checkpoint, check that they make a pair, prove each against its own.

What is not exactly supported is refused. Loading reads Hugging Face state dicts directly, so a
loaded model that is given as a source is neither changed nor kept.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.graft import Graft, Rule
from graftlens.model.adapters import copied, preview_adapter, read_adapter, read_peft, widened
from graftlens.model.arch import (
    Architecture,
    PairError,
    UnsupportedArchitectureError,
    architecture,
)
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.source import (
    Source,
    read_bridge,
    read_checkpoint,
    read_config,
    read_transformers,
)
from graftlens.model.tokenizers import read_tokenizer, shared_tokenizer
from graftlens.model.weights import Weights


def load(
    sources: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    check: bool = True,
    verbose: bool = True,
) -> GraftedTransformer:
    """Load two or more sources of one architecture into a `GraftedTransformer`.

    Args:
        sources: name -> source, the base first. A source is a hub id, a checkpoint folder, a
            PEFT/LoRA adapter folder (applied to the base), a transformers model, a
            `TransformerBridge` without compatibility mode, or with TransformerLens 3.9 a
            `HookedTransformer` whose weights were not processed.
        tokenizer: a fast tokenizer, or where to load one from; otherwise the sources' own.
        device: where to put the model; the GPU where there is one, else the CPU.
        dtype: the dtype to run in. Left out, it is float32 on the CPU and the checkpoints' own on a
            GPU, and checkpoints of different dtypes are refused.
        check: compare each source's logits with its own model's on a probe.
        verbose: print one line about what was loaded and checked.

    Raises:
        PairError: sources that differ in architecture, shapes, dtype or tokenizer, that are not
            finite, that were processed (folded), or whose logits are not reproduced. A bias that
            only some sources have is no difference: it is zero in the others.
        ValueError: a source's name that the text form of grafts could not hold, or a GPU that is
            not there.
        UnsupportedArchitectureError: a family or option that is not exactly supported.
    """
    _check_names(sources)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}, but this PyTorch sees no GPU. Leave device out, or write "
            'device="cpu".'
        )
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise PairError(
            f'dtype={dtype!r} is no floating-point dtype of torch. Write, for example, "bfloat16".'
        )

    read: list[Source] = []
    for name, given in sources.items():
        read.append(_read(name, given, next(iter(sources.values()))))
    _fill_biases(read)
    for source in read:
        _check_pair(read[0], source)
    own = {name: _dtypes(source) for name, source in zip(sources, read, strict=True)}
    if wanted is None:
        distinct = {d for found in own.values() for d in found}
        if len(distinct) > 1:
            listed = ", ".join(f"{n}: {' '.join(map(_short, f))}" for n, f in own.items())
            raise PairError(
                f"the sources' dtypes differ ({listed}). Name the one to run in, such as "
                "dtype=torch.float32."
            )
        wanted = torch.float32 if target.type == "cpu" else distinct.pop()

    shared = shared_tokenizer([(s.name, s.tokenizer) for s in read], tokenizer)
    base = read[0]
    prepared = {
        source.name: {
            site: _own_storage(tensor.detach().to(target, wanted).contiguous())
            for site, tensor in source.weights.items()
        }
        for source in read
    }
    model = GraftedTransformer(
        base.arch,
        _share_tied(prepared),
        rotary=base.rotary,
        activation=_activation(base.arch.act_fn),
        tokenizer=shared,
        model_name=base.origin,
        end_tokens={source.name: source.end_tokens for source in read},
        pad_token={source.name: source.pad_token for source in read},
        hf_config=base.config,
    )
    model.to(target)
    worst = _probe(model, read, wanted) if check else None
    if verbose:
        print(_line(model, worst))
    return model


def preview(
    sources: Mapping[str, str | Path], tokenizer: str | Path | None = None
) -> tuple[Architecture, Any]:
    """The architecture and tokenizer that `load` would find, without reading any weight.

    Args:
        sources: name -> hub id, checkpoint folder or PEFT adapter folder, the base first.
        tokenizer: where to load a tokenizer from; otherwise the sources' own.

    Returns:
        The architecture, and the tokenizer or None where no source brings one.

    Raises:
        PairError: a source that is not there, or sources whose architecture or tokenizers differ.
        ValueError: a source's name that the text form of grafts could not hold.
        UnsupportedArchitectureError: a family or option that is not exactly supported.
    """
    _check_names(sources)
    read: list[Source] = []
    adapters: list[tuple[str, Any]] = []
    for name, given in sources.items():
        folder = Path(given).expanduser()
        if (folder / "adapter_config.json").is_file():
            if not read:
                read_adapter(name, folder, folder)  # says that the base cannot be one
            adapters.append((name, preview_adapter(name, folder)))
            continue
        path = str(folder) if folder.exists() else str(given)
        config = read_config(name, path)
        config = config.get_text_config() if config.model_type == "gemma3" else config
        empty = Source(name, path, architecture(config), {}, None, read_tokenizer(path), _unread)
        read.append(replace(empty, config=config))
    for source in read:
        _check_pair(read[0], source)
    found = [(s.name, s.tokenizer) for s in read] + adapters
    return read[0].arch, shared_tokenizer(found, tokenizer)


def _unread(
    tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
) -> Float[Tensor, "batch pos d_vocab"]:
    raise AssertionError("a preview has no weights to run")


def _check_names(sources: Mapping[str, Any]) -> None:
    if not isinstance(sources, Mapping) or len(sources) < 2:
        # Not the value itself: a loaded model prints as a page.
        given = (
            " ".join(map(str, sources)) if isinstance(sources, Mapping) else type(sources).__name__
        )
        raise PairError(
            f"sources: {given or 'none'}. Give two or more as a mapping from names, the base "
            'first, such as {"pre": "org/model", "sft": "path/to/checkpoint"}.'
        )
    for name in sources:
        Rule(name, Graft.rule("x").rules[0].at)  # the grammar's own check of a source's name


# -- reading one source ------------------------------------------------------------------------


def _read(name: str, given: Any, base: Any) -> Source:
    kinds = {cls.__name__ for cls in type(given).__mro__}
    if isinstance(given, str | Path):
        folder = Path(given).expanduser()
        given = str(folder) if folder.exists() else str(given)
        if (folder / "adapter_config.json").is_file():
            return read_adapter(name, folder, base)
        return read_checkpoint(name, given)
    if "TransformerBridge" in kinds:
        return read_bridge(name, given)
    if "HookedTransformer" in kinds:
        from graftlens.model.hooked import read_hooked

        return read_hooked(name, given)
    if "PeftModel" in kinds:
        # The adapter's own tensors are float32 whatever the model's are.
        dtypes = (given.get_base_model().get_input_embeddings().weight.dtype,)
        ours = widened(copied(given))
        return replace(read_peft(name, ours, f"{name} (PEFT, merged)"), dtypes=dtypes)
    if isinstance(given, nn.Module) and hasattr(given, "config"):
        return read_transformers(name, given, f"{name} ({type(given).__name__})")
    raise PairError(
        f"source {name!r} is a {type(given).__name__}. Give a hub id, a checkpoint folder, a PEFT "
        "adapter folder, a transformers model, or a TransformerBridge."
    )


# -- checks ------------------------------------------------------------------------------------


def _check_pair(base: Source, other: Source) -> None:
    if base.arch != other.arch:
        ours, theirs = vars(base.arch), vars(other.arch)
        differing = [
            f"{k} ({_brief(ours[k])} and {_brief(theirs[k])})" for k in ours if ours[k] != theirs[k]
        ]
        hint = ""
        if base.arch.d_vocab != other.arch.d_vocab:
            hint = (
                " Where finetuning added tokens, resize the base's embeddings to match: "
                "base.resize_token_embeddings(n)."
            )
        raise PairError(
            f"{base.name!r} ({base.origin}) and {other.name!r} ({other.origin}) differ in "
            f"architecture: {', '.join(differing)}.{hint}"
        )
    rope = [
        getattr(s.config, "rope_parameters", None) for s in (base, other) if s.config is not None
    ]
    if len(rope) == 2 and rope[0] != rope[1]:
        raise PairError(
            f"{base.name!r} and {other.name!r} differ in rope_parameters: {rope[0]} and {rope[1]}. "
            "Positions must mean the same in both."
        )
    if base.weights.keys() != other.weights.keys():
        odd = sorted(base.weights.keys() ^ other.weights.keys(), key=str)[0]
        component, layer, part = odd
        raise PairError(
            f"only one of {base.name!r} and {other.name!r} has a {part} for {component}"
            f"{'' if layer is None else f' in layer {layer}'}."
        )
    for (component, layer, part), tensor in other.weights.items():
        where = f"{other.name!r}: {component} {part}{'' if layer is None else f', layer {layer}'}"
        if tensor.shape != base.weights[component, layer, part].shape:
            raise PairError(
                f"{where} has shape {tuple(tensor.shape)}; {base.name!r} has "
                f"{tuple(base.weights[component, layer, part].shape)}."
            )
        if not tensor.is_floating_point():
            raise PairError(
                f"{where} is {tensor.dtype}: quantised weights cannot be grafted exactly."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PairError(
                f"{where} holds values that are not finite. Training diverged, or the file is "
                "damaged; load an earlier checkpoint."
            )


def _brief(value: object) -> str:
    """A fact for a message; of a tuple over layers only as much as shows what it is."""
    if isinstance(value, tuple) and len(value) > 2:
        return f"{value[0]!r}, … over {len(value)} layers"
    return repr(value)


def _fill_biases(read: list[Source]) -> None:
    """A bias that only some sources have is zero in the others."""
    sites = {site for source in read for site in source.weights if site[2] == "bias"}
    for source in read:
        for component, layer, part in sites - source.weights.keys():
            weight = source.weights.get((component, layer, "weight"))
            if weight is not None:
                source.weights[component, layer, part] = weight.new_zeros(weight.shape[0])


def _dtypes(source: Source) -> list[torch.dtype]:
    return sorted(source.dtypes or {t.dtype for t in source.weights.values()}, key=str)


def _own_storage(tensor: Tensor) -> Tensor:
    """A part of a fused projection as a tensor of its own: it must not keep the others alive."""
    alone = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share_tied(prepared: dict[str, Weights]) -> dict[str, Weights]:
    """Keep one tensor where embedding and unembedding are the same."""
    for weights in prepared.values():
        embed = weights[Component.EMBED, None, "weight"]
        site = (Component.UNEMBED, None, "weight")
        if weights[site].shape == embed.shape and torch.equal(weights[site], embed):
            weights[site] = embed
    return prepared


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UnsupportedArchitectureError(
            f"act_fn={name!r} is not supported. Supported are transformers' activations: "
            f"{' '.join(sorted(ACT2FN))}."
        )
    return ACT2FN[name]


def _probe(model: GraftedTransformer, read: list[Source], dtype: torch.dtype) -> float:
    """The largest difference from any source's own logits, run in the same dtype.

    In float32 it is the largest difference relative to the largest logit; in half precision the
    root mean square of the differences relative to that of the logits.

    Raises:
        PairError: a difference beyond rounding.
    """
    arch = model.arch
    windows = [w for w in arch.windows if w is not None]
    exact = torch.finfo(dtype).bits >= 32
    # Half precision rounds at every step, so there the mean is compared, and more is allowed: twice
    # what Hugging Face's own half precision differs from its float32 on the families tested.
    allowed = 1e-4 if exact else 3 * torch.finfo(dtype).eps * (1 + arch.n_layers) ** 0.5
    # Long enough to pass a sliding window, where that is affordable.
    length = min(arch.n_ctx, max([24, *(w + 8 for w in windows if w <= 120)]))
    tokens = torch.randint(
        arch.d_vocab, (2, length), generator=torch.Generator().manual_seed(0)
    ).to(model.cfg.device)
    worst = 0.0
    for source in read:
        with torch.no_grad():
            ours = model(
                tokens, graft=Graft.rule(source.name), attention_mask=torch.ones_like(tokens)
            ).float()
        theirs = source.logits(tokens, dtype).to(ours)
        order = torch.inf if exact else 2
        difference = float(
            torch.linalg.vector_norm(ours - theirs, order)
            / torch.linalg.vector_norm(theirs, order).clamp_min(1e-9)
        )
        if not difference <= allowed:
            raise PairError(
                f"source {source.name!r} ({source.origin}): logits differ from its own model's by "
                f"{difference:.1e} (relative); {allowed:.1e} is rounding in {_short(dtype)}. This "
                "checkpoint is not supported exactly. Please report its config."
            )
        worst = max(worst, difference)
    return worst


def _line(model: GraftedTransformer, worst: float | None) -> str:
    arch = model.arch
    stored = list(model.stored())
    shared = sum(len(weight.variants) == 1 for weight in stored)
    same = f"{shared} of {len(stored)} tensors are the same in all sources"
    if shared == len(stored):
        same = "ALL SOURCES ARE IDENTICAL, so no graft can change anything"
    checked = (
        "logits not checked"
        if worst is None
        else f"logits equal the sources' own within {worst:.0e}"
    )
    return (
        f"graftlens: {arch.family}, {arch.n_layers} layers, d_model {arch.d_model}, "
        f"sources {' '.join(model.sources)} (base {model.sources[0]}); "
        f"{same}; "
        f"{_short(model.cfg.dtype)} on {model.cfg.device}; {checked}"
    )
