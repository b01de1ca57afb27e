"""REINFORCE++ with the group's mean reward as the baseline. Hu et al., arXiv 2501.03262."""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.reduce import discounted_sums
from rlinf_lite.algorithms.shaping import responses, token_rewards
from rlinf_lite.algorithms.statistics import centered, over_groups
from rlinf_lite.config import AlgorithmConfig

MIN_GRADED = 2
WHITENED = True


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Return of each token, as in REINFORCE++, from rewards minus their group's mean: [M]."""
    centered_PG = over_groups(centered, graded.rewards_PG, graded.counted_PG, MIN_GRADED)
    return discounted_sums(token_rewards(centered_PG, graded, config), config.gamma, responses(graded))
