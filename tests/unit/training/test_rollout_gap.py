"""The gap between the log-probs of engine and trainer, whichever of them the old ones come from."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.algorithms import token_logprobs
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.runner.metrics import update_metrics
from rlinf_lite.training.objective import micro_batch_loss
from rlinf_lite.training.trainer import UpdateReport
from rlinf_lite.types import MicroBatch, RankBatch

LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
ENGINE = token_logprobs(LOGITS, TARGETS, 1.0) + 0.25


def sums(*, recompute: bool, old: torch.Tensor | None) -> dict[str, float]:
    micro = MicroBatch(
        index=0,
        input_ids_BT=torch.zeros(2, 4, dtype=torch.int64),
        loss_mask_BT=MASK,
        advantages_BT=torch.ones(2, 3),
        min_prompt_len=1,
        old_logprobs_BT=old,
        rollout_logprobs_BT=ENGINE,
    )
    batch = RankBatch(micro_batches=(micro,), num_tokens=5, num_sequences=2)
    config = AlgorithmConfig(recompute_logprobs=recompute)
    return micro_batch_loss(LOGITS, TARGETS, 0, micro, batch, config, 1.0)[1]


@pytest.mark.parametrize(
    ("recompute", "old", "gap"),
    [
        (True, None, 0.25),  # one mini-batch: the update's own forward pass
        (True, ENGINE + 0.5, 0.5),
        (False, ENGINE, 0.25),
    ],
)
def test_the_gap_is_between_trainer_and_engine(recompute, old, gap):
    found = sums(recompute=recompute, old=old)
    assert found["tokens"] == 5
    assert found["rollout_gap"] == pytest.approx(5 * gap, abs=1e-5)


def test_the_gap_is_measured_with_the_weights_that_the_engine_had():
    """Only in the first of several mini-batches; the other metrics use all of them."""

    def report(gap: float) -> list[UpdateReport]:
        totals = {"tokens": 2.0, "ratio": gap, "rollout_gap": gap, "loss": 0.0, "policy_loss": 0.0}
        return [UpdateReport(sums={0: totals}, grad_norm=1.0, lr=0.1, skipped=False)]

    metrics = update_metrics([report(0.5), report(5.5)])
    assert (metrics["policy/rollout_logprob_gap"], metrics["policy/ratio"]) == (0.25, 1.5)
