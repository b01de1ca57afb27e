"""Reward type ``exact``: the response must equal the reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import GradingItem, Score

_RIGHT, _WRONG = Score(reward=1.0, correct=True), Score(reward=0.0, correct=False)


class ExactGrader:
    """A response is correct if it equals the answer, outer white space aside, and was not truncated."""

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [_RIGHT if item.finished and item.response.strip() == item.answer else _WRONG for item in items]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""
