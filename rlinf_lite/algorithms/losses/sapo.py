"""SAPO: a soft gate on the ratio instead of a clip. "Soft Adaptive Policy Optimization", arXiv 2511.20347."""

from __future__ import annotations

import torch

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.losses.actor import ratio_of_tokens
from rlinf_lite.algorithms.objective import TokenLosses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


def token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Compute -A * sigmoid(tau (ratio - 1)) * 4 / tau, where tau depends on the sign of A.

    Its slope by the ratio, 4 g (1 - g), is 1 at ratio 1, as without a gate, and falls off smoothly on both sides.
    """
    advantage_M, ratio_M = inputs.columns[Column.ADVANTAGE], ratio_of_tokens(inputs)
    tau_M = torch.where(advantage_M > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    gate_M = torch.sigmoid(tau_M * (ratio_M - 1.0))
    slope_M = 4.0 * gate_M.detach() * (1.0 - gate_M.detach())
    return TokenLosses(
        loss_M=-advantage_M * gate_M * 4.0 / tau_M,
        metrics={"policy/ratio": ratio_M.detach(), "policy/gate_slope": slope_M},
    )
