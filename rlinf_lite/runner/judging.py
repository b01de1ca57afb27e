"""Between rollouts and their scores: what the judges are given, and in which order it comes back."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.cluster.work import Work
from rlinf_lite.rewards import attempts, refuse_if_none_judged
from rlinf_lite.types import Prompt, Rollout, Score

_AT_ONCE = 64


def judge(judging: Work, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
    """Hand responses to the prompts to the judges; does not wait."""
    for part in (rollouts[first : first + _AT_ONCE] for first in range(0, len(rollouts), _AT_ONCE)):
        judging.add([_name(rollout) for rollout in part], attempts(prompts, part))


def in_order(judging: Work, rollouts: Sequence[Rollout]) -> list[Score]:
    """One score a rollout, in their order, when all are there.

    Raises:
        RewardError: not one of them could be judged.
    """
    judged = {name: score for names, scores in judging for name, score in zip(names, scores, strict=True)}
    scores = [judged[_name(rollout)] for rollout in rollouts]
    refuse_if_none_judged(scores)
    return scores


def _name(rollout: Rollout) -> tuple[int, int]:
    return rollout.position, rollout.sample_index
