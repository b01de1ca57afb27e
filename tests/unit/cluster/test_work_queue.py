"""Queues of work: one item per worker, repeated when its worker is lost or hangs."""

from __future__ import annotations

import pytest
from fake_ray import Blocked, FakeSession

from rlinf_lite.cluster.errors import WorkerHung, WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.work_queue import WorkQueue

pytestmark = pytest.mark.usefixtures("fake_ray")


class Worker:
    """Doubles numbers; ``stuck`` numbers block the first process that gets them."""

    def __init__(self, stuck: set[int]) -> None:
        self.stuck, self.seen = stuck, []

    def double(self, number: int) -> int:
        self.seen.append(number)
        if number in self.stuck:
            raise Blocked
        if number < 0:
            raise ValueError("negative")
        return 2 * number


class Group:
    """Two workers with a queue."""

    def __init__(self, *stuck: int, hang_timeout: float = 0.0) -> None:
        self.stuck = set(stuck)
        self.session = FakeSession(lambda target, *args: Worker(self.stuck), hang_timeout=hang_timeout)
        self.group = WorkerGroup("Rollouts", "rollout", "module:Class", self.session, Spares(self.session))
        self.queue: WorkQueue[str, int, int] = WorkQueue(
            self.group, lambda rank, number: self.group.start_one(rank, "double", number)
        )
        self.losses: list[WorkerLost] = []

    def repair(self, lost: WorkerLost) -> None:
        self.losses.append(lost)
        self.stuck.clear()
        self.group.replace(lost.rank)


def test_each_worker_has_one_item_at_a_time():
    group = Group(1, 2)
    for number in (1, 2, 3):
        group.queue.add(str(number), number)
    assert [actor.worker.seen for actor in group.session.actors] == [[1], [2]]
    group.stuck.clear()
    for actor in group.session.actors:
        actor.resume()
    assert sorted(group.queue.results()) == [("1", 2), ("2", 4), ("3", 6)]


def test_the_item_of_a_lost_worker_is_done_again():
    group = Group(1)
    group.group.repair = group.repair
    for number in (1, 2):
        group.queue.add(str(number), number)
    group.session.actors[0].die()
    assert sorted(group.queue.results()) == [("1", 2), ("2", 4)]
    assert [(loss.group, loss.rank) for loss in group.losses] == [("Rollouts", 0)]


def test_the_item_of_a_worker_that_hangs_is_done_again():
    group = Group(1, hang_timeout=0.05)
    group.group.repair = group.repair
    group.queue.add("1", 1)
    assert list(group.queue.results()) == [("1", 2)]
    assert isinstance(group.losses[0], WorkerHung)


def test_without_repair_a_loss_is_an_error():
    group = Group(1)
    group.queue.add("1", 1)
    group.session.actors[0].die()
    with pytest.raises(WorkerLost, match="Rollouts rank 0"):
        list(group.queue.results())


def test_a_worker_that_lives_is_not_replaced_for_an_argument_that_was_lost():
    group = Group()
    group.group.repair = group.repair
    other = group.session.start_process("Other", "actor", (0,))
    group.session.actors[-1].die()
    group.queue.add("1", other.run("anything"))
    with pytest.raises(WorkerLost):
        list(group.queue.results())
    assert group.losses == []


def test_what_the_method_raises_is_raised():
    group = Group()
    group.queue.add("-1", -1)
    with pytest.raises(ValueError, match="negative"):
        list(group.queue.results())


def test_other_queues_are_fed_meanwhile():
    group, beside = Group(1), Group(3)
    group.queue.add("1", 1)
    for number in (3, 4, 5):
        beside.queue.add(str(number), number)

    def check() -> None:  # once the other queue's last item is done, so is this one
        if 5 in beside.session.actors[1].worker.seen:
            group.stuck.clear()
            group.session.actors[0].resume()

    group.session.watch.often.append(check)
    assert list(group.queue.results(beside=[beside.queue])) == [("1", 2)]
    assert beside.session.actors[1].worker.seen == [4, 5]
