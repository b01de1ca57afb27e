"""The driver's handle to one worker process: each call returns a reference to its result at once."""

from __future__ import annotations

from typing import Any

from ray import ObjectRef

from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.workers.records import WorkerLocation


class WorkerHandle:
    """Calls to one `WorkerHost`; none of them waits. Raise `RayLost`."""

    def __init__(self, actor: Any) -> None:
        """
        Args:
            actor: Ray's handle.
        """
        self._actor = actor

    def adopt(self, target: str, *args: Any) -> ObjectRef[WorkerLocation]:
        """Let the process host ``target(*args)``."""
        return guard.ask(self._actor.adopt.remote, target, *args)

    def run(self, method: str, *args: Any) -> ObjectRef[Any]:
        """Call a method of the worker."""
        return guard.ask(self._actor.run.remote, method, *args)

    def run_in_two(self, method: str, *args: Any) -> tuple[ObjectRef[Any], ObjectRef[Any]]:
        """Call a method that returns a pair; the first can be fetched without the second."""
        first, second = guard.ask(self._actor.run.options(num_returns=2).remote, method, *args)
        return first, second

    def ping(self) -> ObjectRef[Any]:
        """Ask for an answer once the process has nothing else to do; fails if the process is dead."""
        return guard.ask(self._actor.__ray_ready__.remote)

    def kill(self) -> None:
        """End the process."""
        guard.kill(self._actor)
