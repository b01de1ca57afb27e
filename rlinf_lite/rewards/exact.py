"""Reward type ``exact``: the response must equal the reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import GradingItem, Score


class ExactGrader:
    """A response is correct if it equals the answer, outer white space aside, and was not truncated."""

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        found = (item.finished and item.response.strip() == item.answer for item in items)
        return [Score(reward=float(correct), correct=correct) for correct in found]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""
