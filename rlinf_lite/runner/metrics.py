"""From what a step produced to its flat metrics. Sums are taken in canonical order, so they do not depend on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlinf_lite.types import Rollout, Score

if TYPE_CHECKING:
    from rlinf_lite.training.trainer import UpdateReport

Metrics = dict[str, float | int]


def rollout_metrics(rollouts: Sequence[Rollout], scores: Sequence[Score], prefix: str = "") -> Metrics:
    """Rewards and lengths of one batch of responses."""
    rewards = np.array([score.reward for score in scores], dtype=np.float64)
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts], dtype=np.float64)
    return {
        f"{prefix}reward/mean": float(rewards.mean()),
        f"{prefix}reward/std": float(rewards.std()),
        f"{prefix}reward/accuracy": float(np.mean([score.correct for score in scores])),
        f"{prefix}reward/verifier_errors": sum(score.error is not None for score in scores),
        f"{prefix}length/response_mean": float(lengths.mean()),
        f"{prefix}length/response_max": int(lengths.max()),
        f"{prefix}length/prompt_mean": float(np.mean([len(rollout.prompt_ids) for rollout in rollouts])),
        f"{prefix}length/cut_fraction": float(np.mean([not rollout.finished for rollout in rollouts])),
    }


def update_metrics(reports: Sequence[Sequence[UpdateReport]]) -> Metrics:
    """Losses and policy statistics of a step.

    Args:
        reports: for each mini-batch, every rank's report.
    """
    per_minibatch = [_minibatch(ranks) for ranks in reports]
    metrics: Metrics = {key: float(np.mean([values[key] for values in per_minibatch])) for key in per_minibatch[0]}
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
    return means | {name: totals[key] for key, name in _SHARES.items() if key in totals}
