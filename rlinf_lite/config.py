"""The typed config: every key, its default and its meaning, once. Contradictions are in `config_checks`.

A field made with `neutral(...)` cannot change a number of the run (where it is written, how often it is saved); every
other key is part of the run's identity: a resume that would change it is refused unless allowed by name. Paths
are neutral: what lies behind them is in the identity as fingerprints of data and base model.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, errors

from rlinf_lite import written
from rlinf_lite.errors import UserError


class ConfigError(UserError, ValueError):
    """A config that cannot be run. The message holds one line a problem: key, value, remedy."""


def neutral(default: Any, *, path: bool = False) -> Any:
    """A field that changes no number of the run.

    Args:
        path: it holds paths: a leading ``~`` is the home directory.
    """
    metadata = {"neutral": True, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ClusterConfig:
    num_nodes: int = neutral(1)
    """Nodes the run waits for."""
    component_placement: dict[str, Any] = neutral({})
    """Which slots each component gets, one process a slot, as ``{"actor": "0-1", "rollout": "2,3", "reward": "0"}``;
    empty: one slot for all. A slot is a GPU on a GPU cluster and a CPU core otherwise. ``all``: every GPU (or
    every CPU core). Components that name the same slot share it."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: cuda where the cluster has GPUs."""
    threads_per_worker: int = 1
    """Threads of each worker process, set before torch is imported. Another number gives other bits."""
    deterministic: bool = True
    """Actors and the builtin engine use only kernels that torch calls deterministic; an operation that has none on this
    device ends the run with its name (exit code 2). false: torch may choose kernels that sum in another order from run
    to run, so two equal runs, and a resumed one, may differ. vLLM has its own kernels: ``rollout.batch_invariant``."""
    weight_sync: str = neutral("auto")
    """How weights travel from actor to rollout: ``object_store`` (shared memory on one node), ``collective`` (broadcast
    over gloo or NCCL; needs separate GPUs), or ``auto``."""
    object_store_memory: int | None = neutral(None)
    """Bytes for the object store of a Ray started by this run; null: Ray's choice."""
    start_timeout: int = neutral(300)
    """Seconds to wait for nodes, slots and worker start-up."""
    warm_spares: int = neutral(0)
    """Processes kept ready on each node, their imports done, to take the place of a lost worker within a second or two
    (about 0.5 GB each). On CPUs only: a GPU worker is always a new process."""
    elastic: bool = neutral(False)
    """Go on with fewer actor ranks when a node is lost and does not come back, and with more when it returns. Prompts,
    global batch and sampling noise stay the same; sums are taken in another order, so numbers are not bit-equal."""
    min_actor_ranks: int = neutral(1)
    """With ``elastic``: fewer actor ranks than this are not enough to go on."""
    elastic_timeout: float = neutral(30.0)
    """With ``elastic``: seconds to wait for a lost node before going on without it."""


@dataclass
class LoggerConfig:
    log_path: str = neutral("${runner.output_dir}/${runner.experiment_name}", path=True)
    """Where metrics, the resolved config and sink files go."""
    project_name: str = neutral("rlinf")
    experiment_name: str = neutral("${runner.experiment_name}")
    logger_backends: list[str] = neutral(["tensorboard"])
    """Any of ``tensorboard``, ``wandb``; the console and ``metrics.jsonl`` are always written."""
    log_rollouts: int = neutral(8)
    """Responses a step written to ``rollouts.jsonl`` with their token ids; -1: all, 0: none."""


@dataclass
class KeepBestConfig:
    metric: str | None = neutral(None)
    """Keep the checkpoints that are best by this metric of ``metrics.jsonl``, for example ``val/accuracy``. As long as
    no checkpoint has it, this rule deletes nothing."""
    mode: str = neutral("max")
    """Which value is better: ``max`` or ``min``."""
    n: int = neutral(1)
    """How many of the best to keep."""


@dataclass
class CheckpointConfig:
    mode: str = neutral("async")
    """``async``: written while the training goes on, which waits only for what the next update would change;
    ``sync``: the training waits for each save."""
    root: str | None = neutral(None, path=True)
    """Where checkpoints go: a directory, or an fsspec URL that every process can reach (``s3://bucket/run``); null:
    ``{output_dir}/{experiment_name}/checkpoints``. One run a root."""
    verify: str = neutral("full")
    """What loading checks against the manifest: ``full`` (size and sha256), ``size``, ``off``."""
    staged_fraction: float = neutral(0.1)
    """How much of its state a rank may copy aside when an update comes before an async save has read all of it, so
    that the update need not wait."""
    timeout: float = neutral(1800.0)
    """Seconds that a rank waits for the others in a save or load."""
    keep_last: int | None = neutral(None)
    """Keep the newest so many. With none of the ``keep_*`` rules all checkpoints are kept; with any, those that no rule
    keeps are deleted once a newer one is committed, but for pinned ones and the one that the run started from."""
    keep_every: int | None = neutral(None)
    """Keep those at multiples of this many steps."""
    keep_best: KeepBestConfig = field(default_factory=KeepBestConfig)
    memory_replicas: int = neutral(0)
    """1: after each step every actor rank's state is also kept in memory (Ray's object store; of another node where
    there is one), so that the death of a worker or node costs no completed step; 0: only checkpoints. Takes about twice
    the size of a checkpoint in memory, and the time to copy and hash it in each step."""
    save_on_best: bool = neutral(False)
    """Also save whenever ``keep_best.metric`` is better than ever before."""


@dataclass
class RunnerConfig:
    task_type: str = "math"
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    max_epochs: int = neutral(1)
    """Passes over the training data; -1: no limit."""
    max_steps: int = neutral(-1)
    """Optimizer-phase iterations of the whole run, resumed ones included; -1: no limit."""
    val_check_interval: int = neutral(-1)
    """Steps between validations; -1: never."""
    save_interval: int = neutral(-1)
    """Steps between checkpoints; -1: only after the last step, which is always saved. The signal SIGUSR2 to the driver
    asks for one more, after the step in hand."""
    save_interval_minutes: float = neutral(-1.0)
    """Minutes after which a checkpoint is due again, whatever began the last one; -1: none by the clock."""
    max_time: str | int | float | None = neutral(None)
    """Save and stop before this much time since the start has passed, and exit with code 75: ``"HH:MM:SS"`` or
    ``"DD:HH:MM:SS"`` (in YAML in quotes), or minutes; null: no limit. At least one step is made."""
    max_restarts: int = neutral(10)
    """How often within ``restart_window`` the run may go on by itself after it has lost a worker, a node or Ray; 0: it
    ends with the first loss."""
    restart_window: float = neutral(3600.0)
    """Seconds."""
    hang_timeout: float = neutral(1800.0)
    """Seconds without an answer from any worker after which their stacks are printed and those that hang are replaced;
    0: never. Must be longer than the longest single piece of work (a chunk of responses, a mini-batch, a save);
    ``cluster.start_timeout`` holds while workers start."""
    preemption_grace: float = neutral(30.0)
    """Seconds between SIGTERM or SIGUSR1 and the end of the machine: an update that is not done by then is given up."""
    seq_length: int = 2048
    """Longest prompt plus response, in tokens."""
    enable_dynamic_batch_size: bool = False
    """Cut micro-batches by ``max_tokens_per_mbs`` instead of by ``training_batch_size_per_gpu`` rows."""
    max_tokens_per_mbs: int = 2048
    """Padded tokens in a micro-batch, when the batch size is dynamic."""
    resume_dir: str | None = neutral(None, path=True)
    """null: a new run; a ``global_step_N`` directory: go on from it; ``auto``: go on from the newest that verifies."""
    resume_mode: str = neutral("full")
    """``full``: go on with the run. ``weights``: a new run that starts at step 0 with nothing but the model weights of
    the checkpoint ``resume_dir``; once it has checkpoints of its own, the same command goes on from the newest of them
    in full. The frozen reference of the KL term is ``actor.model.model_path`` in both."""
    resume_allow_changes: list[str] = neutral([])
    """Keys (as a refusal names them) that this resume may change although they change the numbers."""
    experiment_name: str = neutral(MISSING)
    output_dir: str = neutral("./logs", path=True)


@dataclass
class SamplingConfig:
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = -1
    """Keep the k most likely tokens; -1 or 0: all."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024


@dataclass
class AlgorithmConfig:
    group_size: int = 8
    """Responses sampled for each prompt."""
    n_minibatches: int = 1
    """Optimizer steps a rollout batch is cut into."""
    training_batch_size_per_gpu: int = 8
    """Rows of a training micro-batch."""
    logprob_forward_micro_batch_size: int = 8
    """Rows of a micro-batch when log-probs are recomputed."""
    recompute_logprobs: bool = True
    """Old log-probs come from the actor's weights before the update; false: from the rollout engine."""
    shuffle_rollout: bool = False
    """Shuffle the rows before they are cut into mini-batches (a pure function of seed and step)."""
    loss_type: str = "actor"
    loss_agg_func: str = "token-mean"
    """``token-mean``, ``seq-mean-token-sum`` or ``seq-mean-token-mean``."""
    kl_beta: float = 0.0
    """Weight of the KL term against the frozen base model; 0: no reference model is built."""
    kl_penalty_type: str = "low_var_kl"
    """``low_var_kl`` (k3; its gradient is that of KL(reference || policy)), ``mse`` (k2; that of KL(policy ||
    reference)) or ``abs`` (twice that of the total variation). ``kl`` (k1) has an expected gradient of 0 in a loss:
    only with ``kl_importance_correction``."""
    kl_importance_correction: bool = False
    """Multiply the KL term by the ratio of the policy to the one that drew the tokens, as DeepSeek-V3.2 does (TRL:
    ``use_bias_correction_kl``). Its gradient is then that of KL(policy || reference), with several mini-batches too,
    for ``kl``, ``mse`` and ``low_var_kl`` alike."""
    ratio_clip_eps: float = 0.2
    clip_ratio_low: float | None = None
    """Lower clip; null: ``ratio_clip_eps``."""
    clip_ratio_high: float | None = None
    """Upper clip; null: ``ratio_clip_eps``."""
    clip_ratio_c: float | None = None
    """Dual clip for negative advantages (> 1); null: off."""
    entropy_bonus: float = 0.0
    calculate_entropy: bool = neutral(False)
    """Log the policy's entropy (costs a pass over the logits)."""
    adv_type: str = "grpo"
    normalize_advantages: bool = False
    """After the group normalisation, also whiten over all response tokens of the batch."""
    importance_sampling_fix: bool = False
    """Weight each token by min(exp(trainer - engine log-prob), ``importance_sampling_clip``)."""
    importance_sampling_clip: float = 2.0
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    val_sampling_params: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(
            do_sample=False,
            max_new_tokens="${algorithm.sampling_params.max_new_tokens}",  # type: ignore[arg-type]
        )
    )
    """Validation is greedy unless told otherwise."""


@dataclass
class ModelConfig:
    model_path: str = neutral(MISSING, path=True)
    """A Hugging Face directory (config, safetensors, tokenizer), or ``embedded:tiny-arithmetic``."""
    model_type: str | None = neutral(None)
    """If given, the directory must hold this architecture (``llama``, ``qwen2.5``, ...)."""
    precision: str = "fp32"
    """Type of parameters and moments: ``fp32``, or ``bf16``: half the memory, but small updates are rounded away."""
    dropout: bool = False
    """Keep the dropout that the directory's config asks for. Without it the policy that is updated is the one that was
    sampled, so old and new log-probs differ by the updates alone."""


@dataclass
class RolloutModelConfig:
    model_path: str = neutral("${actor.model.model_path}", path=True)
    """Where the engine reads the architecture from; its weights are always the actor's."""
    model_type: str | None = neutral("${actor.model.model_type}")
    precision: str = "${actor.model.precision}"


@dataclass
class RolloutConfig:
    group_name: str = neutral("RolloutGroup")
    rollout_backend: str = "builtin"
    """``builtin``: the transformers model with counter-based sampling; ``vllm``: vLLM, which is installed apart (see
    ``docs/vllm.md``)."""
    model: RolloutModelConfig = field(default_factory=RolloutModelConfig)
    max_running_requests: int = 64
    """Sequences generated together. With ``group_size`` it fixes the canonical chunks, so it changes bits."""
    return_logprobs: bool = False
    """The engine reports log-probs (needed when they are not recomputed)."""
    gpu_memory_utilization: float | None = None
    """vLLM only: part of the GPU's memory (on a CPU: of the machine's) that its weights and cache may fill. How large
    the cache is then depends on what was free at the start, and what is put aside when it is full on that."""
    kv_cache_gb: float | None = None
    """vLLM only: size of the cache of each of its processes, in GB (1e9 bytes); with neither of the two it is just
    large enough for ``max_running_requests`` sequences of ``runner.seq_length`` tokens."""
    enforce_eager: bool | None = None
    """vLLM only: false: compile the model and capture CUDA graphs; null: true on a CPU, false on a GPU."""
    tensor_parallel_size: int = 1
    """vLLM only: processes that one engine spreads each layer over; on GPUs 1, for now."""
    enable_sleep: bool = neutral(False)
    """vLLM on GPUs only: between generation and the next weights the engine gives up its GPU memory, for an actor on
    the same GPU."""
    batch_invariant: bool = False
    """vLLM on GPUs only: its slower kernels whose bits do not depend on what else is in the batch."""


@dataclass
class ArithmeticConfig:
    num_digits: int = 2
    """Digits of each operand."""
    num_problems: int = 2048
    num_val_problems: int = 256
    """Held-out sums, disjoint from the training ones."""
    question: str = "{a}+{b}="
    """How a sum is asked: ``{a}`` and ``{b}`` are its numbers."""


@dataclass
class ReasoningGymConfig:
    task: str | None = None
    """Name of a task, for example ``chain_sum``."""
    size: int = 2048
    """Items to train on."""
    val_size: int = 256
    """Held-out items: others than the training ones (but a small task may ask the same question twice)."""
    seed: int = 42
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the task, for example ``{max_terms: 3}``."""


@dataclass
class DataConfig:
    type: str = "math"
    """``math``: rows of ``train_data_paths``; ``arithmetic``: generated sums; ``reasoning_gym``: items of a task."""
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    max_prompt_length: int = 1024
    filter_prompt_by_length: bool = True
    """Leave out rows whose prompt is longer than ``max_prompt_length``; false: such a row is an error."""
    rollout_batch_size: int = 16
    """Prompts a step."""
    val_rollout_batch_size: int | None = None
    """Prompts in a validation batch; null: as many as ``rollout_batch_size``."""
    num_workers: int = neutral(0)
    """Batches of rows that are tokenized at the same time at start, each on the tokenizer's own threads; 0: one."""
    shuffle: bool = True
    seed: int = 1234
    train_data_paths: list[str] = neutral([], path=True)
    """jsonl, json, csv or parquet files, directories written by ``datasets.save_to_disk``, or
    ``hf:NAME[:CONFIG]:SPLIT``, where a part of a split is ``train[:100]``."""
    val_data_paths: list[str] = neutral([], path=True)
    prompt_key: str = "prompt"
    """Where in a row the question is, a text or a list of chat messages: ``key``, or ``key.of.nested.objects``."""
    answer_key: str | None = "answer"
    """Likewise the answer; null, for a reward that needs none: no answers are read."""
    metadata_keys: list[str] = field(default_factory=list)
    """What else of a row a ``custom`` reward gets, in its ``metadata``."""
    prompt_template: str = "{prompt}"
    """What is put around each question; only ``{prompt}`` is replaced."""
    system_prompt: str | None = None
    """A first message with the role ``system``; without chat template: a first paragraph."""
    few_shot: list[Any] = field(default_factory=list)
    """Examples before each question, ``[{question: ..., answer: ...}]``: turns of the chat; without chat template:
    paragraphs."""
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the tokenizer's chat template gets besides the messages, for example ``{enable_thinking: false}``."""


@dataclass
class OptimConfig:
    lr: float = 1.0e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1.0e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    lr_scheduler: str = "constant"
    """``constant``, ``linear`` or ``cosine``, after ``lr_warmup_steps`` of linear warm-up."""
    lr_warmup_steps: int = 0
    total_training_steps: int | None = None
    """Optimizer steps over which ``linear`` and ``cosine`` decay; null: the steps of the run as configured."""
    min_lr: float = 0.0


@dataclass
class MixedPrecisionConfig:
    param_dtype: str | None = None
    """Type in which layers compute; null: ``actor.model.precision``."""
    reduce_dtype: str | None = None
    """Type in which gradients are reduced; null: ``param_dtype``."""


@dataclass
class GradScalerConfig:
    """Loss scaling, for fp16."""

    enabled: bool = False
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass
class FsdpConfig:
    strategy: str = "fsdp2"
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    """Parameters, gradients and moments live in CPU memory."""
    reshard_after_forward: bool = True
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    grad_scaler: GradScalerConfig = field(default_factory=GradScalerConfig)
    save_full_model_weights: bool = neutral(False)


@dataclass
class TokenizerConfig:
    tokenizer_model: str = neutral("${actor.model.model_path}", path=True)
    """StoragePath of the tokenizer."""


@dataclass
class ActorConfig:
    group_name: str = neutral("ActorGroup")
    training_backend: str = "fsdp"
    enable_offload: bool = neutral(False)
    seed: int = 1234
    """Seeds sampling noise, and each rank's generators."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)


@dataclass
class RewardConfig:
    group_name: str = neutral("RewardGroup")
    use_reward_model: bool = False
    reward_type: str = "math"
    """``math``: plain numbers exactly, everything else by math-verify; ``exact``: the text itself, ended by EOS;
    ``custom``: the function ``path``; ``reasoning_gym``: the task that made the problem."""
    path: str | None = neutral(None, path=True)
    """``custom`` only: ``my_pkg.my_reward:score`` or ``path/to/my_reward.py:score``, a function of any of ``prompt``,
    ``response``, ``answer``, ``finished`` and ``metadata`` that returns a number."""
    reward_scale: float = 1.0
    """Reward of a correct answer; a wrong one gets 0. A function's or task's score is multiplied by it."""
    answer_format: str = "auto"
    """``math`` only: where a response states its answer. ``auto``: the last of a box, ``<answer>`` tags, ``####`` and
    "the answer is", else the last expression; ``boxed``, ``hashes``, ``last_number``: only that."""
    verifier_timeout: float = 30.0
    """Seconds of CPU time (not of the clock: a busy machine must not change a reward) after which one check by
    math-verify or reasoning-gym is given up; that response then counts as wrong."""
    max_failed_fraction: float = neutral(0.5)
    """Share of a step's (or a validation's) responses that may fail to be generated or graded; they are left out of the
    step. With more the run stops, with the first error; 1: it never stops for that."""


@dataclass
class CriticConfig:
    use_critic_model: bool = False


@dataclass
class Config:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)


def build(raw: Mapping[str, Any] | DictConfig) -> Config:
    """Type ``raw`` (as read from YAML and overrides), resolve its interpolations, and return a plain `Config`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, a missing value, a broken interpolation.
    """
    given = raw.copy() if isinstance(raw, DictConfig) else OmegaConf.create(dict(raw))
    _reject_unknown_keys(given)
    _refuse(written.read(given, types()))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        config = OmegaConf.to_object(merged)
    except (errors.MissingMandatoryValue, errors.InterpolationToMissingValueError) as error:
        key = str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise ConfigError(f"{key}: no value given; set it in the YAML or as {key}=...") from None
    except (errors.ValidationError, errors.InterpolationResolutionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}") from None
    assert isinstance(config, Config)
    _refuse(written.expand_paths(config))
    return config


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def flatten(config: Config, *, neutral_keys: bool = True) -> dict[str, Any]:
    """The config as ``{"runner.max_steps": 60, ...}``; without neutral keys: what makes the run's numbers."""
    return {key: value for key, value, is_neutral in _leaves(config, "") if neutral_keys or not is_neutral}


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any, bool]]:
    for spec in dataclasses.fields(node):
        value, key = getattr(node, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value, bool(spec.metadata.get("neutral"))


def seconds_of(max_time: str | float | None) -> float | None:
    """``runner.max_time`` in seconds; None: no limit.

    Raises:
        ConfigError: it is no duration, or YAML may have read ``12:30:00`` without quotes as the number 45000.
    """
    if max_time is None:
        return None
    if isinstance(max_time, str):
        if not (match := re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]\d):([0-5]\d)", max_time)):
            raise ConfigError(f'runner.max_time={max_time}: use "HH:MM:SS", "DD:HH:MM:SS", or a number of minutes')
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return 60.0 * (60 * (24 * days + hours) + minutes) + seconds
    if not 0 < max_time < 3600:
        raise ConfigError(
            f"runner.max_time={max_time}: as minutes it must be above 0 and below 3600 (YAML reads 12:30:00 without "
            'quotes as 45000); write "HH:MM:SS" or "DD:HH:MM:SS" in quotes'
        )
    return 60.0 * max_time


def types() -> dict[str, Any]:
    """The declared type of each value, by dotted key: ``{"runner.max_steps": int, ...}``."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", kind

    return dict(walk(Config, ""))


def known_keys() -> list[str]:
    """Every dotted key of the schema, sections included."""

    def walk(cls: type, prefix: str) -> Iterator[str]:
        for spec in dataclasses.fields(cls):
            key = f"{prefix}{spec.name}"
            yield key
            if spec.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(spec.default_factory()):
                yield from walk(type(spec.default_factory()), f"{key}.")

    return list(walk(Config, ""))


def _reject_unknown_keys(given: DictConfig) -> None:
    known = known_keys()
    problems = []

    def walk(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            key = f"{prefix}{name}"
            if key not in known:
                problems.append(f"{key}: unknown key{nearest(key, known)}")
            elif any(other.startswith(f"{key}.") for other in known):
                child = node._get_node(name)
                if isinstance(child, DictConfig):
                    walk(child, f"{key}.")
                else:
                    problems.append(f"{key}: {node[name]!r} given where a section of keys belongs")

    walk(given, "")
    _refuse(problems)


def nearest(key: str, known: list[str]) -> str:
    """``"; did you mean runner.max_steps?"``, or nothing when no known key is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaf = re.escape(key.rsplit(".", 1)[-1])
        near = [other for other in known if re.search(rf"(^|\.){leaf}$", other)][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _register_resolvers() -> None:
    """Small arithmetic for YAML, under the names that RLinf's configs use."""
    OmegaConf.register_new_resolver("subtract", lambda a, b: a - b, replace=True)
    OmegaConf.register_new_resolver("multiply", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("not", lambda a: not a, replace=True)


_register_resolvers()
