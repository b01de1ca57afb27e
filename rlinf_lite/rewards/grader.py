"""The interface of graders, and the grader that sums the scores of others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.types import GradingItem, Score


class Grader(Protocol):
    """Scores responses. Equal items get equal scores, whatever was graded before and by which thread."""

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        """One `Score` per response, in order."""
        ...

    def close(self) -> None:
        """Stop child processes. May be called again; using the grader afterwards starts them again."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedGrader:
    """A summand: a grader whose rewards are not scaled, with its weight."""

    name: str
    """Of the function in ``reward.functions``; empty for the single one without them."""
    weight: float
    grader: Grader


class SumGrader:
    """The reward of a response is ``scale`` times the sum of weight times score, added in the order of ``summands``.

    The first decides whether it is correct. If one cannot grade it, it is ungraded: without that score, its reward
    could not be compared with the others of its group.
    """

    def __init__(self, summands: Sequence[WeightedGrader], scale: float) -> None:
        self._summands, self._scale = summands, scale

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        found = [summand.grader.score(items) for summand in self._summands]
        # A grader may return one object for many responses: it is added up once.
        sums: dict[tuple[int, ...], Score] = {}
        summed = []
        for scores in zip(*found, strict=True):
            key = tuple(map(id, scores))
            if key not in sums:
                sums[key] = self._sum(scores)
            summed.append(sums[key])
        return summed

    def close(self) -> None:
        for summand in self._summands:
            summand.grader.close()

    def _sum(self, scores: Sequence[Score]) -> Score:
        graders = list(zip(self._summands, scores, strict=True))
        if failed := [(each, score) for each, score in graders if not score.graded]:
            return ungraded(_errors(failed))
        reward = self._scale * reduce(add, (each.weight * score.reward for each, score in graders))
        if not math.isfinite(reward):
            return ungraded(f"reward: {reward}; it must be finite, weights and reward.reward_scale included")
        return Score(
            reward=reward,
            parts={each.name: score.reward for each, score in graders if each.name},
            correct=scores[0].correct,
            error=_errors(graders) or None,
        )


def _errors(graders: Iterable[tuple[WeightedGrader, Score]]) -> str:
    """What went wrong, with the names of the functions; empty if nothing did."""
    errors = [f"{each.name}: {score.error}" if each.name else score.error for each, score in graders if score.error]
    return "; ".join(errors)
