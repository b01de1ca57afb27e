"""Sends rollouts to the reward workers and returns their scores in order."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.rewards import grading_items, ungraded
from rlinf_lite.types import GradingItem, Prompt, Rollout, Score

_ITEMS_PER_CALL = 64

ResponseKey = tuple[int, int]
"""Index of the prompt, and of the response within its group."""
GradingQueue = WorkQueue[Sequence[ResponseKey], Sequence[GradingItem], list[Score]]


def submit(grading: GradingQueue, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
    """Hand responses to the graders, without waiting for scores. Those that could not be generated are skipped."""
    generated = [rollout for rollout in rollouts if rollout.error is None]
    for part in (generated[first : first + _ITEMS_PER_CALL] for first in range(0, len(generated), _ITEMS_PER_CALL)):
        grading.add([_key(rollout) for rollout in part], grading_items(prompts, part))


def in_order(grading: GradingQueue, rollouts: Sequence[Rollout]) -> list[Score]:
    """Wait for all scores; return one per rollout, in order."""
    graded = {key: score for keys, scores in grading.results() for key, score in zip(keys, scores, strict=True)}
    return [graded[_key(rollout)] if rollout.error is None else ungraded(rollout.error) for rollout in rollouts]


def _key(rollout: Rollout) -> ResponseKey:
    return rollout.prompt_index, rollout.sample_index
