"""The learning rate as a pure function of the number of optimizer steps, which is its only state."""

from __future__ import annotations

import math

from rlinf_lite.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """Return the learning rate of the next optimizer step after ``update`` completed ones.

    Linear warm-up over ``lr_warmup_steps``, then ``constant``, ``linear`` or ``cosine`` from ``lr`` to ``min_lr`` at
    ``total`` steps; ``min_lr`` after that.
    """
    warmup = config.lr_warmup_steps
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.lr_scheduler == "constant":
        return config.lr
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    shape = 1.0 - progress if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * shape
