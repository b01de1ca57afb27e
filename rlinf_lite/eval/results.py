"""Computes the results of an evaluation from its rows: accuracy, pass@k, maj@k and response lengths."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlinf_lite.eval.estimators import Vote, maj_at_k, pass_at_k, reported_ks
from rlinf_lite.eval.log import Row


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The results as JSON values.

    ``accuracy`` is the mean over all responses; those that could not be graded count as wrong. ``reward_mean`` is the
    mean over graded responses, None if there are none, and ``reward/NAME`` that of the scores of one of
    ``reward.functions``.
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
        **_function_means(responses),
        "response_tokens_mean": float(np.mean([response["num_tokens"] for response in responses])),
        "response_tokens_max": max(response["num_tokens"] for response in responses),
        "cut_fraction": float(np.mean([not response["finished"] for response in responses])),
        "verifier_errors": sum(response["error"] is not None for response in responses),
        "ungraded": len(responses) - len(rewards),
    }
    if num_samples > 1:
        ks = reported_ks(num_samples)
        found["pass@k"] = {str(k): statistics.fmean(_pass_at_k(row, k) for row in rows) for k in ks}
        found["maj@k"] = {str(k): statistics.fmean(_maj_at_k(row, k) for row in rows) for k in ks}
    return found


def _function_means(responses: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(key for response in responses for key in response if key.startswith("reward/"))
    return {name: float(np.mean([each[name] for each in responses if name in each])) for name in names}


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Standard error of the accuracy over problems, because responses to the same problem are not independent."""
    means = [statistics.fmean(response["correct"] for response in row["responses"]) for row in rows]
    return statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def _pass_at_k(row: Row, k: int) -> float:
    correct = [response["correct"] for response in row["responses"]]
    return pass_at_k(len(correct), sum(correct), k)


def _maj_at_k(row: Row, k: int) -> float:
    votes = [Vote(answer=response["answer"], correct=response["correct"]) for response in row["responses"]]
    return maj_at_k(votes, k)
