"""Loss scaling for fp16, as Megatron-core's grad scalers do it: theirs need a GPU.

The loss is multiplied before the backward pass, so that small gradients are not rounded to 0, and gradients are divided
again. A step whose gradients overflow is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlinf_lite.config import MegatronConfig

INITIAL = 2.0**32
"""Of a dynamic scale: Megatron's ``--initial-loss-scale``."""
_LEAST, _FACTOR = 1.0, 2.0
HYSTERESIS = 2
"""Overflows, since the scale last doubled, before it is halved: Megatron's ``--hysteresis``."""


@dataclass(slots=True)
class LossScaler:
    """A scale, and what changes it. It is the same on all ranks."""

    scale: float
    is_dynamic: bool
    window: int
    """Steps without overflow after which a dynamic scale doubles."""
    growth_tracker: int = 0
    """Steps since the last overflow, or since the scale doubled."""
    hysteresis_tracker: int = HYSTERESIS
    """Overflows until the scale is halved; then each halves it."""

    @classmethod
    def of(cls, megatron: MegatronConfig) -> LossScaler:
        """As configured."""
        scale = megatron.loss_scale
        return cls(scale=scale or INITIAL, is_dynamic=scale is None, window=megatron.loss_scale_window)

    def update(self, *, overflowed: bool) -> None:
        """Follow a step: call it once for each."""
        if not self.is_dynamic:
            return
        if overflowed:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale / _FACTOR, _LEAST)
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.window:
            self.growth_tracker, self.hysteresis_tracker = 0, HYSTERESIS
            self.scale *= _FACTOR

    def state(self) -> dict[str, Any]:
        """What Megatron's scalers save: nothing of a constant one."""
        if not self.is_dynamic:
            return {}
        return {
            "scale": torch.tensor([self.scale]),
            "growth_tracker": self.growth_tracker,
            "hysteresis_tracker": self.hysteresis_tracker,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state`, or Megatron, saved. With a constant scale on either side nothing changes."""
        if self.is_dynamic and state:
            self.scale = float(state["scale"])
            self.growth_tracker, self.hysteresis_tracker = state["growth_tracker"], state["hysteresis_tracker"]
