"""Responses that could not be graded: how they are marked, and when there are too many of them to go on."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.config import ConfigError
from rlinf_lite.types import Score


class RewardError(ConfigError):
    """Too many responses could not be graded."""


def ungraded(reason: str) -> Score:
    """The score of a response that could not be graded, for ``reason`` (its first 500 characters)."""
    return Score(reward=0.0, correct=False, error=reason[:500], graded=False)


def refuse_too_many_ungraded(scores: Sequence[Score], max_fraction: float, what: str) -> None:
    """
    Args:
        max_fraction: ``reward.max_failed_fraction``.
        what: where the responses come from, for the message: ``"step 12"``.

    Raises:
        RewardError: more than ``max_fraction`` of the responses could not be graded.
    """
    errors = [score.error for score in scores if not score.graded]
    if errors and len(errors) / len(scores) > max_fraction:
        raise RewardError(
            f"reward: {len(errors)} of {len(scores)} responses of {what} could not be graded, more than "
            f"reward.max_failed_fraction={max_fraction:g} of them; the first: {errors[0]}\n"
            "correct the cause, or raise reward.max_failed_fraction, and start again with runner.resume_dir=auto (and, "
            "if the reward's source changes, \"runner.resume_allow_changes=['reward (source)']\")"
        )
