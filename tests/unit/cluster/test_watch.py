"""What is checked while the driver waits."""

from __future__ import annotations

import pytest
from fake_ray import Ref

from rlinf_lite.cluster import watch as module
from rlinf_lite.cluster.errors import Hung
from rlinf_lite.cluster.watch import Watch

pytestmark = pytest.mark.usefixtures("fake_ray")
DONE, NEVER = Ref(done=True), Ref()


def whose(ref: Ref) -> tuple[str, int]:
    return "actor", 0 if ref is DONE else 1


def test_every_wait_runs_the_checks_and_the_expensive_ones_rarely(monkeypatch):
    now, often, rarely = [100.0], [], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    watch = Watch(hang_timeout=0)
    watch.often.append(lambda: often.append(1))
    watch.rarely.append(lambda: rarely.append(1))
    for _ in range(4):
        assert watch.wait_one([NEVER, DONE], whose) is DONE
        now[0] += 0.6
    assert (len(often), len(rarely)) == (4, 1)


def test_a_check_ends_a_wait():
    watch = Watch(hang_timeout=0)

    def stop() -> None:
        raise KeyboardInterrupt

    watch.often.append(stop)
    with pytest.raises(KeyboardInterrupt):
        watch.wait_one([NEVER], whose)


def test_what_does_not_answer_is_named():
    with pytest.raises(Hung) as caught:
        Watch(hang_timeout=0.03).wait_one([NEVER], whose)
    assert caught.value.waiting == [("actor", 1)] and caught.value.seconds > 0.03


@pytest.mark.parametrize(("hang", "start", "within"), [(10.0, 60.0, 60.0), (90.0, 60.0, 90.0), (0.0, 60.0, 0.0)])
def test_while_processes_start_the_timeout_is_at_least_theirs(hang, start, within):
    watch = Watch(hang_timeout=hang)
    with pytest.raises(ValueError), watch.starting(start):
        assert watch.hang_timeout == within
        raise ValueError
    assert watch.hang_timeout == hang
