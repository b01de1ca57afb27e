"""Convert RLinf's own FSDP checkpoint to one of rlinf_lite: weights and optimizer state, one tensor at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlinf_lite.checkpoint import Checkpointer, SaveReport, layout
from rlinf_lite.checkpoint.identify import RLINF
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.errors import ConfigError
from rlinf_lite.export.arguments import add_base_model, checkpoint_path, run, wrote
from rlinf_lite.export.checkpoint_path import DCP_PATH_HELP, Located, located
from rlinf_lite.export.dcp_optimizer import DcpOptimizer
from rlinf_lite.export.dcp_to_hf import base_model
from rlinf_lite.export.hf_to_dcp import MODEL
from rlinf_lite.export.megatron_to_dcp import OPTIM, output_root
from rlinf_lite.export.training_state import TrainingState, of_another_program
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.names import WeightNames

MOMENTS = ("exp_avg", "exp_avg_sq")

DESCRIPTION = """\
Write an FSDP checkpoint of RLinf (global_step_N/actor/dcp_checkpoint) as a checkpoint of rlinf_lite, with its optimizer
state: a run resumes from it. RLinf's files have one RNG state for all ranks, and its data state is a pickle; neither is
used. The resume says so, and wants it allowed with runner.resume_allow_changes.

example:
  python toolkits/ckpt_convertor/convert_rlinf_to_dcp.py --base_model Qwen2.5-1.5B \\
      --dcp_path rlinf/checkpoints/global_step_50 --output_path logs/mine/checkpoints
writes logs/mine/checkpoints/global_step_50."""


def step_of(directory: StoragePath) -> int:
    """The step in the name of the checkpoint that holds ``directory``.

    Raises:
        ConfigError: no directory above is a global_step_N.
    """
    for path in (directory, *directory.parents):
        if (step := layout.step_of(path)) is not None:
            return step
    raise ConfigError(f"--dcp_path {directory}: is in no global_step_N directory, so its step is unknown; rename one")


def training_state(source: Located, base: str, names: WeightNames) -> TrainingState:
    """What the new checkpoint holds beside tensors. Raises as `step_of`."""
    step = step_of(source.directory)
    return of_another_program(RLINF, step, source=source.origin, model_path=base, tied=names.tied)


def convert(
    source: Located,
    output_path: StoragePath,
    *,
    base: Path,
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
) -> SaveReport:
    """Commit ``global_step_N`` in ``output_path``.

    Args:
        dtype: of parameters and optimizer state; None: as stored.
        weights_only: leave out the optimizer's state.

    Raises:
        UserError, OSError: nothing was committed.
    """
    if source.manifest is not None:
        raise ConfigError(f"--dcp_path {source.directory}: is a checkpoint of rlinf_lite already")
    names = WeightNames.of(build_on_meta(load_config(base, None), "fp32"))
    model, adam = DcpWeights(source.directory, names, base="--base_model"), DcpOptimizer(source.directory)
    state = training_state(source, str(base), names)
    root = output_root(output_path, state.step)
    tensors: dict[str, object] = {
        MODEL: {n: _meta(shape, dtype or model.dtype(n)) for n, shape in names.shapes.items()}
    }
    if adam.is_there and not weights_only:
        steps = adam.num_steps(list(names.shapes))
        tensors[OPTIM] = {
            name: {
                "step": torch.tensor(float(steps)),
                **{part: _meta(shape, dtype or adam.dtype(part, name)) for part in MOMENTS},
            }
            for name, shape in names.shapes.items()
        }
        tensors["lr_scheduler"] = {"num_updates": torch.tensor(steps)}

    def resolve(key: str, wanted: Tensor) -> Tensor:
        if key.startswith(f"{MODEL}."):
            return model.read(key.removeprefix(f"{MODEL}.")).to(wanted.dtype)
        name, part = key.removeprefix(f"{OPTIM}.").rsplit(".", 1)
        return adam.read(part, name).to(wanted.dtype)

    return Checkpointer(root).save(state.step, tensors, data=state.data, info=state.info, resolve=resolve)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dcp_path", type=checkpoint_path, required=True, help=DCP_PATH_HELP)
    parser.add_argument("--output_path", type=checkpoint_path, required=True, help="a directory of checkpoints")
    add_base_model(parser)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    with located(options.dcp_path) as source:
        report = convert(source, options.output_path, base=base_model(options.base_model, source))
    return wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
