"""Checks before workers start: checkpoint, model directories, data, and the identity of the run, which is of the whole
config."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlinf_lite import rewards
from rlinf_lite.algorithms import user_algorithm
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.config import ActorConfig, Config, CriticConfig, OptimConfig, RolloutModelConfig
from rlinf_lite.config.versions import versions
from rlinf_lite.data import ProblemSet, load_problems
from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.models.files import check_files
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.foreign import find
from rlinf_lite.recovery.identity import identity
from rlinf_lite.recovery.resume import Start, check_identity, choose_start, initial_weights
from rlinf_lite.runner import schedule
from rlinf_lite.runner.keeping import never_meet
from rlinf_lite.weights.megatron.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    start: Start
    train: ProblemSet
    val: ProblemSet | None
    last_step: int
    total_updates: int
    identity: dict[str, Any]
    """As configured now."""


def prepare(config: Config, checkpoints: StoragePath, stop: threading.Event | None = None) -> Prepared:
    """Read everything that the driver needs, the soonest to fail first.

    Args:
        stop: once set, by another thread, the reading of the data ends with `CancelledError`.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be run or resumed, by key or file.
    """
    runner, num_prompts = config.runner, config.data.rollout_batch_size
    foreign = find(config, checkpoints)
    start = choose_start(runner, checkpoints) if foreign is None else None
    models = _read_models(config.actor, config.critic, config.rollout.model, runner.seq_length)
    reward, algorithm = rewards.fingerprint(config.reward), user_algorithm.fingerprint(config.algorithm)
    versions(config.rollout, config.actor.training_backend)
    eos_ids = vocabulary.eos_ids(models.engine_dir, models.tokenizer)
    train = load_problems(config.data, "train", models.tokenizer, stop=stop)
    val = load_problems(config.data, "val", models.tokenizer, stop=stop) if runner.val_check_interval > 0 else None
    models.check_prompts(max(part.max_token_id for part in (train, val) if part))
    last_step = schedule.total_steps(runner, num_problems=len(train.problems), batch=num_prompts)
    total_updates = schedule.total_updates(config.actor.optim, last_step, config.algorithm.n_minibatches)
    if foreign is not None:  # after all other checks: a refused start leaves nothing behind
        start = choose_start(foreign.converted(config), checkpoints)
    assert start is not None
    made_of = identity(
        config,
        base_model=hf_directory.fingerprint(models.policy_dir),
        critic_model=hf_directory.fingerprint(models.critic_dir) if models.critic_dir else None,
        tokenizer=hf_directory.tokenizer_fingerprint(models.tokenizer_dir),
        engine=f"{hf_directory.config_digest(models.engine)} {sorted(eos_ids)}",
        train_data=train.fingerprint,
        val_data=val.fingerprint if val else None,
        reward=reward,
        algorithm=algorithm,
        initial_weights=initial_weights(start),
        total_updates=total_updates,
    )
    start = check_identity(start, made_of, runner.resume_allow_changes)
    _log_data(train, val, last_step, num_prompts, config.algorithm.group_size)
    for line in never_meet(runner, last_step):
        log_line(f"!! {line}")
    _log_if_never_warm(config.actor.optim, total_updates)
    return Prepared(
        start=start,
        train=train,
        val=val,
        last_step=last_step,
        total_updates=total_updates,
        identity=made_of,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Models:
    """What the directories of the models and of the tokenizer hold, without weights."""

    policy_dir: Path
    policy: PretrainedConfig
    tokenizer_dir: Path
    tokenizer: PreTrainedTokenizerBase
    engine_dir: Path
    engine: PretrainedConfig
    critic_dir: Path | None
    critic: PretrainedConfig | None

    def check_prompts(self, max_token_id: int) -> None:
        """Check that all models know every token of the prompts; log if the policy does not know all others."""
        models = {self.policy_dir: self.policy, self.engine_dir: self.engine}
        if self.critic_dir is not None and self.critic is not None:
            models[self.critic_dir] = self.critic
        vocabulary.check_prompts(max_token_id, self.tokenizer_dir, models)
        line = vocabulary.more_tokens_than_model(self.tokenizer, self.tokenizer_dir, self.policy, self.policy_dir)
        if line:
            log_line(line)


def _read_models(actor: ActorConfig, critic: CriticConfig, engine: RolloutModelConfig, seq_length: int) -> _Models:
    policy_dir = _model_dir(actor.model.model_path, "actor.model.model_path")
    tokenizer_dir = _model_dir(actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    engine_dir = _model_dir(engine.model_path, "rollout.model.model_path")
    policy = hf_directory.load_config(policy_dir, actor.model.model_type)
    hf_directory.check_length(policy, seq_length)
    if actor.training_backend == "megatron":
        Architecture.of(policy).check_tensor_parallel(actor.megatron.tensor_model_parallel_size)
    critic_dir = critic_config = None
    if critic.use_critic_model:
        critic_dir = _model_dir(critic.model.model_path, "critic.model.model_path")
        critic_config = hf_directory.load_config(critic_dir, critic.model.model_type, "critic")
        hf_directory.check_critic(critic_config, critic_dir)
        hf_directory.check_length(critic_config, seq_length)
    return _Models(
        policy_dir=policy_dir,
        policy=policy,
        tokenizer_dir=tokenizer_dir,
        tokenizer=hf_directory.load_tokenizer(tokenizer_dir),
        engine_dir=engine_dir,
        engine=hf_directory.load_config(engine_dir, engine.model_type, "rollout"),
        critic_dir=critic_dir,
        critic=critic_config,
    )


def _model_dir(path: str, key: str) -> Path:
    found = hf_directory.resolve(path, key)
    check_files(found, key)
    return found


def slow_precision(actor: ActorConfig, engine: RolloutModelConfig, device: str, capability: str) -> str | None:
    """A warning if a CPU without bf16 instructions shall compute in bf16, which is several times slower; else None.

    Args:
        capability: `torch.backends.cpu.get_cpu_capability` of the driver, which stands for the workers' nodes.
    """
    compute = actor.fsdp_config.mixed_precision.param_dtype
    asked = {
        "actor.model.precision": actor.model.precision if compute is None else "fp32",
        "actor.fsdp_config.mixed_precision.param_dtype": compute or "fp32",
        "rollout.model.precision": engine.precision,
    }
    low = [f"{key}={dtype}" for key, dtype in asked.items() if dtype != "fp32"]
    if device != "cpu" or capability not in ("DEFAULT", "AVX2") or not low:
        return None
    return f"{' and '.join(low)}: this processor has no instructions for it, and fp32 is several times faster here"


def _log_if_never_warm(optim: OptimConfig, total_updates: int) -> None:
    warmup = optim.lr_warmup_steps
    if warmup >= total_updates and optim.total_training_steps is None:
        log_line(
            f"note: actor.optim.lr_warmup_steps={warmup}: the run has {total_updates} optimizer steps, so the learning "
            "rate is still rising at its end"
        )


def _log_data(train: ProblemSet, val: ProblemSet | None, last_step: int, num_prompts: int, group_size: int) -> None:
    left_out = f", {train.num_filtered} over data.max_prompt_length left out" if train.num_filtered else ""
    held_out = f", {len(val.problems)} to validate on" if val else ""
    log_line(
        f"data: {len(train.problems)} problems from {train.source}{left_out}{held_out}; {last_step} steps of "
        f"{num_prompts} prompts x {group_size} = {num_prompts * group_size} responses"
    )
