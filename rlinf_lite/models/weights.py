"""Filling a (sharded) model from safetensors: each rank reads only the rows that are its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlinf_lite.config import ConfigError
from rlinf_lite.models.build import named_state, tied_names

INDEX = "model.safetensors.index.json"
_KEY = "actor.model.model_path="


def fill(model: nn.Module, directory: Path) -> None:
    """Copy the directory's weights into the model's parameters and persistent buffers.

    Raises:
        ConfigError: the directory lacks weights, a file cannot be read, or a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for name, target, source in _stored(model, directory):
            _copy_rows(source, target, f"{_KEY}{directory}: {name}")


def read(model: nn.Module, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of the weights that `fill` copies, whole and as stored, one in memory at a time. Raises as `fill`."""
    for name, target, source in _stored(model, directory):
        _check_shape(source, target, f"{_KEY}{directory}: {name}")
        yield name, source[...]


def _stored(model: nn.Module, directory: Path) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """(name, tensor of the model, slice of the file) of everything that the directory must hold."""
    index = tensor_files(directory)
    names: dict[str, list[str]] = {name: [name] for name, _ in named_state(model)}
    for other, first in tied_names(model).items():
        names[first].append(other)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(open_file(file)) for file in sorted(set(index.values()))}
        for name, target in named_state(model):
            stored = _stored_name(names[name], index, model)
            if stored is None:
                raise ConfigError(f"{_KEY}{directory}: its weights lack {name}")
            yield name, target, opened[index[stored]].get_slice(stored)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor sharded over dimension 0 (or all of a plain one), and the first one's index."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] if offset else 0


def _copy_rows(source: Any, target: torch.Tensor, what: str) -> None:
    _check_shape(source, target, what)
    local, start = local_rows(target)
    if local.numel():
        local.copy_(source[start : start + local.shape[0]] if local.dim() else source[...])


def _check_shape(source: Any, target: torch.Tensor, what: str) -> None:
    if list(source.get_shape()) != list(target.shape):
        raise ConfigError(
            f"{what} is {list(source.get_shape())}, the architecture in config.json wants {list(target.shape)}"
        )


def tensor_files(directory: Path, key: str = _KEY) -> dict[str, Path]:
    """Which file of a model directory holds which tensor.

    Args:
        key: what begins an error's message, before the directory.

    Raises:
        ConfigError: there are no safetensors, or one of the files cannot be read.
    """
    listing = directory / INDEX
    if listing.is_file():
        try:
            where: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{key}{directory}: {INDEX} cannot be used ({error!r}); copy the directory again"
            ) from None
        return {name: directory / file for name, file in where.items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{key}{directory}: no *.safetensors there; convert other formats first")
    index: dict[str, Path] = {}
    for file in files:
        with open_file(file, key) as opened:
            index.update(dict.fromkeys(opened.keys(), file))
    return index


def open_file(file: Path, key: str = _KEY) -> safe_open:
    """Raises ConfigError as `tensor_files`."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{key}{file.parent}: {file.name}: {error}; copy the directory again") from None


def _stored_name(names: list[str], index: dict[str, Path], model: nn.Module) -> str | None:
    """Under which of a tensor's ``names`` it is stored. Files saved from a bare base model lack its prefix
    (``transformer.`` of GPT-2), and some keep tied weights under the later name (``lm_head.weight``)."""
    prefix = f"{model.base_model_prefix}."
    candidates = [*names, *(name.removeprefix(prefix) for name in names)]
    return next((name for name in candidates if name in index), None)
