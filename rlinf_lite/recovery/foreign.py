"""Resuming from a checkpoint that RLinf or Megatron-LM wrote: converted once, into the run's own directory.

What it becomes is a checkpoint of the run like any other, from which `auto` resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite.checkpoint import CheckpointError, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.identify import RLINF, linked, writer_of
from rlinf_lite.checkpoint.manifest import WRITTEN_BY
from rlinf_lite.checkpoint.select import AUTO
from rlinf_lite.checkpoint.storage import StoragePath, storage_path
from rlinf_lite.config import Config, ConfigError, RunnerConfig
from rlinf_lite.models import hf_directory
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.converted import ANOTHER_PROGRAM
from rlinf_lite.weights.megatron.architecture import Architecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A training state of another program, which may be resumed from."""

    path: StoragePath
    program: str
    checkpoints: StoragePath
    """The run's own directory."""

    def converted(self, config: Config) -> RunnerConfig:
        """Convert it, unless an earlier start of this run did.

        Returns:
            ``config.runner`` that resumes from the result.

        Raises:
            ConfigError, CheckpointError: it cannot be converted; nothing was written.
        """
        path = self._earlier() or self._convert(config)
        return config.runner.model_copy(update={"resume_dir": str(path)})

    def _earlier(self) -> StoragePath | None:
        """What an earlier start converted, and did not get beyond.

        Raises:
            ConfigError: the run has other checkpoints.
        """
        existing = layout.committed(self.checkpoints)
        if not existing:
            return None
        try:
            only = manifests.read(existing[0]) if len(existing) == 1 else None
        except CheckpointError:
            only = None
        if only is None or only.info.get(WRITTEN_BY) != self.program:
            raise ConfigError(
                f"runner.resume_dir={self.path} is a checkpoint of another run, but {self.checkpoints} already holds "
                f"{existing[0].name}, and two runs would be mixed there; choose another runner.experiment_name, or "
                "resume from a checkpoint of this directory (runner.resume_dir=auto: the newest)"
            )
        log_line(f"{self.path} was converted to {existing[0]} before")
        return existing[0]

    def _convert(self, config: Config) -> StoragePath:
        convert = _from_rlinf if self.program == RLINF else _from_megatron
        log_line(f"{self.path}: {self.program} wrote it; its weights and optimizer state are converted")
        path = convert(self.path, self.checkpoints, config)
        log_line(f"converted to {path}")
        return path


def find(config: Config, checkpoints: StoragePath) -> Foreign | None:
    """The training state of another program that ``runner.resume_dir`` names; None if it names something else.

    Raises:
        ConfigError: it may not, or cannot, be resumed from.
    """
    runner = config.runner
    if runner.resume_dir in (None, AUTO) or runner.resume_mode == "weights":
        return None
    try:
        path = linked(storage_path(runner.resume_dir or ""))
    except ValueError:
        return None  # `select` says so
    if (program := writer_of(path)) is None:
        return None
    named = f"runner.resume_dir={path}: {program} wrote it"
    if config.critic.use_critic_model:
        raise ConfigError(
            f"{named}, and the state of a critic is not converted; set critic.use_critic_model=false, or start a new "
            "run from its weights as a Hugging Face directory (toolkits/ckpt_convertor/)"
        )
    if program == RLINF and config.actor.training_backend == "megatron":
        raise ConfigError(
            f"{named} with FSDP; set actor.training_backend=fsdp, or make Megatron's files of it with "
            "toolkits/ckpt_convertor/convert_rlinf_to_dcp.py and then convert_dcp_to_megatron.py"
        )
    if ANOTHER_PROGRAM not in runner.resume_allow_changes:
        raise ConfigError(
            f"{named}. Weights and optimizer state can be resumed from; the data cursor, counters of samples and "
            "tokens, and the RNG state of each rank are not there or cannot be read: data begin anew, after the step "
            f"in its name. To resume, allow that by name: \"runner.resume_allow_changes=['{ANOTHER_PROGRAM}']\""
        )
    return Foreign(path=path, program=program, checkpoints=checkpoints)


# Converters are imported where they are used: they bring much of torch, and most starts have no use for them.


def _from_rlinf(path: StoragePath, checkpoints: StoragePath, config: Config) -> StoragePath:
    from rlinf_lite.export.checkpoint_path import located
    from rlinf_lite.export.dcp_optimizer import DcpOptimizer
    from rlinf_lite.export.rlinf_to_dcp import convert

    base, dtype = _model(config)
    with located(path) as source:
        _check_optimizer(path, DcpOptimizer(source.directory).is_there)
        return convert(source, checkpoints, base=base, dtype=dtype).path


def _from_megatron(path: StoragePath, checkpoints: StoragePath, config: Config) -> StoragePath:
    from rlinf_lite.export import megatron_to_dcp, megatron_to_megatron
    from rlinf_lite.export.megatron_path import located_megatron
    from rlinf_lite.weights.megatron.files import OURS

    base, dtype = _model(config)
    with located_megatron(path) as source:
        files = source.files(Architecture.of(hf_directory.load_config(base, None)))
        _check_optimizer(path, files.has_optimizer)
        if OURS in files.model_file(0):
            raise ConfigError(f"runner.resume_dir={path}: is a checkpoint of rlinf_lite that lost its manifest.json")
        if config.actor.training_backend == "fsdp":
            return megatron_to_dcp.convert(source, checkpoints, base=base, dtype=dtype).path
        size = config.actor.megatron.tensor_model_parallel_size
        return megatron_to_megatron.convert(source, checkpoints, base=base, tensor_parallel=size, dtype=dtype).path


def _model(config: Config) -> tuple[Path, torch.dtype]:
    from rlinf_lite.models import build

    model = config.actor.model
    return hf_directory.resolve(model.model_path), build.DTYPES[model.precision]


def _check_optimizer(path: StoragePath, is_there: bool) -> None:
    if not is_there:
        raise ConfigError(
            f"runner.resume_dir={path}: holds weights alone, so there is nothing to resume; start a new run from them "
            "as a Hugging Face directory (toolkits/ckpt_convertor/)"
        )
