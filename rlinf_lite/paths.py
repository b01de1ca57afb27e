"""Paths as users write them, and opening files whose names are fixed without following a link that someone left."""

from __future__ import annotations

import argparse
import errno
import os
import re
import stat
from pathlib import Path


def expand(path: str) -> str:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home directory, as a shell does it.

    Everything else is left as it is: URLs, ``hf:...`` and ``embedded:...`` among it.

    Raises:
        ValueError: it is empty, there is no such user, or it begins with a shell variable, which nobody replaces here.
    """
    if not path.strip():
        raise ValueError("is empty; give a path")
    if "\0" in path:
        raise ValueError("holds a null byte; remove it")
    if variable := re.match(r"\$([A-Za-z_]\w*)", path):
        name = variable[1]
        raise ValueError(f"{variable[0]} is replaced by a shell only; write ${{oc.env:{name}}}, or the path itself")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/", 1)[0]
        raise ValueError(f"there is no home directory {user}; for a directory of that name write ./{path}")
    return expanded


def argument(text: str) -> Path:
    """`expand` as the ``type`` of an argument of `argparse`, which shows the text of this error only."""
    try:
        return Path(expand(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def open_fixed(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """`os.open` for a file that is written under a fixed name in a user's directory; usable as ``opener`` of `open`.

    A link is not followed: what it leads to would be overwritten.

    Raises:
        OSError: the disk's own; or ELOOP: ``path`` is a symbolic link, a device, a pipe or a directory.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if (what := _what(path)) is None:
            raise
        raise _refused(path, what) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _refused(path, _what(path) or "no ordinary file")
    return file


def _refused(path: str | os.PathLike[str], what: str) -> OSError:
    return OSError(errno.ELOOP, f"is {what}, and is not written to; remove it first", os.fspath(path))


def _what(path: str | os.PathLike[str]) -> str | None:
    """Why `open_fixed` does not open ``path``; None if it is an ordinary file, or not there."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if stat.S_ISLNK(mode):
        return f"a symbolic link to {os.readlink(path)}"
    return None if stat.S_ISREG(mode) else "a directory" if stat.S_ISDIR(mode) else "no ordinary file"
