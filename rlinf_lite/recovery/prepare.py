"""Checks before workers start: checkpoint, model directory, data, and the identity of the run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_lite import rewards
from rlinf_lite.algorithms import user_algorithm
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.config import Config
from rlinf_lite.config.versions import versions
from rlinf_lite.data import ProblemSet, load_problems
from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.models.files import check_files
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.identity import identity
from rlinf_lite.recovery.resume import Start, check_identity, choose_start, initial_weights
from rlinf_lite.runner import schedule
from rlinf_lite.runner.keeping import never_meet


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
    start = choose_start(config, checkpoints)
    model_dir = _model_dir(config.actor.model.model_path, "actor.model.model_path")
    tokenizer_dir = _model_dir(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    engine_dir = _model_dir(config.rollout.model.model_path, "rollout.model.model_path")
    model_config = hf_directory.load_config(model_dir, config.actor.model.model_type)
    hf_directory.check_length(model_config, config.runner.seq_length)
    tokenizer = hf_directory.load_tokenizer(tokenizer_dir)
    engine_config = hf_directory.load_config(engine_dir, config.rollout.model.model_type)
    reward, algorithm = rewards.fingerprint(config.reward), user_algorithm.fingerprint(config.algorithm)
    versions(config.rollout)
    eos_ids = vocabulary.eos_ids(engine_dir, tokenizer)
    train = load_problems(config.data, "train", tokenizer, stop=stop)
    val = load_problems(config.data, "val", tokenizer, stop=stop) if config.runner.val_check_interval > 0 else None
    models = {model_dir: model_config, engine_dir: engine_config}
    vocabulary.check_prompts(max(part.max_token_id for part in (train, val) if part), tokenizer_dir, models)
    if line := vocabulary.more_tokens_than_model(tokenizer, tokenizer_dir, model_config, model_dir):
        log_line(line)
    last_step = schedule.total_steps(config, len(train.problems))
    total_updates = schedule.total_updates(config, last_step)
    made_of = identity(
        config,
        base_model=hf_directory.fingerprint(model_dir),
        tokenizer=hf_directory.tokenizer_fingerprint(tokenizer_dir),
        engine=f"{hf_directory.config_digest(engine_config)} {sorted(eos_ids)}",
        train_data=train.fingerprint,
        val_data=val.fingerprint if val else None,
        reward=reward,
        algorithm=algorithm,
        initial_weights=initial_weights(start),
        total_updates=total_updates,
    )
    start = check_identity(start, made_of, config)
    _log_data(train, val, last_step, config)
    for line in never_meet(config, last_step):
        log_line(f"!! {line}")
    _log_if_never_warm(config, total_updates)
    return Prepared(
        start=start,
        train=train,
        val=val,
        last_step=last_step,
        total_updates=total_updates,
        identity=made_of,
    )


def _model_dir(path: str, key: str) -> Path:
    found = hf_directory.resolve(path, key)
    check_files(found, key)
    return found


def slow_precision(config: Config, device: str, capability: str) -> str | None:
    """A warning if a CPU without bf16 instructions shall compute in bf16, which is several times slower; else None.

    Args:
        capability: `torch.backends.cpu.get_cpu_capability` of the driver, which stands for the workers' nodes.
    """
    compute = config.actor.fsdp_config.mixed_precision.param_dtype
    asked = {
        "actor.model.precision": config.actor.model.precision if compute is None else "fp32",
        "actor.fsdp_config.mixed_precision.param_dtype": compute or "fp32",
        "rollout.model.precision": config.rollout.model.precision,
    }
    low = [f"{key}={dtype}" for key, dtype in asked.items() if dtype != "fp32"]
    if device != "cpu" or capability not in ("DEFAULT", "AVX2") or not low:
        return None
    return f"{' and '.join(low)}: this processor has no instructions for it, and fp32 is several times faster here"


def _log_if_never_warm(config: Config, total_updates: int) -> None:
    warmup = config.actor.optim.lr_warmup_steps
    if warmup >= total_updates and config.actor.optim.total_training_steps is None:
        log_line(
            f"note: actor.optim.lr_warmup_steps={warmup}: the run has {total_updates} optimizer steps, so the learning "
            "rate is still rising at its end"
        )


def _log_data(train: ProblemSet, val: ProblemSet | None, last_step: int, config: Config) -> None:
    left_out = f", {train.num_filtered} over data.max_prompt_length left out" if train.num_filtered else ""
    held_out = f", {len(val.problems)} to validate on" if val else ""
    rows = config.data.rollout_batch_size * config.algorithm.group_size
    log_line(
        f"data: {len(train.problems)} problems from {train.source}{left_out}{held_out}; {last_step} steps of "
        f"{config.data.rollout_batch_size} prompts x {config.algorithm.group_size} = {rows} responses"
    )
