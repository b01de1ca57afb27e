"""Where checkpoints lie: a local directory, or one behind an fsspec URL. What differs between the two is here.

A local directory can be renamed at once and made durable with fsync; a store of objects (``s3://``, ``gs://``,
``memory://``) can do neither, but shows no object before it is whole. Both are handled as paths: `pathlib.Path`, or
`upath.UPath`, which looks the same.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from upath import UPath

from rlinf_lite.durable import sync_directory
from rlinf_lite.paths import expand

if TYPE_CHECKING:
    StoragePath = Path  # a UPath answers to the same calls, except where `is_local` is asked first
else:
    StoragePath = Path | UPath


def storage_path(where: str | os.PathLike[str]) -> StoragePath:
    """The path object for a local name, a ``file://`` URL, or any other URL that fsspec knows.

    Raises:
        ValueError: the name is empty or has no home directory for its ``~``; no file system is known for the URL's
            scheme, or its package is not installed.
    """
    text = str(where)
    if "://" not in text:
        try:
            return Path(expand(text))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    if text.startswith("file://"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: names the machine {url.netloc!r}; a path on this one is file:///...")
        return Path(unquote(url.path))
    try:
        found: StoragePath = UPath(text)  # type: ignore[assignment]
        found.fs  # type: ignore[attr-defined]  # noqa: B018  (imports the file system's package)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None
    return found


def is_local(path: StoragePath) -> bool:
    """Whether ``path`` can be renamed, locked and synced: it is a `pathlib.Path`."""
    return isinstance(path, Path)


def absolute(path: StoragePath) -> StoragePath:
    """``path`` as any process on this machine, or any machine for a URL, finds it."""
    return path.resolve() if is_local(path) else path


def size_of(file: StoragePath) -> int:
    """Bytes of an ordinary file.

    Raises:
        OSError: there is none.
        ValueError: it is a pipe, device or directory, which cannot be read, or has no end.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) if is_local(file) else not file.is_file():
        raise ValueError("no ordinary file")
    return status.st_size


def read_small(file: StoragePath, most_bytes: int) -> bytes:
    """All of a file that should be small. Raises as `size_of`, and ValueError if it has more than ``most_bytes``."""
    if (size := size_of(file)) > most_bytes:
        raise ValueError(f"{size} bytes, at most {most_bytes} were expected")
    return file.read_bytes()


def sync_dir(path: StoragePath) -> None:
    """Make the names in a directory durable. Does nothing for a URL, whose storage keeps what it has accepted."""
    if is_local(path):
        sync_directory(path)


def remove_tree(path: StoragePath, *, quietly: bool = False) -> None:
    """Remove ``path`` and everything below it."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=quietly)
        return
    try:
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
    except OSError:
        if not quietly:
            raise


@contextmanager
def in_use(file: StoragePath) -> Iterator[None]:
    """Hold a shared lock on ``file`` while reading what it stands for, so that nobody deletes it meanwhile.

    Only on local storage, and only among those who ask; a file that cannot be opened is not locked.
    """
    if not is_local(file) or not file.is_file():
        yield
        return
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield


def is_in_use(file: StoragePath) -> bool:
    """Whether another process (or another part of this one) holds `in_use` on ``file`` now."""
    if not is_local(file) or not file.is_file():
        return False
    with file.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
