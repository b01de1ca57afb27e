"""Convert a checkpoint to one plain PyTorch state dict of the model. Nothing in the checkpoint is unpickled.

Reads checkpoints of rlinf_lite, RLinf and torchtitan, and plain DCP directories of a model's state dict.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlinf_lite import readable
from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.formats.read_state import read_tensors, tensor_names
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.durable import replaced_file
from rlinf_lite.export.arguments import checkpoint_path, run
from rlinf_lite.export.checkpoint_path import DCP_PATH_HELP, located
from rlinf_lite.paths import argument
from rlinf_lite.weights.dcp_names import model_prefix, not_of_model, of_model

FILE_SUFFIXES = (".pt", ".pth", ".bin")
FILE_NAME = "model_state_dict.pt"

DESCRIPTION = f"""\
Write the model of a checkpoint as a plain PyTorch state dict, for
torch.load(file, weights_only=True) and model.load_state_dict(state, strict=True).

example:
  python toolkits/ckpt_convertor/convert_dcp_to_state_dict.py \\
      --dcp_path logs/grpo-1.5b/checkpoints/global_step_50 \\
      --output_path exported
writes exported/{FILE_NAME}."""


def read_model(directory: StoragePath, tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in the model; aliases share their tensor.

    Raises:
        StateMismatch: no tensor has a known prefix, or a tied name is missing.
    """
    prefix = model_prefix(directory, tensor_names(directory))
    tensors = read_tensors(directory, lambda name: of_model(name, prefix))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for alias, name in tied.items():
        if name not in state:
            raise StateMismatch(f"{directory}: {alias} is tied to {name}, which is missing")
        state.setdefault(alias, state[name])
    return state


def target_file(output_path: Path, overwrite: bool) -> Path:
    """The file to write.

    Raises:
        FileExistsError: it exists, and ``overwrite`` is false.
    """
    file = output_path if output_path.suffix.lower() in FILE_SUFFIXES else output_path / FILE_NAME
    if file.exists() and not (overwrite and file.is_file()):
        remedy = "give --overwrite to replace it" if file.is_file() else "it is a directory"
        raise FileExistsError(f"--output_path {file}: exists; {remedy}")
    return file


def write(state: dict[str, torch.Tensor], file: Path) -> int:
    """Write ``file`` whole or not at all. Returns the number of bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file, several_writers=True) as stream:
        torch.save(state, stream)
    return file.stat().st_size


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dcp_path",
        type=checkpoint_path,
        required=True,
        help=DCP_PATH_HELP,
    )
    parser.add_argument(
        "--output_path",
        type=argument,
        required=True,
        help=f"a file ending in {', '.join(FILE_SUFFIXES)}, or a directory that gets a {FILE_NAME}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    file = target_file(options.output_path, options.overwrite)
    with located(options.dcp_path) as source:
        state = read_model(source.directory, source.tied)
        names = tensor_names(source.directory)
        others = not_of_model(names, model_prefix(source.directory, names))
    num_bytes = write(state, file)
    note = f"note: not of the model, so not written: {others}\n" if others else ""
    return note + f"wrote {len(state)} tensors, {readable.size(num_bytes)}: {file}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
