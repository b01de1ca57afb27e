"""Reward type ``exact``: the response must equal the reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import GradingItem, Score


class ExactGrader:
    """A response is correct if it equals the answer, outer white space aside, and was not truncated."""

    def __init__(self, reward_scale: float) -> None:
        self._scale = reward_scale

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item.finished and item.response.strip() == item.answer) for item in items]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def _grade(self, correct: bool) -> Score:
        return Score(reward=self._scale if correct else 0.0, correct=correct)
