"""Dr. GRPO: GRPO without the division by the std. Liu et al., arXiv 2503.20783.

Its other half, a loss divided by a constant instead of by the length of the response, is
``algorithm.loss_agg_func: seq-mean-token-sum-norm``.
"""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.shaping import response_rewards
from rlinf_lite.algorithms.statistics import centered, over_groups
from rlinf_lite.config import AlgorithmConfig

MIN_GRADED = 2
WHITENED = False


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """r - mean over the group: [P, G]."""
    return over_groups(centered, response_rewards(graded, config), graded.counted_PG, MIN_GRADED)
