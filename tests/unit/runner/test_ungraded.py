"""Responses that could not be generated or graded: what a step and a validation make of them, up to their metrics."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.observability.step_line import step_line
from rlinf_lite.rewards import attach_scores, generated
from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.runner import credit
from rlinf_lite.runner.grading import graded, submit
from rlinf_lite.runner.loop import _sample_row
from rlinf_lite.runner.metrics import mfu, rollout_metrics, update_metrics, validation_metrics
from rlinf_lite.training.trainer import UnitStats
from rlinf_lite.training.update import UpdateReport
from rlinf_lite.types import Column, Group, Problem, Prompt, Response, Score

FAILED = ungraded("KeyError: 'x' (a.py:3)")
PROBLEM = Problem(problem_id=0, prompt="?", answer="", prompt_ids=(1, 2), source="")


def response(name: str, sample: int, num_tokens: int = 3, error: str | None = None) -> Response:
    return Response(
        sample_index=sample,
        token_ids=np.arange(num_tokens),
        loss_mask=np.ones(num_tokens, dtype=bool),
        logprobs=None,
        finished=num_tokens % 2 == 1,
        text=name,
        weights_step=0,
        error=error,
    )


def group(prompt_index: int, *responses: Response) -> Group:
    return Group(prompt=Prompt(prompt_index=prompt_index, epoch=0, problem=PROBLEM), responses=responses)


def score(reward: float) -> Score:
    return Score(reward=reward, correct=reward >= 0)


SCORES = [score(-1), FAILED, score(-0.5), score(-0.25), FAILED, FAILED, score(-1), score(0), score(-1)]
GROUPS = attach_scores(
    [group(p, *(response(f"{p}.{s}", s, num_tokens=1 + p + s) for s in range(3))) for p in range(3)], SCORES
)


def credited(groups: list[Group], **changes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages [M], the response that each of these tokens belongs to, and which responses are trained [N]."""
    config = AlgorithmConfig(group_size=3, **changes)
    table = credit.graded_table(groups, credit.is_graded(groups), {}, max_tokens=8)
    result = build_algorithm(config).credit(table)
    num_tokens_N = table.num_tokens_PG.reshape(-1)
    row_M = torch.arange(len(num_tokens_N)).repeat_interleave(num_tokens_N)
    return result.columns[Column.ADVANTAGE], row_M, result.trained_PG.reshape(-1)


def grpo(*rewards: float) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    return ((values - values.mean()) / (values.std() + 1e-6)).float().tolist()


def test_the_group_is_that_of_the_graded_responses():
    advantages_M, row_M, trained_N = credited(GROUPS)
    assert trained_N.tolist() == [True, False, True, False, False, False, True, True, True]
    expected = dict(zip([0, 2], grpo(-1, -0.5), strict=True)) | dict(zip([6, 7, 8], grpo(-1, 0, -1), strict=True))
    assert set(row_M.tolist()) == {0, 2, 3, 6, 7, 8}, "ungraded responses have no loss tokens"
    for row, advantage in zip(row_M.tolist(), advantages_M.tolist(), strict=True):
        assert advantage == pytest.approx(expected.get(row, 0.0))


def test_whitening_counts_the_tokens_of_trained_responses_only():
    advantages_M, row_M, trained_N = credited(GROUPS, normalize_advantages=True)
    trained = advantages_M[trained_N[row_M]].double()
    assert trained.mean().item() == pytest.approx(0, abs=1e-6)
    assert trained.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_of_failures_alone(normalize):
    advantages_M, _, trained_N = credited(attach_scores(GROUPS, [FAILED] * 9), normalize_advantages=normalize)
    assert advantages_M.tolist() == [] and not trained_N.any()


class Graders:
    """Takes the place of `WorkQueue`: answers each part at once, the last first, as workers may."""

    def __init__(self) -> None:
        self.parts: list = []

    def add(self, names, items) -> None:
        self.parts.append((names, [score(float(item.response)) for item in items]))

    def results(self):
        return iter(reversed(self.parts))


def test_what_could_not_be_generated_is_not_given_to_the_grader():
    groups = [
        group(0, response("0.0", 0), response("", 1, error="aborted")),
        group(1, response("", 0, error="aborted"), response("1.1", 1)),
    ]
    graders = Graders()
    submit(graders, groups[:1], 64)
    submit(graders, groups[1:], 64)
    assert [names for names, _ in graders.parts] == [[(0, 0)], [(1, 1)]]
    scores = [r.score for g in graded(graders, groups) for r in g.responses]
    assert scores == [score(0.0), ungraded("aborted"), ungraded("aborted"), score(1.1)]
    assert [r.text for _, r in generated(groups)] == ["0.0", "1.1"]


def test_metrics_are_of_what_was_graded_and_of_what_was_generated():
    responses = [response("", 0, 3), response("", 1, 4), response("", 2, 0, error="aborted")]
    metrics = rollout_metrics(attach_scores([group(0, *responses)], [score(-0.5), FAILED]))
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
    counted = rollout_metrics(attach_scores([group(0, responses[0])], [given_up]))
    assert (counted["reward/verifier_errors"], counted["reward/ungraded"]) == (1, 0)


def test_metrics_of_nothing():
    failed = attach_scores([group(0, *[response("", s, 0, error="aborted") for s in range(2)])], [])
    assert rollout_metrics(failed) == {"reward/verifier_errors": 2, "reward/ungraded": 2}
    assert validation_metrics(failed)["val/accuracy"] == 0.0


def test_an_ungraded_response_counts_as_wrong_in_a_validation():
    responses = [response("", s) for s in range(4)]
    metrics = validation_metrics(attach_scores([group(0, *responses)], [score(1), FAILED, score(1), FAILED]))
    assert (metrics["val/accuracy"], metrics["val/reward/mean"], metrics["val/reward/ungraded"]) == (0.5, 1.0, 2)
    assert "val/reward/accuracy" not in metrics


def test_the_mean_score_of_each_function_is_over_the_graded_responses():
    parts = [Score(reward=r, correct=True, parts={"a": r, "b": -r}) for r in (1.0, 0.25)]
    groups = attach_scores([group(0, *(response("", s) for s in range(3)))], [parts[0], FAILED, parts[1]])
    of_step, of_validation = rollout_metrics(groups), validation_metrics(groups)
    assert (of_step["reward/mean"], of_step["reward/a"], of_step["reward/b"]) == (0.625, 0.625, -0.625)
    assert (of_validation["val/reward/a"], of_validation["val/reward/b"]) == (0.625, -0.625)
    row = _sample_row(groups[0].prompt, groups[0].responses[2])
    assert (row["reward"], row["reward/a"], row["reward/b"]) == (0.25, 0.25, -0.25)
    assert "reward/a" not in _sample_row(groups[0].prompt, groups[0].responses[1])


def test_the_step_line_counts_them_where_there_are_any():
    assert step_line(3, {"reward/ungraded": 0, "val/reward/ungraded": 0}) == "step    3"
    assert step_line(3, {"reward/ungraded": 5, "val/accuracy": 0.5, "val/reward/ungraded": 2}) == (
        "step    3 | val 0.500  ungraded 5  val ungraded 2"
    )


def test_the_row_of_a_response_keeps_the_error_and_claims_no_reward():
    row = json.loads(json.dumps(_sample_row(GROUPS[0].prompt, GROUPS[0].responses[1])))
    assert (row["reward"], row["error"]) == (None, "KeyError: 'x' (a.py:3)")


def report(*, loss: float | None) -> list[UpdateReport]:
    """Of two ranks; None: the mini-batch has no loss tokens."""
    sums = UnitStats(shares={"loss/total": loss or 0.0}, token_sums={"policy/ratio": 2.0})
    units = {} if loss is None else {0: sums}
    norm, skipped = (0.0, True) if loss is None else (1.5, False)
    return [UpdateReport(units=part, num_tokens=2, grad_norm=norm, lr=0.1, skipped=skipped) for part in (units, {})]


def test_a_mini_batch_without_loss_tokens_is_in_no_mean():
    metrics = update_metrics([report(loss=None), report(loss=0.5), report(loss=1.5)])
    assert (metrics["loss/total"], metrics["policy/ratio"], metrics["optim/grad_norm"]) == (1.0, 1.0, 1.5)
    assert metrics["optim/skipped"] == 1
    assert update_metrics([report(loss=None)]) == {"optim/lr": 0.1, "optim/skipped": 1}


def test_utilization_is_of_all_ranks_and_mini_batches():
    ranks = [replace(each, flops=3.0, peak_flops=4.0) for each in report(loss=1.0)]
    assert mfu([ranks, ranks], seconds=3.0) == {"throughput/mfu": 12.0 / (8.0 * 3.0)}
    assert mfu([ranks, report(loss=None)], seconds=3.0) == {"throughput/mfu": 6.0 / (8.0 * 3.0)}
    assert mfu([report(loss=None)], seconds=3.0) == mfu([], seconds=3.0) == {}


def test_the_engine_gap_is_measured_with_the_weights_that_the_engine_had():
    """Only in the first of several mini-batches; the other metrics use all of them."""

    def of(gap: float) -> list[UpdateReport]:
        sums = UnitStats(shares={}, token_sums={"policy/rollout_logprob_gap": gap, "policy/ratio": gap})
        return [UpdateReport(units={0: sums}, num_tokens=2, grad_norm=1.0, lr=0.1, skipped=False)]

    metrics = update_metrics([of(0.5), of(5.5)])
    assert (metrics["policy/rollout_logprob_gap"], metrics["policy/ratio"]) == (0.25, 1.5)
