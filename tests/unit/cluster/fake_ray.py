"""Ray's actors in this process, for tests of the groups: calls run at once, block, or fail, and processes die."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray import exceptions as ray_errors

from rlinf_lite.cluster.placement import Placement
from rlinf_lite.cluster.stacks import Process
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.workers.handle import WorkerHandle
from rlinf_lite.cluster.workers.records import WorkerLocation
from rlinf_lite.config import ClusterConfig

DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: {name}\n\tactor_id: 1\n\tpid: {pid}\n\tnamespace: 1\n\tip: 10.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits. End of file. Some common causes include: (1) the process was killed by the OOM killer."""


class Blocked(Exception):
    """Raised by a worker's method that shall not return until `FakeActor.resume`."""


@dataclass(eq=False)
class Ref:
    """A reference to a result."""

    done: bool = False
    value: Any = None
    error: Exception | None = None

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        self.done, self.value, self.error = True, value, error


class FakeRay:
    """Takes the place of the module ``ray`` in `Guard`."""

    def get(self, ref: Ref) -> Any:
        assert ref.done, "ray.get would wait for ever"
        if ref.error is not None:
            raise ref.error
        return ref.value

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if ref.done][:num_returns]
        if len(done) < num_returns:
            time.sleep(min(timeout, 0.01))
        return done, [ref for ref in refs if ref not in done]

    def kill(self, actor: FakeActor) -> None:
        actor.die()


@dataclass(eq=False)
class _Remote:
    call: Callable[..., Any]

    def remote(self, *args: Any) -> Any:
        return self.call(*args)

    def options(self, num_returns: int) -> _Remote:
        def pair(*args: Any) -> tuple[Ref, Ref]:
            whole = self.call(*args)
            return tuple(Ref(True, whole.value and whole.value[half], whole.error) for half in range(num_returns))

        return _Remote(pair)


class FakeActor:
    """Ray's handle to a `WorkerHost`. Its calls run one after the other, each when it is made if nothing blocks it."""

    def __init__(self, name: str, pid: int, node: str, build: Callable[..., Any]) -> None:
        self.name, self.pid, self.node, self.build = name, pid, node, build
        self.worker: Any = None
        self.alive = True
        self._queue: deque[tuple[Ref, Callable[..., Any], tuple[Any, ...]]] = deque()
        self.adopt = _Remote(lambda *args: self._add(self._adopt, args))
        self.run = _Remote(lambda *args: self._add(self._run, args))
        self.__ray_ready__ = _Remote(lambda: self._add(lambda: True, ()))

    def die(self) -> None:
        self.alive = False
        self._work()

    def resume(self) -> None:
        """Try again what was blocked."""
        self._work()

    def _adopt(self, target: str, *args: Any) -> WorkerLocation:
        self.worker = self.build(target, *args)
        return WorkerLocation(process=Process(pid=self.pid, created=0.0), node_id=self.node, address="10.0.0.1")

    def _run(self, call: list[Any], *more: Any) -> Any:
        method, *args = call
        return getattr(self.worker, method)(*args, *more)

    def _add(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Ref:
        ref = Ref()
        self._queue.append((ref, work, args))
        if len(self._queue) == 1:
            self._work()
        return ref

    def _work(self) -> None:
        while self._queue:
            ref, work, args = self._queue[0]
            if not self.alive:
                ref.settle(error=ray_errors.RayActorError("1", DEATH.format(name=self.name, pid=self.pid)))
            else:
                try:
                    ref.settle(work(*(_fetched(arg) for arg in args)))
                except Blocked:
                    return
                except Exception as error:
                    ref.settle(error=ray_errors.RayTaskError("run", "remote traceback", error).as_instanceof_cause())
            self._queue.popleft()


def _fetched(arg: Any) -> Any:
    if not isinstance(arg, Ref):
        return arg
    if not arg.done:
        raise Blocked
    if arg.error is not None:
        raise arg.error
    return arg.value


@dataclass
class FakeSession:
    """Takes the place of `Session`: slot n is on node ``nodes[n]``."""

    build: Callable[..., Any]
    """Makes the worker that a process hosts, from what `WorkerHost.adopt` is given."""
    slots: tuple[int, ...] = (0, 1)
    critic_slots: tuple[int, ...] = (0,)
    nodes: tuple[str, ...] = ("a", "a")
    config: ClusterConfig = field(default_factory=ClusterConfig)
    hang_timeout: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        slots = {"actor": self.slots, "critic": self.critic_slots, "rollout": self.slots, "reward": (0,)}
        self.placement = Placement(slots=slots)
        self.watch = Watch(self.hang_timeout)
        self.actors: list[FakeActor] = []
        self._pids = itertools.count(100)

    def start_process(self, name: str, component: str, slots: tuple[int, ...], *args: Any) -> WorkerHandle:
        self.actors.append(FakeActor(name, next(self._pids), self.nodes[slots[0]], self.build))
        return WorkerHandle(self.actors[-1])

    def node_of_slot(self, slot: int) -> str:
        return self.nodes[slot]

    def slot_of_node(self) -> dict[str, int]:
        return {self.nodes[slot]: slot for slot in reversed(self.slots)}
