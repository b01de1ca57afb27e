"""Bytes on disk: files hashed while they are written, and made durable together with their directories."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

from rlinf_lite.checkpoint.manifest import FileRecord


class HashingFile(io.RawIOBase):
    """A file being written: counts and hashes what passes through."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        self._digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        # Asked for right before an fsync: what is still in Python's buffer must reach the kernel first.
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        super().close()

    def record(self) -> FileRecord:
        return FileRecord(size=self._size, sha256=self._digest.hexdigest())


class HashingFileSystem(FileSystem):
    """DCP's local file system; remembers size and hash of each file written through it.

    ``before_write(path)`` is called before each file is opened.
    """

    def __init__(self, before_write: Callable[[str], None]) -> None:
        self._before_write = before_write
        self.records: dict[Path, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        self._before_write(str(path))
        file = HashingFile(Path(path))
        try:
            yield file
            self.records[Path(path)] = file.record()
        finally:
            file.close()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path)] = self.records.pop(Path(path))


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write a small file and fsync it; its directory is not synced."""
    file = HashingFile(path)
    try:
        file.write(data)
        os.fsync(file.fileno())
        return file.record()
    finally:
        file.close()


def sync_dir(path: Path) -> None:
    """Make names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
