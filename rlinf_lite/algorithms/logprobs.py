"""Log-probs and entropy of tokens from logits, in float32 whatever the model computes in, a block of tokens at a time.

In blocks, because [B, T, V] in float32 would be the largest tensor of a step. Every value depends only on its own V
logits, so the block size changes no bit. The backward pass keeps only the logits and [B, T] numbers, and recomputes
everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_ELEMENTS = 1 << 22
MAX_ELEMENTS_CUDA = 1 << 26
"""Logits per block (at least one token): 16 MiB in float32, which fit a CPU's cache; 256 MiB, which occupy a GPU."""


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, temperature: float) -> Tensor:
    """Compute the log-prob of each target under softmax(logits / temperature). Differentiable (once) in the logits.

    Args:
        logits_BTV: [B, T, V], any float type; column t predicts ``targets_BT[:, t]``.
        targets_BT: int64 [B, T], each in 0 .. V - 1, padding included.
        temperature: > 0.

    Returns:
        float32 [B, T] (float64 for float64 logits).
    """
    logprobs_BT, _ = _TokenStats.apply(logits_BTV, targets_BT, temperature, False)
    return logprobs_BT


def token_logprobs_and_entropy(logits_BTV: Tensor, targets_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` and the entropy in nats of softmax(logits / temperature). Both differentiable (once).

    The log-probs equal those of `token_logprobs` bit for bit, and so does their gradient if no loss uses the entropy.

    Args:
        logits_BTV: a logit may be -inf (that token is impossible).

    Returns:
        Two tensors as `token_logprobs` returns.
    """
    logprobs_BT, entropy_BT = _TokenStats.apply(logits_BTV, targets_BT, temperature, True)
    return logprobs_BT, entropy_BT


class _TokenStats(torch.autograd.Function):
    """Log-probs, and entropy if requested (else None), with analytic derivatives."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logprobs_BT = logits_BTV.new_empty(targets_BT.shape, dtype=_work_dtype(logits_BTV))
        entropy_BT = torch.empty_like(logprobs_BT) if with_entropy else None
        for block in _blocks(logits_BTV):
            logprobs_BT[block], entropy = _stats(logits_BTV[block], targets_BT[block], temperature, with_entropy)
            if entropy_BT is not None and entropy is not None:
                entropy_BT[block] = entropy
        ctx.save_for_backward(logits_BTV, targets_BT, entropy_BT)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_BT, entropy_BT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        logits_BTV, targets_BT, entropy_BT = ctx.saved_tensors
        of_logprobs_BT, of_entropy_BT = grad_outputs
        if of_logprobs_BT is None and of_entropy_BT is None:
            return None, None, None, None
        if of_logprobs_BT is None:  # only the entropy is in the loss
            of_logprobs_BT = torch.zeros_like(entropy_BT)
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(logits_BTV):
            grad_BTV[block] = _gradient(
                logits_BTV[block],
                targets_BT[block][..., None],
                (of_logprobs_BT[block] / ctx.temperature)[..., None],
                None if of_entropy_BT is None else (of_entropy_BT[block] / ctx.temperature)[..., None],
                None if entropy_BT is None else entropy_BT[block][..., None],
                ctx.temperature,
            )
        return grad_BTV, None, None, None


# Separate functions, so that their float32 tensors are freed before the next block: at most two are alive at a time.


def _stats(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets`` and entropy, for one block."""
    logprobs = functional.log_softmax(_scaled(logits, temperature), dim=-1)
    chosen = logprobs.gather(2, targets[..., None]).squeeze(2)
    if not with_entropy:
        return chosen, None
    probs = logprobs.exp()
    return chosen, -probs.mul_(_finite_(logprobs)).sum(dim=-1)


def _gradient(
    logits: Tensor,
    targets: Tensor,
    of_logprobs: Tensor,
    of_entropy: Tensor | None,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """For one block: d log p(target) / d logit_v = ((v is target) - p_v) / temperature;
    d entropy / d logit_v = -p_v (log p_v + entropy) / temperature.

    Args:
        targets, of_logprobs, of_entropy, entropy: [B, T, 1]; those named ``of_`` are the derivatives of the loss with
            respect to log-prob and entropy, divided by the temperature.
    """
    if of_entropy is None or entropy is None:
        grad = functional.softmax(_scaled(logits, temperature), dim=-1).mul_(-of_logprobs)
    else:
        logprobs = functional.log_softmax(_scaled(logits, temperature), dim=-1)
        grad = logprobs.exp()
        grad.mul_(_finite_(logprobs).add_(entropy).mul_(-of_entropy).sub_(of_logprobs))
    # scatter_ writes each element once here, so it is deterministic; scatter_add_ on a GPU would not be.
    return grad.scatter_(2, targets, grad.gather(2, targets) + of_logprobs)


def _blocks(logits_BTV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of the tokens computed together: whole rows, or else a part of one row."""
    num_rows, num_columns, num_logits = logits_BTV.shape
    limit = MAX_ELEMENTS_CUDA if logits_BTV.is_cuda else MAX_ELEMENTS
    columns = max(1, limit // num_logits)
    rows = max(1, columns // max(1, num_columns))
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A copy in the work dtype, divided by the temperature; the caller may write to it."""
    return logits.to(_work_dtype(logits), copy=True).div_(temperature)


def _finite_(logprobs: Tensor) -> Tensor:
    """Replace -inf by 0 in place: an impossible token adds p * log p = 0, but 0 * -inf would be NaN."""
    return logprobs.masked_fill_(logprobs == -torch.inf, 0.0)
