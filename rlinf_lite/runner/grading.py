"""Between rollouts and their scores: what the graders are given, and in which order it comes back."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster.work import Work
from rlinf_lite.rewards import items, ungraded
from rlinf_lite.types import Prompt, Rollout, Score

_AT_ONCE = 64


def grader(grading: Work, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
    """Hand responses to the prompts to the graders, but for those that could not be generated; does not wait."""
    generated = [rollout for rollout in rollouts if rollout.error is None]
    for part in (generated[first : first + _AT_ONCE] for first in range(0, len(generated), _AT_ONCE)):
        grading.add([_name(rollout) for rollout in part], items(prompts, part))


def in_order(grading: Work, rollouts: Sequence[Rollout]) -> list[Score]:
    """One score a rollout, in their order, when all are there."""
    graded = {name: score for names, scores in grading for name, score in zip(names, scores, strict=True)}
    return [graded[_name(rollout)] if rollout.error is None else ungraded(rollout.error) for rollout in rollouts]


def _name(rollout: Rollout) -> tuple[int, int]:
    return rollout.position, rollout.sample_index
