"""Replicas in memory: on which node the second copy is, and what each rank gets back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_ray import Blocked, FakeSession

from rlinf_lite.checkpoint import DamagedCheckpoint
from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.replicas import MemoryReplicas
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.replica_holder import ReplicaHolder

pytestmark = pytest.mark.usefixtures("fake_ray")


class Policy:
    """A rank whose state is its rank and the step."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.loaded: list[str] | None = None

    def replicate(self, step: int, data: dict, info: dict) -> tuple[dict, dict]:
        return {"small": np.array([step])}, {f"{step}.{self.rank}": np.array([self.rank])}

    def load_replica(self, step: int, *files: dict) -> SimpleNamespace:
        self.loaded = [name for part in files for name in part]
        if any((array < 0).any() for part in files for array in part.values()):
            raise DamagedCheckpoint("its sha256 is another")
        return SimpleNamespace(step=step)


class Case:
    """Two ranks; each is on a node of its own if ``nodes`` says so."""

    def __init__(self, nodes: tuple[str, ...] = ("a", "a")) -> None:
        self.session = FakeSession(self.build, nodes=nodes)
        self.policy = object.__new__(PolicyWorkers)
        WorkerGroup.__init__(self.policy, "Actors", "actor", "policy", self.session, Spares(self.session))
        self.replicas = MemoryReplicas(self.policy, self.session)

    def build(self, target: str, *args: int) -> object:
        return ReplicaHolder() if target.endswith(":ReplicaHolder") else Policy(*args)

    def take(self, step: int) -> None:
        self.replicas.take(step, {"progress": step}, {})

    @property
    def holders(self) -> list:
        return [actor for actor in self.session.actors if actor.name == "ReplicaHolder" and actor.alive]

    def loaded(self) -> list:
        return [actor.worker.loaded for actor in self.session.actors if actor.name == "Actors" and actor.alive]


def test_each_rank_gets_its_own_shard_back():
    case = Case()
    assert case.replicas.restore() is None and case.replicas.step is None
    case.take(1), case.take(2)
    report, data = case.replicas.restore()
    assert (report.step, data, case.replicas.step) == (2, {"progress": 2}, 2)
    assert case.loaded() == [["small", "2.0"], ["small", "2.1"]]
    assert case.holders == [], "on one node the object store outlives the ranks"


def test_another_number_of_ranks_gets_all_shards():
    case = Case()
    case.take(1)
    case.session.placement.slots["actor"] = (0,)
    case.policy.respawn()
    assert case.replicas.restore() is not None
    assert case.loaded() == [["small", "1.0", "1.1"]]


def test_a_second_copy_is_on_another_node():
    case = Case(nodes=("a", "b"))
    for step in (1, 2, 3):
        case.take(step)
    held = {actor.node: actor.worker._shards for actor in case.holders}
    assert {node: {step: list(ranks) for step, ranks in steps.items()} for node, steps in held.items()} == {
        "a": {2: [1], 3: [1]},
        "b": {2: [0], 3: [0]},
    }
    case.replicas.forget_holders()
    assert case.holders == []


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
    other = case.session.start_process("Other", "actor", 0)
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
