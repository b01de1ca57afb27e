"""Log-probs and entropy of tokens, from logits. In float32 whatever the model computes in, one row at a time.

A row at a time, because [B, T, V] in float32 is the largest tensor of a step. It also makes a row's bits independent
of its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


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
    rows = [_row_entropy(logits_TV.float() / temperature) for logits_TV in logits_BTV]
    return torch.stack(rows) if rows else logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=torch.float32)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps only the logits for the backward pass: autograd's own way keeps a float32 [B, T, V] besides them."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits_BTV, targets_BT)
        ctx.temperature = temperature
        logprobs_BT = logits_BTV.new_empty(targets_BT.shape, dtype=torch.float32)
        for row, (logits_TV, targets_T) in enumerate(zip(logits_BTV, targets_BT, strict=True)):
            logprobs_TV = functional.log_softmax(logits_TV.float() / temperature, dim=-1)
            logprobs_BT[row] = logprobs_TV.gather(1, targets_T[:, None]).squeeze(1)
        return logprobs_BT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """d log p(target) / d logit_v = ((v is target) - p_v) / temperature."""
        logits_BTV, targets_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for row, grad_T in enumerate(grad_outputs[0].float() / ctx.temperature):
            grad_TV = functional.softmax(logits_BTV[row].float() / ctx.temperature, dim=-1).mul_(-grad_T[:, None])
            index_T1 = targets_BT[row][:, None]
            # scatter_ writes each place once here, so it is deterministic; scatter_add_ on a GPU would not be.
            grad_TV.scatter_(1, index_T1, grad_TV.gather(1, index_T1) + grad_T[:, None])
            grad_BTV[row] = grad_TV
        return grad_BTV, None, None


def _row_entropy(logits_TV: Tensor) -> Tensor:
    # An impossible token adds p * log p = 0, but 0 * -inf would be NaN, in the value and in the gradient.
    logprobs_TV = functional.log_softmax(logits_TV, dim=-1)
    finite_TV = logprobs_TV.masked_fill(logprobs_TV == -torch.inf, 0.0)
    return -(logprobs_TV.exp() * finite_TV).sum(dim=-1)
