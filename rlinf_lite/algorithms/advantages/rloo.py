"""RLOO: the baseline of a response is the mean reward of the others in its group. Ahmadian et al., arXiv 2402.14740."""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.shaping import response_rewards
from rlinf_lite.algorithms.statistics import centered, over_groups
from rlinf_lite.config import AlgorithmConfig

MIN_GRADED = 2
WHITENED = False


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """r_i - mean of r_j over j != i: [P, G]."""
    return over_groups(_leave_one_out, response_rewards(graded, config), graded.counted_PG, MIN_GRADED)


def _leave_one_out(rewards_PG: Tensor) -> Tensor:
    """With K responses, r_i - (K mean - r_i) / (K - 1) = (r_i - mean) K / (K - 1)."""
    num_responses = rewards_PG.shape[1]
    return centered(rewards_PG) * (num_responses / max(num_responses - 1, 1))
