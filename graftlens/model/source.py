"""One source: a checkpoint read from a folder, the hub or a loaded model, with its own forward.

Hugging Face state dicts are read directly, so a loaded model that is given as a source is neither
changed nor kept.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftlens.components import Component
from graftlens.model.additions import Additions
from graftlens.model.arch import (
    FAMILIES,
    Architecture,
    ConfigValueError,
    PairError,
    UnsupportedArchitectureError,
    architecture,
    refuse_multimodal,
    refuse_quantised,
)
from graftlens.model.differences import Difference, told
from graftlens.model.identity import rotary_tables
from graftlens.model.locations import folder_of, gguf_of, location_of, read_object, said
from graftlens.model.lora import Parts
from graftlens.model.made import Made
from graftlens.model.quiet import quiet
from graftlens.model.stored import (
    Stored,
    check_loaded,
    has_weights,
    stored_dtypes,
    stored_tensors,
    weight_files,
    widest,
)
from graftlens.model.tokenizers import read_tokenizer, unaltered
from graftlens.model.weights import OLD_BUFFERS, Weights, read_additions, read_weights

#: Lists with an entry for each layer are made from the config; a larger number means a damaged one.
MOST_LAYERS = 1000

#: Tensors that stand for a weight which is computed when it is used.
_COMPUTED = re.compile(r"\.parametrizations\.|\.weight_(g|v|orig|mask)$")

#: token ids [batch, pos] and the dtype to run in -> logits [batch, pos, d_vocab]
Logits = Callable[[Int[Tensor, "batch pos"], torch.dtype], Float[Tensor, "batch pos d_vocab"]]


@dataclass(frozen=True)
class Source:
    """One checkpoint, read and ready to be combined with others.

    Attributes:
        name: its name in grafts.
        origin: where it came from, for messages.
        arch: its architecture.
        weights: its tensors, in their own dtype.
        additions: what it adds to its matrices, kept apart from them.
        rotary: its rotary module, None with learned positions.
        tokenizer: its tokenizer, if it has one.
        logits: its own forward pass on token ids [batch, pos], run in a given dtype; None for a
            made source where no Hugging Face model of its parts is known.
        config: its Hugging Face config, None for a HookedTransformer.
        dtypes: the dtypes of the checkpoint, if the tensors were computed in a wider one.
        hooks: places in its model with hooks, through which its own logits go.
        prove: raises PairError if its tensors differ from its files; None without files.
        model: the transformers model that it was read from, which may be the user's.
        merged: the kind of adapter that was merged into its tensors; empty without.
        end_tokens, pad_token: token ids that end a generation and that fill up after its end, from
            the checkpoint's generation settings.
        generation: the checkpoint's generation settings.
        notes: what is read of it in another form, to be told.
        made: what it is made of, if it is made of other sources.
    """

    name: str
    origin: str
    arch: Architecture
    weights: Weights
    rotary: nn.Module | None
    tokenizer: Any
    logits: Logits | None
    config: Any = None
    dtypes: tuple[torch.dtype, ...] = ()
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    hooks: tuple[str, ...] = ()
    prove: Callable[[], None] | None = None
    additions: Additions = field(default_factory=dict)
    model: Any = None
    merged: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Difference, ...] = ()
    made: Made | None = None


def read_checkpoint(name: str, path: str) -> Source:
    location = location_of(f"source {name!r}", path)
    model, stored = open_model(f"source {name!r}", location)
    source = read_transformers(name, model, _origin(path, location), copied=False)
    state = dict(model.state_dict())
    return replace(
        source,
        tokenizer=read_tokenizer(location),
        notes=(*source.notes, *_of_gguf(name, location)),
        dtypes=stored_dtypes(f"source {name!r}", stored),
        prove=partial(
            check_loaded, f"source {name!r}", stored, state, getattr(model, "base_model_prefix", "")
        ),
    )


def preview_checkpoint(name: str, path: str) -> Source:
    """A checkpoint without its weights; if a folder has them, their headers are checked."""
    what = f"source {name!r}"
    given, path = path, location_of(what, path, weights=False)
    config = open_config(what, path)
    text = text_config(config)
    empty = _blueprint(what, path, text)
    if Path(path).is_dir() and has_weights(Path(path), config):
        _check_settings(what, Path(path))
        stored = stored_tensors(what, weight_files(what, path, Path(path), config))
        stored_dtypes(what, stored)
        _check_tensors(what, path, stored, config, empty)
    rotary = _check_tables(what, path, empty)
    tokenizer = read_tokenizer(path)
    origin = _origin(given, path)
    notes = (*_of_pictures(name, config), *_of_gguf(name, path))
    arch = architecture(text)
    return Source(name, origin, arch, {}, rotary, tokenizer, _unread, config=text, notes=notes)


def _of_gguf(name: str, location: str) -> tuple[Difference, ...]:
    if gguf_of(location) is None:
        return ()
    done = "its weights are dequantised to float32, as transformers does it"
    return (told("format", name, None, "GGUF", "converted", done),)


def _of_pictures(name: str, config: Any) -> tuple[Difference, ...]:
    if config.model_type != "gemma3":
        return ()
    done = "its text part is read, which sees no pictures"
    return (told("model_type", name, None, "gemma3", "converted", done),)


def _blueprint(what: str, path: str, config: Any) -> Any:
    """The model that a config describes, without memory for its weights."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), init_empty_weights(include_buffers=True):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # each kind of wrong value raises a different exception
        raise PairError(
            f"{what}: the config of {path} does not describe a model ({said(error)}). Save or "
            "download the checkpoint again."
        ) from error


def _check_tables(what: str, path: str, empty: Any) -> nn.Module | None:
    """The rotary module of a model without weights, whose tables are finite."""
    rotary = rotary_of(empty)
    tables = [] if rotary is None else rotary_tables(architecture(empty.config), rotary)
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise PairError(
            f"{what}: rope_parameters={empty.config.rope_parameters} in the config of {path} give "
            "no finite tables. Save or download the checkpoint again."
        )
    return rotary


def _check_tensors(
    what: str, path: str, stored: Mapping[str, Stored], config: Any, empty: Any
) -> None:
    """Compare the contents of files with the config, before memory is allocated."""
    named = {name: name for name in stored if not name.endswith(OLD_BUFFERS)}
    if config.model_type == "gemma3":
        # Its language model is one part of three, under names that have changed over the years.
        own = re.compile(r"^(language_model\.model|model\.language_model)\.|^(.*\.)?(?=lm_head\.)")
        named = {
            own.sub(lambda m: "model." if m[1] else "", name): name
            for name in stored
            if own.match(name)
        }
    prefix = f"{empty.base_model_prefix}."
    if not any(name.startswith(prefix) for name in named):  # a file of the body alone
        named = {n if n.startswith("lm_head.") else prefix + n: s for n, s in named.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    layout = FAMILIES[empty.config.model_type].layout
    pair = {f"{layout.modules[c]}.weight" for c in (Component.EMBED, Component.UNEMBED)}
    # Of two tied tensors a file may hold either: safetensors' save_model keeps the head.
    tied = getattr(config, "tie_word_embeddings", True) and bool(pair & named.keys())
    missing = sorted(expected.keys() - named.keys() - (pair if tied else set()))
    unused = sorted(there for name, there in named.items() if name not in expected)
    # Old names that transformers translates (GPT-NeoX's embed_out) are left to it.
    for name in tuple(missing):
        if same := [there for there in unused if stored[there].shape == expected[name]]:
            missing.remove(name)
            unused.remove(same[0])
    _refuse_names(what, path, missing, unused)
    wrong = [n for n in expected.keys() & named.keys() if stored[named[n]].shape != expected[n]]
    if wrong:
        name = min(wrong)
        more = f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise UnsupportedArchitectureError(
            f"{what}: in {stored[named[name]].file}, {named[name]} has shape "
            f"{stored[named[name]].shape}; the config says {expected[name]}{more}. Restore the "
            "config.json that belongs to these weights."
        )


def _refuse_names(what: str, path: str, missing: Sequence[str], unused: Sequence[str]) -> None:
    for names, problem in ((missing, "lacks"), (unused, "holds unused")):
        if names:
            raise UnsupportedArchitectureError(
                f"{what}: the checkpoint {path} {problem} tensors: {', '.join(names[:5])}"
                f"{' …' if len(names) > 5 else ''}. graftlens refuses what it cannot run exactly."
            )


def _unread(
    tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
) -> Float[Tensor, "batch pos d_vocab"]:
    raise AssertionError("a preview has no weights to run")


def _origin(given: str, location: str) -> str:
    """A hub model by its id, wherever its files are; a folder unchanged."""
    return location if Path(given).expanduser().exists() else given


def open_model(
    what: str, path: str, dtype: torch.dtype | None = None, *, any_family: bool = False
) -> tuple[Any, dict[str, Stored]]:
    """A checkpoint as a transformers model, exactly as in its files.

    Args:
        what: what it is, for messages: ``source 'sft'``.
        path: a folder or a hub id.
        dtype: the dtype to load in; left out, the narrowest that holds every stored number exactly,
            regardless of the config.
        any_family: also accept families that cannot be grafted.

    Returns:
        The model, and what its files hold.

    Raises:
        PairError: a location that does not exist, or files that are missing, damaged or quantised.
        UnsupportedArchitectureError: a family that is not supported, or a checkpoint that lacks
            tensors or that has tensors unknown to its family or of other shapes.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    path = location_of(what, path)
    config = open_config(what, path, any_family)
    if (gguf := gguf_of(path)) is not None:
        return _dequantised(what, *gguf, dtype or torch.float32), {}
    folder = folder_of(path)
    local = folder is not None and str(folder) == path
    stored = stored_tensors(what, weight_files(what, path, folder, config))
    dtypes = stored_dtypes(what, stored)
    _check_settings(what, folder)
    text = text_config(config)
    if text.model_type in FAMILIES:
        empty = _blueprint(what, path, text)
        _check_tensors(what, path, stored, config, empty)
        _check_tables(what, path, empty)
    loader: Any = (
        AutoModelForImageTextToText if config.model_type == "gemma3" else AutoModelForCausalLM
    )
    with quiet() if local else nullcontext():
        try:
            model, info = loader.from_pretrained(
                path,
                config=config,
                dtype=dtype or widest(dtypes),
                output_loading_info=True,
                trust_remote_code=False,
                **({} if local or folder is None else {"revision": folder.name}),
            )
        except Exception as error:  # whatever a config and its files can make transformers raise
            raise PairError(
                f"{what}: the weights of {path} could not be read ({said(error)}). The files may "
                "be incomplete or not fit their config: save or download them again."
            ) from error
    # transformers only warns: it initialises missing tensors at random and drops unknown ones.
    missing, unused = (
        sorted(name for name in info[kind] if not name.endswith(OLD_BUFFERS))
        for kind in ("missing_keys", "unexpected_keys")
    )
    _refuse_names(what, path, missing, unused)
    return model, stored


def _dequantised(what: str, folder: str, file: str, dtype: torch.dtype) -> Any:
    """The model in a GGUF file, as transformers dequantises it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                trust_remote_code=False,
            )
        except Exception as error:  # whatever a file can make transformers raise
            raise _unread_gguf(what, folder, file, error) from error
    _plain_settings(model.config)
    for module in model.modules():
        if isinstance(eps := getattr(module, "variance_epsilon", None), float):
            module.variance_epsilon = _short_decimal(eps)
    return model


def _gguf_config(what: str, folder: str, file: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    except Exception as error:  # whatever a file can make transformers raise
        raise _unread_gguf(what, folder, file, error) from error
    _plain_settings(config)
    architecture(config)
    return config


def _unread_gguf(what: str, folder: str, file: str, error: Exception) -> PairError:
    if isinstance(error, ImportError):
        return PairError(f"{what}: {file} is a GGUF file, which needs: pip install gguf.")
    return PairError(
        f"{what}: {folder}/{file} could not be read ({said(error)}). The file may be incomplete, "
        "or of a family that transformers does not read from GGUF: give the checkpoint that it was "
        "made from."
    )


def _plain_settings(config: Any) -> None:
    """A GGUF file's settings as its checkpoint has them: it keeps 1e-5 as the nearest float32."""
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if isinstance(eps := getattr(config, key, None), float):
            setattr(config, key, _short_decimal(eps))


def _short_decimal(number: float) -> float:
    """The shortest decimal that is the same number in float32."""
    return float(str(np.float32(number)))


def open_config(what: str, path: str, any_family: bool = False) -> Any:
    """A checkpoint's Hugging Face config, of a supported family or of any, without its weights.

    Args:
        what: what it is, for messages.
        path: a folder, or the id of an existing hub model.
        any_family: also accept families that cannot be grafted.

    Raises:
        PairError: a config that is missing or damaged.
        UnsupportedArchitectureError: a family, an option or a value that is not supported.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (gguf := gguf_of(path)) is not None:
        return _gguf_config(what, *gguf)
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PairError(
                f"{what}: folder {path} has no config.json, so it is not a checkpoint. "
                "Give the folder that save_pretrained wrote."
            )
        file = folder / "config.json"
    else:
        from transformers.utils import cached_file

        try:
            file = Path(str(cached_file(path, "config.json")))
        except Exception as error:  # of the hub client, the network or the cache
            raise PairError(f"{what}: {path} could not be loaded ({said(error)}).") from error
    content = read_object(what, file)
    kind = content.get("model_type")
    if not isinstance(kind, str):
        raise PairError(f"{what}: {file} has model_type={kind!r}; give the name of a family.")
    native = kind in FAMILIES or kind == "gemma3"
    taken = kind in CONFIG_MAPPING if any_family else native
    if content.get("auto_map") and not taken:
        raise UnsupportedArchitectureError(
            f"{what}: {file} needs code that comes with the checkpoint (auto_map), which "
            "graftlens never runs. Supported are transformers' own "
            f"{'families' if any_family else ' '.join(FAMILIES)}."
        )
    if not any_family:
        try:
            refuse_quantised(content)
            if not native:
                refuse_multimodal(kind, content)
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(f"{what}: {file}: {error}") from None
    for part in (content, content.get("text_config") or {}):
        for key in ("num_hidden_layers", "n_layer"):
            if isinstance(part, dict) and isinstance(n := part.get(key), int) and n > MOST_LAYERS:
                raise PairError(f"{what}: {file} has {key}={n}. No model has so many layers.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each kind of wrong value raises a different exception
        if not taken:
            raise UnsupportedArchitectureError(
                f"{what}: {file} has model_type={kind!r}, which is not supported. Supported: "
                f"{'what transformers has' if any_family else ' '.join(FAMILIES)}."
            ) from error
        raise PairError(
            f"{what}: {file} was not understood ({said(error)}). Save or download the checkpoint "
            "again."
        ) from error
    try:
        if native or not any_family:
            architecture(text_config(config))
    except ConfigValueError as error:
        raise PairError(f"{what}: {file} was not understood ({error}).") from error
    if content.get("auto_map"):
        warnings.warn(
            f"{what}: {file} also names code that comes with the checkpoint (auto_map), which "
            f"graftlens never runs; transformers' own {kind} is run.",
            stacklevel=2,
        )
    return config


def text_config(config: Any) -> Any:
    """The language model's part of a config: that of a multimodal Gemma 3, else all of it."""
    return config.get_text_config() if config.model_type == "gemma3" else config


def ties_embeddings(source: str) -> bool:
    """Whether the Hugging Face model of a checkpoint has one tensor as embedding and unembedding.

    Raises:
        PairError, UnsupportedArchitectureError: a config that is missing, damaged or not supported.
    """
    what = f"source {source!r}"
    config = text_config(open_config(what, location_of(what, source)))
    return bool(getattr(config, "tie_word_embeddings", False))


def _check_settings(what: str, folder: Path | None) -> None:
    """Refuse generation settings that transformers would silently ignore."""
    from transformers import GenerationConfig

    if folder is None or not (file := folder / "generation_config.json").is_file():
        return
    read_object(what, file)
    try:
        settings = GenerationConfig.from_pretrained(str(folder))
        _end_tokens(settings.eos_token_id)
    except Exception as error:  # each kind of wrong value raises a different exception
        raise PairError(
            f"{what}: {file} was not understood ({said(error)}). Save or download it again; "
            "without the file, the config's own tokens end a generation."
        ) from error


def _end_tokens(given: Any) -> tuple[int, ...]:
    found = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(token, int) for token in found):
        raise PairError(f"eos_token_id={given!r} is not a token id or a list of them.")
    return found


def read_bridge(name: str, bridge: Any) -> Source:
    if getattr(bridge, "compatibility_mode", False) or getattr(bridge, "_weights_processed", False):
        raise PairError(
            f"source {name!r}: this TransformerBridge is in compatibility mode, which folds and "
            "centres weights. Boot it again and do not call enable_compatibility_mode()."
        )
    source = read_transformers(
        name, bridge.original_model, f"{name} (TransformerBridge)", strict=False
    )
    return replace(source, tokenizer=unaltered(getattr(bridge, "tokenizer", None)))


def read_transformers(
    name: str,
    model: Any,
    origin: str,
    *,
    copied: bool = True,
    strict: bool = True,
    parts: Parts | None = None,
    logits: Logits | None = None,
) -> Source:
    """Read a transformers model; `copied` keeps the source apart from a model in other hands.

    A bridge wraps modules and adds split copies of fused ones, so its state is not read `strict`ly.
    A model into which PEFT has put its layers is read with its `parts`, and its own `logits`.
    """
    notes = _of_pictures(name, model.config)
    whole, model = model, language_model(model)
    arch = architecture(model.config)
    if strict and model.get_output_embeddings() is None:
        raise PairError(
            f"source {name!r} is a {type(model).__name__}, which has no language-model head. "
            "Load it with AutoModelForCausalLM."
        )
    if strict and parts is None and any(".base_layer." in key for key in model.state_dict()):
        raise PairError(
            f"source {name!r}: PEFT has put its layers into this model (get_peft_model changes the "
            "model it is given). Load the model again, or give its folder."
        )
    read = model.state_dict() if parts is None else parts.state
    if computed := [key for key in read if _COMPUTED.search(key)]:
        raise PairError(
            f"source {name!r}: {computed[0]} is a tensor from which a weight is computed "
            "(parametrizations, weight norm, pruning). Make it a plain weight first, for example "
            "with torch.nn.utils.parametrize.remove_parametrizations(module, name)."
        )
    state = {key.replace("._original_component", ""): tensor for key, tensor in read.items()}
    if not strict:
        layout = FAMILIES[arch.family].layout
        keep = {
            f"{module.format(l=layer)}.{parameter}"
            for module in layout.modules.values()
            for layer in range(arch.n_layers)
            for parameter in ("weight", "bias")
        }
        state = {key: tensor for key, tensor in state.items() if key in keep}
    weights = read_weights(state, arch)
    additions = {} if parts is None else read_additions(parts.additions, arch)
    if any(tensor.is_meta for tensor in weights.values()):
        raise PairError(
            f"source {name!r}: weights of this model are not in memory (they are offloaded, or "
            "were never loaded). Load it whole, or give its folder."
        )
    if copied:
        weights = {site: tensor.detach().clone() for site, tensor in weights.items()}
    rotary = rotary_of(model)
    if (rotary is None) != (arch.rotary_dim == 0):
        raise UnsupportedArchitectureError(
            f"source {name!r}: {arch.family} without the rotary module that its config implies."
        )

    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    filler = getattr(settings, "pad_token_id", None)
    generation = getattr(model, "generation_config", None)
    return Source(
        name,
        origin,
        arch,
        weights,
        rotary,
        None,
        logits or own_logits(model, copy.deepcopy if copied else None),
        model.config,
        end_tokens=_end_tokens(ends),
        hooks=hooked_places(model),
        pad_token=model.config.pad_token_id if filler is None else filler,
        additions=additions,
        model=whole,
        generation={} if generation is None else generation.to_dict(),
        notes=notes,
    )


def own_logits(model: Any, copy_of: Callable[[Any], Any] | None) -> Logits:
    """A model's own forward pass; without a way to make a `copy_of` it, the model may be cast to
    another dtype."""

    @torch.no_grad()
    def logits(
        tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch pos d_vocab"]:
        ours = model
        if any(p.dtype != dtype for p in model.parameters()):
            # The caller's model stays unchanged; our own may change, as its tensors have been read.
            ours = (model if copy_of is None else copy_of(model)).to(dtype)
            renew_rotary(ours)
        with evaluating(ours):
            where = _device_of(ours)
            return ours(input_ids=tokens.to(where), use_cache=False).logits.to(tokens.device)

    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is back in its mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def hooked_places(model: nn.Module) -> tuple[str, ...]:
    """The modules with hooks; libraries put harmless ones of their own there."""
    return tuple(
        name or type(model).__name__
        for name, module in model.named_modules()
        if any(
            not getattr(hook, "__module__", "").startswith(("transformers.", "accelerate."))
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        )
    )


def rotary_of(model: nn.Module) -> nn.Module | None:
    """A model's rotary module, rebuilt from its config; None with learned positions.

    `.to(dtype)` rounds a model's frequencies, and dynamic ones have a memory.
    """
    inner = next((m for m in model.modules() if hasattr(m, "rotary_emb")), None)
    rotary: Any = getattr(inner, "rotary_emb", None)
    while (wrapped := getattr(rotary, "_original_component", None)) is not None:
        rotary = wrapped
    if rotary is not None and hasattr(rotary, "config"):
        return type(rotary)(rotary.config)
    return rotary


def renew_rotary(model: nn.Module) -> None:
    """Undo the rounding that a cast does to rotary frequencies."""
    for module in model.modules():
        rotary: Any = getattr(module, "rotary_emb", None)
        if hasattr(rotary, "config") and not hasattr(rotary, "_original_component"):
            module.rotary_emb = type(rotary)(rotary.config).to(_device_of(model))


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device


def language_model(model: Any) -> Any:
    """A model itself, or the text part of a multimodal Gemma 3 as a causal language model that
    shares its weights."""
    if getattr(model.config, "model_type", None) != "gemma3":
        return model
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        text = Gemma3ForCausalLM(model.config.get_text_config())
    text.model = model.model.language_model
    text.lm_head = model.lm_head
    return text.eval()
