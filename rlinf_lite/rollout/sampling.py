"""Sample tokens with integer weights: equal probabilities give the same token on every device, in any summation order.

A row of probabilities becomes integer weights (p * 2^40, rounded); the counter's hash, as a fraction of their sum,
selects a point in the cumulative weights. With a fraction instead of a remainder, probabilities that differ in their
last bits (other kernels, another number of ranks) hardly move the point, so nearly every token stays the same. Top-k
and top-p keep ties, so they do not depend on how a sort breaks them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf_lite.errors import NotFinite
from rlinf_lite.types import Sampling

_SCALE = float(1 << 40)


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens of prompt and response less likely (Keskar et al., "CTRL", arXiv 1909.05858, section 4.1)."""
    penalized = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalized, logits_BV)


def draw(logits_BV: Tensor, sampling: Sampling, random_B: Tensor) -> Tensor:
    """Sample one token per row.

    Args:
        logits_BV: float, any device.
        random_B: int64 >= 0, 63 random bits per row; not used when greedy.

    Returns:
        int64 [B].

    Raises:
        NotFinite: a row's largest logit is NaN or infinite: no token would mean anything.
    """
    if not logits_BV.amax(-1).isfinite().all():
        raise NotFinite(
            "logits are not finite, no token can be drawn: the weights or rollout.model.precision do not fit"
        )
    if not sampling.do_sample:
        return logits_BV.argmax(-1)
    weights_BV = _integer_weights(logits_BV, sampling)
    cumulative_BV = weights_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # 53 bits and a sum below 2^53: one correctly rounded product per row, the same on every device.
    fraction_B1 = (random_B[:, None] >> 10).double() * 2.0**-53
    point_B1 = (fraction_B1 * total_B1.double()).long().minimum(total_B1 - 1)
    return torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]


def _integer_weights(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    scaled = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(sampling.top_k, -1).values[:, -1:]
        scaled = torch.where(scaled >= smallest_kept, scaled, -torch.inf)
    weights_BV = (scaled.softmax(-1).double() * _SCALE).round().long()
    return weights_BV if sampling.top_p >= 1.0 else _nucleus(weights_BV, sampling.top_p)


def _nucleus(weights_BV: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens whose weight reaches ``top_p`` of the total, and their ties."""
    descending = weights_BV.sort(-1, descending=True).values
    before = descending.cumsum(-1) - descending
    enough = (descending.sum(-1, keepdim=True).double() * top_p).long().clamp(min=1)
    smallest_kept = torch.where(before < enough, descending, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
    return torch.where(weights_BV >= smallest_kept, weights_BV, 0)
