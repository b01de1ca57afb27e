"""Contradictions and unsupported values in a typed config, each with the key, the value and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.config import AlgorithmConfig, Config, ConfigError, SamplingConfig, flatten, seconds_of
from rlinf_lite.config_ranges import limit
from rlinf_lite.metric_names import why_never

_CHOICES: dict[str, tuple[object, ...]] = {
    "runner.task_type": ("math",),
    "runner.resume_mode": ("full", "weights"),
    "runner.checkpoint.mode": ("async", "sync"),
    "runner.checkpoint.verify": ("full", "size", "off"),
    "runner.checkpoint.keep_best.mode": ("max", "min"),
    "cluster.device": ("auto", "cpu", "cuda"),
    "runner.checkpoint.memory_replicas": (0, 1),
    "cluster.weight_sync": ("auto", "object_store", "collective"),
    "algorithm.loss_type": ("actor",),
    "algorithm.adv_type": ("grpo",),
    "algorithm.loss_agg_func": ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"),
    "algorithm.kl_penalty_type": ("kl", "abs", "mse", "low_var_kl"),
    "rollout.rollout_backend": ("builtin", "vllm"),
    "rollout.model.precision": ("fp32", "bf16", "fp16"),
    "data.type": ("math", "arithmetic", "reasoning_gym"),
    "actor.training_backend": ("fsdp",),
    "actor.model.precision": ("fp32", "bf16", "fp16"),
    "actor.optim.lr_scheduler": ("constant", "linear", "cosine"),
    "actor.fsdp_config.strategy": ("fsdp2",),
    "actor.fsdp_config.mixed_precision.param_dtype": (None, "fp32", "bf16", "fp16"),
    "actor.fsdp_config.mixed_precision.reduce_dtype": (None, "fp32", "bf16", "fp16"),
    "reward.reward_type": ("math", "exact", "custom", "reasoning_gym"),
    "reward.answer_format": ("auto", "boxed", "hashes", "last_number"),
}

_LONGEST_NAME = 255

# Metrics that a resumed run does not repeat, so no checkpoint is better by them.
OF_THE_MACHINE = ("time/", "throughput/", "memory/", "save/")

# Accepted keys of RLinf whose feature is not here: (key, the value that is fine, why, what to do).
_UNSUPPORTED: tuple[tuple[str, object, str], ...] = (
    (
        "actor.enable_offload",
        False,
        "is not implemented; actor.fsdp_config.cpu_offload=true keeps the state in CPU memory",
    ),
    (
        "actor.fsdp_config.save_full_model_weights",
        False,
        "is not implemented; toolkits/ckpt_convertor/convert_dcp_to_state_dict.py makes full weights of any checkpoint",
    ),
    ("reward.use_reward_model", False, "is not implemented; rewards are computed from rules"),
    ("critic.use_critic_model", False, "is not implemented; GRPO needs no critic"),
)

# What `apply_chat_template` is called with, or would answer something else than a text by.
_OURS_IN_TEMPLATES = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
}

# What only the vLLM engine knows: (key, the value of those who do not use it).
_VLLM_ONLY: tuple[tuple[str, object], ...] = (
    ("rollout.tensor_parallel_size", 1),
    ("rollout.gpu_memory_utilization", None),
    ("rollout.kv_cache_gb", None),
    ("rollout.enforce_eager", None),
    ("rollout.enable_sleep", False),
    ("rollout.batch_invariant", False),
)


def check(config: Config) -> None:
    """Reject what cannot be run.

    Raises:
        ConfigError: every problem found, a line each.
    """
    problems = [
        *_names(config),
        *_values(config),
        *_batches(config),
        *_lengths(config),
        *_sampling(config),
        *_algorithm(config),
        *_rollout(config),
        *_data(config),
        *_reward(config),
        *_checkpoint(config),
        *_time(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _names(config: Config) -> Iterator[str]:
    """The experiment's name is that of a directory: it must be one, and inside of ``runner.output_dir``."""
    name = config.runner.experiment_name
    shown = f"runner.experiment_name={name!r}"
    if not name.strip() or name in (".", ".."):
        yield f"{shown}: names no directory of its own; give the run a name"
    elif "/" in name:
        yield f"{shown}: is a name, not a path; put the directories into runner.output_dir"
    elif name != name.strip() or not name.isprintable():
        yield f"{shown}: begins or ends with a space, or has characters that cannot be seen; remove them"
    elif (num_bytes := len(name.encode())) > _LONGEST_NAME:
        yield f"{shown}: {num_bytes} bytes, a directory's name has at most {_LONGEST_NAME}; shorten it"


def _values(config: Config) -> Iterator[str]:
    values = flatten(config)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key}={values[key]}: not known here; use {' or '.join(str(c) for c in choices)}"
    for key, value in values.items():
        if (allowed := limit(key, value)) is not None:
            yield f"{key}={value}: must be {allowed}"
    if values["actor.optim.min_lr"] > values["actor.optim.lr"]:
        yield f"actor.optim.min_lr={values['actor.optim.min_lr']}: is above actor.optim.lr; lower it"
    if (decay := values["actor.optim.lr"] * values["actor.optim.weight_decay"]) >= 1:
        yield (
            f"actor.optim.weight_decay={values['actor.optim.weight_decay']}: times actor.optim.lr it takes away "
            f"{decay:g} of each weight in a step; it must be below 1"
        )
    for key, fine, reason in _UNSUPPORTED:
        if values[key] != fine:
            yield f"{key}={values[key]}: {reason}"
    for backend in config.runner.logger.logger_backends:
        if backend not in ("tensorboard", "wandb"):
            yield f"runner.logger.logger_backends: {backend!r} is not known; use tensorboard, wandb"


def slips(config: Config) -> Iterator[str]:
    """What can be run, and is hardly meant: key, value and what comes of it."""
    optim, algorithm = config.actor.optim, config.algorithm
    if optim.lr == 0:
        yield "actor.optim.lr=0.0: nothing will be learned"
    elif optim.lr > 0.01:
        yield f"actor.optim.lr={optim.lr}: Adam moves each weight by about that much per step; 1e-6 to 1e-3 is usual"
    if optim.total_training_steps is not None and optim.lr_warmup_steps >= optim.total_training_steps:
        yield (
            f"actor.optim.lr_warmup_steps={optim.lr_warmup_steps}: no step is left after it of "
            f"actor.optim.total_training_steps={optim.total_training_steps}"
        )
    if optim.weight_decay > 1:
        yield f"actor.optim.weight_decay={optim.weight_decay}: 0 to 0.1 is usual"
    for key in ("ratio_clip_eps", "clip_ratio_low", "clip_ratio_high"):
        value = getattr(algorithm, key)
        if value == 0:
            yield f"algorithm.{key}=0.0: only the first optimizer step of a batch moves that way"
        elif value is not None and value >= 1:
            yield f"algorithm.{key}={value}: hardly anything is clipped; 0.1 to 0.4 is usual (0.2, not 20 %)"
    if algorithm.kl_beta > 1:
        yield f"algorithm.kl_beta={algorithm.kl_beta}: the KL term outweighs the reward; 0.001 to 0.1 is usual"
    if algorithm.entropy_bonus > 0.1:
        yield f"algorithm.entropy_bonus={algorithm.entropy_bonus}: outweighs the reward; at most 0.01 is usual"
    if config.algorithm.sampling_params.temperature > 2:
        yield (
            f"algorithm.sampling_params.temperature={algorithm.sampling_params.temperature}: responses are nearly "
            "random; 0.6 to 1.2 is usual"
        )


def _checkpoint(config: Config) -> Iterator[str]:
    runner, checkpoint = config.runner, config.runner.checkpoint
    if (checkpoint.root or "").startswith("memory:"):
        yield (
            f"runner.checkpoint.root={checkpoint.root}: every process of a run has a memory of its own, which ends "
            "with it; use a directory, or the URL of a store"
        )
    metric = checkpoint.keep_best.metric
    if metric is None and checkpoint.save_on_best:
        yield "runner.checkpoint.save_on_best=true: best by what? set runner.checkpoint.keep_best.metric"
    if metric is not None and metric.startswith(OF_THE_MACHINE):
        yield f"runner.checkpoint.keep_best.metric={metric}: says nothing about the model; take another metric"
    elif metric is not None and (reason := why_never(metric, config)) is not None:
        yield f"runner.checkpoint.keep_best.metric={metric}: {reason}"
    if runner.resume_mode == "weights" and runner.resume_dir in (None, "auto"):
        yield (
            f"runner.resume_mode=weights with runner.resume_dir={runner.resume_dir}: name the global_step_N directory "
            "whose weights the new run starts with; to go on with a run, set runner.resume_mode=full"
        )


def _time(config: Config) -> Iterator[str]:
    try:
        seconds = seconds_of(config.runner.max_time)
    except ConfigError as error:
        yield str(error)
        return
    if seconds == 0:
        yield f"runner.max_time={config.runner.max_time}: leaves no time; null is no limit"


def _batches(config: Config) -> Iterator[str]:
    algorithm, data = config.algorithm, config.data
    rows = data.rollout_batch_size * algorithm.group_size
    made_of = (
        f"data.rollout_batch_size={data.rollout_batch_size} x algorithm.group_size={algorithm.group_size} = {rows} rows"
    )
    if algorithm.n_minibatches < 1 or algorithm.training_batch_size_per_gpu < 1:
        return
    if rows % algorithm.n_minibatches:
        yield f"algorithm.n_minibatches={algorithm.n_minibatches}: does not divide {made_of}; use a divisor of {rows}"
        return
    mini = rows // algorithm.n_minibatches
    if not config.runner.enable_dynamic_batch_size and mini % algorithm.training_batch_size_per_gpu:
        yield (
            f"algorithm.training_batch_size_per_gpu={algorithm.training_batch_size_per_gpu}: does not divide a "
            f"mini-batch of {mini} rows ({made_of}, in {algorithm.n_minibatches} mini-batches); use a divisor of {mini}"
        )
    if config.runner.max_steps == -1 and config.runner.max_epochs == -1:
        yield "runner.max_steps=-1 and runner.max_epochs=-1: the run would never end; set one of them"


def _lengths(config: Config) -> Iterator[str]:
    for name in ("sampling_params", "val_sampling_params"):
        new = getattr(config.algorithm, name).max_new_tokens
        longest = config.data.max_prompt_length + new
        if longest > config.runner.seq_length:
            yield (
                f"algorithm.{name}.max_new_tokens={new}: with "
                f"data.max_prompt_length={config.data.max_prompt_length} makes {longest} tokens, over "
                f"runner.seq_length={config.runner.seq_length}; raise seq_length to {longest}"
            )
    if config.runner.enable_dynamic_batch_size and config.runner.max_tokens_per_mbs < config.runner.seq_length:
        yield (
            f"runner.max_tokens_per_mbs={config.runner.max_tokens_per_mbs}: one row may have "
            f"runner.seq_length={config.runner.seq_length} tokens; raise it to that"
        )


def _sampling(config: Config) -> Iterator[str]:
    for name in ("sampling_params", "val_sampling_params"):
        params: SamplingConfig = getattr(config.algorithm, name)
        key = f"algorithm.{name}"
        if params.do_sample and params.temperature <= 0:
            yield f"{key}.temperature={params.temperature}: must be above 0; for greedy decoding {key}.do_sample=false"
        elif (params.do_sample and not 0.001 <= params.temperature <= 100) or params.temperature < 0:
            yield f"{key}.temperature={params.temperature}: must be 0.001 to 100; 1 samples from the model as it is"
    if not config.algorithm.sampling_params.do_sample and config.algorithm.group_size > 1:
        yield (
            "algorithm.sampling_params.do_sample=false: every response of a group would be the same, so nothing "
            "could be learned; set it to true"
        )


def _algorithm(config: Config) -> Iterator[str]:
    algorithm, logprobs = config.algorithm, config.rollout.return_logprobs
    if not algorithm.recompute_logprobs and not logprobs:
        yield (
            "algorithm.recompute_logprobs=false: old log-probs must come from somewhere; set it to true, or "
            "rollout.return_logprobs=true"
        )
    if algorithm.importance_sampling_fix and not (logprobs and algorithm.recompute_logprobs):
        yield (
            "algorithm.importance_sampling_fix=true: compares the engine's log-probs with recomputed ones; set "
            "rollout.return_logprobs=true and algorithm.recompute_logprobs=true"
        )
    if algorithm.kl_beta > 0:
        yield from _kl(algorithm)
    if algorithm.group_size == 1:
        yield "algorithm.group_size=1: GRPO compares the responses of a group; use at least 2"
    if config.actor.model.precision == "fp16":
        yield (
            "actor.model.precision=fp16: parameters in fp16 cannot be trained (Adam's eps is 0 there); set it to fp32 "
            "and actor.fsdp_config.mixed_precision.param_dtype=fp16"
        )
    fp16 = config.actor.fsdp_config.mixed_precision.param_dtype == "fp16"
    if config.actor.fsdp_config.grad_scaler.enabled and not fp16:
        yield (
            "actor.fsdp_config.grad_scaler.enabled=true: scaling is for fp16; set it to false, or "
            "actor.fsdp_config.mixed_precision.param_dtype=fp16"
        )


def _kl(algorithm: AlgorithmConfig) -> Iterator[str]:
    kind, corrected = algorithm.kl_penalty_type, algorithm.kl_importance_correction
    if kind == "kl" and not corrected:
        yield (
            f"algorithm.kl_penalty_type=kl with algorithm.kl_beta={algorithm.kl_beta}: in a loss its expected gradient "
            "is zero, so that it would only add noise; use mse, whose gradient is that of KL(policy || reference), "
            "low_var_kl, or set algorithm.kl_importance_correction=true"
        )
    if kind == "abs" and corrected:
        yield (
            "algorithm.kl_importance_correction=true: corrects estimates of the KL, and algorithm.kl_penalty_type=abs "
            "is none; use low_var_kl, mse or kl"
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout, values = config.rollout, flatten(config)
    if rollout.rollout_backend != "vllm":
        for key, unused in _VLLM_ONLY:
            if values[key] != unused:
                plain = "null" if unused is None else str(unused).lower()
                yield f"{key}={values[key]}: is for vLLM only; set it to {plain}, or set rollout.rollout_backend=vllm"
        return
    share = rollout.gpu_memory_utilization
    if share is not None and rollout.kv_cache_gb is not None:
        yield (
            f"rollout.kv_cache_gb={rollout.kv_cache_gb}: rollout.gpu_memory_utilization={share} decides over the cache "
            "too; set one of them to null"
        )
    if rollout.tensor_parallel_size > 1 and config.cluster.device == "cuda":
        yield (
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size}: a rollout worker has one GPU, that of its "
            "slot in cluster.component_placement; set it to 1 and use more rollout workers"
        )
    for key in ("rollout.enable_sleep", "rollout.batch_invariant"):
        if values[key] and config.cluster.device == "cpu":
            yield f"{key}=true: vLLM can do that on GPUs only, and cluster.device=cpu; set it to false"
    for name in ("sampling_params", "val_sampling_params"):
        given: SamplingConfig = getattr(config.algorithm, name)
        if given.do_sample and not 0.01 <= given.temperature <= 2:
            yield f"algorithm.{name}.temperature={given.temperature}: vLLM draws at 0.01 to 2; choose one of these"
    params = config.algorithm.sampling_params
    cut = params.top_p < 1 or params.top_k > 0 or params.repetition_penalty != 1
    if rollout.return_logprobs and cut and params.do_sample and params.temperature != 1:
        yield (
            f"rollout.return_logprobs=true: with algorithm.sampling_params.temperature={params.temperature} and top_k, "
            "top_p or repetition_penalty vLLM cannot report the log-probs that training needs (with the temperature, "
            "without the others); set temperature=1, or turn the others off, or return_logprobs=false"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.type == "math" and not data.train_data_paths:
        yield "data.train_data_paths=[]: no training data; give files, for example data.train_data_paths=[train.jsonl]"
    if data.type == "math" and config.runner.val_check_interval > 0 and not data.val_data_paths:
        yield (
            f"runner.val_check_interval={config.runner.val_check_interval}: there is nothing to validate on; set "
            "data.val_data_paths, or the interval to -1"
        )
    generated = {"arithmetic": "sums", "reasoning_gym": "items"}.get(data.type)
    if generated and (data.train_data_paths or data.val_data_paths):
        yield (
            f"data.type={data.type}: {generated} are generated, files are not read; remove the paths, or set "
            "data.type=math"
        )
    if data.type == "reasoning_gym" and data.reasoning_gym.task is None:
        yield "data.reasoning_gym.task=null: no task given; name one, for example data.reasoning_gym.task=chain_sum"
    if taken := sorted(data.reasoning_gym.config.keys() & {"seed", "size"}):
        yield f"data.reasoning_gym.config: {taken[0]!r} is a key of its own; set data.reasoning_gym.{taken[0]}"
    if "{prompt}" not in data.prompt_template:
        yield f"data.prompt_template={data.prompt_template!r}: no place for the question; write {{prompt}} there"
    for number, shot in enumerate(data.few_shot, start=1):
        if not isinstance(shot, dict) or shot.keys() != {"question", "answer"}:
            yield f"data.few_shot: example {number} is {shot!r:.80}; write {{question: ..., answer: ...}}"
    if data.chat_template_kwargs and not data.apply_chat_template:
        yield "data.chat_template_kwargs: there is no chat template; set data.apply_chat_template=true, or remove it"
    if taken := sorted(data.chat_template_kwargs.keys() & _OURS_IN_TEMPLATES):
        yield f"data.chat_template_kwargs: {taken[0]!r} is decided here; remove it"


def _reward(config: Config) -> Iterator[str]:
    reward, data = config.reward, config.data
    if reward.reward_type == "custom" and reward.path is None:
        yield "reward.reward_type=custom: whose function? set reward.path=my_pkg.my_reward:score"
    if reward.reward_type != "custom" and reward.path is not None:
        yield (
            f"reward.path={reward.path}: reward.reward_type={reward.reward_type} asks no function; set "
            "reward.reward_type=custom, or remove the path"
        )
    if reward.reward_type == "reasoning_gym" and data.type != "reasoning_gym":
        yield f"reward.reward_type=reasoning_gym: does not know data.type={data.type}; set data.type=reasoning_gym"
    if data.type == "reasoning_gym" and reward.reward_type not in ("reasoning_gym", "custom"):
        yield (
            f"reward.reward_type={reward.reward_type}: only the task knows what answers it takes; set "
            "reward.reward_type=reasoning_gym"
        )
    if data.answer_key is None and reward.reward_type in ("math", "exact"):
        yield f"data.answer_key=null: reward.reward_type={reward.reward_type} compares with answers; name their key"
    if reward.answer_format != "auto" and reward.reward_type != "math":
        yield (
            f"reward.answer_format={reward.answer_format}: reward.reward_type={reward.reward_type} looks for no final "
            "answer; set reward.reward_type=math, or remove the format"
        )
    if data.metadata_keys and data.type != "math":
        yield f"data.metadata_keys={data.metadata_keys}: data.type={data.type} has no rows of files; remove it"
