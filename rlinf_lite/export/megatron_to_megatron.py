"""Write a checkpoint in Megatron's layout for another tensor-parallel size, or make another program's one of ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from rlinf_lite.checkpoint import Checkpointer, SaveReport
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.export.arguments import (
    add_base_model,
    add_megatron_path,
    add_tensor_parallel,
    checkpoint_path,
    run,
    wrote,
)
from rlinf_lite.export.megatron_path import LocatedMegatron, check_tensor_parallel, located_megatron
from rlinf_lite.export.megatron_to_dcp import output_root, training_state
from rlinf_lite.export.megatron_to_hf import base_of
from rlinf_lite.export.megatron_writer import ConvertedFiles, OptimizerSource
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.described import described
from rlinf_lite.weights.megatron.files import OURS, PARTS
from rlinf_lite.weights.megatron.source import PARAM, MegatronWeights
from rlinf_lite.weights.names import WeightNames

DESCRIPTION = """\
Write a checkpoint in Megatron's layout (of rlinf_lite, RLinf or Megatron-LM) as a checkpoint of rlinf_lite in the same
layout, with its optimizer state and any tensor-parallel size: a Megatron run resumes from it. RNG states are not
converted, and of another program's checkpoint the data begin anew; the resume says so, and wants it allowed with
runner.resume_allow_changes.

example:
  python toolkits/ckpt_convertor/convert_megatron_to_megatron.py --base_model Qwen2.5-1.5B --tensor_parallel 2 \\
      --megatron_path rlinf/checkpoints/global_step_50 --output_path logs/mine/checkpoints
writes logs/mine/checkpoints/global_step_50."""


def convert(
    source: LocatedMegatron,
    output_path: StoragePath,
    *,
    base: Path,
    tensor_parallel: int,
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
) -> SaveReport:
    """Commit ``global_step_N`` in ``output_path``.

    Args:
        dtype: of the parameters; None: as stored. Float32 ones come from the optimizer.
        weights_only: leave out the optimizer's state.

    Raises:
        UserError, OSError: nothing was committed.
    """
    config = load_config(base, None)
    arch = Architecture.of(config)
    check_tensor_parallel(arch, tensor_parallel)
    names, files = WeightNames.of(build_on_meta(config, "fp32")), source.files(arch)
    state = training_state(source, str(base), names)
    root = output_root(output_path, state.step)
    model = MegatronWeights(files, names)
    flat = {part: MegatronWeights(files, names, part=part) for part in PARTS}
    kind = dtype or model.dtype(next(iter(names.shapes)))
    optimizer = None
    if files.has_optimizer:
        model = flat[PARAM] if kind == torch.float32 else model
    if files.has_optimizer and not weights_only:
        held, steps = files.model_file(0), files.num_optimizer_steps
        updates = held.get(OURS, {}).get("num_updates", steps)
        entries = {key: held[key] for key in ("optimizer", "opt_param_scheduler") if key in held}
        ours = {"num_updates": updates, "data_parallel_size": 0, "rng_states": []}
        optimizer = OptimizerSource(read=lambda part, name: flat[part].read(name), entries={**entries, OURS: ours})
    converted = ConvertedFiles(
        model,
        arch,
        tensor_parallel=tensor_parallel,
        dtype=kind,
        model=described(config),
        optimizer=optimizer,
    )
    return Checkpointer(root).save(state.step, converted, data=state.data, info=state.info)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_megatron_path(parser)
    parser.add_argument("--output_path", type=checkpoint_path, required=True, help="a directory of checkpoints")
    add_tensor_parallel(parser)
    add_base_model(parser)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    with located_megatron(options.megatron_path) as source:
        base = base_of(options.base_model, source)
        report = convert(source, options.output_path, base=base, tensor_parallel=options.tensor_parallel)
    return wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
