"""Metrics of a step. Sums are taken in canonical order, so they do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlinf_lite.algorithms import combine
from rlinf_lite.rewards import generated
from rlinf_lite.types import Group, Prompt, Response, Score

if TYPE_CHECKING:
    from rlinf_lite.training.update import UpdateReport

Metrics = dict[str, float | int]
GAP = "policy/rollout_logprob_gap"


def rollout_metrics(groups: Sequence[Group], prefix: str = "") -> Metrics:
    """Summarize rewards of graded responses and lengths of generated ones; a key without any response is left out."""
    scores = scores_of(groups)
    counts: Metrics = {
        "reward/verifier_errors": sum(score.error is not None for score in scores),
        "reward/ungraded": sum(not score.graded for score in scores),
    }
    metrics = _rewards([score for score in scores if score.graded]) | counts | _lengths(generated(groups))
    return {f"{prefix}{key}": value for key, value in metrics.items()}


def scores_of(groups: Sequence[Group]) -> list[Score]:
    """The score of each response, in order; all must be graded."""
    scores = [response.score for group in groups for response in group.responses]
    return [score for score in scores if score is not None]


def _rewards(graded: Sequence[Score]) -> Metrics:
    if not graded:
        return {}
    rewards = np.array([score.reward for score in graded], dtype=np.float64)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/accuracy": float(np.mean([score.correct for score in graded])),
        **{f"reward/{name}": float(np.mean([score.parts[name] for score in graded])) for name in graded[0].parts},
    }


def _lengths(pairs: Sequence[tuple[Prompt, Response]]) -> Metrics:
    if not pairs:
        return {}
    lengths = np.array([len(response.token_ids) for _, response in pairs], dtype=np.float64)
    return {
        "length/response_mean": float(lengths.mean()),
        "length/response_max": int(lengths.max()),
        "length/prompt_mean": float(np.mean([len(prompt.problem.prompt_ids) for prompt, _ in pairs])),
        "length/cut_fraction": float(np.mean([not response.finished for _, response in pairs])),
    }


def sampling_metrics(num_candidates: int, num_dropped: int) -> Metrics:
    """Summarize the refilling of groups that were not admitted, of a step that may refill them."""
    return {"sampling/groups": num_candidates, "sampling/dropped_groups": num_dropped}


def validation_metrics(groups: Sequence[Group]) -> Metrics:
    """Summarize a validation, as `rollout_metrics`.

    A response that could not be graded counts as wrong in ``val/accuracy``: a failing grader must not make a model look
    better.
    """
    metrics = rollout_metrics(groups, prefix="val/")
    metrics.pop("val/reward/accuracy", None)
    return metrics | {"val/accuracy": float(np.mean([score.correct for score in scores_of(groups)]))}


def update_metrics(reports: Sequence[Sequence[UpdateReport]], prefix: str = "optim") -> Metrics:
    """Average a model's losses and statistics over the mini-batches of a step that have loss tokens.

    Args:
        reports: for each mini-batch, every rank's report; empty if the model was not trained.
        prefix: of the optimizer's metrics: ``"optim"`` for the policy.
    """
    if not reports:
        return {}
    per_minibatch = [_minibatch(ranks) for ranks in reports if any(report.units for report in ranks)]
    metrics: Metrics = {}
    if per_minibatch:
        metrics = {key: float(np.mean([values[key] for values in per_minibatch])) for key in per_minibatch[0]}
    if GAP in metrics:
        metrics[GAP] = per_minibatch[0][GAP]  # later ones are compared with weights that the engine never had
    metrics[f"{prefix}/lr"] = reports[-1][0].lr
    norms = [ranks[0].grad_norm for ranks in reports if not ranks[0].skipped]
    if norms:
        metrics[f"{prefix}/grad_norm"] = float(np.mean(norms))
    metrics[f"{prefix}/skipped"] = sum(ranks[0].skipped for ranks in reports)
    return metrics


def mfu(reports: Sequence[Sequence[UpdateReport]], seconds: float) -> Metrics:
    """Model FLOPs utilization of the policy's updates, which took ``seconds`` in all; nothing if it is not known."""
    flops = sum(report.flops for ranks in reports for report in ranks)
    peak = max((sum(report.peak_flops for report in ranks) for ranks in reports), default=0.0)
    return {"throughput/mfu": flops / (peak * seconds)} if flops and peak else {}


def actor_memory(*reports: Sequence[Sequence[UpdateReport]]) -> Metrics:
    """Peak memory of the largest rank of all models that were trained, from their reports as `update_metrics` takes."""
    return {"memory/actor_gb": max(report.memory_gb for model in reports for ranks in model for report in ranks)}


def _minibatch(ranks: Sequence[UpdateReport]) -> dict[str, float]:
    by_index = {index: unit for report in ranks for index, unit in report.units.items()}
    units = [by_index[index] for index in sorted(by_index)]
    shares = {name: sum(unit.shares[name] for unit in units) for name in units[0].shares}
    means = {name: sum(unit.token_sums[name] for unit in units) / ranks[0].num_tokens for name in units[0].token_sums}
    return means | combine(shares)
