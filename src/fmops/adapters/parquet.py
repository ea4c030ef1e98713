"""Parquet, by pyarrow: rows of data sets in, training blocks out.

Enters: a Parquet stream, or blocks of token ids. Leaves: rows one batch at a time, or a shard of equal bytes.
Refuses: broken files, as `Unreadable`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmops.data.read import Row, Unreadable
from fmops.errors import FmopsError

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32()))])
_ROWS_READ = 256


def read_parquet(stream: IO[bytes], name: str) -> Iterator[Row | Unreadable]:
    """Rows in file order; memory holds one batch of them."""
    number = 0
    try:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=_ROWS_READ):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", fields)
    except (pa.ArrowException, OSError, ValueError) as error:
        # ValueError: a changed byte can leave the file whole and its text no UTF-8.
        yield Unreadable(f"{name}:{number + 1}", f"broken Parquet: {error}")


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file as mappings.

    Raises:
        FmopsError: it is no Parquet file.
    """
    with path.open("rb") as stream:
        for row in read_parquet(stream, path.name):
            if isinstance(row, Unreadable):
                raise FmopsError(f"{row.place}: {row.reason}. Fetch it again.")
            yield row.fields


def write_blocks(path: Path, blocks: list[tuple[array[int], array[int]]]) -> None:
    """Write one shard; equal blocks give equal bytes.

    Args:
        path: of the shard.
        blocks: pairs (input_ids, lengths of the pieces in them), int32.
    """
    columns = [
        pa.ListArray.from_arrays(
            _offsets([block[side] for block in blocks]), _joined([block[side] for block in blocks])
        )
        for side in (0, 1)
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    temporary = path.with_name(f".{path.name}.part")
    pq.write_table(table, temporary, compression="zstd", row_group_size=1024)
    temporary.replace(path)


def _offsets(lists: list[array[int]]) -> pa.Array:
    offsets = array("i", [0])
    for one in lists:
        offsets.append(offsets[-1] + len(one))
    return pa.array(offsets, type=pa.int32())


def _joined(lists: list[array[int]]) -> pa.Array:
    joined = array("i")
    for one in lists:
        joined.extend(one)
    return pa.array(joined, type=pa.int32())
