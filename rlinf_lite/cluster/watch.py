"""Checks that run while the driver waits for workers. Every wait of the driver goes through `Watch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import ObjectRef

from rlinf_lite.cluster.errors import Hung
from rlinf_lite.cluster.guard import POLL_SECONDS, guard

_RARELY_SECONDS = 1.0


class Watch:
    """Runs checks during waits; a check ends a wait by raising."""

    def __init__(self, hang_timeout: float) -> None:
        """
        Args:
            hang_timeout: a wait raises `Hung` after so many seconds without any answer; 0 or less: never.
        """
        self.hang_timeout = hang_timeout
        self.often: list[Callable[[], None]] = []
        """Called at every poll, and while the driver waits for Ray's head: must be cheap, and must not call Ray."""
        self.rarely: list[Callable[[], None]] = []
        """Called about once a second."""
        self._last_progress = self._last_rarely = time.monotonic()

    def progress(self) -> None:
        """Note that a call has finished."""
        self._last_progress = time.monotonic()

    def wait_one(
        self, refs: Sequence[ObjectRef[Any]], whose: Callable[[ObjectRef[Any]], tuple[str, int]]
    ) -> ObjectRef[Any]:
        """Wait for the first of ``refs`` that is there, as a value or as an error.

        Args:
            whose: returns (component, rank) of the worker that makes it.

        Raises:
            Hung: none was there within ``hang_timeout``.
            Exception: whatever a check raises.
        """
        self.progress()
        while True:
            done, _ = guard.wait(refs, timeout=POLL_SECONDS)
            if done:
                self.progress()
            self.look()
            if done:
                return done[0]
            if 0 < self.hang_timeout < (silent := time.monotonic() - self._last_progress):
                raise Hung(silent, sorted({whose(ref) for ref in refs}))

    @contextmanager
    def starting(self, seconds: float) -> Iterator[None]:
        """Within: a wait may take at least ``seconds``, because processes are starting."""
        before = self.hang_timeout
        self.hang_timeout = max(before, seconds) if before > 0 else before
        try:
            yield
        finally:
            self.hang_timeout = before

    def look_often(self) -> None:
        """Run the cheap checks once."""
        for check in self.often:
            check()

    def look(self) -> None:
        """Run the cheap checks, and the others if a second has passed."""
        self.look_often()
        if (now := time.monotonic()) - self._last_rarely >= _RARELY_SECONDS:
            self._last_rarely = now
            for check in self.rarely:
                check()
