"""Statistics of rewards and advantages: over the graded responses of each group, and over the loss tokens of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-6


def over_groups(function: Callable[[Tensor], Tensor], rewards_PG: Tensor, counted_PG: Tensor, at_least: int) -> Tensor:
    """Apply ``function`` to the counted rewards of each group.

    Args:
        function: from rewards [P, K] to values [P, K], for any number of groups P and responses K; each row by itself.
        rewards_PG: finite, even where not counted.
        counted_PG: bool [P, G].
        at_least: a group with fewer counted responses gets 0.

    Returns:
        [P, G], exactly 0 where not counted.
    """
    values_PG = function(rewards_PG).clone()
    for group in (~counted_PG).any(dim=1).nonzero()[:, 0].tolist():
        counted_G = counted_PG[group]
        values_PG[group] = 0.0
        if counted_G.any():
            values_PG[group, counted_G] = function(rewards_PG[group, counted_G][None])[0]
    return values_PG.masked_fill((counted_PG.sum(dim=1) < at_least)[:, None], 0.0)


def centered(rewards_PG: Tensor) -> Tensor:
    """Subtract the mean of each row; exactly 0 for a row of equal rewards.

    The mean of equal numbers can be off by a rounding error, which a later division by a small number would blow up.
    """
    return torch.where(has_spread(rewards_PG)[:, None], rewards_PG - rewards_PG.mean(dim=1, keepdim=True), 0.0)


def has_spread(rewards_PG: Tensor) -> Tensor:
    """Whether the rewards of a row are not all equal: bool [P]."""
    return rewards_PG.amax(dim=1) != rewards_PG.amin(dim=1)


def whiten(values_M: Tensor, trained_M: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (population) std 1 over the trained tokens.

    Args:
        values_M: float64 [M].
        trained_M: bool [M].

    Returns:
        float64 [M], exactly 0 where not trained, and everywhere if all trained values are equal.
    """
    trained = values_M[trained_M]
    if trained.numel() == 0 or trained.max() == trained.min():
        return torch.zeros_like(values_M)
    mean = trained.mean()
    std = (trained - mean).square().mean().sqrt()
    return torch.where(trained_M, (values_M - mean) / (std + _EPS), 0.0)
