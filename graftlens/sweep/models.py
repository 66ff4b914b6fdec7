"""The models of a sweep: loaded once, recorded in its folder, and recognised when it is resumed."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlens.folder import differences, file_digest, refusal
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.locations import folder_of
from graftlens.references import COMMON_TOKENS
from graftlens.sweep.config import SweepConfig
from graftlens.sweep.disk import lock, write
from graftlens.sweep.memory import affordable_rows
from graftlens.sweep.results import Manifest, read_manifest

#: How models' fingerprints are made; the number changes with what they cover.
FINGERPRINTS = 2


@dataclass(frozen=True, eq=False)
class Loaded:
    """A config's models, and what folders record of them.

    Attributes:
        model: the grafted model.
        said: what loading said.
        files: what `files_of` tells of the sources' files, as they were before.
        fingerprints: the sources'.
    """

    model: GraftedTransformer
    said: str
    files: Any
    fingerprints: Mapping[str, str]

    @classmethod
    def of(cls, config: SweepConfig, device: str | None = None) -> "Loaded":
        """Load the models of a config.

        Raises:
            ValueError: models that are not a pair.
        """
        files = files_of(config.locations())
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            model = GraftedTransformer.from_pretrained(
                config.locations(), device=device, **config.loading()
            )
        return cls(model, said.getvalue().strip(), files, model.fingerprints())


def recorded(
    out: Path, loaded: Loaded, config: SweepConfig, say: Callable[[str], object]
) -> Manifest:
    """Record which models run, or check that they are those that the folder was started with.

    Raises:
        ValueError: other weights than the sweep was started with.
    """
    model = loaded.model
    with lock(out, "claim", say=say):
        manifest = read_manifest(out)
        given = {
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "fingerprints": dict(loaded.fingerprints),
        }
        settings = model.settings()
        there = manifest.models
        if there is None:
            # Batches are divided in the same way in every worker and after every kill: they decide
            # the last bits.
            budget = config.row_budget or affordable_rows(
                model.arch, model.cfg.device, model.cfg.dtype
            )
            found = {"row_budget": budget, "pair_check": loaded.said}
        else:
            known = {name: there[name] for name in given}
            if lines := differences(known, given):
                # The config's own settings say more than hashes that follow from them.
                lines = differences(there["settings"], settings) or lines
                advice = "Restore the weights that it was started with, or choose another folder."
                raise ValueError(refusal(f"{out} holds results of other weights", lines, advice))
            found = {name: there[name] for name in ("row_budget", "pair_check")}
        about = {"scheme": FINGERPRINTS, "settings": settings, "files": loaded.files}
        about["differences"] = model.differences.to_dict("records")
        if model.vocabularies.differ:
            about[COMMON_TOKENS] = model.vocabularies.common
        ours = replace(manifest, models=given | found | about)
        if ours != manifest:
            write(out, out / "sweep.json", ours.to_json().encode())
        return ours


def files_of(
    sources: Mapping[str, Any], *, digests: bool = True
) -> dict[str, dict[str, list[int | str]]]:
    """Source -> size in bytes and time of change (ns) of each file of its folder, if it has one.

    For small files, which may be edited within the clock's resolution, also the SHA-256.
    """
    folders = {name: folder_of(str(source)) for name, source in sources.items()}
    return {
        name: {
            path.name: [
                *(path.stat().st_size, path.stat().st_mtime_ns),
                *([file_digest(path)] if digests and path.stat().st_size < 1 << 16 else []),
            ]
            for path in sorted(folder.iterdir())
            if path.is_file()
        }
        for name, folder in folders.items()
        if folder is not None
    }
