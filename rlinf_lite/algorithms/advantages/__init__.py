"""Estimators of advantages, one module per value of ``algorithm.adv_type``."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.config import AlgorithmConfig


class Estimator(Protocol):
    """What a module in this package has."""

    MIN_GRADED: int
    """A group with fewer grades is not trained: 2 where the responses of a group are compared, else 1."""
    WHITENED: bool
    """True: always normalized over the loss tokens of the batch, whatever ``algorithm.normalize_advantages`` says."""

    def advantages(self, graded: Graded, config: AlgorithmConfig) -> Tensor:
        """Compute advantages from rewards that are already shaped.

        Returns:
            float64, one per response [P, G] or one per loss token [M]. Without meaning where not trained.
        """
        ...


def estimator(name: str) -> Estimator:
    """Return the module of a value of ``algorithm.adv_type``."""
    return cast(Estimator, import_module(f"rlinf_lite.algorithms.advantages.{name}"))
