"""The driver's handle to one worker process: each call returns a reference to its result at once."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Call a method of the worker.

        Args:
            args: references come last; their values are what the method gets.
        """
        return guard.ask(self._actor.run.remote, *_packed(method, args))

    def run_in_two(self, method: str, *args: Any) -> tuple[ObjectRef[Any], ObjectRef[Any]]:
        """As `run`, for a method that returns a pair; the first can be fetched without the second."""
        first, second = guard.ask(self._actor.run.options(num_returns=2).remote, *_packed(method, args))
        return first, second

    def ping(self) -> ObjectRef[Any]:
        """Ask for an answer once the process has nothing else to do; fails if the process is dead."""
        return guard.ask(self._actor.__ray_ready__.remote)

    def kill(self) -> None:
        """End the process."""
        guard.kill(self._actor)


def _packed(method: str, args: Sequence[Any]) -> list[Any]:
    """The arguments of `WorkerHost.run`. Ray takes some time for each; for a list of plain values only once."""
    num_plain = next((place for place, arg in enumerate(args) if isinstance(arg, ObjectRef)), len(args))
    assert all(isinstance(arg, ObjectRef) for arg in args[num_plain:])
    return [[method, *args[:num_plain]], *args[num_plain:]]
