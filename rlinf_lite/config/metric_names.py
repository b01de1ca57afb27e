"""Names of the metrics of a step that say something about the model, and the settings that some of them need.

Each of ``reward.functions`` has one more, ``reward/NAME``.

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
_LOSS_TYPES = {
    "policy/clip_fraction": ("actor", "actor_critic", "gspo", "gmpo", "cispo"),
    "policy/dual_clip_fraction": ("actor", "actor_critic", "gspo"),
    "policy/gate_slope": ("sapo",),
}
"""Which values of ``algorithm.loss_type`` have the metric."""
_CRITIC = (
    "loss/value",
    "value/mean",
    "value/clip_fraction",
    "value/explained_variance",
    "critic/lr",
    "critic/grad_norm",
    "critic/skipped",
)
_SAMPLING = ("sampling/groups", "sampling/dropped_groups")
_VALIDATION = (
    "val/accuracy",
    *(f"val/{name}" for name in _ROLLOUT if name != "reward/accuracy"),  # that one is val/accuracy
)

METRIC_NAMES = (
    *_ROLLOUT,
    *_UPDATE,
    *_KL,
    "policy/gate_slope",
    "policy/entropy",
    "policy/rollout_logprob_gap",
    "policy/importance_weight",
    "reward/overlong_penalty",
    "advantage/kl_in_reward",
    *_CRITIC,
    *_SAMPLING,
    *_VALIDATION,
)


def why_never(name: str, config: Config) -> str | None:
    """Why no step of this run logs the metric, with the remedy; None if steps may log it."""
    runner, algorithm, rollout = config.runner, config.algorithm, config.rollout
    of_functions = [f"{stream}reward/{item.name}" for item in config.reward.functions for stream in ("", "val/")]
    if name not in (known := [*METRIC_NAMES, *of_functions]):
        return f"no step has a metric of that name{nearest(name, known)}"
    if name.startswith("val/") and runner.val_check_interval <= 0:
        return "nothing is validated; set runner.val_check_interval, or take another metric"
    if name in _KL and (not algorithm.kl_beta or algorithm.kl_in_reward):
        if algorithm.kl_in_reward:
            return "with algorithm.kl_in_reward=true the loss has no KL term; take advantage/kl_in_reward"
        return "there is no KL term with algorithm.kl_beta=0; raise it, or take another metric"
    if name in _LOSS_TYPES and algorithm.path is None and algorithm.loss_type not in _LOSS_TYPES[name]:
        return f"algorithm.loss_type={algorithm.loss_type} has no such metric; take another one"
    if name == "advantage/kl_in_reward" and not algorithm.kl_in_reward:
        return "there is no KL in the reward; set algorithm.kl_in_reward=true, or take another metric"
    if name == "policy/importance_weight" and not algorithm.importance_sampling_fix:
        return "nothing is weighted; set algorithm.importance_sampling_fix=true, or take another metric"
    if name == "reward/overlong_penalty" and not algorithm.overlong_buffer:
        return "there is no such penalty; set algorithm.overlong_buffer, or take another metric"
    if name in _CRITIC and algorithm.adv_type != "gae" and algorithm.path is None:
        return f"algorithm.adv_type={algorithm.adv_type} has no critic; set it to gae, or take another metric"
    if name in _SAMPLING and not algorithm.dynamic_sampling:
        return "no group is dropped; set algorithm.dynamic_sampling=true, or take another metric"
    if name == "policy/entropy" and not (algorithm.calculate_entropy or algorithm.entropy_bonus):
        return "it is not computed; set algorithm.calculate_entropy=true, or take another metric"
    if name == "policy/rollout_logprob_gap" and not rollout.return_logprobs:
        return "the engine reports no log-probs; set rollout.return_logprobs=true, or take another metric"
    return None
