"""Reads what training scripts save with ``torch.save`` beside tensors: arguments, RNG states, small records.

``argparse.Namespace`` and numpy arrays come back as what they are, enums and records of Megatron as `Record`. Nothing
runs: any other name is an error.
"""

from __future__ import annotations

import io
import math
import mmap
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from rlinf_lite.checkpoint.formats.tensor_file import TensorUnpickler, decode
from rlinf_lite.checkpoint.formats.unpickling import UNREADABLE, reading_error
from rlinf_lite.checkpoint.storage import StoragePath, is_local, read_file, size_of

_NUMBERS = re.compile(r"[<|=]?([biufc][0-9]{1,2}|\?)")


class Record:
    """An object of another program as plain data: the name of its class, and what it was made of."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        """Such as ``megatron.core.enums.ModelType``."""
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.args))})"


_RECORDS = {
    "megatron.core.enums": {"ModelType"},
    "megatron.core.optimizer.optimizer_config": {"OptimizerConfig"},
    "megatron.core.rerun_state_machine": {"RerunDiagnostic", "RerunMode", "RerunState"},
    "megatron.core.transformer.enums": {
        "AttnBackend", "AttnMaskType", "AttnType", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope",
        "LayerType", "ModelType",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
    "signal": {"Signals"},
}  # fmt: skip
"""The classes that megatron-core lists as safe to load, and whose instances its checkpoints hold."""


def _record(module: str, name: str) -> type:
    """A class that stands in for one of `_RECORDS`."""

    def __new__(cls: type, *args: Any) -> Record:
        return Record(f"{module}.{name}", args)

    return type(name, (), {"__new__": __new__})


class _ArrayType:
    """Stands for ``numpy.ndarray`` as an argument; it makes nothing itself."""


def _array(kind: Any, shape: Any, _: Any) -> np.ndarray:
    if kind is not _ArrayType or shape != (0,):
        raise ValueError("not a plain array")
    return np.empty(0, np.uint8)  # its BUILD gives it shape, type and content


def _dtype(text: Any, *_: Any) -> np.dtype:
    if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
        raise ValueError(f"an array of {text!r}, not of numbers")
    return np.dtype(text)


def _scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError("not a plain number")
    return np.frombuffer(content, dtype)[0]


def _dictionary(kind: Any) -> Any:
    if kind not in (int, float, list, dict):
        raise ValueError("a dict that makes its values")
    return {}


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes empty ones
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): Namespace,
    ("_io", "BytesIO"): io.BytesIO,
    ("io", "BytesIO"): io.BytesIO,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _dtype,
    ("collections", "defaultdict"): _dictionary,
    **{("__builtin__", kind.__name__): kind for kind in (int, float, list, dict)},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(module, name): _record(module, name) for module, names in _RECORDS.items() for name in names},
}


class _Unpickler(TensorUnpickler):
    buildable = (OrderedDict, Namespace, Record)

    def named(self, module: str, name: str) -> Any:
        return _NAMES.get((module.replace("builtins", "__builtin__"), name)) or super().named(module, name)

    def check_build(self, target: Any, state: Any) -> None:
        if isinstance(target, np.ndarray):
            _check_array(*state)
        elif isinstance(target, np.dtype):
            if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
                raise ValueError("an array of something other than little-endian numbers")
        elif isinstance(target, io.BytesIO):
            content, position, attributes = state
            if not isinstance(content, bytes) or type(position) is not int or attributes:
                raise ValueError("not plain bytes")
        else:
            super().check_build(target, state)


def _check_array(_: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
    """Check the arguments of ``ndarray.__setstate__``."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc" or not isinstance(content, bytes):
        raise ValueError("not an array of numbers")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"an array of shape {shape!r}")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array of shape {shape!r} in {len(content)} bytes")


def read_training_file(file: StoragePath) -> Any:
    """What ``torch.save`` wrote to ``file``. Tensors are on the CPU; those of a local file are views of it, mapped.

    Raises:
        UnsafeCheckpoint: it asks for a class or function outside the allow-list, which is not run.
        DamagedCheckpoint: it is missing or cannot be read.
    """
    try:
        return decode(_content(file), _Unpickler)
    except UNREADABLE as error:
        raise reading_error(str(file), error) from None


def _content(file: StoragePath) -> memoryview:
    if not is_local(file):
        return memoryview(bytearray(read_file(file)))
    if size_of(file) == 0:
        raise EOFError("is empty")
    with file.open("rb") as opened:
        # Pages that somebody writes to are copied: the file itself stays as it is.
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))


Read = Callable[[str], Any]


def file_reader(directory: StoragePath) -> Read:
    """A function that reads a file of ``directory`` by its name: `read_training_file`, or bytes if it is not ``.pt``.

    Raises:
        UnsafeCheckpoint, DamagedCheckpoint: as `read_training_file`.
    """

    def read(name: str) -> Any:
        file = directory / name
        if name.endswith(".pt"):
            return read_training_file(file)
        try:
            return read_file(file)
        except UNREADABLE as error:
            raise reading_error(str(file), error) from None

    return read
