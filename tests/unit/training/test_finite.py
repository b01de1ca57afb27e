"""Parameters and optimizer state are checked for NaN and infinity once per step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlinf_lite.cluster.workers.policy_worker import PolicyWorker
from rlinf_lite.training.state import first_non_finite, norms_are_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_is_found(dtype, bad):
    tensors = {"a": torch.ones(5, dtype=dtype), "empty": torch.empty(0), "b": torch.ones(3, 4, dtype=dtype)}
    assert first_non_finite(tensors) is None
    tensors["b"][1, 2] = bad
    assert not norms_are_finite([*tensors.values()])
    assert first_non_finite(tensors) == "b"


def test_a_norm_that_fp16_could_not_hold_is_finite():
    large = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert not torch.isfinite(torch.linalg.vector_norm(large))
    assert norms_are_finite([large, torch.ones(2)]) and norms_are_finite([])


def test_only_after_the_last_mini_batch_of_a_step():
    asked = []
    worker = object.__new__(PolicyWorker)
    worker.rank = 0
    trainer = SimpleNamespace(update=lambda batch: asked.append(batch), check_finite=lambda: asked.append("finite?"))
    worker._parts = SimpleNamespace(trainer=trainer)
    for number, last in ((1, False), (2, False), (3, True)):
        worker.update(7, number, last)
    assert asked == [1, 2, 3, "finite?"]
