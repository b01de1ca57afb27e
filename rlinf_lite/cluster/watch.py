"""What is looked at while the driver waits for workers: every wait of the driver passes through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray

from rlinf_lite.cluster.errors import Hung
from rlinf_lite.cluster.guard import POLL_SECONDS, guard

_RARELY_SECONDS = 1.0


class Watch:
    """Checks that may end a wait, by raising."""

    def __init__(self, hang_timeout: float) -> None:
        """
        Args:
            hang_timeout: seconds without any answer after which a wait raises `Hung`; 0 or less: never.
        """
        self.hang_timeout = hang_timeout
        self.often: list[Callable[[], None]] = []
        """Called at every look, and while Ray's head is waited for: must cost nothing, and ask Ray nothing."""
        self.rarely: list[Callable[[], None]] = []
        """Called about once a second."""
        self._last_progress = self._last_rarely = time.monotonic()

    def progress(self) -> None:
        """Something has come to its end."""
        self._last_progress = time.monotonic()

    def wait_one(
        self, refs: Sequence[ray.ObjectRef], whose: Callable[[ray.ObjectRef], tuple[str, int]]
    ) -> ray.ObjectRef:
        """The first of ``refs`` that is there, whether a value or an error.

        Args:
            whose: (component, rank) of the worker that makes it.

        Raises:
            Hung: nothing was heard for ``hang_timeout``. And whatever the checks raise.
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
        """Within: processes start, which may take so long, whatever ``hang_timeout`` is."""
        before = self.hang_timeout
        self.hang_timeout = max(before, seconds) if before > 0 else before
        try:
            yield
        finally:
            self.hang_timeout = before

    def look_often(self) -> None:
        """The checks that cost nothing, once."""
        for check in self.often:
            check()

    def look(self) -> None:
        """Every check, once."""
        self.look_often()
        if (now := time.monotonic()) - self._last_rarely >= _RARELY_SECONDS:
            self._last_rarely = now
            for check in self.rarely:
                check()
