"""Convert a checkpoint in Megatron's layout to one in DCP shards: weights, optimizer state and counters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlinf_lite.checkpoint import Checkpointer, SaveReport, layout
from rlinf_lite.checkpoint.identify import MEGATRON
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.export.arguments import (
    add_base_model,
    add_dtype,
    add_megatron_path,
    checkpoint_path,
    dtype_of,
    run,
    wrote,
)
from rlinf_lite.export.hf_to_dcp import MODEL
from rlinf_lite.export.megatron_path import LocatedMegatron, located_megatron
from rlinf_lite.export.megatron_to_hf import base_of
from rlinf_lite.export.training_state import TrainingState, of_another_program, of_checkpoint
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.files import OURS, PARTS
from rlinf_lite.weights.megatron.source import PARAM, MegatronWeights
from rlinf_lite.weights.names import WeightNames

OPTIM = "optim"
"""The top-level key of the optimizer's state in a trainer's state."""

DESCRIPTION = """\
Write a checkpoint in Megatron's layout (of rlinf_lite, RLinf or Megatron-LM; any tensor-parallel size) as one in DCP
shards, with its optimizer state: an FSDP run resumes from it. RNG states are not converted, and of another program's
checkpoint the data begin anew; the resume says so, and wants what differs allowed with runner.resume_allow_changes.

example:
  python toolkits/ckpt_convertor/convert_megatron_to_dcp.py \\
      --megatron_path logs/megatron/checkpoints/global_step_50 --output_path logs/fsdp/checkpoints
writes logs/fsdp/checkpoints/global_step_50."""


def output_root(output_path: StoragePath, step: int) -> StoragePath:
    """The directory of checkpoints that ``output_path`` means.

    Raises:
        FileExistsError: there is a checkpoint of the step already.
    """
    root = output_path.parent if layout.step_of(output_path) == step else output_path
    if layout.step_dir(root, step).exists():
        raise FileExistsError(f"--output_path {layout.step_dir(root, step)}: exists already; give another path")
    return root


def training_state(source: LocatedMegatron, base: str, names: WeightNames) -> TrainingState:
    """What the new checkpoint holds beside tensors."""
    if source.manifest is not None:
        return of_checkpoint(source.directory.parent, source.manifest)
    return of_another_program(MEGATRON, source.step, source=source.origin, model_path=base, tied=names.tied)


def convert(
    source: LocatedMegatron,
    output_path: StoragePath,
    *,
    base: Path,
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
) -> SaveReport:
    """Commit ``global_step_N`` in ``output_path``.

    Args:
        dtype: of parameters and optimizer state; None: as the parameters are. Float32 ones come from the optimizer.
        weights_only: leave out the optimizer's state.

    Raises:
        UserError, OSError: nothing was committed.
    """
    config = load_config(base, None)
    names, files = WeightNames.of(build_on_meta(config, "fp32")), source.files(Architecture.of(config))
    state = training_state(source, str(base), names)
    root = output_root(output_path, state.step)
    model = MegatronWeights(files, names)
    kind = dtype or model.dtype(next(iter(names.shapes)))
    if kind == torch.float32 and files.has_optimizer:
        model = MegatronWeights(files, names, part=PARAM)
    adam = {part: MegatronWeights(files, names, part=part) for part in PARTS[1:]}

    def resolve(key: str, _: Tensor) -> Tensor:
        if key.startswith(f"{MODEL}."):
            return model.read(key.removeprefix(f"{MODEL}.")).to(kind)
        name, part = key.removeprefix(f"{OPTIM}.").rsplit(".", 1)
        return adam[part].read(name).to(kind)

    tensors: dict[str, object] = {MODEL: {name: _meta(shape, kind) for name, shape in names.shapes.items()}}
    if files.has_optimizer and not weights_only:
        steps = files.num_optimizer_steps
        updates = files.model_file(0).get(OURS, {}).get("num_updates", steps)
        tensors[OPTIM] = {
            name: {"step": torch.tensor(float(steps)), **{part: _meta(shape, kind) for part in adam}}
            for name, shape in names.shapes.items()
        }
        tensors["lr_scheduler"] = {"num_updates": torch.tensor(updates)}
    return Checkpointer(root).save(state.step, tensors, data=state.data, info=state.info, resolve=resolve)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_megatron_path(parser)
    parser.add_argument("--output_path", type=checkpoint_path, required=True, help="a directory of checkpoints")
    add_base_model(parser)
    add_dtype(parser)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    with located_megatron(options.megatron_path) as source:
        base = base_of(options.base_model, source)
        dtype = dtype_of(options)
        report = convert(source, options.output_path, base=base, dtype=dtype)
    return wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
