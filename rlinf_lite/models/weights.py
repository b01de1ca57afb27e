"""Filling a (sharded) model from safetensors: each rank reads only the rows that are its own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlinf_lite.config import ConfigError
from rlinf_lite.models.build import named_state, tied_names


def fill(model: nn.Module, folder: Path) -> None:
    """Copy the folder's weights into the model's parameters and persistent buffers.

    Raises:
        ConfigError: the folder lacks weights, a file cannot be read, or a tensor is missing or has another shape.
    """
    index = _index(folder)
    names: dict[str, list[str]] = {name: [name] for name, _ in named_state(model)}
    for other, first in tied_names(model).items():
        names[first].append(other)
    with ExitStack() as stack, torch.no_grad():
        opened = {file: stack.enter_context(_open(file)) for file in sorted(set(index.values()))}
        for name, target in named_state(model):
            stored = _stored_name(names[name], index, model)
            if stored is None:
                raise ConfigError(f"actor.model.model_path={folder}: its weights lack {name}")
            _copy_rows(opened[index[stored]].get_slice(stored), target, f"actor.model.model_path={folder}: {stored}")


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor sharded over dimension 0 (or all of a plain one), and the first one's index."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] if offset else 0


def _copy_rows(source, target: torch.Tensor, what: str) -> None:  # type: ignore[no-untyped-def]
    if list(source.get_shape()) != list(target.shape):
        raise ConfigError(
            f"{what} is {list(source.get_shape())}, the architecture in config.json wants {list(target.shape)}"
        )
    local, start = local_rows(target)
    if local.numel():
        local.copy_(source[start : start + local.shape[0]] if local.dim() else source[...])


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        return {name: folder / file for name, file in json.loads(listing.read_text())["weight_map"].items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"actor.model.model_path={folder}: no *.safetensors there; convert other formats first")
    index: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            index.update(dict.fromkeys(opened.keys(), file))
    return index


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"actor.model.model_path={file.parent}: {file.name}: {error}; copy the folder again"
        ) from None


def _stored_name(names: list[str], index: dict[str, Path], model: nn.Module) -> str | None:
    """Under which of a tensor's ``names`` it is stored. Files saved from a bare base model lack its prefix
    (``transformer.`` of GPT-2), and some keep tied weights under the later name (``lm_head.weight``)."""
    prefix = f"{model.base_model_prefix}."
    candidates = [*names, *(name.removeprefix(prefix) for name in names)]
    return next((name for name in candidates if name in index), None)
