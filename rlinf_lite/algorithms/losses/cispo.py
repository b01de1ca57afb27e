"""CISPO: the policy gradient with a clipped weight. MiniMax, "MiniMax-M1", arXiv 2506.13585, section 3.1."""

from __future__ import annotations

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.losses.actor import clip_range, ratio_of_tokens
from rlinf_lite.algorithms.objective import TokenLosses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


def token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Compute -stop_gradient(clip(ratio)) * A * log p: every token keeps its gradient, also a clipped one.

    The ratio is limited to 1 + ``clip_ratio_high``. It has a lower limit, 1 - ``clip_ratio_low``, only if that is set:
    the paper uses none.
    """
    assert inputs.logprob_M is not None
    ratio_M = ratio_of_tokens(inputs).detach()
    low, high = clip_range(config)
    weight_M = ratio_M.clamp(0.0 if config.clip_ratio_low is None else 1.0 - low, 1.0 + high)
    return TokenLosses(
        loss_M=-weight_M * inputs.columns[Column.ADVANTAGE] * inputs.logprob_M,
        metrics={"policy/ratio": ratio_M, "policy/clip_fraction": weight_M != ratio_M},
    )
