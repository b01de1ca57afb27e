"""The config: what is accepted, and which message names what is not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rlinf_lite.config import Config, ConfigError, build, flatten, keys, known_keys, seconds_of, to_yaml
from rlinf_lite.config.compose import CONFIGS, load
from rlinf_lite.config.rlinf_keys import TAKEN
from rlinf_lite.config.rules import check
from rlinf_lite.recovery.identity import ADDED

# RLinf's documented example, word for word (its resume page), and the model that any run needs.
DOCUMENTED = """
runner:
  task_type: math
  logger:
    log_path: ${runner.output_dir}/${runner.experiment_name}
    project_name: rlinf
    experiment_name: ${runner.experiment_name}

  save_interval: 50
  experiment_name: grpo-1.5b
  output_dir: ./logs
  resume_dir: ${runner.output_dir}/${runner.experiment_name}/checkpoints/global_step_50
"""


CRITIC = {"critic__use_critic_model": True, "algorithm__adv_type": "gae"}


def small(**values: object) -> Config:
    raw: dict = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}}
    for key, value in {"data.type": "arithmetic", **{k.replace("__", "."): v for k, v in values.items()}}.items():
        node = raw
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return build(raw)


def test_the_documented_example_works_word_for_word():
    config = build({**yaml.safe_load(DOCUMENTED), "actor": {"model": {"model_path": "m"}}})
    assert config.runner.logger.log_path == "./logs/grpo-1.5b"
    assert config.runner.resume_dir == "./logs/grpo-1.5b/checkpoints/global_step_50"
    assert config.runner.save_interval == 50


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"runner": {"max_stepz": 3}}, "runner.max_stepz: unknown key; did you mean runner.max_steps?"),
        ({"max_steps": 3}, "max_steps: unknown key; did you mean runner.max_steps?"),
        ({"runner": {"logger": 3}}, "runner.logger: 3 given where a section of keys belongs"),
        ({"runner": {"max_steps": "many"}}, "runner.max_steps=many: takes a whole number"),
        ({"runner": {"experiment_name": "${nowhere}"}}, "Interpolation key 'nowhere' not found"),
        ({"data": {"train_data_paths": 3}}, "data.train_data_paths=3: takes a list"),
    ],
)
def test_a_wrong_key_or_type_is_named(raw, said):
    with pytest.raises(ConfigError) as caught:
        build({"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, **raw})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "by_tokens", "max_tokens"),
    [
        ({}, True, 2048),
        ({"runner": {"seq_length": 4096}}, True, 4096),
        ({"runner": {"max_tokens_per_mbs": 512}}, True, 512),
        ({"runner": {"enable_dynamic_batch_size": None}}, True, 2048),
        ({"runner": {"enable_dynamic_batch_size": False, "seq_length": 4096}}, False, 2048),
        ({"algorithm": {"training_batch_size_per_gpu": 8}}, False, 2048),
        ({"algorithm": {"training_batch_size_per_gpu": "${runner.save_interval}"}}, False, 2048),
        ({"algorithm": {"logprob_forward_micro_batch_size": 8}}, False, 2048),
        (
            {"algorithm": {"training_batch_size_per_gpu": 8}, "runner": {"enable_dynamic_batch_size": True}},
            True,
            2048,
        ),
    ],
)
def test_micro_batches_are_limited_by_tokens_unless_rows_are_given(raw, by_tokens, max_tokens):
    least = {"runner": {"experiment_name": "x", "save_interval": 4}, "actor": {"model": {"model_path": "m"}}}
    config = build(OmegaConf.merge(least, raw))
    assert config.runner.enable_dynamic_batch_size is by_tokens
    assert config.runner.max_tokens_per_mbs == max_tokens
    again = build(yaml.safe_load(to_yaml(config)))
    assert again == config


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"actor\.model\.model_path: no value given"):
        build({"runner": {"experiment_name": "x"}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithm__n_minibatches": 3}, "does not divide data.rollout_batch_size=16 x algorithm.group_size=8 = 128"),
        ({"algorithm__training_batch_size_per_gpu": 48}, "use a divisor of 128"),
        ({"runner__max_epochs": -1}, "the run would never end"),
        ({"runner__seq_length": 64}, "raise seq_length to 2048"),
        ({"algorithm__sampling_params__temperature": 0.0}, "algorithm.sampling_params.do_sample=false"),
        ({"algorithm__sampling_params__do_sample": False}, "nothing could be learned"),
        ({"algorithm__recompute_logprobs": False}, "rollout.return_logprobs=true"),
        ({"algorithm__importance_sampling_fix": True}, "rollout.return_logprobs=true"),
        ({"algorithm__importance_sampling_clip": 0.0}, "importance_sampling_clip=0.0: must be above 0"),
        ({"algorithm__sampling_params__temperature": float("nan")}, "temperature=nan: must be a finite number"),
        ({"actor__optim__lr": float("inf")}, "actor.optim.lr=inf: must be a finite number"),
        ({"algorithm__clip_ratio_c": 0.5}, "must be above 1"),
        (
            {"algorithm__kl_beta": 0.1, "algorithm__kl_penalty_type": "kl"},
            "algorithm.kl_penalty_type=kl with algorithm.kl_beta=0.1: in a loss its expected gradient is zero",
        ),
        (
            {
                "algorithm__kl_beta": 0.1,
                "algorithm__kl_penalty_type": "abs",
                "algorithm__kl_importance_correction": True,
            },
            "algorithm.kl_penalty_type=abs is none; use low_var_kl",
        ),
        ({"reward__max_failed_fraction": 1.5}, "reward.max_failed_fraction=1.5: must be at most 1"),
        ({"reward__max_failed_fraction": -0.1}, "reward.max_failed_fraction=-0.1: must be at least 0"),
        ({"algorithm__group_size": 1}, "use at least 2"),
        ({"data__type": "math"}, "data.train_data_paths=[]"),
        ({"actor__fsdp_config__grad_scaler__enabled": True}, "scaling is for fp16"),
        ({"actor__model__precision": "fp16"}, "mixed_precision.param_dtype=fp16"),
        ({"actor__optim__min_lr": 0.5}, "actor.optim.min_lr=0.5: is above actor.optim.lr"),
        ({**CRITIC, "critic__optim__min_lr": 0.5}, "critic.optim.min_lr=0.5: is above critic.optim.lr"),
        (
            {**CRITIC, "critic__optim__lr": 0.5, "critic__optim__weight_decay": 2.0},
            "critic.optim.weight_decay=2.0: times critic.optim.lr it takes away 1 of each weight per step",
        ),
        (
            {**CRITIC, "critic__model__precision": "fp16"},
            "critic.model.precision=fp16: parameters in fp16 cannot be trained (Adam's eps is 0 there); set it to fp32 "
            "and critic.fsdp_config.mixed_precision.param_dtype=fp16",
        ),
        (
            {**CRITIC, "critic__fsdp_config__grad_scaler__enabled": True},
            "critic.fsdp_config.grad_scaler.enabled=true: scaling is for fp16",
        ),
        (
            {"runner__checkpoint__keep_best__metric": "value/explained_variance"},
            "algorithm.adv_type=grpo has no critic; set it to gae, or take another metric",
        ),
        ({"runner__save_interval": 0}, "must be positive, or -1"),
        ({"runner__logger__logger_backends": ["swanlab"]}, "'swanlab' is not known here; use tensorboard or wandb"),
        ({"runner__checkpoint__mode": "later"}, "use async or sync"),
        (
            {"actor__megatron__pipeline_model_parallel_size": 2},
            "actor.megatron.pipeline_model_parallel_size=2: not implemented; use 1",
        ),
        ({"runner__checkpoint__root": "memory://checkpoints"}, "every process of a run has a memory of its own"),
        ({"runner__checkpoint__staged_fraction": 1.5}, "staged_fraction=1.5: must be at most 1"),
        ({"runner__checkpoint__keep_last": 0}, "runner.checkpoint.keep_last=0: must be at least 1"),
        (
            {"runner__checkpoint__keep_best__metric": "val/accuracy"},
            "nothing is validated; set runner.val_check_interval",
        ),
        (
            {"runner__checkpoint__keep_best__metric": "val/acuracy", "runner__val_check_interval": 2},
            "keep_best.metric=val/acuracy: no step has a metric of that name; did you mean val/accuracy?",
        ),
        ({"runner__checkpoint__keep_best__metric": "accuracy"}, "no step has a metric of that name; did you mean"),
        ({"runner__checkpoint__keep_best__metric": "policy/kl"}, "no KL term with algorithm.kl_beta=0"),
        ({"runner__checkpoint__keep_best__metric": "policy/entropy"}, "set algorithm.calculate_entropy=true"),
        ({"runner__checkpoint__keep_best__metric": "policy/rollout_logprob_gap"}, "rollout.return_logprobs=true"),
        ({"runner__checkpoint__keep_best__metric": "time/step"}, "says nothing about the model"),
        ({"runner__checkpoint__save_on_best": True}, "set runner.checkpoint.keep_best.metric"),
        ({"runner__save_interval_minutes": 0.0}, "must be positive, or -1 for none"),
        ({"runner__max_time": "90m"}, 'use "HH:MM:SS", "DD:HH:MM:SS", or a number of minutes'),
        ({"runner__max_time": "00:00:00"}, "leaves no time"),
        ({"runner__max_time": 45000}, "YAML reads 12:30:00 without quotes as 45000"),
        ({"runner__resume_mode": "weights"}, "name the global_step_N directory"),
        ({"runner__resume_mode": "weights", "runner__resume_dir": "auto"}, "set runner.resume_mode=full"),
    ],
)
def test_a_contradiction_is_named_with_its_remedy(values, said):
    with pytest.raises(ConfigError) as caught:
        check(small(**values))
    assert said in str(caught.value)


def test_a_critic_is_checked_only_if_there_is_one():
    check(small(**CRITIC))
    check(
        small(
            critic__optim__min_lr=0.5, critic__model__precision="fp16", critic__fsdp_config__grad_scaler__enabled=True
        )
    )


def test_an_estimator_without_gradient_is_fine_where_it_is_not_differentiated():
    for values in ({}, {"algorithm__kl_beta": 0.1, "algorithm__kl_importance_correction": True}):
        check(small(algorithm__kl_penalty_type="kl", **values))


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("null", None), ("'12:30:00'", 45000), ("01:30:00", 5400), ("'2:00:00:30'", 172830), ("90", 5400), ("0.5", 30)],
)
def test_max_time_as_yaml_reads_it(written, seconds):
    assert seconds_of(small(**yaml.safe_load(f"runner__max_time: {written}")).runner.max_time) == seconds


def test_one_message_names_every_problem():
    raw = {
        "runner": {"experiment_name": "x", "max_stepz": 3, "save_interval": 0, "seq_length": "long"},
        "actor": {"seed": "${nowhere}"},
    }
    with pytest.raises(ConfigError) as caught:
        build(raw)
    assert str(caught.value).splitlines() == [
        "runner.max_stepz: unknown key; did you mean runner.max_steps?",
        "runner.seq_length=long: takes a whole number",
        "actor.seed: Interpolation key 'nowhere' not found",
        "actor.model.model_path: no value given; set it in the YAML or as actor.model.model_path=...",
        "runner.save_interval=0: must be positive, or -1 for none",
    ]


def test_limits_and_contradictions_are_named_together():
    with pytest.raises(ConfigError) as caught:
        small(algorithm__clip_ratio_c=0.5, runner__save_interval=0, algorithm__group_size=1)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "runner.save_interval=0",
        "algorithm.clip_ratio_c=0.5",
        "algorithm.group_size=1",
    ]


def test_values_are_converted_as_omegaconf_does():
    """Also before another key refers to them."""
    config = small(
        actor__optim__lr=1,
        runner__seq_length="${multiply:${data.max_prompt_length},2}",
        data__max_prompt_length="1_024",
        data__shuffle="off",
        runner__experiment_name="lr${actor.optim.lr}",
    )
    assert (config.actor.optim.lr, config.runner.seq_length, config.data.shuffle) == (1.0, 2048, False)
    assert config.runner.experiment_name == "lr1.0"
    for key, value in (("runner__max_steps", 3.0), ("runner__max_steps", True), ("runner__max_time", True)):
        with pytest.raises(ConfigError, match=f"{key.replace('__', '.')}=.*: takes"):
            small(**{key: value})


def test_every_key_of_the_design_is_known():
    listed = """
    cluster.num_nodes cluster.component_placement runner.task_type runner.logger.log_path runner.logger.project_name
    runner.logger.experiment_name runner.logger.logger_backends runner.max_epochs runner.max_steps
    runner.val_check_interval runner.save_interval runner.seq_length runner.enable_dynamic_batch_size
    runner.max_tokens_per_mbs runner.resume_dir runner.experiment_name runner.output_dir algorithm.group_size
    algorithm.n_minibatches algorithm.training_batch_size_per_gpu algorithm.logprob_forward_micro_batch_size
    algorithm.recompute_logprobs algorithm.shuffle_rollout algorithm.loss_type algorithm.loss_agg_func
    algorithm.kl_beta algorithm.kl_penalty_type algorithm.ratio_clip_eps algorithm.clip_ratio_low
    algorithm.clip_ratio_high algorithm.clip_ratio_c algorithm.entropy_bonus algorithm.calculate_entropy
    algorithm.adv_type algorithm.normalize_advantages algorithm.importance_sampling_fix
    algorithm.importance_sampling_clip algorithm.sampling_params.do_sample algorithm.sampling_params.temperature
    algorithm.sampling_params.top_k algorithm.sampling_params.top_p algorithm.sampling_params.repetition_penalty
    algorithm.sampling_params.max_new_tokens rollout.group_name rollout.rollout_backend
    rollout.gpu_memory_utilization rollout.kv_cache_gb actor.model.dropout
    rollout.model.model_path rollout.model.model_type rollout.model.precision
    rollout.enforce_eager rollout.tensor_parallel_size rollout.max_running_requests rollout.return_logprobs
    data.type data.max_prompt_length data.filter_prompt_by_length data.rollout_batch_size
    data.val_rollout_batch_size data.num_workers data.shuffle data.seed data.train_data_paths data.val_data_paths
    data.prompt_key data.answer_key data.apply_chat_template actor.group_name actor.training_backend
    actor.enable_offload actor.seed actor.model.model_path actor.model.model_type actor.model.precision
    actor.optim.lr actor.optim.adam_beta1 actor.optim.adam_beta2 actor.optim.adam_eps actor.optim.weight_decay
    actor.optim.clip_grad actor.optim.lr_scheduler actor.optim.lr_warmup_steps actor.optim.total_training_steps
    actor.optim.min_lr actor.tokenizer.tokenizer_model actor.fsdp_config.strategy
    actor.fsdp_config.gradient_checkpointing actor.fsdp_config.cpu_offload actor.fsdp_config.reshard_after_forward
    actor.fsdp_config.mixed_precision.param_dtype actor.fsdp_config.mixed_precision.reduce_dtype
    actor.fsdp_config.grad_scaler.enabled actor.fsdp_config.save_full_model_weights reward.group_name
    reward.use_reward_model reward.reward_type reward.reward_scale critic.use_critic_model
    """
    assert not set(listed.split()) - set(known_keys()) - TAKEN.keys()


def test_only_what_changes_numbers_is_in_the_identity():
    made_of = flatten(small(), neutral_keys=False)
    assert "actor.optim.lr" in made_of and "actor.seed" in made_of and "cluster.threads_per_worker" in made_of
    for key in (
        "runner.output_dir",
        "runner.save_interval",
        "runner.resume_dir",
        "actor.model.model_path",
        "runner.checkpoint.mode",
    ):
        assert key not in made_of


# sha256 of the JSON of what makes the numbers, in order: a checkpoint of an earlier version compares equal.
IDENTITIES = {
    "grpo-tiny-arithmetic-vllm": "8fe2bb8f02730609",
    "grpo-tiny-arithmetic": "2a9b6279281a021c",
    "qwen2.5-1.5b-1gpu": "12ebbacb907399cb",
    "qwen2.5-1.5b-8gpu": "25350f5e4a179f98",
    "qwen2.5-1.5b-grpo-fsdp": "b0aa935f9bd52b2e",
    "qwen2.5-7b-16gpu": "683d10db073bb142",
    "qwen2.5-7b-8gpu": "128e8edc18444735",
    "qwen3-0.6b-1gpu": "7014cbb5cd50bad0",
    "qwen3-1.7b-1gpu": "664a32e11f9e7bb4",
    "qwen3-8b-16gpu": "946ac01141460e90",
    "qwen3-8b-8gpu": "77bcadf1059b919f",
    "smollm2-135m-gsm8k": "100b94520f4a0edd",
    "smollm2-135m-sums": "20256f2e5dccf4fd",
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_identity_of_shipped_configs_is_as_recorded(shipped_config, name):
    since = {key: keys()[key].default for key in ADDED}
    values = flatten(shipped_config(name), neutral_keys=False)
    assert {key: values.pop(key) for key in ADDED} == since
    assert values["critic.use_critic_model"] is False
    of_critic = {key for key in values if key.startswith("critic.")} - {"critic.use_critic_model"}
    values = {key: value for key, value in values.items() if key not in of_critic}  # as `identity` without a critic
    made_of = json.dumps(values)
    assert hashlib.sha256(made_of.encode()).hexdigest()[:16] == IDENTITIES[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_compose_and_check(shipped_config, name):
    assert shipped_config(name).runner.experiment_name


def test_overrides_reach_keys_that_the_yaml_leaves_out(tmp_path: Path):
    config = load(["runner.max_steps=3", "algorithm.kl_beta=0.5", "data.train_data_paths=[]"])
    assert (config.runner.max_steps, config.algorithm.kl_beta) == (3, 0.5)
    (tmp_path / "mine.yaml").write_text(DOCUMENTED)
    mine = load(
        [str(tmp_path / "mine.yaml"), "actor.model.model_path=m", "data.type=arithmetic", "runner.resume_dir=auto"]
    )
    assert mine.runner.resume_dir == "auto"
    with pytest.raises(ConfigError, match="known: grpo-tiny-arithmetic"):
        load(["grpo-tiny"])
