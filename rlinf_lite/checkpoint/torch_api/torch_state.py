"""Converts a torch model and optimizer to tensors by name plus plain values, and back.

Loading first makes tensors for the state of an optimizer that has not stepped yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, StateMismatch
from rlinf_lite.ties import tied_names

OptimizerTensors = dict[str, dict[str, torch.Tensor]]
"""The tensors of an optimizer's state: ``{"layer.weight": {"exp_avg": tensor}}``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchState:
    """The live state of a model and an optimizer (or none), by name."""

    tensors: dict[str, Any]
    """``{"model": {name: tensor}, "optim": {parameter name: {key: tensor}}}``; a tied parameter has one name only."""
    data: dict[str, Any]
    """Values that are not tensors: ``{"model": {name: value}, "optimizer": {"type", "groups", "state"} or None}``."""
    tied: dict[str, str]
    """Parameters that are the same tensor as an earlier one: ``{"head.weight": "embed.weight"}``."""


def capture(model: nn.Module, optimizer: Optimizer | None, *, copy: bool = False) -> TorchState:
    """Collect the state of ``model`` and ``optimizer`` by name.

    Args:
        copy: copy the tensors that may change outside of ``optimizer.step()``: buffers (BatchNorm's change in forward)
            and parameters that the optimizer does not hold. All others are live in any case.

    Raises:
        ValueError: the optimizer holds a parameter that the model does not have.
    """
    held = model.state_dict()  # first: it reshards parameters that FSDP2 left gathered after a forward
    tied = tied_names(model)
    names = {} if optimizer is None else parameter_names(model, optimizer)
    live = set(names.values())
    weights, values = {}, {}
    for name, value in held.items():
        if not isinstance(value, torch.Tensor):
            values[name] = value
        elif tied.get(name) not in held:
            weights[name] = value.detach().clone() if copy and name not in live else value
    if optimizer is None:
        return TorchState(tensors={"model": weights}, data={"model": values, "optimizer": None}, tied=tied)
    tensors, described = _take_optimizer(optimizer, names)
    return TorchState(
        tensors={"model": weights, "optim": tensors}, data={"model": values, "optimizer": described}, tied=tied
    )


def parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[torch.Tensor, str]:
    """The names in ``model`` of the parameters that ``optimizer`` holds.

    Raises:
        ValueError: it holds one that ``model`` does not have.
    """
    names: dict[torch.Tensor, str] = {param: name for name, param in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param not in names:
                raise ValueError(
                    f"the optimizer's param_groups[{number}] holds a parameter of shape {list(param.shape)} that the "
                    "model does not have: pass the optimizer of this model, created after fully_shard and whatever "
                    "else replaces parameters"
                )
    return {param: names[param] for group in optimizer.param_groups for param in group["params"]}


def _take_optimizer(optimizer: Optimizer, names: dict[torch.Tensor, str]) -> tuple[OptimizerTensors, dict[str, Any]]:
    tensors: OptimizerTensors = {}
    values: dict[str, dict[str, Any]] = {}
    for param, state in optimizer.state.items():
        if param not in names:
            raise ValueError(
                f"optimizer.state holds {type(param).__name__} {param!s:.40}, which is not one of its parameters"
            )
        name = names[param]
        tensors[name] = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
        values[name] = {str(key): value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    groups = [{**group, "params": [names[param] for param in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"type": type(optimizer).__name__, "groups": groups, "state": values}


def make_room(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], held: Mapping[str, TensorStorageMetadata]
) -> OptimizerTensors:
    """Tensors to load an optimizer state into: the optimizer's own where they fit, else new ones.

    This does not change the optimizer; `give_back` does.

    Args:
        saved: ``data["optimizer"]`` of `TorchState`, as saved.
        held: DCP's entries of the optimizer's tensors in the checkpoint, by name.

    Raises:
        StateMismatch: the checkpoint is of another type of optimizer, or of other parameters.
        DamagedCheckpoint: ``saved`` does not have the expected form.
    """
    names = parameter_names(model, optimizer)
    _check_optimizer(optimizer, saved, names)
    on_device = {name for group in saved["groups"] if _steps_on_device(group) for name in group["params"]}
    params = {name: param for param, name in names.items()}
    room: OptimizerTensors = {}
    for full, entry in held.items():
        if found := _split(full, params):
            name, key = found
            own = optimizer.state.get(params[name], {}).get(key)
            room.setdefault(name, {})[key] = _room(params[name], key, entry, own, name in on_device)
    return room


def _split(full: str, params: Mapping[str, Any]) -> tuple[str, str] | None:
    """Split ``optim.layer.weight.exp_avg`` into ``layer.weight`` and ``exp_avg``; None if no parameter fits."""
    parts = full.split(".")
    for end in range(len(parts) - 1, 1, -1):
        if (name := ".".join(parts[1:end])) in params:
            return name, ".".join(parts[end:])
    return None


def _steps_on_device(group: Mapping[str, Any]) -> bool:
    return bool(group.get("fused") or group.get("capturable"))


def _room(
    param: torch.Tensor, key: str, entry: TensorStorageMetadata, own: torch.Tensor | None, step_on_device: bool
) -> torch.Tensor:
    dtype = entry.properties.dtype
    if key == "step":  # as in torch: with the parameter if a kernel increments it, else on the CPU
        return torch.zeros(entry.size, dtype=dtype, device=param.device if step_on_device else "cpu")
    if isinstance(own, torch.Tensor) and own.shape == entry.size and own.dtype == dtype:
        return own
    if param.shape == entry.size:
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)  # sharded like the parameter
    return torch.zeros(entry.size, dtype=dtype, device=param.device)


def _check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], names: dict[torch.Tensor, str]) -> None:
    try:
        kind, theirs = saved["type"], [sorted(group["params"]) for group in saved["groups"]]
        _ = {name: dict(values) for name, values in saved["state"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"the description of its optimizer has an unknown form: {error!r}") from None
    if kind != type(optimizer).__name__:
        raise StateMismatch(f"it was written with {kind}, this is {type(optimizer).__name__}")
    ours = [sorted(names[param] for param in group["params"]) for group in optimizer.param_groups]
    if len(ours) != len(theirs):
        raise StateMismatch(f"its optimizer has {len(theirs)} parameter groups, this one {len(ours)}")
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if differing := sorted(set(mine) ^ set(other)):
            raise StateMismatch(f"param_groups[{number}] holds other parameters; among those: {differing[0]}")


def give_back(
    model: nn.Module, optimizer: Optimizer | None, tensors: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Load ``tensors`` and the plain values ``saved`` (as in `TorchState`) into ``model`` and ``optimizer``."""
    held = model.state_dict()
    model.load_state_dict({name: tensors["model"].get(name, value) for name, value in held.items()} | saved["model"])
    if optimizer is None:
        return
    names, described = parameter_names(model, optimizer), saved["optimizer"]
    optimizer.state.clear()
    for param, name in names.items():
        state = {**tensors["optim"].get(name, {}), **described["state"].get(name, {})}
        if state:
            optimizer.state[param] = state
    for group, values in zip(optimizer.param_groups, described["groups"], strict=True):
        _put_back(group, {key: value for key, value in values.items() if key != "params"})


def _put_back(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
            group[key].copy_(value)  # in place: a scheduler or a captured graph may hold this tensor
        else:
            group[key] = value
