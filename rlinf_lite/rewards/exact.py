"""Reward type ``exact``: the response is the answer, to the letter."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import GradingItem, Score


class ExactGrader:
    """Right when the response, stripped of outer white space, equals the answer and ended by itself."""

    def __init__(self, reward_scale: float) -> None:
        self._scale = reward_scale

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item.finished and item.response.strip() == item.answer) for item in items]

    def close(self) -> None:
        """Nothing to give back."""

    def _grade(self, correct: bool) -> Score:
        return Score(reward=self._scale if correct else 0.0, correct=correct)
