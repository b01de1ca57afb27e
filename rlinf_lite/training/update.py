"""One optimizer step on one rank, in terms of a `Trainer`'s verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlinf_lite.algorithms import Loss
from rlinf_lite.training.trainer import Trainer, UnitStats
from rlinf_lite.types import RankBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """Result of one optimizer step on one rank."""

    units: Mapping[int, UnitStats]
    """By `TokenBatch.index`: the driver adds them in that order, whichever rank they come from."""
    num_tokens: int
    """Loss tokens of the mini-batch, over all ranks."""
    grad_norm: float
    """Global L2 norm before clipping; not finite after an overflow, 0 without loss tokens."""
    lr: float
    skipped: bool
    """No optimizer step was taken: the gradients overflowed with a scaler, or the mini-batch has no loss tokens."""
    flops: float = 0.0
    """Floating-point operations of forward and backward passes on this rank, without attention scores: 6 per parameter
    and token that was computed, and a shared prompt was once."""
    peak_flops: float = 0.0
    """Those per second that this rank's device is capable of; 0: not known."""
    memory_gb: float = 0.0
    """Peak memory of this rank's process so far: of the GPU, or resident."""


def update(trainer: Trainer, batch: RankBatch, loss: Loss, lr: float) -> UpdateReport:
    """Take one optimizer step on this rank's units. Collective.

    Without any loss token no step is taken, on any rank: it would move the weights by weight decay and by the momentum
    of earlier steps alone. The learning rate moves on as usual.

    Raises:
        NotFinite: as `Trainer.optim_step`.
    """
    num_tokens = batch.norm.num_tokens
    if not num_tokens:
        trainer.skip_step()
        return UpdateReport(units={}, num_tokens=0, grad_norm=0.0, lr=lr, skipped=True)
    units = trainer.forward_backward(batch, loss)
    stats = trainer.optim_step(lr)
    return UpdateReport(units=units, num_tokens=num_tokens, grad_norm=stats.grad_norm, lr=lr, skipped=stats.skipped)
