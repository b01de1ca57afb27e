"""Log-probs and entropy where each tensor-parallel rank holds some rows of the output layer: see models/head.py.

[tokens, vocabulary] never exists whole on a rank either, because tokens come in chunks and the backward pass recomputes
their logits. Two reductions over the ranks per chunk: the maximum, then the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from rlinf_lite.models.head import MAX_ELEMENTS, MAX_ELEMENTS_CUDA, MIN_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabRange:
    """The tokens of which a rank holds the rows."""

    first: int
    count: int
    """Without the rows that pad the vocabulary; may be 0."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks."""

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place over the ranks; returns ``tensor``."""
        if self.group.size() > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def token_stats(
    hidden_MD: Tensor,
    weight_RD: Tensor,
    targets_M: Tensor,
    temperature: float,
    vocab: VocabRange,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute log-prob of each target and entropy in nats of softmax(logits / temperature). Both differentiable (once).

    Collective over the tensor-parallel ranks, forward and backward; the results are the same on each.

    Args:
        hidden_MD: the same on each rank.
        weight_RD: this rank's rows, with those that pad the vocabulary.
        targets_M: int64, of the whole vocabulary.

    Returns:
        Log-probs and entropy (None unless ``with_entropy``): float32 [M].
    """
    logprob_M, entropy_M = _TokenStats.apply(hidden_MD, weight_RD, targets_M, temperature, vocab, with_entropy)
    return logprob_M, entropy_M


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_RD: Tensor,
        targets_M: Tensor,
        temperature: float,
        vocab: VocabRange,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprob_M = hidden_MD.new_empty(len(hidden_MD), dtype=torch.float32)
        total_M, entropy_M = torch.empty_like(logprob_M), torch.empty_like(logprob_M) if with_entropy else None
        for chunk in _chunks(hidden_MD, weight_RD):
            logits = _logits(hidden_MD[chunk], weight_RD, temperature, vocab)
            found = _stats(logits, targets_M[chunk], vocab, with_entropy)
            logprob_M[chunk], total_M[chunk] = found[:2]
            if entropy_M is not None and found[2] is not None:
                entropy_M[chunk] = found[2]
        ctx.save_for_backward(hidden_MD, weight_RD, targets_M, total_M, entropy_M)
        ctx.temperature, ctx.vocab = temperature, vocab
        ctx.set_materialize_grads(False)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_RD, targets_M, total_M, entropy_M = ctx.saved_tensors
        of_logprob_M, of_entropy_M = grad_outputs
        if of_logprob_M is None and of_entropy_M is None:
            return (None,) * 6
        if of_logprob_M is None:  # only the entropy is in the loss
            of_logprob_M = torch.zeros_like(total_M)
        temperature, vocab = ctx.temperature, ctx.vocab
        grad_hidden_MD = torch.zeros_like(hidden_MD, dtype=torch.float32)
        grad_weight_RD = torch.zeros_like(weight_RD, dtype=torch.float32)
        used = weight_RD[: vocab.count]
        for chunk in _chunks(hidden_MD, weight_RD):
            logprobs = _logits(hidden_MD[chunk], weight_RD, temperature, vocab).sub_(total_M[chunk, None])
            grad = _gradient(
                logprobs,
                targets_M[chunk] - vocab.first,
                of_logprob_M[chunk, None] / temperature,
                None if of_entropy_M is None else of_entropy_M[chunk, None] / temperature,
                None if entropy_M is None else entropy_M[chunk, None],
            ).to(hidden_MD.dtype)
            grad_hidden_MD[chunk] = grad @ used
            grad_weight_RD[: vocab.count] += grad.t() @ hidden_MD[chunk]
        vocab.reduce(grad_hidden_MD)
        return grad_hidden_MD.to(hidden_MD.dtype), grad_weight_RD.to(weight_RD.dtype), *[None] * 4


def _chunks(hidden_MD: Tensor, weight_RD: Tensor) -> Iterator[slice]:
    """The tokens computed together: the same on every rank, since each has as many rows."""
    limit = MAX_ELEMENTS_CUDA if hidden_MD.is_cuda else MAX_ELEMENTS
    size = max(MIN_ROWS, limit // len(weight_RD))
    for first in range(0, len(hidden_MD), size):
        yield slice(first, min(first + size, len(hidden_MD)))


def _logits(hidden: Tensor, weight_RD: Tensor, temperature: float, vocab: VocabRange) -> Tensor:
    """This rank's logits / temperature, float32; no columns for rows that pad the vocabulary."""
    num = len(hidden)
    if num < MIN_ROWS:
        hidden = functional.pad(hidden, (0, 0, 0, MIN_ROWS - num))
    return functional.linear(hidden, weight_RD[: vocab.count])[:num].float() / temperature


def _stats(
    logits: Tensor, targets: Tensor, vocab: VocabRange, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of ``targets``, log-sum-exp of all logits, and entropy, for one chunk."""
    floor = logits.new_full((len(logits), 1), -torch.inf)  # a rank may hold no token of the vocabulary
    top = vocab.reduce(torch.cat([logits, floor], 1).amax(1), dist.ReduceOp.MAX)
    logits = logits - top[:, None]
    probs = logits.exp()
    sums = [probs.sum(1), _chosen(logits, targets - vocab.first)]
    if with_entropy:
        sums.append((probs * logits).sum(1))
    total, chosen, *weighted = vocab.reduce(torch.stack(sums)).unbind()
    log_total = total.log()
    return chosen - log_total, top + log_total, log_total - weighted[0] / total if weighted else None


def _chosen(logits: Tensor, columns: Tensor) -> Tensor:
    """The logit of each token, or 0 where another rank has it."""
    mine = _is_mine(logits, columns)
    chosen = torch.zeros_like(logits[:, :1].sum(1))
    chosen[mine] = logits[mine, columns[mine]]
    return chosen


def _is_mine(logits: Tensor, columns: Tensor) -> Tensor:
    return (columns >= 0) & (columns < logits.shape[1])


def _gradient(
    logprobs: Tensor, columns: Tensor, of_logprob: Tensor, of_entropy: Tensor | None, entropy: Tensor | None
) -> Tensor:
    """As models/head.py: d log p(target) / d logit_v = (v is target) - p_v; d entropy / d logit_v = -p_v (log p_v + H).

    Args:
        columns: of the targets among this rank's; others are not on this rank.
    """
    grad = logprobs.exp()
    if of_entropy is None or entropy is None:
        grad.mul_(-of_logprob)
    else:
        grad.mul_((logprobs + entropy).mul_(-of_entropy).sub_(of_logprob))
    mine = _is_mine(logprobs, columns)
    grad[mine, columns[mine]] += of_logprob[mine, 0]
    return grad
