"""The machine's own limits: plain file writes and reads, the page cache, and a process's peak memory.

Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 8 << 20
_ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A range of a file."""

    path: Path
    offset: int
    num_bytes: int


def write_plainly(path: Path, num_bytes: int, *, direct: bool) -> None:
    """Write a new file of ``num_bytes`` in blocks out of one buffer, and fsync it and its directory.

    ``direct`` goes past the page cache; the last block is then rounded up to whole sectors.
    """
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # page-aligned, as O_DIRECT wants it
        block.write(os.urandom(BLOCK_BYTES))
        view = memoryview(block)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o644)
        try:
            left = num_bytes
            while left > 0:
                left -= os.write(handle, view[: min(BLOCK_BYTES, -(-left // _ALIGNMENT) * _ALIGNMENT)])
            os.fsync(handle)
        finally:
            os.close(handle)
            view.release()
    sync_file(path.parent)


def read_plainly(parts: list[Part]) -> int:
    """Read ``parts`` through one buffer. Returns the number of bytes."""
    block, total = bytearray(BLOCK_BYTES), 0
    for part in parts:
        with part.path.open("rb", buffering=0) as file:
            file.seek(part.offset)
            left = part.num_bytes
            while left and (count := file.readinto(memoryview(block)[: min(BLOCK_BYTES, left)])):
                left, total = left - count, total + count
    return total


def split(files: list[Path], num_parts: int) -> list[list[Part]]:
    """Split the concatenated bytes of ``files`` into equal parts for ``num_parts`` readers."""
    sizes = [file.stat().st_size for file in files]
    part_bytes, split_parts = -(-sum(sizes) // num_parts), []
    for reader in range(num_parts):
        start, parts = reader * part_bytes, []
        for file, size in zip(files, sizes, strict=True):
            first, last = max(0, start), min(size, start + part_bytes)
            if first < last:
                parts.append(Part(path=file, offset=first, num_bytes=last - first))
            start -= size
        split_parts.append(parts)
    return split_parts


def files_under(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_file(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_from_cache(files: list[Path]) -> None:
    """Drop ``files`` from the page cache, so that the next read comes from the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # dirty pages are not dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


class PeakMemory:
    """Most resident bytes of this process since it was made, above what it held then. The page cache does not count.

    The kernel keeps the peak (VmHWM, reset through clear_refs), so that no short one is missed.
    """

    def __init__(self) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that was kept would hide what a save takes anew
        Path("/proc/self/clear_refs").write_text("5")
        self._start = _status_bytes("VmRSS")

    def above_start(self) -> int:
        return _status_bytes("VmHWM") - self._start


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def file_system(directory: Path) -> str:
    """Type and device of the file system that ``directory`` is on, as ``ext4 on /dev/vda``."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        if left.split()[2] == wanted:
            return " on ".join(right.split()[:2])
    return "unknown"
