"""Importance weights for sampled tokens: engine and trainer compute different log-probs even from equal weights."""

from __future__ import annotations

from torch import Tensor


def importance_weights(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, clip: float) -> Tensor:
    """min(exp(old - rollout), clip), without gradient.

    Truncated importance sampling: Ionides (2008); for RL on language models: Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (2025).

    Args:
        old_logprobs_BT: [B, T], the trainer's, from before the update.
        rollout_logprobs_BT: [B, T], the engine's, for the same tokens.
        clip: the largest weight (``algorithm.importance_sampling_clip``).

    Returns:
        [B, T].
    """
    return (old_logprobs_BT - rollout_logprobs_BT).detach().exp().clamp(max=clip)
