"""Convert a Hugging Face directory to a checkpoint of weights in Megatron's layout, one tensor in memory at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from rlinf_lite.checkpoint import Checkpointer, SaveReport
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.export.arguments import add_dtype, add_tensor_parallel, checkpoint_path, dtype_of, run, wrote
from rlinf_lite.export.hf_to_dcp import STEP, check_policy, checkpoints_root
from rlinf_lite.export.hf_writer import common_dtype, specs_of
from rlinf_lite.export.megatron_path import check_tensor_parallel
from rlinf_lite.export.megatron_writer import ConvertedFiles
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import EMBEDDED, load_config, resolve
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.described import described
from rlinf_lite.weights.names import WeightNames, listed

DESCRIPTION = """\
Write the weights of a Hugging Face directory as a checkpoint (global_step_0) in Megatron's layout that holds a model
and nothing else: a Megatron run starts from it with runner.resume_dir=.../global_step_0 runner.resume_mode=weights, and
Megatron-LM with --load .../global_step_0/actor --ckpt-format torch (it is a "release" checkpoint).

example:
  python toolkits/ckpt_convertor/convert_hf_to_megatron.py --hf_path Qwen2.5-1.5B --tensor_parallel 2 --dtype bf16 \\
      --output_path logs/base/checkpoints
writes logs/base/checkpoints/global_step_0/actor/release/mp_rank_00 and mp_rank_01."""


def convert(
    directory: Path, root: StoragePath, *, tensor_parallel: int, dtype: torch.dtype | None = None, model_path: str
) -> tuple[SaveReport, list[str]]:
    """Commit ``global_step_0`` in ``root``.

    Returns:
        The save's report, and the names of tensors in ``directory`` that the model does not have.

    Raises:
        UserError, OSError: nothing was committed.
    """
    config = load_config(directory, None)
    check_policy(config, directory)
    arch = Architecture.of(config)
    check_tensor_parallel(arch, tensor_parallel)
    names = WeightNames.of(build_on_meta(config, "fp32"))
    source = HfWeights(directory, names, where=f"--hf_path {directory}")
    source.check_ties()
    files = ConvertedFiles(
        source,
        arch,
        tensor_parallel=tensor_parallel,
        dtype=dtype or common_dtype(specs_of(source, None)),
        model=described(config),
    )
    report = Checkpointer(root).save(STEP, files, info={"tied": names.tied, "model_path": model_path})
    return report, source.unused


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hf_path", required=True, metavar="HF_DIR", help="a Hugging Face directory with config.json and *.safetensors"
    )
    parser.add_argument(
        "--output_path",
        type=checkpoint_path,
        required=True,
        help=f"a directory of checkpoints, or the global_step_{STEP} to make in one",
    )
    add_tensor_parallel(parser)
    add_dtype(parser)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    root = checkpoints_root(options.output_path)
    directory = resolve(options.hf_path, "--hf_path")
    report, unused = convert(
        directory,
        root,
        tensor_parallel=options.tensor_parallel,
        dtype=dtype_of(options),
        model_path=options.hf_path if options.hf_path.startswith(EMBEDDED) else str(directory),
    )
    note = f"note: not in the model, so not written: {listed(unused)}\n" if unused else ""
    return note + wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
