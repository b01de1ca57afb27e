"""Engines begin with the next step's batches while the driver ends the step before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_ray import Blocked, FakeSession
from ray.exceptions import RayTaskError

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.placement import Placement
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.weight_sync import Arriving
from rlinf_lite.cluster.workers.records import GeneratedAhead
from rlinf_lite.cluster.workers.reward import RewardWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.config import SamplingConfig
from rlinf_lite.errors import NotFinite, WeightsDiffer
from rlinf_lite.runner.generation import Generation
from rlinf_lite.types import GenerationBatch, Group, Problem, Prompt, Response, Sampling, Score

pytestmark = pytest.mark.usefixtures("fake_ray")
SAMPLING = Sampling(**vars(SamplingConfig()))
PROBLEM = Problem(problem_id=0, prompt="?", answer="", prompt_ids=(1, 2), source="")


def batches(step: int, number: int) -> list[GenerationBatch]:
    """One prompt each."""
    return [
        GenerationBatch(
            stream="train",
            step=step,
            index=index,
            prompts=(Prompt(prompt_index=10 * step + index, epoch=0, problem=PROBLEM),),
            group_size=1,
            sampling=SAMPLING,
            seed=0,
        )
        for index in range(number)
    ]


class Engine:
    """Answers with the prompt's index; ``case.is_held`` blocks it."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank = case, rank

    def load_weights(self) -> None:
        if self.case.weights_fail:
            raise ValueError("no weights")

    def row_checksums(self) -> dict[str, int]:
        return {"a": 1, "b": self.case.sent}

    def generate_ahead(self, batch: GenerationBatch, step: int, is_told: bool, *arrived: None) -> GeneratedAhead:
        groups = self.generate(batch)
        weights = None if self.case.held is None else {"a": 1, "b": self.case.held[self.rank]}
        return GeneratedAhead(rank=self.rank, groups=groups, weights=weights)

    def check_weights(self, step: int, *sent: dict[str, int]) -> None:
        assert sent == ({"a": 1, "b": self.case.sent},) and self.case.held is not None
        if self.case.held[self.rank] != self.case.sent:
            raise WeightsDiffer(f"rank {self.rank}, step {step}")

    def generate(self, batch: GenerationBatch) -> list[Group]:
        if self.case.is_held:
            raise Blocked
        if self.case.error is not None and self.rank == 1:
            raise self.case.error
        index = batch.prompts[0].prompt_index
        self.case.generated.append((self.rank, index))
        response = Response(
            sample_index=0,
            token_ids=np.array([index]),
            loss_mask=np.ones(1, dtype=bool),
            logprobs=None,
            finished=True,
            text=str(index),
            weights_step=0,
        )
        return [Group(prompt=batch.prompts[0], responses=(response,))]


class Grader:
    def score(self, items: Any) -> list[Score]:
        return [Score(reward=1.0, correct=True) for _ in items]


class Case:
    """Two engines and a grader."""

    def __init__(self) -> None:
        self.is_held = self.weights_fail = False
        self.sent, self.held = 2, (2, 2)
        self.error: Exception | None = None
        self.generated: list[tuple[int, int]] = []
        self.session = FakeSession(self.build)
        rollouts = self.group(RolloutWorkers, "rollout")
        self.rewards = self.group(RewardWorkers, "reward")
        self.rewards.items_per_call = 8
        self.rollouts, self.losses = rollouts, []
        self.generation = Generation(
            rollouts=rollouts, rewards=self.rewards, enable_sleep=False, max_failed_fraction=0.0
        )

    def build(self, target: str, rank: int, size: int) -> Any:
        return Engine(self, rank) if target == "rollout" else Grader()

    def group(self, kind: type, component: str) -> Any:
        group = object.__new__(kind)
        WorkerGroup.__init__(group, component, component, component, self.session, Spares(self.session))
        return group

    def start(self, step: int, number: int) -> None:
        """As the runner."""
        calls = self.rollouts.start("load_weights")
        sums = [self.rollouts.start_one(1, "row_checksums")]  # as if it were a policy rank
        arriving = Arriving(step=step - 1, arrived=[[call] for call in calls], sums=sums)
        self.generation.start(batches(step, number), arriving)

    def replace(self, lost: WorkerLost) -> None:
        self.losses.append(lost)
        self.rollouts.replace(lost.rank)

    def answers(self, step: int, number: int) -> list[int]:
        groups, _ = self.generation.generate(batches(step, number))
        return [int(group.responses[0].text) for group in groups]


def test_each_engine_begins_with_one_batch_and_it_is_not_generated_again():
    case = Case()
    case.start(1, 3)
    assert case.generated == [(0, 10), (1, 11)]
    assert case.answers(1, 3) == [10, 11, 12]
    assert sorted(index for _, index in case.generated) == [10, 11, 12]


def test_fewer_batches_than_engines():
    case = Case()
    case.start(1, 1)
    assert case.answers(1, 1) == [10]
    assert case.generated == [(0, 10)]


def test_an_engine_without_its_weights_generates_nothing():
    case = Case()
    case.weights_fail = True
    case.start(1, 2)
    assert case.generated == []
    with pytest.raises(RayTaskError, match="rollout rank 0"):
        case.answers(1, 2)
    assert case.generated == []


@pytest.mark.parametrize("held", [(2, 3), (3, 2), (3, 3)])
def test_responses_of_an_engine_with_other_weights_are_an_error(held):
    case = Case()
    case.held = held
    case.start(5, 2)
    wrong = held.index(3)
    expected = rf"^rollout rank {wrong}: .* the weights after step 4 that the actor sent; b is the first that differs"
    with pytest.raises(WeightsDiffer, match=expected):
        case.answers(5, 2)
    assert all(rank != wrong for rank, _ in map(first_of, case.generation._made.values()))


def first_of(groups: list[Group]) -> tuple[int, int]:
    index = groups[0].prompt.prompt_index
    return index % 10, index


@pytest.mark.parametrize("held", [(2, 2), (2, 3)])
def test_wrong_weights_are_named_where_they_make_an_engine_fail(held):
    case = Case()
    case.held, case.error = held, NotFinite("logits are not finite")
    case.start(5, 2)
    expected = (NotFinite, "not finite") if held == (2, 2) else (WeightsDiffer, "rank 1, step 4")
    with pytest.raises(expected[0], match=expected[1]):
        case.answers(5, 2)


def test_an_engine_that_cannot_say_which_weights_it_holds():
    case = Case()
    case.held = None
    case.start(1, 2)
    assert case.answers(1, 2) == [10, 11]


def test_what_was_begun_for_another_step_is_not_taken():
    case = Case()
    case.start(2, 2)
    assert case.answers(1, 2) == [10, 11]
    assert case.answers(2, 2) == [20, 21]
    assert [index for _, index in case.generated] == [20, 21, 10, 11, 20, 21]


def test_what_was_begun_is_forgotten_in_a_recovery():
    case = Case()
    case.weights_fail = True
    case.start(1, 2)
    case.weights_fail = False
    case.generation.forget_started()
    assert case.answers(1, 2) == [10, 11]


def test_the_batch_of_an_engine_that_was_replaced_meanwhile_is_generated_by_the_new_one():
    case = Case()
    case.is_held = True
    case.start(1, 2)
    case.rollouts.replace(1)
    case.is_held = False
    for actor in case.session.actors:
        actor.resume()
    assert case.answers(1, 2) == [10, 11]
    assert case.generated == [(0, 10), (1, 11)]


def test_an_engine_that_is_lost_with_such_a_batch_is_replaced():
    case = Case()
    case.rollouts.repair = case.replace
    case.is_held = True
    case.start(1, 2)
    case.session.actors[0].die()
    case.is_held = False
    for actor in case.session.actors:
        actor.resume()
    assert case.answers(1, 2) == [10, 11]
    assert [(lost.group, lost.rank) for lost in case.losses] == [("rollout", 0)]


def test_replacement_of_all_engines_by_fewer():
    case = Case()
    case.start(1, 2)
    case.session.placement = Placement(slots={**case.session.placement.slots, "rollout": (0,)})
    case.rollouts.respawn()
    case.generated.clear()
    assert case.answers(1, 2) == [10, 11]
    assert case.generated == [(0, 10), (0, 11)]
