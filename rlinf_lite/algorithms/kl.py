"""Estimators of KL(policy || reference) at sampled tokens. J. Schulman, "Approximating KL Divergence" (2020).

The policy's log-prob comes first, the reference's second: k3 is not symmetric, swapping them estimates another
quantity.

An estimator whose expected value is the KL need not have the KL's gradient when it is differentiated in a loss. With
p the policy, q the reference and r = log p - log q at a token that was drawn from p, a penalty f(r) has the expected
gradient E_p[f'(r) grad log p] (that p itself changes is not differentiated), while grad KL(p || q) = E_p[r grad log p]:

==============  ================  =============  ========================================================
kind            f(r)              expected value  expected gradient
==============  ================  =============  ========================================================
``kl``          r                 KL(p || q)     E_p[grad log p] = 0: only noise
``abs``         abs(r)            not the KL     E_p[sign(r) grad log p]: twice that of the total variation
``mse``         r^2 / 2           not the KL     E_p[r grad log p]: that of KL(p || q)
``low_var_kl``  exp(-r) + r - 1   KL(p || q)     E_p[(1 - q/p) grad log p]: that of KL(q || p)
==============  ================  =============  ========================================================

(Per token, given the tokens before it: the effect of a token on the KL of later ones is not differentiated.) All of
this holds for tokens drawn from p. After the first mini-batch of a step the tokens come from an older policy; use
`corrected_kl` for those. See Shah et al., "A Comedy of Estimators", arXiv 2512.21852.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlinf_lite.algorithms.registry import pick

_MAX_EXPONENT = 40.0
"""exp(40) squared (in the gradient norm, in Adam's second moment) is finite in float32; exp(89) itself is not."""
_MAX_LOG_RATIO = 20.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Compute the penalty of each token.

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


def corrected_kl(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, kind: str) -> Tensor:
    """Compute ratio * penalty for tokens that an older policy drew, with the gradient of KL(p || q).

    The ratio p / p_old turns the expectation over p_old into one over p. If the ratio is differentiated too, the
    gradient of ratio * k3 is ratio * r * grad log p, whose expectation is grad KL(p || q): DeepSeek-V3.2, arXiv
    2512.02556. That of ratio * k1 is the same plus ratio * grad log p, which is 0 in expectation, and k2 with a
    detached ratio has exactly this gradient. So every kind gets this gradient here, and they differ only in value. A
    token that the policy has become very unlikely to draw has a huge exp(-r), but a ratio that is as small.

    Args:
        logprobs: of the policy; gradients flow only here.
        old_logprobs: of the policy that drew the tokens. The log-ratio is clamped to [-20, 20].
        kind: a key of `KL_PENALTIES`; ``abs`` does not estimate the KL.

    Returns:
        The same shape.
    """
    now = logprobs.detach()
    ratio = (now - old_logprobs.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    value = ratio * kl_penalty(now, ref_logprobs, kind)
    return value + ratio * (now - ref_logprobs) * (
        logprobs - now
    )  # the second term has value 0 and carries the gradient


def _k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def _absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (logprobs - ref_logprobs).abs()


def _k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref - logprob. Above d = 40 its tangent replaces exp: value and gradient stay finite, and
    the gradient still pulls the policy back.
    """
    log_ratio = ref_logprobs - logprobs
    beyond = torch.relu(log_ratio - _MAX_EXPONENT)  # its gradient at 0 is 0, the clamp's below is 1
    return log_ratio.clamp(max=_MAX_EXPONENT).exp() * (1.0 + beyond) - log_ratio - 1.0


KL_PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _k1,
    "abs": _absolute,
    "mse": _k2,
    "low_var_kl": _k3,
}
"""Values of ``algorithm.kl_penalty_type``."""
