"""The weights of a Hugging Face directory: safetensors files, and the names under which they hold a model's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlinf_lite.errors import ConfigError
from rlinf_lite.weights.names import WeightNames, listed

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the safetensors format calls the types that a model's weights are converted from and to."""


class HfWeights:
    """A `WeightSource` over a Hugging Face directory. Tensors have the shapes that the architecture wants."""

    def __init__(
        self,
        directory: Path,
        names: WeightNames,
        *,
        where: str | None = None,
        wanted_by: str = "the architecture in config.json",
        may_lack: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """
        Args:
            names: of the model that ``config.json`` describes.
            where: how messages name ``directory``; None: as ``actor.model.model_path``.
            wanted_by: what the shapes in ``names`` are of, for messages.
            may_lack: whether a weight of this name may be missing; `read_rows` then returns zeros.

        Raises:
            ConfigError: there are no safetensors files, one cannot be read, or weights are missing.
        """
        self._where = f"actor.model.model_path={directory}" if where is None else where
        self._wanted_by = wanted_by
        self.shapes: Mapping[str, tuple[int, ...]] = names.shapes
        self._files = _tensor_files(directory, self._where)
        self._stored = {
            name: [stored for stored in names.stored_names(name) if stored in self._files] for name in names.shapes
        }
        if missing := [name for name, stored in self._stored.items() if not stored and not may_lack(name)]:
            raise ConfigError(f"{self._where}: its weights lack {listed(missing)}")

    @property
    def unused(self) -> list[str]:
        """Names in the files that are not of the model."""
        used = {stored for several in self._stored.values() for stored in several}
        return sorted(self._files.keys() - used)

    def dtype(self, name: str) -> torch.dtype:
        """
        Raises:
            ConfigError: it is a type that is not converted, such as F8_E4M3.
        """
        with self._opened(name) as found:
            stored = found.get_dtype()
        if stored not in DTYPES:
            raise ConfigError(
                f"{self._where}: {self._stored[name][0]}: type {stored} is not supported: known are {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        with self._opened(name) as found:
            return found[...]

    def read_rows(self, name: str, first_row: int, num_rows: int) -> Tensor:
        """Rows of dimension 0 as stored; a tensor without dimensions is read whole."""
        if not self._stored[name]:
            return torch.zeros(num_rows, *self.shapes[name][1:])
        with self._opened(name) as found:
            return found[first_row : first_row + num_rows] if self.shapes[name] else found[...]

    def check_ties(self) -> None:
        """Compare tensors that are stored under several names of one weight.

        Raises:
            ConfigError: they differ.
        """
        for name, (first, *others) in self._stored.items():
            for other in others:
                if not torch.equal(self._read_stored(first), self._read_stored(other)):
                    raise ConfigError(
                        f"{self._where}: {other} differs from {first}, but both are the model's {name}; "
                        "if they are two weights, config.json must say tie_word_embeddings: false"
                    )

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The slice of the file that holds ``name``."""
        stored, wanted = self._stored[name][0], self.shapes[name]
        # Opened anew each time, which takes under 1 ms: what an open file has read stays in this process's memory until
        # the file is closed, in the end the whole shard.
        with _open(self._files[stored], self._where) as file:
            found = file.get_slice(stored)
            if tuple(found.get_shape()) != wanted:
                raise ConfigError(
                    f"{self._where}: {name} is {list(found.get_shape())}, {self._wanted_by} wants {list(wanted)}"
                )
            yield found

    def _read_stored(self, stored: str) -> Tensor:
        with _open(self._files[stored], self._where) as file:
            return file.get_tensor(stored)


def _tensor_files(directory: Path, where: str) -> dict[str, Path]:
    """Which file holds which tensor."""
    listing = directory / INDEX
    if listing.is_file():
        try:
            files: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {INDEX} cannot be used ({error!r}); copy the directory again") from None
        return {name: directory / file for name, file in files.items()}
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{where}: no *.safetensors there; convert other formats first")
    index: dict[str, Path] = {}
    for path in paths:
        with _open(path, where) as file:
            index.update(dict.fromkeys(file.keys(), path))
    return index


def _open(file: Path, where: str) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {file.name}: {error}; copy the directory again") from None
