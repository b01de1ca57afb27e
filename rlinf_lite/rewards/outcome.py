"""What goes into a grader and comes out: grading items of responses, and scores of responses that were not graded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from rlinf_lite.columns import objects_of, replaced
from rlinf_lite.errors import ConfigError
from rlinf_lite.types import GradingItem, Group, Prompt, Response, Score


class RewardError(ConfigError):
    """Too many responses could not be graded."""


def grading_items(pairs: Sequence[tuple[Prompt, Response]]) -> list[GradingItem]:
    """What a grader sees of each response."""
    problems = [prompt.problem for prompt, _ in pairs]
    columns: dict[str, list[Any]] = {
        "prompt": [problem.prompt for problem in problems],
        "response": [response.text for _, response in pairs],
        "answer": [problem.answer for problem in problems],
        "finished": [response.finished for _, response in pairs],
        "metadata": [problem.metadata for problem in problems],
    }
    return objects_of(GradingItem, columns, len(pairs))


def generated(groups: Iterable[Group]) -> list[tuple[Prompt, Response]]:
    """The responses that a grader can be asked about, in order: those that were generated, each with its prompt."""
    return [(group.prompt, response) for group in groups for response in group.responses if response.error is None]


def attach_scores(groups: Sequence[Group], scores: Iterable[Score]) -> list[Group]:
    """Return ``groups`` with a score for every response.

    Args:
        scores: of the `generated` responses, in order.
    """
    given = iter(scores)
    responses = [response for group in groups for response in group.responses]
    of_responses = [next(given) if r.error is None else ungraded(r.error) for r in responses]
    scored = iter(replaced(responses, score=of_responses))
    return [replace(group, responses=tuple(islice(scored, len(group.responses)))) for group in groups]


def ungraded(reason: str) -> Score:
    """The score of a response that could not be graded. Keeps the first 500 characters of ``reason``."""
    return Score(reward=0.0, correct=False, error=reason[:500], graded=False)


def refuse_too_many_ungraded(scores: Sequence[Score], max_fraction: float, what: str) -> None:
    """Stop the run if too few responses could be graded.

    Args:
        max_fraction: ``reward.max_failed_fraction``.
        what: where the responses come from, for the message: ``"step 12"``.

    Raises:
        RewardError: more than ``max_fraction`` of the responses could not be graded.
    """
    errors = [score.error for score in scores if not score.graded]
    if errors and len(errors) / len(scores) > max_fraction:
        raise RewardError(
            f"reward: {len(errors)} of {len(scores)} responses of {what} could not be graded, more than "
            f"reward.max_failed_fraction={max_fraction:g}; the first error: {errors[0]}\n"
            "fix the cause or raise reward.max_failed_fraction, then start again with runner.resume_dir=auto (and, if "
            "the source of the reward changes, \"runner.resume_allow_changes=['reward (source)']\")"
        )
