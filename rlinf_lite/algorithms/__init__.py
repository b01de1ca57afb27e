"""Advantages, losses, KL penalties and their reduction: pure functions of tensors, chosen by name in the config."""

from rlinf_lite.algorithms.aggregation import AGGREGATORS, aggregate
from rlinf_lite.algorithms.importance import importance_weights
from rlinf_lite.algorithms.kl import KL_PENALTIES, corrected_kl, kl_penalty
from rlinf_lite.algorithms.logprobs import token_logprobs, token_logprobs_and_entropy
from rlinf_lite.algorithms.old_advantages import ADVANTAGES, group_advantages, left_out, over_graded, whiten
from rlinf_lite.algorithms.old_losses import LOSSES, PolicyLoss, policy_loss
from rlinf_lite.algorithms.registry import pick

__all__ = [
    "ADVANTAGES",
    "AGGREGATORS",
    "KL_PENALTIES",
    "LOSSES",
    "PolicyLoss",
    "aggregate",
    "corrected_kl",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "left_out",
    "over_graded",
    "pick",
    "policy_loss",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "whiten",
]
