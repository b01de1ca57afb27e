"""Reads parts of a file in threads while the caller works on earlier parts.

It uses the page cache: bypassing it was measured to be slower, and a second reader profits.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rlinf_lite.checkpoint.storage import StoragePath, is_local

PIECE_BYTES = 2 << 20  # per request: larger ones keep the kernel from reading ahead
_AHEAD_BYTES = 16 << 20  # what is read further ahead has left the processor's cache when its turn comes
_NUM_BUFFERS = _AHEAD_BYTES // PIECE_BYTES + 1  # one is with the caller
_NUM_THREADS = 2
_MOST_WARM_BYTES = 1 << 30

Span = tuple[int, int]
"""Offset and length in a file, in bytes."""


def read_ahead(file: StoragePath, spans: list[Span]) -> Generator[tuple[Span, memoryview], None, None]:
    """Read the spans of a file, which must be sorted by their offsets.

    Takes 18 MiB of memory, and the length of the two longest spans that are longer than `PIECE_BYTES`.

    Yields:
        Each span and its bytes, which are overwritten when a later span is asked for.

    Raises:
        EOFError: the file ends before a span does.
        OSError: it cannot be read.
    """
    extent = sum(spans[-1]) - spans[0][0] if spans else 0
    with _Source(file, in_order=2 * sum(length for _, length in spans) >= extent) as source:
        coming: deque[_Piece] = deque()
        waiting = deque(_group(spans))
        while coming or waiting:
            while waiting and sum(len(piece.buffer) for piece in coming) < _AHEAD_BYTES:
                coming.append(source.start(waiting.popleft()))
            piece = coming.popleft()
            yield from piece.parts()
            source.give_back(piece)


def read_span(file: StoragePath, offset: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of a file from ``offset`` on. Raises as `read_ahead`."""
    with closing(_LocalHandle(file, in_order=False) if is_local(file) else _RemoteHandle(file)) as handle:
        handle.read(offset, view)


@contextmanager
def warming(files: list[StoragePath]) -> Iterator[None]:
    """Bring the beginning of local files to the page cache, in a thread that stops at the end of the block."""
    stop = threading.Event()
    thread = threading.Thread(target=_warm, args=(files, stop), name="warm", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _warm(files: list[StoragePath], stop: threading.Event) -> None:
    scratch, left = bytearray(PIECE_BYTES), _MOST_WARM_BYTES
    for path in filter(is_local, files):
        with suppress(OSError), path.open("rb", buffering=0) as file:  # the real read will report it
            while left > 0 and not stop.is_set() and (count := file.readinto(scratch)):
                left -= count


def _group(spans: list[Span]) -> Iterator[list[Span]]:
    """Group adjacent spans, up to the size of a piece."""
    group: list[Span] = []
    for span in spans:
        if group and (span[0] != sum(group[-1]) or sum(span) - group[0][0] > PIECE_BYTES):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Adjacent spans that are read together."""

    spans: list[Span]
    start: int
    """Offset in the file of the buffer's first byte."""
    buffer: memoryview
    reads: list[Future[None]]

    def parts(self) -> Iterator[tuple[Span, memoryview]]:
        for read in self.reads:
            read.result()
        for offset, length in self.spans:
            yield (offset, length), self.buffer[offset - self.start : offset - self.start + length]


class _Source(AbstractContextManager["_Source"]):
    """An open file, the threads that read it, and their buffers."""

    def __init__(self, file: StoragePath, *, in_order: bool) -> None:
        self._handle = _LocalHandle(file, in_order) if is_local(file) else _RemoteHandle(file)
        self._threads = ThreadPoolExecutor(_NUM_THREADS if is_local(file) else 1)
        self._spare = _buffers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._handle.close()

    def start(self, spans: list[Span]) -> _Piece:
        start, num_bytes = spans[0][0], sum(spans[-1]) - spans[0][0]
        buffer = self._spare.pop() if num_bytes <= PIECE_BYTES and self._spare else _new_buffer(num_bytes)
        view = buffer[:num_bytes]
        reads = [
            self._threads.submit(self._handle.read, start + at, view[at : at + PIECE_BYTES])
            for at in range(0, num_bytes, PIECE_BYTES)
        ]
        return _Piece(spans=spans, start=start, buffer=buffer, reads=reads)

    def give_back(self, piece: _Piece) -> None:
        if len(piece.buffer) == PIECE_BYTES:
            self._spare.append(piece.buffer)


def _buffers() -> list[memoryview]:
    """Buffers of `PIECE_BYTES`. In large pages, since a first access to each small one takes as long as the copy."""
    whole = _new_buffer(_NUM_BUFFERS * PIECE_BYTES)
    return [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]


def _new_buffer(num_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, max(PIECE_BYTES, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class _LocalHandle:
    def __init__(self, file: StoragePath, in_order: bool) -> None:
        """
        Args:
            in_order: most of the file is read, so the kernel should read ahead; otherwise it must not.
        """
        self._file = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL if in_order else os.POSIX_FADV_RANDOM)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; several threads may call it at once."""
        done = 0
        while done < len(view):
            if not (count := os.preadv(self._file, [view[done:]], offset + done)):
                raise EOFError(f"ends before byte {offset + len(view)}")
            done += count

    def close(self) -> None:
        os.close(self._file)


class _RemoteHandle:
    def __init__(self, file: StoragePath) -> None:
        self._file: Any = file.open("rb")

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; only one thread may call it at a time."""
        self._file.seek(offset)
        done = 0
        while done < len(view):
            if not (count := self._file.readinto(view[done:])):
                raise EOFError(f"ends before byte {offset + len(view)}")
            done += count

    def close(self) -> None:
        self._file.close()
