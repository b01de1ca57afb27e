"""Responses that could not be generated or graded: what a step and a validation make of them, up to their metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlinf_lite.algorithms import group_advantages
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.observability.step_line import step_line
from rlinf_lite.rewards import ungraded
from rlinf_lite.runner.credit import credit
from rlinf_lite.runner.grading import in_order, submit
from rlinf_lite.runner.loop import _sample_row
from rlinf_lite.runner.metrics import rollout_metrics, update_metrics, validation_metrics
from rlinf_lite.training.trainer import UpdateReport
from rlinf_lite.types import Problem, Prompt, Rollout, Score

FAILED = ungraded("KeyError: 'x' (a.py:3)")


def rollout(prompt_index: int, sample: int, num_tokens: int = 3, error: str | None = None) -> Rollout:
    return Rollout(
        prompt_index=prompt_index,
        sample_index=sample,
        prompt_ids=np.array([1, 2]),
        response_ids=np.arange(num_tokens),
        logprobs=None,
        finished=num_tokens % 2 == 1,
        text=f"{prompt_index}.{sample}",
        error=error,
    )


def graded(reward: float) -> Score:
    return Score(reward=reward, correct=reward >= 0)


ROLLOUTS = [rollout(p, s, num_tokens=1 + p + s) for p in range(3) for s in range(3)]
SCORES = [graded(-1), FAILED, graded(-0.5), graded(-0.25), FAILED, FAILED, graded(-1), graded(0), graded(-1)]


def test_the_group_is_that_of_the_graded_responses():
    advantages, left_out = credit(ROLLOUTS, SCORES, AlgorithmConfig(group_size=3))
    assert left_out == {1, 3, 4, 5}
    assert advantages[[0, 2]].tolist() == group_advantages(torch.tensor([[-1, -0.5]]))[0].tolist()
    assert advantages[6:].tolist() == group_advantages(torch.tensor([[-1.0, 0, -1]]))[0].tolist()
    assert not advantages[sorted(left_out)].any()


def test_whitening_counts_the_tokens_of_graded_responses_only():
    config = AlgorithmConfig(group_size=3, normalize_advantages=True)
    advantages, left_out = credit(ROLLOUTS, SCORES, config)
    kept = [row for row in range(9) if row not in left_out]
    by_token = torch.cat([advantages[row].double().repeat(len(ROLLOUTS[row].response_ids)) for row in kept])
    assert by_token.mean().item() == pytest.approx(0, abs=1e-6)
    assert by_token.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not advantages[sorted(left_out)].any()


def test_a_step_of_failures_alone():
    for normalize in (False, True):
        config = AlgorithmConfig(group_size=3, normalize_advantages=normalize)
        advantages, left_out = credit(ROLLOUTS, [FAILED] * 9, config)
        assert left_out == set(range(9)) and torch.equal(advantages, torch.zeros(9))


class Graders:
    """Takes the place of `WorkQueue`: answers each part at once, the last first, as workers may."""

    def __init__(self) -> None:
        self.parts: list = []

    def add(self, names, items) -> None:
        self.parts.append((names, [graded(float(item.response)) for item in items]))

    def results(self):
        return iter(reversed(self.parts))


def test_what_could_not_be_generated_is_not_given_to_the_grader():
    problem = Problem(problem_id=0, prompt="?", answer="", prompt_ids=(1,), source="")
    prompts = [Prompt(prompt_index=p, epoch=0, problem=problem) for p in range(2)]
    errors = {(0, 1): "aborted", (1, 0): "aborted"}
    rollouts = [rollout(p, s, error=errors.get((p, s))) for p in range(2) for s in range(2)]
    graders = Graders()
    submit(graders, prompts[:1], rollouts[:2])
    submit(graders, prompts[1:], rollouts[2:])
    assert [names for names, _ in graders.parts] == [[(0, 0)], [(1, 1)]]
    assert in_order(graders, rollouts) == [graded(0.0), ungraded("aborted"), ungraded("aborted"), graded(1.1)]


def test_metrics_are_of_what_was_graded_and_of_what_was_generated():
    rollouts = [rollout(0, 0, 3), rollout(0, 1, 4), rollout(0, 2, 0, error="aborted")]
    metrics = rollout_metrics(rollouts, [graded(-0.5), FAILED, ungraded("aborted")])
    assert metrics == {
        "reward/mean": -0.5,
        "reward/std": 0.0,
        "reward/accuracy": 0.0,
        "reward/verifier_errors": 2,
        "reward/ungraded": 2,
        "length/response_mean": 3.5,
        "length/response_max": 4,
        "length/prompt_mean": 2.0,
        "length/cut_fraction": 0.5,
    }
    given_up = Score(reward=0.0, correct=False, error="took more than 30 s of CPU time")
    counted = rollout_metrics(rollouts[:1], [given_up])
    assert (counted["reward/verifier_errors"], counted["reward/ungraded"]) == (1, 0)


def test_metrics_of_nothing():
    failed = [rollout(0, 0, 0, error="aborted")] * 2
    assert rollout_metrics(failed, [FAILED] * 2) == {"reward/verifier_errors": 2, "reward/ungraded": 2}
    assert validation_metrics(failed, [FAILED] * 2)["val/accuracy"] == 0.0


def test_an_ungraded_response_counts_as_wrong_in_a_validation():
    metrics = validation_metrics(ROLLOUTS[:4], [graded(1), FAILED, graded(1), FAILED])
    assert (metrics["val/accuracy"], metrics["val/reward/mean"], metrics["val/reward/ungraded"]) == (0.5, 1.0, 2)
    assert "val/reward/accuracy" not in metrics


def test_the_step_line_counts_them_where_there_are_any():
    assert step_line(3, {"reward/ungraded": 0, "val/reward/ungraded": 0}) == "step    3"
    assert step_line(3, {"reward/ungraded": 5, "val/accuracy": 0.5, "val/reward/ungraded": 2}) == (
        "step    3 | val 0.500  ungraded 5  val ungraded 2"
    )


def test_the_row_of_a_response_keeps_the_error_and_claims_no_reward():
    row = json.loads(json.dumps(_sample_row("?", ROLLOUTS[0], FAILED)))
    assert (row["reward"], row["error"]) == (None, "KeyError: 'x' (a.py:3)")


def report(*, loss: float | None) -> list[UpdateReport]:
    """Of two ranks; None: the mini-batch has no loss tokens."""
    sums = {} if loss is None else {0: {"tokens": 2.0, "ratio": 2.0, "loss": loss, "policy_loss": loss}}
    norm, skipped = (0.0, True) if loss is None else (1.5, False)
    return [UpdateReport(sums=part, grad_norm=norm, lr=0.1, skipped=skipped) for part in (sums, {})]


def test_a_mini_batch_without_loss_tokens_is_in_no_mean():
    metrics = update_metrics([report(loss=None), report(loss=0.5), report(loss=1.5)])
    assert (metrics["loss/total"], metrics["policy/ratio"], metrics["optim/grad_norm"]) == (1.0, 1.0, 1.5)
    assert metrics["optim/skipped"] == 1
    assert update_metrics([report(loss=None)]) == {"optim/lr": 0.1, "optim/skipped": 1}
