"""Reads rows of ``.jsonl`` and ``.json`` files, plain or gzipped, in pieces."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any, BinaryIO

from rlinf_lite.data.errors import DataError, explain_json
from rlinf_lite.data.files import Meter
from rlinf_lite.data.json_array import elements
from rlinf_lite.data.rows import Row

_BLOCK_BYTES = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: str, meter: Meter) -> Iterator[Row]:
    """Yield one `Row` per line; blank lines are skipped but counted.

    Raises:
        DataError: a line is not a JSON object in UTF-8, or the gzip data is broken.
    """
    with meter.opened(path) as file:
        yield from _rows_of_lines(file, path)


def read_json(path: str, meter: Meter) -> Iterator[Row]:
    """Yield one `Row` per element of the file's JSON array; a file that is not an array is read as `read_jsonl` does.

    Raises:
        DataError: the file is not valid JSON in UTF-8, an element is not an object, or the gzip data is broken.
    """
    with meter.opened(path) as file:
        is_array = _begins_with_bracket(file, path)
        file.seek(0)
        if not is_array:
            yield from _rows_of_lines(file, path)
            return
        for number, (fields, text) in enumerate(elements(_blocks(file, path), path), start=1):
            yield _row(path, number, _as_object(fields, f"{path}:{number}", "each element"), text)


def _rows_of_lines(file: BinaryIO, path: str) -> Iterator[Row]:
    for line, raw in enumerate(lines(file, path), start=1):
        content = raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
        if content.strip():
            yield _row(path, line, _parse(content, path, line), content)


def _begins_with_bracket(file: BinaryIO, path: str) -> bool:
    for block in _blocks(file, path):
        if content := block.removeprefix(_BYTE_ORDER_MARK).lstrip():
            return content.startswith(b"[")
    return False


def _blocks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The bytes of the file in blocks, because an array may be one long line."""
    return _read(iter(lambda: file.read(_BLOCK_BYTES), b""), path)


def lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The lines of the file, as bytes. Only a newline ends a line: text mode would also split at U+2028 and others."""
    return _read(iter(file.readline, b""), path)


def _read(parts: Iterator[bytes], path: str) -> Iterator[bytes]:
    try:
        yield from parts
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error}); compress it again") from None


def _row(path: str, line: int, fields: dict[str, Any], text: str | bytes) -> Row:
    return Row(path=path, line=line, fields=fields, exact=partial(json.loads, text, parse_float=Decimal))


def _parse(content: bytes, path: str, line: int) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(explain_json(error, f"{path}:{line}", "each line must hold one JSON object")) from None
    return value if isinstance(value, dict) else _as_object(value, f"{path}:{line}", "each line")


def _as_object(value: Any, where: str, what: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = "; a file that is one JSON array is read if its name ends in .json" if isinstance(value, list) else ""
    kind = type(value).__name__
    raise DataError(f'{where}: a JSON {kind} instead of an object; {what} must look like {{"prompt": ...}}{hint}')
