"""When a save is due: each policy by itself, together, and the signal that asks for one."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from rlinf_lite.config.compose import load
from rlinf_lite.runner.policies import (
    SAVE_SIGNAL,
    AtLastStep,
    BeforeDeadline,
    Due,
    EveryMinutes,
    EverySteps,
    Moment,
    OnBest,
    OnSignal,
    decide,
    policies,
    save_requests,
)


def at(step: int = 7, **known) -> Moment:
    return Moment(**{"step": step, "last_step": 100, "seconds_since_start": 60.0, "seconds_since_save": 60.0, **known})


@pytest.mark.parametrize(
    ("policy", "moment", "expected"),
    [
        (EverySteps(5), at(10), Due()),
        (EverySteps(5), at(11), None),
        (AtLastStep(), at(100), Due()),
        (AtLastStep(), at(99), None),
        (EveryMinutes(1.0), at(seconds_since_save=60.0), Due("1.0 minutes since the last one")),
        (EveryMinutes(1.0), at(seconds_since_save=59.9), None),
        (OnSignal(), at(signalled=True), Due("on SIGUSR2")),
        (OnSignal(), at(), None),
        (OnBest("val/accuracy"), at(improved=True), Due("best val/accuracy so far")),
        (OnBest("val/accuracy"), at(), None),
    ],
)
def test_each_policy(policy, moment, expected):
    assert policy.due(moment) == expected


@pytest.mark.parametrize(
    ("known", "stops"),
    [
        ({"seconds_since_start": 88.0, "longest_step": 8.0, "longest_save": 2.0}, False),  # left 12 = (8 + 2) * 1.2
        ({"seconds_since_start": 88.1, "longest_step": 8.0, "longest_save": 2.0}, True),
        ({"seconds_since_start": 88.1, "longest_step": 7.0, "longest_save": 2.0}, False),
        ({"seconds_since_start": 80.9, "longest_step": 8.0}, True),  # no save measured: taken to last as long as a step
        ({"seconds_since_start": 97.6, "longest_step": 0.1}, True),  # ... and at least 2 seconds of the 100
        ({"seconds_since_start": 500.0, "longest_step": 8.0, "longest_save": 2.0}, True),
        ({"seconds_since_start": 500.0, "step": 100, "longest_step": 8.0}, False),  # the run ends anyhow
    ],
)
def test_before_the_deadline(known, stops):
    due = BeforeDeadline(100.0).due(at(**known))
    assert (due is not None and due.stop) == stops


def test_together_the_ordinary_interval_needs_no_word_but_a_stop_does():
    found = (EverySteps(5), OnSignal(), BeforeDeadline(100.0))
    assert decide(found, at(7)) is None
    assert decide(found, at(10, signalled=True)) == Due("")
    assert decide(found, at(7, signalled=True)) == Due("on SIGUSR2")
    late = decide(found, at(10, seconds_since_start=99.0, longest_step=5.0))
    assert late == Due("runner.max_time: 1 s are left", stop=True)


def test_policies_of_a_config():
    assert policies(load(["runner.save_interval=-1"]).runner) == (AtLastStep(), OnSignal())
    asked = load(
        [
            "runner.save_interval=5",
            "runner.save_interval_minutes=2.5",
            "runner.max_time=01:00:00:01",
            "runner.checkpoint.keep_best.metric=val/accuracy",
            "runner.checkpoint.save_on_best=true",
        ]
    )
    assert policies(asked.runner) == (
        AtLastStep(),
        OnSignal(),
        EverySteps(5),
        EveryMinutes(2.5),
        OnBest("val/accuracy"),
        BeforeDeadline(86401.0),
    )


def test_a_signal_is_a_request_and_the_old_handler_comes_back():
    before = signal.getsignal(SAVE_SIGNAL)
    with save_requests() as request:
        assert not request.pending
        os.kill(os.getpid(), SAVE_SIGNAL)
        assert request.pending
    assert signal.getsignal(SAVE_SIGNAL) == before


def test_another_thread_leaves_the_handler_alone():
    before, pending = signal.getsignal(SAVE_SIGNAL), []

    def enter():
        with save_requests() as request:
            pending.append(request.pending)
            assert signal.getsignal(SAVE_SIGNAL) == before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert pending == [False]
