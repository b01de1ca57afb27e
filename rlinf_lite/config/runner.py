"""The ``runner`` section: length of the run, validation, logging, checkpoints, recovery and resume."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Ge, Le
from omegaconf import MISSING
from pydantic import AfterValidator, Field

from rlinf_lite.config.fields import (
    MOST_COUNT,
    Count,
    CountOrOff,
    CountOrZero,
    Fraction,
    Neutral,
    PathText,
    Seconds,
    Section,
    follows,
    positive_or_off,
)

_LONGEST_NAME = 255
"""Bytes in the name of a directory on Linux."""


def _directory_name(name: str) -> str:
    """The name of one directory inside ``runner.output_dir``."""
    if not name.strip() or name in (".", ".."):
        raise ValueError("names no directory of its own; give the run a name")
    if "/" in name:
        raise ValueError("is a name, not a path; put the directories into runner.output_dir")
    if name != name.strip() or not name.isprintable():
        raise ValueError("begins or ends with a space, or has characters that cannot be seen; remove them")
    if (num_bytes := len(name.encode())) > _LONGEST_NAME:
        raise ValueError(f"{num_bytes} bytes, a directory's name has at most {_LONGEST_NAME}; shorten it")
    return name


def _shared_storage(root: str) -> str:
    """A directory or URL that other processes can reach."""
    if root.startswith("memory:"):
        raise ValueError(
            "every process of a run has a memory of its own, which ends with it; use a directory, or the URL of a store"
        )
    return root


def seconds_of(max_time: str | float | None) -> float | None:
    """``runner.max_time`` in seconds; None if there is no limit.

    Raises:
        ValueError: it is not a duration, or YAML may have read ``12:30:00`` without quotes as the number 45000.
    """
    if max_time is None:
        return None
    if isinstance(max_time, str):
        if not (match := re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]\d):([0-5]\d)", max_time)):
            raise ValueError('use "HH:MM:SS", "DD:HH:MM:SS", or a number of minutes')
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return 60.0 * (60 * (24 * days + hours) + minutes) + seconds
    if not 0 < max_time < 3600:
        raise ValueError(
            "as minutes it must be above 0 and below 3600 (YAML reads 12:30:00 without quotes as 45000); write "
            '"HH:MM:SS" or "DD:HH:MM:SS" in quotes'
        )
    return 60.0 * max_time


def _duration(max_time: str | int | float | None) -> str | int | float | None:
    """a duration above 0"""
    if seconds_of(max_time) == 0:
        raise ValueError("leaves no time; null is no limit")
    return max_time


class LoggerConfig(Section):
    log_path: Neutral[PathText] = "${runner.output_dir}/${runner.experiment_name}"
    """Directory of metrics, the resolved config and the files of the logger backends."""
    project_name: Neutral[str] = "rlinf"
    """Project in Weights & Biases."""
    experiment_name: Neutral[str] = follows("runner.experiment_name")
    """Name of the run in Weights & Biases."""
    logger_backends: Neutral[list[Literal["tensorboard", "wandb"]]] = ["tensorboard"]
    """Any of ``tensorboard``, ``wandb``. The console and ``metrics.jsonl`` are always written."""
    log_rollouts: Neutral[Annotated[int, Ge(-1), Le(MOST_COUNT)]] = 8
    """Responses per step written to ``rollouts.jsonl`` with their token ids; -1: all, 0: none."""


class KeepBestConfig(Section):
    metric: Neutral[str | None] = None
    """Keep the best checkpoints by this metric of ``metrics.jsonl``, for example ``val/accuracy``. While no checkpoint
    has the metric, this rule deletes nothing."""
    mode: Neutral[Literal["max", "min"]] = "max"
    """Whether a higher or a lower value is better."""
    n: Neutral[Count] = 1
    """How many of the best to keep."""


class CheckpointConfig(Section):
    mode: Neutral[Literal["async", "sync"]] = "async"
    """``async``: training continues during a save and waits only before an update changes what is still being written;
    ``sync``: training waits for each save."""
    root: Neutral[Annotated[PathText, AfterValidator(_shared_storage)] | None] = None
    """Directory of checkpoints, or an fsspec URL that every process can reach (``s3://bucket/run``), for this run
    alone. null: ``{output_dir}/{experiment_name}/checkpoints``."""
    verify: Neutral[Literal["full", "size", "off"]] = "full"
    """What a load compares with the manifest: ``full`` (size and hash), ``size``, or nothing (``off``)."""
    staged_fraction: Neutral[Fraction] = 0.1
    """Fraction of its state that a rank may copy to memory if an update comes before an async save has read
    everything, so that the update need not wait."""
    timeout: Neutral[Annotated[Seconds, Ge(1)]] = 1800.0
    """Seconds that a rank waits for the others in a save or load."""
    keep_last: Neutral[Count | None] = None
    """Keep this many of the newest. Without any ``keep_*`` rule all checkpoints are kept. With one, those that no rule
    keeps are deleted when a newer one is committed, except pinned ones and the one that the run started from."""
    keep_every: Neutral[Count | None] = None
    """Keep checkpoints at multiples of this many steps."""
    keep_best: KeepBestConfig = Field(default_factory=KeepBestConfig)
    memory_replicas: Neutral[Literal[0, 1]] = 0
    """1: after each step the state of every actor and critic rank is also kept in memory (Ray's object store, on
    another node if there is one), so that a lost worker or node costs no completed step. Takes about twice the size of
    a checkpoint in memory, and in each step the time to copy and hash it. 0: only checkpoints."""
    save_on_best: Neutral[bool] = False
    """Also save whenever ``keep_best.metric`` reaches a new best value."""


class RunnerConfig(Section):
    task_type: Literal["math"] = "math"
    """Only ``math``."""
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    max_epochs: Neutral[CountOrOff] = 1
    """Passes over the training data; -1: no limit."""
    max_steps: Neutral[CountOrOff] = -1
    """Steps of the whole run, including those before a resume; -1: no limit."""
    val_check_interval: Neutral[CountOrOff] = -1
    """Steps between validations; -1: never."""
    save_interval: Neutral[CountOrOff] = -1
    """Steps between checkpoints; -1: only after the last step, which is always saved. The signal SIGUSR2 to the driver
    asks for one more after the current step."""
    save_interval_minutes: Neutral[Annotated[Seconds, AfterValidator(positive_or_off)]] = -1.0
    """Minutes between checkpoints, counted from the start of the last one; -1: none by the clock."""
    max_time: Neutral[Annotated[str | int | float | None, AfterValidator(_duration)]] = None
    """Save and stop before this much time has passed since the start, and exit with code 75: ``"HH:MM:SS"`` or
    ``"DD:HH:MM:SS"`` (in YAML in quotes), or minutes; null: no limit. At least one step is made."""
    max_restarts: Neutral[CountOrZero] = 10
    """How often within ``restart_window`` the run recovers by itself after it has lost a worker, a node or Ray; 0: it
    ends with the first loss."""
    restart_window: Neutral[Annotated[Seconds, Ge(1)]] = 3600.0
    """Seconds in which ``max_restarts`` are counted."""
    hang_timeout: Neutral[Annotated[Seconds, Ge(0)]] = 1800.0
    """Seconds without an answer from any worker after which stacks are printed and workers that hang are replaced; 0:
    never. Must be longer than the longest single piece of work (a generation batch, a mini-batch, a save). While
    workers start, ``cluster.start_timeout`` applies."""
    preemption_grace: Neutral[Annotated[Seconds, Ge(0)]] = 30.0
    """Seconds between SIGTERM or SIGUSR1 and the end of the machine. An update that takes longer is given up."""
    seq_length: Count = 2048
    """Largest number of tokens in a prompt and its response together."""
    enable_dynamic_batch_size: bool | None = None
    """true: limit micro-batches by ``max_tokens_per_mbs``; false: by ``algorithm.training_batch_size_per_gpu`` and
    ``algorithm.logprob_forward_micro_batch_size`` rows; null: true, unless one of these two is set."""
    max_tokens_per_mbs: Count | None = None
    """Tokens in a micro-batch, if the batch size is dynamic: of each of its prompts once, and of equal responses to a
    prompt once. There are as few micro-batches as that allows, and the largest is as small as it can be then. null:
    2048, or ``seq_length`` if that is more."""
    resume_dir: Neutral[PathText | None] = None
    """null: a new run; a ``global_step_N`` directory: resume from it; ``auto``: resume from the newest checkpoint that
    verifies. A checkpoint of RLinf or Megatron-LM is converted first, if ``resume_allow_changes`` names
    ``checkpoint (written by)``."""
    resume_mode: Neutral[Literal["full", "weights"]] = "full"
    """``full``: resume the run. ``weights``: a new run from step 0 that takes only the model weights of the checkpoint
    ``resume_dir``, of this project, RLinf or Megatron-LM; once it has checkpoints of its own, the same command resumes
    in full from the newest of them. In both modes the frozen reference of the KL term is ``actor.model.model_path``."""
    resume_allow_changes: Neutral[list[str]] = []
    """Keys, as a refusal names them, that this resume may change although they change the numbers."""
    experiment_name: Neutral[Annotated[str, AfterValidator(_directory_name)]] = MISSING
    """Name of the run, and of its directory in ``output_dir``."""
    output_dir: Neutral[PathText] = "./logs"
    """Directory in which each run has its own."""
