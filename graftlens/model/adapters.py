"""PEFT adapters as sources: put on the base, merged, and proved against PEFT's own forward."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graftlens.model.arch import PairError
from graftlens.model.source import (
    Source,
    open_model,
    own_logits,
    read_transformers,
    renew_rotary,
)


def read_adapter(name: str, folder: Path, base: Any) -> Source:
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
        model, _ = open_model(f"the base of source {name!r}", str(base))
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
    adapter = PeftModel.from_pretrained(widened(model), str(folder))
    return replace(read_peft(name, adapter, f"{folder} ({kind} adapter, merged)"), dtypes=dtypes)


def widened(model: Any) -> Any:
    """Half-precision weights in float32: adding an adapter in half precision would round it off."""
    half = any(torch.finfo(p.dtype).bits < 32 for p in model.parameters())
    if not half:
        return model
    renew_rotary(model.float())
    return model


def read_peft(name: str, adapter: Any, origin: str) -> Source:
    """Merge a PeftModel that is ours to change, and prove the merge against PEFT's own forward."""
    unmerged = copy.deepcopy(adapter)
    merged = read_transformers(name, adapter.merge_and_unload(), origin, copied=False)
    own = own_logits(unmerged, copied=False)
    return replace(merged, logits=own)
