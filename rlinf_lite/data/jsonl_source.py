"""Rows of a ``.jsonl`` or ``.jsonl.gz`` file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.rows import Row

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: str) -> Iterator[Row]:
    """One `Row` a line; blank lines are skipped but counted.

    Raises:
        DataError: a line that is not a JSON object in UTF-8, or a broken gzip stream.
    """
    with closing(_open(path)) as file:
        for line, raw in enumerate(_lines(file, path), start=1):
            content = raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
            if content.strip():
                yield Row(path=path, line=line, fields=_parse(content, f"{path}:{line}"))


def _open(path: str) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _lines(file: BinaryIO | gzip.GzipFile, path: str) -> Iterator[bytes]:
    """Lines as bytes: only a newline ends one. Text mode and `str.splitlines` also cut at U+2028 and its kin."""
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error}); compress it again") from None


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({reason}); each line must hold one JSON object") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; each line must hold one JSON object") from None
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise DataError(f'{where}: a JSON {kind} instead of an object; each line must look like {{"prompt": ...}}')
    return fields
