"""Rows of ``.jsonl`` and ``.json`` files, as they are or in gzip."""

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
    with closing(open_binary(path)) as file:
        for line, raw in enumerate(lines(file, path), start=1):
            content = raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
            if content.strip():
                yield Row(path=path, line=line, fields=_parse(content, f"{path}:{line}"))


def read_json(path: str) -> Iterator[Row]:
    """One `Row` an element of the file's JSON array; a file that is no array is read as `read_jsonl` does.

    Raises:
        DataError: not valid JSON in UTF-8, an element that is no object, or a broken gzip stream.
    """
    with closing(open_binary(path)) as file:
        content = b"".join(lines(file, path)).removeprefix(_BYTE_ORDER_MARK)
    if not content.lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    for number, fields in enumerate(_decode(content, path, "the file must hold one JSON array of objects"), start=1):
        yield Row(path=path, line=number, fields=_as_object(fields, f"{path}:{number}", "each element"))


def open_binary(path: str) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def lines(file: BinaryIO | gzip.GzipFile, path: str) -> Iterator[bytes]:
    """Lines as bytes: only a newline ends one. Text mode and `str.splitlines` also cut at U+2028 and its kin."""
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error}); compress it again") from None


def _parse(content: bytes, where: str) -> dict[str, Any]:
    return _as_object(_decode(content, where, "each line must hold one JSON object"), where, "each line")


def _decode(content: bytes, where: str, remedy: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}); {remedy}") from None
    except ValueError as error:  # of an integer of thousands of digits
        raise DataError(
            f"{where}: a number that cannot be read ({str(error).partition(';')[0]}); write it as text"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; {remedy}") from None


def _as_object(value: Any, where: str, what: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = "; a file that is one JSON array is read if its name ends in .json" if isinstance(value, list) else ""
    kind = type(value).__name__
    raise DataError(f'{where}: a JSON {kind} instead of an object; {what} must look like {{"prompt": ...}}{hint}')
