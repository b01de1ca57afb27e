"""The command-line arguments that several converters take, and their types."""

from __future__ import annotations

import argparse

from rlinf_lite.checkpoint.storage import StoragePath, absolute, storage_path
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
