"""Rewards: text in, number out. No torch, no Ray; `build_judge` gives the judge that the config names."""

from rlinf_lite.rewards.attempts import attempts
from rlinf_lite.rewards.outcome import RewardError, refuse_too_many_ungraded, ungraded
from rlinf_lite.rewards.registry import JUDGES, Judge, build_judge, fingerprint
from rlinf_lite.rewards.user_function import search_path
from rlinf_lite.rewards.verifier import VerifierStartError

__all__ = [
    "JUDGES",
    "Judge",
    "RewardError",
    "VerifierStartError",
    "attempts",
    "build_judge",
    "fingerprint",
    "refuse_too_many_ungraded",
    "search_path",
    "ungraded",
]
