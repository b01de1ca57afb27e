"""MaxRL: rewards normalized by their group's mean. Tajwar et al., "Maximum Likelihood Reinforcement Learning", arXiv
2602.02710, Algorithm 1, with the 1e-6 of the authors' code.

For rewards of 0 and 1, dividing by the group's success rate makes the expected gradient that of the first N - 1 terms
of the series of log s (s: the probability of a correct response, N: the group's size), namely
(1 + (1 - s) + ... + (1 - s)^(N-2)) ds, instead of ds. With few successes they weigh more.
"""

from __future__ import annotations

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.shaping import response_rewards
from rlinf_lite.algorithms.statistics import centered, over_groups
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.errors import ConfigError

MIN_GRADED = 2
WHITENED = False
_EPS = 1e-6


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """(r - mean) / (mean + 1e-6) over the group: [P, G]. 0 for a group without success.

    Raises:
        ConfigError: a reward is negative, so that its group's mean is not a rate of success.
    """
    rewards_PG = response_rewards(graded, config)
    lowest = rewards_PG[graded.counted_PG].min().item() if graded.counted_PG.any() else 0.0
    if lowest < 0:
        raise ConfigError(
            f"divides by a group's mean reward, and a reward is {lowest:g}",
            key="algorithm.adv_type",
            value="maxrl",
            remedy="grade with rewards of at least 0, or use dr_grpo",
        )
    return over_groups(_normalized, rewards_PG, graded.counted_PG, MIN_GRADED)


def _normalized(rewards_PG: Tensor) -> Tensor:
    return centered(rewards_PG) / (rewards_PG.mean(dim=1, keepdim=True) + _EPS)
