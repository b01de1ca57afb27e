"""Algorithms: how rewards become advantages, and what is minimized. Pure functions of tensors, chosen in the config."""

from rlinf_lite.algorithms.algorithm import (
    Algorithm,
    Credit,
    Graded,
    Loss,
    Losses,
    LossInputs,
    LossOutputs,
    combine,
)
from rlinf_lite.algorithms.build import build as build_algorithm

__all__ = [
    "Algorithm",
    "Credit",
    "Graded",
    "Loss",
    "LossInputs",
    "LossOutputs",
    "Losses",
    "build_algorithm",
    "combine",
]
