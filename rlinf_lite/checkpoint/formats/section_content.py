"""What one section of a checkpoint holds, tensors and plain values by name, whatever its layout."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.checkpoint.formats.training_file import file_reader
from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.sections import files_of
from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, slots=True)
class Form:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class SectionContent(Protocol):
    """Of one section."""

    def forms(self) -> dict[str, Form | None]:
        """Every tensor by name; None for a pickled object, which is not opened."""

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Some of the tensors, sorted by name."""

    def values(self) -> dict[str, Any]:
        """What is not a tensor, by name."""

    def part_of(self, name: str) -> str:
        """The part of the section to which a tensor belongs."""


def content_of(path: StoragePath, section: str, manifest: Manifest) -> SectionContent:
    """The content of a section of the checkpoint ``path``.

    Raises:
        UnsafeCheckpoint, DamagedCheckpoint: it cannot be read.
    """
    if manifest.has_shards(section):
        return _Shards(path / section)
    return _Files(path / section, files_of(section, manifest))


class _Shards:
    def __init__(self, directory: StoragePath) -> None:
        self._directory = directory
        self._entries = read_metadata(directory).state_dict_metadata

    def forms(self) -> dict[str, Form | None]:
        return {
            name: Form(entry.properties.dtype, entry.size) if isinstance(entry, TensorStorageMetadata) else None
            for name, entry in self._entries.items()
        }

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return read_tensors(self._directory, set(names).__contains__)

    def values(self) -> dict[str, Any]:
        return {}

    def part_of(self, name: str) -> str:
        return name.split(".")[0]


class _Files:
    """Tensors in files are named by both: ``mp_rank_00/distrib_optim.pt:0.param``, without the iteration."""

    def __init__(self, directory: StoragePath, files: Collection[str]) -> None:
        self._read, self._names = file_reader(directory), sorted(files)

    @cached_property
    def _leaves(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self._names:
            shown = name.partition("/")[2] if name.startswith("iter_") else name
            found |= dict(_leaves(f"{shown}:", self._read(name)))
        return found

    def forms(self) -> dict[str, Form | None]:
        return {name: Form(leaf.dtype, leaf.shape) for name, leaf in self._leaves.items() if _is_tensor(leaf)}

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: self._leaves[name] for name in sorted(names)}

    def values(self) -> dict[str, Any]:
        return {name: leaf for name, leaf in self._leaves.items() if not _is_tensor(leaf)}

    def part_of(self, name: str) -> str:
        return name.partition(":")[0].rpartition("/")[2]


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in a nest that is not a dict, a namespace, or a list with a dict or a tensor in it."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, list | tuple) and any(isinstance(one, dict | torch.Tensor | np.ndarray) for one in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield prefix.removesuffix("."), value
        return
    for key, inner in value.items():
        yield from _leaves(f"{prefix}{_key(key)}.", inner)


def _key(key: Any) -> str:
    """A key as text; the types of an optimizer's buffer as ``bfloat16+float32``."""
    if isinstance(key, tuple):
        return "+".join(map(_key, key))
    return str(key).removeprefix("torch.")
