"""The result of a finetuning run: read from its folder, checked file by file, and repaired."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlens.checkpoints import (
    MARKER,
    DamagedError,
    foreign,
    is_identity,
    is_intact,
    is_ours,
    newest_complete,
    numbered,
    verify,
    write_folder,
)
from graftlens.folder import read_json
from graftlens.recipes import FinetuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        folder: the finetuned checkpoint or adapter, with tokenizer.
        losses: mean training loss of each optimizer step, in nats per token.
        perplexities: of the held-out texts before training and after each epoch; empty without.
        steps: optimizer steps.
        seconds: wall-clock seconds of training, over all attempts that reached the result.
        epoch: the epoch after which the model had these weights, counted from 1.
    """

    folder: Path
    losses: tuple[float, ...]
    perplexities: tuple[float, ...]
    steps: int
    seconds: float
    epoch: int

    @property
    def heldout_perplexity(self) -> float | None:
        """Perplexity of the finetuned model; None if nothing was held out."""
        return self.perplexities[self.epoch] if self.perplexities else None

    def line(self) -> str:
        """The result in one line."""
        line = f"{self.folder}: {self.steps} steps, loss {self.losses[0]:.3f} → "
        line += f"{self.losses[-1]:.3f} nats per token"
        if self.perplexities:
            before, after = self.perplexities[0], self.perplexities[self.epoch]
            line += f", held-out perplexity {before:.1f} → {after:.1f}"
            if self.epoch < len(self.perplexities) - 1:
                line += f" (kept: epoch {self.epoch} of {len(self.perplexities) - 1})"
        return line


def read_result(final: Path) -> FinetuneResult:
    """The result of a run, with every file checked.

    Args:
        final: the run's folder ``model``.

    Raises:
        DamagedError: a file is missing or has changed.
    """
    result = _result_of(final / "finetune.json")
    if (final / MARKER).is_file():
        verify(final)
    elif _version_of(final) is not None:
        raise DamagedError(f"{final / MARKER} is missing")
    return result


def _result_of(path: Path) -> FinetuneResult:
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        whole = read_json(path, "")
        record = whole["result"]
        if not is_identity(whole):
            raise TypeError("no run")
        return FinetuneResult(
            folder=path.parent,
            losses=tuple(map(float, record["losses"])),
            perplexities=tuple(map(float, record["perplexities"])),
            steps=int(record["steps"]),
            seconds=float(record["seconds"]),
            # Earlier releases kept the last one.
            epoch=int(record.get("epoch", whole["config"]["epochs"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = str(error).strip().rstrip(".") if isinstance(error, ValueError) else ""
        raise DamagedError(said or f"{path} does not have the run's result") from None


def _version_of(final: Path) -> str | None:
    """The release that wrote the result; None for those that wrote no checksums."""
    versions = read_json(final / "finetune.json", "").get("versions")
    return versions.get("graftlens") if isinstance(versions, dict) else None


def earlier_result(final: Path) -> FinetuneResult:
    """The result of a run of an earlier release, which did not record the config of its start.

    Raises:
        ValueError: it is not finished, so training might continue from a different start.
    """
    cannot = (
        f"{final.parent} was started by an earlier release, which did not record the config of "
        "the model that it starts from, so whether that is still the same is unknown."
    )
    if not final.exists():
        raise ValueError(
            f"{cannot} Its checkpoints can be used; to train, choose another output folder, or "
            "remove this one."
        )
    logger.warning("%s Its result is used unchanged; to train again, remove the folder.", cannot)
    return read_result(final)


def repaired(config: FinetuneConfig, identity: Mapping[str, Any]) -> FinetuneResult | None:
    """The result in the folder; a damaged one is rebuilt, at once or (None) from a checkpoint.

    Raises:
        DamagedError: there is nothing to rebuild it from.
    """
    final = config.output / "model"
    try:
        result = read_result(final)
    except DamagedError as error:
        if (found := foreign(final)) is not None:
            raise DamagedError(f"{error}. {found} is next to it: move it away first.") from None
        record = final / "finetune.json"
        kept = _weights_of(config, _result_of(record)) if is_intact(record) else None
        if kept is not None:
            logger.warning("%s: rebuilt from %s", error, kept)

            def write(folder: Path) -> None:
                verify(kept)
                shutil.copytree(kept, folder, dirs_exist_ok=True)
                shutil.copy2(record, folder / record.name)

            write_folder(final, write, run=identity)
            return read_result(final)
        if newest_complete(config.output / "checkpoints") is None:
            raise DamagedError(
                f"{error}, and there is no checkpoint to rebuild it from. Restore the file, or "
                f"remove {final} and run the same command again: it trains from the beginning."
            ) from None
        logger.warning("%s: rebuilt from the last checkpoint", error)
        return None
    check_kept(config, result.steps)
    return result


def _weights_of(config: FinetuneConfig, result: FinetuneResult) -> Path | None:
    """A folder with the weights that are the result, besides the result's own."""
    step = result.steps * result.epoch // config.epochs
    places = (
        config.output / "epochs" / f"epoch-{result.epoch}",
        config.output / "kept" / f"checkpoint-{step}",
    )
    return next((place for place in places if is_ours(place)), None)


def check_kept(config: FinetuneConfig, last: int) -> None:
    """Check that the weights that were kept up to a step are unchanged.

    Raises:
        DamagedError: some are not.
    """
    for number, path in numbered(config.output / "kept", "checkpoint").items():
        if number <= last and (path / MARKER).is_file():
            try:
                verify(path)
            except DamagedError as error:
                raise DamagedError(
                    f"{error}. Restore the file, or remove {path} to continue without these "
                    "weights."
                ) from None
