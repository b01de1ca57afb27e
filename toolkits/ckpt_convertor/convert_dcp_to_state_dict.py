"""From the shards of a checkpoint to one plain PyTorch state dict of the model; nothing in them is unpickled.

Reads checkpoints of rlinf_lite and of RLinf.
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import torch

from rlinf_lite.checkpoint import CheckpointError, NoCheckpoint, StateMismatch, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.files import hashed, sync_dir
from rlinf_lite.checkpoint.read_state import read_tensors, tensor_names

PREFIXES = ("fsdp_checkpoint.model.", "model.")
"""What the names of model tensors begin with: in RLinf's checkpoints, in ours."""
RLINF_FOLDER = "dcp_checkpoint"
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


def locate(path: Path) -> tuple[Path, dict[str, str]]:
    """The folder with the shards, and its tied names (alias -> name). A checkpoint of ours is verified first.

    Raises:
        NoCheckpoint, DamagedCheckpoint: ``path`` is none of what can be converted, or does not verify.
    """
    if not path.is_dir():
        raise NoCheckpoint(f"--dcp_path {path}: no such directory")
    checkpoint = path.parent if _is_actor_folder_of_ours(path) else path
    if (checkpoint / layout.MANIFEST).exists() or _holds_shards(checkpoint / layout.ACTOR):
        manifest = manifests.read_verified(checkpoint, "full")
        return checkpoint / layout.ACTOR, dict(manifest.info.get("tied", {}))
    for folder in (path, path / RLINF_FOLDER, path / layout.ACTOR / RLINF_FOLDER):
        if _holds_shards(folder):
            return folder, {}
    raise NoCheckpoint(
        f"--dcp_path {path}: no checkpoint there; give a global_step_N directory, its {layout.ACTOR} folder, "
        f"or RLinf's {layout.ACTOR}/{RLINF_FOLDER}"
    )


def _is_actor_folder_of_ours(path: Path) -> bool:
    of_checkpoint = path.parent.name.startswith("global_step_") or (path.parent / layout.MANIFEST).exists()
    return path.name == layout.ACTOR and _holds_shards(path) and of_checkpoint


def _holds_shards(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def read_model(folder: Path, tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in the model; aliases share their tensor.

    Raises:
        StateMismatch: no tensor has a known prefix, or a tied name is missing.
    """
    names = tensor_names(folder)
    prefix = next((known for known in PREFIXES if any(name.startswith(known) for name in names)), None)
    if prefix is None:
        groups = sorted({name.split(".")[0] for name in names})
        raise StateMismatch(
            f"{folder}: no tensor's name begins with {' or '.join(PREFIXES)}; its top-level groups are: "
            f"{', '.join(groups) or 'none'}"
        )
    tensors = read_tensors(folder, lambda name: name.startswith(prefix))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for alias, name in tied.items():
        if name not in state:
            raise StateMismatch(f"{folder}: {alias} is tied to {name}, which is missing")
        state.setdefault(alias, state[name])
    return state


def target_file(output_path: Path, overwrite: bool) -> Path:
    """The file to write.

    Raises:
        FileExistsError: it is there, and ``overwrite`` was not asked for.
    """
    file = output_path if output_path.suffix.lower() in FILE_SUFFIXES else output_path / FILE_NAME
    if file.exists() and not (overwrite and file.is_file()):
        remedy = "give --overwrite to replace it" if file.is_file() else "it is a directory"
        raise FileExistsError(f"--output_path {file}: exists; {remedy}")
    return file


def write(state: dict[str, torch.Tensor], file: Path) -> int:
    """Write aside, make durable, rename. Returns the number of bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with hashed(aside) as stream:
            torch.save(state, cast(IO[bytes], stream))
            os.fsync(stream.fileno())
        os.replace(aside, file)
        sync_dir(file.parent)
    finally:
        aside.unlink(missing_ok=True)
    return stream.record().size


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dcp_path",
        type=Path,
        required=True,
        help="a global_step_N directory, its actor folder, or RLinf's actor/dcp_checkpoint folder",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        required=True,
        help=f"a file ending in {', '.join(FILE_SUFFIXES)}, or a folder that gets a {FILE_NAME}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    options = parse(arguments)
    try:
        file = target_file(options.output_path, options.overwrite)
        state = read_model(*locate(options.dcp_path.resolve()))
        num_bytes = write(state, file)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(state)} tensors, {num_bytes / 1e6:.1f} MB: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
