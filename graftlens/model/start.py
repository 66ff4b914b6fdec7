"""The model that finetuning starts from: loaded in float32, and checked before the first step."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from graftlens.components import Component
from graftlens.model.arch import FAMILIES, supported
from graftlens.model.locations import is_adapter, location_of
from graftlens.model.source import open_config, open_model, renew_rotary
from graftlens.model.tokenizers import read_tokenizer

# What each name of `freeze` holds.
FROZEN = {
    "embed": (Component.EMBED, Component.POS_EMBED),
    "unembed": (Component.UNEMBED,),
}

# Modules and buffers with a row for each position, in families that are not graftlens's own.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions?|pos(ition)?_emb\w*)(\.|$)")


def load_start(location: str) -> Any:
    """The causal language model of a folder or a hub id, in float32.

    What the files hold in float32 arrives unchanged, whatever dtype ``config.json`` names.

    Raises:
        ValueError: a model that cannot be loaded whole: files missing or damaged, tensors missing,
            unknown or quantised, code of its own. The message says which.
    """
    with _named(location) as what:
        return open_model(what, location, torch.float32, any_family=True)[0]


def load_tokenizer(location: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    with _named(location) as what:
        path = location_of(what, location)
        open_config(what, path, any_family=True)  # which decides what kind of tokenizer it is
        found = read_tokenizer(path)
    if found is None:
        raise ValueError(
            f"model={location!r} has no tokenizer (no tokenizer.json). Save the model's own there: "
            "tokenizer.save_pretrained(folder)."
        )
    return found


@contextlib.contextmanager
def _named(location: str) -> Iterator[str]:
    """The name of the setting, with which a refusal begins."""
    what = f"model={location!r}"
    if is_adapter(location):
        raise ValueError(
            f"{what} is a PEFT adapter. Finetune a whole model: train that adapter with lora: "
            "{merge: true}, or save it merged (merge_and_unload in peft)."
        )
    try:
        yield what
    except ValueError as error:
        if str(error).startswith(what):
            raise
        raise ValueError(f"{what}: {error}") from error


def check_weights(model: Any) -> None:
    """Bring the model to float32, and check that its numbers are finite.

    Raises:
        ValueError: a tensor that is not finite.
    """
    if any(tensor.dtype != torch.float32 for tensor in model.parameters()):
        model.float()
        renew_rotary(model)  # a cast of the whole model has rounded its frequencies
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"the start model's weights are not finite: {name} has {count} of "
                f"{tensor.numel()} numbers that are NaN or infinite. Save or download the model "
                "again."
            )


def fixed_positions(model: Any) -> int | None:
    """How many positions the model has weights or tables for; None if it computes any position."""
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is not None:
        fixed = Component.POS_EMBED in family.layout.modules
    else:
        named = (*model.named_parameters(), *model.named_buffers())
        fixed = any(_POSITIONS.search(name) for name, _ in named)
    return getattr(config, "max_position_embeddings", None) if fixed else None


def check_tokens(model: Any, rows: Sequence[Sequence[int]], named: Callable[[int], str]) -> None:
    """Check that the model embeds every token.

    Args:
        model: a Hugging Face causal language model.
        rows: token ids, a list per text.
        named: what to call the text of that index.

    Raises:
        ValueError: a token beyond the embedding.
    """
    size = model.get_input_embeddings().weight.shape[0]
    for index, row in enumerate(rows):
        if (highest := max(row, default=0)) >= size:
            raise ValueError(
                f"{named(index)} has token {highest}, but the model embeds {size} tokens (0 to "
                f"{size - 1}). Use the model's own tokenizer, or resize the embedding "
                "(model.resize_token_embeddings) and save the model."
            )


def frozen_modules(model: Any, freeze: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """Names of the modules that `freeze` selects.

    Args:
        model: a Hugging Face causal language model.
        freeze: names of `FROZEN`.
        targets: modules that get an adapter.

    Raises:
        ValueError: an unknown family; half of a tied pair; an adapter on a frozen module.
    """
    if not freeze:
        return []
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"freeze={list(freeze)}: the embeddings of model_type "
            f"{model.config.model_type!r} are not known. Known: {' '.join(supported())}. Leave "
            "freeze out."
        )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied and set(freeze) != set(FROZEN):
        raise ValueError(
            f"freeze={list(freeze)}: embed and unembed are one tensor in this model (tied "
            "embeddings), so one cannot be frozen without the other. Write freeze=[embed, "
            "unembed], or leave it out."
        )
    wanted = [component for name in freeze for component in FROZEN[name]]
    modules = [family.layout.modules[c] for c in wanted if c in family.layout.modules]
    for target, _ in _targeted(targets, modules):
        raise ValueError(
            f"lora.target_modules names {target!r}, which freeze={list(freeze)} keeps unchanged. "
            "Leave it out of one of them."
        )
    return modules


def check_targets(model: Any, targets: str | Sequence[str], *, merge: bool) -> None:
    """Refuse an adapter on a module that does not exist, or that cannot be merged: on a weight that
    two modules share, merging would also change the other one.

    Raises:
        ValueError: there is one.
    """
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0])
    shared = [names for names in owners.values() if merge and len(names) > 1]
    tied = {name: names for names in shared for name in names}
    for target, name in _targeted(targets, tied):
        others = " and ".join(other for other in tied[name] if other != name)
        raise ValueError(
            f"lora.target_modules names {target!r}, whose weight is also that of {others} (tied "
            "weights): an adapter on one of them cannot be saved merged. Leave it out, or save the "
            "adapter (lora: {merge: false})."
        )
    modules = [name for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not any(True for _ in _targeted((target,), modules)):
            known = dict.fromkeys(
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if getattr(module, "weight", None) is not None and module.weight.ndim == 2
            )
            raise ValueError(
                f"lora.target_modules names {target!r}, which this model does not have. Its "
                f"modules with a matrix: {' '.join(known)}."
            )


def _targeted(targets: str | Sequence[str], modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(target, module) for each of these modules that gets an adapter, as peft reads targets."""
    if isinstance(targets, str):
        return  # all-linear leaves embeddings and unembedding out
    for target in targets:
        for name in modules:
            if f".{name}".endswith(f".{target}"):
                yield target, name


def with_adapters(model: Any, lora: Any) -> Any:
    """The model with new adapters, as `graftlens.recipes.LoraSettings` describe them."""
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        ),
    )


def save_adapter(adapter: Any, folder: Path, base: str) -> None:
    """Write an adapter's folder, as PEFT reads it.

    Args:
        adapter: the PeftModel.
        folder: where to write.
        base: the location of the model that it was put on, which the folder names.
    """
    for config in adapter.peft_config.values():
        config.base_model_name_or_path = base
    adapter.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in


def weight_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
