"""Write safetensors files with one tensor in memory at a time, and split a model over several files.

The format: https://github.com/huggingface/safetensors#format. The package's own writer takes all tensors at once, and
writes files that only their owner can read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

from rlinf_lite.errors import UserError
from rlinf_lite.weights.hf import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes: ``2GB``, ``500MB``, ``1GiB``, or a plain number.

    Raises:
        ValueError: it is not a size, or less than one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match.group(2) not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"{text!r} is not a size; write it as 2GB, 500MB or 1GiB")
    return size


def split(specs: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Split into parts, in order, each of at most ``max_bytes`` unless it is a single tensor."""
    parts: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if parts[-1] and filled + spec.num_bytes > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.num_bytes
    return parts


def write(stream: BinaryIO, specs: Mapping[str, Spec], read: Callable[[str], torch.Tensor]) -> None:
    """Write a whole file. Each tensor is ``read`` just before it is written, and freed before the next.

    Raises:
        UserError: a tensor has a type that the format does not have.
    """
    # The widest types first, so that every tensor is aligned to its item size.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    stream.write(_header(specs, order))
    for name in order:
        _write_tensor(stream, read(name), specs[name])


def _write_tensor(stream: BinaryIO, tensor: torch.Tensor, spec: Spec) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
    if tensor.numel():
        stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(specs: Mapping[str, Spec], order: list[str]) -> bytes:
    """Its length in 8 bytes, then names, types, shapes and offsets as JSON, padded to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        spec = specs[name]
        if spec.dtype not in _NAMES:
            raise UserError(f"{name} is {spec.dtype}, which cannot be written to safetensors", remedy="give --dtype")
        start, end = end, end + spec.num_bytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
