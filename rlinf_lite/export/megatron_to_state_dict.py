"""Convert a checkpoint in Megatron's layout to one plain PyTorch state dict with the model's Hugging Face names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlinf_lite import readable
from rlinf_lite.export.arguments import add_base_model, add_megatron_path, run
from rlinf_lite.export.dcp_to_state_dict import FILE_NAME, FILE_SUFFIXES, target_file, write
from rlinf_lite.export.megatron_path import located_megatron
from rlinf_lite.export.megatron_to_hf import base_of, weights_of
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.paths import argument
from rlinf_lite.weights.names import WeightNames

DESCRIPTION = f"""\
Write the model of a checkpoint in Megatron's layout (of rlinf_lite, RLinf or Megatron-LM; any tensor-parallel size) as
a plain PyTorch state dict, for torch.load(file, weights_only=True) and model.load_state_dict(state, strict=True).

example:
  python toolkits/ckpt_convertor/convert_megatron_to_state_dict.py \\
      --megatron_path logs/grpo-1.5b/checkpoints/global_step_50 --base_model Qwen2.5-1.5B --output_path exported
writes exported/{FILE_NAME}."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_megatron_path(parser)
    parser.add_argument(
        "--output_path",
        type=argument,
        required=True,
        help=f"a file ending in {', '.join(FILE_SUFFIXES)}, or a directory that gets a {FILE_NAME}",
    )
    add_base_model(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    file = target_file(options.output_path, options.overwrite)
    with located_megatron(options.megatron_path) as source:
        base = base_of(options.base_model, source)
        weights, _ = weights_of(source, base)
        # Queries, keys and values are views of one tensor there; each is written by itself.
        state = {name: weights.read(name).clone() for name in weights.shapes}
        tied = WeightNames.of(build_on_meta(load_config(base, None), "fp32")).tied
        state |= {alias: state[name] for alias, name in tied.items()}
    num_bytes = write(state, file)
    return f"wrote {len(state)} tensors, {readable.size(num_bytes)}: {file}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
