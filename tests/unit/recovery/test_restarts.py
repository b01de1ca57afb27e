"""Restarts of a run: the budget within a window, and loops that end the same way each time."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from rlinf_lite.recovery.restarts import GaveUp, RestartBudget

KILLED = "actor rank 1 was lost: killed by signal 9"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget(clock: Clock, max_restarts: int = 3, window_seconds: float = 60.0) -> RestartBudget:
    return RestartBudget(max_restarts=max_restarts, window_seconds=window_seconds, clock=clock)


def test_restarts_are_numbered_and_then_refused(clock):
    restarts = budget(clock)
    numbers = []
    for step in range(3):
        clock.now += 5
        numbers.append(restarts.admit(step=step, cause=KILLED, death=True))
    assert numbers == [1, 2, 3]
    clock.now += 5
    with pytest.raises(GaveUp) as error:
        restarts.admit(step=3, cause="rollout rank 0 was lost", death=True)
    for part in (
        "rollout rank 0 was lost\n",
        "3 times within 15 s",
        "runner.max_restarts=3",
        "runner.restart_window=60 s",
        "raise runner.max_restarts",
        "runner.resume_dir=auto",
    ):
        assert part in str(error.value)


def test_what_is_older_than_the_window_does_not_count(clock):
    restarts = budget(clock)
    numbers = []
    for step in range(12):
        numbers.append(restarts.admit(step=step, cause=KILLED, death=True))
        clock.now += 20  # the third last is 60 s old: at the window's edge, outside
    assert numbers == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert len(restarts.restarts) == 3


def test_a_restart_just_within_the_window_counts(clock):
    restarts = budget(clock, max_restarts=1)
    restarts.admit(step=1, cause=KILLED, death=True)
    clock.now += 59.9
    with pytest.raises(GaveUp, match="1 times within 60 s"):
        restarts.admit(step=2, cause=KILLED, death=True)


@pytest.mark.parametrize(("death", "admitted"), [(False, 1), (True, 2)])
def test_the_same_end_at_the_same_step_is_a_loop(clock, death, admitted):
    restarts = budget(clock, max_restarts=100)
    for number in range(admitted):
        clock.now += 1000  # however slowly it turns
        assert restarts.admit(step=7, cause="ValueError: bad", death=death) == 1, number
    with pytest.raises(GaveUp) as error:
        restarts.admit(step=7, cause="ValueError: bad", death=death)
    expected = f"ValueError: bad\nthis happened {admitted + 1} times in a row with 7 steps completed"
    assert str(error.value).startswith(expected) and "would end the same way; remove the cause" in str(error.value)


@pytest.mark.parametrize("between", [{"step": 8, "cause": "x"}, {"step": 7, "cause": "y"}])
def test_another_step_or_cause_between_is_no_loop(clock, between):
    restarts = budget(clock, max_restarts=100)
    same = {"step": 7, "cause": "x", "death": False}
    sequence = [same, {**between, "death": False}] * 4
    assert [restarts.admit(**end) for end in sequence] == list(range(1, 9))
    with pytest.raises(GaveUp, match="2 times in a row"):
        restarts.admit(**sequence[-1])


@pytest.mark.parametrize("max_restarts", [0, -1])
def test_no_restart_at_all(clock, max_restarts):
    with pytest.raises(GaveUp, match=rf"^{KILLED}\nrunner.max_restarts={max_restarts}: the run is not restarted"):
        budget(clock, max_restarts=max_restarts).admit(step=0, cause=KILLED, death=True)


def test_a_refused_restart_is_not_counted_as_one(clock):
    restarts = budget(clock, max_restarts=1)
    restarts.admit(step=1, cause=KILLED, death=True)
    with pytest.raises(GaveUp):
        restarts.admit(step=2, cause=KILLED, death=True)
    assert restarts.restarts == [1000.0]


def test_json_keeps_everything(clock):
    restarts = budget(clock, max_restarts=3)
    assert RestartBudget.from_json(restarts.to_json(), clock=clock) == restarts
    restarts.admit(step=7, cause='naïve "x"\n', death=True)
    clock.now += 1
    assert restarts.admit(step=7, cause='naïve "x"\n', death=True) == 2
    again = RestartBudget.from_json(restarts.to_json(), clock=clock)
    assert again == restarts and again.restarts == [1000.0, 1001.0]
    with pytest.raises(GaveUp, match="3 times in a row with 7 steps"):
        again.admit(step=7, cause='naïve "x"\n', death=True)


def test_json_from_before_a_reboot_admits(clock):
    restarts = budget(clock, max_restarts=1)
    restarts.admit(step=1, cause=KILLED, death=True)
    clock.now = 3.0
    assert RestartBudget.from_json(restarts.to_json(), clock=clock).admit(step=2, cause=KILLED, death=True) == 1


def test_the_clock_continues_in_another_process():
    mine = RestartBudget(max_restarts=1, window_seconds=3600)
    mine.admit(step=1, cause=KILLED, death=True)
    code = (
        "import sys; from rlinf_lite.recovery.restarts import RestartBudget\n"
        "RestartBudget.from_json(sys.argv[1]).admit(step=2, cause='x', death=True)"
    )
    ran = subprocess.run([sys.executable, "-c", code, mine.to_json()], capture_output=True, text=True)
    assert ran.returncode == 1 and "GaveUp: x" in ran.stderr and "1 times within" in ran.stderr


def test_giving_up_can_be_pickled():
    assert str(pickle.loads(pickle.dumps(GaveUp("why")))) == "why"
