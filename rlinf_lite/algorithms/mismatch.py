"""Weights for sampled tokens: engine and trainer compute different log-probs even from equal weights.

Truncated importance sampling: Ionides (2008); for RL on language models: Yao et al., "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training" (2025). Masking and whole responses: Liu et al., "When Speed Kills
Stability" (2025). The modes are TRL's ``vllm_importance_sampling_mode``, and verl's ``rollout_is`` and ``rollout_rs``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms.reduce import Responses


def importance_weights(old_M: Tensor, engine_M: Tensor, responses: Responses, *, mode: str, clip: float) -> Tensor:
    """Compute exp(old - engine log-prob) of each token, or of each response, without gradient; limited by ``clip``.

    Args:
        old_M: [M], the trainer's log-probs from before the update.
        engine_M: [M], the engine's, for the same tokens.
        mode: ``token-...``: a ratio per token; ``sequence-...``: the product of the ratios of a response, for all of
            its tokens. ``...-truncate``: a larger ratio becomes ``clip``; ``...-mask``: it becomes 0, so that the
            token or response has no policy loss.
        clip: ``algorithm.importance_sampling_clip``.

    Returns:
        [M].
    """
    level, limit = mode.split("-")
    log_ratio_M = (old_M - engine_M).detach()
    ratio_M = (responses.of_tokens(responses.sums(log_ratio_M)) if level == "sequence" else log_ratio_M).exp()
    return ratio_M.clamp(max=clip) if limit == "truncate" else torch.where(ratio_M > clip, 0.0, ratio_M)
