"""A group of like workers: spawned into slots, called together, torn down by handle. Ray's exceptions end here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray import exceptions as ray_errors
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.session import Session
from rlinf_lite.types import MiniBatch

_GONE = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.RaySystemError,
)


class _Shell:
    """The one remote class. It imports its worker by name, so that the driver need not import what workers need."""

    def __init__(self, target: str, *args: Any) -> None:
        module, name = target.split(":")
        self._worker = getattr(importlib.import_module(module), name)(*args)

    def run(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)


class WorkerGroup:
    """Workers of one class, rank 0 first. Rank r sits in slot ``slots[r]``."""

    def __init__(self, name: str, component: str, target: str, session: Session, *args: Any) -> None:
        """Spawn ``target(rank, world_size, *args)`` in each slot of ``component``; returns before the processes are up.

        Args:
            name: for messages.
            target: ``"module:Class"``.
        """
        self.name = name
        slots = session.placement.slots[component]
        self.size = len(slots)
        named = type(name, (_Shell,), {})  # the class's name is what `ps` and `ray list actors` show
        self._handles: list[Any] = [
            ray.remote(named)
            .options(
                num_cpus=0,
                num_gpus=session.gpu_share(component, slot),
                scheduling_strategy=PlacementGroupSchedulingStrategy(session.group, session.bundle(slot)),
                runtime_env={"env_vars": session.worker_env()},
            )
            .remote(target, rank, len(slots), *args)
            for rank, slot in enumerate(slots)
        ]

    def start(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        """Call ``method`` on every rank without waiting; batches go into the object store once, for all of them."""
        if self.size > 1:
            args = tuple(ray.put(arg) if isinstance(arg, MiniBatch | list) else arg for arg in args)
        return [handle.run.remote(method, *args) for handle in self._handles]

    def start_one(self, rank: int, method: str, *args: Any) -> ray.ObjectRef:
        """Call ``method`` on one rank without waiting."""
        return self._handles[rank].run.remote(method, *args)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every rank; results in rank order.

        Raises:
            WorkerLost: a rank is gone.
            Exception: whatever the method raised on the first rank that failed, with the rank in its notes.
        """
        return self.results(self.start(method, *args))

    def results(self, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        """Results of one call a rank. Fails with the first failure: other ranks may be waiting for the failed one."""
        return results_of((self, refs))

    def result(self, ref: ray.ObjectRef, rank: int) -> Any:
        """The value behind a reference that rank ``rank`` made."""
        try:
            return ray.get(ref)
        except ray_errors.RayTaskError as error:
            raise _cause(error, f"in {self.name} rank {rank}") from None
        except _GONE as error:
            if isinstance(error, ray_errors.ActorDiedError) and error._actor_init_failed:
                raise RuntimeError(f"{self.name} rank {rank} could not start: {error}") from None
            raise WorkerLost(self.name, rank, _reason(error)) from None

    def lost(self, seconds: float) -> WorkerLost | None:
        """The lowest rank that is gone, if one is; asks for at most ``seconds``."""
        asked = {handle.__ray_ready__.remote(): rank for rank, handle in enumerate(self._handles)}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        for ref in sorted(answered, key=asked.__getitem__):
            try:
                self.result(ref, asked[ref])
            except WorkerLost as lost:
                return lost
        return None

    def kill(self) -> None:
        """End every process of the group, by handle."""
        for handle in self._handles:
            ray.kill(handle)

    def map_unordered(self, method: str, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Hand items to whichever worker is free; yields (item index, result) as they finish."""
        queue = iter(enumerate(items))
        running: dict[ray.ObjectRef, tuple[int, int]] = {}

        def feed(rank: int) -> None:
            if (following := next(queue, None)) is not None:
                index, item = following
                running[self.start_one(rank, method, item)] = (index, rank)

        for rank in range(self.size):
            feed(rank)
        while running:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            index, rank = running.pop(ref)
            yield index, self.result(ref, rank)
            feed(rank)


def results_of(*calls: tuple[WorkerGroup, Sequence[ray.ObjectRef]]) -> list[Any]:
    """Results of calls to ranks 0, 1, ... of several groups at once; fails with the first failure among all of them."""
    source = {ref: (group, rank) for group, refs in calls for rank, ref in enumerate(refs)}
    values: dict[ray.ObjectRef, Any] = {}
    waiting = list(source)
    while waiting:
        (ref,), waiting = ray.wait(waiting, num_returns=1)
        group, rank = source[ref]
        values[ref] = group.result(ref, rank)
    return [values[ref] for ref in source]


def _cause(error: ray_errors.RayTaskError, where: str) -> BaseException:
    cause = error.cause if isinstance(error.cause, BaseException) else RuntimeError(str(error))
    cause.add_note(where)
    cause.__cause__ = None
    cause.add_note(str(error))
    return cause


def _reason(error: BaseException) -> str:
    """The one sentence of Ray's report that says what happened, and to which process."""
    text = " ".join(str(error).split())
    process = re.search(r"pid: (\d+) .*?ip: (\S+)", text)
    where = f"process {process[1]} on {process[2]}: " if process else ""
    report = text.rpartition("exit type")[2]
    detail = re.search(r"(?:Worker exit detail:|because) (.*?)(?: Some common causes|$)", report)
    return f"{where}{(detail[1] if detail else text)[:300]}"
