"""Seconds by phase, with a clock that the test controls."""

from __future__ import annotations

import time

import pytest

from rlinf_lite.observability import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_in_order_within_the_step():
    clock = Clock()
    timer = PhaseTimer(clock)
    for name, seconds in (("sync", 1.0), ("rollout", 4.0), ("sync", 2.0)):
        with timer.phase(name):
            clock.now += seconds
    clock.now += 0.5
    assert timer.seconds == {"sync": 3.0, "rollout": 4.0}
    assert list(timer.metrics().items()) == [("time/sync", 3.0), ("time/rollout", 4.0), ("time/step", 7.5)]


def test_a_phase_that_raises_is_counted():
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer.phase("reward"):
        clock.now += 2.0
        raise KeyError("x")
    assert timer.seconds == {"reward": 2.0}


def test_the_real_clock_runs():
    timer = PhaseTimer()
    with timer.phase("rollout"):
        time.sleep(0.02)
    metrics = timer.metrics()
    assert 0.02 <= metrics["time/rollout"] <= metrics["time/step"] < 5
