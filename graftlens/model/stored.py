"""What a checkpoint's files hold: each tensor's name, dtype and shape, and its values on demand.

Config files also name a dtype, and are often wrong; the weight files decide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlens.model.arch import PairError
from graftlens.model.locations import read_object, said
from graftlens.model.weights import OLD_BUFFERS

_ADVICE = "The files may be incomplete: save or download them again."

#: safetensors' names for the dtypes that weights can have here.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file.
        dtype: its dtype as torch or safetensors names it.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _names(config: Any) -> tuple[str, ...]:
    """The files that transformers looks for, in its order."""
    from transformers import utils

    named = getattr(config, "transformers_weights", None)
    if isinstance(named, str):
        return (named,)
    safe = (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME)
    return (*safe, utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME)


def has_weights(folder: Path, config: Any) -> bool:
    """Whether a folder has weights, and not a config and a tokenizer alone."""
    return any((folder / name).exists() for name in _names(config))


def weight_files(what: str, location: str, folder: Path | None, config: Any) -> list[Path]:
    """The files that transformers reads a checkpoint's weights from; the hub's are downloaded.

    Args:
        what: whose weights, for messages.
        location: a folder or a hub id.
        folder: the folder, or the hub model's snapshot in the local cache.
        config: the Hugging Face config.

    Raises:
        PairError: a folder without weights, a damaged index, or a shard that is missing.
    """
    from transformers.utils import cached_file

    # A hub model's files are all from the same commit as its config.
    commit = {} if folder is None or str(folder) == location else {"revision": folder.name}

    def get(name: str) -> Path | None:
        if not commit and folder is not None:
            return folder / name if (folder / name).is_file() else None
        try:
            found = cached_file(location, name, **commit)
        except OSError as error:
            if "connect" in str(error):
                raise PairError(
                    f"{what}: {name} of {location} was not downloaded. {error}"
                ) from None
            return None
        return Path(found) if found else None

    names = _names(config)
    here = [] if folder is None else [folder / name for name in names if (folder / name).is_file()]
    found = here[0] if here else next((path for n in names if (path := get(n)) is not None), None)
    if found is None:
        raise PairError(
            f"{what}: {location} has a config but no weights ({' or '.join(names)}). {_ADVICE}"
        )
    if not found.name.endswith(".index.json"):
        return [found]
    index = read_object(what, found)
    shards = index.get("weight_map")
    if not (
        isinstance(shards, dict)
        and all(isinstance(shard, str) and shard for shard in shards.values())
        and isinstance(index.get("metadata"), dict)
    ):
        raise PairError(
            f"{what}: {found} does not say which file has which tensor (weight_map, along with "
            f"metadata). {_ADVICE}"
        )
    if not shards:
        raise PairError(f"{what}: {found} does not name any tensor. {_ADVICE}")
    files = []
    for shard in sorted(set(shards.values())):
        file = get(shard)
        if file is None:
            raise PairError(f"{what}: {found.parent / shard} is missing. {_ADVICE}")
        files.append(file)
    return files


def stored_tensors(what: str, files: list[Path]) -> dict[str, Stored]:
    """Name -> what the files hold, in their own words; no values are read.

    Raises:
        PairError: a file that is truncated or damaged.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(file, "pt") as content:
                    for name in content.keys():  # noqa: SIM118 (it has no __iter__)
                        part = content.get_slice(name)
                        found[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
            else:
                for name, tensor in _pickled(file, "meta").items():
                    found[name] = Stored(file, _short(tensor.dtype), tuple(tensor.shape))
        except Exception as error:  # both formats' readers raise many kinds of errors
            # torch's own message about pickles advises running what is in them.
            why = said(error) if file.suffix == ".safetensors" else type(error).__name__
            wrong = f"{what}: {file} could not be read ({why})"
            raise PairError(f"{wrong}. {_ADVICE}") from None
    return found


def stored_dtypes(what: str, stored: Mapping[str, Stored]) -> tuple[torch.dtype, ...]:
    """The dtypes of the weights in the files.

    Raises:
        PairError: quantised weights: their numbers are meaningful only with the scales that the
            missing `quantization_config` would name.
    """
    dtypes: set[torch.dtype] = set()
    for name, tensor in stored.items():
        if name.endswith((*OLD_BUFFERS, ".position_ids")):
            continue
        dtype = _FLOATS.get(tensor.dtype, getattr(torch, tensor.dtype, None))
        if dtype is None or dtype not in _FLOATS.values():
            raise PairError(
                f"{what}: {tensor.file} holds {name} as {tensor.dtype}: quantised weights cannot "
                "be grafted exactly. Give the checkpoint that they were made from, or one that was "
                "dequantised."
            )
        dtypes.add(dtype)
    return tuple(sorted(dtypes, key=str))


def widest(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """The narrowest dtype that holds every number of all of them exactly."""
    return reduce(torch.promote_types, dtypes, dtypes[0]) if dtypes else torch.float32


def check_loaded(
    what: str, stored: Mapping[str, Stored], state: Mapping[str, Tensor], prefix: str
) -> None:
    """Compare the tensors that transformers loaded with those in the files.

    Args:
        what: whose weights, for messages.
        stored: what the files hold.
        state: the loaded model's tensors.
        prefix: the name of the model's body, which some files leave out of their names.

    Raises:
        PairError: a tensor that was rounded or changed on the way.
    """
    for name, tensor in _values(stored):
        known = [name, f"{prefix}.{name}", f"model.{name}", name.removeprefix(f"{prefix}.")]
        loaded = next((state[n] for n in known if n in state), None)
        if loaded is None or loaded.shape != tensor.shape or name.endswith(OLD_BUFFERS):
            continue  # renamed or dropped: the code that reads the weights reports what is missing
        wide = torch.promote_types(tensor.dtype, loaded.dtype)
        if not torch.equal(tensor.to(loaded.device, wide), loaded.to(wide)):
            raise PairError(
                f"{what}: {name} was loaded with different numbers from those that "
                f"{stored[name].file} holds ({stored[name].dtype} there, {_short(loaded.dtype)} "
                "loaded). This checkpoint is not supported exactly. Please report its config."
            )


def _values(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(name)
    for file, names in by_file.items():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                for name in names:
                    yield name, content.get_tensor(name)
        else:
            yield from _pickled(file, "cpu").items()


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before torch 1.6 cannot be mapped.
        content = torch.load(file, map_location=device, weights_only=True)
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
