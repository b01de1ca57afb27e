"""Losses per token, one module per value of ``algorithm.loss_type``. `objective` adds what they have in common."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from rlinf_lite.algorithms.objective import TokenLoss


def token_loss(name: str) -> TokenLoss:
    """Return the function ``token_losses`` of the module of a value of ``algorithm.loss_type``."""
    return cast(TokenLoss, import_module(f"rlinf_lite.algorithms.losses.{name}").token_losses)
