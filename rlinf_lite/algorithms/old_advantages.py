"""Group-relative advantages. GRPO: Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-6


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Normalize rewards within each group: (r - mean) / (std + 1e-6), with the unbiased std.

    Args:
        rewards_PG: [P, G], G responses to each of P prompts; any float type.

    Returns:
        float32 [P, G]. Exactly 0 for a group of equal rewards, or of one response.
    """
    rewards = rewards_PG.double()
    group_size = rewards.shape[1]
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    std = (centered.square().sum(dim=1, keepdim=True) / max(group_size - 1, 1)).sqrt()
    # The mean of equal numbers can be off by a rounding error, which 1 / eps would blow up: test for equality itself.
    is_flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(is_flat, 0.0, centered / (std + _EPS)).float()


def left_out(graded_PG: Tensor) -> Tensor:
    """Select the responses that take no part in a step: ungraded ones, and whole groups with fewer than two grades.

    Args:
        graded_PG: bool [P, G].

    Returns:
        bool [P, G].
    """
    return ~(graded_PG & (graded_PG.sum(dim=1, keepdim=True) >= 2))


def over_graded(advantages: Callable[[Tensor], Tensor], rewards_PG: Tensor, left_out_PG: Tensor) -> Tensor:
    """Compute the advantages of each group from the responses that are not left out.

    Args:
        advantages: an entry of `ADVANTAGES`.
        rewards_PG: finite, even where left out.
        left_out_PG: bool [P, G], see `left_out`.

    Returns:
        float32 [P, G], exactly 0 where left out.
    """
    advantages_PG = advantages(rewards_PG).clone()
    for group in left_out_PG.any(dim=1).nonzero()[:, 0].tolist():
        kept_G = ~left_out_PG[group]
        advantages_PG[group] = 0.0
        if kept_G.any():
            advantages_PG[group, kept_G] = advantages(rewards_PG[group, kept_G][None])[0]
    return advantages_PG


def whiten(advantages_N: Tensor, num_tokens_N: Tensor) -> Tensor:
    """Shift and scale advantages to mean 0 and (population) std 1 over all response tokens of the batch.

    Args:
        advantages_N: [N], one per response, the same for all its tokens.
        num_tokens_N: [N], number of response tokens of each: its weight.

    Returns:
        float32 [N]. Exactly 0 if all advantages are equal, or there are no tokens.
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
"""Values of ``algorithm.adv_type``: functions from rewards [P, G] to advantages, float32 [P, G]."""
