"""Rewards: text in, number out. No torch, no Ray; `build_judge` gives the judge that the config names."""

from rlinf_lite.rewards.registry import JUDGES, Judge, build_judge
from rlinf_lite.rewards.verifier import VerifierStartError

__all__ = ["JUDGES", "Judge", "VerifierStartError", "build_judge"]
