"""Rewards as the estimators of advantages see them: DAPO's punishment of long responses, and the KL in the reward.

DAPO: Yu et al., arXiv 2503.14476, section 3.4. KL in the reward: Ouyang et al., "InstructGPT", arXiv 2203.02155.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.kl import kl_penalty
from rlinf_lite.algorithms.reduce import Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


def overlong_penalty(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Compute the soft overlong punishment: 0 up to max_tokens - buffer, then linear, -penalty at max_tokens.

    Returns:
        float64 [P, G], 0 or less; what is added to the reward.
    """
    if not config.overlong_buffer:
        return torch.zeros_like(graded.rewards_PG)
    over_PG = graded.num_tokens_PG - (graded.max_tokens - config.overlong_buffer)
    return -config.overlong_penalty * (over_PG.double() / config.overlong_buffer).clamp(0.0, 1.0)


def responses(graded: Graded) -> Responses:
    """The loss tokens of all responses of a step."""
    return Responses.of_lengths(graded.num_tokens_PG.reshape(-1))


def kl_in_reward(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Estimate the KL of each sampled token, from the log-probs of the policy that the advantages are for: [M].

    Here the estimate is a reward and is not differentiated, so its mean counts, not its gradient: ``kl`` (k1) and
    ``low_var_kl`` (k3) are unbiased.
    """
    old_M, ref_M = graded.columns[Column.OLD_LOGPROB].double(), graded.columns[Column.REF_LOGPROB].double()
    return kl_penalty(old_M, ref_M, config.kl_penalty_type)


def response_rewards(graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Compute one reward per response: its own, minus ``kl_beta`` times the KL of its tokens if that is in the reward.

    Returns:
        float64 [P, G].
    """
    if not config.kl_in_reward:
        return graded.rewards_PG
    kl_PG = responses(graded).sums(kl_in_reward(graded, config)).reshape(graded.rewards_PG.shape)
    return graded.rewards_PG - config.kl_beta * kl_PG


def token_rewards(rewards_PG: Tensor, graded: Graded, config: AlgorithmConfig) -> Tensor:
    """Give each response's reward to its last loss token, and each token minus ``kl_beta`` times its KL if that is in
    the reward.

    Returns:
        float64 [M].
    """
    tokens = responses(graded)
    rewards_M = torch.where(tokens.is_last_M, tokens.of_tokens(rewards_PG.reshape(-1)), 0.0)
    return rewards_M - config.kl_beta * kl_in_reward(graded, config) if config.kl_in_reward else rewards_M
