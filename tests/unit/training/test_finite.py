"""Parameters and optimizer state are checked for NaN and infinity once per step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.config import ActorConfig, AlgorithmConfig, CheckpointConfig, ClusterConfig
from rlinf_lite.training.fsdp.state import first_non_finite, sums_are_finite
from rlinf_lite.types import Normalizers, RankBatch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_is_found(dtype, bad):
    tensors = {"a": torch.ones(5, dtype=dtype), "empty": torch.empty(0), "b": torch.ones(3, 4, dtype=dtype)}
    assert first_non_finite(tensors) is None
    tensors["b"][1, 2] = bad
    assert not sums_are_finite([*tensors.values()])
    assert first_non_finite(tensors) == "b"


def test_a_sum_that_fp16_could_not_hold_is_finite():
    large = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert not torch.isfinite(large.sum())
    assert sums_are_finite([large, torch.ones(2)]) and sums_are_finite([])


def test_only_after_the_last_mini_batch_of_a_step():
    asked = []
    worker = PolicyWorker(0, 1, ActorConfig(), AlgorithmConfig(), CheckpointConfig(), ClusterConfig(), "cpu", ())
    trainer = SimpleNamespace(
        num_updates=0, skip_step=lambda: asked.append("skip"), check_finite=lambda: asked.append("finite?")
    )
    worker._parts = SimpleNamespace(trainer=trainer)
    empty = RankBatch(rounds=(), norm=Normalizers(num_tokens=0, num_sequences=0))
    for last in (False, False, True):
        worker.update(7, empty, last)
    assert asked == ["skip", "skip", "skip", "finite?"]
