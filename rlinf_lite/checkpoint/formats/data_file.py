"""``data/data.pt``: small plain values and tensors, read through an allow-list so that nothing in it can run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from rlinf_lite.checkpoint.errors import DamagedCheckpoint
from rlinf_lite.checkpoint.formats.tensor_file import decode
from rlinf_lite.checkpoint.formats.unpickling import UNREADABLE, reading_error
from rlinf_lite.checkpoint.layout import DATA
from rlinf_lite.checkpoint.storage import StoragePath, read_file


def encode(data: Mapping[str, Any]) -> bytes:
    """The bytes of ``data.pt``.

    Raises:
        TypeError: something in ``data`` could be saved but not loaded again (a numpy scalar, an object).
    """
    return _encode(data) if data else _encoded_nothing()


@cache  # replicas have no data, and are taken after each step
def _encoded_nothing() -> bytes:
    return _encode({})


def _encode(data: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(data), buffer)
    try:
        decode(memoryview(bytearray(buffer.getbuffer())))
    except UNREADABLE as error:
        raise TypeError(f"{DATA} takes plain values and tensors only: {reading_error('it', error)}") from None
    return buffer.getvalue()


def read_data(path: StoragePath) -> dict[str, Any]:
    """Read ``data/data.pt`` of the checkpoint ``path``: plain values, and tensors on the CPU.

    Raises:
        UnsafeCheckpoint: it asks for anything else, which is not run.
        DamagedCheckpoint: it is missing or cannot be read.
    """
    file = path / DATA
    try:
        data = decode(memoryview(bytearray(read_file(file))))
    except UNREADABLE as error:
        raise reading_error(str(file), error) from None
    if not isinstance(data, dict):
        raise DamagedCheckpoint(f"{file}: holds a {type(data).__name__}, not a dict")
    return data
