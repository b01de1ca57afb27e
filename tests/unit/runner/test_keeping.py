"""What checkpoints are kept by must be able to come: names of metrics, and intervals that meet."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rlinf_lite.config import CheckpointConfig, Config
from rlinf_lite.config.metric_names import METRIC_NAMES, why_never
from rlinf_lite.driver import load
from rlinf_lite.runner import metrics
from rlinf_lite.runner.keeping import never_meet
from rlinf_lite.runner.schedule import due
from rlinf_lite.types import Rollout, Score


def test_every_metric_that_a_step_makes_is_known():
    rollout = Rollout(
        prompt_index=0,
        sample_index=0,
        prompt_ids=np.ones(2),
        response_ids=np.ones(2),
        logprobs=None,
        finished=True,
        text="",
    )
    of_rollouts = metrics.rollout_metrics([rollout], [Score(reward=1.0, correct=True)])
    sums = {key: 1.0 for key in (*metrics._MEANS, *metrics._SHARES, "tokens")}
    report = SimpleNamespace(sums={0: sums}, lr=0.1, grad_norm=1.0, skipped=False)
    of_updates = metrics.update_metrics([[report]])
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
    assert why_never(name, load([*overrides, f"runner.checkpoint.keep_best.metric={name}"])) is None


BEST = "runner.checkpoint.keep_best.metric=val/accuracy"


@pytest.fixture(scope="module")
def config() -> Config:
    return load([BEST])


def said(last_step: int, *overrides: str) -> list[str]:
    return list(never_meet(load(overrides), last_step))


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
                lines = list(never_meet(config.model_copy(update={"runner": runner}), last))
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
    lines = list(never_meet(config.model_copy(update={"runner": runner}), last))
    assert bool(lines) == told
    assert bool([s for s in range(1, last + 1) if due(s, save, last) and s % every == 0]) == (not told)
    assert all(line.startswith(f"runner.checkpoint.keep_every={every}: with ") for line in lines)
