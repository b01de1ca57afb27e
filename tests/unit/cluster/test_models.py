"""The models of a step: which columns are computed by whom, and policy and critic updated side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_ray import Blocked, FakeSession

from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.observability import PhaseTimer
from rlinf_lite.runner.metrics import GAP
from rlinf_lite.runner.models import Models
from rlinf_lite.types import Column, MiniBatch, Normalizers, Segments, TokenBatch

pytestmark = pytest.mark.usefixtures("fake_ray")

ALL = (Column.ADVANTAGE, Column.RETURN, Column.OLD_LOGPROB, Column.REF_LOGPROB, Column.OLD_VALUE)


def unit(index: int) -> TokenBatch:
    none = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        index=index,
        ids_N=none,
        positions_N=none,
        segments=Segments(start_S=none, stop_S=none, parent_S=none),
        source_M=none,
        targets_M=none,
        seq_M=none,
        num_responses=0,
    )


class Batch:
    """Three units, in two mini-batches."""

    num_minibatches = 2

    def __init__(self) -> None:
        self.asked: list[set[Column]] = []

    def for_forward(self) -> list[TokenBatch]:
        return [unit(index) for index in range(3)]

    def for_update(self, columns: dict[Column, torch.Tensor], is_trained_N: np.ndarray) -> list[MiniBatch]:
        self.asked.append(set(columns))
        norm = Normalizers(num_tokens=1, num_sequences=1)
        return [MiniBatch(units=(unit(index),), norm=norm) for index in range(2)]

    def engine_logprobs(self) -> torch.Tensor:
        return torch.full((3,), 9.0)


class Case:
    """A policy of two ranks and a critic of one, whose values are numbers of the unit."""

    def __init__(
        self, *, critic: bool = True, warmup: int = 0, old_from_engine: bool = False, exact: bool = True
    ) -> None:
        self.log: list[str] = []
        self.blocked = self.failing = ""
        """Components whose updates do not return, or fail."""
        session = FakeSession(lambda component, rank, size: self.worker(component, rank))

        def group(kind: type, component: str) -> Any:
            made = object.__new__(kind)
            made._virtual_ranks, made._tensor_parallel = 5040, 1
            WorkerGroup.__init__(made, component, component, component, session, Spares(session))
            return made

        self.models = Models(
            policy=group(PolicyWorkers, "actor"),
            critic=group(CriticWorkers, "critic") if critic else None,
            needs=frozenset((Column.OLD_LOGPROB, Column.REF_LOGPROB, *((Column.OLD_VALUE,) if critic else ()))),
            old_from_engine=old_from_engine,
            engine_is_exact=exact,
            critic_warmup_steps=warmup,
        )

    def worker(self, component: str, rank: int) -> SimpleNamespace:
        def forward(units: list, *reference: bool) -> dict[int, torch.Tensor]:
            first = {"critic": 20.0, "actor": 10.0 * any(reference)}[component]
            self.log.append(f"{component} {rank}{' reference' * any(reference)}")
            return {unit.index: torch.tensor([first + unit.index]) for unit in units if unit is not None}

        def update(step: int, batch: Any, last: bool) -> str:
            self.log.append(f"{component} {rank}{' last' * last}")
            if component in self.blocked:
                raise Blocked
            if component in self.failing:
                raise RuntimeError(f"{component} fails")
            return f"{component} {rank}"

        return SimpleNamespace(forward=forward, update=update)

    def columns(self) -> dict[Column, list[float]]:
        found = self.models.columns(Batch(), PhaseTimer())
        return {column: values.tolist() for column, values in found.items()}


def test_the_values_of_all_ranks_are_put_together_in_the_order_of_the_units():
    case = Case()
    assert case.columns() == {
        Column.OLD_VALUE: [20.0, 21.0, 22.0],
        Column.OLD_LOGPROB: [0.0, 1.0, 2.0],
        Column.REF_LOGPROB: [10.0, 11.0, 12.0],
    }
    assert case.log[0] == "critic 0", "it computes while the policy does"


def test_what_the_engine_reported_is_not_computed_and_no_critic_is_asked_for_nothing():
    case = Case(critic=False, old_from_engine=True)
    assert case.columns() == {Column.OLD_LOGPROB: [9.0] * 3, Column.REF_LOGPROB: [10.0, 11.0, 12.0]}
    assert case.log == ["actor 0 reference", "actor 1 reference"]


def update(case: Case, step: int) -> tuple[Any, Batch]:
    batch = Batch()
    return case.models.update(step, batch, dict.fromkeys(ALL, torch.zeros(3)), np.ones(2, bool)), batch


@pytest.mark.parametrize(("blocked", "failing"), [("actor", "critic"), ("critic", "actor")])
def test_a_failure_of_either_is_noticed_while_the_other_does_not_answer(blocked, failing):
    """Ranks of one wait for a lost one of the other, in the save that an update waits for."""
    case = Case()
    case.blocked, case.failing = blocked, failing
    with pytest.raises(RuntimeError, match=f"{failing} fails"):
        update(case, 1)


def test_policy_and_critic_take_each_mini_batch_at_the_same_time():
    case = Case()
    reports, batch = update(case, 1)
    assert (reports.policy, reports.critic) == ([["actor 0", "actor 1"]] * 2, [["critic 0"]] * 2)
    ranks = ["actor 0", "actor 1", "critic 0"]
    assert case.log == [*ranks, *(f"{rank} last" for rank in ranks)]
    assert batch.asked == [
        {Column.ADVANTAGE, Column.OLD_LOGPROB, Column.REF_LOGPROB},
        {Column.RETURN, Column.OLD_VALUE},
    ]


def test_what_follows_is_asked_for_before_the_last_reports_are_there():
    case = Case(critic=False)
    case.models.update(1, Batch(), {}, np.ones(2, bool), then=lambda: case.log.append("then"))
    assert case.log == ["actor 0", "actor 1", "actor 0 last", "actor 1 last", "then"]


@pytest.mark.parametrize(("step", "trained"), [(1, 0), (2, 0), (3, 2)])
def test_in_the_warmup_only_the_critic_is_trained(step, trained):
    reports, _ = update(Case(warmup=2), step)
    assert (len(reports.policy), len(reports.critic)) == (trained, 2)


def test_without_a_critic_there_are_no_reports_of_one():
    reports, batch = update(Case(critic=False), 1)
    assert reports.policy == [["actor 0", "actor 1"]] * 2 and reports.critic == []
    assert len(batch.asked) == 1


def test_a_gap_where_there_should_be_none_is_logged_once(capsys):
    models = Case(old_from_engine=True).models
    for step, metrics in enumerate(({}, {GAP: 0.0}, {GAP: 1e-8}, {GAP: 1e-8}), start=1):
        models.check_gap(step, metrics)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"!! {GAP}=1e-08 in step 3" in line and "algorithm.importance_sampling_fix=true recomputes them" in line
    Case(old_from_engine=False).models.check_gap(1, {GAP: 1e-8})
    assert "recomputes" not in capsys.readouterr().out
    Case(exact=False).models.check_gap(1, {GAP: 1e-8})
    assert capsys.readouterr().out == ""
