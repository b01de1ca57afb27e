"""PPO's clipped objective (Schulman et al., arXiv 1707.06347), with separate clips (DAPO's clip-higher, arXiv
2503.14476) and dual clip (Ye et al., arXiv 1912.09729).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.objective import TokenLosses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column

_MAX_LOG_RATIO = 20.0


def token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Clip the ratio of each token."""
    return clipped(ratio_of_tokens(inputs), inputs.columns[Column.ADVANTAGE], config)


def ratio_of_tokens(inputs: LossInputs) -> Tensor:
    """exp(logprob - old logprob): [M], differentiable. The log-ratio is clamped to [-20, 20], so that it is finite."""
    assert inputs.logprob_M is not None
    log_ratio_M = inputs.logprob_M - inputs.columns[Column.OLD_LOGPROB].detach()
    return log_ratio_M.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clip_range(config: AlgorithmConfig) -> tuple[float, float]:
    """How far below and above 1 a ratio may be."""
    low = config.ratio_clip_eps if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.ratio_clip_eps if config.clip_ratio_high is None else config.clip_ratio_high
    return low, high


def clipped(ratio_M: Tensor, advantage_M: Tensor, config: AlgorithmConfig) -> TokenLosses:
    """Compute -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A); for A < 0 at most -c * A.

    A clipped token has no gradient. c is ``clip_ratio_c``; null: no such limit.

    Args:
        ratio_M: differentiable, finite.
    """
    low, high = clip_range(config)
    free_M = -advantage_M * ratio_M
    bounded_M = -advantage_M * ratio_M.clamp(1.0 - low, 1.0 + high)
    loss_M = torch.maximum(free_M, bounded_M)
    metrics = {"policy/ratio": ratio_M.detach(), "policy/clip_fraction": bounded_M > free_M}
    dual_M = torch.zeros_like(metrics["policy/clip_fraction"])
    if config.clip_ratio_c is not None:
        most_M = -advantage_M * config.clip_ratio_c
        dual_M = (advantage_M < 0) & (loss_M > most_M)
        loss_M = torch.where(dual_M, most_M, loss_M)
    return TokenLosses(loss_M=loss_M, metrics=metrics | {"policy/dual_clip_fraction": dual_M})
