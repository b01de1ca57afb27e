"""Log-probs and entropy of tokens, from logits. In float32 whatever the model computes in, a few rows at a time.

A few, because [B, T, V] in float32 is the largest tensor of a step. Every value is computed within its own row of V
logits, so how many rows go together changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MAX_ELEMENTS = 1 << 22
"""Logits that are in float32 at a time (16 MiB), unless one row of T x V is larger."""


def _parts(logits_BTV: Tensor) -> Iterator[slice]:
    """Rows to be worked on together."""
    num_rows, num_logits = logits_BTV.shape[0], logits_BTV.shape[1] * logits_BTV.shape[2]
    size = max(1, _MAX_ELEMENTS // max(1, num_logits))
    return (slice(first, first + size) for first in range(0, num_rows, size))


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, temperature: float) -> Tensor:
    """Log-prob of each target under softmax(logits / temperature). Differentiable (once) in the logits.

    Args:
        logits_BTV: [B, T, V], any float type; column t predicts ``targets_BT[:, t]``.
        targets_BT: int64 [B, T], each in 0 .. V - 1, padding included.
        temperature: > 0.

    Returns:
        float32 [B, T].
    """
    logprobs_BT: Tensor = _TokenLogprobs.apply(logits_BTV, targets_BT, temperature)
    return logprobs_BT


def token_entropy(logits_BTV: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). Differentiable in the logits.

    Args:
        logits_BTV: [B, T, V], any float type; a logit may be -inf (that token is impossible).
        temperature: > 0.

    Returns:
        float32 [B, T].
    """
    parts = [_entropy(logits_BTV[part].float() / temperature) for part in _parts(logits_BTV)]
    return torch.cat(parts) if parts else logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=torch.float32)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps only the logits for the backward pass: autograd's own way keeps a float32 [B, T, V] besides them."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits_BTV, targets_BT)
        ctx.temperature = temperature
        logprobs_BT = logits_BTV.new_empty(targets_BT.shape, dtype=torch.float32)
        for part in _parts(logits_BTV):
            logprobs = functional.log_softmax(logits_BTV[part].float() / temperature, dim=-1)
            logprobs_BT[part] = logprobs.gather(2, targets_BT[part][..., None]).squeeze(2)
        return logprobs_BT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """d log p(target) / d logit_v = ((v is target) - p_v) / temperature."""
        logits_BTV, targets_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for part in _parts(logits_BTV):
            scaled_BT1 = (grad_outputs[0][part].float() / ctx.temperature)[..., None]
            grad = functional.softmax(logits_BTV[part].float() / ctx.temperature, dim=-1).mul_(-scaled_BT1)
            index_BT1 = targets_BT[part][..., None]
            # scatter_ writes each place once here, so it is deterministic; scatter_add_ on a GPU would not be.
            grad.scatter_(2, index_BT1, grad.gather(2, index_BT1) + scaled_BT1)
            grad_BTV[part] = grad
        return grad_BTV, None, None


def _entropy(logits: Tensor) -> Tensor:
    # An impossible token adds p * log p = 0, but 0 * -inf would be NaN, in the value and in the gradient.
    logprobs = functional.log_softmax(logits, dim=-1)
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(dim=-1)
