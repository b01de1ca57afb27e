"""REINFORCE++: returns of each token, normalized over the batch. Hu et al., arXiv 2501.03262."""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.reduce import discounted_sums
from rlinf_lite.algorithms.shaping import responses, token_rewards
from rlinf_lite.config import AlgorithmConfig

MIN_GRADED = 1
WHITENED = True


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Return of each token: its reward plus gamma times the return of the next: [M]."""
    return discounted_sums(token_rewards(graded.rewards_PG, graded, config), config.gamma, responses(graded))
