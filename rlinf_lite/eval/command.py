"""Runs one evaluation: opens the model, reads the problems, generates and grades responses, prints the results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from rlinf_lite import errors, numerics
from rlinf_lite.config import ConfigError, EvalConfig
from rlinf_lite.data import ProblemSet, load_problems
from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from rlinf_lite.eval import settings, text
from rlinf_lite.eval.answers import answer_batches, answer_reader
from rlinf_lite.eval.engine import build_engine, prepare_device
from rlinf_lite.eval.log import EvalLog, MemoryLog
from rlinf_lite.eval.results import summarize
from rlinf_lite.eval.source import Source, opened
from rlinf_lite.models import hf_directory, vocabulary
from rlinf_lite.models.files import check_files
from rlinf_lite.observability import log_line
from rlinf_lite.rewards import build_grader, fingerprint
from rlinf_lite.rollout.batches import validation_batches
from rlinf_lite.types import GenerationBatch, Problem


def run(options: argparse.Namespace, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate, print, and return the results.

    Args:
        flags: config keys set by command line flags.

    Raises:
        UserError, OSError: see `explain`.
    """
    with ExitStack() as stack:
        source = stack.enter_context(opened(options.model, options.verify))
        config = settings.configure(source, {**flags, **settings.overrides(options.overrides)}, of_run=options.config)
        _check_samples(config, options.num_samples)
        _check_length(config)
        device = prepare_device(config)
        problems = _problems(config)
        _check_vocabulary(config, problems)
        batches = batches_of(config, problems.problems, step=source.step, num_samples=options.num_samples)
        log = _open_log(options, config, source, device, problems, batches)
        stack.callback(log.close)
        if not options.json:
            _print_head(source, config, device, problems, options.num_samples, log)
        _answer(config, source, device, batches, log)
        found = summarize(log.rows)
        log.finish(found)
    if options.json:
        log_line(json.dumps({"model": source.name, "step": source.step, **found}, indent=1))
    else:
        log_line("\n".join(["", *text.table(found)]))
    return found


def batches_of(
    config: EvalConfig, problems: Sequence[Problem], *, step: int, num_samples: int
) -> list[GenerationBatch]:
    """The generation batches of the evaluation; with one sample per problem, those of the run's own validation."""
    parts = validation_batches(
        problems,
        step=step,
        num_samples=num_samples,
        data=config.data,
        rollout=config.rollout,
        sampling=config.algorithm.val_sampling_params,
        seed=config.actor.seed,
    )
    return [batch for part in parts for batch in part]


def _check_samples(config: EvalConfig, num_samples: int) -> None:
    if num_samples < 1:
        raise ConfigError(f"--num-samples {num_samples}: must be at least 1")
    if num_samples > 1 and not config.algorithm.val_sampling_params.do_sample:
        raise ConfigError(
            f"--num-samples {num_samples}: all greedy responses to a problem are the same; give --temperature above 0"
        )


def _check_length(config: EvalConfig) -> None:
    model = config.rollout.model
    model_dir = hf_directory.resolve(model.model_path, "rollout.model.model_path")
    check_files(model_dir, "rollout.model.model_path")
    hf_directory.check_length(
        hf_directory.load_config(model_dir, model.model_type),
        config.seq_length,
        f"data.max_prompt_length={config.data.max_prompt_length} and --max-new-tokens "
        f"{config.algorithm.val_sampling_params.max_new_tokens}",
    )


def _problems(config: EvalConfig) -> ProblemSet:
    tokenizer_dir = hf_directory.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    check_files(tokenizer_dir, "actor.tokenizer.tokenizer_model")
    return load_problems(config.data, "val", hf_directory.load_tokenizer(tokenizer_dir))


def _check_vocabulary(config: EvalConfig, problems: ProblemSet) -> None:
    tokenizer_dir = hf_directory.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    model_dir = hf_directory.resolve(config.rollout.model.model_path, "rollout.model.model_path")
    model_config = hf_directory.load_config(model_dir, config.rollout.model.model_type)
    vocabulary.check_prompts(problems.max_token_id, tokenizer_dir, {model_dir: model_config})


def _open_log(
    options: argparse.Namespace,
    config: EvalConfig,
    source: Source,
    device: torch.device,
    problems: ProblemSet,
    batches: Sequence[GenerationBatch],
) -> MemoryLog:
    if options.output is None:
        return MemoryLog()
    tokenizer_dir = hf_directory.resolve(config.actor.tokenizer.tokenizer_model)
    made_of = settings.identity(
        config,
        device=device.type,
        num_samples=options.num_samples,
        fingerprints={
            "MODEL (weights)": source.fingerprint(),
            hf_directory.TOKENIZER_FILES: hf_directory.tokenizer_fingerprint(tokenizer_dir),
            "data (problems)": problems.fingerprint,
            "reward (source)": fingerprint(config.reward),
        },
    )
    sizes = [len(batch.prompts) for batch in batches]
    return EvalLog(options.output, made_of, sizes, overwrite=options.overwrite)


def _answer(
    config: EvalConfig, source: Source, device: torch.device, batches: Sequence[GenerationBatch], log: MemoryLog
) -> None:
    num_problems = sum(len(batch.prompts) for batch in batches)
    if len(log.rows) == num_problems:
        return
    reward = config.reward
    with ExitStack() as stack:
        grader = build_grader(reward)
        stack.callback(grader.close)
        engine = build_engine(config, source, device)
        stack.callback(engine.close)
        progress = text.Progress(log.rows, num_problems)
        stack.callback(progress.close)
        answer_batches(batches, engine, grader, log, answer_of=answer_reader(reward), progress=progress)


def _print_head(
    source: Source, config: EvalConfig, device: torch.device, problems: ProblemSet, num_samples: int, log: MemoryLog
) -> None:
    left_out = f", {problems.num_filtered} over data.max_prompt_length left out" if problems.num_filtered else ""
    rollout = config.rollout
    log_line(f"model       {source.name}, {rollout.model.precision} on {device.type}, {rollout.rollout_backend} engine")
    log_line(f"problems    {len(problems.problems)} from {problems.source}{left_out}; reward {_reward(config)}")
    if not config.cluster.deterministic:
        log_line(f"kernels     {numerics.OPTED_OUT}")
    log_line(f"decoding    {text.sampling_text(config.algorithm.val_sampling_params, num_samples)}")
    if isinstance(log, EvalLog):
        done = f"; {len(log.rows)} were written before" if log.rows else ""
        log_line(f"rows        {log.path}{done}")


def _reward(config: EvalConfig) -> str:
    functions = config.reward.functions
    return " + ".join(f"{each.weight:g} x {each.name}" for each in functions) or config.reward.reward_type


def explain(error: BaseException) -> tuple[str | None, int]:
    """The message and exit code for ``error``; no message for a bug, which needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the rows in --output stay, and the same command continues after them", EXIT_INTERRUPTED
    if isinstance(error, ImportError):
        return f"error: {error}", EXIT_USER_ERROR
    error = numerics.user_error(error) or error
    if isinstance(error, UserError):
        return error.lines(), error.exit_code  # without the advice, which is for training runs
    return errors.explain(error)
