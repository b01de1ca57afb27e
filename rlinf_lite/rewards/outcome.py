"""When rewards say nothing any more, and the run must not go on."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.config import ConfigError
from rlinf_lite.types import Score

_ENOUGH = 8
"""Fewer responses than these prove nothing."""


class RewardError(ConfigError):
    """Not one response of a whole batch could be judged."""


def refuse_if_none_judged(scores: Sequence[Score]) -> None:
    """
    Raises:
        RewardError: every score of the batch is an error, so that nothing could be learned from it.
    """
    errors = [score.error for score in scores if score.error is not None]
    if len(errors) == len(scores) >= _ENOUGH:
        raise RewardError(
            f"reward: none of {len(scores)} responses could be judged; the first: {errors[0]}\n"
            "correct the reward, and start again with runner.resume_dir=auto and "
            "\"runner.resume_allow_changes=['reward (source)']\""
        )
