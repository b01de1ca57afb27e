"""The one Ray actor class: a process that imports the worker class it is told to host, and passes calls on to it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import ray

from rlinf_lite.cluster import stacks
from rlinf_lite.cluster.workers.records import WorkerLocation
from rlinf_lite.quick_imports import quick_imports


class WorkerHost:
    """A worker process. It imports its worker by name, so the driver does not import what only workers need."""

    def __init__(self, warm_up: str | None = None, *args: Any) -> None:
        """
        Args:
            warm_up: ``"module:function"`` to call with ``args`` right away, as a spare process does; None: nothing.
        """
        stacks.enable()
        self._worker: Any = None
        if warm_up is not None:
            _find(warm_up)(*args)

    def adopt(self, target: str, *args: Any) -> WorkerLocation:
        """Build ``target(*args)``, the worker that this process hosts from now on."""
        self._worker = _find(target)(*args)
        return WorkerLocation(
            process=stacks.me(),
            node_id=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
        )

    def run(self, call: Sequence[Any], *more: Any) -> Any:
        """Call a method of the worker.

        Args:
            call: the name of the method, and its first arguments.
            more: the others.
        """
        method, *args = call
        return getattr(self._worker, method)(*args, *more)


def _find(target: str) -> Any:
    module, name = target.split(":")
    with quick_imports():
        return getattr(importlib.import_module(module), name)


def gpu_of_this_process() -> str:
    """Return the GPU that Ray gave this process, as CUDA_VISIBLE_DEVICES names it."""
    (gpu,) = ray.get_gpu_ids()
    return str(gpu)
