"""The texts of a sweep: generated shard by shard, then measured, and read as one table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from graftlens.folder import json_digest
from graftlens.graft import Graft
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.outcomes.drawing import Drawing
from graftlens.outcomes.rates import measured
from graftlens.outcomes.texts import Sampler, right_of
from graftlens.prompts import Prompt
from graftlens.references import COLUMNS as REFERENCES
from graftlens.references import MEMBERS
from graftlens.sweep.disk import DamagedError, write
from graftlens.sweep.results import (
    ROUND,
    TEXTS,
    Manifest,
    empty_of,
    read_manifest,
    read_prompts,
    revived,
    tables_of,
)
from graftlens.sweep.shards import parquet, to_bytes

#: What is measured of the texts, in the sweep's folder.
MEASURED = "measured.parquet"

#: What tells the rows of a table of texts apart.
_ROW = (ROUND, "prompt", "graft", "sample")

#: The columns of a table of texts before and after those of its measures.
_BEFORE = (
    *("prompt", "graft", "rule", *REFERENCES, "template", "dataset", "prompt_text"),
    *("answer", "answers", "sample", "text", "tokens", "logprob", "stop"),
)
_AFTER = ("reason",)


class TextShards:
    """Computes shards of texts; shards of the same grafts share their plans."""

    def __init__(
        self,
        manifest: Manifest,
        prompts: Mapping[int, Prompt],
        blocks: Sequence[Mapping[int, Prompt]],
        grafts: Mapping[str, Graft],
        drawing: Drawing,
        say: Callable[[str], None],
    ) -> None:
        """What a prepared sweep holds; `blocks` are those of its prompts."""
        self.shards, self.drawing, self._say = manifest.text_shards, drawing, say
        self._grafts, self._names = dict(grafts), list(grafts)
        order = [number for block in blocks for number in block]
        ends = np.cumsum([0, *manifest.text_blocks]).tolist()
        self._blocks = [
            {number: prompts[number] for number in sorted(order[low:high])}
            for low, high in itertools.pairwise(ends)
        ]
        self._held: tuple[tuple[int, range], Sampler] | None = None

    def forget(self) -> None:
        """Let go of the model."""
        self._held = None

    def compute(
        self,
        shard: int,
        model: Callable[[int], GraftedTransformer],
        advance: Callable[[int], None],
        **options: Any,
    ) -> bytes:
        """The bytes of a shard's file.

        Args:
            shard: its number.
            model: gives a member's.
            advance: told how many texts are finished.
            options: of `Sampler`.
        """
        number, (block, own) = self.shards.round_of(shard), self.shards.place(shard)
        if self._held is None or self._held[0] != (number, own):
            self.forget()
            grafts = {self._names[place]: self._grafts[self._names[place]] for place in own}
            sampler = Sampler(model(number), grafts, self.drawing, say=self._say, **options)
            self._held = (number, own), sampler
        table = self._held[1].table(self._blocks[block], advance)
        places = {name: place for place, name in enumerate(self._names)}
        stored = table[TEXTS.names].assign(graft=table["graft"].map(places))
        rows = pa.Table.from_pandas(stored, schema=TEXTS, preserve_index=False)
        return self.shards.to_bytes(rows, shard)


def read_texts(out: Path | str) -> pd.DataFrame:
    """The texts of a sweep with `outcomes`, one row per (prompt, graft, sample).

    Args:
        out: the sweep's folder. If it is not finished, the existing rows are read, and a warning
            says what is missing.

    Returns:
        The columns of `graftlens.outcomes.sample`, with `dataset`; before them `member` and `step`
        where a source stands for several models; and before `reason` those of `outcomes.measured`,
        once the sweep has measured its texts. Rows are sorted by member, prompt, graft (as in the
        config) and sample. It is what `outcomes.rate`, `differences` and `divergence` take.

    Raises:
        ValueError: a folder without a sweep, or a sweep without texts.
    """
    out = Path(out).expanduser()
    manifest = read_manifest(out)
    if not len(manifest.text_shards):
        raise ValueError(
            f"{out} has no texts: its config has no outcomes. Use read_results for its cells."
        )
    table = _stored(out, manifest)
    values = _read_measured(out, manifest, table)
    found = _joined(out, manifest, table)
    if values is not None:
        for name in values.column_names[len(_ROW) :]:
            column = _missing_as_none(values.column(name).to_pandas())
            found.insert(len(found.columns) - len(_AFTER), name, column)
    return found


def measure_texts(
    out: Path, manifest: Manifest, measures: Mapping[str, Measure]
) -> pd.DataFrame | None:
    """Measure the texts of a sweep whose shards all exist, unless that is done; the table of texts,
    with its measures, if there are any texts."""
    if not len(manifest.text_shards):
        return None
    table = _stored(out, manifest)
    if measures and _read_measured(out, manifest, table) is None:
        found = _joined(out, manifest, table)
        before = set(found.columns)
        try:
            whole = measured(found, measures, trained=manifest.trained or None)
        except ValueError as error:
            raise ValueError(
                f"{error} All texts are in {out}: outcomes.measured(read_texts({str(out)!r}), …) "
                "measures them in Python, by whatever function."
            ) from error
        values = {n: pa.array(whole[n], from_pandas=True) for n in whole if n not in before}
        rows = table.select(list(_ROW))
        for name, column in values.items():
            rows = rows.append_column(name, column)
        key = {"graftlens.key": _key(manifest)}
        write(out, out / MEASURED, to_bytes(rows.replace_schema_metadata(key)))
    return read_texts(out)


def are_measured(out: Path, manifest: Manifest) -> bool:
    """Whether nothing is left to measure."""
    asked = (manifest.config.get("outcomes") or {}).get("measures")
    if not asked or not len(manifest.text_shards):
        return True
    return _read_measured(out, manifest, _stored(out, manifest)) is not None


def counted(texts: pd.DataFrame | None) -> dict[str, Any]:
    """What ``done.json`` says of texts."""
    if texts is None:
        return {}
    reasons = texts["reason"].value_counts()
    not_run = {str(reason): int(count) for reason, count in reasons.items()}
    return {"texts": len(texts), "texts_not_run": not_run}


def _key(manifest: Manifest) -> str:
    """What the measured values bear: the texts, and what is measured of them."""
    return json_digest([manifest.text_shards.keys, manifest.identity.get("outcomes")])


def _stored(out: Path, manifest: Manifest) -> pa.Table:
    names = TEXTS.names
    shards = manifest.text_shards
    tables = list(tables_of(out, shards, names)) or [empty_of(shards, names)]
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in _ROW])


def _read_measured(out: Path, manifest: Manifest, table: pa.Table) -> pa.Table | None:
    """The measured values of exactly these texts; None if there are none."""
    try:
        with parquet(out / MEASURED, required=True) as file:
            bears = (file.schema_arrow.metadata or {}).get(b"graftlens.key")
            if bears != _key(manifest).encode():
                return None
            found = file.read(use_threads=False)
    except (OSError, pa.ArrowException, DamagedError):
        return None
    rows = list(_ROW)
    return found if found.select(rows).equals(table.select(rows)) else None


def _joined(out: Path, manifest: Manifest, table: pa.Table) -> pd.DataFrame:
    """The texts with what the manifest and the prompts' table say about them."""
    numbers, places = table["prompt"].to_numpy(), table["graft"].to_numpy()
    rounds = table[ROUND].to_numpy()
    prompts = read_prompts(out)
    given = [revived(text) for text in prompts["as_given"].to_pylist()]
    about: dict[str, Sequence[Any]] = {
        "template": prompts["template"].to_pylist(),
        "dataset": prompts["dataset"].to_pylist(),
        "prompt_text": [prompt.text for prompt in given],
        "answer": prompts["answer"].to_pylist(),
        "answers": [right_of(prompt) for prompt in given],
    }
    names = [str(graft["name"]) for graft in manifest.grafts]
    rules = [str(graft["rule"]) for graft in manifest.grafts]
    base, full = (manifest.recovery.get(end) for end in ("base", "full"))
    found: dict[str, Any] = {}
    if manifest.members:
        found["member"] = [str(manifest.members[number]["name"]) for number in rounds]
        steps = pd.array([member["step"] for member in manifest.members], dtype="Int64")
        found["step"] = steps[rounds]
    found |= {
        "prompt": numbers,
        "graft": [names[place] for place in places],
        "rule": [rules[place] for place in places],
        REFERENCES[0]: [base] * len(numbers),
        REFERENCES[1]: [full] * len(numbers),
        **{name: [values[number] for number in numbers] for name, values in about.items()},
    }
    for name in TEXTS.names[2:]:
        column = table[name]
        found[name] = column.to_numpy() if name in ("sample", "logprob") else column.to_pylist()
    lead = MEMBERS if manifest.members else ()
    frame = pd.DataFrame(found, columns=[*lead, *_BEFORE, *_AFTER])
    for name in ("template", "prompt_text", "answer", "text", "tokens", "stop", "reason"):
        frame[name] = _missing_as_none(frame[name])
    return frame.astype(dict.fromkeys(("graft", "rule", *REFERENCES, "dataset"), "str"))


def _missing_as_none(column: Any) -> Any:
    """A column of texts in which what is missing is None; of numbers as it is."""
    if pd.api.types.is_numeric_dtype(column.dtype) and len(column):
        return column.astype(float)
    return column.astype(object).where(column.notna(), None)
