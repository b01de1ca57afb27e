"""Reads rows of ``.csv`` and ``.csv.gz`` files: the first line names the columns, every value is text."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Iterator, Sequence

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.files import Meter
from rlinf_lite.data.jsonl_source import lines
from rlinf_lite.data.rows import Row


def read_csv(path: str, meter: Meter) -> Iterator[Row]:
    """Yield one `Row` per record; its line is the one where the record ends.

    Raises:
        DataError: the file is not UTF-8, a record has more or fewer values than columns, or the gzip data is broken.
    """
    csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters
    with meter.opened(path) as file:
        reader = csv.DictReader(codecs.iterdecode(lines(file, path), "utf-8-sig"), strict=True)
        try:
            _check_names(reader.fieldnames or (), path)
            for fields in reader:
                yield Row(path=path, line=reader.line_num, fields=_complete(fields, f"{path}:{reader.line_num}"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}); write it again") from None


def _check_names(names: Sequence[str], path: str) -> None:
    if repeated := [name for index, name in enumerate(names) if name in names[:index]]:
        raise DataError(f"{path}:1: two columns are called {repeated[0]!r}; rename one of them")


def _complete(fields: dict[str, str], where: str) -> dict[str, str]:
    if None in fields or None in fields.values():
        kind = "more" if None in fields else "fewer"
        raise DataError(f"{where}: {kind} values than columns; quote values that hold commas or quotes")
    return fields
