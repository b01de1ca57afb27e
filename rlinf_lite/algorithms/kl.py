"""Estimators of KL(policy || reference) at sampled tokens. J. Schulman, "Approximating KL Divergence" (2020).

The policy's log-prob comes first, the reference's second: k3 is not symmetric, swapped it estimates another thing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlinf_lite.algorithms.registry import pick

_MAX_LOG_RATIO = 20.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Penalty of each token.

    Args:
        logprobs: of the policy, any shape; gradients flow here.
        ref_logprobs: of the reference, same shape.
        kind: a key of `KL_PENALTIES`.

    Returns:
        The same shape.

    Raises:
        ValueError: unknown ``kind``.
    """
    return pick(KL_PENALTIES, "algorithm.kl_penalty_type", kind)(logprobs, ref_logprobs)


def _k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def _absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (logprobs - ref_logprobs).abs()


def _k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref - logprob, clamped to [-20, 20] (no gradient beyond) so that exp cannot overflow."""
    log_ratio = (ref_logprobs - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1.0


KL_PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _k1,
    "abs": _absolute,
    "mse": _k2,
    "low_var_kl": _k3,
}
"""``algorithm.kl_penalty_type``."""
