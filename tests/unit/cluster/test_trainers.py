"""Policy and critic together: one process group, results in one order, and losses of either."""

from __future__ import annotations

from typing import Any

import pytest
from fake_ray import Blocked, FakeActor, FakeSession

from rlinf_lite.checkpoint import DamagedCheckpoint
from rlinf_lite.cluster import watch
from rlinf_lite.cluster.errors import Hung, WorkerLost
from rlinf_lite.cluster.group import WorkerGroup, wait_all
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.records import RankLayout
from rlinf_lite.cluster.workers.trainer import Trainers

pytestmark = pytest.mark.usefixtures("fake_ray")


class Rank:
    """Answers with its name, and keeps what it was given."""

    def __init__(self, component: str, rank: int) -> None:
        self.name = f"{component} {rank}"
        self.given: list[tuple[Any, ...]] = []
        self.fails: Exception | None = None

    def open_store(self, num_ranks: int) -> str:
        return f"store of {self.name} for {num_ranks}"

    def setup(self, *args: object) -> str:
        return self._answer(*args)

    def save(self, *args: object) -> str:
        return self._answer(*args)

    def poll_save(self) -> str:
        return self._answer()

    def load(self, *args: object) -> str:
        return self._answer(*args)

    def reset(self) -> None:
        self._answer()

    def _answer(self, *args: object) -> str:
        self.given.append(args)
        if self.fails is not None:
            raise self.fails
        return self.name


def trainers_of(policy: int, critic: int) -> tuple[Trainers, dict[str, FakeActor]]:
    """Trainers with so many ranks, and the processes by `Rank.name`."""
    session = FakeSession(
        lambda target, rank, size: Rank(target, rank),
        slots=tuple(range(policy)),
        critic_slots=tuple(range(critic)),
        nodes=("a",) * max(policy, critic),
    )

    def group(kind: type, name: str, component: str) -> Any:
        made = object.__new__(kind)
        WorkerGroup.__init__(made, name, component, component, session, Spares(session))
        return made

    actors = group(PolicyWorkers, "ActorGroup", "actor")
    trainers = Trainers(actors, group(CriticWorkers, "CriticGroup", "critic") if critic else None)
    return trainers, {actor.worker.name: actor for actor in session.actors}


BOTH = ["actor 0", "actor 1", "critic 0"]


def test_results_are_those_of_the_policy_then_of_the_critic():
    trainers, processes = trainers_of(2, 1)
    assert [list(processes), trainers.poll_save(), trainers.save(3, {}, {})] == [BOTH] * 3
    assert trainers.load("global_step_3", "full") == "actor 0"
    assert [process.worker.given[-1] for process in processes.values()] == [("global_step_3", "full")] * 3
    alone, _ = trainers_of(2, 0)
    assert alone.poll_save() == BOTH[:2] and [group.component for group in alone.groups] == ["actor"]


def test_all_ranks_meet_at_one_store_and_know_how_they_are_divided():
    trainers, processes = trainers_of(2, 1)
    assert trainers.setup("checkpoints", 7) == BOTH
    layout = RankLayout(sizes={"actor": 2, "critic": 1})
    given = ("store of actor 0 for 3", layout, "checkpoints", 7)
    assert [process.worker.given for process in processes.values()] == [[given]] * 3


@pytest.mark.parametrize(
    ("policy", "critic", "ranks"),
    [(2, 1, {"actor": [0, 1], "critic": [2]}), (1, 3, {"actor": [0], "critic": [1, 2, 3]}), (2, 0, {"actor": [0, 1]})],
)
def test_the_ranks_of_the_critic_follow_those_of_the_policy(policy, critic, ranks):
    layout = trainers_of(policy, critic)[0].layout
    assert {section: list(of_section) for section, of_section in layout.ranks.items()} == ranks
    assert {section: layout.first(section) for section in ranks} == {name: of[0] for name, of in ranks.items()}
    assert layout.num_ranks == policy + critic


def test_a_reset_names_the_ranks_that_need_a_new_process():
    trainers, processes = trainers_of(2, 2)
    assert trainers.reset(0.05) == []
    assert [process.worker.given for process in processes.values()] == [[()]] * 4
    processes["actor 1"].worker.fails = RuntimeError("gloo: connection closed")
    processes["critic 0"].die()
    processes["critic 1"].worker.fails = Blocked()
    assert trainers.reset(0.05) == [(trainers.policy, 1), (trainers.critic, 0), (trainers.critic, 1)]


def test_the_gone_are_of_either():
    trainers, processes = trainers_of(2, 1)
    assert trainers.gone(0.05) == []
    processes["critic 0"].die(), processes["actor 1"].die()
    assert [(lost.group, lost.rank) for lost in trainers.gone(0.05)] == [("ActorGroup", 1), ("CriticGroup", 0)]


@pytest.mark.parametrize("dead", BOTH)
def test_while_they_are_watched_a_loss_ends_every_wait(dead, monkeypatch):
    """An engine waits for weights of ranks that wait for the dead one: neither ever answers."""
    monkeypatch.setattr(watch, "_RARELY_SECONDS", 0.01)
    trainers, processes = trainers_of(2, 1)
    session = trainers.policy._session
    engines = WorkerGroup("Engines", "rollout", "rollout", session, Spares(session))
    session.actors[-1].worker.fails = Blocked()
    component, rank = dead.split()
    call = engines.start_one(1, "poll_save")
    with trainers.watched():
        assert wait_all([engines.start_one(0, "poll_save")]) == ["rollout 0"]
        processes[dead].die()
        for _ in range(2):
            with pytest.raises(WorkerLost, match=f"{component.capitalize()}Group rank {rank} was lost"):
                wait_all([call])
    assert session.watch.rarely == []
    asked = []
    with trainers.watched(lambda: asked.append(call)):
        session.watch.hang_timeout = 0.1
        with pytest.raises(Hung):
            wait_all([call])
    assert asked


def test_a_critic_that_fails_fails_the_call():
    trainers, processes = trainers_of(2, 1)
    processes["critic 0"].worker.fails = DamagedCheckpoint("global_step_3: its sha256 is another")
    with pytest.raises(DamagedCheckpoint, match="its sha256 is another") as caught:
        trainers.load("global_step_3", "full")
    assert "CriticGroup rank 0" in "".join(caught.value.__notes__)
