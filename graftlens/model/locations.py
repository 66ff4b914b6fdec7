"""Where a checkpoint is: a folder here, or a hub model that may exist."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlens.folder import read_json
from graftlens.model.arch import PairError
from graftlens.model.smollm2 import located

#: What stands between a hub model's id and one of its revisions: `org/model@step1000`.
REVISION = "@"

#: Files of the hub that are not read here, or not before the weights are.
_OTHER_FORMATS = ("*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.ot", "*.tflite")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")

#: Seconds that the hub has to answer whether it knows a model.
PROBE_SECONDS = 10.0


def location_of(
    what: str,
    given: str | Path,
    files: Sequence[str] = ("config.json",),
    *,
    weights: bool = True,
) -> str:
    """The folder, or the id of an existing hub model, that `given` names.

    The hub is asked once, without its client's retries, so a mistyped folder is reported at once.
    If the hub does not answer, a model that was downloaded before resolves to its folder in the
    local cache.

    Args:
        what: what is being looked for, for messages: ``source 'sft'``.
        given: a folder, a hub id, or a name that `located` knows.
        files: names of files of which a hub model has one or more.
        weights: of a revision of a hub model, whether to download its weights as well.

    Raises:
        PairError: neither a folder here nor a model of the hub.
    """
    name = located(str(given))
    if (revision := revision_of(name)) is not None:
        return str(_snapshot(what, *revision, weights=weights))
    if (gguf := gguf_of(name)) is not None:
        return _gguf_location(what, name, *gguf)
    here = os.path.expanduser(name)  # noqa: PTH111 (Path's raises where there is no such user)
    if os.path.isdir(here):  # noqa: PTH112 (Path's raises on names that are too long)
        return here
    if os.path.exists(here):  # noqa: PTH110
        raise PairError(f"{what}: {name} is a file. Give the folder that save_pretrained wrote.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise PairError(f"{what}: there is no folder {name}.")

    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise PairError(
            f"{what}: there is no folder {name!r}, and it cannot be a model of the hub, whose "
            "names are OWNER/NAME."
        ) from None
    cached = next((path.parent for file in files if (path := _cached(name, file))), None)
    neither = f"{what}: {name!r} is neither a folder here nor"
    why = ""
    if constants.HF_HUB_OFFLINE:
        why = (
            f"{neither} a model in the local cache, and HF_HUB_OFFLINE is set, so the hub is not "
            "asked. Check the folder's path, or download the model first."
        )
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name, files[0]), timeout=PROBE_SECONDS)
        except RepositoryNotFoundError:
            why = (
                f"{neither} a model that the hub shows you. Check the spelling; if the model is "
                "private or gated, log in with `hf auth login`."
            )
        except EntryNotFoundError:
            pass  # the model exists; the code that reads it reports what is missing
        except HfHubHTTPError as error:
            # A hub that is busy may still answer the loading code, which asks again.
            if error.response is None or error.response.status_code in (401, 403):
                why = (
                    f"{what}: the hub does not give out {name!r} ({_line(error)}). If the model is "
                    "gated, ask for access on its page and log in with `hf auth login`."
                )
        except Exception as error:  # each kind of network failure has its own class
            why = (
                f"{neither} a model in the local cache, and the hub could not be reached "
                f"({said(error)}). Check the folder's path or the connection."
            )
    if not why:
        return name
    if cached is None:
        raise PairError(why)
    return str(cached)  # downloaded before; asking for each of its files would take minutes


def revision_of(location: str | Path) -> tuple[str, str] | None:
    """A hub id and one of its revisions; None if no revision is named."""
    name, _, revision = str(location).partition(REVISION)
    path = os.path.expanduser(location)  # noqa: PTH111
    there = os.path.exists(path)  # noqa: PTH110
    return (name, revision) if revision and name.count("/") == 1 and not there else None


def _snapshot(what: str, name: str, revision: str, *, weights: bool) -> Path:
    """The folder of a revision in the local cache, to which it may be downloaded."""
    from huggingface_hub import snapshot_download

    left_out = [*_OTHER_FORMATS, *(() if weights else _WEIGHTS)]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=left_out))
    except Exception as error:  # of the hub client, the network or the cache
        raise PairError(
            f"{what}: the revision {revision!r} of {name} is not in the local cache, and could not "
            f"be downloaded ({said(error)})."
        ) from None


def known_revisions(what: str, name: str) -> list[str]:
    """The branches and tags of a hub model; those in the local cache if the hub does not answer.

    Raises:
        PairError: there are none.
    """
    from huggingface_hub import HfApi, constants, scan_cache_dir

    try:
        refs = HfApi().list_repo_refs(name)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    except Exception as error:  # each kind of network failure has its own class
        why = said(error)
    if os.path.isdir(constants.HF_HUB_CACHE):  # noqa: PTH112
        for repo in scan_cache_dir().repos:
            if repo.repo_id == name and repo.repo_type == "model":
                return sorted(repo.refs)
    raise PairError(
        f"{what}: the revisions of {name!r} are not in the local cache, and the hub did not list "
        f"them ({why})."
    )


def gguf_of(location: str | Path) -> tuple[str, str] | None:
    """The folder (or hub id) and the name of a GGUF file; None if no such file is named."""
    folder, _, file = str(location).rpartition("/")
    return (folder or ".", file) if file.lower().endswith(".gguf") else None


def _gguf_location(what: str, name: str, folder: str, file: str) -> str:
    here = os.path.expanduser(name)  # noqa: PTH111
    if os.path.isfile(here):  # noqa: PTH113
        return here
    if folder.startswith((".", "/", "~")) or folder.count("/") != 1:
        raise PairError(f"{what}: there is no file {name}.")
    return f"{location_of(what, folder, (file,))}/{file}"


def is_adapter(given: str | Path) -> bool:
    """Whether this is a folder with a PEFT adapter in it."""
    return os.path.isfile(os.path.join(os.path.expanduser(given), "adapter_config.json"))  # noqa: PTH111, PTH113, PTH118


def folder_of(location: str | Path) -> Path | None:
    """The folder with the checkpoint's files: itself, or a hub model's snapshot in the local
    cache."""
    path = os.path.expanduser(location)  # noqa: PTH111
    if (gguf := gguf_of(path)) is not None:
        return Path(gguf[0]) if os.path.isfile(path) else None  # noqa: PTH113
    if os.path.isdir(path):  # noqa: PTH112
        return Path(path)
    if (revision := revision_of(path)) is not None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(revision[0], "config.json", revision=revision[1])
        return Path(found).parent if isinstance(found, str) else None
    try:
        cached = _cached(str(location), "config.json")
    except ValueError:  # a name that no hub model can have
        return None
    return None if cached is None else cached.parent


def read_object(what: str, path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file, which holds an object of finite numbers.

    Raises:
        PairError: a file that is missing, of another encoding, not JSON, or with something else in
            it; the message names the file.
    """
    advice = "Save or download the checkpoint again."
    try:
        content = read_json(path, advice)
    except ValueError as error:
        raise PairError(f"{what}: {error}") from None
    if path.read_bytes().startswith(b"\xef\xbb\xbf"):
        raise PairError(
            f"{what}: {path} begins with a byte order mark, which transformers cannot read. "
            "Save it as UTF-8 without one."
        )
    if not isinstance(content, dict):
        raise PairError(f"{what}: {path} holds {_kind(content)}, not settings. {advice}")
    for name, value in _leaves(content):
        if isinstance(value, float) and not math.isfinite(value):
            raise PairError(f"{what}: {path} has {name}={json.dumps(value)}. {advice}")
    return content


def said(error: BaseException) -> str:
    """Another library's exception in one line, to be part of a message."""
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        inner = [_leaves(v, f"{name}.{k}" if name else k) for k, v in value.items()]
    elif isinstance(value, list):
        inner = [_leaves(v, f"{name}[{i}]") for i, v in enumerate(value)]
    else:
        return [(name, value)]
    return [leaf for leaves in inner for leaf in leaves]
