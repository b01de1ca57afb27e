"""The driver's calls to Ray. All of them go through `guard`, which makes none once Ray is gone.

A call to a Ray that is gone may block, fail with any kind of socket error, or end this process from C++. `guard` raises
`RayLost` instead, however often it is asked, so error handlers and clean-up code may call Ray safely.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray import exceptions as ray_errors

from rlinf_lite.cluster.errors import RayLost

T = TypeVar("T")


def _nothing() -> None: ...


POLL_SECONDS = 0.25
"""No call waits longer than this without checking whether Ray is still there."""
_SETTLE_SECONDS = 2.0
"""A killed process closes its sockets first; within this time the process itself is gone, too."""


class Pulse(Protocol):
    """Tells whether Ray is still there."""

    @property
    def reachable(self) -> bool:
        """Whether the GCS answered when it was last checked."""

    def ended(self) -> str | None:
        """Return which of Ray's processes on this machine is gone; None if all are there. Takes two microseconds."""

    def lost(self) -> str | None:
        """As `ended`; also asks whether the GCS of a joined cluster answers."""


class RayCalls(Protocol):
    """What the guard itself calls of the module ``ray``."""

    def get(self, ref: ObjectRef[Any], /) -> Any: ...

    def wait(
        self, refs: list[ObjectRef[Any]], /, *, num_returns: int, timeout: float
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]: ...

    def kill(self, handle: Any, /) -> None: ...


class Guard:
    """Makes calls to Ray while it is there. One object per driver process, like Ray itself; workers do not need it."""

    def __init__(self, calls: RayCalls = ray) -> None:
        """
        Args:
            calls: the module ``ray``, or what stands in for it in a test.
        """
        self._ray = calls
        self._pulse: Pulse | None = None
        self._lost: str | None = None
        self._meanwhile = _nothing

    def watch(self, pulse: Pulse | None, meanwhile: Callable[[], None] = _nothing) -> None:
        """From now on check ``pulse`` before each call; None: make every call unchecked.

        Args:
            meanwhile: called repeatedly while the guard waits for a head that is out of reach; may raise.
        """
        self._pulse, self._lost, self._meanwhile = pulse, None, meanwhile

    def abandon(self, reason: str) -> None:
        """Make no more calls, as if Ray were gone: the process is about to exit and must not wait."""
        self._lost = self._lost or reason

    @property
    def lost(self) -> bool:
        """Whether the guard no longer makes calls."""
        return self._lost is not None

    def check(self) -> None:
        """Raise `RayLost` if Ray's processes on this machine are gone. Takes two microseconds."""
        if self._lost is None and self._pulse is not None:
            self._lost = self._pulse.ended()
        if self._lost is not None:
            raise RayLost(self._lost)

    def check_head(self) -> None:
        """Raise `RayLost` if Ray's processes are gone, or its head has been out of reach for too long."""
        self.check()
        if self._pulse is not None:
            self._lost = self._pulse.lost()
            self.check()

    @property
    def head_is_there(self) -> bool:
        """Whether `ask_head` would neither wait nor raise `RayLost` now."""
        try:
            self.check_head()
        except RayLost:
            return False
        return self._pulse is None or self._pulse.reachable

    def ask(self, question: Callable[..., T], *args: Any, **options: Any) -> T:
        """Return ``question(*args, **options)``.

        Raises:
            RayLost: Ray is gone, or its connection broke.
            Exception: an error that a worker raised, or that Ray reports about a worker, unchanged.
        """
        self.check()
        try:
            return question(*args, **options)
        except ray_errors.RayTaskError:  # may be an OSError, too: one that the worker raised
            raise
        except (ray_errors.RayError, OSError) as error:
            self._blame(error)
            raise
        except SystemError as error:  # what a signal handler raised in the last moment of a call of Ray's C code
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None

    def _blame(self, error: Exception) -> None:
        """Raise `RayLost` if Ray's end is the cause of ``error``."""
        self.check()
        of_a_socket = not isinstance(error, ray_errors.RayError)  # GetTimeoutError is an OSError, too
        in_doubt = of_a_socket or isinstance(error, ray_errors.RpcError | ray_errors.RaySystemError)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while in_doubt and time.monotonic() < deadline:
            time.sleep(0.02)
            self.check()
        if of_a_socket and self._pulse is not None:
            self._lost = f"its connection broke: {' '.join(str(error).split())[:300]}"
            raise RayLost(self._lost) from None

    def ask_head(self, question: Callable[..., T], *args: Any, **options: Any) -> T:
        """As `ask`, for questions that the GCS answers: waits while the GCS of a joined cluster is out of reach.

        Ray itself would wait too, but end this process after a minute.
        """
        self.check_head()
        while self._pulse is not None and not self._pulse.reachable:
            self._meanwhile()
            time.sleep(POLL_SECONDS)
            self.check_head()
        return self.ask(question, *args, **options)

    def get(self, ref: ObjectRef[T], timeout: float | None = None) -> T:
        """Return the value behind a reference.

        Args:
            timeout: None: the value is there, or soon will be.

        Raises:
            GetTimeoutError: it is not there after ``timeout`` seconds.
        """
        if timeout is not None and not self.wait([ref], timeout=timeout)[0]:
            raise ray_errors.GetTimeoutError(f"nothing in {timeout:g} s")
        value: T = self.ask(self._ray.get, ref)
        return value

    def wait(
        self, refs: Sequence[ObjectRef[Any]], *, num_returns: int = 1, timeout: float
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """Wait for values or errors; return at most ``num_returns`` references that are there, and all others."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            poll = min(left, POLL_SECONDS)
            done, waiting = self.ask(self._ray.wait, list(refs), num_returns=num_returns, timeout=poll)
            if len(done) == num_returns or left <= POLL_SECONDS:
                return done, waiting

    def kill(self, handle: Any) -> None:
        """End an actor's process. Does nothing without Ray: workers end with it."""
        if not self.lost:
            try:
                self.ask(self._ray.kill, handle)
            except RayLost:
                return


guard = Guard()
