"""Reads rows of ``.parquet`` files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from rlinf_lite.data.arrow import exact_row, has_narrow_floats
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.files import Meter
from rlinf_lite.data.rows import Row

_ROWS_PER_BATCH = 1024


def read_parquet(path: str, meter: Meter) -> Iterator[Row]:
    """Yield one `Row` per table row, with Python values.

    Raises:
        DataError: the file is not a readable parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    with meter.opened(path) as file:
        try:
            with pq.ParquetFile(file) as table:
                narrow = has_narrow_floats(table.schema_arrow)
                for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH):
                    for index, fields in enumerate(batch.to_pylist()):
                        line += 1
                        exact = partial(exact_row, batch, index) if narrow else None
                        yield Row(path=path, line=line, fields=fields, exact=exact)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a readable parquet file, after row {line} ({error}); write it again"
            ) from None
