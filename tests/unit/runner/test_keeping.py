"""What checkpoints are kept by must be able to come: names of metrics, and intervals that meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlinf_lite.algorithms import LossInputs, build_algorithm
from rlinf_lite.config import AlgorithmConfig, CheckpointConfig, Config
from rlinf_lite.config.compose import load
from rlinf_lite.config.metric_names import METRIC_NAMES, why_never
from rlinf_lite.config.schema import keys
from rlinf_lite.runner import metrics
from rlinf_lite.runner.keeping import never_meet
from rlinf_lite.runner.schedule import due
from rlinf_lite.training.trainer import UnitStats
from rlinf_lite.training.update import UpdateReport
from rlinf_lite.types import Column, Group, Normalizers, Problem, Prompt, Response, Score


def report_of_everything(loss_type: str) -> UpdateReport:
    """With the statistics of every term that a policy's loss may have."""
    config = AlgorithmConfig(loss_type=loss_type, kl_beta=0.1, entropy_bonus=0.1, importance_sampling_fix=True)
    ones = torch.ones(2)
    inputs = LossInputs(
        logprob_M=-ones.requires_grad_(),
        entropy_M=ones,
        columns=dict.fromkeys(Column, -ones.detach()),
        seq_M=torch.zeros(2, dtype=torch.int64),
        num_responses=1,
        norm=Normalizers(num_tokens=2, num_sequences=1),
    )
    outputs = build_algorithm(config).losses().policy(inputs)
    unit = UnitStats(
        shares={name: value.item() for name, value in outputs.shares.items()},
        token_sums={name: value.item() for name, value in outputs.token_sums.items()},
    )
    return UpdateReport(units={0: unit}, num_tokens=2, grad_norm=1.0, lr=0.1, skipped=False)


def test_every_metric_that_a_step_makes_is_known():
    response = Response(
        sample_index=0,
        token_ids=np.ones(2),
        loss_mask=np.ones(2, dtype=bool),
        logprobs=None,
        finished=True,
        text="",
        weights_step=0,
        score=Score(reward=1.0, correct=True),
    )
    problem = Problem(problem_id=0, prompt="", answer="", prompt_ids=(1, 2), source="")
    group = Group(prompt=Prompt(prompt_index=0, epoch=0, problem=problem), responses=(response,))
    of_rollouts = metrics.rollout_metrics([group])
    kinds = keys()["algorithm.loss_type"].choices
    of_updates = {name for kind in kinds for name in metrics.update_metrics([[report_of_everything(kind)]])}
    of_validation = {f"val/{name}" for name in of_rollouts} - {"val/reward/accuracy"} | {"val/accuracy"}
    assert {*of_rollouts, *of_updates, *of_validation} <= {*METRIC_NAMES}
    assert len(METRIC_NAMES) == len({*METRIC_NAMES})


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("val/accuracy", ["runner.val_check_interval=5"]),
        ("val/reward/mean", ["runner.val_check_interval=5"]),
        ("reward/mean", []),
        ("optim/grad_norm", []),
        ("policy/kl", ["algorithm.kl_beta=0.1"]),
        ("policy/entropy", ["algorithm.calculate_entropy=true"]),
        ("policy/entropy", ["algorithm.entropy_bonus=0.1"]),
        ("policy/rollout_logprob_gap", ["rollout.return_logprobs=true"]),
    ],
)
def test_a_metric_that_comes_is_taken(name, overrides):
    config = load([*overrides, f"runner.checkpoint.keep_best.metric={name}"])
    assert why_never(name, config) is None


BEST = "runner.checkpoint.keep_best.metric=val/accuracy"


@pytest.fixture(scope="module")
def config() -> Config:
    return load([BEST])


def said(last_step: int, *overrides: str) -> list[str]:
    return list(never_meet(load(overrides).runner, last_step))


def test_validations_and_saves_that_never_meet_are_told_with_the_remedy():
    (line,) = said(5, BEST, "runner.val_check_interval=2", "runner.save_interval=3")
    assert line == (
        "runner.checkpoint.keep_best.metric=val/accuracy: with a validation every 2 steps and saves every 3, no "
        "checkpoint before the last step (5) is sure to have this metric; set runner.checkpoint.save_on_best=true, or "
        "let runner.save_interval be a multiple of runner.val_check_interval, both below the number of steps"
    )


def test_it_is_told_exactly_when_no_save_before_the_last_follows_a_validation(config):
    for last in (1, 5, 6, 7, 12):
        for validation in (1, 2, 3, 12, 50):
            for save in (-1, 1, 2, 3, 4, 50):
                meet = [s for s in range(1, last) if due(s, validation, last) and due(s, save, last)]
                runner = config.runner.model_copy(update={"val_check_interval": validation, "save_interval": save})
                lines = list(never_meet(runner, last))
                assert bool(lines) == (not meet), (last, validation, save)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["runner.checkpoint.keep_best.metric=reward/mean", "runner.save_interval=3"],
        [BEST, "runner.val_check_interval=2", "runner.save_interval=3", "runner.checkpoint.save_on_best=true"],
        [BEST, "runner.val_check_interval=2", "runner.save_interval=4"],
    ],
)
def test_nothing_is_told_where_they_meet(overrides):
    assert said(9, *overrides) == []


def test_saves_by_the_clock_are_no_promise():
    (line,) = said(9, BEST, "runner.val_check_interval=2", "runner.save_interval=-1", "runner.save_interval_minutes=5")
    assert "no saves at a number of steps" in line and "by the clock follow a validation by chance alone" in line


@pytest.mark.parametrize(
    ("every", "save", "last", "told"),
    [
        (7, 10, 50, True),
        (7, 10, 70, False),
        (20, 10, 50, False),
        (100, 10, 50, True),
        (25, -1, 50, False),
        (20, -1, 50, True),
    ],
)
def test_multiples_that_are_never_saved_are_told(config, every, save, last, told):
    settings = {"checkpoint": CheckpointConfig(keep_every=every), "save_interval": save}
    runner = config.runner.model_copy(update=settings)
    lines = list(never_meet(runner, last))
    assert bool(lines) == told
    assert bool([s for s in range(1, last + 1) if due(s, save, last) and s % every == 0]) == (not told)
    assert all(line.startswith(f"runner.checkpoint.keep_every={every}: with ") for line in lines)
