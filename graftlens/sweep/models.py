"""The models of a sweep: loaded one at a time, recorded in its folder, and recognised when it is
resumed."""

import contextlib
import ctypes
import gc
import io
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlens.folder import differences, file_digest, refusal
from graftlens.memory import affordable_cache, affordable_rows
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.locations import folder_of
from graftlens.references import COMMON_TOKENS
from graftlens.sweep.config import SweepConfig
from graftlens.sweep.disk import lock, write
from graftlens.sweep.prepared import Prepared
from graftlens.sweep.results import Manifest, read_manifest

Say = Callable[[str], None]

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
    def of(
        cls, config: SweepConfig, device: str | None = None, place: str | None = None
    ) -> "Loaded":
        """Load the models of a config; `place` is that of a member, where there are several.

        Raises:
            ValueError: models that are not a pair.
        """
        locations = config.locations(place)
        files = files_of(locations)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            model = GraftedTransformer.from_pretrained(locations, device=device, **config.loading())
        return cls(model, said.getvalue().strip(), files, model.fingerprints())


class Models:
    """What a sweep runs: its model, or the models of its members, of which one is held at a time.

    Attributes:
        manifest: the sweep's, with all that is recorded of models so far.
        number: the member whose model is held; 0 without members.
        prepared: the prompts' tokens for that model.
    """

    prepared: Prepared

    def __init__(
        self,
        out: Path,
        config: SweepConfig,
        device: str | None = None,
        say: Say = print,
        held: Loaded | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            out: the sweep's folder.
            config: its config.
            device: where to run; by default the GPU if there is one, else the CPU.
            say: called with what loading reports.
            held: what is loaded already, of a sweep without members.
        """
        self._out, self._config, self._device, self._say = out, config, device, say
        self.manifest = read_manifest(out)
        self.number = 0
        self._held: GraftedTransformer | None = None
        if held is not None:
            self._hold(held, 0)

    def __call__(self, number: int) -> GraftedTransformer:
        """The model of a member; the one before is forgotten first, so that no two are in memory.

        Raises:
            ValueError: other weights than the sweep was started with.
        """
        if self._held is None or self.number != number:
            self._held = None
            gc.collect()  # a model is held by its own hooks
            members = self.manifest.members
            with _apart() if members else contextlib.nullcontext():
                loaded = Loaded.of(self._config, self._device, _place(self.manifest, number))
            self._say(f"{members[number]['name']}: {loaded.said}" if members else loaded.said)
            self._hold(loaded, number)
        assert self._held is not None
        return self._held

    def is_recorded(self, number: int) -> bool:
        """Whether the folder says which models of a member are run."""
        return bool(_recorded(self.manifest, number))

    def _hold(self, loaded: Loaded, number: int) -> None:
        config, model = self._config, loaded.model
        self.manifest = recorded(self._out, loaded, config, self._say, number)
        self.prepared = Prepared(
            model.tokenizer,
            model.arch,
            model.prepends_bos(config.prepend_bos),
            config.metrics.answers,
            config.metrics.distractors,
        )
        self._held, self.number = model, number


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Within, what takes a MiB or more is allocated apart from the heap, and goes back to the
    system when it is freed. On the heap of GNU's allocator the weights of one model after another
    leave gaps into which the next one's do not fit."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library, (apart_from, trim_from) = ctypes.CDLL(None), (-3, -1)  # numbers of malloc.h
    library.mallopt(apart_from, 1 << 20)
    try:
        yield
    finally:  # what these come to by themselves while a model runs
        library.mallopt(apart_from, 32 << 20)
        library.mallopt(trim_from, 64 << 20)


def unchanged(config: SweepConfig, manifest: Manifest, number: int) -> bool:
    """Whether no file of a member's models has been written since they were recorded."""
    locations = config.locations(_place(manifest, number))
    there = _recorded(manifest, number).get("files")
    # Earlier releases recorded less about each file.
    return there in (files_of(locations), files_of(locations, digests=False))


def _place(manifest: Manifest, number: int) -> str | None:
    """Where a member is; None in a sweep without any."""
    return str(manifest.members[number]["place"]) if manifest.members else None


def _recorded(manifest: Manifest, number: int) -> Mapping[str, Any]:
    """What is recorded of a member's models; empty if nothing is."""
    models = manifest.models or {}
    if not manifest.members:
        return models
    found: Mapping[str, Any] = models.get("members", {}).get(manifest.members[number]["name"], {})
    return found


def recorded(out: Path, loaded: Loaded, config: SweepConfig, say: Say, number: int = 0) -> Manifest:
    """Record which models run, or check that they are those that the folder was started with.

    Raises:
        ValueError: other weights than the sweep was started with.
    """
    model = loaded.model
    with lock(out, "claim", say=say):
        manifest = read_manifest(out)
        before = manifest.models or {}
        dtype = str(model.cfg.dtype).removeprefix("torch.")
        given = {"dtype": dtype, "fingerprints": dict(loaded.fingerprints)}
        settings = model.settings()
        there = _recorded(manifest, number)
        if there:
            known = {"dtype": before["dtype"], "fingerprints": there["fingerprints"]}
            if lines := differences(known, given):
                # The config's own settings say more than hashes that follow from them.
                lines = differences(there["settings"], settings) or lines
                advice = "Restore the weights that it was started with, or choose another folder."
                raise ValueError(refusal(f"{out} holds results of other weights", lines, advice))
        # Batches are divided in the same way in every worker and after every kill: they decide the
        # last bits.
        budget = manifest.row_budget or config.row_budget
        budget = budget or affordable_rows(model.arch, model.cfg.device, model.cfg.dtype)
        common = {"dtype": dtype, "row_budget": budget, "scheme": FINGERPRINTS}
        if config.outcomes is not None:
            cached = manifest.token_budget or config.outcomes.token_budget
            common["token_budget"] = cached or affordable_cache(
                model.arch, model.cfg.device, model.cfg.dtype
            )
        if model.vocabularies.differ:
            common[COMMON_TOKENS] = model.vocabularies.common
        own: dict[str, Any] = {
            "fingerprints": given["fingerprints"],
            "pair_check": there.get("pair_check", loaded.said),
            "settings": settings,
            "files": loaded.files,
            "differences": model.differences.to_dict("records"),
        }
        if manifest.members:
            name = manifest.members[number]["name"]
            own = {"members": {**before.get("members", {}), name: own}}
        ours = replace(manifest, models=common | own)
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
