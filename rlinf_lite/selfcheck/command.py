"""The long form of the self-check: one process, a larger batch, more compositions, and every operation twice."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlinf_lite import numerics, readable
from rlinf_lite.algorithms import Loss, build_algorithm
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.models import build, hf_directory
from rlinf_lite.models.files import check_files
from rlinf_lite.observability import log_line
from rlinf_lite.rollout.build import build_engine
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.selfcheck.engine import engine_operations
from rlinf_lite.selfcheck.made_up import LARGE, batch_of, end_tokens, first_difference, made_up_groups, parts_of
from rlinf_lite.selfcheck.records import EngineCheck, UpdateCheck, by_operation, result_of
from rlinf_lite.selfcheck.twice import Twice
from rlinf_lite.selfcheck.update import check_update, update_operations
from rlinf_lite.training.fsdp.build import build_critic, build_policy
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.types import GenerationBatch, Sampling
from rlinf_lite.weights.names import weight_shapes

_FEW_ROWS = 5
"""Rows that an engine decodes at once in one of the comparisons, so that rows wait and join."""


def run(config: Config) -> int:
    """Check, and print a line per comparison; return the exit code.

    Raises:
        UserError: the model cannot be built here, or an operation has no deterministic form.
    """
    if config.actor.training_backend != "fsdp":
        raise ConfigError(
            "the long form of the self-check runs in one process, without Megatron's ranks",
            key="actor.training_backend",
            value=config.actor.training_backend,
            remedy="a run makes the short form at its start; or check with actor.training_backend=fsdp",
        )
    for section, fsdp in (("actor", config.actor.fsdp_config), ("critic", config.critic.fsdp_config)):
        if fsdp.strategy != "fsdp2":
            raise ConfigError(
                "the long form of the self-check knows FSDP2 only",
                key=f"{section}.fsdp_config.strategy",
                value=fsdp.strategy,
                remedy="a run makes the short form at its start; or check with fsdp2",
            )
    device, losses = _device(config), build_algorithm(config.algorithm).losses()
    with _one_rank(device) as mesh:
        given: dict[str, Any] = {"mesh": mesh, "device": device}
        trainer = build_policy(config.actor, config.algorithm, model_dir=_model_dir(config, "actor"), **given)
        vocab_size = trainer.model.config.get_text_config().vocab_size
        sampling = Sampling(**vars(config.algorithm.sampling_params))
        batch = batch_of(LARGE[device.type], vocab_size, sampling, config.runner.seq_length)
        _print_head(config, trainer, batch)
        engine = EngineCheck(groups=made_up_groups(batch, vocab_size), is_checked=False)
        if config.rollout.rollout_backend == "builtin":
            engine = _check_engine(_Engines(config, trainer), batch)
        policy, critic = [_check_update("actor", trainer, losses.policy, engine)], []
        if losses.critic is not None:
            other = build_critic(config.critic, model_dir=_model_dir(config, "critic"), seed=config.actor.seed, **given)
            critic = [_check_update("critic", other, losses.critic, engine)]
    result = result_of(config, [engine], policy, critic)
    log_line(str(result))
    return 0 if result.is_good else 1


def _device(config: Config) -> torch.device:
    settings, found = config.cluster, torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise ConfigError("no CUDA device here", key="cluster.device", value="cuda", remedy="use cpu")
    kind = "cpu" if settings.device == "cpu" or not found else "cuda"
    return numerics.fix(kind, threads=settings.threads_per_worker, deterministic=settings.deterministic)


@contextmanager
def _one_rank(device: torch.device) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def _model_dir(config: Config, section: str) -> Path:
    key = f"{section}.model.model_path"
    found = hf_directory.resolve(getattr(config, section).model.model_path, key)
    check_files(found, key)
    return found


class _Engines:
    """Makes builtin engines over one model, with the trainer's weights."""

    def __init__(self, config: Config, trainer: FsdpTrainer) -> None:
        settings = config.rollout.model
        self._config, model_dir = config, _model_dir(config, "rollout")
        model = build.build_on_meta(hf_directory.load_config(model_dir, settings.model_type), settings.precision)
        build.materialize(model, trainer.device)
        self._build = functools.partial(
            build_engine,
            model=model,
            tokenizer=hf_directory.load_tokenizer(hf_directory.resolve(config.actor.tokenizer.tokenizer_model)),
            seq_length=config.runner.seq_length,
            sampling=config.algorithm.sampling_params,
            model_dir=model_dir,
            shapes=weight_shapes(model),
            eos_ids=end_tokens(model.config.get_text_config().vocab_size),
            device=trainer.device,
            materialize=lambda *_: None,
        )
        self().load_weights(trainer.whole_weights(build.DTYPES[settings.precision]))

    def __call__(self, *, max_rows: int | None = None) -> RolloutEngine:
        changes: dict[str, Any] = {"return_logprobs": True}
        if max_rows is not None:
            changes["max_running_requests"] = max_rows
        return self._build(self._config.rollout.model_copy(update=changes))


def _check_engine(make: _Engines, batch: GenerationBatch) -> EngineCheck:
    engine, few = make(), make(max_rows=_FEW_ROWS)
    groups = engine.generate(batch)
    comparisons = {
        "the same batch again": lambda: engine.generate(batch),
        "1 prompt at a time": lambda: [group for part in parts_of(batch, 1) for group in engine.generate(part)],
        "3 prompts at a time": lambda: [group for part in parts_of(batch, 3) for group in engine.generate(part)],
        f"{_FEW_ROWS} rows at a time": lambda: few.generate(batch),
    }
    found = []
    for name, generate in comparisons.items():
        where = first_difference(groups, generate())
        _print("engine", name, where and f"{where} differ")
        found += [] if where is None else [f"{where} differ, with {name}"]
    twice = engine_operations(engine, batch)
    _print_operations("engine", twice)
    difference = by_operation(found[0], twice.first) if found else None
    return EngineCheck(groups=groups, difference=difference or _alone(twice))


def _check_update(name: str, trainer: FsdpTrainer, loss: Loss, engine: EngineCheck) -> UpdateCheck:
    check = check_update(trainer, loss, engine.groups)
    _print(name, "forward pass and gradient again", check.difference)
    twice = update_operations(trainer, loss, engine.groups)
    _print_operations(name, twice)
    difference = None if check.difference is None else by_operation(check.difference, twice.first)
    return replace(check, difference=difference or _alone(twice))


def _alone(twice: Twice) -> str | None:
    """An operation that differs, though all of them together did not this time."""
    return None if twice.first is None else f"the operation {twice.first} differs when run again"


def _print_operations(title: str, twice: Twice) -> None:
    total = f"each of {twice.seen.total():,} operations again"
    _print(title, total, ", ".join(f"{name} ({times})" for name, times in twice.differ.items()) or None)


def _print(title: str, what: str, difference: str | None) -> None:
    log_line(f"{title:<10}{what:<36}{'same' if difference is None else f'DIFFERENT: {difference}'}")


def _print_head(config: Config, trainer: FsdpTrainer, batch: GenerationBatch) -> None:
    num = readable.count(sum(param.numel() for param in trainer.model.parameters()))
    lengths = [len(prompt.problem.prompt_ids) for prompt in batch.prompts]
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu"
    log_line(f"model     {config.actor.model.model_path}, {num} parameters, on {name}")
    if not config.cluster.deterministic:
        log_line(f"kernels   {numerics.OPTED_OUT}")
    prompts = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
    responses = f"{batch.group_size} responses of up to {batch.sampling.max_new_tokens}"
    log_line(f"batch     {prompts}, {responses} to each")
