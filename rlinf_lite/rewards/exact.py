"""Reward type ``exact``: the response is the answer, to the letter."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import Attempt, Score


class ExactJudge:
    """Right when the response, stripped of outer white space, equals the answer and ended by itself."""

    def __init__(self, reward_scale: float) -> None:
        self._scale = reward_scale

    def score(self, attempts: Sequence[Attempt]) -> list[Score]:
        return [self._judge(attempt.finished and attempt.response.strip() == attempt.answer) for attempt in attempts]

    def close(self) -> None:
        """Nothing to give back."""

    def _judge(self, correct: bool) -> Score:
        return Score(reward=self._scale if correct else 0.0, correct=correct)
