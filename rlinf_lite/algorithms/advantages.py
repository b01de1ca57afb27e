"""How good each response was. GRPO: Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-6


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Rewards measured against their own group: (r - mean) / (std + 1e-6), with the unbiased std.

    Args:
        rewards_PG: [P, G], G responses to each of P prompts; any float type.

    Returns:
        float32 [P, G]. A group of equal rewards (or of one) says nothing about which response was better: exactly 0.
    """
    rewards = rewards_PG.double()
    group_size = rewards.shape[1]
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    std = (centered.square().sum(dim=1, keepdim=True) / max(group_size - 1, 1)).sqrt()
    # The mean of equal numbers can be off by a rounding, which 1 / eps would blow up: ask for equality itself.
    is_flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(is_flat, 0.0, centered / (std + _EPS)).float()


def whiten(advantages_N: Tensor, num_tokens_N: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (population) std 1 over all response tokens of the batch.

    Args:
        advantages_N: [N], one a sequence, shared by all its tokens.
        num_tokens_N: [N], response tokens of each sequence: its weight.

    Returns:
        float32 [N]. Equal advantages, or no tokens at all, give exactly 0.
    """
    advantages, weights = advantages_N.double(), num_tokens_N.double()
    counted = advantages[weights > 0]
    if counted.numel() == 0 or counted.max() == counted.min():
        return torch.zeros_like(advantages_N, dtype=torch.float32)
    total = weights.sum()
    centered = advantages - (advantages * weights).sum() / total
    std = ((centered.square() * weights).sum() / total).sqrt()
    return (centered / (std + _EPS)).float()


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"grpo": group_advantages}
"""``algorithm.adv_type``: rewards [P, G] to advantages float32 [P, G]."""
