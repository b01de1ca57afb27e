"""Graders: turn a response and a reference answer into a reward. No torch, no Ray.

`build_grader` makes the grader that the config names.
"""

from rlinf_lite.rewards.outcome import RewardError, grading_items, refuse_too_many_ungraded, ungraded
from rlinf_lite.rewards.registry import GRADERS, Grader, build_grader, fingerprint
from rlinf_lite.rewards.verifier import VerifierStartError
from rlinf_lite.user_code import search_path

__all__ = [
    "GRADERS",
    "Grader",
    "RewardError",
    "VerifierStartError",
    "build_grader",
    "fingerprint",
    "grading_items",
    "refuse_too_many_ungraded",
    "search_path",
    "ungraded",
]
