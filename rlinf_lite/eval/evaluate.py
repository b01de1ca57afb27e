"""The evaluation: the chunks of a run's own validation, one after another, and what comes of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rlinf_lite.config import Config, RewardConfig
from rlinf_lite.eval.estimators import Vote, ladder, maj_at_k, pass_at_k
from rlinf_lite.eval.log import MemoryLog, Row
from rlinf_lite.rewards import Grader, items, ungraded
from rlinf_lite.rewards.extraction import final_answer
from rlinf_lite.rollout.batches import cut, join
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.types import GenerationBatch, Problem, Prompt, Rollout, Sampling, Score


def cut_problems(config: Config, problems: Sequence[Problem], *, step: int, num_samples: int) -> list[GenerationBatch]:
    """The chunks that the training cuts its validation after ``step`` into; with one sample, to the bit."""
    prompts = [Prompt(position=p.problem_id, epoch=0, problem=p) for p in problems]
    size = config.data.val_rollout_batch_size or config.data.rollout_batch_size
    sampling = Sampling(**vars(config.algorithm.val_sampling_params))
    return [
        chunk
        for first in range(0, len(prompts), size)
        for chunk in cut(
            prompts[first : first + size],
            stream="val",
            step=step,
            group_size=num_samples,
            sampling=sampling,
            seed=config.actor.seed,
            max_rows=config.rollout.max_running_requests,
        )
    ]


def evaluate(
    chunks: Sequence[GenerationBatch],
    engine: RolloutEngine,
    grader: Grader,
    log: MemoryLog,
    *,
    answer_of: Callable[[str], str],
    progress: Callable[[Sequence[Row]], None],
) -> None:
    """Answer the chunks that ``log`` does not hold yet.

    Args:
        answer_of: the final answer that a response states.
        progress: told the rows of each chunk.
    """
    num_done = 0
    for chunk in chunks:
        num_done += len(chunk.prompts)
        if num_done <= len(log.rows):
            continue
        rollouts = join([engine.generate(chunk)])
        rows = _rows(chunk, rollouts, _scores(grader, chunk.prompts, rollouts), answer_of)
        log.append(rows)
        progress(rows)


def _scores(grader: Grader, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Score]:
    """One a rollout, in their order; what could not be generated is not given to the grader."""
    scores = iter(grader.score(items(prompts, [rollout for rollout in rollouts if rollout.error is None])))
    return [next(scores) if rollout.error is None else ungraded(rollout.error) for rollout in rollouts]


def answer_reader(reward: RewardConfig) -> Callable[[str], str]:
    """Where this reward looks for the answer in a response: for majorities, and for the reader of the rows."""
    if reward.reward_type == "exact":
        return str.strip
    if reward.reward_type == "math":
        return partial(final_answer, answer_format=reward.answer_format)
    return lambda response: final_answer(response) or response.strip()


def _rows(
    chunk: GenerationBatch, rollouts: Sequence[Rollout], scores: Sequence[Score], answer_of: Callable[[str], str]
) -> list[Row]:
    """One a problem."""
    responses = [_response(rollout, score, answer_of) for rollout, score in zip(rollouts, scores, strict=True)]
    return [
        {
            "problem_id": prompt.problem.problem_id,
            "source": prompt.problem.source,
            "prompt": prompt.problem.prompt,
            "reference": prompt.problem.answer,
            "num_prompt_tokens": len(prompt.problem.prompt_ids),
            "responses": responses[index * chunk.group_size : (index + 1) * chunk.group_size],
        }
        for index, prompt in enumerate(chunk.prompts)
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


def results(rows: Sequence[Row]) -> dict[str, Any]:
    """What all rows come to. ``accuracy`` is the mean over all responses, in which those that could not be graded
    count as wrong; ``reward_mean`` is over graded ones, None if there are none.
    """
    responses = [response for row in rows for response in row["responses"]]
    rewards = [response["reward"] for response in responses if response["reward"] is not None]
    num_samples = len(rows[0]["responses"])
    found: dict[str, Any] = {
        "num_problems": len(rows),
        "num_samples": num_samples,
        "accuracy": float(np.mean([response["correct"] for response in responses])),
        "accuracy_stderr": _standard_error(rows),
        "reward_mean": float(np.mean(rewards)) if rewards else None,
        "response_tokens_mean": float(np.mean([response["num_tokens"] for response in responses])),
        "response_tokens_max": max(response["num_tokens"] for response in responses),
        "cut_fraction": float(np.mean([not response["finished"] for response in responses])),
        "verifier_errors": sum(response["error"] is not None for response in responses),
        "ungraded": len(responses) - len(rewards),
    }
    if num_samples > 1:
        found["pass@k"] = {str(k): statistics.fmean(_passes(row, k) for row in rows) for k in ladder(num_samples)}
        found["maj@k"] = {str(k): statistics.fmean(_majorities(row, k) for row in rows) for k in ladder(num_samples)}
    return found


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Of the accuracy, as problems are drawn: responses to one problem are no independent draws."""
    means = [statistics.fmean(response["correct"] for response in row["responses"]) for row in rows]
    return statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def _passes(row: Row, k: int) -> float:
    correct = [response["correct"] for response in row["responses"]]
    return pass_at_k(len(correct), sum(correct), k)


def _majorities(row: Row, k: int) -> float:
    votes = [Vote(answer=response["answer"], correct=response["correct"]) for response in row["responses"]]
    return maj_at_k(votes, k)
