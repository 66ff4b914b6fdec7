"""One source: a checkpoint read out of a folder, the hub or a loaded model, with its own forward.

Hugging Face state dicts are read directly, so a loaded model that is given as a source is neither
changed nor kept.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from graftlens.model.arch import (
    FAMILIES,
    Architecture,
    PairError,
    UnsupportedArchitectureError,
    architecture,
)
from graftlens.model.quiet import quiet
from graftlens.model.tokenizers import read_tokenizer, unaltered
from graftlens.model.weights import OLD_BUFFERS, Weights, read_weights

#: token ids [batch, pos] and the dtype to run in -> logits [batch, pos, d_vocab]
Logits = Callable[[Int[Tensor, "batch pos"], torch.dtype], Float[Tensor, "batch pos d_vocab"]]


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


def read_checkpoint(name: str, path: str) -> Source:
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    config = read_config(name, path)
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
    source = read_transformers(name, model, path, copied=False)
    return replace(source, tokenizer=read_tokenizer(path))


def read_config(name: str, path: str) -> Any:
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

    logits = own_logits(model, copied)
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


def own_logits(model: Any, copied: bool) -> Logits:
    """A model's own forward pass; a `copied` model is somebody else's and stays as it is."""

    @torch.no_grad()
    def logits(
        tokens: Int[Tensor, "batch pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch pos d_vocab"]:
        ours = model
        if any(p.dtype != dtype for p in model.parameters()):
            # The caller's model stays as it is; our own may change, its tensors are read already.
            ours = (copy.deepcopy(model) if copied else model).to(dtype)
            renew_rotary(ours)
        was_training = ours.training
        try:
            ours.eval()
            where = _device_of(ours)
            return ours(input_ids=tokens.to(where), use_cache=False).logits.to(tokens.device)
        finally:
            ours.train(was_training)

    return logits


def renew_rotary(model: nn.Module) -> None:
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
