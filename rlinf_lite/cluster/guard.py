"""The driver's calls to Ray: all of them pass through here, and none is made once Ray is gone.

A call to a lost Ray waits, fails with whatever a broken socket gives, or ends this process from C++. Here each becomes
`RayLost`, the first as the hundredth; so a handler or a clean-up that asks Ray again changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import exceptions as ray_errors

from rlinf_lite.cluster.errors import RayLost

if TYPE_CHECKING:
    from rlinf_lite.cluster.nodes import RayPulse

T = TypeVar("T")


def _nothing() -> None: ...


POLL_SECONDS = 0.25
"""No call waits longer without a look at whether Ray is still there."""
_SETTLE_SECONDS = 2.0
"""A process that is killed closes its sockets first, and is gone a moment later."""


class Guard:
    """Calls to Ray while it is there. One object for the process, as Ray itself; workers do not need it."""

    def __init__(self) -> None:
        self._pulse: RayPulse | None = None
        self._lost: str | None = None
        self._meanwhile = _nothing

    def watch(self, pulse: RayPulse | None, meanwhile: Callable[[], None] = _nothing) -> None:
        """From now on look at this Ray; None: at none, and every call is made.

        Args:
            meanwhile: called again and again while a head that is out of reach is waited for; may raise.
        """
        self._pulse, self._lost, self._meanwhile = pulse, None, meanwhile

    def abandon(self, reason: str) -> None:
        """Ask Ray nothing any more, as if it were gone: the process is about to end, and waits for nobody."""
        self._lost = self._lost or reason

    @property
    def lost(self) -> bool:
        """Whether no call is made any more."""
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
        """``question(*args, **options)``.

        Raises:
            RayLost: Ray is gone, or its connection broke.
            Exception: of a worker, or about a worker, as Ray gives it.
        """
        self.check()
        try:
            return question(*args, **options)
        except ray_errors.RayTaskError:  # may be an OSError, too: a worker's own
            raise
        except (ray_errors.RayError, OSError) as error:
            self._blame(error)
            raise

    def _blame(self, error: Exception) -> None:
        """Raise `RayLost` if that is why."""
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
        """`ask`, for what the GCS has to answer: while that of a joined cluster is out of reach, waits for it.

        Without that Ray would wait, and end this process after a minute.
        """
        self.check_head()
        while self._pulse is not None and not self._pulse.reachable:
            self._meanwhile()
            time.sleep(POLL_SECONDS)
            self.check_head()
        return self.ask(question, *args, **options)

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        """``ray.get``.

        Args:
            timeout: None: the value is there, or soon will be.

        Raises:
            GetTimeoutError: it is not there after ``timeout`` seconds.
        """
        if timeout is not None and not self.wait([ref], timeout=timeout)[0]:
            raise ray_errors.GetTimeoutError(f"nothing in {timeout:g} s")
        return self.ask(ray.get, ref)

    def wait(self, refs: Sequence[Any], *, num_returns: int = 1, timeout: float) -> tuple[list[Any], list[Any]]:
        """``ray.wait``: those that are there, at most ``num_returns`` of them, and the others."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            done, waiting = self.ask(ray.wait, list(refs), num_returns=num_returns, timeout=min(left, POLL_SECONDS))
            if len(done) == num_returns or left <= POLL_SECONDS:
                return done, waiting

    def put(self, value: Any) -> Any:
        """``ray.put``."""
        return self.ask(ray.put, value)

    def kill(self, handle: Any) -> None:
        """``ray.kill``. Does nothing without Ray: workers end with it."""
        if not self.lost:
            try:
                self.ask(ray.kill, handle)
            except RayLost:
                return


guard = Guard()
