"""How files of a checkpoint are hashed: BLAKE3 now, several times as fast as the sha256 of earlier checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from blake3 import blake3

from rlinf_lite.checkpoint.storage import StoragePath

ALGORITHM = "blake3"
"""Of the files that are written."""
_CHUNK_BYTES = 1 << 20


class Hasher(Protocol):
    """What `hashlib` calls a hash object."""

    def update(self, data: Any, /) -> Any:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


ALGORITHMS: dict[str, Callable[[], Hasher]] = {ALGORITHM: blake3, "sha256": hashlib.sha256}
"""Of the files that are read. Both give 32 bytes."""


def hasher(algorithm: str = ALGORITHM) -> Hasher:
    """Begin a hash."""
    return ALGORITHMS[algorithm]()


def hash_of(data: Any) -> str:
    """Hash of bytes-like ``data``, as hex."""
    digest = hasher()
    digest.update(data)
    return digest.hexdigest()


def hash_of_file(path: StoragePath, algorithm: str = ALGORITHM) -> str:
    """Hash of a file's content, as hex; read once in small pieces."""
    digest = hasher(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
