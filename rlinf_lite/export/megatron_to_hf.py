"""Convert a checkpoint in Megatron's layout to a Hugging Face directory, with one tensor in memory at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from rlinf_lite.checkpoint.manifest import LEVELS
from rlinf_lite.export.arguments import add_base_model, add_dtype, add_megatron_path, dtype_of, run, size
from rlinf_lite.export.hf_writer import Written, named_base, refuse_existing, tokenizer_note, write_model
from rlinf_lite.export.megatron_path import LocatedMegatron, located_megatron
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.paths import argument
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.source import PARAM, MegatronWeights
from rlinf_lite.weights.names import WeightNames

DESCRIPTION = """\
Write the model of a checkpoint in Megatron's layout (of rlinf_lite, RLinf or Megatron-LM; any tensor-parallel size) as
a Hugging Face directory: weights in safetensors files; config, tokenizer and chat template of the base model.

example:
  python toolkits/ckpt_convertor/convert_megatron_to_hf.py \\
      --megatron_path logs/grpo-1.5b/checkpoints/global_step_50 --base_model Qwen2.5-1.5B --output_path exported"""


def base_of(given: str | None, source: LocatedMegatron) -> Path:
    """The directory of the model that was trained. Raises as `named_base`."""
    info = source.manifest.info if source.manifest else {}
    return named_base(given, info.get("model_path"), "actor.model.model_path", "model_path")


def weights_of(source: LocatedMegatron, base: Path, part: str | None = None) -> tuple[MegatronWeights, str]:
    """The weights by their Hugging Face names, and the name of the model's class.

    Args:
        part: as for `MegatronWeights`.

    Raises:
        UserError: the files hold another model than ``base``, or cannot be read.
    """
    config = load_config(base, None)
    model = build_on_meta(config, "fp32")
    weights = MegatronWeights(source.files(Architecture.of(config)), WeightNames.of(model), part=part)
    return weights, type(model).__name__


def convert(
    source: LocatedMegatron, target: Path, *, base: Path, dtype: torch.dtype | None = None, max_shard_size: int
) -> Written:
    """Write the Hugging Face directory ``target``, which must not exist or be empty.

    With ``dtype`` float32 the optimizer's parameters are written, which are float32 whatever the model's are.

    Raises:
        UserError, OSError: it cannot be written whole; then nothing is written.
    """
    weights, architecture = weights_of(source, base)
    if dtype == torch.float32 and weights.files.has_optimizer:
        weights, _ = weights_of(source, base, PARAM)
    return write_model(
        weights, target, base=base, dtype=dtype, max_shard_size=max_shard_size, architecture=architecture
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_megatron_path(parser)
    parser.add_argument(
        "--output_path",
        type=argument,
        required=True,
        metavar="OUT_DIR",
        help="the directory to make; it must not exist yet",
    )
    add_base_model(parser)
    add_dtype(parser)
    parser.add_argument(
        "--max_shard_size", type=size, default="2GB", metavar="SIZE", help="of a weights file; default: 2GB"
    )
    parser.add_argument(
        "--verify", choices=LEVELS, default="full", help="how to check a checkpoint of rlinf_lite first; default: full"
    )
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    target = options.output_path.resolve()
    refuse_existing(target)  # before the minutes that verifying takes
    with located_megatron(options.megatron_path, options.verify) as source:
        base = base_of(options.base_model, source)
        dtype = dtype_of(options)
        written = convert(source, target, base=base, dtype=dtype, max_shard_size=options.max_shard_size)
    return tokenizer_note(source.manifest, base) + f"wrote {written}: {target}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
