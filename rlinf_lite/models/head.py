"""Log-probs and entropy of tokens from hidden states: the head of a causal LM, a chunk of tokens at a time.

Logits of the first chunks, at most `MAX_KEPT_BYTES`, are kept for the backward pass, which computes the others again.
So [tokens, vocabulary] is never whole in memory unless it is small. Logits are in the type the model computes in,
everything after them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite.models import products

MAX_ELEMENTS = 1 << 24
MAX_ELEMENTS_CUDA = 1 << 26
"""Logits per chunk: 64 MiB in float32; 256 MiB on a GPU. With fewer, reading the weight for each chunk, and adding to
its gradient, would take longer than the products themselves."""
MAX_KEPT_BYTES = 1 << 29
"""Bytes of logits that a forward pass keeps for its backward pass, in whole chunks."""
_ROWS_AT_A_TIME = 4096
"""Of the gradient of a weight, where it cannot be added to directly."""
MIN_ROWS = 4
"""Rows of a product at least; missing ones are zeros. With fewer, another kernel would round differently: so a token's
log-prob does not depend on the other tokens (on a CPU with one thread; not in float64)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTransform:
    """What an architecture does with the product of hidden states and weight to get logits."""

    scale: float = 1.0
    """Logits are the product times this; before the softcap."""
    softcap: float | None = None
    """Logits are ``softcap * tanh(product / softcap)``; None: no cap."""

    def __call__(self, product: Tensor) -> Tensor:
        """Logits, in the type of the product."""
        if self.scale != 1.0:
            product = product * self.scale
        return product if self.softcap is None else torch.tanh(product / self.softcap) * self.softcap

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the derivative in the logits into that in the product, in place."""
        if self.softcap is not None:  # d tanh(x) / dx = 1 - tanh(x)^2
            grad.mul_(1.0 - (logits.to(grad.dtype) / self.softcap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


PLAIN = LogitTransform()


def token_stats(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    temperature: float,
    *,
    with_entropy: bool,
    transform: LogitTransform = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    """Compute log-prob of each target and entropy in nats of softmax(logits / temperature). Both differentiable (once).

    The log-probs with and without entropy are bitwise identical, and so is the gradient if no loss uses the entropy.

    Args:
        hidden_MD: what the head sees of the M tokens; any float type.
        weight_VD: of the same type; not sharded.
        bias_V: may hold -inf (that token is impossible); None: the head has no bias.
        targets_M: int64, each in 0 .. V - 1.
        temperature: > 0.
        transform: from products to logits.

    Returns:
        Log-probs and entropy (None unless ``with_entropy``): float32 [M] (float64 for float64 hidden states).
    """
    kept, num = MAX_KEPT_BYTES if torch.is_grad_enabled() else 0, len(hidden_MD)
    hidden_MD = _padded(hidden_MD)
    if len(hidden_MD) > num:
        targets_M = functional.pad(targets_M, (0, len(hidden_MD) - num))
    logprob_M, entropy_M = _TokenStats.apply(
        hidden_MD, weight_VD, bias_V, targets_M, temperature, with_entropy, transform, kept
    )
    return _first(num, logprob_M), None if entropy_M is None else _first(num, entropy_M)


def logits_of(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: LogitTransform = PLAIN) -> Tensor:
    """Logits [M, V] of a few tokens, with the very bits of `token_stats`; without gradients."""
    num, hidden_MD = len(hidden_MD), _padded(hidden_MD)
    chunks = [_logits(hidden_MD[chunk], weight_VD, bias_V, transform) for chunk in _chunks(hidden_MD, weight_VD)]
    return (chunks[0] if len(chunks) == 1 else torch.cat(chunks))[:num]


def logprobs_of(logits_MV: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
    """Log-probs of ``targets_M`` [M], with the very bits of `token_stats`."""
    return _stats(logits_MV, targets_M, temperature, with_entropy=False)[0]


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        temperature: float,
        with_entropy: bool,
        transform: LogitTransform,
        max_kept_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        logprob_M = hidden_MD.new_empty(len(hidden_MD), dtype=_work_dtype(hidden_MD))
        entropy_M = torch.empty_like(logprob_M) if with_entropy else None
        kept: list[Tensor] = []
        for chunk in _chunks(hidden_MD, weight_VD):
            logits = _logits(hidden_MD[chunk], weight_VD, bias_V, transform)
            logprob_M[chunk], entropy = _stats(logits, targets_M[chunk], temperature, with_entropy)
            if entropy_M is not None and entropy is not None:
                entropy_M[chunk] = entropy
            if chunk.stop * len(weight_VD) * logits.element_size() <= max_kept_bytes:
                kept.append(logits)
            del logits  # before the next chunk's
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, targets_M, entropy_M, *kept)
        ctx.temperature, ctx.transform = temperature, transform
        ctx.set_materialize_grads(False)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, targets_M, entropy_M, *kept = ctx.saved_tensors
        of_logprob_M, of_entropy_M = grad_outputs
        if of_logprob_M is None and of_entropy_M is None:
            return (None,) * 8
        if of_logprob_M is None:  # only the entropy is in the loss
            of_logprob_M = torch.zeros_like(entropy_M)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        work = _work_dtype(hidden_MD)
        grad_hidden_MD = torch.empty_like(hidden_MD) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=work) if for_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=work) if for_bias else None
        for chunk in _chunks(hidden_MD, weight_VD):
            logits = kept.pop(0) if kept else _logits(hidden_MD[chunk], weight_VD, bias_V, ctx.transform)
            grad = _gradient(
                logits,
                targets_M[chunk, None],
                (of_logprob_M[chunk] / ctx.temperature)[:, None],
                None if of_entropy_M is None else (of_entropy_M[chunk] / ctx.temperature)[:, None],
                None if entropy_M is None else entropy_M[chunk, None],
                ctx.temperature,
            )
            grad = ctx.transform.backward_(grad, logits)
            del logits
            if grad_bias_V is not None:
                grad_bias_V += grad.sum(0)
            grad = grad.to(hidden_MD.dtype)
            if grad_hidden_MD is not None:
                products.product_into(grad_hidden_MD[chunk], grad, weight_VD.t())
            if grad_weight_VD is not None:
                _add_product_(grad_weight_VD, grad, hidden_MD[chunk])
            del grad  # before the next chunk's
        return (
            grad_hidden_MD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *[None] * 5,
        )


# Separate functions, so that their float32 tensors are freed before the next chunk.


def _chunks(hidden_MD: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    """The tokens computed together; how many follows from the size of the vocabulary alone."""
    limit = MAX_ELEMENTS_CUDA if hidden_MD.is_cuda else MAX_ELEMENTS
    size = max(MIN_ROWS, limit // len(weight_VD))
    if hidden_MD.device.type == "cpu":
        size = products.rounded_down(size)
    for first in range(0, len(hidden_MD), size):
        yield slice(first, first + size)


def _padded(hidden_MD: Tensor) -> Tensor:
    missing = products.padded(len(hidden_MD)) - len(hidden_MD) if hidden_MD.device.type == "cpu" else 0
    return functional.pad(hidden_MD, (0, 0, 0, missing)) if missing else hidden_MD


def _first(num: int, values_M: Tensor) -> Tensor:
    """The first values. A copy, since FSDP2 could not tell when a view is written to."""
    return values_M if len(values_M) == num else values_M[:num].clone()


def _logits(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    num = len(hidden)
    if num < MIN_ROWS:
        hidden = functional.pad(hidden, (0, 0, 0, MIN_ROWS - num))
    return transform(products.product(hidden, weight_VD, bias_V)[:num])


def _stats(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets`` and entropy, for one chunk."""
    logprobs = functional.log_softmax(_scaled(logits, temperature), dim=-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    if not with_entropy:
        return chosen, None
    probs = logprobs.exp()
    return chosen, -probs.mul_(_finite_(logprobs)).sum(dim=-1)


def _gradient(
    logits: Tensor,
    targets: Tensor,
    of_logprob: Tensor,
    of_entropy: Tensor | None,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """For one chunk: d log p(target) / d logit_v = ((v is target) - p_v) / temperature;
    d entropy / d logit_v = -p_v (log p_v + entropy) / temperature.

    Args:
        targets, of_logprob, of_entropy, entropy: a column each; those named ``of_`` are the derivatives of the loss
            with respect to log-prob and entropy, divided by the temperature.
    """
    if of_entropy is None or entropy is None:
        grad = functional.softmax(_scaled(logits, temperature), dim=-1).mul_(-of_logprob)
    else:
        logprobs = functional.log_softmax(_scaled(logits, temperature), dim=-1)
        grad = logprobs.exp()
        grad.mul_(_finite_(logprobs).add_(entropy).mul_(-of_entropy).sub_(of_logprob))
    # scatter_ writes each element once here, so it is deterministic; scatter_add_ on a GPU would not be.
    return grad.scatter_(1, targets, grad.gather(1, targets) + of_logprob)


def _add_product_(total_VD: Tensor, grad_MV: Tensor, hidden_MD: Tensor) -> None:
    """``total += grad.T @ hidden``, where ``total`` may have a wider type than the product."""
    if products.for_gradients(hidden_MD):
        for first in range(0, len(total_VD), _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            total_VD[rows] += products.weight_gradient(grad_MV[:, rows], hidden_MD)
    elif total_VD.dtype == hidden_MD.dtype:
        total_VD.addmm_(grad_MV.t(), hidden_MD)
    else:
        total_VD.add_(grad_MV.t() @ hidden_MD)


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """In the work dtype, divided by the temperature. Not a copy where that changes nothing: nobody may write to it."""
    wide = logits.to(_work_dtype(logits))
    return wide if temperature == 1.0 else wide / temperature


def _finite_(logprobs: Tensor) -> Tensor:
    """Replace -inf by 0 in place: an impossible token adds p * log p = 0, but 0 * -inf would be NaN."""
    return logprobs.masked_fill_(logprobs == -torch.inf, 0.0)
