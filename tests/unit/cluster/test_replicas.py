"""Replicas in memory: on which node the second copy is, and what each rank gets back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_ray import Blocked, FakeSession

from rlinf_lite.checkpoint import DamagedCheckpoint
from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.replica_holder import ReplicaHolder
from rlinf_lite.cluster.workers.trainer import Trainers

pytestmark = pytest.mark.usefixtures("fake_ray")


METADATA = ["actor/.metadata", "critic/.metadata"]
"""Among the small files, where a section is in DCP shards."""


class Rank:
    """A rank whose state is the step, and its own name."""

    small = ("small", *METADATA)

    def __init__(self, component: str, rank: int) -> None:
        self.name, self.is_first = f"{component} {rank}", (component, rank) == ("actor", 0)
        self.loaded: list[str] | None = None
        self.copied: list[int] = []

    def replicate(self, step: int, info: dict) -> tuple[dict, dict]:
        self.copied.append(step)
        small = {name: np.array([step]) for name in self.small} if self.is_first else {}
        return small, {f"{self.name} of {step}": np.array([step])}

    def load_replica(self, step: int, *files: dict) -> SimpleNamespace:
        self.loaded = [name for part in files for name in part if name not in METADATA]
        if any((array < 0).any() for part in files for array in part.values()):
            raise DamagedCheckpoint("its sha256 is another")
        return SimpleNamespace(step=step)


class Case:
    """Two ranks of the policy, and some of a critic; each of the policy's is on a node of its own if ``nodes`` says so.

    Args:
        critic: slots of the critic; none without a critic.
    """

    def __init__(self, nodes: tuple[str, ...] = ("a", "a"), *, critic: tuple[int, ...] = ()) -> None:
        self.session = FakeSession(self.build, nodes=nodes, critic_slots=critic)
        self.policy = self.group(PolicyWorkers, "Actors", "actor")
        self.critic = self.group(CriticWorkers, "Critics", "critic") if critic else None
        self.replicas = MemoryReplicas(Trainers(self.policy, self.critic), self.session)

    def group(self, kind: type, name: str, component: str) -> Any:
        group = object.__new__(kind)
        WorkerGroup.__init__(group, name, component, component, self.session, Spares(self.session))
        return group

    def build(self, target: str, *args: int) -> object:
        return ReplicaHolder() if target.endswith(":ReplicaHolder") else Rank(target, args[0])

    def take(self, step: int) -> None:
        self.replicas.take(step, {"progress": step}, {})

    @property
    def holders(self) -> list:
        return [actor for actor in self.session.actors if actor.name == "ReplicaHolder" and actor.alive]

    def loaded(self, name: str = "Actors") -> list:
        return [actor.worker.loaded for actor in self.session.actors if actor.name == name and actor.alive]


def test_each_rank_gets_its_own_shard_back():
    case = Case()
    assert case.replicas.restore() is None and case.replicas.step is None
    case.take(1), case.take(2)
    report, data = case.replicas.restore()
    assert (report.step, data, case.replicas.step) == (2, {"progress": 2}, 2)
    assert case.loaded() == [["small", "actor 0 of 2"], ["small", "actor 1 of 2"]]
    assert case.holders == [], "on one node the object store outlives the ranks"


def copied(case: Case) -> list[list[int]]:
    return [actor.worker.copied for actor in case.session.actors if actor.name == "Actors"]


def test_a_copy_that_was_begun_is_held_once_it_is_taken():
    case = Case()
    case.take(1)
    case.replicas.start(2, {})
    assert case.replicas.step == 1, "the update of step 2 may still fail"
    case.take(2)
    assert case.replicas.step == 2 and copied(case) == [[1, 2]] * 2
    assert case.replicas.restore()[0].step == 2


def test_a_copy_of_an_update_that_failed_is_never_held():
    case = Case()
    case.take(1)
    case.replicas.start(2, {})
    assert case.replicas.restore()[0].step == 1
    case.take(2)
    assert copied(case) == [[1, 2, 2]] * 2


def test_files_of_another_layout_go_to_every_rank(monkeypatch):
    """Their names do not say which rank needs which of them."""
    monkeypatch.setattr(Rank, "small", ("small",))
    case = Case()
    case.take(1)
    assert case.replicas.restore() is not None
    assert case.loaded() == [["small", "actor 0 of 1", "actor 1 of 1"]] * 2


def test_another_number_of_ranks_gets_all_shards():
    case = Case()
    case.take(1)
    case.session.placement.slots["actor"] = (0,)
    case.policy.respawn()
    assert case.replicas.restore() is not None
    assert case.loaded() == [["small", "actor 0 of 1", "actor 1 of 1"]]


def test_policy_and_critic_get_their_own_shards_back():
    case = Case(critic=(0,))
    case.take(1), case.take(2)
    report, data = case.replicas.restore()
    assert (report.step, data) == (2, {"progress": 2})
    assert case.loaded() == [["small", "actor 0 of 2"], ["small", "actor 1 of 2"]]
    assert case.loaded("Critics") == [["small", "critic 0 of 2"]], "not the shard of the policy's rank 0"


def test_another_number_of_ranks_of_the_policy_only():
    case = Case(critic=(0, 1))
    case.take(1)
    case.session.placement.slots["actor"] = (0,)
    case.policy.respawn()
    assert case.replicas.restore() is not None
    assert case.loaded() == [["small", "actor 0 of 1", "actor 1 of 1"]]
    assert case.loaded("Critics") == [["small", "critic 0 of 1"], ["small", "critic 1 of 1"]]


def test_another_number_of_ranks_of_the_critic_only():
    case = Case(critic=(0,))
    case.take(1)
    case.session.placement.slots["critic"] = (0, 1)
    case.critic.respawn()
    assert case.replicas.restore() is not None
    assert case.loaded() == [["small", "actor 0 of 1"], ["small", "actor 1 of 1"]]
    assert case.loaded("Critics") == [["small", "critic 0 of 1"]] * 2


def test_a_second_copy_is_on_another_node():
    case = Case(nodes=("a", "b"))
    for step in (1, 2, 3):
        case.take(step)
    held = {actor.node: actor.worker._shards for actor in case.holders}
    assert {node: {step: list(ranks) for step, ranks in steps.items()} for node, steps in held.items()} == {
        "a": {2: [("actor", 1)], 3: [("actor", 1)]},
        "b": {2: [("actor", 0)], 3: [("actor", 0)]},
    }
    case.replicas.forget_holders()
    assert case.holders == []


def test_a_holder_keeps_the_same_rank_of_policy_and_critic_apart():
    case = Case(nodes=("a", "b"), critic=(0,))
    case.take(1)
    held = {actor.node: actor.worker._shards[1] for actor in case.holders}
    assert {node: {worker: list(shard) for worker, shard in shards.items()} for node, shards in held.items()} == {
        "a": {("actor", 1): ["actor 1 of 1"]},
        "b": {("actor", 0): ["actor 0 of 1"], ("critic", 0): ["critic 0 of 1"]},
    }


def test_a_rank_of_the_critic_that_dies_in_the_copy_is_lost():
    case = Case(nodes=("a", "b"), critic=(0,))
    case.take(1)
    next(actor for actor in case.session.actors if actor.name == "Critics").die()
    with pytest.raises(WorkerLost) as caught:
        case.take(2)
    assert (caught.value.group, caught.value.rank, case.replicas.step) == ("Critics", 0, 1)


def test_a_holder_that_died_is_started_again_at_the_next_step():
    case = Case(nodes=("a", "b"))
    case.take(1)
    next(holder for holder in case.holders if holder.node == "b").die()
    case.take(2)
    assert [holder.node for holder in case.holders] == ["a"] and case.replicas.step == 2
    case.take(3)
    assert sorted(holder.node for holder in case.holders) == ["a", "b"]


def test_a_rank_that_dies_in_the_copy_is_lost_and_the_step_before_stays():
    case = Case(nodes=("a", "b"))
    case.take(1)
    case.session.actors[1].die()
    with pytest.raises(WorkerLost) as caught:
        case.take(2)
    assert (caught.value.rank, case.replicas.step) == (1, 1)


def test_a_shard_that_no_node_has_any_more_is_not_the_loss_of_a_rank():
    case = Case()
    case.take(1)
    other = case.session.start_process("Other", "actor", (0,))
    case.session.actors[-1].die()
    case.replicas._held.shards[1] = case.policy.start_one(1, "load_replica", other.ping())  # its argument is lost
    assert case.replicas.restore() is None and case.replicas.step is None


def test_a_damaged_replica_is_not_used():
    case = Case()
    case.take(1)
    case.replicas._held.small["small"] -= 9
    assert case.replicas.restore() is None and case.replicas.step is None


def test_a_rank_that_dies_while_it_loads_is_lost():
    case = Case()
    case.take(1)
    case.session.actors[0].die()
    with pytest.raises(WorkerLost):
        case.replicas.restore()
    assert case.replicas.step == 1, "the next restore may use it"


def test_a_holder_that_does_not_answer_is_given_up(monkeypatch):
    case = Case(nodes=("a", "b"))
    monkeypatch.setattr(case.session.watch, "hang_timeout", 0.05)
    monkeypatch.setattr(case.session.config, "start_timeout", 0.05)

    def stuck(self: ReplicaHolder, *args: object) -> None:
        raise Blocked

    monkeypatch.setattr(ReplicaHolder, "hold", stuck)
    case.take(1)
    assert case.holders == [] and case.replicas.step == 1
