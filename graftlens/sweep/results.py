"""The folder of a sweep, and its contents as one table.

- ``config.yaml``: the config as it was given; ``grafts.yaml``: the grafts that it resolves to;
- ``sweep.json``: the manifest: what was asked, with which versions and models, cut into which
  shards;
- ``prompts.parquet``: the prompts, a row each;
- ``shards/00000.parquet``, …: the results, numbers and ids only. A shard is a block of prompts
  under a block of grafts; it counts if it can be read, has all its rows and carries the sweep's
  key;
- ``texts/00000.parquet``, …: the generated texts, if any, likewise, and ``measured.parquet`` what
  is measured of them (see `texttables.py`);
- ``trust.json``, ``done.json``: the trust report, and the marker that everything is done.

Every file appears whole, in one rename, and carries a checksum (see `disk.py`).
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from pydantic import TypeAdapter, ValidationError

from graftlens.chat import Conversation
from graftlens.folder import json_digest, parse_json, read_text
from graftlens.graft import PARTS
from graftlens.metrics import always_measured, measure, some_over_common
from graftlens.model.made import source_given
from graftlens.prompts import Prompt
from graftlens.references import COLUMNS as REFERENCES
from graftlens.references import COMMON_TOKENS, MEMBERS
from graftlens.sweep.disk import DamagedError, check_json, sealed_json
from graftlens.sweep.shards import Shards, parquet, shard_path, to_bytes

__all__ = [
    "RESULT_COLUMNS",
    "SHARD",
    "Manifest",
    "read_manifest",
    "read_results",
    "read_shard",
    "shard_path",
    "to_bytes",
]

_TYPES = {
    "number": pa.float64(),
    "count": pa.int64(),
    "numbers": pa.list_(pa.float64()),
    "tokens": pa.list_(pa.string()),
}


def shard_schema(asked: Iterable[str] = ()) -> pa.Schema:
    """What a shard holds: `prompt` is the prompt's number, `graft` the graft's place in the config;
    then the measures, with those that were asked for, by name. A user's own is a number.
    """
    measured = [*always_measured(), *(measure(name) for name in asked)]
    return pa.schema(
        [
            *(("prompt", pa.int64()), ("graft", pa.int64())),
            *(("target", pa.string()), ("target_id", pa.int64())),
            *((m.name, _TYPES[m.holds]) for m in measured),
            ("reason", pa.string()),
        ]
    )


#: A shard of a sweep without further measures.
SHARD = shard_schema()

#: A shard of texts: `prompt` and `graft` as above, and what was generated.
TEXTS = pa.schema(
    [
        *(("prompt", pa.int64()), ("graft", pa.int64()), ("sample", pa.int64())),
        *(("text", pa.string()), ("tokens", pa.list_(pa.int64())), ("logprob", pa.float64())),
        *(("stop", pa.string()), ("reason", pa.string())),
    ]
)

#: Columns that describe a graft; empty if it has several rules.
GRAFT_COLUMNS = ("rule", *PARTS)

#: What the grafts of older folders are in columns that these lack.
_BEFORE: Mapping[str, Any] = {"neuron": "all", "strength": 1.0}
PROMPT_COLUMNS = ("template", "dataset", "text", "answer")

#: The columns of the results, in their order.
RESULT_COLUMNS = (
    *("prompt", "graft", *GRAFT_COLUMNS, *REFERENCES),
    *("template", "dataset", "model", "text", "answer"),
    *SHARD.names[2:],
)

_PROMPTS = pa.schema(
    [
        ("prompt", pa.int64()),
        ("block", pa.int64()),
        ("template", pa.string()),
        ("dataset", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("as_given", pa.string()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """The description of a folder's sweep; the content of ``sweep.json``.

    Attributes:
        identity: what another call must agree with: the config without what cannot change
            results, the grafts, the prompts' and their tokens' hashes.
        config: the whole config, with its defaults.
        overrides: what was set beside the config's text.
        grafts: name, rule and tidy columns of each graft, in order.
        duplicates: grafts that were given twice: name -> the name they run under.
        recovery: names of the grafts that recovery is measured between, `base` and `full`.
        prompt_blocks: number of prompts in each block.
        graft_blocks: bounds (first, past the last) of each block in `grafts`.
        text_blocks: number of prompts in each block of texts, the prompts in the order of their
            blocks; none where no texts are generated.
        text_graft_blocks: as `graft_blocks`, of texts.
        scored: whether there are cells; without, all that the sweep makes are texts.
        trained: where a measure of texts asks for them, the answers of all facts that were trained,
            as far as the config says.
        versions: of the packages at the first start.
        models: the sources' fingerprints, dtype, budgets of rows and cached tokens, pair check and
            what their configs and
            tokenizer come to, as the first worker found them; None before. Where there are members,
            what is not common to them is under `members`, by name.
        members: the models that are run one after another, where a source stands for several: name,
            step and place of each.
        config_sha256: of ``config.yaml``; None in a folder that version 0.1.0 began, whose files
            need not have checksums.
    """

    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: Sequence[str]
    grafts: Sequence[Mapping[str, str | float | None]]
    duplicates: Mapping[str, str]
    recovery: Mapping[str, str]
    prompt_blocks: Sequence[int]
    graft_blocks: Sequence[Sequence[int]]
    versions: Mapping[str, str]
    models: Mapping[str, Any] | None = None
    config_sha256: str | None = None
    members: Sequence[Mapping[str, str | int | None]] = ()
    text_blocks: Sequence[int] = ()
    text_graft_blocks: Sequence[Sequence[int]] = ()
    scored: bool = True
    trained: Sequence[str] = ()

    def to_json(self) -> str:
        content = sealed_json(asdict(self) | {"shards": self.shards})
        return json.dumps(content, indent=1, ensure_ascii=False)

    @property
    def sealed(self) -> bool:
        """Whether every file must have its checksum."""
        return self.config_sha256 is not None

    @cached_property
    def cell_shards(self) -> Shards:
        """The shards of the cells."""
        blocks = self.prompt_blocks if self.scored else ()
        return Shards("shards", blocks, self.graft_blocks, 1, self._keys, self.schema, self.sealed)

    @cached_property
    def text_shards(self) -> Shards:
        """The shards of the texts."""
        each = int((self.config.get("outcomes") or {}).get("sampling", {}).get("n", 1))
        blocks, grafts = self.text_blocks, self.text_graft_blocks
        return Shards("texts", blocks, grafts, each, self._keys, TEXTS)

    @property
    def tables(self) -> tuple[Shards, ...]:
        """The shards of all tables that the sweep has."""
        return tuple(shards for shards in (self.cell_shards, self.text_shards) if len(shards))

    @property
    def shards(self) -> int:
        """How many shards of cells the sweep has."""
        return len(self.cell_shards)

    @property
    def rounds(self) -> int:
        """How often all prompts are run: once, or once with each member."""
        return max(1, len(self.members))

    @property
    def cells(self) -> int:
        """How many (prompt, graft) the sweep has, those of all members."""
        return self.rounds * sum(self.prompt_blocks) * len(self.grafts) if self.scored else 0

    @property
    def texts(self) -> int:
        """How many texts the sweep generates, those of all members."""
        return self.text_shards.total

    @property
    def row_budget(self) -> int | None:
        """Most token rows per forward pass; None until a worker has loaded the models."""
        return None if self.models is None else int(self.models["row_budget"])

    @property
    def token_budget(self) -> int | None:
        """Most tokens whose keys and values are kept while texts are generated; None until a worker
        has loaded the models, and where there are no texts."""
        found = (self.models or {}).get("token_budget")
        return None if found is None else int(found)

    @property
    def asked(self) -> tuple[str, ...]:
        """The measures beside those of every table, by name."""
        return tuple(self.config.get("metrics", {}).get("measures", ()))

    @cached_property
    def schema(self) -> pa.Schema:
        """What a shard of this sweep holds."""
        return shard_schema(self.asked)

    @property
    def common_tokens(self) -> int | None:
        """How many tokens measures are over that the sweep asks for; None where it is all."""
        return (self.models or {}).get(COMMON_TOKENS) if some_over_common(self.asked) else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this sweep's results, in their order."""
        lead = MEMBERS if self.members else ()
        ranked = any(graft.get("source_rank") is not None for graft in self.grafts)
        about = len(RESULT_COLUMNS[: RESULT_COLUMNS.index(REFERENCES[0])])
        first, rest = RESULT_COLUMNS[:about], RESULT_COLUMNS[about:-1]
        rank = ("source_rank",) if ranked else ()
        last = () if self.common_tokens is None else (COMMON_TOKENS,)
        return (*lead, *first, *rank, *rest, *self.asked, RESULT_COLUMNS[-1], *last)

    @property
    def key(self) -> str:
        """The key in the shards of a sweep without members."""
        return self._keys[0]

    @cached_property
    def _keys(self) -> Sequence[str]:
        models = self.models or {}
        ran = {name: models.get(name) for name in ("dtype", "fingerprints")}
        if not self.members:
            return [json_digest([self.identity, ran])]
        known = models.get("members", {})
        return [
            json_digest(
                [
                    self.identity,
                    ran | {"fingerprints": known.get(m["name"], {}).get("fingerprints")},
                    m["name"],
                ]
            )
            for m in self.members
        ]


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(out: Path) -> Manifest:
    """The manifest of a sweep's folder.

    Raises:
        ValueError: a folder that holds no sweep, or a damaged manifest.
    """
    path = Path(out).expanduser() / "sweep.json"
    try:
        content = parse_json(read_text(path), "its text")
        if not isinstance(content, dict):
            raise DamagedError("it holds no keys")
        check_json(content)
        if unknown := content.keys() - {f.name for f in fields(Manifest)} - {"shards", "sha256"}:
            raise DamagedError(f"unknown: {', '.join(sorted(unknown))}")
        manifest = _MANIFEST.validate_python(
            {key: value for key, value in content.items() if key not in ("shards", "sha256")}
        )
        if manifest.shards != content["shards"]:
            raise DamagedError(f"{content['shards']!r} shards")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{out} does not hold a sweep (there is no sweep.json in it). Give the folder that "
            "`graftlens sweep` wrote."
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}). Make it readable."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{where}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, why: object) -> ValueError:
    """The message about an invalid manifest."""
    what = str(why).removeprefix(f"{path} ").rstrip(".")
    return ValueError(
        f"{path} is damaged, or is not what this version of graftlens writes ({what}). Remove that "
        "file and run the sweep's own command again: complete shards are kept. Or start the "
        "sweep in a new folder."
    )


def prompt_table(
    prompts: Sequence[Prompt], datasets: Sequence[str], blocks: Sequence[int]
) -> pa.Table:
    """The content of ``prompts.parquet``."""
    rows = [
        {
            "prompt": number,
            "block": block,
            "template": prompt.name or prompt.template,
            "dataset": dataset,
            "text": prompt.text,
            "answer": prompt.answer,
            "as_given": as_given(prompt),
        }
        for number, (prompt, dataset, block) in enumerate(
            zip(prompts, datasets, blocks, strict=True)
        )
    ]
    return pa.Table.from_pylist(rows, schema=_PROMPTS)


def as_given(prompt: Prompt) -> str:
    """A prompt as one text, from which `revived` makes it again."""
    given: dict[str, Any] = {
        "template": prompt.template,
        "fields": dict(prompt.fields),
        "answer": prompt.answer,
        "distractors": list(prompt.distractors),
        "name": prompt.name,
    }
    if prompt.answers:
        given["answers"] = list(prompt.answers)
    if prompt.conversation is not None:
        given["conversation"] = prompt.conversation.as_given()
    return json.dumps(given, ensure_ascii=False)


def revived(text: str) -> Prompt:
    """The prompt that `as_given` made a text of."""
    given = json.loads(text)
    if conversation := given.pop("conversation", None):
        given["conversation"] = Conversation.of(**conversation)
    return Prompt(**given)


def read_prompts(out: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a sweep's prompts.

    Raises:
        ValueError: a table that is missing or damaged.
    """
    path = Path(out).expanduser() / "prompts.parquet"
    required = read_manifest(out).sealed
    try:
        with parquet(path, required=required) as file:
            if not file.schema_arrow.equals(_PROMPTS):
                raise DamagedError("it has other columns")
            return file.read(columns=columns)
    except (OSError, pa.ArrowException, DamagedError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Run the sweep's own command again: it rewrites the "
            "file."
        ) from None


def facts_of(folder: Path) -> "pd.Series[Any]":
    """Prompt's number -> the fact it asks for: its dataset, and its field `fact` or, without one,
    the entity it names (or else the whole prompt) and the answer."""
    prompts = read_prompts(folder, ["prompt", "dataset", "as_given"]).to_pydict()
    names = []
    for dataset, text in zip(prompts["dataset"], prompts["as_given"], strict=True):
        given = json.loads(text)
        fields = given["fields"]
        asked = [fields.get("first_entity", text), given["answer"]]
        asked = [fields["fact"]] if "fact" in fields else asked
        names.append(json.dumps([dataset, *asked], ensure_ascii=False))
    return pd.Series(names, index=prompts["prompt"])


def read_end(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of ``done.json`` and of ``trust.json``.

    Raises:
        OSError, ValueError: one of them is missing or damaged.
    """
    required = read_manifest(out).sealed
    found: list[dict[str, Any]] = []
    for name, wanted in (
        ("done.json", {"cells": int, "not_run": dict}),
        ("trust.json", {"ok": bool, "text": str}),
    ):
        content = parse_json(read_text(out / name), out / name)
        if not isinstance(content, dict) or any(
            type(content.get(key)) is not kind for key, kind in wanted.items()
        ):
            raise DamagedError(f"{out / name} lacks {' or '.join(wanted)}")
        try:
            # Few bit flips do not turn false into true, so `ok` may be outside the checksum.
            rest = {key: value for key, value in content.items() if key != "ok"}
            check_json(rest, required=required)
        except DamagedError as error:
            raise DamagedError(f"{out / name}: {error}") from None
        found.append(content)
    done, trust = found
    if not all(type(count) is int for count in done["not_run"].values()):
        raise DamagedError(f"{out / 'done.json'}: not_run are not numbers")
    return done, trust


def to_mend(
    out: Path, there: Manifest, files: Mapping[str, bytes], table: pa.Table
) -> dict[str, bytes]:
    """The files of a claimed sweep that must be rewritten, and their content.

    Args:
        there: the sweep's manifest.
        files: what is to be in them; of the config, the text that was given first stays.
        table: the prompts: another version of Parquet's writer may write the same in other bytes.
    """
    wrong = {}
    given = _content(out / "config.yaml")
    if there.sealed:
        if hashlib.sha256(given).hexdigest() != there.config_sha256:
            digest_of = hashlib.sha256(files["config.yaml"]).hexdigest()
            renewed = replace(there, config_sha256=digest_of)
            wrong["config.yaml"] = files["config.yaml"]
            wrong["sweep.json"] = renewed.to_json().encode()
    elif not _is_mapping(given):
        wrong["config.yaml"] = files["config.yaml"]
    if _content(out / "grafts.yaml") != files["grafts.yaml"]:
        wrong["grafts.yaml"] = files["grafts.yaml"]
    try:
        right = read_prompts(out).equals(table)
    except ValueError:
        right = False
    if not right:
        wrong["prompts.parquet"] = files["prompts.parquet"]
    with contextlib.suppress(OSError, ValueError):
        text = f"{read_end(out)[1]['text']}\n".encode()
        if _content(out / "trust.txt") != text:
            wrong["trust.txt"] = text
    return wrong


def _content(path: Path) -> bytes:
    """A file's bytes; none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _is_mapping(content: bytes) -> bool:
    try:
        return isinstance(yaml.safe_load(content), dict)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


def read_shard(
    out: Path, manifest: Manifest, shard: int, columns: Sequence[str] | None = None
) -> pa.Table | None:
    """The rows of a shard of cells; None if it is missing, damaged, or from another sweep."""
    return manifest.cell_shards.read(out, shard, columns)


def read_results(
    out: Path | str, *, columns: Sequence[str] | None = None, batch_rows: int | None = None
) -> pd.DataFrame | Iterator[pd.DataFrame]:
    """The results of a sweep, one row per (prompt, graft).

    Args:
        out: the sweep's folder. If it is not finished, the existing rows are read, and a warning
            says what is missing.
        columns: which of its columns to read (`RESULT_COLUMNS` and the measures that the sweep asks
            for); all by default.
        batch_rows: give tables of at most this many rows one after the other instead of one table:
            memory then holds a batch and a shard, regardless of the number of rows.

    Returns:
        Columns `member` and `step` where a source stands for several models (`each`), `prompt`
        (number), `graft` (name), `rule`, `source`, `span`, `component`, `layer`, `head`, `neuron`,
        `strength` (of grafts with one rule), `source_rank` where a source is the best part of a
        rank (`{of: sft, rank: 8}`), `base_run` and `full_run` (the names of the grafts that
        recovery is measured between), `template`, `dataset`, `model` (the sources), `text`,
        `answer`, then the measures of `graftlens.evaluate` (`ties` is NA in folders of version
        0.1.0, which did not count them), those that the sweep asks for, and `reason`: why a cell
        could not be run, in which case all numbers are NA. Where sources have different
        vocabularies and the sweep asks for KL, JS or entropy, `common_tokens` is how many tokens
        these are over. Repeated texts are categoricals. One table is sorted by member, by prompt,
        then by graft as in the config; batches come shard by shard.

    Raises:
        ValueError: a folder without a sweep, an unknown column, batches without rows.
    """
    out = Path(out).expanduser()
    manifest = read_manifest(out)
    wanted = list(manifest.columns if columns is None else columns)
    if isinstance(columns, str) or (unknown := [c for c in wanted if c not in manifest.columns]):
        shown = repr(columns) if isinstance(columns, str) else " ".join(map(repr, unknown))
        raise ValueError(
            f"columns: {shown} is not a list of columns of a sweep's results. There are: "
            f"{' '.join(manifest.columns)}."
        )
    if batch_rows is not None and batch_rows < 1:
        raise ValueError(f"batch_rows={batch_rows}: write a number from 1, or leave it out.")
    stored = ["prompt", "graft", *(c for c in wanted if c in manifest.schema.names[2:])]
    frame = _Joined(out, manifest, wanted)
    found = tables_of(out, manifest.cell_shards, stored)
    if batch_rows is not None:
        return (frame(batch) for batch in _batches(found, batch_rows))
    tables = list(found)
    whole = pa.concat_tables(tables or [empty_of(manifest.cell_shards, stored)])
    order = [(ROUND, "ascending"), ("prompt", "ascending"), ("graft", "ascending")]
    return frame(whole.sort_by(order))


#: Which member a row is of, by number.
ROUND = "__round"


def tables_of(out: Path, shards: Shards, stored: Sequence[str]) -> Iterator[pa.Table]:
    """What is there of a table's shards, with a column `ROUND`; a warning says what is not."""
    there = 0
    for shard in range(len(shards)):
        table = shards.read(out, shard, stored)
        if table is not None:
            there += 1
            numbers = pa.array(np.full(table.num_rows, shards.round_of(shard)), pa.int64())
            yield table.replace_schema_metadata(None).append_column(ROUND, numbers)
    if there < len(shards):
        warnings.warn(
            f"{out} is not finished: {there} of {len(shards)} shards are done. Run the "
            "sweep's command again to compute the others.",
            stacklevel=3,
        )


def empty_of(shards: Shards, stored: Sequence[str]) -> pa.Table:
    """The same without rows."""
    fields = [shards.schema.field(name) for name in stored]
    return pa.schema([*fields, (ROUND, pa.int64())]).empty_table()


def _batches(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one of what is left."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while (count := sum(t.num_rows for t in held)) >= size:
            whole = pa.concat_tables(held)
            yield whole.slice(0, size)
            held = [whole.slice(size)] if count > size else []
            del whole
    if held:
        yield pa.concat_tables(held)


class _Joined:
    """Adds to shards' rows what the manifest and the prompts' table say about them."""

    def __init__(self, out: Path, manifest: Manifest, wanted: Sequence[str]) -> None:
        self.wanted = wanted
        self.names = [str(graft["name"]) for graft in manifest.grafts]
        texts = [column for column in PROMPT_COLUMNS if column in wanted]
        prompts = read_prompts(out, texts).to_pydict() if texts else {}
        self.of_prompt = {column: _codes(prompts[column]) for column in texts}
        self.of_graft = {
            column: _codes([_about(graft, column) for graft in manifest.grafts])
            for column in GRAFT_COLUMNS
            if column in wanted
        }
        self.common_tokens = manifest.common_tokens
        #: Columns that have one value in all rows.
        ends = map(manifest.recovery.get, ("base", "full"))
        self.constant = dict(zip(REFERENCES, ends, strict=True))
        sources = ((n, source_given(one)) for n, one in manifest.config["sources"].items())
        self.constant["model"] = ", ".join(f"{name}: {place}" for name, place in sources)
        self.members = [str(member["name"]) for member in manifest.members]
        self.ranks = pd.array(
            [graft.get("source_rank") for graft in manifest.grafts], dtype="Int64"
        )
        self.steps = pd.array([member["step"] for member in manifest.members], dtype="Int64")

    def __call__(self, table: pa.Table) -> pd.DataFrame:
        numbers = table["prompt"].to_numpy()
        places = table["graft"].to_numpy()
        rounds = table[ROUND].to_numpy()
        stored = table.drop_columns(["prompt", "graft", ROUND]).to_pandas(
            types_mapper={pa.int64(): pd.Int64Dtype()}.get
        )

        def column(name: str) -> Any:
            if name == "prompt":
                return numbers
            if name == "member":
                return pd.Categorical.from_codes(rounds, self.members)
            if name == "step":
                return self.steps[rounds]
            if name == "source_rank":
                return self.ranks[places]
            if name == "graft":
                return pd.Categorical.from_codes(places, self.names)
            if name == COMMON_TOKENS:
                return np.full(len(places), self.common_tokens)
            if name in self.constant:
                codes, values = _codes([self.constant[name]])
                return pd.Categorical.from_codes(codes[np.zeros(len(places), dtype=int)], values)
            if name in self.of_graft:
                codes, values = self.of_graft[name]
                return pd.Categorical.from_codes(codes[places], values)
            if name in self.of_prompt:
                codes, values = self.of_prompt[name]
                return pd.Categorical.from_codes(codes[numbers], values)
            return stored[name]

        return pd.DataFrame({name: column(name) for name in self.wanted})


def _about(graft: Mapping[str, Any], column: str) -> Any:
    """What a manifest says of a graft; where it is older than the column, what it was."""
    if column in _BEFORE and column not in graft:
        return None if graft["source"] is None else _BEFORE[column]
    return graft[column]


def _codes(values: Sequence[Any]) -> tuple[Any, Any]:
    """(code of each value, the distinct values); a missing value has the code -1."""
    return tuple(pd.factorize(pd.Series(values, dtype=object)))
