"""Opens the configured data files, refuses pipes and devices, and counts the bytes that are read."""

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
    """Refuse a path that is neither a file nor a directory: opening or reading it might never end.

    Raises:
        DataError: ``path`` is a pipe, socket or device.
    """
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        raise DataError(
            f"{name}: {str(path)!r} is {kind}, which a restart could not read again; write the data to a file"
        )


class Meter:
    """Counts the bytes that were read from the configured files."""

    def __init__(self) -> None:
        self._before = 0
        self._file: BinaryIO | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes read so far, as stored (compressed bytes of a gzip file)."""
        return self._before + (self._file.tell() if self._file is not None else 0)

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Open a file; gzip files are decompressed.

        Raises:
            DataError: the file cannot be opened or read. Names file and reason.
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
