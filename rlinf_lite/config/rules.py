"""Keys that do not fit together, each with the key, the value and what to write instead.

What a key takes by itself stands at its field, in the file of its section.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.config.actor import ActorConfig, ModelConfig, OptimConfig
from rlinf_lite.config.algorithm import SamplingConfig
from rlinf_lite.config.algorithm_rules import algorithm_problems
from rlinf_lite.config.backend_rules import backend_problems, strategy_problems
from rlinf_lite.config.critic import CriticConfig
from rlinf_lite.config.data import DataConfig
from rlinf_lite.config.evaluation import EvalConfig
from rlinf_lite.config.identity import value_of
from rlinf_lite.config.metric_names import MACHINE_METRICS, METRIC_NAMES, why_never
from rlinf_lite.config.reward import RewardConfig, RewardFunctionConfig
from rlinf_lite.config.rollout import RolloutConfig
from rlinf_lite.config.schema import Config, keys
from rlinf_lite.config.written import shown
from rlinf_lite.errors import ConfigError

_VLLM_ONLY = (
    "rollout.tensor_parallel_size",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gb",
    "rollout.enforce_eager",
    "rollout.enable_sleep",
    "rollout.batch_invariant",
)


def check(config: Config) -> None:
    """Refuse a config whose keys do not fit together.

    Raises:
        ConfigError: every problem found, one line each.
    """
    if found := problems(config):
        raise ConfigError("\n".join(found))


def problems(config: Config) -> list[str]:
    """What does not fit together, one line each."""
    return [
        *_batches(config),
        *_lengths(config),
        *_sampling(config),
        *algorithm_problems(config),
        *(line for key, part in _trained(config).items() for line in _optimizer(key, part.optim)),
        *(line for key, part in _trained(config).items() for line in _precision(key, part)),
        *_rollout(config),
        *_data(config),
        *_reward(config.reward, config.data),
        *_checkpoint(config),
        *backend_problems(config),
        *(line for key in _trained(config) for line in strategy_problems(config, key)),
    ]


def evaluation_problems(config: EvalConfig) -> list[str]:
    """What does not fit together in an evaluation, one line each."""
    rollout, sampling = config.rollout, config.algorithm.val_sampling_params
    return [
        *_temperature("algorithm.val_sampling_params", sampling, rollout),
        *_engine(rollout, config.cluster.device),
        *_problems_and_prompts(config.data),
        *_reward(config.reward, config.data),
    ]


def _batches(config: Config) -> Iterator[str]:
    algorithm, data = config.algorithm, config.data
    rows = data.rollout_batch_size * algorithm.group_size
    made_of = (
        f"data.rollout_batch_size={data.rollout_batch_size} x algorithm.group_size={algorithm.group_size} = {rows} rows"
    )
    if config.runner.max_steps == -1 and config.runner.max_epochs == -1:
        yield "runner.max_steps=-1 and runner.max_epochs=-1: the run would never end; set one of them"
    if algorithm.n_minibatches < 1 or algorithm.training_batch_size_per_gpu < 1:
        return  # refused already, and nothing can be divided by it
    if rows % algorithm.n_minibatches:
        yield f"algorithm.n_minibatches={algorithm.n_minibatches}: does not divide {made_of}; use a divisor of {rows}"
        return
    mini = rows // algorithm.n_minibatches
    if not config.runner.enable_dynamic_batch_size and mini % algorithm.training_batch_size_per_gpu:
        yield (
            f"algorithm.training_batch_size_per_gpu={algorithm.training_batch_size_per_gpu}: does not divide a "
            f"mini-batch of {mini} rows ({made_of}, in {algorithm.n_minibatches} mini-batches); use a divisor of {mini}"
        )


def _lengths(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    for name, params in (
        ("sampling_params", algorithm.sampling_params),
        ("val_sampling_params", algorithm.val_sampling_params),
    ):
        longest = config.data.max_prompt_length + params.max_new_tokens
        if longest > config.runner.seq_length:
            yield (
                f"algorithm.{name}.max_new_tokens={params.max_new_tokens}: with "
                f"data.max_prompt_length={config.data.max_prompt_length} makes {longest} tokens, over "
                f"runner.seq_length={config.runner.seq_length}; raise seq_length to {longest}"
            )
    max_tokens = config.runner.max_tokens_per_mbs
    if config.runner.enable_dynamic_batch_size and max_tokens is not None and max_tokens < config.runner.seq_length:
        yield (
            f"runner.max_tokens_per_mbs={max_tokens}: one row may have "
            f"runner.seq_length={config.runner.seq_length} tokens; raise it to that"
        )


def _sampling(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    yield from _temperature("algorithm.sampling_params", algorithm.sampling_params, config.rollout)
    yield from _temperature("algorithm.val_sampling_params", algorithm.val_sampling_params, config.rollout)
    if not algorithm.sampling_params.do_sample and algorithm.group_size > 1:
        yield (
            "algorithm.sampling_params.do_sample=false: every response of a group would be the same, so nothing "
            "could be learned; set it to true"
        )


def _temperature(key: str, params: SamplingConfig, rollout: RolloutConfig) -> Iterator[str]:
    temperature = params.temperature
    if params.do_sample and temperature <= 0:
        yield f"{key}.temperature={temperature}: must be above 0; for greedy decoding set {key}.do_sample=false"
    elif (params.do_sample and not 0.001 <= temperature <= 100) or temperature < 0:
        yield f"{key}.temperature={temperature}: must be 0.001 to 100; 1 samples from the model as it is"
    if rollout.rollout_backend == "vllm" and params.do_sample and not 0.01 <= temperature <= 2:
        yield f"{key}.temperature={temperature}: vLLM samples at 0.01 to 2; choose one of these"


def _trained(config: Config) -> dict[str, ActorConfig | CriticConfig]:
    """The sections of the models that are trained."""
    critic = {"critic": config.critic} if config.critic.use_critic_model else {}
    return {"actor": config.actor, **critic}


def _optimizer(key: str, optim: OptimConfig) -> Iterator[str]:
    if optim.min_lr > optim.lr:
        yield f"{key}.optim.min_lr={optim.min_lr}: is above {key}.optim.lr; lower it"
    if (decay := optim.lr * optim.weight_decay) >= 1:
        yield (
            f"{key}.optim.weight_decay={optim.weight_decay}: times {key}.optim.lr it takes away {decay:g} of each "
            "weight per step; it must be below 1"
        )


def _precision(key: str, config: ActorConfig | CriticConfig) -> Iterator[str]:
    if not isinstance(config, ActorConfig) or config.training_backend == "fsdp":
        yield from _model_precision(key, config.model)
    fp16 = config.fsdp_config.mixed_precision.param_dtype == "fp16"
    if config.fsdp_config.grad_scaler.enabled and not fp16:
        yield (
            f"{key}.fsdp_config.grad_scaler.enabled=true: scaling is for fp16; set it to false, or "
            f"{key}.fsdp_config.mixed_precision.param_dtype=fp16"
        )


def _model_precision(key: str, model: ModelConfig) -> Iterator[str]:
    if model.precision == "fp16":
        yield (
            f"{key}.model.precision=fp16: parameters in fp16 cannot be trained (Adam's eps is 0 there); set it to fp32 "
            f"and {key}.fsdp_config.mixed_precision.param_dtype=fp16"
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout, params = config.rollout, config.algorithm.sampling_params
    yield from _engine(rollout, config.cluster.device)
    restricted = params.top_p < 1 or params.top_k > 0 or params.min_p > 0 or params.repetition_penalty != 1
    reported = rollout.rollout_backend == "vllm" and rollout.return_logprobs
    if reported and restricted and params.do_sample and params.temperature != 1:
        yield (
            f"rollout.return_logprobs=true: with algorithm.sampling_params.temperature={params.temperature} and top_k, "
            "top_p, min_p or repetition_penalty vLLM cannot report the log-probs that training needs (with the "
            "temperature, without the others); set temperature=1, or turn the others off, or return_logprobs=false"
        )


def _engine(rollout: RolloutConfig, device: str) -> Iterator[str]:
    if rollout.rollout_backend != "vllm":
        for key in _VLLM_ONLY:
            value, unused = value_of(rollout, key.removeprefix("rollout.")), keys()[key].default
            if value != unused:
                yield (
                    f"{key}={shown(value)}: is for vLLM only; set it to {shown(unused)}, or set "
                    "rollout.rollout_backend=vllm"
                )
        return
    fraction = rollout.gpu_memory_utilization
    if fraction is not None and rollout.kv_cache_gb is not None:
        yield (
            f"rollout.kv_cache_gb={rollout.kv_cache_gb}: rollout.gpu_memory_utilization={fraction} also sets the size "
            "of the cache; set one of them to null"
        )
    for key, wanted in (
        ("rollout.enable_sleep", rollout.enable_sleep),
        ("rollout.batch_invariant", rollout.batch_invariant),
    ):
        if wanted and device == "cpu":
            yield f"{key}=true: vLLM can do that on GPUs only, and cluster.device=cpu; set it to false"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.type == "math" and not data.train_data_paths:
        yield "data.train_data_paths=[]: no training data; give files, for example data.train_data_paths=[train.jsonl]"
    if data.type == "math" and config.runner.val_check_interval > 0 and not data.val_data_paths:
        yield (
            f"runner.val_check_interval={config.runner.val_check_interval}: there is nothing to validate on; set "
            "data.val_data_paths, or the interval to -1"
        )
    yield from _problems_and_prompts(data)


def _problems_and_prompts(data: DataConfig) -> Iterator[str]:
    generated = {"arithmetic": "sums", "reasoning_gym": "items"}.get(data.type)
    if generated and (data.train_data_paths or data.val_data_paths):
        yield (
            f"data.type={data.type}: {generated} are generated, files are not read; remove the paths, or set "
            "data.type=math"
        )
    if data.type == "reasoning_gym" and data.reasoning_gym.task is None:
        yield "data.reasoning_gym.task=null: no task given; name one, for example data.reasoning_gym.task=chain_sum"
    if data.chat_template_kwargs and not data.apply_chat_template:
        yield "data.chat_template_kwargs: there is no chat template; set data.apply_chat_template=true, or remove it"
    if data.metadata_keys and data.type != "math":
        yield f"data.metadata_keys={data.metadata_keys}: data.type={data.type} has no rows of files; remove it"


def _reward(reward: RewardConfig, data: DataConfig) -> Iterator[str]:
    for key, function in reward.by_key().items():
        yield from _reward_function(key, function, data)
    if reward.functions:
        yield from _reward_functions(reward)


def _reward_function(key: str, function: RewardFunctionConfig, data: DataConfig) -> Iterator[str]:
    """What does not fit together in the section ``key``."""
    kind = function.reward_type
    if kind == "custom" and function.path is None:
        yield f"{key}.reward_type=custom: needs a function; set {key}.path=my_pkg.my_reward:score"
    if kind != "custom" and function.path is not None:
        yield (
            f"{key}.path={function.path}: {key}.reward_type={kind} calls no function; set {key}.reward_type=custom, or "
            "remove the path"
        )
    if kind == "reasoning_gym" and data.type != "reasoning_gym":
        yield f"{key}.reward_type=reasoning_gym: does not know data.type={data.type}; set data.type=reasoning_gym"
    if data.type == "reasoning_gym" and kind not in ("reasoning_gym", "custom"):
        yield (
            f"{key}.reward_type={kind}: cannot grade data.type=reasoning_gym, whose tasks grade their own items; set "
            f"{key}.reward_type=reasoning_gym"
        )
    if data.answer_key is None and kind in ("math", "exact"):
        yield f"data.answer_key=null: {key}.reward_type={kind} compares with answers; name their key"
    if function.answer_format != "auto" and kind != "math":
        yield (
            f"{key}.answer_format={function.answer_format}: {key}.reward_type={kind} looks for no final answer; set "
            f"{key}.reward_type=math, or remove the format"
        )


def _reward_functions(reward: RewardConfig) -> Iterator[str]:
    for key in ("reward.reward_type", "reward.path", "reward.answer_format"):
        value, unused = getattr(reward, key.removeprefix("reward.")), keys()[key].default
        if value != unused:
            yield (
                f"{key}={shown(value)}: has no effect with reward.functions; set it to {shown(unused)} and give it to "
                "an item of the list, or set reward.functions=[]"
            )
    taken: dict[str, str] = {}
    for key, function in reward.by_key().items():
        if f"reward/{function.name}" in METRIC_NAMES:
            yield f"{key}.name={function.name}: reward/{function.name} is another metric; use another name"
        if function.name in taken:
            yield f"{key}.name={function.name}: is the name of {taken[function.name]} too; use another name"
        taken.setdefault(function.name, key)


def _checkpoint(config: Config) -> Iterator[str]:
    runner, checkpoint = config.runner, config.runner.checkpoint
    metric = checkpoint.keep_best.metric
    if metric is None and checkpoint.save_on_best:
        yield "runner.checkpoint.save_on_best=true: needs a metric; set runner.checkpoint.keep_best.metric"
    if metric is not None and metric.startswith(MACHINE_METRICS):
        yield f"runner.checkpoint.keep_best.metric={metric}: says nothing about the model; take another metric"
    elif metric is not None and (reason := why_never(metric, config)) is not None:
        yield f"runner.checkpoint.keep_best.metric={metric}: {reason}"
    if runner.resume_mode == "weights" and runner.resume_dir in (None, "auto"):
        yield (
            f"runner.resume_mode=weights with runner.resume_dir={shown(runner.resume_dir)}: name the global_step_N "
            "directory whose weights the new run starts with; to resume a run, set runner.resume_mode=full"
        )
