"""The range of each number in the config, by dotted key."""

from __future__ import annotations

import math

AT_LEAST: dict[str, float] = {
    "cluster.num_nodes": 1,
    "cluster.threads_per_worker": 1,
    "algorithm.group_size": 1,
    "algorithm.n_minibatches": 1,
    "algorithm.training_batch_size_per_gpu": 1,
    "algorithm.logprob_forward_micro_batch_size": 1,
    "algorithm.kl_beta": 0,
    "algorithm.entropy_bonus": 0,
    "algorithm.ratio_clip_eps": 0,
    "algorithm.sampling_params.max_new_tokens": 1,
    "algorithm.sampling_params.top_k": -1,
    "algorithm.val_sampling_params.top_k": -1,
    "algorithm.val_sampling_params.max_new_tokens": 1,
    "rollout.max_running_requests": 1,
    "rollout.tensor_parallel_size": 1,
    "rollout.kv_cache_gb": 0.001,
    "data.max_prompt_length": 1,
    "data.rollout_batch_size": 1,
    "data.num_workers": 0,
    "data.arithmetic.num_digits": 1,
    "data.arithmetic.num_problems": 1,
    "data.arithmetic.num_val_problems": 0,
    "actor.fsdp_config.grad_scaler.growth_interval": 1,
    "cluster.object_store_memory": 75 * 2**20,
    "runner.seq_length": 1,
    "algorithm.sampling_params.repetition_penalty": 0.01,
    "algorithm.val_sampling_params.repetition_penalty": 0.01,
    "data.seed": -(2**63),
    "data.reasoning_gym.seed": 0,
    "actor.seed": -(2**63),
    "data.val_rollout_batch_size": 1,
    "data.reasoning_gym.size": 1,
    "data.reasoning_gym.val_size": 0,
    "algorithm.clip_ratio_low": 0,
    "algorithm.clip_ratio_high": 0,
    "actor.optim.lr": 0,
    "actor.optim.min_lr": 0,
    "actor.optim.adam_beta1": 0,
    "actor.optim.adam_beta2": 0,
    "actor.optim.weight_decay": 0,
    "actor.optim.total_training_steps": 1,
    "reward.verifier_timeout": 0.1,
    "reward.max_failed_fraction": 0,
    "runner.logger.log_rollouts": -1,
    "cluster.start_timeout": 1,
    "actor.optim.clip_grad": 0,
    "actor.optim.lr_warmup_steps": 0,
    "runner.max_tokens_per_mbs": 1,
    "runner.checkpoint.staged_fraction": 0,
    "runner.checkpoint.timeout": 1,
    "runner.checkpoint.keep_last": 1,
    "runner.checkpoint.keep_every": 1,
    "runner.checkpoint.keep_best.n": 1,
    "runner.max_restarts": 0,
    "runner.restart_window": 1,
    "runner.hang_timeout": 0,
    "runner.preemption_grace": 0,
    "cluster.warm_spares": 0,
    "cluster.min_actor_ranks": 1,
    "cluster.elastic_timeout": 0,
}

ABOVE: dict[str, float] = {
    "algorithm.importance_sampling_clip": 0,
    "algorithm.clip_ratio_c": 1,
    "algorithm.sampling_params.top_p": 0,
    "algorithm.val_sampling_params.top_p": 0,
    "actor.optim.adam_eps": 0,
    "actor.fsdp_config.grad_scaler.init_scale": 0,
    "actor.fsdp_config.grad_scaler.growth_factor": 1,
    "actor.fsdp_config.grad_scaler.backoff_factor": 0,
    "reward.reward_scale": 0,
    "rollout.gpu_memory_utilization": 0,
}

BELOW: dict[str, float] = {
    "actor.optim.adam_beta1": 1,
    "actor.optim.adam_beta2": 1,
    "actor.fsdp_config.grad_scaler.backoff_factor": 1,
}

AT_MOST: dict[str, float] = {
    "actor.optim.lr": 1,
    "actor.optim.min_lr": 1,
    "actor.optim.adam_eps": 1,
    "actor.fsdp_config.grad_scaler.init_scale": 2.0**32,
    "algorithm.clip_ratio_high": 10,
    "algorithm.clip_ratio_low": 1,
    "algorithm.ratio_clip_eps": 1,
    "algorithm.sampling_params.repetition_penalty": 100,
    "algorithm.sampling_params.top_p": 1,
    "algorithm.val_sampling_params.repetition_penalty": 100,
    "algorithm.val_sampling_params.top_p": 1,
    "actor.seed": 2**63 - 1,
    "data.seed": 2**63 - 1,
    "data.reasoning_gym.seed": 2**63 - 1,
    "reward.max_failed_fraction": 1,
    "reward.reward_scale": 1e6,
    "rollout.gpu_memory_utilization": 1,
    "rollout.kv_cache_gb": 1e5,
    "runner.checkpoint.staged_fraction": 1,
    "cluster.threads_per_worker": 1024,
    "cluster.object_store_memory": 2**50,
    "data.num_workers": 1024,
}
_MOST_SECONDS = 1e8
"""Three years. What waits cannot wait for ever: Python's own limit is about 9e9 s."""
DURATIONS = (
    "cluster.start_timeout",
    "cluster.elastic_timeout",
    "runner.checkpoint.timeout",
    "runner.hang_timeout",
    "runner.preemption_grace",
    "runner.restart_window",
    "runner.save_interval_minutes",
    "reward.verifier_timeout",
)
_MOST_COUNT = 2**31 - 1
"""Of any whole number without a limit of its own: what counts tokens, rows and steps is added up in 64 bits."""

# What turns a key off, beside its range: (key, value).
OFF: dict[str, float] = {
    "runner.save_interval": -1,
    "runner.val_check_interval": -1,
    "runner.max_steps": -1,
    "runner.max_epochs": -1,
    "runner.save_interval_minutes": -1,
}


def limit(key: str, value: object) -> str | None:
    """What a number must be, if it is not; None if it may stay."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if key in OFF:
        if value == OFF[key] or 0 < value <= (_MOST_SECONDS if key in DURATIONS else _MOST_COUNT):
            return None
        return f"positive, or {OFF[key]:g} for none"
    if key in AT_LEAST and value < AT_LEAST[key]:
        return f"at least {AT_LEAST[key]:.10g}"
    if key in ABOVE and value <= ABOVE[key]:
        return f"above {ABOVE[key]:g}"
    if key in BELOW and value >= BELOW[key]:
        return f"below {BELOW[key]:g}"
    most = AT_MOST.get(key, _MOST_SECONDS if key in DURATIONS else _MOST_COUNT if isinstance(value, int) else None)
    return f"at most {most:.10g}" if most is not None and value > most else None
