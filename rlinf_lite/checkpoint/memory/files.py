"""Files in memory: a writer that hashes what it writes, and a read-only path with the methods that the readers use."""

from __future__ import annotations

import bisect
import errno
import io
import os
import stat
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from rlinf_lite.checkpoint.hashing import hasher
from rlinf_lite.checkpoint.manifest import FileRecord
from rlinf_lite.checkpoint.storage import StoragePath

_PIECE_BYTES = 256 << 10
"""How much is copied before it is hashed, while it is still in the processor's cache."""


class MemoryWriter(io.RawIOBase):
    """A new file of about ``num_bytes``, hashed as it grows."""

    def __init__(self, num_bytes: int) -> None:
        self._content = np.empty(num_bytes, np.uint8)
        self._view = self._content.data
        self._digest = hasher()
        self._size = self._hashed = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        start, end = self._size, self._size + len(view)
        if end > len(self._content):
            self._content = np.concatenate([self._content[:start], np.empty(end, np.uint8)])
            self._view = self._content.data
        if end - self._hashed < _PIECE_BYTES:  # nearly always, and faster than the loop
            self._view[start:end] = view
            self._size = end
            return len(view)
        for at in range(start, end, _PIECE_BYTES):
            self._size = min(at + _PIECE_BYTES, end)
            self._view[at : self._size] = view[at - start : self._size - start]
            if self._size - self._hashed >= _PIECE_BYTES:
                self._hash()
        return len(view)

    def _hash(self) -> None:
        self._digest.update(self._view[self._hashed : self._size])
        self._hashed = self._size

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def content(self) -> np.ndarray:
        """Everything written so far."""
        return self._content[: self._size]

    def record(self) -> FileRecord:
        """Size and hash of everything written so far."""
        self._hash()
        return FileRecord(size=self._size, digest=self._digest.hexdigest())


class MemoryFile:
    """A file of which all bytes, or some parts, are in memory."""

    def __init__(self, size: int, parts: Mapping[int, Any]) -> None:
        """
        Args:
            size: the size of the whole file in bytes.
            parts: bytes-like objects by their offset in the file.
        """
        self.size = size
        self._parts = [memoryview(parts[start]).cast("B") for start in sorted(parts)]
        self._starts = sorted(parts)

    def readinto(self, offset: int, target: Any) -> int:
        """Copy the bytes at ``offset`` to ``target``; returns how many are in memory there, which may be 0."""
        if (index := bisect.bisect(self._starts, offset) - 1) < 0:
            return 0
        part = self._parts[index][offset - self._starts[index] :][: len(target)]
        target[: len(part)] = part
        return len(part)

    def part(self, offset: int, length: int) -> bytes:
        """A copy of the ``length`` bytes at ``offset``, as far as they are in memory."""
        content = bytearray(max(0, min(length, self.size - offset)))
        return bytes(content[: self.readinto(offset, content)])


class MemoryPath:
    """A file or directory among ``files``, with the methods of a `StoragePath` behind a URL that the readers use."""

    def __init__(self, files: dict[str, MemoryFile], title: str, inside: str = "") -> None:
        """
        Args:
            files: by their path in the directory.
            title: the directory in messages; its last part is its name.
            inside: the path in the directory; empty for the directory itself.
        """
        self.files, self._title, self._inside = files, title, inside

    def __truediv__(self, name: str) -> MemoryPath:
        return MemoryPath(self.files, self._title, f"{self._inside}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self._title}/{self._inside}".rstrip("/")

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    def is_file(self) -> bool:
        return self._inside in self.files

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> os.stat_result:
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, self._file().size, 0, 0, 0))

    def open(self, mode: str = "rb") -> io.RawIOBase:
        return _Reader(self._file())

    def read_bytes(self) -> bytes:
        return cast(bytes, self.open().read())

    def _file(self) -> MemoryFile:
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self.files[self._inside]


def path_of(files: dict[str, MemoryFile], step: int) -> StoragePath:
    """``files`` as the checkpoint of ``step``."""
    return cast(StoragePath, MemoryPath(files, f"(memory)/global_step_{step}"))


class _Reader(io.RawIOBase):
    def __init__(self, file: MemoryFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        count = self._file.readinto(self._at, target)
        self._at += count
        return count
