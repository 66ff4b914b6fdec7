"""The shards of a sweep's tables: which rows each holds, and whether it is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graftlens.sweep.disk import DamagedError, sealed, unsealed


@dataclass(frozen=True)
class Shards:
    """The shards of one table: a block of prompts under a block of grafts each, member by member.

    Attributes:
        folder: where they are, in the sweep's folder.
        prompt_blocks: number of prompts in each block.
        graft_blocks: bounds (first, past the last) of each block of grafts.
        each: rows of a prompt under a graft.
        keys: what the shards of each member bear; one where there are no members.
        schema: what a shard holds.
        sealed: whether a shard must have a checksum.
    """

    folder: str
    prompt_blocks: Sequence[int]
    graft_blocks: Sequence[Sequence[int]]
    each: int
    keys: Sequence[str]
    schema: pa.Schema
    sealed: bool = True

    def __len__(self) -> int:
        return len(self.keys) * self._of_one

    @property
    def _of_one(self) -> int:
        return len(self.prompt_blocks) * len(self.graft_blocks)

    @property
    def total(self) -> int:
        """How many rows all shards have."""
        return sum(map(self.rows, range(len(self))))

    def of(self, number: int) -> range:
        """The shards of one member, or of the only round."""
        return range(number * self._of_one, (number + 1) * self._of_one)

    def round_of(self, shard: int) -> int:
        """Which member a shard is of."""
        return shard // self._of_one

    def place(self, shard: int) -> tuple[int, range]:
        """A shard's block of prompts, and the places of its grafts among all grafts."""
        block, grafts = divmod(shard % self._of_one, len(self.graft_blocks))
        return block, range(*self.graft_blocks[grafts])

    def rows(self, shard: int) -> int:
        """How many rows a shard has."""
        block, grafts = self.place(shard)
        return self.prompt_blocks[block] * len(grafts) * self.each

    def key_of(self, shard: int) -> str:
        """The key in a shard: a hash of the request and of the models that are run in it."""
        return self.keys[self.round_of(shard)]

    def path(self, out: Path, shard: int) -> Path:
        """Where a shard is in the sweep's folder `out`."""
        return shard_path(out, shard, self.folder)

    def read(self, out: Path, shard: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """A shard's rows; None if it is missing, damaged, or from another sweep.

        Shards of version 0.1.0 have no `ties`: there the column is NA, and the `rank` of a target
        that is tied is the best of all that have its logit.
        """
        try:
            with parquet(self.path(out, shard), required=self.sealed) as file:
                bears = (file.schema_arrow.metadata or {}).get(b"graftlens.key")
                if bears != self.key_of(shard).encode() or file.metadata.num_rows != self.rows(
                    shard
                ):
                    return None
                table = file.read(columns=columns, use_threads=False)
                names = self.schema.names if columns is None else columns
                if "ties" in names and "ties" not in table.column_names:
                    table = table.append_column("ties", pa.nulls(table.num_rows, pa.int64()))
                return table.select(names)
        except (OSError, pa.ArrowException, DamagedError):
            return None

    def missing(self, out: Path) -> list[int]:
        """The shards that are missing or damaged."""
        return [shard for shard in range(len(self)) if self.read(out, shard) is None]

    def to_bytes(self, table: pa.Table, shard: int) -> bytes:
        """A shard's file."""
        return to_bytes(table.replace_schema_metadata({"graftlens.key": self.key_of(shard)}))


def shard_path(out: Path, shard: int, folder: str = "shards") -> Path:
    """Where a shard is, by default one of cells."""
    return out / folder / f"{shard:05d}.parquet"


def to_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file, whose pages and which itself bear checksums."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return sealed(buffer.getvalue().to_pybytes())


def parquet(path: Path, *, required: bool) -> pq.ParquetFile:
    """A Parquet file, of which every byte was checked if it has a checksum."""
    content = unsealed(path.read_bytes(), required=required)
    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
