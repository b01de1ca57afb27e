"""Graders: turn a response and a reference answer into a reward. No torch, no Ray.

`build_grader` makes the grader that the config names.
"""

from rlinf_lite.rewards.grader import Grader
from rlinf_lite.rewards.outcome import RewardError, attach_scores, generated, grading_items, refuse_too_many_ungraded
from rlinf_lite.rewards.registry import GRADERS, build_grader, fingerprint
from rlinf_lite.rewards.verifier import VerifierStartError
from rlinf_lite.user_code import search_path

__all__ = [
    "GRADERS",
    "Grader",
    "RewardError",
    "VerifierStartError",
    "attach_scores",
    "build_grader",
    "fingerprint",
    "generated",
    "grading_items",
    "refuse_too_many_ungraded",
    "search_path",
]
