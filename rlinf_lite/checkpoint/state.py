"""The state to save or load: nested dicts of tensors, their names in a checkpoint, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful

from rlinf_lite.checkpoint.errors import StateMismatch, UnsafeCheckpoint
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.rng import PREFIX as RNG_PREFIX

State = Mapping[str, Any]
"""Nested dicts of tensors (plain or DTensor), or `Stateful` objects that return and accept such dicts."""


def take(state: State, prefix: str = "") -> dict[str, Any]:
    """The live tensors of ``state`` as nested dicts, with each `Stateful` replaced by its ``state_dict()``.

    Raises:
        TypeError: names a value that is not a tensor, which would have to be pickled.
    """
    taken: dict[str, Any] = {}
    for name, value in state.items():
        # Tensors first: testing a tensor for `Stateful` takes longer than everything else here.
        if not isinstance(value, torch.Tensor | Mapping) and isinstance(value, Stateful):
            value = value.state_dict()
        if isinstance(value, Mapping):
            value = take(value, f"{prefix}{name}.")
        elif not isinstance(value, torch.Tensor):
            raise TypeError(f"state {prefix}{name} is a {type(value).__name__}, but may hold tensors only")
        taken[str(name)] = value
    return taken


def give_back(state: State, loaded: Mapping[str, Any]) -> None:
    """Pass ``loaded``, made by `take` and filled since, to the `Stateful` objects of ``state``."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            give_back(value, loaded[str(name)])
        elif not isinstance(value, torch.Tensor) and isinstance(value, Stateful):
            value.load_state_dict(loaded[str(name)])


def flatten(state: State) -> dict[str, torch.Tensor]:
    """``{"optim.w.step": tensor}``: the names under which DCP stores nested dicts and `Stateful` objects."""
    return flat_names(take(state))


def flat_names(taken: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """As `flatten`, of what `take` has returned."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in taken.items():
        if isinstance(value, dict):
            flat.update(flat_names(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_keys(directory: StoragePath, metadata: Metadata, state: State, *, whole: bool = True) -> None:
    """Compare the keys of ``state`` with those in the DCP directory; RNG states are ignored.

    Args:
        whole: False permits further top-level names in the checkpoint.

    Raises:
        StateMismatch: lists missing keys, extra keys, different shapes and types.
        UnsafeCheckpoint: names an entry that is a pickled object where a tensor was asked for.
    """
    wanted, held = flatten(state), metadata.state_dict_metadata
    missing = sorted(wanted.keys() - held.keys())
    extra = sorted(key for key in held.keys() - wanted.keys() if not key.startswith(RNG_PREFIX))
    if not whole:
        extra = [key for key in extra if key.split(".")[0] in state]
    problems = [f"{what}: {_some(keys)}" for what, keys in (("missing", missing), ("not asked for", extra)) if keys]
    for key in sorted(wanted.keys() & held.keys()):
        entry = held[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise UnsafeCheckpoint(f"{directory}: {key} is a pickled object where a tensor was asked for")
        ours, theirs = _form(wanted[key].dtype, wanted[key].shape), _form(entry.properties.dtype, entry.size)
        if ours != theirs:
            problems.append(f"{key} is {theirs}, the model's is {ours}")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise StateMismatch(f"{directory} is a checkpoint of another model or optimizer: {shown}")


def _form(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
