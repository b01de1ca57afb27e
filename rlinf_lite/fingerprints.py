"""sha256, as hex, of text, of JSON values and of files: what tells whether two things are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def of_text(text: str) -> str:
    """sha256 of ``text`` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_value(value: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    """sha256 of a JSON value, whatever the order of its keys.

    Args:
        default: makes a JSON value of what is none; without it that is a TypeError.
    """
    return of_text(json.dumps(value, sort_keys=True, default=default))


def of_file(path: Path) -> str:
    """sha256 of a file's content, read once in small pieces. ``path`` may also be a path behind a URL."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
