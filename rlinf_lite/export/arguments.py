"""What the commands of several converters have in common: arguments, their types, and how a command ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from rlinf_lite import readable
from rlinf_lite.checkpoint import SaveReport
from rlinf_lite.checkpoint.storage import StoragePath, absolute, storage_path
from rlinf_lite.errors import EXIT_USER_ERROR, UserError
from rlinf_lite.export.megatron_path import MEGATRON_PATH_HELP
from rlinf_lite.export.safetensors_file import parse_size
from rlinf_lite.models.build import DTYPES


def checkpoint_path(text: str) -> StoragePath:
    """A local path or any URL that fsspec knows.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        return absolute(storage_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Bytes, see `parse_size`.

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_megatron_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megatron_path", type=checkpoint_path, required=True, help=MEGATRON_PATH_HELP)


def add_base_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base_model",
        metavar="HF_DIR",
        help="the model that the run started from; default: the one that the checkpoint names",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights to write; default: as in the source")


def add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor_parallel", type=positive, default=1, metavar="N", help="tensor-parallel ranks to write; default: 1"
    )


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """The type that ``--dtype`` names; None: as in the source."""
    return DTYPES[options.dtype] if options.dtype else None


def wrote(report: SaveReport) -> str:
    """The last line of a command that has committed a checkpoint."""
    return f"wrote {readable.size(report.num_bytes)}: {report.path}"


def run(command: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> int:
    """Run a converter and print what it returns. Returns the exit code: 0, or 2 after one line on stderr."""
    try:
        text = command(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(text)
    return 0
