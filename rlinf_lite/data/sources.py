"""Reads the rows of the configured paths, and chooses the reader for each by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlinf_lite.data.csv_source import read_csv
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.files import Meter, refuse_special
from rlinf_lite.data.hf_source import parse_hub_path, read_hub, read_saved
from rlinf_lite.data.jsonl_source import read_json, read_jsonl
from rlinf_lite.data.parquet_source import read_parquet
from rlinf_lite.data.rows import Row

Reader = Callable[[str, Meter], Iterator[Row]]

_BY_ENDING: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
}
_WHAT_IS_READ = (
    "*.jsonl, *.json, *.csv (also with .gz), *.parquet, a directory written by datasets.save_to_disk, or "
    "hf:NAME[:CONFIG]:SPLIT"
)


def read_rows(paths: Sequence[str], key: str, meter: Meter | None = None) -> Iterator[Row]:
    """Rows of all ``paths``, in order. Every path is checked before the first row is read.

    Args:
        paths: as configured.
        key: the config key that holds them, for messages.
        meter: counts the bytes that are read.

    Raises:
        DataError: there is no path, a file is missing or its ending unknown, or its reader cannot read it.
    """
    if not paths:
        raise DataError(f"{key}: no path given; list what to read: {_WHAT_IS_READ}")
    readers = [_reader(path, key) for path in paths]
    meter = meter or Meter()
    for path, reader in zip(paths, readers, strict=True):
        yield from reader(path, meter)


def num_bytes(paths: Sequence[str]) -> int:
    """Total size of the files among ``paths``, as stored; directories and hub data sets do not count."""
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file())


def _reader(path: str, key: str) -> Reader:
    if path.startswith("hf:"):
        parse_hub_path(path)
        return read_hub
    if not Path(path).exists():
        hint = "correct the path (relative paths start at the directory that the run was started in)"
        raise DataError(f"{key}: no such file or directory: {path!r}; {hint}")
    refuse_special(Path(path), key)
    if Path(path).is_dir():
        return read_saved
    for ending, reader in _BY_ENDING.items():
        if path.endswith(ending):
            return reader
    raise DataError(f"{key}: cannot tell how to read {path!r}; what is read: {_WHAT_IS_READ}")
