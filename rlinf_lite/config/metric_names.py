"""Names of the metrics of a step that say something about the model, and the settings that some of them need.

A test compares the names with what the runner logs.
"""

from __future__ import annotations

from rlinf_lite.config.schema import Config
from rlinf_lite.config.suggestions import nearest

MACHINE_METRICS = ("time/", "throughput/", "memory/", "save/")
"""How the names of metrics of the machine begin. A resumed run does not repeat their values."""

_ROLLOUT = (
    "reward/mean",
    "reward/std",
    "reward/accuracy",
    "reward/verifier_errors",
    "reward/ungraded",
    "length/response_mean",
    "length/response_max",
    "length/prompt_mean",
    "length/cut_fraction",
)
_UPDATE = (
    "loss/total",
    "loss/policy",
    "policy/ratio",
    "policy/clip_fraction",
    "policy/dual_clip_fraction",
    "policy/update_kl",
    "optim/lr",
    "optim/grad_norm",
    "optim/skipped",
    "progress/epoch",
    "progress/samples",
    "progress/tokens",
    "progress/step_tokens",
)
_KL = ("loss/kl", "loss/kl_grad_fraction", "policy/kl")
_VALIDATION = (
    "val/accuracy",
    *(f"val/{name}" for name in _ROLLOUT if name != "reward/accuracy"),  # that one is val/accuracy
)

METRIC_NAMES = (
    *_ROLLOUT,
    *_UPDATE,
    *_KL,
    "policy/entropy",
    "policy/rollout_logprob_gap",
    *_VALIDATION,
)


def why_never(name: str, config: Config) -> str | None:
    """Why no step of this run logs the metric, with the remedy; None if steps may log it."""
    algorithm = config.algorithm
    if name not in METRIC_NAMES:
        return f"no step has a metric of that name{nearest(name, list(METRIC_NAMES))}"
    if name in _VALIDATION and config.runner.val_check_interval <= 0:
        return "nothing is validated; set runner.val_check_interval, or take another metric"
    if name in _KL and not algorithm.kl_beta:
        return "there is no KL term with algorithm.kl_beta=0; raise it, or take another metric"
    if name == "policy/entropy" and not (algorithm.calculate_entropy or algorithm.entropy_bonus):
        return "it is not computed; set algorithm.calculate_entropy=true, or take another metric"
    if name == "policy/rollout_logprob_gap" and not config.rollout.return_logprobs:
        return "the engine reports no log-probs; set rollout.return_logprobs=true, or take another metric"
    return None
