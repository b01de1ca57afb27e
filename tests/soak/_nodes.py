"""A Ray cluster of several nodes on this machine: one head, which drivers join, and others that die and come back."""

from __future__ import annotations

import time
from contextlib import ExitStack

import psutil
from _job import kill
from ray_nodes import RayNodes, ray_nodes


class Nodes:
    """``size`` nodes of one location each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._stack = ExitStack()
        self._cluster: RayNodes | None = None
        self._returning: list[float] = []
        """When dead nodes come back, by ``time.monotonic()``."""

    def start(self) -> dict[str, str]:
        """Have every node running; returns what a driver needs in its environment to join them."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(ray_nodes(self.size))
        self._returning = [0.0] * len(self._returning)
        self.tend()
        return self._cluster.env

    def tend(self) -> None:
        """Bring back the nodes whose time has come."""
        for at in [at for at in self._returning if at <= time.monotonic()]:
            assert self._cluster is not None
            self._cluster.add_node()
            self._returning.remove(at)

    def processes(self) -> list[psutil.Process]:
        """Below the raylets: every worker is among them."""
        if self._cluster is None:
            return []
        return [process for number in self._cluster.nodes for process in self._cluster.processes(number)]

    def kill_one(self, index: int, *, returns: float) -> psutil.Process | None:
        """kill -9 the raylet of a node that is not the head, if there is one; it is back after ``returns`` seconds."""
        assert self._cluster is not None
        numbers = sorted(self._cluster.nodes)[1:]
        if not numbers:
            return None
        number = numbers[index % len(numbers)]
        raylet = psutil.Process(self._cluster.nodes[number]["raylet"])
        self._cluster.ask(do="kill", number=number)
        del self._cluster.nodes[number]
        self._returning.append(time.monotonic() + returns)
        return raylet

    def kill_all(self) -> None:
        """kill -9 every node, the head too; `start` makes another cluster."""
        if self._cluster is None:
            return
        kill(psutil.Process(self._cluster.gcs))
        for number in self._cluster.nodes:
            self._cluster.ask(do="kill", number=number)
        self._cluster.nodes.clear()
        self.end()

    def end(self) -> None:
        """Leave nothing running."""
        self._stack.close()
        self._cluster, self._returning = None, []
