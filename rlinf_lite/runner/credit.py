"""Computes the advantages of a step's responses from their scores, and which responses the step leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlinf_lite.algorithms import ADVANTAGES, left_out, over_graded, pick, whiten
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Rollout, Score


def credit(rollouts: Sequence[Rollout], scores: Sequence[Score], config: AlgorithmConfig) -> tuple[Tensor, set[int]]:
    """Compute advantages over whole groups, before the step is sharded over ranks.

    Args:
        rollouts: N of them: whole groups, in canonical order.
        scores: one per rollout.

    Returns:
        Advantages, float32 [N]; and the rows that are left out of statistics and loss: those without a grade, and all
        of a group with fewer than two grades. Their advantages are 0.
    """
    rewards_PG = torch.tensor([score.reward for score in scores], dtype=torch.float64).reshape(-1, config.group_size)
    left_out_PG = left_out(torch.tensor([score.graded for score in scores]).reshape(rewards_PG.shape))
    estimator = pick(ADVANTAGES, "algorithm.adv_type", config.adv_type)
    advantages_N = over_graded(estimator, rewards_PG, left_out_PG).reshape(-1)
    left_out_N = left_out_PG.reshape(-1)
    if config.normalize_advantages:
        num_tokens_N = torch.tensor([len(rollout.response_ids) for rollout in rollouts]).masked_fill(left_out_N, 0)
        advantages_N = whiten(advantages_N, num_tokens_N).masked_fill(left_out_N, 0.0)
    return advantages_N, set(left_out_N.nonzero()[:, 0].tolist())
