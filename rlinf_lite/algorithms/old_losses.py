"""Policy losses per token.

PPO's clipped objective: Schulman et al., arXiv 1707.06347; dual clip: Ye et al., arXiv 1912.09729.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """Loss and clipping of each token; values at masked positions have no meaning."""

    loss_BT: Tensor
    """float [B, T], differentiable."""
    ratio_BT: Tensor
    """float [B, T], detached: exp(logprob - old logprob)."""
    clipped_low_BT: Tensor
    """bool [B, T]: no gradient, because the ratio fell below 1 - clip_ratio_low with a negative advantage."""
    clipped_high_BT: Tensor
    """bool [B, T]: no gradient, because the ratio rose above 1 + clip_ratio_high with a positive advantage."""
    dual_clipped_BT: Tensor
    """bool [B, T]: no gradient, because the ratio rose above clip_ratio_c with a negative advantage."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None = None,
    weights_BT: Tensor | None = None,
) -> PolicyLoss:
    """Compute -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), for A < 0 at most -c * A, times the weight.

    The log-ratio is clamped to [-20, 20], so that the ratio stays finite. Every input must be finite at masked
    positions too: zero times a NaN derivative is NaN, even if the loss is masked afterwards.

    Args:
        logprobs_BT: of the policy being trained; gradients flow only here.
        old_logprobs_BT: of the policy that the advantages are for.
        advantages_BT: one per token.
        clip_ratio_low: clip below 1, for example 0.2.
        clip_ratio_high: clip above 1.
        clip_ratio_c: dual clip, > 1; None: off.
        weights_BT: importance weights (see `importance_weights`); None: 1.
    """
    log_ratio_BT = (logprobs_BT - old_logprobs_BT.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_BT, is_negative_BT = log_ratio_BT.exp(), advantages_BT < 0
    free_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    loss_BT, is_clipped_BT = torch.maximum(free_BT, clipped_BT), clipped_BT > free_BT
    dual_clipped_BT = torch.zeros_like(is_negative_BT)
    if clip_ratio_c is not None:
        bound_BT = -advantages_BT * clip_ratio_c
        dual_clipped_BT = is_negative_BT & (loss_BT > bound_BT)
        loss_BT = torch.where(dual_clipped_BT, bound_BT, loss_BT)
    return PolicyLoss(
        loss_BT=loss_BT if weights_BT is None else loss_BT * weights_BT.detach(),
        ratio_BT=ratio_BT.detach(),
        clipped_low_BT=is_clipped_BT & is_negative_BT,
        clipped_high_BT=is_clipped_BT & ~is_negative_BT,
        dual_clipped_BT=dual_clipped_BT,
    )


LOSSES: dict[str, Callable[..., PolicyLoss]] = {"actor": policy_loss}
"""Values of ``algorithm.loss_type``: functions with the signature of `policy_loss`."""
