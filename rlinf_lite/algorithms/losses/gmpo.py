"""GMPO, "Geometric-Mean Policy Optimization": the mean of clipped log-ratios. Zhao et al., arXiv 2507.20673."""

from __future__ import annotations

import torch

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.losses.actor import clip_range
from rlinf_lite.algorithms.objective import TokenLosses
from rlinf_lite.algorithms.reduce import Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


def token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Compute -s * A, s = exp(mean over the response of the clipped log-ratios).

    A log-ratio is limited to ``clip_ratio_high`` for A > 0, and to -``clip_ratio_low`` otherwise; the paper takes 0.4.
    As in GSPO-token, a token's value is s, and its gradient s * A * grad log p, or 0 if it is clipped.
    """
    logprob_M, advantage_M = inputs.logprob_M, inputs.columns[Column.ADVANTAGE]
    assert logprob_M is not None
    low, high = clip_range(config)
    log_ratio_M = logprob_M - inputs.columns[Column.OLD_LOGPROB]
    clipped_M = torch.where(advantage_M > 0, log_ratio_M.clamp(max=high), log_ratio_M.clamp(min=-low))
    now_M, responses = clipped_M.detach(), Responses(inputs.seq_M, inputs.num_responses)
    # No log-ratio above 20: for A <= 0 there is no upper clip.
    s_M = responses.of_tokens(responses.means(now_M).clamp(max=20.0).exp()) * (clipped_M - now_M).exp()
    return TokenLosses(
        loss_M=-advantage_M * s_M,
        metrics={"policy/ratio": s_M.detach(), "policy/clip_fraction": now_M != log_ratio_M.detach()},
    )
