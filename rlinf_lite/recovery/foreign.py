"""Resuming from a checkpoint that RLinf or Megatron-LM wrote, or beginning a new run with its weights.

It is converted, into the run's own directory. A training state becomes a checkpoint of the run like any other, from
which `auto` resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite.checkpoint import CheckpointError, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.identify import RLINF, linked, writer_of
from rlinf_lite.checkpoint.manifest import CONVERTED_FROM
from rlinf_lite.checkpoint.select import AUTO
from rlinf_lite.checkpoint.storage import StoragePath, storage_path
from rlinf_lite.config import Config, ConfigError, RunnerConfig
from rlinf_lite.models import hf_directory
from rlinf_lite.observability import log_line
from rlinf_lite.recovery.converted import ANOTHER_PROGRAM
from rlinf_lite.weights.megatron.architecture import Architecture

if TYPE_CHECKING:
    import torch

    from rlinf_lite.export.checkpoint_path import Located
    from rlinf_lite.export.megatron_path import LocatedMegatron


BEGUN_FROM = "begun_from"
"""The directory beside the run's checkpoints for weights of another program that a new run begins with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A checkpoint of another program, which may be resumed or begun from."""

    path: StoragePath
    program: str
    checkpoints: StoragePath
    """The run's own directory."""
    weights_only: bool
    """Whether a new run begins with its weights."""

    def converted(self, config: Config) -> RunnerConfig:
        """Convert it, unless an earlier start of this run did.

        Returns:
            ``config.runner`` that resumes from the result.

        Raises:
            ConfigError, CheckpointError: it cannot be converted; nothing was written.
        """
        with self._located() as source:
            path = None if self.weights_only else self._earlier(source.origin)
            path = path or self._convert(source, config)
        return config.runner.model_copy(update={"resume_dir": str(path)})

    @contextmanager
    def _located(self) -> Iterator[Located | LocatedMegatron]:
        if self.program == RLINF:
            from rlinf_lite.export.checkpoint_path import located

            with located(self.path) as shards:
                yield shards
        else:
            from rlinf_lite.export.megatron_path import located_megatron

            with located_megatron(self.path) as files:
                yield files

    def _earlier(self, origin: str) -> StoragePath | None:
        """What an earlier start converted from ``origin``, and did not get beyond.

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
        if only is None or only.info.get(CONVERTED_FROM) != origin:
            of = f", converted from {only.info[CONVERTED_FROM]}" if only and CONVERTED_FROM in only.info else ""
            raise ConfigError(
                f"runner.resume_dir={self.path} is a checkpoint of another run, but {self.checkpoints} already holds "
                f"{existing[0].name}{of}, and two runs would be mixed there; choose another runner.experiment_name, or "
                "resume from a checkpoint of this directory (runner.resume_dir=auto: the newest)"
            )
        log_line(f"{self.path} was converted to {existing[0]} before")
        return existing[0]

    def _convert(self, source: Located | LocatedMegatron, config: Config) -> StoragePath:
        what = "weights are" if self.weights_only else "weights and optimizer state are"
        log_line(f"{self.path}: {self.program} wrote it; its {what} converted")
        from rlinf_lite.export.checkpoint_path import Located

        root = self.checkpoints
        if self.weights_only:
            root = self.checkpoints / BEGUN_FROM
            layout.sweep(root)
            for before in layout.committed(root):
                layout.delete(before)  # of a start that did not get to its first save, maybe of another checkpoint
        if isinstance(source, Located):
            path = self._from_rlinf(source, root, config)
        else:
            path = self._from_megatron(source, root, config)
        log_line(f"converted to {path}")
        return path

    # Converters are imported where they are used: they bring much of torch, and most starts have no use for them.

    def _from_rlinf(self, source: Located, root: StoragePath, config: Config) -> StoragePath:
        from rlinf_lite.export import dcp_to_megatron, rlinf_to_dcp
        from rlinf_lite.export.dcp_optimizer import DcpOptimizer

        (base, dtype), alone = _model(config), self.weights_only
        self._check_optimizer(DcpOptimizer(source.directory).is_there)
        if config.actor.training_backend == "fsdp":
            return rlinf_to_dcp.convert(source, root, base=base, dtype=dtype, weights_only=alone).path
        size = config.actor.megatron.tensor_model_parallel_size
        return dcp_to_megatron.convert(
            source, root, base=base, tensor_parallel=size, dtype=dtype, weights_only=alone
        ).path

    def _from_megatron(self, source: LocatedMegatron, root: StoragePath, config: Config) -> StoragePath:
        from rlinf_lite.export import megatron_to_dcp, megatron_to_megatron
        from rlinf_lite.weights.megatron.files import OURS

        (base, dtype), alone = _model(config), self.weights_only
        files = source.files(Architecture.of(hf_directory.load_config(base, None)))
        self._check_optimizer(files.has_optimizer)
        if OURS in files.model_file(0):
            raise ConfigError(
                f"runner.resume_dir={self.path}: is a checkpoint of rlinf_lite that lost its manifest.json"
            )
        if config.actor.training_backend == "fsdp":
            return megatron_to_dcp.convert(source, root, base=base, dtype=dtype, weights_only=alone).path
        size = config.actor.megatron.tensor_model_parallel_size
        return megatron_to_megatron.convert(
            source, root, base=base, tensor_parallel=size, dtype=dtype, weights_only=alone
        ).path

    def _check_optimizer(self, is_there: bool) -> None:
        if not is_there and not self.weights_only:
            raise ConfigError(
                f"runner.resume_dir={self.path}: holds weights alone, so there is nothing to resume; start a new run "
                "from them with runner.resume_mode=weights"
            )


def find(config: Config, checkpoints: StoragePath) -> Foreign | None:
    """The checkpoint of another program that ``runner.resume_dir`` names; None if it names something else.

    None, too, where a run that began with such weights has checkpoints of its own.

    Raises:
        ConfigError: it may not, or cannot, be resumed from.
    """
    runner, weights_only = config.runner, config.runner.resume_mode == "weights"
    if runner.resume_dir in (None, AUTO) or (weights_only and layout.committed(checkpoints)):
        return None
    try:
        path = linked(storage_path(runner.resume_dir or ""))
    except ValueError:
        return None  # `select` says so
    if (program := writer_of(path)) is None:
        return None
    found = Foreign(path=path, program=program, checkpoints=checkpoints, weights_only=weights_only)
    if weights_only:
        return found
    named = f"runner.resume_dir={path}: {program} wrote it"
    if config.critic.use_critic_model:
        raise ConfigError(
            f"{named}, and the state of a critic is not converted; set critic.use_critic_model=false, or start a new "
            "run from its weights (runner.resume_mode=weights)"
        )
    if ANOTHER_PROGRAM not in runner.resume_allow_changes:
        raise ConfigError(
            f"{named}. Weights and optimizer state can be resumed from; the data cursor, counters of samples and "
            "tokens, and the RNG state of each rank are not there or cannot be read: data begin anew, after the step "
            f"in its name. To resume, allow that by name: \"runner.resume_allow_changes=['{ANOTHER_PROGRAM}']\"; to "
            "start a new run from its weights, set runner.resume_mode=weights"
        )
    return found


def _model(config: Config) -> tuple[Path, torch.dtype]:
    from rlinf_lite.models import build

    model = config.actor.model
    return hf_directory.resolve(model.model_path), build.DTYPES[model.precision]
