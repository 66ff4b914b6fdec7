"""Loading sources: read each checkpoint, check that they make a pair, prove each against its own.

What is not exactly supported is refused. Loading reads Hugging Face state dicts directly, so a
loaded model that is given as a source is neither changed nor kept.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.graft import Graft, Rule
from graftlens.model.arch import (
    FAMILIES,
    Architecture,
    UnsupportedArchitectureError,
    architecture,
)
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.quiet import quiet
from graftlens.model.weights import OLD_BUFFERS, Weights, read_weights

#: token ids [batch, pos] and the dtype to run in -> logits [batch, pos, d_vocab]
Logits = Callable[[Int[Tensor, "batch pos"], torch.dtype], Float[Tensor, "batch pos d_vocab"]]


class PairError(ValueError):
    """The sources do not make a set that can be grafted; the message says which differ and how."""


@dataclass(frozen=True)
class Source:
    """One checkpoint, read and ready to be put beside others.

    Attributes:
        name: what grafts call it.
        origin: where it came from, for messages.
        arch: its architecture.
        weights: its tensors, in their own dtype.
        rotary: its rotary module, None with learned positions.
        tokenizer: its tokenizer, where it brought one.
        logits: its own forward pass on token ids [batch, pos], run in a given dtype.
        config: its Hugging Face config, None for a HookedTransformer.
        dtypes: the dtypes of the checkpoint, where the tensors were computed in a wider one.
        end_tokens, pad_token: token ids that end a generation and that fill up after its end, from
            the checkpoint's generation settings.
    """

    name: str
    origin: str
    arch: Architecture
    weights: Weights
    rotary: nn.Module | None
    tokenizer: Any
    logits: Logits
    config: Any = None
    dtypes: tuple[torch.dtype, ...] = ()
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None


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

    shared = _shared_tokenizer(read, tokenizer)
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
        end_tokens=base.end_tokens,
        pad_token=base.pad_token,
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
    for name, given in sources.items():
        folder = Path(given).expanduser()
        if (folder / "adapter_config.json").is_file():
            if not read:
                _read_adapter(name, folder, folder)  # says that the base cannot be one
            continue
        path = str(folder) if folder.exists() else str(given)
        config = _config(name, path)
        config = config.get_text_config() if config.model_type == "gemma3" else config
        empty = Source(name, path, architecture(config), {}, None, _tokenizer(path), _unread)
        read.append(replace(empty, config=config))
    for source in read:
        _check_pair(read[0], source)
    return read[0].arch, _shared_tokenizer(read, tokenizer)


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
            return _read_adapter(name, folder, base)
        return _read_checkpoint(name, given)
    if "TransformerBridge" in kinds:
        return _read_bridge(name, given)
    if "HookedTransformer" in kinds:
        from graftlens.model.hooked import read_hooked

        return read_hooked(name, given)
    if "PeftModel" in kinds:
        # The adapter's own tensors are float32 whatever the model's are.
        dtypes = (given.get_base_model().get_input_embeddings().weight.dtype,)
        ours = _widened(copy.deepcopy(given))
        return replace(_read_peft(name, ours, f"{name} (PEFT, merged)"), dtypes=dtypes)
    if isinstance(given, nn.Module) and hasattr(given, "config"):
        return _read_transformers(name, given, f"{name} ({type(given).__name__})")
    raise PairError(
        f"source {name!r} is a {type(given).__name__}. Give a hub id, a checkpoint folder, a PEFT "
        "adapter folder, a transformers model, or a TransformerBridge."
    )


def _read_checkpoint(name: str, path: str) -> Source:
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    config = _config(name, path)
    multimodal = config.model_type == "gemma3"
    architecture(config.get_text_config() if multimodal else config)
    if multimodal:
        from transformers import AutoModelForImageTextToText

        loader: Any = AutoModelForImageTextToText
    else:
        loader = AutoModelForCausalLM
    with quiet() if folder.is_dir() else nullcontext():
        try:
            model, info = loader.from_pretrained(path, dtype="auto", output_loading_info=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise PairError(
                f"source {name!r}: the weights of {path} could not be read "
                f"({type(error).__name__}: {error}). The files may be incomplete: save or fetch "
                "them again."
            ) from error
    # transformers only warns: it draws what is missing at random and drops what it does not know.
    for kind, problem in (("missing_keys", "lacks"), ("unexpected_keys", "holds unused")):
        if names := sorted(n for n in info[kind] if not n.endswith(OLD_BUFFERS)):
            raise UnsupportedArchitectureError(
                f"source {name!r}: the checkpoint {path} {problem} tensors: {', '.join(names[:5])}"
                f"{' …' if len(names) > 5 else ''}. graftlens refuses what it cannot run exactly."
            )
    return replace(_read_transformers(name, model, path, copied=False), tokenizer=_tokenizer(path))


def _config(name: str, path: str) -> Any:
    """A checkpoint's Hugging Face config, without its weights."""
    from transformers import AutoConfig

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise PairError(
            f"source {name!r}: folder {path} has no config.json, so it is no checkpoint. "
            "Give the folder that save_pretrained wrote."
        )
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise PairError(f"source {name!r}: there is no folder {path}.")
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        raise PairError(f"source {name!r}: {path} could not be loaded. {error}") from error
    except ValueError as error:
        raise UnsupportedArchitectureError(
            f"source {name!r}: the config of {path} was not understood ({error}). "
            f"Supported: {' '.join(FAMILIES)}."
        ) from error


def _read_adapter(name: str, folder: Path, base: Any) -> Source:
    try:
        from peft import PeftModel
    except ImportError:
        raise PairError(
            f"source {name!r} is a PEFT adapter, which needs the package peft: "
            'pip install "graftlens[peft]".'
        ) from None
    if isinstance(base, str | Path):
        here = Path(base).expanduser()
        base = str(here) if here.exists() else str(base)
    if isinstance(base, str) and Path(base) == folder:
        raise PairError(
            f"source {name!r}, the base, is a PEFT adapter. Put the model that it adapts first: "
            '{"pre": base, "sft": adapter}.'
        )
    if isinstance(base, str | Path):
        from transformers import AutoModelForCausalLM

        with quiet() if Path(base).is_dir() else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    elif hasattr(base, "config") and hasattr(base, "save_pretrained"):
        model = copy.deepcopy(base)
    else:
        raise PairError(
            f"source {name!r} is a PEFT adapter, and the base is a {type(base).__name__}. "
            "Adapters go on a checkpoint or a transformers model."
        )
    adapted = json.loads((folder / "adapter_config.json").read_text())
    stated = adapted.get("base_model_name_or_path")
    if isinstance(base, str | Path) and stated and Path(stated).name != Path(base).name:
        warnings.warn(
            f"source {name!r}: the adapter {folder} says that it was trained on {stated}; here it "
            f"is put on {base}. Its numbers mean something only if these are the same weights.",
            stacklevel=2,
        )
    kind = adapted.get("peft_type", "PEFT")
    dtypes = tuple(sorted({p.dtype for p in model.parameters()}, key=str))
    adapter = PeftModel.from_pretrained(_widened(model), str(folder))
    return replace(_read_peft(name, adapter, f"{folder} ({kind} adapter, merged)"), dtypes=dtypes)


def _widened(model: Any) -> Any:
    """Half-precision weights in float32: adding an adapter in half precision would round it off."""
    half = any(torch.finfo(p.dtype).bits < 32 for p in model.parameters())
    if not half:
        return model
    _renew_rotary(model.float())
    return model


def _read_peft(name: str, adapter: Any, origin: str) -> Source:
    """Merge a PeftModel that is ours to change, and prove the merge against PEFT's own forward."""
    unmerged = copy.deepcopy(adapter)
    merged = _read_transformers(name, adapter.merge_and_unload(), origin, copied=False)
    own = _read_logits(unmerged, copied=False)
    return replace(merged, logits=own)


def _read_bridge(name: str, bridge: Any) -> Source:
    if getattr(bridge, "compatibility_mode", False) or getattr(bridge, "_weights_processed", False):
        raise PairError(
            f"source {name!r}: this TransformerBridge is in compatibility mode, which folds and "
            "centres weights. Boot it again and do not call enable_compatibility_mode()."
        )
    source = _read_transformers(
        name, bridge.original_model, f"{name} (TransformerBridge)", strict=False
    )
    return replace(source, tokenizer=unaltered(getattr(bridge, "tokenizer", None)))


def _read_transformers(
    name: str, model: Any, origin: str, *, copied: bool = True, strict: bool = True
) -> Source:
    """Read a transformers model; `copied` keeps the source apart from a model in other hands.

    A bridge wraps modules and adds split copies of fused ones, so its state is not read `strict`ly.
    """
    if getattr(model.config, "model_type", None) == "gemma3":
        model = _text_model(model)
    arch = architecture(model.config)
    if strict and model.get_output_embeddings() is None:
        raise PairError(
            f"source {name!r} is a {type(model).__name__}, which has no language-model head. "
            "Load it with AutoModelForCausalLM."
        )
    if strict and any(".base_layer." in key for key in model.state_dict()):
        raise PairError(
            f"source {name!r}: PEFT has put its layers into this model (get_peft_model changes the "
            "model it is given). Load the model anew, or give its folder."
        )
    state = {
        key.replace("._original_component", ""): tensor
        for key, tensor in model.state_dict().items()
    }
    if not strict:
        layout = FAMILIES[arch.family].layout
        keep = {
            f"{module.format(l=layer)}.{part}"
            for module in layout.modules.values()
            for layer in range(arch.n_layers)
            for part in ("weight", "bias")
        }
        state = {key: tensor for key, tensor in state.items() if key in keep}
    weights = read_weights(state, arch)
    if copied:
        weights = {site: tensor.detach().clone() for site, tensor in weights.items()}
    inner = next((m for m in model.modules() if hasattr(m, "rotary_emb")), None)
    rotary = getattr(inner, "rotary_emb", None)
    while (wrapped := getattr(rotary, "_original_component", None)) is not None:
        rotary = wrapped
    if rotary is not None and hasattr(rotary, "config"):
        # Built anew: `.to(dtype)` rounds a model's frequencies, and dynamic ones have a memory.
        rotary = type(rotary)(rotary.config)
    if (rotary is None) != (arch.rotary_dim == 0):
        raise UnsupportedArchitectureError(
            f"source {name!r}: {arch.family} without the rotary module that its config implies."
        )

    logits = _read_logits(model, copied)
    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    filler = getattr(settings, "pad_token_id", None)
    return Source(
        name,
        origin,
        arch,
        weights,
        rotary,
        None,
        logits,
        model.config,
        end_tokens=ends,
        pad_token=model.config.pad_token_id if filler is None else filler,
    )


def _read_logits(model: Any, copied: bool) -> Logits:
    """A model's own forward pass; a `copied` model is somebody else's and stays as it is."""

    @torch.no_grad()
    def logits(
        tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch pos d_vocab"]:
        ours = model
        if any(p.dtype != dtype for p in model.parameters()):
            # The caller's model stays as it is; our own may change, its tensors are read already.
            ours = (copy.deepcopy(model) if copied else model).to(dtype)
            _renew_rotary(ours)
        was_training = ours.training
        try:
            ours.eval()
            where = _device_of(ours)
            return ours(input_ids=tokens.to(where), use_cache=False).logits.to(tokens.device)
        finally:
            ours.train(was_training)

    return logits


def _renew_rotary(model: nn.Module) -> None:
    """Undo the rounding that a cast does to rotary frequencies."""
    for module in model.modules():
        rotary: Any = getattr(module, "rotary_emb", None)
        if hasattr(rotary, "config") and not hasattr(rotary, "_original_component"):
            module.rotary_emb = type(rotary)(rotary.config).to(_device_of(model))


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device


def _text_model(model: Any) -> Any:
    """The text part of a multimodal Gemma 3 as a causal language model that shares its weights."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        text = Gemma3ForCausalLM(model.config.get_text_config())
    text.model = model.model.language_model
    text.lm_head = model.lm_head
    return text.eval()


def _tokenizer(path: str) -> Any:
    """The tokenizer beside a checkpoint, or None where a local folder has none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if folder.is_dir() and not any((folder / n).is_file() for n in names):
        return None
    return AutoTokenizer.from_pretrained(path)


def unaltered(tokenizer: Any) -> Any:
    """A TransformerLens model's tokenizer as its checkpoint has it, where that can be loaded.

    TransformerLens reloads tokenizers so that they always put a BOS first, and takes it off again
    in its own `to_tokens`. Here BOS is the tokenizer's own choice.
    """
    path = getattr(tokenizer, "name_or_path", "")
    try:
        return (_tokenizer(path) if path else None) or tokenizer
    except (OSError, ValueError):
        return tokenizer


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


def _shared_tokenizer(read: list[Source], given: Any) -> Any:
    if given is not None:
        if isinstance(given, str | Path):
            found = _tokenizer(str(given))
            if found is None:
                raise PairError(f"tokenizer={str(given)!r}: this folder holds no tokenizer.")
            return found
        return given
    named = [(s.name, s.tokenizer) for s in read if s.tokenizer is not None]
    if not named:
        return None
    first_name, first = named[0]
    for name, other in named[1:]:
        if difference := _tokenizers_differ(first, other):
            raise PairError(
                f"the tokenizers of {first_name!r} and {name!r} differ: {difference}. "
                "Grafting needs the same tokens in both; "
                "pass tokenizer=… if you know which one is right."
            )
    return first


_PROBE_TEXT = " The first of 1,234 cafés opened in São Tomé — didn't it?\n\tYes: 東京 \U0001f642"


def _tokenizers_differ(a: Any, b: Any) -> str:
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        odd = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        return f"{len(odd)} vocabulary entries, such as {odd[0]!r}"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)} and {getattr(b, name)}"
    if a(_PROBE_TEXT)["input_ids"] != b(_PROBE_TEXT)["input_ids"]:
        return "the same text gives other tokens"
    return ""


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
            ours = model(tokens, graft=Graft.rule(source.name)).float()
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
