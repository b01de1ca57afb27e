"""The lock of a run directory: one driver per directory, a second is refused by name; a dead driver holds no lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlinf_lite.errors import ConfigError
from rlinf_lite.observability.notices import log_line
from rlinf_lite.paths import open_fixed

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Network file systems without them, or mounted so (Lustre: ENOSYS)."""
_PATIENCE_SECONDS = 2.0
_held: set[int] = set()


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Lock ``directory`` for this process; the kernel unlocks it when the process ends.

    A file system without locks gets a warning. The lock file is removed at an end in order.

    Raises:
        ConfigError: another process holds it.
        OSError: ``.lock`` is a link or no ordinary file, or the disk's own error.
    """
    path, ours = directory / ".lock", False
    file = _open(path)
    try:
        ours = _taken(file, directory)
        while ours and not _is_at(file, path):  # its holder has just removed it
            _close(file)
            file = _open(path)
            ours = _taken(file, directory)
        if ours:
            os.ftruncate(file, 0)
            os.pwrite(file, _self().encode(), 0)
        yield
    finally:
        if file in _held:  # a forked child has let go of it
            if ours and _is_at(file, path):
                path.unlink()
            _close(file)


def _open(path: Path) -> int:
    file = open_fixed(path, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(file)
    return file


def _close(file: int) -> None:
    _held.remove(file)
    os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open ``file`` is what ``path`` names: a lock on a removed file holds nobody off."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _taken(file: int, directory: Path) -> bool:
    """Whether it is ours now; False if the file system has no locks."""
    try:
        _flock(file)
    except BlockingIOError:
        holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
        raise ConfigError(
            f"runner.output_dir: {directory} is in use by {holder or 'another run'}; wait for its end, "
            "or choose another runner.experiment_name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log_line(
            f"!! {directory}: its file system has no locks ({error.strerror}): a second run in this directory "
            "would not be refused, and both would damage each other's checkpoints; start one at a time"
        )
        return False
    return True


def _flock(file: int) -> None:
    """Wait a little: a driver whose parent was killed may still be ending its Ray when the command is started again."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _self() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} since {since}\n"


def _let_go() -> None:
    """Release the locks in a forked child, which would keep them after the driver's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
