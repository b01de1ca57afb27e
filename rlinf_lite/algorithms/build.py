"""Composes an algorithm from the config: an estimator of advantages, a token loss, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlinf_lite.algorithms import user_algorithm
from rlinf_lite.algorithms.advantages import estimator
from rlinf_lite.algorithms.algorithm import Algorithm, Credit, Graded, Losses
from rlinf_lite.algorithms.losses import token_loss
from rlinf_lite.algorithms.losses.actor_critic import ValueLoss
from rlinf_lite.algorithms.objective import PolicyLoss
from rlinf_lite.algorithms.shaping import kl_in_reward, overlong_penalty, responses
from rlinf_lite.algorithms.statistics import centered, over_groups, whiten
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


def build(config: AlgorithmConfig, search: Sequence[str] | None = None) -> Algorithm:
    """Return the algorithm that the config describes.

    Args:
        search: where to look for a user's algorithm: `user_code.search_path` of the driver. None: of this process.

    Raises:
        ConfigError: the user's algorithm cannot be used.
    """
    if config.path is not None:
        return user_algorithm.build(config.path, config, search)
    return ConfiguredAlgorithm(config)


class ConfiguredAlgorithm:
    """`Algorithm` of ``algorithm.adv_type`` and ``algorithm.loss_type``."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config, self._estimator = config, estimator(config.adv_type)
        self._has_critic = config.adv_type == "gae"
        self.needs = frozenset(_needs(config, self._has_critic))

    def admit(self, graded: Graded) -> Tensor:
        """With ``dynamic_sampling``, the groups whose (unshaped) rewards differ; else all."""
        if not self._config.dynamic_sampling:
            return torch.ones(len(graded.rewards_PG), dtype=torch.bool)
        return over_groups(centered, graded.rewards_PG, graded.counted_PG, at_least=2).any(dim=1)

    def credit(self, graded: Graded) -> Credit:
        """Shape the rewards, estimate advantages, and normalize them over the trained tokens if configured."""
        config = self._config
        penalty_PG = overlong_penalty(graded, config)
        shaped = replace(graded, rewards_PG=graded.rewards_PG + penalty_PG)
        trained_PG = self._trained(graded)
        tokens = responses(graded)
        trained_M = tokens.of_tokens(trained_PG.reshape(-1))
        advantage_M = self._estimator.advantages(shaped, config)
        if advantage_M.dim() == 2:
            advantage_M = tokens.of_tokens(advantage_M.reshape(-1))
        columns = {}
        if self._has_critic:
            columns[Column.RETURN] = (advantage_M + graded.columns[Column.OLD_VALUE]).float()
        if config.normalize_advantages or self._estimator.WHITENED:
            advantage_M = whiten(advantage_M.float().double(), trained_M)
        columns[Column.ADVANTAGE] = torch.where(trained_M, advantage_M, 0.0).float()
        return Credit(columns=columns, trained_PG=trained_PG, metrics=self._metrics(graded, penalty_PG))

    def losses(self) -> Losses:
        policy = PolicyLoss(token_loss(self._config.loss_type), self._config)
        return Losses(policy=policy, critic=ValueLoss(self._config) if self._has_critic else None)

    def _trained(self, graded: Graded) -> Tensor:
        enough_P1 = graded.counted_PG.sum(dim=1, keepdim=True) >= self._estimator.MIN_GRADED
        trained_PG = graded.counted_PG & enough_P1
        return trained_PG & graded.finished_PG if self._config.mask_truncated else trained_PG

    def _metrics(self, graded: Graded, penalty_PG: Tensor) -> dict[str, float]:
        metrics = {}
        if self._config.overlong_buffer and graded.counted_PG.any():
            metrics["reward/overlong_penalty"] = penalty_PG[graded.counted_PG].mean().item()
        if self._config.kl_in_reward and graded.num_tokens_PG.any():
            metrics["advantage/kl_in_reward"] = kl_in_reward(graded, self._config).mean().item()
        return metrics


def _needs(config: AlgorithmConfig, has_critic: bool) -> set[Column]:
    needed = set()
    if config.n_minibatches > 1 or not config.recompute_logprobs or config.kl_in_reward:
        needed.add(Column.OLD_LOGPROB)  # else there is one update, and the policy before it is the current one
    if config.kl_beta:
        needed.add(Column.REF_LOGPROB)
    if config.importance_sampling_fix:
        needed.add(Column.ENGINE_LOGPROB)
    if has_critic:
        needed.add(Column.OLD_VALUE)
    return needed
