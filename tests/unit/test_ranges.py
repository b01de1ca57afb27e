"""Every number of the config has a range: what cannot work is refused, and what is unusual is noted."""

from __future__ import annotations

import math
import types as python_types
import typing

import pytest
from omegaconf import OmegaConf

from rlinf_lite.config import Config, ConfigError, build, flatten, keys
from rlinf_lite.config.compose import CONFIGS
from rlinf_lite.config.rules import check
from rlinf_lite.config.unusual import unusual_values

START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, "data": {"type": "arithmetic"}}
COUNT, SECONDS, SEED, ANY = 2**31 - 1, 1e8, 2**63 - 1, None
# key: (too small, smallest, largest, too large); None: no limit but that of finite numbers.
RANGES: dict[str, tuple] = {
    "cluster.num_nodes": (0, 1, COUNT, COUNT + 1),
    "cluster.threads_per_worker": (0, 1, 1024, 1025),
    "cluster.object_store_memory": (78643199, 78643200, 2**50, 2**50 + 1),
    "cluster.start_timeout": (0, 1, 10**8, 10**8 + 1),
    "cluster.warm_spares": (-1, 0, COUNT, COUNT + 1),
    "cluster.min_actor_ranks": (0, 1, COUNT, COUNT + 1),
    "cluster.elastic_timeout": (-0.1, 0.0, SECONDS, 1.1e8),
    "runner.logger.log_rollouts": (-2, -1, COUNT, COUNT + 1),
    "runner.checkpoint.staged_fraction": (-0.1, 0.0, 1.0, 1.1),
    "runner.checkpoint.timeout": (0.5, 1.0, SECONDS, 1.1e8),
    "runner.checkpoint.keep_last": (0, 1, COUNT, COUNT + 1),
    "runner.checkpoint.keep_every": (0, 1, COUNT, COUNT + 1),
    "runner.checkpoint.keep_best.n": (0, 1, COUNT, COUNT + 1),
    "runner.max_epochs": (0, 1, COUNT, COUNT + 1),
    "runner.max_steps": (-2, 1, COUNT, COUNT + 1),
    "runner.val_check_interval": (0, 1, COUNT, COUNT + 1),
    "runner.save_interval": (0, 1, COUNT, COUNT + 1),
    "runner.save_interval_minutes": (0.0, 0.1, SECONDS, 1.1e8),
    "runner.max_restarts": (-1, 0, COUNT, COUNT + 1),
    "runner.restart_window": (0.5, 1.0, SECONDS, 1.1e8),
    "runner.hang_timeout": (-1.0, 0.0, SECONDS, 1.1e8),
    "runner.preemption_grace": (-1.0, 0.0, SECONDS, 1.1e8),
    "runner.seq_length": (0, 1, COUNT, COUNT + 1),
    "runner.max_tokens_per_mbs": (0, 1, COUNT, COUNT + 1),
    "algorithm.group_size": (0, 1, COUNT, COUNT + 1),
    "algorithm.n_minibatches": (0, 1, COUNT, COUNT + 1),
    "algorithm.training_batch_size_per_gpu": (0, 1, COUNT, COUNT + 1),
    "algorithm.logprob_forward_micro_batch_size": (0, 1, COUNT, COUNT + 1),
    "algorithm.kl_beta": (-0.1, 0.0, 1e9, ANY),
    "algorithm.ratio_clip_eps": (-0.1, 0.0, 1.0, 1.1),
    "algorithm.clip_ratio_low": (-0.1, 0.0, 1.0, 1.1),
    "algorithm.clip_ratio_high": (-0.1, 0.0, 10.0, 20.0),
    "algorithm.clip_ratio_c": (1.0, 1.1, 1e9, ANY),
    "algorithm.entropy_bonus": (-0.001, 0.0, 1e9, ANY),
    "algorithm.sapo_temperature_pos": (0.0, 0.1, 1e9, ANY),
    "algorithm.sapo_temperature_neg": (0.0, 0.1, 1e9, ANY),
    "algorithm.gamma": (0.0, 0.1, 1.0, 1.1),
    "algorithm.gae_lambda": (-0.1, 0.0, 1.0, 1.1),
    "algorithm.value_clip": (0.0, 0.1, 1e9, ANY),
    "algorithm.critic_warmup_steps": (-1, 0, COUNT, COUNT + 1),
    "algorithm.overlong_buffer": (-1, 0, COUNT, COUNT + 1),
    "algorithm.overlong_penalty": (-0.1, 0.0, 1e9, ANY),
    "algorithm.max_sampling_rounds": (0, 1, COUNT, COUNT + 1),
    "algorithm.importance_sampling_clip": (0.0, 0.1, 1e9, ANY),
    "rollout.max_running_requests": (0, 1, COUNT, COUNT + 1),
    "rollout.gpu_memory_utilization": (0.0, 0.1, 1.0, 1.1),
    "rollout.kv_cache_gb": (0.0, 0.001, 1e5, 1.1e5),
    "rollout.tensor_parallel_size": (0, 1, COUNT, COUNT + 1),
    "data.arithmetic.num_digits": (0, 1, 9, 10),
    "data.arithmetic.num_problems": (0, 1, COUNT, COUNT + 1),
    "data.arithmetic.num_val_problems": (-1, 0, COUNT, COUNT + 1),
    "data.reasoning_gym.size": (0, 1, COUNT, COUNT + 1),
    "data.reasoning_gym.val_size": (-1, 0, COUNT, COUNT + 1),
    "data.reasoning_gym.seed": (-1, 0, SEED, SEED + 1),
    "data.max_prompt_length": (0, 1, COUNT, COUNT + 1),
    "data.rollout_batch_size": (0, 1, COUNT, COUNT + 1),
    "data.val_rollout_batch_size": (0, 1, COUNT, COUNT + 1),
    "data.num_workers": (-1, 0, 1024, 1025),
    "data.seed": (-SEED - 2, -SEED - 1, SEED, SEED + 1),
    "actor.seed": (-SEED - 2, -SEED - 1, SEED, SEED + 1),
    "actor.optim.lr": (-1e-9, 0.0, 1.0, 1.1),
    "actor.optim.min_lr": (-1e-9, 0.0, 1e-6, 1.1),
    "actor.optim.adam_beta1": (-0.1, 0.0, 0.999, 1.0),
    "actor.optim.adam_beta2": (-0.1, 0.0, 0.999, 1.0),
    "actor.optim.adam_eps": (0.0, 1e-15, 1.0, 1.1),
    "actor.optim.weight_decay": (-0.1, 0.0, 1e5, 1e6),  # lr * weight_decay: 1e-6 of 1
    "actor.optim.clip_grad": (-0.1, 0.0, 1e9, ANY),
    "actor.optim.lr_warmup_steps": (-1, 0, COUNT, COUNT + 1),
    "actor.optim.total_training_steps": (0, 1, COUNT, COUNT + 1),
    "actor.fsdp_config.virtual_ranks": (0, 1, COUNT, COUNT + 1),
    "actor.fsdp_config.grad_scaler.init_scale": (0.0, 1.0, 2.0**32, 2.0**33),
    "actor.fsdp_config.grad_scaler.growth_factor": (1.0, 1.1, 1e9, ANY),
    "actor.fsdp_config.grad_scaler.backoff_factor": (0.0, 0.1, 0.9, 1.0),
    "actor.fsdp_config.grad_scaler.growth_interval": (0, 1, COUNT, COUNT + 1),
    "actor.model.tensor_model_parallel_size": (0, 1, COUNT, COUNT + 1),
    "actor.megatron.tensor_model_parallel_size": (0, 1, COUNT, COUNT + 1),
    "actor.megatron.recompute_num_layers": (0, 1, COUNT, COUNT + 1),
    "actor.megatron.make_vocab_size_divisible_by": (0, 1, COUNT, COUNT + 1),
    "actor.megatron.loss_scale": (0.0, 1.0, 2.0**32, 2.0**33),
    "actor.megatron.loss_scale_window": (0, 1, COUNT, COUNT + 1),
    "reward.max_failed_fraction": (-0.1, 0.0, 1.0, 1.1),
    "reward.reward_scale": (0.0, 1e-6, 1e6, 1.1e6),
    "reward.verifier_timeout": (0.0, 0.1, SECONDS, 1.1e8),
} | {
    f"algorithm.{name}.{key}": limits
    for name in ("sampling_params", "val_sampling_params")
    for key, limits in {
        "temperature": (-0.1, 0.001, 100.0, 101.0),
        "top_k": (-2, -1, COUNT, COUNT + 1),
        "top_p": (0.0, 0.001, 1.0, 1.1),
        "min_p": (-0.1, 0.0, 1.0, 1.1),
        "repetition_penalty": (0.0, 0.01, 100.0, 101.0),
        "max_new_tokens": (0, 1, COUNT, COUNT + 1),
    }.items()
}
RANGES |= {
    key.replace("actor.", "critic.", 1): limits
    for key, limits in RANGES.items()
    if key.startswith(("actor.optim.", "actor.fsdp_config."))
}
RANGES["critic.optim.weight_decay"] = (-0.1, 0.0, 1e5, ANY)  # the limit with lr holds if there is a critic
NONE = ("runner.max_epochs", "runner.max_steps", "runner.val_check_interval", "runner.save_interval")


def with_values(values: dict[str, object]) -> Config:
    raw = OmegaConf.create(START)
    OmegaConf.update(raw, "algorithm.val_sampling_params.do_sample", True)
    for key, value in values.items():
        OmegaConf.update(raw, key, value)
    config = build(raw)
    check(config)
    return config


def refused(values: dict[str, object]) -> set[str]:
    """Which of the keys are refused by their range, all asked at once; a config may fail for other reasons.

    Weight decay is asked alone, because its product with the learning rate has a limit too.
    """
    alone = "actor.optim.weight_decay"
    if alone in values and len(values) > 1:
        others = {key: value for key, value in values.items() if key != alone}
        return refused(others) | refused({alone: values[alone]})
    try:
        with_values(values)
    except ConfigError as error:
        return {
            line.split("=")[0]
            for line in str(error).split("\n")
            if ("takes away" in line or ": must be " in line) and line.split("=")[0] in values
        }
    return set()


def is_number(kind: object) -> bool:
    options = set(typing.get_args(kind)) - {python_types.NoneType} or {kind}
    return options <= {int, float}


def test_every_number_has_a_range():
    numbers = {key for key, spec in keys().items() if is_number(spec.kind) and not spec.choices}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize(("place", "inside"), [(0, False), (1, True), (2, True), (3, False)])
def test_the_ranges(place, inside):
    """``RANGES``: too small, smallest, largest, too large."""
    values = {key: limits[place] for key, limits in RANGES.items() if limits[place] is not ANY or place < 3}
    assert refused(values) == (set() if inside else values.keys())


def test_minus_one_is_none():
    keys_with_none = {*NONE, "runner.save_interval_minutes"}
    assert refused(dict.fromkeys(keys_with_none, -1)) == set()
    assert refused(dict.fromkeys(keys_with_none, 0)) == keys_with_none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value):
    keys_of_floats = {key for key, limits in RANGES.items() if isinstance(limits[1], float)}
    assert refused(dict.fromkeys(keys_of_floats, value)) == keys_of_floats


def test_whole_numbers_are_not_endless():
    keys_of_counts = {key for key, limits in RANGES.items() if not isinstance(limits[1], float)}
    assert refused(dict.fromkeys(keys_of_counts, 10**400)) == keys_of_counts


def test_greedy_decoding_needs_no_temperature():
    raw = OmegaConf.create(START)
    OmegaConf.update(raw, "algorithm.val_sampling_params", {"do_sample": False, "temperature": 0.0})
    check(build(raw))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("actor.optim.lr", 0.0, "nothing will be learned"),
        ("actor.optim.lr", 0.1, "1e-6 to 1e-3 is usual"),
        ("actor.optim.weight_decay", 2.0, "0 to 0.1 is usual"),
        ("algorithm.ratio_clip_eps", 0.0, "only the first optimizer step"),
        ("algorithm.ratio_clip_eps", 1.0, "0.1 to 0.4 is usual"),
        ("algorithm.clip_ratio_high", 2.0, "0.1 to 0.4 is usual"),
        ("algorithm.kl_beta", 10.0, "outweighs the reward"),
        ("algorithm.entropy_bonus", 1.0, "at most 0.01 is usual"),
        ("algorithm.sampling_params.temperature", 50.0, "nearly random"),
    ],
)
def test_unusual_values_are_noted(key, value, said):
    config = with_values({key: value})
    (note,) = unusual_values(config)
    assert note.startswith(f"{key}={value}: ") and said in note


def test_a_warm_up_that_leaves_no_step():
    raw = OmegaConf.create(START)
    OmegaConf.update(raw, "actor.optim", {"lr_warmup_steps": 5, "total_training_steps": 5})
    config = build(raw)
    check(config)
    (note,) = unusual_values(config)
    assert note.startswith("actor.optim.lr_warmup_steps=5: no step is left after it")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_need_no_note(shipped_config, name):
    config = shipped_config(name)
    assert list(unusual_values(config)) == [] and set(flatten(config)) >= RANGES.keys()
