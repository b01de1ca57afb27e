"""Unpickling where nothing runs: each name must be on the reader's own list, and memory follows the length of the file.

What is on a list are stand-ins, values, and functions of this package, never somebody's classes: a pickle may set
attributes of what it is given.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sized
from typing import Any, ClassVar

import torch

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, UnsafeCheckpoint

_MAX_DIMS = 64  # torch's own limit
_MAX_KEY_DEPTH = 4

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What readers raise over bytes that nobody meant to be read (found by flipping bits)."""

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class ForeignName(pickle.UnpicklingError):
    """A pickle asks for a name that is not on the list."""


def _build(reader: Any) -> None:
    if not isinstance(reader.stack[-2], reader.buildable):
        raise TypeError(f"sets attributes of a {type(reader.stack[-2]).__name__}")
    reader.load_build()


def _set_items(reader: Any) -> None:
    for key in reader.stack[0::2]:
        reader.check_key(key)
    reader.load_setitems()


def _set_item(reader: Any) -> None:
    reader.check_key(reader.stack[-2])
    reader.load_setitem()


def _refuse(reader: Any) -> None:
    raise ValueError("uses an opcode that is not needed")


class SafeUnpickler(pickle._Unpickler):
    """The standard one in Python: the one in C takes memory for as many memo entries as five bytes can ask for."""

    # BYTEARRAY8 takes as much memory as it says, every other opcode no more than it is long; what is hashed is looked
    # at before, and opcodes that are not needed for that are refused.
    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(b"".join([pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT]), _refuse),
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }

    buildable: type = OrderedDict
    """What attributes may be set of."""

    def __init__(self, content: bytes | memoryview) -> None:
        super().__init__(io.BytesIO(content))
        self._allowance = len(content)

    def named(self, module: str, name: str) -> Any:
        """What a name stands for, or None: it is refused."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        if (found := self.named(module, name)) is None:
            raise ForeignName(f"{module}.{name}")
        return found

    def size(self, dims: Any = ()) -> torch.Size:
        """Stands in for `torch.Size`."""
        if len(dims) > _MAX_DIMS:
            raise ValueError(f"a shape of {len(dims)} dimensions")
        return torch.Size(dims)

    def check_key(self, key: Any, depth: int = 0) -> None:
        """Before it is hashed: the hash of a deep tuple overflows the stack, of tuples of one tuple takes for ever."""
        if isinstance(key, tuple):
            if depth == _MAX_KEY_DEPTH:
                raise ValueError("a key of tuples in tuples")
            self.charge(key)
            for part in key:
                self.check_key(part, depth + 1)

    def charge(self, value: Sized) -> None:
        """To be called for what is copied: no more in all than the pickle is long, else few bytes could ask for much.

        Raises:
            ValueError: no honest pickle asks for so much.
        """
        self._allowance -= len(value)
        if self._allowance < 0:
            raise ValueError("asks for more memory than it has bytes")


def reading_error(what: str, error: Exception) -> DamagedCheckpoint:
    """The error of this package for one of `UNREADABLE`."""
    if isinstance(error, ForeignName):
        return UnsafeCheckpoint(f"{what}: asks for {error}, which no checkpoint needs; it was not run")
    if isinstance(error, UnsafeCheckpoint):
        return UnsafeCheckpoint(f"{what}: {error}")
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpoint(f"{what}: is missing")
    reason = next(iter(str(error).splitlines()), "")
    return DamagedCheckpoint(f"{what}: cannot be read ({type(error).__name__}: {reason})")
