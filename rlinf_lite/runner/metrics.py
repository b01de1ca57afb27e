"""Metrics of a step. Sums are taken in canonical order, so they do not depend on the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlinf_lite.types import Rollout, Score

if TYPE_CHECKING:
    from rlinf_lite.training.trainer import UpdateReport

Metrics = dict[str, float | int]


def rollout_metrics(rollouts: Sequence[Rollout], scores: Sequence[Score], prefix: str = "") -> Metrics:
    """Summarize rewards of graded responses and lengths of generated ones; a key without any response is left out."""
    rewards = _rewards([score for score in scores if score.graded])
    counts: Metrics = {
        "reward/verifier_errors": sum(score.error is not None for score in scores),
        "reward/ungraded": sum(not score.graded for score in scores),
    }
    lengths = _lengths([rollout for rollout in rollouts if rollout.error is None])
    return {f"{prefix}{key}": value for key, value in (rewards | counts | lengths).items()}


def _rewards(graded: Sequence[Score]) -> Metrics:
    if not graded:
        return {}
    rewards = np.array([score.reward for score in graded], dtype=np.float64)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/accuracy": float(np.mean([score.correct for score in graded])),
    }


def _lengths(generated: Sequence[Rollout]) -> Metrics:
    if not generated:
        return {}
    lengths = np.array([len(rollout.response_ids) for rollout in generated], dtype=np.float64)
    return {
        "length/response_mean": float(lengths.mean()),
        "length/response_max": int(lengths.max()),
        "length/prompt_mean": float(np.mean([len(rollout.prompt_ids) for rollout in generated])),
        "length/cut_fraction": float(np.mean([not rollout.finished for rollout in generated])),
    }


def validation_metrics(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> Metrics:
    """Summarize a validation, as `rollout_metrics`.

    A response that could not be graded counts as wrong in ``val/accuracy``: a failing grader must not make a model look
    better.
    """
    metrics = rollout_metrics(rollouts, scores, prefix="val/")
    metrics.pop("val/reward/accuracy", None)
    return metrics | {"val/accuracy": float(np.mean([score.correct for score in scores]))}


def update_metrics(reports: Sequence[Sequence[UpdateReport]]) -> Metrics:
    """Average losses and policy statistics over the mini-batches of a step that have loss tokens.

    Args:
        reports: for each mini-batch, every rank's report.
    """
    per_minibatch = [_minibatch(ranks) for ranks in reports if any(report.sums for report in ranks)]
    metrics: Metrics = {}
    if per_minibatch:
        metrics = {key: float(np.mean([values[key] for values in per_minibatch])) for key in per_minibatch[0]}
    if (gap := "policy/rollout_logprob_gap") in metrics:
        metrics[gap] = per_minibatch[0][gap]  # later ones may be compared with weights that the engine never had
    metrics["optim/lr"] = reports[-1][0].lr
    norms = [ranks[0].grad_norm for ranks in reports if not ranks[0].skipped]
    if norms:
        metrics["optim/grad_norm"] = float(np.mean(norms))
    metrics["optim/skipped"] = sum(ranks[0].skipped for ranks in reports)
    return metrics


_MEANS = {
    "ratio": "policy/ratio",
    "clipped": "policy/clip_fraction",
    "dual_clipped": "policy/dual_clip_fraction",
    "update_kl": "policy/update_kl",
    "ref_kl": "policy/kl",
    "entropy": "policy/entropy",
    "rollout_gap": "policy/rollout_logprob_gap",
}
_SHARES = {"loss": "loss/total", "policy_loss": "loss/policy", "kl_loss": "loss/kl"}


def _minibatch(ranks: Sequence[UpdateReport]) -> dict[str, float]:
    by_index = {index: sums for report in ranks for index, sums in report.sums.items()}
    in_order = [by_index[index] for index in sorted(by_index)]
    totals = {key: sum(sums[key] for sums in in_order) for key in in_order[0]}
    tokens = max(totals["tokens"], 1.0)
    means = {name: totals[key] / tokens for key, name in _MEANS.items() if key in totals}
    shares = {name: totals[key] for key, name in _SHARES.items() if key in totals}
    return means | shares | _kl_grad_fraction(totals)


def _kl_grad_fraction(totals: Mapping[str, float]) -> dict[str, float]:
    """How much of the gradient is the KL term's, as far as the log-probs of the loss tokens tell: its norm there, as a
    fraction of its norm plus the policy loss's. (What each log-prob does to the parameters would take a second backward
    pass.)
    """
    if "kl_grad_square" not in totals:
        return {}
    kl, policy = math.sqrt(totals["kl_grad_square"]), math.sqrt(totals["policy_grad_square"])
    return {"loss/kl_grad_fraction": kl / (kl + policy) if kl + policy else 0.0}
