"""`Twice` finds the operations of torch that do not repeat their bits."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_NOT_COMPARED = ("empty", "new_empty", "_local_scalar", "detach", "alias", "view", "_unsafe_view", "expand", "slice")
"""Operations whose outputs are uninitialized, or that only make views."""
_COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")
"""Namespaces of operations that exchange or copy what others computed; some have not finished when they return."""


class Twice(TorchDispatchMode):
    """Runs every operation twice, the second time with outputs full of NaN, and counts those whose results differ."""

    def __init__(self, *, replay: bool = False) -> None:
        """
        Args:
            replay: random operations draw the same numbers both times, so only the others can differ.
        """
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.differ: Counter[str] = Counter()
        self.first: str | None = None
        """The first operation that differed."""
        self._replay = replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func).removeprefix("aten."), kwargs or {}
        if name.startswith(_NOT_COMPARED) or func.namespace in _COMMUNICATION:
            return func(*args, **kwargs)
        again = (args, kwargs)
        if func._schema.is_mutable:
            again = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, again)
        with _rng_kept() if self._replay else nullcontext():
            out = func(*args, **kwargs)
        first = _tensors(out)
        poison = [torch.full_like(x, float("nan") if x.is_floating_point() else 1) for x in first]
        del poison  # the allocator gives these blocks to the second call
        second = _tensors(func(*again[0], **again[1]))
        self.seen[name] += 1
        # Behind the output of an attention's forward pass are seeds and offsets, which nothing uses without dropout.
        compared = 1 if "attention" in name and "backward" not in name else None
        pairs = list(zip(first, second, strict=True))[:compared]
        if not all(_equal(one, other) for one, other in pairs):
            self.differ[name] += 1
            self.first = self.first or name
        return out


def _rng_kept() -> AbstractContextManager[None]:
    """Within: random numbers are drawn, and drawn again afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def _equal(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
