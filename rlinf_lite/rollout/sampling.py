"""Sampling a token per row: the repetition penalty, the filters (min-p, top-k, top-p), then Gumbel variables decide.

Filters only mask logits, so the token that they would select stays the same unless it is filtered out. Tokens of equal
logits are kept in the order of their ids.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.rollout import gumbel
from rlinf_lite.types import Sampling

_SCALE = float(1 << 40)
_CACHED = 1 << 17
"""Logits that a CPU filters at a time, so that they and what is made of them stay in its cache."""


def penalize_repetition(logits_RV: Tensor, seen_RV: Tensor, penalty: float) -> Tensor:
    """Make tokens of prompt and response less likely (Keskar et al., "CTRL", arXiv 1909.05858, section 4.1)."""
    penalized = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return torch.where(seen_RV, penalized, logits_RV)


def draw(logits_RV: Tensor, sampling: Sampling, keys_R: np.ndarray, t: int | np.ndarray) -> Tensor:
    """Sample one token per row: a function of the row's logits, its key and ``t`` alone.

    Args:
        logits_RV: float, any device; after the repetition penalty.
        keys_R: the rows' RNG keys, uint64, as from `rollout.batches.rng_keys`; not used when greedy.
        t: index of the token in its response, one for all rows or int64 [R].

    Returns:
        int64 [R].

    Raises:
        NotFinite: a row's largest logit is NaN or infinite: no token would mean anything.
    """
    if not sampling.do_sample:
        gumbel.require_finite(logits_RV)
        return logits_RV.argmax(-1)
    return gumbel.draw(filtered(logits_RV, sampling), sampling.temperature, keys_R, t)


def filtered(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """The logits, with -inf for every token that min-p, top-k or top-p excludes.

    As vLLM applies them: min-p, then top-k, then top-p on what is left, all at the sampling temperature.

    Raises:
        NotFinite: as `draw`, if there is something to filter.
    """
    if _filters(sampling, logits_RV.shape[-1]):
        gumbel.require_finite(logits_RV)
    return masked(logits_RV, sampling)


def _filters(sampling: Sampling, vocabulary: int) -> bool:
    return 0 < sampling.top_k < vocabulary or sampling.top_p < 1.0 or sampling.min_p > 0.0


def masked(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """As `filtered`, without waiting for the device, and without a check."""
    vocabulary = logits_RV.shape[-1]
    if not _filters(sampling, vocabulary):
        return logits_RV
    if logits_RV.device.type == "cpu" and len(logits_RV) > (at_a_time := max(1, _CACHED // vocabulary)):
        return torch.cat([_masked(rows, sampling) for rows in logits_RV.split(at_a_time)])
    return _masked(logits_RV, sampling)


def _masked(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    vocabulary = logits_RV.shape[-1]
    limited, logits_RV = 0 < sampling.top_k < vocabulary, logits_RV.float()
    if sampling.min_p > 0.0:
        below_RV = logits_RV - logits_RV.amax(-1, keepdim=True) < sampling.temperature * math.log(sampling.min_p)
        logits_RV = logits_RV.masked_fill(below_RV, -torch.inf)
        if not limited and sampling.top_p >= 1.0:
            return logits_RV
    descending_RK = logits_RV.topk(sampling.top_k, -1).values if limited else _descending(logits_RV)
    kept_RK = descending_RK > -torch.inf
    if sampling.top_p < 1.0:
        kept_RK &= _nucleus(descending_RK / sampling.temperature, sampling.top_p)
    return _keep_largest(logits_RV, descending_RK, kept_RK.sum(-1, keepdim=True))


def _descending(logits_RV: Tensor) -> Tensor:
    if logits_RV.device.type != "cpu":
        return logits_RV.topk(logits_RV.shape[-1], -1).values
    return torch.from_numpy(np.sort(logits_RV.numpy(), axis=-1)).flip(-1)  # torch's takes ten times as long


def _nucleus(scaled_RK: Tensor, top_p: float) -> Tensor:
    """bool: the fewest first tokens whose probabilities sum to ``top_p``. Sums are of integers: exact in any order."""
    weights_RK = (scaled_RK.softmax(-1).double() * _SCALE).round().long()
    before_RK = weights_RK.cumsum(-1) - weights_RK
    enough_R1 = (weights_RK.sum(-1, keepdim=True).double() * top_p).long().clamp(min=1)
    return before_RK < enough_R1


def _keep_largest(logits_RV: Tensor, descending_RK: Tensor, num_R1: Tensor) -> Tensor:
    """Mask all but the ``num_R1`` largest logits of each row; of equal ones, the smallest token ids stay."""
    smallest_R1 = descending_RK.gather(-1, (num_R1 - 1).clamp(min=0))  # none is left of NaN logits
    if logits_RV.device.type == "cpu":  # where looking does not wait, and most often no tie is to be broken
        kept_RV = logits_RV >= smallest_R1
        if torch.equal(kept_RV.sum(-1, keepdim=True), num_R1):
            return torch.where(kept_RV, logits_RV, -torch.inf)
    larger_RV, equal_RV = logits_RV > smallest_R1, logits_RV == smallest_R1
    kept_RV = larger_RV | (equal_RV & (equal_RV.cumsum(-1) <= num_R1 - larger_RV.sum(-1, keepdim=True)))
    return logits_RV.masked_fill(~kept_RV, -torch.inf)
