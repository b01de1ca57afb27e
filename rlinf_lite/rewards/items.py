"""From rollouts to what a grader sees."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import GradingItem, Prompt, Rollout


def items(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[GradingItem]:
    """One a rollout, in their order; each rollout answers one of ``prompts``."""
    problems = {prompt.position: prompt.problem for prompt in prompts}
    return [
        GradingItem(
            prompt=problems[rollout.position].prompt,
            response=rollout.text,
            answer=problems[rollout.position].answer,
            finished=rollout.finished,
            metadata=problems[rollout.position].metadata,
        )
        for rollout in rollouts
    ]
