"""Who is to blame, and what is not tried again."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from rlinf_lite.checkpoint import RankSilent
from rlinf_lite.cluster.errors import Hung, NodeLost, RayLost, WorkerLost
from rlinf_lite.errors import ConfigError
from rlinf_lite.recovery import diagnosis
from rlinf_lite.recovery.diagnosis import Regrow, diagnose
from rlinf_lite.recovery.restarts import GaveUp


@dataclass
class Group:
    name: str
    component: str


@dataclass
class Workers:
    """Takes the place of `Workers`: which workers are found dead, by the how-manieth question."""

    deaths: list[list[WorkerLost]] = field(default_factory=list)
    with_critic: bool = False

    @property
    def trainers(self) -> SimpleNamespace:
        critic = (Group("CriticGroup", "critic"),) if self.with_critic else ()
        return SimpleNamespace(groups=(Group("ActorGroup", "actor"), *critic))

    def gone(self, seconds: float) -> list[WorkerLost]:
        return self.deaths.pop(0) if self.deaths else []


@pytest.fixture(autouse=True)
def no_long_search(monkeypatch):
    monkeypatch.setattr(diagnosis, "_BLAME_SECONDS", 0.05)
    monkeypatch.setattr(diagnosis, "last_lines", lambda pid: [f"last line of {pid}"])


ACTOR = WorkerLost("ActorGroup", 1, "process 12 on 10.0.0.1: End of file.", pid=12)
CRITIC = WorkerLost("CriticGroup", 0, "process 14 on 10.0.0.1: End of file.", pid=14)
ROLLOUT = WorkerLost("RolloutGroup", 0, "process 13 on 10.0.0.1: End of file.", pid=13)


def test_the_dead_are_blamed_not_those_who_cried_first():
    cry = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4242")
    failure = diagnose(cry, Workers([[], [ACTOR]]), intact=True)
    assert failure.text == f"{ACTOR}\n      last line of 12"
    assert (failure.cause, failure.death, failure.trainers_too) == ("ActorGroup rank 1 was lost", True, True)


def test_a_worker_that_missed_what_a_dead_one_had_made_is_not_dead():
    assert diagnose(ROLLOUT, Workers([[ACTOR]]), intact=True).losses == [ACTOR]
    assert diagnose(ROLLOUT, Workers([[]]), intact=True).losses == [ROLLOUT]


def test_all_that_died_are_told_once():
    failure = diagnose(ROLLOUT, Workers([[ACTOR, ROLLOUT]]), intact=True)
    assert [lost.rank for lost in failure.losses] == [1, 0]
    assert failure.cause == "ActorGroup rank 1 was lost, RolloutGroup rank 0 was lost"


@pytest.mark.parametrize("intact", [True, False])
def test_trainers_are_left_alone_only_if_their_state_was_not_touched(intact):
    assert diagnose(ROLLOUT, Workers(), intact=intact).trainers_too is not intact


def test_a_broken_connection_without_a_death():
    one, two = (RuntimeError(f"gloo: Connection closed by peer [10.0.0.1]:{port}") for port in (4242, 31))
    first, second = diagnose(one, Workers(), intact=False), diagnose(two, Workers(), intact=False)
    assert first.cause == second.cause != ""
    assert not first.death and first.trainers_too


@pytest.mark.parametrize(
    "error",
    [
        RayLost("the raylet is gone"),
        ConfigError("runner.max_steps=-2: no"),
        FloatingPointError("loss is nan"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("shape mismatch"),
        GaveUp("too often"),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_come_again_is_raised(error):
    with pytest.raises(type(error)) as caught:
        diagnose(error, Workers(), intact=True)
    assert caught.value is error


def test_a_rank_that_heard_of_the_death_before_ray_did():
    silent = RankSilent("rank 1 did not come")
    assert diagnose(silent, Workers([[], [ACTOR]]), intact=False).losses == [ACTOR]
    assert diagnose(silent, Workers(), intact=False).trainers_too


def test_a_lost_critic_takes_the_policy_with_it():
    """They share a process group, and the step that the critic did not train."""
    failure = diagnose(CRITIC, Workers([[CRITIC]], with_critic=True), intact=True)
    assert (failure.losses, failure.cause, failure.trainers_too) == ([CRITIC], "CriticGroup rank 0 was lost", True)
    cry = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4242")
    assert diagnose(cry, Workers([[CRITIC]], with_critic=True), intact=True).losses == [CRITIC]
    assert not diagnose(ROLLOUT, Workers(with_critic=True), intact=True).trainers_too


def test_a_hang_of_the_critic_affects_the_trainers():
    for waiting in ([("critic", 0)], [("rollout", 0), ("critic", 0)]):
        assert diagnose(Hung(9.0, waiting), Workers(with_critic=True), intact=True).trainers_too
    assert not diagnose(Hung(9.0, [("rollout", 0)]), Workers(with_critic=True), intact=True).trainers_too


def test_a_hang_of_rollout_workers_leaves_the_trainers_alone():
    assert not diagnose(Hung(9.0, [("rollout", 0)]), Workers(), intact=True).trainers_too
    assert diagnose(Hung(9.0, [("rollout", 0)]), Workers(), intact=False).trainers_too


def test_nodes_hangs_and_growth():
    assert diagnose(NodeLost(["a"]), Workers(), intact=True).new_nodes
    hung = diagnose(Hung(12.0, [("actor", 1)]), Workers(), intact=True)
    assert hung.hung is not None and "actor rank 1" in hung.text and not hung.death
    grown = diagnose(Regrow("room"), Workers(), intact=True)
    assert grown.new_nodes and grown.cause == ""
