"""GRPO: rewards normalized within each group. Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1."""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.shaping import response_rewards
from rlinf_lite.algorithms.statistics import centered, over_groups
from rlinf_lite.config import AlgorithmConfig

MIN_GRADED = 2
WHITENED = False
_EPS = 1e-6


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """(r - mean) / (std + 1e-6) over the group, with the unbiased std: [P, G]."""
    return over_groups(_normalized, response_rewards(graded, config), graded.counted_PG, MIN_GRADED)


def _normalized(rewards_PG: Tensor) -> Tensor:
    centered_PG = centered(rewards_PG)
    degrees_of_freedom = max(rewards_PG.shape[1] - 1, 1)
    std_P1 = (centered_PG.square().sum(dim=1, keepdim=True) / degrees_of_freedom).sqrt()
    return centered_PG / (std_P1 + _EPS)
