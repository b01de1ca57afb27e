"""Convert a checkpoint in DCP shards to one in Megatron's layout: weights, optimizer state and counters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint, SaveReport
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.errors import ConfigError
from rlinf_lite.export import rlinf_to_dcp
from rlinf_lite.export.arguments import (
    add_base_model,
    add_dtype,
    add_tensor_parallel,
    checkpoint_path,
    dtype_of,
    run,
    wrote,
)
from rlinf_lite.export.checkpoint_path import DCP_PATH_HELP, Located, located
from rlinf_lite.export.dcp_optimizer import DcpOptimizer
from rlinf_lite.export.dcp_to_hf import base_model
from rlinf_lite.export.hf_writer import common_dtype, specs_of
from rlinf_lite.export.megatron_path import check_tensor_parallel
from rlinf_lite.export.megatron_to_dcp import output_root
from rlinf_lite.export.megatron_writer import ConvertedFiles, OptimizerSource
from rlinf_lite.export.training_state import TrainingState, of_checkpoint
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.content import param_groups
from rlinf_lite.weights.megatron.described import described
from rlinf_lite.weights.megatron.files import OURS, PARTS
from rlinf_lite.weights.names import WeightNames

DESCRIPTION = """\
Write a checkpoint of an FSDP run (of rlinf_lite or RLinf) as one in Megatron's layout, with its optimizer state: a
Megatron run resumes from it, here, in RLinf or in Megatron-LM. RNG states are not converted, and of RLinf's checkpoint
the data begin anew; the resume says so, and wants what differs allowed with runner.resume_allow_changes.

example:
  python toolkits/ckpt_convertor/convert_dcp_to_megatron.py --tensor_parallel 2 \\
      --dcp_path logs/fsdp/checkpoints/global_step_50 --output_path logs/megatron/checkpoints
writes logs/megatron/checkpoints/global_step_50."""


def convert(
    source: Located,
    output_path: StoragePath,
    *,
    base: Path,
    tensor_parallel: int,
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
) -> SaveReport:
    """Commit ``global_step_N`` in ``output_path``.

    Args:
        dtype: of the parameters; None: as stored. The optimizer's are float32.
        weights_only: leave out the optimizer's state.

    Raises:
        UserError, OSError: nothing was committed.
    """
    adam = DcpOptimizer(source.directory)
    if source.is_critic or (source.manifest is None and not adam.is_there and not weights_only):
        raise ConfigError(
            f"--dcp_path {source.directory}: only the {'policy' if source.is_critic else 'training state'} of a run is "
            "converted; weights alone go through a Hugging Face directory, with convert_dcp_to_hf.py and "
            "convert_hf_to_megatron.py"
        )
    config = load_config(base, None)
    arch = Architecture.of(config)
    check_tensor_parallel(arch, tensor_parallel)
    names = WeightNames.of(build_on_meta(config, "fp32"))
    state = _training_state(source, str(base), names)
    root = output_root(output_path, state.step)
    model = DcpWeights(source.directory, names, tied=source.tied, base="--base_model")

    def read(part: str, name: str) -> Tensor:
        return (model.read(name) if part == PARTS[0] else adam.read(part, name)).float()

    optimizer = None
    if adam.is_there and not weights_only:
        entries = _entries(adam, list(names.shapes), state.info.get("identity", {}))
        optimizer = OptimizerSource(read=read, entries=entries)
    files = ConvertedFiles(
        model,
        arch,
        tensor_parallel=tensor_parallel,
        dtype=dtype or common_dtype(specs_of(model, None)),
        model=described(config),
        optimizer=optimizer,
    )
    return Checkpointer(root).save(state.step, files, data=state.data, info=state.info)


def _training_state(source: Located, base: str, names: WeightNames) -> TrainingState:
    if source.manifest is None:
        return rlinf_to_dcp.training_state(source, base, names)
    return of_checkpoint(source.directory.parent, source.manifest)


def _entries(adam: DcpOptimizer, names: list[str], identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's file says of the optimizer: rates are those of the run, but a later run has its own."""

    def configured(key: str, default: float) -> float:
        value = identity.get(f"actor.optim.{key}", default)
        if not isinstance(value, int | float):
            raise DamagedCheckpoint(f"identity: actor.optim.{key}={value!r:.60} is not a number")
        return float(value)

    lr, steps = configured("lr", 0.0), adam.num_steps(names)
    updates = adam.num_updates(steps)
    decay = configured("weight_decay", 0.0)
    groups = param_groups(
        lr=lr,
        max_lr=lr,
        min_lr=configured("min_lr", 0.0),
        betas=(configured("adam_beta1", 0.9), configured("adam_beta2", 0.95)),
        eps=configured("adam_eps", 1e-8),
        weight_decay=decay,
        step=steps,
    )
    scheduler = {
        "max_lr": lr,
        "lr_warmup_steps": 0,
        "num_steps": updates,
        "lr_decay_style": "constant",
        "lr_decay_steps": updates,
        "min_lr": configured("min_lr", 0.0),
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": 0,
    }
    return {
        "optimizer": {"optimizer": {"param_groups": groups}},
        "opt_param_scheduler": scheduler,
        OURS: {"num_updates": updates, "data_parallel_size": 0, "rng_states": []},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dcp_path", type=checkpoint_path, required=True, help=DCP_PATH_HELP)
    parser.add_argument("--output_path", type=checkpoint_path, required=True, help="a directory of checkpoints")
    add_tensor_parallel(parser)
    add_base_model(parser)
    add_dtype(parser)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    with located(options.dcp_path) as source:
        report = convert(
            source,
            options.output_path,
            base=base_model(options.base_model, source),
            tensor_parallel=options.tensor_parallel,
            dtype=dtype_of(options),
        )
    return wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
