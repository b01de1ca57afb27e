"""Files and directories that appear whole or not at all: written aside, made durable, renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from rlinf_lite.checkpoint.storage import sync_dir


class _Stream:
    """Writes straight to the file. Keeps the disk's first error, which ``torch.save`` turns into another one."""

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):
                done += self._raw.write(view[done:])
        except OSError as error:
            self.failure = self.failure or error
            raise
        return done

    def flush(self) -> None:
        """Nothing is kept back."""


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, made durable at the end (its name in the directory is not); its mode follows the umask.

    Raises:
        OSError: the disk's own error, naming the file.
    """
    with path.open("wb", buffering=0) as raw:
        stream = _Stream(raw)
        try:
            yield cast(BinaryIO, stream)
            os.fsync(raw.fileno())
        except Exception as error:
            if stream.failure is None:
                raise
            stream.failure.filename = stream.failure.filename or str(path)
            raise stream.failure from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name, and replaces what had it, when everything is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with durable_file(aside) as stream:
            yield stream
        os.replace(aside, path)
        sync_dir(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError unless ``path`` is free, or an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        what = "is there already and not empty" if path.is_dir() else "is there already"
        raise FileExistsError(f"--output_path {path}: {what}; give another path, or remove it first")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when it is full. Its files must be durable by then.

    Raises:
        FileExistsError: as `refuse_existing`.
    """
    refuse_existing(path)
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_dir(aside)
        os.rename(aside, path)
        sync_dir(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
