"""The flat order of Megatron's distributed optimizer: how ``distrib_optim.pt`` holds Adam's state.

Parameters of one rank in the reverse order of ``named_parameters()``, each beginning at a multiple of 64 floats. The
gaps are zeros; nothing follows the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Floats to a multiple of which the start of each parameter is rounded up."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter is: ``flat[start:stop]``."""

    name: str
    start: int
    stop: int


def slots(shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Where each parameter is, from the first float to the last; the last one's ``stop`` is ``numel_unpadded``.

    Args:
        shapes: of one rank, in the order of ``named_parameters()``.
    """
    found: list[Slot] = []
    end = 0
    for name, shape in reversed(list(shapes.items())):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + torch.Size(shape).numel()
        found.append(Slot(name, start, end))
    return found


def pack(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """float32 [numel_unpadded] in CPU memory, of values by name with the ``shapes``."""
    places = slots(shapes)
    flat = torch.zeros(places[-1].stop)
    for slot in places:
        flat[slot.start : slot.stop] = values[slot.name].reshape(-1)
    return flat


def unpack(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The values by name, in the order of ``shapes``: views of ``flat``.

    Raises:
        ValueError: ``flat`` has another number of floats.
    """
    places = slots(shapes)
    if flat.shape != (places[-1].stop,):
        raise ValueError(f"the parameters take {places[-1].stop} floats, but there are {list(flat.shape)}")
    found = {slot.name: flat[slot.start : slot.stop].view(shapes[slot.name]) for slot in places}
    return {name: found[name] for name in shapes}
