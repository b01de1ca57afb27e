"""Measures the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds by phase of one step. The clock starts when the object is created."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the ``with`` block to phase ``name``, also if the block raises."""
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start

    def metrics(self) -> dict[str, float]:
        """``{"time/rollout": ..., "time/step": seconds since the start}``; phases in the order of their first entry."""
        phases = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        return {**phases, "time/step": self._clock() - self._start}
