"""Opening the configured files: only what can be read to an end, and how far the reading is."""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from rlinf_lite.data.errors import DataError

_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def refuse_special(path: Path, name: str) -> None:
    """
    Raises:
        DataError: opening ``path`` could wait for ever, or never end: it is neither a file nor a directory.
    """
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        raise DataError(f"{name}: {str(path)!r} is {kind}, which cannot be read again at a restart; write it to a file")


class Meter:
    """How many bytes of the configured files have been read."""

    def __init__(self) -> None:
        self._before = 0
        self._file: BinaryIO | None = None

    @property
    def num_bytes(self) -> int:
        """Read so far, as they are stored (of a gzip file: compressed)."""
        return self._before + (self._file.tell() if self._file is not None else 0)

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """The file's bytes, with gzip taken off.

        Raises:
            DataError: it cannot be opened or read; names file and reason.
        """
        try:
            with open(path, "rb") as file:
                self._file = file
                if path.endswith(".gz"):
                    with gzip.open(file, "rb") as unpacked:
                        yield cast(BinaryIO, unpacked)
                else:
                    yield file
                self._before += os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; make it readable, or name another file") from None
        finally:
            self._file = None
