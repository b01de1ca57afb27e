"""Unpickling with an allow-list: nothing in the pickle runs, and nothing that is not on the list is even imported."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any, ClassVar

import torch

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, UnsafeCheckpoint

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What the readers raise for damaged bytes; found by flipping bits."""

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class ForeignName(pickle.UnpicklingError):
    """A pickle asks for a name that is not on the list."""


def _frame(unpickler: Any) -> None:
    unpickler.read(8)  # its length, which is for readers of streams: all of the pickle is here


def _build(unpickler: Any) -> None:
    unpickler.check_build(*unpickler.stack[-2:])
    unpickler.load_build()


class SafeUnpickler(pickle._Unpickler):
    """An unpickler that knows the names that `named` returns something for, and no others.

    It extends Python's implementation in Python. The one in C allocates a table of 2**32 entries when a flipped bit
    makes a memo index that large, and cannot keep a pickle from changing attributes of the classes on the list.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.FRAME[0]: _frame, pickle.BUILD[0]: _build}

    buildable: type | tuple[type, ...] = OrderedDict
    """The types whose instances may get attributes."""

    def __init__(self, content: bytes | memoryview) -> None:
        self._content = io.BytesIO(content)
        super().__init__(self._content)

    def load(self) -> Any:
        """As in Python's own, without its reader of frames, which takes long. Raises one of `UNREADABLE`."""
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        self.read, self.readinto, self.readline = self._content.read, self._content.readinto, self._content.readline
        dispatch: dict[int, Any] = self.dispatch
        try:
            while key := self._content.read(1):
                dispatch[key[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise EOFError("the pickle ends before its end mark")

    def named(self, module: str, name: str) -> Any:
        """What a name stands for; None refuses it."""
        raise NotImplementedError

    def check_build(self, target: Any, state: Any) -> None:
        """Raise one of `UNREADABLE` unless ``target`` may get the attributes in ``state``."""
        if not isinstance(target, self.buildable):
            raise TypeError(f"sets attributes of a {type(target).__name__}")

    def find_class(self, module: str, name: str) -> Any:
        if (found := self.named(module, name)) is None:
            raise ForeignName(f"{module}.{name}")
        return found


def reading_error(what: str, error: Exception) -> DamagedCheckpoint:
    """Turn one of `UNREADABLE` into an error of this package that names ``what``."""
    if isinstance(error, ForeignName):
        return UnsafeCheckpoint(f"{what}: asks for {error}, which no checkpoint needs; it was not run")
    if isinstance(error, UnsafeCheckpoint):
        return UnsafeCheckpoint(f"{what}: {error}")
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpoint(f"{what}: is missing")
    reason = next(iter(str(error).splitlines()), "")
    return DamagedCheckpoint(f"{what}: cannot be read ({type(error).__name__}: {reason})")
