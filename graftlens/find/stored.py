"""A localisation in a folder: whatever was computed is kept, so that a killed one goes on.

- ``localise.json``: what was asked, of which prompts and models;
- ``attribution/00000.parquet``, …: attributions, a file for a few prompts of the search side;
- ``continuations.json``: where texts judge, the texts that gradients are of;
- ``steps/NAME/``: every exact run is a sweep in a folder of its own (`graftlens.sweep.results`),
  with its shards, checksums and locks. The sweep of the found set has the trust report.

The search is the same, step for step, whenever it is given the same numbers, so resuming is running
it again: what the folder has is read, not computed. Several processes on one folder share the work.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from graftlens.find.asked import Asked
from graftlens.find.attribution import attribute
from graftlens.find.exact import exact_effects
from graftlens.find.localisation import numbered
from graftlens.find.rating import Rating
from graftlens.folder import (
    inside,
    json_digest,
    parse_json,
    read_text,
    refuse_differences,
)
from graftlens.graft import Graft
from graftlens.memory import affordable_rows
from graftlens.prompts import Prompt
from graftlens.sweep.config import Checked, NamedGraft
from graftlens.sweep.disk import (
    DamagedError,
    check_json,
    lock,
    sealed_json,
    unsealed,
    write,
    writing,
)
from graftlens.sweep.models import Loaded, Models
from graftlens.sweep.results import read_results, to_bytes
from graftlens.sweep.runner import fill, finish, prepare_sweep
from graftlens.sweep.texttables import read_texts

#: Prompts whose attributions are one file: what a kill costs.
BLOCK = 4

#: The file of reference continuations, where texts judge.
CONTINUATIONS = "continuations.json"

#: The step whose sweep has the trust report.
TRUSTED = "found"

Say = Callable[[str], None]


def record(
    out: Path, identity: Mapping[str, Any], loaded: Loaded, row_budget: int | None, say: Say
) -> int:
    """Note what is asked and of which models, or check that it is what the folder was started with.

    Args:
        out: the folder, which is ours.
        identity: what another call must agree with.
        loaded: the models.
        row_budget: the most rows per forward pass; None is what the free memory allows.
        say: called with what is waited for.

    Returns:
        The most rows per forward pass, which decides the last bits, as of the first call.

    Raises:
        ValueError: the folder holds another localisation, or other weights.
        FolderError: a folder that cannot be written.
    """
    path = out / "localise.json"
    model = loaded.model
    given = json.loads(json.dumps(dict(identity)))
    given["models"] = {
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "fingerprints": dict(loaded.fingerprints),
    }
    with writing(out):
        for name in ("locks", "attribution", "steps"):
            inside(out, name).mkdir(parents=True, exist_ok=True)
    with lock(out, "claim", say=say):
        there = _known(path)
        if there is None:
            rows = row_budget or affordable_rows(model.arch, model.cfg.device, model.cfg.dtype)
            content = sealed_json({"asked": given, "row_budget": rows})
            text = json.dumps(content, indent=1, ensure_ascii=False)
            write(out, path, text.encode())
            return rows
        refuse_differences(
            f"{out} holds another localisation",
            there["asked"],
            given,
            f"Choose another folder, use the settings that are there ({path}), or "
            "remove the folder.",
        )
        return int(there["row_budget"])


def _known(path: Path) -> dict[str, Any] | None:
    """The content of the record; None where there is none."""
    try:
        content = parse_json(read_text(path), path)
        check_json(content, required=True)
        return {"asked": content["asked"], "row_budget": content["row_budget"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove that file and run the same command again: what "
            "is finished is kept."
        ) from None


@dataclass(frozen=True, eq=False)
class InFolder:
    """Runs grafts as sweeps that a folder keeps.

    Attributes:
        out: the localisation's folder.
        checked: the sweep of all prompts; each step takes some of them.
        loaded: the models.
        base, full: names of the references in each step.
        rows: most rows per forward pass.
        progress, say: as in a sweep.
        rating: the measure of texts that judges, if one does: steps make texts alone then.
    """

    out: Path
    checked: Checked
    loaded: Loaded
    base: str
    full: str
    rows: int
    progress: bool
    say: Say
    rating: Rating | None = None

    def __call__(
        self, step: str, numbers: Sequence[int], grafts: Mapping[str, Graft]
    ) -> pd.DataFrame:
        folder = inside(self.out, "steps", step)
        config = self.checked.config.model_copy(
            update={"row_budget": self.rows, "grafts": dict(grafts), "grids": ()}
        )
        if config.outcomes is not None:  # texts are measured when they are read
            texts = config.outcomes.model_copy(update={"measures": {}})
            config = config.model_copy(update={"outcomes": texts})
        checked = replace(
            self.checked,
            config=config,
            prompts=tuple(self.checked.prompts[n] for n in numbers),
            dataset=tuple(self.checked.dataset[n] for n in numbers),
            grafts=tuple(NamedGraft.of(name, graft) for name, graft in grafts.items()),
            duplicates={},
            base=self.base,
            full=self.full,
            scored=self.rating is None,
        )
        measures = (*self.checked.asked, *self.checked.functions)
        prepare_sweep(checked, folder, measures=measures, say=self.say)
        models = Models(folder, config, say=self.say, held=self.loaded)
        fill(folder, models, measures, progress=self.progress, say=self.say)
        if step == TRUSTED:
            finish(folder, models, self.say, measures)
        if self.rating is None:
            table = read_results(folder)
        else:
            table = self.rating.cells(read_texts(folder))
        assert isinstance(table, pd.DataFrame)
        return table.assign(prompt=[numbers[n] for n in table["prompt"].tolist()])


@dataclass(frozen=True, eq=False)
class Attributions:
    """Attributions that a folder keeps, a few prompts at a time.

    Attributes:
        out: the localisation's folder.
        loaded: the models.
        asked: the question, of all prompts.
        options: what `attribute` and `exact_effects` are given.
        key: a hash of what decides these numbers.
        say: called with messages.
        continuations: what follows each prompt, where texts judge.
    """

    out: Path
    loaded: Loaded
    asked: Asked
    options: Mapping[str, Any]
    key: str
    say: Say
    continuations: tuple[str, ...] | None = None

    def __call__(self, numbers: Sequence[int], *, steps: int | str) -> pd.DataFrame:
        """The attributions of some prompts, by their own numbers."""
        options = {**self.options, "by": self.asked.by, "steps": steps}
        return self._all("", numbers, attribute, options)

    def effects(self, numbers: Sequence[int]) -> pd.DataFrame:
        """The exact effects of whole sites."""
        return self._all("exact-", numbers, exact_effects, self.options)

    def _all(
        self,
        kind: str,
        numbers: Sequence[int],
        compute: Callable[..., pd.DataFrame],
        options: Mapping[str, Any],
    ) -> pd.DataFrame:
        prompts = [one.scored.prompt for one in self.asked.prompts]
        found, passes = [], 0
        for start in range(0, len(numbers), BLOCK):
            some = numbers[start : start + BLOCK]
            name = f"{kind}{start // BLOCK:05d}"
            path = inside(self.out, "attribution", f"{name}.parquet")
            stored = _read(path, self.key)
            if stored is None:
                with lock(self.out, f"attribution-{name}", say=self.say):
                    stored = _read(path, self.key)  # another process may have computed it
                    if stored is None:
                        self.say(f"{compute.__name__}: prompts {some[0]} to {some[-1]}")
                        chosen = [prompts[n] for n in some]
                        if self.continuations is not None:
                            after = [self.continuations[n] for n in some]
                            options = {**options, "continuations": after}
                        with warnings.catch_warnings():
                            # Of all prompts together, what was found says it (`Found.notes`).
                            warnings.filterwarnings("ignore", message="the scores of")
                            made = compute(self.loaded.model, chosen, self.asked.source, **options)
                        write(self.out, path, _to_bytes(made, self.key))
                        stored = _read(path, self.key)
            assert stored is not None
            table = numbered(stored, some)
            passes += int(table.attrs["passes"])
            found.append(table)
        whole = pd.concat(found, ignore_index=True)
        whole.attrs = {"passes": passes}
        return whole


def continuations(
    out: Path,
    loaded: Loaded,
    rating: Rating,
    prompts: Sequence[Prompt],
    source: str,
    given: str,
    key: str,
    say: Say,
) -> tuple[str, ...]:
    """The reference continuations of a localisation whose judge is a text, which its folder keeps.

    Args:
        out: the folder.
        loaded: the models.
        rating: the judge.
        prompts, source, given: as in `Rating.continuations`.
        key: a hash of what decides them.
        say: called with what is waited for.
    """
    path = inside(out, CONTINUATIONS)
    with lock(out, "continuations", say=say):
        with suppress(OSError, ValueError, DamagedError, TypeError, KeyError):
            content = parse_json(read_text(path), path)
            check_json(content, required=True)
            if content["key"] == key:
                return tuple(content["texts"])
        found = rating.continuations(loaded.model, prompts, source, given)
        content = sealed_json({"key": key, "texts": list(found)})
        write(out, path, json.dumps(content, indent=1, ensure_ascii=False).encode())
        return found


def _to_bytes(table: pd.DataFrame, key: str) -> bytes:
    """A table with its key; units, which are numbers and texts, as text."""
    units = [None if pd.isna(unit) else str(unit) for unit in table["unit"]]
    kept = table.assign(unit=pd.Series(units, index=table.index, dtype=object))
    kept.attrs = {}
    rows = pa.Table.from_pandas(kept, preserve_index=False)
    about = {"graftlens.key": key, "passes": str(table.attrs.get("passes", 0))}
    pandas = rows.schema.metadata or {}
    return to_bytes(rows.replace_schema_metadata({**pandas, **about}))


def _read(path: Path, key: str) -> pd.DataFrame | None:
    """A stored table; None where there is none, or a damaged one, or one of other numbers."""
    with suppress(OSError, pa.ArrowException, DamagedError):
        rows = pq.read_table(pa.BufferReader(unsealed(path.read_bytes(), required=True)))
        about = rows.schema.metadata or {}
        if about.get(b"graftlens.key") != key.encode():
            return None
        table = rows.to_pandas()
        units = [_unit(unit) for unit in table["unit"]]
        table["unit"] = pd.Series(units, index=table.index, dtype=object)
        table["layer"] = table["layer"].astype("Int64")
        table.attrs = {"passes": int(about[b"passes"])}
        return table
    return None


def _unit(text: Any) -> Any:
    if text is None or pd.isna(text):
        return pd.NA
    return int(text) if str(text).isdecimal() else text


def key_of(identity: Mapping[str, Any], loaded: Loaded) -> str:
    """A hash of what decides attributions."""
    about = [json.loads(json.dumps(dict(identity))), dict(loaded.fingerprints)]
    return json_digest([*about, str(loaded.model.cfg.dtype)])
