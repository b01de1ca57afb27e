"""Files and directories that appear whole or not at all: written under a temporary name, fsynced, then renamed.

For local paths. Checkpoints have a longer protocol on top of this, see `rlinf_lite.checkpoint.commit`.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlinf_lite.paths import open_fixed


def sync_directory(path: Path) -> None:
    """fsync a directory, which makes the names in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a new file for writing; a symbolic link in its place is not followed.

    Args:
        durable: fsync the file at the end of the block. The directory is not synced.

    Raises:
        OSError: the storage's own error, with the path, even where a caller such as ``torch.save`` turned it into
            another exception.
    """
    raw = _RawFile(path, "wb", opener=open_fixed)
    file = io.BufferedWriter(raw)
    try:
        yield cast(BinaryIO, file)
        file.flush()
        if durable:
            os.fsync(raw.fileno())
    except Exception as error:
        failure = raw.failure or error
        if isinstance(failure, OSError):
            failure.filename = failure.filename or str(path)
        if failure is error:
            raise
        raise failure from error
    finally:
        with suppress(OSError):  # the buffer is flushed above, unless the write has failed already
            file.close()


class _RawFile(io.FileIO):
    """Remembers the first error of the storage."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextmanager
def replaced_file(path: Path, *, durable: bool = True, several_writers: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the name ``path`` when the block ends without an error.

    Args:
        durable: fsync the file before the rename, and its directory after it. False: a kill of this process still
            leaves either the old file or the new one, a power loss may leave neither.
        several_writers: use a temporary name of its own for each call, because another process may write the same file
            now. False: the name is ``path.tmp``, so that the next write cleans up what a kill left.

    Raises:
        OSError: as `new_file`; the old file, if any, is untouched.
    """
    name = f".{path.name}.tmp-{uuid.uuid4().hex[:8]}" if several_writers else f"{path.name}.tmp"
    temporary = path.with_name(name)
    with ExitStack() as cleanup:
        with new_file(temporary, durable=durable) as file:
            cleanup.callback(temporary.unlink, missing_ok=True)
            yield file
        temporary.replace(path)
    if durable:
        sync_directory(path.parent)


def replace_text(path: Path, text: str, *, durable: bool = True, several_writers: bool = False) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8. Arguments and errors as `replaced_file`."""
    with replaced_file(path, durable=durable, several_writers=several_writers) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a temporary directory to fill, which takes the name ``path`` when the block ends without an error.

    The files in it must be durable by then (see `new_file`). ``path`` must be free, or an empty directory.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
