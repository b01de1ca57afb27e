"""Where checkpoints are stored: in a local directory, or behind an fsspec URL; what differs between the two is here.

A local directory can be renamed atomically and made durable with fsync. An object store (``s3://``, ``gs://``,
``memory://``) can do neither, but shows an object only when it is complete. Both are used as paths: `pathlib.Path`, or
`upath.UPath`, which has the same methods.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from upath import UPath

from rlinf_lite.durable import sync_directory
from rlinf_lite.paths import expand

if TYPE_CHECKING:
    StoragePath = Path  # a UPath has the same methods, except where `is_local` is checked first
else:
    StoragePath = Path | UPath


def storage_path(where: str | os.PathLike[str]) -> StoragePath:
    """The path object for a local name, a ``file://`` URL, or any other URL that fsspec knows.

    Raises:
        ValueError: the name is empty or its ``~`` has no home directory; the URL's scheme is unknown, or its package
            is not installed.
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
            raise ValueError(f"{text}: names the machine {url.netloc!r}; write file:///... for a path on this one")
        return Path(unquote(url.path))
    try:
        found: StoragePath = UPath(text)  # type: ignore[assignment]
        found.fs  # type: ignore[attr-defined]  # noqa: B018  (imports the file system's package)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None
    return found


def is_local(path: StoragePath) -> bool:
    """Whether ``path`` is a `pathlib.Path`, which can be renamed, locked and fsynced."""
    return isinstance(path, Path)


def absolute(path: StoragePath) -> StoragePath:
    """``path`` as every process on this machine finds it, whatever its working directory."""
    return path.resolve() if is_local(path) else path


def size_of(file: StoragePath) -> int:
    """Size of a regular file in bytes.

    Raises:
        OSError: there is none.
        ValueError: it is a pipe, device or directory; reading a pipe could block for ever.
    """
    status = file.stat()
    is_regular = stat.S_ISREG(status.st_mode) if is_local(file) else file.is_file()
    if not is_regular:
        raise ValueError("not a regular file")
    return status.st_size


def read_file(file: StoragePath) -> bytes:
    """The content of a regular file. Raises as `size_of`."""
    size_of(file)
    return file.read_bytes()


def sync_dir(path: StoragePath) -> None:
    """Make the names in a directory durable. Does nothing for a URL, whose storage keeps what it has accepted."""
    if is_local(path):
        sync_directory(path)


def remove_tree(path: StoragePath, *, quietly: bool = False) -> None:
    """Remove ``path`` and everything below it; ``quietly`` ignores errors of the storage."""
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
    """Hold a shared lock on ``file``, usually a manifest, so that its checkpoint is not deleted during the block.

    Local storage only, and only against code that asks `is_in_use`. A file that cannot be opened is not locked.
    """
    with ExitStack() as stack:
        if is_local(file) and file.is_file() and os.access(file, os.R_OK):
            fcntl.flock(stack.enter_context(file.open("rb")), fcntl.LOCK_SH)
        yield


def is_in_use(file: StoragePath) -> bool:
    """Whether another process, or another part of this one, holds `in_use` on ``file`` now."""
    if not is_local(file) or not file.is_file():
        return False
    with file.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
