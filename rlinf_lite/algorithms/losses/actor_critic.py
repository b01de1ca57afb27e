"""PPO with a critic: the clipped objective for the policy, and a clipped squared error for the critic's values.

Schulman et al., arXiv 1707.06347; the clipped value loss is that of OpenAI Baselines' PPO2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.algorithms.algorithm import LossInputs, LossOutputs
from rlinf_lite.algorithms.losses.actor import token_losses as token_losses
from rlinf_lite.algorithms.objective import token_sums
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column


class ValueLoss:
    """`Loss` of a critic: mean over all loss tokens of half the squared error of its values.

    With ``algorithm.value_clip`` c it is the larger of the errors of V and of V limited to old V - c .. old V + c.
    """

    wants_entropy = False

    def __init__(self, config: AlgorithmConfig) -> None:
        self._clip = config.value_clip

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        value_M, return_M = inputs.value_M, inputs.columns[Column.RETURN]
        assert value_M is not None
        square_M, clipped_M = (value_M - return_M).square(), torch.zeros_like(value_M, dtype=torch.bool)
        if self._clip is not None:
            old_M = inputs.columns[Column.OLD_VALUE]
            limited_M = old_M + (value_M - old_M).clamp(-self._clip, self._clip)
            limited_square_M = (limited_M - return_M).square()
            clipped_M = limited_square_M > square_M
            square_M = torch.maximum(square_M, limited_square_M)
        loss = 0.5 * square_M.sum() / max(inputs.norm.num_tokens, 1)
        return LossOutputs(
            loss=loss,
            shares={"loss/value": loss.detach(), **_variance_sums(return_M, value_M.detach())},
            token_sums=token_sums({"value/mean": value_M, "value/clip_fraction": clipped_M}),
        )


def _variance_sums(return_M: Tensor, value_M: Tensor) -> dict[str, Tensor]:
    """Sums for ``value/explained_variance``, in float64 because squares are subtracted."""
    return_M, error_M = return_M.double(), return_M.double() - value_M.double()
    return {
        "_value_tokens": torch.tensor(float(len(return_M)), dtype=torch.float64, device=return_M.device),
        "_return_sum": return_M.sum(),
        "_return_square": return_M.square().sum(),
        "_value_error_sum": error_M.sum(),
        "_value_error_square": error_M.square().sum(),
    }
