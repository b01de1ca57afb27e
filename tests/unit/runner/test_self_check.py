"""When a run checks itself, and what it logs and records."""

from __future__ import annotations

import numpy as np
import pytest

from rlinf_lite.config.compose import load
from rlinf_lite.runner.self_check import SelfCheck
from rlinf_lite.selfcheck.made_up import SMALL, batch_of, made_up_groups
from rlinf_lite.selfcheck.records import EngineCheck, UpdateCheck
from rlinf_lite.types import Sampling

SAMPLING = Sampling(do_sample=True, temperature=1.0, top_k=-1, top_p=1.0, repetition_penalty=1.0, max_new_tokens=4)
GROUPS = made_up_groups(batch_of(SMALL["cpu"], 20, SAMPLING, seq_length=16), 20)
VALUES_M = np.zeros(sum(len(r.token_ids) for group in GROUPS for r in group.responses), dtype=np.float32)


class Rollouts:
    """One vLLM engine."""

    def __init__(self) -> None:
        self.num_checks = 0

    def self_check(self) -> list[EngineCheck]:
        self.num_checks += 1
        return [EngineCheck(groups=GROUPS, is_checked=False)]


class Trainers:
    """Two ranks of a policy, of which rank 1 may differ, and one of a critic."""

    def __init__(self, difference: str | None, fails: bool = False) -> None:
        self.difference, self.fails, self.was_searched = difference, fails, False

    def self_check(self, responses) -> list[list[UpdateCheck]]:
        assert responses is GROUPS
        if self.fails:
            raise RuntimeError("rank 1 was lost")
        good = UpdateCheck(values_M=VALUES_M)
        return [[good, UpdateCheck(values_M=VALUES_M, difference=self.difference)], [good]]

    def first_operations(self, responses) -> list[str | None]:
        self.was_searched = True
        return ["mm.default", None]


@pytest.fixture
def make():
    def make_check(trainers: Trainers, *overrides: str) -> tuple[SelfCheck, Rollouts, list]:
        rollouts, recorded = Rollouts(), []
        check = SelfCheck(load([*overrides]), rollouts, trainers, lambda *event: recorded.append(event))
        return check, rollouts, recorded

    return make_check


def test_it_runs_once_and_leaves_a_line_and_an_event(make, capsys):
    trainers = Trainers(None)
    check, rollouts, recorded = make(trainers)
    check.run_once(4)
    check.run_once(5)
    line = "reproducible: yes (the update; vLLM's generation is not checked)"
    assert capsys.readouterr().out.startswith(f"{line}, 0.0")
    assert recorded == [("self-check", 4, line)] and rollouts.num_checks == 1 and not trainers.was_searched


def test_a_difference_is_named_with_its_operation(make, capsys):
    check, _, recorded = make(Trainers("the gradient of w differs when computed again"))
    check.run_once(0)
    named = "actor rank 1: the gradient of w differs when computed again (first in the operation mm.default)"
    assert capsys.readouterr().out.startswith(f"!! reproducible: no: {named}")
    assert named in recorded[0][2]


def test_it_begins_again_if_a_worker_was_lost(make):
    trainers = Trainers(None, fails=True)
    check, rollouts, recorded = make(trainers)
    with pytest.raises(RuntimeError, match="lost"):
        check.run_once(0)
    trainers.fails = False
    check.run_once(0)
    assert rollouts.num_checks == 2 and len(recorded) == 1


def test_it_can_be_turned_off(make, capsys):
    check, rollouts, recorded = make(Trainers(None), "cluster.self_check=false")
    check.run_once(0)
    assert rollouts.num_checks == 0 and not recorded and not capsys.readouterr().out
