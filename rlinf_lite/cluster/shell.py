"""The one remote class: an empty process that becomes whichever worker it is told to be, at once or later."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import ray

from rlinf_lite.cluster import stacks


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLocation:
    """Where a worker lives."""

    process: stacks.Process
    node_id: str
    address: str


class Shell:
    """A process. It imports its worker by name, so that the driver need not import what workers need."""

    def __init__(self, warm_up: str | None = None, *args: Any) -> None:
        """
        Args:
            warm_up: ``"module:function"`` to call with ``args`` right away: a spare imports what workers need.
        """
        stacks.enable()
        self._worker: Any = None
        if warm_up is not None:
            _find(warm_up)(*args)

    def adopt(self, target: str, *args: Any) -> WorkerLocation:
        """Become ``target(*args)``."""
        self._worker = _find(target)(*args)
        return self.location()

    def location(self) -> WorkerLocation:
        return WorkerLocation(
            process=stacks.me(),
            node_id=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
        )

    def run(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)


def _find(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
