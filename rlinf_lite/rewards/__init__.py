"""Rewards: text in, number out. No torch, no Ray; `build_grader` gives the grader that the config names."""

from rlinf_lite.rewards.items import items
from rlinf_lite.rewards.outcome import RewardError, refuse_too_many_ungraded, ungraded
from rlinf_lite.rewards.registry import JUDGES, Grader, build_grader, fingerprint
from rlinf_lite.rewards.user_function import search_path
from rlinf_lite.rewards.verifier import VerifierStartError

__all__ = [
    "JUDGES",
    "Grader",
    "RewardError",
    "VerifierStartError",
    "build_grader",
    "fingerprint",
    "items",
    "refuse_too_many_ungraded",
    "search_path",
    "ungraded",
]
