"""The policy on one rank: log-probs, update, state."""

from rlinf_lite.training.trainer import PolicyTrainer, UpdateReport

__all__ = ["PolicyTrainer", "UpdateReport"]
