"""The RNG states of one process, as ``model_optim_rng.pt`` holds them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_TRACKED = ("data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")
"""Names without which Megatron's loader ends. Nothing here draws from them: there is no dropout."""


def capture() -> dict[str, Any]:
    """The state now."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.zeros(16, dtype=torch.uint8)
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": cuda,
        "rng_tracker_states": {name: cuda.clone() for name in _TRACKED},
    }


def restore(state: dict[str, Any]) -> None:
    """Set what `capture` returned."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"].clone())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng_state"].clone())
