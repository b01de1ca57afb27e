"""What goes into a grader and comes out: grading items of rollouts, and scores of responses that were not graded."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.errors import ConfigError
from rlinf_lite.types import GradingItem, Prompt, Rollout, Score


class RewardError(ConfigError):
    """Too many responses could not be graded."""


def grading_items(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[GradingItem]:
    """One item per rollout, in order. Each rollout must answer one of ``prompts``."""
    problems = {prompt.prompt_index: prompt.problem for prompt in prompts}
    return [
        GradingItem(
            prompt=problems[rollout.prompt_index].prompt,
            response=rollout.text,
            answer=problems[rollout.prompt_index].answer,
            finished=rollout.finished,
            metadata=problems[rollout.prompt_index].metadata,
        )
        for rollout in rollouts
    ]


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
