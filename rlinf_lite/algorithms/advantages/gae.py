"""Generalized advantage estimation, per token, with the values of a critic. Schulman et al., arXiv 1506.02438."""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.reduce import Responses, discounted_sums
from rlinf_lite.algorithms.shaping import responses, token_rewards
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column

MIN_GRADED = 1
WHITENED = False


def advantages(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """A_t = d_t + gamma lambda A_(t+1), where d_t = r_t + gamma V_(t+1) - V_t: [M].

    After the last loss token of a response V and A are 0, also for a truncated response: nothing is bootstrapped.
    """
    tokens = responses(graded)
    values_M = graded.columns[Column.OLD_VALUE].double()
    rewards_M = token_rewards(graded.rewards_PG, graded, config)
    deltas_M = rewards_M + config.gamma * _next(values_M, tokens) - values_M
    return discounted_sums(deltas_M, config.gamma * config.gae_lambda, tokens)


def _next(values_M: Tensor, tokens: Responses) -> Tensor:
    """The value of the next loss token of the same response; 0 for the last one."""
    return torch.where(tokens.is_last_M, 0.0, values_M.roll(-1))
