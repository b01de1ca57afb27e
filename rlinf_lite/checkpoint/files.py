"""Bytes on disk: files hashed while they are written, and made durable together with their directories."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

from rlinf_lite.checkpoint.manifest import FileRecord


class HashingFile(io.RawIOBase):
    """A file being written: counts and hashes what passes through."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb")
        self.failure: OSError | None = None
        """The first error of the disk. A caller such as ``torch.save`` may turn it into another one, or lose it."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        with self._noticing():
            self._file.write(data)
        self._digest.update(data)
        num_bytes = memoryview(data).nbytes
        self._size += num_bytes
        return num_bytes

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        # Asked for right before an fsync: what is still in Python's buffer must reach the kernel first.
        self.flush()
        return self._file.fileno()

    def flush(self) -> None:
        if not self.closed and not self._file.closed:
            with self._noticing():
                self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self._noticing():
                self._file.close()
        finally:
            super().close()

    def record(self) -> FileRecord:
        return FileRecord(size=self._size, sha256=self._digest.hexdigest())

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Errors of a write do not name their file by themselves."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._path)
            self.failure = self.failure or error
            raise


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
        with hashed(Path(path)) as file:
            yield file
        self.records[Path(path)] = file.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path)] = self.records.pop(Path(path))


@contextmanager
def hashed(path: Path) -> Iterator[HashingFile]:
    """A new file to write to, closed in any case; an error of the disk comes out as itself, naming the file."""
    file = HashingFile(path)
    try:
        yield file
        file.close()
    except Exception as error:
        if file.failure is not None:
            raise file.failure from None
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise
    finally:
        if not file.closed:
            _close_quietly(file)
    if file.failure is not None:
        raise file.failure


def _close_quietly(file: HashingFile) -> None:
    """After a failure: what could not be written then cannot be written now."""
    try:
        file.close()
    except OSError:
        return


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write a small file and fsync it; its directory is not synced."""
    with hashed(path) as file:
        file.write(data)
        os.fsync(file.fileno())
    return file.record()


def sync_dir(path: Path) -> None:
    """Make names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
