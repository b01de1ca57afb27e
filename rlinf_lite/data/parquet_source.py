"""Rows of a ``.parquet`` file, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.rows import Row

_ROWS_A_BATCH = 1024


def read_parquet(path: str) -> Iterator[Row]:
    """One `Row` a table row, with Python values.

    Raises:
        DataError: not a readable parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_ROWS_A_BATCH):
                for fields in batch.to_pylist():
                    line += 1
                    yield Row(path=path, line=line, fields=fields)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file, after row {line} ({error}); write it again") from None
