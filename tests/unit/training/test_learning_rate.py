"""The learning-rate schedule, compared with values by hand."""

from __future__ import annotations

import math

import pytest

from rlinf_lite.config import OptimConfig
from rlinf_lite.training.lr import learning_rate


def rates(total, updates, **changes):
    config = OptimConfig.model_construct(**{"lr": 8.0, **changes})  # round numbers, above the limit of the config
    return [learning_rate(config, update, total) for update in updates]


def test_constant():
    assert rates(4, [0, 3, 4, 100], lr_scheduler="constant", min_lr=1.0) == [8.0] * 4


def test_constant_after_warm_up():
    assert rates(9, range(6), lr_scheduler="constant", lr_warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_linear():
    assert rates(4, range(6), lr_scheduler="linear") == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert rates(4, range(6), lr_scheduler="linear", min_lr=4.0) == [8.0, 7.0, 6.0, 5.0, 4.0, 4.0]


def test_linear_after_warm_up():
    assert rates(6, range(8), lr_scheduler="linear", lr_warmup_steps=2) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0]


def test_cosine():
    found = rates(6, range(8), lr_scheduler="cosine", min_lr=2.0)
    half = math.sqrt(3) / 2
    shapes = [1.0, (1 + half) / 2, 0.75, 0.5, 0.25, (1 - half) / 2, 0.0, 0.0]
    assert found == pytest.approx([2.0 + 6.0 * shape for shape in shapes], abs=1e-12)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_run_no_longer_than_its_warm_up(scheduler):
    assert rates(2, range(4), lr_scheduler=scheduler, lr_warmup_steps=2) == [4.0, 8.0, 8.0, 0.0]
    assert rates(2, range(5), lr_scheduler=scheduler, lr_warmup_steps=4)[:4] == [2.0, 4.0, 6.0, 8.0]
