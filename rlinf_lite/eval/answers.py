"""Generates and grades the responses of an evaluation, batch by batch; one row per problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlinf_lite.config import RewardConfig
from rlinf_lite.eval.log import MemoryLog, Row
from rlinf_lite.rewards import Grader, grading_items, ungraded
from rlinf_lite.rewards.extraction import final_answer
from rlinf_lite.rollout.batches import join
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationBatch, Prompt, Rollout, Score


def answer_batches(
    batches: Sequence[GenerationBatch],
    engine: RolloutEngine,
    grader: Grader,
    log: MemoryLog,
    *,
    answer_of: Callable[[str], str],
    progress: Callable[[Sequence[Row]], None],
) -> None:
    """Generate and grade the batches that ``log`` does not hold yet, and append their rows to it.

    Args:
        answer_of: returns the final answer that a response states.
        progress: called with the rows of each batch.
    """
    num_done = 0
    for batch in batches:
        num_done += len(batch.prompts)
        if num_done <= len(log.rows):
            continue
        rollouts = join([engine.generate(batch)])
        rows = _rows(batch, rollouts, _scores(grader, batch.prompts, rollouts), answer_of)
        log.append(rows)
        progress(rows)


def _scores(grader: Grader, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Score]:
    """One score per rollout, in order. The grader does not see responses that could not be generated."""
    generated = [rollout for rollout in rollouts if rollout.error is None]
    scores = iter(grader.score(grading_items(prompts, generated)))
    return [next(scores) if rollout.error is None else ungraded(rollout.error) for rollout in rollouts]


def answer_reader(reward: RewardConfig) -> Callable[[str], str]:
    """The function that finds the final answer in a response, for majority votes and for the rows."""
    if reward.reward_type == "exact":
        return str.strip
    if reward.reward_type == "math":
        return partial(final_answer, answer_format=reward.answer_format)
    return lambda response: final_answer(response) or response.strip()


def _rows(
    batch: GenerationBatch, rollouts: Sequence[Rollout], scores: Sequence[Score], answer_of: Callable[[str], str]
) -> list[Row]:
    """One row per problem."""
    responses = [_response(rollout, score, answer_of) for rollout, score in zip(rollouts, scores, strict=True)]
    return [
        {
            "problem_id": prompt.problem.problem_id,
            "source": prompt.problem.source,
            "prompt": prompt.problem.prompt,
            "reference": prompt.problem.answer,
            "num_prompt_tokens": len(prompt.problem.prompt_ids),
            "responses": responses[index * batch.group_size : (index + 1) * batch.group_size],
        }
        for index, prompt in enumerate(batch.prompts)
    ]


def _response(rollout: Rollout, score: Score, answer_of: Callable[[str], str]) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "answer": answer_of(rollout.text),
        "correct": score.correct,
        "reward": score.reward if score.graded else None,
        "finished": rollout.finished,
        "num_tokens": len(rollout.response_ids),
        "error": score.error,
    }
