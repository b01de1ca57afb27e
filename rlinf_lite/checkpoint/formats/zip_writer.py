"""Writes an uncompressed zip archive front to back, as ``torch.save`` lays it out: each record aligned to 64 bytes.

torch's own writer ends the process if the stream fails, and `zipfile` reads every byte a second time for its checksum;
checksums are left out here, because the whole file is hashed. Format: PKWARE's APPNOTE.TXT, with 64-bit sizes.
"""

from __future__ import annotations

import struct
from typing import IO, Any

_ALIGNMENT = 64
_VERSION = 45
"""Of the format: the first one with 64-bit sizes."""
_BIG = 0xFFFFFFFF
"""In place of a size that stands in the extra field."""
_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_EXTRA_LOCAL, _EXTRA_CENTRAL = struct.Struct("<2H2Q"), struct.Struct("<2H3Q")
_END_64, _LOCATOR, _END = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s4H2IH")


class ZipWriter:
    """Adds records to ``stream``, which it neither seeks nor closes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._start = stream.tell()
        self._entries: list[tuple[bytes, int, int]] = []  # name, size, offset of its header

    def add(self, name: str, content: Any) -> None:
        """Write one record."""
        view = memoryview(content).cast("B")
        encoded, size, offset = name.encode(), len(view), self._at()
        self._entries.append((encoded, size, offset))
        data = offset + _LOCAL.size + len(encoded) + _EXTRA_LOCAL.size + 4
        padding = -data % _ALIGNMENT
        extra = _EXTRA_LOCAL.pack(1, 16, size, size) + struct.pack("<2sH", b"FB", padding)
        header = _LOCAL.pack(
            b"PK\3\4", _VERSION, 0, 0, 0, 0, 0, _BIG, _BIG, len(encoded), len(extra) + padding
        )  # fmt: skip
        self._stream.write(header + encoded + extra + bytes(padding))
        self._stream.write(view)

    def _at(self) -> int:
        return self._stream.tell() - self._start

    def finish(self) -> None:
        """Write the directory of the records."""
        start, count = self._at(), len(self._entries)
        for name, size, offset in self._entries:
            extra = _EXTRA_CENTRAL.pack(1, 24, size, size, offset)
            header = _CENTRAL.pack(
                b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, 0, 0, _BIG, _BIG, len(name), len(extra), 0, 0, 0, 0, _BIG
            )  # fmt: skip
            self._stream.write(header + name + extra)
        length, end = self._at() - start, self._at()
        self._stream.write(
            _END_64.pack(b"PK\6\6", _END_64.size - 12, _VERSION, _VERSION, 0, 0, count, count, length, start)
        )
        self._stream.write(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        self._stream.write(_END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _BIG, _BIG, 0))
