"""Groups of workers: results, failures, losses and replacements, over fake processes."""

from __future__ import annotations

from collections import deque
from unittest.mock import Mock

import pytest
from fake_ray import Blocked, FakeSession

from rlinf_lite.cluster import group as groups
from rlinf_lite.cluster.errors import Hung, WorkerLost
from rlinf_lite.cluster.group import WorkerGroup, wait_all, wait_for_collective
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.config import ClusterConfig

pytestmark = pytest.mark.usefixtures("fake_ray")


class Worker:
    """Does what the test says; ``blocked`` ranks do not return."""

    blocked: set[int] = set()  # noqa: RUF012  (reset by the fixture)

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def square(self, number: int) -> int:
        if self.rank in self.blocked:
            raise Blocked
        return number * number

    def fail(self, *ranks: int) -> str:
        if self.rank in self.blocked:
            raise Blocked
        if self.rank in ranks:
            raise ValueError(f"rank {self.rank} failed")
        return "fine"

    def find(self) -> None:
        if self.rank == 1:
            raise KeyError("built by what failed before")

    def reset(self) -> None:
        self.fail(1)

    def pair(self) -> tuple[str, int]:
        return "small", self.rank

    def read(self, value: object) -> object:
        return value


@pytest.fixture(autouse=True)
def nothing_blocked(monkeypatch):
    monkeypatch.setattr(Worker, "blocked", set())


def a_group(session: FakeSession | None = None, *, warm_spares: int = 0) -> tuple[WorkerGroup, FakeSession, Spares]:
    config = ClusterConfig(warm_spares=warm_spares)
    session = session or FakeSession(lambda target, *args: Worker(*args), config=config)
    spares = Spares(session)
    return WorkerGroup("Actors", "actor", "module:Class", session, spares), session, spares


def test_results_are_in_rank_order_whichever_rank_finishes_first():
    group, session, _ = a_group()
    Worker.blocked = {0}
    calls = group.start_each("square", [(2,), (3,)])
    assert [call.is_done for call in calls] == [False, True]
    Worker.blocked = set()
    session.actors[0].resume()
    assert wait_all(calls) == [4, 9]
    assert group.call("square", 5) == [25, 25]


def test_the_first_failure_wins_and_nobody_waits_for_the_others():
    group, _, _ = a_group()
    Worker.blocked = {0}
    with pytest.raises(ValueError, match="rank 1 failed") as caught:
        group.call("fail", 1)
    assert "in Actors rank 1" in caught.value.__notes__
    assert any("remote traceback" in note for note in caught.value.__notes__)


def test_a_pair_is_fetched_in_two():
    group, _, _ = a_group()
    firsts, seconds = group.start_in_two("pair")
    assert (wait_all(firsts), wait_all(seconds)) == (["small", "small"], [0, 1])


def test_a_dead_process_is_a_lost_worker_with_its_id_and_reason():
    group, session, _ = a_group()
    session.actors[1].die()
    with pytest.raises(WorkerLost) as caught:
        group.call("square", 2)
    lost = caught.value
    assert (lost.group, lost.rank, lost.pid) == ("Actors", 1, 101)
    assert lost.reason == "process 101 on 10.0.0.1: Worker unexpectedly exits. End of file."
    assert [loss.rank for loss in group.gone(0.05)] == [1]


def test_a_busy_process_is_not_gone():
    group, session, _ = a_group()
    Worker.blocked = {0}
    group.start("square", 2)
    assert group.gone(0.05) == [] and not group.is_gone(0)
    session.actors[0].die()
    assert group.is_gone(0)


def test_a_check_neither_waits_for_a_busy_process_nor_asks_it_twice():
    group, session, _ = a_group()
    Worker.blocked = {0}
    call, _ = group.start("square", 2)
    for _ in range(3):
        group.check()
    assert len(session.actors[0]._queue) == 2 and session.actors[1]._queue == deque()
    session.actors[0].die()
    for _ in range(2):
        with pytest.raises(WorkerLost, match="Actors rank 0 was lost"):
            group.check()
    group.replace(0)
    group.check()
    assert call.is_done


class BrokenPipe(Worker):
    def fail(self, *ranks: int) -> str:
        if self.rank in ranks:
            raise RuntimeError("gloo: Connection closed by peer")
        return super().fail()


@pytest.mark.parametrize("how", ["it dies", "its connection breaks"])
def test_a_collective_that_one_rank_left_is_ended(how, monkeypatch, capsys):
    """Ranks that wait in it for the one that failed are lost with it; one that returned is not."""
    monkeypatch.setattr(groups, "_COLLECTIVE_SECONDS", 0.05)
    session = FakeSession(lambda _, *args: BrokenPipe(*args), slots=(0, 1, 2), nodes=("a",) * 3)
    group, _, _ = a_group(session)
    Worker.blocked = {0}
    if how == "it dies":
        session.actors[1].die()
    with pytest.raises(RuntimeError, match="rank 1" if how == "it dies" else "closed by peer"):
        wait_for_collective(group.start("fail", 1))
    assert [loss.rank for loss in group.gone(0.05)] == ([0, 1] if how == "it dies" else [0])
    assert capsys.readouterr().out == "   ended, because they wait in a collective: Actors rank 0\n"


def test_a_collective_is_not_ended_for_an_error_that_would_come_again():
    group, _, _ = a_group()
    Worker.blocked = {0}
    with pytest.raises(ValueError, match="rank 1 failed"):
        wait_for_collective(group.start("fail", 1))
    assert group.gone(0.05) == []


def test_nor_by_a_check():
    group, _, _ = a_group()
    Worker.blocked = {0}
    calls = group.start("fail")
    group.watch.often.append(stop := Mock(side_effect=KeyError("a stop request")))
    with pytest.raises(KeyError, match="a stop request"):
        wait_for_collective(calls)
    assert stop.called and group.gone(0.05) == []


def test_an_argument_that_was_lost_with_another_process():
    group, session, _ = a_group()
    session.actors[0].die()
    (lost,) = [group.start_one(0, "square", 1)]
    call = group.start_one(1, "read", lost.ref)
    with pytest.raises(WorkerLost) as caught:
        wait_all([call])
    assert caught.value.rank == 1 and not group.is_gone(1)


def test_no_answer_within_the_hang_timeout():
    session = FakeSession(lambda target, *args: Worker(*args), hang_timeout=0.05)
    group, _, _ = a_group(session)
    Worker.blocked = {1}
    with pytest.raises(Hung) as caught:
        group.call("square", 2)
    assert caught.value.waiting == [("actor", 1)]
    assert "not answering: actor rank 1" in str(caught.value)


def test_a_process_that_is_starting_has_the_start_timeout():
    session = FakeSession(lambda target, *args: Worker(*args), hang_timeout=1.0, config=ClusterConfig(start_timeout=60))
    group, _, _ = a_group(session)
    with group.waiting(0):
        assert session.watch.hang_timeout == 1.0  # it is up

    def slow(target: str, *args: int) -> Worker:
        raise Blocked

    session.build = slow
    group.replace(0)
    with group.waiting(0):
        assert session.watch.hang_timeout == 60
    assert session.watch.hang_timeout == 1.0


# -- replacing


def test_a_lost_rank_is_replaced_by_a_spare():
    group, session, spares = a_group(warm_spares=1)
    spares.start()
    spare = session.actors[-1]
    session.actors[1].die()
    group.replace(1)
    assert [location.process.pid for location in group.locations()] == [100, spare.pid]
    assert group.call("square", 3) == [9, 9]
    assert (spare.worker.rank, spare.worker.num_ranks) == (1, 2)


def test_a_new_process_replaces_a_rank_whose_spare_is_dead_too():
    group, session, spares = a_group(warm_spares=1)
    spares.start()
    session.actors[-1].die()
    group.replace(0)
    assert not session.actors[0].alive, "the old process is ended"
    assert group.location(0) is not None and group.location(0).process.pid == session.actors[-1].pid
    assert len(session.actors) == 4


def test_a_result_counts_only_if_what_set_the_worker_up_succeeded():
    group, _, _ = a_group()
    group.replace(1)
    group.require(group.start_one(1, "fail", 1))
    with pytest.raises(ValueError, match="rank 1 failed"):
        group.call("square", 2)


def test_what_a_worker_could_not_become_explains_why_it_fails():
    group, _, _ = a_group()
    group.replace(1)
    group.require(group.start_one(1, "fail", 1))
    with pytest.raises(ValueError, match="rank 1 failed"):
        group.call("find")

    def broken(target: str, *args: int) -> Worker:
        raise ImportError("no such module")

    session = FakeSession(broken)
    group, _, _ = a_group(session)
    with pytest.raises(ImportError, match="no such module"):
        group.call("square", 2)


def test_once_it_has_succeeded_it_is_not_looked_at_again():
    group, _, _ = a_group()
    group.replace(1)
    group.require(group.start_one(1, "fail", 0))
    assert group.unready == [1]
    assert group.call("square", 2) == [4, 4]
    assert group.unready == []


def test_where_a_process_is_can_be_asked_before_it_is_set_up():
    group, _, _ = a_group()
    group.replace(1)
    Worker.blocked = {1}
    group.require(group.start_one(1, "fail"))
    assert group.location(1) is not None and len(group.locations()) == 2 and group.unready == [1]


def test_ranks_that_fail_or_do_not_answer_are_named():
    group, _, _ = a_group(
        FakeSession(lambda target, *args: Worker(*args), slots=(0, 1, 2, 3), nodes=("a", "a", "a", "a"))
    )
    Worker.blocked = {2}
    assert group.failed(group.start("reset"), 0.05) == [1, 2]


def test_respawning_follows_the_placement():
    group, session, _ = a_group()
    session.placement.slots["actor"] = (0,)
    group.respawn()
    assert group.size == 1 and [actor.alive for actor in session.actors] == [False, False, True]
    group.kill()
    assert group.size == 0 and not session.actors[2].alive


def test_the_questions_to_ray_do_not_grow_with_the_square_of_the_ranks(monkeypatch):
    session = FakeSession(lambda target, *args: Worker(*args), slots=tuple(range(32)), nodes=("a",) * 32)
    group, _, _ = a_group(session)
    assert len(group.locations()) == 32
    group.call("square", 2)
    asked, wait = [], guard.wait
    monkeypatch.setattr(guard, "wait", lambda *args, **given: asked.append(1) or wait(*args, **given))
    assert group.call("square", 3) == [9] * 32
    assert len(asked) <= 2 * 32
