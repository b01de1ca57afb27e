"""Writing files to local or remote storage: hashed on the way, past the page cache, and durable at the end."""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from rlinf_lite.checkpoint.hashing import hasher
from rlinf_lite.checkpoint.manifest import FileRecord
from rlinf_lite.checkpoint.storage import StoragePath, is_local

BUFFER_BYTES = 8 << 20
NUM_BUFFERS = 3
_ALIGNMENT = 4096  # O_DIRECT needs addresses, offsets and lengths to be multiples of it on every common disk


_SPARE: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
"""Buffers that no file uses now. They are aligned, and reused: fresh memory costs more than the copy into it."""


def _new_buffer() -> mmap.mmap:
    try:
        return _SPARE.get_nowait()
    except queue.Empty:
        return mmap.mmap(-1, BUFFER_BYTES)


class HashingFile(io.RawIOBase):
    """A new file, written front to back: bytes are hashed in `write`, and written to storage by another thread.

    `write` blocks only when the storage is `NUM_BUFFERS` buffers behind. A local file bypasses the page cache where its
    file system permits: that is faster for bytes that are not read soon, and takes no memory.
    """

    def __init__(self, path: StoragePath) -> None:
        self._path = path
        self._digest = hasher()
        self._size = 0
        self._sink = _LocalSink(path) if is_local(path) else _RemoteSink(path)
        self._buffer = _new_buffer()
        self._filled = 0
        self._num_buffers = 1
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self.failure: OSError | None = None
        """The first error of the storage. A caller such as ``torch.save`` may raise another one instead."""

    def write(self, data: Any) -> int:
        if self.failure is not None:
            raise self.failure
        view = memoryview(data).cast("B")
        self._digest.update(view)
        done = 0
        while done < len(view):
            count = min(len(view) - done, BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[done : done + count]
            self._filled += count
            done += count
            if self._filled == BUFFER_BYTES:
                self._hand_over()
        self._size += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def _hand_over(self) -> None:
        """Pass the full buffer to the writer thread and take a free one."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._drain, name=f"write {self._path.name}", daemon=True)
            self._writer.start()
        self._full.put((self._buffer, self._filled))
        self._filled = 0
        if self._num_buffers < NUM_BUFFERS:
            self._num_buffers += 1
            self._buffer = _new_buffer()
        else:
            self._buffer = self._free.get()
        if self.failure is not None:
            raise self.failure

    def _drain(self) -> None:
        while (filled := self._full.get()) is not None:
            buffer, count = filled
            if self.failure is None:
                self._to_sink(buffer, count)
            self._free.put(buffer)

    def _to_sink(self, buffer: mmap.mmap, count: int) -> None:
        try:
            with memoryview(buffer) as view:
                self._sink.write(view[:count])
        except OSError as error:
            error.filename = error.filename or str(self._path)  # the error of a write does not name its file
            self.failure = error

    def finish(self) -> FileRecord:
        """Make everything durable except the directory entry, and close the file.

        Raises:
            OSError: names the file.
        """
        self._stop_writer()
        if self.failure is None and self._filled:
            self._to_sink(self._buffer, self._filled)
        if self.failure is None:
            try:
                self._sink.finish()
            except OSError as error:
                error.filename = error.filename or str(self._path)
                self.failure = error
        self.close()
        if self.failure is not None:
            raise self.failure
        return self.record()

    def _stop_writer(self) -> None:
        if self._writer is not None:
            self._full.put(None)
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        """Close the file; without a `finish` before, its content is incomplete."""
        if not self.closed:
            self._stop_writer()
            self._sink.close()
            self._give_back_buffers()
            super().close()

    def _give_back_buffers(self) -> None:
        _SPARE.put(self._buffer)
        for _ in range(self._num_buffers - 1):
            _SPARE.put(self._free.get())

    def record(self) -> FileRecord:
        """Size and hash of everything written so far."""
        return FileRecord(size=self._size, digest=self._digest.hexdigest())


class _LocalSink:
    """A local file, written past the page cache (O_DIRECT) as long as lengths allow."""

    def __init__(self, path: StoragePath) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = sys.platform == "linux"
        try:
            self._file = os.open(path, flags | (os.O_DIRECT if self._direct else 0), 0o666)
        except OSError as error:
            if not self._direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._direct = False
            self._file = os.open(path, flags, 0o666)

    def write(self, view: memoryview) -> None:
        while len(view):
            if self._direct and len(view) < _ALIGNMENT:
                self._to_page_cache()
            # The end of a file that is not a multiple of the alignment goes through the page cache.
            count = len(view) - len(view) % _ALIGNMENT if self._direct else len(view)
            try:
                written = os.write(self._file, view[:count])
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                written = 0
                self._to_page_cache()  # this file system needs another alignment
            if written % _ALIGNMENT:
                self._to_page_cache()
            view = view[written:]

    def _to_page_cache(self) -> None:
        """Use the page cache from here on, for lengths that O_DIRECT does not accept."""
        if self._direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._direct = False

    def finish(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)


class _RemoteSink:
    """A file behind a URL, which appears as a whole when it is closed."""

    def __init__(self, path: StoragePath) -> None:
        self._file: BinaryIO = path.open("wb")
        self._finished = False

    def write(self, view: memoryview) -> None:
        self._file.write(bytes(view))  # a copy, because some stores keep a reference and the buffer is reused

    def finish(self) -> None:
        self._file.close()
        self._finished = True

    def close(self) -> None:
        if not self._finished:
            self._finished = True
            try:
                self._file.close()
            except OSError:
                return  # the write failed before, and its error was raised then


@contextmanager
def hashed(path: StoragePath) -> Iterator[HashingFile]:
    """Open a new file for writing; it is durable and closed at the end. ``record()`` is complete after the block.

    Raises:
        OSError: the storage's own error, with the path.
    """
    try:
        file = HashingFile(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    try:
        yield file
        file.finish()
    except Exception:
        if file.failure is not None:
            raise file.failure from None
        raise
    finally:
        file.close()


def write_durably(path: StoragePath, data: bytes) -> FileRecord:
    """Write a small file and fsync it, but not its directory."""
    with hashed(path) as file:
        file.write(data)
    return file.record()
