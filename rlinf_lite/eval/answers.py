"""Generates and grades the responses of an evaluation, batch by batch; one row per problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlinf_lite.config import RewardConfig
from rlinf_lite.eval.log import MemoryLog, Row
from rlinf_lite.rewards import Grader, attach_scores, generated, grading_items
from rlinf_lite.rewards.extraction import final_answer
from rlinf_lite.rollout.batches import join
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationBatch, Group, Response


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
        groups = join([engine.generate(batch)])
        scores = grader.score(grading_items(generated(groups)))
        rows = [_row(group, answer_of) for group in attach_scores(groups, scores)]
        log.append(rows)
        progress(rows)


def answer_reader(reward: RewardConfig) -> Callable[[str], str]:
    """The function that finds the final answer in a response, for majority votes and for the rows."""
    first = next(iter(reward.by_key().values()))  # it decides which responses are correct
    if first.reward_type == "exact":
        return str.strip
    if first.reward_type == "math":
        return partial(final_answer, answer_format=first.answer_format)
    return lambda response: final_answer(response) or response.strip()


def _row(group: Group, answer_of: Callable[[str], str]) -> Row:
    problem = group.prompt.problem
    return {
        "problem_id": problem.problem_id,
        "source": problem.source,
        "prompt": problem.prompt,
        "reference": problem.answer,
        "num_prompt_tokens": len(problem.prompt_ids),
        "responses": [_response(response, answer_of) for response in group.responses],
    }


def _response(response: Response, answer_of: Callable[[str], str]) -> dict[str, Any]:
    score = response.score
    assert score is not None
    return {
        "text": response.text,
        "answer": answer_of(response.text),
        "correct": score.correct,
        "reward": score.reward if score.graded else None,
        **{f"reward/{name}": value for name, value in score.parts.items()},
        "finished": response.finished,
        "num_tokens": len(response.token_ids),
        "error": score.error,
    }
