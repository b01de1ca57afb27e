"""Sends responses to the reward workers, and joins the scores to them."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.rewards import attach_scores, generated, grading_items
from rlinf_lite.types import GradingItem, Group, Prompt, Response, Score

ResponseKey = tuple[int, int]
"""Index of the prompt, and of the response within its group."""
GradingQueue = WorkQueue[Sequence[ResponseKey], Sequence[GradingItem], list[Score]]


def submit(grading: GradingQueue, groups: Sequence[Group], items_per_call: int) -> None:
    """Hand responses to the graders, without waiting for scores. Those that could not be generated are skipped."""
    pairs = generated(groups)
    for part in (pairs[first : first + items_per_call] for first in range(0, len(pairs), items_per_call)):
        grading.add([_key(*pair) for pair in part], grading_items(part))


def graded(grading: GradingQueue, groups: Sequence[Group]) -> list[Group]:
    """Wait for all scores; return ``groups`` with a score for every response."""
    scores = {key: score for keys, found in grading.results() for key, score in zip(keys, found, strict=True)}
    return attach_scores(groups, (scores[_key(*pair)] for pair in generated(groups)))


def _key(prompt: Prompt, response: Response) -> ResponseKey:
    return prompt.prompt_index, response.sample_index
