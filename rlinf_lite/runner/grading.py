"""Sends rollouts to the reward workers and returns their scores in order."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster.work import Work
from rlinf_lite.rewards import grading_items, ungraded
from rlinf_lite.types import Prompt, Rollout, Score

_ITEMS_PER_CALL = 64


def submit(grading: Work, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
    """Hand responses to the graders, without waiting for scores. Those that could not be generated are skipped."""
    generated = [rollout for rollout in rollouts if rollout.error is None]
    for part in (generated[first : first + _ITEMS_PER_CALL] for first in range(0, len(generated), _ITEMS_PER_CALL)):
        grading.add([_name(rollout) for rollout in part], grading_items(prompts, part))


def in_order(grading: Work, rollouts: Sequence[Rollout]) -> list[Score]:
    """Wait for all scores; returns one per rollout, in order."""
    graded = {name: score for names, scores in grading for name, score in zip(names, scores, strict=True)}
    return [graded[_name(rollout)] if rollout.error is None else ungraded(rollout.error) for rollout in rollouts]


def _name(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt_index, rollout.sample_index
