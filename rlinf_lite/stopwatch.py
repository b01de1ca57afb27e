"""Measures a start or a recovery, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds by part, from when the object is created."""

    clock: Callable[[], float] = time.monotonic
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        now = self.clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """Of all parts together."""
        return sum(self.parts.values())

    def line(self, what: str) -> str:
        """``{what} 1.43 s: tear down 0.05, rebuild 0.23, ...``, for the log."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.parts.items())
        return f"{what} {self.seconds:.2f} s: {parts}"
